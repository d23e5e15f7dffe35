/* pc.h - VM_PLATFORM_PC as the rest of the library sees it: creation, the doors from the vCPU (interrupts, MSRs, CR8, INIT
 * and SIPI), consoles, and what boot loaders need to know about the memory map and the tables.
 *
 * Unless a function says otherwise it takes the device lock itself (the lock is recursive) and may be called from any thread.
 */
#ifndef LIBVM_PLATFORM_PC_H
#define LIBVM_PLATFORM_PC_H

#include "core/core.h"
#include "dev/dev.h"

/* The fixed map. RAM: [0, 0xA0000), [0xC0000, low_end), [4 GiB, ...); low_end is at most VM_PC_LOW_MAX. */
#define VM_PC_VGA_HOLE   UINT64_C(0xA0000)
#define VM_PC_SHADOW     UINT64_C(0xC0000)
#define VM_PC_TABLES     UINT64_C(0xE0000)     /* ACPI and MP tables for kernels booted without firmware: up to 1 MiB */
#define VM_PC_LOW_MAX    UINT64_C(0xC0000000)
#define VM_PC_IOAPIC     UINT64_C(0xFEC00000)
#define VM_PC_HPET       UINT64_C(0xFED00000)
#define VM_PC_APIC       UINT64_C(0xFEE00000)
#define VM_PC_HIGH       UINT64_C(0x100000000)
#define VM_PC_MIN_RAM    UINT64_C(0x100000)    /* vm_pc_create refuses less */

/* ---- life (called by lib/core) ----
 * create: after the vCPUs exist; maps RAM of options.ram_bytes and constructs every device. On failure what was mapped is
 * left for the machine's destruction, m->pc may be set, and vm_pc_destroy must still be called.
 * destroy: after the regions' destroy callbacks ran (they own the devices), before the clock goes away.
 * reset: devices, local APICs and glue, and every vCPU: vCPU 0 at the reset vector, the others parked. vCPUs do not run. */
int  vm_pc_create(vm_machine *m);
void vm_pc_destroy(vm_machine *m);
void vm_pc_reset(vm_machine *m);

/* The whole platform's state but RAM and vCPUs: every internal region with a save callback, and the wires between them. With
 * the world stopped and the device lock held, like the callbacks. save: buffer NULL asks for the size; restore: VM_E_FORMAT
 * when the state is not of such a machine (devices before the bad one are restored then: restore something good or reset). */
int  vm_pc_save(vm_machine *m, void *buffer, size_t *bytes);
int  vm_pc_restore(vm_machine *m, const void *buffer, size_t bytes);
int  vm_pc_copy_firmware(vm_machine *from, vm_machine *to);    /* fw_cfg items, which are not in it; device locks held */

/* ---- from the vCPU (its own thread) ---- */
/* INIT, SIPI and NMIs latched in cpu->init_pending, sipi_pending, nmis_latched; the run loop calls this when X86_ATT_EVENT was set, outside
 * guest code and with register state current. Changes cpu->is_parked. */
void vm_pc_vcpu_event(vm_vcpu *cpu);
/* MSRs 0x1b (APIC base), 0x6e0 (TSC deadline), 0x800-0x8ff (x2APIC). false: #GP. */
bool vm_pc_msr_read(vm_vcpu *cpu, uint32_t msr, uint64_t *value);
bool vm_pc_msr_write(vm_vcpu *cpu, uint32_t msr, uint64_t value);
uint8_t vm_pc_cr8_read(vm_vcpu *cpu);
void vm_pc_cr8_write(vm_vcpu *cpu, uint8_t value);
unsigned vm_pc_apic_id(vm_vcpu *cpu);
uint64_t vm_pc_apic_base(vm_vcpu *cpu);
void vm_pc_ferr(vm_vcpu *cpu);                        /* x87 error with CR0.NE = 0: IRQ 13 until port 0xf0 is written */

/* ---- interrupts from outside ---- */
/* gsi 0-15: ISA IRQs (PIC and I/O APIC; 0 is also I/O APIC pin 2); 16-23: I/O APIC only. VM_E_INVALID beyond. */
int  vm_pc_irq_set(vm_machine *m, unsigned gsi, bool level);
int  vm_pc_irq_msi(vm_machine *m, uint64_t address, uint32_t data);
void vm_pc_nmi(vm_machine *m);                        /* LINT1 of every local APIC */
void vm_pc_power_button(vm_machine *m);

/* ---- consoles ----
 * output: fn gets every byte the guest sends, under the device lock, on the thread of the vCPU that wrote; NULL: dropped.
 * input: appends to a bounded queue (64 KiB) that feeds the UART's FIFO as the guest drains it. Returns how many bytes were
 * taken (>= 0), VM_E_BUSY when the queue is full and none could be, VM_E_INVALID for a bad index. */
#define VM_PC_UARTS 4
int  vm_pc_serial_output(vm_machine *m, unsigned index, vm_console_fn fn, void *user);
/* Input of the host that waits before a serial port (VM_UART_QUEUE bytes at most), for replays. */
unsigned vm_pc_waiting(vm_machine *m, unsigned index, uint8_t *bytes);
bool vm_pc_set_waiting(vm_machine *m, unsigned index, const uint8_t *bytes, unsigned count);
int  vm_pc_serial_input(vm_machine *m, unsigned index, const uint8_t *bytes, size_t count);
/* Bytes written to port 0xe9 and to SeaBIOS' debug port 0x402. */
int  vm_pc_debugcon_output(vm_machine *m, vm_console_fn fn, void *user);

/* ---- for boot loaders (machine not running) ---- */
typedef struct vm_pc_e820_entry { uint64_t base, bytes; uint32_t type; } vm_pc_e820_entry;   /* type 1 RAM, 2 reserved */
unsigned vm_pc_e820(vm_machine *m, vm_pc_e820_entry *entries, unsigned max);                  /* how many were written */
/* Write ACPI and MP tables to RAM at VM_PC_TABLES (done once by vm_pc_create; a loader calls it again after using that
 * memory). Not for firmware, which takes them from fw_cfg. */
int  vm_pc_install_tables(vm_machine *m);
/* What firmware leaves behind in every vCPU and a kernel started without it expects: MTRRs. After a loader has set vCPU 0. */
void vm_pc_firmware_state(vm_machine *m);
uint64_t vm_pc_rsdp(vm_machine *m);                   /* gpa of the installed RSDP */
uint64_t vm_pc_low_end(vm_machine *m);                /* end of RAM below 4 GiB */
/* fw_cfg items for guests that look for them; data is copied. Keys: VM_FWCFG_* of dev.h. */
int  vm_pc_fwcfg_item(vm_machine *m, uint16_t key, const void *data, size_t bytes);
int  vm_pc_fwcfg_file(vm_machine *m, const char *name, const void *data, size_t bytes);

#endif
