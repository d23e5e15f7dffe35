/* fuzz_target.c - a program to fuzz: reads a small picture format and has one bug. No operating system, no library.
 *
 * The format: "VPIC", then chunks of a type byte, a length (2 bytes, low first) and as many bytes:
 *   'H'  width, height, depth (1 byte each); must come first, once
 *   'P'  a palette: start, count, then count times red, green, blue
 *   'R'  pixels, run-length coded: below 128 that many pixels follow, else the next is repeated (byte - 127) times
 *   'T'  a text; "title=" gives the picture a name
 *   'E'  the end: the sum of all chunk lengths (2 bytes) must be right
 * The bug: with depth 5 a palette of up to 32 colours is taken, and there is room for 16.
 */
#include <stddef.h>
#include <stdint.h>

typedef struct picture {
    uint8_t width, height, depth, has_header, has_end;
    uint32_t chunks, sum, pixels, colours;
    uint8_t canvas[4096];
    char title[16];
} picture;
static picture the_picture;
static uint32_t checksum;

void fuzz_target(const uint8_t *data, size_t size);

static int header(picture *p, const uint8_t *d, unsigned n)
{
    if (p->has_header || n != 3 || !d[0] || !d[1] || d[0] > 64 || d[1] > 64) return -1;
    if (d[2] != 1 && d[2] != 2 && d[2] != 4 && d[2] != 5 && d[2] != 8) return -1;
    p->width = d[0], p->height = d[1], p->depth = d[2];
    p->has_header = 1;
    return 0;
}

__attribute__((noinline)) static uint32_t mix(const uint8_t *colours, unsigned count)
{
    uint32_t sum = 0;
    for (unsigned i = 0; i < count; i++) sum = sum * 31 + (uint32_t)(colours[3 * i] << 16 | colours[3 * i + 1] << 8 | colours[3 * i + 2]);
    return sum;
}

__attribute__((noinline)) static int palette(picture *p, const uint8_t *d, unsigned n)
{
    uint8_t colours[16 * 3];
    if (n < 2) return -1;
    unsigned start = d[0], count = d[1], most = 1u << (p->depth > 4 ? p->depth == 5 ? 5 : 4 : p->depth);
    if (start + count > most || n != 2 + 3 * count) return -1;
    for (unsigned i = 0; i < 3 * count; i++) ((volatile uint8_t *)colours)[3 * start + i] = d[2 + i];
    p->colours += count;
    checksum ^= mix(colours, count < 16 ? count : 16);
    return 0;
}

static int pixels(picture *p, const uint8_t *d, unsigned n)
{
    unsigned room = (unsigned)p->width * p->height, at = 0;
    for (unsigned i = 0; i < n;) {
        unsigned code = d[i++], run = code < 128 ? code : code - 127;
        if (run > room - at) return -1;
        if (code < 128 && run > n - i) return -1;
        if (code >= 128 && i == n) return -1;
        for (unsigned k = 0; k < run; k++) p->canvas[at++] = code < 128 ? d[i + k] : d[i];
        i += code < 128 ? run : 1;
    }
    p->pixels += at;
    return 0;
}

static int text(picture *p, const uint8_t *d, unsigned n)
{
    static const char key[] = "title=";
    for (unsigned i = 0; i < 6; i++)
        if (i >= n || d[i] != (uint8_t)key[i]) return 0;
    for (unsigned i = 6; i < n && i - 6 < sizeof p->title - 1; i++) p->title[i - 6] = (char)d[i];
    return 0;
}

static int chunk(picture *p, unsigned type, const uint8_t *d, unsigned n)
{
    if (type != 'H' && !p->has_header) return -1;
    switch (type) {
    case 'H': return header(p, d, n);
    case 'P': return palette(p, d, n);
    case 'R': return pixels(p, d, n);
    case 'T': return text(p, d, n);
    case 'E':
        if (n != 2 || (d[0] | d[1] << 8) != (int)(p->sum & 0xffff)) return -1;
        p->has_end = 1;
        return 0;
    default: return -1;
    }
}

void fuzz_target(const uint8_t *data, size_t size)
{
    picture *p = &the_picture;
    if (size < 4 || data[0] != 'V' || data[1] != 'P' || data[2] != 'I' || data[3] != 'C') return;
    for (size_t at = 4; at + 3 <= size && !p->has_end;) {
        unsigned type = data[at], n = data[at + 1] | (unsigned)data[at + 2] << 8;
        at += 3;
        if (n > size - at || chunk(p, type, data + at, n)) return;
        p->sum += n;
        p->chunks++;
        at += n;
    }
    for (unsigned i = 0; i < p->pixels && i < sizeof p->canvas; i++) checksum = checksum * 33 + p->canvas[i];
}
