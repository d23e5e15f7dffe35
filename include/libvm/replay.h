/* replay.h - recording what happens to a PC machine from outside, and making it happen again exactly.
 *
 * While a machine records, its time is virtual: one nanosecond for each retired instruction, as on BARE machines, and while
 * it is halted the time that its timers ask for. So everything inside of it (timers, devices, random numbers) follows from
 * the instructions executed, and only what comes from outside is written to the log, with the instruction before which it
 * happened: console input, vm_irq_set(), vm_irq_msi(), vm_write(), vm_vcpu_write(), vm_vcpu_inject(), registers set between
 * runs, vm_reset(), what the callbacks of the program's own devices answered and did, and how exits were completed; besides,
 * where each interrupt was taken. Replaying gives the same instructions, the same memory, the same registers at each
 * instruction count, on either software backend, whichever recorded.
 *
 * What cannot be recorded: several vCPUs, BARE machines (they repeat themselves without a log), KVM (VM_E_UNSUPPORTED);
 * writes through vm_region_data() or a vm_map_host() region while recording. Map edits, vm_backend_select() to KVM, bound
 * functions and snapshot restores are refused (VM_E_BUSY) while a machine records or replays, hooks that change the guest
 * make the replay diverge. Snapshots taken during a replay can be restored in the same replay: so one goes back in it.
 */
#ifndef LIBVM_INCLUDE_REPLAY_H
#define LIBVM_INCLUDE_REPLAY_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vm_record_options {
    uint32_t size;                      /* sizeof(vm_record_options): VM_RECORD_OPTIONS_INIT */
    bool     skip_idle;                 /* do not wait while the guest is halted and waits for a timer: its time jumps there.
                                           Else it waits as long in the host's time. Nothing in the log depends on it */
    bool     omit_ram;                  /* leave the contents of RAM out of the log: whoever replays it brings them */
    uint64_t max_bytes;                 /* of the log, RAM not counted; 0: 1 GiB. When it is full, recording ends:
                                           VM_EXIT_REPLAY */
} vm_record_options;
#define VM_RECORD_OPTIONS_INIT VM_STRUCT_INIT(vm_record_options)

/* Begins to record into `fd`, from its current offset on; written in pieces, complete when vm_record_stop() has
 * returned. The machine may be new (booted, not run yet) or in the midst of a run, but no vCPU may be running now
 * (VM_E_BUSY). The log begins with the state of CPU and devices and all pages of RAM that are not zero. `fd` stays open
 * until the stop, the caller's. Inputs from other threads while the vCPU runs are taken in at its next instruction
 * boundary; the call waits for that. VM_E_UNSUPPORTED see above; VM_E_HOST writing failed; VM_E_NOMEM. */
VM_API int vm_record(vm_machine *m, int fd, const vm_record_options *options);
/* Ends it: the log is closed with a checksum of RAM and registers, the machine lives on in host time. VM_E_INVALID: it does
 * not record; VM_E_HOST: writing failed, now or earlier: the log is not complete. VM_E_BUSY while the vCPU runs. */
VM_API int vm_record_stop(vm_machine *m);

/* Reads a whole log from `fd` (current offset to its end) and puts the machine in front of it: CPU, devices, time and RAM as
 * they were when vm_record() was called. The machine is made with the same options and has the same memory map and devices
 * of the program. With omit_ram its RAM must be the same already, by restoring a snapshot that was taken when the recording
 * began, or by loading the same images (a Linux kernel gets other random numbers each time it is loaded).
 * Then vm_vcpu_run() replays, in as many runs as you like, with budgets, hooks and breakpoints. What is called to the
 * machine from outside meanwhile (the inputs listed above) is refused with VM_E_BUSY; callbacks of the program's own devices
 * are not called; console output is.
 * VM_E_FORMAT: damaged, of another version, incomplete, with a message that says where (nothing has changed then);
 * VM_E_INVALID: not this machine: its CPU model, memory size or map differ, or its RAM with omit_ram; VM_E_UNSUPPORTED,
 * VM_E_BUSY, VM_E_NOMEM, VM_E_HOST (reading). */
VM_API int vm_replay(vm_machine *m, int fd);
/* Ends a replay wherever it is; the machine lives on from there in host time. VM_E_INVALID: it does not replay. */
VM_API int vm_replay_stop(vm_machine *m);

/* VM_EXIT_REPLAY, when the run cannot go on:
 *   VM_OK        the log ends here, and RAM and registers are what they were when it was recorded. vm_replay_stop() lets the
 *                machine go on alone.
 *   VM_E_FORMAT  the machine has done something else than the log says (vm_errmsg() in the thread that ran says what), or
 *                is another at the end. It stays there.
 *   VM_E_NOMEM, VM_E_HOST  recording: the log is full, or writing failed; it has ended there.
 * Later runs give the same exit until vm_replay_stop() or vm_record_stop(). Details are in vm_replay_info. */
typedef enum vm_replay_mode { VM_REPLAY_OFF, VM_REPLAY_RECORDING, VM_REPLAY_PLAYING } vm_replay_mode;
typedef struct vm_replay_info {
    uint32_t size;                      /* sizeof(vm_replay_info): VM_REPLAY_INFO_INIT */
    vm_replay_mode mode;
    uint64_t position;                  /* instructions since the log's begin */
    uint64_t end;                       /* of the log, in instructions; recording: as position */
    uint64_t events, bytes;             /* recording: written so far; replaying: in the whole log */
    int32_t  status;                    /* as above; VM_OK while it goes well */
    bool     at_end;
} vm_replay_info;
#define VM_REPLAY_INFO_INIT VM_STRUCT_INIT(vm_replay_info)
/* Where it is. Any thread; may lag while the vCPU runs. */
VM_API int vm_replay_get_info(vm_machine *m, vm_replay_info *info);

/* A checksum of RAM, general registers, RIP, RFLAGS, x87/SSE/AVX state and the instruction count: the same at the same
 * position of recording and replay, on every backend. Takes a look at every page that is not zero. VM_E_BUSY while the
 * vCPU runs. */
VM_API int vm_machine_checksum(vm_machine *m, uint64_t *sum);

#ifdef __cplusplus
}
#endif
#endif
