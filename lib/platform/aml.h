/* aml.h - a small emitter for ACPI machine language (ACPI 6, chapter 20).
 *
 * Objects are written front to back. Constructs with a PkgLength are opened with vm_aml_open and closed with vm_aml_close,
 * which makes room for the length. Errors (out of memory) stick: check `failed` once at the end.
 */
#ifndef LIBVM_PLATFORM_AML_H
#define LIBVM_PLATFORM_AML_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct vm_aml {
    uint8_t *data;
    size_t bytes, capacity;
    size_t open[16];                 /* where each open package's length belongs */
    unsigned depth;
    bool failed;
} vm_aml;

void vm_aml_bytes(vm_aml *a, const void *data, size_t bytes);
void vm_aml_byte(vm_aml *a, uint8_t value);
void vm_aml_name(vm_aml *a, const char *path);               /* "\\_SB", "PCI0", "_SB.PCI0"; segments are padded with _ */
void vm_aml_integer(vm_aml *a, uint64_t value);              /* shortest encoding */
void vm_aml_string(vm_aml *a, const char *text);
uint32_t vm_aml_eisa(const char *id);                        /* "PNP0A03" */

/* Everything up to vm_aml_close lies inside. */
void vm_aml_scope(vm_aml *a, const char *path);
void vm_aml_device(vm_aml *a, const char *name);
void vm_aml_method(vm_aml *a, const char *name, unsigned args);
void vm_aml_if(vm_aml *a);                                   /* predicate follows, then the body */
void vm_aml_package(vm_aml *a, unsigned count);              /* as a term: Name it first */
void vm_aml_close(vm_aml *a);

void vm_aml_define(vm_aml *a, const char *name);             /* Name(name, <next term>) */
void vm_aml_define_integer(vm_aml *a, const char *name, uint64_t value);
void vm_aml_define_eisa(vm_aml *a, const char *name, const char *id);
void vm_aml_define_string(vm_aml *a, const char *name, const char *text);
/* Name(_CRS, ResourceTemplate): descriptors, end tag and checksum added here. */
void vm_aml_define_resources(vm_aml *a, const char *name, const uint8_t *descriptors, size_t bytes);

/* Resource descriptors (6.4): append to a plain buffer, return the new end. */
uint8_t *vm_res_io(uint8_t *p, uint16_t base, uint8_t count);
uint8_t *vm_res_irq(uint8_t *p, unsigned irq);               /* edge, active high, exclusive */
uint8_t *vm_res_memory32(uint8_t *p, uint32_t base, uint32_t bytes, bool is_writable);
uint8_t *vm_res_bus(uint8_t *p, uint16_t first, uint16_t last);
uint8_t *vm_res_io_window(uint8_t *p, uint16_t first, uint16_t last);
uint8_t *vm_res_memory_window32(uint8_t *p, uint32_t first, uint32_t last, bool is_cacheable);
uint8_t *vm_res_memory_window64(uint8_t *p, uint64_t first, uint64_t last);
#endif
