/* bench_coverage.c - what records cost: the kernels of kernels.c on the JIT with edge counters, a block trace and the comparison
 * log, each against a run without.
 *
 * usage: bench_coverage KERNELS.ELF [--json FILE] [--only NAME] [--rounds N]
 * Every figure is the best of several rounds; runs with and without alternate.
 */
#include <libvm/libvm.h>
#include <math.h>
#include "kernels.h"

enum { MAP = 1 << 16, RING = 1 << 16 };

static const struct { const char *name; uint64_t n, few; } kernels[] = {
    { "fib", 32, 24 }, { "sieve", 6, 1 }, { "sha1", 60000, 6000 }, { "chase", 3000000, 300000 }, { "matmul", 4, 1 }, { "mandel", 220, 70 },
    { "qsort", 400000, 40000 }, { "bytecode", 2000000, 200000 }, { "memcpy", 40, 4 }, { "aes", 1000000, 100000 },
    { "crc32", 20000000, 2000000 }, { "avx2dot", 20000, 2000 }, { "x87", 10000000, 1000000 } };
enum { KERNELS = sizeof kernels / sizeof *kernels, IN_MEAN = 9 };
enum { OFF, EDGES, TRACE, LOG, COLUMNS };
static const char *const columns[COLUMNS] = { "off", "edges", "trace", "compare" };

static uint8_t map[MAP];
static uint64_t ring[RING], head;
static vm_compare compares[RING];

static int start_record(vm_machine *m, vm_vcpu *cpu, unsigned column)
{
    switch (column) {
    case EDGES: return vm_coverage(m, map, MAP);
    case TRACE: return vm_block_trace(cpu, ring, RING, &head);
    case LOG: return vm_compare_log(cpu, compares, RING, &head);
    default: return VM_OK;
    }
}

/* Seconds, negative: failed. */
static double run(unsigned k, unsigned column, uint64_t n, uint64_t *result)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_regs g = VM_REGS_INIT;
    vm_machine *m;
    vm_region *r;
    uint64_t back = RETURN;
    double t = -1;
    o.backend = VM_BACKEND_JIT;
    if (vm_create(&o, &m) < 0)
        return -1;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    if (vm_map_ram(m, BASE, SIZE, VM_PROT_RWX, &r) == VM_OK && start_record(m, cpu, column) == VM_OK) {
        memcpy(vm_region_data(r), image, SIZE);
        vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
        vm_vcpu_get_regs(cpu, &g);
        vm_write(m, STACK - 8, &back, 8);
        g.rip = BASE, g.rdi = k, g.rsi = n, g.rsp = STACK - 8;
        vm_vcpu_set_regs(cpu, &g);
        t = now();
        int status = vm_vcpu_run(cpu, NULL, &e);
        t = now() - t;
        vm_vcpu_get_regs(cpu, &g);
        *result = g.rax;
        if (status < 0 || e.reason != VM_EXIT_HALT)
            t = -1;
    }
    vm_destroy(m);
    return t;
}

/* The slowdown of one column, by the best of `rounds` pairs; the log is so slow that little work does. */
static double ratio(unsigned k, unsigned column, unsigned rounds)
{
    uint64_t n = column == LOG ? kernels[k].few : kernels[k].n, a = 0, b = 1;
    double without = -1, with = -1;
    for (unsigned i = 0; i < rounds; i++) {
        double t = run(k, OFF, n, &a), u = run(k, column, n, &b);
        if (t < 0 || u < 0 || a != b)
            return -1;
        without = i && without < t ? without : t;
        with = i && with < u ? with : u;
    }
    return with / without;
}

int main(int argc, char **argv)
{
    const char *only = NULL, *json_path = NULL;
    unsigned rounds = 5;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--only"))
            only = argv[i + 1];
        else if (!strcmp(argv[i], "--json"))
            json_path = argv[i + 1];
        else if (!strcmp(argv[i], "--rounds"))
            rounds = (unsigned)atoi(argv[i + 1]);
    }
    if (argc < 2 || !rounds || load_image(argv[1])) {
        fprintf(stderr, "usage: bench_coverage KERNELS.ELF [--json FILE] [--only NAME] [--rounds N]\n");
        return 1;
    }
    FILE *json = json_path ? fopen(json_path, "w") : NULL;
    double sum[COLUMNS] = { 0 };
    unsigned count[COLUMNS] = { 0 }, failures = 0;
    printf("%-10s%10s%10s%10s   (times the same without)\n", "kernel", columns[EDGES], columns[TRACE], columns[LOG]);
    if (json)
        fprintf(json, "{\"benchmark\": \"coverage\", \"unit\": \"times without\", \"goal\": {\"edges\": 1.25}, \"cells\": [");
    for (unsigned k = 0, cells = 0; k < KERNELS; k++) {
        if (only && strcmp(only, kernels[k].name))
            continue;
        printf("%-10s", kernels[k].name);
        for (unsigned c = EDGES; c < COLUMNS; c++) {
            double r = ratio(k, c, rounds);
            r < 0 ? printf("%10s", "failed") : printf("%10.2f", r);
            fflush(stdout);
            failures += r < 0;
            if (r > 0 && k < IN_MEAN)
                sum[c] += log(r), count[c]++;
            if (r > 0 && json)
                fprintf(json, "%s\n  {\"kernel\": \"%s\", \"record\": \"%s\", \"ratio\": %.4f}", cells++ ? "," : "", kernels[k].name,
                        columns[c], r);
        }
        printf("\n");
    }
    printf("%-10s", "mean of 9");
    for (unsigned c = EDGES; c < COLUMNS; c++)
        count[c] == IN_MEAN ? printf("%10.2f", exp(sum[c] / IN_MEAN)) : printf("%10s", "-");
    printf("\n");
    if (json)
        fprintf(json, "\n]}\n"), fclose(json);
    return failures ? 1 : 0;
}
