/* smbios.c - the SMBIOS structures of the PC (DMTF DSP0134, 2.8): firmware, system, chassis, processor, memory.
 *
 * The structure table is position-independent; the entry point holds its address. Strings follow each structure, numbered
 * from 1 in the order they were added.
 */
#include "platform/tables.h"
#include "platform/aml.h"
#include "platform/pc.h"
#include <stdlib.h>
#include <string.h>

typedef struct builder {
    vm_aml out;                      /* only its growing buffer is used */
    uint16_t handle, count, largest;
    size_t start;
} builder;

static void put(builder *b, uint64_t value, unsigned bytes) { vm_aml_bytes(&b->out, &value, bytes); }

static uint16_t begin(builder *b, uint8_t type, uint8_t length)
{
    b->start = b->out.bytes;
    put(b, type, 1);
    put(b, length, 1);
    put(b, b->handle, 2);
    return b->handle++;
}

/* strings: up to four, NULL ends; a structure without any still ends with two zeros. */
static void end(builder *b, const char *const *strings)
{
    for (unsigned i = 0; strings && strings[i]; i++)
        vm_aml_bytes(&b->out, strings[i], strlen(strings[i]) + 1);
    if (!strings)
        put(b, 0, 1);
    put(b, 0, 1);
    size_t bytes = b->out.bytes - b->start;
    if (bytes > b->largest)
        b->largest = (uint16_t)bytes;
    b->count++;
}

static void firmware(builder *b) {                   /* type 0 */
    static const char *const strings[] = { "libvm", "1.0", "01/01/2024", NULL };
    begin(b, 0, 0x18);
    put(b, 1, 1);
    put(b, 2, 1);
    put(b, 0xf000, 2);
    put(b, 3, 1);
    put(b, 0, 1);
    put(b, 1 << 3, 8);                               /* characteristics: not given */
    put(b, 0x14 << 8, 2);                            /* virtual machine; targeted content */
    put(b, 0x0001, 2);                               /* system release 1.0 */
    put(b, 0xffff, 2);
    end(b, strings);
}

static void computer(builder *b) {                   /* types 1 and 3 */
    static const char *const strings[] = { "libvm", "PC", NULL };
    begin(b, 1, 0x1b);
    put(b, 1, 1);
    put(b, 2, 1);
    put(b, 0, 2);
    for (unsigned i = 0; i < 16; i++)
        put(b, 0, 1);                                /* UUID: none */
    put(b, 6, 1);                                    /* woken by the power switch */
    put(b, 0, 2);
    end(b, strings);
    begin(b, 3, 0x15);
    put(b, 1, 1);
    put(b, 1, 1);                                    /* other */
    put(b, 0, 3);
    put(b, 0x03030303, 4);                           /* states: safe; security: none */
    put(b, 0, 4);
    put(b, 0, 4);
    end(b, (const char *const[]){ "libvm", NULL });
}

static void processor(builder *b, const vm_tables_info *info) {     /* type 4: one socket, a core a vCPU */
    static const char *const strings[] = { "CPU 0", "libvm", NULL };
    unsigned cores = info->cpus < 255 ? info->cpus : 255;
    begin(b, 4, 0x2a);
    put(b, 1, 1);
    put(b, 3, 1);                                    /* central processor */
    put(b, 2, 1);                                    /* family: unknown */
    put(b, 2, 1);
    put(b, (uint64_t)info->cpu_features << 32 | info->cpu_signature, 8);
    put(b, 0, 2);
    put(b, 0, 2);
    put(b, 0x03e803e8, 4);                           /* 1000 MHz: the TSC's */
    put(b, 0x41, 1);                                 /* populated, enabled */
    put(b, 1, 1);
    put(b, UINT64_C(0xffffffffffff), 6);             /* caches: not given */
    put(b, 0, 3);
    put(b, cores, 1);
    put(b, cores, 1);
    put(b, cores, 1);
    put(b, 0x04, 2);                                 /* 64-bit capable */
    put(b, 2, 2);
    end(b, strings);
}

static void memory(builder *b, const vm_tables_info *info) {        /* types 16, 17, 19 */
    uint64_t kib = info->ram_bytes >> 10, mib = info->ram_bytes >> 20;
    uint16_t array = begin(b, 16, 0x17);
    put(b, 1, 1);                                    /* other location, system memory, no error correction */
    put(b, 3, 1);
    put(b, 3, 1);
    put(b, kib < 0x80000000 ? kib : 0x80000000, 4);
    put(b, 0xfffe, 2);
    put(b, 1, 2);
    put(b, kib < 0x80000000 ? 0 : info->ram_bytes, 8);
    end(b, NULL);
    begin(b, 17, 0x28);
    put(b, array, 2);
    put(b, 0xfffe, 2);
    put(b, 0xffff, 2);
    put(b, 0xffff, 2);
    put(b, mib < 0x7fff ? mib : 0x7fff, 2);
    put(b, 9, 1);                                    /* DIMM */
    put(b, 0, 1);
    put(b, 1, 1);
    put(b, 0, 1);
    put(b, 7, 1);                                    /* RAM */
    put(b, 2, 2);
    put(b, 0, 2);
    put(b, 0, 4);
    put(b, 0, 1);
    put(b, mib < 0x7fff ? 0 : mib, 4);
    put(b, 0, 2);
    put(b, 0, 6);
    end(b, (const char *const[]){ "DIMM 0", NULL });
    uint64_t low_k = info->low_end >> 10;
    begin(b, 19, 0x1f);
    put(b, 0, 4);
    put(b, low_k - 1, 4);
    put(b, array, 2);
    put(b, 1, 1);
    put(b, 0, 8);
    put(b, 0, 8);
    end(b, NULL);
    if (info->ram_bytes > info->low_end) {
        begin(b, 19, 0x1f);
        put(b, 0xffffffff, 4);                       /* see the 64-bit fields */
        put(b, 0xffffffff, 4);
        put(b, array, 2);
        put(b, 1, 1);
        put(b, VM_PC_HIGH, 8);
        put(b, VM_PC_HIGH + (info->ram_bytes - info->low_end) - 1, 8);
        end(b, NULL);
    }
}

static uint8_t negative_sum(const uint8_t *p, size_t n)
{
    uint8_t sum = 0;
    while (n--)
        sum += *p++;
    return (uint8_t)-sum;
}

int vm_tables_smbios(const vm_tables_info *info, uint64_t address, uint8_t anchor[VM_SMBIOS_ANCHOR], uint8_t **table,
                     size_t *bytes)
{
    builder b = { .handle = 0 };
    firmware(&b);
    computer(&b);
    processor(&b, info);
    memory(&b, info);
    begin(&b, 127, 4);
    end(&b, NULL);
    if (b.out.failed) {
        free(b.out.data);
        return vm_fail(VM_E_NOMEM, "SMBIOS tables: out of memory");
    }
    uint32_t at = (uint32_t)address;
    uint16_t length = (uint16_t)b.out.bytes;
    memset(anchor, 0, VM_SMBIOS_ANCHOR);
    memcpy(anchor, "_SM_", 4);
    anchor[5] = VM_SMBIOS_ANCHOR;
    anchor[6] = 2;
    anchor[7] = 8;
    memcpy(anchor + 8, &b.largest, 2);
    memcpy(anchor + 16, "_DMI_", 5);
    memcpy(anchor + 22, &length, 2);
    memcpy(anchor + 24, &at, 4);
    memcpy(anchor + 28, &b.count, 2);
    anchor[30] = 0x28;
    anchor[21] = negative_sum(anchor + 16, 15);
    anchor[4] = negative_sum(anchor, VM_SMBIOS_ANCHOR);
    *table = b.out.data;
    *bytes = b.out.bytes;
    return VM_OK;
}
