/* input.c - what comes to a recording machine from outside: taken in at a boundary, on the vCPU's thread or while it is idle,
 * and written down; and the same done again when the log says so.
 *
 * A thread that brings input while the vCPU runs hands it over and waits until the vCPU's thread has taken it.
 */
#include "core/replay.h"
#include "platform/pc.h"

#include <time.h>

enum { PATIENCE_NS = 20000000 };       /* then look anew: the run may have ended */

static int inject(vm_vcpu *cpu, const vm_log_event *e)
{
    cpu->inject.vector = (uint8_t)e->a;
    cpu->inject.has_error = e->b != 0;
    cpu->inject.error = (uint32_t)(e->b - 1);
    cpu->inject.is_set = true;
    if (vm_vcpu_is_running(cpu)) {     /* inside an instruction: right after it */
        vm_vcpu_notify(cpu, X86_ATT_IRQ);
        vm_vcpu_look_again(cpu);
    }
    return VM_OK;
}

int vm_replay_apply(vm_vcpu *cpu, const vm_log_event *e)
{
    vm_machine *m = cpu->machine;
    switch (e->type) {
    case VM_LOG_LINE: return vm_pc_irq_set(m, (unsigned)e->a, e->b);
    case VM_LOG_MSI: return vm_pc_irq_msi(m, e->a, (uint32_t)e->b);
    case VM_LOG_SERIAL: return vm_pc_serial_input(m, (unsigned)e->a, e->data, e->bytes);
    case VM_LOG_WRITE: return vm_memory_copy(m, e->a, (void *)(uintptr_t)e->data, e->bytes, true);
    case VM_LOG_INJECT: return inject(cpu, e);
    case VM_LOG_STATE: return vm_replay_state_put(cpu, e->data, e->bytes);
    case VM_LOG_RESET: vm_machine_reset(m); return VM_OK;
    default: return vm_fail(VM_E_FORMAT, "vm_replay: an event of type %u is no input", e->type);
    }
}

/* Do it and write it down, if anybody records, in pieces that fit an event. What fails has changed nothing. */
static void take(vm_vcpu *cpu, vm_input *in, bool is_inside)
{
    vm_log_event e = { .type = in->type, .is_inside = is_inside, .a = in->a, .b = in->b, .data = in->data };
    const bool is_serial = in->type == VM_LOG_SERIAL;
    size_t left = in->bytes;
    in->result = VM_OK;
    do {
        e.bytes = (uint32_t)(left < VM_LOG_DATA ? left : VM_LOG_DATA);
        int result = vm_replay_apply(cpu, &e);
        if (result < 0) {
            in->result = in->result ? in->result : result;
            break;
        }
        left = is_serial ? 0 : left - e.bytes;           /* a port takes what it has room for */
        e.bytes = is_serial ? (uint32_t)result : e.bytes;
        in->result += is_serial ? result : 0;
        if (cpu->machine->replay && (!is_serial || e.bytes))
            vm_record_put(cpu, e);
        e.data = e.bytes ? e.data + e.bytes : e.data;    /* NULL for input without bytes */
        e.a += in->type == VM_LOG_WRITE ? e.bytes : 0;
    } while (left);
    in->is_done = true;
}

void vm_replay_take_inputs(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay;
    vm_input *in;
    if (!__atomic_load_n(&rp->inputs, __ATOMIC_ACQUIRE))
        return;
    pthread_mutex_lock(&rp->lock);
    while ((in = rp->inputs) != NULL) {
        rp->inputs = in->next;
        pthread_mutex_unlock(&rp->lock);                 /* the devices' lock comes before this one */
        take(cpu, in, false);
        pthread_mutex_lock(&rp->lock);
        pthread_cond_broadcast(&rp->done);
    }
    pthread_mutex_unlock(&rp->lock);
}

static bool take_back(struct vm_replay *rp, const vm_input *in)
{
    for (vm_input **link = &rp->inputs; *link; link = &(*link)->next)
        if (*link == in) {
            *link = in->next;
            return true;
        }
    return false;
}

/* Leave it with the running vCPU's thread for a moment. rp->lock held. */
static void hand_over(vm_vcpu *cpu, struct vm_replay *rp, vm_input *in)
{
    vm_input **link = &rp->inputs;
    struct timespec until;
    uint64_t at = vm_host_now() + PATIENCE_NS;
    until = (struct timespec){ .tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u) };
    while (*link)
        link = &(*link)->next;
    in->next = NULL;
    __atomic_store_n(link, in, __ATOMIC_RELEASE);
    vm_vcpu_notify(cpu, X86_ATT_REQUEST);
    while (!in->is_done && pthread_cond_timedwait(&rp->done, &rp->lock, &until) == 0)
        continue;
    if (take_back(rp, in))
        return;
    while (!in->is_done)                                 /* it is being taken */
        pthread_cond_wait(&rp->done, &rp->lock);
}

int vm_replay_forbids(vm_machine *m, const char *function)
{
    const struct vm_replay *rp = m->replay;
    return rp ? vm_fail(VM_E_BUSY, "%s: not while the machine %s", function,
                        rp->mode == VM_REPLAY_PLAYING ? "replays" : "records") : VM_OK;
}

int vm_replay_input(vm_machine *m, vm_input *in)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp = m->replay_kept;
    if (vm_vcpu_is_running(cpu) && vm_vcpu_is_mine(cpu)) {
        if (rp->mode == VM_REPLAY_PLAYING)
            return vm_replay_forbids(m, "input from outside");
        take(cpu, in, true);
        return in->result;
    }
    pthread_mutex_lock(&rp->lock);
    while (!in->is_done) {
        if (rp->mode == VM_REPLAY_PLAYING) {
            in->result = vm_replay_forbids(m, "input from outside");
            break;
        }
        if (rp->mode == VM_REPLAY_OFF || !vm_vcpu_is_running(cpu))
            take(cpu, in, false);
        else
            hand_over(cpu, rp, in);
    }
    pthread_mutex_unlock(&rp->lock);
    return in->result;
}

int vm_replay_write(vm_machine *m, uint64_t gpa, const void *data, size_t bytes)
{
    vm_input in = { .type = VM_LOG_WRITE, .a = gpa, .data = data, .bytes = bytes };
    uint8_t probe;
    int status = VM_OK;
    for (size_t done = 0; done < bytes && status == VM_OK; done += 4096 - ((gpa + done) & 4095))   /* all or nothing */
        status = vm_memory_copy(m, gpa + done, &probe, 1, false);
    return status == VM_OK && bytes ? vm_replay_input(m, &in) : status;
}

bool vm_replay_claim(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay_kept;
    pthread_mutex_lock(&rp->lock);
    bool is_mine = vm_vcpu_claim(cpu);
    pthread_mutex_unlock(&rp->lock);
    return is_mine;
}
