/* fwcfg.c - the firmware configuration device at 0x510-0x51b: selector, data port, DMA (QEMU's documented interface).
 *
 * Items are read-only to the guest. DMA reads each field of its descriptor once, moves at most what the item holds (zeros
 * beyond its end, up to ZEROS), and touches RAM only.
 *
 * Invariants: `select` names a slot of the table below or none; `offset` never passes an item's end by more than wrapping
 * allows, it is compared, not indexed with.
 */
#include "dev/dev.h"
#include <stdlib.h>
#include <string.h>

enum { FWCFG_VERSION = 1, FILE_FIRST = 0x20, FILE_SLOTS = 32, ITEMS = FILE_FIRST + FILE_SLOTS, ARCH = 0x8000, ARCH_ITEMS = 8 };
enum { DMA_ERROR = 1, DMA_READ = 2, DMA_SKIP = 4, DMA_SELECT = 8, DMA_WRITE = 16 };
#define ZEROS (UINT32_C(16) << 20)
#define FILE_NAME 56

typedef struct item { uint8_t *data; size_t bytes; } item;

struct vm_fwcfg {
    vm_machine *machine;
    item items[ITEMS + ARCH_ITEMS];
    char names[FILE_SLOTS][FILE_NAME];
    unsigned files;
    struct { uint32_t version; uint16_t select; uint32_t offset; uint64_t dma; } s;
};

static item *find(vm_fwcfg *f, uint16_t key)
{
    key &= 0xbfff;                         /* bit 14 asked for writing, once */
    if (key < ITEMS)
        return &f->items[key];
    if (key >= ARCH && key < ARCH + ARCH_ITEMS)
        return &f->items[ITEMS + key - ARCH];
    return NULL;
}

int vm_fwcfg_item(vm_fwcfg *f, uint16_t key, const void *data, size_t bytes)
{
    item *it = find(f, key);
    if (!it)
        return vm_fail(VM_E_INVALID, "fw_cfg key 0x%x does not exist", key);
    if (bytes > UINT32_MAX)
        return vm_fail(VM_E_INVALID, "fw_cfg item of %zu bytes is too large", bytes);
    uint8_t *copy = malloc(bytes ? bytes : 1);
    if (!copy)
        return vm_fail(VM_E_NOMEM, "fw_cfg item of %zu bytes: out of memory", bytes);
    if (bytes)
        memcpy(copy, data, bytes);
    free(it->data);
    *it = (item){ copy, bytes };
    return VM_OK;
}

static void put_be32(uint8_t *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); }
static void put_be16(uint8_t *p, uint16_t v) { v = __builtin_bswap16(v); memcpy(p, &v, 2); }

static int rebuild_directory(vm_fwcfg *f)
{
    uint8_t dir[4 + 64 * FILE_SLOTS] = { 0 };
    put_be32(dir, f->files);
    for (unsigned i = 0; i < f->files; i++) {
        uint8_t *e = dir + 4 + 64 * i;
        put_be32(e, (uint32_t)f->items[FILE_FIRST + i].bytes);
        put_be16(e + 4, (uint16_t)(FILE_FIRST + i));
        memcpy(e + 8, f->names[i], FILE_NAME);
    }
    return vm_fwcfg_item(f, VM_FWCFG_FILE_DIR, dir, 4 + 64 * f->files);
}

int vm_fwcfg_file(vm_fwcfg *f, const char *name, const void *data, size_t bytes)
{
    size_t length = strlen(name);
    if (length >= FILE_NAME)
        return vm_fail(VM_E_INVALID, "fw_cfg file name of %zu bytes is longer than %d", length, FILE_NAME - 1);
    unsigned i = 0;
    while (i < f->files && strcmp(f->names[i], name))
        i++;
    if (i == FILE_SLOTS)
        return vm_fail(VM_E_NOMEM, "fw_cfg directory is full (%d files)", FILE_SLOTS);
    int status = vm_fwcfg_item(f, (uint16_t)(FILE_FIRST + i), data, bytes);
    if (status)
        return status;
    if (i == f->files) {
        memcpy(f->names[i], name, length + 1);
        f->files++;
    }
    return rebuild_directory(f);
}

/* ---- registers ---- */
static void select_item(vm_fwcfg *f, uint16_t key)
{
    f->s.select = key;
    f->s.offset = 0;
}

static uint8_t next_byte(vm_fwcfg *f)
{
    const item *it = find(f, f->s.select);
    if (!it || f->s.offset >= it->bytes)
        return 0;
    return it->data[f->s.offset++];
}

/* Copy n bytes of the selected item (zeros past its end) to guest memory. */
static bool dma_out(vm_fwcfg *f, uint64_t gpa, uint32_t n)
{
    static const uint8_t zeros[4096];
    const item *it = find(f, f->s.select);
    uint32_t left = it && f->s.offset < it->bytes ? (uint32_t)it->bytes - f->s.offset : 0;
    uint32_t real = n < left ? n : left;
    if (n - real > ZEROS)
        return false;
    if (real && !vm_dma_write(f->machine, gpa, it->data + f->s.offset, real))
        return false;
    f->s.offset += real;
    for (uint32_t done = real; done < n;) {
        uint32_t chunk = n - done < sizeof zeros ? n - done : (uint32_t)sizeof zeros;
        if (!vm_dma_write(f->machine, gpa + done, zeros, chunk))
            return false;
        done += chunk;
    }
    return true;
}

static void dma_run(vm_fwcfg *f, uint64_t at)
{
    struct { uint32_t control, length; uint64_t address; } d;
    if (!vm_dma_read(f->machine, at, &d, sizeof d))
        return;                            /* nowhere to report */
    uint32_t control = __builtin_bswap32(d.control), length = __builtin_bswap32(d.length), result = 0;
    uint64_t address = __builtin_bswap64(d.address);
    if (control & DMA_SELECT)
        select_item(f, (uint16_t)(control >> 16));
    if (control & DMA_READ) {
        if (!dma_out(f, address, length))
            result = DMA_ERROR;
    } else if (control & DMA_WRITE) {
        result = DMA_ERROR;                /* no item is writable */
    } else if (control & DMA_SKIP) {
        f->s.offset = length > UINT32_MAX - f->s.offset ? UINT32_MAX : f->s.offset + length;
    }
    result = __builtin_bswap32(result);
    vm_dma_write(f->machine, at, &result, sizeof result);
}

static int fwcfg_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    vm_fwcfg *f = user;
    (void)cpu;
    uint64_t v = 0;
    if (offset == 1) {
        v = next_byte(f);                  /* the data register is one byte wide */
    } else if (offset >= 4) {              /* "QEMU CFG", big-endian: bytes in address order */
        for (unsigned i = 0; i < width && offset + i < 12; i++)
            v |= (uint64_t)(uint8_t)"QEMU CFG"[offset - 4 + i] << (8 * i);
    }
    *value = v;
    return VM_OK;
}

static int fwcfg_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_fwcfg *f = user;
    (void)cpu;
    if (offset == 0 && width == 2) {
        select_item(f, (uint16_t)value);
    } else if (offset == 4 && width == 4) {
        f->s.dma = (uint64_t)__builtin_bswap32((uint32_t)value) << 32;
    } else if (offset == 8 && width == 4) {
        uint64_t at = f->s.dma | __builtin_bswap32((uint32_t)value);
        f->s.dma = 0;
        dma_run(f, at);
    }
    return VM_OK;
}

static void fwcfg_reset(void *user)
{
    vm_fwcfg *f = user;
    f->s.version = FWCFG_VERSION;
    f->s.dma = 0;
    select_item(f, 0);
}

static int fwcfg_save(void *user, void *buffer, size_t *bytes)
{
    vm_fwcfg *f = user;
    return vm_dev_save(&f->s, sizeof f->s, buffer, bytes);
}

static int fwcfg_restore(void *user, const void *buffer, size_t bytes)
{
    vm_fwcfg *f = user;
    return vm_dev_load(&f->s, sizeof f->s, FWCFG_VERSION, buffer, bytes);
}

int vm_fwcfg_copy(vm_fwcfg *to, const vm_fwcfg *from)
{
    for (unsigned i = 0; i < ITEMS + ARCH_ITEMS; i++) {
        const item *it = &from->items[i];
        uint8_t *copy = it->data ? malloc(it->bytes ? it->bytes : 1) : NULL;
        if (it->data && !copy)
            return vm_fail(VM_E_NOMEM, "fw_cfg item of %zu bytes: out of memory", it->bytes);
        if (it->bytes && copy)
            memcpy(copy, it->data, it->bytes);
        free(to->items[i].data);
        to->items[i] = (item){ copy, it->bytes };
    }
    memcpy(to->names, from->names, sizeof to->names);
    to->files = from->files;
    return VM_OK;
}

static void fwcfg_destroy(void *user)
{
    vm_fwcfg *f = user;
    for (unsigned i = 0; i < ITEMS + ARCH_ITEMS; i++)
        free(f->items[i].data);
    free(f);
}

int vm_fwcfg_new(vm_machine *m, vm_fwcfg **out)
{
    static const vm_io_ops ops = { sizeof(vm_io_ops), fwcfg_read, fwcfg_write, fwcfg_reset, fwcfg_save, fwcfg_restore,
                                   fwcfg_destroy };
    static const uint32_t id = 3;          /* traditional interface and DMA */
    vm_fwcfg *f = calloc(1, sizeof *f);
    if (!f)
        return vm_fail(VM_E_NOMEM, "fw_cfg: out of memory");
    f->machine = m;
    fwcfg_reset(f);
    int status = vm_fwcfg_item(f, VM_FWCFG_SIGNATURE, "QEMU", 4);
    if (!status)
        status = vm_fwcfg_item(f, VM_FWCFG_ID, &id, sizeof id);
    if (!status)
        status = rebuild_directory(f);
    if (!status)
        status = vm_add_pio(m, 0x510, 12, &ops, f, NULL);
    if (status) {
        fwcfg_destroy(f);
        return status;
    }
    *out = f;
    return VM_OK;
}
