/* multiboot.c - kernels by the Multiboot specification, version 0.6.96 ("Multiboot 1"): loaded as the ELF file they are, or by
 * the address fields of the header (a.out kludge); modules, command lines, memory map, loader name. */
#include "boot/boot.h"

#include <string.h>

#define HEADER_MAGIC 0x1badb002u
#define ENTRY_MAGIC  0x2badb002u
#define SEARCH_BYTES 8192u
/* Header flags 0-15 are demands: refuse those not known. Page-aligned modules and memory information are always given. */
#define WANT_PAGE_ALIGN 0x00000001u
#define WANT_MEMORY     0x00000002u
#define WANT_VIDEO      0x00000004u
#define HAS_ADDRESSES   0x00010000u
enum { INFO_MEMORY = 1, INFO_CMDLINE = 4, INFO_MODULES = 8, INFO_MMAP = 0x40, INFO_LOADER = 0x200 };

struct mb_header { uint32_t magic, flags, checksum, header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr; };
struct mb_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4], mmap_length, mmap_addr,
        drives_length, drives_addr, config_table, boot_loader_name, apm_table, vbe[4];
};
struct mb_module { uint32_t start, end, string, reserved; };
struct mb_mmap { uint32_t size; uint64_t base, bytes; uint32_t type; } __attribute__((packed));

/* The header lies 4-byte aligned in the first 8 KiB; fields past its first three count only with HAS_ADDRESSES. */
static bool find_header(const vm_image *image, struct mb_header *h, uint64_t *offset)
{
    for (uint64_t at = 0; at + 12 <= SEARCH_BYTES && vm_image_has(image, at, 12); at += 4) {
        memset(h, 0, sizeof *h);
        memcpy(h, image->data + at, 12);
        if (h->magic != HEADER_MAGIC || h->magic + h->flags + h->checksum != 0) continue;
        if (vm_image_has(image, at, sizeof *h)) memcpy(h, image->data + at, sizeof *h);
        else if (h->flags & HAS_ADDRESSES) continue;
        *offset = at;
        return true;
    }
    return false;
}

bool vm_multiboot_recognise(const vm_image *image)
{
    struct mb_header h;
    uint64_t offset;
    return find_header(image, &h, &offset);
}

/* The a.out kludge: one piece of the file at load_addr, zeroes up to bss_end_addr. */
static int load_flat(const vm_image *image, vm_placer *placer, const struct mb_header *h, uint64_t offset, uint64_t *end)
{
    if (h->load_addr > h->header_addr || h->header_addr - h->load_addr > offset)
        return vm_fail(VM_E_FORMAT, "%s: Multiboot header_addr %#x does not fit load_addr %#x and its place %#llx in the file",
                       image->path, h->header_addr, h->load_addr, (unsigned long long)offset);
    uint64_t from = offset - (h->header_addr - h->load_addr), bytes = image->bytes - from;
    if (h->load_end_addr) {
        if (h->load_end_addr < h->load_addr || h->load_end_addr - h->load_addr > bytes)
            return vm_fail(VM_E_FORMAT, "%s: Multiboot load_end_addr %#x lies beyond the file's end", image->path, h->load_end_addr);
        bytes = h->load_end_addr - h->load_addr;
    }
    uint64_t total = bytes;
    if (h->bss_end_addr) {
        if (h->bss_end_addr < h->load_addr || h->bss_end_addr - h->load_addr < bytes)
            return vm_fail(VM_E_FORMAT, "%s: Multiboot bss_end_addr %#x lies before the end of the data", image->path, h->bss_end_addr);
        total = h->bss_end_addr - h->load_addr;
    }
    int status = vm_place_at(placer, h->load_addr, total, true, "Multiboot kernel");
    if (status == VM_OK) status = vm_boot_copy(placer->machine, h->load_addr, image->data + from, bytes, "Multiboot kernel");
    if (status == VM_OK) status = vm_boot_zero(placer->machine, h->load_addr + bytes, total - bytes, "Multiboot kernel");
    *end = h->load_addr + total;
    return status;
}

static int load_kernel(const vm_image *image, vm_placer *placer, const struct mb_header *h, uint64_t offset, uint64_t *end, uint64_t *rip)
{
    if (h->flags & HAS_ADDRESSES) {
        *rip = h->entry_addr;
        return load_flat(image, placer, h, offset, end);
    }
    vm_elf elf;
    int status = vm_elf_open(&elf, image);
    if (status != VM_OK) return status;
    *rip = vm_elf_entry(&elf);
    status = vm_elf_load(&elf, placer->machine, placer, NULL, end);
    vm_elf_close(&elf);
    if (status == VM_OK && (*end > VM_PC_HIGH || *rip > UINT32_MAX))
        return vm_fail(VM_E_FORMAT, "%s: a Multiboot kernel above 4 GiB (entry %#llx, end %#llx)", image->path,
                       (unsigned long long)*rip, (unsigned long long)*end);
    return status;
}

/* Modules follow the kernel, each on a page of its own, as GRUB lays them out. */
static int place_modules(vm_placer *placer, const vm_modules *modules, uint64_t kernel_end, struct mb_info *info)
{
    struct mb_module list[VM_BOOT_MAX_MODULES] = {{0}};
    int status = VM_OK;
    uint64_t min = kernel_end > 0x100000 ? kernel_end : 0x100000, at = 0;
    if (!modules->count) return VM_OK;
    for (unsigned i = 0; i < modules->count && status == VM_OK; i++) {
        const vm_image *image = &modules->image[i];
        status = vm_place_low(placer, min, VM_PC_HIGH, image->bytes, 4096, "Multiboot module", &at);
        if (status == VM_OK) status = vm_boot_copy(placer->machine, at, image->data, image->bytes, "Multiboot module");
        list[i].start = (uint32_t)at;
        list[i].end = (uint32_t)(at + image->bytes);
        if (status == VM_OK) status = vm_boot_string(placer, modules->text[i], "module command line", &at);
        list[i].string = (uint32_t)at;
    }
    uint64_t bytes = modules->count * sizeof *list;
    if (status == VM_OK) status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, bytes, 16, "Multiboot module list", &at);
    if (status == VM_OK) status = vm_boot_copy(placer->machine, at, list, bytes, "Multiboot module list");
    info->flags |= INFO_MODULES;
    info->mods_count = modules->count;
    info->mods_addr = (uint32_t)at;
    return status;
}

static int place_memory_map(vm_placer *placer, struct mb_info *info)
{
    struct mb_mmap map[VM_BOOT_MAX_E820];
    uint64_t at, upper = vm_pc_low_end(placer->machine);
    for (unsigned i = 0; i < placer->map_count; i++)
        map[i] = (struct mb_mmap){20, placer->map[i].base, placer->map[i].bytes, placer->map[i].type};
    uint64_t bytes = placer->map_count * sizeof *map;
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, bytes, 16, "Multiboot memory map", &at);
    if (status != VM_OK) return status;
    info->flags |= INFO_MEMORY | INFO_MMAP;
    info->mem_lower = 639;
    info->mem_upper = upper > 0x100000 ? (uint32_t)((upper - 0x100000) >> 10) : 0;
    info->mmap_addr = (uint32_t)at;
    info->mmap_length = (uint32_t)bytes;
    return vm_boot_copy(placer->machine, at, map, bytes, "Multiboot memory map");
}

/* The command line starts with the kernel's own name. */
static int place_strings(vm_placer *placer, const vm_image *kernel, const char *cmdline, struct mb_info *info)
{
    size_t name = strlen(kernel->path), args = strlen(cmdline);
    uint64_t at, loader;
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, name + args + 2, 16, "command line", &at);
    if (status == VM_OK) status = vm_boot_copy(placer->machine, at, kernel->path, name, "command line");
    if (status == VM_OK) status = vm_boot_copy(placer->machine, at + name, args ? " " : "", 1, "command line");
    if (status == VM_OK && args) status = vm_boot_copy(placer->machine, at + name + 1, cmdline, args + 1, "command line");
    if (status == VM_OK) status = vm_boot_string(placer, "libvm", "loader name", &loader);
    if (status != VM_OK) return status;
    info->flags |= INFO_CMDLINE | INFO_LOADER;
    info->cmdline = (uint32_t)at;
    info->boot_loader_name = (uint32_t)loader;
    return VM_OK;
}

static int load(vm_placer *placer, const vm_image *kernel, const vm_modules *modules, const char *cmdline)
{
    struct mb_header h;
    struct mb_info info = {0};
    uint64_t offset = 0, end = 0;
    vm_entry entry = {.kind = VM_ENTRY_FLAT32, .rax = ENTRY_MAGIC};
    vm_entry_tables tables;
    if (!find_header(kernel, &h, &offset)) return vm_fail(VM_E_FORMAT, "%s: no Multiboot header", kernel->path);
    if (h.flags & 0xffff & ~(WANT_PAGE_ALIGN | WANT_MEMORY | WANT_VIDEO))
        return vm_fail(VM_E_FORMAT, "%s: Multiboot header demands unknown features (flags %#x)", kernel->path, h.flags);
    int status = load_kernel(kernel, placer, &h, offset, &end, &entry.rip);
    if (status == VM_OK) status = place_modules(placer, modules, end, &info);
    if (status == VM_OK) status = place_memory_map(placer, &info);
    if (status == VM_OK) status = place_strings(placer, kernel, cmdline, &info);
    if (status == VM_OK) status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, sizeof info, 16, "Multiboot information", &entry.rbx);
    if (status == VM_OK) status = vm_boot_copy(placer->machine, entry.rbx, &info, sizeof info, "Multiboot information");
    if (status == VM_OK) status = vm_entry_prepare(placer, entry.kind, &tables);
    if (status == VM_OK) vm_entry_apply(placer->machine, &entry, &tables);
    return status;
}

int vm_multiboot_load(vm_machine *m, const vm_image *kernel, const char *list, const char *cmdline)
{
    vm_modules modules;
    vm_placer placer;
    int status = vm_modules_open(&modules, list, true);
    if (status != VM_OK) return status;
    if ((status = vm_placer_init(&placer, m)) == VM_OK) status = load(&placer, kernel, &modules, cmdline);
    vm_placer_free(&placer);
    vm_modules_close(&modules);
    return status;
}
