/* env.c - what a vCPU sees of its surroundings: the x86_env table of every machine.
 *
 * Called on the vCPU's thread inside an instruction. On BARE machines what a PC would ask its platform for is
 * answered here:
 * CR8 is a plain register, there is no APIC, random numbers repeat from run to run.
 */
#include "core/call.h"
#include "core/hook.h"
#include "mmu/ept.h"
#include "mmu/mmu.h"
#include "platform/pc.h"

#include <sys/random.h>

static uint8_t *env_page(x86_cpu *x, uint64_t gpa, unsigned *prot)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    const vm_range *range = vm_find(cpu, gpa);
    if (!range || range->region->kind > VM_REGION_FILE)
        return NULL;
    const vm_region *r = range->region;
    x->ram_gpa = range->gpa;
    x->ram_bytes = range->bytes;
    x->ram_host = r->host;
    uint64_t offset = gpa - range->gpa;
    uint8_t flags = atomic_load_explicit(&r->page_flags[offset >> 12], memory_order_relaxed);
    *prot = vm_region_prot(r, offset);
    if (flags & (VM_PAGE_CODE | VM_PAGE_CLEAN | VM_PAGE_KEPT | VM_PAGE_TABLE)) {
        bool is_walkers = (*prot & X86_WRITE) && !(flags & (VM_PAGE_CODE | VM_PAGE_CLEAN | VM_PAGE_KEPT));
        *prot = (*prot & ~(unsigned)X86_WRITE) | (*prot & X86_WRITE ? X86_SEEN : 0) | (is_walkers ? X86_WALKER : 0);
    }
    if (__builtin_expect(cpu->ept_view != NULL, 0)) {
        unsigned allowed = vm_ept_prot(cpu, gpa);
        if (*prot & X86_WRITE)
            *prot |= X86_WALKER;       /* page walks are not the view's concern */
        *prot &= allowed | X86_WALKER | (allowed & X86_WRITE ? X86_SEEN : 0);
    }
    return r->host + offset;
}

static int env_phys_read(x86_cpu *x, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *value)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    if (__builtin_expect(cpu->ept_view != NULL, 0)) {
        int answer = vm_ept_check(cpu, gpa, gva, n, access, value);
        if (answer != VM_EPT_GO)
            return answer == VM_EPT_DONE ? X86_IO_DONE : X86_IO_EXIT;
    }
    return vm_bus_read(cpu, gpa, n, access, value);
}

static int env_phys_write(x86_cpu *x, uint64_t gpa, uint64_t gva, unsigned n, uint64_t value)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    if (__builtin_expect(cpu->ept_view != NULL, 0) && !x->is_walking) {
        int answer = vm_ept_check(cpu, gpa, gva, n, X86_WRITE, &value);
        if (answer != VM_EPT_GO)
            return answer == VM_EPT_DONE ? X86_IO_DONE : X86_IO_EXIT;
    }
    return vm_bus_write(cpu, gpa, n, value);
}

static int env_port_in(x86_cpu *x, uint16_t port, unsigned n, uint64_t *value)
{
    return vm_bus_in(vm_vcpu_of(x), port, n, value);
}

static int env_port_out(x86_cpu *x, uint16_t port, unsigned n, uint64_t value)
{
    return vm_bus_out(vm_vcpu_of(x), port, n, value);
}

static void env_code_page(x86_cpu *x, uint64_t gpa)
{
    vm_page_has_code(vm_vcpu_of(x), gpa);
}

static uint64_t env_tsc(x86_cpu *x)
{
    return vm_clock_tsc(vm_vcpu_of(x)->machine);
}

/* xorshift64*: repeatable. */
static uint64_t bare_random(vm_vcpu *cpu)
{
    uint64_t s = cpu->random_state;
    s ^= s >> 12;
    s ^= s << 25;
    s ^= s >> 27;
    cpu->random_state = s;
    return s * UINT64_C(0x2545F4914F6CDD1D);
}

static uint64_t env_random(x86_cpu *x)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    uint64_t value;
    if (!cpu->machine->is_pc || cpu->machine->replay || getrandom(&value, sizeof value, GRND_NONBLOCK) != (ssize_t)sizeof value)
        return bare_random(cpu);
    return value;
}

static bool env_msr_read(x86_cpu *x, uint32_t msr, uint64_t *value)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    return cpu->machine->is_pc && vm_pc_msr_read(cpu, msr, value);
}

static bool env_msr_write(x86_cpu *x, uint32_t msr, uint64_t value)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    return cpu->machine->is_pc && vm_pc_msr_write(cpu, msr, value);
}

static uint8_t env_cr8_read(x86_cpu *x)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    return cpu->machine->is_pc ? vm_pc_cr8_read(cpu) : cpu->bare_cr8;
}

static void env_cr8_write(x86_cpu *x, uint8_t value)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    if (cpu->machine->is_pc)
        vm_pc_cr8_write(cpu, value);
    else
        cpu->bare_cr8 = value & 15;
}

static unsigned env_apic_id(x86_cpu *x)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    return cpu->machine->is_pc ? vm_pc_apic_id(cpu) : cpu->index;
}

static unsigned env_cpu_count(x86_cpu *x)
{
    return vm_vcpu_of(x)->machine->vcpu_count;
}

static void env_ferr(x86_cpu *x)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    if (cpu->machine->is_pc)
        vm_pc_ferr(cpu);
}

static bool env_is_stop(x86_cpu *x, uint64_t la)
{
    return vm_hook_is_stop(vm_vcpu_of(x)->machine, la);
}

static int env_hypercall(x86_cpu *x)
{
    vm_machine *m = vm_vcpu_of(x)->machine;
    return m->is_pc && !vm_is_bound_hypercall(m, x) ? -1 : X86_IO_EXIT;
}

/* The access under the lock may turn out to be a device's, and the device lock comes before the one that stops the world. */
static void env_lock_begin(x86_cpu *x)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    if (cpu->machine->vcpu_count > 1) {
        vm_device_lock(cpu->machine);
        vm_pause(cpu->machine);
        cpu->lock_depth++;
    }
}

static void env_lock_end(x86_cpu *x)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    if (cpu->lock_depth) {
        cpu->lock_depth--;
        vm_resume(cpu->machine);
        vm_device_unlock(cpu->machine);
    }
}

const x86_env vm_env = {
    .page = env_page,
    .phys_read = env_phys_read,
    .phys_write = env_phys_write,
    .port_in = env_port_in,
    .port_out = env_port_out,
    .fill = vm_mmu_fill,
    .root_changed = vm_mmu_root_changed,
    .invalidate = vm_mmu_invalidate,
    .invalidate_pcid = vm_mmu_invalidate_pcid,
    .code_page = env_code_page,
    .tsc = env_tsc,
    .random = env_random,
    .msr_read = env_msr_read,
    .msr_write = env_msr_write,
    .cr8_read = env_cr8_read,
    .cr8_write = env_cr8_write,
    .apic_id = env_apic_id,
    .cpu_count = env_cpu_count,
    .ferr = env_ferr,
    .hypercall = env_hypercall,
    .lock_begin = env_lock_begin,
    .lock_end = env_lock_end,
    .hook = vm_env_hook,
    .hook_before = vm_env_hook_before,
    .is_stop = env_is_stop,
    .withheld = vm_env_withheld,
    .watched = vm_env_watched,
};
