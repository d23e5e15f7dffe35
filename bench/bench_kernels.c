/* bench_kernels.c - the kernels of kernels.c: native, libvm (VM_MODE_FLAT64, each backend and strategy), Unicorn.
 *
 * usage: bench_kernels KERNELS.ELF [--json FILE] [--only NAME] [--columns jit,flat,interp,kvm,unicorn] [--scale PERCENT] [--rounds N]
 * Every figure is a ratio to the native run of the same bytes in the same process; the lower the better.
 */
#include <libvm/libvm.h>
#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#ifdef HAVE_UNICORN
#include <unicorn/unicorn.h>
#endif
#include "kernels.h"

static const struct { const char *name; uint64_t n; } kernels[] = {
    { "fib", 32 }, { "sieve", 6 }, { "sha1", 60000 }, { "chase", 3000000 }, { "matmul", 4 }, { "mandel", 220 }, { "qsort", 400000 },
    { "bytecode", 2000000 }, { "memcpy", 40 }, { "aes", 1000000 }, { "crc32", 20000000 }, { "avx2dot", 20000 }, { "x87", 10000000 },
};
enum { KERNELS = sizeof kernels / sizeof *kernels, IN_MEAN = 9 };

static unsigned scale = 100, rounds = 3;

static double run_native(unsigned k, uint64_t n, uint64_t *result)
{
    uint8_t *at = mmap((void *)(uintptr_t)BASE, SIZE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (at == MAP_FAILED)
        return -1;
    memcpy(at, image, image_bytes);
    double t = now();
    *result = ((uint64_t (*)(uint64_t, uint64_t))(uintptr_t)BASE)(k, n);
    t = now() - t;
    munmap(at, SIZE);
    return t;
}

static double run_libvm(vm_backend backend, const char *mmu, unsigned k, uint64_t n, uint64_t *result)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_region *r;
    o.backend = backend;
    o.mmu = mmu;
    if (vm_create(&o, &m) < 0)
        return -1;
    double t = -1;
    if (vm_map_ram(m, BASE, SIZE, VM_PROT_RWX, &r) == VM_OK) {
        memcpy(vm_region_data(r), image, SIZE);
        vm_vcpu *cpu = vm_vcpu_get(m, 0);
        vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
        vm_regs g = VM_REGS_INIT;
        vm_vcpu_get_regs(cpu, &g);
        uint64_t stack = STACK - 8, back = RETURN;
        vm_write(m, stack, &back, 8);
        g.rip = BASE, g.rdi = k, g.rsi = n, g.rsp = stack;
        vm_vcpu_set_regs(cpu, &g);
        vm_exit e = VM_EXIT_INIT;
        t = now();
        int status = vm_vcpu_run(cpu, NULL, &e);
        t = now() - t;
        vm_vcpu_get_regs(cpu, &g);
        *result = g.rax;
        if (status < 0 || e.reason != VM_EXIT_HALT) {
            fprintf(stderr, "%s: status %d exit %d rip %llx: %s\n", kernels[k].name, status, e.reason, (unsigned long long)e.rip, vm_errmsg());
            t = -1;
        }
    }
    vm_destroy(m);
    return t;
}

#ifdef HAVE_UNICORN
static double run_unicorn(unsigned k, uint64_t n, uint64_t *result)
{
    uc_engine *uc;
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &uc))
        return -1;
    uint64_t sp = STACK - 8, back = RETURN, which = k;
    uc_mem_map(uc, BASE, SIZE, UC_PROT_ALL);
    uc_mem_write(uc, BASE, image, SIZE);
    uc_mem_write(uc, sp, &back, 8);
    uc_reg_write(uc, UC_X86_REG_RSP, &sp);
    uc_reg_write(uc, UC_X86_REG_RDI, &which);
    uc_reg_write(uc, UC_X86_REG_RSI, &n);
    double t = now();
    uc_err err = uc_emu_start(uc, BASE, RETURN, 0, 0);
    t = now() - t;
    uc_reg_read(uc, UC_X86_REG_RAX, result);
    uc_close(uc);
    return err ? -1 : t;
}
#endif

static double run_jit(unsigned k, uint64_t n, uint64_t *r) { return run_libvm(VM_BACKEND_JIT, NULL, k, n, r); }
static double run_flat(unsigned k, uint64_t n, uint64_t *r) { return run_libvm(VM_BACKEND_JIT, "flat", k, n, r); }
static double run_interp(unsigned k, uint64_t n, uint64_t *r) { return run_libvm(VM_BACKEND_INTERP, NULL, k, n, r); }
static double run_kvm(unsigned k, uint64_t n, uint64_t *r) { return run_libvm(VM_BACKEND_KVM, NULL, k, n, r); }

static struct column { const char *name; double (*run)(unsigned, uint64_t, uint64_t *); unsigned divide; double log_sum; unsigned count; } columns[] = {
    { "jit", run_jit, 1, 0, 0 }, { "flat", run_flat, 1, 0, 0 }, { "interp", run_interp, 20, 0, 0 }, { "kvm", run_kvm, 1, 0, 0 },
#ifdef HAVE_UNICORN
    { "unicorn", run_unicorn, 20, 0, 0 },
#endif
};
enum { COLUMNS = sizeof columns / sizeof *columns };

/* One cell: the best of several runs, and of as many native ones of the same length between them. */
static double ratio(struct column *c, unsigned k, bool *is_wrong)
{
    uint64_t n = kernels[k].n * scale / 100, a = 0, b = 0;
    double best = -1, best_native = -1;
    bool shrinks = k != 0 && k != 5;
    if (shrinks && n / c->divide)
        n /= c->divide;
    else if (c->divide > 1)
        n = k == 0 ? 25 : k == 5 ? 60 : n;
    for (unsigned i = 0; i < rounds; i++) {
        double native = run_native(k, n, &a), t = c->run(k, n, &b);
        if (t < 0 || native <= 0)
            return -1;
        *is_wrong |= a != b;
        if (best < 0 || t < best)
            best = t;
        if (best_native < 0 || native < best_native)
            best_native = native;
    }
    return best / best_native;
}

int main(int argc, char **argv)
{
    const char *only = NULL, *wanted = NULL, *json_path = NULL;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--only"))
            only = argv[i + 1];
        else if (!strcmp(argv[i], "--columns"))
            wanted = argv[i + 1];
        else if (!strcmp(argv[i], "--json"))
            json_path = argv[i + 1];
        else if (!strcmp(argv[i], "--scale"))
            scale = (unsigned)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--rounds"))
            rounds = (unsigned)atoi(argv[i + 1]);
    }
    if (argc < 2 || load_image(argv[1])) {
        fprintf(stderr, "usage: bench_kernels KERNELS.ELF [--json FILE] [--only NAME] [--columns LIST] [--scale PERCENT] [--rounds N]\n");
        return 1;
    }
    FILE *json = json_path ? fopen(json_path, "w") : NULL;
    int failures = 0;
    const char *separator = "";
    printf("%-10s", "kernel");
    for (unsigned c = 0; c < COLUMNS; c++)
        if (!wanted || strstr(wanted, columns[c].name))
            printf("%10s", columns[c].name);
    printf("   (times native; lower is better)\n");
    if (json)
        fprintf(json, "{\"benchmark\": \"kernels\", \"unit\": \"times native\", \"cells\": [");
    for (unsigned k = 0; k < KERNELS; k++) {
        if (only && strcmp(only, kernels[k].name))
            continue;
        printf("%-10s", kernels[k].name);
        for (unsigned c = 0; c < COLUMNS; c++) {
            if (wanted && !strstr(wanted, columns[c].name))
                continue;
            bool is_wrong = false;
            double r = ratio(&columns[c], k, &is_wrong);
            if (r < 0)
                printf("%10s", "-");
            else
                printf("%9.2f%c", r, is_wrong ? '!' : ' ');
            fflush(stdout);
            failures += is_wrong;
            if (r > 0 && k < IN_MEAN)
                columns[c].log_sum += log(r), columns[c].count++;
            if (r > 0 && json)
                fprintf(json, "%s\n  {\"kernel\": \"%s\", \"engine\": \"%s\", \"ratio\": %.4f}", separator, kernels[k].name, columns[c].name, r), separator = ",";
        }
        printf("\n");
    }
    printf("%-10s", "mean of 9");
    for (unsigned c = 0; c < COLUMNS; c++)
        if (!wanted || strstr(wanted, columns[c].name)) {
            if (columns[c].count == IN_MEAN)
                printf("%9.2f ", exp(columns[c].log_sum / columns[c].count));
            else
                printf("%10s", "-");
        }
    printf("\n");
    if (json)
        fprintf(json, "\n]}\n"), fclose(json);
    return failures ? 1 : 0;
}
