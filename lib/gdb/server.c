/* server.c - the public functions of the GDB stub: the listening socket, one connection at a time, and the loop that waits
 * for the debugger, for the vCPUs and for vm_gdb_stop() at once. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "api/api.h"
#include "gdb/gdb.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SEND_TIMEOUT 10000             /* ms that a debugger may leave its socket full */

/* ---- sending ---- */

static void send_all(gdb *g, const char *bytes, size_t count)
{
    while (count && !g->is_gone && g->connection >= 0) {
        ssize_t n = send(g->connection, bytes, count, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            bytes += n;
            count -= (size_t)n;
        } else if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            struct pollfd p = { .fd = g->connection, .events = POLLOUT };
            g->is_gone = g->is_stopped || poll(&p, 1, SEND_TIMEOUT) == 0;
        } else {
            g->is_gone = true;
        }
    }
}

void gdb_send(gdb *g)
{
    if (g->answer.is_cut) {
        gdb_clear(&g->answer);
        gdb_puts(&g->answer, "E0c");
    }
    gdb_clear(&g->out);
    gdb_frame(&g->out, g->answer.count ? g->answer.at : "", g->answer.count);
    if (g->out.is_cut)
        g->is_gone = true;             /* no memory for an answer */
    else
        send_all(g, g->out.at, g->out.count);
}

void gdb_answer(gdb *g, const char *text)
{
    gdb_clear(&g->answer);
    gdb_puts(&g->answer, text);
    gdb_send(g);
}

/* ---- the debugger comes and goes ---- */

static void all_continue(gdb *g)
{
    for (unsigned i = 0; i < g->cpu_count; i++) {
        g->cpus[i].order = GDB_CONTINUE;
        if (g->cpus[i].event == GDB_EVENT_STOP)
            g->cpus[i].event = GDB_EVENT_NONE;
    }
    gdb_resume(g);
}

static void settle_down(gdb *g)
{
    if (g->is_running)
        gdb_halt(g);
}

void gdb_drop(gdb *g)
{
    if (g->connection >= 0)
        close(g->connection);
    g->connection = -1;
    g->is_gone = g->is_owed = false;
}

static void leave(gdb *g)
{
    settle_down(g);
    gdb_drop(g);
    gdb_clear_points(g);
    g->exception_exits = 0;
    if (!g->is_over)
        all_continue(g);
}

static void greet(gdb *g, int fd)
{
    const int on = 1;
    settle_down(g);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    g->connection = fd;
    g->reader.state = GDB_OUTSIDE;
    gdb_clear(&g->out);
    g->no_ack = g->next_no_ack = g->has_swbreak = g->has_hwbreak = g->is_owed = g->is_gone = g->is_physical = false;
    g->general = g->last_cpu = 0;
    g->last_signal = 5;
    gdb_choose_arch(g);
    gdb_describe(g, &g->xml);
}

static void accept_one(gdb *g)
{
    int fd = accept4(g->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    if (g->connection >= 0)
        close(fd);                     /* one at a time */
    else
        greet(g, fd);
}

/* ---- what happened ---- */

int gdb_reset(gdb *g)
{
    return g->options.on_reset ? g->options.on_reset(g->options.user, g->m) : vm_reset(g->m);
}

static void fail(gdb *g, int status, const char *message)
{
    g->is_over = true;
    g->end_status = vm_fail(status, "vm_gdb_serve: %s", message);
}

static void do_reset(gdb *g, gdb_cpu *c)
{
    c->event = GDB_EVENT_NONE;
    g->is_edited = true;
    int status = gdb_reset(g);
    if (status == VM_OK)
        gdb_resume(g);
    else
        fail(g, status, "the machine's reset failed");
}

static void deal_with_event(gdb *g)
{
    if (!g->is_running || !gdb_next_event(g))
        return;
    gdb_halt(g);
    gdb_cpu *c = gdb_next_event(g);
    switch (c->event) {
    case GDB_EVENT_FAILED: fail(g, c->status, c->message); break;
    case GDB_EVENT_RESET: do_reset(g, c); break;
    case GDB_EVENT_END:
        gdb_report_end(g, &c->exit);
        g->is_over = true;
        g->end = c->exit;
        break;
    default: gdb_report(g, c);
    }
}

static void interrupt(gdb *g)
{
    if (!g->is_running)
        return;
    gdb_halt(g);
    if (gdb_next_event(g)) {           /* something else was first */
        g->is_running = true;
        deal_with_event(g);
        return;
    }
    g->last_signal = 2;
    g->last_cpu = g->general;
    gdb_report(g, NULL);
}

/* ---- receiving ---- */

static void take(gdb *g, gdb_got got)
{
    if (got == GDB_GOT_BREAK)
        interrupt(g);
    if (got == GDB_GOT_NAK && !g->no_ack && g->out.count)
        send_all(g, g->out.at, g->out.count);
    if (got == GDB_GOT_BAD && !g->no_ack)
        send_all(g, "-", 1);
    if (got == GDB_GOT_BAD && g->no_ack && !g->is_running)
        gdb_answer(g, "E01");
    if (got != GDB_GOT_PACKET)
        return;
    if (!g->no_ack)
        send_all(g, "+", 1);
    if (!g->is_running)                /* else nothing may be asked, Ctrl-C apart */
        gdb_command(g, g->reader.packet, g->reader.count);
    g->no_ack |= g->next_no_ack;
}

static void receive(gdb *g)
{
    uint8_t bytes[4096];
    ssize_t n = recv(g->connection, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        g->is_gone = true;
    for (ssize_t i = 0; i < n && !g->is_gone && !g->is_over; i++)
        take(g, gdb_read_byte(&g->reader, bytes[i]));
}

bool gdb_must_leave(gdb *g)
{
    uint8_t byte;
    ssize_t n = g->connection < 0 ? -1 : recv(g->connection, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0)
        return g->is_gone = true;
    if (n == 1 && byte == 3) {
        (void)recv(g->connection, &byte, 1, MSG_DONTWAIT);
        return true;
    }
    return g->is_stopped;
}

/* ---- serving ---- */

static void wait_and_act(gdb *g)
{
    struct pollfd fds[3] = { { .fd = g->wake, .events = POLLIN }, { .fd = g->listener, .events = POLLIN },
                             { .fd = g->connection, .events = POLLIN } };
    eventfd_t ignored;
    if (poll(fds, 3, -1) < 0)
        return;
    if (fds[0].revents)
        (void)eventfd_read(g->wake, &ignored);
    deal_with_event(g);
    if (fds[1].revents && !g->is_over)
        accept_one(g);
    if (fds[2].fd >= 0 && fds[2].revents && !g->is_over && g->connection == fds[2].fd)
        receive(g);
    if (g->is_gone)
        leave(g);
}

static void serve(gdb *g)
{
    if (g->options.runs_alone)
        all_continue(g);
    while (!g->is_over && !g->is_stopped)
        wait_and_act(g);
    gdb_end_threads(g);
    gdb_drop(g);
    gdb_clear_points(g);
}

static int begin(gdb *g)
{
    for (unsigned i = 0; i < g->cpu_count; i++)
        if (vm_vcpu_is_running(g->cpus[i].cpu))
            return vm_fail(VM_E_BUSY, "vm_gdb_serve: vCPU %u is running", i);
    g->is_over = g->is_running = false;
    g->end_status = VM_OK;
    g->end = (vm_exit)VM_EXIT_INIT;
    g->end.reason = VM_EXIT_KICK;
    if (gdb_start_threads(g))
        return VM_OK;
    int status = vm_fail_errno(VM_E_HOST, "vm_gdb_serve: no thread for a vCPU");
    gdb_end_threads(g);
    return status;
}

VM_API int vm_gdb_serve(vm_gdb *g, vm_exit *exit)
{
    VM_CHECK_NULL("vm_gdb_serve", g);
    if (atomic_exchange(&g->is_serving, true))
        return vm_fail(VM_E_BUSY, "vm_gdb_serve: another thread serves");
    int status = begin(g);
    if (status == VM_OK) {
        serve(g);
        g->is_stopped = false;
        status = g->end_status;
    }
    vm_exit end = g->end;
    g->is_serving = false;
    return status == VM_OK && exit ? vm_struct_out(exit, &end, sizeof end, "vm_gdb_serve", "exit") : status;
}

VM_API void vm_gdb_stop(vm_gdb *g)
{
    if (!g)
        return;
    int saved = errno;
    const uint64_t one = 1;
    g->is_stopped = true;
    ssize_t n = write(g->wake, &one, sizeof one);
    (void)n;
    errno = saved;
}

VM_API const char *vm_gdb_address(const vm_gdb *g)
{
    return g ? g->address : "";
}

/* ---- listening ---- */

static int host_failed(const char *what, const char *address)
{
    return vm_fail(VM_E_HOST, "vm_gdbstub: %s %.100s: %s", what, address, strerror(errno));
}

static int listen_at_path(gdb *g, const char *path)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof a.sun_path)
        return vm_fail(VM_E_INVALID, "vm_gdbstub: the path of a socket has at most %zu characters", sizeof a.sun_path - 1);
    strcpy(a.sun_path, path);
    g->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (g->listener < 0)
        return host_failed("socket for", path);
    if (fchmod(g->listener, 0600) < 0 || bind(g->listener, (struct sockaddr *)&a, sizeof a) < 0)
        return host_failed("bind to", path);
    g->is_path = true;                 /* from here on the name is ours to remove */
    snprintf(g->address, sizeof g->address, "%s", path);
    if (chmod(path, 0600) < 0 || listen(g->listener, 4) < 0)
        return host_failed("listen on", path);
    return VM_OK;
}

/* Host and port of "127.0.0.1:1", "localhost:1", ":1", "[::1]:1". */
static int parse_address(const char *address, bool *is_v6, uint16_t *port)
{
    const char *colon = strrchr(address, ':');
    size_t n = colon ? (size_t)(colon - address) : 0;
    char *end;
    errno = 0;
    unsigned long number = colon ? strtoul(colon + 1, &end, 10) : 0;
    if (!colon || colon[1] < '0' || colon[1] > '9' || *end || number > 65535)
        return vm_fail(VM_E_INVALID, "vm_gdbstub: \"%.100s\" is neither HOST:PORT nor a path with a '/'", address);
    *port = (uint16_t)number;
    *is_v6 = n == 5 && !memcmp(address, "[::1]", 5);
    if (n && !*is_v6 && !(n == 9 && !memcmp(address, "127.0.0.1", 9)) && !(n == 9 && !memcmp(address, "localhost", 9)))
        return vm_fail(VM_E_INVALID, "vm_gdbstub: \"%.*s\" is not the loopback (127.0.0.1, localhost, [::1])",
                       (int)(n < 100 ? n : 100), address);
    return VM_OK;
}

static int listen_at_port(gdb *g, const char *address)
{
    bool is_v6;
    uint16_t port;
    const int on = 1;
    int status = parse_address(address, &is_v6, &port);
    if (status != VM_OK)
        return status;
    struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT };
    struct sockaddr *a = is_v6 ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4;
    socklen_t bytes = is_v6 ? sizeof v6 : sizeof v4;
    g->listener = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (g->listener < 0)
        return host_failed("socket for", address);
    (void)setsockopt(g->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(g->listener, a, bytes) < 0 || listen(g->listener, 4) < 0 || getsockname(g->listener, a, &bytes) < 0)
        return host_failed("listen on", address);
    snprintf(g->address, sizeof g->address, is_v6 ? "[::1]:%u" : "127.0.0.1:%u",
             ntohs(is_v6 ? v6.sin6_port : v4.sin_port));
    return VM_OK;
}

/* ---- life ---- */

static void release(gdb *g)
{
    if (g->listener >= 0)
        close(g->listener);
    if (g->is_path)
        unlink(g->address);
    if (g->wake >= 0)
        close(g->wake);
    gdb_free_text(&g->out);
    gdb_free_text(&g->answer);
    gdb_free_text(&g->xml);
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->exit_lock);
    pthread_mutex_destroy(&g->lock);
    free(g->cpus);
    free(g);
}

static gdb *allocate(vm_machine *m, const vm_gdb_options *options)
{
    gdb *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->m = m;
    g->options = *options;
    g->listener = g->wake = g->connection = -1;
    pthread_mutex_init(&g->lock, NULL);
    pthread_mutex_init(&g->exit_lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    g->cpu_count = m->vcpu_count;
    g->cpus = calloc(g->cpu_count, sizeof *g->cpus);
    if (!g->cpus) {
        release(g);
        return NULL;
    }
    for (unsigned i = 0; i < g->cpu_count; i++) {
        g->cpus[i] = (gdb_cpu){ .g = g, .cpu = m->vcpus[i], .exit = VM_EXIT_INIT };
    }
    return g;
}

static int open_stub(gdb *g, const char *address)
{
    g->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (g->wake < 0)
        return vm_fail_errno(VM_E_HOST, "vm_gdbstub: eventfd");
    return strchr(address, '/') ? listen_at_path(g, address) : listen_at_port(g, address);
}

VM_API int vm_gdbstub(vm_machine *m, const char *address, const vm_gdb_options *options, vm_gdb **out)
{
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    VM_CHECK_NULL("vm_gdbstub", out);
    *out = NULL;
    VM_CHECK_NULL("vm_gdbstub", m);
    VM_CHECK_NULL("vm_gdbstub", address);
    if (options)
        VM_CHECK(vm_struct_in(&o, sizeof o, options, "vm_gdbstub", "options"));
    if (o.reverse_interval && !gdb_repeats(m))
        return vm_fail(VM_E_UNSUPPORTED, "vm_gdbstub: reverse execution needs a BARE machine, or a PC that replays a recording, "
                                         "with one vCPU on the interpreter or the JIT");
    if (atomic_exchange(&m->has_gdb, true))
        return vm_fail(VM_E_BUSY, "vm_gdbstub: the machine has a stub");
    gdb *g = allocate(m, &o);
    int status = g ? open_stub(g, address) : vm_fail(VM_E_NOMEM, "no memory for a GDB stub");
    if (status == VM_OK) {
        *out = g;
        return VM_OK;
    }
    if (g)
        release(g);
    atomic_store(&m->has_gdb, false);
    return status;
}

VM_API void vm_gdb_free(vm_gdb *g)
{
    if (!g || g->is_serving)
        return;
    gdb_drop(g);
    gdb_clear_points(g);
    gdb_history_forget(g);
    while (g->named_count)
        vm_snapshot_free(g->named[--g->named_count].snapshot);
    atomic_store(&g->m->has_gdb, false);
    release(g);
}
