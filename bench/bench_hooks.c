/* bench_hooks.c - calls a second to hooks and register functions, beside Unicorn where that is there.
 *
 * usage: bench_hooks [--json FILE] [--only NAME] [--backend jit|interp]
 *
 * Each figure is the best of several short runs. Callbacks count and do nothing else; loops are as small as the event
 * allows, so the figures are those of the hook, not of the guest.
 */
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef HAVE_UNICORN
#include <unicorn/unicorn.h>
#endif

enum { CODE = 0x1000, DATA = 0x8000, RUNS = 5 };

/* ecx counts each loop down. */
static const char BLOCK[] = "\xff\xc9\x75\xfc\xf4";                               /* 1: dec ecx; jnz 1b; hlt */
static const char INSN[] = "\x01\xd0\x31\xc2\x8d\x70\x04\x89\xd7\x4c\x01\xc8\x48\xff\xc3\x90\x90\xff\xc9\x75\xeb\xf4";
static const char MEMORY[] = "\x48\x89\x03\x48\x8b\x13\x48\x89\x43\x08\x48\x8b\x73\x10\xff\xc9\x75\xee\xf4";
static const char FAULT[] = "\x0f\x0b\xff\xc9\x75\xfa\xf4";                       /* 1: ud2; dec ecx; jnz 1b; hlt */

static uint64_t calls;
static const char *only;
static vm_backend backend = VM_BACKEND_JIT;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);          /* the machine may have other work */
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void check(int status, const char *what)
{
    if (status == 0)
        return;
    fprintf(stderr, "bench_hooks: %s: %d %s\n", what, status, vm_errmsg());
    exit(1);
}

/* ---- libvm ---- */

static vm_hook_result count(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    (void)user, (void)cpu, (void)event;
    calls++;
    return VM_HOOK_CONTINUE;
}

static vm_hook_result count_and_skip(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    (void)user, (void)cpu, (void)event;
    calls++;
    return VM_HOOK_SKIP;
}

typedef struct job { const char *code; size_t bytes; int kinds[2]; unsigned loops; } job;
static const job jobs[] = {
    { BLOCK, sizeof BLOCK - 1, { VM_HOOK_BLOCK, 0 }, 20000000 },
    { INSN, sizeof INSN - 1, { VM_HOOK_INSN, 0 }, 2000000 },
    { MEMORY, sizeof MEMORY - 1, { VM_HOOK_MEM_READ, VM_HOOK_MEM_WRITE }, 3000000 },
    { FAULT, sizeof FAULT - 1, { VM_HOOK_EXCEPTION, 0 }, 2000000 },
};
enum { J_BLOCK, J_INSN, J_MEMORY, J_FAULT };

static vm_machine *machine(vm_vcpu **cpu)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    o.backend = backend;
    check(vm_create(&o, &m), "create");
    check(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL), "map");
    *cpu = vm_vcpu_get(m, 0);
    check(vm_vcpu_set_mode(*cpu, VM_MODE_FLAT64), "mode");
    return m;
}

static void start(vm_vcpu *cpu, uint64_t loops)
{
    vm_regs r = VM_REGS_INIT;
    check(vm_vcpu_get_regs(cpu, &r), "regs");
    r.rip = CODE;
    r.rcx = loops;
    r.rbx = DATA;
    check(vm_vcpu_set_regs(cpu, &r), "regs");
}

static double run_job(const job *j)
{
    vm_vcpu *cpu;
    vm_machine *m = machine(&cpu);
    unsigned loops = backend == VM_BACKEND_JIT ? j->loops : j->loops / 10;
    check(vm_write(m, CODE, j->code, j->bytes), "write");
    for (unsigned i = 0; i < 2 && j->kinds[i]; i++) {
        vm_hook_desc d = VM_HOOK_INIT;
        d.kind = (vm_hook_kind)j->kinds[i];
        d.fn = j->kinds[0] == VM_HOOK_EXCEPTION ? count_and_skip : count;
        check(vm_hook_add(m, &d, NULL), "hook");
    }
    double best = 0;
    for (unsigned i = 0; i <= RUNS; i++) {
        vm_exit e = VM_EXIT_INIT;
        start(cpu, i ? loops : 5000);
        calls = 0;
        double t = now();
        check(vm_vcpu_run(cpu, NULL, &e), "run");
        t = now() - t;
        if (e.reason != VM_EXIT_HALT)
            check(-1, vm_exit_name(e.reason));
        if (i && (double)calls / t > best)
            best = (double)calls / t;
    }
    vm_destroy(m);
    return best;
}

static double blocks(void) { return run_job(&jobs[J_BLOCK]); }
static double insns(void) { return run_job(&jobs[J_INSN]); }
static double memory(void) { return run_job(&jobs[J_MEMORY]); }
static double faults(void) { return run_job(&jobs[J_FAULT]); }

static double per_second(void (*body)(void *), void *arg, unsigned n)
{
    double best = 0;
    for (unsigned i = 0; i < RUNS; i++) {
        double t = now();
        for (unsigned k = 0; k < n; k++)
            body(arg);
        t = now() - t;
        if (n / t > best)
            best = n / t;
    }
    return best;
}

static volatile uint64_t sink;
static void read_ten(void *arg)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < 10; i++) {
        vm_vcpu_read_reg(arg, VM_REG_RAX + (int)(i & 7), &v, 8);
        sink = v;
    }
}

static void read_all(void *arg)
{
    static vm_regs r = VM_REGS_INIT;
    vm_vcpu_get_regs(arg, &r);
    sink = r.rax;
}

static double with_cpu(void (*body)(void *), unsigned n, double each)
{
    vm_vcpu *cpu;
    vm_machine *m = machine(&cpu);
    double rate = per_second(body, cpu, n) * each;
    vm_destroy(m);
    return rate;
}
static double one_register(void) { return with_cpu(read_ten, 2000000, 10); }
static double all_registers(void) { return with_cpu(read_all, 5000000, 1); }

/* ---- Unicorn ---- */
#ifdef HAVE_UNICORN
static void uc_count(uc_engine *uc, uint64_t address, uint32_t size, void *user)
{
    (void)uc, (void)address, (void)size, (void)user;
    calls++;
}
static void uc_count_access(uc_engine *uc, uc_mem_type type, uint64_t address, int size, int64_t value, void *user)
{
    (void)uc, (void)type, (void)address, (void)size, (void)value, (void)user;
    calls++;
}
static bool uc_skip(uc_engine *uc, void *user)
{
    uint64_t rip = CODE + 2;
    (void)user;
    calls++;
    uc_reg_write(uc, UC_X86_REG_RIP, &rip);
    return true;
}

static uc_engine *uc_machine(void)
{
    uc_engine *uc;
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &uc) || uc_mem_map(uc, 0, 0x10000, UC_PROT_ALL))
        check(-1, "unicorn");
    return uc;
}

static double uc_job(const job *j, int type, void *fn)
{
    uc_engine *uc = uc_machine();
    uc_hook h;
    uint64_t rcx, rbx = DATA;
    double best = 0;
    uc_mem_write(uc, CODE, j->code, j->bytes);
    uc_reg_write(uc, UC_X86_REG_RBX, &rbx);
    uc_hook_add(uc, &h, type, fn, NULL, (uint64_t)1, (uint64_t)0);
    for (unsigned i = 0; i < RUNS; i++) {
        rcx = j->loops / 10;
        uc_reg_write(uc, UC_X86_REG_RCX, &rcx);
        calls = 0;
        double t = now();
        if (uc_emu_start(uc, CODE, CODE + j->bytes - 1, 0, 0))
            return 0;
        t = now() - t;
        if ((double)calls / t > best)
            best = (double)calls / t;
    }
    uc_close(uc);
    return best;
}
static double uc_blocks(void) { return uc_job(&jobs[J_BLOCK], UC_HOOK_BLOCK, (void *)(uintptr_t)uc_count); }
static double uc_insns(void) { return uc_job(&jobs[J_INSN], UC_HOOK_CODE, (void *)(uintptr_t)uc_count); }
static double uc_memory(void)
{
    return uc_job(&jobs[J_MEMORY], UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, (void *)(uintptr_t)uc_count_access);
}
static double uc_faults(void) { return uc_job(&jobs[J_FAULT], UC_HOOK_INSN_INVALID, (void *)(uintptr_t)uc_skip); }

static void uc_read_ten(void *arg)
{
    static const int ids[8] = { UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RBX, UC_X86_REG_RSP,
                                UC_X86_REG_RBP, UC_X86_REG_RSI, UC_X86_REG_RDI };
    uint64_t v = 0;
    for (unsigned i = 0; i < 10; i++) {
        uc_reg_read(arg, ids[i & 7], &v);
        sink = v;
    }
}
static void uc_read_all(void *arg)
{
    static int ids[16] = { UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RBX, UC_X86_REG_RSP, UC_X86_REG_RBP,
                           UC_X86_REG_RSI, UC_X86_REG_RDI, UC_X86_REG_R8, UC_X86_REG_R9, UC_X86_REG_R10, UC_X86_REG_R11,
                           UC_X86_REG_R12, UC_X86_REG_R13, UC_X86_REG_R14, UC_X86_REG_R15 };
    static uint64_t v[16];
    static void *at[16];
    for (unsigned i = 0; !at[15] && i < 16; i++)
        at[i] = &v[i];
    uc_reg_read_batch(arg, ids, at, 16);
    sink = v[0];
}
static double uc_with(void (*body)(void *), unsigned n, double each)
{
    uc_engine *uc = uc_machine();
    double rate = per_second(body, uc, n) * each;
    uc_close(uc);
    return rate;
}
static double uc_one_register(void) { return uc_with(uc_read_ten, 1000000, 10); }
static double uc_all_registers(void) { return uc_with(uc_read_all, 500000, 1); }
#define UC(fn) fn
#else
#define UC(fn) NULL
#endif

static const struct figure { const char *name, *text; double goal; double (*ours)(void), (*theirs)(void); } figures[] = {
    { "block", "block hook, calls", 300e6, blocks, UC(uc_blocks) },
    { "insn", "instruction hook, calls", 200e6, insns, UC(uc_insns) },
    { "memory", "memory hook, read + write", 100e6, memory, UC(uc_memory) },
    { "fault", "#UD to a hook and on", 20e6, faults, UC(uc_faults) },
    { "register", "single register read", 200e6, one_register, UC(uc_one_register) },
    { "registers", "16 registers in one call", 80e6, all_registers, UC(uc_all_registers) },
};

int main(int argc, char **argv)
{
    FILE *json = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--json"))
            json = fopen(argv[i + 1], "w");
        else if (!strcmp(argv[i], "--only"))
            only = argv[i + 1];
        else if (!strcmp(argv[i], "--backend"))
            backend = strcmp(argv[i + 1], "interp") ? VM_BACKEND_JIT : VM_BACKEND_INTERP;
    }
    printf("%-28s%12s%12s%10s%12s   (millions a second)\n", "what", "libvm", "unicorn", "times", "goal");
    if (json)
        fprintf(json, "[");
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        const struct figure *f = &figures[i];
        if (only && strcmp(only, f->name))
            continue;
        double ours = f->ours(), theirs = f->theirs ? f->theirs() : 0;
        printf("%-28s%12.1f%12.1f%10.2f%12.0f\n", f->text, ours / 1e6, theirs / 1e6, theirs > 0 ? ours / theirs : 0,
               f->goal / 1e6);
        if (json)
            fprintf(json, "%s\n  {\"figure\": \"%s\", \"libvm\": %.0f, \"unicorn\": %.0f, \"goal\": %.0f}", i ? "," : "",
                    f->name, ours, theirs, f->goal);
    }
    if (json) {
        fprintf(json, "\n]\n");
        fclose(json);
    }
    return 0;
}
