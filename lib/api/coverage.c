/* coverage.c - the functions of <libvm/coverage.h>. */
#include "api/api.h"

#define MAP_MIN 256u
#define MAP_MAX (UINT64_C(1) << 30)
#define RING_MAX (UINT64_C(1) << 27)

/* Records can be changed: software backend, nobody runs. */
static int check_machine(const vm_machine *m, const char *function)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    if (m->options.backend == VM_BACKEND_KVM)
        return vm_fail(VM_E_UNSUPPORTED, "%s: with KVM the host's hardware executes; select the JIT first", function);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i]))
            return vm_fail(VM_E_BUSY, "%s: vCPU %u is running", function, i);
    return VM_OK;
}

static int check_ring(const vm_vcpu *cpu, const void *ring, size_t entries, const uint64_t *head, const char *function)
{
    if (!cpu)
        return vm_fail(VM_E_INVALID, "%s: cpu is NULL", function);
    if (ring && entries && ((entries & (entries - 1)) || entries > RING_MAX))
        return vm_fail(VM_E_INVALID, "%s: %zu entries; a power of two up to 2^27 is needed", function, entries);
    if (ring && entries && !head)
        return vm_fail(VM_E_INVALID, "%s: head is NULL", function);
    return check_machine(cpu->machine, function);
}

VM_API int vm_coverage(vm_machine *m, uint8_t *map, size_t bytes)
{
    if (map && bytes && ((bytes & (bytes - 1)) || bytes < MAP_MIN || bytes > MAP_MAX))
        return vm_fail(VM_E_INVALID, "vm_coverage: %zu bytes; a power of two from 2^8 to 2^30 is needed", bytes);
    VM_CHECK(check_machine(m, "vm_coverage"));
    vm_cover_map(m, map, map ? bytes : 0);
    return VM_OK;
}

VM_API int vm_coverage_range(vm_machine *m, uint64_t begin, uint64_t end)
{
    if (begin >= end && (begin || end))
        return vm_fail(VM_E_INVALID, "vm_coverage_range: begin 0x%llx is not below end 0x%llx", (unsigned long long)begin,
                       (unsigned long long)end);
    VM_CHECK(check_machine(m, "vm_coverage_range"));
    vm_cover_range(m, begin, end);
    return VM_OK;
}

VM_API int vm_block_trace(vm_vcpu *cpu, uint64_t *ring, size_t entries, uint64_t *head)
{
    VM_CHECK(check_ring(cpu, ring, entries, head, "vm_block_trace"));
    vm_cover_ring(cpu, ring, ring ? entries : 0, head);
    return VM_OK;
}

VM_API int vm_compare_log(vm_vcpu *cpu, vm_compare *ring, size_t entries, uint64_t *head)
{
    VM_CHECK(check_ring(cpu, ring, entries, head, "vm_compare_log"));
    vm_cover_log(cpu, ring, ring ? entries : 0, head);
    return VM_OK;
}
