/* core.h - the machine from the inside: what lib/core, lib/api and the backends share.
 *
 * A vm_machine owns everything: vCPUs, memory map, bus, devices. There are no globals; two machines in one process
 * never meet.
 *
 * Locks are recursive and taken in this order: device_lock (all device callbacks, interrupt controllers), then
 * machine->lock (edits of the map; held between vm_pause and vm_resume), then the clock's and the trace's own. A
 * thread that holds machine->lock and not device_lock must not ask for device_lock. Nothing is held while guest code
 * runs.
 *
 * What a vCPU's thread may be doing is one word, vm_vcpu.state:
 *   VM_IDLE     nobody is inside vm_vcpu_run
 *   VM_LOOP     in the run loop at an instruction boundary, waiting (HLT, parked, paused)
 *   VM_BLOCKED  inside an instruction, waiting for one of the machine's locks
 *   VM_GUEST    anything else inside vm_vcpu_run: executing, in a callback
 * An edit stops the world: it waits until no other vCPU is in VM_GUEST. So whatever runs in VM_GUEST may read the map
 * without a lock; a thread that drives no vCPU reads it under machine->lock. What belongs to a vCPU (TLB, decoded
 * code) may be changed by others only while the world is stopped; decoded code only in VM_IDLE and VM_LOOP, because
 * in VM_BLOCKED the instruction under way still lies in it: then the change is queued (vm_vcpu_request) for the next
 * boundary.
 */
#ifndef LIBVM_CORE_H
#define LIBVM_CORE_H

#include <libvm/libvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdarg.h>
#include "x86/cpu.h"

/* ---- errors (error.c): set the thread's message, return the status ---- */
int vm_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
int vm_fail_errno(int status, const char *what);                 /* appends strerror(errno) */

/* ---- tables (memory.c) ---- */
/* Zeroed memory; a large piece takes nothing before it is touched, where calloc() clears what it has had before. NULL: none. */
void *vm_zeroed(size_t bytes);
void vm_zeroed_free(void *memory, size_t bytes);

/* ---- locks (lock.c) ---- */
typedef struct vm_lock {
    _Atomic int word;                  /* 0 free, 1 held, 2 held and waited for */
    _Atomic uintptr_t owner;           /* vm_thread_self() of the holder */
    unsigned depth;
} vm_lock;
/* The thread's own block, whose first word is its address (x86-64 psABI, TLS variant II): no call, unlike pthread_self(). */
static inline uintptr_t vm_thread_self(void)
{
    uintptr_t self;
    __asm__("mov %%fs:0, %0" : "=r"(self));
    return self;
}
/* The device lock: everything that touches devices. Any thread; recursive. */
void vm_device_lock(vm_machine *m);
void vm_device_unlock(vm_machine *m);
/* The edit lock, for a thread that only wants to read the map or to keep others from editing. */
void vm_machine_lock(vm_machine *m);
void vm_machine_unlock(vm_machine *m);

/* ---- memory (memory.c) ----
 * A view is the sorted array of the regions of one address space; lookups are binary searches with a last-hit cache a
 * vCPU.
 * Edits change it in place while the world is stopped. */
typedef enum vm_region_kind { VM_REGION_RAM, VM_REGION_HOST, VM_REGION_FILE, VM_REGION_MMIO,
                              VM_REGION_PIO } vm_region_kind;
#define VM_PAGE_CODE  1u     /* holds bytes some backend has translated or decoded: writes must be seen */
#define VM_PAGE_CLEAN 2u     /* dirty log on and page not dirty yet: the first write must be seen */
#define VM_PAGE_DIRTY 4u     /* written since the last fetch */
#define VM_PAGE_TABLE 8u     /* the MMU strategy wants to hear of writes (vm_mmu_table_written) */
#define VM_PAGE_KEPT 16u     /* as in the current snapshot: the first write must be seen (track.h) */
typedef struct vm_note vm_note;
struct vm_region {
    vm_machine *machine;
    vm_region_kind kind;
    uint64_t gpa, bytes;
    uint8_t *host;                     /* RAM kinds */
    _Atomic uint8_t *page_flags;       /* RAM kinds: VM_PAGE_* a 4 KiB page */
    uint8_t *page_prot;                /* vm_prot a page, once vm_protect made them differ; else NULL and `prot` */
    vm_prot prot;
    vm_io_ops ops; void *user;         /* MMIO, PIO */
    bool is_internal;                  /* made by the platform: vm_unmap refuses */
    bool is_read_only;                 /* the host mapping: nobody may write, not even vm_write() */
    bool is_enabled;                   /* in the view (vm_region_move can take it out) */
    bool is_shared_file;               /* writes go to vm_options.ram_file */
    struct { uint64_t device, inode, at; } file;       /* what a shared mapping of a file shows; inode 0: it is none */
    bool has_twins;                    /* its memory is, or was, at other addresses of the map, too (memory.c) */
    bool is_merged;                    /* parts of `host` are mapped from a file of shared pages (backing.c) */
    bool is_dying;                     /* unmapped while one of its callbacks was running */
    unsigned busy;                     /* callbacks running; under device_lock */
    vm_region *next, **link;           /* all regions of the machine */
    /* track.h: */
    uint8_t **base;                    /* a page: its contents in the current snapshot; NULL: those of the image */
    struct vm_image *image;            /* NULL: no snapshot has seen it */
    struct vm_image *backing;          /* `host` is a private mapping of this; NULL: of nothing */
    unsigned keepers, mark;            /* snapshots that contain it */
    bool is_parked;                    /* out of the map, kept by snapshots */
    struct vm_changed_pages *changed;  /* fork.c: pages that differ from the backing's */
};
typedef struct vm_range { uint64_t gpa, bytes; vm_region *region; uint64_t offset; } vm_range;
typedef struct vm_view { size_t count, capacity; vm_range *ranges; } vm_view;

const vm_range *vm_view_find(const vm_view *view, uint64_t gpa);           /* NULL: nothing there */
/* Host pointer to [gpa, gpa + *bytes) of RAM, *bytes shortened to the contiguous run; NULL when not RAM. For loaders
 * and devices. */
void *vm_memory_ptr(vm_machine *m, uint64_t gpa, size_t *bytes);
/* What devices use for DMA: whole transfer or false; marks dirty, invalidates code. Never recurses into MMIO. */
bool vm_dma_read(vm_machine *m, uint64_t gpa, void *buf, size_t bytes);
bool vm_dma_write(vm_machine *m, uint64_t gpa, const void *buf, size_t bytes);
/* Bytes of a region of RAM changed behind the CPUs' backs, and held code: every vCPU drops translations of them, at all addresses where
 * the memory is mapped, before its next instruction (the calling vCPU at once). */
void vm_page_code_changed(vm_machine *m, vm_vcpu *by, const vm_region *r, uint64_t offset, uint64_t bytes);

/* ---- vCPU ---- */
/* An address space whose translations may be kept while the guest is in another; as long as the version is the same. */
typedef struct vm_space { uint64_t key, version; } vm_space;
#define VM_NMIS 2u                     /* as many are kept for a vCPU: one to be served, one to wait */
#define VM_PARKS 16u                   /* as many are kept */
/* The bytes of a record's instruction, and what was last found out about some. */
#define VM_INSN_BYTES 15u
typedef struct vm_measured {
    uint8_t bytes[VM_INSN_BYTES], count, code_size, length;
} vm_measured;

struct vm_vcpu {
    x86_cpu x86;                       /* first */
    vm_machine *machine;
    unsigned index;
    _Atomic int state;                 /* VM_IDLE ...; VM_WAITED is or-ed in by a thread that sleeps until it changes */
    _Atomic int asleep;                /* the thread sleeps on x86.attention */
    _Atomic uintptr_t owner;           /* the thread inside vm_vcpu_run, 0: none */
    bool is_parked;                    /* PC: AP waiting for SIPI */
    uint8_t sipi_vector, nmis_latched; bool init_pending, sipi_pending;    /* under device_lock; vm_pc_vcpu_event takes them */
    vm_exit pending;                   /* exit that waits for its completion */
    bool has_pending;
    vm_measured measured;              /* exit.c: length_of() */
    struct vm_lapic *lapic;            /* PC */
    void *backend_data;
    vm_lock request_lock;              /* the two below */
    unsigned request_count;            /* > VM_REQUESTS: too many, drop everything */
    struct { uint64_t gpa, bytes; } requests[16];          /* code that changed */
    struct vm_note *notes; size_t note_count;              /* pages written since the current snapshot (track.h) */
    vm_range last_range, last_port;    /* hit caches, dropped when the map changes */
    unsigned walk_ctx, walk_access;    /* context and access of the translation under way (vm_mmu_walk) */
    x86_walk *walk;                    /* where its result is wanted */
    void *mmu_root;                    /* the strategy's own: what it keeps for the address space in use */
    vm_space space;                    /* whose translations the inline TLB holds; key 0: they are not worth keeping */
    struct vm_parks *parks;            /* those of others (lib/mmu/park.c) */
    struct vm_ept_view *ept_view;      /* strategy "ept": what memory is looked at through; else NULL */
    unsigned ept_index;
    struct { uint64_t gpa, bytes; _Atomic uint64_t *entry; } ept_leaf; /* of ept_view, met last; bytes 0: none */
    bool ept_stopped;                  /* X86_STOP_IO is a violation */
    struct { bool is_set; uint64_t page, rip, retired; } ept_step;     /* VM_EPT_STEP was said */
    unsigned lock_depth;               /* x86_env.lock_begin without lock_end */
    /* host time (CLOCK_MONOTONIC ns) this run must end; UINT64_MAX: none. For backends that cannot be cut into
     * slices */
    uint64_t deadline;
    _Atomic bool is_hopeless;          /* halted with IF = 0 */
    bool irq_look;                     /* the interrupt source may have something */
    bool is_shut_down;                 /* triple fault: until reset */
    struct { bool is_set, has_error; uint8_t vector; uint32_t error; } inject;
    unsigned event_seen;               /* machine->event_seq already reported */
    uint8_t bare_cr8;
    uint64_t random_state;
    unsigned hooks_seen;               /* vm_machine.hook_seq taken over */
    bool has_begun;                    /* inside a run that has executed something */
    bool has_redirect; uint64_t redirect;              /* where a callback wants to go on after the instruction under way */
    uint64_t irq_reported;             /* 1 + retired when a run was stopped before delivering a vector */
    struct { bool is_set; int cls; vm_hook *hook; vm_exit_debug debug; } hook_stop;    /* what hooks want to exit with */
    struct vm_round *round;            /* the run under way, innermost first (run.h) */
    unsigned run_depth;                /* runs inside each other */
    bool at_boundary;                  /* in a bound function: no instruction is under way, the vCPU may be run */
    bool has_budget; /* this run was given max_instructions: backends that cannot count must find another way */
    bool has_signal_blocked, is_brief; /* as in vm_run_options */
    bool holds_interrupts;             /* hardware interrupts and NMIs wait: a debugger is stepping */
};
static inline vm_vcpu *vm_vcpu_of(x86_cpu *cpu) { return (vm_vcpu *)cpu; }
enum { VM_IDLE, VM_GUEST, VM_BLOCKED, VM_LOOP, VM_WAITED = 0x100 };
#define VM_REQUESTS 16u
static inline bool vm_vcpu_is_running(const vm_vcpu *cpu) { return (cpu->state & ~VM_WAITED) != VM_IDLE; }
static inline bool vm_vcpu_is_mine(const vm_vcpu *cpu) { return cpu->owner == vm_thread_self(); }

/* ---- backends ----
 * run(): execute guest code until something the run loop must see. x86.budget is the slice in instructions
 * (interpreter and JIT count it down exactly and return X86_STOP_SLICE at 0); returns at the next block boundary when
 * x86.attention is non-zero. Registers in x86 are complete when it returns. A backend never calls a device.
 * A backend may keep a vCPU's state elsewhere (KVM). Then gpr, rip and rflags of x86 are current whenever run() has
 * returned, and anything else in the core or the API that looks at x86 calls vm_vcpu_fetch(cpu, parts) before reading
 * or changing a part (in callbacks too), and vm_vcpu_changed(cpu, parts) after changing it. Both cost nothing on
 * software backends. */
#define VM_STATE_REGS  1u              /* gpr, rip, rflags */
#define VM_STATE_SREGS 2u              /* segments, gdtr, idtr, cr0-4, efer, flat, cpl and others derived, inhibit, NMI state */
#define VM_STATE_FPU   4u              /* fpu, xcr0 */
#define VM_STATE_MSRS  8u              /* all the rest: dr, MSRs, MTRRs */
#define VM_STATE_ALL  15u
typedef struct vm_backend_ops {
    const char *name;
    int  (*query)(const char *capability, uint64_t *value);
    int  (*machine_create)(vm_machine *m);
    void (*machine_destroy)(vm_machine *m); /* also of one whose machine_create() failed */
    int  (*vcpu_create)(vm_vcpu *cpu);
    void (*vcpu_destroy)(vm_vcpu *cpu);
    x86_stop (*run)(vm_vcpu *cpu);
    /* vCPUs are paused; after every edit of regions, permissions, and of m->dirty_log */
    void (*map_changed)(vm_machine *m);
    void (*dirty_sync)(vm_machine *m); /* KVM: bring page_flags' VM_PAGE_DIRTY up to date */
    void (*code_changed)(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes);       /* on the vCPU's own thread, or paused */
    void (*flush_code)(vm_vcpu *cpu); /* all of it: hooks changed, snapshot restored */
    void (*tlb_flushed)(vm_vcpu *cpu); /* linear-address caches (jump caches) are stale */
    /* The same, told more precisely; NULL: tlb_flushed. bytes 0: every address, but not of global pages if keep_global. */
    void (*tlb_dropped)(vm_vcpu *cpu, uint64_t la, uint64_t bytes, bool keep_global);
    /* Set aside what is about to be dropped at a switch of address spaces, and enter it again; slots are below VM_PARKS. NULL:
     * nothing. */
    void (*park)(vm_vcpu *cpu, unsigned slot);
    void (*unpark)(vm_vcpu *cpu, unsigned slot);
    void (*get_state)(vm_vcpu *cpu, unsigned parts); /* KVM: make parts of x86 current; NULL for software */
    void (*set_state)(vm_vcpu *cpu, unsigned parts); /* KVM: parts of x86 changed; used by the next run() */
    void (*kick)(vm_vcpu *cpu); /* async-signal-safe; NULL: attention is enough */
    /* KVM: the vCPU goes to another backend: finish what is open and bring all of its state into x86 */
    void (*leave)(vm_vcpu *cpu);
    /* PC: run() itself takes vectors from the interrupt source (vm_pc_irq_source) at the right moment; the run loop
     * then leaves them alone, except to wake a halted vCPU */
    /* From a callback: rip, mode or pending events changed; decide anew what to execute after the instruction under way.
     * NULL: flush_code. */
    void (*look_again)(vm_vcpu *cpu);
    /* Instructions retired before the one under way, on the vCPU's own thread. NULL: x86.retired is always exact when
     * anything outside of the backend can see it. */
    uint64_t (*retired)(const vm_vcpu *cpu);
    /* Instructions between looks at the host's clock in a run with a deadline. 0: the backend says when (x86_spend()), or
     * keeps the deadline itself. */
    int64_t look;
    bool takes_interrupts;
    bool keeps_state;                  /* elsewhere: get_state and set_state are to be called. Without it only while hook_site */
    /* World stopped: a doorbell or a zone of collected writes comes or goes (doorbell.h). NULL: the bus does it. */
    void (*doorbell)(vm_machine *m, const vm_doorbell *d, int fd, bool on);
    void (*coalesce)(vm_machine *m, bool is_port, uint64_t at, uint64_t bytes, bool on);
    bool serves_hooks;                 /* hooks, breakpoints, watchpoints, single steps (hook.h) */
    bool serves_breaks;                /* only the last three */
    /* Hooks have been edited since number `seen` (vm_hooks_edit_after); x86.hook_mask and watch are as they are now, what was
     * translated may be stale. On the vCPU's thread, at a boundary. */
    void (*hooks_changed)(vm_vcpu *cpu, unsigned seen);
} vm_backend_ops;
extern const vm_backend_ops vm_backend_interp, vm_backend_jit, vm_backend_kvm;

/* ---- machine ---- */
struct vm_machine {
    vm_options options;                /* normalised copy */
    char *cpu_model, *mmu_name;
    const vm_backend_ops *backend;
    void *backend_data;
    unsigned vcpu_count;
    vm_vcpu **vcpus;
    vm_lock lock;                      /* edits: vm_machine_lock(), vm_pause() */
    vm_lock device_lock;               /* devices and interrupt controllers: vm_device_lock() */
    vm_region *regions;
    _Atomic size_t region_count;
    _Atomic uint64_t ram_total;
    vm_view view;                      /* MMIO, RAM by gpa */
    vm_view ports;                     /* PIO ranges, gpa = port */
    vm_view handles;                   /* all regions, gpa = address of the vm_region */
    vm_region *graves;                 /* unmapped RAM that an instruction under way may still reach */
    vm_region *ram;                    /* PC main memory (low part) */
    struct { uint8_t *host; size_t bytes; } ram_map[2];    /* vm_options.ram_file: low and high memory */
    bool dirty_log;
    const struct vm_mmu_ops *mmu; void *mmu_state;
    enum vm_mmu_kind { VM_MMU_TLB, VM_MMU_FLAT, VM_MMU_SHADOW, VM_MMU_EPT, VM_MMU_OTHER } mmu_kind;    /* of `mmu` */
    struct vm_clock *clock;            /* clock.c: virtual or host time, timers */
    struct vm_platform_pc *pc;         /* NULL on BARE */
    struct vm_bindings *bindings;      /* bind.c; NULL: none */
    struct vm_replay *replay, *replay_kept;                      /* replay.h; `replay` NULL: neither records nor replays */
    struct vm_track *track;            /* NULL: no snapshots (track.h) */
    _Atomic bool is_touched;           /* RAM may have been written since the last fork */
    struct vm_hooks *hooks;            /* hook.h; NULL: never had any */
    _Atomic unsigned hook_seq;         /* counts edits of hooks */
    _Atomic unsigned trace_mask;       /* VM_TRACE_* */
    pthread_mutex_t trace_lock;        /* the sink: */
    vm_trace_fn trace_fn; void *trace_user;
    _Atomic int poisoned;              /* VM_E_INTERNAL happened */
    _Atomic int event; _Atomic uint64_t event_code; /* VM_EXIT_POWEROFF, _RESET, _GUEST_EXIT posted by a device */
    _Atomic unsigned event_seq;        /* counts them: each vCPU reports each once */
    _Atomic int pause_count;           /* > 0: vCPUs wait at safe points */
    _Atomic int pause_waiters;         /* threads that sleep until pause_count is 0 */
    _Atomic bool is_ending;            /* vm_destroy has begun: every run leaves */
    _Atomic int *is_here;              /* 0: this process is a fork of the one that made the machine (process.c) */
    _Atomic int is_unnoticed;          /* what is_here points at as long as nothing better is there */
    bool is_pc;
    struct x86_model *own_model;       /* what CPUID shows, if it is not a model of x86_model_find() */
    bool tsc_is_host;                  /* the guest's TSC is the host's, at tsc_hz (PC that runs or may run on KVM) */
    uint64_t tsc_hz;                   /* VM_TSC_HZ otherwise */
    uint64_t tsc_offset;               /* tsc_is_host: added to the host's */
    bool has_pc;                       /* created far enough to be destroyed */
    _Atomic uint64_t stat_irqs, stat_msis, stat_exits;
    struct vm_events *events;          /* doorbells and their like; NULL: none ever */
    _Atomic bool has_gdb;              /* a GDB stub exists */
};
static inline void vm_vcpu_fetch(vm_vcpu *cpu, unsigned parts)
{
    const vm_backend_ops *b = cpu->machine->backend;
    if (cpu->x86.hook_site | b->keeps_state)
        b->get_state(cpu, parts);
}
static inline void vm_vcpu_changed(vm_vcpu *cpu, unsigned parts)
{
    const vm_backend_ops *b = cpu->machine->backend;
    if (cpu->x86.hook_site | b->keeps_state)
        b->set_state(cpu, parts);
}
/* Stop every vCPU at a safe point (the caller's own counts as stopped) and let them go on. Nests; holds
 * machine->lock, so one thread at a time. With device_lock held too, or without it for good. */
void vm_pause(vm_machine *m);
void vm_resume(vm_machine *m);
void vm_vcpu_notify(vm_vcpu *cpu, uint32_t attention_bits); /* set bits, wake from HLT, backend kick; any thread */
/* The vCPU of m that the calling thread is driving; NULL: none. */
vm_vcpu *vm_vcpu_self(vm_machine *m);
/* Begin and end a run: false when the vCPU is taken. After release the machine may be gone. wait_idle: for
 * destruction. */
bool vm_vcpu_claim(vm_vcpu *cpu);
void vm_vcpu_release(vm_vcpu *cpu);
void vm_vcpu_wait_idle(vm_vcpu *cpu);
/* Sleep until attention is non-zero or host time (CLOCK_MONOTONIC ns) is `until_ns`; UINT64_MAX: no limit. */
void vm_vcpu_sleep(vm_vcpu *cpu, uint64_t until_ns);
/* Run loop side of pausing: wait while the world is stopped. At an instruction boundary. */
void vm_vcpu_safe_point(vm_vcpu *cpu);
/* Queue "code changed" for another vCPU's next boundary. */
void vm_vcpu_request(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes);
void vm_vcpu_take_requests(vm_vcpu *cpu);
/* A device asks the machine to stop: VM_EXIT_POWEROFF, VM_EXIT_RESET, VM_EXIT_GUEST_EXIT with a code. Any thread. */
void vm_machine_event(vm_machine *m, vm_exit_reason reason, uint64_t code);
void vm_machine_reset(vm_machine *m); /* platform reset: devices and vCPUs; vCPUs paused or caller's */

/* ---- fork() of the process (process.c) ---- */
#define VM_PROCESS_PAGE 4096u
/* begin: before all else of a machine; enter: with a page of anonymous memory, now that there is one. */
void vm_process_begin(vm_machine *m);
void vm_process_enter(vm_machine *m, void *page);
void vm_process_leave(vm_machine *m);  /* it is destroyed, here; the page goes */
int  vm_process_adopt(vm_machine *m);  /* in a child of fork(): make the machine's copy one of this process */
static inline int vm_process_check(vm_machine *m)
{
    return __builtin_expect(atomic_load_explicit(m->is_here, memory_order_relaxed), 1) ? VM_OK : vm_process_adopt(m);
}
/* Another of the same backend's data in place of what there is; no vCPU runs. */
int  vm_machine_renew(vm_machine *m);

/* ---- internal map calls for platform code: like the public ones, region marked internal ---- */
int vm_add_mmio(vm_machine *m, uint64_t gpa, uint64_t bytes, const vm_io_ops *ops, void *user, vm_region **out);
int vm_add_pio(vm_machine *m, uint16_t port, unsigned count, const vm_io_ops *ops, void *user, vm_region **out);
/* Move or hide an internal region (APIC base, PCI BARs): device context, takes effect at the next boundary. */
int vm_region_move(vm_region *r, uint64_t gpa, bool enabled);

/* A moment of a replay (replay.h): session 0: none. */
typedef struct vm_replay_place {
    uint64_t session, offset, before;
    unsigned timers;
    uint64_t deadlines[32];
    uint8_t *input;                    /* of the host, that waits before the serial ports; malloc'd, may be NULL */
    unsigned input_bytes[4];
} vm_replay_place;

/* ---- clock (clock.c) ----
 * Guest time in nanoseconds. PC machines follow CLOCK_MONOTONIC; BARE machines follow retired instructions (1 ns each).
 * Timers fire from the run loop of vCPU 0 or from the clock's thread, always under device_lock. */
typedef struct vm_timer vm_timer;
uint64_t vm_clock_now(vm_machine *m);
bool vm_clock_is_real(const vm_machine *m);                        /* the host's time: it goes on while no vCPU runs */
uint64_t vm_clock_tsc(vm_machine *m);                              /* guest TSC at VM_TSC_HZ */
void vm_clock_set(vm_machine *m, uint64_t now, uint64_t tsc);      /* guest time jumps; timers are the devices' affair */
#define VM_TSC_HZ UINT64_C(1000000000)
int  vm_clock_create(vm_machine *m);
void vm_clock_stop(vm_machine *m);                                 /* end the timer thread; timers stay */
void vm_clock_destroy(vm_machine *m);
void vm_clock_forked(vm_machine *m);                               /* the thread and its lock are another process' */
/* BARE: move virtual time forward beside the instructions retired, firing what falls due (tests of devices). */
void vm_clock_advance(vm_machine *m, uint64_t ns);
/* BARE: fire due timers; guest time of the next one, UINT64_MAX: none. Run loop only. */
uint64_t vm_clock_poll(vm_machine *m);
int  vm_clock_resume(vm_machine *m); /* a PC: a vCPU has begun to run. The first time it makes the timer thread */
/* PC: from host time to virtual time, which goes on from the same moment and counts as on BARE machines, or back. While it is
 * virtual nobody fires timers but vm_clock_fire(). The vCPU must not run. */
void vm_clock_virtual(vm_machine *m, bool on);
uint64_t vm_clock_next(vm_machine *m);                             /* when a timer falls due; UINT64_MAX: none */
void vm_clock_fire(vm_machine *m);
void vm_clock_skip(vm_machine *m, uint64_t ns);                    /* virtual time jumps */
/* When each timer falls due, in an order that stays while none is made or freed; how many there are. A device restored from its
 * state may choose other moments than it had chosen before. */
unsigned vm_clock_deadlines(vm_machine *m, uint64_t *deadlines, unsigned room);
void vm_clock_set_deadlines(vm_machine *m, const uint64_t *deadlines, unsigned count);
uint64_t vm_host_now(void);                                        /* CLOCK_MONOTONIC, ns */
vm_timer *vm_timer_new(vm_machine *m, void (*fn)(void *user), void *user);
void vm_timer_set(vm_timer *t, uint64_t deadline_ns);              /* absolute guest time; UINT64_MAX: off */
void vm_timer_free(vm_timer *t);

/* ---- interrupts, seen from the run loop (PC: dev/lapic.c + pic; BARE: vm_vcpu_inject only) ---- */
typedef struct vm_irq_source {
    int  (*pending)(vm_vcpu *cpu);     /* vector that would be delivered now, or -1; no side effects */
    int  (*acknowledge)(vm_vcpu *cpu); /* take it: vector, or -1 if it went away */
} vm_irq_source;
extern const vm_irq_source vm_pc_irq_source;                       /* platform/pc.c */

/* ---- tracing (trace.c): LIBVM_TRACE=decode,ir,mcode,exit,mmio,irq to stderr or the sink set by the caller;
 * categories in machine.h ---- */
void vm_trace_init(vm_machine *m);
static inline unsigned vm_trace_mask(const vm_machine *m) { return atomic_load_explicit(&m->trace_mask,
                                                                                        memory_order_relaxed); }
void vm_trace_line(vm_machine *m, vm_trace_category category, const char *format, ...) __attribute__((format(printf,
                                                                                                             3, 4)));


/* ---- bus.c: accesses of a vCPU that are not plain RAM. X86_IO_EXIT: nobody answered ---- */
int vm_bus_read(vm_vcpu *cpu, uint64_t gpa, unsigned n, unsigned access, uint64_t *value);
int vm_bus_write(vm_vcpu *cpu, uint64_t gpa, unsigned n, uint64_t value);
int vm_bus_in(vm_vcpu *cpu, uint16_t port, unsigned n, uint64_t *value);
int vm_bus_out(vm_vcpu *cpu, uint16_t port, unsigned n, uint64_t value);

/* ---- the rest of lib/core, called by lib/api (arguments are checked there) ---- */
extern const x86_env vm_env;                                       /* env.c */
int  vm_machine_create(const vm_options *options, vm_machine **out);
void vm_machine_destroy(vm_machine *m);
int  vm_machine_select(vm_machine *m, vm_backend backend);         /* select.c */
/* The ops of a backend that can be used here; *backend AUTO is resolved first. NULL: the message says why not. */
const vm_backend_ops *vm_backend_find(vm_backend *backend);
int  vm_machine_query(vm_backend backend, const char *capability, uint64_t *value);
int  vm_vcpu_create(vm_machine *m, unsigned index, vm_vcpu **out);
void vm_vcpu_free(vm_vcpu *cpu);
int  vm_run(vm_vcpu *cpu, const vm_run_options *options, vm_exit *exit); /* exit: full-size, never NULL */
int  vm_run_check(vm_vcpu *cpu);                                   /* the status vm_run() would refuse with now */
void vm_vcpu_look_again(vm_vcpu *cpu);                             /* its own thread, in a callback or not */
/* A number that a vCPU's thread counts, as others may see it: some time late. Plain on the counting side, which ThreadSanitizer need not
 * be told. */
#ifdef __SANITIZE_THREAD__
__attribute__((no_sanitize("thread")))
#endif
static inline uint64_t vm_look_at(const uint64_t *count) { return *(const volatile uint64_t *)count; }
uint64_t vm_vcpu_retired_now(const vm_vcpu *cpu);                  /* exact in callbacks on its own thread */
void vm_vcpu_reset(vm_vcpu *cpu); /* forget exits, injections, shutdown; not the registers */
/* backing.c */
int  vm_memory_discard(vm_machine *m, uint64_t gpa, uint64_t bytes);
int  vm_memory_advise(vm_machine *m, uint64_t gpa, uint64_t bytes, unsigned advice);
#define VM_ADVICE_ALL 31u              /* all the bits of vm_advice */
/* A PC's options.ram_file to m->ram_map, and away; `high` bytes of it lie beyond the first `low`. */
int  vm_memory_map_main(vm_machine *m, uint64_t low, uint64_t high);
void vm_memory_unmap_main(vm_machine *m);
int  vm_memory_share(vm_machine *const *machines, unsigned count, uint64_t *saved);     /* paused, idle */
/* memory.c */
/* takes proto's fields; frees nothing on failure */
int  vm_region_add(vm_machine *m, const vm_region *proto, vm_region **out);
/* Removal in two steps, because the second needs the device lock, which is not to be asked for under machine->lock:
 * out of the map (RAM kinds are freed or buried), then the owner's destroy callback. */
bool vm_region_is_known(vm_machine *m, const vm_region *r);         /* r may be a stale pointer; under machine->lock */
void vm_region_detach(vm_region *r);
void vm_region_finish(vm_machine *m, vm_region_kind kind, vm_region *r);
void vm_region_end(vm_region *r);
static inline void vm_region_leave(vm_region *r) /* a callback has returned: finish a delayed removal */
{
    if (--r->busy == 0 && r->is_dying)
        vm_region_end(r);
}
void vm_regions_free(vm_machine *m);                               /* destruction: callbacks, then memory */
int  vm_memory_protect(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot);
/* VM_E_FAULT; no message limit */
int  vm_memory_copy(vm_machine *m, uint64_t gpa, void *buffer, size_t bytes, bool is_write);
int  vm_memory_changed(vm_machine *m, uint64_t gpa, uint64_t bytes);                            /* vm_invalidate */
void vm_memory_dirty_log(vm_machine *m, bool on);
void vm_memory_dirty_fetch(vm_machine *m, uint64_t gpa, uint64_t bytes, uint64_t *bitmap);
const vm_range *vm_find_new(vm_vcpu *cpu, uint64_t gpa);
static inline const vm_range *vm_find(vm_vcpu *cpu, uint64_t gpa)  /* through the hit cache; in VM_GUEST */
{
    const vm_range *last = &cpu->last_range;
    return gpa - last->gpa < last->bytes ? last : vm_find_new(cpu, gpa);
}
unsigned vm_region_prot(const vm_region *r, uint64_t offset);
void vm_page_written(vm_machine *m, vm_vcpu *by, const vm_region *r, uint64_t offset, uint64_t bytes);
void vm_page_has_code(vm_vcpu *cpu, uint64_t gpa);
bool vm_page_trap(vm_machine *m, uint64_t gpa, bool on);           /* VM_PAGE_TABLE; false: no RAM there */
bool vm_page_is_trapped(vm_machine *m, uint64_t gpa);
/* World stopped: the views of "ept" show other permissions in the range (0, 0: anywhere; then backends that map memory
 * themselves only). */
void vm_memory_view_changed(vm_machine *m, uint64_t gpa, uint64_t bytes);
/* regs.c */
int  vm_regs_read(vm_vcpu *cpu, int reg_id, void *value);
int  vm_regs_write(vm_vcpu *cpu, int reg_id, const void *value);
void vm_regs_get(vm_vcpu *cpu, vm_regs *regs);
void vm_regs_set(vm_vcpu *cpu, const vm_regs *regs);
void vm_sregs_get(vm_vcpu *cpu, vm_sregs *sregs);
int  vm_sregs_set(vm_vcpu *cpu, const vm_sregs *sregs);
int  vm_sregs_check(const vm_sregs *sregs, uint64_t phys_mask);      /* VM_E_INVALID: no CPU can be in that state */
void vm_fpu_get(vm_vcpu *cpu, vm_fpu *fpu);
int  vm_fpu_set(vm_vcpu *cpu, const vm_fpu *fpu);
/* stats.c */
int  vm_stats_get(vm_machine *m, const char *name, uint64_t *value);
/* coverage.c; nobody runs, the backend is a software one */
bool vm_cover_is_on(const vm_machine *m);
void vm_cover_map(vm_machine *m, uint8_t *map, size_t bytes);
void vm_cover_range(vm_machine *m, uint64_t begin, uint64_t end);
void vm_cover_ring(vm_vcpu *cpu, uint64_t *ring, size_t entries, uint64_t *head);
void vm_cover_log(vm_vcpu *cpu, vm_compare *ring, size_t entries, uint64_t *head);
/* exit.c */
void vm_exit_from_io(vm_vcpu *cpu, vm_exit *exit);
void vm_exit_from_exception(vm_vcpu *cpu, vm_exit *exit);
void vm_exit_from_hypercall(vm_vcpu *cpu, vm_exit *exit);
void vm_exit_complete(vm_vcpu *cpu, const vm_exit *given);

#endif
