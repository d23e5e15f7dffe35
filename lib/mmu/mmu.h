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
/* Enters the page at la for R or W in the current context, if the strategy can do it in a way that nobody sees: no walk, no
 * fault, no callback. For backends that would have to put the vCPU's state in order before they call vm_mmu_fill(). */
bool vm_mmu_refill(x86_cpu *cpu, uint64_t la, unsigned access);
static inline bool vm_mmu_can_refill(const vm_vcpu *cpu) { return cpu->machine->mmu_kind == VM_MMU_SHADOW && cpu->mmu_root; }
void vm_mmu_root_changed(x86_cpu *cpu, unsigned how);     /* x86_env.root_changed */
void vm_mmu_invalidate(x86_cpu *cpu, uint64_t la, uint64_t bytes);                             /* x86_env.invalidate */
void vm_mmu_invalidate_pcid(x86_cpu *cpu, unsigned type, unsigned pcid, uint64_t la);          /* x86_env.invalidate_pcid */
/* Drop a range from the inline TLB, and what the backend derived from it; the strategy is not told. bytes 0: all. */
void vm_mmu_drop(vm_vcpu *cpu, uint64_t la, uint64_t bytes);
/* Drop write permission of a page from a vCPU's inline TLB (it became a code or clean page); of all RAM: gpa =
 * UINT64_MAX. */
bool vm_mmu_protect_page(vm_vcpu *cpu, uint64_t gpa);          /* true: there was one */
/* The guest's own walk in a given access context, counted. */
bool vm_mmu_walk_ctx(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w);
/* A walk as the public interface has it. */
void vm_mmu_to_result(const x86_walk *w, bool ok, struct vm_mmu_result *out);
/* Give a machine its strategy (nobody runs); detach: destroy the strategy's state. */
int vm_mmu_attach(vm_machine *m, const char *name);
void vm_mmu_detach(vm_machine *m);
bool vm_mmu_suits(const vm_mmu_ops *ops, vm_backend backend);          /* can be used with it */
/* A page with VM_PAGE_TABLE was written from gpa on, `by` NULL: not by a vCPU. Any thread. */
void vm_mmu_table_written(vm_machine *m, vm_vcpu *by, uint64_t gpa);
/* Regions came, went or changed their permissions. vCPUs paused. */
void vm_mmu_map_changed(vm_machine *m);
/* Memory or registers changed as a whole behind the strategy's back (snapshot restored, back from another backend): it
 * and the inline TLBs forget everything. vCPUs paused or idle. */
void vm_mmu_forget(vm_machine *m);
extern const vm_mmu_ops vm_mmu_tlb, vm_mmu_flat, vm_mmu_shadow, vm_mmu_ept;
bool vm_mmu_is_flat(const vm_vcpu *cpu);                  /* no page tables in use now */
/* Under this strategy addresses without paging are physical, and RAM is what the map says. */
static inline bool vm_mmu_is_plain(const vm_machine *m)
{
    return m->mmu == &vm_mmu_tlb || m->mmu == &vm_mmu_flat || m->mmu == &vm_mmu_shadow;
}

/* ---- shadow.c ---- */
/* What is recorded for the address. False: nothing, or not for this access. */
bool vm_shadow_look_up(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w);
bool vm_shadow_translate(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w);
/* The address space of `root` (vm_vcpu.mmu_root, NULL: none). */
vm_space vm_shadow_space(const vm_machine *m, const void *root);
uint64_t vm_shadow_pages(const vm_machine *m);            /* shadow pages that there are now */

/* ---- park.c: translations of the address spaces that the vCPU is not in ----
 * Set aside all that is not global under `space` (key 0: drop it), and enter again what is there of it. */
void vm_mmu_park(vm_vcpu *cpu, vm_space space);
void vm_mmu_unpark(vm_vcpu *cpu, vm_space space);
void vm_mmu_forget_parked(vm_vcpu *cpu, uint64_t key);    /* 0: all */

#endif
