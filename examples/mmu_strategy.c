/* mmu_strategy - how guest-virtual addresses become guest-physical ones, decided by the program. */
#include "common.h"

/* Everything appears again every 64 KiB, and the page at 0x8000 cannot be written. */
static int translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    out->gpa = gva % 0x10000;
    out->page_bytes = 4096;
    bool is_protected = out->gpa >> 12 == 8;
    out->prot = is_protected ? VM_PROT_RX : VM_PROT_RWX;
    if (!is_protected || access != VM_PROT_W)
        return VM_OK;
    out->fault_vector = 14;
    out->fault_error = 3;                       /* present, write */
    return VM_E_FAULT;
}

static const vm_mmu_ops mirror = { .size = sizeof mirror, .name = "mirror", .translate = translate };

int main(void)
{
    static const uint8_t code[] = { 0xc6, 0x04, 0x25, 0x00, 0x30, 0x05, 0, 7,   /* mov byte [0x53000], 7 */
                                    0x8a, 0x04, 0x25, 0x00, 0x30, 0, 0,         /* mov al, [0x3000] */
                                    0xc6, 0x04, 0x25, 0x00, 0x80, 0x01, 0, 1,   /* mov byte [0x18000], 1 */
                                    0xf4 };
    vm_options options = { .size = sizeof options, .backend = VM_BACKEND_INTERP, .mmu = "mirror" };  /* with KVM the hardware translates */
    vm_run_options run = { .size = sizeof run, .exception_exits = 1 << 14 };
    vm_exit exit = VM_EXIT_INIT;
    uint64_t fills;
    MUST(vm_mmu_register(&mirror));
    vm_machine *m = machine_with(&options, code, sizeof code);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    set(cpu, VM_REG_RIP, CODE);
    run_and_show(cpu, &run, &exit);
    MUST(vm_stats(m, "fills", &fills));
    printf("al = %" PRIu64 ", %" PRIu64 " fills\n", get(cpu, VM_REG_RAX) & 0xff, fills);
    vm_destroy(m);
    return 0;
}
