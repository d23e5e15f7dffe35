/* pv.h - what the sources of the Python module share.
 *
 * Invariants
 *   - Every object of the module holds its machine object. A closed machine has m == NULL; whoever is about to touch libvm looks
 *     there first, holding the GIL (pv_open).
 *   - A call into libvm that can wait or call back is made between pv_enter() and pv_leave(), without the GIL. Calls that can
 *     do neither may hold it, if pv_is_quiet().
 *   - A callback from libvm runs between pv_callback_begin() and pv_callback_end(), with the GIL. If it raises, the exception
 *     is kept in the innermost frame of its machine on this thread (pv_callback_failed) and raised by that frame's pv_leave(),
 *     before any error of libvm.
 *   - What the machine needs of Python (callbacks, devices) hangs on the machine object, which shows it to the collector; those
 *     structs point back without a reference.
 *   - pv_machine.calls counts frames; close() waits until there are none.
 */
#ifndef LIBVM_PYTHON_PV_H
#define LIBVM_PYTHON_PV_H

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>
#include <structmember.h>

/* The limited interface has these as functions of PyObject *, or not at all. */
#undef Py_INCREF
#undef Py_DECREF
#undef Py_XDECREF
#undef Py_REFCNT
#define Py_INCREF(o) Py_INCREF((PyObject *)(o))
#define Py_DECREF(o) Py_DECREF((PyObject *)(o))
#define Py_XDECREF(o) Py_XDECREF((PyObject *)(o))
#define Py_REFCNT(o) Py_REFCNT((PyObject *)(o))
#undef Py_CLEAR
#define Py_CLEAR(place) do { PyObject *old_ = (PyObject *)(place); (place) = NULL; Py_XDECREF(old_); } while (0)
#define Py_XSETREF(place, value) do { PyObject *old_ = (PyObject *)(place); (place) = (value); Py_XDECREF(old_); } while (0)

#include <libvm/libvm.h>
#include <libvm/sandbox.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PV_SLICE_MS = 50 };              /* how long a run goes on before signals are looked at */
enum { PV_CONSOLES = 5, PV_DEBUGCON = 4 };

/* Exceptions, in the order of pv_error_names. */
typedef enum pv_error {
    PV_ERROR, PV_INVALID, PV_NOMEM, PV_BUSY, PV_EXISTS, PV_NOTFOUND, PV_UNSUPPORTED, PV_GUEST_MEMORY, PV_FORMAT, PV_HOST,
    PV_INTERNAL, PV_MAP, PV_BACKEND, PV_CLOSED, PV_CALL, PV_ERRORS
} pv_error;

/* Types made from specs. */
typedef enum pv_type {
    PV_T_MACHINE, PV_T_VCPU, PV_T_REGION, PV_T_EXIT, PV_T_EVENT, PV_T_HOOK, PV_T_CONSOLE, PV_T_SNAPSHOT, PV_T_VIOLATION,
    PV_T_BINDING, PV_T_CLOSURE, PV_T_GDB, PV_T_RING, PV_T_REGFILE, PV_TYPES
} pv_type;

struct pv_machine;
enum { PV_RUN_OPTIONS = 7 };            /* as run_option() numbers them */

typedef struct pv_state {
    PyObject *errors[PV_ERRORS];
    PyTypeObject *types[PV_TYPES];
    PyObject *machine_class, *vcpu_class, *console_class;       /* the package's subclasses, or the types */
    PyObject *constants;                /* module libvm.constants, imported when first needed */
    PyObject *reasons[32];              /* members of ExitReason */
    PyObject *kw[PV_RUN_OPTIONS];       /* names of run()'s keywords */
    unsigned forks;                     /* how often this process is a fork's child */
    bool ending;                        /* the interpreter shuts down */
    struct pv_machine *machines;
} pv_state;

/* A call into libvm without the GIL. On the caller's stack; the thread's frames are a list. */
typedef struct pv_frame {
    struct pv_frame *outer;
    struct pv_machine *machine;
    struct pv_vcpu *vcpu;               /* run(): who runs */
    struct pv_machine *copy;            /* fork(): the machine being made */
    PyThreadState *ts;                  /* the GIL is not held; NULL: it is (a callback runs) */
    PyObject *exc[3];                   /* a callback's exception */
} pv_frame;
extern __thread pv_frame *pv_top;

/* Callbacks of a region. */
typedef struct pv_device {
    struct pv_device *next, **link;
    struct pv_machine *machine;
    PyObject *object;                   /* the device */
    PyObject *read, *write, *reset, *save, *restore, *destroy, *clone;      /* bound methods or NULL */
    PyObject *saved;                    /* between the two calls of save */
    struct pv_region *region;           /* its handle, NULL when that is gone; no reference */
} pv_device;

typedef struct pv_hook_data {
    struct pv_hook_data *next, **link;
    struct pv_machine *machine;
    vm_hook *hook;
    PyObject *fn;
    struct pv_event *event;             /* used again when the callback did not keep it */
    struct pv_hook *handle;             /* no reference */
    vm_hook_kind kind;
    uint64_t begin, end;
} pv_hook_data;

typedef struct pv_binding_data {
    struct pv_binding_data *next, **link;
    struct pv_machine *machine;
    vm_binding *binding;
    PyObject *fn;
    struct pv_signature *signature;
    struct pv_binding *handle;          /* no reference */
} pv_binding_data;

/* Where a console's output goes. The lock is taken without the GIL or for moments. */
typedef struct pv_sink {
    struct pv_machine *machine;
    pthread_mutex_t lock;
    pthread_cond_t grown;
    char    *text;
    size_t   begin, end, room;
    uint64_t dropped, total;
    PyObject *fn;
    bool     is_set;                    /* libvm knows of it */
    bool     is_over;                   /* the machine is closed */
} pv_sink;

typedef struct pv_machine {
    PyObject_HEAD
    vm_machine *m;                      /* NULL: closed */
    pv_state *st;
    struct pv_machine *next, **link;    /* pv_state.machines */
    unsigned forks;                     /* pv_state.forks when it was made */
    unsigned calls;                     /* frames */
    unsigned vcpu_count;
    unsigned snapshots, exports;        /* handles that exist; buffers given out */
    uint64_t sequence;                  /* of regions and snapshots */
    bool closing;
    bool loud;                          /* a Python MMU strategy: any call may call back */
    bool poisoned;                      /* left behind: the parent's */
    struct pv_vcpu *vcpus[VM_MAX_VCPUS];        /* no references: a vCPU's object may go and come again. What lasts is here: */
    struct {
        struct pv_exit *last;           /* completes what the next run completes; refers to no hook */
        struct pv_ring *rings[2];       /* block trace, comparisons */
        bool has_stale_kick;            /* pv_callback_failed() kicked, and the run ended otherwise */
    } of_vcpu[VM_MAX_VCPUS];
    pv_device *devices;
    pv_hook_data *hooks;
    pv_binding_data *bindings;
    struct pv_region *regions;          /* no references */
    struct pv_gdb *gdb;                 /* no reference */
    PyObject *breakpoints;              /* set of addresses */
    PyObject *kept;                     /* list of objects whose buffers libvm may still use */
    PyObject *on_violation, *trace_fn;
    PyObject *mmu_object;               /* instance of a Python strategy; owned by its state in libvm */
    pv_sink *sinks[PV_CONSOLES];
    Py_buffer coverage;
    bool has_coverage;
    pthread_mutex_t trace_lock;
    char *trace_text;
    size_t trace_bytes, trace_room;
} pv_machine;

typedef struct pv_exit {
    PyObject_HEAD
    pv_state *st;
    PyObject *hook;                     /* HOOK */
    vm_exit e;
} pv_exit;

typedef struct pv_vcpu {
    PyObject_HEAD
    vm_vcpu *cpu;
    pv_machine *machine;
    unsigned index;
} pv_vcpu;

typedef struct pv_region {
    PyObject_HEAD
    pv_machine *machine;
    struct pv_region *next, **link;     /* pv_machine.regions */
    vm_region *r;                       /* NULL: unmapped */
    uint64_t gpa, bytes, sequence;
    void *data;                         /* NULL: device */
    bool is_port;
    unsigned exports;
    Py_buffer host;                     /* map_host: what it maps */
    bool has_host;
    pv_device *device;
} pv_region;

typedef struct pv_event {
    PyObject_HEAD
    vm_hook_event e;
    PyObject *data;                     /* bytes, made when asked for */
    bool is_live;                       /* e.data may be looked at */
} pv_event;

typedef struct pv_hook {
    PyObject_HEAD
    pv_machine *machine;
    pv_hook_data *data;                 /* NULL: removed */
} pv_hook;

typedef struct pv_binding {
    PyObject_HEAD
    pv_machine *machine;
    pv_binding_data *data;
} pv_binding;

typedef struct pv_gdb {
    PyObject_HEAD
    pv_machine *machine;
    vm_gdb *g;                          /* NULL: closed */
    PyObject *on_exit, *on_reset;
} pv_gdb;

/* ---- module.c ---- */
pv_state *pv_state_of(PyTypeObject *type);
PyObject *pv_raise(pv_state *st, int status);                       /* libvm's error on this thread; gives NULL */
PyObject *pv_raise_as(pv_state *st, pv_error error, int status);
PyObject *pv_raise_text(pv_state *st, pv_error error, int status, const char *text);
PyObject *pv_raise_map(pv_state *st, int status);
PyObject *pv_raise_at(pv_state *st, int status, uint64_t address);  /* FAULT: of this address if the message has none */
PyObject *pv_enum(pv_state *st, const char *name, long value);      /* a member of libvm.constants' class */
PyObject *pv_none_or(pv_state *st, int status);
bool pv_open(pv_machine *m);                                        /* false: raised */
bool pv_is_quiet(const pv_machine *m);
bool pv_enter(pv_frame *f, pv_machine *m);                          /* false: raised */
bool pv_leave(pv_frame *f);                                         /* false: raised (a callback's) */
typedef struct pv_gate { pv_frame *frame; PyGILState_STATE gil; } pv_gate;
void pv_callback_begin(pv_gate *g);
void pv_callback_end(pv_gate *g);
void pv_callback_failed(pv_machine *m, vm_vcpu *cpu);               /* with the exception set; cpu not NULL: stop it */
void *pv_new(PyTypeObject *type);                                   /* tp_alloc */
void pv_free(void *object);                                         /* tp_free and the type's reference */

/* "O&" converters. */
int pv_u64(PyObject *o, void *out);
int pv_u32(PyObject *o, void *out);
int pv_u16(PyObject *o, void *out);
int pv_u8(PyObject *o, void *out);
int pv_bytes(PyObject *o, void *out);                               /* 4096, "64K", "256M", "1G" */
int pv_prot(PyObject *o, void *out);                                /* Prot, "rwx" */
int pv_seconds(PyObject *o, void *out);                             /* None, seconds -> ns, 0: none */
int pv_path(PyObject *o, void *out);                                /* str, bytes, PathLike, None -> PyObject bytes or NULL */
typedef struct pv_name { const char *name; long value; } pv_name;
bool pv_named(PyObject *o, const pv_name *names, const char *what, long *out);
uint64_t pv_now(void);

/* ---- machine.c, memory.c, ... ---- */
extern PyType_Spec pv_machine_spec, pv_vcpu_spec, pv_region_spec, pv_exit_spec, pv_event_spec, pv_hook_spec, pv_console_spec,
    pv_snapshot_spec, pv_violation_spec, pv_binding_spec, pv_closure_spec, pv_gdb_spec, pv_ring_spec, pv_regfile_spec;
extern const pv_name pv_backend_names[];
bool pv_close(pv_machine *m);
PyObject *pv_vcpu_get(pv_machine *m, unsigned index);
PyObject *pv_vcpu_of(pv_machine *m, vm_vcpu *cpu);                  /* in callbacks */
PyObject *pv_exit_new(pv_state *st);
void pv_exit_set_hook(pv_exit *e, pv_machine *m);
PyObject *pv_hook_handle(pv_machine *m, vm_hook *hook);
bool pv_regions_can_go(pv_machine *m, uint64_t newer_than, bool is_loaded);
void pv_regions_gone(pv_machine *m, uint64_t newer_than, bool is_loaded);
void pv_hook_data_free(pv_hook_data *d);
void pv_device_free(pv_device *d);
void pv_sink_free(pv_sink *s);
void pv_sink_end(pv_sink *s);
void pv_signature_free(struct pv_signature *s);
void pv_vcpu_end(pv_machine *m, unsigned index);

/* Methods of Machine and Vcpu by part. */
extern PyMethodDef pv_memory_methods[], pv_hook_methods[], pv_boot_methods[], pv_snapshot_methods[], pv_mmu_methods[],
    pv_call_methods[], pv_gdb_methods[], pv_coverage_methods[];
extern PyMethodDef pv_mmu_vcpu_methods[], pv_call_vcpu_methods[], pv_coverage_vcpu_methods[];
extern PyMethodDef pv_functions[];      /* of the module */
PyObject *pv_memory_get(PyObject *self, PyObject *key);
int pv_memory_set(PyObject *self, PyObject *key, PyObject *value);

PyObject *pv_mmu_register(PyObject *module, PyObject *args);
PyObject *pv_mmu_names(PyObject *module, PyObject *unused);

#define PV_KW(f) ((PyCFunction)(void (*)(void))(f))
#define PV_BEGIN(machine) pv_frame frame; if (!pv_enter(&frame, machine)) return NULL
#define PV_END() if (!pv_leave(&frame)) return NULL

#endif
