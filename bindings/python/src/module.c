/* module.c - the extension module libvm._libvm: its state, errors, argument converters, and the border between the GIL and
 * libvm (see pv.h for the rules). */
#include "pv.h"

#include <time.h>

__thread pv_frame *pv_top;

/* ---- errors ---- */

static const struct { const char *name; pv_error base; const char *doc; } pv_error_names[PV_ERRORS] = {
    [PV_ERROR] = { "Error", PV_ERROR, "What went wrong in libvm; status is the library's code." },
    [PV_INVALID] = { "InvalidError", PV_ERROR, "An argument that libvm does not take." },
    [PV_NOMEM] = { "OutOfMemoryError", PV_ERROR, "libvm could not get memory." },
    [PV_BUSY] = { "BusyError", PV_ERROR, "In use by another thread or call." },
    [PV_EXISTS] = { "ExistsError", PV_ERROR, "It already exists." },
    [PV_NOTFOUND] = { "NotFoundError", PV_ERROR, "There is no such thing." },
    [PV_UNSUPPORTED] = { "UnsupportedError", PV_ERROR, "Not possible with this backend, platform or host." },
    [PV_GUEST_MEMORY] = { "GuestMemoryError", PV_ERROR, "A guest address (address) is not there or may not be accessed." },
    [PV_FORMAT] = { "FormatError", PV_ERROR, "A malformed image or file." },
    [PV_HOST] = { "HostError", PV_ERROR, "The host system refused." },
    [PV_INTERNAL] = { "InternalError", PV_ERROR, "An error in libvm; the machine can no longer run." },
    [PV_MAP] = { "MapError", PV_ERROR, "The memory map cannot be changed like this." },
    [PV_BACKEND] = { "BackendUnavailable", PV_UNSUPPORTED, "The backend, CPU model or MMU strategy cannot be used here." },
    [PV_CLOSED] = { "ClosedError", PV_ERROR, "The machine is closed, or the object is no longer part of it." },
    [PV_CALL] = { "CallError", PV_ERROR, "A guest function did not return; exit says why." },
};

/* The builtin exception that an error is besides. */
static PyObject *builtin_base(pv_error e)
{
    switch (e) {
    case PV_INVALID: case PV_FORMAT: case PV_MAP: return PyExc_ValueError;
    case PV_NOMEM: return PyExc_MemoryError;
    case PV_NOTFOUND: return PyExc_LookupError;
    default: return NULL;
    }
}

static bool make_errors(PyObject *module, pv_state *st)
{
    for (int i = 0; i < PV_ERRORS; i++) {
        char name[64];
        PyObject *bases = NULL, *builtin = builtin_base(i);
        PyObject *base = i == PV_ERROR ? PyExc_Exception : st->errors[pv_error_names[i].base];
        snprintf(name, sizeof name, "libvm.%s", pv_error_names[i].name);
        bases = builtin ? PyTuple_Pack(2, base, builtin) : PyTuple_Pack(1, base);
        if (!bases)
            return false;
        st->errors[i] = PyErr_NewExceptionWithDoc(name, pv_error_names[i].doc, bases, NULL);
        Py_DECREF(bases);
        if (!st->errors[i] || PyModule_AddObjectRef(module, pv_error_names[i].name, st->errors[i]) < 0)
            return false;
    }
    return PyObject_SetAttrString(st->errors[PV_ERROR], "status", Py_None) == 0 &&
           PyObject_SetAttrString(st->errors[PV_GUEST_MEMORY], "address", Py_None) == 0 &&
           PyObject_SetAttrString(st->errors[PV_CALL], "exit", Py_None) == 0;
}

static pv_error error_of(int status)
{
    switch (status) {
    case VM_E_INVALID: return PV_INVALID;
    case VM_E_NOMEM: return PV_NOMEM;
    case VM_E_BUSY: return PV_BUSY;
    case VM_E_EXISTS: return PV_EXISTS;
    case VM_E_NOTFOUND: return PV_NOTFOUND;
    case VM_E_UNSUPPORTED: return PV_UNSUPPORTED;
    case VM_E_FAULT: return PV_GUEST_MEMORY;
    case VM_E_FORMAT: return PV_FORMAT;
    case VM_E_HOST: return PV_HOST;
    case VM_E_INTERNAL: return PV_INTERNAL;
    default: return PV_ERROR;
    }
}

PyObject *pv_raise_text(pv_state *st, pv_error error, int status, const char *text)
{
    PyObject *message = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    PyObject *e = message ? PyObject_CallFunctionObjArgs(st->errors[error], message, NULL) : NULL;
    PyObject *code = e ? pv_enum(st, "Status", status) : NULL;
    if (code && PyObject_SetAttrString(e, "status", code) == 0)
        PyErr_SetObject(st->errors[error], e);
    Py_XDECREF(code);
    Py_XDECREF(e);
    Py_XDECREF(message);
    return NULL;
}

static void set_address(pv_state *st, uint64_t address)
{
    PyObject *type, *value, *trace, *number = PyLong_FromUnsignedLongLong(address);
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (number && value)
        PyObject_SetAttrString(value, "address", number);
    PyErr_Clear();
    Py_XDECREF(number);
    PyErr_Restore(type, value, trace);
}

/* Messages about a fault name the first address that failed in hexadecimal. */
PyObject *pv_raise_at(pv_state *st, int status, uint64_t address)
{
    const char *hex = strstr(vm_errmsg(), "0x");
    if (hex)
        address = strtoull(hex, NULL, 16);
    pv_raise_text(st, error_of(status), status, vm_errmsg());
    if (status == VM_E_FAULT)
        set_address(st, address);
    return NULL;
}

PyObject *pv_raise(pv_state *st, int status)
{
    return status == VM_E_FAULT ? pv_raise_at(st, status, 0) : pv_raise_text(st, error_of(status), status, vm_errmsg());
}

PyObject *pv_raise_as(pv_state *st, pv_error error, int status)
{
    return pv_raise_text(st, error, status, vm_errmsg());
}

PyObject *pv_raise_map(pv_state *st, int status)
{
    bool is_map = status == VM_E_INVALID || status == VM_E_EXISTS || status == VM_E_NOTFOUND;
    return is_map ? pv_raise_as(st, PV_MAP, status) : pv_raise(st, status);
}

PyObject *pv_none_or(pv_state *st, int status)
{
    if (status != VM_OK)
        return pv_raise(st, status);
    Py_RETURN_NONE;
}

PyObject *pv_enum(pv_state *st, const char *name, long value)
{
    PyObject *cls, *member;
    if (!st->constants && !(st->constants = PyImport_ImportModule("libvm.constants")))
        return NULL;
    cls = PyObject_GetAttrString(st->constants, name);
    if (!cls)
        return NULL;
    member = PyObject_CallFunction(cls, "l", value);
    Py_DECREF(cls);
    if (!member && PyErr_ExceptionMatches(PyExc_ValueError)) {
        PyErr_Clear();                  /* a newer library's */
        return PyLong_FromLong(value);
    }
    return member;
}

/* ---- objects ---- */

void *pv_new(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

void pv_free(void *object)
{
    PyTypeObject *type = Py_TYPE((PyObject *)object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* ---- the border ---- */

bool pv_open(pv_machine *m)
{
    if (m->m && !m->closing && m->forks == m->st->forks)
        return true;
    if (m->m && m->forks != m->st->forks)
        pv_raise_text(m->st, PV_CLOSED, VM_E_INVALID, "the machine belongs to the process before fork()");
    else
        pv_raise_text(m->st, PV_CLOSED, VM_E_INVALID, "the machine is closed");
    return false;
}

/* Nobody else is inside libvm with this machine, and nothing would call back: short calls may keep the GIL. */
bool pv_is_quiet(const pv_machine *m) { return m->calls == 0 && !m->loud && !m->trace_fn; }

bool pv_enter(pv_frame *f, pv_machine *m)
{
    if (!pv_open(m))
        return false;
    *f = (pv_frame){ .outer = pv_top, .machine = m };
    Py_INCREF(m);
    m->calls++;
    pv_top = f;
    f->ts = PyEval_SaveThread();
    return true;
}

/* Lines of the trace go out where Python code may run. */
static void flush_trace(pv_machine *m)
{
    char *text;
    size_t bytes;
    pthread_mutex_lock(&m->trace_lock);
    text = m->trace_text, bytes = m->trace_bytes;
    m->trace_text = NULL, m->trace_bytes = m->trace_room = 0;
    pthread_mutex_unlock(&m->trace_lock);
    PyObject *fn = Py_XNewRef(m->trace_fn);
    for (size_t at = 0; at < bytes;) {
        size_t length = strlen(text + at + 1);
        PyObject *category = PyLong_FromLong(1L << text[at]);
        PyObject *line = PyUnicode_DecodeUTF8(text + at + 1, (Py_ssize_t)length, "replace");
        PyObject *result = fn && category && line ? PyObject_CallFunctionObjArgs(fn, category, line, NULL) : NULL;
        if (!result && PyErr_Occurred())
            pv_callback_failed(m, NULL);
        Py_XDECREF(result);
        Py_XDECREF(line);
        Py_XDECREF(category);
        at += length + 2;
    }
    Py_XDECREF(fn);
    free(text);
}

bool pv_leave(pv_frame *f)
{
    pv_machine *m = f->machine;
    PyEval_RestoreThread(f->ts);
    f->ts = NULL;
    if (m->trace_bytes)
        flush_trace(m);
    pv_top = f->outer;
    m->calls--;
    Py_DECREF(m);
    if (!f->exc[0])
        return true;
    PyErr_Restore(f->exc[0], f->exc[1], f->exc[2]);
    return false;
}

void pv_callback_begin(pv_gate *g)
{
    g->frame = pv_top && pv_top->ts ? pv_top : NULL;
    if (g->frame) {
        PyEval_RestoreThread(g->frame->ts);
        g->frame->ts = NULL;
    } else {
        g->gil = PyGILState_Ensure();
    }
}

void pv_callback_end(pv_gate *g)
{
    if (g->frame)
        g->frame->ts = PyEval_SaveThread();
    else
        PyGILState_Release(g->gil);
}

void pv_callback_failed(pv_machine *m, vm_vcpu *cpu)
{
    pv_frame *f = pv_top;
    while (f && f->machine != m)
        f = f->outer;
    if (!f || f->exc[0]) {
        PyErr_WriteUnraisable((PyObject *)m);
        return;
    }
    PyErr_Fetch(&f->exc[0], &f->exc[1], &f->exc[2]);
    if (cpu) {
        if (f->vcpu)
            m->of_vcpu[f->vcpu->index].has_stale_kick = true;     /* run() clears it if the kick ends the run */
        vm_vcpu_kick(cpu);
    }
}

/* ---- converters ---- */

static int to_u64(PyObject *o, uint64_t max, uint64_t *out)
{
    PyObject *number = PyNumber_Index(o);
    unsigned long long v;
    if (!number)
        return 0;
    v = PyLong_AsUnsignedLongLong(number);
    bool ok = (v != (unsigned long long)-1 || !PyErr_Occurred()) && v <= max;
    if (!ok)
        PyErr_Format(PyExc_OverflowError, "%R is not between 0 and %llu", number, (unsigned long long)max);
    Py_DECREF(number);
    *out = v;
    return ok;
}

int pv_u64(PyObject *o, void *out) { return to_u64(o, UINT64_MAX, out); }

#define CONVERTER(bits) \
    int pv_u##bits(PyObject *o, void *out) \
    { \
        uint64_t v; \
        if (!to_u64(o, UINT##bits##_MAX, &v)) \
            return 0; \
        *(uint##bits##_t *)out = (uint##bits##_t)v; \
        return 1; \
    }
CONVERTER(32)
CONVERTER(16)
CONVERTER(8)

static const struct { char letter; unsigned shift; } units[] = { { 'K', 10 }, { 'M', 20 }, { 'G', 30 }, { 'T', 40 } };

int pv_bytes(PyObject *o, void *out)
{
    Py_ssize_t length;
    const char *text;
    char *end;
    unsigned shift = 0;
    unsigned long long v;
    if (!PyUnicode_Check(o))
        return pv_u64(o, out);
    if (!(text = PyUnicode_AsUTF8AndSize(o, &length)))
        return 0;
    v = strtoull(text, &end, 0);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if ((*end & ~32) == units[i].letter)
            shift = units[i].shift;
    if (*text < '0' || *text > '9' || (size_t)(end - text) + (shift != 0) != (size_t)length || v > UINT64_MAX >> shift) {
        PyErr_Format(PyExc_ValueError, "'%s' is no size: a number and K, M, G or T", text);
        return 0;
    }
    *(uint64_t *)out = (uint64_t)v << shift;
    return 1;
}

int pv_prot(PyObject *o, void *out)
{
    Py_ssize_t length;
    const char *text;
    uint64_t v = 0;
    if (!PyUnicode_Check(o)) {
        if (!to_u64(o, UINT32_MAX, &v))
            return 0;
        if (v > VM_PROT_RWX) {
            PyErr_Format(PyExc_ValueError, "%llu is no set of R, W and X", (unsigned long long)v);
            return 0;
        }
        *(vm_prot *)out = (vm_prot)v;
        return 1;
    }
    if (!(text = PyUnicode_AsUTF8AndSize(o, &length)))
        return 0;
    for (Py_ssize_t i = 0; i < length; i++) {
        static const char letters[] = "rwx-";
        const char *at = strchr(letters, text[i]);
        if (!at || !*at) {
            PyErr_Format(PyExc_ValueError, "permissions are letters of \"rwx\", not '%s'", text);
            return 0;
        }
        v |= at - letters < 3 ? 1u << (at - letters) : 0;
    }
    *(vm_prot *)out = (vm_prot)v;
    return 1;
}

int pv_seconds(PyObject *o, void *out)
{
    double seconds;
    *(uint64_t *)out = 0;
    if (o == Py_None)
        return 1;
    seconds = PyFloat_AsDouble(o);
    if (seconds == -1.0 && PyErr_Occurred())
        return 0;
    if (!(seconds >= 0)) {
        PyErr_Format(PyExc_ValueError, "a timeout is a number of seconds from 0 on, not %R", o);
        return 0;
    }
    *(uint64_t *)out = seconds > 9e9 ? UINT64_C(9000000000000000000) : (uint64_t)(seconds * 1e9) + (seconds == 0);
    return 1;
}

int pv_path(PyObject *o, void *out)
{
    PyObject **path = out;
    if (!o) {                           /* cleanup */
        Py_CLEAR(*path);
        return 1;
    }
    if (o == Py_None) {
        *path = NULL;
        return 1;
    }
    return PyUnicode_FSConverter(o, path);
}

bool pv_named(PyObject *o, const pv_name *names, const char *what, long *out)
{
    if (PyUnicode_Check(o)) {
        for (const pv_name *n = names; n->name; n++)
            if (PyUnicode_CompareWithASCIIString(o, n->name) == 0)
                return *out = n->value, true;
        PyErr_Format(PyExc_ValueError, "%R is no %s", o, what);
        return false;
    }
    PyObject *number = PyNumber_Index(o);
    if (!number)
        return false;
    *out = PyLong_AsLong(number);
    Py_DECREF(number);
    return *out != -1 || !PyErr_Occurred();
}

uint64_t pv_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- functions ---- */

static PyObject *text_or_none(const char *text)
{
    if (!text)
        Py_RETURN_NONE;
    return PyUnicode_FromString(text);
}

static PyObject *f_version(PyObject *module, PyObject *unused) { return PyUnicode_FromString(vm_version()); }
static PyObject *f_version_number(PyObject *module, PyObject *unused)
{
    return PyLong_FromUnsignedLong(vm_version_number());
}
static PyObject *f_errmsg(PyObject *module, PyObject *unused) { return PyUnicode_FromString(vm_errmsg()); }

static PyObject *f_strerror(PyObject *module, PyObject *args)
{
    int status;
    return PyArg_ParseTuple(args, "i:strerror", &status) ? PyUnicode_FromString(vm_strerror(status)) : NULL;
}

static PyObject *f_exit_name(PyObject *module, PyObject *args)
{
    int reason;
    return PyArg_ParseTuple(args, "i:exit_name", &reason) ? PyUnicode_FromString(vm_exit_name(reason)) : NULL;
}

static PyObject *f_backend_name(PyObject *module, PyObject *args)
{
    PyObject *o;
    long v;
    if (!PyArg_ParseTuple(args, "O:backend_name", &o) || !pv_named(o, pv_backend_names, "backend", &v))
        return NULL;
    return text_or_none(vm_backend_name((vm_backend)v));
}

static PyObject *f_query(PyObject *module, PyObject *args)
{
    PyObject *o;
    const char *capability;
    uint64_t value = 0;
    long v;
    int status;
    if (!PyArg_ParseTuple(args, "Os:query", &o, &capability) || !pv_named(o, pv_backend_names, "backend", &v))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = vm_query((vm_backend)v, capability, &value);
    Py_END_ALLOW_THREADS
    return status ? pv_raise(PyModule_GetState(module), status) : PyLong_FromUnsignedLongLong(value);
}

static PyObject *f_reg_size(PyObject *module, PyObject *args)
{
    int id;
    return PyArg_ParseTuple(args, "i:reg_size", &id) ? PyLong_FromSize_t(vm_reg_size(id)) : NULL;
}

static PyObject *f_reg_name(PyObject *module, PyObject *args)
{
    int id;
    return PyArg_ParseTuple(args, "i:reg_name", &id) ? text_or_none(vm_reg_name(id)) : NULL;
}

static PyObject *f_reg_find(PyObject *module, PyObject *args)
{
    const char *name;
    return PyArg_ParseTuple(args, "s:reg_find", &name) ? pv_enum(PyModule_GetState(module), "Reg", vm_reg_find(name)) : NULL;
}

static PyObject *f_stat_names(PyObject *module, PyObject *unused)
{
    PyObject *names = PyDict_New();
    const char *text = NULL, *name;
    for (unsigned i = 0; names && (name = vm_stat_name(i, &text)); i++) {
        PyObject *line = PyUnicode_FromString(text);
        if (!line || PyDict_SetItemString(names, name, line) < 0)
            Py_CLEAR(names);
        Py_XDECREF(line);
    }
    return names;
}

static PyObject *f_trace_parse(PyObject *module, PyObject *args)
{
    const char *list;
    unsigned mask = 0;
    int status;
    if (!PyArg_ParseTuple(args, "s:trace_parse", &list))
        return NULL;
    if ((status = vm_trace_parse(list, &mask)) != VM_OK)
        return pv_raise(PyModule_GetState(module), status);
    return pv_enum(PyModule_GetState(module), "TraceCategory", (long)mask);
}

static PyObject *f_signature_check(PyObject *module, PyObject *args)
{
    const char *signature;
    size_t count = 0;
    int status;
    if (!PyArg_ParseTuple(args, "s:signature_check", &signature))
        return NULL;
    if ((status = vm_signature_check(signature, &count)) != VM_OK)
        return pv_raise(PyModule_GetState(module), status);
    return PyLong_FromSize_t(count);
}

static PyObject *f_coverage_id(PyObject *module, PyObject *args)
{
    uint64_t gva;
    return PyArg_ParseTuple(args, "O&:coverage_id", pv_u64, &gva) ? PyLong_FromUnsignedLong(vm_coverage_id(gva)) : NULL;
}

static PyObject *f_share_pages(PyObject *module, PyObject *args)
{
    pv_state *st = PyModule_GetState(module);
    PyObject *list, *items;
    if (!PyArg_ParseTuple(args, "O:share_pages", &list) || !(items = PySequence_Tuple(list)))
        return NULL;
    Py_ssize_t n = PyTuple_Size(items), entered = 0;
    pv_frame *frames = calloc((size_t)n + 1, sizeof *frames);
    vm_machine **machines = calloc((size_t)n + 1, sizeof *machines);
    uint64_t saved = 0;
    int status = VM_OK;
    bool ok = frames && machines;
    for (Py_ssize_t i = 0; ok && i < n; i++) {
        PyObject *o = PyTuple_GetItem(items, i);
        if (!PyObject_TypeCheck(o, st->types[PV_T_MACHINE])) {
            PyErr_Format(PyExc_TypeError, "share_pages() takes machines, not %R", o);
            ok = false;
        } else if (pv_open((pv_machine *)o)) {
            machines[i] = ((pv_machine *)o)->m;
            ((pv_machine *)o)->calls++;
            entered = i + 1;
        } else {
            ok = false;
        }
    }
    if (!frames || !machines)
        PyErr_NoMemory();
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        status = vm_share_pages(machines, (unsigned)n, &saved);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < entered; i++)
        ((pv_machine *)PyTuple_GetItem(items, i))->calls--;
    free(frames);
    free(machines);
    Py_DECREF(items);
    if (!ok)
        return NULL;
    return status ? pv_raise(st, status) : PyLong_FromUnsignedLongLong(saved);
}

static PyObject *f_sandbox_enter(PyObject *module, PyObject *args)
{
    uint32_t flags = 0;
    if (!PyArg_ParseTuple(args, "|O&:sandbox_enter", pv_u32, &flags))
        return NULL;
    return pv_none_or(PyModule_GetState(module), vm_sandbox_enter(flags));
}

static PyObject *f_sandbox_calls(PyObject *module, PyObject *args)
{
    uint32_t flags = 0;
    const char *name;
    PyObject *list = PyArg_ParseTuple(args, "|O&:sandbox_calls", pv_u32, &flags) ? PyList_New(0) : NULL;
    for (unsigned i = 0; list && (name = vm_sandbox_call(flags, i)); i++) {
        PyObject *o = PyUnicode_FromString(name);
        if (!o || PyList_Append(list, o) < 0)
            Py_CLEAR(list);
        Py_XDECREF(o);
    }
    return list;
}

/* The classes of the package whose objects this module makes. */
static PyObject *f_set_classes(PyObject *module, PyObject *args)
{
    pv_state *st = PyModule_GetState(module);
    PyObject *machine, *vcpu, *console;
    if (!PyArg_ParseTuple(args, "OOO", &machine, &vcpu, &console))
        return NULL;
    Py_XSETREF(st->machine_class, Py_NewRef(machine));
    Py_XSETREF(st->vcpu_class, Py_NewRef(vcpu));
    Py_XSETREF(st->console_class, Py_NewRef(console));
    Py_RETURN_NONE;
}

/* os.register_at_fork: machines of the parent are none of the child's business; their threads do not exist here. */
static PyObject *f_forked(PyObject *module, PyObject *unused)
{
    pv_state *st = PyModule_GetState(module);
    st->forks++;
    pv_top = NULL;
    Py_RETURN_NONE;
}

/* atexit: machines end while other threads can still take the GIL and leave libvm. */
static PyObject *f_end(PyObject *module, PyObject *unused)
{
    pv_state *st = PyModule_GetState(module);
    st->ending = true;
    for (pv_machine *m = st->machines; m;) {
        Py_INCREF(m);
        if (m->m && !m->closing && m->forks == st->forks && m->exports == 0 && !pv_close(m))
            PyErr_Clear();
        pv_machine *next = m->next;
        Py_DECREF(m);
        m = next;
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    { "version", f_version, METH_NOARGS, "version() -> str\nThe library's version." },
    { "version_number", f_version_number, METH_NOARGS, "version_number() -> int\nThe same as a number." },
    { "errmsg", f_errmsg, METH_NOARGS, "errmsg() -> str\nDetail of this thread's last failure." },
    { "strerror", f_strerror, METH_VARARGS, "strerror(status) -> str\nA status in words." },
    { "exit_name", f_exit_name, METH_VARARGS, "exit_name(reason) -> str\nAn exit reason in one word." },
    { "backend_name", f_backend_name, METH_VARARGS, "backend_name(backend) -> str" },
    { "query", f_query, METH_VARARGS, "query(backend, capability) -> int\nWhat a backend can do here." },
    { "reg_size", f_reg_size, METH_VARARGS, "reg_size(reg) -> int\nBytes of a register, 0: none such." },
    { "reg_name", f_reg_name, METH_VARARGS, "reg_name(reg) -> str | None" },
    { "reg_find", f_reg_find, METH_VARARGS, "reg_find(name) -> Reg\nA register by name, Reg.NONE if there is none." },
    { "stat_names", f_stat_names, METH_NOARGS, "stat_names() -> dict[str, str]\nCounters and what they count." },
    { "trace_parse", f_trace_parse, METH_VARARGS, "trace_parse(list) -> TraceCategory" },
    { "signature_check", f_signature_check, METH_VARARGS, "signature_check(signature) -> int\nHow many arguments." },
    { "coverage_id", f_coverage_id, METH_VARARGS, "coverage_id(gva) -> int\nA block's id in coverage maps." },
    { "share_pages", f_share_pages, METH_VARARGS, "share_pages(machines) -> int\nLets equal pages share memory; bytes saved." },
    { "sandbox_enter", f_sandbox_enter, METH_VARARGS,
      "sandbox_enter(flags=0)\nGives up what running machines does not need: SandboxFlags. Cannot be undone." },
    { "sandbox_calls", f_sandbox_calls, METH_VARARGS, "sandbox_calls(flags=0) -> list[str]\nThe system calls that it allows." },
    { "mmu_register", pv_mmu_register, METH_VARARGS, 
      "mmu_register(name, cls)\nAdds an MMU strategy written in Python: cls() has translate(cpu, gva, access, context), which gives\n"
      "(gpa, page_bytes, prot[, global[, trap_writes]]), or (error,) or None for a page fault. Optional: root_changed(cpu, cr3),\n"
      "invalidate(cpu, gva, size), table_written(cpu, gpa)." },
    { "mmu_names", pv_mmu_names, METH_NOARGS, "mmu_names() -> list[str]\nThe MMU strategies there are." },
    { "_set_classes", f_set_classes, METH_VARARGS, NULL },
    { "_forked", f_forked, METH_NOARGS, NULL },
    { "_end", f_end, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL }
};

/* ---- the module ---- */

static PyType_Spec *const specs[PV_TYPES] = {
    [PV_T_MACHINE] = &pv_machine_spec, [PV_T_VCPU] = &pv_vcpu_spec, [PV_T_REGION] = &pv_region_spec,
    [PV_T_EXIT] = &pv_exit_spec, [PV_T_EVENT] = &pv_event_spec, [PV_T_HOOK] = &pv_hook_spec,
    [PV_T_CONSOLE] = &pv_console_spec, [PV_T_SNAPSHOT] = &pv_snapshot_spec, [PV_T_VIOLATION] = &pv_violation_spec,
    [PV_T_BINDING] = &pv_binding_spec, [PV_T_CLOSURE] = &pv_closure_spec, [PV_T_GDB] = &pv_gdb_spec,
    [PV_T_RING] = &pv_ring_spec, [PV_T_REGFILE] = &pv_regfile_spec,
};

/* The state, from one of the module's types or a Python class made from one. */
pv_state *pv_state_of(PyTypeObject *type)
{
    for (; type; type = PyType_GetSlot(type, Py_tp_base)) {
        pv_state *st = PyType_GetModuleState(type);
        if (st)
            return st;
        PyErr_Clear();
    }
    return NULL;
}

static bool call_with(const char *module, const char *function, PyObject *mine, const char *name, const char *keyword)
{
    PyObject *theirs = PyImport_ImportModule(module), *f = NULL, *own = NULL, *args = NULL, *kw = NULL, *result = NULL;
    if (theirs && (f = PyObject_GetAttrString(theirs, function)) && (own = PyObject_GetAttrString(mine, name))) {
        args = keyword ? PyTuple_New(0) : PyTuple_Pack(1, own);
        kw = keyword ? Py_BuildValue("{sO}", keyword, own) : NULL;
        result = args && (kw || !keyword) ? PyObject_Call(f, args, kw) : NULL;
    }
    Py_XDECREF(kw);
    Py_XDECREF(args);
    Py_XDECREF(own);
    Py_XDECREF(f);
    Py_XDECREF(theirs);
    Py_XDECREF(result);
    return result;
}

static int module_exec(PyObject *module)
{
    static const char *const keywords[PV_RUN_OPTIONS] = { "max_instructions", "timeout", "until", "exception_exits", "single_step",
                                                           "signal_blocked", "brief" };
    pv_state *st = PyModule_GetState(module);
    if (!make_errors(module, st))
        return -1;
    for (int i = 0; i < PV_TYPES; i++) {
        st->types[i] = (PyTypeObject *)PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (!st->types[i] || PyModule_AddType(module, st->types[i]) < 0)
            return -1;
    }
    for (size_t i = 0; i < PV_RUN_OPTIONS; i++)
        if (!(st->kw[i] = PyUnicode_InternFromString(keywords[i])))
            return -1;
    st->machine_class = Py_NewRef((PyObject *)st->types[PV_T_MACHINE]);
    st->vcpu_class = Py_NewRef((PyObject *)st->types[PV_T_VCPU]);
    st->console_class = Py_NewRef((PyObject *)st->types[PV_T_CONSOLE]);
    if (PyModule_AddIntConstant(module, "MAX_VCPUS", VM_MAX_VCPUS) < 0)
        return -1;
    return call_with("os", "register_at_fork", module, "_forked", "after_in_child") &&
           call_with("atexit", "register", module, "_end", NULL) ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    pv_state *st = PyModule_GetState(module);
    if (!st)
        return 0;
    for (int i = 0; i < PV_ERRORS; i++)
        Py_VISIT(st->errors[i]);
    for (int i = 0; i < PV_TYPES; i++)
        Py_VISIT(st->types[i]);
    Py_VISIT(st->machine_class);
    Py_VISIT(st->vcpu_class);
    Py_VISIT(st->console_class);
    Py_VISIT(st->constants);
    return 0;
}

static int module_clear(PyObject *module)
{
    pv_state *st = PyModule_GetState(module);
    if (!st)
        return 0;
    for (int i = 0; i < PV_ERRORS; i++)
        Py_CLEAR(st->errors[i]);
    for (int i = 0; i < PV_TYPES; i++)
        Py_CLEAR(st->types[i]);
    for (int i = 0; i < 32; i++)
        Py_CLEAR(st->reasons[i]);
    for (int i = 0; i < PV_RUN_OPTIONS; i++)
        Py_CLEAR(st->kw[i]);
    Py_CLEAR(st->machine_class);
    Py_CLEAR(st->vcpu_class);
    Py_CLEAR(st->console_class);
    Py_CLEAR(st->constants);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot slots[] = { { Py_mod_exec, module_exec }, { 0, NULL } };
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "libvm._libvm", .m_doc = "The C side of the package libvm.",
    .m_size = sizeof(pv_state), .m_methods = functions, .m_slots = slots, .m_traverse = module_traverse,
    .m_clear = module_clear, .m_free = module_free,
};

PyMODINIT_FUNC PyInit__libvm(void) { return PyModuleDef_Init(&definition); }
