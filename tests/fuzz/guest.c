/* guest.c - fuzz target: guest code. Byte 0 of the input chooses the mode the code begins in, the MMU and, in bit 4, interpreter or JIT,
 * byte 1 registers; the rest is the code. It runs in a machine that a snapshot puts back, with a budget, exits completed with what
 * is at hand.
 */
#include "fuzz.h"
#include <libvm/libvm.h>
#include <stdlib.h>

const struct fuzz_target fuzz_target = { "guest", 4000, 600 };

enum { RAM = 0x10000, CODE = 0x8000, RUNS = 4 };

static void place(vm_machine *m, vm_vcpu *cpu, const uint8_t *data, size_t size)
{
    static const vm_mode modes[4] = { VM_MODE_FLAT64, VM_MODE_FLAT32, VM_MODE_REAL, VM_MODE_FLAT64 };
    vm_regs regs = VM_REGS_INIT;
    uint64_t *gpr = &regs.rax;
    vm_write(m, CODE, data + 2, size - 2 < 0x4000 ? size - 2 : 0x4000);
    vm_write(m, 0, data, size < 0x800 ? size : 0x800);          /* vectors, tables: whatever is at hand */
    vm_vcpu_set_mode(cpu, modes[data[0] & 3]);
    vm_vcpu_get_regs(cpu, &regs);
    for (unsigned i = 0; i < 16; i++)
        gpr[i] = data[1] & 1 ? (uint64_t)data[(i * 7 + 3) % size] * 0x0101010101010101u : CODE + 0x100 * i - (data[1] >> 4);
    regs.rsp = 0x7ff0;
    regs.rip = CODE;
    regs.rflags = 2 | (data[1] & 2 ? 0x200 : 0) | (data[1] & 4 ? 0x100 : 0);
    vm_vcpu_set_regs(cpu, &regs);
    if (data[0] & 4) {
        /* A guest without rights: ring 3 in 64-bit mode. */
        vm_sregs sregs = VM_SREGS_INIT;
        vm_vcpu_get_sregs(cpu, &sregs);
        sregs.cs.attributes |= 0x60;
        sregs.ss.attributes |= 0x60;
        sregs.cs.selector |= 3;
        sregs.ss.selector |= 3;
        vm_vcpu_set_sregs(cpu, &sregs);
    }
}

/* One machine a backend, kept and put back: making it takes far longer than an input. */
static vm_machine *fresh_machine(vm_backend backend, const char *mmu)
{
    static struct { vm_machine *m; vm_snapshot *fresh; const char *mmu; } kept[4];
    vm_options options = VM_OPTIONS_INIT;
    options.backend = backend;
    options.code_cache_bytes = 1 << 20;
    if (!kept[backend].m) {
        if (vm_create(&options, &kept[backend].m) != VM_OK)
            return NULL;
        if (vm_map_ram(kept[backend].m, 0, RAM, VM_PROT_RWX, NULL) != VM_OK ||
            vm_snapshot_take(kept[backend].m, &kept[backend].fresh) != VM_OK)
            abort();
    }
    if (vm_snapshot_restore(kept[backend].m, kept[backend].fresh) != VM_OK)
        abort();
    if (kept[backend].mmu != mmu && vm_mmu_select(kept[backend].m, mmu) != VM_OK)
        abort();
    kept[backend].mmu = mmu;
    return kept[backend].m;
}

static void run_on(vm_backend backend, const uint8_t *data, size_t size)
{
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_machine *m = fresh_machine(backend, data[0] & 8 ? "shadow" : NULL);
    if (!m)
        return;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    run.max_instructions = 16 + size / 4;       /* through short code some times, through long once */
    run.exception_exits = data[1] & 8 ? data[0] : 0;
    place(m, cpu, data, size);
    for (int i = 0; i < RUNS; i++) {
        if (vm_vcpu_run(cpu, &run, &e) != VM_OK || e.reason == VM_EXIT_INTERNAL)
            abort();                    /* the library found a mistake of its own */
        if (e.reason == VM_EXIT_SHUTDOWN || e.reason == VM_EXIT_HALT || e.reason == VM_EXIT_BUDGET)
            break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 3)
        return 0;
    run_on(data[0] & 16 ? VM_BACKEND_INTERP : VM_BACKEND_JIT, data, size);
    return 0;
}
