/* lapic.c - local APICs, one a vCPU, the bus between them, and their registers as xAPIC page and x2APIC MSRs
 * (SDM vol. 3, chapter 11; tables cited by number).
 *
 * The page is one region for all vCPUs: the accessing vCPU picks the APIC. It follows the base last written by any of them.
 *
 * Invariants: everything runs under the device lock except vm_lapic_pending, which reads `deliver`, the one field computed
 * for it by update(); every change of IRR, ISR, TPR, SVR, LVT LINT0 or the base ends in update().
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { LAPIC_VERSION = 1 };
enum { LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_COUNT };
enum { TIMER_ONESHOT, TIMER_PERIODIC, TIMER_DEADLINE };
enum { LVT_MASKED = 1 << 16, SVR_ENABLE = 1 << 8 };
enum { ESR_SEND_VECTOR = 1 << 5, ESR_RECEIVE_VECTOR = 1 << 6, ESR_REGISTER = 1 << 7 };
enum { BASE_BSP = 1 << 8, BASE_X2 = 1 << 10, BASE_ENABLE = 1 << 11 };
enum { REG_ID = 0x02, REG_VERSION = 0x03, REG_TPR = 0x08, REG_APR = 0x09, REG_PPR = 0x0a, REG_EOI = 0x0b, REG_LDR = 0x0d,
       REG_DFR = 0x0e, REG_SVR = 0x0f, REG_ISR = 0x10, REG_TMR = 0x18, REG_IRR = 0x20, REG_ESR = 0x28, REG_ICR = 0x30,
       REG_ICR_HIGH = 0x31, REG_LVT = 0x32, REG_INITIAL = 0x38, REG_CURRENT = 0x39, REG_DIVIDE = 0x3e, REG_SELF = 0x3f };
#define APIC_HZ UINT64_C(1000000000)       /* the timer's input: one tick a nanosecond of guest time */
#define DELIVER_NONE (-1)
#define DELIVER_PIC (-2)                   /* INTR: the PIC knows the vector */

struct vm_lapic {
    vm_apics *bus;
    vm_vcpu *cpu;
    vm_timer *timer;
    _Atomic int deliver;                   /* vector, DELIVER_NONE or DELIVER_PIC */
    struct {
        uint32_t version, index;
        uint64_t base;
        uint32_t id, tpr, ldr, dfr, svr, esr, esr_new, divide, initial;
        uint32_t lvt[LVT_COUNT], isr[8], tmr[8], irr[8];
        uint64_t icr;
        uint64_t timer_start;              /* when `initial` was loaded */
        uint64_t tsc_deadline;             /* 0: not armed */
        vm_ticker ticker;
    } s;
};

struct vm_apics {
    vm_machine *machine;
    vm_pic *pic;
    vm_region *region;
    void (*eoi)(void *target, uint8_t vector);
    void *target;
    unsigned count, next_lowest;
    bool intr, direct;
    vm_lapic *apic[];
};

/* ---- bit sets ---- */
static int highest(const uint32_t set[8])
{
    for (int i = 7; i >= 0; i--)
        if (set[i])
            return i * 32 + 31 - __builtin_clz(set[i]);
    return -1;
}
static bool bit_get(const uint32_t set[8], unsigned v) { return set[v >> 5] >> (v & 31) & 1; }
static void bit_put(uint32_t set[8], unsigned v, bool on)
{
    set[v >> 5] = (set[v >> 5] & ~(1u << (v & 31))) | (uint32_t)on << (v & 31);
}

static bool is_enabled(const vm_lapic *l) { return l->s.base & BASE_ENABLE; }
static bool is_x2(const vm_lapic *l) { return (l->s.base & (BASE_ENABLE | BASE_X2)) == (BASE_ENABLE | BASE_X2); }
static bool is_software_enabled(const vm_lapic *l) { return is_enabled(l) && (l->s.svr & SVR_ENABLE); }

static uint32_t ppr(const vm_lapic *l) {           /* 11.8.3.1 */
    int in_service = highest(l->s.isr);
    uint32_t class = in_service < 0 ? 0 : (uint32_t)in_service & 0xf0;
    return (l->s.tpr & 0xf0) >= class ? l->s.tpr : class;
}

/* ExtINT reaches this vCPU: hardware-disabled APICs pass INTR through on vCPU 0, as does an IMCR in PIC mode. */
static bool takes_extint(const vm_lapic *l)
{
    if (l->s.index == 0 && (!is_enabled(l) || l->bus->direct))
        return true;
    uint32_t lint0 = l->s.lvt[LVT_LINT0];
    return is_enabled(l) && !(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == VM_APIC_EXTINT;
}

static void update(vm_lapic *l)
{
    int vector = is_software_enabled(l) ? highest(l->s.irr) : -1, deliver = DELIVER_NONE;
    if (vector >= 0 && ((uint32_t)vector & 0xf0) > (ppr(l) & 0xf0))
        deliver = vector;
    else if (l->bus->intr && takes_extint(l))
        deliver = DELIVER_PIC;
    int before = atomic_exchange(&l->deliver, deliver);
    if (deliver != DELIVER_NONE && deliver != before)
        vm_vcpu_notify(l->cpu, X86_ATT_IRQ);
}

/* ---- errors ---- */
static void accept(vm_lapic *l, unsigned vector, bool is_level);
static void apic_error(vm_lapic *l, uint32_t bits)
{
    bool fresh = (l->s.esr_new & bits) != bits;
    l->s.esr_new |= bits;
    uint32_t lvt = l->s.lvt[LVT_ERROR];
    if (fresh && !(lvt & LVT_MASKED) && (lvt & 0xff) >= 16)
        accept(l, lvt & 0xff, false);
}

/* ---- receiving ---- */
static void accept(vm_lapic *l, unsigned vector, bool is_level)
{
    if (!is_software_enabled(l))
        return;
    if (vector < 16) {
        apic_error(l, ESR_RECEIVE_VECTOR);
        return;
    }
    bit_put(l->s.irr, vector, true);
    bit_put(l->s.tmr, vector, is_level);
    update(l);
}

static void receive(vm_lapic *l, const vm_apic_msg *msg)
{
    vm_vcpu *cpu = l->cpu;
    switch (msg->mode) {
    case VM_APIC_FIXED: case VM_APIC_LOWEST:
        accept(l, msg->vector, msg->is_level);
        break;
    case VM_APIC_NMI:
        if (cpu->nmis_latched < VM_NMIS)
            cpu->nmis_latched++;
        vm_vcpu_notify(cpu, X86_ATT_EVENT);
        break;
    case VM_APIC_INIT:
        if (msg->is_level && !msg->is_asserted)
            break;                                 /* level de-assert only synchronised arbitration ids of old CPUs */
        cpu->sipi_pending = false;
        cpu->init_pending = true;
        vm_vcpu_notify(cpu, X86_ATT_EVENT);
        break;
    case VM_APIC_SIPI:
        cpu->sipi_vector = msg->vector;
        cpu->sipi_pending = true;
        vm_vcpu_notify(cpu, X86_ATT_EVENT);
        break;
    default:                                       /* SMI: no SMM; remote read: not on this bus; ExtINT: LINT0 only */
        break;
    }
}

/* Is this APIC addressed? 11.6.2. Eight-bit senders (xAPIC, I/O APIC, MSI) broadcast with 0xff. */
static bool is_match(const vm_lapic *l, const vm_apic_msg *msg)
{
    if (!is_enabled(l))
        return false;
    if (msg->dest == (msg->is_x2apic ? UINT32_MAX : 0xffu))
        return true;
    if (!msg->is_logical)
        return msg->dest == vm_lapic_id(l);
    if (is_x2(l)) {
        uint32_t ldr = l->s.index >> 4 << 16 | 1u << (l->s.index & 15);
        return msg->dest >> 16 == ldr >> 16 && (msg->dest & ldr & 0xffff);
    }
    uint32_t mda = msg->dest & 0xff, id = l->s.ldr >> 24;
    if (l->s.dfr >> 28 == 15)
        return mda & id;
    return mda >> 4 == id >> 4 && (mda & id & 15);
}

static vm_lapic *pick_lowest(vm_apics *a, const vm_apic_msg *msg)
{
    vm_lapic *best = NULL;
    for (unsigned i = 0; i < a->count; i++) {      /* start after the last winner: equals take turns */
        vm_lapic *l = a->apic[(a->next_lowest + i) % a->count];
        if (is_match(l, msg) && is_software_enabled(l) && (!best || (ppr(l) & 0xf0) < (ppr(best) & 0xf0)))
            best = l;
    }
    if (best)
        a->next_lowest = (best->s.index + 1) % a->count;
    return best;
}

bool vm_apics_send(vm_apics *a, const vm_apic_msg *msg)
{
    if (msg->mode == VM_APIC_LOWEST) {
        vm_lapic *l = pick_lowest(a, msg);
        if (l)
            receive(l, msg);
        return l != NULL;
    }
    bool taken = false;
    for (unsigned i = 0; i < a->count; i++) {
        if (is_match(a->apic[i], msg)) {
            receive(a->apic[i], msg);
            taken = true;
        }
    }
    return taken;
}

bool vm_apics_is_pending(vm_apics *a, const vm_apic_msg *msg)
{
    for (unsigned i = 0; i < a->count; i++)
        if (is_match(a->apic[i], msg) && bit_get(a->apic[i]->s.irr, msg->vector))
            return true;
    return false;
}

vm_apic_msg vm_apic_msi(uint64_t address, uint32_t data) {     /* 11.11 */
    vm_apic_msg msg = {
        .dest = address >> 12 & 0xff, .vector = (uint8_t)data, .mode = data >> 8 & 7, .is_logical = address >> 2 & 1,
        .is_level = data >> 15 & 1, .is_asserted = data >> 14 & 1,
    };
    return msg;
}

/* ---- sending: the interrupt command register, 11.6.1 ---- */
static void send_ipi(vm_lapic *l, uint64_t icr)
{
    vm_apics *a = l->bus;
    unsigned shorthand = icr >> 18 & 3;
    vm_apic_msg msg = {
        .vector = (uint8_t)icr, .mode = icr >> 8 & 7, .is_logical = icr >> 11 & 1, .is_asserted = icr >> 14 & 1,
        .is_level = icr >> 15 & 1, .is_x2apic = is_x2(l), .dest = is_x2(l) ? (uint32_t)(icr >> 32) : (uint32_t)(icr >> 56),
    };
    if ((msg.mode == VM_APIC_FIXED || msg.mode == VM_APIC_LOWEST) && msg.vector < 16) {
        apic_error(l, ESR_SEND_VECTOR);
        return;
    }
    if (msg.mode == VM_APIC_FIXED || msg.mode == VM_APIC_LOWEST)
        msg.is_level = false;                      /* IPIs are edges whatever the bit says */
    if (shorthand == 0) {
        vm_apics_send(a, &msg);
        return;
    }
    if (msg.mode == VM_APIC_LOWEST)
        msg.mode = VM_APIC_FIXED;
    for (unsigned i = 0; i < a->count; i++) {
        vm_lapic *to = a->apic[i];
        bool is_self = to == l;
        if (shorthand == 1 ? is_self && msg.mode == VM_APIC_FIXED : (is_self ? shorthand == 2 : is_enabled(to)))
            receive(to, &msg);
    }
}

static void end_of_interrupt(vm_lapic *l)
{
    int vector = highest(l->s.isr);
    if (vector < 0)
        return;
    bit_put(l->s.isr, (unsigned)vector, false);
    if (bit_get(l->s.tmr, (unsigned)vector) && l->bus->eoi)
        l->bus->eoi(l->bus->target, (uint8_t)vector);
    update(l);
}

/* ---- timer, 11.5.4 ---- */
static unsigned timer_mode(const vm_lapic *l) { return l->s.lvt[LVT_TIMER] >> 17 & 3; }
static uint64_t divisor(const vm_lapic *l)
{
    unsigned code = (l->s.divide & 3) | (l->s.divide >> 1 & 4);
    return code == 7 ? 1 : UINT64_C(2) << code;
}

static uint32_t timer_current(const vm_lapic *l)
{
    if (!l->s.initial || timer_mode(l) == TIMER_DEADLINE)
        return 0;
    uint64_t ticks = (vm_clock_now(l->bus->machine) - l->s.timer_start) / divisor(l);
    if (timer_mode(l) == TIMER_PERIODIC)
        ticks %= l->s.initial;
    return ticks >= l->s.initial ? 0 : l->s.initial - (uint32_t)ticks;
}

static uint64_t guest_tsc(const vm_lapic *l) { return vm_clock_tsc(l->bus->machine) + l->cpu->x86.tsc_adjust; }

static uint64_t deadline_ns(const vm_lapic *l)
{
    uint64_t tsc = guest_tsc(l), now = vm_clock_now(l->bus->machine);
    if (l->s.tsc_deadline <= tsc)
        return now;
    uint64_t wait = vm_ns_from_ticks(l->s.tsc_deadline - tsc, l->bus->machine->tsc_hz);
    return wait > UINT64_MAX - 1 - now ? UINT64_MAX : now + wait;
}

static void timer_arm(vm_lapic *l)
{
    uint64_t now = vm_clock_now(l->bus->machine), at = UINT64_MAX;
    if (timer_mode(l) == TIMER_DEADLINE)
        at = l->s.tsc_deadline ? deadline_ns(l) : UINT64_MAX;
    else if (timer_mode(l) == TIMER_PERIODIC)
        at = vm_ticker_wake(&l->s.ticker, now);
    else if (l->s.ticker.next_ns)
        at = l->s.ticker.next_ns;
    vm_timer_set(l->timer, at);
}

static void timer_start(vm_lapic *l, uint64_t elapsed_ticks)
{
    uint64_t now = vm_clock_now(l->bus->machine), span = l->s.initial * divisor(l);
    l->s.timer_start = now - elapsed_ticks * divisor(l);
    l->s.ticker = (vm_ticker){ 0 };
    if (l->s.initial && timer_mode(l) != TIMER_DEADLINE) {
        l->s.ticker.next_ns = l->s.timer_start + span;
        l->s.ticker.period_ns = timer_mode(l) == TIMER_PERIODIC ? span : 0;
    }
    timer_arm(l);
}

static void timer_interrupt(vm_lapic *l)
{
    uint32_t lvt = l->s.lvt[LVT_TIMER];
    if (!(lvt & LVT_MASKED))
        accept(l, lvt & 0xff, false);
}

static void timer_fire(void *user)
{
    vm_lapic *l = user;
    uint64_t now = vm_clock_now(l->bus->machine);
    if (timer_mode(l) == TIMER_DEADLINE) {
        if (l->s.tsc_deadline && guest_tsc(l) >= l->s.tsc_deadline) {
            l->s.tsc_deadline = 0;
            timer_interrupt(l);
        }
    } else if (timer_mode(l) == TIMER_ONESHOT) {
        if (l->s.ticker.next_ns && now >= l->s.ticker.next_ns) {
            l->s.ticker.next_ns = 0;
            timer_interrupt(l);
        }
    } else {
        vm_ticker_advance(&l->s.ticker, now);
        if ((l->s.lvt[LVT_TIMER] & LVT_MASKED) || !is_software_enabled(l)) {
            l->s.ticker.due = 0;
        } else if (l->s.ticker.due && !bit_get(l->s.irr, l->s.lvt[LVT_TIMER] & 0xff)) {
            l->s.ticker.due--;
            timer_interrupt(l);
        }
    }
    timer_arm(l);
}

static void write_deadline(vm_lapic *l, uint64_t value)
{
    if (timer_mode(l) != TIMER_DEADLINE)
        return;
    bool is_past = value && value <= guest_tsc(l);             /* 11.5.4.1: the interrupt comes at once */
    l->s.tsc_deadline = is_past ? 0 : value;
    if (is_past)
        timer_interrupt(l);
    timer_arm(l);
}

/* ---- registers ---- */
static const uint32_t lvt_mask[LVT_COUNT] = { 0x710ff, 0x117ff, 0x117ff, 0x1f7ff, 0x1f7ff, 0x110ff };

static void lint0_edge(vm_lapic *l)
{
    uint32_t lvt = l->s.lvt[LVT_LINT0];
    if (!is_software_enabled(l) || (lvt & LVT_MASKED))
        return;
    vm_apic_msg msg = { .vector = (uint8_t)lvt, .mode = lvt >> 8 & 7 };
    if (msg.mode == VM_APIC_FIXED || msg.mode == VM_APIC_NMI || msg.mode == VM_APIC_INIT)
        receive(l, &msg);
}

static void write_lvt(vm_lapic *l, unsigned n, uint32_t value)
{
    value &= lvt_mask[n] & ~(1u << 12 | 1u << 14);             /* delivery status, remote IRR: read-only */
    if (!(l->s.svr & SVR_ENABLE))
        value |= LVT_MASKED;
    uint32_t before = l->s.lvt[n];
    l->s.lvt[n] = value;
    if (n == LVT_TIMER && ((before ^ value) >> 17 & 3)) {      /* another mode stops the timer; a switch between one-shot and
                                                                  periodic keeps the count */
        bool was = (before >> 17 & 3) == TIMER_DEADLINE, is = timer_mode(l) == TIMER_DEADLINE;
        if (was || is) {
            l->s.tsc_deadline = 0;
            l->s.initial = 0;
        }
        timer_start(l, l->s.initial ? (vm_clock_now(l->bus->machine) - l->s.timer_start) / divisor(l) % l->s.initial : 0);
    }
    if (n == LVT_LINT0) {
        if (l->bus->intr && (before & LVT_MASKED))
            lint0_edge(l);
        update(l);
    }
}

static void write_svr(vm_lapic *l, uint32_t value)
{
    l->s.svr = value & 0x1ff;
    if (!(value & SVR_ENABLE))
        for (unsigned i = 0; i < LVT_COUNT; i++)
            l->s.lvt[i] |= LVT_MASKED;
    update(l);
}

/* reg: offset / 16, which is also the MSR's distance from 0x800. */
static bool read_register(vm_lapic *l, unsigned reg, uint32_t *value)
{
    switch (reg) {
    case REG_ID: *value = is_x2(l) ? l->s.index : l->s.id << 24; break;
    case REG_VERSION: *value = 0x14 | (LVT_COUNT - 1) << 16; break;
    case REG_TPR: *value = l->s.tpr; break;
    case REG_APR: *value = 0; break;
    case REG_PPR: *value = ppr(l); break;
    case REG_EOI: *value = 0; break;
    case REG_LDR: *value = is_x2(l) ? l->s.index >> 4 << 16 | 1u << (l->s.index & 15) : l->s.ldr; break;
    case REG_DFR: *value = l->s.dfr; break;
    case REG_SVR: *value = l->s.svr; break;
    case REG_ISR ... REG_ISR + 7: *value = l->s.isr[reg - REG_ISR]; break;
    case REG_TMR ... REG_TMR + 7: *value = l->s.tmr[reg - REG_TMR]; break;
    case REG_IRR ... REG_IRR + 7: *value = l->s.irr[reg - REG_IRR]; break;
    case REG_ESR: *value = l->s.esr; break;
    case REG_ICR: *value = (uint32_t)l->s.icr; break;
    case REG_ICR_HIGH: *value = (uint32_t)(l->s.icr >> 32); break;
    case REG_LVT ... REG_LVT + LVT_COUNT - 1: *value = l->s.lvt[reg - REG_LVT]; break;
    case REG_INITIAL: *value = l->s.initial; break;
    case REG_CURRENT: *value = timer_current(l); break;
    case REG_DIVIDE: *value = l->s.divide; break;
    default: return false;
    }
    return true;
}

static bool write_register(vm_lapic *l, unsigned reg, uint32_t value)
{
    switch (reg) {
    case REG_ID: l->s.id = value >> 24; break;
    case REG_TPR: l->s.tpr = value & 0xff; update(l); break;
    case REG_EOI: end_of_interrupt(l); break;
    case REG_LDR: l->s.ldr = value & 0xff000000; break;
    case REG_DFR: l->s.dfr = value | 0x0fffffff; break;
    case REG_SVR: write_svr(l, value); break;
    case REG_ESR: l->s.esr = l->s.esr_new; l->s.esr_new = 0; break;
    case REG_ICR:
        l->s.icr = (l->s.icr & ~UINT64_C(0xffffffff)) | (value & 0xcefff);    /* delivery status reads idle */
        l->s.icr &= ~UINT64_C(0x1000);
        send_ipi(l, l->s.icr);
        break;
    case REG_ICR_HIGH: l->s.icr = (uint32_t)l->s.icr | (uint64_t)value << 32; break;
    case REG_LVT ... REG_LVT + LVT_COUNT - 1: write_lvt(l, reg - REG_LVT, value); break;
    case REG_INITIAL:
        if (timer_mode(l) != TIMER_DEADLINE) {
            l->s.initial = value;
            timer_start(l, 0);
        }
        break;
    case REG_DIVIDE: {
        uint32_t left = timer_current(l);
        uint32_t done = l->s.initial - (left ? left : l->s.initial);
        l->s.divide = value & 0xb;
        if (left)
            timer_start(l, done);
        break;
    }
    default: return false;
    }
    return true;
}

static int page_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user;
    uint32_t v = 0;
    if (!cpu || !cpu->lapic || !is_enabled(cpu->lapic) || is_x2(cpu->lapic))
        return VM_OK;                              /* nobody there: all ones */
    if (offset >= 0x400 || (offset & 15) + width > 16 || !read_register(cpu->lapic, (unsigned)(offset >> 4), &v))
        apic_error(cpu->lapic, ESR_REGISTER);
    *value = (offset & 15) < 4 ? v >> (8 * (offset & 3)) : 0;
    return VM_OK;
}

static int page_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user;
    if (!cpu || !cpu->lapic || !is_enabled(cpu->lapic) || is_x2(cpu->lapic))
        return VM_OK;
    if ((offset & 15) || width < 4)
        return VM_OK;                              /* 11.4.1: 32-bit aligned accesses only */
    if (offset >= 0x3f0 || !write_register(cpu->lapic, (unsigned)(offset >> 4), (uint32_t)value))
        apic_error(cpu->lapic, ESR_REGISTER);
    return VM_OK;
}

/* ---- MSRs ---- */
static bool write_base(vm_lapic *l, uint64_t value) {          /* 11.12.5, figure 11-27 */
    uint64_t allowed = BASE_BSP | BASE_X2 | BASE_ENABLE | (l->cpu->x86.phys_mask & ~UINT64_C(0xfff));
    unsigned from = l->s.base >> 10 & 3, to = value >> 10 & 3;
    if ((value & ~allowed) || to == 1)
        return false;
    if ((from == 3 && to == 2) || (from == 0 && to == 3))
        return false;
    uint64_t before = l->s.base;
    l->s.base = value;
    if (from != 0 && to == 0) {        /* as after power-up, the id too, which INIT keeps (11.4.3) */
        l->s.id = l->s.index;
        vm_lapic_init(l);
    }
    if ((before ^ value) & ~UINT64_C(0xfff))
        vm_region_move(l->bus->region, value & ~UINT64_C(0xfff), true);
    update(l);
    return true;
}

/* Reserved bits of a register written by WRMSR fault (11.12.1.2). */
static bool is_legal(unsigned reg, uint64_t value)
{
    switch (reg) {
    case REG_TPR: case REG_SELF: return !(value & ~UINT64_C(0xff));
    case REG_EOI: case REG_ESR: return value == 0;
    case REG_SVR: return !(value & ~UINT64_C(0x11ff));
    case REG_DIVIDE: return !(value & ~UINT64_C(0xb));
    case REG_ICR: return !(value & 0xfff32000);
    case REG_INITIAL: return !(value >> 32);
    case REG_LVT ... REG_LVT + LVT_COUNT - 1: return !(value & ~(uint64_t)lvt_mask[reg - REG_LVT]);
    default: return false;                         /* read-only or not there */
    }
}

static bool x2_read(vm_lapic *l, unsigned reg, uint64_t *value)
{
    uint32_t v;
    if (reg == REG_ICR) {
        *value = l->s.icr;
        return true;
    }
    if (reg == REG_DFR || reg == REG_ICR_HIGH || reg == REG_EOI || reg == REG_APR || !read_register(l, reg, &v))
        return false;
    *value = v;
    return true;
}

static bool x2_write(vm_lapic *l, unsigned reg, uint64_t value)
{
    if (!is_legal(reg, value))
        return false;
    if (reg == REG_SELF) {
        vm_apic_msg msg = { .vector = (uint8_t)value, .mode = VM_APIC_FIXED };
        if (msg.vector < 16)
            apic_error(l, ESR_SEND_VECTOR);
        else
            receive(l, &msg);
        return true;
    }
    if (reg == REG_ICR) {
        l->s.icr = value & ~UINT64_C(0x1000);      /* delivery status: never busy */
        send_ipi(l, value);
        return true;
    }
    return write_register(l, reg, (uint32_t)value);
}

bool vm_lapic_msr_read(vm_lapic *l, uint32_t msr, uint64_t *value)
{
    if (msr == 0x1b) {
        *value = l->s.base;
        return true;
    }
    if (msr == 0x6e0) {
        *value = timer_mode(l) == TIMER_DEADLINE ? l->s.tsc_deadline : 0;
        return true;
    }
    return msr >= 0x800 && msr <= 0x83f && is_x2(l) && x2_read(l, msr - 0x800, value);
}

bool vm_lapic_msr_write(vm_lapic *l, uint32_t msr, uint64_t value)
{
    if (msr == 0x1b)
        return write_base(l, value);
    if (msr == 0x6e0) {
        write_deadline(l, value);
        return true;
    }
    return msr >= 0x800 && msr <= 0x83f && is_x2(l) && x2_write(l, msr - 0x800, value);
}

uint8_t vm_lapic_tpr(const vm_lapic *l) { return (uint8_t)l->s.tpr; }
void vm_lapic_set_tpr(vm_lapic *l, uint8_t tpr)
{
    l->s.tpr = tpr;
    update(l);
}
uint32_t vm_lapic_id(const vm_lapic *l) { return is_x2(l) ? l->s.index : l->s.id; }
uint64_t vm_lapic_base(const vm_lapic *l) { return l->s.base; }

/* ---- towards the vCPU ---- */
int vm_lapic_pending(vm_vcpu *cpu)
{
    vm_lapic *l = cpu->lapic;
    int deliver = atomic_load_explicit(&l->deliver, memory_order_acquire);
    if (deliver != DELIVER_PIC)
        return deliver;
    vm_device_lock(cpu->machine);
    int vector = l->bus->pic ? vm_pic_peek(l->bus->pic) : -1;
    vm_device_unlock(cpu->machine);
    return vector;
}

int vm_lapic_acknowledge(vm_vcpu *cpu)
{
    vm_lapic *l = cpu->lapic;
    int deliver = atomic_load(&l->deliver);
    if (deliver >= 0) {
        bit_put(l->s.irr, (unsigned)deliver, false);
        bit_put(l->s.isr, (unsigned)deliver, true);
        update(l);
    } else if (deliver == DELIVER_PIC) {
        deliver = l->bus->pic ? vm_pic_acknowledge(l->bus->pic) : -1;
        update(l);
    }
    return deliver;
}

void vm_apics_set_pic(vm_apics *a, vm_pic *pic) { a->pic = pic; }

void vm_apics_lint0(void *apics, unsigned unused, bool level)
{
    vm_apics *a = apics;
    (void)unused;
    bool rose = level && !a->intr;
    a->intr = level;
    for (unsigned i = 0; i < a->count; i++) {
        if (rose)
            lint0_edge(a->apic[i]);
        update(a->apic[i]);
    }
}

void vm_apics_restore_intr(vm_apics *a, bool level) { a->intr = level; }

void vm_apics_direct_intr(vm_apics *a, bool direct)
{
    a->direct = direct;
    update(a->apic[0]);
}

void vm_apics_nmi(vm_apics *a)
{
    for (unsigned i = 0; i < a->count; i++) {
        uint32_t lvt = a->apic[i]->s.lvt[LVT_LINT1];
        vm_apic_msg msg = { .vector = (uint8_t)lvt, .mode = lvt >> 8 & 7 };
        if (!(lvt & LVT_MASKED) && is_enabled(a->apic[i]))
            receive(a->apic[i], &msg);
    }
}

bool vm_apics_takes_pic(vm_apics *a)
{
    for (unsigned i = 0; i < a->count; i++)
        if (takes_extint(a->apic[i]) || !(a->apic[i]->s.lvt[LVT_LINT0] & LVT_MASKED))
            return true;
    return false;
}

/* ---- life ---- */
/* INIT keeps the base and x2APIC mode (11.12.5.1), clears the rest. LINT0 of vCPU 0 is left as firmware leaves it: ExtINT
 * through, so that a kernel started without firmware finds its PIC connected. */
void vm_lapic_init(vm_lapic *l)
{
    memset(l->s.isr, 0, sizeof l->s.isr);
    memset(l->s.irr, 0, sizeof l->s.irr);
    memset(l->s.tmr, 0, sizeof l->s.tmr);
    l->s.tpr = l->s.ldr = l->s.esr = l->s.esr_new = l->s.divide = l->s.initial = 0;
    l->s.dfr = UINT32_MAX;
    l->s.svr = 0xff;
    l->s.icr = 0;
    l->s.tsc_deadline = 0;
    l->s.ticker = (vm_ticker){ 0 };
    for (unsigned i = 0; i < LVT_COUNT; i++)
        l->s.lvt[i] = LVT_MASKED;
    if (l->s.index == 0)
        l->s.lvt[LVT_LINT0] = VM_APIC_EXTINT << 8;
    vm_timer_set(l->timer, UINT64_MAX);
    update(l);
}

void vm_apics_reset(vm_apics *a)
{
    a->direct = false;
    for (unsigned i = 0; i < a->count; i++) {
        vm_lapic *l = a->apic[i];
        l->s.version = LAPIC_VERSION;
        l->s.index = l->s.id = i;
        l->s.base = UINT64_C(0xfee00000) | BASE_ENABLE | (i ? 0 : BASE_BSP);
        vm_lapic_init(l);
    }
    if (a->region && a->region->gpa != UINT64_C(0xfee00000))
        vm_region_move(a->region, UINT64_C(0xfee00000), true);
}

static void apics_reset(void *user) { vm_apics_reset(user); }

static int apics_save(void *user, void *buffer, size_t *bytes)
{
    vm_apics *a = user;
    size_t each = sizeof a->apic[0]->s, all = each * a->count;
    if (buffer) {
        if (*bytes < all)
            return vm_fail(VM_E_INVALID, "local APIC state needs %zu bytes, buffer has %zu", all, *bytes);
        for (unsigned i = 0; i < a->count; i++)
            memcpy((uint8_t *)buffer + i * each, &a->apic[i]->s, each);
    }
    *bytes = all;
    return VM_OK;
}

static int apics_restore(void *user, const void *buffer, size_t bytes)
{
    vm_apics *a = user;
    size_t each = sizeof a->apic[0]->s;
    if (bytes != each * a->count)
        return vm_fail(VM_E_FORMAT, "local APIC state of %zu bytes, expected %zu", bytes, each * a->count);
    for (unsigned i = 0; i < a->count; i++) {
        vm_lapic *l = a->apic[i];
        int status = vm_dev_load(&l->s, each, LAPIC_VERSION, (const uint8_t *)buffer + i * each, each);
        if (status)
            return status;
        l->s.index = i;
        timer_arm(l);
        atomic_store(&l->deliver, DELIVER_NONE);   /* so that what waits is announced again */
        update(l);
    }
    return vm_region_move(a->region, a->apic[0]->s.base & ~UINT64_C(0xfff), true);
}

static void apics_destroy(void *user)
{
    vm_apics *a = user;
    for (unsigned i = 0; i < a->count; i++) {
        if (!a->apic[i])
            continue;
        if (a->apic[i]->cpu)
            a->apic[i]->cpu->lapic = NULL;
        vm_timer_free(a->apic[i]->timer);
        free(a->apic[i]);
    }
    free(a);
}

int vm_apics_new(vm_machine *m, void (*eoi)(void *target, uint8_t vector), void *target, vm_apics **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), page_read, page_write, apics_reset, apics_save, apics_restore,
                                   apics_destroy };
    vm_apics *a = calloc(1, sizeof *a + m->vcpu_count * sizeof a->apic[0]);
    if (!a)
        return vm_fail(VM_E_NOMEM, "local APICs: out of memory");
    a->machine = m;
    a->eoi = eoi;
    a->target = target;
    a->count = m->vcpu_count;
    for (unsigned i = 0; i < a->count; i++) {
        vm_lapic *l = a->apic[i] = calloc(1, sizeof *l);
        if (!l || !(l->timer = vm_timer_new(m, timer_fire, l))) {
            apics_destroy(a);
            return vm_fail(VM_E_NOMEM, "local APIC %u: out of memory", i);
        }
        l->bus = a;
        l->cpu = m->vcpus[i];
        l->deliver = DELIVER_NONE;
        l->cpu->lapic = l;
    }
    vm_apics_reset(a);
    int status = vm_add_mmio(m, UINT64_C(0xfee00000), 0x1000, &ops, a, &a->region);
    if (status) {
        apics_destroy(a);
        return status;
    }
    *out = a;
    return VM_OK;
}
