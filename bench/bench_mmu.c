/* bench_mmu.c - what an MMU strategy costs by itself: bare 64-bit guests with page tables of their own, strategies side by
 * side, nanoseconds of the thread's CPU time.
 *
 *   hit       a load that the inline TLB answers
 *   miss      a load that it does not, with all tables in the host's caches: 4096 pages in turn
 *   random    a load from a random one of 262144 pages (1 GiB)
 *   switch    MOV to CR3 to and fro between two address spaces and a touch of 32 pages in each; for one switch
 *   INVLPG    a page remapped, INVLPG, a load from it
 *
 * "forward" is a strategy of this program's own that calls vm_mmu_walk(), as "tlb" does. Best of several runs.
 *
 * usage: bench_mmu [--backend jit|interp] [--json FILE] [--runs N]
 */
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RAM = 64 << 20, CODE = 0x1000, STACK = 0x8000, TABLES = 0x100000 };
#define DATA UINT64_C(0x8000000000)      /* where the pages to touch lie, linear */

/* Position-independent guest code, RCX times round; RDI: DATA, RSI: mask of the pages. */
#define GUEST(name, text) \
    __asm__(".pushsection .rodata\n" #name ":\n" text "\nhlt\n" #name "_end:\n.popsection"); \
    extern const char name[], name##_end[]
GUEST(guest_walk, "xor %eax, %eax\n1: mov %rax, %rdx\nand %rsi, %rdx\nmov (%rdi,%rdx), %rbx\nadd $4096, %rax\ndec %rcx\njnz 1b");
GUEST(guest_random, "mov $12345, %eax\n1: imul $1103515245, %rax, %rax\nadd $12345, %rax\nmov %rax, %rdx\nshr $8, %rdx\n"
                    "and %rsi, %rdx\nmov (%rdi,%rdx), %rbx\ndec %rcx\njnz 1b");
GUEST(guest_switch, "1: mov %r8, %cr3\nmov $32, %edx\nmov %rdi, %rax\n2: mov (%rax), %rbx\nadd $4096, %rax\ndec %edx\njnz 2b\nxchg %r8, %r9\n"
                    "dec %rcx\njnz 1b");
GUEST(guest_invlpg, "1: mov (%r10), %rax\nxor $0x1000, %rax\nmov %rax, (%r10)\ninvlpg (%rdi)\nmov (%rdi), %rbx\ndec %rcx\njnz 1b");

static int forward(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    return vm_mmu_walk(cpu, gva, access, out);
}
static const vm_mmu_ops forwarding = { .size = sizeof(vm_mmu_ops), .name = "forward", .translate = forward };

static const struct load { const char *name; const char *code, *end; uint64_t mask, rounds; } loads[] = {
    { "hit", guest_walk, guest_walk_end, 63 << 12, 20000000 },
    { "miss", guest_walk, guest_walk_end, 4095 << 12, 3000000 },
    { "random", guest_random, guest_random_end, 262143 << 12, 2000000 },
    { "switch", guest_switch, guest_switch_end, 0, 100000 },
    { "INVLPG", guest_invlpg, guest_invlpg_end, 0, 300000 },
};
enum { LOADS = sizeof loads / sizeof *loads, STRATEGIES = 5 };
static const char *const strategies[STRATEGIES] = { "tlb", "shadow", "ept", "flat", "forward" };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static uint64_t put_table(uint8_t *ram, uint64_t at, unsigned index, uint64_t entry)
{
    memcpy(ram + at + index * 8, &entry, 8);
    return at;
}

/* Two roots: the first 2 MiB as they are, and 1 GiB at DATA in 4 KiB pages that share 8 MiB of RAM. Returns the first free address. */
static uint64_t make_tables(uint8_t *ram, uint64_t root)
{
    uint64_t next = root + 0x1000, pdpt = next, pd = next + 0x1000, high = next + 0x2000, directory = next + 0x3000;
    next += 0x4000;
    put_table(ram, root, 0, pdpt | 3);
    put_table(ram, pdpt, 0, pd | 3);
    put_table(ram, pd, 0, 0x83);
    for (unsigned i = 1; i < 32; i++)
        put_table(ram, pd, i, (uint64_t)i << 21 | 0x83);
    put_table(ram, root, DATA >> 39 & 511, high | 3);
    put_table(ram, high, DATA >> 30 & 511, directory | 3);
    for (unsigned i = 0; i < 512; i++, next += 0x1000) {
        put_table(ram, directory, i, next | 3);
        for (unsigned k = 0; k < 512; k++)
            put_table(ram, next, k, (uint64_t)(0x2000000 + ((i * 512 + k) % 2048) * 4096) | 3);
    }
    return next;
}

static double run(vm_backend backend, const char *mmu, const struct load *l)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_region *r = NULL;
    o.backend = backend;
    o.mmu = mmu;
    if (vm_create(&o, &m) < 0 || vm_map_ram(m, 0, RAM, VM_PROT_RWX, &r) < 0)
        return -1;
    uint8_t *ram = vm_region_data(r);
    uint64_t second = make_tables(ram, TABLES);
    make_tables(ram, second);
    memcpy(ram + CODE, l->code, (size_t)(l->end - l->code));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_sregs s = VM_SREGS_INIT;
    vm_regs g = VM_REGS_INIT;
    vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
    vm_vcpu_get_sregs(cpu, &s);
    s.cr3 = TABLES;
    vm_vcpu_set_sregs(cpu, &s);
    double t[2] = { 0, 0 };
    for (unsigned i = 0; i < 2; i++) {         /* a first round to make all tables and code known */
        vm_exit e = VM_EXIT_INIT;
        vm_vcpu_get_regs(cpu, &g);
        g.rip = CODE, g.rsp = STACK, g.rdi = DATA, g.rsi = l->mask, g.rcx = i ? l->rounds : l->rounds / 10 + 8192;
        g.r8 = second, g.r9 = TABLES, g.r10 = TABLES + 0x5000;
        if (backend == VM_BACKEND_INTERP)
            g.rcx = g.rcx / 8 + 1;
        vm_vcpu_set_regs(cpu, &g);
        t[i] = now();
        if (vm_vcpu_run(cpu, NULL, &e) < 0 || e.reason != VM_EXIT_HALT) {
            fprintf(stderr, "%s under %s: %s\n", l->name, mmu, vm_exit_name((int)e.reason));
            t[i] = -1;
            break;
        }
        t[i] = (now() - t[i]) / (double)g.rcx;
    }
    vm_destroy(m);
    return t[1];
}

int main(int argc, char **argv)
{
    vm_backend backend = VM_BACKEND_JIT;
    const char *json_path = NULL, *only = NULL;
    unsigned runs = 5;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--backend"))
            backend = strcmp(argv[i + 1], "interp") ? VM_BACKEND_JIT : VM_BACKEND_INTERP;
        else if (!strcmp(argv[i], "--json"))
            json_path = argv[i + 1];
        else if (!strcmp(argv[i], "--runs"))
            runs = (unsigned)atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--only"))
            only = argv[i + 1];
    }
    vm_mmu_register(&forwarding);
    FILE *json = json_path ? fopen(json_path, "w") : NULL;
    const char *separator = "";
    if (json)
        fprintf(json, "{\"benchmark\": \"mmu\", \"unit\": \"ns\", \"backend\": \"%s\", \"cells\": [", vm_backend_name(backend));
    printf("%-10s", "ns");
    for (unsigned i = 0; i < STRATEGIES; i++)
        printf("%10s", strategies[i]);
    printf("\n");
    for (unsigned l = 0; l < LOADS; l++) {
        double best[STRATEGIES];
        if (only && strcmp(only, loads[l].name))
            continue;
        for (unsigned i = 0; i < STRATEGIES; i++)
            best[i] = -1;
        for (unsigned k = 0; k < runs; k++)    /* in turn, so that a busy moment does not fall on one alone */
            for (unsigned i = 0; i < STRATEGIES; i++) {
                double t = run(backend, strategies[i], &loads[l]);
                if (t > 0 && (best[i] < 0 || t < best[i]))
                    best[i] = t;
            }
        printf("%-10s", loads[l].name);
        for (unsigned i = 0; i < STRATEGIES; i++) {
            printf("%10.1f", best[i]);
            if (json)
                fprintf(json, "%s\n  {\"load\": \"%s\", \"strategy\": \"%s\", \"ns\": %.2f}", separator, loads[l].name, strategies[i], best[i]);
            separator = ",";
        }
        printf("\n");
        fflush(stdout);
    }
    if (json)
        fprintf(json, "\n]}\n"), fclose(json);
    return 0;
}
