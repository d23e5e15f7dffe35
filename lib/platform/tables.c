/* tables.c - ACPI tables (ACPI 6: RSDP, RSDT, XSDT, FADT, FACS, MADT, HPET, DSDT) and MP tables (MultiProcessor
 * Specification 1.4) that describe the PC of pc.c.
 *
 * The ACPI image is position-independent with a list of relocations and checksums: placed directly for kernels started
 * without firmware, or handed to firmware as files with a loader script.
 * Interrupts: ISA IRQ n is I/O APIC pin n but 0, which is pin 2; SCI 9 is level, active high; PCI INTA-D are pins 16-19.
 */
#include "platform/tables.h"
#include "platform/aml.h"
#include "platform/pc.h"
#include <stdlib.h>
#include <string.h>

static const char oem_id[6] = "LIBVM ", oem_table[8] = "LIBVMPC ";
enum { SCI_IRQ = 9, COMS = 4 };
static const struct { uint16_t port; uint8_t irq; } coms[COMS] = { { 0x3f8, 4 }, { 0x2f8, 3 }, { 0x3e8, 4 }, { 0x2e8, 3 } };

/* ---- building blocks ---- */
static void put_at(vm_aml *a, size_t at, uint64_t value, unsigned bytes)
{
    if (!a->failed)
        memcpy(a->data + at, &value, bytes);
}

static void put(vm_aml *a, uint64_t value, unsigned bytes) { vm_aml_bytes(a, &value, bytes); }

static void align(vm_aml *a, size_t to)
{
    while (!a->failed && a->bytes % to)
        vm_aml_byte(a, 0);
}

static void relocate(vm_tables *t, size_t at, unsigned width)
{
    t->reloc[t->relocs].at = (uint32_t)at;
    t->reloc[t->relocs++].width = (uint8_t)width;
}

static size_t begin_table(vm_aml *a, const char *signature, unsigned revision)
{
    align(a, 16);
    size_t start = a->bytes;
    vm_aml_bytes(a, signature, 4);
    put(a, 0, 4);
    vm_aml_byte(a, (uint8_t)revision);
    vm_aml_byte(a, 0);
    vm_aml_bytes(a, oem_id, 6);
    vm_aml_bytes(a, oem_table, 8);
    put(a, 1, 4);
    vm_aml_bytes(a, "LVM ", 4);
    put(a, 1, 4);
    return start;
}

static void end_table(vm_aml *a, vm_tables *t, size_t start)
{
    put_at(a, start + 4, a->bytes - start, 4);
    t->checksum[t->checksums].at = (uint32_t)start + 9;
    t->checksum[t->checksums].start = (uint32_t)start;
    t->checksum[t->checksums++].length = (uint32_t)(a->bytes - start);
}

/* ---- DSDT ---- */
static void isa_device(vm_aml *a, const char *name, const char *hid, uint16_t port, uint8_t ports, uint16_t port2, int irq)
{
    uint8_t res[64], *p = res;
    vm_aml_device(a, name);
    vm_aml_define_eisa(a, "_HID", hid);
    if (ports)
        p = vm_res_io(p, port, ports);
    if (port2)
        p = vm_res_io(p, port2, ports);
    if (irq >= 0)
        p = vm_res_irq(p, (unsigned)irq);
    vm_aml_define_resources(a, "_CRS", res, (size_t)(p - res));
    vm_aml_close(a);
}

static void com_device(vm_aml *a, unsigned n)
{
    uint8_t res[64], *p = vm_res_irq(vm_res_io(res, coms[n].port, 8), coms[n].irq);
    char name[5] = "COM1";
    name[3] = (char)('1' + n);
    vm_aml_device(a, name);
    vm_aml_define_eisa(a, "_HID", "PNP0501");
    vm_aml_define_integer(a, "_UID", n + 1);
    vm_aml_define_resources(a, "_CRS", res, (size_t)(p - res));
    vm_aml_close(a);
}

static void isa_bridge(vm_aml *a)
{
    vm_aml_device(a, "ISA");
    vm_aml_define_integer(a, "_ADR", 0x00010000);
    isa_device(a, "RTC", "PNP0B00", 0x70, 4, 0, 8);
    isa_device(a, "KBD", "PNP0303", 0x60, 1, 0x64, 1);
    isa_device(a, "MOU", "PNP0F13", 0, 0, 0, 12);
    isa_device(a, "TMR", "PNP0100", 0x40, 4, 0, 0);
    isa_device(a, "PIC", "PNP0000", 0x20, 2, 0xa0, 2);
    isa_device(a, "SPKR", "PNP0800", 0x61, 1, 0, -1);
    for (unsigned i = 0; i < COMS; i++)
        com_device(a, i);
    vm_aml_close(a);
}

/* Routes of bus 0: pin p of device d is line (d + p) mod 4; that is I/O APIC pin 16 + line, or PIC IRQ 10, 11, 10, 11. */
static void routing(vm_aml *a, const char *name, bool is_apic)
{
    vm_aml_define(a, name);
    vm_aml_package(a, 31 * 4);
    for (unsigned device = 1; device < 32; device++) {
        for (unsigned pin = 0; pin < 4; pin++) {
            unsigned line = (device + pin) & 3;
            vm_aml_package(a, 4);
            vm_aml_integer(a, device << 16 | 0xffff);
            vm_aml_integer(a, pin);
            vm_aml_integer(a, 0);
            vm_aml_integer(a, is_apic ? 16 + line : 10 + (line & 1));
            vm_aml_close(a);
        }
    }
    vm_aml_close(a);
}

static void pci_root(vm_aml *a, const vm_tables_info *info)
{
    uint8_t res[256], *p = res;
    vm_aml_device(a, "PCI0");
    vm_aml_define_eisa(a, "_HID", "PNP0A03");
    vm_aml_define_integer(a, "_UID", 0);
    p = vm_res_bus(p, 0, 255);
    p = vm_res_io(p, 0xcf8, 8);
    p = vm_res_io_window(p, 0x0000, 0x0cf7);
    p = vm_res_io_window(p, 0x0d00, 0xffff);
    p = vm_res_memory_window32(p, 0xa0000, 0xbffff, true);
    uint64_t first = info->low_end < VM_PC_LOW_MAX ? VM_PC_LOW_MAX : info->low_end;
    p = vm_res_memory_window32(p, (uint32_t)first, 0xfebfffff, false);
    if (info->high_last)
        p = vm_res_memory_window64(p, info->high_first, info->high_last);
    vm_aml_define_resources(a, "_CRS", res, (size_t)(p - res));
    routing(a, "PRTA", true);
    routing(a, "PRTP", false);
    vm_aml_method(a, "_PRT", 0);
    vm_aml_if(a);
    vm_aml_name(a, "\\PICF");
    vm_aml_byte(a, 0xa4);                            /* Return */
    vm_aml_name(a, "PRTA");
    vm_aml_close(a);
    vm_aml_byte(a, 0xa4);
    vm_aml_name(a, "PRTP");
    vm_aml_close(a);
    isa_bridge(a);
    vm_aml_close(a);
}

static void hpet_device(vm_aml *a)
{
    uint8_t res[16], *p = vm_res_memory32(res, (uint32_t)VM_PC_HPET, 0x400, false);
    vm_aml_device(a, "HPET");
    vm_aml_define_eisa(a, "_HID", "PNP0103");
    vm_aml_define_integer(a, "_UID", 0);
    vm_aml_define_resources(a, "_CRS", res, (size_t)(p - res));
    vm_aml_close(a);
}

static void cpu_devices(vm_aml *a, unsigned cpus)
{
    static const char digits[] = "0123456789ABCDEF";
    for (unsigned i = 0; i < cpus; i++) {
        char name[5] = { 'C', digits[i >> 8 & 15], digits[i >> 4 & 15], digits[i & 15], 0 };
        vm_aml_device(a, name);
        vm_aml_define_string(a, "_HID", "ACPI0007");
        vm_aml_define_integer(a, "_UID", i);
        vm_aml_close(a);
    }
}

static size_t build_dsdt(vm_aml *a, vm_tables *t, const vm_tables_info *info)
{
    size_t start = begin_table(a, "DSDT", 2);
    vm_aml_define_integer(a, "\\PICF", 0);
    vm_aml_method(a, "\\_PIC", 1);
    vm_aml_byte(a, 0x70);                            /* Store(Arg0, PICF) */
    vm_aml_byte(a, 0x68);
    vm_aml_name(a, "\\PICF");
    vm_aml_close(a);
    vm_aml_define(a, "\\_S5");
    vm_aml_package(a, 4);
    for (unsigned i = 0; i < 4; i++)
        vm_aml_integer(a, 0);
    vm_aml_close(a);
    vm_aml_scope(a, "\\_SB");
    cpu_devices(a, info->cpus);
    pci_root(a, info);
    hpet_device(a);
    vm_aml_close(a);
    end_table(a, t, start);
    return start;
}

/* ---- the static tables ---- */
static size_t build_facs(vm_aml *a)
{
    align(a, 64);
    size_t start = a->bytes;
    vm_aml_bytes(a, "FACS", 4);
    put(a, 64, 4);
    for (unsigned i = 8; i < 64; i++)
        vm_aml_byte(a, i == 32 ? 2 : 0);             /* version 2 */
    return start;
}

static void address(vm_aml *a, unsigned space, unsigned bits, unsigned access, uint64_t at) {     /* 5.2.3.2 */
    vm_aml_byte(a, (uint8_t)space);
    vm_aml_byte(a, (uint8_t)bits);
    vm_aml_byte(a, 0);
    vm_aml_byte(a, (uint8_t)access);
    put(a, at, 8);
}

static size_t build_fadt(vm_aml *a, vm_tables *t, size_t facs, size_t dsdt) {     /* 5.2.9 */
    enum { WBINVD = 1 << 0, PROC_C1 = 1 << 2, SLP_BUTTON = 1 << 5, TMR_VAL_EXT = 1 << 8, RESET_REG = 1 << 10 };
    size_t start = begin_table(a, "FACP", 6);
    relocate(t, a->bytes, 4);
    put(a, facs, 4);
    relocate(t, a->bytes, 4);
    put(a, dsdt, 4);
    put(a, 0, 1);
    put(a, 0, 1);                                    /* preferred profile: unspecified */
    put(a, SCI_IRQ, 2);
    put(a, 0xb2, 4);                                 /* SMI command port, enable, disable */
    put(a, 0xf1, 1);
    put(a, 0xf0, 1);
    put(a, 0, 2);
    put(a, VM_ACPI_PM_BASE, 4);                      /* PM1a event, PM1b */
    put(a, 0, 4);
    put(a, VM_ACPI_PM_BASE + 4, 4);                  /* PM1a control, PM1b */
    put(a, 0, 4);
    put(a, 0, 4);                                    /* PM2 control */
    put(a, VM_ACPI_PM_BASE + 8, 4);                  /* PM timer */
    put(a, VM_ACPI_GPE_BASE, 4);
    put(a, 0, 4);
    put(a, 0x00040004, 4);                           /* lengths: PM1 event 4 ... */
    put_at(a, a->bytes - 4, 4, 1);
    put_at(a, a->bytes - 3, 2, 1);                   /* PM1 control 2 */
    put_at(a, a->bytes - 2, 0, 1);                   /* PM2 control 0 */
    put_at(a, a->bytes - 1, 4, 1);                   /* PM timer 4 */
    put(a, 4, 1);                                    /* GPE0 */
    put(a, 0, 1);
    put(a, 0, 1);
    put(a, 0, 1);
    put(a, 0x0fff, 2);                               /* no C2, C3 */
    put(a, 0x0fff, 2);
    put(a, 0, 2);
    put(a, 0, 2);
    put(a, 0, 1);
    put(a, 0, 1);
    put(a, 0, 1);                                    /* RTC day alarm, month alarm */
    put(a, 0, 1);
    put(a, 0x32, 1);                                 /* RTC century */
    put(a, 0x0007, 2);                               /* legacy devices, 8042, no VGA */
    put(a, 0, 1);
    put(a, WBINVD | PROC_C1 | SLP_BUTTON | TMR_VAL_EXT | RESET_REG, 4);
    address(a, 1, 8, 1, 0xcf9);
    put(a, 0x0e, 1);
    put(a, 0, 2);
    put(a, 0, 1);                                    /* minor version */
    put(a, 0, 8);                                    /* X_FIRMWARE_CTRL: the 32-bit field holds it */
    relocate(t, a->bytes, 8);
    put(a, dsdt, 8);
    address(a, 1, 32, 2, VM_ACPI_PM_BASE);
    address(a, 0, 0, 0, 0);
    address(a, 1, 16, 2, VM_ACPI_PM_BASE + 4);
    address(a, 0, 0, 0, 0);
    address(a, 0, 0, 0, 0);
    address(a, 1, 32, 3, VM_ACPI_PM_BASE + 8);
    address(a, 1, 32, 1, VM_ACPI_GPE_BASE);
    address(a, 0, 0, 0, 0);
    address(a, 0, 0, 0, 0);                          /* sleep control, sleep status */
    address(a, 0, 0, 0, 0);
    put(a, 0, 8);                                    /* hypervisor vendor */
    end_table(a, t, start);
    return start;
}

static size_t build_madt(vm_aml *a, vm_tables *t, unsigned cpus) {     /* 5.2.12 */
    size_t start = begin_table(a, "APIC", 4);
    put(a, VM_PC_APIC, 4);
    put(a, 1, 4);                                    /* PC-AT: a PIC pair too */
    for (unsigned i = 0; i < cpus && i < 255; i++) {
        put(a, 0x0800, 2);
        put(a, i, 1);
        put(a, i, 1);
        put(a, 1, 4);
    }
    put(a, 0x0c01, 2);                               /* I/O APIC: id 0, GSI base 0 */
    put(a, 0, 2);
    put(a, VM_PC_IOAPIC, 4);
    put(a, 0, 4);
    put(a, 0x0a02, 2);                               /* ISA IRQ 0 is GSI 2 */
    put(a, 0x0000, 2);
    put(a, 2, 4);
    put(a, 0, 2);
    put(a, 0x0a02, 2);                               /* SCI: active high, level */
    put(a, SCI_IRQ << 8, 2);
    put(a, SCI_IRQ, 4);
    put(a, 0x000d, 2);
    put(a, 0x0604, 2);                               /* NMI: LINT1 of all */
    put(a, 0xff, 1);
    put(a, 0, 2);
    put(a, 1, 1);
    end_table(a, t, start);
    return start;
}

static size_t build_hpet(vm_aml *a, vm_tables *t) {     /* IA-PC HPET 1.0a, 3.2.4 */
    size_t start = begin_table(a, "HPET", 1);
    put(a, 0x8086a201, 4);                           /* event timer block: low half of the capabilities */
    address(a, 0, 64, 0, VM_PC_HPET);
    put(a, 0, 1);
    put(a, 0x80, 2);                                 /* least periodic tick */
    put(a, 0, 1);
    end_table(a, t, start);
    return start;
}

static size_t build_root(vm_aml *a, vm_tables *t, const char *signature, const size_t *tables, unsigned count, unsigned width)
{
    size_t start = begin_table(a, signature, 1);
    for (unsigned i = 0; i < count; i++) {
        relocate(t, a->bytes, width);
        put(a, tables[i], width);
    }
    end_table(a, t, start);
    return start;
}

int vm_tables_build(const vm_tables_info *info, vm_tables *out)
{
    vm_aml a = { 0 };
    memset(out, 0, sizeof *out);
    size_t facs = build_facs(&a), dsdt = build_dsdt(&a, out, info);
    size_t tables[3];
    tables[0] = build_fadt(&a, out, facs, dsdt);
    tables[1] = build_madt(&a, out, info->cpus);
    tables[2] = build_hpet(&a, out);
    out->rsdt = (uint32_t)build_root(&a, out, "RSDT", tables, 3, 4);
    out->xsdt = (uint32_t)build_root(&a, out, "XSDT", tables, 3, 8);
    align(&a, 16);
    out->image = a.data;
    out->bytes = a.bytes;
    if (a.failed || a.depth) {
        vm_tables_free(out);
        return vm_fail(VM_E_NOMEM, "ACPI tables: out of memory");
    }
    return VM_OK;
}

void vm_tables_free(vm_tables *t)
{
    free(t->image);
    memset(t, 0, sizeof *t);
}

static uint8_t sum_of(const uint8_t *p, size_t bytes)
{
    uint8_t sum = 0;
    while (bytes--)
        sum += *p++;
    return sum;
}

void vm_tables_place(const vm_tables *t, uint64_t base, uint8_t *to)
{
    memcpy(to, t->image, t->bytes);
    for (unsigned i = 0; i < t->relocs; i++) {
        uint64_t v = 0;
        memcpy(&v, to + t->reloc[i].at, t->reloc[i].width);
        v += base;
        memcpy(to + t->reloc[i].at, &v, t->reloc[i].width);
    }
    for (unsigned i = 0; i < t->checksums; i++) {
        to[t->checksum[i].at] = 0;
        to[t->checksum[i].at] = (uint8_t)-sum_of(to + t->checksum[i].start, t->checksum[i].length);
    }
}

void vm_tables_rsdp(uint64_t rsdt, uint64_t xsdt, bool with_checksums, uint8_t to[VM_RSDP_BYTES]) {     /* 5.2.5.3 */
    uint32_t rsdt32 = (uint32_t)rsdt, length = VM_RSDP_BYTES;
    memset(to, 0, VM_RSDP_BYTES);
    memcpy(to, "RSD PTR ", 8);
    memcpy(to + 9, oem_id, 6);
    to[15] = 2;
    memcpy(to + 16, &rsdt32, 4);
    memcpy(to + 20, &length, 4);
    memcpy(to + 24, &xsdt, 8);
    if (with_checksums) {
        to[8] = (uint8_t)-sum_of(to, 20);
        to[32] = (uint8_t)-sum_of(to, VM_RSDP_BYTES);
    }
}

/* ---- the loader script: entries of 128 bytes ---- */
enum { LOADER_ENTRY = 128, LOADER_FILE = 56, LOADER_ALLOCATE = 1, LOADER_POINTER = 2, LOADER_CHECKSUM = 3 };
static const char file_tables[] = "etc/acpi/tables", file_rsdp[] = "etc/acpi/rsdp";

static uint8_t *loader_entry(uint8_t *p, uint32_t command, const char *file)
{
    memset(p, 0, LOADER_ENTRY);
    memcpy(p, &command, 4);
    memcpy(p + 4, file, strlen(file));
    return p + 4 + LOADER_FILE;
}

static uint8_t *loader_allocate(uint8_t *p, const char *file, uint32_t alignment, uint8_t zone)
{
    uint8_t *q = loader_entry(p, LOADER_ALLOCATE, file);
    memcpy(q, &alignment, 4);
    q[4] = zone;                                     /* 1 high memory, 2 below 1 MiB */
    return p + LOADER_ENTRY;
}

static uint8_t *loader_pointer(uint8_t *p, const char *file, const char *to, uint32_t offset, uint8_t width)
{
    uint8_t *q = loader_entry(p, LOADER_POINTER, file);
    memcpy(q, to, strlen(to));
    memcpy(q + LOADER_FILE, &offset, 4);
    q[LOADER_FILE + 4] = width;
    return p + LOADER_ENTRY;
}

static uint8_t *loader_checksum(uint8_t *p, const char *file, uint32_t at, uint32_t start, uint32_t length)
{
    uint8_t *q = loader_entry(p, LOADER_CHECKSUM, file);
    memcpy(q, &at, 4);
    memcpy(q + 4, &start, 4);
    memcpy(q + 8, &length, 4);
    return p + LOADER_ENTRY;
}

int vm_tables_loader(const vm_tables *t, uint8_t **script, size_t *bytes)
{
    unsigned entries = 2 + t->relocs + t->checksums + 4;
    uint8_t *p = malloc((size_t)entries * LOADER_ENTRY);
    if (!p)
        return vm_fail(VM_E_NOMEM, "ACPI loader script: out of memory");
    *script = p;
    *bytes = (size_t)entries * LOADER_ENTRY;
    p = loader_allocate(p, file_tables, 64, 1);
    p = loader_allocate(p, file_rsdp, 16, 2);
    for (unsigned i = 0; i < t->relocs; i++)
        p = loader_pointer(p, file_tables, file_tables, t->reloc[i].at, t->reloc[i].width);
    for (unsigned i = 0; i < t->checksums; i++)
        p = loader_checksum(p, file_tables, t->checksum[i].at, t->checksum[i].start, t->checksum[i].length);
    p = loader_pointer(p, file_rsdp, file_tables, 16, 4);
    p = loader_pointer(p, file_rsdp, file_tables, 24, 8);
    p = loader_checksum(p, file_rsdp, 8, 0, 20);
    loader_checksum(p, file_rsdp, 32, 0, VM_RSDP_BYTES);
    return VM_OK;
}

/* ---- MP tables (MP 1.4, chapter 4) ---- */
static void mp_interrupt(vm_aml *a, unsigned type, unsigned kind, unsigned flags, unsigned bus, unsigned irq, unsigned apic,
                         unsigned pin)
{
    put(a, type, 1);                                 /* 3 I/O, 4 local */
    put(a, kind, 1);                                 /* 0 INT, 1 NMI, 3 ExtINT */
    put(a, flags, 2);
    put(a, bus, 1);
    put(a, irq, 1);
    put(a, apic, 1);
    put(a, pin, 1);
}

static unsigned mp_entries(vm_aml *a, const vm_tables_info *info, unsigned cpus)
{
    enum { BUS_PCI, BUS_ISA };
    unsigned count = 0, ioapic = cpus;
    for (unsigned i = 0; i < cpus; i++, count++) {
        put(a, 0, 1);
        put(a, i, 1);
        put(a, 0x14, 1);
        put(a, 1 | (i == 0) << 1, 1);                /* usable, bootstrap */
        put(a, info->cpu_signature, 4);
        put(a, info->cpu_features, 4);
        put(a, 0, 8);
    }
    put(a, 1 | BUS_PCI << 8, 2);
    vm_aml_bytes(a, "PCI   ", 6);
    put(a, 1 | BUS_ISA << 8, 2);
    vm_aml_bytes(a, "ISA   ", 6);
    put(a, 2, 1);                                    /* I/O APIC, version 0x20, enabled */
    put(a, ioapic, 1);
    put(a, 0x20, 1);
    put(a, 1, 1);
    put(a, VM_PC_IOAPIC, 4);
    count += 3;
    for (unsigned device = 1; device < 32; device++)
        for (unsigned pin = 0; pin < 4; pin++, count++)
            mp_interrupt(a, 3, 0, 0x0d, BUS_PCI, device << 2 | pin, ioapic, 16 + ((device + pin) & 3));
    for (unsigned irq = 0; irq < 16; irq++) {
        if (irq == 2)
            continue;
        mp_interrupt(a, 3, 0, irq == SCI_IRQ ? 0x0d : 0, BUS_ISA, irq, ioapic, irq ? irq : 2);
        count++;
    }
    mp_interrupt(a, 4, 3, 0, BUS_ISA, 0, 0, 0);      /* ExtINT at LINT0 of the bootstrap CPU, NMI at LINT1 of all */
    mp_interrupt(a, 4, 1, 0, BUS_ISA, 0, 0xff, 1);
    return count + 2;
}

size_t vm_tables_mp(const vm_tables_info *info, uint64_t base, uint8_t *to, size_t max)
{
    vm_aml a = { 0 };
    unsigned cpus = info->cpus < 254 ? info->cpus : 254;
    vm_aml_bytes(&a, "_MP_", 4);                     /* floating pointer: 16 bytes */
    put(&a, base + 16, 4);
    put(&a, 0x0401, 2);
    put(&a, 0, 2);
    put(&a, 0, 4);                                   /* virtual wire mode: no IMCR needed */
    vm_aml_bytes(&a, "PCMP", 4);
    put(&a, 0, 2);
    put(&a, 4, 1);
    put(&a, 0, 1);
    vm_aml_bytes(&a, "LIBVM   ", 8);
    vm_aml_bytes(&a, "PC          ", 12);
    put(&a, 0, 4);
    put(&a, 0, 2);
    put(&a, 0, 2);
    put(&a, VM_PC_APIC, 4);
    put(&a, 0, 4);
    unsigned count = mp_entries(&a, info, cpus);
    put_at(&a, 16 + 34, count, 2);
    put_at(&a, 16 + 4, a.bytes - 16, 2);
    size_t bytes = a.failed || a.bytes > max ? 0 : a.bytes;
    if (bytes) {
        memcpy(to, a.data, bytes);
        to[16 + 7] = (uint8_t)-sum_of(to + 16, bytes - 16);
        to[10] = (uint8_t)-sum_of(to, 16);
    }
    free(a.data);
    return bytes;
}
