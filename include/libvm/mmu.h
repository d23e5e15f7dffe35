/* mmu.h - MMU strategies: how guest-virtual addresses become guest-physical ones.
 *
 * One software TLB in front of every strategy makes hits cost the same; a strategy decides misses, faults,
 * permissions and invalidation. Built in: "tlb" (guest page walk), and "flat" (no page tables: linear = physical; for
 * BARE machines whose guests do not use paging). With KVM the host's hardware translates and the strategy is its own.
 */
#ifndef LIBVM_INCLUDE_MMU_H
#define LIBVM_INCLUDE_MMU_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a translation gives. */
struct vm_mmu_result {
    uint32_t size;
    uint64_t gpa;                       /* of the address asked for */
    uint64_t page_bytes;                /* size of the page it lies in, a power of two, at least 4096 */
    vm_prot  prot; /* what this access context may do on the page from now on without asking again */
    bool     global;                    /* survives CR3 loads */
    bool     trap_writes;               /* guest page table: call table_written when the page is written */
    uint8_t  fault_vector;              /* on failure: 14 */
    uint32_t fault_error;               /* its error code */
};

/* A strategy. The struct must stay valid for ever once registered (static data). Functions run on the vCPU's thread. */
typedef struct vm_mmu_ops {
    uint32_t    size;                   /* sizeof(vm_mmu_ops) */
    const char *name;
    int  (*create)(vm_machine *m, void **state);            /* VM_OK or a status; optional */
    void (*destroy)(void *state);                           /* optional */
    /* VM_OK with *out filled, or VM_E_FAULT with fault_vector and fault_error (the guest's fault). out comes zeroed
     * but for size.
     * Sets accessed and dirty bits as the architecture says; use vm_mmu_walk() for the guest's own tables. */
    int  (*translate)(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out);
    void (*root_changed)(void *state, vm_vcpu *cpu, uint64_t cr3);                          /* optional */
    void (*invalidate)(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes); /* bytes 0: everything; optional */
    void (*table_written)(void *state, vm_vcpu *cpu, uint64_t gpa);                         /* optional */
} vm_mmu_ops;

/* The architectural walk of the guest's page tables for `access` at the vCPU's current privilege; what "tlb" does.
 * For use inside translate(). */
VM_API int vm_mmu_walk(vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out);

/* Adds a strategy to the process-wide list (names are for life; at most 64). VM_E_EXISTS: the name is taken. Any
 * thread. */
VM_API int vm_mmu_register(const vm_mmu_ops *ops);
/* Names of the strategies, built in and registered; NULL past the last. */
VM_API const char *vm_mmu_name(unsigned i);
/* Changes a machine's strategy; NULL is the default. VM_E_BUSY while a vCPU runs; VM_E_NOTFOUND no such strategy;
 * VM_E_UNSUPPORTED with KVM. */
VM_API int vm_mmu_select(vm_machine *m, const char *name);
/* The name of the strategy in use. */
VM_API const char *vm_mmu_current(const vm_machine *m);

#ifdef __cplusplus
}
#endif
#endif
