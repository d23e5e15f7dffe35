/* replay.c - beginning and ending recordings and replays, and the vCPU's state as logs hold it. See replay.h. */
#include "core/replay.h"
#include "core/cpustate.h"
#include "core/snapfile.h"
#include "dev/dev.h"
#include "platform/pc.h"

#include <stdlib.h>
#include <string.h>

#define LOG_DEFAULT (UINT64_C(1) << 30)

uint32_t vm_replay_check(const vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    uint64_t h = x->rip ^ x->rflags << 40;
    for (unsigned i = 0; i < 16; i++)
        h = (h ^ x->gpr[i]) * UINT64_C(0x9E3779B97F4A7C15) >> 7 ^ h << 11;
    return (uint32_t)(h ^ h >> 32);
}

/* ---- the vCPU's state as bytes ---- */

uint8_t *vm_replay_state(vm_vcpu *cpu, size_t *bytes)
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
    cpu->x86.env->root_changed(&cpu->x86, 0);
}

int vm_replay_state_put(vm_vcpu *cpu, const uint8_t *bytes, size_t count)
{
    vm_cpu_state s;
    int status = state_of(cpu, bytes, count, &s);
    if (status)
        return status;
    put_state(cpu, &s);
    free(s.io_log);
    return VM_OK;
}

uint64_t vm_replay_state_sum(vm_vcpu *cpu)
{
    size_t bytes = 0;
    uint8_t *p = vm_replay_state(cpu, &bytes);
    uint64_t sum = p ? vm_snap_hash(p, bytes) | 1 : 0;      /* 0 says that there is no memory */
    free(p);
    return sum;
}

/* ---- a run ---- */

void vm_replay_begin(vm_vcpu *cpu, const vm_exit *given)
{
    struct vm_replay *rp = cpu->machine->replay;
    uint64_t sum = vm_replay_state_sum(cpu);
    if (!sum) {
        rp->status = rp->status ? rp->status : VM_E_NOMEM;
        return;
    }
    if (rp->mode == VM_REPLAY_PLAYING) {
        if (sum != rp->state_sum)
            vm_play_diverged(cpu, "the vCPU's state, set from outside: its checksum", sum, rp->state_sum);
        return;
    }
    if (sum != rp->state_sum) {
        size_t bytes = 0;
        uint8_t *state = vm_replay_state(cpu, &bytes);
        if (state)
            vm_record_put(cpu, (vm_log_event){ .type = VM_LOG_STATE, .data = state, .bytes = (uint32_t)bytes });
        else
            rp->status = VM_E_NOMEM;
        free(state);
    }
    if (cpu->has_pending) {
        bool is_given = given->reason == cpu->pending.reason;
        vm_record_put(cpu, (vm_log_event){ .type = VM_LOG_COMPLETE, .b = is_given,
                                           .a = given->reason == VM_EXIT_IO ? given->io.data : given->mmio.data });
    }
}

static int over(vm_vcpu *cpu, vm_round *r)
{
    const struct vm_replay *rp = cpu->machine->replay;
    r->exit->replay.position = vm_replay_position(cpu);
    r->exit->replay.status = rp->status;
    return VM_EXIT_REPLAY;
}

int vm_replay_loop(vm_vcpu *cpu, vm_round *r)
{
    const struct vm_replay *rp = cpu->machine->replay;
    for (;;) {
        if (rp->status || rp->at_end)
            return over(cpu, r);
        int reason = rp->mode == VM_REPLAY_PLAYING ? vm_play_round(cpu, r) : vm_record_round(cpu, r);
        if (reason)
            return reason;
    }
}

void vm_replay_finish(vm_vcpu *cpu)
{
    struct vm_replay *rp = cpu->machine->replay;
    if (rp->mode == VM_REPLAY_RECORDING)
        vm_replay_take_inputs(cpu);
    rp->state_sum = vm_replay_state_sum(cpu);
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
    if (m->backend->takes_interrupts)                    /* KVM */
        return vm_fail(VM_E_UNSUPPORTED, "%s: backend %s counts no instructions", function, m->backend->name);
    if (m->replay)
        return vm_replay_forbids(m, function);
    if (m->bindings)
        return vm_fail(VM_E_UNSUPPORTED, "%s: the machine has bound functions", function);
    return VM_OK;
}

/* The machine's struct, idle. */
static struct vm_replay *prepare(vm_machine *m)
{
    struct vm_replay *rp = m->replay_kept;
    pthread_condattr_t attr;
    if (rp || !(rp = calloc(1, sizeof *rp)))
        return rp;
    pthread_mutex_init(&rp->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&rp->done, &attr);
    pthread_condattr_destroy(&attr);
    m->replay_kept = rp;
    return rp;
}

static void begin(vm_machine *m, vm_replay_mode mode)
{
    struct vm_replay *rp = m->replay_kept;
    rp->base = m->vcpus[0]->x86.retired;
    rp->status = VM_OK;
    rp->at_end = false;
    pthread_mutex_lock(&rp->lock);
    rp->mode = mode;
    m->replay = rp;
    pthread_mutex_unlock(&rp->lock);
    rp->state_sum = vm_replay_state_sum(m->vcpus[0]);
    if (!rp->state_sum)
        rp->status = VM_E_NOMEM;
}

static void leave(vm_machine *m)
{
    struct vm_replay *rp = m->replay_kept;
    pthread_mutex_lock(&rp->lock);
    m->replay = NULL;
    rp->mode = VM_REPLAY_OFF;
    pthread_mutex_unlock(&rp->lock);
    vm_log_abandon(&rp->w);
    vm_log_free(&rp->log);
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

static bool is_zero(const uint8_t *page)
{
    return !page[0] && !memcmp(page, page + 1, 4095);
}

/* fn for each page of RAM, ascending, until one says false. */
static bool each_page(vm_machine *m, bool (*fn)(vm_machine *m, uint64_t gpa, const uint8_t *page))
{
    for (size_t i = 0; i < m->view.count; i++) {
        const vm_range *range = &m->view.ranges[i];
        if (range->region->kind > VM_REGION_FILE)
            continue;
        for (uint64_t at = 0; at < range->bytes; at += 4096)
            if (!fn(m, range->gpa + at, range->region->host + range->offset + at))
                return false;
    }
    return true;
}

static bool put_page(vm_machine *m, uint64_t gpa, const uint8_t *page)
{
    struct vm_replay *rp = m->replay_kept;
    if (!is_zero(page))
        vm_log_put(&rp->w, &(vm_log_event){ .type = VM_LOG_PAGE, .a = gpa, .data = page, .bytes = 4096 });
    return rp->w.status == VM_OK;
}

/* Make a page what the log says: its next event, or zero. */
static bool get_page(vm_machine *m, uint64_t gpa, const uint8_t *page)
{
    struct vm_replay *rp = m->replay_kept;
    static const uint8_t zero[4096];
    const uint8_t *want = zero;
    if (rp->next.type == VM_LOG_PAGE && rp->next.a == gpa) {
        want = rp->next.data;
        vm_play_next(rp);
    }
    return !memcmp(page, want, 4096) || vm_memory_copy(m, gpa, (void *)(uintptr_t)want, 4096, true) == VM_OK;
}

/* Input that came before the recording and still waits is the first that comes. */
static void put_waiting(vm_vcpu *cpu)
{
    uint8_t *bytes = malloc(VM_UART_QUEUE);
    if (!bytes)
        cpu->machine->replay->status = VM_E_NOMEM;
    for (unsigned i = 0; bytes && i < VM_PC_UARTS; i++) {
        uint32_t count = vm_pc_waiting(cpu->machine, i, bytes);
        if (count)
            vm_record_put(cpu, (vm_log_event){ .type = VM_LOG_SERIAL, .a = i, .data = bytes, .bytes = count });
    }
    free(bytes);
}

/* The vCPU held, time virtual. */
static int begin_record(vm_machine *m, int fd, const vm_record_options *o)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp = m->replay_kept;
    size_t cpu_bytes = 0, pc_bytes = 0;
    uint8_t *state = vm_replay_state(cpu, &cpu_bytes), *pc = state ? platform_bytes(m, &pc_bytes) : NULL;
    int status = VM_E_NOMEM;
    if (pc) {
        vm_log_header h = { .ram_bytes = m->options.ram_bytes, .ram_sum = vm_ram_sum(m), .model_sum = model_sum(cpu),
                            .time_ns = vm_clock_now(m), .tsc = vm_clock_tsc(m), .cpu_bytes = (uint32_t)cpu_bytes,
                            .platform_bytes = (uint32_t)pc_bytes };
        status = vm_log_begin(&rp->w, fd, UINT64_MAX, &h, state, pc);
    }
    if (!status && !o->omit_ram && !each_page(m, put_page))
        status = rp->w.status;
    if (status)
        vm_log_abandon(&rp->w);
    rp->w.max_bytes = rp->w.written + rp->w.used + (o->max_bytes ? o->max_bytes : LOG_DEFAULT);
    if (!status) {                     /* as the replay will find them: a device may choose other moments when it is restored */
        vm_device_lock(m);
        status = vm_pc_restore(m, pc, pc_bytes);
        vm_device_unlock(m);
    }
    free(state);
    free(pc);
    rp->skip_idle = o->skip_idle;
    if (status)
        return status;
    begin(m, VM_REPLAY_RECORDING);
    put_waiting(cpu);
    return VM_OK;
}

int vm_replay_record(vm_machine *m, int fd, const vm_record_options *o)
{
    vm_vcpu *cpu = m->vcpus[0];
    int status = check_machine(m, "vm_record");
    if (status)
        return status;
    if (!prepare(m))
        return vm_fail(VM_E_NOMEM, "vm_record: no memory");
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
    return VM_OK;
}

/* `next` is then the first event behind the pages. */
static int get_ram(vm_machine *m)
{
    struct vm_replay *rp = m->replay_kept;
    bool has_pages = rp->next.type == VM_LOG_PAGE;
    if (has_pages && !each_page(m, get_page))
        return VM_E_HOST;
    if (rp->next.type == VM_LOG_PAGE)
        return vm_fail(VM_E_INVALID, "vm_replay: the log has a page of RAM at 0x%llx, the machine has none there",
                       (unsigned long long)rp->next.a);
    return rp->log.header.ram_sum == vm_ram_sum(m) ? VM_OK
        : vm_fail(VM_E_INVALID, "vm_replay: what is in RAM is not what was there when vm_record() was called");
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

static int begin_play(vm_machine *m)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp = m->replay_kept;
    const vm_log_header *h = &rp->log.header;
    vm_cpu_state s;
    int status = is_this_machine(m, h);
    if (!status)
        status = state_of(cpu, rp->log.cpu, h->cpu_bytes, &s);
    if (status)
        return status;
    rp->offset = rp->at = 0;
    rp->next = (vm_log_event){ 0 };
    vm_play_next(rp);
    status = get_ram(m);
    if (status) {
        free(s.io_log);
        return status;
    }
    uint64_t now = vm_clock_now(m), tsc = vm_clock_tsc(m);
    vm_clock_virtual(m, true);
    vm_clock_set(m, h->time_ns, h->tsc);
    vm_replay_depart(m);
    status = put_platform(m, &rp->log);
    if (status) {
        vm_clock_set(m, now, tsc);
        vm_clock_virtual(m, false);
    } else {
        put_state(cpu, &s);
        vm_clock_set(m, h->time_ns, h->tsc);             /* it counts from the vCPU's instructions */
        rp->session++;
        begin(m, VM_REPLAY_PLAYING);
    }
    free(s.io_log);
    return status;
}

int vm_replay_play(vm_machine *m, int fd)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp;
    int status = check_machine(m, "vm_replay");
    if (status)
        return status;
    if (!(rp = prepare(m)))
        return vm_fail(VM_E_NOMEM, "vm_replay: no memory");
    status = vm_log_read(fd, &rp->log);
    if (!status && !vm_vcpu_claim(cpu))
        status = vm_fail(VM_E_BUSY, "vm_replay: the vCPU is running");
    else if (!status) {
        status = begin_play(m);
        vm_vcpu_release(cpu);
    }
    if (status)
        vm_log_free(&rp->log);
    return status;
}

static int end_record(vm_machine *m)
{
    vm_vcpu *cpu = m->vcpus[0];
    struct vm_replay *rp = m->replay;
    vm_replay_begin(cpu, &(const vm_exit){ .size = sizeof(vm_exit) });             /* registers set since the last run */
    vm_record_put(cpu, (vm_log_event){ .type = VM_LOG_END, .check = vm_replay_check(cpu), .a = vm_ram_sum(m),
                                       .b = vm_cpu_sum(cpu) });
    int status = rp->status, written = vm_log_finish(&rp->w);
    status = status ? status : written;
    return status ? vm_fail(status, "vm_record_stop: the log is not complete: %s", vm_strerror(status)) : VM_OK;
}

int vm_replay_end(vm_machine *m, vm_replay_mode mode)
{
    vm_vcpu *cpu = m->vcpus[0];
    bool is_recording = mode == VM_REPLAY_RECORDING;
    if (!m->replay || m->replay->mode != mode)
        return vm_fail(VM_E_INVALID, is_recording ? "vm_record_stop: the machine does not record"
                                                  : "vm_replay_stop: the machine does not replay");
    if (!vm_replay_claim(cpu))
        return vm_fail(VM_E_BUSY, "vm_%s_stop: the vCPU is running", is_recording ? "record" : "replay");
    int status = is_recording ? end_record(m) : VM_OK;
    leave(m);
    vm_clock_virtual(m, false);
    vm_vcpu_notify(cpu, X86_ATT_EVENT | X86_ATT_IRQ);
    vm_vcpu_release(cpu);
    return status;
}

void vm_replay_free(vm_machine *m)
{
    struct vm_replay *rp = m->replay_kept;
    if (!rp)
        return;
    leave(m);
    pthread_cond_destroy(&rp->done);
    pthread_mutex_destroy(&rp->lock);
    free(rp);
    m->replay_kept = NULL;
}

void vm_replay_look(vm_machine *m, vm_replay_info *info)
{
    const struct vm_replay *rp = m->replay;
    if (!rp)
        return;
    bool is_playing = rp->mode == VM_REPLAY_PLAYING;
    info->mode = rp->mode;
    info->position = vm_replay_position(m->vcpus[0]);
    info->end = is_playing ? rp->log.end : info->position;
    info->events = is_playing ? rp->log.count : rp->w.events;
    info->bytes = is_playing ? rp->log.size : rp->w.written + rp->w.used;
    info->status = rp->status;
    info->at_end = rp->at_end;
}
