/* system.h - what the system files of lib/x86 share: descriptors, privilege checks, events, task switches.
 *
 * Functions that may raise say so. As everywhere, nothing of the guest's state changes before the last access that can
 * fault, except in the middle of a task switch, where the manual makes faults belong to the new task.
 */
#ifndef LIBVM_X86_SYSTEM_H
#define LIBVM_X86_SYSTEM_H

#include "x86/insn.h"

/* System descriptor types (SDM vol. 3, table 3-2). */
enum { X86_SYS_TSS16 = 1, X86_SYS_LDT = 2, X86_SYS_TSS16_BUSY = 3, X86_SYS_CALL16 = 4, X86_SYS_TASK_GATE = 5,
       X86_SYS_INT16 = 6, X86_SYS_TRAP16 = 7, X86_SYS_TSS32 = 9, X86_SYS_TSS32_BUSY = 11, X86_SYS_CALL32 = 12,
       X86_SYS_INT32 = 14, X86_SYS_TRAP32 = 15 };

/* An eight-byte descriptor as read, `up` being the second half of a 16-byte one. */
typedef struct x86_desc {
    uint32_t lo, hi, up;
    uint16_t sel;
    uint64_t la;                       /* where it was read, for its accessed or busy bit */
} x86_desc;

static inline unsigned x86_desc_type(const x86_desc *d) { return d->hi >> 8 & 15; }
static inline bool x86_desc_s(const x86_desc *d) { return d->hi >> 12 & 1; }
static inline unsigned x86_desc_dpl(const x86_desc *d) { return d->hi >> 13 & 3; }
static inline bool x86_desc_p(const x86_desc *d) { return d->hi >> 15 & 1; }
static inline bool x86_desc_is_code(const x86_desc *d) { return (d->hi >> 11 & 3) == 3; }
static inline bool x86_desc_is_conforming(const x86_desc *d) { return (d->hi >> 10 & 7) == 7; }
static inline bool x86_desc_is_writable_data(const x86_desc *d) { return (d->hi >> 9 & 13) == 9; }
static inline bool x86_desc_is_readable(const x86_desc *d) { return x86_desc_s(d) && (d->hi >> 9 & 5) != 4; }
static inline bool x86_is_null(uint16_t sel) { return (sel & 0xfffc) == 0; }
static inline bool x86_lma(const x86_cpu *cpu) { return cpu->efer & X86_EFER_LMA; }

/* Raises `vector` with a selector error code: index and TI, plus EXT while a hardware event is being delivered. */
_Noreturn void x86_raise_sel(x86_cpu *cpu, uint8_t vector, uint16_t sel);

/* ---- segment.c ---- */
/* Reads the descriptor; false if sel is beyond its table (or the LDT unusable). May raise #PF. */
bool x86_desc_read(x86_cpu *cpu, uint16_t sel, x86_desc *d);
/* The same, raising vector(sel) when beyond the table. */
void x86_desc_load(x86_cpu *cpu, uint16_t sel, uint8_t vector, x86_desc *d);
/* Second half of a 16-byte system descriptor; raises vector(sel) if beyond the table or malformed. */
void x86_desc_load_upper(x86_cpu *cpu, x86_desc *d, uint8_t vector);
void x86_desc_to_seg(const x86_desc *d, uint16_t sel, x86_seg *seg);
/* Set the accessed bit in memory and in *d, atomically, if it is clear. */
void x86_desc_set_accessed(x86_cpu *cpu, x86_desc *d);
/* Set or clear the busy bit of a TSS descriptor in memory. */
void x86_desc_set_busy(x86_cpu *cpu, uint64_t la, bool busy);
/* MOV/POP/Lxx to a segment register other than CS, in the current mode. Raises. */
void x86_load_seg(x86_cpu *cpu, unsigned index, uint16_t sel);
/* Real-mode and v86 forms: base = sel << 4. */
void x86_set_real_seg(x86_cpu *cpu, unsigned index, uint16_t sel);
void x86_set_v86_seg(x86_cpu *cpu, unsigned index, uint16_t sel);
void x86_set_null_seg(x86_cpu *cpu, unsigned index, uint16_t sel);
/* Drop data segments that the new, less privileged CPL may not use (RETF, IRET to an outer level). */
void x86_drop_inner_segs(x86_cpu *cpu, unsigned new_cpl);
/* True when [off, off + n) lies inside a data segment's limit; `wide`: no limits (64-bit mode). */
bool x86_seg_holds(const x86_seg *seg, uint64_t off, unsigned n);
/* Raises #GP(0) unless `off` is a valid instruction pointer in cs. */
void x86_check_target(x86_cpu *cpu, const x86_seg *cs, uint64_t off);
/* True when cs executes 64-bit code on this CPU. */
static inline bool x86_seg_is_long(const x86_cpu *cpu, const x86_seg *cs)
{
    return x86_lma(cpu) && (cs->attr & X86_SEG_L);
}

/* A stack that is not (yet) SS:RSP. Pushes are collected in `sp`; nothing is committed. */
typedef struct x86_stack {
    x86_seg ss;
    uint64_t sp;
    uint8_t width;                     /* 2, 4, 8: stack pointer width */
    bool is_system;                    /* inner stack: implicit supervisor access */
    uint16_t error;                    /* selector for #SS */
} x86_stack;
x86_stack x86_current_stack(const x86_cpu *cpu);
void x86_stack_push(x86_cpu *cpu, x86_stack *st, unsigned n, uint64_t v);
/* Value of RSP after the pushes. */
uint64_t x86_stack_rsp(const x86_cpu *cpu, const x86_stack *st);
/* SS:ESP for privilege level `cpl` from the TSS in TR, checked. Raises #TS and #SS. */
void x86_inner_stack(x86_cpu *cpu, unsigned cpl, x86_stack *st, x86_desc *ss_desc);
/* RSPn (n 0..2) or ISTn (ist 1..7) of a 64-bit TSS. Raises #TS. */
uint64_t x86_tss64_rsp(x86_cpu *cpu, unsigned slot_offset);

/* ---- gate.c ---- */
enum { X86_EV_FAULT, X86_EV_TRAP, X86_EV_HARDWARE, X86_EV_SOFT, X86_EV_ICEBP };
typedef struct x86_event {
    uint8_t vector, kind;
    bool has_error, set_rf;
    uint32_t error;
    uint64_t rip;                      /* pushed */
} x86_event;
/* Goes through the IDT: on return CS, SS, RSP, RFLAGS and next_rip are the handler's. Raises. */
void x86_deliver_event(x86_cpu *cpu, const x86_event *ev);

/* ---- task.c ---- */
enum { X86_TASK_JMP, X86_TASK_CALL, X86_TASK_EVENT, X86_TASK_IRET };
/* Switch to the task whose (checked, available or for IRET busy) TSS descriptor is d; the old task will resume at
 * `rip`. For events (ev, else NULL) an error code may be pushed on the new stack. Leaves next_rip and rip at the new
 * task's EIP. Raises. */
void x86_task_switch(x86_cpu *cpu, x86_desc *d, unsigned reason, uint64_t rip, const x86_event *ev);
/* Find the TSS named by a task gate: raises #GP, #NP. */
void x86_task_gate_tss(x86_cpu *cpu, uint16_t sel, x86_desc *d);

/* ---- op_sys.c, state.c, msr.c, cpuid.c, debug.c ---- */
void x86_require_cpl0(x86_cpu *cpu);                                 /* #GP(0) */
bool x86_load_pdptes(x86_cpu *cpu, uint64_t cr3);                    /* PAE; false: reserved bits set, nothing loaded */
void x86_paging_changed(x86_cpu *cpu, unsigned how);   /* flush, tell the MMU, end flat mode */
void x86_paging_changed_in_place(x86_cpu *cpu);                       /* the same, all of it, but flat mode stays */
uint64_t x86_cr4_allowed(x86_cpu *cpu);
uint64_t x86_xcr0_allowed(x86_cpu *cpu);
/* CPUID words that features live in; a feature is word * 32 + bit. */
enum { X86_W_1_EDX, X86_W_1_ECX, X86_W_7_EBX, X86_W_7_ECX, X86_W_7_EDX, X86_W_E1_EDX, X86_W_E1_ECX, X86_W_D1_EAX,
       X86_W_E8_EBX, X86_W_E21_EAX, X86_NWORDS };
#define X86_FEAT(word, bit) ((word) * 32 + (bit))
enum {
    X86_FEAT_VME = X86_FEAT(X86_W_1_EDX, 1),
    X86_FEAT_DE = X86_FEAT(X86_W_1_EDX, 2),
    X86_FEAT_PSE = X86_FEAT(X86_W_1_EDX, 3),
    X86_FEAT_TSC = X86_FEAT(X86_W_1_EDX, 4),
    X86_FEAT_MSR = X86_FEAT(X86_W_1_EDX, 5),
    X86_FEAT_PAE = X86_FEAT(X86_W_1_EDX, 6),
    X86_FEAT_MCE = X86_FEAT(X86_W_1_EDX, 7),
    X86_FEAT_SEP = X86_FEAT(X86_W_1_EDX, 11),
    X86_FEAT_MTRR = X86_FEAT(X86_W_1_EDX, 12),
    X86_FEAT_PGE = X86_FEAT(X86_W_1_EDX, 13),
    X86_FEAT_MCA = X86_FEAT(X86_W_1_EDX, 14),
    X86_FEAT_PAT = X86_FEAT(X86_W_1_EDX, 16),
    X86_FEAT_MMX = X86_FEAT(X86_W_1_EDX, 23),
    X86_FEAT_FXSR = X86_FEAT(X86_W_1_EDX, 24),
    X86_FEAT_SSE = X86_FEAT(X86_W_1_EDX, 25),
    X86_FEAT_PCID = X86_FEAT(X86_W_1_ECX, 17),
    X86_FEAT_X2APIC = X86_FEAT(X86_W_1_ECX, 21),
    X86_FEAT_TSC_DEADLINE = X86_FEAT(X86_W_1_ECX, 24),
    X86_FEAT_XSAVE = X86_FEAT(X86_W_1_ECX, 26),
    X86_FEAT_AVX = X86_FEAT(X86_W_1_ECX, 28),
    X86_FEAT_RDRAND = X86_FEAT(X86_W_1_ECX, 30),
    X86_FEAT_FSGSBASE = X86_FEAT(X86_W_7_EBX, 0),
    X86_FEAT_TSC_ADJUST = X86_FEAT(X86_W_7_EBX, 1),
    X86_FEAT_SMEP = X86_FEAT(X86_W_7_EBX, 7),
    X86_FEAT_INVPCID = X86_FEAT(X86_W_7_EBX, 10),
    X86_FEAT_RDSEED = X86_FEAT(X86_W_7_EBX, 18),
    X86_FEAT_SMAP = X86_FEAT(X86_W_7_EBX, 20),
    X86_FEAT_UMIP = X86_FEAT(X86_W_7_ECX, 2),
    X86_FEAT_RDPID = X86_FEAT(X86_W_7_ECX, 22),
    X86_FEAT_SYSCALL = X86_FEAT(X86_W_E1_EDX, 11),
    X86_FEAT_NX = X86_FEAT(X86_W_E1_EDX, 20),
    X86_FEAT_GB_PAGES = X86_FEAT(X86_W_E1_EDX, 26),
    X86_FEAT_RDTSCP = X86_FEAT(X86_W_E1_EDX, 27),
    X86_FEAT_LM = X86_FEAT(X86_W_E1_EDX, 29),
    X86_FEAT_XGETBV1 = X86_FEAT(X86_W_D1_EAX, 2),
    X86_FEAT_AUTO_IBRS = X86_FEAT(X86_W_E21_EAX, 8)
};
bool x86_has(x86_cpu *cpu, unsigned feature);
/* State components that differ from their initial configuration: XINUSE (SDM vol. 1, 13.6). */
uint64_t x86_in_use(const x86_cpu *cpu);
bool x86_is_amd(const x86_cpu *cpu);
uint64_t x86_read_tsc(x86_cpu *cpu);
void x86_check_io_breakpoint(x86_cpu *cpu, uint16_t port, unsigned n);
#define X86_DR6_INIT UINT64_C(0xffff0ff0)
#define X86_DR7_INIT UINT64_C(0x400)

#endif
