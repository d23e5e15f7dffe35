/* interp.h - the reference interpreter, for the core and for backends that fall back to it. */
#ifndef LIBVM_INTERP_H
#define LIBVM_INTERP_H

#include "core/core.h"

/* Executes exactly one instruction (or a bounded part of a repeated one) with all rules: faults delivered, shadows, careful
 * mode, retired count and budget. X86_STOP_NONE: go on; otherwise as vm_backend_ops.run. Makes its own fault_jmp. */
x86_stop interp_step(vm_vcpu *cpu);
/* Runs as vm_backend_interp does, but ends with X86_STOP_SLICE behind the block with which `some` instructions are done. */
x86_stop interp_run_some(vm_vcpu *cpu, int64_t some);
/* What a backend that uses interp_step passes on; also the ops of vm_backend_interp. */
int interp_create(vm_vcpu *cpu);
void interp_destroy(vm_vcpu *cpu);
void interp_code_changed(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes);
void interp_flush_code(vm_vcpu *cpu);
void interp_tlb_flushed(vm_vcpu *cpu);

/* The same for a bare x86_cpu. */
x86_stop interp_run_cpu(x86_cpu *cpu);
x86_stop interp_run_some_cpu(x86_cpu *cpu, int64_t some);
x86_stop interp_step_cpu(x86_cpu *cpu);
int interp_create_cpu(x86_cpu *cpu);
void interp_destroy_cpu(x86_cpu *cpu);
void interp_code_changed_cpu(x86_cpu *cpu, uint64_t gpa, uint64_t bytes);
void interp_flush_code_cpu(x86_cpu *cpu);
void interp_tlb_flushed_cpu(x86_cpu *cpu);
void interp_look_again_cpu(x86_cpu *cpu);                /* end the block after the instruction under way */
uint64_t interp_retired_cpu(const x86_cpu *cpu);         /* exact inside an instruction too */

#endif
