/* hooks - watches a guest: blocks, writes, an exception that is skipped; a breakpoint and a watchpoint. */
#include "common.h"

static vm_hook_result on_block(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    printf("block %#" PRIx64 "\n", e->address);
    return VM_HOOK_CONTINUE;
}

static vm_hook_result on_write(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    printf("write of %" PRIu64 " to %#" PRIx64 "\n", e->value, e->address);
    return VM_HOOK_CONTINUE;
}

/* It is not delivered, the guest goes on after the instruction. */
static vm_hook_result on_undefined(void *user, vm_vcpu *cpu, const vm_hook_event *e) { return VM_HOOK_SKIP; }

static vm_hook *hook(vm_machine *m, vm_hook_kind kind, uint64_t begin, uint64_t end, vm_hook_fn fn)
{
    vm_hook_desc desc = { .size = sizeof desc, .kind = kind, .begin = begin, .end = end, .fn = fn };
    vm_hook *made;
    MUST(vm_hook_add(m, &desc, &made));
    return made;
}

int main(void)
{
    static const uint8_t code[] = { 0xb9, 3, 0, 0, 0,                           /* mov ecx, 3 */
                                    0x89, 0x0c, 0x25, 0x00, 0x30, 0, 0,         /* mov [0x3000], ecx */
                                    0x0f, 0x0b,                                 /* ud2 */
                                    0xff, 0xc9, 0x75, 0xf3, 0xf4 };             /* dec ecx; jnz the mov; hlt */
    vm_exit exit = VM_EXIT_INIT;
    vm_machine *m = software_machine_with(code, sizeof code);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_hook *blocks = hook(m, VM_HOOK_BLOCK, CODE, CODE + 0xfff, on_block);
    vm_hook *writes = hook(m, VM_HOOK_MEM_WRITE, 0, 0, on_write);
    hook(m, VM_HOOK_EXCEPTION, 6, 6, on_undefined);
    set(cpu, VM_REG_RIP, CODE);
    run_and_show(cpu, NULL, &exit);

    MUST(vm_hook_remove(m, blocks));
    MUST(vm_hook_remove(m, writes));
    MUST(vm_breakpoint(m, CODE + 14, true));
    set(cpu, VM_REG_RIP, CODE);
    run_and_show(cpu, NULL, &exit);
    MUST(vm_breakpoint(m, CODE + 14, false));
    MUST(vm_watchpoint(m, 0x3000, 4, VM_PROT_W, true));
    run_and_show(cpu, NULL, &exit);
    vm_destroy(m);
    return 0;
}
