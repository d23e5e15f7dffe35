/* sandbox.h - giving up what running machines does not need.
 *
 * A guest that found a way out of its machine would have the process's rights. After vm_sandbox_enter() those are few: a
 * filter in the host's kernel (seccomp) allows the system calls that running and serving machines takes, at most
 * VM_SANDBOX_CALLS of them, with arguments checked where that says more; docs/sandbox.md lists them. What is not allowed
 * ends the process (SIGSYS), or with VM_SANDBOX_ERRNO fails with EPERM.
 *
 * It cannot be undone, and threads and programs started later are under it too. All threads of the process enter.
 */
#ifndef LIBVM_INCLUDE_SANDBOX_H
#define LIBVM_INCLUDE_SANDBOX_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VM_SANDBOX_CALLS 50u            /* system calls allowed at most, whatever the flags */

/* What else is wanted; a set of bits. Without any: machines that exist can be run, changed, snapshotted in memory, forked and
 * destroyed, new ones made on the software backends; descriptors that are open can be read and written. */
typedef enum vm_sandbox_flags {
    VM_SANDBOX_KVM = 1,                 /* machines on KVM that exist: KVM's ioctls, timers. Making one means opening a file, and
                                           opening files fails (EPERM) in any case: VM_E_UNSUPPORTED */
    VM_SANDBOX_THREADS = 2,             /* new threads: one a vCPU, and the one that a PC has */
    VM_SANDBOX_SOCKETS = 4,             /* accept, send and receive on sockets that exist (a debugger's stub) */
    VM_SANDBOX_ERRNO = 8                /* what is not allowed fails with EPERM instead of ending the process */
} vm_sandbox_flags;

/* Enters the sandbox.
 * VM_E_INVALID unknown flags; VM_E_UNSUPPORTED the library was built without libseccomp, or the host's kernel has no
 * filters; VM_E_HOST the kernel refused, nothing has changed; VM_E_NOMEM. Call it once: what it takes to enter is not allowed
 * inside. */
VM_API int vm_sandbox_enter(unsigned flags);

/* The i-th system call that these flags allow, by name; NULL past the last. Static text; needs no libseccomp. */
VM_API const char *vm_sandbox_call(unsigned flags, unsigned i);

#ifdef __cplusplus
}
#endif
#endif
