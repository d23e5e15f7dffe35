/* exit.h - why a run came back.
 *
 * Every vm_vcpu_run() that returns VM_OK says why in a vm_exit. Registers are exact then; RIP is the instruction that
 * caused the exit, not yet completed, for IO, MMIO, UNMAPPED, VIOLATION and EXCEPTION; the next instruction to execute for all
 * others.
 */
#ifndef LIBVM_INCLUDE_EXIT_H
#define LIBVM_INCLUDE_EXIT_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/*  HALT        HLT was executed (RIP is after it). PC: HLT with nothing that could ever wake any vCPU of the machine.
 *  IO          port access that no region handles (io). Reads complete with io.data at the next run of this vCPU.
 *  MMIO        access to an MMIO region whose callback is missing or declined (mmio). Completes like IO.
 *  UNMAPPED    BARE: access to memory that is not there or not permitted (mmio). The next run tries the access again;
 *              if it still fails, a read completes with mmio.data, a write is dropped, a fetch exits UNMAPPED again.
 *  BUDGET      max_instructions were executed.
 *  DEADLINE    deadline_ns passed.
 *  KICK        vm_vcpu_kick() was called, before or during the run.
 *  UNTIL       RIP reached run_options.until.
 *  EXCEPTION   a vector of run_options.exception_exits was raised (exception); it was not delivered. RIP is the
 *              faulting instruction (for traps the next one, for INT n the INT). CR2 and DR6 are unchanged: see address.
 *  HYPERCALL   VMCALL or VMMCALL that no one handles (hypercall): BARE machines. Completes with hypercall.result in
 *              RAX.
 *  SHUTDOWN    triple fault. Running again gives SHUTDOWN again until the vCPU is set to a mode.
 *  RESET       the guest asked for a reset (reset register, keyboard controller). The machine has not been reset;
 *              vm_reset() does it. Running again without it goes on after the request.
 *  POWEROFF    the guest switched the machine off.
 *  GUEST_EXIT  the guest wrote to the exit device (guest_exit.code).
 *  INTERNAL    a bug in libvm was noticed. The machine is poisoned: later runs return VM_E_INTERNAL.
 *  REPLAY      a recording or a replay cannot go on (replay): the log ended, or the machine left it; see replay.h.
 *  VIOLATION   strategy "ept": the vCPU's view forbids an access (mmio), and the callback, if any, said to stop. The next
 *              run makes the access again, and ends here again if it is still forbidden.
 *  HOOK        a hook asked to stop (hook); RIP as said there, see hook.h.
 *  BREAKPOINT  RIP is a breakpoint, its instruction not yet executed; or an instruction touched a watchpoint (RIP is
 *              after it); debug says which.
 *  STEP        run_options.single_step: an instruction was executed, or an exception or interrupt delivered. */
typedef enum vm_exit_reason {
#define VM_EXIT_REASON(name, value, text) VM_EXIT_##name = value,
#include <libvm/exit.def>
#undef VM_EXIT_REASON
    VM_EXIT_REASON_FORCE_INT = 0x7fffffff
} vm_exit_reason;

/* Port access (IO). */
typedef struct vm_exit_io {
    uint16_t port;
    uint8_t  width;                     /* bytes: 1, 2, 4 */
    bool     is_write;
    uint32_t count;                     /* 1: string instructions exit once an element */
    uint64_t data; /* write: what was written. Read: fill in before the next run; preset to all ones */
} vm_exit_io;

/* Memory access (MMIO, UNMAPPED, VIOLATION). */
typedef struct vm_exit_mmio {
    uint64_t gpa, gva;                  /* guest-physical and linear address */
    uint8_t  width;                     /* bytes: 1 to 8 */
    bool     is_write, is_fetch;
    uint64_t data;                      /* as in vm_exit_io */
} vm_exit_mmio;

/* Exception asked for by exception_exits. */
typedef struct vm_exit_exception {
    uint8_t  vector;
    bool     has_error;
    uint32_t error;                     /* error code, if has_error */
    uint64_t address;                   /* #PF: linear address. #DB: bits for DR6 */
} vm_exit_exception;

/* VMCALL, VMMCALL. */
typedef struct vm_exit_hypercall {
    uint64_t number;                    /* RAX */
    uint64_t args[6];                   /* RBX, RCX, RDX, RSI, RDI, R8 */
    uint64_t result;                    /* fill in: goes to RAX at the next run; preset to all ones */
} vm_exit_hypercall;

/* End of a recording or a replay. */
typedef struct vm_exit_replay {
    uint64_t position;                  /* instructions since the log's begin */
    int32_t  status;                    /* VM_OK: the end, as recorded; else what went wrong */
} vm_exit_replay;

typedef struct vm_exit_guest {
    uint64_t code;                      /* what the guest wrote to the exit device */
} vm_exit_guest;

/* HOOK. */
typedef struct vm_exit_hook {
    vm_hook *hook;                      /* the first that asked to stop; NULL if it has been removed since */
} vm_exit_hook;

/* BREAKPOINT. */
typedef struct vm_exit_debug {
    bool     is_watchpoint;             /* else a breakpoint */
    vm_prot  access;                    /* watchpoint: what was done, R or W; breakpoint: X */
    uint32_t bytes;                     /* watchpoint: width of the access */
    uint64_t address;                   /* linear: of the breakpoint; of the access */
    uint64_t value;                     /* watchpoint: first 8 bytes read or written */
} vm_exit_debug;

typedef struct vm_exit {
    uint32_t       size;                /* sizeof(vm_exit): VM_EXIT_INIT */
    vm_exit_reason reason;
    uint64_t       rip;                 /* RIP at the exit */
    uint8_t        insn_bytes[16];      /* IO, MMIO, UNMAPPED, EXCEPTION, VIOLATION: bytes at RIP, as far as readable */
    uint8_t        insn_length;         /* how many of them belong to the instruction; 0 = not known or not read */
    union {
        vm_exit_io        io;           /* IO */
        vm_exit_mmio      mmio;         /* MMIO, UNMAPPED, VIOLATION */
        vm_exit_exception exception;    /* EXCEPTION */
        vm_exit_hypercall hypercall;    /* HYPERCALL */
        vm_exit_guest     guest_exit;   /* GUEST_EXIT */
        vm_exit_replay    replay;       /* REPLAY */
        vm_exit_hook      hook;         /* HOOK */
        vm_exit_debug     debug;        /* BREAKPOINT */
    };
} vm_exit;
#define VM_EXIT_INIT VM_STRUCT_INIT(vm_exit)

/* A reason in one word ("mmio"); static, never NULL. */
VM_API const char *vm_exit_name(int reason);
/* A record as one line of text; returns its length as snprintf does. */
VM_API int vm_exit_format(const vm_exit *exit, char *buffer, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
