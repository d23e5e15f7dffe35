/* hook.c - the functions of <libvm/hook.h>. */
#include "api/api.h"
#include "core/hook.h"

VM_API int vm_hook_add(vm_machine *m, const vm_hook_desc *desc, vm_hook **out)
{
    vm_hook_desc d;
    if (out)
        *out = NULL;
    VM_CHECK_NULL("vm_hook_add", m);
    VM_CHECK(vm_struct_in(&d, sizeof d, desc, "vm_hook_add", "desc"));
    if (d.kind < VM_HOOK_INSN || d.kind >= VM_HOOK_KINDS)
        return vm_fail(VM_E_INVALID, "vm_hook_add: no kind %d", (int)d.kind);
    if (!d.fn)
        return vm_fail(VM_E_INVALID, "vm_hook_add: desc->fn is NULL");
    if (d.flags & ~(VM_HOOK_GPA | VM_HOOK_EXACT | VM_HOOK_SWITCH))
        return vm_fail(VM_E_INVALID, "vm_hook_add: desc->flags 0x%x has unknown bits", d.flags);
    if (d.begin > d.end)
        return vm_fail(VM_E_INVALID, "vm_hook_add: begin 0x%llx is above end 0x%llx", (unsigned long long)d.begin,
                       (unsigned long long)d.end);
    return vm_hook_insert(m, &d, VM_HOOKED_USER, out);
}

VM_API int vm_hook_remove(vm_machine *m, vm_hook *hook)
{
    VM_CHECK_NULL("vm_hook_remove", m);
    VM_CHECK_NULL("vm_hook_remove", hook);
    return vm_hook_delete(m, hook);
}

VM_API int vm_breakpoint(vm_machine *m, uint64_t gva, bool on)
{
    VM_CHECK_NULL("vm_breakpoint", m);
    return vm_hook_breakpoint(m, gva, on);
}

VM_API int vm_watchpoint(vm_machine *m, uint64_t gva, uint64_t bytes, vm_prot access, bool on)
{
    VM_CHECK_NULL("vm_watchpoint", m);
    if (!bytes || gva + (bytes - 1) < gva)
        return vm_fail(VM_E_INVALID, "vm_watchpoint: 0x%llx bytes at 0x%llx", (unsigned long long)bytes,
                       (unsigned long long)gva);
    if (!access || (access & ~VM_PROT_RW))
        return vm_fail(VM_E_INVALID, "vm_watchpoint: access %d is not R, W or both", (int)access);
    return vm_hook_watchpoint(m, gva, bytes, access, on);
}
