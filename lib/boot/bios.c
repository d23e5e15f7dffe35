/* bios.c - firmware at the reset vector, boot sectors, and the small firmware services of guests that start without firmware. */
#include "boot/boot.h"

#include <string.h>

#define BIOS_MAX (UINT64_C(16) << 20)
#define SERVICES_GPA UINT64_C(0xff000)         /* reserved in the memory map, past the platform's tables */
#define SERVICES_END UINT64_C(0x100000)
#define DATA_GPA UINT64_C(0x400)
#define EBDA_GPA UINT64_C(0x9fc00)
#define SECTOR_GPA UINT64_C(0x7c00)

extern const uint8_t vm_boot_services_begin[], vm_boot_services_end[];

/* The image ends at 4 GiB, read-only; its last 128 KiB are visible below 1 MiB too, in RAM, as firmware expects that it can
 * make them writable. Only firmware loaded by this function is at that address, so loading again replaces it. */
int vm_bios_load(vm_machine *m, const char *path)
{
    vm_image image;
    int status = vm_image_open(&image, path);
    if (status != VM_OK) return status;
    uint64_t shadow = image.bytes < 0x20000 ? image.bytes : 0x20000, gpa = VM_PC_HIGH - image.bytes;
    size_t run = 1;
    if (image.bytes > BIOS_MAX || image.bytes % 4096 != 0)
        status = vm_fail(VM_E_FORMAT, "%s: firmware of %llu bytes: whole 4 KiB pages up to 16 MiB are taken", path,
                         (unsigned long long)image.bytes);
    else if (!vm_memory_ptr(m, gpa, &run))
        status = vm_map_ram(m, gpa, image.bytes, VM_PROT_RX, NULL);
    if (status == VM_OK) status = vm_boot_copy(m, gpa, image.data, image.bytes, path);
    if (status == VM_OK) status = vm_boot_copy(m, 0x100000 - shadow, image.data + image.bytes - shadow, shadow, path);
    vm_image_close(&image);
    if (status == VM_OK) vm_entry_apply(m, &(vm_entry){.kind = VM_ENTRY_RESET}, NULL);
    return status;
}

/* ---- services ---- */

/* What services.S has at its end. */
struct service_data { uint16_t extended_k, below_16m_k, above_16m_64k, pad; uint32_t count; } __attribute__((packed));
struct service_range { uint64_t base, bytes; uint32_t type; } __attribute__((packed));

static uint16_t bounded(uint64_t value, uint16_t max) { return value > max ? max : (uint16_t)value; }

static int put_vectors(vm_machine *m, const uint16_t *offsets)
{
    static const uint8_t vectors[] = {0x10, 0x11, 0x12, 0x13, 0x15, 0x16, 0x1a};      /* in the order of the offsets */
    uint16_t table[512];
    for (unsigned v = 0; v < 256; v++) {
        table[2 * v] = offsets[0];
        table[2 * v + 1] = SERVICES_GPA >> 4;
    }
    for (unsigned i = 0; i < sizeof vectors; i++) table[2 * vectors[i]] = offsets[1 + i];
    return vm_boot_copy(m, 0, table, sizeof table, "interrupt vectors");
}

/* The BIOS data area, as far as guests look at it: serial ports, extended BIOS data, equipment, KiB below that data, video mode. */
static int put_data_area(vm_machine *m)
{
    struct {
        uint16_t serial[4], parallel[3], ebda, equipment;
        uint8_t test;
        uint16_t memory_k;
    } __attribute__((packed)) data = {{0x3f8, 0x2f8, 0x3e8, 0x2e8}, {0}, EBDA_GPA >> 4, 0x0820, 0, EBDA_GPA >> 10};
    const struct { uint8_t mode; uint16_t columns; } __attribute__((packed)) video = {3, 80};
    const uint8_t ebda_k = 1;
    int status = vm_boot_copy(m, DATA_GPA, &data, sizeof data, "BIOS data area");
    if (status == VM_OK) status = vm_boot_copy(m, DATA_GPA + 0x49, &video, sizeof video, "BIOS data area");
    return status == VM_OK ? vm_boot_copy(m, EBDA_GPA, &ebda_k, 1, "extended BIOS data area") : status;
}

/* The top of the page is the reset vector, which systems jump to for a restart. It asks for one (reset control register);
 * behind it lie a date and the model byte of a PC AT, as in every firmware. */
static void put_reset_vector(uint8_t *page)
{
    static const uint8_t top[32] = {0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee,     /* mov $0xcf9, %dx; mov $6, %al; out %al, %dx */
                                    0xf4, 0xeb, 0xfd,                       /* hlt; jmp to it */
                                    [16] = 0xe9, 0xed, 0xff,                /* F000:FFF0: jmp to the top of this */
                                    [21] = '0', '1', '/', '0', '1', '/', '2', '6', [30] = 0xfc};
    memcpy(page + (SERVICES_END - SERVICES_GPA) - sizeof top, top, sizeof top);
}

int vm_boot_services(vm_placer *placer)
{
    uint8_t page[SERVICES_END - SERVICES_GPA] = {0};
    size_t code = (size_t)(vm_boot_services_end - vm_boot_services_begin);
    uint64_t low_end = vm_pc_low_end(placer->machine), above = low_end > 0x100000 ? low_end - 0x100000 : 0;
    struct service_data data = {bounded(above >> 10, 0xfc00), bounded(above >> 10, 0x3c00),
                                bounded(above > 0xf00000 ? (above - 0xf00000) >> 16 : 0, 0xffff), 0, placer->map_count};
    memcpy(page, vm_boot_services_begin, code);
    for (unsigned i = 0; i < placer->map_count; i++) {
        const vm_pc_e820_entry *e = &placer->map[i];
        struct service_range r = {e->base, e->bytes, e->type};
        memcpy(page + code + i * sizeof r, &r, sizeof r);
    }
    memcpy(page + code - sizeof data, &data, sizeof data);
    put_reset_vector(page);
    uint16_t offsets[8];
    memcpy(offsets, page, sizeof offsets);
    int status = vm_boot_copy(placer->machine, SERVICES_GPA, page, sizeof page, "firmware services");
    if (status == VM_OK) status = put_vectors(placer->machine, offsets);
    return status == VM_OK ? put_data_area(placer->machine) : status;
}

/* ---- boot sectors ---- */

/* Raw images whose first sector carries the boot signature: read to 0x7C00 as a whole, so that what follows the sector is
 * there as well (there is no disk to load it from). */
bool vm_sector_recognise(const vm_image *image)
{
    uint16_t flag;
    return vm_image_u16(image, 510, &flag) && flag == 0xaa55;
}

int vm_sector_load(vm_machine *m, const vm_image *image)
{
    vm_placer placer;
    int status = vm_placer_init(&placer, m);
    if (status == VM_OK) status = vm_place_at(&placer, SECTOR_GPA, image->bytes, true, image->path);
    if (status == VM_OK) status = vm_boot_copy(m, SECTOR_GPA, image->data, image->bytes, image->path);
    vm_placer_free(&placer);
    if (status == VM_OK) vm_entry_apply(m, &(vm_entry){.kind = VM_ENTRY_REAL, .rip = SECTOR_GPA, .rsp = SECTOR_GPA}, NULL);
    return status;
}
