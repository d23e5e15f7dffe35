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
/* Skips what only the software backends promise. */
static inline void need_exact_budget(vm_backend backend)
{
    uint64_t exact = 0;
    if (vm_query(backend, "exact-budget", &exact) || !exact)
        test_skip("backend %s counts no instructions", vm_backend_name(backend));
}
#endif
