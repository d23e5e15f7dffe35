/* sandbox.c - inside vm_sandbox_enter(): machines run, are changed, snapshotted, cloned and ended, and nothing else can be done.
 * Each test is a process of its own, so that entering one does not disturb the others. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"
#include <errno.h>
#include <fcntl.h>
#include <libvm/sandbox.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

#ifdef VM_COVERAGE
void __gcov_dump(void);
#define WRITE_COVERAGE() __gcov_dump()          /* later it could not be: files cannot be opened, nor directories made, inside */
#else
#define WRITE_COVERAGE() (void)0
#endif

static void enter(unsigned flags)
{
    WRITE_COVERAGE();
    if (SANITIZED)
        test_skip("a sanitizer makes system calls of its own");
    int status = vm_sandbox_enter(flags);
    if (status == VM_E_UNSUPPORTED)
        test_skip("%s", vm_errmsg());
    CHECK_EQ(status, VM_OK);
}

static vm_machine *make(vm_backend backend)
{
    static const uint8_t code[] = { 0x48, 0xff, 0x04, 0x25, 0, 0x30, 0, 0, 0xeb, 0xf6 };    /* again: inc qword [0x3000]; jmp again */
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    options.backend = backend;
    OK(vm_create(&options, &m));
    OK(vm_map_ram(m, 0x1000, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0x1000, code, sizeof code));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    uint64_t rip = 0x1000;
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    return m;
}

static uint64_t counted(vm_machine *m)
{
    uint64_t value = 0;
    OK(vm_read(m, 0x3000, &value, 8));
    return value;
}

static int on_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user, (void)cpu, (void)offset, (void)width;
    *value = 7;
    return 0;
}

/* Runs until the guest has counted further than `from`; a loaded host may give it nothing for a while. */
static void count_on(vm_vcpu *cpu, uint64_t from)
{
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    run.deadline_ns = 30000000;
    do {
        OK(vm_vcpu_run(cpu, &run, &e));
        CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    } while (counted(vm_vcpu_machine(cpu)) <= from);
}

/* What a program does with a machine, all of it inside. */
static void live(vm_machine *m, vm_backend backend)
{
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_exit e = VM_EXIT_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_snapshot *s;
    vm_region *r;
    uint64_t first, rip = 0x5000;
    count_on(cpu, 0);
    first = counted(m);
    OK(vm_snapshot_take(m, &s));
    count_on(cpu, first);
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(counted(m), first);
    vm_snapshot_free(s);
    OK(vm_map_ram(m, 0x100000, 4 << 20, VM_PROT_RW, &r));
    OK(vm_protect(m, 0x100000, 0x1000, VM_PROT_R));
    OK(vm_unmap(m, r));
    ops.read = on_read;
    OK(vm_map_mmio(m, 0x200000, 0x1000, &ops, NULL, NULL));
    OK(vm_write(m, 0x5000, (const uint8_t[]){ 0x8b, 0x04, 0x25, 0, 0, 0x20, 0, 0xf4 }, 8));       /* mov eax, [0x200000]; hlt */
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8));
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    OK(vm_vcpu_read_reg(cpu, VM_REG_RAX, &rip, 8));
    CHECK_EQ(rip, 7);
    if (backend != VM_BACKEND_KVM) {
        vm_machine *copy;
        OK(vm_fork(m, &copy));
        CHECK_EQ(counted(copy), first);
        vm_destroy(copy);
    }
    vm_vcpu_kick(cpu);
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    OK(vm_reset(m));
    vm_destroy(m);
}

EACH_BACKEND(lives_inside)
{
    vm_machine *m = make(backend);
    enter(backend == VM_BACKEND_KVM ? VM_SANDBOX_KVM : 0);
    live(m, backend);
}

TEST(software_machines_are_made_inside)
{
    static const vm_backend software[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT };
    bool has[2];
    uint64_t available;
    for (int i = 0; i < 2; i++)
        has[i] = vm_query(software[i], "available", &available) == VM_OK && available;
    enter(0);
    for (int i = 0; i < 2; i++)
        if (has[i])
            live(make(software[i]), software[i]);
}

TEST(a_pc_is_made_inside)
{
    vm_options options = VM_OPTIONS_INIT;
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    vm_machine *m;
    enter(VM_SANDBOX_THREADS);
    options.platform = VM_PLATFORM_PC;
    options.backend = VM_BACKEND_INTERP;
    options.ram_bytes = 16 << 20;
    OK(vm_create(&options, &m));
    OK(vm_write(m, 0x1000, (const uint8_t[]){ 0xfb, 0xf4, 0xeb, 0xfd }, 4));                      /* sti; hlt; jmp back */
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL));
    uint64_t rip = 0x1000;
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    run.deadline_ns = 20000000;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), &run, NULL));
    vm_destroy(m);
}

static void *run_thread(void *arg)
{
    count_on(arg, 0);
    return NULL;
}

EACH_BACKEND(threads_are_made_inside_when_asked)
{
    vm_machine *m = make(backend);
    pthread_t thread;
    enter(VM_SANDBOX_THREADS | (backend == VM_BACKEND_KVM ? VM_SANDBOX_KVM : 0));
    CHECK_EQ(pthread_create(&thread, NULL, run_thread, vm_vcpu_get(m, 0)), 0);
    pthread_join(thread, NULL);
    CHECK(counted(m) > 0);
    vm_destroy(m);
}

/* ---- what cannot be done ---- */

static void open_file(void) { if (open("/etc/passwd", O_RDONLY) >= 0) _exit(1); }
static void start_program(void) { execl("/bin/true", "true", (char *)NULL); }
static void make_process(void) { if (fork() == 0) _exit(0); }
static void make_socket(void) { socket(AF_INET, SOCK_STREAM, 0); }
static void signal_others(void) { kill(getppid(), 0); }
static void map_writable_code(void) { mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
static void make_code_writable(void)
{
    void *p = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(p, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
}
static void remove_file(void) { unlink("/tmp/libvm-no-such-file"); }
static void make_thread(void) { pthread_t t; pthread_create(&t, NULL, run_thread, NULL); }

static const struct deed { const char *name; void (*fn)(void); bool fails_softly; } deeds[] = {
    { "open_file", open_file, true },       { "start_program", start_program, false },
    { "make_process", make_process, false }, { "make_socket", make_socket, false },
    { "signal_others", signal_others, false }, { "map_writable_code", map_writable_code, false },
    { "make_code_writable", make_code_writable, false }, { "remove_file", remove_file, false }, { "make_thread", make_thread, false },
};

/* In a child: how it ended. 100: it was skipped. */
static int in_child(const struct deed *d, unsigned flags)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        if (vm_sandbox_enter(flags) != VM_OK)
            _exit(100);
        errno = 0;
        d->fn();
        _exit(errno == EPERM ? 42 : 43);
    }
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 100)
        test_skip("no sandbox here");
    return status;
}

static void refused(const void *arg)
{
    const struct deed *d = arg;
    if (SANITIZED)
        test_skip("a sanitizer makes system calls of its own");
    int status = in_child(d, 0);
    if (d->fails_softly)
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
    else
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
    status = in_child(d, VM_SANDBOX_ERRNO | VM_SANDBOX_KVM);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
}

SETUP(deeds)
{
    char name[100];
    for (size_t i = 0; i < sizeof deeds / sizeof *deeds; i++) {
        snprintf(name, sizeof name, "refused/%s", deeds[i].name);
        test_add(name, refused, &deeds[i], 0);
    }
}

TEST(the_list_is_short_and_documented)
{
    const unsigned all = VM_SANDBOX_KVM | VM_SANDBOX_THREADS | VM_SANDBOX_SOCKETS;
    const char *top = getenv("top_srcdir"), *name;
    char path[4096], line[100];
    static char text[65536];
    unsigned count = 0;
    while ((name = vm_sandbox_call(all, count)))
        count++;
    CHECK(count > 20 && count <= VM_SANDBOX_CALLS);
    CHECK(vm_sandbox_call(0, count - 1) == NULL);
    REFUSED(vm_sandbox_enter(0x100), VM_E_INVALID);
    snprintf(path, sizeof path, "%s/docs/sandbox.md", top ? top : ".");
    FILE *f = fopen(path, "r");
    if (!f)
        test_skip("no docs/sandbox.md beside this build");
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    for (unsigned i = 0; i < count; i++) {
        snprintf(line, sizeof line, "| `%s` |", vm_sandbox_call(all, i));
        if (!strstr(text, line))
            FAIL("docs/sandbox.md does not list %s", vm_sandbox_call(all, i));
    }
}
