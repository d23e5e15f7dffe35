/* op_alu.c - ADD to TEST, INC, DEC, NEG, NOT, shifts and rotates: the generic functions named in ops_int.def. */
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

#define MODIFY(name, operand)                                              \
    void x86_op_##name(x86_cpu *cpu, const x86_insn *in)                   \
    {                                                                      \
        static const x86_alu_fn fn[4] = X86_ALU_TABLE(name);               \
        x86_modify(cpu, in, fn[X86_SIZE_INDEX(in->op[0].size)], operand);  \
    }
#define COMPARE(name)                                                      \
    void x86_op_##name(x86_cpu *cpu, const x86_insn *in)                   \
    {                                                                      \
        static const x86_alu_fn fn[4] = X86_ALU_TABLE(name);               \
        uint64_t a = x86_get_op(cpu, in, 0), b = x86_get_op(cpu, in, 1);   \
        fn[X86_SIZE_INDEX(in->op[0].size)](&cpu->rflags, a, b);            \
    }

MODIFY(add, x86_get_op(cpu, in, 1))
MODIFY(sub, x86_get_op(cpu, in, 1))
MODIFY(and, x86_get_op(cpu, in, 1))
MODIFY(or, x86_get_op(cpu, in, 1))
MODIFY(xor, x86_get_op(cpu, in, 1))
MODIFY(adc, x86_get_op(cpu, in, 1))
MODIFY(sbb, x86_get_op(cpu, in, 1))
COMPARE(cmp)
COMPARE(test)
MODIFY(inc, 0)
MODIFY(dec, 0)
MODIFY(neg, 0)
MODIFY(not, 0)
MODIFY(shl, x86_get_op(cpu, in, 1))
MODIFY(shr, x86_get_op(cpu, in, 1))
MODIFY(sar, x86_get_op(cpu, in, 1))
MODIFY(rol, x86_get_op(cpu, in, 1))
MODIFY(ror, x86_get_op(cpu, in, 1))
MODIFY(rcl, x86_get_op(cpu, in, 1))
MODIFY(rcr, x86_get_op(cpu, in, 1))

/* SHLD, SHRD: the second source and the count travel together. 16-bit counts above 16 are undefined: the host decides. */
#define DOUBLE_SHIFT(name, text, n, T)                                                                              \
    static uint64_t name##n(uint64_t *fl, uint64_t a, uint64_t b, uint8_t count)                                    \
    {                                                                                                               \
        uint16_t ax = x86_flags_to_ax(*fl);                                                                         \
        T x = (T)a;                                                                                                 \
        __asm__(X86_ASM_LOAD text " %%cl, %2, %1" X86_ASM_SAVE : "+a"(ax), "+r"(x) : "r"((T)b), "c"(count) : "cc"); \
        *fl = x86_flags_from_ax(*fl, ax);                                                                           \
        return x;                                                                                                   \
    }
DOUBLE_SHIFT(shld, "shldw", 2, uint16_t)
DOUBLE_SHIFT(shld, "shldl", 4, uint32_t)
DOUBLE_SHIFT(shld, "shldq", 8, uint64_t)
DOUBLE_SHIFT(shrd, "shrdw", 2, uint16_t)
DOUBLE_SHIFT(shrd, "shrdl", 4, uint32_t)
DOUBLE_SHIFT(shrd, "shrdq", 8, uint64_t)

typedef uint64_t (*double_shift_fn)(uint64_t *fl, uint64_t a, uint64_t b, uint8_t count);

static void double_shift(x86_cpu *cpu, const x86_insn *in, const double_shift_fn fn[4])
{
    const x86_operand *op = &in->op[0];
    const double_shift_fn f = fn[X86_SIZE_INDEX(op->size)];
    uint64_t b = x86_get_op(cpu, in, 1), fl = cpu->rflags;
    uint8_t count = (uint8_t)x86_get_op(cpu, in, 2);
    if (op->kind == X86_OP_GPR) {
        x86_set_gpr(cpu, op->reg, op->size, f(&fl, x86_get_gpr(cpu, op->reg, op->size), b, count));
    } else {
        x86_rmw m;
        x86_rmw_open(cpu, &m, x86_op_la(cpu, in, op->size, X86_READ | X86_WRITE), op->size);
        uint64_t v = f(&fl, m.value, b, count);
        x86_rmw_close(cpu, &m, op->size, v);
    }
    cpu->rflags = fl;
}

void x86_op_shld(x86_cpu *cpu, const x86_insn *in)
{
    static const double_shift_fn fn[4] = { NULL, shld2, shld4, shld8 };
    double_shift(cpu, in, fn);
}

void x86_op_shrd(x86_cpu *cpu, const x86_insn *in)
{
    static const double_shift_fn fn[4] = { NULL, shrd2, shrd4, shrd8 };
    double_shift(cpu, in, fn);
}
