/* gdb.h - what the files of the GDB stub share.
 *
 *   server.c     the public functions: sockets, the loop that waits for the debugger and for the vCPUs
 *   drive.c      one thread a vCPU: orders in, events out; stopping all of them
 *   packet.c     framing: bytes to packets and back, with limits
 *   command.c    packets to actions and answers
 *   register.c   register tables, the target description
 *   monitor.c    "monitor ..." commands
 *   reverse.c    snapshots along the way, and going back to them
 *
 * Threads. The thread in vm_gdb_serve() owns everything here but a gdb_cpu that is under way: that belongs to its thread
 * until it says GDB_IDLE, under `lock`. Registers and memory are touched only while all vCPUs are idle.
 *
 * What comes from the debugger is untrusted. A packet is at most GDB_PACKET bytes and ends with a NUL that is not part of
 * it; numbers are parsed by gdb_hex(), which refuses what does not fit; answers are built in a gdb_text, which stops
 * growing at a limit.
 */
#ifndef LIBVM_GDB_GDB_H
#define LIBVM_GDB_GDB_H

#include <pthread.h>
#include <stdatomic.h>
#include <libvm/libvm.h>
#include "core/core.h"

#define GDB_PACKET 16384u              /* longest packet, either way */
#define GDB_TEXT (1u << 20)            /* longest text of any kind */
#define GDB_POINTS 1024u               /* breakpoints and watchpoints */
#define GDB_HISTORY 128u               /* snapshots along the way */
#define GDB_NAMED 64u                  /* snapshots by name */

/* ---- packet.c ---- */

/* A text that grows. After a failed allocation or at the limit it takes no more and says so. */
typedef struct gdb_text { char *at; size_t count, capacity; bool is_cut; } gdb_text;
void gdb_put(gdb_text *t, const void *bytes, size_t count);
void gdb_puts(gdb_text *t, const char *text);
void gdb_printf(gdb_text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
void gdb_put_hex(gdb_text *t, const void *bytes, size_t count);
void gdb_clear(gdb_text *t);
void gdb_free_text(gdb_text *t);

/* Bytes of a connection become packets. */
typedef enum gdb_got { GDB_GOT_NOTHING, GDB_GOT_PACKET, GDB_GOT_BREAK, GDB_GOT_BAD, GDB_GOT_NAK } gdb_got;
typedef struct gdb_reader {
    enum { GDB_OUTSIDE, GDB_INSIDE, GDB_SUM1, GDB_SUM2 } state;
    bool is_escaped, is_too_long;
    uint8_t sum, given;
    size_t count;
    char packet[GDB_PACKET + 1];       /* escapes resolved, NUL after it */
} gdb_reader;
gdb_got gdb_read_byte(gdb_reader *r, uint8_t byte);
/* The frame of a packet: $...#xx, with escapes. */
void gdb_frame(gdb_text *out, const char *packet, size_t count);

int gdb_digit(char c);                 /* of hex, -1: none */
/* A hex number at *at, which moves behind it; false: no digit, or more than 64 bits. */
bool gdb_hex(const char **at, uint64_t *value);
/* 2 * n digits to bytes; false: too few, or other characters. */
bool gdb_bytes(const char *from, void *to, size_t n);

/* ---- vCPUs: drive.c ---- */

typedef enum gdb_event {
    GDB_EVENT_NONE,
    GDB_EVENT_STOP,                    /* tell the debugger; signal, exit */
    GDB_EVENT_RESET,
    GDB_EVENT_END,
    GDB_EVENT_FAILED                   /* vm_vcpu_run() did; status, message */
} gdb_event;

typedef enum gdb_order { GDB_STAY, GDB_CONTINUE, GDB_STEP, GDB_RANGE } gdb_order;

typedef struct gdb_cpu {
    struct vm_gdb *g;
    vm_vcpu *cpu;
    pthread_t thread;
    bool has_thread;
    enum { GDB_IDLE, GDB_ORDERED, GDB_LEAVE } state;       /* under g->lock */
    gdb_order order;
    uint64_t low, high;                /* GDB_RANGE: [low, high) */
    gdb_event event;
    unsigned sequence;                 /* orders events of several vCPUs */
    int signal, status;
    vm_exit exit;                      /* the last one; carries completions to the next run */
    uint64_t rip;                      /* where the event was */
    char message[200];
} gdb_cpu;

bool gdb_start_threads(struct vm_gdb *g);
void gdb_end_threads(struct vm_gdb *g);
void gdb_go(struct vm_gdb *g);         /* carry out the orders in cpus[] */
void gdb_halt(struct vm_gdb *g);       /* all idle when it returns */
/* One run of the vCPU by its order; GDB_EVENT_NONE: the order goes on. */
gdb_event gdb_turn(gdb_cpu *c);
/* What an exit means: GDB_EVENT_NONE to go on. Any thread; calls on_exit. */
gdb_event gdb_judge(gdb_cpu *c);
/* The event to deal with next, NULL: none. */
gdb_cpu *gdb_next_event(struct vm_gdb *g);

/* ---- the stub ---- */

typedef struct gdb_point { char type; uint64_t address, bytes; bool is_ours; } gdb_point;       /* type: '0' to '4' */
typedef struct gdb_moment { vm_snapshot *snapshot; uint64_t retired; } gdb_moment;
typedef struct gdb_named { char name[32]; vm_snapshot *snapshot; } gdb_named;

struct vm_gdb {
    vm_machine *m;
    vm_gdb_options options;
    char address[128];
    bool is_path;
    int listener, wake;                /* socket; eventfd: events and vm_gdb_stop() */
    _Atomic bool is_stopped;           /* vm_gdb_stop() */
    _Atomic bool is_serving;
    gdb_cpu *cpus;
    unsigned cpu_count;
    pthread_mutex_t lock, exit_lock;   /* states of cpus; calls of on_exit */
    pthread_cond_t changed;
    _Atomic bool is_halting;           /* vCPUs shall come back */
    unsigned sequence;                 /* under lock */
    bool is_running;

    int connection;                    /* -1: nobody */
    gdb_reader reader;
    gdb_text out, answer;              /* the last frame; the packet being made */
    bool no_ack, next_no_ack, has_swbreak, has_hwbreak, is_owed /* a stop reply */, is_gone;
    unsigned general;                  /* vCPU of g, m, ... */
    bool is_physical;                  /* m and M take guest-physical addresses */
    enum { GDB_ARCH_AUTO, GDB_ARCH_32, GDB_ARCH_64 } arch_wanted;
    bool is_64;                        /* what this connection was told */
    gdb_text xml;                      /* its target description */
    int last_signal;
    unsigned last_cpu;
    uint64_t exception_exits;

    gdb_point points[GDB_POINTS];
    unsigned point_count;
    gdb_named named[GDB_NAMED];
    unsigned named_count;
    gdb_moment history[GDB_HISTORY];
    unsigned history_count;
    bool is_edited;                    /* the debugger changed something: what lies before is no history of it */

    bool is_over;                      /* serve returns: */
    int end_status;
    vm_exit end;
};
typedef struct vm_gdb gdb;

/* server.c */
void gdb_send(gdb *g);                                                 /* g->answer */
void gdb_answer(gdb *g, const char *text);
void gdb_drop(gdb *g);                                                 /* the connection */
bool gdb_must_leave(gdb *g);                                           /* Ctrl-C came, or vm_gdb_stop(): long work ends */
int  gdb_reset(gdb *g);

/* command.c */
void gdb_command(gdb *g, const char *packet, size_t count);
void gdb_report(gdb *g, gdb_cpu *c);                                   /* a stop reply about it */
void gdb_report_end(gdb *g, const vm_exit *exit);
void gdb_clear_points(gdb *g);
void gdb_resume(gdb *g);                                               /* what `order`s say, or what was left to report */

/* register.c */
typedef struct gdb_state { vm_regs r; vm_sregs s; vm_fpu f; } gdb_state;
int  gdb_get_state(vm_vcpu *cpu, gdb_state *s);
void gdb_choose_arch(gdb *g);
unsigned gdb_register_count(const gdb *g);
unsigned gdb_register_bytes(const gdb *g, unsigned number);            /* 0: no such register */
void gdb_register_get(const gdb *g, const gdb_state *s, unsigned number, uint8_t *to);
void gdb_register_set(const gdb *g, gdb_state *s, unsigned number, const uint8_t *from);
int  gdb_set_state(vm_vcpu *cpu, const gdb_state *before, const gdb_state *s);
unsigned gdb_pc_number(const gdb *g);
uint64_t gdb_pc(vm_vcpu *cpu);                                         /* linear */
void gdb_describe(gdb *g, gdb_text *xml);

/* monitor.c: what the command says */
void gdb_monitor(gdb *g, const char *line, gdb_text *out);

/* reverse.c */
bool gdb_replays(const vm_machine *m);
bool gdb_repeats(const vm_machine *m);                           /* its runs are the same each time */
bool gdb_can_reverse(const gdb *g);
void gdb_history_begin(gdb *g);                                        /* before going forward */
void gdb_history_add(gdb *g);                                          /* on the way, at rest */
void gdb_history_forget(gdb *g);
typedef enum gdb_back { GDB_BACK_DONE, GDB_BACK_BEGIN, GDB_BACK_BREAK, GDB_BACK_STOPPED } gdb_back;
gdb_back gdb_back_step(gdb *g);
gdb_back gdb_back_continue(gdb *g);

#endif
