/* snapshot.c - libvm.Snapshot. */
#include "pv.h"

typedef struct pv_snapshot {
    PyObject_HEAD
    pv_machine *machine;
    vm_snapshot *s;                     /* NULL: freed */
    uint64_t sequence;                  /* regions with larger numbers are not in it */
    bool is_loaded;
} pv_snapshot;

static PyObject *snapshot_new(pv_machine *m, bool is_loaded)
{
    pv_snapshot *s = pv_new(m->st->types[PV_T_SNAPSHOT]);
    if (!s)
        return NULL;
    s->machine = (pv_machine *)Py_NewRef((PyObject *)m);
    s->sequence = ++m->sequence;
    s->is_loaded = is_loaded;
    m->snapshots++;
    return (PyObject *)s;
}

/* Not while somebody is inside libvm with the machine: then the snapshot stays until the machine ends. */
static bool snapshot_drop(pv_snapshot *s)
{
    vm_snapshot *gone = s->s;
    pv_machine *m = s->machine;
    pv_frame frame;
    s->s = NULL;
    if (!gone || !m->m || m->closing || m->calls || m->forks != m->st->forks)
        return true;
    if (!pv_enter(&frame, m))
        return false;
    vm_snapshot_free(gone);
    return pv_leave(&frame);
}

static void snapshot_dealloc(PyObject *self)
{
    pv_snapshot *s = (pv_snapshot *)self;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (s->machine) {
        if (!snapshot_drop(s))
            PyErr_WriteUnraisable(NULL);
        s->machine->snapshots--;
        Py_CLEAR(s->machine);
    }
    PyErr_Restore(type, value, trace);
    pv_free(s);
}

static bool is_there(pv_snapshot *s)
{
    if (!pv_open(s->machine))
        return false;
    if (!s->s)
        pv_raise_text(s->machine->st, PV_CLOSED, VM_E_INVALID, "the snapshot is freed");
    return s->s != NULL;
}

static PyObject *snapshot_free(PyObject *self, PyObject *unused)
{
    pv_snapshot *s = (pv_snapshot *)self;
    if (s->s && s->machine->calls)
        return pv_raise_text(s->machine->st, PV_BUSY, VM_E_BUSY, "a snapshot is freed while nobody uses its machine");
    return snapshot_drop((pv_snapshot *)self) ? Py_NewRef(Py_None) : NULL;
}

static PyObject *snapshot_enter(PyObject *self, PyObject *unused) { return Py_NewRef(self); }
static PyObject *snapshot_exit(PyObject *self, PyObject *args) { return snapshot_free(self, NULL); }

static PyObject *snapshot_restore(PyObject *self, PyObject *unused)
{
    pv_snapshot *s = (pv_snapshot *)self;
    pv_machine *m = s->machine;
    if (!is_there(s) || !pv_regions_can_go(m, s->sequence, s->is_loaded))
        return NULL;
    PV_BEGIN(m);
    int status = vm_snapshot_restore(m->m, s->s);
    PV_END();
    if (status != VM_OK)
        return pv_raise(m->st, status);
    pv_regions_gone(m, s->sequence, s->is_loaded);
    Py_RETURN_NONE;
}

/* What to save to or load from: a path (a new reference), or a descriptor or something that has one. */
static bool take_file(PyObject *file, PyObject **path, int *fd)
{
    if (PyLong_Check(file) || PyObject_HasAttrString(file, "fileno"))
        return (*fd = PyObject_AsFileDescriptor(file)) >= 0;
    return PyUnicode_FSConverter(file, path);
}

static PyObject *snapshot_save(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "file", "flags", NULL };
    pv_snapshot *s = (pv_snapshot *)self;
    PyObject *file, *path = NULL;
    uint32_t flags = 0;
    int status, fd = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O&:save", names, &file, pv_u32, &flags) || !is_there(s))
        return NULL;
    if (!take_file(file, &path, &fd))
        return NULL;
    pv_frame frame;
    bool ok = pv_enter(&frame, s->machine);
    status = !ok ? VM_E_INVALID : path ? vm_snapshot_save_file(s->s, PyBytes_AsString(path), flags) : vm_snapshot_save(s->s, fd);
    ok = ok && pv_leave(&frame);
    Py_XDECREF(path);
    return ok ? pv_none_or(s->machine->st, status) : NULL;
}

static PyObject *machine_snapshot(PyObject *self, PyObject *unused)
{
    pv_machine *m = (pv_machine *)self;
    pv_snapshot *s = pv_open(m) ? (pv_snapshot *)snapshot_new(m, false) : NULL;
    pv_frame frame;
    if (!s)
        return NULL;
    bool ok = pv_enter(&frame, m);
    int status = !ok ? VM_E_INVALID : vm_snapshot_take(m->m, &s->s);
    ok = ok && pv_leave(&frame);
    if (ok && status == VM_OK)
        return (PyObject *)s;
    Py_DECREF(s);
    return ok ? pv_raise(m->st, status) : NULL;
}

static PyObject *machine_load_snapshot(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "file", "flags", NULL };
    pv_machine *m = (pv_machine *)self;
    PyObject *file, *path = NULL;
    uint32_t flags = 0;
    int fd = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O&:load_snapshot", names, &file, pv_u32, &flags) || !pv_open(m))
        return NULL;
    if (!take_file(file, &path, &fd))
        return NULL;
    pv_snapshot *s = (pv_snapshot *)snapshot_new(m, true);
    pv_frame frame;
    if (!s)
        return Py_XDECREF(path), NULL;
    bool ok = pv_enter(&frame, m);
    int status = !ok ? VM_E_INVALID : path ? vm_snapshot_load_file(m->m, PyBytes_AsString(path), flags, &s->s) : vm_snapshot_load(m->m, fd, &s->s);
    ok = ok && pv_leave(&frame);
    Py_XDECREF(path);
    if (ok && status == VM_OK)
        return (PyObject *)s;
    Py_DECREF(s);
    return ok ? pv_raise(m->st, status) : NULL;
}

static PyObject *snapshot_get(PyObject *self, void *which)
{
    pv_snapshot *s = (pv_snapshot *)self;
    if (which)
        return Py_NewRef((PyObject *)s->machine);
    return is_there(s) ? PyLong_FromUnsignedLongLong(vm_snapshot_bytes(s->s)) : NULL;
}

static PyGetSetDef getters[] = {
    { "bytes", snapshot_get, NULL, "Host memory it holds for itself.", (void *)0 },
    { "machine", snapshot_get, NULL, "Whose it is.", (void *)1 }, { NULL, NULL, NULL, NULL, NULL }
};
static PyMethodDef methods[] = {
    { "restore", snapshot_restore, METH_NOARGS, "restore()\nPuts the machine back." },
    { "save", PV_KW(snapshot_save), METH_VARARGS | METH_KEYWORDS,
      "save(file, flags=0)\nInto a file by its path, or an open one. flags: SnapshotFlags, for paths." },
    { "free", snapshot_free, METH_NOARGS, "free()\nForgets it. May be called again." },
    { "__enter__", snapshot_enter, METH_NOARGS, NULL }, { "__exit__", snapshot_exit, METH_VARARGS, NULL }, { NULL, NULL, 0, NULL }
};
static PyType_Slot slots[] = {
    { Py_tp_doc, "A machine's state." }, { Py_tp_dealloc, snapshot_dealloc }, { Py_tp_methods, methods }, { Py_tp_getset, getters },
    { 0, NULL }
};
PyType_Spec pv_snapshot_spec = {
    "libvm._libvm.Snapshot", sizeof(pv_snapshot), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots
};

PyMethodDef pv_snapshot_methods[] = {
    { "snapshot", machine_snapshot, METH_NOARGS, "snapshot() -> Snapshot\nTakes one." },
    { "load_snapshot", PV_KW(machine_load_snapshot), METH_VARARGS | METH_KEYWORDS,
      "load_snapshot(file, flags=0) -> Snapshot\nOf a path or an open file; restore() puts the machine there." },
    { NULL, NULL, 0, NULL }
};
