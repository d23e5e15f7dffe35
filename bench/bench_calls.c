/* bench_calls.c - what a call into the library costs, each figure beside Unicorn's in the same run: short runs with `until`,
 * device reads, self-modifying code, whole machines.
 *
 * usage: bench_calls [--backend jit|interp|kvm] [--json FILE]
 * The clock is the CPU time of the thread; every figure is the best of several rounds.
 */
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef HAVE_UNICORN
#include <unicorn/unicorn.h>
#endif

enum { CODE = 0x10000, RAM = 2 << 20, DEVICE = 0x10000000, ROUNDS = 5, LIVE = 200 };

/* Ten instructions without a memory access; `until` is their end. */
static const uint8_t ten[] = {
    0x48, 0x01, 0xd8,                  /* add rax, rbx */
    0x48, 0xff, 0xc3,                  /* inc rbx */
    0x48, 0x31, 0xc1,                  /* xor rcx, rax */
    0x48, 0x8d, 0x14, 0x08,            /* lea rdx, [rax + rcx] */
    0x48, 0xc1, 0xe2, 0x03,            /* shl rdx, 3 */
    0x48, 0x29, 0xc2,                  /* sub rdx, rax */
    0x49, 0x89, 0xd0,                  /* mov r8, rdx */
    0x49, 0x83, 0xe0, 0x7f,            /* and r8, 127 */
    0x4d, 0x01, 0xc1,                  /* add r9, r8 */
    0x48, 0x89, 0xc6,                  /* mov rsi, rax */
    0xf4,                              /* hlt, for the caller without `until` */
};
static const uint8_t device_loop[] = { /* 1: mov eax, [rbx]; dec rcx; jnz 1b; hlt */
    0x8b, 0x03, 0x48, 0xff, 0xc9, 0x75, 0xf9, 0xf4,
};
static const uint8_t self_modifying[] = { /* 1: mov [rip + 1], cl (the immediate of the next); mov al, 0; add rdx, rax; ... */
    0x88, 0x0d, 0x01, 0x00, 0x00, 0x00,      /* 1: mov [rip + 1], cl */
    0xb0, 0x00,                              /* mov al, imm8: what was just stored */
    0x48, 0x01, 0xc2,                        /* add rdx, rax */
    0x48, 0xff, 0xc9,                        /* dec rcx */
    0x75, 0xf0,                              /* jnz 1b */
    0xf4,
};

static vm_backend backend = VM_BACKEND_JIT;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static size_t resident(void)
{
    unsigned long total = 0, pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%lu %lu", &total, &pages) != 2)
        pages = 0;
    if (f)
        fclose(f);
    return pages * (size_t)sysconf(_SC_PAGESIZE);
}

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu, (void)offset, (void)width;
    *value = ++*(uint64_t *)user;
    return 0;
}

static uint64_t reads;

/* A machine with 2 MiB of RAM, the code at CODE and a device page; NULL when the backend is not there. */
static vm_machine *machine(const void *code, size_t bytes, vm_vcpu **cpu)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_machine *m;
    vm_region *r;
    o.backend = backend;
    ops.read = device_read;
    if (vm_create(&o, &m) < 0)
        return NULL;
    if (vm_map_ram(m, 0, RAM, VM_PROT_RWX, &r) < 0 || vm_write(m, CODE, code, bytes) < 0 ||
        (code == device_loop && vm_map_mmio(m, DEVICE, 4096, &ops, &reads, &r) < 0)) {
        vm_destroy(m);
        return NULL;
    }
    *cpu = vm_vcpu_get(m, 0);
    vm_vcpu_set_mode(*cpu, VM_MODE_FLAT64);
    return m;
}

static void set(vm_vcpu *cpu, uint64_t rip, uint64_t rcx)
{
    vm_regs g = VM_REGS_INIT;
    vm_vcpu_get_regs(cpu, &g);
    g.rip = rip, g.rbx = DEVICE, g.rcx = rcx, g.rax = g.rdx = 0;
    vm_vcpu_set_regs(cpu, &g);
}

/* ---- libvm: each returns a figure of one round, negative when it could not be had ---- */

static double vm_short_runs(void)
{
    enum { RUNS = 300000 };
    vm_vcpu *cpu;
    vm_machine *m = machine(ten, sizeof ten, &cpu);
    if (!m)
        return -1;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rip = CODE;
    unsigned wrong = 0;
    o.has_until = true;
    o.until = CODE + sizeof ten - 1;
    for (int i = 0; i < 1000; i++)
        vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8), vm_vcpu_run(cpu, &o, &e);
    double t = now();
    for (int i = 0; i < RUNS; i++) {
        vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8);
        wrong += vm_vcpu_run(cpu, &o, &e) < 0 || e.reason != VM_EXIT_UNTIL;
    }
    t = now() - t;
    vm_destroy(m);
    return wrong ? -1 : RUNS / t;
}

static double vm_loop(const void *code, size_t bytes, uint64_t count, uint64_t *sum)
{
    vm_vcpu *cpu;
    vm_machine *m = machine(code, bytes, &cpu);
    if (!m)
        return -1;
    vm_exit e = VM_EXIT_INIT;
    set(cpu, CODE, 1000);
    vm_vcpu_run(cpu, NULL, &e);
    set(cpu, CODE, count);
    reads = 0;
    double t = now();
    int status = vm_vcpu_run(cpu, NULL, &e);
    t = now() - t;
    vm_vcpu_read_reg(cpu, VM_REG_RDX, sum, 8);
    vm_destroy(m);
    return status < 0 || e.reason != VM_EXIT_HALT ? -1 : (double)count / t;
}

static double vm_device_reads(void)
{
    enum { COUNT = 10000000 };
    uint64_t sum;
    double rate = vm_loop(device_loop, sizeof device_loop, COUNT, &sum);
    return reads == COUNT ? rate : -1;
}

/* The sum of the low bytes of count, count - 1, ..., 1: what the modified instruction must have added up. */
static uint64_t expected_sum(uint64_t count)
{
    uint64_t sum = 0;
    for (uint64_t i = 1; i <= count; i++)
        sum += i & 255;
    return sum;
}

static double vm_self_modifying(void)
{
    enum { COUNT = 400000 };
    uint64_t sum = 0;
    double rate = vm_loop(self_modifying, sizeof self_modifying, COUNT, &sum);
    return sum == expected_sum(COUNT) ? rate : -1;
}

static vm_machine *vm_one_machine(void)
{
    vm_vcpu *cpu;
    vm_exit e = VM_EXIT_INIT;
    vm_machine *m = machine(ten, sizeof ten, &cpu);
    if (!m)
        return NULL;
    set(cpu, CODE, 1);
    if (vm_vcpu_run(cpu, NULL, &e) < 0 || e.reason != VM_EXIT_HALT) {
        vm_destroy(m);
        return NULL;
    }
    return m;
}

static double vm_creation(void)
{
    enum { COUNT = 300 };
    double t = now();
    for (int i = 0; i < COUNT; i++) {
        vm_machine *m = vm_one_machine();
        if (!m)
            return -1;
        vm_destroy(m);
    }
    return (now() - t) / COUNT * 1e6;
}

/* KiB resident a machine beyond the RAM page that the snippet lies in. */
static double vm_resident(void)
{
    static vm_machine *m[LIVE];
    size_t before = resident();
    for (int i = 0; i < LIVE; i++)
        if (!(m[i] = vm_one_machine()))
            return -1;
    double kib = (double)(resident() - before) / LIVE / 1024 - 4;
    for (int i = 0; i < LIVE; i++)
        vm_destroy(m[i]);
    return kib;
}

/* ---- the same in Unicorn ---- */
#ifdef HAVE_UNICORN
static uint64_t uc_device_read(uc_engine *uc, uint64_t offset, unsigned size, void *user)
{
    (void)uc, (void)offset, (void)size;
    return ++*(uint64_t *)user;
}

static uc_engine *engine(const void *code, size_t bytes)
{
    uc_engine *uc;
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &uc))
        return NULL;
    uc_mem_map(uc, 0, RAM, UC_PROT_ALL);
    uc_mem_write(uc, CODE, code, bytes);
    if (code == device_loop)
        uc_mmio_map(uc, DEVICE, 4096, uc_device_read, &reads, NULL, NULL);
    return uc;
}

static double uc_short_runs(void)
{
    enum { RUNS = 20000 };
    uc_engine *uc = engine(ten, sizeof ten);
    if (!uc)
        return -1;
    uc_emu_start(uc, CODE, CODE + sizeof ten - 1, 0, 0);
    double t = now();
    for (int i = 0; i < RUNS; i++)
        uc_emu_start(uc, CODE, CODE + sizeof ten - 1, 0, 0);
    t = now() - t;
    uc_close(uc);
    return RUNS / t;
}

static double uc_loop(const void *code, size_t bytes, uint64_t count, uint64_t *sum)
{
    uint64_t device = DEVICE, rcx = 1000, zero = 0;
    uc_engine *uc = engine(code, bytes);
    if (!uc)
        return -1;
    uc_reg_write(uc, UC_X86_REG_RBX, &device);
    uc_reg_write(uc, UC_X86_REG_RCX, &rcx);
    uc_emu_start(uc, CODE, CODE + bytes - 1, 0, 0);
    uc_reg_write(uc, UC_X86_REG_RAX, &zero);
    uc_reg_write(uc, UC_X86_REG_RDX, &zero);
    uc_reg_write(uc, UC_X86_REG_RCX, &count);
    reads = 0;
    double t = now();
    uc_err err = uc_emu_start(uc, CODE, CODE + bytes - 1, 0, 0);
    t = now() - t;
    uc_reg_read(uc, UC_X86_REG_RDX, sum);
    uc_close(uc);
    return err ? -1 : (double)count / t;
}

static double uc_device_reads(void)
{
    uint64_t sum;
    return uc_loop(device_loop, sizeof device_loop, 3000000, &sum);
}

static double uc_self_modifying(void)
{
    enum { COUNT = 30000 };
    uint64_t sum = 0;
    double rate = uc_loop(self_modifying, sizeof self_modifying, COUNT, &sum);
    return sum == expected_sum(COUNT) ? rate : -1;
}

static double uc_creation(void)
{
    enum { COUNT = 20 };
    double t = now();
    for (int i = 0; i < COUNT; i++) {
        uc_engine *uc = engine(ten, sizeof ten);
        uc_emu_start(uc, CODE, CODE + sizeof ten - 1, 0, 0);
        uc_close(uc);
    }
    return (now() - t) / COUNT * 1e6;
}

static double uc_resident(void)
{
    enum { COUNT = 20 };
    uc_engine *uc[COUNT];
    size_t before = resident();
    for (int i = 0; i < COUNT; i++) {
        uc[i] = engine(ten, sizeof ten);
        uc_emu_start(uc[i], CODE, CODE + sizeof ten - 1, 0, 0);
    }
    double kib = (double)(resident() - before) / COUNT / 1024 - 4;
    for (int i = 0; i < COUNT; i++)
        uc_close(uc[i]);
    return kib;
}
#else
#define uc_short_runs NULL
#define uc_device_reads NULL
#define uc_self_modifying NULL
#define uc_creation NULL
#define uc_resident NULL
#endif

/* `goal` is a least rate or a most cost. */
static const struct figure { const char *name, *key, *unit; double scale, goal; bool is_rate; double (*libvm)(void), (*unicorn)(void); } figures[] = {
    { "short runs with until", "short-runs", "M/s", 1e-6, 5, true, vm_short_runs, uc_short_runs },
    { "device read callbacks", "device-reads", "M/s", 1e-6, 40, true, vm_device_reads, uc_device_reads },
    { "self-modifying iterations", "self-modifying", "M/s", 1e-6, 2, true, vm_self_modifying, uc_self_modifying },
    { "create, run ten, destroy", "create", "us", 1, 100, false, vm_creation, uc_creation },
    { "resident beyond RAM", "resident", "KiB", 1, 1024, false, vm_resident, uc_resident },
};

static double best_of(const struct figure *f, double (*measure)(void))
{
    double best = -1;
    for (int i = 0; i < ROUNDS && measure; i++) {
        double v = measure();
        if (v > 0 && (best < 0 || (f->is_rate ? v > best : v < best)))
            best = v;
    }
    return best < 0 ? best : best * f->scale;
}

int main(int argc, char **argv)
{
    FILE *json = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--json"))
            json = fopen(argv[i + 1], "w");
        else if (!strcmp(argv[i], "--backend"))
            backend = !strcmp(argv[i + 1], "kvm") ? VM_BACKEND_KVM : !strcmp(argv[i + 1], "interp") ? VM_BACKEND_INTERP : VM_BACKEND_JIT;
    }
    printf("%-28s%12s%12s%10s%12s\n", "call", "libvm", "unicorn", "times", "goal");
    if (json)
        fprintf(json, "{\"benchmark\": \"calls\", \"figures\": [");
    int failures = 0;
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        const struct figure *f = &figures[i];
        double ours = best_of(f, f->libvm), theirs = best_of(f, f->unicorn);
        double times = ours > 0 && theirs > 0 ? f->is_rate ? ours / theirs : theirs / ours : -1;
        printf("%-28s", f->name);
        ours < 0 ? printf("%12s", "failed") : printf("%12.3f", ours);
        theirs < 0 ? printf("%12s", "-") : printf("%12.3f", theirs);
        times < 0 ? printf("%10s", "-") : printf("%9.1fx", times);
        printf("  %s %.0f %s\n", f->is_rate ? ">=" : "<=", f->goal, f->unit);
        fflush(stdout);
        if (json)
            fprintf(json, "%s\n  {\"figure\": \"%s\", \"unit\": \"%s\", \"libvm\": %.4f, \"unicorn\": %.4f, \"goal\": %.0f}", i ? "," : "",
                    f->key, f->unit, ours, theirs, f->goal);
        failures += ours < 0;
    }
    if (json)
        fprintf(json, "\n]}\n"), fclose(json);
    return failures ? 1 : 0;
}
