/* replay.h - recording and replay from the inside. See include/libvm/replay.h for what they promise, replaylog.h for the log.
 *
 * Positions. An event of the log happens at an instruction boundary that counting alone finds again: right after the N-th
 * instruction has retired. When others ask for attention in the midst of a repeated string instruction, or between an
 * exception's delivery and its handler's first instruction, the recorder lets one more instruction retire first. What happens
 * inside an instruction (a device callback of the program) is marked so and found again by the access itself.
 *
 * One loop each replaces the run loop: nothing asynchronous reaches the guest but through the log. m->replay is set and
 * cleared only while no vCPU runs.
 */
#ifndef LIBVM_CORE_REPLAY_H
#define LIBVM_CORE_REPLAY_H

#include "core/core.h"
#include "core/replaylog.h"
#include "core/run.h"

/* Something from outside; result is what the public function returns. */
typedef struct vm_input {
    uint8_t type;                      /* VM_LOG_LINE ... */
    uint64_t a, b;
    const void *data;
    size_t bytes;
    int result;
    bool is_done;
    struct vm_input *next;
} vm_input;

/* Public functions that change a machine from outside: `if (m->replay) return vm_replay_input(m, &in);` */
int vm_replay_input(vm_machine *m, vm_input *in);
int vm_replay_write(vm_machine *m, uint64_t gpa, const void *data, size_t bytes);
/* Those that cannot be recorded: VM_E_BUSY while a machine records or replays. */
int vm_replay_forbids(vm_machine *m, const char *function);

/* run.c */
void vm_replay_begin(vm_vcpu *cpu, const vm_exit *given);        /* before the completion of the last exit */
int vm_replay_loop(vm_vcpu *cpu, vm_round *r);
void vm_replay_finish(vm_vcpu *cpu);
/* bus.c: an access to a device of the program. Playing: true, and the answer is the log's. Recording: after the callback. */
bool vm_replay_answer(vm_vcpu *cpu, vm_log_type type, uint64_t *value, int *status);
void vm_replay_answered(vm_vcpu *cpu, vm_log_type type, uint64_t value, int status);

int vm_replay_record(vm_machine *m, int fd, const vm_record_options *options);
int vm_replay_play(vm_machine *m, int fd);
int vm_replay_end(vm_machine *m, vm_replay_mode mode);
void vm_replay_look(vm_machine *m, vm_replay_info *info);
void vm_replay_free(vm_machine *m);                              /* the machine ends */

/* sum.c */
uint64_t vm_ram_sum(vm_machine *m);
uint64_t vm_cpu_sum(vm_vcpu *cpu);                               /* registers and the instruction count since `base` */

#endif
