/* ioapic.c - the 82093AA I/O APIC with 24 pins, plus the EOI register of version 0x20 parts.
 *
 * Pins see whether a line is asserted; the polarity bit is kept for the guest and otherwise means nothing. Per the data
 * sheet an edge on a masked pin is lost, and a level pin with remote IRR set waits for the EOI of its vector.
 */
#include "dev/dev.h"
#include <stdlib.h>

enum { IOAPIC_VERSION = 1 };
#define ENTRY_REMOTE_IRR (UINT64_C(1) << 14)
#define ENTRY_LEVEL      (UINT64_C(1) << 15)
#define ENTRY_MASKED     (UINT64_C(1) << 16)
#define ENTRY_READ_ONLY  (ENTRY_REMOTE_IRR | UINT64_C(1) << 12)

struct vm_ioapic {
    vm_apic_bus bus;
    struct { uint32_t version, id, select, lines; uint64_t entry[VM_IOAPIC_PINS]; } s;
};

static vm_apic_msg message(uint64_t entry)
{
    return (vm_apic_msg){ .dest = (uint32_t)(entry >> 56), .vector = (uint8_t)entry, .mode = entry >> 8 & 7,
                          .is_logical = entry >> 11 & 1, .is_level = entry >> 15 & 1, .is_asserted = true };
}

static void service_level(vm_ioapic *io, unsigned pin)
{
    uint64_t e = io->s.entry[pin];
    if (!(e & ENTRY_LEVEL) || (e & (ENTRY_MASKED | ENTRY_REMOTE_IRR)) || !(io->s.lines >> pin & 1))
        return;
    vm_apic_msg msg = message(e);
    if (io->bus.send(io->bus.target, &msg) && (msg.mode == VM_APIC_FIXED || msg.mode == VM_APIC_LOWEST))
        io->s.entry[pin] |= ENTRY_REMOTE_IRR;
}

void vm_ioapic_set(void *ioapic, unsigned pin, bool level)
{
    vm_ioapic *io = ioapic;
    if (pin >= VM_IOAPIC_PINS)
        return;
    bool rose = level && !(io->s.lines >> pin & 1);
    io->s.lines = (io->s.lines & ~(1u << pin)) | (uint32_t)level << pin;
    uint64_t e = io->s.entry[pin];
    if (e & ENTRY_LEVEL) {
        service_level(io, pin);
    } else if (rose && !(e & ENTRY_MASKED)) {
        vm_apic_msg msg = message(e);
        io->bus.send(io->bus.target, &msg);
    }
}

vm_line_state vm_ioapic_state(const vm_ioapic *io, unsigned pin)
{
    if (pin >= VM_IOAPIC_PINS || (io->s.entry[pin] & ENTRY_MASKED))
        return VM_LINE_MASKED;
    vm_apic_msg msg = message(io->s.entry[pin]);
    return io->bus.is_pending(io->bus.target, &msg) ? VM_LINE_PENDING : VM_LINE_FREE;
}

void vm_ioapic_eoi(void *ioapic, uint8_t vector)
{
    vm_ioapic *io = ioapic;
    for (unsigned pin = 0; pin < VM_IOAPIC_PINS; pin++) {
        if ((uint8_t)io->s.entry[pin] == vector && (io->s.entry[pin] & ENTRY_LEVEL)) {
            io->s.entry[pin] &= ~ENTRY_REMOTE_IRR;
            service_level(io, pin);
        }
    }
}

static uint32_t read_selected(const vm_ioapic *io)
{
    unsigned reg = io->s.select;
    if (reg == 0 || reg == 2)
        return io->s.id << 24;                     /* id; arbitration id follows it */
    if (reg == 1)
        return 0x20 | (VM_IOAPIC_PINS - 1) << 16;
    if (reg >= 0x10 && reg < 0x10 + 2 * VM_IOAPIC_PINS) {
        uint64_t e = io->s.entry[(reg - 0x10) / 2];
        return reg & 1 ? (uint32_t)(e >> 32) : (uint32_t)e;
    }
    return 0;
}

static void write_selected(vm_ioapic *io, uint32_t value)
{
    unsigned reg = io->s.select;
    if (reg == 0)
        io->s.id = value >> 24 & 15;
    if (reg < 0x10 || reg >= 0x10 + 2 * VM_IOAPIC_PINS)
        return;
    unsigned pin = (reg - 0x10) / 2;
    uint64_t *e = &io->s.entry[pin];
    if (reg & 1) {
        *e = (uint32_t)*e | (uint64_t)(value & 0xff000000) << 32;
        return;
    }
    *e = (*e & ~(UINT64_C(0x1ffff) & ~ENTRY_READ_ONLY)) | (value & 0x1ffff & ~ENTRY_READ_ONLY);
    if (!(*e & ENTRY_LEVEL))
        *e &= ~ENTRY_REMOTE_IRR;                   /* how kernels clear a stuck pin: edge, then level again */
    service_level(io, pin);
}

static int ioapic_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    vm_ioapic *io = user;
    (void)cpu;
    (void)width;
    uint64_t reg = offset & 0xfc;
    uint32_t v = reg == 0 ? io->s.select : reg == 0x10 ? read_selected(io) : 0;
    *value = v >> (8 * (offset & 3));
    return VM_OK;
}

static int ioapic_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_ioapic *io = user;
    (void)cpu;
    (void)width;
    if (offset == 0)
        io->s.select = (uint8_t)value;
    else if (offset == 0x10)
        write_selected(io, (uint32_t)value);
    else if (offset == 0x40)
        vm_ioapic_eoi(io, (uint8_t)value);
    return VM_OK;
}

static void ioapic_reset(void *user)
{
    vm_ioapic *io = user;
    io->s.version = IOAPIC_VERSION;
    io->s.id = io->s.select = 0;
    for (unsigned i = 0; i < VM_IOAPIC_PINS; i++)
        io->s.entry[i] = ENTRY_MASKED;             /* lines keep their level: their sources reset themselves */
}

static int ioapic_save(void *user, void *buffer, size_t *bytes)
{
    vm_ioapic *io = user;
    return vm_dev_save(&io->s, sizeof io->s, buffer, bytes);
}

static int ioapic_restore(void *user, const void *buffer, size_t bytes)
{
    vm_ioapic *io = user;
    int status = vm_dev_load(&io->s, sizeof io->s, IOAPIC_VERSION, buffer, bytes);
    io->s.select &= 0xff;
    return status;
}

int vm_ioapic_new(vm_machine *m, uint64_t gpa, vm_apic_bus bus, vm_ioapic **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), ioapic_read, ioapic_write, ioapic_reset, ioapic_save, ioapic_restore, free };
    vm_ioapic *io = calloc(1, sizeof *io);
    if (!io)
        return vm_fail(VM_E_NOMEM, "I/O APIC: out of memory");
    io->bus = bus;
    ioapic_reset(io);
    int status = vm_add_mmio(m, gpa, 0x1000, &ops, io, NULL);
    if (status) {
        free(io);
        return status;
    }
    *out = io;
    return VM_OK;
}
