/* ept.h - views of guest-physical memory: the second, host-owned level of strategy "ept". See ept.c. */
#ifndef LIBVM_EPT_H
#define LIBVM_EPT_H
#include "mmu/mmu.h"

typedef struct vm_ept_view vm_ept_view;

bool vm_ept_translate(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w);
/* What the vCPU's view allows at gpa. Call only while cpu->ept_view is set. */
unsigned vm_ept_prot(const vm_vcpu *cpu, uint64_t gpa);
/* What every vCPU may do there, for backends that map memory for the machine. */
unsigned vm_ept_machine_prot(const vm_machine *m, uint64_t gpa);
/* An access that no inline TLB entry allows is about to be made. VM_EPT_GO: make it; VM_EPT_DONE: it has been, *value is
 * what a read gives; VM_EPT_EXIT: leave the run. */
enum { VM_EPT_GO, VM_EPT_DONE, VM_EPT_EXIT };
int vm_ept_check(vm_vcpu *cpu, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *value);
#endif
