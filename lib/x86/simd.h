/* simd.h - what native.c, op_simd.c, op_fpu.c and op_xsave.c share: instruction properties, thunks, availability checks. */
#ifndef LIBVM_X86_SIMD_H
#define LIBVM_X86_SIMD_H

#include "x86/native.h"
#include "x86/ops.h"

#define X86_FSW_ES   0x0080u
#define X86_FSW_B    0x8000u
#define X86_FSW_TOP(fsw) (((fsw) >> 11) & 7)
#define X86_FX_ERRORS 0x3fu                  /* IE DE ZE OE UE PE, in FSW, FCW (masks) and MXCSR alike */
#define X86_MXCSR_DAZ 0x0040u
#define X86_MXCSR_FTZ 0x8000u
#define X86_MXCSR_VALID 0xffffu

/* Selectors of the last x87 instruction and operand. FXSAVE's layout has room for them only in its 32-bit form, so they
 * live in bytes of the image that the architecture leaves to software. */
#define X86_FPU_FCS(cpu) (*(uint16_t *)&(cpu)->fpu.image[464])
#define X86_FPU_FDS(cpu) (*(uint16_t *)&(cpu)->fpu.image[466])

/* Buffers and status of one thunk call; r9 points here while it runs. */
typedef struct x86_thunk_frame {
    uint8_t fx[512] __attribute__((aligned(64)));      /* x87 thunks: the state afterwards */
    uint8_t memory[64] __attribute__((aligned(64)));   /* stands for a memory operand that has no host address */
    uint64_t flags;                                    /* RFLAGS in (FCMOVcc) and out */
    uint32_t mxcsr, mxcsr_after, host_mxcsr;
    uint16_t host_fcw;
    uint16_t fcw, fsw;                                 /* light x87 thunks: control word in, status out */
    uint8_t a[16], b[16];                              /* and ST(0), ST(i) as extended values, in and out */
} x86_thunk_frame;

/* What a light x87 thunk does with the two values. */
enum x86_light { LIGHT_A = 1,        /* reads ST(0) */
                 LIGHT_B = 2,        /* reads ST(i), as ST(1) of the thunk */
                 LIGHT_TO_A = 4, LIGHT_TO_B = 8,
                 LIGHT_PUSH = 0x10, LIGHT_POP = 0x20, LIGHT_POP2 = 0x40,
                 LIGHT_CC = 0x80,    /* sets all condition codes, not C1 alone */
                 LIGHT_FLAGS = 0x100,
                 LIGHT_STORE = 0x200 };

typedef void (*x86_thunk_fn)(x86_cpu *cpu, void *memory, x86_thunk_frame *frame);

/* The host function for `in`, NULL when it cannot be made (an instruction the CPU model lacks). May flush older thunks. */
x86_thunk_fn x86_thunk(x86_cpu *cpu, const x86_insn *in);
/* A thunk for an x87 instruction of shape `light` (enum x86_light) that works on frame->a and frame->b. Only for a control
 * word with every exception masked. */
x86_thunk_fn x86_thunk_light(x86_cpu *cpu, const x86_insn *in, unsigned light);
x86_thunk_frame *x86_thunk_frame_of(x86_cpu *cpu);
/* rip + 1 of the instruction that reported an x87 error with CR0.NE = 0; 0: none. */
uint64_t *x86_ferr_seen(x86_cpu *cpu);
/* Leaves with X86_STOP_INTERNAL when there is no memory for thunks. */
void x86_thunk_ready(x86_cpu *cpu);

/* ---- availability; each raises #UD or #NM (and #MF) in the manuals' order ---- */
void x86_check_simd(x86_cpu *cpu, const x86_insn *in, bool uses_mmx);
void x86_check_fpu(x86_cpu *cpu);                      /* x87: #NM */
void x86_check_fpu_error(x86_cpu *cpu);                /* pending unmasked x87 exception: #MF or FERR# */

/* ---- x87 image helpers (op_fpu.c) ---- */
void x86_fpu_set_pointers(x86_cpu *cpu, const x86_insn *in);
bool x86_fpu_light(x86_cpu *cpu, const x86_insn *in);  /* op_fpu_light.c: true when it executed the instruction */
void x86_fpu_init(x86_cpu *cpu);                       /* FNINIT */
void x86_fpu_update_es(x86_cpu *cpu);                  /* FSW.ES and B follow from the flags and the masks */
void x86_mmx_enter(x86_cpu *cpu);                      /* TOP = 0, all tags valid */
uint16_t x86_fpu_full_tag(const x86_cpu *cpu);
uint8_t x86_fpu_abridged_tag(uint16_t full);

/* Index of the memory operand among in->op, or -1. */
static inline int x86_memory_operand(const x86_insn *in)
{
    if (!(in->flags & X86_IF_MEM))
        return -1;
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (in->op[i].kind == X86_OP_MEM)
            return (int)i;
    return -1;
}

#endif
