/* insn.h - one decoded x86 instruction, as plain data.
 *
 * decode.c makes it from Zydis; the interpreter calls `exec`; the JIT lifts it. It depends only on the bytes and the code
 * size (2, 4, 8), never on the CPU state or the address, so it can be cached by guest-physical page.
 */
#ifndef LIBVM_X86_INSN_H
#define LIBVM_X86_INSN_H

#include "x86/cpu.h"

enum x86_opkind { X86_OP_NONE, X86_OP_GPR, X86_OP_MEM, X86_OP_IMM, X86_OP_REL, X86_OP_SEG, X86_OP_CR, X86_OP_DR,
                  X86_OP_FAR /* ptr16:16/32: sel, imm */, X86_OP_MOFFS /* memory at disp */, X86_OP_ST, X86_OP_MMX, X86_OP_VEC };

/* Visible operands in Intel order. `reg` is the register number 0..15; for byte registers 16..19 mean AH, CH, DH, BH.
 * `size` is the operand's size in bytes (16/32 for vectors, 10 for x87 tbyte, 0 if it has none, as LEA's memory). */
typedef struct x86_operand { uint8_t kind, reg, size, enc; } x86_operand;
/* `enc`: the field of the encoding that names a register or memory operand; NONE for implicit ones (CL, AL, XMM0) and immediates. */
enum x86_openc { X86_ENC_NONE, X86_ENC_REG /* ModRM.reg */, X86_ENC_RM /* ModRM.rm */, X86_ENC_OPCODE /* low bits of the opcode */,
                 X86_ENC_VVVV, X86_ENC_IS4 /* imm8[7:4] */ };

#define X86_NOREG 0xff
#define X86_REG_RIP 0x10          /* base only */

/* insn flags */
#define X86_IF_LOCK    0x0001u    /* LOCK prefix on a form that allows it */
#define X86_IF_REP     0x0002u    /* F3 on a string instruction */
#define X86_IF_REPNE   0x0004u    /* F2 on a string instruction */
#define X86_IF_MEM     0x0008u    /* has an explicit ModRM/moffs memory operand (base, index, scale, disp, seg below) */
#define X86_IF_BRANCH  0x0010u    /* may change rip other than by falling through */
#define X86_IF_END     0x0020u    /* ends a block: branches, mode/segment/CR changes, HLT, STI-like, serialising */
#define X86_IF_FPU     0x0040u    /* x87/MMX state */
#define X86_IF_VEC     0x0080u    /* SSE/AVX state */
#define X86_IF_STRING  0x0100u
#define X86_IF_PRIV    0x0200u    /* faults unless CPL 0 (in long/protected mode) */
#define X86_IF_VEX     0x0400u
#define X86_IF_NATIVE  0x0800u    /* unprivileged, touches only its operands (+ flags): may run as is with operands renamed */
#define X86_IF_SEGOVR  0x1000u    /* explicit segment override that counts in this mode */

struct x86_insn {
    x86_exec_fn exec;          /* semantic function; never NULL (illegal encodings raise #UD) */
    uint64_t imm;              /* immediate, sign-extended to 64 bits where the instruction does so; REL: displacement */
    int64_t disp;              /* address displacement or moffs */
    uint16_t mnemonic;         /* ZydisMnemonic */
    uint16_t flags;            /* X86_IF_* */
    uint16_t flags_read;       /* RFLAGS bits 0..11 this instruction may read */
    uint16_t flags_written;    /* RFLAGS bits 0..11 it always writes (or leaves undefined) */
    uint16_t flags_maybe;      /* bits it writes only sometimes (shifts by CL, ...) */
    uint16_t sel;              /* far immediate selector; ENTER's second immediate; second imm of EXTRQ/INSERTQ */
    uint8_t length;
    uint8_t osz;               /* effective operand size 1, 2, 4, 8 of a general-purpose instruction */
    uint8_t asz;               /* address size 2, 4, 8 */
    uint8_t mode;              /* code size it was decoded for: 2, 4, 8 */
    uint8_t seg;               /* effective segment of the memory operand (after overrides) */
    uint8_t base, index, scale; /* X86_NOREG, X86_REG_RIP, or register number; scale 1, 2, 4, 8 */
    uint8_t cc;                /* condition code 0..15 of Jcc, SETcc, CMOVcc */
    uint8_t nops;              /* visible operands */
    x86_operand op[4];
    uint8_t vl;                /* vector length in bytes for VEX forms: 16, 32; 0 otherwise */
    uint8_t map;               /* opcode map: 0 one-byte, 1 0F, 2 0F38, 3 0F3A */
    uint8_t opcode;
    uint8_t modrm;
    uint8_t vvvv;              /* VEX.vvvv register number */
    uint8_t rex;               /* raw REX byte, 0 if none */
    uint8_t opcode_off, modrm_off, disp_off, disp_size, imm_off, imm_size;   /* byte offsets in `bytes`; *_off 0 = absent */
    uint8_t bytes[15];
    bool imm_signed;           /* the immediate's bytes are sign-extended */
};

/* Decode at most `avail` bytes (<= 15). Returns 0 and fills *in (illegal encodings: exec raises #UD, length is what was
 * consumed), or -1 when the instruction is cut off by `avail` < 15 bytes (the caller supplies more, from the next page). */
int x86_decode(const uint8_t *bytes, unsigned avail, unsigned code_size, x86_insn *in);
/* The same with a cache of forms (forms.c): what instructions are that differ in displacement and immediate alone. */
typedef struct x86_form {
    uint64_t key; /* the bytes of the form; 0: none */
    x86_insn in;  /* one of the form */
} x86_form;
#define X86_FORM_BITS 12
#define X86_FORMS (1 << X86_FORM_BITS)
int x86_decode_again(x86_form *forms, const uint8_t *bytes, unsigned avail, unsigned code_size, x86_insn *in);
/* Fit it to the CPU's model (offer.c): instructions the model lacks become illegal, TZCNT and LZCNT become BSF and BSR. Call it
 * once on what is cached for a CPU. */
void x86_offer(x86_cpu *cpu, x86_insn *in);
/* Intel-syntax text, for traces. */
void x86_format(const x86_insn *in, uint64_t rip, char *buf, size_t bytes);

static inline uint64_t x86_wrap_offset(const x86_insn *in, uint64_t offset)
{
    return in->asz == 8 ? offset : in->asz == 4 ? (uint32_t)offset : (uint16_t)offset;
}

/* Effective offset of the memory operand (before the segment base), truncated to the address size. */
static inline uint64_t x86_offset(const x86_cpu *cpu, const x86_insn *in)
{
    uint64_t a = (uint64_t)in->disp;
    if (in->base == X86_REG_RIP)
        a += cpu->rip + in->length;
    else if (in->base != X86_NOREG)
        a += cpu->gpr[in->base];
    if (in->index != X86_NOREG)
        a += cpu->gpr[in->index] * in->scale;
    return x86_wrap_offset(in, a);
}

/* ---- register access helpers ---- */
static inline uint64_t x86_get_gpr(const x86_cpu *cpu, unsigned reg, unsigned size)
{
    switch (size) {
    case 1: return reg >= 16 ? (uint8_t)(cpu->gpr[reg - 16] >> 8) : (uint8_t)cpu->gpr[reg];
    case 2: return (uint16_t)cpu->gpr[reg];
    case 4: return (uint32_t)cpu->gpr[reg];
    default: return cpu->gpr[reg];
    }
}
static inline void x86_set_gpr(x86_cpu *cpu, unsigned reg, unsigned size, uint64_t v)
{
    switch (size) {
    case 1:
        if (reg >= 16)
            cpu->gpr[reg - 16] = (cpu->gpr[reg - 16] & ~UINT64_C(0xff00)) | (uint64_t)(uint8_t)v << 8;
        else
            cpu->gpr[reg] = (cpu->gpr[reg] & ~UINT64_C(0xff)) | (uint8_t)v;
        break;
    case 2: cpu->gpr[reg] = (cpu->gpr[reg] & ~UINT64_C(0xffff)) | (uint16_t)v; break;
    case 4: cpu->gpr[reg] = (uint32_t)v; break;
    default: cpu->gpr[reg] = v; break;
    }
}

/* ---- operand access (operand.c): memory operands go through segment checks, paging, MMIO ---- */
uint64_t x86_get_op(x86_cpu *cpu, const x86_insn *in, unsigned i);
void x86_set_op(x86_cpu *cpu, const x86_insn *in, unsigned i, uint64_t v);
static inline uint64_t x86_op_linear(x86_cpu *cpu, const x86_insn *in, unsigned n, unsigned access)
{
    return x86_linear(cpu, in->seg, x86_offset(cpu, in), n, access);
}

/* In 64-bit mode misalignment comes before the canonical check of a stack reference: #GP, not #SS. */
static inline bool x86_is_misaligned_long(const x86_cpu *cpu, const x86_insn *in, unsigned align)
{
    uint64_t base = in->seg >= X86_FS ? cpu->seg[in->seg].base : 0;
    return cpu->code_size == 8 && (x86_offset(cpu, in) + base) & (align - 1);
}

/* ---- stack (stack.c): push/pop with the stack's width; RSP changes only after the access succeeded ---- */
void x86_push(x86_cpu *cpu, unsigned n, uint64_t v);
uint64_t x86_pop(x86_cpu *cpu, unsigned n);
uint64_t x86_peek(x86_cpu *cpu, unsigned n, unsigned depth_bytes);   /* without popping */
void x86_add_sp(x86_cpu *cpu, int64_t delta);                         /* by the stack's width */

/* ---- near branches: check the target against CS limit / canonical (#GP) and set next_rip ---- */
void x86_branch(x86_cpu *cpu, const x86_insn *in, uint64_t target);

/* Semantic functions by file; decode.c's table (ops.def) binds mnemonics to them. Each takes care of its own #UD and #NM
 * rules. Names are x86_op_<mnemonic or family>. */
#endif
