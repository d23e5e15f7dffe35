/* memory.c - the functions of <libvm/memory.h>. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "api/api.h"
#include "core/replay.h"
#include "core/doorbell.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define PAGE 4096u
#define HUGE_PAGE UINT64_C(0x200000)
#define HUGE_RAM UINT64_C(0x2000000)   /* 32 MiB */
typedef unsigned long long ull;        /* for %llx */

static uint64_t phys_mask(const vm_machine *m)
{
    return m->vcpus[0]->x86.phys_mask;
}

/* A range of guest-physical addresses: not empty, inside the address space. */
static int check_range(const vm_machine *m, const char *function, uint64_t gpa, uint64_t bytes)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    if (!bytes)
        return vm_fail(VM_E_INVALID, "%s: size is zero", function);
    if (gpa > phys_mask(m) || bytes - 1 > phys_mask(m) - gpa)
        return vm_fail(VM_E_INVALID, "%s: 0x%llx + 0x%llx runs past the physical addresses' end, 0x%llx", function,
                       (ull)gpa, (ull)bytes, (ull)phys_mask(m));
    return VM_OK;
}

static int check_pages(const vm_machine *m, const char *function, uint64_t gpa, uint64_t bytes)
{
    VM_CHECK(check_range(m, function, gpa, bytes));
    if (gpa % PAGE || bytes % PAGE)
        return vm_fail(VM_E_INVALID, "%s: 0x%llx + 0x%llx is not made of whole 4 KiB pages", function, (ull)gpa,
                       (ull)bytes);
    return VM_OK;
}

static int check_prot(const char *function, vm_prot prot)
{
    if ((unsigned)prot & ~(unsigned)VM_PROT_RWX)
        return vm_fail(VM_E_INVALID, "%s: unknown permission bits 0x%x", function,
                       (unsigned)prot & ~(unsigned)VM_PROT_RWX);
    return VM_OK;
}

static int check_ram(const vm_machine *m, const char *function, uint64_t gpa, uint64_t bytes, vm_prot prot)
{
    VM_CHECK(check_pages(m, function, gpa, bytes));
    return check_prot(function, prot);
}

/* Host memory made here goes again if the region cannot be added. */
static int add_mapping(vm_machine *m, const vm_region *proto, vm_region **out)
{
    int status = vm_region_add(m, proto, out);
    if (status != VM_OK)
        munmap(proto->host, proto->bytes);
    return status;
}

/* Zero pages. Large RAM is asked for in huge pages, lying in the host as it does in the guest modulo their size, so that
 * both kinds of page tables can use them; small machines stay small. */
static void *map_zero(uint64_t gpa, uint64_t bytes)
{
    uint64_t slack = bytes >= HUGE_RAM ? HUGE_PAGE : 0;
    uint8_t *host = mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (host == MAP_FAILED || !slack)
        return host;
    uint64_t skip = (gpa - (uintptr_t)host) % HUGE_PAGE;
    if (skip)
        munmap(host, skip);
    if (slack - skip)
        munmap(host + skip + bytes, slack - skip);
    (void)madvise(host + skip, bytes, MADV_HUGEPAGE);    /* a wish */
    return host + skip;
}

VM_API int vm_map_ram(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot, vm_region **out)
{
    if (out)
        *out = NULL;
    VM_CHECK(check_ram(m, "vm_map_ram", gpa, bytes, prot));
    void *host = map_zero(gpa, bytes);
    if (host == MAP_FAILED)
        return vm_fail_errno(VM_E_NOMEM, "vm_map_ram: mmap");
    vm_region proto = { .kind = VM_REGION_RAM, .gpa = gpa, .bytes = bytes, .host = host, .prot = prot };
    return add_mapping(m, &proto, out);
}

VM_API int vm_map_host(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot, void *host, vm_region **out)
{
    if (out)
        *out = NULL;
    VM_CHECK(check_ram(m, "vm_map_host", gpa, bytes, prot));
    VM_CHECK_NULL("vm_map_host", host);
    if ((uintptr_t)host % PAGE || (uintptr_t)host + (bytes - 1) < (uintptr_t)host)
        return vm_fail(VM_E_INVALID, "vm_map_host: host memory at %p must be page-aligned and fit the address space",
                       host);
    vm_region proto = { .kind = VM_REGION_HOST, .gpa = gpa, .bytes = bytes, .host = host, .prot = prot };
    return vm_region_add(m, &proto, out);
}

static int check_file(int fd, uint64_t offset, uint64_t bytes, struct stat *st)
{
    if (offset % PAGE || offset > INT64_MAX || bytes > INT64_MAX - offset)
        return vm_fail(VM_E_INVALID, "vm_map_file: offset 0x%llx is not page-aligned or too large", (ull)offset);
    if (fstat(fd, st) != 0)
        return vm_fail_errno(VM_E_HOST, "vm_map_file: fstat");
    if (!S_ISREG(st->st_mode))
        return VM_OK;                  /* a device, shared memory: mmap will tell */
    if (((uint64_t)st->st_size + PAGE - 1) / PAGE * PAGE < offset + bytes)
        return vm_fail(VM_E_INVALID, "vm_map_file: 0x%llx + 0x%llx is beyond the file's 0x%llx bytes", (ull)offset,
                       (ull)bytes,
                       (ull)st->st_size);
    return VM_OK;
}

VM_API int vm_map_file(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot, int fd, uint64_t offset,
                       bool private_copy,
                       vm_region **out)
{
    if (out)
        *out = NULL;
    VM_CHECK(check_ram(m, "vm_map_file", gpa, bytes, prot));
    struct stat st;
    VM_CHECK(check_file(fd, offset, bytes, &st));
    int flags = private_copy ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED;
    bool is_read_only = false;
    void *host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset);
    if (host == MAP_FAILED && !(prot & VM_PROT_W)) {                   /* shared, from a descriptor for reading only */
        host = mmap(NULL, bytes, PROT_READ, flags, fd, (off_t)offset);
        is_read_only = true;
    }
    if (host == MAP_FAILED)
        return vm_fail_errno(VM_E_HOST, "vm_map_file: mmap");
    vm_region proto = { .kind = VM_REGION_FILE, .gpa = gpa, .bytes = bytes, .host = host, .prot = prot,
                        .is_read_only = is_read_only };
    if (!private_copy) {
        proto.file.device = st.st_dev;
        proto.file.inode = st.st_ino;
        proto.file.at = offset;
    }
    return add_mapping(m, &proto, out);
}

static int check_io(vm_machine *m, const char *function, const vm_io_ops *ops, vm_io_ops *copy)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    return vm_struct_in(copy, sizeof *copy, ops, function, "ops");
}

VM_API int vm_map_mmio(vm_machine *m, uint64_t gpa, uint64_t bytes, const vm_io_ops *ops, void *user, vm_region **out)
{
    vm_io_ops copy;
    if (out)
        *out = NULL;
    VM_CHECK(check_io(m, "vm_map_mmio", ops, &copy));
    VM_CHECK(check_range(m, "vm_map_mmio", gpa, bytes));
    vm_region proto = { .kind = VM_REGION_MMIO, .gpa = gpa, .bytes = bytes, .prot = VM_PROT_RWX, .ops = copy,
                        .user = user };
    return vm_region_add(m, &proto, out);
}

VM_API int vm_map_pio(vm_machine *m, uint16_t port, unsigned count, const vm_io_ops *ops, void *user, vm_region **out)
{
    vm_io_ops copy;
    if (out)
        *out = NULL;
    VM_CHECK(check_io(m, "vm_map_pio", ops, &copy));
    if (!count || count > 0x10000u - port)
        return vm_fail(VM_E_INVALID, "vm_map_pio: %u ports from 0x%x are not within the 65536 there are", count, port);
    vm_region proto = { .kind = VM_REGION_PIO, .gpa = port, .bytes = count, .prot = VM_PROT_RWX, .ops = copy,
                        .user = user };
    return vm_region_add(m, &proto, out);
}

VM_API int vm_unmap(vm_machine *m, vm_region *r)
{
    VM_CHECK_NULL("vm_unmap", m);
    VM_CHECK_NULL("vm_unmap", r);
    VM_CHECK(vm_replay_forbids(m, "vm_unmap"));
    vm_machine_lock(m);
    int status = VM_OK;
    vm_region_kind kind = VM_REGION_RAM;
    if (!vm_region_is_known(m, r))
        status = vm_fail(VM_E_NOTFOUND, "vm_unmap: the machine has no region %p", (void *)r);
    else if (r->is_internal)
        status = vm_fail(VM_E_INVALID, "vm_unmap: the region at 0x%llx belongs to the platform", (ull)r->gpa);
    if (status == VM_OK) {
        kind = r->kind;
        vm_zones_forget(m, r);
        vm_region_detach(r);
    }
    vm_machine_unlock(m);
    if (status == VM_OK)
        vm_region_finish(m, kind, r);
    return status;
}

VM_API int vm_protect(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot)
{
    VM_CHECK(check_ram(m, "vm_protect", gpa, bytes, prot));
    return vm_memory_protect(m, gpa, bytes, prot);
}

VM_API void *vm_region_data(vm_region *r)
{
    return r ? r->host : NULL;
}

VM_API uint64_t vm_region_gpa(const vm_region *r)
{
    return r ? r->gpa : 0;
}

VM_API uint64_t vm_region_bytes(const vm_region *r)
{
    return r ? r->bytes : 0;
}

VM_API int vm_invalidate(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    VM_CHECK(check_range(m, "vm_invalidate", gpa, bytes));
    return vm_memory_changed(m, gpa, bytes);
}

VM_API int vm_read(vm_machine *m, uint64_t gpa, void *buffer, size_t bytes)
{
    VM_CHECK_NULL("vm_read", m);
    if (bytes)
        VM_CHECK_NULL("vm_read", buffer);
    return vm_memory_copy(m, gpa, buffer, bytes, false);
}

VM_API int vm_write(vm_machine *m, uint64_t gpa, const void *buffer, size_t bytes)
{
    VM_CHECK_NULL("vm_write", m);
    if (bytes)
        VM_CHECK_NULL("vm_write", buffer);
    if (m->replay)
        return vm_replay_write(m, gpa, buffer, bytes);
    return vm_memory_copy(m, gpa, (void *)(uintptr_t)buffer, bytes, true);
}

VM_API int vm_discard(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    VM_CHECK(check_pages(m, "vm_discard", gpa, bytes));
    VM_CHECK(vm_replay_forbids(m, "vm_discard"));
    return vm_memory_discard(m, gpa, bytes);
}

VM_API int vm_advise(vm_machine *m, uint64_t gpa, uint64_t bytes, unsigned advice)
{
    VM_CHECK(check_pages(m, "vm_advise", gpa, bytes));
    if (advice & ~VM_ADVICE_ALL)
        return vm_fail(VM_E_INVALID, "vm_advise: unknown bits 0x%x", advice & ~VM_ADVICE_ALL);
    static const unsigned opposites[] = { VM_ADVICE_HUGE | VM_ADVICE_SMALL, VM_ADVICE_MERGEABLE | VM_ADVICE_UNMERGEABLE };
    for (unsigned i = 0; i < 2; i++)
        if ((advice & opposites[i]) == opposites[i])
            return vm_fail(VM_E_INVALID, "vm_advise: bits 0x%x contradict each other", opposites[i]);
    return vm_memory_advise(m, gpa, bytes, advice);
}

static int by_address(const void *a, const void *b)
{
    uintptr_t x = (uintptr_t)*(vm_machine *const *)a, y = (uintptr_t)*(vm_machine *const *)b;
    return x < y ? -1 : x > y;
}

static int all_idle(vm_machine *const *machines, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        for (unsigned v = 0; v < machines[i]->vcpu_count; v++)
            if (vm_vcpu_is_running(machines[i]->vcpus[v]))
                return vm_fail(VM_E_BUSY, "vm_share_pages: vCPU %u of machine %u is running", v, i);
    return VM_OK;
}

VM_API int vm_share_pages(vm_machine *const *machines, unsigned count, uint64_t *saved)
{
    VM_CHECK_NULL("vm_share_pages", machines);
    VM_CHECK_NULL("vm_share_pages", saved);
    *saved = 0;
    for (unsigned i = 0; i < count; i++)
        VM_CHECK_NULL("vm_share_pages", machines[i]);
    vm_machine **sorted = malloc((count + 1) * sizeof *sorted);
    if (!sorted)
        return vm_fail(VM_E_NOMEM, "vm_share_pages: no memory for a list of %u machines", count);
    memcpy(sorted, machines, count * sizeof *sorted);
    qsort(sorted, count, sizeof *sorted, by_address);      /* two such calls lock in the same order */
    unsigned n = 0;
    for (unsigned i = 0; i < count; i++)
        if (!n || sorted[n - 1] != sorted[i])
            sorted[n++] = sorted[i];
    for (unsigned i = 0; i < n; i++)
        vm_pause(sorted[i]);
    int status = all_idle(sorted, n);
    if (status == VM_OK)
        status = vm_memory_share(sorted, n, saved);
    for (unsigned i = n; i--;)
        vm_resume(sorted[i]);
    free(sorted);
    return status;
}

VM_API int vm_dirty_log(vm_machine *m, bool on)
{
    VM_CHECK_NULL("vm_dirty_log", m);
    vm_memory_dirty_log(m, on);
    return VM_OK;
}

VM_API int vm_dirty_fetch(vm_machine *m, uint64_t gpa, uint64_t bytes, uint64_t *bitmap)
{
    VM_CHECK(check_pages(m, "vm_dirty_fetch", gpa, bytes));
    VM_CHECK_NULL("vm_dirty_fetch", bitmap);
    vm_machine_lock(m);
    bool is_on = m->dirty_log;
    vm_machine_unlock(m);
    if (!is_on)
        return vm_fail(VM_E_INVALID, "vm_dirty_fetch: the dirty log is off");
    vm_memory_dirty_fetch(m, gpa, bytes, bitmap);
    return VM_OK;
}
