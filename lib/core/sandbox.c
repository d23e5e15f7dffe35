/* sandbox.c - vm_sandbox_enter(): a seccomp filter made from sandbox.def. */
#define _GNU_SOURCE 1                     /* CLONE_* */
#include "core/core.h"
#include <libvm/sandbox.h>

enum { NONE, WX, KVM, SELF, THREAD };
enum { ALL_FLAGS = VM_SANDBOX_KVM | VM_SANDBOX_THREADS | VM_SANDBOX_SOCKETS | VM_SANDBOX_ERRNO };

static const struct call {
    const char *name;
    unsigned    flags, check;
} calls[] = {
#define CALL(name, flags, check) { #name, flags, check },
#include "core/sandbox.def"
#undef CALL
};
enum { CALLS = sizeof calls / sizeof *calls };
_Static_assert(CALLS <= VM_SANDBOX_CALLS, "more system calls than the interface promises");

static bool is_allowed(const struct call *c, unsigned flags)
{
    return !c->flags || (c->flags & flags);
}

VM_API const char *vm_sandbox_call(unsigned flags, unsigned i)
{
    for (unsigned k = 0; k < CALLS; k++)
        if (is_allowed(&calls[k], flags) && i-- == 0)
            return calls[k].name;
    return NULL;
}

#ifdef VM_HAVE_SECCOMP
#include <errno.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <unistd.h>

/* One condition is one rule; rules of a system call are alternatives. */
static int add(scmp_filter_ctx ctx, int nr, unsigned check)
{
    const uint32_t allow = SCMP_ACT_ALLOW;
    int status;
    switch (check) {
    case WX:
        status = seccomp_rule_add(ctx, allow, nr, 1, SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_WRITE, 0));
        return status ? status : seccomp_rule_add(ctx, allow, nr, 1, SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC | PROT_WRITE, PROT_WRITE));
    case KVM:
        return seccomp_rule_add(ctx, allow, nr, 1, SCMP_A1(SCMP_CMP_MASKED_EQ, 0xff00, 0xae00));
    case SELF:
        return seccomp_rule_add(ctx, allow, nr, 1, SCMP_A0(SCMP_CMP_EQ, (scmp_datum_t)getpid()));
    case THREAD:
        return seccomp_rule_add(ctx, allow, nr, 1, SCMP_A0(SCMP_CMP_MASKED_EQ, CLONE_THREAD | CLONE_VM, CLONE_THREAD | CLONE_VM));
    default:
        return seccomp_rule_add(ctx, allow, nr, 0);
    }
}

/* What a C library asks for and can do without, as vm_share_pages() does, fails instead of ending the process. */
static int add_refusals(scmp_filter_ctx ctx, unsigned flags)
{
    static const char *const names[] = { "open", "openat", "readlink", "prlimit64", "sysinfo", "sched_getaffinity", "mincore" };
    int status = seccomp_rule_add(ctx, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);      /* then clone is tried */
    for (size_t i = 0; !status && i < sizeof names / sizeof *names; i++)
        status = seccomp_rule_add(ctx, SCMP_ACT_ERRNO(EPERM), seccomp_syscall_resolve_name(names[i]), 0);
    if (!status)
        status = flags & VM_SANDBOX_KVM
                     ? seccomp_rule_add(ctx, SCMP_ACT_ERRNO(ENOTTY), SCMP_SYS(ioctl), 1, SCMP_A1(SCMP_CMP_MASKED_EQ, 0xff00, 0x5400))
                     : seccomp_rule_add(ctx, SCMP_ACT_ERRNO(ENOTTY), SCMP_SYS(ioctl), 0);
    return status;
}

VM_API int vm_sandbox_enter(unsigned flags)
{
    int status = 0;
    if (flags & ~(unsigned)ALL_FLAGS)
        return vm_fail(VM_E_INVALID, "vm_sandbox_enter: flags 0x%x", flags & ~(unsigned)ALL_FLAGS);
    bool has_errno = flags & VM_SANDBOX_ERRNO;
    scmp_filter_ctx ctx = seccomp_init(has_errno ? SCMP_ACT_ERRNO(EPERM) : SCMP_ACT_KILL_PROCESS);
    if (!ctx)
        return vm_fail(VM_E_NOMEM, "vm_sandbox_enter: no memory for the filter");
    for (unsigned i = 0; !status && i < CALLS; i++)
        if (is_allowed(&calls[i], flags))
            status = add(ctx, seccomp_syscall_resolve_name(calls[i].name), calls[i].check);
    /* The list of refusals says the same as the default when that is EPERM; libseccomp takes no such rules. */
    if (!status && !has_errno)
        status = add_refusals(ctx, flags);
    else if (!status)
        status = seccomp_rule_add(ctx, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);
    if (!status)
        status = seccomp_attr_set(ctx, SCMP_FLTATR_CTL_TSYNC, 1);
    if (!status)
        status = seccomp_load(ctx);
    seccomp_release(ctx);
    if (!status)
        return VM_OK;
    errno = -status;
    return vm_fail_errno(status == -ENOSYS || status == -EOPNOTSUPP ? VM_E_UNSUPPORTED : VM_E_HOST, "vm_sandbox_enter");
}
#else
VM_API int vm_sandbox_enter(unsigned flags)
{
    if (flags & ~(unsigned)ALL_FLAGS)
        return vm_fail(VM_E_INVALID, "vm_sandbox_enter: flags 0x%x", flags & ~(unsigned)ALL_FLAGS);
    return vm_fail(VM_E_UNSUPPORTED, "vm_sandbox_enter: this library was built without libseccomp");
}
#endif
