/* coverage.c - where the vCPUs record branches and comparisons. See x86/cover.h.
 *
 * Every change drops the vCPUs' code: what is recorded is compiled in.
 */
#include "core/core.h"

static void changed(vm_vcpu *cpu)
{
    x86_cover *c = &cpu->x86.cover;
    c->is_on = c->map || c->ring;
    cpu->machine->backend->flush_code(cpu);
}

bool vm_cover_is_on(const vm_machine *m)
{
    bool is_on = false;
    for (unsigned i = 0; i < m->vcpu_count; i++) is_on |= m->vcpus[i]->x86.cover.is_on || m->vcpus[i]->x86.cover.log;
    return is_on;
}

void vm_cover_map(vm_machine *m, uint8_t *map, size_t bytes)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        x86_cover *c = &m->vcpus[i]->x86.cover;
        c->map = bytes ? map : NULL;
        c->mask = c->map ? (uint32_t)(bytes - 1) : 0;
        changed(m->vcpus[i]);
    }
}

void vm_cover_range(vm_machine *m, uint64_t begin, uint64_t end)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        m->vcpus[i]->x86.cover.begin = begin;
        m->vcpus[i]->x86.cover.bytes = end - begin;
        changed(m->vcpus[i]);
    }
}

void vm_cover_ring(vm_vcpu *cpu, uint64_t *ring, size_t entries, uint64_t *head)
{
    x86_cover *c = &cpu->x86.cover;
    c->ring = entries ? ring : NULL;
    c->head = head;
    c->ring_mask = entries - 1;
    changed(cpu);
}

void vm_cover_log(vm_vcpu *cpu, vm_compare *ring, size_t entries, uint64_t *head)
{
    x86_cover *c = &cpu->x86.cover;
    c->log = entries ? ring : NULL;
    c->log_head = head;
    c->log_mask = entries - 1;
    changed(cpu);
}
