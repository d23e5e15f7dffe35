/* call.h - calls between guest and host from the inside. See include/libvm/call.h for what they mean. */
#ifndef LIBVM_CORE_CALL_H
#define LIBVM_CORE_CALL_H

#include "core/signature.h"

/* ---- the host calls (call.c) ---- */
int vm_call_guest(vm_vcpu *cpu, uint64_t address, const vm_signature *s, const vm_value *args, vm_value *result,
                  const vm_call_options *options, vm_exit *exit);     /* exit: full-size, never NULL */
int vm_closure_create(vm_vcpu *cpu, uint64_t address, const vm_signature *s, const vm_call_options *options,
                      vm_closure **out);

/* ---- numbers in registers (call.c), for both directions ---- */
uint64_t vm_abi_xmm(vm_vcpu *cpu, unsigned index);                     /* its low 8 bytes */
/* A result into RAX, RDX:RAX, XMM0 or ST0; and out of there (ST0 is popped). */
void vm_abi_put_result(vm_vcpu *cpu, const vm_layout *l, unsigned type, const vm_value *value);
void vm_abi_take_result(vm_vcpu *cpu, const vm_layout *l, unsigned type, vm_value *value);

/* ---- the guest calls (bind.c) ---- */
/* desc is full-size and checked; takes a copy. */
int vm_binding_add(vm_machine *m, bool is_hypercall, uint64_t key, const vm_bind_desc *desc, const vm_signature *s,
                   vm_binding **out);
int vm_binding_remove(vm_machine *m, vm_binding *binding);
void vm_bindings_free(vm_machine *m);                                  /* the machine ends */
/* Run loop, at a boundary with RIP where something may be bound: NOT_BOUND, 0: done, go on; else an exit reason. */
enum { VM_NOT_BOUND = -1 };
int vm_binding_at(vm_vcpu *cpu);
int vm_binding_hypercall(vm_vcpu *cpu);
bool vm_is_bound_hypercall(vm_machine *m, const x86_cpu *x);

#endif
