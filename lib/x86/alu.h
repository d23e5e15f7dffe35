/* alu.h - integer arithmetic with exact flags, by running the host's own instruction.
 *
 * Host and guest are both x86, so each operation is the instruction itself between a load of the guest's flags (where the
 * result or an undefined flag may depend on them) and LAHF/SETO. All functions have one shape: flags in and out through
 * *fl, operands and result zero-extended in 64 bits.
 */
#ifndef LIBVM_X86_ALU_H
#define LIBVM_X86_ALU_H

#include "x86/insn.h"

typedef uint64_t (*x86_alu_fn)(uint64_t *fl, uint64_t a, uint64_t b);
#define X86_SIZE_INDEX(n) ((n) == 1 ? 0 : (n) == 2 ? 1 : (n) == 4 ? 2 : 3)
#define X86_MASK(n) ((n) == 8 ? ~UINT64_C(0) : (UINT64_C(1) << ((n) * 8)) - 1)

/* AH = SF ZF AF PF CF, AL = OF, as LAHF and SETO leave them. */
static inline uint16_t x86_flags_to_ax(uint64_t fl)
{
    return (uint16_t)((fl & 0xff) << 8 | (fl >> 11 & 1));
}
static inline uint64_t x86_flags_from_ax(uint64_t fl, uint16_t ax)
{
    return (fl & ~UINT64_C(0x8ff)) | ax >> 8 | (uint64_t)(ax & 1) << 11;
}
#define X86_ASM_LOAD "addb $0x7f, %%al\n\tsahf\n\t"
#define X86_ASM_SAVE "\n\tlahf\n\tseto %%al"

#define X86_BINARY(name, text, n, T, load)                                                      \
    static inline uint64_t x86_##name##n(uint64_t *fl, uint64_t a, uint64_t b)                  \
    {                                                                                           \
        uint16_t ax = x86_flags_to_ax(*fl);                                                     \
        T x = (T)a;                                                                             \
        __asm__(load text " %2, %1" X86_ASM_SAVE : "+a"(ax), "+q"(x) : "q"((T)b) : "cc");       \
        *fl = x86_flags_from_ax(*fl, ax);                                                       \
        return x;                                                                               \
    }
#define X86_UNARY(name, text, n, T)                                                             \
    static inline uint64_t x86_##name##n(uint64_t *fl, uint64_t a, uint64_t b)                  \
    {                                                                                           \
        uint16_t ax = x86_flags_to_ax(*fl);                                                     \
        T x = (T)a;                                                                             \
        (void)b;                                                                                \
        __asm__(X86_ASM_LOAD text " %1" X86_ASM_SAVE : "+a"(ax), "+q"(x) : : "cc");             \
        *fl = x86_flags_from_ax(*fl, ax);                                                       \
        return x;                                                                               \
    }
#define X86_SHIFT(name, text, n, T)                                                             \
    static inline uint64_t x86_##name##n(uint64_t *fl, uint64_t a, uint64_t b)                  \
    {                                                                                           \
        uint16_t ax = x86_flags_to_ax(*fl);                                                     \
        T x = (T)a;                                                                             \
        __asm__(X86_ASM_LOAD text " %%cl, %1" X86_ASM_SAVE : "+a"(ax), "+q"(x) : "c"((uint8_t)b) : "cc"); \
        *fl = x86_flags_from_ax(*fl, ax);                                                       \
        return x;                                                                               \
    }
#define X86_BINARY_ALL(name, load)                       \
    X86_BINARY(name, #name "b", 1, uint8_t, load)        \
    X86_BINARY(name, #name "w", 2, uint16_t, load)       \
    X86_BINARY(name, #name "l", 4, uint32_t, load)       \
    X86_BINARY(name, #name "q", 8, uint64_t, load)
#define X86_UNARY_ALL(name)                              \
    X86_UNARY(name, #name "b", 1, uint8_t)               \
    X86_UNARY(name, #name "w", 2, uint16_t)              \
    X86_UNARY(name, #name "l", 4, uint32_t)              \
    X86_UNARY(name, #name "q", 8, uint64_t)
#define X86_SHIFT_ALL(name)                              \
    X86_SHIFT(name, #name "b", 1, uint8_t)               \
    X86_SHIFT(name, #name "w", 2, uint16_t)              \
    X86_SHIFT(name, #name "l", 4, uint32_t)              \
    X86_SHIFT(name, #name "q", 8, uint64_t)

X86_BINARY_ALL(add, "")
X86_BINARY_ALL(sub, "")
X86_BINARY_ALL(cmp, "")
X86_BINARY_ALL(and, "")
X86_BINARY_ALL(or, "")
X86_BINARY_ALL(xor, "")
X86_BINARY_ALL(test, "")
X86_BINARY_ALL(adc, X86_ASM_LOAD)
X86_BINARY_ALL(sbb, X86_ASM_LOAD)
X86_UNARY_ALL(inc)
X86_UNARY_ALL(dec)
X86_UNARY_ALL(neg)
X86_UNARY_ALL(not)
X86_SHIFT_ALL(shl)
X86_SHIFT_ALL(shr)
X86_SHIFT_ALL(sar)
X86_SHIFT_ALL(rol)
X86_SHIFT_ALL(ror)
X86_SHIFT_ALL(rcl)
X86_SHIFT_ALL(rcr)

#define X86_ALU_TABLE(name) { x86_##name##1, x86_##name##2, x86_##name##4, x86_##name##8 }

/* Condition codes 0..15 (SDM vol. 1, appendix B). */
static inline bool x86_cond(uint64_t fl, unsigned cc)
{
    bool r;
    switch (cc >> 1) {
    case 0: r = fl & X86_FL_OF; break;
    case 1: r = fl & X86_FL_CF; break;
    case 2: r = fl & X86_FL_ZF; break;
    case 3: r = fl & (X86_FL_CF | X86_FL_ZF); break;
    case 4: r = fl & X86_FL_SF; break;
    case 5: r = fl & X86_FL_PF; break;
    case 6: r = !(fl & X86_FL_SF) != !(fl & X86_FL_OF); break;
    default: r = (fl & X86_FL_ZF) || !(fl & X86_FL_SF) != !(fl & X86_FL_OF); break;
    }
    return r != (cc & 1);
}

/* operand.c: op[0] = fn(op[0], b), plain or locked, with flags. fn must not raise. */
void x86_modify(x86_cpu *cpu, const x86_insn *in, x86_alu_fn fn, uint64_t b);

#endif
