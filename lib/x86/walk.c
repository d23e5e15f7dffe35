/* walk.c - the guest's page tables: 32-bit, PAE and 4-level paging (SDM vol. 3, chapter 4).
 *
 * A walk reads entries straight from guest RAM, decides permission for one access context, and only when the access is
 * allowed sets accessed bits from the top down and, for a write, the leaf's dirty bit, each with a
 * compare-and-exchange: an entry that another CPU changed meanwhile restarts the walk. Tables that are not in RAM read
 * as all ones.
 */
#include "x86/system.h"

#define PTE_P X86_PTE_P
#define PTE_RW X86_PTE_RW
#define PTE_US X86_PTE_US
#define PTE_A X86_PTE_A
#define PTE_D X86_PTE_D
#define PTE_PS 0x80u
#define PTE_G X86_PTE_G
#define PTE_NX X86_PTE_NX
enum { ERR_P = 1, ERR_W = 2, ERR_U = 4, ERR_RSVD = 8, ERR_I = 16 };
#define MAX_RESTARTS 64

/* What a walk has found so far. `rights` is the AND of RW, US and A over the levels, `nx` the OR of NX. */
typedef struct walk_path {
    x86_walk *w;                       /* at, pte, gpa, page_bytes: where they are wanted */
    unsigned entry_bytes, count;
    uint64_t rights, nx;
    bool is_reserved;
} walk_path;

/* NULL: not in RAM. */
static const uint8_t *find_entry(x86_cpu *cpu, uint64_t gpa)
{
    unsigned prot;
    const uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    return page ? page + (gpa & 0xfff) : NULL;
}

static inline uint64_t read_entry(x86_cpu *cpu, uint64_t gpa, unsigned bytes)
{
    uint64_t offset = gpa - cpu->ram_gpa;
    const uint8_t *at = (const uint8_t *)((uintptr_t)cpu->ram_host + offset);     /* a pointer only once it is known to be one */
    if (__builtin_expect(offset >= cpu->ram_bytes, 0) && !(at = find_entry(cpu, gpa)))
        return ~UINT64_C(0);
    return bytes == 8 ? __atomic_load_n((const uint64_t *)at, __ATOMIC_ACQUIRE)
                      : __atomic_load_n((const uint32_t *)at, __ATOMIC_ACQUIRE);
}

static inline uint64_t take_entry(x86_cpu *cpu, walk_path *p, uint64_t gpa, unsigned bytes)
{
    uint64_t pte = read_entry(cpu, gpa, bytes);
    p->w->at[p->count] = gpa;
    p->w->pte[p->count++] = pte;
    p->rights &= pte;
    return pte;
}

/* 4-level paging from `level` 3 (PML4), or PAE from level 1 (page directory). False: not present or reserved bits. */
static inline __attribute__((always_inline)) bool walk_wide(x86_cpu *cpu, uint64_t la, uint64_t table, int level, uint64_t reserved, walk_path *p)
{
    for (;; level--) {
        unsigned shift = 12 + 9 * level;
        uint64_t pte = take_entry(cpu, p, table + (la >> shift & 511) * 8, 8), bad = reserved;
        if (!(pte & PTE_P))
            return false;
        bool is_leaf = level == 0 || (level < 3 && (pte & PTE_PS));
        if (level == 3 || (level == 2 && is_leaf && !x86_has(cpu, X86_FEAT_GB_PAGES)))
            bad |= PTE_PS;
        else if (is_leaf && level)
            bad |= (UINT64_C(1) << shift) - 0x2000;                     /* address bits below the page, above PAT */
        if (pte & bad) {
            p->is_reserved = true;
            return false;
        }
        p->nx |= pte & PTE_NX;
        uint64_t base = pte & UINT64_C(0x000ffffffffff000);
        if (is_leaf) {
            uint64_t page_bytes = UINT64_C(1) << shift;
            p->w->page_bytes = page_bytes;
            p->w->gpa = (base & ~(page_bytes - 1)) | (la & (page_bytes - 1));
            return true;
        }
        table = base;
    }
}

static bool walk_narrow(x86_cpu *cpu, uint64_t la, walk_path *p)
{
    p->entry_bytes = 4;
    uint64_t pde = take_entry(cpu, p, (cpu->cr3 & 0xfffff000) + (la >> 22 & 1023) * 4, 4);
    if (!(pde & PTE_P))
        return false;
    if ((pde & PTE_PS) && (cpu->cr4 & X86_CR4_PSE)) { /* PSE-36: bits 20..13 are address bits 39..32 */
        p->w->gpa = (pde & 0xffc00000) | (pde >> 13 & 0xff) << 32 | (la & 0x3fffff);
        p->w->page_bytes = 0x400000;
        p->is_reserved = (pde & 0x200000) || (p->w->gpa & ~cpu->phys_mask);
        return !p->is_reserved;
    }
    uint64_t pte = take_entry(cpu, p, (pde & 0xfffff000) + (la >> 12 & 1023) * 4, 4);
    p->w->gpa = (pte & 0xfffff000) | (la & 0xfff);
    p->w->page_bytes = 0x1000;
    return pte & PTE_P;
}

static inline bool walk_tables(x86_cpu *cpu, uint64_t la, walk_path *p, x86_walk *w)
{
    uint64_t reserved = ~cpu->phys_mask & UINT64_C(0x000fffffffffffff);
    *p = (walk_path){ .w = w, .rights = PTE_RW | PTE_US | PTE_A, .entry_bytes = 8 };
    if (!(cpu->efer & X86_EFER_NXE))
        reserved |= PTE_NX;
    if (x86_lma(cpu))
        return walk_wide(cpu, la, cpu->cr3 & cpu->phys_mask & X86_PAGE_MASK, 3, reserved, p);
    if (!(cpu->cr4 & X86_CR4_PAE))
        return walk_narrow(cpu, la, p);
    uint64_t pdpte = cpu->pdpte[la >> 30 & 3]; /* checked when CR3 was loaded; no rights of its own */
    if (!(pdpte & PTE_P))
        return false;
    reserved |= UINT64_C(0x7ff0000000000000);
    return walk_wide(cpu, la, pdpte & cpu->phys_mask & X86_PAGE_MASK, 1, reserved, p);
}

/* SDM vol. 3, 4.6.1. */
unsigned x86_walk_prot(const x86_cpu *cpu, uint64_t rights, bool nx, unsigned ctx)
{
    bool is_user_page = rights & PTE_US, is_writable = rights & PTE_RW, is_executable = !nx;
    if (ctx == X86_CTX_USER) {
        if (!is_user_page)
            return 0;
        return X86_READ | (is_writable ? X86_WRITE : 0) | (is_executable ? X86_EXEC : 0);
    }
    unsigned prot = X86_READ;
    if (is_writable || !(cpu->cr0 & X86_CR0_WP))
        prot |= X86_WRITE;
    if (is_user_page && (cpu->cr4 & X86_CR4_SMAP) && ctx != X86_CTX_KERNEL_AC)
        prot = 0;
    if (is_executable && !(is_user_page && (cpu->cr4 & X86_CR4_SMEP)))
        prot |= X86_EXEC;
    return prot;
}

/* False: an entry changed under us. */
static bool set_accessed_dirty(x86_cpu *cpu, x86_walk *w, unsigned entry_bytes, bool is_write)
{
    for (unsigned i = 0; i < w->count; i++) {
        uint64_t pte = w->pte[i], want = pte | PTE_A;
        if (i == w->count - 1 && is_write)
            want |= PTE_D;
        if (pte == want)
            continue;
        if (!x86_cmpxchg_phys(cpu, w->at[i], entry_bytes, pte, want))
            return false;
        w->pte[i] = want;
    }
    return true;
}

static bool page_fault(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, uint32_t error, x86_walk *w)
{
    bool has_fetch_bit = (cpu->cr4 & X86_CR4_SMEP) || ((cpu->cr4 & X86_CR4_PAE) && (cpu->efer & X86_EFER_NXE));
    if (access & X86_WRITE)
        error |= ERR_W;
    if (ctx == X86_CTX_USER)
        error |= ERR_U;
    if ((access & X86_EXEC) && has_fetch_bit)
        error |= ERR_I;
    w->fault = (x86_fault){ .vector = X86_PF, .has_error = true, .error = error, .address = la };
    return false;
}

static bool walk_identity(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    if (la & ~cpu->phys_mask)          /* flat mode: nothing above the guest-physical space */
        return page_fault(cpu, la, access, ctx, 0, w);
    w->gpa = la;
    w->page_bytes = 0x1000;
    w->prot = X86_READ | X86_WRITE | X86_EXEC;
    return true;
}

bool x86_walk_page(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, bool set_ad, x86_walk *w)
{
    walk_path p;
    w->global = false;
    w->refs = w->count = 0;
    if (!(cpu->cr0 & X86_CR0_PG) || cpu->flat)
        return walk_identity(cpu, la, access, ctx, w);

    for (unsigned restarts = 0;; restarts++) {
        bool is_mapped = walk_tables(cpu, la, &p, w);
        w->count = p.count;
        w->refs += p.count;
        if (!is_mapped)
            return page_fault(cpu, la, access, ctx, p.is_reserved ? ERR_P | ERR_RSVD : 0, w);
        unsigned prot = x86_walk_prot(cpu, p.rights, p.nx, ctx);
        if ((prot & access) != access)
            return page_fault(cpu, la, access, ctx, ERR_P, w);
        uint64_t leaf = w->pte[p.count - 1];
        bool is_noted = (p.rights & PTE_A) && (!(access & X86_WRITE) || (leaf & PTE_D));
        if (set_ad && !is_noted && !set_accessed_dirty(cpu, w, p.entry_bytes, access & X86_WRITE) && restarts < MAX_RESTARTS)
            continue;                  /* tables in ROM never take the bits: the walk ends all the same */
        if (!(leaf & PTE_D) && !(set_ad && (access & X86_WRITE)))
            prot &= ~(unsigned)X86_WRITE;
        w->prot = prot;
        w->global = (leaf & PTE_G) && (cpu->cr4 & X86_CR4_PGE);
        return true;
    }
}

bool x86_load_pdptes(x86_cpu *cpu, uint64_t cr3)
{
    uint64_t loaded[4], reserved = (~cpu->phys_mask & X86_PAGE_MASK) | 0x1e6;
    for (unsigned i = 0; i < 4; i++) {
        loaded[i] = read_entry(cpu, (cr3 & 0xffffffe0) + 8 * i, 8);
        if ((loaded[i] & PTE_P) && (loaded[i] & reserved))
            return false;
    }
    for (unsigned i = 0; i < 4; i++)
        cpu->pdpte[i] = loaded[i];
    return true;
}
