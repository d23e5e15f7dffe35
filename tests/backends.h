/* backends.h - tests that run once for every backend this machine offers: EACH_BACKEND(name) { ... uses `backend` ... } */
#ifndef LIBVM_TEST_BACKENDS_H
#define LIBVM_TEST_BACKENDS_H
#include <libvm/libvm.h>
#include "test.h"

static inline void add_for_backends(const char *name, test_fn fn, unsigned seconds)
{
    static const vm_backend all[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    const char *only = getenv("TEST_BACKEND");
    for (int i = 0; i < 3; i++) {
        uint64_t available = 0;
        char full[200];
        if (only && strcmp(only, vm_backend_name(all[i])))
            continue;
        if (vm_query(all[i], "available", &available) || !available)
            continue;
        snprintf(full, sizeof full, "%s/%s", name, vm_backend_name(all[i]));
        test_add(full, fn, &all[i], seconds);
    }
}
#define EACH_BACKEND(name)                                                                                      \
    static void on_##name(vm_backend backend);                                                                  \
    static void with_##name(const void *arg) { on_##name(*(const vm_backend *)arg); }                           \
    SETUP(backends_##name) { add_for_backends(#name, with_##name, 0); }                                         \
    static void on_##name(vm_backend backend)

/* A BARE machine with 64 KiB of RAM at 0 that holds `code`; its vCPU in `mode`, RSP 0x8000. */
static inline vm_vcpu *bare_machine(vm_backend backend, vm_mode mode, const void *code, size_t bytes)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    uint64_t rsp = 0x8000;
    o.backend = backend;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, code, bytes));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), mode));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RSP, &rsp, 8));
    return vm_vcpu_get(m, 0);
}

/* Skips what only the software backends promise. */
static inline void need_exact_budget(vm_backend backend)
{
    uint64_t exact = 0;
    if (vm_query(backend, "exact-budget", &exact) || !exact)
        test_skip("backend %s counts no instructions", vm_backend_name(backend));
}
#endif
