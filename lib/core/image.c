/* image.c - contents of memory that never change again, to be copied from or mapped privately any number of times.
 *
 * Images that may be mapped lie in a memory file (or the snapshot file they were loaded from); small ones in anonymous
 * memory. Pages of zeros are holes.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/track.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE VM_SNAP_PAGE
#define FILE_LEAST (128u << 10)        /* smaller ones are copied, not mapped */

const uint8_t vm_zero_page[4096] __attribute__((aligned(4096)));

bool vm_page_is_zero(const uint8_t *page)
{
    return *(const uint64_t *)(const void *)page == 0 && memcmp(page, vm_zero_page, PAGE) == 0;
}

vm_image *vm_image_ref(vm_image *image)
{
    atomic_fetch_add_explicit(&image->refs, 1, memory_order_relaxed);
    return image;
}

void vm_image_drop(vm_image *image)
{
    if (!image || atomic_fetch_sub(&image->refs, 1) != 1)
        return;
    munmap((void *)(uintptr_t)image->view, image->bytes);
    if (image->fd >= 0)
        close(image->fd);
    free(image->present);
    free(image);
}

static vm_image *new_image(int fd, uint64_t offset, uint64_t bytes, const void *view)
{
    vm_image *image = malloc(sizeof *image);
    if (!image) {
        vm_fail(VM_E_NOMEM, "no memory for an image");
        munmap((void *)(uintptr_t)view, bytes);
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    *image = (vm_image){ .refs = 1, .fd = fd, .offset = offset, .bytes = bytes, .view = view };
    return image;
}

static vm_image *make(uint64_t bytes, bool is_mappable, uint8_t **writable)
{
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (is_mappable) {
        fd = memfd_create("libvm-image", MFD_CLOEXEC);
        if (fd < 0) {
            vm_fail_errno(VM_E_NOMEM, "memory for an image: memfd_create");
            return NULL;
        }
        flags = MAP_SHARED;
    }
    void *view = MAP_FAILED;
    if (fd < 0 || ftruncate(fd, (off_t)bytes) == 0)
        view = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (view == MAP_FAILED) {
        vm_fail_errno(VM_E_NOMEM, "memory for an image");
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    *writable = view;
    return new_image(fd, 0, bytes, view);
}

vm_image *vm_image_new(uint64_t bytes, uint8_t **writable)
{
    return make(bytes, bytes >= FILE_LEAST, writable);
}

void vm_image_seal(vm_image *image)
{
    mprotect((void *)(uintptr_t)image->view, image->bytes, PROT_READ);
}

vm_image *vm_image_copy(const uint8_t *host, uint64_t bytes, bool is_mappable)
{
    uint8_t *to;
    vm_image *image = make(bytes, is_mappable && bytes >= FILE_LEAST, &to);
    if (!image)
        return NULL;
    image->present = calloc((bytes / PAGE + 63) / 64, sizeof *image->present);
    if (!image->present) {
        vm_image_drop(image);
        vm_fail(VM_E_NOMEM, "no memory for an image");
        return NULL;
    }
    for (uint64_t page = 0; page < bytes / PAGE; page++)
        if (!vm_page_is_zero(host + page * PAGE)) {
            memcpy(to + page * PAGE, host + page * PAGE, PAGE);
            image->present[page / 64] |= UINT64_C(1) << page % 64;
        }
    vm_image_seal(image);
    return image;
}

vm_image *vm_image_of_file(int fd, uint64_t offset, uint64_t bytes)
{
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0) {
        vm_fail_errno(VM_E_HOST, "snapshot: the file's descriptor");
        return NULL;
    }
    void *view = mmap(NULL, bytes, PROT_READ, MAP_SHARED, own, (off_t)offset);
    if (view == MAP_FAILED) {
        vm_fail_errno(VM_E_HOST, "snapshot: mmap of the file");
        close(own);
        return NULL;
    }
    return new_image(own, offset, bytes, view);
}

/* Mapped elsewhere first: a mapping that fails must not leave a hole where RAM was. */
bool vm_image_map(const vm_image *image, uint8_t *host)
{
    if (image->fd < 0)
        return false;
    void *at = mmap(NULL, image->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, image->fd,
                    (off_t)image->offset);
    if (at == MAP_FAILED)
        return false;
    if (mremap(at, image->bytes, image->bytes, MREMAP_MAYMOVE | MREMAP_FIXED, host) == host)
        return true;
    munmap(at, image->bytes);
    return false;
}

/* ---- what was written in a private mapping: the kernel's page map says which pages are no longer the file's ---- */

#define PM_FILE (UINT64_C(1) << 61)
#define PM_SWAP (UINT64_C(1) << 62)
#define PM_PRESENT (UINT64_C(1) << 63)

static bool scan(int fd, const uint8_t *host, uint64_t pages, bool (*fn)(void *user, uint64_t page), void *user)
{
    uint64_t map[1024];
    for (uint64_t first = 0; first < pages; first += 1024) {
        uint64_t n = pages - first < 1024 ? pages - first : 1024;
        ssize_t want = (ssize_t)(n * sizeof *map);
        off_t at = (off_t)(((uintptr_t)host / PAGE + first) * sizeof *map);
        if (pread(fd, map, (size_t)want, at) != want)
            return false;
        for (uint64_t i = 0; i < n; i++)
            if (((map[i] & PM_SWAP) || ((map[i] & PM_PRESENT) && !(map[i] & PM_FILE))) && !fn(user, first + i))
                return true;
    }
    return true;
}

bool vm_image_changed(const uint8_t *host, uint64_t bytes, bool (*fn)(void *user, uint64_t page), void *user)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool ok = scan(fd, host, bytes / PAGE, fn, user);
    close(fd);
    return ok;
}
