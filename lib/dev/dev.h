/* dev.h - what a device sees: the bus it registers on, an IRQ line, a clock, guest-memory accessors. Nothing else.
 *
 * Every callback into a device runs under the machine's device_lock. A device never sees a backend or another device; it
 * raises lines and MSIs, and the platform has wired them.
 */
#ifndef LIBVM_DEV_H
#define LIBVM_DEV_H
#include "core/core.h"

/* A wire. `set` is called with the device lock held. */
typedef struct vm_line { void (*set)(void *target, unsigned pin, bool level); void *target; unsigned pin; } vm_line;
static inline void vm_line_set(const vm_line *l, bool level) { if (l->set) l->set(l->target, l->pin, level); }

/* Each constructor maps its registers on m's bus and returns VM_OK or a status; destruction goes through vm_io_ops.destroy of
 * its (last) region. */
typedef struct vm_pic vm_pic; typedef struct vm_pit vm_pit; typedef struct vm_ioapic vm_ioapic; typedef struct vm_lapic vm_lapic;
typedef struct vm_rtc vm_rtc; typedef struct vm_uart vm_uart; typedef struct vm_i8042 vm_i8042; typedef struct vm_pci vm_pci;
typedef struct vm_hpet vm_hpet; typedef struct vm_acpi vm_acpi; typedef struct vm_fwcfg vm_fwcfg;
#endif
