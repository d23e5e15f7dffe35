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
    uint8_t mem_base;          /* X86_NOREG: none */
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

/* ---- what kind of instruction it is (op_simd.c) ---- */
enum x86_simd_props {
    SIMD_FP = 1, SIMD_UNALIGNED = 2, SIMD_ALIGN = 4, SIMD_NODEST = 8, SIMD_FLAGS = 16, SIMD_STR = 32, SIMD_XMM0 = 64,
    SIMD_Y2 = 128, SIMD_R2 = 256, SIMD_YVAES = 512, SIMD_YVPCLMUL = 1024,
    SIMD_TPS = 0x1000, SIMD_TPD = 0x2000, SIMD_TSS = 0x3000, SIMD_TSD = 0x4000, SIMD_TINY_MASK = 0x7000
};
/* SIMD_* of an instruction of the SIMD() table in ops_simd.def; 0 for all others. SIMD_FP: reads MXCSR and may raise #XM, so
 * run it natively only while the host MXCSR holds the guest's control bits with every exception masked. */
unsigned x86_simd_properties(const x86_insn *in);
/* Alignment that the memory operand must have or #GP: 1, 16 or 32. What this allows, the host processor accepts too. */
unsigned x86_simd_alignment(const x86_insn *in);
/* True when the CPU model offers the instruction's extension and the host has it. State (CR0, CR4, XCR0) is not looked at. */
bool x86_simd_offered(x86_cpu *cpu, const x86_insn *in);

/* Memory for code, mapped twice: what is returned is writable, *exec the same memory executable, rather at `near`. No mapping is ever
 * both. Each is given back with munmap(). NULL: the host refuses. */
uint8_t *x86_map_code(size_t bytes, void *near, uint8_t **exec);

/* ---- one-instruction thunks (native.c) ----
 * Made on first use; destroy frees them; renew puts them into other memory than the process shares with one it was forked from
 * (false: the host refuses). */
void x86_native_destroy(x86_cpu *cpu);
bool x86_native_renew(x86_cpu *cpu);

#endif
