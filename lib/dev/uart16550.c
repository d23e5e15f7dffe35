/* uart16550.c - a 16550A UART with its FIFOs (National's PC16550D data sheet).
 *
 * Transmission takes no time: a byte written is handed to the host and the transmitter is empty again. Reception is paced by
 * the guest: bytes wait in the host's queue (bounded: QUEUE) and move into the FIFO as it has room, so none is ever overrun.
 *
 * Invariants: fifo_count <= 16, fifo_head < 16, queue indexes wrap at QUEUE; update() computes IIR and drives the line after
 * every change.
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { UART_VERSION = 1, FIFO = 16, QUEUE = VM_UART_QUEUE };
enum { IER_RDA = 1, IER_THRE = 2, IER_LINE = 4, IER_MODEM = 8 };
enum { IIR_NONE = 1, IIR_MODEM = 0, IIR_THRE = 2, IIR_RDA = 4, IIR_LINE = 6, IIR_TIMEOUT = 12 };
enum { LCR_DLAB = 0x80, LCR_BREAK = 0x40, MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 16 };
enum { LSR_DATA = 1, LSR_OVERRUN = 2, LSR_BREAK = 16, LSR_THRE = 32, LSR_IDLE = 64, LSR_ERRORS = 0x1e };
enum { MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80 };

struct vm_uart {
    vm_machine *machine;
    vm_line irq;
    vm_timer *timer;                       /* character timeout */
    vm_console_fn fn;
    void *fn_user;
    struct {
        uint32_t version;
        uint8_t ier, fcr, lcr, mcr, lsr, msr, scr, thre_pending, timeout, irq_level;
        uint16_t divisor;
        uint8_t fifo[FIFO], fifo_head, fifo_count;
        uint32_t queue_head, queue_count;
    } s;
    uint8_t *queue;                        /* host input: not guest-visible, not saved */
};

static bool has_fifo(const vm_uart *u) { return u->s.fcr & 1; }
static unsigned capacity(const vm_uart *u) { return has_fifo(u) ? FIFO : 1; }
static unsigned trigger(const vm_uart *u)
{
    static const uint8_t levels[4] = { 1, 4, 8, 14 };
    return has_fifo(u) ? levels[u->s.fcr >> 6] : 1;
}

static unsigned identify(const vm_uart *u)
{
    if ((u->s.ier & IER_LINE) && (u->s.lsr & LSR_ERRORS))
        return IIR_LINE;
    if ((u->s.ier & IER_RDA) && u->s.fifo_count >= trigger(u))
        return IIR_RDA;
    if ((u->s.ier & IER_RDA) && u->s.timeout && u->s.fifo_count)
        return IIR_TIMEOUT;
    if ((u->s.ier & IER_THRE) && u->s.thre_pending)
        return IIR_THRE;
    if ((u->s.ier & IER_MODEM) && (u->s.msr & 15))
        return IIR_MODEM;
    return IIR_NONE;
}

/* OUT2 gates the line on a PC; loopback takes it away from the pins (IRQ included). */
static void update(vm_uart *u)
{
    bool level = identify(u) != IIR_NONE && (u->s.mcr & MCR_OUT2) && !(u->s.mcr & MCR_LOOP);
    if (level != u->s.irq_level) {
        u->s.irq_level = level;
        vm_line_set(&u->irq, level);
    }
}

/* Four character times of ten bits (data sheet: FIFO time-out). */
static uint64_t timeout_ns(const vm_uart *u)
{
    uint64_t divisor = u->s.divisor ? u->s.divisor : 1;
    return 4 * 10 * divisor * UINT64_C(1000000000) / 115200;
}

static void restart_timeout(vm_uart *u)
{
    u->s.timeout = 0;
    bool wanted = has_fifo(u) && u->s.fifo_count && u->s.fifo_count < trigger(u);
    vm_timer_set(u->timer, wanted ? vm_clock_now(u->machine) + timeout_ns(u) : UINT64_MAX);
}

static void uart_fire(void *user)
{
    vm_uart *u = user;
    u->s.timeout = u->s.fifo_count != 0;
    update(u);
}

static void push(vm_uart *u, uint8_t byte)
{
#ifdef LIBVM_SEEDED_BUG                    /* for tests/fuzz/seeded alone: a FIFO whose end nobody looks at */
    u->s.fifo[u->s.fifo_count++] = byte;
    u->s.lsr |= LSR_DATA;
    return;
#endif
    if (u->s.fifo_count >= capacity(u)) {
        u->s.lsr |= LSR_OVERRUN;
        if (has_fifo(u))
            return;
        u->s.fifo_count = 0;               /* without FIFO the newer byte overwrites */
    }
    u->s.fifo[(u->s.fifo_head + u->s.fifo_count) % FIFO] = byte;
    u->s.fifo_count++;
    u->s.lsr |= LSR_DATA;
}

/* Move what waits on the host's side into the receiver. */
static void refill(vm_uart *u)
{
    if (!u->s.queue_count || (u->s.mcr & MCR_LOOP))
        return;
    while (u->s.queue_count && u->s.fifo_count < capacity(u)) {
        push(u, u->queue[u->s.queue_head]);
        u->s.queue_head = (u->s.queue_head + 1) % QUEUE;
        u->s.queue_count--;
    }
    restart_timeout(u);
}

static uint8_t pop(vm_uart *u)
{
    if (!u->s.fifo_count)
        return 0;
    uint8_t byte = u->s.fifo[u->s.fifo_head];
    u->s.fifo_head = (u->s.fifo_head + 1) % FIFO;
    u->s.fifo_count--;
    refill(u);
    if (!u->s.fifo_count)
        u->s.lsr &= (uint8_t)~LSR_DATA;
    restart_timeout(u);
    return byte;
}

static void clear_receiver(vm_uart *u)
{
    u->s.fifo_head = u->s.fifo_count = 0;
    u->s.lsr &= (uint8_t)~LSR_DATA;
    restart_timeout(u);
}

static void transmit(vm_uart *u, uint8_t byte)
{
    u->s.thre_pending = 1;                 /* it was empty before and is again */
    if (u->s.mcr & MCR_LOOP) {
        push(u, byte);
        restart_timeout(u);
    } else if (u->fn) {
        u->fn(u->fn_user, &byte, 1);
    }
}

/* Modem lines: the far end is always ready; in loopback they follow MCR. */
static void modem_lines(vm_uart *u)
{
    uint8_t mcr = u->s.mcr, lines = MSR_CTS | MSR_DSR | MSR_DCD;
    if (mcr & MCR_LOOP)
        lines = (uint8_t)((mcr & MCR_RTS ? MSR_CTS : 0) | (mcr & MCR_DTR ? MSR_DSR : 0) | (mcr & MCR_OUT1 ? MSR_RI : 0) |
                          (mcr & MCR_OUT2 ? MSR_DCD : 0));
    uint8_t changed = (u->s.msr ^ lines) & 0xf0, delta = changed >> 4;
    if ((changed & MSR_RI) && (lines & MSR_RI))
        delta &= (uint8_t)~4;              /* TERI: trailing edge only */
    u->s.msr = lines | (u->s.msr & 15) | delta;
}

static uint8_t uart_get(void *dev, unsigned reg)
{
    vm_uart *u = dev;
    uint8_t v = 0xff;
    switch (reg) {
    case 0: v = u->s.lcr & LCR_DLAB ? (uint8_t)u->s.divisor : pop(u); break;
    case 1: v = u->s.lcr & LCR_DLAB ? (uint8_t)(u->s.divisor >> 8) : u->s.ier; break;
    case 2:
        v = (uint8_t)(identify(u) | (has_fifo(u) ? 0xc0 : 0));
        if ((v & 15) == IIR_THRE)
            u->s.thre_pending = 0;
        break;
    case 3: v = u->s.lcr; break;
    case 4: v = u->s.mcr; break;
    case 5:
        v = u->s.lsr;
        u->s.lsr &= (uint8_t)~LSR_ERRORS;
        break;
    case 6:
        v = u->s.msr;
        u->s.msr &= 0xf0;
        break;
    case 7: v = u->s.scr; break;
    default: break;
    }
    update(u);
    return v;
}

static void write_fcr(vm_uart *u, uint8_t value)
{
    bool was = has_fifo(u);
    u->s.fcr = value & 1 ? value & 0xc9 : 0;
    if (was != has_fifo(u) || ((value & 1) && (value & 2)))
        clear_receiver(u);
    refill(u);
    restart_timeout(u);
}

static void uart_put(void *dev, unsigned reg, uint8_t value)
{
    vm_uart *u = dev;
    switch (reg) {
    case 0:
        if (u->s.lcr & LCR_DLAB)
            u->s.divisor = (uint16_t)((u->s.divisor & 0xff00) | value);
        else
            transmit(u, value);
        break;
    case 1:
        if (u->s.lcr & LCR_DLAB) {
            u->s.divisor = (uint16_t)((u->s.divisor & 0xff) | value << 8);
        } else {
            if ((value & IER_THRE) && !(u->s.ier & IER_THRE))
                u->s.thre_pending = 1;     /* enabling it while THR is empty raises it at once */
            u->s.ier = value & 15;
        }
        break;
    case 2: write_fcr(u, value); break;
    case 3: u->s.lcr = value; break;
    case 4:
        u->s.mcr = value & 0x1f;
        modem_lines(u);
        refill(u);
        break;
    case 7: u->s.scr = value; break;
    default: break;                        /* LSR, MSR: factory test only */
    }
    update(u);
}

VM_DEV_BYTE_IO(uart)

void vm_uart_output(vm_uart *u, vm_console_fn fn, void *user)
{
    u->fn = fn;
    u->fn_user = user;
}

int vm_uart_input(vm_uart *u, const uint8_t *bytes, size_t count)
{
    if (count && u->s.queue_count == QUEUE)
        return vm_fail(VM_E_BUSY, "serial input: queue of %d bytes is full", QUEUE);
    if (!u->queue && !(u->queue = malloc(QUEUE)))
        return vm_fail(VM_E_NOMEM, "serial input: out of memory");
    size_t taken = 0;
    for (; taken < count && u->s.queue_count < QUEUE; taken++) {
        u->queue[(u->s.queue_head + u->s.queue_count) % QUEUE] = bytes[taken];
        u->s.queue_count++;
    }
    refill(u);
    update(u);
    return (int)taken;
}

unsigned vm_uart_waiting(const vm_uart *u, uint8_t *bytes)
{
    for (unsigned i = 0; i < u->s.queue_count; i++)
        bytes[i] = u->queue[(u->s.queue_head + i) % QUEUE];
    return u->s.queue_count;
}

bool vm_uart_set_waiting(vm_uart *u, const uint8_t *bytes, unsigned count)
{
    if (count && !u->queue && !(u->queue = malloc(QUEUE)))
        return false;
    u->s.queue_head = 0;
    u->s.queue_count = count;
    if (count)
        memcpy(u->queue, bytes, count);
    return true;
}

static void uart_reset(void *user)
{
    vm_uart *u = user;
    u->s.version = UART_VERSION;
    u->s.ier = u->s.fcr = u->s.lcr = u->s.mcr = u->s.scr = u->s.thre_pending = u->s.timeout = 0;
    u->s.lsr = LSR_THRE | LSR_IDLE;
    u->s.msr = MSR_CTS | MSR_DSR | MSR_DCD;
    u->s.divisor = 12;
    u->s.fifo_head = u->s.fifo_count = 0;
    vm_timer_set(u->timer, UINT64_MAX);
    update(u);
}

static int uart_save(void *user, void *buffer, size_t *bytes)
{
    vm_uart *u = user;
    return vm_dev_save(&u->s, sizeof u->s, buffer, bytes);
}

static int uart_restore(void *user, const void *buffer, size_t bytes)
{
    vm_uart *u = user;
    uint32_t head = u->s.queue_head, count = u->s.queue_count;
    int status = vm_dev_load(&u->s, sizeof u->s, UART_VERSION, buffer, bytes);
    if (status)
        return status;
    u->s.queue_head = head;                /* input of the host stays the host's */
    u->s.queue_count = count;
    u->s.fifo_head %= FIFO;
    if (u->s.fifo_count > capacity(u))
        u->s.fifo_count = (uint8_t)capacity(u);
    if (u->s.timeout)                      /* it has come: a new one would take its interrupt back */
        vm_timer_set(u->timer, UINT64_MAX);
    else
        restart_timeout(u);                /* what waits on the host's side moves in with the next input or read */
    return VM_OK;
}

static void uart_destroy(void *user)
{
    vm_uart *u = user;
    vm_timer_free(u->timer);
    free(u->queue);
    free(u);
}

int vm_uart_new(vm_machine *m, uint16_t port, vm_line irq, vm_uart **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), uart_read, uart_write, uart_reset, uart_save, uart_restore, uart_destroy };
    vm_uart *u = calloc(1, sizeof *u);
    if (!u || !(u->timer = vm_timer_new(m, uart_fire, u))) {
        free(u);
        return vm_fail(VM_E_NOMEM, "serial port 0x%x: out of memory", port);
    }
    u->machine = m;
    u->irq = irq;
    uart_reset(u);
    int status = vm_add_pio(m, port, 8, &ops, u, NULL);
    if (status) {
        uart_destroy(u);
        return status;
    }
    *out = u;
    return VM_OK;
}
