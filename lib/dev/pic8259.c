/* pic8259.c - the pair of 8259A interrupt controllers of a PC, slave on IR2, and their edge/level registers.
 *
 * Ports 0x20-0x21 (master), 0xa0-0xa1 (slave), 0x4d0-0x4d1 (ELCR). From the 8259A data sheet; ELCR from the ISA bridges'.
 * Deviation: an edge stays latched when its line falls before the acknowledge (the data sheet makes that a spurious IR7);
 * sources that pulse would otherwise lose interrupts on a CPU that is late.
 *
 * Invariant: every entry point that changes a chip ends in update(), which drives the slave's output into master IR2 and the
 * master's onto the INTR line.
 */
#include "dev/dev.h"
#include <stdlib.h>

enum { PIC_VERSION = 1 };
enum { ICW1_ICW4 = 0x01, ICW1_SINGLE = 0x02, ICW1_LEVEL = 0x08, ICW1_INIT = 0x10, OCW3 = 0x08 };
enum { ICW4_AEOI = 0x02, ICW4_SFNM = 0x10 };

typedef struct pic_chip {
    uint8_t irr, isr, imr, line;       /* line: levels of the inputs */
    uint8_t elcr, elcr_mask;
    uint8_t vector;                    /* ICW2 */
    uint8_t icw_step;                  /* 0: ready; 2, 3, 4: that word comes next */
    uint8_t icw4_wanted, single, level_mode;
    uint8_t auto_eoi, rotate_aeoi, nested, special_mask, read_isr, poll;
    uint8_t lowest;                    /* input of lowest priority */
    uint8_t ready;                     /* initialised since reset */
} pic_chip;

struct vm_pic {
    vm_line intr;
    struct { uint32_t version; pic_chip chip[2]; uint8_t output; } s;
};

/* Highest-priority set bit counted from the input after `lowest`; 8 when none. */
static unsigned first_priority(const pic_chip *c, uint8_t bits)
{
    for (unsigned i = 0; i < 8; i++) {
        unsigned irq = (c->lowest + 1 + i) & 7;
        if (bits & (1u << irq))
            return i;
    }
    return 8;
}

static uint8_t level_inputs(const pic_chip *c) { return c->level_mode ? 0xff : c->elcr; }

/* The input that asks now, or -1 (data sheet: priority resolver, special mask, special fully nested mode). */
static int requested(const pic_chip *c, bool is_master)
{
    uint8_t irr = (uint8_t)((c->irr | (c->line & level_inputs(c))) & ~c->imr);
    unsigned ask = first_priority(c, irr);
    if (ask == 8)
        return -1;
    uint8_t isr = c->isr;
    if (c->special_mask)
        isr &= (uint8_t)~c->imr;
    if (c->nested && is_master)
        isr &= (uint8_t)~(1u << 2);
    return ask < first_priority(c, isr) ? (int)((c->lowest + 1 + ask) & 7) : -1;
}

static void chip_line(pic_chip *c, unsigned irq, bool level)
{
    uint8_t bit = (uint8_t)(1u << irq);
    if (level && !(c->line & bit))
        c->irr |= bit;
    if (!level && (level_inputs(c) & bit))
        c->irr &= (uint8_t)~bit;
    c->line = level ? c->line | bit : c->line & (uint8_t)~bit;
}

static void update(vm_pic *p)
{
    bool slave = requested(&p->s.chip[1], false) >= 0;
    /* The cascade is a level: it follows the slave, and each new slave request asks again. */
    pic_chip *master = &p->s.chip[0];
    master->line = slave ? master->line | 4 : master->line & (uint8_t)~4;
    master->irr = slave ? master->irr | 4 : master->irr & (uint8_t)~4;
    bool output = requested(master, true) >= 0;
    p->s.output = output;
    vm_line_set(&p->intr, output);
}

void vm_pic_set(void *pic, unsigned irq, bool level)
{
    vm_pic *p = pic;
    chip_line(&p->s.chip[(irq >> 3) & 1], irq & 7, level);
    update(p);
}

vm_line_state vm_pic_state(const vm_pic *p, unsigned irq)
{
    const pic_chip *c = &p->s.chip[(irq >> 3) & 1];
    uint8_t bit = (uint8_t)(1u << (irq & 7));
    if (!c->ready || (c->imr & bit) || (irq >= 8 && (p->s.chip[0].imr & 4)))
        return VM_LINE_MASKED;
    return c->irr & bit ? VM_LINE_PENDING : VM_LINE_FREE;
}

int vm_pic_peek(const vm_pic *p)
{
    int irq = requested(&p->s.chip[0], true);
    if (irq < 0)
        return -1;
    if (irq != 2)
        return p->s.chip[0].vector | irq;
    int slave = requested(&p->s.chip[1], false);
    return p->s.chip[1].vector | (slave < 0 ? 7 : slave);
}

static void take(pic_chip *c, unsigned irq)
{
    uint8_t bit = (uint8_t)(1u << irq);
    if (!(level_inputs(c) & bit))
        c->irr &= (uint8_t)~bit;
    if (!c->auto_eoi)
        c->isr |= bit;
    else if (c->rotate_aeoi)
        c->lowest = (uint8_t)irq;
}

int vm_pic_acknowledge(vm_pic *p)
{
    pic_chip *master = &p->s.chip[0], *slave = &p->s.chip[1];
    int irq = requested(master, true), vector;
    if (irq < 0) {
        vector = master->vector | 7;           /* spurious: no ISR bit */
    } else {
        take(master, (unsigned)irq);
        vector = master->vector | irq;
        if (irq == 2) {
            int from = requested(slave, false);
            if (from >= 0)
                take(slave, (unsigned)from);
            vector = slave->vector | (from < 0 ? 7 : from);
        }
    }
    update(p);
    return vector;
}

/* OCW2: end of interrupt and rotation (data sheet, table of R, SL, EOI). */
static void write_ocw2(pic_chip *c, uint8_t value)
{
    unsigned command = value >> 5, level = value & 7;
    switch (command) {
    case 0: case 4:                            /* rotate in automatic EOI mode: clear, set */
        c->rotate_aeoi = command == 4;
        break;
    case 1: case 5: {                          /* non-specific EOI, with rotation */
        uint8_t isr = c->special_mask ? c->isr & (uint8_t)~c->imr : c->isr;
        unsigned first = first_priority(c, isr);
        if (first < 8) {
            unsigned irq = (c->lowest + 1 + first) & 7;
            c->isr &= (uint8_t)~(1u << irq);
            if (command == 5)
                c->lowest = (uint8_t)irq;
        }
        break;
    }
    case 3: case 7:                            /* specific EOI, with rotation */
        c->isr &= (uint8_t)~(1u << level);
        if (command == 7)
            c->lowest = (uint8_t)level;
        break;
    case 6:                                    /* set priority */
        c->lowest = (uint8_t)level;
        break;
    default:                                   /* 2: no operation */
        break;
    }
}

static void write_command(pic_chip *c, uint8_t value)
{
    if (value & ICW1_INIT) {
        c->irr = c->isr = c->imr = 0;
        c->special_mask = c->read_isr = c->poll = 0;
        c->auto_eoi = c->rotate_aeoi = c->nested = 0;
        c->lowest = 7;
        c->single = !!(value & ICW1_SINGLE);
        c->level_mode = !!(value & ICW1_LEVEL);
        c->icw4_wanted = value & ICW1_ICW4;
        c->icw_step = 2;
        c->ready = 0;
    } else if (value & OCW3) {
        if (value & 0x04)
            c->poll = 1;
        if (value & 0x02)
            c->read_isr = value & 1;
        if (value & 0x40)
            c->special_mask = (value >> 5) & 1;
    } else {
        write_ocw2(c, value);
    }
}

static void write_data(pic_chip *c, uint8_t value)
{
    switch (c->icw_step) {
    case 2:
        c->vector = value & 0xf8;
        c->icw_step = !c->single ? 3 : c->icw4_wanted ? 4 : 0;
        break;
    case 3:                                    /* ICW3: the cascade is wired */
        c->icw_step = c->icw4_wanted ? 4 : 0;
        break;
    case 4:
        c->auto_eoi = !!(value & ICW4_AEOI);
        c->nested = !!(value & ICW4_SFNM);
        c->icw_step = 0;
        break;
    default:
        c->imr = value;
        return;
    }
    if (!c->icw_step)
        c->ready = 1;
}

static uint8_t read_chip(vm_pic *p, unsigned which, unsigned reg)
{
    pic_chip *c = &p->s.chip[which];
    if (c->poll) {                             /* the read is an INTA */
        c->poll = 0;
        int irq = requested(c, which == 0);
        if (irq < 0)
            return 0;
        take(c, (unsigned)irq);
        update(p);
        return (uint8_t)(0x80 | irq);
    }
    if (reg)
        return c->imr;
    return c->read_isr ? c->isr : (uint8_t)(c->irr | (c->line & level_inputs(c)));
}

static uint8_t master_get(void *dev, unsigned reg) { return reg < 2 ? read_chip(dev, 0, reg) : 0xff; }
static uint8_t slave_get(void *dev, unsigned reg) { return reg < 2 ? read_chip(dev, 1, reg) : 0xff; }
static void chip_put(vm_pic *p, unsigned which, unsigned reg, uint8_t value)
{
    if (reg == 0)
        write_command(&p->s.chip[which], value);
    else if (reg == 1)
        write_data(&p->s.chip[which], value);
    update(p);
}
static void master_put(void *dev, unsigned reg, uint8_t value) { chip_put(dev, 0, reg, value); }
static void slave_put(void *dev, unsigned reg, uint8_t value) { chip_put(dev, 1, reg, value); }
static uint8_t elcr_get(void *dev, unsigned reg) { return reg < 2 ? ((vm_pic *)dev)->s.chip[reg].elcr : 0xff; }
static void elcr_put(void *dev, unsigned reg, uint8_t value)
{
    vm_pic *p = dev;
    if (reg < 2)
        p->s.chip[reg].elcr = value & p->s.chip[reg].elcr_mask;
    update(p);
}

VM_DEV_BYTE_IO(master)
VM_DEV_BYTE_IO(slave)
VM_DEV_BYTE_IO(elcr)

static void pic_reset(void *user)
{
    vm_pic *p = user;
    for (unsigned i = 0; i < 2; i++) {
        uint8_t line = p->s.chip[i].line;
        p->s.chip[i] = (pic_chip){ .line = line, .lowest = 7, .imr = 0xff, .elcr_mask = i ? 0xde : 0xf8 };
    }
    p->s.version = PIC_VERSION;
    update(p);
}

static int pic_save(void *user, void *buffer, size_t *bytes)
{
    vm_pic *p = user;
    return vm_dev_save(&p->s, sizeof p->s, buffer, bytes);
}

static int pic_restore(void *user, const void *buffer, size_t bytes)
{
    vm_pic *p = user;
    int status = vm_dev_load(&p->s, sizeof p->s, PIC_VERSION, buffer, bytes);
    if (status)
        return status;
    for (unsigned i = 0; i < 2; i++) {
        p->s.chip[i].lowest &= 7;
        p->s.chip[i].vector &= 0xf8;
    }
    update(p);
    return VM_OK;
}

int vm_pic_new(vm_machine *m, vm_line intr, vm_pic **out)
{
    static const vm_io_ops master_ops = { sizeof(vm_io_ops), master_read, master_write, pic_reset, pic_save, pic_restore, free };
    static const vm_io_ops slave_ops = { .size = sizeof(vm_io_ops), .read = slave_read, .write = slave_write };
    static const vm_io_ops elcr_ops = { .size = sizeof(vm_io_ops), .read = elcr_read, .write = elcr_write };
    vm_pic *p = calloc(1, sizeof *p);
    if (!p)
        return vm_fail(VM_E_NOMEM, "interrupt controller: out of memory");
    pic_reset(p);
    p->intr = intr;
    int status = vm_add_pio(m, 0x20, 2, &master_ops, p, NULL);
    if (status) {
        free(p);
        return status;
    }
    *out = p;
    if ((status = vm_add_pio(m, 0xa0, 2, &slave_ops, p, NULL)))
        return status;
    return vm_add_pio(m, 0x4d0, 2, &elcr_ops, p, NULL);
}
