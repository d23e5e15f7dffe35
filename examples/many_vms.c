/* many_vms - eight machines on eight threads. */
#include "common.h"

#include <pthread.h>

enum { MACHINES = 8 };

static void *work(void *number)
{
    static const uint8_t code[] = { 0xb9, 0, 0, 0x80, 0, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xfa, 0xf4 };
                                  /* mov ecx, 0x800000; add eax, ecx; dec ecx; jnz; hlt */
    vm_exit exit = VM_EXIT_INIT;
    vm_machine *m = machine_with(NULL, code, sizeof code);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    set(cpu, VM_REG_RIP, CODE);
    set(cpu, VM_REG_RAX, (uintptr_t)number);
    MUST(vm_vcpu_run(cpu, NULL, &exit));
    uint64_t result = get(cpu, VM_REG_RAX);
    vm_destroy(m);
    return (void *)(uintptr_t)result;
}

int main(void)
{
    pthread_t threads[MACHINES];
    uint64_t least = UINT64_MAX, most = 0;
    for (uintptr_t i = 0; i < MACHINES; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)i) != 0)
            return fprintf(stderr, "many_vms: no thread\n"), 1;
    for (unsigned i = 0; i < MACHINES; i++) {
        void *result;
        pthread_join(threads[i], &result);
        least = (uintptr_t)result < least ? (uintptr_t)result : least;
        most = (uintptr_t)result > most ? (uintptr_t)result : most;
    }
    printf("%d machines, results from %" PRIu64 " to %" PRIu64 "\n", MACHINES, least, most);
    return 0;
}
