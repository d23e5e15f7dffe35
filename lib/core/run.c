/* run.c - the run loop: everything that happens between two stretches of guest code.
 *
 * A round looks at what others asked for (attention), at interrupts, then lets the backend execute until something
 * comes up, and decides whether that is for the caller. The thread is in VM_GUEST throughout, except while it sleeps
 * or the world is stopped.
 */
#include "core/call.h"
#include "core/replay.h"
#include "core/run.h"
#include "core/hook.h"
#include "platform/pc.h"

#include <string.h>

/* No run is cut up unless something has to be looked at that cannot ring. */
#define SLICE_FOREVER (INT64_C(1) << 62)

typedef vm_round run;

/* ---- what others asked for ---- */

static int machine_event(vm_vcpu *cpu, vm_exit *exit)
{
    vm_machine *m = cpu->machine;
    unsigned seq = atomic_load(&m->event_seq);
    if (m->is_pc)
        vm_pc_vcpu_event(cpu);
    if (cpu->is_parked)
        cpu->is_shut_down = false;     /* INIT ends a shutdown */
    if (cpu->event_seen == seq)
        return 0;
    cpu->event_seen = seq;
    if (m->event == VM_EXIT_GUEST_EXIT)
        exit->guest_exit.code = m->event_code;
    return m->event;
}

int vm_round_attend(vm_vcpu *cpu, run *r)
{
    uint32_t bits = atomic_exchange(&cpu->x86.attention, 0);
    int reason = 0;
    if (bits & X86_ATT_REQUEST) {
        vm_vcpu_safe_point(cpu);
        vm_vcpu_take_requests(cpu);
    }
    if (cpu->has_redirect) {
        cpu->has_redirect = false;
        cpu->x86.rip = cpu->redirect;
        x86_io_retire(&cpu->x86);
        cpu->x86.block_state = X86_BLOCK_FRESH;
    }
    if (cpu->hooks_seen != atomic_load(&cpu->machine->hook_seq))
        vm_hooks_take(cpu);
    if (bits & X86_ATT_IRQ)
        cpu->irq_look = true;
    if (bits & X86_ATT_EVENT)
        reason = machine_event(cpu, r->exit);
    if (cpu->machine->is_ending)
        reason = VM_EXIT_KICK;
    if (bits & X86_ATT_STOP) {
        if (reason)
            atomic_fetch_or(&cpu->x86.attention, X86_ATT_STOP);
        else
            reason = vm_hook_exit(cpu, r->exit);
    }
    if (bits & X86_ATT_KICK) {
        if (reason)
            atomic_fetch_or(&cpu->x86.attention, X86_ATT_KICK);
        else
            reason = VM_EXIT_KICK;
    }
    return reason;
}

/* ---- interrupts and sleep ---- */

static int shut_down(vm_vcpu *cpu)
{
    cpu->is_shut_down = true;
    return VM_EXIT_SHUTDOWN;
}

int vm_round_deliver(vm_vcpu *cpu, run *r, uint8_t vector, bool has_error, uint32_t error)
{
    x86_cpu *x = &cpu->x86;
    r->is_delivered = true;
    if (vm_trace_mask(cpu->machine) & VM_TRACE_IRQ)
        vm_trace_line(cpu->machine, VM_TRACE_IRQ, "cpu%u vector 0x%x rip 0x%llx", cpu->index, vector,
                      (unsigned long long)x->rip);
    x->halted = false;
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    x86_stop stop = x86_inject(x, vector, has_error, error);
    vm_vcpu_changed(cpu, VM_STATE_ALL);
    if (vector == X86_NMI)
        atomic_fetch_or(&x->attention, X86_ATT_EVENT);         /* another may be latched */
    if (stop == X86_STOP_IO) { /* its stack is device memory nobody handles: deliver again once that is answered */
        cpu->inject.is_set = true;
        cpu->inject.vector = vector;
        cpu->inject.has_error = has_error;
        cpu->inject.error = error;
        vm_exit_from_io(cpu, r->exit);
        return (int)r->exit->reason;
    }
    return stop == X86_STOP_SHUTDOWN ? shut_down(cpu) : 0;
}

/* Asks the PC's interrupt controllers; true when a vector was taken. */
static bool take_interrupt(vm_vcpu *cpu, run *r, int *reason)
{
    vm_machine *m = cpu->machine;
    if (!m->is_pc || vm_pc_irq_source.pending(cpu) < 0) {
        cpu->irq_look = false;
        return false;
    }
    if (m->backend->takes_interrupts) {
        cpu->irq_look = false;
        cpu->x86.halted = cpu->x86.halted && !(cpu->x86.rflags & X86_FL_IF);
        return false;
    }
    if (!x86_can_interrupt(&cpu->x86)) {
        r->is_window = true;
        return false;
    }
    unsigned answer = vm_hook_interrupt(cpu, (uint8_t)vm_pc_irq_source.pending(cpu));
    if (answer == X86_HOOK_STOP)
        return (*reason = vm_hook_exit(cpu, r->exit)) != 0;
    int vector = vm_pc_irq_source.acknowledge(cpu);
    if (vector < 0 || answer == X86_HOOK_SKIP)
        return false;
    *reason = vm_round_deliver(cpu, r, (uint8_t)vector, false, 0);
    return true;
}

/* No vCPU of the machine will ever run again by itself. */
static bool is_hopeless(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        if (atomic_load(&cpu->x86.attention))
            return false;              /* it was called and is on its way; looked at first, because it is cleared last */
        if (!atomic_load(&cpu->is_hopeless) && !cpu->is_parked)
            return false;
    }
    return true;
}

static int sleep_until_needed(vm_vcpu *cpu, run *r)
{
    vm_machine *m = cpu->machine;
    int reason = 0;
    atomic_store(&cpu->is_hopeless, !(cpu->x86.rflags & X86_FL_IF));
    if (is_hopeless(m)) {
        for (unsigned i = 0; i < m->vcpu_count; i++)
            if (m->vcpus[i] != cpu)
                vm_vcpu_notify(m->vcpus[i], X86_ATT_IRQ);              /* they look again and come to the same end */
        reason = VM_EXIT_HALT;
    } else if (vm_host_now() >= r->deadline) {
        reason = VM_EXIT_DEADLINE;
    } else {
        vm_vcpu_sleep(cpu, r->deadline);
    }
    if (!reason)
        atomic_store(&cpu->is_hopeless, false);
    return reason;
}

/* Interrupts, injections, HLT, waiting for SIPI: 0 to go on with guest code, an exit reason, or -1 to begin another
 * round. */
static int events(vm_vcpu *cpu, run *r)
{
    x86_cpu *x = &cpu->x86;
    int reason = 0;
    r->is_window = false;
    if (cpu->is_shut_down)
        return VM_EXIT_SHUTDOWN;
    if (cpu->is_parked)
        return (reason = sleep_until_needed(cpu, r)) ? reason : -1;
    if (cpu->inject.is_set) {
        unsigned answer = cpu->inject.vector >= 32 ? vm_hook_interrupt(cpu, cpu->inject.vector) : X86_HOOK_GO;
        if (answer == X86_HOOK_STOP)
            return vm_hook_exit(cpu, r->exit);
        cpu->inject.is_set = false;
        if (answer == X86_HOOK_SKIP)
            return -1;
        return (reason = vm_round_deliver(cpu, r, cpu->inject.vector, cpu->inject.has_error, cpu->inject.error)) ? reason : -1;
    }
    if (cpu->holds_interrupts && !x->halted)
        return 0;
    if (x->nmi_pending && !cpu->machine->backend->takes_interrupts) {
        unsigned answer = !x->nmi_blocked && !x->inhibit ? vm_hook_interrupt(cpu, X86_NMI) : X86_HOOK_GO;
        if (answer == X86_HOOK_STOP)
            return vm_hook_exit(cpu, r->exit);
        if (answer == X86_HOOK_SKIP) {
            x->nmi_pending = false;
            return -1;
        }
        if (!x->nmi_blocked && !x->inhibit)
            return (reason = vm_round_deliver(cpu, r, X86_NMI, false, 0)) ? reason : -1;
        r->is_window = true;
    }
    if (x->nmi_pending && cpu->machine->backend->takes_interrupts)
        x->halted = false;             /* the backend delivers it */
    if (cpu->irq_look && take_interrupt(cpu, r, &reason))
        return reason ? reason : -1;
    if (x->halted)
        return (reason = sleep_until_needed(cpu, r)) ? reason : -1;
    return 0;
}

static bool has_events(const vm_vcpu *cpu)
{
    return cpu->irq_look | cpu->x86.halted | cpu->is_parked | cpu->inject.is_set | cpu->x86.nmi_pending |
           cpu->is_shut_down;
}

/* ---- after a stretch of guest code ---- */

static int halted(vm_vcpu *cpu)
{
    cpu->x86.stat[X86_STAT_HALTS]++;
    cpu->x86.halted = cpu->irq_look = cpu->machine->is_pc;      /* a vector that KVM could not take before the HLT may wait */
    return cpu->machine->is_pc ? 0 : VM_EXIT_HALT;
}

static int internal_error(vm_vcpu *cpu)
{
    atomic_store(&cpu->machine->poisoned, 1);
    return VM_EXIT_INTERNAL;
}

/* A call of the host by the guest has been made: what a run loop looks at after an instruction. */
static int bound(vm_vcpu *cpu, run *r, int reason)
{
    const vm_run_options *o = r->options;
    if (reason == 0 && o->has_until && cpu->x86.rip == o->until)
        return VM_EXIT_UNTIL;
    return reason == 0 && o->single_step ? VM_EXIT_STEP : reason;
}

static int breakpoint(vm_vcpu *cpu, run *r)
{
    int reason = vm_binding_at(cpu);
    if (reason == VM_NOT_BOUND)
        return VM_EXIT_BREAKPOINT;
    if (r->left)
        r->left--;
    r->skips_until = false;
    return bound(cpu, r, reason);
}

static int hypercall(vm_vcpu *cpu, run *r)
{
    int reason = vm_binding_hypercall(cpu);
    if (reason != VM_NOT_BOUND)
        return bound(cpu, r, reason);
    vm_exit_from_hypercall(cpu, r->exit);
    return VM_EXIT_HYPERCALL;
}

int vm_round_stopped(vm_vcpu *cpu, run *r, x86_stop stop)
{
    x86_cpu *x = &cpu->x86;
    switch (stop) {
    case X86_STOP_NONE: case X86_STOP_ATTENTION: return 0;
    case X86_STOP_SLICE: return x->has_until && x->rip == x->until ? VM_EXIT_UNTIL : 0;
    case X86_STOP_HALT: return halted(cpu);
    case X86_STOP_SHUTDOWN: return shut_down(cpu);
    case X86_STOP_IO: vm_exit_from_io(cpu, r->exit); return (int)r->exit->reason;
    case X86_STOP_EXCEPTION: vm_exit_from_exception(cpu, r->exit); return VM_EXIT_EXCEPTION;
    case X86_STOP_UNTIL: return VM_EXIT_UNTIL;
    case X86_STOP_BREAKPOINT: return breakpoint(cpu, r);
    case X86_STOP_STEP: return VM_EXIT_STEP;
    case X86_STOP_HYPERCALL: return hypercall(cpu, r);
    case X86_STOP_HOOK: return vm_hook_exit(cpu, r->exit);
    case X86_STOP_SKIP: return 0;
    case X86_STOP_HOST: r->status = VM_E_HOST; return VM_EXIT_INTERNAL;
    case X86_STOP_INTERNAL: break;
    }
    return internal_error(cpu);
}

uint64_t vm_round_slice(const vm_vcpu *cpu, const run *r, uint64_t slice)
{
    uint64_t look = (uint64_t)cpu->machine->backend->look;
    if (r->skips_until)
        return 1;
    if (slice > r->left)
        slice = r->left;
    return r->deadline != UINT64_MAX && look && slice > look ? look : slice;
}

/* How many instructions the backend may execute before this loop has to look again. */
static int64_t slice_of(vm_vcpu *cpu, const run *r)
{
    uint64_t slice = vm_round_slice(cpu, r, r->left);
    vm_machine *m = cpu->machine;
    if (r->skips_until)
        return 1;
    if (slice > VM_SLICE_WINDOW && r->is_window)
        slice = cpu->x86.inhibit ? 1 : VM_SLICE_WINDOW;
    if (!m->is_pc && cpu->index == 0) {
        uint64_t next = vm_clock_poll(m), now = next == UINT64_MAX ? 0 : vm_clock_now(m);
        if (next != UINT64_MAX && slice > next - now)
            slice = next > now ? next - now : 1;
    }
    return (int64_t)slice;
}

x86_stop vm_round_execute(vm_vcpu *cpu, run *r, int64_t slice)
{
    x86_cpu *x = &cpu->x86;
    x->has_until = r->options->has_until && !r->skips_until;
    x->irq_waiting = r->is_window;
    x->budget = slice;
    x86_stop stop = cpu->machine->backend->run(cpu);
    cpu->has_begun = true;
    r->left -= (uint64_t)(slice - x->budget);
    if (__builtin_expect(cpu->lock_depth != 0, 0))
        while (cpu->lock_depth)        /* a fault or an exit under it */
            x->env->lock_end(x);
    if (r->skips_until && x->budget < slice) {
        r->skips_until = false;
        x->has_until = true;
    }
    return stop;
}

int vm_round_ended(vm_vcpu *cpu, run *r)
{
    int reason;
    if (__builtin_expect(cpu->hook_stop.is_set, 0) && (reason = vm_hook_exit(cpu, r->exit)) != 0) {
        atomic_fetch_and(&cpu->x86.attention, ~X86_ATT_STOP);
        return reason;
    }
    if (r->left == 0)
        return VM_EXIT_BUDGET;
    return r->deadline != UINT64_MAX && vm_host_now() >= r->deadline ? VM_EXIT_DEADLINE : 0;
}

static int run_loop(vm_vcpu *cpu, run *r)
{
    for (;;) {
        int reason = 0;
        if (atomic_load_explicit(&cpu->x86.attention, memory_order_acquire) && (reason = vm_round_attend(cpu, r)) != 0)
            return reason;
        if (__builtin_expect(has_events(cpu), 0) && (reason = events(cpu, r)) > 0)
            return reason;
        if (reason < 0 && r->options->single_step && r->is_delivered)
            return VM_EXIT_STEP;
        if (reason < 0)
            continue;
        if ((reason = vm_round_stopped(cpu, r, vm_round_execute(cpu, r, slice_of(cpu, r)))) != 0)
            return reason;
        if ((reason = vm_round_ended(cpu, r)) != 0)
            return reason;
    }
}

/* ---- a run ---- */

static const vm_run_options no_options = { .size = sizeof no_options };

/* What the backends look at. */
static void show(vm_vcpu *cpu, const run *r)
{
    x86_cpu *x = &cpu->x86;
    const vm_run_options *o = r->options;
    x->until = o->until;
    x->exception_exits = o->exception_exits;
    cpu->has_budget = o->max_instructions != 0 || cpu->machine->replay;            /* slices are exact */
    cpu->deadline = r->deadline;
    cpu->has_signal_blocked = o->has_signal_blocked;
    cpu->is_brief = o->is_brief;
    x->has_deadline = r->deadline != UINT64_MAX;
    if (o->single_step != x->step_asked) {
        x->step_asked = o->single_step;
        x86_mode_changed(x);
    }
}

static void begin(vm_vcpu *cpu, run *r)
{
    const vm_run_options *o = r->options;
    atomic_store_explicit(&cpu->machine->is_touched, true, memory_order_relaxed);
    r->left = o->max_instructions && o->max_instructions < (uint64_t)SLICE_FOREVER ? o->max_instructions
                                                                                   : (uint64_t)SLICE_FOREVER;
    r->deadline = UINT64_MAX;
    if (o->deadline_ns) {
        uint64_t now = vm_host_now();
        r->deadline = o->deadline_ns < UINT64_MAX - 1 - now ? now + o->deadline_ns : UINT64_MAX - 1;
    }
    if (r->outer && r->outer->deadline < r->deadline)
        r->deadline = r->outer->deadline;
    r->skips_until = o->has_until && cpu->x86.rip == o->until;
    cpu->has_begun = false;
    if (cpu->hooks_seen != atomic_load(&cpu->machine->hook_seq))
        vm_hooks_take(cpu);
    show(cpu, r);
}

static void finish(vm_vcpu *cpu, vm_exit *exit, int reason)
{
    vm_machine *m = cpu->machine;
    exit->reason = (vm_exit_reason)reason;
    exit->rip = cpu->x86.rip;
    if (m->vcpu_count == 1)
        atomic_store_explicit(&m->stat_exits, m->stat_exits + 1, memory_order_relaxed);
    else
        atomic_fetch_add_explicit(&m->stat_exits, 1, memory_order_relaxed);
    if (vm_trace_mask(m) & VM_TRACE_EXIT) {
        char text[256];
        vm_exit_format(exit, text, sizeof text);
        vm_trace_line(m, VM_TRACE_EXIT, "cpu%u %s", cpu->index, text);
    }
}

int vm_run_check(vm_vcpu *cpu)
{
    vm_machine *m = cpu->machine;
    int status = vm_process_check(m);
    if (status != VM_OK)
        return status;
    bool is_inside = cpu->at_boundary && vm_vcpu_is_mine(cpu);         /* a bound function */
    if (m->vcpu_count > 1 && !is_inside && vm_vcpu_self(m))
        return vm_fail(VM_E_BUSY, "vm_vcpu_run: this thread is already inside a run of this machine");
    if (!is_inside && vm_vcpu_is_running(cpu))
        return vm_fail(VM_E_BUSY, "vm_vcpu_run: vCPU %u is running", cpu->index);
    if (is_inside && cpu->run_depth >= VM_CALL_DEPTH)
        return vm_fail(VM_E_BUSY, "vm_vcpu_run: %u runs of vCPU %u inside each other", cpu->run_depth, cpu->index);
    return m->poisoned ? vm_fail(VM_E_INTERNAL, "vm_vcpu_run: the machine met an internal error earlier and cannot run")
                       : VM_OK;
}

/* The library's memset, where compilers would make one of a known size a slow string instruction. */
static void clear(vm_exit *exit)
{
    size_t bytes = sizeof *exit - offsetof(vm_exit, reason);
    __asm__("" : "+r"(bytes));
    memset((char *)exit + offsetof(vm_exit, reason), 0, bytes);
}

static int run_claimed(vm_vcpu *cpu, run *r)
{
    vm_machine *m = cpu->machine;
    vm_exit *exit = r->exit;
    int status = m->is_pc ? vm_clock_resume(m) : VM_OK;
    if (status != VM_OK)
        return status;
    if (__builtin_expect(m->replay != NULL, 0))
        vm_replay_begin(cpu, exit);
    if (cpu->has_pending && !(m->replay && m->replay->mode == VM_REPLAY_PLAYING))              /* then by the log */
        vm_exit_complete(cpu, exit);
    clear(exit);
    r->outer = cpu->round;
    begin(cpu, r);
    cpu->round = r;
    cpu->run_depth++;
    int reason = __builtin_expect(m->replay != NULL, 0) ? vm_replay_loop(cpu, r) : run_loop(cpu, r);
    cpu->run_depth--;
    cpu->round = r->outer;
    if (__builtin_expect(m->replay != NULL, 0))
        vm_replay_finish(cpu);
    if (__builtin_expect(cpu->hooks_seen != atomic_load_explicit(&m->hook_seq, memory_order_relaxed), 0))
        vm_hooks_take(cpu);
    finish(cpu, exit, reason);
    return r->status;
}

/* From a bound function: the budget and the deadline of the run outside hold inside too. */
static int run_inside(vm_vcpu *cpu, run *r)
{
    run *outer = cpu->round;
    vm_run_options limited = *r->options;
    uint64_t most = outer->left > 1 ? outer->left : 1, before = cpu->x86.retired;
    if (outer->options->max_instructions && (!limited.max_instructions || limited.max_instructions > most))
        limited.max_instructions = most;
    r->options = &limited;
    cpu->at_boundary = false;
    int status = run_claimed(cpu, r);
    cpu->at_boundary = true;
    uint64_t done = cpu->x86.retired - before;
    outer->left -= done < outer->left ? done : outer->left;
    show(cpu, outer);
    cpu->has_begun = true;
    return status;
}

int vm_run(vm_vcpu *cpu, const vm_run_options *options, vm_exit *exit)
{
    run r = { .options = options ? options : &no_options, .exit = exit };
    if (r.options->single_step && !cpu->machine->backend->serves_hooks && !cpu->machine->backend->serves_breaks)
        return vm_fail(VM_E_UNSUPPORTED, "vm_vcpu_run: backend %s does not step", cpu->machine->backend->name);
    int status = vm_run_check(cpu);
    if (status != VM_OK)
        return status;
    if (cpu->at_boundary && vm_vcpu_is_mine(cpu))
        return run_inside(cpu, &r);
    if (!(cpu->machine->replay ? vm_replay_claim(cpu) : vm_vcpu_claim(cpu)))
        return vm_fail(VM_E_BUSY, "vm_vcpu_run: vCPU %u is running", cpu->index);
    status = run_claimed(cpu, &r);
    vm_vcpu_release(cpu);
    return status;
}
