/* vcpu.c - libvm.Vcpu and libvm.Exit: registers, guest-virtual memory, running.
 *
 * Registers are attributes of the vCPU by their names in reg.def; their table is made from it. run() is cut into slices so that
 * Python's signal handlers run while the guest does; the caller does not see the slices. */
#include "pv.h"

#include <stddef.h>

/* ---- exits ---- */

PyObject *pv_exit_new(pv_state *st)
{
    pv_exit *x = pv_new(st->types[PV_T_EXIT]);
    if (x) {
        x->st = st;
        x->e.size = sizeof x->e;
    }
    return (PyObject *)x;
}

void pv_exit_set_hook(pv_exit *x, pv_machine *m)
{
    if (x->e.reason == VM_EXIT_HOOK)
        Py_XSETREF(x->hook, pv_hook_handle(m, x->e.hook.hook));
}

static void exit_dealloc(PyObject *self)
{
    Py_CLEAR(((pv_exit *)self)->hook);
    pv_free(self);
}

static PyObject *exit_reason(PyObject *self, void *unused)
{
    pv_exit *x = (pv_exit *)self;
    unsigned r = x->e.reason;
    if (r >= 32)
        return PyLong_FromUnsignedLong(r);
    if (!x->st->reasons[r] && !(x->st->reasons[r] = pv_enum(x->st, "ExitReason", (long)r)))
        return NULL;
    return Py_NewRef(x->st->reasons[r]);
}

/* Which records have which attributes: a field and the reasons it belongs to. */
enum { IO = 1 << VM_EXIT_IO, MMIO = 1 << VM_EXIT_MMIO | 1 << VM_EXIT_UNMAPPED | 1 << VM_EXIT_VIOLATION,
       EXC = 1 << VM_EXIT_EXCEPTION, HYPER = 1 << VM_EXIT_HYPERCALL, GUEST = 1 << VM_EXIT_GUEST_EXIT, BREAK = 1 << VM_EXIT_BREAKPOINT,
       REPLAY = 1 << VM_EXIT_REPLAY };
typedef struct exit_field { const char *name; unsigned reasons, offset, bytes; bool is_bool, can_set; } exit_field;
#define FIELD(name, reasons, member, is_bool, can_set) \
    { #name, reasons, offsetof(vm_exit, member), sizeof ((vm_exit *)0)->member, is_bool, can_set }
static const exit_field exit_fields[] = {
    FIELD(port, IO, io.port, false, false), FIELD(width, IO, io.width, false, false), FIELD(is_write, IO, io.is_write, true, false),
    FIELD(count, IO, io.count, false, false), FIELD(data, IO, io.data, false, true), FIELD(gpa, MMIO, mmio.gpa, false, false),
    FIELD(gva, MMIO, mmio.gva, false, false), FIELD(width, MMIO, mmio.width, false, false),
    FIELD(is_write, MMIO, mmio.is_write, true, false), FIELD(is_fetch, MMIO, mmio.is_fetch, true, false),
    FIELD(data, MMIO, mmio.data, false, true), FIELD(vector, EXC, exception.vector, false, false),
    FIELD(has_error, EXC, exception.has_error, true, false), FIELD(error, EXC, exception.error, false, false),
    FIELD(address, EXC, exception.address, false, false), FIELD(number, HYPER, hypercall.number, false, false),
    FIELD(result, HYPER, hypercall.result, false, true), FIELD(code, GUEST, guest_exit.code, false, false),
    FIELD(is_watchpoint, BREAK, debug.is_watchpoint, true, false), FIELD(bytes, BREAK, debug.bytes, false, false),
    FIELD(address, BREAK, debug.address, false, false), FIELD(value, BREAK, debug.value, false, false),
    FIELD(access, BREAK, debug.access, false, false), FIELD(position, REPLAY, replay.position, false, false),
};

static const exit_field *field_of(pv_exit *x, const char *name)
{
    for (size_t i = 0; i < sizeof exit_fields / sizeof *exit_fields; i++)
        if (strcmp(exit_fields[i].name, name) == 0 && (unsigned)x->e.reason < 32 && exit_fields[i].reasons >> x->e.reason & 1)
            return &exit_fields[i];
    PyErr_Format(PyExc_AttributeError, "a %s exit has no attribute '%s'", vm_exit_name(x->e.reason), name);
    return NULL;
}

static PyObject *exit_get(PyObject *self, void *name)
{
    pv_exit *x = (pv_exit *)self;
    const exit_field *f = field_of(x, name);
    uint64_t v = 0;
    if (!f)
        return NULL;
    memcpy(&v, (char *)&x->e + f->offset, f->bytes);
    if (f->is_bool)
        return PyBool_FromLong(v != 0);
    return PyLong_FromUnsignedLongLong(v);
}

static int exit_set(PyObject *self, PyObject *value, void *name)
{
    pv_exit *x = (pv_exit *)self;
    const exit_field *f = field_of(x, name);
    uint64_t v;
    if (!f)
        return -1;
    if (!value || !f->can_set) {
        PyErr_Format(PyExc_AttributeError, "attribute '%s' of an exit cannot be %s", f->name, value ? "set" : "deleted");
        return -1;
    }
    if (!pv_u64(value, &v))
        return -1;
    memcpy((char *)&x->e + f->offset, &v, f->bytes);
    return 0;
}

static PyObject *exit_rip(PyObject *self, void *unused) { return PyLong_FromUnsignedLongLong(((pv_exit *)self)->e.rip); }

static PyObject *exit_insn(PyObject *self, void *unused)
{
    pv_exit *x = (pv_exit *)self;
    return PyBytes_FromStringAndSize((char *)x->e.insn_bytes, x->e.insn_length ? x->e.insn_length : 16);
}

static PyObject *exit_insn_length(PyObject *self, void *unused) { return PyLong_FromLong(((pv_exit *)self)->e.insn_length); }

static PyObject *exit_hook(PyObject *self, void *unused)
{
    pv_exit *x = (pv_exit *)self;
    return Py_NewRef(x->hook ? x->hook : Py_None);
}

static PyObject *exit_args(PyObject *self, void *unused)
{
    pv_exit *x = (pv_exit *)self;
    PyObject *args;
    if (x->e.reason != VM_EXIT_HYPERCALL) {
        PyErr_Format(PyExc_AttributeError, "a %s exit has no attribute 'args'", vm_exit_name(x->e.reason));
        return NULL;
    }
    args = PyTuple_New(6);
    for (int i = 0; args && i < 6; i++) {
        PyObject *v = PyLong_FromUnsignedLongLong(x->e.hypercall.args[i]);
        if (!v || PyTuple_SetItem(args, i, v) < 0)
            Py_CLEAR(args);
    }
    return args;
}

static PyObject *exit_status(PyObject *self, void *unused)
{
    pv_exit *x = (pv_exit *)self;
    if (x->e.reason == VM_EXIT_REPLAY)
        return pv_enum(x->st, "Status", x->e.replay.status);
    PyErr_Format(PyExc_AttributeError, "a %s exit has no attribute 'status'", vm_exit_name(x->e.reason));
    return NULL;
}

static PyObject *exit_str(PyObject *self)
{
    char text[256] = "";
    vm_exit_format(&((pv_exit *)self)->e, text, sizeof text);
    return PyUnicode_FromString(text);
}

static PyObject *exit_repr(PyObject *self)
{
    char text[256] = "";
    vm_exit_format(&((pv_exit *)self)->e, text, sizeof text);
    return PyUnicode_FromFormat("<libvm.Exit %s>", text);
}

#define EXIT_FIELD(name, doc) { #name, exit_get, exit_set, doc, (void *)#name }
static PyGetSetDef exit_getters[] = {
    { "reason", exit_reason, NULL, "Why the run came back: ExitReason.", NULL },
    { "rip", exit_rip, NULL, "RIP at the exit.", NULL },
    { "insn_bytes", exit_insn, NULL, "Bytes at RIP.", NULL },
    { "insn_length", exit_insn_length, NULL, "How long the instruction is, 0: not known.", NULL },
    { "hook", exit_hook, NULL, "HOOK: the hook that asked to stop.", NULL },
    { "args", exit_args, NULL, "HYPERCALL: RBX, RCX, RDX, RSI, RDI, R8.", NULL },
    EXIT_FIELD(port, "IO"), EXIT_FIELD(width, "IO, MMIO: bytes."), EXIT_FIELD(is_write, "IO, MMIO"),
    EXIT_FIELD(count, "IO"), EXIT_FIELD(data, "IO, MMIO: what was written; set it to what a read gives before the next run."),
    EXIT_FIELD(gpa, "MMIO"), EXIT_FIELD(gva, "MMIO"), EXIT_FIELD(is_fetch, "MMIO"), EXIT_FIELD(vector, "EXCEPTION"),
    EXIT_FIELD(has_error, "EXCEPTION"), EXIT_FIELD(error, "EXCEPTION"), EXIT_FIELD(address, "EXCEPTION, BREAKPOINT"),
    EXIT_FIELD(number, "HYPERCALL"), EXIT_FIELD(result, "HYPERCALL: set it before the next run."), EXIT_FIELD(code, "GUEST_EXIT"),
    EXIT_FIELD(is_watchpoint, "BREAKPOINT"), EXIT_FIELD(bytes, "BREAKPOINT: width of the access."),
    EXIT_FIELD(value, "BREAKPOINT: what was read or written."), EXIT_FIELD(access, "BREAKPOINT: R, W or X."),
    EXIT_FIELD(position, "REPLAY: instructions since the log's begin."),
    { "status", exit_status, NULL, "REPLAY: Status.OK, or what went wrong.", NULL },
    { NULL, NULL, NULL, NULL, NULL }
};
static PyType_Slot exit_slots[] = {
    { Py_tp_doc, "Why a run came back. For `match`: case Exit(reason=ExitReason.IO, port=0x3f8)." }, { Py_tp_dealloc, exit_dealloc },
    { Py_tp_getset, exit_getters }, { Py_tp_str, exit_str }, { Py_tp_repr, exit_repr }, { 0, NULL }
};
PyType_Spec pv_exit_spec = {
    "libvm._libvm.Exit", sizeof(pv_exit), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, exit_slots
};

/* ---- vCPU objects ---- */

PyObject *pv_vcpu_get(pv_machine *m, unsigned index)
{
    pv_vcpu *v = m->vcpus[index];
    if (v)
        return Py_NewRef((PyObject *)v);
    if (!(v = pv_new((PyTypeObject *)m->st->vcpu_class)))
        return NULL;
    v->machine = (pv_machine *)Py_NewRef((PyObject *)m);
    v->cpu = vm_vcpu_get(m->m, index);
    v->index = index;
    m->vcpus[index] = v;
    return (PyObject *)v;
}

PyObject *pv_vcpu_of(pv_machine *m, vm_vcpu *cpu) { return pv_vcpu_get(m, vm_vcpu_index(cpu)); }

static void vcpu_dealloc(PyObject *self)
{
    pv_vcpu *v = (pv_vcpu *)self;
    if (v->machine) {
        v->machine->vcpus[v->index] = NULL;
        Py_CLEAR(v->machine);
    }
    pv_free(v);
}

static PyObject *vcpu_repr(PyObject *self) { return PyUnicode_FromFormat("<libvm.Vcpu %u>", ((pv_vcpu *)self)->index); }

static inline bool is_usable(pv_vcpu *v)
{
    pv_machine *m = v->machine;
    return __builtin_expect(m->m && !m->closing && m->forks == m->st->forks, 1) || pv_open(m);
}

/* ---- one register ---- */

static const struct { uint8_t bytes; } reg_table[VM_REG_COUNT] = {
    { 0 },
#define VM_REG(name, text, bytes, cls, index) { bytes },
#include <libvm/reg.def>
#undef VM_REG
};

static PyObject *from_bytes(const uint8_t *bytes, size_t count)
{
    return PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s", (const char *)bytes, (Py_ssize_t)count, "little");
}

/* An int that fits, or bytes of the size. */
static bool to_bytes(PyObject *o, uint8_t *out, size_t count)
{
    char *data;
    Py_ssize_t length;
    PyObject *number, *bytes;
    if (PyBytes_Check(o))
        bytes = Py_NewRef(o);
    else if (PyLong_Check(o) || PyIndex_Check(o)) {
        if (!(number = PyNumber_Index(o)))
            return false;
        bytes = PyObject_CallMethod(number, "to_bytes", "ns", (Py_ssize_t)count, "little");
        if (!bytes && PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(PyExc_OverflowError, "%R is not between 0 and 2^%zu - 1", number, 8 * count);
        Py_DECREF(number);
    } else {
        bytes = PyBytes_FromObject(o);
    }
    if (!bytes || PyBytes_AsStringAndSize(bytes, &data, &length) < 0) {
        Py_XDECREF(bytes);
        return false;
    }
    if ((size_t)length == count)
        memcpy(out, data, count);
    else
        PyErr_Format(PyExc_ValueError, "%zd bytes for a register of %zu", length, count);
    Py_DECREF(bytes);
    return (size_t)length == count;
}

static PyObject *read_reg(pv_vcpu *v, int id)
{
    uint8_t wide[32];
    uint64_t value = 0;
    size_t bytes = id > 0 && id < VM_REG_COUNT ? reg_table[id].bytes : 0;
    int status;
    if (!is_usable(v))
        return NULL;
    if (bytes <= 8) {
        status = vm_vcpu_read_reg(v->cpu, id, &value, bytes);
        if (__builtin_expect(status == VM_OK, 1))
            return PyLong_FromUnsignedLongLong(value);
    } else {
        status = vm_vcpu_read_reg(v->cpu, id, wide, bytes);
        if (status == VM_OK)
            return from_bytes(wide, bytes);
    }
    return pv_raise(v->machine->st, status);
}

static int write_reg(pv_vcpu *v, int id, PyObject *o)
{
    uint8_t wide[32] = { 0 };
    size_t bytes = id > 0 && id < VM_REG_COUNT ? reg_table[id].bytes : 0;
    int status;
    if (!o) {
        PyErr_SetString(PyExc_AttributeError, "registers cannot be deleted");
        return -1;
    }
    if (bytes == 8) {
        uint64_t value;
        if (!PyLong_Check(o) && PyBytes_Check(o) ? !to_bytes(o, (uint8_t *)&value, 8) : !pv_u64(o, &value))
            return -1;
        memcpy(wide, &value, 8);
    } else if (bytes && !to_bytes(o, wide, bytes)) {
        return -1;
    }
    if (!is_usable(v))                  /* after the conversions: they may run code of the caller's */
        return -1;
    if (id <= VM_REG_RFLAGS || pv_is_quiet(v->machine)) {
        status = vm_vcpu_write_reg(v->cpu, id, wide, bytes);
    } else {
        pv_frame frame;
        if (!pv_enter(&frame, v->machine))
            return -1;
        status = vm_vcpu_write_reg(v->cpu, id, wide, bytes);
        if (!pv_leave(&frame))
            return -1;
    }
    if (status == VM_OK)
        return 0;
    pv_raise(v->machine->st, status);
    return -1;
}

static PyObject *reg_get(PyObject *self, void *id) { return read_reg((pv_vcpu *)self, (int)(intptr_t)id); }
static int reg_set(PyObject *self, PyObject *o, void *id) { return write_reg((pv_vcpu *)self, (int)(intptr_t)id, o); }

/* A register by number, name or Reg. */
static int reg_id(PyObject *o, void *out)
{
    int id;
    if (PyUnicode_Check(o)) {
        const char *name = PyUnicode_AsUTF8AndSize(o, NULL);
        if (!name)
            return 0;
        if (!(id = vm_reg_find(name))) {
            PyErr_SetObject(PyExc_KeyError, o);
            return 0;
        }
    } else {
        PyObject *number = PyNumber_Index(o);
        if (!number)
            return 0;
        long n = PyLong_AsLong(number);
        Py_DECREF(number);
        if (n == -1 && PyErr_Occurred())
            return 0;
        id = n < 0 || n >= VM_REG_COUNT ? -1 : (int)n;
    }
    *(int *)out = id;
    return 1;
}

static PyObject *vcpu_read_reg(PyObject *self, PyObject *args)
{
    int id;
    return PyArg_ParseTuple(args, "O&:read_reg", reg_id, &id) ? read_reg((pv_vcpu *)self, id) : NULL;
}

static PyObject *vcpu_write_reg(PyObject *self, PyObject *args)
{
    int id;
    PyObject *o;
    if (!PyArg_ParseTuple(args, "O&O:write_reg", reg_id, &id, &o) || write_reg((pv_vcpu *)self, id, o) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- register files: cpu.xmm[3] ---- */

typedef struct pv_regfile { PyObject_HEAD pv_vcpu *vcpu; int first, count; } pv_regfile;

static PyObject *regfile_get(PyObject *self, void *which)
{
    pv_vcpu *v = (pv_vcpu *)self;
    pv_regfile *f = is_usable(v) ? pv_new(v->machine->st->types[PV_T_REGFILE]) : NULL;
    if (!f)
        return NULL;
    f->vcpu = (pv_vcpu *)Py_NewRef(self);
    f->first = (int)(intptr_t)which;
    f->count = f->first == VM_REG_ST0 || f->first == VM_REG_MM0 ? 8 : 16;
    return (PyObject *)f;
}

static void regfile_dealloc(PyObject *self)
{
    Py_CLEAR(((pv_regfile *)self)->vcpu);
    pv_free(self);
}

static Py_ssize_t regfile_length(PyObject *self) { return ((pv_regfile *)self)->count; }

static bool regfile_index(pv_regfile *f, Py_ssize_t i)
{
    if (i >= 0 && i < f->count)
        return true;
    PyErr_Format(PyExc_IndexError, "registers are 0 to %d, not %zd", f->count - 1, i);
    return false;
}

static PyObject *regfile_item(PyObject *self, Py_ssize_t i)
{
    pv_regfile *f = (pv_regfile *)self;
    return regfile_index(f, i) ? read_reg(f->vcpu, f->first + (int)i) : NULL;
}

static int regfile_set_item(PyObject *self, Py_ssize_t i, PyObject *o)
{
    pv_regfile *f = (pv_regfile *)self;
    return regfile_index(f, i) ? write_reg(f->vcpu, f->first + (int)i, o) : -1;
}

static PyType_Slot regfile_slots[] = {
    { Py_tp_doc, "A vCPU's registers of one kind by index; values are ints, bytes are taken too." }, { Py_tp_dealloc, regfile_dealloc },
    { Py_sq_length, regfile_length }, { Py_sq_item, regfile_item }, { Py_sq_ass_item, regfile_set_item }, { 0, NULL }
};
PyType_Spec pv_regfile_spec = {
    "libvm._libvm.RegisterFile", sizeof(pv_regfile), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, regfile_slots
};

/* ---- registers in bulk: structs as dicts, by tables ---- */

typedef enum kind { U8 = 1, U16 = 2, U32 = 4, U64 = 8, SEGMENT, DTABLE, ST_ROWS, YMM_ROWS } kind;
typedef struct field { const char *name; unsigned offset; kind kind; } field;
#define F(type, name, k) { #name, offsetof(type, name), k }
static const field regs_fields[] = {
    F(vm_regs, rax, U64), F(vm_regs, rcx, U64), F(vm_regs, rdx, U64), F(vm_regs, rbx, U64), F(vm_regs, rsp, U64), F(vm_regs, rbp, U64),
    F(vm_regs, rsi, U64), F(vm_regs, rdi, U64), F(vm_regs, r8, U64), F(vm_regs, r9, U64), F(vm_regs, r10, U64), F(vm_regs, r11, U64),
    F(vm_regs, r12, U64), F(vm_regs, r13, U64), F(vm_regs, r14, U64), F(vm_regs, r15, U64), F(vm_regs, rip, U64),
    F(vm_regs, rflags, U64), { NULL, 0, 0 }
};
static const field segment_fields[] = {
    F(vm_segment, base, U64), F(vm_segment, limit, U32), F(vm_segment, selector, U16), F(vm_segment, attributes, U16), { NULL, 0, 0 }
};
static const field dtable_fields[] = { F(vm_dtable, base, U64), F(vm_dtable, limit, U16), { NULL, 0, 0 } };
static const field sregs_fields[] = {
    F(vm_sregs, cpl, U32), F(vm_sregs, es, SEGMENT), F(vm_sregs, cs, SEGMENT), F(vm_sregs, ss, SEGMENT), F(vm_sregs, ds, SEGMENT),
    F(vm_sregs, fs, SEGMENT), F(vm_sregs, gs, SEGMENT), F(vm_sregs, ldtr, SEGMENT), F(vm_sregs, tr, SEGMENT),
    F(vm_sregs, gdtr, DTABLE), F(vm_sregs, idtr, DTABLE), F(vm_sregs, cr0, U64), F(vm_sregs, cr2, U64), F(vm_sregs, cr3, U64),
    F(vm_sregs, cr4, U64), F(vm_sregs, cr8, U64), F(vm_sregs, efer, U64), F(vm_sregs, xcr0, U64), F(vm_sregs, dr0, U64),
    F(vm_sregs, dr1, U64), F(vm_sregs, dr2, U64), F(vm_sregs, dr3, U64), F(vm_sregs, dr6, U64), F(vm_sregs, dr7, U64),
    F(vm_sregs, apic_base, U64), { NULL, 0, 0 }
};
static const field fpu_fields[] = {
    F(vm_fpu, mxcsr, U32), F(vm_fpu, fcw, U16), F(vm_fpu, fsw, U16), F(vm_fpu, ftw, U16), F(vm_fpu, fop, U16), F(vm_fpu, fip, U64),
    F(vm_fpu, fdp, U64), F(vm_fpu, st, ST_ROWS), F(vm_fpu, ymm, YMM_ROWS), { NULL, 0, 0 }
};

static const field *fields_within(kind k) { return k == SEGMENT ? segment_fields : dtable_fields; }
static size_t row_bytes(kind k) { return k == ST_ROWS ? 16 : 32; }
static Py_ssize_t rows(kind k) { return k == ST_ROWS ? 8 : 16; }
static size_t used_bytes(kind k) { return k == ST_ROWS ? 10 : 32; }

static PyObject *to_dict(const void *base, const field *fields);

static PyObject *to_value(const char *at, kind k)
{
    uint64_t v = 0;
    PyObject *list;
    switch (k) {
    case SEGMENT: case DTABLE: return to_dict(at, fields_within(k));
    case ST_ROWS: case YMM_ROWS:
        list = PyList_New(rows(k));
        for (Py_ssize_t i = 0; list && i < rows(k); i++) {
            PyObject *o = from_bytes((const uint8_t *)at + (size_t)i * row_bytes(k), used_bytes(k));
            if (!o || PyList_SetItem(list, i, o) < 0)
                Py_CLEAR(list);
        }
        return list;
    default: memcpy(&v, at, k); return PyLong_FromUnsignedLongLong(v);
    }
}

static PyObject *to_dict(const void *base, const field *fields)
{
    PyObject *dict = PyDict_New();
    for (const field *f = fields; dict && f->name; f++) {
        PyObject *o = to_value((const char *)base + f->offset, f->kind);
        if (!o || PyDict_SetItemString(dict, f->name, o) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(o);
    }
    return dict;
}

static bool from_dict(PyObject *dict, void *base, const field *fields);

static bool from_value(PyObject *o, char *at, kind k)
{
    uint64_t v;
    if (k == SEGMENT || k == DTABLE)
        return from_dict(o, at, fields_within(k));
    if (k == ST_ROWS || k == YMM_ROWS) {
        bool ok = true;
        if (PySequence_Size(o) != rows(k)) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "%zd registers are needed", rows(k));
            return false;
        }
        for (Py_ssize_t i = 0; ok && i < rows(k); i++) {
            PyObject *item = PySequence_GetItem(o, i);
            ok = item && to_bytes(item, (uint8_t *)at + (size_t)i * row_bytes(k), used_bytes(k));
            Py_XDECREF(item);
        }
        return ok;
    }
    if (!pv_u64(o, &v))
        return false;
    if (k < U64 && v >> 8 * k) {
        PyErr_Format(PyExc_OverflowError, "%R does not fit into %d bytes", o, (int)k);
        return false;
    }
    memcpy(at, &v, k);
    return true;
}

/* Sets the fields that the mapping has. */
static bool from_dict(PyObject *mapping, void *base, const field *fields)
{
    PyObject *items = PyMapping_Items(mapping);
    bool ok = items != NULL;
    for (Py_ssize_t i = 0; ok && i < PyList_Size(items); i++) {
        PyObject *pair = PyList_GetItem(items, i), *key = PyTuple_GetItem(pair, 0);
        const field *f = fields;
        while (f->name && !(PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, f->name) == 0))
            f++;
        if (f->name)
            ok = from_value(PyTuple_GetItem(pair, 1), (char *)base + f->offset, f->kind);
        else
            ok = false, PyErr_SetObject(PyExc_KeyError, key);
    }
    Py_XDECREF(items);
    return ok;
}

/* The mapping given as the argument, or keywords. */
static PyObject *mapping_of(PyObject *args, PyObject *kwargs, const char *name)
{
    PyObject *mapping = NULL, *all = PyDict_New();
    char format[32];
    snprintf(format, sizeof format, "|O:%s", name);
    if (!all || !PyArg_ParseTuple(args, format, &mapping) || (mapping && PyDict_Update(all, mapping) < 0) ||
        (kwargs && PyDict_Update(all, kwargs) < 0))
        Py_CLEAR(all);
    return all;
}

/* By vm_vcpu_get_regs and vm_vcpu_set_regs, vm_vcpu_get_sregs and vm_vcpu_set_sregs, vm_vcpu_get_fpu and vm_vcpu_set_fpu. */
#define BULK(part, type, INIT) \
    static PyObject *vcpu_get_##part(PyObject *self, PyObject *unused) \
    { \
        pv_vcpu *v = (pv_vcpu *)self; \
        type values = INIT; \
        if (!is_usable(v)) \
            return NULL; \
        int status = vm_vcpu_get_##part(v->cpu, &values); \
        return status ? pv_raise(v->machine->st, status) : to_dict(&values, part##_fields); \
    } \
    static PyObject *vcpu_set_##part(PyObject *self, PyObject *args, PyObject *kwargs) \
    { \
        pv_vcpu *v = (pv_vcpu *)self; \
        type values = INIT; \
        PyObject *mapping = mapping_of(args, kwargs, "set_" #part); \
        if (!mapping || !is_usable(v)) \
            return Py_XDECREF(mapping), NULL; \
        int status = vm_vcpu_get_##part(v->cpu, &values); \
        bool ok = status == VM_OK && from_dict(mapping, &values, part##_fields); \
        Py_DECREF(mapping); \
        if (status != VM_OK) \
            return pv_raise(v->machine->st, status); \
        if (!ok) \
            return NULL; \
        PV_BEGIN(v->machine); \
        status = vm_vcpu_set_##part(v->cpu, &values); \
        PV_END(); \
        return pv_none_or(v->machine->st, status); \
    }
BULK(regs, vm_regs, VM_REGS_INIT)
BULK(sregs, vm_sregs, VM_SREGS_INIT)
BULK(fpu, vm_fpu, VM_FPU_INIT)

static PyObject *vcpu_get_msr(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint32_t msr;
    uint64_t value = 0;
    if (!PyArg_ParseTuple(args, "O&:get_msr", pv_u32, &msr) || !is_usable(v))
        return NULL;
    int status = vm_vcpu_get_msr(v->cpu, msr, &value);
    return status ? pv_raise(v->machine->st, status) : PyLong_FromUnsignedLongLong(value);
}

static PyObject *vcpu_set_msr(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint32_t msr;
    uint64_t value;
    if (!PyArg_ParseTuple(args, "O&O&:set_msr", pv_u32, &msr, pv_u64, &value))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_vcpu_set_msr(v->cpu, msr, value);
    PV_END();
    return pv_none_or(v->machine->st, status);
}

static const pv_name mode_names[] = {
    { "reset", VM_MODE_RESET }, { "real", VM_MODE_REAL }, { "flat32", VM_MODE_FLAT32 }, { "flat64", VM_MODE_FLAT64 }, { NULL, 0 }
};

static PyObject *vcpu_set_mode(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    PyObject *o;
    long mode;
    if (!PyArg_ParseTuple(args, "O:set_mode", &o) || !pv_named(o, mode_names, "mode", &mode))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_vcpu_set_mode(v->cpu, (vm_mode)mode);
    PV_END();
    return pv_none_or(v->machine->st, status);
}

/* ---- guest-virtual memory ---- */

static PyObject *vcpu_translate(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t gva, gpa = 0;
    vm_prot access = VM_PROT_R;
    if (!PyArg_ParseTuple(args, "O&|O&:translate", pv_u64, &gva, pv_prot, &access))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_vcpu_translate(v->cpu, gva, access, &gpa);
    PV_END();
    return status ? pv_raise_at(v->machine->st, status, gva) : PyLong_FromUnsignedLongLong(gpa);
}

static PyObject *vcpu_read(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t gva;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "O&n:read", pv_u64, &gva, &count))
        return NULL;
    if (count < 0) {
        PyErr_Format(PyExc_ValueError, "%zd is a negative number of bytes", count);
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, count);
    if (!bytes)
        return NULL;
    pv_frame frame;
    if (!pv_enter(&frame, v->machine))
        return Py_DECREF(bytes), NULL;
    int status = vm_vcpu_read(v->cpu, gva, PyBytes_AsString(bytes), (size_t)count);
    if (!pv_leave(&frame))
        return Py_DECREF(bytes), NULL;
    if (status == VM_OK)
        return bytes;
    Py_DECREF(bytes);
    return pv_raise_at(v->machine->st, status, gva);
}

static PyObject *vcpu_write(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint64_t gva;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "O&y*:write", pv_u64, &gva, &data))
        return NULL;
    pv_frame frame;
    if (!pv_enter(&frame, v->machine))
        return PyBuffer_Release(&data), NULL;
    int status = vm_vcpu_write(v->cpu, gva, data.buf, (size_t)data.len);
    bool ok = pv_leave(&frame);
    PyBuffer_Release(&data);
    if (!ok)
        return NULL;
    return status ? pv_raise_at(v->machine->st, status, gva) : Py_NewRef(Py_None);
}

/* ---- running ---- */

/* A bitmap, or vectors. */
static bool to_vectors(PyObject *o, uint64_t *out)
{
    *out = 0;
    if (PyIndex_Check(o))
        return pv_u64(o, out);
    PyObject *iterator = PyObject_GetIter(o), *item;
    if (!iterator)
        return false;
    while ((item = PyIter_Next(iterator))) {
        uint64_t vector;
        bool ok = pv_u64(item, &vector);
        Py_DECREF(item);
        if (ok && vector >= 32) {
            PyErr_Format(PyExc_ValueError, "exceptions are vectors 0 to 31, not %llu", (unsigned long long)vector);
            ok = false;
        }
        if (!ok)
            break;
        *out |= UINT64_C(1) << vector;
    }
    Py_DECREF(iterator);
    return !PyErr_Occurred();
}

static bool run_option(int which, PyObject *o, vm_run_options *r)
{
    if (o == Py_None)
        return true;
    switch (which) {
    case 0: return pv_u64(o, &r->max_instructions);
    case 1: return pv_seconds(o, &r->deadline_ns);
    case 2: r->has_until = true; return pv_u64(o, &r->until);
    case 3: return to_vectors(o, &r->exception_exits);
    default: {
        bool *const flags[] = { &r->single_step, &r->has_signal_blocked, &r->is_brief };
        int truth = PyObject_IsTrue(o);
        *flags[which - 4] = truth > 0;
        return truth >= 0;
    }
    }
}

static bool run_options(pv_state *st, PyObject *const *args, Py_ssize_t n, PyObject *names, vm_run_options *r)
{
    Py_ssize_t keywords = names ? PyTuple_Size(names) : 0;
    if (n) {
        PyErr_SetString(PyExc_TypeError, "run() takes keywords only");
        return false;
    }
    for (Py_ssize_t i = 0; i < keywords; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        int which = 0;
        while (which < PV_RUN_OPTIONS && name != st->kw[which])
            which++;
        for (int again = 0; which == PV_RUN_OPTIONS && again < PV_RUN_OPTIONS; again++)
            if (PyUnicode_Compare(name, st->kw[again]) == 0)
                which = again;
        if (which == PV_RUN_OPTIONS) {
            PyErr_Format(PyExc_TypeError, "run() has no option %R", name);
            return false;
        }
        if (!run_option(which, args[n + i], r))
            return false;
    }
    return true;
}

/* The end of a slice is not for the caller, unless RIP is where the next run would not stop because it begins there. */
static bool is_breakpoint(pv_vcpu *v, vm_exit *e)
{
    uint64_t base = 0;
    PyObject *address;
    int found;
    if (PySet_Size(v->machine->breakpoints) == 0 || vm_vcpu_read_reg(v->cpu, VM_REG_CS_BASE, &base, 8) != VM_OK)
        return false;
    address = PyLong_FromUnsignedLongLong(base + e->rip);
    found = address ? PySet_Contains(v->machine->breakpoints, address) : -1;
    Py_XDECREF(address);
    if (found <= 0)
        return PyErr_Clear(), false;
    e->reason = VM_EXIT_BREAKPOINT;
    e->debug = (vm_exit_debug){ .access = VM_PROT_X, .address = base + e->rip };
    return true;
}

/* One slice after the other until something is for the caller. False: raised. */
static bool run_slices(pv_vcpu *v, const vm_run_options *wanted, vm_exit *e)
{
    pv_machine *m = v->machine;
    const uint64_t slice = PV_SLICE_MS * UINT64_C(1000000);
    uint64_t end = wanted->deadline_ns ? pv_now() + wanted->deadline_ns : UINT64_MAX, retired = vm_vcpu_retired(v->cpu);
    uint64_t start = retired;
    bool cuts = !wanted->max_instructions || vm_machine_backend(m->m) != VM_BACKEND_KVM;
    vm_run_options r = *wanted;
    bool *stale = &m->of_vcpu[v->index].has_stale_kick;
    if (cuts && (!r.deadline_ns || r.deadline_ns > slice))
        r.deadline_ns = slice;
    for (;;) {
        pv_frame frame;
        bool is_stale = *stale;
        if (!pv_enter(&frame, m))
            return false;
        frame.vcpu = v;
        *stale = false;
        int status = vm_vcpu_run(v->cpu, &r, e);
        if (status == VM_OK && e->reason == VM_EXIT_KICK)
            *stale = false;  /* that one */
        if (!pv_leave(&frame))
            return false;
        if (status != VM_OK)
            return pv_raise(m->st, status), false;
        if (m->closing)
            return pv_open(m);
        uint64_t now_retired = vm_vcpu_retired(v->cpu);
        if (e->reason == VM_EXIT_KICK && is_stale && now_retired == retired)
            continue;                   /* meant for an earlier run */
        if (e->reason != VM_EXIT_DEADLINE || !cuts)
            return true;
        uint64_t now = pv_now();
        if (now >= end || is_breakpoint(v, e))
            return true;
        if (PyErr_CheckSignals() < 0)
            return false;
        if (r.has_until && e->rip == r.until && now_retired != start)
            return e->reason = VM_EXIT_UNTIL, true;
        if (wanted->max_instructions) {
            if (now_retired - start >= wanted->max_instructions)
                return e->reason = VM_EXIT_BUDGET, true;
            r.max_instructions = wanted->max_instructions - (now_retired - start);
        }
        retired = now_retired;
        r.deadline_ns = end - now < slice ? end - now : slice;
    }
}

static PyObject *vcpu_run(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    pv_vcpu *v = (pv_vcpu *)self;
    pv_state *st = v->machine->st;
    vm_run_options options = VM_RUN_OPTIONS_INIT;
    pv_exit *x = NULL, *last;
    if (!run_options(st, args, n, names, &options) || !is_usable(v))
        return NULL;
    pv_machine *m = v->machine;
    last = m->of_vcpu[v->index].last;
    if (last && Py_REFCNT(last) == 1) { /* nobody looks at it any more */
        x = last;
        m->of_vcpu[v->index].last = NULL;
    } else {
        if (!(x = (pv_exit *)pv_exit_new(st)))
            return NULL;
        if (last)
            x->e = last->e;
    }
    Py_INCREF(self);
    bool ok = run_slices(v, &options, &x->e);
    if (ok)
        pv_exit_set_hook(x, m);
    Py_XSETREF(m->of_vcpu[v->index].last, x->hook ? NULL : (pv_exit *)Py_NewRef((PyObject *)x));
    Py_DECREF(self);
    if (ok)
        return (PyObject *)x;
    Py_DECREF(x);
    return NULL;
}

static PyObject *vcpu_kick(PyObject *self, PyObject *unused)
{
    pv_vcpu *v = (pv_vcpu *)self;
    if (!is_usable(v))
        return NULL;
    v->machine->of_vcpu[v->index].has_stale_kick = false;
    vm_vcpu_kick(v->cpu);
    Py_RETURN_NONE;
}

static PyObject *vcpu_inject(PyObject *self, PyObject *args)
{
    pv_vcpu *v = (pv_vcpu *)self;
    uint8_t vector;
    uint32_t error = 0;
    PyObject *code = Py_None;
    if (!PyArg_ParseTuple(args, "O&|O:inject", pv_u8, &vector, &code) || (code != Py_None && !pv_u32(code, &error)))
        return NULL;
    PV_BEGIN(v->machine);
    int status = vm_vcpu_inject(v->cpu, vector, code != Py_None, error);
    PV_END();
    return pv_none_or(v->machine->st, status);
}

static PyObject *vcpu_index(PyObject *self, void *unused)
{
    pv_vcpu *v = (pv_vcpu *)self;
    return PyLong_FromUnsignedLong(is_usable(v) ? vm_vcpu_index(v->cpu) : (PyErr_Clear(), v->index));
}

/* vm_vcpu_machine() gives libvm's; its object is the one that made this vCPU. */
static PyObject *vcpu_machine(PyObject *self, void *unused) { return Py_NewRef((PyObject *)((pv_vcpu *)self)->machine); }

static PyObject *vcpu_retired(PyObject *self, void *unused)
{
    pv_vcpu *v = (pv_vcpu *)self;
    return is_usable(v) ? PyLong_FromUnsignedLongLong(vm_vcpu_retired(v->cpu)) : NULL;
}

static PyGetSetDef getters[] = {
#define VM_REG(name, text, bytes, cls, index) { text, reg_get, reg_set, NULL, (void *)(intptr_t)VM_REG_##name },
#include <libvm/reg.def>
#undef VM_REG
    { "xmm", regfile_get, NULL, "XMM0 to XMM15.", (void *)(intptr_t)VM_REG_XMM0 },
    { "ymm", regfile_get, NULL, "YMM0 to YMM15.", (void *)(intptr_t)VM_REG_YMM0 },
    { "st", regfile_get, NULL, "ST0 to ST7, 80 bits each.", (void *)(intptr_t)VM_REG_ST0 },
    { "mm", regfile_get, NULL, "MM0 to MM7.", (void *)(intptr_t)VM_REG_MM0 },
    { "index", vcpu_index, NULL, "Which of the machine's vCPUs this is.", NULL },
    { "machine", vcpu_machine, NULL, "The machine.", NULL },
    { "retired", vcpu_retired, NULL, "Instructions retired since creation.", NULL },
    { NULL, NULL, NULL, NULL, NULL }
};

static PyMethodDef methods[] = {
    { "run", PV_KW(vcpu_run), METH_FASTCALL | METH_KEYWORDS,
      "run(*, max_instructions=None, timeout=None, until=None, exception_exits=None, single_step=False, "
      "signal_blocked=False, brief=False) -> Exit\n"
      "Runs the guest until there is something to report." },
    { "kick", vcpu_kick, METH_NOARGS, "kick()\nMakes the current run, or the next one, stop. Any thread." },
    { "inject", vcpu_inject, METH_VARARGS, "inject(vector, error=None)\nMakes the guest take an event." },
    { "set_mode", vcpu_set_mode, METH_VARARGS, "set_mode(mode)\nA known starting state: 'reset', 'real', 'flat32', 'flat64'." },
    { "read_reg", vcpu_read_reg, METH_VARARGS, "read_reg(reg) -> int\nA register by name or Reg." },
    { "write_reg", vcpu_write_reg, METH_VARARGS, "write_reg(reg, value)" },
    { "get_regs", vcpu_get_regs, METH_NOARGS, "get_regs() -> dict\nGeneral registers, RIP, RFLAGS." },
    { "set_regs", PV_KW(vcpu_set_regs), METH_VARARGS | METH_KEYWORDS, "set_regs(mapping={}, **registers)\nSome of them, at once." },
    { "get_sregs", vcpu_get_sregs, METH_NOARGS, "get_sregs() -> dict\nSystem registers; segments and tables are dicts." },
    { "set_sregs", PV_KW(vcpu_set_sregs), METH_VARARGS | METH_KEYWORDS, "set_sregs(mapping={}, **registers)" },
    { "get_fpu", vcpu_get_fpu, METH_NOARGS, "get_fpu() -> dict\nx87, SSE and AVX state." },
    { "set_fpu", PV_KW(vcpu_set_fpu), METH_VARARGS | METH_KEYWORDS, "set_fpu(mapping={}, **registers)" },
    { "get_msr", vcpu_get_msr, METH_VARARGS, "get_msr(msr) -> int" },
    { "set_msr", vcpu_set_msr, METH_VARARGS, "set_msr(msr, value)" },
    { "translate", vcpu_translate, METH_VARARGS, "translate(gva, access='r') -> int\nThe guest-physical address." },
    { "read", vcpu_read, METH_VARARGS, "read(gva, count) -> bytes\nGuest-virtual memory." },
    { "write", vcpu_write, METH_VARARGS, "write(gva, data)" },
    { NULL, NULL, 0, NULL }
};

static PyMethodDef all_methods[48];

__attribute__((constructor)) static void gather_methods(void)
{
    PyMethodDef *const parts[] = { methods, pv_mmu_vcpu_methods, pv_call_vcpu_methods, pv_coverage_vcpu_methods };
    size_t n = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        for (PyMethodDef *d = parts[i]; d->ml_name && n < sizeof all_methods / sizeof *all_methods - 1; d++)
            all_methods[n++] = *d;
}

static PyType_Slot slots[] = {
    { Py_tp_doc, "A processor of a machine. Registers are attributes: cpu.rax, cpu.cr3, cpu.xmm[0]." }, { Py_tp_dealloc, vcpu_dealloc },
    { Py_tp_repr, vcpu_repr }, { Py_tp_methods, all_methods }, { Py_tp_getset, getters }, { 0, NULL }
};
PyType_Spec pv_vcpu_spec = {
    "libvm._libvm.Vcpu", sizeof(pv_vcpu), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots
};
