/* command.c - what each packet of the debugger does. The machine is at rest whenever a packet is looked at.
 *
 * A command is found by the longest prefix in a table and gets the rest of the packet, which ends with a NUL. An unknown
 * one is answered with an empty packet, a malformed one with E01, what failed with E14 (addresses) or E16 (busy) or E22.
 */
#include "gdb/gdb.h"

#include <string.h>
#include <sys/eventfd.h>

typedef struct command { const char *prefix; void (*run)(gdb *g, const char *rest, size_t count); } command;
#define BAD "E01"

static vm_vcpu *cpu_of(const gdb *g)
{
    return g->cpus[g->general].cpu;
}

static void ok(gdb *g)
{
    gdb_answer(g, "OK");
}

/* ---- registers ---- */

static void read_all(gdb *g, const char *rest, size_t count)
{
    gdb_state s;
    uint8_t bytes[16];
    (void)rest, (void)count;
    if (gdb_get_state(cpu_of(g), &s) != VM_OK) {
        gdb_answer(g, "E16");
        return;
    }
    gdb_clear(&g->answer);
    for (unsigned i = 0, n; (n = gdb_register_bytes(g, i)) != 0; i++) {
        gdb_register_get(g, &s, i, bytes);
        gdb_put_hex(&g->answer, bytes, n);
    }
    gdb_send(g);
}

static void store(gdb *g, const gdb_state *before, const gdb_state *s)
{
    if (gdb_set_state(cpu_of(g), before, s) == VM_OK) {
        g->is_edited = true;
        ok(g);
    } else {
        gdb_answer(g, "E22");
    }
}

static void write_all(gdb *g, const char *rest, size_t count)
{
    gdb_state before, s;
    uint8_t bytes[16];
    if (gdb_get_state(cpu_of(g), &before) != VM_OK) {
        gdb_answer(g, "E16");
        return;
    }
    s = before;
    for (unsigned i = 0, n; (n = gdb_register_bytes(g, i)) != 0 && count; i++, rest += 2 * n, count -= 2 * n) {
        if (count < 2 * n || !gdb_bytes(rest, bytes, n)) {
            gdb_answer(g, BAD);
            return;
        }
        gdb_register_set(g, &s, i, bytes);
    }
    store(g, &before, &s);
}

static void read_one(gdb *g, const char *rest, size_t count)
{
    gdb_state s;
    uint64_t number;
    uint8_t bytes[16];
    (void)count;
    if (!gdb_hex(&rest, &number) || *rest || number >= gdb_register_count(g)) {
        gdb_answer(g, BAD);
        return;
    }
    if (gdb_get_state(cpu_of(g), &s) != VM_OK) {
        gdb_answer(g, "E16");
        return;
    }
    gdb_clear(&g->answer);
    gdb_register_get(g, &s, (unsigned)number, bytes);
    gdb_put_hex(&g->answer, bytes, gdb_register_bytes(g, (unsigned)number));
    gdb_send(g);
}

static void write_one(gdb *g, const char *rest, size_t count)
{
    gdb_state before, s;
    uint64_t number;
    uint8_t bytes[16];
    (void)count;
    if (!gdb_hex(&rest, &number) || *rest++ != '=' || number >= gdb_register_count(g) ||
        strlen(rest) != 2 * gdb_register_bytes(g, (unsigned)number) ||
        !gdb_bytes(rest, bytes, gdb_register_bytes(g, (unsigned)number))) {
        gdb_answer(g, BAD);
        return;
    }
    if (gdb_get_state(cpu_of(g), &before) != VM_OK) {
        gdb_answer(g, "E16");
        return;
    }
    s = before;
    gdb_register_set(g, &s, (unsigned)number, bytes);
    store(g, &before, &s);
}

/* ---- memory ---- */

static int copy(gdb *g, uint64_t address, void *bytes, size_t n, bool is_write)
{
    if (g->is_physical)
        return is_write ? vm_write(g->m, address, bytes, n) : vm_read(g->m, address, bytes, n);
    return is_write ? vm_vcpu_write(cpu_of(g), address, bytes, n) : vm_vcpu_read(cpu_of(g), address, bytes, n);
}

/* As much as there is, page by page; the debugger asks for the rest and learns that it is not there. */
static size_t read_some(gdb *g, uint64_t address, uint8_t *bytes, size_t n)
{
    size_t done = 0;
    while (done < n) {
        size_t part = 4096 - (size_t)((address + done) & 4095);
        part = part < n - done ? part : n - done;
        if (copy(g, address + done, bytes + done, part, false) != VM_OK)
            break;
        done += part;
    }
    return done;
}

static void read_memory(gdb *g, const char *rest, size_t count)
{
    static const size_t most = (GDB_PACKET - 16) / 2;
    uint8_t bytes[(GDB_PACKET - 16) / 2];
    uint64_t address, n;
    (void)count;
    if (!gdb_hex(&rest, &address) || *rest++ != ',' || !gdb_hex(&rest, &n) || *rest) {
        gdb_answer(g, BAD);
        return;
    }
    size_t got = read_some(g, address, bytes, n < most ? (size_t)n : most);
    if (n && !got) {
        gdb_answer(g, "E14");
        return;
    }
    gdb_clear(&g->answer);
    gdb_put_hex(&g->answer, bytes, got);
    gdb_send(g);
}

static bool parse_target(const char **rest, uint64_t *address, uint64_t *n)
{
    return gdb_hex(rest, address) && *(*rest)++ == ',' && gdb_hex(rest, n) && *(*rest)++ == ':';
}

static void finish_write(gdb *g, uint64_t address, uint8_t *bytes, size_t n)
{
    if (!n || copy(g, address, bytes, n, true) == VM_OK)
        ok(g);
    else
        gdb_answer(g, "E14");
    g->is_edited |= n != 0 && !gdb_replays(g->m);  /* part of it may have been written */
}

static void write_memory(gdb *g, const char *rest, size_t count)
{
    uint8_t bytes[GDB_PACKET / 2];
    uint64_t address, n;
    (void)count;
    if (!parse_target(&rest, &address, &n) || n > sizeof bytes || strlen(rest) != 2 * n ||
        !gdb_bytes(rest, bytes, (size_t)n))
        gdb_answer(g, BAD);
    else
        finish_write(g, address, bytes, (size_t)n);
}

static void write_binary(gdb *g, const char *rest, size_t count)
{
    const char *start = rest;
    uint64_t address, n;
    if (!parse_target(&rest, &address, &n) || n != count - (size_t)(rest - start))
        gdb_answer(g, BAD);
    else
        finish_write(g, address, (uint8_t *)(uintptr_t)rest, (size_t)n);
}

/* ---- breakpoints and watchpoints ---- */

static vm_prot prot_of(char type)
{
    return type == '2' ? VM_PROT_W : type == '3' ? VM_PROT_R : VM_PROT_RW;
}

static int set_point(gdb *g, const gdb_point *p, bool on)
{
    return p->type <= '1' ? vm_breakpoint(g->m, p->address, on)
                          : vm_watchpoint(g->m, p->address, p->bytes, prot_of(p->type), on);
}

/* Both kinds of breakpoint are one here, so another of ours may stand in the same place. */
static bool is_same_place(const gdb_point *a, const gdb_point *b)
{
    return a->address == b->address && (a->type <= '1' ? b->type <= '1' : a->type == b->type && a->bytes == b->bytes);
}

static gdb_point *find_point(gdb *g, const gdb_point *p)
{
    for (unsigned i = 0; i < g->point_count; i++)
        if (g->points[i].type == p->type && g->points[i].address == p->address && g->points[i].bytes == p->bytes)
            return &g->points[i];
    return NULL;
}

static void drop_point(gdb *g, gdb_point *p)
{
    gdb_point gone = *p, *heir = NULL;
    *p = g->points[--g->point_count];
    for (unsigned i = 0; i < g->point_count && gone.is_ours && !heir; i++)
        if (is_same_place(&g->points[i], &gone))
            heir = &g->points[i];
    if (heir)
        heir->is_ours = true;
    else if (gone.is_ours)
        (void)set_point(g, &gone, false);
}

void gdb_clear_points(gdb *g)
{
    while (g->point_count)
        drop_point(g, &g->points[g->point_count - 1]);
}

static bool parse_point(const char *rest, gdb_point *p)
{
    *p = (gdb_point){ .type = *rest };
    if (*rest < '0' || *rest > '4' || rest[1] != ',')
        return false;
    rest += 2;
    return gdb_hex(&rest, &p->address) && *rest++ == ',' && gdb_hex(&rest, &p->bytes) && (!*rest || *rest == ';');
}

static void insert(gdb *g, const char *rest, size_t count)
{
    gdb_point p;
    (void)count;
    if (!parse_point(rest, &p)) {
        gdb_answer(g, BAD);
    } else if (find_point(g, &p)) {
        ok(g);
    } else if (g->point_count == GDB_POINTS) {
        gdb_answer(g, "E22");
    } else {
        int status = set_point(g, &p, true);
        p.is_ours = status == VM_OK;
        if (status == VM_OK || status == VM_E_EXISTS)
            g->points[g->point_count++] = p;
        gdb_answer(g, status == VM_OK || status == VM_E_EXISTS ? "OK" : status == VM_E_UNSUPPORTED ? "" : "E22");
    }
}

static void remove_point(gdb *g, const char *rest, size_t count)
{
    gdb_point p, *found;
    (void)count;
    if (!parse_point(rest, &p)) {
        gdb_answer(g, BAD);
        return;
    }
    if ((found = find_point(g, &p)) != NULL)
        drop_point(g, found);
    ok(g);
}

/* ---- threads ---- */

/* A thread id, 1 upwards; 0 and -1 (any, all) are told by *number = 0. */
static bool parse_thread(const gdb *g, const char **at, uint64_t *number)
{
    *number = 0;
    if (**at == 'p') {                 /* process and thread: there is one process, 1 */
        uint64_t process;
        ++*at;
        if (!gdb_hex(at, &process) || process > 1 || *(*at)++ != '.')
            return false;
    }
    if ((*at)[0] == '-' && (*at)[1] == '1') {
        *at += 2;
        return true;
    }
    return gdb_hex(at, number) && *number <= g->cpu_count;
}

static void choose_thread(gdb *g, const char *rest, size_t count)
{
    char what = *rest;
    uint64_t number;
    (void)count;
    if ((what != 'g' && what != 'c') || (rest++, !parse_thread(g, &rest, &number)) || *rest) {
        gdb_answer(g, BAD);
        return;
    }
    if (what == 'g' && number)
        g->general = (unsigned)number - 1;
    ok(g);
}

static void thread_lives(gdb *g, const char *rest, size_t count)
{
    uint64_t number;
    (void)count;
    gdb_answer(g, parse_thread(g, &rest, &number) && !*rest && number ? "OK" : BAD);
}

static void list_threads(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    gdb_clear(&g->answer);
    for (unsigned i = 0; i < g->cpu_count; i++)
        gdb_printf(&g->answer, "%c%x", i ? ',' : 'm', i + 1);
    gdb_send(g);
}

static void end_of_list(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    gdb_answer(g, "l");
}

static void current_thread(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    gdb_clear(&g->answer);
    gdb_printf(&g->answer, "QC%x", g->general + 1);
    gdb_send(g);
}

static void thread_info(gdb *g, const char *rest, size_t count)
{
    uint64_t number;
    gdb_text text = { 0 };
    vm_sregs s = VM_SREGS_INIT;
    (void)count;
    if (!parse_thread(g, &rest, &number) || *rest || !number) {
        gdb_answer(g, BAD);
        return;
    }
    const gdb_cpu *c = &g->cpus[number - 1];
    if (vm_vcpu_get_sregs(c->cpu, &s) == VM_OK)
        gdb_printf(&text, "vCPU %u, %s, CPL %u%s%s", (unsigned)number - 1,
                   s.efer & 0x400 ? "long mode" : s.cr0 & 1 ? "protected mode" : "real mode", s.cpl,
                   c->cpu->x86.halted ? ", halted" : "", c->cpu->is_parked ? ", waits for SIPI" : "");
    gdb_clear(&g->answer);
    gdb_put_hex(&g->answer, text.at, text.count);
    gdb_free_text(&text);
    gdb_send(g);
}

/* ---- stop replies ---- */

/* The watchpoint that an access touched, and an address in it: the access may have begun below. */
static const gdb_point *touched(const gdb *g, const vm_exit_debug *d, uint64_t *address)
{
    for (unsigned i = 0; i < g->point_count; i++) {
        const gdb_point *p = &g->points[i];
        if (p->type >= '2' && (prot_of(p->type) & d->access) && d->address - p->address < p->bytes) {
            *address = d->address;
            return p;
        }
        if (p->type >= '2' && (prot_of(p->type) & d->access) && p->address - d->address < d->bytes) {
            *address = p->address;
            return p;
        }
    }
    return NULL;
}

static void put_reason(gdb *g, const gdb_cpu *c)
{
    static const char *const names[] = { "watch", "rwatch", "awatch" };
    uint64_t address;
    const gdb_point *p;
    if (c->exit.reason == VM_EXIT_REPLAY && c->exit.replay.status == VM_OK)
        gdb_puts(&g->answer, "replaylog:end;");
    if (c->exit.reason != VM_EXIT_BREAKPOINT)
        return;
    if (c->exit.debug.is_watchpoint) {
        if ((p = touched(g, &c->exit.debug, &address)) != NULL)
            gdb_printf(&g->answer, "%s:%llx;", names[p->type - '2'], (unsigned long long)address);
        return;
    }
    for (unsigned i = 0; i < g->point_count; i++)
        if (g->points[i].type <= '1' && g->points[i].address == c->exit.debug.address) {
            if (g->points[i].type == '0' ? g->has_swbreak : g->has_hwbreak)
                gdb_puts(&g->answer, g->points[i].type == '0' ? "swbreak:;" : "hwbreak:;");
            return;
        }
}

static void put_stop(gdb *g, const gdb_cpu *c, const char *reason)
{
    gdb_clear(&g->answer);
    gdb_printf(&g->answer, "T%02x", g->last_signal);
    if (reason)
        gdb_puts(&g->answer, reason);
    else if (c)
        put_reason(g, c);
    gdb_printf(&g->answer, "thread:%x;", g->last_cpu + 1);
}

static void tell_stop(gdb *g, const gdb_cpu *c, const char *reason)
{
    bool is_owed = g->is_owed;
    g->is_owed = false;
    g->general = g->last_cpu;
    if (is_owed) {
        put_stop(g, c, reason);
        gdb_send(g);
    }
}

void gdb_report(gdb *g, gdb_cpu *c)
{
    if (c) {
        g->last_cpu = (unsigned)(c - g->cpus);
        g->last_signal = c->signal;
        c->event = GDB_EVENT_NONE;
    }
    tell_stop(g, c, NULL);
}

void gdb_report_end(gdb *g, const vm_exit *exit)
{
    unsigned code = exit->reason == VM_EXIT_GUEST_EXIT ? (unsigned)(exit->guest_exit.code & 0xff) : 0;
    gdb_clear(&g->answer);
    gdb_printf(&g->answer, exit->reason == VM_EXIT_INTERNAL ? "X06" : "W%02x", code);
    if (g->is_owed)
        gdb_send(g);
    g->is_owed = false;
}

static void why_stopped(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    put_stop(g, NULL, NULL);
    gdb_send(g);
}

/* ---- going on ---- */

/* An event that no one was told of: another vCPU's was first. Still true if nothing was moved meanwhile. */
static gdb_cpu *left_to_tell(gdb *g)
{
    gdb_cpu *c;
    while ((c = gdb_next_event(g)) != NULL) {
        const gdb_point p = { .type = '0', .address = c->rip };
        bool is_there = false;
        for (unsigned i = 0; i < g->point_count; i++)
            is_there |= is_same_place(&g->points[i], &p);
        bool is_break = c->exit.reason == VM_EXIT_BREAKPOINT && !c->exit.debug.is_watchpoint;
        bool is_movable = c->event == GDB_EVENT_STOP || c->event == GDB_EVENT_END;
        if (!is_movable || (gdb_pc(c->cpu) == c->rip && (!is_break || is_there)))
            return c;
        c->event = GDB_EVENT_NONE;
    }
    return NULL;
}

void gdb_resume(gdb *g)
{
    gdb_cpu *c = left_to_tell(g);
    if (c && c->event == GDB_EVENT_STOP) {
        gdb_report(g, c);
    } else if (c) {                    /* an end or a reset while a debugger came: the serving thread's to deal with */
        g->is_running = true;
        (void)eventfd_write(g->wake, 1);
    } else {
        gdb_history_begin(g);
        gdb_go(g);
    }
}

static void order_all(gdb *g, gdb_order order)
{
    for (unsigned i = 0; i < g->cpu_count; i++)
        g->cpus[i].order = order;
}

static void resume(gdb *g)
{
    g->is_owed = true;
    gdb_resume(g);
}

/* Old style: c, s, C, S with an address to go on at, which moves the current thread there. */
static bool go_to(gdb *g, const char *rest)
{
    gdb_state before, s;
    uint64_t address;
    uint8_t bytes[8] = { 0 };
    if (!*rest)
        return true;
    if (!gdb_hex(&rest, &address) || *rest || gdb_get_state(cpu_of(g), &before) != VM_OK)
        return false;
    s = before;
    memcpy(bytes, &address, 8);
    gdb_register_set(g, &s, gdb_pc_number(g), bytes);
    bool is_set = gdb_set_state(cpu_of(g), &before, &s) == VM_OK;
    g->is_edited |= is_set;
    return is_set;
}

static void old_continue(gdb *g, const char *rest, size_t count)
{
    (void)count;
    if (!go_to(g, rest)) {
        gdb_answer(g, BAD);
        return;
    }
    order_all(g, GDB_CONTINUE);
    resume(g);
}

static void old_step(gdb *g, const char *rest, size_t count)
{
    (void)count;
    if (!go_to(g, rest)) {
        gdb_answer(g, BAD);
        return;
    }
    order_all(g, GDB_STAY);
    g->cpus[g->general].order = GDB_STEP;
    resume(g);
}

static const char *after_signal(const char *rest)
{
    uint64_t ignored;
    if (!gdb_hex(&rest, &ignored) || (*rest && *rest != ';'))
        return NULL;
    return *rest ? rest + 1 : rest;
}

static void old_continue_signal(gdb *g, const char *rest, size_t count)
{
    const char *address = after_signal(rest);
    if (address)
        old_continue(g, address, count);
    else
        gdb_answer(g, BAD);
}

static void old_step_signal(gdb *g, const char *rest, size_t count)
{
    const char *address = after_signal(rest);
    if (address)
        old_step(g, address, count);
    else
        gdb_answer(g, BAD);
}

typedef struct action { gdb_order order; uint64_t low, high, thread; } action;

/* One of `;c` `;C05` `;s` `;S05` `;r10,20`, each with `:thread` or without. Signals are the host system's and mean nothing
 * to a machine. */
static bool parse_action(gdb *g, const char **at, action *a)
{
    char what = **at;
    uint64_t ignored;
    *a = (action){ .order = what == 'c' || what == 'C' ? GDB_CONTINUE : what == 'r' ? GDB_RANGE : GDB_STEP };
    if (!what || !strchr("cCsSr", what))
        return false;
    ++*at;
    if ((what == 'C' || what == 'S') && !gdb_hex(at, &ignored))
        return false;
    if (what == 'r' && (!gdb_hex(at, &a->low) || *(*at)++ != ',' || !gdb_hex(at, &a->high)))
        return false;
    if (**at == ':' && (++*at, !parse_thread(g, at, &a->thread)))
        return false;
    return !**at || **at == ';';
}

static void apply(gdb *g, const action *a)
{
    for (unsigned i = 0; i < g->cpu_count; i++) {
        gdb_cpu *c = &g->cpus[i];
        if (c->order == GDB_STAY && (!a->thread || a->thread == i + 1)) {
            c->order = a->order;
            c->low = a->low;
            c->high = a->high;
        }
    }
}

static void vcont(gdb *g, const char *rest, size_t count)
{
    bool is_any = false;
    (void)count;
    order_all(g, GDB_STAY);
    while (*rest == ';') {
        action a;
        ++rest;
        if (!parse_action(g, &rest, &a)) {
            gdb_answer(g, BAD);
            return;
        }
        apply(g, &a);                  /* the first that names a thread counts */
    }
    for (unsigned i = 0; i < g->cpu_count; i++)
        is_any |= g->cpus[i].order != GDB_STAY;
    if (*rest || !is_any)
        gdb_answer(g, BAD);
    else
        resume(g);
}

static void vcont_kinds(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    gdb_answer(g, "vCont;c;C;s;S;r");
}

static void back(gdb *g, gdb_back (*how)(gdb *g))
{
    if (!gdb_can_reverse(g)) {
        gdb_answer(g, "E22");
        return;
    }
    gdb_back end = how(g);
    g->last_cpu = 0;
    g->last_signal = end == GDB_BACK_STOPPED ? 2 : 5;
    g->is_owed = true;
    if (end == GDB_BACK_BREAK) {
        g->cpus[0].signal = 5;
        gdb_report(g, &g->cpus[0]);
    } else {
        tell_stop(g, NULL, end == GDB_BACK_BEGIN ? "replaylog:begin;" : "");
    }
}

static void back_step(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    back(g, gdb_back_step);
}

static void back_continue(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    back(g, gdb_back_continue);
}

/* ---- the session ---- */

static void supported(gdb *g, const char *rest, size_t count)
{
    (void)count;
    g->has_swbreak = strstr(rest, "swbreak+") != NULL;
    g->has_hwbreak = strstr(rest, "hwbreak+") != NULL;
    gdb_clear(&g->answer);
    gdb_printf(&g->answer, "PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;qXfer:memory-map:read+;vContSupported+;"
                           "swbreak+;hwbreak+%s", GDB_PACKET, gdb_can_reverse(g) ? ";ReverseStep+;ReverseContinue+" : "");
    gdb_send(g);
}

static void no_ack(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    g->next_no_ack = true;
    ok(g);
}

static void detach(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    ok(g);
    g->is_gone = true;
}

static void kill_it(gdb *g, const char *rest, size_t count)
{
    (void)count;
    if (*rest == ';')
        ok(g);
    g->is_over = true;
    g->end = (vm_exit)VM_EXIT_INIT;
    g->end.reason = VM_EXIT_KICK;
}

static void empty(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    gdb_answer(g, "");
}

static void attached(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    gdb_answer(g, "1");
}

static void symbols(gdb *g, const char *rest, size_t count)
{
    (void)rest, (void)count;
    ok(g);
}

/* OFFSET,LENGTH of a text that is sent in pieces. */
static void send_piece(gdb *g, const gdb_text *text, const char *rest)
{
    uint64_t offset, n;
    if (!gdb_hex(&rest, &offset) || *rest++ != ',' || !gdb_hex(&rest, &n) || *rest || text->is_cut) {
        gdb_answer(g, BAD);
        return;
    }
    size_t left = offset < text->count ? text->count - (size_t)offset : 0;
    size_t most = GDB_PACKET / 2;      /* escapes may double it */
    size_t part = n < most ? (size_t)n : most;
    part = part < left ? part : left;
    gdb_clear(&g->answer);
    gdb_puts(&g->answer, part < left ? "m" : "l");
    if (part)
        gdb_put(&g->answer, text->at + offset, part);
    gdb_send(g);
}

static void features(gdb *g, const char *rest, size_t count)
{
    (void)count;
    if (strncmp(rest, "target.xml:", 11)) {
        gdb_answer(g, "E00");
        return;
    }
    send_piece(g, &g->xml, rest + 11);
}

/* What is linear is what the debugger addresses: the machine's map can be told only as long as no vCPU can make linear
 * addresses something else. */
static bool has_plain_map(const gdb *g)
{
    bool is_plain = !g->m->is_pc;
    for (unsigned i = 0; i < g->cpu_count; i++) {
        vm_sregs s = VM_SREGS_INIT;
        is_plain &= vm_vcpu_get_sregs(g->cpus[i].cpu, &s) == VM_OK && (!(s.cr0 & 0x80000000u) || g->cpus[i].cpu->x86.flat);
    }
    return is_plain;
}

static void memory_map(gdb *g, const char *rest, size_t count)
{
    gdb_text map = { 0 };
    (void)count;
    gdb_puts(&map, "<?xml version=\"1.0\"?><memory-map>");
    vm_machine_lock(g->m);
    for (size_t i = 0; has_plain_map(g) && i < g->m->view.count; i++) {
        const vm_range *r = &g->m->view.ranges[i];
        if (r->region->kind <= VM_REGION_FILE)
            gdb_printf(&map, "<memory type=\"ram\" start=\"0x%llx\" length=\"0x%llx\"/>", (unsigned long long)r->gpa,
                       (unsigned long long)r->bytes);
    }
    vm_machine_unlock(g->m);
    if (!has_plain_map(g))
        gdb_puts(&map, "<memory type=\"ram\" start=\"0x0\" length=\"0x8000000000000000\"/>"
                       "<memory type=\"ram\" start=\"0x8000000000000000\" length=\"0x8000000000000000\"/>");
    gdb_puts(&map, "</memory-map>");
    send_piece(g, &map, rest);
    gdb_free_text(&map);
}

/* The answer goes out as console output, in pieces, then OK. */
static void monitor(gdb *g, const char *rest, size_t count)
{
    char line[256];
    gdb_text text = { 0 };
    if (count % 2 || count / 2 >= sizeof line || !gdb_bytes(rest, line, count / 2)) {
        gdb_answer(g, BAD);
        return;
    }
    line[count / 2] = 0;
    gdb_monitor(g, line, &text);
    for (size_t done = 0; done < text.count;) {
        size_t part = text.count - done < GDB_PACKET / 4 ? text.count - done : GDB_PACKET / 4;
        gdb_clear(&g->answer);
        gdb_puts(&g->answer, "O");
        gdb_put_hex(&g->answer, text.at + done, part);
        gdb_send(g);
        done += part;
    }
    gdb_free_text(&text);
    ok(g);
}

/* A prefix comes before what is a prefix of it. */
static const command commands[] = {
    { "?", why_stopped }, { "g", read_all }, { "G", write_all }, { "p", read_one }, { "P", write_one },
    { "m", read_memory }, { "M", write_memory }, { "X", write_binary }, { "Z", insert }, { "z", remove_point },
    { "H", choose_thread }, { "T", thread_lives }, { "c", old_continue }, { "C", old_continue_signal },
    { "s", old_step }, { "S", old_step_signal }, { "bs", back_step }, { "bc", back_continue },
    { "D", detach }, { "k", kill_it }, { "vKill", kill_it }, { "vCont?", vcont_kinds }, { "vCont", vcont },
    { "vMustReplyEmpty", empty }, { "qSupported", supported }, { "QStartNoAckMode", no_ack },
    { "qfThreadInfo", list_threads }, { "qsThreadInfo", end_of_list }, { "qThreadExtraInfo,", thread_info },
    { "qAttached", attached }, { "qSymbol:", symbols }, { "qXfer:features:read:", features },
    { "qXfer:memory-map:read::", memory_map }, { "qRcmd,", monitor }, { "qC", current_thread },
};

void gdb_command(gdb *g, const char *packet, size_t count)
{
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        size_t n = strlen(commands[i].prefix);
        bool is_word = commands[i].prefix[0] == 'q' && n == 2;         /* qC, not qCRC */
        if (count >= n && !memcmp(packet, commands[i].prefix, n) && (!is_word || count == n)) {
            commands[i].run(g, packet + n, count - n);
            return;
        }
    }
    gdb_answer(g, "");
}
