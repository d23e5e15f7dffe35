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
 * may have come to mean something else. When the cache is full it is emptied whole.
 *
 * Traces. Slices end at random, so where they end often is hot. There the interpreter notes the addresses of the next
 * instructions, and the block is made again along them (lift.c). The path is a hint: each step of it is compared.
 *
 * Time. R15 counts instructions down; each edge subtracts its block's count and leaves when it turns negative, so the
 * run loop's `attention` is looked at every SLICE instructions at the latest. A budget that must be exact runs all but
 * its last EXACT_TAIL instructions here and those in the interpreter.
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
#include <errno.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>
#include "interp/interp.h"
#include "jit/jit.h"
#include "mmu/mmu.h"
#include "x86/access.h"
#include "x86/cover.h"
#include "x86/ops.h"
#include "x86/simd.h"

#define SLICE      16384
#define EXACT_TAIL 2400 /* more than a page of one-byte blocks with live flags can overshoot */
#ifdef VM_TINY_CACHE
#define DEFAULT_CODE (64u << 10)
#define MIN_CODE     (64u << 10)
#else
#define DEFAULT_CODE (32u << 20)
#define MIN_CODE     (256u << 10)
#endif

static inline uint64_t read_gs(void) {
    uint64_t v;
    __asm__ volatile("rdgsbase %0" : "=r"(v));
    return v;
}
static inline void write_gs(uint64_t v) { __asm__ volatile("wrgsbase %0" : : "r"(v)); }

/* ---- what translated code depends on ---- */

static bool is_flat_data(const x86_seg *s) {
    return !s->base && s->limit == 0xffffffffu &&
           (s->attr & (X86_SEG_P | X86_SEG_S | 0xe)) == (X86_SEG_P | X86_SEG_S | 2);
}
static bool is_whole_data(const x86_seg *s) {
    return s->limit == 0xffffffffu && (s->attr & (X86_SEG_P | X86_SEG_S | 0xe)) == (X86_SEG_P | X86_SEG_S | 2);
}

static bool vec_allowed(const x86_cpu *cpu) {
    return !(cpu->cr0 & (X86_CR0_EM | X86_CR0_TS)) && (cpu->cr4 & X86_CR4_OSFXSR) &&
           (X86_FPU_MXCSR(cpu) & 0x1f80) == 0x1f80;
}

/* Strategies under which an address without paging is physical. */
static bool is_plain_mmu(const vm_machine *m) { return vm_mmu_is_plain(m); }

static bool x87_allowed(const x86_cpu *cpu) {
    return vec_allowed(cpu) && (X86_FPU_FCW(cpu) & 0x3f) == 0x3f && !(X86_FPU_FSW(cpu) & 0x80);
}

static uint32_t jit_key(jit *j, const x86_cpu *cpu) {
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
    if (j->has_vec && vec_allowed(cpu)) {
        key |= JIT_KEY_VEC;
        if (j->has_x87 && x87_allowed(cpu)) key |= JIT_KEY_X87;
        if ((cpu->cr4 & X86_CR4_OSXSAVE) && (cpu->xcr0 & 6) == 6 && j->has_avx) key |= JIT_KEY_AVX;
    }
    return key;
}

/* Modes and moments that the interpreter handles. */
static bool wants_interpreter(const jit *j, x86_cpu *cpu) {
    if (jit_hooks_want_interpreter(cpu) || cpu->code_size == 2 || cpu->inhibit || cpu->io_count || j->step_one ||
        (cpu->rflags & X86_FL_RF))
        return true;
    return cpu->code_size == 4 && (cpu->seg[X86_CS].base || cpu->seg[X86_CS].limit != 0xffffffffu);
}

/* ---- blocks: finding, linking, dropping ---- */

static unsigned hash_block(uint64_t rip) { return (unsigned)(rip * UINT64_C(0x9e3779b97f4a7c15) >> 48); }
static unsigned hash_page(uint64_t gpa) { return (unsigned)((gpa >> 12 ^ gpa >> 26) & (JIT_PAGES - 1)); }

bool jit_is_stop(const jit *j, uint64_t rip) {
    for (unsigned i = 0; i < j->stop_count; i++)
        if (j->stops[i] == rip) return true;
    return false;
}

static x86_jumps *jumps_of(x86_cpu *cpu, uint32_t key) { return &cpu->jump[jit_table_index(key)]; }

enum { TABLE_PART = X86_JUMP_ENTRIES / 64 };

static void clear_table(jit *j, unsigned t) {
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

static void enter_in_table(jit *j, unsigned t, uint64_t rip, const uint8_t *code) {
    x86_jumps *jumps = &j->vcpu->x86.jump[t];
    unsigned i = rip & (X86_JUMP_ENTRIES - 1);
    jumps->rip[i] = rip;
    jumps->code[i] = code;
    if (j->table_count[t] < JIT_LISTED) j->table_list[t][j->table_count[t]] = (uint16_t)i;
    if (j->table_count[t] <= JIT_LISTED) j->table_count[t]++;
    j->table_touched[t] |= UINT64_C(1) << i / TABLE_PART;
    j->table_gigs[t] |= UINT64_C(1) << (rip >> 30 & 63);
}

static void clear_tables(jit *j) {
    for (unsigned t = 0; t < JIT_TABLES; t++)
        if (j->table_used[t]) clear_table(j, t);
}

/* Addresses in the gigabyte around la (a large page may have gone) have come to mean something else. */
static void drop_from_table(jit *j, unsigned t, uint64_t la) {
    x86_jumps *jumps = &j->vcpu->x86.jump[t];
    if (!(j->table_gigs[t] >> (la >> 30 & 63) & 1)) return;
    for (uint64_t parts = j->table_touched[t]; parts; parts &= parts - 1) {
        unsigned first = (unsigned)__builtin_ctzll(parts) * TABLE_PART;
        for (unsigned i = first; i < first + TABLE_PART; i++)
            if (!((jumps->rip[i] ^ la) >> 30)) jumps->rip[i] = i ? 0 : ~UINT64_C(0);
    }
}

static void use_table(jit *j, uint32_t key) {
    unsigned t = jit_table_index(key);
    key &= ~JIT_KEY_PLAIN; /* such blocks are never in it */
    if (j->table_key[t] != key && j->table_used[t]) clear_table(j, t);
    if (!j->table_used[t]) j->vcpu->x86.jump[t].rip[0] = ~UINT64_C(0);
    j->table_key[t] = key;
    j->table_used[t] = true;
}

static void unlink_in(jit_link *l) {
    jit_link **p = &l->to->in;
    while (*p && *p != l) p = &(*p)->next_in;
    if (*p) *p = l->next_in;
    l->to = NULL;
}

static void link_blocks(const jit *j, jit_link *l, jit_block *to) {
    if (l->to || l->from->is_dead || to->is_dead || (to->crosses && !(to->key & JIT_KEY_CHAIN)) ||
        jit_is_stop(j, to->rip) || l->key != to->key || l->target != to->rip)
        return;
    e_patch(j->write_base + l->jump, l->needs_mem_entry ? to->entry_mem : to->entry);
    l->to = to;
    l->next_in = to->in;
    to->in = l;
}

/* Takes b out of the list at *head whose links are `link` bytes into a block. */
static void remove_from(jit_block **head, jit_block *b, size_t link) {
    jit_block **p = head;
    while (*p && *p != b) p = (jit_block **)(void *)((uint8_t *)*p + link);
    if (*p) *p = *(jit_block **)(void *)((uint8_t *)b + link);
}

static void kill_block(jit *j, jit_block *b) {
    b->is_dead = true;
    j->kills++;
    if (b->twin && !b->twin->is_dead) kill_block(j, b->twin);
    remove_from(&j->hash[hash_block(b->rip)], b, offsetof(jit_block, hash_next));
    remove_from(&j->pages[hash_page(b->gpa)], b, offsetof(jit_block, page_next));
    remove_from(&j->lines[hash_page(b->rip)], b, offsetof(jit_block, line_next));
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

static void flush_all(jit *j) {
    if (j->arena_used > 16) { /* blocks live in the arena: without any the tables are still untouched zero pages */
        memset(j->hash, 0, sizeof j->hash);
        memset(j->pages, 0, sizeof j->pages);
        memset(j->lines, 0, sizeof j->lines);
    }
    j->kills++;
    clear_tables(j);
    j->w.p = j->code_start;
    j->arena_used = 16;
    j->must_flush = false;
    j->flushes++;
}

/* Is any of [at, at + bytes), all on one page, among the bytes that a block on the page `page` was made from? */
static bool overlaps_on(const jit_block *b, uint64_t page, uint64_t at, uint64_t bytes) {
    if ((page ^ at) & X86_PAGE_MASK) return false;
    uint64_t begin = at & 0xfff, end = begin + bytes;
    for (unsigned i = 0; i < b->nextents; i++)
        if (b->extents[i].begin < end && begin < b->extents[i].end) return true;
    return false;
}
static bool block_overlaps(const jit_block *b, uint64_t gpa, uint64_t bytes) {
    return overlaps_on(b, b->gpa, gpa, bytes);
}

/* Code that writes beside itself again and again: translating it each time costs far more than interpreting it. A page
 * whose blocks die several times within few instructions is the interpreter's for a while. */
enum { HEAT_WINDOW = 1000, HEAT_LIMIT = 6, HEAT_TIME = 30000 };

static void note_heat(jit *j, uint64_t gpa) {
    unsigned h = hash_page(gpa) & 255;
    uint64_t now = j->vcpu->x86.retired;
    if (now - j->heat[h].last > HEAT_WINDOW) j->heat[h].kills = 0;
    j->heat[h].last = now;
    if (++j->heat[h].kills >= HEAT_LIMIT) j->heat[h].until = now + HEAT_TIME;
}

static bool is_hot(const jit *j, uint64_t gpa) { return j->vcpu->x86.retired < j->heat[hash_page(gpa) & 255].until; }

static void jit_code_changed(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes) {
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
            next = b->page_next;
            if (block_overlaps(b, gpa, n)) {
                kill_block(j, b);
                any = true;
            }
        }
        if (any) note_heat(j, gpa);
        gpa += n;
        bytes -= n;
    }
}

/* Drops what was translated from code in [lo, hi], linear or guest-physical addresses. */
void jit_drop_code(jit *j, uint64_t lo, uint64_t hi, bool is_gpa) {
    for (uint64_t at = lo;; at = (at & X86_PAGE_MASK) + 4096) {
        uint64_t last = hi - at < 4095 - (at & 0xfff) ? hi : at | 0xfff;
        jit_block *next, **head = is_gpa ? j->pages : j->lines;
        for (jit_block *b = head[hash_page(at)]; b; b = next) {
            next = is_gpa ? b->page_next : b->line_next;
            if (overlaps_on(b, is_gpa ? b->gpa : b->rip, at, last - at + 1)) kill_block(j, b);
        }
        if (last == hi) return;
    }
}

/* An address becomes a place where execution must come back to C. */
static void add_stop(jit *j, uint64_t rip) {
    if (jit_is_stop(j, rip)) return;
    j->stops[j->stop_next] = rip;
    j->stop_next = (j->stop_next + 1) % JIT_STOPS;
    if (j->stop_count < JIT_STOPS) j->stop_count++;
    jit_drop_code(j, rip, rip, false);
}

/* ---- translation ---- */

void *jit_take(jit *j, size_t bytes) {
    void *p = j->arena + j->arena_used;
    j->arena_used += (bytes + 15) & ~(size_t)15;
    return p;
}

void jit_place_extents(jit *j, const jit_unit *u, jit_block *b, unsigned page) {
    b->extents = jit_take(j, u->nextents * sizeof *b->extents);
    for (unsigned k = 0; k < u->nextents; k++)
        if (u->extents[k].page == page) b->extents[b->nextents++] = u->extents[k];
}

static void note_code_page(jit *j, uint64_t gpa);

/* Guest-physical address of code at la; raises the fetch's faults. */
static uint64_t fetch_gpa(x86_cpu *cpu, uint64_t la) {
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
static uint64_t next_page_gpa(x86_cpu *cpu) {
    uint64_t la = (cpu->rip & X86_PAGE_MASK) + 4096;
    return fetch_gpa(cpu, cpu->code_size == 8 ? la : (uint32_t)la);
}

/* b is told when its bytes change. */
static void watch(jit *j, jit_block *b) {
    b->page_next = j->pages[hash_page(b->gpa)];
    j->pages[hash_page(b->gpa)] = b;
    b->line_next = j->lines[hash_page(b->rip)];
    j->lines[hash_page(b->rip)] = b;
}

static void publish(jit *j, jit_block *b) {
    unsigned h = hash_block(b->rip);
    watch(j, b);
    b->hash_next = j->hash[h];
    j->hash[h] = b;
    j->vcpu->x86.stat[X86_STAT_BLOCKS]++;
}

/* Another page that b was made from. */
static jit_block *new_twin(jit *j, jit_block *b, uint64_t gpa) {
    jit_block *twin = jit_take(j, sizeof *twin);
    memset(twin, 0, sizeof *twin);
    twin->gpa = gpa;
    twin->twin = b->twin ? b->twin : b;
    b->twin = twin;
    return twin;
}

static jit_block *translate_with(jit *j, jit_unit *u, int *failed) {
    if (!jit_lift(u, u->crosses ? 1 : JIT_MAX_INSNS)) return NULL;
    u->no_groups |= u->nhooked != 0;
    jit_optimise(u);
    return jit_emit(u, failed);
}

/* `page` is where the bytes of the block's page are (of a crossing instruction: its own). */
static jit_block *translate_unit(jit *j, uint64_t rip, uint64_t gpa, uint32_t key, const uint8_t *page) {
    x86_cpu *cpu = &j->vcpu->x86;
    jit_unit *u = j->unit;
    u->j = j;
    u->cpu = cpu;
    u->rip = rip;
    u->gpa = gpa;
    u->key = key;
    u->page = page;
    u->forced = 0;
    u->no_groups = (key & JIT_KEY_PLAIN) || cpu->watch || j->no_groups[hash_block(u->rip) & 1023];
    for (unsigned tries = 0; tries < 2 + JIT_MAX_INSNS; tries++) {
        int failed = -1;
        jit_block *b = translate_with(j, u, &failed);
        if (b) {
            publish(j, b);
            cpu->stat[X86_STAT_DECODED] += u->count;
            if (vm_trace_mask(j->vcpu->machine) & (VM_TRACE_IR | VM_TRACE_MCODE)) jit_print(j, u, b);
            return b;
        }
        if (failed >= 0)
            u->forced |= UINT64_C(1) << failed;
        else if (!u->nops)
            return NULL;
        else
            flush_all(j);
    }
    return NULL;
}

/* NULL: this instruction is the interpreter's (not RAM), or it crosses the page. */
static jit_block *translate(jit *j, uint64_t gpa, uint32_t key) {
    x86_cpu *cpu = &j->vcpu->x86;
    unsigned prot = 0;
    cpu->env->code_page(cpu, gpa & X86_PAGE_MASK);
    if (key & JIT_KEY_WINDOW) note_code_page(j, gpa & X86_PAGE_MASK);
    if (j->must_flush) flush_all(j);
    const uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    if (!page || !(prot & X86_EXEC)) return NULL;
    return translate_unit(j, cpu->rip, gpa, key, page);
}

/* The one instruction at rip that ends on the next page: translated from a copy of its bytes, watched on both pages. */
static jit_block *translate_crossing(jit *j, uint64_t gpa, uint32_t key) {
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
        note_code_page(j, gpa & X86_PAGE_MASK);
        note_code_page(j, gpa2);
    }
    if (j->must_flush) flush_all(j);
    memcpy(u->bytes, a + (gpa & 0xfff), first);
    memcpy(u->bytes + first, b, 15 - first);
    u->crosses = true;
    jit_block *main = translate_unit(j, cpu->rip, gpa, key, u->bytes);
    u->crosses = false;
    if (!main || j->arena_bytes - j->arena_used < sizeof *main + 64) return NULL;
    jit_block *twin = new_twin(j, main, gpa2);
    twin->extents = jit_take(j, sizeof *twin->extents);
    twin->extents[0] = (jit_extent){0, 15, 0};
    twin->nextents = 1;
    main->crosses = true;
    twin->page_next = j->pages[hash_page(gpa2)];
    j->pages[hash_page(gpa2)] = twin;
    return main;
}

/* Fetches from the page at gpa are forbidden now, whatever has been translated there: the interpreter will meet that. */
static bool is_forbidden(x86_cpu *cpu, uint64_t gpa) {
    unsigned prot = 0;
    return cpu->exec_varies && (!cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot) || !(prot & X86_EXEC));
}

static jit_block *find_block(jit *j, uint32_t key) {
    x86_cpu *cpu = &j->vcpu->x86;
    x86_look_for_stop(cpu, cpu->code_size == 8 ? cpu->rip : (uint32_t)(cpu->seg[X86_CS].base + cpu->rip));
    uint64_t gpa = fetch_gpa(cpu, cpu->rip);
    if (is_forbidden(cpu, gpa) || (cpu->exec_varies && (gpa & 0xfff) > 4096 - 15)) return NULL;
    for (jit_block *b = j->hash[hash_block(cpu->rip)]; b; b = b->hash_next)
        if (b->rip == cpu->rip && b->gpa == gpa && b->key == key && (!b->crosses || b->twin->gpa == next_page_gpa(cpu)))
            return b;
    if ((j->on_hot_page = is_hot(j, gpa))) return NULL;
    jit_block *b = translate(j, gpa, key);
    return b || (gpa & 0xfff) <= 4096 - 15 ? b : translate_crossing(j, gpa, key);
}

/* ---- helpers called by emitted code ---- */

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

static uint64_t lazy_flags(const x86_cpu *cpu, uint64_t recipe) {
    uint64_t x = cpu->jit_scratch[JIT_SLOT_FLAG_A], y = cpu->jit_scratch[JIT_SLOT_FLAG_B], out;
    unsigned kind = (recipe & 0x7f) - 1;
    if (recipe & JIT_LAZY_IMM) y = (uint64_t)(int64_t)(int16_t)(recipe >> 16);
    if ((recipe >> 8 & 0xff) == 4)
        LAZY_FLAGS(uint32_t, kind, x, y, out);
    else
        LAZY_FLAGS(uint64_t, kind, x, y, out);
    return out & 0xffff;
}

void jit_load_flags(x86_cpu *cpu) {
    uint64_t f = cpu->jit_scratch[JIT_SLOT_FLAGS] & 0xffffffff;
    if ((f & 0xff) > 1) f = lazy_flags(cpu, f);
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | (f >> 8 & (X86_FL_ARITH & 0xff)) | (f & 1) << 11;
}
void jit_store_flags(x86_cpu *cpu) {
    cpu->jit_scratch[JIT_SLOT_FLAGS] = (cpu->rflags & (X86_FL_ARITH & 0xff)) << 8 | (cpu->rflags >> 11 & 1);
}

static uint64_t *frame_of(const x86_cpu *cpu) { return (uint64_t *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_FRAME]; }

enum { FRAME_REGS = 4 * 8, FRAME_FLAGS = 4 * 8, FRAME_LIMITS = 2 * 8, FRAME_HOMES = 12 * 8 };

static void copy_frame(x86_cpu *cpu) {
    const uint64_t *frame = frame_of(cpu);
    memcpy(&cpu->gpr[X86_R12], &frame[JIT_FRAME_R12], FRAME_REGS);
    memcpy(&cpu->jit_scratch[JIT_SLOT_FLAGS], &frame[JIT_FRAME_FLAGS], FRAME_FLAGS);
}

void jit_fetch_frame(x86_cpu *cpu, bool has_homes) {
    copy_frame(cpu);
    if (has_homes) memcpy(cpu->gpr, &frame_of(cpu)[JIT_FRAME_HOMES], FRAME_HOMES);
    jit_load_flags(cpu);
}

/* What C may have changed, to the frame. */
static void store_frame(const x86_cpu *cpu) {
    uint64_t *frame = frame_of(cpu);
    memcpy(&frame[JIT_FRAME_R12], &cpu->gpr[X86_R12], FRAME_REGS);
    frame[JIT_FRAME_FLAGS] = cpu->jit_scratch[JIT_SLOT_FLAGS];
    memcpy(&frame[JIT_FRAME_LIMIT], &cpu->jit_scratch[JIT_SLOT_WINDOW_LIMIT], FRAME_LIMITS);
}

/* Count what has retired since the last time; `index` instructions of the current block have. */
void jit_count_retired(jit *j, x86_cpu *cpu, unsigned index) {
    int64_t r15 = (int64_t)cpu->jit_scratch[JIT_SLOT_R15] - index, done = j->r15_start - r15;
    cpu->budget -= done;
    cpu->retired += (uint64_t)done;
    j->r15_start = r15;
}

/* The x87 registers have come from the host, its instruction pointers with them: put the guest's in their place. */
static void load_x87_pointers(jit *j, x86_cpu *cpu) {
    memcpy(&cpu->fpu.image[6], j->x87_pointers, sizeof j->x87_pointers);
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
static void keep_x87_pointers(jit *j, const x86_cpu *cpu) {
    memcpy(j->x87_pointers, &cpu->fpu.image[6], sizeof j->x87_pointers);
}

/* Everything retires up to the site's instruction. */
static void count_up_to(jit *j, x86_cpu *cpu, const jit_site *s) {
    cpu->hook_site = 0;
    jit_count_retired(j, cpu, s->index);
    if (s->block->nedges) jit_cover_add(cpu, s->block, s->index, 1);
}

jit_site *jit_begin_helper(x86_cpu *cpu, uint32_t at) {
    jit *j = cpu->jit;
    jit_site *s = (jit_site *)(j->arena + at);
    jit_fetch_frame(cpu, false);
    if (s->block->key & JIT_KEY_X87) load_x87_pointers(j, cpu);
    count_up_to(j, cpu, s);
    jit_place_rip(cpu, s);
    if (s->in_shadow) cpu->inhibit = 1;
    return s;
}

/* Somebody wants the run loop: let the next edge leave. */
static void hurry(jit *j, x86_cpu *cpu) {
    int64_t extra = (int64_t)cpu->jit_scratch[JIT_SLOT_R15] + 1;
    if (extra > 0) {
        cpu->jit_scratch[JIT_SLOT_R15] -= (uint64_t)extra;
        j->r15_start -= extra;
    }
}

static bool wants_leave(const jit *j, const x86_cpu *cpu) {
    return atomic_load_explicit(&cpu->attention, memory_order_relaxed) || j->must_flush || j->window_stale;
}

/* STI's shadow is over: it covers one instruction. */
static void end_shadow(x86_cpu *cpu) {
    if (cpu->inhibit == 1) cpu->inhibit = 0;
}

void jit_end_helper(jit *j, x86_cpu *cpu, const jit_site *s) {
    if (s->in_shadow) end_shadow(cpu);
    if (s->block->key & JIT_KEY_X87) keep_x87_pointers(j, cpu);
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
static uint64_t leave_block(x86_cpu *cpu, const jit_site *s, unsigned n, unsigned reason, uint64_t rip) {
    if (s->block->nedges) jit_cover_add(cpu, s->block, n, 1);
    cpu->jit_scratch[JIT_SLOT_R15] -= n;
    cpu->jit_scratch[JIT_SLOT_REASON] = reason;
    cpu->rip = rip;
    return JIT_OUT;
}

/* Something of what the block of s was made for has changed. */
static bool must_leave(const jit *j, const x86_cpu *cpu, const jit_site *s) {
    return s->block->is_dead || j->must_flush || (cpu->careful & X86_CAREFUL_STEP) || cpu->inhibit ||
           ((s->block->key & JIT_KEY_VEC) && !(s->block->key & JIT_KEY_X87 ? x87_allowed(cpu) : vec_allowed(cpu))) ||
           atomic_load_explicit(&cpu->attention, memory_order_relaxed);
}

/* The whole instruction by its semantic function. True: leave the block after it. */
static bool execute(jit *j, x86_cpu *cpu, const jit_site *s) {
    const x86_insn *in = jit_site_insn(j, s);
    uint64_t next = cpu->next_rip;
    cpu->stat[X86_STAT_FALLBACKS]++;
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
static void note_bail(jit *j, jit_block *b) {
    if (b->is_dead || ++b->bails < 64) return;
    j->no_groups[hash_block(b->rip) & 1023] = 1;
    kill_block(j, b);
}

/* The span of a group at la, or NULL to go on in a block without groups. Faults are the first access's own. */
static uint8_t *find_span(jit *j, x86_cpu *cpu, jit_site *s, uint64_t la) {
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
static bool is_in_range(const x86_cpu *cpu, const jit_site *s, uint64_t la, unsigned *seg, uint64_t *offset) {
    *seg = s->is_single || (s->flags & X86_IF_MEM) ? s->seg : X86_SS;
    *offset = *seg == X86_FS || *seg == X86_GS ? la - cpu->seg[*seg].base : la;
    if (s->mode == 8) return x86_canonical(la) && x86_canonical(la + s->size - 1);
    *offset = (uint32_t)*offset;
    return *offset + s->size <= UINT64_C(1) << 32;
}

static void check_range(x86_cpu *cpu, const jit_site *s, uint64_t la) {
    unsigned seg;
    uint64_t offset;
    if (!is_in_range(cpu, s, la, &seg, &offset)) x86_linear(cpu, seg, offset, s->size, s->access);
}

/* The access at bounce_la itself. Callbacks see exact state: the registers are in x86_cpu, and what is still in the frame
 * comes when somebody asks (hook.c). So if nobody changes anything, nothing but the access has to be done. */
static void ask_device(jit *j, x86_cpu *cpu, jit_site *s, uint32_t at) {
    uint64_t *value = j->bounce;
    unsigned n = s->size;
    int status;
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
static uint8_t *find_device(jit *j, x86_cpu *cpu, uint64_t la, uint32_t at) {
    jit_site *s = (jit_site *)(j->arena + at);
    j->bounce_is_device = s->is_quick && x86_tlb_device(cpu, cpu->ctx, la, s->access, &j->bounce_gpa) &&
                          !(cpu->careful | cpu->watch) && (la & 0xfff) + s->size <= 4096;
    if (!j->bounce_is_device) return NULL;
    j->bounce_la = la;
    j->bounce_active = s->access == X86_WRITE;
    if (!j->bounce_active) ask_device(j, cpu, s, at);
    return (uint8_t *)j->bounce;
}

/* Does the MMU strategy know the page? Then nobody sees that it was asked, and the guest's registers stay where they are. */
static __attribute__((noinline)) uint8_t *find_known(jit *j, x86_cpu *cpu, const jit_site *s, uint64_t la) {
    bool is_write = s->access & X86_WRITE;
    unsigned n = s->leader_size ? s->span : s->size, seg;
    uint64_t offset;
    if ((cpu->careful | cpu->watch) || s->in_window || (s->align > 1 && (la & (s->align - 1u))) || (la & 0xfff) + n > 4096 ||
        !is_in_range(cpu, s, la, &seg, &offset) || !vm_mmu_refill(cpu, la, is_write ? X86_WRITE : X86_READ))
        return NULL;
    j->bounce_active = false;
    return x86_tlb_hit(cpu, la, n, is_write);
}

uint8_t *jit_help_begin(x86_cpu *cpu, uint64_t la, uint32_t at) {
    jit *j = cpu->jit;
    uint8_t *host = find_device(j, cpu, la, at);
    if (!host && vm_mmu_can_refill(j->vcpu)) host = find_known(j, cpu, (jit_site *)(j->arena + at), la);
    if (host) return host;
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
    if (!p && (s->divides || jit_hook_steps(cpu, s, la))) { /* a division may be done again: not of a device */
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

/* The store of a PUSH or CALL has killed its own block: what else the instruction does, for its bytes may have gone. */
static uint64_t finish_push(x86_cpu *cpu, const jit_site *s) {
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

uint64_t jit_help_commit(x86_cpu *cpu, uint32_t at) {
    jit *j = cpu->jit;
    if (!j->bounce_active) return 0;
    if (j->bounce_is_device) {
        ask_device(j, cpu, (jit_site *)(j->arena + at), at);
        return 0;
    }
    jit_site *s = jit_begin_helper(cpu, at);
    x86_write_linear(cpu, j->bounce_la, j->bounce, s->size);
    uint64_t rip = s->is_single ? cpu->next_rip : finish_push(cpu, s);
    if (s->block->is_dead) jit_hook_after(cpu, s, true);
    jit_end_helper(j, cpu, s);
    if (!s->block->is_dead) return 0;
    return leave_block(cpu, s, s->index + 1u, JIT_LEAVE_LOOKUP, rip);
}

/* HLT that does nothing but stop: what its semantic function does, without its long way out. */
static uint64_t halt(jit *j, x86_cpu *cpu, const jit_site *s) {
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
static uint64_t raise_ud(jit *j, x86_cpu *cpu, uint32_t at) {
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

uint64_t jit_help_fallback(x86_cpu *cpu, uint32_t at) {
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
uint64_t jit_help_after(x86_cpu *cpu, uint32_t at) {
    jit *j = cpu->jit;
    uint64_t next = cpu->next_rip; /* as the callback left it */
    jit_site *s = jit_begin_helper(cpu, at);
    jit_hook_after(cpu, s, true);
    jit_end_helper(j, cpu, s);
    return leave_block(cpu, s, s->index + 1u, JIT_LEAVE_LOOKUP, next);
}

/* ---- the run loop's side ---- */

static x86_stop interpret_one(jit *j) {
    j->step_one = false;
    return interp_step(j->vcpu);
}

/* The interpreter in the JIT's place for at most so many instructions. NONE: they are done. */
static x86_stop interpret(jit *j, x86_cpu *cpu, int64_t most) {
    int64_t budget = cpu->budget, given = budget < most ? budget : most;
    cpu->budget = given;
    j->is_cold = true;
    x86_stop stop = vm_backend_interp.run(j->vcpu);
    j->is_cold = false;
    cpu->budget += budget - given;
    return stop == X86_STOP_SLICE && cpu->budget > 0 ? X86_STOP_NONE : stop;
}

/* What is not translated: one instruction that is odd, or a stretch where all of the code is. */
static x86_stop interpret_here(jit *j, x86_cpu *cpu) {
    enum { STRETCH = 256 };
    bool is_long = j->on_hot_page || (cpu->code_size == 2 && !j->step_one);
    j->on_hot_page = false;
    return is_long ? interpret(j, cpu, STRETCH) : interpret_one(j);
}

/* Execute translated code from rip on, for at most a slice. Returns how it left. */
static unsigned enter(jit *j, x86_cpu *cpu, uint32_t key, const uint8_t *code) {
    int64_t slice = cpu->budget - (j->vcpu->has_budget ? EXACT_TAIL : 0); /* at least 1 */
    if (slice > j->slice) slice = j->slice;
    cpu->jit_scratch[JIT_SLOT_R15] = (uint64_t)slice;
    cpu->jit_scratch[JIT_SLOT_LEAVE] = 0;
    j->r15_start = slice;
    jit_store_flags(cpu);
    if (key & JIT_KEY_X87) keep_x87_pointers(j, cpu);
    cpu->hook_site = 0;
    j->in_code = true;
    ((void (*)(const void *))(uintptr_t)j->enter[jit_level(key)])(code);
    j->in_code = false;
    cpu->hook_site = 0;
    if (key & JIT_KEY_X87) load_x87_pointers(j, cpu);
    jit_count_retired(j, cpu, 0);
    jit_load_flags(cpu);
    return (unsigned)cpu->jit_scratch[JIT_SLOT_REASON];
}

/* Is the page of code at la known to be global? */
static bool is_global(const x86_cpu *cpu, uint64_t la) {
    unsigned i = X86_TLB_INDEX(la);
    const x86_tlb *t = &cpu->tlb[cpu->ctx];
    return !((la ^ t->e[i].tag_x) & X86_PAGE_MASK) && (t->meta[i] & X86_TLBM_GLOBAL);
}

static const uint8_t *lookup(jit *j, x86_cpu *cpu, uint32_t key, jit_link *link) {
    use_table(j, key);
    x86_jumps *jumps = jumps_of(cpu, key);
    unsigned i = cpu->rip & (X86_JUMP_ENTRIES - 1);
    if (!link && jumps->rip[i] == cpu->rip && jumps->code[i]) return jumps->code[i];
    uint64_t flushes = j->flushes;
    jit_block *b = find_block(j, key);
    if (!b) return NULL;
    use_table(j, key);
    const uint8_t *code = b->entry_mem + j->w.to_exec;
    if (!jit_is_stop(j, b->rip)) {
        if (!(key & JIT_KEY_PLAIN)) {
            enter_in_table(j, jit_table_index(key), b->rip, code);
            if (!is_global(cpu, b->rip)) j->table_local[jit_table_index(key)] = true;
        }
        if (link && flushes == j->flushes) link_blocks(j, link, b);
    }
    return code;
}

/* ---- traces ---- */

static bool at_until(const x86_cpu *cpu) { return cpu->has_until && cpu->rip == cpu->until; }

static bool may_trace(const jit *j, const x86_cpu *cpu) {
    return JIT_MAX_INSNS >= 8 && !cpu->hook_mask && !cpu->watch && !cpu->cover.ring &&
           !j->must_flush && !j->window_stale && cpu->budget > EXACT_TAIL &&
           !atomic_load_explicit(&cpu->attention, memory_order_relaxed);
}

/* A block that goes round in itself is as good as a trace. */
static bool is_loop(const jit_block *b) {
    for (unsigned i = 0; i < b->nlinks; i++)
        if (b->links[i].to == b) return true;
    return false;
}

/* Is rip where slices end again and again? */
static bool is_sampled(jit *j, uint64_t rip) {
    unsigned h = hash_block(rip) & 255, wanted = j->slice < SLICE ? 1 : 4;
    if (j->samples[h].rip != rip) {
        j->samples[h].rip = rip;
        j->samples[h].count = 0;
    }
    return ++j->samples[h].count == wanted;
}

/* The pages of a path besides its first. Where linear addresses are physical, nothing but their bytes can change. */
static void find_pages(jit *j, uint32_t key, const uint64_t *path, unsigned count) {
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
        note_code_page(j, la);
        u->more[u->nmore].la = la;
        u->more[u->nmore++].host = host;
    }
}

/* Make the block at path[0] again, along the path. */
static void translate_path(jit *j, jit_block *old, const uint64_t *path, unsigned count) {
    x86_cpu *cpu = &j->vcpu->x86;
    jit_unit *u = j->unit;
    unsigned prot = 0;
    const uint8_t *page = cpu->env->page(cpu, old->gpa & X86_PAGE_MASK, &prot);
    if (!page || !(prot & X86_EXEC)) return;
    find_pages(j, old->key, path, count);
    if (!j->must_flush) {
        kill_block(j, old);
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
        j->samples[hash_block(old->rip) & 255].count = 0;
    u->nmore = 0;
}

bool jit_has_no_guard(const jit *j, uint64_t rip) { return j->no_guard[hash_block(rip) & 1023]; }

/* The CALL at rip went elsewhere: the interpreter makes it. If that is its habit, the trace goes. */
static void note_miss(jit *j, x86_cpu *cpu) {
    enum { MOST = 32 };
    jit_block *b = (jit_block *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_LINK];
    j->step_one = true;
    if (b->is_dead || ++b->bails < MOST) return;
    j->no_guard[hash_block(cpu->rip) & 1023] = 1;
    kill_block(j, b);
    j->samples[hash_block(b->rip) & 255].count = 0; /* another trace may be better */
}

/* A slice has ended in front of code that is hot: note where execution goes from here, and translate that way. */
static x86_stop sample(jit *j, uint32_t key) {
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

/* The largest run of pages in a RAM range that no write needs to be seen on; what adjoins code is left out, since there
 * may soon be more of it. */
static void find_write_window(jit *j, const vm_range *r, int64_t delta) {
    enum { MARGIN = 64, LEAST = 64 };
    uint64_t pages = r->bytes >> 12, begin = 0, best = 0, best_pages = 0;
    const _Atomic uint8_t *flags = r->region->page_flags + (r->offset >> 12);
    for (uint64_t i = 0; i <= pages; i++) {
        if (i < pages && !(flags[i] & (VM_PAGE_CODE | VM_PAGE_CLEAN))) continue;
        uint64_t end = i < pages && i > begin + 4 * MARGIN ? i - MARGIN : i;
        uint64_t first = begin && end > begin + 4 * MARGIN ? begin + MARGIN : begin;
        if (end - first > best_pages) best = first, best_pages = end - first;
        begin = i + 1;
    }
    uint64_t gpa = r->gpa + (best << 12), bytes = best_pages << 12;
    int64_t d = delta + (int64_t)(best << 12);
    if (best_pages < LEAST || d != (int32_t)d) return;
    j->vcpu->x86.jit_scratch[JIT_SLOT_WRITE_LIMIT] = bytes - 255;
    j->must_flush |= gpa != j->window_gpa[1] || d != j->window_delta[1];
    j->window_gpa[1] = gpa;
    j->window_delta[1] = (int32_t)d;
}

static bool is_window_region(const vm_range *r) {
    const vm_region *g = r->region;
    return g->host && g->kind <= VM_REGION_FILE && !g->page_prot && (g->prot & VM_PROT_R) && r->gpa < (1u << 30) &&
           r->bytes >= 4096;
}

/* The windows: the largest readable RAM region whose address fits an immediate, and what of it may be written unseen.
 */
static void place_windows(jit *j) {
    const vm_machine *m = j->vcpu->machine;
    uint64_t *slot = j->vcpu->x86.jit_scratch;
    const vm_range *best = NULL;
    for (size_t i = 0; i < m->view.count; i++) {
        const vm_range *r = &m->view.ranges[i];
        if (is_window_region(r) && (!best || r->bytes > best->bytes)) best = r;
    }
    slot[JIT_SLOT_WINDOW_LIMIT] = slot[JIT_SLOT_WRITE_LIMIT] = 0;
    if (!best) return;
    const uint8_t *host = best->region->host + best->offset;
    int64_t delta = host - (const uint8_t *)&j->vcpu->x86;
    vm_range r = *best;
    if (r.bytes > (UINT64_C(1) << 31)) r.bytes = UINT64_C(1) << 31;
    if (delta != (int32_t)delta || delta > INT32_MAX - 512) return;
    slot[JIT_SLOT_WINDOW_LIMIT] = r.bytes - 255;
    j->must_flush |= r.gpa != j->window_gpa[0] || delta != j->window_delta[0];
    j->window_gpa[0] = r.gpa;
    j->window_delta[0] = (int32_t)delta;
    if ((r.region->prot & VM_PROT_W) && m->vcpu_count == 1 && !m->dirty_log && !m->track) find_write_window(j, &r, delta);
}

static void find_windows(jit *j) {
    uint64_t *limit = &j->vcpu->x86.jit_scratch[JIT_SLOT_WINDOW_LIMIT];
    j->window_stale = false;
    if (j->vcpu->x86.watch) { /* blocks that rely on windows wait */
        limit[0] = limit[1] = 0;
        return;
    }
    place_windows(j);
    for (unsigned w = 0; w < 2; w++) {
        j->must_flush |= limit[w] < j->window_limit[w];
        j->window_limit[w] = limit[w];
    }
}

/* A page of the write window holds code now: cut the window. */
static void note_code_page(jit *j, uint64_t gpa) {
    if (gpa - j->window_gpa[1] < j->vcpu->x86.jit_scratch[JIT_SLOT_WRITE_LIMIT] + 255) {
        find_windows(j);
        j->must_flush = true;
    }
}

static void jit_map_changed(vm_machine *m) {
    vm_backend_interp.map_changed(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i] && m->vcpus[i]->x86.jit) {
            jit_hook_disturb(&m->vcpus[i]->x86);
            ((jit *)m->vcpus[i]->x86.jit)->window_stale = true;
            m->vcpus[i]->x86.jit_scratch[JIT_SLOT_WINDOW_LIMIT] = m->vcpus[i]->x86.jit_scratch[JIT_SLOT_WRITE_LIMIT] =
                0;
        }
}

static x86_stop run_loop(jit *j) {
    x86_cpu *cpu = &j->vcpu->x86;
    jit_link *link = NULL;
    for (;;) {
        if (j->window_stale) find_windows(j);
        if (j->must_flush) {
            flush_all(j);
            link = NULL;
        }
        if (cpu->budget <= 0) return X86_STOP_SLICE;
        if (atomic_load_explicit(&cpu->attention, memory_order_relaxed)) return X86_STOP_ATTENTION;
        const uint8_t *code = NULL;
        uint32_t key = 0;
        if (!wants_interpreter(j, cpu) && cpu->budget > (j->vcpu->has_budget ? EXACT_TAIL : 1)) {
            key = jit_key(j, cpu) | (link ? link->key & JIT_KEY_PLAIN : 0);
            code = lookup(j, cpu, key, link);
        }
        link = NULL;
        if (!code) {
            x86_stop stop = interpret_here(j, cpu);
            if (stop) return stop;
        } else {
            unsigned reason = enter(j, cpu, key, code);
            if (reason == JIT_LEAVE_LINK)
                link = (jit_link *)(uintptr_t)cpu->jit_scratch[JIT_SLOT_LINK];
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
                j->has_vec = vec_allowed(cpu);
                j->vec_ctx = cpu->ctx;
                j->step_one = !j->has_vec;
            } else if (reason == JIT_LEAVE_X87) {
                j->has_vec = j->has_x87 = x87_allowed(cpu);
                j->vec_ctx = cpu->ctx;
                j->step_one = !j->has_x87;
            }
        }
        if (at_until(cpu) && !j->step_one) return X86_STOP_UNTIL;
    }
}

static bool jit_start(jit *j);

/* Back from a longjmp: an exit, or a fault to deliver. */
static x86_stop caught(jit *j, x86_cpu *cpu) {
    if (j->in_code) jit_hook_half_way(cpu);
    j->in_code = false;
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
static x86_stop run_cold(jit *j, x86_cpu *cpu) {
    int64_t budget = cpu->budget;
    if (j->cold_done >= j->cold) return X86_STOP_NONE;
    x86_stop stop = interpret(j, cpu, j->cold - j->cold_done);
    j->cold_done += budget > cpu->budget ? budget - cpu->budget : 1;
    return stop;
}

static x86_stop jit_run(vm_vcpu *vcpu) {
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
static void *place_near(uint64_t function, size_t bytes) {
    enum { GAP = 64 << 20 };
    uint64_t below = bytes + GAP;
    return function > below + GAP ? (void *)(uintptr_t)((function - below) & ~(uint64_t)(GAP - 1)) : NULL;
}

static uint8_t *map_cache(size_t bytes, void *near, uint8_t **exec) {
    int fd = memfd_create("libvm-code", MFD_CLOEXEC);
    if (fd < 0) return NULL;
    uint8_t *w = MAP_FAILED, *x = MAP_FAILED;
    if (!ftruncate(fd, (off_t)bytes)) {
        w = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (w != MAP_FAILED) x = mmap(near, bytes, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    }
    close(fd);
    if (x == MAP_FAILED) {
        if (w != MAP_FAILED) munmap(w, bytes);
        return NULL;
    }
    *exec = x;
    return w;
}

static bool host_has_avx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_AVX) || !(c & bit_OSXSAVE)) return false;
    uint32_t lo, hi;
    __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (lo & 6) == 6;
}

static bool host_has_bmi2(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_BMI2);
}

/* The cache is made by the first run, so that a machine that never runs costs nothing; near what its code will call most. */
static bool jit_start(jit *j) {
    vm_machine *m = j->vcpu->machine;
    size_t bytes = m->options.code_cache_bytes ? (size_t)m->options.code_cache_bytes : DEFAULT_CODE;
    bytes = bytes / m->vcpu_count & ~(size_t)4095;
    if (bytes < MIN_CODE) bytes = MIN_CODE;
    j->arena_bytes = bytes * 4;
    j->arena = mmap(NULL, j->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (j->arena == MAP_FAILED) {
        j->arena = NULL;
        return false;
    }
    j->write_base = map_cache(bytes, place_near(jit_hook_callee(m), bytes), &j->exec_base);
    if (!j->write_base) {
        munmap(j->arena, j->arena_bytes);
        j->arena = NULL;
        return false;
    }
    j->code_bytes = bytes;
    j->has_avx = host_has_avx();
    j->has_bmi2 = host_has_bmi2();
    j->window_stale = true;
    j->w = (jit_writer){j->write_base, j->write_base + bytes, j->exec_base - j->write_base};
    j->vcpu->x86.jit_scratch[JIT_SLOT_SELF] = (uint64_t)(uintptr_t)&j->vcpu->x86;
    jit_emit_thunks(j);
    j->arena_used = 16;
    jit_hooks_shape(j);
    return true;
}

static int jit_vcpu_create(vm_vcpu *cpu) {
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
    j->slice = slice && atoi(slice) > 0 ? atoi(slice) : SLICE;
    j->vcpu = cpu;
    j->unit = (jit_unit *)(j + 1);
    cpu->x86.jit = j;
    return VM_OK;
}

static void jit_vcpu_destroy(vm_vcpu *cpu) {
    jit *j = cpu->x86.jit;
    if (j) {
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

static void jit_code_changed_both(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes) {
    jit_hook_disturb(&cpu->x86);
    jit_code_changed(cpu, gpa, bytes);
    vm_backend_interp.code_changed(cpu, gpa, bytes);
}

static void jit_flush_code(vm_vcpu *cpu) {
    jit *j = cpu->x86.jit;
    jit_hook_disturb(&cpu->x86);
    if (j->write_base) j->must_flush = true;
    vm_backend_interp.flush_code(cpu);
}

static void jit_tlb_flushed(vm_vcpu *cpu) {
    jit *j = cpu->x86.jit;
    if (j) clear_tables(j);
    jit_hook_disturb(&cpu->x86);
    if (vm_backend_interp.tlb_flushed) vm_backend_interp.tlb_flushed(cpu);
}

static void jit_tlb_dropped(vm_vcpu *cpu, uint64_t la, uint64_t bytes, bool keep_global) {
    jit *j = cpu->x86.jit;
    for (unsigned t = 0; j && t < JIT_TABLES; t++) {
        if (!j->table_used[t] || (keep_global && !bytes && !j->table_local[t])) continue;
        if (!bytes || ((la ^ (la + bytes - 1)) >> 30))
            clear_table(j, t);
        else
            drop_from_table(j, t, la);
    }
    vm_backend_interp.tlb_flushed(cpu);
}

/* Tables with more than is listed are not set aside. */
static void jit_park(vm_vcpu *cpu, unsigned slot) {
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

static void jit_unpark(vm_vcpu *cpu, unsigned slot) {
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

static int jit_query(const char *capability, uint64_t *value) {
    if (!strcmp(capability, "available"))
        *value = is_usable();
    else
        return vm_backend_interp.query(capability, value);
    return VM_OK;
}

static int jit_machine_create(vm_machine *m) {
    (void)m;
    return is_usable() ? VM_OK : vm_fail(VM_E_UNSUPPORTED, "JIT: the host kernel does not let programs use WRGSBASE");
}

/* While the interpreter runs in the JIT's place, it knows how far it is. */
static uint64_t jit_retired(const vm_vcpu *cpu) {
    const jit *j = cpu->x86.jit;
    return j && j->is_cold ? vm_backend_interp.retired(cpu) : j ? jit_hook_retired(j, &cpu->x86) : cpu->x86.retired;
}

static void jit_look_again(vm_vcpu *cpu) {
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
