/* opt.c - passes over a lifted block.
 *
 * Flags. Guest flags live in the host's flags; address checks destroy them. Backwards over the block we find, for each
 * instruction, which flags must really be in the host when it executes (host_at: somebody reads them before they are
 * written again) and which must at least be recoverable because the instruction may fault or leave (exact_at). The emitter
 * saves and restores only for these.
 */
#include "jit/jit.h"

static void edges_need(jit_unit *u) {
    const jit_op *last = &u->ops[u->nops - 1];
    u->edge_need[0] = u->edge_need[1] = 0;
    u->extents[1] = u->extents[2] = (jit_extent){ 0, 0 };
    switch (last->op) {
    case IR_JCC:
        u->edge_need[1] = jit_flag_need(u, last->fall, &u->extents[2]);
        /* fallthrough */
    case IR_JUMP:
        u->edge_need[0] = jit_flag_need(u, last->target, &u->extents[1]);
        break;
    case IR_JUMP_TMP:
        u->edge_need[0] = JIT_NEED_MEM;
        break;
    default:
        break;
    }
}

void jit_optimise(jit_unit *u) {
    jit_extent own;
    u->entry_need = jit_flag_need(u, u->rip, &own);
    edges_need(u);
    unsigned need = u->edge_need[0] | u->edge_need[1];
    uint16_t host = need & JIT_NEED_HOST ? X86_FL_ARITH : 0;
    uint16_t exact = X86_FL_ARITH;        /* every edge may leave for the run loop */
    for (unsigned i = u->count; i-- > 0;) {
        const x86_insn *in = &u->insn[i];
        jit_info *f = &u->info[i];
        jit_classify_flags(in, f);
        f->falls_back = (u->forced >> i & 1) || jit_insn_falls_back(u, in);
        f->can_leave = f->falls_back || jit_insn_can_leave(u, in);
        f->exact_after = exact;
        if (f->falls_back) {              /* all flags through memory */
            f->host_at = 0;
            host = 0;
            exact = f->exact_at = X86_FL_ARITH;
            continue;
        }
        uint16_t through = X86_FL_ARITH & ~f->written;
        uint16_t partial = f->written ? (host | exact) & through : 0;
        uint16_t maybe = in->flags_maybe & X86_FL_ARITH;
        f->host_at = (host & through) | f->read | partial | (maybe & (host | exact));
        host = f->host_at;
        exact = f->can_leave ? X86_FL_ARITH : exact & through;
        f->exact_at = exact;
    }
}
