/* registry.c - the MMU strategies there are, and choosing one.
 *
 * The list of registered strategies is the library's one process-wide variable: append-only, its slots written once
 * under a lock and published by the count, so that reading needs none.
 */
#include "mmu/mmu.h"

#include <string.h>

#define REGISTRY_MAX 64u

/* In the order of enum vm_mmu_kind. */
static const vm_mmu_ops *const built_in[] = { &vm_mmu_tlb, &vm_mmu_flat, &vm_mmu_shadow, &vm_mmu_ept };
#define BUILT_IN (sizeof built_in / sizeof *built_in)

static struct {
    pthread_mutex_t lock;
    const vm_mmu_ops *ops[REGISTRY_MAX];
    _Atomic unsigned count;
} registry = { .lock = PTHREAD_MUTEX_INITIALIZER };

static const vm_mmu_ops *strategy(unsigned i)
{
    if (i < BUILT_IN)
        return built_in[i];
    i -= BUILT_IN;
    return i < atomic_load_explicit(&registry.count, memory_order_acquire) ? registry.ops[i] : NULL;
}

const vm_mmu_ops *vm_mmu_find(const char *name)
{
    const vm_mmu_ops *ops;
    for (unsigned i = 0; (ops = strategy(i)) != NULL; i++)
        if (!name || strcmp(ops->name, name) == 0)
            return ops;
    return NULL;
}

VM_API const char *vm_mmu_name(unsigned i)
{
    const vm_mmu_ops *ops = strategy(i);
    return ops ? ops->name : NULL;
}

VM_API int vm_mmu_register(const vm_mmu_ops *ops)
{
    if (!ops)
        return vm_fail(VM_E_INVALID, "vm_mmu_register: ops is NULL");
    if (ops->size < sizeof *ops)
        return vm_fail(VM_E_INVALID, "vm_mmu_register: ops->size is %u, needed %zu", ops->size, sizeof *ops);
    if (!ops->name || !*ops->name || !ops->translate)
        return vm_fail(VM_E_INVALID, "vm_mmu_register: a strategy needs a name and translate()");
    int status = VM_OK;
    pthread_mutex_lock(&registry.lock);
    unsigned count = registry.count;
    if (vm_mmu_find(ops->name)) {
        status = vm_fail(VM_E_EXISTS, "vm_mmu_register: there is a strategy \"%s\" already", ops->name);
    } else if (count == REGISTRY_MAX) {
        status = vm_fail(VM_E_NOMEM, "vm_mmu_register: %u strategies are registered, no more fit", count);
    } else {
        registry.ops[count] = ops;
        atomic_store_explicit(&registry.count, count + 1, memory_order_release);
    }
    pthread_mutex_unlock(&registry.lock);
    return status;
}

/* ---- a machine's strategy ---- */

bool vm_mmu_suits(const vm_mmu_ops *ops, vm_backend backend)
{
    return backend != VM_BACKEND_KVM || ops == &vm_mmu_tlb || ops == &vm_mmu_flat || ops == &vm_mmu_ept;
}

static enum vm_mmu_kind kind_of(const vm_mmu_ops *ops)
{
    unsigned i = 0;
    while (i < BUILT_IN && built_in[i] != ops)
        i++;
    return (enum vm_mmu_kind)i;
}

int vm_mmu_attach(vm_machine *m, const char *name)
{
    const vm_mmu_ops *ops = vm_mmu_find(name);
    void *state = NULL;
    if (!ops)
        return vm_fail(VM_E_NOTFOUND, "no MMU strategy \"%s\"", name);
    if (!vm_mmu_suits(ops, m->options.backend))
        return vm_fail(VM_E_UNSUPPORTED, "MMU strategy \"%s\": with KVM the host's hardware translates", ops->name);
    if (ops->create) {
        int status = ops->create(m, &state);
        if (status != VM_OK)
            return vm_fail(status < 0 ? status : VM_E_INTERNAL, "MMU strategy \"%s\" refused: %d", ops->name, status);
    }
    vm_mmu_detach(m);
    m->mmu = ops;
    m->mmu_kind = kind_of(ops);
    m->mmu_state = state;
    if (m->options.backend == VM_BACKEND_KVM)
        vm_memory_view_changed(m, 0, 0);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus && m->vcpus[i]) {
            x86_tlb_clear(&m->vcpus[i]->x86);
            m->vcpus[i]->space = (vm_space){ 0 };
            if (m->backend->tlb_flushed)
                m->backend->tlb_flushed(m->vcpus[i]);
        }
    return VM_OK;
}

void vm_mmu_detach(vm_machine *m)
{
    if (m->mmu && m->mmu->destroy)
        m->mmu->destroy(m->mmu_state);
    m->mmu = NULL;
    m->mmu_state = NULL;
}
