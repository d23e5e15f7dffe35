/* device.h - what answers port and device-memory accesses, and interrupts into the machine. */
#ifndef LIBVM_INCLUDE_DEVICE_H
#define LIBVM_INCLUDE_DEVICE_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Callbacks of a port or MMIO region. One access of the guest is one call at its true width: 1, 2, 4 or 8 bytes for
 * memory, 1, 2 or 4 for ports; `offset` counts from the region's start. Accesses need not be aligned; wider ones
 * (vector registers), and those that cross the region's end, come in several calls, lowest address first. `cpu` is
 * the vCPU that made the access, its registers exact and RIP at the current instruction.
 * Callbacks run on the vCPU's thread with the machine's device lock held, so two never run at once in one machine. They
 * may use memory, register, map and interrupt functions of the machine, and vm_vcpu_kick(); vm_vcpu_run() gives
 * VM_E_BUSY. A callback must not wait for another thread that edits the map or resets the machine: that one waits for
 * the callback. */
typedef struct vm_io_ops {
    uint32_t size;                      /* sizeof(vm_io_ops): VM_IO_OPS_INIT */
    /* Fill *value (bits beyond the width are ignored; preset to all ones) and return 0. A negative return means that
     * the device does not answer: the access becomes an exit (VM_EXIT_MMIO, VM_EXIT_IO), as when the callback is
     * NULL. */
    int  (*read)(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value);
    int  (*write)(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value);
    void (*reset)(void *user);                                  /* machine reset; optional */
    int  (*save)(void *user, void *buffer, size_t *bytes); /* snapshot support; optional. buffer NULL: only the size */
    int  (*restore)(void *user, const void *buffer, size_t bytes);
    void (*destroy)(void *user);                                /* the region is gone; optional */
    /* vm_fork(): make the device of the machine `copy`, *out will be its `user`; a negative return fails the fork.
     * Called once a region, with the device lock of the machine that is copied held. Optional. */
    int  (*clone)(void *user, vm_machine *copy, void **out);
} vm_io_ops;
#define VM_IO_OPS_INIT VM_STRUCT_INIT(vm_io_ops)

/* Sets a global system interrupt line of the PC platform (0-15: the ISA lines, to PIC and I/O APIC; 16-23: I/O APIC
 * only).
 * For an edge-triggered line a change from false to true is the interrupt. VM_E_INVALID no such line;
 * VM_E_UNSUPPORTED on BARE machines (use vm_vcpu_inject). Any thread. */
VM_API int vm_irq_set(vm_machine *m, unsigned gsi, bool level);

/* Sends a message-signalled interrupt: what a device would write to address 0xFEExxxxx (SDM vol. 3, "Message Signalled
 * Interrupts"). VM_E_INVALID address outside of that range; VM_E_UNSUPPORTED on BARE machines. Any thread. */
VM_API int vm_irq_msi(vm_machine *m, uint64_t address, uint32_t data);

/* ---- writes and interrupts without a callback ----
 * The same on every backend; on KVM the host's kernel serves them, without an exit of the guest. They stay with the
 * machine when it moves to another backend, and are not part of snapshots. */

/* A write of the guest that rings an eventfd. */
typedef struct vm_doorbell {
    uint32_t size;                      /* sizeof(vm_doorbell): VM_DOORBELL_INIT */
    int      fd;                        /* an eventfd; it may be closed after the call */
    uint64_t address;                   /* guest-physical address, not of RAM, or port */
    uint32_t width;                     /* bytes of the write: 1, 2, 4, 8; 0: any */
    bool     is_port;
    bool     has_match;                 /* only writes of `match` (with a width) */
    uint64_t match;
} vm_doorbell;
#define VM_DOORBELL_INIT VM_STRUCT_INIT(vm_doorbell)
#define VM_MAX_DOORBELLS 1024u

/* From now on such a write at exactly this address adds 1 to the eventfd, which poll() then shows to any thread, and does
 * nothing else: no callback, no exit. It works with and without a region there. Accesses of another width or value, and
 * reads, are as before. on = false takes it away again (all members must be those it was made with).
 * VM_E_INVALID bad member, or `fd` is no eventfd; VM_E_EXISTS the same write has a doorbell; VM_E_NOTFOUND nothing to take
 * away; VM_E_NOMEM, VM_E_HOST (descriptors, VM_MAX_DOORBELLS). Any thread, callbacks too. */
VM_API int vm_ioeventfd(vm_machine *m, const vm_doorbell *doorbell, bool on);

/* An eventfd that interrupts the guest: when its counter is not zero it is read (so set to zero) and line `gsi` gets one
 * edge. `fd` is read by a thread of the machine and may be closed by the caller after the call; a descriptor is one
 * source of interrupts. on = false: no longer (the edge of an earlier signal may still come).
 * VM_E_INVALID no such line, or `fd` is no eventfd; VM_E_EXISTS `fd` has a line; VM_E_NOTFOUND; VM_E_UNSUPPORTED on BARE
 * machines; VM_E_NOMEM, VM_E_HOST. Any thread. */
VM_API int vm_irqfd(vm_machine *m, int fd, unsigned gsi, bool on);
/* The same with a message-signalled interrupt, as vm_irq_msi(). Taken away by vm_irqfd(m, fd, 0, false). */
VM_API int vm_irqfd_msi(vm_machine *m, int fd, uint64_t address, uint32_t data);

/* Writes to [offset, offset + bytes) of a port or MMIO region may be collected instead of ending the guest's run one by
 * one: for registers that are only written, often, and with no effect that the guest waits for (a framebuffer, an index
 * register). Each still becomes one call of ops->write, in order, before the next callback of this machine that is not
 * collected and before vm_vcpu_run() returns; `cpu` is then some vCPU of the machine, whose registers are not those at the
 * write and must not be changed. Software backends call at once. Ends with on = false (same range) or with the region.
 * VM_E_INVALID the range is not inside the region, or the region has no write callback; VM_E_NOTFOUND no such region, or
 * no such range to end; VM_E_EXISTS. Any thread, callbacks too. */
VM_API int vm_coalesce(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, bool on);

#ifdef __cplusplus
}
#endif
#endif
