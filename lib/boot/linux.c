/* linux.c - kernels by the x86 Linux boot protocol (Documentation/arch/x86/boot.rst): the 64-bit entry where the kernel has
 * one, the 32-bit entry otherwise, and the 16-bit entry, with real-mode set-up code and firmware services, for old kernels and
 * when asked for. */
#include "boot/boot.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* The set-up header, by offset in the file and in the zero page. */
enum { H_SETUP_SECTS = 0x1f1, H_SYSSIZE = 0x1f4, H_VID_MODE = 0x1fa, H_BOOT_FLAG = 0x1fe, H_JUMP = 0x200, H_MAGIC = 0x202,
       H_VERSION = 0x206, H_LOADER = 0x210, H_LOADFLAGS = 0x211, H_CODE32 = 0x214, H_RAMDISK = 0x218, H_RAMDISK_SIZE = 0x21c,
       H_HEAP_END = 0x224, H_CMDLINE = 0x228, H_INITRD_MAX = 0x22c, H_ALIGNMENT = 0x230, H_RELOCATABLE = 0x234,
       H_XLOADFLAGS = 0x236, H_CMDLINE_SIZE = 0x238, H_SETUP_DATA = 0x250, H_PREF_ADDRESS = 0x258, H_INIT_SIZE = 0x260 };
/* Zero page fields outside of it. */
enum { Z_EXT_MEM_K = 0x002, Z_ACPI_RSDP = 0x070, Z_EXT_RAMDISK = 0x0c0, Z_EXT_RAMDISK_SIZE = 0x0c4, Z_EXT_CMDLINE = 0x0c8,
       Z_ALT_MEM_K = 0x1e0, Z_E820_COUNT = 0x1e8, Z_E820 = 0x2d0, Z_E820_MAX = 128 };
#define MAGIC_HDRS 0x53726448u
#define LOADED_HIGH 0x01u
#define CAN_USE_HEAP 0x80u
#define XLF_KERNEL_64 0x01u
#define LOADER_ID 0xffu                            /* a loader without an assigned number */
#define SETUP_RNG_SEED 9u

typedef struct linux_image {
    const vm_image *image;
    uint16_t version, xloadflags;
    uint8_t loadflags;
    uint32_t setup_bytes;                          /* boot sector and set-up code: where the kernel proper starts */
    uint32_t code32, alignment, initrd_max, cmdline_max, init_size;
    uint64_t pref_address;
    bool is_relocatable;
    uint64_t payload_bytes;
    uint64_t load;                                 /* where the kernel proper goes */
} linux_image;

static void put16(uint8_t *page, unsigned offset, uint16_t value) { memcpy(page + offset, &value, 2); }
static void put32(uint8_t *page, unsigned offset, uint32_t value) { memcpy(page + offset, &value, 4); }
static void put64(uint8_t *page, unsigned offset, uint64_t value) { memcpy(page + offset, &value, 8); }

bool vm_linux_recognise(const vm_image *image)
{
    uint32_t magic;
    uint16_t flag;
    return vm_image_u32(image, H_MAGIC, &magic) && magic == MAGIC_HDRS && vm_image_u16(image, H_BOOT_FLAG, &flag) && flag == 0xaa55;
}

/* Fields that later versions added get the value the protocol gives older kernels. */
static void parse_newer(linux_image *k)
{
    const vm_image *i = k->image;
    uint8_t byte;
    k->initrd_max = 0x37ffffff;
    k->cmdline_max = 255;
    k->alignment = 0x100000;
    k->pref_address = 0x100000;
    if (k->version >= 0x203) vm_image_u32(i, H_INITRD_MAX, &k->initrd_max);
    if (k->version >= 0x205) {
        vm_image_u32(i, H_ALIGNMENT, &k->alignment);
        k->is_relocatable = vm_image_u8(i, H_RELOCATABLE, &byte) && byte;
    }
    if (k->version >= 0x206) vm_image_u32(i, H_CMDLINE_SIZE, &k->cmdline_max);
    if (k->version >= 0x20a) {
        vm_image_u64(i, H_PREF_ADDRESS, &k->pref_address);
        vm_image_u32(i, H_INIT_SIZE, &k->init_size);
    }
    if (k->version >= 0x20c) vm_image_u16(i, H_XLOADFLAGS, &k->xloadflags);
}

static int parse(linux_image *k, const vm_image *image)
{
    memset(k, 0, sizeof *k);
    k->image = image;
    uint8_t sectors = 0;
    uint32_t syssize = 0;
    if (!vm_linux_recognise(image)) return vm_fail(VM_E_FORMAT, "%s: no Linux set-up header", image->path);
    if (!vm_image_u16(image, H_VERSION, &k->version) || !vm_image_u8(image, H_LOADFLAGS, &k->loadflags)
        || !vm_image_u8(image, H_SETUP_SECTS, &sectors) || !vm_image_u32(image, H_SYSSIZE, &syssize)
        || !vm_image_u32(image, H_CODE32, &k->code32) || !vm_image_has(image, 0, 0x268))
        return vm_fail(VM_E_FORMAT, "%s: Linux set-up header cut short at %llu bytes", image->path, (unsigned long long)image->bytes);
    if (k->version < 0x200 || k->version > 0x2ff)
        return vm_fail(VM_E_FORMAT, "%s: boot protocol version %#x", image->path, k->version);
    if (k->version < 0x204) syssize &= 0xffff;     /* the field was 16 bits wide */
    k->setup_bytes = ((sectors ? sectors : 4u) + 1) * 512;
    if (image->bytes <= k->setup_bytes)
        return vm_fail(VM_E_FORMAT, "%s: %llu bytes, but %u bytes of set-up code announced (setup_sects %u)", image->path,
                       (unsigned long long)image->bytes, k->setup_bytes, sectors);
    k->payload_bytes = image->bytes - k->setup_bytes;
    if (k->version >= 0x204 && syssize && k->payload_bytes < (uint64_t)syssize * 16 - 15)
        return vm_fail(VM_E_FORMAT, "%s: truncated: %llu bytes of kernel, header says %llu (syssize %#x)", image->path,
                       (unsigned long long)k->payload_bytes, (unsigned long long)syssize * 16, syssize);
    parse_newer(k);
    if (k->is_relocatable && (k->alignment == 0 || (k->alignment & (k->alignment - 1))))
        return vm_fail(VM_E_FORMAT, "%s: kernel_alignment %#x is not a power of two", image->path, k->alignment);
    return VM_OK;
}

/* ---- the parts in memory ---- */

static void e820_into(const vm_placer *placer, uint8_t params[4096])
{
    unsigned count = placer->map_count < Z_E820_MAX ? placer->map_count : Z_E820_MAX;
    params[Z_E820_COUNT] = (uint8_t)count;
    for (unsigned i = 0; i < count; i++) {
        const vm_pc_e820_entry *e = &placer->map[i];
        put64(params, Z_E820 + 20 * i, e->base);
        put64(params, Z_E820 + 20 * i + 8, e->bytes);
        put32(params, Z_E820 + 20 * i + 16, e->type);
    }
    uint64_t above = vm_pc_low_end(placer->machine);
    above = above > 0x100000 ? (above - 0x100000) >> 10 : 0;
    put16(params, Z_EXT_MEM_K, above > 0xfc00 ? 0xfc00 : (uint16_t)above);
    put32(params, Z_ALT_MEM_K, (uint32_t)above);
}

/* The kernel proper: at its preferred address or the next aligned one that is free. It needs init_size bytes there while it
 * decompresses itself. */
static int place_kernel(linux_image *k, vm_placer *placer)
{
    uint64_t room = k->init_size > k->payload_bytes ? k->init_size : k->payload_bytes;
    uint64_t at = k->is_relocatable || k->version >= 0x20a ? k->pref_address : 0x100000;
    int status = vm_place_at(placer, at, room, true, "Linux kernel");
    if (status != VM_OK && k->is_relocatable)
        status = vm_place_low(placer, 0x100000, VM_PC_HIGH, room, k->alignment, "Linux kernel", &at);
    if (status != VM_OK) return status;
    k->load = at;
    return vm_boot_copy(placer->machine, at, k->image->data + k->setup_bytes, k->payload_bytes, "Linux kernel");
}

/* Archives one after another, each padded to 4 bytes: the kernel unpacks them in turn. */
static int place_initrd(const linux_image *k, vm_placer *placer, const vm_modules *initrd, uint64_t *gpa, uint64_t *bytes)
{
    *gpa = *bytes = 0;
    if (!initrd->count) return VM_OK;
    *bytes = vm_modules_bytes(initrd, 4);
    uint64_t end = (uint64_t)k->initrd_max + 1;
    int status = vm_place_high(placer, 0x100000, end, *bytes, 4096, "initrd", gpa);
    uint64_t at = *gpa;
    for (unsigned i = 0; i < initrd->count && status == VM_OK; i++) {
        status = vm_boot_copy(placer->machine, at, initrd->image[i].data, initrd->image[i].bytes, "initrd");
        at += (initrd->image[i].bytes + 3) & ~UINT64_C(3);
    }
    return status;
}

static int check_cmdline(const linux_image *k, const char *cmdline)
{
    size_t length = strlen(cmdline);
    uint32_t max = k->cmdline_max < 0x10000 ? k->cmdline_max : 0xffff;
    if (length <= max) return VM_OK;
    return vm_fail(VM_E_INVALID, "%s: command line of %zu characters, the kernel takes %u", k->image->path, length, max);
}

/* A setup_data node: random bytes to seed the guest's generator. */
static int place_seed(vm_placer *placer, uint64_t *gpa)
{
    struct { uint64_t next; uint32_t type, bytes; uint8_t seed[32]; } node = {0, SETUP_RNG_SEED, 32, {0}};
    if (getrandom(node.seed, sizeof node.seed, GRND_NONBLOCK) != sizeof node.seed) { *gpa = 0; return VM_OK; }
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, sizeof node, 16, "setup_data", gpa);
    return status == VM_OK ? vm_boot_copy(placer->machine, *gpa, &node, sizeof node, "setup_data") : status;
}

int vm_linux_params(vm_placer *placer, uint8_t params[4096], uint64_t *gpa)
{
    e820_into(placer, params);
    put64(params, Z_ACPI_RSDP, vm_pc_rsdp(placer->machine));
    params[H_LOADER] = LOADER_ID;
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, 4096, 4096, "Linux zero page", gpa);
    return status == VM_OK ? vm_boot_copy(placer->machine, *gpa, params, 4096, "Linux zero page") : status;
}

static int place_params(const linux_image *k, vm_placer *placer, const vm_modules *initrd, const char *cmdline, uint64_t *gpa)
{
    uint8_t params[4096] = {0};
    uint64_t ramdisk, ramdisk_bytes, text, seed = 0;
    int status = place_initrd(k, placer, initrd, &ramdisk, &ramdisk_bytes);
    if (status == VM_OK) status = vm_boot_string(placer, cmdline, "Linux command line", &text);
    if (status == VM_OK && k->version >= 0x209) status = place_seed(placer, &seed);
    if (status != VM_OK) return status;
    /* The header ends where its jump instruction lands. */
    unsigned end = H_MAGIC + k->image->data[H_JUMP + 1];
    if (end > 0x290) end = 0x290;
    if (!vm_image_has(k->image, 0, end)) end = 0x268;
    memcpy(params + H_SETUP_SECTS, k->image->data + H_SETUP_SECTS, end - H_SETUP_SECTS);
    put16(params, H_VID_MODE, 0xffff);
    params[H_LOADFLAGS] = k->loadflags & (uint8_t)~CAN_USE_HEAP;
    put32(params, H_CODE32, (uint32_t)k->load);
    put32(params, H_RAMDISK, (uint32_t)ramdisk);
    put32(params, Z_EXT_RAMDISK, (uint32_t)(ramdisk >> 32));
    put32(params, H_RAMDISK_SIZE, (uint32_t)ramdisk_bytes);
    put32(params, Z_EXT_RAMDISK_SIZE, (uint32_t)(ramdisk_bytes >> 32));
    put32(params, H_CMDLINE, (uint32_t)text);
    put32(params, Z_EXT_CMDLINE, (uint32_t)(text >> 32));
    if (k->version >= 0x209) put64(params, H_SETUP_DATA, seed);
    return vm_linux_params(placer, params, gpa);
}

static int load_flat(linux_image *k, vm_placer *placer, const vm_modules *initrd, const char *cmdline, bool is_64)
{
    vm_entry entry = {.kind = is_64 ? VM_ENTRY_LONG64 : VM_ENTRY_FLAT32};
    vm_entry_tables tables;
    uint64_t params = 0, stack = 0;
    int status = place_kernel(k, placer);
    if (status == VM_OK && is_64 && k->payload_bytes < 0x200)
        status = vm_fail(VM_E_FORMAT, "%s: 64-bit entry point lies beyond the kernel's end", k->image->path);
    if (status == VM_OK) status = place_params(k, placer, initrd, cmdline, &params);
    if (status == VM_OK) status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, 4096, 4096, "boot stack", &stack);
    if (status == VM_OK) status = vm_entry_prepare(placer, entry.kind, &tables);
    if (status != VM_OK) return status;
    entry.rip = k->load + (is_64 ? 0x200 : 0);
    /* A kernel that is not moved may start elsewhere than at its first byte. */
    if (!is_64 && k->load == 0x100000 && k->code32 > k->load && k->code32 < k->load + k->payload_bytes) entry.rip = k->code32;
    entry.rsi = params;
    entry.rsp = stack + 4096;
    vm_entry_apply(placer->machine, &entry, &tables);
    return VM_OK;
}

/* The 16-bit entry: set-up code at 0x90000 for old kernels, else at 0x10000, its stack and heap and the command line in the
 * rest of its 64 KiB. */
static int load_real(linux_image *k, vm_placer *placer, const vm_modules *initrd, const char *cmdline)
{
    bool is_high = k->loadflags & LOADED_HIGH;
    uint32_t base = k->version < 0x202 || !is_high ? 0x90000 : 0x10000;
    uint32_t heap_end = base == 0x90000 ? 0x9800 : 0xe000;
    uint64_t ramdisk, ramdisk_bytes, span = heap_end + strlen(cmdline) + 1;
    if (k->setup_bytes > 0x8000)
        return vm_fail(VM_E_FORMAT, "%s: %u bytes of set-up code, at most 32768 fit", k->image->path, k->setup_bytes);
    if (span > 0x10000 || base + span > VM_BOOT_LOW_END)
        return vm_fail(VM_E_INVALID, "%s: command line too long for the 16-bit entry", k->image->path);
    k->load = is_high ? 0x100000 : 0x10000;
    if (!is_high && k->payload_bytes > 0x80000)
        return vm_fail(VM_E_FORMAT, "%s: zImage of %llu bytes, at most 524288 fit", k->image->path, (unsigned long long)k->payload_bytes);
    int status = vm_place_at(placer, base, span, true, "Linux set-up code");
    if (status == VM_OK) status = vm_place_at(placer, k->load, k->payload_bytes, true, "Linux kernel");
    /* It unpacks itself to its preferred address: keep the initrd away from there. */
    if (status == VM_OK && k->init_size) status = vm_place_at(placer, k->pref_address, k->init_size, false, "Linux kernel");
    if (status == VM_OK) status = vm_boot_copy(placer->machine, k->load, k->image->data + k->setup_bytes, k->payload_bytes, "Linux kernel");
    if (status == VM_OK) status = place_initrd(k, placer, initrd, &ramdisk, &ramdisk_bytes);
    if (status != VM_OK) return status;

    uint8_t *setup = malloc(k->setup_bytes);
    if (!setup) return vm_fail(VM_E_NOMEM, "no memory for the set-up code");
    memcpy(setup, k->image->data, k->setup_bytes);
    setup[H_LOADER] = LOADER_ID;
    put16(setup, H_VID_MODE, 0xffff);
    if (k->version >= 0x201) {
        put16(setup, H_HEAP_END, (uint16_t)(heap_end - 0x200));
        setup[H_LOADFLAGS] |= CAN_USE_HEAP;
    }
    put32(setup, H_RAMDISK, (uint32_t)ramdisk);
    put32(setup, H_RAMDISK_SIZE, (uint32_t)ramdisk_bytes);
    if (k->version >= 0x202) put32(setup, H_CMDLINE, base + heap_end);
    else { put16(setup, 0x20, 0xa33f); put16(setup, 0x22, (uint16_t)heap_end); }
    status = vm_boot_copy(placer->machine, base, setup, k->setup_bytes, "Linux set-up code");
    free(setup);
    if (status == VM_OK) status = vm_boot_copy(placer->machine, base + heap_end, cmdline, strlen(cmdline) + 1, "Linux command line");
    if (status != VM_OK) return status;
    vm_entry entry = {.kind = VM_ENTRY_REAL, .cs = (uint16_t)((base >> 4) + 0x20), .ds = (uint16_t)(base >> 4), .rsp = heap_end};
    vm_entry_apply(placer->machine, &entry, NULL);
    return VM_OK;
}

static int load(linux_image *k, vm_placer *placer, const vm_modules *initrd, const char *cmdline, unsigned bits)
{
    bool is_high = k->loadflags & LOADED_HIGH, has_64 = k->version >= 0x20c && (k->xloadflags & XLF_KERNEL_64);
    if (bits == 64 && !has_64) return vm_fail(VM_E_UNSUPPORTED, "%s: kernel has no 64-bit entry (xloadflags %#x)", k->image->path, k->xloadflags);
    if (bits == 32 && !is_high) return vm_fail(VM_E_UNSUPPORTED, "%s: a zImage has no usable 32-bit entry", k->image->path);
    int status = check_cmdline(k, cmdline);
    if (status != VM_OK) return status;
    /* The 32-bit protocol came with 2.07; older images, or with code32_start 0, may only look like Linux (boot managers do). */
    if (bits == 0) bits = !is_high || !k->code32 || k->version < 0x207 ? 16 : has_64 ? 64 : 32;
    return bits == 16 ? load_real(k, placer, initrd, cmdline) : load_flat(k, placer, initrd, cmdline, bits == 64);
}

int vm_linux_load(vm_machine *m, const vm_image *kernel, const char *initrd, const char *cmdline, unsigned bits)
{
    linux_image k;
    vm_modules archives;
    vm_placer placer;
    int status = parse(&k, kernel);
    if (status != VM_OK) return status;
    if ((status = vm_modules_open(&archives, initrd, false)) != VM_OK) return status;
    if ((status = vm_placer_init(&placer, m)) == VM_OK) status = load(&k, &placer, &archives, cmdline, bits);
    vm_placer_free(&placer);
    vm_modules_close(&archives);
    return status;
}

/* ---- under a BIOS: rom.S fetches the pieces from the configuration device ---- */

enum { ROM_BYTES = 512, ROM_PNP = 0x1a, ROM_PNP_BYTES = 32, ROM_PNP_SUM = 9, ROM_SETUP = 0x10000, ROM_HEAP_END = 0xe000,
       ROM_KERNEL = 0x100000, ROM_RESERVE = 0x100000 };        /* a BIOS has its own memory at the end of RAM */
extern const uint8_t vm_boot_rom_begin[], vm_boot_rom_end[];

static uint8_t complement(const uint8_t *bytes, size_t count)
{
    uint8_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += bytes[i];
    return (uint8_t)-sum;
}

static int give_rom(vm_machine *m)
{
    uint8_t rom[ROM_BYTES] = {0}, *pnp;
    memcpy(rom, vm_boot_rom_begin, (size_t)(vm_boot_rom_end - vm_boot_rom_begin));
    pnp = rom + rom[ROM_PNP];
    pnp[ROM_PNP_SUM] = complement(pnp, ROM_PNP_BYTES);
    rom[ROM_BYTES - 1] = complement(rom, ROM_BYTES);
    return vm_pc_fwcfg_file(m, "genroms/linux.rom", rom, sizeof rom);
}

/* What no BIOS could start is left to firmware that knows more. */
int vm_linux_offer(vm_machine *m, const vm_image *kernel, uint64_t initrd_bytes, const char *cmdline)
{
    linux_image k;
    if (parse(&k, kernel) != VM_OK || !(k.loadflags & LOADED_HIGH) || k.version < 0x202 || k.setup_bytes > ROM_HEAP_END / 2
        || strlen(cmdline) >= 0x10000 - ROM_HEAP_END)
        return VM_OK;
    uint64_t end = vm_pc_low_end(m) - ROM_RESERVE, taken = ROM_KERNEL + k.payload_bytes;
    if (end > (uint64_t)k.initrd_max + 1) end = (uint64_t)k.initrd_max + 1;
    if (k.init_size && taken < k.pref_address + k.init_size) taken = k.pref_address + k.init_size;
    if (end < taken || end - taken < initrd_bytes + 4096) return VM_OK;
    const struct { uint16_t key; uint32_t value; } where[] = {
        {VM_FWCFG_SETUP_ADDR, ROM_SETUP}, {VM_FWCFG_KERNEL_ADDR, ROM_KERNEL}, {VM_FWCFG_CMDLINE_ADDR, ROM_SETUP + ROM_HEAP_END},
        {VM_FWCFG_INITRD_ADDR, initrd_bytes ? (uint32_t)((end - initrd_bytes) & ~UINT64_C(4095)) : 0}};
    int status = give_rom(m);
    for (unsigned i = 0; i < sizeof where / sizeof *where && status == VM_OK; i++)
        status = vm_pc_fwcfg_item(m, where[i].key, &where[i].value, sizeof where[i].value);
    return status;
}
