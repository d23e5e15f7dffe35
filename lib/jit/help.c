/* help.c - what emitted code calls: memory that is no page of RAM in the TLB, devices, instructions that only the
 * interpreter's semantic functions know. Each helper brings the state that C looks at up to date, does the one thing, and
 * puts back what it changed (thunk.c has the registers' way).
 */
#include "jit/jit.h"
#include "mmu/mmu.h"
#include "x86/access.h"
#include "x86/cover.h"
#include "x86/simd.h"

/* One flag-setting operation of the host: AL = OF, AH = the others. */
#define HOST_FLAGS(op, a, b, out) __asm__(op "; lahf; seto %%al" : "=&a"(out), "+r"(a) : "r"(b) : "cc")

/* The flags of a recipe left in memory, computed by the host. */
#define LAZY_FLAGS(type, kind, x, y, out)                                                                              \
    do {                                                                                                               \
        type a = (type)(x), b = (type)(y);                                                                             \
        if ((kind) == JIT_RECIPE_SUB)                                                                                  \
            a += b;                                                                                                    \
        else if ((kind) == JIT_RECIPE_ADD)                                                                             \
            a -= b;                                                                                                    \
        if ((kind) == JIT_RECIPE_CMP || (kind) == JIT_RECIPE_SUB)                                                      \
            HOST_FLAGS("cmp %2, %1", a, b, out);                                                                       \
        else if ((kind) == JIT_RECIPE_ADD)                                                                             \
            HOST_FLAGS("add %2, %1", a, b, out);                                                                       \
        else if ((kind) == JIT_RECIPE_TEST)                                                                            \
            HOST_FLAGS("test %2, %1", a, b, out);                                                                      \
        else                                                                                                           \
            HOST_FLAGS("test %1, %1", a, b, out);                                                                      \
    } while (0)

static uint64_t lazy_flags(const x86_cpu *cpu, uint64_t recipe)
{
    uint64_t x = cpu->jit_scratch[JIT_SLOT_FLAG_A], y = cpu->jit_scratch[JIT_SLOT_FLAG_B], out;
    unsigned kind = (recipe & 0x7f) - 1;
    if (recipe & JIT_LAZY_IMM) y = (uint64_t)(int64_t)(int16_t)(recipe >> 16);
    if ((recipe >> 8 & 0xff) == 4)
        LAZY_FLAGS(uint32_t, kind, x, y, out);
    else
        LAZY_FLAGS(uint64_t, kind, x, y, out);
    return out & 0xffff;
}

void jit_load_flags(x86_cpu *cpu)
{
    uint64_t f = cpu->jit_scratch[JIT_SLOT_FLAGS] & 0xffffffff;
    if ((f & 0xff) > 1) f = lazy_flags(cpu, f);
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | (f >> 8 & (X86_FL_ARITH & 0xff)) | (f & 1) << 11;
}
void jit_store_flags(x86_cpu *cpu)
{
    cpu->jit_scratch[JIT_SLOT_FLAGS] = (cpu->rflags & (X86_FL_ARITH & 0xff)) << 8 | (cpu->rflags >> 11 & 1);
}

static uint64_t *frame_of(const x86_cpu *cpu) { return (uint64_t *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_FRAME]; }

enum { FRAME_REGS = 4 * 8, FRAME_FLAGS = 4 * 8, FRAME_LIMITS = 2 * 8 };

static void copy_frame(x86_cpu *cpu)
{
    const uint64_t *frame = frame_of(cpu);
    memcpy(&cpu->gpr[X86_R8], &frame[JIT_FRAME_R8], FRAME_REGS);
    memcpy(&cpu->jit_scratch[JIT_SLOT_FLAGS], &frame[JIT_FRAME_FLAGS], FRAME_FLAGS);
}

void jit_fetch_frame(x86_cpu *cpu, bool has_homes)
{
    copy_frame(cpu);
    for (unsigned g = 0; has_homes && g < 16; g++)
        if (!JIT_IN_FRAME(g)) cpu->gpr[g] = frame_of(cpu)[JIT_FRAME_HOMES + g];
    jit_load_flags(cpu);
}

/* What C may have changed, to the frame. */
static void store_frame(const x86_cpu *cpu)
{
    uint64_t *frame = frame_of(cpu);
    memcpy(&frame[JIT_FRAME_R8], &cpu->gpr[X86_R8], FRAME_REGS);
    frame[JIT_FRAME_FLAGS] = cpu->jit_scratch[JIT_SLOT_FLAGS];
    memcpy(&frame[JIT_FRAME_LIMIT], &cpu->jit_scratch[JIT_SLOT_WINDOW_LIMIT], FRAME_LIMITS);
}

/* Count what has retired since the last time; `index` instructions of the current block have. */
void jit_count_retired(jit *j, x86_cpu *cpu, unsigned index)
{
    int64_t r15 = (int64_t)cpu->jit_scratch[JIT_SLOT_R15] - index, done = j->r15_start - r15;
    cpu->budget -= done;
    cpu->retired += (uint64_t)done;
    j->r15_start = r15;
}

/* Tell the image which x87 instructions emitted code has noted last. */
static void tell_x87_pointers(jit *j, x86_cpu *cpu)
{
    uint32_t last = (uint32_t)cpu->jit_scratch[JIT_SLOT_X87_LAST],
             last_mem = (uint32_t)cpu->jit_scratch[JIT_SLOT_X87_LAST_MEM];
    cpu->jit_scratch[JIT_SLOT_X87_LAST] = cpu->jit_scratch[JIT_SLOT_X87_LAST_MEM] = 0;
    if (last) {
        const jit_site *s = (const jit_site *)(j->arena + last);
        const x86_insn *in = jit_site_insn(j, s);
        X86_FPU_FOP(cpu) = (uint16_t)((in->opcode & 7) << 8 | in->modrm);
        X86_FPU_FIP(cpu) = in->mode == 8 ? s->rip : (uint32_t)s->rip;
        X86_FPU_FCS(cpu) = cpu->seg[X86_CS].sel;
    }
    if (last_mem) {
        const x86_insn *in = jit_site_insn(j, (const jit_site *)(j->arena + last_mem));
        bool has_base = in->mode != 8 || in->seg == X86_FS || in->seg == X86_GS;
        uint64_t offset = cpu->jit_scratch[JIT_SLOT_X87_LA] - (has_base ? cpu->seg[in->seg].base : 0);
        X86_FPU_FDP(cpu) = in->mode == 8 ? offset : (uint32_t)offset;
        X86_FPU_FDS(cpu) = cpu->seg[in->seg].sel;
    }
}

/* The x87 registers have come from the host, its instruction pointers with them: put the guest's in their place. */
void jit_load_x87_pointers(jit *j, x86_cpu *cpu)
{
    memcpy(&cpu->fpu.image[6], j->x87_pointers, sizeof j->x87_pointers);
    tell_x87_pointers(j, cpu);
}

void jit_keep_x87_pointers(jit *j, const x86_cpu *cpu)
{
    memcpy(j->x87_pointers, &cpu->fpu.image[6], sizeof j->x87_pointers);
}

/* Everything retires up to the site's instruction. */
static void count_up_to(jit *j, x86_cpu *cpu, const jit_site *s)
{
    cpu->hook_site = 0;
    jit_count_retired(j, cpu, s->index);
    if (s->block->nedges) jit_cover_add(cpu, s->block, s->index, 1);
    if (j->has_rounds) jit_cover_rounds(j, cpu);
}

jit_site *jit_begin_helper(x86_cpu *cpu, uint32_t at)
{
    jit *j = cpu->jit;
    jit_site *s = (jit_site *)(j->arena + at);
    jit_fetch_frame(cpu, false);
    if (s->block->key & JIT_KEY_X87) jit_load_x87_pointers(j, cpu);
    count_up_to(j, cpu, s);
    jit_place_rip(cpu, s);
    if (s->in_shadow) cpu->inhibit = 1;
    return s;
}

/* Somebody wants the run loop: let the next edge leave. */
static void hurry(jit *j, x86_cpu *cpu)
{
    int64_t extra = (int64_t)cpu->jit_scratch[JIT_SLOT_R15] + 1;
    if (extra > 0) {
        cpu->jit_scratch[JIT_SLOT_R15] -= (uint64_t)extra;
        j->r15_start -= extra;
    }
}

static bool wants_leave(const jit *j, const x86_cpu *cpu)
{
    return atomic_load_explicit(&cpu->attention, memory_order_relaxed) || j->must_flush || j->window_stale;
}

/* STI's shadow is over: it covers one instruction. */
static void end_shadow(x86_cpu *cpu)
{
    if (cpu->inhibit == 1) cpu->inhibit = 0;
}

void jit_end_helper(jit *j, x86_cpu *cpu, const jit_site *s)
{
    if (s->in_shadow) end_shadow(cpu);
    if (s->block->key & JIT_KEY_X87) jit_keep_x87_pointers(j, cpu);
    x86_io_retire(cpu); /* what was read has been handed over: no replay */
    if (s->block->nedges) jit_cover_add(cpu, s->block, s->index, -1);
    jit_store_flags(cpu);
    store_frame(cpu);
    if (wants_leave(j, cpu) || s->block->is_dead) {
        cpu->jit_scratch[JIT_SLOT_LEAVE] = 1; /* single accesses look here; others leave at the next edge */
        hurry(j, cpu);
    }
}

/* Leave the block with n of its instructions done, for rip. After end_helper(). */
static uint64_t leave_block(x86_cpu *cpu, const jit_site *s, unsigned n, unsigned reason, uint64_t rip)
{
    if (s->block->nedges) jit_cover_add(cpu, s->block, n, 1);
    cpu->jit_scratch[JIT_SLOT_R15] -= n;
    cpu->jit_scratch[JIT_SLOT_REASON] = reason;
    cpu->rip = rip;
    return JIT_OUT;
}

/* Something of what the block of s was made for has changed. */
static bool must_leave(const jit *j, const x86_cpu *cpu, const jit_site *s)
{
    return s->block->is_dead || j->must_flush || (cpu->careful & X86_CAREFUL_STEP) || cpu->inhibit ||
           ((s->block->key & JIT_KEY_VEC) && !(s->block->key & JIT_KEY_X87 ? jit_x87_allowed(cpu) : jit_vec_allowed(cpu))) ||
           atomic_load_explicit(&cpu->attention, memory_order_relaxed);
}

/* The whole instruction by its semantic function. True: leave the block after it. */
static bool execute(jit *j, x86_cpu *cpu, const jit_site *s)
{
    const x86_insn *in = jit_site_insn(j, s);
    uint64_t next = cpu->next_rip;
    cpu->stat[X86_STAT_FALLBACKS]++;
    x86_spend(cpu, 1);
    for (;;) {
        cpu->io_pos = 0;
        in->exec(cpu, in);
        x86_io_retire(cpu);
        if (cpu->next_rip != cpu->rip || next == cpu->rip || !(s->flags & (X86_IF_REP | X86_IF_REPNE))) break;
        if (atomic_load_explicit(&cpu->attention, memory_order_relaxed) || s->block->is_dead) {
            cpu->jit_scratch[JIT_SLOT_R15]++; /* not finished: not retired */
            jit_hook_half_way(cpu);
            return true;
        }
        cpu->next_rip = next;
    }
    cpu->rip = cpu->next_rip;
    if (cpu->cover.is_on && (s->flags & X86_IF_BRANCH)) x86_cover_branch(cpu, s->rip);
    if (s->in_shadow) end_shadow(cpu);
    /* STI: no interrupt waits, and none is taken before the next edge, which is after the next instruction. */
    const bool has_shadow = in->exec == x86_op_sti && !s->is_end && s->index + 1 < s->block->count && cpu->inhibit;
    if (has_shadow) cpu->inhibit = 0;
    bool leaves = cpu->rip != next || must_leave(j, cpu, s);
    if (has_shadow && leaves) cpu->inhibit = 1;
    jit_hook_after(cpu, s, leaves);
    return leaves;
}

/* A group of this block could not be looked up: if that is its habit, make it again without. */
static void note_bail(jit *j, jit_block *b)
{
    if (b->is_dead || ++b->bails < 64) return;
    j->no_groups[jit_hash_block(b->rip) & 1023] = 1;
    jit_kill_block(j, b);
}

/* The span of a group at la, or NULL to go on in a block without groups. Faults are the first access's own. */
static uint8_t *find_span(jit *j, x86_cpu *cpu, jit_site *s, uint64_t la)
{
    bool is_write = s->access & X86_WRITE;
    uint8_t *p = NULL;
    uint64_t last = la + s->span - 1;
    bool is_whole = !((la ^ last) & X86_PAGE_MASK) && !(s->align > 1 && (la & (s->align - 1u))) &&
                    (s->mode != 8 || x86_canonical(la));
    if (is_whole && !s->in_window && !(p = x86_tlb_hit(cpu, la, s->span, is_write))) {
        x86_direct(cpu, la + (uint64_t)s->leader_disp, s->leader_size, s->leader_access);
        p = x86_tlb_hit(cpu, la, s->span, is_write);
    }
    if (!p) note_bail(j, s->block);
    return p;
}

/* Faults of the segment: an address that is not canonical, a 32-bit access over the end of its 4 GiB. */
static bool is_in_range(const x86_cpu *cpu, const jit_site *s, uint64_t la, uint64_t *offset)
{
    *offset = s->seg == X86_FS || s->seg == X86_GS ? la - cpu->seg[s->seg].base : la;
    if (s->mode == 8) return x86_canonical(la) && x86_canonical(la + s->size - 1);
    *offset = (uint32_t)*offset;
    return *offset + s->size <= UINT64_C(1) << 32;
}

static void check_range(x86_cpu *cpu, const jit_site *s, uint64_t la)
{
    uint64_t offset;
    if (!is_in_range(cpu, s, la, &offset)) x86_linear(cpu, s->seg, offset, s->size, s->access);
}

/* The access at bounce_la itself. Callbacks see exact state: the registers are in x86_cpu, and what is still in the frame
 * comes when somebody asks (hook.c). So if nobody changes anything, nothing but the access has to be done. */
static void ask_device(jit *j, x86_cpu *cpu, jit_site *s, uint32_t at)
{
    uint64_t *value = j->bounce;
    unsigned n = s->size;
    int status;
    x86_spend(cpu, 1);
    jit_place_rip(cpu, s);
    cpu->hook_site = at;
    if (s->access == X86_WRITE) /* read as it was stored, which is faster */
        status = cpu->env->phys_write(cpu, j->bounce_gpa, j->bounce_la, n, x86_load_host((uint8_t *)value, n));
    else
        status = cpu->env->phys_read(cpu, j->bounce_gpa, j->bounce_la, n, X86_READ, value);
    if (status == X86_IO_DONE && !wants_leave(j, cpu) && !s->block->is_dead) {
        cpu->hook_site = 0;
        return;
    }
    jit_get_state(j->vcpu, VM_STATE_ALL);
    count_up_to(j, cpu, s);
    if (status != X86_IO_DONE)
        x86_io_leave(cpu, j->bounce_gpa, j->bounce_la, n, x86_load_host((uint8_t *)value, n), s->access);
    jit_end_helper(j, cpu, s);
}

/* Is the address a device's that has been met before? Then the bounce buffer, with what the device answered. */
static uint8_t *find_device(jit *j, x86_cpu *cpu, uint64_t la, uint32_t at)
{
    jit_site *s = (jit_site *)(j->arena + at);
    j->bounce_is_device = s->is_quick && x86_tlb_device(cpu, cpu->ctx, la, s->access, &j->bounce_gpa) &&
                          !(cpu->careful | cpu->watch) && (la & 0xfff) + s->size <= 4096;
    if (!j->bounce_is_device) return NULL;
    j->bounce_la = la;
    j->bounce_active = s->access == X86_WRITE;
    if (!j->bounce_active) ask_device(j, cpu, s, at);
    return (uint8_t *)j->bounce;
}

/* Does the MMU strategy know the page? Then nobody sees that it was asked, and the guest's registers stay where they are. Not
 * if somebody wants the run loop: leaving after this access needs to know where it is. */
static __attribute__((noinline)) uint8_t *find_known(jit *j, x86_cpu *cpu, const jit_site *s, uint64_t la)
{
    bool is_write = s->access & X86_WRITE;
    unsigned n = s->leader_size ? s->span : s->size;
    uint64_t offset;
    if ((cpu->careful | cpu->watch) || cpu->jit_scratch[JIT_SLOT_LEAVE] || s->in_window ||
        (s->align > 1 && (la & (s->align - 1u))) || (la & 0xfff) + n > 4096 ||
        !is_in_range(cpu, s, la, &offset) || !vm_mmu_refill(cpu, la, is_write ? X86_WRITE : X86_READ))
        return NULL;
    j->bounce_active = false;
    return x86_tlb_hit(cpu, la, n, is_write);
}

uint8_t *jit_help_begin(x86_cpu *cpu, uint64_t la, uint32_t at)
{
    jit *j = cpu->jit;
    uint8_t *host = find_device(j, cpu, la, at);
    if (!host && vm_mmu_can_refill(j->vcpu)) host = find_known(j, cpu, (jit_site *)(j->arena + at), la);
    if (host) return host;
    x86_spend(cpu, 1);
    jit_site *s = jit_begin_helper(cpu, at);
    if (s->leader_size) {
        uint8_t *span = find_span(j, cpu, s, la);
        jit_end_helper(j, cpu, s);
        return span;
    }
    if (s->align > 1 && (la & (s->align - 1u))) x86_raise_error(cpu, X86_GP, 0);
    check_range(cpu, s, la);
    x86_io_retire(cpu);
    j->bounce_active = false;
    uint8_t *p = x86_direct(cpu, la, s->size, s->access);
    if (!p && (s->may_redo || jit_hook_steps(cpu, s, la))) {
        jit_end_helper(j, cpu, s);
        return (uint8_t *)(uintptr_t)leave_block(cpu, s, s->index, JIT_LEAVE_STEP, s->rip);
    }
    if (!p && s->access == (X86_READ | X86_WRITE)) {
        bool leaves = execute(j, cpu, s);
        jit_end_helper(j, cpu, s);
        return leaves ? (uint8_t *)(uintptr_t)leave_block(cpu, s, s->index + 1u, JIT_LEAVE_LOOKUP, cpu->rip) : NULL;
    }
    if (!p) {
        if (s->access & X86_READ)
            x86_read_linear(cpu, la, j->bounce, s->size);
        else
            x86_probe_write(cpu, la, s->size);
        j->bounce_la = la;
        j->bounce_active = true;
        p = (uint8_t *)j->bounce;
    }
    jit_end_helper(j, cpu, s);
    return p;
}

/* The block is left behind site `at`, before the note that emitted code makes there of an x87 instruction. */
static void note_x87(jit *j, x86_cpu *cpu, const jit_site *s, uint32_t at)
{
    if (!(s->block->key & JIT_KEY_X87) || !s->insn || !jit_insn_is_x87(jit_site_insn(j, s))) return;
    cpu->jit_scratch[JIT_SLOT_X87_LAST] = cpu->jit_scratch[JIT_SLOT_X87_LAST_MEM] = at;
    cpu->jit_scratch[JIT_SLOT_X87_LA] = cpu->jit_scratch[JIT_SLOT_X87_NEXT_LA];
    tell_x87_pointers(j, cpu);
}

/* The store of a PUSH or CALL has killed its own block: what else the instruction does, for its bytes may have gone. */
static uint64_t finish_push(x86_cpu *cpu, const jit_site *s)
{
    if (!s->block->is_dead) return 0;
    bool is_64 = s->mode == 8;
    cpu->gpr[X86_RSP] = is_64 ? cpu->gpr[X86_RSP] - 8 : (uint32_t)(cpu->gpr[X86_RSP] - 4);
    uint64_t rip = cpu->next_rip;
    if (!(s->flags & X86_IF_BRANCH)) return rip;
    rip = s->target ? s->target : cpu->jit_scratch[JIT_SLOT_TMP];
    cpu->rip = is_64 ? rip : (uint32_t)rip;
    if (cpu->cover.is_on) x86_cover_branch(cpu, s->rip);
    return cpu->rip;
}

uint64_t jit_help_commit(x86_cpu *cpu, uint32_t at)
{
    jit *j = cpu->jit;
    if (!j->bounce_active) return 0;
    if (j->bounce_is_device) {
        ask_device(j, cpu, (jit_site *)(j->arena + at), at);
        return 0;
    }
    jit_site *s = jit_begin_helper(cpu, at);
    x86_write_linear(cpu, j->bounce_la, j->bounce, s->size);
    uint64_t rip = s->is_single ? cpu->next_rip : finish_push(cpu, s);
    if (s->block->is_dead) {
        note_x87(j, cpu, s, at);
        jit_hook_after(cpu, s, true);
    }
    jit_end_helper(j, cpu, s);
    if (!s->block->is_dead) return 0;
    return leave_block(cpu, s, s->index + 1u, JIT_LEAVE_LOOKUP, rip);
}

/* HLT that does nothing but stop: what its semantic function does, without its long way out. */
static uint64_t halt(jit *j, x86_cpu *cpu, const jit_site *s)
{
    copy_frame(cpu);
    jit_place_rip(cpu, s);
    cpu->hook_site = 0;
    cpu->halted = true;
    cpu->inhibit = 0;
    x86_io_retire(cpu);
    j->hook_stop = X86_STOP_HALT;
    return leave_block(cpu, s, s->index + 1u, JIT_LEAVE_HOOKED, cpu->next_rip);
}

/* #UD where it is known beforehand, for hooks that emulate instructions: a longjmp to caught() takes longer, and if one has
 * done so the block goes on. When nothing has retired the run loop looks at its deadline. */
static uint64_t raise_ud(jit *j, x86_cpu *cpu, uint32_t at)
{
    jit_site *s = jit_begin_helper(cpu, at);
    const uint64_t retired = cpu->retired, next = cpu->next_rip;
    jit_hook_half_way(cpu);
    cpu->fault = (x86_fault){.vector = X86_UD};
    x86_stop stop = x86_deliver_fault(cpu);
    if (!stop && cpu->retired == retired) stop = X86_STOP_ATTENTION;
    if (!stop && !s->is_end && cpu->rip == next && !must_leave(j, cpu, s)) {
        cpu->retired = retired; /* the block's end counts it */
        cpu->budget++;
        jit_end_helper(j, cpu, s);
        return 0;
    }
    j->hook_stop = stop;
    jit_end_helper(j, cpu, s);
    return leave_block(cpu, s, s->index, JIT_LEAVE_HOOKED, cpu->rip);
}

uint64_t jit_help_fallback(x86_cpu *cpu, uint32_t at)
{
    jit *j = cpu->jit;
    jit_site *s = (jit_site *)(j->arena + at);
    const x86_exec_fn exec = jit_site_insn(j, s)->exec;
    if (exec == x86_op_illegal) return raise_ud(j, cpu, at);
    if (exec == x86_op_hlt && !cpu->cpl && !(cpu->rflags & X86_FL_TF) && !cpu->hook_mask) return halt(j, cpu, s);
    jit_begin_helper(cpu, at);
    bool leaves = execute(j, cpu, s);
    jit_end_helper(j, cpu, s);
    return leaves || s->is_end ? leave_block(cpu, s, s->index + 1u, JIT_LEAVE_LOOKUP, cpu->rip) : 0;
}

/* A callback has asked for the run loop: leave after the instruction whose access it was. */
uint64_t jit_help_after(x86_cpu *cpu, uint32_t at)
{
    jit *j = cpu->jit;
    uint64_t next = cpu->next_rip; /* as the callback left it */
    jit_site *s = jit_begin_helper(cpu, at);
    note_x87(j, cpu, s, at);
    jit_hook_after(cpu, s, true);
    jit_end_helper(j, cpu, s);
    return leave_block(cpu, s, s->index + 1u, JIT_LEAVE_LOOKUP, next);
}
