/* coverage.c - coverage maps, block traces, comparison logs: libvm.Ring. Memory that the library writes to is held by the
 * machine (maps: any writable buffer; rings). */
#include "pv.h"

#include <stddef.h>

/* ---- maps ---- */

static PyObject *machine_coverage(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *o, *buffer = NULL;
    Py_buffer view = { 0 };
    if (!PyArg_ParseTuple(args, "O:coverage", &o) || !pv_open(m))
        return NULL;
    if (PyIndex_Check(o)) {
        uint64_t bytes;
        if (!pv_u64(o, &bytes))
            return NULL;
        if (bytes > UINT64_C(1) << 30)
            return PyErr_SetString(PyExc_OverflowError, "a coverage map has at most 2^30 bytes"), NULL;
        buffer = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)bytes);
        if (buffer)
            memset(PyByteArray_AsString(buffer), 0, bytes);
    } else {
        buffer = Py_NewRef(o);
    }
    if (!buffer || (o != Py_None && PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) < 0))
        return Py_XDECREF(buffer), NULL;
    pv_frame frame;
    bool ok = pv_enter(&frame, m);
    int status = ok ? vm_coverage(m->m, view.buf, (size_t)view.len) : VM_OK;
    ok = ok && pv_leave(&frame);
    if (!ok || status != VM_OK) {
        if (view.obj)
            PyBuffer_Release(&view);
        Py_DECREF(buffer);
        return ok ? pv_raise(m->st, status) : NULL;
    }
    Py_buffer old = m->coverage;
    bool had = m->has_coverage;
    m->coverage = view;
    m->has_coverage = view.obj != NULL;
    if (had)
        PyBuffer_Release(&old);
    return buffer;
}

static PyObject *machine_coverage_range(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t begin = 0, end = 0;
    if (!PyArg_ParseTuple(args, "|O&O&:coverage_range", pv_u64, &begin, pv_u64, &end))
        return NULL;
    PV_BEGIN(m);
    int status = vm_coverage_range(m->m, begin, end);
    PV_END();
    return pv_none_or(m->st, status);
}

PyMethodDef pv_coverage_methods[] = {
    { "coverage", machine_coverage, METH_VARARGS,
      "coverage(map)\nCounts edges into a writable buffer, or into a new bytearray of so many bytes; gives it back. None: off." },
    { "coverage_range", machine_coverage_range, METH_VARARGS, "coverage_range(begin=0, end=0)\nOnly branches in there count." },
    { NULL, NULL, 0, NULL }
};

/* ---- rings ---- */

typedef struct pv_ring {
    PyObject_HEAD
    void    *memory;
    size_t   entries;                   /* a power of two */
    uint64_t head, read;
    bool     compares;
} pv_ring;

static int ring_off(pv_vcpu *v, bool compares)
{
    return compares ? vm_compare_log(v->cpu, NULL, 0, NULL) : vm_block_trace(v->cpu, NULL, 0, NULL);
}

/* The machine has ended: libvm writes no more. */
void pv_vcpu_end(pv_machine *m, unsigned index)
{
    Py_CLEAR(m->of_vcpu[index].last);
    for (int i = 0; i < 2; i++)
        Py_CLEAR(m->of_vcpu[index].rings[i]);
}

static PyObject *start_ring(PyObject *self, PyObject *args, bool compares)
{
    pv_vcpu *v = (pv_vcpu *)self;
    pv_machine *m = v->machine;
    uint64_t entries = 0;
    size_t each = compares ? sizeof(vm_compare) : 8;
    pv_ring *r = NULL;
    pv_frame frame;
    if (!PyArg_ParseTuple(args, compares ? "O&:compare_log" : "O&:block_trace", pv_bytes, &entries) || !pv_open(m))
        return NULL;
    if (entries > UINT64_C(1) << 27)
        return PyErr_SetString(PyExc_OverflowError, "a ring has at most 2^27 entries"), NULL;
    if (entries) {
        if (!(r = pv_new(m->st->types[PV_T_RING])))
            return NULL;
        r->memory = calloc((size_t)entries, each);
        r->entries = (size_t)entries;
        r->compares = compares;
        if (!r->memory)
            return Py_DECREF(r), PyErr_NoMemory();
    }
    bool ok = pv_enter(&frame, m);
    int status = !ok ? VM_E_INVALID : !r ? ring_off(v, compares)
                 : compares ? vm_compare_log(v->cpu, r->memory, r->entries, &r->head)
                            : vm_block_trace(v->cpu, r->memory, r->entries, &r->head);
    ok = ok && pv_leave(&frame);
    if (status == VM_OK) {
        Py_XSETREF(m->of_vcpu[v->index].rings[compares], (struct pv_ring *)Py_XNewRef((PyObject *)r));
    }
    if (ok && status == VM_OK)
        return r ? (PyObject *)r : Py_NewRef(Py_None);
    Py_XDECREF(r);
    return ok ? pv_raise(m->st, status) : NULL;
}

static PyObject *vcpu_block_trace(PyObject *self, PyObject *args) { return start_ring(self, args, false); }
static PyObject *vcpu_compare_log(PyObject *self, PyObject *args) { return start_ring(self, args, true); }

PyMethodDef pv_coverage_vcpu_methods[] = {
    { "block_trace", vcpu_block_trace, METH_VARARGS, "block_trace(entries) -> Ring\nKeeps the addresses of blocks entered; 0: off." },
    { "compare_log", vcpu_compare_log, METH_VARARGS,
      "compare_log(entries) -> Ring\nKeeps comparisons as tuples (address, kind, width, is_constant, a, b); 0: off." },
    { NULL, NULL, 0, NULL }
};

static PyObject *wide(const uint64_t *words)
{
    return PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s", (const char *)words, (Py_ssize_t)32, "little");
}

static PyObject *entry_of(const pv_ring *r, uint64_t i)
{
    size_t at = (size_t)(i & (r->entries - 1));
    if (!r->compares)
        return PyLong_FromUnsignedLongLong(((uint64_t *)r->memory)[at]);
    const vm_compare *c = (vm_compare *)r->memory + at;
    return Py_BuildValue("(KiiNNN)", (unsigned long long)c->address, (int)c->kind, (int)c->width, PyBool_FromLong(c->is_constant),
                         wide(c->a), wide(c->b));
}

static PyObject *ring_take(PyObject *self, PyObject *unused)
{
    pv_ring *r = (pv_ring *)self;
    uint64_t head = r->head, from = head - r->read > r->entries ? head - r->entries : r->read;
    PyObject *list = PyList_New(0);
    for (; list && from != head; from++) {
        PyObject *o = entry_of(r, from);
        if (!o || PyList_Append(list, o) < 0)
            Py_CLEAR(list);
        Py_XDECREF(o);
    }
    if (list)
        r->read = head;
    return list;
}

static void ring_dealloc(PyObject *self)
{
    free(((pv_ring *)self)->memory);
    pv_free(self);
}

static PyMemberDef ring_members[] = {
    { "head", T_ULONGLONG, offsetof(pv_ring, head), READONLY, "Entries written since the beginning." }, { NULL, 0, 0, 0, NULL }
};
static PyMethodDef ring_methods[] = {
    { "take", ring_take, METH_NOARGS, "take() -> list\nWhat came since the last time, oldest first; what was overwritten is lost." },
    { NULL, NULL, 0, NULL }
};
static PyType_Slot ring_slots[] = {
    { Py_tp_doc, "The last blocks or comparisons of a vCPU." }, { Py_tp_dealloc, ring_dealloc }, { Py_tp_methods, ring_methods },
    { Py_tp_members, ring_members }, { 0, NULL }
};
PyType_Spec pv_ring_spec = {
    "libvm._libvm.Ring", sizeof(pv_ring), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, ring_slots
};
