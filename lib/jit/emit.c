/* emit.c - IR to x86-64 code.
 *
 * Register plan. GS base points at the x86_cpu, so its fields need no register. Guest RAX RCX RDX RBX RBP RSI RDI live
 * in the host registers of the same name, guest R12-R15 in host R8-R11 and guest RSP in host R12, across blocks. Host
 * R13 and R14 are scratch (R14 the address), R15 counts instructions down, RSP is the host's stack. Guest XMM/YMM
 * registers and MXCSR are the host's in blocks with JIT_KEY_VEC.
 *
 * Frame. Guest R8-R11, the flags' slots, the windows' limits and the groups' addresses lie in a frame on the host's
 * stack (JIT_FRAME_*): [RSP + disp8] is the shortest address there is, and processors forward such stores to loads
 * almost without latency, so a guest register there costs little more than a host's. These four are what compilers use
 * least: 6 % of the registers that instructions of Python, libc or gcc name, where R12-R15, which keep their values
 * across calls, are 14. The thunks copy the frame from and to the x86_cpu, which C looks at.
 *
 * Flags. The guest's arithmetic flags are the host's flags wherever an instruction needs them. An address check
 * destroys them, and whoever looks at the CPU (a fault, a callback, the run loop) wants them exact, so at each point
 * the emitter knows up to three sources: the host's flags (`host`), a saved image in JIT_SLOT_FLAGS (`mem`), or a
 * recipe: the last instruction that wrote them can be done again on registers nobody has changed since (CMP and TEST as
 * they are, ADD and SUB by inverting, logic from its result). A recipe costs nothing on the fast path: it is carried
 * out in the stubs. A recipe that will not last (`late`: a register of it changes while somebody may still ask) is put
 * into memory as such just before.
 *
 * Checks. `mov r13d, r14d; shr; and; xor r14, tag; cmp r14, 4096 - size; ja slow; add r14, host`: see cpu.h. A slow
 * stub asks C for a host pointer (RAM after a TLB fill, or a bounce buffer), makes the access again from its own copy,
 * and lets C store a bounced write. A read-modify-write that cannot have a direct pointer is done whole by C.
 */
#include <sys/mman.h>
#include "jit/frame.h"
#include "x86/native.h"

typedef struct slow_stub {
    uint8_t *jump[2]; /* the fast path's jumps here: miss, misaligned */
    uint8_t *resume;  /* after the access (a group's: after its lookup) */
    uint8_t *hit;     /* windows: after the check */
    const jit_op *check, *access;
    uint32_t site;
    bool save, regen, restore; /* flags: as the fast path had them */
    bool either;               /* in memory, as an image or as a recipe */
    int recipe;
} slow_stub;

typedef struct leave_stub {
    uint8_t *jump;
    uint64_t rip;
    jit_link *link;
    int recipe;
    uint8_t reason, index;
    bool rip_in_tmp, save, regen;
    uint8_t tmp_reg;
    unsigned branch; /* rip_in_tmp: the branch itself and how it moved the stack, to take it back */
    int32_t sp_delta;
} leave_stub;

/* Where a SIDE or GUARD leaves, emitted after the block with the state as it was at the jump. */
typedef struct side_stub {
    uint8_t *jump;
    const jit_op *op;
    bool host, mem, image;
    int recipe, late;
    unsigned tmp_reg;
    int32_t sp;
} side_stub;

/* A division that may fault. */
typedef struct div_stub {
    uint8_t *jump[2], *resume;
    unsigned insn;
} div_stub;

/* A fallback whose usual case is inline. */
typedef struct usual_stub {
    uint8_t *jump[JIT_USUAL_JUMPS], *resume;
    unsigned jumps;
    uint32_t site;
} usual_stub;

/* A hook's call, when the block is left after it; or the question at the entry whether a block begins. */
typedef struct hook_stub {
    uint8_t *jump, *entry, *dead, *resume;
    uint32_t site;
    unsigned insn;
    bool is_direct, is_access;
} hook_stub;

typedef struct emitter {
    jit_unit *u;
    jit *j;
    jit_writer *w;
    jit_block *block;
    bool host, mem; /* where the flags are now */
    bool image;     /* `mem` is known to be an image, not a recipe */
    int recipe;     /* instruction that can be done again, or -1 */
    int late;       /* the same, but only here: its registers will change */
    unsigned nslow, nleave, nside, nlink;
    unsigned ndiv, nhook, nusual;
    int last_hook; /* instruction before which a hook was called directly and registers stored, or -1 */
    bool goes_on;  /* the edge to come is no branch's */
    bool is_loose; /* a part of an instruction may have called a callback and not left */
    int failed;       /* instruction that could not be spelled, or JIT_NONE or JIT_FULL */
    const uint8_t *code_end; /* nothing is begun behind these: there is room for one more op or stub */
    size_t data_end;
    unsigned tmp_reg; /* host register that holds the temporary, or RSP: it is in its slot */
    int t0_group;     /* slot of the group whose address T0 holds, or -1 */
    int32_t sp;       /* not yet added to the stack pointer: settle_sp() before anybody can look at it */
    uint32_t insn_at[JIT_MAX_INSNS]; /* keep_insn(); 0: not yet */
    side_stub side[JIT_MAX_SIDES]; /* from here on not cleared for each block */
    div_stub div[JIT_MAX_INSNS];
    usual_stub usual[JIT_MAX_INSNS];
    hook_stub hook[2 * JIT_MAX_INSNS];
    slow_stub slow[JIT_MAX_SITES];
    leave_stub leaves[JIT_MAX_INSNS + 4 * JIT_MAX_SIDES + 8];
} emitter;

/* ---- flags ---- */

static void emit_restore(jit_writer *w) { emit_restore_from(w, 0); }
static bool recipe_uses_t1(const jit_unit *u, int i)
{
    const x86_operand *op = u->insn[i].op;
    return JIT_IN_FRAME(op[0].reg) || (op[1].kind == X86_OP_GPR && JIT_IN_FRAME(op[1].reg));
}

/* The flags as a recipe in memory: kind and width in JIT_SLOT_FLAGS, operands beside it. C evaluates it if anybody
 * asks. */
static void emit_lazy(emitter *e, int i)
{
    const x86_insn *in = &e->u->insn[i];
    const x86_operand *a = &in->op[0], *b = &in->op[1];
    jit_writer *w = e->w;
    unsigned kind = jit_recipe_kind(in);
    if (!JIT_IN_FRAME(a->reg))
        frame_store(w, 8, home[a->reg], JIT_FRAME_FLAG_A);
    else {
        frame_load(w, 8, T1, JIT_FRAME_REG(a->reg));
        frame_store(w, 8, T1, JIT_FRAME_FLAG_A);
    }
    if (kind != JIT_RECIPE_LOGIC && b->kind == X86_OP_IMM && (int64_t)in->imm == (int16_t)in->imm) {
        frame_op(w, 4, 0xc7, 0, JIT_FRAME_FLAGS);
        e32(w, JIT_LAZY_FLAGS(kind, a->size) | JIT_LAZY_IMM | (uint32_t)(in->imm << 16));
        return;
    }
    if (kind != JIT_RECIPE_LOGIC && b->kind == X86_OP_IMM) {
        frame_op(w, 8, 0xc7, 0, JIT_FRAME_FLAG_B);
        e32(w, (uint32_t)in->imm);
    } else if (kind != JIT_RECIPE_LOGIC && !JIT_IN_FRAME(b->reg))
        frame_store(w, 8, home[b->reg], JIT_FRAME_FLAG_B);
    else if (kind != JIT_RECIPE_LOGIC) {
        frame_load(w, 8, T1, JIT_FRAME_REG(b->reg));
        frame_store(w, 8, T1, JIT_FRAME_FLAG_B);
    }
    frame_op(w, 4, 0xc7, 0, JIT_FRAME_FLAGS);
    e32(w, JIT_LAZY_FLAGS(kind, a->size));
}

/* Can the flags of instruction i be made again from registers? Which registers must stay. */
static bool recipe_regs(const x86_insn *in, uint16_t *regs)
{
    *regs = 0;
    if (in->flags & (X86_IF_MEM | X86_IF_VEC) || in->nops != 2 || in->op[0].kind != X86_OP_GPR) return false;
    const x86_operand *a = &in->op[0], *b = &in->op[1];
    if (a->size < 4 || (b->kind != X86_OP_GPR && b->kind != X86_OP_IMM)) return false;
    *regs = (uint16_t)(1u << a->reg);
    switch (jit_recipe_kind(in)) {
    case JIT_RECIPE_ADD:
    case JIT_RECIPE_SUB:
        if (b->kind == X86_OP_GPR && b->reg == a->reg) return false;
        /* fallthrough */
    case JIT_RECIPE_CMP:
    case JIT_RECIPE_TEST:
        if (b->kind == X86_OP_GPR) *regs |= (uint16_t)(1u << b->reg);
        return true;
    case JIT_RECIPE_LOGIC: return true;
    default: return false;
    }
}

/* Recipe i holds as long as anybody may want its flags. */
static bool recipe_holds(const jit_unit *u, unsigned i)
{
    uint16_t regs, changed = 0;
    if (u->info[i].written != X86_FL_ARITH || !recipe_regs(&u->insn[i], &regs)) return false;
    for (unsigned k = i + 1; k < u->count; k++) {
        if ((u->info[k].can_leave || u->info[k].host_at) && (changed & regs)) return false;
        if (u->info[k].is_side && (jit_changed_regs(&u->insn[k]) & regs)) return false; /* GUARD: after the change */
        if (u->info[k].falls_back) return true;
        if (u->info[k].written) return u->info[k].written == X86_FL_ARITH || !u->info[k].host_at;
        changed |= jit_changed_regs(&u->insn[k]);
    }
    return !(changed & regs);
}

/* op T/reg, operand b of a recipe. `n` is the group-1 number: 0 add, 5 sub, 7 cmp; 8 stands for test. */
static void recipe_op(jit_writer *w, unsigned size, unsigned n, unsigned reg, const x86_insn *in)
{
    const x86_operand *b = &in->op[1];
    if (b->kind == X86_OP_IMM) {
        if (n == 8) {
            e_rex(w, size, 0, 0, reg);
            e8(w, 0xf7);
            e8(w, 0xc0u | (reg & 7));
            e32(w, (uint32_t)in->imm);
        } else
            e_alu_imm(w, size, n, reg, (int32_t)in->imm);
    } else if (JIT_IN_FRAME(b->reg))
        frame_op(w, size, n == 8 ? 0x85 : n << 3 | 3, reg, JIT_FRAME_REG(b->reg));
    else
        e_rr(w, size, n == 8 ? 0x85 : n << 3 | 1, home[b->reg], reg);
}

/* Carry out recipe i: the host's flags become the guest's. Uses T1 only. */
static void emit_regen(emitter *e, int i)
{
    const x86_insn *in = &e->u->insn[i];
    const x86_operand *a = &in->op[0];
    unsigned size = a->size, kind = jit_recipe_kind(in), reg = T1;
    bool is_result = kind == JIT_RECIPE_ADD || kind == JIT_RECIPE_SUB;
    if (JIT_IN_FRAME(a->reg))
        frame_load(e->w, size, T1, JIT_FRAME_REG(a->reg));
    else if (is_result)
        e_mov(e->w, size, T1, home[a->reg]);
    else
        reg = home[a->reg];
    switch (kind) {
    case JIT_RECIPE_CMP: recipe_op(e->w, size, 7, reg, in); break;
    case JIT_RECIPE_TEST: recipe_op(e->w, size, 8, reg, in); break;
    case JIT_RECIPE_LOGIC: e_rr(e->w, size, 0x85, reg, reg); break;
    case JIT_RECIPE_ADD:
        recipe_op(e->w, size, 5, T1, in);
        recipe_op(e->w, size, 0, T1, in);
        break;
    case JIT_RECIPE_SUB:
        recipe_op(e->w, size, 0, T1, in);
        recipe_op(e->w, size, 5, T1, in);
        break;
    }
}

static bool recoverable(const emitter *e) { return e->mem || e->recipe >= 0; }

static void need_mem(emitter *e)
{
    if (e->mem) return;
    int recipe = e->recipe >= 0 ? e->recipe : e->late;
    if (recipe >= 0)
        emit_lazy(e, recipe);
    else
        emit_save(e->w);
    e->image = recipe < 0;
    e->mem = true;
}

/* The host's flags are about to be destroyed: make them recoverable. */
static void before_clobber(emitter *e)
{
    if (!recoverable(e) && e->host) need_mem(e);
}

static void need_host(emitter *e)
{
    if (e->host) return;
    if (e->recipe >= 0)
        emit_regen(e, e->recipe);
    else if (e->image)
        emit_restore(e->w);
    else
        e_call_to(e->w, e->j->flags); /* left by another block, either way */
    e->host = true;
}

/* Instruction i has executed natively. */
static void after_insn(emitter *e, unsigned i)
{
    const jit_info *f = &e->u->info[i];
    if (!f->written && !(e->u->insn[i].flags_maybe & X86_FL_ARITH)) return;
    e->host = true;
    e->mem = false;
    uint16_t regs;
    e->recipe = recipe_holds(e->u, i) ? (int)i : -1;
    e->late = e->recipe < 0 && f->written == X86_FL_ARITH && recipe_regs(&e->u->insn[i], &regs) ? (int)i : -1;
}

/* Instruction i comes next: does it change a register of the late recipe, and might its flags be wanted after that? */
static void before_insn(emitter *e, unsigned i)
{
    uint16_t regs;
    if (e->late < 0 || e->late == (int)i) return;
    recipe_regs(&e->u->insn[e->late], &regs);
    if (!e->u->info[i].falls_back && !(jit_changed_regs(&e->u->insn[i]) & regs)) return;
    if (e->u->info[i].exact_at) need_mem(e);
    e->late = -1;
}

/* ---- guest instructions with host registers ---- */

static void emit_reg_load(jit_writer *w, unsigned size, unsigned host, unsigned guest)
{
    if (JIT_IN_FRAME(guest))
        frame_load(w, size, host, JIT_FRAME_REG(guest));
    else
        e_mov(w, size, host, home[guest]);
}

static unsigned home_or_none(unsigned reg) { return reg < 16 ? home[reg] : 0xff; }

/* Where an access finds its operand: [T0 + disp], gs:[T0 + distance of the window], or gs:[guest registers + ...]. */
typedef struct place {
    uint8_t base, index, scale;
    int32_t disp;
} place;

static place access_place(const emitter *e, const jit_op *o)
{
    place p = {T0, 0xff, 1, o->disp};
    if (!o->window) return p;
    int64_t delta = e->j->window_delta[o->window - 1];
    if (!o->is_direct) {
        p.disp += (int32_t)delta;
        return p;
    }
    const jit_op *ea = o - 2;
    const x86_insn *in = &e->u->insn[o->insn];
    delta -= (int64_t)e->j->window_gpa[o->window - 1];
    if (ea->op == IR_EA) {
        p.base = (uint8_t)home_or_none(in->base);
        p.index = (uint8_t)home_or_none(in->index);
        p.scale = in->scale;
        delta += in->disp;
        if (in->base == X86_REG_RIP) delta += (int64_t)(e->u->insn_rip[o->insn] + in->length);
    } else {
        p.base = ea->op == IR_EA_SP ? R12 : RBP;
        delta += ea->imm;
    }
    p.disp = (int32_t)(delta + (p.base == R12 ? e->sp : 0));
    return p;
}

/* The stack pointer as the guest has it. Flags untouched. */
static void settle_sp(emitter *e)
{
    if (e->sp) e_lea(e->w, e->u->key & JIT_KEY_64 ? 8 : 4, R12, R12, 0xff, 1, e->sp);
    e->sp = 0;
}

/* MOV between registers, or of an immediate, where one is in memory: an instruction instead of up to three. */
static bool emit_frame_move(emitter *e, const x86_insn *in)
{
    jit_writer *w = e->w;
    const x86_operand *to = &in->op[0], *from = &in->op[1];
    if (!jit_insn_is_mov(in) || to->kind != X86_OP_GPR || to->reg >= 16 || to->size < 4) return false;
    if (from->kind == X86_OP_IMM && JIT_IN_FRAME(to->reg) && to->size == 8 && (int64_t)in->imm == (int32_t)in->imm) {
        frame_op(w, 8, 0xc7, 0, JIT_FRAME_REG(to->reg));
        e32(w, (uint32_t)in->imm);
        return true;
    }
    if (from->kind != X86_OP_GPR || from->reg >= 16 || !(JIT_IN_FRAME(to->reg) || JIT_IN_FRAME(from->reg))) return false;
    bool is_plain = to->size == 8 && !JIT_IN_FRAME(from->reg);
    unsigned reg = !JIT_IN_FRAME(to->reg) ? home[to->reg] : is_plain ? home[from->reg] : T1;
    if (!is_plain) emit_reg_load(w, to->size, reg, from->reg);
    if (JIT_IN_FRAME(to->reg)) frame_store(w, 8, reg, JIT_FRAME_REG(to->reg));
    return true;
}

/* Spell instruction i with guest registers renamed; memory-resident ones are loaded into scratch registers and stored
 * back. `o` is the access with its memory operand, or NULL. */
static void emit_renamed(emitter *e, unsigned i, const jit_op *o)
{
    const x86_insn *in = &e->u->insn[i];
    x86_rename map;
    uint8_t spare[2] = {0}, used[2] = {0};
    unsigned nused = 0;
    bool is_t0_kept = in->flags & X86_IF_MEM, is_t1_taken = false; /* T0 is the address until memory has been read */
    if (jit_insn_names_sp(in)) settle_sp(e);
    if (emit_frame_move(e, in)) return;
    x86_rename_init(&map);
    memcpy(map.gpr, home, sizeof home);
    map.mem_kind = X86_RENAME_MEM_BASE;
    map.mem_base = T0;
    if (o) {
        place p = access_place(e, o);
        map.mem_base = p.base;
        map.mem_index = p.index;
        map.mem_scale = p.scale;
        map.mem_disp = p.disp;
        map.mem_gs = o->window;
    }
    for (unsigned k = 0; k < in->nops; k++) {
        const x86_operand *o = &in->op[k];
        if (o->kind != X86_OP_GPR || !JIT_IN_FRAME(o->reg)) continue;
        bool is_known = (nused > 0 && used[0] == o->reg) || (nused > 1 && used[1] == o->reg);
        if (is_known) continue;
        bool only_writes = jit_insn_only_writes(in, k),
             takes_t0 = is_t1_taken || (is_t0_kept && !nused && only_writes && jit_frame_operands(in) > 1);
        if (nused == 2 || (takes_t0 && is_t0_kept && !only_writes)) {
            e->failed = (int)i;
            return;
        }
        used[nused] = o->reg;
        spare[nused] = takes_t0 ? T0 : T1;
        if (takes_t0)
            e->t0_group = -1;
        else
            is_t1_taken = true;
        map.gpr[o->reg] = spare[nused];
        if (!only_writes) frame_load(e->w, 8, spare[nused], JIT_FRAME_REG(o->reg));
        nused++;
    }
    if (in->flags & X86_IF_LOCK) e8(e->w, 0xf0);
    unsigned n = x86_reencode(in, &map, e->w->p);
    if (!n) {
        e->failed = (int)i;
        return;
    }
    e->w->p += n;
    uint16_t changed = jit_changed_regs(in);
    for (unsigned k = 0; k < nused; k++)
        if (changed >> used[k] & 1) frame_store(e->w, 8, spare[k], JIT_FRAME_REG(used[k]));
}

static void emit_lea(emitter *e, const jit_op *o)
{
    const unsigned i = o->insn;
    const x86_insn *in = &e->u->insn[i];
    unsigned dst = in->op[0].reg, reg = JIT_IN_FRAME(dst) ? T0 : home[dst];
    if (dst == X86_RSP || in->base == X86_RSP) settle_sp(e);
    e->t0_group = -1;
    unsigned size = in->osz == 8 && in->asz == 8 ? 8 : 4;
    if (in->base == X86_REG_RIP) {
        uint64_t v = e->u->insn_rip[i] + in->length + (uint64_t)in->disp;
        e_mov_imm(e->w, reg, size == 8 ? v : (uint32_t)v);
    } else if (in->base == X86_NOREG && in->index == X86_NOREG)
        e_mov_imm(e->w, reg, size == 8 ? (uint64_t)in->disp : (uint32_t)in->disp);
    else {
        unsigned base = in->base == X86_NOREG ? 0xff : JIT_IN_FRAME(in->base) ? T0 : home[in->base];
        unsigned index = in->index == X86_NOREG ? 0xff : JIT_IN_FRAME(in->index) ? T1 : home[in->index];
        if (base == T0) frame_load(e->w, 8, T0, JIT_FRAME_REG(in->base));
        if (index == T1) frame_load(e->w, 8, T1, JIT_FRAME_REG(in->index));
        e_lea(e->w, size, reg, base, index, in->scale, (int32_t)in->disp);
    }
    if (reg == T0) frame_store(e->w, 8, T0, JIT_FRAME_REG(dst));
}

/* T0 = an address. A plain register is moved, which takes no time: each address waits for it. */
static void emit_sum(jit_writer *w, unsigned size, unsigned base, unsigned index, unsigned scale, int32_t disp)
{
    if (base != 0xff && index == 0xff && !disp) {
        if (base != T0 || size == 4) e_mov(w, size, T0, base);
    } else
        e_lea(w, size, T0, base, index, scale, disp);
}

/* T0 = linear address of instruction i's memory operand; flags untouched. */
static void emit_ea(emitter *e, const jit_op *o)
{
    unsigned i = o->insn;
    const x86_insn *in = &e->u->insn[i];
    unsigned size = in->asz == 8 ? 8 : 4;
    bool is_64 = e->u->key & JIT_KEY_64;
    if (in->base == X86_REG_RIP || (in->base == X86_NOREG && in->index == X86_NOREG)) {
        uint64_t v = (uint64_t)in->disp;
        if (in->base == X86_REG_RIP) v += e->u->insn_rip[i] + in->length;
        v += (uint64_t)(int64_t)o->adjust;
        e_mov_imm(e->w, T0, size == 8 ? v : (uint32_t)v);
    } else {
        unsigned base = in->base == X86_NOREG ? 0xff : JIT_IN_FRAME(in->base) ? T0 : home[in->base];
        unsigned index = in->index == X86_NOREG ? 0xff : JIT_IN_FRAME(in->index) ? T1 : home[in->index];
        if (base == T0) frame_load(e->w, 8, T0, JIT_FRAME_REG(in->base));
        if (index == T1) frame_load(e->w, 8, T1, JIT_FRAME_REG(in->index));
        emit_sum(e->w, size, base, index, in->scale, (int32_t)(in->disp + o->adjust));
    }
    if (in->seg == X86_FS || in->seg == X86_GS) {
        e_gs_load(e->w, is_64 ? 8 : 4, T1,
                  (int32_t)(offsetof(x86_cpu, seg) + in->seg * sizeof(x86_seg) + offsetof(x86_seg, base)));
        e_lea(e->w, is_64 ? 8 : 4, T0, T0, T1, 1, 0);
    }
}

/* T0 = what an EA op makes; flags untouched. The stack pointer is settled. */
static void emit_pointer(emitter *e, const jit_op *o)
{
    unsigned size = e->u->key & JIT_KEY_64 ? 8 : 4;
    switch (o->op) {
    case IR_EA_SP: emit_sum(e->w, size, R12, 0xff, 1, (int32_t)o->imm + o->adjust); break;
    case IR_EA_BP: emit_sum(e->w, size, RBP, 0xff, 1, o->adjust); break;
    default: emit_ea(e, o); break;
    }
}

/* op reg, operand of the access */
static void emit_mem(emitter *e, const jit_op *o, unsigned op, unsigned reg)
{
    place p = access_place(e, o);
    if (o->window) e8(e->w, 0x65);
    e_r_mem(e->w, o->size, op, reg, p.base, p.index, p.scale, p.disp);
}

/* The one access after a CHECK, through [T0]. The same code serves the fast path and the slow stub. */
static void emit_access(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;

    switch (o->op) {
    case IR_ACCESS: emit_renamed(e, o->insn, o); break;
    case IR_PUSH_REG:
        if (o->reg == X86_RSP) settle_sp(e);
        if (JIT_IN_FRAME(o->reg)) {
            frame_load(w, 8, T1, JIT_FRAME_REG(o->reg));
            emit_mem(e, o, 0x89, T1);
        } else
            emit_mem(e, o, 0x89, home[o->reg]);
        break;
    case IR_PUSH_IMM:
        if (o->imm == (int32_t)o->imm || o->size == 4) {
            emit_mem(e, o, 0xc7, 0);
            e32(w, (uint32_t)o->imm);
        } else {
            e_mov_imm(w, T1, (uint64_t)o->imm);
            emit_mem(e, o, 0x89, T1);
        }
        break;
    case IR_PUSH_TMP:
        frame_load(w, 8, T1, JIT_FRAME_TMP);
        emit_mem(e, o, 0x89, T1);
        break;
    case IR_POP_REG:
        if (JIT_IN_FRAME(o->reg)) {
            emit_mem(e, o, 0x8b, T1);
            frame_store(w, 8, T1, JIT_FRAME_REG(o->reg));
        } else
            emit_mem(e, o, 0x8b, home[o->reg]);
        if (o->reg == X86_RSP) e->sp = 0;
        break;
    case IR_LOAD_TMP:
        emit_mem(e, o, 0x8b, T1);
        if (!o->reg) frame_store(w, 8, T1, JIT_FRAME_TMP);
        break;
    case IR_LEAVE_SP:
        e_mov(w, o->size, T1, RBP);
        emit_mem(e, o, 0x8b, RBP);
        e_lea(w, o->size, R12, T1, 0xff, 1, o->size);
        e->sp = 0;
        break;
    }
}

/* ---- sites and stubs ---- */

/* Nothing but the answer of a device is of interest to this access: see ask_device(). */
static bool is_quick_form(const jit_unit *u, const x86_insn *in, const jit_op *check)
{
    return check && check->role != JIT_CHECK_LEADER && check->align <= 1 &&
           (check->access == X86_READ || check->access == X86_WRITE) && check->size <= 8 &&
           !(check->size & (check->size - 1)) && (in->mode == 8 || (in->seg != X86_FS && in->seg != X86_GS)) &&
           !(u->key & JIT_KEY_X87) && !u->cpu->cover.is_on;
}

/* In the arena, once for all of an instruction's sites. */
static uint32_t keep_insn(emitter *e, unsigned i)
{
    if (!e->insn_at[i]) {
        x86_insn *in = jit_take(e->j, sizeof *in);
        *in = e->u->insn[i];
        e->insn_at[i] = (uint32_t)((uint8_t *)in - e->j->arena);
    }
    return e->insn_at[i];
}

/* A PUSH or CALL of memory stores on the stack what it has loaded from elsewhere. */
static unsigned segment_of(const x86_insn *in, const jit_op *check, bool is_single)
{
    bool is_stack = !(in->flags & X86_IF_MEM) || (check && check->access == X86_WRITE && jit_insn_pushes(in));
    return is_single || !is_stack ? in->seg : X86_SS;
}

static uint32_t new_site_of(emitter *e, unsigned i, const jit_op *check, bool is_single, size_t bytes)
{
    jit *j = e->j;
    const x86_insn *in = &e->u->insn[i];
    bool is_whole = !check || bytes != sizeof(jit_site) || (is_single && check->access == (X86_READ | X86_WRITE)) ||
                    jit_insn_is_x87(in);
    uint32_t insn = is_whole ? keep_insn(e, i) : 0;
    jit_site *s = jit_take(j, bytes);
    uint32_t at = (uint32_t)((uint8_t *)s - j->arena);
    s->insn = insn;
    s->rip = e->u->insn_rip[i];
    s->next = s->rip + in->length;
    s->target = in->op[0].kind == X86_OP_REL ? s->next + in->imm : 0;
    if (in->mode != 8) s->next = (uint32_t)s->next, s->target = (uint32_t)s->target;
    s->flags = in->flags;
    s->mode = in->mode;
    s->seg = (uint8_t)segment_of(in, check, is_single);
    s->may_redo = jit_insn_may_redo(in);
    s->block = e->block;
    s->index = (uint16_t)i;
    s->access = check ? check->access : 0;
    s->size = check ? check->size : 0;
    s->align = check ? check->align : 0;
    s->leader_size = s->in_window = 0;
    if (check && check->role == JIT_CHECK_LEADER) {
        s->span = check->span;
        s->leader_size = check->size;
        s->leader_access = check->access;
        s->leader_disp = check->disp;
        s->in_window = check->window;
        s->access = check->span_access;
    }
    s->is_single = is_single;
    s->is_end = false;
    s->in_shadow = jit_in_shadow(e->u, i);
    s->is_quick = is_single && !s->in_shadow && is_quick_form(e->u, in, check);
    return at;
}
static uint32_t new_site(emitter *e, unsigned i, const jit_op *check, bool is_single)
{
    return new_site_of(e, i, check, is_single, sizeof(jit_site));
}

static leave_stub *new_leave(emitter *e, unsigned reason, uint8_t *jump)
{
    leave_stub *s = &e->leaves[e->nleave++];
    memset(s, 0, sizeof *s);
    s->reason = (uint8_t)reason;
    s->jump = jump;
    s->recipe = e->recipe;
    s->regen = !e->mem && e->recipe >= 0;
    s->save = !e->mem;
    return s;
}

/* Without paging: T0 is an offset into a window (EA took its address off). */
static void emit_window_lookup(emitter *e, slow_stub *s)
{
    jit_writer *w = e->w;
    frame_op(w, 8, 0x3b, T0, JIT_FRAME_LIMIT + s->check->window - 1);
    s->jump[0] = e_jcc(w, CC_AE);
    s->hit = w->p;
}

/* The lookup itself: T0 from linear to host, or to the slow stub. */
static void emit_lookup(emitter *e, slow_stub *s, unsigned size, bool is_write)
{
    jit_writer *w = e->w;
    unsigned align = s->check->align;
    if (align > 1) { /* a window begins with a page: an offset will do */
        e_rex(w, 1, 0, 0, T0);
        e8(w, 0xf6), e8(w, 0xc0 | (T0 & 7)), e8(w, align - 1u); /* test r14b, align - 1 */
        s->jump[1] = e_jcc(w, CC_NE);
    }
    if (s->check->window) {
        emit_window_lookup(e, s);
        return;
    }
    s->jump[0] = emit_tlb_lookup(e->u, size, is_write);
}

static uint32_t offset_of(const emitter *e, const uint8_t *code) { return (uint32_t)(code - e->j->write_base); }

static jit_link *new_link(emitter *e, uint64_t target, uint32_t key)
{
    jit_link *l = &e->block->links[e->nlink++];
    l->from = e->block;
    l->target = target;
    l->key = key;
    return l;
}

static void emit_leave_stub(emitter *e, leave_stub *s);

/* Nothing between op k and the jump needs the scratch registers: the temporary can stay where it is. */
static bool tmp_can_stay(const emitter *e, unsigned k)
{
    const jit_unit *u = e->u;
    bool is_quiet = e->mem || (e->recipe >= 0 && !recipe_uses_t1(u, e->recipe));
    for (k++; k < u->nops && u->ops[k].op == IR_ADD_SP; k++)
        ;
    if (k < u->nops && (u->ops[k].op == IR_GUARD || u->ops[k].op == IR_GUARD_CALL)) return recoverable(e) || !e->host;
    return is_quiet && k < u->nops && u->ops[k].op == IR_JUMP_TMP;
}

/* LOAD_TMP: `reg` set if the temporary need not go to its slot. */
static void keep_tmp(emitter *e, const jit_op *access)
{
    if (access->op == IR_LOAD_TMP) e->u->ops[access - e->u->ops].reg = tmp_can_stay(e, (unsigned)(access - e->u->ops));
}

/* Data hooks: T0 is the host address, and stays. */
static void emit_access_hook(emitter *e, const jit_op *check, const jit_op *access)
{
    jit_writer *w = e->w;
    hook_stub *s = &e->hook[e->nhook++];
    uint32_t at = new_site_of(e, check->insn, check, true, sizeof(jit_hook_site));
    jit_hook_site *h = (jit_hook_site *)(e->j->arena + at);
    jit_access_fill(e->u, h, check, access);
    *s = (hook_stub){.site = at, .insn = check->insn, .is_direct = jit_hook_is_direct(e->u), .is_access = true};
    if (s->is_direct) {
        s->jump = jit_access_call(e->u, w, h, at, e->last_hook);
        e->last_hook = (int)check->insn;
        return;
    }
    e_gs_store(w, 8, T0, JIT_SLOT(JIT_SLOT_HOOK_HOST));
    e_mov_imm(w, T1, at);
    e_call_to(w, e->j->hook[jit_level(e->u->key)]);
    e_rr(w, 8, 0x85, T0, T0);
    s->jump = e_jcc(w, CC_NE);
    e_gs_load(w, 8, T0, JIT_SLOT(JIT_SLOT_HOOK_HOST));
}

static void emit_check(emitter *e, const jit_op *check, const jit_op *access)
{
    jit_writer *w = e->w;
    const jit_info *f = &e->u->info[check->insn];
    bool live = f->host_at != 0, is_leader = check->role == JIT_CHECK_LEADER;
    if (check->role == JIT_CHECK_MEMBER || check->is_direct) {
        if (!check->window && e->t0_group != check->slot) {
            frame_load(w, 8, T0, JIT_FRAME_GROUP + check->slot);
            e->t0_group = check->slot;
        }
        if (live) need_host(e);
        keep_tmp(e, access);
        emit_access(e, access);
        return;
    }
    bool is_hooked = jit_access_hooked(e->u, check->access);
    if (is_hooked) {
        need_mem(e);
        e_gs_store(w, 8, T0, JIT_SLOT(JIT_SLOT_HOOK_LA));
    }
    before_clobber(e);
    e->t0_group = is_leader && !check->window ? check->slot : -1;
    slow_stub *s = &e->slow[e->nslow++];
    e->is_loose |= access->op != IR_ACCESS;
    memset(s, 0, sizeof *s);
    s->check = check;
    s->access = access;
    s->recipe = e->recipe;
    s->regen = s->save = !e->mem && e->recipe >= 0;
    s->either = e->mem && !e->image;
    s->site = new_site(e, check->insn, check, access->op == IR_ACCESS);
    if (access->target) ((jit_site *)(e->j->arena + s->site))->target = access->target;
    emit_lookup(e, s, is_leader ? check->span : check->size,
                (is_leader ? check->span_access : check->access) & X86_WRITE);
    if (is_leader) {
        s->resume = w->p;
        if (!check->window) frame_store(w, 8, T0, JIT_FRAME_GROUP + check->slot);
    }
    e->host = false;
    if (is_hooked) emit_access_hook(e, check, access);
    if (live) {
        need_host(e);
        s->restore = true;
    }
    keep_tmp(e, access);
    emit_access(e, access);
    if (!is_leader) s->resume = w->p;
}

/* A group's span was not in the TLB: C finds it whole, or a block without groups goes on from here. T0 = the address;
 * the flags are in memory. */
static void emit_leader_stub(emitter *e, slow_stub *s)
{
    jit_writer *w = e->w;
    unsigned vec = jit_level(e->u->key), i = s->check->insn;
    uint8_t *crosses = NULL;
    if (!s->check->window) {
        e_mov(w, 4, T1, T0);
        e_alu_imm(w, 4, 4, T1, 4095);
        e_alu_imm(w, 4, 7, T1, 4096 - s->check->span);
        crosses = e_jcc(w, CC_A);
    }
    e_mov_imm(w, T1, s->site);
    e_call_to(w, e->j->begin[vec]);
    e_rr(w, 8, 0x85, T0, T0);
    e_jcc_to(w, CC_NE, s->resume);
    if (crosses) e_patch(crosses, w->p);
    jit_cover_leave(e->u, w, i);
    e_lea(w, 8, CNT, CNT, 0xff, 1, -(int32_t)i);
    jit_link *l = new_link(e, e->u->insn_rip[i], e->block->key | JIT_KEY_PLAIN);
    l->needs_mem_entry = true;
    uint8_t *jump = e_jmp(w);
    l->jump = offset_of(e, jump);
    leave_stub *leave = new_leave(e, JIT_LEAVE_LINK, jump);
    leave->rip = l->target;
    leave->link = l;
    leave->save = leave->regen = false;
    emit_leave_stub(e, leave);
    e->nleave--;
}

/* T0 = host address as an offset into the access's window (which it need not be in). Flags are not needed here. */
static void emit_host_to_offset(emitter *e, const slow_stub *s)
{
    jit_writer *w = e->w;
    e_r_gs(w, 8, 0x2b, T0, JIT_SLOT(JIT_SLOT_SELF));
    e_alu_imm(w, 8, 5, T0, e->j->window_delta[s->check->window - 1]);
}

static void emit_offset_to_linear(emitter *e, const slow_stub *s)
{
    e_lea(e->w, e->u->key & JIT_KEY_64 ? 8 : 4, T0, T0, 0xff, 1, (int32_t)e->j->window_gpa[s->check->window - 1]);
}

/* Outside the window there may still be RAM: try the TLB before C. */
static void emit_outside(emitter *e, const slow_stub *s, bool is_write)
{
    jit_writer *w = e->w;
    emit_offset_to_linear(e, s);
    uint8_t *miss = emit_tlb_lookup(e->u, s->check->size, is_write);
    emit_host_to_offset(e, s);
    e_jmp_to(w, s->hit);
    e_patch(miss, w->p);
}

/* After a missed lookup: T0 = the linear address, from the registers again. Another vCPU may have taken the tag away meanwhile. A group
 * outside its window is given up: its members rely on it. */
static void emit_address_again(emitter *e, const slow_stub *s, bool is_write)
{
    const bool is_leader = s->check->role == JIT_CHECK_LEADER;
    if (s->check->window && !is_leader) emit_outside(e, s, is_write);
    if (!s->check->window || !is_leader) emit_pointer(e, s->check - 1);
    if (s->check->window) emit_offset_to_linear(e, s);
}

/* After a slow access that is the whole instruction: does a callback want the run loop now? */
static void emit_leave_check(emitter *e, const slow_stub *s)
{
    unsigned i = s->check->insn;
    bool in_host = s->restore || e->u->info[i].written || (e->u->insn[i].flags_maybe & X86_FL_ARITH);
    e_mov_imm(e->w, T1, s->site);
    e_call_to(e->w, e->j->check[jit_level(e->u->key)][in_host]);
}

/* The flags of before the access. A device is asked without making an image of what another block has left. */
static void emit_slow_restore(emitter *e, const slow_stub *s)
{
    if (s->restore && s->either)
        e_call_to(e->w, e->j->flags);
    else if (s->restore)
        emit_restore(e->w);
}

static void emit_slow_stub(emitter *e, slow_stub *s)
{
    jit_writer *w = e->w;
    jit *j = e->j;
    unsigned vec = jit_level(e->u->key);
    bool is_leader = s->check->role == JIT_CHECK_LEADER;
    unsigned access = is_leader ? s->check->span_access : s->check->access;
    bool is_write = access & X86_WRITE, is_read = access & X86_READ;
    if (s->check->window && s->jump[1]) { /* misaligned: C raises that */
        e_patch(s->jump[1], w->p);
        emit_offset_to_linear(e, s);
        s->jump[1] = e_jmp(w);
    }
    e_patch(s->jump[0], w->p);
    emit_address_again(e, s, is_write);
    if (s->jump[1]) e_patch(s->jump[1], w->p);
    if (s->regen) emit_regen(e, s->recipe);
    if (s->save) emit_save(w);
    if (is_leader) {
        emit_leader_stub(e, s);
        return;
    }
    e_mov_imm(w, T1, s->site);
    e_call_to(w, j->begin[vec]);
    uint8_t *handled = NULL;
    if (is_write && is_read) {
        e_rr(w, 8, 0x85, T0, T0);
        handled = e_jcc(w, CC_E);
    }
    if (s->check->window) emit_host_to_offset(e, s);
    emit_slow_restore(e, s);
    emit_access(e, s->access);
    if (is_write && !is_read) {
        e_mov_imm(w, T1, s->site);
        e_call_to(w, j->commit[vec]);
        emit_slow_restore(e, s);
    }
    if (s->access->op == IR_ACCESS) emit_leave_check(e, s);
    e_jmp_to(w, s->resume);
    if (handled) {
        e_patch(handled, w->p);
        emit_restore(w);
        e_jmp_to(w, s->resume);
    }
}

/* A branch to a non-canonical address faults itself: take its stack movement back and let the interpreter do it again.
 */
static void emit_canonical_test(emitter *e, const leave_stub *s)
{
    jit_writer *w = e->w;
    e_mov(w, 8, T1, T0);
    e_shift_imm(w, 8, 4, T1, 16);
    e_shift_imm(w, 8, 7, T1, 16); /* sar */
    e_rr(w, 8, 0x39, T0, T1);
    uint8_t *fine = e_jcc(w, CC_E);
    if (s->sp_delta) e_lea(w, 8, R12, R12, 0xff, 1, -s->sp_delta);
    jit_cover_undo_indirect(e->u, w, s->branch, T0, T1);
    e_lea(w, 8, CNT, CNT, 0xff, 1, 1);
    e_mov_imm(w, T0, e->u->insn_rip[s->branch]);
    e_mov_imm(w, T1, JIT_LEAVE_STEP);
    e_jmp_to(w, e->j->leave[jit_level(e->u->key)]);
    e_patch(fine, w->p);
}

static void emit_leave_stub(emitter *e, leave_stub *s)
{
    jit_writer *w = e->w;
    if (s->jump) e_patch(s->jump, w->p);
    if (s->link) s->link->stub = offset_of(e, w->p);
    if (s->rip_in_tmp) {
        if (s->tmp_reg == RSP)
            frame_load(w, 8, T0, JIT_FRAME_TMP);
        else if (s->tmp_reg != T0)
            e_mov(w, 8, T0, s->tmp_reg);
        e_gs_store(w, 8, T0, JIT_OFF(rip));
        if (e->u->key & JIT_KEY_64) emit_canonical_test(e, s);
    }
    unsigned level = jit_level(e->u->key);
    if (s->regen) emit_regen(e, s->recipe);
    if (s->index) jit_cover_leave(e->u, w, s->index);
    if (s->index) e_lea(w, 8, CNT, CNT, 0xff, 1, -(int32_t)s->index);
    if (s->link) {
        e_mov_imm(w, T0, (uint64_t)(uintptr_t)s->link);
        e_jmp_to(w, e->j->leave_link[level][s->save]);
        return;
    }
    if (s->rip_in_tmp)
        e_gs_load(w, 8, T0, JIT_OFF(rip));
    else
        e_mov_imm(w, T0, s->rip);
    if (s->reason == JIT_LEAVE_SLICE) {
        e_jmp_to(w, e->j->leave_slice[level][s->save]);
        return;
    }
    if (s->save) emit_save(w);
    e_mov_imm(w, T1, s->reason);
    e_jmp_to(w, e->j->leave[level]);
}

/* ---- control flow ---- */

static int32_t jump_offset(const jit_unit *u, bool is_code)
{
    return (int32_t)(offsetof(x86_cpu, jump) + jit_table_index(u->key) * sizeof(x86_jumps) +
                     (is_code ? offsetof(x86_jumps, code) : offsetof(x86_jumps, rip)));
}

static void emit_count(emitter *e, unsigned n) { e_alu_imm(e->w, 8, 5, CNT, (int32_t)n); }

/* One edge of the block, after instruction i: count, maybe leave, go. */
static void emit_edge(emitter *e, unsigned i, uint64_t target, unsigned need)
{
    jit_unit *u = e->u;
    unsigned count = u->count ? i + 1 : 0;
    jit_writer *w = e->w;
    bool same_page = !((target ^ u->rip) & X86_PAGE_MASK),
         is_chained = (u->key & JIT_KEY_CHAIN) || (same_page && !jit_crosses_page(u, target));
    bool host = e->host, is_live = same_page && is_chained && (need & JIT_NEED_HOST), counted = true,
         goes_down = target > u->insn_rip[i] && !u->path; /* a path may go round */
    jit_cover_edge(u, w, i, target, is_live && goes_down);
    jit_hook_edge(u, w, i, e->goes_on);
    e->goes_on = false;
    if (is_live && goes_down) {
        counted = false;
        e_lea(w, 8, CNT, CNT, 0xff, 1, -(int32_t)count);
    } else {
        emit_count(e, count);
        if (is_live || !is_chained) new_leave(e, JIT_LEAVE_SLICE, e_jcc(w, CC_S))->rip = target;
        e->host = false;
        if (is_live) need_host(e);
    }
    if (is_chained) {
        jit_link *l = new_link(e, target, e->block->key & ~JIT_KEY_PLAIN);
        l->needs_mem_entry = !same_page;
        uint8_t *jump = counted && !is_live ? e_jcc(w, CC_NS) : e_jmp(w);
        l->jump = offset_of(e, jump);
        leave_stub *s = new_leave(e, JIT_LEAVE_LINK, jump);
        s->rip = target;
        s->link = l;
        if (e->host) s->regen = false;
        if (counted && !is_live) new_leave(e, JIT_LEAVE_SLICE, e_jmp(w))->rip = target;
    } else {
        int32_t at = (int32_t)((target & (X86_JUMP_ENTRIES - 1)) << 3);
        e_mov_imm(w, T0, target);
        e_r_gs(w, 8, 0x3b, T0, jump_offset(u, false) + at);
        new_leave(e, JIT_LEAVE_INDIRECT, e_jcc(w, CC_NE))->rip = target;
        e8(w, 0x65), e8(w, 0xff), e8(w, 0x24), e8(w, 0x25); /* jmp gs:[disp32] */
        e32(w, (uint32_t)(jump_offset(u, true) + at));
    }
    e->host = host;
}

/* How much the ADD_SP ops of instruction i move the stack pointer. */
static int32_t sp_delta_of(const jit_unit *u, unsigned i)
{
    int32_t delta = 0;
    for (unsigned k = 0; k < u->nops; k++)
        if (u->ops[k].insn == i && u->ops[k].op == IR_ADD_SP) delta += (int32_t)u->ops[k].imm;
    return delta;
}

static void new_indirect_leave(emitter *e, unsigned i, unsigned reason, unsigned cc)
{
    leave_stub *s = new_leave(e, reason, e_jcc(e->w, cc));
    s->rip_in_tmp = true;
    s->tmp_reg = (uint8_t)e->tmp_reg;
    s->branch = i;
    s->sp_delta = sp_delta_of(e->u, i);
}

/* Instruction i goes where the temporary says. */
static void emit_indirect(emitter *e, unsigned i)
{
    jit_writer *w = e->w;
    need_mem(e);
    if (e->u->cpu->cover.is_on && e->tmp_reg == RSP) {
        frame_load(w, 8, T0, JIT_FRAME_TMP);
        e->tmp_reg = T0;
    }
    jit_cover_indirect(e->u, w, i, e->tmp_reg);
    jit_hook_edge(e->u, w, i, false);
    emit_count(e, i + 1);
    new_indirect_leave(e, i, JIT_LEAVE_SLICE, CC_S);
    if (e->tmp_reg == RSP || e->tmp_reg == T1) {
        if (e->tmp_reg == RSP)
            frame_load(w, 8, T0, JIT_FRAME_TMP);
        else
            e_mov(w, 8, T0, T1);
        e->tmp_reg = T0;
    }
    e_rr(w, 4, 0x0fb7, T1, e->tmp_reg); /* movzx: the low 16 bits are the index */
    e_r_gs8(w, 8, 0x3b, e->tmp_reg, T1, jump_offset(e->u, false));
    new_indirect_leave(e, i, JIT_LEAVE_INDIRECT, CC_NE);
    e_r_gs8(w, 4, 0xff, 4, T1, jump_offset(e->u, true)); /* jmp gs:[r13 * 8 + disp32] */
}

/* The flags that edges want, before the branch itself (nothing of this changes the host's flags). */
static void prepare_edges(emitter *e, unsigned need, bool is_live)
{
    if (need & JIT_NEED_MEM) need_mem(e);
    if (is_live && !e->host) need_host(e);
    before_clobber(e);
}

static void emit_jcc(emitter *e, const jit_op *o)
{
    unsigned need = e->u->edge_need[0] | e->u->edge_need[1];
    prepare_edges(e, need, o->cc < CC_CXZ || (need & JIT_NEED_HOST));
    bool is_loop = o->target <= e->u->insn_rip[o->insn]; /* then the jump back is the straight way */
    unsigned first = is_loop ? 0 : 1;
    uint8_t *other = e_jcc(e->w, is_loop ? o->cc ^ 1u : o->cc);
    bool host = e->host, mem = e->mem;
    emit_edge(e, o->insn, is_loop ? o->target : o->fall, e->u->edge_need[first]);
    e_patch(other, e->w->p);
    e->host = host;
    e->mem = mem;
    emit_edge(e, o->insn, is_loop ? o->fall : o->target, e->u->edge_need[!first]);
}

static void leave_by_side(emitter *e, const jit_op *o, unsigned cc)
{
    e->side[e->nside++] = (side_stub){.jump = e_jcc(e->w, cc),
                                      .op = o,
                                      .host = e->host,
                                      .mem = e->mem,
                                      .image = e->image,
                                      .recipe = e->recipe,
                                      .late = e->late,
                                      .tmp_reg = e->tmp_reg,
                                      .sp = e->sp};
}

static void emit_side(emitter *e, const jit_op *o)
{
    if (o->cc < CC_CXZ) need_host(e);
    leave_by_side(e, o, o->cc);
}

/* Did the temporary turn out as recorded? */
static void emit_guard(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    before_clobber(e);
    e->host = false;
    if ((int64_t)o->target == (int32_t)o->target && e->tmp_reg == RSP) {
        frame_op(w, 8, 0x81, 7, JIT_FRAME_TMP);
        e32(w, (uint32_t)o->target);
    } else if ((int64_t)o->target == (int32_t)o->target)
        e_alu_imm(w, 8, 7, e->tmp_reg, (int32_t)o->target);
    else {
        e->t0_group = -1;
        e_mov_imm(w, T0, o->target);
        if (e->tmp_reg == RSP)
            frame_op(w, 8, 0x3b, T0, JIT_FRAME_TMP);
        else
            e_rr(w, 8, 0x39, T0, e->tmp_reg);
    }
    leave_by_side(e, o, CC_NE);
}

/* It did not. In front of a CALL nothing has happened yet: the interpreter makes it. */
static void emit_guard_stub(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    if (o->op == IR_GUARD_CALL) {
        leave_stub *s = new_leave(e, JIT_LEAVE_GUARD, NULL);
        s->rip = e->u->insn_rip[o->insn];
        s->index = (uint8_t)o->insn;
        e_mov_imm(w, T0, (uint64_t)(uintptr_t)e->block);
        e_gs_store(w, 8, T0, JIT_SLOT(JIT_SLOT_LINK));
        emit_leave_stub(e, s);
        e->nleave--;
        return;
    }
    if (e->tmp_reg == RSP)
        frame_load(w, 8, T0, JIT_FRAME_TMP);
    else
        e_mov(w, 8, T0, e->tmp_reg);
    e->tmp_reg = T0;
    emit_indirect(e, o->insn);
}

static void emit_side_stub(emitter *e, const side_stub *s)
{
    unsigned need = e->u->info[s->op->insn].side_need;
    e_patch(s->jump, e->w->p);
    e->host = s->host;
    e->mem = s->mem;
    e->image = s->image;
    e->recipe = s->recipe;
    e->late = s->late;
    e->tmp_reg = s->tmp_reg;
    e->sp = s->sp;
    settle_sp(e);
    if (s->op->op != IR_SIDE) {
        emit_guard_stub(e, s->op);
        return;
    }
    prepare_edges(e, need, need & JIT_NEED_HOST);
    emit_edge(e, s->op->insn, s->op->target, need);
}

/* STI while no interrupt waits: none is taken before the next edge, which is behind the shadow. Returns the jump if one does. */
static uint8_t *emit_sti(jit_writer *w)
{
    e_r_gs(w, 1, 0x80, 7, JIT_OFF(irq_waiting)); /* cmp */
    e8(w, 0);
    uint8_t *waits = e_jcc(w, CC_NE);
    e_r_gs(w, 4, 0x81, 1, JIT_OFF(rflags)); /* or */
    e32(w, X86_FL_IF);
    return waits;
}

/* The usual case inline, what is left as a stub: the flags stay in memory as they were, or come back as an image. */
static bool emit_usual(emitter *e, const jit_op *o, uint32_t site)
{
    usual_stub *s = &e->usual[e->nusual];
    if (jit_string_form(e->u, o->insn)) {
        s->jumps = jit_emit_string(e->u, o->insn, s->jump);
    } else if (o->op == IR_FALLBACK && jit_insn_sets_if(e->u, o->insn)) {
        s->jumps = 1;
        s->jump[0] = emit_sti(e->w);
    } else {
        return false;
    }
    s->site = site;
    s->resume = e->w->p;
    e->nusual++;
    return true;
}

static void emit_fallback(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    need_mem(e);
    uint32_t at = new_site(e, o->insn, NULL, true);
    ((jit_site *)(e->j->arena + at))->is_end = o->op == IR_FALLBACK_END;
    e->host = false;
    e->recipe = e->late = -1;
    if (emit_usual(e, o, at)) return;
    e_mov_imm(w, T1, at);
    e_call_to(w, e->j->fallback[jit_level(e->u->key)]);
    e->mem = e->image = true;
}

static void emit_usual_stub(emitter *e, const usual_stub *s)
{
    for (unsigned k = 0; k < s->jumps; k++) e_patch(s->jump[k], e->w->p);
    e_mov_imm(e->w, T1, s->site);
    e_call_to(e->w, e->j->fallback[jit_level(e->u->key)]);
    e_jmp_to(e->w, s->resume);
}

/* DIV and IDIV, by a register or the temporary. What could raise #DE goes to the semantic function: DIV when the high half is not below
 * the divisor, IDIV unless the dividend is one half sign-extended and the divisor neither 0 nor -1. */
static void emit_div(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    const x86_insn *in = &e->u->insn[o->insn];
    bool is_signed = jit_insn_is_idiv(in), is_loaded = in->flags & X86_IF_MEM;
    unsigned size = in->op[0].size, reg = in->op[0].reg, divisor = is_loaded || JIT_IN_FRAME(reg) ? T0 : home[reg];
    need_mem(e);
    if (divisor == T0) frame_load(w, 8, T0, is_loaded ? JIT_FRAME_TMP : JIT_FRAME_REG(reg));
    div_stub *s = &e->div[e->ndiv++];
    *s = (div_stub){.insn = o->insn};
    if (is_signed) {
        e_mov(w, size, T1, RAX);
        e_shift_imm(w, size, 7, T1, size * 8 - 1);
        e_rr(w, size, 0x39, T1, RDX); /* cmp rdx, sign */
        s->jump[0] = e_jcc(w, CC_NE);
        e_lea(w, size, T1, divisor, 0xff, 1, 1);
        e_alu_imm(w, size, 7, T1, 1);
        s->jump[1] = e_jcc(w, CC_BE);
    } else {
        e_rr(w, size, 0x39, divisor, RDX); /* cmp rdx, divisor */
        s->jump[0] = e_jcc(w, CC_AE);
    }
    e->host = false;
    need_host(e); /* DIV keeps some of the flags that it may */
    e_rex(w, size, 0, 0, divisor);
    e8(w, 0xf7), e8(w, (is_signed ? 0xf8u : 0xf0u) | (divisor & 7));
    s->resume = w->p;
    e->host = true; /* undefined: what the host's DIV leaves, as the semantic function does */
    e->mem = e->image = false;
    e->recipe = e->late = -1;
}

static void emit_div_stub(emitter *e, const div_stub *s)
{
    jit_writer *w = e->w;
    unsigned level = jit_level(e->u->key);
    for (unsigned k = 0; k < 2; k++)
        if (s->jump[k]) e_patch(s->jump[k], w->p);
    e_mov_imm(w, T1, new_site(e, s->insn, NULL, true));
    e_call_to(w, e->j->fallback[level]);
    emit_restore(w);
    e_jmp_to(w, s->resume);
}

static void emit_move_tmp(emitter *e, const jit_op *o)
{
    bool is_wide = o->size == (e->u->key & JIT_KEY_64 ? 8 : 4) && o->size == 8;
    if (is_wide && !JIT_IN_FRAME(o->reg) && tmp_can_stay(e, (unsigned)(o - e->u->ops))) {
        e->tmp_reg = home[o->reg];
        return;
    }
    e->tmp_reg = RSP;
    emit_reg_load(e->w, o->size, T1, o->reg);
    frame_store(e->w, 8, T1, JIT_FRAME_TMP);
}

static void emit_flags_tmp(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    (void)o;
    need_host(e);
    before_clobber(e);
    e8(w, 0x9c); /* pushfq */
    emit_push_pop(w, T1, false);
    e_alu_imm(w, 4, 4, T1, X86_FL_ARITH);
    e_gs_load(w, 4, T0, JIT_OFF(rflags));
    e_alu_imm(w, 4, 4, T0, (int32_t) ~(uint32_t)(X86_FL_ARITH | X86_FL_RF | X86_FL_VM));
    e_rr(w, 4, 0x09, T0, T1); /* or */
    frame_store(w, 8, T1, JIT_FRAME_TMP);
    e->host = false;
}

static void emit_swapgs(emitter *e)
{
    const int32_t base = (int32_t)(offsetof(x86_cpu, seg) + X86_GS * sizeof(x86_seg) + offsetof(x86_seg, base));
    jit_writer *w = e->w;
    e->t0_group = -1;
    e_gs_load(w, 8, T0, base);
    e_gs_load(w, 8, T1, JIT_OFF(kernel_gs_base));
    e_gs_store(w, 8, T1, base);
    e_gs_store(w, 8, T0, JIT_OFF(kernel_gs_base));
}

static void emit_system(emitter *e, const jit_op *o)
{
    const unsigned i = o->insn;
    jit_writer *w = e->w;
    const x86_operand *op = e->u->insn[i].op;
    if (jit_insn_clears_if(&e->u->insn[i])) {
        before_clobber(e);
        e_r_gs(w, 4, 0x81, 4, JIT_OFF(rflags)); /* and */
        e32(w, ~(uint32_t)X86_FL_IF);
        e->host = false;
        return;
    }
    if (jit_insn_is_swapgs(&e->u->insn[i])) {
        emit_swapgs(e);
        return;
    }
    unsigned reg = JIT_IN_FRAME(op[0].reg) ? T1 : home[op[0].reg];
    e_r_gs(w, 4, 0x0fb7, reg, (int32_t)(offsetof(x86_cpu, seg) + op[1].reg * sizeof(x86_seg) + offsetof(x86_seg, sel)));
    if (reg == T1) frame_store(w, 8, T1, JIT_FRAME_REG(op[0].reg));
}

/* x87 keeps pointers to its last instruction and operand. Which it was is noted; C tells the image when it looks. */
static void note_x87(emitter *e, unsigned i)
{
    const x86_insn *in = &e->u->insn[i];
    jit_writer *w = e->w;
    if (!jit_insn_is_x87(in)) return;
    uint32_t site = new_site(e, i, NULL, true);
    e_r_gs(w, 4, 0xc7, 0, JIT_SLOT(JIT_SLOT_X87_LAST));
    e32(w, site);
    if (!(in->flags & X86_IF_MEM)) return;
    e_gs_load(w, 8, T1, JIT_SLOT(JIT_SLOT_X87_NEXT_LA));
    e_gs_store(w, 8, T1, JIT_SLOT(JIT_SLOT_X87_LA));
    e_r_gs(w, 4, 0xc7, 0, JIT_SLOT(JIT_SLOT_X87_LAST_MEM));
    e32(w, site);
}

/* Members of a group have their address from its slot, or spell it in the access. */
static bool needs_address(emitter *e, const jit_op *ea)
{
    const jit_op *check = ea + 1;
    if (check->is_direct || (check->role == JIT_CHECK_MEMBER && !check->window)) return false;
    settle_sp(e); /* the address, or a look from outside */
    e->t0_group = -1;
    return true;
}

static void emit_canon(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    before_clobber(e);
    frame_load(w, 8, T0, JIT_FRAME_TMP);
    e_mov(w, 8, T1, T0);
    e_shift_imm(w, 8, 4, T1, 16);
    e_shift_imm(w, 8, 7, T1, 16); /* sar */
    e_rr(w, 8, 0x39, T0, T1);
    leave_stub *s = new_leave(e, JIT_LEAVE_STEP, e_jcc(w, CC_NE));
    s->rip = e->u->insn_rip[o->insn];
    s->index = (uint8_t)o->insn;
    e->host = false;
}

/* Hooks before an instruction. */
static void emit_hook(emitter *e, const jit_op *o)
{
    jit_writer *w = e->w;
    jit *j = e->j;
    const jit_unit *u = e->u;
    hook_stub *s = &e->hook[e->nhook++];
    uint32_t at = new_site_of(e, o->insn, NULL, true, sizeof(jit_hook_site));
    jit_hook_site *h = (jit_hook_site *)(j->arena + at);
    jit_hook_fill(u, h, o->insn);
    *s = (hook_stub){.site = at, .insn = o->insn, .is_direct = jit_hook_is_direct(u)};
    const bool asks = h->hook && h->state == JIT_HOOK_ENTRY && h->event.kind != VM_HOOK_INSN && h->event.kind != VM_HOOK_FETCH;
    const bool is_image = !e->mem && e->recipe < 0 && e->late < 0; /* the flags will be one in T1: sooner there than from memory */
    jit_hook_flags flags = {.save = is_image && s->is_direct && !asks && !e->is_loose,
                            .restore = is_image && s->is_direct && !asks && u->info[o->insn].host_at};
    if (flags.save)
        e->mem = e->image = true;
    else
        need_mem(e);
    if (e->is_loose) {
        e_r_gs(w, 4, 0x83, 7, JIT_SLOT(JIT_SLOT_LEAVE)); /* cmp dword, 0 */
        e8(w, 0);
        s->dead = e_jcc(w, CC_NE);
    }
    if (asks) s->entry = jit_hook_entry(w);
    if (s->is_direct) {
        s->jump = jit_hook_call(u, w, h, at, e->last_hook, flags);
        e->last_hook = (int)o->insn;
    } else {
        e_mov_imm(w, T1, at);
        e_call_to(w, j->hook[jit_level(u->key)]);
        e_rr(w, 8, 0x85, T0, T0);
        s->jump = e_jcc(w, CC_NE);
    }
    s->resume = w->p;
    e->host = flags.restore;
}

static void emit_hook_leave(emitter *e, unsigned reason)
{
    e_gs_load(e->w, 8, T0, JIT_OFF(rip));
    e_mov_imm(e->w, T1, reason);
    e_jmp_to(e->w, e->j->leave[jit_level(e->u->key)]);
}

static void emit_hook_stub(emitter *e, const hook_stub *s)
{
    jit_writer *w = e->w;
    e_patch(s->jump, w->p);
    if (s->is_direct) {
        if (s->is_access) e_mov(w, 4, T0, RCX);
        e_mov_imm(w, T1, s->site);
        e_call_to(w, e->j->hook_left);
    } else
        jit_cover_leave(e->u, w, s->insn);
    emit_hook_leave(e, JIT_LEAVE_HOOKED);
    if (s->entry) {
        jit_hook_entry_stub(e->u, w, s->entry, s->resume);
        e_mov_imm(w, T0, e->u->insn_rip[s->insn]);
        e_mov_imm(w, T1, JIT_LEAVE_WATCHED);
        e_jmp_to(w, e->j->leave[jit_level(e->u->key)]);
    }
    if (!s->dead) return;
    e_patch(s->dead, w->p);
    jit_cover_leave(e->u, w, s->insn);
    jit_hook_leave(e->u, w, s->insn);
    e_lea(w, 8, CNT, CNT, 0xff, 1, -(int32_t)s->insn);
    e_mov_imm(w, T0, e->u->insn_rip[s->insn]);
    e_mov_imm(w, T1, JIT_LEAVE_LOOKUP);
    e_jmp_to(w, e->j->leave[jit_level(e->u->key)]);
}

static void op_native(emitter *e, const jit_op *o)
{
    if (e->u->info[o->insn].host_at) need_host(e);
    emit_renamed(e, o->insn, NULL);
    note_x87(e, o->insn);
    after_insn(e, o->insn);
}

static void op_ea(emitter *e, const jit_op *o)
{
    if (needs_address(e, o)) emit_pointer(e, o);
    if (jit_insn_is_x87(&e->u->insn[o->insn])) e_gs_store(e->w, 8, T0, JIT_SLOT(JIT_SLOT_X87_NEXT_LA));
}

/* With the access behind it. */
static void op_check(emitter *e, const jit_op *o)
{
    emit_check(e, o, o + 1);
    if (o[1].op == IR_LOAD_TMP) e->tmp_reg = o[1].reg ? T1 : RSP;
    note_x87(e, o->insn);
    if (o[1].op == IR_ACCESS) after_insn(e, o->insn);
}

static void op_add_sp(emitter *e, const jit_op *o) { e->sp += (int32_t)o->imm; }

static void op_jump(emitter *e, const jit_op *o)
{
    unsigned need = e->u->edge_need[0];
    prepare_edges(e, need, need & JIT_NEED_HOST);
    e->goes_on = o->goes_on;
    emit_edge(e, o->insn, o->target, need);
}

static void op_count_cx(emitter *e, const jit_op *o) { e_lea(e->w, e->u->insn[o->insn].asz, RCX, RCX, 0xff, 1, -1); }
static void op_jump_tmp(emitter *e, const jit_op *o) { emit_indirect(e, o->insn); }

/* The whole block: something has to be done first. */
static void op_need(emitter *e, const jit_op *o)
{
    unsigned reason = o->op == IR_NEED_STEP ? JIT_LEAVE_WATCHED : o->op == IR_NEED_X87 ? JIT_LEAVE_X87 : JIT_LEAVE_VEC;
    leave_stub *s = new_leave(e, reason, NULL);
    s->rip = e->u->rip;
    emit_leave_stub(e, s);
    e->nleave--;
}

/* Accesses are not here: they are done with their CHECK. */
static const struct {
    void (*emit)(emitter *e, const jit_op *o);
    bool is_seen;  /* the stack pointer may be looked at */
    bool loses_t0; /* uses the address register */
} op_forms[IR_COUNT] = {
    [IR_NATIVE] = {op_native},
    [IR_COUNT_CX] = {op_count_cx},
    [IR_LEA] = {emit_lea},
    [IR_EA] = {op_ea},
    [IR_EA_SP] = {op_ea},
    [IR_EA_BP] = {op_ea},
    [IR_CHECK] = {op_check},
    [IR_ADD_SP] = {op_add_sp},
    [IR_MOVE_TMP] = {emit_move_tmp},
    [IR_FLAGS_TMP] = {emit_flags_tmp, .loses_t0 = true},
    [IR_SYSTEM] = {emit_system},
    [IR_DIV] = {emit_div, .is_seen = true, .loses_t0 = true},
    [IR_CANON] = {emit_canon, .is_seen = true, .loses_t0 = true},
    [IR_FALLBACK] = {emit_fallback, .is_seen = true, .loses_t0 = true},
    [IR_FALLBACK_END] = {emit_fallback, .is_seen = true, .loses_t0 = true},
    [IR_HOOK] = {emit_hook, .is_seen = true, .loses_t0 = true},
    [IR_SIDE] = {emit_side},
    [IR_GUARD] = {emit_guard},
    [IR_GUARD_CALL] = {emit_guard},
    [IR_JUMP] = {op_jump, .is_seen = true},
    [IR_JCC] = {emit_jcc, .is_seen = true},
    [IR_JUMP_TMP] = {op_jump_tmp, .is_seen = true},
    [IR_NEED_VEC] = {op_need, .is_seen = true},
    [IR_NEED_X87] = {op_need, .is_seen = true},
    [IR_NEED_STEP] = {op_need, .is_seen = true},
};

static bool makes_address(const jit_op *o) { return o->op == IR_EA || o->op == IR_EA_SP || o->op == IR_EA_BP; }

static void emit_op(emitter *e, const jit_op *o)
{
    before_insn(e, o->insn);
    if (!op_forms[o->op].emit) return;
    if (op_forms[o->op].is_seen || (e->u->cpu->watch && makes_address(o))) settle_sp(e);
    if (op_forms[o->op].loses_t0) e->t0_group = -1;
    op_forms[o->op].emit(e, o);
}

/* The guest chose the instructions: what they come to is not only estimated. */
static bool goes_well(emitter *e, size_t more)
{
    if (e->failed == JIT_NONE && (e->w->p + more > e->code_end || e->j->arena_used > e->data_end)) e->failed = JIT_FULL;
    return e->failed == JIT_NONE;
}

static void emit_cover_stubs(emitter *e)
{
    if (goes_well(e, e->u->cpu->cover.is_on ? e->u->count * JIT_COVER_BYTES : 0u)) jit_cover_stubs(e->u, e->w);
}

static void emit_block(emitter *e)
{
    jit_unit *u = e->u;
    jit_block *b = e->block;
    b->entry_mem = e->w->p;
    if (u->entry_need & JIT_NEED_HOST) e_call_to(e->w, e->j->flags);
    b->entry = e->w->p;
    e->host = u->entry_need & JIT_NEED_HOST;
    e->mem = u->entry_need & JIT_NEED_MEM;
    e->image = false;
    e->recipe = e->late = e->t0_group = e->last_hook = -1;
    for (unsigned k = 0; k < u->nops && goes_well(e, 0); k++) emit_op(e, &u->ops[k]);
    if (u->path) emit_cover_stubs(e);
    for (unsigned k = 0; k < e->nside && goes_well(e, 0); k++) emit_side_stub(e, &e->side[k]);
    if (!u->path) emit_cover_stubs(e);
    for (unsigned k = 0; k < e->nhook && goes_well(e, 0); k++) emit_hook_stub(e, &e->hook[k]);
    for (unsigned k = 0; k < e->ndiv && goes_well(e, 0); k++) emit_div_stub(e, &e->div[k]);
    for (unsigned k = 0; k < e->nusual && goes_well(e, 0); k++) emit_usual_stub(e, &e->usual[k]);
    for (unsigned k = 0; k < e->nslow && goes_well(e, 0); k++) emit_slow_stub(e, &e->slow[k]);
    for (unsigned k = 0; k < e->nleave && goes_well(e, 0); k++) emit_leave_stub(e, &e->leaves[k]);
}

static void place_lists(emitter *e)
{
    jit_block *b = e->block;
    unsigned leaders = 0;
    for (unsigned k = 0; k < e->u->nops; k++) leaders += e->u->ops[k].role == JIT_CHECK_LEADER;
    b->nlinks = (uint8_t)(e->u->sides + 2 + leaders);
    b->links = jit_take(e->j, b->nlinks * sizeof *b->links);
    memset(b->links, 0, b->nlinks * sizeof *b->links);
    jit_place_extents(e->j, e->u, b, 0);
    b->nedges = (uint8_t)e->u->nedges;
    b->edges = jit_take(e->j, b->nedges * sizeof *b->edges);
    memcpy(b->edges, e->u->edges, b->nedges * sizeof *b->edges);
}

/* Memory for what comes next, a quarter of a megabyte at a time: one call of the host instead of a fault for each page. */
static void commit_ahead(jit *j)
{
    enum { STEP = 256 << 10, WRITE = 23 /* MADV_POPULATE_WRITE */, READ = 22 };
    size_t code = (size_t)(j->w.p - j->write_base), step;
    if (code > STEP / 4 && code + STEP / 4 > j->code_ready && j->code_ready < j->code_bytes) {
        step = j->code_bytes - j->code_ready < STEP ? j->code_bytes - j->code_ready : STEP;
        if (madvise(j->write_base + j->code_ready, step, WRITE) == 0)
            madvise(j->exec_base + j->code_ready, step, READ);
        j->code_ready += step;
    }
    if (j->arena_used > STEP / 4 && j->arena_used + STEP / 4 > j->arena_ready && j->arena_ready < j->arena_bytes) {
        step = j->arena_bytes - j->arena_ready < STEP ? j->arena_bytes - j->arena_ready : STEP;
        madvise(j->arena + j->arena_ready, step, WRITE);
        j->arena_ready += step;
    }
}

jit_block *jit_emit(jit_unit *u, int *failed)
{
    jit *j = u->j;
    emitter e;
    memset(&e, 0, offsetof(emitter, side));
    e.u = u;
    e.j = j;
    e.w = &j->w;
    e.failed = *failed = JIT_NONE;
    const size_t code = JIT_BLOCK_BYTES + u->count * (JIT_INSN_BYTES + (u->cpu->cover.is_on ? JIT_COVER_BYTES : 0u));
    const size_t data = u->count * JIT_INSN_DATA;
    if (!jit_make_room(j, code, JIT_BLOCK_DATA + data)) return NULL;
    e.code_end = j->w.p + code - JIT_ONE_BYTES;
    e.data_end = j->arena_used + JIT_LIST_DATA + data - JIT_ONE_BYTES;
    commit_ahead(j);
    uint8_t *start = j->w.p;
    size_t arena = j->arena_used;
    jit_block *b = e.block = jit_take(j, sizeof *b);
    memset(b, 0, sizeof *b);
    b->rip = u->rip;
    b->gpa = u->gpa;
    b->key = u->key;
    b->count = (uint16_t)u->count;
    u->block = b;
    jit_cover_unit(u);
    place_lists(&e);
    emit_block(&e);
    if (e.failed != JIT_NONE) {
        *failed = e.failed;
        if (j->has_rounds) jit_cover_forget(j, b);
        j->w.p = start;
        j->arena_used = arena;
        return NULL;
    }
    return b;
}
