/* ops.h - declares every semantic function named in ops.def. */
#ifndef LIBVM_X86_OPS_H
#define LIBVM_X86_OPS_H
#include "x86/insn.h"
#define OP(m, f, fl) void f(x86_cpu *cpu, const x86_insn *in);
#include "x86/ops.def"
void x86_op_illegal(x86_cpu *cpu, const x86_insn *in);    /* #UD */
/* Replace the generic function of a common form by one made for its size and operand kinds (specialise.c). */
void x86_specialise(x86_insn *in);
#endif
