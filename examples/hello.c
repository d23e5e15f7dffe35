/* hello - runs ten bytes of 64-bit code in a virtual machine and prints what came out. */
#include <inttypes.h>
#include <libvm/libvm.h>
#include <stdio.h>

int main(void)
{
    static const uint8_t code[] = {0x48, 0x8d, 0x04, 0x37,              /* lea rax, [rdi + rsi] */
                                   0x48, 0x0f, 0xaf, 0xc0, 0xf4};       /* imul rax, rax; hlt */
    vm_machine *m;
    vm_exit exit = VM_EXIT_INIT;
    vm_regs regs = VM_REGS_INIT;
    if (vm_create(NULL, &m) || vm_map_ram(m, 0x1000, 0x1000, VM_PROT_RWX, NULL) || vm_write(m, 0x1000, code, sizeof code))
        return fprintf(stderr, "hello: %s\n", vm_errmsg()), 1;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
    vm_vcpu_get_regs(cpu, &regs);
    regs.rip = 0x1000, regs.rdi = 2, regs.rsi = 40;
    if (vm_vcpu_set_regs(cpu, &regs) || vm_vcpu_run(cpu, NULL, &exit) || vm_vcpu_get_regs(cpu, &regs))
        return fprintf(stderr, "hello: %s\n", vm_errmsg()), 1;
    printf("exit: %s\nrax = %" PRIu64 "\nrip = %#" PRIx64 "\n", vm_exit_name(exit.reason), regs.rax, regs.rip);
    vm_destroy(m);
    return 0;
}
