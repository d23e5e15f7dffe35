/* select.c - moving a machine from one backend to another between runs.
 *
 * The state of a vCPU is its x86_cpu; a backend that keeps it elsewhere brings it there first (ops->leave). Both want the
 * same fields for their data, so the old one's is set aside while the new one's is made. If that fails, for whatever
 * reason, the old data is put back, which needs nothing; else it goes.
 */
#include "core/core.h"
#include "core/doorbell.h"
#include "core/hook.h"
#include "mmu/mmu.h"

#include <stdlib.h>
#include <string.h>

/* What a backend keeps of a vCPU while another one has its place. */
typedef struct aside {
    void *interp, *jit, *backend_data;
    uint64_t scratch[sizeof((x86_cpu *)0)->jit_scratch / sizeof(uint64_t)];
} aside;

static void exchange(void **a, void **b)
{
    void *was = *a;
    *a = *b;
    *b = was;
}

/* The machine's data of a backend and those in `machine` and `vcpus` change places. */
static void swap(vm_machine *m, void **machine, aside *vcpus)
{
    exchange(&m->backend_data, machine);
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        aside was = vcpus[i];
        memcpy(vcpus[i].scratch, cpu->x86.jit_scratch, sizeof was.scratch);
        memcpy(cpu->x86.jit_scratch, was.scratch, sizeof was.scratch);
        exchange(&cpu->x86.interp, &vcpus[i].interp);
        exchange(&cpu->x86.jit, &vcpus[i].jit);
        exchange(&cpu->backend_data, &vcpus[i].backend_data);
    }
}

static void drop(vm_machine *m, const vm_backend_ops *ops, unsigned vcpus)
{
    for (unsigned i = 0; ops->vcpu_destroy && i < vcpus; i++) ops->vcpu_destroy(m->vcpus[i]);
    if (ops->machine_destroy) ops->machine_destroy(m);
}

static int make(vm_machine *m, const vm_backend_ops *ops)
{
    int status = ops->machine_create ? ops->machine_create(m) : VM_OK;
    if (status != VM_OK) return status;
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        status = ops->vcpu_create ? ops->vcpu_create(m->vcpus[i]) : VM_OK;
        if (status != VM_OK) {
            drop(m, ops, i);
            return status;
        }
    }
    return VM_OK;
}

/* Nothing that was derived from the old backend's runs may be believed. */
static void refresh(vm_machine *m)
{
    if (m->backend->map_changed) m->backend->map_changed(m);
    vm_events_announce(m);
    vm_mmu_forget(m);
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        x86_cpu *x = &m->vcpus[i]->x86;
        x86_mode_changed(x);
        m->vcpus[i]->irq_look = m->is_pc;
        vm_vcpu_changed(m->vcpus[i], VM_STATE_ALL);
    }
}

static int move(vm_machine *m, vm_backend backend, const vm_backend_ops *to)
{
    const vm_backend_ops *from = m->backend;
    void *machine = NULL;
    aside *vcpus = calloc(m->vcpu_count, sizeof *vcpus);
    if (!vcpus) return vm_fail(VM_E_NOMEM, "vm_backend_select: no memory");
    if (from->dirty_sync) from->dirty_sync(m);
    for (unsigned i = 0; from->leave && i < m->vcpu_count; i++) from->leave(m->vcpus[i]);
    swap(m, &machine, vcpus);
    m->backend = to;
    int status = make(m, to);
    swap(m, &machine, vcpus);
    if (status == VM_OK) {
        drop(m, from, m->vcpu_count);
        swap(m, &machine, vcpus);
        m->options.backend = backend;
    } else {
        m->backend = from;
    }
    free(vcpus);
    refresh(m);
    return status;
}

int vm_machine_renew(vm_machine *m)
{
    return move(m, m->options.backend, m->backend);
}

int vm_machine_select(vm_machine *m, vm_backend backend)
{
    const vm_backend_ops *to = vm_backend_find(&backend);
    if (!to) return VM_E_UNSUPPORTED;
    if (to == m->backend) return VM_OK;
    int status = vm_process_check(m);
    if (status != VM_OK) return status;
    if (!vm_hooks_suit(m, to))
        return vm_fail(VM_E_UNSUPPORTED, "vm_backend_select: backend %s serves no hooks; remove them first", to->name);
    if (!vm_mmu_suits(m->mmu, backend))
        return vm_fail(VM_E_UNSUPPORTED, "vm_backend_select: KVM cannot have the MMU strategy \"%s\"; select \"tlb\" first",
                       m->mmu->name);
    if (backend == VM_BACKEND_KVM && vm_cover_is_on(m))
        return vm_fail(VM_E_UNSUPPORTED, "vm_backend_select: KVM cannot record coverage; turn it off first");
    vm_device_lock(m);
    vm_pause(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i])) status = vm_fail(VM_E_BUSY, "vm_backend_select: vCPU %u is running", i);
    if (status == VM_OK) status = move(m, backend, to);
    vm_resume(m);
    vm_device_unlock(m);
    return status;
}
