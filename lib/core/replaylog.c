/* replaylog.c - see replaylog.h. Nothing here knows a machine. */
#include "core/replaylog.h"
#include "core/core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { EVENT_ROOM = 64 };              /* an event without its data is shorter */
#define LOG_MAX (UINT64_C(1) << 33)    /* a file that is read */

/* Four bits of a message, followed by 0 to 7 others of zeros. */
static const uint32_t crc_nibble[8][16] = {
        { 0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
          0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c },
        { 0x00000000, 0x77073096, 0xee0e612c, 0x990951ba, 0x076dc419, 0x706af48f, 0xe963a535, 0x9e6495a3,
          0x0edb8832, 0x79dcb8a4, 0xe0d5e91e, 0x97d2d988, 0x09b64c2b, 0x7eb17cbd, 0xe7b82d07, 0x90bf1d91 },
        { 0x00000000, 0x4ac21251, 0x958424a2, 0xdf4636f3, 0xf0794f05, 0xbabb5d54, 0x65fd6ba7, 0x2f3f79f6,
          0x3b83984b, 0x71418a1a, 0xae07bce9, 0xe4c5aeb8, 0xcbfad74e, 0x8138c51f, 0x5e7ef3ec, 0x14bce1bd },
        { 0x00000000, 0x191b3141, 0x32366282, 0x2b2d53c3, 0x646cc504, 0x7d77f445, 0x565aa786, 0x4f4196c7,
          0xc8d98a08, 0xd1c2bb49, 0xfaefe88a, 0xe3f4d9cb, 0xacb54f0c, 0xb5ae7e4d, 0x9e832d8e, 0x87981ccf },
        { 0x00000000, 0x1c26a370, 0x384d46e0, 0x246be590, 0x709a8dc0, 0x6cbc2eb0, 0x48d7cb20, 0x54f16850,
          0xe1351b80, 0xfd13b8f0, 0xd9785d60, 0xc55efe10, 0x91af9640, 0x8d893530, 0xa9e2d0a0, 0xb5c473d0 },
        { 0x00000000, 0x01c26a37, 0x0384d46e, 0x0246be59, 0x0709a8dc, 0x06cbc2eb, 0x048d7cb2, 0x054f1685,
          0x0e1351b8, 0x0fd13b8f, 0x0d9785d6, 0x0c55efe1, 0x091af964, 0x08d89353, 0x0a9e2d0a, 0x0b5c473d },
        { 0x00000000, 0x5019579f, 0xa032af3e, 0xf02bf8a1, 0x9b14583d, 0xcb0d0fa2, 0x3b26f703, 0x6b3fa09c,
          0xed59b63b, 0xbd40e1a4, 0x4d6b1905, 0x1d724e9a, 0x764dee06, 0x2654b999, 0xd67f4138, 0x866616a7 },
        { 0x00000000, 0xb8bc6765, 0xaa09c88b, 0x12b5afee, 0x8f629757, 0x37def032, 0x256b5fdc, 0x9dd738b9,
          0xc5b428ef, 0x7d084f8a, 0x6fbde064, 0xd7018701, 0x4ad6bfb8, 0xf26ad8dd, 0xe0df7733, 0x58631056 },
};

uint32_t vm_crc32(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    crc = ~crc;
    for (; bytes >= 4; bytes -= 4, p += 4) {
        uint32_t word;
        memcpy(&word, p, 4);
        word ^= crc;
        crc = 0;
        for (unsigned i = 0; i < 8; i++)
            crc ^= crc_nibble[7 - i][word >> 4 * i & 15];
    }
    for (; bytes--; p++) {
        crc = crc_nibble[0][(crc ^ *p) & 15] ^ crc >> 4;
        crc = crc_nibble[0][(crc ^ *p >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

/* ---- writing ---- */

static void write_all(vm_log_writer *w, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    while (bytes && w->status == VM_OK) {
        ssize_t n = write(w->fd, p, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            w->status = vm_fail_errno(VM_E_HOST, "writing the log");
            return;
        }
        p += n;
        bytes -= (size_t)n;
        w->written += (uint64_t)n;
    }
}

static void flush(vm_log_writer *w)
{
    uint32_t head[2] = { (uint32_t)w->used, 0 };
    if (!w->used)
        return;
    head[1] = vm_crc32(vm_crc32(0, head, 4), w->chunk, w->used);
    write_all(w, head, sizeof head);
    write_all(w, w->chunk, w->used);
    w->used = 0;
}

int vm_log_begin(vm_log_writer *w, int fd, uint64_t max_bytes, vm_log_header *h, const void *cpu, const void *platform)
{
    *w = (vm_log_writer){ .fd = fd, .max_bytes = max_bytes, .chunk = malloc(VM_LOG_CHUNK) };
    if (!w->chunk)
        return vm_fail(VM_E_NOMEM, "no memory for the log's buffer");
    memcpy(h->magic, VM_LOG_MAGIC, sizeof h->magic);
    h->version = VM_LOG_VERSION;
    h->header_bytes = sizeof *h;
    h->crc = 0;
    h->crc = vm_crc32(vm_crc32(vm_crc32(0, h, sizeof *h), cpu, h->cpu_bytes), platform, h->platform_bytes);
    write_all(w, h, sizeof *h);
    write_all(w, cpu, h->cpu_bytes);
    write_all(w, platform, h->platform_bytes);
    int status = w->status;
    if (status)
        vm_log_abandon(w);
    return status;
}

static uint8_t *put_varint(uint8_t *p, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *p++ = (uint8_t)(v | 0x80);
    *p++ = (uint8_t)v;
    return p;
}

void vm_log_put(vm_log_writer *w, const vm_log_event *e)
{
    if (w->status)
        return;
    if (w->used + EVENT_ROOM + e->bytes > VM_LOG_CHUNK)
        flush(w);
    if (e->type != VM_LOG_END && w->written + w->used + EVENT_ROOM + e->bytes > w->max_bytes) {
        w->status = vm_fail(VM_E_NOMEM, "the log has reached its limit of %llu bytes", (unsigned long long)w->max_bytes);
        return;
    }
    uint8_t *p = w->chunk + w->used;
    *p++ = (uint8_t)(e->type | (e->is_inside ? VM_LOG_INSIDE : 0));
    p = put_varint(p, e->at - w->at);
    p = put_varint(p, e->a);
    p = put_varint(p, e->b);
    p = put_varint(p, e->bytes);
    if (!e->is_inside) {
        memcpy(p, &e->check, 4);
        p += 4;
    }
    if (e->bytes)
        memcpy(p, e->data, e->bytes);
    w->used = (size_t)(p + e->bytes - w->chunk);
    w->at = e->at;
    w->events++;
}

int vm_log_finish(vm_log_writer *w)
{
    flush(w);
    int status = w->status;
    vm_log_abandon(w);
    return status;
}

void vm_log_abandon(vm_log_writer *w)
{
    free(w->chunk);
    w->chunk = NULL;
}

/* ---- reading ---- */

static bool get_varint(const uint8_t **p, const uint8_t *end, uint64_t *v)
{
    *v = 0;
    for (unsigned shift = 0; *p < end && shift < 64; shift += 7) {
        uint8_t byte = *(*p)++;
        if (shift == 63 && byte > 1)
            return false;
        *v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return false;
}

bool vm_log_next(const vm_log *log, size_t *offset, uint64_t *at, vm_log_event *e)
{
    const uint8_t *p = log->events + *offset, *end = log->events + log->events_bytes;
    uint64_t delta, bytes;
    if (p >= end)
        return false;
    *e = (vm_log_event){ .type = *p & (uint8_t)~VM_LOG_INSIDE, .is_inside = *p & VM_LOG_INSIDE };
    p++;
    if (!get_varint(&p, end, &delta) || !get_varint(&p, end, &e->a) || !get_varint(&p, end, &e->b) ||
        !get_varint(&p, end, &bytes) || bytes > VM_LOG_DATA || delta > UINT64_MAX / 2 - *at)
        return false;
    if (!e->is_inside) {
        if (end - p < 4)
            return false;
        memcpy(&e->check, p, 4);
        p += 4;
    }
    if ((uint64_t)(end - p) < bytes)
        return false;
    e->data = p;
    e->bytes = (uint32_t)bytes;
    e->at = *at += delta;
    *offset = (size_t)(p + bytes - log->events);
    return true;
}

static int bad(uint64_t at, const char *what)
{
    return vm_fail(VM_E_FORMAT, "vm_replay: the log is damaged at byte %llu: %s", (unsigned long long)at, what);
}

/* The file from the descriptor's offset on. */
static int read_file(int fd, vm_log *log)
{
    struct stat st;
    off_t from = lseek(fd, 0, SEEK_CUR);
    if (fstat(fd, &st) != 0)
        return vm_fail_errno(VM_E_HOST, "vm_replay: fstat");
    size_t room = S_ISREG(st.st_mode) && from >= 0 && st.st_size > from ? (size_t)(st.st_size - from) + 1 : 65536;
    if (room > LOG_MAX)
        return vm_fail(VM_E_FORMAT, "vm_replay: a log of more than %llu bytes", (unsigned long long)LOG_MAX);
    for (log->bytes = NULL, log->size = 0;;) {
        uint8_t *bigger = realloc(log->bytes, room);
        if (!bigger)
            return vm_fail(VM_E_NOMEM, "vm_replay: no memory for a log of %zu bytes", room);
        log->bytes = bigger;
        ssize_t n = read(fd, log->bytes + log->size, room - log->size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return vm_fail_errno(VM_E_HOST, "vm_replay: reading the log");
        if (n == 0)
            return VM_OK;
        log->size += (size_t)n;
        if (log->size == room && (room *= 2) > LOG_MAX)
            return vm_fail(VM_E_FORMAT, "vm_replay: a log of more than %llu bytes", (unsigned long long)LOG_MAX);
    }
}

static int check_header(vm_log *log)
{
    vm_log_header *h = &log->header;
    if (log->size < sizeof *h)
        return bad(0, "no header");
    memcpy(h, log->bytes, sizeof *h);
    if (memcmp(h->magic, VM_LOG_MAGIC, sizeof h->magic))
        return bad(0, "not a log of vm_record()");
    if (h->version != VM_LOG_VERSION || h->header_bytes != sizeof *h)
        return vm_fail(VM_E_FORMAT, "vm_replay: a log of version %u, this library reads version %u", h->version, VM_LOG_VERSION);
    uint64_t states = (uint64_t)h->cpu_bytes + h->platform_bytes;
    if (states > log->size - sizeof *h)
        return bad(sizeof *h, "it ends in the states of CPU and devices");
    uint32_t crc = h->crc;
    h->crc = 0;
    h->crc = vm_crc32(vm_crc32(0, h, sizeof *h), log->bytes + sizeof *h, states);
    if (h->crc != crc)
        return bad(0, "the header's checksum is wrong");
    log->cpu = log->bytes + sizeof *h;
    log->platform = log->cpu + h->cpu_bytes;
    return VM_OK;
}

static int check_chunks(vm_log *log)
{
    size_t at = sizeof log->header + log->header.cpu_bytes + log->header.platform_bytes;
    log->events = malloc(log->size - at + 1);
    if (!log->events)
        return vm_fail(VM_E_NOMEM, "vm_replay: no memory for %zu bytes of events", log->size - at);
    while (at < log->size) {
        uint32_t head[2];
        if (log->size - at < sizeof head)
            return bad(at, "a chunk without a head");
        memcpy(head, log->bytes + at, sizeof head);
        if (!head[0] || head[0] > VM_LOG_CHUNK || head[0] > log->size - at - sizeof head)
            return bad(at, "a chunk that is cut off");
        const uint8_t *payload = log->bytes + at + sizeof head;
        if (vm_crc32(vm_crc32(0, head, 4), payload, head[0]) != head[1])
            return bad(at, "a chunk's checksum is wrong");
        memcpy(log->events + log->events_bytes, payload, head[0]);
        log->events_bytes += head[0];
        at += sizeof head + head[0];
    }
    return VM_OK;
}

static bool is_sound(const vm_log_event *e)
{
    bool only_inside = e->type >= VM_LOG_READ, both = e->type >= VM_LOG_LINE && e->type <= VM_LOG_INJECT;
    if (e->type < VM_LOG_END || e->type >= VM_LOG_TYPES || (!both && e->is_inside != only_inside))
        return false;
    bool has_data = e->type == VM_LOG_STATE || e->type == VM_LOG_SERIAL || e->type == VM_LOG_WRITE;
    return e->type == VM_LOG_PAGE ? e->bytes == 4096 && !e->at : has_data || !e->bytes;
}

static int check_events(vm_log *log)
{
    size_t offset = 0;
    vm_log_event e = { 0 };
    while (offset < log->events_bytes) {
        if (e.type == VM_LOG_END)
            return vm_fail(VM_E_FORMAT, "vm_replay: the log is damaged: something follows its end");
        if (!vm_log_next(log, &offset, &log->end, &e) || !is_sound(&e))
            return vm_fail(VM_E_FORMAT, "vm_replay: the log is damaged: event %llu is none", (unsigned long long)log->count);
        log->count++;
    }
    return e.type == VM_LOG_END ? VM_OK : vm_fail(VM_E_FORMAT, "vm_replay: the log has no end: its recording was cut off");
}

int vm_log_read(int fd, vm_log *log)
{
    *log = (vm_log){ 0 };
    int status = read_file(fd, log);
    if (!status)
        status = check_header(log);
    if (!status)
        status = check_chunks(log);
    if (!status)
        status = check_events(log);
    if (status)
        vm_log_free(log);
    return status;
}

void vm_log_free(vm_log *log)
{
    free(log->bytes);
    free(log->events);
    *log = (vm_log){ 0 };
}
