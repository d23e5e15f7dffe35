/* dev_pc.c - the PC as a whole: memory map, tables, wiring, saved state, and everything in it poked at random. */
#include "rig.h"
#include <time.h>
#include "platform/pc.h"

static void pc_new(rig *r, unsigned vcpus, uint64_t ram)
{
    vm_options options = VM_OPTIONS_INIT;
    options.backend = VM_BACKEND_INTERP;
    options.platform = VM_PLATFORM_PC;
    options.vcpus = vcpus;
    options.ram_bytes = ram;
    memset(r, 0, sizeof *r);
    OK(vm_create(&options, &r->m));
}

static uint8_t sum(const uint8_t *p, size_t n)
{
    uint8_t s = 0;
    while (n--)
        s += *p++;
    return s;
}

static uint8_t area[0x20000];            /* 0xE0000 to 1 MiB */
static uint8_t *at(uint64_t gpa)
{
    CHECK(gpa >= 0xe0000 && gpa < 0x100000);
    return area + (gpa - 0xe0000);
}
static uint32_t u32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t u64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }

TEST(pc_ram_sizes)
{
    static const struct { uint64_t ram, low, high; } sizes[] = {
        { 0x100000, 0x100000, 0 }, { 16 << 20, 16 << 20, 0 }, { UINT64_C(3) << 30, UINT64_C(3) << 30, 0 },
        { UINT64_C(5) << 30, UINT64_C(3) << 30, UINT64_C(2) << 30 } };
    for (unsigned i = 0; i < 4; i++) {
        rig r;
        vm_pc_e820_entry e[8];
        uint64_t ram = 0, high = 0;
        pc_new(&r, 1, sizes[i].ram);
        unsigned n = vm_pc_e820(r.m, e, 8);
        for (unsigned k = 0; k < n; k++) {
            if (k)
                CHECK(e[k].base >= e[k - 1].base + e[k - 1].bytes);
            if (e[k].type != 1)
                continue;
            ram += e[k].bytes;
            high += e[k].base >= VM_PC_HIGH ? e[k].bytes : 0;
            uint8_t byte = 0x5a;
            OK(vm_write(r.m, e[k].base + e[k].bytes - 1, &byte, 1));
        }
        CHECK_EQ(vm_pc_low_end(r.m), sizes[i].low);
        CHECK_EQ(high, sizes[i].high);
        CHECK_EQ(ram, sizes[i].ram - 0x60000 - 0x400);
        uint8_t byte;
        REFUSED(vm_read(r.m, sizes[i].low, &byte, 1), VM_E_FAULT);
        REFUSED(vm_read(r.m, 0xa0000, &byte, 1), VM_E_FAULT);
        CHECK_EQ(vm_pc_e820(r.m, e, 2), 2);
        rig_free(&r);
    }
}

TEST(pc_refuses_ram)
{
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    options.platform = VM_PLATFORM_PC;
    options.ram_bytes = 0x80000;
    REFUSED(vm_create(&options, &m), VM_E_INVALID);
    options.ram_bytes = 0x100800;
    REFUSED(vm_create(&options, &m), VM_E_INVALID);
    options.ram_bytes = UINT64_MAX & ~UINT64_C(0xfff);
    CHECK(vm_create(&options, &m) < 0);
}

TEST(pc_acpi_tables)
{
    rig r;
    pc_new(&r, 3, 32 << 20);
    OK(vm_read(r.m, 0xe0000, area, sizeof area));
    const uint8_t *rsdp = at(vm_pc_rsdp(r.m));
    CHECK(!memcmp(rsdp, "RSD PTR ", 8));
    CHECK_EQ(sum(rsdp, 20), 0);
    CHECK_EQ(sum(rsdp, 36), 0);
    const uint8_t *xsdt = at(u64(rsdp + 24)), *rsdt = at(u32(rsdp + 16));
    CHECK_EQ(sum(xsdt, u32(xsdt + 4)), 0);
    CHECK_EQ(sum(rsdt, u32(rsdt + 4)), 0);
    CHECK_EQ(u32(xsdt + 4), 36 + 3 * 8);
    unsigned cpus = 0;
    for (unsigned i = 0; i < 3; i++) {
        const uint8_t *t = at(u64(xsdt + 36 + 8 * i));
        CHECK_EQ(u32(rsdt + 36 + 4 * i), u64(xsdt + 36 + 8 * i));
        CHECK_EQ(sum(t, u32(t + 4)), 0);
        if (!memcmp(t, "FACP", 4)) {
            CHECK_EQ(u32(t + 4), 276);
            const uint8_t *dsdt = at(u32(t + 40));
            CHECK_EQ(u64(t + 140), u32(t + 40));
            CHECK(!memcmp(dsdt, "DSDT", 4));
            CHECK_EQ(sum(dsdt, u32(dsdt + 4)), 0);
            CHECK(!memcmp(at(u32(t + 36)), "FACS", 4));
            CHECK_EQ(u32(t + 36) % 64, 0);
        }
        if (!memcmp(t, "APIC", 4))
            for (const uint8_t *e = t + 44; e < t + u32(t + 4); e += e[1])
                cpus += e[0] == 0;
    }
    CHECK_EQ(cpus, 3);
    rig_free(&r);
}

TEST(pc_mp_tables)
{
    rig r;
    pc_new(&r, 64, 32 << 20);
    OK(vm_read(r.m, 0xe0000, area, sizeof area));
    const uint8_t *mp = NULL;
    for (unsigned i = 0x10000; i < sizeof area && !mp; i += 16)
        if (!memcmp(area + i, "_MP_", 4))
            mp = area + i;
    CHECK(mp != NULL);
    CHECK_EQ(sum(mp, 16), 0);
    const uint8_t *table = at(u32(mp + 4));
    unsigned length = table[4] | (unsigned)table[5] << 8, entries = table[34] | (unsigned)table[35] << 8, cpus = 0;
    CHECK_EQ(sum(table, length), 0);
    const uint8_t *e = table + 44;
    for (unsigned i = 0; i < entries; i++) {
        cpus += e[0] == 0;
        e += e[0] == 0 ? 20 : 8;
    }
    CHECK_EQ(e - table, length);
    CHECK_EQ(cpus, 64);
    rig_free(&r);
}

TEST(pc_smbios_tables)
{
    rig r;
    pc_new(&r, 4, UINT64_C(5) << 30);
    OK(vm_read(r.m, 0xe0000, area, sizeof area));
    const uint8_t *anchor = NULL;
    for (unsigned i = 0x10000; i < sizeof area && !anchor; i += 16)
        if (!memcmp(area + i, "_SM_", 4))
            anchor = area + i;
    CHECK(anchor != NULL);
    CHECK_EQ(sum(anchor, anchor[5]), 0);
    CHECK_EQ(sum(anchor + 16, 15), 0);
    unsigned length = anchor[22] | (unsigned)anchor[23] << 8, count = anchor[28] | (unsigned)anchor[29] << 8, seen = 0;
    const uint8_t *p = at(u32(anchor + 24)), *end = p + length;
    while (p < end) {
        CHECK(p[1] >= 4);
        if (p[0] == 4)
            CHECK_EQ(p[0x23], 4);                /* cores */
        if (p[0] == 17)
            CHECK_EQ(p[12] | p[13] << 8, 5 << 10);
        seen++;
        for (p += p[1]; p[0] || p[1]; p++)
            CHECK(p < end);
        p += 2;
    }
    CHECK(p == end);
    CHECK_EQ(seen, count);
    rig_free(&r);
}

static unsigned cell(rig *r, uint8_t index)
{
    outb(r, 0x70, index);
    return inb(r, 0x71);
}

TEST(pc_cmos_sizes)
{
    rig r;
    pc_new(&r, 2, UINT64_C(5) << 30);
    CHECK_EQ(cell(&r, 0x15) | cell(&r, 0x16) << 8, 640);
    CHECK_EQ(cell(&r, 0x34) | cell(&r, 0x35) << 8, ((3u << 30) - (16u << 20)) >> 16);
    CHECK_EQ(cell(&r, 0x5b) | cell(&r, 0x5c) << 8 | cell(&r, 0x5d) << 16, (2u << 30) >> 16);
    CHECK_EQ(cell(&r, 0x5f), 1);
    rig_free(&r);
}

#define APIC UINT64_C(0xfee00000)
#define IOAPIC UINT64_C(0xfec00000)
static void route(rig *r, unsigned pin, uint32_t low)
{
    poke(r, 0, IOAPIC, 0x10 + 2 * pin);
    poke(r, 0, IOAPIC + 0x10, low);
}
static int pending(rig *r) { return vm_pc_irq_source.pending(r->m->vcpus[0]); }
static void start_pic(rig *r)
{
    outb(r, 0x20, 0x11);
    outb(r, 0x21, 0x20);
    outb(r, 0x21, 0x04);
    outb(r, 0x21, 0x01);
    outb(r, 0x21, 0x00);
}

TEST(pc_interrupt_wiring)
{
    rig r;
    pc_new(&r, 1, 16 << 20);
    start_pic(&r);
    OK(vm_irq_set(r.m, 5, true));
    CHECK_EQ(pending(&r), 0x25);                 /* through the PIC with the APIC as reset leaves it */
    CHECK_EQ(vm_pc_irq_source.acknowledge(r.m->vcpus[0]), 0x25);
    CHECK_EQ(pending(&r), -1);
    OK(vm_irq_set(r.m, 5, false));
    outb(&r, 0x21, 0xff);
    poke(&r, 0, APIC + 0xf0, 0x1ff);
    route(&r, 2, 0x32);
    route(&r, 17, 0x8041);
    OK(vm_irq_set(r.m, 0, true));
    CHECK_EQ(pending(&r), 0x32);                 /* IRQ 0 is pin 2 */
    OK(vm_irq_set(r.m, 17, true));
    CHECK_EQ(pending(&r), 0x41);
    CHECK_EQ(vm_pc_irq_source.acknowledge(r.m->vcpus[0]), 0x41);
    OK(vm_irq_set(r.m, 17, false));
    poke(&r, 0, APIC + 0xb0, 0);
    CHECK_EQ(pending(&r), 0x32);
    REFUSED(vm_irq_set(r.m, 24, true), VM_E_INVALID);
    OK(vm_irq_msi(r.m, 0xfee00000, 0x61));
    CHECK_EQ(pending(&r), 0x61);
    REFUSED(vm_irq_msi(r.m, 0xfed00000, 0x61), VM_E_INVALID);
    REFUSED(vm_irq_msi(r.m, UINT64_C(0x1fee00000), 0x61), VM_E_INVALID);
    rig_free(&r);
}

TEST(pc_shared_line)
{
    rig r;
    pc_new(&r, 1, 16 << 20);
    start_pic(&r);
    outb(&r, 0x4d0, 0x10);                       /* IRQ 4 as a level */
    for (unsigned port = 0x3e8; port <= 0x3f8; port += 0x10) {
        outb(&r, (uint16_t)(port + 4), 0x08);
        outb(&r, (uint16_t)(port + 1), 0x02);
    }
    CHECK_EQ(pending(&r), 0x24);
    inb(&r, 0x3f8 + 2);
    CHECK_EQ(pending(&r), 0x24);                 /* the other port still asks */
    inb(&r, 0x3e8 + 2);
    CHECK_EQ(pending(&r), -1);
    rig_free(&r);
}

TEST(pc_serial_api)
{
    rig r;
    pc_new(&r, 1, 16 << 20);
    REFUSED(vm_serial_output(r.m, 4, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_serial_input(r.m, 4, (const uint8_t *)"x", 1), VM_E_INVALID);
    CHECK_EQ(vm_serial_input(r.m, 1, (const uint8_t *)"hello", 5), 5);
    CHECK_EQ(inb(&r, 0x2f8), 'h');
    CHECK_EQ(inb(&r, 0x2f8), 'e');
    rig_free(&r);
}

TEST(pc_init_sipi)
{
    rig r;
    pc_new(&r, 2, 16 << 20);
    vm_vcpu *ap = r.m->vcpus[1];
    CHECK(ap->is_parked && !r.m->vcpus[0]->is_parked);
    poke(&r, 0, APIC + 0x310, 1u << 24);
    poke(&r, 0, APIC + 0x300, 0x4608);           /* SIPI while parked starts it */
    vm_pc_vcpu_event(ap);
    CHECK(!ap->is_parked);
    CHECK_EQ(ap->x86.seg[X86_CS].sel, 0x800);
    CHECK_EQ(ap->x86.seg[X86_CS].base, 0x8000);
    CHECK_EQ(ap->x86.rip, 0);
    poke(&r, 0, APIC + 0x300, 0x4609);           /* running: ignored */
    vm_pc_vcpu_event(ap);
    CHECK_EQ(ap->x86.seg[X86_CS].sel, 0x800);
    poke(&r, 0, APIC + 0x300, 0x4400);           /* NMI */
    vm_pc_vcpu_event(ap);
    CHECK(ap->x86.nmi_pending);
    poke(&r, 1, APIC + 0xf0, 0x1ff);
    poke(&r, 0, APIC + 0x300, 0xc500);           /* INIT parks it and clears its APIC */
    vm_pc_vcpu_event(ap);
    CHECK(ap->is_parked && !ap->x86.nmi_pending);
    poke(&r, 0, APIC + 0x300, 0x4400);           /* parked: no NMI */
    vm_pc_vcpu_event(ap);
    CHECK(!ap->x86.nmi_pending);
    CHECK_EQ(peek(&r, 1, APIC + 0xf0), 0xff);
    CHECK_EQ(vm_pc_apic_base(ap), 0xfee00800);
    CHECK_EQ(vm_pc_apic_base(r.m->vcpus[0]), 0xfee00900);
    rig_free(&r);
}

TEST(pc_apic_base_moves)
{
    rig r;
    pc_new(&r, 1, 16 << 20);
    CHECK(vm_pc_msr_write(r.m->vcpus[0], 0x1b, 0xd0000900));
    CHECK_EQ(peek(&r, 0, UINT64_C(0xd0000030)), 0x00050014);
    CHECK(vm_view_find(&r.m->view, APIC) == NULL);
    CHECK(vm_pc_msr_write(r.m->vcpus[0], 0x1b, 0x00100900));       /* onto RAM: RAM stays */
    uint8_t byte;
    OK(vm_read(r.m, 0x100000, &byte, 1));
    vm_pc_reset(r.m);
    CHECK_EQ(peek(&r, 0, APIC + 0x30), 0x00050014);
    rig_free(&r);
}

TEST(pc_hpet_legacy_cuts_the_pit)
{
    rig r;
    pc_new(&r, 1, 16 << 20);
    start_pic(&r);
    poke8(&r, VM_PC_HPET + 0x10, 2);
    outb(&r, 0x43, 0x30);
    outb(&r, 0x40, 1);
    outb(&r, 0x40, 0);
    struct timespec t = { .tv_nsec = 5000000 };
    nanosleep(&t, NULL);
    vm_clock_fire(r.m);                /* no vCPU runs, so nobody else does it */
    CHECK_EQ(pending(&r), -1);
    poke8(&r, VM_PC_HPET + 0x10, 0);
    outb(&r, 0x43, 0x30);
    outb(&r, 0x40, 1);
    outb(&r, 0x40, 0);
    for (unsigned i = 0; i < 1000 && pending(&r) < 0; i++) {
        nanosleep(&t, NULL);
        vm_clock_fire(r.m);
    }
    CHECK_EQ(pending(&r), 0x20);
    rig_free(&r);
}

/* With IRQ 8 given to the HPET, the RTC's alarms reach the guest as an ACPI event. */
TEST(pc_rtc_event)
{
    rig r;
    struct timespec t = { .tv_nsec = 5000000 };
    pc_new(&r, 1, 16 << 20);
    start_pic(&r);
    for (unsigned i = 0; i < 5; i++)
        outb(&r, i ? 0xa1 : 0xa0, (const uint8_t[]){ 0x11, 0x28, 0x02, 0x01, 0x00 }[i]);
    poke8(&r, VM_PC_HPET + 0x10, 2);
    outb(&r, 0xb2, 0xf1);                        /* ACPI mode */
    outw(&r, 0x602, 1 << 10);
    outw(&r, 0x600, 1 << 10);
    CHECK_EQ(pending(&r), -1);
    for (unsigned reg = 1; reg <= 5; reg += 2) {
        outb(&r, 0x70, (uint8_t)reg);
        outb(&r, 0x71, 0xff);                    /* every second */
    }
    outb(&r, 0x70, 11);
    outb(&r, 0x71, 0x22);                        /* alarm interrupt, 24 hours */
    for (unsigned i = 0; i < 1000 && pending(&r) < 0; i++) {
        nanosleep(&t, NULL);
        vm_clock_fire(r.m);
    }
    CHECK_EQ(pending(&r), 0x29);                 /* the SCI, not IRQ 8 */
    CHECK_EQ(inw(&r, 0x600) & 1 << 10, 1 << 10);
    outb(&r, 0x70, 12);
    CHECK_EQ(inb(&r, 0x71) & 0xa0, 0xa0);
    outw(&r, 0x600, 1 << 10);
    CHECK_EQ(inw(&r, 0x600) & 1 << 10, 0);
    rig_free(&r);
}

TEST(pc_smbus_is_empty)
{
    rig r;
    pc_new(&r, 1, 16 << 20);
    outl(&r, 0xcf8, 0x80000b90);
    CHECK_EQ(inl(&r, 0xcfc), 0xb101);
    outl(&r, 0xcf8, 0x80000bd0);
    CHECK_EQ(inb(&r, 0xcfe) & 1, 1);
    CHECK_EQ(inb(&r, 0xb100), 0);
    outb(&r, 0xb104, 0xa1);                       /* a memory module's data? */
    CHECK_EQ(inb(&r, 0xb104), 0xa1);
    outb(&r, 0xb102, 0x48);
    CHECK_EQ(inb(&r, 0xb102), 0x08);
    CHECK_EQ(inb(&r, 0xb100), 0x04);              /* no */
    outb(&r, 0xb100, 0x04);
    CHECK_EQ(inb(&r, 0xb100), 0);
    rig_free(&r);
}

/* ---- saved state ---- */
static uint8_t *save(rig *r, size_t *bytes)
{
    vm_device_lock(r->m);
    OK(vm_pc_save(r->m, NULL, bytes));
    uint8_t *state = malloc(*bytes);
    OK(vm_pc_save(r->m, state, bytes));
    vm_device_unlock(r->m);
    return state;
}

static int restore(rig *r, const uint8_t *state, size_t bytes)
{
    vm_device_lock(r->m);
    int status = vm_pc_restore(r->m, state, bytes);
    vm_device_unlock(r->m);
    return status;
}

static void stir(rig *r, uint32_t seed, unsigned count);

TEST(pc_save_restore)
{
    rig r;
    size_t bytes, again;
    pc_new(&r, 2, 16 << 20);
    start_pic(&r);
    OK(vm_irq_set(r.m, 5, true));
    poke(&r, 0, APIC + 0xf0, 0x1ff);
    route(&r, 11, 0x8041);
    OK(vm_irq_set(r.m, 11, true));
    outb(&r, 0x70, 0x0f);
    outb(&r, 0x71, 0x77);
    uint8_t *one = save(&r, &bytes);
    stir(&r, 99, 3000);
    OK(restore(&r, one, bytes));
    uint8_t *two = save(&r, &again);
    CHECK_EQ(bytes, again);
    for (size_t i = 0; i < bytes; i++)
        if (one[i] != two[i])
            FAIL("byte %zu of %zu differs after a restore", i, bytes);
    CHECK_EQ(pending(&r), 0x41);
    CHECK_EQ(vm_pc_irq_source.acknowledge(r.m->vcpus[0]), 0x41);
    CHECK_EQ(pending(&r), 0x25);
    free(one);
    free(two);
    rig_free(&r);
}

TEST(pc_restore_hostile)
{
    rig r;
    size_t bytes;
    uint32_t seed = 5;
    pc_new(&r, 1, 16 << 20);
    uint8_t *state = save(&r, &bytes), *bad = malloc(bytes);
    for (size_t n = 0; n < bytes; n += 97)
        REFUSED(restore(&r, state, n), VM_E_FORMAT);
    for (unsigned i = 0; i < 400; i++) {
        memcpy(bad, state, bytes);
        for (unsigned k = 0; k < 1 + i / 10; k++) {
            seed = seed * 1664525 + 1013904223;
            bad[(seed >> 8) % bytes] ^= (uint8_t)(1u << (seed & 7));
        }
        restore(&r, bad, bytes);                 /* any answer, no crash */
        stir(&r, seed, 50);
    }
    OK(restore(&r, state, bytes));
    free(state);
    free(bad);
    rig_free(&r);
}

/* ---- everything at random ---- */
static void stir(rig *r, uint32_t seed, unsigned count)
{
    static const uint64_t pages[] = { UINT64_C(0xfee00000), UINT64_C(0xfec00000), UINT64_C(0xfed00000) };
    for (unsigned i = 0; i < count; i++) {
        seed = seed * 1664525 + 1013904223;
        uint32_t pick = seed >> 8;
        seed = seed * 1664525 + 1013904223;
        uint64_t value = (uint64_t)(seed >> 4) << (pick >> 20 & 15);
        unsigned width = 1u << (pick & 3);
        bool is_write = pick >> 2 & 1;
        vm_view *view = &r->m->ports;
        uint64_t where;
        vm_device_lock(r->m);
        if (pick >> 3 & 1) {
            view = &r->m->view;
            where = pages[(pick >> 4) % 3] + (pick >> 6 & 0x7f) * 8 % 0x400 + (pick >> 13 & 4);
        } else {
            size_t n = (pick >> 4) % r->m->ports.count;
            where = r->m->ports.ranges[n].gpa + (pick >> 12) % r->m->ports.ranges[n].bytes;
            width = width > 4 ? 4 : width;
        }
        const vm_range *range = vm_view_find(view, where);
        if (range && range->region->kind >= VM_REGION_MMIO && where + width <= range->gpa + range->bytes)
            rig_access(r, view, (seed >> 2) % r->m->vcpu_count, where, width, is_write, value);
        vm_device_unlock(r->m);
        if (pick >> 16 == 0)
            vm_pc_vcpu_event(r->m->vcpus[0]);
    }
}

static void stirred(const void *arg)
{
    rig r;
    pc_new(&r, 3, 16 << 20);
    uint32_t seed = (uint32_t)(uintptr_t)arg;
    for (unsigned i = 0; i < 20; i++) {
        stir(&r, seed * 1000 + i, 2000);
        for (unsigned c = 0; c < 3; c++)
            if (vm_pc_irq_source.pending(r.m->vcpus[c]) >= 0)
                vm_pc_irq_source.acknowledge(r.m->vcpus[c]);
    }
    vm_pc_reset(r.m);
    CHECK_EQ(inb(&r, 0x3fd), 0x60);
    rig_free(&r);
}

SETUP(stir)
{
    static char names[8][32];
    for (unsigned i = 0; i < 8; i++) {
        snprintf(names[i], sizeof names[i], "pc_stirred_%u", i);
        test_add(names[i], stirred, (const void *)(uintptr_t)(i + 1), 0);
    }
}
