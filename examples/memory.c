/* memory - maps, protects, reads and writes a guest's memory, through a pointer too; which pages the guest wrote. */
#include "common.h"

int main(void)
{
    static const uint8_t code[] = { 0xc6, 0x04, 0x25, 0x00, 0x30, 0, 0, 42,     /* mov byte [0x3000], 42 */
                                    0xc6, 0x04, 0x25, 0x00, 0x50, 0, 0, 43,     /* mov byte [0x5000], 43 */
                                    0xf4 };                                     /* hlt */
    vm_machine *m;
    vm_region *ram;
    vm_exit exit = VM_EXIT_INIT;
    uint64_t dirty = 0;
    MUST(vm_create(NULL, &m));
    MUST(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, &ram));
    MUST(vm_write(m, CODE, code, sizeof code));
    MUST(vm_protect(m, 0x5000, 0x1000, VM_PROT_R));
    MUST(vm_dirty_log(m, true));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    MUST(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    set(cpu, VM_REG_RIP, CODE);
    run_and_show(cpu, NULL, &exit);             /* the write to 0x5000 is not permitted */
    MUST(vm_protect(m, 0x5000, 0x1000, VM_PROT_RW));
    run_and_show(cpu, NULL, &exit);             /* now it is */
    MUST(vm_dirty_fetch(m, 0, 0x10000, &dirty));
    for (unsigned page = 0; page < 16; page++)
        if (dirty >> page & 1)
            printf("written: %#x\n", page * 4096);
    const uint8_t *bytes = vm_region_data(ram);
    printf("bytes: %u %u\n", bytes[0x3000], bytes[0x5000]);
    if (vm_read(m, 0x10000, &dirty, 1) == VM_E_FAULT)
        printf("%s\n", vm_errmsg());
    vm_destroy(m);
    return 0;
}
