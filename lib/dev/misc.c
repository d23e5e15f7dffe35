/* misc.c - ports with a bit or two behind them: POST code (0x80) and DMA page registers, fast A20 and reset (0x92), interrupt
 * mode (IMCR, 0x22-0x23), x87 error (0xf0), exit device (0xf4), debug consoles (0xe9, 0x402), reset control (0xcf9, reached
 * through the PCI bridge).
 *
 * The exit device posts the value written as the exit's code (QEMU's would make (value << 1) | 1 of it).
 */
#include "dev/dev.h"
#include <stdlib.h>

enum { MISC_VERSION = 1 };

struct vm_misc {
    vm_machine *machine;
    void (*imcr)(void *target, bool symmetric);
    void *target;
    vm_line fpu_irq;
    vm_console_fn fn;
    void *fn_user;
    struct { uint32_t version; uint8_t page[16], port92, imcr_select, imcr, reset; } s;
};

static uint8_t page_get(void *dev, unsigned reg) { return reg < 16 ? ((vm_misc *)dev)->s.page[reg] : 0xff; }
static void page_put(void *dev, unsigned reg, uint8_t value)
{
    if (reg < 16)
        ((vm_misc *)dev)->s.page[reg] = value;
}

static uint8_t port92_get(void *dev, unsigned reg) { (void)reg; return ((vm_misc *)dev)->s.port92; }
static void port92_put(void *dev, unsigned reg, uint8_t value)
{
    vm_misc *d = dev;
    (void)reg;
    bool rose = (value & 1) && !(d->s.port92 & 1);
    d->s.port92 = value & 0x03;
    if (rose)
        vm_machine_event(d->machine, VM_EXIT_RESET, 0);
}

static uint8_t imcr_get(void *dev, unsigned reg)
{
    vm_misc *d = dev;
    return reg == 1 && d->s.imcr_select == 0x70 ? d->s.imcr : 0xff;
}
static void imcr_put(void *dev, unsigned reg, uint8_t value)
{
    vm_misc *d = dev;
    if (reg == 0) {
        d->s.imcr_select = value;
    } else if (d->s.imcr_select == 0x70) {
        d->s.imcr = value & 1;
        d->imcr(d->target, d->s.imcr);
    }
}

static uint8_t fpu_get(void *dev, unsigned reg) { (void)dev; (void)reg; return 0xff; }
static void fpu_put(void *dev, unsigned reg, uint8_t value)
{
    (void)reg;
    (void)value;
    vm_line_set(&((vm_misc *)dev)->fpu_irq, false);
}
void vm_misc_ferr(vm_misc *d) { vm_line_set(&d->fpu_irq, true); }

static uint8_t console_get(void *dev, unsigned reg) { (void)dev; (void)reg; return 0xe9; }
static void console_put(void *dev, unsigned reg, uint8_t value)
{
    vm_misc *d = dev;
    if (reg == 0 && d->fn)
        d->fn(d->fn_user, &value, 1);
}
void vm_misc_debugcon(vm_misc *d, vm_console_fn fn, void *user)
{
    d->fn = fn;
    d->fn_user = user;
}

VM_DEV_BYTE_IO(page)
VM_DEV_BYTE_IO(port92)
VM_DEV_BYTE_IO(imcr)
VM_DEV_BYTE_IO(fpu)
VM_DEV_BYTE_IO(console)

static int exit_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user; (void)cpu; (void)offset; (void)width;
    *value = 0;
    return VM_OK;
}
static int exit_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_misc *d = user;
    (void)cpu;
    (void)offset;
    uint64_t mask = width >= 8 ? UINT64_MAX : (UINT64_C(1) << (8 * width)) - 1;
    vm_machine_event(d->machine, VM_EXIT_GUEST_EXIT, value & mask);
    return VM_OK;
}

/* 0xcf9: bit 1 hard reset, bit 2 do it (on its rise). */
void vm_misc_reset_control(vm_misc *d, uint8_t value)
{
    bool rose = (value & 4) && !(d->s.reset & 4);
    d->s.reset = value & 0x0e;
    if (rose)
        vm_machine_event(d->machine, VM_EXIT_RESET, 0);
}
uint8_t vm_misc_reset_read(vm_misc *d) { return d->s.reset; }

static void misc_reset(void *user)
{
    vm_misc *d = user;
    d->s.version = MISC_VERSION;
    for (unsigned i = 0; i < 16; i++)
        d->s.page[i] = 0;
    d->s.port92 = 2;                       /* A20 open */
    d->s.imcr_select = 0;
    d->s.imcr = 1;                         /* INTR through local APIC 0 (virtual wire) */
    d->s.reset = 0;
    vm_line_set(&d->fpu_irq, false);
    d->imcr(d->target, true);
}

static int misc_save(void *user, void *buffer, size_t *bytes)
{
    vm_misc *d = user;
    return vm_dev_save(&d->s, sizeof d->s, buffer, bytes);
}

static int misc_restore(void *user, const void *buffer, size_t bytes)
{
    vm_misc *d = user;
    int status = vm_dev_load(&d->s, sizeof d->s, MISC_VERSION, buffer, bytes);
    if (!status)
        d->imcr(d->target, d->s.imcr & 1);
    return status;
}

int vm_misc_new(vm_machine *m, void (*imcr)(void *target, bool symmetric), vm_line fpu_irq, void *target, vm_misc **out)
{
    static const vm_io_ops page_ops = { sizeof(vm_io_ops), page_read, page_write, misc_reset, misc_save, misc_restore, free };
    static const struct { uint16_t port, count; vm_io_ops ops; } ports[] = {
        { 0x92, 1, { .size = sizeof(vm_io_ops), .read = port92_read, .write = port92_write } },
        { 0x22, 2, { .size = sizeof(vm_io_ops), .read = imcr_read, .write = imcr_write } },
        { 0xf0, 2, { .size = sizeof(vm_io_ops), .read = fpu_read, .write = fpu_write } },
        { 0xf4, 4, { .size = sizeof(vm_io_ops), .read = exit_read, .write = exit_write } },
        { 0xe9, 1, { .size = sizeof(vm_io_ops), .read = console_read, .write = console_write } },
        { 0x402, 1, { .size = sizeof(vm_io_ops), .read = console_read, .write = console_write } },
    };
    vm_misc *d = calloc(1, sizeof *d);
    if (!d)
        return vm_fail(VM_E_NOMEM, "system ports: out of memory");
    d->machine = m;
    d->imcr = imcr;
    d->target = target;
    d->fpu_irq = fpu_irq;
    misc_reset(d);
    int status = vm_add_pio(m, 0x80, 16, &page_ops, d, NULL);
    if (status) {
        free(d);
        return status;
    }
    *out = d;
    for (unsigned i = 0; i < sizeof ports / sizeof *ports && !status; i++)
        status = vm_add_pio(m, ports[i].port, ports[i].count, &ports[i].ops, d, NULL);
    return status;
}
