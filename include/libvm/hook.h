/* hook.h - watching and steering a guest: hooks, breakpoints, watchpoints.
 *
 * A hook is a function of the program that is called when the guest does something: executes an instruction, enters a
 * block, makes an access, raises an exception. What is not hooked costs nothing: on the JIT hooks are compiled into the
 * translated blocks that they concern.
 *
 * In a callback
 *   - All registers are exact; RIP is the current instruction, vm_vcpu_retired() counts the instructions before it.
 *   - Registers and memory may be read and written, memory mapped, unmapped and protected, hooks, breakpoints and
 *     watchpoints added and removed (also the hook that is running). vm_vcpu_run() gives VM_E_BUSY.
 *   - Setting RIP to another value redirects the guest. Hooks called before an instruction (INSN, BLOCK, EDGE, FETCH and
 *     those named "before" below): the instruction is not executed, the guest goes on at the new RIP. Others: it goes on
 *     there after the instruction.
 *   - The callback must not unwind through libvm (longjmp, C++ exceptions).
 *
 * Several hooks at one place are called in the order in which they were added, each kind by itself: EDGE, BLOCK, FETCH,
 * INSN. All of them are called, also if one of the first asks to stop or to skip; the strongest answer counts: STOP, then
 * RETRY, SKIP, CONTINUE.
 *
 * Each event is reported once: an instruction that had to leave the run half-way (an access that nobody handles, a
 * budget that ended inside a repeated string instruction) does not call its hooks again when it goes on.
 *
 * Hooks never change what the guest computes, nor the instruction counts, unless a callback does.
 *
 * Backends: interpreter and JIT serve all of it. KVM serves breakpoints, watchpoints and single steps, exactly and at the
 * interpreter's speed while there are any; it serves no hooks (VM_E_UNSUPPORTED), unless VM_HOOK_SWITCH asks to move the
 * machine to a backend that can. vm_backend_select() to KVM is refused while hooks are there.
 *
 * Threads: hooks may be added and removed from any thread at any time. The change takes effect at the next instruction
 * boundary of each vCPU; a vCPU of the machine that is inside a callback then finishes its instruction first.
 */
#ifndef LIBVM_INCLUDE_HOOK_H
#define LIBVM_INCLUDE_HOOK_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What is hooked; what [begin, end] of the hook is compared with; and the event's fields besides kind:
 *
 *  INSN       each instruction, before it (a repeated string instruction: once). Range and address: its linear address.
 *             bytes: its length. value: its first 8 bytes, low byte first.
 *  BLOCK      the first instruction of each basic block, before it. A block begins after every instruction that may
 *             branch (taken or not), that changes modes or ends an interrupt shadow, after a delivered exception or
 *             interrupt, and where the program set RIP. Range and address: its linear address.
 *  EDGE       as BLOCK, with the instruction that led here. from: linear address of the last instruction of the block
 *             before (the interrupted one, for exceptions and interrupts). A block that no instruction led to (the
 *             program set RIP) has no edge.
 *  MEM_READ   data read by an instruction, after the read and before the instruction ends. Range: any byte of it.
 *             address: linear address; bytes: width of the whole access, 1 to 64 or more for XSAVE and its like (those
 *             that cross pages too); value: the first 8 bytes, low byte first; data: all of them.
 *             (If the callback takes the memory away, the read may be made again, and exit.) The
 *             access of a read-modify-write instruction is one read and one write; a repeated string instruction makes
 *             one each iteration. Page walks, descriptor-table and task-segment accesses, and what exception and
 *             interrupt delivery stores are the CPU's own and not reported.
 *  MEM_WRITE  data written by an instruction: once it is known not to fault, before memory changes. Fields as MEM_READ;
 *             value and data are what will be written.
 *  EXCEPTION  an exception of the guest, before it is delivered (and before run_options.exception_exits is looked at).
 *             Range and value: the vector (0-31). address: linear address of the instruction. error: its error code,
 *             with VM_EVENT_ERROR. from: #PF: the faulting address (CR2 is not written yet); #DB: bits for DR6.
 *             SKIP: it is not delivered and the guest goes on after the instruction.
 *  SYSCALL    SYSCALL and SYSENTER (VM_EVENT_SYSENTER), before. Range and address: linear address of the instruction.
 *             value: RAX. SKIP: the guest goes on after the instruction, as if the call had been served.
 *  CPUID      before. Range and address: the leaf (EAX); from: subleaf (ECX). SKIP: the callback has set the result.
 *  MSR        RDMSR and WRMSR (VM_EVENT_WRITE), before, when the privilege check has passed. Range and address: the
 *             MSR's number. value: what WRMSR will write. SKIP: the instruction is not executed.
 *  INTERRUPT  a hardware interrupt (NMI: vector 2) that is about to be delivered, or INT n, INT3, INTO, INT1
 *             (VM_EVENT_SOFT). Range and value: the vector. address: linear address of the interrupted instruction or of
 *             the INT. SKIP: not delivered (a hardware interrupt is lost; INT n: goes on after it).
 *  PORT       IN, OUT, INS, OUTS, once an access: writes (VM_EVENT_WRITE) before, reads after the device has answered.
 *             Range and address: the port. value, bytes. SKIP: write: not made; read: the destination is left as it is.
 *  FETCH      as INSN, for those who look for execution of memory: range: any byte of the instruction; data and bytes:
 *             its bytes. */
typedef enum vm_hook_kind {
    VM_HOOK_INSN = 1,
    VM_HOOK_BLOCK,
    VM_HOOK_EDGE,
    VM_HOOK_MEM_READ,
    VM_HOOK_MEM_WRITE,
    VM_HOOK_EXCEPTION,
    VM_HOOK_SYSCALL,
    VM_HOOK_CPUID,
    VM_HOOK_MSR,
    VM_HOOK_INTERRUPT,
    VM_HOOK_PORT,
    VM_HOOK_FETCH,
    VM_HOOK_KINDS,                      /* one past the last */
    VM_HOOK_KIND_FORCE_INT = 0x7fffffff
} vm_hook_kind;

/* What a callback wants.
 *  STOP  the run ends with VM_EXIT_HOOK and exit.hook.hook: after the instruction for MEM_READ, MEM_WRITE and PORT,
 *        before it for the others (EXCEPTION, INTERRUPT: instead of delivering it, with RIP at the instruction; a hardware
 *        interrupt stays pending). The next run, if RIP is still the same, goes on with the very instruction (or
 *        delivery) and does not call the hooks for it again.
 *  SKIP  the instruction is not executed and the guest goes on after it (or at the RIP that the callback set); it counts
 *        as retired. MEM_READ, MEM_WRITE, BLOCK, EDGE: skips the instruction too; what it has done already (earlier
 *        accesses, iterations) stays done.
 *  RETRY EXCEPTION: not delivered, the instruction is executed again (the callback has removed the cause). Elsewhere as
 *        CONTINUE. */
typedef enum vm_hook_result {
    VM_HOOK_CONTINUE,
    VM_HOOK_STOP,
    VM_HOOK_SKIP,
    VM_HOOK_RETRY,
    VM_HOOK_RESULT_FORCE_INT = 0x7fffffff
} vm_hook_result;

#define VM_EVENT_WRITE    1u            /* MSR, PORT: a write */
#define VM_EVENT_SOFT     2u            /* INTERRUPT: by an instruction */
#define VM_EVENT_ERROR    4u            /* EXCEPTION: `error` counts */
#define VM_EVENT_SYSENTER 8u            /* SYSCALL: SYSENTER */

typedef struct vm_hook_event {
    uint32_t     size;                  /* of this struct in the library in use */
    vm_hook_kind kind;
    uint64_t     address, from, value;  /* by kind, see there; else 0 */
    uint32_t     bytes;
    uint32_t     flags;                 /* VM_EVENT_* */
    uint64_t     error;
    const void  *data;                  /* MEM_READ, MEM_WRITE, FETCH: `bytes` bytes; valid during the call */
} vm_hook_event;

/* Called on the thread that runs `cpu`. `event` is valid during the call. */
typedef vm_hook_result (*vm_hook_fn)(void *user, vm_vcpu *cpu, const vm_hook_event *event);

#define VM_HOOK_GPA    1u               /* INSN, BLOCK, EDGE, FETCH, MEM_*: [begin, end] are guest-physical addresses; RAM only */
#define VM_HOOK_EXACT  2u               /* begin = end = 0 means just 0, not everything */
#define VM_HOOK_SWITCH 4u               /* on a backend that cannot: move the machine to one that can, now (the JIT if it
                                           is usable here, else the interpreter). VM_E_BUSY while a vCPU runs */

typedef struct vm_hook_desc {
    uint32_t     size;                  /* sizeof(vm_hook_desc): VM_HOOK_INIT */
    vm_hook_kind kind;
    uint64_t     begin, end;            /* inclusive; both 0: everything */
    vm_hook_fn   fn;
    void        *user;
    void       (*destroy)(void *user);  /* called once when the hook is gone and no call of it is running; optional */
    uint32_t     flags;                 /* VM_HOOK_* */
} vm_hook_desc;
#define VM_HOOK_INIT VM_STRUCT_INIT(vm_hook_desc)

/* Adds a hook. *out (may be NULL) identifies it for vm_hook_remove. VM_E_INVALID; VM_E_UNSUPPORTED backend (see
 * VM_HOOK_SWITCH); VM_E_BUSY; VM_E_NOMEM. Any thread, callbacks too. */
VM_API int vm_hook_add(vm_machine *m, const vm_hook_desc *desc, vm_hook **out);

/* Removes a hook: when this returns it is called no more (except by vCPUs that are inside a callback right now: not after
 * that instruction). `destroy` is called before this returns, or, if a vCPU is inside a callback (as when a hook removes
 * itself), on that vCPU's thread at its next instruction boundary; vm_destroy() calls it for all hooks that are left, in
 * the order they were added. VM_E_NOTFOUND: no such hook. Any thread, callbacks too. */
VM_API int vm_hook_remove(vm_machine *m, vm_hook *hook);

/* Sets or clears a breakpoint at a linear address: a run ends with VM_EXIT_BREAKPOINT, exit.debug and RIP there before the
 * instruction executes. The next run steps over it once if it begins at that RIP. Instruction memory, DR0-DR7 and TF are
 * not used: the guest cannot tell. Setting twice is VM_E_EXISTS, clearing what is not set VM_E_NOTFOUND. Errors otherwise
 * as vm_hook_add. Any thread, callbacks too. */
VM_API int vm_breakpoint(vm_machine *m, uint64_t gva, bool on);

/* Sets or clears a watchpoint on [gva, gva + bytes): when an instruction has made an access of the kind (R, W or both),
 * the run ends after that instruction with VM_EXIT_BREAKPOINT and exit.debug. Several accesses of one instruction: the
 * first is reported. Set and cleared by the same three values; errors as vm_breakpoint, VM_E_INVALID for bytes = 0, a
 * range that wraps, or an access that is neither. */
VM_API int vm_watchpoint(vm_machine *m, uint64_t gva, uint64_t bytes, vm_prot access, bool on);

#ifdef __cplusplus
}
#endif
#endif
