/* flat.c - strategy "flat": linear addresses are physical ones, with no walk. For machines whose guests do not use paging;
 * once a guest switches paging on, its tables are walked as under "tlb", and what lies beyond the physical addresses faults as
 * it does there, so results never differ. */
#include "mmu/mmu.h"

bool vm_mmu_is_flat(const vm_vcpu *cpu)
{
    return cpu->x86.flat || !(cpu->x86.cr0 & X86_CR0_PG);
}

static int flat_translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    if (!vm_mmu_is_flat(cpu) || (gva & ~cpu->x86.phys_mask))
        return vm_mmu_walk(cpu, gva, access, out);
    out->gpa = gva;
    out->page_bytes = 4096;
    out->prot = VM_PROT_RWX;
    return VM_OK;
}

const vm_mmu_ops vm_mmu_flat = { .size = sizeof(vm_mmu_ops), .name = "flat", .translate = flat_translate };
