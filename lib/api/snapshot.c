/* snapshot.c - the functions of <libvm/snapshot.h>. */
#include "api/api.h"
#include "core/track.h"

static int check_mine(const char *function, const vm_machine *m, const vm_snapshot *s)
{
    if (!m || !s)
        return vm_fail(VM_E_INVALID, "%s: %s is NULL", function, m ? "s" : "m");
    if (s->machine != m)
        return vm_fail(VM_E_INVALID, "%s: the snapshot is of another machine", function);
    return VM_OK;
}

static int check_flags(const char *function, unsigned flags, unsigned known)
{
    if (flags & ~known)
        return vm_fail(VM_E_INVALID, "%s: unknown flags 0x%x", function, flags & ~known);
    return VM_OK;
}

VM_API int vm_snapshot_take(vm_machine *m, vm_snapshot **out)
{
    VM_CHECK_NULL("vm_snapshot_take", out);
    *out = NULL;
    VM_CHECK_NULL("vm_snapshot_take", m);
    return vm_snap_take(m, out);
}

VM_API int vm_snapshot_restore(vm_machine *m, vm_snapshot *s)
{
    VM_CHECK(check_mine("vm_snapshot_restore", m, s));
    return vm_snap_restore(m, s);
}

VM_API void vm_snapshot_free(vm_snapshot *s)
{
    if (s)
        vm_snap_free(s);
}

VM_API uint64_t vm_snapshot_bytes(const vm_snapshot *s)
{
    return s ? s->bytes : 0;
}

VM_API int vm_snapshot_save(vm_snapshot *s, int fd)
{
    VM_CHECK_NULL("vm_snapshot_save", s);
    return vm_snap_save(s, fd, 0);
}

VM_API int vm_snapshot_save_file(vm_snapshot *s, const char *path, unsigned flags)
{
    VM_CHECK_NULL("vm_snapshot_save_file", s);
    VM_CHECK_NULL("vm_snapshot_save_file", path);
    VM_CHECK(check_flags("vm_snapshot_save_file", flags, VM_SNAPSHOT_COMPRESS | VM_SNAPSHOT_NO_SYNC));
    return vm_snap_save_file(s, path, flags);
}

VM_API int vm_snapshot_load(vm_machine *m, int fd, vm_snapshot **out)
{
    VM_CHECK_NULL("vm_snapshot_load", out);
    *out = NULL;
    VM_CHECK_NULL("vm_snapshot_load", m);
    return vm_snap_load(m, fd, 0, out);
}

VM_API int vm_snapshot_load_file(vm_machine *m, const char *path, unsigned flags, vm_snapshot **out)
{
    VM_CHECK_NULL("vm_snapshot_load_file", out);
    *out = NULL;
    VM_CHECK_NULL("vm_snapshot_load_file", m);
    VM_CHECK_NULL("vm_snapshot_load_file", path);
    VM_CHECK(check_flags("vm_snapshot_load_file", flags, VM_SNAPSHOT_NO_VERIFY));
    return vm_snap_load_file(m, path, flags, out);
}

VM_API int vm_fork(vm_machine *m, vm_machine **out)
{
    VM_CHECK_NULL("vm_fork", out);
    *out = NULL;
    VM_CHECK_NULL("vm_fork", m);
    return vm_machine_fork(m, out);
}
