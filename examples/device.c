/* device - a device of the program: a counter at a memory address, and a port that prints. */
#include "common.h"

static int count_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    *value = ++*(uint64_t *)user;
    return 0;
}

static int count_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    *(uint64_t *)user = value;
    return 0;
}

static int print(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    printf("the guest says '%c'\n", (int)value);
    return 0;
}

int main(void)
{
    static const uint8_t code[] = { 0xc7, 0x04, 0x25, 0, 0, 8, 0, 40, 0, 0, 0,  /* mov dword [0x80000], 40 */
                                    0x8b, 0x04, 0x25, 0, 0, 8, 0,               /* mov eax, [0x80000] */
                                    0x8b, 0x04, 0x25, 0, 0, 8, 0,               /* mov eax, [0x80000] */
                                    0xe6, 0xe9, 0xf4 };                         /* out 0xe9, al; hlt */
    vm_io_ops counter = VM_IO_OPS_INIT, printer = VM_IO_OPS_INIT;
    uint64_t count = 0;
    vm_exit exit = VM_EXIT_INIT;
    counter.read = count_read, counter.write = count_write;
    printer.write = print;
    vm_machine *m = machine_with(NULL, code, sizeof code);
    MUST(vm_map_mmio(m, 0x80000, 8, &counter, &count, NULL));
    MUST(vm_map_pio(m, 0xe9, 1, &printer, NULL, NULL));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    set(cpu, VM_REG_RIP, CODE);
    run_and_show(cpu, NULL, &exit);
    printf("rax = %" PRIu64 "\n", get(cpu, VM_REG_RAX));
    vm_destroy(m);
    return 0;
}
