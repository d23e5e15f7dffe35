/* kvm_run.c - entering the guest, and everything that decides whether KVM may.
 *
 * Kicks. A thread runs a vCPU with KVM_KICK_SIGNAL blocked and KVM lets it through inside KVM_RUN only
 * (KVM_SET_SIGNAL_MASK), so the signal ends KVM_RUN with EINTR whenever it comes, nobody's handler is involved, and
 * there is no moment between the last look at `attention` and the entry in which a kick could be lost. The thread's
 * mask is restored when the run returns; kick signals of somebody else's making are handed on then. While the process
 * has one thread, only its signal handlers can kick: their signal ends KVM_RUN itself, or comes before and the kick
 * sets immediate_exit, so nothing is blocked (unless a deadline's timer needs it), which spares two system calls a run.
 *
 * Open exits. KVM completes a port or memory access when it is entered again. An attention bit or a register that a
 * callback changed needs an instruction boundary first: then KVM is entered with immediate_exit, which completes and
 * comes back. Changes are merged: what a callback left as it was shown comes from KVM, what it changed wins.
 *
 * The interpreter in KVM's place. What KVM cannot do is done by lib/interp on the vCPU's state, with the same results:
 * an exact instruction budget, exceptions reported instead of delivered, breakpoints, watchpoints and single steps (at
 * any number and exact; KVM_SET_GUEST_DEBUG has four addresses, and some hosts take it and do nothing), and
 * instructions that KVM's own emulator does not know (KVM_EXIT_INTERNAL_ERROR, suberror 1). The last happens all the
 * time on hosts that emulate guest ring 0; where failures follow each other closely the interpreter keeps going for a
 * growing number of instructions. `until` is a hardware breakpoint, unless the guest uses the debug registers itself.
 * What this host's KVM cannot run at all (kvm_limits.c) is interpreted until the guest is something else.
 */
#include "kvm/kvm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>
#include "interp/interp.h"
#include "platform/pc.h"
#include "x86/system.h"

#define MAX_BATCH    4096u /* instructions interpreted in a row after emulation failures */
#define CLOSE_EXITS  64u   /* failures with fewer exits between them are close */
#define BEYOND_SLICE 32768

x86_stop kvm_host_failed(kvm_vcpu *kv, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(kv->reason, sizeof kv->reason, format, args);
    va_end(args);
    vm_fail(VM_E_HOST, "vCPU %u: %s", kv->cpu->index, kv->reason);
    return X86_STOP_HOST;
}

/* ---- kicks ---- */

/* The process has no thread but this one. */
static bool is_alone(void)
{
#if __has_include(<sys/single_threaded.h>)
    return __libc_single_threaded;
#else
    return false;
#endif
}

void kvm_kick(vm_vcpu *cpu)
{
    kvm_vcpu *kv = kvm_vcpu_of(cpu);
    int saved = errno;
    if (kv && kv->is_inside) { /* then its thread lives */
        kv->run->immediate_exit = 1;
        if (kv->has_blocked) {
            kv->is_kicked = 1;
            pthread_kill(kv->thread, KVM_KICK_SIGNAL);
        }
    }
    errno = saved;
}

static void block_kicks(kvm_vcpu *kv)
{
    sigset_t kick, *old = &kv->callers_mask;
    if (kv->has_blocked || (is_alone() && !kv->has_mask && kv->cpu->deadline == UINT64_MAX)) return;
    kv->thread = pthread_self();
    kv->has_blocked = true;
    if (kv->cpu->has_signal_blocked && kv->has_mask) return;
    sigemptyset(&kick);
    sigaddset(&kick, KVM_KICK_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &kick, old);
    if (kv->has_mask && !memcmp(old, &kv->host_mask, 8)) return;
    struct {
        struct kvm_signal_mask head;
        uint8_t set[8];
    } mask = {.head.len = 8};
    sigset_t inside = *old;
    sigdelset(&inside, KVM_KICK_SIGNAL);
    memcpy(mask.head.sigset, &inside, 8);
    kv->has_mask = kvm_ioctl(kv->fd, KVM_SET_SIGNAL_MASK, &mask) == 0;
    kv->host_mask = *old;
}

/* Take pending kick signals; one that this library did not send is kept for its owner. */
static void drain_kicks(kvm_vcpu *kv)
{
    sigset_t kick;
    siginfo_t info;
    const struct timespec now = {0};
    sigemptyset(&kick);
    sigaddset(&kick, KVM_KICK_SIGNAL);
    kv->is_kicked = 0;
    while (sigtimedwait(&kick, &info, &now) > 0)
        if (!(info.si_code == SI_TKILL && info.si_pid == getpid()) && info.si_code != SI_TIMER) kv->has_foreign = true;
}

static void unblock_kicks(kvm_vcpu *kv)
{
    const sigset_t *old = &kv->callers_mask;
    if (!kv->has_blocked) return;
    kv->has_blocked = false;
    if (kv->is_timer_armed) {
        const struct itimerspec off = {.it_value = {0}};
        timer_settime(kv->timer, 0, &off, NULL);
        kv->is_timer_armed = false;
        kv->is_kicked = 1;
    }
    if (kv->is_kicked) drain_kicks(kv);
    if (kv->has_foreign) {
        kv->has_foreign = false;
        syscall(SYS_tgkill, getpid(), (int)syscall(SYS_gettid), KVM_KICK_SIGNAL);
    }
    if (!kv->cpu->has_signal_blocked && !sigismember(old, KVM_KICK_SIGNAL)) pthread_sigmask(SIG_SETMASK, old, NULL);
}

/* ---- deadlines ---- */

/* The run's deadline is a timer that sends the kick signal to this thread. It costs system calls only in runs that have
 * one. */
static int arm_timer(kvm_vcpu *kv)
{
    uint64_t at = kv->cpu->deadline;
    if (at == UINT64_MAX) return VM_OK;
    int tid = (int)syscall(SYS_gettid);
    if (kv->timer_tid != tid) {
        struct sigevent event;
        memset(&event, 0, sizeof event);
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = KVM_KICK_SIGNAL;
        event._sigev_un._tid = tid;
        if (kv->timer_tid) timer_delete(kv->timer);
        kv->timer_tid = 0;
        if (timer_create(CLOCK_MONOTONIC, &event, &kv->timer) < 0)
            return vm_fail_errno(VM_E_HOST, "timer_create for a vCPU's deadline");
        kv->timer_tid = tid;
    }
    struct itimerspec when;
    memset(&when, 0, sizeof when);
    when.it_value.tv_sec = (time_t)(at / 1000000000u);
    when.it_value.tv_nsec = (long)(at % 1000000000u);
    if (timer_settime(kv->timer, TIMER_ABSTIME, &when, NULL) < 0)
        return vm_fail_errno(VM_E_HOST, "timer_settime for a vCPU's deadline");
    kv->is_timer_armed = true;
    return VM_OK;
}

static bool is_late(const kvm_vcpu *kv) { return kv->is_timer_armed && vm_host_now() >= kv->cpu->deadline; }

/* ---- one entry ---- */

/* KVM_RUN: 0 or -errno. x86 is not touched; the shared page then has the registers. only_complete: no guest instruction
 * beyond an open one. */
static int enter(kvm_vcpu *kv, bool only_complete)
{
    struct kvm_run *run = kv->run;
    bool wants_sregs = kv->sregs_wanted > 0, wants_events = kv->events_wanted > 0;
    run->immediate_exit = only_complete;
    if (kv->km->can_sync)
        run->kvm_valid_regs =
            KVM_SYNC_X86_REGS | (wants_sregs ? KVM_SYNC_X86_SREGS : 0) | (wants_events ? KVM_SYNC_X86_EVENTS : 0);
    if (kv->is_nmi_given) { /* KVM has it now */
        kv->is_nmi_given = false;
        kv->cpu->x86.nmi_pending = false;
        atomic_fetch_or(&kv->cpu->x86.attention, X86_ATT_EVENT); /* another may be latched */
    }
    kv->boundary = run->s.regs.regs.rip;
    kv->is_inside = 1;
    if (kv->cpu->x86.attention) run->immediate_exit = 1;
    int rc = kvm_enter(kv->fd);
    atomic_store_explicit(&kv->is_inside, 0, memory_order_release);
    kv->exits++;
    kv->cpu->x86.stat[X86_STAT_KVM_EXITS]++;
    if (kv->cpu->machine->vcpu_count == 1)
        atomic_store_explicit(&kv->km->entries, kv->km->entries + 1, memory_order_relaxed);
    else
        atomic_fetch_add_explicit(&kv->km->entries, 1, memory_order_relaxed);
    kv->is_tlb_stale = true;
    kv->sregs_wanted -= wants_sregs;
    kv->events_wanted -= wants_events;
    kv->has_synced_sregs = kv->km->can_sync && wants_sregs;
    kv->has_synced_events = kv->km->can_sync && wants_events;
    if (!kv->km->can_sync && kvm_ioctl(kv->fd, KVM_GET_REGS, &run->s.regs.regs) < 0) return -errno;
    return rc;
}

static kvm_open open_of(const struct kvm_run *run)
{
    switch (run->exit_reason) {
    case KVM_EXIT_IO: return run->io.direction == KVM_EXIT_IO_OUT ? KVM_OPEN_WRITE : KVM_OPEN_READ;
    case KVM_EXIT_MMIO: return run->mmio.is_write ? KVM_OPEN_WRITE : KVM_OPEN_READ;
    case KVM_EXIT_X86_RDMSR: return KVM_OPEN_READ;
    case KVM_EXIT_X86_WRMSR: return KVM_OPEN_WRITE;
    default: return KVM_OPEN_NONE;
    }
}

#define MAX_SETTLE 5000u
int kvm_settle(kvm_vcpu *kv)
{
    for (unsigned i = 0; kv->open != KVM_OPEN_NONE; i++) {
        if (i == MAX_SETTLE) return vm_fail(VM_E_HOST, "KVM does not finish an instruction");
        int rc = enter(kv, true);
        if (rc < 0) {
            errno = -rc;
            if (rc != -EINTR && rc != -EAGAIN) return vm_fail_errno(VM_E_HOST, "KVM_RUN");
            kv->open = KVM_OPEN_NONE;
        } else {
            kv->open = open_of(kv->run);
        }
    }
    return VM_OK;
}

/* ---- registers around an open exit ---- */

void kvm_show(kvm_vcpu *kv)
{
    const x86_cpu *x = &kv->cpu->x86;
    memcpy(kv->shown, x->gpr, sizeof x->gpr);
    kv->shown[16] = x->rip;
    kv->shown[17] = x->rflags;
    kv->shown_next = x->next_rip;
    kv->is_shown = true;
}

/* KVM's registers to x86; where somebody changed what was shown, his value stays. */
static void absorb(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    uint64_t gpr[16], rip = x->rip, next_rip = x->next_rip, rflags = x->rflags;
    bool is_merge = kv->regs_changed && kv->is_shown && !kv->is_replaced;
    kv->rip_unresolved = false;
    if (kv->is_replaced) {
        kv->valid |= VM_STATE_REGS;
        kv->is_shown = false;
        return;
    }
    if (is_merge) memcpy(gpr, x->gpr, sizeof gpr);
    kvm_regs_from(kv);
    kv->valid = VM_STATE_REGS | kv->dirty;
    if (is_merge) {
        for (unsigned i = 0; i < 16; i++)
            if (gpr[i] != kv->shown[i]) x->gpr[i] = gpr[i];
        if (rip != kv->shown[16] || next_rip != kv->shown_next)
            x->rip = x->next_rip = rip != kv->shown[16] ? rip : next_rip;
        if (rflags != kv->shown[17]) x->rflags = rflags;
        kv->dirty |= VM_STATE_REGS;
    } else {
        kv->dirty &= ~VM_STATE_REGS;
    }
    kv->regs_changed = kv->is_shown = false;
}

/* ---- the interpreter in KVM's place ---- */

static x86_stop deliver_queued(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_vcpu_events *e = &kv->run->s.regs.events;
    x86_stop stop = X86_STOP_NONE;
    if (!kv->has_events) return stop;
    bool is_software = e->exception.nr == X86_BP || e->exception.nr == X86_OF; /* RIP is still at the instruction, */
    if (e->exception.pending || (e->exception.injected && !is_software))
        stop = x86_inject(x, e->exception.nr, e->exception.has_error_code, e->exception.error_code);
    else if (e->interrupt.injected && !e->interrupt.soft) /* which does it again */
        stop = x86_deliver_interrupt(x, e->interrupt.nr, false);
    kv->has_events = false;
    return stop;
}

/* PC: the interpreter's turn to take interrupts. */
static x86_stop interpreter_interrupts(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    if (!kv->cpu->machine->is_pc || kv->cpu->holds_interrupts) return X86_STOP_NONE;
    if (x->nmi_pending && !x->nmi_blocked && !x->inhibit) {
        atomic_fetch_or(&x->attention, X86_ATT_EVENT); /* another may be latched */
        return x86_deliver_interrupt(x, X86_NMI, true);
    }
    int vector = vm_pc_irq_source.pending(kv->cpu);
    bool can_take = x86_can_interrupt(x);
    x->irq_waiting = x->nmi_pending || (vector >= 0 && !can_take);
    if (vector < 0 || !can_take) return X86_STOP_NONE;
    vector = vm_pc_irq_source.acknowledge(kv->cpu);
    return vector < 0 ? X86_STOP_NONE : x86_deliver_interrupt(x, (uint8_t)vector, false);
}

static int prepare_interpreter(kvm_vcpu *kv)
{
    vm_vcpu *cpu = kv->cpu;
    bool is_read = kv->open == KVM_OPEN_READ;
    kvm_get_state(cpu, VM_STATE_ALL);
    if (kv->open != KVM_OPEN_NONE) {
        int rc = kvm_settle(kv);
        if (rc) return rc;
        if (!is_read) { /* the instruction is done: go on behind it */
            absorb(kv);
            kvm_get_state(cpu, VM_STATE_ALL);
        }
    } else if (kv->is_shown) {
        absorb(kv);
        kvm_get_state(cpu, VM_STATE_ALL);
    }
    kv->is_shown = kv->regs_changed = kv->rip_unresolved = kv->is_replaced = false;
    if (!kv->has_soft) {
        int rc = interp_create(cpu);
        if (rc) return rc;
        kv->has_soft = true;
    }
    if (kv->soft_entries != kv->km->entries) {
        kv->soft_entries = kv->km->entries;
        interp_flush_code(cpu);
    }
    if (kv->is_tlb_stale) kvm_flush_tlb(kv);
    return VM_OK;
}

/* X86_STOP_NONE: done, KVM goes on. */
x86_stop kvm_interpret(kvm_vcpu *kv, int64_t instructions)
{
    x86_cpu *x = &kv->cpu->x86;
    if (prepare_interpreter(kv) != VM_OK) return X86_STOP_HOST;
    x86_stop stop = deliver_queued(kv);
    if (stop == X86_STOP_NONE) stop = interpreter_interrupts(kv);
    int64_t budget = x->budget;
    bool is_slice = instructions <= 0;
    if (!is_slice) x->budget = instructions;
    int64_t before = x->budget;
    bool was_long = x->efer & X86_EFER_LME;
    if (stop == X86_STOP_NONE) stop = vm_backend_interp.run(kv->cpu);
    if (!was_long && (x->efer & X86_EFER_LME)) kv->makes_kernel = true; /* as if KVM had shown the write */
    x->stat[X86_STAT_KVM_EMULATED] += (uint64_t)(before - x->budget);
    if (!is_slice) {
        x->budget = budget;
        if (stop == X86_STOP_SLICE) stop = X86_STOP_NONE;
    }
    kv->valid = kv->dirty = VM_STATE_ALL;
    kv->is_nmi_given = false;
    kv->is_soft_io = stop == X86_STOP_IO;
    return stop;
}

static x86_stop emulation_failed(kvm_vcpu *kv)
{
    if (kv->exits - kv->last_failure > CLOSE_EXITS)
        kv->soft_batch = 1;
    else if (kv->soft_batch < MAX_BATCH)
        kv->soft_batch *= 2;
    kv->last_failure = kv->exits;
    kvm_get_state(kv->cpu, VM_STATE_SREGS);
    memset(&kv->run->s.regs.events.exception, 0, sizeof kv->run->s.regs.events.exception); /* KVM may have queued #UD */
    return kvm_interpret(kv, kv->soft_batch);
}

static bool needs_interpreter(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    if (kv->cpu->has_budget || x->budget == 1 || x->exception_exits || x->step_asked || x->hook_mask)
        return true; /* a slice of one: the run loop wants one instruction done before it looks */
    if (!x->has_until) return false;
    kvm_get_state(kv->cpu, VM_STATE_MSRS);
    return !kv->km->can_debug || (x->dr[7] & 0xff) || kv->open != KVM_OPEN_NONE || kvm_is_limited(kv);
}

/* ---- until ---- */

static int set_debug(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_guest_debug d;
    if (!x->has_until && !kv->debug.control) return VM_OK;
    memset(&d, 0, sizeof d);
    if (x->has_until) {
        kvm_get_state(kv->cpu, VM_STATE_SREGS);
        uint64_t base = x->seg[X86_CS].base;
        d.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        d.arch.debugreg[0] = x86_is_long(x) ? x->until : (uint32_t)(base + x->until);
        d.arch.debugreg[7] = 0x402; /* DR0, global, execution, one byte */
    }
    if (!memcmp(&d, &kv->debug, sizeof d)) return VM_OK;
    if (kvm_ioctl(kv->fd, KVM_SET_GUEST_DEBUG, &d) < 0) return vm_fail_errno(VM_E_HOST, "KVM_SET_GUEST_DEBUG");
    kv->debug = d;
    return VM_OK;
}

/* ---- interrupts of a PC ---- */

/* Give KVM the next vector if it can take one now, or ask it to say when. KVM's answer (ready_for_interrupt_injection)
 * is about the state at the last exit, so after a change of ours it is asked again. */
static x86_stop feed_interrupts(kvm_vcpu *kv, bool is_changed)
{
    struct kvm_run *run = kv->run;
    run->request_interrupt_window = 0;
    if (is_changed || kv->cpu->machine->is_pc) { /* KVM takes it from here at every entry, and leaves it here */
        kv->cr8 = kv->cpu->x86.env->cr8_read(&kv->cpu->x86);
        run->cr8 = kv->cr8;
    }
    if (!kv->cpu->machine->is_pc) return X86_STOP_NONE;
    if (kv->cpu->x86.nmi_pending && !kv->is_nmi_given) {
        kv->is_nmi_given = true;
        kvm_ioctl(kv->fd, KVM_NMI, NULL);
    }
    int vector = vm_pc_irq_source.pending(kv->cpu);
    if (vector < 0) return X86_STOP_NONE;
    if (is_changed || !run->ready_for_interrupt_injection || !run->if_flag) {
        run->request_interrupt_window = 1;
        return X86_STOP_NONE;
    }
    vector = vm_pc_irq_source.acknowledge(kv->cpu);
    if (vector < 0) return X86_STOP_NONE;
    struct kvm_interrupt interrupt = {.irq = (uint32_t)vector};
    kv->cpu->x86.stat[X86_STAT_INTERRUPTS]++;
    run->ready_for_interrupt_injection = 0;
    if (kvm_ioctl(kv->fd, KVM_INTERRUPT, &interrupt) < 0)
        return kvm_host_failed(kv, "KVM_INTERRUPT failed: %s", strerror(errno));
    run->request_interrupt_window = vm_pc_irq_source.pending(kv->cpu) >= 0;
    return X86_STOP_NONE;
}

static void sync_cr8(kvm_vcpu *kv)
{
    if (kv->run->cr8 != kv->cr8) {
        kv->cr8 = (uint8_t)kv->run->cr8;
        kv->cpu->x86.env->cr8_write(&kv->cpu->x86, kv->cr8);
    }
}

/* ---- exits ---- */

static bool is_apic_msr(uint32_t msr) { return msr == 0x1b || msr == 0x6e0 || (msr >= 0x800 && msr < 0x900); }

static x86_stop handle_msr(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_run *run = kv->run;
    uint32_t msr = run->msr.index;
    bool is_read = run->exit_reason == KVM_EXIT_X86_RDMSR, ok;
    uint64_t value = run->msr.data;
    if (run->msr.reason == KVM_MSR_EXIT_REASON_INVAL && kvm_keeps_msr(kv, msr)) {
        ok = false; /* the host's CPU or KVM cannot hold that value */
    } else if (is_apic_msr(msr)) {
        ok = is_read ? x->env->msr_read(x, msr, &value) : x->env->msr_write(x, msr, value);
    } else {
        kvm_get_state(kv->cpu, VM_STATE_ALL);
        ok = is_read ? x86_msr_read(x, msr, &value) : x86_msr_write(x, msr, value);
        if (!is_read && ok) kvm_set_state(kv->cpu, VM_STATE_MSRS | (msr == 0xc0000080 ? VM_STATE_SREGS : 0)); /* EFER */
        if (!is_read && ok && kvm_is_kernel_msr(msr)) kv->makes_kernel = true;
    }
    kv->open = is_read ? KVM_OPEN_READ : KVM_OPEN_WRITE;
    run->msr.data = value;
    run->msr.error = !ok;
    return X86_STOP_NONE;
}

/* In flat mode an address beyond the identity tables is a page fault that the guest cannot handle. */
static x86_stop handle_shutdown(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    kvm_get_state(kv->cpu, VM_STATE_REGS | VM_STATE_SREGS);
    if (x->flat && kvm_flat_extend(kv->cpu->machine, x->cr2)) {
        kv->has_events = false;
        x->rflags &= ~(uint64_t)X86_FL_RF;
        kvm_set_state(kv->cpu, VM_STATE_REGS | VM_STATE_SREGS);
        kv->regs_changed = false;
        return X86_STOP_NONE;
    }
    kv->has_events = false;
    if (kvm_is_limited(kv)) { /* its emulator may have failed where a CPU would not: try again */
        x->rflags &= ~(uint64_t)X86_FL_RF;
        return kvm_interpret(kv, 1);
    }
    kvm_set_state(kv->cpu, VM_STATE_REGS | VM_STATE_SREGS); /* KVM may have reset the vCPU: what was shown stays */
    kv->regs_changed = false;
    return X86_STOP_SHUTDOWN;
}

static x86_stop handle_debug(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    if (x->has_until && x->rip == x->until) return X86_STOP_UNTIL;
    return kvm_interpret(kv, 1);
}

/* What KVM's emulator does not know, and an interrupt or exception whose delivery meets a device or no memory, is done by
 * the interpreter: the event is still queued in KVM. */
static x86_stop handle_internal_error(kvm_vcpu *kv)
{
    const struct kvm_run *run = kv->run;
    if (run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION) return emulation_failed(kv);
    if (run->internal.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV) return kvm_interpret(kv, 1);
    return kvm_host_failed(kv, "KVM internal error %u (0x%llx 0x%llx)", run->internal.suberror,
                           run->internal.ndata > 0 ? (unsigned long long)run->internal.data[0] : 0,
                           run->internal.ndata > 1 ? (unsigned long long)run->internal.data[1] : 0);
}

static x86_stop handle_exit(kvm_vcpu *kv)
{
    struct kvm_run *run = kv->run;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
    case KVM_EXIT_MMIO:
        if (open_of(run) == KVM_OPEN_READ) {
            kv->cpu->x86.rflags &= ~(uint64_t)X86_FL_RF;
            kvm_show(kv);
            memcpy(kv->read_state, kv->shown, sizeof kv->shown);
            kv->has_read_state = true;
        } else {
            kvm_show(kv);
        }
        return run->exit_reason == KVM_EXIT_IO ? kvm_handle_io(kv) : kvm_handle_mmio(kv);
    case KVM_EXIT_HLT: return X86_STOP_HALT;
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_SET_TPR:
    case KVM_EXIT_INTR: return X86_STOP_NONE;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR: return handle_msr(kv);
    case KVM_EXIT_SHUTDOWN: return handle_shutdown(kv);
    case KVM_EXIT_DIRTY_RING_FULL: kvm_dirty_sync(kv->cpu->machine); return X86_STOP_NONE;
    case KVM_EXIT_DEBUG: return handle_debug(kv);
    case KVM_EXIT_INTERNAL_ERROR: return handle_internal_error(kv);
    case KVM_EXIT_FAIL_ENTRY:
        return kvm_host_failed(kv, "the hardware refused the guest's state (KVM_EXIT_FAIL_ENTRY, reason 0x%llx)",
                               (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
    case KVM_EXIT_UNKNOWN:
        return kvm_host_failed(kv, "KVM does not know the hardware's exit 0x%llx",
                               (unsigned long long)run->hw.hardware_exit_reason);
    case KVM_EXIT_SYSTEM_EVENT: return kvm_host_failed(kv, "KVM system event %u", run->system_event.type);
    default: return kvm_host_failed(kv, "unknown KVM exit %u", run->exit_reason);
    }
}

static x86_stop entry_failed(kvm_vcpu *kv, int error)
{
    switch (error) {
    case EFAULT: return kvm_host_failed(kv, "guest memory has no host memory behind it any more (KVM_RUN: EFAULT)");
    case EINVAL: return kvm_host_failed(kv, "KVM does not accept this register state (KVM_RUN: EINVAL)");
    case EBADF: return kvm_host_failed(kv, "the vCPU's descriptor was closed (KVM_RUN: EBADF)");
    case EIO: return kvm_host_failed(kv, "the machine belongs to another process (KVM_RUN: EIO)");
    default: return kvm_host_failed(kv, "KVM_RUN: %s", strerror(error));
    }
}

/* ---- the run ---- */

/* What must be so before KVM goes on with the guest. */
static x86_stop before_entry(kvm_vcpu *kv)
{
    bool is_changed = kv->dirty != 0;
    kv->is_replaced = kv->regs_changed = false;
    if (kvm_load(kv) != VM_OK) return X86_STOP_HOST;
    return feed_interrupts(kv, is_changed);
}

static x86_stop run_guest(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    for (;;) {
        x86_stop stop = X86_STOP_NONE;
        bool is_wanted = x->attention != 0 || kv->is_late;
        if (is_wanted && kv->open == KVM_OPEN_NONE) {
            if (kv->is_shown) absorb(kv);
            return X86_STOP_ATTENTION;
        }
        if (kv->open == KVM_OPEN_NONE) {
            if (kv->is_shown) absorb(kv);
            if (kv->dirty && kvm_is_beyond(kv))
                return kvm_interpret(kv, BEYOND_SLICE); /* the run loop looks at the clock */
            stop = before_entry(kv);
        }
        if (stop != X86_STOP_NONE) return stop;
        if (kv->open != KVM_OPEN_READ) kv->has_read_state = false;
        block_kicks(kv); /* a callback may have made a thread */
        int rc = enter(kv, is_wanted || (kv->open != KVM_OPEN_NONE && (kv->regs_changed || kv->dirty)));
        kv->open = KVM_OPEN_NONE;
        if (rc < 0 && rc != -EINTR && rc != -EAGAIN) return entry_failed(kv, -rc);
        absorb(kv);
        sync_cr8(kv);
        kvm_collected(kv);
        if (rc < 0) {
            /* Nobody asked for it: a signal, perhaps of a kick whose flag was seen, and taken back, before it was sent. */
            if (kv->is_kicked || kv->is_timer_armed || !kv->run->immediate_exit) drain_kicks(kv);
            kv->is_late = is_late(kv);
            continue;
        }
        stop = handle_exit(kv);
        if (stop != X86_STOP_NONE) return stop;
    }
}

static x86_stop run_blocked(kvm_vcpu *kv)
{
    x86_stop stop = X86_STOP_NONE;
    bool is_soft = kv->is_soft_io || (kv->is_replaced && kv->cpu->x86.io_count);
    if (kv->is_replaced && kvm_settle(kv) != VM_OK) return X86_STOP_HOST;
    if (kv->is_reported)
        stop = kvm_complete(kv, needs_interpreter(kv));
    else if (is_soft) /* the interpreter met that access: it takes the answer */
        stop = kvm_interpret(kv, 1);
    if (stop == X86_STOP_NONE && needs_interpreter(kv)) return kvm_interpret(kv, 0);
    kv->is_late = false;
    if (stop == X86_STOP_NONE && (set_debug(kv) != VM_OK || arm_timer(kv) != VM_OK)) stop = X86_STOP_HOST;
    return stop == X86_STOP_NONE ? run_guest(kv) : stop;
}

x86_stop kvm_run(vm_vcpu *cpu)
{
    kvm_vcpu *kv = kvm_vcpu_of(cpu);
    block_kicks(kv);
    kv->in_run = true;
    x86_stop stop = run_blocked(kv);
    kv->in_run = false;
    unblock_kicks(kv);
    return stop;
}

/* ---- to another backend ---- */

/* Everything into x86. An open write is done (its exit needs no completion any more); an open read is executed again by
 * the next backend, which takes the caller's answer then. */
void kvm_leave(vm_vcpu *cpu)
{
    kvm_vcpu *kv = kvm_vcpu_of(cpu);
    bool is_write = kv->is_reported && kv->open == KVM_OPEN_WRITE;
    if (kv->dirty != VM_STATE_ALL && prepare_interpreter(kv) == VM_OK && deliver_queued(kv) == X86_STOP_SHUTDOWN)
        cpu->is_shut_down = true;
    if (is_write) cpu->has_pending = false;
    kv->valid = kv->dirty = VM_STATE_ALL;
    kv->is_reported = false;
    kv->open = KVM_OPEN_NONE;
    kvm_collected(kv);
    if (kv->has_soft) interp_destroy(cpu);
    kv->has_soft = false;
    if (kv->debug.control) {
        memset(&kv->debug, 0, sizeof kv->debug);
        kvm_ioctl(kv->fd, KVM_SET_GUEST_DEBUG, &kv->debug);
    }
}

/* ---- the interpreter's caches ---- */

static void kvm_code_changed(vm_vcpu *cpu, uint64_t gpa, uint64_t bytes)
{
    if (kvm_vcpu_of(cpu)->has_soft) interp_code_changed(cpu, gpa, bytes);
}

static void kvm_flush_code(vm_vcpu *cpu)
{
    if (kvm_vcpu_of(cpu)->has_soft) interp_flush_code(cpu);
}

static void kvm_hooks_changed(vm_vcpu *cpu, unsigned seen)
{
    (void)seen;
    kvm_flush_code(cpu);
}

static void kvm_tlb_flushed(vm_vcpu *cpu)
{
    if (kvm_vcpu_of(cpu) && kvm_vcpu_of(cpu)->has_soft) interp_tlb_flushed(cpu);
}

void kvm_flush_tlb(kvm_vcpu *kv)
{
    kv->is_tlb_stale = false;
    x86_tlb_clear(&kv->cpu->x86);
    kvm_tlb_flushed(kv->cpu);
}

const vm_backend_ops vm_backend_kvm = {
    .name = "kvm",
    .query = kvm_query,
    .machine_create = kvm_machine_create,
    .machine_destroy = kvm_machine_destroy,
    .vcpu_create = kvm_vcpu_create,
    .vcpu_destroy = kvm_vcpu_destroy,
    .run = kvm_run,
    .map_changed = kvm_map_changed,
    .code_changed = kvm_code_changed,
    .flush_code = kvm_flush_code,
    .tlb_flushed = kvm_tlb_flushed,
    .dirty_sync = kvm_dirty_sync,
    .get_state = kvm_get_state,
    .set_state = kvm_set_state,
    .kick = kvm_kick,
    .leave = kvm_leave,
    .takes_interrupts = true,
    .keeps_state = true,
    .serves_breaks = true,
    .look = 2000,
    .hooks_changed = kvm_hooks_changed,
    .doorbell = kvm_doorbell,
    .coalesce = kvm_coalesce,
};
