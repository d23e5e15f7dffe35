/* latency.c - no loop of a guest's delays a kick, or a deadline, by more than a millisecond, nor a kick of the interpreter or the
 * JIT by more than a tenth of one: string instructions over megabytes and over ports, slow instructions, loads that miss caches,
 * page walks that reload CR3 and set accessed and dirty bits, task switches, exceptions, timers set to their shortest.
 *
 * The delay is the processor time that the vCPU's thread takes from the kick to its return, or beyond its deadline, so that other
 * programs do not count. Hosts take time away in ways that do count, so that the middle one of several is judged, and the longest
 * printed.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

/* Guest code is at 0x1000, 32-bit and flat; RAM is from 0 to 16 MiB. A loop's name begins its code, the next loop's ends it. */
__asm__(".pushsection .rodata\n"
        ".code32\n"
        /* A GDT at 0x4400, flat code and data (8, 16) and two TSSs at 0x4000 and 0x4100 (24, 32), for the loop `of`. */
        ".macro flat of\n"
        "   lgdt 8f - \\of + 0x1000; movl $0x0000ffff, 0x4408; movl $0x00cf9b00, 0x440c; movl $0x0000ffff, 0x4410\n"
        "   movl $0x00cf9300, 0x4414; movl $0x40000067, 0x4418; movl $0x00008900, 0x441c; movl $0x41000067, 0x4420\n"
        "   movl $0x00008900, 0x4424; ljmp $8, $(7f - \\of + 0x1000); 8: .word 0x27; .long 0x4400\n"
        "   7: mov $0x10, %ax; mov %ax, %ss; mov %ax, %ds; mov %ax, %es\n"
        ".endm\n"
        "loop_nothing: jmp .\n"
        "loop_rep_stos: 1: mov $0x10000, %edi; mov $0xe00000, %ecx; rep stosb; jmp 1b\n"
        "loop_rep_movs: 1: mov $0x10000, %esi; mov $0x800000, %edi; mov $0x700000, %ecx; rep movsb; jmp 1b\n"
        "loop_rep_movs_overlap: 1: mov $0x10000, %esi; mov $0x10001, %edi; mov $0xe00000, %ecx; rep movsb; jmp 1b\n"
        "loop_rep_movs_down: std; 1: mov $0xf00000, %esi; mov $0xf00003, %edi; mov $0x300000, %ecx; rep movsl; jmp 1b\n"
        "loop_rep_cmps: 1: mov $0x10000, %esi; mov $0x10000, %edi; mov $0xe00000, %ecx; repe cmpsb; jmp 1b\n"
        "loop_rep_scas: mov $1, %al; 1: mov $0x10000, %edi; mov $0xe00000, %ecx; repne scasb; jmp 1b\n"
        "loop_rep_lods: 1: mov $0x10000, %esi; mov $0xe00000, %ecx; rep lodsb; jmp 1b\n"
        "loop_rep_outs: mov $0x500, %dx; 1: mov $0x10000, %esi; mov $0xe00000, %ecx; rep outsb; jmp 1b\n"
        "loop_rep_ins: mov $0x500, %dx; 1: mov $0x10000, %edi; mov $0xe00000, %ecx; rep insb; jmp 1b\n"
        "loop_rep_movs_mmio: 1: mov $0x2000000, %esi; mov $0x2001000, %edi; mov $0x400, %ecx; rep movsl; jmp 1b\n"
        "loop_fxsave: 1: fxsave 0x8000; fxrstor 0x8000; jmp 1b\n"
        "loop_xsave: mov %cr4, %eax; or $0x40200, %eax; mov %eax, %cr4; xor %ecx, %ecx; xor %edx, %edx; mov $3, %eax; xsetbv\n"
        "   1: xsave 0x8000; xrstor 0x8000; jmp 1b\n"
        "loop_x87: fninit; fldpi; 1: fsin; fcos; fptan; fstp %st; f2xm1; fbstp 0x8000; fbld 0x8000; jmp 1b\n"
        "loop_fbstp: fninit; 1: fldpi; fbstp 0x8000; fldpi; fbstp 0x8000; fldpi; fbstp 0x8000; fldpi; fbstp 0x8000; jmp 1b\n"
        "loop_fptan: fninit; fldl2t; 1: fptan; fstp %st; fptan; fstp %st; fpatan; fldl2t; fprem1; fldl2t; jmp 1b\n"
        /* Numbers that processors have microcode for. */
        "loop_denormals: mov %cr4, %eax; or $0x600, %eax; mov %eax, %cr4; mov $1, %eax; movd %eax, %xmm0; pshufd $0, %xmm0, %xmm0\n"
        "   movaps %xmm0, %xmm1; fninit; 1: movaps %xmm0, %xmm2; sqrtps %xmm2, %xmm2; mulps %xmm0, %xmm2; movaps %xmm0, %xmm3\n"
        "   divps %xmm1, %xmm3; sqrtpd %xmm0, %xmm4; divpd %xmm1, %xmm4; jmp 1b\n"
        "loop_divisions: mov $0x7fffffff, %ecx; 1: mov $0x7ffffffe, %edx; div %ecx; jmp 1b\n"
        "loop_misses: 1: imul $0x41c64e6d, %eax; inc %eax; mov %eax, %ebx; shr $9, %ebx; add (%ebx), %eax; jmp 1b\n"
        "loop_flushes: 1: clflush 0x8000; mfence; lock incl 0x8000; jmp 1b\n"
        "loop_pauses: 1: pause; pause; pause; pause; jmp 1b\n"
        /* Slow code that comes after some that is fast. */
        "loop_changes: fninit; 1: mov $100000, %ecx; 2: loop 2b; mov $1000, %ecx; 3: fldpi; fsin; fbstp 0x8000; loop 3b; jmp 1b\n"
        "loop_enter: 1: mov $0x9000, %esp; mov $0xa000, %ebp; enter $16, $31; jmp 1b\n"
        "loop_own_code: 1: incb 2f - loop_own_code + 0x1001; 2: mov $1, %al; jmp 1b\n"
        "loop_device: 1: mov 0x2000000, %eax; jmp 1b\n"
        "loop_system: 1: cpuid; wbinvd; invlpg 0x5000; mov %cr3, %eax; mov %eax, %cr3; mov %dr7, %ebx; mov %ebx, %dr7; jmp 1b\n"
        "loop_exceptions: flat loop_exceptions; movl $(0x80000 + 3f - loop_exceptions + 0x1000), 0x3030; movl $0x8e00, 0x3034\n"
        "   lidt 2f - loop_exceptions + 0x1000; mov $0x9000, %esp; 1: ud2; jmp 1b; 3: addl $2, (%esp); iret\n"
        "   2: .word 0x7ff; .long 0x3000\n"
        /* 4 KiB pages of 4 MiB, seen in all 4 GiB: each round reads, and writes, one of 1024 pages, after a reload of CR3. */
        "loop_walks: mov $0x200000, %edi; mov $0x201003, %eax; mov $1024, %ecx; rep stosl\n"
        "   mov $0x003, %eax; mov $1024, %ecx; 1: stosl; add $0x1000, %eax; loop 1b\n"
        "   mov $0x200000, %eax; mov %eax, %cr3; mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0\n"
        "   2: mov $0x100, %ecx; mov $0x210000, %edi; 3: incl (%edi); add $0x401000, %edi; loop 3b\n"
        "   mov $0x201000, %edi; mov $1024, %ecx; 4: andl $~0x60, (%edi); add $4, %edi; loop 4b\n"
        "   mov %cr3, %eax; mov %eax, %cr3; jmp 2b\n"
        /* Two tasks that jump to one another; the descriptors of their TSSs, at 0x4000 and 0x4100, are made first. */
        "loop_tasks: flat loop_tasks; movl $(9f - loop_tasks + 0x1000), 0x4120; movl $2, 0x4124; movl $0x7000, 0x4138\n"
        "   movl $8, 0x414c; movl $0x10, 0x4150; movl $0x10, 0x4148; movl $0x10, 0x4154\n"
        "   mov $0x18, %ax; ltr %ax; 1: ljmp $0x20, $0; jmp 1b; 9: ljmp $0x18, $0; jmp 9b\n"
        /* The PC's: FIFOs and data ports by string instructions, timers at their shortest. */
        "loop_uart: mov $0x3f8, %dx; 1: mov $0x10000, %esi; mov $0xe00000, %ecx; rep outsb; jmp 1b\n"
        "loop_cmos: mov $0x71, %dx; 1: mov $0x10000, %edi; mov $0xe00000, %ecx; rep insb; jmp 1b\n"
        "loop_fwcfg: mov $0x510, %dx; mov $0x19, %eax; out %ax, %dx; inc %dx\n"
        "   1: mov $0x10000, %edi; mov $0xe00000, %ecx; rep insb; jmp 1b\n"
        "loop_pit: mov $0x40, %dx; 1: mov $0x10000, %esi; mov $0xe00000, %ecx; rep outsb; jmp 1b\n"
        "loop_timers: mov $0x34, %al; out %al, $0x43; mov $2, %al; out %al, $0x40; xor %eax, %eax; out %al, $0x40\n"
        "   movl $0x4c, 0xfed00100; movl $1, 0xfed00108; movl $1, 0xfed00108; movl $0, 0xfed0010c; movl $3, 0xfed00010; jmp .\n"
        "loop_end: .code64\n"
        ".popsection");

#define BARE_LOOPS(_) _(nothing) _(rep_stos) _(rep_movs) _(rep_movs_overlap) _(rep_movs_down) _(rep_cmps) _(rep_scas) _(rep_lods) \
    _(rep_outs) _(rep_ins) _(rep_movs_mmio) _(fxsave) _(xsave) _(x87) _(fbstp) _(fptan) \
    _(denormals) _(divisions) _(misses) _(flushes) _(pauses) _(changes) _(enter) _(own_code) _(device) _(system) _(exceptions) _(walks) _(tasks)
#define PC_LOOPS(_) _(uart) _(cmos) _(fwcfg) _(pit) _(timers)
#define DECLARE(name) extern const uint8_t loop_##name[];
BARE_LOOPS(DECLARE) PC_LOOPS(DECLARE)
extern const uint8_t loop_end[];

static const struct guest_loop { const char *name; const uint8_t *code; bool is_pc; } loops[] = {
#define BARE(name) { #name, loop_##name, false },
#define PC(name) { #name, loop_##name, true },
    BARE_LOOPS(BARE) PC_LOOPS(PC) { "end", loop_end, false },
};
enum { LOOPS = sizeof loops / sizeof *loops - 1, KICKS = 9, MOST_US = 1000, MOST_US_OF_KICK = 100 };

static int on_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user, (void)cpu, (void)width;
    *value = offset;
    return 0;
}

static int on_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)cpu, (void)offset, (void)width, (void)value;
    return 0;
}

static vm_machine *make(vm_backend backend, const struct guest_loop *l)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_machine *m;
    uint64_t rip = 0x1000;
    o.backend = backend;
    o.platform = l->is_pc ? VM_PLATFORM_PC : VM_PLATFORM_BARE;
    o.ram_bytes = l->is_pc ? 16 << 20 : 0;
    ops.read = on_read;
    ops.write = on_write;
    OK(vm_create(&o, &m));
    if (!l->is_pc) {
        OK(vm_map_ram(m, 0, 16 << 20, VM_PROT_RWX, NULL));
        OK(vm_map_pio(m, 0x500, 1, &ops, NULL, NULL));
        OK(vm_map_mmio(m, 0x2000000, 0x2000, &ops, NULL, NULL));
    }
    OK(vm_write(m, 0x1000, l->code, (size_t)(l[1].code - l->code)));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT32));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    return m;
}

static uint64_t ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

typedef struct kick { vm_vcpu *cpu; clockid_t clock; _Atomic uint64_t at; } kick;

/* When the vCPU has run for some milliseconds of its own time. */
static void *kick_later(void *arg)
{
    kick *k = arg;
    for (uint64_t begin = ns(k->clock); ns(k->clock) - begin < 3000000;)
        usleep(500);
    k->at = ns(k->clock);
    vm_vcpu_kick(k->cpu);
    return NULL;
}

static uint64_t delay(vm_vcpu *cpu)
{
    kick k = { .cpu = cpu };
    vm_exit e = VM_EXIT_INIT;
    pthread_t thread;
    CHECK_EQ(pthread_getcpuclockid(pthread_self(), &k.clock), 0);
    CHECK_EQ(pthread_create(&thread, NULL, kick_later, &k), 0);
    OK(vm_vcpu_run(cpu, NULL, &e));
    uint64_t end = ns(k.clock);
    if (e.reason == VM_EXIT_SHUTDOWN && vm_machine_backend(vm_vcpu_machine(cpu)) == VM_BACKEND_KVM)
        test_skip("this host's KVM, which emulates ring 0, does not know one of these instructions");
    if (e.reason != VM_EXIT_KICK)
        FAIL("exit %s at 0x%llx", vm_exit_name(e.reason), (unsigned long long)e.rip);
    pthread_join(thread, NULL);
    return end > k.at ? end - k.at : 0;
}

/* Of a deadline: what the run took beyond the time it was given. */
static uint64_t lateness(vm_vcpu *cpu)
{
    enum { GIVEN_NS = 2000000 };
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.deadline_ns = GIVEN_NS;
    uint64_t begin = ns(CLOCK_THREAD_CPUTIME_ID);
    OK(vm_vcpu_run(cpu, &o, &e));
    uint64_t taken = ns(CLOCK_THREAD_CPUTIME_ID) - begin;
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    return taken > GIVEN_NS ? taken - GIVEN_NS : 0;
}

static int by_value(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void judge(vm_vcpu *cpu, const char *what, uint64_t (*measure)(vm_vcpu *cpu), unsigned most_us)
{
    uint64_t delays[KICKS];
    for (int i = 0; i < KICKS; i++)
        delays[i] = measure(cpu);
    qsort(delays, KICKS, sizeof *delays, by_value);
    printf("    %s: %llu us, at most %llu\n", what, (unsigned long long)delays[KICKS / 2] / 1000,
           (unsigned long long)delays[KICKS - 1] / 1000);
    if (delays[KICKS / 2] >= (uint64_t)most_us * 1000 * test_patience())
        FAIL("a %s waits for %llu us", what, (unsigned long long)delays[KICKS / 2] / 1000);
}

static void one_loop(const void *arg)
{
    const struct { vm_backend backend; const struct guest_loop *loop; } *row = arg;
    vm_machine *m = make(row->backend, row->loop);
    judge(vm_vcpu_get(m, 0), "kick", delay, row->backend == VM_BACKEND_KVM ? MOST_US : MOST_US_OF_KICK);
    judge(vm_vcpu_get(m, 0), "deadline", lateness, MOST_US);
    vm_destroy(m);
}

SETUP(loops)
{
    static const vm_backend backends[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    enum { BACKENDS = sizeof backends / sizeof *backends };
    static struct { vm_backend backend; const struct guest_loop *loop; } rows[BACKENDS * LOOPS];
    for (unsigned i = 0; i < BACKENDS * LOOPS; i++) {
        char name[64];
        uint64_t available = 0;
        rows[i].backend = backends[i / LOOPS];
        rows[i].loop = &loops[i % LOOPS];
        snprintf(name, sizeof name, "%s/%s", rows[i].loop->name, vm_backend_name(rows[i].backend));
        if (vm_query(rows[i].backend, "available", &available) == VM_OK && available)
            test_add(name, one_loop, &rows[i], 0);
    }
}
