/* dev.h - what a device sees: the bus it registers on, an IRQ line, a clock, guest-memory accessors. Nothing else.
 *
 * Every callback into a device runs under the machine's device_lock. A device never sees a backend or another device; it
 * raises lines and MSIs, and the platform has wired them.
 *
 * Saved state: each device keeps everything the guest can see in one plain struct that starts with a version word; save
 * copies it out, restore checks size and version, bounds every index in it and re-arms timers. Times in it are guest time.
 */
#ifndef LIBVM_DEV_H
#define LIBVM_DEV_H
#include "core/core.h"

/* What a pulse on a wire would do now: reach a CPU, melt into one that still waits, or nothing. Periodic sources use it to
 * deliver late ticks one by one. */
typedef enum vm_line_state { VM_LINE_FREE, VM_LINE_PENDING, VM_LINE_MASKED } vm_line_state;

/* A wire. `set` is called with the device lock held. */
typedef struct vm_line {
    void (*set)(void *target, unsigned pin, bool level);
    void *target;
    unsigned pin;
    vm_line_state (*state)(void *target, unsigned pin);      /* optional */
} vm_line;
static inline void vm_line_set(const vm_line *l, bool level) { if (l->set) l->set(l->target, l->pin, level); }
static inline vm_line_state vm_line_look(const vm_line *l) { return l->state ? l->state(l->target, l->pin) : VM_LINE_FREE; }

/* Each constructor maps its registers on m's bus and returns VM_OK or a status; destruction goes through vm_io_ops.destroy of
 * its first region. A constructor that fails after that region exists leaves the device to the machine's destruction. */
typedef struct vm_pic vm_pic; typedef struct vm_pit vm_pit; typedef struct vm_ioapic vm_ioapic; typedef struct vm_lapic vm_lapic;
typedef struct vm_rtc vm_rtc; typedef struct vm_uart vm_uart; typedef struct vm_i8042 vm_i8042; typedef struct vm_pci vm_pci;
typedef struct vm_hpet vm_hpet; typedef struct vm_acpi vm_acpi; typedef struct vm_fwcfg vm_fwcfg;
typedef struct vm_apics vm_apics; typedef struct vm_misc vm_misc;

/* ---- common.c: what devices share ---- */
/* vm_io_ops.save/restore over one plain state struct whose first member is a uint32_t version. */
int vm_dev_save(const void *state, size_t state_bytes, void *buffer, size_t *bytes);
int vm_dev_load(void *state, size_t state_bytes, uint32_t version, const void *buffer, size_t bytes);
/* Split an access of any width into byte accesses for devices that have byte registers. */
int vm_dev_read8(uint8_t (*get)(void *dev, unsigned reg), void *dev, uint64_t offset, unsigned width, uint64_t *value);
int vm_dev_write8(void (*put)(void *dev, unsigned reg, uint8_t value), void *dev, uint64_t offset, unsigned width, uint64_t value);
/* Defines NAME_read and NAME_write for vm_io_ops from byte functions NAME_get and NAME_put. */
#define VM_DEV_BYTE_IO(name)                                                                                    \
    static int name##_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value) {        \
        (void)cpu;                                                                                              \
        return vm_dev_read8(name##_get, user, offset, width, value);                                            \
    }                                                                                                           \
    static int name##_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value) {        \
        (void)cpu;                                                                                              \
        return vm_dev_write8(name##_put, user, offset, width, value);                                           \
    }
/* Ticks of a clock of hz in ns of guest time and back (rounded up), without overflow. */
uint64_t vm_ticks_from_ns(uint64_t ns, uint64_t hz);
uint64_t vm_ns_from_ticks(uint64_t ticks, uint64_t hz);

/* Late ticks of a periodic source. `due` counts edges that time has brought and the guest has not seen; it is capped at about
 * a second's worth so that a host that slept does not cause a storm. */
typedef struct vm_ticker { uint64_t next_ns, period_ns, due; } vm_ticker;
#define VM_TICK_MIN_NS UINT64_C(20000)
void vm_ticker_advance(vm_ticker *t, uint64_t now);            /* count the edges up to now */
uint64_t vm_ticker_wake(const vm_ticker *t, uint64_t now);     /* when to look again */

/* ---- pic8259.c ---- */
int vm_pic_new(vm_machine *m, vm_line intr, vm_pic **out);
void vm_pic_set(void *pic, unsigned irq, bool level);
int vm_pic_peek(const vm_pic *pic);                            /* vector an INTA would give, -1: INTR is low */
int vm_pic_acknowledge(vm_pic *pic);                           /* INTA: vector; spurious IRQ 7 when nothing is left */
vm_line_state vm_pic_state(const vm_pic *pic, unsigned irq);

/* ---- pit8254.c: channels 0-2 and port 0x61 ---- */
int vm_pit_new(vm_machine *m, vm_line irq, vm_pit **out);

/* ---- lapic.c ---- */
/* A message on the APIC bus (SDM vol. 3, 11.6, 11.11). */
enum { VM_APIC_FIXED, VM_APIC_LOWEST, VM_APIC_SMI, VM_APIC_REMOTE_READ, VM_APIC_NMI, VM_APIC_INIT, VM_APIC_SIPI, VM_APIC_EXTINT };
typedef struct vm_apic_msg { uint32_t dest; uint8_t vector, mode; bool is_logical, is_level, is_asserted, is_x2apic; } vm_apic_msg;
/* One local APIC a vCPU, their bus, and the page they appear at. eoi: a level interrupt's vector was completed. */
int vm_apics_new(vm_machine *m, void (*eoi)(void *target, uint8_t vector), void *target, vm_apics **out);
void vm_apics_set_pic(vm_apics *a, vm_pic *pic);               /* who answers ExtINT */
void vm_apics_reset(vm_apics *a);
bool vm_apics_send(vm_apics *a, const vm_apic_msg *msg);       /* false: nobody took it */
bool vm_apics_is_pending(vm_apics *a, const vm_apic_msg *msg); /* its vector still waits in a target's IRR */
void vm_apics_lint0(void *apics, unsigned unused, bool level); /* the PIC's INTR */
void vm_apics_restore_intr(vm_apics *a, bool level);           /* the level INTR had when the state was saved; no edge */
void vm_apics_direct_intr(vm_apics *a, bool direct);           /* IMCR in PIC mode: INTR goes to vCPU 0 past its APIC */
void vm_apics_nmi(vm_apics *a);                                /* LINT1 everywhere */
bool vm_apics_takes_pic(vm_apics *a);                          /* the PIC's INTR would be seen by some vCPU */
int vm_lapic_pending(vm_vcpu *cpu);                            /* vm_irq_source.pending: no lock needed */
int vm_lapic_acknowledge(vm_vcpu *cpu);
void vm_lapic_init(vm_lapic *l);                               /* INIT: all but the base and the id */
bool vm_lapic_msr_read(vm_lapic *l, uint32_t msr, uint64_t *value);
bool vm_lapic_msr_write(vm_lapic *l, uint32_t msr, uint64_t value);
uint8_t vm_lapic_tpr(const vm_lapic *l);
void vm_lapic_set_tpr(vm_lapic *l, uint8_t tpr);
uint32_t vm_lapic_id(const vm_lapic *l);
uint64_t vm_lapic_base(const vm_lapic *l);
vm_apic_msg vm_apic_msi(uint64_t address, uint32_t data);      /* decode an MSI write */

/* ---- ioapic.c ---- */
#define VM_IOAPIC_PINS 24
typedef struct vm_apic_bus {                                   /* where an I/O APIC sends */
    bool (*send)(void *target, const vm_apic_msg *msg);
    bool (*is_pending)(void *target, const vm_apic_msg *msg);
    void *target;
} vm_apic_bus;
int vm_ioapic_new(vm_machine *m, uint64_t gpa, vm_apic_bus bus, vm_ioapic **out);
void vm_ioapic_set(void *ioapic, unsigned pin, bool level);
void vm_ioapic_eoi(void *ioapic, uint8_t vector);
vm_line_state vm_ioapic_state(const vm_ioapic *io, unsigned pin);

/* ---- rtc.c: MC146818 and CMOS at 0x70-0x73 ---- */
int vm_rtc_new(vm_machine *m, vm_line irq, int64_t unix_seconds, vm_rtc **out);
void vm_rtc_set_cell(vm_rtc *rtc, unsigned index, uint8_t value);   /* the platform's cells: memory size and the like */

/* ---- uart16550.c ---- */
int vm_uart_new(vm_machine *m, uint16_t port, vm_line irq, vm_uart **out);
void vm_uart_output(vm_uart *u, vm_console_fn fn, void *user);
int vm_uart_input(vm_uart *u, const uint8_t *bytes, size_t count);  /* taken, or VM_E_BUSY */
/* The host's input that waits for room in the receiver: copies it out, at most VM_UART_QUEUE bytes; puts other in its place
 * (false: no memory). For replays; snapshots leave it to the host. */
#define VM_UART_QUEUE 65536
unsigned vm_uart_waiting(const vm_uart *u, uint8_t *bytes);
bool vm_uart_set_waiting(vm_uart *u, const uint8_t *bytes, unsigned count);

/* ---- i8042.c ---- */
int vm_i8042_new(vm_machine *m, vm_line irq1, vm_line irq12, vm_i8042 **out);

/* ---- pci.c: configuration mechanism 1, the host bridge, and functions added to bus 0 ---- */
typedef struct vm_pci_function {
    void *user;
    uint8_t config[256], mask[256];        /* mask: writable bits */
    void (*written)(struct vm_pci_function *f, unsigned offset, unsigned width);   /* after a config write; optional */
} vm_pci_function;
int vm_pci_new(vm_machine *m, vm_pci **out);
int vm_pci_add(vm_pci *pci, unsigned devfn, vm_pci_function *f);   /* the caller keeps f alive; VM_E_EXISTS when taken */
void vm_pci_remove(vm_pci *pci, unsigned devfn);
/* Who answers byte accesses to 0xcf9, in the middle of the address register. */
void vm_pci_reset_control(vm_pci *pci, void (*write)(void *target, uint8_t value), uint8_t (*read)(void *target), void *target);

/* ---- hpet.c ---- */
int vm_hpet_new(vm_machine *m, uint64_t gpa, const vm_line pins[32], void (*legacy)(void *target, bool on), void *target,
                vm_hpet **out);            /* legacy: LEG_RT_CNF changed; timers 0, 1 then use pins 0 and 8 */

/* ---- acpi.c: PM1a event/control, PM timer, GPE0, SMI command port ---- */
#define VM_ACPI_PM_BASE 0x600
#define VM_ACPI_GPE_BASE 0xafe0
int vm_acpi_new(vm_machine *m, vm_line sci, vm_acpi **out);
void vm_acpi_power_button(vm_acpi *a);
void vm_acpi_rtc(vm_acpi *a);              /* the RTC asserts its interrupt, wherever that goes */

/* ---- smbus.c: an empty SMBus ---- */
#define VM_SMBUS_BASE 0xb100
int vm_smbus_new(vm_machine *m);

/* ---- fwcfg.c ---- */
enum { VM_FWCFG_SIGNATURE = 0x00, VM_FWCFG_ID = 0x01, VM_FWCFG_UUID = 0x02, VM_FWCFG_RAM_SIZE = 0x03, VM_FWCFG_NOGRAPHIC = 0x04,
       VM_FWCFG_NB_CPUS = 0x05, VM_FWCFG_KERNEL_ADDR = 0x07, VM_FWCFG_KERNEL_SIZE = 0x08, VM_FWCFG_CMDLINE_OLD = 0x09,
       VM_FWCFG_INITRD_ADDR = 0x0a, VM_FWCFG_INITRD_SIZE = 0x0b, VM_FWCFG_BOOT_DEVICE = 0x0c, VM_FWCFG_NUMA = 0x0d,
       VM_FWCFG_BOOT_MENU = 0x0e, VM_FWCFG_MAX_CPUS = 0x0f, VM_FWCFG_KERNEL_ENTRY = 0x10, VM_FWCFG_KERNEL_DATA = 0x11,
       VM_FWCFG_INITRD_DATA = 0x12, VM_FWCFG_CMDLINE_ADDR = 0x13, VM_FWCFG_CMDLINE_SIZE = 0x14, VM_FWCFG_CMDLINE_DATA = 0x15,
       VM_FWCFG_SETUP_ADDR = 0x16, VM_FWCFG_SETUP_SIZE = 0x17, VM_FWCFG_SETUP_DATA = 0x18, VM_FWCFG_FILE_DIR = 0x19,
       VM_FWCFG_IRQ0_OVERRIDE = 0x8002, VM_FWCFG_E820 = 0x8003, VM_FWCFG_HPET = 0x8004 };
int vm_fwcfg_new(vm_machine *m, vm_fwcfg **out);
int vm_fwcfg_item(vm_fwcfg *f, uint16_t key, const void *data, size_t bytes);      /* copies; replaces */
int vm_fwcfg_copy(vm_fwcfg *to, const vm_fwcfg *from);                             /* every item */
int vm_fwcfg_file(vm_fwcfg *f, const char *name, const void *data, size_t bytes);  /* copies; replaces by name */

/* ---- misc.c: ports with a bit or two behind them ---- */
int vm_misc_new(vm_machine *m, void (*imcr)(void *target, bool symmetric), vm_line fpu_irq, void *target, vm_misc **out);
void vm_misc_debugcon(vm_misc *d, vm_console_fn fn, void *user);
void vm_misc_ferr(vm_misc *d);
void vm_misc_reset_control(vm_misc *d, uint8_t value);         /* a write to port 0xcf9 */
uint8_t vm_misc_reset_read(vm_misc *d);
#endif
