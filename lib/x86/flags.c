/* flags.c - PUSHF, POPF and the rules for who may change which flag (SDM vol. 2, POPF; vol. 3, 20.2.7 for VME). */
#include "x86/access.h"
#include "x86/ops.h"

void x86_set_flags(x86_cpu *cpu, uint64_t value, uint64_t mask)
{
    uint64_t old = cpu->rflags;
    cpu->rflags = ((old & ~mask) | (value & mask) | X86_FL_1) & UINT64_C(0x3f7fd7);
    if ((old ^ cpu->rflags) & (X86_FL_TF | X86_FL_VM | X86_FL_AC | X86_FL_RF))
        x86_mode_changed(cpu);
}

static inline unsigned iopl(const x86_cpu *cpu)
{
    return (unsigned)(cpu->rflags & X86_FL_IOPL) >> 12;
}

void x86_op_pushf(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t image = cpu->rflags & ~(uint64_t)(X86_FL_RF | X86_FL_VM);
    if (x86_is_v86(cpu) && iopl(cpu) < 3) {
        if (!(cpu->cr4 & X86_CR4_VME) || in->osz != 2)
            x86_raise_error(cpu, X86_GP, 0);
        image = (image & ~(uint64_t)X86_FL_IF) | X86_FL_IOPL | (cpu->rflags & X86_FL_VIF ? X86_FL_IF : 0);
    }
    x86_push(cpu, in->osz, image);
}

/* Virtual-8086 mode with IOPL < 3 and VME: IF goes to VIF. */
static void popf_vme(x86_cpu *cpu, const x86_insn *in)
{
    if (!(cpu->cr4 & X86_CR4_VME) || in->osz != 2)
        x86_raise_error(cpu, X86_GP, 0);
    uint64_t v = x86_peek(cpu, 2, 0);
    if ((v & X86_FL_TF) || ((v & X86_FL_IF) && (cpu->rflags & X86_FL_VIP)))
        x86_raise_error(cpu, X86_GP, 0);
    x86_add_sp(cpu, 2);
    v = (v & ~(uint64_t)X86_FL_VIF) | (v & X86_FL_IF ? X86_FL_VIF : 0);
    x86_set_flags(cpu, v, X86_FL_ARITH | X86_FL_TF | X86_FL_DF | X86_FL_NT | X86_FL_VIF | X86_FL_RF);
}

void x86_op_popf(x86_cpu *cpu, const x86_insn *in)
{
    if (x86_is_v86(cpu) && iopl(cpu) < 3) {
        popf_vme(cpu, in);
        return;
    }
    uint64_t mask = X86_FL_ARITH | X86_FL_TF | X86_FL_DF | X86_FL_NT | X86_FL_RF;
    if (in->osz != 2)
        mask |= X86_FL_AC | X86_FL_ID;
    if (x86_is_v86(cpu))
        mask |= X86_FL_IF;                                   /* IOPL is 3 here */
    else if (x86_is_real(cpu) || cpu->cpl == 0)
        mask |= X86_FL_IF | X86_FL_IOPL;
    else if (cpu->cpl <= iopl(cpu))
        mask |= X86_FL_IF;
    uint64_t v = x86_peek(cpu, in->osz, 0) & ~(uint64_t)X86_FL_RF;
    x86_add_sp(cpu, in->osz);
    x86_set_flags(cpu, v, mask);
}
