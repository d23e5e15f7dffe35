/* snapshot.c - fuzz target: snapshot files. The input turns a good file into a bad one, which is then loaded; what loads is
 * restored and run.
 *
 * First byte: bit 0 a compressed file, bit 1 a PC (one time in eight), bit 2 the input is the file itself, bit 3 checksums stay
 * as they were, bit 4 those of memory are not looked at (nor those of a PC's uncompressed file, which would be most of the time).
 * Otherwise the input goes on as edits: an offset (in the header or the description mostly) and what to put there. Then
 * the checksums of header and description are made right, so that what is behind them is tested.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/snapfile.h"
#include "fuzz.h"
#include "platform/pc.h"
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

const struct fuzz_target fuzz_target = { "snapshot", 3000, 64 };

enum { PACKED = 1, PC = 2, RAW = 4, AS_IT_IS = 8, UNVERIFIED = 16 };

static int device_save(void *user, void *buffer, size_t *bytes)
{
    if (buffer)
        memset(buffer, 0x5a, 16);
    *bytes = 16;
    return user ? 0 : VM_E_INVALID;
}

static int device_restore(void *user, const void *buffer, size_t bytes)
{
    return bytes == 16 && buffer ? user ? 0 : VM_E_INVALID : VM_E_FORMAT;
}

static vm_machine *make(unsigned kind)
{
    static int device;
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_machine *m;
    o.backend = VM_BACKEND_INTERP;
    o.platform = kind & PC ? VM_PLATFORM_PC : VM_PLATFORM_BARE;
    o.ram_bytes = kind & PC ? 1 << 20 : 0;
    ops.save = device_save;
    ops.restore = device_restore;
    if (vm_create(&o, &m) != VM_OK)
        abort();
    if (vm_map_pio(m, 0x4000, 8, &ops, &device, NULL) != VM_OK ||
        vm_map_ram(m, 0x10000000, 0x3000, VM_PROT_RWX, NULL) != VM_OK ||
        (!kind && vm_map_ram(m, 0x20000000, 0x20000, VM_PROT_RW, NULL) != VM_OK) ||      /* is mapped from the file */
        vm_protect(m, 0x10001000, 0x1000, VM_PROT_R) != VM_OK || vm_write(m, 0x10000000, "\xff\xc0\xeb\xfc", 4) != VM_OK)
        abort();
    vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    uint64_t rip = 0x10000000;
    vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8);
    return m;
}

/* Good files, made once a kind, and what an input makes of each: in memory the whole, in `fd` all but what was edited last. */
static struct { uint8_t *bytes, *edited; size_t count; int fd; } files[4];

static void make_file(unsigned kind)
{
    if (files[kind].bytes)
        return;
    vm_machine *m = make(kind);
    vm_snapshot *s;
    int fd = files[kind].fd = memfd_create("good", 0);
    if (fd < 0 || vm_snapshot_take(m, &s) != VM_OK)
        abort();
    if (vm_snap_save(s, fd, kind & PACKED ? VM_SNAPSHOT_COMPRESS : 0) != VM_OK && vm_snap_save(s, fd, 0) != VM_OK)
        abort();
    vm_destroy(m);
    size_t n = files[kind].count = (size_t)lseek(fd, 0, SEEK_END);
    files[kind].bytes = malloc(n);
    files[kind].edited = malloc(n);
    if (!files[kind].bytes || !files[kind].edited || pread(fd, files[kind].bytes, n, 0) != (ssize_t)n)
        abort();
    memcpy(files[kind].edited, files[kind].bytes, n);
}

static void put_right(uint8_t *file, size_t bytes)
{
    snap_header h;
    memcpy(&h, file, sizeof h);
    if (h.meta_bytes <= bytes - VM_SNAP_HEADER)
        h.meta_hash = vm_snap_hash(file + VM_SNAP_HEADER, h.meta_bytes);
    h.header_hash = vm_snap_hash(&h, offsetof(snap_header, header_hash));
    memcpy(file, &h, sizeof h);
}

typedef struct edits { size_t bytes; /* that the file has then */ unsigned count; struct { size_t at, n; } list[64]; } edits;

/* One, from the input. */
static void edit(unsigned kind, edits *es, fuzz_input *in)
{
    snap_header h;
    memcpy(&h, files[kind].edited, sizeof h);
    const uint64_t room = es->bytes - VM_SNAP_HEADER, meta = h.meta_bytes < room ? h.meta_bytes : room;
    uint8_t how = (uint8_t)fuzz_bits(in, 1);
    uint64_t at = fuzz_bits(in, 2), value = fuzz_number(in);
    switch (how & 7) {
    case 0: at %= sizeof h; break;
    case 1: es->bytes -= at % 4096 < room ? at % 4096 : 0; return;
    case 2: at = VM_SNAP_HEADER + at % es->bytes; break;
    default: at = VM_SNAP_HEADER + (meta ? at % meta : 0);
    }
    if (how & 8)
        at &= ~UINT64_C(7);
    unsigned n = 1u << (how >> 4 & 3);
    if (at + n > es->bytes || es->count == sizeof es->list / sizeof *es->list)
        return;
    memcpy(files[kind].edited + at, &value, n);
    es->list[es->count].at = at;
    es->list[es->count++].n = n;
}

static void write_at(int fd, const uint8_t *file, size_t at, size_t n)
{
    if (n && pwrite(fd, file + at, n, (off_t)at) != (ssize_t)n)
        abort();
}

/* Header and description as they are now, and the other edits; or all that was edited as it was. */
static void write_edits(unsigned kind, const edits *es, const uint8_t *from)
{
    snap_header h;
    const int fd = files[kind].fd;
    memcpy(&h, files[kind].bytes, sizeof h);
    size_t head = h.data_offset < es->bytes ? h.data_offset : es->bytes;
    write_at(fd, from, 0, head);
    for (unsigned i = 0; i < es->count; i++)
        if (es->list[i].at + es->list[i].n > head && es->list[i].at + es->list[i].n <= es->bytes)
            write_at(fd, from, es->list[i].at, es->list[i].n);
    if (ftruncate(fd, (off_t)es->bytes))
        abort();
}

static void undo(unsigned kind, const edits *es)
{
    const size_t all = files[kind].count;
    memcpy(files[kind].edited, files[kind].bytes, VM_SNAP_HEADER);      /* checksums, too */
    for (unsigned i = 0; i < es->count; i++)
        memcpy(files[kind].edited + es->list[i].at, files[kind].bytes + es->list[i].at, es->list[i].n);
    write_edits(kind, es, files[kind].bytes);
    write_at(files[kind].fd, files[kind].bytes, es->bytes, all - es->bytes);
}

/* A machine of each kind, kept and put back: making it takes far longer than an input. */
static struct { vm_machine *m; vm_snapshot *fresh; } kept[4];

static vm_machine *fresh_machine(unsigned kind)
{
    if (!kept[kind].m) {
        kept[kind].m = make(kind);
        if (vm_snapshot_take(kept[kind].m, &kept[kind].fresh) != VM_OK)
            abort();
    }
    return kept[kind].m;
}

static void live(vm_machine *m, vm_snapshot *s)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint8_t byte = 1;
    o.max_instructions = 100;
    o.deadline_ns = 20000;
    vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e);
    vm_write(m, 0x10000000, &byte, 1);
    vm_snapshot_restore(m, s);
    vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e);
}

static void try(unsigned kind, int fd, unsigned flags)
{
    vm_machine *m = fresh_machine(kind);
    vm_snapshot *s = NULL;
    int status = vm_snap_load(m, fd, flags, &s);
    if ((status == VM_OK) != (s != NULL))
        abort();
    if (status == VM_OK && vm_snapshot_restore(m, s) == VM_OK)
        live(m, s);
    /* Away from the file before the next input changes it. */
    if (vm_snapshot_restore(m, kept[kind].fresh) != VM_OK)
        abort();
    vm_snapshot_free(s);
}

static void try_raw(unsigned kind, const fuzz_input *in)
{
    static int fd = -1;
    if (fd < 0)
        fd = memfd_create("raw", 0);
    if (fd < 0 || ftruncate(fd, (off_t)in->left))
        abort();
    write_at(fd, in->data, 0, in->left);
    try(kind, fd, 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = { data, size };
    uint8_t how = (uint8_t)fuzz_bits(&in, 1);
    if (!fuzz_seldom(data, size, 8))
        how &= (uint8_t)~PC;
    const uint8_t kind = how & (PC | PACKED);
    if (how & RAW) {
        try_raw(kind, &in);
        return 0;
    }
    make_file(kind);
    edits es = { .bytes = files[kind].count };
    while (in.left)
        edit(kind, &es, &in);
    if (!(how & AS_IT_IS))
        put_right(files[kind].edited, es.bytes);
    write_edits(kind, &es, files[kind].edited);
    try(kind, files[kind].fd, how & UNVERIFIED || kind == PC ? VM_SNAPSHOT_NO_VERIFY : 0);
    undo(kind, &es);
    return 0;
}
