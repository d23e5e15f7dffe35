/* select.h - what the core asks of KVM beyond a backend's ops: CPU models. */
#ifndef LIBVM_KVM_SELECT_H
#define LIBVM_KVM_SELECT_H
#include "core/core.h"
/* Gives a machine that is being created, on any backend, the CPU that this host's KVM can do: m->own_model, and for a
 * PC the host's TSC. VM_OK or a status. */
int vm_kvm_model(vm_machine *m);
#endif
