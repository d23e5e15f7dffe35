/* snapshot.h - keeping a machine's state and going back to it; machines in files; clones.
 *
 * A snapshot holds all that a guest could tell the difference by: every vCPU (registers, events under way, the exit that
 * waits for its completion, retired instructions, the state of seeded random numbers), the contents of RAM, the memory
 * map with its permissions, the platform's devices, devices of the program that have vm_io_ops.save and restore, and
 * guest time. Not part of it: hooks, breakpoints, coverage maps, the dirty log, counters, the MMU strategy, the backend,
 * tracing, consoles. They are the program's own and stay as they are.
 *
 * Any number of snapshots of a machine may exist. One that is taken while others exist shares unchanged pages with them
 * and costs what was written since the last take or restore; the first one copies the RAM (pages of zeros excepted).
 * They are restored in any order; restoring the same one again costs the pages written since, nothing else, and
 * translated code stays wherever its bytes are the same.
 *
 * While snapshots exist the library notes first writes to pages. Writes it cannot see, through a host pointer
 * (vm_region_data(), memory of vm_map_host()), are told with vm_invalidate() afterwards, else a restore does not
 * undo them.
 *
 * Regions that a snapshot contains outlive vm_unmap(): memory given to vm_map_host() must stay valid, and
 * vm_io_ops.destroy is called, only when the last snapshot that contains the region is gone. A restore puts unmapped
 * regions back under their old handles and takes away regions that were mapped since.
 *
 * The functions need the vCPUs at rest: VM_E_BUSY while one runs, in callbacks too (let the callback stop the run
 * first). One thread at a time calls them for one machine. A failure leaves the machine as it was, unless said
 * otherwise. Exits still to be completed before the snapshot was taken are open again after a restore: the next
 * vm_vcpu_run completes them from the record it is given, if that has the same reason.
 */
#ifndef LIBVM_INCLUDE_SNAPSHOT_H
#define LIBVM_INCLUDE_SNAPSHOT_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vm_snapshot vm_snapshot;

/* Takes a snapshot. *out is NULL on failure. A device's save callback that fails fails the call with its status.
 * VM_E_BUSY, VM_E_NOMEM. */
VM_API int vm_snapshot_take(vm_machine *m, vm_snapshot **out);

/* Puts the machine back. VM_E_INVALID the snapshot is of another machine; VM_E_BUSY; VM_E_NOMEM. If a device's restore
 * callback fails its status is returned and devices are left partly restored; restoring or resetting once more is
 * needed before the machine runs. */
VM_API int vm_snapshot_restore(vm_machine *m, vm_snapshot *s);

/* Forgets a snapshot; NULL is fine. The machine's state does not change. vm_destroy() frees those that are left, their
 * handles are invalid then. Not while a vCPU of the machine runs on another thread. */
VM_API void vm_snapshot_free(vm_snapshot *s);

/* Bytes of host memory that this snapshot holds for itself, without what it shares. 0 for NULL. */
VM_API uint64_t vm_snapshot_bytes(const vm_snapshot *s);

/* Flags of vm_snapshot_save_file() and vm_snapshot_load_file(). */
typedef enum vm_snapshot_flags {
    VM_SNAPSHOT_COMPRESS = 1,           /* save: compress with zstd (VM_E_UNSUPPORTED where the library was built without) */
    VM_SNAPSHOT_NO_VERIFY = 2,          /* load: do not read the pages' contents to check them; what describes them is
                                           always checked. For files that nobody else can have damaged */
    VM_SNAPSHOT_NO_SYNC = 4             /* save: do not wait until the file is on the disk */
} vm_snapshot_flags;

/* Writes a snapshot from the descriptor's position on, which must be its beginning for files that are to be loaded;
 * uncompressed, pages of zeros as holes where the file can have them. Pipes and sockets will do. What a regular file
 * holds behind is cut off. VM_E_HOST a write failed; what was written before stays. */
VM_API int vm_snapshot_save(vm_snapshot *s, int fd);

/* Writes a snapshot to a file: under a temporary name beside it, which takes the place of `path` when all of it is on
 * the disk. On failure `path` is what it was and nothing else is left behind. `flags` of vm_snapshot_flags.
 * VM_E_INVALID besides: `path` is there and no regular file. */
VM_API int vm_snapshot_save_file(vm_snapshot *s, const char *path, unsigned flags);

/* Reads a snapshot from the file behind `fd` (from the file's beginning, whatever the position), for machine m. The
 * machine does not change until vm_snapshot_restore(). It must have the same shape as the one saved: platform, number
 * of vCPUs, CPU model, main memory, and the program's own devices at the same places (their restore callbacks get the
 * saved state). The backend may be another. RAM regions that m does not have appear when the snapshot is restored.
 * RAM of uncompressed files is mapped from the file when it is restored, page by page as it is touched: the file must
 * not be written to or shortened as long as the snapshot or a state restored from it is in use (replacing it by
 * another, as vm_snapshot_save_file() does, is fine); the descriptor may be closed.
 * VM_E_FORMAT not a snapshot's file, of another version, damaged, or for another shape of machine (the message says which);
 * VM_E_UNSUPPORTED compressed and the library was built without zstd; VM_E_NOTFOUND nothing at `path`; VM_E_NOMEM; VM_E_HOST. */
VM_API int vm_snapshot_load(vm_machine *m, int fd, vm_snapshot **out);
VM_API int vm_snapshot_load_file(vm_machine *m, const char *path, unsigned flags, vm_snapshot **out);

/* Makes a copy of the machine in this process, which goes on from the same state by itself. RAM is shared until either
 * side writes to a page (memory of vm_map_host() and shared files is copied at once). The first fork of a machine, and
 * forks after it has written much, move its RAM to where it can be shared, which costs a copy of it; others cost the
 * pages written since.
 *
 * The copy has the same backend, CPU model, MMU strategy, vCPUs, memory map and platform. Devices of the program: with
 * vm_io_ops.clone the copy gets a device of its own, in the same state by save and restore; without it, the copy's
 * region has no callbacks, so that accesses are exits (VM_EXIT_IO, VM_EXIT_MMIO). Consoles drop their output until
 * vm_serial_output() is called for the copy. Hooks, breakpoints, coverage, snapshots and the dirty log are not copied.
 * VM_E_BUSY, VM_E_NOMEM, VM_E_HOST; the machine goes on undisturbed, *out is NULL. */
VM_API int vm_fork(vm_machine *m, vm_machine **out);

#ifdef __cplusplus
}
#endif
#endif
