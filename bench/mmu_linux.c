/* mmu_linux.c - one booted Linux, the loads of mmu_guest.c, the MMU strategy changed at every round: what each strategy costs
 * on the same guest, with the counters that say why. CPU time of the vCPU's thread; the best of several rounds each, in turn.
 *
 * The guest does without PCIDs, so that each switch of address spaces ends its translations, unless --pcid 1: with them every strategy
 * keeps those.
 *
 * usage: mmu_linux KERNEL INITRDS [--json FILE] [--rounds N] [--backend jit|interp] [--only LOAD] [--pcid 0|1]
 * INITRDS, as for vm_boot_linux(), have mmu_guest in their root.
 */
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *const strategies[] = { "tlb", "shadow", "ept", "flat", "forward" };
static const char *const loads[] = { "churn", "misses", "switches", "compute" };
static const char *const loads_text[] = { "page-table churn", "TLB misses, 1 GiB", "context switches", "compute" };
static const char *const counters[] = { "fills", "walks", "walk-refs", "shadow-hits", "shadow-syncs", "table-writes", "flushes",
                                        "root-switches" };
enum { STRATEGIES = sizeof strategies / sizeof *strategies, LOADS = sizeof loads / sizeof *loads,
       COUNTERS = sizeof counters / sizeof *counters };

typedef struct cell { double seconds; uint64_t counts[COUNTERS]; } cell;
static cell best[LOADS][STRATEGIES];

static int forward(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    return vm_mmu_walk(cpu, gva, access, out);
}
static const vm_mmu_ops forwarding = { .size = sizeof(vm_mmu_ops), .name = "forward", .translate = forward };

/* The guest's console, line by line; a whole line stops the vCPU. */
typedef struct console { vm_vcpu *cpu; char line[256], done[256]; size_t length; bool has_line; } console;

static void output(void *user, const uint8_t *bytes, size_t count)
{
    console *c = user;
    for (size_t i = 0; i < count; i++)
        if (bytes[i] == '\n') {
            c->line[c->length] = 0;
            if (!strncmp(c->line, "select ", 7) || !strncmp(c->line, "begin ", 6) || !strncmp(c->line, "end ", 4) || strstr(c->line, "panic")) {
                strcpy(c->done, c->line);
                c->has_line = true;
                vm_vcpu_kick(c->cpu);
            }
            c->length = 0;
        } else if (bytes[i] != '\r' && c->length < sizeof c->line - 1) {
            c->line[c->length++] = (char)bytes[i];
        }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void take_counts(vm_machine *m, uint64_t *counts)
{
    for (unsigned i = 0; i < COUNTERS; i++)
        (void)vm_stats(m, counters[i], &counts[i]);
}

static int find_load(const char *name)
{
    for (int i = 0; i < LOADS; i++)
        if (!strcmp(name, loads[i]))
            return i;
    return -1;
}

/* Run until the guest is done. Returns the number of rounds seen. */
static unsigned measure(vm_machine *m, console *c)
{
    unsigned rounds = 0, round = 0;
    int load = -1, last = -1;
    double start = 0;
    cell at = { 0 };
    for (;;) {
        vm_exit e = VM_EXIT_INIT;
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        o.deadline_ns = UINT64_C(120000000000);
        if (vm_vcpu_run(c->cpu, &o, &e) < 0 || e.reason != VM_EXIT_KICK) {
            if (e.reason != VM_EXIT_POWEROFF)
                fprintf(stderr, "the guest ended with %s: %s\n", vm_exit_name((int)e.reason), vm_errmsg());
            return rounds;
        }
        if (!c->has_line)
            continue;
        c->has_line = false;
        if (!strncmp(c->done, "select ", 7) && (load = find_load(c->done + 7)) >= 0) {
            round = load == last ? round + 1 : 0;
            last = load;
            if (vm_mmu_select(m, strategies[round % STRATEGIES]) < 0)
                fprintf(stderr, "%s\n", vm_errmsg());
        } else if (!strncmp(c->done, "begin ", 6) && load >= 0) {
            take_counts(m, at.counts);
            start = now();
        } else if (!strncmp(c->done, "end ", 4) && load >= 0) {
            cell took = { .seconds = now() - start };
            take_counts(m, took.counts);
            for (unsigned i = 0; i < COUNTERS; i++)
                took.counts[i] -= at.counts[i];
            cell *b = &best[load][round % STRATEGIES];
            if (!b->seconds || took.seconds < b->seconds)
                *b = took;
            rounds++;
        }
    }
}

static void print_tables(void)
{
    printf("%-20s", "CPU ms");
    for (unsigned s = 0; s < STRATEGIES; s++)
        printf("%12s", strategies[s]);
    printf("     (times tlb)\n");
    for (unsigned l = 0; l < LOADS; l++) {
        if (!best[l][0].seconds)
            continue;
        printf("%-20s", loads_text[l]);
        for (unsigned s = 0; s < STRATEGIES; s++)
            printf("%12.1f", best[l][s].seconds * 1e3);
        printf("    ");
        for (unsigned s = 1; s < STRATEGIES; s++)
            printf(" %.2f", best[l][s].seconds / best[l][0].seconds);
        printf("\n");
    }
    printf("\n%-10s%-10s", "counters", "");
    for (unsigned i = 0; i < COUNTERS; i++)
        printf("%14s", counters[i]);
    printf("\n");
    for (unsigned l = 0; l < LOADS; l++)
        for (unsigned s = 0; s < STRATEGIES && best[l][0].seconds; s++) {
            printf("%-10s%-10s", s ? "" : loads[l], strategies[s]);
            for (unsigned i = 0; i < COUNTERS; i++)
                printf("%14llu", (unsigned long long)best[l][s].counts[i]);
            printf("\n");
        }
}

static void write_json(const char *path)
{
    FILE *f = fopen(path, "w");
    if (!f)
        return;
    fprintf(f, "{\"benchmark\": \"mmu-linux\", \"unit\": \"s\", \"cells\": [");
    for (unsigned l = 0; l < LOADS; l++)
        for (unsigned s = 0; s < STRATEGIES; s++) {
            fprintf(f, "%s\n  {\"load\": \"%s\", \"strategy\": \"%s\", \"seconds\": %.5f", l + s ? "," : "", loads[l], strategies[s],
                    best[l][s].seconds);
            for (unsigned i = 0; i < COUNTERS; i++)
                fprintf(f, ", \"%s\": %llu", counters[i], (unsigned long long)best[l][s].counts[i]);
            fprintf(f, "}");
        }
    fprintf(f, "\n]}\n");
    fclose(f);
}

int main(int argc, char **argv)
{
    const char *json = NULL, *only = NULL;
    bool has_pcid = false;
    unsigned rounds = 4;
    char cmdline[200];
    vm_options o = VM_OPTIONS_INIT;
    vm_linux_boot boot = VM_LINUX_BOOT_INIT;
    vm_machine *m = NULL;
    console c = { 0 };
    o.backend = VM_BACKEND_JIT;
    for (int i = 3; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--json"))
            json = argv[i + 1];
        else if (!strcmp(argv[i], "--rounds"))
            rounds = (unsigned)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--only"))
            only = argv[i + 1];
        else if (!strcmp(argv[i], "--pcid"))
            has_pcid = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--backend"))
            o.backend = strcmp(argv[i + 1], "interp") ? VM_BACKEND_JIT : VM_BACKEND_INTERP;
    }
    if (argc < 3) {
        fprintf(stderr, "usage: mmu_linux KERNEL INITRDS [--json FILE] [--rounds N] [--backend jit|interp] [--only LOAD] [--pcid 0|1]\n");
        return 2;
    }
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = UINT64_C(512) << 20;
    snprintf(cmdline, sizeof cmdline, "console=ttyS0 quiet %s run=\"/mmu_guest %u %s\"", has_pcid ? "" : "nopcid", rounds * STRATEGIES, only ? only : "");
    boot.kernel = argv[1];
    boot.initrd = argv[2];
    boot.cmdline = cmdline;
    vm_mmu_register(&forwarding);
    if (vm_create(&o, &m) < 0 || vm_boot_linux(m, &boot) < 0 || vm_serial_output(m, 0, output, &c) < 0) {
        fprintf(stderr, "%s\n", vm_errmsg());
        return 1;
    }
    c.cpu = vm_vcpu_get(m, 0);
    unsigned seen = measure(m, &c);
    vm_destroy(m);
    if (seen < rounds * STRATEGIES * (only ? 1 : LOADS)) {
        fprintf(stderr, "only %u rounds were seen\n", seen);
        return 1;
    }
    print_tables();
    if (json)
        write_json(json);
    return 0;
}
