/* reverse.c - going back in time on machines whose runs repeat exactly.
 *
 * On the way forward the machine is photographed at least every reverse_interval instructions. Going back restores the
 * last photograph before the wanted instruction count and runs forward to just there: vm_vcpu_retired() is the clock. When
 * the album is full every second picture is taken out, so the whole way stays covered, more coarsely.
 *
 * A PC repeats itself only while it replays a recording; what its snapshots then remember is their place in the log.
 *
 * What the debugger writes is not part of what a re-run does: after an edit history begins anew (is_edited). Callbacks of
 * the program are called again on a re-run and must answer as they did.
 */
#include "core/replay.h"
#include "gdb/gdb.h"

#include <string.h>

bool gdb_replays(const vm_machine *m)
{
    return m->replay && m->replay->mode == VM_REPLAY_PLAYING;
}

bool gdb_repeats(const vm_machine *m)
{
    return (!m->is_pc || gdb_replays(m)) && m->vcpu_count == 1 && vm_machine_backend(m) != VM_BACKEND_KVM;
}

bool gdb_can_reverse(const gdb *g)
{
    return g->options.reverse_interval != 0 && gdb_repeats(g->m);
}

static uint64_t clock_of(const gdb *g)
{
    return vm_vcpu_retired(g->cpus[0].cpu);
}

static void forget_from(gdb *g, unsigned first)
{
    while (g->history_count > first)
        vm_snapshot_free(g->history[--g->history_count].snapshot);
}

void gdb_history_forget(gdb *g)
{
    forget_from(g, 0);
}

static void thin_out(gdb *g)
{
    unsigned kept = 1;
    for (unsigned i = 1; i < g->history_count; i++)
        if (i & 1)
            vm_snapshot_free(g->history[i].snapshot);
        else
            g->history[kept++] = g->history[i];
    g->history_count = kept;
}

/* No memory for a picture is no error: one goes back further and runs longer. */
void gdb_history_add(gdb *g)
{
    gdb_moment now = { .retired = clock_of(g) };
    if (!gdb_can_reverse(g) || (g->history_count && g->history[g->history_count - 1].retired >= now.retired))
        return;
    if (g->history_count == GDB_HISTORY)
        thin_out(g);
    if (vm_snapshot_take(g->m, &now.snapshot) == VM_OK)
        g->history[g->history_count++] = now;
}

void gdb_history_begin(gdb *g)
{
    if (!gdb_can_reverse(g))
        return;
    if (g->is_edited)
        gdb_history_forget(g);
    g->is_edited = false;
    uint64_t now = clock_of(g);
    unsigned kept = g->history_count;
    while (kept && g->history[kept - 1].retired > now)                /* another future */
        kept--;
    forget_from(g, kept);
    if (!kept || now - g->history[kept - 1].retired >= g->options.reverse_interval)
        gdb_history_add(g);
}

/* ---- running again ---- */

#define LOOK_AROUND UINT64_C(5000000)  /* instructions between looks at what the debugger wants */

/* Run to instruction count `target`, over breakpoints; *last: the count at the last breakpoint or watchpoint on the way,
 * before target; UINT64_MAX: none. */
static gdb_back run_to(gdb *g, uint64_t target, uint64_t *last)
{
    gdb_cpu *c = &g->cpus[0];
    uint64_t now;
    *last = UINT64_MAX;
    while ((now = clock_of(g)) < target) {
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        o.max_instructions = target - now < LOOK_AROUND ? target - now : LOOK_AROUND;
        o.exception_exits = g->exception_exits;
        if (gdb_must_leave(g) || vm_vcpu_run(c->cpu, &o, &c->exit) != VM_OK)
            return GDB_BACK_STOPPED;
        if (c->exit.reason == VM_EXIT_BREAKPOINT && clock_of(g) < target)
            *last = clock_of(g);
        if (c->exit.reason != VM_EXIT_BREAKPOINT && c->exit.reason != VM_EXIT_BUDGET && c->exit.reason != VM_EXIT_KICK &&
            gdb_judge(c) != GDB_EVENT_NONE)
            return GDB_BACK_STOPPED;
    }
    return GDB_BACK_DONE;
}

/* The last picture from before `when`, restored; NULL: none. */
static gdb_moment *go_before(gdb *g, uint64_t when)
{
    unsigned i = g->is_edited ? 0 : g->history_count;
    while (i && g->history[i - 1].retired >= when)
        i--;
    if (!i || vm_snapshot_restore(g->m, g->history[i - 1].snapshot) != VM_OK)
        return NULL;
    return &g->history[i - 1];
}

gdb_back gdb_back_step(gdb *g)
{
    uint64_t now = clock_of(g), ignored;
    return go_before(g, now) ? run_to(g, now - 1, &ignored) : GDB_BACK_BEGIN;
}

gdb_back gdb_back_continue(gdb *g)
{
    uint64_t end = clock_of(g), last = UINT64_MAX, ignored;
    gdb_moment *from;
    while ((from = go_before(g, end)) != NULL) {
        gdb_back how = run_to(g, end, &last);
        if (how != GDB_BACK_DONE)
            return how;
        if (last != UINT64_MAX)
            break;
        end = from->retired;
    }
    if (!from) {                       /* nothing on the whole way: to its beginning */
        if (!g->is_edited && g->history_count)
            (void)vm_snapshot_restore(g->m, g->history[0].snapshot);
        return GDB_BACK_BEGIN;
    }
    if (vm_snapshot_restore(g->m, from->snapshot) != VM_OK)
        return GDB_BACK_STOPPED;
    gdb_back how = run_to(g, last, &ignored);
    return how == GDB_BACK_DONE ? GDB_BACK_BREAK : how;
}
