/* core.h - the machine from the inside: what lib/core, lib/api and the backends share.
 *
 * A vm_machine owns everything: vCPUs, memory map, bus, devices, hooks. There are no globals; two machines in one process
 * never meet. Locks, in the order they may be taken: machine->lock (map, hooks, snapshots: edits), machine->device_lock
 * (all device callbacks, interrupt controllers), flat view's reader side. Nothing is held while guest code runs.
 */
#ifndef LIBVM_CORE_H
#define LIBVM_CORE_H

#include <libvm/libvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include "x86/cpu.h"

/* ---- errors (error.c): set the thread's message, return the status ---- */
int vm_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
int vm_fail_errno(int status, const char *what);                 /* appends strerror(errno) */

/* ---- memory (memory.c) ----
 * Regions live in a gpa-ordered list; edits build a new immutable flat view (sorted, non-overlapping ranges; binary
 * search, last-hit cache a vCPU) that readers pin with vm_view_pin/unpin. An edit publishes the new view, then stops
 * the vCPUs of the machine for a moment (vm_pause), flushes their TLBs and waits until nobody pins the old one. */
typedef enum vm_region_kind { VM_REGION_RAM, VM_REGION_HOST, VM_REGION_FILE, VM_REGION_MMIO, VM_REGION_PIO } vm_region_kind;
#define VM_PAGE_CODE  1u     /* holds bytes some backend has translated or decoded: writes must be seen */
#define VM_PAGE_CLEAN 2u     /* dirty log on and page not dirty yet: the first write must be seen */
#define VM_PAGE_DIRTY 4u     /* written since the last fetch */
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
    vm_region *next;
};
typedef struct vm_range { uint64_t gpa, bytes; vm_region *region; uint64_t offset; } vm_range;
typedef struct vm_view { size_t count; _Atomic unsigned pins; vm_range ranges[]; } vm_view;

const vm_range *vm_view_find(const vm_view *view, uint64_t gpa);           /* NULL: nothing there */
/* Host pointer to [gpa, gpa + *bytes) of RAM, *bytes shortened to the contiguous run; NULL when not RAM. For loaders and devices. */
void *vm_memory_ptr(vm_machine *m, uint64_t gpa, size_t *bytes);
/* What devices use for DMA: whole transfer or false; marks dirty, invalidates code. Never recurses into MMIO. */
bool vm_dma_read(vm_machine *m, uint64_t gpa, void *buf, size_t bytes);
bool vm_dma_write(vm_machine *m, uint64_t gpa, const void *buf, size_t bytes);
/* Bytes at gpa changed behind the CPUs' backs: dirty, and every vCPU drops translations of them before its next instruction
 * (the calling vCPU at once). */
void vm_code_changed(vm_machine *m, vm_vcpu *by, uint64_t gpa, uint64_t bytes);

/* ---- vCPU ---- */
struct vm_vcpu {
    x86_cpu x86;                       /* first */
    vm_machine *machine;
    unsigned index;
    _Atomic int running;               /* a thread is inside vm_vcpu_run */
    _Atomic int in_guest;              /* between safe points: backend may touch RAM directly */
    pthread_t thread;
    pthread_mutex_t wait_lock; pthread_cond_t wait_cond;   /* HLT on a PC waits here */
    bool is_parked;                    /* PC: AP waiting for SIPI */
    uint8_t sipi_vector; bool init_pending, sipi_pending;
    vm_exit pending;                   /* exit that waits for its completion */
    bool has_pending;
    struct vm_lapic *lapic;            /* PC */
    void *backend_data;
    struct vm_request *requests;       /* queued by other threads, under machine->lock or lock-free list */
    vm_range last_range;               /* flat-view hit cache, dropped with the view */
    uint64_t halt_exits;
    bool has_budget;                   /* this run was given max_instructions: backends that cannot count must find another way */
};
static inline vm_vcpu *vm_vcpu_of(x86_cpu *cpu) { return (vm_vcpu *)cpu; }

/* ---- backends ----
 * run(): execute guest code until something the run loop must see. x86.budget is the slice in instructions (interpreter and
 * JIT count it down exactly and return X86_STOP_SLICE at 0); returns at the next block boundary when x86.attention is
 * non-zero. Registers in x86 are complete when it returns. A backend never calls a device.
 * A backend may keep a vCPU's state elsewhere (KVM). Then gpr, rip and rflags of x86 are current whenever run() has returned,
 * and anything else in the core or the API that looks at x86 calls vm_vcpu_fetch(cpu, parts) before reading or changing a
 * part (in callbacks too), and vm_vcpu_changed(cpu, parts) after changing it. Both cost nothing on software backends. */
#define VM_STATE_REGS  1u              /* gpr, rip, rflags */
#define VM_STATE_SREGS 2u              /* segments, gdtr, idtr, cr0-4, efer, flat, cpl and other things derived, inhibit, NMI state */
#define VM_STATE_FPU   4u              /* fpu, xcr0 */
#define VM_STATE_MSRS  8u              /* all the rest: dr, MSRs, MTRRs */
#define VM_STATE_ALL  15u
typedef struct vm_backend_ops {
    const char *name;
    int  (*query)(const char *capability, uint64_t *value);
    int  (*machine_create)(vm_machine *m);
    void (*machine_destroy)(vm_machine *m);
    int  (*vcpu_create)(vm_vcpu *cpu);
    void (*vcpu_destroy)(vm_vcpu *cpu);
    x86_stop (*run)(vm_vcpu *cpu);
    void (*map_changed)(vm_machine *m);                                     /* vCPUs are paused */
    void (*code_changed)(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes);       /* on the vCPU's own thread, or paused */
    void (*flush_code)(vm_vcpu *cpu);                                       /* all of it: hooks changed, snapshot restored */
    void (*tlb_flushed)(vm_vcpu *cpu);                                      /* linear-address caches (jump caches) are stale */
    void (*get_state)(vm_vcpu *cpu, unsigned parts);                        /* KVM: make parts of x86 current; NULL for software */
    void (*set_state)(vm_vcpu *cpu, unsigned parts);                        /* KVM: parts of x86 changed; used by the next run() */
    void (*kick)(vm_vcpu *cpu);                                             /* async-signal-safe; NULL: attention is enough */
    bool takes_interrupts;             /* PC: run() itself takes vectors from the interrupt source (vm_pc_irq_source) at the
                                          right moment; the run loop then leaves them alone, except to wake a halted vCPU */
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
    pthread_mutex_t lock;              /* edits */
    pthread_mutex_t device_lock;       /* recursive: devices and interrupt controllers */
    vm_region *regions;
    vm_view *_Atomic view;             /* MMIO, RAM by gpa */
    vm_view *_Atomic ports;            /* PIO ranges, gpa = port */
    vm_region *ram;                    /* PC main memory (low part) */
    bool dirty_log;
    const struct vm_mmu_ops *mmu; void *mmu_state;
    struct vm_clock *clock;            /* clock.c: virtual or host time, timers */
    struct vm_platform_pc *pc;         /* NULL on BARE */
    struct vm_trace *trace;            /* LIBVM_TRACE, per machine */
    _Atomic int poisoned;              /* VM_E_INTERNAL happened */
    _Atomic int event; uint64_t event_code;   /* VM_EXIT_POWEROFF, _RESET, _GUEST_EXIT posted by a device */
    _Atomic int pause_count;           /* > 0: vCPUs park at safe points */
    pthread_mutex_t pause_lock; pthread_cond_t pause_cond;
    _Atomic uint64_t stat_irqs, stat_msis, stat_exits;
};
static inline void vm_vcpu_fetch(vm_vcpu *cpu, unsigned parts) {
    if (cpu->machine->backend->get_state)
        cpu->machine->backend->get_state(cpu, parts);
}
static inline void vm_vcpu_changed(vm_vcpu *cpu, unsigned parts) {
    if (cpu->machine->backend->set_state)
        cpu->machine->backend->set_state(cpu, parts);
}
/* Stop every vCPU at a safe point (the caller's own counts as stopped) and let them go on. Nests. */
void vm_pause(vm_machine *m);
void vm_resume(vm_machine *m);
void vm_vcpu_notify(vm_vcpu *cpu, uint32_t attention_bits);       /* set bits, wake from HLT, backend kick; any thread */
/* A device asks the machine to stop: VM_EXIT_POWEROFF, VM_EXIT_RESET, VM_EXIT_GUEST_EXIT with a code. Any thread. */
void vm_machine_event(vm_machine *m, vm_exit_reason reason, uint64_t code);
void vm_machine_reset(vm_machine *m);                              /* platform reset: devices and vCPUs; vCPUs paused or caller's */

/* ---- internal map calls for platform code: like the public ones, region marked internal ---- */
int vm_add_mmio(vm_machine *m, uint64_t gpa, uint64_t bytes, const vm_io_ops *ops, void *user, vm_region **out);
int vm_add_pio(vm_machine *m, uint16_t port, unsigned count, const vm_io_ops *ops, void *user, vm_region **out);
/* Move or hide an internal region (APIC base, PCI BARs): device context, takes effect at the next boundary. */
int vm_region_move(vm_region *r, uint64_t gpa, bool enabled);

/* ---- clock (clock.c) ----
 * Guest time in nanoseconds. PC machines follow CLOCK_MONOTONIC; BARE machines follow retired instructions (1 ns each).
 * Timers fire from the run loop of vCPU 0 or from the clock's thread, always under device_lock. */
typedef struct vm_timer vm_timer;
uint64_t vm_clock_now(vm_machine *m);
uint64_t vm_clock_tsc(vm_machine *m);                              /* guest TSC at VM_TSC_HZ */
#define VM_TSC_HZ UINT64_C(1000000000)
vm_timer *vm_timer_new(vm_machine *m, void (*fn)(void *user), void *user);
void vm_timer_set(vm_timer *t, uint64_t deadline_ns);              /* absolute guest time; UINT64_MAX: off */
void vm_timer_free(vm_timer *t);

/* ---- interrupts, seen from the run loop (PC: dev/lapic.c + pic; BARE: vm_vcpu_inject only) ---- */
typedef struct vm_irq_source {
    int  (*pending)(vm_vcpu *cpu);     /* vector that would be delivered now, or -1; no side effects */
    int  (*acknowledge)(vm_vcpu *cpu); /* take it: vector, or -1 if it went away */
} vm_irq_source;
extern const vm_irq_source vm_pc_irq_source;                       /* platform/pc.c */

/* ---- tracing (trace.c): LIBVM_TRACE=decode,ir,mcode,exit,mmio,irq to stderr or the sink set by the caller; categories in machine.h ---- */
unsigned vm_trace_mask(const vm_machine *m);
void vm_trace_line(vm_machine *m, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
