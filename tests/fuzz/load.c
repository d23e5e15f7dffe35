/* load.c - fuzz target: loaders. Byte 0 of the input chooses the loader, and what the file begins with if the input is not to
 * find that out by itself; the rest is the file. Linux, Multiboot, ELF, boot sector, raw, firmware, snapshot, replay log.
 */
#include "fuzz.h"
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

const struct fuzz_target fuzz_target = { "load", 300, 8192 };

enum { MOST = 1 << 16 };

/* A file that is only in memory, and its name. */
static int make_file(const uint8_t *data, size_t size, char *path, size_t room)
{
    int fd = memfd_create("fuzz", 0);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size || lseek(fd, 0, SEEK_SET) != 0) {
        close(fd);
        return -1;
    }
    snprintf(path, room, "/proc/self/fd/%d", fd);
    return fd;
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
        if (size > 20)
            memcpy(file, file[4] & 1 ? "\x7f" "ELF\2\1\1" : "\x7f" "ELF\1\1\1", 7), file[16] = 2, file[17] = 0, file[18] = file[4] & 1 ? 62 : 3, file[19] = 0;
        break;
    case 4:
        if (size >= 512)
            memcpy(file + 510, "\x55\xaa", 2);
        break;
    default:
        break;
    }
}

static void boot(vm_machine *m, unsigned kind, const char *path, unsigned variant)
{
    vm_boot_options options = VM_BOOT_OPTIONS_INIT;
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    options.kernel = kind == 5 ? NULL : path;
    options.bios = kind == 5 ? path : NULL;
    options.initrd = variant & 1 ? path : NULL;
    options.cmdline = variant & 2 ? "console=ttyS0" : NULL;
    options.linux_entry = variant & 4 ? 32 : variant & 8 ? 64 : 0;
    run.max_instructions = 50;
    if (vm_boot_image(m, &options) == VM_OK)
        vm_vcpu_run(vm_vcpu_get(m, 0), &run, NULL);
}

/* A snapshot of the same machine, with part of it overwritten by the input. */
static void load_snapshot(vm_machine *m, const uint8_t *data, size_t size)
{
    vm_snapshot *s = NULL, *loaded = NULL;
    int fd = memfd_create("snapshot", 0);
    uint32_t at;
    if (fd < 0)
        return;
    if (vm_snapshot_take(m, &s) == VM_OK && vm_snapshot_save(s, fd) == VM_OK) {
        for (; size >= 5; data += 5, size -= 5) {
            off_t length = lseek(fd, 0, SEEK_END);
            memcpy(&at, data, 4);
            /* mostly in what describes it, which comes first */
            if (length <= 0 || pwrite(fd, data + 4, 1, at & 0x80000000 ? (off_t)(at & 0x7fffffff) % length : at % 4096) != 1)
                break;
        }
        lseek(fd, 0, SEEK_SET);
        if (vm_snapshot_load(m, fd, &loaded) == VM_OK && vm_snapshot_restore(m, loaded) == VM_OK) {
            vm_run_options run = VM_RUN_OPTIONS_INIT;
            run.max_instructions = 50;
            vm_vcpu_run(vm_vcpu_get(m, 0), &run, NULL);
        }
    }
    vm_snapshot_free(loaded);
    vm_snapshot_free(s);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t file[MOST];
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    char path[64];
    if (size < 2)
        return 0;
    unsigned kind = data[0] & 15, variant = data[0] >> 4;
    size = size - 1 < MOST ? size - 1 : MOST;
    memcpy(file, data + 1, size);
    disguise(file, size, kind);
    options.backend = VM_BACKEND_INTERP;
    options.platform = kind == 8 ? VM_PLATFORM_BARE : VM_PLATFORM_PC;
    options.ram_bytes = kind == 8 ? 0 : 4 << 20;
    if (vm_create(&options, &m) != VM_OK)
        return 0;
    if (kind == 8)
        vm_map_ram(m, 0, 1 << 20, VM_PROT_RWX, NULL);
    int fd = make_file(file, size, path, sizeof path);
    if (fd >= 0) {
        if (kind <= 5)
            boot(m, kind, path, variant);
        else if (kind == 6 || kind == 7)
            load_snapshot(m, file, size);
        else if (kind == 8)
            vm_load_elf(m, path, NULL);
        else if (kind == 9)
            vm_load_raw(m, path, variant ? (uint64_t)data[1] << (variant * 4) : 0x1000);
        else if (kind == 10)
            vm_replay(m, fd);
        else {
            vm_snapshot *s = NULL;
            vm_snapshot_load(m, fd, &s);
            vm_snapshot_free(s);
        }
        close(fd);
    }
    vm_destroy(m);
    return 0;
}
