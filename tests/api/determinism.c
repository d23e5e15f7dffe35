/* determinism.c - BARE machines repeat themselves: the same program gives the same bytes in every run, on each software
 * backend, however the run is cut up; what a program reads of time and chance included. */
#include "../backends.h"

/* 100 rounds of: rdtsc; rdtscp; rdpmc (counter 0); rdrand; rdseed; each result stored at rdi, with a data-dependent number
 * of instructions and a repeated string instruction between. Ends with HLT. */
static const uint8_t PROGRAM[] = {
    0xbf, 0x00, 0x00, 0x02, 0x00,                        /* mov edi, 0x20000 */
    0xbe, 100, 0, 0, 0,                                  /* mov esi, 100 */
    /* 0a: round */
    0x0f, 0x31,                                          /* rdtsc */
    0x89, 0x07, 0x89, 0x57, 0x04,                        /* mov [rdi], eax; mov [rdi+4], edx */
    0x0f, 0x01, 0xf9,                                    /* rdtscp */
    0x89, 0x47, 0x08, 0x89, 0x57, 0x0c, 0x89, 0x4f, 0x10,/* mov [rdi+8], eax; [rdi+12], edx; [rdi+16], ecx */
    0x31, 0xc9, 0x0f, 0x33,                              /* xor ecx, ecx; rdpmc */
    0x89, 0x47, 0x14, 0x89, 0x57, 0x18,                  /* mov [rdi+20], eax; [rdi+24], edx */
    0x48, 0x0f, 0xc7, 0xf0,                              /* rdrand rax */
    0x48, 0x89, 0x47, 0x20,                              /* mov [rdi+32], rax */
    0x48, 0x0f, 0xc7, 0xfb,                              /* rdseed rbx */
    0x48, 0x89, 0x5f, 0x28,                              /* mov [rdi+40], rbx */
    0x89, 0xc1, 0x83, 0xe1, 0x1f, 0xff, 0xc1,            /* mov ecx, eax; and ecx, 31; inc ecx */
    0x89, 0xca,                                          /* mov edx, ecx */
    0x48, 0x83, 0xc7, 0x30,                              /* add rdi, 48 */
    0x51, 0x57, 0xbf, 0x00, 0x00, 0x01, 0x00,            /* push rcx; push rdi; mov edi, 0x10000 */
    0xf3, 0xaa,                                          /* rep stosb */
    0x5f, 0x59,                                          /* pop rdi; pop rcx */
    0x90, 0xff, 0xc9, 0x75, 0xfb,                        /* nop; dec ecx; jnz nop */
    0x0f, 0x31, 0x89, 0x47, 0xec,                        /* rdtsc; mov [rdi-20], eax: the gap at 28 */
    0xff, 0xce, 0x75, 0xad,                              /* dec esi; jnz round */
    0xf4,
};

typedef struct outcome { uint64_t retired, time, hash; vm_regs regs; uint64_t words[600]; } outcome;

static uint64_t hash(const uint8_t *p, size_t n)
{
    uint64_t h = 1469598103934665603u;
    while (n--)
        h = (h ^ *p++) * 1099511628211u;
    return h;
}

static uint64_t next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 33;
}

/* seed 0: in one piece. */
static void run_whole(vm_backend backend, uint64_t seed, unsigned loops, outcome *out)
{
    static uint8_t ram[0x30000];
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rsp = 0x8000, zero = 0;
    o.backend = backend;
    OK(vm_create(&o, &m));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_map_ram(m, 0, sizeof ram, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, PROGRAM, sizeof PROGRAM));
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RSP, &rsp, 8));
    for (unsigned i = 0; i < loops; i++) {
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
        do {
            vm_run_options r = VM_RUN_OPTIONS_INIT;
            r.max_instructions = seed ? 1 + next(&seed) % (next(&seed) % 8 ? 200 : 3) : 0;
            if (seed && next(&seed) % 16 == 0)
                vm_vcpu_kick(cpu);
            OK(vm_vcpu_run(cpu, &r, &e));
        } while (e.reason == VM_EXIT_BUDGET || e.reason == VM_EXIT_KICK);
        if (e.reason != VM_EXIT_HALT) {
            char text[200];
            vm_exit_format(&e, text, sizeof text);
            FAIL("%s", text);
        }
    }
    out->retired = vm_vcpu_retired(cpu);
    out->time = vm_time(m);
    out->regs = (vm_regs)VM_REGS_INIT;
    OK(vm_vcpu_get_regs(cpu, &out->regs));
    OK(vm_read(m, 0, ram, sizeof ram));
    out->hash = hash(ram, sizeof ram);
    memcpy(out->words, ram + 0x20000, sizeof out->words);
    vm_destroy(m);
}

/* Two sequences of random numbers that do not repeat themselves, time that goes up by what was executed. */
TEST(time_and_chance_make_sense)
{
    outcome a;
    run_whole(VM_BACKEND_INTERP, 0, 1, &a);
    for (unsigned i = 0; i < 100; i++) {
        const uint64_t *w = &a.words[6 * i];
        uint64_t tsc = w[0], tscp = w[1];
        CHECK_EQ(tscp - tsc, 3);                         /* instructions in between, one a nanosecond, one a cycle */
        CHECK(i == 0 || tsc > w[-6]);
        CHECK(w[4] != w[5]);
        CHECK(i == 0 || (w[4] != w[-2] && w[5] != w[-1]));
    }
    CHECK_EQ(a.time, a.retired);
}

static void same(vm_backend backend, uint64_t seed, unsigned loops)
{
    outcome a, b;
    run_whole(VM_BACKEND_INTERP, 0, loops, &a);
    run_whole(backend, seed, loops, &b);
    for (unsigned i = 0; i < sizeof a.words / sizeof *a.words; i++)
        if (a.words[i] != b.words[i])
            FAIL("seed %llu: word %u of round %u: 0x%llx, not 0x%llx", (unsigned long long)seed, i % 6, i / 6,
                 (unsigned long long)b.words[i], (unsigned long long)a.words[i]);
    CHECK_EQ(b.retired, a.retired);
    CHECK_EQ(b.time, a.time);
    CHECK_EQ(b.hash, a.hash);
    CHECK(!memcmp(&a.regs, &b.regs, sizeof a.regs));
}

static void software_only(vm_backend backend)
{
    uint64_t counts = 0;
    OK(vm_query(backend, "retired", &counts));
    if (!counts)
        test_skip("backend %s has the host's time", vm_backend_name(backend));
}

EACH_BACKEND(the_same_in_one_piece) { software_only(backend); same(backend, 0, 1); same(backend, 0, 7); same(backend, 0, 30); }
EACH_BACKEND(the_same_in_slices)
{
    software_only(backend);
    for (uint64_t seed = 1; seed <= 40; seed++)
        same(backend, seed, seed % 4 ? 1 : 20);
}
