/* strategies.c - a Linux kernel boots while its machine changes from one MMU strategy to another, on one vCPU and on two
 * (whose kernels shoot down each other's TLBs). Guests come from tests/guests/fetch; without them the tests are skipped.
 */
#include "../test.h"
#include <libvm/libvm.h>

#include <pthread.h>
#include <unistd.h>

static char console[1 << 20];
static size_t console_bytes;

static void collect(void *user, const uint8_t *bytes, size_t count)
{
    (void)user;
    for (size_t i = 0; i < count && console_bytes < sizeof console - 1; i++)
        console[console_bytes++] = (char)bytes[i];
}

static const char *guest_file(const char *name, char *path, size_t bytes)
{
    const char *directory = getenv("LIBVM_GUESTS"), *home = getenv("HOME");
    if (directory)
        snprintf(path, bytes, "%s/%s", directory, name);
    else
        snprintf(path, bytes, "%s/.cache/libvm/guests/%s", home ? home : "", name);
    if (access(path, R_OK))
        test_skip("no %s (tests/guests/fetch gets it)", path);
    return path;
}

static vm_machine *linux_machine(const char *kernel_name, const char *initrd_name, unsigned vcpus, const char *commands)
{
    char kernel[512], initrd[512], line[512];
    uint64_t has_jit = 0;
    vm_options o = VM_OPTIONS_INIT;
    vm_linux_boot b = VM_LINUX_BOOT_INIT;
    vm_machine *m;
    test_runs_a_kernel();
    b.kernel = guest_file(kernel_name, kernel, sizeof kernel);
    b.initrd = guest_file(initrd_name, initrd, sizeof initrd);
    snprintf(line, sizeof line, "console=ttyS0 run=\"%s\"", commands);
    b.cmdline = line;
    OK(vm_query(VM_BACKEND_JIT, "available", &has_jit));
    if (!has_jit)
        test_skip("the interpreter would take too long");
    o.backend = VM_BACKEND_JIT;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = UINT64_C(256) << 20;
    o.vcpus = vcpus;
    OK(vm_create(&o, &m));
    OK(vm_serial_output(m, 0, collect, NULL));
    OK(vm_boot_linux(m, &b));
    return m;
}

static void expect_console(const char *text)
{
    if (!strstr(console, text))
        FAIL("no \"%s\" on the console, which ends: %s", text, console + (console_bytes > 600 ? console_bytes - 600 : 0));
}

static const char *const tour[] = { "tlb", "shadow", "ept", "shadow", "flat" };
enum { TOUR = sizeof tour / sizeof *tour };

static void boot_alone(const char *kernel, const char *initrd)
{
    vm_machine *m = linux_machine(kernel, initrd, 1, "for i in 1 2 3 4; do md5sum /bin/busybox; done; ps");
    vm_exit e = VM_EXIT_INIT;
    unsigned moves = 0;
    uint64_t hits = 0;
    do {
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        OK(vm_mmu_select(m, tour[moves++ % TOUR]));
        o.max_instructions = 60000000;
        o.deadline_ns = UINT64_C(2000000000);
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e));
    } while ((e.reason == VM_EXIT_BUDGET || e.reason == VM_EXIT_DEADLINE) && moves < 2000);
    expect_console("init: reached");
    expect_console("commands ended with status 0");
    CHECK_EQ(e.reason, VM_EXIT_POWEROFF);
    CHECK(moves > 2 * TOUR);
    OK(vm_stats(m, "shadow-hits", &hits));
    CHECK(hits > 1000);
    vm_destroy(m);
}

TEST_LIMIT(strategies_change_while_linux_boots, 300) { boot_alone("vmlinuz-amd64", "initramfs-amd64"); }
TEST_LIMIT(strategies_change_while_linux_pae_boots, 300) { boot_alone("vmlinuz-686-pae", "initramfs-i386"); }
TEST_LIMIT(strategies_change_while_linux_686_boots, 300) { boot_alone("vmlinuz-686", "initramfs-i386"); }

typedef struct turn { vm_vcpu *cpu; vm_exit exit; int status; } turn;

static void *take_turn(void *arg)
{
    turn *t = arg;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = UINT64_C(250000000);
    t->exit = (vm_exit)VM_EXIT_INIT;
    t->status = vm_vcpu_run(t->cpu, &o, &t->exit);
    return NULL;
}

TEST_LIMIT(strategies_change_while_two_vcpus_boot, 300)
{
    vm_machine *m = linux_machine("vmlinuz-amd64", "initramfs-amd64", 2,
                                  "grep -c processor /proc/cpuinfo; for i in 1 2 3 4 5 6; do md5sum /bin/busybox & done; wait");
    static const char *const pair[] = { "shadow", "shadow", "shadow", "tlb", "ept" };
    bool is_over = false;
    for (unsigned moves = 0; !is_over && moves < 1000; moves++) {
        turn t[2];
        pthread_t thread[2];
        if (moves % 5 != 1 && moves % 5 != 2)            /* some time under "shadow" */
            OK(vm_mmu_select(m, pair[moves % 5]));
        for (unsigned i = 0; i < 2; i++) {
            t[i].cpu = vm_vcpu_get(m, i);
            pthread_create(&thread[i], NULL, take_turn, &t[i]);
        }
        for (unsigned i = 0; i < 2; i++) {
            pthread_join(thread[i], NULL);
            CHECK_EQ(t[i].status, VM_OK);
            is_over |= t[i].exit.reason != VM_EXIT_DEADLINE;
        }
        if (is_over)
            CHECK(t[0].exit.reason == VM_EXIT_POWEROFF || t[1].exit.reason == VM_EXIT_POWEROFF);
    }
    CHECK(is_over);
    expect_console("Brought up 1 node, 2 CPUs");
    expect_console("commands ended with status 0");
    vm_destroy(m);
}
