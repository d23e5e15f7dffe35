/* replay.c - what was recorded happens again: on each software backend, whichever recorded, however the runs are cut up; logs
 * that are damaged, of other machines, or cut off; what must be refused meanwhile.
 *
 * The guest is replay_guest.c in a PC. The test is its outside: a console, two interrupt lines, messages, a device with
 * registers and a mind of its own, memory written from outside, and kicks at any moment. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

__asm__(".section .rodata\nguest: .incbin \"tests/api/replay_guest.bin\"\nguest_end:\n.text\n");
extern const uint8_t guest[], guest_end[];
enum { RAM = 4 << 20, SHARED = 0x20000, ROUNDS = SHARED, DONE = SHARED + 4, STACK = 0x9f000 };

static uint64_t next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 33;
}

/* ---- the machine ---- */

typedef struct world {
    vm_machine *m;
    vm_vcpu *cpu;
    uint64_t seed;                     /* of the device */
    unsigned reads, writes;
    bool is_quiet;                     /* the device must not be asked */
    _Atomic bool stop;
    _Atomic unsigned pokes;
    pthread_mutex_t outside;           /* held: nothing comes from there */
    unsigned exits;
} world;

/* Answers at random, and sometimes pulls a line or writes to memory while it does. */
static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    world *w = user;
    (void)cpu, (void)width;
    CHECK(!w->is_quiet);
    if (offset == 8)
        return -1;
    *value = next(&w->seed);
    if (offset == 4)
        OK(vm_irq_set(w->m, 5, false));
    else if (++w->reads % 3 == 0)
        OK(vm_irq_set(w->m, 5, true));
    else if (w->reads % 3 == 1)
        OK(vm_write(w->m, 0x90000 + w->reads % 4096, value, 4));
    return 0;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    world *w = user;
    (void)cpu, (void)offset, (void)width;
    CHECK(!w->is_quiet);
    w->writes++;
    if (value & 1)
        OK(vm_irq_msi(w->m, 0xfee00000, 0x60));
    return 0;
}

static void make(world *w, vm_backend backend, unsigned rounds)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_regs r = VM_REGS_INIT;
    *w = (world){ .seed = 99, .outside = PTHREAD_MUTEX_INITIALIZER };
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = RAM;
    OK(vm_create(&o, &w->m));
    w->cpu = vm_vcpu_get(w->m, 0);
    ops.read = device_read;
    ops.write = device_write;
    OK(vm_map_pio(w->m, 0x500, 12, &ops, w, NULL));
    OK(vm_write(w->m, 0x10000, guest, (size_t)(guest_end - guest)));
    OK(vm_write(w->m, ROUNDS, &rounds, 4));
    OK(vm_vcpu_set_mode(w->cpu, VM_MODE_FLAT32));
    OK(vm_vcpu_get_regs(w->cpu, &r));
    r.rip = 0x10000;
    r.rsp = STACK;
    OK(vm_vcpu_set_regs(w->cpu, &r));
}

static uint32_t word(world *w, uint64_t at)
{
    uint32_t v;
    OK(vm_read(w->m, at, &v, 4));
    return v;
}

static int log_file(void)
{
    int fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

/* ---- the outside ---- */

static void poke(world *w, uint64_t *seed)
{
    uint8_t bytes[40];
    uint32_t v = (uint32_t)next(seed);
    switch (next(seed) % 5) {
    case 0:
        for (unsigned i = 0; i < sizeof bytes; i++)
            bytes[i] = (uint8_t)next(seed);
        CHECK(vm_serial_input(w->m, 0, bytes, 1 + next(seed) % sizeof bytes) >= 0);
        break;
    case 1: OK(vm_irq_set(w->m, 5, false)); OK(vm_irq_set(w->m, 5, true)); break;
    case 2: OK(vm_irq_msi(w->m, 0xfee00000, 0x60 + v % 4)); break;
    case 3: OK(vm_write(w->m, 0x80000 + v % 4096, &v, 4)); break;
    default: vm_vcpu_kick(w->cpu);
    }
}

static void *outside(void *arg)
{
    world *w = arg;
    uint64_t seed = 5;
    while (!w->stop) {
        pthread_mutex_lock(&w->outside);
        poke(w, &seed);
        pthread_mutex_unlock(&w->outside);
        w->pokes++;
        usleep(50 + next(&seed) % 400);
    }
    return NULL;
}

/* One run, and the answer to what nobody handled. */
static vm_exit run(world *w, uint64_t budget, vm_exit *e)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.max_instructions = budget;
    o.deadline_ns = TEST_SECONDS(30);                    /* a loaded host may be slow */
    if (e->reason == VM_EXIT_IO)
        e->io.data = next(&w->seed);
    OK(vm_vcpu_run(w->cpu, &o, e));
    w->exits += e->reason == VM_EXIT_IO;
    return *e;
}

typedef struct mark { uint64_t at, sum; } mark;
enum { MARKS = 40 };
typedef struct record { int fd; uint64_t end, sum, start; mark marks[MARKS]; unsigned count; } record;

static mark where(world *w)
{
    vm_replay_info i = VM_REPLAY_INFO_INIT;
    mark k;
    OK(vm_replay_get_info(w->m, &i));
    k.at = i.position;
    OK(vm_machine_checksum(w->m, &k.sum));
    return k;
}

static void check_boring(const vm_exit *e, bool more)
{
    bool ok = e->reason == VM_EXIT_BUDGET || (more && (e->reason == VM_EXIT_KICK || e->reason == VM_EXIT_IO));
    if (!ok) {
        char text[200];
        vm_exit_format(e, text, sizeof text);
        FAIL("%s", text);
    }
}

/* Records a whole life, with a thread outside and inputs between the runs. */
static record record_life(vm_backend backend, unsigned rounds, bool skip_idle, bool is_wild, bool omits_ram)
{
    world w;
    record rec = { .fd = log_file() };
    vm_record_options o = VM_RECORD_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    pthread_t thread;
    uint64_t seed = 17, id = 0x1234;
    make(&w, backend, is_wild ? UINT32_MAX : rounds);
    run(&w, is_wild ? 200000 : 1000, &e);                /* it lived before; wildly: with its clock running */
    OK(vm_irq_set(w.m, 5, true));
    o.skip_idle = skip_idle;
    o.omit_ram = omits_ram;
    OK(vm_record(w.m, rec.fd, &o));
    rec.start = vm_vcpu_retired(w.cpu);
    REFUSED(vm_record(w.m, rec.fd, &o), VM_E_BUSY);
    REFUSED(vm_replay(w.m, rec.fd), VM_E_BUSY);
    REFUSED(vm_replay_stop(w.m), VM_E_INVALID);
    if (is_wild)
        CHECK(pthread_create(&thread, NULL, outside, &w) == 0);
    while (!word(&w, DONE)) {
        if (is_wild && w.pokes > rounds / 8) {           /* enough of it: the guest ends when it sees this */
            uint32_t zero = 0;
            OK(vm_write(w.m, ROUNDS, &zero, 4));
        }
        bool looks = next(&seed) % 4 == 0 && rec.count < MARKS;        /* what happens between the end of a run and the look
                                                                          happens later in the replay */
        if (looks)
            pthread_mutex_lock(&w.outside);
        run(&w, 1 + next(&seed) % 60000, &e);
        if (e.reason != VM_EXIT_HALT || !word(&w, DONE))
            check_boring(&e, true);
        if (looks && e.reason == VM_EXIT_BUDGET)
            rec.marks[rec.count++] = where(&w);
        if (looks)
            pthread_mutex_unlock(&w.outside);
        if (is_wild && e.reason != VM_EXIT_IO && next(&seed) % 8 == 0) {
            OK(vm_vcpu_write_reg(w.cpu, VM_REG_DR0, &id, 8));
            id += 0x1000;
            uint32_t v = (uint32_t)id;
            OK(vm_vcpu_write(w.cpu, 0x91000, &v, 4));
            OK(vm_irq_set(w.m, 5, true));
        }
        if (is_wild && e.reason != VM_EXIT_IO && next(&seed) % 32 == 0)
            (void)vm_vcpu_inject(w.cpu, 0x70, false, 0);         /* an earlier one may wait */
    }
    w.stop = true;
    if (is_wild)
        CHECK(pthread_join(thread, NULL) == 0);
    mark last = where(&w);
    OK(vm_record_stop(w.m));
    REFUSED(vm_record_stop(w.m), VM_E_INVALID);
    rec.end = last.at;
    rec.sum = last.sum;
    CHECK(w.reads > 0 && w.writes > 0 && w.exits > 0);
    CHECK(rounds < 1000 || word(&w, SHARED + 8) > 3);                     /* ticks, console bytes, line interrupts */
    CHECK(!is_wild || (word(&w, SHARED + 12) > 10 && word(&w, SHARED + 16) > 3));
    vm_destroy(w.m);
    return rec;
}

/* Replays it in one piece, no budget. */
static void replay_whole(vm_backend backend, const record *rec, unsigned rounds)
{
    world w;
    vm_exit e = VM_EXIT_INIT;
    make(&w, backend, rounds);
    run(&w, 1000, &e);
    w.is_quiet = true;
    CHECK(lseek(rec->fd, 0, SEEK_SET) == 0);
    OK(vm_replay(w.m, rec->fd));
    OK(vm_vcpu_run(w.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_REPLAY);
    if (e.replay.status)
        FAIL("%s", vm_errmsg());
    CHECK_EQ(where(&w).sum, rec->sum);
    vm_destroy(w.m);
}

/* Replays it, cut up by `seed`; the state is compared wherever the recording's was looked at. */
static void replay_life(vm_backend backend, const record *rec, unsigned rounds, uint64_t seed)
{
    world w;
    vm_exit e = VM_EXIT_INIT;
    unsigned k = 0;
    make(&w, backend, rounds);
    run(&w, seed ? 5000 : 1, &e);      /* wherever it is: the log has it all */
    w.is_quiet = true;
    CHECK(lseek(rec->fd, 0, SEEK_SET) == 0);
    OK(vm_replay(w.m, rec->fd));
    REFUSED(vm_irq_set(w.m, 5, true), VM_E_BUSY);
    REFUSED(vm_serial_input(w.m, 0, (const uint8_t *)"x", 1), VM_E_BUSY);
    REFUSED(vm_write(w.m, 0, "x", 1), VM_E_BUSY);
    REFUSED(vm_reset(w.m), VM_E_BUSY);
    REFUSED(vm_map_ram(w.m, 0x40000000, 4096, VM_PROT_RWX, NULL), VM_E_BUSY);
    for (;;) {
        uint64_t at = where(&w).at, to = k < rec->count ? rec->marks[k].at : rec->end + 1;
        uint64_t budget = seed ? 1 + next(&seed) % (next(&seed) % 4 ? 100000 : 10) : to - at;
        if (budget > to - at)
            budget = to - at;
        if (seed && next(&seed) % 8 == 0)
            vm_vcpu_kick(w.cpu);
        if (budget)
            run(&w, budget, &e);
        if (e.reason == VM_EXIT_REPLAY)
            break;
        if (budget)
            check_boring(&e, true);
        CHECK(e.reason != VM_EXIT_IO);
        mark here = where(&w);
        while (k < rec->count && here.at == rec->marks[k].at) {
            if (here.sum != rec->marks[k].sum)
                FAIL("mark %u at %llu: another state", k, (unsigned long long)here.at);
            k++;
        }
    }
    if (e.replay.status)
        FAIL("%s", vm_errmsg());
    CHECK_EQ(k, rec->count);
    CHECK_EQ(e.replay.position, rec->end);
    CHECK_EQ(where(&w).sum, rec->sum);
    OK(vm_vcpu_run(w.cpu, NULL, &e));                    /* it stays there */
    CHECK_EQ(e.reason, VM_EXIT_REPLAY);
    OK(vm_replay_stop(w.m));
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = TEST_SECONDS(2);
    OK(vm_vcpu_run(w.cpu, &o, &e));                      /* alone: the guest has ended with interrupts off */
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(w.m);
}

/* Snapshots on the way, gone back to in any order; and a replay that begins at one. */
static void back_and_forth(const record *rec, vm_backend backend, unsigned rounds)
{
    world w;
    vm_exit e = VM_EXIT_INIT;
    vm_snapshot *first, *s[MARKS];
    uint64_t seed = 3;
    make(&w, backend, rounds);
    run(&w, 1000, &e);
    OK(vm_snapshot_take(w.m, &first));
    w.is_quiet = true;
    CHECK(lseek(rec->fd, 0, SEEK_SET) == 0);
    OK(vm_replay(w.m, rec->fd));
    REFUSED(vm_snapshot_restore(w.m, first), VM_E_BUSY);
    for (unsigned k = 0; k < rec->count; k++) {
        uint64_t at = where(&w).at;
        if (rec->marks[k].at > at)
            run(&w, rec->marks[k].at - at, &e);
        OK(vm_snapshot_take(w.m, &s[k]));
    }
    for (unsigned i = 0; i < 30 && rec->count > 1; i++) {
        unsigned from = (unsigned)(next(&seed) % (rec->count - 1)), to = from + 1;
        OK(vm_snapshot_restore(w.m, s[from]));
        CHECK_EQ(where(&w).sum, rec->marks[from].sum);
        if (rec->marks[to].at > rec->marks[from].at)
            run(&w, rec->marks[to].at - rec->marks[from].at, &e);
        if (e.reason == VM_EXIT_REPLAY)
            FAIL("%s", vm_errmsg());
        CHECK_EQ(where(&w).at, rec->marks[to].at);
        CHECK_EQ(where(&w).sum, rec->marks[to].sum);
    }
    OK(vm_snapshot_restore(w.m, s[0]));
    OK(vm_vcpu_run(w.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_REPLAY);
    CHECK_EQ(e.replay.status, VM_OK);
    OK(vm_replay_stop(w.m));
    OK(vm_snapshot_restore(w.m, first));                 /* and all of it once more */
    CHECK(lseek(rec->fd, 0, SEEK_SET) == 0);
    OK(vm_replay(w.m, rec->fd));
    REFUSED(vm_snapshot_restore(w.m, s[0]), VM_E_BUSY);
    OK(vm_vcpu_run(w.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_REPLAY);
    CHECK_EQ(e.replay.status, VM_OK);
    CHECK_EQ(where(&w).sum, rec->sum);
    for (unsigned k = 0; k < rec->count; k++)
        vm_snapshot_free(s[k]);
    vm_snapshot_free(first);
    vm_destroy(w.m);
}

static const vm_backend software[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT };
typedef struct life { vm_backend by, on; bool is_wild; } life;

static void relive(const void *arg)
{
    const life *l = arg;
    for (unsigned i = 0; i < 3; i++) {
        unsigned rounds = i == 2 ? 6000 : 1500;
        record rec = record_life(l->by, rounds, i != 1, l->is_wild, false);
        unsigned life = l->is_wild ? UINT32_MAX : rounds;
        replay_whole(l->on, &rec, life);
        replay_life(l->on, &rec, life, 0);
        replay_life(l->on, &rec, life, 7 + i);
        back_and_forth(&rec, l->on, life);
        close(rec.fd);
    }
}

SETUP(lives)
{
    static life lives[8];
    unsigned n = 0;
    for (unsigned by = 0; by < 2; by++)
        for (unsigned on = 0; on < 2; on++)
            for (unsigned wild = 0; wild < 2; wild++) {
                char name[80];
                uint64_t available = 0;
                if (vm_query(software[by], "available", &available) || !available || vm_query(software[on], "available", &available) ||
                    !available)
                    continue;
                lives[n] = (life){ software[by], software[on], wild };
                snprintf(name, sizeof name, "%s.%s-%s", wild ? "wild_life" : "quiet_life", vm_backend_name(software[by]),
                         vm_backend_name(software[on]));
                test_add(name, relive, &lives[n++], 0);
            }
}

/* ---- logs that are not what they should be ---- */

static uint8_t *bytes_of(int fd, size_t *bytes)
{
    *bytes = (size_t)lseek(fd, 0, SEEK_END);
    uint8_t *p = malloc(*bytes);
    CHECK(p && pread(fd, p, *bytes, 0) == (ssize_t)*bytes);
    return p;
}

static int try_log(const uint8_t *p, size_t bytes, unsigned rounds)
{
    world w;
    int fd = log_file();
    CHECK(write(fd, p, bytes) == (ssize_t)bytes && lseek(fd, 0, SEEK_SET) == 0);
    make(&w, VM_BACKEND_INTERP, rounds);
    uint64_t before, after;
    OK(vm_machine_checksum(w.m, &before));
    int status = vm_replay(w.m, fd);
    OK(vm_machine_checksum(w.m, &after));
    if (status != VM_OK) {
        CHECK_EQ(before, after);
        CHECK(vm_errmsg()[0] != 0);
    }
    vm_destroy(w.m);
    close(fd);
    return status;
}

TEST(damaged_logs)
{
    record rec = record_life(VM_BACKEND_INTERP, 300, true, false, false);
    size_t bytes;
    uint64_t seed = 1;
    uint8_t *p = bytes_of(rec.fd, &bytes);
    OK(try_log(p, bytes, 300));
    for (unsigned i = 0; i < 60; i++)
        CHECK_EQ(try_log(p, i < 20 ? i * 9 : (size_t)(next(&seed) % bytes), 300), VM_E_FORMAT);
    for (unsigned i = 0; i < 200; i++) {
        size_t at = i < 80 ? i : (size_t)(next(&seed) % bytes);
        p[at] ^= (uint8_t)(1u << i % 8);
        CHECK_EQ(try_log(p, bytes, 300), VM_E_FORMAT);
        p[at] ^= (uint8_t)(1u << i % 8);
    }
    free(p);
    close(rec.fd);
}

TEST(other_machines_and_refusals)
{
    record rec = record_life(VM_BACKEND_INTERP, 300, true, false, true);
    world w;
    vm_options o = VM_OPTIONS_INIT;
    vm_record_options ro = VM_RECORD_OPTIONS_INIT;
    vm_replay_info info = VM_REPLAY_INFO_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_machine *m;
    /* omit_ram: RAM has to be there */
    make(&w, VM_BACKEND_INTERP, 300);
    CHECK(lseek(rec.fd, 0, SEEK_SET) == 0);
    REFUSED(vm_replay(w.m, rec.fd), VM_E_INVALID);
    run(&w, 1000, &e);
    w.is_quiet = true;
    CHECK(lseek(rec.fd, 0, SEEK_SET) == 0);
    OK(vm_replay(w.m, rec.fd));
    uint64_t rax = 1;
    OK(vm_vcpu_write_reg(w.cpu, VM_REG_RAX, &rax, 8));   /* another history */
    OK(vm_vcpu_run(w.cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_REPLAY);
    CHECK_EQ(e.replay.status, VM_E_FORMAT);
    OK(vm_replay_get_info(w.m, &info));
    CHECK_EQ(info.mode, VM_REPLAY_PLAYING);
    CHECK_EQ(info.status, VM_E_FORMAT);
    vm_destroy(w.m);
    /* the wrong size of RAM */
    o.platform = VM_PLATFORM_PC;
    o.backend = VM_BACKEND_INTERP;
    o.ram_bytes = 2 * RAM;
    OK(vm_create(&o, &m));
    CHECK(lseek(rec.fd, 0, SEEK_SET) == 0);
    REFUSED(vm_replay(m, rec.fd), VM_E_INVALID);
    vm_destroy(m);
    o.vcpus = 2;
    OK(vm_create(&o, &m));
    REFUSED(vm_replay(m, rec.fd), VM_E_UNSUPPORTED);
    REFUSED(vm_record(m, rec.fd, NULL), VM_E_UNSUPPORTED);
    vm_destroy(m);
    OK(vm_create(NULL, &m));
    REFUSED(vm_record(m, rec.fd, NULL), VM_E_UNSUPPORTED);
    REFUSED(vm_record(NULL, rec.fd, NULL), VM_E_INVALID);
    REFUSED(vm_replay(m, -1), VM_E_INVALID);
    REFUSED(vm_machine_checksum(m, NULL), VM_E_INVALID);
    vm_destroy(m);
    /* a log that is full; a descriptor that takes nothing */
    make(&w, VM_BACKEND_INTERP, UINT32_MAX);
    ro.max_bytes = 2000;
    int fd = log_file();
    OK(vm_record(w.m, fd, &ro));
    while (run(&w, 0, &e).reason != VM_EXIT_REPLAY)
        CHECK(e.reason == VM_EXIT_IO);
    CHECK_EQ(e.replay.status, VM_E_NOMEM);
    REFUSED(vm_record_stop(w.m), VM_E_NOMEM);
    close(fd);
    REFUSED(vm_record(w.m, fd, NULL), VM_E_HOST);
    vm_destroy(w.m);
    close(rec.fd);
}
