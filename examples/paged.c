/* paged.c - the guest of paged.h: fills 64 pages with numbers, then goes through them in a stride, adding and changing. */
#include "paged.h"

#include <stdio.h>
#include <string.h>

/* RDI: the words. */
__asm__(".pushsection .rodata\npaged_guest:\n"
        "mov $1, %eax\nxor %ecx, %ecx\n"
        "1: imul $1103515245, %rax, %rax\nadd $12345, %rax\nmov %rax, (%rdi,%rcx,8)\ninc %ecx\ncmp $32768, %ecx\njb 1b\n"
        "xor %eax, %eax\nxor %ecx, %ecx\nmov $98304, %edx\n"
        "2: add (%rdi,%rcx,8), %rax\nxor %rax, (%rdi,%rcx,8)\nadd $4099, %ecx\nand $32767, %ecx\ndec %edx\njnz 2b\n"
        "hlt\npaged_guest_end:\n.popsection");
extern const char paged_guest[], paged_guest_end[];

uint64_t paged_expected(void)
{
    static uint64_t a[PAGED_WORDS];
    uint64_t x = 1, sum = 0;
    for (unsigned i = 0; i < PAGED_WORDS; i++)
        a[i] = x = x * 1103515245 + 12345;
    for (unsigned n = 0, i = 0; n < 3 * PAGED_WORDS; n++, i = (i + 4099) % PAGED_WORDS) {
        sum += a[i];
        a[i] ^= sum;
    }
    return sum;
}

/* Tables at 0x10000: one of each level, and page tables for all of RAM; linear is physical. */
static void make_tables(vm_machine *m)
{
    uint64_t entry[512] = { 0x11003 };
    vm_write(m, 0x10000, entry, sizeof entry);
    entry[0] = 0x12003;
    vm_write(m, 0x11000, entry, sizeof entry);
    for (unsigned i = 0; i < PAGED_RAM >> 21; i++)
        entry[i] = 0x13003 + i * UINT64_C(0x1000);
    vm_write(m, 0x12000, entry, sizeof entry);
    for (unsigned i = 0; i < PAGED_RAM >> 12; i++) {
        uint64_t leaf = (uint64_t)i << 12 | 3;
        vm_write(m, 0x13000 + i * 8, &leaf, 8);
    }
}

vm_machine *paged_machine(vm_backend backend, const char *strategy)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.mmu = strategy;
    if (vm_create(&o, &m) < 0 || vm_map_ram(m, 0, PAGED_RAM, VM_PROT_RWX, NULL) < 0) {
        fprintf(stderr, "%s\n", vm_errmsg());
        vm_destroy(m);
        return NULL;
    }
    make_tables(m);
    vm_write(m, PAGED_CODE, paged_guest, (size_t)(paged_guest_end - paged_guest));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
    vm_vcpu_get_sregs(cpu, &s);
    s.cr3 = 0x10000;
    vm_vcpu_set_sregs(cpu, &s);
    vm_vcpu_get_regs(cpu, &r);
    r.rip = PAGED_CODE, r.rdi = PAGED_DATA, r.rsp = 0x8000;
    vm_vcpu_set_regs(cpu, &r);
    return m;
}

uint64_t paged_run(vm_machine *m, uint64_t slice, void (*each)(void *user, vm_machine *m), void *user)
{
    vm_exit e = VM_EXIT_INIT;
    vm_regs r = VM_REGS_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    o.max_instructions = slice;
    do {
        if (each)
            each(user, m);
        if (vm_vcpu_run(cpu, &o, &e) < 0)
            break;
    } while (e.reason == VM_EXIT_BUDGET);
    if (e.reason != VM_EXIT_HALT)
        fprintf(stderr, "the guest ended with %s\n", vm_exit_name((int)e.reason));
    vm_vcpu_get_regs(cpu, &r);
    return r.rax;
}
