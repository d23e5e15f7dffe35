/* inside.c - loaded before a test program (LD_PRELOAD, by tests/api/inside): a test's process enters the sandbox when it first runs a
 * vCPU, and stays there. What it does from then on is what a machine's run takes; anything else ends it with SIGSYS.
 *
 * /dev/kvm is opened before and handed out again, so that machines can be made inside, too.
 */
#define _GNU_SOURCE
#include <libvm/libvm.h>
#include <libvm/sandbox.h>

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int kvm = -1;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

int open(const char *path, int flags, ...)
{
    int (*real)(const char *, int, ...);
    va_list args;
    va_start(args, flags);
    int mode = flags & O_CREAT ? va_arg(args, int) : 0;
    va_end(args);
    if (!strcmp(path, "/dev/kvm") && kvm >= 0)
        return fcntl(kvm, F_DUPFD_CLOEXEC, 0);
    *(void **)&real = next("open");
    return real(path, flags, mode);
}

__attribute__((constructor)) static void open_kvm(void)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (fd >= 0)
        kvm = fcntl(fd, F_DUPFD_CLOEXEC, 500);      /* out of the way of tests that count theirs */
}

static void enter(void)
{
    int (*real)(unsigned);
    *(void **)&real = next("vm_sandbox_enter");
    int status = real(VM_SANDBOX_KVM | VM_SANDBOX_THREADS);
    if (status != VM_OK) {
        fprintf(stderr, "vm_sandbox_enter: %d\n", status);
        abort();
    }
}

int vm_vcpu_run(vm_vcpu *cpu, const vm_run_options *options, vm_exit *exit)
{
    int (*real)(vm_vcpu *, const vm_run_options *, vm_exit *);
    pthread_once(&once, enter);
    *(void **)&real = next("vm_vcpu_run");
    return real(cpu, options, exit);
}
