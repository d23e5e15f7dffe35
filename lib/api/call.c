/* call.c - the functions of <libvm/call.h>. */
#include "api/api.h"
#include "core/call.h"

#include <string.h>

VM_API int vm_signature_check(const char *signature, size_t *args)
{
    vm_signature s;
    VM_CHECK(vm_signature_parse(signature, true, "vm_signature_check", &s));
    if (args)
        *args = s.values;
    return VM_OK;
}

static int take_options(const vm_call_options *options, const char *function, vm_call_options *o)
{
    *o = (vm_call_options)VM_CALL_OPTIONS_INIT;
    if (options)
        VM_CHECK(vm_struct_in(o, sizeof *o, options, function, "options"));
    if (o->exception_exits >> 32)
        return vm_fail(VM_E_INVALID, "%s: exception_exits 0x%llx: there are 32 vectors", function,
                       (unsigned long long)o->exception_exits);
    return VM_OK;
}

VM_API int vm_call(vm_vcpu *cpu, uint64_t address, const char *signature, const vm_value *args, size_t count,
                   vm_value *result, const vm_call_options *options, vm_exit *exit)
{
    vm_signature s;
    vm_call_options o;
    vm_value value = { 0 };
    vm_exit all = VM_EXIT_INIT;
    VM_CHECK(vm_check_vcpu(cpu, "vm_call"));
    VM_CHECK(vm_signature_parse(signature, false, "vm_call", &s));
    VM_CHECK(take_options(options, "vm_call", &o));
    if (count != s.values || (count && !args))
        return vm_fail(VM_E_INVALID, "vm_call: %zu arguments%s for a signature of %u", count, args ? "" : " (NULL)", s.values);
    if (exit)
        VM_CHECK(vm_struct_out(exit, NULL, 0, "vm_call", "exit"));
    int status = vm_call_guest(cpu, address, &s, args, &value, &o, &all);
    if (result)
        *result = value;
    if (status == VM_OK && exit)
        return vm_struct_out(exit, &all, sizeof all, "vm_call", "exit");
    if (status == VM_OK && all.reason != VM_EXIT_UNTIL) {
        char text[256];
        vm_exit_format(&all, text, sizeof text);
        return vm_fail(VM_E_FAULT, "vm_call: the function at 0x%llx did not return: %s", (unsigned long long)address, text);
    }
    return status;
}

VM_API int vm_closure_new(vm_vcpu *cpu, uint64_t address, const char *signature, const vm_call_options *options,
                          vm_closure **out)
{
    vm_signature s;
    vm_call_options o;
    VM_CHECK_NULL("vm_closure_new", cpu);
    VM_CHECK_NULL("vm_closure_new", out);
    *out = NULL;
    VM_CHECK(vm_signature_parse(signature, false, "vm_closure_new", &s));
    VM_CHECK(take_options(options, "vm_closure_new", &o));
    return vm_closure_create(cpu, address, &s, &o, out);
}

static int bind(vm_machine *m, bool is_hypercall, uint64_t key, const vm_bind_desc *desc, vm_binding **out,
                const char *function)
{
    vm_bind_desc d;
    vm_signature s;
    vm_layout l;
    if (out)
        *out = NULL;
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    VM_CHECK(vm_struct_in(&d, sizeof d, desc, function, "desc"));
    if (!d.fn == !d.values)
        return vm_fail(VM_E_INVALID, "%s: desc wants one of fn and values", function);
    VM_CHECK(vm_signature_parse(d.signature, d.fn != NULL, function, &s));
    if (is_hypercall && s.convention != VM_CONV_NONE)
        return vm_fail(VM_E_INVALID, "%s: a hypercall has no other convention", function);
    if (is_hypercall)
        VM_CHECK(vm_signature_place(&s, 8, true, function, &l));
    d.max_string = d.max_string ? d.max_string : VM_CALL_STRING;
    d.max_buffer = d.max_buffer ? d.max_buffer : VM_CALL_BUFFER;
    return vm_binding_add(m, is_hypercall, key, &d, &s, out);
}

VM_API int vm_bind_function(vm_machine *m, uint64_t address, const vm_bind_desc *desc, vm_binding **out)
{
    return bind(m, false, address, desc, out, "vm_bind_function");
}

VM_API int vm_bind_hypercall(vm_machine *m, uint64_t number, const vm_bind_desc *desc, vm_binding **out)
{
    if (m && m->backend->takes_interrupts)               /* KVM */
        return vm_fail(VM_E_UNSUPPORTED, "vm_bind_hypercall: on %s hypercalls go to the host's kernel", m->backend->name);
    return bind(m, true, number, desc, out, "vm_bind_hypercall");
}

VM_API int vm_unbind(vm_machine *m, vm_binding *binding)
{
    VM_CHECK_NULL("vm_unbind", m);
    VM_CHECK_NULL("vm_unbind", binding);
    return vm_binding_remove(m, binding);
}
