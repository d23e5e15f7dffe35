/* vcpu.c - making a vCPU and taking it down.
 *
 * A vCPU is one anonymous mapping, mostly TLB tables that stay untouched until used: zero pages cost nothing.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/core.h"
#include "x86/native.h"

#include <string.h>
#include <stdlib.h>
#include <sys/mman.h>

/* The vCPU, and a page for process.c. */
static size_t own_bytes(void)
{
    return (sizeof(vm_vcpu) + 4095) & ~(size_t)4095;
}

static size_t mapping_bytes(void)
{
    return own_bytes() + VM_PROCESS_PAGE;
}

void vm_vcpu_reset(vm_vcpu *cpu)
{
    cpu->has_pending = false;
    cpu->is_shut_down = false;
    cpu->inject.is_set = false;
    cpu->irq_look = cpu->machine->is_pc;
    cpu->x86.halted = false;
    cpu->x86.hook_done = false;
    cpu->x86.block_state = X86_BLOCK_FRESH;
    cpu->has_redirect = false;
    x86_io_retire(&cpu->x86);
}

void vm_vcpu_look_again(vm_vcpu *cpu)
{
    const vm_backend_ops *backend = cpu->machine->backend;
    if (!vm_vcpu_is_running(cpu))
        return;
    if (backend->look_again)
        backend->look_again(cpu);
    else if (backend->flush_code)
        backend->flush_code(cpu);
}

uint64_t vm_vcpu_retired_now(const vm_vcpu *cpu)
{
    const vm_backend_ops *backend = cpu->machine->backend;
    if (backend->retired && vm_vcpu_is_mine(cpu))
        return backend->retired(cpu);
    return vm_look_at(&cpu->x86.retired);
}

int vm_vcpu_create(vm_machine *m, unsigned index, vm_vcpu **out)
{
    vm_vcpu *cpu = mmap(NULL, mapping_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    if (cpu == MAP_FAILED)
        return vm_fail_errno(VM_E_NOMEM, "mmap of a vCPU");
    cpu->machine = m;
    cpu->index = index;
    cpu->x86.env = &vm_env;
    cpu->x86.env_data = cpu;
    cpu->x86.model = m->own_model ? m->own_model : x86_model_find(m->cpu_model);
    cpu->x86.tsc_khz = (uint32_t)(m->tsc_hz / 1000);
    cpu->random_state = UINT64_C(0x9E3779B97F4A7C15) * (index + 1);
    x86_tlb_init(&cpu->x86);
    x86_cpu_reset(&cpu->x86, false);
    int status = m->backend->vcpu_create ? m->backend->vcpu_create(cpu) : VM_OK;
    if (status != VM_OK) {
        munmap(cpu, mapping_bytes());
        return status;
    }
    if (index == 0)
        vm_process_enter(m, (uint8_t *)cpu + own_bytes());
    *out = cpu;
    return VM_OK;
}

void vm_vcpu_free(vm_vcpu *cpu)
{
    if (cpu->machine->backend->vcpu_destroy)
        cpu->machine->backend->vcpu_destroy(cpu);
    x86_native_destroy(&cpu->x86);
    free(cpu->parks);
    munmap(cpu, mapping_bytes());
}
