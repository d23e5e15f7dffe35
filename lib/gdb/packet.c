/* packet.c - framing of GDB's remote protocol: `$` packet `#` two digits of checksum, with `}` escapes; `+` and `-`
 * between packets, 0x03 for an interrupt. See gdb.h for the limits. */
#include "gdb/gdb.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- texts ---- */

void gdb_put(gdb_text *t, const void *bytes, size_t count)
{
    if (t->is_cut || count > GDB_TEXT - t->count) {
        t->is_cut = true;
        return;
    }
    if (t->count + count >= t->capacity) {
        size_t capacity = t->capacity ? t->capacity : 256;
        while (capacity <= t->count + count)
            capacity *= 2;
        char *grown = realloc(t->at, capacity);
        if (!grown) {
            t->is_cut = true;
            return;
        }
        t->at = grown;
        t->capacity = capacity;
    }
    if (count)
        memcpy(t->at + t->count, bytes, count);
    t->count += count;
    t->at[t->count] = 0;
}

void gdb_puts(gdb_text *t, const char *text)
{
    gdb_put(t, text, strlen(text));
}

void gdb_printf(gdb_text *t, const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > 0)
        gdb_put(t, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

void gdb_put_hex(gdb_text *t, const void *bytes, size_t count)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < count; i++) {
        uint8_t b = ((const uint8_t *)bytes)[i];
        gdb_put(t, (const char[]){ digits[b >> 4], digits[b & 15] }, 2);
    }
}

void gdb_clear(gdb_text *t)
{
    t->count = 0;
    t->is_cut = false;
    if (t->at)
        t->at[0] = 0;
}

void gdb_free_text(gdb_text *t)
{
    free(t->at);
    *t = (gdb_text){ 0 };
}

/* ---- numbers ---- */

int gdb_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

bool gdb_hex(const char **at, uint64_t *value)
{
    uint64_t v = 0;
    unsigned n = 0;
    for (int d; (d = gdb_digit(**at)) >= 0; ++*at, n++) {
        if (v >> 60)
            return false;
        v = v << 4 | (unsigned)d;
    }
    *value = v;
    return n > 0;
}

bool gdb_bytes(const char *from, void *to, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int high = gdb_digit(from[2 * i]), low = high < 0 ? -1 : gdb_digit(from[2 * i + 1]);
        if (low < 0)
            return false;
        ((uint8_t *)to)[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

/* ---- reading ---- */

static void take(gdb_reader *r, uint8_t byte)
{
    if (r->count < GDB_PACKET)
        r->packet[r->count++] = (char)byte;
    else
        r->is_too_long = true;
}

static void inside(gdb_reader *r, uint8_t byte)
{
    r->sum += byte;
    if (r->is_escaped) {
        take(r, byte ^ 0x20);
        r->is_escaped = false;
    } else if (byte == '}') {
        r->is_escaped = true;
    } else {
        take(r, byte);
    }
}

static void begin(gdb_reader *r)
{
    r->state = GDB_INSIDE;
    r->count = 0;
    r->sum = 0;
    r->is_escaped = r->is_too_long = false;
}

static gdb_got end(gdb_reader *r, int digit)
{
    bool is_good = digit >= 0 && (r->given << 4 | digit) == r->sum && !r->is_too_long && !r->is_escaped;
    r->state = GDB_OUTSIDE;
    r->packet[r->count] = 0;
    return is_good ? GDB_GOT_PACKET : GDB_GOT_BAD;
}

gdb_got gdb_read_byte(gdb_reader *r, uint8_t byte)
{
    int digit = gdb_digit((char)byte);
    switch (r->state) {
    case GDB_OUTSIDE:
        if (byte == '$')
            begin(r);
        return byte == 3 ? GDB_GOT_BREAK : byte == '-' ? GDB_GOT_NAK : GDB_GOT_NOTHING;
    case GDB_INSIDE:
        if (byte == '#' )
            r->state = GDB_SUM1;
        else if (byte == '$')
            begin(r);                  /* the end of the one before was lost */
        else
            inside(r, byte);
        return GDB_GOT_NOTHING;
    case GDB_SUM1:
        r->given = (uint8_t)(digit < 0 ? 0 : digit);
        r->state = GDB_SUM2;
        return digit < 0 ? end(r, -1) : GDB_GOT_NOTHING;
    case GDB_SUM2:
        return end(r, digit);
    }
    return GDB_GOT_NOTHING;
}

/* ---- writing ---- */

void gdb_frame(gdb_text *out, const char *packet, size_t count)
{
    uint8_t sum = 0;
    gdb_put(out, "$", 1);
    for (size_t i = 0; i < count; i++) {
        char c = packet[i];
        if (c == '$' || c == '#' || c == '}' || c == '*') {
            gdb_put(out, "}", 1);
            sum += '}';
            c ^= 0x20;
        }
        gdb_put(out, &c, 1);
        sum += (uint8_t)c;
    }
    gdb_printf(out, "#%02x", sum);
}
