/* boot.h - loaders: images of the host put into guest memory, and vCPU 0 made ready to start them.
 *
 * Every byte of an image is hostile. Rules all loaders keep:
 *   - a header field is read once, through the bounded accessors below, and checked before use; sums are checked for overflow;
 *   - where something goes is decided by a vm_placer, which knows the RAM and what is taken already, so that nothing is laid
 *     over anything else and nothing outside of RAM is written;
 *   - registers change last, when nothing can fail any more.
 */
#ifndef LIBVM_BOOT_BOOT_H
#define LIBVM_BOOT_BOOT_H

#include "core/core.h"
#include "platform/pc.h"

#define VM_BOOT_MAX_MODULES 64u
#define VM_BOOT_MAX_E820 32u

/* ---- images (image.c) ---- */
typedef struct vm_image {
    const char *path;
    uint8_t *data;
    uint64_t bytes;
} vm_image;
int  vm_image_open(vm_image *image, const char *path);
void vm_image_close(vm_image *image);
/* Little-endian fields; false when [offset, offset + width) is not all inside. */
bool vm_image_u8(const vm_image *image, uint64_t offset, uint8_t *value);
bool vm_image_u16(const vm_image *image, uint64_t offset, uint16_t *value);
bool vm_image_u32(const vm_image *image, uint64_t offset, uint32_t *value);
bool vm_image_u64(const vm_image *image, uint64_t offset, uint64_t *value);
static inline bool vm_image_has(const vm_image *image, uint64_t offset, uint64_t bytes)
{
    return offset <= image->bytes && bytes <= image->bytes - offset;
}

/* A list "file args,file args": files are opened, strings owned by the list. */
typedef struct vm_modules {
    char *list;
    unsigned count;
    vm_image image[VM_BOOT_MAX_MODULES];
    const char *text[VM_BOOT_MAX_MODULES];      /* the module's whole string, path included */
} vm_modules;
int  vm_modules_open(vm_modules *modules, const char *list, bool with_arguments);
void vm_modules_close(vm_modules *modules);
uint64_t vm_modules_bytes(const vm_modules *modules, uint64_t align);

/* ---- placing (place.c) ---- */
typedef struct vm_span { uint64_t gpa, bytes; } vm_span;
typedef struct vm_placer {
    vm_machine *machine;
    vm_pc_e820_entry map[VM_BOOT_MAX_E820];
    unsigned map_count;
    vm_span *taken;
    size_t taken_count, taken_capacity;
} vm_placer;
int  vm_placer_init(vm_placer *placer, vm_machine *m);
void vm_placer_free(vm_placer *placer);
/* Take [gpa, gpa + bytes): VM_E_NOMEM unless it is all RAM; `exclusive`: and not taken yet. */
int  vm_place_at(vm_placer *placer, uint64_t gpa, uint64_t bytes, bool exclusive, const char *what);
/* Take the lowest or the highest free place with min <= gpa and gpa + bytes <= end. */
int  vm_place_low(vm_placer *placer, uint64_t min, uint64_t end, uint64_t bytes, uint64_t align, const char *what, uint64_t *gpa);
int  vm_place_high(vm_placer *placer, uint64_t min, uint64_t end, uint64_t bytes, uint64_t align, const char *what, uint64_t *gpa);
/* Copy into guest memory; `what` for the message. zero: clears. */
int  vm_boot_copy(vm_machine *m, uint64_t gpa, const void *data, uint64_t bytes, const char *what);
int  vm_boot_zero(vm_machine *m, uint64_t gpa, uint64_t bytes, const char *what);
/* A copy of `text` with its NUL in low memory. */
int  vm_boot_string(vm_placer *placer, const char *text, const char *what, uint64_t *gpa);
#define VM_BOOT_LOW_MIN UINT64_C(0x1000)
#define VM_BOOT_LOW_END UINT64_C(0x9f000)

/* ---- starting vCPU 0 (entry.c) ---- */
typedef enum vm_entry_kind { VM_ENTRY_REAL, VM_ENTRY_FLAT32, VM_ENTRY_LONG64, VM_ENTRY_RESET } vm_entry_kind;
typedef struct vm_entry {
    vm_entry_kind kind;
    uint64_t rip, rsp;
    uint64_t rax, rbx, rsi;
    uint16_t cs, ds;                            /* REAL: segment values; DS goes into ES, SS, FS and GS too */
} vm_entry;
/* Put tables that the entry needs (GDT, identity page tables) into memory. May fail; changes no register. */
typedef struct vm_entry_tables { uint64_t gdt, cr3; } vm_entry_tables;
int  vm_entry_prepare(vm_placer *placer, vm_entry_kind kind, vm_entry_tables *tables);
void vm_entry_apply(vm_machine *m, const vm_entry *entry, const vm_entry_tables *tables);

/* ---- formats ---- */
/* What vm_boot_image asks of each, options already checked. `bits`: 0, or the Linux entry wanted: 16, 32, 64. */
int  vm_linux_load(vm_machine *m, const vm_image *kernel, const char *initrd, const char *cmdline, unsigned bits);
bool vm_linux_recognise(const vm_image *image);
/* For a BIOS: an option ROM that starts the kernel of the configuration device, and where its pieces go. */
int  vm_linux_offer(vm_machine *m, const vm_image *kernel, uint64_t initrd_bytes, const char *cmdline);
int  vm_multiboot_load(vm_machine *m, const vm_image *kernel, const char *modules, const char *cmdline);
bool vm_multiboot_recognise(const vm_image *image);
bool vm_elf_recognise(const vm_image *image);
/* PVH when the note is there, else plain ELF (registers as for Linux' 32- or 64-bit entry). */
int  vm_elf_boot(vm_machine *m, const vm_image *kernel, const char *modules, const char *cmdline);
int  vm_bios_load(vm_machine *m, const char *path);
bool vm_sector_recognise(const vm_image *image);
int  vm_sector_load(vm_machine *m, const vm_image *image);
/* Linux' zero page for a kernel that is no bzImage; *gpa gets its address. */
int  vm_linux_params(vm_placer *placer, uint8_t params[4096], uint64_t *gpa);

/* ELF, parsed once (elf.c). */
typedef struct vm_elf_segment { uint32_t type; uint64_t offset, vaddr, paddr, filesz, memsz; } vm_elf_segment;
typedef struct vm_elf {
    const vm_image *image;
    bool is_64;
    uint16_t machine;
    uint64_t entry;                             /* as the header has it */
    unsigned count;
    vm_elf_segment *segments;
} vm_elf;
int  vm_elf_open(vm_elf *elf, const vm_image *image);
void vm_elf_close(vm_elf *elf);
/* Copy PT_LOAD segments; placer may be NULL (a machine that is no PC). *low, *end: the extent, either may be NULL. */
int  vm_elf_load(const vm_elf *elf, vm_machine *m, vm_placer *placer, uint64_t *low, uint64_t *end);
/* The physical address that the entry point, a virtual or physical address, lies at. */
uint64_t vm_elf_entry(const vm_elf *elf);

/* Firmware services for guests that start without firmware (services.S): position-independent code for a page of its own,
 * with the interrupt vectors' offsets in front; interrupt vectors and the BIOS data area. A placer puts them in first. */
int  vm_boot_services(vm_placer *placer);

#endif
