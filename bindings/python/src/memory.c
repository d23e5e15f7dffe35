/* memory.c - the memory map: Machine.map_*, reading and writing, libvm.Region, devices written in Python.
 *
 * A region's memory can be given out as a buffer; while it is, nothing that could take the memory away is done (BufferError).
 * When a writable buffer comes back the code caches over the region are dropped. */
#include "pv.h"

/* ---- devices ---- */

static PyObject *call_device(PyObject *fn, vm_vcpu *cpu, pv_machine *m, PyObject *a, PyObject *b, PyObject *c)
{
    PyObject *vcpu = cpu ? pv_vcpu_of(m, cpu) : Py_NewRef(Py_None), *result = NULL;
    if (vcpu && a && b)
        result = PyObject_CallFunctionObjArgs(fn, vcpu, a, b, c, NULL);
    Py_XDECREF(vcpu);
    Py_XDECREF(a);
    Py_XDECREF(b);
    Py_XDECREF(c);
    return result;
}

/* A device that raises does not answer: the access is an exit, at which run() raises. */
static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    pv_device *d = user;
    pv_gate g;
    int answer = -1;
    pv_callback_begin(&g);
    if (d->read && d->object) {
        PyObject *fn = Py_NewRef(d->read);
        PyObject *o = call_device(fn, cpu, d->machine, PyLong_FromUnsignedLongLong(offset), PyLong_FromUnsignedLong(width), NULL);
        if (o && o != Py_None && pv_u64(o, value))
            answer = 0;
        if (PyErr_Occurred())
            pv_callback_failed(d->machine, NULL);
        Py_XDECREF(o);
        Py_DECREF(fn);
    }
    pv_callback_end(&g);
    return answer;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    pv_device *d = user;
    pv_gate g;
    int answer = -1;
    pv_callback_begin(&g);
    if (d->write && d->object) {
        PyObject *fn = Py_NewRef(d->write);
        PyObject *o = call_device(fn, cpu, d->machine, PyLong_FromUnsignedLongLong(offset), PyLong_FromUnsignedLong(width),
                                  PyLong_FromUnsignedLongLong(value));
        if (o)
            answer = 0;
        else
            pv_callback_failed(d->machine, NULL);
        Py_XDECREF(o);
        Py_DECREF(fn);
    }
    pv_callback_end(&g);
    return answer;
}

static bool plain_call(pv_device *d, PyObject *fn, PyObject *argument)
{
    PyObject *held = Py_XNewRef(fn);
    PyObject *o = held ? PyObject_CallFunctionObjArgs(held, argument, NULL) : Py_NewRef(Py_None);
    bool ok = o != NULL;
    if (!ok)
        pv_callback_failed(d->machine, NULL);
    Py_XDECREF(o);
    Py_XDECREF(held);
    return ok;
}

static void device_reset(void *user)
{
    pv_device *d = user;
    pv_gate g;
    pv_callback_begin(&g);
    plain_call(d, d->reset, NULL);
    pv_callback_end(&g);
}

/* Asked for the size first, then for the bytes: those of one call of the device's save(). */
static int device_save(void *user, void *buffer, size_t *bytes)
{
    pv_device *d = user;
    pv_gate g;
    char *data;
    Py_ssize_t length;
    int status = VM_E_INTERNAL;
    pv_callback_begin(&g);
    if (!buffer || !d->saved) {
        Py_CLEAR(d->saved);
        PyObject *o = PyObject_CallFunctionObjArgs(d->save, NULL);
        d->saved = o ? PyBytes_FromObject(o) : NULL;
        Py_XDECREF(o);
    }
    if (d->saved && PyBytes_AsStringAndSize(d->saved, &data, &length) == 0) {
        status = VM_OK;
        if (buffer && (size_t)length <= *bytes)
            memcpy(buffer, data, (size_t)length);
        else if (buffer)
            status = VM_E_INVALID;
        *bytes = (size_t)length;
        if (buffer)
            Py_CLEAR(d->saved);
    } else {
        pv_callback_failed(d->machine, NULL);
    }
    pv_callback_end(&g);
    return status;
}

static int device_restore(void *user, const void *buffer, size_t bytes)
{
    pv_device *d = user;
    pv_gate g;
    pv_callback_begin(&g);
    PyObject *state = PyBytes_FromStringAndSize(buffer, (Py_ssize_t)bytes);
    bool ok = state && plain_call(d, d->restore, state);
    if (!state)
        pv_callback_failed(d->machine, NULL);
    Py_XDECREF(state);
    pv_callback_end(&g);
    return ok ? VM_OK : VM_E_INTERNAL;
}

void pv_device_free(pv_device *d)
{
    *d->link = d->next;
    if (d->next)
        d->next->link = d->link;
    if (d->region)
        d->region->device = NULL, d->region->r = NULL;
    Py_XDECREF(d->object);
    Py_XDECREF(d->read);
    Py_XDECREF(d->write);
    Py_XDECREF(d->reset);
    Py_XDECREF(d->save);
    Py_XDECREF(d->restore);
    Py_XDECREF(d->destroy);
    Py_XDECREF(d->clone);
    Py_XDECREF(d->saved);
    free(d);
}

static void device_destroy(void *user)
{
    pv_device *d = user;
    pv_gate g;
    pv_callback_begin(&g);
    plain_call(d, d->destroy, NULL);
    pv_device_free(d);
    pv_callback_end(&g);
}

static bool optional_method(PyObject *object, const char *name, PyObject **out)
{
    *out = PyObject_GetAttrString(object, name);
    if (!*out && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    else if (*out && (*out == Py_None || !PyCallable_Check(*out)))
        Py_CLEAR(*out);
    return !PyErr_Occurred();
}

/* A device is an object with read(cpu, offset, width) and write(cpu, offset, width, value); either may be missing. */
static pv_device *device_new(pv_machine *m, PyObject *object)
{
    pv_device *d = calloc(1, sizeof *d);
    if (!d) {
        PyErr_NoMemory();
        return NULL;
    }
    d->machine = m;
    d->object = Py_NewRef(object);
    d->link = &m->devices;
    d->next = m->devices;
    if (d->next)
        d->next->link = &d->next;
    m->devices = d;
    if (optional_method(object, "read", &d->read) && optional_method(object, "write", &d->write) &&
        optional_method(object, "reset", &d->reset) && optional_method(object, "save", &d->save) &&
        optional_method(object, "restore", &d->restore) && optional_method(object, "destroy", &d->destroy) &&
        optional_method(object, "clone", &d->clone))
        return d;
    pv_device_free(d);
    return NULL;
}

/* fork(): the device's clone(machine) gives the copy's device. */
static int device_clone(void *user, vm_machine *copy, void **out)
{
    pv_device *d = user, *made = NULL;
    pv_gate g;
    pv_frame *f = pv_top;
    pv_callback_begin(&g);
    while (f && !f->copy)
        f = f->outer;
    if (f && d->clone) {
        PyObject *object = PyObject_CallFunctionObjArgs(d->clone, NULL);
        made = object ? device_new(f->copy, object) : NULL;
        Py_XDECREF(object);
        if (!made)
            pv_callback_failed(d->machine, NULL);
    }
    pv_callback_end(&g);
    *out = made;
    return made ? VM_OK : VM_E_INTERNAL;
}

static vm_io_ops ops_of(const pv_device *d)
{
    return (vm_io_ops){ .size = sizeof(vm_io_ops), .read = d->read ? device_read : NULL, .write = d->write ? device_write : NULL,
                        .reset = d->reset ? device_reset : NULL, .save = d->save ? device_save : NULL,
                        .restore = d->restore ? device_restore : NULL, .destroy = device_destroy,
                        .clone = d->clone ? device_clone : NULL };
}

/* ---- regions ---- */

static pv_region *region_new(pv_machine *m)
{
    pv_region *r = pv_new(m->st->types[PV_T_REGION]);
    if (!r)
        return NULL;
    r->machine = (pv_machine *)Py_NewRef((PyObject *)m);
    r->link = &m->regions;
    r->next = m->regions;
    if (r->next)
        r->next->link = &r->next;
    m->regions = r;
    return r;
}

static void region_dealloc(PyObject *self)
{
    pv_region *r = (pv_region *)self;
    if (r->link) {
        *r->link = r->next;
        if (r->next)
            r->next->link = r->link;
    }
    if (r->device)
        r->device->region = NULL;
    /* Still mapped: the machine keeps what it maps. */
    if (r->has_host && r->r && r->machine->kept) {
        PyObject *view = PyMemoryView_FromObject(r->host.obj);
        if (!view || PyList_Append(r->machine->kept, view) < 0)
            PyErr_Clear();
        Py_XDECREF(view);
    }
    if (r->has_host)
        PyBuffer_Release(&r->host);
    Py_CLEAR(r->machine);
    pv_free(r);
}

static bool is_mapped(pv_region *r)
{
    if (!pv_open(r->machine))
        return false;
    if (r->r)
        return true;
    pv_raise_text(r->machine->st, PV_CLOSED, VM_E_INVALID, "the region is unmapped");
    return false;
}

/* Called with the result of a vm_map_*(): takes the region over or drops it and raises. */
static PyObject *region_done(pv_region *r, vm_region *made, int status, bool ok)
{
    pv_machine *m = r->machine;
    if (status != VM_OK) {
        if (r->device)
            pv_device_free(r->device);
        Py_DECREF(r);
        return ok ? pv_raise_map(m->st, status) : NULL;
    }
    r->r = made;
    r->gpa = vm_region_gpa(made);
    r->bytes = vm_region_bytes(made);
    r->data = vm_region_data(made);
    r->sequence = ++m->sequence;
    return ok ? (PyObject *)r : (Py_DECREF(r), NULL);       /* mapped all the same: a callback has raised */
}

static PyObject *map_ram(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "gpa", "size", "prot", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes;
    vm_prot prot = VM_PROT_RWX;
    vm_region *made = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&|O&:map_ram", names, pv_u64, &gpa, pv_bytes, &bytes, pv_prot, &prot))
        return NULL;
    pv_region *r = region_new(m);
    pv_frame frame;
    if (!r || !pv_enter(&frame, m))
        return Py_XDECREF(r), NULL;
    int status = vm_map_ram(m->m, gpa, bytes, prot, &made);
    return region_done(r, made, status, pv_leave(&frame));
}

static PyObject *map_host(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "gpa", "buffer", "prot", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa;
    vm_prot prot = VM_PROT_RWX;
    vm_region *made = NULL;
    PyObject *buffer;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O|O&:map_host", names, pv_u64, &gpa, &buffer, pv_prot, &prot))
        return NULL;
    pv_region *r = region_new(m);
    if (!r)
        return NULL;
    if (PyObject_GetBuffer(buffer, &r->host, prot & VM_PROT_W ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
        return Py_DECREF(r), NULL;
    r->has_host = true;
    pv_frame frame;
    if (!pv_enter(&frame, m))
        return Py_DECREF(r), NULL;
    int status = vm_map_host(m->m, gpa, (uint64_t)r->host.len, prot, r->host.buf, &made);
    return region_done(r, made, status, pv_leave(&frame));
}

static PyObject *map_file(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "gpa", "size", "prot", "file", "offset", "private", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes, offset = 0;
    vm_prot prot;
    vm_region *made = NULL;
    PyObject *file;
    int private_copy = 1, fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O|O&p:map_file", names, pv_u64, &gpa, pv_bytes, &bytes, pv_prot, &prot,
                                     &file, pv_u64, &offset, &private_copy) ||
        (fd = PyObject_AsFileDescriptor(file)) < 0)
        return NULL;
    pv_region *r = region_new(m);
    pv_frame frame;
    if (!r || !pv_enter(&frame, m))
        return Py_XDECREF(r), NULL;
    int status = vm_map_file(m->m, gpa, bytes, prot, fd, offset, private_copy, &made);
    return region_done(r, made, status, pv_leave(&frame));
}

static PyObject *map_mmio(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "gpa", "size", "device", NULL };
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes;
    vm_region *made = NULL;
    PyObject *device;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O:map_mmio", names, pv_u64, &gpa, pv_bytes, &bytes, &device))
        return NULL;
    pv_region *r = region_new(m);
    if (!r || !pv_open(m) || !(r->device = device_new(m, device)))
        return Py_XDECREF(r), NULL;
    r->device->region = r;
    vm_io_ops ops = ops_of(r->device);
    pv_frame frame;
    bool ok = pv_enter(&frame, m);      /* not if the device's attributes have closed the machine */
    int status = !ok ? VM_E_INVALID : vm_map_mmio(m->m, gpa, bytes, &ops, r->device, &made);
    return region_done(r, made, status, ok && pv_leave(&frame));
}

static PyObject *map_pio(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "port", "count", "device", NULL };
    pv_machine *m = (pv_machine *)self;
    uint16_t port;
    uint32_t count;
    vm_region *made = NULL;
    PyObject *device;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O:map_pio", names, pv_u16, &port, pv_u32, &count, &device))
        return NULL;
    pv_region *r = region_new(m);
    if (!r || !pv_open(m) || !(r->device = device_new(m, device)))
        return Py_XDECREF(r), NULL;
    r->device->region = r;
    r->is_port = true;
    vm_io_ops ops = ops_of(r->device);
    pv_frame frame;
    bool ok = pv_enter(&frame, m);
    int status = !ok ? VM_E_INVALID : vm_map_pio(m->m, port, count, &ops, r->device, &made);
    return region_done(r, made, status, ok && pv_leave(&frame));
}

/* The region's host memory is free for the caller again, unless a snapshot may still use it. */
static void release_host(pv_region *r)
{
    if (!r->has_host)
        return;
    if (r->machine->snapshots) {
        PyObject *view = PyMemoryView_FromObject(r->host.obj);
        if (view && PyList_Append(r->machine->kept, view) < 0)
            PyErr_Clear();
        Py_XDECREF(view);
    }
    r->has_host = false;
    PyBuffer_Release(&r->host);
}

static PyObject *region_unmap(PyObject *self, PyObject *unused)
{
    pv_region *r = (pv_region *)self;
    pv_machine *m = r->machine;
    if (!is_mapped(r))
        return NULL;
    if (r->exports) {
        PyErr_SetString(PyExc_BufferError, "views of the region's memory exist");
        return NULL;
    }
    vm_region *gone = r->r;
    r->r = NULL;
    if (r->device)
        r->device->region = NULL, r->device = NULL;
    Py_INCREF(self);
    pv_frame frame;
    bool ok = pv_enter(&frame, m);
    int status = ok ? vm_unmap(m->m, gone) : VM_OK;
    ok = ok && pv_leave(&frame);
    if (status != VM_OK)
        r->r = gone;
    else if (ok)
        release_host(r);
    Py_DECREF(self);
    if (!ok)
        return NULL;
    return status ? pv_raise_map(m->st, status) : Py_NewRef(Py_None);
}

static PyObject *machine_unmap(PyObject *self, PyObject *args)
{
    PyObject *region;
    pv_machine *m = (pv_machine *)self;
    if (!PyArg_ParseTuple(args, "O!:unmap", m->st->types[PV_T_REGION], &region) || !pv_open(m))
        return NULL;
    if (((pv_region *)region)->machine != m)
        return pv_raise_text(m->st, PV_MAP, VM_E_NOTFOUND, "the region is another machine's");
    return region_unmap(region, NULL);
}

/* restore() makes the map what it was: may regions newer than the snapshot go? For snapshots from files nothing is known
 * about handles, so that all of RAM's are. */
bool pv_regions_can_go(pv_machine *m, uint64_t newer_than, bool is_loaded)
{
    for (pv_region *r = m->regions; r; r = r->next)
        if (r->exports && (is_loaded || r->sequence > newer_than)) {
            PyErr_SetString(PyExc_BufferError, "views of the region's memory exist");
            return false;
        }
    return true;
}

void pv_regions_gone(pv_machine *m, uint64_t newer_than, bool is_loaded)
{
    for (pv_region *r = m->regions; r; r = r->next)
        if (r->r && !r->device && (is_loaded || r->sequence > newer_than)) {
            r->r = NULL;
            release_host(r);
        }
}

/* ---- a region's memory ---- */

static int region_get_buffer(PyObject *self, Py_buffer *view, int flags)
{
    pv_region *r = (pv_region *)self;
    view->obj = NULL;
    if (!is_mapped(r))
        return -1;
    if (!r->data) {
        PyErr_SetString(PyExc_BufferError, "a device region has no memory");
        return -1;
    }
    if (PyBuffer_FillInfo(view, self, r->data, (Py_ssize_t)r->bytes, 0, flags) < 0)
        return -1;
    r->exports++;
    r->machine->exports++;
    return 0;
}

static void region_release_buffer(PyObject *self, Py_buffer *view)
{
    pv_region *r = (pv_region *)self;
    PyObject *type, *value, *trace;
    pv_frame frame;
    PyErr_Fetch(&type, &value, &trace);
    r->exports--;
    r->machine->exports--;
    if (r->r && pv_enter(&frame, r->machine)) {
        vm_invalidate(r->machine->m, r->gpa, r->bytes);
        pv_leave(&frame);
    }
    if (PyErr_Occurred())
        PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

static PyObject *region_view(PyObject *self, PyObject *unused) { return PyMemoryView_FromObject(self); }

static Py_ssize_t region_length(PyObject *self) { return (Py_ssize_t)((pv_region *)self)->bytes; }

static PyObject *region_gpa(PyObject *self, void *unused) { return PyLong_FromUnsignedLongLong(((pv_region *)self)->gpa); }
static PyObject *region_size(PyObject *self, void *unused) { return PyLong_FromUnsignedLongLong(((pv_region *)self)->bytes); }
static PyObject *region_machine(PyObject *self, void *unused) { return Py_NewRef((PyObject *)((pv_region *)self)->machine); }
static PyObject *region_mapped(PyObject *self, void *unused)
{
    pv_region *r = (pv_region *)self;
    return PyBool_FromLong(r->r && r->machine->m && r->machine->forks == r->machine->st->forks);
}
static PyObject *region_data(PyObject *self, void *unused)
{
    pv_region *r = (pv_region *)self;
    if (!is_mapped(r))
        return NULL;
    return r->data ? PyLong_FromVoidPtr(r->data) : Py_NewRef(Py_None);
}
static PyObject *region_device(PyObject *self, void *unused)
{
    pv_region *r = (pv_region *)self;
    return Py_NewRef(r->device && r->device->object ? r->device->object : Py_None);
}

static PyObject *region_repr(PyObject *self)
{
    char text[96];
    pv_region *r = (pv_region *)self;
    snprintf(text, sizeof text, "<libvm.Region %#llx + %#llx%s%s>", (unsigned long long)r->gpa, (unsigned long long)r->bytes,
             r->data ? "" : r->is_port ? " ports" : " device", r->r ? "" : " unmapped");
    return PyUnicode_FromString(text);
}

static PyObject *region_coalesce(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "offset", "size", "on", NULL };
    pv_region *r = (pv_region *)self;
    uint64_t offset, bytes;
    int on = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&|p:coalesce", names, pv_u64, &offset, pv_bytes, &bytes, &on) || !is_mapped(r))
        return NULL;
    PV_BEGIN(r->machine);
    int status = vm_coalesce(r->machine->m, r->r, offset, bytes, on);
    PV_END();
    return pv_none_or(r->machine->st, status);
}

static PyGetSetDef region_getters[] = {
    { "gpa", region_gpa, NULL, "Where it lies; its first port.", NULL }, { "size", region_size, NULL, "Its bytes.", NULL },
    { "machine", region_machine, NULL, "Whose it is.", NULL }, { "mapped", region_mapped, NULL, "It has not been unmapped.", NULL },
    { "data", region_data, NULL, "Host address of its memory, None for devices.", NULL },
    { "device", region_device, NULL, "The object behind a device region.", NULL }, { NULL, NULL, NULL, NULL, NULL }
};
static PyMethodDef region_methods[] = {
    { "coalesce", PV_KW(region_coalesce), METH_VARARGS | METH_KEYWORDS,
      "coalesce(offset, size, on=True)\nWrites there may be collected before they reach the device." },
    { "unmap", region_unmap, METH_NOARGS, "unmap()\nTakes the region away. BufferError while views of it exist." },
    { "view", region_view, METH_NOARGS,
      "view() -> memoryview\nIts memory, writable, without a copy. When it is released code caches over the region are dropped." },
    { NULL, NULL, 0, NULL }
};
static PyType_Slot region_slots[] = {
    { Py_tp_doc, "A range of a machine's memory map or port space." }, { Py_tp_dealloc, region_dealloc },
    { Py_tp_methods, region_methods }, { Py_tp_getset, region_getters }, { Py_tp_repr, region_repr },
    { Py_sq_length, region_length }, { Py_bf_getbuffer, region_get_buffer }, { Py_bf_releasebuffer, region_release_buffer },
    { 0, NULL }
};
PyType_Spec pv_region_spec = {
    "libvm._libvm.Region", sizeof(pv_region), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, region_slots
};

/* ---- reading and writing ---- */

static PyObject *read_bytes(pv_machine *m, uint64_t gpa, Py_ssize_t count)
{
    int status;
    PyObject *bytes;
    if (!pv_open(m))
        return NULL;
    if (count < 0) {
        PyErr_Format(PyExc_ValueError, "%zd is a negative number of bytes", count);
        return NULL;
    }
    if (!(bytes = PyBytes_FromStringAndSize(NULL, count)))
        return NULL;
    if (count <= 65536 && pv_is_quiet(m)) {
        status = vm_read(m->m, gpa, PyBytes_AsString(bytes), (size_t)count);
    } else {
        pv_frame frame;
        if (!pv_enter(&frame, m))
            return Py_DECREF(bytes), NULL;
        status = vm_read(m->m, gpa, PyBytes_AsString(bytes), (size_t)count);
        if (!pv_leave(&frame))
            return Py_DECREF(bytes), NULL;
    }
    if (status == VM_OK)
        return bytes;
    Py_DECREF(bytes);
    return pv_raise_at(m->st, status, gpa);
}

static bool write_bytes(pv_machine *m, uint64_t gpa, const Py_buffer *data)
{
    int status;
    if (!pv_open(m))
        return false;
    if (data->len <= 65536 && pv_is_quiet(m)) {
        status = vm_write(m->m, gpa, data->buf, (size_t)data->len);
    } else {
        pv_frame frame;
        if (!pv_enter(&frame, m))
            return false;
        status = vm_write(m->m, gpa, data->buf, (size_t)data->len);
        if (!pv_leave(&frame))
            return false;
    }
    return status == VM_OK || (pv_raise_at(m->st, status, gpa), false);
}

static PyObject *machine_read(PyObject *self, PyObject *args)
{
    uint64_t gpa;
    Py_ssize_t count;
    return PyArg_ParseTuple(args, "O&n:read", pv_u64, &gpa, &count) ? read_bytes((pv_machine *)self, gpa, count) : NULL;
}

static PyObject *machine_read_into(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "O&w*:read_into", pv_u64, &gpa, &data))
        return NULL;
    pv_frame frame;
    if (!pv_enter(&frame, m))
        return PyBuffer_Release(&data), NULL;
    int status = vm_read(m->m, gpa, data.buf, (size_t)data.len);
    bool ok = pv_leave(&frame);
    PyBuffer_Release(&data);
    if (!ok)
        return NULL;
    return status ? pv_raise_at(m->st, status, gpa) : Py_NewRef(Py_None);
}

static PyObject *machine_write(PyObject *self, PyObject *args)
{
    uint64_t gpa;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "O&y*:write", pv_u64, &gpa, &data))
        return NULL;
    bool ok = write_bytes((pv_machine *)self, gpa, &data);
    PyBuffer_Release(&data);
    return ok ? Py_NewRef(Py_None) : NULL;
}

/* m[a:b]: both ends, no step. m[a]: one byte. */
static bool range_of(PyObject *key, uint64_t *gpa, Py_ssize_t *count)
{
    PyObject *start = NULL, *stop = NULL, *step = NULL;
    uint64_t end = 0;
    bool ok = false;
    if (PyIndex_Check(key)) {
        *count = -1;
        return pv_u64(key, gpa);
    }
    if (!PyObject_TypeCheck(key, &PySlice_Type)) {
        PyErr_SetString(PyExc_TypeError, "memory is indexed by an address or a range of addresses");
        return false;
    }
    start = PyObject_GetAttrString(key, "start");
    stop = PyObject_GetAttrString(key, "stop");
    step = PyObject_GetAttrString(key, "step");
    if (!start || !stop || !step)
        goto out;
    if (start == Py_None || stop == Py_None || step != Py_None)
        PyErr_SetString(PyExc_ValueError, "a range of memory has two ends and no step");
    else if (pv_u64(start, gpa) && pv_u64(stop, &end)) {
        *count = end < *gpa ? 0 : end - *gpa > PY_SSIZE_T_MAX ? PY_SSIZE_T_MAX : (Py_ssize_t)(end - *gpa);
        ok = true;
    }
out:
    Py_XDECREF(start);
    Py_XDECREF(stop);
    Py_XDECREF(step);
    return ok;
}

PyObject *pv_memory_get(PyObject *self, PyObject *key)
{
    uint64_t gpa;
    Py_ssize_t count;
    if (!range_of(key, &gpa, &count))
        return NULL;
    if (count >= 0)
        return read_bytes((pv_machine *)self, gpa, count);
    PyObject *bytes = read_bytes((pv_machine *)self, gpa, 1), *byte = NULL;
    if (bytes)
        byte = PyLong_FromLong((uint8_t)PyBytes_AsString(bytes)[0]);
    Py_XDECREF(bytes);
    return byte;
}

int pv_memory_set(PyObject *self, PyObject *key, PyObject *value)
{
    uint64_t gpa;
    Py_ssize_t count;
    Py_buffer data;
    uint8_t byte;
    bool ok;
    if (!value) {
        PyErr_SetString(PyExc_TypeError, "memory cannot be deleted");
        return -1;
    }
    if (!range_of(key, &gpa, &count))
        return -1;
    if (count < 0) {
        if (!pv_u8(value, &byte))
            return -1;
        data = (Py_buffer){ .buf = &byte, .len = 1 };
        return write_bytes((pv_machine *)self, gpa, &data) ? 0 : -1;
    }
    if (PyObject_GetBuffer(value, &data, PyBUF_SIMPLE) < 0)
        return -1;
    ok = data.len == count;
    if (!ok)
        PyErr_Format(PyExc_ValueError, "%zd bytes for a range of %zd", data.len, count);
    ok = ok && write_bytes((pv_machine *)self, gpa, &data);
    PyBuffer_Release(&data);
    return ok ? 0 : -1;
}

static PyObject *machine_protect(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes;
    vm_prot prot;
    if (!PyArg_ParseTuple(args, "O&O&O&:protect", pv_u64, &gpa, pv_bytes, &bytes, pv_prot, &prot))
        return NULL;
    PV_BEGIN(m);
    int status = vm_protect(m->m, gpa, bytes, prot);
    PV_END();
    return status ? pv_raise_map(m->st, status) : Py_NewRef(Py_None);
}

/* Functions of a range of memory. */
static PyObject *on_range(PyObject *self, PyObject *args, const char *format, int (*fn)(vm_machine *, uint64_t, uint64_t))
{
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes;
    if (!PyArg_ParseTuple(args, format, pv_u64, &gpa, pv_bytes, &bytes))
        return NULL;
    PV_BEGIN(m);
    int status = fn(m->m, gpa, bytes);
    PV_END();
    return status ? pv_raise_at(m->st, status, gpa) : Py_NewRef(Py_None);
}

static PyObject *machine_invalidate(PyObject *self, PyObject *args) { return on_range(self, args, "O&O&:invalidate", vm_invalidate); }
static PyObject *machine_discard(PyObject *self, PyObject *args) { return on_range(self, args, "O&O&:discard", vm_discard); }

static PyObject *machine_advise(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes;
    uint32_t advice;
    if (!PyArg_ParseTuple(args, "O&O&O&:advise", pv_u64, &gpa, pv_bytes, &bytes, pv_u32, &advice))
        return NULL;
    PV_BEGIN(m);
    int status = vm_advise(m->m, gpa, bytes, advice);
    PV_END();
    return status ? pv_raise_at(m->st, status, gpa) : Py_NewRef(Py_None);
}

static PyObject *machine_dirty_log(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    int on;
    if (!PyArg_ParseTuple(args, "p:dirty_log", &on))
        return NULL;
    PV_BEGIN(m);
    int status = vm_dirty_log(m->m, on);
    PV_END();
    return pv_none_or(m->st, status);
}

static PyObject *machine_dirty_fetch(PyObject *self, PyObject *args)
{
    pv_machine *m = (pv_machine *)self;
    uint64_t gpa, bytes;
    if (!PyArg_ParseTuple(args, "O&O&:dirty_fetch", pv_u64, &gpa, pv_bytes, &bytes))
        return NULL;
    if (bytes > UINT64_C(1) << 44) {
        PyErr_SetString(PyExc_OverflowError, "the range is larger than 16 TiB");
        return NULL;
    }
    size_t words = (size_t)((bytes / 4096 + 63) / 64);
    uint64_t *bitmap = calloc(words + 1, 8);
    if (!bitmap)
        return PyErr_NoMemory();
    pv_frame frame;
    if (!pv_enter(&frame, m))
        return free(bitmap), NULL;
    int status = vm_dirty_fetch(m->m, gpa, bytes, bitmap);
    bool ok = pv_leave(&frame);
    PyObject *list = ok && status == VM_OK ? PyList_New(0) : NULL;
    for (size_t i = 0; list && i < words * 64; i++) {
        if (!(bitmap[i / 64] >> i % 64 & 1))
            continue;
        PyObject *page = PyLong_FromUnsignedLongLong(gpa + i * 4096);
        if (!page || PyList_Append(list, page) < 0)
            Py_CLEAR(list);
        Py_XDECREF(page);
    }
    free(bitmap);
    if (!ok)
        return NULL;
    return status ? pv_raise(m->st, status) : list;
}

PyMethodDef pv_memory_methods[] = {
    { "map_ram", PV_KW(map_ram), METH_VARARGS | METH_KEYWORDS, "map_ram(gpa, size, prot='rwx') -> Region\nZero-filled RAM." },
    { "map_host", PV_KW(map_host), METH_VARARGS | METH_KEYWORDS,
      "map_host(gpa, buffer, prot='rwx') -> Region\nMemory of the program, page-aligned: an mmap, for example." },
    { "map_file", PV_KW(map_file), METH_VARARGS | METH_KEYWORDS,
      "map_file(gpa, size, prot, file, offset=0, private=True) -> Region\nMemory of a file." },
    { "map_mmio", PV_KW(map_mmio), METH_VARARGS | METH_KEYWORDS,
      "map_mmio(gpa, size, device) -> Region\ndevice.read(cpu, offset, width) gives an int, or None: the access is an exit;\n"
      "device.write(cpu, offset, width, value). Optional: reset(), save() -> bytes, restore(bytes), clone() -> device, destroy()." },
    { "map_pio", PV_KW(map_pio), METH_VARARGS | METH_KEYWORDS, "map_pio(port, count, device) -> Region\nThe same for ports." },
    { "unmap", machine_unmap, METH_VARARGS, "unmap(region)\nTakes a region away." },
    { "protect", machine_protect, METH_VARARGS, "protect(gpa, size, prot)\nChanges permissions of whole pages." },
    { "read", machine_read, METH_VARARGS, "read(gpa, count) -> bytes\nGuest-physical RAM." },
    { "read_into", machine_read_into, METH_VARARGS, "read_into(gpa, buffer)" },
    { "write", machine_write, METH_VARARGS, "write(gpa, data)" },
    { "invalidate", machine_invalidate, METH_VARARGS, "invalidate(gpa, size)\nMemory changed behind the machine's back." },
    { "discard", machine_discard, METH_VARARGS, "discard(gpa, size)\nGives pages back to the host; they read as zero." },
    { "advise", machine_advise, METH_VARARGS, "advise(gpa, size, advice)\nHow the host should back memory: Advice." },
    { "dirty_log", machine_dirty_log, METH_VARARGS, "dirty_log(on)\nNotes which pages are written." },
    { "dirty_fetch", machine_dirty_fetch, METH_VARARGS, "dirty_fetch(gpa, size) -> list[int]\nPages written since the last time." },
    { NULL, NULL, 0, NULL }
};
