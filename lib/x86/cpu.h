/* cpu.h - one x86 CPU: its architectural state, the inline TLB, and the door to the world outside.
 *
 * Everything below lib/interp and lib/jit works on an x86_cpu. It knows nothing of machines: RAM, devices,
 * clocks and the MMU strategy are reached through `env`, a table of functions the owner installs.
 *
 * Invariants
 *   - While an instruction executes, `rip` is its own address and `next_rip` where it will continue. Semantic
 *     functions write next_rip to branch; the loop that called them commits it. A fault therefore always sees
 *     the faulting instruction's rip and, because semantic functions change state only after the last access
 *     that can fault, the state before it.
 *   - A fault leaves a semantic function through x86_raise(), which longjmps to `fault_jmp`. No foreign frame
 *     (device callback, hook, binding) is ever between the two.
 *   - The structure lies in zeroed, page-aligned memory; JIT code reaches its fields through one segment base,
 *     so fields that emitted code touches come first.
 */
#ifndef LIBVM_X86_CPU_H
#define LIBVM_X86_CPU_H

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct x86_cpu x86_cpu;
typedef struct x86_insn x86_insn;
typedef void (*x86_exec_fn)(x86_cpu *cpu, const x86_insn *in);

enum { X86_RAX, X86_RCX, X86_RDX, X86_RBX, X86_RSP, X86_RBP, X86_RSI, X86_RDI,
       X86_R8, X86_R9, X86_R10, X86_R11, X86_R12, X86_R13, X86_R14, X86_R15 };
enum { X86_ES, X86_CS, X86_SS, X86_DS, X86_FS, X86_GS, X86_LDTR, X86_TR, X86_NSEG };

/* Vectors (SDM vol. 3, 6.3.1). */
enum { X86_DE = 0, X86_DB = 1, X86_NMI = 2, X86_BP = 3, X86_OF = 4, X86_BR = 5, X86_UD = 6, X86_NM = 7, X86_DF = 8,
       X86_TS = 10, X86_NP = 11, X86_SS_FAULT = 12, X86_GP = 13, X86_PF = 14, X86_MF = 16, X86_AC = 17, X86_MC = 18,
       X86_XM = 19 };

/* RFLAGS (SDM vol. 1, 3.4.3). */
#define X86_FL_CF   0x000001u
#define X86_FL_1    0x000002u
#define X86_FL_PF   0x000004u
#define X86_FL_AF   0x000010u
#define X86_FL_ZF   0x000040u
#define X86_FL_SF   0x000080u
#define X86_FL_TF   0x000100u
#define X86_FL_IF   0x000200u
#define X86_FL_DF   0x000400u
#define X86_FL_OF   0x000800u
#define X86_FL_IOPL 0x003000u
#define X86_FL_NT   0x004000u
#define X86_FL_RF   0x010000u
#define X86_FL_VM   0x020000u
#define X86_FL_AC   0x040000u
#define X86_FL_VIF  0x080000u
#define X86_FL_VIP  0x100000u
#define X86_FL_ID   0x200000u
#define X86_FL_ARITH (X86_FL_CF | X86_FL_PF | X86_FL_AF | X86_FL_ZF | X86_FL_SF | X86_FL_OF)

#define X86_CR0_PE (1u << 0)
#define X86_CR0_MP (1u << 1)
#define X86_CR0_EM (1u << 2)
#define X86_CR0_TS (1u << 3)
#define X86_CR0_ET (1u << 4)
#define X86_CR0_NE (1u << 5)
#define X86_CR0_WP (1u << 16)
#define X86_CR0_AM (1u << 18)
#define X86_CR0_NW (1u << 29)
#define X86_CR0_CD (1u << 30)
#define X86_CR0_PG (1u << 31)
#define X86_CR4_VME (1u << 0)
#define X86_CR4_PVI (1u << 1)
#define X86_CR4_TSD (1u << 2)
#define X86_CR4_DE (1u << 3)
#define X86_CR4_PSE (1u << 4)
#define X86_CR4_PAE (1u << 5)
#define X86_CR4_MCE (1u << 6)
#define X86_CR4_PGE (1u << 7)
#define X86_CR4_PCE (1u << 8)
#define X86_CR4_OSFXSR (1u << 9)
#define X86_CR4_OSXMMEXCPT (1u << 10)
#define X86_CR4_UMIP (1u << 11)
#define X86_CR4_FSGSBASE (1u << 16)
#define X86_CR4_PCIDE (1u << 17)
#define X86_CR4_OSXSAVE (1u << 18)
#define X86_CR4_SMEP (1u << 20)
#define X86_CR4_SMAP (1u << 21)
#define X86_EFER_SCE (1u << 0)
#define X86_EFER_LME (1u << 8)
#define X86_EFER_LMA (1u << 10)
#define X86_EFER_NXE (1u << 11)
#define X86_EFER_FFXSR (1u << 14)

/* A segment register with its hidden part. `attr` holds descriptor bits 8..15 in its low byte (type, S, DPL, P) and
 * AVL, L, D/B, G in bits 12..15. `limit` is expanded to bytes. A null or unusable segment has P = 0. */
typedef struct x86_seg {
    uint64_t base;
    uint32_t limit;
    uint16_t sel;
    uint16_t attr;
} x86_seg;
#define X86_SEG_TYPE(s) ((s)->attr & 15)
#define X86_SEG_S (1u << 4)
#define X86_SEG_DPL(s) (((s)->attr >> 5) & 3)
#define X86_SEG_P (1u << 7)
#define X86_SEG_L (1u << 13)
#define X86_SEG_DB (1u << 14)
#define X86_SEG_G (1u << 15)

typedef struct x86_dtr { uint64_t base; uint16_t limit; } x86_dtr;

/* ---- the inline TLB ----
 * One TLB fronts every MMU strategy, in the interpreter and in emitted code. There is one table per access context,
 * because what a page allows depends on who asks. A hit is `(la ^ tag) <= 4096 - size`: page match and page-end check
 * in one comparison that leaves the page offset behind. Tags hold the page's linear address; a tag that allows nothing
 * is X86_TLB_NONE(index), an address that can never be looked up at that index. Zeroed memory is an empty table except
 * at index 0, hence x86_tlb_clear(). Only directly accessible RAM pages get tags: MMIO, holes and (for writes)
 * pages that hold translated code or have a clean dirty bit go through the slow path every time. */
#ifdef VM_TINY_TLB               /* one entry for each half of the address space: NONE(0) lies in the upper, NONE(1) in the lower */
#define X86_TLB_BITS 1
#define X86_TLB_SHIFT 63
#else
#define X86_TLB_BITS 12
#define X86_TLB_SHIFT 12
#endif
#define X86_TLB_ENTRIES (1u << X86_TLB_BITS)
#define X86_TLB_INDEX(la) (((la) >> X86_TLB_SHIFT) & (X86_TLB_ENTRIES - 1))
#define X86_TLB_NONE(index) ((index) ? UINT64_C(0) : ~UINT64_C(0))
#define X86_PAGE_MASK (~UINT64_C(0xfff))

enum { X86_CTX_KERNEL,      /* CPL 0-2 (and implicit supervisor accesses when SMAP forbids user pages) */
       X86_CTX_USER,        /* CPL 3 */
       X86_CTX_KERNEL_AC,   /* CPL 0-2 with RFLAGS.AC = 1 while CR4.SMAP = 1: user pages allowed */
       X86_NCTX };

typedef struct x86_tlb_entry {
    uint64_t tag_r, tag_w, tag_x;
    uint8_t *host;            /* host address of the page's first byte */
} x86_tlb_entry;
/* Beside each entry: the gpa of its page and the bits below. */
#define X86_WRITABLES 2048u
#define X86_LOCALS 1024u
#define X86_TLBM_VALID 1u
#define X86_TLBM_GLOBAL 2u
#define X86_TLBM_LARGE  4u    /* part of a page larger than 4 KiB */
#define X86_TLBM_IO     8u    /* device memory: no tags; `host` is the linear page address with the allowed accesses in its low bits */
#define X86_TLBM_MAY_W 16u    /* translation allows writes, even where the page's tag_w is held back */
typedef struct x86_tlb {
    x86_tlb_entry e[X86_TLB_ENTRIES];
    uint64_t meta[X86_TLB_ENTRIES];
} x86_tlb;

/* What the TLB held of one address space, set aside while the CPU is in another (x86_tlb_park). */
#define X86_PARKED 256u
typedef struct x86_park {
    uint64_t clears, protects;    /* the CPU's counts then */
    unsigned count;
    struct { x86_tlb_entry e; uint64_t meta; uint32_t slot; /* ctx << X86_TLB_BITS | index */ } held[X86_PARKED];
} x86_park;

/* The JIT's jump caches: linear addresses of code and their translations, indexed by the address's low bits. An entry's rip is
 * 0 in zeroed memory, so index 0 never holds rip 0. */
#define X86_JUMP_ENTRIES 65536u              /* by the low 16 bits of rip; memory is touched as used */
typedef struct x86_jumps { uint64_t rip[X86_JUMP_ENTRIES]; const uint8_t *code[X86_JUMP_ENTRIES]; } x86_jumps;

/* Access kinds; the values of vm_prot. */
enum { X86_READ = 1, X86_WRITE = 2, X86_EXEC = 4, X86_WALKER = 8, X86_SEEN = 16 };

/* ---- leaving the CPU ---- */
typedef enum x86_stop {
    X86_STOP_NONE = 0,
    X86_STOP_SLICE,        /* `budget` used up */
    X86_STOP_ATTENTION,    /* `attention` became non-zero; rip at an instruction boundary */
    X86_STOP_HALT,         /* HLT executed (rip after it) */
    X86_STOP_SHUTDOWN,     /* triple fault */
    X86_STOP_IO,           /* a port or memory access nobody handles: see `io` */
    X86_STOP_EXCEPTION,    /* `fault` is a vector that the caller asked to see, not delivered */
    X86_STOP_UNTIL,        /* rip == until */
    X86_STOP_BREAKPOINT,   /* rip is a debugger breakpoint */
    X86_STOP_STEP,         /* one instruction done, as asked */
    X86_STOP_HYPERCALL,    /* VMCALL/VMMCALL that nobody handles (rip after it) */
    X86_STOP_HOOK,         /* a hook asked to stop; the instruction at rip has not been executed */
    X86_STOP_SKIP,         /* a hook ended the instruction, it counts as retired; inside the backend only */
    X86_STOP_INTERNAL,     /* our bug */
    X86_STOP_HOST          /* the host refused to go on (KVM); the thread's error message says why */
} x86_stop;

/* Bits of `attention`: another thread or a device wants the run loop. Set with atomic or. */
#define X86_ATT_KICK     0x01u   /* vm_vcpu_kick: sticky */
#define X86_ATT_IRQ      0x02u   /* interrupt controller state changed: look again */
#define X86_ATT_REQUEST  0x04u   /* machine-level edit: flush, invalidate, pause */
#define X86_ATT_EVENT    0x08u   /* reset, power-off, exit device, INIT/SIPI */
#define X86_ATT_STOP     0x10u   /* a callback asked this run to stop */
#define X86_ATT_LOOK     0x20u   /* a callback changed registers: begin anew at rip */

typedef struct x86_fault {
    uint8_t vector;
    bool has_error, is_soft;   /* soft: INT n, INT3, INTO (rip already past it when delivered) */
    bool is_external;          /* hardware interrupt or NMI: EXT bit for nested errors */
    bool is_after;             /* a trap that an instruction raises itself, done and with rip behind it */
    uint32_t error;
    uint64_t address;          /* #PF: linear address */
    uint64_t dr6;              /* #DB: bits to merge into DR6 */
} x86_fault;

/* Accesses of the current instruction that needed the outside, in order. When one of them has to leave the run loop,
 * the instruction is later executed again from its start and takes the results of the accesses it already made from
 * here; writes that were already made are skipped. Emptied when an instruction (or one rep iteration) retires. */
typedef struct x86_io_access {
    uint64_t gpa, gva, data;
    uint16_t port;
    uint8_t width;
    bool is_port, is_write, is_fetch, is_unmapped, done;
    bool is_hook;              /* no access: an event that has been reported */
} x86_io_access;
#define X86_IO_LOG 128    /* XSAVE (832 bytes in pieces of 8) of an instruction fetched byte by byte */

enum { X86_IO_DONE = 0, X86_IO_EXIT = 1 };

/* ---- hooks ----
 * An event for whoever watches the CPU (lib/core/hook.h). Kinds are numbered as vm_hook_kind; bit 0 of hook_mask stands for
 * breakpoints. `number` is what ranges are compared with where that is not an address. */
enum { X86_HOOK_BREAK, X86_HOOK_INSN, X86_HOOK_BLOCK, X86_HOOK_EDGE, X86_HOOK_READ, X86_HOOK_WRITE, X86_HOOK_EXCEPTION,
       X86_HOOK_SYSCALL, X86_HOOK_CPUID, X86_HOOK_MSR, X86_HOOK_INTERRUPT, X86_HOOK_PORT, X86_HOOK_FETCH, X86_NHOOKS };
#define X86_HOOK_BIT(kind) (1u << (kind))
#define X86_HOOK_CODE (X86_HOOK_BIT(X86_HOOK_BREAK) | X86_HOOK_BIT(X86_HOOK_INSN) | X86_HOOK_BIT(X86_HOOK_FETCH) | \
                       X86_HOOK_BLOCKS)                /* asked before an instruction */
#define X86_HOOK_BLOCKS (X86_HOOK_BIT(X86_HOOK_BLOCK) | X86_HOOK_BIT(X86_HOOK_EDGE))
#define X86_HOOK_DATA (X86_HOOK_BIT(X86_HOOK_READ) | X86_HOOK_BIT(X86_HOOK_WRITE))
enum { X86_HOOK_GO, X86_HOOK_STOP, X86_HOOK_SKIP, X86_HOOK_RETRY };    /* answers; the values of vm_hook_result */
enum { X86_EVENT_WRITE = 1, X86_EVENT_SOFT = 2, X86_EVENT_ERROR = 4, X86_EVENT_SYSENTER = 8 };   /* VM_EVENT_* */
typedef struct x86_hook {
    uint8_t kind, flags;
    unsigned bytes;
    uint64_t number, address, from, value, error;
    const void *data;
} x86_hook;
/* x86_cpu.block_state: what the instruction at rip is to basic blocks. Kept while hook_mask & X86_HOOK_BLOCKS. */
enum { X86_BLOCK_MID, X86_BLOCK_EDGE /* begins one; edge_from led here */, X86_BLOCK_FRESH /* begins one, out of nowhere */ };
/* x86_cpu.watch */
#define X86_WATCH_PAGES 1u       /* pages that data hooks cover get no tags (env->withheld) */
#define X86_WATCH_ALL   2u       /* data hooks on everything: X86_CAREFUL_DATA */
/* x86_cpu.careful */
#define X86_CAREFUL_STEP 1u      /* TF, hardware breakpoints, debugger stepping: one instruction at a time */
#define X86_CAREFUL_DATA 2u      /* no data access directly */

/* x86_env.root_changed */
#define X86_ROOT_GLOBAL 1u       /* global translations survive */
#define X86_ROOT_LOAD   2u       /* MOV CR3 or a task switch: those of other address spaces may, while CR4.PCIDE */
#define X86_ROOT_KEEP   4u       /* and those of the new one do: bit 63 was set */
/* INVPCID types (SDM vol. 2). */
enum { X86_INVPCID_ADDRESS, X86_INVPCID_ONE, X86_INVPCID_ALL_AND_GLOBAL, X86_INVPCID_ALL };

/* What a CPU asks of its surroundings. All functions get the cpu back; env_data is the owner's. */
typedef struct x86_env {
    /* Direct access to the RAM page at gpa (page aligned). Returns its host address or NULL when the page is not RAM;
     * *prot gets what may be done through the pointer: X86_WRITE is missing while writes must be seen (X86_SEEN: phys_write
     * makes them; code, dirty log, page tables that an MMU strategy watches; with X86_WALKER only the latter, and not the page
     * walker's own). */
    uint8_t *(*page)(x86_cpu *cpu, uint64_t gpa, unsigned *prot);
    /* Physical accesses that `page` cannot serve: MMIO, holes, ROM writes, seen writes, forbidden. n is 1..8, within one page.
     * X86_IO_EXIT: nobody handled it; the record for the caller is made from what was passed. */
    int (*phys_read)(x86_cpu *cpu, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *value);
    int (*phys_write)(x86_cpu *cpu, uint64_t gpa, uint64_t gva, unsigned n, uint64_t value);
    int (*port_in)(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t *value);
    int (*port_out)(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t value);
    /* Translate la for `access` in context `ctx` by the machine's MMU strategy and, where the page is direct RAM, fill
     * cpu->tlb[ctx]. Returns true with *gpa, or false with cpu->fault describing the #PF (not raised). */
    bool (*fill)(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, uint64_t *gpa);
    /* MMU events, after the state changed: CR3 loaded, or CR0/CR4/EFER paging bits (X86_ROOT_*); INVLPG; INVPCID (a type that is
     * none of X86_INVPCID_ is not passed). bytes == 0: everything. */
    void (*root_changed)(x86_cpu *cpu, unsigned how);
    void (*invalidate)(x86_cpu *cpu, uint64_t la, uint64_t bytes);
    void (*invalidate_pcid)(x86_cpu *cpu, unsigned type, unsigned pcid, uint64_t la);
    /* Code at gpa is about to be cached: from now on `page` hides X86_WRITE for it and writes call code_changed. */
    void (*code_page)(x86_cpu *cpu, uint64_t gpa);
    uint64_t (*tsc)(x86_cpu *cpu);               /* RDTSC before TSC_ADJUST */
    uint64_t (*random)(x86_cpu *cpu);            /* RDRAND, RDSEED */
    /* MSRs that live outside the CPU (APIC base, x2APIC, TSC deadline). false: #GP. */
    bool (*msr_read)(x86_cpu *cpu, uint32_t msr, uint64_t *value);
    bool (*msr_write)(x86_cpu *cpu, uint32_t msr, uint64_t value);
    uint8_t (*cr8_read)(x86_cpu *cpu);
    void (*cr8_write)(x86_cpu *cpu, uint8_t value);
    unsigned (*apic_id)(x86_cpu *cpu);           /* for CPUID */
    unsigned (*cpu_count)(x86_cpu *cpu);
    void (*ferr)(x86_cpu *cpu);                  /* x87 error with CR0.NE = 0: raises IRQ 13 */
    int (*hypercall)(x86_cpu *cpu);              /* VMCALL/VMMCALL: X86_IO_DONE, X86_IO_EXIT, or -1 for #UD */
    /* Stop-the-world for a locked access that host atomics cannot do (page-crossing, MMIO). */
    void (*lock_begin)(x86_cpu *cpu);
    void (*lock_end)(x86_cpu *cpu);
    /* An event whose bit in hook_mask is set: X86_HOOK_GO, _STOP, _SKIP. hook_before: the kinds of X86_HOOK_CODE. */
    unsigned (*hook)(x86_cpu *cpu, const x86_hook *h);
    unsigned (*hook_before)(x86_cpu *cpu, const x86_insn *in, uint64_t gpa);
    /* While X86_HOOK_BREAK: the backend leaves with X86_STOP_BREAKPOINT at la; asked before code is fetched from there. */
    bool (*is_stop)(x86_cpu *cpu, uint64_t la);
    /* While watch: X86_READ, X86_WRITE that data hooks want to see on the page at la, gpa; are these very bytes covered? */
    unsigned (*withheld)(x86_cpu *cpu, uint64_t la, uint64_t gpa);
    bool (*watched)(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access);
} x86_env;

/* FXSAVE/XSAVE image, standard format: 512 legacy + 64 header + 256 YMM_Hi128 (SDM vol. 1, 13.4). The guest's x87, MMX,
 * SSE and AVX registers live here whenever guest code is not running natively. */
typedef struct x86_fpu {
    uint8_t image[832];
} __attribute__((aligned(64))) x86_fpu;
#define X86_FPU_FCW(cpu)   (*(uint16_t *)&(cpu)->fpu.image[0])
#define X86_FPU_FSW(cpu)   (*(uint16_t *)&(cpu)->fpu.image[2])
#define X86_FPU_FTW(cpu)   ((cpu)->fpu.image[4])          /* abridged: bit set = register in use, physical order */
#define X86_FPU_FOP(cpu)   (*(uint16_t *)&(cpu)->fpu.image[6])
#define X86_FPU_FIP(cpu)   (*(uint64_t *)&(cpu)->fpu.image[8])
#define X86_FPU_FDP(cpu)   (*(uint64_t *)&(cpu)->fpu.image[16])
#define X86_FPU_MXCSR(cpu) (*(uint32_t *)&(cpu)->fpu.image[24])
#define X86_FPU_ST(cpu, i)  (&(cpu)->fpu.image[32 + 16 * (i)])   /* stack-relative, as FXSAVE stores it */
#define X86_FPU_XMM(cpu, i) (&(cpu)->fpu.image[160 + 16 * (i)])
#define X86_FPU_YMMH(cpu, i) (&(cpu)->fpu.image[576 + 16 * (i)])

/* Where executed branches and comparisons are recorded (cover.h); NULL: nowhere. Not part of the CPU's state. */
enum { X86_ROUNDS = 64 };
typedef struct x86_cover {
    uint8_t *map;                      /* edge counters */
    uint32_t mask;
    bool is_on;                        /* map or ring */
    uint64_t begin, bytes;             /* branches elsewhere do not count; bytes 0: all do */
    uint64_t *ring, *head, ring_mask;  /* blocks entered */
    struct vm_compare *log;
    uint64_t *log_head, log_mask;
    uint8_t rounds[X86_ROUNDS];        /* the JIT's: of loops, not counted in the map yet */
} x86_cover;

struct x86_cpu {
    /* -- reached by emitted code -- */
    uint64_t gpr[16];
    uint64_t rip, next_rip;
    uint64_t rflags;                   /* always complete between instructions */
    int64_t budget;                    /* instructions left in this slice; counts down */
    _Atomic uint32_t attention;        /* X86_ATT_*: polled at block boundaries */
    uint8_t cpl;
    uint8_t ctx;                       /* X86_CTX_*: kept by x86_mode_changed() */
    uint8_t code_size;                 /* 2, 4, 8: default operand/address mode of CS */
    uint8_t stack_size;                /* 2, 4, 8: stack pointer width */
    x86_seg seg[X86_NSEG];
    uint64_t jit_scratch[32];          /* the JIT's own */
    uint64_t hook_site;                /* emitted code is calling a hook: not all registers are here, ask the backend's get_state */
    void *jit;                         /* the JIT's per-CPU data */
    x86_fpu fpu;

    /* -- the rest of the architectural state -- */
    x86_dtr gdtr, idtr;
    uint64_t cr0, cr2, cr3, cr4, xcr0, efer;
    uint64_t dr[8];                    /* DR0-3, DR6, DR7 at their own index */
    uint64_t star, lstar, cstar, sfmask, kernel_gs_base;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t tsc_aux, tsc_adjust, pat, misc_enable, spec_ctrl;
    uint64_t mtrr_def, mtrr_fixed[11], mtrr_var[16];
    uint64_t mcg_status, mcg_ctl, mc_bank[16];     /* four machine-check banks: CTL, STATUS, ADDR, MISC */
    uint64_t hwcr, syscfg, de_cfg;                 /* AMD: C001_0015, C001_0010, C001_1029 */
    uint64_t pdpte[4];                 /* PAE paging: loaded at MOV CR3 (SDM vol. 3, 4.4.1) */
    bool flat;                         /* VM_MODE_FLAT64: long mode with linear = physical until CR3 is written */
    bool halted;
    uint8_t inhibit;                   /* 1: STI shadow, 2: MOV SS / POP SS shadow (also hides #DB); for the next instruction */
    bool nmi_blocked, nmi_pending;
    bool irq_waiting;                  /* an interrupt waits for IF: backends return X86_STOP_ATTENTION at the first block boundary
                                          where x86_can_interrupt(); see x86_irq_window() */

    /* -- how execution is going -- */
    uint8_t careful;                   /* X86_CAREFUL_* */
    uint8_t watch;                     /* X86_WATCH_* */
    bool step_asked;                   /* debugger stepping: x86_mode_changed() keeps `careful` set while this is */
    uint8_t dr_hit;                    /* data/IO breakpoints met by this instruction: DR6 B0-B3 */
    bool keep_rf;                      /* this instruction loaded RF itself (IRET) */
    bool no_trap;                      /* this instruction swallowed its TF trap (INT n, SYSCALL, task switch) */
    uint8_t ext;                       /* EXT bit of error codes while a hardware event is being delivered */
    uint8_t hook_credit;               /* events in io_log that replaying accesses has passed over */
    uint8_t block_state;               /* X86_BLOCK_* */
    bool is_redirected;                /* a callback set RIP: next_rip says where it goes on. Cleared before a callback */
    bool hook_done;                    /* hooks before the instruction at hook_rip have been called, it has not retired yet */
    uint32_t hook_mask;                /* X86_HOOK_BIT()s that are active */
    uint64_t hook_rip, edge_from;
    uint64_t fault_hooked;             /* 1 + `retired` when a stopped run had reported the exception at hook_rip */
    uint64_t retired;                  /* instructions retired */
    x86_fault fault;
    jmp_buf *fault_jmp;                /* where x86_raise goes */
    x86_stop stop;                     /* set with x86_leave(): the reason semantics left the loop */
    x86_io_access io;                  /* the access behind X86_STOP_IO */
    const uint8_t *io_code;            /* the 15 bytes at rip then, where the backend has them; until the exit is recorded */
    x86_io_access io_log[X86_IO_LOG];
    bool has_deadline;                 /* the run loop wants to look at the clock now and then, even if nothing retires */
    uint8_t spent;                     /* microseconds since the last such look, as x86_spend() was told */
    bool is_midway;                    /* a repeat was left unfinished since somebody cleared this */
    uint64_t fault_retired;            /* 1 + `retired` when an exception was last delivered */
    unsigned io_count, io_pos;         /* entries logged; entries taken by this attempt */
    uint64_t exception_exits;          /* vectors reported instead of delivered */
    bool exec_varies;                  /* env->page may forbid fetches from where code has been cached */
    bool is_walking;                   /* the page walker writes an entry: no access of the program's */
    bool has_until;
    uint64_t until;
    uint64_t phys_mask;                /* guest-physical address bits: (1 << MAXPHYADDR) - 1 */
    const struct x86_model *model;     /* CPUID leaves */
    uint32_t tsc_khz;                  /* what CPUID says of the TSC; 0: 1 GHz */
    uint32_t host_features[4];         /* what the host CPU offers, asked once: CPUID words that bound the model's */
    bool host_known;
    const x86_env *env;
    void *env_data;
    /* The range of RAM that env->page answered from last: page walks look here first. The environment empties it when
     * the memory map changes. */
    uint64_t ram_gpa, ram_bytes;
    uint8_t *ram_host;
    void *interp;                      /* the interpreter's per-CPU data (decoded blocks) */
    void *native;                      /* one-instruction thunks (native.c) */
    uint64_t stat[32];                 /* counters, see enum x86_stat */
    x86_cover cover;

    uint32_t tlb_touched[X86_NCTX];    /* bit i: chunk i of that TLB table may hold entries (tlb.c) */
    uint64_t tlb_clears;               /* counts x86_tlb_clear(): what has been parked before counts no more */
    uint64_t tlb_protects;             /* counts x86_tlb_protect(), atomically: nor do write tags parked before */
    uint32_t writable_count;           /* entries that got a write tag since the last x86_tlb_protect_noted(); > X86_WRITABLES: many */
    uint16_t writable[X86_WRITABLES];  /* ctx << X86_TLB_BITS | index */
    uint32_t local_count;              /* entries of pages that are not global, made since the last sweep; > X86_LOCALS: more */
    uint16_t local[X86_LOCALS];        /* as `writable` */
    uint64_t large_lo[2], large_hi[2]; /* linear addresses, lower and upper half, that large pages in the TLB cover */

    x86_tlb tlb[X86_NCTX];             /* last: large, touched as used */
    x86_jumps jump[16];                /* touched as used */
};
enum x86_stat { X86_STAT_FILLS, X86_STAT_WALKS, X86_STAT_WALK_REFS, X86_STAT_FLUSHES, X86_STAT_EXCEPTIONS, X86_STAT_INTERRUPTS,
                X86_STAT_IO, X86_STAT_MMIO, X86_STAT_BLOCKS, X86_STAT_DECODED, X86_STAT_FALLBACKS, X86_STAT_CODE_WRITES,
                X86_STAT_ROOT_SWITCHES, X86_STAT_HALTS, X86_STAT_KVM_EXITS, X86_STAT_KVM_EMULATED,
                X86_STAT_TABLE_WRITES, X86_STAT_SHADOW_HITS, X86_STAT_SHADOW_SYNCS, X86_STAT_VIOLATIONS,
                X86_STAT_EVICTIONS };

/* ---- faults and leaving (fault.c) ---- */
_Noreturn void x86_raise(x86_cpu *cpu, uint8_t vector);                          /* no error code */
_Noreturn void x86_raise_error(x86_cpu *cpu, uint8_t vector, uint32_t error);
_Noreturn void x86_raise_fault(x86_cpu *cpu, const x86_fault *fault);
_Noreturn void x86_leave(x86_cpu *cpu, x86_stop stop);                           /* same door, no fault: cpu->stop says why */
/* After a longjmp to fault_jmp with cpu->stop == X86_STOP_NONE: delivers cpu->fault (with double and triple fault rules).
 * X86_STOP_NONE when the guest can go on at its handler; else X86_STOP_EXCEPTION, _SHUTDOWN or _IO. Sets up its own fault_jmp. */
x86_stop x86_deliver_fault(x86_cpu *cpu);
/* Deliver a hardware interrupt or NMI at an instruction boundary. Same result. */
x86_stop x86_deliver_interrupt(x86_cpu *cpu, uint8_t vector, bool is_nmi);
/* Inject an exception as the API asks (vm_vcpu_inject). Same result. */
x86_stop x86_inject(x86_cpu *cpu, uint8_t vector, bool has_error, uint32_t error);
/* True when an external interrupt may be taken now: IF, no shadow. */
static inline bool x86_can_interrupt(const x86_cpu *cpu) { return (cpu->rflags & X86_FL_IF) && !cpu->inhibit; }
/* Something that held interrupts back has ended (IF set, IRET, POPF, STI): if the run loop has one waiting, make it look. Called
 * by x86_mode_changed() and by whatever sets IF or unblocks NMI. */
static inline void x86_irq_window(x86_cpu *cpu)
{
    if (cpu->irq_waiting && ((cpu->rflags & X86_FL_IF) || (cpu->nmi_pending && !cpu->nmi_blocked)))
        __atomic_fetch_or((uint32_t *)&cpu->attention, X86_ATT_IRQ, __ATOMIC_RELAXED);
}
/* Instructions are counted between looks at the clock; what takes longer than they do, some `us` microseconds, adds to it. */
static inline void x86_spend(x86_cpu *cpu, unsigned us)
{
    if (!cpu->has_deadline)
        return;
    unsigned spent = cpu->spent + us;
    cpu->spent = (uint8_t)spent;
    if (spent > UINT8_MAX)
        __atomic_fetch_or((uint32_t *)&cpu->attention, X86_ATT_REQUEST, __ATOMIC_RELAXED);
}
/* Around one instruction while cpu->careful: instruction breakpoints before (may raise), TF and data breakpoints after
 * (may raise #DB as a trap). Called by the interpreter with fault_jmp set. */
void x86_before_careful(x86_cpu *cpu);
void x86_after_careful(x86_cpu *cpu, uint64_t rflags_before, uint8_t inhibit_before);

/* INT n, INT3, INTO, INT1 as instructions: delivers through the IDT with the instruction's own privilege checks, sets next_rip. */
enum { X86_INT_N, X86_INT_3, X86_INT_O, X86_INT_1 };
void x86_software_interrupt(x86_cpu *cpu, uint8_t vector, unsigned kind);
/* mem.c calls this while cpu->careful for every data access of n bytes at la (X86_READ, X86_WRITE or both). */
void x86_check_data_breakpoint(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access);

/* ---- state as a whole (state.c) ---- */
void x86_cpu_reset(x86_cpu *cpu, bool is_init);            /* RESET or INIT values (SDM vol. 3, table 9-1) */
void x86_cpu_set_mode(x86_cpu *cpu, unsigned vm_mode_value); /* VM_MODE_* starting states */
/* Recompute cpl, ctx, code_size, stack_size, careful from segments, CR0, CR4, EFER, RFLAGS, DR7. Call after changing them. */
void x86_mode_changed(x86_cpu *cpu);
static inline bool x86_is_long(const x86_cpu *cpu) { return cpu->code_size == 8; }
static inline bool x86_is_protected(const x86_cpu *cpu) { return (cpu->cr0 & X86_CR0_PE) && !(cpu->rflags & X86_FL_VM); }
static inline bool x86_is_v86(const x86_cpu *cpu) { return cpu->rflags & X86_FL_VM; }
static inline bool x86_is_real(const x86_cpu *cpu) { return !(cpu->cr0 & X86_CR0_PE); }
static inline bool x86_canonical(uint64_t la) { return (uint64_t)((int64_t)(la << 16) >> 16) == la; }

/* ---- memory (mem.c) ----
 * x86_linear: segment checks (type, limit, canonical, null) for an access of n bytes at seg:off; raises #GP or #SS; returns
 * the linear address. Linear accessors: raise #PF (or #AC when enabled), or leave with X86_STOP_IO; all-or-nothing. */
uint64_t x86_linear(x86_cpu *cpu, unsigned seg, uint64_t off, unsigned n, unsigned access);
void x86_read_linear(x86_cpu *cpu, uint64_t la, void *buf, unsigned n);          /* n <= 4096; crosses pages correctly */
void x86_write_linear(x86_cpu *cpu, uint64_t la, const void *buf, unsigned n);
/* Host pointer for n bytes at la, or NULL (page crossing, MMIO, watched): then use read/write. Raises faults. */
uint8_t *x86_direct(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access);
/* Check that a later write of n bytes at la cannot fault. */
void x86_probe_write(x86_cpu *cpu, uint64_t la, unsigned n);
/* Implicit supervisor accesses (descriptor tables, TSS, IDT): context KERNEL whatever CPL is. */
void x86_read_system(x86_cpu *cpu, uint64_t la, void *buf, unsigned n);
void x86_write_system(x86_cpu *cpu, uint64_t la, const void *buf, unsigned n);
/* Physical accesses for page walks. False when the address is not RAM (the walk then sees all ones / drops the write). */
bool x86_read_phys(x86_cpu *cpu, uint64_t gpa, void *buf, unsigned n);
bool x86_write_phys(x86_cpu *cpu, uint64_t gpa, const void *buf, unsigned n);
bool x86_cmpxchg_phys(x86_cpu *cpu, uint64_t gpa, unsigned n, uint64_t old, uint64_t new_value);  /* A/D bits, atomically */
/* Ports, with the I/O permission check (#GP); leaves with X86_STOP_IO when nobody answers. */
void x86_check_port(x86_cpu *cpu, uint16_t port, unsigned n);
uint64_t x86_port_in(x86_cpu *cpu, uint16_t port, unsigned n);
void x86_port_out(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t value);
/* Call when an instruction (or one rep iteration) is final. */
/* Nobody answered the access: leave with X86_STOP_IO. */
_Noreturn void x86_io_leave(x86_cpu *cpu, uint64_t gpa, uint64_t la, unsigned n, uint64_t value, unsigned access);
static inline void x86_io_retire(x86_cpu *cpu) { cpu->io_count = cpu->io_pos = 0; }

/* ---- hooks (hook.c) ----
 * access: after a read or before a write of n bytes; leaves with X86_STOP_SKIP. event: true: do not execute the
 * instruction; leaves with X86_STOP_HOOK. exception: the answer for cpu->fault. block_end: the instruction at la was the
 * last of its block. */
void x86_hook_access(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access, const void *data);
bool x86_hook_event(x86_cpu *cpu, x86_hook h);
unsigned x86_hook_exception(x86_cpu *cpu);
void x86_hook_port(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t value, bool is_write);   /* leaves as access does */
void x86_hook_note(x86_cpu *cpu);          /* the instruction at rip has reported its first event, and nothing else */
void x86_hook_skipped(x86_cpu *cpu);       /* X86_STOP_SKIP has arrived: the instruction retires, rip = next_rip */
void x86_hook_left(x86_cpu *cpu);          /* an instruction retired by leaving (HLT): rip is after it */
void x86_hook_swallowed(x86_cpu *cpu);     /* an exception is not to be delivered: go on at next_rip */
static inline bool x86_hooked(const x86_cpu *cpu, unsigned kind) { return cpu->hook_mask & X86_HOOK_BIT(kind); }
/* What is at a stop may not be there at all. */
static inline void x86_look_for_stop(x86_cpu *cpu, uint64_t la)
{
    if (__builtin_expect(x86_hooked(cpu, X86_HOOK_BREAK), 0) && cpu->env->is_stop(cpu, la)) x86_leave(cpu, X86_STOP_BREAKPOINT);
}
static inline void x86_hook_retire(x86_cpu *cpu) { cpu->hook_done = false; }
static inline void x86_block_end(x86_cpu *cpu, uint64_t la)
{
    cpu->block_state = X86_BLOCK_EDGE;
    cpu->edge_from = la;
}
static inline uint64_t x86_rip_linear(const x86_cpu *cpu)
{
    return cpu->code_size == 8 ? cpu->rip : (uint32_t)(cpu->seg[1].base + cpu->rip);
}

/* ---- the inline TLB as a whole (tlb.c); entries are made with x86_tlb_set() only ---- */
void x86_tlb_init(x86_cpu *cpu);                                 /* fresh, zeroed memory */
/* Enter the page at la (any address in it): `host` its first byte, `prot` what context ctx may do through it. page_bytes is
 * the size of the guest page it is part of. */
void x86_tlb_set(x86_cpu *cpu, unsigned ctx, uint64_t la, uint64_t gpa, uint8_t *host, unsigned prot, bool global,
                 uint64_t page_bytes);                           /* prot with X86_TLB_MAY_W: see X86_TLBM_MAY_W */
#define X86_TLB_MAY_W 8u
/* The entry for la, known to be for RAM that may be written (x86_tlb_known), gets the write tag that was held back. */
void x86_tlb_allow(x86_cpu *cpu, unsigned ctx, uint64_t la);
/* Take every write tag that was given since the last time. The vCPU is at rest. */
void x86_tlb_protect_noted(x86_cpu *cpu);
void x86_tlb_set_io(x86_cpu *cpu, unsigned ctx, uint64_t la, uint64_t gpa, unsigned prot, bool global, uint64_t page_bytes);
/* A translation for this access that the table holds though it has no tag for it: device memory, held-back writes. */
bool x86_tlb_known(x86_cpu *cpu, unsigned ctx, uint64_t la, unsigned access, uint64_t *gpa);
static inline bool x86_tlb_device(const x86_cpu *cpu, unsigned ctx, uint64_t la, unsigned access, uint64_t *gpa)
{
    const x86_tlb *t = &cpu->tlb[ctx];
    unsigned i = X86_TLB_INDEX(la);
    uint64_t page = (uintptr_t)t->e[i].host;
    *gpa = (t->meta[i] & X86_PAGE_MASK) | (la & 0xfff);
    return (t->meta[i] & X86_TLBM_IO) && !((page ^ la) & X86_PAGE_MASK) && (page & access) == access;
}
void x86_tlb_clear(x86_cpu *cpu);                                /* every entry of every context */
void x86_tlb_clear_nonglobal(x86_cpu *cpu);
/* x86_tlb_clear_nonglobal(), but what is dropped goes to `park`, as far as it fits; and back, where nothing newer is, unless
 * everything has been cleared meanwhile. */
void x86_tlb_park(x86_cpu *cpu, x86_park *park);
void x86_tlb_unpark(x86_cpu *cpu, const x86_park *park);
void x86_tlb_drop(x86_cpu *cpu, uint64_t la);                    /* the page la lies in, every context, large pages as a whole */
/* Take write permission from every entry for the page at gpa (UINT64_MAX: any page). True if there was one. Also called by
 * other threads, see lib/core. */
bool x86_tlb_protect(x86_cpu *cpu, uint64_t gpa);

/* Fast paths. */
static inline uint8_t *x86_tlb_hit(x86_cpu *cpu, uint64_t la, unsigned n, bool is_write)
{
    x86_tlb_entry *e = &cpu->tlb[cpu->ctx].e[X86_TLB_INDEX(la)];
    uint64_t offset = la ^ (is_write ? __atomic_load_n(&e->tag_w, __ATOMIC_RELAXED) : e->tag_r);
    return offset <= 4096u - n ? e->host + offset : NULL;
}

/* ---- the guest page walk (walk.c), used by MMU strategies ---- */
/* What a walk finds. Up to `context` laid out as the public struct vm_mmu_result, which vm_mmu_walk() can so fill in place. */
typedef struct x86_walk {
    uint32_t size;
    uint64_t gpa;            /* of la itself */
    uint64_t page_bytes;     /* 4096, 2 MiB, 4 MiB, 1 GiB */
    unsigned prot;           /* what this context may do right now; W only if the dirty bit is set */
    bool global;
    bool trap_writes;        /* for strategies; not set here, nor are the others that are not explained */
    uint8_t fault_vector;
    uint32_t fault_error;
    uint32_t count;          /* entries on the path, root first; 0 without paging; also of a walk that failed */
    uint64_t at[5];          /* where they are */
    uint32_t context;
    unsigned refs;           /* page-table references made */
    uint64_t pte[4];         /* the entries, with the A and D bits that the walk has set */
    x86_fault fault;         /* if it failed */
} x86_walk;
#define X86_PTE_P 1u
#define X86_PTE_RW 2u
#define X86_PTE_US 4u
#define X86_PTE_A 0x20u
#define X86_PTE_D 0x40u
#define X86_PTE_G 0x100u
#define X86_PTE_NX (UINT64_C(1) << 63)
/* X86_READ, _WRITE, _EXEC that `ctx` has by the AND of RW and US and the OR of NX over the levels, dirty bit aside. */
unsigned x86_walk_prot(const x86_cpu *cpu, uint64_t rights, bool nx, unsigned ctx);
/* set_ad false: look only (vm_vcpu_translate): no A/D bits, no state change. False: w->fault is the #PF. */
bool x86_walk_page(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, bool set_ad, x86_walk *w);

/* ---- CPUID, MSRs (cpuid.c, msr.c) ---- */
uint64_t x86_model_phys_mask(const struct x86_model *model);
uint32_t x86_model_signature(const struct x86_model *model);      /* CPUID.1:EAX, EDX after RESET */
const char *x86_model_name(const struct x86_model *model);
/* A copy of `base` without the features whose bit `allowed(user, leaf, subleaf, register 0..3 = EAX..EDX)` lacks; free() it.
 * NULL: no memory. For backends that can do less than the software CPU. */
struct x86_model *x86_model_cut(const struct x86_model *base,
                                uint32_t (*allowed)(void *user, uint32_t leaf, uint32_t sub, unsigned reg), void *user);
void x86_cpuid(x86_cpu *cpu, uint32_t leaf, uint32_t sub, uint32_t out[4]);
const struct x86_model *x86_model_find(const char *name);        /* NULL or "max": all that works here; NULL result: unknown */
bool x86_msr_read(x86_cpu *cpu, uint32_t msr, uint64_t *value);  /* false: no such MSR (#GP in the guest) */
bool x86_msr_write(x86_cpu *cpu, uint32_t msr, uint64_t value);

#endif
