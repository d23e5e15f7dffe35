/* backing.c - the host memory behind RAM: giving it back, advising the host, sharing pages of equal content.
 *
 * Sharing maps runs of equal pages privately from one unnamed file: the host copies a page when somebody writes to it. A
 * region's host address never changes, so nobody who holds one need know. Regions that are private mappings of a
 * snapshot's image are left alone: what differs from the image is told by the host's page tables there.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define PAGE UINT64_C(4096)
enum { LEAST_RUN = 4, MOST_RUNS = 16384 };

/* ---- a range of RAM, piece by piece ---- */

typedef int (*piece_fn)(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, unsigned argument);

static int each_piece(vm_machine *m, uint64_t gpa, uint64_t bytes, piece_fn fn, unsigned argument)
{
    int status = VM_OK;
    for (uint64_t at = gpa, left = bytes, n; left && status == VM_OK; at += n, left -= n) {
        const vm_range *range = vm_view_find(&m->view, at);
        if (!range || range->region->kind > VM_REGION_FILE)
            return vm_fail(VM_E_FAULT, "no RAM at guest-physical 0x%llx", (unsigned long long)at);
        uint64_t offset = at - range->gpa;
        n = range->bytes - offset < left ? range->bytes - offset : left;
        status = fn(m, range->region, offset, n, argument);
    }
    return status;
}

/* ---- giving back ---- */

static int may_discard(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, unsigned unused)
{
    (void)m, (void)bytes, (void)unused;
    if (r->kind == VM_REGION_RAM || r->is_internal)
        return VM_OK;
    return vm_fail(VM_E_UNSUPPORTED, "vm_discard: the memory at 0x%llx is not libvm's own", (unsigned long long)(r->gpa + offset));
}

static bool give_back(const vm_region *r, void *host, uint64_t bytes)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (!r->is_merged)
        return madvise(host, bytes, MADV_DONTNEED) == 0;
    return mmap(host, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;      /* the shared file would be seen again */
}

static int discard(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, unsigned unused)
{
    (void)unused;
    uint8_t *host = r->host + offset;
    if (r->kind != VM_REGION_RAM) {    /* main memory from a file */
        if (!r->is_shared_file || madvise(host, bytes, MADV_REMOVE) != 0)
            memset(host, 0, bytes);
    } else if (r->backing || !give_back(r, host, bytes)) {
        memset(host, 0, bytes);
    }
    vm_page_written(m, vm_vcpu_self(m), r, offset, bytes);
    return VM_OK;
}

int vm_memory_discard(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    vm_pause(m);
    int status = each_piece(m, gpa, bytes, may_discard, 0);
    if (status == VM_OK)
        status = each_piece(m, gpa, bytes, discard, 0);
    vm_resume(m);
    return status;
}

/* ---- main memory from a file ---- */

/* One mapping for all of low memory, whatever the guest has in between: huge pages cannot be cut. */
static int map_main(vm_machine *m, int fd, unsigned which, uint64_t offset, uint64_t bytes)
{
    struct statfs fs;
    uint64_t unit = fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : PAGE;
    bytes = (bytes + unit - 1) / unit * unit;
    void *host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, m->options.ram_private ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED, fd,
                      (off_t)offset);
    if (host == MAP_FAILED)
        return vm_fail_errno(VM_E_HOST, m->options.ram_file);
    m->ram_map[which].host = host;
    m->ram_map[which].bytes = bytes;
    return VM_OK;
}

int vm_memory_map_main(vm_machine *m, uint64_t low, uint64_t high)
{
    struct stat st;
    int fd = open(m->options.ram_file, (m->options.ram_private ? O_RDONLY : O_RDWR) | O_CLOEXEC), status = VM_OK;
    if (fd < 0)
        return vm_fail_errno(VM_E_HOST, m->options.ram_file);
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size < low + high)
        status = vm_fail(VM_E_INVALID, "ram_file has 0x%llx bytes, ram_bytes is 0x%llx", (unsigned long long)st.st_size,
                         (unsigned long long)(low + high));
    if (status == VM_OK)
        status = map_main(m, fd, 0, 0, low);
    if (status == VM_OK && high)
        status = map_main(m, fd, 1, low, high);
    close(fd);
    return status;
}

void vm_memory_unmap_main(vm_machine *m)
{
    for (unsigned i = 0; i < 2; i++)
        if (m->ram_map[i].host)
            munmap(m->ram_map[i].host, m->ram_map[i].bytes);
}

/* ---- advice ---- */

static int check_piece(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, unsigned unused)
{
    (void)m, (void)r, (void)offset, (void)bytes, (void)unused;
    return VM_OK;
}

static int advise(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, unsigned advice)
{
    static const struct { unsigned bit; int value; const char *text; } table[] = {
        { VM_ADVICE_HUGE, MADV_HUGEPAGE, "huge pages" },      { VM_ADVICE_SMALL, MADV_NOHUGEPAGE, "small pages" },
        { VM_ADVICE_MERGEABLE, MADV_MERGEABLE, "merging" },   { VM_ADVICE_UNMERGEABLE, MADV_UNMERGEABLE, "no merging" },
    };
    (void)m;
    for (unsigned i = 0; i < sizeof table / sizeof *table; i++)
        if ((advice & table[i].bit) && madvise(r->host + offset, bytes, table[i].value) != 0)
            return vm_fail_errno(VM_E_HOST, table[i].text);
    if (advice & VM_ADVICE_PREFAULT) {
        int kind = 23;                 /* MADV_POPULATE_WRITE: Linux 5.14 */
        if (r->is_read_only)
            kind = 22;                 /* MADV_POPULATE_READ */
        if (madvise(r->host + offset, bytes, kind) != 0)
            return vm_fail_errno(VM_E_HOST, "committing memory");
    }
    return VM_OK;
}

int vm_memory_advise(vm_machine *m, uint64_t gpa, uint64_t bytes, unsigned advice)
{
    vm_machine_lock(m);
    int status = each_piece(m, gpa, bytes, check_piece, 0);
    if (status == VM_OK)
        status = each_piece(m, gpa, bytes, advise, advice);
    vm_machine_unlock(m);
    return status;
}

/* ---- sharing ---- */

typedef struct page { uint64_t hash; vm_region *region; uint64_t number, slot; } page;        /* slot: in the file, NOWHERE */
#define NOWHERE UINT64_MAX

typedef struct pool {
    page *pages;                       /* those that are resident, region by region */
    size_t count, capacity;
    uint32_t *table;                   /* by hash: 1 + index of the first such page */
    size_t mask;
    int fd;
    uint64_t slots, saved;             /* pages in the file */
    unsigned runs;
} pool;

static const uint8_t *host_of(const page *p)
{
    return p->region->host + p->number * PAGE;
}

static uint64_t hash_of(const uint8_t *bytes)
{
    uint64_t h[4] = { 1, 2, 3, 4 }, word[4];
    for (unsigned i = 0; i < PAGE; i += 32) {
        memcpy(word, bytes + i, 32);
        for (unsigned k = 0; k < 4; k++)
            h[k] = (h[k] ^ word[k]) * UINT64_C(0x9e3779b97f4a7c15), h[k] ^= h[k] >> 29;
    }
    return (h[0] * 3 + h[1]) * 5 + (h[2] * 7 + h[3]) * 11;
}

static bool add_page(pool *s, vm_region *r, uint64_t number)
{
    if (s->count == s->capacity) {
        size_t capacity = s->capacity ? 2 * s->capacity : 4096;
        page *pages = realloc(s->pages, capacity * sizeof *pages);
        if (!pages)
            return false;
        s->pages = pages;
        s->capacity = capacity;
    }
    s->pages[s->count++] = (page){ .hash = hash_of(r->host + number * PAGE), .region = r, .number = number, .slot = NOWHERE };
    return true;
}

/* The region's pages that the host holds in memory. */
static bool add_region(pool *s, vm_region *r)
{
    enum { STEP = 1024 };
    unsigned char resident[STEP];
    for (uint64_t first = 0, total = r->bytes / PAGE; first < total; first += STEP) {
        uint64_t n = total - first < STEP ? total - first : STEP;
        if (mincore(r->host + first * PAGE, n * PAGE, resident) != 0)
            continue;
        for (uint64_t i = 0; i < n; i++)
            if ((resident[i] & 1) && !add_page(s, r, first + i))
                return false;
    }
    return true;
}

static bool are_equal(const pool *s, size_t a, size_t b)
{
    return s->pages[a].hash == s->pages[b].hash && memcmp(host_of(&s->pages[a]), host_of(&s->pages[b]), PAGE) == 0;
}

static bool follows(const pool *s, size_t i)
{
    return i + 1 < s->count && s->pages[i + 1].region == s->pages[i].region && s->pages[i + 1].number == s->pages[i].number + 1;
}

/* How many pages from b on equal those from a on, all of a's in the file in one piece or none of them. */
static size_t run_length(const pool *s, size_t a, size_t b)
{
    size_t n = 1, first_b = b;
    for (;; n++, a++, b++) {
        if (!follows(s, a) || !follows(s, b) || a + 1 == first_b || s->pages[b + 1].slot != NOWHERE || !are_equal(s, a + 1, b + 1))
            return n;
        uint64_t slot = s->pages[a].slot;
        if (s->pages[a + 1].slot != (slot == NOWHERE ? NOWHERE : slot + 1))
            return n;
    }
}

static bool map_run(const pool *s, size_t at, size_t n, uint64_t slot)
{
    uint8_t *host = s->pages[at].region->host + s->pages[at].number * PAGE;
    if (mmap(host, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, s->fd,
             (off_t)(slot * PAGE)) == MAP_FAILED)
        return false;
    s->pages[at].region->is_merged = true;
    return true;
}

static bool write_slots(pool *s, size_t at, size_t n)
{
    const uint8_t *from = host_of(&s->pages[at]);
    for (size_t done = 0; done < n * PAGE;) {
        ssize_t k = pwrite(s->fd, from + done, n * PAGE - done, (off_t)(s->slots * PAGE + done));
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        done += (size_t)k;
    }
    return true;
}

/* Pages [b, b + n) become the same memory as [a, a + n). */
static bool share_run(pool *s, size_t a, size_t b, size_t n)
{
    if (s->pages[a].slot == NOWHERE) {
        if (!write_slots(s, a, n) || !map_run(s, a, n, s->slots))
            return false;
        for (size_t i = 0; i < n; i++)
            s->pages[a + i].slot = s->slots + i;
        s->slots += n;
        s->runs++;
    }
    if (!map_run(s, b, n, s->pages[a].slot))
        return false;
    for (size_t i = 0; i < n; i++)
        s->pages[b + i].slot = s->pages[a].slot + i;
    s->saved += n * PAGE;
    s->runs++;
    return true;
}

static int share_all(pool *s)
{
    for (size_t i = 0; i < s->count && s->runs < MOST_RUNS;) {
        uint32_t *head = &s->table[s->pages[i].hash & s->mask];
        size_t n = 1, a = *head - 1;
        while (*head && s->pages[a].hash != s->pages[i].hash) {
            head = &s->table[(size_t)(head - s->table + 1) & s->mask];
            a = *head - 1;
        }
        if (!*head) {
            *head = (uint32_t)i + 1;
        } else if (s->pages[i].slot == NOWHERE && are_equal(s, a, i) && (n = run_length(s, a, i)) >= LEAST_RUN) {
            if (!share_run(s, a, i, n))
                return vm_fail_errno(VM_E_HOST, "vm_share_pages");
        } else {
            n = 1;
        }
        i += n;
    }
    return VM_OK;
}

static bool gather(pool *s, vm_machine *const *machines, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        for (vm_region *r = machines[i]->regions; r; r = r->next)
            if (r->kind == VM_REGION_RAM && !r->backing && !add_region(s, r))
                return false;
    for (s->mask = 1024; s->mask < 2 * s->count; s->mask *= 2)
        ;
    s->table = calloc(s->mask, sizeof *s->table);
    s->mask--;
    return s->table != NULL && s->count < UINT32_MAX;
}

int vm_memory_share(vm_machine *const *machines, unsigned count, uint64_t *saved)
{
    pool s = { .fd = memfd_create("libvm-shared", MFD_CLOEXEC) };
    if (s.fd < 0)
        return vm_fail_errno(VM_E_HOST, "vm_share_pages: memfd_create");
    int status = gather(&s, machines, count)
                     ? share_all(&s)
                     : vm_fail(VM_E_NOMEM, "vm_share_pages: no memory for a list of %zu pages", s.count);
    *saved = s.saved;
    close(s.fd);
    free(s.table);
    free(s.pages);
    return status;
}
