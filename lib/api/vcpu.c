/* vcpu.c - the functions of <libvm/vcpu.h>. */
#include "api/api.h"
#include "core/replay.h"

#include <string.h>

typedef unsigned long long ull;        /* for %llx */

VM_API vm_vcpu *vm_vcpu_get(vm_machine *m, unsigned index)
{
    return m && index < m->vcpu_count ? m->vcpus[index] : NULL;
}

VM_API vm_machine *vm_vcpu_machine(const vm_vcpu *cpu)
{
    return cpu ? cpu->machine : NULL;
}

VM_API unsigned vm_vcpu_index(const vm_vcpu *cpu)
{
    return cpu ? cpu->index : 0;
}

VM_API int vm_vcpu_set_mode(vm_vcpu *cpu, vm_mode mode)
{
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_set_mode"));
    if ((unsigned)mode > VM_MODE_FLAT64)
        return vm_fail(VM_E_INVALID, "vm_vcpu_set_mode: no mode %d", (int)mode);
    if (vm_vcpu_is_running(cpu))
        return vm_fail(VM_E_BUSY, "vm_vcpu_set_mode: not from a callback of the vCPU's own run");
    x86_cpu_set_mode(&cpu->x86, (unsigned)mode);
    vm_vcpu_reset(cpu);
    cpu->is_parked = false;
    cpu->x86.env->root_changed(&cpu->x86, 0);
    vm_vcpu_changed(cpu, VM_STATE_ALL);
    return VM_OK;
}

/* The caller may look at the vCPU, found out without a call; false: ask vm_check_vcpu(). */
static inline bool is_free(const vm_vcpu *cpu)
{
    return __builtin_expect(cpu != NULL, 1) &&
           (__builtin_expect((atomic_load_explicit(&cpu->state, memory_order_acquire) & ~VM_WAITED) == VM_IDLE, 1) ||
            vm_vcpu_is_mine(cpu));
}

VM_API int vm_vcpu_get_regs(vm_vcpu *cpu, vm_regs *regs)
{
    if (is_free(cpu) && regs && regs->size == sizeof *regs) {
        const x86_cpu *x = &cpu->x86;
        vm_vcpu_fetch(cpu, VM_STATE_REGS);
        memcpy(&regs->rax, x->gpr, sizeof x->gpr);
        regs->rip = x->rip;
        regs->rflags = x->rflags;
        return VM_OK;
    }
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_get_regs"));
    if (regs && regs->size == sizeof *regs) {
        vm_regs_get(cpu, regs);
        return VM_OK;
    }
    vm_regs all = VM_REGS_INIT;
    vm_regs_get(cpu, &all);
    return vm_struct_out(regs, &all, sizeof all, "vm_vcpu_get_regs", "regs");
}

VM_API int vm_vcpu_set_regs(vm_vcpu *cpu, const vm_regs *regs)
{
    vm_regs all;
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_set_regs"));
    if (regs && regs->size == sizeof *regs) {
        vm_regs_set(cpu, regs);
        return VM_OK;
    }
    VM_CHECK(vm_struct_in(&all, sizeof all, regs, "vm_vcpu_set_regs", "regs"));
    if (regs->size < sizeof all) {     /* what an older struct lacks stays as it is */
        vm_regs_get(cpu, &all);
        memcpy(&all, regs, regs->size);
    }
    vm_regs_set(cpu, &all);
    return VM_OK;
}

VM_API int vm_vcpu_get_sregs(vm_vcpu *cpu, vm_sregs *sregs)
{
    vm_sregs all = VM_SREGS_INIT;
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_get_sregs"));
    VM_CHECK(vm_struct_out(sregs, NULL, 0, "vm_vcpu_get_sregs", "sregs"));
    vm_sregs_get(cpu, &all);
    return vm_struct_out(sregs, &all, sizeof all, "vm_vcpu_get_sregs", "sregs");
}

VM_API int vm_vcpu_set_sregs(vm_vcpu *cpu, const vm_sregs *sregs)
{
    vm_sregs all;
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_set_sregs"));
    VM_CHECK(vm_struct_in(&all, sizeof all, sregs, "vm_vcpu_set_sregs", "sregs"));
    if (sregs->size < sizeof all) {
        vm_sregs_get(cpu, &all);
        memcpy(&all, sregs, sregs->size);
    }
    return vm_sregs_set(cpu, &all);
}

VM_API int vm_vcpu_get_fpu(vm_vcpu *cpu, vm_fpu *fpu)
{
    vm_fpu all = VM_FPU_INIT;
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_get_fpu"));
    VM_CHECK(vm_struct_out(fpu, NULL, 0, "vm_vcpu_get_fpu", "fpu"));
    vm_fpu_get(cpu, &all);
    return vm_struct_out(fpu, &all, sizeof all, "vm_vcpu_get_fpu", "fpu");
}

VM_API int vm_vcpu_set_fpu(vm_vcpu *cpu, const vm_fpu *fpu)
{
    vm_fpu all;
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_set_fpu"));
    VM_CHECK(vm_struct_in(&all, sizeof all, fpu, "vm_vcpu_set_fpu", "fpu"));
    if (fpu->size < sizeof all) {
        vm_fpu_get(cpu, &all);
        memcpy(&all, fpu, fpu->size);
    }
    return vm_fpu_set(cpu, &all);
}

/* ---- one register ---- */

static int check_reg(vm_vcpu *cpu, const char *function, int reg_id, const void *value, size_t bytes)
{
    VM_CHECK(vm_check_vcpu(cpu, function));
    size_t size = vm_reg_size(reg_id);
    if (!size)
        return vm_fail(VM_E_NOTFOUND, "%s: no register %d", function, reg_id);
    if (!value)
        return vm_fail(VM_E_INVALID, "%s: value is NULL", function);
    if (bytes != size)
        return vm_fail(VM_E_INVALID, "%s: %s has %zu bytes, not %zu", function, vm_reg_name(reg_id), size, bytes);
    return VM_OK;
}

VM_API int vm_vcpu_read_reg(vm_vcpu *cpu, int reg_id, void *value, size_t bytes)
{
    if (is_free(cpu) && (unsigned)reg_id - VM_REG_RAX < 16 && value && bytes == 8) {
        vm_vcpu_fetch(cpu, VM_STATE_REGS);
        memcpy(value, &cpu->x86.gpr[reg_id - VM_REG_RAX], 8);
        return VM_OK;
    }
    VM_CHECK(check_reg(cpu, "vm_vcpu_read_reg", reg_id, value, bytes));
    return vm_regs_read(cpu, reg_id, value);
}

VM_API int vm_vcpu_write_reg(vm_vcpu *cpu, int reg_id, const void *value, size_t bytes)
{
    VM_CHECK(check_reg(cpu, "vm_vcpu_write_reg", reg_id, value, bytes));
    return vm_regs_write(cpu, reg_id, value);
}

VM_API int vm_vcpu_get_msr(vm_vcpu *cpu, uint32_t msr, uint64_t *value)
{
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_get_msr"));
    VM_CHECK_NULL("vm_vcpu_get_msr", value);
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    if (!x86_msr_read(&cpu->x86, msr, value))
        return vm_fail(VM_E_NOTFOUND, "vm_vcpu_get_msr: no MSR 0x%x", msr);
    return VM_OK;
}

VM_API int vm_vcpu_set_msr(vm_vcpu *cpu, uint32_t msr, uint64_t value)
{
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_set_msr"));
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    if (!x86_msr_write(&cpu->x86, msr, value))
        return vm_fail(VM_E_INVALID, "vm_vcpu_set_msr: MSR 0x%x cannot be 0x%llx", msr, (ull)value);
    vm_vcpu_changed(cpu, VM_STATE_ALL);
    return VM_OK;
}

/* ---- guest-virtual memory ---- */

VM_API int vm_vcpu_translate(vm_vcpu *cpu, uint64_t gva, vm_prot access, uint64_t *gpa)
{
    x86_walk w = { 0 };
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_translate"));
    VM_CHECK_NULL("vm_vcpu_translate", gpa);
    if (access != VM_PROT_R && access != VM_PROT_W && access != VM_PROT_X)
        return vm_fail(VM_E_INVALID, "vm_vcpu_translate: access %d is not one of R, W, X", (int)access);
    vm_vcpu_fetch(cpu, VM_STATE_SREGS | VM_STATE_MSRS);
    if (!x86_walk_page(&cpu->x86, gva, access, cpu->x86.ctx, false, &w))
        return vm_fail(VM_E_FAULT, "vm_vcpu_translate: page fault at 0x%llx, error code 0x%x", (ull)gva, w.fault.error);
    *gpa = w.gpa;
    return VM_OK;
}

/* Supervisor rights, user pages included; look only. */
static int walk(vm_vcpu *cpu, const char *function, uint64_t gva, uint64_t *gpa)
{
    x86_walk w = { 0 };
    if (!x86_walk_page(&cpu->x86, gva, X86_READ, X86_CTX_KERNEL_AC, false, &w))
        return vm_fail(VM_E_FAULT, "%s: nothing mapped at guest-virtual 0x%llx", function, (ull)gva);
    *gpa = w.gpa;
    return VM_OK;
}

static size_t page_part(uint64_t gva, size_t bytes)
{
    size_t part = 4096 - (size_t)(gva & 4095);
    return part < bytes ? part : bytes;
}

static int copy(vm_vcpu *cpu, const char *function, uint64_t gva, uint8_t *buffer, size_t bytes, bool is_write)
{
    uint64_t gpa;
    uint8_t probe;
    VM_CHECK(vm_check_vcpu(cpu, function));
    if (bytes && !buffer)
        return vm_fail(VM_E_INVALID, "%s: buffer is NULL", function);
    vm_vcpu_fetch(cpu, VM_STATE_SREGS | VM_STATE_MSRS);
    if (bytes > page_part(gva, bytes))                   /* several pages: all or nothing */
        for (size_t done = 0, n; done < bytes; done += n) {
            n = page_part(gva + done, bytes - done);
            VM_CHECK(walk(cpu, function, gva + done, &gpa));
            if (vm_memory_copy(cpu->machine, gpa, &probe, 1, false) != VM_OK)
                return vm_fail(VM_E_FAULT, "%s: guest-virtual 0x%llx is no RAM", function, (ull)(gva + done));
        }
    for (size_t n; bytes; gva += n, buffer += n, bytes -= n) {
        n = page_part(gva, bytes);
        VM_CHECK(walk(cpu, function, gva, &gpa));
        VM_CHECK(is_write && cpu->machine->replay ? vm_replay_write(cpu->machine, gpa, buffer, n)
                                                  : vm_memory_copy(cpu->machine, gpa, buffer, n, is_write));
    }
    return VM_OK;
}

VM_API int vm_vcpu_read(vm_vcpu *cpu, uint64_t gva, void *buffer, size_t bytes)
{
    return copy(cpu, "vm_vcpu_read", gva, buffer, bytes, false);
}

VM_API int vm_vcpu_write(vm_vcpu *cpu, uint64_t gva, const void *buffer, size_t bytes)
{
    return copy(cpu, "vm_vcpu_write", gva, (uint8_t *)(uintptr_t)buffer, bytes, true);
}

/* ---- running ---- */

VM_API uint64_t vm_vcpu_retired(const vm_vcpu *cpu)
{
    return cpu ? vm_vcpu_retired_now(cpu) : 0;
}

VM_API int vm_vcpu_run(vm_vcpu *cpu, const vm_run_options *options, vm_exit *exit)
{
    vm_run_options o;
    vm_exit all;
    VM_CHECK_NULL("vm_vcpu_run", cpu);
    if (options && options->size != sizeof o) {
        VM_CHECK(vm_struct_in(&o, sizeof o, options, "vm_vcpu_run", "options"));
        options = &o;
    }
    if (options && options->exception_exits >> 32)
        return vm_fail(VM_E_INVALID, "vm_vcpu_run: exception_exits 0x%llx: there are 32 vectors",
                       (ull)options->exception_exits);
    if (exit && exit->size == sizeof *exit)
        return vm_run(cpu, options, exit);
    if (exit)
        VM_CHECK(vm_struct_out(exit, NULL, 0, "vm_vcpu_run", "exit"));
    memset(&all, 0, sizeof all);
    if (exit)
        memcpy(&all, exit, exit->size < sizeof all ? exit->size : sizeof all);
    int status = vm_run(cpu, options, &all);
    return status == VM_OK && exit ? vm_struct_out(exit, &all, sizeof all, "vm_vcpu_run", "exit") : status;
}

VM_API void vm_vcpu_kick(vm_vcpu *cpu)
{
    if (cpu)
        vm_vcpu_notify(cpu, X86_ATT_KICK);
}

VM_API int vm_vcpu_inject(vm_vcpu *cpu, uint8_t vector, bool has_error, uint32_t error)
{
    static const uint32_t with_error = 1u << 8 | 1u << 10 | 1u << 11 | 1u << 12 | 1u << 13 | 1u << 14 | 1u << 17 |
                                      1u << 21 | 1u << 29 | 1u << 30;
    VM_CHECK(vm_check_vcpu(cpu, "vm_vcpu_inject"));
    if (has_error && (vector >= 32 || !(with_error >> vector & 1)))
        return vm_fail(VM_E_INVALID, "vm_vcpu_inject: vector %u has no error code", vector);
    if (cpu->inject.is_set)
        return vm_fail(VM_E_BUSY, "vm_vcpu_inject: vector %u still waits to be delivered", cpu->inject.vector);
    if (cpu->machine->replay)
        return vm_replay_input(cpu->machine, &(vm_input){ .type = VM_LOG_INJECT, .a = vector,
                                                          .b = has_error ? UINT64_C(1) + error : 0 });
    cpu->inject.vector = vector;
    cpu->inject.has_error = has_error;
    cpu->inject.error = error;
    cpu->inject.is_set = true;
    if (vm_vcpu_is_running(cpu)) {                       /* from a callback: right after this instruction */
        vm_vcpu_notify(cpu, X86_ATT_IRQ);
        vm_vcpu_look_again(cpu);
    }
    return VM_OK;
}
