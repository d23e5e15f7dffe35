/* record.c - the run loop of a machine that records: everything that is not the guest's own doing happens at boundaries that
 * counting instructions finds again, and is written down.
 */
#include "core/replay.h"
#include "platform/pc.h"

enum { STEPS_TO_BOUNDARY = 1000 };     /* tries; a guest whose every instruction faults never gets there */

void vm_record_put(vm_vcpu *cpu, vm_log_event e)
{
    struct vm_replay *rp = cpu->machine->replay;
    e.at = vm_replay_position(cpu);
    vm_log_put(&rp->w, &e);
    if (rp->w.status && !rp->status)
        rp->status = rp->w.status;
}

static void put(vm_vcpu *cpu, vm_log_type type, uint64_t a)
{
    vm_record_put(cpu, (vm_log_event){ .type = (uint8_t)type, .check = vm_replay_check(cpu), .a = a });
}

void vm_replay_answered(vm_vcpu *cpu, vm_log_type type, uint64_t value, int status)
{
    vm_record_put(cpu, (vm_log_event){ .type = (uint8_t)type, .is_inside = true, .a = type == VM_LOG_READ ? value : 0,
                                       .b = status != X86_IO_DONE });
}

/* ---- boundaries ---- */

static bool is_boundary(const vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    return x->halted || (!x->is_midway && x->fault_retired != x->retired + 1);
}

/* Executes; is_midway tells what is so then. Who is called before the first instruction has executed nothing: what was unfinished is. */
static x86_stop go_on(vm_vcpu *cpu, vm_round *r, int64_t slice)
{
    x86_cpu *x = &cpu->x86;
    const bool was_midway = x->is_midway;
    const uint64_t retired = x->retired;
    x->is_midway = false;
    x86_stop stop = vm_round_execute(cpu, r, slice);
    x->is_midway |= was_midway && x->retired == retired;
    return stop;
}

/* Others want something and the state is none that counting finds again: let an instruction retire. */
static int step_to_boundary(vm_vcpu *cpu, vm_round *r)
{
    x86_cpu *x = &cpu->x86;
    int reason = 0;
    for (int i = 0; i < STEPS_TO_BOUNDARY && !reason && !is_boundary(cpu); i++) {
        uint32_t held = atomic_exchange(&x->attention, 0);
        x86_stop stop = go_on(cpu, r, 1);
        reason = vm_round_stopped(cpu, r, stop);
        if (stop == X86_STOP_IO)
            vm_record_put(cpu, (vm_log_event){ .type = VM_LOG_EXITED, .is_inside = true });
        atomic_fetch_or(&x->attention, held);
        if (!reason)
            reason = vm_round_ended(cpu, r);
    }
    return reason;
}

static int attend(vm_vcpu *cpu, vm_round *r)
{
    x86_cpu *x = &cpu->x86;
    bool is_event = atomic_load(&x->attention) & X86_ATT_EVENT;
    vm_replay_take_inputs(cpu);
    if (is_event)
        put(cpu, VM_LOG_EVENT, 0);
    uint32_t came = is_event ? 0 : atomic_fetch_and(&x->attention, ~X86_ATT_EVENT) & X86_ATT_EVENT;
    int reason = vm_round_attend(cpu, r);
    if (came)                          /* meanwhile, by an input: the next round's */
        atomic_fetch_or(&x->attention, X86_ATT_EVENT);
    return reason;
}

/* ---- what the guest takes ---- */

static int take_irq(vm_vcpu *cpu, vm_round *r)
{
    if (vm_pc_irq_source.pending(cpu) < 0)
        return -1;
    if (!x86_can_interrupt(&cpu->x86)) {
        r->is_window = true;
        return -1;
    }
    int vector = vm_pc_irq_source.acknowledge(cpu);
    if (vector < 0)
        return -1;
    put(cpu, VM_LOG_IRQ, (uint64_t)vector);
    return vm_round_deliver(cpu, r, (uint8_t)vector, false, 0);
}

/* An event: an exit reason or 0; -1: none. */
static int take_event(vm_vcpu *cpu, vm_round *r)
{
    x86_cpu *x = &cpu->x86;
    r->is_window = false;
    if (cpu->inject.is_set) {
        put(cpu, VM_LOG_INJECTED, cpu->inject.vector);
        cpu->inject.is_set = false;
        return vm_round_deliver(cpu, r, cpu->inject.vector, cpu->inject.has_error, cpu->inject.error);
    }
    if (x->nmi_pending && !x->nmi_blocked && !x->inhibit) {
        put(cpu, VM_LOG_NMI, 0);
        return vm_round_deliver(cpu, r, X86_NMI, false, 0);
    }
    r->is_window = x->nmi_pending;
    return take_irq(cpu, r);
}

static int fire_timers(vm_vcpu *cpu, uint64_t skipped)
{
    put(cpu, VM_LOG_TIMERS, skipped);
    vm_clock_skip(cpu->machine, skipped);
    vm_clock_fire(cpu->machine);
    return 0;
}

/* Halted and nothing to take: until a timer falls due or somebody calls. */
static int idle(vm_vcpu *cpu, vm_round *r)
{
    const struct vm_replay *rp = cpu->machine->replay;
    uint64_t next = vm_clock_next(cpu->machine), now = vm_clock_now(cpu->machine), host = vm_host_now();
    if (!(cpu->x86.rflags & X86_FL_IF) && !cpu->x86.nmi_pending)
        return VM_EXIT_HALT;
    if (host >= r->deadline)
        return VM_EXIT_DEADLINE;
    bool is_timed = next != UINT64_MAX, is_waiting = !is_timed || !rp->skip_idle;
    uint64_t wake = is_timed && next - now < r->deadline - host ? host + (next - now) : r->deadline;
    if (is_waiting)
        vm_vcpu_sleep(cpu, wake);
    if (!is_timed || (is_waiting && (atomic_load(&cpu->x86.attention) || vm_host_now() < host + (next - now))))
        return 0;
    return fire_timers(cpu, next - now);
}

/* ---- a round ---- */

static int execute(vm_vcpu *cpu, vm_round *r, uint64_t slice)
{
    x86_cpu *x = &cpu->x86;
    if (r->is_window && slice > VM_SLICE_WINDOW)
        slice = x->inhibit ? 1 : VM_SLICE_WINDOW;
    x86_stop stop = go_on(cpu, r, (int64_t)vm_round_slice(cpu, r, slice));
    if (stop == X86_STOP_SLICE)
        x->is_midway = false;          /* counting found it */
    int reason = vm_round_stopped(cpu, r, stop);
    if (stop == X86_STOP_IO)
        vm_record_put(cpu, (vm_log_event){ .type = VM_LOG_EXITED, .is_inside = true });
    return reason ? reason : vm_round_ended(cpu, r);
}

int vm_record_round(vm_vcpu *cpu, vm_round *r)
{
    vm_machine *m = cpu->machine;
    int reason;
    bool is_called = atomic_load(&cpu->x86.attention) != 0;
    if ((is_called || vm_clock_next(m) <= vm_clock_now(m)) && (reason = step_to_boundary(cpu, r)) != 0)
        return reason;
    if (is_called && (reason = attend(cpu, r)) != 0)
        return reason;
    uint64_t next = vm_clock_next(m), now = vm_clock_now(m);
    if (next <= now)
        return fire_timers(cpu, 0);
    if (cpu->is_shut_down)
        return VM_EXIT_SHUTDOWN;
    if ((reason = take_event(cpu, r)) >= 0)
        return reason;
    return cpu->x86.halted ? idle(cpu, r) : execute(cpu, r, next - now);
}
