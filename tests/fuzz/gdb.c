/* gdb.c - fuzz target: whatever a debugger may send to the GDB stub. The input is framed as one packet after the other, cut
 * at NUL bytes, and given to a stub of a machine that stands still. What makes it run has a few turns, here and not in the stub's
 * threads, and what comes of them is told. A first byte of 0xff gives the rest to the reader of frames as it is.
 */
#include "fuzz.h"
#include "gdb/gdb.h"
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

const struct fuzz_target fuzz_target = { "gdb", 500, 600 };

static const uint8_t program[] = { 0xff, 0xc0, 0x89, 0x04, 0x25, 0x00, 0x80, 0, 0, 0xeb, 0xf5 };

static vm_gdb *open_stub(vm_machine **m)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_gdb_options go = VM_GDB_OPTIONS_INIT;
    vm_gdb *g;
    uint64_t rip = 0x1000;
    o.backend = VM_BACKEND_INTERP;
    go.reverse_interval = 8;
    if (vm_create(&o, m) || vm_map_ram(*m, 0, 0x20000, VM_PROT_RWX, NULL) || vm_write(*m, 0x1000, program, sizeof program) ||
        vm_vcpu_set_mode(vm_vcpu_get(*m, 0), VM_MODE_FLAT64) ||
        vm_vcpu_write_reg(vm_vcpu_get(*m, 0), VM_REG_RIP, &rip, 8) || vm_gdbstub(*m, "127.0.0.1:0", &go, &g))
        abort();
    return g;
}

/* What the vCPU was told to do, for at most a few turns. */
static void run(vm_gdb *g)
{
    gdb_cpu *c = &g->cpus[0];
    if (!g->is_running)
        return;
    for (int turns = 3; c->state == GDB_ORDERED && turns && c->event == GDB_EVENT_NONE; turns--)
        c->event = gdb_turn(c);
    c->state = GDB_IDLE;
    g->is_running = false;
    if (c->event == GDB_EVENT_STOP)
        gdb_report(g, c);
    else if (c->event == GDB_EVENT_END)
        gdb_report_end(g, &c->exit);
    c->event = GDB_EVENT_NONE;
}

static void one_packet(vm_gdb *g, int peer, const uint8_t *data, size_t size)
{
    static char packet[GDB_PACKET + 1];
    static char sink[65536];
    if (size > GDB_PACKET)
        size = GDB_PACKET;
    memcpy(packet, data, size);
    packet[size] = 0;
    gdb_command(g, packet, size);
    run(g);
    while (recv(peer, sink, sizeof sink, MSG_DONTWAIT) > 0)
        continue;
    g->is_gone = g->is_over = false;
}

static void packets(vm_gdb *g, int peer, const uint8_t *data, size_t size)
{
    for (size_t left = 2 + size / 16; size && left; left--) {
        const uint8_t *end = memchr(data, 0, size);
        bool is_binary = data[0] == 'X';               /* may have NULs: all the rest is one */
        size_t part = end && !is_binary ? (size_t)(end - data) : size;
        one_packet(g, peer, data, part);
        data += part;
        size -= part;
        if (size)
            data++, size--;
    }
}

static void frames(const uint8_t *data, size_t size)
{
    gdb_reader *r = calloc(1, sizeof *r);
    for (size_t i = 0; r && i < size; i++)
        if (gdb_read_byte(r, data[i]) == GDB_GOT_PACKET && (r->count > GDB_PACKET || r->packet[r->count]))
            abort();
    free(r);
}

/* One stub with its machine and connection, kept: what a debugger can leave behind is put back before each input. */
static struct { vm_machine *m; vm_gdb *g; vm_snapshot *fresh; int pair[2]; } kept;

static void open_once(void)
{
    kept.g = open_stub(&kept.m);
    if (vm_snapshot_take(kept.m, &kept.fresh) || socketpair(AF_UNIX, SOCK_STREAM, 0, kept.pair))
        abort();
    kept.g->connection = kept.pair[0];
    gdb_choose_arch(kept.g);
    gdb_describe(kept.g, &kept.g->xml);
}

static void put_back(vm_gdb *g)
{
    gdb_clear_points(g);
    gdb_history_forget(g);
    while (g->named_count)
        vm_snapshot_free(g->named[--g->named_count].snapshot);
    vm_snapshot_restore(kept.m, kept.fresh);
    if (vm_backend_select(kept.m, VM_BACKEND_INTERP))
        abort();
    g->no_ack = g->next_no_ack = g->has_swbreak = g->has_hwbreak = g->is_owed = g->is_physical = g->is_edited = false;
    g->general = g->last_cpu = 0;
    g->last_signal = 5;
    g->arch_wanted = GDB_ARCH_AUTO;
    g->exception_exits = 0;
    g->cpus[0].exit = (vm_exit)VM_EXIT_INIT;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size && data[0] == 0xff) {
        frames(data + 1, size - 1);
        return 0;
    }
    if (!kept.g)
        open_once();
    packets(kept.g, kept.pair[1], data, size);
    put_back(kept.g);
    return 0;
}
