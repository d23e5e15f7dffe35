/* op_flow.c - near branches, software interrupts, BOUND, ports, and instructions that do nothing. */
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

void x86_branch(x86_cpu *cpu, const x86_insn *in, uint64_t target)
{
    if (in->osz == 2)
        target = (uint16_t)target;
    else if (cpu->code_size != 8)
        target = (uint32_t)target;
    if (cpu->code_size == 8 ? !x86_canonical(target) : target > cpu->seg[X86_CS].limit)
        x86_raise_error(cpu, X86_GP, 0);
    cpu->next_rip = target;
}

static inline void relative(x86_cpu *cpu, const x86_insn *in)
{
    x86_branch(cpu, in, cpu->next_rip + in->imm);
}

void x86_op_jmp(x86_cpu *cpu, const x86_insn *in)
{
    if (in->op[0].kind == X86_OP_REL)
        relative(cpu, in);
    else
        x86_branch(cpu, in, x86_get_op(cpu, in, 0));
}

void x86_op_jcc(x86_cpu *cpu, const x86_insn *in)
{
    if (x86_cond(cpu->rflags, in->cc))
        relative(cpu, in);
}

/* The push comes last: it may fault, and nothing else has changed then (next_rip does not count). */
void x86_op_call(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t ret = cpu->next_rip;
    if (in->op[0].kind == X86_OP_REL)
        relative(cpu, in);
    else
        x86_branch(cpu, in, x86_get_op(cpu, in, 0));
    x86_push(cpu, in->osz, ret);
}

void x86_op_ret(x86_cpu *cpu, const x86_insn *in)
{
    x86_branch(cpu, in, x86_peek(cpu, in->osz, 0));
    x86_add_sp(cpu, in->osz + (in->nops ? (uint16_t)in->imm : 0));
}

static uint64_t counter(const x86_cpu *cpu, const x86_insn *in)
{
    return x86_get_gpr(cpu, X86_RCX, in->asz);
}

/* A branch that faults leaves rCX as it was. */
static void loop_if(x86_cpu *cpu, const x86_insn *in, bool is_wanted)
{
    uint64_t c = (counter(cpu, in) - 1) & X86_MASK(in->asz);
    if (c && is_wanted)
        relative(cpu, in);
    x86_set_gpr(cpu, X86_RCX, in->asz, c);
}

void x86_op_loop(x86_cpu *cpu, const x86_insn *in) { loop_if(cpu, in, true); }
void x86_op_loope(x86_cpu *cpu, const x86_insn *in) { loop_if(cpu, in, cpu->rflags & X86_FL_ZF); }
void x86_op_loopne(x86_cpu *cpu, const x86_insn *in) { loop_if(cpu, in, !(cpu->rflags & X86_FL_ZF)); }

void x86_op_jcxz(x86_cpu *cpu, const x86_insn *in)
{
    if (!counter(cpu, in))
        relative(cpu, in);
}

void x86_op_int(x86_cpu *cpu, const x86_insn *in) { x86_software_interrupt(cpu, (uint8_t)in->imm, X86_INT_N); }
void x86_op_int3(x86_cpu *cpu, const x86_insn *in) { (void)in; x86_software_interrupt(cpu, X86_BP, X86_INT_3); }
void x86_op_int1(x86_cpu *cpu, const x86_insn *in) { (void)in; x86_software_interrupt(cpu, X86_DB, X86_INT_1); }

void x86_op_into(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if (cpu->rflags & X86_FL_OF)
        x86_software_interrupt(cpu, X86_OF, X86_INT_O);
}

void x86_op_bound(x86_cpu *cpu, const x86_insn *in)
{
    const unsigned n = in->osz;
    uint64_t la = x86_op_la(cpu, in, 2 * n, X86_READ), pair = 0;
    x86_read_linear(cpu, la, &pair, 2 * n);
    uint64_t i = x86_get_op(cpu, in, 0);
    int32_t index = n == 2 ? (int16_t)i : (int32_t)i;
    int32_t low = n == 2 ? (int16_t)pair : (int32_t)pair, high = n == 2 ? (int16_t)(pair >> 16) : (int32_t)(pair >> 32);
    if (index < low || index > high)
        x86_raise(cpu, X86_BR);
}

/* ---- ports ---- */

void x86_op_in(x86_cpu *cpu, const x86_insn *in)
{
    uint16_t port = in->op[1].kind == X86_OP_IMM ? (uint8_t)in->imm : (uint16_t)cpu->gpr[X86_RDX];
    unsigned n = in->op[0].size;
    x86_check_port(cpu, port, n);
    x86_set_gpr(cpu, X86_RAX, n, x86_port_in(cpu, port, n));
}

void x86_op_out(x86_cpu *cpu, const x86_insn *in)
{
    uint16_t port = in->op[0].kind == X86_OP_IMM ? (uint8_t)in->imm : (uint16_t)cpu->gpr[X86_RDX];
    unsigned n = in->op[1].size;
    x86_check_port(cpu, port, n);
    x86_port_out(cpu, port, n, x86_get_gpr(cpu, X86_RAX, n));
}

/* ---- nothing, or nearly ---- */

void x86_op_nop(x86_cpu *cpu, const x86_insn *in) { (void)cpu, (void)in; }

/* LFENCE, SFENCE, MFENCE: the guest's accesses are the host's, in order; only store-to-load order needs the real thing. */
void x86_op_fence(x86_cpu *cpu, const x86_insn *in)
{
    (void)cpu, (void)in;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* CLFLUSH, CLFLUSHOPT, CLWB: no caches, but the address is translated and checked like a byte load's. */
void x86_op_clflush(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t la = x86_op_la(cpu, in, 1, X86_READ);
    (void)x86_direct(cpu, la, 1, X86_READ);
}

void x86_op_rdpid(x86_cpu *cpu, const x86_insn *in)
{
    x86_set_gpr(cpu, in->op[0].reg, 8, (uint32_t)cpu->tsc_aux);
}
