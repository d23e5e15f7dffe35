/* boot.h - loading guests, and the console.
 *
 * Boot functions prepare memory and vCPU 0 of a PC machine that has not run yet; vm_vcpu_run() then starts the guest.
 * Images are files of the host, read during the call. VM_E_HOST: a file cannot be read; VM_E_FORMAT: it is not what
 * it should be (the message names the field and its value); VM_E_NOMEM: guest RAM is too small for it;
 * VM_E_UNSUPPORTED: not a PC machine.
 */
#ifndef LIBVM_INCLUDE_BOOT_H
#define LIBVM_INCLUDE_BOOT_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What to boot. Without kernel and bios there is nothing to boot: VM_E_INVALID. */
typedef struct vm_boot_options {
    uint32_t    size;                   /* sizeof(vm_boot_options): VM_BOOT_OPTIONS_INIT */
    const char *kernel;                 /* recognised by its content, in this order: Linux bzImage or zImage, Multiboot 1, ELF
                                           with PVH note, other ELF, boot sector (raw image with 55 AA at offset 510, started
                                           at 0:7C00 in real mode) */
    const char *initrd;                 /* a file, or several separated by commas; NULL: none. Linux takes them as one archive
                                           after the other; for Multiboot and PVH each is a module, and what follows the first
                                           space in an entry is its command line ("mod1 args,mod2") */
    const char *cmdline;                /* NULL: empty */
    const char *bios;                   /* firmware image mapped below 4 GiB and started at the reset vector; with a kernel too,
                                           UEFI finds that through fw_cfg, and a BIOS an option ROM that starts it (a
                                           Linux kernel that goes to 1 MiB) */
    uint32_t    linux_entry;            /* 16, 32 or 64: start a Linux kernel there; 0: the best it has */
} vm_boot_options;
#define VM_BOOT_OPTIONS_INIT VM_STRUCT_INIT(vm_boot_options)
VM_API int vm_boot_image(vm_machine *m, const vm_boot_options *options);

/* Linux by its boot protocol: 64- or 32-bit entry as the kernel offers. */
typedef struct vm_linux_boot {
    uint32_t    size;                   /* sizeof(vm_linux_boot): VM_LINUX_BOOT_INIT */
    const char *kernel, *initrd, *cmdline;              /* initrd and cmdline may be NULL */
} vm_linux_boot;
#define VM_LINUX_BOOT_INIT VM_STRUCT_INIT(vm_linux_boot)
VM_API int vm_boot_linux(vm_machine *m, const vm_linux_boot *boot);

/* Copies an ELF file's segments to their physical addresses in RAM; *entry (may be NULL) gets the entry point. Any
 * machine; no register is changed. */
VM_API int vm_load_elf(vm_machine *m, const char *path, uint64_t *entry);
/* Copies a whole file into RAM at gpa. Any machine. */
VM_API int vm_load_raw(vm_machine *m, const char *path, uint64_t gpa);

/* Bytes the guest sends on a serial port (or the debug console), as they come, 1 or more. Called on a vCPU's thread
 * with the device lock held; must not block for long. */
typedef void (*vm_console_fn)(void *user, const uint8_t *bytes, size_t count);
/* Sets where the output of serial port `index` (0-3) goes; fn NULL: nowhere. Any thread. VM_E_UNSUPPORTED on BARE
 * machines. */
VM_API int vm_serial_output(vm_machine *m, unsigned index, vm_console_fn fn, void *user);
/* Gives input to serial port `index`. Returns how many bytes were taken (the queue is bounded: offer the rest later),
 * or a negative status. Any thread. */
VM_API int vm_serial_input(vm_machine *m, unsigned index, const uint8_t *bytes, size_t count);
/* Output of the debug console, port 0xE9. */
VM_API int vm_debugcon_output(vm_machine *m, vm_console_fn fn, void *user);

#ifdef __cplusplus
}
#endif
#endif
