/* snapshot.c - snapshots and clones of BARE machines, on every backend: what was restored is what was taken, whatever
 * happened in between; trees of snapshots in random order; edits of the map; devices; files, whole and damaged. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CODE UINT64_C(0x1000)
#define DATA UINT64_C(0x100000)
#define DATA_PAGES 64u
#define BIG UINT64_C(0x4000000)
#define BIG_BYTES (UINT64_C(1) << 20)  /* large enough to be mapped from an image */

static uint64_t seed = 88172645463325252u;

static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static uint64_t mix(uint64_t h, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* Everything a guest could look at; memory in words of 64 bytes to be quick. */
static uint64_t state_of(vm_machine *m, bool with_time)
{
    static uint8_t page[4096];
    uint64_t h = 14695981039346656037u;
    for (unsigned i = 0; i < vm_vcpu_count(m); i++) {
        vm_vcpu *cpu = vm_vcpu_get(m, i);
        vm_regs r = VM_REGS_INIT;
        vm_sregs s = VM_SREGS_INIT;
        vm_fpu f = VM_FPU_INIT;
        OK(vm_vcpu_get_regs(cpu, &r));
        OK(vm_vcpu_get_sregs(cpu, &s));
        OK(vm_vcpu_get_fpu(cpu, &f));
        h = mix(h, &r, sizeof r);
        h = mix(h, &s, sizeof s);
        h = mix(h, &f, sizeof f);
        if (with_time) {
            uint64_t retired = vm_vcpu_retired(cpu), now = vm_time(m);
            h = mix(mix(h, &retired, 8), &now, 8);
        }
    }
    static const struct { uint64_t gpa, pages; } spaces[] = { { 0, 16 }, { DATA, DATA_PAGES + 16 }, { BIG, 256 } };
    for (size_t k = 0; k < sizeof spaces / sizeof *spaces; k++)
        for (uint64_t i = 0; i < spaces[k].pages; i++) {
            uint64_t gpa = spaces[k].gpa + i * 4096, words[8] = { 0 };
            if (vm_read(m, gpa, page, sizeof page) != VM_OK) {
                h = mix(h, &gpa, 8);
                continue;
            }
            for (size_t at = 0; at < sizeof page; at += 64)
                for (unsigned w = 0; w < 8; w++) {
                    uint64_t v;
                    memcpy(&v, page + at + 8 * w, 8);
                    words[w] = (words[w] ^ v) * UINT64_C(0x9e3779b97f4a7c15);
                    words[w] ^= words[w] >> 29;
                }
            h = mix(h, words, sizeof words);
        }
    return h;
}

/* next: mov rax, rbx; imul rax, rax, 0x10dcd; inc rbx; mov rdx, rax; shr rdx, 7; and edx, 63; shl edx, 12;
 *       add [rdx + DATA], rax; mov [rdx + BIG + 8], rbx; paddq xmm0, xmm1; movq xmm1, rax; loop next; hlt */
static const uint8_t program[] = {
    0x48, 0x89, 0xd8, 0x48, 0x69, 0xc0, 0xcd, 0x0d, 0x01, 0x00, 0x48, 0xff, 0xc3, 0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x07,
    0x83, 0xe2, 0x3f, 0xc1, 0xe2, 0x0c, 0x48, 0x01, 0x82, 0x00, 0x00, 0x10, 0x00, 0x48, 0x89, 0x9a, 0x08, 0x00, 0x00, 0x04,
    0x66, 0x0f, 0xd4, 0xc1, 0x66, 0x48, 0x0f, 0x6e, 0xc8, 0xe2, 0xcd, 0xf4,
};

static vm_machine *make_empty(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    OK(vm_create(&o, &m));
    return m;
}

static vm_machine *set_up(vm_machine *m)
{
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_map_ram(m, DATA, DATA_PAGES * 4096, VM_PROT_RW, NULL));
    OK(vm_map_ram(m, BIG, BIG_BYTES, VM_PROT_RW, NULL));
    OK(vm_write(m, CODE, program, sizeof program));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    return m;
}

static vm_machine *make(vm_backend backend)
{
    return set_up(make_empty(backend));
}

static void set(vm_machine *m, int reg, uint64_t value)
{
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), reg, &value, 8));
}

static uint64_t get(vm_machine *m, int reg)
{
    uint64_t value = 0;
    OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), reg, &value, 8));
    return value;
}

static vm_exit run(vm_machine *m, uint64_t budget)
{
    vm_run_options r = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    r.max_instructions = budget;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), &r, &e));
    return e;
}

static void go(vm_machine *m, uint64_t loops)
{
    set(m, VM_REG_RIP, CODE);
    set(m, VM_REG_RCX, loops);
    vm_exit e = run(m, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
}

static bool counts(vm_backend backend)
{
    uint64_t retired = 0;
    return vm_query(backend, "retired", &retired) == VM_OK && retired;
}

/* ---- one snapshot, again and again ---- */

EACH_BACKEND(restored_is_taken)
{
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    go(m, 20);
    OK(vm_snapshot_take(m, &s));
    CHECK(vm_snapshot_bytes(s) > 0);
    uint64_t before = state_of(m, counts(backend)), after = 0;
    for (unsigned i = 0; i < 30; i++) {
        go(m, 1 + i % 5 * 20);
        if (i == 4)
            after = state_of(m, counts(backend));
        if (i % 5 == 4)
            CHECK_EQ(state_of(m, counts(backend)), after);
        CHECK(state_of(m, counts(backend)) != before);
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, counts(backend)), before);
    }
    vm_snapshot_free(s);
    CHECK_EQ(state_of(m, counts(backend)), before);
    go(m, 81);
    CHECK_EQ(state_of(m, counts(backend)), after);
    vm_destroy(m);
}

EACH_BACKEND(taken_in_mid_loop)
{
    need_exact_budget(backend);
    vm_machine *m = make(backend);
    vm_snapshot *s[40];
    uint64_t state[40], end = 0;
    set(m, VM_REG_RIP, CODE);
    set(m, VM_REG_RCX, 500);
    for (unsigned i = 0; i < 40; i++) {
        OK(vm_snapshot_take(m, &s[i]));
        state[i] = state_of(m, counts(backend));
        CHECK_EQ(run(m, 1 + rnd() % 200).reason, VM_EXIT_BUDGET);
    }
    for (unsigned i = 0; i < 200; i++) {
        unsigned k = rnd() % 40;
        OK(vm_snapshot_restore(m, s[k]));
        CHECK_EQ(state_of(m, counts(backend)), state[k]);
        if (i % 8 == 0) {
            CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
            if (!end)
                end = state_of(m, counts(backend));
            CHECK_EQ(state_of(m, counts(backend)), end);
        } else {
            run(m, 1 + rnd() % 300);
        }
    }
    vm_destroy(m);                     /* frees the snapshots too */
}

/* ---- trees ---- */

enum { NODES = 24 };

static void touch(vm_machine *m)
{
    for (unsigned i = rnd() % 4; i-- > 0;) {
        uint64_t v = rnd() % 3 ? rnd() : 0, at = rnd() % 2 ? DATA + rnd() % (DATA_PAGES * 4096 - 8)
                                                           : BIG + rnd() % (BIG_BYTES - 8);
        OK(vm_write(m, at, &v, 8));
    }
    if (rnd() % 2)
        go(m, 1 + rnd() % 30);
    if (rnd() % 8 == 0) {              /* whole pages of zeros */
        static const uint8_t zeros[8192];
        OK(vm_write(m, DATA + rnd() % (DATA_PAGES - 2) * 4096, zeros, sizeof zeros));
    }
}

EACH_BACKEND(trees_in_random_order)
{
    vm_machine *m = make(backend);
    vm_snapshot *s[NODES] = { NULL };
    uint64_t state[NODES] = { 0 };
    unsigned rounds = backend == VM_BACKEND_KVM ? 150 : 600;
    for (unsigned i = 0; i < rounds; i++) {
        unsigned k = rnd() % NODES;
        if (!s[k]) {
            touch(m);
            OK(vm_snapshot_take(m, &s[k]));
            state[k] = state_of(m, counts(backend));
        } else if (rnd() % 4 == 0) {
            uint64_t now = state_of(m, counts(backend));
            vm_snapshot_free(s[k]);
            s[k] = NULL;
            CHECK_EQ(state_of(m, counts(backend)), now);
        } else {
            if (rnd() % 2)
                touch(m);
            OK(vm_snapshot_restore(m, s[k]));
            CHECK_EQ(state_of(m, counts(backend)), state[k]);
        }
    }
    for (unsigned k = 0; k < NODES; k++)
        vm_snapshot_free(s[k]);
    go(m, 3);
    vm_destroy(m);
}

/* Pages that are written in each round, in every second, every fifth, now and then, by the guest and by the program: what
 * the library expects of them must never show. next: mov rax, [rdi]; test rax, rax; jz done; add [rax], rcx; add rdi, 8;
 * jmp next; done: hlt */
EACH_BACKEND(habits_of_writing)
{
    static const uint8_t walk[] = { 0x48, 0x8b, 0x07, 0x48, 0x85, 0xc0, 0x74, 0x09, 0x48, 0x01, 0x08,
                                    0x48, 0x83, 0xc7, 0x08, 0xeb, 0xef, 0xf4 };
    enum { LIST = 0x8000, WALK = 0x2000 };
    vm_machine *m = make(backend);
    vm_snapshot *s[2] = { NULL };
    uint64_t state[2] = { 0 };
    unsigned k = 0;
    OK(vm_write(m, WALK, walk, sizeof walk));
    for (unsigned round = 0; round < 400; round++) {
        uint64_t list[DATA_PAGES + 1] = { DATA, DATA + 4096 + 8 * (round % 16) };
        unsigned n = 2;
        if (round % 100 == 0 || (round % 100 == 50 && round > 200)) {          /* in mid habit */
            vm_snapshot_free(s[round / 50 % 2]);
            OK(vm_snapshot_take(m, &s[round / 50 % 2]));
            state[round / 50 % 2] = state_of(m, counts(backend));
            k = round / 50 % 2;
        }
        for (unsigned page = 2; page < DATA_PAGES; page++)
            if (page < 8 ? round % page == 0 : rnd() % page == 0)
                list[n++] = DATA + page * 4096;
        list[n] = 0;
        OK(vm_write(m, LIST, list, sizeof list));
        set(m, VM_REG_RIP, WALK);
        set(m, VM_REG_RDI, LIST);
        set(m, VM_REG_RCX, 1 + rnd() % 1000);
        CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
        if (rnd() % 4 == 0)
            OK(vm_write(m, DATA + rnd() % (DATA_PAGES * 4096 - 8), list, 8));
        if (s[1] && rnd() % 16 == 0)
            k ^= 1;
        if (round % 50 == 49)
            continue;                                    /* go on from what was written */
        OK(vm_snapshot_restore(m, s[k]));
        CHECK_EQ(state_of(m, counts(backend)), state[k]);
    }
    vm_destroy(m);
}

/* A chain that moves on, the oldest being forgotten: memory must not grow with it. */
EACH_BACKEND(rolling)
{
    vm_machine *m = make(backend);
    vm_snapshot *s[3] = { NULL };
    uint64_t state[3] = { 0 };
    for (unsigned i = 0; i < 60; i++) {
        go(m, 10);
        vm_snapshot_free(s[i % 3]);
        OK(vm_snapshot_take(m, &s[i % 3]));
        state[i % 3] = state_of(m, false);
        CHECK(vm_snapshot_bytes(s[i % 3]) < 4 * BIG_BYTES);
        if (i % 7 == 6) {
            OK(vm_snapshot_restore(m, s[(i + 1) % 3]));
            CHECK_EQ(state_of(m, false), state[(i + 1) % 3]);
        }
    }
    vm_destroy(m);
}

/* ---- the map ---- */

EACH_BACKEND(map_is_put_back)
{
    vm_machine *m = make(backend);
    vm_region *old = NULL, *added = NULL;
    vm_snapshot *s = NULL, *t = NULL;
    uint64_t v = 0x1234567890abcdef, w = 0;
    OK(vm_map_ram(m, 0x200000, 0x4000, VM_PROT_RW, &old));
    OK(vm_write(m, 0x201000, &v, 8));
    OK(vm_snapshot_take(m, &s));
    uint64_t first = state_of(m, false);
    OK(vm_write(m, 0x202000, &v, 8));
    OK(vm_unmap(m, old));
    OK(vm_map_ram(m, 0x202000, 0x1000, VM_PROT_RW, &added));
    OK(vm_write(m, 0x202000, "other", 5));
    OK(vm_protect(m, DATA + 4096, 8192, VM_PROT_R));
    OK(vm_snapshot_take(m, &t));
    CHECK_EQ(vm_read(m, 0x201000, &w, 8), VM_E_FAULT);
    for (unsigned i = 0; i < 4; i++) {
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, false), first);
        OK(vm_read(m, 0x201000, &w, 8));
        CHECK_EQ(w, v);
        OK(vm_read(m, 0x202000, &w, 8));
        CHECK_EQ(w, 0);
        CHECK_EQ(vm_region_gpa(old), 0x200000);
        CHECK_EQ(vm_region_bytes(old), 0x4000);
        OK(vm_write(m, 0x203000, &v, 8));
        go(m, 64);                     /* writes to every page of DATA: permitted again */
        OK(vm_snapshot_restore(m, t));
        CHECK_EQ(vm_read(m, 0x201000, &w, 8), VM_E_FAULT);
        w = 0;
        OK(vm_read(m, 0x202000, &w, 5));
        CHECK(memcmp(&w, "other", 5) == 0);
        set(m, VM_REG_RIP, CODE);
        set(m, VM_REG_RCX, 100);
        CHECK_EQ(run(m, 0).reason, VM_EXIT_UNMAPPED);    /* a page that is read-only in t */
    }
    vm_snapshot_free(s);
    vm_snapshot_free(t);
    REFUSED(vm_unmap(m, old), VM_E_NOTFOUND);
    vm_destroy(m);
}

EACH_BACKEND(regions_since_go)
{
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    vm_region *r = NULL;
    uint64_t before = 0, after = 0;
    OK(vm_snapshot_take(m, &s));
    OK(vm_stats(m, "regions", &before));
    for (unsigned i = 0; i < 5; i++) {
        OK(vm_map_ram(m, 0x300000, 0x2000, VM_PROT_RWX, &r));
        OK(vm_write(m, 0x300000, "x", 1));
        OK(vm_snapshot_restore(m, s));
        OK(vm_stats(m, "regions", &after));
        CHECK_EQ(after, before);
        REFUSED(vm_unmap(m, r), VM_E_NOTFOUND);
    }
    vm_destroy(m);
}

EACH_BACKEND(memory_of_the_program)
{
    vm_machine *m = make_empty(backend);
    uint8_t *host = mmap(NULL, 0x8000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    vm_snapshot *s = NULL;
    CHECK(host != MAP_FAILED);
    OK(vm_map_host(m, DATA, 0x8000, VM_PROT_RW, host, NULL));
    strcpy((char *)host, "before");
    OK(vm_snapshot_take(m, &s));
    OK(vm_write(m, DATA, "after", 6));
    strcpy((char *)host + 0x5000, "unseen");
    OK(vm_snapshot_restore(m, s));
    CHECK(strcmp((char *)host, "before") == 0);
    CHECK(strcmp((char *)host + 0x5000, "unseen") == 0); /* nobody told */
    OK(vm_invalidate(m, DATA + 0x5000, 6));
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(host[0x5000], 0);
    vm_destroy(m);
    munmap(host, 0x8000);
}

/* ---- code ---- */

/* mov byte [rip+1+6...]: code that changes its own immediate: mov eax, 1; mov byte [CODE+1], 2; hlt */
EACH_BACKEND(code_is_put_back)
{
    static const uint8_t changing[] = { 0xb8, 1, 0, 0, 0, 0xc6, 0x04, 0x25, 0x01, 0x10, 0, 0, 2, 0xf4 };
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    OK(vm_write(m, CODE, changing, sizeof changing));
    set(m, VM_REG_RIP, CODE);
    OK(vm_snapshot_take(m, &s));
    for (unsigned i = 0; i < 50; i++) {
        CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
        CHECK_EQ(get(m, VM_REG_RAX), 1);
        set(m, VM_REG_RIP, CODE);
        CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
        CHECK_EQ(get(m, VM_REG_RAX), 2);
        OK(vm_snapshot_restore(m, s));
    }
    vm_destroy(m);
}

/* A loop of runs and restores translates nothing anew, even with data beside the code. */
EACH_BACKEND(code_stays_translated)
{
    static const uint8_t beside[] = { 0xff, 0x04, 0x25, 0x00, 0x18, 0, 0, 0xf4 };        /* inc dword [0x1800]; hlt */
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM translates nothing");
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    uint64_t early = 0, late = 0;
    OK(vm_write(m, CODE + 0x100, beside, sizeof beside));
    OK(vm_snapshot_take(m, &s));
    for (unsigned i = 0; i < 3000; i++) {
        go(m, 40);
        set(m, VM_REG_RIP, CODE + 0x100);
        CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
        OK(vm_snapshot_restore(m, s));
        if (i == 200)
            OK(vm_stats(m, "decoded", &early));
    }
    OK(vm_stats(m, "decoded", &late));
    CHECK(early > 0);
    if (late > early + early / 2)
        FAIL("%" PRIu64 " instructions decoded in 200 rounds, %" PRIu64 " in 3000", early, late);
    vm_destroy(m);
}

/* ---- events under way ---- */

EACH_BACKEND(pending_exits)
{
    static const uint8_t in[] = { 0xe4, 0x10, 0xf4 };                                    /* in al, 0x10; hlt */
    static const uint8_t load[] = { 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0x20, 0xf4 };       /* mov rax, [0x20000000]; hlt */
    static const struct { const uint8_t *code; size_t bytes; vm_exit_reason reason; } all[] = {
        { in, sizeof in, VM_EXIT_IO }, { load, sizeof load, VM_EXIT_UNMAPPED },
    };
    for (size_t k = 0; k < 2; k++) {
        vm_machine *m = make(backend);
        vm_snapshot *s = NULL;
        vm_exit e = VM_EXIT_INIT;
        OK(vm_write(m, CODE, all[k].code, all[k].bytes));
        set(m, VM_REG_RIP, CODE);
        set(m, VM_REG_RAX, 0);
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
        CHECK_EQ(e.reason, all[k].reason);
        OK(vm_snapshot_take(m, &s));
        for (unsigned i = 1; i < 4; i++) {
            vm_exit answer = e;
            if (k)
                answer.mmio.data = i;
            else
                answer.io.data = i;
            OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &answer));
            CHECK_EQ(answer.reason, VM_EXIT_HALT);
            CHECK_EQ(get(m, VM_REG_RAX), i);
            OK(vm_snapshot_restore(m, s));
            CHECK_EQ(get(m, VM_REG_RAX), 0);
        }
        vm_destroy(m);
    }
}

/* rdtsc; mov rbx, rax; rdrand rcx; rdtsc; hlt: the same every time */
EACH_BACKEND(time_and_chance)
{
    static const uint8_t code[] = { 0x0f, 0x31, 0x48, 0x89, 0xc3, 0x48, 0x0f, 0xc7, 0xf1, 0x0f, 0x31, 0xf4 };
    need_exact_budget(backend);
    if (backend == VM_BACKEND_KVM)
        test_skip("time is the host's");
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    OK(vm_write(m, CODE, code, sizeof code));
    go(m, 1);
    set(m, VM_REG_RIP, CODE);
    OK(vm_snapshot_take(m, &s));
    uint64_t now = vm_time(m), want = 0;
    for (unsigned i = 0; i < 5; i++) {
        CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
        uint64_t got = state_of(m, true);
        want = i ? want : got;
        CHECK_EQ(got, want);
        CHECK(vm_time(m) > now);
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(vm_time(m), now);
    }
    vm_destroy(m);
}

EACH_BACKEND(injections_wait)
{
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_inject(vm_vcpu_get(m, 0), 13, true, 0));
    set(m, VM_REG_RIP, CODE);
    OK(vm_snapshot_take(m, &s));
    for (unsigned i = 0; i < 3; i++) {
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_SHUTDOWN);            /* there is no IDT */
        OK(vm_snapshot_restore(m, s));
    }
    vm_destroy(m);
}

/* ---- beside the dirty log ---- */

EACH_BACKEND(dirty_log_stays_right)
{
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    uint64_t bits = 0;
    uint8_t b = 7;
    OK(vm_dirty_log(m, true));
    OK(vm_snapshot_take(m, &s));
    OK(vm_write(m, DATA + 3 * 4096, &b, 1));
    OK(vm_dirty_fetch(m, DATA, DATA_PAGES * 4096, &bits));
    CHECK_EQ(bits, 8);
    OK(vm_write(m, DATA + 5 * 4096, &b, 1));
    OK(vm_snapshot_restore(m, s));     /* both change back: both are dirty since the fetch */
    OK(vm_dirty_fetch(m, DATA, DATA_PAGES * 4096, &bits));
    CHECK_EQ(bits, 8 | 32);
    OK(vm_snapshot_restore(m, s));
    OK(vm_dirty_fetch(m, DATA, DATA_PAGES * 4096, &bits));
    CHECK_EQ(bits, 0);
    set(m, VM_REG_RBX, 0);
    go(m, 1);                          /* rax = 0: page 0 of DATA */
    OK(vm_dirty_fetch(m, DATA, DATA_PAGES * 4096, &bits));
    CHECK_EQ(bits, 1);
    OK(vm_snapshot_restore(m, s));
    OK(vm_dirty_fetch(m, DATA, DATA_PAGES * 4096, &bits));
    CHECK_EQ(bits, 1);
    OK(vm_dirty_log(m, false));
    go(m, 64);
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(get(m, VM_REG_RBX), 0);
    vm_dirty_log(m, true);
    OK(vm_dirty_fetch(m, DATA, DATA_PAGES * 4096, &bits));
    CHECK_EQ(bits, 0);
    vm_destroy(m);
}

/* ---- devices ---- */

typedef struct counter { uint64_t value; unsigned *destroyed; bool fails, is_clone; } counter;

static int counter_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    counter *c = user;
    (void)cpu, (void)offset, (void)width;
    *value = ++c->value;
    return 0;
}

static int counter_save(void *user, void *buffer, size_t *bytes)
{
    counter *c = user;
    if (c->fails)
        return VM_E_HOST;
    if (buffer)
        memcpy(buffer, &c->value, 8);
    *bytes = 8;
    return 0;
}

static int counter_restore(void *user, const void *buffer, size_t bytes)
{
    counter *c = user;
    if (bytes != 8 || c->fails)
        return VM_E_FORMAT;
    memcpy(&c->value, buffer, 8);
    return 0;
}

static void counter_destroy(void *user)
{
    counter *c = user;
    if (c->destroyed)
        ++*c->destroyed;
    if (c->is_clone)
        free(c);
}

static int counter_clone(void *user, vm_machine *copy, void **out)
{
    const counter *c = user;
    counter *made = calloc(1, sizeof *made);
    (void)copy;
    made->destroyed = c->destroyed;
    made->is_clone = true;
    *out = made;
    return 0;
}

static vm_io_ops counter_ops(void)
{
    vm_io_ops ops = VM_IO_OPS_INIT;
    ops.read = counter_read;
    ops.save = counter_save;
    ops.restore = counter_restore;
    ops.destroy = counter_destroy;
    ops.clone = counter_clone;
    return ops;
}

/* in al, 0x40; hlt */
static uint64_t ask(vm_machine *m)
{
    static const uint8_t code[] = { 0xe5, 0x40, 0xf4 };
    OK(vm_write(m, CODE + 0x800, code, sizeof code));
    set(m, VM_REG_RIP, CODE + 0x800);
    vm_exit e = run(m, 0);
    return e.reason == VM_EXIT_HALT ? get(m, VM_REG_RAX) : 1000 + e.reason;
}

EACH_BACKEND(devices_of_the_program)
{
    vm_machine *m = make(backend);
    unsigned destroyed = 0;
    counter c = { .destroyed = &destroyed };
    vm_io_ops ops = counter_ops();
    vm_region *r = NULL;
    vm_snapshot *s = NULL, *t = NULL;
    OK(vm_map_pio(m, 0x40, 4, &ops, &c, &r));
    CHECK_EQ(ask(m), 1);
    OK(vm_snapshot_take(m, &s));
    CHECK_EQ(ask(m), 2);
    CHECK_EQ(ask(m), 3);
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(ask(m), 2);
    OK(vm_unmap(m, r));
    CHECK_EQ(destroyed, 0);            /* the snapshot has it */
    CHECK_EQ(ask(m), 1000 + VM_EXIT_IO);
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(ask(m), 2);
    c.fails = true;
    REFUSED(vm_snapshot_take(m, &t), VM_E_HOST);
    CHECK(t == NULL);
    REFUSED(vm_snapshot_restore(m, s), VM_E_FORMAT);
    c.fails = false;
    OK(vm_snapshot_restore(m, s));
    OK(vm_unmap(m, r));
    vm_snapshot_free(s);
    CHECK_EQ(destroyed, 1);
    vm_destroy(m);
    CHECK_EQ(destroyed, 1);
}

/* ---- misuse ---- */

static int busy_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    vm_machine *m = ((void **)user)[0], *copy = NULL;
    vm_snapshot *s = ((void **)user)[1], *t = NULL;
    (void)cpu, (void)offset, (void)width;
    REFUSED(vm_snapshot_take(m, &t), VM_E_BUSY);
    REFUSED(vm_snapshot_restore(m, s), VM_E_BUSY);
    REFUSED(vm_fork(m, &copy), VM_E_BUSY);
    *value = 5;
    return 0;
}

EACH_BACKEND(misuse)
{
    vm_machine *m = make(backend), *other = make(backend);
    vm_snapshot *s = NULL;
    vm_io_ops ops = VM_IO_OPS_INIT;
    void *user[2] = { m, NULL };
    ops.read = busy_read;
    OK(vm_map_pio(m, 0x40, 4, &ops, user, NULL));
    OK(vm_snapshot_take(m, &s));
    user[1] = s;
    CHECK_EQ(ask(m), 5);
    REFUSED(vm_snapshot_take(NULL, &s), VM_E_INVALID);
    CHECK(s == NULL);
    s = user[1];
    REFUSED(vm_snapshot_take(m, NULL), VM_E_INVALID);
    REFUSED(vm_snapshot_restore(NULL, s), VM_E_INVALID);
    REFUSED(vm_snapshot_restore(m, NULL), VM_E_INVALID);
    REFUSED(vm_snapshot_restore(other, s), VM_E_INVALID);
    REFUSED(vm_snapshot_save(NULL, 1), VM_E_INVALID);
    REFUSED(vm_snapshot_save(s, -1), VM_E_HOST);
    REFUSED(vm_snapshot_save_file(s, "/nonexistent/dir/x", 0), VM_E_HOST);
    REFUSED(vm_snapshot_save_file(s, "x", 64), VM_E_INVALID);
    REFUSED(vm_snapshot_save_file(s, "/dev/null", 0), VM_E_INVALID);       /* which stays what it is */
    REFUSED(vm_snapshot_save_file(s, "/", 0), VM_E_INVALID);
    REFUSED(vm_snapshot_load(m, -1, &(vm_snapshot *){ NULL }), VM_E_HOST);
    REFUSED(vm_snapshot_load_file(m, "/nonexistent/x", 0, &(vm_snapshot *){ NULL }), VM_E_NOTFOUND);
    REFUSED(vm_snapshot_load_file(m, "/", 0, &(vm_snapshot *){ NULL }), VM_E_FORMAT);
    REFUSED(vm_fork(NULL, &(vm_machine *){ NULL }), VM_E_INVALID);
    REFUSED(vm_fork(m, NULL), VM_E_INVALID);
    vm_destroy(other);
    vm_snapshot_free(NULL);
    CHECK_EQ(vm_snapshot_bytes(NULL), 0);
    vm_destroy(m);
}

/* ---- backends come and go ---- */

TEST(across_backends)
{
    vm_machine *m = make(VM_BACKEND_INTERP);
    vm_snapshot *s = NULL, *t = NULL;
    uint64_t jit = 0;
    if (vm_query(VM_BACKEND_JIT, "available", &jit) || !jit)
        test_skip("no JIT");
    go(m, 5);
    OK(vm_snapshot_take(m, &s));
    uint64_t first = state_of(m, true);
    OK(vm_backend_select(m, VM_BACKEND_JIT));
    go(m, 5000);
    OK(vm_snapshot_take(m, &t));
    uint64_t second = state_of(m, true);
    for (unsigned i = 0; i < 4; i++) {
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, true), first);
        OK(vm_backend_select(m, i & 1 ? VM_BACKEND_JIT : VM_BACKEND_INTERP));
        go(m, 5000);
        CHECK_EQ(state_of(m, true), second);
        OK(vm_snapshot_restore(m, t));
        CHECK_EQ(state_of(m, true), second);
    }
    vm_destroy(m);
}

TEST(across_kvm)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_snapshot *s = NULL, *t = NULL;
    uint64_t kvm = 0;
    if (vm_query(VM_BACKEND_KVM, "available", &kvm) || !kvm)
        test_skip("no KVM");
    o.backend = VM_BACKEND_INTERP;
    o.cpu_model = "kvm";
    OK(vm_create(&o, &m));
    set_up(m);
    go(m, 5);
    OK(vm_snapshot_take(m, &s));
    uint64_t first = state_of(m, false);
    OK(vm_backend_select(m, VM_BACKEND_KVM));
    go(m, 100);
    OK(vm_snapshot_take(m, &t));
    uint64_t second = state_of(m, false);
    for (unsigned i = 0; i < 6; i++) {
        go(m, 3);
        OK(vm_backend_select(m, i & 1 ? VM_BACKEND_KVM : VM_BACKEND_INTERP));
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, false), first);
        go(m, 100);
        CHECK_EQ(state_of(m, false), second);
        OK(vm_snapshot_restore(m, t));
        CHECK_EQ(state_of(m, false), second);
    }
    vm_destroy(m);
}

/* ---- paging: translations must not outlive the page tables they came from ---- */

/* Identity-maps 2 MiB by a large page at PD[0]; PD[1] is made to point at `second`. */
static void set_tables(vm_machine *m, uint64_t second)
{
    uint64_t pml4 = 0x5000 | 3, pdpt = 0x6000 | 3, low = 0x83, high = second | 0x83;
    OK(vm_write(m, 0x4000, &pml4, 8));
    OK(vm_write(m, 0x5000, &pdpt, 8));
    OK(vm_write(m, 0x6000, &low, 8));
    OK(vm_write(m, 0x6008, &high, 8));
}

static void page_tables(vm_backend backend, const char *strategy)
{
    /* mov rax, [0x200000]; mov qword [0x6008], rbx; invlpg [0x200000]; mov rdx, [0x200000]; hlt */
    static const uint8_t code[] = { 0x48, 0x8b, 0x04, 0x25, 0, 0, 0x20, 0, 0x48, 0x89, 0x1c, 0x25, 0x08, 0x60, 0, 0,
                                    0x0f, 0x01, 0x3c, 0x25, 0, 0, 0x20, 0, 0x48, 0x8b, 0x14, 0x25, 0, 0, 0x20, 0, 0xf4 };
    vm_machine *m = make_empty(backend);
    vm_snapshot *s = NULL;
    uint64_t a = 0xaaaa, b = 0xbbbb;
    OK(vm_map_ram(m, 0, 0xa00000, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0x400000, &a, 8));
    OK(vm_write(m, 0x800000, &b, 8));
    OK(vm_write(m, CODE, code, sizeof code));
    set_tables(m, 0x400000);
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    set(m, VM_REG_CR3, 0x4000);
    set(m, VM_REG_RIP, CODE);
    set(m, VM_REG_RBX, 0x800083);
    if (strategy && vm_mmu_select(m, strategy) != VM_OK) {
        vm_destroy(m);                 /* not with this backend */
        return;
    }
    OK(vm_snapshot_take(m, &s));
    for (unsigned i = 0; i < 20; i++) {
        CHECK_EQ(run(m, 0).reason, VM_EXIT_HALT);
        CHECK_EQ(get(m, VM_REG_RAX), 0xaaaa);
        CHECK_EQ(get(m, VM_REG_RDX), 0xbbbb);
        OK(vm_snapshot_restore(m, s));
    }
    vm_destroy(m);
}

EACH_BACKEND(page_tables_under_every_strategy)
{
    page_tables(backend, NULL);
    for (unsigned i = 0; vm_mmu_name(i); i++)
        page_tables(backend, vm_mmu_name(i));
}

/* ---- files ---- */

static char *temporary(void)
{
    static char name[64];
    snprintf(name, sizeof name, "/tmp/libvm-snapshot-%ld", (long)getpid());
    return name;
}

static const unsigned save_flags[] = { VM_SNAPSHOT_NO_SYNC, VM_SNAPSHOT_NO_SYNC | VM_SNAPSHOT_COMPRESS };

/* A child process makes its own machine, loads, and must come to the same state. */
static void load_elsewhere(vm_backend backend, const char *path, uint64_t at, uint64_t later, bool is_shaped)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        vm_machine *m = is_shaped ? make(backend) : make_empty(backend);
        vm_snapshot *s = NULL;
        OK(vm_snapshot_load_file(m, path, 0, &s));
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, counts(backend)), at);
        go(m, 50);
        CHECK_EQ(state_of(m, counts(backend)), later);
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, counts(backend)), at);
        vm_snapshot_free(s);
        go(m, 50);
        CHECK_EQ(state_of(m, counts(backend)), later);
        vm_destroy(m);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
}

EACH_BACKEND(files)
{
    const char *path = temporary();
    for (size_t k = 0; k < 2; k++) {
        vm_machine *m = make(backend);
        vm_snapshot *root = NULL, *s = NULL, *back = NULL;
        go(m, 30);
        OK(vm_snapshot_take(m, &root));
        go(m, 30);
        OK(vm_protect(m, DATA + 0x3000, 0x1000, VM_PROT_RWX));
        OK(vm_snapshot_take(m, &s));   /* a nested one: pages from several places */
        uint64_t at = state_of(m, counts(backend));
        int status = vm_snapshot_save_file(s, path, save_flags[k]);
        if (status == VM_E_UNSUPPORTED && k)
            test_skip("built without zstd");
        OK(status);
        go(m, 50);
        uint64_t later = state_of(m, counts(backend));
        load_elsewhere(backend, path, at, later, true);
        load_elsewhere(backend, path, at, later, false);
        OK(vm_snapshot_load_file(m, path, VM_SNAPSHOT_NO_VERIFY, &back));
        for (unsigned i = 0; i < 3; i++) {
            OK(vm_snapshot_restore(m, back));
            CHECK_EQ(state_of(m, counts(backend)), at);
            go(m, 50);
            CHECK_EQ(state_of(m, counts(backend)), later);
            OK(vm_snapshot_restore(m, root));
            go(m, 20);
        }
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(state_of(m, counts(backend)), at);
        vm_destroy(m);
    }
    unlink(path);
}

EACH_BACKEND(pipes)
{
    vm_machine *m = make(backend);
    vm_snapshot *s = NULL;
    int fd[2], out = open(temporary(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(out >= 0 && pipe(fd) == 0);
    go(m, 10);
    OK(vm_snapshot_take(m, &s));
    uint64_t at = state_of(m, counts(backend));
    pid_t child = fork();
    if (!child) {
        char buffer[65536];
        close(fd[1]);
        for (ssize_t n; (n = read(fd[0], buffer, sizeof buffer)) > 0;)
            if (write(out, buffer, (size_t)n) != n)
                _exit(1);
        _exit(0);
    }
    close(fd[0]);
    OK(vm_snapshot_save(s, fd[1]));
    close(fd[1]);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
    vm_snapshot_free(s);
    go(m, 10);
    OK(vm_snapshot_load(m, out, &s));
    close(out);
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(state_of(m, counts(backend)), at);
    unlink(temporary());
    vm_destroy(m);
}

static unsigned files_beside(const char *path)
{
    char command[200];
    snprintf(command, sizeof command, "ls %s* 2>/dev/null | wc -l", path);
    FILE *f = popen(command, "r");
    unsigned n = 0;
    CHECK(f && fscanf(f, "%u", &n) == 1);
    pclose(f);
    return n;
}

/* The disk is full after so many bytes: the old file stays, nothing else does. */
TEST(full_disks)
{
    vm_machine *m = make(VM_BACKEND_INTERP);
    vm_snapshot *s = NULL, *t = NULL;
    const char *path = temporary();
    struct stat before, after;
    go(m, 100);
    OK(vm_snapshot_take(m, &s));
    OK(vm_snapshot_save_file(s, path, 0));
    CHECK(stat(path, &before) == 0);
    signal(SIGXFSZ, SIG_IGN);
    for (size_t k = 0; k < 2; k++)
        for (rlim_t limit = 0; limit < (rlim_t)before.st_size; limit = limit * 2 + 1000) {
            struct rlimit old, full;
            getrlimit(RLIMIT_FSIZE, &old);
            full = old;
            full.rlim_cur = limit;
            setrlimit(RLIMIT_FSIZE, &full);
            int status = vm_snapshot_save_file(s, path, save_flags[k] & ~(unsigned)VM_SNAPSHOT_NO_SYNC);
            setrlimit(RLIMIT_FSIZE, &old);
            if (status == VM_E_UNSUPPORTED || (k && status == VM_OK))
                break;                 /* small enough when compressed */
            CHECK_EQ(status, VM_E_HOST);
            CHECK(vm_errmsg()[0]);
            CHECK_EQ(files_beside(path), 1);
            CHECK(stat(path, &after) == 0);
            CHECK_EQ(after.st_ino, before.st_ino);
        }
    OK(vm_snapshot_load_file(m, path, 0, &t));
    unlink(path);
    OK(vm_snapshot_restore(m, t));     /* the file's pages stay while somebody maps them */
    CHECK_EQ(files_beside(path), 0);
    vm_destroy(m);
}

/* ---- damage ---- */

/* A small machine, so that a file is some pages only. */
static vm_machine *make_small(void)
{
    vm_machine *m = make_empty(VM_BACKEND_INTERP);
    OK(vm_map_ram(m, 0, 0x3000, VM_PROT_RWX, NULL));
    OK(vm_protect(m, 0x2000, 0x1000, VM_PROT_RX));
    OK(vm_write(m, CODE, program, sizeof program));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    return m;
}

static size_t read_file(const char *path, uint8_t *buffer, size_t room)
{
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    ssize_t n = read(fd, buffer, room);
    close(fd);
    CHECK(n > 0 && (size_t)n < room);
    return (size_t)n;
}

static int load_bytes(vm_machine *m, const uint8_t *bytes, size_t count)
{
    vm_snapshot *s = NULL;
    int fd = memfd_create("damaged", 0);
    CHECK(fd >= 0 && write(fd, bytes, count) == (ssize_t)count);
    int status = vm_snapshot_load(m, fd, &s);
    close(fd);
    CHECK((status == VM_OK) == (s != NULL));
    if (s)
        vm_snapshot_free(s);
    return status;
}

static void damage(unsigned flags)
{
    static uint8_t file[1 << 20];
    vm_machine *m = make_small();
    vm_snapshot *s = NULL;
    OK(vm_snapshot_take(m, &s));
    int status = vm_snapshot_save_file(s, temporary(), flags);
    if (status == VM_E_UNSUPPORTED)
        test_skip("built without zstd");
    OK(status);
    size_t n = read_file(temporary(), file, sizeof file);
    unlink(temporary());
    OK(load_bytes(m, file, n));
    uint64_t before = state_of(m, true);
    for (size_t cut = 0; cut < n; cut += cut < 256 || n - cut < 256 ? 1 : 97)
        CHECK_EQ(load_bytes(m, file, cut), VM_E_FORMAT);
    for (size_t bit = 0; bit < n * 8; bit += bit < 4096 * 8 ? 1 : 13) {      /* every bit of the header */
        file[bit / 8] ^= (uint8_t)(1u << bit % 8);
        status = load_bytes(m, file, n);
        if (status != VM_E_FORMAT && !(flags & VM_SNAPSHOT_COMPRESS && status == VM_OK))
            FAIL("bit %zu of byte %zu: %d", bit % 8, bit / 8, status);
        if (status == VM_OK)
            FAIL("bit %zu of byte %zu made no difference", bit % 8, bit / 8);
        file[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    file[n] = 0;
    CHECK_EQ(load_bytes(m, file, n + 1), VM_E_FORMAT);   /* longer than it should be */
    for (uint32_t version = 0; version < 4; version++) { /* after the magic number's 8 bytes */
        uint32_t ours;
        memcpy(&ours, file + 8, 4);
        memcpy(file + 8, &version, 4);
        status = load_bytes(m, file, n);
        CHECK_EQ(status, version == ours ? VM_OK : VM_E_FORMAT);
        CHECK(version == ours || strstr(vm_errmsg(), "version"));
        memcpy(file + 8, &ours, 4);
    }
    OK(load_bytes(m, file, n));
    CHECK_EQ(state_of(m, true), before);
    vm_destroy(m);
}

TEST(damaged_files) { damage(VM_SNAPSHOT_NO_SYNC); }
TEST(damaged_compressed_files) { damage(VM_SNAPSHOT_NO_SYNC | VM_SNAPSHOT_COMPRESS); }

TEST(wrong_machines)
{
    static uint8_t file[1 << 20];
    vm_machine *m = make_small(), *other = NULL;
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = counter_ops();
    counter c = { 0 };
    vm_snapshot *s = NULL;
    OK(vm_map_pio(m, 0x40, 4, &ops, &c, NULL));
    OK(vm_snapshot_take(m, &s));
    OK(vm_snapshot_save_file(s, temporary(), VM_SNAPSHOT_NO_SYNC));
    size_t n = read_file(temporary(), file, sizeof file);
    unlink(temporary());
    o.backend = VM_BACKEND_INTERP;
    o.vcpus = 2;
    OK(vm_create(&o, &other));
    CHECK_EQ(load_bytes(other, file, n), VM_E_FORMAT);   /* vCPUs */
    vm_destroy(other);
    o.vcpus = 1;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 1 << 20;
    OK(vm_create(&o, &other));
    CHECK_EQ(load_bytes(other, file, n), VM_E_FORMAT);   /* platform */
    vm_destroy(other);
    o.platform = VM_PLATFORM_BARE;
    o.ram_bytes = 0;
    OK(vm_create(&o, &other));
    CHECK_EQ(load_bytes(other, file, n), VM_E_FORMAT);   /* no device at port 0x40 */
    ops.restore = NULL;
    OK(vm_map_pio(other, 0x40, 4, &ops, &c, NULL));
    CHECK_EQ(load_bytes(other, file, n), VM_E_FORMAT);   /* that takes no state */
    vm_destroy(other);
    OK(load_bytes(m, file, n));
    vm_destroy(m);
}

/* ---- clones ---- */

EACH_BACKEND(clones)
{
    vm_machine *m = make(backend), *c[6] = { NULL };
    unsigned destroyed = 0;
    counter device = { .destroyed = &destroyed };
    vm_io_ops ops = counter_ops(), deaf = VM_IO_OPS_INIT;
    OK(vm_map_pio(m, 0x40, 4, &ops, &device, NULL));
    OK(vm_map_pio(m, 0x50, 4, &deaf, &device, NULL));
    CHECK_EQ(ask(m), 1);
    go(m, 30);
    OK(vm_protect(m, DATA + 0x5000, 0x1000, VM_PROT_R));
    OK(vm_protect(m, DATA + 0x5000, 0x1000, VM_PROT_RWX));
    uint64_t at = state_of(m, counts(backend));
    for (unsigned i = 0; i < 3; i++)
        OK(vm_fork(m, &c[i]));
    CHECK_EQ(state_of(m, counts(backend)), at);
    for (unsigned i = 0; i < 3; i++) {
        CHECK_EQ(state_of(c[i], counts(backend)), at);
        CHECK_EQ(vm_machine_backend(c[i]), backend);
    }
    go(m, 40);
    uint64_t later = state_of(m, counts(backend));
    OK(vm_fork(m, &c[3]));
    OK(vm_fork(c[0], &c[4]));          /* a clone of a clone */
    CHECK_EQ(state_of(c[3], counts(backend)), later);
    go(c[0], 40);
    CHECK_EQ(state_of(c[0], counts(backend)), later);
    CHECK_EQ(state_of(c[1], counts(backend)), at);
    CHECK_EQ(state_of(c[4], counts(backend)), at);
    go(c[4], 40);
    CHECK_EQ(state_of(c[4], counts(backend)), later);
    CHECK_EQ(ask(c[1]), 2);
    CHECK_EQ(ask(c[1]), 3);
    CHECK_EQ(ask(m), 2);
    CHECK_EQ(ask(c[2]), 2);
    vm_snapshot *s = NULL, *t = NULL;
    OK(vm_snapshot_take(c[2], &s));    /* snapshots of a clone, which is a private mapping */
    uint64_t third = state_of(c[2], counts(backend));
    go(c[2], 64);
    OK(vm_snapshot_take(c[2], &t));
    OK(vm_snapshot_restore(c[2], s));
    CHECK_EQ(state_of(c[2], counts(backend)), third);
    OK(vm_fork(c[2], &c[5]));
    OK(vm_snapshot_restore(c[2], t));
    CHECK_EQ(state_of(c[5], counts(backend)), third);
    for (unsigned i = 0; i < 5; i++)
        vm_destroy(c[i]);
    CHECK_EQ(destroyed, 5);
    go(m, 10);
    vm_destroy(m);
    go(c[5], 10);                      /* outlives its parents */
    vm_destroy(c[5]);
    CHECK_EQ(destroyed, 7);
}

EACH_BACKEND(hundreds_of_clones)
{
    enum { MANY = 200 };
    static vm_machine *c[MANY];
    unsigned many = backend == VM_BACKEND_KVM ? 20 : MANY;
    vm_machine *m = make(backend);
    go(m, 100);
    uint64_t at = state_of(m, counts(backend));
    for (unsigned i = 0; i < many; i++)
        OK(vm_fork(m, &c[i]));
    for (unsigned i = 0; i < many; i += 7)
        CHECK_EQ(state_of(c[i], counts(backend)), at);
    for (unsigned i = 0; i < many; i++)
        vm_destroy(c[i]);
    vm_destroy(m);
}
