/* kvm.c - what is special about the KVM backend: its answers are compared with the interpreter's, exit by exit, its
 * kicks and deadlines with the clock, and what goes wrong on the host must come back as a status. Skipped, with the
 * reason, where KVM cannot be used. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <libvm/libvm.h>
#include "kvm/kvm.h"
#include "../test.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define RAM_BYTES UINT64_C(0x200000)
#define CODE      UINT64_C(0x1000)

static void need_kvm(void)
{
    uint64_t available = 0;
    OK(vm_query(VM_BACKEND_KVM, "available", &available));
    if (!available) test_skip("%s", vm_errmsg());
}

/* In place of the library's. What hardware is needed for runs on every host then, as far as it gets. */
static bool is_pretending;
bool kvm_is_hardware_ring0(int kvm_fd)
{
    return is_pretending || ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE) > 0;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

typedef struct guest {
    vm_machine *m;
    vm_vcpu *cpu;
    uint8_t *ram;
    vm_region *region;
} guest;

static guest open_guest(vm_backend backend, vm_mode mode, const void *code, size_t bytes)
{
    guest g;
    vm_options o = VM_OPTIONS_INIT;
    vm_regs r = VM_REGS_INIT;
    o.backend = backend;
    o.cpu_model = "kvm";
    OK(vm_create(&o, &g.m));
    OK(vm_map_ram(g.m, 0, RAM_BYTES, VM_PROT_RWX, &g.region));
    g.ram = vm_region_data(g.region);
    g.cpu = vm_vcpu_get(g.m, 0);
    OK(vm_write(g.m, CODE, code, bytes));
    OK(vm_vcpu_set_mode(g.cpu, mode));
    OK(vm_vcpu_get_regs(g.cpu, &r));
    r.rip = CODE;
    r.rsp = 0x8000;
    OK(vm_vcpu_set_regs(g.cpu, &r));
    return g;
}
#define OPEN(backend, mode, ...)                                                                                       \
    open_guest(backend, mode, (const uint8_t[]){__VA_ARGS__}, sizeof(const uint8_t[]){__VA_ARGS__})

static vm_regs regs_of(guest *g)
{
    vm_regs r = VM_REGS_INIT;
    OK(vm_vcpu_get_regs(g->cpu, &r));
    return r;
}

static void set_reg(guest *g, int id, uint64_t value) { OK(vm_vcpu_write_reg(g->cpu, id, &value, vm_reg_size(id))); }

static uint64_t stat_of(vm_machine *m, const char *name)
{
    uint64_t v = 0;
    OK(vm_stats(m, name, &v));
    return v;
}

/* ---- discovery ---- */

TEST(says_why_not_in_one_line)
{
    uint64_t available = 1;
    OK(vm_query(VM_BACKEND_KVM, "available", &available));
    if (available) {
        uint64_t vcpus = 0, slots = 0;
        OK(vm_query(VM_BACKEND_KVM, "max-vcpus", &vcpus));
        OK(vm_query(VM_BACKEND_KVM, "max-slots", &slots));
        CHECK(vcpus >= 1 && slots >= 32);
        return;
    }
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    o.backend = VM_BACKEND_KVM;
    REFUSED(vm_create(&o, &m), VM_E_UNSUPPORTED);
    CHECK(strstr(vm_errmsg(), "KVM") && !strchr(vm_errmsg(), '\n'));
}

TEST(auto_takes_what_is_usable)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    uint64_t available = 0, is_hardware = 0;
    OK(vm_query(VM_BACKEND_KVM, "available", &available));
    OK(vm_query(VM_BACKEND_KVM, "hardware-ring0", &is_hardware));
    OK(vm_create(&o, &m));
    CHECK_EQ(vm_machine_backend(m) == VM_BACKEND_KVM, available && is_hardware);
    vm_destroy(m);
}

/* ---- the same exits as the interpreter's ---- */

/* One instruction or two that reach outside, for each code size that takes these bytes alike. */
typedef struct outside {
    const char *name;
    uint8_t modes, bytes[24];
} outside;
enum { IN_REAL = 1, IN_32 = 2, IN_64 = 4, IN_ALL = 7 };
static const outside outsides[] = {
    {"out_dx_al", IN_ALL, {0xee, 0xf4}},
    {"out_dx_eax_twice", IN_ALL, {0xef, 0xef, 0xf4}},
    {"out_imm", IN_ALL, {0xe6, 0x42, 0xe6, 0x42, 0xe7, 0x43, 0xf4}},
    {"in_out", IN_ALL, {0xec, 0xee, 0xe4, 0x10, 0xed, 0xef, 0xf4}},
    {"nop_after_prefix_like_immediate", IN_ALL, {0xb0, 0x66, 0xef, 0xb0, 0xf3, 0x6e, 0xf4}},
    {"outsb", IN_ALL, {0x6e, 0x6e, 0xf4}},
    {"rep_outsb", IN_ALL, {0xf3, 0x6e, 0xf4}},
    {"rep_insb", IN_ALL, {0xf3, 0x6c, 0xf4}},
    {"insb_insw", IN_ALL, {0x6c, 0x6d, 0xf4}},
    {"std_outs", IN_ALL, {0xfd, 0x6e, 0xf3, 0x6e, 0xf4}},
    {"mov_store", IN_32 | IN_64, {0x88, 0x07, 0x89, 0x07, 0x66, 0x89, 0x07, 0xf4}},
    {"mov_load", IN_32 | IN_64, {0x8a, 0x07, 0x8b, 0x07, 0x66, 0x8b, 0x07, 0xf4}},
    {"mov_store_64", IN_64, {0x48, 0x89, 0x07, 0x48, 0x89, 0x47, 0x08, 0x40, 0x89, 0x07, 0xf4}},
    {"mov_imm_store", IN_32 | IN_64, {0xc6, 0x07, 0x66, 0xc7, 0x47, 0x04, 0x88, 0x07, 0x88, 0x07, 0xf4}},
    {"read_modify_write", IN_32 | IN_64, {0x01, 0x07, 0xff, 0x07, 0xf7, 0x17, 0x80, 0x0f, 0x80, 0xf4}},
    {"load_and_add", IN_32 | IN_64, {0x03, 0x07, 0x2b, 0x47, 0x04, 0xf4}},
    {"movs_both", IN_32 | IN_64, {0xa4, 0xa5, 0xf4}},
    {"rep_movsb", IN_32 | IN_64, {0xf3, 0xa4, 0xf4}},
    {"rep_stosd", IN_32 | IN_64, {0xf3, 0xab, 0xf4}},
    {"stosb", IN_32 | IN_64, {0xaa, 0xaa, 0xf4}},
    {"xchg", IN_32 | IN_64, {0x87, 0x07, 0xf4}},
    {"push_pop", IN_32 | IN_64, {0xff, 0x37, 0x8f, 0x07, 0xf4}},
    {"cmpxchg_xadd", IN_32 | IN_64, {0x0f, 0xc1, 0x07, 0xf4}},
    {"test_and_compare", IN_32 | IN_64, {0x84, 0x07, 0x38, 0x07, 0x3a, 0x07, 0xf4}},
};
enum { EXITS = 64 };

typedef struct recorded {
    unsigned count;
    struct {
        vm_exit e;
        vm_regs r;
    } at[EXITS];
    uint8_t data[64];
} recorded;

static uint64_t answer(unsigned i) { return UINT64_C(0x1122334455667788) * (i + 3) ^ 0x5a; }

/* look_at: registers are read at every exit of which this bit of the number is set; 0: at all. Then exits are brief. */
static void record_exits(vm_backend backend, const outside *o, vm_mode mode, unsigned look_at, recorded *out)
{
    guest g = open_guest(backend, mode, o->bytes, sizeof o->bytes);
    vm_exit e = VM_EXIT_INIT;
    set_reg(&g, VM_REG_RAX, 0x1234567);
    set_reg(&g, VM_REG_RDX, 0x3f8);
    set_reg(&g, VM_REG_RCX, 3);
    set_reg(&g, VM_REG_RSI,
            mode == VM_MODE_REAL                         ? 0x2000
            : o->bytes[1] == 0xa4 || o->bytes[0] == 0xa4 ? 0x40001000
                                                         : 0x2000);
    set_reg(&g, VM_REG_RDI,
            mode == VM_MODE_REAL                         ? 0x2010
            : o->bytes[1] == 0x6c || o->bytes[0] == 0x6c ? 0x2010
                                                         : 0x40000000);
    for (unsigned i = 0; i < 64; i++) g.ram[0x2000 + i] = (uint8_t)(i * 7 + 1);
    vm_run_options ro = VM_RUN_OPTIONS_INIT;
    ro.deadline_ns = 5000000000u;
    ro.is_brief = look_at != 0;
    memset(out, 0, sizeof *out);
    for (unsigned i = 0; i < EXITS; i++) {
        OK(vm_vcpu_run(g.cpu, &ro, &e));
        out->at[i].e = e;
        if (!look_at || i & look_at) out->at[i].r = regs_of(&g);
        out->count = i + 1;
        if (e.reason == VM_EXIT_IO && !e.io.is_write)
            e.io.data = answer(i);
        else if ((e.reason == VM_EXIT_MMIO || e.reason == VM_EXIT_UNMAPPED) && !e.mmio.is_write)
            e.mmio.data = answer(i);
        else if (e.reason != VM_EXIT_IO && e.reason != VM_EXIT_MMIO && e.reason != VM_EXIT_UNMAPPED)
            break;
    }
    memcpy(out->data, g.ram + 0x2000, 64);
    vm_destroy(g.m);
}

static void compare_regs(const vm_regs *k, const vm_regs *i, unsigned n)
{
    const uint64_t *a = &k->rax, *b = &i->rax;
    for (unsigned r = 0; r < 18; r++)
        if (a[r] != b[r] && !(r == 17 && ((a[r] ^ b[r]) & 0x3e7fd5) == 0))
            FAIL("exit %u: register %u is %#" PRIx64 ", interpreter %#" PRIx64, n, r, a[r], b[r]);
}

static uint64_t data_of(const vm_exit *e) { return e->reason == VM_EXIT_IO ? e->io.data : e->mmio.data; }

/* Exits that do not name their instruction: who reads registers finds it, and who does not disturbs nothing. */
static void brief_exits(const outside *o, vm_mode mode, const recorded *full)
{
    static recorded brief;
    for (unsigned look_at = 1; look_at <= 2; look_at++) {
        record_exits(VM_BACKEND_KVM, o, mode, look_at, &brief);
        CHECK_EQ(brief.count, full->count);
        CHECK(!memcmp(brief.data, full->data, sizeof brief.data));
        for (unsigned n = 0; n + 1 < brief.count; n++) {
            CHECK_EQ(brief.at[n].e.insn_length, 0);
            CHECK_EQ(brief.at[n].e.reason, full->at[n].e.reason);
            CHECK_EQ(data_of(&brief.at[n].e), data_of(&full->at[n].e));
            if (n & look_at) compare_regs(&brief.at[n].r, &full->at[n].r, n);
        }
    }
}

static void same_exits(const void *arg)
{
    const outside *o = arg;
    static recorded k, i;
    static const vm_mode modes[] = {VM_MODE_REAL, VM_MODE_FLAT32, VM_MODE_FLAT64};
    need_kvm();
    for (unsigned mode = 0; mode < 3; mode++) {
        if (!(o->modes >> mode & 1)) continue;
        record_exits(VM_BACKEND_KVM, o, modes[mode], 0, &k);
        record_exits(VM_BACKEND_INTERP, o, modes[mode], 0, &i);
        for (unsigned n = 0; n < k.count && n < i.count; n++) {
            char a[300], b[300];
            vm_exit_format(&k.at[n].e, a, sizeof a);
            vm_exit_format(&i.at[n].e, b, sizeof b);
            if (strcmp(a, b) || k.at[n].e.insn_length != i.at[n].e.insn_length)
                FAIL("mode %d, exit %u: %s (length %u), interpreter: %s (length %u)", modes[mode], n, a,
                     k.at[n].e.insn_length, b, i.at[n].e.insn_length);
            compare_regs(&k.at[n].r, &i.at[n].r, n);
        }
        CHECK_EQ(k.count, i.count);
        CHECK(!memcmp(k.data, i.data, sizeof k.data));
        brief_exits(o, modes[mode], &i);
    }
}

SETUP(outsides)
{
    static char name[100];
    for (size_t i = 0; i < sizeof outsides / sizeof *outsides; i++) {
        snprintf(name, sizeof name, "same_exits.%s", outsides[i].name);
        test_add(name, same_exits, &outsides[i], 60);
    }
}

/* The answer to a read counts however the guest goes on: in KVM, or in the interpreter because of what the run asks for. */
TEST(answers_reach_every_kind_of_run)
{
    static const struct {
        vm_run_options o;
        int reason;
        uint64_t rip;
    } runs[] = {
        {{.size = sizeof(vm_run_options)}, VM_EXIT_HALT, 4},
        {{.size = sizeof(vm_run_options), .is_brief = true}, VM_EXIT_HALT, 4},
        {{.size = sizeof(vm_run_options), .deadline_ns = 10000000000u}, VM_EXIT_HALT, 4},
        {{.size = sizeof(vm_run_options), .has_until = true, .until = CODE + 3}, VM_EXIT_UNTIL, 3},
        {{.size = sizeof(vm_run_options), .exception_exits = 1u << 6}, VM_EXIT_HALT, 4},
        {{.size = sizeof(vm_run_options), .single_step = true}, VM_EXIT_STEP, 2},
        {{.size = sizeof(vm_run_options), .max_instructions = 2}, VM_EXIT_BUDGET, 3},
    };
    need_kvm();
    for (size_t i = 0; i < 2 * sizeof runs / sizeof *runs; i++) {
        bool is_port = i & 1; /* in al, 0x42, or mov al, [rdi]; then nop, hlt */
        guest g = is_port ? OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xe4, 0x42, 0x90, 0xf4)
                          : OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0x8a, 0x07, 0x90, 0xf4);
        vm_exit e = VM_EXIT_INIT;
        set_reg(&g, VM_REG_RDI, 0x40000000);
        set_reg(&g, VM_REG_RAX, 0x1100);
        OK(vm_vcpu_run(g.cpu, i & 2 ? &runs[1].o : NULL, &e));
        CHECK_EQ(e.reason, is_port ? VM_EXIT_IO : VM_EXIT_UNMAPPED);
        if (is_port)
            e.io.data = 0x5a;
        else
            e.mmio.data = 0x5a;
        OK(vm_vcpu_run(g.cpu, &runs[i / 2].o, &e));
        CHECK_EQ(e.reason, runs[i / 2].reason);
        vm_regs r = regs_of(&g);
        CHECK_EQ(r.rax, 0x115a);
        CHECK_EQ(r.rip, CODE + runs[i / 2].rip);
        vm_destroy(g.m);
    }
}

/* ---- callbacks ---- */

typedef struct device {
    uint64_t rip[8], value;
    unsigned calls;
    uint64_t new_rip, new_rbx;
} device;

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    device *d = user;
    (void)offset, (void)width;
    vm_vcpu_read_reg(cpu, VM_REG_RIP, &d->rip[d->calls++ & 7], 8);
    *value = d->value;
    if (d->new_rbx) vm_vcpu_write_reg(cpu, VM_REG_RBX, &d->new_rbx, 8);
    if (d->new_rip) vm_vcpu_write_reg(cpu, VM_REG_RIP, &d->new_rip, 8);
    return 0;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    device *d = user;
    uint64_t ignored = 0;
    int status = device_read(user, cpu, offset, width, &ignored);
    d->value = value;
    return status;
}

static const vm_io_ops device_ops = {.size = sizeof(vm_io_ops), .read = device_read, .write = device_write};

TEST(callbacks_see_the_instruction)
{
    need_kvm();
    device d = {.value = 0x77};
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x90, 0xee, 0x90, 0xec, 0x88, 0x07, 0x8a, 0x1f, 0xf4);
    OK(vm_map_pio(g.m, 0x3f8, 8, &device_ops, &d, NULL));
    OK(vm_map_mmio(g.m, 0x40000000, 4096, &device_ops, &d, NULL));
    set_reg(&g, VM_REG_RDX, 0x3f8);
    set_reg(&g, VM_REG_RDI, 0x40000000);
    set_reg(&g, VM_REG_RAX, 0x12);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(d.calls, 4);
    CHECK_EQ(d.rip[0], CODE + 1);
    CHECK_EQ(d.rip[1], CODE + 3);
    CHECK_EQ(d.rip[2], CODE + 4);
    CHECK_EQ(d.rip[3], CODE + 6);
    CHECK_EQ(regs_of(&g).rax, 0x12); /* IN read back what OUT wrote */
    CHECK_EQ(regs_of(&g).rbx, 0x12);
    vm_destroy(g.m);
}

TEST(callbacks_change_registers)
{
    need_kvm();
    device d = {.value = 0x55, .new_rip = CODE + 0x20, .new_rbx = 0xabcdef};
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xec, 0xf4);
    OK(vm_write(g.m, CODE + 0x20, (const uint8_t[]){0x43, 0xf4}, 2)); /* inc ebx; hlt */
    OK(vm_map_pio(g.m, 0x3f8, 8, &device_ops, &d, NULL));
    set_reg(&g, VM_REG_RDX, 0x3f8);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_regs r = regs_of(&g);
    CHECK_EQ(r.rax, 0x55);     /* the instruction's own result */
    CHECK_EQ(r.rbx, 0xabcdf0); /* the callback's, and INC after it */
    CHECK_EQ(r.rip, CODE + 0x22);
    CHECK_EQ(d.calls, 1);
    vm_destroy(g.m);
}

TEST(registers_after_an_exit_cost_no_system_call)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xee, 0xeb, 0xfd);
    vm_exit e = VM_EXIT_INIT;
    set_reg(&g, VM_REG_RDX, 0x3f8);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    kvm_vcpu *kv = kvm_vcpu_of(g.cpu);
    int fd = kv->fd;
    kv->fd = -1; /* every ioctl would fail now */
    CHECK_EQ(regs_of(&g).rip, CODE);
    CHECK(kv->valid & VM_STATE_REGS);
    kv->fd = fd;
    vm_destroy(g.m);
}

/* ---- kicks and deadlines ---- */

static void *kick_soon(void *arg)
{
    usleep(20000);
    vm_vcpu_kick(arg);
    return NULL;
}

TEST(kick_from_another_thread)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xeb, 0xfe);
    vm_exit e = VM_EXIT_INIT;
    sigset_t before, after;
    struct sigaction old, new;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    sigaction(SIGURG, NULL, &old);
    for (int i = 0; i < 10; i++) {
        pthread_t t;
        pthread_create(&t, NULL, kick_soon, g.cpu);
        double start = now();
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_KICK);
        CHECK_EQ(e.rip, CODE);
        CHECK(now() - start < 1.0);
        pthread_join(t, NULL);
    }
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    sigaction(SIGURG, NULL, &new);
    CHECK(!memcmp(&before, &after, 8));
    CHECK(old.sa_handler == new.sa_handler);
    vm_destroy(g.m);
}

/* The process had one thread when the run began, so nothing was blocked. */
static int make_kicker(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)offset, (void)width, (void)value;
    pthread_create(user, NULL, kick_soon, cpu);
    return 0;
}

TEST(kick_from_a_thread_made_in_a_callback)
{
    need_kvm();
    static const vm_io_ops ops = {.size = sizeof(vm_io_ops), .write = make_kicker};
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xe6, 0x10, 0xeb, 0xfe);
    vm_exit e = VM_EXIT_INIT;
    sigset_t before, after;
    pthread_t t;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    OK(vm_map_pio(g.m, 0x10, 1, &ops, &t, NULL));
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    CHECK_EQ(e.rip, CODE + 2);
    pthread_join(t, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    CHECK(!memcmp(&before, &after, 8));
    vm_destroy(g.m);
}

static vm_vcpu *alarm_cpu;
static void on_alarm(int signal)
{
    (void)signal;
    vm_vcpu_kick(alarm_cpu);
}

TEST(kick_from_a_signal_handler)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xeb, 0xfe);
    vm_exit e = VM_EXIT_INIT;
    alarm_cpu = g.cpu;
    signal(SIGALRM, on_alarm);
    for (int i = 0; i < 10; i++) {
        const struct itimerval when = {.it_value = {.tv_usec = 5000}};
        setitimer(ITIMER_REAL, &when, NULL);
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_KICK);
    }
    vm_destroy(g.m);
}

static _Atomic int urgent;
static void on_urgent(int signal) { (void)signal, urgent++; }

TEST(somebody_elses_signals_arrive)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xeb, 0xfe);
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = 20000000;
    signal(SIGURG, on_urgent);
    union sigval v = {0};
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGURG);
    pthread_sigmask(SIG_BLOCK, &s, NULL);
    pthread_sigqueue(pthread_self(), SIGURG, v); /* pending while the vCPU runs */
    OK(vm_vcpu_run(g.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    CHECK_EQ(urgent, 0);
    pthread_sigmask(SIG_UNBLOCK, &s, NULL);
    CHECK_EQ(urgent, 1);
    vm_destroy(g.m);
}

/* A kick's signal that comes when the run it was meant for is over, and what told of it forgotten. */
TEST_LIMIT(late_signal_does_not_stop_the_guest, 20)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xf4, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.has_signal_blocked = true;
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGURG);
    pthread_sigmask(SIG_BLOCK, &s, NULL);
    o.deadline_ns = 10000000000; /* signals reach KVM_RUN from now on */
    OK(vm_vcpu_run(g.cpu, &o, &e));
    CHECK_EQ(e.rip, CODE + 1);
    o.deadline_ns = 0;
    pthread_kill(pthread_self(), SIGURG);
    OK(vm_vcpu_run(g.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, CODE + 2);
    vm_destroy(g.m);
}

TEST(kick_is_sticky)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0x90, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    vm_vcpu_kick(g.cpu);
    vm_vcpu_kick(g.cpu);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    CHECK_EQ(e.rip, CODE);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(g.m);
}

TEST(deadline)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xeb, 0xfe);
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    for (uint64_t ms = 1; ms <= 32; ms *= 2) {
        o.deadline_ns = ms * 1000000;
        double start = now();
        OK(vm_vcpu_run(g.cpu, &o, &e));
        double took = now() - start;
        CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
        if (took < (double)ms * 1e-3 || took > (double)ms * 1e-3 + 0.25)
            FAIL("%u ms took %.3f ms", (unsigned)ms, took * 1e3);
    }
    vm_destroy(g.m);
}

TEST(kick_between_device_accesses)
{
    need_kvm();
    device d = {.value = 1};
    guest g =
        OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xec, 0x01, 0xc3, 0x41, 0xeb, 0xfa); /* in; add ebx,eax; inc ecx; loop */
    OK(vm_map_pio(g.m, 0x3f8, 8, &device_ops, &d, NULL));
    set_reg(&g, VM_REG_RDX, 0x3f8);
    vm_exit e = VM_EXIT_INIT;
    for (int i = 0; i < 20; i++) {
        pthread_t t;
        pthread_create(&t, NULL, kick_soon, g.cpu);
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_KICK);
        pthread_join(t, NULL);
        vm_regs r = regs_of(&g);
        uint64_t done = r.rip == CODE + 1 || r.rip == CODE + 3 ? d.calls - 1 : d.calls;
        CHECK_EQ(r.rcx, done); /* no access lost, none twice */
    }
    vm_destroy(g.m);
}

/* ---- until, budgets, exceptions: the interpreter's part ---- */

TEST(until_budget_exceptions)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xff, 0xc0, 0xff, 0xc0, 0xeb, 0xfa);
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.has_until = true;
    o.until = CODE + 4;
    for (unsigned i = 1; i < 5; i++) {
        OK(vm_vcpu_run(g.cpu, &o, &e));
        CHECK_EQ(e.reason, VM_EXIT_UNTIL);
        CHECK_EQ(regs_of(&g).rax, i * 2);
    }
    o = (vm_run_options)VM_RUN_OPTIONS_INIT;
    for (unsigned n = 1; n < 40; n += 3) {
        vm_regs r = regs_of(&g);
        r.rip = CODE;
        r.rax = 0;
        OK(vm_vcpu_set_regs(g.cpu, &r));
        o.max_instructions = n;
        OK(vm_vcpu_run(g.cpu, &o, &e));
        CHECK_EQ(e.reason, VM_EXIT_BUDGET);
        CHECK_EQ(regs_of(&g).rax, n / 3 * 2 + n % 3);
    }
    o = (vm_run_options)VM_RUN_OPTIONS_INIT;
    o.exception_exits = 1 << 6;
    OK(vm_write(g.m, CODE, (const uint8_t[]){0x90, 0x0f, 0x0b}, 3));
    set_reg(&g, VM_REG_RIP, CODE);
    OK(vm_vcpu_run(g.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
    CHECK_EQ(e.exception.vector, 6);
    CHECK_EQ(e.rip, CODE + 1);
    vm_destroy(g.m);
}

TEST(what_kvm_cannot_emulate)
{
    need_kvm();
    /* mov al,0fh; add al,1; daa; fld1; fadd st0,st0; fistp dword [2000h]; bound-free loop of 50 DAA; hlt */
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_REAL, 0xb0, 0x0f, 0x04, 0x01, 0x27, 0xd9, 0xe8, 0xdc, 0xc0, 0xdb, 0x1e, 0x00,
                   0x20, 0xb9, 50, 0, 0x04, 0x01, 0x27, 0xe2, 0xfb, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, CODE + 22);
    CHECK_EQ(regs_of(&g).rax & 0xff, 0x66); /* 16 + 50 in BCD */
    CHECK_EQ(g.ram[0x2000], 2);
    uint64_t is_hardware = 0;
    OK(vm_query(VM_BACKEND_KVM, "hardware-ring0", &is_hardware));
    if (!is_hardware) CHECK(stat_of(g.m, "kvm-emulated") > 0);
    CHECK(stat_of(g.m, "kvm-exits") > 0);
    vm_destroy(g.m);
}

/* ---- memory ---- */

TEST(flat64_reaches_far)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0x48, 0x8b, 0x03, 0x48, 0x89, 0x01, 0x48, 0x8b, 0x06, 0xf4);
    vm_region *far;
    vm_exit e = VM_EXIT_INIT;
    uint64_t bits = 0, v = 0x1234567890;
    OK(vm_query(VM_BACKEND_INTERP, "phys-bits", &bits));
    uint64_t end = UINT64_C(1) << (bits > 46 ? 46 : bits);
    OK(vm_map_ram(g.m, end - 0x10000, 0x10000, VM_PROT_RW, &far)); /* where the identity tables might want to be */
    OK(vm_write(g.m, end - 8, &v, 8));
    set_reg(&g, VM_REG_RBX, end - 8);
    set_reg(&g, VM_REG_RCX, 0x3000);
    set_reg(&g, VM_REG_RSI, end / 2 + 0x123000);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK_EQ(e.mmio.gpa, end / 2 + 0x123000);
    CHECK_EQ(e.rip, CODE + 6);
    e.mmio.data = 0x42;
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(regs_of(&g).rax, 0x42);
    CHECK(!memcmp(g.ram + 0x3000, &v, 8));
    vm_sregs s = VM_SREGS_INIT;
    OK(vm_vcpu_get_sregs(g.cpu, &s));
    CHECK_EQ(s.cr3, 0); /* as on every backend */
    vm_destroy(g.m);
}

TEST(task_priority)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0x44, 0x0f, 0x22, 0xc0, 0xf4, 0x44, 0x0f, 0x20, 0xc3,
                   0xf4); /* cr8 = rax; rbx = cr8 */
    vm_exit e = VM_EXIT_INIT;
    uint64_t cr8 = 0;
    set_reg(&g, VM_REG_RAX, 5);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    OK(vm_vcpu_read_reg(g.cpu, VM_REG_CR8, &cr8, 8));
    CHECK_EQ(cr8, 5);
    set_reg(&g, VM_REG_CR8, 9);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(regs_of(&g).rbx, 9);
    vm_destroy(g.m);
}

TEST(unmapped_is_tried_again)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x8a, 0x07, 0x88, 0x67, 0x01, 0xf4);
    vm_region *late;
    vm_exit e = VM_EXIT_INIT;
    uint8_t byte = 0x99;
    set_reg(&g, VM_REG_RDI, 0x500000);
    set_reg(&g, VM_REG_RAX, 0x4400);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    OK(vm_map_ram(g.m, 0x500000, 0x1000, VM_PROT_RW, &late));
    OK(vm_write(g.m, 0x500000, &byte, 1));
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(regs_of(&g).rax, 0x4499);
    OK(vm_read(g.m, 0x500001, &byte, 1));
    CHECK_EQ(byte, 0x44);
    vm_destroy(g.m);
}

TEST(protection)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x88, 0x07, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_protect(g.m, 0x5000, 0x1000, VM_PROT_R));
    OK(vm_protect(g.m, 0x7000, 0x1000, VM_PROT_NONE));
    g.ram[0x5000] = g.ram[0x7000] = 1;
    for (uint64_t at = 0x4000; at <= 0x8000; at += 0x1000) {
        vm_regs r = regs_of(&g);
        r.rip = CODE;
        r.rdi = at;
        r.rax = 0x66;
        OK(vm_vcpu_set_regs(g.cpu, &r));
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        bool is_forbidden = at == 0x5000 || at == 0x7000;
        CHECK_EQ(e.reason, is_forbidden ? VM_EXIT_UNMAPPED : VM_EXIT_HALT);
        if (is_forbidden) CHECK_EQ(e.mmio.gpa, at);
        CHECK_EQ(g.ram[at], is_forbidden ? 1 : 0x66);
    }
    OK(vm_protect(g.m, 0x5000, 0x3000, VM_PROT_RWX));
    vm_regs r = regs_of(&g);
    r.rip = CODE;
    r.rdi = 0x5000;
    OK(vm_vcpu_set_regs(g.cpu, &r));
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(g.ram[0x5000], 0x66);
    vm_destroy(g.m);
}

TEST(dirty_log)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x88, 0x07, 0x88, 0x06, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    uint64_t bits[8];
    OK(vm_dirty_log(g.m, true));
    OK(vm_dirty_fetch(g.m, 0, RAM_BYTES, bits));
    set_reg(&g, VM_REG_RDI, 0x6000);
    set_reg(&g, VM_REG_RSI, 0x1fffff);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    OK(vm_dirty_fetch(g.m, 0, RAM_BYTES, bits));
    CHECK_EQ(bits[0], 1u << 6);
    CHECK_EQ(bits[7], UINT64_C(1) << 63);
    OK(vm_dirty_fetch(g.m, 0, RAM_BYTES, bits));
    CHECK_EQ(bits[0] | bits[7], 0);
    set_reg(&g, VM_REG_RIP, CODE);
    set_reg(&g, VM_REG_RSI, 0x9000);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    OK(vm_write(g.m, 0xa000, "x", 1));
    OK(vm_dirty_fetch(g.m, 0, RAM_BYTES, bits));
    CHECK_EQ(bits[0], 1u << 6 | 1u << 9 | 1u << 10);
    vm_destroy(g.m);
}

/* More pages than a dirty ring holds, some of them twice, from two sides. */
TEST(dirty_log_of_many_pages)
{
    need_kvm();
    /* mov [rdi],al; add rdi,4096; dec ecx; jnz */
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0x88, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0xff, 0xc9,
                   0x75, 0xf3, 0xf4);
    enum { PAGES = 5000 };
    static uint64_t bits[(PAGES + 64) / 64 + 1];
    vm_region *r;
    vm_exit e = VM_EXIT_INIT;
    OK(vm_map_ram(g.m, 0x10000000, PAGES * UINT64_C(4096), VM_PROT_RW, &r));
    OK(vm_dirty_log(g.m, true));
    for (unsigned round = 0; round < 3; round++) {
        set_reg(&g, VM_REG_RIP, CODE);
        set_reg(&g, VM_REG_RDI, 0x10000000 + (round == 2 ? 4096 : 0));
        set_reg(&g, VM_REG_RCX, round == 2 ? 7 : PAGES);
        OK(vm_dirty_fetch(g.m, 0x10000000, PAGES * UINT64_C(4096), bits));
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        OK(vm_dirty_fetch(g.m, 0x10000000, PAGES * UINT64_C(4096), bits));
        unsigned count = 0;
        for (unsigned i = 0; i < PAGES; i++) count += bits[i / 64] >> i % 64 & 1;
        CHECK_EQ(count, round == 2 ? 7 : PAGES);
    }
    CHECK_EQ(bits[0], 0xfe);
    OK(vm_unmap(g.m, r));
    OK(vm_dirty_log(g.m, false));
    vm_destroy(g.m);
}

/* Ring 3 of long mode, the first GiB mapped to itself, ports open. */
static void enter_ring3(guest *g, uint64_t rdi, uint64_t rcx)
{
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    const uint64_t tables = 0x100000;
    OK(vm_vcpu_set_mode(g->cpu, VM_MODE_FLAT64));
    OK(vm_write(g->m, tables, &(uint64_t){(tables + 0x1000) | 7}, 8));
    OK(vm_write(g->m, tables + 0x1000, &(uint64_t){(tables + 0x2000) | 7}, 8));
    for (uint64_t i = 0; i < 512; i++) OK(vm_write(g->m, tables + 0x2000 + i * 8, &(uint64_t){i << 21 | 0xe7}, 8));
    OK(vm_vcpu_get_sregs(g->cpu, &s));
    s.cr3 = tables;
    s.cs = (vm_segment){.limit = 0xffffffff, .selector = 0x33, .attributes = 0xa0fb};
    s.ss = s.ds = s.es = (vm_segment){.limit = 0xffffffff, .selector = 0x2b, .attributes = 0xc0f3};
    OK(vm_vcpu_set_sregs(g->cpu, &s));
    OK(vm_vcpu_get_regs(g->cpu, &r));
    r.rip = CODE, r.rsp = 0x8000, r.rflags = 0x3002, r.rdi = rdi, r.rcx = rcx;
    OK(vm_vcpu_set_regs(g->cpu, &r));
}

TEST(dirty_log_by_ring)
{
    need_kvm();
    is_pretending = true;
    /* mov [rdi],al; add rdi,4096; dec ecx; jnz; out 80h,al */
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0x88, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0xff, 0xc9,
                   0x75, 0xf3, 0xe6, 0x80);
    enum { PAGES = 9000, BASE = 0x10000000 };
    static uint64_t bits[PAGES / 64 + 1];
    vm_region *r;
    vm_exit e = VM_EXIT_INIT;
    uint64_t offered = 0;
    if (!kvm_machine_of(g.m)->ring_entries) test_skip("this kernel has no dirty rings");
    OK(vm_query(VM_BACKEND_KVM, "dirty-ring", &offered));
    CHECK(offered >= kvm_machine_of(g.m)->ring_entries);
    OK(vm_map_ram(g.m, BASE, PAGES * UINT64_C(4096), VM_PROT_RW, &r));
    OK(vm_dirty_log(g.m, true));
    for (unsigned round = 0; round < 4; round++) { /* all, more than a ring holds; some; all; none */
        const unsigned counts[] = {PAGES, 7, PAGES, 1};
        enter_ring3(&g, BASE + (round == 3 ? 0 : round * 4096), round == 2 ? PAGES - 2 : counts[round]);
        OK(vm_dirty_fetch(g.m, BASE, PAGES * UINT64_C(4096), bits));
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_IO);
        OK(vm_dirty_fetch(g.m, BASE, PAGES * UINT64_C(4096), bits));
        unsigned count = 0;
        for (unsigned i = 0; i < PAGES; i++) count += bits[i / 64] >> i % 64 & 1;
        CHECK_EQ(count, round == 2 ? PAGES - 2 : counts[round]);
        if (round == 1) CHECK_EQ(bits[0], 0xfe);
    }
    OK(vm_dirty_fetch(g.m, BASE, PAGES * UINT64_C(4096), bits));
    CHECK_EQ(bits[0], 0);
    OK(vm_unmap(g.m, r));
    vm_destroy(g.m);
}

/* A hypercall is KVM's own affair (vm_query says so), and with what it makes of it, an error in RAX or #UD, the guest goes
 * on or shuts down; where libvm's interpreter meets it, it is an exit. */
TEST(hypercalls_end_somehow)
{
    need_kvm();
    static const uint8_t calls[][4] = {{0x0f, 0x01, 0xc1, 0xf4}, {0x0f, 0x01, 0xd9, 0xf4}}; /* vmcall, vmmcall; hlt */
    uint64_t has = 1;
    OK(vm_query(VM_BACKEND_KVM, "hypercall", &has));
    CHECK_EQ(has, 0);
    for (unsigned i = 0; i < 2; i++) {
        guest g = open_guest(VM_BACKEND_KVM, VM_MODE_FLAT64, calls[i], 4);
        vm_exit e = VM_EXIT_INIT;
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        o.deadline_ns = 10000000000u;
        set_reg(&g, VM_REG_RAX, 0x7777);
        OK(vm_vcpu_run(g.cpu, &o, &e));
        CHECK(e.reason == VM_EXIT_HYPERCALL || e.reason == VM_EXIT_HALT || e.reason == VM_EXIT_SHUTDOWN);
        if (e.reason == VM_EXIT_HYPERCALL) {
            CHECK_EQ(e.hypercall.number, 0x7777);
            e.hypercall.result = 5;
            OK(vm_vcpu_run(g.cpu, &o, &e));
            CHECK_EQ(e.reason, VM_EXIT_HALT);
            CHECK_EQ(regs_of(&g).rax, 5);
        } else if (e.reason == VM_EXIT_HALT) {
            CHECK((int64_t)regs_of(&g).rax < 0);
        }
        vm_destroy(g.m);
    }
}

/* The same with bitmaps, which KVM gives where it has no rings. */
TEST(dirty_log_by_bitmap)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x88, 0x07, 0xf4);
    kvm_machine *km = kvm_machine_of(g.m);
    vm_exit e = VM_EXIT_INIT;
    uint64_t bits[8];
    OK(vm_dirty_log(g.m, true));
    set_reg(&g, VM_REG_RDI, 0x6000);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    OK(vm_dirty_fetch(g.m, 0, RAM_BYTES, bits));
    CHECK(bits[0] & 1u << 6);
    if (km->ring_entries) { /* KVM refuses bitmaps then: every page counts as written */
        unsigned entries = km->ring_entries;
        km->ring_entries = 0;
        OK(vm_dirty_fetch(g.m, 0, RAM_BYTES, bits));
        CHECK_EQ(bits[3], ~UINT64_C(0));
        km->ring_entries = entries;
    }
    vm_destroy(g.m);
}

TEST(slots_exhausted)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x88, 0x07, 0x8a, 0x1f, 0xff, 0xe6); /* store, load, jmp esi */
    kvm_machine_of(g.m)->max_slots = kvm_machine_of(g.m)->slot_count + 2;
    vm_exit e = VM_EXIT_INIT;
    for (unsigned i = 0; i < 8; i++) {
        vm_region *r;
        uint64_t at = 0x1000000 + i * UINT64_C(0x10000);
        OK(vm_map_ram(g.m, at, 0x1000, VM_PROT_RWX, &r));
        OK(vm_write(g.m, at + 0x800, (const uint8_t[]){0x40, 0xf4}, 2)); /* inc eax; hlt */
    }
    for (unsigned i = 0; i < 8; i++) {
        vm_regs r = regs_of(&g);
        r.rip = CODE;
        r.rdi = 0x1000000 + i * UINT64_C(0x10000);
        r.rsi = r.rdi + 0x800;
        r.rax = 0x30 + i;
        r.rbx = 0;
        OK(vm_vcpu_set_regs(g.cpu, &r));
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(regs_of(&g).rbx, 0x30 + i);
        CHECK_EQ(regs_of(&g).rax, 0x31 + i);
    }
    vm_destroy(g.m);
}

TEST(many_regions)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x88, 0x07, 0xf4);
    enum { COUNT = 2000 };
    static vm_region *r[COUNT];
    vm_exit e = VM_EXIT_INIT;
    for (unsigned i = 0; i < COUNT; i++)
        OK(vm_map_ram(g.m, 0x10000000 + i * UINT64_C(0x2000), 0x1000, VM_PROT_RW, &r[i]));
    for (unsigned i = 0; i < COUNT; i += 2) OK(vm_unmap(g.m, r[i]));
    set_reg(&g, VM_REG_RDI, 0x10000000 + 1999 * 0x2000);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    set_reg(&g, VM_REG_RDI, 0x10000000 + 1998 * 0x2000);
    set_reg(&g, VM_REG_RIP, CODE);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    vm_destroy(g.m);
}

/* ---- two vCPUs ---- */

static void *run_until_halt(void *arg)
{
    vm_exit e = VM_EXIT_INIT;
    int status = vm_vcpu_run(arg, NULL, &e);
    return (void *)(uintptr_t)(status ? 1000 : (int)e.reason);
}

TEST(two_vcpus_and_an_editor)
{
    need_kvm();
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_region *ram, *extra;
    o.backend = VM_BACKEND_KVM;
    o.vcpus = 2;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, RAM_BYTES, VM_PROT_RWX, &ram));
    /* lock inc dword [rdi]; loop; hlt */
    OK(vm_write(m, CODE, (const uint8_t[]){0xf0, 0xff, 0x07, 0xff, 0xc9, 0x75, 0xf9, 0xf4}, 8));
    pthread_t t[2];
    for (unsigned i = 0; i < 2; i++) {
        vm_vcpu *cpu = vm_vcpu_get(m, i);
        vm_regs r = VM_REGS_INIT;
        OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
        OK(vm_vcpu_get_regs(cpu, &r));
        r.rip = CODE;
        r.rdi = 0x2000;
        r.rcx = 50000;
        OK(vm_vcpu_set_regs(cpu, &r));
        pthread_create(&t[i], NULL, run_until_halt, cpu);
    }
    for (unsigned i = 0; i < 50; i++) { /* edits stop the world and let it go on */
        OK(vm_map_ram(m, 0x1000000, 0x1000, VM_PROT_RW, &extra));
        OK(vm_unmap(m, extra));
    }
    for (unsigned i = 0; i < 2; i++) {
        void *reason;
        pthread_join(t[i], &reason);
        CHECK_EQ((uintptr_t)reason, VM_EXIT_HALT);
    }
    uint32_t sum;
    OK(vm_read(m, 0x2000, &sum, 4));
    CHECK_EQ(sum, 100000);
    vm_destroy(m);
}

/* ---- interrupts on a PC ---- */

/* A PC in real mode about to run `code` at CODE, with `handler` at 1800h for `vector`. */
static vm_vcpu *real_mode_pc(vm_options *o, const void *code, size_t code_bytes, unsigned vector, const void *handler,
                             size_t handler_bytes, vm_machine **m)
{
    vm_regs r = VM_REGS_INIT;
    o->backend = VM_BACKEND_KVM;
    o->platform = VM_PLATFORM_PC;
    o->ram_bytes = 4 << 20;
    OK(vm_create(o, m));
    vm_vcpu *cpu = vm_vcpu_get(*m, 0);
    OK(vm_write(*m, CODE, code, code_bytes));
    OK(vm_write(*m, 0x1800, handler, handler_bytes));
    OK(vm_write(*m, vector * 4, (const uint8_t[]){0x00, 0x18, 0, 0}, 4));
    OK(vm_vcpu_set_mode(cpu, VM_MODE_REAL));
    OK(vm_vcpu_get_regs(cpu, &r));
    r.rip = CODE;
    r.rsp = 0x8000;
    OK(vm_vcpu_set_regs(cpu, &r));
    return cpu;
}

TEST(timer_interrupts_of_a_pc)
{
    need_kvm();
    is_pretending = true; /* a PC's real mode is not for KVM otherwise, where ring 0 is emulated */
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_exit e = VM_EXIT_INIT;
    static const uint8_t handler[] = {0xff, 0x06, 0x00, 0x20, 0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf};
    static const uint8_t code[] = {
        0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21,
        0xb0, 0x01, 0xe6, 0x21,                                                 /* PIC: base 20h */
        0xb0, 0xfe, 0xe6, 0x21,                                                 /* IRQ 0 alone */
        0xb0, 0x34, 0xe6, 0x43, 0xb0, 0x9c, 0xe6, 0x40, 0xb0, 0x2e, 0xe6, 0x40, /* 11932: 100 Hz */
        0xfb, 0xf4, 0x83, 0x3e, 0x00, 0x20, 0x05, 0x72, 0xf8,                   /* sti; hlt until 5 */
        0x83, 0x3e, 0x00, 0x20, 0x0a, 0x72, 0xf9,                               /* spin until 10 */
        0xfa, 0xb0, 0x07, 0xe6, 0xf4, 0xf4};                                    /* exit device: 7 */
    vm_vcpu *cpu = real_mode_pc(&o, code, sizeof code, 0x20, handler, sizeof handler, &m);
    vm_run_options ro = VM_RUN_OPTIONS_INIT;
    ro.deadline_ns = 20000000000u;
    OK(vm_vcpu_run(cpu, &ro, &e));
    CHECK_EQ(e.reason, VM_EXIT_GUEST_EXIT);
    CHECK_EQ(e.guest_exit.code, 7);
    uint16_t count;
    OK(vm_read(m, 0x2000, &count, 2));
    CHECK(count >= 10);
    vm_destroy(m);
    is_pretending = false;
}

/* One that KVM holds and one that it has not been given are two, whoever goes on and whoever looks in between. */
static void two_nmis(vm_backend goes_on)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_exit e = VM_EXIT_INIT;
    vm_sregs s = VM_SREGS_INIT;
    static const uint8_t handler[] = {0xff, 0x06, 0x00, 0x20, 0xcf}; /* inc word [2000h]; iret */
    static const uint8_t code[] = {0xeb, 0x00, 0x83, 0x3e, 0x00, 0x20, 0x02, 0x72,
                                   0xf9, 0xb0, 0x07, 0xe6, 0xf4, 0xf4}; /* until 2; exit device: 7 */
    uint16_t count = 0;
    o.cpu_model = "kvm";
    vm_vcpu *cpu = real_mode_pc(&o, code, sizeof code, 2, handler, sizeof handler, &m);
    vm_run_options ro = VM_RUN_OPTIONS_INIT;
    ro.deadline_ns = 20000000;
    OK(vm_vcpu_run(cpu, &ro, &e));
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    if (is_pretending) {
        CHECK(ioctl(kvm_vcpu_of(cpu)->fd, KVM_NMI, 0) == 0);
        cpu->x86.nmi_pending = true;
    } else {
        cpu->nmis_latched = 2;
        vm_vcpu_notify(cpu, X86_ATT_EVENT);
    }
    OK(vm_vcpu_get_sregs(cpu, &s));
    OK(vm_backend_select(m, goes_on));
    ro.deadline_ns = 10000000000u;
    OK(vm_vcpu_run(cpu, &ro, &e));
    CHECK_EQ(e.reason, VM_EXIT_GUEST_EXIT);
    OK(vm_read(m, 0x2000, &count, 2));
    CHECK_EQ(count, 2);
    vm_destroy(m);
}

TEST(two_nmis_are_two)
{
    need_kvm();
    for (unsigned i = 0; i < 2; i++) {
        is_pretending = i == 0; /* a PC's real mode is not for KVM otherwise, where ring 0 is emulated */
        two_nmis(VM_BACKEND_KVM);
        two_nmis(VM_BACKEND_INTERP);
    }
    is_pretending = false;
}

/* ---- moving between backends ---- */

static const vm_backend tour[] = {VM_BACKEND_KVM, VM_BACKEND_INTERP, VM_BACKEND_KVM, VM_BACKEND_JIT};

static void next_backend(guest *g, unsigned i)
{
    uint64_t has_jit = 0;
    vm_backend b = tour[i % 4];
    OK(vm_query(VM_BACKEND_JIT, "available", &has_jit));
    OK(vm_backend_select(g->m, b == VM_BACKEND_JIT && !has_jit ? VM_BACKEND_INTERP : b));
}

/* loop: in al,dx; add ebx,eax; fld1; faddp; movd xmm0,ebx; paddd xmm1,xmm0; out dx,eax; mov [rdi],ebx (MMIO); dec ecx;
 * jnz */
static const uint8_t tour_code[] = {0xd9, 0xee, 0xec, 0x01, 0xc3, 0xd9, 0xe8, 0xde, 0xc1, 0x66, 0x0f, 0x6e, 0xc3, 0x66,
                                    0x0f, 0xfe, 0xc8, 0xef, 0x89, 0x1f, 0xff, 0xc9, 0x75, 0xea, 0xdb, 0x1e, 0xf4};

static void tour_guest(bool moves, vm_regs *r, uint8_t xmm1[16], uint32_t *sum)
{
    guest g = open_guest(VM_BACKEND_INTERP, VM_MODE_FLAT64, tour_code, sizeof tour_code);
    vm_exit e = VM_EXIT_INIT;
    set_reg(&g, VM_REG_RDX, 0x3f8);
    set_reg(&g, VM_REG_RDI, 0x40000000);
    set_reg(&g, VM_REG_RSI, 0x3000);
    set_reg(&g, VM_REG_RCX, 20);
    for (unsigned i = 0; i < 200; i++) {
        if (moves) next_backend(&g, i);
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        if (e.reason == VM_EXIT_HALT) break;
        CHECK(e.reason == VM_EXIT_IO || e.reason == VM_EXIT_UNMAPPED);
        if (e.reason == VM_EXIT_IO && !e.io.is_write) e.io.data = (uint64_t)i * 3;
    }
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    *r = regs_of(&g);
    OK(vm_vcpu_read_reg(g.cpu, VM_REG_XMM1, xmm1, 16));
    memcpy(sum, g.ram + 0x3000, 4);
    vm_destroy(g.m);
}

TEST(moves_at_every_exit)
{
    need_kvm();
    vm_regs moved, stayed;
    uint8_t moved_xmm[16], stayed_xmm[16];
    uint32_t moved_sum, stayed_sum;
    tour_guest(true, &moved, moved_xmm, &moved_sum);
    tour_guest(false, &stayed, stayed_xmm, &stayed_sum);
    compare_regs(&moved, &stayed, 0);
    CHECK(!memcmp(moved_xmm, stayed_xmm, 16));
    CHECK_EQ(moved_sum, 20);
    CHECK_EQ(stayed_sum, 20);
}

TEST(moves_keep_system_state)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xf4, 0xf4, 0xf4);
    vm_sregs before = VM_SREGS_INIT, after = VM_SREGS_INIT;
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_get_sregs(g.cpu, &before));
    before.gdtr.base = 0x5000, before.gdtr.limit = 0x37;
    before.idtr.base = 0x6000, before.idtr.limit = 0xfff;
    before.fs.base = 0x123456789a;
    before.dr0 = 0x777000, before.cr2 = 0x4444;
    OK(vm_vcpu_set_sregs(g.cpu, &before));
    OK(vm_vcpu_set_msr(g.cpu, 0xc0000082, 0xffffffff81000000));
    for (unsigned i = 0; i < 3; i++) {
        next_backend(&g, i + 1);
        OK(vm_vcpu_run(g.cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(e.rip, CODE + i + 1);
        OK(vm_vcpu_get_sregs(g.cpu, &after));
        uint64_t lstar = 0;
        OK(vm_vcpu_get_msr(g.cpu, 0xc0000082, &lstar));
        CHECK_EQ(lstar, 0xffffffff81000000);
        if (memcmp(&before, &after, sizeof before)) {
            for (size_t b = 0; b < sizeof before; b++)
                if (((uint8_t *)&before)[b] != ((uint8_t *)&after)[b])
                    FAIL("system registers differ at byte %zu after move %u", b, i);
        }
    }
    vm_destroy(g.m);
}

TEST(moves_are_refused_with_a_reason)
{
    need_kvm();
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_region *ram;
    vm_exit e = VM_EXIT_INIT;
    o.backend = VM_BACKEND_INTERP;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, RAM_BYTES, VM_PROT_RWX, &ram));
    OK(vm_write(m, 0, "\xf4", 1));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL));
    int status = vm_backend_select(m, VM_BACKEND_KVM);
    if (status) {
        CHECK_EQ(status, VM_E_UNSUPPORTED);
        CHECK(strstr(vm_errmsg(), "CPUID"));
        CHECK_EQ(vm_machine_backend(m), VM_BACKEND_INTERP);
    }
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e)); /* either way the machine works */
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    REFUSED(vm_backend_select(NULL, VM_BACKEND_KVM), VM_E_INVALID);
    REFUSED(vm_backend_select(m, (vm_backend)77), VM_E_INVALID);
    vm_destroy(m);
}

/* ---- the host's failures ---- */

TEST(shutdown_then_on)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x0f, 0x0b);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_SHUTDOWN);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_SHUTDOWN);
    OK(vm_write(g.m, 0, "\x90\xf4", 2));
    OK(vm_vcpu_set_mode(g.cpu, VM_MODE_REAL));
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 2);
    vm_destroy(g.m);
}

static void close_descriptors(const char *kind)
{
    DIR *d = opendir("/proc/self/fd");
    struct dirent *e;
    while ((e = readdir(d))) {
        char path[300], target[300];
        snprintf(path, sizeof path, "/proc/self/fd/%s", e->d_name);
        ssize_t n = readlink(path, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
        if (strstr(target, kind)) close(atoi(e->d_name));
    }
    closedir(d);
}

TEST(descriptors_closed_by_somebody)
{
    static const char *const kinds[] = {"kvm-vcpu", "kvm-vm", "/dev/kvm"};
    need_kvm();
    for (unsigned i = 0; i < 3; i++) {
        guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xf4);
        vm_exit e = VM_EXIT_INIT;
        vm_region *r;
        close_descriptors(kinds[i]);
        int status = vm_vcpu_run(g.cpu, NULL, &e);
        CHECK(status == VM_OK || status == VM_E_HOST);
        if (i == 0) {
            CHECK_EQ(status, VM_E_HOST);
            CHECK(vm_errmsg()[0]);
        }
        (void)vm_map_ram(g.m, 0x1000000, 0x1000, VM_PROT_RW, &r);
        vm_destroy(g.m);
    }
}

TEST(file_cut_under_the_guest)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0x8a, 0x07, 0x88, 0x07, 0xf4);
    vm_region *r;
    vm_exit e = VM_EXIT_INIT;
    int fd = memfd_create("guest", 0);
    CHECK(fd >= 0 && ftruncate(fd, 0x4000) == 0);
    OK(vm_map_file(g.m, 0x1000000, 0x4000, VM_PROT_RW, fd, 0, false, &r));
    CHECK(ftruncate(fd, 0) == 0);
    set_reg(&g, VM_REG_RDI, 0x1002000);
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = 10000000000u;
    int status = vm_vcpu_run(g.cpu, &o, &e);
    CHECK_EQ(status, VM_E_HOST);
    CHECK(strstr(vm_errmsg(), "host memory"));
    OK(vm_vcpu_set_mode(g.cpu, VM_MODE_REAL)); /* the machine is not lost */
    OK(vm_write(g.m, 0, "\xf4", 1));
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(g.m);
    close(fd);
}

TEST(state_that_no_cpu_enters)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    vm_vcpu_of(&g.cpu->x86)->x86.cr0 |= UINT64_C(1) << 40;
    vm_vcpu_changed(g.cpu, VM_STATE_SREGS);
    REFUSED(vm_vcpu_run(g.cpu, NULL, &e), VM_E_HOST);
    OK(vm_vcpu_set_mode(g.cpu, VM_MODE_FLAT32));
    set_reg(&g, VM_REG_RIP, CODE);
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(g.m);
}

TEST(forked_child_gets_a_status)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xf4);
    pid_t child = fork();
    if (child == 0) {
        vm_exit e = VM_EXIT_INIT;
        int status = vm_vcpu_run(g.cpu, NULL, &e); /* KVM machines belong to the process that made them */
        _exit(status == VM_E_UNSUPPORTED && vm_errmsg()[0] ? 0 : 1);
    }
    int how = 1;
    CHECK(waitpid(child, &how, 0) == child);
    CHECK_EQ(how, 0);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(g.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(g.m);
}

TEST(stolen_descriptor)
{
    need_kvm();
    guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT32, 0xf4);
    vm_exit e = VM_EXIT_INIT;
    int other = memfd_create("other", 0);
    CHECK(dup2(other, kvm_vcpu_of(g.cpu)->fd) >= 0);
    REFUSED(vm_vcpu_run(g.cpu, NULL, &e), VM_E_HOST);
    vm_destroy(g.m);
    close(other);
}

/* This one comes before the C library's: the fail_at-th call fails. */
static _Atomic unsigned ioctl_calls;
static unsigned fail_at;
__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    va_start(args, request);
    void *argument = va_arg(args, void *);
    va_end(args);
    if (++ioctl_calls == fail_at) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* In place of the library's, which makes the system call itself. */
int kvm_enter(int fd) { return ioctl(fd, KVM_RUN, 0) < 0 ? -errno : 0; }

static unsigned open_files(void)
{
    unsigned n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

/* A short life that uses most of the backend; any call may fail, none may crash. */
static void life_with_a_failure(void)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_region *r;
    vm_exit e = VM_EXIT_INIT;
    vm_sregs s = VM_SREGS_INIT;
    vm_fpu f = VM_FPU_INIT;
    uint64_t bits[8];
    vm_run_options ro = VM_RUN_OPTIONS_INIT;
    ro.deadline_ns = 50000000;
    o.backend = VM_BACKEND_KVM;
    if (vm_create(&o, &m) != VM_OK) return;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    (void)vm_map_ram(m, 0, RAM_BYTES, VM_PROT_RWX, &r);
    (void)vm_write(m, 0, (const uint8_t[]){0xec, 0xee, 0x27, 0x8a, 0x07, 0xf4}, 6);
    (void)vm_dirty_log(m, true);
    (void)vm_vcpu_set_mode(cpu, VM_MODE_FLAT32);
    for (unsigned i = 0; i < 6; i++) (void)vm_vcpu_run(cpu, &ro, &e);
    (void)vm_vcpu_get_sregs(cpu, &s);
    (void)vm_vcpu_get_fpu(cpu, &f);
    (void)vm_dirty_fetch(m, 0, RAM_BYTES, bits);
    (void)vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
    (void)vm_vcpu_run(cpu, &ro, &e);
    (void)vm_protect(m, 0x1000, 0x1000, VM_PROT_R);
    if (vm_backend_select(m, VM_BACKEND_INTERP) == VM_OK) (void)vm_backend_select(m, VM_BACKEND_KVM);
    (void)vm_vcpu_run(cpu, &ro, &e);
    vm_destroy(m);
}

TEST_LIMIT(every_ioctl_fails_once, 120)
{
    need_kvm();
    ioctl_calls = fail_at = 0;
    life_with_a_failure();
    unsigned calls = ioctl_calls, files = open_files();
    CHECK(calls > 40);
    for (unsigned n = 1; n <= calls; n++) {
        ioctl_calls = 0;
        fail_at = n;
        life_with_a_failure();
        if (open_files() != files) FAIL("call %u failed: %u files are open, not %u", n, open_files(), files);
    }
    fail_at = 0;
}

TEST(create_and_destroy_leaves_nothing)
{
    need_kvm();
    unsigned before = 0, after = 0;
    for (unsigned round = 0; round < 2; round++) {
        for (unsigned i = 0; i < 100; i++) {
            guest g = OPEN(VM_BACKEND_KVM, VM_MODE_FLAT64, 0xf4);
            vm_exit e = VM_EXIT_INIT;
            OK(vm_vcpu_run(g.cpu, NULL, &e));
            vm_destroy(g.m);
        }
        unsigned *n = round ? &after : &before;
        DIR *d = opendir("/proc/self/fd");
        while (readdir(d)) ++*n;
        closedir(d);
    }
    CHECK_EQ(before, after);
}
