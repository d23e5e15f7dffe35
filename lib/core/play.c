/* play.c - the run loop of a machine that replays: the guest executes from one event of the log to the next, and whatever
 * differs from what the log says ends it. A damaged log cannot come so far (vm_log_read); a forged one can say anything here
 * and only ever makes the guest do it, or the replay end.
 */
#include "core/replay.h"
#include "dev/dev.h"
#include "platform/pc.h"

#include <stdlib.h>

typedef unsigned long long ull;        /* for %llx */

int vm_play_diverged(vm_vcpu *cpu, const char *what, uint64_t got, uint64_t want)
{
    struct vm_replay *rp = cpu->machine->replay;
    if (!rp->status)
        rp->status = vm_fail(VM_E_FORMAT, "vm_replay: at instruction %llu the machine left the log: %s is 0x%llx, not 0x%llx",
                             (ull)vm_replay_position(cpu), what, (ull)got, (ull)want);
    vm_vcpu_notify(cpu, X86_ATT_REQUEST);                /* if it is inside an instruction */
    return 0;
}

void vm_play_next(struct vm_replay *rp)
{
    if (rp->next.type == VM_LOG_END)
        return;
    rp->next_offset = rp->offset;
    rp->before_next = rp->at;
    vm_log_next(&rp->log, &rp->offset, &rp->at, &rp->next);
}

/* ---- going back ---- */

/* False: no memory. */
static bool mark_input(vm_machine *m, vm_replay_place *place)
{
    unsigned total = 0;
    uint8_t *bytes = malloc(VM_PC_UARTS * VM_UART_QUEUE), *fit;
    if (!bytes)
        return false;
    for (unsigned i = 0; i < VM_PC_UARTS; i++)
        total += place->input_bytes[i] = vm_pc_waiting(m, i, bytes + total);
    fit = total ? realloc(bytes, total) : NULL;
    place->input = fit ? fit : total ? bytes : NULL;
    if (!total)
        free(bytes);
    return true;
}

static bool return_input(vm_machine *m, const vm_replay_place *place)
{
    const uint8_t *at = place->input;
    bool ok = true;
    for (unsigned i = 0; i < VM_PC_UARTS; at += place->input_bytes[i], i++)
        ok &= vm_pc_set_waiting(m, i, at, place->input_bytes[i]);
    return ok;
}

void vm_replay_mark(vm_machine *m, vm_replay_place *place)
{
    const struct vm_replay *rp = m->replay;
    const unsigned room = sizeof place->deadlines / sizeof *place->deadlines;
    *place = (vm_replay_place){ 0 };
    if (!rp || rp->mode != VM_REPLAY_PLAYING || rp->status)
        return;
    place->timers = vm_clock_deadlines(m, place->deadlines, room);
    place->session = place->timers <= room && mark_input(m, place) ? rp->session : 0;
    place->offset = rp->next_offset;
    place->before = rp->before_next;
}

int vm_replay_may_return(vm_machine *m, const vm_replay_place *place)
{
    const struct vm_replay *rp = m->replay;
    bool is_here = !rp || (rp->mode == VM_REPLAY_PLAYING && place->session == rp->session);
    return is_here ? VM_OK : vm_replay_forbids(m, "vm_snapshot_restore to before it");
}

void vm_replay_depart(vm_machine *m)
{
    for (unsigned i = 0; m->is_pc && i < VM_PC_UARTS; i++)
        vm_pc_set_waiting(m, i, NULL, 0);
}

void vm_replay_return(vm_machine *m, const vm_replay_place *place)
{
    struct vm_replay *rp = m->replay;
    if (!rp)
        return;
    vm_clock_set_deadlines(m, place->deadlines, place->timers);
    rp->status = return_input(m, place) ? VM_OK : VM_E_NOMEM;
    rp->at_end = false;
    rp->next = (vm_log_event){ 0 };
    rp->offset = place->offset;
    rp->at = place->before;
    vm_play_next(rp);
    rp->state_sum = vm_replay_state_sum(m->vcpus[0]);
}

bool vm_replay_answer(vm_vcpu *cpu, vm_log_type type, uint64_t *value, int *status)
{
    struct vm_replay *rp = cpu->machine->replay;
    if (rp->mode != VM_REPLAY_PLAYING)
        return false;
    *status = X86_IO_DONE;
    if (value)
        *value = ~UINT64_C(0);
    for (; !rp->status; vm_play_next(rp)) {
        const vm_log_event *e = &rp->next;
        if (!e->is_inside || e->at != vm_replay_position(cpu)) {
            vm_play_diverged(cpu, "an access to a device: its position", vm_replay_position(cpu), e->at);
        } else if (e->type == type) {
            *status = e->b ? X86_IO_EXIT : X86_IO_DONE;
            if (value)
                *value = e->a;
            vm_play_next(rp);
            break;
        } else if (e->type >= VM_LOG_READ || vm_replay_apply(cpu, e) < 0) {
            vm_play_diverged(cpu, "an access to a device: its kind", type, e->type);
        }
    }
    return true;
}

/* ---- events ---- */

static int end(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay;
    uint64_t ram = vm_ram_sum(cpu->machine), registers = vm_cpu_sum(cpu);
    if (ram != rp->next.a)
        return vm_play_diverged(cpu, "at the end the checksum of RAM", ram, rp->next.a);
    if (registers != rp->next.b)
        return vm_play_diverged(cpu, "at the end the checksum of the registers", registers, rp->next.b);
    rp->at_end = true;
    return 0;
}

static int irq(vm_vcpu *cpu, vm_round *r, uint64_t want)
{
    int vector = x86_can_interrupt(&cpu->x86) ? vm_pc_irq_source.acknowledge(cpu) : -1;
    if (vector < 0 || (uint64_t)vector != want)
        return vm_play_diverged(cpu, "the interrupt's vector", (uint64_t)(int64_t)vector, want);
    return vm_round_deliver(cpu, r, (uint8_t)vector, false, 0);
}

static int injected(vm_vcpu *cpu, vm_round *r)
{
    if (!cpu->inject.is_set)
        return vm_play_diverged(cpu, "the injected event", 0, 1);
    cpu->inject.is_set = false;
    return vm_round_deliver(cpu, r, cpu->inject.vector, cpu->inject.has_error, cpu->inject.error);
}

static int timers(vm_vcpu *cpu, uint64_t skipped)
{
    vm_clock_skip(cpu->machine, skipped);
    vm_clock_fire(cpu->machine);
    return 0;
}

static int complete(vm_vcpu *cpu, const vm_log_event *e)
{
    vm_exit given = { .size = sizeof given, .reason = e->b ? cpu->pending.reason : (vm_exit_reason)0 };
    if (!cpu->has_pending)
        return vm_play_diverged(cpu, "an exit that waits", 0, 1);
    if (given.reason == VM_EXIT_IO)
        given.io.data = e->a;
    else
        given.mmio.data = e->a;
    vm_exit_complete(cpu, &given);
    return 0;
}

/* One event of the log, at its boundary: an exit reason or 0. */
static int play_event(vm_vcpu *cpu, vm_round *r)
{
    struct vm_replay *rp = cpu->machine->replay;
    const vm_log_event e = rp->next;
    uint32_t check = vm_replay_check(cpu);
    if (e.type <= VM_LOG_EVENT && e.check != check)      /* inputs may come while registers are being set */
        return vm_play_diverged(cpu, "the checksum of the general registers", check, e.check);
    if (e.type == VM_LOG_END)
        return end(cpu);
    vm_play_next(rp);
    switch (e.type) {
    case VM_LOG_TIMERS: return timers(cpu, e.a);
    case VM_LOG_IRQ: return irq(cpu, r, e.a);
    case VM_LOG_COMPLETE: return complete(cpu, &e);
    case VM_LOG_INJECTED: return injected(cpu, r);
    case VM_LOG_NMI:
        if (cpu->x86.nmi_pending)
            return vm_round_deliver(cpu, r, X86_NMI, false, 0);
        return vm_play_diverged(cpu, "the pending NMI", 0, 1);
    case VM_LOG_EVENT:
        atomic_fetch_or(&cpu->x86.attention, X86_ATT_EVENT);
        return vm_round_attend(cpu, r);
    default: return vm_replay_apply(cpu, &e) < 0 ? vm_play_diverged(cpu, "an input, its kind", 0, e.type) : 0;
    }
}

/* An access became an exit: what happened until it was completed, then its answer. */
static int play_exit(vm_vcpu *cpu, vm_round *r)
{
    struct vm_replay *rp = cpu->machine->replay;
    int reason = 0;
    if (rp->next.type != VM_LOG_EXITED || rp->next.at != vm_replay_position(cpu))
        return vm_play_diverged(cpu, "an exit: its position", vm_replay_position(cpu), rp->next.at);
    vm_play_next(rp);
    while (!reason && !rp->status && !rp->at_end && cpu->has_pending)
        reason = rp->next.is_inside || rp->next.at != vm_replay_position(cpu)
            ? vm_play_diverged(cpu, "the completion of an exit: its position", vm_replay_position(cpu), rp->next.at)
            : play_event(cpu, r);
    return reason;
}

/* ---- a round ---- */

static int execute(vm_vcpu *cpu, vm_round *r, uint64_t slice)
{
    x86_stop stop = vm_round_execute(cpu, r, (int64_t)vm_round_slice(cpu, r, slice));
    int reason = vm_round_stopped(cpu, r, stop);
    if (stop == X86_STOP_IO)
        return play_exit(cpu, r);
    return reason ? reason : vm_round_ended(cpu, r);
}

int vm_play_round(vm_vcpu *cpu, vm_round *r)
{
    const struct vm_replay *rp = cpu->machine->replay;
    int reason;
    atomic_fetch_and(&cpu->x86.attention, ~(X86_ATT_IRQ | X86_ATT_EVENT));         /* the log says when */
    if (atomic_load(&cpu->x86.attention) && (reason = vm_round_attend(cpu, r)) != 0)
        return reason;
    uint64_t at = vm_replay_position(cpu);
    if (rp->next.at < at)
        return vm_play_diverged(cpu, "the position of the next event", rp->next.at, at);
    if (rp->next.at == at && !rp->next.is_inside)
        return play_event(cpu, r);
    if (cpu->is_shut_down)
        return VM_EXIT_SHUTDOWN;
    if (!cpu->x86.halted)
        return execute(cpu, r, rp->next.at - at + rp->next.is_inside);
    if (!(cpu->x86.rflags & X86_FL_IF))
        return VM_EXIT_HALT;
    return vm_play_diverged(cpu, "a halted guest: the position of the next event", at, rp->next.at);
}
