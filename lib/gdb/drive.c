/* drive.c - the vCPUs' threads. A thread waits for an order, runs its vCPU until something is to be told or all shall
 * halt, and says so through the eventfd that the serving thread sleeps on. */
#include "gdb/gdb.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

/* ---- what an exit means ---- */

static const struct { uint8_t vector, signal; } exception_signals[] = {
    { 0, 8 }, { 1, 5 }, { 3, 5 }, { 4, 8 }, { 5, 11 }, { 6, 4 }, { 7, 8 }, { 9, 11 }, { 10, 11 }, { 11, 11 }, { 12, 11 },
    { 13, 11 }, { 14, 11 }, { 16, 8 }, { 17, 7 }, { 19, 8 },
};

static int signal_of(const vm_exit *e)
{
    if (e->reason == VM_EXIT_UNMAPPED || e->reason == VM_EXIT_SHUTDOWN || e->reason == VM_EXIT_VIOLATION)
        return 11;
    for (size_t i = 0; e->reason == VM_EXIT_EXCEPTION && i < sizeof exception_signals / sizeof *exception_signals; i++)
        if (exception_signals[i].vector == e->exception.vector)
            return exception_signals[i].signal;
    return 5;
}

static gdb_event default_event(const vm_exit *e)
{
    switch (e->reason) {
    case VM_EXIT_HALT: case VM_EXIT_POWEROFF: case VM_EXIT_GUEST_EXIT: case VM_EXIT_INTERNAL: return GDB_EVENT_END;
    case VM_EXIT_RESET: return GDB_EVENT_RESET;
    default: return GDB_EVENT_STOP;
    }
}

static bool is_stubs_own(const vm_exit *e)
{
    return e->reason == VM_EXIT_BREAKPOINT || e->reason == VM_EXIT_STEP || e->reason == VM_EXIT_BUDGET ||
           e->reason == VM_EXIT_KICK;
}

gdb_event gdb_judge(gdb_cpu *c)
{
    gdb *g = c->g;
    vm_gdb_action action = VM_GDB_DEFAULT;
    c->signal = signal_of(&c->exit);
    if (g->options.on_exit && !is_stubs_own(&c->exit)) {
        pthread_mutex_lock(&g->exit_lock);
        action = g->options.on_exit(g->options.user, c->cpu, &c->exit);
        pthread_mutex_unlock(&g->exit_lock);
    }
    switch (action) {
    case VM_GDB_RUN: return GDB_EVENT_NONE;
    case VM_GDB_STOP: return GDB_EVENT_STOP;
    case VM_GDB_END: return GDB_EVENT_END;
    default: return default_event(&c->exit);
    }
}

/* ---- a thread ---- */

static void options_of(const gdb_cpu *c, vm_run_options *o)
{
    *o = (vm_run_options)VM_RUN_OPTIONS_INIT;
    o->single_step = c->order >= GDB_STEP;
    o->max_instructions = o->single_step ? 0 : c->g->options.reverse_interval;
    o->exception_exits = c->g->exception_exits;
    o->has_signal_blocked = true;      /* all are, in these threads */
}

static bool is_in_range(const gdb_cpu *c)
{
    uint64_t pc = gdb_pc(c->cpu);
    return c->order == GDB_RANGE && pc >= c->low && pc < c->high;
}

static gdb_event failed(gdb_cpu *c, int status)
{
    c->status = status;
    snprintf(c->message, sizeof c->message, "%s", vm_errmsg());
    return GDB_EVENT_FAILED;
}

/* Interrupts wait while a vCPU is stepped, or each step would end in a handler; but a halted one needs them. */
gdb_event gdb_turn(gdb_cpu *c)
{
    vm_run_options o;
    options_of(c, &o);
    c->cpu->holds_interrupts = o.single_step && !c->cpu->x86.halted;
    int status = vm_vcpu_run(c->cpu, &o, &c->exit);
    c->cpu->holds_interrupts = false;
    if (status != VM_OK)
        return failed(c, status);
    if (c->exit.reason == VM_EXIT_BUDGET)
        gdb_history_add(c->g);
    else if (c->exit.reason != VM_EXIT_KICK && !(c->exit.reason == VM_EXIT_STEP && is_in_range(c)))
        return gdb_judge(c);
    return GDB_EVENT_NONE;
}

/* One order, to its end. */
static gdb_event carry_out(gdb_cpu *c)
{
    gdb_event event = GDB_EVENT_NONE;
    while (event == GDB_EVENT_NONE && !c->g->is_halting)
        event = gdb_turn(c);
    return event;
}

static void *cpu_thread(void *arg)
{
    gdb_cpu *c = arg;
    gdb *g = c->g;
    pthread_mutex_lock(&g->lock);
    for (;;) {
        while (c->state == GDB_IDLE)
            pthread_cond_wait(&g->changed, &g->lock);
        if (c->state == GDB_LEAVE)
            break;
        pthread_mutex_unlock(&g->lock);
        gdb_event event = carry_out(c);
        uint64_t rip = gdb_pc(c->cpu);
        pthread_mutex_lock(&g->lock);
        c->event = event;
        c->rip = rip;
        c->sequence = g->sequence++;
        if (c->state == GDB_ORDERED)
            c->state = GDB_IDLE;
        pthread_cond_broadcast(&g->changed);
        (void)eventfd_write(g->wake, 1);
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

bool gdb_start_threads(gdb *g)
{
    sigset_t all, old;
    bool is_ok = true;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (unsigned i = 0; i < g->cpu_count && is_ok; i++) {
        gdb_cpu *c = &g->cpus[i];
        c->state = GDB_IDLE;
        c->event = GDB_EVENT_NONE;
        errno = pthread_create(&c->thread, NULL, cpu_thread, c);
        c->has_thread = is_ok = errno == 0;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return is_ok;
}

void gdb_end_threads(gdb *g)
{
    gdb_halt(g);
    pthread_mutex_lock(&g->lock);
    for (unsigned i = 0; i < g->cpu_count; i++)
        g->cpus[i].state = GDB_LEAVE;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
    for (unsigned i = 0; i < g->cpu_count; i++) {
        if (g->cpus[i].has_thread)
            pthread_join(g->cpus[i].thread, NULL);
        g->cpus[i].has_thread = false;
    }
}

/* ---- all of them ---- */

void gdb_go(gdb *g)
{
    pthread_mutex_lock(&g->lock);
    g->is_halting = false;
    g->is_running = true;
    for (unsigned i = 0; i < g->cpu_count; i++) {
        g->cpus[i].event = GDB_EVENT_NONE;
        if (g->cpus[i].order != GDB_STAY)
            g->cpus[i].state = GDB_ORDERED;
    }
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

/* A kick that meets a vCPU on its way back stays and costs its next run one empty turn. */
void gdb_halt(gdb *g)
{
    pthread_mutex_lock(&g->lock);
    g->is_halting = true;
    for (unsigned i = 0; i < g->cpu_count; i++)
        if (g->cpus[i].state == GDB_ORDERED)
            vm_vcpu_kick(g->cpus[i].cpu);
    for (unsigned i = 0; i < g->cpu_count; i++)
        while (g->cpus[i].state == GDB_ORDERED)
            pthread_cond_wait(&g->changed, &g->lock);
    g->is_running = false;
    pthread_mutex_unlock(&g->lock);
}

/* Ends before resets before stops; among equals the first that happened. */
gdb_cpu *gdb_next_event(gdb *g)
{
    gdb_cpu *best = NULL;
    pthread_mutex_lock(&g->lock);
    for (unsigned i = 0; i < g->cpu_count; i++) {
        gdb_cpu *c = &g->cpus[i];
        if (c->state == GDB_IDLE && c->event != GDB_EVENT_NONE &&
            (!best || c->event > best->event || (c->event == best->event && (int)(c->sequence - best->sequence) < 0)))
            best = c;
    }
    pthread_mutex_unlock(&g->lock);
    return best;
}
