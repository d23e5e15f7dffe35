/* op_mul.c - multiplication, division, decimal adjustment. Flags, undefined ones too, are the host's. */
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

/* rDX:rAX op y, with flags in and out; the caller knows that a division cannot trap. */
#define WIDE(name, text)                                                                                            \
    static void name(uint64_t *fl, uint64_t *lo, uint64_t *hi, uint64_t y)                                          \
    {                                                                                                               \
        uint64_t ax = x86_flags_to_ax(*fl);                                                                         \
        __asm__(X86_ASM_LOAD "movq %[lo], %%rax\n\t" text "\n\tmovq %%rax, %[lo]" X86_ASM_SAVE                      \
                : "+a"(ax), [lo] "+r"(*lo), "+d"(*hi) : [y] "r"(y) : "cc");                                         \
        *fl = x86_flags_from_ax(*fl, (uint16_t)ax);                                                                 \
    }
#define WIDE_ALL(name)                  \
    WIDE(name##1, #name "b %b[y]")      \
    WIDE(name##2, #name "w %w[y]")      \
    WIDE(name##4, #name "l %k[y]")      \
    WIDE(name##8, #name "q %q[y]")
WIDE_ALL(mul)
WIDE_ALL(imul)
WIDE_ALL(div)
WIDE_ALL(idiv)
typedef void (*wide_fn)(uint64_t *fl, uint64_t *lo, uint64_t *hi, uint64_t y);
#define WIDE_TABLE(name) { name##1, name##2, name##4, name##8 }

static void wide(x86_cpu *cpu, const wide_fn fn[4], unsigned n, uint64_t y)
{
    uint64_t lo = cpu->gpr[X86_RAX], hi = cpu->gpr[X86_RDX];
    fn[X86_SIZE_INDEX(n)](&cpu->rflags, &lo, &hi, y);
    if (n == 1) {
        x86_set_gpr(cpu, X86_RAX, 2, lo);
        return;
    }
    x86_set_gpr(cpu, X86_RAX, n, lo);
    x86_set_gpr(cpu, X86_RDX, n, hi);
}

void x86_op_mul(x86_cpu *cpu, const x86_insn *in)
{
    static const wide_fn fn[4] = WIDE_TABLE(mul);
    wide(cpu, fn, in->op[0].size, x86_get_op(cpu, in, 0));
}

#define TWO_OPERAND(n, T, text)                                                                                     \
    static uint64_t imul2_##n(uint64_t *fl, uint64_t a, uint64_t b)                                                 \
    {                                                                                                               \
        uint16_t ax = x86_flags_to_ax(*fl);                                                                         \
        T x = (T)a;                                                                                                 \
        __asm__(X86_ASM_LOAD text " %2, %1" X86_ASM_SAVE : "+a"(ax), "+r"(x) : "r"((T)b) : "cc");                   \
        *fl = x86_flags_from_ax(*fl, ax);                                                                           \
        return x;                                                                                                   \
    }
TWO_OPERAND(2, uint16_t, "imulw")
TWO_OPERAND(4, uint32_t, "imull")
TWO_OPERAND(8, uint64_t, "imulq")

void x86_op_imul(x86_cpu *cpu, const x86_insn *in)
{
    static const wide_fn one[4] = WIDE_TABLE(imul);
    static const x86_alu_fn two[4] = { NULL, imul2_2, imul2_4, imul2_8 };
    const x86_operand *op = &in->op[0];
    if (in->nops == 1) {
        wide(cpu, one, op->size, x86_get_op(cpu, in, 0));
        return;
    }
    uint64_t a = x86_get_op(cpu, in, in->nops == 3 ? 1 : 0), b = x86_get_op(cpu, in, in->nops == 3 ? 2 : 1);
    x86_set_gpr(cpu, op->reg, op->size, two[X86_SIZE_INDEX(op->size)](&cpu->rflags, a, b));
}

void x86_op_div(x86_cpu *cpu, const x86_insn *in)
{
    static const wide_fn fn[4] = WIDE_TABLE(div);
    const unsigned n = in->op[0].size;
    uint64_t y = x86_get_op(cpu, in, 0), lo = cpu->gpr[X86_RAX];
    /* The quotient overflows exactly when the high half is not below the divisor. */
    uint64_t hi = n == 1 ? (uint8_t)(lo >> 8) : x86_get_gpr(cpu, X86_RDX, n);
    if (hi >= y)
        x86_raise(cpu, X86_DE);
    wide(cpu, fn, n, y);
}

static bool idiv_fits(x86_cpu *cpu, unsigned n, int64_t y)
{
    __int128 x;
    switch (n) {
    case 1: x = (int16_t)cpu->gpr[X86_RAX]; break;
    case 2: x = (int32_t)((uint32_t)cpu->gpr[X86_RDX] << 16 | (uint16_t)cpu->gpr[X86_RAX]); break;
    case 4: x = (int64_t)(cpu->gpr[X86_RDX] << 32 | (uint32_t)cpu->gpr[X86_RAX]); break;
    default: x = (__int128)((unsigned __int128)cpu->gpr[X86_RDX] << 64 | cpu->gpr[X86_RAX]); break;
    }
    if (y == 0)
        return false;
    if (y == -1)                                             /* -2^127 / -1 must not be computed */
        return x > -((__int128)1 << (n * 8 - 1)) && x <= ((__int128)1 << (n * 8 - 1));
    __int128 q = x / y;
    return q >= -((__int128)1 << (n * 8 - 1)) && q < ((__int128)1 << (n * 8 - 1));
}

void x86_op_idiv(x86_cpu *cpu, const x86_insn *in)
{
    static const wide_fn fn[4] = WIDE_TABLE(idiv);
    const unsigned n = in->op[0].size;
    uint64_t y = x86_get_op(cpu, in, 0);
    int64_t s = n == 1 ? (int8_t)y : n == 2 ? (int16_t)y : n == 4 ? (int32_t)y : (int64_t)y;
    if (!idiv_fits(cpu, n, s))
        x86_raise(cpu, X86_DE);
    wide(cpu, fn, n, y);
}

void x86_op_mulx(x86_cpu *cpu, const x86_insn *in)
{
    const unsigned n = in->op[0].size;
    uint64_t y = x86_get_op(cpu, in, 2);
    if (!x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
    unsigned __int128 p = (unsigned __int128)x86_get_gpr(cpu, X86_RDX, n) * y;
    x86_set_gpr(cpu, in->op[1].reg, n, (uint64_t)p);
    x86_set_gpr(cpu, in->op[0].reg, n, (uint64_t)(p >> (n * 8)));   /* the high half wins when both are one register */
}

/* ---- decimal adjustment (SDM vol. 2, pseudo-code of each instruction) ---- */

static void set_arith(x86_cpu *cpu, uint64_t set)
{
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | set;
}

/* SF, ZF, PF of a byte; the rest zero. */
static uint64_t byte_flags(uint8_t v)
{
    return (v & 0x80 ? X86_FL_SF : 0) | (v ? 0 : X86_FL_ZF) | (__builtin_parity(v) ? 0 : X86_FL_PF);
}

/* Undefined in the manual; CPUs show the signed overflow of old +- adjustment = al. */
static uint64_t overflow(uint8_t old, uint8_t al, bool is_subtract)
{
    uint8_t adjustment = is_subtract ? old - al : al - old;
    return ((is_subtract ? (old ^ adjustment) & (old ^ al) : ~(old ^ adjustment) & (old ^ al)) & 0x80) ? X86_FL_OF : 0;
}

static void decimal(x86_cpu *cpu, bool is_subtract)
{
    const uint8_t old = (uint8_t)cpu->gpr[X86_RAX];
    const bool cf = cpu->rflags & X86_FL_CF;
    uint64_t f = 0;
    uint8_t al = old;
    if ((old & 15) > 9 || (cpu->rflags & X86_FL_AF)) {
        al = is_subtract ? al - 6 : al + 6;
        f |= X86_FL_AF;
        if (cf || (is_subtract ? old < 6 : old > 0xf9))
            f |= X86_FL_CF;
    }
    if (old > 0x99 || cf) {
        al = is_subtract ? al - 0x60 : al + 0x60;
        f |= X86_FL_CF;
    }
    x86_set_gpr(cpu, X86_RAX, 1, al);
    set_arith(cpu, f | byte_flags(al) | overflow(old, al, is_subtract));
}

void x86_op_daa(x86_cpu *cpu, const x86_insn *in) { (void)in; decimal(cpu, false); }
void x86_op_das(x86_cpu *cpu, const x86_insn *in) { (void)in; decimal(cpu, true); }

static void ascii(x86_cpu *cpu, int sign)
{
    uint16_t ax = (uint16_t)cpu->gpr[X86_RAX];
    const uint16_t old = ax;
    uint64_t f = 0;
    if ((ax & 15) > 9 || (cpu->rflags & X86_FL_AF)) {
        ax = (uint16_t)(ax + sign * 0x106);
        f = X86_FL_AF | X86_FL_CF;
    }
    /* SF, ZF, PF and OF are undefined; CPUs take them from the 16-bit sum before AL's upper half is cleared. */
    set_arith(cpu, f | (byte_flags((uint8_t)ax) & X86_FL_PF) | (ax >> 15 ? X86_FL_SF : 0) | (ax ? 0 : X86_FL_ZF) |
              overflow((uint8_t)(old >> 8), (uint8_t)(ax >> 8), sign < 0));
    x86_set_gpr(cpu, X86_RAX, 2, ax & 0xff0f);
}

void x86_op_aaa(x86_cpu *cpu, const x86_insn *in) { (void)in; ascii(cpu, 1); }
void x86_op_aas(x86_cpu *cpu, const x86_insn *in) { (void)in; ascii(cpu, -1); }

void x86_op_aam(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t al = (uint8_t)cpu->gpr[X86_RAX], base = (uint8_t)in->imm;
    if (!base)
        x86_raise(cpu, X86_DE);
    x86_set_gpr(cpu, X86_RAX, 2, (uint64_t)(al / base) << 8 | al % base);
    set_arith(cpu, byte_flags(al % base));
}

void x86_op_aad(x86_cpu *cpu, const x86_insn *in)
{
    uint16_t ax = (uint16_t)cpu->gpr[X86_RAX];
    uint8_t product = (uint8_t)((ax >> 8) * (uint8_t)in->imm);
    uint64_t fl = cpu->rflags;
    uint8_t al = (uint8_t)x86_add1(&fl, (uint8_t)ax, product);      /* CPUs leave the addition's flags */
    x86_set_gpr(cpu, X86_RAX, 2, al);
    cpu->rflags = fl;
}
