/* machine.c - the functions of <libvm/machine.h> and <libvm/mmu.h> that need checks. */
#include "api/api.h"
#include "core/replay.h"
#include "mmu/mmu.h"
#include "platform/pc.h"

#include <string.h>

#define RAM_MIN UINT64_C(0x100000)
#define RAM_MAX (UINT64_C(1) << 38)

static int check_options(const vm_options *o)
{
    if ((unsigned)o->backend > VM_BACKEND_INTERP)
        return vm_fail(VM_E_INVALID, "vm_create: no backend %d", (int)o->backend);
    if ((unsigned)o->platform > VM_PLATFORM_PC)
        return vm_fail(VM_E_INVALID, "vm_create: no platform %d", (int)o->platform);
    if (o->vcpus > VM_MAX_VCPUS)
        return vm_fail(VM_E_INVALID, "vm_create: %u vCPUs, at most %u are possible", o->vcpus, VM_MAX_VCPUS);
    if (o->mmu && !vm_mmu_find(o->mmu))
        return vm_fail(VM_E_UNSUPPORTED, "vm_create: no MMU strategy \"%.60s\"", o->mmu);
    if (o->ram_advice & ~VM_ADVICE_ALL)
        return vm_fail(VM_E_INVALID, "vm_create: unknown bits in ram_advice 0x%x", o->ram_advice);
    if (o->ram_private && !o->ram_file)
        return vm_fail(VM_E_INVALID, "vm_create: ram_private is for a ram_file");
    if (o->platform == VM_PLATFORM_BARE && (o->ram_file || o->ram_advice))
        return vm_fail(VM_E_INVALID, "vm_create: ram_file and ram_advice are for a PC's main memory");
    if (o->platform == VM_PLATFORM_BARE) {
        if (o->ram_bytes)
            return vm_fail(VM_E_INVALID, "vm_create: ram_bytes is 0x%llx, but a BARE machine has none (map some)",
                           (unsigned long long)o->ram_bytes);
    } else if (o->ram_bytes % 4096 || o->ram_bytes < RAM_MIN || o->ram_bytes > RAM_MAX) {
        return vm_fail(VM_E_INVALID, "vm_create: ram_bytes is 0x%llx; a PC needs whole pages from 0x%llx to 0x%llx",
                       (unsigned long long)o->ram_bytes, (unsigned long long)RAM_MIN, (unsigned long long)RAM_MAX);
    }
    if (o->code_cache_bytes > UINT64_C(1) << 31)
        return vm_fail(VM_E_INVALID, "vm_create: code_cache_bytes is 0x%llx, at most 2 GiB are possible",
                       (unsigned long long)o->code_cache_bytes);
    return VM_OK;
}

VM_API int vm_create(const vm_options *options, vm_machine **out)
{
    vm_options o = VM_OPTIONS_INIT;
    VM_CHECK_NULL("vm_create", out);
    *out = NULL;
    if (options)
        VM_CHECK(vm_struct_in(&o, sizeof o, options, "vm_create", "options"));
    VM_CHECK(check_options(&o));
    return vm_machine_create(&o, out);
}

VM_API void vm_destroy(vm_machine *m)
{
    if (!m)
        return;
    if (vm_vcpu_self(m)) {
        vm_fail(VM_E_BUSY, "vm_destroy: called from a callback of the machine; nothing done");
        return;
    }
    vm_machine_destroy(m);
}

VM_API int vm_reset(vm_machine *m)
{
    VM_CHECK_NULL("vm_reset", m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i]))
            return vm_fail(VM_E_BUSY, "vm_reset: vCPU %u is running", i);
    if (m->replay)
        return vm_replay_input(m, &(vm_input){ .type = VM_LOG_RESET });
    vm_machine_reset(m);
    return VM_OK;
}

VM_API int vm_query(vm_backend backend, const char *capability, uint64_t *value)
{
    VM_CHECK_NULL("vm_query", capability);
    VM_CHECK_NULL("vm_query", value);
    if ((unsigned)backend > VM_BACKEND_INTERP)
        return vm_fail(VM_E_INVALID, "vm_query: no backend %d", (int)backend);
    return vm_machine_query(backend, capability, value);
}

VM_API int vm_backend_select(vm_machine *m, vm_backend backend)
{
    VM_CHECK_NULL("vm_backend_select", m);
    if ((unsigned)backend > VM_BACKEND_INTERP)
        return vm_fail(VM_E_INVALID, "vm_backend_select: no backend %d", (int)backend);
    if (m->poisoned)
        return vm_fail(VM_E_INTERNAL, "vm_backend_select: the machine met an internal error earlier");
    if (m->replay && backend != VM_BACKEND_JIT && backend != VM_BACKEND_INTERP)
        return vm_replay_forbids(m, "vm_backend_select");
    return vm_machine_select(m, backend);
}

VM_API unsigned vm_vcpu_count(const vm_machine *m)
{
    return m ? m->vcpu_count : 0;
}

VM_API int vm_stats(vm_machine *m, const char *name, uint64_t *value)
{
    VM_CHECK_NULL("vm_stats", m);
    VM_CHECK_NULL("vm_stats", name);
    VM_CHECK_NULL("vm_stats", value);
    return vm_stats_get(m, name, value);
}

VM_API uint64_t vm_time(vm_machine *m)
{
    return m ? vm_clock_now(m) : 0;
}

VM_API int vm_irq_set(vm_machine *m, unsigned gsi, bool level)
{
    VM_CHECK_NULL("vm_irq_set", m);
    if (!m->is_pc)
        return vm_fail(VM_E_UNSUPPORTED, "vm_irq_set: a BARE machine has no interrupt controller (use vm_vcpu_inject)");
    atomic_fetch_add_explicit(&m->stat_irqs, 1, memory_order_relaxed);
    if (m->replay)
        return vm_replay_input(m, &(vm_input){ .type = VM_LOG_LINE, .a = gsi, .b = level });
    return vm_pc_irq_set(m, gsi, level);
}

VM_API int vm_irq_msi(vm_machine *m, uint64_t address, uint32_t data)
{
    VM_CHECK_NULL("vm_irq_msi", m);
    if (!m->is_pc)
        return vm_fail(VM_E_UNSUPPORTED, "vm_irq_msi: a BARE machine has no interrupt controller (use vm_vcpu_inject)");
    atomic_fetch_add_explicit(&m->stat_msis, 1, memory_order_relaxed);
    if (m->replay)
        return vm_replay_input(m, &(vm_input){ .type = VM_LOG_MSI, .a = address, .b = data });
    return vm_pc_irq_msi(m, address, data);
}

/* ---- consoles ---- */

static int check_pc(vm_machine *m, const char *function)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    return m->is_pc ? VM_OK : vm_fail(VM_E_UNSUPPORTED, "%s: a BARE machine has no console", function);
}

VM_API int vm_serial_output(vm_machine *m, unsigned index, vm_console_fn fn, void *user)
{
    VM_CHECK(check_pc(m, "vm_serial_output"));
    return vm_pc_serial_output(m, index, fn, user);
}

VM_API int vm_serial_input(vm_machine *m, unsigned index, const uint8_t *bytes, size_t count)
{
    VM_CHECK(check_pc(m, "vm_serial_input"));
    if (count)
        VM_CHECK_NULL("vm_serial_input", bytes);
    if (m->replay)
        return vm_replay_input(m, &(vm_input){ .type = VM_LOG_SERIAL, .a = index, .data = bytes, .bytes = count });
    return vm_pc_serial_input(m, index, bytes, count);
}

VM_API int vm_debugcon_output(vm_machine *m, vm_console_fn fn, void *user)
{
    VM_CHECK(check_pc(m, "vm_debugcon_output"));
    return vm_pc_debugcon_output(m, fn, user);
}

/* ---- MMU ---- */

VM_API int vm_mmu_select(vm_machine *m, const char *name)
{
    VM_CHECK_NULL("vm_mmu_select", m);
    int status = VM_OK;
    vm_pause(m);                       /* other threads may write memory, or begin to run a vCPU, meanwhile */
    for (unsigned i = 0; i < m->vcpu_count && status == VM_OK; i++)
        if (vm_vcpu_is_running(m->vcpus[i]))
            status = vm_fail(VM_E_BUSY, "vm_mmu_select: vCPU %u is running", i);
    if (status == VM_OK)
        status = vm_mmu_attach(m, name);
    vm_resume(m);
    return status;
}

/* The caller may touch what the vCPU's thread uses. */
static int check_own(const vm_vcpu *cpu, const char *function)
{
    if (!cpu)
        return vm_fail(VM_E_INVALID, "%s: cpu is NULL", function);
    if (vm_vcpu_is_running(cpu) && !vm_vcpu_is_mine(cpu))
        return vm_fail(VM_E_BUSY, "%s: vCPU %u is running", function, cpu->index);
    return VM_OK;
}

VM_API int vm_mmu_flush(vm_vcpu *cpu, uint64_t gva, uint64_t bytes)
{
    VM_CHECK(check_own(cpu, "vm_mmu_flush"));
    vm_mmu_drop(cpu, gva, bytes);
    vm_mmu_forget_parked(cpu, 0);
    return VM_OK;
}

VM_API int vm_mmu_trap_writes(vm_vcpu *cpu, uint64_t gpa, bool on)
{
    VM_CHECK(check_own(cpu, "vm_mmu_trap_writes"));
    vm_machine *m = cpu->machine;
    if (m->options.backend == VM_BACKEND_KVM)
        return vm_fail(VM_E_UNSUPPORTED, "vm_mmu_trap_writes: with KVM the host's hardware translates");
    if (!vm_page_trap(m, gpa & X86_PAGE_MASK, on))
        return vm_fail(VM_E_FAULT, "vm_mmu_trap_writes: no RAM at guest-physical 0x%llx", (unsigned long long)gpa);
    for (unsigned i = 0; on && i < m->vcpu_count; i++)
        vm_mmu_protect_page(m->vcpus[i], gpa & X86_PAGE_MASK);
    return VM_OK;
}

VM_API const char *vm_mmu_current(const vm_machine *m)
{
    return m && m->mmu ? m->mmu->name : NULL;
}
