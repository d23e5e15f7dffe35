/* specialise.c - functions made for the most frequent instruction forms, one per size and operand kinds.
 *
 * Each does exactly what the generic function of the same mnemonic does; the generic one stays the definition and serves
 * every form not listed here (LOCK, far and segment operands, 16-bit branches, ...). The code size is part of what an
 * instruction was decoded for, so forms for 64-bit mode need not look at the CPU's.
 */
#include <Zydis/Mnemonic.h>
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

enum form { RR, RI, RM, MR, MI, FORMS };
typedef x86_exec_fn form_table[FORMS][4];

#define HANDLER(name) static void name(x86_cpu *cpu, const x86_insn *in)
#define REG(i, n) x86_get_gpr(cpu, in->op[i].reg, n)
#define SET(i, n, v) x86_set_gpr(cpu, in->op[i].reg, n, v)
#define LOAD(n) x86_load(cpu, x86_op_la(cpu, in, n, X86_READ), n)

/* ---- two-operand arithmetic ---- */

#define ARITH_SIZE(op, n)                                                                          \
    HANDLER(op##_rr##n) { SET(0, n, x86_##op##n(&cpu->rflags, REG(0, n), REG(1, n))); }            \
    HANDLER(op##_ri##n) { SET(0, n, x86_##op##n(&cpu->rflags, REG(0, n), in->imm)); }              \
    HANDLER(op##_rm##n) { uint64_t b = LOAD(n); SET(0, n, x86_##op##n(&cpu->rflags, REG(0, n), b)); } \
    static inline void op##_to_memory##n(x86_cpu *cpu, const x86_insn *in, uint64_t b)             \
    {                                                                                              \
        x86_rmw m;                                                                                 \
        uint64_t fl = cpu->rflags;                                                                 \
        x86_rmw_open(cpu, &m, x86_op_la(cpu, in, n, X86_READ | X86_WRITE), n);                     \
        uint64_t v = x86_##op##n(&fl, m.value, b);                                                 \
        x86_rmw_close(cpu, &m, n, v);                                                              \
        cpu->rflags = fl;                                                                          \
    }                                                                                              \
    HANDLER(op##_mr##n) { op##_to_memory##n(cpu, in, REG(1, n)); }                                 \
    HANDLER(op##_mi##n) { op##_to_memory##n(cpu, in, in->imm); }
#define COMPARE_SIZE(op, n)                                                                        \
    HANDLER(op##_rr##n) { x86_##op##n(&cpu->rflags, REG(0, n), REG(1, n)); }                       \
    HANDLER(op##_ri##n) { x86_##op##n(&cpu->rflags, REG(0, n), in->imm); }                         \
    HANDLER(op##_rm##n) { uint64_t b = LOAD(n); x86_##op##n(&cpu->rflags, REG(0, n), b); }         \
    HANDLER(op##_mr##n) { uint64_t a = LOAD(n); x86_##op##n(&cpu->rflags, a, REG(1, n)); }         \
    HANDLER(op##_mi##n) { uint64_t a = LOAD(n); x86_##op##n(&cpu->rflags, a, in->imm); }
#define SIZES(op, kind) kind(op, 1) kind(op, 2) kind(op, 4) kind(op, 8)
#define TABLE(op)                                                                                  \
    static const form_table op##_forms = {                                                         \
        { op##_rr1, op##_rr2, op##_rr4, op##_rr8 }, { op##_ri1, op##_ri2, op##_ri4, op##_ri8 },    \
        { op##_rm1, op##_rm2, op##_rm4, op##_rm8 }, { op##_mr1, op##_mr2, op##_mr4, op##_mr8 },    \
        { op##_mi1, op##_mi2, op##_mi4, op##_mi8 } };

SIZES(add, ARITH_SIZE) TABLE(add)
SIZES(sub, ARITH_SIZE) TABLE(sub)
SIZES(and, ARITH_SIZE) TABLE(and)
SIZES(or, ARITH_SIZE) TABLE(or)
SIZES(xor, ARITH_SIZE) TABLE(xor)
SIZES(adc, ARITH_SIZE) TABLE(adc)
SIZES(sbb, ARITH_SIZE) TABLE(sbb)
SIZES(cmp, COMPARE_SIZE) TABLE(cmp)
SIZES(test, COMPARE_SIZE) TABLE(test)

#define MOV_SIZE(op, n)                                                                            \
    HANDLER(op##_rr##n) { SET(0, n, REG(1, n)); }                                                  \
    HANDLER(op##_ri##n) { SET(0, n, in->imm); }                                                    \
    HANDLER(op##_rm##n) { SET(0, n, LOAD(n)); }                                                    \
    HANDLER(op##_mr##n) { x86_store(cpu, x86_op_la(cpu, in, n, X86_WRITE), n, REG(1, n)); }        \
    HANDLER(op##_mi##n) { x86_store(cpu, x86_op_la(cpu, in, n, X86_WRITE), n, in->imm); }
SIZES(mov, MOV_SIZE) TABLE(mov)

/* ---- one register: INC, DEC, NEG, NOT; shifts by an immediate ---- */

#define UNARY_SIZE(op, n) HANDLER(op##_r##n) { SET(0, n, x86_##op##n(&cpu->rflags, REG(0, n), 0)); }
#define SHIFT_SIZE(op, n) HANDLER(op##_r##n) { SET(0, n, x86_##op##n(&cpu->rflags, REG(0, n), in->imm)); }
#define REG_TABLE(op) static const x86_exec_fn op##_regs[4] = { op##_r1, op##_r2, op##_r4, op##_r8 };
SIZES(inc, UNARY_SIZE) REG_TABLE(inc)
SIZES(dec, UNARY_SIZE) REG_TABLE(dec)
SIZES(neg, UNARY_SIZE) REG_TABLE(neg)
SIZES(not, UNARY_SIZE) REG_TABLE(not)
SIZES(shl, SHIFT_SIZE) REG_TABLE(shl)
SIZES(shr, SHIFT_SIZE) REG_TABLE(shr)
SIZES(sar, SHIFT_SIZE) REG_TABLE(sar)

/* ---- extending moves ---- */

#define EXTEND(name, from, to, T)                                                                  \
    HANDLER(name##_rr_##from##_##to) { SET(0, to, (uint64_t)(T)REG(1, from)); }                    \
    HANDLER(name##_rm_##from##_##to) { SET(0, to, (uint64_t)(T)LOAD(from)); }
EXTEND(movzx, 1, 4, uint8_t)
EXTEND(movzx, 1, 8, uint8_t)
EXTEND(movzx, 2, 4, uint16_t)
EXTEND(movzx, 2, 8, uint16_t)
EXTEND(movsx, 1, 4, int8_t)
EXTEND(movsx, 1, 8, int8_t)
EXTEND(movsx, 2, 4, int16_t)
EXTEND(movsx, 2, 8, int16_t)
EXTEND(movsx, 4, 8, int32_t)

static x86_exec_fn extending(const x86_insn *in, bool is_signed)
{
    static const x86_exec_fn table[2][3][2][2] = {           /* signed, source 1/2/4, destination 4/8, register/memory */
        { { { movzx_rr_1_4, movzx_rm_1_4 }, { movzx_rr_1_8, movzx_rm_1_8 } },
          { { movzx_rr_2_4, movzx_rm_2_4 }, { movzx_rr_2_8, movzx_rm_2_8 } }, { { NULL, NULL }, { NULL, NULL } } },
        { { { movsx_rr_1_4, movsx_rm_1_4 }, { movsx_rr_1_8, movsx_rm_1_8 } },
          { { movsx_rr_2_4, movsx_rm_2_4 }, { movsx_rr_2_8, movsx_rm_2_8 } }, { { NULL, NULL }, { movsx_rr_4_8, movsx_rm_4_8 } } } };
    if (in->op[0].size < 4 || in->op[1].size > 4)
        return NULL;
    return table[is_signed][X86_SIZE_INDEX(in->op[1].size)][in->op[0].size == 8][in->op[1].kind == X86_OP_MEM];
}

/* ---- LEA, conditions ---- */

HANDLER(lea4) { SET(0, 4, x86_offset(cpu, in)); }
HANDLER(lea8) { SET(0, 8, x86_offset(cpu, in)); }

#define CONDITION(cc)                                                                              \
    HANDLER(jcc_##cc) { if (x86_cond(cpu->rflags, cc)) x86_branch(cpu, in, cpu->next_rip + in->imm); } \
    HANDLER(jcc64_##cc)                                                                            \
    {                                                                                              \
        if (x86_cond(cpu->rflags, cc)) {                                                           \
            uint64_t target = cpu->next_rip + in->imm;                                             \
            if (X86_UNLIKELY(!x86_canonical(target)))                                              \
                x86_raise_error(cpu, X86_GP, 0);                                                   \
            cpu->next_rip = target;                                                                \
        }                                                                                          \
    }                                                                                              \
    HANDLER(set_##cc) { SET(0, 1, x86_cond(cpu->rflags, cc)); }                                    \
    HANDLER(cmov4_##cc) { SET(0, 4, x86_cond(cpu->rflags, cc) ? REG(1, 4) : REG(0, 4)); }          \
    HANDLER(cmov8_##cc) { if (x86_cond(cpu->rflags, cc)) SET(0, 8, REG(1, 8)); }
CONDITION(0) CONDITION(1) CONDITION(2) CONDITION(3) CONDITION(4) CONDITION(5) CONDITION(6) CONDITION(7)
CONDITION(8) CONDITION(9) CONDITION(10) CONDITION(11) CONDITION(12) CONDITION(13) CONDITION(14) CONDITION(15)
#define BY_CC(name)                                                                                \
    static const x86_exec_fn name##_by_cc[16] = { name##_0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, \
        name##_7, name##_8, name##_9, name##_10, name##_11, name##_12, name##_13, name##_14, name##_15 };
BY_CC(jcc) BY_CC(jcc64) BY_CC(set) BY_CC(cmov4) BY_CC(cmov8)

/* ---- 64-bit stack and near branches ---- */

static inline void push64(x86_cpu *cpu, uint64_t v)
{
    uint64_t sp = cpu->gpr[X86_RSP] - 8;
    x86_store(cpu, x86_linear_fast(cpu, X86_SS, sp, 8, X86_WRITE), 8, v);
    cpu->gpr[X86_RSP] = sp;
}
static inline uint64_t top64(x86_cpu *cpu)
{
    return x86_load(cpu, x86_linear_fast(cpu, X86_SS, cpu->gpr[X86_RSP], 8, X86_READ), 8);
}
static inline uint64_t checked(x86_cpu *cpu, uint64_t target)
{
    if (X86_UNLIKELY(!x86_canonical(target)))
        x86_raise_error(cpu, X86_GP, 0);
    return target;
}

HANDLER(push64_r) { push64(cpu, cpu->gpr[in->op[0].reg]); }
HANDLER(push64_i) { push64(cpu, in->imm); }
HANDLER(pop64_r)
{
    uint64_t v = top64(cpu);
    cpu->gpr[X86_RSP] += 8;
    cpu->gpr[in->op[0].reg] = v;
}
HANDLER(jmp64_rel) { cpu->next_rip = checked(cpu, cpu->next_rip + in->imm); }
HANDLER(jmp64_r) { cpu->next_rip = checked(cpu, cpu->gpr[in->op[0].reg]); }
HANDLER(call64_rel)
{
    uint64_t target = checked(cpu, cpu->next_rip + in->imm);
    push64(cpu, cpu->next_rip);
    cpu->next_rip = target;
}
HANDLER(call64_r)
{
    uint64_t target = checked(cpu, cpu->gpr[in->op[0].reg]);
    push64(cpu, cpu->next_rip);
    cpu->next_rip = target;
}
HANDLER(ret64)
{
    uint64_t target = checked(cpu, top64(cpu));
    cpu->gpr[X86_RSP] += 8 + (in->nops ? (uint16_t)in->imm : 0);
    cpu->next_rip = target;
}

/* ---- choosing ---- */

static int form_of(const x86_insn *in)
{
    unsigned a = in->op[0].kind, b = in->op[1].kind;
    bool a_is_memory = a == X86_OP_MEM || a == X86_OP_MOFFS, b_is_memory = b == X86_OP_MEM || b == X86_OP_MOFFS;
    if (in->nops != 2)
        return -1;
    if (a == X86_OP_GPR)
        return b == X86_OP_GPR ? RR : b == X86_OP_IMM ? RI : b_is_memory ? RM : -1;
    if (a_is_memory)
        return b == X86_OP_GPR ? MR : b == X86_OP_IMM ? MI : -1;
    return -1;
}

static x86_exec_fn by_form(const x86_insn *in, const form_table forms)
{
    int form = form_of(in);
    return form < 0 ? NULL : forms[form][X86_SIZE_INDEX(in->op[0].size)];
}

static x86_exec_fn by_register(const x86_insn *in, const x86_exec_fn regs[4])
{
    bool is_plain = in->op[0].kind == X86_OP_GPR && (in->nops == 1 || in->op[1].kind == X86_OP_IMM);
    return is_plain ? regs[X86_SIZE_INDEX(in->op[0].size)] : NULL;
}

static x86_exec_fn long_form(const x86_insn *in)
{
    const unsigned kind = in->op[0].kind;
    if (in->mode != 8 || in->osz != 8)
        return NULL;
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_PUSH: return kind == X86_OP_GPR ? push64_r : kind == X86_OP_IMM ? push64_i : NULL;
    case ZYDIS_MNEMONIC_POP: return kind == X86_OP_GPR ? pop64_r : NULL;
    case ZYDIS_MNEMONIC_JMP: return kind == X86_OP_REL ? jmp64_rel : kind == X86_OP_GPR ? jmp64_r : NULL;
    case ZYDIS_MNEMONIC_CALL: return kind == X86_OP_REL ? call64_rel : kind == X86_OP_GPR ? call64_r : NULL;
    case ZYDIS_MNEMONIC_RET: return in->exec == x86_op_ret ? ret64 : NULL;
    default: return NULL;
    }
}

static x86_exec_fn conditional(const x86_insn *in)
{
    if (in->exec == x86_op_jcc)
        return in->mode == 8 && in->osz == 8 ? jcc64_by_cc[in->cc] : jcc_by_cc[in->cc];
    if (in->exec == x86_op_setcc)
        return in->op[0].kind == X86_OP_GPR ? set_by_cc[in->cc] : NULL;
    if (in->exec == x86_op_cmov && in->op[1].kind == X86_OP_GPR)
        return in->op[0].size == 8 ? cmov8_by_cc[in->cc] : in->op[0].size == 4 ? cmov4_by_cc[in->cc] : NULL;
    return NULL;
}

static x86_exec_fn special(const x86_insn *in)
{
    if (in->flags & X86_IF_LOCK)
        return NULL;
    switch (in->mnemonic) {
#define FORM(M, op) case ZYDIS_MNEMONIC_##M: return in->exec == x86_op_##op ? by_form(in, op##_forms) : NULL;
    FORM(ADD, add) FORM(SUB, sub) FORM(AND, and) FORM(OR, or) FORM(XOR, xor) FORM(ADC, adc) FORM(SBB, sbb)
    FORM(CMP, cmp) FORM(TEST, test) FORM(MOV, mov)
#undef FORM
#define ONE(M, op) case ZYDIS_MNEMONIC_##M: return by_register(in, op##_regs);
    ONE(INC, inc) ONE(DEC, dec) ONE(NEG, neg) ONE(NOT, not) ONE(SHL, shl) ONE(SHR, shr) ONE(SAR, sar)
#undef ONE
    case ZYDIS_MNEMONIC_MOVZX: return extending(in, false);
    case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVSXD: return extending(in, true);
    case ZYDIS_MNEMONIC_LEA: return in->op[0].size == 8 ? lea8 : in->op[0].size == 4 ? lea4 : NULL;
    case ZYDIS_MNEMONIC_PUSH: case ZYDIS_MNEMONIC_POP: case ZYDIS_MNEMONIC_JMP: case ZYDIS_MNEMONIC_CALL: case ZYDIS_MNEMONIC_RET:
        return long_form(in);
    default: return conditional(in);
    }
}

void x86_specialise(x86_insn *in)
{
    x86_exec_fn fn = special(in);
    if (fn)
        in->exec = fn;
}
