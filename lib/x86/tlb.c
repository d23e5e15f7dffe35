/* tlb.c - the inline TLB: entering and removing pages.
 *
 * Each context's table is divided into 32 chunks, and a bit says which of them may hold entries: emptying a table
 * costs what was used of it, and a CPU that ran ten instructions has touched a few hundred bytes of its tables.
 *
 * An entry covers 4 KiB whatever the guest's page size. Dropping one address must drop all of the guest page it lies
 * in, so the linear range covered by large pages is kept (one each for the lower and upper half of the address
 * space); inside of it a drop looks at every entry. Parked entries stay within it: only x86_tlb_clear() forgets it, and
 * that ends them, too.
 *
 * Tags and meta words are written by the CPU's own thread. Another thread may take write tags away (x86_tlb_protect):
 * it reads meta words and clears tag_w with atomic operations; x86_tlb_set() writes the meta word before the tag.
 */
#include "x86/cpu.h"

#include <stdatomic.h>
#include <string.h>

#define CHUNKS (X86_TLB_ENTRIES < 32 ? X86_TLB_ENTRIES : 32)
#define CHUNK (X86_TLB_ENTRIES / CHUNKS)

static void drop_entry(x86_tlb *t, unsigned i)
{
    x86_tlb_entry *e = &t->e[i];
    e->tag_r = e->tag_x = X86_TLB_NONE(i);
    __atomic_store_n(&e->tag_w, X86_TLB_NONE(i), __ATOMIC_RELAXED);
    __atomic_store_n(&t->meta[i], 0, __ATOMIC_RELAXED);
}

static void forget_large(x86_cpu *cpu)
{
    for (unsigned half = 0; half < 2; half++) {
        cpu->large_lo[half] = UINT64_MAX;
        cpu->large_hi[half] = 0;
    }
}

/* Entry 0 is all that is not empty in zeroed memory; nothing else is touched, for a new machine pays for each page. */
void x86_tlb_init(x86_cpu *cpu)
{
    for (unsigned c = 0; c < X86_NCTX; c++) {
        x86_tlb_entry *e = &cpu->tlb[c].e[0];
        e->tag_r = e->tag_w = e->tag_x = X86_TLB_NONE(0);
    }
    forget_large(cpu);
}

static void touch(x86_cpu *cpu, unsigned ctx, unsigned i)
{
    __atomic_store_n(&cpu->tlb_touched[ctx], cpu->tlb_touched[ctx] | UINT32_C(1) << i / CHUNK, __ATOMIC_RELAXED);
}

static uint64_t note_large(x86_cpu *cpu, uint64_t la, uint64_t page_bytes)
{
    if (page_bytes <= 4096)
        return 0;
    unsigned half = la >> 63;
    uint64_t first = la & ~(page_bytes - 1), last = first + (page_bytes - 1);
    if (first < cpu->large_lo[half])
        cpu->large_lo[half] = first;
    if (last > cpu->large_hi[half])
        cpu->large_hi[half] = last;
    return X86_TLBM_LARGE;
}

/* One more slot in a list of some; room + 1 in all: more than it holds, so that all entries are to be looked at. */
static void note(uint16_t *list, uint32_t *count, uint32_t room, unsigned ctx, unsigned i)
{
    if (*count < room)
        list[(*count)++] = (uint16_t)(ctx << X86_TLB_BITS | i);
    else
        *count = room + 1;
}

/* An address space is left soon after it was entered, as a rule: what it has had is known without looking at all entries. */
static void note_local(x86_cpu *cpu, unsigned ctx, unsigned i, uint64_t meta)
{
    if (!(meta & X86_TLBM_GLOBAL))
        note(cpu->local, &cpu->local_count, X86_LOCALS, ctx, i);
}

/* One more entry with a write tag, for x86_tlb_protect_noted(). */
static void note_writable(x86_cpu *cpu, unsigned ctx, unsigned i)
{
    note(cpu->writable, &cpu->writable_count, X86_WRITABLES, ctx, i);
}

void x86_tlb_set(x86_cpu *cpu, unsigned ctx, uint64_t la, uint64_t gpa, uint8_t *host, unsigned prot, bool global,
                 uint64_t page_bytes)
{
    unsigned i = X86_TLB_INDEX(la);
    x86_tlb *t = &cpu->tlb[ctx];
    x86_tlb_entry *e = &t->e[i];
    uint64_t page = la & X86_PAGE_MASK, none = X86_TLB_NONE(i);
    if (cpu->watch & X86_WATCH_PAGES)
        prot &= ~cpu->env->withheld(cpu, page, gpa & X86_PAGE_MASK);
    uint64_t meta = (gpa & X86_PAGE_MASK) | X86_TLBM_VALID | (global ? X86_TLBM_GLOBAL : 0) |
                    (prot & X86_TLB_MAY_W ? X86_TLBM_MAY_W : 0) | note_large(cpu, la, page_bytes);
    touch(cpu, ctx, i);
    note_local(cpu, ctx, i, meta);
    __atomic_store_n(&e->tag_w, none, __ATOMIC_RELAXED);
    __atomic_store_n(&t->meta[i], meta, __ATOMIC_RELEASE);
    e->host = host;
    e->tag_r = prot & X86_READ ? page : none;
    e->tag_x = prot & X86_EXEC ? page : none;
    if (prot & X86_WRITE)
        note_writable(cpu, ctx, i);
    __atomic_store_n(&e->tag_w, prot & X86_WRITE ? page : none, __ATOMIC_RELEASE);
}

void x86_tlb_allow(x86_cpu *cpu, unsigned ctx, uint64_t la)
{
    unsigned i = X86_TLB_INDEX(la);
    note_writable(cpu, ctx, i);
    __atomic_store_n(&cpu->tlb[ctx].e[i].tag_w, la & X86_PAGE_MASK, __ATOMIC_RELEASE);
}

void x86_tlb_protect_noted(x86_cpu *cpu)
{
    __atomic_fetch_add(&cpu->tlb_protects, 1, __ATOMIC_SEQ_CST);
    if (cpu->writable_count > X86_WRITABLES) {
        x86_tlb_protect(cpu, UINT64_MAX);
    } else {
        for (uint32_t n = 0; n < cpu->writable_count; n++) {
            unsigned i = cpu->writable[n] & (X86_TLB_ENTRIES - 1), ctx = cpu->writable[n] >> X86_TLB_BITS;
            __atomic_store_n(&cpu->tlb[ctx].e[i].tag_w, X86_TLB_NONE(i), __ATOMIC_RELAXED);
        }
    }
    cpu->writable_count = 0;
}

void x86_tlb_set_io(x86_cpu *cpu, unsigned ctx, uint64_t la, uint64_t gpa, unsigned prot, bool global,
                    uint64_t page_bytes)
{
    unsigned i = X86_TLB_INDEX(la);
    x86_tlb *t = &cpu->tlb[ctx];
    uint64_t meta = (gpa & X86_PAGE_MASK) | X86_TLBM_VALID | X86_TLBM_IO | (global ? X86_TLBM_GLOBAL : 0) |
                    note_large(cpu, la, page_bytes);
    touch(cpu, ctx, i);
    note_local(cpu, ctx, i, meta);
    drop_entry(t, i);
    t->e[i].host = (uint8_t *)(uintptr_t)((la & X86_PAGE_MASK) | prot);
    __atomic_store_n(&t->meta[i], meta, __ATOMIC_RELEASE);
}

bool x86_tlb_known(x86_cpu *cpu, unsigned ctx, uint64_t la, unsigned access, uint64_t *gpa)
{
    unsigned i = X86_TLB_INDEX(la);
    const x86_tlb_entry *e = &cpu->tlb[ctx].e[i];
    uint64_t meta = cpu->tlb[ctx].meta[i], page = la & X86_PAGE_MASK;
    if (meta & X86_TLBM_IO)
        return x86_tlb_device(cpu, ctx, la, access, gpa);
    *gpa = (meta & X86_PAGE_MASK) | (la & 0xfff);
    return access == X86_WRITE && (meta & X86_TLBM_MAY_W) && (e->tag_r == page || e->tag_x == page);
}

/* The linear address of an entry's page. */
static uint64_t page_of(const x86_tlb *t, unsigned i)
{
    const x86_tlb_entry *e = &t->e[i];
    uint64_t none = X86_TLB_NONE(i);
    if (t->meta[i] & X86_TLBM_IO)
        return (uintptr_t)e->host & X86_PAGE_MASK;
    return e->tag_r != none ? e->tag_r : e->tag_x != none ? e->tag_x : e->tag_w;
}

static void set_aside(x86_park *park, const x86_tlb *t, unsigned ctx, unsigned i)
{
    if (park->count == X86_PARKED)
        return;
    unsigned n = park->count++;
    park->held[n].e = t->e[i];
    park->held[n].meta = t->meta[i];
    park->held[n].slot = ctx << X86_TLB_BITS | i;
}

/* To `park`, if that is not NULL. */
static void drop_to(x86_park *park, x86_tlb *t, unsigned ctx, unsigned i)
{
    if (park)
        set_aside(park, t, ctx, i);
    drop_entry(t, i);
}

/* Drops each entry in use that has none of the meta bits in `keep`. */
static void sweep(x86_cpu *cpu, uint64_t keep, x86_park *park)
{
    for (unsigned c = 0; c < X86_NCTX; c++) {
        x86_tlb *t = &cpu->tlb[c];
        uint32_t left = 0;
        for (uint32_t chunks = cpu->tlb_touched[c]; chunks; chunks &= chunks - 1) {
            unsigned chunk = (unsigned)__builtin_ctz(chunks);
            for (unsigned i = chunk * CHUNK; i < (chunk + 1) * CHUNK; i++)
                if (t->meta[i] & keep)
                    left |= UINT32_C(1) << chunk;
                else if (t->meta[i])
                    drop_to(park, t, c, i);
        }
        __atomic_store_n(&cpu->tlb_touched[c], left, __ATOMIC_RELAXED);
    }
    cpu->local_count = 0;
}

static void sweep_locals(x86_cpu *cpu, x86_park *park)
{
    if (cpu->local_count > X86_LOCALS) {
        sweep(cpu, X86_TLBM_GLOBAL, park);
        return;
    }
    for (uint32_t n = 0; n < cpu->local_count; n++) {
        unsigned i = cpu->local[n] & (X86_TLB_ENTRIES - 1), ctx = cpu->local[n] >> X86_TLB_BITS;
        x86_tlb *t = &cpu->tlb[ctx];
        if (t->meta[i] && !(t->meta[i] & X86_TLBM_GLOBAL))
            drop_to(park, t, ctx, i);
    }
    cpu->local_count = 0;
}

void x86_tlb_clear(x86_cpu *cpu)
{
    sweep(cpu, 0, NULL);
    forget_large(cpu);
    cpu->tlb_clears++;
}

void x86_tlb_clear_nonglobal(x86_cpu *cpu)
{
    sweep_locals(cpu, NULL);
}

void x86_tlb_park(x86_cpu *cpu, x86_park *park)
{
    park->count = 0;
    park->clears = cpu->tlb_clears;
    park->protects = __atomic_load_n(&cpu->tlb_protects, __ATOMIC_ACQUIRE);
    sweep_locals(cpu, park);
}

/* Another thread that takes write tags meanwhile either finds the new ones or is found to have been here. */
void x86_tlb_unpark(x86_cpu *cpu, const x86_park *park)
{
    if (park->clears != cpu->tlb_clears)
        return;
    bool may_write = __atomic_load_n(&cpu->tlb_protects, __ATOMIC_ACQUIRE) == park->protects;
    for (unsigned n = 0; n < park->count; n++) {
        unsigned ctx = park->held[n].slot >> X86_TLB_BITS, i = park->held[n].slot & (X86_TLB_ENTRIES - 1);
        const x86_tlb_entry *from = &park->held[n].e;
        x86_tlb *t = &cpu->tlb[ctx];
        if (t->meta[i])
            continue;
        touch(cpu, ctx, i);
        note_local(cpu, ctx, i, park->held[n].meta);
        __atomic_store_n(&t->meta[i], park->held[n].meta, __ATOMIC_RELEASE);
        t->e[i].host = from->host;
        t->e[i].tag_r = from->tag_r;
        t->e[i].tag_x = from->tag_x;
        if (may_write && from->tag_w != X86_TLB_NONE(i)) {
            note_writable(cpu, ctx, i);
            __atomic_store_n(&t->e[i].tag_w, from->tag_w, __ATOMIC_RELEASE);
        }
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (may_write && __atomic_load_n(&cpu->tlb_protects, __ATOMIC_ACQUIRE) != park->protects)
        x86_tlb_protect(cpu, UINT64_MAX);
}

/* Drop whatever could be part of a large page around la: anything large in its gigabyte. */
static void drop_large(x86_cpu *cpu, uint64_t la)
{
    for (unsigned c = 0; c < X86_NCTX; c++) {
        x86_tlb *t = &cpu->tlb[c];
        for (uint32_t chunks = cpu->tlb_touched[c]; chunks; chunks &= chunks - 1) {
            unsigned chunk = (unsigned)__builtin_ctz(chunks);
            for (unsigned i = chunk * CHUNK; i < (chunk + 1) * CHUNK; i++)
                if ((t->meta[i] & X86_TLBM_LARGE) && (page_of(t, i) ^ la) >> 30 == 0)
                    drop_entry(t, i);
        }
    }
}

void x86_tlb_drop(x86_cpu *cpu, uint64_t la)
{
    unsigned i = X86_TLB_INDEX(la), half = la >> 63;
    uint64_t page = la & X86_PAGE_MASK;
    for (unsigned c = 0; c < X86_NCTX; c++) {
        x86_tlb *t = &cpu->tlb[c];
        if (t->meta[i] && page_of(t, i) == page)
            drop_entry(t, i);
    }
    if (la >= cpu->large_lo[half] && la <= cpu->large_hi[half])
        drop_large(cpu, la);
}

bool x86_tlb_protect(x86_cpu *cpu, uint64_t gpa)
{
    bool found = false;
    __atomic_fetch_add(&cpu->tlb_protects, 1, __ATOMIC_SEQ_CST);
    for (unsigned c = 0; c < X86_NCTX; c++) {
        x86_tlb *t = &cpu->tlb[c];
        uint32_t touched = __atomic_load_n(&cpu->tlb_touched[c], __ATOMIC_RELAXED);
        for (uint32_t chunks = touched; chunks; chunks &= chunks - 1) {
            unsigned chunk = (unsigned)__builtin_ctz(chunks);
            for (unsigned i = chunk * CHUNK; i < (chunk + 1) * CHUNK; i++) {
                uint64_t meta = __atomic_load_n(&t->meta[i], __ATOMIC_ACQUIRE), none = X86_TLB_NONE(i);
                if (!meta || (gpa != UINT64_MAX && (meta ^ gpa) >> 12 != 0))
                    continue;
                if (__atomic_exchange_n(&t->e[i].tag_w, none, __ATOMIC_SEQ_CST) != none)
                    found = true;
            }
        }
    }
    return found;
}
