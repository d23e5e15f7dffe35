/* mmu.c - MMU strategies written in Python, and the views of strategy "ept".
 *
 * A strategy's functions in C get no pointer of the program's, so that each Python class has its own create() from a table of
 * SLOTS functions. The instance is the strategy's state in libvm: it has a pv_strategy, freed by destroy(). */
#include "pv.h"

#include <stddef.h>

enum { SLOTS = 32 };

typedef struct pv_strategy {
    pv_machine *machine;
    PyObject *object, *translate, *root_changed, *invalidate, *table_written;
} pv_strategy;

/* Registered for life: names and classes are never freed. */
static struct { char *name; PyObject *cls; vm_mmu_ops ops; } slots_in_use[SLOTS];
static unsigned slot_count;

static bool optional_method(PyObject *object, const char *name, PyObject **out)
{
    *out = PyObject_GetAttrString(object, name);
    if (!*out && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    return !PyErr_Occurred();
}

static void strategy_free(pv_strategy *s)
{
    if (s->machine && s->machine->mmu_object == s->object)
        s->machine->mmu_object = NULL, s->machine->loud = false;
    Py_XDECREF(s->object);
    Py_XDECREF(s->translate);
    Py_XDECREF(s->root_changed);
    Py_XDECREF(s->invalidate);
    Py_XDECREF(s->table_written);
    free(s);
}

static int create(unsigned slot, void **state)
{
    pv_strategy *s = calloc(1, sizeof *s);
    pv_frame *f = pv_top;
    pv_gate g;
    int status = VM_E_NOMEM;
    if (!s)
        return status;
    pv_callback_begin(&g);
    if (f && f->machine) {
        s->machine = f->copy ? f->copy : f->machine;
        s->object = PyObject_CallFunctionObjArgs(slots_in_use[slot].cls, NULL);
        if (s->object && optional_method(s->object, "translate", &s->translate) &&
            optional_method(s->object, "root_changed", &s->root_changed) &&
            optional_method(s->object, "invalidate", &s->invalidate) &&
            optional_method(s->object, "table_written", &s->table_written)) {
            s->machine->mmu_object = s->object;
            s->machine->loud = true;
            status = VM_OK;
        } else {
            pv_callback_failed(f->machine, NULL);
            status = VM_E_INTERNAL;
        }
    }
    if (status != VM_OK)
        strategy_free(s);
    else
        *state = s;
    pv_callback_end(&g);
    return status;
}

static void destroy(void *state)
{
    pv_gate g;
    pv_callback_begin(&g);
    strategy_free(state);
    pv_callback_end(&g);
}

/* The answer: (gpa, page_bytes, prot[, global[, trap_writes]]), or None or a PageFault's (error,) for a fault. */
static bool to_result(PyObject *o, struct vm_mmu_result *out)
{
    int is_global = 0, traps = 0;
    if (PyTuple_Check(o) && PyTuple_Size(o) == 1) {
        out->fault_vector = 14;
        return PyArg_ParseTuple(o, "O&", pv_u32, &out->fault_error);
    }
    if (!PyTuple_Check(o)) {
        PyErr_Format(PyExc_TypeError, "translate() gives (gpa, page_bytes, prot), (error,) or None, not %R", o);
        return false;
    }
    if (!PyArg_ParseTuple(o, "O&O&O&|pp", pv_u64, &out->gpa, pv_bytes, &out->page_bytes, pv_prot, &out->prot, &is_global, &traps))
        return false;
    out->global = is_global;
    out->trap_writes = traps;
    return true;
}

static int translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    pv_strategy *s = state;
    pv_gate g;
    int status = VM_E_FAULT;
    pv_callback_begin(&g);
    PyObject *vcpu = pv_vcpu_of(s->machine, cpu), *address = PyLong_FromUnsignedLongLong(gva);
    PyObject *kind = PyLong_FromLong(access), *context = PyLong_FromUnsignedLong(out->context), *o = NULL;
    if (vcpu && address && kind && context && s->translate)
        o = PyObject_CallFunctionObjArgs(s->translate, vcpu, address, kind, context, NULL);
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_AttributeError, "the MMU strategy has no translate()");
    out->fault_vector = 14;
    if (o && o != Py_None && to_result(o, out) && out->page_bytes)
        status = VM_OK;
    if (PyErr_Occurred())
        pv_callback_failed(s->machine, cpu);
    Py_XDECREF(o);
    Py_XDECREF(context);
    Py_XDECREF(kind);
    Py_XDECREF(address);
    Py_XDECREF(vcpu);
    pv_callback_end(&g);
    return status;
}

static void tell(pv_strategy *s, PyObject *fn, vm_vcpu *cpu, uint64_t a, const uint64_t *b)
{
    pv_gate g;
    if (!fn)
        return;
    pv_callback_begin(&g);
    PyObject *vcpu = cpu ? pv_vcpu_of(s->machine, cpu) : Py_NewRef(Py_None), *first = PyLong_FromUnsignedLongLong(a);
    PyObject *second = b ? PyLong_FromUnsignedLongLong(*b) : NULL;
    PyObject *o = vcpu && first ? PyObject_CallFunctionObjArgs(fn, vcpu, first, second, NULL) : NULL;
    if (!o)
        pv_callback_failed(s->machine, cpu);
    Py_XDECREF(o);
    Py_XDECREF(second);
    Py_XDECREF(first);
    Py_XDECREF(vcpu);
    pv_callback_end(&g);
}

static void root_changed(void *state, vm_vcpu *cpu, uint64_t cr3) { tell(state, ((pv_strategy *)state)->root_changed, cpu, cr3, NULL); }

static void invalidate(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes)
{
    tell(state, ((pv_strategy *)state)->invalidate, cpu, gva, &bytes);
}

static void table_written(void *state, vm_vcpu *cpu, uint64_t gpa) { tell(state, ((pv_strategy *)state)->table_written, cpu, gpa, NULL); }

#define EIGHT(X, n) X(n##0) X(n##1) X(n##2) X(n##3) X(n##4) X(n##5) X(n##6) X(n##7)
#define ALL(X) EIGHT(X, 0) EIGHT(X, 01) EIGHT(X, 02) EIGHT(X, 03)      /* octal numbers */
#define CREATE(n) static int create_##n(vm_machine *m, void **state) { return create(n, state); }
#define ADDRESS(n) [n] = create_##n,
ALL(CREATE)
static int (*const creators[SLOTS])(vm_machine *m, void **state) = { ALL(ADDRESS) };

PyObject *pv_mmu_register(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *cls;
    if (!PyArg_ParseTuple(args, "sO:mmu_register", &name, &cls))
        return NULL;
    if (!PyCallable_Check(cls))
        return PyErr_Format(PyExc_TypeError, "a strategy is a class, not %R", cls);
    if (slot_count == SLOTS)
        return pv_raise_text(PyModule_GetState(module), PV_NOMEM, VM_E_NOMEM, "all strategies that Python can have are taken");
    unsigned i = slot_count;
    slots_in_use[i].name = strdup(name);
    slots_in_use[i].ops = (vm_mmu_ops){ .size = sizeof(vm_mmu_ops), .name = slots_in_use[i].name, .create = creators[i], .destroy = destroy,
                                        .translate = translate, .root_changed = root_changed, .invalidate = invalidate,
                                        .table_written = table_written };
    int status = slots_in_use[i].name ? vm_mmu_register(&slots_in_use[i].ops) : VM_E_NOMEM;
    if (status != VM_OK) {
        free(slots_in_use[i].name);
        return pv_raise(PyModule_GetState(module), status);
    }
    slots_in_use[i].cls = Py_NewRef(cls);
    slot_count++;
    Py_RETURN_NONE;
}

PyObject *pv_mmu_names(PyObject *module, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    const char *name;
    for (unsigned i = 0; list && (name = vm_mmu_name(i)); i++) {
        PyObject *o = PyUnicode_FromString(name);
        if (!o || PyList_Append(list, o) < 0)
            Py_CLEAR(list);
        Py_XDECREF(o);
    }
    return list;
}

static PyObject *machine_mmu_select(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "z:mmu_select", &name))
        return NULL;
    PV_BEGIN(m);
    int status = vm_mmu_select(m->m, name);
    PV_END();
    return pv_none_or(m->st, status);
}

/* ---- of a vCPU ---- */

static PyObject *vcpu_mmu_walk(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t gva;
    vm_prot access = VM_PROT_R;
    struct vm_mmu_result r = { .size = sizeof r };
    if (!PyArg_ParseTuple(args, "O&|O&:mmu_walk", pv_u64, &gva, pv_prot, &access))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_mmu_walk(v->cpu, gva, access, &r);
    PV_END();
    if (status == VM_E_FAULT)
        return Py_BuildValue("(I)", (unsigned)r.fault_error);
    if (status != VM_OK)
        return pv_raise(v->machine->st, status);
    return Py_BuildValue("(KKiNN)", (unsigned long long)r.gpa, (unsigned long long)r.page_bytes, (int)r.prot,
                         PyBool_FromLong(r.global), PyBool_FromLong(r.trap_writes));
}

static PyObject *vcpu_mmu_flush(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t gva = 0, bytes = 0;
    if (!PyArg_ParseTuple(args, "|O&O&:mmu_flush", pv_u64, &gva, pv_bytes, &bytes))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_mmu_flush(v->cpu, gva, bytes);
    PV_END();
    return pv_none_or(v->machine->st, status);
}

static PyObject *vcpu_mmu_trap_writes(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t gpa;
    int on = 1;
    if (!PyArg_ParseTuple(args, "O&|p:mmu_trap_writes", pv_u64, &gpa, &on))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_mmu_trap_writes(v->cpu, gpa, on);
    PV_END();
    return status ? pv_raise_at(v->machine->st, status, gpa) : Py_NewRef(Py_None);
}

static PyObject *vcpu_ept_select(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint32_t view;
    if (!PyArg_ParseTuple(args, "O&:ept_select", pv_u32, &view))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_ept_select(v->cpu, view);
    PV_END();
    return pv_none_or(v->machine->st, status);
}

static PyObject *vcpu_ept_current(PyObject *self, PyObject *unused)
{
    pv_vcpu *v = (pv_vcpu *)self;
    return pv_open(v->machine) ? PyLong_FromUnsignedLong(vm_ept_current(v->cpu)) : NULL;
}

PyMethodDef pv_mmu_vcpu_methods[] = {
    { "mmu_walk", vcpu_mmu_walk, METH_VARARGS,
      "mmu_walk(gva, access='r') -> tuple\nThe architectural walk: what a strategy's translate() returns, (error,) for a fault." },
    { "mmu_flush", vcpu_mmu_flush, METH_VARARGS, "mmu_flush(gva=0, size=0)\nThe strategy is asked again; size 0: everywhere." },
    { "mmu_trap_writes", vcpu_mmu_trap_writes, METH_VARARGS, "mmu_trap_writes(gpa, on=True)\nCalls the strategy's table_written()." },
    { "ept_select", vcpu_ept_select, METH_VARARGS, "ept_select(view)\nLooks through another view." },
    { "ept_current", vcpu_ept_current, METH_NOARGS, "ept_current() -> int" },
    { NULL, NULL, 0, NULL }
};

/* ---- views ---- */

static PyObject *ept_create(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "source", "page_bytes", NULL };
    pv_machine *m = (pv_machine *)self;
    PyObject *source = Py_None;
    uint32_t from = VM_EPT_NONE;
    uint64_t bytes = 0;
    unsigned view = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO&:ept_create", names, &source, pv_bytes, &bytes) ||
        (source != Py_None && !pv_u32(source, &from)))
        return NULL;
    PV_BEGIN(m);
    int status = vm_ept_create(m->m, from, bytes, &view);
    PV_END();
    return status ? pv_raise(m->st, status) : PyLong_FromUnsignedLong(view);
}

static PyObject *ept_destroy(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t view;
    if (!PyArg_ParseTuple(args, "O&:ept_destroy", pv_u32, &view))
        return NULL;
    PV_BEGIN(m);
    int status = vm_ept_destroy(m->m, view);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *ept_protect(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t view;
    uint64_t gpa, bytes;
    vm_prot prot;
    if (!PyArg_ParseTuple(args, "O&O&O&O&:ept_protect", pv_u32, &view, pv_u64, &gpa, pv_bytes, &bytes, pv_prot, &prot))
        return NULL;
    PV_BEGIN(m);
    int status = vm_ept_protect(m->m, view, gpa, bytes, prot);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *ept_get(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t view;
    uint64_t gpa;
    vm_ept_entry e = VM_EPT_ENTRY_INIT;
    if (!PyArg_ParseTuple(args, "O&O&:ept_get", pv_u32, &view, pv_u64, &gpa))
        return NULL;
    PV_BEGIN(m);
    int status = vm_ept_get(m->m, view, gpa, &e);
    PV_END();
    if (status != VM_OK)
        return pv_raise(m->st, status);
    return Py_BuildValue("{sNsNsNsK}", "prot", pv_enum(m->st, "Prot", e.prot), "accessed", PyBool_FromLong(e.accessed), "dirty",
                         PyBool_FromLong(e.dirty), "page_bytes", (unsigned long long)e.page_bytes);
}

static PyObject *pages_of(const uint64_t *bitmap, size_t words, uint64_t gpa)
{
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < words * 64; i++) {
        if (!(bitmap[i / 64] >> i % 64 & 1))
            continue;
        PyObject *page = PyLong_FromUnsignedLongLong(gpa + i * 4096);
        if (!page || PyList_Append(list, page) < 0)
            Py_CLEAR(list);
        Py_XDECREF(page);
    }
    return list;
}

static PyObject *ept_fetch(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t view;
    uint64_t gpa, bytes;
    if (!PyArg_ParseTuple(args, "O&O&O&:ept_fetch", pv_u32, &view, pv_u64, &gpa, pv_bytes, &bytes))
        return NULL;
    if (bytes > UINT64_C(1) << 44)
        return PyErr_SetString(PyExc_OverflowError, "the range is larger than 16 TiB"), NULL;
    size_t words = (size_t)((bytes / 4096 + 63) / 64);
    uint64_t *bits = calloc(words * 2 + 1, 8);
    pv_frame frame;
    if (!bits)
        return PyErr_NoMemory();
    if (!pv_enter(&frame, m))
        return free(bits), NULL;
    int status = vm_ept_fetch(m->m, view, gpa, bytes, bits, bits + words);
    bool ok = pv_leave(&frame);
    PyObject *result = NULL;
    if (ok && status == VM_OK)
        result = Py_BuildValue("(NN)", pages_of(bits, words, gpa), pages_of(bits + words, words, gpa));
    free(bits);
    return !ok || status == VM_OK ? result : pv_raise(m->st, status);
}

/* ---- violations ---- */

typedef struct pv_violation { PyObject_HEAD vm_ept_violation v; } pv_violation;

static vm_ept_action on_violation(void *user, vm_vcpu *cpu, vm_ept_violation *violation)
{
    pv_machine *m = user;
    pv_gate g;
    uint64_t action = VM_EPT_STOP;
    pv_callback_begin(&g);
    PyObject *vcpu = pv_vcpu_of(m, cpu), *fn = Py_XNewRef(m->on_violation), *o = NULL;
    pv_violation *v = pv_new(m->st->types[PV_T_VIOLATION]);
    if (vcpu && fn && v) {
        v->v = *violation;
        o = PyObject_CallFunctionObjArgs(fn, vcpu, (PyObject *)v, NULL);
        violation->value = v->v.value;
    }
    if (o && o != Py_None && pv_u64(o, &action) && action > VM_EPT_STEP)
        PyErr_Format(PyExc_ValueError, "%R is no EptAction", o);
    if (PyErr_Occurred()) {
        pv_callback_failed(m, NULL);
        action = VM_EPT_STOP;
    }
    Py_XDECREF(v);
    Py_XDECREF(o);
    Py_XDECREF(fn);
    Py_XDECREF(vcpu);
    pv_callback_end(&g);
    return (vm_ept_action)action;
}

static PyObject *ept_on_violation(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *fn;
    if (!PyArg_ParseTuple(args, "O:ept_on_violation", &fn))
        return NULL;
    if (fn != Py_None && !PyCallable_Check(fn))
        return PyErr_Format(PyExc_TypeError, "violations go to a function, not %R", fn);
    PV_BEGIN(m);
    int status = vm_ept_on_violation(m->m, fn == Py_None ? NULL : on_violation, m);
    PV_END();
    if (status != VM_OK)
        return pv_raise(m->st, status);
    Py_XSETREF(m->on_violation, fn == Py_None ? NULL : Py_NewRef(fn));
    Py_RETURN_NONE;
}

#define MEMBER(name, type, flags, doc) { #name, type, offsetof(pv_violation, v.name), flags, doc }
static PyMemberDef violation_members[] = {
    MEMBER(view, T_UINT, READONLY, "The view."), MEMBER(gpa, T_ULONGLONG, READONLY, "Guest-physical address."),
    MEMBER(gva, T_ULONGLONG, READONLY, "Linear address."), MEMBER(access, T_UINT, READONLY, "R, W or X."),
    MEMBER(allowed, T_UINT, READONLY, "What the view allows there."), MEMBER(width, T_UBYTE, READONLY, "Bytes."),
    MEMBER(value, T_ULONGLONG, 0, "Of a write; for EMULATE of a read: what it shall give."), { NULL, 0, 0, 0, NULL }
};
static void violation_dealloc(PyObject *self) { pv_free(self); }
static PyType_Slot violation_slots[] = {
    { Py_tp_doc, "An access that the vCPU's view forbids." }, { Py_tp_dealloc, violation_dealloc }, { Py_tp_members, violation_members },
    { 0, NULL }
};
PyType_Spec pv_violation_spec = {
    "libvm._libvm.Violation", sizeof(pv_violation), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, violation_slots
};

PyMethodDef pv_mmu_methods[] = {
    { "mmu_select", machine_mmu_select, METH_VARARGS, "mmu_select(name)\nChanges the MMU strategy; None: the default." },
    { "ept_create", PV_KW(ept_create), METH_VARARGS | METH_KEYWORDS, "ept_create(source=None, page_bytes=0) -> int\nMakes a view." },
    { "ept_destroy", ept_destroy, METH_VARARGS, "ept_destroy(view)" },
    { "ept_protect", ept_protect, METH_VARARGS, "ept_protect(view, gpa, size, prot)" },
    { "ept_get", ept_get, METH_VARARGS, "ept_get(view, gpa) -> dict\nprot, accessed, dirty, page_bytes." },
    { "ept_fetch", ept_fetch, METH_VARARGS, "ept_fetch(view, gpa, size) -> (accessed, dirty)\nLists of pages; clears their bits." },
    { "ept_on_violation", ept_on_violation, METH_VARARGS,
      "ept_on_violation(fn)\nfn(cpu, violation) gives an EptAction; None: every violation stops the run." },
    { NULL, NULL, 0, NULL }
};
