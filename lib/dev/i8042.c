/* i8042.c - the keyboard controller at 0x60 and 0x64 with a keyboard and a PS/2 mouse that answer but never type or move.
 *
 * A20: the output port bit is kept for the guest to read back; addresses are never wrapped.
 * Invariant: a queue's head and count stay below QUEUE; a byte that does not fit is dropped, as real devices do.
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { I8042_VERSION = 1, QUEUE = 16 };
enum { STATUS_FULL = 0x01, STATUS_SYSTEM = 0x04, STATUS_COMMAND = 0x08, STATUS_UNLOCKED = 0x10, STATUS_AUX = 0x20 };
enum { CB_IRQ1 = 0x01, CB_IRQ12 = 0x02, CB_SYSTEM = 0x04, CB_KBD_OFF = 0x10, CB_AUX_OFF = 0x20 };
enum { OUT_NOT_RESET = 0x01, OUT_A20 = 0x02, OUT_KBD_FULL = 0x10, OUT_AUX_FULL = 0x20 };
enum { KBD, AUX, DEVICES };

typedef struct ps2_device {
    uint8_t queue[QUEUE], head, count;
    uint8_t pending;                       /* command that waits for its argument */
    uint8_t scanning, rate, resolution, scale, remote, wrap, set, leds;
} ps2_device;

struct vm_i8042 {
    vm_machine *machine;
    vm_line irq[DEVICES];
    struct {
        uint32_t version;
        uint8_t cb, outport, command, status_command, ram[32];
        uint8_t data, full, from;          /* output buffer: from is KBD or AUX */
        ps2_device dev[DEVICES];
    } s;
};

static void deliver(vm_i8042 *k)
{
    for (unsigned i = 0; i < DEVICES && !k->s.full; i++) {
        ps2_device *d = &k->s.dev[i];
        if (!d->count || (k->s.cb & (i == KBD ? CB_KBD_OFF : CB_AUX_OFF)))
            continue;
        k->s.data = d->queue[d->head];
        d->head = (d->head + 1) % QUEUE;
        d->count--;
        k->s.full = 1;
        k->s.from = (uint8_t)i;
    }
    vm_line_set(&k->irq[KBD], k->s.full && k->s.from == KBD && (k->s.cb & CB_IRQ1));
    vm_line_set(&k->irq[AUX], k->s.full && k->s.from == AUX && (k->s.cb & CB_IRQ12));
}

static void answer(ps2_device *d, uint8_t byte)
{
    if (d->count < QUEUE)
        d->queue[(d->head + d->count++) % QUEUE] = byte;
}

static void answers(ps2_device *d, const char *bytes, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        answer(d, (uint8_t)bytes[i]);
}

/* The controller's own answer goes into the output buffer past the queues. */
static void reply(vm_i8042 *k, unsigned from, uint8_t byte)
{
    k->s.data = byte;
    k->s.full = 1;
    k->s.from = (uint8_t)from;
}

static void keyboard_defaults(ps2_device *d) { d->rate = 0x2b; d->set = 2; d->scanning = 1; }
static void mouse_defaults(ps2_device *d) { d->rate = 100; d->resolution = 2; d->scale = d->remote = d->wrap = d->scanning = 0; }

static void keyboard(ps2_device *d, uint8_t value)
{
    uint8_t pending = d->pending;
    d->pending = 0;
    if (pending && value < 0xed) {
        answer(d, 0xfa);
        if (pending == 0xf0 && value == 0)
            answer(d, d->set);
        else if (pending == 0xf0 && value <= 3)
            d->set = value;
        else if (pending == 0xf3)
            d->rate = value;
        else if (pending == 0xed)
            d->leds = value;
        return;
    }
    switch (value) {
    case 0xee: answer(d, 0xee); return;                        /* echo */
    case 0xf2: answers(d, "\xfa\xab\x83", 3); return;          /* MF2 keyboard */
    case 0xed: case 0xf0: case 0xf3: answer(d, 0xfa); d->pending = value; return;
    case 0xf4: d->scanning = 1; answer(d, 0xfa); return;
    case 0xf5: keyboard_defaults(d); d->scanning = 0; answer(d, 0xfa); return;
    case 0xf6: keyboard_defaults(d); answer(d, 0xfa); return;
    case 0xf7 ... 0xfd: answer(d, 0xfa); return;               /* key types of set 3 */
    case 0xff: keyboard_defaults(d); d->head = d->count = 0; answers(d, "\xfa\xaa", 2); return;
    default: answer(d, 0xfe); return;                          /* resend */
    }
}

static void mouse(ps2_device *d, uint8_t value)
{
    uint8_t pending = d->pending;
    d->pending = 0;
    if (pending) {
        if (pending == 0xf3)
            d->rate = value;
        else
            d->resolution = value & 3;
        answer(d, 0xfa);
        return;
    }
    if (d->wrap && value != 0xff && value != 0xec) {
        answer(d, value);
        return;
    }
    switch (value) {
    case 0xe6: case 0xe7: d->scale = value & 1; answer(d, 0xfa); return;
    case 0xe8: case 0xf3: d->pending = value; answer(d, 0xfa); return;
    case 0xe9:
        answer(d, 0xfa);
        answer(d, (uint8_t)(d->remote << 6 | d->scanning << 5 | d->scale << 4));
        answer(d, d->resolution);
        answer(d, d->rate);
        return;
    case 0xea: d->remote = 0; answer(d, 0xfa); return;
    case 0xeb: answers(d, "\xfa\x08\0\0", 4); return;          /* a packet that says: nothing moved */
    case 0xec: d->wrap = 0; answer(d, 0xfa); return;
    case 0xee: d->wrap = 1; answer(d, 0xfa); return;
    case 0xf0: d->remote = 1; answer(d, 0xfa); return;
    case 0xf2: answers(d, "\xfa\0", 2); return;                /* standard PS/2 mouse */
    case 0xf4: d->scanning = 1; answer(d, 0xfa); return;
    case 0xf5: d->scanning = 0; answer(d, 0xfa); return;
    case 0xf6: mouse_defaults(d); answer(d, 0xfa); return;
    case 0xff: mouse_defaults(d); d->head = d->count = 0; answers(d, "\xfa\xaa\0", 3); return;
    default: answer(d, 0xfe); return;
    }
}

static uint8_t output_port(const vm_i8042 *k)
{
    uint8_t v = k->s.outport & (uint8_t)~(OUT_KBD_FULL | OUT_AUX_FULL);
    if (k->s.full)
        v |= k->s.from == AUX ? OUT_AUX_FULL : OUT_KBD_FULL;
    return v;
}

static void set_output_port(vm_i8042 *k, uint8_t value)
{
    k->s.outport = value | OUT_NOT_RESET;
    if (!(value & OUT_NOT_RESET))
        vm_machine_event(k->machine, VM_EXIT_RESET, 0);
}

/* A byte to port 0x64. */
static void command(vm_i8042 *k, uint8_t value)
{
    k->s.command = 0;
    k->s.status_command = STATUS_COMMAND;
    switch (value) {
    case 0x20: reply(k, KBD, k->s.cb); break;
    case 0x21 ... 0x3f: reply(k, KBD, k->s.ram[value & 31]); break;
    case 0x60 ... 0x7f: case 0xd1 ... 0xd4: k->s.command = value; break;    /* an argument follows */
    case 0xa4: reply(k, KBD, 0xf1); break;                     /* no password */
    case 0xa7: k->s.cb |= CB_AUX_OFF; break;
    case 0xa8: k->s.cb &= (uint8_t)~CB_AUX_OFF; break;
    case 0xa9: case 0xab: reply(k, KBD, 0x00); break;          /* interface tests pass */
    case 0xaa:
        k->s.cb |= CB_SYSTEM;
        k->s.outport = OUT_NOT_RESET | OUT_A20;
        reply(k, KBD, 0x55);
        break;
    case 0xad: k->s.cb |= CB_KBD_OFF; break;
    case 0xae: k->s.cb &= (uint8_t)~CB_KBD_OFF; break;
    case 0xc0: reply(k, KBD, 0x80); break;                     /* input port: keyboard not locked */
    case 0xd0: reply(k, KBD, output_port(k)); break;
    case 0xdd: k->s.outport &= (uint8_t)~OUT_A20; break;
    case 0xdf: k->s.outport |= OUT_A20; break;
    case 0xf0 ... 0xff:                                        /* pulse low the bits that are 0 */
        if (!(value & 1))
            vm_machine_event(k->machine, VM_EXIT_RESET, 0);
        break;
    default: break;
    }
}

/* A byte to port 0x60. */
static void data(vm_i8042 *k, uint8_t value)
{
    uint8_t command = k->s.command;
    k->s.command = 0;
    k->s.status_command = 0;
    switch (command) {
    case 0x60: k->s.cb = value; break;
    case 0x61 ... 0x7f: k->s.ram[command & 31] = value; break;
    case 0xd1: set_output_port(k, value); break;
    case 0xd2: reply(k, KBD, value); break;
    case 0xd3: reply(k, AUX, value); break;
    case 0xd4:
        k->s.cb &= (uint8_t)~CB_AUX_OFF;
        mouse(&k->s.dev[AUX], value);
        break;
    default:
        k->s.cb &= (uint8_t)~CB_KBD_OFF;                       /* sending to the keyboard enables its interface */
        keyboard(&k->s.dev[KBD], value);
        break;
    }
}

static uint8_t i8042_get(void *dev, unsigned reg)
{
    vm_i8042 *k = dev;
    if (reg == 0) {
        uint8_t v = k->s.data;
        k->s.full = 0;
        vm_line_set(&k->irq[KBD], false);
        vm_line_set(&k->irq[AUX], false);
        deliver(k);
        return v;
    }
    return 0xff;
}

static uint8_t status_get(void *dev, unsigned reg)
{
    vm_i8042 *k = dev;
    (void)reg;
    uint8_t v = STATUS_UNLOCKED | k->s.status_command | (k->s.cb & CB_SYSTEM ? STATUS_SYSTEM : 0);
    if (k->s.full)
        v |= STATUS_FULL | (k->s.from == AUX ? STATUS_AUX : 0);
    return v;
}

static void i8042_put(void *dev, unsigned reg, uint8_t value)
{
    vm_i8042 *k = dev;
    if (reg == 0)
        data(k, value);
    deliver(k);
}

static void status_put(void *dev, unsigned reg, uint8_t value)
{
    vm_i8042 *k = dev;
    if (reg == 0)
        command(k, value);
    deliver(k);
}

VM_DEV_BYTE_IO(i8042)
VM_DEV_BYTE_IO(status)

static void i8042_reset(void *user)
{
    vm_i8042 *k = user;
    memset(&k->s, 0, sizeof k->s);
    k->s.version = I8042_VERSION;
    k->s.cb = CB_IRQ1 | CB_SYSTEM;
    k->s.outport = OUT_NOT_RESET | OUT_A20;
    keyboard_defaults(&k->s.dev[KBD]);
    mouse_defaults(&k->s.dev[AUX]);
    deliver(k);
}

static int i8042_save(void *user, void *buffer, size_t *bytes)
{
    vm_i8042 *k = user;
    return vm_dev_save(&k->s, sizeof k->s, buffer, bytes);
}

static int i8042_restore(void *user, const void *buffer, size_t bytes)
{
    vm_i8042 *k = user;
    int status = vm_dev_load(&k->s, sizeof k->s, I8042_VERSION, buffer, bytes);
    if (status)
        return status;
    k->s.from &= 1;
    for (unsigned i = 0; i < DEVICES; i++) {
        k->s.dev[i].head %= QUEUE;
        if (k->s.dev[i].count > QUEUE)
            k->s.dev[i].count = QUEUE;
    }
    deliver(k);
    return VM_OK;
}

int vm_i8042_new(vm_machine *m, vm_line irq1, vm_line irq12, vm_i8042 **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), i8042_read, i8042_write, i8042_reset, i8042_save, i8042_restore, free };
    static const vm_io_ops status_ops = { .size = sizeof(vm_io_ops), .read = status_read, .write = status_write };
    vm_i8042 *k = calloc(1, sizeof *k);
    if (!k)
        return vm_fail(VM_E_NOMEM, "keyboard controller: out of memory");
    k->machine = m;
    k->irq[KBD] = irq1;
    k->irq[AUX] = irq12;
    i8042_reset(k);
    int status = vm_add_pio(m, 0x60, 1, &ops, k, NULL);
    if (status) {
        free(k);
        return status;
    }
    *out = k;
    return vm_add_pio(m, 0x64, 1, &status_ops, k, NULL);
}
