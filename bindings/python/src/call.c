/* call.c - functions across the border: Vcpu.call, guest functions as callables, host functions in Python; recording and replay.
 *
 * The signature is checked by libvm and then read here once more, for the kinds of its types only. */
#include "pv.h"

#include <stddef.h>

typedef enum value_kind { V_VOID, V_UNSIGNED, V_SIGNED, V_F32, V_F64, V_STR, V_BUF, V_CBUF, V_CPU, V_USER } value_kind;
typedef struct value_type { value_kind kind; unsigned bits; Py_ssize_t length; } value_type;    /* length -1: the next argument's */
typedef struct pv_signature {
    value_type result, args[VM_CALL_ARGS * 2];
    unsigned count;                     /* with cpu and user */
} pv_signature;

static value_type type_of(const char *word, size_t n)
{
    value_type t = { V_UNSIGNED, 64, -1 };
    const char *bracket = memchr(word, '[', n);
    if (bracket) {
        t.length = (Py_ssize_t)strtoull(bracket + 1, NULL, 0);
        n = (size_t)(bracket - word);
        while (n && word[n - 1] == ' ')
            n--;
    }
    static const struct { const char *name; value_kind kind; } names[] = {
        { "void", V_VOID }, { "f32", V_F32 }, { "f64", V_F64 }, { "str", V_STR }, { "buf", V_BUF }, { "cbuf", V_CBUF }, { "cpu", V_CPU },
        { "user", V_USER }
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strlen(names[i].name) == n && memcmp(names[i].name, word, n) == 0)
            return t.kind = names[i].kind, t;
    if (n && (*word == 'u' || *word == 'i')) {
        t.kind = *word == 'u' ? V_UNSIGNED : V_SIGNED;
        t.bits = (unsigned)strtoul(word + 1, NULL, 10);
    }
    return t;
}

/* Of a signature that libvm has found good. */
static void read_signature(const char *text, pv_signature *s)
{
    const char *colon = strchr(text, ':'), *at = colon ? colon + 1 : text;
    bool is_result = true;
    s->count = 0;
    while (*at) {
        size_t n, trimmed;
        at += strspn(at, " \t\n,()");
        n = trimmed = strcspn(at, ",()");
        while (trimmed && strchr(" \t\n", at[trimmed - 1]))
            trimmed--;
        if (!trimmed)
            break;
        if (is_result)
            s->result = type_of(at, trimmed);
        else if (s->count < sizeof s->args / sizeof *s->args && !(s->count == 0 && trimmed == 4 && memcmp(at, "void", 4) == 0))
            s->args[s->count++] = type_of(at, trimmed);
        is_result = false;
        at += n;
    }
}

/* The signature without the types that take nothing from the guest: what libvm gets for a function of values. */
static void without_cpu(const char *text, char *out)
{
    const char *open = strchr(text, '(');
    size_t n = (size_t)(open - text) + 1;
    bool is_first = true;
    memcpy(out, text, n);
    for (const char *at = open + 1; *at && *at != ')';) {
        size_t length = strcspn(at, ",)"), begin = strspn(at, " \t\n"), word = strcspn(at + begin, " \t\n,)");
        bool is_host = (word == 3 && memcmp(at + begin, "cpu", 3) == 0) || (word == 4 && memcmp(at + begin, "user", 4) == 0);
        if (!is_host) {
            if (!is_first)
                out[n++] = ',';
            memcpy(out + n, at, length);
            n += length;
            is_first = false;
        }
        at += length + (at[length] == ',');
    }
    memcpy(out + n, ")", 2);
}

void pv_signature_free(pv_signature *s) { free(s); }

/* ---- values ---- */

static PyObject *from_value(const vm_value *v, const value_type *t)
{
    switch (t->kind) {
    case V_SIGNED: return PyLong_FromLongLong(v->i);
    case V_F32: return PyFloat_FromDouble((double)v->f32);
    case V_F64: return PyFloat_FromDouble(v->f64);
    case V_VOID: Py_RETURN_NONE;
    case V_STR:
        if (!v->cdata)
            Py_RETURN_NONE;
        return PyUnicode_DecodeUTF8(v->cdata, (Py_ssize_t)strlen(v->cdata), "surrogateescape");
    default: return PyLong_FromUnsignedLongLong(v->u);
    }
}

static bool to_integer(PyObject *o, const value_type *t, vm_value *v)
{
    PyObject *number = PyNumber_Index(o);
    bool ok;
    if (!number)
        return false;
    int is_negative = PyObject_RichCompareBool(number, Py_False, Py_LT);
    if (is_negative > 0 || t->kind == V_SIGNED) {
        v->i = PyLong_AsLongLong(number);
        if (v->i == -1 && PyErr_Occurred() && !is_negative) {
            PyErr_Clear();              /* the top half of an i64 written without its sign */
            v->u = PyLong_AsUnsignedLongLong(number);
        }
    } else {
        v->u = PyLong_AsUnsignedLongLong(number);
    }
    Py_DECREF(number);
    ok = !PyErr_Occurred();
    if (ok && t->bits && t->bits < 64 && !(v->i >= -(INT64_C(1) << (t->bits - 1)) && v->i < INT64_C(1) << t->bits)) {
        PyErr_Format(PyExc_OverflowError, "%R does not fit into %u bits", o, t->bits);
        ok = false;
    }
    return ok;
}

/* Strings and buffers: what the pointers point to is in `views` until the call is over. */
static bool to_value(PyObject *o, const value_type *t, vm_value *v, Py_buffer *view)
{
    double d;
    v->u = 0;
    switch (t->kind) {
    case V_F32: case V_F64:
        d = PyFloat_AsDouble(o);
        if (d == -1.0 && PyErr_Occurred())
            return false;
        if (t->kind == V_F32)
            v->f32 = (float)d;
        else
            v->f64 = d;
        return true;
    case V_STR:
        if (o == Py_None)
            return true;
        if (PyUnicode_Check(o)) {
            PyObject *bytes = PyUnicode_AsEncodedString(o, "utf-8", "surrogateescape");
            int bad = !bytes || PyObject_GetBuffer(bytes, view, PyBUF_SIMPLE) < 0;
            Py_XDECREF(bytes);
            if (bad)
                return false;
        } else if (!PyBytes_Check(o)) {
            PyErr_Format(PyExc_TypeError, "a str argument is str, bytes or None, not %R", o);
            return false;
        } else if (PyObject_GetBuffer(o, view, PyBUF_SIMPLE) < 0) {
            return false;
        }
        if (memchr(view->buf, 0, (size_t)view->len)) {
            PyErr_SetString(PyExc_ValueError, "a string for the guest has no NUL in it");
            return false;
        }
        v->cdata = view->buf;
        return true;
    case V_BUF: case V_CBUF:
        if (o == Py_None)
            return true;
        if (PyObject_GetBuffer(o, view, t->kind == V_BUF ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
            return false;
        if (t->length >= 0 && view->len < t->length) {
            PyErr_Format(PyExc_ValueError, "%zd bytes for a buffer of %zd", view->len, t->length);
            return false;
        }
        v->cdata = view->buf;
        return true;
    default: return to_integer(o, t, v);
    }
}

/* ---- the host calls ---- */

static bool to_vector_bits(PyObject *o, uint64_t *out)
{
    *out = 0;
    return !o || o == Py_None || pv_u64(o, out);
}

static bool call_options(PyObject *kwargs, vm_call_options *o)
{
    static char *names[] = { "max_instructions", "timeout", "exception_exits", "stack", "return_address", "preserve", NULL };
    PyObject *none = PyTuple_New(0), *exits = NULL, *limit = NULL;
    int preserve = 0;
    bool ok = none && PyArg_ParseTupleAndKeywords(none, kwargs, "|OO&OO&O&p:call", names, &limit, pv_seconds, &o->deadline_ns, &exits,
                                                  pv_u64, &o->stack, pv_u64, &o->return_address, &preserve) &&
              to_vector_bits(exits, &o->exception_exits) && (!limit || limit == Py_None || pv_u64(limit, &o->max_instructions));
    o->preserve = preserve;
    Py_XDECREF(none);
    return ok;
}

/* A buf whose length is the next argument must be as long as that says: libvm copies so many bytes. */
static bool check_lengths(const pv_signature *s, const vm_value *values, const Py_buffer *views)
{
    for (unsigned i = 0; i < s->count; i++) {
        bool is_buffer = s->args[i].kind == V_BUF || s->args[i].kind == V_CBUF;
        if (is_buffer && s->args[i].length < 0 && i + 1 < s->count && values[i].cdata && values[i + 1].u > (uint64_t)views[i].len) {
            PyErr_Format(PyExc_ValueError, "argument %u has %zd bytes, the next one says more", i, views[i].len);
            return false;
        }
    }
    return true;
}

static PyObject *no_return(pv_state *st, pv_exit *x)
{
    char text[300] = "the function did not return: ";
    vm_exit_format(&x->e, text + strlen(text), sizeof text - strlen(text));
    pv_raise_text(st, PV_CALL, VM_E_FAULT, text);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (value)
        PyObject_SetAttrString(value, "exit", (PyObject *)x);
    PyErr_Restore(type, value, trace);
    return NULL;
}

static PyObject *do_call(pv_vcpu *v, uint64_t address, const char *text, PyObject *args, Py_ssize_t first, const vm_call_options *o)
{
    pv_machine *m = v->machine;
    pv_signature s = { 0 };
    size_t needs = 0;
    vm_value values[VM_CALL_ARGS + 1], result = { 0 };
    Py_buffer views[VM_CALL_ARGS + 1];
    Py_ssize_t count = PyTuple_Size(args) - first;
    if (!pv_open(m))
        return NULL;
    int status = vm_signature_check(text, &needs);
    if (status != VM_OK)
        return pv_raise(m->st, status);
    read_signature(text, &s);
    if (count != (Py_ssize_t)s.count || needs != s.count || needs > VM_CALL_ARGS)
        return PyErr_Format(PyExc_TypeError, "'%s' takes %zu arguments, not %zd", text, needs, count);
    memset(views, 0, sizeof views);
    bool ok = true;
    for (unsigned i = 0; ok && i < s.count; i++)
        ok = to_value(PyTuple_GetItem(args, first + i), &s.args[i], &values[i], &views[i]);
    ok = ok && check_lengths(&s, values, views);
    pv_exit *x = ok ? (pv_exit *)pv_exit_new(m->st) : NULL;
    PyObject *answer = NULL;
    pv_frame frame;
    if (x && pv_enter(&frame, m)) {
        frame.vcpu = v;
        status = vm_call(v->cpu, address, text, values, s.count, &result, o, &x->e);
        ok = pv_leave(&frame);
        if (ok && status != VM_OK)
            pv_raise(m->st, status);
        else if (ok && x->e.reason != VM_EXIT_UNTIL)
            pv_exit_set_hook(x, m), no_return(m->st, x);
        else if (ok)
            answer = from_value(&result, &s.result);
        if (ok && status == VM_OK && x->e.reason != VM_EXIT_UNTIL && !x->hook)
            Py_XSETREF(m->of_vcpu[v->index].last, (pv_exit *)Py_NewRef((PyObject *)x));
    }
    Py_XDECREF(x);
    for (unsigned i = 0; i < s.count; i++)
        if (views[i].obj)
            PyBuffer_Release(&views[i]);
    return answer;
}

static PyObject *vcpu_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    uint64_t address;
    const char *signature;
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    PyObject *head = PyTuple_GetSlice(args, 0, 2);
    if (!head || !PyArg_ParseTuple(head, "O&s:call", pv_u64, &address, &signature) || !call_options(kwargs, &o))
        return Py_XDECREF(head), NULL;
    PyObject *result = do_call((pv_vcpu *)self, address, signature, args, 2, &o);
    Py_DECREF(head);
    return result;
}

/* ---- libvm.Closure: a guest function as a callable, and as a C pointer ---- */

typedef struct pv_closure {
    PyObject_HEAD
    pv_vcpu *vcpu;
    vm_closure *closure;                /* made when the pointer is asked for */
    uint64_t address;
    PyObject *signature;
    vm_call_options options;
} pv_closure;

static PyObject *vcpu_function(PyObject *self, PyObject *args, PyObject *kwargs)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t address;
    const char *text;
    PyObject *signature;
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    if (!PyArg_ParseTuple(args, "O&U:function", pv_u64, &address, &signature) || !call_options(kwargs, &o) || !pv_open(v->machine) ||
        !(text = PyUnicode_AsUTF8AndSize(signature, NULL)))
        return NULL;
    int status = vm_signature_check(text, NULL);
    if (status != VM_OK)
        return pv_raise(v->machine->st, status);
    pv_closure *c = pv_new(v->machine->st->types[PV_T_CLOSURE]);
    if (!c)
        return NULL;
    c->vcpu = (pv_vcpu *)Py_NewRef(self);
    c->address = address;
    c->signature = Py_NewRef(signature);
    c->options = o;
    return (PyObject *)c;
}

static void closure_dealloc(PyObject *self)
{
    pv_closure *c = (pv_closure *)self;
    pv_machine *m = c->vcpu ? c->vcpu->machine : NULL;
    if (c->closure && m && m->m && m->forks == m->st->forks)
        vm_closure_free(c->closure);
    Py_CLEAR(c->vcpu);
    Py_CLEAR(c->signature);
    pv_free(c);
}

static PyObject *closure_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    pv_closure *c = (pv_closure *)self;
    const char *text = PyUnicode_AsUTF8AndSize(c->signature, NULL);
    if (kwargs && PyDict_Size(kwargs))
        return PyErr_SetString(PyExc_TypeError, "guest functions take no keywords"), NULL;
    return text ? do_call(c->vcpu, c->address, text, args, 0, &c->options) : NULL;
}

static PyObject *closure_pointer(PyObject *self, void *unused)
{
    pv_closure *c = (pv_closure *)self;
    pv_machine *m = c->vcpu->machine;
    int status;
    if (!pv_open(m))
        return NULL;
    if (!c->closure) {
        const char *text = PyUnicode_AsUTF8AndSize(c->signature, NULL);
        if (!text)
            return NULL;
        if ((status = vm_closure_new(c->vcpu->cpu, c->address, text, &c->options, &c->closure)) != VM_OK)
            return pv_raise(m->st, status);
    }
    return PyLong_FromVoidPtr((void *)(uintptr_t)vm_closure_function(c->closure));
}

static PyObject *closure_status(PyObject *self, void *unused)
{
    pv_closure *c = (pv_closure *)self;
    if (!pv_open(c->vcpu->machine))
        return NULL;
    if (!c->closure)
        return pv_enum(c->vcpu->machine->st, "Status", VM_OK);
    return pv_enum(c->vcpu->machine->st, "Status", vm_closure_status(c->closure, NULL));
}

static PyMemberDef closure_members[] = {
    { "address", T_ULONGLONG, offsetof(pv_closure, address), READONLY, "Where the function is." },
    { "signature", T_OBJECT_EX, offsetof(pv_closure, signature), READONLY, "Its signature." }, { NULL, 0, 0, 0, NULL }
};
static PyGetSetDef closure_getters[] = {
    { "pointer", closure_pointer, NULL, "Address of a C function that calls it, for ctypes; valid as long as this object.", NULL },
    { "status", closure_status, NULL, "How the last call through the pointer ended.", NULL }, { NULL, NULL, NULL, NULL, NULL }
};
static PyType_Slot closure_slots[] = {
    { Py_tp_doc, "A guest function." }, { Py_tp_dealloc, closure_dealloc }, { Py_tp_call, closure_call },
    { Py_tp_members, closure_members }, { Py_tp_getset, closure_getters }, { 0, NULL }
};
PyType_Spec pv_closure_spec = {
    "libvm._libvm.Closure", sizeof(pv_closure), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, closure_slots
};

PyMethodDef pv_call_vcpu_methods[] = {
    { "call", PV_KW(vcpu_call), METH_VARARGS | METH_KEYWORDS,
      "call(address, signature, *args, max_instructions=None, timeout=None, exception_exits=0, stack=0, return_address=0,\n"
      "     preserve=False)\nRuns a guest function until it returns, and gives its result. CallError (with exit) if it does not." },
    { "function", PV_KW(vcpu_function), METH_VARARGS | METH_KEYWORDS,
      "function(address, signature, **options) -> Closure\nThe same as a callable." },
    { NULL, NULL, 0, NULL }
};

/* ---- the guest calls ---- */

/* Buffers come as bytes or bytearrays, copies: a pointer into the guest would outlive the call. */
static PyObject *argument_of(const pv_signature *s, const vm_value *args, size_t count, size_t i, unsigned type)
{
    const value_type *t = &s->args[type];
    if (t->kind != V_BUF && t->kind != V_CBUF)
        return from_value(&args[i], t);
    Py_ssize_t n = t->length >= 0 ? t->length : i + 1 < count ? (Py_ssize_t)args[i + 1].u : 0;
    if (!args[i].cdata)
        Py_RETURN_NONE;
    return t->kind == V_BUF ? PyByteArray_FromStringAndSize(args[i].cdata, n) : PyBytes_FromStringAndSize(args[i].cdata, n);
}

static bool copy_back(const pv_signature *s, PyObject *tuple, const vm_value *args)
{
    for (unsigned t = 0, i = 0; t < s->count; t++) {
        if (s->args[t].kind == V_CPU || s->args[t].kind == V_USER)
            continue;
        PyObject *o = PyTuple_GetItem(tuple, t);
        if (s->args[t].kind == V_BUF && args[i].data && PyByteArray_Check(o)) {
            Py_ssize_t n = s->args[t].length >= 0 ? s->args[t].length : (Py_ssize_t)args[i + 1].u;
            if (PyByteArray_Size(o) != n) {
                PyErr_SetString(PyExc_ValueError, "a guest's buffer cannot change its size");
                return false;
            }
            memcpy(args[i].data, PyByteArray_AsString(o), (size_t)n);
        }
        i++;
    }
    return true;
}

static int call_bound(void *user, vm_vcpu *cpu, const vm_value *args, size_t count, vm_value *result)
{
    pv_binding_data *b = user;
    pv_machine *m = b->machine;
    const pv_signature *s = b->signature;
    pv_gate g;
    size_t i = 0;
    pv_callback_begin(&g);
    PyObject *fn = Py_XNewRef(b->fn), *tuple = PyTuple_New(s->count), *o = NULL;
    for (unsigned t = 0; tuple && t < s->count; t++) {
        PyObject *a = s->args[t].kind == V_CPU ? pv_vcpu_of(m, cpu) : s->args[t].kind == V_USER ? Py_NewRef(Py_None)
                                                                    : argument_of(s, args, count, i++, t);
        if (!a || PyTuple_SetItem(tuple, t, a) < 0)
            Py_CLEAR(tuple);
    }
    if (fn && tuple)
        o = PyObject_Call(fn, tuple, NULL);
    Py_buffer none = { 0 };
    bool ok = o && copy_back(s, tuple, args);
    if (ok && s->result.kind != V_VOID)
        ok = to_value(o, &s->result, result, &none);
    if (!ok)
        pv_callback_failed(m, NULL);
    Py_XDECREF(o);
    Py_XDECREF(tuple);
    Py_XDECREF(fn);
    pv_callback_end(&g);
    return ok ? 0 : 1;
}

static void binding_data_free(pv_binding_data *b)
{
    *b->link = b->next;
    if (b->next)
        b->next->link = b->link;
    if (b->handle)
        b->handle->data = NULL;
    Py_XDECREF(b->fn);
    free(b->signature);
    free(b);
}

static void destroy_binding(void *user)
{
    pv_gate g;
    pv_callback_begin(&g);
    binding_data_free(user);
    pv_callback_end(&g);
}

static PyObject *bind(PyObject *self, PyObject *args, PyObject *kwargs, bool is_hypercall)
{
    static char *names[] = { "where", "signature", "fn", "max_string", "max_buffer", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t where;
    const char *text;
    PyObject *fn;
    vm_bind_desc d = VM_BIND_DESC_INIT;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, is_hypercall ? "O&sO|O&O&:bind_hypercall" : "O&sO|O&O&:bind_function", names, pv_u64,
                                     &where, &text, &fn, pv_u32, &d.max_string, pv_u32, &d.max_buffer) || !pv_open(m))
        return NULL;
    if (!PyCallable_Check(fn))
        return PyErr_Format(PyExc_TypeError, "the guest calls a function, not %R", fn);
    int status = vm_signature_check(text, NULL);
    if (status != VM_OK)
        return pv_raise(m->st, status);
    char *values = malloc(strlen(text) + 2);
    if (!values)
        return PyErr_NoMemory();
    without_cpu(text, values);
    pv_binding_data *b = calloc(1, sizeof *b);
    pv_binding *h = b ? pv_new(m->st->types[PV_T_BINDING]) : NULL;
    if (!h || !(b->signature = calloc(1, sizeof *b->signature))) {
        free(b);
        free(values);
        Py_XDECREF(h);
        return PyErr_NoMemory();
    }
    read_signature(text, b->signature);
    b->machine = m;
    b->fn = Py_NewRef(fn);
    b->handle = h;
    h->machine = (pv_machine *)Py_NewRef(self);
    h->data = b;
    b->link = &m->bindings;
    b->next = m->bindings;
    if (b->next)
        b->next->link = &b->next;
    m->bindings = b;
    d.signature = values, d.values = call_bound, d.user = b, d.destroy = destroy_binding;
    vm_binding *made = NULL;
    pv_frame frame;
    bool ok = pv_enter(&frame, m);
    status = !ok ? VM_E_INVALID : is_hypercall ? vm_bind_hypercall(m->m, where, &d, &made) : vm_bind_function(m->m, where, &d, &made);
    ok = ok && pv_leave(&frame);
    free(values);
    if (status != VM_OK) {
        binding_data_free(b);
        Py_DECREF(h);
        return ok ? pv_raise(m->st, status) : NULL;
    }
    if (h->data)
        b->binding = made;
    return ok ? (PyObject *)h : (Py_DECREF(h), NULL);
}

static PyObject *machine_bind_function(PyObject *self, PyObject *args, PyObject *kwargs) { return bind(self, args, kwargs, false); }
static PyObject *machine_bind_hypercall(PyObject *self, PyObject *args, PyObject *kwargs) { return bind(self, args, kwargs, true); }

static PyObject *binding_remove(PyObject *self, PyObject *unused)
{
    pv_binding *h = (pv_binding *)self;
    if (!pv_open(h->machine))
        return NULL;
    if (!h->data)
        Py_RETURN_NONE;
    vm_binding *gone = h->data->binding;
    h->data->handle = NULL;
    h->data = NULL;
    PV_BEGIN(h->machine);
    int status = vm_unbind(h->machine->m, gone);
    PV_END();
    return pv_none_or(h->machine->st, status);
}

static PyObject *machine_unbind(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *binding;
    if (!PyArg_ParseTuple(args, "O!:unbind", m->st->types[PV_T_BINDING], &binding))
        return NULL;
    if (((pv_binding *)binding)->machine != m)
        return pv_raise_text(m->st, PV_NOTFOUND, VM_E_NOTFOUND, "the binding is another machine's");
    return binding_remove(binding, NULL);
}

static void binding_dealloc(PyObject *self)
{
    pv_binding *h = (pv_binding *)self;
    if (h->data)
        h->data->handle = NULL;
    Py_CLEAR(h->machine);
    pv_free(h);
}

static PyObject *binding_active(PyObject *self, void *unused)
{
    pv_binding *h = (pv_binding *)self;
    return PyBool_FromLong(h->data && h->machine->m && h->machine->forks == h->machine->st->forks);
}

static PyGetSetDef binding_getters[] = {
    { "active", binding_active, NULL, "It has not been removed.", NULL }, { NULL, NULL, NULL, NULL, NULL }
};
static PyMethodDef binding_methods[] = {
    { "remove", binding_remove, METH_NOARGS, "remove()\nEnds it. May be called again." }, { NULL, NULL, 0, NULL }
};
static PyType_Slot binding_slots[] = {
    { Py_tp_doc, "A host function that the guest can call; it stays when its handle is dropped." }, { Py_tp_dealloc, binding_dealloc },
    { Py_tp_methods, binding_methods }, { Py_tp_getset, binding_getters }, { 0, NULL }
};
PyType_Spec pv_binding_spec = {
    "libvm._libvm.Binding", sizeof(pv_binding), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, binding_slots
};

/* ---- recording and replay ---- */

static PyObject *machine_record(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "file", "skip_idle", "max_bytes", NULL };
    pv_machine *m = (pv_machine *)self;
    vm_record_options o = VM_RECORD_OPTIONS_INIT;
    PyObject *file;
    int skip = 0, fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|pO&:record", names, &file, &skip, pv_bytes, &o.max_bytes) ||
        (fd = PyObject_AsFileDescriptor(file)) < 0)
        return NULL;
    o.skip_idle = skip;
    PV_BEGIN(m);
    int status = vm_record(m->m, fd, &o);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_replay(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *file;
    int fd;
    if (!PyArg_ParseTuple(args, "O:replay", &file) || (fd = PyObject_AsFileDescriptor(file)) < 0)
        return NULL;
    PV_BEGIN(m);
    int status = vm_replay(m->m, fd);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *plain(PyObject *self, int (*fn)(vm_machine *))
{
    pv_machine *m = (pv_machine *)self;
    PV_BEGIN(m);
    int status = fn(m->m);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_record_stop(PyObject *self, PyObject *unused) { return plain(self, vm_record_stop); }
static PyObject *machine_replay_stop(PyObject *self, PyObject *unused) { return plain(self, vm_replay_stop); }

static PyObject *machine_replay_info(PyObject *self, PyObject *unused)
{
    pv_machine *m = (pv_machine *)self;
    vm_replay_info i = VM_REPLAY_INFO_INIT;
    PV_BEGIN(m);
    int status = vm_replay_get_info(m->m, &i);
    PV_END();
    if (status != VM_OK)
        return pv_raise(m->st, status);
    return Py_BuildValue("{sNsKsKsKsKsNsN}", "mode", pv_enum(m->st, "ReplayMode", i.mode), "position", (unsigned long long)i.position,
                         "end", (unsigned long long)i.end, "events", (unsigned long long)i.events, "bytes",
                         (unsigned long long)i.bytes, "status", pv_enum(m->st, "Status", i.status), "at_end",
                         PyBool_FromLong(i.at_end));
}

static PyObject *machine_checksum(PyObject *self, PyObject *unused)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t sum = 0;
    PV_BEGIN(m);
    int status = vm_machine_checksum(m->m, &sum);
    PV_END();
    return status ? pv_raise(m->st, status) : PyLong_FromUnsignedLongLong(sum);
}

PyMethodDef pv_call_methods[] = {
    { "bind_function", PV_KW(machine_bind_function), METH_VARARGS | METH_KEYWORDS,
      "bind_function(where, signature, fn, max_string=0, max_buffer=0) -> Binding\nThe guest calls fn at linear address `where`." },
    { "bind_hypercall", PV_KW(machine_bind_hypercall), METH_VARARGS | METH_KEYWORDS,
      "bind_hypercall(where, signature, fn, max_string=0, max_buffer=0) -> Binding\nThe same for VMCALL with number `where`." },
    { "unbind", machine_unbind, METH_VARARGS, "unbind(binding)" },
    { "record", PV_KW(machine_record), METH_VARARGS | METH_KEYWORDS,
      "record(file, skip_idle=False, max_bytes=0)\nWrites what happens to the machine into an open file." },
    { "record_stop", machine_record_stop, METH_NOARGS, "record_stop()" },
    { "replay", machine_replay, METH_VARARGS, "replay(file)\nMakes it happen again in the next runs." },
    { "replay_stop", machine_replay_stop, METH_NOARGS, "replay_stop()" },
    { "replay_info", machine_replay_info, METH_NOARGS, "replay_info() -> dict\nWhere it is." },
    { "checksum", machine_checksum, METH_NOARGS, "checksum() -> int\nOf RAM, registers and the instruction count." },
    { NULL, NULL, 0, NULL }
};
