/* mmu.c - MMU strategies: the built-in ones and one of this test's own give the same results; misuse is refused. */
#include "../backends.h"

#define TABLES 0x10000u
#define PAGES 0x20000u

/* ---- a strategy that walks as "tlb" does and counts ---- */

typedef struct counts { unsigned created, destroyed, translated, roots, invalidated; } counts;
static counts seen;

static int own_create(vm_machine *m, void **state)
{
    (void)m;
    seen.created++;
    *state = &seen;
    return VM_OK;
}

static void own_destroy(void *state)
{
    CHECK(state == &seen);
    seen.destroyed++;
}

static int own_translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    CHECK(state == &seen);
    seen.translated++;
    return vm_mmu_walk(cpu, gva, access, out);
}

static void own_root(void *state, vm_vcpu *cpu, uint64_t cr3)
{
    (void)state, (void)cpu, (void)cr3;
    seen.roots++;
}

static void own_invalidate(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes)
{
    (void)state, (void)cpu, (void)gva, (void)bytes;
    seen.invalidated++;
}

static const vm_mmu_ops own = { .size = sizeof own, .name = "own", .create = own_create, .destroy = own_destroy,
                                .translate = own_translate, .root_changed = own_root, .invalidate = own_invalidate };

static int refuse(vm_machine *m, void **state)
{
    (void)m, (void)state;
    return VM_E_NOMEM;
}

static const vm_mmu_ops refusing = { .size = sizeof refusing, .name = "refusing", .create = refuse,
                                     .translate = own_translate };

/* ---- a guest that pages: identity map, but for one page that it remaps ---- */

/* At 0, under 4 KiB pages: reads 0x20000 through 0x30000, turns that page to 0x21000, INVLPG, reads again, writes, reloads
 * CR3, reads what it wrote. */
__asm__(".pushsection .rodata\n.code32\nguest:\n"
        "mov 0x30000, %eax\n"
        "movl $0x21003, 0x110c0\n"         /* entry 0x30 of the table at 0x11000 */
        "invlpg 0x30000\n"
        "mov 0x30000, %ebx\n"
        "movl $0x77, 0x30004\n"
        "mov %cr3, %ecx\nmov %ecx, %cr3\n"
        "mov 0x30004, %edx\n"
        "hlt\nguest_end:\n.code64\n.popsection");
extern const char guest[], guest_end[];

static vm_machine *paging_machine(vm_backend backend, const char *mmu)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_sregs s = VM_SREGS_INIT;
    uint32_t directory = 0x11003, table[1024];
    o.backend = backend;
    o.mmu = mmu;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x100000, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, guest, (size_t)(guest_end - guest)));
    for (unsigned i = 0; i < 1024; i++)
        table[i] = i < 0x100 ? i << 12 | 3 : 0;
    table[0x30] = 0x20003;
    OK(vm_write(m, TABLES, &directory, 4));
    OK(vm_write(m, 0x11000, table, sizeof table));
    OK(vm_write(m, PAGES, "\x11\0\0\0", 4));
    OK(vm_write(m, PAGES + 0x1000, "\x22\0\0\0", 4));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT32));
    OK(vm_vcpu_get_sregs(cpu, &s));
    s.cr3 = TABLES;
    s.cr0 |= UINT32_C(1) << 31;
    OK(vm_vcpu_set_sregs(cpu, &s));
    return m;
}

static void run_guest(vm_machine *m)
{
    vm_exit e = VM_EXIT_INIT;
    vm_regs r = VM_REGS_INIT;
    uint32_t entry = 0, data = 0;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    OK(vm_vcpu_get_regs(vm_vcpu_get(m, 0), &r));
    CHECK_EQ(r.rax, 0x11);
    CHECK_EQ(r.rbx, 0x22);
    CHECK_EQ(r.rdx, 0x77);
    OK(vm_read(m, PAGES + 0x1004, &data, 4));
    CHECK_EQ(data, 0x77);
    OK(vm_read(m, 0x110c0, &entry, 4));
    CHECK_EQ(entry, 0x21063);          /* accessed and dirty */
}

static void strategy(vm_backend backend, const char *name)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    vm_machine *m = paging_machine(backend, name);
    CHECK(!strcmp(vm_mmu_current(m), name ? name : "tlb"));
    run_guest(m);
    vm_destroy(m);
}

EACH_BACKEND(default_strategy) { strategy(backend, NULL); }
EACH_BACKEND(tlb_strategy) { strategy(backend, "tlb"); }
EACH_BACKEND(flat_strategy) { strategy(backend, "flat"); }
EACH_BACKEND(shadow_strategy) { strategy(backend, "shadow"); }

EACH_BACKEND(own_strategy)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    OK(vm_mmu_register(&own));
    strategy(backend, "own");
    CHECK_EQ(seen.created, 1);
    CHECK_EQ(seen.destroyed, 1);
    CHECK(seen.translated >= 4);       /* code, table, 0x30000 twice */
    CHECK(seen.roots >= 1);
    CHECK(seen.invalidated >= 1);
}

/* ---- FLAT64: what lies beyond the guest-physical space ---- */

/* At 0x1000 a read of [RSI], a write, or a jump there: the same page fault under every strategy. */
EACH_BACKEND(beyond_physical)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    static const char *const names[] = { "tlb", "flat", "shadow", "ept" };
    static const struct { const char *code; uint32_t error; } rows[] = { { "\x48\x8b\x06", 0 }, { "\x48\x89\x06", 2 }, { "\xff\xe6", 0 } };
    uint64_t bits = 0, data = 0;
    OK(vm_query(backend, "phys-bits", &bits));
    const uint64_t addresses[] = { UINT64_C(1) << bits, (UINT64_C(1) << 47) - 8, UINT64_C(0xffff800000002000), UINT64_MAX - 7 };
    for (unsigned i = 0; i < 4 * 4 * 3; i++) {
        vm_options o = VM_OPTIONS_INIT;
        vm_run_options ro = VM_RUN_OPTIONS_INIT;
        vm_exit e = VM_EXIT_INIT;
        vm_regs r = VM_REGS_INIT;
        vm_machine *m = NULL;
        const uint64_t address = addresses[i / 3 % 4];
        o.backend = backend;
        o.mmu = names[i / 12];
        OK(vm_create(&o, &m));
        OK(vm_map_ram(m, 0, 0x4000, VM_PROT_RWX, NULL));                   /* where cut addresses would lead */
        OK(vm_map_ram(m, (UINT64_C(1) << bits) - 0x1000, 0x1000, VM_PROT_RWX, NULL));
        OK(vm_write(m, 0x1000, rows[i % 3].code, strlen(rows[i % 3].code)));
        OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
        r.rip = 0x1000;
        r.rsi = address;
        r.rflags = 2;
        r.rax = UINT64_MAX;
        OK(vm_vcpu_set_regs(vm_vcpu_get(m, 0), &r));
        ro.exception_exits = 1u << 14;
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), &ro, &e));
        CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
        CHECK_EQ(e.exception.vector, 14);
        CHECK_EQ(e.exception.error & ~16u, rows[i % 3].error);
        CHECK_EQ(e.exception.address, address);
        OK(vm_read(m, address & 0x3fff, &data, 8));
        CHECK_EQ(data, 0);
        vm_destroy(m);
    }
}

/* ---- a strategy that says what cannot be ---- */

/* Its answers: addresses with bits that no processor has, sizes that are no page's, rights that are none, and writes to be told of without
 * a function that is told; and before each it walks for the next page and for a write, which must not show. */
static int odd_translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    static const uint64_t sizes[] = { 0, 1, 4095, 4097, 12288, UINT64_MAX };
    struct vm_mmu_result apart = { .size = sizeof apart };
    (void)state;
    int status = vm_mmu_walk(cpu, gva + 0x1000, access, &apart);
    if (status == VM_OK) {
        CHECK_EQ(apart.gpa & 0xfff, gva & 0xfff);
        CHECK_EQ(apart.page_bytes, 4096);
        CHECK_EQ(apart.entry_count, 2);
        CHECK_EQ(apart.entry[0], TABLES + (gva + 0x1000 < 0x400000 ? 0 : 4));
        CHECK_EQ(apart.entry[1], 0x11000 + 4 * ((gva + 0x1000) >> 12 & 1023));
    } else {
        CHECK_EQ(status, VM_E_FAULT);
        CHECK_EQ(apart.fault_vector, 14);
        CHECK_EQ(apart.fault_error & 1, 0);            /* not present */
    }
    status = vm_mmu_walk(cpu, gva, access, out);
    if (status != VM_OK)
        return status;
    out->gpa |= UINT64_C(0xfff) << 52;
    out->prot = (vm_prot)((unsigned)out->prot | 0xf0);
    out->page_bytes = sizes[seen.translated++ % 6];
    out->trap_writes = true;
    return VM_OK;
}

static const vm_mmu_ops odd = { .size = sizeof odd, .name = "odd", .create = own_create, .translate = odd_translate };

EACH_BACKEND(odd_strategy)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    OK(vm_mmu_register(&odd));
    strategy(backend, "odd");
    CHECK(seen.translated >= 4);
}

EACH_BACKEND(selected_between_runs)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    static const char *const names[] = { "flat", "own", "shadow", "tlb", "own", "shadow", NULL };
    uint64_t rip = 0;
    OK(vm_mmu_register(&own));
    vm_machine *m = paging_machine(backend, NULL);
    for (unsigned i = 0; i < 7; i++) {
        uint32_t entry = 0x20003, zero = 0;
        OK(vm_mmu_select(m, names[i]));
        OK(vm_write(m, 0x110c0, &entry, 4));
        OK(vm_write(m, PAGES + 0x1004, &zero, 4));
        OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
        run_guest(m);
    }
    vm_destroy(m);
    CHECK_EQ(seen.created, 2);
    CHECK_EQ(seen.destroyed, 2);
}

/* ---- PCIDs (SDM vol. 3, 4.10): who loses translations, and who keeps them ---- */

enum { ROOT1 = 0x10000, ROOT2 = 0x14000, LEAF = 0x3000, DATA_PAGE = 0x180000, SNIPPET = 0x1000, ARGUMENT = 0x2000 };
#define PAGE_LA UINT64_C(0x200000)
#define KEEP (UINT64_C(1) << 63)
enum { ONE = ROOT1 | 1, TWO = ROOT2 | 2 };       /* what CR3 is loaded with */
typedef enum pcid_op { NOTHING, LOAD_CR3, LOAD_CR4, INVLPG, INVPCID, FLUSH } pcid_op;

/* la 0x200000 is page 'A' under root 1 and 'C' under root 2; the first 2 MiB are themselves. */
static vm_machine *pcid_machine(vm_backend backend, const char *mmu)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_sregs s = VM_SREGS_INIT;
    o.backend = backend;
    o.mmu = mmu;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x400000, VM_PROT_RWX, NULL));
    for (unsigned i = 0; i < 2; i++) {
        uint64_t root = i ? ROOT2 : ROOT1, up = (root + 0x1000) | 3, pd = (root + 0x2000) | 3, large = 0x83, leaf = (root + LEAF) | 3;
        uint64_t page = (DATA_PAGE + (i ? 0x2000 : 0)) | 3;
        OK(vm_write(m, root, &up, 8));
        OK(vm_write(m, root + 0x1000, &pd, 8));
        OK(vm_write(m, root + 0x2000, &large, 8));
        OK(vm_write(m, root + 0x2008, &leaf, 8));
        OK(vm_write(m, root + LEAF, &page, 8));
    }
    for (unsigned i = 0; i < 3; i++)
        OK(vm_write(m, DATA_PAGE + i * 0x1000, &"ABC"[i], 1));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_sregs(cpu, &s));
    s.cr3 = ROOT1;
    s.cr4 |= 0x20080;                  /* PCIDE, PGE */
    OK(vm_vcpu_set_sregs(cpu, &s));
    return m;
}

/* Execute one instruction with RAX and RDI; RAX afterwards. */
static uint64_t execute(vm_machine *m, const char *bytes, unsigned count, uint64_t rax, uint64_t rdi)
{
    vm_exit e = VM_EXIT_INIT;
    vm_regs r = VM_REGS_INIT;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_write(m, SNIPPET, bytes, count));
    OK(vm_write(m, SNIPPET + count, "\xf4", 1));
    OK(vm_invalidate(m, SNIPPET, 16));
    OK(vm_vcpu_get_regs(cpu, &r));
    r.rip = SNIPPET, r.rax = rax, r.rdi = rdi;
    OK(vm_vcpu_set_regs(cpu, &r));
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    OK(vm_vcpu_get_regs(cpu, &r));
    return r.rax;
}

static char look(vm_machine *m) { return (char)execute(m, "\x0f\xb6\x07", 3, 0, PAGE_LA); }

static void perform(vm_machine *m, pcid_op op, uint64_t a, uint64_t b)
{
    uint64_t descriptor[2] = { b, PAGE_LA };
    switch (op) {
    case NOTHING: break;
    case LOAD_CR3: (void)execute(m, "\x0f\x22\xd8", 3, a, 0); break;
    case LOAD_CR4: (void)execute(m, "\x0f\x22\xe0", 3, a, 0); break;
    case INVLPG: (void)execute(m, "\x0f\x01\x3f", 3, 0, PAGE_LA); break;
    case FLUSH: OK(vm_mmu_flush(vm_vcpu_get(m, 0), PAGE_LA, 4096)); break;
    case INVPCID:
        OK(vm_write(m, ARGUMENT, descriptor, sizeof descriptor));
        (void)execute(m, "\x66\x0f\x38\x82\x07", 5, a, ARGUMENT);
        break;
    }
}

/* PCID 1 has seen A; while the guest is in PCID 2 the entry changes to B and this happens; then PCID 1 is entered with bit 63 of CR3
 * set. Sees: A if it has kept its translation. */
static const struct { pcid_op op[2]; uint64_t a[2], b[2]; char sees; } pcid_cases[] = {
    { { NOTHING }, { 0 }, { 0 }, 'A' },
    { { INVLPG }, { 0 }, { 0 }, 'A' },
    { { INVPCID }, { 0 }, { 1 }, 'B' },                  /* one address */
    { { INVPCID }, { 0 }, { 2 }, 'A' },
    { { INVPCID }, { 1 }, { 1 }, 'B' },                  /* one PCID */
    { { INVPCID }, { 1 }, { 2 }, 'A' },
    { { INVPCID }, { 2 }, { 0 }, 'B' },                  /* everything */
    { { INVPCID }, { 3 }, { 0 }, 'B' },                  /* all PCIDs, not what is global */
    { { LOAD_CR3, LOAD_CR3 }, { ONE, TWO | KEEP }, { 0 }, 'B' },
    { { LOAD_CR3, LOAD_CR3 }, { ROOT2 | 3, TWO | KEEP }, { 0 }, 'A' },
    { { LOAD_CR4, LOAD_CR4 }, { 0x20020, 0x200a0 }, { 0 }, 'B' },          /* PGE changes */
    { { FLUSH }, { 0 }, { 0 }, 'B' },
};

static void pcid_case(vm_backend backend, const char *mmu, unsigned i)
{
    vm_machine *m = pcid_machine(backend, mmu);
    uint64_t other = (DATA_PAGE + 0x1000) | 3;
    perform(m, LOAD_CR3, ONE, 0);
    CHECK_EQ(look(m), 'A');
    perform(m, LOAD_CR3, TWO, 0);
    CHECK_EQ(look(m), 'C');
    OK(vm_write(m, ROOT1 + LEAF, &other, 8));
    for (unsigned k = 0; k < 2; k++)
        perform(m, pcid_cases[i].op[k], pcid_cases[i].a[k], pcid_cases[i].b[k]);
    perform(m, LOAD_CR3, ONE | KEEP, 0);
    char seen_now = look(m);
#if defined VM_TINY_TLB || defined VM_TINY_CACHE
    bool may_be_new = true;                              /* nothing has to be kept */
#else
    bool may_be_new = !strcmp(mmu, "shadow");            /* compares at each load of CR3 */
#endif
    if (seen_now != pcid_cases[i].sees && !(may_be_new && seen_now == 'B'))
        FAIL("case %u under %s: sees %c", i, mmu, seen_now);
    perform(m, LOAD_CR3, ONE, 0);
    CHECK_EQ(look(m), 'B');
    vm_destroy(m);
}

EACH_BACKEND(pcids)
{
    static const char *const names[] = { "tlb", "flat", "ept", "own", "shadow" };
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    OK(vm_mmu_register(&own));
    for (unsigned n = 0; n < sizeof names / sizeof *names; n++)
        for (unsigned i = 0; i < sizeof pcid_cases / sizeof *pcid_cases; i++)
            pcid_case(backend, names[n], i);
}

/* ---- a callback asks for the run loop, and what comes next in the same block misses the TLB ---- */

enum { CALLER = 0x1000, STACK_PAGE = 0x10000000, COUNTER = 0x400000, ELSEWHERE = 0x800000, ROUNDS = 100 };      /* 4 MiB apart: one place in the TLB */

static int kicking_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)offset, (void)width, (void)value;
    vm_vcpu_kick(cpu);
    return 0;
}

static vm_machine *kicking_machine(vm_backend backend, const char *mmu)
{
    /* next: mov eax, [rsi]; push rax; inc dword [rdi]; dec ecx; jnz next; hlt */
    static const char code[] = "\x8b\x06\x50\xff\x07\xff\xc9\x75\xf7\xf4";
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_machine *m = NULL;
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    uint64_t pdpt = (ROOT1 + 0x1000) | 3, pd = (ROOT1 + 0x2000) | 3, device = STACK_PAGE | 0x83;
    o.backend = backend;
    o.mmu = mmu;
    ops.write = kicking_write;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x1000000, VM_PROT_RWX, NULL));
    OK(vm_map_mmio(m, STACK_PAGE, 0x1000, &ops, NULL, NULL));
    OK(vm_write(m, ROOT1, &pdpt, 8));
    OK(vm_write(m, ROOT1 + 0x1000, &pd, 8));
    for (uint64_t i = 0; i < 8; i++)
        OK(vm_write(m, ROOT1 + 0x2000 + i * 8, &(uint64_t){ i << 21 | 0x83 }, 8));
    OK(vm_write(m, ROOT1 + 0x2000 + (STACK_PAGE >> 21) * 8, &device, 8));
    OK(vm_write(m, CALLER, code, sizeof code - 1));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    OK(vm_vcpu_get_sregs(vm_vcpu_get(m, 0), &s));
    s.cr3 = ROOT1;
    OK(vm_vcpu_set_sregs(vm_vcpu_get(m, 0), &s));
    OK(vm_vcpu_get_regs(vm_vcpu_get(m, 0), &r));
    r.rip = CALLER, r.rsp = STACK_PAGE + 0x1000, r.rsi = ELSEWHERE, r.rdi = COUNTER, r.rcx = ROUNDS;
    OK(vm_vcpu_set_regs(vm_vcpu_get(m, 0), &r));
    return m;
}

EACH_BACKEND(kicks_before_a_miss)
{
    static const char *const names[] = { "tlb", "flat", "ept", "own", "shadow" };
    OK(vm_mmu_register(&own));
    for (unsigned n = 0; n < (backend == VM_BACKEND_KVM ? 1 : sizeof names / sizeof *names); n++) {
        vm_machine *m = kicking_machine(backend, backend == VM_BACKEND_KVM ? NULL : names[n]);
        vm_exit e = VM_EXIT_INIT;
        uint32_t counted = 0;
        do
            OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
        while (e.reason == VM_EXIT_KICK);
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        OK(vm_read(m, COUNTER, &counted, 4));
        CHECK_EQ(counted, ROUNDS);
        vm_destroy(m);
    }
}

TEST(strategies_by_number)
{
    CHECK(!strcmp(vm_mmu_name(0), "tlb"));
    CHECK(!strcmp(vm_mmu_name(1), "flat"));
    unsigned count = 2;
    while (vm_mmu_name(count))
        count++;
    OK(vm_mmu_register(&own));
    CHECK(!strcmp(vm_mmu_name(count), "own"));
    CHECK(vm_mmu_name(count + 1) == NULL);
    CHECK(vm_mmu_name(UINT32_MAX) == NULL);
}

TEST(misuse)
{
    vm_mmu_ops bad = own;
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    struct vm_mmu_result result = { .size = sizeof result };
    REFUSED(vm_mmu_register(NULL), VM_E_INVALID);
    bad.size = 4;
    REFUSED(vm_mmu_register(&bad), VM_E_INVALID);
    bad = own;
    bad.name = NULL;
    REFUSED(vm_mmu_register(&bad), VM_E_INVALID);
    bad.name = "";
    REFUSED(vm_mmu_register(&bad), VM_E_INVALID);
    bad = own;
    bad.translate = NULL;
    REFUSED(vm_mmu_register(&bad), VM_E_INVALID);
    bad = own;
    bad.name = "flat";
    REFUSED(vm_mmu_register(&bad), VM_E_EXISTS);
    OK(vm_mmu_register(&own));
    REFUSED(vm_mmu_register(&own), VM_E_EXISTS);
    o.backend = VM_BACKEND_INTERP;
    o.mmu = "no such";
    REFUSED(vm_create(&o, &m), VM_E_UNSUPPORTED);
    OK(vm_mmu_register(&refusing));
    o.mmu = "refusing";
    REFUSED(vm_create(&o, &m), VM_E_NOMEM);
    o.mmu = NULL;
    OK(vm_create(&o, &m));
    REFUSED(vm_mmu_select(m, "no such"), VM_E_NOTFOUND);
    REFUSED(vm_mmu_select(m, "refusing"), VM_E_NOMEM);
    CHECK(!strcmp(vm_mmu_current(m), "tlb"));            /* as it was */
    REFUSED(vm_mmu_select(NULL, "tlb"), VM_E_INVALID);
    CHECK(vm_mmu_current(NULL) == NULL);
    REFUSED(vm_mmu_walk(NULL, 0, VM_PROT_R, &result), VM_E_INVALID);
    REFUSED(vm_mmu_walk(vm_vcpu_get(m, 0), 0, VM_PROT_R, NULL), VM_E_INVALID);
    REFUSED(vm_mmu_walk(vm_vcpu_get(m, 0), 0, VM_PROT_RW, &result), VM_E_INVALID);
    vm_destroy(m);
}
