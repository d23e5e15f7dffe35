/* boot.c - the public boot functions: arguments checked, the image recognised, and handed to the loader of its format. */
#include "core/replay.h"
#include "boot/boot.h"

#include <libvm/boot.h>
#include <stdlib.h>
#include <string.h>

/* The struct rule of the public interface: what the caller's size covers is taken; bytes this version does not know must
 * be zero. */
static int take_struct(void *own, size_t own_bytes, const void *given, const char *name)
{
    uint32_t bytes;
    memcpy(&bytes, given, sizeof bytes);
    if (bytes < sizeof bytes || bytes > 4096) return vm_fail(VM_E_INVALID, "%s: size %u", name, bytes);
    for (size_t i = own_bytes; i < bytes; i++)
        if (((const uint8_t *)given)[i])
            return vm_fail(VM_E_INVALID, "%s: size %u with a field this version does not know", name, bytes);
    memset(own, 0, own_bytes);
    memcpy(own, given, bytes < own_bytes ? bytes : own_bytes);
    return VM_OK;
}

static int check_machine(vm_machine *m, const char *function)
{
    if (!m) return vm_fail(VM_E_INVALID, "%s: machine is NULL", function);
    if (!m->pc) return vm_fail(VM_E_UNSUPPORTED, "%s: not a PC machine", function);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i])) return vm_fail(VM_E_BUSY, "%s: vCPU %u is running", function, i);
    return vm_replay_forbids(m, function);
}

static int boot_kernel(vm_machine *m, const vm_image *kernel, const vm_boot_options *o)
{
    const char *cmdline = o->cmdline ? o->cmdline : "";
    if (vm_linux_recognise(kernel)) return vm_linux_load(m, kernel, o->initrd, cmdline, o->linux_entry);
    if (o->linux_entry)
        return vm_fail(VM_E_FORMAT, "%s: linux_entry %u, but this is no Linux kernel image", kernel->path, o->linux_entry);
    if (vm_multiboot_recognise(kernel)) return vm_multiboot_load(m, kernel, o->initrd, cmdline);
    if (vm_elf_recognise(kernel)) return vm_elf_boot(m, kernel, o->initrd, cmdline);
    if (vm_sector_recognise(kernel))
        return o->initrd ? vm_fail(VM_E_INVALID, "%s: a boot sector takes no initrd", kernel->path) : vm_sector_load(m, kernel);
    return vm_fail(VM_E_FORMAT, "%s: not a kernel image: neither Linux, Multiboot, ELF nor a boot sector", kernel->path);
}

/* ---- with firmware: the kernel is an item of the configuration device ---- */

static int give_blob(vm_machine *m, uint16_t size_key, uint16_t data_key, const void *data, uint64_t bytes)
{
    uint32_t size = (uint32_t)bytes;
    int status = vm_pc_fwcfg_item(m, size_key, &size, sizeof size);
    return status == VM_OK ? vm_pc_fwcfg_item(m, data_key, data, (size_t)bytes) : status;
}

/* Archives one after another, each padded to 4 bytes. */
static int give_initrd(vm_machine *m, const char *list, uint64_t *bytes)
{
    vm_modules archives;
    int status = vm_modules_open(&archives, list, false);
    if (status != VM_OK) return status;
    *bytes = vm_modules_bytes(&archives, 4);
    uint8_t *all = calloc(1, *bytes + 1);
    size_t at = 0;
    for (unsigned i = 0; i < archives.count && all; i++) {
        memcpy(all + at, archives.image[i].data, archives.image[i].bytes);
        at += (archives.image[i].bytes + 3) & ~UINT64_C(3);
    }
    if (!all) status = vm_fail(VM_E_NOMEM, "no memory for the initrd");
    else status = give_blob(m, VM_FWCFG_INITRD_SIZE, VM_FWCFG_INITRD_DATA, all, *bytes);
    free(all);
    vm_modules_close(&archives);
    return status;
}

/* Set-up code and kernel proper are separate items, as firmware that implements the Linux boot protocol expects. */
static int give_kernel(vm_machine *m, const vm_image *kernel, const vm_boot_options *o)
{
    const char *cmdline = o->cmdline ? o->cmdline : "";
    uint8_t sectors = 0;
    uint64_t setup = 0;
    if (vm_linux_recognise(kernel) && vm_image_u8(kernel, 0x1f1, &sectors)) setup = ((sectors ? sectors : 4u) + 1) * 512u;
    if (setup >= kernel->bytes) return vm_fail(VM_E_FORMAT, "%s: setup_sects %u lies beyond the file's end", kernel->path, sectors);
    int status = give_blob(m, VM_FWCFG_SETUP_SIZE, VM_FWCFG_SETUP_DATA, kernel->data, setup);
    if (status == VM_OK) status = give_blob(m, VM_FWCFG_KERNEL_SIZE, VM_FWCFG_KERNEL_DATA, kernel->data + setup, kernel->bytes - setup);
    if (status == VM_OK) status = give_blob(m, VM_FWCFG_CMDLINE_SIZE, VM_FWCFG_CMDLINE_DATA, cmdline, strlen(cmdline) + 1);
    uint64_t initrd_bytes = 0;
    if (status == VM_OK) status = give_initrd(m, o->initrd, &initrd_bytes);
    return status == VM_OK && setup ? vm_linux_offer(m, kernel, initrd_bytes, cmdline) : status;
}

static int boot(vm_machine *m, const vm_boot_options *o)
{
    vm_image kernel;
    int status = VM_OK;
    if (o->kernel) {
        status = vm_image_open(&kernel, o->kernel);
        if (status != VM_OK) return status;
        status = o->bios ? give_kernel(m, &kernel, o) : boot_kernel(m, &kernel, o);
        vm_image_close(&kernel);
    }
    return status == VM_OK && o->bios ? vm_bios_load(m, o->bios) : status;
}

VM_API int vm_boot_image(vm_machine *m, const vm_boot_options *options)
{
    vm_boot_options o;
    int status = check_machine(m, "vm_boot_image");
    if (status != VM_OK) return status;
    if (!options) return vm_fail(VM_E_INVALID, "vm_boot_image: options is NULL");
    if ((status = take_struct(&o, sizeof o, options, "vm_boot_options")) != VM_OK) return status;
    if (!o.kernel && !o.bios) return vm_fail(VM_E_INVALID, "vm_boot_image: neither kernel nor bios");
    if (!o.kernel && (o.initrd || o.linux_entry)) return vm_fail(VM_E_INVALID, "vm_boot_image: initrd without a kernel");
    if (o.linux_entry != 0 && o.linux_entry != 16 && o.linux_entry != 32 && o.linux_entry != 64)
        return vm_fail(VM_E_INVALID, "vm_boot_image: linux_entry %u is none of 0, 16, 32, 64", o.linux_entry);
    return boot(m, &o);
}

VM_API int vm_boot_linux(vm_machine *m, const vm_linux_boot *boot)
{
    vm_linux_boot b;
    vm_image kernel;
    int status = check_machine(m, "vm_boot_linux");
    if (status != VM_OK) return status;
    if (!boot) return vm_fail(VM_E_INVALID, "vm_boot_linux: boot is NULL");
    if ((status = take_struct(&b, sizeof b, boot, "vm_linux_boot")) != VM_OK) return status;
    if (!b.kernel) return vm_fail(VM_E_INVALID, "vm_boot_linux: kernel is NULL");
    if ((status = vm_image_open(&kernel, b.kernel)) != VM_OK) return status;
    status = vm_linux_load(m, &kernel, b.initrd, b.cmdline ? b.cmdline : "", 0);
    vm_image_close(&kernel);
    return status;
}

VM_API int vm_load_elf(vm_machine *m, const char *path, uint64_t *entry)
{
    vm_image image;
    vm_elf elf;
    if (!m || !path) return vm_fail(VM_E_INVALID, "vm_load_elf: %s is NULL", m ? "path" : "machine");
    int status = vm_replay_forbids(m, "vm_load_elf");
    if (status == VM_OK) status = vm_image_open(&image, path);
    if (status != VM_OK) return status;
    if ((status = vm_elf_open(&elf, &image)) == VM_OK) {
        status = vm_elf_load(&elf, m, NULL, NULL, NULL);
        if (status == VM_OK && entry) *entry = vm_elf_entry(&elf);
        vm_elf_close(&elf);
    }
    vm_image_close(&image);
    return status;
}

VM_API int vm_load_raw(vm_machine *m, const char *path, uint64_t gpa)
{
    vm_image image;
    if (!m || !path) return vm_fail(VM_E_INVALID, "vm_load_raw: %s is NULL", m ? "path" : "machine");
    int status = vm_replay_forbids(m, "vm_load_raw");
    if (status == VM_OK) status = vm_image_open(&image, path);
    if (status != VM_OK) return status;
    status = vm_boot_copy(m, gpa, image.data, image.bytes, path);
    vm_image_close(&image);
    return status;
}
