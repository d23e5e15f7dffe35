/* pc.c - the run loop on a PC: sleeping in HLT and what ends it, vCPUs that wait for each other, events, reset. */
#include "../backends.h"

#include <pthread.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define PROGRAM(name, text)                                                                          \
    __asm__(".pushsection .rodata\n.code16\n" #name ":\n" text "\n" #name "_end:\n.code64\n.popsection"); \
    extern const char name[], name##_end[]

PROGRAM(ticking,
        "mov $0x34, %al\n out %al, $0x43\n mov $0xa9, %al\n out %al, $0x40\n mov $4, %al\n out %al, $0x40\n1: jmp 1b");
PROGRAM(sleep_for_ever, "sti\n1: hlt\n jmp 1b");
PROGRAM(say_and_sleep, "incw 0x7000\n sti\n1: hlt\n jmp 1b");
PROGRAM(dead_end, "cli\n1: hlt\n jmp 1b");
PROGRAM(exit_with_42, "mov $42, %al\n out %al, $0xf4\n1: jmp 1b");
PROGRAM(triple_fault, "lidt 0x7f00\n ud2");
/* PIC with base 8, only IRQ 4 open; counts interrupts in [0x7000]; ends with IF = 0 after five. */
PROGRAM(count_irq4,
        "xor %ax, %ax\n mov %ax, %ds\n mov %ax, %ss\n mov $0x6000, %sp\n movw $0x7e00, 0x30\n mov %ax, 0x32\n"
        "mov $0x11, %al\n out %al, $0x20\n mov $8, %al\n out %al, $0x21\n mov $4, %al\n out %al, $0x21\n"
        "mov $1, %al\n out %al, $0x21\n mov $0xef, %al\n out %al, $0x21\n"
        "movw $1, 0x7002\n sti\n1: hlt\n cmpw $5, 0x7000\n jne 1b\n cli\n hlt");
PROGRAM(handler, "push %ax\n incw 0x7000\n mov $0x20, %al\n out %al, $0x20\n pop %ax\n iret");

/* An OUT that raises an interrupt: its handler runs before the instruction after the next has read the count. */
PROGRAM(poke_irq4,
        "xor %ax, %ax\n mov %ax, %ds\n mov %ax, %ss\n mov $0x6000, %sp\n movw $0x7e00, 0x30\n mov %ax, 0x32\n"
        "mov $0x11, %al\n out %al, $0x20\n mov $8, %al\n out %al, $0x21\n mov $4, %al\n out %al, $0x21\n"
        "mov $1, %al\n out %al, $0x21\n mov $0xef, %al\n out %al, $0x21\n"
        "sti\n nop\n out %al, $0xc0\n nop\n mov 0x7000, %bx\n cli\n hlt");

/* Times 10 ms of timer channel 2 as kernels do, the clock read before each look at OUT. */
PROGRAM(measure,
        "mov $1, %al\n out %al, $0x61\n mov $0xb0, %al\n out %al, $0x43\n mov $0x9c, %al\n out %al, $0x42\n"
        "mov $0x2e, %al\n out %al, $0x42\n"
        "1: rdtsc\n mov %eax, %ebx\n in $0x61, %al\n test $0x20, %al\n jz 1b\n cli\n hlt");
enum { MEASURE_SETUP = 8, MEASURE_LOOP = 5, MEASURE_TO_LOOK = 2 };

static vm_machine *pc(vm_backend backend, unsigned vcpus, const char *program, const char *end)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    uint64_t rip = 0x7c00;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 16 << 20;
    o.vcpus = vcpus;
    OK(vm_create(&o, &m));
    OK(vm_write(m, 0x7c00, program, (size_t)(end - program)));
    OK(vm_write(m, 0x7e00, handler, (size_t)(handler_end - handler)));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    return m;
}
#define PC(vcpus, program) pc(backend, vcpus, program, program##_end)

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t cpu_time(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static vm_exit run_for(vm_machine *m, unsigned index, uint64_t ns)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.deadline_ns = ns;
    OK(vm_vcpu_run(vm_vcpu_get(m, index), &o, &e));
    return e;
}

EACH_BACKEND(halt_sleeps_until_the_deadline)
{
    vm_machine *m = PC(1, sleep_for_ever);
    uint64_t start = now(), used = cpu_time();
    CHECK_EQ(run_for(m, 0, 200000000).reason, VM_EXIT_DEADLINE);
    CHECK(now() - start >= 190000000);
    CHECK(cpu_time() - used < 100000000);                /* asleep, not spinning */
    vm_destroy(m);
}

/* A timer that ticks a thousand times a second, and a machine that nobody runs: its thread sleeps. */
EACH_BACKEND(ticks_cost_nothing_while_nothing_runs)
{
    vm_machine *m = PC(1, ticking);
    struct rusage before, after;
    CHECK_EQ(run_for(m, 0, 20000000).reason, VM_EXIT_DEADLINE);
    usleep(20000);
    getrusage(RUSAGE_SELF, &before);
    usleep(300000);
    getrusage(RUSAGE_SELF, &after);
    CHECK(after.ru_nvcsw - before.ru_nvcsw < 30);
    CHECK_EQ(run_for(m, 0, 20000000).reason, VM_EXIT_DEADLINE);
    vm_destroy(m);
}

static void *kick_later(void *cpu)
{
    usleep(20000);
    vm_vcpu_kick(cpu);
    return NULL;
}

EACH_BACKEND(kick_ends_sleep)
{
    vm_machine *m = PC(1, sleep_for_ever);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, kick_later, vm_vcpu_get(m, 0)) == 0);
    CHECK_EQ(run_for(m, 0, 20000000000).reason, VM_EXIT_KICK);
    pthread_join(thread, NULL);
    vm_destroy(m);
}

EACH_BACKEND(halt_for_good_is_an_exit)
{
    vm_machine *m = PC(1, dead_end);
    vm_exit e = run_for(m, 0, 20000000000);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 0x7c02);
    CHECK_EQ(run_for(m, 0, 20000000000).reason, VM_EXIT_HALT);       /* still */
    vm_destroy(m);
}

static void *run_one(void *arg)
{
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(arg, NULL, &e));
    return (void *)(uintptr_t)e.reason;
}

static void both_end_with(vm_machine *m, int reason)
{
    pthread_t thread;
    void *other;
    CHECK(pthread_create(&thread, NULL, run_one, vm_vcpu_get(m, 1)) == 0);
    usleep(10000);
    CHECK_EQ(run_for(m, 0, 20000000000).reason, reason);
    pthread_join(thread, &other);
    CHECK_EQ((uintptr_t)other, reason);
    vm_destroy(m);
}

EACH_BACKEND(halt_for_good_reaches_parked_vcpus) { both_end_with(PC(2, dead_end), VM_EXIT_HALT); }
EACH_BACKEND(exit_device_reaches_every_vcpu) { both_end_with(PC(2, exit_with_42), VM_EXIT_GUEST_EXIT); }

EACH_BACKEND(parked_vcpu_honours_its_deadline)
{
    vm_machine *m = PC(2, sleep_for_ever);
    CHECK_EQ(run_for(m, 1, 10000000).reason, VM_EXIT_DEADLINE);
    vm_vcpu_kick(vm_vcpu_get(m, 1));
    CHECK_EQ(run_for(m, 1, 10000000000).reason, VM_EXIT_KICK);
    vm_destroy(m);
}

EACH_BACKEND(exit_device_carries_its_code)
{
    vm_machine *m = PC(1, exit_with_42);
    vm_exit e = run_for(m, 0, 20000000000);
    CHECK_EQ(e.reason, VM_EXIT_GUEST_EXIT);
    CHECK_EQ(e.guest_exit.code, 42);
    CHECK_EQ(run_for(m, 0, 10000000).reason, VM_EXIT_DEADLINE);      /* once */
    vm_destroy(m);
}

EACH_BACKEND(triple_fault_is_an_exit_until_reset)
{
    static const uint8_t no_idt[6] = { 0 };
    vm_machine *m = PC(1, triple_fault);
    uint64_t rip = 0;
    OK(vm_write(m, 0x7f00, no_idt, sizeof no_idt));
    vm_exit e = run_for(m, 0, 2000000000);
    if (backend == VM_BACKEND_KVM && e.reason == VM_EXIT_DEADLINE)
        test_skip("this host's KVM does not notice a triple fault in real mode");
    CHECK_EQ(e.reason, VM_EXIT_SHUTDOWN);
    CHECK_EQ(run_for(m, 0, 20000000000).reason, VM_EXIT_SHUTDOWN);
    OK(vm_reset(m));
    OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    CHECK_EQ(rip, 0xfff0);
    OK(vm_write(m, 0x7c00, dead_end, (size_t)(dead_end_end - dead_end)));    /* RAM has stayed */
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL));
    rip = 0x7c00;
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    CHECK_EQ(run_for(m, 0, 20000000000).reason, VM_EXIT_HALT);
    vm_destroy(m);
}

static uint16_t peek16(vm_machine *m, uint64_t gpa)
{
    uint16_t v = 0;
    OK(vm_read(m, gpa, &v, 2));
    return v;
}

EACH_BACKEND(interrupt_lines_wake_a_halted_vcpu)
{
    vm_machine *m = PC(1, count_irq4);
    pthread_t thread;
    void *reason;
    CHECK(pthread_create(&thread, NULL, run_one, vm_vcpu_get(m, 0)) == 0);
    while (peek16(m, 0x7002) != 1)
        usleep(100);
    for (unsigned i = 0; i < 5; i++) {
        usleep(i * 1000);              /* asleep by now, or on its way */
        OK(vm_irq_set(m, 4, true));
        OK(vm_irq_set(m, 4, false));
        uint64_t start = now();
        while (peek16(m, 0x7000) != i + 1) {
            CHECK(now() - start < 10000000000);
            usleep(50);
        }
    }
    pthread_join(thread, &reason);
    CHECK_EQ((uintptr_t)reason, VM_EXIT_HALT);
    vm_destroy(m);
}

EACH_BACKEND(reset_while_running_is_refused)
{
    vm_machine *m = PC(1, say_and_sleep);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_one, vm_vcpu_get(m, 0)) == 0);
    for (unsigned i = 0; i < 20000 && !peek16(m, 0x7000); i++)
        usleep(1000);
    REFUSED(vm_reset(m), VM_E_BUSY);
    vm_vcpu_kick(vm_vcpu_get(m, 0));
    pthread_join(thread, NULL);
    OK(vm_reset(m));
    vm_destroy(m);
}

static int raise_irq4(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    OK(vm_irq_set(user, 4, true));
    OK(vm_irq_set(user, 4, false));
    return VM_OK;
}

EACH_BACKEND(interrupt_raised_by_an_instruction_comes_next)
{
    vm_machine *m = PC(1, poke_irq4);
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t rbx = 0;
    ops.write = raise_irq4;
    OK(vm_map_pio(m, 0xc0, 1, &ops, m, NULL));
    CHECK_EQ(run_for(m, 0, 20000000000).reason, VM_EXIT_HALT);
    OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), VM_REG_RBX, &rbx, 8));
    CHECK_EQ(rbx & 0xffff, 1);
    vm_destroy(m);
}

/* Set-up code of a boot manager that looks like an old Linux kernel (boot protocol 2.03): INT 15h, AH = 87h copies 16 bytes
 * from 1 MiB, where the rest of the file is, to 24 MiB and from there below 1 MiB; their first is what it ends with. */
PROGRAM(old_setup,
        "sti\n cld\n call 1f\n1: pop %si\n push %cs\n pop %es\n add $2f - 1b, %si\n"
        "movb $0x10, %es:0x14(%si)\n movb $0x93, %es:0x15(%si)\n movb $0x1, %es:0x1f(%si)\n movb $0x80, %es:0x1c(%si)\n"
        "call 3f\n"
        "movb $0x80, %es:0x14(%si)\n movb $0x01, %es:0x17(%si)\n movb $0, %es:0x1f(%si)\n movb $0x02, %es:0x1c(%si)\n"
        "call 3f\n"
        "mov $0x2000, %ax\n mov %ax, %ds\n mov 0, %al\n out %al, $0xf4\n5: jmp 5b\n"
        "3: mov $0x8700, %ax\n mov $8, %cx\n mov $0xabcd1234, %ebp\n stc\n int $0x15\n jc 4f\n test %ah, %ah\n jnz 4f\n"
        "cmp $8, %cx\n jne 4f\n cmp $0xabcd1234, %ebp\n jne 4f\n push %cs\n pop %ax\n mov %es, %dx\n cmp %dx, %ax\n jne 4f\n"
        "pushf\n pop %ax\n test $2, %ah\n jz 4f\n ret\n"
        "4: mov $1, %al\n out %al, $0xf4\n6: jmp 6b\n"
        "2: .fill 16, 1, 0\n .word 0xffff, 0, 0x9300, 0\n .word 0xffff, 0, 0x9300, 0\n .fill 16, 1, 0");

/* A file with a bzImage of protocol 2.03 whose set-up code is `setup`, and one byte of kernel, 42. */
static void write_kernel(char *name, const char *setup, const char *end)
{
    uint8_t image[5 * 512 + 32] = { [0x1f1] = 4, [0x1fe] = 0x55, 0xaa, 0xeb, 0x66, 'H', 'd', 'r', 'S', 0x03, 0x02, [0x211] = 1,
                                    [0x216] = 0x10, [5 * 512] = 42 };
    int fd = mkstemp(name);
    image[0x22f] = 0x7f;                                                    /* initrd_addr_max */
    memcpy(image + 0x268, setup, (size_t)(end - setup));
    CHECK(write(fd, image, sizeof image) == sizeof image);
    close(fd);
}

/* Boots `b` in 32 MiB; the guest is to end with 42. */
static void boot_to_42(vm_backend backend, const vm_boot_options *b)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 32 << 20;
    OK(vm_create(&o, &m));
    OK(vm_boot_image(m, b));
    vm_exit e = run_for(m, 0, 20000000000);
    CHECK_EQ(e.reason, VM_EXIT_GUEST_EXIT);
    CHECK_EQ(e.guest_exit.code, 42);
    vm_destroy(m);
}

EACH_BACKEND(old_boot_protocols_start_in_real_mode)
{
    char name[] = "/tmp/libvm-setup-XXXXXX";
    vm_boot_options b = VM_BOOT_OPTIONS_INIT;
    write_kernel(name, old_setup, old_setup_end);
    b.kernel = name;
    boot_to_42(backend, &b);
    unlink(name);
}

/* What a BIOS does with the option ROM that comes with a kernel, as its last page: finds it in the directory of fw_cfg, takes
 * it to 0xD0000, checks its sum, calls its initialisation and then its boot entry. Complains with 1. */
PROGRAM(little_bios,
        "xor %ax, %ax\n mov %ax, %ss\n mov $0x7000, %sp\n mov $0xd000, %ax\n mov %ax, %ds\n mov %ax, %es\n cld\n"
        "mov $0x510, %dx\n mov $0x19, %ax\n out %ax, %dx\n inc %dx\n mov $4, %cx\n xor %di, %di\n rep insb\n"
        "mov 3, %bl\n"                                                         /* fewer than 256 files */
        "1: mov $64, %cx\n xor %di, %di\n rep insb\n cmpl $0x726e6567, 8\n jne 2f\n cmpl $0x6d6f722e, 21\n je 3f\n"
        "2: dec %bl\n jnz 1b\n jmp 9f\n"
        "3: mov 4, %ax\n xchg %al, %ah\n dec %dx\n out %ax, %dx\n inc %dx\n mov $512, %cx\n xor %di, %di\n rep insb\n"
        "xor %si, %si\n mov $512, %cx\n xor %ah, %ah\n4: lodsb\n add %al, %ah\n loop 4b\n test %ah, %ah\n jnz 9f\n"
        "cmpw $0xaa55, 0\n jne 9f\n cmpb $1, 2\n jne 9f\n"
        "mov 0x1a, %si\n cmpl $0x506e5024, (%si)\n jne 9f\n mov %si, %di\n mov $32, %cx\n xor %ah, %ah\n"
        "5: add (%di), %ah\n inc %di\n loop 5b\n test %ah, %ah\n jnz 9f\n"
        "mov 0x1a(%si), %bx\n mov %bx, %es:0x400\n movw $0xd000, %es:0x402\n lcall $0xd000, $3\n lcall *%es:0x400\n"
        "9: mov $1, %al\n out %al, $0xf4\n jmp 9b\n"
        ".org little_bios + 0xff0\n jmp little_bios\n .org little_bios + 0x1000");

/* The set-up code at the end of that: header, command line, kernel and initrd are where they belong. */
PROGRAM(careful_setup,
        "mov %cs, %ax\n sub $0x20, %ax\n mov %ds, %bx\n cmp %ax, %bx\n jne 9f\n mov %ss, %bx\n cmp %ax, %bx\n jne 9f\n"
        "cmpb $0xff, 0x210\n jne 9f\n cmpb $0x81, 0x211\n jne 9f\n cmpw $0xde00, 0x224\n jne 9f\n cmpw $0xffff, 0x1fa\n jne 9f\n"
        "mov 0x228, %eax\n shr $4, %eax\n mov %ax, %es\n cmpl $0x20656e6f, %es:0\n jne 9f\n cmpl $0x006f7774, %es:4\n jne 9f\n"
        "cmpl $6, 0x21c\n jb 9f\n mov 0x218, %edi\n test $0xfff, %di\n jnz 9f\n"
        /* flat DS for a look at the initrd and the kernel */
        "mov %cs, %eax\n movzwl %ax, %eax\n shl $4, %eax\n call 1f\n1: pop %si\n add $(7f - 1b), %si\n movzwl %si, %esi\n"
        "lea 8(%esi,%eax), %ebx\n mov %ebx, %cs:2(%si)\n cli\n data32 lgdt %cs:(%si)\n mov %cr0, %ebx\n or $1, %bl\n"
        "mov %ebx, %cr0\n mov $8, %cx\n mov %cx, %ds\n and $~1, %bl\n mov %ebx, %cr0\n"
        "addr32 cmpl $0x37303730, (%edi)\n jne 9f\n mov $0x100000, %edi\n addr32 mov (%edi), %al\n8: out %al, $0xf4\n jmp 8b\n"
        "9: mov $1, %al\n jmp 8b\n"
        "7: .word 15, 0, 0, 0\n .quad 0, 0x00cf93000000ffff");

EACH_BACKEND(a_bios_starts_the_kernel_by_its_option_rom)
{
    char kernel[] = "/tmp/libvm-setup-XXXXXX", bios[] = "/tmp/libvm-bios-XXXXXX", initrd[] = "/tmp/libvm-initrd-XXXXXX";
    char both[sizeof initrd * 2];
    vm_boot_options b = VM_BOOT_OPTIONS_INIT;
    int fd = mkstemp(bios), archive = mkstemp(initrd);
    CHECK(write(fd, little_bios, 4096) == 4096 && write(archive, "0707", 4) == 4);
    close(fd);
    close(archive);
    write_kernel(kernel, careful_setup, careful_setup_end);
    snprintf(both, sizeof both, "%s,%s", initrd, initrd);
    b.kernel = kernel;
    b.bios = bios;
    b.initrd = both;
    b.cmdline = "one two";
    boot_to_42(backend, &b);
    unlink(kernel);
    unlink(bios);
    unlink(initrd);
}
