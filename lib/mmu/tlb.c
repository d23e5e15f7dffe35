/* tlb.c - strategy "tlb": every miss of the inline TLB is a walk of the guest's page tables. It keeps nothing of its
 * own. */
#include "mmu/mmu.h"

static int tlb_translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    return vm_mmu_walk(cpu, gva, access, out);
}

const vm_mmu_ops vm_mmu_tlb = { .size = sizeof(vm_mmu_ops), .name = "tlb", .translate = tlb_translate };

VM_API int vm_mmu_walk(vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    if (!cpu || !out || out->size < sizeof *out)
        return vm_fail(VM_E_INVALID, "vm_mmu_walk: NULL or too small an argument");
    if (access != VM_PROT_R && access != VM_PROT_W && access != VM_PROT_X)
        return vm_fail(VM_E_INVALID, "vm_mmu_walk: access %d is not one of R, W, X", (int)access);
    x86_walk w;
    bool ok = vm_mmu_walk_ctx(cpu, gva, access, cpu->walk_ctx, &w);
    vm_mmu_to_result(&w, ok, out);
    return ok ? VM_OK : VM_E_FAULT;
}

void vm_mmu_to_result(const x86_walk *w, bool ok, struct vm_mmu_result *out)
{
    out->entry_count = w->count;
    for (unsigned i = 0; i < w->count; i++)
        out->entry[i] = w->steps[i].gpa;
    if (!ok) {
        out->fault_vector = w->fault.vector;
        out->fault_error = w->fault.error;
        return;
    }
    out->gpa = w->gpa;
    out->page_bytes = w->page_bytes;
    out->prot = (vm_prot)w->prot;
    out->global = w->global;
}
