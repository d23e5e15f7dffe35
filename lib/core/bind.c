/* bind.c - the guest calls host functions: at bound addresses and by VMCALL.
 *
 * The run loop comes here at an instruction boundary, with no backend on the host's stack; so the function may do
 * anything, run the vCPU too. First all arguments are taken, with the faults that the guest's own accesses would have
 * (nothing has happened then), then the function is called, then result and return are made.
 *
 * A machine's bindings are a sorted array, changed in place while the world is stopped. A binding is freed when it is out
 * of the array and no call of it is under way (`refs`).
 */
#include "core/call.h"
#include "core/hook.h"
#include "core/run.h"
#include "mmu/mmu.h"

#include <stdlib.h>
#include <string.h>

struct vm_binding {
    bool is_hypercall;
    uint64_t key;                      /* linear address, number */
    _Atomic unsigned refs;
    vm_bind_desc desc;
    vm_signature s;
    ffi_cif cif;                       /* of desc.fn */
    ffi_type *types[VM_CALL_ARGS];
};

struct vm_bindings {
    size_t count, capacity;
    vm_binding **sorted;               /* addresses, then numbers */
};

/* ---- the list ---- */

static int compare(bool is_hypercall, uint64_t key, const vm_binding *b)
{
    if (is_hypercall != b->is_hypercall)
        return is_hypercall ? 1 : -1;
    return key < b->key ? -1 : key > b->key;
}

/* Where it is or would be. */
static size_t place_of(const struct vm_bindings *all, bool is_hypercall, uint64_t key)
{
    size_t low = 0, high = all->count;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (compare(is_hypercall, key, all->sorted[mid]) > 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static vm_binding *find(vm_machine *m, bool is_hypercall, uint64_t key)
{
    const struct vm_bindings *all = m->bindings;
    if (!all)
        return NULL;
    size_t i = place_of(all, is_hypercall, key);
    return i < all->count && compare(is_hypercall, key, all->sorted[i]) == 0 ? all->sorted[i] : NULL;
}

static void drop(vm_binding *b)
{
    if (atomic_fetch_sub(&b->refs, 1) != 1)
        return;
    if (b->desc.destroy)
        b->desc.destroy(b->desc.user);
    free((char *)(uintptr_t)b->desc.signature);
    free(b);
}

/* World stopped: room for one more. */
static int reserve(vm_machine *m)
{
    if (!m->bindings && !(m->bindings = calloc(1, sizeof *m->bindings)))
        return vm_fail(VM_E_NOMEM, "no memory for bindings");
    struct vm_bindings *all = m->bindings;
    if (all->count < all->capacity)
        return VM_OK;
    size_t capacity = all->capacity ? 2 * all->capacity : 16;
    vm_binding **sorted = realloc(all->sorted, capacity * sizeof *sorted);
    if (!sorted)
        return vm_fail(VM_E_NOMEM, "no memory for %zu bindings", capacity);
    all->sorted = sorted;
    all->capacity = capacity;
    return VM_OK;
}

static int insert(vm_machine *m, vm_binding *b)
{
    if (find(m, b->is_hypercall, b->key))
        return vm_fail(VM_E_EXISTS, "something is bound to 0x%llx", (unsigned long long)b->key);
    int status = reserve(m);
    if (!status && !b->is_hypercall)
        status = vm_stop_add(m, b->key);
    if (status)
        return status;
    struct vm_bindings *all = m->bindings;
    size_t i = place_of(all, b->is_hypercall, b->key);
    memmove(&all->sorted[i + 1], &all->sorted[i], (all->count++ - i) * sizeof *all->sorted);
    all->sorted[i] = b;
    return VM_OK;
}

int vm_binding_add(vm_machine *m, bool is_hypercall, uint64_t key, const vm_bind_desc *desc, const vm_signature *s,
                   vm_binding **out)
{
    vm_binding *b = calloc(1, sizeof *b);
    if (!b)
        return vm_fail(VM_E_NOMEM, "no memory for a binding");
    *b = (vm_binding){ .is_hypercall = is_hypercall, .key = key, .refs = 1, .desc = *desc, .s = *s };
    b->desc.signature = NULL;          /* parsed */
    int status = desc->fn ? vm_signature_cif(&b->s, "vm_bind", &b->cif, b->types) : VM_OK;
    if (!status) {
        vm_pause(m);
        status = insert(m, b);
        vm_resume(m);
    }
    if (status)
        free(b);
    else if (out)
        *out = b;
    return status;
}

int vm_binding_remove(vm_machine *m, vm_binding *binding)
{
    vm_pause(m);
    struct vm_bindings *all = m->bindings;
    size_t i = 0, count = all ? all->count : 0;
    while (i < count && all->sorted[i] != binding)
        i++;
    if (i < count) {
        if (!binding->is_hypercall)
            vm_stop_drop(m, binding->key);
        memmove(&all->sorted[i], &all->sorted[i + 1], (--all->count - i) * sizeof *all->sorted);
    }
    vm_resume(m);
    if (i == count)
        return vm_fail(VM_E_NOTFOUND, "vm_unbind: the machine has no binding %p", (void *)binding);
    drop(binding);
    return VM_OK;
}

void vm_bindings_free(vm_machine *m)
{
    struct vm_bindings *all = m->bindings;
    for (size_t i = 0; all && i < all->count; i++)
        drop(all->sorted[i]);
    if (all)
        free(all->sorted);
    free(all);
    m->bindings = NULL;
}

bool vm_is_bound_hypercall(vm_machine *m, const x86_cpu *x)
{
    return m->bindings && find(m, true, x->code_size == 8 ? x->gpr[X86_RAX] : (uint32_t)x->gpr[X86_RAX]);
}

/* ---- memory of the guest, with the rights of the guest ---- */

typedef struct span { uint64_t gva, gpa, bytes; uint8_t *host; bool is_copy, is_written; } span;

typedef struct call {
    vm_vcpu *cpu;
    vm_binding *b;
    vm_layout l;
    uint64_t sp;                       /* linear address of the return address */
    uint64_t return_address;
    vm_value values[VM_CALL_ARGS];
    span spans[VM_CALL_ARGS];          /* by value number: str, buf, cbuf */
    x86_fault fault;                   /* why it cannot be made */
} call;

static bool fault(call *c, uint8_t vector, bool has_error)
{
    c->fault = (x86_fault){ .vector = vector, .has_error = has_error };
    return false;
}

/* Physical address of a linear one; false: c->fault. */
static bool translate(call *c, uint64_t la, unsigned access, uint64_t *gpa)
{
    x86_cpu *x = &c->cpu->x86;
    x86_walk w = { 0 };
    if (x->code_size == 8 && !x86_canonical(la))
        return fault(c, X86_GP, true);
    if (c->cpu->machine->backend->takes_interrupts) {    /* KVM: its TLB is not ours */
        if (!x86_walk_page(x, la, access, x->ctx, true, &w)) {
            c->fault = w.fault;
            return false;
        }
        *gpa = w.gpa;
        return true;
    }
    if (!vm_mmu_fill(x, la, access, x->ctx, gpa)) {
        c->fault = x->fault;
        return false;
    }
    return true;
}

/* Host memory of one page's part, as long as it is RAM that allows the access. */
static uint8_t *ram(call *c, uint64_t la, unsigned access, uint64_t *gpa)
{
    if (!translate(c, la, access, gpa))
        return NULL;
    const vm_range *range = vm_find(c->cpu, *gpa);
    if (range && range->region->kind <= VM_REGION_FILE) {
        uint64_t offset = range->offset + (*gpa - range->gpa);
        if ((vm_region_prot(range->region, offset) & access) == access &&
            !(range->region->is_read_only && (access & X86_WRITE)))
            return range->region->host + offset;
    }
    fault(c, X86_GP, true);
    return NULL;
}

static uint64_t linear(const call *c, uint64_t address)
{
    return c->l.word == 8 ? address : (uint32_t)address;
}

static size_t page_part(uint64_t la, uint64_t left)
{
    size_t part = 4096 - (size_t)(la & 4095);
    return part < left ? part : (size_t)left;
}

/* n bytes that an instruction would read. */
static bool read_small(call *c, uint64_t la, void *to, size_t n)
{
    uint64_t gpa;
    for (size_t part; n; la = linear(c, la + part), to = (uint8_t *)to + part, n -= part) {
        part = page_part(la, n);
        const uint8_t *from = ram(c, la, X86_READ, &gpa);
        if (!from)
            return false;
        memcpy(to, from, part);
    }
    return true;
}

/* Strings are always copied: nobody can take the NUL away meanwhile. */
static bool open_string(call *c, unsigned n)
{
    span *s = &c->spans[n];
    size_t limit = c->b->desc.max_string, room = 0, length = 0;
    uint64_t la = s->gva, gpa;
    char *copy = NULL;
    for (;;) {
        size_t part = page_part(la, limit - length);
        const uint8_t *from = part ? ram(c, la, X86_READ, &gpa) : NULL;
        if (!from || length + part > room) {
            room = 2 * (length + part) + 64;
            char *bigger = from ? realloc(copy, room) : NULL;
            if (!bigger) {
                free(copy);
                return from || !part ? fault(c, X86_GP, true) : false;
            }
            copy = bigger;
        }
        memcpy(copy + length, from, part);
        const char *nul = memchr(copy + length, 0, part);
        length += part;
        if (nul)
            break;
        la = linear(c, la + part);
    }
    s->host = (uint8_t *)copy;
    s->is_copy = true;
    return true;
}

/* One buffer: directly where it is contiguous in the host, else a copy. */
static bool open_buffer(call *c, unsigned n)
{
    span *s = &c->spans[n];
    unsigned access = s->is_written ? X86_READ | X86_WRITE : X86_READ;
    uint64_t gpa, la = s->gva;
    uint8_t *next = NULL;
    bool is_direct = true;
    if (s->bytes > c->b->desc.max_buffer)
        return fault(c, X86_GP, true);
    for (uint64_t done = 0, part; done < s->bytes; done += part, la = linear(c, la + part)) {
        part = page_part(la, s->bytes - done);
        uint8_t *host = ram(c, la, access, &gpa);
        if (!host)
            return false;
        if (!done) {
            s->host = host;
            s->gpa = gpa;
        }
        is_direct = is_direct && (!next || host == next) && s->gpa + done == gpa;
        next = host + part;
    }
    if (is_direct)
        return true;
    s->host = malloc(s->bytes);
    s->is_copy = s->host != NULL;
    return s->host ? read_small(c, s->gva, s->host, s->bytes) : fault(c, X86_GP, true);
}

/* The function may write from now on: others must see that. */
static void announce(call *c, const span *s)
{
    if (s->is_written && !s->is_copy && s->bytes)
        vm_memory_changed(c->cpu->machine, s->gpa, s->bytes);
}

static void close_span(call *c, span *s)
{
    if (s->is_copy && s->is_written)
        vm_vcpu_write(c->cpu, s->gva, s->host, s->bytes);
    else
        announce(c, s);
}

static void free_spans(call *c)
{
    for (unsigned i = 0; i < c->b->s.values; i++)
        if (c->spans[i].is_copy)
            free(c->spans[i].host);
}

/* ---- arguments ---- */

static bool raw_value(call *c, const vm_param *p, uint64_t *v)
{
    const vm_place *at = &c->l.places[p->value];
    *v = 0;
    switch (at->kind) {
    case VM_PLACE_GPR: *v = c->cpu->x86.gpr[at->at]; return true;
    case VM_PLACE_XMM: *v = vm_abi_xmm(c->cpu, at->at); return true;
    default: return read_small(c, linear(c, c->sp + at->at), v, at->bytes);
    }
}

static bool take_values(call *c)
{
    const vm_signature *s = &c->b->s;
    for (unsigned i = 0; i < s->count; i++) {
        const vm_param *p = &s->params[i];
        uint64_t v;
        if (p->type == VM_T_CPU || p->type == VM_T_USER)
            continue;
        if (!raw_value(c, p, &v))
            return false;
        c->values[p->value].u = p->type == VM_T_F32 ? (uint32_t)v : p->type == VM_T_F64 ? v
                                                    : vm_type_extend(p->type, c->l.word, v);
    }
    return true;
}

static bool take_memory(call *c)
{
    const vm_signature *s = &c->b->s;
    for (unsigned i = 0; i < s->count; i++) {
        const vm_param *p = &s->params[i];
        if (!vm_type_is_memory(p->type))
            continue;
        span *at = &c->spans[p->value];
        at->gva = c->values[p->value].u;
        at->is_written = p->type == VM_T_BUF;
        if (p->type != VM_T_STR && !vm_param_bytes(s, i, c->values, &at->bytes))
            return fault(c, X86_GP, true);
        if (at->gva && !(p->type == VM_T_STR ? open_string(c, p->value) : open_buffer(c, p->value)))
            return false;
    }
    for (unsigned i = 0; i < s->values; i++)
        if (c->spans[i].gva)
            announce(c, &c->spans[i]);
    for (unsigned i = 0; i < s->count; i++)              /* lengths have been read from the values: now the pointers */
        if (vm_type_is_memory(s->params[i].type))
            c->values[s->params[i].value].data = c->spans[s->params[i].value].host;
    return true;
}

static bool take_return(call *c)
{
    const x86_cpu *x = &c->cpu->x86;
    c->sp = c->l.word == 8 ? x->gpr[X86_RSP] : (uint32_t)(x->seg[X86_SS].base + x->gpr[X86_RSP]);
    if (c->b->is_hypercall)
        return true;
    if (!read_small(c, c->sp, &c->return_address, c->l.word))
        return false;
    return c->l.word == 4 || x86_canonical(c->return_address) ? true : fault(c, X86_GP, true);
}

static bool open_call(call *c)
{
    if (vm_signature_place(&c->b->s, c->cpu->x86.code_size, c->b->is_hypercall, "a bound function", &c->l) != VM_OK)
        return fault(c, X86_UD, false);
    return take_return(c) && take_values(c) && take_memory(c);
}

/* ---- the call ---- */

static int call_fn(call *c, vm_value *result)
{
    const vm_signature *s = &c->b->s;
    void *args[VM_CALL_ARGS], *cpu = c->cpu, *user = c->b->desc.user;
    union { ffi_arg word; vm_value value; } out = { .word = 0 };
    for (unsigned i = 0; i < s->count; i++) {
        unsigned type = s->params[i].type;
        args[i] = type == VM_T_CPU ? (void *)&cpu : type == VM_T_USER ? (void *)&user
                                                                      : (void *)&c->values[s->params[i].value];
    }
    ffi_call(&c->b->cif, c->b->desc.fn, &out, args);
    *result = out.value;
    return 0;
}

static int call_host(call *c, vm_value *result)
{
    vm_vcpu *cpu = c->cpu;
    const vm_bind_desc *d = &c->b->desc;
    cpu->at_boundary = true;
    int status = d->fn ? call_fn(c, result) : d->values(d->user, cpu, c->values, c->b->s.values, result);
    cpu->at_boundary = false;
    if (cpu->has_pending) {            /* a run inside ended in an access; nobody will complete it now */
        cpu->has_pending = false;
        x86_io_retire(&cpu->x86);
    }
    vm_vcpu_fetch(cpu, VM_STATE_REGS | VM_STATE_SREGS);
    return status;
}

static void make_return(call *c, const vm_value *result)
{
    x86_cpu *x = &c->cpu->x86;
    vm_abi_put_result(c->cpu, &c->l, c->b->s.result, result);
    if (c->b->is_hypercall)
        return;
    uint64_t sp = x->gpr[X86_RSP] + c->l.word + c->l.popped;
    x->gpr[X86_RSP] = c->l.word == 8 ? sp : (uint32_t)sp;
    x->rip = c->return_address;
    x->retired++;
    vm_vcpu_changed(c->cpu, VM_STATE_REGS);
}

/* The guest's fault instead of the call. For a hypercall the instruction is the one that faults. */
static int raise_fault(call *c, uint64_t at)
{
    x86_cpu *x = &c->cpu->x86;
    x->rip = x->next_rip = at;
    x->fault = c->fault;
    x86_stop stop = x86_deliver_fault(x);
    vm_vcpu_changed(c->cpu, VM_STATE_ALL);
    return vm_round_stopped(c->cpu, c->cpu->round, stop);
}

static int perform(vm_vcpu *cpu, vm_binding *b, uint64_t at)
{
    call c = { .cpu = cpu, .b = b };
    vm_value result = { 0 };
    int reason = 0;
    uint64_t rip = cpu->x86.rip;
    atomic_fetch_add(&b->refs, 1);
    if (!open_call(&c)) {
        reason = raise_fault(&c, at);
    } else {
        int status = call_host(&c, &result);
        for (unsigned i = 0; i < b->s.values; i++)
            if (c.spans[i].gva)
                close_span(&c, &c.spans[i]);
        if (status)
            reason = VM_EXIT_HOOK;
        else if (cpu->x86.rip == rip)
            make_return(&c, &result);
    }
    free_spans(&c);
    drop(b);
    return reason;
}

int vm_binding_at(vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    if (!cpu->machine->bindings)
        return VM_NOT_BOUND;
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    uint64_t at = x->code_size == 8 ? x->rip : (uint32_t)(x->seg[X86_CS].base + x->rip);
    vm_binding *b = find(cpu->machine, false, at);
    return b ? perform(cpu, b, x->rip) : VM_NOT_BOUND;
}

int vm_binding_hypercall(vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    vm_binding *b = cpu->machine->bindings
        ? find(cpu->machine, true, x->code_size == 8 ? x->gpr[X86_RAX] : (uint32_t)x->gpr[X86_RAX]) : NULL;
    return b ? perform(cpu, b, x->rip - 3) : VM_NOT_BOUND;             /* VMCALL and VMMCALL have three bytes */
}
