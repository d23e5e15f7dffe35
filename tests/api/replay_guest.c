/* replay_guest.c - the guest of replay.c: 32-bit code at 0x10000 with an interrupt-driven life. It computes, reads clocks and
 * random numbers, fills memory with long repeats, sleeps, talks to the test's device, echoes its console, and writes down
 * when each interrupt came; so its memory tells of every instruction count that went another way. */
typedef unsigned char u8;
typedef unsigned u32;
typedef unsigned long long u64;
struct frame;
#define HANDLER __attribute__((interrupt, target("general-regs-only"))) static void

/* Seen by the test, at 0x20000. */
struct shared { u32 rounds, done, ticks, received, lines, count; u64 hash; u32 log[16384]; };
#define shared ((volatile struct shared *)0x20000)
#define scratch ((volatile u8 *)0x40000)

static inline void out8(u32 port, u8 v) { __asm__ volatile("outb %0, %w1" : : "a"(v), "Nd"(port)); }
static inline u8 in8(u32 port) { u8 v; __asm__ volatile("inb %w1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u32 port) { u32 v; __asm__ volatile("inl %w1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void out32(u32 port, u32 v) { __asm__ volatile("outl %0, %w1" : : "a"(v), "Nd"(port)); }
static inline u32 tsc(void) { u32 lo; __asm__ volatile("rdtsc" : "=a"(lo) : : "edx"); return lo; }

static void note(u32 what)
{
    u32 n = shared->count;
    shared->log[n % 16384] = what ^ tsc();
    shared->count = n + 1;
    shared->hash = (shared->hash ^ what ^ tsc()) * 1099511628211u;
}

HANDLER tick(struct frame *f) { (void)f; shared->ticks++; note(0x1000000); out8(0x20, 0x20); }
HANDLER serial(struct frame *f)
{
    (void)f;
    in8(0x3fa);
    while (in8(0x3fd) & 1) {
        u8 c = in8(0x3f8);
        note(0x2000000 | c);
        shared->received++;
        out8(0x3f8, c);
    }
    out8(0x20, 0x20);
}
HANDLER line(struct frame *f) { (void)f; shared->lines++; note(0x3000000 | in8(0x504)); out8(0x20, 0x20); }
HANDLER message(struct frame *f) { (void)f; note(0x4000000); *(volatile u32 *)0xfee000b0 = 0; }
HANDLER nothing(struct frame *f) { (void)f; note(0x5000000); out8(0x20, 0x20); }

static struct { u32 low, high; } idt[256];
static struct __attribute__((packed)) { unsigned short limit; u32 base; } idtr;

static const u64 gdt[3] = { 0, 0x00cf9a000000ffff, 0x00cf92000000ffff };
static struct __attribute__((packed)) { unsigned short limit; u32 base; } gdtr;

static void gate(u32 vector, void (*fn)(struct frame *))
{
    idt[vector].low = ((u32)fn & 0xffff) | 8 << 16;
    idt[vector].high = ((u32)fn & 0xffff0000) | 0x8e00;
}

static void set_up(void)
{
    gdtr.limit = sizeof gdt - 1;
    gdtr.base = (u32)gdt;
    __asm__ volatile("lgdt %0; ljmp $8, $1f; 1: mov $16, %%eax; mov %%eax, %%ds; mov %%eax, %%es; mov %%eax, %%ss"
                     : : "m"(gdtr) : "eax", "memory");
    for (u32 i = 32; i < 256; i++)
        gate(i, nothing);
    gate(0x20, tick);
    gate(0x24, serial);
    gate(0x25, line);
    gate(0x60, message);
    idtr.limit = sizeof idt - 1;
    idtr.base = (u32)idt;
    __asm__ volatile("lidt %0" : : "m"(idtr));
    out8(0x20, 0x11), out8(0x21, 0x20), out8(0x21, 4), out8(0x21, 1);
    out8(0xa0, 0x11), out8(0xa1, 0x28), out8(0xa1, 2), out8(0xa1, 1);
    out8(0x21, 0xff & ~(1 | 1 << 4 | 1 << 5)), out8(0xa1, 0xff);
    out8(0x43, 0x34), out8(0x40, 149), out8(0x40, 0);            /* every 125 us */
    out8(0x3f9, 1), out8(0x3fc, 8);                              /* receiver interrupts */
    *(volatile u32 *)0xfee000f0 = 0x1ff;                         /* the local APIC takes messages; LINT0 stays the PIC's */
    *(volatile u32 *)0xfee00350 = 0x700;
    __asm__ volatile("sti");
}

__attribute__((section(".table"), noreturn, used)) void start(void)
{
    u32 x = 12345;
    set_up();
    for (u32 round = 0; round < shared->rounds; round++) {
        for (u32 i = 0; i < 40 + x % 60; i++)
            x = x * 1664525 + 1013904223;
        u32 bytes = x >> 16, to = 0x40000;
        if (round % 8 == 0) {                                    /* far longer than any backend does in one go */
            u32 n = 0x40000;
            __asm__ volatile("rep stosb" : "+c"(n), "+D"(to) : "a"(x) : "memory");
        } else {
            bytes %= 500;
            __asm__ volatile("rep stosb" : "+c"(bytes), "+D"(to) : "a"(x) : "memory");
        }
        shared->hash = (shared->hash ^ x ^ tsc()) * 1099511628211u;
        if (round % 16 == 3) {
            u32 r;
            __asm__ volatile("rdrand %0" : "=r"(r));
            shared->hash ^= r;
        }
        if (round % 32 == 5)
            shared->hash ^= in32(0x500);                         /* the test's device */
        if (round % 32 == 7)
            out32(0x500, x);
        if (round % 64 == 9)
            shared->hash += in8(0x508);                          /* nobody there: an exit */
        if (round % 64 == 11)
            __asm__ volatile("cli; nop; sti; nop; cli; sti");
        if (round % 128 == 20)
            __asm__ volatile("hlt");
        if (round % 256 == 30)
            __asm__ volatile("int $0x61");
    }
    shared->done = 1;
    for (;;)
        __asm__ volatile("cli; hlt");
}
