/* lock.c - the machine's locks, sleeping and waking vCPUs, and stopping the world.
 *
 * See core.h for the states of a vCPU and the order of locks. The rules kept here:
 *   - A vCPU's thread that has to wait for a lock says so (VM_BLOCKED) and so never holds up an edit.
 *   - It goes back to VM_GUEST only while the world is not stopped: store VM_GUEST, then look at pause_count; the
 *   stopping
 *     side counts up pause_count, then looks at the states. Both sides use sequentially consistent operations, so at
 *     least one of them sees the other.
 *   - A state word may be waited on (VM_WAITED); changing the state then wakes the waiters by the word's address
 *   alone, which
 *     is safe even if the machine is freed in between.
 */
#include "core/core.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void futex_wait(_Atomic int *word, int value, const struct timespec *until)
{
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, value, until, NULL, FUTEX_BITSET_MATCH_ANY);
}

static void futex_wake(_Atomic int *word)
{
    int saved = errno;                 /* called from signal handlers too */
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    errno = saved;
}

/* ---- vCPU states ---- */

static void set_state(vm_vcpu *cpu, int state)
{
    if (atomic_exchange(&cpu->state, state) & VM_WAITED)
        futex_wake(&cpu->state);
}

vm_vcpu *vm_vcpu_self(vm_machine *m)
{
    uintptr_t self = vm_thread_self();
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i] && atomic_load_explicit(&m->vcpus[i]->owner, memory_order_relaxed) == self)
            return m->vcpus[i];
    return NULL;
}

/* Wait until the world is not stopped, then be in VM_GUEST. */
static void enter_guest(vm_vcpu *cpu, int state_meanwhile)
{
    vm_machine *m = cpu->machine;
    for (;;) {
        set_state(cpu, VM_GUEST);
        int count = atomic_load(&m->pause_count);
        if (!count || (m->lock.owner == vm_thread_self()))
            return;
        set_state(cpu, state_meanwhile);
        atomic_fetch_add(&m->pause_waiters, 1);
        while ((count = atomic_load(&m->pause_count)) != 0)
            futex_wait(&m->pause_count, count, NULL);
        atomic_fetch_sub(&m->pause_waiters, 1);
    }
}

void vm_vcpu_safe_point(vm_vcpu *cpu)
{
    if (atomic_load(&cpu->machine->pause_count) == 0)
        return;
    set_state(cpu, VM_LOOP);
    enter_guest(cpu, VM_LOOP);
}

/* ---- locks ---- */

static bool try_lock(vm_lock *l)
{
    int free = 0;
    if (!atomic_compare_exchange_strong_explicit(&l->word, &free, 1, memory_order_acquire, memory_order_relaxed))
        return false;
    atomic_store_explicit(&l->owner, vm_thread_self(), memory_order_relaxed);
    l->depth = 1;
    return true;
}

static void lock_slow(vm_lock *l)
{
    for (int i = 0; i < 100; i++) {
        if (try_lock(l))
            return;
        __builtin_ia32_pause();
    }
    while (atomic_exchange_explicit(&l->word, 2, memory_order_acquire) != 0)
        futex_wait(&l->word, 2, NULL);
    atomic_store_explicit(&l->owner, vm_thread_self(), memory_order_relaxed);
    l->depth = 1;
}

static bool lock_again(vm_lock *l)
{
    if (atomic_load_explicit(&l->owner, memory_order_relaxed) != vm_thread_self())
        return false;
    l->depth++;
    return true;
}

static void unlock(vm_lock *l)
{
    if (--l->depth)
        return;
    atomic_store_explicit(&l->owner, 0, memory_order_relaxed);
    if (atomic_exchange_explicit(&l->word, 0, memory_order_release) == 2)
        futex_wake(&l->word);
}

static void lock_leaf(vm_lock *l)      /* held for a moment, nothing inside: no need to say BLOCKED */
{
    if (!try_lock(l))
        lock_slow(l);
}

void vm_device_lock(vm_machine *m)
{
    vm_lock *l = &m->device_lock;
    if (lock_again(l) || try_lock(l))
        return;
    vm_vcpu *self = vm_vcpu_self(m);
    if (!self || (atomic_load(&self->state) & ~VM_WAITED) != VM_GUEST) {
        lock_slow(l);
        return;
    }
    for (;;) {
        set_state(self, VM_BLOCKED);
        lock_slow(l);
        set_state(self, VM_GUEST);
        if (!atomic_load(&m->pause_count) || m->lock.owner == vm_thread_self())
            return;
        unlock(l);                     /* the world was stopped meanwhile: do not keep the lock from whoever did it */
        set_state(self, VM_BLOCKED);
        enter_guest(self, VM_BLOCKED);
        if (try_lock(l))
            return;
    }
}

void vm_device_unlock(vm_machine *m)
{
    unlock(&m->device_lock);
}

void vm_machine_lock(vm_machine *m)
{
    vm_lock *l = &m->lock;
    if (lock_again(l) || try_lock(l))
        return;
    vm_vcpu *self = vm_vcpu_self(m);
    if (!self || (atomic_load(&self->state) & ~VM_WAITED) != VM_GUEST) {
        lock_slow(l);
        return;
    }
    set_state(self, VM_BLOCKED);
    lock_slow(l);
    set_state(self, VM_GUEST);     /* the world stops under this lock only, so it is not stopped now */
}

void vm_machine_unlock(vm_machine *m)
{
    unlock(&m->lock);
}

/* ---- stopping the world ---- */

void vm_pause(vm_machine *m)
{
    (void)vm_process_check(m);         /* if it fails, runs will say so */
    vm_machine_lock(m);
    if (atomic_fetch_add(&m->pause_count, 1) != 0)
        return;                        /* nested */
    uintptr_t self = vm_thread_self();
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        if (cpu && cpu->owner != self && (atomic_load(&cpu->state) & ~VM_WAITED) == VM_GUEST)
            vm_vcpu_notify(cpu, X86_ATT_REQUEST);
    }
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        if (!cpu || cpu->owner == self)
            continue;
        int state;
        while (((state = atomic_load(&cpu->state)) & ~VM_WAITED) == VM_GUEST && cpu->owner != self) {
            if (!(state & VM_WAITED) && !atomic_compare_exchange_strong(&cpu->state, &state, VM_GUEST | VM_WAITED))
                continue;
            futex_wait(&cpu->state, VM_GUEST | VM_WAITED, NULL);
        }
    }
}

void vm_resume(vm_machine *m)
{
    if (atomic_fetch_sub(&m->pause_count, 1) == 1 && atomic_load(&m->pause_waiters))
        futex_wake(&m->pause_count);
    vm_machine_unlock(m);
}

/* ---- running, sleeping, waking ---- */

bool vm_vcpu_claim(vm_vcpu *cpu)
{
    int idle = VM_IDLE;
    if (!atomic_compare_exchange_strong(&cpu->state, &idle, VM_GUEST))
        return false;
    atomic_store_explicit(&cpu->owner, vm_thread_self(), memory_order_relaxed);
    if (atomic_load(&cpu->machine->pause_count))
        vm_vcpu_safe_point(cpu);
    return true;
}

void vm_vcpu_release(vm_vcpu *cpu)
{
    atomic_store_explicit(&cpu->owner, 0, memory_order_relaxed);
    set_state(cpu, VM_IDLE);         /* the machine may be gone from here on */
}

void vm_vcpu_wait_idle(vm_vcpu *cpu)
{
    int state;
    while (((state = atomic_load(&cpu->state)) & ~VM_WAITED) != VM_IDLE) {
        if (!(state & VM_WAITED) && !atomic_compare_exchange_strong(&cpu->state, &state, state | VM_WAITED))
            continue;
        futex_wait(&cpu->state, state | VM_WAITED, NULL);
    }
}

void vm_vcpu_notify(vm_vcpu *cpu, uint32_t attention_bits)
{
    atomic_fetch_or(&cpu->x86.attention, attention_bits);
    if (atomic_load(&cpu->asleep))
        futex_wake((_Atomic int *)&cpu->x86.attention);
    if (cpu->machine->backend->kick && (atomic_load(&cpu->state) & ~VM_WAITED) == VM_GUEST)
        cpu->machine->backend->kick(cpu);
}

void vm_vcpu_sleep(vm_vcpu *cpu, uint64_t until_ns)
{
    struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u) };
    set_state(cpu, VM_LOOP);
    atomic_store(&cpu->asleep, 1);
    if (atomic_load(&cpu->x86.attention) == 0)
        futex_wait((_Atomic int *)&cpu->x86.attention, 0, until_ns == UINT64_MAX ? NULL : &until);
    atomic_store(&cpu->asleep, 0);
    enter_guest(cpu, VM_LOOP);
}

void vm_vcpu_request(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes)
{
    lock_leaf(&cpu->request_lock);
    if (cpu->request_count < VM_REQUESTS) {
        cpu->requests[cpu->request_count].gpa = gpa;
        cpu->requests[cpu->request_count].bytes = bytes;
    }
    if (cpu->request_count <= VM_REQUESTS)
        cpu->request_count++;
    unlock(&cpu->request_lock);
    vm_vcpu_notify(cpu, X86_ATT_REQUEST);
}

void vm_vcpu_take_requests(vm_vcpu *cpu)
{
    const vm_backend_ops *backend = cpu->machine->backend;
    lock_leaf(&cpu->request_lock);
    unsigned count = cpu->request_count;
    cpu->request_count = 0;
    if (count > VM_REQUESTS && backend->flush_code)
        backend->flush_code(cpu);
    else if (backend->code_changed)
        for (unsigned i = 0; i < count && i < VM_REQUESTS; i++)
            backend->code_changed(cpu, cpu->requests[i].gpa, cpu->requests[i].bytes);
    unlock(&cpu->request_lock);
}
