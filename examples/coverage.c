/* coverage - what a guest went through, recorded without callbacks: edges, blocks, comparisons. */
#include "common.h"

int main(void)
{
    static const uint8_t code[] = { 0x3c, 5, 0x74, 4, 0xb3, 1, 0xeb, 2, 0xb3, 2, 0xf4 };
                                  /* cmp al, 5; je +4; mov bl, 1; jmp +2; mov bl, 2; hlt */
    static uint8_t map[65536];
    static uint64_t blocks[64];
    static vm_compare compares[64];
    uint64_t blocks_head = 0, compares_head = 0, shown = 0;
    vm_exit exit = VM_EXIT_INIT;
    vm_machine *m = software_machine_with(code, sizeof code);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    MUST(vm_coverage(m, map, sizeof map));
    MUST(vm_block_trace(cpu, blocks, 64, &blocks_head));
    MUST(vm_compare_log(cpu, compares, 64, &compares_head));
    for (unsigned al = 1; al <= 9; al += 4) {
        unsigned edges = 0;
        memset(map, 0, sizeof map);
        set(cpu, VM_REG_RIP, CODE);
        set(cpu, VM_REG_RAX, al);
        MUST(vm_vcpu_run(cpu, NULL, &exit));
        for (size_t i = 0; i < sizeof map; i++)
            edges += map[i] != 0;
        printf("al = %u: %u edges, blocks", al, edges);
        for (; shown < blocks_head; shown++)
            printf(" %#" PRIx64, blocks[shown & 63]);
        printf("\n");
    }
    for (uint64_t i = 0; i < compares_head; i++)
        printf("%#" PRIx64 ": %" PRIu64 " with %" PRIu64 "\n", compares[i].address, compares[i].a[0], compares[i].b[0]);
    vm_destroy(m);
    return 0;
}
