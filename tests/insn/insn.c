/* insn.c - runs the cases of cases*.S: each in every environment it names, on every backend there is, and in several ways:
 * as a whole, one instruction a run (where budgets are exact), and for faults both as an exit record and delivered through the
 * interrupt table. All ways must give the same end state, and that state is the one written in the case.
 *
 * What a case does not name must not change: general registers, selectors, RFLAGS, and the memory from W_DATA to W_NP. */
#include "cases.h"
#include "../test.h"

typedef struct record { uint64_t op, a, b, c; } record;
extern const record cases_begin[], cases_end[];

typedef struct insn_case {
    const record *first, *last;             /* [first, last) */
    const char *name;
    unsigned bits, envs;
} insn_case;

typedef struct run_case {
    const insn_case *c;
    const world_env *env;
    vm_backend backend;
} run_case;

enum way { WHOLE, STEPWISE, DELIVERED, WAYS };
static const char *const way_names[WAYS] = { "whole", "stepwise", "delivered" };

/* What the world should look like at the end. */
typedef struct expectation {
    uint64_t gpr[16], flags, flags_mask;
    uint64_t gpr_mask[16];
    unsigned char memory[W_NP - W_DATA];
    uint16_t selector[6];
    bool selector_named[6];
    uint64_t end;
} expectation;

#define FLAGS_COMPARED UINT64_C(0x3e7fd5)   /* all but RF, reserved bits and TF's neighbours in the high half */

static const record *find(const insn_case *c, uint64_t op)
{
    for (const record *r = c->first; r < c->last; r++)
        if (r->op == op)
            return r;
    return NULL;
}

static uint64_t pattern(unsigned i, unsigned bits)
{
    uint64_t v = UINT64_C(0xc0de00005a5a0000) | (uint64_t)(i * 0x11) << 40 | i * 0x1101u;
    return bits == 64 ? v : (uint32_t)v;
}

static void set_wide(world *w, int reg, uint64_t lo, uint64_t hi)
{
    unsigned char image[32] = { 0 };
    memcpy(image, &lo, 8);
    memcpy(image + 8, &hi, 8);
    OK(vm_vcpu_write_reg(w->cpu, reg, image, vm_reg_size(reg)));
}

static void apply_inputs(world *w, const insn_case *c, expectation *x)
{
    unsigned bits = w->env->bits;
    uint64_t flags = 2 | (w->env->bit == ENV_V86 ? 0x20000 : 0);
    const record *start = find(c, OP_START), *end = find(c, OP_END);
    if (!start || !end)
        FAIL("%s: no CODE or END", c->name);
    world_poke(w, W_CODE, (const void *)start->a, end->a - start->a);
    x->end = W_CODE + end->a - start->a;
    for (unsigned i = 0; i < (bits == 64 ? 16 : 8); i++)
        if (i != 4)
            world_set(w, VM_REG_RAX + (int)i, pattern(i, bits));
    for (const record *r = c->first; r < c->last; r++) {
        if (r->op == OP_IN && r->a == VM_REG_RFLAGS)
            flags |= r->b;
        else if (r->op == OP_IN)
            set_wide(w, (int)r->a, bits != 64 && r->a <= VM_REG_RIP ? (uint32_t)r->b : r->b, r->c);
        else if (r->op == OP_MEMIN)
            world_poke(w, r->a, &r->c, r->b);
    }
    world_set(w, VM_REG_RFLAGS, flags);
}

static void expect(world *w, const insn_case *c, expectation *x)
{
    for (int i = 0; i < 16; i++) {
        x->gpr[i] = world_get(w, VM_REG_RAX + i);
        x->gpr_mask[i] = w->env->bits == 64 ? ~UINT64_C(0) : 0xffffffff;
    }
    for (int i = 0; i < 6; i++)
        x->selector[i] = (uint16_t)world_get(w, VM_REG_ES + i);
    x->flags = world_get(w, VM_REG_RFLAGS);
    x->flags_mask = FLAGS_COMPARED;
    OK(vm_read(w->m, W_DATA, x->memory, sizeof x->memory));
    for (const record *r = c->first; r < c->last; r++) {
        if (r->op == OP_OUT && r->a >= VM_REG_RAX && r->a <= VM_REG_R15) {
            x->gpr[r->a - VM_REG_RAX] = r->b;
            x->gpr_mask[r->a - VM_REG_RAX] &= r->c;
        } else if (r->op == OP_OUT && r->a >= VM_REG_ES && r->a <= VM_REG_GS) {
            x->selector[r->a - VM_REG_ES] = (uint16_t)r->b;
        } else if (r->op == OP_FLAGS) {
            x->flags = (x->flags & ~r->b) | (r->a & r->b);
            x->flags_mask &= ~r->c;
        } else if (r->op == OP_MEM && r->a >= W_DATA && r->a + r->b <= W_NP) {
            memcpy(x->memory + (r->a - W_DATA), &r->c, r->b);
        }
    }
}

static void check_registers(world *w, const expectation *x, bool is_delivered, const char *where)
{
    for (int i = 0; i < 16; i++) {
        uint64_t got = world_get(w, VM_REG_RAX + i) & x->gpr_mask[i], want = x->gpr[i] & x->gpr_mask[i];
        if (got != want && !(is_delivered && i == 4))
            FAIL("%s: %s is %#" PRIx64 ", not %#" PRIx64, where, vm_reg_name(VM_REG_RAX + i), got, want);
    }
    if (is_delivered)
        return;
    uint64_t flags = world_get(w, VM_REG_RFLAGS);
    if ((flags ^ x->flags) & x->flags_mask)
        FAIL("%s: rflags is %#" PRIx64 ", not %#" PRIx64 " (mask %#" PRIx64 ")", where, flags, x->flags, x->flags_mask);
    for (int i = 0; i < 6; i++)
        if ((uint16_t)world_get(w, VM_REG_ES + i) != x->selector[i])
            FAIL("%s: %s is %#" PRIx64 ", not %#x", where, vm_reg_name(VM_REG_ES + i), world_get(w, VM_REG_ES + i),
                 x->selector[i]);
}

static void check_wide(world *w, const record *r, const char *where)
{
    unsigned char image[32] = { 0 };
    uint64_t got[2];
    OK(vm_vcpu_read_reg(w->cpu, (int)r->a, image, vm_reg_size((int)r->a)));
    memcpy(got, image, 16);
    if (got[0] != r->b || got[1] != r->c)
        FAIL("%s: %s is %#" PRIx64 ":%016" PRIx64 ", not %#" PRIx64 ":%016" PRIx64, where, vm_reg_name((int)r->a), got[1],
             got[0], r->c, r->b);
}

static void check_others(world *w, const insn_case *c, const expectation *x, const char *where)
{
    unsigned char memory[W_NP - W_DATA];
    for (const record *r = c->first; r < c->last; r++) {
        if (r->op == OP_OUTX) {
            check_wide(w, r, where);
        } else if (r->op == OP_OUT && (r->a > VM_REG_GS || (r->a > VM_REG_R15 && r->a < VM_REG_ES))) {
            uint64_t got = world_get(w, (int)r->a);
            if ((got & r->c) != (r->b & r->c))
                FAIL("%s: %s is %#" PRIx64 ", not %#" PRIx64, where, vm_reg_name((int)r->a), got, r->b);
        } else if (r->op == OP_MEM && !(r->a >= W_DATA && r->a + r->b <= W_NP)) {
            uint64_t want = 0;
            memcpy(&want, &r->c, r->b);
            if (world_peek(w, r->a, (unsigned)r->b) != want)
                FAIL("%s: memory %#" PRIx64 " is %#" PRIx64 ", not %#" PRIx64, where, r->a,
                     world_peek(w, r->a, (unsigned)r->b), want);
        }
    }
    OK(vm_read(w->m, W_DATA, memory, sizeof memory));
    for (unsigned i = 0; i < sizeof memory; i++)
        if (memory[i] != x->memory[i])
            FAIL("%s: byte at %#x is %#x, not %#x", where, W_DATA + i, memory[i], x->memory[i]);
}

/* `is_free`: neither a budget nor exception exits, which KVM leaves to the interpreter: its own execution is what counts. */
static void run_to_end(world *w, enum way way, uint64_t end, bool wants_exceptions, bool is_free, vm_exit *exit)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.has_until = true;
    o.until = end;
    o.exception_exits = wants_exceptions && !is_free ? 0xffffffff : 0;
    o.max_instructions = way == STEPWISE ? 1 : is_free ? 0 : 20000;
    o.deadline_ns = 5000000000u;
    for (unsigned n = 0; n < 20000; n++) {
        *exit = (vm_exit)VM_EXIT_INIT;
        OK(vm_vcpu_run(w->cpu, &o, exit));
        if (way != STEPWISE || exit->reason != VM_EXIT_BUDGET || exit->rip == end)
            return;
    }
}

static void describe(const vm_exit *exit, char *text, size_t bytes)
{
    if (vm_exit_format(exit, text, bytes) <= 0)
        snprintf(text, bytes, "exit %d", exit->reason);
}

static void check_exception_exit(const insn_case *c, const record *f, const world_env *env, const vm_exit *exit,
                                 const char *where)
{
    char text[200];
    const record *cr2 = find(c, OP_CR2);
    describe(exit, text, sizeof text);
    if (exit->reason != VM_EXIT_EXCEPTION || exit->exception.vector != f->b)
        FAIL("%s: %s; not exception %d", where, text, (int)f->b);
    if (exit->rip != W_CODE + f->a)
        FAIL("%s: %s; rip is not %#" PRIx64, where, text, W_CODE + f->a);
    if (env->bit != ENV_REAL) {
        if (exit->exception.has_error != (f->c != ~UINT64_C(0)))
            FAIL("%s: %s; has_error is wrong", where, text);
        if (exit->exception.has_error && exit->exception.error != f->c)
            FAIL("%s: %s; error is not %#" PRIx64, where, text, f->c);
    }
    if (cr2 && exit->exception.address != cr2->a)
        FAIL("%s: %s; address is not %#" PRIx64, where, text, cr2->a);
}

static void check_delivery(world *w, const insn_case *c, const record *f, const expectation *x, const vm_exit *exit,
                           const char *where)
{
    char text[200];
    bool has_error = f->c != ~UINT64_C(0), is_real = w->env->bit == ENV_REAL;
    const record *cr2 = find(c, OP_CR2), *dr6 = find(c, OP_DR6);
    describe(exit, text, sizeof text);
    if (exit->reason != VM_EXIT_HALT)
        FAIL("%s: %s; not halt in a handler", where, text);
    world_frame fr = world_read_frame(w, has_error && !is_real);
    if (fr.vector != (int)f->b)
        FAIL("%s: %s; handler %d, not %d", where, text, fr.vector, (int)f->b);
    if (fr.rip != W_CODE + f->a)
        FAIL("%s: pushed rip is %#" PRIx64 ", not %#" PRIx64, where, fr.rip, W_CODE + f->a);
    if (fr.cs != x->selector[1])
        FAIL("%s: pushed cs is %#" PRIx64 ", not %#x", where, fr.cs, x->selector[1]);
    if (has_error && !is_real && fr.error != f->c)
        FAIL("%s: error code is %#" PRIx64 ", not %#" PRIx64, where, fr.error, f->c);
    if ((fr.flags ^ x->flags) & x->flags_mask & (is_real ? 0xffff : ~UINT64_C(0)))
        FAIL("%s: pushed flags are %#" PRIx64 ", not %#" PRIx64, where, fr.flags, x->flags);
    if ((w->env->bit & ENV_LONG || w->env->is_user) && ((fr.rsp ^ x->gpr[4]) & x->gpr_mask[4]))
        FAIL("%s: pushed rsp is %#" PRIx64 ", not %#" PRIx64, where, fr.rsp, x->gpr[4]);
    if (cr2 && world_get(w, VM_REG_CR2) != cr2->a)
        FAIL("%s: cr2 is %#" PRIx64 ", not %#" PRIx64, where, world_get(w, VM_REG_CR2), cr2->a);
    if (dr6 && world_get(w, VM_REG_DR6) != dr6->a)
        FAIL("%s: dr6 is %#" PRIx64 ", not %#" PRIx64, where, world_get(w, VM_REG_DR6), dr6->a);
}

static void run_way(const run_case *rc, enum way way)
{
    static world w;
    static expectation x;
    const insn_case *c = rc->c;
    const record *fault = find(c, OP_FAULT), *stop = find(c, OP_STOP);
    vm_exit exit;
    char text[200];
    const char *where = way_names[way];
    if (!fault)
        fault = find(c, OP_TRAP);
    if (way == DELIVERED && !fault)
        return;
    if (!fault)
        fault = find(c, OP_FAULTX);
    if (way != DELIVERED && fault && fault->b >= 32)
        return;                                 /* INT n is no exception */
    memset(&x, 0, sizeof x);
    world_open(&w, rc->backend, rc->env);
    apply_inputs(&w, c, &x);
    expect(&w, c, &x);
    bool is_free = rc->backend == VM_BACKEND_KVM && (way == DELIVERED || (way == WHOLE && !fault));
    run_to_end(&w, way, x.end, way != DELIVERED, is_free, &exit);
    if (fault && way != DELIVERED) {
        check_exception_exit(c, fault, rc->env, &exit, where);
    } else if (fault) {
        check_delivery(&w, c, fault, &x, &exit, where);
    } else if (stop) {
        describe(&exit, text, sizeof text);
        if (exit.reason != (vm_exit_reason)stop->a || exit.rip != W_CODE + stop->b)
            FAIL("%s: %s; not %s at %#" PRIx64, where, text, vm_exit_name((int)stop->a), W_CODE + stop->b);
    } else if (exit.reason != VM_EXIT_UNTIL && !(way == STEPWISE && exit.reason == VM_EXIT_BUDGET && exit.rip == x.end)) {
        describe(&exit, text, sizeof text);
        FAIL("%s: %s", where, text);
    }
    check_registers(&w, &x, way == DELIVERED, where);
    check_others(&w, c, &x, where);
    world_close(&w);
}

static void run_one(const void *arg)
{
    const run_case *rc = arg;
    uint64_t exact = 0;
    OK(vm_query(rc->backend, "exact-budget", &exact));
    for (int way = WHOLE; way < WAYS; way++)
        if (exact || way != STEPWISE)
            run_way(rc, (enum way)way);
}

static void add_case(const insn_case *c)
{
    for (unsigned e = 0; e < WORLD_ENVS; e++) {
        if (world_envs[e].bits != c->bits || !(world_envs[e].bit & c->envs))
            continue;
        for (unsigned b = 0; b < world_backend_count(); b++) {
            char name[200];
            run_case *rc = malloc(sizeof *rc);
            if (!rc)
                abort();
            *rc = (run_case){ c, &world_envs[e], world_backends[b] };
            snprintf(name, sizeof name, "%s@%s/%s", c->name, world_envs[e].name, vm_backend_name(world_backends[b]));
            test_add(name, run_one, rc, 20);
        }
    }
}

SETUP(cases)
{
    for (const record *r = cases_begin; r < cases_end;) {
        insn_case *c = calloc(1, sizeof *c);
        if (!c || r->op != OP_CASE)
            abort();
        *c = (insn_case){ r, r + 1, (const char *)r->a, (unsigned)r->b, (unsigned)r->c };
        while (c->last < cases_end && c->last->op != OP_CASE)
            c->last++;
        r = c->last;
        add_case(c);
    }
}
