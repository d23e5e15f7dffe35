/* mmu.h - MMU strategies: how guest-virtual addresses become guest-physical ones.
 *
 * One software TLB in front of every strategy makes hits cost the same; a strategy decides misses, faults,
 * permissions and invalidation. Results are the same under each; costs differ. Built in:
 *   tlb     a miss walks the guest's page tables. The default.
 *   shadow  what walks found is kept for every address space the guest has, also while it runs in others. Guest page
 *           tables are write-protected, or compared at the guest's next flush, so that a switch back refills nothing.
 *   ept     as tlb, then a second level of tables that the host program owns: its own permissions, accessed and dirty
 *           bits, several views of memory, and a callback when a view forbids an access (vm_ept_*, below).
 *   flat    linear is physical, without a walk, for machines whose guests do not use paging; when one does, as tlb.
 * With KVM the host's hardware translates; only "tlb" (meaning that) and, within limits, "ept" can be chosen.
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
    /* Set by vm_mmu_walk(), also when the walk fails: the page-table entries it read, from the root down. */
    uint32_t entry_count;
    uint64_t entry[5];                  /* their guest-physical addresses */
    uint32_t context;                   /* given to translate(): who asks, VM_MMU_SUPERVISOR... What prot holds for */
};
/* Access contexts: supervisor, user, and supervisor while CR4.SMAP and RFLAGS.AC let it at user pages. */
enum { VM_MMU_SUPERVISOR, VM_MMU_USER, VM_MMU_SUPERVISOR_AC };

/* A strategy. The struct must stay valid for ever once registered (static data). Functions run on the vCPU's thread. */
typedef struct vm_mmu_ops {
    uint32_t    size;                   /* sizeof(vm_mmu_ops) */
    const char *name;
    int  (*create)(vm_machine *m, void **state);            /* VM_OK or a status; optional */
    void (*destroy)(void *state);                           /* optional */
    /* VM_OK with *out filled, or VM_E_FAULT with fault_vector and fault_error (the guest's fault). out comes zeroed
     * but for size and context. access is one of R, W, X. prot without it: this access is made all the same and the next one asks
     * again, so VM_PROT_NONE means "keep nothing".
     * Sets accessed and dirty bits as the architecture says; use vm_mmu_walk() for the guest's own tables. */
    int  (*translate)(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out);
    void (*root_changed)(void *state, vm_vcpu *cpu, uint64_t cr3);                          /* optional */
    void (*invalidate)(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes); /* bytes 0: everything; optional */
    /* A page under vm_mmu_trap_writes(), or whose result had trap_writes, was written: `gpa` is the first byte that
     * changed, others up to the end of its page may have. After the write. cpu NULL: by the host program or a device,
     * with every vCPU stopped or not running guest code. Optional. */
    void (*table_written)(void *state, vm_vcpu *cpu, uint64_t gpa);
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
 * VM_E_UNSUPPORTED with KVM, but for "tlb", "flat" (both: the hardware) and "ept". */
VM_API int vm_mmu_select(vm_machine *m, const char *name);
/* The name of the strategy in use. */
VM_API const char *vm_mmu_current(const vm_machine *m);

/* Forgets what the software TLB of `cpu` holds for [gva, gva + bytes), everything when bytes is 0, so that the strategy
 * is asked again. From the strategy's own functions, callbacks on the vCPU's thread, or while the vCPU does not run
 * (VM_E_BUSY otherwise). */
VM_API int vm_mmu_flush(vm_vcpu *cpu, uint64_t gva, uint64_t bytes);
/* Begins or ends calling the strategy's table_written for writes to the page of RAM at `gpa`, whoever makes them, until
 * the strategy changes. Stores already under way may be missed: of the current block of instructions on `cpu`, and of
 * other vCPUs until their next instruction boundary; so what was read from the page has to be compared once more at the
 * next root_changed or invalidate. `cpu` as for vm_mmu_flush. VM_E_FAULT: no RAM there. */
VM_API int vm_mmu_trap_writes(vm_vcpu *cpu, uint64_t gpa, bool on);

/* ---- strategy "ept": views of guest-physical memory ----
 * A view says for every guest-physical address what the guest may do there, whatever its own page tables and the
 * region's permissions allow; both have to. View 0 is always there. Each vCPU looks through one view at a time. Views
 * live until destroyed, with the machine at the latest; those of a machine whose strategy is not "ept" rest.
 *
 * Entries cover 4 KiB, 2 MiB or 1 GiB and have an accessed and a dirty bit each. A view starts with entries as large
 * as asked for, made as memory is touched; vm_ept_protect() splits what it has to and joins what has become equal.
 * The guest's page walks read its tables, and set accessed and dirty bits in them, whatever the view says.
 *
 * With KVM there is one view at a time for the machine, and of its permissions those are kept that memory slots can
 * keep: no write, or no access at all (a fetch from there is executed by the interpreter). VM_E_UNSUPPORTED otherwise:
 * RW without X, accessed and dirty bits. */

/* Makes a view: like `from`, permissions and all, or with everything allowed if that is VM_EPT_NONE. page_bytes is the
 * largest entry it uses: 4096, 2 MiB or 1 GiB; 0: 1 GiB. View 0 has 1 GiB. VM_E_INVALID bad size; VM_E_NOTFOUND no view
 * `from`; VM_E_NOMEM, also past VM_EPT_MAX_VIEWS; VM_E_UNSUPPORTED the machine's strategy is not "ept". */
VM_API int vm_ept_create(vm_machine *m, unsigned from, uint64_t page_bytes, unsigned *view);
#define VM_EPT_NONE 0xffffffffu
#define VM_EPT_MAX_VIEWS 64u
/* Frees a view. VM_E_BUSY: a vCPU looks through it; VM_E_INVALID: view 0; VM_E_NOTFOUND. */
VM_API int vm_ept_destroy(vm_machine *m, unsigned view);
/* Sets what the guest may do in [gpa, gpa + bytes), whole pages, in a view. Any thread, also from callbacks; in force
 * for every vCPU when the call returns. VM_E_NOMEM: part of the range may have changed. */
VM_API int vm_ept_protect(vm_machine *m, unsigned view, uint64_t gpa, uint64_t bytes, vm_prot prot);
/* Makes a vCPU look through another view from its next access on. While it does not run, or from a callback on its
 * thread (VM_E_BUSY otherwise). VM_E_NOTFOUND no such view. */
VM_API int vm_ept_select(vm_vcpu *cpu, unsigned view);
/* The view a vCPU looks through. */
VM_API unsigned vm_ept_current(const vm_vcpu *cpu);

/* What a view holds for an address. */
typedef struct vm_ept_entry {
    uint32_t size;                      /* sizeof(vm_ept_entry): VM_EPT_ENTRY_INIT */
    vm_prot  prot;
    bool     accessed, dirty;           /* touched, written through the entry since it was made or last fetched */
    uint64_t page_bytes;                /* what the entry covers; bits of an untouched one are clear */
} vm_ept_entry;
#define VM_EPT_ENTRY_INIT VM_STRUCT_INIT(vm_ept_entry)
VM_API int vm_ept_get(vm_machine *m, unsigned view, uint64_t gpa, vm_ept_entry *entry);
/* Fetches and clears the accessed and dirty bits of [gpa, gpa + bytes), whole pages, as vm_dirty_fetch() does: bit
 * i % 64 of word i / 64 is the page at gpa + i * 4096. Entries larger than a page set the bits of all their pages.
 * Either bitmap may be NULL: its bits are left as they are. */
VM_API int vm_ept_fetch(vm_machine *m, unsigned view, uint64_t gpa, uint64_t bytes, uint64_t *accessed, uint64_t *dirty);

/* An access that the vCPU's view forbids. */
typedef struct vm_ept_violation {
    uint32_t size;
    unsigned view;
    uint64_t gpa, gva;
    vm_prot  access;                    /* R, W or X */
    vm_prot  allowed;                   /* what the view allows there */
    uint8_t  width;                     /* bytes, 1 to 8; fetches: 1 */
    uint64_t value;                     /* of a write; for EMULATE of a read or fetch: what it shall give */
} vm_ept_violation;

/* What to do about it. */
typedef enum vm_ept_action {
    VM_EPT_STOP,        /* end the run with VM_EXIT_VIOLATION (exit.mmio); the next run makes the access again */
    VM_EPT_RETRY,       /* fixed: look again. Still forbidden: as STOP */
    VM_EPT_EMULATE,     /* done: a read gives `value`, a write changes nothing */
    VM_EPT_STEP         /* the instruction may access the page this once; the next one may not */
} vm_ept_action;
/* Called on the vCPU's thread inside the instruction, registers exact; may call what callbacks may. An instruction that
 * makes several forbidden accesses (a fetch is one of 1 byte each) calls for each, but (not with KVM) after STEP no more for that
 * page. */
typedef vm_ept_action (*vm_ept_fn)(void *user, vm_vcpu *cpu, vm_ept_violation *violation);
/* Sets the machine's callback for violations in any view; NULL: every violation is VM_EPT_STOP. While no vCPU runs. */
VM_API int vm_ept_on_violation(vm_machine *m, vm_ept_fn fn, void *user);

#ifdef __cplusplus
}
#endif
#endif
