/* replay.c - recording a PC, and replaying the record. See replay.h. */
#include "core/replay.h"
#include "core/cpustate.h"
#include "core/hook.h"
#include "platform/pc.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LOG_DEFAULT (UINT64_C(1) << 30)
enum { STEPS_TO_BOUNDARY = 1000 };     /* tries; a guest whose every instruction faults never gets there */

struct vm_replay {
    vm_replay_mode mode;
    uint64_t base;                     /* retired instructions at the log's begin */
    uint64_t state_sum;                /* of the vCPU when it last stopped */
    int status;
    bool at_end;
    /* recording */
    vm_log_writer w;
    bool skip_idle;
    pthread_mutex_t lock;              /* inputs of other threads: */
    pthread_cond_t done;
    vm_input *inputs;
    /* playing */
    vm_log log;
    size_t offset;
    uint64_t at;                       /* of `next` */
    vm_log_event next;                 /* the END when it is over */
};

/* ---- positions ---- */

static uint64_t position(const vm_vcpu *cpu)
{
    return vm_vcpu_retired_now(cpu) - cpu->machine->replay->base;
}

static uint32_t check_of(const vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    uint64_t h = x->rip ^ x->rflags << 40;
    for (unsigned i = 0; i < 16; i++)
        h = (h ^ x->gpr[i]) * UINT64_C(0x9E3779B97F4A7C15) >> 7 ^ h << 11;
    return (uint32_t)(h ^ h >> 32);
}

static void put(vm_vcpu *cpu, vm_log_event e)
{
    struct vm_replay *rp = cpu->machine->replay;
    e.at = position(cpu);
    vm_log_put(&rp->w, &e);
    if (rp->w.status && !rp->status)
        rp->status = rp->w.status;
}

static void put_here(vm_vcpu *cpu, vm_log_type type, uint64_t a, uint64_t b)
{
    put(cpu, (vm_log_event){ .type = (uint8_t)type, .check = check_of(cpu), .a = a, .b = b });
}

static void put_inside(vm_vcpu *cpu, vm_log_type type, uint64_t a, uint64_t b)
{
    put(cpu, (vm_log_event){ .type = (uint8_t)type, .is_inside = true, .a = a, .b = b });
}

/* ---- the vCPU's state as bytes ---- */

static uint8_t *state_bytes(vm_vcpu *cpu, size_t *bytes)
{
    vm_cpu_state s;
    memset(&s, 0, sizeof s);
    if (vm_cpu_state_take(cpu, &s) != VM_OK)
        return NULL;
    size_t log = s.io_count * sizeof *s.io_log;
    uint8_t *p = malloc(sizeof s + log);
    if (p && log)
        memcpy(p + sizeof s, s.io_log, log);
    free(s.io_log);
    s.io_log = NULL;
    if (p)
        memcpy(p, &s, sizeof s);
    else
        vm_fail(VM_E_NOMEM, "no memory for a vCPU's state");
    *bytes = sizeof s + log;
    return p;
}

/* The struct in those bytes, looked at; io_log points into them. */
static int state_of(vm_vcpu *cpu, const uint8_t *bytes, size_t count, vm_cpu_state *s)
{
    if (count < sizeof *s)
        return vm_fail(VM_E_FORMAT, "vm_replay: a vCPU's state of %zu bytes", count);
    memcpy(s, bytes, sizeof *s);
    s->io_log = NULL;
    if (s->io_count > X86_IO_LOG || count != sizeof *s + s->io_count * sizeof *s->io_log)
        return vm_fail(VM_E_FORMAT, "vm_replay: a vCPU's state of %zu bytes", count);
    if (s->io_count && !(s->io_log = malloc(s->io_count * sizeof *s->io_log)))
        return vm_fail(VM_E_NOMEM, "no memory for a vCPU's state");
    if (s->io_count)
        memcpy(s->io_log, bytes + sizeof *s, s->io_count * sizeof *s->io_log);
    int status = vm_cpu_state_check(cpu, s);
    if (status)
        free(s->io_log);
    return status;
}

static void put_state(vm_vcpu *cpu, const vm_cpu_state *s)
{
    vm_cpu_state_put(cpu, s);
    cpu->x86.env->root_changed(&cpu->x86, false);
}

static uint64_t state_sum(vm_vcpu *cpu)
{
    size_t bytes = 0;
    uint8_t *p = state_bytes(cpu, &bytes);
    uint64_t sum = p ? (uint64_t)vm_crc32(0, p, bytes) << 32 | vm_crc32(1, p, bytes) : 0;
    free(p);
    return sum;
}

/* ---- inputs ---- */

/* Does what an event says. Its status, or how many bytes a serial port took. */
static int apply(vm_vcpu *cpu, const vm_log_event *e)
{
    vm_machine *m = cpu->machine;
    vm_cpu_state s;
    int status;
    switch (e->type) {
    case VM_LOG_LINE: return vm_pc_irq_set(m, (unsigned)e->a, e->b);
    case VM_LOG_MSI: return vm_pc_irq_msi(m, e->a, (uint32_t)e->b);
    case VM_LOG_SERIAL: return vm_pc_serial_input(m, (unsigned)e->a, e->data, e->bytes);
    case VM_LOG_WRITE: return vm_memory_copy(m, e->a, (void *)(uintptr_t)e->data, e->bytes, true);
    case VM_LOG_RESET: vm_machine_reset(m); return VM_OK;
    case VM_LOG_INJECT:
        cpu->inject.vector = (uint8_t)e->a;
        cpu->inject.has_error = e->b != 0;
        cpu->inject.error = (uint32_t)(e->b - 1);
        cpu->inject.is_set = true;
        if (vm_vcpu_is_running(cpu)) { /* inside an instruction */
            vm_vcpu_notify(cpu, X86_ATT_IRQ);
            vm_vcpu_look_again(cpu);
        }
        return VM_OK;
    case VM_LOG_STATE:
        if ((status = state_of(cpu, e->data, e->bytes, &s)) == VM_OK) {
            put_state(cpu, &s);
            free(s.io_log);
        }
        return status;
    default: return vm_fail(VM_E_FORMAT, "vm_replay: an event of type %u is no input", e->type);
    }
}

/* On the vCPU's thread, or with the vCPU held: do it and write it down. What fails has changed nothing. */
static void take_input(vm_vcpu *cpu, vm_input *in, bool is_inside)
{
    vm_log_event e = { .type = in->type, .is_inside = is_inside, .a = in->a, .b = in->b, .check = check_of(cpu) };
    const uint8_t *data = in->data;
    size_t left = in->bytes;
    in->result = VM_OK;
    do {
        e.data = data;
        e.bytes = (uint32_t)(left < VM_LOG_DATA ? left : VM_LOG_DATA);
        int result = apply(cpu, &e);
        if (result < 0) {
            in->result = in->result ? in->result : result;
            break;
        }
        if (in->type == VM_LOG_SERIAL) {
            e.bytes = (uint32_t)result;
            in->result += result;
            left = 0;
        } else {
            left -= e.bytes;
        }
        if (in->type != VM_LOG_SERIAL || e.bytes)
            put(cpu, e);
        data += e.bytes;
        e.a += in->type == VM_LOG_WRITE ? e.bytes : 0;
    } while (left);
    in->is_done = true;
}

static void take_inputs(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay;
    vm_input *in;
    if (!__atomic_load_n(&rp->inputs, __ATOMIC_ACQUIRE))
        return;
    pthread_mutex_lock(&rp->lock);
    while ((in = rp->inputs) != NULL) {
        rp->inputs = in->next;
        pthread_mutex_unlock(&rp->lock);
        take_input(cpu, in, false);
        pthread_mutex_lock(&rp->lock);
        pthread_cond_broadcast(&rp->done);
    }
    pthread_mutex_unlock(&rp->lock);
}

/* Leave it with the running vCPU's thread for a moment; false: it was not taken. */
static bool hand_over(vm_vcpu *cpu, vm_input *in)
{
    struct vm_replay *rp = cpu->machine->replay;
    vm_input **link;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += 20000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&rp->lock);
    in->next = NULL;
    for (link = &rp->inputs; *link; link = &(*link)->next)
        continue;
    *link = in;
    vm_vcpu_notify(cpu, X86_ATT_REQUEST);
    while (!in->is_done && pthread_cond_timedwait(&rp->done, &rp->lock, &until) == 0)
        continue;
    bool is_queued = false;
    for (link = &rp->inputs; *link; link = &(*link)->next)
        if (*link == in) {
            *link = in->next;
            is_queued = true;
            break;
        }
    while (!is_queued && !in->is_done)                   /* it is being done */
        pthread_cond_wait(&rp->done, &rp->lock);
    pthread_mutex_unlock(&rp->lock);
    return in->is_done;
}

int vm_replay_forbids(vm_machine *m, const char *function)
{
    return m->replay ? vm_fail(VM_E_BUSY, "%s: not while the machine %s", function,
                               m->replay->mode == VM_REPLAY_RECORDING ? "records" : "replays") : VM_OK;
}

int vm_replay_input(vm_machine *m, vm_input *in)
{
    vm_vcpu *cpu = m->vcpus[0];
    if (m->replay->mode == VM_REPLAY_PLAYING)
        return vm_replay_forbids(m, "input from outside");
    bool is_drivers = in->type == VM_LOG_RESET || in->type == VM_LOG_INJECT;       /* of the thread that drives the vCPU */
    while (!in->is_done) {
        if (vm_vcpu_is_running(cpu) && vm_vcpu_is_mine(cpu)) {
            take_input(cpu, in, true);
        } else if (is_drivers && !vm_vcpu_is_running(cpu)) {
            take_input(cpu, in, false);
        } else if (!is_drivers && vm_vcpu_claim(cpu)) {
            take_input(cpu, in, false);
            vm_vcpu_release(cpu);
        } else {
            hand_over(cpu, in);
        }
    }
    return in->result;
}

int vm_replay_write(vm_machine *m, uint64_t gpa, const void *data, size_t bytes)
{
    vm_input in = { .type = VM_LOG_WRITE, .a = gpa, .data = data, .bytes = bytes };
    uint8_t probe;
    for (uint64_t at = gpa & ~UINT64_C(4095); at < gpa + bytes; at += 4096)        /* all or nothing */
        if (vm_memory_copy(m, at < gpa ? gpa : at, &probe, 1, false) != VM_OK)
            return VM_E_FAULT;
    return bytes ? vm_replay_input(m, &in) : VM_OK;
}

/* ---- the log as it is played ---- */

static int diverged(vm_vcpu *cpu, const char *what, uint64_t got, uint64_t want)
{
    struct vm_replay *rp = cpu->machine->replay;
    if (!rp->status)
        rp->status = vm_fail(VM_E_FORMAT, "vm_replay: at instruction %llu the machine left the log: %s is 0x%llx, not 0x%llx",
                             (unsigned long long)position(cpu), what, (unsigned long long)got, (unsigned long long)want);
    vm_vcpu_notify(cpu, X86_ATT_REQUEST);
    return rp->status;
}

static void go_on(struct vm_replay *rp)
{
    if (rp->next.type != VM_LOG_END)
        vm_log_next(&rp->log, &rp->offset, &rp->at, &rp->next);
}

bool vm_replay_answer(vm_vcpu *cpu, vm_log_type type, uint64_t *value, int *status)
{
    struct vm_replay *rp = cpu->machine->replay;
    if (rp->mode != VM_REPLAY_PLAYING)
        return false;
    *status = X86_IO_DONE;
    if (value)
        *value = ~UINT64_C(0);
    for (; !rp->status; go_on(rp)) {
        const vm_log_event *e = &rp->next;
        if (!e->is_inside || e->at != position(cpu)) {
            diverged(cpu, "an access to a device, the position", position(cpu), e->at);
            break;
        }
        if (e->type == type) {
            *status = e->b ? X86_IO_EXIT : X86_IO_DONE;
            if (value)
                *value = e->a;
            go_on(rp);
            break;
        }
        if (e->type >= VM_LOG_READ || apply(cpu, e) < 0)
            diverged(cpu, "an access to a device, the event", type, e->type);
    }
    return true;
}

void vm_replay_answered(vm_vcpu *cpu, vm_log_type type, uint64_t value, int status)
{
    put_inside(cpu, type, type == VM_LOG_READ ? value : 0, status != X86_IO_DONE);
}

/* ---- what both loops do ---- */

static int over(vm_vcpu *cpu, vm_round *r)
{
    const struct vm_replay *rp = cpu->machine->replay;
    r->exit->replay.position = position(cpu);
    r->exit->replay.status = rp->status;
    return VM_EXIT_REPLAY;
}

static int fire_timers(vm_vcpu *cpu, uint64_t skipped)
{
    vm_clock_skip(cpu->machine, skipped);
    vm_clock_fire(cpu->machine);
    return 0;
}

static int deliver_injected(vm_vcpu *cpu, vm_round *r)
{
    cpu->inject.is_set = false;
    return vm_round_deliver(cpu, r, cpu->inject.vector, cpu->inject.has_error, cpu->inject.error);
}

static int look_at_events(vm_vcpu *cpu, vm_round *r)
{
    atomic_fetch_or(&cpu->x86.attention, X86_ATT_EVENT);
    return vm_round_attend(cpu, r);
}

/* ---- recording ---- */

/* Others want something and the state is none that counting finds again: let an instruction retire. */
static bool is_boundary(const vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    return !x->is_midway && x->fault_retired != x->retired + 1;
}

static int step_to_boundary(vm_vcpu *cpu, vm_round *r)
{
    x86_cpu *x = &cpu->x86;
    int reason = 0;
    for (int i = 0; i < STEPS_TO_BOUNDARY && !reason && !is_boundary(cpu) && !x->halted; i++) {
        uint32_t held = atomic_exchange(&x->attention, 0);
        x->is_midway = false;
        reason = vm_round_stopped(cpu, r, vm_round_execute(cpu, r, 1));
        atomic_fetch_or(&x->attention, held);
        if (!reason)
            reason = vm_round_ended(cpu, r);
    }
    return reason;
}

static int attend_recording(vm_vcpu *cpu, vm_round *r)
{
    uint32_t bits = atomic_load(&cpu->x86.attention);
    take_inputs(cpu);
    if (bits & X86_ATT_EVENT)
        put_here(cpu, VM_LOG_EVENT, 0, 0);
    else
        atomic_fetch_and(&cpu->x86.attention, ~X86_ATT_EVENT);         /* came meanwhile: the next round's */
    bool is_late = !(bits & X86_ATT_EVENT) && cpu->event_seen != atomic_load(&cpu->machine->event_seq);
    int reason = vm_round_attend(cpu, r);
    if (is_late)
        atomic_fetch_or(&cpu->x86.attention, X86_ATT_EVENT);
    return reason;
}

/* An event the guest takes now; -1: none. */
static int take_event(vm_vcpu *cpu, vm_round *r)
{
    x86_cpu *x = &cpu->x86;
    r->is_window = false;
    if (cpu->inject.is_set) {
        put_here(cpu, VM_LOG_INJECTED, cpu->inject.vector, 0);
        return deliver_injected(cpu, r);
    }
    if (x->nmi_pending) {
        if (!x->nmi_blocked && !x->inhibit) {
            put_here(cpu, VM_LOG_NMI, 0, 0);
            return vm_round_deliver(cpu, r, X86_NMI, false, 0);
        }
        r->is_window = true;
    }
    if (vm_pc_irq_source.pending(cpu) < 0)
        return -1;
    if (!x86_can_interrupt(x)) {
        r->is_window = true;
        return -1;
    }
    uint32_t check = check_of(cpu);
    int vector = vm_pc_irq_source.acknowledge(cpu);
    if (vector < 0)
        return -1;
    put(cpu, (vm_log_event){ .type = VM_LOG_IRQ, .check = check, .a = (uint64_t)vector });
    return vm_round_deliver(cpu, r, (uint8_t)vector, false, 0);
}

/* Halted and nothing to take: until a timer falls due or somebody calls. */
static int idle(vm_vcpu *cpu, vm_round *r)
{
    struct vm_replay *rp = cpu->machine->replay;
    uint64_t next = vm_clock_next(cpu->machine), now = vm_clock_now(cpu->machine), host = vm_host_now(), wake = r->deadline;
    if (!(cpu->x86.rflags & X86_FL_IF))
        return VM_EXIT_HALT;
    if (host >= r->deadline)
        return VM_EXIT_DEADLINE;
    if (next <= now)
        return 0;
    bool is_timers = next != UINT64_MAX && (rp->skip_idle || next - now < r->deadline - host);
    if (next == UINT64_MAX || !rp->skip_idle) {
        if (is_timers)
            wake = host + (next - now);
        vm_vcpu_sleep(cpu, wake);
        if (!is_timers || atomic_load(&cpu->x86.attention) || vm_host_now() < wake)
            return 0;
    }
    put_here(cpu, VM_LOG_TIMERS, next - now, 0);
    return fire_timers(cpu, next - now);
}

static int record_round(vm_vcpu *cpu, vm_round *r)
{
    vm_machine *m = cpu->machine;
    int reason;
    if (atomic_load(&cpu->x86.attention) && ((reason = step_to_boundary(cpu, r)) != 0 || (reason = attend_recording(cpu, r)) != 0))
        return reason;
    uint64_t next = vm_clock_next(m), now = vm_clock_now(m);
    if (next <= now) {
        if ((reason = step_to_boundary(cpu, r)) != 0)
            return reason;
        put_here(cpu, VM_LOG_TIMERS, 0, 0);
        return fire_timers(cpu, 0);
    }
    if (cpu->is_shut_down)
        return VM_EXIT_SHUTDOWN;
    if ((reason = take_event(cpu, r)) >= 0)
        return reason;
    if (cpu->x86.halted)
        return idle(cpu, r);
    uint64_t slice = next - now;
    if (r->is_window && slice > VM_SLICE_WINDOW)
        slice = cpu->x86.inhibit ? 1 : VM_SLICE_WINDOW;
    cpu->x86.is_midway = false;
    x86_stop stop = vm_round_execute(cpu, r, (int64_t)vm_round_slice(cpu, r, slice));
    if (stop == X86_STOP_SLICE)
        cpu->x86.is_midway = false;    /* counting found it */
    reason = vm_round_stopped(cpu, r, stop);
    if (stop == X86_STOP_IO)
        put_inside(cpu, VM_LOG_EXITED, 0, 0);
    return reason ? reason : vm_round_ended(cpu, r);
}

/* ---- playing ---- */

static int play_end(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay;
    uint64_t ram = vm_ram_sum(cpu->machine), registers = vm_cpu_sum(cpu);
    if (ram != rp->next.a)
        return diverged(cpu, "at the end the checksum of RAM", ram, rp->next.a);
    if (registers != rp->next.b)
        return diverged(cpu, "at the end the checksum of the registers", registers, rp->next.b);
    rp->at_end = true;
    return VM_OK;
}

static int play_irq(vm_vcpu *cpu, vm_round *r, uint64_t want)
{
    int vector = x86_can_interrupt(&cpu->x86) ? vm_pc_irq_source.acknowledge(cpu) : -1;
    if (vector < 0 || (uint64_t)vector != want) {
        diverged(cpu, "the interrupt's vector", (uint64_t)(int64_t)vector, want);
        return 0;
    }
    return vm_round_deliver(cpu, r, (uint8_t)vector, false, 0);
}

/* One event of the log at this boundary: an exit reason or 0. */
static int play_event(vm_vcpu *cpu, vm_round *r)
{
    struct vm_replay *rp = cpu->machine->replay;
    const vm_log_event e = rp->next;
    if (e.check != check_of(cpu)) {
        diverged(cpu, "the checksum of the general registers", check_of(cpu), e.check);
        return 0;
    }
    if (e.type == VM_LOG_END) {
        play_end(cpu);
        return 0;
    }
    go_on(rp);
    switch (e.type) {
    case VM_LOG_TIMERS: return fire_timers(cpu, e.a);
    case VM_LOG_IRQ: return play_irq(cpu, r, e.a);
    case VM_LOG_NMI:
        if (!cpu->x86.nmi_pending)
            diverged(cpu, "the pending NMI", 0, 1);
        else
            return vm_round_deliver(cpu, r, X86_NMI, false, 0);
        return 0;
    case VM_LOG_INJECTED:
        if (!cpu->inject.is_set)
            diverged(cpu, "the injected event", 0, 1);
        else
            return deliver_injected(cpu, r);
        return 0;
    case VM_LOG_EVENT: return look_at_events(cpu, r);
    default:
        if (apply(cpu, &e) < 0)
            diverged(cpu, "an input that was taken, type", 0, e.type);
        return 0;
    }
}

/* The access that became an exit: what happened until it was completed, then its answer. */
static int play_exit(vm_vcpu *cpu, vm_round *r)
{
    struct vm_replay *rp = cpu->machine->replay;
    vm_exit *given = r->exit;
    if (rp->next.type != VM_LOG_EXITED || rp->next.at != position(cpu)) {
        diverged(cpu, "an exit, the position", position(cpu), rp->next.at);
        return 0;
    }
    for (go_on(rp); !rp->status && !rp->at_end && rp->next.type != VM_LOG_COMPLETE;) {
        if (rp->next.is_inside || rp->next.at != position(cpu)) {
            diverged(cpu, "the completion of an exit, the position", position(cpu), rp->next.at);
        } else {
            int reason = play_event(cpu, r);
            if (reason)
                return reason;
        }
    }
    if (rp->status || rp->at_end || !cpu->has_pending)
        return 0;
    if (given->reason == VM_EXIT_IO)
        given->io.data = rp->next.a;
    else
        given->mmio.data = rp->next.a;
    if (!rp->next.b)
        given->reason = 0;
    go_on(rp);
    vm_exit_complete(cpu, given);
    return 0;
}

static int play_round(vm_vcpu *cpu, vm_round *r)
{
    struct vm_replay *rp = cpu->machine->replay;
    int reason;
    if (rp->status || rp->at_end)
        return over(cpu, r);
    atomic_fetch_and(&cpu->x86.attention, ~(X86_ATT_IRQ | X86_ATT_EVENT));
    if (atomic_load(&cpu->x86.attention) && (reason = vm_round_attend(cpu, r)) != 0)
        return reason;
    uint64_t at = position(cpu);
    if (rp->next.at < at) {
        diverged(cpu, "the position of the next event", rp->next.at, at);
        return 0;
    }
    if (rp->next.at == at && !rp->next.is_inside)
        return play_event(cpu, r);
    if (cpu->is_shut_down)
        return VM_EXIT_SHUTDOWN;
    if (cpu->x86.halted) {
        if (!(cpu->x86.rflags & X86_FL_IF))
            return VM_EXIT_HALT;
        diverged(cpu, "a halted guest, the next event", at, rp->next.at);
        return 0;
    }
    uint64_t slice = rp->next.at - at + rp->next.is_inside;
    x86_stop stop = vm_round_execute(cpu, r, (int64_t)vm_round_slice(cpu, r, slice));
    reason = vm_round_stopped(cpu, r, stop);
    if (stop == X86_STOP_IO)
        return play_exit(cpu, r);
    return reason ? reason : vm_round_ended(cpu, r);
}

/* ---- a run ---- */

void vm_replay_begin(vm_vcpu *cpu, const vm_exit *given)
{
    struct vm_replay *rp = cpu->machine->replay;
    uint64_t sum = state_sum(cpu);
    if (rp->mode == VM_REPLAY_PLAYING) {
        if (sum != rp->state_sum)
            diverged(cpu, "the vCPU's state, set from outside: its checksum", sum, rp->state_sum);
        return;
    }
    if (sum != rp->state_sum) {
        size_t bytes = 0;
        uint8_t *state = state_bytes(cpu, &bytes);
        if (state)
            put(cpu, (vm_log_event){ .type = VM_LOG_STATE, .check = check_of(cpu), .data = state, .bytes = (uint32_t)bytes });
        else
            rp->status = VM_E_NOMEM;
        free(state);
    }
    if (cpu->has_pending) {
        bool is_given = given->reason == cpu->pending.reason;
        put_here(cpu, VM_LOG_COMPLETE, given->reason == VM_EXIT_IO ? given->io.data : given->mmio.data, is_given);
    }
}

int vm_replay_loop(vm_vcpu *cpu, vm_round *r)
{
    const struct vm_replay *rp = cpu->machine->replay;
    for (;;) {
        if (rp->status || rp->at_end)
            return over(cpu, r);
        int reason = rp->mode == VM_REPLAY_PLAYING ? play_round(cpu, r) : record_round(cpu, r);
        if (reason)
            return reason;
    }
}

void vm_replay_finish(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay;
    if (rp->mode == VM_REPLAY_RECORDING)
        take_inputs(cpu);
    rp->state_sum = state_sum(cpu);
}

/* ---- begin and end ---- */

static uint64_t model_sum(vm_vcpu *cpu)
{
    uint64_t h = 0;
    uint32_t out[4];
    for (uint32_t base = 0; base <= 0x80000000u; base += 0x80000000u) {
        for (uint32_t leaf = base; leaf < base + 0x20; leaf++) {
            if (leaf == 1 || leaf == 0xb || leaf == 0xd)               /* parts depend on the state */
                continue;
            x86_cpuid(&cpu->x86, leaf, 0, out);
            for (unsigned i = 0; i < 4; i++)
                h = (h ^ out[i]) * UINT64_C(0x9E3779B97F4A7C15) + leaf;
        }
        if (base)
            break;
    }
    return h;
}

static int check_machine(vm_machine *m, const char *function)
{
    if (!m->is_pc || m->vcpu_count != 1)
        return vm_fail(VM_E_UNSUPPORTED, "%s: only a PC with one vCPU; a BARE machine repeats itself without a log", function);
    if (m->backend->get_state)
        return vm_fail(VM_E_UNSUPPORTED, "%s: backend %s counts no instructions", function, m->backend->name);
    if (m->replay)
        return vm_replay_forbids(m, function);
    if (m->bindings)
        return vm_fail(VM_E_UNSUPPORTED, "%s: the machine has bound functions", function);
    return VM_OK;
}

static struct vm_replay *new_replay(vm_replay_mode mode)
{
    struct vm_replay *rp = calloc(1, sizeof *rp);
    pthread_condattr_t attr;
    if (!rp)
        return NULL;
    rp->mode = mode;
    pthread_mutex_init(&rp->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&rp->done, &attr);
    pthread_condattr_destroy(&attr);
    return rp;
}

static void free_replay(struct vm_replay *rp)
{
    vm_log_abandon(&rp->w);
    vm_log_free(&rp->log);
    pthread_cond_destroy(&rp->done);
    pthread_mutex_destroy(&rp->lock);
    free(rp);
}

static uint8_t *platform_bytes(vm_machine *m, size_t *bytes)
{
    uint8_t *p = NULL;
    vm_device_lock(m);
    int status = vm_pc_save(m, NULL, bytes);
    if (!status && !(p = calloc(1, *bytes ? *bytes : 1)))
        vm_fail(VM_E_NOMEM, "no memory for the platform's state");
    if (p && vm_pc_save(m, p, bytes) != VM_OK) {
        free(p);
        p = NULL;
    }
    vm_device_unlock(m);
    return p;
}

/* The vCPU held, time virtual. */
static int begin_record(vm_machine *m, int fd, const vm_record_options *o)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp = new_replay(VM_REPLAY_RECORDING);
    size_t cpu_bytes = 0, pc_bytes = 0;
    uint8_t *state = rp ? state_bytes(cpu, &cpu_bytes) : NULL, *pc = state ? platform_bytes(m, &pc_bytes) : NULL;
    int status = pc ? VM_OK : vm_fail(VM_E_NOMEM, "vm_record: no memory");
    if (!status) {
        vm_log_header h = { .ram_bytes = m->options.ram_bytes, .ram_sum = vm_ram_sum(m), .model_sum = model_sum(cpu),
                            .time_ns = vm_clock_now(m), .tsc = vm_clock_tsc(m), .cpu_bytes = (uint32_t)cpu_bytes,
                            .platform_bytes = (uint32_t)pc_bytes };
        status = vm_log_begin(&rp->w, fd, o->max_bytes ? o->max_bytes : LOG_DEFAULT, &h, state, pc);
    }
    free(state);
    free(pc);
    if (status) {
        if (rp)
            free_replay(rp);
        return status;
    }
    rp->skip_idle = o->skip_idle;
    rp->base = cpu->x86.retired;
    m->replay = rp;
    rp->state_sum = state_sum(cpu);
    return VM_OK;
}

int vm_replay_record(vm_machine *m, int fd, const vm_record_options *o)
{
    vm_vcpu *cpu = m->vcpus[0];
    int status = check_machine(m, "vm_record");
    if (status)
        return status;
    if (!vm_vcpu_claim(cpu))
        return vm_fail(VM_E_BUSY, "vm_record: the vCPU is running");
    vm_clock_virtual(m, true);
    status = begin_record(m, fd, o);
    if (status)
        vm_clock_virtual(m, false);
    vm_vcpu_release(cpu);
    return status;
}

static int is_this_machine(vm_machine *m, const vm_log_header *h)
{
    if (h->ram_bytes != m->options.ram_bytes)
        return vm_fail(VM_E_INVALID, "vm_replay: the recorded machine has %llu bytes of RAM, this one %llu",
                       (unsigned long long)h->ram_bytes, (unsigned long long)m->options.ram_bytes);
    if (h->model_sum != model_sum(m->vcpus[0]))
        return vm_fail(VM_E_INVALID, "vm_replay: the recorded machine has another CPU (vm_options.cpu_model, or the host)");
    if (h->ram_sum != vm_ram_sum(m))
        return vm_fail(VM_E_INVALID, "vm_replay: what is in RAM is not what was there when vm_record() was called");
    return VM_OK;
}

/* Devices as the log has them; those of before again if it makes no sense. */
static int put_platform(vm_machine *m, const vm_log *log)
{
    size_t bytes = 0;
    uint8_t *before = platform_bytes(m, &bytes);
    if (!before)
        return VM_E_NOMEM;
    vm_device_lock(m);
    int status = vm_pc_restore(m, log->platform, log->header.platform_bytes);
    if (status)
        vm_pc_restore(m, before, bytes);
    vm_device_unlock(m);
    free(before);
    return status == VM_OK || status == VM_E_NOMEM ? status
        : vm_fail(VM_E_FORMAT, "vm_replay: the devices' state in the log is damaged");
}

static int begin_play(vm_machine *m, struct vm_replay *rp)
{
    vm_vcpu *cpu = m->vcpus[0];
    vm_cpu_state s;
    int status = is_this_machine(m, &rp->log.header);
    if (!status)
        status = state_of(cpu, rp->log.cpu, rp->log.header.cpu_bytes, &s);
    if (status)
        return status;
    uint64_t now = vm_clock_now(m), tsc = vm_clock_tsc(m);
    vm_clock_virtual(m, true);
    vm_clock_set(m, rp->log.header.time_ns, rp->log.header.tsc);
    status = put_platform(m, &rp->log);
    if (status) {
        vm_clock_set(m, now, tsc);
        vm_clock_virtual(m, false);
    } else {
        put_state(cpu, &s);
        vm_clock_set(m, rp->log.header.time_ns, rp->log.header.tsc);   /* it counts from the vCPU's instructions */
        rp->base = cpu->x86.retired;
        vm_log_next(&rp->log, &rp->offset, &rp->at, &rp->next);
        m->replay = rp;
        rp->state_sum = state_sum(cpu);
    }
    free(s.io_log);
    return status;
}

int vm_replay_play(vm_machine *m, int fd)
{
    vm_vcpu *cpu = m->vcpus[0];
    int status = check_machine(m, "vm_replay");
    if (status)
        return status;
    struct vm_replay *rp = new_replay(VM_REPLAY_PLAYING);
    if (!rp)
        return vm_fail(VM_E_NOMEM, "vm_replay: no memory");
    status = vm_log_read(fd, &rp->log);
    if (!status && !vm_vcpu_claim(cpu))
        status = vm_fail(VM_E_BUSY, "vm_replay: the vCPU is running");
    else if (!status) {
        status = begin_play(m, rp);
        vm_vcpu_release(cpu);
    }
    if (status)
        free_replay(rp);
    return status;
}

int vm_replay_end(vm_machine *m, vm_replay_mode mode)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp = m->replay;
    bool is_recording = mode == VM_REPLAY_RECORDING;
    if (!rp || rp->mode != mode)
        return vm_fail(VM_E_INVALID, is_recording ? "vm_record_stop: the machine does not record"
                                                  : "vm_replay_stop: the machine does not replay");
    if (!vm_vcpu_claim(cpu))
        return vm_fail(VM_E_BUSY, "vm_%s_stop: the vCPU is running", is_recording ? "record" : "replay");
    int status = VM_OK;
    if (is_recording) {
        vm_replay_begin(cpu, &(const vm_exit){ .size = sizeof(vm_exit) });         /* registers set since the last run */
        put_here(cpu, VM_LOG_END, vm_ram_sum(m), vm_cpu_sum(cpu));
        status = rp->w.status ? rp->w.status : rp->status;
        int written = vm_log_finish(&rp->w);
        status = status ? status : written;
        if (status)
            vm_fail(status, "vm_record_stop: the log is not complete: %s", vm_strerror(status));
    }
    m->replay = NULL;
    free_replay(rp);
    vm_clock_virtual(m, false);
    cpu->irq_look = true;
    vm_vcpu_notify(cpu, X86_ATT_EVENT | X86_ATT_IRQ);
    vm_vcpu_release(cpu);
    return status;
}

void vm_replay_free(vm_machine *m)
{
    if (m->replay)
        free_replay(m->replay);
    m->replay = NULL;
}

void vm_replay_look(vm_machine *m, vm_replay_info *info)
{
    struct vm_replay *rp = m->replay;
    if (!rp)
        return;
    info->mode = rp->mode;
    info->position = position(m->vcpus[0]);
    info->end = rp->mode == VM_REPLAY_PLAYING ? rp->log.end : info->position;
    info->events = rp->mode == VM_REPLAY_PLAYING ? rp->log.count : rp->w.events;
    info->bytes = rp->mode == VM_REPLAY_PLAYING ? rp->log.size : rp->w.written + rp->w.used;
    info->status = rp->status;
    info->at_end = rp->at_end;
}
