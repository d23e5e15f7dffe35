/* snapshot_fuzz - a fuzzer in a page: restore, write an input, run, look at the coverage; finds the input that crashes. */
#include "common.h"

enum { INPUT = 0x3000, LENGTH = 3, CORPUS = 64 };

int main(void)
{
    /* The guest wants "VM!" at [rdi]: each right byte opens the next comparison, the last one executes UD2. */
    static const uint8_t code[] = { 0x80, 0x3f, 'V', 0x75, 15, 0x80, 0x7f, 1, 'M', 0x75, 9, 0x80, 0x7f, 2, '!', 0x75, 3,
                                    0x0f, 0x0b, 0x90, 0xf4 };
    static uint8_t map[4096], seen[4096];
    char corpus[CORPUS][LENGTH] = { "AAA" };
    unsigned count = 1, runs = 0;
    vm_snapshot *state;
    vm_run_options options = VM_RUN_OPTIONS_INIT;
    vm_exit exit = VM_EXIT_INIT;
    vm_machine *m = software_machine_with(code, sizeof code);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    set(cpu, VM_REG_RIP, CODE);
    set(cpu, VM_REG_RDI, INPUT);
    MUST(vm_coverage(m, map, sizeof map));
    MUST(vm_snapshot_take(m, &state));
    options.max_instructions = 10000;
    options.exception_exits = 1 << 6;
    srand(1);
    for (;;) {
        char input[LENGTH];
        bool is_new = false;
        memcpy(input, corpus[(unsigned)rand() % count], LENGTH);
        input[rand() % LENGTH] = (char)rand();
        memset(map, 0, sizeof map);
        MUST(vm_snapshot_restore(m, state));
        MUST(vm_write(m, INPUT, input, LENGTH));
        MUST(vm_vcpu_run(cpu, &options, &exit));
        runs++;
        if (exit.reason == VM_EXIT_EXCEPTION) {
            printf("crash with \"%.3s\" after %u runs, %u inputs in the corpus\n", input, runs, count);
            break;
        }
        for (size_t i = 0; i < sizeof map; i++)
            if (map[i] && !seen[i])
                seen[i] = is_new = true;
        if (is_new && count < CORPUS)
            memcpy(corpus[count++], input, LENGTH);
    }
    vm_snapshot_free(state);
    vm_destroy(m);
    return 0;
}
