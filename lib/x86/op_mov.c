/* op_mov.c - data movement: MOV and its relatives, exchanges, stack instructions, flag transfers. */
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

void x86_op_mov(x86_cpu *cpu, const x86_insn *in)
{
    x86_set_op(cpu, in, 0, x86_get_op(cpu, in, 1));
}

/* MOVZX, and MOVNTI, whose only difference from MOV is a caching hint. */
void x86_op_movzx(x86_cpu *cpu, const x86_insn *in)
{
    x86_set_op(cpu, in, 0, x86_get_op(cpu, in, 1));
}

void x86_op_movsx(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v = x86_get_op(cpu, in, 1);
    switch (in->op[1].size) {
    case 1: v = (uint64_t)(int8_t)v; break;
    case 2: v = (uint64_t)(int16_t)v; break;
    default: v = (uint64_t)(int32_t)v; break;
    }
    x86_set_op(cpu, in, 0, v);
}

void x86_op_lea(x86_cpu *cpu, const x86_insn *in)
{
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, x86_offset(cpu, in));
}

/* XCHG with memory is locked with or without the prefix. Either operand may be the memory one. */
void x86_op_xchg(x86_cpu *cpu, const x86_insn *in)
{
    unsigned m = in->op[1].kind == X86_OP_MEM;
    const x86_operand *op = &in->op[!m];
    const unsigned n = op->size;
    uint64_t b = x86_get_gpr(cpu, op->reg, n), a;
    if (in->op[m].kind == X86_OP_GPR) {
        a = x86_get_gpr(cpu, in->op[m].reg, n);
        x86_set_gpr(cpu, in->op[m].reg, n, b);
    } else {
        x86_locked l;
        x86_locked_open(cpu, &l, x86_op_la(cpu, in, n, X86_READ | X86_WRITE), n);
        if (!l.host) {
            a = l.value[0];
            x86_locked_close(cpu, &l, n, &b);
        } else {
            switch (n) {
            case 1: a = __atomic_exchange_n(l.host, (uint8_t)b, __ATOMIC_SEQ_CST); break;
            case 2: a = __atomic_exchange_n((uint16_t *)(void *)l.host, (uint16_t)b, __ATOMIC_SEQ_CST); break;
            case 4: a = __atomic_exchange_n((uint32_t *)(void *)l.host, (uint32_t)b, __ATOMIC_SEQ_CST); break;
            default: a = __atomic_exchange_n((uint64_t *)(void *)l.host, b, __ATOMIC_SEQ_CST); break;
            }
        }
    }
    x86_set_gpr(cpu, op->reg, n, a);
}

/* The source is read whatever the condition; a 32-bit destination is zero-extended whatever the condition. */
void x86_op_cmov(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v = x86_get_op(cpu, in, 1);
    if (!x86_cond(cpu->rflags, in->cc))
        v = x86_get_gpr(cpu, in->op[0].reg, in->op[0].size);
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, v);
}

void x86_op_setcc(x86_cpu *cpu, const x86_insn *in)
{
    x86_set_op(cpu, in, 0, x86_cond(cpu->rflags, in->cc));
}

/* A 16-bit BSWAP is undefined; hosts clear the register's low half. */
void x86_op_bswap(x86_cpu *cpu, const x86_insn *in)
{
    const x86_operand *op = &in->op[0];
    uint64_t v = x86_get_gpr(cpu, op->reg, op->size);
    x86_set_gpr(cpu, op->reg, op->size, op->size == 8 ? __builtin_bswap64(v) : op->size == 4 ? __builtin_bswap32((uint32_t)v) : 0);
}

void x86_op_movbe(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v = x86_get_op(cpu, in, 1);
    switch (in->op[0].size) {
    case 2: v = __builtin_bswap16((uint16_t)v); break;
    case 4: v = __builtin_bswap32((uint32_t)v); break;
    default: v = __builtin_bswap64(v); break;
    }
    x86_set_op(cpu, in, 0, v);
}

/* CBW, CWDE, CDQE: rAX from its lower half. */
void x86_op_cbw(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v = cpu->gpr[X86_RAX];
    x86_set_gpr(cpu, X86_RAX, in->osz, in->osz == 2 ? (uint64_t)(int8_t)v : in->osz == 4 ? (uint64_t)(int16_t)v : (uint64_t)(int32_t)v);
}

/* CWD, CDQ, CQO: rDX from the sign of rAX. */
void x86_op_cwd(x86_cpu *cpu, const x86_insn *in)
{
    bool is_negative = cpu->gpr[X86_RAX] >> (in->osz * 8 - 1) & 1;
    x86_set_gpr(cpu, X86_RDX, in->osz, is_negative ? ~UINT64_C(0) : 0);
}

void x86_op_xlat(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t off = x86_wrap_offset(in, cpu->gpr[X86_RBX] + (uint8_t)cpu->gpr[X86_RAX]);
    x86_set_gpr(cpu, X86_RAX, 1, x86_load(cpu, x86_linear_fast(cpu, in->seg, off, 1, X86_READ), 1));
}

void x86_op_salc(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_set_gpr(cpu, X86_RAX, 1, cpu->rflags & X86_FL_CF ? 0xff : 0);
}

void x86_op_lahf(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_set_gpr(cpu, 16 + X86_RAX, 1, (cpu->rflags & 0xd5) | 2);
}

void x86_op_sahf(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    cpu->rflags = (cpu->rflags & ~UINT64_C(0xff)) | (cpu->gpr[X86_RAX] >> 8 & 0xd5) | 2;
}

void x86_op_clc(x86_cpu *cpu, const x86_insn *in) { (void)in; cpu->rflags &= ~(uint64_t)X86_FL_CF; }
void x86_op_stc(x86_cpu *cpu, const x86_insn *in) { (void)in; cpu->rflags |= X86_FL_CF; }
void x86_op_cmc(x86_cpu *cpu, const x86_insn *in) { (void)in; cpu->rflags ^= X86_FL_CF; }
void x86_op_cld(x86_cpu *cpu, const x86_insn *in) { (void)in; cpu->rflags &= ~(uint64_t)X86_FL_DF; }
void x86_op_std(x86_cpu *cpu, const x86_insn *in) { (void)in; cpu->rflags |= X86_FL_DF; }

/* ---- stack ---- */

void x86_op_push(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v = x86_get_op(cpu, in, 0);
    x86_push(cpu, in->osz, v);
}

/* POP computes a memory operand's address with RSP already incremented, and POP rSP keeps the popped value. */
void x86_op_pop(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v = x86_peek(cpu, in->osz, 0);
    if (in->op[0].kind == X86_OP_GPR) {
        x86_add_sp(cpu, in->osz);
        x86_set_gpr(cpu, in->op[0].reg, in->osz, v);
        return;
    }
    uint64_t old = cpu->gpr[X86_RSP];
    x86_add_sp(cpu, in->osz);
    uint64_t off = x86_offset(cpu, in);
    cpu->gpr[X86_RSP] = old;
    x86_store(cpu, x86_linear_fast(cpu, in->seg, off, in->osz, X86_WRITE), in->osz, v);
    x86_add_sp(cpu, in->osz);
}

/* PUSHA: all eight slots are known to be writable before the first is written. */
void x86_op_pusha(x86_cpu *cpu, const x86_insn *in)
{
    const unsigned n = in->osz;
    uint64_t mask = cpu->stack_size == 4 ? UINT32_MAX : 0xffff, la[8];
    for (unsigned i = 0; i < 8; i++) {
        la[i] = x86_linear_fast(cpu, X86_SS, (cpu->gpr[X86_RSP] - (i + 1) * n) & mask, n, X86_WRITE);
        x86_probe_write(cpu, la[i], n);
    }
    for (unsigned i = 0; i < 8; i++)
        x86_store(cpu, la[i], n, cpu->gpr[i]);
    x86_add_sp(cpu, -(int64_t)(8 * n));
}

void x86_op_popa(x86_cpu *cpu, const x86_insn *in)
{
    const unsigned n = in->osz;
    uint64_t v[8];
    for (unsigned i = 0; i < 8; i++)
        v[i] = x86_peek(cpu, n, i * n);
    x86_add_sp(cpu, 8 * n);
    for (unsigned i = 0; i < 8; i++)
        if (7 - i != X86_RSP)
            x86_set_gpr(cpu, 7 - i, n, v[i]);
}

/* ENTER (SDM vol. 2): nothing but the new frame's memory changes before the last push, so a fault can be restarted. */
void x86_op_enter(x86_cpu *cpu, const x86_insn *in)
{
    const unsigned n = in->osz, level = in->sel & 31;
    const uint64_t mask = cpu->stack_size == 8 ? ~UINT64_C(0) : cpu->stack_size == 4 ? UINT32_MAX : 0xffff;
    uint64_t sp = (cpu->gpr[X86_RSP] - n) & mask, bp = cpu->gpr[X86_RBP];
    x86_store(cpu, x86_linear_fast(cpu, X86_SS, sp, n, X86_WRITE), n, bp);
    const uint64_t frame = sp;
    for (unsigned i = 1; i < level; i++) {
        bp = (bp - n) & mask;
        uint64_t v = x86_load(cpu, x86_linear_fast(cpu, X86_SS, bp, n, X86_READ), n);
        sp = (sp - n) & mask;
        x86_store(cpu, x86_linear_fast(cpu, X86_SS, sp, n, X86_WRITE), n, v);
    }
    if (level) {
        sp = (sp - n) & mask;
        x86_store(cpu, x86_linear_fast(cpu, X86_SS, sp, n, X86_WRITE), n, frame);
    }
    sp = (sp - (uint16_t)in->imm) & mask;
    if (cpu->stack_size == 8 || x86_is_protected(cpu))       /* the new top must be writable (#PF, #SS) */
        x86_probe_write(cpu, x86_linear_fast(cpu, X86_SS, sp, n, X86_WRITE), n);
    x86_set_gpr(cpu, X86_RBP, n, frame);
    x86_set_gpr(cpu, X86_RSP, cpu->stack_size, sp);
}

void x86_op_leave(x86_cpu *cpu, const x86_insn *in)
{
    const uint64_t mask = cpu->stack_size == 8 ? ~UINT64_C(0) : cpu->stack_size == 4 ? UINT32_MAX : 0xffff;
    uint64_t sp = cpu->gpr[X86_RBP] & mask;
    uint64_t v = x86_load(cpu, x86_linear_fast(cpu, X86_SS, sp, in->osz, X86_READ), in->osz);
    x86_set_gpr(cpu, X86_RSP, cpu->stack_size, sp);
    x86_add_sp(cpu, in->osz);
    x86_set_gpr(cpu, X86_RBP, in->osz, v);
}
