/* dev_time.c - timers and clocks against their data sheets: 8254, MC146818, HPET, ACPI PM timer. */
#include "rig.h"

/* ---- 8254 ---- */
#define PIT_HZ 1193182u

static void pit_new(rig *r)
{
    vm_pit *pit;
    rig_new(r);
    OK(vm_pit_new(r->m, rig_wire(r, 0), &pit));
}

static void load(rig *r, unsigned channel, unsigned mode, uint16_t count)
{
    outb(r, 0x43, (uint8_t)(channel << 6 | 0x30 | mode << 1));
    outb(r, (uint16_t)(0x40 + channel), (uint8_t)count);
    outb(r, (uint16_t)(0x40 + channel), (uint8_t)(count >> 8));
}

static unsigned latched(rig *r, unsigned channel)
{
    outb(r, 0x43, (uint8_t)(channel << 6));
    unsigned low = inb(r, (uint16_t)(0x40 + channel));
    return low | (unsigned)inb(r, (uint16_t)(0x40 + channel)) << 8;
}

static bool out(rig *r, unsigned channel)
{
    outb(r, 0x43, (uint8_t)(0xe0 | 2u << channel));
    return inb(r, (uint16_t)(0x40 + channel)) & 0x80;
}

/* Let n input clocks pass (and a little more, so that rounding cannot hold one back). */
static void clocks(rig *r, uint64_t n) { pass(r, vm_ns_from_ticks(n, PIT_HZ) + 100); }

TEST(pit_mode_0)
{
    rig r;
    pit_new(&r);
    load(&r, 0, 0, 1000);
    CHECK(!out(&r, 0));
    CHECK(!r.level[0]);
    clocks(&r, 400);
    unsigned v = latched(&r, 0);
    CHECK(v >= 598 && v <= 600);
    CHECK(!out(&r, 0));
    clocks(&r, 600);
    CHECK(out(&r, 0));
    CHECK_EQ(r.rises[0], 1);
    clocks(&r, 1000);
    CHECK(latched(&r, 0) > 64000);               /* goes on below zero */
    CHECK_EQ(r.rises[0], 1);
    rig_free(&r);
}

TEST(pit_rate_does_not_drift)
{
    rig r;
    pit_new(&r);
    load(&r, 0, 2, 11932);                       /* 99.998 Hz */
    pass(&r, 100 * SECOND);
    uint64_t want = 100ull * PIT_HZ / 11932;
    CHECK(r.rises[0] >= want - 1 && r.rises[0] <= want + 1);
    load(&r, 0, 3, 1193);
    r.rises[0] = 0;
    pass(&r, 10 * SECOND);
    want = 10ull * PIT_HZ / 1193;
    CHECK(r.rises[0] >= want - 1 && r.rises[0] <= want + 1);
    rig_free(&r);
}

TEST(pit_late_ticks_are_kept)
{
    rig r;
    pit_new(&r);
    load(&r, 0, 2, 11932);
    r.state = VM_LINE_PENDING;                   /* the guest does not look for half a second */
    pass(&r, SECOND / 2);
    CHECK(r.rises[0] == 0);
    r.state = VM_LINE_FREE;
    pass(&r, SECOND / 2);
    CHECK(r.rises[0] >= 98 && r.rises[0] <= 101);
    r.state = VM_LINE_MASKED;                    /* nobody listens: nothing is owed */
    pass(&r, 5 * SECOND);
    r.state = VM_LINE_FREE;
    r.rises[0] = 0;
    pass(&r, SECOND);
    CHECK(r.rises[0] >= 98 && r.rises[0] <= 101);
    rig_free(&r);
}

TEST(pit_mode_2_and_3_output)
{
    rig r;
    pit_new(&r);
    outb(&r, 0x61, 1);
    load(&r, 2, 3, 1000);
    CHECK(out(&r, 2));
    clocks(&r, 600);
    CHECK(!out(&r, 2));
    CHECK_EQ(inb(&r, 0x61) & 0x20, 0);
    clocks(&r, 500);
    CHECK_EQ(inb(&r, 0x61) & 0x20, 0x20);
    load(&r, 2, 2, 1000);
    clocks(&r, 998);
    CHECK(out(&r, 2));
    unsigned v = latched(&r, 2);
    CHECK(v >= 1 && v <= 3);
    outb(&r, 0x61, 0);                           /* closing the gate stops it, OUT high */
    CHECK(out(&r, 2));
    outb(&r, 0x61, 1);
    v = latched(&r, 2);
    CHECK(v >= 998 && v <= 1000);                /* and opening it starts over */
    rig_free(&r);
}

TEST(pit_new_count_waits_for_the_period)
{
    rig r;
    pit_new(&r);
    outb(&r, 0x61, 1);
    load(&r, 2, 2, 10000);
    clocks(&r, 4000);
    outb(&r, 0x42, 100);
    outb(&r, 0x42, 0);
    unsigned v = latched(&r, 2);
    CHECK(v > 5900 && v <= 6000);
    clocks(&r, 6010);
    v = latched(&r, 2);
    CHECK(v <= 100);
    rig_free(&r);
}

TEST(pit_gate_modes_1_4_5)
{
    rig r;
    pit_new(&r);
    outb(&r, 0x61, 0);
    load(&r, 2, 1, 1000);
    clocks(&r, 5000);
    CHECK(out(&r, 2));                           /* not triggered */
    outb(&r, 0x61, 1);
    CHECK(!out(&r, 2));
    clocks(&r, 500);
    outb(&r, 0x61, 0);
    outb(&r, 0x61, 1);                           /* retriggered */
    clocks(&r, 700);
    CHECK(!out(&r, 2));
    clocks(&r, 310);
    CHECK(out(&r, 2));
    load(&r, 2, 4, 1000);
    CHECK(out(&r, 2));
    clocks(&r, 500);
    outb(&r, 0x61, 0);                           /* paused */
    clocks(&r, 5000);
    unsigned v = latched(&r, 2);
    CHECK(v >= 498 && v <= 501);
    rig_free(&r);
}

TEST(pit_read_back_and_access)
{
    rig r;
    pit_new(&r);
    load(&r, 2, 0, 0x1234);                      /* the gate is closed: it stays */
    outb(&r, 0x43, 0xe8);                        /* status of channel 2 */
    CHECK_EQ(inb(&r, 0x42), 0x30);
    outb(&r, 0x43, 0xc8);                        /* status and count */
    CHECK_EQ(inb(&r, 0x42), 0x30);
    CHECK_EQ(inb(&r, 0x42), 0x34);
    CHECK_EQ(inb(&r, 0x42), 0x12);
    outb(&r, 0x43, 0x90);                        /* low byte only */
    CHECK_EQ((outb(&r, 0x43, 0xe8), inb(&r, 0x42)), 0x50 | 0x00);     /* null count; mode 0: OUT low */
    outb(&r, 0x42, 0x77);
    CHECK_EQ(inb(&r, 0x42), 0x77);
    CHECK_EQ(inb(&r, 0x42), 0x77);
    outb(&r, 0x43, 0xb1);                        /* BCD */
    outb(&r, 0x42, 0x00);
    outb(&r, 0x42, 0x10);
    CHECK_EQ(latched(&r, 2), 0x1000);
    outb(&r, 0x61, 1);
    clocks(&r, 1);
    CHECK_EQ(latched(&r, 2), 0x0999);
    rig_free(&r);
}

TEST(pit_saved)
{
    rig r;
    pit_new(&r);
    load(&r, 0, 2, 11932);
    pass(&r, SECOND);
    rig_save_restore(&r, &r.m->ports, 0x40);
    r.rises[0] = 0;
    pass(&r, SECOND);
    CHECK(r.rises[0] >= 98 && r.rises[0] <= 101);
    rig_free(&r);
}

TEST(pit_hostile)
{
    rig r;
    uint32_t seed = 1;
    pit_new(&r);
    for (unsigned i = 0; i < 20000; i++) {
        seed = seed * 1664525 + 1013904223;
        uint16_t port = seed >> 30 ? (uint16_t)(0x40 + (seed >> 28 & 3)) : 0x61;
        if (seed >> 27 & 1)
            outb(&r, port, (uint8_t)(seed >> 16));
        else if (port != 0x43)
            inb(&r, port);
        pass(&r, seed >> 20 & 0x3ff);
    }
    rig_free(&r);
}

/* ---- MC146818 ---- */
static vm_rtc *rtc_new(rig *r, int64_t when)
{
    vm_rtc *rtc;
    rig_new(r);
    OK(vm_rtc_new(r->m, rig_wire(r, 8), when, &rtc));
    return rtc;
}
static uint8_t cmos(rig *r, uint8_t index)
{
    outb(r, 0x70, index);
    return inb(r, 0x71);
}
static void cmos_set(rig *r, uint8_t index, uint8_t v)
{
    outb(r, 0x70, index);
    outb(r, 0x71, v);
}

TEST(rtc_time)
{
    rig r;
    rtc_new(&r, 951782399);                      /* Monday 2000-02-28 23:59:59 */
    CHECK_EQ(cmos(&r, 0), 0x59);
    CHECK_EQ(cmos(&r, 4), 0x23);
    CHECK_EQ(cmos(&r, 6), 2);
    CHECK_EQ(cmos(&r, 7), 0x28);
    pass(&r, SECOND);
    CHECK_EQ(cmos(&r, 0), 0);
    CHECK_EQ(cmos(&r, 7), 0x29);                 /* a leap year */
    CHECK_EQ(cmos(&r, 9), 0x00);
    CHECK_EQ(cmos(&r, 0x32), 0x20);
    cmos_set(&r, 11, 0x06);                      /* binary, 24 h */
    CHECK_EQ(cmos(&r, 7), 29);
    cmos_set(&r, 11, 0x00);                      /* BCD, 12 h: midnight is 12 AM */
    CHECK_EQ(cmos(&r, 4), 0x12);
    pass(&r, 13 * 3600 * SECOND);
    CHECK_EQ(cmos(&r, 4), 0x81);
    CHECK_EQ(cmos(&r, 13), 0x80);
    rig_free(&r);
}

TEST(rtc_set)
{
    rig r;
    rtc_new(&r, 1000000000);
    cmos_set(&r, 11, 0x82);                      /* SET */
    cmos_set(&r, 0x32, 0x19);
    cmos_set(&r, 9, 0x99);
    cmos_set(&r, 8, 0x12);
    cmos_set(&r, 7, 0x31);
    cmos_set(&r, 4, 0x23);
    cmos_set(&r, 2, 0x59);
    cmos_set(&r, 0, 0x58);
    pass(&r, 10 * SECOND);
    CHECK_EQ(cmos(&r, 0), 0x58);                 /* held */
    cmos_set(&r, 11, 0x02);
    pass(&r, 3 * SECOND);
    CHECK_EQ(cmos(&r, 0x32), 0x20);
    CHECK_EQ(cmos(&r, 9), 0x00);
    CHECK_EQ(cmos(&r, 8), 0x01);
    CHECK_EQ(cmos(&r, 7), 0x01);
    CHECK_EQ(cmos(&r, 4), 0x00);
    CHECK(cmos(&r, 0) <= 1);
    CHECK_EQ(cmos(&r, 6), 7);                    /* a Saturday */
    rig_free(&r);
}

TEST(rtc_update_interrupt)
{
    rig r;
    rtc_new(&r, 1000000000);
    cmos_set(&r, 11, 0x12);
    unsigned seen = 0;
    for (unsigned i = 0; i < 50; i++) {
        pass(&r, 100 * MS);
        if (r.level[8]) {
            CHECK_EQ(cmos(&r, 12) & 0x90, 0x90);
            CHECK(!r.level[8]);
            seen++;
        }
    }
    CHECK_EQ(seen, 5);
    rig_free(&r);
}

TEST(rtc_periodic_interrupt)
{
    rig r;
    rtc_new(&r, 1000000000);
    cmos_set(&r, 10, 0x26);                      /* 1024 Hz */
    cmos_set(&r, 11, 0x42);
    unsigned seen = 0;
    for (unsigned i = 0; i < 10000; i++) {
        pass(&r, MS / 10);
        if (r.level[8]) {
            cmos(&r, 12);
            seen++;
        }
    }
    CHECK(seen >= 1023 && seen <= 1025);
    cmos_set(&r, 11, 0x02);
    pass(&r, SECOND);
    CHECK(!r.level[8]);
    CHECK_EQ(cmos(&r, 12) & 0x40, 0x40);         /* the flag works without the interrupt */
    rig_free(&r);
}

TEST(rtc_alarm)
{
    rig r;
    rtc_new(&r, 951782399 - 59);                 /* 23:59:00 */
    cmos_set(&r, 1, 0x30);
    cmos_set(&r, 3, 0x00);
    cmos_set(&r, 5, 0x00);
    cmos_set(&r, 11, 0x22);
    pass(&r, 89 * SECOND);
    CHECK(!r.level[8]);
    pass(&r, 2 * SECOND);
    CHECK(r.level[8]);
    CHECK_EQ(cmos(&r, 12) & 0xa0, 0xa0);
    cmos_set(&r, 1, 0xff);                       /* every second */
    cmos_set(&r, 3, 0xff);
    cmos_set(&r, 5, 0xff);
    pass(&r, SECOND + 1);
    CHECK(r.level[8]);
    rig_free(&r);
}

TEST(rtc_update_in_progress)
{
    rig r;
    rtc_new(&r, 1000000000);
    unsigned seen = 0;
    for (unsigned i = 0; i < 10000; i++) {
        pass(&r, 100000);
        seen += cmos(&r, 10) >> 7;
    }
    CHECK(seen >= 2 && seen <= 3);               /* 244 us of each second */
    rig_free(&r);
}

TEST(rtc_cells)
{
    rig r;
    vm_rtc *rtc = rtc_new(&r, 0);
    vm_rtc_set_cell(rtc, 0x15, 0x80);
    CHECK_EQ(cmos(&r, 0x15), 0x80);
    cmos_set(&r, 0x0f, 0x0a);
    CHECK_EQ(cmos(&r, 0x8f), 0x0a);              /* bit 7 of the index is the NMI mask */
    for (unsigned i = 0; i < 256; i++) {
        outb(&r, 0x72, (uint8_t)i);
        outb(&r, 0x73, (uint8_t)i);
    }
    outb(&r, 0x72, 5);
    CHECK_EQ(inb(&r, 0x73), 0x85);
    rig_save_restore(&r, &r.m->ports, 0x70);
    CHECK_EQ(cmos(&r, 0x0f), 0x0a);
    rig_free(&r);
}

TEST(rtc_nonsense)
{
    rig r;
    uint32_t seed = 7;
    rtc_new(&r, 0);
    for (unsigned i = 0; i < 5000; i++) {
        seed = seed * 1664525 + 1013904223;
        cmos_set(&r, seed >> 24 & 15, (uint8_t)(seed >> 16));
        cmos(&r, seed >> 8 & 15);
        pass(&r, seed >> 12);
    }
    rig_free(&r);
}

/* ---- HPET ---- */
#define HPET UINT64_C(0xfed00000)
static bool legacy;
static void on_legacy(void *target, bool on)
{
    (void)target;
    legacy = on;
}

static void hpet_new(rig *r)
{
    vm_line pins[32];
    vm_hpet *h;
    rig_new(r);
    for (unsigned i = 0; i < 32; i++)
        pins[i] = rig_wire(r, i);
    OK(vm_hpet_new(r->m, HPET, pins, on_legacy, NULL, &h));
}

TEST(hpet_counter)
{
    rig r;
    hpet_new(&r);
    CHECK_EQ(peek8(&r, HPET) >> 32, 100000000);
    CHECK_EQ(peek(&r, 0, HPET + 4), 100000000);
    CHECK_EQ(peek8(&r, HPET) & 0xffff, 0xa201);
    pass(&r, MS);
    CHECK_EQ(peek8(&r, HPET + 0xf0), 0);
    poke8(&r, HPET + 0xf0, 500);
    poke(&r, 0, HPET + 0x10, 1);
    pass(&r, MS);
    CHECK_EQ(peek8(&r, HPET + 0xf0), 10500);
    poke8(&r, HPET + 0xf0, 7);                   /* running: ignored */
    CHECK_EQ(peek(&r, 0, HPET + 0xf0), 10500);
    poke(&r, 0, HPET + 0x10, 0);
    pass(&r, MS);
    CHECK_EQ(peek(&r, 0, HPET + 0xf0), 10500);
    rig_free(&r);
}

TEST(hpet_oneshot_edge_and_level)
{
    rig r;
    hpet_new(&r);
    poke(&r, 0, HPET + 0x10, 1);
    poke8(&r, HPET + 0x100, 20u << 9 | 4);
    poke8(&r, HPET + 0x108, 10000);              /* 1 ms */
    poke8(&r, HPET + 0x140, 21u << 9 | 6);       /* level */
    poke8(&r, HPET + 0x148, 20000);
    pass(&r, MS - 100);
    CHECK_EQ(r.rises[20], 0);
    pass(&r, 200);
    CHECK_EQ(r.rises[20], 1);
    pass(&r, MS);
    CHECK(r.level[21]);
    CHECK_EQ(peek8(&r, HPET + 0x20), 4);
    poke8(&r, HPET + 0x20, 4);
    CHECK(!r.level[21]);
    pass(&r, 10 * MS);
    CHECK_EQ(r.rises[20], 1);
    poke8(&r, HPET + 0x120, 5u << 9 | 4);        /* a pin it does not have */
    CHECK_EQ(peek8(&r, HPET + 0x120) >> 9 & 31, 0);
    rig_free(&r);
}

TEST(hpet_periodic_legacy)
{
    rig r;
    hpet_new(&r);
    poke8(&r, HPET + 0x100, 0x4c);               /* enable, periodic, set value */
    poke8(&r, HPET + 0x108, 10000);
    poke8(&r, HPET + 0x10, 3);
    CHECK(legacy);
    pass(&r, 100 * MS + 500);
    CHECK_EQ(r.rises[0], 100);
    CHECK_EQ(peek8(&r, HPET + 0x108), 1010000);
    /* Linux writes the first match with the set bit, then the period without it. */
    poke8(&r, HPET + 0x100, 0x4c);
    poke8(&r, HPET + 0x108, peek8(&r, HPET + 0xf0) + 50000);
    poke8(&r, HPET + 0x108, 20000);
    r.rises[0] = 0;
    pass(&r, 5 * MS + 100);
    CHECK_EQ(r.rises[0], 1);
    pass(&r, 20 * MS);
    CHECK_EQ(r.rises[0], 11);
    rig_save_restore(&r, &r.m->view, HPET);
    CHECK(legacy);
    r.rises[0] = 0;
    pass(&r, 20 * MS);
    CHECK_EQ(r.rises[0], 10);
    rig_free(&r);
}

TEST(hpet_32_bit_halves)
{
    rig r;
    hpet_new(&r);
    poke8(&r, HPET + 0xf0, 0xfffff000);
    poke8(&r, HPET + 0x100, 20u << 9 | 0x104);   /* 32-bit mode */
    poke(&r, 0, HPET + 0x108, 0x1000);
    CHECK_EQ(peek8(&r, HPET + 0x108), 0x1000);
    poke(&r, 0, HPET + 0x10, 1);
    pass(&r, 0x1fff * 100);
    CHECK_EQ(r.rises[20], 0);
    pass(&r, 200);
    CHECK_EQ(r.rises[20], 1);                    /* across the wrap */
    rig_free(&r);
}

TEST(hpet_hostile)
{
    rig r;
    uint32_t seed = 3;
    hpet_new(&r);
    for (unsigned i = 0; i < 20000; i++) {
        seed = seed * 1664525 + 1013904223;
        uint64_t value = (uint64_t)seed << (seed & 31);
        if (seed >> 31)
            poke8(&r, HPET + (seed >> 16 & 0x178), value);
        else
            poke(&r, 0, HPET + (seed >> 16 & 0x17c), (uint32_t)value);
        peek8(&r, HPET + (seed >> 12 & 0x178));
        pass(&r, seed >> 20);
    }
    rig_free(&r);
}

/* ---- ACPI ---- */
TEST(acpi_timer_and_sci)
{
    rig r;
    vm_acpi *a;
    rig_new(&r);
    OK(vm_acpi_new(r.m, rig_wire(&r, 9), &a));
    uint32_t t = inl(&r, 0x608);
    pass(&r, SECOND);
    CHECK_EQ(inl(&r, 0x608) - t, 3579545);
    vm_acpi_power_button(a);
    CHECK_EQ(inw(&r, 0x600), 0x100);
    CHECK(!r.level[9]);
    outw(&r, 0x602, 0x100);
    outb(&r, 0xb2, 0xf1);                        /* ACPI mode */
    CHECK_EQ(inw(&r, 0x604) & 1, 1);
    CHECK(r.level[9]);
    outw(&r, 0x600, 0x100);
    CHECK(!r.level[9]);
    outw(&r, 0x602, 1);                          /* timer status: every 600 s */
    pass(&r, 601 * SECOND);
    CHECK(r.level[9]);
    CHECK_EQ(inw(&r, 0x600), 1);
    rig_save_restore(&r, &r.m->ports, 0x600);
    CHECK_EQ(inw(&r, 0x600), 1);
    rig_free(&r);
}

TEST(acpi_power_off)
{
    rig r;
    vm_acpi *a;
    rig_new(&r);
    OK(vm_acpi_new(r.m, rig_wire(&r, 9), &a));
    outw(&r, 0x604, 0x3c00);
    CHECK_EQ(r.m->event_seq, 0);
    outw(&r, 0x604, 0x2000);
    CHECK_EQ(r.m->event_seq, 1);
    CHECK_EQ(r.m->event, VM_EXIT_POWEROFF);
    rig_free(&r);
}
