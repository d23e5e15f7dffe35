/* dev_io.c - 16550A, i8042, PCI configuration, fw_cfg, small ports. */
#include "rig.h"

/* ---- 16550A ---- */
typedef struct sink { char text[256]; size_t count; } sink;
static void on_text(void *user, const uint8_t *bytes, size_t count)
{
    sink *s = user;
    for (size_t i = 0; i < count && s->count < sizeof s->text - 1; i++)
        s->text[s->count++] = (char)bytes[i];
}

#define COM 0x3f8
static vm_uart *uart_new(rig *r)
{
    vm_uart *u;
    rig_new(r);
    OK(vm_uart_new(r->m, COM, rig_wire(r, 4), &u));
    outb(r, COM + 4, 0x08);                      /* OUT2 */
    return u;
}
static int give(rig *r, vm_uart *u, const char *text)
{
    vm_device_lock(r->m);
    int taken = vm_uart_input(u, (const uint8_t *)text, strlen(text));
    vm_device_unlock(r->m);
    return taken;
}

TEST(uart_output_and_thre)
{
    rig r;
    sink s = { .count = 0 };
    vm_uart *u = uart_new(&r);
    vm_uart_output(u, on_text, &s);
    CHECK_EQ(inb(&r, COM + 5), 0x60);
    CHECK_EQ(inb(&r, COM + 2), 0x01);
    outb(&r, COM + 1, 0x02);                     /* enabling it raises it: the holder is empty */
    CHECK(r.level[4]);
    CHECK_EQ(inb(&r, COM + 2), 0x02);
    CHECK(!r.level[4]);
    CHECK_EQ(inb(&r, COM + 2), 0x01);
    outb(&r, COM, 'h');
    outb(&r, COM, 'i');
    CHECK(r.level[4]);
    CHECK(!strcmp(s.text, "hi"));
    outb(&r, COM + 4, 0);                        /* OUT2 low: off the bus */
    CHECK(!r.level[4]);
    rig_free(&r);
}

TEST(uart_divisor_and_scratch)
{
    rig r;
    uart_new(&r);
    outb(&r, COM + 7, 0xa5);
    CHECK_EQ(inb(&r, COM + 7), 0xa5);
    outb(&r, COM + 3, 0x83);
    outw(&r, COM, 0x0301);
    CHECK_EQ(inb(&r, COM), 1);
    CHECK_EQ(inb(&r, COM + 1), 3);
    outb(&r, COM + 3, 0x03);
    CHECK_EQ(inb(&r, COM + 1), 0);
    rig_free(&r);
}

TEST(uart_fifo_trigger_and_timeout)
{
    rig r;
    vm_uart *u = uart_new(&r);
    outb(&r, COM + 3, 0x83);
    outb(&r, COM, 1);                            /* 115200: four characters are 347 us */
    outb(&r, COM + 1, 0);
    outb(&r, COM + 3, 0x03);
    outb(&r, COM + 2, 0x81);                     /* FIFO, trigger 8 */
    outb(&r, COM + 1, 0x01);
    CHECK_EQ(give(&r, u, "1234567"), 7);
    CHECK(!r.level[4]);
    CHECK_EQ(inb(&r, COM + 5) & 1, 1);
    pass(&r, 300000);
    CHECK(!r.level[4]);
    pass(&r, 60000);
    CHECK(r.level[4]);
    CHECK_EQ(inb(&r, COM + 2), 0xcc);            /* character timeout */
    rig_save_restore(&r, &r.m->ports, COM);
    CHECK_EQ(inb(&r, COM + 2), 0xcc);
    CHECK_EQ(inb(&r, COM), '1');
    CHECK(!r.level[4]);
    CHECK_EQ(give(&r, u, "89"), 2);
    CHECK_EQ(inb(&r, COM + 2), 0xc4);            /* trigger level */
    for (char c = '2'; c <= '9'; c++)
        CHECK_EQ(inb(&r, COM), c);
    CHECK_EQ(inb(&r, COM + 5) & 1, 0);
    CHECK_EQ(inb(&r, COM + 2), 0xc1);
    rig_free(&r);
}

TEST(uart_input_is_bounded)
{
    rig r;
    static uint8_t many[100000];
    vm_uart *u = uart_new(&r);
    for (size_t i = 0; i < sizeof many; i++)
        many[i] = (uint8_t)(i * 7);
    vm_device_lock(r.m);
    int taken = vm_uart_input(u, many, sizeof many);
    CHECK(taken >= 65536 && taken <= 65536 + 16);
    vm_uart_input(u, many + taken, 1);           /* the receiver took one: room for it */
    int refused = vm_uart_input(u, many, 1);
    CHECK_EQ(refused, VM_E_BUSY);
    CHECK_EQ(vm_uart_input(u, many, 0), 0);
    vm_device_unlock(r.m);
    outb(&r, COM + 2, 0x01);
    for (int i = 1; i < taken; i++)              /* switching the FIFO on dropped the one byte in the receiver */
        CHECK_EQ(inb(&r, COM), many[i]);
    rig_free(&r);
}

TEST(uart_loopback_and_priorities)
{
    rig r;
    sink s = { .count = 0 };
    vm_uart *u = uart_new(&r);
    vm_uart_output(u, on_text, &s);
    outb(&r, COM + 4, 0x1b);                     /* loop, OUT2, RTS, DTR */
    CHECK_EQ(inb(&r, COM + 6) & 0xf0, 0xb0);
    outb(&r, COM + 4, 0x10);
    CHECK_EQ(inb(&r, COM + 6), 0x0b);            /* all three changed */
    CHECK_EQ(inb(&r, COM + 6), 0x00);
    outb(&r, COM + 1, 0x0f);
    outb(&r, COM, 'a');
    CHECK_EQ(s.count, 0);
    outb(&r, COM, 'b');                          /* overrun */
    outb(&r, COM + 4, 0x11);
    CHECK_EQ(inb(&r, COM + 2), 0x06);
    CHECK_EQ(inb(&r, COM + 5), 0x63);
    CHECK_EQ(inb(&r, COM + 2), 0x04);
    CHECK_EQ(inb(&r, COM), 'b');
    CHECK_EQ(inb(&r, COM + 2), 0x02);
    CHECK_EQ(inb(&r, COM + 2), 0x00);            /* modem status */
    inb(&r, COM + 6);
    CHECK_EQ(inb(&r, COM + 2), 0x01);
    CHECK(!r.level[4]);                          /* nothing reached the pin */
    rig_free(&r);
}

TEST(uart_fifo_full_and_saved)
{
    rig r;
    uart_new(&r);
    outb(&r, COM + 2, 0xc1);
    outb(&r, COM + 4, 0x18);
    for (unsigned i = 0; i < 40; i++)
        outb(&r, COM, (uint8_t)i);
    rig_save_restore(&r, &r.m->ports, COM);
    CHECK_EQ(inb(&r, COM + 5) & 2, 2);
    for (unsigned i = 0; i < 16; i++)
        CHECK_EQ(inb(&r, COM), i);
    CHECK_EQ(inb(&r, COM + 5) & 1, 0);
    inb(&r, COM);
    rig_free(&r);
}

/* ---- i8042 ---- */
static void kbd_new(rig *r)
{
    vm_i8042 *k;
    rig_new(r);
    OK(vm_i8042_new(r->m, rig_wire(r, 1), rig_wire(r, 12), &k));
}

TEST(i8042_controller)
{
    rig r;
    kbd_new(&r);
    CHECK_EQ(inb(&r, 0x64) & 3, 0);
    outb(&r, 0x64, 0xaa);
    CHECK_EQ(inb(&r, 0x64) & 0x25, 0x05);
    CHECK_EQ(inb(&r, 0x60), 0x55);
    outb(&r, 0x64, 0xab);
    CHECK_EQ(inb(&r, 0x60), 0);
    outb(&r, 0x64, 0xa9);
    CHECK_EQ(inb(&r, 0x60), 0);
    outb(&r, 0x64, 0x60);
    outb(&r, 0x60, 0x47);
    outb(&r, 0x64, 0x20);
    CHECK_EQ(inb(&r, 0x60), 0x47);
    outb(&r, 0x64, 0xd3);                        /* loop through the mouse's side */
    outb(&r, 0x60, 0xa5);
    CHECK_EQ(inb(&r, 0x64) & 0x21, 0x21);
    CHECK(r.level[12]);
    CHECK_EQ(inb(&r, 0x60), 0xa5);
    CHECK(!r.level[12]);
    outb(&r, 0x64, 0xd0);
    CHECK_EQ(inb(&r, 0x60) & 3, 3);
    outb(&r, 0x64, 0xfe);
    CHECK_EQ(r.m->event, VM_EXIT_RESET);
    rig_free(&r);
}

TEST(i8042_keyboard_and_mouse)
{
    rig r;
    kbd_new(&r);
    outb(&r, 0x60, 0xff);
    CHECK(r.level[1]);
    CHECK_EQ(inb(&r, 0x60), 0xfa);
    CHECK_EQ(inb(&r, 0x60), 0xaa);
    CHECK(!r.level[1]);
    outb(&r, 0x60, 0xf2);
    CHECK_EQ(inb(&r, 0x60), 0xfa);
    CHECK_EQ(inb(&r, 0x60), 0xab);
    CHECK_EQ(inb(&r, 0x60), 0x83);
    outb(&r, 0x60, 0xed);
    CHECK_EQ(inb(&r, 0x60), 0xfa);
    outb(&r, 0x60, 0x07);
    CHECK_EQ(inb(&r, 0x60), 0xfa);
    outb(&r, 0x64, 0xd4);
    outb(&r, 0x60, 0xff);
    CHECK_EQ(inb(&r, 0x64) & 0x20, 0x20);
    CHECK_EQ(inb(&r, 0x60), 0xfa);
    CHECK_EQ(inb(&r, 0x60), 0xaa);
    CHECK_EQ(inb(&r, 0x60), 0x00);
    outb(&r, 0x64, 0xad);                        /* keyboard off: it keeps its answer */
    outb(&r, 0x64, 0xd4);
    outb(&r, 0x60, 0xf2);
    CHECK_EQ(inb(&r, 0x60), 0xfa);
    CHECK_EQ(inb(&r, 0x60), 0x00);
    for (unsigned i = 0; i < 100; i++) {         /* a queue that is never read */
        outb(&r, 0x64, 0xd4);
        outb(&r, 0x60, 0xeb);
    }
    rig_save_restore(&r, &r.m->ports, 0x60);
    unsigned left = 0;
    while (inb(&r, 0x64) & 1) {
        inb(&r, 0x60);
        left++;
    }
    CHECK_EQ(left, 17);
    rig_free(&r);
}

/* ---- PCI ---- */
static uint8_t reset_seen;
static void on_reset(void *target, uint8_t v)
{
    (void)target;
    reset_seen = v;
}
static void config_written(vm_pci_function *f, unsigned offset, unsigned width) { f->config[0xff] = (uint8_t)(offset + width); }

TEST(pci_configuration)
{
    rig r;
    vm_pci *pci;
    vm_pci_function f = { .written = config_written };
    rig_new(&r);
    OK(vm_pci_new(r.m, &pci));
    vm_pci_reset_control(pci, on_reset, NULL, NULL);
    outl(&r, 0xcf8, 0x80000000);
    CHECK_EQ(inl(&r, 0xcf8), 0x80000000);
    CHECK_EQ(inl(&r, 0xcfc), 0x12378086);
    CHECK_EQ(inw(&r, 0xcfe), 0x1237);
    CHECK_EQ(inb(&r, 0xcfd), 0x80);
    outl(&r, 0xcfc, 0);
    CHECK_EQ(inl(&r, 0xcfc), 0x12378086);        /* read-only */
    outb(&r, 0xcf9, 0x06);
    CHECK_EQ(reset_seen, 6);
    CHECK_EQ(inl(&r, 0xcf8), 0x80000000);
    outl(&r, 0xcf8, 0x00000000);                 /* not enabled */
    CHECK_EQ(inl(&r, 0xcfc), 0xffffffff);
    outl(&r, 0xcf8, 0x80000b40);                 /* 00:01.3, where the ports of power management are */
    CHECK_EQ(inl(&r, 0xcfc), 0x601);
    outl(&r, 0xcf8, 0x80001000);                 /* nobody */
    CHECK_EQ(inl(&r, 0xcfc), 0xffffffff);
    outl(&r, 0xcf8, 0x80010000);                 /* another bus */
    CHECK_EQ(inl(&r, 0xcfc), 0xffffffff);
    f.config[0] = 0xf4;
    f.mask[0x10] = 0xf0;
    OK(vm_pci_add(pci, 2 << 3, &f));
    REFUSED(vm_pci_add(pci, 2 << 3, &f), VM_E_EXISTS);
    outl(&r, 0xcf8, 0x80001010);
    outb(&r, 0xcfc, 0xff);
    CHECK_EQ(inl(&r, 0xcfc), 0xf0);
    CHECK_EQ(f.config[0xff], 0x11);
    vm_pci_remove(pci, 2 << 3);
    CHECK_EQ(inl(&r, 0xcfc), 0xffffffff);
    outl(&r, 0xcf8, 0x800000fc);
    for (unsigned w = 1; w <= 4; w *= 2)
        for (unsigned o = 0; o + w <= 4; o += w)
            rig_access(&r, &r.m->ports, 0, 0xcfc + o, w, true, ~0u);
    rig_free(&r);
}

/* ---- fw_cfg ---- */
static vm_fwcfg *fwcfg_new(rig *r)
{
    vm_fwcfg *f;
    rig_new(r);
    OK(vm_map_ram(r->m, 0, 0x10000, VM_PROT_RW, NULL));
    OK(vm_fwcfg_new(r->m, &f));
    return f;
}

static uint32_t dma(rig *r, uint32_t control, uint32_t length, uint64_t address)
{
    uint32_t d[4] = { __builtin_bswap32(control), __builtin_bswap32(length), __builtin_bswap32((uint32_t)(address >> 32)),
                      __builtin_bswap32((uint32_t)address) };
    OK(vm_write(r->m, 0x100, d, sizeof d));
    outl(r, 0x514, 0);
    outl(r, 0x518, __builtin_bswap32(0x100));
    OK(vm_read(r->m, 0x100, d, 4));
    return __builtin_bswap32(d[0]);
}

TEST(fwcfg_port)
{
    rig r;
    vm_fwcfg *f = fwcfg_new(&r);
    outw(&r, 0x510, 0);
    CHECK_EQ(inb(&r, 0x511), 'Q');
    CHECK_EQ(inb(&r, 0x511), 'E');
    CHECK_EQ(inb(&r, 0x511), 'M');
    CHECK_EQ(inb(&r, 0x511), 'U');
    CHECK_EQ(inb(&r, 0x511), 0);
    CHECK_EQ(inl(&r, 0x514), 0x554d4551);        /* "QEMU", most significant first */
    CHECK_EQ(inl(&r, 0x518), 0x47464320);
    outw(&r, 0x510, 1);
    CHECK_EQ(inb(&r, 0x511), 3);
    OK(vm_fwcfg_file(f, "etc/one", "1", 1));
    OK(vm_fwcfg_file(f, "etc/two", "22", 2));
    OK(vm_fwcfg_file(f, "etc/one", "111", 3));
    outw(&r, 0x510, 0x19);
    uint8_t dir[4 + 128];
    for (unsigned i = 0; i < sizeof dir; i++)
        dir[i] = inb(&r, 0x511);
    CHECK(!memcmp(dir, "\0\0\0\2\0\0\0\3\0\x20\0\0etc/one", 20));
    CHECK(!memcmp(dir + 68, "\0\0\0\2\0\x21\0\0etc/two", 16));
    outw(&r, 0x510, 0x21);
    CHECK_EQ(inb(&r, 0x511), '2');
    outw(&r, 0x510, 0x7777);
    CHECK_EQ(inb(&r, 0x511), 0);
    rig_free(&r);
}

TEST(fwcfg_dma)
{
    rig r;
    char got[8] = "xxxxxxx";
    vm_fwcfg *f = fwcfg_new(&r);
    OK(vm_fwcfg_file(f, "etc/abc", "abcdef", 6));
    CHECK_EQ(dma(&r, 0x20u << 16 | 8 | 2, 3, 0x2000), 0);
    OK(vm_read(r.m, 0x2000, got, 3));
    CHECK(!memcmp(got, "abc", 3));
    CHECK_EQ(dma(&r, 4, 1, 0), 0);               /* skip */
    CHECK_EQ(dma(&r, 2, 4, 0x2000), 0);          /* two bytes left, then zeros */
    OK(vm_read(r.m, 0x2000, got, 4));
    CHECK(!memcmp(got, "ef\0\0", 4));
    CHECK_EQ(dma(&r, 16, 1, 0x2000), 1);         /* nothing is writable */
    rig_free(&r);
}

TEST(fwcfg_dma_hostile)
{
    rig r;
    vm_fwcfg *f = fwcfg_new(&r);
    OK(vm_fwcfg_file(f, "etc/abc", "abcdef", 6));
    CHECK_EQ(dma(&r, 0x20u << 16 | 8 | 2, 6, 0x10000), 1);              /* no RAM there */
    CHECK_EQ(dma(&r, 0x20u << 16 | 8 | 2, 0xffffffff, 0x2000), 1);      /* far too long */
    CHECK_EQ(dma(&r, 0x20u << 16 | 8 | 2, 6, UINT64_MAX - 2), 1);
    CHECK_EQ(dma(&r, 0x20u << 16 | 8 | 2, 6, 0x510), 0);                /* RAM at 0x510: no way to the ports */
    CHECK_EQ(dma(&r, 0xffffu << 16 | 8 | 2, 16, 0x2000), 0);
    CHECK_EQ(dma(&r, 4, 0xffffffff, 0), 0);
    CHECK_EQ(dma(&r, 4, 0xffffffff, 0), 0);
    CHECK_EQ(dma(&r, 2, 6, 0x2000), 0);
    outl(&r, 0x514, 0xffffffff);                 /* descriptor nowhere */
    outl(&r, 0x518, 0xffffffff);
    char long_name[80];
    memset(long_name, 'x', sizeof long_name - 1);
    long_name[79] = 0;
    REFUSED(vm_fwcfg_file(f, long_name, "", 0), VM_E_INVALID);
    REFUSED(vm_fwcfg_item(f, 0x4000 | 0x3fff, "", 0), VM_E_INVALID);
    char name[8] = "f00";
    int status = VM_OK;
    for (unsigned i = 0; i < 60 && !status; i++) {
        name[1] = (char)('0' + i / 10);
        name[2] = (char)('0' + i % 10);
        status = vm_fwcfg_file(f, name, name, 3);
    }
    CHECK_EQ(status, VM_E_NOMEM);
    rig_free(&r);
}

/* ---- small ports ---- */
static void on_imcr(void *target, bool symmetric) { *(bool *)target = symmetric; }

TEST(misc_ports)
{
    rig r;
    vm_misc *d;
    bool symmetric = false;
    sink s = { .count = 0 };
    rig_new(&r);
    OK(vm_misc_new(r.m, on_imcr, rig_wire(&r, 13), &symmetric, &d));
    CHECK(symmetric);
    outb(&r, 0x22, 0x70);
    outb(&r, 0x23, 0);
    CHECK(!symmetric);
    outb(&r, 0x80, 0x42);
    CHECK_EQ(inb(&r, 0x80), 0x42);
    CHECK_EQ(inb(&r, 0xe9), 0xe9);
    CHECK_EQ(inb(&r, 0x402), 0xe9);
    vm_misc_debugcon(d, on_text, &s);
    outb(&r, 0xe9, 'o');
    outb(&r, 0x402, 'k');
    CHECK(!strcmp(s.text, "ok"));
    vm_misc_ferr(d);
    CHECK(r.level[13]);
    outb(&r, 0xf0, 0);
    CHECK(!r.level[13]);
    outl(&r, 0xf4, 0x12345);
    CHECK_EQ(r.m->event, VM_EXIT_GUEST_EXIT);
    CHECK_EQ(r.m->event_code, 0x12345);
    CHECK_EQ(inb(&r, 0x92), 2);
    outb(&r, 0x92, 3);
    CHECK_EQ(r.m->event, VM_EXIT_RESET);
    vm_misc_reset_control(d, 0x02);
    unsigned events = r.m->event_seq;
    vm_misc_reset_control(d, 0x06);
    CHECK_EQ(r.m->event_seq, events + 1);
    vm_misc_reset_control(d, 0x06);
    CHECK_EQ(r.m->event_seq, events + 1);
    rig_free(&r);
}
