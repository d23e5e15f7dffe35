/* tlb.c - strategy "tlb": every miss of the inline TLB is a walk of the guest's page tables. It keeps nothing of its
 * own. */
#include "mmu/mmu.h"

static int tlb_translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    return vm_mmu_walk(cpu, gva, access, out);
}

const vm_mmu_ops vm_mmu_tlb = { .size = sizeof(vm_mmu_ops), .name = "tlb", .translate = tlb_translate };
