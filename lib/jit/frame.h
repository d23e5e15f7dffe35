/* frame.h - the register plan of emit.c's essay in names, and the frame on the host's stack: what code and thunks are
 * emitted with. */
#ifndef LIBVM_JIT_FRAME_H
#define LIBVM_JIT_FRAME_H
#include "jit/jit.h"

#define T0             R14
#define T1             R13
#define CNT            R15
#define GPR(n)         ((int32_t)(offsetof(x86_cpu, gpr) + 8 * (n)))

static const uint8_t home[16] = {RAX, RCX, RDX, RBX, R12, RBP, RSI, RDI, 0xff, 0xff, 0xff, 0xff, R8, R9, R10, R11};

/* What blocks use most lies at [RSP + displacement]. */

#define JIT_FRAME_REG(guest) (JIT_FRAME_R8 + (guest) - X86_R8)

static inline void frame_op(jit_writer *w, unsigned size, unsigned op, unsigned reg, unsigned slot)
{
    e_r_mem(w, size, op, reg, RSP, 0xff, 1, (int32_t)(8 * slot));
}
static inline void frame_load(jit_writer *w, unsigned size, unsigned reg, unsigned slot)
{
    frame_op(w, size, 0x8b, reg, slot);
}
static inline void frame_store(jit_writer *w, unsigned size, unsigned reg, unsigned slot)
{
    frame_op(w, size, 0x89, reg, slot);
}

/* Where the TLB of the unit's context has its tags and host addresses, as seen from gs:[T1]. */
static inline int32_t tag_offset(const jit_unit *u, bool is_write)
{
    return (int32_t)(offsetof(x86_cpu, tlb) + (u->key & JIT_KEY_CTX) * sizeof(x86_tlb) +
                     (is_write ? offsetof(x86_tlb_entry, tag_w) : offsetof(x86_tlb_entry, tag_r)));
}
static inline int32_t host_offset(const jit_unit *u)
{
    return (int32_t)(offsetof(x86_cpu, tlb) + (u->key & JIT_KEY_CTX) * sizeof(x86_tlb) + offsetof(x86_tlb_entry, host));
}
_Static_assert(sizeof(x86_tlb_entry) == 32, "the check scales the page number by 32");

/* T1 = X86_TLB_INDEX(T0) * 32 */
static inline void emit_tlb_index(jit *j)
{
    enum { SHIFT = X86_TLB_SHIFT - 5, SIZE = X86_TLB_SHIFT + X86_TLB_BITS > 32 ? 8 : 4 };
    jit_writer *w = &j->w;
    if (j->has_bmi2) {
        ebytes(w, "\xc4\x43\xfb\xf0\xee", 5); /* rorx r13, r14, SHIFT */
        e8(w, SHIFT);
    } else {
        e_mov(w, SIZE, T1, T0);
        e_shift_imm(w, SIZE, 5, T1, SHIFT);
    }
    e_alu_imm(w, 4, 4, T1, (int32_t)((X86_TLB_ENTRIES - 1) << 5));
}

/* T0 from linear to host, where `size` bytes of the page are the TLB's entry, or the returned jump: T1 is the entry's index
 * then, T0 xor its tag the address. */
static inline uint8_t *emit_tlb_lookup(const jit_unit *u, unsigned size, bool is_write)
{
    jit_writer *w = &u->j->w;
    emit_tlb_index(u->j);
    e_r_gsb(w, 8, 0x33, T0, T1, tag_offset(u, is_write));
    e_alu_imm(w, 8, 7, T0, (int32_t)(4096 - size));
    uint8_t *miss = e_jcc(w, CC_A);
    e_r_gsb(w, 8, 0x03, T0, T1, host_offset(u));
    return miss;
}

static inline void emit_push_pop(jit_writer *w, unsigned reg, bool is_push)
{
    e_rex(w, 4, 0, 0, reg);
    e8(w, (is_push ? 0x50u : 0x58u) | (reg & 7));
}

/* The host's flags to their slot. */
static inline void emit_save(jit_writer *w)
{
    e_mov(w, 8, T1, RAX);
    e8(w, 0x9f);                           /* lahf */
    e8(w, 0x0f), e8(w, 0x90), e8(w, 0xc0); /* seto al */
    frame_store(w, 4, RAX, JIT_FRAME_FLAGS); /* what is above AX does not matter */
    e8(w, 0x49), e8(w, 0x95);                /* xchg rax, T1: who calls C finds them there afterwards */
}

/* `pushed`: bytes on the stack above the frame. */
static inline void emit_restore_from(jit_writer *w, int32_t pushed)
{
    e_mov(w, 8, T1, RAX);
    e_r_mem(w, 4, 0x8b, RAX, RSP, 0xff, 1, 8 * JIT_FRAME_FLAGS + pushed);
    e8(w, 0x04), e8(w, 0x7f); /* add al, 127: OF */
    e8(w, 0x9e);              /* sahf */
    e_mov(w, 8, RAX, T1);
}
#endif
