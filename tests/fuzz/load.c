/* load.c - fuzz target: loaders. Byte 0 of the input chooses the loader, and what the file begins with if the input is not to
 * find that out by itself; the rest is the file. Linux, Multiboot, ELF, boot sector, raw, firmware, snapshot, replay log.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "fuzz.h"
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

const struct fuzz_target fuzz_target = { "load", 3000, 8192 };

enum { MOST = 1 << 16 };

/* A file that is only in memory, kept, and its name. */
static bool give_file(const uint8_t *data, size_t size, int *fd, char *path, size_t room)
{
    if (*fd < 0) {
        *fd = memfd_create("fuzz", 0);
        snprintf(path, room, "/proc/self/fd/%d", *fd);
    }
    return *fd >= 0 && ftruncate(*fd, (off_t)size) == 0 && pwrite(*fd, data, size, 0) == (ssize_t)size &&
        lseek(*fd, 0, SEEK_SET) == 0;
}

/* Puts what a loader looks for where it looks, so that inputs get past the first check. */
static void disguise(uint8_t *file, size_t size, unsigned kind)
{
    static const uint8_t multiboot[12] = { 0x02, 0xb0, 0xad, 0x1b, 0, 0, 0, 0, 0xfe, 0x4f, 0x52, 0xe4 };
    switch (kind) {
    case 1:
        if (size > 0x206) {
            memcpy(file + 0x1fe, "\x55\xaa", 2);
            memcpy(file + 0x202, "HdrS", 4);
        }
        break;
    case 2:
        if (size > 12)
            memcpy(file, multiboot, 12);
        break;
    case 3:
    case 7:
        if (size > 20) {
            bool is_64 = file[4] & 1;
            memcpy(file, is_64 ? "\x7f" "ELF\2\1\1" : "\x7f" "ELF\1\1\1", 7);
            memcpy(file + 16, is_64 ? "\2\0\x3e" : "\2\0\3", 4);
        }
        break;
    case 4:
        if (size >= 512)
            memcpy(file + 510, "\x55\xaa", 2);
        break;
    default:
        break;
    }
}

/* A Linux image that is long enough, of zeros but for a setup header that the input is. */
static size_t make_linux(uint8_t *file, const uint8_t *data, size_t size)
{
    enum { BYTES = 0x2000, HEADER = 0x1f1, MOST_HEADER = 0x7f };
    memset(file, 0, BYTES);
    memcpy(file + HEADER, data, size < MOST_HEADER ? size : MOST_HEADER);
    disguise(file, BYTES, 1);
    if (size > MOST_HEADER)
        memcpy(file + 0x400, data + MOST_HEADER, size - MOST_HEADER < 0x1000 ? size - MOST_HEADER : 0x1000);
    return BYTES;
}

static void boot(vm_machine *m, unsigned kind, const char *path, unsigned variant, bool is_run)
{
    vm_boot_options options = VM_BOOT_OPTIONS_INIT;
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    options.kernel = kind == 5 ? NULL : path;
    options.bios = kind == 5 ? path : NULL;
    options.initrd = variant & 1 ? path : NULL;
    options.cmdline = variant & 2 ? "console=ttyS0" : NULL;
    options.linux_entry = variant & 4 ? 32 : variant & 8 ? 64 : 0;
    run.max_instructions = 50;
    run.deadline_ns = 20000;           /* a wait for an interrupt that does not come */
    if (vm_boot_image(m, &options) == VM_OK && is_run)
        vm_vcpu_run(vm_vcpu_get(m, 0), &run, NULL);
}

/* A machine of each kind, kept and put back: making it takes far longer than an input. */
static vm_machine *fresh_machine(bool is_pc)
{
    static struct { vm_machine *m; vm_snapshot *fresh; } kept[2];
    vm_options options = VM_OPTIONS_INIT;
    options.backend = VM_BACKEND_INTERP;
    options.platform = is_pc ? VM_PLATFORM_PC : VM_PLATFORM_BARE;
    options.ram_bytes = is_pc ? 4 << 20 : 0;
    if (!kept[is_pc].m) {
        if (vm_create(&options, &kept[is_pc].m) != VM_OK)
            abort();
        if (!is_pc && vm_map_ram(kept[is_pc].m, 0, 1 << 20, VM_PROT_RWX, NULL) != VM_OK)
            abort();
        if (vm_snapshot_take(kept[is_pc].m, &kept[is_pc].fresh) != VM_OK)
            abort();
    } else if (vm_snapshot_restore(kept[is_pc].m, kept[is_pc].fresh) != VM_OK) {
        abort();
    }
    return kept[is_pc].m;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t file[MOST];
    static char path[64];
    static int fd = -1;
    if (size < 2)
        return 0;
    const bool is_run = fuzz_seldom(data, size, 4);
    unsigned kind = data[0] & 15, variant = data[0] >> 4;
    size = size - 1 < MOST ? size - 1 : MOST;
    if (kind == 6) {
        size = make_linux(file, data + 1, size);
    } else {
        memcpy(file, data + 1, size);
        disguise(file, size, kind);
    }
    vm_machine *m = fresh_machine(kind != 7 && kind != 8);
    if (!give_file(file, size, &fd, path, sizeof path))
        abort();
    if (kind <= 6) {
        boot(m, kind, path, variant, is_run);
    } else if (kind <= 8) {
        vm_load_elf(m, path, NULL);
    } else if (kind == 9) {
        vm_load_raw(m, path, variant ? (uint64_t)data[1] << (variant * 4) : 0x1000);
    } else if (kind == 10) {
        vm_replay(m, fd);
        vm_replay_stop(m);
    } else {
        vm_snapshot *s = NULL;
        vm_snapshot_load(m, fd, &s);
        vm_snapshot_free(s);
    }
    return 0;
}
