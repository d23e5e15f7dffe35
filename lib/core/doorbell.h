/* doorbell.h - writes that ring an eventfd, eventfds that interrupt, writes that may be collected.
 *
 * The lists belong to the machine. Doorbells and zones are edited while the world is stopped, so vCPUs read them without
 * a lock; a backend that can serve them by itself is told of each (vm_backend_ops.doorbell, .coalesce) and may ignore it,
 * because what reaches the bus all the same is served there. Interrupts by eventfd are one thread's work (doorbell.c),
 * made with the first of them.
 */
#ifndef LIBVM_CORE_DOORBELL_H
#define LIBVM_CORE_DOORBELL_H

#include "core/core.h"

typedef struct vm_bell { vm_doorbell d; int fd; } vm_bell;               /* fd: our own descriptor */
typedef struct vm_zone { vm_region *region; uint64_t offset, bytes; } vm_zone;
struct vm_irqfds;
struct vm_events {
    vm_bell *bells;
    unsigned bell_count;
    vm_zone *zones;
    unsigned zone_count;
    struct vm_irqfds *irqfds;          /* NULL until the first */
};

/* A write that nobody's RAM takes: true when a doorbell took it. On the vCPU's thread. */
bool vm_doorbell_ring(const vm_machine *m, bool is_port, uint64_t at, unsigned n, uint64_t value);
int  vm_doorbell_set(vm_machine *m, const vm_doorbell *d, bool on);
int  vm_zone_set(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, bool on);
void vm_zones_forget(vm_machine *m, const vm_region *r);                 /* the region goes; under machine->lock */
int  vm_irqfd_set(vm_machine *m, int fd, bool is_msi, uint64_t address, uint32_t data, bool on);
/* A new backend: tell it what there is. */
void vm_events_announce(vm_machine *m);
void vm_events_forked(vm_machine *m);                                    /* the thread is another process' */
void vm_events_stop(vm_machine *m);                                      /* destruction: first the thread, */
void vm_events_free(vm_machine *m);                                      /* last the lists */

#endif
