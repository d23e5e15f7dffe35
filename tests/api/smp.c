/* smp.c - several vCPUs and host threads at once on one memory: atomic operations, code written under another vCPU's feet,
 * permissions, the dirty log, devices. What is checked holds whatever the timing; the runs are made to overlap as much as they
 * can. Programs are 64-bit and position-independent, in VM_MODE_FLAT64. */
#include "../backends.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define RAM 0x100000u
#define CODE 0x1000u
#define DATA 0x8000u
#define PATCH 0x20003u                 /* mov eax, imm32; ret: the immediate is aligned */
#define PATCH_IMM (PATCH + 1)

#define PROGRAM(name, text)                                                              \
    __asm__(".pushsection .rodata\n" #name ":\n" text "\n" #name "_end:\n.popsection");  \
    extern const char name[], name##_end[]

PROGRAM(count_locked, "1: lock incq (%rdi); dec %rcx; jnz 1b; hlt");
/* A spin lock at 64(%rdi) around a plain counter at 128(%rdi). */
PROGRAM(count_under_lock,
        "1: mov $1, %eax\n2: xchg %eax, 64(%rdi); test %eax, %eax; jz 3f; pause; mov $1, %eax; jmp 2b\n"
        "3: incq 128(%rdi); movl $0, 64(%rdi); dec %rcx; jnz 1b; hlt");
PROGRAM(call_until_7, "1: call *%rbx; cmp $7, %eax; jne 1b; hlt");
PROGRAM(patch_then_7, "1: mov %ecx, (%rdi); incl 0x800(%rdi); dec %rcx; jnz 1b; movl $7, (%rdi); hlt");
PROGRAM(touch_pages,                   /* 32 pages at rdi, a counter in each, rcx rounds */
        "1: mov %rdi, %rsi; mov $32, %edx\n2: incq (%rsi); add $4096, %rsi; dec %edx; jnz 2b; dec %rcx; jnz 1b; hlt");
PROGRAM(write_for_ever, "1: incq (%rdi); jmp 1b");
PROGRAM(read_device, "1: mov (%rbx), %rax; dec %rcx; jnz 1b; hlt");
PROGRAM(exchange_device, "1: xchg %eax, (%rbx); dec %rcx; jnz 1b; hlt");
PROGRAM(patched, ".byte 0xb8, 1, 0, 0, 0, 0xc3");

typedef struct job { vm_vcpu *cpu; vm_exit exit; pthread_t thread; bool again; } job;

static vm_machine *machine(vm_backend backend, unsigned vcpus)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    uint64_t most = 0;
    o.backend = backend;
    o.vcpus = vcpus;
    OK(vm_query(backend, "max-vcpus", &most));
    if (most < vcpus)
        test_skip("backend %s has at most %u vCPUs", vm_backend_name(backend), (unsigned)most);
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, RAM, VM_PROT_RWX, NULL));
    OK(vm_write(m, PATCH, patched, (size_t)(patched_end - patched)));
    return m;
}

static void load(vm_machine *m, unsigned index, const char *program, const char *end, uint64_t rcx, uint64_t rdi, uint64_t rbx)
{
    vm_vcpu *cpu = vm_vcpu_get(m, index);
    vm_regs r = VM_REGS_INIT;
    uint64_t at = CODE + 0x400 * index;
    OK(vm_write(m, at, program, (size_t)(end - program)));
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_regs(cpu, &r));
    r.rip = at;
    r.rsp = 0x70000 + 0x1000 * index;
    r.rcx = rcx;
    r.rdi = rdi;
    r.rbx = rbx;
    OK(vm_vcpu_set_regs(cpu, &r));
}
#define LOAD(m, index, program, rcx, rdi, rbx) load(m, index, program, program##_end, rcx, rdi, rbx)

static void *run_job(void *arg)
{
    job *j = arg;
    do
        OK(vm_vcpu_run(j->cpu, NULL, &j->exit));
    while (j->again && j->exit.reason == VM_EXIT_UNMAPPED);
    return NULL;
}

static void start(job *j, vm_machine *m, unsigned index, bool again)
{
    *j = (job){ .cpu = vm_vcpu_get(m, index), .exit = VM_EXIT_INIT, .again = again };
    CHECK(pthread_create(&j->thread, NULL, run_job, j) == 0);
}

static void finish(job *j, int reason)
{
    pthread_join(j->thread, NULL);
    CHECK_EQ(j->exit.reason, reason);
}

static uint64_t peek(vm_machine *m, uint64_t gpa)
{
    uint64_t v = 0;
    OK(vm_read(m, gpa, &v, 8));
    return v;
}

static void count(vm_backend backend, const char *program, const char *end, uint64_t at, uint64_t rounds)
{
    vm_machine *m = machine(backend, 4);
    job jobs[4];
    for (unsigned i = 0; i < 4; i++)
        load(m, i, program, end, rounds, DATA, 0);
    for (unsigned i = 0; i < 4; i++)
        start(&jobs[i], m, i, false);
    for (unsigned i = 0; i < 4; i++)
        finish(&jobs[i], VM_EXIT_HALT);
    CHECK_EQ(peek(m, at), 4 * rounds);
    vm_destroy(m);
}

EACH_BACKEND(four_vcpus_count_atomically) { count(backend, count_locked, count_locked_end, DATA, 200000); }
EACH_BACKEND(four_vcpus_count_under_a_spin_lock)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("too slow where KVM emulates ring 0");
    count(backend, count_under_lock, count_under_lock_end, DATA + 128, 3000);
}

/* One vCPU rewrites a function, beside data of the same page, that another one calls until it returns 7. */
EACH_BACKEND(code_written_by_another_vcpu)
{
    vm_machine *m = machine(backend, 2);
    job caller, writer;
    for (unsigned round = 0; round < 5; round++) {
        OK(vm_write(m, PATCH, patched, (size_t)(patched_end - patched)));
        LOAD(m, 0, patch_then_7, 20000, PATCH_IMM, 0);
        LOAD(m, 1, call_until_7, 0, 0, PATCH);
        if (round & 1) {
            start(&caller, m, 1, false);
            usleep(1000);
            start(&writer, m, 0, false);
        } else {
            start(&writer, m, 0, false);
            start(&caller, m, 1, false);
        }
        finish(&writer, VM_EXIT_HALT);
        finish(&caller, VM_EXIT_HALT);
    }
    CHECK_EQ(peek(m, PATCH_IMM + 0x800) & UINT32_MAX, 5 * 20000);
    vm_destroy(m);
}

/* The same with the host writing while the guest calls. */
EACH_BACKEND(code_written_by_the_host)
{
    vm_machine *m = machine(backend, 1);
    job caller;
    LOAD(m, 0, call_until_7, 0, 0, PATCH);
    start(&caller, m, 0, false);
    for (uint32_t i = 100; i < 1100; i++)
        OK(vm_write(m, PATCH_IMM, &i, 4));
    uint32_t seven = 7;
    OK(vm_write(m, PATCH_IMM, &seven, 4));
    finish(&caller, VM_EXIT_HALT);
    vm_destroy(m);
}

/* Once vm_protect() has returned, no write gets through; once it is lifted, they go on. */
EACH_BACKEND(no_write_after_protect)
{
    vm_machine *m = machine(backend, 1);
    job writer;
    LOAD(m, 0, write_for_ever, 0, DATA, 0);
    start(&writer, m, 0, true);
    for (unsigned i = 0; i < 100; i++) {
        OK(vm_protect(m, DATA, 0x1000, VM_PROT_R));
        uint64_t before = peek(m, DATA);
        usleep(100);
        CHECK_EQ(peek(m, DATA), before);
        OK(vm_protect(m, DATA, 0x1000, VM_PROT_RW));
        while (peek(m, DATA) == before)
            ;
    }
    vm_vcpu_kick(writer.cpu);
    finish(&writer, VM_EXIT_KICK);
    vm_destroy(m);
}

/* Whoever copies each page the log reports ends with a true copy. */
EACH_BACKEND(dirty_log_misses_nothing)
{
    enum { PAGES = 32, AT = 0x80000 };
    vm_machine *m = machine(backend, 2);
    uint64_t copy[PAGES] = { 0 }, bits;
    job writers[2];
    OK(vm_dirty_log(m, true));
    LOAD(m, 0, touch_pages, 2000, AT, 0);
    LOAD(m, 1, touch_pages, 2000, AT + 8, 0);
    start(&writers[0], m, 0, false);
    start(&writers[1], m, 1, false);
    for (unsigned round = 0; round < 200; round++) {
        OK(vm_dirty_fetch(m, AT, PAGES * 4096, &bits));
        for (unsigned i = 0; i < PAGES; i++)
            if (bits >> i & 1)
                copy[i] = peek(m, AT + 4096 * i);
    }
    finish(&writers[0], VM_EXIT_HALT);
    finish(&writers[1], VM_EXIT_HALT);
    OK(vm_dirty_fetch(m, AT, PAGES * 4096, &bits));
    for (unsigned i = 0; i < PAGES; i++) {
        if (bits >> i & 1)
            copy[i] = peek(m, AT + 4096 * i);
        CHECK_EQ(copy[i], 2000);
    }
    OK(vm_dirty_fetch(m, AT, PAGES * 4096, &bits));
    CHECK_EQ(bits, 0);
    vm_destroy(m);
}

/* ---- devices ---- */

typedef struct device { vm_machine *m; vm_region *region; uint64_t reads, destroyed; } device;

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu, (void)offset, (void)width;
    device *d = user;
    *value = d->reads + 1;             /* not atomic: callbacks of one machine exclude each other */
    __atomic_store_n(&d->reads, *value, __ATOMIC_RELAXED);
    return 0;
}

EACH_BACKEND(callbacks_exclude_each_other)
{
    enum { READS = 5000 };
    vm_machine *m = machine(backend, 4);
    vm_io_ops ops = VM_IO_OPS_INIT;
    device d = { .m = m };
    job jobs[4];
    ops.read = device_read;
    OK(vm_map_mmio(m, 0x10000000, 0x1000, &ops, &d, NULL));
    for (unsigned i = 0; i < 4; i++)
        LOAD(m, i, read_device, READS, 0, 0x10000000);
    for (unsigned i = 0; i < 4; i++)
        start(&jobs[i], m, i, false);
    for (unsigned i = 0; i < 300; i++) {                 /* edits meanwhile */
        vm_region *r;
        OK(vm_map_ram(m, 0x200000, 0x1000, VM_PROT_RW, &r));
        OK(vm_unmap(m, r));
    }
    for (unsigned i = 0; i < 4; i++)
        finish(&jobs[i], VM_EXIT_HALT);
    CHECK_EQ(d.reads, 4 * READS);
    vm_destroy(m);
}

static int edit_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu, (void)offset, (void)width;
    device *d = user;
    vm_region *r;
    *value = ++d->reads;
    OK(vm_map_ram(d->m, 0x300000 + (d->reads & 1) * 0x1000, 0x1000, VM_PROT_RW, &r));
    OK(vm_unmap(d->m, r));
    return 0;
}

/* Edits from callbacks, from another thread and from another vCPU's callbacks meet without standing still. */
EACH_BACKEND(edits_from_callbacks_and_threads)
{
    vm_machine *m = machine(backend, 2);
    vm_io_ops ops = VM_IO_OPS_INIT;
    device d = { .m = m };
    job jobs[2];
    ops.read = edit_read;
    OK(vm_map_mmio(m, 0x10000000, 0x1000, &ops, &d, NULL));
    for (unsigned i = 0; i < 2; i++)
        LOAD(m, i, read_device, 500, 0, 0x10000000);
    for (unsigned i = 0; i < 2; i++)
        start(&jobs[i], m, i, false);
    for (unsigned i = 0; i < 300; i++) {
        vm_region *r;
        OK(vm_map_ram(m, 0x200000, 0x1000, VM_PROT_RW, &r));
        OK(vm_unmap(m, r));
    }
    for (unsigned i = 0; i < 2; i++)
        finish(&jobs[i], VM_EXIT_HALT);
    CHECK_EQ(d.reads, 1000);
    vm_destroy(m);
}

static int edit_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)cpu, (void)offset, (void)width, (void)value;
    return 0;
}

/* Locked accesses to a device stop the world; meanwhile the other vCPU's callbacks edit the map. */
EACH_BACKEND(locked_device_accesses_and_edits)
{
    vm_machine *m = machine(backend, 2);
    vm_io_ops ops = VM_IO_OPS_INIT;
    device d = { .m = m };
    job jobs[2];
    ops.read = edit_read;
    ops.write = edit_write;
    OK(vm_map_mmio(m, 0x10000000, 0x1000, &ops, &d, NULL));
    LOAD(m, 0, exchange_device, 2000, 0, 0x10000000);
    LOAD(m, 1, read_device, 2000, 0, 0x10000000);
    for (unsigned i = 0; i < 2; i++)
        start(&jobs[i], m, i, false);
    for (unsigned i = 0; i < 2; i++)
        finish(&jobs[i], VM_EXIT_HALT);
    CHECK_EQ(d.reads, 4000);
    vm_destroy(m);
}

static int suicide_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    device *d = user;
    (void)cpu, (void)offset, (void)width;
    *value = ++d->reads;
    OK(vm_unmap(d->m, d->region));
    CHECK_EQ(d->destroyed, 0);         /* not while its callback runs */
    return 0;
}

static void note_destroyed(void *user) { ((device *)user)->destroyed++; }

EACH_BACKEND(region_unmapped_by_its_own_callback)
{
    vm_machine *m = machine(backend, 1);
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_exit e = VM_EXIT_INIT;
    device d = { .m = m };
    ops.read = suicide_read;
    ops.destroy = note_destroyed;
    OK(vm_map_mmio(m, 0x10000000, 0x1000, &ops, &d, &d.region));
    LOAD(m, 0, read_device, 2, 0, 0x10000000);
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);                /* the second read */
    CHECK_EQ(e.mmio.gpa, 0x10000000);
    CHECK_EQ(d.reads, 1);
    CHECK_EQ(d.destroyed, 1);
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(m);
    CHECK_EQ(d.destroyed, 1);
}

static void *destroyer(void *arg)
{
    usleep(500);
    vm_destroy(arg);
    return NULL;
}

EACH_BACKEND(destroy_under_load)
{
    for (unsigned round = 0; round < 20; round++) {
        vm_machine *m = machine(backend, 3);
        vm_io_ops ops = VM_IO_OPS_INIT;
        device d[2] = { { .m = m }, { .m = m } };
        job jobs[3];
        pthread_t thread;
        ops.read = device_read;
        OK(vm_map_mmio(m, 0x10000000, 0x1000, &ops, &d[0], NULL));
        OK(vm_map_mmio(m, 0x10001000, 0x1000, &ops, &d[1], NULL));
        LOAD(m, 0, read_device, UINT64_MAX, 0, 0x10000000);
        LOAD(m, 1, write_for_ever, 0, DATA, 0);
        LOAD(m, 2, read_device, UINT64_MAX, 0, 0x10001000);
        for (unsigned i = 0; i < 3; i++)
            start(&jobs[i], m, i, false);
        /* They have begun: a machine may not be destroyed under a call that begins. */
        while (!__atomic_load_n(&d[0].reads, __ATOMIC_RELAXED) || !__atomic_load_n(&d[1].reads, __ATOMIC_RELAXED) ||
               !peek(m, DATA))
            usleep(100);
        CHECK(pthread_create(&thread, NULL, destroyer, m) == 0);
        for (unsigned i = 0; i < 3; i++)
            finish(&jobs[i], VM_EXIT_KICK);
        pthread_join(thread, NULL);
    }
}

/* ---- many regions ---- */

TEST_LIMIT(thousands_of_regions, 20)
{
#ifdef __SANITIZE_THREAD__
    enum { N = 2000 };
#else
    enum { N = 20000 };
#endif
    vm_machine *m = NULL;
    static vm_region *r[N];
    vm_io_ops ops = VM_IO_OPS_INIT;
    OK(vm_create(NULL, &m));
    for (unsigned i = 0; i < N; i++) {                   /* from both ends, so that every edit moves others */
        unsigned at = i & 1 ? N - i : i;
        OK(vm_map_mmio(m, 0x100000 + (uint64_t)at * 0x2000, 0x1000, &ops, NULL, &r[i]));
    }
    uint64_t regions;
    OK(vm_stats(m, "regions", &regions));
    CHECK_EQ(regions, N);
    for (unsigned i = 0; i < N; i++)
        OK(vm_unmap(m, r[i]));
    OK(vm_stats(m, "regions", &regions));
    CHECK_EQ(regions, 0);
    vm_destroy(m);
}
