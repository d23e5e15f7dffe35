/* coverage.c - <libvm/coverage.h>: counts and traces of known programs, comparisons with known operands, the benchmark's kernels
 * on both software backends. (Random programs: tests/diff/programs.c.) */
#include "../backends.h"

#include <elf.h>

static uint64_t get(vm_vcpu *cpu, int reg)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(cpu, reg, &v, vm_reg_size(reg)));
    return v;
}
static void set(vm_vcpu *cpu, int reg, uint64_t v) { OK(vm_vcpu_write_reg(cpu, reg, &v, vm_reg_size(reg))); }

/* RAM at 0 with `code`, 64-bit. */
static vm_vcpu *machine(vm_backend backend, const void *code, size_t bytes)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, code, bytes));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    return vm_vcpu_get(m, 0);
}

static void run_to_halt(vm_vcpu *cpu)
{
    vm_exit e = VM_EXIT_INIT;
    set(cpu, VM_REG_RIP, 0);
    set(cpu, VM_REG_RSP, 0x8000);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
}

/* What the JIT does with a program shows only when it is warm. */
static void warm_up(vm_vcpu *cpu)
{
    for (int i = 0; i < 300; i++)
        run_to_halt(cpu);
}

static void need_software(vm_backend backend)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("not on KVM");
}

/* 0: mov ecx, 3   5: call 10   a: dec ecx   c: jnz 5   e: hlt   10: cmp ecx, 2   13: je 16   15: nop   16: ret */
static const char LOOP[] = "\xb9\x03\x00\x00\x00" "\xe8\x06\x00\x00\x00" "\xff\xc9" "\x75\xf7" "\xf4\x90"
                           "\x83\xf9\x02" "\x74\x01" "\x90" "\xc3";
static const struct { uint32_t from, to; unsigned times; } edges[] = {
    { 0x5, 0x10, 3 }, { 0x13, 0x16, 1 }, { 0x13, 0x15, 2 }, { 0x16, 0xa, 3 }, { 0xc, 0x5, 2 }, { 0xc, 0xe, 1 } };
static const uint64_t path[] = { 0x10, 0x15, 0xa, 0x5, 0x10, 0x16, 0xa, 0x5, 0x10, 0x15, 0xa, 0xe };
enum { PATH = sizeof path / sizeof *path };

static unsigned index_of(uint64_t from, uint64_t to, size_t bytes)
{
    return ((vm_coverage_id(from) >> 1) ^ vm_coverage_id(to)) & (unsigned)(bytes - 1);
}

static void check_map(const uint8_t *map, size_t bytes, unsigned runs)
{
    static unsigned want[1 << 20];
    memset(want, 0, bytes * sizeof *want);
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        want[index_of(edges[i].from, edges[i].to, bytes)] += edges[i].times * runs;
    for (size_t i = 0; i < bytes; i++)
        if (map[i] != (want[i] & 255))
            FAIL("counter %zu of %zu is %u, not %u", i, bytes, map[i], want[i]);
}

EACH_BACKEND(counts_edges)
{
    static uint8_t map[1 << 20];
    need_software(backend);
    vm_vcpu *cpu = machine(backend, LOOP, sizeof LOOP - 1);
    vm_machine *m = vm_vcpu_machine(cpu);
    warm_up(cpu);
    for (size_t bytes = 256; bytes <= sizeof map; bytes *= 16) {
        memset(map, 0, sizeof map);
        OK(vm_coverage(m, map, bytes));
        for (unsigned runs = 1; runs <= 300; runs++) {       /* counters wrap */
            run_to_halt(cpu);
            check_map(map, bytes, runs);
        }
    }
    OK(vm_coverage(m, NULL, 0));
    memset(map, 0, sizeof map);
    run_to_halt(cpu);
    for (size_t i = 0; i < sizeof map; i++)
        CHECK_EQ(map[i], 0);
    vm_destroy(m);
}

/* A map far from the library's memory and one that is near are reached by different code. */
EACH_BACKEND(counts_in_any_memory)
{
    static uint8_t far[4096];
    uint8_t *near = malloc(1 << 20);
    need_software(backend);
    vm_vcpu *cpu = machine(backend, LOOP, sizeof LOOP - 1);
    warm_up(cpu);
    memset(near, 0, 4096);
    OK(vm_coverage(vm_vcpu_machine(cpu), near, 4096));
    run_to_halt(cpu);
    check_map(near, 4096, 1);
    OK(vm_coverage(vm_vcpu_machine(cpu), far, 4096));
    run_to_halt(cpu);
    check_map(near, 4096, 1);
    check_map(far, 4096, 1);
    vm_destroy(vm_vcpu_machine(cpu));
    free(near);
}

EACH_BACKEND(budgets_make_no_edges)
{
    static uint8_t map[4096];
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    need_software(backend);
    vm_vcpu *cpu = machine(backend, LOOP, sizeof LOOP - 1);
    OK(vm_coverage(vm_vcpu_machine(cpu), map, sizeof map));
    set(cpu, VM_REG_RSP, 0x8000);
    o.max_instructions = 1;
    do
        OK(vm_vcpu_run(cpu, &o, &e));
    while (e.reason == VM_EXIT_BUDGET);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    check_map(map, sizeof map, 1);
    vm_destroy(vm_vcpu_machine(cpu));
}

EACH_BACKEND(counts_only_the_range)
{
    static uint8_t map[4096];
    need_software(backend);
    vm_vcpu *cpu = machine(backend, LOOP, sizeof LOOP - 1);
    vm_machine *m = vm_vcpu_machine(cpu);
    uint64_t ring[16], head = 0;
    warm_up(cpu);
    OK(vm_coverage(m, map, sizeof map));
    OK(vm_block_trace(cpu, ring, 16, &head));
    OK(vm_coverage_range(m, 0x10, 0x16));                    /* the JE alone */
    run_to_halt(cpu);
    CHECK_EQ(head, 3);
    CHECK_EQ(ring[0], 0x15);
    CHECK_EQ(ring[1], 0x16);
    for (size_t i = 0; i < sizeof map; i++)
        CHECK_EQ(map[i], i == index_of(0x13, 0x15, 4096) ? 2 : i == index_of(0x13, 0x16, 4096) ? 1 : 0);
    memset(map, 0, sizeof map);
    OK(vm_coverage_range(m, 0, 0));
    run_to_halt(cpu);
    check_map(map, sizeof map, 1);
    vm_destroy(m);
}

EACH_BACKEND(traces_blocks_in_order)
{
    need_software(backend);
    vm_vcpu *cpu = machine(backend, LOOP, sizeof LOOP - 1);
    warm_up(cpu);
    for (size_t entries = 1; entries <= 64; entries *= 2) {
        uint64_t ring[64], head = 0;
        memset(ring, 0xee, sizeof ring);
        OK(vm_block_trace(cpu, ring, entries, &head));
        run_to_halt(cpu);
        CHECK_EQ(head, PATH);
        for (uint64_t i = PATH > entries ? PATH - entries : 0; i < PATH; i++)
            CHECK_EQ(ring[i & (entries - 1)], path[i]);
        for (size_t i = PATH; i < 64; i++)
            CHECK_EQ(ring[i], UINT64_C(0xeeeeeeeeeeeeeeee));
        head = 40;                     /* the program may set it */
        run_to_halt(cpu);
        CHECK_EQ(head, 40 + PATH);
        CHECK_EQ(ring[(40 + PATH - 1) & (entries - 1)], 0xe);
    }
    OK(vm_block_trace(cpu, NULL, 0, NULL));
    vm_destroy(vm_vcpu_machine(cpu));
}

/* ---- comparisons ---- */

static const char COMPARES[] =
    "\x3c\x41"                                               /* 00 cmp al, 0x41 */
    "\x81\x3c\x25\x00\x40\x00\x00\x44\x33\x22\x91"           /* 02 cmp dword [0x4000], 0x91223344 */
    "\x48\x85\xd8"                                           /* 0d test rax, rbx */
    "\x48\x2b\x04\x25\x08\x40\x00\x00"                       /* 10 sub rax, [0x4008] */
    "\x66\x29\x14\x25\x10\x40\x00\x00"                       /* 18 sub [0x4010], dx */
    "\xbe\x00\x50\x00\x00"                                   /* 20 mov esi, 0x5000 */
    "\xbf\x00\x51\x00\x00"                                   /* 25 mov edi, 0x5100 */
    "\xb9\x08\x00\x00\x00"                                   /* 2a mov ecx, 8 */
    "\xf3\xa6"                                               /* 2f repe cmpsb */
    "\xae"                                                   /* 31 scasb */
    "\x66\x0f\x74\xc1"                                       /* 32 pcmpeqb xmm0, xmm1 */
    "\x66\x0f\x38\x17\x04\x25\x00\x52\x00\x00"               /* 36 ptest xmm0, [0x5200] */
    "\x48\x83\xf8\xff"                                       /* 40 cmp rax, -1 */
    "\xf4";

#define RAX UINT64_C(0x1122334455667788)
#define V0 UINT64_C(0x0102030405060708)
static const vm_compare compares[] = {
    { .address = 0x00, .kind = VM_COMPARE_CMP, .width = 1, .is_constant = true, .a = { 0x88 }, .b = { 0x41 } },
    { .address = 0x02, .kind = VM_COMPARE_CMP, .width = 4, .is_constant = true, .a = { 0x44332211 }, .b = { 0x91223344 } },
    { .address = 0x0d, .kind = VM_COMPARE_TEST, .width = 8, .a = { RAX }, .b = { 0xff00 } },
    { .address = 0x10, .kind = VM_COMPARE_SUB, .width = 8, .a = { RAX }, .b = { 0x88 } },
    { .address = 0x18, .kind = VM_COMPARE_SUB, .width = 2, .a = { 0x8000 }, .b = { 0xabcd } },
    { .address = 0x2f, .kind = VM_COMPARE_STRING, .width = 1, .a = { 'f' }, .b = { 'f' } },
    { .address = 0x2f, .kind = VM_COMPARE_STRING, .width = 1, .a = { 'u' }, .b = { 'u' } },
    { .address = 0x2f, .kind = VM_COMPARE_STRING, .width = 1, .a = { 'z' }, .b = { 'n' } },
    { .address = 0x31, .kind = VM_COMPARE_SCAN, .width = 1, .a = { 0 }, .b = { 'c' } },
    { .address = 0x32, .kind = VM_COMPARE_VECTOR, .width = 16, .a = { V0, 1 }, .b = { V0 ^ 2, 1 } },
    { .address = 0x36, .kind = VM_COMPARE_VECTOR, .width = 16, .a = { UINT64_C(0xffffffffffffff00), ~UINT64_C(0) }, .b = { 7, 8 } },
    { .address = 0x40, .kind = VM_COMPARE_CMP, .width = 8, .is_constant = true, .a = { RAX - 0x88 }, .b = { ~UINT64_C(0) } },
};
enum { COMPARED = sizeof compares / sizeof *compares };

static void prepare_compares(vm_vcpu *cpu)
{
    vm_machine *m = vm_vcpu_machine(cpu);
    vm_fpu f = VM_FPU_INIT;
    static const uint64_t numbers[] = { 0x44332211, 0x88, 0x8000 }, pair[] = { 7, 8 };
    OK(vm_write(m, 0x4000, numbers, sizeof numbers));
    OK(vm_write(m, 0x5000, "fuzz", 5));
    OK(vm_write(m, 0x5100, "func", 5));
    OK(vm_write(m, 0x5200, pair, sizeof pair));
    set(cpu, VM_REG_RAX, RAX), set(cpu, VM_REG_RBX, 0xff00), set(cpu, VM_REG_RDX, 0xabcd);
    OK(vm_vcpu_get_fpu(cpu, &f));
    memcpy(f.ymm[0], (uint64_t[]){ V0, 1 }, 16);
    memcpy(f.ymm[1], (uint64_t[]){ V0 ^ 2, 1 }, 16);
    OK(vm_vcpu_set_fpu(cpu, &f));
}

EACH_BACKEND(logs_operands)
{
    vm_compare log[32];
    uint64_t head = 0;
    need_software(backend);
    vm_vcpu *cpu = machine(backend, COMPARES, sizeof COMPARES - 1);
    warm_up(cpu);
    OK(vm_compare_log(cpu, log, 32, &head));
    for (int again = 0; again < 2; again++) {
        memset(log, 0xee, sizeof log);
        head = 0;
        prepare_compares(cpu);
        run_to_halt(cpu);
        CHECK_EQ(head, COMPARED);
        for (unsigned i = 0; i < COMPARED; i++)
            if (memcmp(&log[i], &compares[i], sizeof *log))
                FAIL("entry %u: address %#" PRIx64 " kind %u width %u constant %d a %#" PRIx64 " b %#" PRIx64, i, log[i].address,
                     log[i].kind, log[i].width, log[i].is_constant, log[i].a[0], log[i].b[0]);
    }
    uint64_t rax = get(cpu, VM_REG_RAX), flags = get(cpu, VM_REG_RFLAGS);
    OK(vm_compare_log(cpu, NULL, 0, NULL));
    prepare_compares(cpu);
    run_to_halt(cpu);
    CHECK_EQ(head, COMPARED);
    CHECK_EQ(get(cpu, VM_REG_RAX), rax);
    CHECK_EQ(get(cpu, VM_REG_RFLAGS), flags);
    vm_destroy(vm_vcpu_machine(cpu));
}

/* ---- misuse ---- */

EACH_BACKEND(refuses)
{
    static uint8_t map[4096];
    static vm_compare log[4];
    uint64_t ring[4], head = 0;
    vm_vcpu *cpu = machine(backend, "\xf4", 1);
    vm_machine *m = vm_vcpu_machine(cpu);
    int status = backend == VM_BACKEND_KVM ? VM_E_UNSUPPORTED : VM_E_INVALID;
    if (backend == VM_BACKEND_KVM) {
        REFUSED(vm_coverage(m, map, sizeof map), status);
        REFUSED(vm_coverage_range(m, 1, 2), status);
        REFUSED(vm_block_trace(cpu, ring, 4, &head), status);
        REFUSED(vm_compare_log(cpu, log, 4, &head), status);
        vm_destroy(m);
        return;
    }
    REFUSED(vm_coverage(NULL, map, sizeof map), status);
    REFUSED(vm_coverage(m, map, 128), status);
    REFUSED(vm_coverage(m, map, 3000), status);
    REFUSED(vm_coverage(m, map, (size_t)1 << 31), status);
    REFUSED(vm_coverage_range(m, 2, 2), status);
    REFUSED(vm_coverage_range(m, 3, 2), status);
    REFUSED(vm_coverage_range(NULL, 1, 2), status);
    REFUSED(vm_block_trace(NULL, ring, 4, &head), status);
    REFUSED(vm_block_trace(cpu, ring, 3, &head), status);
    REFUSED(vm_block_trace(cpu, ring, 4, NULL), status);
    REFUSED(vm_block_trace(cpu, ring, (size_t)1 << 28, &head), status);
    REFUSED(vm_compare_log(NULL, log, 4, &head), status);
    REFUSED(vm_compare_log(cpu, log, 5, &head), status);
    REFUSED(vm_compare_log(cpu, log, 4, NULL), status);
    uint64_t kvm = 0;
    OK(vm_coverage(m, map, sizeof map));
    if (!vm_query(VM_BACKEND_KVM, "available", &kvm) && kvm)
        REFUSED(vm_backend_select(m, VM_BACKEND_KVM), VM_E_UNSUPPORTED);
    vm_destroy(m);
}

static int change_records(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    static uint8_t map[256];
    uint64_t head = 0, ring[2];
    (void)offset, (void)width;
    REFUSED(vm_coverage(vm_vcpu_machine(cpu), map, 256), VM_E_BUSY);
    REFUSED(vm_coverage_range(vm_vcpu_machine(cpu), 1, 2), VM_E_BUSY);
    REFUSED(vm_block_trace(cpu, ring, 2, &head), VM_E_BUSY);
    *value = ++*(uint64_t *)user;
    return 0;
}

EACH_BACKEND(refuses_in_callbacks)
{
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t calls = 0;
    need_software(backend);
    vm_vcpu *cpu = machine(backend, "\x8b\x04\x25\x00\x00\x02\x00\xf4", 8);                   /* mov eax, [0x20000]; hlt */
    ops.read = change_records;
    OK(vm_map_mmio(vm_vcpu_machine(cpu), 0x20000, 4096, &ops, &calls, NULL));
    run_to_halt(cpu);
    CHECK_EQ(calls, 1);
    vm_destroy(vm_vcpu_machine(cpu));
}

/* ---- loops, watched from inside ---- */

/* 00 mov ecx, ROUNDS   05 jmp 8   07 nop   08 test cl, 127   0b jz 13   0d dec ecx   0f jnz 5   11 jmp 1c
 * 13 mov eax, [0x20000]   1a jmp d */
static const char ROUND[] = "\xb9\x00\x14\x00\x00" "\xeb\x01\x90" "\xf6\xc1\x7f" "\x74\x06" "\xff\xc9" "\x75\xf4" "\xeb\x09"
                            "\x8b\x04\x25\x00\x00\x02\x00" "\xeb\xf1";
enum { ROUNDS = 0x1400, EVERY = 128, ROUND_BYTES = sizeof ROUND - 1, COPIES = 100, ROUND_MAP = 1 << 20 };
typedef struct watcher { uint8_t *map; unsigned calls; } watcher;

/* The first call in a copy clears the map; one in seven throws the loop's translation away while it runs. */
static int check_rounds(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    watcher *w = user;
    uint64_t base = get(cpu, VM_REG_RIP) - 0x13, rounds = ROUNDS - get(cpu, VM_REG_RCX), calls = rounds / EVERY;
    const struct { unsigned from, to; uint64_t times; } want[] = {
        { 0x05, 0x08, rounds }, { 0x0b, 0x0d, rounds - calls }, { 0x0b, 0x13, calls }, { 0x0f, 0x05, rounds }, { 0x1a, 0x0d, calls } };
    (void)offset;
    memset(value, 0, width);
    if (!rounds) memset(w->map, 0, ROUND_MAP);
    for (unsigned i = 0; i < sizeof want / sizeof *want; i++) {
        unsigned at = index_of(base + want[i].from, base + want[i].to, ROUND_MAP);
        if (w->map[at] != (uint8_t)want[i].times)
            FAIL("copy %u, round %u: edge %x-%x counted %u, not %u", (unsigned)(base / ROUND_BYTES), (unsigned)rounds, want[i].from,
                 want[i].to, w->map[at], (uint8_t)want[i].times);
    }
    return ++w->calls % 7 ? 0 : vm_write(vm_vcpu_machine(cpu), base + 7, "\x90", 1);
}

EACH_BACKEND(counts_rounds_of_loops)
{
    static uint8_t map[ROUND_MAP];
    vm_io_ops ops = VM_IO_OPS_INIT;
    watcher w = { .map = map };
    need_software(backend);
    vm_vcpu *cpu = machine(backend, "\xf4", 1);
    vm_machine *m = vm_vcpu_machine(cpu);
    for (unsigned i = 0; i < COPIES; i++)
        OK(vm_write(m, i * ROUND_BYTES, ROUND, ROUND_BYTES));
    OK(vm_write(m, COPIES * ROUND_BYTES, "\xf4", 1));
    ops.read = check_rounds;
    OK(vm_map_mmio(m, 0x20000, 4096, &ops, &w, NULL));
    OK(vm_coverage(m, map, ROUND_MAP));
    for (int again = 0; again < 2; again++)
        run_to_halt(cpu);
    CHECK_EQ(w.calls, 2 * COPIES * ROUNDS / EVERY);
    uint64_t last = (COPIES - 1) * ROUND_BYTES;
    CHECK_EQ(map[index_of(last + 0x0f, last + 0x05, ROUND_MAP)], (ROUNDS - 1) & 255);
    CHECK_EQ(map[index_of(last + 0x0f, last + 0x11, ROUND_MAP)], 1);
    vm_destroy(m);
}

/* On to another backend: what is recorded stays. */
TEST(follows_the_machine_to_another_backend)
{
    static uint8_t map[4096];
    uint64_t jit = 0;
    if (vm_query(VM_BACKEND_JIT, "available", &jit) || !jit)
        test_skip("no JIT in this build");
    vm_vcpu *cpu = machine(VM_BACKEND_INTERP, LOOP, sizeof LOOP - 1);
    vm_machine *m = vm_vcpu_machine(cpu);
    OK(vm_coverage(m, map, sizeof map));
    run_to_halt(cpu);
    OK(vm_backend_select(m, VM_BACKEND_JIT));
    for (int i = 0; i < 300; i++)
        run_to_halt(cpu);
    OK(vm_backend_select(m, VM_BACKEND_INTERP));
    run_to_halt(cpu);
    check_map(map, sizeof map, 302);
    vm_destroy(m);
}

/* ---- the benchmark's kernels ---- */

enum { BASE = 0x10000000, SIZE = 32 << 20, STACK = BASE + SIZE - 4096, RETURN = BASE + SIZE - 2048, MAP = 1 << 14, RING = 1 << 12,
       KERNELS = 13 };
typedef struct record { uint8_t map[MAP]; uint64_t ring[RING], head, result, retired; } record;

static uint8_t *load_kernels(void)
{
    const char *build = getenv("top_builddir");
    char path[500];
    static uint8_t file[1 << 20];
    snprintf(path, sizeof path, "%s/bench/kernels.elf", build ? build : ".");
    FILE *f = fopen(path, "rb");
    if (!f)
        test_skip("no %s", path);
    size_t n = fread(file, 1, sizeof file, f);
    fclose(f);
    const Elf64_Ehdr *e = (const void *)file;
    CHECK(n > sizeof *e && n < sizeof file);
    uint8_t *image = calloc(1, SIZE);
    for (unsigned i = 0; i < e->e_phnum; i++) {
        const Elf64_Phdr *p = (const void *)(file + e->e_phoff + i * sizeof *p);
        if (p->p_type == PT_LOAD && p->p_filesz)
            memcpy(image + (p->p_vaddr - BASE), file + p->p_offset, p->p_filesz);
    }
    image[RETURN - BASE] = 0xf4;
    return image;
}

/* slice: budgets at random around this many instructions; 0: none. */
static void run_kernel(vm_backend backend, const uint8_t *image, unsigned k, bool traces, unsigned slice, record *r)
{
    static const unsigned sizes[KERNELS] = { 15, 1, 200, 6000, 1, 20, 3000, 5000, 1, 3000, 20000, 100, 10000 };
    vm_options o = VM_OPTIONS_INIT;
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_regs g = VM_REGS_INIT;
    vm_machine *m;
    vm_region *ram;
    uint64_t back = RETURN;
    uint32_t random = k * 77 + slice;
    o.backend = backend;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, BASE, SIZE, VM_PROT_RWX, &ram));
    memcpy(vm_region_data(ram), image, SIZE);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_regs(cpu, &g));
    OK(vm_write(m, STACK - 8, &back, 8));
    g.rip = BASE, g.rdi = k, g.rsi = sizes[k], g.rsp = STACK - 8;
    OK(vm_vcpu_set_regs(cpu, &g));
    memset(r, 0, sizeof *r);
    OK(vm_coverage(m, r->map, MAP));
    if (traces)
        OK(vm_block_trace(cpu, r->ring, RING, &r->head));
    do {
        random = random * 1103515245 + 12345;
        run.max_instructions = slice ? slice / 2 + (random >> 8) % slice : 0;
        OK(vm_vcpu_run(cpu, &run, &e));
    } while (e.reason == VM_EXIT_BUDGET);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    r->result = get(cpu, VM_REG_RAX);
    r->retired = vm_vcpu_retired(cpu);
    vm_destroy(m);
}

static void compare_records(unsigned k, const char *what, const record *a, const record *b)
{
    CHECK_EQ(b->retired, a->retired);
    CHECK_EQ(b->result, a->result);
    for (unsigned i = 0; i < MAP; i++)
        if (a->map[i] != b->map[i])
            FAIL("kernel %u, %s: counter %u is %u, not %u", k, what, i, b->map[i], a->map[i]);
    if (!b->head)
        return;
    CHECK_EQ(b->head, a->head);
    for (unsigned i = 0; i < RING; i++)
        if (a->ring[i] != b->ring[i])
            FAIL("kernel %u, %s: block %u is %#" PRIx64 ", not %#" PRIx64, k, what, i, b->ring[i], a->ring[i]);
}

static void compare_kernel(const void *arg)
{
    static record want, got;
    unsigned k = (unsigned)(uintptr_t)arg;
    uint64_t jit = 0;
    uint8_t *image = load_kernels();
    if (vm_query(VM_BACKEND_JIT, "available", &jit) || !jit)
        test_skip("no JIT in this build");
#ifdef VM_TINY_TLB
    if (k == 4)
        test_skip("matrices take minutes with two TLB entries");
#endif
    run_kernel(VM_BACKEND_INTERP, image, k, true, 0, &want);
    CHECK(want.head > 3);
    run_kernel(VM_BACKEND_JIT, image, k, false, 0, &got);
    compare_records(k, "map", &want, &got);
    run_kernel(VM_BACKEND_JIT, image, k, true, 0, &got);
    compare_records(k, "map and trace", &want, &got);
    run_kernel(VM_BACKEND_JIT, image, k, false, 6000, &got);
    compare_records(k, "map in slices", &want, &got);
    free(image);
}

SETUP(kernels)
{
    for (uintptr_t k = 0; k < KERNELS; k++) {
        char name[60];
        snprintf(name, sizeof name, "kernel_%u_is_the_same_on_both_backends", (unsigned)k);
        test_add(name, compare_kernel, (const void *)k, 0);
    }
}
