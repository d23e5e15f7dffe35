/* gdb.c - the GDB stub, spoken to in raw packets: what each answers, what bad ones answer, sessions from beginning to end. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define CODE 0x1000u
#define DATA 0x8000u

typedef struct rig {
    vm_machine *m;
    vm_vcpu *cpu;
    vm_gdb *g;
    pthread_t thread;
    vm_exit exit;
    int status, fd;
    bool no_ack;
    char got[40000];
} rig;

/* mov ecx,3; l: inc eax; mov [8000h],eax; dec ecx; jnz l; pcmpeqb xmm1,xmm1; hlt */
static const uint8_t counting[] = { 0xb9, 3, 0, 0, 0, 0xff, 0xc0, 0x89, 0x04, 0x25, 0x00, 0x80, 0, 0, 0xff, 0xc9, 0x75, 0xf3,
                                    0x66, 0x0f, 0x74, 0xc9, 0xf4 };
#define LOOP (CODE + 5)
#define AFTER_STORE (CODE + 14)
#define VECTOR (CODE + 18)
#define HALT (CODE + 22)

static void *serve(void *arg)
{
    rig *r = arg;
    r->exit = (vm_exit)VM_EXIT_INIT;
    r->status = vm_gdb_serve(r->g, &r->exit);
    return NULL;
}

static int dial(rig *r)
{
    const char *colon = strrchr(vm_gdb_address(r->g), ':');
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(colon + 1)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
    return fd;
}

static rig *start_rig(vm_backend backend, const void *code, size_t bytes, unsigned vcpus, vm_gdb_options *o)
{
    rig *r = calloc(1, sizeof *r);
    vm_options mo = VM_OPTIONS_INIT;
    uint64_t rip = CODE, rsp = 0x7000;
    mo.backend = backend;
    mo.vcpus = vcpus;
    OK(vm_create(&mo, &r->m));
    OK(vm_map_ram(r->m, 0, 0x100000, VM_PROT_RWX, NULL));
    OK(vm_write(r->m, CODE, code, bytes));
    for (unsigned i = 0; i < vcpus; i++) {
        OK(vm_vcpu_set_mode(vm_vcpu_get(r->m, i), VM_MODE_FLAT64));
        OK(vm_vcpu_write_reg(vm_vcpu_get(r->m, i), VM_REG_RIP, &rip, 8));
        OK(vm_vcpu_write_reg(vm_vcpu_get(r->m, i), VM_REG_RSP, &rsp, 8));
    }
    r->cpu = vm_vcpu_get(r->m, 0);
    OK(vm_gdbstub(r->m, "127.0.0.1:0", o, &r->g));
    CHECK(pthread_create(&r->thread, NULL, serve, r) == 0);
    r->fd = -1;
    return r;
}

static rig *open_rig(vm_backend backend, const void *code, size_t bytes, unsigned vcpus, vm_gdb_options *o)
{
    rig *r = start_rig(backend, code, bytes, vcpus, o);
    r->fd = dial(r);
    return r;
}
#define RIG(options) open_rig(backend, counting, sizeof counting, 1, options)

static void close_rig(rig *r, int reason)
{
    if (!reason)
        vm_gdb_stop(r->g);
    pthread_join(r->thread, NULL);
    CHECK_EQ(r->status, VM_OK);
    CHECK_EQ(r->exit.reason, reason ? reason : VM_EXIT_KICK);
    if (r->fd >= 0)
        close(r->fd);
    vm_gdb_free(r->g);
    vm_destroy(r->m);
    free(r);
}

static char next_byte(rig *r)
{
    char c;
    struct pollfd p = { .fd = r->fd, .events = POLLIN };
    if (poll(&p, 1, 30000) != 1 || recv(r->fd, &c, 1, 0) != 1)
        FAIL("no answer");
    return c;
}

static void put(rig *r, const void *bytes, size_t n)
{
    CHECK(send(r->fd, bytes, n, MSG_NOSIGNAL) == (ssize_t)n);
}

static void send_packet(rig *r, const char *packet, size_t n)
{
    char frame[40000], sum[4];
    uint8_t s = 0;
    size_t at = 0;
    frame[at++] = '$';
    for (size_t i = 0; i < n; i++) {
        uint8_t c = (uint8_t)packet[i];
        if (c == '$' || c == '#' || c == '}' || c == '*') {
            frame[at++] = '}';
            s += '}';
            c ^= 0x20;
        }
        frame[at++] = (char)c;
        s += c;
    }
    snprintf(sum, sizeof sum, "#%02x", s);
    memcpy(frame + at, sum, 3);
    put(r, frame, at + 3);
}

/* The next packet, acknowledged; in r->got. */
static const char *receive(rig *r)
{
    size_t n = 0;
    char c;
    while ((c = next_byte(r)) != '$')
        CHECK(c == '+');
    while ((c = next_byte(r)) != '#') {
        if (c == '}')
            c = next_byte(r) ^ 0x20;
        CHECK(n + 1 < sizeof r->got);
        r->got[n++] = c;
    }
    next_byte(r);
    next_byte(r);
    r->got[n] = 0;
    if (!r->no_ack)
        put(r, "+", 1);
    return r->got;
}

static const char *ask(rig *r, const char *packet)
{
    send_packet(r, packet, strlen(packet));
    return receive(r);
}

static void expect(rig *r, const char *packet, const char *want)
{
    const char *got = ask(r, packet);
    if (strcmp(got, want))
        FAIL("%s: answer \"%s\", not \"%s\"", packet, got, want);
}

static uint64_t reg(rig *r, unsigned number)
{
    char packet[20], byte[3] = "";
    uint64_t v = 0;
    snprintf(packet, sizeof packet, "p%x", number);
    const char *got = ask(r, packet);
    size_t n = strlen(got) / 2;
    CHECK(n == 4 || n == 8);
    for (size_t i = n; i-- > 0;) {
        memcpy(byte, got + 2 * i, 2);
        v = v << 8 | strtoul(byte, NULL, 16);
    }
    return v;
}
enum { RAX = 0, RCX = 2, RIP = 16, EFLAGS = 17 };

/* ---- sessions ---- */

EACH_BACKEND(breaks_steps_and_ends)
{
    rig *r = RIG(NULL);
    CHECK(strstr(ask(r, "qSupported:swbreak+;hwbreak+;vContSupported+"), "PacketSize=4000"));
    CHECK(!strstr(r->got, "Reverse"));
    expect(r, "vMustReplyEmpty", "");
    expect(r, "QStartNoAckMode", "OK");
    r->no_ack = true;
    expect(r, "?", "T05thread:1;");
    expect(r, "qfThreadInfo", "m1");
    expect(r, "qsThreadInfo", "l");
    expect(r, "qC", "QC1");
    expect(r, "qAttached", "1");
    CHECK_EQ(reg(r, RIP), CODE);
    expect(r, "Z0,1005,1", "OK");
    expect(r, "Z1,1005,1", "OK");
    expect(r, "z0,1005,1", "OK");
    expect(r, "vCont;c", "T05hwbreak:;thread:1;");
    CHECK_EQ(reg(r, RIP), LOOP);
    expect(r, "z1,1005,1", "OK");
    expect(r, "vCont;s:1;c", "T05thread:1;");
    CHECK_EQ(reg(r, RIP), LOOP + 2);
    CHECK_EQ(reg(r, RAX), 1);
    expect(r, "vCont;r1007,1010:1", "T05thread:1;");                  /* over the store and DEC */
    CHECK_EQ(reg(r, RIP), CODE + 16);
    expect(r, "s", "T05thread:1;");
    CHECK_EQ(reg(r, RIP), LOOP);
    expect(r, "Z0,1012,1", "OK");
    expect(r, "c", "T05swbreak:;thread:1;");
    CHECK_EQ(reg(r, RCX), 0);
    expect(r, "S05", "T05thread:1;");
    CHECK_EQ(reg(r, RIP), HALT);
    expect(r, "C05", "W00");
    close_rig(r, VM_EXIT_HALT);
}

EACH_BACKEND(registers_and_vectors)
{
    rig *r = RIG(NULL);
    CHECK(strlen(ask(r, "g")) > 1500);
    static char all[sizeof r->got + 1];
    snprintf(all, sizeof all, "G%s", r->got);
    memcpy(all + 1, "8877665544332211", 16);           /* RAX comes first */
    expect(r, all, "OK");
    CHECK_EQ(reg(r, RAX), UINT64_C(0x1122334455667788));
    expect(r, "P0=0100000000000000", "OK");
    CHECK_EQ(reg(r, RAX), 1);
    CHECK_EQ(reg(r, EFLAGS), 2);
    expect(r, "P10=1210000000000000", "OK");           /* RIP: the vector instruction */
    expect(r, "s", "T05thread:1;");
    expect(r, "p29", "ffffffffffffffffffffffffffffffff");              /* XMM1 */
    expect(r, "P29=000102030405060708090a0b0c0d0e0f", "OK");
    expect(r, "p29", "000102030405060708090a0b0c0d0e0f");
    uint8_t ymm[32];
    OK(vm_vcpu_read_reg(r->cpu, VM_REG_YMM1, ymm, 32));
    CHECK_EQ(ymm[15], 15);
    CHECK(strstr(ask(r, "qXfer:features:read:target.xml:0,3000"), "i386:x86-64"));
    CHECK(r->got[0] == 'm' || r->got[0] == 'l');
    const char *const bad[] = { "p", "pzz", "pffff", "p5000000000000000000", "P0", "P0=", "P0=12", "P0=zz00000000000000",
                                "Pfff=00", "G12", "G0", "Gzz", "p1;" };
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        expect(r, bad[i], "E01");
    CHECK_EQ(reg(r, RAX), 1);
    close_rig(r, 0);
}

EACH_BACKEND(memory)
{
    rig *r = RIG(NULL);
    expect(r, "m1000,5", "b903000000");
    expect(r, "M8000,4:01020304", "OK");
    expect(r, "m8000,4", "01020304");
    send_packet(r, "X8000,4:\x7d#$*", 12);
    CHECK(!strcmp(receive(r), "OK"));
    expect(r, "m8000,4", "7d23242a");
    expect(r, "X8000,0:", "OK");
    expect(r, "M8000,0:", "OK");
    expect(r, "mff000,2000", (memset(r->got, '0', 0x2000), ask(r, "mff000,2000")));       /* what there is: a page */
    CHECK_EQ(strlen(r->got), 0x2000);
    expect(r, "m100000,4", "E14");
    expect(r, "mffffffffffffffff,4", "E14");
    expect(r, "M100000,1:00", "E14");
    CHECK(strstr(ask(r, "qXfer:memory-map:read::0,fff"), "<memory type=\"ram\" start=\"0x0\" length=\"0x100000\"/>"));
    const char *const bad[] = { "m", "m1000", "m1000,", "m,1", "mx,1", "m1000,1x", "m10000000000000000,1", "M8000,2:00",
                                "M8000,1:0", "M8000,1:zz", "M8000,1", "X8000,2:a", "X8000,ffffffffffffffff:a", "X8000",
                                "qXfer:features:read:target.xml:0", "qXfer:features:read:target.xml:x,1",
                                "qXfer:memory-map:read::", "Mffff,ffffffffffffffff:" };
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        expect(r, bad[i], "E01");
    expect(r, "qXfer:features:read:other.xml:0,1", "E00");
    expect(r, "qXfer:features:read:target.xml:fffffff,10", "l");
    close_rig(r, 0);
}

EACH_BACKEND(watchpoints)
{
    rig *r = RIG(NULL);
    expect(r, "Z2,8002,1", "OK");
    expect(r, "c", "T05watch:8002;thread:1;");         /* the store began below it */
    CHECK_EQ(reg(r, RIP), AFTER_STORE);
    expect(r, "z2,8002,1", "OK");
    expect(r, "Z3,8000,4", "OK");
    expect(r, "Z4,8000,4", "OK");
    expect(r, "c", "T05awatch:8000;thread:1;");
    CHECK_EQ(reg(r, RAX), 2);
    expect(r, "z4,8000,4", "OK");
    const char *const bad[] = { "Z", "Z0", "Z5,1,1", "Z0,", "Z0,1", "Z0,x,1", "Z0,1,x", "z9,1,1", "Z0,10000000000000000,1" };
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        expect(r, bad[i], "E01");
    expect(r, "Z2,8000,0", "E22");
    expect(r, "c", "W00");                             /* nobody reads */
    close_rig(r, VM_EXIT_HALT);
}

/* l: jmp l */
static const uint8_t endless[] = { 0xeb, 0xfe };

EACH_BACKEND(interrupt_detach_and_come_again)
{
    rig *r = open_rig(backend, endless, sizeof endless, 1, NULL);
    send_packet(r, "c", 1);
    usleep(20000);
    put(r, "\3", 1);
    CHECK(!strcmp(receive(r), "T02thread:1;"));
    expect(r, "Z0,1000,1", "OK");
    expect(r, "D", "OK");
    close(r->fd);
    usleep(20000);
    r->fd = dial(r);                                   /* it ran on, without the breakpoint */
    expect(r, "?", "T05thread:1;");
    int second = dial(r);                              /* one debugger at a time */
    char c;
    CHECK(recv(second, &c, 1, 0) <= 0);
    close(second);
    expect(r, "Z0,1000,1", "OK");
    expect(r, "c", "T05thread:1;");
    close(r->fd);                                      /* gone without a word */
    usleep(20000);
    r->fd = dial(r);
    expect(r, "vKill;1", "OK");
    close_rig(r, VM_EXIT_KICK);
}

EACH_BACKEND(two_vcpus_are_two_threads)
{
    rig *r = open_rig(backend, endless, sizeof endless, 2, NULL);
    expect(r, "qfThreadInfo", "m1,2");
    expect(r, "T2", "OK");
    expect(r, "T3", "E01");
    expect(r, "T0", "E01");
    CHECK(strstr(ask(r, "qThreadExtraInfo,2"), "76435055"));          /* vCPU */
    expect(r, "Hg2", "OK");
    expect(r, "P10=0020000000000000", "OK");
    expect(r, "M2000,2:ebfe", "OK");
    expect(r, "Z0,2000,1", "OK");
    expect(r, "vCont;c", "T05thread:2;");              /* vCPU 1 stands there, vCPU 0 loops */
    CHECK_EQ(reg(r, RIP), 0x2000);
    expect(r, "Hg1", "OK");
    CHECK_EQ(reg(r, RIP), CODE);
    expect(r, "vCont;s:1", "T05thread:1;");
    expect(r, "z0,2000,1", "OK");
    send_packet(r, "vCont;c:1", 9);
    usleep(5000);
    put(r, "\3", 1);
    CHECK(!strncmp(receive(r), "T02", 3));
    const char *const bad[] = { "vCont", "vCont;", "vCont;x", "vCont;c:3", "vCont;s:1;", "vCont;C", "vCont;r1", "vCont;r1,",
                                "Hx1", "Hg", "Hg9", "Hgp2.1", "T", "qThreadExtraInfo,", "qThreadExtraInfo,9", "Cxx", "S", "czz" };
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        expect(r, bad[i], "E01");
    close_rig(r, 0);
}

static void monitor(rig *r, const char *line, const char *want)
{
    char packet[600] = "qRcmd,", text[40000];
    size_t n = 0;
    for (const char *p = line; *p; p++)
        sprintf(packet + strlen(packet), "%02x", (unsigned)(uint8_t)*p);
    for (ask(r, packet); r->got[0] == 'O' && r->got[1] != 'K'; receive(r))
        for (const char *p = r->got + 1; *p; p += 2)
            text[n++] = (char)strtoul((const char[]){ p[0], p[1], 0 }, NULL, 16);
    text[n] = 0;
    CHECK(!strcmp(r->got, "OK"));
    if (!strstr(text, want))
        FAIL("monitor %s: no \"%s\" in: %s", line, want, text);
}

EACH_BACKEND(monitor_commands)
{
    rig *r = RIG(NULL);
    monitor(r, "help", "snapshot take");
    monitor(r, "info registers", "0000000000001000");
    monitor(r, "info mem", "0000000000000000-00000000000fffff ram  rwx");
    monitor(r, "info stats", "retired");
    monitor(r, "backend", vm_backend_name(backend));
    monitor(r, "backend nothing", "kvm, jit or interp");
    monitor(r, "translate 0x1234", "0x1234 -> 0x1234");
    monitor(r, "snapshot take first", "done");
    monitor(r, "snapshot list", "first");
    expect(r, "Z0,1012,1", "OK");
    expect(r, "c", "T05thread:1;");
    monitor(r, "backend interp", "done");
    monitor(r, "snapshot restore first", "done");
    CHECK_EQ(reg(r, RIP), CODE);
    CHECK_EQ(reg(r, RAX), 0);
    monitor(r, "snapshot delete first", "done");
    monitor(r, "snapshot restore first", "no such");
    monitor(r, "memory physical", "guest-physical");
    expect(r, "m1000,1", "b9");
    monitor(r, "nonsense", "unknown");
    monitor(r, "catch 6,14", "0x4040");
    expect(r, "M1000,2:0f0b", "OK");
    expect(r, "c", "T04thread:1;");                    /* SIGILL, not delivered */
    monitor(r, "reset", "done");
    CHECK_EQ(reg(r, RIP), 0xfffffff0);
    expect(r, "qRcmd,6", "E01");
    expect(r, "qRcmd,zz", "E01");
    close_rig(r, 0);
}

/* ---- backwards ---- */

EACH_BACKEND(reverse)
{
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    o.reverse_interval = 4;
    if (backend == VM_BACKEND_KVM) {
        vm_options mo = VM_OPTIONS_INIT;
        vm_machine *m;
        vm_gdb *g;
        mo.backend = backend;
        OK(vm_create(&mo, &m));
        REFUSED(vm_gdbstub(m, ":0", &o, &g), VM_E_UNSUPPORTED);
        vm_destroy(m);
        return;
    }
    rig *r = RIG(&o);
    CHECK(strstr(ask(r, "qSupported"), "ReverseStep+;ReverseContinue+"));
    expect(r, "bs", "T05replaylog:begin;thread:1;");
    expect(r, "Z0,1012,1", "OK");
    expect(r, "c", "T05thread:1;");
    CHECK_EQ(reg(r, RAX), 3);
    static const unsigned way[] = { CODE + 16, CODE + 14, CODE + 7, LOOP, CODE + 16 };
    for (unsigned i = 0; i < 5; i++) {
        expect(r, "bs", "T05thread:1;");
        CHECK_EQ(reg(r, RIP), way[i]);
    }
    CHECK_EQ(reg(r, RAX), 2);
    expect(r, "m8000,4", "02000000");
    expect(r, "s", "T05thread:1;");
    CHECK_EQ(reg(r, RIP), LOOP);
    expect(r, "Z0,1007,1", "OK");
    for (unsigned i = 2; i >= 1; i--) {                /* the same place, one turn earlier each time */
        expect(r, "bc", "T05thread:1;");
        CHECK_EQ(reg(r, RIP), CODE + 7);
        CHECK_EQ(reg(r, RAX), i);
    }
    expect(r, "bc", "T05replaylog:begin;thread:1;");
    CHECK_EQ(reg(r, RIP), CODE);
    expect(r, "z0,1007,1", "OK");
    expect(r, "c", "T05thread:1;");
    CHECK_EQ(reg(r, RAX), 3);
    expect(r, "P0=6300000000000000", "OK");            /* an edit: history begins here */
    expect(r, "bs", "T05replaylog:begin;thread:1;");
    expect(r, "s", "T05thread:1;");
    expect(r, "bs", "T05thread:1;");
    CHECK_EQ(reg(r, RAX), 0x63);
    expect(r, "z0,1012,1", "OK");
    expect(r, "c", "W00");
    close_rig(r, VM_EXIT_HALT);
}

/* ---- exits, framing, life ---- */

static vm_gdb_action answer_port(void *user, vm_vcpu *cpu, vm_exit *exit)
{
    (void)cpu;
    ++*(unsigned *)user;
    if (exit->reason != VM_EXIT_IO)
        return VM_GDB_DEFAULT;
    exit->io.data = 0x5a;
    return exit->io.port == 0x50 ? VM_GDB_RUN : VM_GDB_STOP;
}

EACH_BACKEND(exits_go_to_the_program)
{
    /* in al,50h; in al,51h; mov al,[200000h]; hlt */
    static const uint8_t code[] = { 0xe4, 0x50, 0xe4, 0x51, 0x8a, 0x04, 0x25, 0, 0, 0x20, 0, 0xf4 };
    unsigned calls = 0;
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    o.on_exit = answer_port;
    o.user = &calls;
    rig *r = open_rig(backend, code, sizeof code, 1, &o);
    expect(r, "s", "T05thread:1;");                    /* the answered access is part of its step */
    CHECK_EQ(reg(r, RIP), CODE + 2);
    CHECK_EQ(reg(r, RAX), 0x5a);
    expect(r, "c", "T05thread:1;");                    /* stopped at the second */
    CHECK_EQ(reg(r, RIP), CODE + 2);
    expect(r, "c", "T0bthread:1;");                    /* unmapped */
    CHECK_EQ(reg(r, RIP), CODE + 4);
    expect(r, "c", "W00");
    CHECK_EQ(calls, 4);
    close_rig(r, VM_EXIT_HALT);
}

TEST(frames)
{
    vm_backend backend = VM_BACKEND_INTERP;
    rig *r = RIG(NULL);
    put(r, "noise+++$?#00", 13);
    CHECK(next_byte(r) == '-');                        /* wrong sum */
    put(r, "$?#zz", 5);
    CHECK(next_byte(r) == '-');
    put(r, "$m1000,$?#3f", 12);                        /* a packet within a packet: the first was cut */
    CHECK(!strcmp(receive(r), "T05thread:1;"));
    put(r, "-", 1);
    CHECK(!strcmp(receive(r), "T05thread:1;"));        /* once more */
    put(r, "$}#7d", 5);
    CHECK(next_byte(r) == '-');                        /* an escape of nothing */
    static char long_one[20000];
    memset(long_one, 'a', sizeof long_one);
    long_one[0] = '$';
    memcpy(long_one + sizeof long_one - 3, "#00", 3);
    put(r, long_one, sizeof long_one);
    CHECK(next_byte(r) == '-');
    expect(r, "QStartNoAckMode", "OK");
    r->no_ack = true;
    put(r, long_one, sizeof long_one);
    CHECK(!strcmp(receive(r), "E01"));
    expect(r, "qCRC:1,1", "");
    expect(r, "nonsense", "");
    expect(r, "", "");
    close_rig(r, 0);
}

TEST(addresses)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_gdb_options go = VM_GDB_OPTIONS_INIT;
    vm_machine *m;
    vm_gdb *g = (vm_gdb *)&o, *other;
    char path[64];
    struct stat st;
    OK(vm_create(&o, &m));
    static const char *const bad[] = { "", "1234", ":", ":x", ":70000", ":1x", "0.0.0.0:1", "192.168.1.1:1", "example.org:1",
                                       "[::]:1", "127.0.0.1", "127.0.0.1:" };
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSED(vm_gdbstub(m, bad[i], NULL, &g), VM_E_INVALID);
    CHECK(g == NULL);
    REFUSED(vm_gdbstub(NULL, ":0", NULL, &g), VM_E_INVALID);
    REFUSED(vm_gdbstub(m, NULL, NULL, &g), VM_E_INVALID);
    REFUSED(vm_gdbstub(m, ":0", NULL, NULL), VM_E_INVALID);
    go.size = 2;
    REFUSED(vm_gdbstub(m, ":0", &go, &g), VM_E_INVALID);
    REFUSED(vm_gdbstub(m, "/nowhere/at/all", NULL, &g), VM_E_HOST);
    snprintf(path, sizeof path, "/tmp/libvm-gdb-%d", (int)getpid());
    OK(vm_gdbstub(m, path, NULL, &g));
    CHECK(!strcmp(vm_gdb_address(g), path));
    CHECK(stat(path, &st) == 0 && (st.st_mode & 0777) == 0600);
    REFUSED(vm_gdbstub(m, ":0", NULL, &other), VM_E_BUSY);
    vm_gdb_free(g);
    CHECK(stat(path, &st) != 0);
    OK(vm_gdbstub(m, "localhost:0", NULL, &g));
    CHECK(!strncmp(vm_gdb_address(g), "127.0.0.1:", 10) && strcmp(vm_gdb_address(g), "127.0.0.1:0"));
    vm_gdb_stop(g);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_gdb_serve(g, &e));                           /* stopped before it began */
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    vm_gdb_free(g);
    vm_gdb_free(NULL);
    vm_gdb_stop(NULL);
    REFUSED(vm_gdb_serve(NULL, NULL), VM_E_INVALID);
    vm_destroy(m);
}

EACH_BACKEND(runs_alone_until_somebody_comes)
{
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    o.runs_alone = true;
    rig *r = open_rig(backend, counting, sizeof counting, 1, &o);
    close(r->fd);                                      /* too late or not, and gone again */
    r->fd = -1;
    close_rig(r, VM_EXIT_HALT);
}

/* out 80h, al; hlt. The program says, some time later, that the first is the end. */
static const uint8_t saying[] = { 0xe6, 0x80, 0xf4 };

static vm_gdb_action think_about_it(void *user, vm_vcpu *cpu, vm_exit *exit)
{
    (void)cpu;
    *(_Atomic bool *)user = true;
    usleep(100000);                                    /* less, and the test sees less; no other harm */
    return exit->reason == VM_EXIT_IO ? VM_GDB_END : VM_GDB_DEFAULT;
}

static rig *open_thinking(vm_backend backend)
{
    static _Atomic bool thinks;
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    o.runs_alone = true;
    o.on_exit = think_about_it;
    o.user = (void *)&thinks;
    rig *r = start_rig(backend, saying, sizeof saying, 1, &o);
    while (!thinks)
        usleep(100);
    r->fd = dial(r);
    return r;
}

/* The debugger comes when the guest has ended, but nobody knows yet, and goes. */
EACH_BACKEND(end_is_kept_for_later)
{
    rig *r = open_thinking(backend);
    close(r->fd);
    r->fd = -1;
    close_rig(r, VM_EXIT_IO);
}

/* As above, but the debugger looks, and goes on: it is told. */
EACH_BACKEND(end_is_told_later)
{
    rig *r = open_thinking(backend);
    CHECK_EQ(reg(r, RAX), 0);
    expect(r, "c", "W00");
    close_rig(r, VM_EXIT_IO);
}

/* Signals: a debugger that is gone must not kill the program, and the library's threads take none. */
TEST(no_signals)
{
    vm_backend backend = VM_BACKEND_INTERP;
    rig *r = RIG(NULL);
    signal(SIGPIPE, SIG_DFL);
    for (unsigned i = 0; i < 200; i++)
        send_packet(r, "qXfer:features:read:target.xml:0,3000", 37);
    struct linger hard = { 1, 0 };
    setsockopt(r->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
    close(r->fd);
    r->fd = -1;
    pthread_join(r->thread, NULL);                     /* it ran to its end alone */
    CHECK_EQ(r->exit.reason, VM_EXIT_HALT);
    vm_gdb_free(r->g);
    vm_destroy(r->m);
    free(r);
}
