/* snapshot.c - fuzz target: snapshot files. The input turns a good file into a bad one, which is then loaded; what loads is
 * restored and run.
 *
 * First byte: bit 0 a compressed file, bit 1 a PC, bit 2 the input is the file itself; bit 3 checksums stay as they were.
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

static vm_machine *make(bool is_pc)
{
    static int device;
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_machine *m;
    o.backend = VM_BACKEND_INTERP;
    o.platform = is_pc ? VM_PLATFORM_PC : VM_PLATFORM_BARE;
    o.ram_bytes = is_pc ? 1 << 20 : 0;
    ops.save = device_save;
    ops.restore = device_restore;
    if (vm_create(&o, &m) != VM_OK)
        abort();
    if (vm_map_pio(m, 0x4000, 8, &ops, &device, NULL) != VM_OK ||
        vm_map_ram(m, 0x10000000, 0x3000, VM_PROT_RWX, NULL) != VM_OK ||
        vm_protect(m, 0x10001000, 0x1000, VM_PROT_R) != VM_OK || vm_write(m, 0x10000000, "\xff\xc0\xeb\xfc", 4) != VM_OK)
        abort();
    vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64);
    uint64_t rip = 0x10000000;
    vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8);
    return m;
}

static uint8_t *good[4];
static size_t good_bytes[4];

/* Made once a kind; files are small. */
static void make_good(unsigned kind)
{
    if (good[kind])
        return;
    vm_machine *m = make(kind & 2);
    vm_snapshot *s;
    int fd = memfd_create("good", 0);
    if (fd < 0 || vm_snapshot_take(m, &s) != VM_OK)
        abort();
    if (vm_snap_save(s, fd, kind & 1 ? VM_SNAPSHOT_COMPRESS : 0) != VM_OK && vm_snap_save(s, fd, 0) != VM_OK)
        abort();
    vm_destroy(m);
    off_t n = lseek(fd, 0, SEEK_END);
    good[kind] = malloc((size_t)n);
    if (!good[kind] || pread(fd, good[kind], (size_t)n, 0) != n)
        abort();
    good_bytes[kind] = (size_t)n;
    close(fd);
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

static void edit(uint8_t *file, size_t *bytes, fuzz_input *in)
{
    snap_header h;
    memcpy(&h, file, sizeof h);
    uint64_t meta = h.meta_bytes < *bytes - VM_SNAP_HEADER ? h.meta_bytes : *bytes - VM_SNAP_HEADER;
    uint8_t how = (uint8_t)fuzz_bits(in, 1);
    uint64_t at = fuzz_bits(in, 2), value = fuzz_number(in);
    switch (how & 7) {
    case 0: at %= sizeof h; break;
    case 1: *bytes -= at % 4096 < *bytes - VM_SNAP_HEADER ? at % 4096 : 0; return;
    case 2: at = VM_SNAP_HEADER + at % *bytes; break;
    default: at = VM_SNAP_HEADER + (meta ? at % meta : 0);
    }
    if (how & 8)
        at &= ~UINT64_C(7);
    unsigned n = 1u << (how >> 4 & 3);
    if (at + n <= *bytes)
        memcpy(file + at, &value, n);
}

/* A machine of each kind, kept and put back: making it takes far longer than an input. */
static struct { vm_machine *m; vm_snapshot *fresh; } kept[2];

static vm_machine *fresh_machine(bool is_pc)
{
    if (!kept[is_pc].m) {
        kept[is_pc].m = make(is_pc);
        if (vm_snapshot_take(kept[is_pc].m, &kept[is_pc].fresh) != VM_OK)
            abort();
    }
    return kept[is_pc].m;
}

static void live(vm_machine *m, vm_snapshot *s)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint8_t byte = 1;
    o.max_instructions = 100;
    o.deadline_ns = 1000 * 1000;
    vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e);
    vm_write(m, 0x10000000, &byte, 1);
    vm_snapshot_restore(m, s);
    vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e);
}

static void try(bool is_pc, const uint8_t *file, size_t bytes)
{
    static int fd = -1;
    vm_machine *m = fresh_machine(is_pc);
    vm_snapshot *s = NULL;
    if (fd < 0)
        fd = memfd_create("fuzzed", 0);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) || pwrite(fd, file, bytes, 0) != (ssize_t)bytes || lseek(fd, 0, SEEK_SET))
        abort();
    int status = vm_snapshot_load(m, fd, &s);
    if ((status == VM_OK) != (s != NULL))
        abort();
    if (status == VM_OK && vm_snapshot_restore(m, s) == VM_OK)
        live(m, s);
    /* Away from the file before the next input changes it. */
    if (vm_snapshot_restore(m, kept[is_pc].fresh) != VM_OK)
        abort();
    vm_snapshot_free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t file[1 << 20];
    fuzz_input in = { data, size };
    uint8_t kind = (uint8_t)fuzz_bits(&in, 1);
    if (kind & 4) {
        try(kind & 2, in.data, in.left);
        return 0;
    }
    make_good(kind & 3);
    size_t bytes = good_bytes[kind & 3];
    if (bytes > sizeof file)
        abort();
    memcpy(file, good[kind & 3], bytes);
    while (in.left)
        edit(file, &bytes, &in);
    if (!(kind & 8))
        put_right(file, bytes);
    try(kind & 2, file, bytes);
    return 0;
}
