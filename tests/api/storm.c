/* storm.c - everything that other threads may do to a machine, at once, while its vCPUs run: kicks, interrupts, memory mapped, unmapped
 * and protected, code written, hooks and breakpoints made and removed, snapshots, statistics, the dirty log, and in the end its
 * destruction. And a vCPU that changes page tables and descriptors which another one walks and loads: each must be seen whole.
 *
 * What is checked holds whatever the timing: sums that the guest keeps twice, callbacks that come before their destroy, values that were
 * there. `make check-tsan` runs it under ThreadSanitizer.
 */
#include "../backends.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

/* A guest's code. */
#define PROGRAM(name, bits, text) \
    __asm__(".pushsection .rodata\n.code" #bits "\n" #name ":\n" text "\n" #name "_end:\n.code64\n.popsection"); \
    extern const char name[], name##_end[]

typedef struct storm {
    vm_machine *m;
    _Atomic bool is_over, is_held;
    _Atomic unsigned hooks_made, hooks_gone, snapshots, exits;
} storm;

/* One vCPU's thread: runs on whatever ends a run, until the storm is over. */
typedef struct driver { storm *s; vm_vcpu *cpu; pthread_t thread; } driver;

static void *drive(void *arg)
{
    driver *d = arg;
    vm_exit e = VM_EXIT_INIT;
    while (!d->s->is_over) {
        while (d->s->is_held)
            usleep(50);
        OK(vm_vcpu_run(d->cpu, NULL, &e));
        if (e.reason == VM_EXIT_HALT || e.reason == VM_EXIT_INTERNAL || e.reason == VM_EXIT_SHUTDOWN)
            FAIL("vCPU %u ended: %s at 0x%llx", vm_vcpu_index(d->cpu), vm_exit_name(e.reason), (unsigned long long)e.rip);
        d->s->exits++;
    }
    return NULL;
}

/* A thread that does one thing to the machine ROUNDS times. */
typedef struct trouble { storm *s; void (*deed)(storm *s, unsigned round); unsigned rounds; pthread_t thread; } trouble;

static void *make_trouble(void *arg)
{
    trouble *t = arg;
    for (unsigned i = 0; i < t->rounds; i++) {
        t->deed(t->s, i);
        usleep(20);
    }
    return NULL;
}

static void raise_storm(storm *s, unsigned vcpus, trouble *troubles, unsigned count)
{
    driver drivers[4];
    for (unsigned i = 0; i < vcpus; i++) {
        drivers[i] = (driver){ .s = s, .cpu = vm_vcpu_get(s->m, i) };
        CHECK(pthread_create(&drivers[i].thread, NULL, drive, &drivers[i]) == 0);
    }
    for (unsigned i = 0; i < count; i++) {
        troubles[i].s = s;
        CHECK(pthread_create(&troubles[i].thread, NULL, make_trouble, &troubles[i]) == 0);
    }
    for (unsigned i = 0; i < count; i++)
        pthread_join(troubles[i].thread, NULL);
    s->is_over = true;
    for (unsigned i = 0; i < vcpus; i++)
        vm_vcpu_kick(vm_vcpu_get(s->m, i));
    for (unsigned i = 0; i < vcpus; i++)
        pthread_join(drivers[i].thread, NULL);
}

static void kick(storm *s, unsigned round) { vm_vcpu_kick(vm_vcpu_get(s->m, round % vm_vcpu_count(s->m))); }

static void watch(storm *s, unsigned round)
{
    const char *name;
    uint64_t value;
    for (unsigned i = 0; (name = vm_stat_name(i, NULL)); i++)
        OK(vm_stats(s->m, name, &value));
    (void)vm_time(s->m);
    (void)vm_vcpu_retired(vm_vcpu_get(s->m, round % vm_vcpu_count(s->m)));
}

/* Refused while a vCPU runs: they are kept out for the moment. Nothing is restored: regions of the others would come and go. The strategy
 * changes, too, where the backend lets it. */
static void snapshot(storm *s, unsigned round)
{
    static const char *const strategies[] = { "shadow", "ept", "tlb" };
    vm_snapshot *taken = NULL;
    int status;
    s->is_held = true;
    while ((status = vm_snapshot_take(s->m, &taken)) == VM_E_BUSY) {
        kick(s, round++);
        usleep(50);
    }
    while (vm_mmu_select(s->m, strategies[s->snapshots % 3]) == VM_E_BUSY)
        usleep(50);
    s->is_held = false;
    OK(status);
    CHECK(vm_snapshot_bytes(taken) < UINT64_C(64) << 20);
    s->snapshots++;
}

/* ---- a bare machine ---- */

enum { CPUS = 3, CODE = 0x1000, CALLED = 0x3003, PATCHED = 0x3004, SUM = 0x4000, OWN = 0x5000, PAGES = 0x40000, COUNT = 8, DEVICE = 0x200000,
       HOLE = 0x300000 };

/* rdi: this vCPU's counter. Counts twice, calls what is rewritten, touches pages that come and go, and a device. */
PROGRAM(busy, 64,
        "1: lock incq 0x4000; incq (%rdi); mov $0x3003, %eax; call *%rax; mov $0x40000, %esi; mov $8, %ecx\n"
        "2: incq (%rsi); add $0x1000, %rsi; dec %ecx; jnz 2b\n"
        "mov 0x200000, %eax; mov %eax, 0x200008; mov $0x40000, %edi; mov $0x40800, %esi; mov $64, %ecx; rep movsq\n"
        "mov %r8, %rdi; addps %xmm0, %xmm1; jmp 1b");
PROGRAM(called, 64, ".byte 0xb8, 1, 0, 0, 0, 0xc3");

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu, (void)offset, (void)width;
    *value = ++*(uint64_t *)user;               /* not atomic: callbacks of one machine exclude each other */
    return 0;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    ++*(uint64_t *)user;
    return 0;
}

static void protect(storm *s, unsigned round)
{
    static const vm_prot prots[] = { VM_PROT_R, VM_PROT_RW, VM_PROT_NONE, VM_PROT_RWX };
    OK(vm_protect(s->m, PAGES + 0x1000 * (round % COUNT), 0x1000, prots[round / COUNT % 4]));
}

static void map(storm *s, unsigned round)
{
    vm_region *r;
    OK(vm_map_ram(s->m, HOLE + 0x10000 * (round % 4), 0x2000, VM_PROT_RW, &r));
    OK(vm_unmap(s->m, r));
}

static void write_code(storm *s, unsigned round)
{
    uint64_t value = 0;
    OK(vm_write(s->m, PATCHED, &round, 4));
    OK(vm_read(s->m, SUM, &value, 8));
    OK(vm_invalidate(s->m, CODE, 0x1000));
}

static void fetch_dirty(storm *s, unsigned round)
{
    uint64_t bits[1] = { 0 };
    if (round % 16 == 0)
        OK(vm_dirty_log(s->m, round % 32 == 0));
    int status = vm_dirty_fetch(s->m, PAGES, COUNT * 0x1000, bits);
    CHECK(status == VM_OK || round % 32 >= 16);
}

/* A hook's own record: no call after its end. */
typedef struct hooked { storm *s; _Atomic bool is_gone; } hooked;
static hooked records[4096];

static vm_hook_result on_hook(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    (void)cpu, (void)event;
    CHECK(!((hooked *)user)->is_gone);
    return VM_HOOK_CONTINUE;
}

static void on_hook_gone(void *user)
{
    hooked *h = user;
    h->is_gone = true;
    h->s->hooks_gone++;
}

static void hook(storm *s, unsigned round)
{
    static const vm_hook_kind kinds[] = { VM_HOOK_BLOCK, VM_HOOK_INSN, VM_HOOK_MEM_WRITE, VM_HOOK_EDGE, VM_HOOK_MEM_READ, VM_HOOK_FETCH };
    vm_hook_desc d = VM_HOOK_INIT;
    vm_hook *h = NULL;
    d.kind = kinds[round % 6];
    d.fn = on_hook;
    d.user = &records[round];
    d.destroy = on_hook_gone;
    records[round].s = s;
    OK(vm_hook_add(s->m, &d, &h));
    s->hooks_made++;
    if (round % 3 == 0)
        usleep(200);
    if (round % 16)                             /* the rest goes with the machine */
        OK(vm_hook_remove(s->m, h));
}

static void stop_there(storm *s, unsigned round)
{
    OK(vm_breakpoint(s->m, CALLED, round % 2 == 0));
    OK(vm_watchpoint(s->m, PAGES, 8, VM_PROT_W, round % 2 == 0));
}

static void *end_machine(void *arg)
{
    vm_destroy(arg);
    return NULL;
}

/* The guest's sums: nothing was lost, whatever happened. */
static void compare_sums(vm_machine *m)
{
    uint64_t sum = 0, own, all = 0;
    OK(vm_read(m, SUM, &sum, 8));
    for (unsigned i = 0; i < CPUS; i++) {
        OK(vm_read(m, OWN + 0x100 * i, &own, 8));
        CHECK(own > 0);
        all += own;
    }
    if (all > sum || sum > all + CPUS)
        FAIL("counted together %llu, by themselves %llu", (unsigned long long)sum, (unsigned long long)all);
}

static void *run_once(void *arg)
{
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(arg, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    return NULL;
}

/* Destroyed by another thread while all of them run: a run that was going on ends as if kicked. */
static void destroy_while_running(storm *s)
{
    pthread_t threads[CPUS], ender;
    uint64_t before[CPUS], now;
    OK(vm_protect(s->m, PAGES, COUNT * 0x1000, VM_PROT_RWX));
    for (unsigned i = 0; i < CPUS; i++) {
        vm_vcpu_kick(vm_vcpu_get(s->m, i));
        run_once(vm_vcpu_get(s->m, i));         /* the last kick is taken */
        OK(vm_read(s->m, OWN + 0x100 * i, &before[i], 8));
    }
    for (unsigned i = 0; i < CPUS; i++)
        CHECK(pthread_create(&threads[i], NULL, run_once, vm_vcpu_get(s->m, i)) == 0);
    for (unsigned i = 0; i < CPUS; i++)         /* they have begun: a machine may not be destroyed under a call that begins */
        do {
            usleep(100);
            OK(vm_read(s->m, OWN + 0x100 * i, &now, 8));
        } while (now == before[i]);
    CHECK(pthread_create(&ender, NULL, end_machine, s->m) == 0);
    for (unsigned i = 0; i < CPUS; i++)
        pthread_join(threads[i], NULL);
    pthread_join(ender, NULL);
}

EACH_BACKEND(everything_at_once)
{
    trouble troubles[] = { { .deed = kick, .rounds = 1500 },       { .deed = watch, .rounds = 400 },
                           { .deed = snapshot, .rounds = 30 },    { .deed = protect, .rounds = 800 },
                           { .deed = map, .rounds = 300 },         { .deed = write_code, .rounds = 800 },
                           { .deed = fetch_dirty, .rounds = 400 }, { .deed = stop_there, .rounds = 100 },
                           { .deed = hook, .rounds = 400 } };
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t accesses = 0;
    storm s = { 0 };
    o.backend = backend;
    o.vcpus = CPUS;
    ops.read = device_read;
    ops.write = device_write;
    OK(vm_create(&o, &s.m));
    OK(vm_map_ram(s.m, 0, 0x100000, VM_PROT_RWX, NULL));
    OK(vm_map_mmio(s.m, DEVICE, 0x1000, &ops, &accesses, NULL));
    OK(vm_write(s.m, CODE, busy, (size_t)(busy_end - busy)));
    OK(vm_write(s.m, CALLED, called, (size_t)(called_end - called)));
    for (unsigned i = 0; i < CPUS; i++) {
        vm_regs r = VM_REGS_INIT;
        OK(vm_vcpu_set_mode(vm_vcpu_get(s.m, i), VM_MODE_FLAT64));
        OK(vm_vcpu_get_regs(vm_vcpu_get(s.m, i), &r));
        r.rip = CODE;
        r.rsp = 0x20000 + 0x1000 * i;
        r.r8 = r.rdi = OWN + 0x100 * i;
        OK(vm_vcpu_set_regs(vm_vcpu_get(s.m, i), &r));
    }
    raise_storm(&s, CPUS, troubles, sizeof troubles / sizeof *troubles - (backend == VM_BACKEND_KVM));      /* KVM serves no hooks */
    compare_sums(s.m);
    CHECK(accesses > 0 && s.snapshots == 30);

    destroy_while_running(&s);
    CHECK_EQ(s.hooks_gone, s.hooks_made);
    printf("    %u exits, %u snapshots, %u hooks, %llu device accesses\n", s.exits, s.snapshots, s.hooks_made, (unsigned long long)accesses);
}

/* ---- a PC: interrupts from everywhere ---- */

/* Real mode. Both PICs are set up, the handler counts and reads the serial port; the guest halts between interrupts. */
PROGRAM(interrupted, 16,
        "cli; xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x7000, %sp; mov $0x100, %cx; xor %bx, %bx\n"
        "1: movw $handler - interrupted + 0x1000, (%bx); movw $0, 2(%bx); add $4, %bx; loop 1b\n"
        "mov $0x11, %al; out %al, $0x20; out %al, $0xa0; mov $0x20, %al; out %al, $0x21; mov $0x28, %al; out %al, $0xa1\n"
        "mov $4, %al; out %al, $0x21; mov $2, %al; out %al, $0xa1; mov $1, %al; out %al, $0x21; out %al, $0xa1\n"
        "xor %al, %al; out %al, $0x21; out %al, $0xa1\n"
        "mov $0x3f9, %dx; mov $1, %al; out %al, %dx; mov $0x3fc, %dx; mov $8, %al; out %al, %dx; sti\n"
        "2: hlt; lock incl 0x504; jmp 2b\n"
        "handler: push %ax; push %dx; lock incl 0x500; mov $0x3f8, %dx; in %dx, %al; mov $0x3fa, %dx; in %dx, %al\n"
        "mov $0x20, %al; out %al, $0xa0; out %al, $0x20; pop %dx; pop %ax; iret");

enum { INTERRUPTS = 1500, HANDLED = 0x500 };

/* The last one goes on until the guest, which may have had no processor so far, has taken some. */
static void interrupt(storm *s, unsigned round)
{
    uint32_t handled = 0;
    do {
        OK(vm_irq_set(s->m, 3 + round % 13, true));
        OK(vm_irq_set(s->m, 3 + round % 13, false));
        usleep(20);
        OK(vm_read(s->m, HANDLED, &handled, 4));
    } while (round == INTERRUPTS - 1 && handled < 10);
}

static void message(storm *s, unsigned round) { OK(vm_irq_msi(s->m, 0xfee00000 | (round & 3) << 12, 0x40 + round % 64)); }

static void send_serial(storm *s, unsigned round)
{
    uint8_t byte = (uint8_t)round;
    int sent = vm_serial_input(s->m, 0, &byte, 1);
    CHECK(sent >= 0);
}

static void collect(void *user, const uint8_t *bytes, size_t count) { (void)user, (void)bytes, (void)count; }

static void redirect_serial(storm *s, unsigned round) { OK(vm_serial_output(s->m, 0, round & 1 ? collect : NULL, NULL)); }

EACH_BACKEND(interrupts_from_everywhere)
{
    trouble troubles[] = { { .deed = interrupt, .rounds = INTERRUPTS }, { .deed = message, .rounds = 1500 }, { .deed = send_serial, .rounds = 500 },
                           { .deed = redirect_serial, .rounds = 300 }, { .deed = kick, .rounds = 500 }, { .deed = watch, .rounds = 200 },
                           { .deed = snapshot, .rounds = 30 } };
    vm_options o = VM_OPTIONS_INIT;
    uint32_t counts[2] = { 0 };
    uint64_t rip = 0x1000;
    storm s = { 0 };
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 16 << 20;
    OK(vm_create(&o, &s.m));
    OK(vm_write(s.m, 0x1000, interrupted, (size_t)(interrupted_end - interrupted)));
    OK(vm_vcpu_set_mode(vm_vcpu_get(s.m, 0), VM_MODE_REAL));
    OK(vm_vcpu_write_reg(vm_vcpu_get(s.m, 0), VM_REG_RIP, &rip, 8));
    raise_storm(&s, 1, troubles, sizeof troubles / sizeof *troubles);
    OK(vm_read(s.m, HANDLED, counts, sizeof counts));
    CHECK(counts[0] > 0 && counts[1] > 0 && counts[1] <= counts[0] + 1 && s.snapshots == 30);
    printf("    %u interrupts, %u snapshots\n", counts[0], s.snapshots);
    vm_destroy(s.m);
}

/* ---- tables that change while they are read ---- */

/* vCPU 1: exchanges the page-table entry of 0x30000 and descriptor 0x28, from tables of eight values each, and sees that what it takes
 * out is what it put in (but for the bits that the processor sets): a walker that writes an entry back late would undo a change. */
PROGRAM(changing, 32,
        "1: mov 0x9000, %esi\n"
        "2: inc %esi; and $7, %esi; mov 0x9100(, %esi, 4), %eax; mov %eax, %ebx; xchg %eax, 0x110c0; and $~0x60, %eax\n"
        "cmp 0x9008, %eax; jne 9f; mov %ebx, 0x9008\n"
        "mov 0x9200(, %esi, 8), %ebx; mov 0x9204(, %esi, 8), %ecx; mov 0x8028, %eax; mov 0x802c, %edx; 3: lock cmpxchg8b 0x8028; jnz 3b\n"
        "lock incl 0x900c; cmpl $0, 0x9010; je 2b; hlt; 9: ud2");
/* vCPU 0: reads the page and writes it, loads FS and reads through it; each value is one of those that can be. A fault skips the access:
 * its handler (0x7000, for all vectors) goes to EBP. It ends when it has seen some of each. */
PROGRAM(walking, 32,
        "lidt 0x9500; mov $20000, %edi\n"
        "1: invlpg 0x30000; mov $2f - walking + 0x1000, %ebp; mov 0x30000, %eax; cmp $0x11111111, %eax; je 2f; cmp $0x22222222, %eax; jne 9f\n"
        "2: mov $3f - walking + 0x1000, %ebp; movl $1, 0x30004\n"
        "3: mov $4f - walking + 0x1000, %ebp; mov $0x28, %ax; mov %ax, %fs; mov %fs:0, %eax; cmp $0x33333333, %eax; je 5f\n"
        "   cmp $0x44444444, %eax; jne 9f\n"
        "   mov $4f - walking + 0x1000, %ebp; mov %fs:0xffc, %eax; lock incl 0x9018; jmp 4f\n"
        "5: mov $8f - walking + 0x1000, %ebp; mov %fs:0x10, %eax; 9: movl $1, 0x9014; movl $1, 0x9010; ud2\n"     /* its limit is 15 */
        "8:\n"
        "4: lock incl 0x901c; dec %edi; jg 1b; cmpl $1000, 0x900c; jb 1b; cmpl $10, 0x9018; jb 1b; cmpl $10, 0x9020; jb 1b\n"
        "movl $1, 0x9010; hlt");
PROGRAM(skip_fault, 32, "mov $0x6000, %esp; lock incl 0x9020; pushl $2; popfl; jmp *%ebp");

static uint64_t descriptor(uint32_t base, uint32_t limit, uint8_t access)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)access << 40 | (uint64_t)(limit >> 16 & 15) << 48 |
           UINT64_C(0x40) << 48 | (uint64_t)(base >> 24) << 56;
}

static void *run_to_halt(void *arg)
{
    vm_exit *e = arg;
    vm_vcpu *cpu = (vm_vcpu *)e->rip;           /* handed over so: nothing else has to be shared */
    OK(vm_vcpu_run(cpu, NULL, e));
    return NULL;
}

static void set_up_tables(vm_machine *m)
{
    static const uint32_t entries[8] = { 0x20003, 0x21003, 0, 0x20001, 0x21003, 0x20002, 0x21001, 0x20003 };
    uint64_t gdt[6] = { 0, descriptor(0, 0xfffff, 0x9b) | UINT64_C(0x80) << 48, descriptor(0, 0xfffff, 0x93) | UINT64_C(0x80) << 48 };
    uint64_t low = descriptor(0x22000, 15, 0x93), high = descriptor(0x1023000, 0xfff, 0x93);
    uint64_t descriptors[8] = { low, high, 0, low, high, descriptor(0x22000, 15, 0x13), descriptor(0, 0, 0x89), high };
    uint32_t table[1024], directory[5] = { 0x11003, 0x12003, 0, 0, 0x13003 }, marks[4] = { 0x11111111, 0x22222222, 0x33333333, 0x44444444 };
    uint64_t gate = UINT64_C(0x8e00) << 32 | 8 << 16 | 0x7000, idt[32];
    struct __attribute__((packed)) { uint16_t limit; uint32_t base; } idtr = { sizeof idt - 1, 0x9600 };
    for (unsigned i = 0; i < 1024; i++)
        table[i] = i << 12 | 3;
    table[0x30] = entries[0];
    OK(vm_write(m, 0x10000, directory, sizeof directory));
    OK(vm_write(m, 0x11000, table, sizeof table));
    OK(vm_write(m, 0x13000, table, sizeof table));              /* 0x1000000 shows 0 */
    for (unsigned i = 0; i < 4; i++)
        OK(vm_write(m, 0x20000 + 0x1000 * i, &marks[i], 4));
    gdt[5] = descriptors[0];
    OK(vm_write(m, 0x8000, gdt, sizeof gdt));
    OK(vm_write(m, 0x9008, &entries[0], 4));
    OK(vm_write(m, 0x9100, entries, sizeof entries));
    OK(vm_write(m, 0x9200, descriptors, sizeof descriptors));
    for (unsigned i = 0; i < 32; i++)
        idt[i] = gate;
    OK(vm_write(m, 0x9500, &idtr, sizeof idtr));
    OK(vm_write(m, 0x9600, idt, sizeof idt));
    OK(vm_write(m, 0x7000, skip_fault, (size_t)(skip_fault_end - skip_fault)));
}

static void change_tables(vm_backend backend, const char *mmu)
{
    static const struct { const char *code, *end; } programs[2] = { { walking, walking_end }, { changing, changing_end } };
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_exit exits[2] = { VM_EXIT_INIT, VM_EXIT_INIT };
    pthread_t threads[2];
    uint32_t counts[6] = { 0 };
    o.backend = backend;
    o.vcpus = 2;
    o.mmu = mmu;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x100000, VM_PROT_RWX, NULL));
    set_up_tables(m);
    for (unsigned i = 0; i < 2; i++) {
        vm_vcpu *cpu = vm_vcpu_get(m, i);
        vm_sregs s = VM_SREGS_INIT;
        vm_regs r = VM_REGS_INIT;
        OK(vm_write(m, 0x1000 + 0x1000 * i, programs[i].code, (size_t)(programs[i].end - programs[i].code)));
        OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT32));
        OK(vm_vcpu_get_sregs(cpu, &s));
        s.cs.selector = 8;
        s.ss.selector = s.ds.selector = s.es.selector = 16;
        s.gdtr = (vm_dtable){ 0x8000, 47 };
        s.cr3 = 0x10000;
        s.cr0 |= UINT32_C(1) << 31 | UINT32_C(1) << 16;
        OK(vm_vcpu_set_sregs(cpu, &s));
        OK(vm_vcpu_get_regs(cpu, &r));
        r.rip = 0x1000 + 0x1000 * i;
        r.rsp = 0x6000 - 0x800 * i;
        OK(vm_vcpu_set_regs(cpu, &r));
        exits[i].rip = (uintptr_t)cpu;
        CHECK(pthread_create(&threads[i], NULL, run_to_halt, &exits[i]) == 0);
    }
    for (unsigned i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    OK(vm_read(m, 0x900c, counts, sizeof counts));
    printf("    %u changes, %u rounds, %u descriptors read through, %u faults\n", counts[0], counts[4], counts[3], counts[5]);
    for (unsigned i = 0; i < 2; i++)
        if (exits[i].reason != VM_EXIT_HALT)
            FAIL("vCPU %u: %s at 0x%llx", i, vm_exit_name(exits[i].reason), (unsigned long long)exits[i].rip);
    CHECK_EQ(counts[2], 0);
    CHECK(counts[4] >= 20000);
    vm_destroy(m);
}

EACH_BACKEND(tables_change_while_they_are_read) { change_tables(backend, NULL); }
EACH_BACKEND(tables_change_under_shadow)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    change_tables(backend, "shadow");
}
