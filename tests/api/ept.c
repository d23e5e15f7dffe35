/* ept.c - views of guest-physical memory: what they forbid, what can be done about it, their bits, switching. */
#include "../backends.h"

#define CODE 0x1000u
#define OTHER 0x3000u
#define DATA 0x5000u
#define MIB2 UINT64_C(0x200000)
#define GIB1 UINT64_C(0x40000000)

/* mov [rdi], eax; mov ebx, [rdi]; inc ecx; hlt */
static const uint8_t store_load[] = { 0x89, 0x07, 0x8b, 0x1f, 0xff, 0xc1, 0xf4 };

static vm_machine *ept_machine(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.mmu = "ept";
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x800000, VM_PROT_RWX, NULL));
    OK(vm_write(m, CODE, store_load, sizeof store_load));
    return m;
}

static void start(vm_machine *m, uint64_t rip, uint64_t rax, uint64_t rdi)
{
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_regs r = VM_REGS_INIT;
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_regs(cpu, &r));
    r.rip = rip, r.rax = rax, r.rdi = rdi, r.rcx = 0, r.rbx = 0, r.rsp = 0x8000;
    OK(vm_vcpu_set_regs(cpu, &r));
}

static uint64_t reg(vm_machine *m, int id)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), id, &v, 8));
    return v;
}

static uint32_t word(vm_machine *m, uint64_t gpa)
{
    uint32_t v = 0;
    OK(vm_read(m, gpa, &v, 4));
    return v;
}

static vm_exit go(vm_machine *m)
{
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    return e;
}

/* ---- without a callback ---- */

EACH_BACKEND(forbidden_write_is_an_exit)
{
    vm_machine *m = ept_machine(backend);
    OK(vm_ept_protect(m, 0, DATA, 4096, VM_PROT_RX));
    start(m, CODE, 0x77, DATA);
    for (int i = 0; i < 2; i++) {      /* tried again, forbidden again */
        vm_exit e = go(m);
        CHECK_EQ(e.reason, VM_EXIT_VIOLATION);
        CHECK_EQ(e.mmio.gpa, DATA);
        CHECK_EQ(e.mmio.width, 4);
        CHECK(e.mmio.is_write && !e.mmio.is_fetch);
        CHECK_EQ(e.mmio.data, 0x77);
        CHECK_EQ(word(m, DATA), 0);
        if (backend != VM_BACKEND_KVM)
            CHECK_EQ(e.rip, CODE);
    }
    OK(vm_ept_protect(m, 0, DATA, 4096, VM_PROT_RWX));
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);
    CHECK_EQ(word(m, DATA), 0x77);
    CHECK_EQ(reg(m, VM_REG_RBX), 0x77);
    CHECK_EQ(reg(m, VM_REG_RCX), 1);
    vm_destroy(m);
}

/* ---- answers of a callback, by table ---- */

typedef struct script {
    vm_prot prot;                      /* of the page */
    vm_ept_action action[4];           /* of the first, second... violation */
    uint64_t value;                    /* what EMULATE gives */
    unsigned calls;
    vm_exit_reason reason;
    uint32_t memory, rbx;              /* afterwards */
} script;

typedef struct watch { const script *s; unsigned calls; vm_machine *m; vm_prot access[8]; uint64_t value[8]; } watch;

static vm_ept_action answer(void *user, vm_vcpu *cpu, vm_ept_violation *v)
{
    watch *w = user;
    CHECK(vm_vcpu_machine(cpu) == w->m);
    CHECK_EQ(v->gpa, DATA);
    CHECK_EQ(v->view, 0);
    CHECK_EQ(v->allowed, w->s->prot);
    CHECK(w->calls < 4);
    w->access[w->calls] = v->access;
    w->value[w->calls] = v->value;
    vm_ept_action a = w->s->action[w->calls++];
    if (a == VM_EPT_RETRY)
        OK(vm_ept_protect(w->m, 0, DATA, 4096, VM_PROT_RWX));
    v->value = w->s->value;
    return a;
}

static const script scripts[] = {
    { VM_PROT_RX, { VM_EPT_STOP }, 0, 1, VM_EXIT_VIOLATION, 0x11, 0 },
    { VM_PROT_RX, { VM_EPT_RETRY }, 0, 1, VM_EXIT_HALT, 0x77, 0x77 },
    { VM_PROT_RX, { VM_EPT_EMULATE }, 0, 1, VM_EXIT_HALT, 0x11, 0x11 },                       /* the write is dropped */
    { VM_PROT_RX, { VM_EPT_STEP }, 0, 1, VM_EXIT_HALT, 0x77, 0x77 },
    { VM_PROT_NONE, { VM_EPT_STEP, VM_EPT_STEP }, 0, 2, VM_EXIT_HALT, 0x77, 0x77 },           /* each instruction asks */
    { VM_PROT_NONE, { VM_EPT_STEP, VM_EPT_EMULATE }, 0x5555, 2, VM_EXIT_HALT, 0x77, 0x5555 },
    { VM_PROT_NONE, { VM_EPT_EMULATE, VM_EPT_EMULATE }, 0x99, 2, VM_EXIT_HALT, 0x11, 0x99 },
    { VM_PROT_NONE, { VM_EPT_EMULATE, VM_EPT_STOP }, 0x99, 2, VM_EXIT_VIOLATION, 0x11, 0 },
    { VM_PROT_NONE, { VM_EPT_EMULATE, VM_EPT_RETRY }, 0x99, 2, VM_EXIT_HALT, 0x11, 0x11 },
};

EACH_BACKEND(answers)
{
    for (unsigned i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        const script *s = &scripts[i];
        vm_machine *m = ept_machine(backend);
        watch w = { .s = s, .m = m };
        uint64_t count = 0;
        OK(vm_write(m, DATA, "\x11\0\0\0", 4));
        OK(vm_ept_on_violation(m, answer, &w));
        OK(vm_ept_protect(m, 0, DATA, 4096, s->prot));
        start(m, CODE, 0x77, DATA);
        vm_exit e = go(m);
        if (e.reason != s->reason || w.calls != s->calls || word(m, DATA) != s->memory || (s->rbx && reg(m, VM_REG_RBX) != s->rbx))
            FAIL("script %u: exit %s, %u calls, memory %x, rbx %llx", i, vm_exit_name((int)e.reason), w.calls, word(m, DATA),
                 (unsigned long long)reg(m, VM_REG_RBX));
        CHECK_EQ(w.access[0], VM_PROT_W);
        CHECK_EQ(w.value[0], 0x77);
        OK(vm_stats(m, "violations", &count));
        CHECK_EQ(count, s->calls);
        uint64_t dirty = 0;            /* what has been written, however it was allowed */
        if (backend != VM_BACKEND_KVM) {
            OK(vm_ept_fetch(m, 0, DATA, 4096, NULL, &dirty));
            CHECK_EQ(dirty, s->memory == 0x77);
        }
        vm_destroy(m);
    }
}

/* ---- fetches ---- */

static vm_ept_action fetch_answer(void *user, vm_vcpu *cpu, vm_ept_violation *v)
{
    unsigned *calls = user;
    uint64_t rip = 0;
    OK(vm_vcpu_read_reg(cpu, VM_REG_RIP, &rip, 8));
    CHECK_EQ(v->access, VM_PROT_X);
    CHECK_EQ(v->gpa >> 12, OTHER >> 12);
    CHECK_EQ(rip >> 12, OTHER >> 12);
    ++*calls;
    return VM_EPT_STEP;
}

EACH_BACKEND(forbidden_fetch)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("memory slots do not keep readable memory from being executed");
    vm_machine *m = ept_machine(backend);
    unsigned calls = 0;
    /* a loop of 3000 to have it translated, then twice inc eax on a page that must not be executed; back; hlt */
    static const uint8_t loop[] = { 0xb9, 0xb8, 0x0b, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xe9, 0xf2, 0x1f, 0, 0 };
    static const uint8_t there[] = { 0xff, 0xc0, 0xff, 0xc0, 0xe9, 0xf7, 0xe0, 0xff, 0xff };
    OK(vm_write(m, CODE, loop, sizeof loop));
    OK(vm_write(m, OTHER, there, sizeof there));
    OK(vm_write(m, CODE + 0x100, "\xf4", 1));
    start(m, CODE, 0, 0);
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);                /* all of it is known and translated now */
    CHECK_EQ(reg(m, VM_REG_RAX), 2);
    OK(vm_ept_protect(m, 0, OTHER, 4096, VM_PROT_RW));
    start(m, CODE, 0, 0);
    vm_exit e = go(m);
    CHECK_EQ(e.reason, VM_EXIT_VIOLATION);
    CHECK(e.mmio.is_fetch);
    CHECK_EQ(e.mmio.gpa, OTHER);
    CHECK_EQ(e.rip, OTHER);
    CHECK_EQ(reg(m, VM_REG_RAX), 0);
    OK(vm_ept_on_violation(m, fetch_answer, &calls));
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);
    CHECK_EQ(reg(m, VM_REG_RAX), 2);
    CHECK_EQ(calls, 3);                                  /* once for each instruction there */
    OK(vm_ept_protect(m, 0, OTHER, 4096, VM_PROT_RX));
    start(m, CODE, 0, 0);
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);
    CHECK_EQ(calls, 3);
    vm_destroy(m);
}

/* ---- views ---- */

EACH_BACKEND(switching_views)
{
    vm_machine *m = ept_machine(backend);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    unsigned closed = 0, copy = 0;
    OK(vm_ept_create(m, VM_EPT_NONE, 0, &closed));
    CHECK(closed != 0);
    OK(vm_ept_protect(m, closed, DATA, 8192, VM_PROT_NONE));
    OK(vm_ept_create(m, closed, 4096, &copy));
    OK(vm_ept_protect(m, copy, DATA, 4096, VM_PROT_RWX));
    for (int round = 0; round < 3; round++) {
        CHECK_EQ(vm_ept_current(cpu), 0);
        start(m, CODE, 0x100 + round, DATA);
        CHECK_EQ(go(m).reason, VM_EXIT_HALT);
        OK(vm_ept_select(cpu, closed));
        CHECK_EQ(vm_ept_current(cpu), closed);
        start(m, CODE, 0x200, DATA);
        CHECK_EQ(go(m).reason, VM_EXIT_VIOLATION);
        CHECK_EQ(word(m, DATA), 0x100 + round);
        OK(vm_ept_select(cpu, copy));                    /* the same access goes through now */
        CHECK_EQ(go(m).reason, VM_EXIT_HALT);
        CHECK_EQ(word(m, DATA), 0x200);
        start(m, CODE, 0x300, DATA + 4096);
        CHECK_EQ(go(m).reason, VM_EXIT_VIOLATION);
        OK(vm_ept_select(cpu, 0));
        CHECK_EQ(go(m).reason, VM_EXIT_HALT);
        CHECK_EQ(word(m, DATA + 4096), 0x300);
    }
    OK(vm_ept_select(cpu, closed));
    REFUSED(vm_ept_destroy(m, closed), VM_E_BUSY);
    OK(vm_ept_select(cpu, 0));
    OK(vm_ept_destroy(m, closed));
    REFUSED(vm_ept_select(cpu, closed), VM_E_NOTFOUND);
    vm_destroy(m);
}

static vm_ept_action switch_view(void *user, vm_vcpu *cpu, vm_ept_violation *v)
{
    unsigned *to = user;
    CHECK(v->view != *to);
    OK(vm_ept_select(cpu, *to));
    return VM_EPT_RETRY;
}

EACH_BACKEND(switching_in_the_callback)
{
    vm_machine *m = ept_machine(backend);
    unsigned open = 0;
    OK(vm_ept_create(m, VM_EPT_NONE, MIB2, &open));
    OK(vm_ept_protect(m, 0, DATA, 4096, VM_PROT_NONE));
    OK(vm_ept_on_violation(m, switch_view, &open));
    start(m, CODE, 0x42, DATA);
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);
    CHECK_EQ(vm_ept_current(vm_vcpu_get(m, 0)), open);
    CHECK_EQ(reg(m, VM_REG_RBX), 0x42);
    vm_destroy(m);
}

/* ---- entries: sizes, splitting, joining, bits ---- */

static vm_ept_entry entry_at(vm_machine *m, unsigned view, uint64_t gpa)
{
    vm_ept_entry e = VM_EPT_ENTRY_INIT;
    OK(vm_ept_get(m, view, gpa, &e));
    return e;
}

TEST(splitting_and_joining)
{
    static const struct { uint64_t gpa, bytes; vm_prot prot; uint64_t at; vm_prot is; uint64_t size; } steps[] = {
        { 0, GIB1, VM_PROT_RX, 0x1000, VM_PROT_RX, GIB1 },
        { MIB2, MIB2, VM_PROT_R, MIB2 + 0x5000, VM_PROT_R, MIB2 },           /* 1 GiB split */
        { 0, 4096, VM_PROT_NONE, 0, VM_PROT_NONE, 4096 },                    /* 2 MiB split */
        { MIB2 + 0x1000, 0x2000, VM_PROT_RWX, MIB2, VM_PROT_R, 4096 },
        { 0, 4096, VM_PROT_RX, 0x3000, VM_PROT_RX, MIB2 },                   /* joined again */
        { MIB2, MIB2, VM_PROT_RX, 0, VM_PROT_RX, GIB1 },                     /* all of it */
        { GIB1 - 4096, 8192, VM_PROT_W, GIB1, VM_PROT_W, 4096 },             /* across the end of a gigabyte */
        { GIB1 * 511, GIB1 * 2, VM_PROT_R, GIB1 * 512, VM_PROT_R, GIB1 },    /* and of a table */
    };
    vm_machine *m = ept_machine(VM_BACKEND_INTERP);
    for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
        OK(vm_ept_protect(m, 0, steps[i].gpa, steps[i].bytes, steps[i].prot));
        vm_ept_entry e = entry_at(m, 0, steps[i].at);
        if (e.prot != steps[i].is || e.page_bytes != steps[i].size)
            FAIL("step %u: prot %d, %llx bytes", i, (int)e.prot, (unsigned long long)e.page_bytes);
    }
    CHECK_EQ(entry_at(m, 0, GIB1 - 8192).prot, VM_PROT_RX);
    CHECK_EQ(entry_at(m, 0, GIB1 + 4096).prot, VM_PROT_RWX);
    CHECK_EQ(entry_at(m, 0, GIB1 * 3).page_bytes, GIB1);
    vm_destroy(m);
}

static void run_bits(vm_backend backend, uint64_t page_bytes)
{
    vm_machine *m = ept_machine(backend);
    unsigned view = 0;
    uint64_t accessed[2], dirty[2];
    OK(vm_ept_create(m, VM_EPT_NONE, page_bytes, &view));
    OK(vm_ept_select(vm_vcpu_get(m, 0), view));
    OK(vm_ept_protect(m, view, 0x6000, 4096, VM_PROT_RX));
    start(m, CODE, 7, DATA);
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);
    start(m, CODE, 7, 0x6000);
    CHECK_EQ(go(m).reason, VM_EXIT_VIOLATION);           /* neither accessed nor dirty */
    CHECK_EQ(entry_at(m, view, DATA).dirty, true);
    CHECK_EQ(entry_at(m, view, DATA).page_bytes, 4096);  /* view of larger pages: split by the protection */
    OK(vm_ept_fetch(m, view, 0, 128 * 4096, accessed, dirty));
    CHECK_EQ(accessed[0] & 0x6a, 0x22);
    CHECK_EQ(dirty[0] & 0x6a, 0x20);
    CHECK_EQ(entry_at(m, view, DATA).dirty, false);
    OK(vm_ept_fetch(m, view, 0, 128 * 4096, accessed, NULL));
    CHECK_EQ(accessed[0] | accessed[1], 0);
    OK(vm_ept_select(vm_vcpu_get(m, 0), view));
    start(m, CODE, 8, DATA);
    CHECK_EQ(go(m).reason, VM_EXIT_HALT);                /* seen again: the TLB has been flushed */
    OK(vm_ept_fetch(m, view, DATA, 4096, accessed, dirty));
    CHECK_EQ(accessed[0], 1);
    CHECK_EQ(dirty[0], 1);
    vm_destroy(m);
}

EACH_BACKEND(accessed_and_dirty)
{
    if (backend == VM_BACKEND_KVM) {
        vm_machine *m = ept_machine(backend);
        uint64_t bits = 0;
        REFUSED(vm_ept_fetch(m, 0, 0, 4096, &bits, NULL), VM_E_UNSUPPORTED);
        vm_destroy(m);
        return;
    }
    run_bits(backend, 4096);
    run_bits(backend, 0);
}

/* ---- misuse ---- */

TEST(ept_misuse)
{
    vm_machine *m = ept_machine(VM_BACKEND_INTERP);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    unsigned view = 0;
    vm_ept_entry e = VM_EPT_ENTRY_INIT, small = { .size = 2 };
    REFUSED(vm_ept_create(NULL, 0, 0, &view), VM_E_INVALID);
    REFUSED(vm_ept_create(m, 0, 0, NULL), VM_E_INVALID);
    REFUSED(vm_ept_create(m, 0, 8192, &view), VM_E_INVALID);
    REFUSED(vm_ept_create(m, 9, 0, &view), VM_E_NOTFOUND);
    REFUSED(vm_ept_destroy(m, 0), VM_E_INVALID);
    REFUSED(vm_ept_destroy(m, 9), VM_E_NOTFOUND);
    REFUSED(vm_ept_destroy(m, 4000000000u), VM_E_NOTFOUND);
    REFUSED(vm_ept_protect(m, 9, 0, 4096, VM_PROT_R), VM_E_NOTFOUND);
    REFUSED(vm_ept_protect(m, 0, 1, 4096, VM_PROT_R), VM_E_INVALID);
    REFUSED(vm_ept_protect(m, 0, 0, 0, VM_PROT_R), VM_E_INVALID);
    REFUSED(vm_ept_protect(m, 0, 0, 4096, (vm_prot)8), VM_E_INVALID);
    REFUSED(vm_ept_protect(m, 0, ~UINT64_C(0xfff), 4096, VM_PROT_R), VM_E_INVALID);
    REFUSED(vm_ept_select(NULL, 0), VM_E_INVALID);
    REFUSED(vm_ept_select(cpu, 1), VM_E_NOTFOUND);
    REFUSED(vm_ept_get(m, 0, 0, NULL), VM_E_INVALID);
    REFUSED(vm_ept_get(m, 0, 0, &small), VM_E_INVALID);
    REFUSED(vm_ept_get(m, 0, ~UINT64_C(0), &e), VM_E_INVALID);
    REFUSED(vm_ept_fetch(m, 0, 5, 4096, NULL, NULL), VM_E_INVALID);
    CHECK_EQ(vm_ept_current(NULL), 0);
    for (unsigned i = 1; i < VM_EPT_MAX_VIEWS; i++)
        OK(vm_ept_create(m, VM_EPT_NONE, 0, &view));
    REFUSED(vm_ept_create(m, VM_EPT_NONE, 0, &view), VM_E_NOMEM);
    OK(vm_mmu_select(m, "tlb"));
    REFUSED(vm_ept_create(m, 0, 0, &view), VM_E_UNSUPPORTED);
    REFUSED(vm_ept_protect(m, 0, 0, 4096, VM_PROT_R), VM_E_UNSUPPORTED);
    REFUSED(vm_ept_on_violation(m, NULL, NULL), VM_E_UNSUPPORTED);
    vm_destroy(m);
}
