/* clock.c - guest time and timers.
 *
 * PC machines: time is CLOCK_MONOTONIC since creation, and one thread per machine fires timers under the device lock, as
 * long as some vCPU runs; the first run makes it: hundreds of clones that wait for their turn cost nothing. Time goes on
 * meanwhile.
 * BARE machines: time is vCPU 0's retired instructions, one nanosecond each, plus what vm_clock_advance() added; timers
 * fire from vCPU 0's run loop, which cuts its slices at the next deadline.
 *
 * Lock order: device_lock, then clock->lock. A timer is freed with the device lock held (or with the machine at its
 * end), and fires with it held: so it cannot go away while its function runs, except by its own doing.
 */
#include "core/core.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

struct vm_timer {
    vm_machine *machine;
    void (*fn)(void *user);
    void *user;
    uint64_t deadline;                 /* guest time; UINT64_MAX: off */
    vm_timer *next, **link;
};

struct vm_clock {
    uint64_t start_ns;                 /* host time of guest time 0 (PC) */
    uint64_t advanced;                 /* BARE; under lock */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    vm_timer *timers;                  /* unsorted: a machine has a dozen */
    pthread_t thread;
    _Atomic bool has_thread;           /* written under lock */
    bool is_ending;
    _Atomic bool is_parked;            /* the thread waits for a vCPU to run */
    bool is_virtual;                   /* counts instructions: BARE, and a PC that records or replays */
    uint64_t tsc_base, tsc_time;       /* is_virtual and tsc_is_host: the TSC at a guest time */
};

uint64_t vm_host_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t vm_clock_now(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    if (!c->is_virtual)
        return vm_host_now() - c->start_ns;
    return vm_vcpu_retired_now(m->vcpus[0]) + __atomic_load_n(&c->advanced, __ATOMIC_RELAXED);
}

bool vm_clock_is_real(const vm_machine *m) { return !m->clock->is_virtual; }

uint64_t vm_clock_tsc(vm_machine *m)
{
    const struct vm_clock *c = m->clock;
    if (m->tsc_is_host && c->is_virtual)
        return c->tsc_base + (uint64_t)((unsigned __int128)(vm_clock_now(m) - c->tsc_time) * m->tsc_hz / 1000000000u);
    if (m->tsc_is_host)
        return __builtin_ia32_rdtsc() + m->tsc_offset;
    return vm_clock_now(m);            /* VM_TSC_HZ is 1 GHz */
}

void vm_clock_set(vm_machine *m, uint64_t now, uint64_t tsc)
{
    struct vm_clock *c = m->clock;
    if (c->is_virtual) {
        __atomic_store_n(&c->advanced, now - m->vcpus[0]->x86.retired, __ATOMIC_RELAXED);
        c->tsc_base = tsc;
        c->tsc_time = now;
        return;
    }
    pthread_mutex_lock(&c->lock);
    c->start_ns = vm_host_now() - now;
    if (m->tsc_is_host)
        m->tsc_offset = tsc - __builtin_ia32_rdtsc();
    pthread_cond_signal(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

void vm_clock_virtual(vm_machine *m, bool on)
{
    struct vm_clock *c = m->clock;
    uint64_t now = vm_clock_now(m), tsc = vm_clock_tsc(m);
    if (on)
        vm_clock_stop(m);
    c->is_virtual = on;
    vm_clock_set(m, now, tsc);
}

void vm_clock_skip(vm_machine *m, uint64_t ns)
{
    __atomic_fetch_add(&m->clock->advanced, ns, __ATOMIC_RELAXED);
}

/* ---- firing ---- */

/* Earliest deadline; clock->lock held. */
static uint64_t next_deadline(const struct vm_clock *c)
{
    uint64_t next = UINT64_MAX;
    for (const vm_timer *t = c->timers; t; t = t->next)
        if (t->deadline < next)
            next = t->deadline;
    return next;
}

/* Take one timer that is due; NULL: none. */
static vm_timer *take_due(struct vm_clock *c, uint64_t now)
{
    vm_timer *due = NULL;
    pthread_mutex_lock(&c->lock);
    for (vm_timer *t = c->timers; t; t = t->next)
        if (t->deadline <= now && (!due || t->deadline < due->deadline))
            due = t;
    if (due)
        due->deadline = UINT64_MAX;
    pthread_mutex_unlock(&c->lock);
    return due;
}

static void fire_due(vm_machine *m)
{
    vm_timer *t;
    vm_device_lock(m);
    uint64_t now = vm_clock_now(m);    /* once: a timer that is armed in the past again waits for the next round */
    while ((t = take_due(m->clock, now)) != NULL)
        t->fn(t->user);
    vm_device_unlock(m);
}

uint64_t vm_clock_next(vm_machine *m)
{
    pthread_mutex_lock(&m->clock->lock);
    uint64_t next = next_deadline(m->clock);
    pthread_mutex_unlock(&m->clock->lock);
    return next;
}

unsigned vm_clock_deadlines(vm_machine *m, uint64_t *deadlines, unsigned room)
{
    unsigned n = 0;
    pthread_mutex_lock(&m->clock->lock);
    for (const vm_timer *t = m->clock->timers; t; t = t->next, n++)
        if (n < room)
            deadlines[n] = t->deadline;
    pthread_mutex_unlock(&m->clock->lock);
    return n;
}

void vm_clock_set_deadlines(vm_machine *m, const uint64_t *deadlines, unsigned count)
{
    unsigned n = 0;
    pthread_mutex_lock(&m->clock->lock);
    for (vm_timer *t = m->clock->timers; t && n < count; t = t->next)
        t->deadline = deadlines[n++];
    pthread_cond_signal(&m->clock->changed);
    pthread_mutex_unlock(&m->clock->lock);
}

void vm_clock_fire(vm_machine *m)
{
    fire_due(m);
}

static bool is_any_running(const vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i]))
            return true;
    return false;
}

/* Until a vCPU runs, or something changes. clock->lock held, so that vm_clock_resume() comes before the question or after
 * the wait has begun. */
static void park(const vm_machine *m, struct vm_clock *c)
{
    atomic_store(&c->is_parked, true);
    if (!is_any_running(m))
        pthread_cond_wait(&c->changed, &c->lock);
    atomic_store(&c->is_parked, false);
}

static void *clock_thread(void *arg)
{
    vm_machine *m = arg;
    struct vm_clock *c = m->clock;
    pthread_mutex_lock(&c->lock);
    while (!c->is_ending) {
        if (!is_any_running(m)) {
            park(m, c);
            continue;
        }
        uint64_t next = next_deadline(c), now = vm_clock_now(m);
        if (next == UINT64_MAX) {
            pthread_cond_wait(&c->changed, &c->lock);
        } else if (next > now) {
            uint64_t at = next > UINT64_MAX / 2 ? UINT64_MAX / 2 : next + c->start_ns;
            struct timespec until = { .tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u) };
            pthread_cond_timedwait(&c->changed, &c->lock, &until);
        } else {
            pthread_mutex_unlock(&c->lock);
            fire_due(m);
            pthread_mutex_lock(&c->lock);
        }
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* The thread takes no signals: those are for the host's own threads. */
static int start(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&c->thread, NULL, clock_thread, m);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    c->has_thread = error == 0;
    errno = error;
    return error ? vm_fail_errno(VM_E_HOST, "no thread for the timers") : VM_OK;
}

int vm_clock_resume(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    int status = VM_OK;
    if (c->is_virtual || (atomic_load(&c->has_thread) && !atomic_load(&c->is_parked)))
        return VM_OK;
    pthread_mutex_lock(&c->lock);
    if (!c->has_thread)
        status = start(m);
    pthread_mutex_unlock(&c->lock);
    pthread_cond_signal(&c->changed);  /* without the lock, which the thread wants first */
    return status;
}

uint64_t vm_clock_poll(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    if (!__atomic_load_n(&c->timers, __ATOMIC_ACQUIRE))
        return UINT64_MAX;
    pthread_mutex_lock(&c->lock);
    uint64_t next = next_deadline(c);
    pthread_mutex_unlock(&c->lock);
    if (next > vm_clock_now(m))
        return next;
    fire_due(m);
    pthread_mutex_lock(&c->lock);
    next = next_deadline(c);
    pthread_mutex_unlock(&c->lock);
    return next;
}

void vm_clock_advance(vm_machine *m, uint64_t ns)
{
    uint64_t end = vm_clock_now(m) + ns;
    for (uint64_t now; (now = vm_clock_now(m)) <= end;) {
        uint64_t next = vm_clock_poll(m);                /* fires what is due now */
        if (next <= now)
            continue;                                    /* armed again for now */
        uint64_t step = (next < end ? next : end) - now;
        if (now == end)
            break;
        __atomic_fetch_add(&m->clock->advanced, step, __ATOMIC_RELAXED);
    }
}

/* ---- timers ---- */

vm_timer *vm_timer_new(vm_machine *m, void (*fn)(void *user), void *user)
{
    struct vm_clock *c = m->clock;
    vm_timer *t = malloc(sizeof *t);
    if (!t)
        return NULL;
    pthread_mutex_lock(&c->lock);
    *t = (vm_timer){ .machine = m, .fn = fn, .user = user, .deadline = UINT64_MAX, .next = c->timers,
                      .link = &c->timers };
    if (t->next)
        t->next->link = &t->next;
    __atomic_store_n(&c->timers, t, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&c->lock);
    return t;
}

void vm_timer_set(vm_timer *t, uint64_t deadline_ns)
{
    vm_machine *m = t->machine;
    struct vm_clock *c = m->clock;
    pthread_mutex_lock(&c->lock);
    bool is_sooner = deadline_ns < next_deadline(c);
    t->deadline = deadline_ns;
    bool is_virtual = c->is_virtual;
    if (is_sooner && !is_virtual)
        pthread_cond_signal(&c->changed);
    pthread_mutex_unlock(&c->lock);
    if (is_virtual && is_sooner)
        vm_vcpu_notify(m->vcpus[0], X86_ATT_IRQ);        /* its slice may be too long now */
}

void vm_timer_free(vm_timer *t)
{
    if (!t)
        return;
    struct vm_clock *c = t->machine->clock;
    pthread_mutex_lock(&c->lock);
    *t->link = t->next;
    if (t->next)
        t->next->link = t->link;
    pthread_mutex_unlock(&c->lock);
    free(t);
}

/* ---- life ---- */

static void init_lock(struct vm_clock *c)
{
    pthread_condattr_t attr;
    pthread_mutex_init(&c->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->changed, &attr);
    pthread_condattr_destroy(&attr);
}

int vm_clock_create(vm_machine *m)
{
    struct vm_clock *c = calloc(1, sizeof *c);
    if (!c)
        return vm_fail(VM_E_NOMEM, "no memory for the clock");
    init_lock(c);
    c->start_ns = vm_host_now();
    c->is_virtual = !m->is_pc;
    m->clock = c;
    return VM_OK;
}

void vm_clock_stop(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    if (!c || !c->has_thread)
        return;
    pthread_mutex_lock(&c->lock);
    c->is_ending = true;
    pthread_cond_signal(&c->changed);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    c->has_thread = c->is_ending = false;
}

void vm_clock_forked(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    if (!c)
        return;
    init_lock(c);
    c->has_thread = c->is_parked = c->is_ending = false;
}

void vm_clock_destroy(vm_machine *m)
{
    struct vm_clock *c = m->clock;
    if (!c)
        return;
    vm_clock_stop(m);
    while (c->timers)
        vm_timer_free(c->timers);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
    free(c);
    m->clock = NULL;
}
