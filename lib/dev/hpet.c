/* hpet.c - the high precision event timer: three comparators on a 10 MHz, 64-bit counter (IA-PC HPET 1.0a).
 *
 * The counter is guest time; while it is stopped it holds a value. Interrupts go to the I/O APIC pin a comparator routes to, or
 * with legacy replacement to IRQ 0 and 8. No FSB delivery: the capability bit is clear.
 *
 * Invariant: routes are 0..31 and only pins in ROUTES are ever driven (others have empty wires).
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { HPET_VERSION = 1, TIMERS = 3 };
#define PERIOD_FS UINT64_C(100000000)      /* 100 ns */
#define PERIOD_NS UINT64_C(100)
#define ROUTES UINT64_C(0x00f00104)        /* pins 2, 8, 20-23 */
enum { T_LEVEL = 1 << 1, T_ENABLE = 1 << 2, T_PERIODIC = 1 << 3, T_CAN_PERIODIC = 1 << 4, T_64BIT = 1 << 5, T_SET = 1 << 6,
       T_32MODE = 1 << 8, T_ROUTE = 0x3e00, T_WRITABLE = T_LEVEL | T_ENABLE | T_PERIODIC | T_SET | T_32MODE | T_ROUTE };
enum { CONFIG_ENABLE = 1, CONFIG_LEGACY = 2 };

typedef struct hpet_timer {
    uint64_t config, comparator, period;
    vm_ticker ticker;                      /* periodic: edges in guest time */
    uint64_t single_ns;                    /* one-shot */
} hpet_timer;

struct vm_hpet {
    vm_machine *machine;
    vm_line pins[32];
    void (*legacy)(void *target, bool on);
    void *target;
    struct hpet_wake { vm_hpet *hpet; unsigned index; vm_timer *timer; } wake[TIMERS];
    struct { uint32_t version; uint64_t config, status, stopped_at, start_ns; hpet_timer t[TIMERS]; } s;
};

static uint64_t counter(const vm_hpet *h)
{
    if (!(h->s.config & CONFIG_ENABLE))
        return h->s.stopped_at;
    return h->s.stopped_at + (vm_clock_now(h->machine) - h->s.start_ns) / PERIOD_NS;
}

static const vm_line *wire(const vm_hpet *h, unsigned n)
{
    if ((h->s.config & CONFIG_LEGACY) && n < 2)
        return &h->pins[n ? 8 : 0];
    return &h->pins[h->s.t[n].config >> 9 & 31];
}

static void arm(vm_hpet *h, unsigned n)
{
    hpet_timer *t = &h->s.t[n];
    uint64_t wake = UINT64_MAX;
    if (h->s.config & CONFIG_ENABLE)
        wake = t->ticker.period_ns ? vm_ticker_wake(&t->ticker, vm_clock_now(h->machine)) : t->single_ns;
    vm_timer_set(h->wake[n].timer, wake);
}

/* When does counter reach the comparator? Called when either was written. */
static void plan(vm_hpet *h, unsigned n)
{
    hpet_timer *t = &h->s.t[n];
    t->ticker = (vm_ticker){ 0 };
    t->single_ns = UINT64_MAX;
    if ((h->s.config & CONFIG_ENABLE)) {
        uint64_t now = vm_clock_now(h->machine), wait = t->comparator - counter(h);
        if (t->config & T_32MODE)
            wait = (uint32_t)wait;
        uint64_t span = wait > UINT64_MAX / 2 / PERIOD_NS ? UINT64_MAX : wait * PERIOD_NS;
        uint64_t at = span > UINT64_MAX - 1 - now ? UINT64_MAX : now + span;
        if ((t->config & T_PERIODIC) && t->period && at != UINT64_MAX) {
            t->ticker.period_ns = t->period > UINT64_MAX / 4 / PERIOD_NS ? UINT64_MAX / 4 : t->period * PERIOD_NS;
            t->ticker.next_ns = at;
        } else {
            t->single_ns = at;
        }
    }
    arm(h, n);
}

static void signal_timer(vm_hpet *h, unsigned n)
{
    hpet_timer *t = &h->s.t[n];
    if (t->config & T_LEVEL) {
        h->s.status |= 1u << n;
        if (t->config & T_ENABLE)
            vm_line_set(wire(h, n), true);
    } else if (t->config & T_ENABLE) {
        vm_line_set(wire(h, n), false);
        vm_line_set(wire(h, n), true);
    }
}

/* The comparator of a periodic timer moves on by the period with each match. */
static uint64_t comparator_now(const vm_hpet *h, unsigned n)
{
    const hpet_timer *t = &h->s.t[n];
    uint64_t v = t->comparator;
    if (t->ticker.period_ns && t->period) {
        uint64_t c = counter(h), mask = t->config & T_32MODE ? UINT32_MAX : UINT64_MAX;
        uint64_t past = (c - v) & mask;
        if (past <= mask / 2)
            v += (past / t->period + 1) * t->period;
        v &= mask;
    }
    return v;
}

static void hpet_fire(void *user)
{
    struct hpet_wake *w = user;
    vm_hpet *h = w->hpet;
    hpet_timer *t = &h->s.t[w->index];
    uint64_t now = vm_clock_now(h->machine);
    if (!(h->s.config & CONFIG_ENABLE))
        return;
    if (t->ticker.period_ns) {
        uint64_t moved = comparator_now(h, w->index);
        vm_ticker_advance(&t->ticker, now);
        t->comparator = moved;
        vm_line_state state = t->config & T_ENABLE ? vm_line_look(wire(h, w->index)) : VM_LINE_MASKED;
        if (state == VM_LINE_MASKED || (t->config & T_LEVEL)) {
            if (t->ticker.due)
                signal_timer(h, w->index);
            t->ticker.due = 0;
        } else if (state == VM_LINE_FREE && t->ticker.due) {
            t->ticker.due--;
            signal_timer(h, w->index);
        }
    } else if (now >= t->single_ns) {
        t->single_ns = UINT64_MAX;
        signal_timer(h, w->index);
        /* It matches again when the counter has wrapped. */
        if (t->config & T_32MODE)
            t->single_ns = now + (PERIOD_NS << 32);
    }
    arm(h, w->index);
}

/* ---- registers: 64 bits each, accesses of 4 or 8 bytes ---- */
static uint64_t read64(vm_hpet *h, unsigned reg)
{
    if (reg >= 0x100 && reg < 0x100 + 0x20 * TIMERS) {
        unsigned n = (reg - 0x100) / 0x20;
        switch (reg & 0x18) {
        case 0x00: return h->s.t[n].config | T_CAN_PERIODIC | T_64BIT | ROUTES << 32;
        case 0x08: return comparator_now(h, n);
        default: return 0;
        }
    }
    switch (reg) {
    case 0x00: return PERIOD_FS << 32 | UINT64_C(0x8086) << 16 | 1 << 15 | 1 << 13 | (TIMERS - 1) << 8 | 1;
    case 0x10: return h->s.config;
    case 0x20: return h->s.status;
    case 0xf0: return counter(h);
    default: return 0;
    }
}

static void write_config(vm_hpet *h, uint64_t value)
{
    uint64_t before = h->s.config, c = counter(h);
    value &= CONFIG_ENABLE | CONFIG_LEGACY;
    h->s.stopped_at = c;
    h->s.start_ns = vm_clock_now(h->machine);
    h->s.config = value;
    if ((before ^ value) & CONFIG_LEGACY)
        h->legacy(h->target, value & CONFIG_LEGACY);
    if ((before ^ value) & CONFIG_ENABLE)
        for (unsigned n = 0; n < TIMERS; n++)
            plan(h, n);
}

static void write_timer_config(vm_hpet *h, unsigned n, uint64_t value)
{
    hpet_timer *t = &h->s.t[n];
    if (h->s.status >> n & 1 && (t->config & T_LEVEL) && !((value & T_LEVEL) && (value & T_ENABLE)))
        vm_line_set(wire(h, n), false);
    t->config = value & T_WRITABLE;
    if (!(ROUTES >> (t->config >> 9 & 31) & 1))
        t->config &= ~(uint64_t)T_ROUTE;   /* not a pin this timer has (2.3.8: reads back differently) */
    if (t->config & T_32MODE) {
        t->comparator = (uint32_t)t->comparator;
        t->period = (uint32_t)t->period;
    }
    plan(h, n);
}

/* half: 0 all, 1 low dword, 2 high dword */
static uint64_t merge(uint64_t old, uint64_t value, unsigned half)
{
    return half == 0 ? value : half == 1 ? (old & ~UINT64_C(0xffffffff)) | (uint32_t)value : (uint32_t)old | value << 32;
}

static void write_comparator(vm_hpet *h, unsigned n, uint64_t value, unsigned half)
{
    hpet_timer *t = &h->s.t[n];
    bool is_set = t->config & T_SET;
    if ((t->config & T_32MODE) && half == 2)
        return;
    if (!(t->config & T_PERIODIC)) {
        t->comparator = merge(t->comparator, value, half);
    } else {
        if (is_set)
            t->comparator = merge(t->comparator, value, half);
        else
            t->comparator = comparator_now(h, n);
        t->period = merge(t->period, value, half);
    }
    /* A 64-bit value may come in two dwords: the set bit serves both, low dword first (2.3.9.2.2). */
    if (half != 1 || (t->config & T_32MODE) || !is_set)
        t->config &= ~(uint64_t)T_SET;
    if (t->config & T_32MODE) {
        t->comparator = (uint32_t)t->comparator;
        t->period = (uint32_t)t->period;
    }
    plan(h, n);
}

static void write_reg(vm_hpet *h, unsigned reg, uint64_t value, unsigned half)
{
    if (reg >= 0x100 && reg < 0x100 + 0x20 * TIMERS) {
        unsigned n = (reg - 0x100) / 0x20;
        if ((reg & 0x18) == 0)
            write_timer_config(h, n, merge(h->s.t[n].config, value, half));
        else if ((reg & 0x18) == 8)
            write_comparator(h, n, value, half);
        return;
    }
    if (reg == 0x10) {
        write_config(h, merge(h->s.config, value, half));
    } else if (reg == 0x20 && half != 2) {
        for (unsigned n = 0; n < TIMERS; n++) {
            if (value & h->s.status & 1u << n) {
                h->s.status &= ~(UINT64_C(1) << n);
                vm_line_set(wire(h, n), false);
            }
        }
    } else if (reg == 0xf0 && !(h->s.config & CONFIG_ENABLE)) {
        h->s.stopped_at = merge(h->s.stopped_at, value, half);
    }
}

static int hpet_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu;
    (void)width;
    *value = offset < 0x400 ? read64(user, (unsigned)offset & ~7u) >> (8 * (offset & 7)) : 0;
    return VM_OK;
}

static int hpet_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu;
    if (offset >= 0x400 || (offset & 3) || width < 4 || (width == 8 && (offset & 4)))
        return VM_OK;
    write_reg(user, (unsigned)offset & ~7u, value, width == 8 ? 0 : offset & 4 ? 2 : 1);
    return VM_OK;
}

static void hpet_reset(void *user)
{
    vm_hpet *h = user;
    bool was_legacy = h->s.config & CONFIG_LEGACY;
    for (unsigned n = 0; n < TIMERS; n++)
        if (h->s.status >> n & 1)
            vm_line_set(wire(h, n), false);
    memset(&h->s, 0, sizeof h->s);
    h->s.version = HPET_VERSION;
    for (unsigned n = 0; n < TIMERS; n++) {
        h->s.t[n].comparator = UINT64_MAX;
        h->s.t[n].single_ns = UINT64_MAX;
        vm_timer_set(h->wake[n].timer, UINT64_MAX);
    }
    if (was_legacy)
        h->legacy(h->target, false);
}

static int hpet_save(void *user, void *buffer, size_t *bytes)
{
    vm_hpet *h = user;
    return vm_dev_save(&h->s, sizeof h->s, buffer, bytes);
}

static int hpet_restore(void *user, const void *buffer, size_t bytes)
{
    vm_hpet *h = user;
    int status = vm_dev_load(&h->s, sizeof h->s, HPET_VERSION, buffer, bytes);
    if (status)
        return status;
    h->legacy(h->target, h->s.config & CONFIG_LEGACY);
    for (unsigned n = 0; n < TIMERS; n++)
        arm(h, n);
    return VM_OK;
}

static void hpet_destroy(void *user)
{
    vm_hpet *h = user;
    for (unsigned n = 0; n < TIMERS; n++)
        vm_timer_free(h->wake[n].timer);
    free(h);
}

int vm_hpet_new(vm_machine *m, uint64_t gpa, const vm_line pins[32], void (*legacy)(void *target, bool on), void *target,
                vm_hpet **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), hpet_read, hpet_write, hpet_reset, hpet_save, hpet_restore, hpet_destroy };
    vm_hpet *h = calloc(1, sizeof *h);
    if (!h)
        return vm_fail(VM_E_NOMEM, "HPET: out of memory");
    h->machine = m;
    memcpy(h->pins, pins, sizeof h->pins);
    h->legacy = legacy;
    h->target = target;
    for (unsigned n = 0; n < TIMERS; n++) {
        h->wake[n] = (struct hpet_wake){ h, n, NULL };
        if (!(h->wake[n].timer = vm_timer_new(m, hpet_fire, &h->wake[n]))) {
            hpet_destroy(h);
            return vm_fail(VM_E_NOMEM, "HPET: out of memory");
        }
    }
    hpet_reset(h);
    int status = vm_add_mmio(m, gpa, 0x1000, &ops, h, NULL);
    if (status) {
        hpet_destroy(h);
        return status;
    }
    *out = h;
    return VM_OK;
}
