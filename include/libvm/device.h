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

#ifdef __cplusplus
}
#endif
#endif
