/* hook.c - hooks in translated code. See lib/core/hook.h.
 *
 * Which hooks an instruction has is known when it is translated, so the call is compiled in front of it: IR_HOOK. An edit
 * drops the blocks that a hook on little code concerns. What all code depends on, hooks on much of it and data hooks that
 * see every access, makes a shape, which is part of each block's key: blocks of several shapes stay side by side, and adding
 * what was there before finds them again. With no vector registers in the host's and no coverage the program's function is
 * called directly: all registers go into the frame on the host's stack, if they have changed since the last call, and what
 * a C function may destroy comes back from there, which costs no time (see emit.c). A callback that looks at the CPU brings
 * them to x86_cpu, with RIP, through get_state; one that changes anything sets X86_ATT_LOOK, and the block is left.
 * x86_cpu.hook_site says that a call is under way, and for which site.
 *
 * In emitted code x86_cpu.block_state is X86_BLOCK_EDGE, "what comes next begins a block", for that is what edges to
 * branch targets mean; an edge that only goes on (full block, page end) says MID. Whoever consumes that puts it back: a unit
 * that begins with a block hook does so at once, others at their edges.
 */
#include "core/hook.h"
#include "jit/frame.h"
#include "x86/cover.h"

/* x86_cpu.hook_site: where the site is, and beside it */
enum { IS_DIRECT = 1 /* all registers are in the frame, RIP is that of the site */, IS_FETCHED = 2 /* they no longer are */ };

static const jit_site *site_at(const jit *j, uint64_t hook_site)
{
    return (const jit_site *)(j->arena + (hook_site & ~UINT64_C(15)));
}

/* ---- shapes ---- */

/* The only hook of a kind, if it is on everything. */
static vm_hook *only_data_hook(const vm_machine *m, unsigned kind)
{
    const vm_hook_list *l = &m->hooks->list[kind];
    vm_hook *h = l->count == 1 && l->wide_count ? l->wide[0] : NULL;
    return h && h->cls == VM_HOOKED_USER && !h->is_gpa && !h->lo && h->hi == UINT64_MAX ? h : NULL;
}

static jit_hook_id id_of(const vm_hook *h)
{
    return h ? (jit_hook_id){h, h->desc.fn, h->desc.user, h->lo, h->hi} : (jit_hook_id){0};
}

enum { WIDE_BYTES = 1 << 20 };
#define TOO_WIDE 0x80000000u /* in a shape's mask: more hooks on much code than it can name */

static bool is_wide(uint64_t lo, uint64_t hi) { return hi - lo >= WIDE_BYTES; }

static void add_wide(jit_shape *s, unsigned *n, const vm_hook_list *l, unsigned kind)
{
    for (unsigned i = 0; i < l->wide_count; i++) {
        const vm_hook *h = l->wide[i];
        if (!is_wide(h->lo, h->hi)) continue;
        if (*n == JIT_WIDE) {
            s->mask |= TOO_WIDE;
            return;
        }
        s->kinds[*n] = (uint8_t)(kind << 1 | h->is_gpa);
        s->wide[(*n)++] = id_of(h);
    }
}

static void shape_now(const x86_cpu *cpu, const vm_machine *m, jit_shape *s)
{
    unsigned n = 0;
    memset(s, 0, sizeof *s);
    s->watch = cpu->watch;
    s->mask = cpu->hook_mask & X86_HOOK_BLOCKS;
    if (cpu->watch & X86_WATCH_ALL) {
        s->mask |= cpu->hook_mask & X86_HOOK_DATA;
        s->data[0] = id_of(only_data_hook(m, X86_HOOK_READ));
        s->data[1] = id_of(only_data_hook(m, X86_HOOK_WRITE));
    }
    for (unsigned kind = 0; kind < VM_HOOK_KINDS; kind++)
        if (cpu->hook_mask & X86_HOOK_CODE & X86_HOOK_BIT(kind)) add_wide(s, &n, &m->hooks->list[kind], kind);
}

void jit_hooks_shape(jit *j)
{
    jit_shape now;
    shape_now(&j->vcpu->x86, j->vcpu->machine, &now);
    if (!j->shape_count) j->shape_count = 1;
    unsigned i = 0;
    while (i < j->shape_count && memcmp(&j->shapes[i], &now, sizeof now)) i++;
    if (i == JIT_SHAPES || (now.mask & TOO_WIDE)) {
        j->must_flush = true;
        j->shape_count = i = 1;
    }
    if (i == j->shape_count) j->shapes[j->shape_count++] = now;
    j->shape = i;
}

/* An edit on little code: the instructions it is about may begin in front of it (FETCH). */
static void drop_edited(jit *j, const vm_hook_edit *e)
{
    enum { LONGEST = 15 };
    if (!(X86_HOOK_CODE & X86_HOOK_BIT(e->kind)) || is_wide(e->lo, e->hi)) return;
    jit_drop_code(j, e->lo < LONGEST ? 0 : e->lo - (LONGEST - 1), e->hi, e->is_gpa);
}

void jit_hooks_changed(vm_vcpu *cpu, unsigned seen)
{
    jit *j = cpu->x86.jit;
    if (!j->write_base) return;
    j->window_stale |= !j->shapes[j->shape].watch != !cpu->x86.watch;
    j->must_flush |= !vm_hooks_knows(cpu->machine, seen);
    for (const vm_hook_edit *e; !j->must_flush && (e = vm_hooks_edit_after(cpu->machine, &seen)) != NULL;) drop_edited(j, e);
    jit_hooks_shape(j);
}

/* ---- which ---- */

/* Traces leave the page only where linear addresses are physical. */
static uint64_t gpa_of(const jit_unit *u, uint64_t rip)
{
    return (rip ^ u->rip) & X86_PAGE_MASK ? rip : (u->gpa & X86_PAGE_MASK) | (rip & 0xfff);
}

unsigned jit_hook_kinds(const jit_unit *u, uint64_t rip, unsigned length, bool begins_block)
{
    static const struct { uint8_t kind; bool at_block, is_long; } asked[] = {
        {X86_HOOK_BREAK, false, false}, {X86_HOOK_INSN, false, false}, {X86_HOOK_FETCH, false, true},
        {X86_HOOK_BLOCK, true, false},  {X86_HOOK_EDGE, true, false}};
    const x86_cpu *cpu = u->cpu;
    if (!(cpu->hook_mask & X86_HOOK_CODE)) return 0;
    uint64_t la = u->key & JIT_KEY_64 ? rip : (uint32_t)rip, gpa = gpa_of(u, rip);
    unsigned kinds = 0;
    for (unsigned i = 0; i < sizeof asked / sizeof *asked; i++)
        if (x86_hooked(cpu, asked[i].kind) && (begins_block || !asked[i].at_block) &&
            vm_hook_covers(u->j->vcpu->machine, asked[i].kind, la, asked[i].is_long ? length : 1, gpa))
            kinds |= X86_HOOK_BIT(asked[i].kind);
    return kinds;
}

/* Calls are dear while vector registers are in the host's: where there are calls, vector instructions call their semantic
 * functions instead. */
bool jit_hook_is_near(const jit_unit *u, unsigned i)
{
    unsigned any = u->cpu->watch & X86_WATCH_ALL;
    if (u->cpu->hook_mask & X86_HOOK_CODE)
        for (unsigned k = 0; k <= i; k++) any |= u->hooked[k];
    return any;
}

bool jit_hooks_want_interpreter(x86_cpu *cpu)
{
    if (cpu->hook_done && cpu->hook_rip != cpu->rip) cpu->hook_done = false;
    return (cpu->careful & X86_CAREFUL_STEP) || cpu->hook_done;
}

/* A part of an instruction (PUSH, CALL, RET...) whose access is watched: the interpreter does the whole instruction. */
bool jit_hook_steps(x86_cpu *cpu, const jit_site *s, uint64_t la)
{
    if ((cpu->watch & X86_WATCH_ALL) && s->access != (X86_READ | X86_WRITE) && cpu->env->watched(cpu, la, s->size, s->access))
        return true;                   /* compiled: the fast path reports by itself */
    return cpu->watch && !s->is_single && cpu->env->watched(cpu, la, s->size, s->access);
}

uint64_t jit_hook_callee(const vm_machine *m)
{
    const vm_hook *h = m->hooks ? m->hooks->first : NULL;
    return (uint64_t)(uintptr_t)(h && h->desc.fn ? (const void *)(uintptr_t)h->desc.fn : (const void *)(uintptr_t)jit_help_hook);
}

/* ---- sites ---- */

/* The only hook for this place, or NULL: several. */
static vm_hook *only_hook(const jit_unit *u, unsigned kinds, uint64_t la, unsigned length, uint64_t gpa)
{
    if (kinds & (kinds - 1) || kinds & X86_HOOK_BIT(X86_HOOK_BREAK)) return NULL;
    unsigned kind = (unsigned)__builtin_ctz(kinds);
    vm_hook *hit = NULL;
    unsigned n = vm_hooks_at(u->j->vcpu->machine, kind, la, kind == X86_HOOK_FETCH ? length : 1, gpa, &hit, 1);
    return n == 1 ? hit : NULL;
}

static vm_hook_result call_all(void *user, vm_vcpu *vcpu, const vm_hook_event *event)
{
    jit_hook_site *h = user;
    x86_cpu *cpu = &vcpu->x86;
    (void)event;
    vm_vcpu_fetch(vcpu, VM_STATE_REGS); /* RIP */
    if (h->state != JIT_HOOK_ENTRY) cpu->block_state = h->state;
    if (h->state == X86_BLOCK_EDGE) cpu->edge_from = h->event.from;
    unsigned answer = vm_hook_before(vcpu, jit_site_insn(cpu->jit, &h->site), h->gpa);
    if (answer == X86_HOOK_GO) cpu->block_state = X86_BLOCK_EDGE;
    return (vm_hook_result)answer;
}

void jit_hook_fill(const jit_unit *u, jit_hook_site *h, unsigned i)
{
    const x86_insn *in = &u->insn[i];
    uint64_t rip = u->insn_rip[i], la = u->key & JIT_KEY_64 ? rip : (uint32_t)rip;
    unsigned kinds = u->hooked[i];
    bool begins = i && (u->insn[i - 1].flags & (X86_IF_BRANCH | X86_IF_END));
    h->gpa = gpa_of(u, rip);
    h->state = !i ? JIT_HOOK_ENTRY : begins ? X86_BLOCK_EDGE : X86_BLOCK_MID;
    h->event = (vm_hook_event){.size = sizeof h->event, .address = la, .from = begins ? u->insn_rip[i - 1] : 0};
    h->hook = only_hook(u, kinds, la, in->length, h->gpa);
    h->fn = h->hook ? h->hook->desc.fn : call_all;
    h->user = h->hook ? h->hook->desc.user : h;
    if (!h->hook) return;
    h->event.kind = (vm_hook_kind)__builtin_ctz(kinds);
    if (h->event.kind != VM_HOOK_INSN && h->event.kind != VM_HOOK_FETCH) return;
    memset(h->bytes, 0, sizeof h->bytes);
    memcpy(h->bytes, in->bytes, in->length);
    h->event.bytes = in->length;
    h->event.data = h->bytes;
    memcpy(&h->event.value, h->bytes, 8);
}

/* ---- accesses ---- */

unsigned jit_access_hooked(const jit_unit *u, unsigned access)
{
    const x86_cpu *cpu = u->cpu;
    if (!(cpu->watch & X86_WATCH_ALL)) return 0;
    return access & ((x86_hooked(cpu, X86_HOOK_READ) ? X86_READ : 0u) | (x86_hooked(cpu, X86_HOOK_WRITE) ? X86_WRITE : 0u));
}

/* Accesses to be reported are compiled if there is one of them, it goes one way, and its value is easy to have: loads of
 * general registers, MOV to memory, the stack. */
bool jit_access_falls_back(const jit_unit *u, const x86_insn *in)
{
    if (!(in->flags & X86_IF_MEM)) return false;
    unsigned access = jit_insn_access(in);
    if (!jit_access_hooked(u, access)) return false;
    if (in->flags & (X86_IF_VEC | X86_IF_FPU | X86_IF_LOCK) || jit_insn_is_x87(in) || access == (X86_READ | X86_WRITE))
        return true;
    if (access == X86_WRITE) {
        const x86_operand *v = &in->op[1];
        return !jit_insn_is_mov(in) || (v->kind != X86_OP_IMM && (v->kind != X86_OP_GPR || v->reg >= 16));
    }
    return jit_insn_pushes(in);
}

static vm_hook_result report_all(void *user, vm_vcpu *vcpu, const vm_hook_event *event)
{
    jit_hook_site *h = user;
    vm_hook_event e = *event;
    return (vm_hook_result)vm_hook_fire(vcpu, (unsigned)h->event.kind, e.address, e.bytes, vm_hook_gpa(vcpu, &e), &e);
}

void jit_access_fill(const jit_unit *u, jit_hook_site *h, const jit_op *check, const jit_op *access)
{
    const x86_insn *in = &u->insn[check->insn];
    unsigned kind = check->access & X86_WRITE ? X86_HOOK_WRITE : X86_HOOK_READ;
    h->hook = only_data_hook(u->j->vcpu->machine, kind);
    h->fn = h->hook ? h->hook->desc.fn : report_all;
    h->user = h->hook ? h->hook->desc.user : h;
    h->state = JIT_HOOK_ENTRY;
    h->value_reg = 0;
    h->event = (vm_hook_event){.size = sizeof h->event, .kind = (vm_hook_kind)kind, .bytes = check->size,
                               .data = &h->event.value};
    if (kind == X86_HOOK_READ) return;
    bool is_imm = access->op == IR_PUSH_IMM || (access->op == IR_ACCESS && in->op[1].kind == X86_OP_IMM);
    h->value_reg = is_imm ? JIT_HOOK_IMM : access->op == IR_ACCESS ? in->op[1].reg : access->reg;
    if (is_imm) h->event.value = access->op == IR_ACCESS ? in->imm : (uint64_t)access->imm;
    if (is_imm && check->size < 8) h->event.value &= (UINT64_C(1) << 8 * check->size) - 1;
}

/* ---- code ---- */

static void store_gs_imm(jit_writer *w, int32_t at, uint64_t v)
{
    for (unsigned half = 0; half < (v == (uint64_t)(int32_t)v ? 1 : 2); half++) {
        bool is_whole = v == (uint64_t)(int32_t)v;
        e_r_gs(w, is_whole ? 8 : 4, 0xc7, 0, at + 4 * (int32_t)half);
        e32(w, (uint32_t)(v >> 32 * half));
    }
}

static void store_state(jit_writer *w, unsigned state)
{
    e_r_gs(w, 1, 0xc6, 0, JIT_OFF(block_state));
    e8(w, state);
}

bool jit_hook_is_direct(const jit_unit *u) { return !jit_level(u->key) && !u->cpu->cover.is_on; }

/* Registers that have changed since the direct call before instruction `from` of the unit (none: -1) stored them. */
static uint16_t stale_since(const jit_unit *u, int from, unsigned insn)
{
    uint16_t stale = 0;
    if (from < 0) return 0xffff;
    for (unsigned k = (unsigned)from; k < insn; k++)
        stale |= u->info[k].falls_back ? 0xffff : jit_changed_regs(&u->insn[k]);
    return stale;
}

enum { TO_FRAME = 0x89, FROM_FRAME = 0x8b };
static void move_home(jit_writer *w, unsigned direction, unsigned reg, unsigned guest)
{
    e_r_mem(w, 8, direction, reg, RSP, 0xff, 1, 8 * (int32_t)(JIT_FRAME_HOMES + guest));
}

static void store_registers(jit_writer *w, uint16_t which)
{
    for (unsigned g = 0; g < 16; g++)
        if ((which >> g & 1) && !JIT_IN_FRAME(g)) move_home(w, TO_FRAME, home[g], g);
}

/* The flags as the emitter keeps them, by way of RAX, which is in the frame already. */
static void save_flags(jit_writer *w)
{
    e8(w, 0x9f);                           /* lahf */
    e8(w, 0x0f), e8(w, 0x90), e8(w, 0xc0); /* seto al */
    e_r_mem(w, 4, 0x89, RAX, RSP, 0xff, 1, 8 * JIT_FRAME_FLAGS);
    e_mov(w, 4, T1, RAX);
}
static void restore_flags(jit_writer *w)
{
    e_mov(w, 4, RAX, T1);
    e8(w, 0x04), e8(w, 0x7f); /* add al, 127: OF */
    e8(w, 0x9e);              /* sahf */
}

static void store_state_of(const jit_unit *u, jit_writer *w, const jit_hook_site *h, uint32_t at, int from, bool flags)
{
    store_registers(w, stale_since(u, from, h->site.index));
    if (flags) save_flags(w);
    store_gs_imm(w, JIT_OFF(hook_site), at | IS_DIRECT);
    if (from < 0) e_gs_store(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15)); /* it changes at edges only */
    e_mov_imm(w, RDX, (uint64_t)(uintptr_t)&h->event);
}

/* mov [rdx + field], reg */
static void store_field(jit_writer *w, unsigned reg, unsigned field)
{
    e_r_mem(w, 8, 0x89, reg, RDX, 0xff, 1, (int32_t)field);
}

static void call_it(jit_writer *w, const jit_hook_site *h)
{
    e_mov_imm(w, RDI, (uint64_t)(uintptr_t)h->user);
    e_gs_load(w, 8, RSI, JIT_SLOT(JIT_SLOT_SELF));
    e_mov_imm(w, RAX, (uint64_t)(uintptr_t)h->fn);
    e8(w, 0xff), e8(w, 0xd0); /* call rax */
}

/* EAX = the answer. What C may have destroyed comes back unless the block is to be left: returns the jump taken then. */
static uint8_t *after_call(jit_writer *w, bool flags)
{
    e_r_gs(w, 4, 0x0b, RAX, JIT_OFF(attention)); /* or eax, attention */
    uint8_t *leave = e_jcc(w, CC_NE);
    if (flags) restore_flags(w);
    for (unsigned g = 0; g < 16; g++)
        if (!JIT_IN_FRAME(g) && home[g] != RBX && home[g] != RBP && home[g] != R12) move_home(w, FROM_FRAME, home[g], g);
    return leave;
}

/* The call. Returns the jump taken when the block is to be left. */
uint8_t *jit_hook_call(const jit_unit *u, jit_writer *w, const jit_hook_site *h, uint32_t at, int from, jit_hook_flags flags)
{
    store_state_of(u, w, h, at, from, flags.save);
    if (h->event.kind == VM_HOOK_EDGE && h->state == JIT_HOOK_ENTRY) {
        e_gs_load(w, 8, RAX, JIT_OFF(edge_from));
        store_field(w, RAX, offsetof(vm_hook_event, from));
    }
    call_it(w, h);
    e_mov(w, 4, T0, RAX);
    return after_call(w, flags.restore);
}

/* The same for an access: T0 = host address, which stays; its linear address is in JIT_SLOT_HOOK_LA. */
uint8_t *jit_access_call(const jit_unit *u, jit_writer *w, const jit_hook_site *h, uint32_t at, int from)
{
    unsigned n = h->site.size;
    store_state_of(u, w, h, at, from, false);
    if (h->event.kind == VM_HOOK_MEM_READ)
        e_r_mem(w, n == 8 ? 8 : 4, n == 1 ? 0x0fb6 : n == 2 ? 0x0fb7 : 0x8b, RAX, T0, 0xff, 1, 0);
    else if (JIT_IN_FRAME(h->value_reg))
        frame_load(w, 8, RAX, JIT_FRAME_REG(h->value_reg));
    else if (h->value_reg < 16)
        move_home(w, FROM_FRAME, RAX, h->value_reg);
    if (h->event.kind == VM_HOOK_MEM_WRITE && h->value_reg != JIT_HOOK_IMM && n < 8)
        e_rr(w, 4, n == 1 ? 0x0fb6 : n == 2 ? 0x0fb7 : 0x8b, RAX, RAX);
    if (h->value_reg != JIT_HOOK_IMM) store_field(w, RAX, offsetof(vm_hook_event, value));
    e_gs_load(w, 8, RCX, JIT_SLOT(JIT_SLOT_HOOK_LA));
    store_field(w, RCX, offsetof(vm_hook_event, address));
    call_it(w, h);
    e_mov(w, 4, RCX, RAX); /* the answer, for the stub */
    return after_call(w, false);
}

/* At the entry of a unit whose first instruction has a block hook (and nothing else): does a block begin? Returns the
 * jump taken if not simply so. */
uint8_t *jit_hook_entry(jit_writer *w)
{
    e_r_gs(w, 1, 0x80, 7, JIT_OFF(block_state)); /* cmp byte, EDGE */
    e8(w, X86_BLOCK_EDGE);
    return e_jcc(w, CC_NE);
}

/* The rest of it: back to `resume` in the middle of a block; otherwise falls through, for the interpreter. */
void jit_hook_entry_stub(const jit_unit *u, jit_writer *w, uint8_t *jump, const uint8_t *resume)
{
    e_patch(jump, w->p);
    e_r_gs(w, 1, 0x80, 7, JIT_OFF(block_state));
    e8(w, X86_BLOCK_MID);
    uint8_t *fresh = e_jcc(w, CC_NE);
    store_state(w, X86_BLOCK_EDGE);
    if (jit_hook_is_direct(u)) {       /* later calls in the unit rely on what this one would have stored */
        store_registers(w, 0xffff);
        e_gs_store(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15));
    }
    e_jmp_to(w, resume);
    e_patch(fresh, w->p);
}

/* An edge after instruction i. Flags and registers stay. `goes_on`: it is no branch, the unit was just full. */
void jit_hook_edge(const jit_unit *u, jit_writer *w, unsigned i, bool goes_on)
{
    if (!(u->cpu->hook_mask & X86_HOOK_BLOCKS) || !u->count) return;
    if (goes_on && !(u->insn[i].flags & (X86_IF_BRANCH | X86_IF_END))) {
        store_state(w, X86_BLOCK_MID);
        return;
    }
    if (!(u->hooked[0] & X86_HOOK_BLOCKS)) store_state(w, X86_BLOCK_EDGE);
    if (x86_hooked(u->cpu, X86_HOOK_EDGE))
        store_gs_imm(w, JIT_OFF(edge_from), u->key & JIT_KEY_64 ? u->insn_rip[i] : (uint32_t)u->insn_rip[i]);
}

/* The unit is left in front of instruction i, whose hooks have not been called. */
void jit_hook_leave(const jit_unit *u, jit_writer *w, unsigned i)
{
    if (i && i <= u->count) jit_hook_edge(u, w, i - 1, true);
}

/* ---- what C does ---- */

/* Emitted code calls: bring what is in the frame to x86_cpu. */
static void fetch(x86_cpu *cpu)
{
    const uint64_t at = cpu->hook_site;
    if (!at || at & IS_FETCHED) return;
    cpu->hook_site |= IS_FETCHED;
    jit_fetch_frame(cpu, at & IS_DIRECT);
    if (at & IS_DIRECT) jit_place_rip(cpu, site_at(cpu->jit, at));
}

void jit_get_state(vm_vcpu *vcpu, unsigned parts)
{
    (void)parts;
    if (vcpu->x86.hook_site) fetch(&vcpu->x86);
}

void jit_hook_disturb(x86_cpu *cpu)
{
    if (cpu->hook_site) atomic_fetch_or(&cpu->attention, X86_ATT_LOOK);
}

void jit_set_state(vm_vcpu *vcpu, unsigned parts)
{
    (void)parts;
    jit_hook_disturb(&vcpu->x86);
}

uint64_t jit_hook_retired(const jit *j, const x86_cpu *cpu)
{
    if (!cpu->hook_site) return cpu->retired;
    const jit_site *s = site_at(j, cpu->hook_site);
    return cpu->retired + (uint64_t)(j->r15_start - (int64_t)cpu->jit_scratch[JIT_SLOT_R15] + s->index);
}

/* The block is left after the call for site h: where and in which state. */
static void decide(jit *j, x86_cpu *cpu, jit_hook_site *h, unsigned answer)
{
    bool is_moved = cpu->is_redirected;
    if (h->hook && answer == X86_HOOK_STOP) {
        vm_hook_note_stop(j->vcpu, h->hook, &h->event);
        vm_hook_stop_before(cpu, is_moved);
    }
    if (answer == X86_HOOK_STOP) {
        j->hook_stop = cpu->stop;
        cpu->stop = X86_STOP_NONE;
    } else if (answer == X86_HOOK_SKIP || is_moved) {
        if (is_moved || (h->site.flags & (X86_IF_BRANCH | X86_IF_END)))
            x86_block_end(cpu, x86_rip_linear(cpu));
        else
            cpu->block_state = X86_BLOCK_MID;
        cpu->rip = cpu->next_rip;
        cpu->jit_scratch[JIT_SLOT_R15]--; /* retired */
        cpu->hook_done = false;
    } else {
        cpu->hook_done = true;
        cpu->hook_rip = cpu->rip;
    }
}

/* The same for an access: unless the hook ended the instruction, the interpreter executes it, from its start, and finds the
 * event reported. */
static void decide_access(jit *j, x86_cpu *cpu, jit_hook_site *h, unsigned answer)
{
    if (h->hook && answer == X86_HOOK_STOP) vm_hook_note_stop(j->vcpu, h->hook, &h->event);
    if (answer == X86_HOOK_STOP) atomic_fetch_or(&cpu->attention, X86_ATT_STOP);
    if (answer == X86_HOOK_SKIP) {
        x86_block_end(cpu, x86_rip_linear(cpu));
        cpu->rip = cpu->next_rip;
        cpu->jit_scratch[JIT_SLOT_R15]--; /* retired */
        cpu->hook_done = false;
        return;
    }
    vm_hook_keep_redirect(j->vcpu, h->site.next);
    jit_hook_half_way(cpu);
    x86_hook_note(cpu);
    j->must_step = true;
}

/* After a direct call that answered or changed something. */
uint64_t jit_help_hook_left(x86_cpu *cpu, uint64_t answer, uint32_t at)
{
    jit *j = cpu->jit;
    jit_hook_site *h = (jit_hook_site *)(j->arena + at);
    fetch(cpu);
    cpu->hook_site = 0;
    jit_count_retired(j, cpu, h->site.index);
    cpu->jit_scratch[JIT_SLOT_R15] -= h->site.index;
    unsigned valid = (uint32_t)answer <= X86_HOOK_RETRY ? (unsigned)answer : X86_HOOK_GO;
    (h->site.size ? decide_access : decide)(j, cpu, h, valid);
    jit_store_flags(cpu);
    return 0;
}

static void complete_event(x86_cpu *cpu, jit_hook_site *h)
{
    unsigned n = h->site.size;
    h->event.address = cpu->jit_scratch[JIT_SLOT_HOOK_LA];
    if (h->value_reg == JIT_HOOK_IMM) return;
    h->event.value = 0;
    memcpy(&h->event.value, h->event.kind == VM_HOOK_MEM_READ
                                ? (const void *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_HOOK_HOST]
                                : &cpu->gpr[h->value_reg], n);
}

/* The call where it cannot be direct. Non-zero: leave. */
uint64_t jit_help_hook(x86_cpu *cpu, uint32_t at)
{
    jit *j = cpu->jit;
    jit_hook_site *h = (jit_hook_site *)jit_begin_helper(cpu, at);
    if (h->event.kind == VM_HOOK_EDGE && h->state == JIT_HOOK_ENTRY) h->event.from = cpu->edge_from;
    if (h->site.size) complete_event(cpu, h);
    unsigned answer = (unsigned)h->fn(h->user, j->vcpu, &h->event);
    if (answer > X86_HOOK_RETRY) answer = X86_HOOK_GO;
    bool leaves = answer || cpu->is_redirected || h->site.block->is_dead || j->must_flush || j->window_stale ||
                  atomic_load_explicit(&cpu->attention, memory_order_relaxed);
    if (leaves) {
        cpu->jit_scratch[JIT_SLOT_R15] -= h->site.index;
        (h->site.size ? decide_access : decide)(j, cpu, h, answer);
    }
    unsigned noted = cpu->io_count;
    jit_end_helper(j, cpu, &h->site);
    cpu->io_count = noted;
    return leaves;
}

/* A semantic function has executed the instruction of a site; `leaves`: the block is left after it. */
void jit_hook_after(x86_cpu *cpu, const jit_site *s, bool leaves)
{
    if (!(cpu->hook_mask & X86_HOOK_BLOCKS)) return;
    if (s->flags & (X86_IF_BRANCH | X86_IF_END))
        x86_block_end(cpu, s->mode == 8 ? s->rip : (uint32_t)s->rip);
    else if (leaves)
        cpu->block_state = X86_BLOCK_MID;
}

/* The instruction at rip has been left half-way: its hooks are not called again when it goes on. */
void jit_hook_half_way(x86_cpu *cpu)
{
    if (!(cpu->hook_mask & X86_HOOK_CODE)) return;
    cpu->hook_done = true;
    cpu->hook_rip = cpu->rip;
}
