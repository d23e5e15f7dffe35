/* hook.h - hooks inside the machine: the registry, and how backends and semantics ask it.
 *
 * vm_hooks holds all hooks in the order of adding, and finds those at a place: hooks within a line of VM_HOOK_LINE bytes in
 * a hash table, the others in a list for each kind. Edits happen only while the world is stopped. A callback that makes
 * one, or waits for a lock meanwhile, holds pointers to hooks it is still to call: vm_hook.link is NULL in those that have
 * been removed, and none is used again before its vCPU has passed an instruction boundary: graves wait for a set of vCPUs.
 *
 * Each vCPU takes over what changed at its own next boundary (vm_hooks_take): x86.hook_mask, x86.watch, TLB tags,
 * translated code. Between an edit and that nothing of the guest executes.
 *
 * To ask "is anything of kind K active?": `cpu->x86.hook_mask & X86_HOOK_BIT(K)` (K a vm_hook_kind; bit 0: breakpoints
 * and stops), "...for this address?": vm_hook_covers(). hook_mask & X86_HOOK_BLOCKS: x86.block_state is kept, so that
 * at each instruction boundary one knows whether a basic block begins there and where control came from.
 */
#ifndef LIBVM_CORE_HOOK_H
#define LIBVM_CORE_HOOK_H

#include "core/core.h"

typedef enum vm_hook_class { VM_HOOKED_USER, VM_HOOKED_BREAK, VM_HOOKED_WATCH, VM_HOOKED_STOP } vm_hook_class;

struct vm_hook {
    vm_machine *machine;
    vm_hook *next, **link;               /* all hooks of the machine, in order of adding; link NULL: removed */
    vm_hook *line_next, *name_next;      /* in vm_hooks.lines, .names */
    vm_hook *grave_next;
    uint64_t waits;                      /* removed: vCPUs that must pass a boundary */
    uint64_t number;                     /* by order of adding */
    vm_hook_desc desc;
    uint64_t lo, hi;                     /* desc.begin, .end with "everything" spelled out */
    uint8_t cls;
    bool is_gpa;
    unsigned count;                      /* VM_HOOKED_STOP: references */
};

enum { VM_HOOK_LINE = 256 };
typedef struct vm_hook_list {
    unsigned count, gpa_count;           /* all hooks of the kind; those with guest-physical ranges */
    uint64_t lo, hi;                     /* around all linear (or number) ranges since the list was last empty */
    unsigned wide_count, wide_room;
    vm_hook **wide;                      /* those that no line holds, in the order of adding */
} vm_hook_list;

/* What the last edits concerned, so that a vCPU may take over just that: edit number n (vm_machine.hook_seq after it) is
 * edits[n % VM_HOOK_EDITS]. */
enum { VM_HOOK_EDITS = 64 };
typedef struct vm_hook_edit {
    uint64_t lo, hi;
    uint8_t kind;                        /* the list's */
    bool is_gpa;
} vm_hook_edit;

/* Kind 0: breakpoints and stops, in a list of their own. */
struct vm_hooks {
    vm_hook *first, **end;
    vm_hook_list list[VM_HOOK_KINDS];
    vm_hook **lines, **names;            /* [slots]: by kind and line; by address of the hook */
    unsigned slots, count;
    unsigned watched_all, watched_few;   /* data hooks on so much that every access asks; others */
    uint64_t number;
    uint32_t mask;
    uint8_t watch;                       /* X86_WATCH_* */
    vm_hook_edit edits[VM_HOOK_EDITS];
    vm_hook *graves;
    vm_hook *spare;                      /* ended ones: whoever adds what he has removed gets the same, see jit/hook.c */
};

/* Is some hook of `kind` on any of the n bytes (or the number) at `at`, whose page lies at gpa (UINT64_MAX: not known, then
 * not those with guest-physical ranges)? */
bool vm_hook_is_at(const vm_hook *h, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa);       /* this one? */
bool vm_hook_covers(const vm_machine *m, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa);

/* All of `kind` there, in the order of adding; what has more than fits in hits[max] is only counted. */
unsigned vm_hooks_at(const vm_machine *m, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa, vm_hook **hits, unsigned max);

/* Before an instruction: X86_HOOK_GO, _STOP (rip stays: leave with X86_STOP_HOOK, or X86_STOP_BREAKPOINT if
 * cpu->x86.stop says so), or _SKIP (next_rip holds where to go on; it counts as retired). */
unsigned vm_hook_before(vm_vcpu *cpu, const x86_insn *in, uint64_t gpa);
/* One event to one list; the strongest answer. For translated code that has more than one hook at a place. */
unsigned vm_hook_fire(vm_vcpu *cpu, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa, vm_hook_event *e);

/* For code that calls a hook's function itself: the answer was STOP. note: for the exit. before: the run ends in front of the
 * instruction (or where the callback went). */
void vm_hook_note_stop(vm_vcpu *cpu, vm_hook *h, const vm_hook_event *e);
void vm_hook_stop_before(x86_cpu *x, bool is_moved);
/* The callback was inside an instruction whose next_rip was `next`: if it set RIP, go there after the instruction. */
void vm_hook_keep_redirect(vm_vcpu *cpu, uint64_t next);
uint64_t vm_hook_gpa(vm_vcpu *cpu, const vm_hook_event *e);            /* of a MEM_* event, if some hook wants it */

/* Run loop. take: at an instruction boundary, when hooks_seen is not the machine's. exit: why a hook stopped the run; 0:
 * none did. boundary: graves that waited for this vCPU. */
void vm_hooks_take(vm_vcpu *cpu);
/* The edits after number `seen`, one a call, oldest first; NULL: that was the last. They are all known: vm_hooks_knows(). */
bool vm_hooks_knows(const vm_machine *m, unsigned seen);
const vm_hook_edit *vm_hooks_edit_after(const vm_machine *m, unsigned *seen);
int  vm_hook_exit(vm_vcpu *cpu, vm_exit *exit);
void vm_hooks_boundary(vm_vcpu *cpu);
/* A hardware vector or injected one is about to be delivered: GO, STOP, SKIP. */
unsigned vm_hook_interrupt(vm_vcpu *cpu, uint8_t vector);

/* Stops: linear addresses at which every backend leaves with X86_STOP_BREAKPOINT before executing, also at the start of
 * a run; vm_hook_is_stop() tells them from breakpoints. Counted for each address. */
int  vm_stop_add(vm_machine *m, uint64_t la);
void vm_stop_drop(vm_machine *m, uint64_t la);
bool vm_hook_is_stop(const vm_machine *m, uint64_t la);

/* hook.c, for lib/api */
int  vm_hook_insert(vm_machine *m, const vm_hook_desc *desc, vm_hook_class cls, vm_hook **out);
int  vm_hook_delete(vm_machine *m, vm_hook *hook);
int  vm_hook_breakpoint(vm_machine *m, uint64_t gva, bool on);
int  vm_hook_watchpoint(vm_machine *m, uint64_t gva, uint64_t bytes, vm_prot access, bool on);
bool vm_hooks_suit(const vm_machine *m, const vm_backend_ops *ops);         /* all that there are can be served there */
void vm_hooks_free(vm_machine *m);                       /* destruction */

/* env.c's part */
unsigned vm_env_hook(x86_cpu *x, const x86_hook *h);
unsigned vm_env_withheld(x86_cpu *x, uint64_t la, uint64_t gpa);
bool vm_env_watched(x86_cpu *x, uint64_t la, unsigned n, unsigned access);
unsigned vm_env_hook_before(x86_cpu *x, const x86_insn *in, uint64_t gpa);

#endif
