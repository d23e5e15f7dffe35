/* nomem.c - everything that a host can refuse is refused once: the N-th malloc, calloc, realloc, strdup, mmap, mprotect, ioctl,
 * write, file, event or thread of a scenario fails, for each N until one run needs no more than N. Each run must end with a status and
 * nothing lost: what was made can be destroyed, and what failed left the machine as it was. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
TEST(every_allocation_fails_once) { test_skip("the sanitizer has its own allocator"); }
#else

static _Atomic long countdown = -1;    /* allocations until one fails; negative: none does */
static _Atomic bool is_lasting;        /* all those after it fail too, until the caller has had his status */
static _Atomic bool has_failed;
static _Atomic long live;              /* blocks and mappings */

static bool fails(void)
{
    if (countdown < 0 || (countdown > 0 && countdown--))
        return false;
    if (!is_lasting)
        countdown = -1;
    has_failed = true;
    errno = ENOMEM;
    return true;
}

#pragma GCC visibility push(default)   /* the library shall use these */
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

void *malloc(size_t bytes)
{
    void *p = fails() ? NULL : __libc_malloc(bytes);
    live += p != NULL;
    return p;
}

void *calloc(size_t n, size_t bytes)
{
    void *p = fails() ? NULL : __libc_calloc(n, bytes);
    live += p != NULL;
    return p;
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    void *p = fails() ? NULL : __libc_memalign(alignment, bytes);
    live += p != NULL;
    return p;
}

void *realloc(void *old, size_t bytes)
{
    void *p = fails() ? NULL : __libc_realloc(old, bytes);
    live += p != NULL && !old;
    return p;
}

void free(void *p)
{
    live -= p != NULL;
    __libc_free(p);
}

void *mmap(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset)
{
    if (fails())
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, addr, bytes, prot, flags, fd, offset);
}

int mprotect(void *addr, size_t bytes, int prot)
{
    return fails() ? -1 : (int)syscall(SYS_mprotect, addr, bytes, prot);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    va_start(args, request);
    void *arg = va_arg(args, void *);
    va_end(args);
    return fails() ? -1 : (int)syscall(SYS_ioctl, fd, request, arg);
}

ssize_t write(int fd, const void *from, size_t bytes)
{
    return fails() ? -1 : syscall(SYS_write, fd, from, bytes);
}

ssize_t pwrite(int fd, const void *from, size_t bytes, off_t at)
{
    return fails() ? -1 : syscall(SYS_pwrite64, fd, from, bytes, at);
}

int ftruncate(int fd, off_t bytes)
{
    return fails() ? -1 : (int)syscall(SYS_ftruncate, fd, bytes);
}

int memfd_create(const char *name, unsigned flags)
{
    return fails() ? -1 : (int)syscall(SYS_memfd_create, name, flags);
}

int eventfd(unsigned value, int flags)
{
    return fails() ? -1 : (int)syscall(SYS_eventfd2, value, flags);
}

int socket(int domain, int type, int protocol)
{
    return fails() ? -1 : (int)syscall(SYS_socket, domain, type, protocol);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (fails())
        return EAGAIN;
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return real(thread, attr, fn, arg);
}
#pragma GCC visibility pop

/* How many mappings the process has. */
static unsigned mappings(void)
{
    char line[512];
    unsigned n = 0;
    FILE *f = fopen("/proc/self/maps", "r");
    while (f && fgets(line, sizeof line, f))
        n++;
    if (f)
        fclose(f);
    return n;
}

/* How many descriptors it has open. */
static unsigned descriptors(void)
{
    unsigned n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

/* The test's own file: not among what is refused. */
static int own_file(const char *name)
{
    int fd = (int)syscall(SYS_memfd_create, name, 0);
    CHECK(fd >= 0);
    return fd;
}

/* ---- scenarios: 0 when all went well; anything else must be a status with a message ---- */

static int bare(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_machine *m = NULL;
    uint64_t regions = 0;
    o.backend = backend;
    o.vcpus = 2;
    o.cpu_model = "max";
    int status = vm_create(&o, &m);
    if (status)
        return status;
    int made = 0;
    status = vm_map_ram(m, 0, 0x100000, VM_PROT_RWX, NULL);
    made += !status;
    for (unsigned i = 0; !status && i < 20; i++) {
        status = vm_map_mmio(m, 0x200000 + 0x2000 * i, 0x1000, &ops, NULL, NULL);
        made += !status;
    }
    OK(vm_stats(m, "regions", &regions));
    CHECK_EQ(regions, made);
    if (!status)
        status = vm_protect(m, 0x1000, 0x1000, VM_PROT_RX);
    if (!status)
        status = vm_write(m, 0x1000, "\xff\xc0\x0f\x58\xc1\xd9\xe8\xf4", 8);   /* inc, addps, fld1, hlt */
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    uint64_t rip = 0x1000;
    if (!status)
        status = vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8);
    if (!status)
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    if (!status && e.reason != VM_EXIT_HALT)
        status = e.reason == VM_EXIT_INTERNAL ? VM_E_INTERNAL : 1;
    vm_destroy(m);
    return status;
}

static int pc(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_run_options r = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 16 << 20;
    int status = vm_create(&o, &m);
    if (status)
        return status;
    r.max_instructions = 2000;
    status = vm_write(m, 0xf0000, "\xeb\xfe", 2);
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL);
    if (!status)
        status = vm_vcpu_run(vm_vcpu_get(m, 0), &r, &e);
    vm_destroy(m);
    return status;
}

/* What a failed call must leave alone. */
static uint64_t state_of(vm_machine *m)
{
    static uint8_t page[4096];
    vm_regs r = VM_REGS_INIT;
    uint64_t h = 1469598103934665603u, regions = 0;
    OK(vm_vcpu_get_regs(vm_vcpu_get(m, 0), &r));
    OK(vm_stats(m, "regions", &regions));
    for (size_t i = 0; i < sizeof r / 8; i++)
        h = (h ^ ((uint64_t *)(void *)&r)[i]) * 1099511628211u;
    for (uint64_t gpa = 0; gpa < 0x20000; gpa += 4096)
        if (vm_read(m, gpa, page, sizeof page) == VM_OK)
            for (size_t i = 0; i < sizeof page; i += 64)
                h = (h ^ page[i] ^ gpa) * 1099511628211u;
    return h ^ regions;
}

/* A call that fails for want of memory leaves the machine as it was, and succeeds when asked again. */
#define AGAIN(m, call)                                                          \
    do {                                                                        \
        uint64_t again_before = state_of(m);                                    \
        int again_status = (call);                                              \
        if (again_status != VM_OK) {                                            \
            countdown = -1;                                                     \
            if (!has_failed)                                                    \
                FAIL("%s: %d, %s", #call, again_status, vm_errmsg());           \
            CHECK_EQ(state_of(m), again_before);                                \
            OK(call);                                                           \
        }                                                                       \
    } while (0)

static void write_page(vm_machine *m, uint64_t gpa, uint8_t value)
{
    OK(vm_write(m, gpa, &value, 1));
}

/* Snapshots, nested, over edits of the map, to a file and back, and a clone. */
static int snapshots(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL, *copy = NULL;
    vm_region *r = NULL;
    vm_snapshot *s = NULL, *t = NULL, *u = NULL;
    o.backend = backend;
    int status = vm_create(&o, &m);
    if (status)
        return status;
    status = vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL);
    if (!status)
        status = vm_map_ram(m, 0x10000, 0x4000, VM_PROT_RWX, &r);
    if (!status)
        status = vm_protect(m, 0x3000, 0x1000, VM_PROT_R);
    if (status) {
        vm_destroy(m);
        return status;
    }
    write_page(m, 0x1000, 1);
    AGAIN(m, vm_snapshot_take(m, &s));
    uint64_t first = state_of(m);
    for (unsigned i = 0; i < 6; i++)
        write_page(m, 0x4000 + 0x1000 * i, 2);
    OK(vm_unmap(m, r));
    AGAIN(m, vm_protect(m, 0x1000, 0x1000, VM_PROT_R));
    AGAIN(m, vm_snapshot_take(m, &t));
    uint64_t second = state_of(m);
    AGAIN(m, vm_snapshot_restore(m, s));
    CHECK_EQ(state_of(m), first);
    write_page(m, 0x11000, 3);
    AGAIN(m, vm_snapshot_restore(m, t));
    CHECK_EQ(state_of(m), second);
    int fd = own_file("snapshot");
    AGAIN(m, (lseek(fd, 0, SEEK_SET), vm_snapshot_save(t, fd)));
    write_page(m, 0x1000, 9);
    AGAIN(m, vm_snapshot_load(m, fd, &u));
    close(fd);
    AGAIN(m, vm_snapshot_restore(m, u));
    CHECK_EQ(state_of(m), second);
    AGAIN(m, vm_fork(m, &copy));
    CHECK_EQ(state_of(copy), second);
    vm_snapshot_free(s);
    AGAIN(m, vm_snapshot_restore(m, t));
    CHECK_EQ(state_of(m), second);
    vm_destroy(copy);
    vm_destroy(m);
    return VM_OK;
}

/* Hooks of all kinds with their destroy callbacks, breakpoints, watchpoints; edits from a callback. */
static unsigned hooks_alive;
static void hook_gone(void *user) { (void)user, hooks_alive--; }

static vm_hook_result hook_adds(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    vm_machine *m = vm_vcpu_machine(cpu);
    int status = vm_breakpoint(m, 0x5000 + e->address, true);
    if (status == VM_OK)
        status = vm_breakpoint(m, 0x5000 + e->address, false);
    *(int *)user = *(int *)user ? *(int *)user : status;
    return VM_HOOK_CONTINUE;
}

static int hooked(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_hook_desc d = VM_HOOK_INIT;
    vm_hook *h = NULL;
    vm_exit e = VM_EXIT_INIT;
    int status, inner = 0;
    if (backend == VM_BACKEND_KVM)
        return VM_OK;
    o.backend = backend;
    if ((status = vm_create(&o, &m)) != VM_OK)
        return status;
    status = vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL);
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    if (!status)
        status = vm_write(m, 0, "\x90\x90\xf4", 3);
    d.fn = hook_adds;
    d.user = &inner;
    d.destroy = hook_gone;
    for (int kind = 1; !status && kind < VM_HOOK_KINDS; kind++) {
        d.kind = (vm_hook_kind)kind;
        status = vm_hook_add(m, &d, &h);
        hooks_alive += status == VM_OK;
    }
    if (!status)
        status = vm_watchpoint(m, 0x8000, 8, VM_PROT_RW, true);
    if (!status)
        status = vm_watchpoint(m, 0x8000, 8, VM_PROT_RW, false);          /* removing needs no memory */
    if (!status)
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    if (!status && inner)
        status = inner;
    if (!status && e.reason != VM_EXIT_HALT)
        FAIL("exit %s", vm_exit_name(e.reason));
    if (h)
        OK(vm_hook_remove(m, h));
    vm_destroy(m);
    CHECK_EQ(hooks_alive, 0);
    return status;
}

/* Breakpoints and watchpoints, which every backend serves; then a hook, which moves a machine on KVM to another backend. */
static int stopped(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_hook_desc d = VM_HOOK_INIT;
    vm_hook *h = NULL;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rip = 0;
    int inner = 0;
    o.backend = backend;
    int status = vm_create(&o, &m);
    if (!status)
        status = vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL);
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    if (!status)
        status = vm_write(m, 0, "\x90\xff\x04\x25\0\x80\0\0\xf4", 9);        /* nop; inc dword [0x8000]; hlt */
    if (!status) {
        AGAIN(m, vm_breakpoint(m, 1, true));
        AGAIN(m, vm_watchpoint(m, 0x8000, 4, VM_PROT_W, true));
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    }
    if (!status) {
        CHECK_EQ(e.reason, VM_EXIT_BREAKPOINT);
        CHECK_EQ(e.rip, 1);
        AGAIN(m, vm_breakpoint(m, 1, false));
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    }
    if (!status) {
        CHECK_EQ(e.reason, VM_EXIT_BREAKPOINT);
        CHECK_EQ(e.rip, 8);
        AGAIN(m, vm_watchpoint(m, 0x8000, 4, VM_PROT_W, false));
        d.kind = VM_HOOK_BLOCK;
        d.fn = hook_adds;
        d.user = &inner;
        d.flags = VM_HOOK_SWITCH;
        AGAIN(m, vm_hook_add(m, &d, &h));
        AGAIN(m, vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    }
    if (!status)
        status = inner;
    if (!status)
        CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(m);
    return status;
}

/* Pages a guest touches under strategy "shadow", reloading CR3; shadows that find no memory are done without. */
static int shadowed(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    vm_machine *m = NULL;
    /* mov cl, 20; 1: mov eax, cr3; mov cr3, eax; add dword [0x100000], 3; inc dword [0x801000]; dec cl; jnz 1b; hlt */
    static const unsigned char code[] = { 0xb1, 20, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x83, 0x05, 0, 0, 0x10, 0, 3,
                                          0xff, 0x05, 0, 0x10, 0x80, 0, 0xfe, 0xc9, 0x75, 0xe9, 0xf4 };
    o.backend = backend;
    o.mmu = "shadow";
    int status = vm_create(&o, &m);
    if (status)
        return status;
    status = vm_map_ram(m, 0, 0x200000, VM_PROT_RWX, NULL);
    if (!status)
        status = vm_write(m, 0x1000, code, sizeof code);
    for (unsigned i = 0; !status && i < 0x200; i++) {    /* 0 as it is; 0x800000 shows 0x180000 */
        unsigned low = i << 12 | 3, high = (0x180 + i % 0x80) << 12 | 3;
        status = vm_write(m, 0x11000 + 4 * i, &low, 4);
        if (!status)
            status = vm_write(m, 0x12000 + 4 * i, &high, 4);
    }
    unsigned directory[3] = { 0x11003, 0, 0x12003 };
    if (!status)
        status = vm_write(m, 0x10000, directory, sizeof directory);
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT32);
    if (!status)
        status = vm_vcpu_get_sregs(vm_vcpu_get(m, 0), &s);
    s.cr3 = 0x10000;
    s.cr0 |= UINT32_C(1) << 31;
    if (!status)
        status = vm_vcpu_set_sregs(vm_vcpu_get(m, 0), &s);
    if (!status)
        status = vm_vcpu_get_regs(vm_vcpu_get(m, 0), &r);
    r.rip = 0x1000;
    if (!status)
        status = vm_vcpu_set_regs(vm_vcpu_get(m, 0), &r);
    if (!status)
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    unsigned sums[2] = { 0 };
    if (!status)
        status = vm_read(m, 0x100000, &sums[0], 4);
    if (!status)
        status = vm_read(m, 0x181000, &sums[1], 4);
    if (!status && (e.reason != VM_EXIT_HALT || sums[0] != 60 || sums[1] != 20))
        status = 1;
    vm_destroy(m);
    return status;
}

/* A call, a function bound with a string and a buffer that need copies, a closure, a hypercall. */
static int call_value(void *user, vm_vcpu *cpu, const vm_value *args, size_t count, vm_value *result)
{
    (void)user, (void)cpu, (void)count;
    result->u = strlen(args[0].cdata);
    return 0;
}

static int calls(vm_backend backend)
{
    static const char text[] = "text";
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_closure *closure = NULL;
    vm_bind_desc d = VM_BIND_DESC_INIT;
    vm_value args[2] = { { .cdata = text }, { .u = 5 } }, result = { 0 };
    vm_exit e = VM_EXIT_INIT;
    uint64_t rsp = 0x8000;
    int status;
    o.backend = backend;
    if ((status = vm_create(&o, &m)) != VM_OK)
        return status;
    d.signature = "u32(str, cbuf[8])";
    d.values = call_value;
    status = vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL);
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    if (!status)
        status = vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RSP, &rsp, 8);
    if (!status)
        status = vm_bind_function(m, 0x9000, &d, NULL);
    if (!status)
        status = vm_bind_hypercall(m, 3, &d, NULL);
    if (!status)
        status = vm_call(vm_vcpu_get(m, 0), 0x9000, "u32(str, ptr)", args, 2, &result, NULL, &e);
    if (!status && e.reason != VM_EXIT_UNTIL)            /* no memory for a copy is the guest's fault */
        status = has_failed ? VM_E_NOMEM : 1;
    if (!status && result.u != 4)
        status = 1;
    if (!status)
        status = vm_closure_new(vm_vcpu_get(m, 0), 0x9000, "u32(str, ptr)", NULL, &closure);
    vm_closure_free(closure);
    vm_destroy(m);
    return status;
}

/* A little life recorded and replayed. */
static int replays(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_run_options r = VM_RUN_OPTIONS_INIT;
    vm_machine *m[2] = { NULL, NULL };
    vm_exit e = VM_EXIT_INIT;
    int status = VM_OK, fd = own_file("log");
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 1 << 20;
    r.max_instructions = 1000;
    for (unsigned i = 0; i < 2 && !status; i++) {
        if ((status = vm_create(&o, &m[i])) != VM_OK)
            break;
        status = vm_vcpu_set_mode(vm_vcpu_get(m[i], 0), VM_MODE_REAL);
        if (!status)
            status = vm_write(m[i], 0, "\x40\xeb\xfd", 3);    /* inc ax; jmp */
        if (!status && i == 1)
            status = lseek(fd, 0, SEEK_SET) == 0 ? vm_replay(m[1], fd) : 1;
        if (!status && i == 0)
            status = vm_record(m[0], fd, NULL);
        if (!status && i == 0 && (status = vm_serial_input(m[0], 0, (const uint8_t *)"x", 1)) > 0)
            status = VM_OK;
        if (!status)
            status = vm_vcpu_run(vm_vcpu_get(m[i], 0), i ? NULL : &r, &e);
        if (!status && i == 0)
            status = vm_record_stop(m[0]);
    }
    if (!status && (e.reason != VM_EXIT_REPLAY || e.replay.status))
        status = has_failed ? VM_E_NOMEM : 1;
    vm_destroy(m[0]);
    vm_destroy(m[1]);
    close(fd);
    return status;
}

/* An ELF file is loaded, a boot sector booted and run. */
static int boots(vm_backend backend)
{
    static uint8_t sector[512] = { 0x40, 0xf4 };                          /* inc ax; hlt */
    vm_options o = VM_OPTIONS_INIT;
    vm_boot_options b = VM_BOOT_OPTIONS_INIT;
    vm_run_options r = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_machine *m = NULL;
    char path[64];
    int fd = own_file("sector");
    memcpy(sector + 510, "\x55\xaa", 2);
    CHECK_EQ(syscall(SYS_write, fd, sector, sizeof sector), sizeof sector);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    b.kernel = path;
    r.max_instructions = 1000;
    r.deadline_ns = 1000000000;
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 1 << 20;
    int status = vm_create(&o, &m);
    if (!status)
        AGAIN(m, vm_load_raw(m, path, 0x8000));
    if (!status)
        status = vm_boot_image(m, &b);
    if (!status)
        status = vm_vcpu_run(vm_vcpu_get(m, 0), &r, &e);
    vm_destroy(m);
    close(fd);
    return status;
}

/* Coverage; strategies changed over; views of guest-physical memory; the other backend. */
static int changes(vm_backend backend)
{
    static uint8_t map[4096];
    static const char *const names[] = { "shadow", "ept", "flat", "ept" };
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rip = 0x1000;
    unsigned view = 0;
    o.backend = backend;
    int status = vm_create(&o, &m);
    if (!status)
        status = vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL);
    if (!status)
        status = vm_write(m, 0x1000, "\xff\xc0\xeb\x00\xf4", 5);          /* inc eax; jmp next; hlt */
    if (!status)
        status = vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    if (!status) {
        AGAIN(m, vm_coverage(m, map, sizeof map));
        for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
            AGAIN(m, vm_mmu_select(m, names[i]));
        AGAIN(m, vm_ept_create(m, 0, 0, &view));
        AGAIN(m, vm_ept_protect(m, view, 0x4000, 0x2000, VM_PROT_R));
        AGAIN(m, vm_ept_select(vm_vcpu_get(m, 0), view));
        AGAIN(m, vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    }
    if (!status) {
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        AGAIN(m, vm_ept_select(vm_vcpu_get(m, 0), 0));
        AGAIN(m, vm_ept_destroy(m, view));
        AGAIN(m, vm_coverage(m, NULL, 0));
        AGAIN(m, vm_backend_select(m, backend == VM_BACKEND_JIT ? VM_BACKEND_INTERP : VM_BACKEND_JIT));
        AGAIN(m, vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
        status = vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e);
    }
    if (!status)
        CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(m);
    return status;
}

/* A stub that is made, waits for a debugger and is stopped. */
static int debugged(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_gdb_options go = VM_GDB_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_gdb *g = NULL;
    o.backend = backend;
    o.vcpus = 2;
    int status = vm_create(&o, &m);
    if (!status)
        status = vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL);
    if (!status)
        AGAIN(m, vm_gdbstub(m, "127.0.0.1:0", &go, &g));
    if (!status) {
        vm_gdb_stop(g);
        AGAIN(m, vm_gdb_serve(g, NULL));
        vm_gdb_free(g);
    }
    vm_destroy(m);
    return status;
}

/* One run in which the n-th is refused. False: it needed no more than n. */
static bool refuse(long n, vm_backend backend, int (*scenario)(vm_backend))
{
    const long blocks = live;
    const unsigned maps = mappings(), files = descriptors();
    has_failed = false;
    countdown = n;
    int status = scenario(backend);
    countdown = -1;
    if (!has_failed) {
        CHECK_EQ(status, 0);
        return false;
    }
    if (status > 0)
        FAIL("allocation %ld: the guest went astray", n);
    if (descriptors() != files)
        FAIL("allocation %ld: status %d, %u descriptors are left", n, status, descriptors() - files);
    if (live > blocks + 2)
        FAIL("allocation %ld: status %d, %ld blocks are lost", n, status, live - blocks);
    if (mappings() > maps + 2)
        FAIL("allocation %ld: status %d, %u mappings are lost", n, status, mappings() - maps);
    return true;
}

static void for_every_allocation(vm_backend backend, int (*scenario)(vm_backend))
{
    long n[2];
    CHECK_EQ(scenario(backend), 0);    /* warm: what the process keeps is kept now */
    CHECK_EQ(scenario(backend), 0);
    for (int lasting = 0; lasting < 2; lasting++) {
        is_lasting = lasting;
        for (n[lasting] = 0; refuse(n[lasting], backend, scenario); n[lasting]++)
            continue;
        CHECK(n[lasting] > 5);         /* it did allocate something */
    }
    printf("    %ld refused by themselves, %ld with all that follow\n", n[0], n[1]);
}

EACH_BACKEND(bare_machine)
{
    for_every_allocation(backend, bare);
}

EACH_BACKEND(snapshots)
{
    for_every_allocation(backend, snapshots);
}

EACH_BACKEND(calls_and_bindings)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM serves no calls");
    for_every_allocation(backend, calls);
}

EACH_BACKEND(recordings)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM does not record");
    for_every_allocation(backend, replays);
}

EACH_BACKEND(hooks)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM serves no hooks");
    for_every_allocation(backend, hooked);
}

EACH_BACKEND(breakpoints)
{
    for_every_allocation(backend, stopped);
}

EACH_BACKEND(booting)
{
    for_every_allocation(backend, boots);
}

EACH_BACKEND(strategies_views_coverage)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    for_every_allocation(backend, changes);
}

EACH_BACKEND(stub)
{
    for_every_allocation(backend, debugged);
}

EACH_BACKEND(pc_machine)
{
    for_every_allocation(backend, pc);
}

EACH_BACKEND(every_allocation_of_shadows)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("the host's hardware translates");
    for_every_allocation(backend, shadowed);
}
#endif
