/* stats.c - counters by name, from stat.def. */
#include "core/core.h"
#include "mmu/mmu.h"

#include <string.h>

static uint64_t vm_stat_retired(vm_machine *m)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        sum += vm_look_at(&m->vcpus[i]->x86.retired);
    return sum;
}

static uint64_t vm_stat_exits(vm_machine *m) { return m->stat_exits; }
static uint64_t vm_stat_irqs(vm_machine *m) { return m->stat_irqs; }
static uint64_t vm_stat_msis(vm_machine *m) { return m->stat_msis; }
static uint64_t vm_stat_ram_bytes(vm_machine *m) { return m->ram_total; }
static uint64_t vm_stat_shadow_pages(vm_machine *m)
{
    vm_machine_lock(m);                /* the strategy stays */
    uint64_t pages = vm_shadow_pages(m);
    vm_machine_unlock(m);
    return pages;
}
static uint64_t vm_stat_nested_paging(vm_machine *m)
{
    uint64_t value = 0;
    return m->options.backend == VM_BACKEND_KVM && vm_query(VM_BACKEND_KVM, "nested-paging", &value) == VM_OK && value;
}
static uint64_t vm_stat_regions(vm_machine *m) { return m->region_count; }

enum { VCPU, MACHINE };
static const struct { const char *name, *text; int scope, index; uint64_t (*fn)(vm_machine *m); } stats[] = {
#define VM_STAT_VCPU(key) VCPU, X86_STAT_##key, NULL
#define VM_STAT_MACHINE(key) MACHINE, 0, vm_stat_##key
#define VM_STAT(name, scope, key, text) { name, text, VM_STAT_##scope(key) },
#include <libvm/stat.def>
#undef VM_STAT
};
#define STATS (sizeof stats / sizeof *stats)

int vm_stats_get(vm_machine *m, const char *name, uint64_t *value)
{
    for (size_t i = 0; i < STATS; i++) {
        if (strcmp(stats[i].name, name))
            continue;
        uint64_t sum = 0;
        if (stats[i].scope == MACHINE)
            sum = stats[i].fn(m);
        else
            for (unsigned v = 0; v < m->vcpu_count; v++)
                sum += vm_look_at(&m->vcpus[v]->x86.stat[stats[i].index]);
        *value = sum;
        return VM_OK;
    }
    return vm_fail(VM_E_NOTFOUND, "no counter \"%.60s\"", name);
}

VM_API const char *vm_stat_name(unsigned i, const char **text)
{
    if (i >= STATS)
        return NULL;
    if (text)
        *text = stats[i].text;
    return stats[i].name;
}
