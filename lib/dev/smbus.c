/* smbus.c - the SMBus host of the power management function (82371AB data sheet, 7.3): a bus with nothing on it. Systems look
 * for memory modules and sensors there; each command ends at once with "no device answered".
 *
 * The registers lie at VM_SMBUS_BASE; where, and that they are on, stands in configuration registers 0x90 and 0xd2 of the
 * function (pci.c).
 */
#include "dev/dev.h"
#include <stdlib.h>

enum { SMBUS_VERSION = 1 };
enum { REG_STATUS, REG_SLAVE_STATUS, REG_CONTROL, REG_COMMAND, REG_ADDRESS, REG_DATA0, REG_DATA1, REG_BLOCK, REG_SLAVE_CONTROL };
enum { STS_ALL = 0x1e, STS_DEVICE_ERROR = 1 << 2, STS_FAILED = 1 << 4, CNT_KILL = 1 << 1, CNT_START = 1 << 6, REGISTERS = 14 };

typedef struct vm_smbus { struct { uint32_t version; uint8_t reg[REGISTERS]; } s; } vm_smbus;

static uint8_t smbus_get(void *dev, unsigned reg)
{
    return reg < REGISTERS && reg != REG_BLOCK ? ((vm_smbus *)dev)->s.reg[reg] : 0;
}

static void write_control(uint8_t *reg, uint8_t value)
{
    reg[REG_CONTROL] = value & (uint8_t)~CNT_START;            /* reads as 0 */
    if (value & CNT_KILL)
        reg[REG_STATUS] |= STS_FAILED;
    else if (value & CNT_START)
        reg[REG_STATUS] |= STS_DEVICE_ERROR;
}

static void smbus_put(void *dev, unsigned reg, uint8_t value)
{
    uint8_t *r = ((vm_smbus *)dev)->s.reg;
    switch (reg) {
    case REG_STATUS: r[REG_STATUS] &= (uint8_t)~(value & STS_ALL); break;
    case REG_CONTROL: write_control(r, value); break;
    case REG_COMMAND: case REG_ADDRESS: case REG_DATA0: case REG_DATA1: case REG_SLAVE_CONTROL: r[reg] = value; break;
    default: break;                                            /* nobody speaks to this host, no block of data comes */
    }
}

VM_DEV_BYTE_IO(smbus)

static void smbus_reset(void *user)
{
    vm_smbus *b = user;
    *b = (vm_smbus){ .s.version = SMBUS_VERSION };
}

static int smbus_save(void *user, void *buffer, size_t *bytes)
{
    vm_smbus *b = user;
    return vm_dev_save(&b->s, sizeof b->s, buffer, bytes);
}

static int smbus_restore(void *user, const void *buffer, size_t bytes)
{
    vm_smbus *b = user;
    return vm_dev_load(&b->s, sizeof b->s, SMBUS_VERSION, buffer, bytes);
}

int vm_smbus_new(vm_machine *m)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), smbus_read, smbus_write, smbus_reset, smbus_save, smbus_restore, free };
    vm_smbus *b = calloc(1, sizeof *b);
    if (!b)
        return vm_fail(VM_E_NOMEM, "SMBus host: out of memory");
    smbus_reset(b);
    int status = vm_add_pio(m, VM_SMBUS_BASE, 16, &ops, b, NULL);
    if (status)
        free(b);
    return status;
}
