/* gdb.c - libvm.Gdb: the debugger's stub. */
#include "pv.h"

static vm_gdb_action on_exit_call(void *user, vm_vcpu *cpu, vm_exit *exit)
{
    pv_gdb *g = user;
    pv_machine *m = g->machine;
    pv_gate gate;
    uint64_t action = VM_GDB_DEFAULT;
    pv_callback_begin(&gate);
    PyObject *vcpu = pv_vcpu_of(m, cpu), *fn = Py_XNewRef(g->on_exit), *o = NULL;
    pv_exit *x = (pv_exit *)pv_exit_new(m->st);
    if (vcpu && fn && x) {
        x->e = *exit;
        o = PyObject_CallFunctionObjArgs(fn, vcpu, (PyObject *)x, NULL);
        *exit = x->e;
    }
    if (!o || (o != Py_None && !pv_u64(o, &action))) {
        if (pv_top)
            pv_callback_failed(m, NULL);
        else
            PyErr_WriteUnraisable(fn);
        action = VM_GDB_END;
    }
    Py_XDECREF(o);
    Py_XDECREF(x);
    Py_XDECREF(fn);
    Py_XDECREF(vcpu);
    pv_callback_end(&gate);
    return (vm_gdb_action)action;
}

static int on_reset_call(void *user, vm_machine *unused)
{
    pv_gdb *g = user;
    pv_gate gate;
    pv_callback_begin(&gate);
    PyObject *fn = Py_XNewRef(g->on_reset), *o = fn ? PyObject_CallFunctionObjArgs(fn, (PyObject *)g->machine, NULL) : NULL;
    bool ok = o != NULL;
    if (!ok && pv_top)
        pv_callback_failed(g->machine, NULL);
    else if (!ok)
        PyErr_WriteUnraisable(fn);
    Py_XDECREF(o);
    Py_XDECREF(fn);
    pv_callback_end(&gate);
    return ok ? VM_OK : VM_E_INTERNAL;
}

static PyObject *machine_gdbstub(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "address", "runs_alone", "reverse_interval", "on_exit", "on_reset", NULL };
    pv_machine *m = (pv_machine *)self;
    const char *address;
    int alone = 0;
    PyObject *fn = Py_None, *reset = Py_None;
    vm_gdb_options o = VM_GDB_OPTIONS_INIT;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|pO&OO:gdbstub", names, &address, &alone, pv_u64, &o.reverse_interval, &fn,
                                     &reset))
        return NULL;
    if ((fn != Py_None && !PyCallable_Check(fn)) || (reset != Py_None && !PyCallable_Check(reset)))
        return PyErr_SetString(PyExc_TypeError, "on_exit and on_reset are functions"), NULL;
    pv_gdb *g = pv_open(m) ? pv_new(m->st->types[PV_T_GDB]) : NULL;
    if (!g)
        return NULL;
    g->machine = (pv_machine *)Py_NewRef(self);
    g->on_exit = fn == Py_None ? NULL : Py_NewRef(fn);
    g->on_reset = reset == Py_None ? NULL : Py_NewRef(reset);
    o.runs_alone = alone;
    o.on_reset = g->on_reset ? on_reset_call : NULL;
    o.on_exit = g->on_exit ? on_exit_call : NULL;
    o.user = g;
    vm_gdb *made = NULL;
    pv_frame frame;
    bool ok = pv_enter(&frame, m);
    int status = !ok ? VM_E_INVALID : vm_gdbstub(m->m, address, &o, &made);
    ok = ok && pv_leave(&frame);
    g->g = made;
    if (made)
        m->gdb = g;
    if (ok && status == VM_OK)
        return (PyObject *)g;
    Py_DECREF(g);
    return ok ? pv_raise(m->st, status) : NULL;
}

static bool is_there(pv_gdb *g)
{
    if (!pv_open(g->machine))
        return false;
    if (!g->g)
        pv_raise_text(g->machine->st, PV_CLOSED, VM_E_INVALID, "the stub is closed");
    return g->g != NULL;
}

static PyObject *gdb_serve(PyObject *self, PyObject *unused)
{
    pv_gdb *g = (pv_gdb *)self;
    if (!is_there(g))
        return NULL;
    pv_exit *x = (pv_exit *)pv_exit_new(g->machine->st);
    pv_frame frame;
    if (!x)
        return NULL;
    bool ok = pv_enter(&frame, g->machine);
    int status = !ok ? VM_E_INVALID : vm_gdb_serve(g->g, &x->e);
    ok = ok && pv_leave(&frame);
    if (ok && status == VM_OK)
        return pv_exit_set_hook(x, g->machine), (PyObject *)x;
    Py_DECREF(x);
    return ok ? pv_raise(g->machine->st, status) : NULL;
}

static PyObject *gdb_stop(PyObject *self, PyObject *unused)
{
    pv_gdb *g = (pv_gdb *)self;
    if (!is_there(g))
        return NULL;
    vm_gdb_stop(g->g);
    Py_RETURN_NONE;
}

/* Also when the machine goes, which it may not do before its stub. */
static bool gdb_drop(pv_gdb *g)
{
    vm_gdb *gone = g->g;
    pv_machine *m = g->machine;
    g->g = NULL;
    if (!gone)
        return true;
    m->gdb = NULL;
    if (!m->m || m->forks != m->st->forks)
        return true;
    pv_frame frame = { .outer = pv_top, .machine = m };
    pv_top = &frame;
    frame.ts = PyEval_SaveThread();
    vm_gdb_free(gone);
    PyEval_RestoreThread(frame.ts);
    pv_top = frame.outer;
    return true;
}

static PyObject *gdb_close(PyObject *self, PyObject *unused)
{
    pv_gdb *g = (pv_gdb *)self;
    if (g->g && g->machine->calls)
        return pv_raise_text(g->machine->st, PV_BUSY, VM_E_BUSY, "the machine is in use: stop() the stub first");
    gdb_drop(g);
    Py_RETURN_NONE;
}

static PyObject *gdb_enter(PyObject *self, PyObject *unused) { return Py_NewRef(self); }
static PyObject *gdb_exit(PyObject *self, PyObject *args) { return gdb_close(self, NULL); }

static void gdb_dealloc(PyObject *self)
{
    pv_gdb *g = (pv_gdb *)self;
    PyObject_GC_UnTrack(self);
    if (g->machine)
        gdb_drop(g);
    Py_CLEAR(g->on_exit);
    Py_CLEAR(g->on_reset);
    Py_CLEAR(g->machine);
    pv_free(g);
}

static int gdb_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((pv_gdb *)self)->on_exit);
    Py_VISIT(((pv_gdb *)self)->on_reset);
    Py_VISIT(((pv_gdb *)self)->machine);
    return 0;
}

static int gdb_clear(PyObject *self)
{
    Py_CLEAR(((pv_gdb *)self)->on_exit);
    Py_CLEAR(((pv_gdb *)self)->on_reset);
    return 0;
}

static PyObject *gdb_address(PyObject *self, void *unused)
{
    pv_gdb *g = (pv_gdb *)self;
    return is_there(g) ? PyUnicode_FromString(vm_gdb_address(g->g)) : NULL;
}

static PyGetSetDef getters[] = { { "address", gdb_address, NULL, "Where it listens.", NULL }, { NULL, NULL, NULL, NULL, NULL } };
static PyMethodDef methods[] = {
    { "serve", gdb_serve, METH_NOARGS, "serve() -> Exit\nRuns the machine under the debugger's control until the guest ends." },
    { "stop", gdb_stop, METH_NOARGS, "stop()\nMakes serve() return. Any thread." },
    { "close", gdb_close, METH_NOARGS, "close()\nCloses the sockets." },
    { "__enter__", gdb_enter, METH_NOARGS, NULL }, { "__exit__", gdb_exit, METH_VARARGS, NULL }, { NULL, NULL, 0, NULL }
};
static PyType_Slot slots[] = {
    { Py_tp_doc, "A machine's stub for GDB." }, { Py_tp_dealloc, gdb_dealloc }, { Py_tp_methods, methods }, { Py_tp_getset, getters },
    { Py_tp_traverse, gdb_traverse }, { Py_tp_clear, gdb_clear }, { 0, NULL }
};
PyType_Spec pv_gdb_spec = {
    "libvm._libvm.Gdb", sizeof(pv_gdb), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots
};

PyMethodDef pv_gdb_methods[] = {
    { "gdbstub", PV_KW(machine_gdbstub), METH_VARARGS | METH_KEYWORDS,
      "gdbstub(address, runs_alone=False, reverse_interval=0, on_exit=None, on_reset=None) -> Gdb\nListens for a debugger." },
    { NULL, NULL, 0, NULL }
};
