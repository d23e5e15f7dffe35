/* pc.c - VM_PLATFORM_PC: RAM, the devices in the order they are made, and the wires between them.
 *
 * Wires. An ISA IRQ or PCI line may have several sources; `asserted` holds one bit a source, and the line is their OR. ISA
 * IRQ n goes to PIC input n and I/O APIC pin n (IRQ 0: pin 2); lines 16-23 to the I/O APIC alone. With the HPET in legacy
 * replacement mode, the PIT and the RTC are cut off from IRQ 0 and 8. The RTC is heard by ACPI all the same (RTC_STS, ACPI 6,
 * 4.8.3.1): systems that gave IRQ 8 to the HPET take its alarms from there.
 *
 * Devices belong to their regions (vm_io_ops.destroy); this structure holds pointers to them and is freed after them.
 */
#include "platform/pc.h"
#include "platform/tables.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum source { SRC_PIT, SRC_HPET, SRC_RTC, SRC_KBD, SRC_AUX, SRC_UART, SRC_SCI = SRC_UART + VM_PC_UARTS, SRC_FPU, SRC_API };
enum { LINES = 24, SCI_IRQ = 9, RSDP_AT = 0, TABLES_AT = 0x40, MP_AT = 0x10000, SMBIOS_AT = 0x18000 };

struct vm_platform_pc {
    vm_machine *machine;
    vm_apics *apics;
    vm_pic *pic;
    vm_ioapic *ioapic;
    vm_pit *pit;
    vm_rtc *rtc;
    vm_hpet *hpet;
    vm_acpi *acpi;
    vm_pci *pci;
    vm_i8042 *kbd;
    vm_uart *uart[VM_PC_UARTS];
    vm_fwcfg *fwcfg;
    vm_misc *misc;
    vm_tables tables;
    vm_tables_info info;
    struct { uint32_t version; uint32_t asserted[LINES], intr, hpet_legacy; } s;     /* asserted: a bit a source */
    bool is_frozen;                        /* a restore is under way: wires keep their saved level */
};

/* ---- wires ---- */
static void line_changed(struct vm_platform_pc *pc, unsigned line, bool level)
{
    if (vm_trace_mask(pc->machine) & VM_TRACE_IRQ)
        vm_trace_line(pc->machine, VM_TRACE_IRQ, "line %u %s", line, level ? "up" : "down");
    if (line < 16 && line != 2 && pc->pic)
        vm_pic_set(pc->pic, line, level);
    if (pc->ioapic && line != 2)
        vm_ioapic_set(pc->ioapic, line ? line : 2, level);
}

/* The PIC's output. */
static void intr_set(void *target, unsigned unused, bool level)
{
    struct vm_platform_pc *pc = target;
    (void)unused;
    if (pc->is_frozen)
        return;
    pc->s.intr = level;
    vm_apics_lint0(pc->apics, 0, level);
}

/* A device's pin number is line | source << 8. */
static void wire_set(void *target, unsigned pin, bool level)
{
    struct vm_platform_pc *pc = target;
    unsigned line = pin & 0xff, source = pin >> 8;
    if (pc->is_frozen)
        return;
    if (source == SRC_RTC && level && pc->acpi)
        vm_acpi_rtc(pc->acpi);
    bool is_cut = pc->s.hpet_legacy && ((source == SRC_PIT && line == 0) || (source == SRC_RTC && line == 8));
    uint32_t before = pc->s.asserted[line], bit = 1u << source;
    uint32_t after = level && !is_cut ? before | bit : before & ~bit;
    pc->s.asserted[line] = after;
    if (!before != !after)
        line_changed(pc, line, after != 0);
}

static vm_line_state wire_state(void *target, unsigned pin)
{
    struct vm_platform_pc *pc = target;
    unsigned line = pin & 0xff, source = pin >> 8;
    if (pc->s.hpet_legacy && ((source == SRC_PIT && line == 0) || (source == SRC_RTC && line == 8)))
        return VM_LINE_MASKED;
    vm_line_state io = vm_ioapic_state(pc->ioapic, line ? line : 2);
    vm_line_state pic = line < 16 && vm_apics_takes_pic(pc->apics) ? vm_pic_state(pc->pic, line) : VM_LINE_MASKED;
    if (io == VM_LINE_PENDING || pic == VM_LINE_PENDING)
        return VM_LINE_PENDING;
    return io == VM_LINE_FREE || pic == VM_LINE_FREE ? VM_LINE_FREE : VM_LINE_MASKED;
}

static vm_line wire(struct vm_platform_pc *pc, enum source source, unsigned line)
{
    return (vm_line){ wire_set, pc, line | (unsigned)source << 8, wire_state };
}

static void hpet_legacy(void *target, bool on)
{
    struct vm_platform_pc *pc = target;
    if (pc->is_frozen)
        return;
    if (on) {
        wire_set(pc, 0 | SRC_PIT << 8, false);
        wire_set(pc, 8 | SRC_RTC << 8, false);
    }
    pc->s.hpet_legacy = on;
}

static bool bus_send(void *target, const vm_apic_msg *msg)
{
    struct vm_platform_pc *pc = target;
    if (msg->mode == VM_APIC_EXTINT)               /* a pin that stands for the PIC: it speaks for itself at LINT0 */
        return false;
    return vm_apics_send(pc->apics, msg);
}
static bool bus_is_pending(void *target, const vm_apic_msg *msg)
{
    return vm_apics_is_pending(((struct vm_platform_pc *)target)->apics, msg);
}
static void level_eoi(void *target, uint8_t vector)
{
    struct vm_platform_pc *pc = target;
    if (pc->ioapic)
        vm_ioapic_eoi(pc->ioapic, vector);
}
static void imcr(void *target, bool symmetric) { vm_apics_direct_intr(((struct vm_platform_pc *)target)->apics, !symmetric); }
static void reset_write(void *target, uint8_t value) { vm_misc_reset_control(((struct vm_platform_pc *)target)->misc, value); }
static uint8_t reset_read(void *target) { return vm_misc_reset_read(((struct vm_platform_pc *)target)->misc); }

/* ---- RAM ---- */
static int map_file_ram(vm_machine *m, uint64_t gpa, uint64_t end, vm_region **out)
{
    bool is_high = gpa >= VM_PC_HIGH;
    vm_region proto = { .kind = VM_REGION_HOST, .gpa = gpa, .bytes = end - gpa, .prot = VM_PROT_RWX,
                        .host = m->ram_map[is_high].host + (is_high ? gpa - VM_PC_HIGH : gpa),
                        .is_shared_file = !m->options.ram_private };
    return vm_region_add(m, &proto, out);
}

static int map_ram(vm_machine *m, uint64_t gpa, uint64_t end, vm_region **out)
{
    unsigned advice = m->options.ram_advice;
    if (end <= gpa)
        return VM_OK;
    vm_region *r;
    int status = m->options.ram_file ? map_file_ram(m, gpa, end, &r) : vm_map_ram(m, gpa, end - gpa, VM_PROT_RWX, &r);
    if (status)
        return status;
    r->is_internal = true;
    if (out)
        *out = r;
    if (advice)
        return vm_advise(m, gpa, end - gpa, advice);
    if (end - gpa >= UINT64_C(4) << 20 && !m->options.ram_file)
        (void)vm_advise(m, gpa, end - gpa, VM_ADVICE_HUGE);   /* an operating system will use it all; a host without them says no */
    return VM_OK;
}

static int make_ram(struct vm_platform_pc *pc)
{
    vm_machine *m = pc->machine;
    uint64_t ram = m->options.ram_bytes;
    if (ram < VM_PC_MIN_RAM || ram & 0xfff)
        return vm_fail(VM_E_INVALID, "ram_bytes is 0x%llx: a PC has whole pages and at least 1 MiB", (unsigned long long)ram);
    pc->info.low_end = ram < VM_PC_LOW_MAX ? ram : VM_PC_LOW_MAX;
    uint64_t high_end = VM_PC_HIGH + (ram - pc->info.low_end);
    if (ram >= UINT64_C(1) << 46)
        return vm_fail(VM_E_INVALID, "ram_bytes is 0x%llx: more than guests can address", (unsigned long long)ram);
    int status = m->options.ram_file ? vm_memory_map_main(m, pc->info.low_end, ram - pc->info.low_end) : VM_OK;
    if (!status)
        status = map_ram(m, 0, VM_PC_VGA_HOLE, &m->ram);
    if (!status)
        status = map_ram(m, VM_PC_SHADOW, pc->info.low_end, NULL);
    return status ? status : map_ram(m, VM_PC_HIGH, high_end, NULL);
}

uint64_t vm_pc_low_end(vm_machine *m) { return m->pc->info.low_end; }

unsigned vm_pc_e820(vm_machine *m, vm_pc_e820_entry *entries, unsigned max)
{
    uint64_t low = m->pc->info.low_end, ram = m->options.ram_bytes;
    const vm_pc_e820_entry all[] = {
        { 0, 0x9fc00, 1 },
        { 0x9fc00, 0x400, 2 },                     /* extended BIOS data */
        { VM_PC_TABLES, 0x100000 - VM_PC_TABLES, 2 },
        { 0x100000, low - 0x100000, 1 },
        { 0xfec00000, 0x01400000, 2 },             /* APICs, HPET, firmware */
        { VM_PC_HIGH, ram - low, 1 },
    };
    unsigned count = 0;
    for (unsigned i = 0; i < sizeof all / sizeof *all && count < max; i++)
        if (all[i].bytes)
            entries[count++] = all[i];
    return count;
}

/* ---- tables and fw_cfg ---- */
static int build_tables(struct vm_platform_pc *pc)
{
    vm_machine *m = pc->machine;
    uint32_t id[4];
    x86_cpuid(&m->vcpus[0]->x86, 1, 0, id);
    pc->info.cpus = m->vcpu_count;
    pc->info.ram_bytes = m->options.ram_bytes;
    pc->info.cpu_signature = id[0];
    pc->info.cpu_features = id[3];
    return vm_tables_build(&pc->info, &pc->tables);
}

uint64_t vm_pc_rsdp(vm_machine *m)
{
    (void)m;
    return VM_PC_TABLES + RSDP_AT;
}

static int install_smbios(struct vm_platform_pc *pc)
{
    uint8_t anchor[32] = { 0 }, *table;
    size_t bytes;
    uint64_t at = VM_PC_TABLES + SMBIOS_AT;
    int status = vm_tables_smbios(&pc->info, at + sizeof anchor, anchor, &table, &bytes);
    if (status)
        return status;
    status = vm_memory_copy(pc->machine, at, anchor, sizeof anchor, true);
    if (!status)
        status = vm_memory_copy(pc->machine, at + sizeof anchor, table, bytes, true);
    free(table);
    return status;
}

int vm_pc_install_tables(vm_machine *m)
{
    struct vm_platform_pc *pc = m->pc;
    size_t room = 0x100000 - VM_PC_TABLES;
    if (TABLES_AT + pc->tables.bytes > MP_AT)
        return vm_fail(VM_E_NOMEM, "ACPI tables of %zu bytes do not fit below 1 MiB", pc->tables.bytes);
    uint8_t *area = vm_zeroed(room);
    if (!area)
        return vm_fail(VM_E_NOMEM, "ACPI tables: out of memory");
    uint64_t base = VM_PC_TABLES + TABLES_AT;
    vm_tables_rsdp(base + pc->tables.rsdt, base + pc->tables.xsdt, true, area + RSDP_AT);
    vm_tables_place(&pc->tables, base, area + TABLES_AT);
    size_t mp = vm_tables_mp(&pc->info, VM_PC_TABLES + MP_AT, area + MP_AT, SMBIOS_AT - MP_AT);
    int status = vm_memory_copy(m, VM_PC_TABLES, area, TABLES_AT + pc->tables.bytes, true);
    if (!status)
        status = vm_memory_copy(m, VM_PC_TABLES + MP_AT, area + MP_AT, mp, true);
    vm_zeroed_free(area, room);
    return status ? status : install_smbios(pc);
}

typedef struct __attribute__((packed)) e820_record { uint64_t base, bytes; uint32_t type; } e820_record;

/* Firmware makes its own reservations: it is told RAM above 1 MiB's hole and the platform's fixed ranges. */
static int fwcfg_e820(struct vm_platform_pc *pc)
{
    uint64_t low = pc->info.low_end, high = pc->machine->options.ram_bytes - low;
    e820_record e[2] = { { 0, low, 1 }, { VM_PC_HIGH, high, 1 } };
    return vm_fwcfg_file(pc->fwcfg, "etc/e820", e, high ? sizeof e : sizeof e[0]);
}

static int fwcfg_tables(struct vm_platform_pc *pc)
{
    uint8_t rsdp[VM_RSDP_BYTES], *script;
    size_t bytes;
    int status = vm_tables_loader(&pc->tables, &script, &bytes);
    if (status)
        return status;
    vm_tables_rsdp(pc->tables.rsdt, pc->tables.xsdt, false, rsdp);
    status = vm_fwcfg_file(pc->fwcfg, "etc/acpi/tables", pc->tables.image, pc->tables.bytes);
    if (!status)
        status = vm_fwcfg_file(pc->fwcfg, "etc/acpi/rsdp", rsdp, sizeof rsdp);
    if (!status)
        status = vm_fwcfg_file(pc->fwcfg, "etc/table-loader", script, bytes);
    free(script);
    return status;
}

static int fwcfg_smbios(struct vm_platform_pc *pc)
{
    uint8_t anchor[VM_SMBIOS_ANCHOR], *table;
    size_t bytes;
    int status = vm_tables_smbios(&pc->info, 0, anchor, &table, &bytes);
    if (status)
        return status;
    status = vm_fwcfg_file(pc->fwcfg, "etc/smbios/smbios-anchor", anchor, sizeof anchor);
    if (!status)
        status = vm_fwcfg_file(pc->fwcfg, "etc/smbios/smbios-tables", table, bytes);
    free(table);
    return status;
}

static int fill_fwcfg(struct vm_platform_pc *pc)
{
    vm_machine *m = pc->machine;
    static const uint8_t zeros[16];
    static const uint8_t sleep_states[6] = { 128, 0, 0, 129, 128, 128 };
    uint64_t ram = m->options.ram_bytes;
    uint16_t cpus = (uint16_t)m->vcpu_count, one = 1;
    const struct { uint16_t key; const void *data; size_t bytes; } items[] = {
        { VM_FWCFG_UUID, zeros, 16 },
        { VM_FWCFG_RAM_SIZE, &ram, 8 },
        { VM_FWCFG_NOGRAPHIC, &one, 2 },
        { VM_FWCFG_NB_CPUS, &cpus, 2 },
        { VM_FWCFG_MAX_CPUS, &cpus, 2 },
        { VM_FWCFG_BOOT_DEVICE, zeros, 2 },
        { VM_FWCFG_BOOT_MENU, zeros, 2 },
        { VM_FWCFG_NUMA, zeros, 16 },
        { VM_FWCFG_IRQ0_OVERRIDE, &one, 1 },
    };
    int status = VM_OK;
    for (unsigned i = 0; i < sizeof items / sizeof *items && !status; i++)
        status = vm_fwcfg_item(pc->fwcfg, items[i].key, items[i].data, items[i].bytes);
    if (!status)
        status = vm_fwcfg_file(pc->fwcfg, "etc/system-states", sleep_states, sizeof sleep_states);
    if (!status)
        status = fwcfg_e820(pc);
    if (!status)
        status = fwcfg_smbios(pc);
    return status ? status : fwcfg_tables(pc);
}

int vm_pc_fwcfg_item(vm_machine *m, uint16_t key, const void *data, size_t bytes)
{
    vm_device_lock(m);
    int status = vm_fwcfg_item(m->pc->fwcfg, key, data, bytes);
    vm_device_unlock(m);
    return status;
}

int vm_pc_fwcfg_file(vm_machine *m, const char *name, const void *data, size_t bytes)
{
    vm_device_lock(m);
    int status = vm_fwcfg_file(m->pc->fwcfg, name, data, bytes);
    vm_device_unlock(m);
    return status;
}

int vm_pc_copy_firmware(vm_machine *from, vm_machine *to) { return vm_fwcfg_copy(to->pc->fwcfg, from->pc->fwcfg); }

/* Memory sizes where BIOSes and old guests look for them. */
static void fill_cmos(struct vm_platform_pc *pc)
{
    uint64_t low = pc->info.low_end, high = pc->machine->options.ram_bytes - low;
    uint64_t ext_k = low > 0x100000 ? (low - 0x100000) >> 10 : 0, above_16m = low > 0x1000000 ? (low - 0x1000000) >> 16 : 0;
    if (ext_k > 0xffff)
        ext_k = 0xffff;
    if (above_16m > 0xffff)
        above_16m = 0xffff;
    const struct { uint8_t cell, value; } cells[] = {
        { 0x14, 0x06 },                            /* equipment: coprocessor, mouse */
        { 0x15, 640 & 0xff }, { 0x16, 640 >> 8 },
        { 0x17, (uint8_t)ext_k }, { 0x18, (uint8_t)(ext_k >> 8) }, { 0x30, (uint8_t)ext_k }, { 0x31, (uint8_t)(ext_k >> 8) },
        { 0x34, (uint8_t)above_16m }, { 0x35, (uint8_t)(above_16m >> 8) },
        { 0x5b, (uint8_t)(high >> 16) }, { 0x5c, (uint8_t)(high >> 24) }, { 0x5d, (uint8_t)(high >> 32) },
        { 0x5f, (uint8_t)(pc->machine->vcpu_count - 1) },
    };
    for (unsigned i = 0; i < sizeof cells / sizeof *cells; i++)
        vm_rtc_set_cell(pc->rtc, cells[i].cell, cells[i].value);
}

/* Everything is write-back but the VGA hole and what lies between RAM and 4 GiB (SDM vol. 3, 12.11). */
void vm_pc_firmware_state(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        x86_cpu *x = &cpu->x86;
        vm_vcpu_fetch(cpu, VM_STATE_MSRS);
        memset(x->mtrr_fixed, 6, sizeof x->mtrr_fixed);
        x->mtrr_fixed[2] = 0;                      /* 0xA0000-0xBFFFF */
        x->mtrr_var[0] = VM_PC_LOW_MAX;            /* uncached: 3 to 4 GiB */
        x->mtrr_var[1] = (x->phys_mask & ~UINT64_C(0x3fffffff)) | 0x800;
        x->mtrr_def = 0xc06;
        vm_vcpu_changed(cpu, VM_STATE_MSRS);
    }
}

/* ---- life ---- */
static int make_uarts(struct vm_platform_pc *pc)
{
    static const struct { uint16_t port; uint8_t irq; } com[VM_PC_UARTS] = { { 0x3f8, 4 }, { 0x2f8, 3 }, { 0x3e8, 4 }, { 0x2e8, 3 } };
    int status = VM_OK;
    for (unsigned i = 0; i < VM_PC_UARTS && !status; i++)
        status = vm_uart_new(pc->machine, com[i].port, wire(pc, SRC_UART + i, com[i].irq), &pc->uart[i]);
    return status;
}

static int make_hpet(struct vm_platform_pc *pc)
{
    vm_line pins[32] = { 0 };
    pins[0] = pins[2] = wire(pc, SRC_HPET, 0);     /* I/O APIC pin 2 is where IRQ 0 goes */
    pins[8] = wire(pc, SRC_HPET, 8);
    for (unsigned i = 20; i < 24; i++)
        pins[i] = wire(pc, SRC_HPET, i);
    return vm_hpet_new(pc->machine, VM_PC_HPET, pins, hpet_legacy, pc, &pc->hpet);
}

static int make_devices(struct vm_platform_pc *pc)
{
    vm_machine *m = pc->machine;
    int s;
    if ((s = vm_apics_new(m, level_eoi, pc, &pc->apics))) return s;
    if ((s = vm_pic_new(m, (vm_line){ .set = intr_set, .target = pc }, &pc->pic))) return s;
    vm_apics_set_pic(pc->apics, pc->pic);
    if ((s = vm_ioapic_new(m, VM_PC_IOAPIC, (vm_apic_bus){ bus_send, bus_is_pending, pc }, &pc->ioapic))) return s;
    if ((s = vm_pit_new(m, wire(pc, SRC_PIT, 0), &pc->pit))) return s;
    if ((s = vm_rtc_new(m, wire(pc, SRC_RTC, 8), (int64_t)time(NULL), &pc->rtc))) return s;
    if ((s = make_hpet(pc))) return s;
    if ((s = vm_acpi_new(m, wire(pc, SRC_SCI, SCI_IRQ), &pc->acpi))) return s;
    if ((s = vm_smbus_new(m))) return s;
    if ((s = vm_misc_new(m, imcr, wire(pc, SRC_FPU, 13), pc, &pc->misc))) return s;
    if ((s = vm_pci_new(m, &pc->pci))) return s;
    vm_pci_reset_control(pc->pci, reset_write, reset_read, pc);
    if ((s = vm_i8042_new(m, wire(pc, SRC_KBD, 1), wire(pc, SRC_AUX, 12), &pc->kbd))) return s;
    if ((s = make_uarts(pc))) return s;
    return vm_fwcfg_new(m, &pc->fwcfg);
}

int vm_pc_create(vm_machine *m)
{
    struct vm_platform_pc *pc = calloc(1, sizeof *pc);
    if (!pc)
        return vm_fail(VM_E_NOMEM, "PC platform: out of memory");
    pc->machine = m;
    m->pc = pc;
    int status = make_ram(pc);
    vm_device_lock(m);
    if (!status)
        status = make_devices(pc);
    if (!status)
        status = build_tables(pc);
    if (!status)
        status = fill_fwcfg(pc);
    if (!status)
        status = vm_pc_install_tables(m);
    if (!status) {
        fill_cmos(pc);
        for (unsigned i = 0; i < m->vcpu_count; i++)
            m->vcpus[i]->is_parked = i != 0;
    }
    vm_device_unlock(m);
    return status;
}

void vm_pc_destroy(vm_machine *m)
{
    if (!m->pc)
        return;
    vm_tables_free(&m->pc->tables);
    free(m->pc);
    m->pc = NULL;
}

void vm_pc_reset(vm_machine *m)
{
    vm_device_lock(m);
    vm_apics_reset(m->pc->apics);
    for (vm_region *r = m->regions; r; r = r->next)
        if (r->is_internal && r->ops.reset)
            r->ops.reset(r->user);
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        x86_cpu_reset(&cpu->x86, false);
        cpu->init_pending = cpu->sipi_pending = false;
        cpu->nmis_latched = 0;
        cpu->is_parked = i != 0;
        vm_vcpu_changed(cpu, VM_STATE_ALL);
    }
    vm_device_unlock(m);
}

/* ---- snapshots: a record a region, {kind, address, bytes}, then its state padded to 8 bytes; the wires come first ---- */
enum { PC_VERSION = 1 };
typedef struct record { uint64_t gpa; uint32_t kind, bytes; } record;

static bool is_saved(const vm_region *r) { return r->is_internal && r->ops.save && r->ops.restore; }
static size_t padded(size_t bytes) { return (bytes + 7) & ~(size_t)7; }

static int save_region(vm_region *r, uint8_t *to, size_t room, size_t *used)
{
    size_t bytes = 0;
    int status = r->ops.save(r->user, NULL, &bytes);
    *used = sizeof(record) + padded(bytes);
    if (status || !to)
        return status;
    if (room < *used)
        return vm_fail(VM_E_INVALID, "buffer for the platform's state is too small");
    record head = { r->gpa, r->kind, (uint32_t)bytes };
    memset(to, 0, *used);
    memcpy(to, &head, sizeof head);
    return r->ops.save(r->user, to + sizeof head, &bytes);
}

int vm_pc_save(vm_machine *m, void *buffer, size_t *bytes)
{
    struct vm_platform_pc *pc = m->pc;
    size_t at = padded(sizeof pc->s), used;
    pc->s.version = PC_VERSION;
    if (buffer && *bytes < at)
        return vm_fail(VM_E_INVALID, "buffer for the platform's state is too small");
    if (buffer) {
        memset(buffer, 0, at);
        memcpy(buffer, &pc->s, sizeof pc->s);
    }
    for (vm_region *r = m->regions; r; r = r->next, at += used) {
        used = 0;
        int status = is_saved(r) ? save_region(r, buffer ? (uint8_t *)buffer + at : NULL, buffer ? *bytes - at : 0, &used) : VM_OK;
        if (status)
            return status;
    }
    *bytes = at;
    return VM_OK;
}

static int restore_region(vm_region *r, const uint8_t *from, size_t left, size_t *used)
{
    record head;
    if (left < sizeof head)
        return vm_fail(VM_E_FORMAT, "the platform's state ends before the region at 0x%llx", (unsigned long long)r->gpa);
    memcpy(&head, from, sizeof head);
    *used = sizeof head + padded(head.bytes);
    bool is_movable = r->kind == VM_REGION_MMIO;   /* the APIC page follows its base */
    if (*used > left || head.kind != (uint32_t)r->kind || (!is_movable && head.gpa != r->gpa))
        return vm_fail(VM_E_FORMAT, "the platform's state has something else where the region at 0x%llx belongs",
                       (unsigned long long)r->gpa);
    return r->ops.restore(r->user, from + sizeof head, head.bytes);
}

int vm_pc_restore(vm_machine *m, const void *buffer, size_t bytes)
{
    struct vm_platform_pc *pc = m->pc;
    size_t at = padded(sizeof pc->s), used;
    uint32_t version;
    if (bytes < at)
        return vm_fail(VM_E_FORMAT, "the platform's state has %zu bytes only", bytes);
    memcpy(&version, buffer, sizeof version);
    if (version != PC_VERSION)
        return vm_fail(VM_E_FORMAT, "platform state version %u, expected %d", version, PC_VERSION);
    int status = VM_OK;
    pc->is_frozen = true;
    memcpy(&pc->s, buffer, sizeof pc->s);
    vm_apics_restore_intr(pc->apics, pc->s.intr);
    for (vm_region *r = m->regions; r && !status; r = r->next) {
        if (!is_saved(r))
            continue;
        used = 0;
        status = restore_region(r, (const uint8_t *)buffer + at, bytes - at, &used);
        at += used;
    }
    pc->is_frozen = false;
    for (unsigned i = 0; i < VM_PC_UARTS; i++)
        vm_uart_input(pc->uart[i], NULL, 0);       /* host input that waited fills the receivers */
    if (!status && at != bytes)
        status = vm_fail(VM_E_FORMAT, "the platform's state has %zu bytes too many", bytes - at);
    return status;
}

/* ---- the vCPU's doors ---- */
static int acknowledge(vm_vcpu *cpu)
{
    vm_device_lock(cpu->machine);
    int vector = vm_lapic_acknowledge(cpu);
    vm_device_unlock(cpu->machine);
    if (vector >= 0 && (vm_trace_mask(cpu->machine) & VM_TRACE_IRQ))
        vm_trace_line(cpu->machine, VM_TRACE_IRQ, "cpu%u takes vector 0x%x", cpu->index, (unsigned)vector);
    return vector;
}
const vm_irq_source vm_pc_irq_source = { .pending = vm_lapic_pending, .acknowledge = acknowledge };

static void start_at(vm_vcpu *cpu, uint8_t vector)
{
    x86_cpu *x = &cpu->x86;
    x->seg[X86_CS].sel = (uint16_t)(vector << 8);
    x->seg[X86_CS].base = (uint64_t)vector << 12;
    x->rip = 0;
    x86_mode_changed(x);
    cpu->is_parked = false;
}

/* One NMI waits while another is served. Two that come before the first is served are two all the same: hardware would have
 * begun with the first at once, and a host thread that was late is nothing the guest may notice. Whoever delivers one sets
 * X86_ATT_EVENT for the other. */
static void take_nmis(vm_vcpu *cpu)
{
    if (cpu->is_parked)                            /* one that waits for SIPI takes no NMI */
        cpu->nmis_latched = 0;
    if (!cpu->nmis_latched)
        return;
    if (!cpu->x86.nmi_pending) {
        cpu->x86.nmi_pending = true;               /* backends with state elsewhere look at it before they run */
        cpu->nmis_latched--;
    }
    if (cpu->x86.nmi_blocked && !cpu->machine->backend->takes_interrupts)
        cpu->nmis_latched = 0;
}

void vm_pc_vcpu_event(vm_vcpu *cpu)
{
    vm_device_lock(cpu->machine);
    if (cpu->init_pending) {
        cpu->init_pending = false;
        cpu->nmis_latched = 0;
        vm_vcpu_fetch(cpu, VM_STATE_ALL);
        x86_cpu_reset(&cpu->x86, true);
        cpu->x86.halted = false;
        vm_lapic_init(cpu->lapic);
        cpu->is_parked = cpu->index != 0;          /* the bootstrap processor goes on at the reset vector */
        vm_vcpu_changed(cpu, VM_STATE_ALL);
    }
    if (cpu->sipi_pending) {
        cpu->sipi_pending = false;
        if (cpu->is_parked) {
            vm_vcpu_fetch(cpu, VM_STATE_ALL);
            start_at(cpu, cpu->sipi_vector);
            vm_vcpu_changed(cpu, VM_STATE_ALL);
        }
    }
    take_nmis(cpu);
    vm_device_unlock(cpu->machine);
}

bool vm_pc_msr_read(vm_vcpu *cpu, uint32_t msr, uint64_t *value)
{
    vm_device_lock(cpu->machine);
    bool ok = vm_lapic_msr_read(cpu->lapic, msr, value);
    vm_device_unlock(cpu->machine);
    return ok;
}

bool vm_pc_msr_write(vm_vcpu *cpu, uint32_t msr, uint64_t value)
{
    vm_device_lock(cpu->machine);
    bool ok = vm_lapic_msr_write(cpu->lapic, msr, value);
    vm_device_unlock(cpu->machine);
    return ok;
}

/* Only this vCPU writes its TPR; no lock to read it. */
uint8_t vm_pc_cr8_read(vm_vcpu *cpu) { return vm_lapic_tpr(cpu->lapic) >> 4; }

void vm_pc_cr8_write(vm_vcpu *cpu, uint8_t value)
{
    vm_device_lock(cpu->machine);
    vm_lapic_set_tpr(cpu->lapic, (uint8_t)(value << 4));
    vm_device_unlock(cpu->machine);
}

unsigned vm_pc_apic_id(vm_vcpu *cpu) { return vm_lapic_id(cpu->lapic); }
uint64_t vm_pc_apic_base(vm_vcpu *cpu) { return vm_lapic_base(cpu->lapic); }

void vm_pc_ferr(vm_vcpu *cpu)
{
    vm_device_lock(cpu->machine);
    vm_misc_ferr(cpu->machine->pc->misc);
    vm_device_unlock(cpu->machine);
}

/* ---- from outside ---- */
int vm_pc_irq_set(vm_machine *m, unsigned gsi, bool level)
{
    if (gsi >= LINES)
        return vm_fail(VM_E_INVALID, "interrupt line %u: there are 0 to %d", gsi, LINES - 1);
    vm_device_lock(m);
    m->stat_irqs += level;
    wire_set(m->pc, gsi | SRC_API << 8, level);
    vm_device_unlock(m);
    return VM_OK;
}

int vm_pc_irq_msi(vm_machine *m, uint64_t address, uint32_t data)
{
    if (address >> 20 != 0xfee)
        return vm_fail(VM_E_INVALID, "MSI address 0x%llx is not 0xfeexxxxx", (unsigned long long)address);
    vm_apic_msg msg = vm_apic_msi(address, data);
    vm_device_lock(m);
    m->stat_msis++;
    vm_apics_send(m->pc->apics, &msg);
    vm_device_unlock(m);
    return VM_OK;
}

void vm_pc_nmi(vm_machine *m)
{
    vm_device_lock(m);
    vm_apics_nmi(m->pc->apics);
    vm_device_unlock(m);
}

void vm_pc_power_button(vm_machine *m)
{
    vm_device_lock(m);
    vm_acpi_power_button(m->pc->acpi);
    vm_device_unlock(m);
}

int vm_pc_serial_output(vm_machine *m, unsigned index, vm_console_fn fn, void *user)
{
    if (index >= VM_PC_UARTS)
        return vm_fail(VM_E_INVALID, "serial port %u: there are 0 to %d", index, VM_PC_UARTS - 1);
    vm_device_lock(m);
    vm_uart_output(m->pc->uart[index], fn, user);
    vm_device_unlock(m);
    return VM_OK;
}

unsigned vm_pc_waiting(vm_machine *m, unsigned index, uint8_t *bytes)
{
    vm_device_lock(m);
    unsigned count = vm_uart_waiting(m->pc->uart[index], bytes);
    vm_device_unlock(m);
    return count;
}

bool vm_pc_set_waiting(vm_machine *m, unsigned index, const uint8_t *bytes, unsigned count)
{
    vm_device_lock(m);
    bool ok = vm_uart_set_waiting(m->pc->uart[index], bytes, count);
    vm_device_unlock(m);
    return ok;
}

int vm_pc_serial_input(vm_machine *m, unsigned index, const uint8_t *bytes, size_t count)
{
    if (index >= VM_PC_UARTS)
        return vm_fail(VM_E_INVALID, "serial port %u: there are 0 to %d", index, VM_PC_UARTS - 1);
    vm_device_lock(m);
    int taken = vm_uart_input(m->pc->uart[index], bytes, count);
    vm_device_unlock(m);
    return taken;
}

int vm_pc_debugcon_output(vm_machine *m, vm_console_fn fn, void *user)
{
    vm_device_lock(m);
    vm_misc_debugcon(m->pc->misc, fn, user);
    vm_device_unlock(m);
    return VM_OK;
}
