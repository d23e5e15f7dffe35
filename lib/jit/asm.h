/* asm.h - the few x86-64 encodings the emitter writes itself. Guest instructions are spelled by x86_reencode().
 *
 * A writer never checks space: the emitter makes room for the longest code of a block's instructions before it starts.
 */
#ifndef LIBVM_JIT_ASM_H
#define LIBVM_JIT_ASM_H

#include <stdint.h>
#include <string.h>

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };

/* Condition codes. */
enum { CC_O, CC_NO, CC_B, CC_AE, CC_E, CC_NE, CC_BE, CC_A, CC_S, CC_NS, CC_P, CC_NP, CC_L, CC_GE, CC_LE, CC_G,
       CC_CXZ, CC_CXNZ, CC_ECXZ, CC_ECXNZ /* RCX or ECX is zero, or not: for e_jcc() alone; without the flags */ };

typedef struct jit_writer {
    uint8_t *p, *end;  /* in the writable view */
    ptrdiff_t to_exec; /* add: address in the executable view */
} jit_writer;

static inline void e8(jit_writer *w, unsigned v) { *w->p++ = (uint8_t)v; }
static inline void e16(jit_writer *w, unsigned v)
{
    uint16_t x = (uint16_t)v;
    memcpy(w->p, &x, 2);
    w->p += 2;
}
static inline void e32(jit_writer *w, uint32_t v)
{
    memcpy(w->p, &v, 4);
    w->p += 4;
}
static inline void e64(jit_writer *w, uint64_t v)
{
    memcpy(w->p, &v, 8);
    w->p += 8;
}
static inline void ebytes(jit_writer *w, const void *b, unsigned n)
{
    memcpy(w->p, b, n);
    w->p += n;
}

static inline void e_rex(jit_writer *w, unsigned size, unsigned reg, unsigned index, unsigned base)
{
    unsigned rex = 0x40u | (size == 8 ? 8u : 0u) | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | (base >> 3 & 1);
    if (rex != 0x40u) e8(w, rex);
}

/* op reg, rm (registers) */
static inline void e_rr(jit_writer *w, unsigned size, unsigned op, unsigned reg, unsigned rm)
{
    if (size == 2) e8(w, 0x66);
    e_rex(w, size, reg, 0, rm);
    if (op > 0xff) e8(w, op >> 8);
    e8(w, op & 0xff);
    e8(w, 0xc0u | (reg & 7) << 3 | (rm & 7));
}
/* op reg, gs:[disp32] */
static inline void e_r_gs(jit_writer *w, unsigned size, unsigned op, unsigned reg, int32_t disp)
{
    e8(w, 0x65);
    if (size == 2) e8(w, 0x66);
    e_rex(w, size, reg, 0, 0);
    if (op > 0xff) e8(w, op >> 8);
    e8(w, op & 0xff);
    e8(w, (reg & 7) << 3 | 4);
    e8(w, 0x25);
    e32(w, (uint32_t)disp);
}
/* op reg, gs:[base + disp32]; base not RSP/R12 */
static inline void e_r_gsb(jit_writer *w, unsigned size, unsigned op, unsigned reg, unsigned base, int32_t disp)
{
    e8(w, 0x65);
    e_rex(w, size, reg, 0, base);
    e8(w, op);
    e8(w, 0x80u | (reg & 7) << 3 | (base & 7));
    e32(w, (uint32_t)disp);
}
/* op reg, gs:[index * 8 + disp32] */
static inline void e_r_gs8(jit_writer *w, unsigned size, unsigned op, unsigned reg, unsigned index, int32_t disp)
{
    e8(w, 0x65);
    e_rex(w, size, reg, index, 0);
    e8(w, op);
    e8(w, (reg & 7) << 3 | 4);
    e8(w, 0xc0u | (index & 7) << 3 | 5);
    e32(w, (uint32_t)disp);
}
/* ModRM and what follows for [base + index * scale + disp]; base, index may be 0xff (none); index not RSP */
static inline void e_modrm_mem(jit_writer *w, unsigned reg, unsigned base, unsigned index, unsigned scale,
                               int32_t disp)
{
    unsigned ss = scale == 8 ? 3 : scale == 4 ? 2 : scale == 2 ? 1 : 0;
    if (base == 0xff) {
        e8(w, (reg & 7) << 3 | 4);
        e8(w, ss << 6 | (index == 0xff ? 4u : (index & 7)) << 3 | 5);
        e32(w, (uint32_t)disp);
        return;
    }
    unsigned mod = disp == 0 && (base & 7) != 5 ? 0 : disp == (int8_t)disp ? 0x40 : 0x80;
    if (index == 0xff && (base & 7) != 4)
        e8(w, mod | (reg & 7) << 3 | (base & 7));
    else {
        e8(w, mod | (reg & 7) << 3 | 4);
        e8(w, ss << 6 | (index == 0xff ? 4u : (index & 7)) << 3 | (base & 7));
    }
    if (mod == 0x40)
        e8(w, (uint8_t)disp);
    else if (mod == 0x80)
        e32(w, (uint32_t)disp);
}
/* op reg, [base + index * scale + disp] */
static inline void e_r_mem(jit_writer *w, unsigned size, unsigned op, unsigned reg, unsigned base, unsigned index,
                           unsigned scale, int32_t disp)
{
    e_rex(w, size, reg, index == 0xff ? 0 : index, base == 0xff ? 0 : base);
    if (op > 0xff) e8(w, op >> 8);
    e8(w, op & 0xff);
    e_modrm_mem(w, reg, base, index, scale, disp);
}
static inline void e_gs_load(jit_writer *w, unsigned size, unsigned reg, int32_t disp)
{
    e_r_gs(w, size, 0x8b, reg, disp);
}
static inline void e_gs_store(jit_writer *w, unsigned size, unsigned reg, int32_t disp)
{
    e_r_gs(w, size, 0x89, reg, disp);
}
static inline void e_mov(jit_writer *w, unsigned size, unsigned dst, unsigned src) { e_rr(w, size, 0x89, src, dst); }

static inline void e_mov_imm(jit_writer *w, unsigned reg, uint64_t v)
{
    if (v == (uint32_t)v) {
        e_rex(w, 4, 0, 0, reg);
        e8(w, 0xb8u | (reg & 7));
        e32(w, (uint32_t)v);
    } else if ((int64_t)v == (int32_t)v) {
        e_rex(w, 8, 0, 0, reg);
        e8(w, 0xc7);
        e8(w, 0xc0u | (reg & 7));
        e32(w, (uint32_t)v);
    } else {
        e_rex(w, 8, 0, 0, reg);
        e8(w, 0xb8u | (reg & 7));
        e64(w, v);
    }
}
/* lea reg, [base + index * scale + disp] */
static inline void e_lea(jit_writer *w, unsigned size, unsigned reg, unsigned base, unsigned index, unsigned scale,
                         int32_t disp)
{
    e_r_mem(w, size, 0x8d, reg, base, index, scale, disp);
}
/* group-1 immediate: /n is 0 add, 1 or, 4 and, 5 sub, 6 xor, 7 cmp */
static inline void e_alu_imm(jit_writer *w, unsigned size, unsigned n, unsigned reg, int32_t imm)
{
    e_rex(w, size, 0, 0, reg);
    bool is_short = imm == (int8_t)imm;
    e8(w, is_short ? 0x83 : 0x81);
    e8(w, 0xc0u | n << 3 | (reg & 7));
    if (is_short)
        e8(w, (uint8_t)imm);
    else
        e32(w, (uint32_t)imm);
}
/* group-2 by immediate: /4 shl, /5 shr */
static inline void e_shift_imm(jit_writer *w, unsigned size, unsigned n, unsigned reg, unsigned count)
{
    e_rex(w, size, 0, 0, reg);
    e8(w, 0xc1);
    e8(w, 0xc0u | n << 3 | (reg & 7));
    e8(w, count);
}
/* Jumps return where their rel32 lies, for e_patch(). */
static inline uint8_t *e_jmp(jit_writer *w)
{
    e8(w, 0xe9);
    e32(w, 0);
    return w->p - 4;
}
static inline uint8_t *e_jcc(jit_writer *w, unsigned cc)
{
    if (cc >= CC_CXZ) { /* there is the short JRCXZ only: around the jump, or to it around a jump around it */
        if (cc >= CC_ECXZ) e8(w, 0x67);
        e8(w, 0xe3), e8(w, cc & 1 ? 5 : 2);
        if (!(cc & 1)) e8(w, 0xeb), e8(w, 5);
        return e_jmp(w);
    }
    e8(w, 0x0f);
    e8(w, 0x80u | cc);
    e32(w, 0);
    return w->p - 4;
}
static inline void e_patch(uint8_t *rel, const uint8_t *target)
{
    int32_t d = (int32_t)(target - (rel + 4));
    memcpy(rel, &d, 4);
}
static inline void e_jcc_to(jit_writer *w, unsigned cc, const uint8_t *target) { e_patch(e_jcc(w, cc), target); }
static inline void e_jmp_to(jit_writer *w, const uint8_t *target) { e_patch(e_jmp(w), target); }
static inline void e_call_to(jit_writer *w, const uint8_t *target)
{
    e8(w, 0xe8);
    e32(w, 0);
    e_patch(w->p - 4, target);
}

#endif
