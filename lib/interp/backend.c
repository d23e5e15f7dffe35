/* backend.c - the interpreter as a backend of the machine. */
#include <string.h>
#include "interp/interp.h"

static int query(const char *capability, uint64_t *value)
{
    static const char *const yes[] = { "available", "exact-budget", "exception-exits", "until", "exec-only" };
    for (size_t i = 0; i < sizeof yes / sizeof yes[0]; i++)
        if (!strcmp(capability, yes[i])) {
            *value = 1;
            return VM_OK;
        }
    return VM_E_NOTFOUND;
}

int interp_create(vm_vcpu *cpu)
{
    return interp_create_cpu(&cpu->x86) == 0 ? VM_OK : vm_fail(VM_E_NOMEM, "no memory for the interpreter's block cache");
}

void interp_destroy(vm_vcpu *cpu) { interp_destroy_cpu(&cpu->x86); }
x86_stop interp_step(vm_vcpu *cpu) { return interp_step_cpu(&cpu->x86); }
x86_stop interp_run_some(vm_vcpu *cpu, int64_t some) { return interp_run_some_cpu(&cpu->x86, some); }
void interp_code_changed(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes) { interp_code_changed_cpu(&cpu->x86, gpa, bytes); }
void interp_flush_code(vm_vcpu *cpu) { interp_flush_code_cpu(&cpu->x86); }
void interp_tlb_flushed(vm_vcpu *cpu) { interp_tlb_flushed_cpu(&cpu->x86); }

static x86_stop run(vm_vcpu *cpu) { return interp_run_cpu(&cpu->x86); }

static void look_again(vm_vcpu *cpu) { interp_look_again_cpu(&cpu->x86); }
static uint64_t retired(const vm_vcpu *cpu) { return interp_retired_cpu(&cpu->x86); }

static void map_changed(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i])
            interp_flush_code(m->vcpus[i]);
}

const vm_backend_ops vm_backend_interp = {
    .name = "interp",
    .query = query,
    .vcpu_create = interp_create,
    .vcpu_destroy = interp_destroy,
    .run = run,
    .map_changed = map_changed,
    .code_changed = interp_code_changed,
    .flush_code = interp_flush_code,
    .tlb_flushed = interp_tlb_flushed,
    .retired = retired,
    .look_again = look_again,
    .look = 2000,
    .serves_hooks = true,
};
