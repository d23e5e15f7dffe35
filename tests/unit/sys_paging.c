/* sys_paging.c - page walks against SDM vol. 3, chapter 4: permission matrix, error codes, reserved bits, accessed and
 * dirty bits, all three formats. The expected result is computed from the manual's rules in this file, independently of
 * walk.c.
 */
#include "sysbare.h"

#define PML4 0x20000u
#define PDPT 0x21000u
#define PD 0x22000u
#define PT 0x23000u
#define P 1u
#define RW 2u
#define US 4u
#define PS 0x80u
#define NX (UINT64_C(1) << 63)
#define LA UINT64_C(0x40003abc)        /* PML4 0, PDPT 1, PD 0, PT 3 */
#define PAGE 0x5000u

typedef struct format { const char *name; bool is_long, is_pae; } format;
static const format formats[] = { { "32-bit", false, false }, { "pae", false, true }, { "4-level", true, true } };

/* Maps LA to PAGE with `upper` rights above and `leaf` at the bottom. */
static void map(const format *f, uint64_t upper, uint64_t leaf)
{
    memset(ram + PML4, 0, 0x4000);
    if (f->is_long) {
        put64(PML4, PDPT | P | RW | US);
        put64(PDPT + 8, PD | upper);
        put64(PD, PT | P | RW | US);
        put64(PT + 24, leaf);
        cpu->cr3 = PML4;
    } else if (f->is_pae) {
        put64(PDPT + 8, PD | P);
        put64(PD, PT | upper);
        put64(PT + 24, leaf);
        cpu->cr3 = PDPT;
        CHECK(x86_load_pdptes(cpu, cpu->cr3));
    } else {
        put32(PD + 0x400, (uint32_t)(PT | upper));
        put32(PT + 12, (uint32_t)leaf);
        cpu->cr3 = PD;
    }
}

static void start(const format *f)
{
    bare_new(f->is_long ? 3 : 2);
    cpu->flat = false;
    cpu->cr0 |= X86_CR0_PG;
    if (f->is_pae)
        cpu->cr4 |= X86_CR4_PAE;
    x86_mode_changed(cpu);
}

static uint64_t leaf_of(const format *f) { return f->is_pae ? get64(PT + 24) : get32(PT + 12); }

/* SDM 4.6.1, restated. */
static bool is_allowed(unsigned access, unsigned ctx, bool user, bool writable, bool nx, bool wp, bool smep, bool smap)
{
    if (ctx == X86_CTX_USER)
        return user && (access != X86_WRITE || writable) && (access != X86_EXEC || !nx);
    if (access == X86_EXEC)
        return !nx && !(smep && user);
    if (smap && user && ctx != X86_CTX_KERNEL_AC)
        return false;
    return access == X86_READ || writable || !wp;
}

TEST(permission_matrix)
{
    unsigned checked = 0;
    for (unsigned fi = 0; fi < 3; fi++)
        for (unsigned bits = 0; bits < 1u << 10; bits++) {
            const format *f = &formats[fi];
            bool wp = bits & 1, smep = bits & 2, smap = bits & 4, nxe = bits & 8;
            unsigned upper = P | (bits & 16 ? RW : 0) | (bits & 32 ? US : 0);
            uint64_t leaf = PAGE | P | (bits & 64 ? RW : 0) | (bits & 128 ? US : 0);
            bool nx = (bits & 256) && nxe && f->is_pae, nx_above = (bits & 512) && nxe && f->is_pae;
            if (fi == 0 && (bits & 0x300))
                continue;
            if (bits == 0 || !cpu)
                start(f);
            start(f);
            cpu->cr0 = wp ? cpu->cr0 | X86_CR0_WP : cpu->cr0 & ~(uint64_t)X86_CR0_WP;
            cpu->cr4 = (cpu->cr4 & ~(uint64_t)(X86_CR4_SMEP | X86_CR4_SMAP)) | (smep ? X86_CR4_SMEP : 0) |
                       (smap ? X86_CR4_SMAP : 0);
            cpu->efer = nxe ? cpu->efer | X86_EFER_NXE : cpu->efer & ~(uint64_t)X86_EFER_NXE;
            for (unsigned ctx = 0; ctx < X86_NCTX; ctx++)
                for (unsigned access = 1; access <= 4; access <<= 1) {
                    x86_walk w = { 0 };
                    map(f, upper | (nx_above ? NX : 0), leaf | (nx ? NX : 0));
                    bool user = (upper & US) && (leaf & US), writable = (upper & RW) && (leaf & RW);
                    bool want = is_allowed(access, ctx, user, writable, nx || nx_above, wp, smep, smap);
                    bool got = x86_walk_page(cpu, LA, access, ctx, true, &w);
                    if (got != want)
                        FAIL("%s bits %#x ctx %u access %u: %d", f->name, bits, ctx, access, got);
                    uint64_t after = leaf_of(f), bits_set = after & 0x60;
                    if (got) {
                        CHECK_EQ(w.gpa, PAGE + 0xabc);
                        CHECK_EQ(w.page_bytes, 4096);
                        CHECK_EQ(bits_set, access == X86_WRITE ? 0x60 : 0x20);
                        CHECK(w.prot & access);
                        CHECK(access == X86_WRITE || !(w.prot & X86_WRITE));    /* not dirty yet: no write tag */
                    } else {
                        CHECK_EQ(bits_set, 0);
                        CHECK_EQ(w.fault.vector, X86_PF);
                        CHECK_EQ(w.fault.address, LA);
                        bool has_i = access == X86_EXEC && (smep || (nxe && f->is_pae));
                        CHECK_EQ(w.fault.error,
                                 1u | (access == X86_WRITE ? 2 : 0) | (ctx == X86_CTX_USER ? 4 : 0) | (has_i ? 16 : 0));
                    }
                    checked++;
                }
        }
    CHECK(checked > 10000);
}

TEST(not_present_at_each_level)
{
    for (unsigned fi = 0; fi < 3; fi++) {
        const format *f = &formats[fi];
        static const uint32_t entries[3][4] = {
            {PD + 0x400, PT + 12}, {PDPT + 8, PD, PT + 24}, {PML4, PDPT + 8, PD, PT + 24}};
        for (unsigned i = 0; i < 4 && entries[fi][i]; i++) {
            x86_walk w = { 0 };
            start(f);
            map(f, P | RW | US, PAGE | P | RW | US);
            ram[entries[fi][i]] &= (uint8_t)~P;
            if (fi == 1)
                CHECK(x86_load_pdptes(cpu, cpu->cr3));
            CHECK(!x86_walk_page(cpu, LA, X86_WRITE, X86_CTX_USER, true, &w));
            CHECK_EQ(w.fault.error, 6);
            CHECK_EQ(leaf_of(f) & 0x60, 0);
        }
    }
}

TEST(reserved_bits)
{
    static const struct { unsigned format; uint32_t entry; uint64_t bits; bool nxe, is_bad; } cases[] = {
        { 2, PML4, PS, true, true },                     { 2, PML4, UINT64_C(1) << 46, true, true },
        { 2, PML4, UINT64_C(1) << 51, true, true },      { 2, PML4, UINT64_C(1) << 52, true, false },
        { 2, PML4, NX, false, true },                    { 2, PML4, NX, true, false },
        { 2, PDPT + 8, UINT64_C(1) << 47, true, true },  { 2, PDPT + 8, PS | 0x2000, true, true },
        { 2, PD, PS | 0x2000, true, true },              { 2, PD, PS | 0x100000, true, true },
        { 2, PT + 24, UINT64_C(1) << 50, true, true },   { 2, PT + 24, UINT64_C(1) << 62, true, false },
        { 2, PT + 24, PS, true, false },                 { 1, PT + 24, UINT64_C(1) << 62, true, true },
        { 1, PD, UINT64_C(1) << 52, true, true },        { 1, PD, NX, false, true },
        { 1, PT + 24, UINT64_C(1) << 46, true, true },   { 1, PD, PS | 0x4000, true, true },
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const format *f = &formats[cases[i].format];
        x86_walk w = { 0 };
        start(f);
        if (!cases[i].nxe)
            cpu->efer &= ~(uint64_t)X86_EFER_NXE;
        else
            cpu->efer |= X86_EFER_NXE;
        map(f, P | RW | US, PAGE | P | RW | US);
        put64(cases[i].entry, get64(cases[i].entry) | cases[i].bits);
        bool ok = x86_walk_page(cpu, LA, X86_READ, X86_CTX_USER, true, &w);
        if (ok == cases[i].is_bad)
            FAIL("case %u: %s", i, ok ? "allowed" : "refused");
        if (!ok)
            CHECK_EQ(w.fault.error, 1 | 4 | 8);
    }
}

TEST(large_pages)
{
    x86_walk w = { 0 };
    start(&formats[2]);
    map(&formats[2], P | RW | US, 0);
    put64(PD, 0x600000 | PS | P | RW | US | 0x1000);                    /* bit 12 is PAT */
    CHECK(x86_walk_page(cpu, LA, X86_WRITE, X86_CTX_USER, true, &w));
    CHECK_EQ(w.gpa, 0x600000 + (LA & 0x1fffff));
    CHECK_EQ(w.page_bytes, 0x200000);
    CHECK_EQ(get64(PD) & 0x60, 0x60);
    CHECK_EQ(get64(PDPT + 8) & 0x20, 0x20);
    CHECK_EQ(get64(PML4) & 0x60, 0x20);                                 /* no dirty bit above the leaf */
    put64(PDPT + 8, UINT64_C(0x80000000) | PS | P | RW | US | 0x100);
    cpu->cr4 |= X86_CR4_PGE;
    CHECK(x86_walk_page(cpu, LA, X86_READ, X86_CTX_USER, true, &w));
    CHECK_EQ(w.gpa, UINT64_C(0x80000000) + (LA & 0x3fffffff));
    CHECK_EQ(w.page_bytes, 1u << 30);
    CHECK(w.global);

    start(&formats[0]);
    cpu->cr4 |= X86_CR4_PSE;
    map(&formats[0], 0, 0);
    put32(PD + 0x400, 0x00800000 | 5u << 13 | PS | P | RW | US);        /* PSE-36: address bits 39..32 = 5 */
    CHECK(x86_walk_page(cpu, LA, X86_READ, X86_CTX_USER, true, &w));
    CHECK_EQ(w.gpa, UINT64_C(0x500800000) + (LA & 0x3fffff));
    put32(PD + 0x400, 0x00800000 | 1u << 21 | PS | P | RW | US);
    CHECK(!x86_walk_page(cpu, LA, X86_READ, X86_CTX_USER, true, &w));
    CHECK_EQ(w.fault.error, 1 | 4 | 8);
    cpu->cr4 &= ~(uint64_t)X86_CR4_PSE; /* PS means nothing: 0x00a00000 is a page table */
    put32(0x00a00000 + 12, PAGE | P | RW | US);
    CHECK(x86_walk_page(cpu, LA, X86_READ, X86_CTX_USER, true, &w));
    CHECK_EQ(w.gpa, PAGE + 0xabc);
}

TEST(look_without_touching)
{
    x86_walk w = { 0 };
    start(&formats[2]);
    map(&formats[2], P | RW | US, PAGE | P | RW | US);
    CHECK(x86_walk_page(cpu, LA, X86_WRITE, X86_CTX_USER, false, &w));
    CHECK_EQ(get64(PT + 24) & 0x60, 0);
    CHECK_EQ(get64(PML4) & 0x20, 0);
    CHECK_EQ(w.refs, 4);
}

TEST(tables_outside_ram)
{
    x86_walk w = { 0 };
    start(&formats[2]);
    map(&formats[2], P | RW | US, PAGE | P | RW | US);
    put64(PD, UINT64_C(0x100000000) | P | RW | US);
    CHECK(!x86_walk_page(cpu, LA, X86_READ, X86_CTX_KERNEL, true, &w));
    CHECK_EQ(w.fault.error, 1 | 8);
}

TEST(flat_and_unpaged)
{
    x86_walk w = { 0 };
    bare_new(3);
    CHECK(x86_walk_page(cpu, 0x123456789, X86_WRITE, X86_CTX_KERNEL, true, &w));
    CHECK_EQ(w.gpa, 0x123456789);
    CHECK_EQ(w.prot, 7);
    CHECK(!x86_walk_page(cpu, UINT64_C(0xffff800000000000), X86_READ, X86_CTX_KERNEL, true, &w));
    bare_new(2);
    CHECK(x86_walk_page(cpu, 0xfffff000, X86_EXEC, X86_CTX_USER, true, &w));
    CHECK_EQ(w.gpa, 0xfffff000);
}

/* ---- the whole way through instructions: fault, CR2, context switches of SMAP ---- */

static void paged_long(void)
{
    start(&formats[2]);
    map(&formats[2], P | RW | US, PAGE | P | RW | US);
    for (unsigned i = 0; i < 8; i++)                                    /* 0..16 MiB identity, supervisor */
        put64(0x24000 + 8 * i, 0x200000 * i | PS | P | RW);
    put64(PDPT, 0x24000 | P | RW);
    cpu->rip = 0x100000;
    x86_tlb_clear(cpu);
}

TEST(smap_and_stac)
{
    paged_long();
    cpu->cr4 |= X86_CR4_SMAP;
    x86_mode_changed(cpu);
    cpu->gpr[X86_RBX] = LA;
    put8(PAGE + 0xabc, 0x42);
    outcome o = INSN(0x8a, 0x03);
    CHECK_EQ(o.vector, X86_PF);
    CHECK_EQ(o.error, 1);
    CHECK_EQ(o.address, LA);
    RUNS(0x0f, 0x01, 0xcb);                                             /* stac */
    RUNS(0x8a, 0x03);
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xff, 0x42);
    RUNS(0x0f, 0x01, 0xca);                                             /* clac */
    RAISES(X86_PF, 1, 0x8a, 0x03);
}

TEST(tlb_follows_the_tables)
{
    paged_long();
    cpu->gpr[X86_RBX] = LA;
    put8(PAGE + 0xabc, 1);
    put8(0x6abc, 2);
    RUNS(0x8a, 0x03);
    put64(PT + 24, 0x6000 | P | RW | US);
    RUNS(0x0f, 0x01, 0x3b);                                             /* invlpg [rbx] */
    RUNS(0x8a, 0x03);
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xff, 2);
    put64(PT + 24, PAGE | P | RW | US);
    RUNS(0x0f, 0x20, 0xd8);
    RUNS(0x0f, 0x22, 0xd8);                                             /* mov cr3 */
    cpu->gpr[X86_RBX] = LA;
    RUNS(0x8a, 0x03);
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xff, 1);
    CHECK_EQ(get64(PT + 24) & 0x40, 0);
    RUNS(0x88, 0x03);                                                   /* first write after reads: dirty bit appears */
    CHECK_EQ(get64(PT + 24) & 0x60, 0x60);
}

TEST(invpcid)
{
    paged_long();
    put64(0x7000, 0), put64(0x7008, LA);
    cpu->gpr[X86_RBX] = 0x7000;
    for (unsigned type = 0; type < 4; type++) {
        cpu->gpr[X86_RAX] = type;
        RUNS(0x66, 0x0f, 0x38, 0x82, 0x03);
        CHECK_EQ(invpcid_type, type);
        CHECK_EQ(invpcid_la, LA & ~UINT64_C(0xfff));
    }
    cpu->gpr[X86_RAX] = 4;
    RAISES(X86_GP, 0, 0x66, 0x0f, 0x38, 0x82, 0x03);
    cpu->gpr[X86_RAX] = 0;
    put64(0x7000, 1);                                                   /* PCID without CR4.PCIDE */
    RAISES(X86_GP, 0, 0x66, 0x0f, 0x38, 0x82, 0x03);
    cpu->cr4 |= X86_CR4_PCIDE;
    RUNS(0x66, 0x0f, 0x38, 0x82, 0x03);
    CHECK_EQ(invpcid_pcid, 1);
    put64(0x7000, 0x1000);
    RAISES(X86_GP, 0, 0x66, 0x0f, 0x38, 0x82, 0x03);
    put64(0x7000, 0), put64(0x7008, UINT64_C(0x800000000000));
    RAISES(X86_GP, 0, 0x66, 0x0f, 0x38, 0x82, 0x03);
    cpu->gpr[X86_RAX] = 2;
    RUNS(0x66, 0x0f, 0x38, 0x82, 0x03);
}

/* #PF while delivering #PF becomes #DF; #PF while delivering #GP does not. */
TEST(page_faults_in_delivery)
{
    paged_long();
    cpu->idtr = (x86_dtr){ IDT, 256 * 16 - 1 };
    cpu->gdtr = (x86_dtr){ GDT, GDT_END - 1 };
    set_gdt(CODE0, 0, 0, 0x9b, 0x2);
    set_gate64(X86_DF, CODE0, 0x3000, 0x8e, 1);
    set_gate64(X86_PF, CODE0, 0x4000, 0x8e, 0);
    cpu->seg[X86_TR] = (x86_seg){ .base = 0x6000, .limit = 0x67, .sel = TSS_SEL, .attr = 0x8b };
    put64(0x6000 + 36, 0xa000);
    cpu->gpr[X86_RSP] = UINT64_C(0x7fff00000000);                       /* unmapped stack */
    cpu->gpr[X86_RBX] = UINT64_C(0x600000000000);
    RAISES(X86_PF, 0, 0x8a, 0x03);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x3000);
    CHECK_EQ(get64(cpu->gpr[X86_RSP]), 0);
    CHECK_EQ(cpu->cr2, UINT64_C(0x7fff00000000) - 48);                  /* the second fault's address */

    set_gate64(X86_GP, CODE0, 0x5000, 0x8e, 0);
    set_gate64(X86_PF, CODE0, 0x4000, 0x8e, 1);
    cpu->gpr[X86_RSP] = UINT64_C(0x7fff00000000);
    cpu->rip = 0x100000;
    cpu->gpr[X86_RBX] = UINT64_C(0x800000000000);
    RAISES(X86_GP, 0, 0x8a, 0x03);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x4000);
    CHECK_EQ(get64(cpu->gpr[X86_RSP]), 2);                              /* a supervisor write, not present */
}
