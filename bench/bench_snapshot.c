/* bench_snapshot.c - putting machines back and cloning them: resets a second of a BARE machine whose guest dirties N pages
 * between two restores, beside a bare memcpy of N pages from a known list and beside Unicorn (its context, and the same
 * known list written back: it has no memory snapshots); taking, saving, loading and forking a booted Debian.
 *
 * usage: bench_snapshot [--backend jit|interp] [--json FILE] [--guests DIRECTORY] [--clones N]
 * The clock is the thread's CPU time; every figure is the best of several short rounds. Without guest files
 * (tests/guests/fetch) the second part is left out.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef HAVE_UNICORN
#include <unicorn/unicorn.h>
#endif

enum { CODE = 0x1000, DATA = 0x100000, PAGES = 1024, ROUNDS = 12 };

/* mov rax, DATA; next: mov [rax], rcx; add rax, 4096; dec ecx; jnz next; hlt */
static const uint8_t code[] = { 0x48, 0xc7, 0xc0, 0x00, 0x00, 0x10, 0x00, 0x48, 0x89, 0x08, 0x48, 0x05, 0x00, 0x10, 0x00, 0x00,
                                0xff, 0xc9, 0x75, 0xf3, 0xf4 };
static vm_backend backend = VM_BACKEND_JIT;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double wall(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void must(int status, const char *what)
{
    if (status >= 0)
        return;
    fprintf(stderr, "bench_snapshot: %s: %s\n", what, vm_errmsg());
    exit(1);
}
#define MUST(call) must(call, #call)

static unsigned repeats(unsigned pages)
{
    return 60000 / (pages + 2) + 1;
}

/* ---- resets ---- */

static double best(double (*round)(void *state, unsigned pages, unsigned count), void *state, unsigned pages)
{
    double least = 1e9;
    for (int i = 0; i < ROUNDS; i++) {
        double t = round(state, pages, repeats(pages)) / repeats(pages);
        least = t < least ? t : least;
    }
    return 1 / least;
}

typedef struct target { vm_machine *m; vm_vcpu *cpu; vm_snapshot *s; } target;

static double reset_round(void *state, unsigned pages, unsigned count)
{
    target *t = state;
    vm_exit e = VM_EXIT_INIT;
    (void)pages;
    double begin = now();
    for (unsigned i = 0; i < count; i++) {
        MUST(vm_vcpu_run(t->cpu, NULL, &e));
        MUST(vm_snapshot_restore(t->m, t->s));
    }
    return now() - begin;
}

static double resets(unsigned pages)
{
    vm_options o = VM_OPTIONS_INIT;
    target t;
    uint64_t rip = CODE, rcx = pages, v = 1;
    o.backend = backend;
    MUST(vm_create(&o, &t.m));
    MUST(vm_map_ram(t.m, 0, 0x10000, VM_PROT_RWX, NULL));
    MUST(vm_map_ram(t.m, DATA, PAGES * 4096, VM_PROT_RWX, NULL));
    MUST(vm_write(t.m, CODE, code, sizeof code));
    for (unsigned i = 0; i < PAGES; i++)
        MUST(vm_write(t.m, DATA + i * 4096 + 8, "full", 4));
    t.cpu = vm_vcpu_get(t.m, 0);
    MUST(vm_vcpu_set_mode(t.cpu, VM_MODE_FLAT64));
    MUST(vm_vcpu_write_reg(t.cpu, VM_REG_RIP, &rip, 8));
    MUST(vm_vcpu_write_reg(t.cpu, VM_REG_RCX, &rcx, 8));
    MUST(vm_snapshot_take(t.m, &t.s));
    (void)reset_round(&t, pages, 3000);
    double rate = best(reset_round, &t, pages);
    MUST(vm_read(t.m, DATA + (pages - 1) * 4096, &v, 8));
    vm_destroy(t.m);
    return v == 0 ? rate : -1;
}

typedef struct copies { uint8_t *to, *from; } copies;

static double copy_round(void *state, unsigned pages, unsigned count)
{
    copies *c = state;
    double begin = now();
    for (unsigned i = 0; i < count; i++)
        for (unsigned p = 0; p < pages; p++) {
            c->to[p * 4096] = (uint8_t)i;
            memmove(c->to + p * 4096, c->from + p * 4096, 4096);
        }
    return now() - begin;
}

static double bare_copies(unsigned pages)
{
    copies c = { mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                 mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) };
    memset(c.to, 1, PAGES * 4096);
    memset(c.from, 2, PAGES * 4096);
    double rate = best(copy_round, &c, pages);
    munmap(c.to, PAGES * 4096);
    munmap(c.from, PAGES * 4096);
    return rate;
}

#ifdef HAVE_UNICORN
typedef struct peer { uc_engine *uc; uc_context *context; uint8_t *pages; } peer;

static double peer_round(void *state, unsigned pages, unsigned count)
{
    peer *p = state;
    double begin = now();
    for (unsigned i = 0; i < count; i++) {
        uc_emu_start(p->uc, CODE, CODE + sizeof code - 1, 0, 0);
        uc_context_restore(p->uc, p->context);
        for (unsigned k = 0; k < pages; k++)
            uc_mem_write(p->uc, DATA + k * 4096, p->pages + k * 4096, 4096);
    }
    return now() - begin;
}

static double peer_resets(unsigned pages)
{
    peer p = { .pages = calloc(PAGES, 4096) };
    uint64_t rcx = pages;
    if (!p.pages || uc_open(UC_ARCH_X86, UC_MODE_64, &p.uc))
        return -1;
    uc_mem_map(p.uc, 0, 0x10000, UC_PROT_ALL);
    uc_mem_map(p.uc, DATA, PAGES * 4096, UC_PROT_ALL);
    uc_mem_write(p.uc, CODE, code, sizeof code);
    uc_reg_write(p.uc, UC_X86_REG_RCX, &rcx);
    uc_context_alloc(p.uc, &p.context);
    uc_context_save(p.uc, p.context);
    (void)peer_round(&p, pages, 3);
    double rate = best(peer_round, &p, pages);
    uc_context_free(p.context);
    uc_close(p.uc);
    free(p.pages);
    return rate;
}
#else
static double peer_resets(unsigned pages)
{
    (void)pages;
    return -1;
}
#endif

static void bench_resets(FILE *json)
{
    static const struct { unsigned pages; double goal; } rows[] = { { 1, 5e6 }, { 10, 6e5 }, { 100, 6e4 }, { 1000, 4e3 } };
    printf("%-22s%14s%14s%8s%14s%8s%12s\n", "resets a second", "libvm", "bare memcpy", "ratio", "unicorn", "times", "goal");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double ours = resets(rows[i].pages), bare = bare_copies(rows[i].pages), theirs = peer_resets(rows[i].pages);
        printf("%4u dirty page%-7s%14.0f%14.0f%8.2f", rows[i].pages, rows[i].pages > 1 ? "s" : "", ours, bare, ours / bare);
        theirs > 0 ? printf("%14.0f%7.1fx", theirs, ours / theirs) : printf("%14s%8s", "-", "-");
        printf("%12.0f\n", rows[i].goal);
        fflush(stdout);
        if (json)
            fprintf(json, "%s\n  {\"figure\": \"reset_%u\", \"unit\": \"1/s\", \"libvm\": %.0f, \"memcpy\": %.0f, \"unicorn\": %.0f, "
                    "\"goal\": %.0f}", i ? "," : "", rows[i].pages, ours, bare, theirs, rows[i].goal);
    }
}

/* ---- a booted Linux ---- */

static char console[1 << 16];
static size_t console_bytes;

static void on_output(void *user, const uint8_t *bytes, size_t count)
{
    (void)user;
    if (console_bytes + count >= sizeof console)
        console_bytes = 0;
    memcpy(console + console_bytes, bytes, count);
    console[console_bytes += count] = 0;
}

static vm_machine *new_pc(void)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 256 << 20;
    MUST(vm_create(&o, &m));
    return m;
}

static vm_machine *boot(const char *guests)
{
    char kernel[600], initrd[600];
    snprintf(kernel, sizeof kernel, "%s/vmlinuz-amd64", guests);
    snprintf(initrd, sizeof initrd, "%s/initramfs-amd64", guests);
    if (access(kernel, R_OK) || access(initrd, R_OK))
        return NULL;
    vm_machine *m = new_pc();
    vm_linux_boot b = VM_LINUX_BOOT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    b.kernel = kernel;
    b.initrd = initrd;
    b.cmdline = "console=ttyS0";
    MUST(vm_serial_output(m, 0, on_output, NULL));
    MUST(vm_boot_linux(m, &b));
    o.deadline_ns = 50 * 1000 * 1000;
    for (int i = 0; i < 4000 && !strstr(console, "guest# "); i++)
        MUST(vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e));
    return m;
}

/* Memory of the process that nobody shares, and that of images. */
static double used_bytes(void)
{
    char line[256];
    double kib = 0;
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    while (f && fgets(line, sizeof line, f)) {
        unsigned long n;
        if (sscanf(line, "Pss: %lu", &n) == 1)
            kib = (double)n;
    }
    if (f)
        fclose(f);
    return kib * 1024;
}

static void figure(FILE *json, const char *key, const char *text, const char *unit, double value, double goal)
{
    printf("%-44s%12.3f %s", text, value, unit);
    goal > 0 ? printf("   (goal <= %g)\n", goal) : printf("\n");
    fflush(stdout);
    if (json)
        fprintf(json, ",\n  {\"figure\": \"%s\", \"unit\": \"%s\", \"libvm\": %.4f, \"goal\": %g}", key, unit, value, goal);
}

static void bench_clones(FILE *json, vm_machine *m, unsigned count)
{
    vm_machine **c = calloc(count, sizeof *c);
    double t = wall();
    MUST(vm_fork(m, &c[0]));
    figure(json, "first_fork", "first fork (moves the RAM)", "ms", (wall() - t) * 1e3, 0);
    double before = used_bytes(), total = 0, worst = 0;
    for (unsigned i = 1; i < count; i++) {
        t = wall();
        MUST(vm_fork(m, &c[i]));
        t = wall() - t;
        total += t;
        worst = t > worst ? t : worst;
    }
    figure(json, "fork", "each further clone", "ms", total / (count - 1) * 1e3, 1);
    figure(json, "fork_worst", "  the slowest of them", "ms", worst * 1e3, 0);
    figure(json, "fork_bytes", "  memory of each", "MiB", (used_bytes() - before) / (count - 1) / (1 << 20), 2);
    t = wall();
    for (unsigned i = 0; i < count; i++)
        vm_destroy(c[i]);
    figure(json, "destroy", "  to destroy one", "ms", (wall() - t) / count * 1e3, 0);
    free(c);
}

static void bench_files(FILE *json, vm_machine *m, vm_snapshot *s)
{
    char path[64];
    snprintf(path, sizeof path, "/tmp/libvm-bench-%ld", (long)getpid());
    for (unsigned pass = 0; pass < 2; pass++) {
        vm_snapshot *back = NULL;
        double t = wall();
        if (vm_snapshot_save_file(s, path, VM_SNAPSHOT_NO_SYNC | (pass ? VM_SNAPSHOT_COMPRESS : 0)) < 0)
            break;
        figure(json, pass ? "save_zstd" : "save", pass ? "save to a file, compressed" : "save to a file", "ms",
               (wall() - t) * 1e3, 0);
        t = wall();
        MUST(vm_snapshot_load_file(m, path, 0, &back));
        figure(json, pass ? "load_zstd" : "load", pass ? "  load it" : "  load it, checked", "ms", (wall() - t) * 1e3, 0);
        vm_snapshot_free(back);
        if (!pass) {
            t = wall();
            MUST(vm_snapshot_load_file(m, path, VM_SNAPSHOT_NO_VERIFY, &back));
            figure(json, "load_unchecked", "  load it, contents not checked", "ms", (wall() - t) * 1e3, 0);
            vm_snapshot_free(back);
        }
    }
    unlink(path);
}

static void bench_linux(FILE *json, const char *guests, unsigned clones)
{
    vm_machine *m = boot(guests);
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_snapshot *s = NULL;
    if (!m) {
        printf("no guest files in %s: clones left out\n", guests);
        return;
    }
    printf("\na booted Debian kernel, 256 MiB\n");
    bench_clones(json, m, clones);
    double t = wall();
    MUST(vm_snapshot_take(m, &s));
    figure(json, "take", "take a snapshot", "ms", (wall() - t) * 1e3, 0);
    o.max_instructions = 100000;
    double least = 1e9;
    for (int i = 0; i < 50; i++) {
        MUST(vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e));
        t = wall();
        MUST(vm_snapshot_restore(m, s));
        t = wall() - t;
        least = t < least ? t : least;
    }
    figure(json, "restore_linux", "restore it after 100000 instructions", "us", least * 1e6, 0);
    bench_files(json, m, s);
    vm_destroy(m);
}

int main(int argc, char **argv)
{
    FILE *json = NULL;
    unsigned clones = 500;
    char guests[512];
    const char *dir = getenv("LIBVM_GUESTS"), *home = getenv("HOME");
    dir ? snprintf(guests, sizeof guests, "%s", dir) : snprintf(guests, sizeof guests, "%s/.cache/libvm/guests", home ? home : "");
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--json"))
            json = fopen(argv[i + 1], "w");
        else if (!strcmp(argv[i], "--backend"))
            backend = !strcmp(argv[i + 1], "interp") ? VM_BACKEND_INTERP : VM_BACKEND_JIT;
        else if (!strcmp(argv[i], "--guests"))
            snprintf(guests, sizeof guests, "%s", argv[i + 1]);
        else if (!strcmp(argv[i], "--clones"))
            clones = (unsigned)atoi(argv[i + 1]) > 1 ? (unsigned)atoi(argv[i + 1]) : 2;
    }
    if (json)
        fprintf(json, "{\"benchmark\": \"snapshot\", \"figures\": [");
    bench_resets(json);
    bench_linux(json, guests, clones);
    if (json)
        fprintf(json, "\n]}\n"), fclose(json);
    return 0;
}
