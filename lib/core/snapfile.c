/* snapfile.c - snapshots in files.
 *
 * Layout: one page of header; the description (CPUs, platform, regions, checksums of RAM) ; then each RAM region's
 * contents from a page boundary on, as they are in memory, or compressed chunk by chunk. All sizes are known before the
 * first byte is written, so that a pipe will do.
 *
 * A file is not trusted. Header, description and chunks have checksums, which stop damage; what is inside is checked as
 * if it had been made to do harm: every size against what is left, every flag, CPU states by the rules for vm_sregs,
 * devices by their restore callbacks. Nothing of the machine changes while a file is loaded.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/snapfile.h"
#include "platform/pc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if VM_HAVE_ZSTD
#include <zstd.h>
#endif

#define PAGE VM_SNAP_PAGE
typedef unsigned long long ull;

static bool is_ram(const vm_region *r)
{
    return r->kind <= VM_REGION_FILE;
}

static uint64_t round_page(uint64_t n)
{
    return (n + PAGE - 1) & ~(PAGE - 1);
}

/* ---- checksums ----
 * Four lanes, each step a bijection of the lane for every input word and of the word for every lane: so a change of one
 * word, be it one bit, always shows. Not against somebody who wants to fool it. */
#define K1 UINT64_C(0x9e3779b97f4a7c15)
#define K2 UINT64_C(0xbf58476d1ce4e5b9)

static uint64_t step(uint64_t h, uint64_t word)
{
    h = (h ^ word) * K1;
    return h << 29 | h >> 35;
}

uint64_t vm_snap_hash(const void *data, size_t bytes)
{
    const uint8_t *p = data;
    uint64_t h[4] = { K1, K2, K1 ^ K2, bytes }, w[4];
    for (; bytes >= 32; bytes -= 32, p += 32) {
        memcpy(w, p, 32);
        for (unsigned i = 0; i < 4; i++)
            h[i] = step(h[i], w[i]);
    }
    memset(w, 0, sizeof w);
    memcpy(w, p, bytes);
    for (unsigned i = 0; i < 4; i++)
        h[i] = step(h[i], w[i]);
    return step(step(step(step(K2, h[0]), h[1]), h[2]), h[3]);
}

/* ---- writing: the description ---- */

typedef struct buffer { uint8_t *data; size_t bytes, capacity; bool failed; } buffer;

static void *put(buffer *b, const void *data, size_t bytes)
{
    size_t padded = (bytes + 7) & ~(size_t)7;
    if (b->failed || b->capacity - b->bytes < padded) {
        size_t capacity = (b->capacity + padded) * 2;
        uint8_t *grown = b->failed ? NULL : realloc(b->data, capacity);
        if (!grown) {
            b->failed = true;
            return NULL;
        }
        b->data = grown;
        b->capacity = capacity;
    }
    uint8_t *at = b->data + b->bytes;
    memset(at, 0, padded);
    if (bytes)
        memcpy(at, data, bytes);
    b->bytes += padded;
    return at;
}

/* RAM regions in the order they are written; `chunks` is where their table lies in the description. */
typedef struct out_region { vm_kept *kept; size_t chunks; uint64_t offset; } out_region;

typedef struct writer {
    vm_snapshot *s;
    buffer meta;
    out_region *regions;
    size_t region_count;               /* of RAM */
    uint8_t *chunk;                    /* one, uncompressed */
    bool is_compressed;
    uint8_t *packed; uint64_t packed_bytes, packed_room;     /* all chunks, compressed */
} writer;

static void put_cpus(writer *w)
{
    for (unsigned i = 0; i < w->s->machine->vcpu_count; i++) {
        vm_cpu_state c = w->s->cpus[i];
        c.io_log = NULL;
        put(&w->meta, &c, sizeof c);
        put(&w->meta, w->s->cpus[i].io_log, c.io_count * sizeof *c.io_log);
    }
}

static uint64_t chunks_of(uint64_t bytes)
{
    return (bytes + VM_SNAP_CHUNK - 1) / VM_SNAP_CHUNK;
}

static void put_region(writer *w, vm_kept *k)
{
    vm_region *r = k->region;
    snap_region head = { .kind = r->kind, .prot = k->prot, .is_enabled = k->is_enabled, .is_internal = r->is_internal,
                         .has_prot = k->page_prot != NULL, .has_device = k->device != NULL, .gpa = k->gpa,
                         .bytes = r->bytes, .device_bytes = k->device_bytes };
    size_t at = w->meta.bytes;
    put(&w->meta, &head, sizeof head);
    if (k->page_prot)
        put(&w->meta, k->page_prot, r->bytes / PAGE);
    if (k->device)
        put(&w->meta, k->device, k->device_bytes);
    if (!is_ram(r))
        return;
    w->regions[w->region_count++] = (out_region){ .kept = k, .chunks = w->meta.bytes, .offset = at };
    for (uint64_t i = 0; i < chunks_of(r->bytes); i++)
        put(&w->meta, &(snap_chunk){ 0 }, sizeof(snap_chunk));
}

static int by_place(const void *a, const void *b)
{
    const vm_kept *x = *(vm_kept *const *)a, *y = *(vm_kept *const *)b;
    if (x->region->kind != y->region->kind)
        return x->region->kind < y->region->kind ? -1 : 1;
    return x->gpa < y->gpa ? -1 : x->gpa > y->gpa;
}

/* Regions by kind and address, the platform's own device regions aside: its state says where they are. */
static int put_regions(writer *w, uint32_t *count)
{
    vm_snapshot *s = w->s;
    vm_kept **order = malloc((s->kept_count + 1) * sizeof *order);
    w->regions = malloc((s->kept_count + 1) * sizeof *w->regions);
    size_t n = 0;
    if (!order || !w->regions) {
        free(order);
        return vm_fail(VM_E_NOMEM, "no memory to write a snapshot");
    }
    for (size_t i = 0; i < s->kept_count; i++)
        if (is_ram(s->kept[i].region) || !s->kept[i].region->is_internal)
            order[n++] = &s->kept[i];
    qsort(order, n, sizeof *order, by_place);
    for (size_t i = 0; i < n; i++)
        put_region(w, order[i]);
    *count = (uint32_t)n;
    free(order);
    return VM_OK;
}

/* ---- writing: RAM ---- */

/* Contents of chunk i of a region; how many bytes. */
static size_t read_chunk(writer *w, const out_region *o, uint64_t i)
{
    uint64_t first = i * VM_SNAP_CHUNK, bytes = o->kept->region->bytes - first;
    if (bytes > VM_SNAP_CHUNK)
        bytes = VM_SNAP_CHUNK;
    for (uint64_t at = 0; at < bytes; at += PAGE)
        memcpy(w->chunk + at, vm_snap_page(w->s, o->kept, (first + at) / PAGE), PAGE);
    return bytes;
}

#if VM_HAVE_ZSTD
static int pack(writer *w, size_t bytes, snap_chunk *c)
{
    size_t most = ZSTD_compressBound(bytes);
    if (w->packed_room - w->packed_bytes < most) {
        uint64_t room = (w->packed_room + most) * 2;
        uint8_t *grown = realloc(w->packed, room);
        if (!grown)
            return vm_fail(VM_E_NOMEM, "no memory to compress a snapshot");
        w->packed = grown;
        w->packed_room = room;
    }
    size_t n = ZSTD_compress(w->packed + w->packed_bytes, most, w->chunk, bytes, 3);
    if (ZSTD_isError(n))
        return vm_fail(VM_E_NOMEM, "zstd: %s", ZSTD_getErrorName(n));
    *c = (snap_chunk){ .offset = w->packed_bytes, .bytes = (uint32_t)n,
                       .hash = vm_snap_hash(w->packed + w->packed_bytes, n) };
    w->packed_bytes += n;
    return VM_OK;
}
#else
static int pack(writer *w, size_t bytes, snap_chunk *c)
{
    return vm_fail(VM_E_UNSUPPORTED, "this build of the library has no zstd");
}
#endif

/* Fill the chunk tables; `at` is where the first region's contents go. Returns where they end in *end. */
static int describe_ram(writer *w, uint64_t at, uint64_t *end)
{
    int status = VM_OK;
    for (size_t n = 0; n < w->region_count && status == VM_OK; n++) {
        out_region *o = &w->regions[n];
        snap_region *head = (snap_region *)(void *)(w->meta.data + o->offset);
        head->offset = o->offset = at;
        for (uint64_t i = 0; i < chunks_of(head->bytes) && status == VM_OK; i++) {
            snap_chunk *c = (snap_chunk *)(void *)(w->meta.data + o->chunks) + i;
            size_t bytes = read_chunk(w, o, i);
            if (w->is_compressed)
                status = pack(w, bytes, c);
            else
                *c = (snap_chunk){ .offset = i * VM_SNAP_CHUNK, .bytes = (uint32_t)bytes,
                                   .hash = vm_snap_hash(w->chunk, bytes) };
        }
        if (!w->is_compressed)
            at += head->bytes;
    }
    *end = at + w->packed_bytes;
    return status;
}

static int write_all(int fd, const void *data, uint64_t bytes)
{
    const uint8_t *p = data;
    while (bytes) {
        ssize_t n = write(fd, p, bytes < (1u << 30) ? bytes : 1u << 30);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return vm_fail_errno(VM_E_HOST, "writing a snapshot");
        p += n;
        bytes -= (uint64_t)n;
    }
    return VM_OK;
}

static int write_ram(writer *w, int fd, bool can_seek)
{
    int status = VM_OK;
    for (size_t n = 0; n < w->region_count; n++)
        for (uint64_t i = 0; i < chunks_of(w->regions[n].kept->region->bytes); i++) {
            size_t bytes = read_chunk(w, &w->regions[n], i), run;
            for (size_t at = 0; at < bytes && status == VM_OK; at += run) {
                bool is_hole = can_seek && vm_page_is_zero(w->chunk + at);
                for (run = PAGE; at + run < bytes; run += PAGE)
                    if ((can_seek && vm_page_is_zero(w->chunk + at + run)) != is_hole)
                        break;
                if (!is_hole)
                    status = write_all(fd, w->chunk + at, run);
                else if (lseek(fd, (off_t)run, SEEK_CUR) < 0)
                    status = vm_fail_errno(VM_E_HOST, "writing a snapshot: lseek");
            }
            if (status != VM_OK)
                return status;
        }
    return VM_OK;
}

/* ---- writing: all of it ---- */

static void fill_header(const writer *w, snap_header *h, uint32_t regions, uint64_t data, uint64_t end)
{
    const vm_snapshot *s = w->s;
    const vm_machine *m = s->machine;
    memset(h, 0, sizeof *h);
    memcpy(h->magic, VM_SNAP_MAGIC, sizeof h->magic);
    h->version = VM_SNAP_VERSION;
    h->header_bytes = VM_SNAP_HEADER;
    h->flags = w->is_compressed ? VM_SNAP_PACKED : 0;
    h->is_pc = m->is_pc;
    h->vcpus = m->vcpu_count;
    h->cpu_bytes = sizeof(vm_cpu_state);
    h->regions = regions;
    h->event = (uint32_t)s->event;
    h->event_code = s->event_code;
    h->phys_mask = m->vcpus[0]->x86.phys_mask;
    strncpy(h->model, x86_model_name(m->vcpus[0]->x86.model), sizeof h->model - 1);
    h->time_ns = s->time_ns;
    h->tsc = s->tsc;
    h->meta_bytes = w->meta.bytes;
    h->meta_hash = vm_snap_hash(w->meta.data, w->meta.bytes);
    h->data_offset = data;
    h->file_bytes = end;
    h->header_hash = vm_snap_hash(h, offsetof(snap_header, header_hash));
}

static int describe(writer *w, snap_header *h)
{
    uint32_t regions = 0;
    uint64_t platform = w->s->platform_bytes, end;
    put_cpus(w);
    put(&w->meta, &platform, sizeof platform);
    put(&w->meta, w->s->platform, w->s->platform_bytes);
    int status = put_regions(w, &regions);
    if (status == VM_OK && w->meta.failed)
        status = vm_fail(VM_E_NOMEM, "no memory to describe a snapshot");
    uint64_t data = round_page(VM_SNAP_HEADER + w->meta.bytes);
    if (status == VM_OK)
        status = describe_ram(w, data, &end);
    if (status == VM_OK)
        fill_header(w, h, regions, data, end);
    return status;
}

static int write_file(writer *w, int fd)
{
    static const uint8_t zeros[VM_SNAP_HEADER];
    struct stat st;
    snap_header h;
    int status = describe(w, &h);
    off_t start = lseek(fd, 0, SEEK_CUR);
    bool is_file = start >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    if (status == VM_OK && is_file && ftruncate(fd, start) != 0)
        status = vm_fail_errno(VM_E_HOST, "writing a snapshot: ftruncate");
    if (status == VM_OK)
        status = write_all(fd, &h, sizeof h);
    if (status == VM_OK)
        status = write_all(fd, zeros, VM_SNAP_HEADER - sizeof h);
    if (status == VM_OK)
        status = write_all(fd, w->meta.data, w->meta.bytes);
    if (status == VM_OK)
        status = write_all(fd, zeros, h.data_offset - VM_SNAP_HEADER - w->meta.bytes);
    if (status == VM_OK)
        status = w->is_compressed ? write_all(fd, w->packed, w->packed_bytes) : write_ram(w, fd, is_file);
    if (status == VM_OK && is_file && ftruncate(fd, start + (off_t)h.file_bytes) != 0)
        status = vm_fail_errno(VM_E_HOST, "writing a snapshot: ftruncate");
    return status;
}

int vm_snap_save(vm_snapshot *s, int fd, unsigned flags)
{
    writer w = { .s = s, .is_compressed = flags & VM_SNAPSHOT_COMPRESS };
    w.chunk = malloc(VM_SNAP_CHUNK);
    int status = w.chunk ? write_file(&w, fd) : vm_fail(VM_E_NOMEM, "no memory to write a snapshot");
    free(w.chunk);
    free(w.meta.data);
    free(w.regions);
    free(w.packed);
    return status;
}

/* The directory's entry must be on the disk too. */
static int sync_directory(const char *path)
{
    char *copy = strdup(path);
    if (!copy)
        return vm_fail(VM_E_NOMEM, "no memory for a file's name");
    char *slash = strrchr(copy, '/');
    if (slash)
        slash[slash == copy] = 0;
    int fd = open(slash ? copy : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(copy);
    int status = fd >= 0 && fsync(fd) == 0 ? VM_OK : vm_fail_errno(VM_E_HOST, "snapshot: fsync of the directory");
    if (fd >= 0)
        close(fd);
    return status;
}

static int open_temporary(const char *path, char *name, size_t room)
{
    for (unsigned i = 0; i < 100; i++) {
        snprintf(name, room, "%s.%ld-%u.tmp", path, (long)getpid(), i);
        int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0 || errno != EEXIST)
            return fd;
    }
    return -1;
}

int vm_snap_save_file(vm_snapshot *s, const char *path, unsigned flags)
{
    size_t room = strlen(path) + 48;
    struct stat there;
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode))
        return vm_fail(VM_E_INVALID, "snapshot: %s is no regular file, and would be replaced by one", path);
    char *name = malloc(room);
    if (!name)
        return vm_fail(VM_E_NOMEM, "no memory for a file's name");
    int fd = open_temporary(path, name, room);
    if (fd < 0) {
        int status = vm_fail_errno(VM_E_HOST, name);
        free(name);
        return status;
    }
    bool is_synced = !(flags & VM_SNAPSHOT_NO_SYNC);
    int status = vm_snap_save(s, fd, flags);
    if (status == VM_OK && is_synced && fsync(fd) != 0)
        status = vm_fail_errno(VM_E_HOST, name);
    if (close(fd) != 0 && status == VM_OK)
        status = vm_fail_errno(VM_E_HOST, name);
    if (status == VM_OK && rename(name, path) != 0)
        status = vm_fail_errno(VM_E_HOST, path);
    if (status != VM_OK)
        unlink(name);
    else if (is_synced)
        status = sync_directory(path);
    free(name);
    return status;
}

/* ---- reading ---- */

typedef struct reader {
    vm_machine *m;
    int fd;
    unsigned flags;
    snap_header h;
    uint8_t *meta;
    size_t at;
    uint8_t *work, *plain;             /* a chunk that is not read to where it belongs; unpacked */
    uint64_t work_room, plain_room;
} reader;

static int bad(const char *what)
{
    return vm_fail(VM_E_FORMAT, "snapshot file: %s", what);
}

/* The next piece of the description; NULL: it is shorter than that. */
static const void *get(reader *r, uint64_t bytes)
{
    uint64_t left = r->h.meta_bytes - r->at;
    if (bytes > left || ((bytes + 7) & ~UINT64_C(7)) > left)
        return NULL;
    const void *p = r->meta + r->at;
    r->at += (bytes + 7) & ~UINT64_C(7);
    return p;
}

static int read_all(int fd, void *to, uint64_t bytes, uint64_t offset)
{
    uint8_t *p = to;
    while (bytes) {
        ssize_t n = pread(fd, p, bytes < (1u << 30) ? bytes : 1u << 30, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return vm_fail_errno(VM_E_HOST, "reading a snapshot");
        if (n == 0)
            return bad("it is shorter than it says");
        p += n;
        offset += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return VM_OK;
}

static int check_shape(const reader *r)
{
    const snap_header *h = &r->h;
    const vm_machine *m = r->m;
    char model[sizeof h->model] = "";
    strncpy(model, x86_model_name(m->vcpus[0]->x86.model), sizeof model - 1);
    if (h->is_pc != m->is_pc)
        return bad(m->is_pc ? "it is of a BARE machine, this is a PC" : "it is of a PC, this is a BARE machine");
    if (h->vcpus != m->vcpu_count)
        return vm_fail(VM_E_FORMAT, "snapshot file: it is of a machine with %u vCPUs, this one has %u", h->vcpus,
                       m->vcpu_count);
    if (memcmp(model, h->model, sizeof model) || h->phys_mask != m->vcpus[0]->x86.phys_mask)
        return vm_fail(VM_E_FORMAT, "snapshot file: it is of CPU model \"%.31s\", this machine has \"%s\"", h->model,
                       model);
    return VM_OK;
}

static int read_header(reader *r)
{
    struct stat st;
    uint8_t page[VM_SNAP_HEADER];
    snap_header *h = &r->h;
    if (fstat(r->fd, &st) != 0)
        return vm_fail_errno(VM_E_HOST, "snapshot file: fstat");
    if (!S_ISREG(st.st_mode))
        return bad("it is not a regular file");
    if (st.st_size < (off_t)sizeof page)
        return bad("it is too short");
    int status = read_all(r->fd, page, sizeof page, 0);
    if (status != VM_OK)
        return status;
    memcpy(h, page, sizeof *h);
    if (memcmp(h->magic, VM_SNAP_MAGIC, sizeof h->magic))
        return bad("it does not begin as a snapshot does");
    if (h->version != VM_SNAP_VERSION)
        return vm_fail(VM_E_FORMAT, "snapshot file: version %u, this library reads version %u", h->version,
                       VM_SNAP_VERSION);
    for (size_t i = sizeof *h; i < sizeof page; i++)
        if (page[i])
            return bad("the header is damaged");
    if (h->header_hash != vm_snap_hash(h, offsetof(snap_header, header_hash)))
        return bad("the header is damaged");
    if (h->header_bytes != VM_SNAP_HEADER || (h->flags & ~VM_SNAP_PACKED) || h->is_pc > 1 ||
        h->cpu_bytes != sizeof(vm_cpu_state))
        return bad("the header says what this library does not know");
    if (h->file_bytes != (uint64_t)st.st_size)
        return vm_fail(VM_E_FORMAT, "snapshot file: it has 0x%llx bytes, should have 0x%llx", (ull)st.st_size,
                       (ull)h->file_bytes);
    if (h->data_offset % PAGE || h->data_offset > h->file_bytes || h->data_offset < VM_SNAP_HEADER ||
        h->meta_bytes > h->data_offset - VM_SNAP_HEADER)
        return bad("the header's sizes do not fit together");
    return check_shape(r);
}

static int read_meta(reader *r)
{
    uint64_t room = r->h.data_offset - VM_SNAP_HEADER;
    r->meta = malloc(room + 1);
    if (!r->meta)
        return vm_fail(VM_E_NOMEM, "no memory to read a snapshot's description");
    int status = read_all(r->fd, r->meta, room, VM_SNAP_HEADER);
    if (status == VM_OK && vm_snap_hash(r->meta, r->h.meta_bytes) != r->h.meta_hash)
        status = bad("the description is damaged");
    for (uint64_t i = r->h.meta_bytes; i < room && status == VM_OK; i++)
        if (r->meta[i])
            status = bad("there is something between description and memory");
    return status;
}

static int read_cpus(reader *r, vm_snapshot *s)
{
    for (unsigned i = 0; i < r->h.vcpus; i++) {
        vm_cpu_state *c = &s->cpus[i];
        const void *from = get(r, sizeof *c);
        if (!from)
            return bad("it ends within a vCPU");
        memcpy(c, from, sizeof *c);
        c->io_log = NULL;
        uint32_t count = c->io_count;
        c->io_count = 0;
        if (count > X86_IO_LOG || !(from = get(r, count * sizeof *c->io_log)))
            return bad("it ends within a vCPU");
        if (count && !(c->io_log = malloc(count * sizeof *c->io_log)))
            return vm_fail(VM_E_NOMEM, "no memory for a vCPU's accesses under way");
        if (count)
            memcpy(c->io_log, from, count * sizeof *c->io_log);
        c->io_count = count;
        int status = vm_cpu_state_check(r->m->vcpus[i], c);
        if (status != VM_OK)
            return status;
    }
    return VM_OK;
}

/* Copies of the description's pieces that the snapshot keeps. */
static int keep(reader *r, uint64_t bytes, void **out)
{
    const void *from = get(r, bytes);
    if (!from)
        return bad("it ends too early");
    *out = malloc(bytes ? bytes : 1);
    if (!*out)
        return vm_fail(VM_E_NOMEM, "no memory for a piece of a snapshot");
    memcpy(*out, from, bytes);
    return VM_OK;
}

static int read_platform(reader *r, vm_snapshot *s)
{
    const uint64_t *bytes = get(r, sizeof *bytes);
    if (!bytes || (*bytes != 0) != r->m->is_pc)
        return bad("the platform's state is missing");
    if (!*bytes)
        return VM_OK;
    uint64_t n = *bytes;
    int status = keep(r, n, &s->platform);
    s->platform_bytes = status == VM_OK ? n : 0;
    return status;
}

/* ---- reading: regions ---- */

static bool is_good_region(const reader *r, const snap_region *g)
{
    uint64_t mask = r->h.phys_mask;
    if (g->kind > VM_REGION_PIO || g->prot > VM_PROT_RWX || g->is_enabled > 1 || g->is_internal > 1 || g->has_prot > 1 ||
        g->has_device > 1 || g->pad || !g->bytes)
        return false;
    if (g->kind == VM_REGION_PIO)
        return g->gpa < 0x10000 && g->bytes <= 0x10000 - g->gpa && !g->has_prot && g->is_enabled && !g->is_internal;
    if (g->gpa > mask || g->bytes - 1 > mask - g->gpa)
        return false;
    if (g->kind == VM_REGION_MMIO)
        return !g->has_prot && g->is_enabled && !g->is_internal;
    return !(g->gpa % PAGE) && !(g->bytes % PAGE) && g->is_enabled && !g->has_device;
}

/* They come sorted by kind and address; RAM kinds and MMIO share a space. */
static bool overlaps(const vm_snapshot *s, const snap_region *g)
{
    for (size_t i = 0; i < s->kept_count; i++) {
        const vm_kept *k = &s->kept[i];
        if ((k->region->kind == VM_REGION_PIO) == (g->kind == VM_REGION_PIO) && k->gpa <= g->gpa + (g->bytes - 1) &&
            g->gpa <= k->gpa + (k->region->bytes - 1))
            return true;
    }
    return false;
}

/* The machine's region for one in the file. */
static vm_region *match(const vm_machine *m, const snap_region *g)
{
    for (vm_region *r = m->regions; r; r = r->next)
        if (is_ram(r) == (g->kind <= VM_REGION_FILE) && (is_ram(r) || r->kind == (vm_region_kind)g->kind) &&
            r->is_internal == g->is_internal && r->gpa == g->gpa && r->bytes == g->bytes)
            return r;
    return NULL;
}

/* RAM that the machine does not have: a region outside of the map, until a restore puts it there. */
static int make_region(reader *r, const snap_region *g, vm_region **out)
{
    vm_region *made = calloc(1, sizeof *made);
    if (!made)
        return vm_fail(VM_E_NOMEM, "no memory for a region");
    *made = (vm_region){ .machine = r->m, .kind = VM_REGION_RAM, .gpa = g->gpa, .bytes = g->bytes, .prot = g->prot,
                         .is_parked = true };
    made->page_flags = vm_zeroed(g->bytes / PAGE);
    made->host = mmap(NULL, g->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made->page_flags && made->host != MAP_FAILED) {
        *out = made;
        return VM_OK;
    }
    if (made->host != MAP_FAILED)
        munmap(made->host, g->bytes);
    vm_zeroed_free((void *)made->page_flags, g->bytes / PAGE);
    free(made);
    return vm_fail(VM_E_NOMEM, "no memory for a region of 0x%llx bytes", (ull)g->bytes);
}

static int find_region(reader *r, const snap_region *g, vm_region **out)
{
    *out = match(r->m, g);
    if (*out)
        return VM_OK;
    if (g->kind <= VM_REGION_FILE && !g->is_internal)
        return make_region(r, g, out);
    return vm_fail(VM_E_FORMAT, "snapshot file: the machine has no %s of 0x%llx bytes at 0x%llx",
                   g->kind <= VM_REGION_FILE ? "main memory" : g->kind == VM_REGION_PIO ? "ports" : "device", (ull)g->bytes,
                   (ull)g->gpa);
}

static int check_prots(const vm_kept *k)
{
    for (uint64_t i = 0; i < k->region->bytes / PAGE; i++)
        if (k->page_prot[i] > VM_PROT_RWX)
            return bad("permissions that do not exist");
    return VM_OK;
}

/* ---- reading: RAM ---- */

static bool is_good_chunk(const reader *r, const snap_region *g, const snap_chunk *c, uint64_t i)
{
    uint64_t plain = g->bytes - i * VM_SNAP_CHUNK < VM_SNAP_CHUNK ? g->bytes - i * VM_SNAP_CHUNK : VM_SNAP_CHUNK;
    uint64_t room = r->h.file_bytes - g->offset;
    if (c->pad || c->offset > room || c->bytes > room - c->offset)
        return false;
    if (r->h.flags & VM_SNAP_PACKED)
        return c->bytes <= 2 * VM_SNAP_CHUNK;
    return c->offset == i * VM_SNAP_CHUNK && c->bytes == plain;
}

#if VM_HAVE_ZSTD
/* Pages of zeros stay as they were made: they take no memory. */
static int unpack(reader *r, const snap_chunk *c, uint8_t *to, uint64_t plain)
{
    size_t n = ZSTD_decompress(r->plain, plain, r->work, c->bytes);
    if (ZSTD_isError(n) || n != plain)
        return bad("compressed memory is damaged");
    for (uint64_t at = 0; at < plain; at += PAGE)
        if (!vm_page_is_zero(r->plain + at))
            memcpy(to + at, r->plain + at, PAGE);
    return VM_OK;
}
#else
static int unpack(reader *r, const snap_chunk *c, uint8_t *to, uint64_t plain)
{
    return vm_fail(VM_E_UNSUPPORTED, "snapshot file: it is compressed, this build of the library has no zstd");
}
#endif

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Chunk by chunk: check, and copy to `to` unless it is NULL (mapped from the file). */
static int read_chunks(reader *r, const snap_region *g, const snap_chunk *chunks, uint8_t *to)
{
    int status = VM_OK;
    bool is_packed = r->h.flags & VM_SNAP_PACKED;
    for (uint64_t i = 0; i < chunks_of(g->bytes) && status == VM_OK; i++) {
        const snap_chunk *c = &chunks[i];
        uint64_t first = i * VM_SNAP_CHUNK, plain = g->bytes - first < VM_SNAP_CHUNK ? g->bytes - first : VM_SNAP_CHUNK;
        uint8_t *at = is_packed || !to ? r->work : to + first;
        if (!is_good_chunk(r, g, c, i))
            return bad("the table of its memory is not possible");
        if (!to && (r->flags & VM_SNAPSHOT_NO_VERIFY))
            continue;
        status = read_all(r->fd, at, c->bytes, g->offset + c->offset);
        if (status == VM_OK && vm_snap_hash(at, c->bytes) != c->hash)
            status = vm_fail(VM_E_FORMAT, "snapshot file: memory at 0x%llx is damaged", (ull)(g->gpa + first));
        if (status == VM_OK && is_packed)
            status = unpack(r, c, to + first, plain);
    }
    return status;
}

#define MAPPED_LEAST (128u << 10)

/* At least `bytes` at *p, which has *room. */
static bool has_room(uint8_t **p, uint64_t *room, uint64_t bytes)
{
    if (*room >= bytes)
        return true;
    free(*p);
    *p = malloc(bytes);
    *room = *p ? bytes : 0;
    return *p;
}

static int find_work(reader *r, const snap_region *g, bool is_mapped)
{
    const bool is_packed = r->h.flags & VM_SNAP_PACKED;
    const uint64_t work = is_packed ? 2 * VM_SNAP_CHUNK : is_mapped ? VM_SNAP_CHUNK : 0;
    if (has_room(&r->work, &r->work_room, least(r->h.file_bytes, work)) &&
        has_room(&r->plain, &r->plain_room, is_packed ? least(g->bytes, VM_SNAP_CHUNK) : 0))
        return VM_OK;
    return vm_fail(VM_E_NOMEM, "no memory to read a snapshot");
}

static int read_memory(reader *r, const snap_region *g, vm_kept *k)
{
    const snap_chunk *chunks = get(r, chunks_of(g->bytes) * sizeof *chunks);
    uint8_t *to = NULL;
    if (!chunks || g->offset > r->h.file_bytes || g->offset % (r->h.flags & VM_SNAP_PACKED ? 1 : PAGE))
        return bad("the table of its memory is not possible");
    if (!(r->h.flags & VM_SNAP_PACKED) && g->bytes > r->h.file_bytes - g->offset)
        return bad("it ends within the memory");
    if (!(r->h.flags & VM_SNAP_PACKED) && g->bytes >= MAPPED_LEAST)
        k->image = vm_image_of_file(r->fd, g->offset, g->bytes);
    else
        k->image = vm_image_new(g->bytes, &to);
    if (!k->image)
        return VM_E_NOMEM;
    int status = find_work(r, g, !to);
    if (status == VM_OK)
        status = read_chunks(r, g, chunks, to);
    if (to)
        vm_image_seal(k->image);
    return status;
}

static int read_region(reader *r, vm_snapshot *s)
{
    const snap_region *from = get(r, sizeof *from);
    if (!from)
        return bad("it ends within the memory map");
    snap_region g = *from;
    vm_region *region = NULL;
    if (!is_good_region(r, &g) || overlaps(s, &g))
        return bad("the memory map is not possible");
    /* Before anything is allocated for it: what describes it must be there. */
    if (g.kind <= VM_REGION_FILE && chunks_of(g.bytes) > (r->h.meta_bytes - r->at) / sizeof(snap_chunk))
        return bad("it ends within the memory map");
    int status = find_region(r, &g, &region);
    if (status != VM_OK)
        return status;
    vm_kept *k = &s->kept[s->kept_count++];
    *k = (vm_kept){ .region = region, .gpa = g.gpa, .is_enabled = true, .prot = g.prot };
    region->keepers++;
    if (g.has_prot) {
        status = keep(r, g.bytes / PAGE, (void **)&k->page_prot);
        if (status == VM_OK)
            status = check_prots(k);
    }
    if (status == VM_OK && g.has_device) {
        if (!region->ops.restore)
            return vm_fail(VM_E_FORMAT, "snapshot file: the device at 0x%llx cannot take a state", (ull)g.gpa);
        status = keep(r, g.device_bytes, &k->device);
        k->device_bytes = g.device_bytes;
        s->needs_devices = true;
    }
    if (status == VM_OK && g.kind <= VM_REGION_FILE)
        status = read_memory(r, &g, k);
    return status;
}

/* The platform's own regions: RAM must all be in the file, devices are where they are. */
static int add_internal(reader *r, vm_snapshot *s)
{
    size_t given = s->kept_count;
    for (vm_region *p = r->m->regions; p; p = p->next) {
        bool is_there = false;
        for (size_t i = 0; i < given && !is_there; i++)
            is_there = s->kept[i].region == p;
        if (!p->is_internal || is_there)
            continue;
        if (is_ram(p))
            return vm_fail(VM_E_FORMAT, "snapshot file: no contents for main memory at 0x%llx", (ull)p->gpa);
        s->kept[s->kept_count++] = (vm_kept){ .region = p, .gpa = p->gpa, .is_enabled = p->is_enabled, .prot = p->prot };
        p->keepers++;
    }
    return VM_OK;
}

static int read_regions(reader *r, vm_snapshot *s)
{
    int status = VM_OK;
    if (r->h.regions > r->h.meta_bytes / sizeof(snap_region))
        return bad("the memory map is not possible");
    s->kept = calloc(r->h.regions + r->m->region_count + 1, sizeof *s->kept);
    if (!s->kept)
        return vm_fail(VM_E_NOMEM, "no memory for a snapshot's regions");
    for (uint32_t i = 0; i < r->h.regions && status == VM_OK; i++)
        status = read_region(r, s);
    if (status == VM_OK && r->at != r->h.meta_bytes)
        status = bad("the description is longer than what it describes");
    if (status == VM_OK)
        status = add_internal(r, s);
    vm_snap_sort(s);
    return status;
}

static int read_snapshot(reader *r, vm_snapshot *s)
{
    int status = read_meta(r);
    if (status == VM_OK)
        status = read_cpus(r, s);
    if (status == VM_OK)
        status = read_platform(r, s);
    if (status == VM_OK)
        status = read_regions(r, s);
    s->time_ns = r->h.time_ns;
    s->tsc = r->h.tsc;
    s->event = (int)r->h.event;
    s->event_code = r->h.event_code;
    return status;
}

static int load(reader *r, vm_snapshot **out)
{
    vm_snapshot *s = NULL;
    bool is_first = !r->m->track;
    int status = read_header(r);
    if (status == VM_OK)
        status = vm_track_start(r->m);
    if (status == VM_OK)
        status = vm_snap_new(r->m, &s);
    if (status == VM_OK)
        status = read_snapshot(r, s);
    if (status == VM_OK)
        status = vm_snap_enter(s, NULL);
    if (status != VM_OK) {
        if (s)
            vm_snap_discard(s);
        if (is_first)
            vm_track_stop(r->m);
        return status;
    }
    if (is_first)
        vm_map_edited(r->m);
    *out = s;
    return VM_OK;
}

int vm_snap_load(vm_machine *m, int fd, unsigned flags, vm_snapshot **out)
{
    reader r = { .m = m, .fd = fd, .flags = flags };
    int status = vm_snap_begin(m, "vm_snapshot_load");
    if (status != VM_OK)
        return status;
    status = load(&r, out);
    vm_snap_end(m);
    free(r.work);
    free(r.plain);
    free(r.meta);
    return status;
}

int vm_snap_load_file(vm_machine *m, const char *path, unsigned flags, vm_snapshot **out)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return vm_fail_errno(errno == ENOENT ? VM_E_NOTFOUND : VM_E_HOST, path);
    int status = vm_snap_load(m, fd, flags, out);
    close(fd);
    return status;
}
