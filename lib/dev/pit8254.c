/* pit8254.c - the 8254 timer at 0x40-0x43 with all six modes, and the speaker and refresh bits of port 0x61.
 *
 * A channel is not ticked: its count and OUT are computed from guest time and the moment counting began. Only channel 0
 * has a timer behind it, for the rising edges of OUT on IRQ 0. A new count in modes 2 and 3 takes over at the end of the
 * running period, as the data sheet has it.
 *
 * Invariant: `count` of a channel is 1..0x10000 (1..10000 in BCD) once loaded, so no division by zero.
 */
#include "dev/dev.h"
#include <stdlib.h>

#define PIT_HZ UINT64_C(1193182)
enum { PIT_VERSION = 1 };
enum { ACCESS_LATCH, ACCESS_LOW, ACCESS_HIGH, ACCESS_BOTH };

typedef struct pit_channel {
    uint64_t start;            /* tick at which counting (this period) began */
    uint64_t paused;           /* ticks counted when the gate closed (modes 0, 4) */
    uint32_t count;            /* reload value in use */
    uint32_t next_count;       /* to take over at next_at; 0: none */
    uint64_t next_at;
    uint16_t latch;
    uint8_t mode, bcd, access;
    uint8_t gate, loaded;      /* loaded: a full count was written since the control word */
    uint8_t running;           /* counting, or triggered for modes 1 and 5 */
    uint8_t write_low, write_half, read_half;
    uint8_t latched;           /* bytes of latch still to be read */
    uint8_t status, status_latched;
} pit_channel;

struct vm_pit {
    vm_machine *machine;
    vm_line irq;
    vm_timer *timer;
    struct { uint64_t at; unsigned steady; bool out; } look;       /* the last one at OUT of channel 2; not saved */
    struct { uint32_t version; pit_channel ch[3]; uint8_t port61; vm_ticker ticker; uint64_t single_ns; } s;
};

static uint64_t pit_now(const vm_pit *p) { return vm_ticks_from_ns(vm_clock_now(p->machine), PIT_HZ); }
static uint32_t full_count(const pit_channel *c) { return c->bcd ? 10000 : 0x10000; }

/* Bring a periodic channel whose count was rewritten up to date. */
static void settle(pit_channel *c, uint64_t now)
{
    if (c->next_count && now >= c->next_at) {
        c->count = c->next_count;
        c->start = c->next_at;
        c->next_count = 0;
    }
}

static uint64_t elapsed(const pit_channel *c, uint64_t now)
{
    if (!c->running)
        return c->paused;
    return now > c->start ? now - c->start : 0;
}

static bool channel_out(pit_channel *c, uint64_t now)
{
    settle(c, now);
    uint64_t t = elapsed(c, now);
    switch (c->mode) {
    case 0: return c->loaded && t >= c->count;
    case 1: return !c->running || t >= c->count;
    case 2: return !c->loaded || !c->gate || t % c->count != c->count - 1;
    case 3: return !c->loaded || !c->gate || t % c->count < (c->count + 1) / 2;
    case 4: return !c->loaded || t != c->count;
    default: return !c->running || t != c->count;
    }
}

static uint32_t channel_count(pit_channel *c, uint64_t now)
{
    settle(c, now);
    uint64_t t = elapsed(c, now), full = full_count(c);
    if (!c->loaded)
        return c->count & 0xffff;
    uint64_t v;
    if (c->mode == 2)
        v = c->gate ? c->count - t % c->count : c->count;
    else if (c->mode == 3)
        v = c->gate ? (c->count & ~1u) - (2 * (t % c->count)) % ((c->count & ~1u) ? c->count & ~1u : 2) : c->count;
    else
        v = (c->count + full - t % full) % full;     /* goes on downwards past zero */
    return (uint32_t)(v % full);
}

static uint16_t to_bcd(uint32_t v)
{
    return (uint16_t)(v % 10 | (v / 10 % 10) << 4 | (v / 100 % 10) << 8 | (v / 1000 % 10) << 12);
}
static uint32_t from_bcd(uint32_t v)
{
    return (v & 15) + (v >> 4 & 15) * 10 + (v >> 8 & 15) * 100 + (v >> 12 & 15) * 1000;
}

/* ---- channel 0: edges ---- */
static void pit_arm(vm_pit *p)
{
    uint64_t now = vm_clock_now(p->machine), wake = vm_ticker_wake(&p->s.ticker, now);
    if (p->s.single_ns < wake)
        wake = p->s.single_ns;
    vm_timer_set(p->timer, wake);
}

/* Channel 0 was programmed: where does OUT rise? */
static void pit_plan(vm_pit *p)
{
    pit_channel *c = &p->s.ch[0];
    uint64_t now = pit_now(p);
    settle(c, now);
    p->s.ticker = (vm_ticker){ 0 };
    p->s.single_ns = UINT64_MAX;
    if (c->loaded && (c->mode == 2 || c->mode == 3)) {
        /* Edges while a rewritten count waits: the running period ends at next_at. */
        uint64_t period = c->next_count ? c->next_count : c->count;
        uint64_t first = c->next_count ? c->next_at : c->start + ((now - c->start) / c->count + 1) * c->count;
        p->s.ticker.period_ns = vm_ns_from_ticks(period, PIT_HZ);
        p->s.ticker.next_ns = vm_ns_from_ticks(first, PIT_HZ);
    } else if (c->loaded && c->running && (c->mode == 0 || c->mode == 4)) {
        uint64_t at = c->start + c->count + (c->mode == 4);
        if (at > now)
            p->s.single_ns = vm_ns_from_ticks(at, PIT_HZ);
        if (c->mode == 0)
            vm_line_set(&p->irq, at <= now);
    } else if (c->mode == 0) {
        vm_line_set(&p->irq, false);
    }
    pit_arm(p);
}

static void pulse(vm_pit *p)
{
    vm_line_set(&p->irq, false);
    vm_line_set(&p->irq, true);
}

/* The period in whole nanoseconds drifts against 1193182 Hz: take each next edge from the tick grid. */
static void pit_resync(vm_pit *p)
{
    pit_channel *c = &p->s.ch[0];
    uint64_t now = pit_now(p);
    settle(c, now);
    if (c->next_count || now < c->start)
        return;
    uint64_t next = c->start + ((now - c->start) / c->count + 1) * c->count;
    p->s.ticker.next_ns = vm_ns_from_ticks(next, PIT_HZ);
}

static void pit_fire(void *user)
{
    vm_pit *p = user;
    uint64_t now = vm_clock_now(p->machine);
    if (now >= p->s.single_ns) {
        p->s.single_ns = UINT64_MAX;
        pulse(p);
    }
    if (p->s.ticker.period_ns) {
        uint64_t before = p->s.ticker.next_ns;
        vm_ticker_advance(&p->s.ticker, now);
        if (p->s.ticker.next_ns != before)
            pit_resync(p);
        vm_line_state state = vm_line_look(&p->irq);
        if (state == VM_LINE_MASKED) {
            if (p->s.ticker.due)
                pulse(p);                      /* keeps the latch true to the wire; nothing is owed */
            p->s.ticker.due = 0;
        } else if (state == VM_LINE_FREE && p->s.ticker.due) {
            p->s.ticker.due--;
            pulse(p);
        }
    }
    pit_arm(p);
}

/* ---- registers ---- */
static void load_count(vm_pit *p, unsigned n, uint32_t raw)
{
    pit_channel *c = &p->s.ch[n];
    uint64_t now = pit_now(p);
    uint32_t v = c->bcd ? from_bcd(raw) : raw;
    if (!v)
        v = full_count(c);
    if ((c->mode == 2 || c->mode == 3) && v == 1)
        v = 2;                                 /* illegal; keeps OUT moving */
    settle(c, now);
    if ((c->mode == 2 || c->mode == 3) && c->loaded && c->gate && c->running) {
        uint64_t t = elapsed(c, now);
        c->next_count = v;
        c->next_at = c->start + (t / c->count + 1) * c->count;
    } else {
        c->count = v;
        c->next_count = 0;
        c->paused = 0;
        if (c->mode != 1 && c->mode != 5) {    /* 1 and 5 wait for the gate to rise */
            c->start = now;
            c->running = c->gate;
        }
    }
    c->loaded = 1;
    if (n == 0)
        pit_plan(p);
}

static void set_gate(vm_pit *p, unsigned n, bool gate)
{
    pit_channel *c = &p->s.ch[n];
    uint64_t now = pit_now(p);
    if (c->gate == gate)
        return;
    settle(c, now);
    if (c->mode == 0 || c->mode == 4) {
        if (!gate) {
            c->paused = elapsed(c, now);
            c->running = 0;
        } else if (c->loaded) {
            c->start = now - c->paused;
            c->running = 1;
        }
    } else if (gate && c->loaded) {            /* 1, 5: trigger; 2, 3: start over */
        if (c->next_count) {
            c->count = c->next_count;
            c->next_count = 0;
        }
        c->start = now;
        c->running = 1;
    } else if (!gate && (c->mode == 2 || c->mode == 3)) {
        c->running = 0;
        c->paused = 0;
    }
    c->gate = gate;
}

static void latch_count(vm_pit *p, pit_channel *c)
{
    if (c->latched)
        return;                                /* the first latch holds until read */
    uint32_t v = channel_count(c, pit_now(p));
    c->latch = c->bcd ? to_bcd(v) : (uint16_t)v;
    c->latched = c->access == ACCESS_BOTH ? 2 : 1;
    c->read_half = 0;
}

static void latch_status(vm_pit *p, pit_channel *c)
{
    if (c->status_latched)
        return;
    uint64_t now = pit_now(p);
    c->status = (uint8_t)(channel_out(c, now) << 7 | (!c->loaded || c->next_count) << 6 | c->access << 4 | c->mode << 1 | c->bcd);
    c->status_latched = 1;
}

static void write_control(vm_pit *p, uint8_t value)
{
    unsigned n = value >> 6, access = (value >> 4) & 3;
    if (n == 3) {                              /* read-back: bits 5, 4 low select count, status */
        for (unsigned i = 0; i < 3; i++) {
            if (!(value & (2u << i)))
                continue;
            if (!(value & 0x20))
                latch_count(p, &p->s.ch[i]);
            if (!(value & 0x10))
                latch_status(p, &p->s.ch[i]);
        }
        return;
    }
    pit_channel *c = &p->s.ch[n];
    if (access == ACCESS_LATCH) {
        latch_count(p, c);
        return;
    }
    uint8_t mode = (value >> 1) & 7;
    c->mode = mode > 5 ? mode & 3 : mode;
    c->bcd = value & 1;
    c->access = (uint8_t)access;
    c->loaded = c->running = c->write_half = c->read_half = c->latched = c->status_latched = 0;
    c->next_count = 0;
    c->paused = 0;
    if (c->count > full_count(c) || c->count < 2)
        c->count = full_count(c);
    if (n == 0)
        pit_plan(p);
}

static void write_channel(vm_pit *p, unsigned n, uint8_t value)
{
    pit_channel *c = &p->s.ch[n];
    switch (c->access) {
    case ACCESS_LOW: load_count(p, n, value); break;
    case ACCESS_HIGH: load_count(p, n, (uint32_t)value << 8); break;
    default:
        if (!c->write_half) {
            c->write_low = value;
            c->write_half = 1;
            if (c->mode == 0) {                /* the first byte stops the count and clears OUT */
                c->loaded = c->running = 0;
                c->paused = 0;
                if (n == 0)
                    pit_plan(p);
            }
        } else {
            c->write_half = 0;
            load_count(p, n, c->write_low | (uint32_t)value << 8);
        }
    }
}

static uint8_t read_channel(vm_pit *p, unsigned n)
{
    pit_channel *c = &p->s.ch[n];
    if (c->status_latched) {
        c->status_latched = 0;
        return c->status;
    }
    uint16_t v = c->latch;
    bool high = c->access == ACCESS_HIGH;
    if (!c->latched) {
        uint32_t now = channel_count(c, pit_now(p));
        v = c->bcd ? to_bcd(now) : (uint16_t)now;
    } else {
        c->latched--;
    }
    if (c->access == ACCESS_BOTH) {
        high = c->read_half;
        c->read_half ^= 1;
    }
    return high ? (uint8_t)(v >> 8) : (uint8_t)v;
}

static uint8_t pit_get(void *dev, unsigned reg) { return reg < 3 ? read_channel(dev, reg) : 0xff; }
static void pit_put(void *dev, unsigned reg, uint8_t value)
{
    if (reg < 3)
        write_channel(dev, reg, value);
    else if (reg == 3)
        write_control(dev, value);
}

/* OUT of channel 2 for a guest that looks. One that measures its TSC reads it between two looks, and takes the last reading
 * before OUT rose for the end: when the host has taken the processor away between that reading and the look, its measure
 * comes out far too short, and nothing shows it. So in a loop of looks, a rise during a break shows at the next look: the
 * guest reads its clock once more, and sees the break.
 */
static bool look_at_out(vm_pit *p)
{
    enum { BREAK_NS = 50000, IS_LOOP = 64 };
    uint64_t now = vm_clock_now(p->machine);
    bool is_break = now - p->look.at > BREAK_NS, out = channel_out(&p->s.ch[2], vm_ticks_from_ns(now, PIT_HZ));
    if (out && !p->look.out && is_break && p->look.steady >= IS_LOOP && vm_clock_is_real(p->machine))
        out = false;
    p->look.at = now;
    p->look.steady = is_break ? 0 : p->look.steady + 1;
    p->look.out = out;
    return out;
}

/* Port 0x61: bit 0 gate of channel 2, bit 1 speaker, bit 4 toggles with every refresh (15 us), bit 5 OUT of channel 2. */
static uint8_t port61_get(void *dev, unsigned reg)
{
    vm_pit *p = dev;
    (void)reg;
    uint8_t refresh = (uint8_t)(vm_clock_now(p->machine) / 15085 & 1);
    return (uint8_t)(p->s.port61 | refresh << 4 | look_at_out(p) << 5);
}
static void port61_put(void *dev, unsigned reg, uint8_t value)
{
    vm_pit *p = dev;
    if (reg)
        return;
    p->s.port61 = value & 0x0f;
    set_gate(p, 2, value & 1);
}

VM_DEV_BYTE_IO(pit)
VM_DEV_BYTE_IO(port61)

static void pit_reset(void *user)
{
    vm_pit *p = user;
    for (unsigned i = 0; i < 3; i++)
        p->s.ch[i] = (pit_channel){ .mode = 3, .access = ACCESS_BOTH, .gate = i != 2, .count = 0x10000 };
    p->s.version = PIT_VERSION;
    p->s.port61 = 0;
    p->s.ticker = (vm_ticker){ 0 };
    p->s.single_ns = UINT64_MAX;
    vm_timer_set(p->timer, UINT64_MAX);
}

static int pit_save(void *user, void *buffer, size_t *bytes)
{
    vm_pit *p = user;
    return vm_dev_save(&p->s, sizeof p->s, buffer, bytes);
}

static int pit_restore(void *user, const void *buffer, size_t bytes)
{
    vm_pit *p = user;
    int status = vm_dev_load(&p->s, sizeof p->s, PIT_VERSION, buffer, bytes);
    if (status)
        return status;
    for (unsigned i = 0; i < 3; i++) {
        pit_channel *c = &p->s.ch[i];
        c->mode = c->mode > 5 ? c->mode & 3 : c->mode;
        c->bcd &= 1;
        c->access &= 3;
        if (c->count < 1 || c->count > full_count(c))
            c->count = full_count(c);
        if (c->next_count > full_count(c))
            c->next_count = 0;
    }
    pit_arm(p);
    return VM_OK;
}

static void pit_destroy(void *user)
{
    vm_pit *p = user;
    vm_timer_free(p->timer);
    free(p);
}

int vm_pit_new(vm_machine *m, vm_line irq, vm_pit **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), pit_read, pit_write, pit_reset, pit_save, pit_restore, pit_destroy };
    static const vm_io_ops port61_ops = { .size = sizeof(vm_io_ops), .read = port61_read, .write = port61_write };
    vm_pit *p = calloc(1, sizeof *p);
    if (!p || !(p->timer = vm_timer_new(m, pit_fire, p))) {
        free(p);
        return vm_fail(VM_E_NOMEM, "interval timer: out of memory");
    }
    p->machine = m;
    p->irq = irq;
    pit_reset(p);
    int status = vm_add_pio(m, 0x40, 4, &ops, p, NULL);
    if (status) {
        pit_destroy(p);
        return status;
    }
    *out = p;
    return vm_add_pio(m, 0x61, 1, &port61_ops, p, NULL);
}
