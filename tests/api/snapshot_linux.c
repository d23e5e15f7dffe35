/* snapshot_linux.c - snapshots, snapshot files and clones of a booted Linux: the shell on its console answers commands
 * that were typed after a restore, in another process, in clones that each go their own way.
 *
 * Guests: see tests/guests/fetch. The kernel boots once, on the JIT; other backends load its snapshot. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CLONES = 12 };

typedef struct guest { vm_machine *m; const char *wanted; char text[1 << 18]; size_t bytes, seen; } guest;

/* The text that is waited for stops the run: a fast guest writes hundreds of lines in one slice. */
static void on_output(void *user, const uint8_t *bytes, size_t count)
{
    guest *g = user;
    if (g->bytes + count >= sizeof g->text) {
        g->bytes = 0;
        g->seen = 0;
    }
    memcpy(g->text + g->bytes, bytes, count);
    g->bytes += count;
    g->text[g->bytes] = 0;
    if (g->wanted && strstr(g->text + g->seen, g->wanted))
        vm_vcpu_kick(vm_vcpu_get(g->m, 0));
}

static void adopt(guest *g, vm_machine *m)
{
    *g = (guest){ .m = m };
    OK(vm_serial_output(m, 0, on_output, g));
}

static const char *guest_file(const char *name)
{
    static char path[4][512];
    static unsigned n;
    const char *dir = getenv("LIBVM_GUESTS"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char *p = path[n++ % 4];
    if (dir)
        snprintf(p, sizeof path[0], "%s/%s", dir, name);
    else if (cache)
        snprintf(p, sizeof path[0], "%s/libvm/guests/%s", cache, name);
    else
        snprintf(p, sizeof path[0], "%s/.cache/libvm/guests/%s", home ? home : "", name);
    return p;
}

/* Run until the console shows the text; from the first byte not looked at yet. */
static void expect(guest *g, const char *text, unsigned seconds)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    time_t end = time(NULL) + seconds * test_patience();
    o.deadline_ns = 20 * 1000 * 1000;
    g->wanted = text;
    for (;;) {
        vm_exit e = VM_EXIT_INIT;
        char *at = strstr(g->text + g->seen, text);
        if (at) {
            g->wanted = NULL;
            g->seen = (size_t)(at - g->text) + strlen(text);
            return;
        }
        if (time(NULL) > end)
            FAIL("no \"%s\"; the console ends with \"%.200s\"", text,
                 g->text + (g->bytes > 200 ? g->bytes - 200 : 0));
        OK(vm_vcpu_run(vm_vcpu_get(g->m, 0), &o, &e));
        if (e.reason != VM_EXIT_DEADLINE && e.reason != VM_EXIT_KICK)
            FAIL("%s while waiting for \"%s\"", vm_exit_name(e.reason), text);
    }
}

static void type(guest *g, const char *line)
{
    CHECK_EQ(vm_serial_input(g->m, 0, (const uint8_t *)line, strlen(line)), strlen(line));
}

/* The shell computes, so that the echo of what was typed is not the answer. */
static void ask(guest *g, unsigned number, unsigned seconds)
{
    char line[64], answer[32];
    snprintf(line, sizeof line, "echo =$((%u*3))=\r", number);
    snprintf(answer, sizeof answer, "\n=%u=", number * 3);
    type(g, line);
    expect(g, answer, seconds);
    expect(g, "guest# ", seconds);
}

static vm_machine *make_pc(vm_backend backend, unsigned vcpus)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.vcpus = vcpus;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 256 << 20;
    OK(vm_create(&o, &m));
    return m;
}

static guest booted, other, clone_of[CLONES];

/* ---- a second vCPU on a thread of its own ---- */

static pthread_t second;
static _Atomic bool is_wanted;

static void *drive_second(void *arg)
{
    guest *g = arg;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = 20 * 1000 * 1000;
    while (is_wanted) {
        vm_exit e = VM_EXIT_INIT;
        if (vm_vcpu_run(vm_vcpu_get(g->m, 1), &o, &e) != VM_OK || e.reason != VM_EXIT_DEADLINE)
            return "the second vCPU stopped";
    }
    return NULL;
}

static void start_second(guest *g)
{
    is_wanted = true;
    CHECK(pthread_create(&second, NULL, drive_second, g) == 0);
}

static void stop_second(void)
{
    void *why = NULL;
    is_wanted = false;
    pthread_join(second, &why);
    if (why)
        FAIL("%s", (const char *)why);
}

static void boot(unsigned vcpus)
{
    const char *kernel = guest_file("vmlinuz-amd64"), *initrd = guest_file("initramfs-amd64");
    uint64_t jit = 0;
    if (vm_query(VM_BACKEND_JIT, "available", &jit) || !jit)
        test_skip("no JIT");
    if (access(kernel, R_OK) || access(initrd, R_OK))
        test_skip("no guest files: run tests/guests/fetch (needs a network)");
    test_runs_a_kernel();
    adopt(&booted, make_pc(VM_BACKEND_JIT, vcpus));
    vm_linux_boot b = VM_LINUX_BOOT_INIT;
    b.kernel = kernel;
    b.initrd = initrd;
    b.cmdline = "console=ttyS0";
    OK(vm_boot_linux(booted.m, &b));
    if (vcpus > 1)
        start_second(&booted);
    expect(&booted, "guest# ", 150);
}

TEST_LIMIT(restored_and_continued, 200)
{
    vm_snapshot *s = NULL, *t = NULL;
    boot(1);
    uint64_t then = vm_time(booted.m);
    OK(vm_snapshot_take(booted.m, &s));
    for (unsigned i = 1; i < 6; i++) {
        ask(&booted, 100 + i, 60);
        CHECK(vm_time(booted.m) > then);
        OK(vm_snapshot_restore(booted.m, s));
        CHECK(vm_time(booted.m) - then < UINT64_C(5000000000));    /* a loaded host may be slow */
    }
    /* in the middle of something */
    type(&booted, "i=0; while [ $i -lt 400 ]; do echo n$i; i=$((i+1)); done; echo d''one\r");
    expect(&booted, "\nn100\r", 60);
    OK(vm_snapshot_take(booted.m, &t));
    expect(&booted, "\nn399\r", 60);
    expect(&booted, "done", 60);
    OK(vm_snapshot_restore(booted.m, t));
    booted.seen = booted.bytes;
    expect(&booted, "\nn399\r", 60);
    expect(&booted, "done", 60);
    OK(vm_snapshot_restore(booted.m, s));
    booted.seen = booted.bytes;
    ask(&booted, 77, 60);
    CHECK(strstr(booted.text + booted.seen, "n3") == NULL);
    OK(vm_snapshot_restore(booted.m, t));
    vm_snapshot_free(s);
    vm_snapshot_free(t);
    booted.seen = booted.bytes;
    expect(&booted, "done", 60);
    vm_destroy(booted.m);
}

static void in_another_process(const char *path, vm_backend backend, unsigned number)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        vm_snapshot *s = NULL;
        adopt(&other, make_pc(backend, 1));
        OK(vm_snapshot_load_file(other.m, path, 0, &s));
        OK(vm_snapshot_restore(other.m, s));
        ask(&other, number, 100);
        OK(vm_snapshot_restore(other.m, s));
        vm_snapshot_free(s);
        ask(&other, number + 1, 100);
        vm_destroy(other.m);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
}

TEST_LIMIT(saved_and_loaded_elsewhere, 400)
{
    char path[64];
    vm_snapshot *s = NULL;
    snprintf(path, sizeof path, "/tmp/libvm-linux-%ld", (long)getpid());
    boot(1);
    OK(vm_snapshot_take(booted.m, &s));
    OK(vm_snapshot_save_file(s, path, VM_SNAPSHOT_NO_SYNC));
    in_another_process(path, VM_BACKEND_JIT, 11);
    in_another_process(path, VM_BACKEND_INTERP, 21);
    int status = vm_snapshot_save_file(s, path, VM_SNAPSHOT_NO_SYNC | VM_SNAPSHOT_COMPRESS);
    if (status != VM_E_UNSUPPORTED) {
        OK(status);
        in_another_process(path, VM_BACKEND_JIT, 31);
    }
    unlink(path);
    ask(&booted, 5, 60);
    vm_destroy(booted.m);
}

TEST_LIMIT(clones_go_their_own_way, 300)
{
    boot(1);
    type(&booted, "x=7\r");
    expect(&booted, "guest# ", 60);
    for (unsigned i = 0; i < CLONES; i++) {
        vm_machine *c = NULL;
        OK(vm_fork(booted.m, &c));
        adopt(&clone_of[i], c);
        if (i == CLONES / 2) {
            type(&booted, "x=9\r");
            expect(&booted, "guest# ", 60);
        }
    }
    for (unsigned i = 0; i < CLONES; i++) {
        char line[64], answer[32];
        snprintf(line, sizeof line, "x=$((x*%u)); echo \"<$x>\"\r", i + 1);
        snprintf(answer, sizeof answer, "\n<%u>", (i <= CLONES / 2 ? 7 : 9) * (i + 1));
        type(&clone_of[i], line);
        expect(&clone_of[i], answer, 60);
    }
    type(&booted, "echo \"<$x>\"\r");
    expect(&booted, "\n<9>", 60);
    for (unsigned i = 0; i < CLONES; i += 2)
        vm_destroy(clone_of[i].m);
    vm_destroy(booted.m);
    for (unsigned i = 1; i < CLONES; i += 2) {
        ask(&clone_of[i], i, 60);
        vm_destroy(clone_of[i].m);
    }
}

TEST_LIMIT(two_processors, 300)
{
    vm_snapshot *s = NULL;
    vm_machine *copy = NULL;
    boot(2);
    type(&booted, "grep -c ^processor /proc/cpuinfo\r");
    expect(&booted, "\n2\r", 60);
    expect(&booted, "guest# ", 60);
    stop_second();
    OK(vm_snapshot_take(booted.m, &s));
    for (unsigned i = 0; i < 4; i++) {
        start_second(&booted);
        type(&booted, "(i=0; while [ $i -lt 300 ]; do i=$((i+1)); done; echo a''$i) & (echo b''2); wait\r");
        expect(&booted, "a300", 100);
        ask(&booted, 50 + i, 60);
        stop_second();
        OK(vm_snapshot_restore(booted.m, s));
        booted.seen = booted.bytes;
    }
    OK(vm_fork(booted.m, &copy));
    vm_destroy(booted.m);
    adopt(&other, copy);
    start_second(&other);
    ask(&other, 9, 60);
    stop_second();
    vm_destroy(copy);
}
