/* boot.c - a Linux kernel and KVM: the machine is moved between backends while it boots, and (make check-kvm-boot)
 * boots on KVM alone. Guests come from tests/guests/fetch; without them the tests are skipped.
 *
 * Where guest ring 0 is emulated KVM runs a kernel a hundred times slower than the interpreter, and not at all once it
 * has a ring 3 to serve (lib/kvm/kvm_limits.c): there the interpreter takes over, within the same backend. */
#include <libvm/libvm.h>
#include "../test.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

static char console[1 << 20];
static size_t console_bytes;

static void collect(void *user, const uint8_t *bytes, size_t count)
{
    (void)user;
    for (size_t i = 0; i < count && console_bytes < sizeof console - 1; i++) console[console_bytes++] = (char)bytes[i];
}

static const char *guest_file(const char *name, char *path, size_t bytes)
{
    const char *directory = getenv("LIBVM_GUESTS"), *home = getenv("HOME");
    if (directory)
        snprintf(path, bytes, "%s/%s", directory, name);
    else
        snprintf(path, bytes, "%s/.cache/libvm/guests/%s", home ? home : "", name);
    if (access(path, R_OK)) test_skip("no %s (tests/guests/fetch gets it)", path);
    return path;
}

static vm_machine *linux_machine(vm_backend backend, unsigned vcpus, const char *append)
{
    char kernel[512], initrd[512], line[512];
    uint64_t available = 0;
    vm_options o = VM_OPTIONS_INIT;
    vm_boot_options b = VM_BOOT_OPTIONS_INIT;
    vm_machine *m;
    OK(vm_query(VM_BACKEND_KVM, "available", &available));
    if (!available) test_skip("%s", vm_errmsg());
    b.kernel = guest_file("vmlinuz-amd64", kernel, sizeof kernel);
    b.initrd = guest_file("initramfs-amd64", initrd, sizeof initrd);
    snprintf(line, sizeof line, "console=ttyS0 %s", append);
    b.cmdline = line;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = UINT64_C(512) << 20;
    o.vcpus = vcpus;
    o.cpu_model = "kvm";
    OK(vm_create(&o, &m));
    OK(vm_serial_output(m, 0, collect, NULL));
    OK(vm_boot_image(m, &b));
    return m;
}

static void expect_console(const char *text)
{
    if (!strstr(console, text))
        FAIL("no \"%s\" on the console, which ends: %s", text,
             console + (console_bytes > 600 ? console_bytes - 600 : 0));
}

/* Short turns while the kernel sets itself up: where guest ring 0 is emulated, KVM's part ends with that. */
static uint64_t turn_ns(unsigned moves, unsigned ms) { return ms * UINT64_C(1000000) / (moves < 120 ? 40 : 1); }

TEST_LIMIT(moves_while_linux_boots, 300)
{
    static const struct {
        vm_backend backend;
        unsigned ms;
    } tour[] = {
        {VM_BACKEND_JIT, 150}, {VM_BACKEND_KVM, 60},  {VM_BACKEND_INTERP, 250},
        {VM_BACKEND_KVM, 40},  {VM_BACKEND_JIT, 100}, {VM_BACKEND_INTERP, 100},
    };
    uint64_t has_jit = 0;
    unsigned moves = 0;
    OK(vm_query(VM_BACKEND_JIT, "available", &has_jit));
    vm_machine *m = linux_machine(VM_BACKEND_INTERP, 1,
                                  "run=\"for i in 1 2 3; do md5sum /bin/busybox; done; cat /proc/interrupts\"");
    vm_exit e = VM_EXIT_INIT;
    e.reason = VM_EXIT_DEADLINE;
    for (; e.reason == VM_EXIT_DEADLINE && moves < 2000; moves++) {
        vm_backend b = tour[moves % (sizeof tour / sizeof *tour)].backend;
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        OK(vm_backend_select(m, b == VM_BACKEND_JIT && !has_jit ? VM_BACKEND_INTERP : b));
        o.deadline_ns = turn_ns(moves, tour[moves % (sizeof tour / sizeof *tour)].ms);
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e));
    }
    uint64_t exits = 0;
    OK(vm_stats(m, "kvm-exits", &exits));
    expect_console("Linux version");
    expect_console("init: reached");
    expect_console("commands ended with status 0");
    const char *sum = strstr(console, "/bin/busybox");
    CHECK(sum != NULL);
    CHECK_EQ(e.reason, VM_EXIT_POWEROFF);
    CHECK(moves > 6 && exits > 0);
    vm_destroy(m);
}

typedef struct turn {
    vm_vcpu *cpu;
    uint64_t deadline_ns;
    vm_exit exit;
    int status;
} turn;

static void *take_turn(void *arg)
{
    turn *t = arg;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = t->deadline_ns;
    t->exit = (vm_exit)VM_EXIT_INIT;
    t->status = vm_vcpu_run(t->cpu, &o, &t->exit);
    return NULL;
}

/* Two vCPUs, each on its thread; between turns both stand still and the machine moves. */
TEST_LIMIT(moves_while_two_vcpus_boot_linux, 300)
{
    vm_machine *m =
        linux_machine(VM_BACKEND_INTERP, 2, "run=\"grep -c processor /proc/cpuinfo; cat /proc/interrupts\"");
    static const struct {
        vm_backend backend;
        unsigned ms;
    } tour[] = {{VM_BACKEND_INTERP, 400}, {VM_BACKEND_KVM, 30}};
    bool is_over = false;
    for (unsigned moves = 0; !is_over && moves < 2000; moves++) {
        turn t[2];
        pthread_t thread[2];
        OK(vm_backend_select(m, tour[moves % 2].backend));
        for (unsigned i = 0; i < 2; i++) {
            t[i].cpu = vm_vcpu_get(m, i);
            t[i].deadline_ns = turn_ns(moves, tour[moves % 2].ms);
            pthread_create(&thread[i], NULL, take_turn, &t[i]);
        }
        for (unsigned i = 0; i < 2; i++) {
            pthread_join(thread[i], NULL);
            CHECK_EQ(t[i].status, VM_OK);
            is_over |= t[i].exit.reason != VM_EXIT_DEADLINE;
        }
        if (is_over) CHECK(t[0].exit.reason == VM_EXIT_POWEROFF || t[1].exit.reason == VM_EXIT_POWEROFF);
    }
    uint64_t exits = 0;
    OK(vm_stats(m, "kvm-exits", &exits));
    CHECK(exits > 0);
    expect_console("Brought up 1 node, 2 CPUs");
    expect_console("commands ended with status 0");
    vm_destroy(m);
}

TEST_LIMIT(linux_on_kvm_alone, 7200)
{
    uint64_t is_hardware = 0;
    OK(vm_query(VM_BACKEND_KVM, "hardware-ring0", &is_hardware));
    if (!is_hardware && !getenv("VM_KVM_BOOT"))
        test_skip("this host emulates guest ring 0: make check-kvm-boot runs it");
    vm_machine *m = linux_machine(VM_BACKEND_KVM, 1, "run=\"uname -a; cat /proc/cpuinfo\"");
    vm_exit e = VM_EXIT_INIT;
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = UINT64_C(7000000000000);
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e));
    expect_console("init: reached");
    expect_console("commands ended with status 0");
    CHECK_EQ(e.reason, VM_EXIT_POWEROFF);
    vm_destroy(m);
}
