/* boot.c - loading guests, and consoles.
 *
 * What a guest sends goes into a buffer in C without the GIL, so that guests on many threads do not wait for each other; whoever
 * wants it reads or waits. A function instead of the buffer is possible (Machine.serial_output). */
#include "pv.h"

#include <errno.h>
#include <time.h>

enum { ROOM = 1 << 26 };                /* a console nobody reads loses what comes then */

/* ---- sinks ---- */

static void sink_append(pv_sink *s, const uint8_t *bytes, size_t count)
{
    pthread_mutex_lock(&s->lock);
    if (s->end + count > s->room) {
        if (s->begin) {
            memmove(s->text, s->text + s->begin, s->end - s->begin);
            s->end -= s->begin;
            s->begin = 0;
        }
        size_t need = s->end + count > 4096 ? (s->end + count) * 2 : 4096;
        char *grown = s->end + count <= s->room || need > ROOM ? NULL : realloc(s->text, need);
        if (grown)
            s->text = grown, s->room = need;
    }
    if (s->end + count <= s->room) {
        memcpy(s->text + s->end, bytes, count);
        s->end += count;
        s->total += count;
    } else {
        s->dropped += count;
    }
    pthread_cond_broadcast(&s->grown);
    pthread_mutex_unlock(&s->lock);
}

static void on_output(void *user, const uint8_t *bytes, size_t count)
{
    pv_sink *s = user;
    if (!s->fn) {
        sink_append(s, bytes, count);
        return;
    }
    pv_gate g;
    pv_callback_begin(&g);
    PyObject *fn = Py_XNewRef(s->fn), *data = PyBytes_FromStringAndSize((const char *)bytes, (Py_ssize_t)count);
    PyObject *o = fn && data ? PyObject_CallFunctionObjArgs(fn, data, NULL) : NULL;
    if (!o && PyErr_Occurred())
        pv_callback_failed(s->machine, pv_top && pv_top->vcpu ? pv_top->vcpu->cpu : NULL);
    Py_XDECREF(o);
    Py_XDECREF(data);
    Py_XDECREF(fn);
    pv_callback_end(&g);
}

void pv_sink_end(pv_sink *s)
{
    pthread_mutex_lock(&s->lock);
    s->is_over = true;
    pthread_cond_broadcast(&s->grown);
    pthread_mutex_unlock(&s->lock);
    Py_CLEAR(s->fn);
}

void pv_sink_free(pv_sink *s)
{
    Py_XDECREF(s->fn);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->grown);
    free(s->text);
    free(s);
}

static pv_sink *sink_of(pv_machine *m, unsigned which)
{
    pv_sink *s = m->sinks[which];
    pthread_condattr_t monotonic;
    if (s)
        return s;
    if (!(s = calloc(1, sizeof *s)))
        return PyErr_NoMemory(), NULL;
    s->machine = m;
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->grown, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return m->sinks[which] = s;
}

/* Output of a console goes to fn(bytes), or with fn == NULL into the buffer; `on` false: nowhere. */
static bool direct(pv_machine *m, unsigned which, bool on, PyObject *fn)
{
    pv_sink *s = pv_open(m) ? sink_of(m, which) : NULL;
    pv_frame frame;
    if (!s)
        return false;
    PyObject *old = s->fn;
    s->fn = Py_XNewRef(fn);
    if (!pv_enter(&frame, m))
        return Py_XDECREF(old), false;
    int status = which == PV_DEBUGCON ? vm_debugcon_output(m->m, on ? on_output : NULL, s)
                                      : vm_serial_output(m->m, which, on ? on_output : NULL, s);
    bool ok = pv_leave(&frame);
    Py_XDECREF(old);
    s->is_set = on && status == VM_OK;
    if (status != VM_OK) {
        Py_CLEAR(s->fn);
        return pv_raise(m->st, status), false;
    }
    return ok;
}

static bool check_serial(uint32_t index)
{
    if (index < PV_DEBUGCON)
        return true;
    PyErr_Format(PyExc_ValueError, "serial ports are 0 to 3, not %u", index);
    return false;
}

static PyObject *set_output(pv_machine *m, unsigned which, PyObject *fn)
{
    if (fn != Py_None && !PyCallable_Check(fn))
        return PyErr_Format(PyExc_TypeError, "output goes to a function of bytes, not %R", fn);
    return direct(m, which, fn != Py_None, fn == Py_None ? NULL : fn) ? Py_NewRef(Py_None) : NULL;
}

static PyObject *machine_serial_output(PyObject *self, PyObject *args)
{
    uint32_t index;
    PyObject *fn;
    if (!PyArg_ParseTuple(args, "O&O:serial_output", pv_u32, &index, &fn) || !check_serial(index))
        return NULL;
    return set_output((pv_machine *)self, index, fn);
}

static PyObject *machine_debugcon_output(PyObject *self, PyObject *args)
{
    PyObject *fn;
    return PyArg_ParseTuple(args, "O:debugcon_output", &fn) ? set_output((pv_machine *)self, PV_DEBUGCON, fn) : NULL;
}

static PyObject *machine_serial_input(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t index;
    Py_buffer data;
    pv_frame frame;
    if (!PyArg_ParseTuple(args, "O&y*:serial_input", pv_u32, &index, &data))
        return NULL;
    if (!pv_enter(&frame, m))
        return PyBuffer_Release(&data), NULL;
    int taken = vm_serial_input(m->m, index, data.buf, (size_t)data.len);
    bool ok = pv_leave(&frame);
    PyBuffer_Release(&data);
    if (!ok)
        return NULL;
    return taken < 0 ? pv_raise(m->st, taken) : PyLong_FromLong(taken);
}

/* ---- libvm.Console: a handle over a sink ---- */

typedef struct pv_console { PyObject_HEAD pv_machine *machine; unsigned which; } pv_console;

static PyObject *machine_console(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint32_t index = 0;
    if (!PyArg_ParseTuple(args, "|O&:serial", pv_u32, &index))
        return NULL;
    if (index != PV_DEBUGCON && !check_serial(index))
        return NULL;
    if (!(m->sinks[index] && m->sinks[index]->is_set && !m->sinks[index]->fn) && !direct(m, index, true, NULL))
        return NULL;
    pv_console *c = pv_new((PyTypeObject *)m->st->console_class);
    if (!c)
        return NULL;
    c->machine = (pv_machine *)Py_NewRef(self);
    c->which = index;
    return (PyObject *)c;
}

static PyObject *machine_debug_console(PyObject *self, PyObject *unused)
{
    PyObject *args = Py_BuildValue("(i)", PV_DEBUGCON), *c = args ? machine_console(self, args) : NULL;
    Py_XDECREF(args);
    return c;
}

static void console_dealloc(PyObject *self)
{
    Py_CLEAR(((pv_console *)self)->machine);
    pv_free(self);
}

/* Waits until there are more than `beyond` unread bytes, the time is over, or the machine is closed: how many there are. */
static PyObject *console_wait(PyObject *self, PyObject *args)
{
    pv_console *c = (pv_console *)self;
    pv_sink *s = c->machine->sinks[c->which];
    Py_ssize_t beyond;
    uint64_t timeout;
    if (!PyArg_ParseTuple(args, "nO&:_wait", &beyond, pv_seconds, &timeout))
        return NULL;
    uint64_t end = timeout ? pv_now() + timeout : UINT64_MAX;
    for (;;) {
        size_t have;
        bool is_over;
        uint64_t now = pv_now(), until = now + UINT64_C(50000000);
        if (until > end)
            until = end;
        struct timespec t = { .tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u) };
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&s->lock);
        if ((Py_ssize_t)(s->end - s->begin) <= beyond && !s->is_over && now < end)
            pthread_cond_timedwait(&s->grown, &s->lock, &t);
        have = s->end - s->begin;
        is_over = s->is_over;
        pthread_mutex_unlock(&s->lock);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0)
            return NULL;
        if ((Py_ssize_t)have > beyond || is_over || pv_now() >= end)
            return PyLong_FromSize_t(have);
    }
}

/* Unread bytes, at most `count` (negative: all), and whether they are now read. */
static PyObject *console_take(PyObject *self, PyObject *args)
{
    pv_console *c = (pv_console *)self;
    pv_sink *s = c->machine->sinks[c->which];
    Py_ssize_t count = -1;
    int keep = 0;
    if (!PyArg_ParseTuple(args, "|np:_take", &count, &keep))
        return NULL;
    pthread_mutex_lock(&s->lock);
    size_t have = s->end - s->begin, n = count < 0 || (size_t)count > have ? have : (size_t)count;
    PyObject *bytes = PyBytes_FromStringAndSize(s->text ? s->text + s->begin : "", (Py_ssize_t)n);
    if (bytes && !keep)
        s->begin += n;
    pthread_mutex_unlock(&s->lock);
    return bytes;
}

static PyObject *console_get(PyObject *self, void *which)
{
    pv_console *c = (pv_console *)self;
    pv_sink *s = c->machine->sinks[c->which];
    switch ((intptr_t)which) {
    case 0: return Py_NewRef((PyObject *)c->machine);
    case 1: return PyLong_FromUnsignedLong(c->which);
    default: return PyLong_FromUnsignedLongLong(s->dropped);
    }
}

static PyGetSetDef console_getters[] = {
    { "machine", console_get, NULL, "Whose it is.", (void *)0 }, { "index", console_get, NULL, "Which serial port; 4: debug console.", (void *)1 },
    { "dropped", console_get, NULL, "Bytes lost because nobody read them.", (void *)2 }, { NULL, NULL, NULL, NULL, NULL }
};
static PyMethodDef console_methods[] = {
    { "_wait", console_wait, METH_VARARGS, NULL }, { "_take", console_take, METH_VARARGS, NULL }, { NULL, NULL, 0, NULL }
};
static PyType_Slot console_slots[] = {
    { Py_tp_doc, "A serial port of a machine." }, { Py_tp_dealloc, console_dealloc }, { Py_tp_methods, console_methods },
    { Py_tp_getset, console_getters }, { 0, NULL }
};
PyType_Spec pv_console_spec = {
    "libvm._libvm.Console", sizeof(pv_console), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    console_slots
};

/* ---- loading ---- */

static const char *text_of(PyObject *path) { return path ? PyBytes_AsString(path) : NULL; }

static PyObject *machine_boot_image(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "kernel", "initrd", "cmdline", "bios", "linux_entry", NULL };
    pv_machine *m = (pv_machine *)self;
    PyObject *kernel = NULL, *initrd = NULL, *bios = NULL;
    vm_boot_options o = VM_BOOT_OPTIONS_INIT;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O&O&zO&O&:boot_image", names, pv_path, &kernel, pv_path, &initrd, &o.cmdline,
                                     pv_path, &bios, pv_u32, &o.linux_entry))
        return Py_XDECREF(kernel), Py_XDECREF(initrd), Py_XDECREF(bios), NULL;
    o.kernel = text_of(kernel), o.initrd = text_of(initrd), o.bios = text_of(bios);
    pv_frame frame;
    int status = VM_OK;
    bool ok = pv_enter(&frame, m);
    if (ok) {
        status = vm_boot_image(m->m, &o);
        ok = pv_leave(&frame);
    }
    Py_XDECREF(kernel);
    Py_XDECREF(initrd);
    Py_XDECREF(bios);
    return ok ? pv_none_or(m->st, status) : NULL;
}

static PyObject *machine_boot_linux(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "kernel", "initrd", "cmdline", NULL };
    pv_machine *m = (pv_machine *)self;
    PyObject *kernel = NULL, *initrd = NULL;
    vm_linux_boot o = VM_LINUX_BOOT_INIT;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|O&z:boot_linux", names, pv_path, &kernel, pv_path, &initrd, &o.cmdline))
        return Py_XDECREF(kernel), Py_XDECREF(initrd), NULL;
    o.kernel = text_of(kernel), o.initrd = text_of(initrd);
    pv_frame frame;
    int status = VM_OK;
    bool ok = pv_enter(&frame, m);
    if (ok) {
        status = vm_boot_linux(m->m, &o);
        ok = pv_leave(&frame);
    }
    Py_XDECREF(kernel);
    Py_XDECREF(initrd);
    return ok ? pv_none_or(m->st, status) : NULL;
}

static PyObject *machine_load_elf(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *path = NULL;
    uint64_t entry = 0;
    pv_frame frame;
    if (!PyArg_ParseTuple(args, "O&:load_elf", PyUnicode_FSConverter, &path))
        return NULL;
    if (!pv_enter(&frame, m))
        return Py_DECREF(path), NULL;
    int status = vm_load_elf(m->m, PyBytes_AsString(path), &entry);
    bool ok = pv_leave(&frame);
    Py_DECREF(path);
    if (!ok)
        return NULL;
    return status ? pv_raise(m->st, status) : PyLong_FromUnsignedLongLong(entry);
}

static PyObject *machine_load_raw(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    PyObject *path = NULL;
    uint64_t gpa;
    pv_frame frame;
    if (!PyArg_ParseTuple(args, "O&O&:load_raw", PyUnicode_FSConverter, &path, pv_u64, &gpa))
        return Py_XDECREF(path), NULL;
    if (!pv_enter(&frame, m))
        return Py_DECREF(path), NULL;
    int status = vm_load_raw(m->m, PyBytes_AsString(path), gpa);
    bool ok = pv_leave(&frame);
    Py_DECREF(path);
    return ok ? pv_none_or(m->st, status) : NULL;
}

PyMethodDef pv_boot_methods[] = {
    { "boot_image", PV_KW(machine_boot_image), METH_VARARGS | METH_KEYWORDS,
      "boot_image(kernel=None, initrd=None, cmdline=None, bios=None, linux_entry=0)\nPrepares a PC to start an image." },
    { "boot_linux", PV_KW(machine_boot_linux), METH_VARARGS | METH_KEYWORDS, "boot_linux(kernel, initrd=None, cmdline=None)" },
    { "load_elf", machine_load_elf, METH_VARARGS, "load_elf(path) -> int\nCopies an ELF file into RAM; its entry point." },
    { "load_raw", machine_load_raw, METH_VARARGS, "load_raw(path, gpa)\nCopies a file into RAM." },
    { "serial_output", machine_serial_output, METH_VARARGS, "serial_output(index, fn)\nOutput goes to fn(bytes); None: nowhere." },
    { "serial_input", machine_serial_input, METH_VARARGS, "serial_input(index, data) -> int\nHow many bytes were taken." },
    { "debugcon_output", machine_debugcon_output, METH_VARARGS, "debugcon_output(fn)\nThe same for port 0xE9." },
    { "serial", machine_console, METH_VARARGS, "serial(index=0) -> Console\nA serial port as a file; keeps its output from now on." },
    { "debug_console", machine_debug_console, METH_NOARGS, "debug_console() -> Console\nPort 0xE9 as a file." },
    { NULL, NULL, 0, NULL }
};
