/* elf.c - ELF files: their segments into RAM; kernels with a PVH entry note (Xen's x86/HVM direct boot ABI); and plain ELF
 * programs, started at their entry point with Linux' boot registers. */
#include "boot/boot.h"

#include <elf.h>
#include <stdlib.h>
#include <string.h>

/* No kernel has more; bounds the work that a hostile file can ask for. */
#define VM_ELF_MAX_SEGMENTS 256u
#define XEN_ELFNOTE_PHYS32_ENTRY 18u
#define PVH_MAGIC 0x336ec578u

bool vm_elf_recognise(const vm_image *image)
{
    return vm_image_has(image, 0, SELFMAG) && memcmp(image->data, ELFMAG, SELFMAG) == 0;
}

static void get_segment(const vm_elf *elf, uint64_t at, vm_elf_segment *s)
{
    const uint8_t *raw = elf->image->data + at;
    if (elf->is_64) {
        Elf64_Phdr p;
        memcpy(&p, raw, sizeof p);
        *s = (vm_elf_segment){p.p_type, p.p_offset, p.p_vaddr, p.p_paddr, p.p_filesz, p.p_memsz};
    } else {
        Elf32_Phdr p;
        memcpy(&p, raw, sizeof p);
        *s = (vm_elf_segment){p.p_type, p.p_offset, p.p_vaddr, p.p_paddr, p.p_filesz, p.p_memsz};
    }
}

static int check_segment(const vm_elf *elf, unsigned index, const vm_elf_segment *s)
{
    if (s->type != PT_LOAD && s->type != PT_NOTE) return VM_OK;
    if (!vm_image_has(elf->image, s->offset, s->filesz))
        return vm_fail(VM_E_FORMAT, "%s: segment %u: file bytes %#llx+%#llx lie beyond the file's end", elf->image->path, index,
                       (unsigned long long)s->offset, (unsigned long long)s->filesz);
    if (s->type == PT_LOAD && s->filesz > s->memsz)
        return vm_fail(VM_E_FORMAT, "%s: segment %u: p_filesz %#llx is more than p_memsz %#llx", elf->image->path, index,
                       (unsigned long long)s->filesz, (unsigned long long)s->memsz);
    if (s->type == PT_LOAD && s->paddr + s->memsz < s->paddr)
        return vm_fail(VM_E_FORMAT, "%s: segment %u: p_paddr %#llx + p_memsz %#llx wraps", elf->image->path, index,
                       (unsigned long long)s->paddr, (unsigned long long)s->memsz);
    return VM_OK;
}

static int read_header(vm_elf *elf, uint64_t *phoff, unsigned *phentsize)
{
    const vm_image *image = elf->image;
    uint8_t class = image->data[EI_CLASS];
    if (class != ELFCLASS32 && class != ELFCLASS64) return vm_fail(VM_E_FORMAT, "%s: ELF class %u", image->path, class);
    if (image->data[EI_DATA] != ELFDATA2LSB) return vm_fail(VM_E_FORMAT, "%s: not a little-endian ELF file", image->path);
    elf->is_64 = class == ELFCLASS64;
    uint64_t bytes = elf->is_64 ? sizeof(Elf64_Ehdr) : sizeof(Elf32_Ehdr);
    if (!vm_image_has(image, 0, bytes)) return vm_fail(VM_E_FORMAT, "%s: ELF header cut short", image->path);
    uint16_t type;
    if (elf->is_64) {
        Elf64_Ehdr h;
        memcpy(&h, image->data, sizeof h);
        type = h.e_type; elf->machine = h.e_machine; elf->entry = h.e_entry; elf->count = h.e_phnum;
        *phoff = h.e_phoff; *phentsize = h.e_phentsize;
    } else {
        Elf32_Ehdr h;
        memcpy(&h, image->data, sizeof h);
        type = h.e_type; elf->machine = h.e_machine; elf->entry = h.e_entry; elf->count = h.e_phnum;
        *phoff = h.e_phoff; *phentsize = h.e_phentsize;
    }
    if (type != ET_EXEC && type != ET_DYN) return vm_fail(VM_E_FORMAT, "%s: ELF type %u is no executable", image->path, type);
    if (elf->machine != EM_386 && elf->machine != EM_X86_64)
        return vm_fail(VM_E_FORMAT, "%s: ELF machine %u is not x86", image->path, elf->machine);
    return VM_OK;
}

int vm_elf_open(vm_elf *elf, const vm_image *image)
{
    memset(elf, 0, sizeof *elf);
    elf->image = image;
    uint64_t phoff = 0;
    unsigned phentsize = 0;
    if (!vm_elf_recognise(image) || !vm_image_has(image, 0, EI_NIDENT))
        return vm_fail(VM_E_FORMAT, "%s: not an ELF file", image->path);
    int status = read_header(elf, &phoff, &phentsize);
    if (status != VM_OK) return status;
    unsigned wanted = elf->is_64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr);
    if (elf->count == 0 || elf->count > VM_ELF_MAX_SEGMENTS)
        return vm_fail(VM_E_FORMAT, "%s: %u program headers (1 to %u are taken)", image->path, elf->count, VM_ELF_MAX_SEGMENTS);
    if (phentsize < wanted) return vm_fail(VM_E_FORMAT, "%s: e_phentsize %u, at least %u expected", image->path, phentsize, wanted);
    if (!vm_image_has(image, phoff, (uint64_t)elf->count * phentsize))
        return vm_fail(VM_E_FORMAT, "%s: program headers at %#llx lie beyond the file's end", image->path, (unsigned long long)phoff);
    elf->segments = calloc(elf->count, sizeof *elf->segments);
    if (!elf->segments) return vm_fail(VM_E_NOMEM, "no memory for %u program headers", elf->count);
    for (unsigned i = 0; i < elf->count && status == VM_OK; i++) {
        get_segment(elf, phoff + (uint64_t)i * phentsize, &elf->segments[i]);
        status = check_segment(elf, i, &elf->segments[i]);
    }
    if (status != VM_OK) vm_elf_close(elf);
    return status;
}

void vm_elf_close(vm_elf *elf)
{
    free(elf->segments);
    elf->segments = NULL;
    elf->count = 0;
}

/* RAM all the way, without a platform's map: asked of the machine run by run. */
static int check_ram(vm_machine *m, uint64_t gpa, uint64_t bytes, const char *what)
{
    while (bytes) {
        size_t run = bytes > SIZE_MAX / 2 ? SIZE_MAX / 2 : (size_t)bytes;
        if (!vm_memory_ptr(m, gpa, &run) || run == 0)
            return vm_fail(VM_E_NOMEM, "%s: a segment needs RAM at %#llx, where there is none", what, (unsigned long long)gpa);
        gpa += run;
        bytes -= run < bytes ? run : bytes;
    }
    return VM_OK;
}

int vm_elf_load(const vm_elf *elf, vm_machine *m, vm_placer *placer, uint64_t *low, uint64_t *end)
{
    const char *path = elf->image->path;
    uint64_t first = UINT64_MAX, last = 0;
    int status = VM_OK;
    for (unsigned i = 0; i < elf->count && status == VM_OK; i++) {
        const vm_elf_segment *s = &elf->segments[i];
        if (s->type != PT_LOAD || s->memsz == 0) continue;
        status = placer ? vm_place_at(placer, s->paddr, s->memsz, false, path) : check_ram(m, s->paddr, s->memsz, path);
        if (s->paddr < first) first = s->paddr;
        if (s->paddr + s->memsz > last) last = s->paddr + s->memsz;
    }
    if (status == VM_OK && last == 0) status = vm_fail(VM_E_FORMAT, "%s: nothing to load in this ELF file", path);
    for (unsigned i = 0; i < elf->count && status == VM_OK; i++) {
        const vm_elf_segment *s = &elf->segments[i];
        if (s->type != PT_LOAD) continue;
        status = vm_boot_copy(m, s->paddr, elf->image->data + s->offset, s->filesz, path);
        if (status == VM_OK) status = vm_boot_zero(m, s->paddr + s->filesz, s->memsz - s->filesz, path);
    }
    if (low) *low = first;
    if (end) *end = last;
    return status;
}

uint64_t vm_elf_entry(const vm_elf *elf)
{
    for (unsigned i = 0; i < elf->count; i++) {
        const vm_elf_segment *s = &elf->segments[i];
        if (s->type == PT_LOAD && elf->entry >= s->vaddr && elf->entry - s->vaddr < s->memsz) return s->paddr + (elf->entry - s->vaddr);
    }
    return elf->entry;
}

/* ---- PVH ---- */

/* A note is name size, descriptor size, type, name, descriptor, the latter two padded to 4 bytes. */
static bool find_pvh_in(const vm_image *image, uint64_t at, uint64_t bytes, uint64_t *entry)
{
    uint64_t end = at + bytes;
    uint32_t head[3];
    while (end - at >= sizeof head) {
        memcpy(head, image->data + at, sizeof head);
        at += sizeof head;
        uint64_t name = ((uint64_t)head[0] + 3) & ~UINT64_C(3), desc = ((uint64_t)head[1] + 3) & ~UINT64_C(3);
        if (name > end - at || head[1] > end - at - name) return false;
        const uint8_t *descriptor = image->data + at + name;
        if (head[2] == XEN_ELFNOTE_PHYS32_ENTRY && head[0] == 4 && memcmp(image->data + at, "Xen", 4) == 0 && head[1] >= 4) {
            *entry = 0;
            memcpy(entry, descriptor, head[1] >= 8 ? 8 : 4);
            return true;
        }
        if (desc > end - at - name) return false;
        at += name + desc;
    }
    return false;
}

static bool find_pvh(const vm_elf *elf, uint64_t *entry)
{
    for (unsigned i = 0; i < elf->count; i++) {
        const vm_elf_segment *s = &elf->segments[i];
        if (s->type == PT_NOTE && find_pvh_in(elf->image, s->offset, s->filesz, entry)) return true;
    }
    return false;
}

struct pvh_module { uint64_t paddr, bytes, cmdline, reserved; };
struct pvh_memmap { uint64_t addr, bytes; uint32_t type, reserved; };
struct pvh_info {
    uint32_t magic, version, flags, modules;
    uint64_t modlist, cmdline, rsdp, memmap;
    uint32_t memmap_entries, reserved;
};

static int place_pvh_modules(vm_placer *placer, const vm_modules *modules, uint64_t kernel_end, struct pvh_info *info)
{
    struct pvh_module list[VM_BOOT_MAX_MODULES] = {{0}};
    int status = VM_OK;
    if (!modules->count) return VM_OK;
    for (unsigned i = 0; i < modules->count && status == VM_OK; i++) {
        const vm_image *image = &modules->image[i];
        const char *space = strchr(modules->text[i], ' ');
        list[i].bytes = image->bytes;
        status = vm_place_high(placer, kernel_end, VM_PC_HIGH, image->bytes, 4096, "module", &list[i].paddr);
        if (status == VM_OK) status = vm_boot_copy(placer->machine, list[i].paddr, image->data, image->bytes, "module");
        if (status == VM_OK && space) status = vm_boot_string(placer, space + 1, "module command line", &list[i].cmdline);
    }
    info->modules = modules->count;
    uint64_t bytes = modules->count * sizeof *list;
    if (status == VM_OK)
        status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, bytes, 16, "PVH module list", &info->modlist);
    return status == VM_OK ? vm_boot_copy(placer->machine, info->modlist, list, bytes, "PVH module list") : status;
}

static int place_pvh_info(vm_placer *placer, struct pvh_info *info, const char *cmdline, uint64_t *gpa)
{
    struct pvh_memmap map[VM_BOOT_MAX_E820] = {{0}};
    for (unsigned i = 0; i < placer->map_count; i++)
        map[i] = (struct pvh_memmap){placer->map[i].base, placer->map[i].bytes, placer->map[i].type, 0};
    info->magic = PVH_MAGIC;
    info->version = 1;
    info->rsdp = vm_pc_rsdp(placer->machine);
    info->memmap_entries = placer->map_count;
    uint64_t bytes = placer->map_count * sizeof *map;
    int status = vm_boot_string(placer, cmdline, "command line", &info->cmdline);
    if (status == VM_OK) status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, bytes, 16, "PVH memory map", &info->memmap);
    if (status == VM_OK) status = vm_boot_copy(placer->machine, info->memmap, map, bytes, "PVH memory map");
    if (status == VM_OK) status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, sizeof *info, 16, "PVH start info", gpa);
    return status == VM_OK ? vm_boot_copy(placer->machine, *gpa, info, sizeof *info, "PVH start info") : status;
}

static int boot_pvh(const vm_elf *elf, vm_placer *placer, const vm_modules *modules, const char *cmdline, uint64_t note_entry)
{
    vm_entry entry = {.kind = VM_ENTRY_FLAT32, .rip = note_entry};
    vm_entry_tables tables;
    struct pvh_info info = {0};
    uint64_t end = 0;
    if (note_entry > UINT32_MAX)
        return vm_fail(VM_E_FORMAT, "%s: PVH entry %#llx is above 4 GiB", elf->image->path, (unsigned long long)note_entry);
    int status = vm_elf_load(elf, placer->machine, placer, NULL, &end);
    if (status == VM_OK) status = place_pvh_modules(placer, modules, end, &info);
    if (status == VM_OK) status = place_pvh_info(placer, &info, cmdline, &entry.rbx);
    if (status == VM_OK) status = vm_entry_prepare(placer, entry.kind, &tables);
    if (status == VM_OK) vm_entry_apply(placer->machine, &entry, &tables);
    return status;
}

/* ---- plain ELF ---- */

static int boot_plain(const vm_elf *elf, vm_placer *placer, const vm_modules *modules, const char *cmdline)
{
    vm_entry entry = {.kind = elf->machine == EM_X86_64 && elf->is_64 ? VM_ENTRY_LONG64 : VM_ENTRY_FLAT32, .rip = vm_elf_entry(elf)};
    vm_entry_tables tables;
    uint8_t params[4096] = {0};
    uint64_t end = 0, text = 0, ramdisk = 0, bytes = 0, stack = 0;
    if (modules->count > 1)
        return vm_fail(VM_E_INVALID, "%s: a plain ELF kernel takes one initrd, not %u", elf->image->path, modules->count);
    if (entry.rip > UINT32_MAX)
        return vm_fail(VM_E_FORMAT, "%s: entry point %#llx is above 4 GiB", elf->image->path, (unsigned long long)entry.rip);
    int status = vm_elf_load(elf, placer->machine, placer, NULL, &end);
    if (status == VM_OK && modules->count) {
        bytes = modules->image[0].bytes;
        status = vm_place_high(placer, end, UINT64_C(0x80000000), bytes, 4096, "initrd", &ramdisk);
        if (status == VM_OK) status = vm_boot_copy(placer->machine, ramdisk, modules->image[0].data, bytes, "initrd");
    }
    if (status == VM_OK) status = vm_boot_string(placer, cmdline, "command line", &text);
    if (status != VM_OK) return status;
    memcpy(params + 0x1fe, "\x55\xaa", 2);
    memcpy(params + 0x202, "HdrS\x0c\x02", 6);
    memcpy(params + 0x218, &ramdisk, 4);
    memcpy(params + 0x21c, &bytes, 4);
    memcpy(params + 0x228, &text, 4);
    status = vm_linux_params(placer, params, &entry.rsi);
    if (status == VM_OK) status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, 0x2000, 4096, "boot stack", &stack);
    if (status == VM_OK) status = vm_entry_prepare(placer, entry.kind, &tables);
    entry.rsp = stack + 0x2000;
    if (status == VM_OK) vm_entry_apply(placer->machine, &entry, &tables);
    return status;
}

int vm_elf_boot(vm_machine *m, const vm_image *kernel, const char *list, const char *cmdline)
{
    vm_elf elf;
    vm_modules modules;
    vm_placer placer;
    uint64_t note_entry = 0;
    int status = vm_elf_open(&elf, kernel);
    if (status != VM_OK) return status;
    status = vm_modules_open(&modules, list, true);
    if (status == VM_OK) {
        status = vm_placer_init(&placer, m);
        if (status == VM_OK)
            status = find_pvh(&elf, &note_entry) ? boot_pvh(&elf, &placer, &modules, cmdline, note_entry)
                                                 : boot_plain(&elf, &placer, &modules, cmdline);
        vm_placer_free(&placer);
        vm_modules_close(&modules);
    }
    vm_elf_close(&elf);
    return status;
}
