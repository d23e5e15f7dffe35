/* small.c - hand-written guests that check what a boot loader owes them, by the specification each follows: Multiboot 1 (ELF
 * and address fields), PVH, and a plain ELF with Linux' boot parameters. Complaints go to the first serial port; the exit
 * code is 42 when all is right. The script `small` builds and runs them with the modules and command line named here. */
#include <stdint.h>

#define CMDLINE "alpha beta=1"
enum { RAM_BYTES = 64 << 20, GOOD = 42, BAD = 1 };

static void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static void print(const char *text) { while (*text) out8(0x3f8, (uint8_t)*text++); }
static void leave(int code) { for (;;) out8(0xf4, (uint8_t)code); }
static void check(int good, const char *what)
{
    if (good) return;
    print("bad: ");
    print(what);
    print("\r\n");
    leave(BAD);
}

static unsigned length(const char *text) { unsigned n = 0; while (text[n]) n++; return n; }
static int ends_with(const char *text, const char *end)
{
    unsigned a = length(text), b = length(end);
    for (unsigned i = 0; i <= b; i++) if (b > a || text[a - i] != end[b - i]) return 0;
    return 1;
}
static int equal(const void *a, const void *b, unsigned n)
{
    const char *x = a, *y = b;
    for (unsigned i = 0; i < n; i++) if (x[i] != y[i]) return 0;
    return 1;
}

static uint8_t big_bss[100000];
static volatile uint32_t initialised = 0x12345678;

/* What guests look up, or call, when they go back to real mode: the BIOS data area and the interrupt vectors. */
static void check_firmware(void)
{
    volatile uint16_t *data = (uint16_t *)0x400;
    const volatile uint32_t *vectors = (uint32_t *)0;
    __asm__ volatile("" : "+r"(data), "+r"(vectors));
    check(data[0] == 0x3f8, "first serial port");
    check((data[7] << 4) == 639 << 10 && *(uint16_t *)((uintptr_t)data + 0x13) == 639, "base memory and extended BIOS data");
    for (unsigned v = 0; v < 256; v++) check(vectors[v] >> 16 >= 0xe000, "interrupt vectors");
}

static void check_image(void)
{
    check_firmware();
    check(initialised == 0x12345678, "initialised data");
    for (unsigned i = 0; i < sizeof big_bss; i++) check(big_bss[i] == 0, "bss is not zero");
}

/* Usable RAM in a map of entries with base, bytes, type at fixed offsets. */
static void check_map(uintptr_t entry, unsigned count, unsigned stride)
{
    uint64_t usable = 0;
    int has_low = 0, has_high = 0;
    check(count >= 3 && count < 64, "entries of the memory map");
    for (unsigned i = 0; i < count; i++, entry += stride) {
        uint64_t base = *(uint64_t *)entry, bytes = *(uint64_t *)(entry + 8);
        uint32_t type = *(uint32_t *)(entry + 16);
        check(type >= 1 && type <= 5, "type in the memory map");
        if (type != 1) continue;
        usable += bytes;
        has_low |= base == 0 && bytes >= 0x90000;
        has_high |= base == 0x100000;
        check(base + bytes <= RAM_BYTES, "RAM beyond its end");
        check(base >= 0x100000 || base + bytes <= 0xa0000, "RAM in the VGA hole");
    }
    check(has_low && has_high, "low and high RAM");
    check(usable > RAM_BYTES - 0x200000, "sum of RAM");
}

#if !defined(PLAIN64)
static uint32_t cr0(void) { uint32_t v; __asm__ volatile("mov %%cr0, %0" : "=r"(v)); return v; }
static void check_protected_mode(void)
{
    uint32_t flags;
    __asm__ volatile("pushf; pop %0" : "=r"(flags));
    check((cr0() & 0x80000001u) == 1, "CR0: protection on, paging off");
    check(!(flags & 0x20200), "EFLAGS: IF and VM clear");
}
#endif

#if defined(MULTIBOOT) || defined(KLUDGE)
void guest_main(uint32_t magic, uint32_t info, uint32_t unused);
void guest_main(uint32_t magic, uint32_t info, uint32_t unused)
{
    const uint32_t *i = (const uint32_t *)info;
    (void)unused;
    check_protected_mode();
    check(magic == 0x2badb002, "EAX");
    check_image();
    check((i[0] & 0x24d) == 0x24d, "flags: memory, command line, modules, map, loader name");
    check(i[1] >= 600 && i[1] <= 640, "mem_lower");
    check(i[2] <= (RAM_BYTES >> 10) - 1024 && i[2] > (RAM_BYTES >> 10) - 3072, "mem_upper");
    check(ends_with((const char *)i[4], " " CMDLINE), "command line");
    check(i[5] == 2, "mods_count");
    const uint32_t *m = (const uint32_t *)i[6];
    check(m[1] - m[0] == 13 && equal((const char *)m[0], "first module\n", 13), "first module");
    check(ends_with((const char *)m[2], "/one with args"), "first module's string");
    check(m[5] - m[4] == 14 && equal((const char *)m[4], "second module\n", 14), "second module");
    check(ends_with((const char *)m[6], "/two"), "second module's string");
    check(!(m[0] & 4095) && !(m[4] & 4095), "modules on pages");
    check(*(const uint32_t *)i[12] == 20, "size of a map entry");
    check_map(i[12] + 4, i[11] / 24, 24);
    check(length((const char *)i[16]) > 0, "loader name");
    print("multiboot ok\r\n");
    leave(GOOD);
}
#elif defined(PVH)
void guest_main(uint32_t eax, uint32_t info, uint32_t esi);
void guest_main(uint32_t eax, uint32_t info, uint32_t esi)
{
    const uint32_t *i = (const uint32_t *)info;
    (void)eax, (void)esi;
    check_protected_mode();
    check_image();
    check(i[0] == 0x336ec578, "magic");
    check(i[1] == 1, "version");
    check(i[3] == 2, "number of modules");
    const uint64_t *m = (const uint64_t *)i[4];
    check(m[1] == 13 && equal((const char *)(uint32_t)m[0], "first module\n", 13), "first module");
    check(equal((const char *)(uint32_t)m[2], "with args", 10), "first module's command line");
    check(m[5] == 14 && equal((const char *)(uint32_t)m[4], "second module\n", 14), "second module");
    check(equal((const char *)i[6], CMDLINE, sizeof CMDLINE), "command line");
    check(equal((const char *)i[8], "RSD PTR ", 8), "RSDP");
    check_map(i[10], i[12], 24);
    print("pvh ok\r\n");
    leave(GOOD);
}
#else
static void check_params(uintptr_t page)
{
    check_image();
    check(equal((const char *)page + 0x202, "HdrS", 4), "HdrS");
    check(*(uint8_t *)(page + 0x210) != 0, "type_of_loader");
    check(equal((const char *)(uintptr_t) * (uint32_t *)(page + 0x228), CMDLINE, sizeof CMDLINE), "command line");
    check(equal((const char *)(uintptr_t) * (uint64_t *)(page + 0x70), "RSD PTR ", 8), "RSDP");
    check(*(uint32_t *)(page + 0x21c) == 13, "ramdisk_size");
    check(equal((const char *)(uintptr_t) * (uint32_t *)(page + 0x218), "first module\n", 13), "ramdisk");
    check_map(page + 0x2d0, *(uint8_t *)(page + 0x1e8), 20);
}
#ifdef PLAIN64
void guest_main(uint64_t params);
void guest_main(uint64_t params)
{
    check_params(params);
    /* All of the first 4 GiB is mapped: the local APIC answers. */
    check((*(volatile uint32_t *)0xfee00030 & 0xf0) == 0x10, "local APIC version");
    print("elf64 ok\r\n");
    leave(GOOD);
}
#else
void guest_main(uint32_t eax, uint32_t ebx, uint32_t params);
void guest_main(uint32_t eax, uint32_t ebx, uint32_t params)
{
    (void)eax, (void)ebx;
    check_protected_mode();
    check_params(params);
    print("elf32 ok\r\n");
    leave(GOOD);
}
#endif
#endif
