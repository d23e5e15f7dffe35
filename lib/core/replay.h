/* replay.h - recording and replay from the inside. See include/libvm/replay.h for what they promise, replaylog.h for the log.
 *
 * Positions. An event of the log happens at an instruction boundary that counting alone finds again: right after the N-th
 * instruction has retired. When others ask for attention in the midst of a repeated string instruction, or between an
 * exception's delivery and its handler's first instruction, the recorder lets one more instruction retire first. What happens
 * inside an instruction (a device callback of the program) is marked so and found again by the access itself.
 *
 * One loop each replaces the run loop: nothing asynchronous reaches the guest but through the log. m->replay is set and
 * cleared only while no vCPU runs; the struct behind it (m->replay_kept) lives as long as the machine, because other
 * threads may be about to bring input.
 *
 *   replay.c  beginning and ending; the vCPU's state in logs      input.c   what comes from outside
 *   record.c  the recording loop                                  play.c    the replaying loop
 *   replaylog.c  the log as bytes
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

struct vm_replay {
    vm_replay_mode mode;
    uint64_t base;                     /* retired instructions at the log's begin */
    uint64_t state_sum;                /* of the vCPU when it last stopped */
    int status;                        /* what ended it */
    bool at_end;
    /* recording */
    vm_log_writer w;
    bool skip_idle;
    /* inputs of other threads. The lock is held while one is taken in with the vCPU idle, and while a run begins. */
    pthread_mutex_t lock;
    pthread_cond_t done;
    vm_input *inputs;                  /* wait for the running vCPU's thread */
    /* playing */
    vm_log log;
    size_t offset;
    uint64_t at;                       /* of `next` */
    vm_log_event next;                 /* the END when it is over */
    size_t next_offset; uint64_t before_next;            /* where `next` begins, the position of the event before it */
    uint64_t session;                  /* counts them, so that marks of others are known */
};

/* Public functions that change a machine from outside: `if (m->replay) return vm_replay_input(m, &in);` */
int vm_replay_input(vm_machine *m, vm_input *in);
int vm_replay_write(vm_machine *m, uint64_t gpa, const void *data, size_t bytes);
/* Those that cannot be recorded: VM_E_BUSY while a machine records or replays. */
int vm_replay_forbids(vm_machine *m, const char *function);

/* run.c */
bool vm_replay_claim(vm_vcpu *cpu);                              /* vm_vcpu_claim(), not while an input is taken in */
void vm_replay_begin(vm_vcpu *cpu, const vm_exit *given);        /* before the completion of the last exit */
int vm_replay_loop(vm_vcpu *cpu, vm_round *r);
void vm_replay_finish(vm_vcpu *cpu);
/* bus.c: an access to a device of the program. Playing: true, and the answer is the log's. Recording: after the callback. */
bool vm_replay_answer(vm_vcpu *cpu, vm_log_type type, uint64_t *value, int *status);
void vm_replay_answered(vm_vcpu *cpu, vm_log_type type, uint64_t value, int status);

/* snapshot.c: a snapshot taken in a replay can be gone back to in the same one. may_return: VM_E_BUSY when the machine records,
 * or replays something else. */
void vm_replay_mark(vm_machine *m, vm_replay_place *place);
int vm_replay_may_return(vm_machine *m, const vm_replay_place *place);
void vm_replay_depart(vm_machine *m);                            /* what waits at the ports must not fill receivers put back */
void vm_replay_return(vm_machine *m, const vm_replay_place *place);

/* lib/api */
int vm_replay_record(vm_machine *m, int fd, const vm_record_options *options);
int vm_replay_play(vm_machine *m, int fd);
int vm_replay_end(vm_machine *m, vm_replay_mode mode);
void vm_replay_look(vm_machine *m, vm_replay_info *info);
void vm_replay_free(vm_machine *m);                              /* the machine ends */

/* ---- between these files ---- */
static inline uint64_t vm_replay_position(const vm_vcpu *cpu)
{
    return vm_vcpu_retired_now(cpu) - cpu->machine->replay->base;
}
uint32_t vm_replay_check(const vm_vcpu *cpu);                    /* of the general registers */
/* The vCPU's state as a log holds it; NULL: no memory. state_put: VM_E_FORMAT. state_sum: a checksum of those bytes. */
uint8_t *vm_replay_state(vm_vcpu *cpu, size_t *bytes);
int vm_replay_state_put(vm_vcpu *cpu, const uint8_t *bytes, size_t count);
uint64_t vm_replay_state_sum(vm_vcpu *cpu);
/* Does what an event of kind VM_LOG_STATE to VM_LOG_INJECT says: its status, or how many bytes a serial port took. */
int vm_replay_apply(vm_vcpu *cpu, const vm_log_event *e);
void vm_replay_take_inputs(vm_vcpu *cpu);                        /* those that wait; at a boundary */
/* Write an event down, here. */
void vm_record_put(vm_vcpu *cpu, vm_log_event e);
int vm_record_round(vm_vcpu *cpu, vm_round *r);
int vm_play_round(vm_vcpu *cpu, vm_round *r);
void vm_play_next(struct vm_replay *rp);
int vm_play_diverged(vm_vcpu *cpu, const char *what, uint64_t got, uint64_t want);

/* sum.c */
uint64_t vm_ram_sum(vm_machine *m);
uint64_t vm_cpu_sum(vm_vcpu *cpu);

#endif
