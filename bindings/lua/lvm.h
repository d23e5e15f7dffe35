/* lvm.h - what the sources of the Lua module share.
 *
 * Invariants
 *   - Every user value of the module is a box that points into the machine's box and keeps it alive by its first user
 *     value; a closed machine has m == NULL, and every box asks lvm_is_open() before it touches anything.
 *   - What the machine needs of Lua (callbacks, devices, its vCPUs) sits in its anchors, a table that is the machine's
 *     first user value: a callback that mentions the machine is a cycle the collector sees.
 *   - A call into libvm that can call back is made between lvm_enter() and lvm_leave(), and nothing in between raises.
 *     Callbacks run under lua_pcall between lvm_callback() and lvm_return(); their error is kept in the anchors and
 *     raised by lvm_leave()'s caller through lvm_raise(): no longjmp ever passes C or translated frames.
 *   - A callback runs on the coroutine whose call led to it, on the thread of that call; vCPUs that Machine.run() starts on
 *     threads of their own have a coroutine each. While there are such threads Lua runs under universe.lock.
 */
#ifndef LIBVM_LUA_LVM_H
#define LIBVM_LUA_LVM_H

#include <libvm/libvm.h>
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define LVM_MACHINE  "libvm.machine"
#define LVM_VCPU     "libvm.vcpu"
#define LVM_EXIT     "libvm.exit"
#define LVM_REGION   "libvm.region"
#define LVM_BUFFER   "libvm.buffer"
#define LVM_CONSOLE  "libvm.console"
#define LVM_HOOK     "libvm.hook"
#define LVM_SNAPSHOT "libvm.snapshot"
#define LVM_RING     "libvm.ring"
#define LVM_BINDING  "libvm.binding"
#define LVM_GDB      "libvm.gdb"

/* One a Lua state with all its coroutines; lives in the registry. */
typedef struct lvm_universe {
    pthread_mutex_t lock;               /* held by whoever runs Lua while threads > 0 */
    unsigned        threads;            /* Machine.run() calls with threads under way */
} lvm_universe;

enum { LVM_CONSOLES = 5, LVM_DEBUGCON = 4 };

/* Output of a serial port or the debug console: kept here, handed to a function, or both. */
typedef struct lvm_console {
    struct lvm_machine *machine;
    unsigned index;
    bool     keeps;                     /* somebody asked for a console object */
    char    *text;
    size_t   begin, count, room;        /* text[begin .. count) has not been read */
    uint64_t dropped;                   /* bytes lost because nobody read them */
    int      fn;                        /* in the anchors, or LUA_NOREF */
} lvm_console;

typedef struct lvm_machine {
    vm_machine   *m;                    /* NULL: closed */
    unsigned      forks;                /* lvm_forks() when it was made: in a child of fork() it is not to be touched */
    lvm_universe *universe;
    int           slot;                 /* registry: the anchors during a call, else false */
    unsigned      depth;                /* calls of libvm under way */
    bool          failed;               /* the anchors hold a callback's error */
    bool          tracing;              /* inside a trace function */
    int           trace_fn;             /* in the anchors */
    uint64_t      stale_kicks;          /* vCPUs kicked by the module itself: a KICK exit of such a kick is not shown */
    uint64_t      unreported;           /* vCPUs whose last exit Machine.run() has not returned yet */
    lvm_console  *console[LVM_CONSOLES];
    struct lvm_snapshot *dead;          /* snapshots to free when the call under way is over */
    unsigned      snapshots;            /* that exist */
    struct lvm_block *coverage;         /* the map that libvm writes */
    struct lvm_gdb *gdb;                /* being served: lends coroutines to libvm's threads */
    int           violation_fn;         /* in the anchors */
    struct lvm_host *hosts;             /* memory of buffers that is mapped */
    struct lvm_object *objects;         /* what has to be told when the machine closes */
    uint64_t     *breaks;               /* addresses of breakpoints: the end of a slice of a run may be at one */
    size_t        break_count;
} lvm_machine;

/* C side of hooks, snapshots and the like: known to the machine so that closing it makes their handles dead. */
typedef struct lvm_object {
    struct lvm_object *next, **link;
    void  *handle;                      /* NULL: gone */
    void (*orphan)(struct lvm_object *);/* the machine closes; before vm_destroy */
} lvm_object;

typedef struct lvm_vcpu {
    vm_vcpu     *cpu;
    lvm_machine *machine;
    struct lvm_block *ring[2];          /* block trace and comparison log that libvm writes */
} lvm_vcpu;

typedef struct lvm_exit {
    vm_exit      e;
    lvm_machine *machine;
} lvm_exit;

/* Memory shared between buffers and machines that map it. */
typedef struct lvm_block {
    unsigned references;
    size_t   bytes;
    uint8_t *data;
} lvm_block;

typedef struct lvm_host {
    struct lvm_host *next;
    lvm_block *block;
} lvm_host;

typedef struct lvm_region {
    vm_region   *r;                     /* NULL: unmapped */
    vm_region   *handle;                /* of a region that a snapshot may bring back */
    lvm_machine *machine;
    lvm_host    *host;                  /* vm_map_host: what it maps */
    int          self;                  /* in the anchors while mapped */
} lvm_region;

typedef struct lvm_buffer {
    lvm_block  *block;                  /* its own memory, or */
    lvm_region *region;                 /* a view of a region's, or */
    uint8_t    *data;                   /* memory of a call under way; NULL once it is over */
    size_t      bytes;
} lvm_buffer;

typedef struct lvm_snapshot {
    lvm_object o;                       /* handle: vm_snapshot */
    bool       closed;                  /* the machine has freed it */
    struct lvm_snapshot *next_dead;
} lvm_snapshot;

/* A call that may call back, under way. */
typedef struct lvm_call {
    lua_State *outer;
} lvm_call;

/* ---- module.c ---- */
int luaopen_libvm(lua_State *L);
uint64_t lvm_now(void);                                             /* host time, ns */
lvm_universe *lvm_universe_of(lua_State *L);
lua_State *lvm_current(void);
void lvm_set_current(lua_State *L);
void lvm_enter(lua_State *L, lvm_machine *b, int index, lvm_call *call);      /* index: of the machine or of a box over it */
void lvm_leave(lua_State *L, lvm_machine *b, lvm_call *call);
void lvm_raise(lua_State *L, lvm_machine *b);                       /* a callback's error, if there is one */
lua_State *lvm_callback(lvm_machine *b, int ref);                   /* NULL: not now; else stack: anchors, anchors[ref] */
int  lvm_pcall(lua_State *L, lvm_machine *b, int arguments, int results);     /* function above the anchors; 0: error kept */
void lvm_return(lua_State *L, lvm_machine *b);
void lvm_new_anchors(lua_State *L);                                 /* with a place for the error */
int  lvm_anchor(lua_State *L, int machine);                         /* pops a value into the anchors, gives its key */
void lvm_forget(lvm_machine *b, int ref);                           /* from callbacks such as `destroy` */
void lvm_push_vcpu(lua_State *L, vm_vcpu *cpu);                     /* anchors on top of the stack */
void lvm_stop(lvm_machine *b);                                      /* a callback failed whose caller takes no answer */
void lvm_link(lvm_machine *b, lvm_object *o, void *handle, void (*orphan)(lvm_object *));
void lvm_unlink(lvm_object *o);

int  lvm_fail(lua_State *L, int status);                            /* nil, message, code */
int  lvm_done(lua_State *L, int status);                            /* true, or as above */
int  lvm_finish(lua_State *L, lvm_machine *b, lvm_call *call, int status);     /* leave, raise and done, after a call */
int  lvm_index(lua_State *L, const char *what);                      /* for __index; upvalues: methods, getters */
void lvm_class(lua_State *L, const char *name, const luaL_Reg *meta, const luaL_Reg *methods, const luaL_Reg *getters);

unsigned lvm_forks(void);                                           /* how often this process is a fork's child */
static inline bool lvm_is_open(const lvm_machine *b) { return b->m && b->forks == lvm_forks(); }
void lvm_check_open(lua_State *L, const lvm_machine *b, int arg);   /* raises if not */

/* Arguments. */
int      lvm_refuse(lua_State *L, int arg, const char *why);        /* raises: an error that shows the argument */
int      lvm_raw_field(lua_State *L, int arg, const char *name);    /* pushes it, gives its type */
uint64_t lvm_check_bytes(lua_State *L, int arg);                    /* 0 ... , or "64M" */
uint64_t lvm_check_range(lua_State *L, int arg, uint64_t max);
unsigned lvm_check_prot(lua_State *L, int arg);
unsigned lvm_check_access(lua_State *L, int arg);
int      lvm_check_name(lua_State *L, int arg, const char *const *names, const char *what);
void     lvm_push_prot(lua_State *L, unsigned prot);
extern const char *const lvm_advice_names[];                        /* bit by bit */
/* Fields of an options table at `arg` (nil and none are empty tables). */
void     lvm_check_fields(lua_State *L, int arg, const char *const *known);
uint64_t lvm_field_integer(lua_State *L, int arg, const char *name, uint64_t otherwise);
uint64_t lvm_field_range(lua_State *L, int arg, const char *name, uint64_t otherwise, uint64_t max);
bool     lvm_field_boolean(lua_State *L, int arg, const char *name);
const char *lvm_field_string(lua_State *L, int arg, const char *name);        /* stays on the stack */

/* ---- the rest, each opening a part of the module ---- */
lvm_machine *lvm_check_machine(lua_State *L, int arg);              /* open, else raises */
lvm_machine *lvm_test_box(lua_State *L, int arg);
void lvm_open_machine(lua_State *L);
int  lvm_machine_new(lua_State *L);
lvm_machine *lvm_new_machine(lua_State *L);                         /* pushes a closed one, with all it needs of Lua */
void lvm_add_vcpus(lua_State *L, lvm_machine *b, int box);          /* once b->m is there */
void lvm_open_memory(lua_State *L);
extern const luaL_Reg lvm_memory_methods[];
int  lvm_buffer_new(lua_State *L);
void lvm_drop_block(lvm_block *block);
void lvm_drop_hosts(lvm_machine *b);                                /* after vm_destroy */
uint8_t *lvm_check_span(lua_State *L, int arg, size_t *bytes);      /* a buffer's memory */
void lvm_open_vcpu(lua_State *L);
void lvm_new_vcpu(lua_State *L, vm_vcpu *cpu, lvm_machine *b, int machine);
lvm_vcpu *lvm_check_vcpu(lua_State *L, int arg);
void lvm_push_exit(lua_State *L, int vcpu, const vm_exit *e);
bool lvm_last_exit(lua_State *L, int vcpu, vm_exit *e);
void lvm_check_run_options(lua_State *L, int arg, vm_run_options *options);
int  lvm_run(lua_State *L, lvm_vcpu *v, int vcpu, const vm_run_options *options, vm_exit *e, const bool *end);
extern const luaL_Reg lvm_run_methods[], lvm_console_methods[];
void lvm_open_console(lua_State *L);
void lvm_free_consoles(lvm_machine *b);
int  lvm_run_machine(lua_State *L, int machine, const vm_run_options *options, vm_exit *e, unsigned *which);
extern const luaL_Reg lvm_mmu_methods[], lvm_mmu_vcpu_methods[];
void lvm_open_hook(lua_State *L);
void lvm_push_hook(lua_State *L, lvm_machine *b, vm_hook *hook);    /* its box; the anchors are on top */
void lvm_open_snapshot(lua_State *L);
void lvm_free_dead(lvm_machine *b);
void lvm_open_coverage(lua_State *L);
int  lvm_coverage_id(lua_State *L);
void lvm_open_call(lua_State *L);
int  lvm_signature_check(lua_State *L);
void lvm_open_gdb(lua_State *L);
void lvm_gdb_end(lvm_machine *b);                                     /* a callback failed: no more serving */
lua_State *lvm_gdb_borrow(lvm_machine *b);                          /* a coroutine for a thread of libvm, for good */
int  lvm_share_pages(lua_State *L);
lvm_block *lvm_new_block(size_t bytes);
extern const luaL_Reg lvm_hook_methods[], lvm_snapshot_methods[], lvm_coverage_methods[], lvm_coverage_vcpu_methods[];
extern const luaL_Reg lvm_call_methods[], lvm_call_vcpu_methods[], lvm_replay_methods[], lvm_gdb_methods[];
extern const char lvm_access_names[3];
void lvm_open_mmu(lua_State *L);
void lvm_mmu_creating(lvm_machine *b);                              /* whose strategy libvm may make now; NULL: nobody's */
lvm_machine *lvm_mmu_created(void);
int  lvm_protected_ref(lua_State *L);
int  lvm_mmu_register(lua_State *L);
int  lvm_mmu_names(lua_State *L);

#endif
