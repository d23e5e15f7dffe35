/* tables.h - the ACPI, MP and SMBIOS tables of the PC. */
#ifndef LIBVM_PLATFORM_TABLES_H
#define LIBVM_PLATFORM_TABLES_H
#include "core/core.h"

typedef struct vm_tables_info {
    unsigned cpus;
    uint64_t low_end;                /* RAM below 4 GiB: PCI memory begins there */
    uint64_t high_first, high_last;  /* 64-bit PCI memory window; last 0: none */
    uint64_t ram_bytes;
    uint32_t cpu_signature, cpu_features;   /* CPUID 1 EAX, EDX for the MP table */
} vm_tables_info;

/* One image with every ACPI table but the RSDP; pointers in it are offsets until `reloc` adds the image's address. */
typedef struct vm_tables {
    uint8_t *image;
    size_t bytes;
    struct { uint32_t at; uint8_t width; } reloc[64];
    unsigned relocs;
    struct { uint32_t at, start, length; } checksum[16];     /* in the order to apply them */
    unsigned checksums;
    uint32_t rsdt, xsdt;             /* offsets */
} vm_tables;

int  vm_tables_build(const vm_tables_info *info, vm_tables *out);   /* VM_OK or VM_E_NOMEM */
void vm_tables_free(vm_tables *t);
/* Where everything lies and sums to zero: copy with the image at `base`. */
void vm_tables_place(const vm_tables *t, uint64_t base, uint8_t *to);
#define VM_RSDP_BYTES 36
void vm_tables_rsdp(uint64_t rsdt, uint64_t xsdt, bool with_checksums, uint8_t to[VM_RSDP_BYTES]);
/* QEMU's "etc/table-loader" script that makes firmware place files etc/acpi/tables and etc/acpi/rsdp. Caller frees. */
int  vm_tables_loader(const vm_tables *t, uint8_t **script, size_t *bytes);
/* MP floating pointer and configuration table for address `base` (16-byte aligned); returns bytes used, 0 when max is too small. */
size_t vm_tables_mp(const vm_tables_info *info, uint64_t base, uint8_t *to, size_t max);
/* SMBIOS 2.8 (smbios.c): the entry point and the structure table for `address` (firmware sets its own). Caller frees the table. */
#define VM_SMBIOS_ANCHOR 31
int  vm_tables_smbios(const vm_tables_info *info, uint64_t address, uint8_t anchor[VM_SMBIOS_ANCHOR], uint8_t **table,
                      size_t *bytes);
#endif
