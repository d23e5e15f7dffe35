/* pci.c - PCI configuration mechanism 1 at 0xcf8-0xcff for bus 0, with a host bridge, an ISA bridge and the
 * power management function beside it (PCI Local Bus 2.x, 3.2.2.3.2).
 *
 * 0xcf8 answers to 32-bit accesses; a byte written to 0xcf9 is the reset control register, handed to `reset_control`.
 * They carry the ids of the 440FX, PIIX3 and PIIX4, because firmware recognises the machine by them; the PAM registers are
 * kept and change nothing: memory between 0xC0000 and 1 MiB is always RAM. The power management function only tells where
 * its ports are (lib/dev/acpi.c and smbus.c serve them): UEFI firmware finds its timer that way.
 *
 * Invariant: config offsets are below 256 and an access never leaves its dword.
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { PCI_VERSION = 2 };
enum { HOST, ISA, PM, FIXED_FUNCTIONS };

struct vm_pci {
    vm_pci_function *slot[256];            /* by devfn */
    vm_pci_function fixed[FIXED_FUNCTIONS];
    struct { uint32_t version, address; uint8_t config[FIXED_FUNCTIONS][256]; } s;
    void (*reset_control)(void *target, uint8_t value);
    uint8_t (*reset_read)(void *target);
    void *target;
};

static void put16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }

static vm_pci_function *selected(vm_pci *pci)
{
    uint32_t a = pci->s.address;
    return a >> 31 && !(a >> 16 & 0xff) ? pci->slot[a >> 8 & 0xff] : NULL;
}

static int data_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    vm_pci *pci = user;
    (void)cpu;
    vm_pci_function *f = selected(pci);
    unsigned reg = (pci->s.address & 0xfc) + (unsigned)offset;
    uint64_t v = ~UINT64_C(0);
    if (f && offset + width <= 4) {
        v = 0;
        memcpy(&v, &f->config[reg], width);
    }
    *value = v;
    return VM_OK;
}

static int data_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_pci *pci = user;
    (void)cpu;
    vm_pci_function *f = selected(pci);
    unsigned reg = (pci->s.address & 0xfc) + (unsigned)offset;
    if (!f || offset + width > 4)
        return VM_OK;
    for (unsigned i = 0; i < width; i++) {
        uint8_t mask = f->mask[reg + i];
        f->config[reg + i] = (f->config[reg + i] & (uint8_t)~mask) | ((uint8_t)(value >> (8 * i)) & mask);
    }
    if (f->written)
        f->written(f, reg, width);
    return VM_OK;
}

static int address_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    vm_pci *pci = user;
    (void)cpu;
    if (width == 4 && offset == 0)
        *value = pci->s.address;
    else if (width == 1 && offset == 1 && pci->reset_read)
        *value = pci->reset_read(pci->target);
    else
        *value = ~UINT64_C(0);
    return VM_OK;
}

static int address_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_pci *pci = user;
    (void)cpu;
    if (width == 4 && offset == 0)
        pci->s.address = (uint32_t)value & 0x80fffffc;
    else if (width == 1 && offset == 1 && pci->reset_control)
        pci->reset_control(pci->target, (uint8_t)value);
    return VM_OK;
}

int vm_pci_add(vm_pci *pci, unsigned devfn, vm_pci_function *f)
{
    if (devfn > 255)
        return vm_fail(VM_E_INVALID, "PCI device and function number %u is above 255", devfn);
    if (pci->slot[devfn])
        return vm_fail(VM_E_EXISTS, "PCI 00:%02x.%u is taken", devfn >> 3, devfn & 7);
    pci->slot[devfn] = f;
    return VM_OK;
}

void vm_pci_remove(vm_pci *pci, unsigned devfn)
{
    if (devfn <= 255)
        pci->slot[devfn] = NULL;
}

void vm_pci_reset_control(vm_pci *pci, void (*write)(void *target, uint8_t value), uint8_t (*read)(void *target), void *target)
{
    pci->reset_control = write;
    pci->reset_read = read;
    pci->target = target;
}

static vm_pci_function *function(vm_pci *pci, unsigned which, uint16_t device, uint16_t command, uint16_t status, uint16_t class)
{
    vm_pci_function *f = &pci->fixed[which];
    memset(f, 0, sizeof *f);
    put16(f->config + 0x00, 0x8086);
    put16(f->config + 0x02, device);
    put16(f->config + 0x04, command);
    put16(f->config + 0x06, status);
    put16(f->config + 0x0a, class);
    return f;
}

static void functions(vm_pci *pci)
{
    vm_pci_function *f = function(pci, HOST, 0x1237, 0x0006, 0, 0x0600);
    f->config[0x08] = 0x02;
    put16(f->config + 0x2c, 0x1af4);       /* subsystem by which SeaBIOS knows machines with fw_cfg */
    put16(f->config + 0x2e, 0x1100);
    memset(f->mask + 0x59, 0xff, 7);       /* PAM */
    f->mask[0x72] = 0xff;                  /* SMRAM */
    f->config[0x72] = 0x02;
    f = function(pci, ISA, 0x7000, 0x0007, 0x0200, 0x0601);
    f->config[0x0e] = 0x80;                /* multifunction */
    memset(f->config + 0x60, 0x80, 4);     /* PIRQ routes: off */
    memset(f->mask + 0x60, 0xff, 4);
    f = function(pci, PM, 0x7113, 0x0001, 0x0280, 0x0680);
    f->config[0x08] = 0x03;
    put16(f->config + 0x40, VM_ACPI_PM_BASE | 1);
    f->config[0x5b] = 2;                   /* device activity B, APMC_EN: firmware sees that nobody waits for its SMI handler */
    f->config[0x80] = 1;                   /* the ports are decoded */
    put16(f->config + 0x90, VM_SMBUS_BASE | 1);
    f->config[0xd2] = 9;                   /* the SMBus host is on, its interrupt IRQ 9 */
    f->mask[0x3c] = 0xff;
}

static void pci_reset(void *user)
{
    vm_pci *pci = user;
    pci->s.version = PCI_VERSION;
    pci->s.address = 0;
    functions(pci);
}

static int pci_save(void *user, void *buffer, size_t *bytes)
{
    vm_pci *pci = user;
    for (unsigned i = 0; i < FIXED_FUNCTIONS; i++)
        memcpy(pci->s.config[i], pci->fixed[i].config, 256);
    return vm_dev_save(&pci->s, sizeof pci->s, buffer, bytes);
}

static int pci_restore(void *user, const void *buffer, size_t bytes)
{
    vm_pci *pci = user;
    int status = vm_dev_load(&pci->s, sizeof pci->s, PCI_VERSION, buffer, bytes);
    if (status)
        return status;
    pci->s.address &= 0x80fffffc;
    for (unsigned i = 0; i < FIXED_FUNCTIONS; i++)
        memcpy(pci->fixed[i].config, pci->s.config[i], 256);
    return VM_OK;
}

int vm_pci_new(vm_machine *m, vm_pci **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), address_read, address_write, pci_reset, pci_save, pci_restore, free };
    static const vm_io_ops data_ops = { .size = sizeof(vm_io_ops), .read = data_read, .write = data_write };
    vm_pci *pci = calloc(1, sizeof *pci);
    if (!pci)
        return vm_fail(VM_E_NOMEM, "PCI host bridge: out of memory");
    pci_reset(pci);
    pci->slot[0] = &pci->fixed[HOST];
    pci->slot[1 << 3] = &pci->fixed[ISA];
    pci->slot[1 << 3 | 3] = &pci->fixed[PM];
    int status = vm_add_pio(m, 0xcf8, 4, &ops, pci, NULL);
    if (status) {
        free(pci);
        return status;
    }
    *out = pci;
    return vm_add_pio(m, 0xcfc, 4, &data_ops, pci, NULL);
}
