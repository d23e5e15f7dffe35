/* image.c - files of the host, read whole, and the module lists that name them. Nothing here knows a format. */
#include "boot/boot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define VM_IMAGE_MAX (UINT64_C(16) << 30)

/* Large images lie in huge pages: a fault for each small one would cost as much as the reading. */
static uint8_t *make_room(uint64_t bytes)
{
    const uint64_t huge = UINT64_C(2) << 20;
    if (bytes < huge) return malloc((size_t)bytes);
    bytes = (bytes + huge - 1) & ~(huge - 1);
    uint8_t *p = aligned_alloc((size_t)huge, (size_t)bytes);
    if (p) (void)madvise(p, (size_t)bytes, MADV_HUGEPAGE); /* a wish */
    return p;
}

/* Regular files only: a pipe or device has no size that could be checked before reading it. */
static int read_all(int fd, vm_image *image)
{
    struct stat st;
    if (fstat(fd, &st) != 0) return vm_fail_errno(VM_E_HOST, image->path);
    if (!S_ISREG(st.st_mode)) return vm_fail(VM_E_HOST, "%s: not a regular file", image->path);
    if (st.st_size == 0) return vm_fail(VM_E_FORMAT, "%s: empty file", image->path);
    if ((uint64_t)st.st_size > VM_IMAGE_MAX)
        return vm_fail(VM_E_FORMAT, "%s: %lld bytes, more than any image has", image->path, (long long)st.st_size);
    image->data = make_room((uint64_t)st.st_size);
    if (!image->data) return vm_fail(VM_E_NOMEM, "%s: no memory for %lld bytes", image->path, (long long)st.st_size);
    while (image->bytes < (uint64_t)st.st_size) {
        ssize_t n = read(fd, image->data + image->bytes, (size_t)st.st_size - image->bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return vm_fail_errno(VM_E_HOST, image->path);
        if (n == 0) break;                      /* shrank meanwhile: what there is counts */
        image->bytes += (uint64_t)n;
    }
    return VM_OK;
}

int vm_image_open(vm_image *image, const char *path)
{
    memset(image, 0, sizeof *image);
    image->path = path;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return vm_fail_errno(VM_E_HOST, path);
    int status = read_all(fd, image);
    close(fd);
    if (status != VM_OK) vm_image_close(image);
    return status;
}

void vm_image_close(vm_image *image)
{
    free(image->data);
    image->data = NULL;
    image->bytes = 0;
}

static bool field(const vm_image *image, uint64_t offset, void *value, size_t width)
{
    if (!vm_image_has(image, offset, width)) return false;
    memcpy(value, image->data + offset, width);
    return true;
}
bool vm_image_u8(const vm_image *image, uint64_t offset, uint8_t *value) { return field(image, offset, value, 1); }
bool vm_image_u16(const vm_image *image, uint64_t offset, uint16_t *value) { return field(image, offset, value, 2); }
bool vm_image_u32(const vm_image *image, uint64_t offset, uint32_t *value) { return field(image, offset, value, 4); }
bool vm_image_u64(const vm_image *image, uint64_t offset, uint64_t *value) { return field(image, offset, value, 8); }

static int open_module(vm_modules *modules, char *text, bool with_arguments)
{
    if (modules->count == VM_BOOT_MAX_MODULES)
        return vm_fail(VM_E_INVALID, "more than %u modules", VM_BOOT_MAX_MODULES);
    char *space = with_arguments ? strchr(text, ' ') : NULL;
    if (space) *space = 0;
    if (!*text) return vm_fail(VM_E_INVALID, "empty file name in the list of modules");
    /* The path lives as long as the list: keep the string whole and let the image point at a copy of its name. */
    char *path = strdup(text);
    if (!path) return vm_fail(VM_E_NOMEM, "no memory for a module's name");
    int status = vm_image_open(&modules->image[modules->count], path);
    if (status != VM_OK) { free(path); return status; }
    if (space) *space = ' ';
    modules->text[modules->count++] = text;
    return VM_OK;
}

int vm_modules_open(vm_modules *modules, const char *list, bool with_arguments)
{
    memset(modules, 0, sizeof *modules);
    if (!list) return VM_OK;
    modules->list = strdup(list);
    if (!modules->list) return vm_fail(VM_E_NOMEM, "no memory for the list of modules");
    int status = VM_OK;
    for (char *text = modules->list, *comma; text && status == VM_OK; text = comma) {
        comma = strchr(text, ',');
        if (comma) *comma++ = 0;
        status = open_module(modules, text, with_arguments);
    }
    if (status != VM_OK) vm_modules_close(modules);
    return status;
}

void vm_modules_close(vm_modules *modules)
{
    for (unsigned i = 0; i < modules->count; i++) {
        free((char *)modules->image[i].path);
        vm_image_close(&modules->image[i]);
    }
    free(modules->list);
    modules->list = NULL;
    modules->count = 0;
}

uint64_t vm_modules_bytes(const vm_modules *modules, uint64_t align)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < modules->count; i++) sum += (modules->image[i].bytes + align - 1) & -align;
    return sum;
}
