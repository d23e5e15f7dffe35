/* doorbell.c - eventfds rung by the guest, eventfds that interrupt it, zones of collected writes. See doorbell.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/doorbell.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

static struct vm_events *events_of(vm_machine *m)
{
    if (!m->events && !(m->events = calloc(1, sizeof *m->events)))
        vm_fail(VM_E_NOMEM, "no memory for eventfds");
    return m->events;
}

/* Writing to or reading from anything else could do harm. */
static int own_eventfd(const char *function, int fd, int *out)
{
    char path[40], target[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = fd < 0 ? -1 : readlink(path, target, sizeof target - 1);
    target[n > 0 ? n : 0] = 0;
    if (strcmp(target, "anon_inode:[eventfd]"))
        return vm_fail(VM_E_INVALID, "%s: descriptor %d is no eventfd", function, fd);
    *out = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return *out < 0 ? vm_fail_errno(VM_E_HOST, function) : VM_OK;
}

/* Room for one more element of `bytes`; false: no memory. */
static bool grow(void **array, unsigned count, size_t bytes)
{
    if (count & (count - 1))
        return true;
    void *grown = realloc(*array, (count ? count * 2 : 1) * bytes);
    if (grown)
        *array = grown;
    return grown != NULL;
}

/* ---- rung by the guest ---- */

/* Adds 1 without ever waiting: a counter at its end stays there, as in the kernel. */
static void ring(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLOUT };
    const uint64_t one = 1;
    int saved = errno;
    if (poll(&p, 1, 0) == 1 && (p.revents & POLLOUT)) {
        ssize_t n = write(fd, &one, sizeof one);
        (void)n;
    }
    errno = saved;
}

bool vm_doorbell_ring(const vm_machine *m, bool is_port, uint64_t at, unsigned n, uint64_t value)
{
    const struct vm_events *e = m->events;
    uint64_t mask = n < 8 ? (UINT64_C(1) << 8 * n) - 1 : ~UINT64_C(0);
    for (unsigned i = 0; i < e->bell_count; i++) {
        const vm_doorbell *d = &e->bells[i].d;
        if (d->address == at && d->is_port == is_port && (!d->width || d->width == n) &&
            (!d->has_match || ((d->match ^ value) & mask) == 0)) {
            ring(e->bells[i].fd);
            return true;
        }
    }
    return false;
}

static bool is_same_write(const vm_doorbell *a, const vm_doorbell *b)
{
    return a->address == b->address && a->is_port == b->is_port && a->width == b->width &&
           a->has_match == b->has_match && (!a->has_match || a->match == b->match);
}

static void tell(vm_machine *m, const vm_bell *b, bool on)
{
    if (m->backend->doorbell)
        m->backend->doorbell(m, &b->d, b->fd, on);
}

static int add_bell(vm_machine *m, struct vm_events *e, const vm_doorbell *d)
{
    int fd;
    for (unsigned i = 0; i < e->bell_count; i++)
        if (is_same_write(&e->bells[i].d, d))
            return vm_fail(VM_E_EXISTS, "vm_ioeventfd: that write at 0x%llx rings already",
                           (unsigned long long)d->address);
    if (e->bell_count == VM_MAX_DOORBELLS)
        return vm_fail(VM_E_HOST, "vm_ioeventfd: %u doorbells are the most", VM_MAX_DOORBELLS);
    int status = own_eventfd("vm_ioeventfd", d->fd, &fd);
    if (status != VM_OK)
        return status;
    if (!grow((void **)&e->bells, e->bell_count, sizeof *e->bells)) {
        close(fd);
        return vm_fail(VM_E_NOMEM, "no memory for a doorbell");
    }
    e->bells[e->bell_count] = (vm_bell){ .d = *d, .fd = fd };
    tell(m, &e->bells[e->bell_count++], true);
    return VM_OK;
}

static int remove_bell(vm_machine *m, struct vm_events *e, const vm_doorbell *d)
{
    for (unsigned i = 0; i < e->bell_count; i++) {
        vm_bell *b = &e->bells[i];
        if (!is_same_write(&b->d, d) || b->d.fd != d->fd)
            continue;
        tell(m, b, false);
        close(b->fd);
        memmove(b, b + 1, (--e->bell_count - i) * sizeof *b);
        return VM_OK;
    }
    return vm_fail(VM_E_NOTFOUND, "vm_ioeventfd: no such doorbell at 0x%llx", (unsigned long long)d->address);
}

int vm_doorbell_set(vm_machine *m, const vm_doorbell *d, bool on)
{
    vm_pause(m);
    struct vm_events *e = events_of(m);
    int status = !e ? VM_E_NOMEM : on ? add_bell(m, e, d) : remove_bell(m, e, d);
    vm_resume(m);
    return status;
}

/* ---- collected writes ---- */

static void tell_zone(vm_machine *m, const vm_zone *z, bool on)
{
    if (m->backend->coalesce)
        m->backend->coalesce(m, z->region->kind == VM_REGION_PIO, z->region->gpa + z->offset, z->bytes, on);
}

static void drop_zone(vm_machine *m, struct vm_events *e, unsigned i)
{
    tell_zone(m, &e->zones[i], false);
    memmove(&e->zones[i], &e->zones[i + 1], (--e->zone_count - i) * sizeof *e->zones);
}

static int add_zone(vm_machine *m, struct vm_events *e, vm_zone z)
{
    for (unsigned i = 0; i < e->zone_count; i++)
        if (e->zones[i].region == z.region && z.offset < e->zones[i].offset + e->zones[i].bytes &&
            e->zones[i].offset < z.offset + z.bytes)
            return vm_fail(VM_E_EXISTS, "vm_coalesce: part of the range at offset 0x%llx is collected already",
                           (unsigned long long)z.offset);
    if (!grow((void **)&e->zones, e->zone_count, sizeof *e->zones))
        return vm_fail(VM_E_NOMEM, "no memory for a range of collected writes");
    e->zones[e->zone_count++] = z;
    tell_zone(m, &z, true);
    return VM_OK;
}

static int remove_zone(vm_machine *m, struct vm_events *e, vm_zone z)
{
    for (unsigned i = 0; i < e->zone_count; i++)
        if (e->zones[i].region == z.region && e->zones[i].offset == z.offset && e->zones[i].bytes == z.bytes) {
            drop_zone(m, e, i);
            return VM_OK;
        }
    return vm_fail(VM_E_NOTFOUND, "vm_coalesce: no such range at offset 0x%llx", (unsigned long long)z.offset);
}

int vm_zone_set(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, bool on)
{
    vm_zone z = { .region = r, .offset = offset, .bytes = bytes };
    vm_pause(m);
    struct vm_events *e = events_of(m);
    int status = !e ? VM_E_NOMEM : on ? add_zone(m, e, z) : remove_zone(m, e, z);
    vm_resume(m);
    return status;
}

void vm_zones_forget(vm_machine *m, const vm_region *r)
{
    struct vm_events *e = m->events;
    for (unsigned i = e ? e->zone_count : 0; i-- > 0;)
        if (e->zones[i].region == r)
            drop_zone(m, e, i);
}

void vm_events_announce(vm_machine *m)
{
    struct vm_events *e = m->events;
    for (unsigned i = 0; e && i < e->bell_count; i++)
        tell(m, &e->bells[i], true);
    for (unsigned i = 0; e && i < e->zone_count; i++)
        tell_zone(m, &e->zones[i], true);
}

/* ---- interrupts ----
 * One thread waits for all descriptors; `lock` guards the list and is held for nothing long. */

typedef struct irqfd {
    struct irqfd *next;
    int given, fd;                     /* the caller's number, our own descriptor */
    bool is_msi;
    uint64_t address;                  /* or the line */
    uint32_t data;
} irqfd;

struct vm_irqfds {
    pthread_t thread;
    pthread_mutex_t lock;
    int epoll, stop;
    irqfd *first;
};

/* What to do for a descriptor that can be read; false: nothing. */
static bool take(struct vm_irqfds *s, int fd, irqfd *out)
{
    bool is_taken = false;
    uint64_t count;
    struct iovec v = { &count, sizeof count };
    pthread_mutex_lock(&s->lock);
    for (irqfd *q = s->first; q; q = q->next)
        if (q->fd == fd && preadv2(fd, &v, 1, -1, RWF_NOWAIT) == sizeof count) {      /* else somebody else read it */
            *out = *q;
            is_taken = true;
        }
    pthread_mutex_unlock(&s->lock);
    return is_taken;
}

static void interrupt(vm_machine *m, const irqfd *q)
{
    if (q->is_msi) {
        (void)vm_irq_msi(m, q->address, q->data);
    } else {
        (void)vm_irq_set(m, (unsigned)q->address, true);
        (void)vm_irq_set(m, (unsigned)q->address, false);
    }
}

static void *irqfd_thread(void *arg)
{
    vm_machine *m = arg;
    struct vm_irqfds *s = m->events->irqfds;
    struct epoll_event got;
    for (;;) {
        if (epoll_wait(s->epoll, &got, 1, -1) < 1)
            continue;
        if (got.data.fd == s->stop)
            return NULL;
        irqfd q;
        if (take(s, got.data.fd, &q))
            interrupt(m, &q);          /* without the lock: this waits for the device lock */
    }
}

static int watch(struct vm_irqfds *s, int fd)
{
    struct epoll_event e = { .events = EPOLLIN, .data.fd = fd };
    return epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &e) == 0 ? VM_OK : vm_fail_errno(VM_E_HOST, "epoll_ctl");
}

/* Takes no signals: those are for the host's own threads. */
static int start_thread(vm_machine *m, struct vm_irqfds *s)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&s->thread, NULL, irqfd_thread, m);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    errno = error;
    return error ? vm_fail_errno(VM_E_HOST, "no thread for eventfds") : VM_OK;
}

static void free_irqfds(struct vm_irqfds *s)
{
    while (s->first) {
        irqfd *q = s->first;
        s->first = q->next;
        close(q->fd);
        free(q);
    }
    if (s->epoll >= 0)
        close(s->epoll);
    if (s->stop >= 0)
        close(s->stop);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static int make_irqfds(vm_machine *m)
{
    struct vm_irqfds *s = calloc(1, sizeof *s);
    if (!s)
        return vm_fail(VM_E_NOMEM, "no memory for eventfds");
    pthread_mutex_init(&s->lock, NULL);
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    s->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int status = s->epoll < 0 || s->stop < 0 ? vm_fail_errno(VM_E_HOST, "descriptors for eventfds") : watch(s, s->stop);
    m->events->irqfds = s;
    if (status == VM_OK)
        status = start_thread(m, s);
    if (status != VM_OK) {
        m->events->irqfds = NULL;
        free_irqfds(s);
    }
    return status;
}

static int add_irqfd(struct vm_irqfds *s, const irqfd *proto)
{
    irqfd *q = malloc(sizeof *q);
    if (!q)
        return vm_fail(VM_E_NOMEM, "no memory for an eventfd");
    *q = *proto;
    int status = own_eventfd("vm_irqfd", q->given, &q->fd);
    if (status == VM_OK && (status = watch(s, q->fd)) != VM_OK)
        close(q->fd);
    if (status != VM_OK) {
        free(q);
        return status;
    }
    q->next = s->first;
    s->first = q;
    return VM_OK;
}

static irqfd **find_irqfd(struct vm_irqfds *s, int fd)
{
    irqfd **at = &s->first;
    while (*at && (*at)->given != fd)
        at = &(*at)->next;
    return at;
}

static int change_irqfd(struct vm_irqfds *s, const irqfd *proto, bool on)
{
    irqfd **at = find_irqfd(s, proto->given), *q = *at;
    if (on)
        return q ? vm_fail(VM_E_EXISTS, "vm_irqfd: descriptor %d interrupts already", proto->given)
                 : add_irqfd(s, proto);
    if (!q)
        return vm_fail(VM_E_NOTFOUND, "vm_irqfd: descriptor %d does not interrupt", proto->given);
    epoll_ctl(s->epoll, EPOLL_CTL_DEL, q->fd, NULL);
    *at = q->next;
    close(q->fd);
    free(q);
    return VM_OK;
}

int vm_irqfd_set(vm_machine *m, int fd, bool is_msi, uint64_t address, uint32_t data, bool on)
{
    const irqfd proto = { .given = fd, .is_msi = is_msi, .address = address, .data = data };
    vm_machine_lock(m);
    int status = events_of(m) ? VM_OK : VM_E_NOMEM;
    if (status == VM_OK && !m->events->irqfds)
        status = on ? make_irqfds(m) : vm_fail(VM_E_NOTFOUND, "vm_irqfd: descriptor %d does not interrupt", fd);
    struct vm_irqfds *s = status == VM_OK ? m->events->irqfds : NULL;
    vm_machine_unlock(m);
    if (!s)
        return status;
    pthread_mutex_lock(&s->lock);
    status = change_irqfd(s, &proto, on);
    pthread_mutex_unlock(&s->lock);
    return status;
}

/* ---- the end ---- */

void vm_events_stop(vm_machine *m)
{
    struct vm_irqfds *s = m->events ? m->events->irqfds : NULL;
    if (!s)
        return;
    (void)eventfd_write(s->stop, 1);
    pthread_join(s->thread, NULL);
    m->events->irqfds = NULL;
    free_irqfds(s);
}

void vm_events_forked(vm_machine *m)
{
    if (m->events && m->events->irqfds)
        free_irqfds(m->events->irqfds);
    if (m->events)
        m->events->irqfds = NULL;
}

void vm_events_free(vm_machine *m)
{
    struct vm_events *e = m->events;
    if (!e)
        return;
    for (unsigned i = 0; i < e->bell_count; i++)
        close(e->bells[i].fd);
    free(e->bells);
    free(e->zones);
    free(e);
    m->events = NULL;
}
