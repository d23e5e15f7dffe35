/* memory.h - the guest-physical memory map and port space.
 *
 * A machine's map is a set of regions that do not overlap (RAM kinds and MMIO share one space; ports are another).
 * RAM kinds are made of whole 4 KiB pages at page-aligned addresses; MMIO and port ranges have byte granularity.
 * The same memory may be mapped at several addresses (vm_map_host() of what is mapped already, a file shared twice): code that is
 * written to through one of them changes at all. The dirty log and snapshots note the address that was used.
 * Edits are legal at any time, from callbacks too; each stops the machine's vCPUs for a moment at an instruction
 * boundary, and has taken effect when the call returns.
 *
 * Accesses of the guest that no region answers: on BARE machines an exit (VM_EXIT_UNMAPPED, or VM_EXIT_IO for ports);
 * on PC machines reads give all ones and writes are dropped, as on a real bus. Writes to RAM without VM_PROT_W and
 * other accesses a region's permissions forbid: on BARE machines VM_EXIT_UNMAPPED; on PC machines writes are dropped
 * (ROM), reads and fetches see all ones.
 */
#ifndef LIBVM_INCLUDE_MEMORY_H
#define LIBVM_INCLUDE_MEMORY_H

#include <libvm/types.h>
#include <libvm/device.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Zero-filled RAM owned by the machine; host memory is committed as pages are touched. `out` may be NULL. The guest
 * sees vm_prot `prot`; VM_PROT_RX makes a ROM that vm_write() can fill.
 * VM_E_INVALID unaligned, zero size, gpa + bytes beyond the physical address space, unknown prot bits; VM_E_EXISTS
 * overlap; VM_E_NOMEM. Same for the following ones. */
VM_API int vm_map_ram(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot, vm_region **out);

/* Memory of the caller, `host` page-aligned; it must stay valid until the region is unmapped or the machine
 * destroyed, and is never freed by libvm. Writing through it while vCPUs run is like DMA by a device, except that
 * after changing code vm_invalidate() is needed. */
VM_API int vm_map_host(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot, void *host, vm_region **out);

/* `bytes` of file `fd` from `offset` (page-aligned). private_copy: guest writes stay in memory; else they go to the
 * file, which then must be open for writing if prot has VM_PROT_W. The descriptor may be closed after the call. The
 * file must be at least offset + bytes rounded up to its last page long (VM_E_INVALID); if it is truncated later,
 * accesses beyond its end raise SIGBUS in the process as with any mapping. VM_E_HOST: mmap or fstat failed. */
VM_API int vm_map_file(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot, int fd, uint64_t offset,
                       bool private_copy, vm_region **out);

/* Device memory: accesses of the guest call `ops`. `ops` is copied; ops->destroy(user), if set, is called once when the
 * region goes (unmap or machine destruction), after the last access has ended; not when this call fails. */
VM_API int vm_map_mmio(vm_machine *m, uint64_t gpa, uint64_t bytes, const vm_io_ops *ops, void *user, vm_region **out);

/* The same for ports [port, port + count). */
VM_API int vm_map_pio(vm_machine *m, uint16_t port, unsigned count, const vm_io_ops *ops, void *user, vm_region **out);

/* Takes a region away and frees it; `r` is invalid afterwards. VM_E_NOTFOUND: no such region in this machine;
 * VM_E_INVALID: the region is the platform's own. From a callback of the region itself the call is legal too:
 * `destroy` then runs when that callback has returned. */
VM_API int vm_unmap(vm_machine *m, vm_region *r);

/* Changes permissions of whole pages of RAM, which may span several regions and parts of them. VM_E_FAULT: part of the
 * range is not RAM (nothing is changed). */
VM_API int vm_protect(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot);

/* Host address of a RAM region's first byte (NULL for MMIO and ports): valid until the region is unmapped. Reading and
 * writing through it is allowed at any time; after writing code that may have been executed already, call
 * vm_invalidate(). Pages written through it are not marked in the dirty log unless vm_invalidate() is called. */
VM_API void *vm_region_data(vm_region *r);
/* Where a region lies and how large it is. 0 for NULL. */
VM_API uint64_t vm_region_gpa(const vm_region *r);
VM_API uint64_t vm_region_bytes(const vm_region *r);

/* Tells the machine that [gpa, gpa + bytes) changed through a host pointer: code decoded or translated from there is
 * dropped, the pages count as dirty. Returns when no vCPU will execute the old code any more. */
VM_API int vm_invalidate(vm_machine *m, uint64_t gpa, uint64_t bytes);

/* Copies between the caller and guest-physical RAM, whatever the guest's permissions; never touches MMIO. All or
 * nothing:
 * VM_E_FAULT names the first address that is not RAM. Writes invalidate code and mark dirty. Any thread; single bytes
 * are atomic, more is not while vCPUs run. bytes == 0 succeeds. */
VM_API int vm_read(vm_machine *m, uint64_t gpa, void *buffer, size_t bytes);
VM_API int vm_write(vm_machine *m, uint64_t gpa, const void *buffer, size_t bytes);

/* Dirty log: while on, the library notes which pages of RAM were written by the guest, devices or vm_write().
 * Switching it on starts with all pages clean. */
VM_API int vm_dirty_log(vm_machine *m, bool on);
/* Fetches and clears the log of [gpa, gpa + bytes), page-aligned: bit i % 64 of bitmap[i / 64] is page gpa + i *
 * 4096; bits past the last page are zero. The bitmap has (bytes / 4096 + 63) / 64 words. Pages that are no RAM read
 * as clean.
 * VM_E_INVALID: the log is off, or the range unaligned. */
VM_API int vm_dirty_fetch(vm_machine *m, uint64_t gpa, uint64_t bytes, uint64_t *bitmap);

/* Gives pages of RAM back to the host, as a balloon does: they read as zero from now on and are committed again when
 * touched. They count as written (code, dirty log). Memory of vm_map_ram() and a PC's own only (of a
 * shared vm_options.ram_file the bytes go, too): VM_E_UNSUPPORTED for other kinds, VM_E_FAULT where no RAM is; nothing is
 * changed then. */
VM_API int vm_discard(vm_machine *m, uint64_t gpa, uint64_t bytes);

/* How the host should back memory; a set of bits for vm_advise(). */
typedef enum vm_advice {
    VM_ADVICE_HUGE = 1,                 /* transparent huge pages; large RAM asks for them by itself */
    VM_ADVICE_SMALL = 2,                /* no huge pages */
    VM_ADVICE_MERGEABLE = 4,            /* let the host merge pages of equal content (KSM, if it is switched on) */
    VM_ADVICE_UNMERGEABLE = 8,
    VM_ADVICE_PREFAULT = 16             /* commit all of it now */
} vm_advice;
/* Advises the host about whole pages of RAM of any kind. Memory from a hugetlbfs file is mapped with vm_map_file(),
 * a PC's with vm_options.ram_file.
 * VM_E_INVALID bits that contradict each other; VM_E_FAULT part of the range is not RAM; VM_E_HOST the host refused (no such
 * feature, out of memory). */
VM_API int vm_advise(vm_machine *m, uint64_t gpa, uint64_t bytes, unsigned advice);

/* Finds pages of equal content in the RAM (vm_map_ram() and PCs' own) of `count` machines, once, and lets them share
 * the host's memory until somebody writes to them; *saved gets the bytes given back. The guests cannot tell. Each
 * machine stands still for the while. Runs of at least 4 equal pages are shared; the host limits how many (VM_E_HOST
 * when it refuses; what has been shared by then stays so). VM_E_BUSY: a vCPU of one of them runs; VM_E_NOMEM. */
VM_API int vm_share_pages(vm_machine *const *machines, unsigned count, uint64_t *saved);

#ifdef __cplusplus
}
#endif
#endif
