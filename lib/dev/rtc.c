/* rtc.c - the MC146818 clock, its 128 bytes of CMOS at 0x70-0x71, and 128 more at 0x72-0x73.
 *
 * The time of day is guest time plus an offset; registers 0-9 are computed when read and set the offset when written. While
 * SET (register B bit 7) holds, the bytes stand still and are the truth. The three flags of register C are brought up to date
 * from guest time whenever somebody looks; a timer runs only while an enabled interrupt is to come.
 *
 * Invariant: index registers are 7 bits wide, so cells are never accessed out of bounds.
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { RTC_VERSION = 1 };
enum { REG_SECONDS = 0, REG_MINUTES = 2, REG_HOURS = 4, REG_WEEKDAY = 6, REG_DAY = 7, REG_MONTH = 8, REG_YEAR = 9, REG_A = 10,
       REG_B = 11, REG_C = 12, REG_D = 13, REG_CENTURY = 0x32 };
enum { A_UIP = 0x80, B_SET = 0x80, B_PIE = 0x40, B_AIE = 0x20, B_UIE = 0x10, B_BINARY = 0x04, B_24H = 0x02 };
enum { C_IRQF = 0x80, C_PF = 0x40, C_AF = 0x20, C_UF = 0x10 };
#define NS UINT64_C(1000000000)
#define UIP_NS UINT64_C(244000)            /* UIP is set this long before an update */

struct vm_rtc {
    vm_machine *machine;
    vm_line irq;
    vm_timer *timer;
    uint8_t cells[128];                    /* what the platform stored: reset brings these back */
    struct {
        uint32_t version;
        uint8_t index, high_index, ram[128], high[128];
        uint8_t irq_level;
        int64_t offset_s;                  /* Unix time = offset_s + (guest time + offset_ns) / 10^9 */
        uint64_t offset_ns;
        uint64_t seen_second;              /* last second whose update set the flags */
        vm_ticker ticker;                  /* periodic interrupt */
    } s;
};

static uint64_t divider_ns(const vm_rtc *r) { return vm_clock_now(r->machine) + r->s.offset_ns; }
static uint64_t unix_second(const vm_rtc *r)
{
    int64_t t = (int64_t)(divider_ns(r) / NS) + r->s.offset_s;
    return t < 0 ? 0 : (uint64_t)t;
}

/* ---- calendar: days since 1970-01-01, proleptic Gregorian ---- */
static int64_t days_from_date(int64_t y, unsigned m, unsigned d)
{
    y -= m <= 2;
    int64_t era = (y >= 0 ? y : y - 399) / 400;
    unsigned yoe = (unsigned)(y - era * 400), doy = (153 * (m > 2 ? m - 3 : m + 9) + 2) / 5 + d - 1;
    return era * 146097 + (int64_t)(yoe * 365 + yoe / 4 - yoe / 100 + doy) - 719468;
}

static void date_from_days(int64_t days, int *y, unsigned *m, unsigned *d)
{
    days += 719468;
    int64_t era = (days >= 0 ? days : days - 146096) / 146097;
    unsigned doe = (unsigned)(days - era * 146097);
    unsigned yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
    unsigned doy = doe - (365 * yoe + yoe / 4 - yoe / 100), mp = (5 * doy + 2) / 153;
    *d = doy - (153 * mp + 2) / 5 + 1;
    *m = mp < 10 ? mp + 3 : mp - 9;
    *y = (int)(yoe + era * 400) + (*m <= 2);
}

static uint8_t encode(const vm_rtc *r, unsigned v)
{
    return (uint8_t)(r->s.ram[REG_B] & B_BINARY ? v : (v / 10 % 10) << 4 | v % 10);
}
static unsigned decode(const vm_rtc *r, uint8_t v)
{
    return r->s.ram[REG_B] & B_BINARY ? v : (unsigned)(v >> 4) * 10 + (v & 15);
}
static uint8_t encode_hour(const vm_rtc *r, unsigned hour)
{
    if (r->s.ram[REG_B] & B_24H)
        return encode(r, hour);
    return (uint8_t)(encode(r, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? 0x80 : 0));
}
static unsigned decode_hour(const vm_rtc *r, uint8_t v)
{
    if (r->s.ram[REG_B] & B_24H)
        return decode(r, v) % 24;
    return decode(r, v & 0x7f) % 12 + (v & 0x80 ? 12 : 0);
}

/* Bytes from the running clock. */
static void clock_to_bytes(vm_rtc *r)
{
    if (r->s.ram[REG_B] & B_SET)
        return;
    uint64_t t = unix_second(r), day = t / 86400, second = t % 86400;
    int year;
    unsigned month, date;
    date_from_days((int64_t)day, &year, &month, &date);
    r->s.ram[REG_SECONDS] = encode(r, (unsigned)(second % 60));
    r->s.ram[REG_MINUTES] = encode(r, (unsigned)(second / 60 % 60));
    r->s.ram[REG_HOURS] = encode_hour(r, (unsigned)(second / 3600));
    r->s.ram[REG_WEEKDAY] = encode(r, (unsigned)((day + 4) % 7) + 1);      /* 1970-01-01 was a Thursday; Sunday is 1 */
    r->s.ram[REG_DAY] = encode(r, date);
    r->s.ram[REG_MONTH] = encode(r, month);
    r->s.ram[REG_YEAR] = encode(r, (unsigned)year % 100);
    r->s.ram[REG_CENTURY] = encode(r, (unsigned)year / 100);
}

/* The running clock from bytes: guests write nonsense too, so every field is folded into its range. */
static void bytes_to_clock(vm_rtc *r)
{
    unsigned month = decode(r, r->s.ram[REG_MONTH]), day = decode(r, r->s.ram[REG_DAY]);
    unsigned year = decode(r, r->s.ram[REG_CENTURY]) * 100 + decode(r, r->s.ram[REG_YEAR]) % 100;
    int64_t days = days_from_date(year < 1970 ? 1970 : year, month < 1 ? 1 : month > 12 ? 12 : month, day < 1 ? 1 : day > 31 ? 31 : day);
    int64_t second = decode_hour(r, r->s.ram[REG_HOURS]) * 3600 + decode(r, r->s.ram[REG_MINUTES]) % 60 * 60 +
                     decode(r, r->s.ram[REG_SECONDS]) % 60;
    r->s.offset_s = days * 86400 + second - (int64_t)(divider_ns(r) / NS);     /* the running second goes on */
    r->s.seen_second = unix_second(r);
}

/* ---- interrupts ---- */
static uint64_t periodic_ns(const vm_rtc *r)
{
    unsigned rate = r->s.ram[REG_A] & 15, divider = r->s.ram[REG_A] >> 4 & 7;
    if (!rate || divider > 2)
        return 0;
    if (rate < 3 && divider == 2)
        rate += 7;                         /* 32.768 kHz time base: rates 1, 2 are 3.9 and 7.8 ms */
    return NS * (1u << (rate - 1)) / 32768;
}

static bool is_counting(const vm_rtc *r) { return !(r->s.ram[REG_B] & B_SET) && (r->s.ram[REG_A] >> 4 & 7) <= 2; }

static bool alarm_byte(uint8_t alarm, uint8_t now) { return (alarm & 0xc0) == 0xc0 || alarm == now; }

/* Seconds from (not including) `t` to the next alarm, at most a day; 0: never. */
static uint64_t alarm_distance(const vm_rtc *r, uint64_t t)
{
    const uint8_t *ram = r->s.ram;
    for (uint64_t hour = 0; hour <= 24; hour++) {
        uint64_t begin = hour ? (t / 3600 + hour) * 3600 : t + 1, end = (t / 3600 + hour + 1) * 3600;
        if (!alarm_byte(ram[REG_HOURS + 1], encode_hour(r, (unsigned)(begin / 3600 % 24))))
            continue;
        for (uint64_t s = begin; s < end; s++) {
            if (!alarm_byte(ram[REG_MINUTES + 1], encode(r, (unsigned)(s / 60 % 60))))
                s += 59 - s % 60;
            else if (alarm_byte(ram[REG_SECONDS + 1], encode(r, (unsigned)(s % 60))))
                return s - t;
        }
    }
    return 0;
}

static void drive(vm_rtc *r)
{
    uint8_t b = r->s.ram[REG_B], c = r->s.ram[REG_C];
    bool level = c & b & (C_PF | C_AF | C_UF);
    r->s.ram[REG_C] = level ? c | C_IRQF : c & (uint8_t)~C_IRQF;
    if (level != r->s.irq_level) {
        r->s.irq_level = level;
        vm_line_set(&r->irq, level);
    }
}

static void arm(vm_rtc *r)
{
    uint64_t now = vm_clock_now(r->machine), wake = UINT64_MAX;
    uint8_t b = r->s.ram[REG_B], c = r->s.ram[REG_C];
    if ((b & B_PIE) && !(c & C_PF))
        wake = vm_ticker_wake(&r->s.ticker, now);
    uint64_t seconds = 0;
    if (is_counting(r) && (b & B_UIE) && !(c & C_UF))
        seconds = 1;
    else if (is_counting(r) && (b & B_AIE) && !(c & C_AF))
        seconds = alarm_distance(r, unix_second(r));
    if (seconds) {
        uint64_t at = (divider_ns(r) / NS + seconds) * NS - r->s.offset_ns;
        if (at < wake)
            wake = at;
    }
    vm_timer_set(r->timer, wake);
}

/* Flags from the time that has passed. */
static void catch_up(vm_rtc *r)
{
    uint64_t now = vm_clock_now(r->machine), second = unix_second(r);
    if (is_counting(r) && second > r->s.seen_second) {
        r->s.ram[REG_C] |= C_UF;
        uint64_t distance = alarm_distance(r, r->s.seen_second);
        if (distance && r->s.seen_second + distance <= second)
            r->s.ram[REG_C] |= C_AF;
    }
    r->s.seen_second = second;
    vm_ticker_advance(&r->s.ticker, now);
    if (r->s.ticker.due && !(r->s.ram[REG_C] & C_PF)) {
        r->s.ram[REG_C] |= C_PF;
        /* Without the interrupt the flag only says "at least one". */
        r->s.ticker.due = r->s.ram[REG_B] & B_PIE ? r->s.ticker.due - 1 : 0;
    }
    drive(r);
    arm(r);
}

static void rtc_fire(void *user) { catch_up(user); }

static void plan_periodic(vm_rtc *r)
{
    uint64_t period = periodic_ns(r), now = vm_clock_now(r->machine);
    if (period != r->s.ticker.period_ns)
        r->s.ticker = (vm_ticker){ .period_ns = period, .next_ns = period ? (now / period + 1) * period : 0 };
}

/* ---- registers ---- */
static uint8_t read_cell(vm_rtc *r, unsigned index)
{
    catch_up(r);
    switch (index) {
    case REG_A: {
        uint8_t uip = 0;
        if (is_counting(r) && divider_ns(r) % NS >= NS - UIP_NS)
            uip = A_UIP;
        return (r->s.ram[REG_A] & 0x7f) | uip;
    }
    case REG_C: {
        uint8_t c = r->s.ram[REG_C];
        r->s.ram[REG_C] = 0;               /* reading clears the flags and lets go of the line */
        drive(r);
        arm(r);
        return c;
    }
    case REG_D: return 0x80;               /* valid RAM and time */
    case REG_SECONDS: case REG_MINUTES: case REG_HOURS: case REG_WEEKDAY: case REG_DAY: case REG_MONTH: case REG_YEAR:
    case REG_CENTURY:
        clock_to_bytes(r);
        return r->s.ram[index];
    default: return r->s.ram[index];
    }
}

static void write_b(vm_rtc *r, uint8_t value)
{
    uint8_t before = r->s.ram[REG_B];
    if ((value & B_SET) && !(before & B_SET)) {
        clock_to_bytes(r);
        value &= (uint8_t)~B_UIE;          /* SET clears UIE */
    }
    if (!(value & B_SET) && !(before & B_SET) && ((before ^ value) & (B_BINARY | B_24H))) {
        r->s.ram[REG_B] = value;           /* only another notation of the same time */
    } else if (!(value & B_SET) && (before & B_SET)) {
        r->s.ram[REG_B] = value;
        bytes_to_clock(r);
    }
    r->s.ram[REG_B] = value;
    catch_up(r);
}

static void write_cell(vm_rtc *r, unsigned index, uint8_t value)
{
    catch_up(r);
    switch (index) {
    case REG_A:
        r->s.ram[REG_A] = value & 0x7f;
        plan_periodic(r);
        break;
    case REG_B: write_b(r, value); return;
    case REG_C: case REG_D: return;
    case REG_SECONDS: case REG_MINUTES: case REG_HOURS: case REG_WEEKDAY: case REG_DAY: case REG_MONTH: case REG_YEAR:
    case REG_CENTURY:
        clock_to_bytes(r);
        r->s.ram[index] = value;
        if (!(r->s.ram[REG_B] & B_SET) && index != REG_WEEKDAY)
            bytes_to_clock(r);
        break;
    default: r->s.ram[index] = value; break;
    }
    arm(r);
}

static uint8_t rtc_get(void *dev, unsigned reg)
{
    vm_rtc *r = dev;
    switch (reg) {
    case 1: return read_cell(r, r->s.index & 0x7f);
    case 2: return r->s.high_index;
    case 3: return r->s.high[r->s.high_index & 0x7f];
    default: return 0xff;                  /* 0x70 is write-only */
    }
}

static void rtc_put(void *dev, unsigned reg, uint8_t value)
{
    vm_rtc *r = dev;
    switch (reg) {
    case 0: r->s.index = value; break;     /* bit 7 is the NMI mask: kept, nothing behind it */
    case 1: write_cell(r, r->s.index & 0x7f, value); break;
    case 2: r->s.high_index = value; break;
    case 3: r->s.high[r->s.high_index & 0x7f] = value; break;
    default: break;
    }
}

VM_DEV_BYTE_IO(rtc)

void vm_rtc_set_cell(vm_rtc *r, unsigned index, uint8_t value) { r->cells[index & 0x7f] = r->s.ram[index & 0x7f] = value; }

/* RESET clears the enables and flags; time, alarm and RAM have a battery. */
static void rtc_reset(void *user)
{
    vm_rtc *r = user;
    r->s.version = RTC_VERSION;
    r->s.index = r->s.high_index = 0;
    r->s.ram[REG_A] = 0x26;
    r->s.ram[REG_B] = B_24H;
    r->s.ram[REG_C] = 0;
    for (unsigned i = 0x0e; i < 128; i++)
        if (r->cells[i])
            r->s.ram[i] = r->cells[i];
    r->s.seen_second = unix_second(r);
    plan_periodic(r);
    r->s.ticker.due = 0;
    drive(r);
    arm(r);
}

static int rtc_save(void *user, void *buffer, size_t *bytes)
{
    vm_rtc *r = user;
    return vm_dev_save(&r->s, sizeof r->s, buffer, bytes);
}

static int rtc_restore(void *user, const void *buffer, size_t bytes)
{
    vm_rtc *r = user;
    int status = vm_dev_load(&r->s, sizeof r->s, RTC_VERSION, buffer, bytes);
    if (status)
        return status;
    r->s.offset_ns %= NS;
    if (r->s.offset_s > INT64_C(1) << 40 || r->s.offset_s < -(INT64_C(1) << 40))
        r->s.offset_s = 0;
    arm(r);
    return VM_OK;
}

static void rtc_destroy(void *user)
{
    vm_rtc *r = user;
    vm_timer_free(r->timer);
    free(r);
}

int vm_rtc_new(vm_machine *m, vm_line irq, int64_t unix_seconds, vm_rtc **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), rtc_read, rtc_write, rtc_reset, rtc_save, rtc_restore, rtc_destroy };
    vm_rtc *r = calloc(1, sizeof *r);
    if (!r || !(r->timer = vm_timer_new(m, rtc_fire, r))) {
        free(r);
        return vm_fail(VM_E_NOMEM, "real-time clock: out of memory");
    }
    r->machine = m;
    r->irq = irq;
    r->s.offset_ns = (NS - vm_clock_now(m) % NS) % NS;
    r->s.offset_s = unix_seconds - (int64_t)(divider_ns(r) / NS);
    rtc_reset(r);
    int status = vm_add_pio(m, 0x70, 4, &ops, r, NULL);
    if (status) {
        rtc_destroy(r);
        return status;
    }
    *out = r;
    return VM_OK;
}
