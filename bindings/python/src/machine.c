/* machine.c - libvm.Machine: making and ending machines, and what concerns the whole of one. */
#include "pv.h"

#include <time.h>

const pv_name pv_backend_names[] = {
    { "auto", VM_BACKEND_AUTO }, { "kvm", VM_BACKEND_KVM }, { "jit", VM_BACKEND_JIT }, { "interp", VM_BACKEND_INTERP }, { NULL, 0 }
};
static const pv_name platform_names[] = { { "bare", VM_PLATFORM_BARE }, { "pc", VM_PLATFORM_PC }, { NULL, 0 } };

/* ---- life ---- */

static PyObject *machine_alloc(PyTypeObject *type, pv_state *st)
{
    pv_machine *m = pv_new(type);
    if (!m)
        return NULL;
    m->st = st;
    m->forks = st->forks;
    pthread_mutex_init(&m->trace_lock, NULL);
    m->breakpoints = PySet_New(NULL);
    m->kept = PyList_New(0);
    m->link = &st->machines;
    m->next = st->machines;
    if (m->next)
        m->next->link = &m->next;
    st->machines = m;
    if (!m->breakpoints || !m->kept)
        Py_CLEAR(m);
    return (PyObject *)m;
}

static PyObject *machine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "backend", "platform", "vcpus", "mmu", "memory", "code_cache", "cpu_model",
                              "memory_file", "memory_private", "memory_advice", NULL };
    pv_state *st = pv_state_of(type);
    vm_options o = VM_OPTIONS_INIT;
    PyObject *backend = NULL, *platform = NULL;
    long v;
    int is_private = 0;
    uint32_t advice = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOO&zO&O&zzpO&:Machine", names, &backend, &platform, pv_u32, &o.vcpus, &o.mmu,
                                     pv_bytes, &o.ram_bytes, pv_bytes, &o.code_cache_bytes, &o.cpu_model, &o.ram_file, &is_private,
                                     pv_u32, &advice))
        return NULL;
    o.ram_private = is_private;
    o.ram_advice = advice;
    if (backend && !pv_named(backend, pv_backend_names, "backend", &v))
        return NULL;
    o.backend = backend ? (vm_backend)v : VM_BACKEND_AUTO;
    if (platform && !pv_named(platform, platform_names, "platform", &v))
        return NULL;
    o.platform = platform ? (vm_platform)v : VM_PLATFORM_BARE;
    pv_machine *m = (pv_machine *)machine_alloc(type, st);
    if (!m)
        return NULL;
    /* Not pv_enter: there is no machine yet. A Python MMU strategy finds the object through the frame. */
    pv_frame frame = { .outer = pv_top, .machine = m };
    vm_machine *made = NULL;
    m->calls++;
    pv_top = &frame;
    frame.ts = PyEval_SaveThread();
    int status = vm_create(&o, &made);
    PyEval_RestoreThread(frame.ts);
    pv_top = frame.outer;
    m->calls--;
    m->m = made;
    if (frame.exc[0]) {
        PyErr_Restore(frame.exc[0], frame.exc[1], frame.exc[2]);
        Py_DECREF(m);
        return NULL;
    }
    if (status != VM_OK) {
        pv_raise_as(st, status == VM_E_UNSUPPORTED ? PV_BACKEND : status == VM_E_INVALID ? PV_INVALID :
                    status == VM_E_NOMEM ? PV_NOMEM : status == VM_E_HOST ? PV_HOST : PV_ERROR, status);
        Py_DECREF(m);
        return NULL;
    }
    m->vcpu_count = vm_vcpu_count(made);
    return (PyObject *)m;
}

/* What is left when libvm has let go of the machine. */
static void drop_rest(pv_machine *m)
{
    for (unsigned i = 0; i < VM_MAX_VCPUS; i++)
        pv_vcpu_end(m, i);
    for (pv_region *r = m->regions; r; r = r->next) {
        r->r = NULL;
        if (r->has_host) {
            r->has_host = false;
            PyBuffer_Release(&r->host);
        }
    }
    if (m->has_coverage) {
        m->has_coverage = false;
        PyBuffer_Release(&m->coverage);
    }
    for (int i = 0; i < PV_CONSOLES; i++)
        if (m->sinks[i])
            pv_sink_end(m->sinks[i]);
    Py_CLEAR(m->on_violation);
    Py_CLEAR(m->trace_fn);
    if (m->kept)
        PyList_SetSlice(m->kept, 0, PyList_Size(m->kept), NULL);
}

/* In a child after fork() the machine's threads do not exist: it is left alone. */
static void destroy(pv_machine *m)
{
    vm_machine *vm = m->m;
    pv_frame frame = { .outer = pv_top, .machine = m };
    if (!vm || m->forks != m->st->forks)
        return;
    m->closing = true;
    pv_top = &frame;
    vm_gdb *stub = m->gdb ? m->gdb->g : NULL;
    if (stub)
        m->gdb->g = NULL, m->gdb = NULL;
    frame.ts = PyEval_SaveThread();
    vm_gdb_free(stub);
    vm_destroy(vm);
    PyEval_RestoreThread(frame.ts);
    pv_top = frame.outer;
    m->m = NULL;
    drop_rest(m);
    if (frame.exc[0]) {                 /* of a destroy() */
        PyErr_Restore(frame.exc[0], frame.exc[1], frame.exc[2]);
        PyErr_WriteUnraisable((PyObject *)m);
    }
}

static bool is_mine(const pv_machine *m)
{
    for (pv_frame *f = pv_top; f; f = f->outer)
        if (f->machine == m)
            return true;
    return false;
}

static void kick_all(pv_machine *m)
{
    for (unsigned i = 0; m->calls && i < m->vcpu_count; i++)
        vm_vcpu_kick(vm_vcpu_get(m->m, i));
}

/* Waits for calls of other threads, runs included, and ends the machine. */
bool pv_close(pv_machine *m)
{
    if (m->forks != m->st->forks || (!m->m && !m->closing))
        return true;
    if (is_mine(m)) {
        pv_raise_text(m->st, PV_BUSY, VM_E_BUSY, "a machine cannot be closed from its own callback");
        return false;
    }
    if (m->exports) {
        PyErr_SetString(PyExc_BufferError, "views of the machine's memory exist");
        return false;
    }
    bool is_first = !m->closing;
    uint64_t begin = pv_now();
    m->closing = true;
    if (is_first && m->gdb)
        vm_gdb_stop(m->gdb->g);
    while (m->m && (m->calls || !is_first)) {
        if (m->calls && is_first)
            kick_all(m);
        if (m->st->ending && pv_now() - begin > UINT64_C(5000000000))
            return true;                /* a callback that does not return: the process ends all the same */
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            if (is_first)
                m->closing = false;
            return false;
        }
    }
    if (is_first)
        destroy(m);
    return true;
}

static int machine_traverse(PyObject *self, visitproc visit, void *arg)
{
    pv_machine *m = (pv_machine *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(m->breakpoints);
    Py_VISIT(m->kept);
    Py_VISIT(m->on_violation);
    Py_VISIT(m->trace_fn);
    for (pv_device *d = m->devices; d; d = d->next) {
        Py_VISIT(d->object);
        Py_VISIT(d->read);
        Py_VISIT(d->write);
        Py_VISIT(d->reset);
        Py_VISIT(d->save);
        Py_VISIT(d->restore);
        Py_VISIT(d->destroy);
        Py_VISIT(d->clone);
    }
    for (pv_hook_data *h = m->hooks; h; h = h->next)
        Py_VISIT(h->fn);
    for (pv_binding_data *b = m->bindings; b; b = b->next)
        Py_VISIT(b->fn);
    for (int i = 0; i < PV_CONSOLES; i++)
        if (m->sinks[i])
            Py_VISIT(m->sinks[i]->fn);
    return 0;
}

/* Nobody reaches the machine any more: end it, which calls every destroy() and forgets every callback. */
static int machine_clear(PyObject *self)
{
    pv_machine *m = (pv_machine *)self;
    if (m->m && !m->calls && !m->exports)
        destroy(m);
    return 0;
}

static void machine_dealloc(PyObject *self)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *type, *value, *trace;
    PyObject_GC_UnTrack(self);
    PyErr_Fetch(&type, &value, &trace);
    destroy(m);
    if (m->link) {
        *m->link = m->next;
        if (m->next)
            m->next->link = m->link;
    }
    for (int i = 0; i < PV_CONSOLES; i++)
        if (m->sinks[i])
            pv_sink_free(m->sinks[i]);
    Py_CLEAR(m->on_violation);
    Py_CLEAR(m->trace_fn);
    Py_CLEAR(m->breakpoints);
    Py_CLEAR(m->kept);
    free(m->trace_text);
    pthread_mutex_destroy(&m->trace_lock);
    PyErr_Restore(type, value, trace);
    pv_free(m);
}

static PyObject *machine_close(PyObject *self, PyObject *unused)
{
    if (!pv_close((pv_machine *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *machine_enter(PyObject *self, PyObject *unused)
{
    return pv_open((pv_machine *)self) ? Py_NewRef(self) : NULL;
}

static PyObject *machine_exit(PyObject *self, PyObject *args) { return machine_close(self, NULL); }

static PyObject *machine_repr(PyObject *self)
{
    pv_machine *m = (pv_machine *)self;
    if (!m->m || m->closing || m->forks != m->st->forks)
        return PyUnicode_FromString("<libvm.Machine closed>");
    return PyUnicode_FromFormat("<libvm.Machine %s, %u vCPU%s>", vm_backend_name(vm_machine_backend(m->m)), m->vcpu_count,
                                m->vcpu_count == 1 ? "" : "s");
}

/* ---- about the whole machine ---- */

static PyObject *machine_reset(PyObject *self, PyObject *unused)
{
    pv_machine *m = (pv_machine *)self;
    PV_BEGIN(m);
    int status = vm_reset(m->m);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_select_backend(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *o;
    long v;
    if (!PyArg_ParseTuple(args, "O:select_backend", &o) || !pv_named(o, pv_backend_names, "backend", &v))
        return NULL;
    PV_BEGIN(m);
    int status = vm_backend_select(m->m, (vm_backend)v);
    PV_END();
    if (status == VM_E_UNSUPPORTED)
        return pv_raise_as(m->st, PV_BACKEND, status);
    return pv_none_or(m->st, status);
}

static PyObject *machine_stats(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    const char *name = NULL;
    uint64_t value = 0;
    if (!PyArg_ParseTuple(args, "|z:stats", &name) || !pv_open(m))
        return NULL;
    if (name) {
        PV_BEGIN(m);
        int status = vm_stats(m->m, name, &value);
        PV_END();
        return status ? pv_raise(m->st, status) : PyLong_FromUnsignedLongLong(value);
    }
    PyObject *all = PyDict_New();
    for (unsigned i = 0; all && (name = vm_stat_name(i, NULL)); i++) {
        if (vm_stats(m->m, name, &value) != VM_OK)
            continue;
        PyObject *number = PyLong_FromUnsignedLongLong(value);
        if (!number || PyDict_SetItemString(all, name, number) < 0)
            Py_CLEAR(all);
        Py_XDECREF(number);
    }
    return all;
}

/* Kept until some thread leaves libvm: here is no place for Python code. */
static void on_trace(void *user, vm_trace_category category, const char *line)
{
    pv_machine *m = user;
    size_t length = strlen(line), need;
    char bit = 0;
    while ((1u << bit) < (unsigned)category)
        bit++;
    pthread_mutex_lock(&m->trace_lock);
    need = m->trace_bytes + length + 2;
    if (need > m->trace_room) {
        char *grown = realloc(m->trace_text, need * 2);
        if (grown)
            m->trace_text = grown, m->trace_room = need * 2;
    }
    if (need <= m->trace_room) {
        m->trace_text[m->trace_bytes] = bit;
        memcpy(m->trace_text + m->trace_bytes + 1, line, length + 1);
        m->trace_bytes = need;
    }
    pthread_mutex_unlock(&m->trace_lock);
}

static PyObject *machine_trace(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *what, *fn = Py_None;
    unsigned mask = 0;
    int status = VM_OK;
    if (!PyArg_ParseTuple(args, "O|O:trace", &what, &fn))
        return NULL;
    if (PyUnicode_Check(what)) {
        const char *list = PyUnicode_AsUTF8AndSize(what, NULL);
        if (!list)
            return NULL;
        if ((status = vm_trace_parse(list, &mask)) != VM_OK)
            return pv_raise(m->st, status);
    } else if (!pv_u32(what, &mask)) {
        return NULL;
    }
    if (fn != Py_None && !PyCallable_Check(fn)) {
        PyErr_SetString(PyExc_TypeError, "trace() takes a function");
        return NULL;
    }
    PV_BEGIN(m);
    status = vm_trace_set(m->m, mask, fn == Py_None ? NULL : on_trace, m);
    PV_END();
    if (status != VM_OK)
        return pv_raise(m->st, status);
    Py_XSETREF(m->trace_fn, fn == Py_None || !mask ? NULL : Py_NewRef(fn));
    Py_RETURN_NONE;
}

static PyObject *machine_irq_set(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t gsi;
    int level;
    if (!PyArg_ParseTuple(args, "O&p:irq_set", pv_u32, &gsi, &level))
        return NULL;
    PV_BEGIN(m);
    int status = vm_irq_set(m->m, gsi, level);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_irq_msi(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t address;
    uint32_t data;
    if (!PyArg_ParseTuple(args, "O&O&:irq_msi", pv_u64, &address, pv_u32, &data))
        return NULL;
    PV_BEGIN(m);
    int status = vm_irq_msi(m->m, address, data);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_ioeventfd(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "file", "address", "width", "port", "match", "on", NULL };
    pv_machine *m = (pv_machine *)self;
    vm_doorbell d = VM_DOORBELL_INIT;
    PyObject *file, *match = Py_None;
    int is_port = 0, on = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO&|O&pOp:ioeventfd", names, &file, pv_u64, &d.address, pv_u32, &d.width, &is_port,
                                     &match, &on) ||
        (d.fd = PyObject_AsFileDescriptor(file)) < 0 || (match != Py_None && !pv_u64(match, &d.match)))
        return NULL;
    d.is_port = is_port;
    d.has_match = match != Py_None;
    PV_BEGIN(m);
    int status = vm_ioeventfd(m->m, &d, on);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_irqfd(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "file", "gsi", "on", NULL };
    pv_machine *m = (pv_machine *)self;
    PyObject *file;
    uint32_t gsi = 0;
    int on = 1, fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O&p:irqfd", names, &file, pv_u32, &gsi, &on) ||
        (fd = PyObject_AsFileDescriptor(file)) < 0)
        return NULL;
    PV_BEGIN(m);
    int status = vm_irqfd(m->m, fd, gsi, on);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_irqfd_msi(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *file;
    uint64_t address;
    uint32_t data;
    int fd;
    if (!PyArg_ParseTuple(args, "OO&O&:irqfd_msi", &file, pv_u64, &address, pv_u32, &data) ||
        (fd = PyObject_AsFileDescriptor(file)) < 0)
        return NULL;
    PV_BEGIN(m);
    int status = vm_irqfd_msi(m->m, fd, address, data);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_vcpu(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t index;
    if (!PyArg_ParseTuple(args, "O&:vcpu", pv_u32, &index) || !pv_open(m))
        return NULL;
    if (index >= m->vcpu_count) {
        PyErr_Format(PyExc_IndexError, "no vCPU %u: the machine has %u", index, m->vcpu_count);
        return NULL;
    }
    return pv_vcpu_get(m, index);
}

static PyObject *get_cpu(PyObject *self, void *unused)
{
    return pv_open((pv_machine *)self) ? pv_vcpu_get((pv_machine *)self, 0) : NULL;
}

static PyObject *get_vcpus(PyObject *self, void *unused)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *all = pv_open(m) ? PyTuple_New(m->vcpu_count) : NULL;
    for (unsigned i = 0; all && i < m->vcpu_count; i++) {
        PyObject *cpu = pv_vcpu_get(m, i);
        if (!cpu || PyTuple_SetItem(all, i, cpu) < 0)
            Py_CLEAR(all);
    }
    return all;
}

static PyObject *get_closed(PyObject *self, void *unused)
{
    pv_machine *m = (pv_machine *)self;
    return PyBool_FromLong(!m->m || m->closing || m->forks != m->st->forks);
}

static PyObject *get_running(PyObject *self, void *unused)
{
    pv_machine *m = (pv_machine *)self;
    return PyLong_FromUnsignedLong(m->calls);
}

static PyObject *get_backend(PyObject *self, void *unused)
{
    pv_machine *m = (pv_machine *)self;
    return pv_open(m) ? pv_enum(m->st, "Backend", vm_machine_backend(m->m)) : NULL;
}

static PyObject *get_time(PyObject *self, void *unused)
{
    pv_machine *m = (pv_machine *)self;
    return pv_open(m) ? PyLong_FromUnsignedLongLong(vm_time(m->m)) : NULL;
}

static PyObject *get_mmu(PyObject *self, void *unused)
{
    pv_machine *m = (pv_machine *)self;
    return pv_open(m) ? PyUnicode_FromString(vm_mmu_current(m->m)) : NULL;
}

static PyGetSetDef getters[] = {
    { "cpu", get_cpu, NULL, "The first vCPU.", NULL },
    { "vcpus", get_vcpus, NULL, "All vCPUs, a tuple.", NULL },
    { "closed", get_closed, NULL, "close() was called, or fork() has made this process.", NULL },
    { "calls", get_running, NULL, "Calls that threads have under way inside the library, runs among them.", NULL },
    { "backend", get_backend, NULL, "The backend in use.", NULL },
    { "time", get_time, NULL, "Guest time in nanoseconds.", NULL },
    { "mmu", get_mmu, NULL, "Name of the MMU strategy in use.", NULL },
    { NULL, NULL, NULL, NULL, NULL }
};

static PyMethodDef methods[] = {
    { "close", machine_close, METH_NOARGS,
      "close()\nEnds the machine: runs of other threads come back, then all it owns is freed. May be called again." },
    { "__enter__", machine_enter, METH_NOARGS, NULL },
    { "__exit__", machine_exit, METH_VARARGS, NULL },
    { "reset", machine_reset, METH_NOARGS, "reset()\nResets devices and vCPUs; RAM stays." },
    { "select_backend", machine_select_backend, METH_VARARGS, "select_backend(backend)\nMoves the machine between runs." },
    { "stats", machine_stats, METH_VARARGS, "stats(name=None)\nA counter, or all of them as a dict." },
    { "trace", machine_trace, METH_VARARGS,
      "trace(categories, fn=None)\nTraces to fn(category, line), else to standard error. Lines are handed over when a call\n"
      "into the library comes back, a running vCPU's every 50 ms." },
    { "irq_set", machine_irq_set, METH_VARARGS, "irq_set(gsi, level)\nSets an interrupt line of a PC." },
    { "irq_msi", machine_irq_msi, METH_VARARGS, "irq_msi(address, data)\nSends a message-signalled interrupt." },
    { "ioeventfd", PV_KW(machine_ioeventfd), METH_VARARGS | METH_KEYWORDS,
      "ioeventfd(file, address, width=0, port=False, match=None, on=True)\nWrites of the guest ring an eventfd." },
    { "irqfd", PV_KW(machine_irqfd), METH_VARARGS | METH_KEYWORDS, "irqfd(file, gsi=0, on=True)\nAn eventfd interrupts a PC." },
    { "irqfd_msi", machine_irqfd_msi, METH_VARARGS, "irqfd_msi(file, address, data)\nThe same with a message." },
    { "vcpu", machine_vcpu, METH_VARARGS, "vcpu(index) -> Vcpu" },
    { NULL, NULL, 0, NULL }
};

/* fork() makes machines too. */
static PyObject *machine_fork(PyObject *self, PyObject *unused)
{
    pv_machine *m = (pv_machine *)self, *copy;
    vm_machine *made = NULL;
    if (!pv_open(m) || !(copy = (pv_machine *)machine_alloc(Py_TYPE(self), m->st)))
        return NULL;
    pv_frame frame;
    if (!pv_enter(&frame, m)) {
        Py_DECREF(copy);
        return NULL;
    }
    frame.copy = copy;
    copy->calls++;
    int status = vm_fork(m->m, &made);
    copy->m = made;
    bool ok = pv_leave(&frame);
    copy->calls--;
    if (made)
        copy->vcpu_count = vm_vcpu_count(made);
    if (!ok || status != VM_OK) {
        Py_DECREF(copy);
        return ok ? pv_raise(m->st, status) : NULL;
    }
    return (PyObject *)copy;
}

static PyMethodDef fork_methods[] = {
    { "fork", machine_fork, METH_NOARGS, "fork() -> Machine\nA copy that goes on from the same state by itself." },
    { NULL, NULL, 0, NULL }
};

/* The methods of all parts in one table, made when the type is: there is no other place for it in the limited API. */
static PyMethodDef all_methods[160];

static PyType_Slot slots[] = {
    { Py_tp_doc, "Machine(backend='auto', platform='bare', vcpus=1, mmu=None, memory=0, code_cache=0, cpu_model=None,\n"
      "        memory_file=None, memory_private=False, memory_advice=0)\n"
                 "A virtual machine. Use it in `with`; m[a:b] reads and writes guest-physical RAM." },
    { Py_tp_new, machine_new }, { Py_tp_dealloc, machine_dealloc }, { Py_tp_traverse, machine_traverse },
    { Py_tp_clear, machine_clear }, { Py_tp_repr, machine_repr }, { Py_tp_methods, all_methods }, { Py_tp_getset, getters },
    { Py_mp_subscript, pv_memory_get }, { Py_mp_ass_subscript, pv_memory_set }, { 0, NULL }
};
PyType_Spec pv_machine_spec = {
    "libvm._libvm.Machine", sizeof(pv_machine), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, slots
};

__attribute__((constructor)) static void gather_methods(void)
{
    PyMethodDef *const parts[] = { methods, pv_memory_methods, pv_hook_methods, pv_boot_methods, pv_snapshot_methods,
                                   pv_mmu_methods, pv_call_methods, pv_gdb_methods, pv_coverage_methods, fork_methods };
    size_t n = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        for (PyMethodDef *d = parts[i]; d->ml_name && n < sizeof all_methods / sizeof *all_methods - 1; d++)
            all_methods[n++] = *d;
}
