/* replay_linux.c - a Linux boots while it is recorded, somebody types at its console at any moment, and it all happens again:
 * the same text, the same memory, the same registers, at several places on the way, on each software backend.
 *
 * Guests: see tests/guests/fetch. Recording is the JIT's; the interpreter's replay takes a while and is made only with
 * TEST_LONG set. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct guest { vm_machine *m; vm_vcpu *cpu; char text[1 << 19]; _Atomic size_t bytes; _Atomic bool stop; } guest;
typedef struct mark { uint64_t at, sum; } mark;
enum { MARKS = 12, PROMPTS = 9 };
typedef struct record { int fd; mark marks[MARKS], end; unsigned count; size_t bytes; char text[1 << 19]; } record;

static void on_output(void *user, const uint8_t *bytes, size_t count)
{
    guest *g = user;
    for (size_t i = 0; i < count && g->bytes + 1 < sizeof g->text; i++)
        g->text[g->bytes++] = (char)bytes[i];
}

static const char *guest_file(const char *name)
{
    static char path[2][512];
    static unsigned n;
    const char *dir = getenv("LIBVM_GUESTS"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char *p = path[n++ % 2];
    if (dir)
        snprintf(p, sizeof path[0], "%s/%s", dir, name);
    else
        snprintf(p, sizeof path[0], "%s%s/libvm/guests/%s", cache ? cache : home ? home : "", cache ? "" : "/.cache", name);
    return p;
}

static void boot(guest *g, vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_linux_boot b = VM_LINUX_BOOT_INIT;
    const char *kernel = guest_file("vmlinuz-amd64"), *initrd = guest_file("initramfs-amd64");
    uint64_t available = 0;
    test_runs_a_kernel();
    if (access(kernel, R_OK) || access(initrd, R_OK))
        test_skip("no guests here (tests/guests/fetch): %s", kernel);
    if (vm_query(backend, "available", &available) || !available)
        test_skip("%s", vm_errmsg());
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 128u << 20;
    b.kernel = kernel;
    b.initrd = initrd;
    b.cmdline = "console=ttyS0 quiet";
    OK(vm_create(&o, &g->m));
    g->cpu = vm_vcpu_get(g->m, 0);
    OK(vm_boot_linux(g->m, &b));
    OK(vm_serial_output(g->m, 0, on_output, g));
}

static unsigned count_of(const guest *g, const char *text)
{
    unsigned n = 0;
    for (const char *p = g->text; (p = strstr(p, text)) != NULL; p++)
        n++;
    return n;
}

/* A character now and then while it boots, then a command for each prompt, in pieces, with pauses of all lengths. */
static void *typist(void *arg)
{
    guest *g = arg;
    static const char *const lines[] = { "uname -a\n", "ls /\n", "echo a b c | md5sum\n", "date; cat /proc/interrupts\n" };
    unsigned seed = 1, done = 0;
    while (!g->stop) {
        usleep((useconds_t)(rand_r(&seed) % 30000));
        if (count_of(g, "guest# ") <= done) {
            if (!done && rand_r(&seed) % 8 == 0)
                vm_serial_input(g->m, 0, (const uint8_t *)" ", 1);
            continue;
        }
        const char *line = lines[done++ % 4];
        for (size_t left = strlen(line), part; left && !g->stop; left -= part) {
            int taken = vm_serial_input(g->m, 0, (const uint8_t *)line, 1 + (size_t)rand_r(&seed) % (left < 4 ? left : 4));
            part = taken > 0 ? (size_t)taken : 0;
            line += part;
            usleep((useconds_t)(rand_r(&seed) % 4000));
        }
    }
    return NULL;
}

static mark where(guest *g)
{
    vm_replay_info i = VM_REPLAY_INFO_INIT;
    mark k;
    OK(vm_replay_get_info(g->m, &i));
    OK(vm_machine_checksum(g->m, &k.sum));
    k.at = i.position;
    return k;
}

static void record_boot(guest *g, record *rec)
{
    vm_record_options o = VM_RECORD_OPTIONS_INIT;
    vm_run_options r = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    pthread_t thread;
    time_t end = time(NULL) + 50 * test_patience();
    o.skip_idle = true;
    boot(g, VM_BACKEND_JIT);
    OK(vm_record(g->m, rec->fd, &o));
    CHECK(pthread_create(&thread, NULL, typist, g) == 0);
    r.deadline_ns = TEST_SECONDS(10);
    while (count_of(g, "guest# ") < PROMPTS) {
        if (time(NULL) > end)
            FAIL("the guest does not get there: %s", g->text);
        r.max_instructions = 60000000;
        OK(vm_vcpu_run(g->cpu, &r, &e));
        CHECK_EQ(e.reason, VM_EXIT_BUDGET);
        if (rec->count < MARKS)
            rec->marks[rec->count++].at = where(g).at;
    }
    g->stop = true;
    CHECK(pthread_join(thread, NULL) == 0);
    rec->end = where(g);
    OK(vm_record_stop(g->m));
    rec->bytes = g->bytes;
    memcpy(rec->text, g->text, g->bytes);
    vm_destroy(g->m);
}

static void replay_boot(guest *g, vm_backend backend, record *rec, bool is_first)
{
    vm_run_options r = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    boot(g, backend);
    CHECK(lseek(rec->fd, 0, SEEK_SET) == 0);
    OK(vm_replay(g->m, rec->fd));
    for (unsigned k = 0; k < rec->count; k++) {
        r.max_instructions = rec->marks[k].at - where(g).at;
        OK(vm_vcpu_run(g->cpu, &r, &e));
        if (e.reason == VM_EXIT_REPLAY)
            FAIL("%s", vm_errmsg());
        mark here = where(g);
        CHECK_EQ(here.at, rec->marks[k].at);
        if (is_first)
            rec->marks[k].sum = here.sum;
        else if (here.sum != rec->marks[k].sum)
            FAIL("another state at instruction %llu", (unsigned long long)here.at);
    }
    OK(vm_vcpu_run(g->cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_REPLAY);
    if (e.replay.status)
        FAIL("%s", vm_errmsg());
    CHECK_EQ(where(g).sum, rec->end.sum);
    CHECK_EQ(g->bytes, rec->bytes);
    CHECK(!memcmp(g->text, rec->text, rec->bytes));
    vm_destroy(g->m);
}

TEST_LIMIT(boot_typed_at, 300)
{
    static record rec;
    static guest g[4];
    rec.fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(rec.fd >= 0);
    record_boot(&g[0], &rec);
    replay_boot(&g[1], VM_BACKEND_JIT, &rec, true);
    replay_boot(&g[2], VM_BACKEND_JIT, &rec, false);
    if (getenv("TEST_LONG"))
        replay_boot(&g[3], VM_BACKEND_INTERP, &rec, false);
}
