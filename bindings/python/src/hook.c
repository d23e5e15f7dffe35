/* hook.c - hooks, breakpoints, watchpoints: libvm.Hook, libvm.Event.
 *
 * The event object of a hook is used again for its next event unless the callback kept it: an event then costs no allocation. */
#include "pv.h"

#include <stddef.h>

/* ---- events ---- */

static PyObject *event_data(PyObject *self, void *unused)
{
    pv_event *e = (pv_event *)self;
    if (!e->data && e->is_live && e->e.data)
        e->data = PyBytes_FromStringAndSize(e->e.data, (Py_ssize_t)e->e.bytes);
    else if (!e->data)
        Py_RETURN_NONE;
    return Py_XNewRef(e->data);
}

static PyObject *event_kind(PyObject *self, void *unused)
{
    return pv_enum(pv_state_of(Py_TYPE(self)), "HookKind", ((pv_event *)self)->e.kind);
}

static PyObject *event_is_write(PyObject *self, void *unused)
{
    pv_event *e = (pv_event *)self;
    return PyBool_FromLong(e->e.kind == VM_HOOK_MEM_WRITE || e->e.flags & VM_EVENT_WRITE);
}

static void event_dealloc(PyObject *self)
{
    Py_CLEAR(((pv_event *)self)->data);
    pv_free(self);
}

static PyObject *event_repr(PyObject *self)
{
    char text[128];
    pv_event *e = (pv_event *)self;
    snprintf(text, sizeof text, "<libvm.Event kind=%d address=%#llx from=%#llx value=%#llx bytes=%u>", (int)e->e.kind,
             (unsigned long long)e->e.address, (unsigned long long)e->e.from, (unsigned long long)e->e.value, e->e.bytes);
    return PyUnicode_FromString(text);
}

#define MEMBER(name, type, member, doc) { name, type, offsetof(pv_event, e.member), READONLY, doc }
static PyMemberDef event_members[] = {
    MEMBER("address", T_ULONGLONG, address, "By kind, see hook.h: where it happened."),
    MEMBER("source", T_ULONGLONG, from, "EDGE: the branch; EXCEPTION: the faulting address; CPUID: the subleaf."),
    MEMBER("value", T_ULONGLONG, value, "By kind: first bytes of the instruction or data, vector, register."),
    MEMBER("bytes", T_UINT, bytes, "Length of the instruction, width of the access."),
    MEMBER("flags", T_UINT, flags, "EventFlags."), MEMBER("error", T_ULONGLONG, error, "EXCEPTION: error code."), { NULL, 0, 0, 0, NULL }
};
static PyGetSetDef event_getters[] = {
    { "kind", event_kind, NULL, "HookKind.", NULL }, { "data", event_data, NULL, "All bytes of the access, or None.", NULL },
    { "is_write", event_is_write, NULL, "A write.", NULL }, { NULL, NULL, NULL, NULL, NULL }
};
static PyType_Slot event_slots[] = {
    { Py_tp_doc, "What a hook is called with." }, { Py_tp_dealloc, event_dealloc }, { Py_tp_members, event_members },
    { Py_tp_getset, event_getters }, { Py_tp_repr, event_repr }, { 0, NULL }
};
PyType_Spec pv_event_spec = {
    "libvm._libvm.Event", sizeof(pv_event), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, event_slots
};

/* ---- callbacks ---- */

static vm_hook_result answer_of(PyObject *o)
{
    long v;
    if (o == Py_None)
        return VM_HOOK_CONTINUE;
    v = PyLong_Check(o) ? PyLong_AsLong(o) : -1;
    if (v >= VM_HOOK_CONTINUE && v <= VM_HOOK_SKIP && !PyBool_Check(o))
        return (vm_hook_result)v;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "a hook returns None or a HookResult, not %R", o);
    return VM_HOOK_STOP;
}

/* The callback kept the event: it keeps its data too, and the hook gets another. */
static void part_from(pv_hook_data *d, pv_event *e)
{
    if (e->e.data && !e->data)
        e->data = PyBytes_FromStringAndSize(e->e.data, (Py_ssize_t)e->e.bytes);
    if (PyErr_Occurred())
        PyErr_Clear();
    if (d->event == e)
        d->event = NULL;
    Py_DECREF(e);
}

static vm_hook_result call_hook(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    pv_hook_data *d = user;
    pv_machine *m = d->machine;
    vm_hook_result answer = VM_HOOK_CONTINUE;
    pv_gate g;
    pv_callback_begin(&g);
    pv_vcpu *v = m->vcpus[vm_vcpu_index(cpu)];
    PyObject *vcpu = v ? Py_NewRef((PyObject *)v) : pv_vcpu_of(m, cpu), *fn = Py_XNewRef(d->fn), *o = NULL;
    pv_event *e = d->event ? d->event : pv_new(m->st->types[PV_T_EVENT]);
    d->event = NULL;                    /* a hook that runs inside a hook makes its own */
    if (e && vcpu && fn) {
        e->e = *event;
        e->is_live = true;
        o = PyObject_CallFunctionObjArgs(fn, vcpu, (PyObject *)e, NULL);
        e->is_live = false;
        answer = o ? answer_of(o) : VM_HOOK_STOP;
    }
    if (PyErr_Occurred()) {
        pv_callback_failed(m, NULL);
        answer = VM_HOOK_STOP;
    }
    if (e) {
        if (Py_REFCNT(e) > 1) {
            part_from(d, e);
        } else {
            Py_CLEAR(e->data);
            if (d->event)
                Py_DECREF(e);
            else
                d->event = e;
        }
    }
    Py_XDECREF(o);
    Py_XDECREF(fn);
    Py_XDECREF(vcpu);
    pv_callback_end(&g);
    return answer;
}

void pv_hook_data_free(pv_hook_data *d)
{
    *d->link = d->next;
    if (d->next)
        d->next->link = d->link;
    if (d->handle)
        d->handle->data = NULL;
    Py_XDECREF(d->fn);
    Py_XDECREF(d->event);
    free(d);
}

static void destroy_hook(void *user)
{
    pv_gate g;
    pv_callback_begin(&g);
    pv_hook_data_free(user);
    pv_callback_end(&g);
}

/* ---- handles ---- */

static PyObject *handle_of(pv_machine *m, pv_hook_data *d)
{
    pv_hook *h = d->handle;
    if (h)
        return Py_NewRef((PyObject *)h);
    if (!(h = pv_new(m->st->types[PV_T_HOOK])))
        return NULL;
    h->machine = (pv_machine *)Py_NewRef((PyObject *)m);
    h->data = d;
    d->handle = h;
    return (PyObject *)h;
}

/* The object of a hook that stopped a run; NULL without an exception if it is gone. */
PyObject *pv_hook_handle(pv_machine *m, vm_hook *hook)
{
    for (pv_hook_data *d = hook ? m->hooks : NULL; d; d = d->next)
        if (d->hook == hook) {
            PyObject *h = handle_of(m, d);
            if (!h)
                PyErr_Clear();
            return h;
        }
    return NULL;
}

static void hook_dealloc(PyObject *self)
{
    pv_hook *h = (pv_hook *)self;
    if (h->data)
        h->data->handle = NULL;
    Py_CLEAR(h->machine);
    pv_free(h);
}

static PyObject *hook_add(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "kind", "fn", "begin", "end", "flags", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t begin = 0, end = 0;
    uint32_t kind, flags = 0;
    PyObject *fn;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O|O&O&O&:hook_add", names, pv_u32, &kind, &fn, pv_u64, &begin, pv_u64, &end,
                                     pv_u32, &flags) || !pv_open(m))
        return NULL;
    if (!PyCallable_Check(fn)) {
        PyErr_Format(PyExc_TypeError, "a hook is a function, not %R", fn);
        return NULL;
    }
    pv_hook_data *d = calloc(1, sizeof *d);
    if (!d)
        return PyErr_NoMemory();
    d->machine = m;
    d->fn = Py_NewRef(fn);
    d->kind = (vm_hook_kind)kind, d->begin = begin, d->end = end;
    d->link = &m->hooks;
    d->next = m->hooks;
    if (d->next)
        d->next->link = &d->next;
    m->hooks = d;
    PyObject *h = handle_of(m, d);
    if (!h)
        return pv_hook_data_free(d), NULL;
    vm_hook_desc desc = { .size = sizeof desc, .kind = d->kind, .begin = begin, .end = end, .fn = call_hook, .user = d,
                          .destroy = destroy_hook, .flags = flags };
    vm_hook *made = NULL;
    pv_frame frame;
    bool ok = pv_enter(&frame, m);
    int status = !ok ? VM_E_INVALID : vm_hook_add(m->m, &desc, &made);
    ok = ok && pv_leave(&frame);
    if (status != VM_OK) {
        pv_hook_data_free(d);
        Py_DECREF(h);
        return ok ? pv_raise(m->st, status) : NULL;
    }
    if (((pv_hook *)h)->data)           /* not removed by a callback already */
        d->hook = made;
    return ok ? h : (Py_DECREF(h), NULL);
}

static PyObject *hook_remove(PyObject *self, PyObject *unused)
{
    pv_hook *h = (pv_hook *)self;
    pv_machine *m = h->machine;
    if (!pv_open(m))
        return NULL;
    if (!h->data)
        Py_RETURN_NONE;
    vm_hook *gone = h->data->hook;
    h->data->handle = NULL;
    h->data = NULL;
    PV_BEGIN(m);
    int status = vm_hook_remove(m->m, gone);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_hook_remove(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *hook;
    if (!PyArg_ParseTuple(args, "O!:hook_remove", m->st->types[PV_T_HOOK], &hook))
        return NULL;
    if (((pv_hook *)hook)->machine != m)
        return pv_raise_text(m->st, PV_NOTFOUND, VM_E_NOTFOUND, "the hook is another machine's");
    return hook_remove(hook, NULL);
}

static PyObject *hook_active(PyObject *self, void *unused)
{
    pv_hook *h = (pv_hook *)self;
    return PyBool_FromLong(h->data && h->machine->m && h->machine->forks == h->machine->st->forks);
}

static PyObject *hook_fn(PyObject *self, void *unused)
{
    pv_hook *h = (pv_hook *)self;
    return Py_NewRef(h->data && h->data->fn ? h->data->fn : Py_None);
}

static PyObject *hook_kind(PyObject *self, void *unused)
{
    pv_hook *h = (pv_hook *)self;
    return h->data ? pv_enum(h->machine->st, "HookKind", h->data->kind) : Py_NewRef(Py_None);
}

static PyGetSetDef hook_getters[] = {
    { "active", hook_active, NULL, "It has not been removed.", NULL }, { "fn", hook_fn, NULL, "The function.", NULL },
    { "kind", hook_kind, NULL, "HookKind, None when removed.", NULL }, { NULL, NULL, NULL, NULL, NULL }
};
static PyMethodDef hook_methods[] = {
    { "remove", hook_remove, METH_NOARGS, "remove()\nThe function is called no more. May be called again." }, { NULL, NULL, 0, NULL }
};
static PyType_Slot hook_slots[] = {
    { Py_tp_doc, "A hook of a machine; it stays when its handle is dropped." }, { Py_tp_dealloc, hook_dealloc },
    { Py_tp_methods, hook_methods }, { Py_tp_getset, hook_getters }, { 0, NULL }
};
PyType_Spec pv_hook_spec = {
    "libvm._libvm.Hook", sizeof(pv_hook), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, hook_slots
};

/* ---- breakpoints ---- */

static PyObject *machine_breakpoint(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "gva", "on", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t gva;
    int on = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|p:breakpoint", names, pv_u64, &gva, &on))
        return NULL;
    PV_BEGIN(m);
    int status = vm_breakpoint(m->m, gva, on);
    PV_END();
    if (status != VM_OK)
        return pv_raise(m->st, status);
    PyObject *address = PyLong_FromUnsignedLongLong(gva);       /* run() has to know them at the end of a slice */
    int bad = !address || (on ? PySet_Add(m->breakpoints, address) : PySet_Discard(m->breakpoints, address)) < 0;
    Py_XDECREF(address);
    return bad ? NULL : Py_NewRef(Py_None);
}

static PyObject *machine_watchpoint(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "gva", "size", "access", "on", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t gva, bytes = 1;
    vm_prot access = VM_PROT_W;
    int on = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|O&O&p:watchpoint", names, pv_u64, &gva, pv_bytes, &bytes, pv_prot, &access,
                                     &on))
        return NULL;
    PV_BEGIN(m);
    int status = vm_watchpoint(m->m, gva, bytes, access, on);
    PV_END();
    return pv_none_or(m->st, status);
}

PyMethodDef pv_hook_methods[] = {
    { "hook_add", PV_KW(hook_add), METH_VARARGS | METH_KEYWORDS,
      "hook_add(kind, fn, begin=0, end=0, flags=0) -> Hook\nCalls fn(cpu, event) when it happens in [begin, end]; 0, 0: everywhere." },
    { "hook_remove", machine_hook_remove, METH_VARARGS, "hook_remove(hook)" },
    { "breakpoint", PV_KW(machine_breakpoint), METH_VARARGS | METH_KEYWORDS, "breakpoint(gva, on=True)" },
    { "watchpoint", PV_KW(machine_watchpoint), METH_VARARGS | METH_KEYWORDS, "watchpoint(gva, size=1, access='w', on=True)" },
    { NULL, NULL, 0, NULL }
};
