/* dev_irq.c - interrupt controllers against their data sheets: 8259A pair, local APIC, 82093AA. */
#include "rig.h"

/* ---- 8259A ---- */
static vm_pic *pic_new(rig *r)
{
    vm_pic *pic;
    rig_new(r);
    OK(vm_pic_new(r->m, rig_wire(r, 0), &pic));
    static const uint8_t words[][2] = { { 0x20, 0x11 }, { 0x21, 0x20 }, { 0x21, 0x04 }, { 0x21, 0x01 },
                                        { 0xa0, 0x11 }, { 0xa1, 0x28 }, { 0xa1, 0x02 }, { 0xa1, 0x01 } };
    for (unsigned i = 0; i < 8; i++)
        outb(r, words[i][0], words[i][1]);
    outb(r, 0x21, 0);
    outb(r, 0xa1, 0);
    return pic;
}

static void pulse(vm_pic *pic, unsigned irq)
{
    vm_pic_set(pic, irq, true);
    vm_pic_set(pic, irq, false);
}

TEST(pic_priority_and_eoi)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    pulse(pic, 4);
    CHECK(r.level[0]);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x24);
    CHECK(!r.level[0]);
    pulse(pic, 6);
    CHECK(!r.level[0]);                          /* lower than the one in service */
    pulse(pic, 1);
    CHECK(r.level[0]);                           /* higher: nests */
    CHECK_EQ(vm_pic_acknowledge(pic), 0x21);
    outb(&r, 0x20, 0x0b);
    CHECK_EQ(inb(&r, 0x20), 0x12);               /* ISR */
    outb(&r, 0x20, 0x0a);
    CHECK_EQ(inb(&r, 0x20), 0x40);               /* IRR */
    outb(&r, 0x20, 0x20);                        /* non-specific EOI ends 1, not 4 */
    CHECK(!r.level[0]);
    outb(&r, 0x20, 0x64);                        /* specific EOI of 4 */
    CHECK_EQ(vm_pic_peek(pic), 0x26);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x26);
    rig_free(&r);
}

TEST(pic_cascade)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    pulse(pic, 8);
    pulse(pic, 14);
    pulse(pic, 3);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x28);     /* slave sits at master input 2 */
    outb(&r, 0xa0, 0x0b);
    CHECK_EQ(inb(&r, 0xa0), 0x01);
    outb(&r, 0xa0, 0x20);
    CHECK(!r.level[0]);                          /* master input 2 is still in service */
    outb(&r, 0x20, 0x20);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x2e);
    outb(&r, 0xa0, 0x20);
    outb(&r, 0x20, 0x20);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x23);
    rig_free(&r);
}

TEST(pic_mask_and_spurious)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    pulse(pic, 5);
    outb(&r, 0x21, 0x20);
    CHECK(!r.level[0]);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x27);     /* nothing left: IR7, no ISR bit */
    outb(&r, 0x20, 0x0b);
    CHECK_EQ(inb(&r, 0x20), 0);
    CHECK_EQ(vm_pic_state(pic, 5), VM_LINE_MASKED);
    outb(&r, 0x21, 0);
    CHECK(r.level[0]);
    CHECK_EQ(vm_pic_state(pic, 5), VM_LINE_PENDING);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x25);
    CHECK_EQ(vm_pic_state(pic, 5), VM_LINE_FREE);
    rig_free(&r);
}

TEST(pic_level_triggered)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    outb(&r, 0x4d1, 0xff);
    CHECK_EQ(inb(&r, 0x4d1), 0xde);              /* 8 and 13 stay edges */
    vm_pic_set(pic, 11, true);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x2b);
    outb(&r, 0xa0, 0x20);
    outb(&r, 0x20, 0x20);
    CHECK(r.level[0]);                           /* the line is still up */
    vm_pic_set(pic, 11, false);
    CHECK(!r.level[0]);
    rig_free(&r);
}

TEST(pic_rotation)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    pulse(pic, 0);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x20);
    outb(&r, 0x20, 0xa0);                        /* rotate on non-specific EOI: 0 becomes lowest */
    pulse(pic, 0);
    pulse(pic, 7);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x27);
    outb(&r, 0x20, 0x67);
    outb(&r, 0x20, 0xc3);                        /* set priority: 3 lowest, 4 highest */
    pulse(pic, 5);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x25);
    outb(&r, 0x20, 0xe5);                        /* rotate on specific EOI: 5 lowest */
    pulse(pic, 6);
    pulse(pic, 5);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x26);
    rig_free(&r);
}

TEST(pic_special_mask)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    pulse(pic, 2 + 1);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x23);
    outb(&r, 0x21, 0x08);                        /* mask the level in service */
    outb(&r, 0x20, 0x68);                        /* special mask mode on */
    pulse(pic, 6);
    CHECK(r.level[0]);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x26);
    outb(&r, 0x20, 0x48);                        /* off again: 3 blocks lower ones */
    outb(&r, 0x20, 0x66);
    pulse(pic, 7);
    CHECK(!r.level[0]);
    rig_free(&r);
}

TEST(pic_poll_and_auto_eoi)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    outb(&r, 0x20, 0x0c);
    CHECK_EQ(inb(&r, 0x20), 0x00);
    pulse(pic, 3);
    outb(&r, 0x20, 0x0c);
    CHECK_EQ(inb(&r, 0x20), 0x83);
    outb(&r, 0x20, 0x0b);
    CHECK_EQ(inb(&r, 0x20), 0x08);               /* the poll was an acknowledge */
    outb(&r, 0x20, 0x11);
    outb(&r, 0x21, 0x40);
    outb(&r, 0x21, 0x04);
    outb(&r, 0x21, 0x03);                        /* automatic EOI */
    pulse(pic, 3);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x43);
    pulse(pic, 4);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x44);
    rig_free(&r);
}

TEST(pic_saved)
{
    rig r;
    vm_pic *pic = pic_new(&r);
    pulse(pic, 9);
    rig_save_restore(&r, &r.m->ports, 0x20);
    CHECK_EQ(vm_pic_acknowledge(pic), 0x29);
    rig_free(&r);
}

/* ---- local APIC ---- */
#define APIC UINT64_C(0xfee00000)
static uint8_t last_eoi;
static void on_eoi(void *target, uint8_t vector)
{
    (void)target;
    last_eoi = vector;
}

static vm_apics *apics_new(rig *r, unsigned vcpus)
{
    vm_apics *a;
    rig_new_vcpus(r, vcpus);
    OK(vm_apics_new(r->m, on_eoi, NULL, &a));
    for (unsigned i = 0; i < vcpus; i++)
        poke(r, i, APIC + 0xf0, 0x1ff);
    return a;
}

static int pending(rig *r, unsigned cpu) { return vm_lapic_pending(r->m->vcpus[cpu]); }
static int ack(rig *r, unsigned cpu)
{
    vm_device_lock(r->m);
    int vector = vm_lapic_acknowledge(r->m->vcpus[cpu]);
    vm_device_unlock(r->m);
    return vector;
}
static void self_ipi(rig *r, unsigned cpu, uint8_t vector) { poke(r, cpu, APIC + 0x300, 0x44000 | vector); }

TEST(lapic_registers)
{
    rig r;
    apics_new(&r, 2);
    CHECK_EQ(peek(&r, 1, APIC + 0x20), 0x01000000);
    CHECK_EQ(peek(&r, 0, APIC + 0x30), 0x00050014);
    CHECK_EQ(peek(&r, 0, APIC + 0xe0), 0xffffffff);
    CHECK_EQ(peek(&r, 0, APIC + 0x320), 0x10000);
    CHECK_EQ(peek(&r, 1, APIC + 0x350), 0x10000);
    poke(&r, 0, APIC + 0x320, 0xffffffff);
    CHECK_EQ(peek(&r, 0, APIC + 0x320), 0x710ff & ~0x1000);
    rig_free(&r);
}

TEST(lapic_priorities)
{
    rig r;
    apics_new(&r, 1);
    self_ipi(&r, 0, 0x51);
    self_ipi(&r, 0, 0x63);
    CHECK_EQ(pending(&r, 0), 0x63);
    CHECK_EQ(ack(&r, 0), 0x63);
    CHECK_EQ(pending(&r, 0), -1);                /* 0x51 is below the class in service */
    CHECK_EQ(peek(&r, 0, APIC + 0xa0), 0x60);
    self_ipi(&r, 0, 0x6f);
    CHECK_EQ(pending(&r, 0), -1);                /* same class does not nest */
    self_ipi(&r, 0, 0x71);
    CHECK_EQ(ack(&r, 0), 0x71);
    poke(&r, 0, APIC + 0xb0, 0);
    poke(&r, 0, APIC + 0xb0, 0);
    CHECK_EQ(pending(&r, 0), 0x6f);
    poke(&r, 0, APIC + 0x80, 0x60);
    CHECK_EQ(pending(&r, 0), -1);
    poke(&r, 0, APIC + 0x80, 0x5f);
    CHECK_EQ(pending(&r, 0), 0x6f);
    CHECK_EQ(ack(&r, 0), 0x6f);
    poke(&r, 0, APIC + 0xb0, 0);
    CHECK_EQ(pending(&r, 0), -1);                /* TPR 0x5f holds back class 5 */
    poke(&r, 0, APIC + 0x80, 0);
    CHECK_EQ(ack(&r, 0), 0x51);
    rig_free(&r);
}

TEST(lapic_ipi_destinations)
{
    rig r;
    apics_new(&r, 4);
    for (unsigned i = 0; i < 4; i++)
        poke(&r, i, APIC + 0xd0, 1u << (24 + i));
    poke(&r, 0, APIC + 0x310, 2u << 24);
    poke(&r, 0, APIC + 0x300, 0x4040);           /* physical, APIC 2 */
    CHECK_EQ(pending(&r, 2), 0x40);
    CHECK_EQ(pending(&r, 1), -1);
    poke(&r, 0, APIC + 0x310, 0x0au << 24);
    poke(&r, 0, APIC + 0x300, 0x4841);           /* logical flat: 1 and 3 */
    CHECK_EQ(pending(&r, 1), 0x41);
    CHECK_EQ(pending(&r, 3), 0x41);
    CHECK_EQ(pending(&r, 0), -1);
    poke(&r, 0, APIC + 0x300, 0xc4050);          /* all but self */
    CHECK_EQ(pending(&r, 0), -1);
    CHECK_EQ(pending(&r, 1), 0x50);
    poke(&r, 0, APIC + 0x300, 0x84051);          /* all */
    CHECK_EQ(pending(&r, 0), 0x51);
    poke(&r, 3, APIC + 0x310, 0xffu << 24);
    poke(&r, 3, APIC + 0x300, 0x4052);           /* physical broadcast */
    CHECK_EQ(pending(&r, 0), 0x52);
    CHECK_EQ(pending(&r, 3), 0x52);
    rig_free(&r);
}

TEST(lapic_cluster_and_lowest)
{
    rig r;
    apics_new(&r, 4);
    for (unsigned i = 0; i < 4; i++) {
        poke(&r, i, APIC + 0xe0, 0x0fffffff);
        poke(&r, i, APIC + 0xd0, (i / 2) << 28 | 1u << (24 + i % 2));
    }
    poke(&r, 0, APIC + 0x310, 0x13u << 24);      /* cluster 1, members 0 and 1 */
    poke(&r, 0, APIC + 0x300, 0x4840);
    CHECK_EQ(pending(&r, 1), -1);
    CHECK_EQ(pending(&r, 2), 0x40);
    CHECK_EQ(pending(&r, 3), 0x40);
    poke(&r, 2, APIC + 0x80, 0x80);
    poke(&r, 0, APIC + 0x300, 0x49a0);           /* lowest priority of the two: 3 */
    CHECK_EQ(pending(&r, 3), 0xa0);
    CHECK_EQ(pending(&r, 2), -1);
    rig_free(&r);
}

TEST(lapic_init_sipi_nmi)
{
    rig r;
    apics_new(&r, 2);
    poke(&r, 0, APIC + 0x310, 1u << 24);
    poke(&r, 0, APIC + 0x300, 0xc500);           /* INIT, assert, level */
    CHECK(r.m->vcpus[1]->init_pending);
    CHECK(r.m->vcpus[1]->x86.attention & X86_ATT_EVENT);
    poke(&r, 0, APIC + 0x300, 0x4608);
    CHECK(r.m->vcpus[1]->sipi_pending);
    CHECK_EQ(r.m->vcpus[1]->sipi_vector, 8);
    poke(&r, 0, APIC + 0x300, 0x4400);
    CHECK_EQ(r.m->vcpus[1]->nmis_latched, 1);
    CHECK_EQ(r.m->vcpus[0]->nmis_latched, 0);
    rig_free(&r);
}

TEST(lapic_timer_oneshot_periodic)
{
    rig r;
    apics_new(&r, 1);
    poke(&r, 0, APIC + 0x3e0, 0x3);              /* divide by 16 */
    poke(&r, 0, APIC + 0x320, 0x40);
    poke(&r, 0, APIC + 0x380, 100000);           /* 1.6 ms */
    pass(&r, 800000);
    CHECK_EQ(peek(&r, 0, APIC + 0x390), 50000);
    CHECK_EQ(pending(&r, 0), -1);
    pass(&r, 800001);
    CHECK_EQ(ack(&r, 0), 0x40);
    poke(&r, 0, APIC + 0xb0, 0);
    CHECK_EQ(peek(&r, 0, APIC + 0x390), 0);
    pass(&r, 5 * MS);
    CHECK_EQ(pending(&r, 0), -1);
    poke(&r, 0, APIC + 0x320, 0x20041);          /* periodic */
    poke(&r, 0, APIC + 0x380, 62500);            /* 1 ms */
    unsigned ticks = 0;
    for (unsigned i = 0; i < 1000; i++) {
        pass(&r, MS / 10);
        if (pending(&r, 0) == 0x41) {
            ticks++;
            CHECK_EQ(ack(&r, 0), 0x41);
            poke(&r, 0, APIC + 0xb0, 0);
        }
    }
    CHECK_EQ(ticks, 100);
    rig_free(&r);
}

/* A CPU that takes no interrupts for a while gets the ticks it missed, one by one, and then the old pace again. */
TEST(lapic_timer_late)
{
    rig r;
    apics_new(&r, 1);
    poke(&r, 0, APIC + 0x3e0, 0xb);
    poke(&r, 0, APIC + 0x320, 0x20041);
    poke(&r, 0, APIC + 0x380, MS);
    pass(&r, 50 * MS);
    unsigned ticks = 0;
    for (unsigned i = 0; i < 500; i++) {
        pass(&r, MS / 10);
        if (pending(&r, 0) == 0x41) {
            ticks++;
            ack(&r, 0);
            poke(&r, 0, APIC + 0xb0, 0);
        }
    }
    CHECK(ticks >= 98 && ticks <= 101);
    rig_free(&r);
}

TEST(lapic_tsc_deadline)
{
    rig r;
    vm_lapic *l;
    uint64_t v;
    apics_new(&r, 1);
    l = r.m->vcpus[0]->lapic;
    CHECK(vm_lapic_msr_write(l, 0x6e0, 12345));
    CHECK(vm_lapic_msr_read(l, 0x6e0, &v) && v == 0);       /* not in that mode: ignored */
    poke(&r, 0, APIC + 0x320, 0x40042);
    uint64_t at = vm_clock_tsc(r.m) + 3 * MS;
    CHECK(vm_lapic_msr_write(l, 0x6e0, at));
    CHECK(vm_lapic_msr_read(l, 0x6e0, &v) && v == at);
    pass(&r, 3 * MS - 10);
    CHECK_EQ(pending(&r, 0), -1);
    pass(&r, 20);
    CHECK_EQ(ack(&r, 0), 0x42);
    CHECK(vm_lapic_msr_read(l, 0x6e0, &v) && v == 0);
    poke(&r, 0, APIC + 0xb0, 0);
    CHECK(vm_lapic_msr_write(l, 0x6e0, 1));                 /* in the past: at once */
    CHECK(vm_lapic_msr_read(l, 0x6e0, &v) && v == 0);
    CHECK_EQ(pending(&r, 0), 0x42);
    CHECK(vm_lapic_msr_write(l, 0x6e0, UINT64_MAX));
    pass(&r, MS);
    rig_free(&r);
}

TEST(lapic_errors)
{
    rig r;
    apics_new(&r, 1);
    poke(&r, 0, APIC + 0x370, 0xe0);
    poke(&r, 0, APIC + 0x300, 0x44005);          /* vector 5 cannot be sent */
    CHECK_EQ(pending(&r, 0), 0xe0);
    CHECK_EQ(peek(&r, 0, APIC + 0x280), 0);
    poke(&r, 0, APIC + 0x280, 0);
    CHECK_EQ(peek(&r, 0, APIC + 0x280), 0x20);
    peek(&r, 0, APIC + 0x3a0);
    poke(&r, 0, APIC + 0x280, 0);
    CHECK_EQ(peek(&r, 0, APIC + 0x280), 0x80);
    poke(&r, 0, APIC + 0x280, 0);
    CHECK_EQ(peek(&r, 0, APIC + 0x280), 0);
    rig_free(&r);
}

TEST(lapic_disable)
{
    rig r;
    apics_new(&r, 1);
    poke(&r, 0, APIC + 0x320, 0x40);
    poke(&r, 0, APIC + 0xf0, 0xff);              /* software disable masks the LVT */
    CHECK_EQ(peek(&r, 0, APIC + 0x320), 0x10040);
    self_ipi(&r, 0, 0x50);
    CHECK_EQ(pending(&r, 0), -1);
    vm_lapic *l = r.m->vcpus[0]->lapic;
    CHECK(vm_lapic_msr_write(l, 0x1b, 0xfee00100));
    CHECK_EQ(peek(&r, 0, APIC + 0x30), 0xffffffff);
    CHECK(vm_lapic_msr_write(l, 0x1b, 0xfee00900));
    CHECK_EQ(peek(&r, 0, APIC + 0xf0), 0xff);
    poke(&r, 0, APIC + 0x20, 0x05000000);
    CHECK_EQ(peek(&r, 0, APIC + 0x20), 0x05000000);
    CHECK(vm_lapic_msr_write(l, 0x1b, 0xfee00100));         /* after this the id is the first one again */
    CHECK(vm_lapic_msr_write(l, 0x1b, 0xfee00900));
    CHECK_EQ(peek(&r, 0, APIC + 0x20), 0);
    rig_free(&r);
}

TEST(lapic_x2apic)
{
    rig r;
    uint64_t v;
    apics_new(&r, 2);
    vm_lapic *l = r.m->vcpus[0]->lapic, *l1 = r.m->vcpus[1]->lapic;
    CHECK(!vm_lapic_msr_read(l, 0x802, &v));                /* not in x2APIC mode */
    CHECK(!vm_lapic_msr_write(l, 0x1b, 0xfee00500));        /* EXTD without EN */
    CHECK(!vm_lapic_msr_write(l, 0x1b, 0xfee00d01));        /* reserved bit */
    CHECK(vm_lapic_msr_write(l, 0x1b, 0xfee00d00));
    CHECK(!vm_lapic_msr_write(l, 0x1b, 0xfee00900));        /* back to xAPIC directly: not allowed */
    CHECK(vm_lapic_msr_write(l1, 0x1b, 0xfee00c00));
    CHECK_EQ(peek(&r, 0, APIC + 0x20), 0xffffffff);         /* the page is gone */
    CHECK(vm_lapic_msr_read(l1, 0x802, &v) && v == 1);
    CHECK(vm_lapic_msr_read(l1, 0x80d, &v) && v == 2);
    CHECK(!vm_lapic_msr_read(l, 0x80e, &v));
    CHECK(!vm_lapic_msr_write(l, 0x80b, 1));
    CHECK(!vm_lapic_msr_write(l, 0x80d, 1));
    CHECK(vm_lapic_msr_write(l, 0x83f, 0x77));
    CHECK_EQ(ack(&r, 0), 0x77);
    CHECK(vm_lapic_msr_write(l, 0x80b, 0));
    CHECK(vm_lapic_msr_write(l, 0x830, UINT64_C(1) << 32 | 0x4030));
    CHECK_EQ(pending(&r, 1), 0x30);
    CHECK(vm_lapic_msr_write(l, 0x830, UINT64_C(0x3) << 32 | 0x4831));      /* logical: cluster 0, both */
    CHECK_EQ(pending(&r, 0), 0x31);
    CHECK_EQ(pending(&r, 1), 0x31);
    CHECK(vm_lapic_msr_write(l, 0x830, UINT64_C(0xffffffff) << 32 | 0x4032));
    CHECK_EQ(pending(&r, 0), 0x32);
    CHECK(vm_lapic_msr_write(l, 0x808, 0x40));
    CHECK_EQ(pending(&r, 0), -1);
    CHECK(!vm_lapic_msr_write(l, 0x808, 0x100));
    CHECK(vm_lapic_msr_write(l, 0x830, UINT64_C(1) << 32 | 0x5033));        /* delivery is never pending */
    CHECK(vm_lapic_msr_read(l, 0x830, &v) && v == (UINT64_C(1) << 32 | 0x4033));
    rig_free(&r);
}

TEST(lapic_saved)
{
    rig r;
    apics_new(&r, 2);
    self_ipi(&r, 1, 0x66);
    poke(&r, 1, APIC + 0x320, 0x40);
    rig_save_restore(&r, &r.m->view, APIC);
    CHECK_EQ(pending(&r, 1), 0x66);
    CHECK_EQ(peek(&r, 1, APIC + 0x320), 0x40);
    rig_free(&r);
}

TEST(lapic_virtual_wire)
{
    rig r;
    vm_pic *pic;
    vm_apics *a = apics_new(&r, 2);
    OK(vm_pic_new(r.m, (vm_line){ .set = vm_apics_lint0, .target = a }, &pic));
    vm_apics_set_pic(a, pic);
    outb(&r, 0x20, 0x11);
    outb(&r, 0x21, 0x30);
    outb(&r, 0x21, 0x04);
    outb(&r, 0x21, 0x01);
    outb(&r, 0x21, 0x00);
    vm_pic_set(pic, 1, true);
    CHECK_EQ(pending(&r, 0), 0x31);              /* through LINT0, ExtINT */
    CHECK_EQ(pending(&r, 1), -1);
    poke(&r, 0, APIC + 0x350, 0x10700);
    CHECK_EQ(pending(&r, 0), -1);
    vm_apics_direct_intr(a, true);               /* IMCR in PIC mode */
    CHECK_EQ(ack(&r, 0), 0x31);
    vm_apics_direct_intr(a, false);
    outb(&r, 0x20, 0x20);
    poke(&r, 0, APIC + 0x350, 0x45);             /* LINT0 as a fixed interrupt */
    vm_pic_set(pic, 0, true);
    CHECK_EQ(ack(&r, 0), 0x45);
    rig_free(&r);
}

/* ---- I/O APIC ---- */
#define IOAPIC UINT64_C(0xfec00000)
static bool to_apics(void *target, const vm_apic_msg *msg) { return vm_apics_send(target, msg); }
static bool in_apics(void *target, const vm_apic_msg *msg) { return vm_apics_is_pending(target, msg); }

static vm_ioapic *ioapic_new(rig *r)
{
    vm_ioapic *io;
    vm_apics *a = apics_new(r, 2);
    OK(vm_ioapic_new(r->m, IOAPIC, (vm_apic_bus){ to_apics, in_apics, a }, &io));
    return io;
}

static void io_write(rig *r, unsigned reg, uint32_t v)
{
    poke(r, 0, IOAPIC, reg);
    poke(r, 0, IOAPIC + 0x10, v);
}
static uint32_t io_read(rig *r, unsigned reg)
{
    poke(r, 0, IOAPIC, reg);
    return peek(r, 0, IOAPIC + 0x10);
}

TEST(ioapic_edge)
{
    rig r;
    vm_ioapic *io = ioapic_new(&r);
    CHECK_EQ(io_read(&r, 1), 0x00170020);
    CHECK_EQ(io_read(&r, 0x10 + 2 * 23), 0x10000);
    vm_ioapic_set(io, 4, true);                  /* masked: the edge is lost */
    io_write(&r, 0x10 + 2 * 4 + 1, 1u << 24);
    io_write(&r, 0x10 + 2 * 4, 0x34);
    CHECK_EQ(pending(&r, 1), -1);
    vm_ioapic_set(io, 4, false);
    vm_ioapic_set(io, 4, true);
    CHECK_EQ(pending(&r, 1), 0x34);
    CHECK_EQ(vm_ioapic_state(io, 4), VM_LINE_PENDING);
    CHECK_EQ(ack(&r, 1), 0x34);
    CHECK_EQ(vm_ioapic_state(io, 4), VM_LINE_FREE);
    CHECK_EQ(pending(&r, 0), -1);
    rig_free(&r);
}

TEST(ioapic_level)
{
    rig r;
    vm_ioapic *io = ioapic_new(&r);
    io_write(&r, 0x10 + 2 * 18, 0x8055);
    vm_ioapic_set(io, 18, true);
    CHECK_EQ(ack(&r, 0), 0x55);
    CHECK_EQ(io_read(&r, 0x10 + 2 * 18), 0xc055);          /* remote IRR */
    CHECK_EQ(peek(&r, 0, APIC + 0x180 + 0x20), 1u << (0x55 - 0x40));      /* TMR */
    vm_ioapic_set(io, 18, true);
    CHECK_EQ(pending(&r, 0), -1);
    vm_ioapic_eoi(io, 0x55);
    poke(&r, 0, APIC + 0xb0, 0);
    CHECK_EQ(last_eoi, 0x55);
    CHECK_EQ(pending(&r, 0), 0x55);              /* still asserted */
    vm_ioapic_set(io, 18, false);
    CHECK_EQ(ack(&r, 0), 0x55);
    poke(&r, 0, IOAPIC + 0x40, 0x55);            /* EOI register */
    CHECK_EQ(io_read(&r, 0x10 + 2 * 18), 0x8055);
    rig_free(&r);
}

TEST(ioapic_hostile_select)
{
    rig r;
    ioapic_new(&r);
    for (unsigned reg = 0; reg < 256; reg++) {
        io_write(&r, reg, 0xffffffff);
        io_read(&r, reg);
    }
    CHECK_EQ(io_read(&r, 0x10), 0x1afff);        /* status and remote IRR cannot be written */
    CHECK_EQ(io_read(&r, 0x40), 0);
    rig_free(&r);
}

TEST(msi_decode)
{
    vm_apic_msg m = vm_apic_msi(0xfee0300c, 0xc931);
    CHECK_EQ(m.dest, 3);
    CHECK_EQ(m.vector, 0x31);
    CHECK_EQ(m.mode, VM_APIC_LOWEST);
    CHECK(m.is_logical && m.is_level && m.is_asserted);
}
