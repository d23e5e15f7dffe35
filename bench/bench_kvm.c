/* bench_kvm.c - what libvm costs on top of KVM: exits a second against a bare KVM_RUN loop, creating a machine against
 * the raw ioctls, ring-3 computing against native, and the system calls of reading registers after an exit.
 *
 * usage: bench_kvm [--json FILE]
 * Each pair is measured alternately in short rounds, and the best round of a side counts: other work on the machine
 * only makes rounds longer. Exits and ring 3 are counted by the thread's CPU time, creation by the clock.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <fcntl.h>
#include <libvm/libvm.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    ROUNDS = 20,
    EXIT_ROUNDS = 400,
    EXITS = 300,
    LIVES = 300,
    RAM = 2 << 20,
    CODE = 0x1000,
    TABLES = 0x100000,
    STACK = 0x80000
};

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "bench_kvm: %s (%s)\n", what, vm_errmsg());
    exit(1);
}
#define MUST(condition) ((condition) ? (void)0 : die(#condition))

static double clock_of(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
static double now(void) { return clock_of(CLOCK_MONOTONIC); }
static double cpu_now(void) { return clock_of(CLOCK_THREAD_CPUTIME_ID); }

static double least(double a, double b) { return b == 0 || a < b ? a : b; }
static double most(double a, double b) { return a > b ? a : b; }

/* ---- a machine made of nothing but ioctls ---- */

typedef struct bare {
    int kvm, vm, cpu, run_bytes;
    struct kvm_run *run;
    uint8_t *ram;
    struct kvm_cpuid2 *cpuid;
} bare;

static struct kvm_cpuid2 *read_cpuid(int kvm)
{
    struct kvm_cpuid2 *c = calloc(1, sizeof *c + 256 * sizeof c->entries[0]);
    MUST(c);
    c->nent = 256;
    MUST(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, c) == 0);
    return c;
}

static bare bare_open(void)
{
    bare b;
    MUST((b.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) >= 0);
    MUST((b.vm = ioctl(b.kvm, KVM_CREATE_VM, 0)) >= 0);
    b.ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct kvm_userspace_memory_region r = {.memory_size = RAM, .userspace_addr = (uintptr_t)b.ram};
    MUST(ioctl(b.vm, KVM_SET_USER_MEMORY_REGION, &r) == 0);
    MUST((b.cpu = ioctl(b.vm, KVM_CREATE_VCPU, 0)) >= 0);
    b.run_bytes = ioctl(b.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    b.run = mmap(NULL, (size_t)b.run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b.cpu, 0);
    MUST(b.run != MAP_FAILED);
    b.cpuid = read_cpuid(b.kvm);
    MUST(ioctl(b.cpu, KVM_SET_CPUID2, b.cpuid) == 0);
    return b;
}

static void bare_close(bare *b)
{
    munmap(b->run, (size_t)b->run_bytes);
    munmap(b->ram, RAM);
    close(b->cpu);
    close(b->vm);
    close(b->kvm);
    free(b->cpuid);
}

static void bare_start(bare *b, const uint8_t *code, size_t bytes, uint64_t rdx, uint64_t rdi)
{
    static const struct kvm_segment flat = {
        .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    struct kvm_sregs s;
    memcpy(b->ram + CODE, code, bytes);
    MUST(ioctl(b->cpu, KVM_GET_SREGS, &s) == 0);
    s.ds = s.es = s.ss = s.fs = s.gs = s.cs = flat;
    s.cs.type = 11;
    s.cs.selector = 8;
    s.cr0 |= 1;
    MUST(ioctl(b->cpu, KVM_SET_SREGS, &s) == 0);
    struct kvm_regs r = {.rip = CODE, .rflags = 2, .rsp = STACK, .rdx = rdx, .rdi = rdi};
    MUST(ioctl(b->cpu, KVM_SET_REGS, &r) == 0);
}

/* ---- the same with libvm ---- */

typedef struct guest {
    vm_machine *m;
    vm_vcpu *cpu;
    vm_region *ram;
} guest;

static guest guest_open(void)
{
    guest g;
    vm_options o = VM_OPTIONS_INIT;
    o.backend = VM_BACKEND_KVM;
    MUST(vm_create(&o, &g.m) == VM_OK);
    MUST(vm_map_ram(g.m, 0, RAM, VM_PROT_RWX, &g.ram) == VM_OK);
    g.cpu = vm_vcpu_get(g.m, 0);
    return g;
}

static void guest_start(guest *g, const uint8_t *code, size_t bytes, uint64_t rdx, uint64_t rdi)
{
    vm_regs r = VM_REGS_INIT;
    MUST(vm_write(g->m, CODE, code, bytes) == VM_OK);
    MUST(vm_vcpu_set_mode(g->cpu, VM_MODE_FLAT32) == VM_OK);
    MUST(vm_vcpu_get_regs(g->cpu, &r) == VM_OK);
    r.rip = CODE;
    r.rsp = STACK;
    r.rdx = rdx;
    r.rdi = rdi;
    MUST(vm_vcpu_set_regs(g->cpu, &r) == VM_OK);
}

/* ---- exits ---- */

typedef struct counter {
    vm_vcpu *cpu;
    unsigned left;
    uint64_t sum;
} counter;

static int count_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    counter *c = user;
    (void)offset, (void)width;
    c->sum += value;
    if (--c->left == 0) vm_vcpu_kick(cpu);
    return 0;
}

static const vm_io_ops count_ops = {.size = sizeof(vm_io_ops), .write = count_write};

static double bare_exits(bare *b, uint64_t *sum)
{
    double start = cpu_now();
    for (unsigned i = 0; i < EXITS; i++) {
        if (ioctl(b->cpu, KVM_RUN, 0) < 0) die("KVM_RUN");
        if (b->run->exit_reason == KVM_EXIT_IO)
            *sum += ((uint8_t *)b->run)[b->run->io.data_offset];
        else if (b->run->exit_reason == KVM_EXIT_MMIO)
            *sum += b->run->mmio.data[0];
        else
            die("unexpected exit");
    }
    return EXITS / (cpu_now() - start);
}

static double callback_exits(guest *g, counter *c)
{
    vm_exit e = VM_EXIT_INIT;
    c->left = EXITS;
    double start = cpu_now();
    MUST(vm_vcpu_run(g->cpu, NULL, &e) == VM_OK && e.reason == VM_EXIT_KICK);
    return EXITS / (cpu_now() - start);
}

/* is_brief: the record need not name the instruction, as KVM's does not. */
static double returned_exits(guest *g, uint64_t *sum, bool is_brief)
{
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.is_brief = is_brief;
    double start = cpu_now();
    for (unsigned i = 0; i < EXITS; i++) {
        MUST(vm_vcpu_run(g->cpu, &o, &e) == VM_OK);
        *sum += e.reason == VM_EXIT_IO ? e.io.data : e.mmio.data;
    }
    return EXITS / (cpu_now() - start);
}

static FILE *json;
static void result(const char *name, const char *unit, double ours, double base, double goal, bool is_most)
{
    double ratio = ours / base;
    static const char *separator = "";
    printf("%-40s %12.1f %-9s base %12.1f   ratio %.3f (goal %s %.2f)\n", name, ours, unit, base, ratio,
           is_most ? "<=" : ">=", goal);
    if (json)
        fprintf(json,
                "%s\n  {\"name\": \"%s\", \"unit\": \"%s\", \"libvm\": %.3f, \"base\": %.3f, \"ratio\": %.4f, "
                "\"goal\": %.2f}",
                separator, name, unit, ours, base, ratio, goal);
    separator = ",";
}

static void bench_exits(bool is_port)
{
    static const uint8_t port_loop[] = {0xee, 0xeb, 0xfd}, mmio_loop[] = {0x88, 0x07, 0xeb, 0xfc};
    const uint8_t *code = is_port ? port_loop : mmio_loop;
    size_t bytes = is_port ? sizeof port_loop : sizeof mmio_loop;
    double ours = 0, base = 0, returned[2] = {0, 0};
    uint64_t sum = 0;
    bare b = bare_open();
    guest g = guest_open(), r = guest_open();
    counter c = {.cpu = g.cpu};
    if (is_port)
        MUST(vm_map_pio(g.m, 0x10, 1, &count_ops, &c, NULL) == VM_OK);
    else
        MUST(vm_map_mmio(g.m, 0x40000000, 4096, &count_ops, &c, NULL) == VM_OK);
    bare_start(&b, code, bytes, 0x10, 0x40000000);
    guest_start(&g, code, bytes, 0x10, 0x40000000);
    guest_start(&r, code, bytes, 0x10, 0x40000000);
    for (unsigned i = 0; i < EXIT_ROUNDS; i++) {
        base = most(base, bare_exits(&b, &sum));
        ours = most(ours, callback_exits(&g, &c));
        for (unsigned p = 0; p < 2; p++) returned[p] = most(returned[p], returned_exits(&r, &sum, p));
    }
    result(is_port ? "port exits, callback" : "mmio exits, callback", "/s", ours, base, 0.95, false);
    result(is_port ? "port exits, to the caller, brief" : "mmio exits, to the caller, brief", "/s", returned[1], base,
           0.95, false);
    result(is_port ? "port exits, to the caller" : "mmio exits, to the caller", "/s", returned[0], base, 0.95, false);
    vm_destroy(g.m);
    vm_destroy(r.m);
    bare_close(&b);
}

/* ---- creation: open to first HLT to close ---- */

static const uint8_t halt[] = {0xf4};

static double bare_life(void)
{
    double start = now();
    bare b = bare_open();
    bare_start(&b, halt, sizeof halt, 0, 0);
    MUST(ioctl(b.cpu, KVM_RUN, 0) == 0 && b.run->exit_reason == KVM_EXIT_HLT);
    bare_close(&b);
    return (now() - start) * 1e6;
}

static double guest_life(void)
{
    vm_exit e = VM_EXIT_INIT;
    double start = now();
    guest g = guest_open();
    guest_start(&g, halt, sizeof halt, 0, 0);
    MUST(vm_vcpu_run(g.cpu, NULL, &e) == VM_OK && e.reason == VM_EXIT_HALT);
    vm_destroy(g.m);
    return (now() - start) * 1e6;
}

static void bench_creation(void)
{
    double ours = 0, base = 0;
    for (unsigned i = 0; i < LIVES; i++) {
        base = least(bare_life(), base);
        ours = least(guest_life(), ours);
    }
    result("create, run HLT, destroy", "us", ours, base, 1.1, true);
}

/* ---- ring 3 ---- */

/* Integer mixing with loads and stores in a 64 KiB window, as position-independent machine code that the host runs too:
 * uint64_t compute(uint64_t n, uint64_t *window). */
__asm__(".section .text.bench_guest, \"ax\"\n"
        ".globl bench_guest, bench_guest_end\n"
        "bench_guest:\n"
        "    mov $0x9E3779B97F4A7C15, %rax\n"
        "1:  mov %rax, %rcx\n"
        "    shr $29, %rcx\n"
        "    xor %rcx, %rax\n"
        "    imul $0x27D4EB2F, %rax, %rax\n"
        "    mov %eax, %ecx\n"
        "    and $0x1fff, %ecx\n"
        "    add (%rsi,%rcx,8), %rax\n"
        "    mov %rax, (%rsi,%rcx,8)\n"
        "    dec %rdi\n"
        "    jnz 1b\n"
        "    ret\n"
        "bench_guest_end:\n"
        ".text\n");
extern const uint8_t bench_guest[], bench_guest_end[];
enum { TURNS = 20000000, WINDOW = 0x20000 };

/* Long mode at ring 3 with page tables for 2 MiB; ports open (IOPL 3) so that OUT ends it. */
static void ring3_start(guest *g)
{
    const uint64_t entries[][2] = {
        {TABLES, (TABLES + 0x1000) | 7}, {TABLES + 0x1000, (TABLES + 0x2000) | 7}, {TABLES + 0x2000, 0x87}};
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    for (unsigned i = 0; i < 3; i++) MUST(vm_write(g->m, entries[i][0], &entries[i][1], 8) == VM_OK);
    MUST(vm_write(g->m, CODE, bench_guest, (size_t)(bench_guest_end - bench_guest)) == VM_OK);
    MUST(vm_write(g->m, 0x3000, (const uint8_t[]){0xe6, 0x80}, 2) == VM_OK);
    MUST(vm_vcpu_set_mode(g->cpu, VM_MODE_FLAT64) == VM_OK);
    MUST(vm_vcpu_get_sregs(g->cpu, &s) == VM_OK);
    s.cr3 = TABLES;
    s.cs = (vm_segment){.limit = 0xffffffff, .selector = 0x33, .attributes = 0xa0fb};
    s.ss = s.ds = s.es = (vm_segment){.limit = 0xffffffff, .selector = 0x2b, .attributes = 0xc0f3};
    MUST(vm_vcpu_set_sregs(g->cpu, &s) == VM_OK);
    MUST(vm_vcpu_get_regs(g->cpu, &r) == VM_OK);
    r.rip = CODE;
    r.rsp = STACK - 8;
    r.rdi = TURNS;
    r.rsi = WINDOW;
    r.rflags = 0x3002;
    MUST(vm_write(g->m, r.rsp, &(uint64_t){0x3000}, 8) == VM_OK);
    MUST(vm_vcpu_set_regs(g->cpu, &r) == VM_OK);
}

static void bench_ring3(void)
{
    double ours = 0, base = 0;
    static uint64_t window[8192];
    guest g = guest_open();
    vm_exit e = VM_EXIT_INIT;
    void *text = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(text != MAP_FAILED);
    memcpy(text, bench_guest, (size_t)(bench_guest_end - bench_guest));
    MUST(mprotect(text, 4096, PROT_READ | PROT_EXEC) == 0);
    uint64_t (*native)(uint64_t, uint64_t *) = (uint64_t(*)(uint64_t, uint64_t *))(uintptr_t)text;
    for (unsigned i = 0; i < ROUNDS; i++) {
        double start = cpu_now();
        uint64_t want = native(TURNS, window);
        base = least((cpu_now() - start) * 1e3, base);
        ring3_start(&g);
        start = cpu_now();
        MUST(vm_vcpu_run(g.cpu, NULL, &e) == VM_OK && e.reason == VM_EXIT_IO);
        ours = least((cpu_now() - start) * 1e3, ours);
        vm_regs r = VM_REGS_INIT;
        MUST(vm_vcpu_get_regs(g.cpu, &r) == VM_OK && r.rax == want);
    }
    result("ring-3 computing", "ms", ours, base, 1.02, true);
    munmap(text, 4096);
    vm_destroy(g.m);
}

/* ---- registers ---- */

static void bench_registers(void)
{
    static const uint8_t loop[] = {0xee, 0xeb, 0xfd};
    guest g = guest_open();
    vm_exit e = VM_EXIT_INIT;
    vm_regs r = VM_REGS_INIT;
    guest_start(&g, loop, sizeof loop, 0x10, 0);
    MUST(vm_vcpu_run(g.cpu, NULL, &e) == VM_OK);
    enum { READS = 100000 };
    double start = now();
    for (unsigned i = 0; i < READS; i++) MUST(vm_vcpu_get_regs(g.cpu, &r) == VM_OK);
    double each = (now() - start) / READS * 1e9;
    start = now();
    for (unsigned i = 0; i < READS; i++) (void)!getppid();
    double system_call = (now() - start) / READS * 1e9;
    result("vm_vcpu_get_regs after an exit", "ns", each, system_call, 1.0, true);
    vm_destroy(g.m);
}

int main(int argc, char **argv)
{
    uint64_t available = 0, is_hardware = 0;
    if (argc == 3 && !strcmp(argv[1], "--json")) json = fopen(argv[2], "w");
    if (vm_query(VM_BACKEND_KVM, "available", &available) != VM_OK || !available) {
        printf("kvm: skipped, %s\n", vm_errmsg());
        return 0;
    }
    (void)vm_query(VM_BACKEND_KVM, "hardware-ring0", &is_hardware);
    printf("kvm: guest ring 0 runs %s\n", is_hardware ? "on the CPU" : "in the host's emulator");
    if (json)
        fprintf(json, "{\"benchmark\": \"kvm\", \"hardware_ring0\": %s, \"results\": [",
                is_hardware ? "true" : "false");
    bench_exits(true);
    bench_exits(false);
    bench_creation();
    bench_ring3();
    bench_registers();
    if (json) {
        fprintf(json, "\n]}\n");
        fclose(json);
    }
    return 0;
}
