/* mmu.h - MMU strategies behind one vtable (public: struct vm_mmu_ops in <libvm/mmu.h>), one inline TLB in front.
 *
 * A strategy decides misses, faults, permissions and invalidation. fill.c asks it on a miss and installs the inline TLB
 * entry; hits cost the same under every strategy.
 */
#ifndef LIBVM_MMU_H
#define LIBVM_MMU_H
#include "core/core.h"
const vm_mmu_ops *vm_mmu_find(const char *name);         /* NULL name: default ("tlb"); NULL result: unknown */
bool vm_mmu_fill(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, uint64_t *gpa);    /* x86_env.fill */
void vm_mmu_root_changed(x86_cpu *cpu, bool keep_global); /* x86_env.root_changed */
void vm_mmu_invalidate(x86_cpu *cpu, uint64_t la, uint64_t bytes);                             /* x86_env.invalidate */
/* Drop write permission of a page from a vCPU's inline TLB (it became a code or clean page); of all RAM: gpa =
 * UINT64_MAX. */
bool vm_mmu_protect_page(vm_vcpu *cpu, uint64_t gpa);          /* true: there was one */
/* The guest's own walk in a given access context, counted. */
bool vm_mmu_walk_ctx(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w);
/* Give a machine its strategy (nobody runs); detach: destroy the strategy's state. */
int vm_mmu_attach(vm_machine *m, const char *name);
void vm_mmu_detach(vm_machine *m);
extern const vm_mmu_ops vm_mmu_tlb, vm_mmu_flat;
bool vm_mmu_is_flat(const vm_vcpu *cpu);                  /* no page tables in use now */

#endif
