/* call.c - the host calls guest functions: arguments out, run to the return address, result in.
 *
 * The part of the stack that a call needs (copies of strings and buffers, arguments, return address) is put together in
 * host memory first and written in one go: a stack that is not there changes nothing.
 */
#include "core/call.h"
#include "x86/native.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RED_ZONE 128u                  /* System V AMD64, 3.2.2: below RSP, the function's own */

/* ---- numbers in registers ---- */

static void fpu_in_use(x86_cpu *x, unsigned components)
{
    uint64_t bv;
    memcpy(&bv, &x->fpu.image[512], 8);
    bv |= components;
    memcpy(&x->fpu.image[512], &bv, 8);
}

uint64_t vm_abi_xmm(vm_vcpu *cpu, unsigned index)
{
    uint64_t v;
    vm_vcpu_fetch(cpu, VM_STATE_FPU);
    memcpy(&v, X86_FPU_XMM(&cpu->x86, index), 8);
    return v;
}

static void set_xmm(vm_vcpu *cpu, unsigned index, const void *value, size_t bytes)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_FPU);
    memset(X86_FPU_XMM(x, index), 0, 16);
    memcpy(X86_FPU_XMM(x, index), value, bytes);
    fpu_in_use(x, 2);
    vm_vcpu_changed(cpu, VM_STATE_FPU);
}

/* Push or pop the x87 stack's top by hand. */
static void push_x87(vm_vcpu *cpu, long double value)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_FPU);
    unsigned top = ((X86_FPU_FSW(x) >> 11) - 1u) & 7;
    uint8_t st[8][16];
    for (unsigned i = 0; i < 8; i++)
        memcpy(st[i], X86_FPU_ST(x, (i + 7) & 7), 16);   /* what was ST(i - 1) */
    memset(st[0], 0, 16);
    memcpy(st[0], &value, 10);
    for (unsigned i = 0; i < 8; i++)
        memcpy(X86_FPU_ST(x, i), st[i], 16);
    X86_FPU_FSW(x) = (uint16_t)((X86_FPU_FSW(x) & ~0x3800u) | top << 11);
    X86_FPU_FTW(x) |= (uint8_t)(1u << top);
    fpu_in_use(x, 1);
    vm_vcpu_changed(cpu, VM_STATE_FPU);
}

static long double pop_x87(vm_vcpu *cpu)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_FPU);
    long double value = 0;
    unsigned top = X86_FPU_FSW(x) >> 11 & 7;
    uint8_t st[8][16];
    for (unsigned i = 0; i < 8; i++)
        memcpy(st[i], X86_FPU_ST(x, (i + 1) & 7), 16);
    memcpy(&value, X86_FPU_ST(x, 0), 10);
    for (unsigned i = 0; i < 8; i++)
        memcpy(X86_FPU_ST(x, i), st[i], 16);
    X86_FPU_FTW(x) &= (uint8_t)~(1u << top);
    X86_FPU_FSW(x) = (uint16_t)((X86_FPU_FSW(x) & ~0x3800u) | ((top + 1) & 7) << 11);
    vm_vcpu_changed(cpu, VM_STATE_FPU);
    return value;
}

static bool is_i386(const vm_layout *l)
{
    return l->convention == VM_CONV_CDECL || l->convention == VM_CONV_STDCALL;
}

void vm_abi_put_result(vm_vcpu *cpu, const vm_layout *l, unsigned type, const vm_value *value)
{
    x86_cpu *x = &cpu->x86;
    if (vm_type_is_float(type) && is_i386(l)) {
        push_x87(cpu, type == VM_T_F32 ? (long double)value->f32 : (long double)value->f64);
    } else if (vm_type_is_float(type)) {
        set_xmm(cpu, 0, value, vm_type_bytes(type, 8));
    } else if (type != VM_T_VOID) {
        uint64_t v = vm_type_extend(type, l->word, value->u);
        vm_vcpu_fetch(cpu, VM_STATE_REGS);
        if (l->word == 8) {
            x->gpr[X86_RAX] = v;
        } else {
            x->gpr[X86_RAX] = (uint32_t)v;
            if (vm_type_bytes(type, 4) == 8)
                x->gpr[X86_RDX] = v >> 32;
        }
        vm_vcpu_changed(cpu, VM_STATE_REGS);
    }
}

void vm_abi_take_result(vm_vcpu *cpu, const vm_layout *l, unsigned type, vm_value *value)
{
    const x86_cpu *x = &cpu->x86;
    value->u = 0;
    if (vm_type_is_float(type) && is_i386(l)) {
        long double v = pop_x87(cpu);
        if (type == VM_T_F32)
            value->f32 = (float)v;
        else
            value->f64 = (double)v;
    } else if (vm_type_is_float(type)) {
        value->u = vm_type_extend(type == VM_T_F32 ? VM_T_U32 : VM_T_U64, 8, vm_abi_xmm(cpu, 0));
    } else if (type != VM_T_VOID) {
        uint64_t v = x->gpr[X86_RAX];
        if (l->word == 4 && vm_type_bytes(type, 4) == 8)
            v = (uint32_t)v | x->gpr[X86_RDX] << 32;
        value->u = vm_type_extend(type, l->word, v);
    }
}

/* ---- the stack ---- */

typedef struct frame {
    const vm_signature *s;
    const vm_value *args;
    vm_layout l;
    uint64_t top, sp;                  /* of what is written: [sp, top); as offsets in SS */
    uint8_t *image;
    uint64_t at[VM_CALL_ARGS];         /* value number: where its bytes are in the guest */
    uint64_t bytes[VM_CALL_ARGS];
} frame;

static int measure(frame *f, unsigned i, uint64_t *bytes)
{
    const vm_param *p = &f->s->params[i];
    const vm_value *v = &f->args[p->value];
    if (p->type == VM_T_STR)
        *bytes = strnlen(v->cdata, VM_CALL_BUFFER) + 1;
    else if (!vm_param_bytes(f->s, i, f->args, bytes))
        *bytes = UINT64_MAX;
    if (*bytes > VM_CALL_BUFFER)
        return vm_fail(VM_E_INVALID, "vm_call: argument %u has more than %u bytes", p->value + 1u, VM_CALL_BUFFER);
    return VM_OK;
}

/* Take n bytes below *sp, aligned; false: the stack pointer would pass 0. */
static bool take(uint64_t *sp, uint64_t n, uint64_t align)
{
    if (*sp < n + align)
        return false;
    *sp = (*sp - n) & ~(align - 1);
    return true;
}

static int lay_out(frame *f)
{
    uint64_t sp = f->top;
    bool fits = true;
    for (unsigned i = 0; i < f->s->count; i++) {
        const vm_param *p = &f->s->params[i];
        if (!vm_type_is_memory(p->type) || !f->args[p->value].cdata)
            continue;
        int status = measure(f, i, &f->bytes[p->value]);
        if (status)
            return status;
        fits = fits && take(&sp, f->bytes[p->value], 16);
        f->at[p->value] = sp;
        if (f->top - sp > 2 * (uint64_t)VM_CALL_BUFFER)
            return vm_fail(VM_E_INVALID, "vm_call: strings and buffers of more than %u bytes", 2 * VM_CALL_BUFFER);
    }
    fits = fits && take(&sp, f->l.stack_bytes, 16) && take(&sp, f->l.word, f->l.word);
    f->sp = sp;
    return fits ? VM_OK : vm_fail(VM_E_FAULT, "vm_call: no room on a stack at 0x%llx", (unsigned long long)f->top);
}

static void put(frame *f, uint64_t at, const void *data, size_t bytes)
{
    memcpy(f->image + (at - f->sp), data, bytes);
}

/* What stands for value v of parameter p: the number, the guest's address, the float's bits. */
static uint64_t raw_value(const frame *f, const vm_param *p)
{
    if (vm_type_is_memory(p->type))
        return f->at[p->value];
    return vm_type_is_float(p->type) ? f->args[p->value].u : vm_type_extend(p->type, f->l.word, f->args[p->value].u);
}

static void fill(frame *f, uint64_t return_address)
{
    put(f, f->sp, &return_address, f->l.word);
    for (unsigned i = 0; i < f->s->count; i++) {
        const vm_param *p = &f->s->params[i];
        const vm_place *at = &f->l.places[p->value];
        uint64_t v = raw_value(f, p);
        if (vm_type_is_memory(p->type) && f->at[p->value])
            put(f, f->at[p->value], f->args[p->value].cdata, f->bytes[p->value]);
        if (at->kind == VM_PLACE_STACK)
            put(f, f->sp + at->at, &v, at->bytes);
    }
}

static uint64_t stack_linear(const vm_vcpu *cpu, uint64_t offset)
{
    const x86_cpu *x = &cpu->x86;
    return x->code_size == 8 ? offset : (uint32_t)(x->seg[X86_SS].base + offset);
}

static int write_frame(vm_vcpu *cpu, frame *f, uint64_t return_address)
{
    size_t bytes = f->top - f->sp;
    f->image = calloc(1, bytes);
    if (!f->image)
        return vm_fail(VM_E_NOMEM, "vm_call: no memory for %zu bytes of stack", bytes);
    fill(f, return_address);
    int status = vm_vcpu_write(cpu, stack_linear(cpu, f->sp), f->image, bytes);
    free(f->image);
    f->image = NULL;
    return status == VM_E_FAULT ? vm_fail(VM_E_FAULT, "vm_call: the stack at 0x%llx is not RAM",
                                          (unsigned long long)f->sp) : status;
}

static int copy_back(vm_vcpu *cpu, const frame *f)
{
    for (unsigned i = 0; i < f->s->count; i++) {
        const vm_param *p = &f->s->params[i];
        if (p->type != VM_T_BUF || !f->at[p->value])
            continue;
        int status = vm_vcpu_read(cpu, stack_linear(cpu, f->at[p->value]), f->args[p->value].data, f->bytes[p->value]);
        if (status)
            return status;
    }
    return VM_OK;
}

/* ---- the call ---- */

static void set_registers(vm_vcpu *cpu, const frame *f, const vm_regs *before, uint64_t address)
{
    vm_regs r = *before;
    for (unsigned i = 0; i < f->s->count; i++) {
        const vm_param *p = &f->s->params[i];
        const vm_place *at = &f->l.places[p->value];
        uint64_t v = raw_value(f, p);
        if (at->kind == VM_PLACE_GPR)
            (&r.rax)[at->at] = v;
        else if (at->kind == VM_PLACE_XMM)
            set_xmm(cpu, at->at, &v, vm_type_bytes(p->type, 8));
    }
    if (f->l.convention == VM_CONV_SYSV)
        r.rax = f->l.xmm_count;
    r.rsp = f->sp;
    r.rip = address;
    r.rflags &= ~(uint64_t)X86_FL_DF;
    vm_regs_set(cpu, &r);
}

/* What a call finds. */
typedef struct before { vm_regs regs; x86_fpu fpu; bool halted; } before;

static void remember(vm_vcpu *cpu, before *b)
{
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    b->regs.size = sizeof b->regs;
    vm_regs_get(cpu, &b->regs);
    b->fpu = cpu->x86.fpu;
    b->halted = cpu->x86.halted;
}

static void put_back(vm_vcpu *cpu, const before *b, bool preserve)
{
    vm_regs r = { .size = sizeof r };
    vm_regs_get(cpu, &r);
    r.rip = b->regs.rip;
    r.rsp = b->regs.rsp;
    if (preserve) {
        r = b->regs;
        vm_vcpu_fetch(cpu, VM_STATE_FPU);
        cpu->x86.fpu = b->fpu;
        vm_vcpu_changed(cpu, VM_STATE_FPU);
    }
    vm_regs_set(cpu, &r);
    cpu->x86.halted = b->halted;
}

static int prepare(vm_vcpu *cpu, frame *f, const vm_call_options *o, const vm_regs *before, uint64_t *return_address)
{
    unsigned code_size = cpu->x86.code_size;
    int status = vm_signature_place(f->s, code_size, false, "vm_call", &f->l);
    if (status)
        return status;
    *return_address = o->return_address ? o->return_address : code_size == 8 ? VM_CALL_RETURN64 : VM_CALL_RETURN32;
    bool is_far = code_size == 8 ? !x86_canonical(*return_address) : *return_address >> 32 != 0;
    if (is_far || (code_size == 4 && o->stack >> 32))
        return vm_fail(VM_E_INVALID, "vm_call: return address 0x%llx or stack 0x%llx is none in %u-bit code",
                       (unsigned long long)*return_address, (unsigned long long)o->stack, 8 * code_size);
    f->top = o->stack ? o->stack : code_size == 8 ? before->rsp : (uint32_t)before->rsp;
    if (!o->stack && f->l.convention == VM_CONV_SYSV)
        f->top = f->top < RED_ZONE ? 0 : f->top - RED_ZONE;
    status = lay_out(f);
    return status ? status : write_frame(cpu, f, *return_address);
}

int vm_call_guest(vm_vcpu *cpu, uint64_t address, const vm_signature *s, const vm_value *args, vm_value *result,
                  const vm_call_options *o, vm_exit *exit)
{
    frame f = { .s = s, .args = args };
    before b;
    uint64_t return_address;
    int status = vm_run_check(cpu);
    result->u = 0;
    if (status)
        return status;
    remember(cpu, &b);
    status = prepare(cpu, &f, o, &b.regs, &return_address);
    if (status)
        return status;
    const vm_run_options run = { .size = sizeof run, .max_instructions = o->max_instructions,
                                 .deadline_ns = o->deadline_ns, .has_until = true, .until = return_address,
                                 .exception_exits = o->exception_exits };
    cpu->has_pending = false;
    x86_io_retire(&cpu->x86);
    cpu->x86.halted = false;
    set_registers(cpu, &f, &b.regs, address);
    status = vm_run(cpu, &run, exit);
    if (status || exit->reason != VM_EXIT_UNTIL)
        return status;
    vm_abi_take_result(cpu, &f.l, s->result, result);
    status = copy_back(cpu, &f);
    put_back(cpu, &b, o->preserve);
    return status;
}

/* ---- closures ---- */

/* libffi's own memory for functions is writable and executable at once where the host refuses it a file, as the sandbox does: a closure
 * has a page of its own. */
enum { CODE_PAGE = 4096 };

struct vm_closure {
    ffi_closure *ffi;                  /* writable; libffi puts a function at its start */
    uint8_t *code;                     /* the same, executable */
    void (*function)(void);
    vm_vcpu *cpu;
    uint64_t address;
    vm_call_options options;
    vm_signature s;
    ffi_cif cif;
    ffi_type *types[VM_CALL_ARGS];
    int status;                        /* of the last call */
    vm_exit exit;
};

/* libffi gives addresses of the arguments in their C types. */
static vm_value value_of(unsigned type, const void *at)
{
    vm_value v = { 0 };
    memcpy(&v, at, vm_type_bytes(type, 8));
    return v;
}

/* libffi wants integers that are narrower than a register widened to ffi_arg. */
static void closure_called(ffi_cif *cif, void *out, void **args, void *user)
{
    vm_closure *c = user;
    vm_value values[VM_CALL_ARGS], result = { 0 };
    vm_exit exit = VM_EXIT_INIT;
    for (unsigned i = 0; i < c->s.count; i++)
        values[c->s.params[i].value] = value_of(c->s.params[i].type, args[i]);
    int status = vm_call_guest(c->cpu, c->address, &c->s, values, &result, &c->options, &exit);
    c->status = status;
    c->exit = exit;
    (void)cif;
    if (c->s.result == VM_T_F32)
        memcpy(out, &result.f32, sizeof result.f32);
    else if (c->s.result != VM_T_VOID)
        memcpy(out, &result, sizeof result);
}

int vm_closure_create(vm_vcpu *cpu, uint64_t address, const vm_signature *s, const vm_call_options *options,
                      vm_closure **out)
{
    vm_closure *c = calloc(1, sizeof *c);
    if (!c)
        return vm_fail(VM_E_NOMEM, "vm_closure_new: no memory");
    *c = (vm_closure){ .cpu = cpu, .address = address, .options = *options, .s = *s, .exit = VM_EXIT_INIT };
    int status = vm_signature_cif(&c->s, "vm_closure_new", &c->cif, c->types);
    if (!status && !(c->ffi = (ffi_closure *)(void *)x86_map_code(CODE_PAGE, NULL, &c->code)))
        status = vm_fail(VM_E_HOST, "vm_closure_new: the host gives no executable memory");
    if (!status && ffi_prep_closure_loc(c->ffi, &c->cif, closure_called, c, c->code) != FFI_OK)
        status = vm_fail(VM_E_HOST, "vm_closure_new: libffi cannot make that function");
    if (status) {
        vm_closure_free(c);
        return status;
    }
    memcpy(&c->function, &c->code, sizeof c->code);
    *out = c;
    return VM_OK;
}

VM_API void (*vm_closure_function(const vm_closure *closure))(void)
{
    return closure ? closure->function : NULL;
}

VM_API int vm_closure_status(const vm_closure *closure, vm_exit *exit)
{
    if (!closure)
        return vm_fail(VM_E_INVALID, "vm_closure_status: closure is NULL");
    if (exit) {
        size_t known = exit->size < sizeof *exit ? exit->size : sizeof *exit, skipped = sizeof exit->size;
        if (known <= skipped)
            return vm_fail(VM_E_INVALID, "vm_closure_status: exit->size is %u", exit->size);
        memcpy((char *)exit + skipped, (const char *)&closure->exit + skipped, known - skipped);
    }
    return closure->status;
}

VM_API void vm_closure_free(vm_closure *closure)
{
    if (!closure)
        return;
    if (closure->ffi) {
        munmap(closure->ffi, CODE_PAGE);
        munmap(closure->code, CODE_PAGE);
    }
    free(closure);
}
