/* operand.c - reading, writing and modifying an instruction's operands. */
#include "x86/access.h"
#include "x86/alu.h"

uint64_t x86_get_op(x86_cpu *cpu, const x86_insn *in, unsigned i)
{
    const x86_operand *op = &in->op[i];
    switch (op->kind) {
    case X86_OP_GPR: return x86_get_gpr(cpu, op->reg, op->size);
    case X86_OP_IMM: case X86_OP_REL: return in->imm;
    case X86_OP_SEG: return cpu->seg[op->reg].sel;
    case X86_OP_MEM: case X86_OP_MOFFS: return x86_load(cpu, x86_op_la(cpu, in, op->size, X86_READ), op->size);
    default: x86_leave(cpu, X86_STOP_INTERNAL);
    }
}

void x86_set_op(x86_cpu *cpu, const x86_insn *in, unsigned i, uint64_t v)
{
    const x86_operand *op = &in->op[i];
    if (op->kind == X86_OP_GPR)
        x86_set_gpr(cpu, op->reg, op->size, v);
    else if (op->kind == X86_OP_MEM || op->kind == X86_OP_MOFFS)
        x86_store(cpu, x86_op_la(cpu, in, op->size, X86_WRITE), op->size, v);
    else
        x86_leave(cpu, X86_STOP_INTERNAL);
}

static bool swap_host(uint8_t *p, unsigned n, uint64_t old, uint64_t v)
{
#define SWAP(T) { T e = (T)old; return __atomic_compare_exchange_n((T *)(void *)p, &e, (T)v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
    switch (n) {
    case 1: SWAP(uint8_t)
    case 2: SWAP(uint16_t)
    case 4: SWAP(uint32_t)
    default: SWAP(uint64_t)
    }
#undef SWAP
}

static void modify_locked(x86_cpu *cpu, uint64_t la, unsigned n, x86_alu_fn fn, uint64_t b)
{
    x86_locked m;
    uint64_t fl, v;
    x86_locked_open(cpu, &m, la, n);
    if (m.host) {
        uint64_t old;
        do {
            old = x86_load_host(m.host, n);
            fl = cpu->rflags;
            v = fn(&fl, old, b);
        } while (!swap_host(m.host, n, old, v));
    } else {
        fl = cpu->rflags;
        v = fn(&fl, m.value[0], b);
        x86_locked_close(cpu, &m, n, &v);
    }
    cpu->rflags = fl;
}

void x86_modify(x86_cpu *cpu, const x86_insn *in, x86_alu_fn fn, uint64_t b)
{
    const x86_operand *op = &in->op[0];
    uint64_t fl = cpu->rflags;
    if (op->kind == X86_OP_GPR) {
        x86_set_gpr(cpu, op->reg, op->size, fn(&fl, x86_get_gpr(cpu, op->reg, op->size), b));
        cpu->rflags = fl;
        return;
    }
    uint64_t la = x86_op_la(cpu, in, op->size, X86_READ | X86_WRITE);
    if (in->flags & X86_IF_LOCK) {
        modify_locked(cpu, la, op->size, fn, b);
        return;
    }
    x86_rmw m;
    x86_rmw_open(cpu, &m, la, op->size);
    uint64_t v = fn(&fl, m.value, b);
    x86_rmw_close(cpu, &m, op->size, v);
    cpu->rflags = fl;
}
