/* stack.c - the stack at its own width. RSP changes only after the access succeeded. */
#include "x86/access.h"

static inline uint64_t stack_mask(const x86_cpu *cpu)
{
    return cpu->stack_size == 8 ? ~UINT64_C(0) : cpu->stack_size == 4 ? UINT32_MAX : 0xffff;
}

void x86_add_sp(x86_cpu *cpu, int64_t delta)
{
    uint64_t sp = cpu->gpr[X86_RSP] + (uint64_t)delta;
    if (cpu->stack_size == 8)
        cpu->gpr[X86_RSP] = sp;
    else
        x86_set_gpr(cpu, X86_RSP, cpu->stack_size, sp);
}

void x86_push(x86_cpu *cpu, unsigned n, uint64_t v)
{
    uint64_t off = (cpu->gpr[X86_RSP] - n) & stack_mask(cpu);
    x86_store(cpu, x86_linear_fast(cpu, X86_SS, off, n, X86_WRITE), n, v);
    x86_add_sp(cpu, -(int64_t)n);
}

uint64_t x86_peek(x86_cpu *cpu, unsigned n, unsigned depth_bytes)
{
    uint64_t off = (cpu->gpr[X86_RSP] + depth_bytes) & stack_mask(cpu);
    return x86_load(cpu, x86_linear_fast(cpu, X86_SS, off, n, X86_READ), n);
}

uint64_t x86_pop(x86_cpu *cpu, unsigned n)
{
    uint64_t v = x86_peek(cpu, n, 0);
    x86_add_sp(cpu, n);
    return v;
}
