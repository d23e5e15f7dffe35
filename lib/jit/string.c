/* string.c - MOVS and STOS inside translated code, with REP and without.
 *
 * Kernels copy and clear a few bytes to a page at a time with them. What lies in one page on each side, is in the TLB and
 * goes upwards is the host's own instruction on host addresses: the same elements in the same order, whatever overlaps.
 * Everything else (devices, faults, code, the end of a page, DF) is left to the semantic function before anything has
 * changed; it goes on from there.
 */
#include "jit/frame.h"
#include "x86/ops.h"

static unsigned address_bytes(const jit_unit *u) { return u->key & JIT_KEY_64 ? 8 : 4; }

bool jit_string_form(const jit_unit *u, unsigned i)
{
    const x86_insn *in = &u->insn[i];
    if (in->exec != x86_op_movs && in->exec != x86_op_stos) return false;
    if (u->cpu->watch || u->cpu->hook_mask || (u->key & JIT_KEY_AC) || jit_in_shadow(u, i)) return false;
    if (in->asz != address_bytes(u) || (in->flags & X86_IF_REPNE) || in->seg == X86_FS || in->seg == X86_GS) return false;
    return u->key & (JIT_KEY_64 | JIT_KEY_FLAT);
}

/* T0 = where on the host the run at guest register `reg` is, or a jump. T1 is lost. */
static void look_up(const jit_unit *u, const x86_insn *in, unsigned reg, bool is_write, uint8_t **jump)
{
    jit_writer *w = &u->j->w;
    e_mov(w, address_bytes(u), T0, home[reg]);
    e_mov(w, 4, T1, T0);
    e_alu_imm(w, 4, 4, T1, 4095);
    e_lea(w, 4, T1, T1, in->flags & X86_IF_REP ? RCX : 0xff, in->osz, in->flags & X86_IF_REP ? 0 : in->osz);
    e_alu_imm(w, 4, 7, T1, 4096);
    jump[0] = e_jcc(w, CC_A);
    jump[1] = emit_tlb_lookup(u, 1, is_write);
}

static void emit_instruction(const jit_unit *u, const x86_insn *in)
{
    jit_writer *w = &u->j->w;
    if (in->osz == 2) e8(w, 0x66);
    if (in->flags & X86_IF_REP) e8(w, 0xf3);
    e_rex(w, in->osz, 0, 0, 0);
    e8(w, (in->exec == x86_op_movs ? 0xa4u : 0xaau) | (in->osz > 1));
}

/* The flags are lost; the temporary's slot is used. Returns how many jumps there are to the slow way. */
unsigned jit_emit_string(const jit_unit *u, unsigned i, uint8_t *jump[JIT_USUAL_JUMPS])
{
    const x86_insn *in = &u->insn[i];
    const bool is_move = in->exec == x86_op_movs, is_repeated = in->flags & X86_IF_REP;
    const unsigned size = address_bytes(u), count = is_repeated ? RCX : 0xff, bytes = is_repeated ? 0 : in->osz;
    jit_writer *w = &u->j->w;
    unsigned n = 0;
    e_r_gs(w, 4, 0xf7, 0, JIT_OFF(rflags)); /* test */
    e32(w, X86_FL_DF);
    jump[n++] = e_jcc(w, CC_NE);
    if (is_repeated) {
        e_alu_imm(w, size, 7, RCX, (int32_t)(4096 / in->osz));
        jump[n++] = e_jcc(w, CC_A);
    }
    if (is_move) {
        look_up(u, in, X86_RSI, false, &jump[n]);
        n += 2;
        frame_store(w, 8, T0, JIT_FRAME_TMP);
    }
    look_up(u, in, X86_RDI, true, &jump[n]);
    n += 2;
    if (is_move) {
        e_lea(w, size, T1, RSI, count, in->osz, (int32_t)bytes);
        frame_load(w, 8, RSI, JIT_FRAME_TMP);
    }
    e_rr(w, 8, 0x87, T0, RDI); /* xchg */
    e_lea(w, size, T0, T0, count, in->osz, (int32_t)bytes);
    if (is_repeated && size == 4) e_mov(w, 4, RCX, RCX);
    emit_instruction(u, in);
    e_mov(w, 8, RDI, T0);
    if (is_move) e_mov(w, 8, RSI, T1);
    return n;
}
