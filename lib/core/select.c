/* select.c - moving a machine from one backend to another between runs.
 *
 * The state of a vCPU is its x86_cpu; a backend that keeps it elsewhere brings it there first (ops->leave). Then the
 * old backend's per-vCPU data goes and the new one's comes: both may want the same fields of x86_cpu, so they never
 * exist side by side. If the new backend fails, the old one is made again; what it needs was there a moment ago.
 */
#include "core/core.h"
#include "core/doorbell.h"
#include "core/hook.h"
#include "mmu/mmu.h"

#include <string.h>

static void drop(vm_machine *m, const vm_backend_ops *ops, unsigned vcpus) {
    for (unsigned i = 0; i < vcpus; i++) {
        x86_cpu *x = &m->vcpus[i]->x86;
        if (ops->vcpu_destroy) ops->vcpu_destroy(m->vcpus[i]);
        memset(x->jump, 0, sizeof x->jump); /* as the next backend would find them in a new vCPU */
        memset(x->jit_scratch, 0, sizeof x->jit_scratch);
    }
    if (ops->machine_destroy) ops->machine_destroy(m);
    m->has_backend = false;
}

static int make(vm_machine *m, const vm_backend_ops *ops) {
    int status = ops->machine_create ? ops->machine_create(m) : VM_OK;
    if (status != VM_OK) return status;
    m->has_backend = true;
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        status = ops->vcpu_create ? ops->vcpu_create(m->vcpus[i]) : VM_OK;
        if (status != VM_OK) {
            drop(m, ops, i);
            return status;
        }
    }
    return VM_OK;
}

/* Nothing that was derived from the old backend's runs may be believed. */
static void refresh(vm_machine *m) {
    if (m->backend->map_changed) m->backend->map_changed(m);
    vm_events_announce(m);
    vm_mmu_forget(m);
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        x86_cpu *x = &m->vcpus[i]->x86;
        x86_mode_changed(x);
        m->vcpus[i]->irq_look = m->is_pc;
        vm_vcpu_changed(m->vcpus[i], VM_STATE_ALL);
    }
}

static int move(vm_machine *m, vm_backend backend, const vm_backend_ops *to) {
    const vm_backend_ops *from = m->backend;
    if (from->dirty_sync) from->dirty_sync(m);
    for (unsigned i = 0; from->leave && i < m->vcpu_count; i++) from->leave(m->vcpus[i]);
    drop(m, from, m->vcpu_count);
    m->backend = to;
    int status = make(m, to);
    if (status == VM_OK) {
        m->options.backend = backend;
    } else {
        m->backend = from;
        if (make(m, from) != VM_OK) atomic_store(&m->poisoned, 1);
    }
    if (!m->poisoned) refresh(m);
    return status;
}

int vm_machine_select(vm_machine *m, vm_backend backend) {
    const vm_backend_ops *to = vm_backend_find(&backend);
    if (!to) return VM_E_UNSUPPORTED;
    if (to == m->backend) return VM_OK;
    if (!vm_hooks_suit(m, to))
        return vm_fail(VM_E_UNSUPPORTED, "vm_backend_select: backend %s serves no hooks; remove them first", to->name);
    if (!vm_mmu_suits(m->mmu, backend))
        return vm_fail(VM_E_UNSUPPORTED, "vm_backend_select: KVM cannot have the MMU strategy \"%s\"; select \"tlb\" first",
                       m->mmu->name);
    if (backend == VM_BACKEND_KVM && vm_cover_is_on(m))
        return vm_fail(VM_E_UNSUPPORTED, "vm_backend_select: KVM cannot record coverage; turn it off first");
    vm_device_lock(m);
    vm_pause(m);
    int status = VM_OK;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i])) status = vm_fail(VM_E_BUSY, "vm_backend_select: vCPU %u is running", i);
    if (status == VM_OK) status = move(m, backend, to);
    vm_resume(m);
    vm_device_unlock(m);
    return status;
}
