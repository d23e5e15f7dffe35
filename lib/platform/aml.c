/* aml.c - see aml.h. */
#include "platform/aml.h"
#include <stdlib.h>
#include <string.h>

enum { OP_ZERO = 0x00, OP_ONE = 0x01, OP_NAME = 0x08, OP_BYTE = 0x0a, OP_WORD = 0x0b, OP_DWORD = 0x0c, OP_STRING = 0x0d,
       OP_QWORD = 0x0e, OP_SCOPE = 0x10, OP_BUFFER = 0x11, OP_PACKAGE = 0x12, OP_METHOD = 0x14, OP_EXT = 0x5b,
       OP_DEVICE = 0x82, OP_IF = 0xa0 };

void vm_aml_bytes(vm_aml *a, const void *data, size_t bytes)
{
    if (a->failed)
        return;
    if (a->bytes + bytes > a->capacity) {
        size_t capacity = a->capacity ? a->capacity * 2 : 4096;
        while (capacity < a->bytes + bytes)
            capacity *= 2;
        uint8_t *grown = realloc(a->data, capacity);
        if (!grown) {
            a->failed = true;
            return;
        }
        a->data = grown;
        a->capacity = capacity;
    }
    memcpy(a->data + a->bytes, data, bytes);
    a->bytes += bytes;
}

void vm_aml_byte(vm_aml *a, uint8_t value) { vm_aml_bytes(a, &value, 1); }

void vm_aml_name(vm_aml *a, const char *path)
{
    unsigned segments = 1;
    if (*path == '\\')
        vm_aml_byte(a, (uint8_t)*path++);
    if (!*path) {
        vm_aml_byte(a, 0);                           /* the root alone */
        return;
    }
    for (const char *p = path; *p; p++)
        segments += *p == '.';
    if (segments == 2)
        vm_aml_byte(a, 0x2e);
    else if (segments > 2) {
        vm_aml_byte(a, 0x2f);
        vm_aml_byte(a, (uint8_t)segments);
    }
    while (*path) {
        char segment[4] = { '_', '_', '_', '_' };
        for (unsigned i = 0; *path && *path != '.'; path++)
            if (i < 4)
                segment[i++] = *path;
        if (*path == '.')
            path++;
        vm_aml_bytes(a, segment, 4);
    }
}

void vm_aml_integer(vm_aml *a, uint64_t value)
{
    if (value <= 1) {
        vm_aml_byte(a, value ? OP_ONE : OP_ZERO);
        return;
    }
    unsigned n = value <= 0xff ? 1 : value <= 0xffff ? 2 : value <= 0xffffffff ? 4 : 8;
    vm_aml_byte(a, n == 1 ? OP_BYTE : n == 2 ? OP_WORD : n == 4 ? OP_DWORD : OP_QWORD);
    vm_aml_bytes(a, &value, n);
}

void vm_aml_string(vm_aml *a, const char *text)
{
    vm_aml_byte(a, OP_STRING);
    vm_aml_bytes(a, text, strlen(text) + 1);
}

uint32_t vm_aml_eisa(const char *id) {               /* 19.3.4: three letters of five bits, four hex digits; big-endian */
    uint32_t v = (uint32_t)(id[0] - 0x40) << 26 | (uint32_t)(id[1] - 0x40) << 21 | (uint32_t)(id[2] - 0x40) << 16;
    v |= (uint32_t)strtoul(id + 3, NULL, 16);
    return __builtin_bswap32(v);
}

/* ---- packages ---- */
static void open_package(vm_aml *a)
{
    if (a->depth == sizeof a->open / sizeof *a->open) {
        a->failed = true;
        return;
    }
    a->open[a->depth++] = a->bytes;
}

/* PkgLength counts itself: one byte up to 63, else 2 to 4 with the low nibble in the first (20.2.4). */
void vm_aml_close(vm_aml *a)
{
    if (a->failed || !a->depth)
        return;
    size_t at = a->open[--a->depth], body = a->bytes - at;
    unsigned n = body + 1 < 0x40 ? 1 : body + 2 < 0x1000 ? 2 : body + 3 < 0x100000 ? 3 : 4;
    size_t length = body + n;
    uint8_t head[4];
    if (n == 1) {
        head[0] = (uint8_t)length;
    } else {
        head[0] = (uint8_t)((n - 1) << 6 | (length & 15));
        for (unsigned i = 1; i < n; i++)
            head[i] = (uint8_t)(length >> (8 * i - 4));
    }
    vm_aml_bytes(a, head, n);                        /* grows the buffer; the bytes move below */
    if (a->failed)
        return;
    memmove(a->data + at + n, a->data + at, body);
    memcpy(a->data + at, head, n);
}

void vm_aml_scope(vm_aml *a, const char *path)
{
    vm_aml_byte(a, OP_SCOPE);
    open_package(a);
    vm_aml_name(a, path);
}

void vm_aml_device(vm_aml *a, const char *name)
{
    vm_aml_byte(a, OP_EXT);
    vm_aml_byte(a, OP_DEVICE);
    open_package(a);
    vm_aml_name(a, name);
}

void vm_aml_method(vm_aml *a, const char *name, unsigned args)
{
    vm_aml_byte(a, OP_METHOD);
    open_package(a);
    vm_aml_name(a, name);
    vm_aml_byte(a, (uint8_t)args);
}

void vm_aml_if(vm_aml *a)
{
    vm_aml_byte(a, OP_IF);
    open_package(a);
}

void vm_aml_package(vm_aml *a, unsigned count)
{
    vm_aml_byte(a, OP_PACKAGE);
    open_package(a);
    vm_aml_byte(a, (uint8_t)count);
}

/* ---- names ---- */
void vm_aml_define(vm_aml *a, const char *name)
{
    vm_aml_byte(a, OP_NAME);
    vm_aml_name(a, name);
}

void vm_aml_define_integer(vm_aml *a, const char *name, uint64_t value)
{
    vm_aml_define(a, name);
    vm_aml_integer(a, value);
}

void vm_aml_define_eisa(vm_aml *a, const char *name, const char *id)
{
    vm_aml_define_integer(a, name, vm_aml_eisa(id));
}

void vm_aml_define_string(vm_aml *a, const char *name, const char *text)
{
    vm_aml_define(a, name);
    vm_aml_string(a, text);
}

void vm_aml_define_resources(vm_aml *a, const char *name, const uint8_t *descriptors, size_t bytes)
{
    uint8_t sum = 0x79, end[2] = { 0x79, 0 };
    for (size_t i = 0; i < bytes; i++)
        sum += descriptors[i];
    end[1] = (uint8_t)-sum;
    vm_aml_define(a, name);
    vm_aml_byte(a, OP_BUFFER);
    open_package(a);
    vm_aml_integer(a, bytes + 2);
    vm_aml_bytes(a, descriptors, bytes);
    vm_aml_bytes(a, end, 2);
    vm_aml_close(a);
}

/* ---- resources ---- */
static uint8_t *put(uint8_t *p, uint64_t value, unsigned bytes)
{
    memcpy(p, &value, bytes);
    return p + bytes;
}

uint8_t *vm_res_io(uint8_t *p, uint16_t base, uint8_t count)
{
    p = put(p, 0x0147, 2);                           /* I/O port descriptor, 16-bit decode */
    p = put(p, base, 2);
    p = put(p, base, 2);
    p = put(p, 1, 1);
    return put(p, count, 1);
}

uint8_t *vm_res_irq(uint8_t *p, unsigned irq)
{
    p = put(p, 0x22, 1);
    return put(p, UINT64_C(1) << irq, 2);
}

uint8_t *vm_res_memory32(uint8_t *p, uint32_t base, uint32_t bytes, bool is_writable)
{
    p = put(p, 0x86, 1);
    p = put(p, 9, 2);
    p = put(p, is_writable, 1);
    p = put(p, base, 4);
    return put(p, bytes, 4);
}

/* Address space descriptors: kind 0 memory, 1 I/O, 2 bus; producer, fixed ends (6.4.3.5). */
static uint8_t *window(uint8_t *p, uint8_t tag, unsigned kind, unsigned flags, uint64_t first, uint64_t last, unsigned width)
{
    p = put(p, tag, 1);
    p = put(p, 3 + 5 * width, 2);
    p = put(p, kind, 1);
    p = put(p, 0x0c, 1);
    p = put(p, flags, 1);
    p = put(p, 0, width);                            /* granularity */
    p = put(p, first, width);
    p = put(p, last, width);
    p = put(p, 0, width);                            /* translation */
    return put(p, last - first + 1, width);
}

uint8_t *vm_res_bus(uint8_t *p, uint16_t first, uint16_t last) { return window(p, 0x88, 2, 0, first, last, 2); }
uint8_t *vm_res_io_window(uint8_t *p, uint16_t first, uint16_t last) { return window(p, 0x88, 1, 3, first, last, 2); }
uint8_t *vm_res_memory_window32(uint8_t *p, uint32_t first, uint32_t last, bool is_cacheable)
{
    return window(p, 0x87, 0, is_cacheable ? 3 : 1, first, last, 4);
}
uint8_t *vm_res_memory_window64(uint8_t *p, uint64_t first, uint64_t last) { return window(p, 0x8a, 0, 1, first, last, 8); }
