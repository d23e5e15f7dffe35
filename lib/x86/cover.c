/* cover.c - records of branches and comparisons.
 *
 * A comparison is logged by the function that executes it, which reads each operand once, and after the last access that
 * can fault: so device memory is not read twice, and what does not retire is not logged.
 */
#include <Zydis/Mnemonic.h>
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/cover.h"
#include "x86/simd.h"

void x86_cover_branch(x86_cpu *cpu, uint64_t from)
{
    const x86_cover *c = &cpu->cover;
    uint64_t to = x86_code_la(cpu, cpu->rip);
    if (!x86_covers(c, from)) return;
    if (c->map) c->map[x86_cover_index(c, from, to)]++;
    if (c->ring) c->ring[(*c->head)++ & c->ring_mask] = to;
}

static vm_compare *new_entry(x86_cpu *cpu, unsigned kind, unsigned width)
{
    x86_cover *c = &cpu->cover;
    vm_compare *e = &c->log[(*c->log_head)++ & c->log_mask];
    memset(e, 0, sizeof *e);
    e->address = x86_code_la(cpu, cpu->rip);
    e->kind = (uint8_t)kind;
    e->width = (uint8_t)width;
    return e;
}

void x86_log_element(x86_cpu *cpu, unsigned kind, unsigned width, uint64_t a, uint64_t b)
{
    vm_compare *e = new_entry(cpu, kind, width);
    e->a[0] = a & X86_MASK(width);
    e->b[0] = b & X86_MASK(width);
}

static void log_pair(x86_cpu *cpu, const x86_insn *in, unsigned kind, uint64_t a, uint64_t b)
{
    vm_compare *e = new_entry(cpu, kind, in->op[0].size);
    e->is_constant = in->op[1].kind == X86_OP_IMM;
    e->a[0] = a & X86_MASK(e->width);
    e->b[0] = b & X86_MASK(e->width);
}

static void logged_test(x86_cpu *cpu, const x86_insn *in)
{
    static const x86_alu_fn cmp[4] = X86_ALU_TABLE(cmp), test[4] = X86_ALU_TABLE(test);
    bool is_test = in->mnemonic == ZYDIS_MNEMONIC_TEST;
    uint64_t a = x86_get_op(cpu, in, 0), b = x86_get_op(cpu, in, 1);
    (is_test ? test : cmp)[X86_SIZE_INDEX(in->op[0].size)](&cpu->rflags, a, b);
    log_pair(cpu, in, is_test ? VM_COMPARE_TEST : VM_COMPARE_CMP, a, b);
}

static void logged_sub(x86_cpu *cpu, const x86_insn *in)
{
    static const x86_alu_fn sub[4] = X86_ALU_TABLE(sub);
    const x86_operand *op = &in->op[0];
    x86_alu_fn fn = sub[X86_SIZE_INDEX(op->size)];
    uint64_t b = x86_get_op(cpu, in, 1), a, fl = cpu->rflags;
    if (op->kind == X86_OP_GPR) {
        a = x86_get_gpr(cpu, op->reg, op->size);
        x86_set_gpr(cpu, op->reg, op->size, fn(&fl, a, b));
    } else {
        x86_rmw m;
        x86_rmw_open(cpu, &m, x86_op_la(cpu, in, op->size, X86_READ | X86_WRITE), op->size);
        a = m.value;
        x86_rmw_close(cpu, &m, op->size, fn(&fl, a, b));
    }
    cpu->rflags = fl;
    log_pair(cpu, in, VM_COMPARE_SUB, a, b);
}

/* A vector register's first bytes. */
static void get_vector(x86_cpu *cpu, const x86_operand *op, uint64_t out[4])
{
    unsigned n = op->size > 32 ? 32 : op->size;
    if (op->kind == X86_OP_MMX) {
        memcpy(out, X86_FPU_ST(cpu, op->reg & 7), 8);
    } else if (op->kind == X86_OP_VEC) {
        memcpy(out, X86_FPU_XMM(cpu, op->reg & 15), 16);
        if (n == 32) memcpy(out + 2, X86_FPU_YMMH(cpu, op->reg & 15), 16);
    }
}

/* The memory operand that the instruction has just read: its pages are in the TLB, unless it was device memory. */
static bool get_read(x86_cpu *cpu, uint64_t la, unsigned n, uint64_t out[4])
{
    for (unsigned i = 0; i < n; i++) {
        const uint8_t *p = x86_tlb_hit(cpu, cpu->code_size == 8 ? la + i : (uint32_t)(la + i), 1, false);
        if (!p) return false;
        ((uint8_t *)out)[i] = *p;
    }
    return true;
}

static void logged_vector(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v[2][4] = {{0}}, la = 0;
    unsigned first = in->nops - 2u, width = in->op[first].size;
    bool has_memory = in->op[first + 1].kind == X86_OP_MEM;
    for (unsigned i = 0; i < 2; i++) get_vector(cpu, &in->op[first + i], v[i]);
    if (has_memory) la = x86_offset(cpu, in) + (cpu->code_size == 8 && in->seg < X86_FS ? 0 : cpu->seg[in->seg].base);
    x86_op_simd(cpu, in);
    if (has_memory && !get_read(cpu, la, width, v[1])) return;
    vm_compare *e = new_entry(cpu, VM_COMPARE_VECTOR, width);
    memcpy(e->a, v[0], sizeof e->a);
    memcpy(e->b, v[1], sizeof e->b);
}

void x86_log_compare(x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_CMP:
    case ZYDIS_MNEMONIC_TEST: in->exec = logged_test; break;
    case ZYDIS_MNEMONIC_SUB:
        if (!(in->flags & X86_IF_LOCK)) in->exec = logged_sub;
        break;
    case ZYDIS_MNEMONIC_PCMPEQB:
    case ZYDIS_MNEMONIC_PCMPEQW:
    case ZYDIS_MNEMONIC_PCMPEQD:
    case ZYDIS_MNEMONIC_PCMPEQQ:
    case ZYDIS_MNEMONIC_PTEST:
    case ZYDIS_MNEMONIC_VPCMPEQB:
    case ZYDIS_MNEMONIC_VPCMPEQW:
    case ZYDIS_MNEMONIC_VPCMPEQD:
    case ZYDIS_MNEMONIC_VPCMPEQQ:
    case ZYDIS_MNEMONIC_VPTEST:
        if (in->exec == x86_op_simd) in->exec = logged_vector;
        break;
    default: break;
    }
}

bool x86_is_logged(const x86_insn *in)
{
    return in->exec == logged_test || in->exec == logged_sub || in->exec == logged_vector;
}
