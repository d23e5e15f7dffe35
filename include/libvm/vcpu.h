/* vcpu.h - processors: registers, guest-virtual memory, and running.
 *
 * Register and memory functions of a vCPU are for the thread that drives it, or for any thread while it is not running;
 * from another thread while it runs they give VM_E_BUSY. In callbacks the vCPU's own registers may be read and written.
 */
#ifndef LIBVM_INCLUDE_VCPU_H
#define LIBVM_INCLUDE_VCPU_H

#include <libvm/types.h>
#include <libvm/exit.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A known starting state, the same on every backend. RESET as on power-on; the others besides: RFLAGS = 2, general
 * registers zero, SSE and AVX enabled, interrupts off, debug registers at their reset values. */
typedef enum vm_mode {
    VM_MODE_RESET,                      /* architectural reset: real mode at F000:FFF0 */
    VM_MODE_REAL,                       /* 16-bit real mode, all segment bases and RIP 0 */
    VM_MODE_FLAT32,                     /* 32-bit protected mode, flat 4 GiB segments, ring 0, paging off */
    VM_MODE_FLAT64                      /* 64-bit mode, ring 0; linear address = physical address over the whole
                                           guest-physical space without guest page tables, until CR3 is loaded or paging
                                           switched off. vm_sregs do not tell: to put registers that were read in this
                                           mode into a vCPU that is in another, set the mode first */
} vm_mode;

typedef struct vm_regs {
    uint32_t size;                      /* sizeof(vm_regs): VM_REGS_INIT */
    uint64_t rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
} vm_regs;
#define VM_REGS_INIT VM_STRUCT_INIT(vm_regs)

/* A segment register with its hidden part. attributes: bits 0-7 are descriptor bits 40-47 (type, S, DPL, P), bits 12-15
 * descriptor bits 52-55 (AVL, L, D/B, G), bits 8-11 zero. limit is in bytes, granularity applied. P = 0: unusable. */
typedef struct vm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint16_t attributes;
} vm_segment;

typedef struct vm_dtable { uint64_t base; uint16_t limit; } vm_dtable;

/* System registers. */
typedef struct vm_sregs {
    uint32_t   size;                    /* sizeof(vm_sregs): VM_SREGS_INIT */
    uint32_t   cpl;                     /* current privilege level; read only (SS.DPL decides) */
    vm_segment es, cs, ss, ds, fs, gs, ldtr, tr;
    vm_dtable  gdtr, idtr;
    uint64_t   cr0, cr2, cr3, cr4, cr8, efer, xcr0;
    uint64_t   dr0, dr1, dr2, dr3, dr6, dr7;
    uint64_t   apic_base;               /* IA32_APIC_BASE; BARE machines: 0, and ignored when set */
} vm_sregs;
#define VM_SREGS_INIT VM_STRUCT_INIT(vm_sregs)

/* x87, SSE and AVX state. */
typedef struct vm_fpu {
    uint32_t size;                      /* sizeof(vm_fpu): VM_FPU_INIT */
    uint32_t mxcsr;
    uint16_t fcw, fsw;
    uint16_t ftw;                       /* full tag word, two bits a physical register */
    uint16_t fop;
    uint64_t fip, fdp;
    uint8_t  st[8][16];                 /* stack-relative; 80 bits each, the rest zero */
    uint8_t  ymm[16][32];               /* XMM in the low halves */
} vm_fpu;
#define VM_FPU_INIT VM_STRUCT_INIT(vm_fpu)

/* Any single register by number: VM_REG_RAX ... The sizes are in reg.def: general registers, RIP, RFLAGS, control and
 * debug registers, EFER, XCR0 and segment bases 8 bytes; selectors 2; ST0-ST7 10 (stack-relative); FCW, FSW, FTW
 * (full tag word) 2; MXCSR 4; MM0-MM7 8; XMM 16; YMM 32. */
typedef enum vm_reg_id {
    VM_REG_NONE = 0,
#define VM_REG(name, text, bytes, cls, index) VM_REG_##name,
#include <libvm/reg.def>
#undef VM_REG
    VM_REG_COUNT
} vm_reg_id;
/* Its size in bytes (0: no such register) and its name in lower case (NULL: no such register). Any thread. */
VM_API size_t vm_reg_size(int reg_id);
VM_API const char *vm_reg_name(int reg_id);
/* The number of a register by its name, any case; VM_REG_NONE if there is none. */
VM_API int vm_reg_find(const char *name);

/* vCPU `index`, NULL past the last. It lives as long as the machine. */
VM_API vm_vcpu *vm_vcpu_get(vm_machine *m, unsigned index);
VM_API vm_machine *vm_vcpu_machine(const vm_vcpu *cpu);
VM_API unsigned vm_vcpu_index(const vm_vcpu *cpu);

/* Puts the vCPU into a starting state. On a PC a secondary vCPU, otherwise waiting for INIT/SIPI, starts at once. */
VM_API int vm_vcpu_set_mode(vm_vcpu *cpu, vm_mode mode);

/* Registers in bulk. Setting changes all that the struct holds; reserved bits the CPU cannot hold, and combinations it
 * could never reach, are VM_E_INVALID with nothing changed; of RFLAGS, bits that do not exist are left out and bit 1 is
 * set, as POPF does. Setting RIP in a callback makes execution go on there after the current instruction (its current
 * value changes nothing); setting registers drops a pending completion of an IO, MMIO or UNMAPPED exit when RIP
 * changes. */
VM_API int vm_vcpu_get_regs(vm_vcpu *cpu, vm_regs *regs);
VM_API int vm_vcpu_set_regs(vm_vcpu *cpu, const vm_regs *regs);
VM_API int vm_vcpu_get_sregs(vm_vcpu *cpu, vm_sregs *sregs);
VM_API int vm_vcpu_set_sregs(vm_vcpu *cpu, const vm_sregs *sregs);
VM_API int vm_vcpu_get_fpu(vm_vcpu *cpu, vm_fpu *fpu);
VM_API int vm_vcpu_set_fpu(vm_vcpu *cpu, const vm_fpu *fpu);

/* One register. `bytes` must be its size (VM_E_INVALID otherwise). Writing a selector in real or virtual-8086 mode
 * sets base = selector * 16; in other modes only the selector changes (use vm_vcpu_set_sregs or VM_REG_FS_BASE ...
 * for the rest).
 * VM_E_NOTFOUND: no such register. */
VM_API int vm_vcpu_read_reg(vm_vcpu *cpu, int reg_id, void *value, size_t bytes);
VM_API int vm_vcpu_write_reg(vm_vcpu *cpu, int reg_id, const void *value, size_t bytes);

/* Model-specific registers by number, with the checks of RDMSR and WRMSR at ring 0: VM_E_NOTFOUND when the guest
 * would get #GP on reading, VM_E_INVALID when on writing. */
VM_API int vm_vcpu_get_msr(vm_vcpu *cpu, uint32_t msr, uint64_t *value);
VM_API int vm_vcpu_set_msr(vm_vcpu *cpu, uint32_t msr, uint64_t value);

/* Translates a linear address as the vCPU would now, at its current privilege level, for `access` (R, W or X, one of
 * them), and changes nothing: no accessed or dirty bits. VM_E_FAULT: page fault; the message has its error code. */
VM_API int vm_vcpu_translate(vm_vcpu *cpu, uint64_t gva, vm_prot access, uint64_t *gpa);
/* Copies guest-virtual memory as a debugger would: through the current page tables with supervisor rights whatever the
 * privilege level, ignoring write protection, RAM only. All or nothing: VM_E_FAULT names the first address that
 * failed. */
VM_API int vm_vcpu_read(vm_vcpu *cpu, uint64_t gva, void *buffer, size_t bytes);
VM_API int vm_vcpu_write(vm_vcpu *cpu, uint64_t gva, const void *buffer, size_t bytes);

/* Instructions retired since creation (software backends; else 0). Any thread; may lag while the vCPU runs. */
VM_API uint64_t vm_vcpu_retired(const vm_vcpu *cpu);

typedef struct vm_run_options {
    uint32_t size;                      /* sizeof(vm_run_options): VM_RUN_OPTIONS_INIT */
    uint64_t max_instructions;          /* 0 = no budget; exact on the software backends (vm_query "exact-budget") */
    uint64_t deadline_ns;               /* 0 = none; host time from now */
    bool     has_until;
    /* stop before executing this address (RIP, not linear address). A run that starts there executes at least one
     * instruction first */
    uint64_t until;
    /* bit v, v < 32: vector v is an exit instead of being delivered. First exceptions only, not those raised while
     * delivering another; not hardware interrupts */
    uint64_t exception_exits;
    /* VM_EXIT_STEP after one instruction (all of a repeated string instruction), or when an exception or interrupt has
     * been delivered instead. RFLAGS.TF is not used. Other exits come first */
    bool     single_step;
    /* KVM: this thread has SIGURG blocked, and its signal mask does not change from run to run of this vCPU. Saves two
     * system calls a run, which otherwise block that signal and restore the mask where the process has several threads;
     * a promise not kept loses kicks */
    bool     has_signal_blocked;
    /* IO, MMIO and UNMAPPED exits do not name their instruction: insn_length is 0, and on KVM rip may be behind the
     * instruction and gva 0. Registers that are read afterwards are exact. For who only answers accesses, and often */
    bool     is_brief;
} vm_run_options;
#define VM_RUN_OPTIONS_INIT VM_STRUCT_INIT(vm_run_options)

/* Runs the guest on this vCPU in the calling thread until there is something to report. `options` NULL: no limits;
 * `exit` NULL: the record is not wanted; then reads that need completion give all ones. The record passed to the run
 * after an IO, MMIO, UNMAPPED or HYPERCALL exit carries the completion (data, result); `exit` NULL there, or a record
 * of another reason, completes with all ones. A machine with several vCPUs needs one thread for each.
 * VM_E_BUSY: the vCPU is running in another thread, or this is a callback inside its own run; VM_E_INVALID: bad
 * options; VM_E_HOST: no thread for a PC's timers; VM_E_INTERNAL: the machine is poisoned. */
VM_API int vm_vcpu_run(vm_vcpu *cpu, const vm_run_options *options, vm_exit *exit);

/* Makes the current run, or the next one if none is under way, stop with VM_EXIT_KICK at the next instruction boundary.
 * Sticky: consumed by one run; several kicks before that are one. Any thread, async-signal-safe; NULL is fine. */
VM_API void vm_vcpu_kick(vm_vcpu *cpu);

/* Makes the guest take an event before its next instruction: vector 0-31 as an exception (has_error: with this error
 * code), or else as an external interrupt, whatever RFLAGS.IF says; vector 2 is an NMI. Vector 14 uses CR2 as it is.
 * VM_E_BUSY: an earlier injection has not been delivered yet. VM_E_INVALID: an error code where the vector has none. */
VM_API int vm_vcpu_inject(vm_vcpu *cpu, uint8_t vector, bool has_error, uint32_t error);

#ifdef __cplusplus
}
#endif
#endif
