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

#if defined INSN_HOOKED
#include "hooked.inc"
#elif defined INSN_SNAPSHOTS
#include "snapshots.inc"
#else
enum way { WHOLE, STEPWISE, DELIVERED, WAYS };
static const char *const way_names[WAYS] = { "whole", "stepwise", "delivered" };
static bool is_sliced(enum way way) { return way == STEPWISE; }
static bool is_delivered(enum way way) { return way == DELIVERED; }
static void prepare(world *w, enum way way, const char *name) { (void)w, (void)way, (void)name; }
static void between(world *w, enum way way, vm_run_options *o)
{
    (void)w;
    o->max_instructions = way == STEPWISE ? 1 : o->max_instructions;
}
#endif

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
    o.has_until = !is_free;
    o.until = end;
    o.exception_exits = wants_exceptions && !is_free ? 0xffffffff : 0;
    o.max_instructions = is_free ? 0 : 20000;
    o.deadline_ns = TEST_SECONDS(5);
    for (unsigned n = 0; n < 20000; n++) {
        *exit = (vm_exit)VM_EXIT_INIT;
        between(w, way, &o);
        OK(vm_vcpu_run(w->cpu, &o, exit));
        if (!is_sliced(way) || (exit->reason != VM_EXIT_BUDGET && exit->reason != VM_EXIT_STEP) || exit->rip == end)
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
    uint64_t rip = W_CODE + (f->op == OP_SOFT ? f->c : f->a), error = f->op == OP_SOFT ? ~UINT64_C(0) : f->c;
    if (exit->rip != rip)
        FAIL("%s: %s; rip is not %#" PRIx64, where, text, rip);
    if (env->bit != ENV_REAL) {
        if (exit->exception.has_error != (error != ~UINT64_C(0)))
            FAIL("%s: %s; has_error is wrong", where, text);
        if (exit->exception.has_error && exit->exception.error != error)
            FAIL("%s: %s; error is not %#" PRIx64, where, text, error);
    }
    if (cr2 && exit->exception.address != cr2->a)
        FAIL("%s: %s; address is not %#" PRIx64, where, text, cr2->a);
}

static void check_delivery(world *w, const insn_case *c, const record *f, const expectation *x, const vm_exit *exit,
                           const char *where)
{
    char text[200];
    bool has_error = f->op != OP_SOFT && f->c != ~UINT64_C(0), is_real = w->env->bit == ENV_REAL;
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
    if (!fault)
        fault = find(c, OP_SOFT);
    if (is_delivered(way) && !fault)
        return;
    if (!fault)
        fault = find(c, OP_FAULTX);
    if (!is_delivered(way) && fault && fault->b >= 32)
        return;                                 /* INT n is no exception */
    memset(&x, 0, sizeof x);
    world_open(&w, rc->backend, rc->env);
    prepare(&w, way, c->name);
    apply_inputs(&w, c, &x);
    expect(&w, c, &x);
    bool is_free = rc->backend == VM_BACKEND_KVM &&
                   (is_delivered(way) || (!is_sliced(way) && !fault && !(stop && stop->a == VM_EXIT_EXCEPTION)));
    if (is_free)
        world_poke(&w, x.end, "\xe6\x80", 2);           /* OUT 80h, AL: an end that needs no breakpoint */
    run_to_end(&w, way, x.end, !is_delivered(way), is_free, &exit);
    if (is_free && exit.reason == VM_EXIT_IO && exit.rip == x.end)
        exit.reason = VM_EXIT_UNTIL;
    if (fault && !is_delivered(way)) {
        check_exception_exit(c, fault, rc->env, &exit, where);
    } else if (fault) {
        check_delivery(&w, c, fault, &x, &exit, where);
    } else if (stop) {
        describe(&exit, text, sizeof text);
        if (exit.reason != (vm_exit_reason)stop->a || exit.rip != W_CODE + stop->b)
            FAIL("%s: %s; not %s at %#" PRIx64, where, text, vm_exit_name((int)stop->a), W_CODE + stop->b);
    } else if (exit.reason != VM_EXIT_UNTIL && !(is_sliced(way) && (exit.reason == VM_EXIT_BUDGET || exit.reason == VM_EXIT_STEP) && exit.rip == x.end)) {
        describe(&exit, text, sizeof text);
        FAIL("%s: %s", where, text);
    }
    check_registers(&w, &x, is_delivered(way), where);
    check_others(&w, c, &x, where);
    world_close(&w);
}

/* Hosts that emulate guest ring 0 (and all of compatibility mode) in software do some things differently from any CPU. Nothing
 * of libvm is between the guest and that emulator, so these cases say nothing about libvm there. */
static const struct { const char *cases, *why; } kvm_emulator_limits[] = {
    { " aaa_carries_into_ah@c32 aas_borrows_from_ah@c32 arpl_raises_rpl@c32 bound_inside@c32 bound_outside@c32"
      " daa_adjusts_both@c32 enter_leave_level_2@c32 icebp@c32 int3_is_a_trap@c32 int_from_user_to_user_gate@c32"
      " into_with_overflow@c32 lar_lsl_of_data@c32 lar_of_null_clears_zf@c32 int_from_user@u64 vpmaskmov_elements_wrap_at_64k@p16"
      " vpmaskmov_element_at_the_end_of_64k@p16 vpmaskmov_elements_wrap_at_4_gib@f64 ",
      "this host's KVM raises #UD for it" },
    { " trap_flag_on_rep_is_per_iteration@c32 trap_flag_on_rep_is_per_iteration@k64 trap_flag_on_rep_is_per_iteration@p16"
      " trap_flag_on_rep_is_per_iteration@p32 trap_flag_on_rep_is_per_iteration@real trap_flag_on_rep_is_per_iteration@f64"
      " trap_flag_with_mov_ss@c32 trap_flag_with_mov_ss@k64 trap_flag_with_mov_ss@p16 trap_flag_with_mov_ss@p32"
      " trap_flag_with_mov_ss@real trap_flag_with_mov_ss@f64 ", "this host's KVM traps at another instruction boundary" },
    { " rmw_across_into_read_only_page_k@k64 rmw_across_into_read_only_page_u@c32 write_across_into_read_only_page_k@k64"
      " write_across_into_read_only_page_u@c32 ", "this host's KVM writes the first page before it looks at the second" },
    { " straddling_the_canonical_hole@k64 straddling_the_canonical_hole@u64 syscall_without_sce@u64 icebp@u64"
      " access_over_the_end_of_4_gib@p32 access_over_the_end_of_4_gib@c32 access_over_the_end_of_4_gib_by_ebp@p32"
      " access_over_the_end_of_4_gib_by_ebp@c32 cmpxchg16b_misaligned_before_canonical@f64 cmpxchg16b_misaligned_before_canonical@k64"
      " cmpxchg16b_misaligned_before_canonical@u64 ",
      "this host's KVM raises another exception" },
};

static void skip_what_kvm_emulates(const run_case *rc)
{
    char name[100];
    uint64_t is_hardware = 0;
    snprintf(name, sizeof name, " %s@%s ", rc->c->name, rc->env->name);
    for (size_t i = 0; i < sizeof kvm_emulator_limits / sizeof *kvm_emulator_limits; i++)
        if (strstr(kvm_emulator_limits[i].cases, name) &&
            vm_query(VM_BACKEND_KVM, "hardware-ring0", &is_hardware) == VM_OK && !is_hardware)
            test_skip("%s", kvm_emulator_limits[i].why);
}

static void run_one(const void *arg)
{
    const run_case *rc = arg;
    uint64_t exact = 0;
    if (rc->backend == VM_BACKEND_KVM)
        skip_what_kvm_emulates(rc);
    OK(vm_query(rc->backend, "exact-budget", &exact));
    for (int way = 0; way < WAYS; way++)
        if (exact || !is_sliced((enum way)way))
            run_way(rc, (enum way)way);
}

static bool add_case(const insn_case *c)
{
    bool is_used = false;
    for (unsigned e = 0; e < WORLD_ENVS; e++) {
        if (world_envs[e].bits != c->bits || !(world_envs[e].bit & c->envs))
            continue;
        for (unsigned b = 0; b < world_backend_count(); b++) {
            char name[200];
#ifdef INSN_HOOKED
            if (world_backends[b] == VM_BACKEND_KVM)
                continue;                               /* serves no hooks */
#endif
            run_case *rc = malloc(sizeof *rc);
            if (!rc)
                abort();
            *rc = (run_case){ c, &world_envs[e], world_backends[b] };
            snprintf(name, sizeof name, "%s@%s/%s", c->name, world_envs[e].name, vm_backend_name(world_backends[b]));
            test_add(name, run_one, rc, 20);
            is_used = true;
        }
    }
    return is_used;
}

/* Names the reason where the KVM column is missing. */
TEST(kvm_column)
{
    uint64_t available = 0;
    OK(vm_query(VM_BACKEND_KVM, "available", &available));
    if (!available)
        test_skip("%s", vm_errmsg());
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
        if (!add_case(c))
            free(c);
    }
}
