/* coverage.c - edge counters and block traces in translated code. What counts is said in <libvm/coverage.h>.
 *
 * Edges are counted where instructions are: when a block is left, for all of the branches that its trace has passed. The
 * edges inside a trace are known when it is made, so several passes of one loop become one addition. Whoever looks in
 * between (begin_helper() in jit.c) adds what is due up to his instruction and takes it back when the block goes on.
 *
 * A trace that leads back to its own beginning counts its rounds instead, in x86_cover.rounds[]: one store a round. They get
 * into the map, for all of its edges at once, before anybody looks: when emitted code is left and in begin_helper().
 *
 * Both scratch registers are free at edges. The host's flags may be live there; then loads, LEA and stores do the
 * addition. A map that lies within 2 GiB of the x86_cpu is reached through GS like its fields.
 *
 * Of a recorded path that routine comes first, and all that leaves it calls it (T1 and the flags change).
 *
 * With a block trace there are no edges inside blocks: each writes its target in order.
 */
#include "jit/frame.h"
#include "x86/cover.h"

#define COVER(field) ((int32_t)(offsetof(x86_cpu, cover) + offsetof(x86_cover, field)))

static const x86_cover *cover_of(const jit_unit *u) { return &u->cpu->cover; }

/* Does instruction i end a block of the guest whose edges are recorded? */
static bool is_counted(const jit_unit *u, unsigned i)
{
    return i < u->count && (u->insn[i].flags & X86_IF_BRANCH) && x86_covers(cover_of(u), u->insn_rip[i]);
}

void jit_cover_unit(jit_unit *u)
{
    u->nedges = 0;
    u->edge_code = NULL;
    if (!cover_of(u)->map) return;
    for (unsigned i = 0; i + 1 < u->count; i++)
        if (is_counted(u, i))
            u->edges[u->nedges++] =
                (jit_edge){.insn = (uint16_t)i,
                           .index = x86_cover_index(cover_of(u), u->insn_rip[i], u->insn_rip[i + 1])};
}

/* ---- counters ---- */

typedef struct sum {
    uint32_t index[JIT_MAX_INSNS + 1];
    uint8_t times[JIT_MAX_INSNS + 1];
    unsigned count;
} sum;

static void add(sum *s, uint32_t index)
{
    unsigned i = 0;
    while (i < s->count && s->index[i] != index) i++;
    if (i == s->count) {
        s->index[s->count++] = index;
        s->times[i] = 0;
    }
    s->times[i]++;
}

/* The place where the block being made counts its rounds; -1: there is none left. */
static int place_of_rounds(jit_unit *u, uint32_t index)
{
    jit *j = u->j;
    for (int i = 0; i < X86_ROUNDS; i++)
        if (!j->rounds[i]) {
            j->rounds[i] = u->block;
            j->has_rounds = true;
            u->block->round_index = index;
            return i;
        }
    return -1;
}

/* Where the map is from GS base, if it can be reached so. */
static bool is_near(const jit_unit *u, uint32_t index, int32_t *disp)
{
    int64_t d = cover_of(u)->map + index - (const uint8_t *)u->cpu;
    *disp = (int32_t)d;
    return d == *disp;
}

/* op reg, byte [T0 + disp] or gs:[disp] */
static void emit_byte(jit_writer *w, bool near, unsigned op, unsigned reg, int32_t disp)
{
    if (near) {
        e_r_gs(w, 4, op, reg, disp);
        return;
    }
    e_rex(w, 4, reg, 0, T0);
    if (op > 0xff) e8(w, op >> 8);
    e8(w, op & 0xff);
    e8(w, 0x80u | (reg & 7) << 3 | (T0 & 7));
    e32(w, (uint32_t)disp);
}

/* map[...] += times. Uses T0 and, if the flags must stay, T1. */
static void emit_sum(const jit_unit *u, jit_writer *w, const sum *s, bool keep_flags)
{
    bool has_base = false;
    for (unsigned i = 0; i < s->count; i++) {
        int32_t disp;
        bool near = is_near(u, s->index[i], &disp);
        if (!near) disp = (int32_t)s->index[i];
        if (!near && !has_base) {
            e_mov_imm(w, T0, (uint64_t)(uintptr_t)cover_of(u)->map);
            has_base = true;
        }
        if (keep_flags) {
            emit_byte(w, near, 0x0fb6, T1, disp); /* movzx r13d, byte */
            e_lea(w, 4, T1, T1, 0xff, 1, s->times[i]);
            emit_byte(w, near, 0x88, T1, disp);
        } else {
            emit_byte(w, near, 0x80, 0, disp); /* add byte, times */
            e8(w, s->times[i]);
        }
    }
}

/* x86_cover.rounds[at]++ */
static void emit_round(jit_writer *w, int at, bool keep_flags)
{
    int32_t disp = COVER(rounds) + at;
    if (keep_flags) {
        emit_byte(w, true, 0x0fb6, T1, disp);
        e_lea(w, 4, T1, T1, 0xff, 1, 1);
        emit_byte(w, true, 0x88, T1, disp);
    } else {
        emit_byte(w, true, 0x80, 0, disp);
        e8(w, 1);
    }
}

static void sum_before(const jit_unit *u, sum *s, unsigned insn)
{
    s->count = 0;
    for (unsigned k = 0; k < u->nedges && u->edges[k].insn < insn; k++) add(s, u->edges[k].index);
}

/* ---- the ring ---- */

/* Append a block's address: register `reg`, or the constant `rip` if reg is RSP. Uses `spare`, changes flags. */
static void emit_append(jit_writer *w, const jit_unit *u, unsigned spare, unsigned reg, uint64_t rip)
{
    e_gs_load(w, 8, spare, COVER(head));
    e_rex(w, 8, spare, 0, spare); /* mov spare, [spare] */
    e8(w, 0x8b), e8(w, 0x40u | (spare & 7) << 3 | (spare & 7)), e8(w, 0);
    e_alu_imm(w, 4, 4, spare, (int32_t)cover_of(u)->ring_mask);
    e_shift_imm(w, 8, 4, spare, 3);
    e_r_gs(w, 8, 0x03, spare, COVER(ring));
    if (reg != RSP) {
        e_rex(w, 8, reg, 0, spare);
        e8(w, 0x89), e8(w, 0x40u | (reg & 7) << 3 | (spare & 7)), e8(w, 0);
    } else
        for (unsigned half = 0; half < 2; half++) {
            e_rex(w, 4, 0, 0, spare);
            e8(w, 0xc7), e8(w, 0x40u | (spare & 7)), e8(w, 4 * half), e32(w, (uint32_t)(rip >> (32 * half)));
        }
    e_gs_load(w, 8, spare, COVER(head));
    e_rex(w, 8, 0, 0, spare); /* add qword [spare], 1 */
    e8(w, 0x83), e8(w, 0x40u | (spare & 7)), e8(w, 0), e8(w, 1);
}

/* T0 = the flags; and back. Both use T1. */
static void emit_flags_to_t0(jit_writer *w)
{
    e_mov(w, 8, T1, RAX);
    e8(w, 0x9f);                           /* lahf */
    e8(w, 0x0f), e8(w, 0x90), e8(w, 0xc0); /* seto al */
    e_mov(w, 8, T0, RAX);
    e_mov(w, 8, RAX, T1);
}
static void emit_flags_from_t0(jit_writer *w)
{
    e_mov(w, 8, T1, RAX);
    e_mov(w, 8, RAX, T0);
    e8(w, 0x04), e8(w, 0x7f); /* add al, 127: OF */
    e8(w, 0x9e);              /* sahf */
    e_mov(w, 8, RAX, T1);
}

/* ---- leaving a block ---- */

void jit_cover_edge(jit_unit *u, jit_writer *w, unsigned i, uint64_t target, bool keep_flags)
{
    if (!cover_of(u)->is_on) return;
    bool is_own = is_counted(u, i);
    if (cover_of(u)->map) {
        sum s = {.count = 0};
        uint32_t index = x86_cover_index(cover_of(u), u->insn_rip[i], target);
        bool is_round = u->nedges && is_own && target == u->rip && i + 1 == u->count;
        int at = is_round ? place_of_rounds(u, index) : -1;
        if (at >= 0)
            emit_round(w, at, keep_flags);
        else if (u->edge_code && !keep_flags)
            jit_cover_leave(u, w, i);
        else
            sum_before(u, &s, i);
        if (is_own && at < 0) add(&s, index);
        emit_sum(u, w, &s, keep_flags);
    }
    if (!cover_of(u)->ring || !is_own) return;
    if (keep_flags) emit_flags_to_t0(w);
    emit_append(w, u, T1, RSP, target);
    if (keep_flags) emit_flags_from_t0(w);
}

/* A non-canonical address is not entered, for the branch is going to fault. */
static void append_dynamic(jit_unit *u, jit_writer *w, unsigned reg, unsigned spare)
{
    uint8_t *skip = NULL;
    if (u->key & JIT_KEY_64) {
        e_mov(w, 8, spare, reg);
        e_shift_imm(w, 8, 4, spare, 16);
        e_shift_imm(w, 8, 7, spare, 16); /* sar */
        e_rr(w, 8, 0x39, reg, spare);
        skip = e_jcc(w, CC_NE);
    }
    emit_append(w, u, spare, reg, 0);
    if (skip) e_patch(skip, w->p);
}

/* The hash of `reg` is made in `spare`, which may be neither `reg` nor anything that is needed. */
static void emit_dynamic(jit_unit *u, jit_writer *w, unsigned i, unsigned reg, unsigned spare, bool take_back)
{
    const x86_cover *c = cover_of(u);
    if (c->map) {
        uint32_t from = vm_coverage_id(u->insn_rip[i]) >> 1 & c->mask;
        e_rex(w, 8, spare, 0, reg); /* imul spare, reg, constant */
        e8(w, 0x69), e8(w, 0xc0u | (spare & 7) << 3 | (reg & 7)), e32(w, 0x7f4a7c15);
        e_shift_imm(w, 8, 5, spare, 15);
        e_alu_imm(w, 4, 4, spare, (int32_t)c->mask);
        e_alu_imm(w, 4, 6, spare, (int32_t)from);
        e_r_gs(w, 8, 0x03, spare, COVER(map));
        e_rex(w, 4, 0, 0, spare); /* add or sub byte [spare], 1 */
        e8(w, 0x80), e8(w, (take_back ? 0x68u : 0x40u) | (spare & 7)), e8(w, 0), e8(w, 1);
    }
    if (c->ring && !take_back) append_dynamic(u, w, reg, spare);
}

void jit_cover_indirect(jit_unit *u, jit_writer *w, unsigned i, unsigned reg)
{
    if (!cover_of(u)->is_on) return;
    unsigned spare = reg == T0 ? T1 : T0;
    if (u->edge_code) jit_cover_leave(u, w, i);
    for (unsigned k = 0; !u->edge_code && k < u->nedges; k++) {
        e_mov_imm(w, spare, (uint64_t)(uintptr_t)(cover_of(u)->map + u->edges[k].index));
        e_rex(w, 4, 0, 0, spare);
        e8(w, 0x80), e8(w, 0x40u | (spare & 7)), e8(w, 0), e8(w, 1); /* add byte [spare], 1 */
    }
    if (is_counted(u, i)) emit_dynamic(u, w, i, reg, spare, false);
}

void jit_cover_undo_indirect(jit_unit *u, jit_writer *w, unsigned i, unsigned reg, unsigned spare)
{
    if (cover_of(u)->is_on && is_counted(u, i)) emit_dynamic(u, w, i, reg, spare, true);
}

/* One routine that counts all edges inside the block, the last one first: its end is what is due earlier. */
void jit_cover_stubs(jit_unit *u, jit_writer *w)
{
    if (!u->nedges) return;
    for (unsigned k = u->nedges; k-- > 0;) {
        u->edges[k].code = w->p;
        e_mov_imm(w, T1, (uint64_t)(uintptr_t)(cover_of(u)->map + u->edges[k].index));
        e_rex(w, 4, 0, 0, T1);
        e8(w, 0x80), e8(w, 0x40u | (T1 & 7)), e8(w, 0), e8(w, 1);
    }
    e8(w, 0xc3);
    u->edge_code = u->edges[0].code;
}

void jit_cover_leave(jit_unit *u, jit_writer *w, unsigned insn)
{
    unsigned n = 0;
    while (n < u->nedges && u->edges[n].insn < insn) n++;
    if (!n) return;
    if (u->edge_code) {
        e_call_to(w, u->edges[n - 1].code);
        return;
    }
    sum s;
    sum_before(u, &s, insn);
    emit_sum(u, w, &s, false);
}

void jit_cover_add(x86_cpu *cpu, const jit_block *b, unsigned insn, int sign)
{
    for (unsigned k = 0; k < b->nedges && b->edges[k].insn < insn; k++)
        cpu->cover.map[b->edges[k].index] += (uint8_t)sign;
}

void jit_cover_rounds(jit *j, x86_cpu *cpu)
{
    for (unsigned i = 0; i < X86_ROUNDS; i++) {
        const jit_block *b = j->rounds[i];
        uint8_t times = cpu->cover.rounds[i];
        if (times) {
            for (unsigned k = 0; k < b->nedges; k++) cpu->cover.map[b->edges[k].index] += times;
            cpu->cover.map[b->round_index] += times;
            cpu->cover.rounds[i] = 0;
        }
        if (j->has_ended_rounds && !j->in_code && b && b->is_dead) j->rounds[i] = NULL;
    }
    if (!j->in_code) j->has_ended_rounds = false;
}

/* In the middle of its own code a block may go round once more. */
void jit_cover_forget(jit *j, const jit_block *b)
{
    j->has_ended_rounds |= b && j->in_code;
    for (unsigned i = 0; i < X86_ROUNDS; i++)
        if (!b || (j->rounds[i] == b && !j->in_code)) j->rounds[i] = NULL;
    if (!b) j->has_rounds = j->has_ended_rounds = false;
}
