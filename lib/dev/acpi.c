/* acpi.c - ACPI fixed hardware: PM1a event and control blocks, PM timer, an empty GPE0 block, the SMI command port
 * (ACPI 6, 4.8). Sleep type 0 is S5, as the DSDT says.
 */
#include "dev/dev.h"
#include <stdlib.h>

enum { ACPI_VERSION = 1 };
#define PM_TIMER_HZ UINT64_C(3579545)
enum { STS_TIMER = 1 << 0, STS_GLOBAL = 1 << 5, STS_POWER = 1 << 8, STS_SLEEP = 1 << 9, STS_RTC = 1 << 10, STS_WAKE = 1 << 15 };
enum { STS_ALL = STS_TIMER | 1 << 4 | STS_GLOBAL | STS_POWER | STS_SLEEP | STS_RTC | STS_WAKE };
enum { EN_ALL = STS_TIMER | STS_GLOBAL | STS_POWER | STS_SLEEP | STS_RTC };
enum { CNT_SCI = 1, CNT_SLEEP = 1 << 13 };
enum { SMI_ACPI_ENABLE = 0xf1, SMI_ACPI_DISABLE = 0xf0 };

struct vm_acpi {
    vm_machine *machine;
    vm_line sci;
    vm_timer *timer;                       /* the PM timer's bit 23 flips */
    struct { uint32_t version; uint16_t status, enable, control; uint8_t gpe[4], smi[2]; uint64_t seen_flip; } s;
};

static uint64_t pm_ticks(const vm_acpi *a) { return vm_ticks_from_ns(vm_clock_now(a->machine), PM_TIMER_HZ); }

/* TMR_STS: the most significant bit of the 24-bit count changed (4.8.3.3 keeps 32 bits; the status follows bit 31 then). */
static void update(vm_acpi *a)
{
    uint64_t flip = pm_ticks(a) >> 31;
    if (flip != a->s.seen_flip) {
        a->s.seen_flip = flip;
        a->s.status |= STS_TIMER;
    }
    vm_line_set(&a->sci, (a->s.control & CNT_SCI) && (a->s.status & a->s.enable & EN_ALL));
    bool wanted = (a->s.enable & STS_TIMER) && !(a->s.status & STS_TIMER);
    vm_timer_set(a->timer, wanted ? vm_ns_from_ticks((flip + 1) << 31, PM_TIMER_HZ) : UINT64_MAX);
}

static void acpi_fire(void *user) { update(user); }

static uint8_t pm_get(void *dev, unsigned reg)
{
    vm_acpi *a = dev;
    update(a);
    switch (reg) {
    case 0: case 1: return (uint8_t)(a->s.status >> (8 * reg));
    case 2: case 3: return (uint8_t)(a->s.enable >> (8 * (reg - 2)));
    case 4: case 5: return (uint8_t)(a->s.control >> (8 * (reg - 4)));
    default: return 0;
    }
}

static int pm_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu;
    if (offset >= 8) {
        *value = pm_ticks(user) >> (8 * (offset & 3));         /* one sample for the whole access */
        return VM_OK;
    }
    return vm_dev_read8(pm_get, user, offset, width, value);
}

static void write_control(vm_acpi *a, uint16_t value)
{
    a->s.control = (a->s.control & CNT_SCI) | (value & 0x1c02);
    if ((value & CNT_SLEEP) && (value >> 10 & 7) == 0)
        vm_machine_event(a->machine, VM_EXIT_POWEROFF, 0);
}

static int pm_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_acpi *a = user;
    (void)cpu;
    update(a);
    for (unsigned i = 0; i < width; i++) {
        uint16_t byte = (uint8_t)(value >> (8 * i));
        unsigned shift = 8 * ((unsigned)(offset + i) & 1);
        switch ((offset + i) & ~UINT64_C(1)) {
        case 0: a->s.status &= (uint16_t)~(byte << shift); break;          /* write one to clear */
        case 2: a->s.enable = ((a->s.enable & (uint16_t)~(0xff << shift)) | (uint16_t)(byte << shift)) & EN_ALL; break;
        case 4: write_control(a, (uint16_t)((a->s.control & ~(0xff << shift)) | byte << shift)); break;
        default: break;
        }
    }
    update(a);
    return VM_OK;
}

/* GPE0: two status and two enable bytes with nothing behind them. */
static uint8_t gpe_get(void *dev, unsigned reg) { return reg < 4 ? ((vm_acpi *)dev)->s.gpe[reg] : 0xff; }
static void gpe_put(void *dev, unsigned reg, uint8_t value)
{
    vm_acpi *a = dev;
    if (reg < 2)
        a->s.gpe[reg] &= (uint8_t)~value;
    else if (reg < 4)
        a->s.gpe[reg] = value;
}

static uint8_t smi_get(void *dev, unsigned reg) { return reg < 2 ? ((vm_acpi *)dev)->s.smi[reg] : 0xff; }
static void smi_put(void *dev, unsigned reg, uint8_t value)
{
    vm_acpi *a = dev;
    if (reg < 2)
        a->s.smi[reg] = value;
    if (reg == 0 && value == SMI_ACPI_ENABLE)
        a->s.control |= CNT_SCI;
    else if (reg == 0 && value == SMI_ACPI_DISABLE)
        a->s.control &= (uint16_t)~CNT_SCI;
    update(a);
}

VM_DEV_BYTE_IO(gpe)
VM_DEV_BYTE_IO(smi)

/* PM1a control of machines that older guests were made for: sleep enable with type 0 or 5 means off. */
static int old_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_acpi *a = user;
    (void)cpu;
    if (offset == 0 && width == 2 && (value & CNT_SLEEP) && ((value >> 10 & 7) == 0 || (value >> 10 & 7) == 5))
        vm_machine_event(a->machine, VM_EXIT_POWEROFF, 0);
    return VM_OK;
}
static int old_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user; (void)cpu; (void)offset; (void)width;
    *value = ~UINT64_C(0);
    return VM_OK;
}

void vm_acpi_power_button(vm_acpi *a)
{
    a->s.status |= STS_POWER;
    update(a);
}

void vm_acpi_rtc(vm_acpi *a)
{
    a->s.status |= STS_RTC;
    update(a);
}

static void acpi_reset(void *user)
{
    vm_acpi *a = user;
    a->s.version = ACPI_VERSION;
    a->s.status = a->s.enable = a->s.control = 0;
    a->s.gpe[0] = a->s.gpe[1] = a->s.gpe[2] = a->s.gpe[3] = a->s.smi[0] = a->s.smi[1] = 0;
    a->s.seen_flip = pm_ticks(a) >> 31;
    update(a);
}

static int acpi_save(void *user, void *buffer, size_t *bytes)
{
    vm_acpi *a = user;
    return vm_dev_save(&a->s, sizeof a->s, buffer, bytes);
}

static int acpi_restore(void *user, const void *buffer, size_t bytes)
{
    vm_acpi *a = user;
    int status = vm_dev_load(&a->s, sizeof a->s, ACPI_VERSION, buffer, bytes);
    if (!status)
        update(a);
    return status;
}

static void acpi_destroy(void *user)
{
    vm_acpi *a = user;
    vm_timer_free(a->timer);
    free(a);
}

int vm_acpi_new(vm_machine *m, vm_line sci, vm_acpi **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), pm_read, pm_write, acpi_reset, acpi_save, acpi_restore, acpi_destroy };
    static const vm_io_ops gpe_ops = { .size = sizeof(vm_io_ops), .read = gpe_read, .write = gpe_write };
    static const vm_io_ops smi_ops = { .size = sizeof(vm_io_ops), .read = smi_read, .write = smi_write };
    static const vm_io_ops old_ops = { .size = sizeof(vm_io_ops), .read = old_read, .write = old_write };
    vm_acpi *a = calloc(1, sizeof *a);
    if (!a || !(a->timer = vm_timer_new(m, acpi_fire, a))) {
        free(a);
        return vm_fail(VM_E_NOMEM, "ACPI power management: out of memory");
    }
    a->machine = m;
    a->sci = sci;
    acpi_reset(a);
    int status = vm_add_pio(m, VM_ACPI_PM_BASE, 12, &ops, a, NULL);
    if (status) {
        acpi_destroy(a);
        return status;
    }
    *out = a;
    if ((status = vm_add_pio(m, VM_ACPI_GPE_BASE, 4, &gpe_ops, a, NULL)) ||
        (status = vm_add_pio(m, 0xb2, 2, &smi_ops, a, NULL)))
        return status;
    return vm_add_pio(m, 0xb004, 2, &old_ops, a, NULL);
}
