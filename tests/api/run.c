/* run.c - vm_vcpu_run and the registers: exits, budgets, until, kicks, deadlines, exception exits, completion of accesses. */
#include "../backends.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#define MACHINE(mode, bytes) bare_machine(backend, mode, bytes, sizeof bytes - 1)
#define DONE(cpu) vm_destroy(vm_vcpu_machine(cpu))

static uint64_t get(vm_vcpu *cpu, int reg)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(cpu, reg, &v, vm_reg_size(reg)));
    return v;
}

static void set(vm_vcpu *cpu, int reg, uint64_t v) { OK(vm_vcpu_write_reg(cpu, reg, &v, vm_reg_size(reg))); }

static vm_exit run(vm_vcpu *cpu, uint64_t budget)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.max_instructions = budget;
    o.deadline_ns = TEST_SECONDS(10);
    OK(vm_vcpu_run(cpu, &o, &e));
    return e;
}

/* A loop with calls, branches, a repeat and memory: ends after a known number of instructions.
 *  0: mov ecx, 50         5: push rcx   6: call 0x18   b: pop rcx   c: loop-> dec ecx; jnz 5     10: hlt
 * 18: mov edi, 0x4000  1d: mov ecx, 3  22: rep stosb  24: test al, 1  26: jz 2a  28: inc eax(2)  2a: inc eax  2c: ret */
static const char PROGRAM[] =
    "\xb9\x32\x00\x00\x00" "\x51" "\xe8\x0d\x00\x00\x00" "\x59" "\xff\xc9" "\x75\xf5" "\xf4" "\x90\x90\x90\x90\x90\x90\x90"
    "\xbf\x00\x40\x00\x00" "\xb9\x03\x00\x00\x00" "\xf3\xaa" "\xa8\x01" "\x74\x02" "\xff\xc0" "\xff\xc0" "\xc3";

EACH_BACKEND(budget_is_exact_at_every_n)
{
    uint64_t counts = 0;
    need_exact_budget(backend);
    OK(vm_query(backend, "retired", &counts));
    if (!counts)
        test_skip("backend %s counts only what runs under a budget", vm_backend_name(backend));
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, PROGRAM);
    /* The whole run tells how many there are; each iteration of REP counts one or the instruction does: the sum of
     * single steps must tell the same. */
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    uint64_t total = vm_vcpu_retired(cpu), steps = 0;
    static uint64_t rip[4096];
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    set(cpu, VM_REG_RSP, 0x8000);
    for (;; steps++) {
        CHECK(steps < 4000);
        uint64_t before = vm_vcpu_retired(cpu);
        rip[steps] = get(cpu, VM_REG_RIP);
        e = run(cpu, 1);
        CHECK_EQ(vm_vcpu_retired(cpu) - before, 1);
        if (e.reason != VM_EXIT_BUDGET)
            break;
    }
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(steps + 1, total);
    for (uint64_t n = 1; n < total; n += n < 40 ? 1 : 13) {
        OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
        set(cpu, VM_REG_RSP, 0x8000);
        uint64_t before = vm_vcpu_retired(cpu);
        e = run(cpu, n);
        CHECK_EQ(e.reason, VM_EXIT_BUDGET);
        CHECK_EQ(vm_vcpu_retired(cpu) - before, n);
        CHECK_EQ(e.rip, rip[n]);
        CHECK_EQ(get(cpu, VM_REG_RIP), rip[n]);
        e = run(cpu, total - n);                        /* the last one is the HLT: halt wins over budget */
        CHECK(e.reason == VM_EXIT_HALT || e.reason == VM_EXIT_BUDGET);
        CHECK_EQ(e.rip, 0x11);
    }
    DONE(cpu);
}

EACH_BACKEND(halt_leaves_rip_after_it)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x90\xf4\x90\xf4");
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 2);
    e = run(cpu, 0);                                    /* goes on behind it */
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 4);
    DONE(cpu);
}

EACH_BACKEND(until)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xff\xc0\xff\xc0\xff\xc0\xeb\xf8");
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.has_until = true;
    o.until = 4;
    for (unsigned i = 0; i < 3; i++) {                  /* starting on it, one round is made first */
        int status = vm_vcpu_run(cpu, &o, &e);
        if (status == VM_E_UNSUPPORTED)
            test_skip("no `until` on this backend");
        OK(status);
        CHECK_EQ(e.reason, VM_EXIT_UNTIL);
        CHECK_EQ(e.rip, 4);
        CHECK_EQ(get(cpu, VM_REG_RAX), 2 + 3 * i);
    }
    DONE(cpu);
}

EACH_BACKEND(kick_before_the_run_is_sticky_and_used_once)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x90\xf4");
    vm_vcpu_kick(cpu);
    vm_vcpu_kick(cpu);
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    CHECK_EQ(e.rip, 0);
    e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    DONE(cpu);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *kick_later(void *cpu)
{
    usleep(20000);
    vm_vcpu_kick(cpu);
    return NULL;
}

static void kick_program(vm_backend backend, const void *code, size_t bytes)
{
    vm_vcpu *cpu = bare_machine(backend, VM_MODE_FLAT64, code, bytes);
    for (int i = 0; i < 5; i++) {
        pthread_t t;
        CHECK(pthread_create(&t, NULL, kick_later, cpu) == 0);
        uint64_t start = now();
        vm_exit e = run(cpu, 0);
        pthread_join(t, NULL);
        CHECK_EQ(e.reason, VM_EXIT_KICK);
        CHECK(now() - start < 5000000000u);
    }
    DONE(cpu);
}

EACH_BACKEND(kick_from_another_thread_ends_a_tight_loop) { kick_program(backend, "\xeb\xfe", 2); }
EACH_BACKEND(kick_ends_a_loop_of_calls) { kick_program(backend, "\xe8\x02\x00\x00\x00\xeb\xf9\xc3", 8); }
EACH_BACKEND(kick_ends_an_indirect_loop) { kick_program(backend, "\x31\xc0\xff\xe0", 4); }
/* std; mov rcx, -1; mov edi, 0x4000; rep with a huge count that never leaves RAM: rep lodsb with rsi fixed is not possible,
 * so a loop of long repeats */
EACH_BACKEND(kick_ends_repeats)
{
    kick_program(backend, "\xb9\x00\x80\x00\x00\xbf\x00\x10\x00\x00\xf3\xaa\xeb\xf2", 14);
}

static vm_vcpu *kicked;
static void on_alarm(int signal) { (void)signal; vm_vcpu_kick(kicked); }

EACH_BACKEND(kick_from_a_signal_handler)
{
    kicked = MACHINE(VM_MODE_FLAT64, "\xeb\xfe");
    struct sigaction sa = { .sa_handler = on_alarm };
    sigaction(SIGALRM, &sa, NULL);
    ualarm(20000, 0);
    CHECK_EQ(run(kicked, 0).reason, VM_EXIT_KICK);
    DONE(kicked);
}

EACH_BACKEND(deadline)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xeb\xfe");
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.deadline_ns = 30000000;
    uint64_t start = now();
    OK(vm_vcpu_run(cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    CHECK(now() - start >= 29000000);
    CHECK(now() - start < 5000000000u);
    o.deadline_ns = 1;
    OK(vm_vcpu_run(cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    DONE(cpu);
}

static int slow_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)cpu, (void)offset, (void)width, (void)value;
    usleep(100);
    return 0;
}

/* One instruction that would go on for ten seconds and retires nothing meanwhile. */
EACH_BACKEND(deadline_inside_a_repeat)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf3\x6e\xf4");         /* rep outsb; hlt */
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    ops.write = slow_write;
    OK(vm_map_pio(vm_vcpu_machine(cpu), 0x10, 1, &ops, NULL, NULL));
    set(cpu, VM_REG_RDX, 0x10);
    set(cpu, VM_REG_RCX, 60000);
    o.deadline_ns = 50000000;
    uint64_t start = now();
    OK(vm_vcpu_run(cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    CHECK(now() - start < 3000000000u);
    CHECK_EQ(get(cpu, VM_REG_RIP), 0);
    CHECK_EQ(get(cpu, VM_REG_RSI) + get(cpu, VM_REG_RCX), 60000);
    DONE(cpu);
}

EACH_BACKEND(run_misuse)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4\xf4\xf4\xf4");
    struct { vm_run_options o; unsigned char tail[16]; } newer;
    vm_exit e = VM_EXIT_INIT;
    memset(&newer, 0, sizeof newer);
    newer.o.size = sizeof newer;
    OK(vm_vcpu_run(cpu, &newer.o, &e));
    newer.tail[3] = 1;
    REFUSED(vm_vcpu_run(cpu, &newer.o, &e), VM_E_INVALID);
    newer.o.size = 0;
    REFUSED(vm_vcpu_run(cpu, &newer.o, &e), VM_E_INVALID);
    e.size = 1;
    REFUSED(vm_vcpu_run(cpu, NULL, &e), VM_E_INVALID);
    OK(vm_vcpu_run(cpu, NULL, NULL));
    CHECK_EQ(get(cpu, VM_REG_RIP), 2);
    DONE(cpu);
}

EACH_BACKEND(exit_record_tail_is_left_alone)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    struct { vm_exit e; unsigned char tail[16]; } x;
    memset(&x, 0, sizeof x);
    x.e.size = sizeof x;
    OK(vm_vcpu_run(cpu, NULL, &x.e));
    CHECK_EQ(x.e.reason, VM_EXIT_HALT);
    CHECK_EQ(x.e.size, sizeof x);
    for (unsigned i = 0; i < sizeof x.tail; i++)
        CHECK_EQ(x.tail[i], 0);
    DONE(cpu);
}

/* ---- registers ---- */
EACH_BACKEND(every_register_by_number)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    unsigned char image[64], again[64];
    for (int id = VM_REG_NONE + 1; id < VM_REG_COUNT; id++) {
        size_t bytes = vm_reg_size(id);
        CHECK(bytes > 0 && bytes <= 32);
        CHECK(vm_reg_name(id) != NULL);
        CHECK_EQ(vm_reg_find(vm_reg_name(id)), id);
        memset(image, 0xee, sizeof image);
        OK(vm_vcpu_read_reg(cpu, id, image, bytes));
        CHECK(image[bytes] == 0xee);
        REFUSED(vm_vcpu_read_reg(cpu, id, image, bytes + 1), VM_E_INVALID);
        REFUSED(vm_vcpu_read_reg(cpu, id, image, bytes - 1), VM_E_INVALID);
        REFUSED(vm_vcpu_write_reg(cpu, id, image, bytes + 1), VM_E_INVALID);
        REFUSED(vm_vcpu_read_reg(cpu, id, NULL, bytes), VM_E_INVALID);
        REFUSED(vm_vcpu_write_reg(cpu, id, NULL, bytes), VM_E_INVALID);
        int status = vm_vcpu_write_reg(cpu, id, image, bytes);   /* what was read can be written back */
        if (status)
            FAIL("%s does not take its own value: %s", vm_reg_name(id), vm_errmsg());
        OK(vm_vcpu_read_reg(cpu, id, again, bytes));
        if (memcmp(image, again, bytes))
            FAIL("%s changed", vm_reg_name(id));
    }
    CHECK_EQ(vm_reg_size(VM_REG_NONE), 0);
    CHECK_EQ(vm_reg_size(VM_REG_COUNT), 0);
    CHECK_EQ(vm_reg_size(-1), 0);
    CHECK(vm_reg_name(-1) == NULL && vm_reg_name(VM_REG_COUNT) == NULL);
    CHECK_EQ(vm_reg_find("RaX"), VM_REG_RAX);
    CHECK_EQ(vm_reg_find("rax "), VM_REG_NONE);
    CHECK_EQ(vm_reg_find(NULL), VM_REG_NONE);
    REFUSED(vm_vcpu_read_reg(cpu, VM_REG_COUNT, image, 8), VM_E_NOTFOUND);
    REFUSED(vm_vcpu_write_reg(cpu, -5, image, 8), VM_E_NOTFOUND);
    DONE(cpu);
}

EACH_BACKEND(general_and_vector_registers_hold_values)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    unsigned char ymm[32], back[32];
    for (int i = 0; i < 16; i++) {
        set(cpu, VM_REG_RAX + i, UINT64_C(0x0123456789abcde0) + (unsigned)i);
        memset(ymm, 0x10 + i, sizeof ymm);
        OK(vm_vcpu_write_reg(cpu, VM_REG_YMM0 + i, ymm, 32));
    }
    for (int i = 0; i < 16; i++) {
        CHECK_EQ(get(cpu, VM_REG_RAX + i), UINT64_C(0x0123456789abcde0) + (unsigned)i);
        memset(ymm, 0x10 + i, sizeof ymm);
        OK(vm_vcpu_read_reg(cpu, VM_REG_YMM0 + i, back, 32));
        CHECK(!memcmp(ymm, back, 32));
        memset(ymm, 0x80, 16);
        OK(vm_vcpu_write_reg(cpu, VM_REG_XMM0 + i, ymm, 16));    /* leaves the upper half */
        OK(vm_vcpu_read_reg(cpu, VM_REG_YMM0 + i, back, 32));
        CHECK(!memcmp(ymm, back, 32));
    }
    DONE(cpu);
}

EACH_BACKEND(bulk_register_structs)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    vm_regs r = VM_REGS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    vm_fpu f = VM_FPU_INIT;
    OK(vm_vcpu_get_regs(cpu, &r));
    CHECK_EQ(r.rflags, 2);
    CHECK_EQ(r.rsp, 0x8000);
    OK(vm_vcpu_get_sregs(cpu, &s));
    CHECK_EQ(s.cpl, 0);
    CHECK_EQ(s.efer & 0x500, 0x500);
    CHECK_EQ(s.cr0 & 1, 1);
    OK(vm_vcpu_set_sregs(cpu, &s));
    OK(vm_vcpu_get_fpu(cpu, &f));
    CHECK_EQ(f.mxcsr, 0x1f80);
    OK(vm_vcpu_set_fpu(cpu, &f));
    r.r15 = 42;
    OK(vm_vcpu_set_regs(cpu, &r));
    CHECK_EQ(get(cpu, VM_REG_R15), 42);
    REFUSED(vm_vcpu_get_regs(cpu, NULL), VM_E_INVALID);
    REFUSED(vm_vcpu_set_regs(cpu, NULL), VM_E_INVALID);
    REFUSED(vm_vcpu_get_sregs(cpu, NULL), VM_E_INVALID);
    REFUSED(vm_vcpu_set_sregs(cpu, NULL), VM_E_INVALID);
    REFUSED(vm_vcpu_get_fpu(cpu, NULL), VM_E_INVALID);
    REFUSED(vm_vcpu_set_fpu(cpu, NULL), VM_E_INVALID);
    r.size = 2;
    REFUSED(vm_vcpu_set_regs(cpu, &r), VM_E_INVALID);
    REFUSED(vm_vcpu_get_regs(cpu, &r), VM_E_INVALID);
    struct { vm_regs r; uint64_t tail[4]; } newer;
    memset(&newer, 0, sizeof newer);
    newer.r.size = sizeof newer;
    newer.tail[3] = 0x99;
    OK(vm_vcpu_get_regs(cpu, &newer.r));
    CHECK_EQ(newer.tail[3], 0x99);
    REFUSED(vm_vcpu_set_regs(cpu, &newer.r), VM_E_INVALID);
    DONE(cpu);
}

EACH_BACKEND(impossible_system_registers)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    vm_sregs good = VM_SREGS_INIT, s;
    OK(vm_vcpu_get_sregs(cpu, &good));
    s = good;
    s.cr0 &= ~UINT64_C(1);                              /* paging without protection */
    s.cr0 |= UINT64_C(1) << 31;
    REFUSED(vm_vcpu_set_sregs(cpu, &s), VM_E_INVALID);
    s = good;
    s.cr0 |= UINT64_C(1) << 40;
    REFUSED(vm_vcpu_set_sregs(cpu, &s), VM_E_INVALID);
    s = good;
    s.cr4 |= UINT64_C(1) << 63;
    REFUSED(vm_vcpu_set_sregs(cpu, &s), VM_E_INVALID);
    s = good;
    s.efer |= UINT64_C(1) << 62;
    REFUSED(vm_vcpu_set_sregs(cpu, &s), VM_E_INVALID);
    s = good;
    s.fs.base = UINT64_C(0x1234000000000000);           /* non-canonical */
    REFUSED(vm_vcpu_set_sregs(cpu, &s), VM_E_INVALID);
    s = good;
    s.cr3 = UINT64_MAX;
    REFUSED(vm_vcpu_set_sregs(cpu, &s), VM_E_INVALID);
    vm_sregs after = VM_SREGS_INIT;
    OK(vm_vcpu_get_sregs(cpu, &after));
    CHECK(!memcmp(&after, &good, sizeof good));         /* nothing changed */
    REFUSED(vm_vcpu_set_mode(cpu, (vm_mode)99), VM_E_INVALID);
    DONE(cpu);
}

EACH_BACKEND(msrs)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    uint64_t v = 0;
    OK(vm_vcpu_set_msr(cpu, 0xc0000082, UINT64_C(0xffff800000001000)));      /* LSTAR */
    OK(vm_vcpu_get_msr(cpu, 0xc0000082, &v));
    CHECK_EQ(v, UINT64_C(0xffff800000001000));
    REFUSED(vm_vcpu_set_msr(cpu, 0xc0000082, UINT64_C(0x8000000000001000)), VM_E_INVALID);
    REFUSED(vm_vcpu_get_msr(cpu, 0xdeadbeef, &v), VM_E_NOTFOUND);
    REFUSED(vm_vcpu_set_msr(cpu, 0xdeadbeef, 0), VM_E_INVALID);
    REFUSED(vm_vcpu_get_msr(cpu, 0x10, NULL), VM_E_INVALID);
    DONE(cpu);
}

/* ---- accesses that nobody handles ---- */
EACH_BACKEND(port_read_completes_with_data)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xe4\x60\x66\xe5\x60\xf4");      /* in al, 0x60; in ax, 0x60; hlt */
    set(cpu, VM_REG_RAX, UINT64_C(0x1111111111111111));
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_IO);
    CHECK_EQ(e.rip, 0);
    CHECK(e.io.port == 0x60 && e.io.width == 1 && !e.io.is_write);
    CHECK_EQ(get(cpu, VM_REG_RIP), 0);
    CHECK_EQ(get(cpu, VM_REG_RAX), UINT64_C(0x1111111111111111));
    e.io.data = 0x5a;
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_IO);
    CHECK_EQ(e.rip, 2);
    CHECK_EQ(e.io.width, 2);
    CHECK_EQ(get(cpu, VM_REG_RAX), UINT64_C(0x111111111111115a));
    OK(vm_vcpu_run(cpu, NULL, NULL));                   /* no record: all ones */
    CHECK_EQ(get(cpu, VM_REG_RAX), UINT64_C(0x111111111111ffff));
    CHECK_EQ(get(cpu, VM_REG_RIP), 6);
    DONE(cpu);
}

EACH_BACKEND(port_write_carries_data)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xba\xf8\x03\x00\x00\xef\xf4");  /* mov edx, 0x3f8; out dx, eax; hlt */
    set(cpu, VM_REG_RAX, UINT64_C(0xffffffff12345678));
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_IO);
    CHECK(e.io.port == 0x3f8 && e.io.width == 4 && e.io.is_write);
    CHECK_EQ(e.io.data, 0x12345678);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    DONE(cpu);
}

EACH_BACKEND(moving_rip_drops_the_completion)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xe4\x60\xf4\xf4");
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_IO);
    vm_regs r = VM_REGS_INIT;
    OK(vm_vcpu_get_regs(cpu, &r));
    r.rip = 3;
    OK(vm_vcpu_set_regs(cpu, &r));
    e.io.data = 0x77;
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 4);
    CHECK_EQ(get(cpu, VM_REG_RAX), 0);
    DONE(cpu);
}

EACH_BACKEND(unmapped_read_exits_then_completes)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x8b\x04\x25\x00\x00\x20\x00\xf4"); /* mov eax, [0x200000]; hlt */
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK_EQ(e.mmio.gpa, 0x200000);
    CHECK_EQ(e.mmio.width, 4);
    CHECK(!e.mmio.is_write && !e.mmio.is_fetch);
    CHECK_EQ(e.mmio.data & 0xffffffff, 0xffffffff);     /* preset */
    CHECK_EQ(e.rip, 0);
    e.mmio.data = 0xabcd;
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(get(cpu, VM_REG_RAX), 0xabcd);
    DONE(cpu);
}

EACH_BACKEND(unmapped_access_is_tried_again_after_mapping)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x8b\x04\x25\x00\x00\x20\x00\x89\x04\x25\x04\x00\x20\x00\xf4");
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    OK(vm_map_ram(vm_vcpu_machine(cpu), 0x200000, 0x1000, VM_PROT_RWX, NULL));
    OK(vm_write(vm_vcpu_machine(cpu), 0x200000, "\x78\x56\x34\x12", 4));
    e.mmio.data = 0xabcd;
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(get(cpu, VM_REG_RAX), 0x12345678);
    uint32_t v = 0;
    OK(vm_read(vm_vcpu_machine(cpu), 0x200004, &v, 4));
    CHECK_EQ(v, 0x12345678);
    DONE(cpu);
}

EACH_BACKEND(write_to_rom_exits_and_is_dropped)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x89\x04\x25\x00\x00\x20\x00\x8b\x1c\x25\x00\x00\x20\x00\xf4");
    OK(vm_map_ram(vm_vcpu_machine(cpu), 0x200000, 0x1000, VM_PROT_RX, NULL));
    OK(vm_write(vm_vcpu_machine(cpu), 0x200000, "\x01\x02\x03\x04", 4));
    set(cpu, VM_REG_RAX, 0x55555555);
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK(e.mmio.is_write);
    CHECK_EQ(e.mmio.data & 0xffffffff, 0x55555555);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(get(cpu, VM_REG_RBX), 0x04030201);
    DONE(cpu);
}

/* Register file behind MMIO exits: completes reads from `memory`, takes writes; counts. */
static vm_exit_reason serve(vm_vcpu *cpu, unsigned char *memory, uint64_t base, unsigned *reads, unsigned *writes)
{
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.max_instructions = 1000;
    for (int i = 0; i < 200; i++) {
        OK(vm_vcpu_run(cpu, &o, &e));
        if (e.reason != VM_EXIT_MMIO)
            return e.reason;
        if (e.mmio.is_write) {
            memcpy(memory + (e.mmio.gpa - base), &e.mmio.data, e.mmio.width);
            ++*writes;
        } else {
            e.mmio.data = 0;
            memcpy(&e.mmio.data, memory + (e.mmio.gpa - base), e.mmio.width);
            ++*reads;
        }
    }
    return e.reason;
}

static vm_vcpu *mmio_machine(vm_backend backend, const void *code, size_t bytes)
{
    vm_vcpu *cpu = bare_machine(backend, VM_MODE_FLAT64, code, bytes);
    vm_io_ops ops = VM_IO_OPS_INIT;
    OK(vm_map_mmio(vm_vcpu_machine(cpu), 0xd0000, 0x1000, &ops, NULL, NULL));
    set(cpu, VM_REG_RSI, 0xd0000);
    set(cpu, VM_REG_RDI, 0xd0100);
    return cpu;
}
#define MMIO_MACHINE(bytes) mmio_machine(backend, bytes, sizeof bytes - 1)

EACH_BACKEND(mmio_read_modify_write_is_one_read_and_one_write)
{
    vm_vcpu *cpu = MMIO_MACHINE("\x01\x06\xf4");        /* add [rsi], eax; hlt */
    unsigned char memory[4096] = { 5 };
    unsigned reads = 0, writes = 0;
    set(cpu, VM_REG_RAX, 37);
    CHECK_EQ(serve(cpu, memory, 0xd0000, &reads, &writes), VM_EXIT_HALT);
    CHECK_EQ(memory[0], 42);
    CHECK_EQ(reads, 1);
    CHECK_EQ(writes, 1);
    CHECK_EQ(get(cpu, VM_REG_RFLAGS) & 0x8d5, 0);
    DONE(cpu);
}

/* The exit e is answered: the guest goes on to HLT and has left a word in memory. The machine's end. */
static void halts_with(vm_vcpu *cpu, vm_exit *e, uint64_t gpa, uint32_t expected)
{
    uint32_t word = 0;
    OK(vm_vcpu_run(cpu, NULL, e));
    CHECK_EQ(e->reason, VM_EXIT_HALT);
    OK(vm_read(vm_vcpu_machine(cpu), gpa, &word, 4));
    CHECK_EQ(word, expected);
    DONE(cpu);
}

/* The log of what an instruction has done is for the same places only. */
EACH_BACKEND(mmio_operand_moved_to_memory_between_its_accesses)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM finishes the write it has begun");
    vm_vcpu *cpu = MMIO_MACHINE("\x11\x06\xf4");        /* adc [rsi], eax; hlt: on a page that is code */
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_MMIO);
    e.mmio.data = 5;
    set(cpu, VM_REG_RAX, 37);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK(e.reason == VM_EXIT_MMIO && e.mmio.is_write);
    set(cpu, VM_REG_RSI, 0x100);
    halts_with(cpu, &e, 0x100, 37);
}

EACH_BACKEND(mmio_locked_exchange)
{
    vm_vcpu *cpu = MMIO_MACHINE("\x87\x06\xf0\x0f\xc1\x5e\x04\xf4");    /* xchg [rsi], eax; lock xadd [rsi+4], ebx; hlt */
    unsigned char memory[4096] = { 5, 0, 0, 0, 7 };
    unsigned reads = 0, writes = 0;
    set(cpu, VM_REG_RAX, 9);
    set(cpu, VM_REG_RBX, 3);
    CHECK_EQ(serve(cpu, memory, 0xd0000, &reads, &writes), VM_EXIT_HALT);
    CHECK_EQ(memory[0], 9);
    CHECK_EQ(memory[4], 10);
    CHECK_EQ(get(cpu, VM_REG_RAX), 5);
    CHECK_EQ(get(cpu, VM_REG_RBX), 7);
    CHECK_EQ(reads + writes, 4);
    DONE(cpu);
}

EACH_BACKEND(mmio_to_mmio_string_move)
{
    vm_vcpu *cpu = MMIO_MACHINE("\xb9\x05\x00\x00\x00\xf3\xa5\xf4");    /* mov ecx, 5; rep movsd; hlt */
    unsigned char memory[4096];
    unsigned reads = 0, writes = 0;
    for (unsigned i = 0; i < sizeof memory; i++)
        memory[i] = (unsigned char)(i < 20 ? i + 1 : 0);
    CHECK_EQ(serve(cpu, memory, 0xd0000, &reads, &writes), VM_EXIT_HALT);
    CHECK(!memcmp(memory, memory + 0x100, 20));
    CHECK_EQ(reads, 5);
    CHECK_EQ(writes, 5);
    CHECK_EQ(get(cpu, VM_REG_RCX), 0);
    CHECK_EQ(get(cpu, VM_REG_RSI), 0xd0014);
    CHECK_EQ(get(cpu, VM_REG_RDI), 0xd0114);
    DONE(cpu);
}

EACH_BACKEND(mmio_push_pop_and_call_through_it)
{
    vm_vcpu *cpu = MMIO_MACHINE("\xff\x36\x8f\x07\xff\x56\x08\x90\xf4");
    /* push [rsi]; pop [rdi]; call [rsi+8] -> 8: hlt */
    unsigned char memory[4096] = { 1, 2, 3, 4, 5, 6, 7, 8, 8 };
    unsigned reads = 0, writes = 0;
    CHECK_EQ(serve(cpu, memory, 0xd0000, &reads, &writes), VM_EXIT_HALT);
    CHECK(!memcmp(memory, memory + 0x100, 8));
    CHECK_EQ(get(cpu, VM_REG_RSP), 0x8000 - 8);
    CHECK_EQ(get(cpu, VM_REG_RIP), 9);
    DONE(cpu);
}

EACH_BACKEND(mmio_vector_access_comes_in_parts)
{
    vm_vcpu *cpu = MMIO_MACHINE("\x0f\x10\x06\x0f\x11\x07\xf4");        /* movups xmm0, [rsi]; movups [rdi], xmm0; hlt */
    unsigned char memory[4096] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 };
    unsigned reads = 0, writes = 0;
    CHECK_EQ(serve(cpu, memory, 0xd0000, &reads, &writes), VM_EXIT_HALT);
    CHECK(!memcmp(memory, memory + 0x100, 16));
    CHECK_EQ(reads, 2);
    CHECK_EQ(writes, 2);
    DONE(cpu);
}

/* RAM ends at 0xcffff: add dword [rsi-2], 1; mov eax, [rsi-2] access two bytes of each. Both read RAM as it was each time they are begun. */
static void straddle_ram(vm_vcpu *cpu, vm_prot prot)
{
    unsigned char memory[4096] = { 0x33, 0x44 };
    unsigned reads = 0, writes = 0;
    OK(vm_map_ram(vm_vcpu_machine(cpu), 0xcf000, 0x1000, prot, NULL));
    OK(vm_write(vm_vcpu_machine(cpu), 0xcf000, "\xf4", 1));
    OK(vm_write(vm_vcpu_machine(cpu), 0xcfffe, "\xff\xff", 2));
    if (prot & VM_PROT_X) {                                 /* code in it: writes are seen, no longer made directly */
        set(cpu, VM_REG_RIP, 0xcf000);
        CHECK_EQ(run(cpu, 0).reason, VM_EXIT_HALT);
        set(cpu, VM_REG_RIP, 0);
    }
    CHECK_EQ(serve(cpu, memory, 0xd0000, &reads, &writes), VM_EXIT_HALT);
    CHECK_EQ(get(cpu, VM_REG_RAX), 0x44340000);
    CHECK_EQ(get(cpu, VM_REG_RFLAGS) & 0x8d5, 0x14);
    CHECK_EQ(memory[0], 0x34);
    DONE(cpu);
}
EACH_BACKEND(mmio_access_straddling_ram) { straddle_ram(MMIO_MACHINE("\x83\x46\xfe\x01\x8b\x46\xfe\xf4"), VM_PROT_RW); }
EACH_BACKEND(mmio_access_straddling_code) { straddle_ram(MMIO_MACHINE("\x83\x46\xfe\x01\x8b\x46\xfe\xf4"), VM_PROT_RWX); }

struct device { unsigned reads, writes; unsigned char bytes[4096]; vm_vcpu *cpu; uint64_t rip; int nested; };

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    struct device *d = user;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rip = 0;
    CHECK(offset + width <= 4096);
    CHECK(cpu == d->cpu);
    OK(vm_vcpu_read_reg(cpu, VM_REG_RIP, &rip, 8));
    d->rip = rip;
    d->nested = vm_vcpu_run(cpu, NULL, &e);             /* refused: inside its own run */
    d->reads++;
    *value = 0xffffffffffffffff;                        /* bits beyond the width must not matter */
    memcpy(value, d->bytes + offset, width);
    return 0;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    struct device *d = user;
    (void)cpu;
    d->writes++;
    memcpy(d->bytes + offset, &value, width);
    return 0;
}

EACH_BACKEND(callbacks_see_exact_registers_and_cannot_nest)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x90\x90\x48\x8b\x06\x88\x06\xf4");  /* nop; nop; mov rax,[rsi]; mov [rsi],al; hlt */
    static struct device d;
    vm_io_ops ops = VM_IO_OPS_INIT;
    ops.read = device_read;
    ops.write = device_write;
    d.cpu = cpu;
    memcpy(d.bytes, "\x01\x02\x03\x04\x05\x06\x07\x08", 8);
    OK(vm_map_mmio(vm_vcpu_machine(cpu), 0xd0000, 0x1000, &ops, &d, NULL));
    set(cpu, VM_REG_RSI, 0xd0000);
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(d.rip, 2);
    CHECK_EQ(d.nested, VM_E_BUSY);
    CHECK_EQ(get(cpu, VM_REG_RAX), UINT64_C(0x0807060504030201));
    CHECK_EQ(d.reads, 1);
    CHECK_EQ(d.writes, 1);
    DONE(cpu);
}

EACH_BACKEND(port_callbacks_and_string_io)
{
    /* mov edx, 0x300; mov ecx, 4; mov edi, 0x4000; rep insb; mov esi, 0x4000; mov ecx, 2; rep outsw; hlt */
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xba\x00\x03\x00\x00\xb9\x04\x00\x00\x00\xbf\x00\x40\x00\x00\xf3\x6c"
                                           "\xbe\x00\x40\x00\x00\xb9\x02\x00\x00\x00\x66\xf3\x6f\xf4");
    static struct device d;
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint32_t v = 0;
    ops.read = device_read;
    ops.write = device_write;
    d.cpu = cpu;
    d.bytes[0] = 0x5a;
    OK(vm_map_pio(vm_vcpu_machine(cpu), 0x300, 4, &ops, &d, NULL));
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    OK(vm_read(vm_vcpu_machine(cpu), 0x4000, &v, 4));
    CHECK_EQ(v, 0x5a5a5a5a);
    CHECK_EQ(d.reads, 4);
    CHECK_EQ(d.writes, 2);
    CHECK_EQ(get(cpu, VM_REG_RDI), 0x4004);
    CHECK_EQ(get(cpu, VM_REG_RSI), 0x4004);
    CHECK_EQ(get(cpu, VM_REG_RCX), 0);
    DONE(cpu);
}

EACH_BACKEND(string_io_by_exits)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xba\x00\x03\x00\x00\xb9\x04\x00\x00\x00\xbf\x00\x40\x00\x00\xf3\x6c\xf4");
    vm_exit e = VM_EXIT_INIT;
    for (unsigned i = 0; i < 4; i++) {
        OK(vm_vcpu_run(cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_IO);
        CHECK_EQ(e.rip, 15);
        CHECK_EQ(get(cpu, VM_REG_RCX), 4 - i);          /* exact state at every exit */
        CHECK_EQ(get(cpu, VM_REG_RDI), 0x4000 + i);
        e.io.data = 0x10 + i;
    }
    halts_with(cpu, &e, 0x4000, 0x13121110);
}

/* ---- exceptions ---- */
EACH_BACKEND(exception_exits_are_selective)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\x90\x0f\x0b\xf4");
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.exception_exits = 1u << 6;
    for (int i = 0; i < 2; i++) {                       /* running again meets it again */
        OK(vm_vcpu_run(cpu, &o, &e));
        CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
        CHECK_EQ(e.exception.vector, 6);
        CHECK(!e.exception.has_error);
        CHECK_EQ(e.rip, 1);
        CHECK(e.insn_length >= 2 && e.insn_bytes[0] == 0x0f && e.insn_bytes[1] == 0x0b);
    }
    o.exception_exits = ~UINT64_C(0) & ~(1u << 6);
    OK(vm_vcpu_run(cpu, &o, &e));                       /* no IDT: triple fault */
    CHECK(e.reason == VM_EXIT_SHUTDOWN);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_SHUTDOWN);               /* until set to a mode */
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    set(cpu, VM_REG_RIP, 3);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    DONE(cpu);
}

EACH_BACKEND(inject_misuse)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    REFUSED(vm_vcpu_inject(cpu, 6, true, 0), VM_E_INVALID);
    OK(vm_vcpu_inject(cpu, 0x40, false, 0));
    REFUSED(vm_vcpu_inject(cpu, 0x41, false, 0), VM_E_BUSY);
    DONE(cpu);
}

/* Real mode, vectors at 0: the injected interrupt runs its handler before the next instruction, whatever IF says. */
EACH_BACKEND(injected_interrupt_is_taken_first)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_REAL, "\xf4");
    vm_machine *m = vm_vcpu_machine(cpu);
    OK(vm_write(m, 0x40 * 4, "\x00\x20\x00\x00", 4));
    OK(vm_write(m, 0x2000, "\xb0\x77\xcf", 3));         /* mov al, 0x77; iret */
    OK(vm_write(m, 0x3000, "\x90\xf4", 2));
    set(cpu, VM_REG_RIP, 0x3000);
    OK(vm_vcpu_inject(cpu, 0x40, false, 0));
    vm_exit e = run(cpu, 0);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 0x3002);
    CHECK_EQ(get(cpu, VM_REG_RAX) & 0xff, 0x77);
    DONE(cpu);
}

/* ---- threads ---- */
struct runner { vm_vcpu *cpu; int status; vm_exit exit; };

static void *run_forever(void *arg)
{
    struct runner *r = arg;
    r->exit = (vm_exit)VM_EXIT_INIT;
    r->status = vm_vcpu_run(r->cpu, NULL, &r->exit);
    return NULL;
}

EACH_BACKEND(busy_while_another_thread_runs_it)
{
    struct runner r = { .cpu = MACHINE(VM_MODE_FLAT64, "\xff\x04\x25\x00\x20\x00\x00\xeb\xf7") };
    pthread_t t;
    uint32_t counter = 0;
    vm_exit e = VM_EXIT_INIT;
    vm_regs regs = VM_REGS_INIT;
    CHECK(pthread_create(&t, NULL, run_forever, &r) == 0);
    while (!counter)
        OK(vm_read(vm_vcpu_machine(r.cpu), 0x2000, &counter, 4));
    REFUSED(vm_vcpu_run(r.cpu, NULL, &e), VM_E_BUSY);
    REFUSED(vm_vcpu_get_regs(r.cpu, &regs), VM_E_BUSY);
    REFUSED(vm_vcpu_set_regs(r.cpu, &regs), VM_E_BUSY);
    REFUSED(vm_vcpu_set_mode(r.cpu, VM_MODE_REAL), VM_E_BUSY);
    vm_vcpu_kick(r.cpu);
    pthread_join(t, NULL);
    OK(r.status);
    CHECK_EQ(r.exit.reason, VM_EXIT_KICK);
    OK(vm_vcpu_get_regs(r.cpu, &regs));
    DONE(r.cpu);
}

EACH_BACKEND(destroy_while_another_thread_runs)
{
    for (int i = 0; i < 20; i++) {
        struct runner r = { .cpu = MACHINE(VM_MODE_FLAT64, "\xff\x04\x25\x00\x20\x00\x00\xeb\xf7") };
        pthread_t t;
        uint32_t counter = 0;
        CHECK(pthread_create(&t, NULL, run_forever, &r) == 0);
        while (!counter)
            OK(vm_read(vm_vcpu_machine(r.cpu), 0x2000, &counter, 4));
        vm_destroy(vm_vcpu_machine(r.cpu));
        pthread_join(t, NULL);
        OK(r.status);
        CHECK_EQ(r.exit.reason, VM_EXIT_KICK);
    }
}

/* Many kicks against many short runs: none may be lost, none may hang. */
struct kicker { vm_vcpu *cpu; atomic_bool stop; };
static void *kick_always(void *arg)
{
    struct kicker *k = arg;
    while (!atomic_load(&k->stop)) {
        vm_vcpu_kick(k->cpu);
        usleep(50);
    }
    return NULL;
}

EACH_BACKEND(kicks_under_fire)
{
    struct kicker k = { .cpu = MACHINE(VM_MODE_FLAT64, "\xeb\xfe") };
    pthread_t t;
    CHECK(pthread_create(&t, NULL, kick_always, &k) == 0);
    for (int i = 0; i < 2000; i++)
        CHECK_EQ(run(k.cpu, 0).reason, VM_EXIT_KICK);
    atomic_store(&k.stop, true);
    pthread_join(t, NULL);
    DONE(k.cpu);
}

/* Two vCPUs of one machine add to one counter, each in its own thread, with LOCK: nothing is lost. */
static void count_together(vm_backend backend, const char *code, size_t bytes, uint64_t counter)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    pthread_t t;
    struct runner r[2];
    uint32_t sum = 0;
    o.backend = backend;
    o.vcpus = 2;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, code, bytes));
    for (unsigned i = 0; i < 2; i++) {
        r[i].cpu = vm_vcpu_get(m, i);
        CHECK_EQ(vm_vcpu_index(r[i].cpu), i);
        OK(vm_vcpu_set_mode(r[i].cpu, VM_MODE_FLAT64));
    }
    CHECK(pthread_create(&t, NULL, run_forever, &r[0]) == 0);
    run_forever(&r[1]);
    pthread_join(t, NULL);
    for (int i = 0; i < 2; i++) {
        OK(r[i].status);
        CHECK_EQ(r[i].exit.reason, VM_EXIT_HALT);
    }
    OK(vm_read(m, counter, &sum, 4));
    CHECK_EQ(sum, 40000);
    vm_destroy(m);
}

/* mov ecx, 20000; 1: lock <op>; dec ecx; jnz 1b; hlt */
EACH_BACKEND(two_vcpus_count_together)
{
    static const char code[] = "\xb9\x20\x4e\x00\x00" "\xf0\xff\x04\x25\x00\x20\x00\x00" "\xff\xc9\x75\xf4\xf4";
    count_together(backend, code, sizeof code - 1, 0x2000);
}

EACH_BACKEND(two_vcpus_count_together_across_pages)
{
    uint64_t hardware = 1;
    if (backend == VM_BACKEND_KVM && vm_query(backend, "hardware-ring0", &hardware) == VM_OK && !hardware)
        test_skip("this host's KVM emulates ring 0, where its page-crossing locks are not atomic");
    static const char code[] = "\xb9\x20\x4e\x00\x00" "\xf0\x83\x04\x25\xfe\x2f\x00\x00\x01" "\xff\xc9\x75\xf3\xf4";
    count_together(backend, code, sizeof code - 1, 0x2ffe);
}

EACH_BACKEND(two_vcpus_count_together_by_cmpxchg)
{
    /* mov ecx, 20000; 1: mov eax, [0x2000]; 2: lea edx, [rax+1]; lock cmpxchg [0x2000], edx; jnz 2b; dec ecx; jnz 1b; hlt */
    static const char code[] = "\xb9\x20\x4e\x00\x00" "\x8b\x04\x25\x00\x20\x00\x00" "\x8d\x50\x01"
                               "\xf0\x0f\xb1\x14\x25\x00\x20\x00\x00" "\x75\xf2" "\xff\xc9\x75\xe7\xf4";
    count_together(backend, code, sizeof code - 1, 0x2000);
}

/* ---- translation and guest-virtual memory ---- */
EACH_BACKEND(flat64_translation)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT64, "\xf4");
    uint64_t gpa = 0;
    OK(vm_vcpu_translate(cpu, 0x1234, VM_PROT_R, &gpa));
    CHECK_EQ(gpa, 0x1234);
    OK(vm_vcpu_translate(cpu, 0xfee00000, VM_PROT_W, &gpa));
    CHECK_EQ(gpa, 0xfee00000);
    REFUSED(vm_vcpu_translate(cpu, 0, VM_PROT_NONE, &gpa), VM_E_INVALID);
    REFUSED(vm_vcpu_translate(cpu, 0, VM_PROT_RW, &gpa), VM_E_INVALID);
    REFUSED(vm_vcpu_translate(cpu, 0, VM_PROT_R, NULL), VM_E_INVALID);
    CHECK(vm_vcpu_translate(cpu, UINT64_C(0x0000900000000000), VM_PROT_R, &gpa) < 0);
    DONE(cpu);
}

EACH_BACKEND(virtual_reads_and_writes)
{
    vm_vcpu *cpu = MACHINE(VM_MODE_FLAT32, "\xf4");
    char b[8] = "";
    OK(vm_vcpu_write(cpu, 0x5ffd, "abcdef", 6));
    OK(vm_vcpu_read(cpu, 0x5ffd, b, 6));
    CHECK(!memcmp(b, "abcdef", 6));
    REFUSED(vm_vcpu_read(cpu, 0xffff, b, 2), VM_E_FAULT);
    REFUSED(vm_vcpu_write(cpu, 0xffff, b, 2), VM_E_FAULT);
    REFUSED(vm_vcpu_read(cpu, 0x1000, NULL, 2), VM_E_INVALID);
    OK(vm_vcpu_read(cpu, 0x1000, NULL, 0));
    DONE(cpu);
}
