/* shadow.c - strategy "shadow": what walks found is kept for every address space of the guest, whichever it runs in.
 *
 * Parts. A shadow page mirrors one guest page table (a `gfn`), as far as walks have read it. Leaf pages, whose entries
 * map 4 KiB, also carry the rights of the levels above, so a table used under different rights has several shadows;
 * roots share them. A root is an address space: CR3 and the mode bits that change what tables mean. It has a directory
 * that leads from a linear address's upper bits to the leaf page (or to a large page) in one step. A miss of the inline
 * TLB that finds its entry there reads two or three words and no guest table. Everything else is a walk of the guest's
 * tables, whose path is then recorded.
 *
 * Coherence. The architecture lets translations be stale until the guest flushes (INVLPG, MOV CR3...; SDM vol. 3,
 * 4.10.4), at all levels. So it is enough that after a flush everything recorded equals the guest's tables. A page is
 *   protected  the table has VM_PAGE_TABLE and no write tags: nothing changes unseen. A write makes it loose.
 *   loose      it may have been written; compared at each flush. Once it has stood a number of flushes unchanged it is
 *              protected, the more of them the more often that was in vain.
 *   idle       nothing is recorded: nothing to compare.
 * Loose is the first state, and protection begins at flushes only, between instructions: code that holds the host address
 * of a page for the rest of its block can be under way at any other time. With several vCPUs the world is stopped for
 * it, so that no store is under way anywhere.
 *
 * A switch back. At MOV CR3 what the inline TLB holds is set aside, and entered again when the vCPU is back in the root
 * (park.c), if nothing recorded for the root has changed meanwhile: that is its `version`. So whatever goes to the TLB has to
 * be recorded; a vCPU for which that failed has its space's key taken away.
 *
 * A changed entry of a leaf is dropped there. A changed entry above empties the directories of the roots it is part of,
 * by their epoch; the leaves stay.
 *
 * Locks. With several vCPUs `lock` guards all of it. It is held for moments, never while waiting for anything else, and
 * taken last. Recording reads the guest's entries once more under it, so that what is recorded is not older than the
 * last flush of any vCPU.
 *
 * Memory. At most `budget` pages and ROOTS roots; what was not used for long goes first. If the host has no memory,
 * walks are not recorded, and that is all.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "mmu/mmu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef VM_TINY_CACHE
#define VM_SHADOW_PAGES 8
#else
#define VM_SHADOW_PAGES 1024
#endif
enum { ROOTS = 64, DIRECTORY = 1024, BUCKETS = 4096, LEAST_BUDGET = VM_SHADOW_PAGES, MOST_BUDGET = 65536, STANDS = 8, MAX_STANDS = 128,
       BATCH = 64 };
#define FIRST_KEY UINT64_C(0x10000)      /* of a root's vm_space; PCIDs have lower ones */
enum { IS_LEAF = 1, RIGHT_RW = 2, RIGHT_US = 4, RIGHT_NX = 8, MODE_NARROW = 16, MODE_NXE = 32, MODE_PAE = 64 };      /* page.role */
enum state { IDLE, LOOSE, PROTECTED };

typedef struct page {
    uint64_t gfn;                      /* address of the guest's table */
    struct page *next;                 /* in its bucket */
    struct page *loose_next, **loose_link;
    uint64_t roots;                    /* bit i: part of root i */
    unsigned index;                    /* in shadow.pages */
    uint8_t role, state;
    bool is_used;                      /* recorded to, or (after spread_use()) looked at, since the hand last came by */
    bool is_live;                      /* recorded to since the last flush */
    uint16_t stood, stands;            /* flushes unchanged; of how many */
    uint16_t known_count;
    uint64_t known[16];                /* bit i: entry i is recorded */
    uint32_t e[1024];                  /* packed entries (512 of them if not narrow); 0: not recorded */
} page;

typedef struct spot {                  /* of a directory: a cache line */
    uint64_t tag;                      /* epoch and upper bits of the linear address */
    const uint32_t *entries;           /* the leaf's; NULL: a large page: */
    uint64_t gpa, page_bytes;          /* where it begins, its size */
    uint32_t entry;                    /* and its entry, packed */
    page *leaf;
    uint8_t role;                      /* rights of the levels above (large: and its own), MODE_NARROW */
    bool is_used;                      /* since spread_use() */
} __attribute__((aligned(64))) spot;

typedef struct root {
    uint64_t cr3, mode, pdpte[4];
    uint64_t epoch, stamp;
    vm_space space;                    /* the version counts changes of what is recorded */
    unsigned index, shift;
    spot directory[DIRECTORY];
} root;

typedef struct shadow {
    vm_machine *m;
    vm_lock lock;
    bool is_shared;                    /* several vCPUs */
    root *roots[ROOTS];
    page *buckets[BUCKETS];
    uint64_t cr3s[ROOTS];              /* theirs, for finding one */
    uint64_t keys;                     /* roots made so far */
    page **pages, *loose, *spare;
    unsigned page_count, page_capacity, hand, loose_count;
    unsigned ripe, since_protecting;   /* pages that have stood long enough; flushes */
    uint64_t stamp;
} shadow;

static void lock(shadow *s)
{
    if (!s->is_shared)
        return;
    int zero = 0;
    while (!atomic_compare_exchange_weak_explicit(&s->lock.word, &zero, 1, memory_order_acquire, memory_order_relaxed)) {
        zero = 0;
        __builtin_ia32_pause();
    }
}

static void unlock(shadow *s)
{
    if (s->is_shared)
        atomic_store_explicit(&s->lock.word, 0, memory_order_release);
}

/* ---- guest tables ---- */

static const uint8_t *table_host(shadow *s, uint64_t gfn)
{
    const vm_range *range = vm_view_find(&s->m->view, gfn);
    return range && range->region->kind <= VM_REGION_FILE ? range->region->host + (gfn - range->gpa) : NULL;
}

static uint64_t read_guest(const uint8_t *table, bool is_narrow, unsigned i)
{
    return is_narrow ? __atomic_load_n((const uint32_t *)table + i, __ATOMIC_RELAXED)
                     : __atomic_load_n((const uint64_t *)table + i, __ATOMIC_RELAXED);
}

/* What matters of an entry in 32 bits, so that twice as many fit the host's caches: address bits 35..12, P RW US A D in their
 * places, NX in bit 3, G in bit 4, PS in bit 7. 0: not present, or an address too high to be recorded. */
#define PACKED_NX 8u
#define PACKED_G 16u

static uint32_t pack(uint64_t pte, uint8_t role)
{
    uint64_t address = role & MODE_NARROW ? pte & 0xfffff000 : pte & UINT64_C(0x000ffffffffff000);
    bool is_upper = !(role & IS_LEAF), is_reserved = (role & MODE_PAE) && (pte & UINT64_C(0x7ff0000000000000));
    if (!(pte & X86_PTE_P) || address >> 36 || is_reserved)
        return 0;
    return (uint32_t)(address >> 12 << 8 | (pte & (is_upper ? 0xe7 : 0x67)) | (pte & X86_PTE_G ? PACKED_G : 0) |
                      (!(role & MODE_NARROW) && (pte & X86_PTE_NX) ? PACKED_NX : 0));
}

static void set_entry(page *p, unsigned i, uint32_t packed)
{
    uint64_t bit = UINT64_C(1) << (i & 63);
    bool was = p->known[i >> 6] & bit, is = packed != 0;
    p->known[i >> 6] = (p->known[i >> 6] & ~bit) | (is ? bit : 0);
    p->known_count = (uint16_t)(p->known_count + is - was);
    p->e[i] = packed;
}

/* Does the guest's entry still say what was recorded? It may have more accessed and dirty bits, from other vCPUs or roots. */
static bool is_same(uint32_t guest, uint32_t recorded)
{
    uint32_t x = guest ^ recorded;
    return !(x & ~(X86_PTE_A | X86_PTE_D)) && !(x & recorded);
}

/* ---- pages and their states ---- */

static unsigned bucket_of(uint64_t gfn)
{
    return (unsigned)(gfn * UINT64_C(0x9e3779b97f4a7c15) >> 52) & (BUCKETS - 1);
}

static void leave_loose(shadow *s, page *p)
{
    if (p->state != LOOSE)
        return;
    *p->loose_link = p->loose_next;
    if (p->loose_next)
        p->loose_next->loose_link = p->loose_link;
    s->loose_count--;
}

static void set_state(shadow *s, page *p, enum state state)
{
    leave_loose(s, p);
    p->state = (uint8_t)state;
    p->stood = 0;
    if (state == LOOSE) {
        p->loose_next = s->loose;
        p->loose_link = &s->loose;
        if (s->loose)
            s->loose->loose_link = &p->loose_next;
        s->loose = p;
        s->loose_count++;
    }
}

/* Something recorded on the page has gone; `is_upper`: directories may lead astray. */
static void changed(shadow *s, const page *p, bool is_upper)
{
    for (uint64_t roots = p->roots; roots; roots &= roots - 1) {
        root *r = s->roots[__builtin_ctzll(roots)];
        if (!r)
            continue;
        r->space.version++;
        r->epoch += is_upper;
    }
}

static void drop_entry(shadow *s, page *p, unsigned i)
{
    set_entry(p, i, 0);
    changed(s, p, !(p->role & IS_LEAF));
}

static void drop_all(shadow *s, page *p)
{
    memset(p->known, 0, sizeof p->known);
    memset(p->e, 0, sizeof p->e);
    p->known_count = 0;
    changed(s, p, !(p->role & IS_LEAF));
}

/* Another shadow of the same table that relies on its write traps. */
static bool has_other_protected(const shadow *s, const page *p)
{
    for (const page *q = s->buckets[bucket_of(p->gfn)]; q; q = q->next)
        if (q != p && q->gfn == p->gfn && q->state == PROTECTED)
            return true;
    return false;
}

static void free_page(shadow *s, page *p)
{
    if (p->state == PROTECTED && !has_other_protected(s, p))
        vm_page_trap(s->m, p->gfn, false);
    leave_loose(s, p);
    changed(s, p, true);               /* directories may lead here */
    page **at = &s->buckets[bucket_of(p->gfn)];
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    s->pages[p->index] = s->pages[--s->page_count];
    s->pages[p->index]->index = p->index;
    p->next = s->spare;
    s->spare = p;
}

/* 1/32 of the guest's memory. */
static unsigned budget_of(const shadow *s)
{
    uint64_t budget = LEAST_BUDGET < 1024 ? 0 : s->m->ram_total >> 17;
    return budget < LEAST_BUDGET ? LEAST_BUDGET : budget > MOST_BUDGET ? MOST_BUDGET : (unsigned)budget;
}

/* Lookups note use in the directory, where they are anyhow. */
static void spread_use(shadow *s)
{
    for (unsigned i = 0; i < ROOTS && s->roots[i]; i++)
        for (unsigned k = 0; k < DIRECTORY; k++) {
            spot *d = &s->roots[i]->directory[k];
            if (d->is_used && d->leaf && d->tag >> 27 == (s->roots[i]->epoch << 27) >> 27)
                d->leaf->is_used = true;
            d->is_used = false;
        }
}

/* Make room: a part of the pages, those first that nobody used since the hand last came by. */
static void reclaim(shadow *s, unsigned budget)
{
    unsigned goal = budget - budget / 8;
    spread_use(s);
    for (unsigned looks = 2 * s->page_count; looks && s->page_count > goal; looks--) {
        if (s->hand >= s->page_count)
            s->hand = 0;
        page *p = s->pages[s->hand];
        if (p->is_used)
            p->is_used = false, s->hand++;
        else
            free_page(s, p);
    }
}

static bool grow(shadow *s)
{
    unsigned capacity = s->page_capacity ? 2 * s->page_capacity : 256;
    page **pages = realloc(s->pages, capacity * sizeof *pages);
    if (!pages)
        return false;
    s->pages = pages;
    s->page_capacity = capacity;
    return true;
}

static page *new_page(shadow *s, uint64_t gfn, uint8_t role)
{
    unsigned budget = budget_of(s);
    if (s->page_count >= budget)
        reclaim(s, budget);
    if (s->page_count == s->page_capacity && !grow(s))
        return NULL;
    page *p = s->spare;
    if (p) {
        s->spare = p->next;
        memset(p, 0, sizeof *p);
    } else if ((p = calloc(1, sizeof *p)) == NULL) {
        return NULL;
    }
    p->gfn = gfn;
    p->role = role;
    p->stands = STANDS;
    p->index = s->page_count;
    s->pages[s->page_count++] = p;
    unsigned b = bucket_of(gfn);
    p->next = s->buckets[b];
    s->buckets[b] = p;
    return p;
}

static page *find_page(const shadow *s, uint64_t gfn, uint8_t role)
{
    for (page *p = s->buckets[bucket_of(gfn)]; p; p = p->next)
        if (p->gfn == gfn && p->role == role)
            return p;
    return NULL;
}

/* ---- flushes: comparing and protecting ---- */

/* True: something had changed. */
static bool compare_page(shadow *s, page *p)
{
    const uint8_t *table = table_host(s, p->gfn);
    bool is_narrow = p->role & MODE_NARROW, has_changed = false;
    for (unsigned word = 0; word < 16; word++)
        for (uint64_t bits = p->known[word]; bits; bits &= bits - 1) {
            unsigned i = word * 64 + (unsigned)__builtin_ctzll(bits);
            if (!table || !is_same(pack(read_guest(table, is_narrow, i), p->role), p->e[i])) {
                drop_entry(s, p, i);
                has_changed = true;
            }
        }
    return has_changed;
}

static void compare_loose(shadow *s, vm_vcpu *cpu, bool uppers_only)
{
    page *next;
    for (page *p = s->loose; p; p = next) {
        next = p->loose_next;
        if (uppers_only && (p->role & IS_LEAF))
            continue;
        cpu->x86.stat[X86_STAT_SHADOW_SYNCS]++;
        bool has_changed = compare_page(s, p);
        if (uppers_only) {
            p->stood = has_changed ? 0 : p->stood;
        } else if (has_changed) {
            if (!p->is_live)           /* the guest has put the page to another use */
                drop_all(s, p);
            p->stood = 0;
        } else if (++p->stood == p->stands) {
            s->ripe++;
        }
        if (!uppers_only)
            p->is_live = false;
        if (!p->known_count)
            set_state(s, p, IDLE);
    }
}

/* No vCPU keeps a write tag for a page with VM_PAGE_TABLE. */
static void take_write_tags(shadow *s, const uint64_t *gfns, unsigned count)
{
    for (unsigned v = 0; v < s->m->vcpu_count; v++)
        for (unsigned i = 0; i < count && s->m->vcpus[v]; i++)
            vm_mmu_protect_page(s->m->vcpus[v], gfns[i]);
}

/* Pages that have stood long enough become protected. The lock is not held while the world is stopped. */
static void protect_ripe(shadow *s, vm_vcpu *cpu)
{
    uint64_t gfns[BATCH];
    unsigned count = 0;
    lock(s);
    for (page *p = s->loose; p && count < BATCH; p = p->loose_next)
        if (p->stood >= p->stands && vm_page_trap(s->m, p->gfn, true))
            gfns[count++] = p->gfn;
    s->ripe = s->since_protecting = 0;
    unlock(s);
    if (s->is_shared) {
        vm_pause(s->m);                /* and stores under way through the old tags are done */
        take_write_tags(s, gfns, count);
        vm_resume(s->m);
    } else {
        take_write_tags(s, gfns, count);
    }
    lock(s);
    for (unsigned i = 0; i < count; i++)
        for (page *p = s->buckets[bucket_of(gfns[i])]; p; p = p->next)
            if (p->gfn == gfns[i] && p->state == LOOSE && vm_page_is_trapped(s->m, p->gfn)) {
                compare_page(s, p);
                set_state(s, p, PROTECTED);
            }
    unlock(s);
    (void)cpu;
}

static void flush(shadow *s, vm_vcpu *cpu)
{
    lock(s);
    compare_loose(s, cpu, false);
    bool is_ripe = s->ripe >= 8 || (s->ripe && ++s->since_protecting >= 16);
    unlock(s);
    if (is_ripe)
        protect_ripe(s, cpu);
}

/* ---- roots ---- */

static uint64_t mode_of(const x86_cpu *x)
{
    return (x->cr4 & (X86_CR4_PAE | X86_CR4_PSE)) | (x->efer & (X86_EFER_LMA | X86_EFER_NXE));
}

static bool is_pae32(const x86_cpu *x)
{
    return (x->cr4 & X86_CR4_PAE) && !(x->efer & X86_EFER_LMA);
}

static uint64_t root_base(const x86_cpu *x)
{
    return x->efer & X86_EFER_LMA ? x->cr3 & x->phys_mask & X86_PAGE_MASK
           : x->cr4 & X86_CR4_PAE ? x->cr3 & 0xffffffe0 : x->cr3 & 0xfffff000;
}

static bool is_root(const root *r, const x86_cpu *x)
{
    return r->cr3 == root_base(x) && r->mode == mode_of(x) &&
           (!is_pae32(x) || memcmp(r->pdpte, x->pdpte, sizeof r->pdpte) == 0);
}

static bool is_in_use(const shadow *s, const root *r)
{
    for (unsigned v = 0; v < s->m->vcpu_count; v++)
        if (s->m->vcpus[v] && s->m->vcpus[v]->mmu_root == r)
            return true;
    return false;
}

static void init_root(shadow *s, root *r, const x86_cpu *x, unsigned index)
{
    s->cr3s[index] = r->cr3 = root_base(x);
    r->mode = mode_of(x);
    memcpy(r->pdpte, x->pdpte, sizeof r->pdpte);
    r->epoch++;                        /* pages of the one it was may count as this one's: that costs at most an epoch */
    r->space = (vm_space){ .key = FIRST_KEY + s->keys++, .version = 1 };
    r->index = index;
    r->shift = x->cr4 & X86_CR4_PAE ? 21 : 22;
}

static root *new_root(void)
{
    root *r = mmap(NULL, sizeof *r, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return r == MAP_FAILED ? NULL : r;
}

/* The root for the state that the vCPU is in; NULL: no memory. */
static root *find_root(shadow *s, vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    unsigned oldest = ROOTS;
    uint64_t base = root_base(x);
    for (unsigned i = 0; i < ROOTS && s->roots[i]; i++)
        if (s->cr3s[i] == base && is_root(s->roots[i], x))
            return s->roots[i];
    for (unsigned i = 0; i < ROOTS; i++) {
        root *r = s->roots[i];
        if (!r) {
            r = new_root();
            if (r) {
                s->roots[i] = r;
                init_root(s, r, x, i);
                return r;
            }
            break;
        }
        if (!is_in_use(s, r) && (oldest == ROOTS || r->stamp < s->roots[oldest]->stamp))
            oldest = i;
    }
    if (oldest == ROOTS)
        return NULL;
    init_root(s, s->roots[oldest], x, oldest);
    return s->roots[oldest];
}

vm_space vm_shadow_space(const vm_machine *m, const void *which)
{
    shadow *s = m->mmu_state;
    const root *r = which;
    vm_space space = { 0 };
    lock(s);
    if (r)
        space = r->space;
    unlock(s);
    return space;
}

static void enter_root(shadow *s, vm_vcpu *cpu)
{
    lock(s);
    root *r = find_root(s, cpu);
    if (r)
        r->stamp = ++s->stamp;
    cpu->mmu_root = r;
    unlock(s);
}

/* ---- looking up ---- */

static uint64_t tag_of(const root *r, uint64_t la)
{
    return (la >> r->shift & ((UINT64_C(1) << 27) - 1)) | r->epoch << 27;
}

static spot *spot_of(root *r, uint64_t la)
{
    return &r->directory[la >> r->shift & (DIRECTORY - 1)];
}

static bool look_up(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    const x86_cpu *x = &cpu->x86;
    root *r = cpu->mmu_root;
    spot *d = spot_of(r, la);
    if (d->tag != tag_of(r, la))
        return false;
    uint32_t e = d->entry;
    if (d->entries) {
        e = d->entries[la >> 12 & (d->role & MODE_NARROW ? 1023 : 511)];
        if (!e)
            return false;
        d->is_used = true;
        w->gpa = (uint64_t)(e >> 8) << 12 | (la & 0xfff);
        w->page_bytes = 4096;
    } else {
        w->gpa = d->gpa | (la & (d->page_bytes - 1));
        w->page_bytes = d->page_bytes;
    }
    unsigned prot = x86_walk_prot(x, d->role & e, (d->role | e) & RIGHT_NX, ctx);
    if (!(e & X86_PTE_D))
        prot &= ~(unsigned)X86_WRITE;
    w->prot = prot;
    w->global = (e & PACKED_G) && (x->cr4 & X86_CR4_PGE);
    w->count = 0;
    return (prot & access) == access;
}

/* ---- recording a walk ---- */

/* The shadow page for the table with the entry at `at`, which a walk has read; the entry recorded as it is now; NULL: no memory, or it has changed. */
static page *record_step(shadow *s, const root *r, uint64_t at, uint64_t pte, uint8_t role)
{
    uint64_t gfn = at & X86_PAGE_MASK;
    bool is_narrow = role & MODE_NARROW;
    unsigned i = (unsigned)(at & 0xfff) >> (is_narrow ? 2 : 3);
    page *p = find_page(s, gfn, role);
    if (!p && !(p = new_page(s, gfn, role)))
        return NULL;
    p->roots |= UINT64_C(1) << r->index;
    p->is_used = p->is_live = true;
    uint32_t packed = pack(pte, role);
    if (!packed)
        return NULL;
    if (p->e[i] == packed)
        return p;
    if (p->state == IDLE)
        set_state(s, p, has_other_protected(s, p) ? PROTECTED : LOOSE);
    const uint8_t *table = table_host(s, gfn);
    if (!table || !is_same(pack(read_guest(table, is_narrow, i), role), packed))
        return NULL;
    set_entry(p, i, packed);
    return p;
}

static uint8_t base_role(const root *r)
{
    return (uint8_t)((r->mode & X86_CR4_PAE ? 0 : MODE_NARROW) | (r->mode & X86_EFER_NXE ? MODE_NXE : 0) |
                     ((r->mode & X86_CR4_PAE) && !(r->mode & X86_EFER_LMA) ? MODE_PAE : 0));
}

/* False: the walk could not be recorded. */
static bool record(shadow *s, root *r, uint64_t la, const x86_walk *w)
{
    uint8_t role = base_role(r), rights = RIGHT_RW | RIGHT_US;
    bool is_large = w->page_bytes > 4096;
    spot *d = spot_of(r, la);
    unsigned last = w->count - 1, i = 0;
    if (!is_large && d->tag == tag_of(r, la) && d->leaf && d->leaf->gfn == (w->at[last] & X86_PAGE_MASK)) {
        i = last;                      /* the levels above are recorded */
        rights = d->role & (RIGHT_RW | RIGHT_US | RIGHT_NX);
    }
    for (; i < w->count; i++) {
        uint64_t pte = w->pte[i];
        bool is_leaf = i == last && !is_large;
        page *p = record_step(s, r, w->at[i], pte, (uint8_t)(is_leaf ? role | rights | IS_LEAF : role));
        if (!p)
            return false;
        if (is_leaf) {
            *d = (spot){ .tag = tag_of(r, la), .leaf = p, .entries = p->e, .is_used = true,
                         .role = (uint8_t)(rights | (role & MODE_NARROW)) };
            return true;
        }
        rights = (uint8_t)((rights & pte & (RIGHT_RW | RIGHT_US)) | (rights & RIGHT_NX) |
                           (!(role & MODE_NARROW) && (pte & X86_PTE_NX) ? RIGHT_NX : 0));
    }
    *d = (spot){ .tag = tag_of(r, la), .entry = pack(w->pte[last], role), .gpa = w->gpa & ~(w->page_bytes - 1),
                 .page_bytes = w->page_bytes, .role = rights };
    return true;
}

bool vm_shadow_look_up(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    shadow *s = cpu->machine->mmu_state;
    if (!cpu->mmu_root || vm_mmu_is_flat(cpu))
        return false;
    lock(s);
    bool is_found = look_up(cpu, la, access, ctx, w);
    unlock(s);
    return is_found;
}

bool vm_shadow_translate(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    x86_cpu *x = &cpu->x86;
    shadow *s = cpu->machine->mmu_state;
    if (vm_mmu_is_flat(cpu))
        return x86_walk_page(x, la, access, ctx, true, w);
    if (vm_shadow_look_up(cpu, la, access, ctx, w)) {
        x->stat[X86_STAT_SHADOW_HITS]++;
        return true;
    }
    if (!cpu->mmu_root)
        enter_root(s, cpu);
    root *r = cpu->mmu_root;
    uint64_t epoch = r ? __atomic_load_n(&r->epoch, __ATOMIC_ACQUIRE) : 0;
    if (!vm_mmu_walk_ctx(cpu, la, access, ctx, w))
        return false;
    bool is_recorded = false;
    if (r && w->count) {
        lock(s);
        is_recorded = r->epoch == epoch && record(s, r, la, w);        /* the levels above are as they were */
        unlock(s);
    }
    if (!is_recorded)
        cpu->space.key = 0;
    return true;
}

/* ---- the vtable ---- */

static int shadow_create(vm_machine *m, void **state)
{
    shadow *s = calloc(1, sizeof *s);
    if (!s)
        return vm_fail(VM_E_NOMEM, "no memory for shadow page tables");
    s->m = m;
    s->is_shared = m->vcpu_count > 1;
    *state = s;
    return VM_OK;
}

/* Forget everything. The pages stay as spares. */
static void zap(shadow *s)
{
    lock(s);
    while (s->page_count)
        free_page(s, s->pages[s->page_count - 1]);
    unlock(s);
}

static void shadow_destroy(void *state)
{
    shadow *s = state;
    zap(s);
    for (unsigned v = 0; v < s->m->vcpu_count; v++)
        if (s->m->vcpus && s->m->vcpus[v])
            s->m->vcpus[v]->mmu_root = NULL;
    for (page *p = s->spare, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    for (unsigned i = 0; i < ROOTS; i++)
        if (s->roots[i])
            munmap(s->roots[i], sizeof *s->roots[i]);
    free(s->pages);
    free(s);
}

static int shadow_ask(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    x86_walk w;
    bool ok = vm_shadow_translate(cpu, gva, access, cpu->walk_ctx, &w);
    vm_mmu_to_result(&w, ok, out);
    return ok ? VM_OK : VM_E_FAULT;
}

static void shadow_root_changed(void *state, vm_vcpu *cpu, uint64_t cr3)
{
    shadow *s = state;
    (void)cr3;
    if (vm_mmu_is_flat(cpu)) {         /* tables may change by writes that go past write tags (the JIT's windows) */
        if (!s->is_shared && s->page_count)
            zap(s);
        cpu->mmu_root = NULL;
        return;
    }
    flush(s, cpu);
    enter_root(s, cpu);
}

/* Compare one entry of a loose leaf. */
static void compare_entry(shadow *s, page *p, unsigned i)
{
    bool is_narrow = p->role & MODE_NARROW;
    const uint8_t *table = p->e[i] ? table_host(s, p->gfn) : NULL;
    if (p->e[i] && (!table || !is_same(pack(read_guest(table, is_narrow, i), p->role), p->e[i]))) {
        drop_entry(s, p, i);
        p->stood = 0;
    }
}

/* INVLPG ends what is cached of the upper levels for any address, and of the leaf for this one (SDM vol. 3, 4.10.4.1).
 * Which leaf that is the directory may have forgotten: so the entry of every loose leaf. */
static void shadow_invalidate(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes)
{
    shadow *s = state;
    if (!bytes) {
        zap(s);
        return;
    }
    lock(s);
    compare_loose(s, cpu, true);
    uint64_t pages = ((gva & 0xfff) + bytes + 4095) >> 12;
    for (page *p = s->loose; p; p = p->loose_next)
        for (uint64_t k = 0; (p->role & IS_LEAF) && k < pages; k++)
            compare_entry(s, p, ((gva >> 12) + k) & (p->role & MODE_NARROW ? 1023 : 511));
    unlock(s);
}

static void shadow_table_written(void *state, vm_vcpu *cpu, uint64_t gpa)
{
    shadow *s = state;
    uint64_t gfn = gpa & X86_PAGE_MASK;
    (void)cpu;
    lock(s);
    vm_page_trap(s->m, gfn, false);
    for (page *p = s->buckets[bucket_of(gfn)]; p; p = p->next)
        if (p->gfn == gfn && p->state == PROTECTED) {
            set_state(s, p, p->known_count ? LOOSE : IDLE);
            p->stands = p->stands < MAX_STANDS ? p->stands * 2 : MAX_STANDS;
        }
    unlock(s);
}

uint64_t vm_shadow_pages(const vm_machine *m)
{
    const shadow *s = m->mmu == &vm_mmu_shadow ? m->mmu_state : NULL;
    return s ? __atomic_load_n(&s->page_count, __ATOMIC_RELAXED) : 0;
}

const vm_mmu_ops vm_mmu_shadow = { .size = sizeof(vm_mmu_ops), .name = "shadow", .create = shadow_create,
                                   .destroy = shadow_destroy, .translate = shadow_ask,
                                   .root_changed = shadow_root_changed, .invalidate = shadow_invalidate,
                                   .table_written = shadow_table_written };
