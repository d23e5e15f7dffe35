/* process.c - machines in a child of fork().
 *
 * The child has a copy of all that a machine is, but for two things. Its threads are not there, nor whoever held a
 * lock. And memory for code is mapped twice, hence shared: parent and child would write their translations over each
 * other's. A page that the host's kernel wipes in children tells where we are. What is shared is then made anew before
 * anything is written to it, which only runs do, and edits, all of which pass vm_pause().
 *
 * KVM's objects work in the process that made them alone. Guest memory that is a shared mapping of a file stays shared.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/core.h"
#include "core/doorbell.h"
#include "x86/native.h"

#include <sys/mman.h>

void vm_process_begin(vm_machine *m)
{
    atomic_store(&m->is_unnoticed, 1);
    m->is_here = &m->is_unnoticed;
}

void vm_process_enter(vm_machine *m, void *page)
{
    if (madvise(page, VM_PROCESS_PAGE, MADV_WIPEONFORK))
        return;                        /* a kernel before 4.14: children go unnoticed */
    m->is_here = page;
    atomic_store(m->is_here, 1);
}

static void free_lock(vm_lock *lock)
{
    if (lock->owner != vm_thread_self())
        *lock = (vm_lock){ .word = 0 };
}

/* The calling thread is the only one. */
static void forget_threads(vm_machine *m)
{
    free_lock(&m->lock);
    free_lock(&m->device_lock);
    if (!m->lock.owner)
        atomic_store(&m->pause_count, 0);
    atomic_store(&m->pause_waiters, 0);
    pthread_mutex_init(&m->trace_lock, NULL);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]->owner != vm_thread_self()) {
            atomic_store(&m->vcpus[i]->owner, 0);
            atomic_store(&m->vcpus[i]->state, VM_IDLE);
        }
    vm_clock_forked(m);
    vm_events_forked(m);
}

static int renew_code(vm_machine *m)
{
    if (m->options.backend == VM_BACKEND_KVM)
        return vm_fail(VM_E_UNSUPPORTED, "a machine on KVM is of the process that made it, and this is a fork of that");
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (!x86_native_renew(&m->vcpus[i]->x86))
            return vm_fail_errno(VM_E_NOMEM, "no memory for code after fork()");
    return vm_machine_renew(m);
}

int vm_process_adopt(vm_machine *m)
{
    if (vm_vcpu_self(m))
        return vm_fail(VM_E_BUSY, "the process was forked inside of a run of this machine");
    atomic_store(m->is_here, 1);       /* what follows edits the machine */
    forget_threads(m);
    int status = renew_code(m);
    if (status != VM_OK)
        atomic_store(m->is_here, 0);
    return status;
}

void vm_process_leave(vm_machine *m)
{
    if (!atomic_load(m->is_here))
        forget_threads(m);
    vm_process_begin(m);
}
