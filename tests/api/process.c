/* process.c - fork() of the process: the child's copy of a machine is a machine of its own, and neither disturbs the other. */
#include "../backends.h"

#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

static vm_exit_reason run(vm_vcpu *cpu, const vm_run_options *options)
{
    vm_exit exit = VM_EXIT_INIT;
    OK(vm_vcpu_run(cpu, options, &exit));
    return exit.reason;
}

/* The rest of a test that fails in a child would run in it too: it ends with what it found instead. */
static void child_says(bool is_good) { _exit(is_good ? 0 : 1); }

static void check_child(pid_t child)
{
    int status = -1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
}

static bool is_kvm_refused(vm_machine *m)
{
    vm_exit exit = VM_EXIT_INIT;
    bool is = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &exit) == VM_E_UNSUPPORTED && strstr(vm_errmsg(), "KVM") &&
              vm_backend_select(m, VM_BACKEND_INTERP) == VM_E_UNSUPPORTED;
    vm_destroy(m);
    return is;
}

/* ---- code: parent and child each execute some that neither has executed before, then again what they did first ---- */

static uint64_t run_at(vm_vcpu *cpu, uint64_t rip)
{
    uint64_t rax = 0;
    uint32_t ten[4] = { 10, 10, 10, 10 }, three[4] = { 3, 3, 3, 3 };
    OK(vm_vcpu_write_reg(cpu, VM_REG_XMM0, ten, 16));
    OK(vm_vcpu_write_reg(cpu, VM_REG_XMM1, three, 16));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RAX, &rax, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8));
    CHECK_EQ(run(cpu, NULL), VM_EXIT_HALT);
    OK(vm_vcpu_read_reg(cpu, VM_REG_RAX, &rax, 8));
    return rax;
}

/* Code at 0x1000 (run before the fork), 0x2000 (by the child) and 0x3000 (by the parent), and what it leaves in RAX. */
typedef struct snippet { uint8_t bytes[24]; uint64_t rax; } snippet;

static void check_own_code(vm_vcpu *cpu, vm_backend backend, const snippet s[3])
{
    int to_parent[2], to_child[2];
    char c = 0;
    for (unsigned i = 0; i < 3; i++)
        OK(vm_write(vm_vcpu_machine(cpu), 0x1000 * (i + 1), s[i].bytes, sizeof s[i].bytes));
    CHECK_EQ(run_at(cpu, 0x1000), s[0].rax);
    CHECK(pipe(to_parent) == 0 && pipe(to_child) == 0);
    pid_t child = fork();
    if (child == 0) {
        if (backend == VM_BACKEND_KVM)
            child_says(write(to_parent[1], &c, 1) == 1 && is_kvm_refused(vm_vcpu_machine(cpu)));
        bool is_good = run_at(cpu, 0x2000) == s[1].rax;
        is_good &= write(to_parent[1], &c, 1) == 1 && read(to_child[0], &c, 1) == 1;
        is_good &= run_at(cpu, 0x2000) == s[1].rax && run_at(cpu, 0x1000) == s[0].rax;
        vm_destroy(vm_vcpu_machine(cpu));
        child_says(is_good);
    }
    CHECK_EQ(read(to_parent[0], &c, 1), 1);
    CHECK_EQ(run_at(cpu, 0x3000), s[2].rax);
    CHECK_EQ(write(to_child[1], &c, 1), 1);
    check_child(child);
    CHECK_EQ(run_at(cpu, 0x3000), s[2].rax);
    CHECK_EQ(run_at(cpu, 0x1000), s[0].rax);
    vm_destroy(vm_vcpu_machine(cpu));
}

EACH_BACKEND(vector_code_is_ones_own)
{
    static const snippet s[3] = {                                        /* OP xmm0, xmm1; movd eax, xmm0; hlt */
        { { 0x66, 0x0f, 0xef, 0xc1, 0x66, 0x0f, 0x7e, 0xc0, 0xf4 }, 9 },
        { { 0x66, 0x0f, 0xfe, 0xc1, 0x66, 0x0f, 0x7e, 0xc0, 0xf4 }, 13 },
        { { 0x66, 0x0f, 0xfa, 0xc1, 0x66, 0x0f, 0x7e, 0xc0, 0xf4 }, 7 },
    };
    check_own_code(bare_machine(backend, VM_MODE_FLAT64, "", 1), backend, s);
}

/* Loops that are worth a translation: mov ecx, 100000; again: OP eax, 3; dec ecx; jnz again; hlt */
EACH_BACKEND(translated_code_is_ones_own)
{
#define LOOP(op) { 0xb9, 0xa0, 0x86, 0x01, 0x00, 0x83, op, 0x03, 0xff, 0xc9, 0x75, 0xf9, 0xf4 }
    static const snippet s[3] = { { LOOP(0xc8), 3 }, { LOOP(0xc0), 300000 }, { LOOP(0xe8), (uint32_t)-300000 } };
    check_own_code(bare_machine(backend, VM_MODE_FLAT64, "", 1), backend, s);
}

EACH_BACKEND(memory_is_ones_own)
{
    vm_vcpu *cpu = bare_machine(backend, VM_MODE_FLAT64, "\xff\x04\x25\x00\x40\x00\x00\xf4", 8);   /* inc dword [0x4000]; hlt */
    vm_machine *m = vm_vcpu_machine(cpu);
    vm_snapshot *s;
    uint64_t zero = 0;
    uint32_t n = 0;
    OK(vm_snapshot_take(m, &s));
    CHECK_EQ(run(cpu, NULL), VM_EXIT_HALT);
    pid_t child = fork();
    if (child == 0) {
        if (backend == VM_BACKEND_KVM)
            child_says(is_kvm_refused(m));
        for (int i = 0; i < 3; i++) {
            OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
            (void)run(cpu, NULL);
        }
        OK(vm_read(m, 0x4000, &n, 4));
        bool is_good = n == 4;
        OK(vm_snapshot_restore(m, s));
        (void)run(cpu, NULL);
        OK(vm_read(m, 0x4000, &n, 4));
        is_good &= n == 1;
        vm_machine *copy;
        OK(vm_fork(m, &copy));
        OK(vm_vcpu_write_reg(vm_vcpu_get(copy, 0), VM_REG_RIP, &zero, 8));
        (void)run(vm_vcpu_get(copy, 0), NULL);
        OK(vm_read(copy, 0x4000, &n, 4));
        is_good &= n == 2;
        vm_destroy(copy);
        vm_destroy(m);
        child_says(is_good);
    }
    check_child(child);
    OK(vm_read(m, 0x4000, &n, 4));
    CHECK_EQ(n, 1);
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
    CHECK_EQ(run(cpu, NULL), VM_EXIT_HALT);
    OK(vm_read(m, 0x4000, &n, 4));
    CHECK_EQ(n, 2);
    vm_destroy(m);
}

/* A PC has a thread for its timers and one for eventfds: sti; again: hlt; jmp again, woken by the PIT and by line 5, vectors 8
 * and 13 of the real-mode table; each handler counts. */
static vm_machine *pc_that_counts(vm_backend backend)
{
    static const uint8_t code[] = { 0xb0, 0x34, 0xe6, 0x43, 0xb0, 0xa0, 0xe6, 0x40, 0xb0, 0x09, 0xe6, 0x40,    /* PIT: 500 Hz */
                                    0xfb, 0xf4, 0xeb, 0xfd };
    static const uint8_t on_pit[] = { 0x2e, 0xff, 0x06, 0x00, 0x20, 0xb0, 0x20, 0xe6, 0x20, 0xcf };
    static const uint8_t on_line5[] = { 0x2e, 0xff, 0x06, 0x04, 0x20, 0xb0, 0x20, 0xe6, 0x20, 0xcf };
    static const uint8_t pic[] = { 0x11, 0x08, 0x04, 0x01 };
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    uint64_t rip = 0x1000, rsp = 0x8000;
    uint8_t init[sizeof pic * 4 + 4 + sizeof code], *p = init;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 1 << 20;
    OK(vm_create(&o, &m));
    for (unsigned i = 0; i < sizeof pic; i++, p += 4)
        memcpy(p, (uint8_t[]){ 0xb0, pic[i], 0xe6, i ? 0x21 : 0x20 }, 4);
    memcpy(p, (uint8_t[]){ 0xb0, 0xde, 0xe6, 0x21 }, 4);                 /* lines 0 and 5 unmasked */
    memcpy(p + 4, code, sizeof code);
    OK(vm_write(m, 0x1000, init, sizeof init));
    OK(vm_write(m, 0x1100, on_pit, sizeof on_pit));
    OK(vm_write(m, 0x1200, on_line5, sizeof on_line5));
    OK(vm_write(m, 4 * 8, (uint16_t[]){ 0x1100, 0 }, 4));
    OK(vm_write(m, 4 * 13, (uint16_t[]){ 0x1200, 0 }, 4));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RSP, &rsp, 8));
    return m;
}

static bool counts(vm_machine *m, uint64_t gpa)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    uint16_t before = 0, now = 0;
    o.deadline_ns = 10000000;
    OK(vm_read(m, gpa, &before, 2));
    for (unsigned i = 0; i < 500 && now == before; i++) {
        (void)run(vm_vcpu_get(m, 0), &o);
        OK(vm_read(m, gpa, &now, 2));
    }
    return now != before;
}

static bool is_woken(vm_machine *m, int fd)
{
    return eventfd_write(fd, 1) == 0 && counts(m, 0x2004);
}

EACH_BACKEND(timers_and_eventfds)
{
    vm_machine *m = pc_that_counts(backend);
    int fd = eventfd(0, EFD_NONBLOCK), childs = eventfd(0, EFD_NONBLOCK);
    OK(vm_irqfd(m, fd, 5, true));
    CHECK(counts(m, 0x2000));
    CHECK(is_woken(m, fd));
    pid_t child = fork();
    if (child == 0) {
        if (backend == VM_BACKEND_KVM)
            child_says(is_kvm_refused(m));
        bool is_good = counts(m, 0x2000);
        is_good &= vm_irqfd(m, childs, 5, true) == VM_OK && is_woken(m, childs);
        vm_destroy(m);
        child_says(is_good);
    }
    check_child(child);
    child = fork();
    if (child == 0) {
        vm_destroy(m);                                                   /* as it is */
        child_says(true);
    }
    check_child(child);
    CHECK(counts(m, 0x2000));
    CHECK(is_woken(m, fd));
    vm_destroy(m);
}
