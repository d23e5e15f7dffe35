/* kvm.h - what the files of the KVM backend share.
 *
 *   kvm_machine.c  discovery, file descriptors, memory slots, identity page tables for VM_MODE_FLAT64
 *   kvm_dirty.c    which pages the guest wrote, by rings or by bitmaps
 *   kvm_events.c   doorbells and collected writes that the kernel serves
 *   kvm_cpuid.c    CPUID: what libvm shows, cut down to what this host's KVM can do
 *   kvm_state.c    x86_cpu <-> KVM's structures, by parts (VM_STATE_*)
 *   kvm_exit.c     exits made into the accesses and stops that the software backends make, exact RIP for them
 *   kvm_limits.c   guests that this host's KVM cannot run
 *   kvm_enter.c    the system call
 *   kvm_run.c      entering the guest: kicks, interrupts, until, budgets, instructions that KVM cannot emulate
 *
 * Where a vCPU's state is. `valid` names the parts of x86_cpu that are current, `dirty` those that are newer than KVM's
 * copy; dirty is a subset of valid. Entering the guest needs dirty = 0 and leaves valid = what KVM_RUN synchronised for
 * nothing (KVM_SYNC_REGS). Everything else is fetched when somebody asks (vm_vcpu_fetch), once per exit.
 *
 * Who may call: a kvm_vcpu belongs to the thread inside vm_vcpu_run (or to whoever holds the paused machine); only kick
 * may come from elsewhere. kvm_machine's slots change under machine->lock with all vCPUs paused.
 */
#ifndef LIBVM_KVM_H
#define LIBVM_KVM_H

#include <linux/kvm.h>
#include <signal.h>
#include <sys/types.h>
#include <time.h>
#include "core/core.h"
#include "x86/insn.h"

/* Parts handled one by one inside this backend: MSRS splits in two here, because debug registers cost their own ioctl.
 */
#define KVM_PART_SYNC (VM_STATE_REGS | VM_STATE_SREGS)
/* In `valid` only: VM_STATE_SREGS without what KVM keeps as events (inhibit, NMI state). Enough to read guest code. */
#define KVM_PART_MODE 16u

/* The signal that takes a thread out of KVM_RUN. Its default action is to be ignored, so one that arrives late harms
 * nobody; it is blocked while a vCPU runs and let through inside KVM_RUN only, so no handler is needed. */
#define KVM_KICK_SIGNAL SIGURG

typedef struct kvm_slot {
    uint64_t gpa, bytes; /* bytes 0: free slot number */
    uint8_t *host;
    uint32_t flags; /* KVM_MEM_* */
    bool is_kept;   /* during a diff */
} kvm_slot;

#define KVM_MAX_MSRS 64

typedef struct kvm_machine {
    int kvm_fd, vm_fd;
    size_t run_bytes; /* of a vCPU's shared page */
    size_t xsave_bytes;
    unsigned max_slots;
    bool can_sync, can_read_only, can_debug, has_xcrs, has_user_msr, has_gigabyte_pages;
    _Atomic bool is_probed;
    bool lacks_legacy_paging, lacks_v86;           /* kvm_limits.c: probe() */
    bool emulates_ring0;                           /* !kvm_is_hardware_ring0() */
    unsigned ring_entries;                         /* dirty ring of a vCPU; 0: bitmaps */
    kvm_slot *slots;                               /* index = slot number */
    unsigned slot_count, slot_capacity, free_hint; /* no free number below free_hint */
    unsigned *order, order_count;                  /* numbers of the slots made from the map, by gpa */
    unsigned unslotted;                            /* ranges that found no slot: served access by access */
    struct kvm_cpuid2 *supported;                  /* what this KVM can do */
    struct kvm_cpuid2 *cpuid;                      /* what the guest sees */
    uint64_t cr4_mask, efer_mask;                  /* bits that KVM takes from this guest */
    unsigned phys_bits;                            /* of the host */
    pthread_mutex_t lock; /* what vCPUs find out together: cpuid and masks, flat tables, probe() */
    uint8_t *flat_host;   /* identity page tables for FLAT64, NULL until needed */
    uint64_t flat_gpa;
    size_t flat_bytes, flat_used;
    unsigned flat_slot;
    size_t coalesced_page;    /* offset of the ring of collected writes in a vCPU's shared pages; 0: none */
    bool can_coalesce_ports, collects;
    _Atomic uint64_t entries; /* KVM_RUN calls that may have run guest code: software caches age by it */
} kvm_machine;

/* An exit that KVM finishes only at the next KVM_RUN. */
typedef enum kvm_open {
    KVM_OPEN_NONE,
    KVM_OPEN_READ /* state is before the instruction */,
    KVM_OPEN_WRITE /* the write is out; state may be after the instruction */
} kvm_open;

/* An instruction that kvm_resolve found: the bytes before `after` (and at it) were these, and it has this length. */
#define KVM_KNOWN_BYTES 32
typedef struct kvm_known {
    uint64_t after;
    uint8_t bytes[KVM_KNOWN_BYTES]; /* from after - 16 on */
    uint8_t mode, reason, length;
    uint16_t port, width;
} kvm_known;

typedef struct kvm_vcpu {
    vm_vcpu *cpu;
    kvm_machine *km;
    int fd;
    struct kvm_run *run;
    unsigned valid, dirty;
    kvm_open open;
    bool has_synced_sregs;   /* the shared page holds the system registers of this exit */
    bool has_synced_events;  /* ... and the events */
    struct kvm_sregs seen;   /* what x86's system registers were last made from, */
    uint64_t seen_flags;     /* and what of RFLAGS belongs to the mode, */
    bool has_seen;           /* unless somebody has changed them since */
    bool is_tlb_stale;       /* the guest ran since x86's inline TLB was last emptied */
    bool is_reported;        /* the open exit went to the caller as X86_STOP_IO */
    bool rip_unresolved;     /* x86.rip is KVM's: maybe after the instruction (see kvm_resolve) */
    uint64_t shown[18];      /* gpr, rip, rflags as shown at an open exit: to see what a callback changed */
    bool in_run;             /* inside kvm_run: changes come from callbacks */
    uint64_t shown_next;     /* next_rip beside `shown` */
    uint8_t code[16];        /* what stands at the instruction of this exit, */
    bool has_code;           /* if kvm_resolve() has read it */
    kvm_known known[16];     /* instructions found by kvm_resolve */
    uint64_t boundary;       /* RIP at the last entry: surely the start of an instruction */
    uint64_t read_state[18]; /* `shown` at the last read exit; the write that follows may be of the same instruction */
    bool has_read_state;
    bool is_shown;     /* x86 shows registers of an open exit: `shown`, not what KVM goes on with */
    bool regs_changed; /* somebody changed x86's registers meanwhile */
    bool is_replaced;  /* ... all of the state: nothing of KVM's is wanted any more */
    bool has_events;   /* the shared page's events are part of the state (an event under way) */
    bool is_nmi_given;
    int8_t rip_at[2];      /* exits of OUT, of OUTS: 1: RIP stands at it, -1: after it, 0: not known yet */
    unsigned sregs_wanted, events_wanted; /* how many more exits bring system registers, events along */
    bool makes_kernel;     /* the guest wrote EFER or a target of SYSCALL: kvm_limits.c */
    bool is_flat;          /* VM_MODE_FLAT64 is in force and CR3 points at our tables */
    bool has_cpuid, is_loaded; /* KVM has been given the one; a whole state */
    bool has_soft;                /* interpreter data exists */
    bool is_soft_io;              /* the interpreter's last instruction waits for the caller's answer */
    uint64_t soft_entries;        /* km->entries when the interpreter's caches were last emptied */
    unsigned soft_batch;          /* instructions to interpret at the next emulation failure */
    uint64_t last_failure;        /* `exits` at the last emulation failure */
    struct kvm_guest_debug debug; /* as KVM has it */
    uint8_t cr8;                  /* as KVM has it */
    bool is_shut_down;
    sigset_t host_mask; /* thread's mask that KVM's signal mask was made from */
    bool has_mask;
    sigset_t callers_mask;            /* the thread's, to be restored */
    _Atomic bool has_blocked;         /* this run can be left by the kick signal; */
    pthread_t thread;                 /* it is sent to this thread */
    _Atomic int is_inside, is_kicked; /* it is in KVM_RUN; a signal was sent to it */
    bool has_foreign;                 /* a kick signal came that was not ours: given back */
    timer_t timer;                    /* for deadlines, bound to the thread timer_tid (0: none) */
    int timer_tid;
    bool is_timer_armed, is_late;
    struct kvm_dirty_gfn *ring;
    uint32_t ring_next; /* first entry not yet taken; under km->lock */
    struct kvm_xsave *xsave;
    uint32_t msrs[KVM_MAX_MSRS]; /* those of kvm_state.c's table that this KVM knows */
    unsigned msr_count;
    uint64_t tsc_offset; /* guest TSC minus the host's */
    uint64_t exits;
    char reason[160]; /* of X86_STOP_HOST */
} kvm_vcpu;

static inline kvm_machine *kvm_machine_of(vm_machine *m) { return m->backend_data; }
static inline kvm_vcpu *kvm_vcpu_of(vm_vcpu *cpu) { return cpu->backend_data; }

/* kvm_machine.c */
int kvm_query(const char *capability, uint64_t *value);
int kvm_machine_create(vm_machine *m);
void kvm_machine_destroy(vm_machine *m);
int kvm_vcpu_create(vm_vcpu *cpu);
void kvm_vcpu_destroy(vm_vcpu *cpu);
void kvm_map_changed(vm_machine *m);
void kvm_set_tsc_offset(kvm_vcpu *kv, uint64_t offset);
void kvm_flat_moved(vm_machine *m);
bool kvm_flat_extend(vm_machine *m, uint64_t gpa);            /* true: gpa was not reachable in flat mode and now is */
int kvm_flat_ready(vm_machine *m, uint64_t gpa);              /* tables exist and reach gpa; VM_OK or a status */
int kvm_ioctl(int fd, unsigned long request, void *argument); /* retried on EINTR */

bool kvm_is_hardware_ring0(int kvm_fd); /* guest ring 0 runs on the CPU, not in the host's emulator */

/* kvm_dirty.c */
void kvm_dirty_choose(kvm_machine *km); /* before the first vCPU */
int kvm_dirty_ring_map(kvm_vcpu *kv);
void kvm_dirty_ring_unmap(kvm_vcpu *kv);
void kvm_dirty_sync(vm_machine *m); /* what KVM knows goes to the regions' page flags */

/* kvm_events.c */
void kvm_doorbell(vm_machine *m, const vm_doorbell *d, int fd, bool on);
void kvm_coalesce(vm_machine *m, bool is_port, uint64_t at, uint64_t bytes, bool on);
void kvm_collected(kvm_vcpu *kv); /* make the calls for collected writes; after each KVM_RUN */

/* kvm_cpuid.c */
int kvm_cpuid_read(kvm_machine *km); /* fills km->supported */
int kvm_cpuid_set(kvm_vcpu *kv);
uint32_t kvm_cpuid_allowed(void *km, uint32_t leaf, uint32_t sub, unsigned reg);
uint32_t kvm_supported(const kvm_machine *km, uint32_t leaf, uint32_t sub, unsigned reg);

/* kvm_state.c */
void kvm_msr_list(kvm_vcpu *kv);
bool kvm_keeps_msr(const kvm_vcpu *kv, uint32_t msr);
void kvm_get_state(vm_vcpu *cpu, unsigned parts);
void kvm_get_mode(kvm_vcpu *kv); /* KVM_PART_MODE */
void kvm_set_state(vm_vcpu *cpu, unsigned parts);
int kvm_load(kvm_vcpu *kv);       /* give KVM what is dirty; VM_OK or a status */
void kvm_regs_from(kvm_vcpu *kv); /* after KVM_RUN: synchronised registers to x86 */

/* kvm_exit.c */
x86_stop kvm_handle_io(kvm_vcpu *kv);
x86_stop kvm_handle_mmio(kvm_vcpu *kv);
x86_stop kvm_complete(kvm_vcpu *kv, bool is_interpreted); /* give the results of a reported exit to KVM */
void kvm_resolve(kvm_vcpu *kv);      /* make x86.rip the instruction's */
uint64_t kvm_linear_of(kvm_vcpu *kv, uint64_t gpa,
                       bool is_write); /* of the access at gpa by the instruction at x86.rip; 0: unknown */

/* kvm_limits.c */
bool kvm_is_limited(kvm_vcpu *kv); /* the host's emulator stands for a CPU that it does not have */
bool kvm_is_beyond(kvm_vcpu *kv);  /* the state about to be loaded is one that KVM would not run */
bool kvm_is_kernel_msr(uint32_t msr);

/* kvm_enter.c */
int kvm_enter(int fd); /* KVM_RUN: 0 or -errno */

/* kvm_run.c */
x86_stop kvm_run(vm_vcpu *cpu);
void kvm_leave(vm_vcpu *cpu);
void kvm_kick(vm_vcpu *cpu);
void kvm_flush_tlb(kvm_vcpu *kv); /* x86's inline TLB and what hangs on it */
x86_stop kvm_interpret(kvm_vcpu *kv,
                       int64_t instructions); /* on the vCPU's state, by lib/interp; settles an open exit first */
void kvm_show(kvm_vcpu *kv);                  /* remember x86's registers as they are shown at an open exit */
int kvm_settle(kvm_vcpu *kv);                 /* finish an open exit inside KVM, whatever it reads */
x86_stop kvm_host_failed(kvm_vcpu *kv, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
