/* opt.c - passes over a lifted block.
 *
 * Flags. Guest flags live in the host's flags; address checks destroy them. Backwards over the block we find, for each
 * instruction, which flags must really be in the host when it executes (host_at: somebody reads them before they are
 * written again) and which must at least be recoverable because the instruction may fault or leave (exact_at). The
 * emitter saves and restores only for these.
 *
 * Groups. Accesses at constant distances from one pointer usually lie on one page. Forwards over the block we follow
 * pointers as symbol + offset (through pushes, pops, LEA, ADD, MOV); accesses near each other on the same symbol form a
 * group, whose first member looks the whole span up once. When that fails (page end, a page with code, device memory)
 * execution goes on in another block, made without groups from that instruction on, so the group needs no second form;
 * a block that keeps failing for other reasons than a page end is made again without groups.
 *
 * Bounds. On the way we note how large a register's value can be: from AND and MOVZX, and from a comparison with a constant whose
 * branch the trace has not taken. Without paging, an operand that lies in the window whatever the register holds is not checked.
 */
#include "jit/jit.h"

static unsigned need_of(jit_unit *u, uint64_t rip)
{
    jit_extent seen;
    unsigned need = jit_flag_need(u, rip, &seen);
    if (seen.end > seen.begin && u->nextents < JIT_MAX_EXTENTS) u->extents[u->nextents++] = seen;
    return need;
}

static void edges_need(jit_unit *u)
{
    u->edge_need[0] = u->edge_need[1] = 0;
    for (unsigned i = 0; i < u->count; i++) u->info[i].is_side = false;
    for (unsigned k = 0; k < u->nops; k++) {
        const jit_op *o = &u->ops[k];
        switch (o->op) {
        case IR_SIDE:
            u->info[o->insn].is_side = true;
            u->info[o->insn].side_need = (uint8_t)need_of(u, o->target);
            break;
        case IR_GUARD:
            u->info[o->insn].is_side = true;
            u->info[o->insn].side_need = JIT_NEED_MEM;
            break;
        case IR_JCC:
            u->edge_need[1] = need_of(u, o->fall);
            /* fallthrough */
        case IR_JUMP: u->edge_need[0] = need_of(u, o->target); break;
        case IR_JUMP_TMP: u->edge_need[0] = JIT_NEED_MEM; break;
        default: break;
        }
    }
}

static void flag_pass(jit_unit *u)
{
    jit_extent own;
    u->entry_need = jit_flag_need(u, u->rip, &own);
    edges_need(u);
    unsigned need = u->edge_need[0] | u->edge_need[1];
    uint16_t host = need & JIT_NEED_HOST ? X86_FL_ARITH : 0;
    uint16_t exact = X86_FL_ARITH; /* every edge may leave for the run loop */
    for (unsigned i = u->count; i-- > 0;) {
        const x86_insn *in = &u->insn[i];
        jit_info *f = &u->info[i];
        jit_classify_flags(in, f);
        f->falls_back = (u->forced >> i & 1) || jit_insn_falls_back(u, in);
        f->can_leave = f->falls_back || f->is_side || u->hooked[i] || jit_insn_can_leave(u, in);
        if (f->is_side) {
            host |= f->side_need & JIT_NEED_HOST ? X86_FL_ARITH : 0;
            exact = X86_FL_ARITH;
        }
        f->exact_after = exact;
        jit_flags_before(in, f, &host, &exact);
    }
}

/* ---- groups ---- */

#define MAX_SPAN 256

typedef struct pointer {
    uint64_t symbol; /* base | index << 24 | scale << 48, each a value the block has met; 0: none */
    uint64_t offset;
} pointer;
typedef struct group {
    pointer at;
    uint64_t low;
    unsigned span, access, align, members, first;
    uint8_t slot;
    bool is_open;
} group;
typedef struct group_pass {
    jit_unit *u;
    pointer reg[16];
    jit_most most[16];
    unsigned compared; /* instruction that has just compared a register with a constant, + 1 */
    uint64_t next_symbol;
    unsigned count;
    group groups[JIT_GROUPS];
    uint8_t group_of[JIT_MAX_OPS]; /* CHECK op to group + 1 */
    uint64_t offset_of[JIT_MAX_OPS];
} group_pass;

static bool operand_pointer(const group_pass *g, unsigned i, pointer *p)
{
    const x86_insn *in = &g->u->insn[i];
    if (in->seg == X86_FS || in->seg == X86_GS || in->asz != (in->mode == 8 ? 8 : 4)) return false;
    *p = (pointer){0, (uint64_t)in->disp};
    if (in->base == X86_REG_RIP) p->offset += g->u->insn_rip[i] + in->length;
    if (in->base < 16) {
        p->symbol = g->reg[in->base].symbol;
        p->offset += g->reg[in->base].offset;
    }
    if (in->index < 16) {
        p->symbol |= g->reg[in->index].symbol << 24 | (uint64_t)in->scale << 48;
        p->offset += g->reg[in->index].offset * in->scale;
    }
    return true;
}

static bool has_home(unsigned reg) { return reg < 16 && !JIT_IN_FRAME(reg); }

/* The largest that a register in an address may be; UINT64_MAX: no telling, or not a register that can be spelled. */
static uint64_t most_of(const group_pass *g, unsigned reg)
{
    return has_home(reg) && reg != X86_RSP && !(g->most[reg].all >> 32) ? g->most[reg].all : UINT64_MAX;
}

/* Without paging: an operand at a fixed address, or one by registers of known range, that lies in the window whatever happens needs
 * no check at all. */
static bool is_static(const group_pass *g, const jit_op *c)
{
    const jit_unit *u = g->u;
    const x86_insn *in = &u->insn[c->insn];
    unsigned w = c->access & X86_WRITE ? 1 : 0;
    if ((u->key & (JIT_KEY_WINDOW | JIT_KEY_64)) != (JIT_KEY_WINDOW | JIT_KEY_64) || c[-1].op != IR_EA ||
        in->asz != 8 || in->seg == X86_FS || in->seg == X86_GS || c->align > 1 || jit_insn_is_x87(in))
        return false;
    uint64_t low = (uint64_t)in->disp - u->j->window_gpa[w], high = low,
             limit = u->cpu->jit_scratch[JIT_SLOT_WINDOW_LIMIT + w];
    if (in->base == X86_REG_RIP) high = low += u->insn_rip[c->insn] + in->length;
    if (in->base < 16) {
        if (most_of(g, in->base) == UINT64_MAX) return false;
        high += most_of(g, in->base);
    }
    if (in->index < 16) {
        if (most_of(g, in->index) == UINT64_MAX) return false;
        high += most_of(g, in->index) * in->scale;
    }
    int64_t disp = (int64_t)low + u->j->window_delta[w];
    return low < limit && high < limit && low <= high && disp == (int32_t)disp;
}

/* The address that the EA op before CHECK k makes. */
static bool check_pointer(const group_pass *g, unsigned k, pointer *p)
{
    const jit_op *ea = &g->u->ops[k - 1];
    switch (ea->op) {
    case IR_EA: return operand_pointer(g, ea->insn, p);
    case IR_EA_SP:
        *p = g->reg[X86_RSP];
        p->offset += (uint64_t)ea->imm;
        return true;
    case IR_EA_BP: *p = g->reg[X86_RBP]; return true;
    default: return false;
    }
}

/* Widen group q to hold [offset, offset + size) aligned as demanded; false when it does not fit. */
static bool join(group *q, uint64_t offset, unsigned size, unsigned align)
{
    int64_t at = (int64_t)(offset - q->low); /* absolute addresses can be any distance away */
    if (at < -MAX_SPAN || at > MAX_SPAN) return false;
    int64_t low = at < 0 ? at : 0, high = at + size > q->span ? at + size : q->span;
    unsigned a = align > q->align ? align : q->align;
    if (a > 1) { /* the span starts where the aligned members are aligned */
        int64_t anchor = align > 1 ? at : 0;
        if (q->align > 1 && align > 1 && (at & (a - 1))) return false;
        low -= (low - anchor) & (a - 1);
    }
    if (high - low > MAX_SPAN) return false;
    q->low += (uint64_t)low;
    q->span = (unsigned)(high - low);
    q->align = a;
    return true;
}

static void place_check(group_pass *g, unsigned k)
{
    jit_op *c = &g->u->ops[k];
    pointer p;
    if (is_static(g, c)) {
        c->is_direct = true;
        c->window = c->access & X86_WRITE ? 2 : 1;
        return;
    }
    if (!check_pointer(g, k, &p) || jit_in_shadow(g->u, c->insn) /* no leaving in front of it */ ||
        jit_insn_is_x87(&g->u->insn[c->insn])) /* x87 keeps each operand's address */
        return;
    g->offset_of[k] = p.offset;
    for (unsigned i = 0; i < g->count; i++) {
        group *q = &g->groups[i];
        if (q->is_open && q->at.symbol == p.symbol && join(q, p.offset, c->size, c->align)) {
            q->access |= c->access;
            q->members++;
            g->group_of[k] = (uint8_t)(i + 1);
            return;
        }
    }
    if (g->count == JIT_GROUPS) return;
    group *q = &g->groups[g->count];
    *q = (group){.at = p,
                 .low = p.offset,
                 .span = c->size,
                 .access = c->access,
                 .align = c->align,
                 .members = 1,
                 .first = k,
                 .slot = (uint8_t)g->count,
                 .is_open = true};
    g->group_of[k] = (uint8_t)(++g->count);
}

static void fresh(group_pass *g, unsigned r)
{
    g->reg[r] = (pointer){g->next_symbol++, 0};
    g->most[r] = jit_unbounded;
}

static void follow_insn(group_pass *g, unsigned i)
{
    const x86_insn *in = &g->u->insn[i];
    unsigned src = 0;
    int64_t imm;
    g->compared = jit_insn_compares(in) ? i + 1 : 0;
    switch (jit_pointer_move(in, &src, &imm)) {
    case JIT_MOVE_COPY:
        g->reg[in->op[0].reg] = (pointer){g->reg[src].symbol, g->reg[src].offset + (uint64_t)imm};
        g->most[in->op[0].reg] = imm ? jit_unbounded : g->most[src];
        return;
    case JIT_MOVE_ADD:
        g->reg[in->op[0].reg].offset += (uint64_t)imm;
        g->most[in->op[0].reg] = jit_unbounded;
        return;
    default: break;
    }
    jit_most before[16];
    memcpy(before, g->most, sizeof before);
    uint16_t changed = jit_changed_regs(in);
    for (unsigned r = 0; r < 16; r++)
        if (changed >> r & 1) fresh(g, r);
    jit_bound(in, before, g->most);
}

/* The trace goes on behind a branch right after a comparison with a constant: not above it, or equal. */
static void follow_side(group_pass *g, const jit_op *o)
{
    if (!g->compared || g->compared != o->insn) return;
    const x86_insn *in = &g->u->insn[g->compared - 1];
    uint64_t imm = in->imm;
    if (o->cc == CC_AE && imm)
        imm--;
    else if (o->cc != CC_A && o->cc != CC_NE)
        return;
    jit_most *most = &g->most[in->op[0].reg & 15];
    if (in->op[0].size == 8 && imm < most->all) most->all = imm;
    if (in->op[0].size >= 4 && (uint32_t)imm < most->low && (in->op[0].size == 4 || imm <= UINT32_MAX)) most->low = (uint32_t)imm;
    if (most->all <= UINT32_MAX && most->low < most->all) most->all = most->low;
}

static void follow(group_pass *g, unsigned k)
{
    const jit_op *o = &g->u->ops[k];
    switch (o->op) {
    case IR_NATIVE:
    case IR_SYSTEM:
    case IR_LEA:
    case IR_ACCESS:
    case IR_DIV: follow_insn(g, o->insn); break;
    case IR_CHECK: place_check(g, k); break;
    case IR_SIDE: follow_side(g, o); break;
    case IR_ADD_SP:
        g->reg[X86_RSP].offset += (uint64_t)o->imm;
        g->most[X86_RSP] = jit_unbounded;
        break;
    case IR_POP_REG: fresh(g, o->reg); break;
    case IR_LEAVE_SP:
        g->reg[X86_RSP] = (pointer){g->reg[X86_RBP].symbol, g->reg[X86_RBP].offset + o->size};
        g->most[X86_RSP] = jit_unbounded;
        fresh(g, X86_RBP);
        break;
    case IR_FALLBACK:
        for (unsigned r = 0; r < 16; r++) fresh(g, r);
        for (unsigned i = 0; i < g->count; i++) g->groups[i].is_open = false;
        break;
    default: break;
    }
}

static void settle(group_pass *g, unsigned k)
{
    jit_op *c = &g->u->ops[k], *ea = c - 1, *access = c + 1;
    const group *q = &g->groups[g->group_of[k] - 1];
    if (q->members < 2) return;
    c->role = q->first == k ? JIT_CHECK_LEADER : JIT_CHECK_MEMBER;
    c->slot = q->slot;
    c->disp = access->disp = (int16_t)(g->offset_of[k] - q->low);
    if (c->role != JIT_CHECK_LEADER) return;
    c->span = (uint16_t)q->span;
    c->align = (uint8_t)(q->align > 1 ? q->align : 1);
    c->span_access = (uint8_t)q->access;
    ea->adjust = -c->disp;
}

static void group_pass_run(jit_unit *u)
{
    group_pass g;
    g.u = u;
    g.next_symbol = 1;
    g.count = g.compared = 0;
    memset(g.group_of, 0, u->nops);
    for (unsigned r = 0; r < 16; r++) fresh(&g, r);
    for (unsigned k = 0; k < u->nops; k++) follow(&g, k);
    for (unsigned k = 0; k < u->nops; k++)
        if (g.group_of[k]) settle(&g, k);
}

/* ---- windows: without paging, accesses need a bounds check only, and what lies beside one that was checked needs none
 * ---- */

static unsigned window_of(const jit_unit *u, unsigned k)
{
    const jit_op *c = &u->ops[k], *ea = c - 1;
    const x86_insn *in = &u->insn[c->insn];
    bool is_leader = c->role == JIT_CHECK_LEADER;
    unsigned access = is_leader ? c->span_access : c->access, w = access & X86_WRITE ? 1 : 0;
    if (jit_insn_is_x87(in) || (is_leader ? c->span : c->size) > 256 ||
        (w && !u->cpu->jit_scratch[JIT_SLOT_WRITE_LIMIT]))
        return 0;
    int64_t disp = (int64_t)((uint64_t)in->disp + (uint64_t)(int64_t)ea->adjust - u->j->window_gpa[w]);
    if (ea->op == IR_EA && disp != (int32_t)disp && (in->base < 16 || in->index < 16)) return 0;
    if (ea->op == IR_EA && (u->key & JIT_KEY_64) && (in->asz != 8 || in->seg == X86_FS || in->seg == X86_GS)) return 0;
    return w + 1;
}

/* May member k be spelled as gs:[register + displacement]? */
static bool can_be_direct(const jit_unit *u, const jit_op *c, unsigned w)
{
    const jit_op *ea = c - 1;
    const x86_insn *in = &u->insn[c->insn];
    int64_t disp = (ea->op == IR_EA ? in->disp : ea->imm) + u->j->window_delta[w] - (int64_t)u->j->window_gpa[w];
    enum { ROOM = 1 << 20 }; /* for a stack pointer that is settled late */
    return (u->key & JIT_KEY_64) && disp - ROOM == (int32_t)(disp - ROOM) && disp + ROOM == (int32_t)(disp + ROOM) &&
           (ea->op != IR_EA || (has_home(in->base) && (in->index == X86_NOREG || has_home(in->index))));
}

static void window_pass(jit_unit *u)
{
    uint8_t by_slot[JIT_GROUPS] = {0};
    for (unsigned k = 1; k < u->nops; k++) {
        jit_op *c = &u->ops[k];
        if (c->op != IR_CHECK) continue;
        if (c->is_direct) { /* static */
            c[1].is_direct = c[-1].is_direct = true;
            c[1].window = c->window;
            continue;
        }
        c->window = (uint8_t)(c->role == JIT_CHECK_MEMBER ? by_slot[c->slot] : window_of(u, k));
        if (c->role == JIT_CHECK_LEADER) by_slot[c->slot] = c->window;
        if (c->window && c->role == JIT_CHECK_MEMBER)
            c->is_direct = c[1].is_direct = can_be_direct(u, c, c->window - 1u);
        if (c->window) c[-1].adjust -= (int32_t)u->j->window_gpa[c->window - 1];
        if (c->window && c->role == JIT_CHECK_MEMBER) c[1].disp = 0; /* it makes its own address */
        c[1].window = c->window;
        c[-1].is_direct = c->is_direct;
    }
}

void jit_optimise(jit_unit *u)
{
    flag_pass(u);
    if (!u->no_groups) group_pass_run(u);
    if (u->key & JIT_KEY_WINDOW) window_pass(u);
}
