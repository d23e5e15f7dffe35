/* run.h - the run loop's parts, for run.c and replay.c, which have a loop each. */
#ifndef LIBVM_CORE_RUN_H
#define LIBVM_CORE_RUN_H

#include "core/core.h"

/* One vm_vcpu_run(). */
typedef struct vm_round {
    struct vm_round *outer;            /* of a bound function that runs the vCPU */
    uint64_t left;                     /* instructions of the budget */
    uint64_t deadline;                 /* host time; UINT64_MAX: none */
    const vm_run_options *options;
    vm_exit *exit;
    int status;                        /* of the call, if the host failed */
    bool is_window;                    /* an interrupt waits */
    bool is_delivered;                 /* an event has been, since guest code last ran */
    bool skips_until;                  /* the run began at `until`: execute one instruction before looking */
} vm_round;

/* Each gives an exit reason, or 0 to go on. attend: what others asked for (x86.attention). deliver: an event at the
 * boundary. stopped: what a stop of the backend means. ended: limits that are reached. */
int vm_round_attend(vm_vcpu *cpu, vm_round *r);
int vm_round_deliver(vm_vcpu *cpu, vm_round *r, uint8_t vector, bool has_error, uint32_t error);
int vm_round_stopped(vm_vcpu *cpu, vm_round *r, x86_stop stop);
int vm_round_ended(vm_vcpu *cpu, vm_round *r);
/* Guest code, at most `slice` instructions, exactly. */
x86_stop vm_round_execute(vm_vcpu *cpu, vm_round *r, int64_t slice);
/* `slice` cut down to the budget and to what a deadline allows without looking. */
uint64_t vm_round_slice(const vm_vcpu *cpu, const vm_round *r, uint64_t slice);
#define VM_SLICE_WINDOW 1000           /* an interrupt waits to be allowed; x86_irq_window() should ring before */

#endif
