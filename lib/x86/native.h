/* native.h - running guest instructions on the host CPU: the re-encoder and one-instruction thunks.
 *
 * Guest and host are both x86-64, so an unprivileged instruction that touches only its operands means the same on either.
 * x86_reencode() spells a decoded instruction again for 64-bit host code with its operands renamed; the JIT places the
 * bytes in its blocks, native.c wraps them in a function that loads and stores the guest's registers.
 */
#ifndef LIBVM_X86_NATIVE_H
#define LIBVM_X86_NATIVE_H

#include "x86/insn.h"

/* What becomes of the explicit memory operand. */
enum x86_rename_mem { X86_RENAME_MEM_BASE,    /* [mem_base + mem_index * mem_scale + mem_disp], gs: if mem_gs */
                      X86_RENAME_MEM_REG };   /* general-purpose or vector register number mem_base, in ModRM.rm */

/* Host names of guest operands. `gpr` applies to registers named by a field of the encoding (ModRM.reg, ModRM.rm, opcode,
 * VEX.vvvv) and to the accumulator of the short forms (A0-A3, 04, A8, ...). Other implicit registers (CL, RDX:RAX, XMM0, ...)
 * keep their numbers in the result: the caller sees to it that they hold the guest's values. */
typedef struct x86_rename {
    uint8_t gpr[16];
    uint8_t vec[16];           /* used when rename_vec: XMM/YMM operands (MMX registers keep their numbers) */
    bool rename_vec;
    bool mem_gs;
    uint8_t mem_kind;          /* enum x86_rename_mem */
    uint8_t mem_base;
    uint8_t mem_index;         /* X86_NOREG: none; never 4 (RSP) */
    uint8_t mem_scale;         /* 1, 2, 4, 8 */
    int32_t mem_disp;
} x86_rename;

#define X86_REENCODE_MAX 16

/* The identity: every register keeps its number, memory through [RAX]. */
void x86_rename_init(x86_rename *map);

/* Write `in` to `out` (X86_REENCODE_MAX bytes) as a 64-bit instruction with operands renamed; returns its length, or 0 when
 * that cannot be spelled: AH..BH together with a REX prefix, vector-indexed memory (gathers), RIP-relative results, and forms
 * that 64-bit mode lacks. Segment, address-size and LOCK prefixes are dropped; mandatory prefixes and immediates are kept;
 * the operand size is that of in->osz, whatever mode the guest is in. Does not judge whether the instruction may run
 * natively: that is X86_IF_NATIVE. */
unsigned x86_reencode(const x86_insn *in, const x86_rename *map, uint8_t *out);

/* ---- one-instruction thunks (native.c) ---- */
bool x86_native_init(x86_cpu *cpu);          /* false: out of memory; the CPU then raises #UD for what would need a thunk */
void x86_native_destroy(x86_cpu *cpu);

#endif
