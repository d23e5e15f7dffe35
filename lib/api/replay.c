/* replay.c - the functions of <libvm/replay.h>. */
#include "api/api.h"
#include "core/replay.h"

VM_API int vm_record(vm_machine *m, int fd, const vm_record_options *options)
{
    vm_record_options o = VM_RECORD_OPTIONS_INIT;
    VM_CHECK_NULL("vm_record", m);
    if (options)
        VM_CHECK(vm_struct_in(&o, sizeof o, options, "vm_record", "options"));
    if (fd < 0)
        return vm_fail(VM_E_INVALID, "vm_record: fd is %d", fd);
    return vm_replay_record(m, fd, &o);
}

VM_API int vm_record_stop(vm_machine *m)
{
    VM_CHECK_NULL("vm_record_stop", m);
    return vm_replay_end(m, VM_REPLAY_RECORDING);
}

VM_API int vm_replay(vm_machine *m, int fd)
{
    VM_CHECK_NULL("vm_replay", m);
    if (fd < 0)
        return vm_fail(VM_E_INVALID, "vm_replay: fd is %d", fd);
    return vm_replay_play(m, fd);
}

VM_API int vm_replay_stop(vm_machine *m)
{
    VM_CHECK_NULL("vm_replay_stop", m);
    return vm_replay_end(m, VM_REPLAY_PLAYING);
}

VM_API int vm_replay_get_info(vm_machine *m, vm_replay_info *info)
{
    vm_replay_info all = VM_REPLAY_INFO_INIT;
    VM_CHECK_NULL("vm_replay_get_info", m);
    VM_CHECK(vm_struct_out(info, NULL, 0, "vm_replay_get_info", "info"));
    vm_replay_look(m, &all);
    return vm_struct_out(info, &all, sizeof all, "vm_replay_get_info", "info");
}

VM_API int vm_machine_checksum(vm_machine *m, uint64_t *sum)
{
    VM_CHECK_NULL("vm_machine_checksum", m);
    VM_CHECK_NULL("vm_machine_checksum", sum);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i]))
            return vm_fail(VM_E_BUSY, "vm_machine_checksum: vCPU %u is running", i);
    uint64_t h = vm_ram_sum(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        h = (h ^ vm_cpu_sum(m->vcpus[i])) * UINT64_C(0x9E3779B97F4A7C15) + m->vcpus[i]->x86.retired;
    *sum = h;
    return VM_OK;
}
