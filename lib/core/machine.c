/* machine.c - making, resetting and ending a machine; choosing its backend.
 *
 * Creation goes up a ladder: locks, backend, clock, vCPUs, MMU strategy, platform; failure at any rung comes down
 * through vm_machine_destroy(), which copes with whatever is missing.
 */
#include "core/call.h"
#include "core/replay.h"
#include "core/track.h"
#include "core/doorbell.h"
#include "core/hook.h"
#include "mmu/mmu.h"
#if VM_HAVE_KVM
#include "kvm/select.h"
#endif
#include "platform/pc.h"

#include <stdlib.h>
#include <string.h>

/* ---- backends ---- */

static const vm_backend_ops *const backends[] = {
#if VM_HAVE_KVM
    [VM_BACKEND_KVM] = &vm_backend_kvm,
#endif
#if VM_HAVE_JIT
    [VM_BACKEND_JIT] = &vm_backend_jit,
#endif
    [VM_BACKEND_INTERP] = &vm_backend_interp,
};
static const char *const backend_names[] = { "auto", "kvm", "jit", "interp" };

VM_API const char *vm_backend_name(vm_backend backend)
{
    return (unsigned)backend < sizeof backend_names / sizeof *backend_names ? backend_names[backend] : "unknown";
}

VM_API vm_backend vm_machine_backend(const vm_machine *m)
{
    return m ? m->options.backend : VM_BACKEND_AUTO;
}

static bool is_built(vm_backend backend)
{
    if (!backends[backend])
        vm_fail(VM_E_UNSUPPORTED, "the %s backend is not part of this build", backend_names[backend]);
    return backends[backend] != NULL;
}

/* Usable in this process now? Sets the message if not. */
static bool is_available(vm_backend backend)
{
    uint64_t value = 0;
    if (!is_built(backend))
        return false;
    return !backends[backend]->query || backends[backend]->query("available", &value) != VM_OK || value;
}

/* A backend may work and yet not be what "auto" should mean here (KVM that emulates most of the guest). */
static bool is_preferred(vm_backend backend)
{
    uint64_t value = 1;
    if (backends[backend]->query)
        (void)backends[backend]->query("auto", &value);
    return value != 0;
}

static vm_backend resolve(vm_backend backend)
{
    if (backend != VM_BACKEND_AUTO)
        return backend;
    for (vm_backend b = VM_BACKEND_KVM; b < VM_BACKEND_INTERP; b++)
        if (backends[b] && is_available(b) && is_preferred(b))
            return b;
    return VM_BACKEND_INTERP;
}

static int common_query(const char *capability, uint64_t *value)
{
    static const struct { const char *name; uint64_t value; } software[] = {
        { "available", 1 }, { "max-vcpus", VM_MAX_VCPUS }, { "exact-budget", 1 }, { "retired", 1 }, { "exec-only", 1 },
    };
    for (size_t i = 0; i < sizeof software / sizeof *software; i++)
        if (strcmp(capability, software[i].name) == 0) {
            *value = software[i].value;
            return VM_OK;
        }
    if (strcmp(capability, "phys-bits") == 0) {
        *value = 64 - (unsigned)__builtin_clzll(x86_model_phys_mask(x86_model_find(NULL)));
        return VM_OK;
    }
    return vm_fail(VM_E_NOTFOUND, "vm_query: no capability \"%.60s\"", capability);
}

int vm_machine_query(vm_backend backend, const char *capability, uint64_t *value)
{
    backend = resolve(backend);
    if (!backends[backend]) {
        if (strcmp(capability, "available"))
            return vm_fail(VM_E_UNSUPPORTED, "the %s backend is not part of this build", backend_names[backend]);
        is_available(backend);         /* for its message */
        *value = 0;
        return VM_OK;
    }
    if (backends[backend]->query && backends[backend]->query(capability, value) == VM_OK)
        return VM_OK;
    return common_query(capability, value);
}

const vm_backend_ops *vm_backend_find(vm_backend *backend)
{
    *backend = resolve(*backend);
    return is_available(*backend) ? backends[*backend] : NULL;
}

/* ---- creation ---- */

/* CPU model "kvm": what every backend can do on this host, so that a machine may move to KVM later. */
static int kvm_model(vm_machine *m)
{
#if VM_HAVE_KVM
    return vm_kvm_model(m);
#else
    (void)m;
    return vm_fail(VM_E_UNSUPPORTED, "CPU model \"kvm\": the kvm backend is not part of this build");
#endif
}

static int copy_options(vm_machine *m, const vm_options *options)
{
    m->options = *options;
    m->options.backend = resolve(options->backend);
    m->options.mmu = m->options.cpu_model = NULL;
    m->is_pc = options->platform == VM_PLATFORM_PC;
    if (options->cpu_model && !(m->cpu_model = strdup(options->cpu_model)))
        return vm_fail(VM_E_NOMEM, "no memory for the machine");
    m->tsc_hz = VM_TSC_HZ;
    if (!is_built(m->options.backend))                 /* whether it is usable its machine_create() says */
        return VM_E_UNSUPPORTED;
    m->backend = backends[m->options.backend];
    if (m->cpu_model && !strcmp(m->cpu_model, "kvm"))
        return kvm_model(m);
    if (!x86_model_find(m->cpu_model))
        return vm_fail(VM_E_UNSUPPORTED, "no CPU model \"%.60s\"", m->cpu_model);
    return VM_OK;
}

static int create_vcpus(vm_machine *m, unsigned count)
{
    m->vcpus = calloc(count, sizeof *m->vcpus);
    if (!m->vcpus)
        return vm_fail(VM_E_NOMEM, "no memory for %u vCPUs", count);
    for (; m->vcpu_count < count; m->vcpu_count++) {
        int status = vm_vcpu_create(m, m->vcpu_count, &m->vcpus[m->vcpu_count]);
        if (status != VM_OK)
            return status;
    }
    return VM_OK;
}

static int build(vm_machine *m, const vm_options *options)
{
    int status = copy_options(m, options);
    if (status == VM_OK)
        status = vm_clock_create(m);
    if (status == VM_OK && m->backend->machine_create)
        status = m->backend->machine_create(m);
    if (status == VM_OK)
        status = create_vcpus(m, options->vcpus ? options->vcpus : 1);
    if (status == VM_OK)
        status = vm_mmu_attach(m, options->mmu);
    if (status == VM_OK && m->is_pc) {
        m->has_pc = true;
        status = vm_pc_create(m);
        if (status == VM_OK)
            vm_pc_reset(m);
    }
    m->options.ram_file = NULL;        /* the caller's */
    for (unsigned i = 0; status == VM_OK && i < m->vcpu_count; i++) {
        vm_vcpu_reset(m->vcpus[i]);
        vm_vcpu_changed(m->vcpus[i], VM_STATE_ALL);
    }
    return status;
}

int vm_machine_create(const vm_options *options, vm_machine **out)
{
    vm_machine *m = calloc(1, sizeof *m);
    if (!m)
        return vm_fail(VM_E_NOMEM, "no memory for a machine");
    vm_process_begin(m);
    vm_trace_init(m);
    int status = build(m, options);
    if (status != VM_OK) {
        vm_machine_destroy(m);
        return status;
    }
    *out = m;
    return VM_OK;
}

/* ---- the end ---- */

static void stop_vcpus(vm_machine *m)
{
    atomic_store(&m->is_ending, true);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        vm_vcpu_notify(m->vcpus[i], X86_ATT_KICK);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        vm_vcpu_wait_idle(m->vcpus[i]);
}

void vm_machine_destroy(vm_machine *m)
{
    vm_process_leave(m);
    stop_vcpus(m);
    vm_events_stop(m);
    vm_clock_stop(m);
    vm_hooks_free(m);
    vm_track_destroy(m);
    vm_mmu_detach(m);
    vm_replay_free(m);
    vm_bindings_free(m);
    vm_regions_free(m);
    vm_memory_unmap_main(m);
    if (m->has_pc)
        vm_pc_destroy(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        vm_vcpu_free(m->vcpus[i]);
    if (m->backend && m->backend->machine_destroy)
        m->backend->machine_destroy(m);
    vm_events_free(m);
    vm_clock_destroy(m);
    pthread_mutex_destroy(&m->trace_lock);
    free(m->vcpus);
    free(m->cpu_model);
    free(m->own_model);
    free(m);
}

/* ---- events and reset ---- */

void vm_machine_event(vm_machine *m, vm_exit_reason reason, uint64_t code)
{
    atomic_store(&m->event_code, code);
    atomic_store(&m->event, (int)reason);
    atomic_fetch_add(&m->event_seq, 1);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        vm_vcpu_notify(m->vcpus[i], X86_ATT_EVENT);
}

static void reset_devices(vm_machine *m)
{
    for (vm_region *r = m->regions; r; r = r->next)
        if (!r->is_internal && r->ops.reset)
            r->ops.reset(r->user);
}

void vm_machine_reset(vm_machine *m)
{
    vm_device_lock(m);
    vm_pause(m);
    reset_devices(m);
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        x86_cpu_reset(&cpu->x86, false);
        vm_vcpu_reset(cpu);
        cpu->event_seen = m->event_seq;
    }
    if (m->is_pc)
        vm_pc_reset(m);
    vm_mmu_forget(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        vm_vcpu_changed(m->vcpus[i], VM_STATE_ALL);
    vm_resume(m);
    vm_device_unlock(m);
}
