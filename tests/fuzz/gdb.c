/* gdb.c - fuzz target: whatever a debugger may send to the GDB stub. The input is framed as one packet after the other, cut
 * at NUL bytes, and given to a stub of a machine that stands still; what makes it run, it runs for a moment. A first byte of
 * 0xff gives the rest to the reader of frames as it is.
 *
 * Three ways to run it:
 *   without arguments   a fixed pseudo-random corpus, one test line (part of `make check`)
 *   with files or "-"   each as one input (AFL++: afl-fuzz ... -- tests/fuzz/gdb @@)
 *   libFuzzer           make fuzz-gdb
 */
#include "gdb/gdb.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint8_t program[] = { 0xff, 0xc0, 0x89, 0x04, 0x25, 0x00, 0x80, 0, 0, 0xeb, 0xf5 };

static vm_gdb *open_stub(vm_machine **m)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_gdb_options go = VM_GDB_OPTIONS_INIT;
    vm_gdb *g;
    uint64_t rip = 0x1000;
    o.backend = VM_BACKEND_INTERP;
    go.reverse_interval = 1000;
    if (vm_create(&o, m) || vm_map_ram(*m, 0, 0x20000, VM_PROT_RWX, NULL) || vm_write(*m, 0x1000, program, sizeof program) ||
        vm_vcpu_set_mode(vm_vcpu_get(*m, 0), VM_MODE_FLAT64) ||
        vm_vcpu_write_reg(vm_vcpu_get(*m, 0), VM_REG_RIP, &rip, 8) || vm_gdbstub(*m, "127.0.0.1:0", &go, &g))
        abort();
    return g;
}

static void halt(vm_gdb *g)
{
    if (g->is_running)
        gdb_halt(g);
    for (unsigned i = 0; i < g->cpu_count; i++)
        g->cpus[i].event = GDB_EVENT_NONE;
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
    halt(g);
    while (recv(peer, sink, sizeof sink, MSG_DONTWAIT) > 0)
        continue;
    g->is_gone = g->is_over = false;
}

static void packets(vm_gdb *g, int peer, const uint8_t *data, size_t size)
{
    for (unsigned n = 0; size && n < 40; n++) {
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
    if (vm_snapshot_take(kept.m, &kept.fresh) || socketpair(AF_UNIX, SOCK_STREAM, 0, kept.pair) || !gdb_start_threads(kept.g))
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

#ifndef VM_LIBFUZZER
static uint64_t next(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

/* Real packets, with numbers, separators and lengths disturbed. */
static const char *const seeds[] = {
    "g", "G00", "p10", "P0=0011223344556677", "m1000,10", "M8000,4:01020304", "X8000,2:ab", "Z0,1000,1", "z0,1000,1", "Z2,8000,4",
    "Z4,8000,ffffffffffffffff", "c", "s", "c1000", "S05;1000", "C05", "bs", "bc", "vCont;c", "vCont;s:1;c", "vCont;r1000,1010:1",
    "vCont?", "Hg1", "Hgp1.1", "T1", "qfThreadInfo", "qThreadExtraInfo,1", "qSupported:swbreak+;hwbreak+",
    "qXfer:features:read:target.xml:0,ffff", "qXfer:memory-map:read::10,fffffffffffffff", "qRcmd,68656c70",
    "qRcmd,736e617073686f742074616b652061", "qRcmd,736e617073686f7420726573746f72652061", "qRcmd,636174636820362c3134",
    "qRcmd,7265736574", "qRcmd,7472616e736c61746520307831303030", "D", "k", "?", "qC", "QStartNoAckMode", "vKill;1",
};

static size_t make_input(uint64_t *s, uint8_t *to, size_t most)
{
    static const char disturb[] = "0123456789abcdef,:;=+-.xzZ?#$}*";
    size_t n = 0;
    for (unsigned packets_left = 1 + next(s) % 12; packets_left--;) {
        const char *seed = seeds[next(s) % (sizeof seeds / sizeof *seeds)];
        size_t length = strlen(seed);
        if (n + length + 1 > most)
            break;
        memcpy(to + n, seed, length);
        for (unsigned edits = next(s) % 4; edits--;)
            to[n + next(s) % length] = (uint8_t)(next(s) % 3 ? (uint64_t)disturb[next(s) % (sizeof disturb - 1)] : next(s));
        n += next(s) % 8 ? length : next(s) % length + 1;
        to[n++] = 0;
    }
    if (next(s) % 16 == 0)
        to[0] = 0xff;
    return n;
}

static int run_file(const char *name)
{
    static uint8_t bytes[1 << 16];
    FILE *f = strcmp(name, "-") ? fopen(name, "rb") : stdin;
    if (!f)
        return 1;
    size_t n = fread(bytes, 1, sizeof bytes, f);
    if (f != stdin)
        fclose(f);
    return LLVMFuzzerTestOneInput(bytes, n);
}

int main(int argc, char **argv)
{
    uint64_t s = UINT64_C(0x9E3779B97F4A7C15);
    uint8_t input[2048];
    if (argc > 1 && !strcmp(argv[1], "-l")) {
        puts("fuzz_gdb.corpus");
        return 0;
    }
    for (int i = 1; i < argc; i++)
        if (run_file(argv[i]))
            return 1;
    for (unsigned i = 0; argc == 1 && i < 2000; i++)
        LLVMFuzzerTestOneInput(input, make_input(&s, input, sizeof input));
    if (argc == 1)
        puts("ok fuzz_gdb.corpus");
    return 0;
}
#endif
