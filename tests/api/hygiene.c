/* hygiene.c - what the process looks like while machines live in it: no memory that is writable and executable, no growth
 * over many machines, and no more memory than docs/threat-model.md says, whatever the guest does. */
#include "../backends.h"
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

/* The first mapping that is writable and executable, or an empty string. */
static const char *writable_code(void)
{
    static char line[512];
    char prot[8];
    FILE *f = fopen("/proc/self/maps", "r");
    if (!f)
        test_skip("no /proc/self/maps");
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "%*s %7s", prot) == 1 && prot[1] == 'w' && prot[2] == 'x') {
            fclose(f);
            return line;
        }
    fclose(f);
    return "";
}

typedef struct looks { unsigned count; char bad[512]; } looks;

static void look(looks *l)
{
    const char *bad = writable_code();
    l->count++;
    if (*bad && !*l->bad)
        snprintf(l->bad, sizeof l->bad, "%s", bad);
}

static int on_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    look(user);
    return 0;
}

static int on_clone(void *user, vm_machine *copy, void **out)
{
    (void)copy;
    *out = user;
    return 0;
}

static vm_hook_result on_block(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    (void)cpu, (void)event;
    look(user);
    return VM_HOOK_CONTINUE;
}

/* again: inc byte [rip + code that is ahead]; out 0x80, al; dec ecx; jnz again; hlt: code that changes itself and makes exits */
static const uint8_t code[] = { 0xfe, 0x05, 0x00, 0x01, 0x00, 0x00, 0xe6, 0x80, 0xe8, 0xf3, 0x00, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xef, 0xf4 };

static vm_machine *make(vm_backend backend, const char *model, const vm_io_ops *ops, void *user)
{
    static const uint8_t called[] = { 0xb0, 0x00, 0xc3 };                /* mov al, n; ret */
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_regs regs = VM_REGS_INIT;
    options.backend = backend;
    options.cpu_model = model;
    OK(vm_create(&options, &m));
    OK(vm_map_ram(m, 0x1000, 0x4000, VM_PROT_RWX, NULL));
    OK(vm_map_pio(m, 0x80, 1, ops, user, NULL));
    OK(vm_write(m, 0x1000, code, sizeof code));
    OK(vm_write(m, 0x1100, called, sizeof called));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    OK(vm_vcpu_get_regs(vm_vcpu_get(m, 0), &regs));
    regs.rip = 0x1000;
    regs.rsp = 0x4000;
    regs.rcx = 200;
    OK(vm_vcpu_set_regs(vm_vcpu_get(m, 0), &regs));
    return m;
}

/* Runs the code from its start, `rounds` times through its loop; callbacks look. */
static void run_again(vm_machine *m, uint64_t rounds, looks *l)
{
    vm_exit e = VM_EXIT_INIT;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &(uint64_t){ 0x1000 }, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RCX, &rounds, 8));
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    look(l);
}

/* A life in which each call is followed by a look. */
EACH_BACKEND(no_memory_is_writable_and_executable)
{
    static const char *const strategies[] = { "shadow", "ept", "flat", "tlb" };
    static const vm_backend backends[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    looks l = { 0 };
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_hook_desc hook = VM_HOOK_INIT;
    vm_snapshot *s[2];
    vm_machine *copy;
    vm_hook *h;
    if (SANITIZED)
        test_skip("a sanitizer has mappings of its own");
    look(&l);
    ops.write = on_write;
    ops.clone = on_clone;
    vm_machine *m = make(backend, NULL, &ops, &l);
    look(&l);
    run_again(m, 200, &l);
    OK(vm_snapshot_take(m, &s[0]));
    run_again(m, 20, &l);
    FILE *f = tmpfile();
    CHECK(f != NULL);
    OK(vm_snapshot_save(s[0], fileno(f)));
    rewind(f);
    OK(vm_snapshot_load(m, fileno(f), &s[1]));
    fclose(f);
    OK(vm_snapshot_restore(m, s[1]));
    run_again(m, 20, &l);
    OK(vm_fork(m, &copy));
    run_again(copy, 20, &l);
    vm_destroy(copy);
    for (unsigned i = 0; i < sizeof strategies / sizeof *strategies; i++)
        if (vm_mmu_select(m, strategies[i]) == VM_OK)
            run_again(m, 20, &l);
    OK(vm_breakpoint(m, 0x1006, true));
    look(&l);
    OK(vm_breakpoint(m, 0x1006, false));
    hook.kind = VM_HOOK_BLOCK;
    hook.fn = on_block;
    hook.user = &l;
    hook.flags = VM_HOOK_SWITCH;                /* from KVM to one that can */
    OK(vm_hook_add(m, &hook, &h));
    run_again(m, 20, &l);
    OK(vm_hook_remove(m, h));
    for (unsigned i = 0; i < sizeof backends / sizeof *backends; i++)
        if (vm_backend_select(m, backends[i]) == VM_OK)
            run_again(m, 20, &l);
    OK(vm_reset(m));
    look(&l);
    vm_destroy(m);
    look(&l);
    CHECK(l.count > 400);
    if (*l.bad)
        FAIL("writable and executable: %s", l.bad);
}

static uint64_t resident(void)
{
    unsigned long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%*u %lu", &pages) != 1)
        test_skip("no /proc/self/statm");
    fclose(f);
    return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* The lowest descriptor that is free: it rises when some are left open. */
static int free_descriptor(void)
{
    int fd = dup(STDERR_FILENO);
    close(fd);
    return fd;
}

static int nothing(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)cpu, (void)offset, (void)width, (void)value;
    return 0;
}

/* LIBVM_CYCLES machines, one after the other (make check-cycles: 100,000). */
static void on_cycles(const void *arg)
{
    const char *asked = getenv("LIBVM_CYCLES");
    unsigned cycles = asked ? (unsigned)atoi(asked) : 1500;
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t before = 0;
    if (SANITIZED)
        test_skip("a sanitizer keeps memory that was freed");
    ops.write = nothing;
    const int descriptor = free_descriptor();
    for (unsigned i = 0; i < cycles; i++) {
        vm_machine *m = make(*(const vm_backend *)arg, NULL, &ops, NULL);
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, NULL));
        vm_destroy(m);
        if (i == cycles / 5)
            before = resident();
    }
    CHECK_EQ(free_descriptor(), descriptor);
    uint64_t after = resident();
    if (after > before + (256 << 10))
        FAIL("resident memory grew from %" PRIu64 " to %" PRIu64 " KiB over %u machines", before >> 10, after >> 10, cycles);
}

SETUP(cycles)
{
    add_for_backends("many_machines_leave_nothing", on_cycles, 3600);
}

/* A machine ends as what it has become, not as what it was made. */
EACH_BACKEND(moved_machines_leave_no_descriptor)
{
    static const vm_backend from[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    vm_io_ops ops = VM_IO_OPS_INIT;
    looks l = { 0 };
    ops.write = nothing;
    for (unsigned i = 0; i < sizeof from / sizeof *from; i++) {
        uint64_t is_there = 0;
        if (vm_query(from[i], "available", &is_there) || !is_there)
            continue;
        const int descriptor = free_descriptor();
        vm_machine *m = make(from[i], backend == VM_BACKEND_KVM ? "kvm" : NULL, &ops, &l);
        run_again(m, 2, &l);
        OK(vm_backend_select(m, backend));
        run_again(m, 2, &l);
        vm_destroy(m);
        CHECK_EQ(free_descriptor(), descriptor);
    }
}

/* ---- what a guest can make the host use ---- */

enum { RAM = 64 << 20, CACHE = 1 << 20, CODE = 1 << 20, CODE_BYTES = 16 << 20, BLOCK = 64 };
enum { MOST = (36 << 20) + 5 * CACHE, MOST_SHADOW = 6 << 20 };            /* the table in docs/threat-model.md, one vCPU */

static vm_machine *make_wide(vm_backend backend, const char *mmu, const void *program, size_t bytes)
{
    static const uint8_t page[4096] = { 1 };
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    uint64_t rip = 0x1000;
    if (SANITIZED)
        test_skip("a sanitizer has memory of its own");
    options.backend = backend;
    options.code_cache_bytes = CACHE;
    options.mmu = mmu;
    OK(vm_create(&options, &m));
    OK(vm_map_ram(m, 0, RAM, VM_PROT_RWX, NULL));
    for (uint64_t gpa = 0; gpa < RAM; gpa += sizeof page)                   /* the host has given all of it */
        OK(vm_write(m, gpa, page, sizeof page));
    OK(vm_write(m, 0x1000, program, bytes));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT32));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    return m;
}

static void run_within(vm_machine *m, uint64_t instructions, uint64_t most)
{
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint64_t before = resident();
    run.max_instructions = instructions;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), &run, &e));
    CHECK_EQ(e.reason, VM_EXIT_BUDGET);
    uint64_t used = resident() - before;
    printf("    %" PRIu64 " KiB\n", used >> 10);
    if (used > most)
        FAIL("the guest made the host use %" PRIu64 " KiB, %" PRIu64 " are allowed", used >> 10, most >> 10);
    vm_destroy(m);
}

/* A quarter of a million blocks, again and again: far more than caches hold. */
EACH_BACKEND(code_everywhere_takes_no_more_than_the_caches)
{
    static const uint8_t enter[] = { 0xe9, 0xfb, 0xef, 0x0f, 0x00 };      /* jmp CODE */
    static const uint8_t block[] = { 0xff, 0xc0, 0x01, 0xc3, 0x31, 0xd9, 0xf7, 0xd8, 0xeb, BLOCK - 10 };     /* inc, add, xor, neg, jmp */
    static uint8_t text[CODE_BYTES];
    static const uint8_t back[] = { 0xe9, 0xfb, 0xff, 0xff, 0xfe };       /* jmp CODE, behind the last block */
    if (backend == VM_BACKEND_KVM)
        test_skip("hardware executes, nothing is kept");
    for (size_t at = 0; at < sizeof text; at += BLOCK)
        memcpy(text + at, block, sizeof block);
    vm_machine *m = make_wide(backend, NULL, enter, sizeof enter);
    OK(vm_write(m, CODE, text, sizeof text));
    OK(vm_write(m, CODE + CODE_BYTES, back, sizeof back));
    run_within(m, UINT64_C(3) * CODE_BYTES / BLOCK * 5, MOST);
}

/* ---- a code cache much smaller than the program ---- */

enum { STEPS = 3000, STEP_BYTES = 32, STEP_CODE = 0x100000, STEP_STRIDE = 769, ROUNDS = 4, TIMES = 5 };

/* Step i: add eax, constant; rol eax, 3; then on to the next by a jump, an indirect jump or a return. Step 0 counts ECX
 * down first and halts. */
static void write_step(uint8_t *p, unsigned i, uint32_t constant)
{
    const uint32_t at = STEP_CODE + i * STEP_BYTES, next = STEP_CODE + (i + STEP_STRIDE) % STEPS * STEP_BYTES;
    static const uint8_t count[] = { 0xff, 0xc9, 0x79, 0x01, 0xf4 };       /* dec ecx; jns .+1; hlt */
    const uint8_t *begin = p;
    if (!i) {
        memcpy(p, count, sizeof count);
        p += sizeof count;
    }
    *p++ = 0x05;
    memcpy(p, &constant, 4);
    memcpy(p += 4, (const uint8_t[]){ 0xc1, 0xc0, 3 }, 3);
    p += 3;
    const uint32_t target = i % 3 ? next : next - (at + (uint32_t)(p - begin) + 5);
    *p++ = (const uint8_t[]){ 0xe9, 0xbb, 0x68 }[i % 3];                    /* jmp; mov ebx; push */
    memcpy(p, &target, 4);
    memcpy(p + 4, i % 3 == 1 ? (const uint8_t[]){ 0xff, 0xe3 } : (const uint8_t[]){ 0xc3, 0x90 }, 2);
}

static uint32_t walk_steps(const uint32_t *constants, uint32_t eax)
{
    for (unsigned n = 0, i = 0; n < STEPS * TIMES; n++, i = (i + STEP_STRIDE) % STEPS) {
        eax += constants[i];
        eax = eax << 3 | eax >> 29;
    }
    return eax;
}

/* Every block goes and comes back, with links to it and from it; between rounds some change. */
EACH_BACKEND(code_goes_round_in_a_small_cache)
{
    static uint32_t constants[STEPS];
    static uint8_t text[STEPS * STEP_BYTES];
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    uint64_t evictions = 0, eax = 1, expected = 1, esp = 0x80000;
    options.backend = backend;
    options.code_cache_bytes = 64 << 10;
    OK(vm_create(&options, &m));
    OK(vm_map_ram(m, 0, 4 << 20, VM_PROT_RWX, NULL));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT32));
    for (unsigned i = 0; i < STEPS; i++)
        write_step(&text[i * STEP_BYTES], i, constants[i] = i * 2654435761u);
    OK(vm_write(m, STEP_CODE, text, sizeof text));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RAX, &eax, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RSP, &esp, 8));
    for (unsigned round = 0; round < ROUNDS; round++) {
        vm_exit e = VM_EXIT_INIT;
        uint64_t rip = STEP_CODE, ecx = TIMES;
        for (unsigned i = round; i < STEPS; i += 7) {
            write_step(&text[i * STEP_BYTES], i, constants[i] ^= round * 40503u);
            OK(vm_write(m, STEP_CODE + i * STEP_BYTES, &text[i * STEP_BYTES], STEP_BYTES));
        }
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8));
        OK(vm_vcpu_write_reg(cpu, VM_REG_RCX, &ecx, 8));
        OK(vm_vcpu_run(cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        OK(vm_vcpu_read_reg(cpu, VM_REG_RAX, &eax, 8));
        CHECK_EQ(eax, expected = walk_steps(constants, (uint32_t)expected));
    }
    OK(vm_stats(m, "evictions", &evictions));
    CHECK(backend != VM_BACKEND_JIT || evictions >= STEPS * TIMES * (ROUNDS - 1));
    vm_destroy(m);
}

/* Two thousand address spaces of two tables each. */
EACH_BACKEND(address_spaces_take_no_more_than_the_budget_of_shadows)
{
    enum { TABLES = 16 << 20, SPACES = 2048, PRESENT = 3, LARGE = 0x80 };
    /* mov eax, TABLES; 1: mov cr3, eax; xor ebx, ebx; mov cl, 8; 2: inc [ebx + 0x400000]; add ebx, 0x1000; dec cl; jnz 2b;
     * add eax, 0x2000; cmp eax, TABLES + SPACES * 0x2000; jb 1b; jmp 0x1000 */
    static const uint8_t program[] = { 0xb8, 0, 0, 0, 1, 0x0f, 0x22, 0xd8, 0x31, 0xdb, 0xb1, 8, 0xff, 0x83, 0, 0, 0x40, 0,
                                       0x81, 0xc3, 0, 0x10, 0, 0, 0xfe, 0xc9, 0x75, 0xf0, 0x05, 0, 0x20, 0, 0, 0x3d, 0, 0, 0, 2,
                                       0x72, 0xdd, 0xeb, 0xd6 };
    static uint32_t tables[2][1024];
    vm_sregs s = VM_SREGS_INIT;
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    vm_machine *m = make_wide(backend, "shadow", program, sizeof program);
    for (uint32_t i = 0; i < SPACES; i++) {
        uint32_t at = TABLES + i * 0x2000;
        tables[0][0] = PRESENT | LARGE;
        tables[0][1] = (at + 0x1000) | PRESENT;
        for (uint32_t k = 0; k < 1024; k++)
            tables[1][k] = (0x3000000 + k * 0x1000) | PRESENT;
        OK(vm_write(m, at, tables, sizeof tables));
    }
    OK(vm_vcpu_get_sregs(vm_vcpu_get(m, 0), &s));
    s.cr3 = TABLES;
    s.cr4 |= 0x10;
    s.cr0 |= UINT32_C(1) << 31;
    OK(vm_vcpu_set_sregs(vm_vcpu_get(m, 0), &s));
    run_within(m, 1000000, MOST + MOST_SHADOW);
}
