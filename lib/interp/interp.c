/* interp.c - the reference interpreter: find the block, call its semantic functions in order.
 *
 * One setjmp serves a whole run; x86_raise and x86_leave come back to it. What had been done by then is found from rip: blocks
 * are straight lines, so the instruction at rip names how many before it retired. Between instructions rip, RFLAGS and
 * every register are exact.
 *
 * Where a decision is made once a block instead of once an instruction (attention, budget, until, CS limit), the block is
 * cut so that the result is the same.
 */
#include <string.h>
#include "core/hook.h"
#include "interp/blocks.h"
#include "interp/interp.h"
#include "x86/access.h"
#include "x86/cover.h"

static inline uint64_t rip_mask(const x86_cpu *cpu)
{
    return cpu->code_size == 8 ? ~UINT64_C(0) : UINT32_MAX;
}

/* ---- fetching ---- */

static uint64_t code_la(const x86_cpu *cpu, uint64_t rip)
{
    return cpu->code_size == 8 ? rip : (uint32_t)(cpu->seg[X86_CS].base + rip);
}

/* Guest-physical address of code at la. Raises #GP for a non-canonical address, #PF. */
static uint64_t code_gpa(x86_cpu *cpu, uint64_t la)
{
    const x86_tlb *t = &cpu->tlb[cpu->ctx];
    unsigned i = X86_TLB_INDEX(la);
    uint64_t offset = la ^ t->e[i].tag_x, gpa = 0;
    if (offset <= 4095)
        return (t->meta[i] & X86_PAGE_MASK) | offset;
    if (cpu->code_size == 8 && !x86_canonical(la))
        x86_raise_error(cpu, X86_GP, 0);
    if (!cpu->env->fill(cpu, la, X86_EXEC, cpu->ctx, &gpa))
        x86_raise_fault(cpu, &cpu->fault);
    return gpa;
}

/* The page's bytes when code may be cached from it. */
static const uint8_t *code_page(x86_cpu *cpu, uint64_t gpa)
{
    unsigned prot = 0;
    const uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    return page && (prot & X86_EXEC) ? page : NULL;
}

/* Bytes from rip that CS allows; raises #GP when there is none. */
static uint64_t code_room(x86_cpu *cpu, uint64_t rip)
{
    if (cpu->code_size == 8)
        return UINT64_MAX;
    uint64_t limit = cpu->seg[X86_CS].limit;
    if (rip > limit)
        x86_raise_error(cpu, X86_GP, 0);
    return limit - rip + 1;
}

/* One instruction byte by byte: across a page end, or from where code cannot be cached. Fills scratch. */
static block *fetch_slow(x86_cpu *cpu, block_cache *c, uint64_t rip)
{
    uint8_t bytes[15];
    uint64_t room = code_room(cpu, rip);
    block *b = c->scratch;
    const uint8_t *page = NULL;
    uint64_t gpa = 0;
    for (unsigned n = 0; n < 15; n++) {
        if (n >= room)
            x86_raise_error(cpu, X86_GP, 0);
        uint64_t la = code_la(cpu, (rip + n) & rip_mask(cpu));
        if (n == 0 || !(la & 0xfff)) {
            gpa = code_gpa(cpu, la);
            page = code_page(cpu, gpa);
            if (!n)
                b->gpa = gpa;
        }
        bytes[n] = page ? page[la & 0xfff] : x86_fetch_byte(cpu, (gpa & X86_PAGE_MASK) | (la & 0xfff), la);
        if (x86_decode(bytes, n + 1, cpu->code_size, b->insn) == 0)
            break;
    }
    x86_offer(cpu, b->insn);
    b->count = 1;
    b->bytes = b->insn->length;
    b->mode = cpu->code_size;
    b->crosses = true;
    return b;
}

static bool ends_block(const x86_insn *in)
{
    return (in->flags & X86_IF_END) || ((in->flags & X86_IF_STRING) && (in->flags & (X86_IF_REP | X86_IF_REPNE)));
}

/* Decode from `page` at gpa into scratch. False: not even one instruction fits before the page's end. */
static bool decode_block(x86_cpu *cpu, block_cache *c, const uint8_t *page, uint64_t gpa)
{
    block *b = c->scratch;
    unsigned at = gpa & 0xfff;
    b->gpa = gpa;
    b->mode = cpu->code_size;
    b->crosses = false;
    b->count = b->bytes = 0;
    while (b->count < BLOCK_INSNS) {
        x86_insn *in = &b->insn[b->count];
        unsigned room = 4096 - at;
        if (!room || block_decode(c, page + at, room < 15 ? room : 15, b->mode, in) < 0)
            break;
        x86_offer(cpu, in);
        at += in->length;
        b->bytes += in->length;
        b->count++;
        if (ends_block(in))
            break;
    }
    return b->count;
}

/* A crossing instruction is known only by its first byte: read it again and decode when it differs. */
static block *fetch_crossing(x86_cpu *cpu, block_cache *c, uint64_t rip, block *known)
{
    if (known) {
        const unsigned n = known->insn->length, first = 4096 - (known->gpa & 0xfff);
        const uint8_t *p = code_page(cpu, known->gpa);
        if (p && n > first && n <= code_room(cpu, rip) && !memcmp(p + (known->gpa & 0xfff), known->insn->bytes, first)) {
            uint64_t gpa2 = code_gpa(cpu, code_la(cpu, (rip + first) & rip_mask(cpu)));
            p = code_page(cpu, gpa2);
            if (p && !memcmp(p, known->insn->bytes + first, n - first))
                return known;
        }
    }
    block *b = fetch_slow(cpu, c, rip);
    if (known) {
        *known->insn = *b->insn;
        known->bytes = b->bytes;
        return known;
    }
    cpu->stat[X86_STAT_DECODED]++;
    block *added = block_add(c);
    return added ? added : b;
}

/* The block at rip; what it needs to be executed has been checked. Raises. */
static block *find_block(x86_cpu *cpu, block_cache *c)
{
    const uint64_t rip = cpu->rip, la = code_la(cpu, rip), key = c->jump_generation | cpu->ctx << 4 | cpu->code_size;
    block_jump *j = &c->jumps[(la ^ la >> 12) & (BLOCK_JUMPS - 1)];
    if (X86_LIKELY(j->la == la && j->key == key))
        return j->b;
    cpu->next_rip = rip;               /* what faults now has no length */
    x86_look_for_stop(cpu, la);
    (void)code_room(cpu, rip);
    uint64_t gpa = code_gpa(cpu, la);
    block *b = block_find(c, gpa, cpu->code_size);
    if (X86_UNLIKELY(cpu->exec_varies) && !code_page(cpu, gpa))
        return fetch_slow(cpu, c, rip);
    if (b && b->crosses)
        return fetch_crossing(cpu, c, rip, b);
    if (!b) {
        const uint8_t *page = code_page(cpu, gpa);
        if (!page)
            return fetch_slow(cpu, c, rip);
        cpu->env->code_page(cpu, gpa & X86_PAGE_MASK);
        if (!decode_block(cpu, c, page, gpa))
            return fetch_crossing(cpu, c, rip, NULL);
        cpu->stat[X86_STAT_BLOCKS]++;
        cpu->stat[X86_STAT_DECODED] += c->scratch->count;
        b = block_add(c);
        if (!b)
            return c->scratch;
    }
    /* Adding may have emptied the cache: the key is made anew. */
    *j = (block_jump){ .la = la, .key = c->jump_generation | cpu->ctx << 4 | cpu->code_size, .b = b };
    return b;
}

/* ---- executing ---- */

/* How many of the block's first instructions may run now. */
static unsigned cut_block(const x86_cpu *cpu, const block *b)
{
    unsigned n = b->count;
    if (cpu->budget < n)
        n = (unsigned)cpu->budget;
    if (cpu->code_size != 8 && cpu->rip + b->bytes - 1 > cpu->seg[X86_CS].limit) {
        uint64_t at = cpu->rip;
        for (unsigned i = 0; i < n; i++) {
            at += b->insn[i].length;
            if (at - 1 > cpu->seg[X86_CS].limit) {
                n = i;
                break;
            }
        }
    }
    if (cpu->has_until && cpu->until - cpu->rip < b->bytes) {
        uint64_t at = cpu->rip;
        for (unsigned i = 1; i < n; i++) {
            at += b->insn[i - 1].length;
            if (at == cpu->until)
                return i;
        }
    }
    return n;
}

static inline bool is_unfinished_string(const x86_cpu *cpu, const x86_insn *in, uint64_t rip)
{
    return cpu->next_rip == rip && (in->flags & X86_IF_STRING) && (in->flags & (X86_IF_REP | X86_IF_REPNE));
}

static inline void retire(x86_cpu *cpu, unsigned n)
{
    cpu->retired += n;
    cpu->budget -= n;
}

/* Coverage: instruction `in` at linear address `from` has retired; rip is the next. */
static inline void cover(x86_cpu *cpu, const x86_insn *in, uint64_t from)
{
    if (X86_UNLIKELY(cpu->cover.is_on) && (in->flags & X86_IF_BRANCH))
        x86_cover_branch(cpu, from);
}

/* The whole hot path. */
static void run_block(x86_cpu *cpu, block_cache *c, const block *b, unsigned n)
{
    const x86_insn *in = b->insn, *end = in + n;
    const uint64_t generation = c->generation, mask = rip_mask(cpu), cs_base = code_la(cpu, cpu->rip) - cpu->rip;
    uint64_t rip = cpu->rip, here;
    bool is_wanted = false;
    c->running_rip = rip;
    c->running = (block *)b;
    do {
        here = rip;
        cpu->next_rip = (rip + in->length) & mask;
        in->exec(cpu, in);
        if (X86_UNLIKELY(cpu->io_count)) {                   /* a device may have raised an interrupt: it comes next */
            x86_io_retire(cpu);
            is_wanted = atomic_load_explicit(&cpu->attention, memory_order_relaxed) != 0;
        }
        cpu->rip = rip = cpu->next_rip;
        in++;
    } while (in != end && X86_LIKELY(c->generation == generation) && !is_wanted);
    c->running = NULL;
    retire(cpu, (unsigned)(in - b->insn) - is_unfinished_string(cpu, in - 1, here));
    cover(cpu, in - 1, b->mode == 8 ? here : (uint32_t)(here + cs_base));
}

static void end_shadow(x86_cpu *cpu, uint8_t inhibit)
{
    if (inhibit && cpu->inhibit == inhibit) {
        cpu->inhibit = 0;
        x86_irq_window(cpu);
    }
}

/* The instruction at `la` is done, or a hook has done it. */
static void hooked_end(x86_cpu *cpu, const x86_insn *in, uint64_t la)
{
    cpu->hook_done = false;
    if (in->flags & (X86_IF_BRANCH | X86_IF_END) || cpu->next_rip != ((cpu->rip + in->length) & rip_mask(cpu)))
        x86_block_end(cpu, la);
    else
        cpu->block_state = X86_BLOCK_MID;
}

/* Hooks before an instruction. False: it is not to be executed now; *stop says what comes instead. */
static bool hooked_begin(x86_cpu *cpu, block_cache *c, const block *b, x86_stop *stop)
{
    const uint64_t generation = c->generation, la = code_la(cpu, cpu->rip);
    const uint8_t inhibit = cpu->inhibit;
    *stop = X86_STOP_NONE;
    if (cpu->hook_done && cpu->hook_rip == cpu->rip)
        return true;
    cpu->hook_done = false;
    unsigned answer = cpu->env->hook_before(cpu, b->insn, b->gpa);
    if (answer == X86_HOOK_STOP) {
        *stop = cpu->stop;
        cpu->stop = X86_STOP_NONE;
        return false;
    }
    if (answer == X86_HOOK_SKIP) {
        hooked_end(cpu, b->insn, la);
        x86_io_retire(cpu);
        end_shadow(cpu, inhibit);
        retire(cpu, 1);
        cpu->rip = cpu->next_rip;
        return false;
    }
    cpu->hook_done = true;
    cpu->hook_rip = cpu->rip;
    return c->generation == generation;                      /* else decode anew: the hooks are not called again */
}

/* One instruction, with hooks, shadows and careful mode. */
static x86_stop run_one(x86_cpu *cpu, block_cache *c)
{
    const bool is_careful = cpu->careful & X86_CAREFUL_STEP;
    x86_stop stop;
    const uint8_t inhibit = cpu->inhibit;
    const uint64_t rflags = cpu->rflags, rip = cpu->rip, la = code_la(cpu, rip);
    c->running = NULL;
    if (is_careful)
        x86_before_careful(cpu);
    const block *b = find_block(cpu, c);
    const x86_insn *in = b->insn;
    if (cpu->code_size != 8 && rip + in->length - 1 > cpu->seg[X86_CS].limit)
        x86_raise_error(cpu, X86_GP, 0);
    cpu->next_rip = (rip + in->length) & rip_mask(cpu);
    if (X86_UNLIKELY(cpu->hook_mask & X86_HOOK_CODE) && !hooked_begin(cpu, c, b, &stop))
        return stop;
    in->exec(cpu, in);
    x86_io_retire(cpu);
    end_shadow(cpu, inhibit);
    if (!is_unfinished_string(cpu, in, rip)) {
        retire(cpu, 1);
        hooked_end(cpu, in, la);
    }
    cpu->rip = cpu->next_rip;
    cover(cpu, in, la);
    if (is_careful)
        x86_after_careful(cpu, rflags, inhibit);
    return X86_STOP_NONE;
}

/* Breakpoints alone concern only the blocks they stand in. */
static bool is_hooked_here(x86_cpu *cpu, block_cache *c)
{
    if ((cpu->hook_mask & X86_HOOK_CODE) != X86_HOOK_BIT(X86_HOOK_BREAK) || cpu->hook_done)
        return true;
    const block *b = find_block(cpu, c);
    return vm_hook_covers(vm_vcpu_of(cpu)->machine, 0, code_la(cpu, cpu->rip), b->bytes, UINT64_MAX - 64);
}

/* Instructions of the running block before the one at rip. */
static unsigned count_before(const x86_cpu *cpu, const block_cache *c)
{
    const block *b = c->running;
    const uint64_t mask = rip_mask(cpu);
    uint64_t at = c->running_rip;
    unsigned n = 0;
    while (n < b->count && at != cpu->rip) {
        at = (at + b->insn[n].length) & mask;
        n++;
    }
    return n;
}

void interp_look_again_cpu(x86_cpu *cpu)
{
    block_cache *c = cpu->interp;
    if (c)
        c->generation++;               /* run_block() stops after the instruction under way */
}

uint64_t interp_retired_cpu(const x86_cpu *cpu)
{
    const block_cache *c = cpu->interp;
    return cpu->retired + (c && c->running ? count_before(cpu, c) : 0);
}

/* After a longjmp: count what retired before the instruction at rip (an instruction that left on purpose with rip after itself
 * counts too). */
static void settle(x86_cpu *cpu, block_cache *c)
{
    const bool has_left = cpu->stop == X86_STOP_HALT || cpu->stop == X86_STOP_HYPERCALL,
               has_retired = has_left || (cpu->stop == X86_STOP_NONE && cpu->fault.is_after);
    retire(cpu, c->running ? count_before(cpu, c) : has_retired);
    c->running = NULL;
    if (has_left)
        x86_hook_left(cpu);
    if (cpu->stop == X86_STOP_SKIP) {
        x86_hook_skipped(cpu);
        cpu->stop = X86_STOP_NONE;
    }
}

enum { FAULTS_IN_A_ROW = 256 };

static x86_stop loop(x86_cpu *cpu, block_cache *c)
{
    for (;;) {
        if (c->has_begun && cpu->has_until && cpu->rip == cpu->until)
            return X86_STOP_UNTIL;
        if (X86_UNLIKELY(atomic_load_explicit(&cpu->attention, memory_order_relaxed)))
            return X86_STOP_ATTENTION;
        if (cpu->budget <= c->enough)
            return X86_STOP_SLICE;
        uint64_t retired = cpu->retired;
        if (X86_UNLIKELY((cpu->careful & X86_CAREFUL_STEP) || cpu->inhibit ||
                         ((cpu->hook_mask & X86_HOOK_CODE) && is_hooked_here(cpu, c)))) {
            x86_stop stop = run_one(cpu, c);
            if (stop != X86_STOP_NONE)
                return stop;
            if (cpu->step_asked && cpu->retired != retired)
                return X86_STOP_STEP;
        } else {
            c->running = NULL;
            const block *b = find_block(cpu, c);
            unsigned n = cut_block(cpu, b);
            if (X86_LIKELY(n))
                run_block(cpu, c, b, n);
            else
                run_one(cpu, c);                             /* raises the CS limit fault */
        }
        if (cpu->retired != retired)
            c->has_begun = true;
    }
}

static block_cache *cache_of(x86_cpu *cpu)
{
    if (!cpu->interp)
        cpu->interp = block_cache_new();
    return cpu->interp;
}

x86_stop interp_run_cpu(x86_cpu *cpu)
{
    jmp_buf here, *saved = cpu->fault_jmp;
    block_cache *c = cache_of(cpu);
    volatile unsigned faults = 0;
    volatile uint64_t retired = cpu->retired;
    volatile x86_stop stop = X86_STOP_NONE;
    if (!c)
        return X86_STOP_INTERNAL;
    cpu->fault_jmp = &here;
    cpu->io_pos = 0;
    cpu->stop = X86_STOP_NONE;
    c->running = NULL;
    c->has_begun = false;
    if (setjmp(here)) {
        const bool is_fault = cpu->stop == X86_STOP_NONE, is_skip = cpu->stop == X86_STOP_SKIP;
        settle(cpu, c);
        stop = cpu->stop;
        if (is_fault) {
            stop = x86_deliver_fault(cpu);
            faults = cpu->retired == retired ? faults + 1 : 0;
            retired = cpu->retired;
        }
        if (is_fault || is_skip) {
            c->has_begun = true;
            if (stop == X86_STOP_NONE && cpu->step_asked)
                stop = X86_STOP_STEP;
        }
    }
    if (faults >= FAULTS_IN_A_ROW && stop == X86_STOP_NONE)
        stop = X86_STOP_ATTENTION;       /* faults that fault: nothing retires, so let the run loop look at its deadline */
    if (stop == X86_STOP_NONE)
        stop = loop(cpu, c);
    cpu->fault_jmp = saved;
    cpu->io_pos = 0;
    return stop;
}

x86_stop interp_run_some_cpu(x86_cpu *cpu, int64_t some)
{
    block_cache *c = cache_of(cpu);
    if (!c)
        return X86_STOP_INTERNAL;
    c->enough = cpu->budget > some ? cpu->budget - some : 0;
    x86_stop stop = interp_run_cpu(cpu);
    c->enough = 0;
    return stop;
}

x86_stop interp_step_cpu(x86_cpu *cpu)
{
    jmp_buf here, *saved = cpu->fault_jmp;
    block_cache *c = cache_of(cpu);
    volatile x86_stop stop = X86_STOP_NONE;
    if (!c)
        return X86_STOP_INTERNAL;
    cpu->fault_jmp = &here;
    cpu->io_pos = 0;
    cpu->stop = X86_STOP_NONE;
    const uint64_t retired = cpu->retired;
    bool is_event = false;
    if (setjmp(here) == 0) {
        stop = run_one(cpu, c);
    } else {
        const bool is_fault = cpu->stop == X86_STOP_NONE;
        settle(cpu, c);
        stop = is_fault ? x86_deliver_fault(cpu) : cpu->stop;
        is_event = is_fault;
    }
    if (stop == X86_STOP_NONE && cpu->step_asked && (is_event || cpu->retired != retired))
        stop = X86_STOP_STEP;
    cpu->fault_jmp = saved;
    cpu->io_pos = 0;
    return stop;
}

int interp_create_cpu(x86_cpu *cpu)
{
    return cache_of(cpu) ? 0 : -1;
}

void interp_destroy_cpu(x86_cpu *cpu)
{
    block_cache_free(cpu->interp);
    cpu->interp = NULL;
}

void interp_code_changed_cpu(x86_cpu *cpu, uint64_t gpa, uint64_t bytes)
{
    if (cpu->interp)
        block_cache_drop(cpu->interp, gpa, bytes);
}

void interp_flush_code_cpu(x86_cpu *cpu)
{
    if (cpu->interp)
        block_cache_clear(cpu->interp);
}

void interp_tlb_flushed_cpu(x86_cpu *cpu)
{
    block_cache *c = cpu->interp;
    if (c) {
        c->generation++;
        c->jump_generation += 256;
    }
}
