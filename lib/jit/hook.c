/* hook.c - hooks in translated code. See lib/core/hook.h. */
#include "core/hook.h"
#include "jit/jit.h"

/* Is something called before the instruction at rip? */
bool jit_is_hooked(const jit_unit *u, uint64_t rip, unsigned length) {
    const x86_cpu *cpu = u->cpu;
    const vm_machine *m = u->j->vcpu->machine;
    if (!(cpu->hook_mask & X86_HOOK_CODE)) return false;
    uint64_t la = u->key & JIT_KEY_64 ? rip : (uint32_t)rip, gpa = (u->gpa & X86_PAGE_MASK) | (rip & 0xfff);
    return vm_hook_covers(m, X86_HOOK_BREAK, la, 1, gpa) || vm_hook_covers(m, X86_HOOK_INSN, la, 1, gpa) ||
           vm_hook_covers(m, X86_HOOK_FETCH, la, length, gpa);
}

bool jit_hooks_want_interpreter(const x86_cpu *cpu) {
    return cpu->careful || (cpu->hook_mask & X86_HOOK_BLOCKS) || cpu->hook_done;
}

/* A part of an instruction (PUSH, CALL, RET...) whose access is watched: the interpreter does the whole instruction. */
bool jit_hook_steps(x86_cpu *cpu, const jit_site *s, uint64_t la) {
    return cpu->watch && !s->is_single && cpu->env->watched(cpu, la, s->size, s->access);
}
