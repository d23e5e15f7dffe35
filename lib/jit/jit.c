/* jit.c - guest code as host code.
 *
 * Guest and host are both x86-64, so most guest instructions run as they are with their operands renamed (emit.c has
 * the register plan). What must differ is memory addresses (the inline TLB), control flow (blocks, links, a jump cache)
 * and whatever is privileged or odd: that calls the interpreter's semantic function on the spilled CPU. So the JIT is
 * complete from the first day, and each instruction has one meaning.
 *
 * Blocks. Code is translated a block at a time, keyed by linear address, guest-physical address and jit_key(): what
 * else the code depends on. Each vCPU has a cache of its own, mapped twice (one view writable, the other executable),
 * so that translation needs no lock and no block is ever changed under another thread. Direct jumps within a page
 * (anywhere while paging is off) are linked; the rest go through a jump cache that is emptied whenever a linear address
 * may have come to mean something else.
 *
 * Eviction. Code and what is known of it (the arena) are rings with one order of blocks. Before a block is made, the
 * oldest ones in front of the cursors go: their entries in tables, the links to them, the links from them. Only the
 * dispatcher makes blocks, when no translated code is being executed, so nothing can be inside one of those that go; of
 * what it holds itself only the edge it came by (jit.link) may lie in such a block. Dead blocks stay where they are
 * until it is their turn.
 *
 * Traces. Slices end at random, so where they end often is hot. There the interpreter notes the addresses of the next
 * instructions, and the block is made again along them (lift.c). The path is a hint: each step of it is compared.
 *
 * Time. R15 counts instructions down; each edge subtracts its block's count and leaves when it turns negative, so the
 * run loop's `attention` is looked at every SLICE instructions at the latest, and sooner where they are slow (loads that
 * miss caches, transcendentals): each slice is as long as the time of the one before suggests. A budget that must be
 * exact runs all but its last EXACT_TAIL instructions here and those in the interpreter.
 *
 * State. rip is an immediate in each stub that may call C; flags are exact by emit.c's rules; general and vector
 * registers are spilled around each call. A fault longjmps from a helper straight to jit_run().
 *
 * Writes to translated code arrive through jit_code_changed(). A block that dies while it executes (its own store hit
 * it) is left before the next instruction, and that store is done again by the interpreter: it was plain RAM, so
 * nothing is lost.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <cpuid.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include "interp/interp.h"
#include "jit/jit.h"
#include "x86/native.h"
#include "mmu/mmu.h"

#define SLICE      16384 /* the longest */
#define SLICE_TICKS 80000 /* of the host's TSC: 20 to 40 us */
#define TRANSLATION_US 20 /* what a block takes, roughly */
#define ARENA_START 16 /* no site is at offset 0 */
#define EXACT_TAIL 2400 /* more than a page of one-byte blocks with live flags can overshoot */
#define MIN_CODE   (64u << 10)
#ifdef VM_TINY_CACHE
#define DEFAULT_CODE MIN_CODE
#else
#define DEFAULT_CODE (128u << 20) /* gcc wants 100 */
#endif

static inline uint64_t read_gs(void)
{
    uint64_t v;
    __asm__ volatile("rdgsbase %0" : "=r"(v));
    return v;
}
static inline void write_gs(uint64_t v) { __asm__ volatile("wrgsbase %0" : : "r"(v)); }

/* ---- what translated code depends on ---- */

static bool is_flat_data(const x86_seg *s)
{
    return !s->base && s->limit == 0xffffffffu &&
           (s->attr & (X86_SEG_P | X86_SEG_S | 0xe)) == (X86_SEG_P | X86_SEG_S | 2);
}
static bool is_whole_data(const x86_seg *s)
{
    return s->limit == 0xffffffffu && (s->attr & (X86_SEG_P | X86_SEG_S | 0xe)) == (X86_SEG_P | X86_SEG_S | 2);
}

bool jit_vec_allowed(const x86_cpu *cpu)
{
    return !(cpu->cr0 & (X86_CR0_EM | X86_CR0_TS)) && (cpu->cr4 & X86_CR4_OSFXSR) &&
           (X86_FPU_MXCSR(cpu) & 0x1f80) == 0x1f80;
}

/* Strategies under which an address without paging is physical. */
static bool is_plain_mmu(const vm_machine *m) { return vm_mmu_is_plain(m); }

bool jit_x87_allowed(const x86_cpu *cpu)
{
    return jit_vec_allowed(cpu) && (X86_FPU_FCW(cpu) & 0x3f) == 0x3f && !(X86_FPU_FSW(cpu) & 0x80);
}

static uint32_t jit_key(jit *j, const x86_cpu *cpu)
{
    uint32_t key = cpu->ctx | j->shape * (JIT_KEY_SHAPE & -JIT_KEY_SHAPE);
    if (cpu->code_size == 8)
        key |= JIT_KEY_64;
    else {
        const x86_seg *s = cpu->seg;
        if (is_flat_data(&s[X86_ES]) && is_flat_data(&s[X86_SS]) && is_flat_data(&s[X86_DS]) && cpu->stack_size == 4)
            key |= JIT_KEY_FLAT;
        if (is_whole_data(&s[X86_FS])) key |= JIT_KEY_FS;
        if (is_whole_data(&s[X86_GS])) key |= JIT_KEY_GS;
    }
    if (!cpu->cpl) key |= JIT_KEY_RING0;
    if (!(cpu->cr0 & X86_CR0_PG) || cpu->flat) key |= JIT_KEY_CHAIN;
    if ((key & JIT_KEY_CHAIN) && is_plain_mmu(j->vcpu->machine) && cpu->jit_scratch[JIT_SLOT_WINDOW_LIMIT])
        key |= JIT_KEY_WINDOW;
    if (cpu->cpl == 3 && (cpu->cr0 & X86_CR0_AM) && (cpu->rflags & X86_FL_AC)) key |= JIT_KEY_AC;
    if (j->has_vec && j->vec_ctx != cpu->ctx) j->has_vec = j->has_x87 = false;
    if (j->has_vec && jit_vec_allowed(cpu)) {
        key |= JIT_KEY_VEC;
        if (j->has_x87 && jit_x87_allowed(cpu)) key |= JIT_KEY_X87;
        if ((cpu->cr4 & X86_CR4_OSXSAVE) && (cpu->xcr0 & 6) == 6 && j->has_avx) key |= JIT_KEY_AVX;
    }
    return key;
}

/* Modes and moments that the interpreter handles. */
static bool wants_interpreter(const jit *j, x86_cpu *cpu)
{
    if (jit_hooks_want_interpreter(cpu) || cpu->code_size == 2 || cpu->inhibit || cpu->io_count || j->step_one ||
        (cpu->rflags & X86_FL_RF))
        return true;
    return cpu->code_size == 4 && (cpu->seg[X86_CS].base || cpu->seg[X86_CS].limit != 0xffffffffu);
}

/* ---- blocks: finding, linking, dropping ---- */

static unsigned hash_page(uint64_t gpa) { return (unsigned)((gpa >> 12 ^ gpa >> 26) & (JIT_PAGES - 1)); }

bool jit_is_stop(const jit *j, uint64_t rip)
{
    for (unsigned i = 0; i < j->stop_count; i++)
        if (j->stops[i] == rip) return true;
    return false;
}

static x86_jumps *jumps_of(x86_cpu *cpu, uint32_t key) { return &cpu->jump[jit_table_index(key)]; }

enum { TABLE_PART = X86_JUMP_ENTRIES / 64 };

static void clear_table(jit *j, unsigned t)
{
    x86_jumps *jumps = &j->vcpu->x86.jump[t];
    if (j->table_count[t] <= JIT_LISTED)
        for (unsigned n = 0; n < j->table_count[t]; n++)
            jumps->rip[j->table_list[t][n]] = 0;
    else
        for (uint64_t parts = j->table_touched[t]; parts; parts &= parts - 1)
            memset(&jumps->rip[(unsigned)__builtin_ctzll(parts) * TABLE_PART], 0, TABLE_PART * sizeof *jumps->rip);
    jumps->rip[0] = ~UINT64_C(0);
    j->table_used[t] = j->table_local[t] = false;
    j->table_touched[t] = j->table_gigs[t] = j->table_count[t] = 0;
}

static void enter_in_table(jit *j, unsigned t, uint64_t rip, const uint8_t *code)
{
    x86_jumps *jumps = &j->vcpu->x86.jump[t];
    unsigned i = rip & (X86_JUMP_ENTRIES - 1);
    jumps->rip[i] = rip;
    jumps->code[i] = code;
    if (j->table_count[t] < JIT_LISTED) j->table_list[t][j->table_count[t]] = (uint16_t)i;
    if (j->table_count[t] <= JIT_LISTED) j->table_count[t]++;
    j->table_touched[t] |= UINT64_C(1) << i / TABLE_PART;
    j->table_gigs[t] |= UINT64_C(1) << (rip >> 30 & 63);
}

static void clear_tables(jit *j)
{
    for (unsigned t = 0; t < JIT_TABLES; t++)
        if (j->table_used[t]) clear_table(j, t);
}

/* Addresses in the gigabyte around la (a large page may have gone) have come to mean something else. */
static void drop_from_table(jit *j, unsigned t, uint64_t la)
{
    x86_jumps *jumps = &j->vcpu->x86.jump[t];
    if (!(j->table_gigs[t] >> (la >> 30 & 63) & 1)) return;
    for (uint64_t parts = j->table_touched[t]; parts; parts &= parts - 1) {
        unsigned first = (unsigned)__builtin_ctzll(parts) * TABLE_PART;
        for (unsigned i = first; i < first + TABLE_PART; i++)
            if (!((jumps->rip[i] ^ la) >> 30)) jumps->rip[i] = i ? 0 : ~UINT64_C(0);
    }
}

static void use_table(jit *j, uint32_t key)
{
    unsigned t = jit_table_index(key);
    key &= ~JIT_KEY_PLAIN; /* such blocks are never in it */
    if (j->table_key[t] != key && j->table_used[t]) clear_table(j, t);
    if (!j->table_used[t]) j->vcpu->x86.jump[t].rip[0] = ~UINT64_C(0);
    j->table_key[t] = key;
    j->table_used[t] = true;
}

static void unlink_in(jit_link *l)
{
    jit_link **p = &l->to->in;
    while (*p && *p != l) p = &(*p)->next_in;
    if (*p) *p = l->next_in;
    l->to = NULL;
}

static void link_blocks(const jit *j, jit_link *l, jit_block *to)
{
    if (l->to || l->from->is_dead || to->is_dead || (to->crosses && !(to->key & JIT_KEY_CHAIN)) ||
        jit_is_stop(j, to->rip) || l->key != to->key || l->target != to->rip)
        return;
    e_patch(j->write_base + l->jump, l->needs_mem_entry ? to->entry_mem : to->entry);
    l->to = to;
    l->next_in = to->in;
    to->in = l;
}

/* Lists of blocks are linked both ways: hundreds may have been made from one page, and the oldest go first. `chain`: where
 * its jit_chain is in a block. */
static jit_chain *chain_of(jit_block *b, size_t chain) { return (jit_chain *)(void *)((uint8_t *)b + chain); }

static void add_to(jit_block **head, jit_block *b, size_t chain)
{
    jit_chain *c = chain_of(b, chain);
    *c = (jit_chain){*head, head};
    if (c->next) chain_of(c->next, chain)->at = &c->next;
    *head = b;
}

/* c->next stays, for who goes through the list. */
static void remove_from(jit_block *b, size_t chain)
{
    jit_chain *c = chain_of(b, chain);
    if (!c->at) return;
    *c->at = c->next;
    if (c->next) chain_of(c->next, chain)->at = c->at;
    c->at = NULL;
}

void jit_kill_block(jit *j, jit_block *b)
{
    b->is_dead = true;
    j->kills++;
    if (j->has_rounds) jit_cover_forget(j, b);
    if (b->twin && !b->twin->is_dead) jit_kill_block(j, b->twin);
    remove_from(b, offsetof(jit_block, by_rip));
    remove_from(b, offsetof(jit_block, by_page));
    remove_from(b, offsetof(jit_block, by_line));
    while (b->in) {
        jit_link *l = b->in;
        e_patch(j->write_base + l->jump, j->write_base + l->stub);
        b->in = l->next_in;
        l->to = NULL;
    }
    for (unsigned i = 0; i < b->nlinks; i++)
        if (b->links[i].to) unlink_in(&b->links[i]);
    unsigned i = b->rip & (X86_JUMP_ENTRIES - 1);
    x86_jumps *jumps = jumps_of(&j->vcpu->x86, b->key);
    if (jumps->rip[i] == b->rip) jumps->rip[i] = i ? 0 : ~UINT64_C(0);
}

/* When more code is being executed than the cache holds, most blocks go before they have repaid their translation, which
 * takes as long as some 500 instructions of the interpreter. Then code is left to it until it has been met several times:
 * more often when the cache was filled quickly again, less when that took long. Tests of the JIT itself (cold is 0) go without. */
static void note_lap(jit *j)
{
    enum { POOR = 1500, RICH = 6000, MOST = 64 };
    uint64_t now = j->vcpu->x86.retired, each = (now - j->lap_retired) / (j->lap_blocks + 1);
    if (each < POOR && j->worth < MOST && j->cold) j->worth *= 2;
    if (each > RICH && j->worth > 1) j->worth /= 2;
    j->lap_retired = now;
    j->lap_blocks = 0;
    memset(j->met, 0, sizeof j->met);
}

static bool is_worth(jit *j, uint64_t rip)
{
    if (j->worth == 1) return true;
    uint8_t *met = &j->met[jit_hash_block(rip) & 1023];
    if (++*met < j->worth) return false;
    *met = 0;
    return true;
}

/* The oldest block makes room. */
static void evict(jit *j)
{
    jit_block *b = j->oldest;
    if (!b->is_dead) jit_kill_block(j, b);
    if (j->has_rounds) jit_cover_forget(j, b);
    if (j->link && j->link->from == b) j->link = NULL;
    if (!(j->oldest = b->born_next)) j->newest = NULL;
    j->vcpu->x86.stat[X86_STAT_EVICTIONS]++;
}

/* Free from a cursor on: as far as the oldest block if that is ahead of it, else to the ring's end. */
static size_t room_at(const uint8_t *cursor, const uint8_t *oldest, const uint8_t *end)
{
    return (size_t)((oldest >= cursor ? oldest : end) - cursor);
}

bool jit_make_room(jit *j, size_t code, size_t data)
{
    for (;;) {
        const jit_block *b = j->oldest;
        const uint8_t *at = j->arena + j->arena_used, *end = j->arena + j->arena_bytes, *record = (const uint8_t *)b;
        if (!b) break;
        bool has_code = room_at(j->w.p, b->entry_mem, j->w.end) >= code, has_data = room_at(at, record, end) >= data;
        if (has_code && has_data) return true;
        if (!has_code && b->entry_mem < j->w.p) {
            j->w.p = j->code_start;
            note_lap(j);
        } else if (!has_data && record < at)
            j->arena_used = ARENA_START;
        else
            evict(j);
    }
    j->w.p = j->code_start;
    j->arena_used = ARENA_START;
    return (size_t)(j->w.end - j->w.p) >= code && j->arena_bytes - j->arena_used >= data;
}

static void flush_all(jit *j)
{
    if (j->oldest) { /* without any block the tables are still untouched zero pages */
        for (const jit_block *b = j->oldest; b; b = b->born_next) j->hash[jit_hash_block(b->rip)] = NULL;
        memset(j->pages, 0, sizeof j->pages);
        memset(j->lines, 0, sizeof j->lines);
    }
    j->kills++;
    jit_cover_forget(j, NULL);
    clear_tables(j);
    j->w.p = j->code_start;
    j->arena_used = ARENA_START;
    j->oldest = j->newest = NULL;
    j->link = NULL;
    j->must_flush = false;
}

/* Is any of [at, at + bytes), all on one page, among the bytes that a block on the page `page` was made from? */
static bool overlaps_on(const jit_block *b, uint64_t page, uint64_t at, uint64_t bytes)
{
    if ((page ^ at) & X86_PAGE_MASK) return false;
    uint64_t begin = at & 0xfff, end = begin + bytes;
    for (unsigned i = 0; i < b->nextents; i++)
        if (b->extents[i].begin < end && begin < b->extents[i].end) return true;
    return false;
}
static bool block_overlaps(const jit_block *b, uint64_t gpa, uint64_t bytes)
{
    return overlaps_on(b, b->gpa, gpa, bytes);
}

/* Code that writes beside itself again and again: translating it each time costs far more than interpreting it. A page
 * whose blocks die several times within few instructions is the interpreter's for a while. */
enum { HEAT_WINDOW = 1000, HEAT_LIMIT = 6, HEAT_TIME = 30000 };

static void note_heat(jit *j, uint64_t gpa)
{
    unsigned h = hash_page(gpa) & 255;
    uint64_t now = j->vcpu->x86.retired;
    if (now - j->heat[h].last > HEAT_WINDOW) j->heat[h].kills = 0;
    j->heat[h].last = now;
    if (++j->heat[h].kills >= HEAT_LIMIT) j->heat[h].until = now + HEAT_TIME;
}

static bool is_hot(const jit *j, uint64_t gpa) { return j->vcpu->x86.retired < j->heat[hash_page(gpa) & 255].until; }

static void jit_code_changed(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes)
{
    jit *j = cpu->x86.jit;
    if (!j || !j->write_base) return;
    if (bytes > (256u << 12)) {
        j->must_flush = true;
        return;
    }
    while (bytes) {
        uint64_t n = 4096 - (gpa & 0xfff);
        if (n > bytes) n = bytes;
        jit_block *next;
        bool any = false;
        for (jit_block *b = j->pages[hash_page(gpa)]; b; b = next) {
            next = b->by_page.next;
            if (block_overlaps(b, gpa, n)) {
                jit_kill_block(j, b);
                any = true;
            }
        }
        if (any) note_heat(j, gpa);
        gpa += n;
        bytes -= n;
    }
}

/* Drops what was translated from code in [lo, hi], linear or guest-physical addresses. */
void jit_drop_code(jit *j, uint64_t lo, uint64_t hi, bool is_gpa)
{
    for (uint64_t at = lo;; at = (at & X86_PAGE_MASK) + 4096) {
        uint64_t last = hi - at < 4095 - (at & 0xfff) ? hi : at | 0xfff;
        jit_block *next, **head = is_gpa ? j->pages : j->lines;
        for (jit_block *b = head[hash_page(at)]; b; b = next) {
            next = is_gpa ? b->by_page.next : b->by_line.next;
            if (overlaps_on(b, is_gpa ? b->gpa : b->rip, at, last - at + 1)) jit_kill_block(j, b);
        }
        if (last == hi) return;
    }
}

/* An address becomes a place where execution must come back to C. */
static void add_stop(jit *j, uint64_t rip)
{
    if (jit_is_stop(j, rip)) return;
    j->stops[j->stop_next] = rip;
    j->stop_next = (j->stop_next + 1) % JIT_STOPS;
    if (j->stop_count < JIT_STOPS) j->stop_count++;
    jit_drop_code(j, rip, rip, false);
}

/* ---- translation ---- */

void *jit_take(jit *j, size_t bytes)
{
    void *p = j->arena + j->arena_used;
    j->arena_used += (bytes + 15) & ~(size_t)15;
    return p;
}

void jit_place_extents(jit *j, const jit_unit *u, jit_block *b, unsigned page)
{
    b->extents = jit_take(j, u->nextents * sizeof *b->extents);
    for (unsigned k = 0; k < u->nextents; k++)
        if (u->extents[k].page == page) b->extents[b->nextents++] = u->extents[k];
}

/* Guest-physical address of code at la; raises the fetch's faults. */
static uint64_t fetch_gpa(x86_cpu *cpu, uint64_t la)
{
    unsigned i = X86_TLB_INDEX(la);
    const x86_tlb *t = &cpu->tlb[cpu->ctx];
    if (((la ^ t->e[i].tag_x) & X86_PAGE_MASK) == 0 && (t->meta[i] & X86_TLBM_VALID))
        return (t->meta[i] & X86_PAGE_MASK) | (la & 0xfff);
    uint64_t gpa;
    cpu->next_rip = cpu->rip; /* what faults now has no length */
    if (cpu->code_size == 8 && !x86_canonical(la)) x86_raise_error(cpu, X86_GP, 0);
    if (!cpu->env->fill(cpu, la, X86_EXEC, cpu->ctx, &gpa)) x86_raise_fault(cpu, &cpu->fault);
    return gpa;
}

/* The page after rip's, as code: its gpa, for instructions that end there. */
static uint64_t next_page_gpa(x86_cpu *cpu)
{
    uint64_t la = (cpu->rip & X86_PAGE_MASK) + 4096;
    return fetch_gpa(cpu, cpu->code_size == 8 ? la : (uint32_t)la);
}

/* b is told when its bytes change. */
static void watch(jit *j, jit_block *b)
{
    add_to(&j->pages[hash_page(b->gpa)], b, offsetof(jit_block, by_page));
    add_to(&j->lines[hash_page(b->rip)], b, offsetof(jit_block, by_line));
}

static void publish(jit *j, jit_block *b)
{
    watch(j, b);
    add_to(&j->hash[jit_hash_block(b->rip)], b, offsetof(jit_block, by_rip));
    *(j->newest ? &j->newest->born_next : &j->oldest) = b;
    j->newest = b;
    j->lap_blocks++;
    j->vcpu->x86.stat[X86_STAT_BLOCKS]++;
}

/* Another page that b was made from. */
static jit_block *new_twin(jit *j, jit_block *b, uint64_t gpa)
{
    jit_block *twin = jit_take(j, sizeof *twin);
    memset(twin, 0, sizeof *twin);
    twin->gpa = gpa;
    twin->twin = b->twin ? b->twin : b;
    b->twin = twin;
    return twin;
}

static jit_block *translate_with(jit_unit *u, int *failed)
{
    if (!jit_lift(u, u->most)) return NULL;
    u->no_groups |= u->nhooked != 0;
    jit_optimise(u);
    return jit_emit(u, failed);
}

/* `page` is where the bytes of the block's page are (of a crossing instruction: its own). */
static jit_block *translate_unit(jit *j, uint64_t rip, uint64_t gpa, uint32_t key, const uint8_t *page)
{
    x86_cpu *cpu = &j->vcpu->x86;
    jit_unit *u = j->unit;
    u->j = j;
    u->cpu = cpu;
    u->rip = rip;
    u->gpa = gpa;
    u->key = key;
    u->page = page;
    u->forced = 0;
    u->most = u->crosses ? 1 : JIT_MAX_INSNS;
    u->no_groups = (key & JIT_KEY_PLAIN) || cpu->watch || j->no_groups[jit_hash_block(u->rip) & 1023];
    for (unsigned tries = 0; tries < 4 + JIT_MAX_INSNS; tries++) {
        int failed = JIT_NONE;
        jit_block *b = translate_with(u, &failed);
        if (b) {
            publish(j, b);
            cpu->stat[X86_STAT_DECODED] += u->count;
            if (vm_trace_mask(j->vcpu->machine) & (VM_TRACE_IR | VM_TRACE_MCODE)) jit_print(j, u, b);
            return b;
        }
        if (failed == JIT_NONE || (failed == JIT_FULL && u->most < 2 * JIT_LOOK_AHEAD)) return NULL;
        if (failed == JIT_FULL)
            u->most /= 2;
        else
            u->forced |= UINT64_C(1) << failed;
    }
    return NULL;
}

/* NULL: this instruction is the interpreter's (not RAM), or it crosses the page. */
static jit_block *translate(jit *j, uint64_t gpa, uint32_t key)
{
    x86_cpu *cpu = &j->vcpu->x86;
    unsigned prot = 0;
    cpu->env->code_page(cpu, gpa & X86_PAGE_MASK);
    if (key & JIT_KEY_WINDOW) jit_note_code_page(j, gpa & X86_PAGE_MASK);
    if (j->must_flush) flush_all(j);
    const uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    if (!page || !(prot & X86_EXEC)) return NULL;
    return translate_unit(j, cpu->rip, gpa, key, page);
}

/* The one instruction at rip that ends on the next page: translated from a copy of its bytes, watched on both pages. */
static jit_block *translate_crossing(jit *j, uint64_t gpa, uint32_t key)
{
    x86_cpu *cpu = &j->vcpu->x86;
    jit_unit *u = j->unit;
    unsigned first = 4096 - (gpa & 0xfff), prot[2] = {0};
    cpu->env->code_page(cpu, gpa & X86_PAGE_MASK);
    const uint8_t *a = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot[0]);
    if (!a || !(prot[0] & X86_EXEC) || first >= 15) /* what the first page does comes before the second's faults */
        return NULL;
    uint64_t gpa2 = next_page_gpa(cpu);
    cpu->env->code_page(cpu, gpa2);
    const uint8_t *b = cpu->env->page(cpu, gpa2, &prot[1]);
    if (!b || !(prot[1] & X86_EXEC)) return NULL;
    if (key & JIT_KEY_WINDOW) {
        jit_note_code_page(j, gpa & X86_PAGE_MASK);
        jit_note_code_page(j, gpa2);
    }
    if (j->must_flush) flush_all(j);
    memcpy(u->bytes, a + (gpa & 0xfff), first);
    memcpy(u->bytes + first, b, 15 - first);
    u->crosses = true;
    jit_block *main = translate_unit(j, cpu->rip, gpa, key, u->bytes);
    u->crosses = false;
    if (!main) return NULL;
    jit_block *twin = new_twin(j, main, gpa2);
    twin->extents = jit_take(j, sizeof *twin->extents);
    twin->extents[0] = (jit_extent){0, 15, 0};
    twin->nextents = 1;
    main->crosses = true;
    add_to(&j->pages[hash_page(gpa2)], twin, offsetof(jit_block, by_page));
    return main;
}

/* Fetches from the page at gpa are forbidden now, whatever has been translated there: the interpreter will meet that. */
static bool is_forbidden(x86_cpu *cpu, uint64_t gpa)
{
    unsigned prot = 0;
    return cpu->exec_varies && (!cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot) || !(prot & X86_EXEC));
}

static jit_block *find_block(jit *j, uint32_t key)
{
    x86_cpu *cpu = &j->vcpu->x86;
    x86_look_for_stop(cpu, cpu->code_size == 8 ? cpu->rip : (uint32_t)(cpu->seg[X86_CS].base + cpu->rip));
    uint64_t gpa = fetch_gpa(cpu, cpu->rip);
    if (is_forbidden(cpu, gpa) || (cpu->exec_varies && (gpa & 0xfff) > 4096 - 15)) return NULL;
    for (jit_block *b = j->hash[jit_hash_block(cpu->rip)]; b; b = b->by_rip.next)
        if (b->rip == cpu->rip && b->gpa == gpa && b->key == key && (!b->crosses || b->twin->gpa == next_page_gpa(cpu)))
            return b;
    if ((j->is_left = is_hot(j, gpa) || !is_worth(j, cpu->rip))) return NULL;
    x86_spend(cpu, TRANSLATION_US);
    jit_block *b = translate(j, gpa, key);
    return b || (gpa & 0xfff) <= 4096 - 15 ? b : translate_crossing(j, gpa, key);
}

/* ---- the run loop's side ---- */

static x86_stop interpret_one(jit *j)
{
    j->step_one = false;
    return interp_step(j->vcpu);
}

/* The interpreter in the JIT's place for some instructions. NONE: they are done. */
static x86_stop interpret(jit *j, x86_cpu *cpu, int64_t some)
{
    j->is_cold = true;
    x86_stop stop = interp_run_some(j->vcpu, some);
    j->is_cold = false;
    return stop == X86_STOP_SLICE && cpu->budget > 0 ? X86_STOP_NONE : stop;
}

/* What is not translated: one instruction that is odd, or a stretch where all of the code is. */
static x86_stop interpret_here(jit *j, x86_cpu *cpu)
{
    enum { STRETCH = 256, SHORT = 32 };
    bool is_long = cpu->code_size == 2 && !j->step_one, is_left = j->is_left;
    j->is_left = false;
    return is_long ? interpret(j, cpu, STRETCH) : is_left ? interpret(j, cpu, j->worth > 1 ? SHORT : STRETCH) : interpret_one(j);
}

/* A slice has taken so long: the next one should not take more than SLICE_TICKS. They grow slowly again, so that loops in
 * which slow code comes and goes have short ones; that a host did something else meanwhile costs next to nothing. */
static void set_slice(jit *j, x86_cpu *cpu, uint64_t ticks)
{
    enum { SHORTEST = 128, TICKS_PER_US = 1024 }; /* at least */
    int64_t slice = j->slice;
    if (ticks > SLICE_TICKS)
        slice = (int64_t)((uint64_t)slice * SLICE_TICKS / ticks);
    else if (ticks < SLICE_TICKS / 4)
        slice += slice / 16 + 1;
    j->slice = slice > j->longest ? j->longest : slice < SHORTEST && slice < j->longest ? SHORTEST : slice;
    x86_spend(cpu, (unsigned)(ticks > 255 * TICKS_PER_US ? 255 : ticks / TICKS_PER_US));
}

/* Execute translated code from rip on, for at most a slice. Returns how it left. */
static unsigned enter(jit *j, x86_cpu *cpu, uint32_t key, const uint8_t *code)
{
    int64_t slice = cpu->budget - (j->vcpu->has_budget ? EXACT_TAIL : 0); /* at least 1 */
    if (slice > j->slice) slice = j->slice;
    cpu->jit_scratch[JIT_SLOT_R15] = (uint64_t)slice;
    cpu->jit_scratch[JIT_SLOT_LEAVE] = 0;
    j->r15_start = slice;
    jit_store_flags(cpu);
    if (key & JIT_KEY_X87) jit_keep_x87_pointers(j, cpu);
    cpu->hook_site = 0;
    const uint64_t began = j->is_timed ? __builtin_ia32_rdtsc() : 0;
    j->in_code = true;
    ((void (*)(const void *))(uintptr_t)j->enter[jit_level(key)])(code);
    j->in_code = false;
    if (j->has_rounds) jit_cover_rounds(j, cpu);
    cpu->hook_site = 0;
    if (key & JIT_KEY_X87) jit_load_x87_pointers(j, cpu);
    jit_count_retired(j, cpu, 0);
    jit_load_flags(cpu);
    const unsigned reason = (unsigned)cpu->jit_scratch[JIT_SLOT_REASON];
    if (reason == JIT_LEAVE_SLICE && j->is_timed) set_slice(j, cpu, __builtin_ia32_rdtsc() - began);
    j->is_timed = reason == JIT_LEAVE_SLICE;
    return reason;
}

/* Is the page of code at la known to be global? */
static bool is_global(const x86_cpu *cpu, uint64_t la)
{
    unsigned i = X86_TLB_INDEX(la);
    const x86_tlb *t = &cpu->tlb[cpu->ctx];
    return !((la ^ t->e[i].tag_x) & X86_PAGE_MASK) && (t->meta[i] & X86_TLBM_GLOBAL);
}

/* Code at rip. j->link: linked to it, if it is an edge of translated code. */
static const uint8_t *lookup(jit *j, x86_cpu *cpu, uint32_t key)
{
    use_table(j, key);
    x86_jumps *jumps = jumps_of(cpu, key);
    unsigned i = cpu->rip & (X86_JUMP_ENTRIES - 1);
    if (!j->link && jumps->rip[i] == cpu->rip && jumps->code[i]) return jumps->code[i];
    jit_block *b = find_block(j, key);
    if (!b) return NULL;
    use_table(j, key);
    const uint8_t *code = b->entry_mem + j->w.to_exec;
    if (!jit_is_stop(j, b->rip)) {
        if (!(key & JIT_KEY_PLAIN)) {
            enter_in_table(j, jit_table_index(key), b->rip, code);
            if (!is_global(cpu, b->rip)) j->table_local[jit_table_index(key)] = true;
        }
        if (j->link) link_blocks(j, j->link, b);
    }
    return code;
}

/* ---- traces ---- */

static bool at_until(const x86_cpu *cpu) { return cpu->has_until && cpu->rip == cpu->until; }

static bool may_trace(const jit *j, const x86_cpu *cpu)
{
    return JIT_MAX_INSNS >= 8 && !cpu->hook_mask && !cpu->watch && !cpu->cover.ring &&
           !j->must_flush && !j->window_stale && cpu->budget > EXACT_TAIL &&
           !atomic_load_explicit(&cpu->attention, memory_order_relaxed);
}

/* A block that goes round in itself is as good as a trace. */
static bool is_loop(const jit_block *b)
{
    for (unsigned i = 0; i < b->nlinks; i++)
        if (b->links[i].to == b) return true;
    return false;
}

/* Is rip where slices end again and again? */
static bool is_sampled(jit *j, uint64_t rip)
{
    unsigned h = jit_hash_block(rip) & 255, wanted = j->longest < SLICE ? 1 : 4;
    if (j->samples[h].rip != rip) {
        j->samples[h].rip = rip;
        j->samples[h].count = 0;
    }
    return ++j->samples[h].count == wanted;
}

/* The pages of a path besides its first. Where linear addresses are physical, nothing but their bytes can change. */
static void find_pages(jit *j, uint32_t key, const uint64_t *path, unsigned count)
{
    x86_cpu *cpu = &j->vcpu->x86;
    jit_unit *u = j->unit;
    u->nmore = 0;
    if (!(key & JIT_KEY_WINDOW) || cpu->exec_varies) return;
    for (unsigned i = 1; i < count && u->nmore < JIT_MORE_PAGES; i++) {
        uint64_t la = path[i] & X86_PAGE_MASK;
        unsigned k = 0, prot = 0;
        while (k < u->nmore && u->more[k].la != la) k++;
        if (la == (path[0] & X86_PAGE_MASK) || k < u->nmore) continue;
        const uint8_t *host = cpu->env->page(cpu, la, &prot);
        if (!host || !(prot & X86_EXEC)) continue;
        cpu->env->code_page(cpu, la);
        jit_note_code_page(j, la);
        u->more[u->nmore].la = la;
        u->more[u->nmore++].host = host;
    }
}

/* Make the block at path[0] again, along the path. */
static void translate_path(jit *j, jit_block *old, const uint64_t *path, unsigned count)
{
    x86_cpu *cpu = &j->vcpu->x86;
    jit_unit *u = j->unit;
    unsigned prot = 0;
    const uint8_t *page = cpu->env->page(cpu, old->gpa & X86_PAGE_MASK, &prot);
    if (!page || !(prot & X86_EXEC)) return;
    find_pages(j, old->key, path, count);
    if (!j->must_flush) {
        jit_kill_block(j, old);
        u->path = path;
        u->path_count = count;
        jit_block *b = translate_unit(j, old->rip, old->gpa, old->key, page);
        if (b) b->is_traced = true;
        for (unsigned k = 0; b && k < u->nmore; k++) {
            jit_block *twin = new_twin(j, b, u->more[k].la);
            twin->rip = u->more[k].la;
            twin->key = b->key;
            jit_place_extents(j, u, twin, k + 1);
            watch(j, twin);
        }
        u->path = NULL;
    } else
        j->samples[jit_hash_block(old->rip) & 255].count = 0;
    u->nmore = 0;
}

bool jit_has_no_guard(const jit *j, uint64_t rip) { return j->no_guard[jit_hash_block(rip) & 1023]; }

/* The CALL at rip went elsewhere: the interpreter makes it. If that is its habit, the trace goes. */
static void note_miss(jit *j, x86_cpu *cpu)
{
    enum { MOST = 32 };
    jit_block *b = (jit_block *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_LINK];
    j->step_one = true;
    if (b->is_dead || ++b->bails < MOST) return;
    j->no_guard[jit_hash_block(cpu->rip) & 1023] = 1;
    jit_kill_block(j, b);
    j->samples[jit_hash_block(b->rip) & 255].count = 0; /* another trace may be better */
}

/* A slice has ended in front of code that is hot: note where execution goes from here, and translate that way. */
static x86_stop sample(jit *j, uint32_t key)
{
    x86_cpu *cpu = &j->vcpu->x86;
    if (!may_trace(j, cpu) || !is_sampled(j, cpu->rip) || wants_interpreter(j, cpu)) return X86_STOP_NONE;
    jit_block *b = find_block(j, key & ~JIT_KEY_PLAIN);
    if (!b || b->is_traced || b->crosses || is_loop(b)) return X86_STOP_NONE;
    b->is_traced = true;
    uint64_t path[JIT_MAX_INSNS + 1];
    unsigned n = 0, count;
    for (path[n++] = cpu->rip; n <= JIT_MAX_INSNS && !at_until(cpu) && may_trace(j, cpu) && !wants_interpreter(j, cpu);
         path[n++] = cpu->rip) {
        x86_stop stop = interpret_one(j);
        if (stop) return stop;
    }
    for (count = n - 1; count && path[count] != path[0]; count--)
        ;
    if (!count) count = n - 1;
    if (count > b->count && !b->is_dead && may_trace(j, cpu)) translate_path(j, b, path, count);
    return X86_STOP_NONE;
}

static void jit_map_changed(vm_machine *m)
{
    vm_backend_interp.map_changed(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i] && m->vcpus[i]->x86.jit) {
            jit_hook_disturb(&m->vcpus[i]->x86);
            ((jit *)m->vcpus[i]->x86.jit)->window_stale = true;
            m->vcpus[i]->x86.jit_scratch[JIT_SLOT_WINDOW_LIMIT] = m->vcpus[i]->x86.jit_scratch[JIT_SLOT_WRITE_LIMIT] =
                0;
        }
}

static x86_stop run_loop(jit *j)
{
    x86_cpu *cpu = &j->vcpu->x86;
    j->link = NULL;
    for (;;) {
        if (j->window_stale) jit_find_windows(j);
        if (j->must_flush) flush_all(j);
        if (cpu->budget <= 0) return X86_STOP_SLICE;
        if (atomic_load_explicit(&cpu->attention, memory_order_relaxed)) return X86_STOP_ATTENTION;
        const uint8_t *code = NULL;
        uint32_t key = 0;
        if (!wants_interpreter(j, cpu) && cpu->budget > (j->vcpu->has_budget ? EXACT_TAIL : 1)) {
            key = jit_key(j, cpu) | (j->link ? j->link->key & JIT_KEY_PLAIN : 0);
            code = lookup(j, cpu, key);
        }
        j->link = NULL;
        const uint64_t retired = cpu->retired;
        if (!code) {
            x86_stop stop = interpret_here(j, cpu);
            if (stop) return stop;
        } else {
            unsigned reason = enter(j, cpu, key, code);
            if (reason == JIT_LEAVE_LINK)
                j->link = (jit_link *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_LINK];
            else if (reason == JIT_LEAVE_STEP || reason == JIT_LEAVE_WATCHED) {
                j->step_one = true;
                if (reason == JIT_LEAVE_STEP) jit_hook_half_way(cpu);
            } else if (reason == JIT_LEAVE_GUARD) {
                note_miss(j, cpu);
            } else if (reason == JIT_LEAVE_SLICE) {
                x86_stop stop = sample(j, key);
                if (stop) return stop;
            } else if (reason == JIT_LEAVE_HOOKED && j->must_step) {
                j->must_step = false;
                x86_stop stop = interpret_one(j);
                if (stop) return stop;
            } else if (reason == JIT_LEAVE_HOOKED && j->hook_stop) {
                x86_stop stop = j->hook_stop;
                j->hook_stop = X86_STOP_NONE;
                return stop;
            }
            else if (reason == JIT_LEAVE_VEC) {
                j->has_vec = jit_vec_allowed(cpu);
                j->vec_ctx = cpu->ctx;
                j->step_one = !j->has_vec;
            } else if (reason == JIT_LEAVE_X87) {
                j->has_vec = j->has_x87 = jit_x87_allowed(cpu);
                j->vec_ctx = cpu->ctx;
                j->step_one = !j->has_x87;
            }
        }
        if (at_until(cpu) && !j->step_one) return X86_STOP_UNTIL;
        x86_spend(cpu, 1 + (unsigned)(cpu->retired - retired) / (code ? 64 : 8));
    }
}

static bool jit_start(jit *j);

/* Back from a longjmp: an exit, or a fault to deliver. */
static x86_stop caught(jit *j, x86_cpu *cpu)
{
    if (j->in_code) jit_hook_half_way(cpu);
    j->in_code = false;
    x86_spend(cpu, 1);
    if (j->has_rounds) jit_cover_rounds(j, cpu);
    cpu->hook_site = 0;
    const bool has_left = cpu->stop == X86_STOP_HALT || cpu->stop == X86_STOP_HYPERCALL; /* rip is after it already */
    if (has_left || (cpu->stop == X86_STOP_NONE && cpu->fault.is_after)) {
        cpu->retired++;
        cpu->budget--;
    }
    if (cpu->stop == X86_STOP_NONE) return x86_deliver_fault(cpu);
    if (has_left) x86_hook_left(cpu);
    if (cpu->stop == X86_STOP_SKIP) {
        x86_hook_skipped(cpu);
        cpu->stop = X86_STOP_NONE;
    }
    return cpu->stop;
}

enum { FAULTS_IN_A_ROW = 256 }; /* then the run loop looks at its deadline: nothing retires, no slice ends */

enum { COLD_INSTRUCTIONS = 2000 };

/* A vCPU's first instructions are interpreted: one that executes no more than a snippet needs no code cache. NONE: warm
 * now. LIBVM_JIT_COLD in the environment sets another number (tests of the JIT itself: 0), LIBVM_JIT_SLICE another slice
 * (tests of traces: a short one, after which every path is recorded). */
static x86_stop run_cold(jit *j, x86_cpu *cpu)
{
    int64_t budget = cpu->budget;
    if (j->cold_done >= j->cold) return X86_STOP_NONE;
    x86_stop stop = interpret(j, cpu, j->cold - j->cold_done);
    j->cold_done += budget > cpu->budget ? budget - cpu->budget : 1;
    return stop;
}

static x86_stop jit_run(vm_vcpu *vcpu)
{
    x86_cpu *cpu = &vcpu->x86;
    jit *j = cpu->jit;
    if (!j->write_base) {
        x86_stop stop = run_cold(j, cpu);
        if (stop != X86_STOP_NONE) return stop;
        if (!jit_start(j)) return vm_backend_interp.run(vcpu);
    }
    if (cpu->has_until) add_stop(j, cpu->until);
    const uint64_t self = (uint64_t)(uintptr_t)cpu, host_gs = read_gs();
    if (host_gs != self) write_gs(self); /* C code on Linux has no use for GS: it stays for the whole run */
    jmp_buf door, *saved = cpu->fault_jmp;
    volatile unsigned faults = 0;
    volatile uint64_t retired = cpu->retired;
    x86_stop stop;
    do {
        cpu->stop = X86_STOP_NONE;
        cpu->fault_jmp = &door;
        if (!_setjmp(door)) {
            stop = run_loop(j);
        } else {
            stop = caught(j, cpu);
            faults = cpu->retired == retired ? faults + 1 : 0;
            retired = cpu->retired;
            if (!stop && at_until(cpu))
                stop = X86_STOP_UNTIL;
            else if (!stop && faults >= FAULTS_IN_A_ROW)
                stop = X86_STOP_ATTENTION;
        }
    } while (stop == X86_STOP_NONE);
    if (host_gs && host_gs != self) write_gs(host_gs); /* whoever uses it gets it back; writing it is slow */
    cpu->fault_jmp = saved;
    cpu->io_pos = 0;
    return stop;
}

/* ---- life ---- */

/* An address where code can be within 2 GiB of a function: processors predict calls over that distance best (a far one costs
 * three cycles more here). Below it, where programs have nothing; else the host picks the place, which is near libraries. */
static void *place_near(uint64_t function, size_t bytes)
{
    enum { GAP = 64 << 20 };
    uint64_t below = bytes + GAP;
    return function > below + GAP ? (void *)(uintptr_t)((function - below) & ~(uint64_t)(GAP - 1)) : NULL;
}

static bool host_has_avx(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_AVX) || !(c & bit_OSXSAVE)) return false;
    uint32_t lo, hi;
    __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (lo & 6) == 6;
}

static bool host_has_bmi2(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_BMI2);
}

/* Shifts leave AF undefined, and those by more than one OF. Is there anything left of the old flags on this host after one by
 * a constant? If not, nobody has to provide them. */
static bool host_shifts_define(void)
{
    static const uint64_t values[] = {0, 1, UINT64_C(0x8000000080008080), UINT64_C(0x7f12f5a3c96d0e5b)};
    bool defines = true;
#define FLAGS_AFTER(old, insn)                                                                                         \
    ({                                                                                                                 \
        uint32_t flags_ = (old);                                                                                       \
        uint64_t to_ = values[i], from_ = ~values[i] << 3;                                                             \
        __asm__("addb $0x7f, %%al; sahf; " insn "; lahf; seto %%al" : "+a"(flags_), "+q"(to_) : "q"(from_) : "cc");    \
        (uint16_t)flags_;                                                                                              \
    })
#define PROBE(insn) defines &= FLAGS_AFTER(0x0200, insn) == FLAGS_AFTER(0xd701, insn)
#define PROBE_SIZES(insn)                                                                                              \
    PROBE(insn " $1, %b1"), PROBE(insn " $7, %b1"), PROBE(insn " $9, %b1"), PROBE(insn " $1, %w1"),                    \
        PROBE(insn " $13, %w1"), PROBE(insn " $17, %w1"), PROBE(insn " $1, %k1"), PROBE(insn " $4, %k1"),              \
        PROBE(insn " $31, %k1"), PROBE(insn " $1, %1"), PROBE(insn " $12, %1"), PROBE(insn " $63, %1")
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++) {
        PROBE_SIZES("shl"), PROBE_SIZES("shr"), PROBE_SIZES("sar");
        PROBE("shld $1, %k2, %k1"), PROBE("shld $9, %2, %1"), PROBE("shrd $1, %2, %1"), PROBE("shrd $9, %k2, %k1");
    }
    return defines;
#undef PROBE_SIZES
#undef PROBE
#undef FLAGS_AFTER
}

/* The cache is made by the first run, so that a machine that never runs costs nothing; near what its code will call most. */
static bool jit_start(jit *j)
{
    vm_machine *m = j->vcpu->machine;
    size_t bytes = m->options.code_cache_bytes ? (size_t)m->options.code_cache_bytes : DEFAULT_CODE;
    bytes = bytes / m->vcpu_count & ~(size_t)4095;
    if (bytes < MIN_CODE) bytes = MIN_CODE;
    j->arena_bytes = bytes * 2 < 4 * MIN_CODE ? 4 * MIN_CODE : bytes * 2;
    j->arena = mmap(NULL, j->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (j->arena == MAP_FAILED) {
        j->arena = NULL;
        return false;
    }
    j->write_base = x86_map_code(bytes, place_near(jit_hook_callee(m), bytes), &j->exec_base);
    if (!j->write_base) {
        munmap(j->arena, j->arena_bytes);
        j->arena = NULL;
        return false;
    }
    j->code_bytes = bytes;
    j->has_avx = host_has_avx();
    j->has_bmi2 = host_has_bmi2();
    j->shifts_define = host_shifts_define();
    j->window_stale = true;
    j->w = (jit_writer){j->write_base, j->write_base + bytes, j->exec_base - j->write_base};
    j->vcpu->x86.jit_scratch[JIT_SLOT_SELF] = (uint64_t)(uintptr_t)&j->vcpu->x86;
    jit_emit_thunks(j);
    j->arena_used = ARENA_START;
    jit_hooks_shape(j);
    return true;
}

static int jit_vcpu_create(vm_vcpu *cpu)
{
    int status = vm_backend_interp.vcpu_create(cpu);
    if (status < 0) return status;
    size_t bytes = sizeof(jit) + sizeof(jit_unit);
    jit *j = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (j == MAP_FAILED) {
        vm_backend_interp.vcpu_destroy(cpu);
        return vm_fail_errno(VM_E_NOMEM, "JIT tables");
    }
    const char *cold = getenv("LIBVM_JIT_COLD"), *slice = getenv("LIBVM_JIT_SLICE");
    j->cold = cold ? atoi(cold) : COLD_INSTRUCTIONS;
    j->slice = j->longest = slice && atoi(slice) > 0 ? atoi(slice) : SLICE;
    j->worth = 1;
    j->vcpu = cpu;
    j->unit = (jit_unit *)(j + 1);
    cpu->x86.jit = j;
    return VM_OK;
}

static void jit_vcpu_destroy(vm_vcpu *cpu)
{
    jit *j = cpu->x86.jit;
    if (j) {
        clear_tables(j); /* the vCPU may have another JIT one day */
        if (j->write_base) {
            munmap(j->write_base, j->code_bytes);
            munmap(j->exec_base, j->code_bytes);
            munmap(j->arena, j->arena_bytes);
        }
        munmap(j, sizeof(jit) + sizeof(jit_unit));
        cpu->x86.jit = NULL;
    }
    vm_backend_interp.vcpu_destroy(cpu);
}

static void jit_code_changed_both(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes)
{
    jit_hook_disturb(&cpu->x86);
    jit_code_changed(cpu, gpa, bytes);
    vm_backend_interp.code_changed(cpu, gpa, bytes);
}

static void jit_flush_code(vm_vcpu *cpu)
{
    jit *j = cpu->x86.jit;
    jit_hook_disturb(&cpu->x86);
    if (j->write_base) j->must_flush = true;
    vm_backend_interp.flush_code(cpu);
}

static void jit_tlb_flushed(vm_vcpu *cpu)
{
    jit *j = cpu->x86.jit;
    if (j) clear_tables(j);
    jit_hook_disturb(&cpu->x86);
    if (vm_backend_interp.tlb_flushed) vm_backend_interp.tlb_flushed(cpu);
}

/* No code that is known begins in the page at la, or ends there: of a data page that kernels map and unmap all the time (kmap,
 * a 32-bit one's fixmap, a program's heap) the tables hold nothing. A large page may be gone with it, and its code. */
static bool is_without_code(const jit *j, uint64_t la)
{
    const x86_cpu *cpu = &j->vcpu->x86;
    uint64_t page = la & X86_PAGE_MASK, before = page - 4096;
    if (!page || (la >= cpu->large_lo[la >> 63] && la <= cpu->large_hi[la >> 63])) return false;
    for (const jit_block *b = j->lines[hash_page(page)]; b; b = b->by_line.next)
        if ((b->rip & X86_PAGE_MASK) == page) return false;
    for (const jit_block *b = j->lines[hash_page(before)]; b; b = b->by_line.next)
        if ((b->rip & X86_PAGE_MASK) == before && b->crosses) return false;
    return true;
}

static void jit_tlb_dropped(vm_vcpu *cpu, uint64_t la, uint64_t bytes, bool keep_global)
{
    jit *j = cpu->x86.jit;
    bool is_kept = j && bytes && (la & 0xfff) + bytes <= 4096 && is_without_code(j, la);
    for (unsigned t = 0; j && !is_kept && t < JIT_TABLES; t++) {
        if (!j->table_used[t] || (keep_global && !bytes && !j->table_local[t])) continue;
        if (!bytes || ((la ^ (la + bytes - 1)) >> 30))
            clear_table(j, t);
        else
            drop_from_table(j, t, la);
    }
    vm_backend_interp.tlb_flushed(cpu);
}

/* Tables with more than is listed are not set aside. */
static void jit_park(vm_vcpu *cpu, unsigned slot)
{
    jit *j = cpu->x86.jit;
    if (!j) return;
    j->parks[slot].count = 0;
    j->parks[slot].kills = j->kills;
    for (unsigned t = 0; t < JIT_TABLES; t++) {
        const x86_jumps *jumps = &cpu->x86.jump[t];
        if (!j->table_used[t] || !j->table_local[t] || j->table_count[t] > JIT_LISTED) continue;
        for (unsigned n = 0; n < j->table_count[t] && j->parks[slot].count < JIT_LISTED; n++) {
            unsigned i = j->table_list[t][n], at = j->parks[slot].count;
            if (!i || !jumps->rip[i]) continue;
            j->parks[slot].held[at].rip = jumps->rip[i];
            j->parks[slot].held[at].code = jumps->code[i];
            j->parks[slot].held[at].key = j->table_key[t];
            j->parks[slot].count++;
        }
    }
}

static void jit_unpark(vm_vcpu *cpu, unsigned slot)
{
    jit *j = cpu->x86.jit;
    if (!j || j->parks[slot].kills != j->kills) return;
    for (unsigned n = 0; n < j->parks[slot].count; n++) {
        uint32_t key = j->parks[slot].held[n].key;
        unsigned t = jit_table_index(key);
        use_table(j, key);
        j->table_local[t] = true;
        enter_in_table(j, t, j->parks[slot].held[n].rip, j->parks[slot].held[n].code);
    }
}

static bool is_usable(void) { return getauxval(AT_HWCAP2) & 2; } /* FSGSBASE for user code */

static int jit_query(const char *capability, uint64_t *value)
{
    if (!strcmp(capability, "available"))
        *value = is_usable();
    else
        return vm_backend_interp.query(capability, value);
    return VM_OK;
}

static int jit_machine_create(vm_machine *m)
{
    (void)m;
    return is_usable() ? VM_OK : vm_fail(VM_E_UNSUPPORTED, "JIT: the host kernel does not let programs use WRGSBASE");
}

/* While the interpreter runs in the JIT's place, it knows how far it is. */
static uint64_t jit_retired(const vm_vcpu *cpu)
{
    const jit *j = cpu->x86.jit;
    return j && j->is_cold ? vm_backend_interp.retired(cpu) : j ? jit_hook_retired(j, &cpu->x86) : cpu->x86.retired;
}

static void jit_look_again(vm_vcpu *cpu)
{
    const jit *j = cpu->x86.jit;
    if (j && j->is_cold) vm_backend_interp.look_again(cpu);
    jit_hook_disturb(&cpu->x86);
}


const vm_backend_ops vm_backend_jit = {
    .serves_hooks = true,
    .hooks_changed = jit_hooks_changed,
    .get_state = jit_get_state,
    .set_state = jit_set_state,
    .retired = jit_retired,
    .look_again = jit_look_again,
    .name = "jit",
    .query = jit_query,
    .machine_create = jit_machine_create,
    .vcpu_create = jit_vcpu_create,
    .vcpu_destroy = jit_vcpu_destroy,
    .run = jit_run,
    .map_changed = jit_map_changed,
    .code_changed = jit_code_changed_both,
    .flush_code = jit_flush_code,
    .tlb_flushed = jit_tlb_flushed,
    .tlb_dropped = jit_tlb_dropped,
    .park = jit_park,
    .unpark = jit_unpark,
};
