/* hooks.c - hooks, breakpoints, watchpoints, single steps: what callbacks see, what they may do, and when they end. */
#include "../backends.h"
#include <pthread.h>
#include <stdatomic.h>

#define CODE 0x1000u
#define DATA 0x8000u
#define STACK 0x7000u
#define SOFTWARE(name)                                                                                  \
    static void soft_##name(vm_backend backend);                                                        \
    EACH_BACKEND(name)                                                                                  \
    {                                                                                                   \
        if (backend == VM_BACKEND_KVM)                                                                  \
            test_skip("KVM serves no hooks");                                                           \
        soft_##name(backend);                                                                           \
    }                            \
    static void soft_##name(vm_backend backend)

typedef struct rig {
    vm_machine *m;
    vm_vcpu *cpu;
} rig;

static uint64_t get(vm_vcpu *cpu, int reg)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(cpu, reg, &v, vm_reg_size(reg)));
    return v;
}

static void set(vm_vcpu *cpu, int reg, uint64_t v)
{
    OK(vm_vcpu_write_reg(cpu, reg, &v, vm_reg_size(reg)));
}

static vm_exit run(rig *r, const vm_run_options *o)
{
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(r->cpu, o, &e));
    return e;
}

/* A backend may treat a vCPU's first instructions in a way of its own: get past them. */
static void warm_up(rig *r)
{
    static const char loop[] = "\xb9\xa0\x0f\x00\x00\xff\xc9\x75\xfc\xf4";     /* mov ecx, 4000; 1: dec ecx; jnz 1b; hlt */
    OK(vm_write(r->m, 0x100, loop, sizeof loop - 1));
    set(r->cpu, VM_REG_RIP, 0x100);
    CHECK_EQ(run(r, NULL).reason, VM_EXIT_HALT);
}

static rig make(vm_backend backend, vm_mode mode, const void *code, size_t bytes)
{
    vm_options o = VM_OPTIONS_INIT;
    rig r = { NULL, NULL };
    o.backend = backend;
    OK(vm_create(&o, &r.m));
    OK(vm_map_ram(r.m, 0, 0x10000, VM_PROT_RWX, NULL));
    r.cpu = vm_vcpu_get(r.m, 0);
    OK(vm_vcpu_set_mode(r.cpu, mode));
    warm_up(&r);
    OK(vm_vcpu_set_mode(r.cpu, mode));
    OK(vm_write(r.m, CODE, code, bytes));
    set(r.cpu, VM_REG_RIP, CODE);
    set(r.cpu, VM_REG_RSP, STACK);
    return r;
}
#define MAKE(code) make(backend, VM_MODE_FLAT64, code, sizeof code - 1)

/* ---- a log of events ---- */

typedef struct log_entry {
    vm_hook_event e;
    uint64_t rip, rflags, rax, rcx, retired;
    int tag;
} log_entry;
typedef struct event_log {
    unsigned n;
    log_entry at[256];
} event_log;
typedef struct tagged { event_log *log; int tag; } tagged;

static vm_hook_result record(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    tagged *t = user;
    if (t->log->n == 256)
        FAIL("too many events");
    log_entry *a = &t->log->at[t->log->n++];
    a->e = *e;
    a->tag = t->tag;
    a->rip = get(cpu, VM_REG_RIP);
    a->rflags = get(cpu, VM_REG_RFLAGS);
    a->rax = get(cpu, VM_REG_RAX);
    a->rcx = get(cpu, VM_REG_RCX);
    a->retired = vm_vcpu_retired(cpu);
    if (e->data)
        CHECK(!memcmp(e->data, &e->value, e->bytes < 8 ? e->bytes : 8));
    return VM_HOOK_CONTINUE;
}

static vm_hook *hook(rig *r, vm_hook_kind kind, uint64_t begin, uint64_t end, vm_hook_fn fn, void *user)
{
    vm_hook_desc d = VM_HOOK_INIT;
    vm_hook *h = NULL;
    d.kind = kind;
    d.begin = begin;
    d.end = end;
    d.fn = fn;
    d.user = user;
    OK(vm_hook_add(r->m, &d, &h));
    return h;
}

/* ---- what is reported ---- */

/* 1000 mov eax,0x7fffffff  1005 add eax,1 (OF SF AF PF)  1008 nop  1009 mov ecx,2  100e: dec ecx  1010 jnz 100e
 * 1012 hlt */
static const char COUNTING[] = "\xb8\xff\xff\xff\x7f\x83\xc0\x01\x90\xb9\x02\x00\x00\x00\xff\xc9\x75\xfc\xf4";

SOFTWARE(insn_sees_exact_registers)
{
    static const unsigned rip[] = { 0x1000, 0x1005, 0x1008, 0x1009, 0x100e, 0x1010, 0x100e, 0x1010, 0x1012 };
    static const unsigned length[] = { 5, 3, 1, 5, 2, 2, 2, 2, 1 };
    rig r = MAKE(COUNTING);
    event_log log = { 0 };
    tagged t = { &log, 0 };
    set(r.cpu, VM_REG_RAX, 0);
    hook(&r, VM_HOOK_INSN, 0, 0, record, &t);
    uint64_t before = vm_vcpu_retired(r.cpu);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(log.n, 9);
    for (unsigned i = 0; i < 9; i++) {
        CHECK_EQ(log.at[i].e.kind, VM_HOOK_INSN);
        CHECK_EQ(log.at[i].e.address, rip[i]);
        CHECK_EQ(log.at[i].rip, rip[i]);
        CHECK_EQ(log.at[i].e.bytes, length[i]);
        CHECK_EQ(log.at[i].retired, before + i);
    }
    CHECK_EQ(log.at[1].rax, 0x7fffffff);
    CHECK_EQ(log.at[2].rax, 0x80000000);
    CHECK_EQ(log.at[2].rflags & 0x8d5, 0x894);
    CHECK_EQ(log.at[3].rflags & 0x8d5, 0x894);
    CHECK_EQ(log.at[5].rcx, 1);
    CHECK_EQ(log.at[5].rflags & 0x8d5, 0);
    CHECK_EQ(log.at[8].rflags & 0x8d5, 0x44);
    CHECK_EQ(log.at[1].e.value & 0xffffff, 0x01c083);
    CHECK_EQ(get(r.cpu, VM_REG_RAX), 0x80000000);
    vm_destroy(r.m);
}

SOFTWARE(insn_ranges)
{
    rig r = MAKE(COUNTING);
    event_log log = { 0 };
    tagged t = { &log, 0 };
    vm_hook_desc d = VM_HOOK_INIT;
    hook(&r, VM_HOOK_INSN, 0x1009, 0x100f, record, &t);
    d.kind = VM_HOOK_INSN;
    d.begin = d.end = 0;
    d.flags = VM_HOOK_EXACT;
    d.fn = record;
    d.user = &t;
    OK(vm_hook_add(r.m, &d, NULL));                      /* only address 0: never */
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(log.n, 3);
    CHECK_EQ(log.at[0].e.address, 0x1009);
    CHECK_EQ(log.at[2].e.address, 0x100e);
    vm_destroy(r.m);
}

SOFTWARE(blocks_and_edges)
{
    rig r = MAKE(COUNTING);
    event_log blocks = { 0 }, edges = { 0 };
    tagged b = { &blocks, 0 }, e = { &edges, 0 };
    hook(&r, VM_HOOK_BLOCK, 0, 0, record, &b);
    hook(&r, VM_HOOK_EDGE, 0, 0, record, &e);
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.max_instructions = 1;
    for (unsigned i = 0; i < 9; i++)                     /* cut into single instructions: the same events */
        CHECK_EQ(run(&r, i < 8 ? &o : NULL).reason, i < 8 ? VM_EXIT_BUDGET : VM_EXIT_HALT);
    CHECK_EQ(blocks.n, 3);
    CHECK_EQ(blocks.at[0].e.address, 0x1000);
    CHECK_EQ(blocks.at[1].e.address, 0x100e);
    CHECK_EQ(blocks.at[2].e.address, 0x1012);
    CHECK_EQ(edges.n, 2);
    CHECK_EQ(edges.at[0].e.from, 0x1010);
    CHECK_EQ(edges.at[0].e.address, 0x100e);
    CHECK_EQ(edges.at[1].e.from, 0x1010);
    CHECK_EQ(edges.at[1].e.address, 0x1012);
    set(r.cpu, VM_REG_RIP, CODE);
    blocks.n = edges.n = 0;
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);        /* in one go */
    CHECK_EQ(blocks.n, 3);
    CHECK_EQ(blocks.at[1].rip, 0x100e);
    CHECK_EQ(blocks.at[1].rcx, 1);
    CHECK_EQ(edges.n, 2);
    CHECK_EQ(edges.at[1].e.from, 0x1010);
    vm_destroy(r.m);
}

/* mov rbx,DATA; mov rax,0x1122334455667788; mov [rbx],rax; mov cl,[rbx+3]; add word [rbx+2],1; push rax; pop rdx;
 * movups xmm0,[rbx]; xchg [rbx],eax; call 1f; 1: hlt */
static const char ACCESSES[] = "\x48\xc7\xc3\x00\x80\x00\x00" "\x48\xb8\x88\x77\x66\x55\x44\x33\x22\x11" "\x48\x89\x03"
    "\x8a\x4b\x03" "\x66\x83\x43\x02\x01" "\x50" "\x5a" "\x0f\x10\x03" "\x87\x03" "\xe8\x00\x00\x00\x00" "\xf4";

static const struct access { int kind; unsigned address, bytes; uint64_t value; } ACCESS_LOG[] = {
    { VM_HOOK_MEM_WRITE, DATA, 8, 0x1122334455667788 }, { VM_HOOK_MEM_READ, DATA + 3, 1, 0x55 },
    { VM_HOOK_MEM_READ, DATA + 2, 2, 0x5566 },          { VM_HOOK_MEM_WRITE, DATA + 2, 2, 0x5567 },
    { VM_HOOK_MEM_WRITE, STACK - 8, 8, 0x1122334455667788 }, { VM_HOOK_MEM_READ, STACK - 8, 8, 0x1122334455667788 },
    { VM_HOOK_MEM_READ, DATA, 16, 0x1122334455677788 }, { VM_HOOK_MEM_READ, DATA, 4, 0x55677788 },
    { VM_HOOK_MEM_WRITE, DATA, 4, 0x55667788 },         { VM_HOOK_MEM_WRITE, STACK - 8, 8, 0x1028 },
};

static void check_accesses(const event_log *log, uint64_t begin, uint64_t end)
{
    unsigned n = 0;
    for (unsigned i = 0; i < sizeof ACCESS_LOG / sizeof *ACCESS_LOG; i++) {
        const struct access *a = &ACCESS_LOG[i];
        if (a->address + a->bytes - 1 < begin || a->address > end)
            continue;
        CHECK(n < log->n);
        CHECK_EQ(log->at[n].e.kind, a->kind);
        CHECK_EQ(log->at[n].e.address, a->address);
        CHECK_EQ(log->at[n].e.bytes, a->bytes);
        CHECK_EQ(log->at[n].e.value, a->value);
        n++;
    }
    CHECK_EQ(log->n, n);
}

SOFTWARE(memory_everywhere)
{
    rig r = MAKE(ACCESSES);
    event_log log = { 0 };
    tagged t = { &log, 0 };
    hook(&r, VM_HOOK_MEM_READ, 0, 0, record, &t);
    hook(&r, VM_HOOK_MEM_WRITE, 0, 0, record, &t);
    for (unsigned i = 0; i < 3; i++) {
        log.n = 0;
        set(r.cpu, VM_REG_RIP, CODE);
        set(r.cpu, VM_REG_RSP, STACK);
        CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
        check_accesses(&log, 0, UINT64_MAX);
    }
    vm_destroy(r.m);
}

SOFTWARE(memory_ranges)
{
    static const struct { uint64_t begin, end; } range[] = { { DATA, DATA }, { DATA + 3, DATA + 3 }, { DATA + 15, DATA + 15 },
                                                             { STACK - 8, STACK - 1 }, { STACK - 1, STACK - 1 } };
    for (unsigned k = 0; k < 10; k++) {
        rig r = MAKE(ACCESSES);
        event_log log = { 0 };
        tagged t = { &log, 0 };
        vm_hook_desc d = VM_HOOK_INIT;
        d.fn = record;
        d.user = &t;
        d.begin = range[k / 2].begin;
        d.end = range[k / 2].end;
        d.flags = k & 1 ? VM_HOOK_GPA : 0;
        for (d.kind = VM_HOOK_MEM_READ; d.kind <= VM_HOOK_MEM_WRITE; d.kind++)
            OK(vm_hook_add(r.m, &d, NULL));
        CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
        check_accesses(&log, d.begin, d.end);
        vm_destroy(r.m);
    }
}

/* mov rdi,DATA; mov ecx,3; mov al,7; rep stosb; hlt */
static const char STRING[] = "\x48\xc7\xc7\x00\x80\x00\x00\xb9\x03\x00\x00\x00\xb0\x07\xf3\xaa\xf4";

SOFTWARE(strings_report_each_iteration)
{
    rig r = MAKE(STRING);
    event_log log = { 0 }, insns = { 0 };
    tagged t = { &log, 0 }, i = { &insns, 0 };
    hook(&r, VM_HOOK_MEM_WRITE, 0, 0, record, &t);
    hook(&r, VM_HOOK_INSN, 0, 0, record, &i);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(log.n, 3);
    for (unsigned k = 0; k < 3; k++) {
        CHECK_EQ(log.at[k].e.address, DATA + k);
        CHECK_EQ(log.at[k].e.value, 7);
        CHECK_EQ(log.at[k].rcx, 3 - k);
        CHECK_EQ(log.at[k].rip, 0x100e);
    }
    CHECK_EQ(insns.n, 5);
    vm_destroy(r.m);
}

/* mov eax,1; mov edx,0x10; out dx,al; in al,dx; cpuid; mov ecx,0x10; rdmsr; wrmsr; ud2; hlt */
static const char SYSTEM[] = "\xb8\x01\x00\x00\x00\xba\x10\x00\x00\x00\xee\xec\x0f\xa2\xb9\x74\x01\x00\x00\x0f\x32\x0f\x30\x0f\x0b\xf4";

static int port_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user, (void)cpu, (void)offset, (void)width;
    *value = 0x5a;
    return 0;
}

static int port_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    ++*(unsigned *)user;
    return 0;
}

static vm_hook_result record_and_skip(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    record(user, cpu, e);
    return VM_HOOK_SKIP;
}

SOFTWARE(system_events)
{
    rig r = MAKE(SYSTEM);
    vm_io_ops ops = VM_IO_OPS_INIT;
    unsigned writes = 0;
    event_log log = { 0 };
    tagged t = { &log, 0 };
    ops.read = port_read;
    ops.write = port_write;
    OK(vm_map_pio(r.m, 0x10, 1, &ops, &writes, NULL));
    hook(&r, VM_HOOK_PORT, 0x10, 0x10, record, &t);
    hook(&r, VM_HOOK_CPUID, 0, 0, record, &t);
    hook(&r, VM_HOOK_MSR, 0x174, 0x174, record, &t);
    hook(&r, VM_HOOK_EXCEPTION, 6, 6, record_and_skip, &t);
    vm_exit e = run(&r, NULL);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 0x101a);
    CHECK_EQ(writes, 1);
    CHECK_EQ(log.n, 6);
    CHECK_EQ(log.at[0].e.kind, VM_HOOK_PORT);
    CHECK_EQ(log.at[0].e.flags, VM_EVENT_WRITE);
    CHECK_EQ(log.at[0].e.value, 1);
    CHECK_EQ(log.at[1].e.flags, 0);
    CHECK_EQ(log.at[1].e.value, 0x5a);
    CHECK_EQ(log.at[2].e.kind, VM_HOOK_CPUID);
    CHECK_EQ(log.at[2].e.address, 0x5a);
    CHECK_EQ(log.at[3].e.kind, VM_HOOK_MSR);
    CHECK_EQ(log.at[3].e.address, 0x174);
    CHECK_EQ(log.at[4].e.flags, VM_EVENT_WRITE);
    CHECK_EQ(log.at[5].e.kind, VM_HOOK_EXCEPTION);
    CHECK_EQ(log.at[5].e.value, 6);
    CHECK_EQ(log.at[5].rip, 0x1017);
    vm_destroy(r.m);
}

/* ---- what callbacks may do ---- */

static vm_hook_result answer(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)cpu, (void)e;
    return *(vm_hook_result *)user;
}

SOFTWARE(insn_skip)
{
    rig r = MAKE(COUNTING);
    vm_hook_result skip = VM_HOOK_SKIP;
    hook(&r, VM_HOOK_INSN, 0x1005, 0x1005, answer, &skip);
    uint64_t before = vm_vcpu_retired(r.cpu);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(get(r.cpu, VM_REG_RAX), 0x7fffffff);
    CHECK_EQ(vm_vcpu_retired(r.cpu), before + 9);
    vm_destroy(r.m);
}

static vm_hook_result redirect(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)e;
    set(cpu, VM_REG_RIP, *(uint64_t *)user);
    return VM_HOOK_CONTINUE;
}

SOFTWARE(insn_redirect)
{
    rig r = MAKE(COUNTING);
    uint64_t to = 0x1012;
    hook(&r, VM_HOOK_INSN, 0x1008, 0x1008, redirect, &to);
    vm_exit e = run(&r, NULL);
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, 0x1013);
    CHECK_EQ(get(r.cpu, VM_REG_RAX), 0x80000000);
    CHECK_EQ(get(r.cpu, VM_REG_RCX), 0);
    vm_destroy(r.m);
}

/* To the next instruction: the one that the hook is about is left out all the same, or, after a memory hook, its branch. */
SOFTWARE(redirect_to_the_next_instruction)
{
    static const char code[] = "\xb8\x05\x00\x00\x00\xff\xc0\xff\x13\xf4";       /* mov eax, 5; inc eax; call [rbx]; hlt */
    static const struct { int kind; uint64_t at, to; unsigned wide; } rows[] = {
        { VM_HOOK_INSN, 0x1005, 0x1007, 0 }, { VM_HOOK_INSN, 0x1005, 0x1007, 1 }, { VM_HOOK_FETCH, 0x1005, 0x1007, 0 },
        { VM_HOOK_MEM_READ, DATA, 0x1009, 0 }, { VM_HOOK_MEM_READ, DATA, 0x1009, 1 },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        rig r = MAKE(code);
        uint64_t target = 0x100, to = rows[i].to;        /* the warm-up loop */
        vm_hook_result go = VM_HOOK_CONTINUE;
        OK(vm_write(r.m, DATA, &target, 8));
        set(r.cpu, VM_REG_RBX, DATA);
        set(r.cpu, VM_REG_RCX, 0);
        if (rows[i].wide)
            hook(&r, (vm_hook_kind)rows[i].kind, 0, UINT64_MAX, answer, &go);
        hook(&r, (vm_hook_kind)rows[i].kind, rows[i].at, rows[i].at, redirect, &to);
        vm_exit e = run(&r, NULL);
        bool is_read = rows[i].kind == VM_HOOK_MEM_READ;
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(e.rip, is_read ? 0x100a : 0x10a);
        CHECK_EQ(get(r.cpu, VM_REG_RAX), is_read ? 6 : 5);
        vm_destroy(r.m);
    }
}

/* A redirect in a memory hook counts after the instruction, also when that branches itself. */
SOFTWARE(memory_redirect)
{
    for (unsigned wide = 0; wide < 2; wide++) {
        rig r = MAKE(ACCESSES);
        uint64_t to = 0x100;                             /* the warm-up loop */
        set(r.cpu, VM_REG_RCX, 0);
        hook(&r, VM_HOOK_MEM_WRITE, wide ? 0 : STACK - 8, wide ? 0 : STACK - 1, redirect, &to);
        vm_exit e = run(&r, NULL);
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(e.rip, 0x10a);
        CHECK_EQ(get(r.cpu, VM_REG_RSP), wide ? STACK : STACK - 8);
        vm_destroy(r.m);
    }
}

static vm_hook_result change_registers(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)user, (void)e;
    set(cpu, VM_REG_RAX, 0x1234);
    set(cpu, VM_REG_R13, 0x5678);
    set(cpu, VM_REG_RFLAGS, 0x2 | 1);
    return VM_HOOK_CONTINUE;
}

/* mov eax,5; adc eax,0; mov rbx,r13; hlt */
static const char CARRY[] = "\xb8\x05\x00\x00\x00\x83\xd0\x00\x4c\x89\xeb\xf4";

SOFTWARE(insn_changes_registers)
{
    rig r = MAKE(CARRY);
    hook(&r, VM_HOOK_INSN, 0x1005, 0x1005, change_registers, NULL);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(get(r.cpu, VM_REG_RAX), 0x1235);
    CHECK_EQ(get(r.cpu, VM_REG_RBX), 0x5678);
    vm_destroy(r.m);
}

static vm_hook_result patch(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)user;
    OK(vm_write(vm_vcpu_machine(cpu), e->address, "\x90\x90\x90", 3));
    return VM_HOOK_CONTINUE;
}

SOFTWARE(insn_changes_its_instruction)
{
    rig r = MAKE(COUNTING);
    for (unsigned i = 0; i < 3; i++) {
        OK(vm_write(r.m, CODE, COUNTING, sizeof COUNTING - 1));
        set(r.cpu, VM_REG_RIP, CODE);
        vm_hook *h = hook(&r, VM_HOOK_INSN, 0x1005, 0x1005, patch, NULL);
        CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
        CHECK_EQ(get(r.cpu, VM_REG_RAX), 0x7fffffff);
        OK(vm_hook_remove(r.m, h));
    }
    vm_destroy(r.m);
}

typedef struct hostile { unsigned n; vm_snapshot *s, *to_free; bool frees; } hostile;

/* All that must wait until the vCPU rests is refused, in every kind of callback. */
static vm_hook_result be_hostile(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    hostile *h = user;
    vm_machine *m = vm_vcpu_machine(cpu), *clone = NULL;
    vm_snapshot *s = NULL;
    vm_exit exit = VM_EXIT_INIT;
    vm_value result;
    (void)e;
    h->n++;
    CHECK_EQ(vm_vcpu_run(cpu, NULL, &exit), VM_E_BUSY);
    CHECK_EQ(vm_vcpu_run(cpu, NULL, NULL), VM_E_BUSY);
    CHECK_EQ(vm_call(cpu, CODE, "u64()", NULL, 0, &result, NULL, &exit), VM_E_BUSY);
    CHECK_EQ(vm_snapshot_take(m, &s), VM_E_BUSY);
    CHECK(!s);
    CHECK_EQ(vm_snapshot_restore(m, h->s), VM_E_BUSY);
    CHECK_EQ(vm_fork(m, &clone), VM_E_BUSY);
    CHECK(!clone);
    vm_backend other = vm_machine_backend(m) == VM_BACKEND_JIT ? VM_BACKEND_INTERP : VM_BACKEND_JIT;
    CHECK_EQ(vm_backend_select(m, other), VM_E_BUSY);
    CHECK_EQ(vm_block_trace(cpu, NULL, 0, NULL), VM_E_BUSY);
    vm_destroy(m);                                       /* does nothing, but say so */
    CHECK(strstr(vm_errmsg(), "vm_destroy"));
    if (h->frees && h->n == 2)
        vm_snapshot_free(h->to_free);
    return VM_HOOK_CONTINUE;
}

SOFTWARE(callbacks_that_ask_too_much)
{
    for (unsigned frees = 0; frees < 2; frees++)
        for (int kind = 1; kind < VM_HOOK_KINDS; kind++) {
            bool is_system = kind >= VM_HOOK_EXCEPTION && kind != VM_HOOK_FETCH;
            rig r = is_system ? MAKE(SYSTEM) : MAKE(ACCESSES);
            vm_hook_result skip = VM_HOOK_SKIP;
            hostile h = { .frees = frees };
            OK(vm_snapshot_take(r.m, &h.s));
            OK(vm_snapshot_take(r.m, &h.to_free));
            hook(&r, VM_HOOK_EXCEPTION, 0, 0, answer, &skip);
            hook(&r, (vm_hook_kind)kind, 0, 0, be_hostile, &h);
            vm_exit e = run(&r, NULL);
            while (e.reason == VM_EXIT_IO)
                OK(vm_vcpu_run(r.cpu, NULL, &e));
            CHECK_EQ(e.reason, VM_EXIT_HALT);
            CHECK_EQ(h.n != 0, kind != VM_HOOK_SYSCALL && kind != VM_HOOK_INTERRUPT);
            if (!is_system)
                CHECK_EQ(get(r.cpu, VM_REG_RDX), 0x1122334455667788);
            vm_destroy(r.m);
        }
}

typedef struct unmapper { vm_region *r; unsigned n; } unmapper;
static vm_hook_result unmap_it(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    unmapper *u = user;
    (void)e;
    if (u->r)
        OK(vm_unmap(vm_vcpu_machine(cpu), u->r));
    u->r = NULL;
    u->n++;
    return VM_HOOK_CONTINUE;
}

/* mov rbx,0x20000; mov [rbx],eax; mov ecx,[rbx]; hlt */
static const char FAR[] = "\x48\xc7\xc3\x00\x00\x02\x00\x89\x03\x8b\x0b\xf4";

SOFTWARE(unmap_under_the_access)
{
    for (unsigned way = 0; way < 4; way++) {
        rig r = MAKE(FAR);
        unmapper u = { NULL, 0 };
        unsigned at = way & 2 ? 0 : 0x20000;
        OK(vm_map_ram(r.m, 0x20000, 0x1000, VM_PROT_RW, &u.r));
        hook(&r, way & 1 ? VM_HOOK_MEM_WRITE : VM_HOOK_MEM_READ, at, at, unmap_it, &u);
        vm_exit e = run(&r, NULL);
        if (way & 1) {                                   /* the write finds nothing, and is not reported twice */
            CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
            CHECK_EQ(e.mmio.is_write, 1);
            CHECK_EQ(e.rip, 0x1007);
            CHECK_EQ(u.n, 1);
            CHECK_EQ(vm_vcpu_run(r.cpu, NULL, &e), VM_OK);
            CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);        /* the read */
            CHECK_EQ(u.n, 1);
            e.mmio.data = 0x77;
            OK(vm_vcpu_run(r.cpu, NULL, &e));
            CHECK_EQ(get(r.cpu, VM_REG_RCX), 0x77);
        } else {
            CHECK_EQ(u.n, 1);
            if (e.reason == VM_EXIT_UNMAPPED)            /* the read was made again */
                OK(vm_vcpu_run(r.cpu, NULL, &e));
            CHECK_EQ(u.n, 1);
        }
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        vm_destroy(r.m);
    }
}

SOFTWARE(unmap_the_code)
{
    rig r = MAKE(COUNTING);
    unmapper u = { NULL, 0 };
    OK(vm_map_ram(r.m, 0x20000, 0x1000, VM_PROT_RWX, &u.r));
    OK(vm_write(r.m, 0x20000, COUNTING, sizeof COUNTING - 1));
    set(r.cpu, VM_REG_RIP, 0x20000);
    hook(&r, VM_HOOK_INSN, 0x20005, 0x20005, unmap_it, &u);
    vm_exit e = run(&r, NULL);
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK_EQ(e.mmio.is_fetch, 1);
    CHECK(e.rip == 0x20005 || e.rip == 0x20008);
    vm_destroy(r.m);
}

/* ---- adding, removing, order, destruction ---- */

SOFTWARE(order_of_adding)
{
    rig r = MAKE(COUNTING);
    event_log log = { 0 };
    tagged t[6] = { { &log, 0 }, { &log, 1 }, { &log, 2 }, { &log, 3 }, { &log, 4 }, { &log, 5 } };
    hook(&r, VM_HOOK_INSN, 0x100e, 0x100e, record, &t[0]);
    vm_hook *h = hook(&r, VM_HOOK_INSN, 0, 0, record, &t[1]);
    hook(&r, VM_HOOK_INSN, 0x100e, 0x100f, record, &t[2]);
    hook(&r, VM_HOOK_FETCH, 0x100f, 0x100f, record, &t[3]);
    hook(&r, VM_HOOK_BLOCK, 0x100e, 0x100e, record, &t[4]);
    hook(&r, VM_HOOK_EDGE, 0x100e, 0x100e, record, &t[5]);
    OK(vm_hook_remove(r.m, h));
    h = hook(&r, VM_HOOK_INSN, 0x100e, 0x100e, record, &t[1]);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    static const int want[] = { 3, 0, 2, 1, 5, 4, 3, 0, 2, 1 };
    CHECK_EQ(log.n, 10);
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQ(log.at[i].tag, want[i]);
    vm_destroy(r.m);
}

typedef struct mortal {
    vm_hook *h;
    unsigned calls, destroyed, *clock;
    bool is_removed;
} mortal;

static void destroyed(void *user)
{
    mortal *d = user;
    CHECK_EQ(d->destroyed, 0);
    d->destroyed = ++*d->clock;
}

static vm_hook *mortal_hook(rig *r, vm_hook_kind kind, mortal *d, vm_hook_fn fn, unsigned *clock)
{
    vm_hook_desc desc = VM_HOOK_INIT;
    *d = (mortal){ .clock = clock };
    desc.kind = kind;
    desc.fn = fn;
    desc.user = d;
    desc.destroy = destroyed;
    OK(vm_hook_add(r->m, &desc, &d->h));
    return d->h;
}

static vm_hook_result remove_itself(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    mortal *d = user;
    (void)e;
    CHECK(!d->is_removed);
    d->calls++;
    OK(vm_hook_remove(vm_vcpu_machine(cpu), d->h));
    d->is_removed = true;
    CHECK_EQ(d->destroyed, 0);                           /* this very call is still running */
    CHECK_EQ(vm_hook_remove(vm_vcpu_machine(cpu), d->h), VM_E_NOTFOUND);
    return VM_HOOK_CONTINUE;
}

SOFTWARE(remove_itself_in_each_kind)
{
    static const vm_hook_kind kinds[] = { VM_HOOK_INSN, VM_HOOK_BLOCK, VM_HOOK_EDGE, VM_HOOK_MEM_READ, VM_HOOK_MEM_WRITE,
                                          VM_HOOK_FETCH };
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        rig r = MAKE(ACCESSES);
        mortal d;
        unsigned clock = 0;
        if (kinds[i] == VM_HOOK_EDGE)
            OK(vm_write(r.m, CODE, "\xeb\x00", 2));
        mortal_hook(&r, kinds[i], &d, remove_itself, &clock);
        CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
        CHECK_EQ(d.calls, 1);
        CHECK_EQ(d.destroyed, 1);
        vm_destroy(r.m);
    }
}

static vm_hook_result remove_other(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    mortal *d = user;
    (void)e;
    if (!d[1].is_removed)
        OK(vm_hook_remove(vm_vcpu_machine(cpu), d[1].h));
    d[1].is_removed = true;
    return VM_HOOK_CONTINUE;
}

static vm_hook_result count_calls(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    mortal *d = user;
    (void)cpu, (void)e;
    CHECK(!d->is_removed);
    d->calls++;
    return VM_HOOK_CONTINUE;
}

SOFTWARE(remove_the_next_in_line)
{
    rig r = MAKE(COUNTING);
    mortal d[3];
    unsigned clock = 0;
    mortal_hook(&r, VM_HOOK_INSN, &d[0], remove_other, &clock);
    mortal_hook(&r, VM_HOOK_INSN, &d[1], count_calls, &clock);
    mortal_hook(&r, VM_HOOK_INSN, &d[2], count_calls, &clock);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(d[1].calls, 0);
    CHECK_EQ(d[1].destroyed, 1);
    CHECK_EQ(d[2].calls, 9);
    vm_destroy(r.m);
    CHECK_EQ(d[0].destroyed, 2);                         /* those left: in the order they were added */
    CHECK_EQ(d[2].destroyed, 3);
}

/* What fuzzers count blocks with: a hook on each, which goes when it is called. Three pages of inc eax; jmp next. */
SOFTWARE(one_shots)
{
    enum { BLOCKS = 3 * 256, BEGIN = 0x2000 };
    static mortal d[BLOCKS];
    rig r = MAKE(COUNTING);
    unsigned clock = 0;
    for (unsigned i = 0; i < BLOCKS; i++) {
        vm_hook_desc desc = VM_HOOK_INIT;
        OK(vm_write(r.m, BEGIN + 16 * i, "\xff\xc0\xeb\x0c", 4));
        d[i] = (mortal){ .clock = &clock };
        desc.kind = VM_HOOK_BLOCK;
        desc.begin = desc.end = BEGIN + 16 * i;
        desc.fn = remove_itself;
        desc.user = &d[i];
        desc.destroy = destroyed;
        OK(vm_hook_add(r.m, &desc, &d[i].h));
    }
    OK(vm_write(r.m, BEGIN + 16 * BLOCKS, "\xf4", 1));
    for (unsigned pass = 0; pass < 2; pass++) {
        set(r.cpu, VM_REG_RIP, BEGIN);
        set(r.cpu, VM_REG_RAX, 0);
        CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
        CHECK_EQ(get(r.cpu, VM_REG_RAX), BLOCKS);
    }
    for (unsigned i = 0; i < BLOCKS; i++) {
        CHECK_EQ(d[i].calls, 1);
        CHECK_EQ(d[i].destroyed, i + 1);
    }
    vm_destroy(r.m);
}

static vm_hook_result tally(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)cpu, (void)e;
    ++*(unsigned *)user;
    return VM_HOOK_CONTINUE;
}

/* A hot loop over three pages, looked at on one of them, by linear and by physical address, again and again: 1000: dec ecx;
 * jmp 2ffe. 2ffe: nop; nop. 3000: jnz 1000; hlt. */
SOFTWARE(hot_loop_over_pages)
{
    static const unsigned places[] = { 0x1000, 0x1002, 0x2ffe, 0x2fff, 0x3000 };
    rig r = MAKE("\xff\xc9\xe9\xf7\x1f\x00\x00");
    OK(vm_write(r.m, 0x2ffe, "\x90\x90\x0f\x85\xfa\xdf\xff\xff\xf4", 9));
    for (unsigned i = 0; i < 40; i++) {
        unsigned calls = 0, at = places[i / 2 % 5];
        bool begins = at == 0x1000 || at == 0x2ffe;
        vm_hook_desc d = VM_HOOK_INIT;
        vm_hook *h;
        d.kind = i % 3 == 0 && begins ? VM_HOOK_BLOCK : i % 3 == 1 && begins ? VM_HOOK_EDGE : VM_HOOK_INSN;
        d.begin = d.end = at;
        d.flags = i & 1 ? VM_HOOK_GPA : 0;
        d.fn = tally;
        d.user = &calls;
        for (unsigned hooked = 0; hooked < 2; hooked++) {
            if (hooked)
                OK(vm_hook_add(r.m, &d, &h));
            set(r.cpu, VM_REG_RIP, CODE);
            set(r.cpu, VM_REG_RCX, 3000);
            CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
            CHECK_EQ(calls, !hooked ? 0 : d.kind == VM_HOOK_EDGE && at == 0x1000 ? 2999 : 3000);
        }
        OK(vm_hook_remove(r.m, h));
    }
    vm_destroy(r.m);
}

/* More hooks at one place than lists on the stack hold, of every sort of range; one goes while they are called. */
SOFTWARE(dozens_at_one_place)
{
    enum { HOOKS = 60 };
    rig r = MAKE(COUNTING);
    event_log log = { 0 };
    tagged t[HOOKS];
    vm_hook *h[HOOKS];
    mortal d[2];
    unsigned clock = 0;
    mortal_hook(&r, VM_HOOK_INSN, &d[0], remove_other, &clock);
    for (unsigned i = 0; i < HOOKS; i++) {
        t[i] = (tagged){ &log, (int)i };
        h[i] = hook(&r, VM_HOOK_INSN, i % 3 ? 0x1008 - 8 * (i % 3) * i : 0, i % 3 ? 0x1008 : 0, record, &t[i]);
    }
    mortal_hook(&r, VM_HOOK_INSN, &d[1], count_calls, &clock);
    for (unsigned i = 0; i < HOOKS; i += 5)
        OK(vm_hook_remove(r.m, h[i]));
    set(r.cpu, VM_REG_RIP, 0x1008);
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.max_instructions = 1;
    CHECK_EQ(run(&r, &o).reason, VM_EXIT_BUDGET);
    CHECK_EQ(log.n, HOOKS - HOOKS / 5);
    for (unsigned i = 1, n = 0; i < HOOKS; i++)
        if (i % 5)
            CHECK_EQ(log.at[n++].tag, i);
    CHECK_EQ(d[1].calls, 0);
    CHECK_EQ(d[1].destroyed, 1);
    vm_destroy(r.m);
}

typedef struct adder { event_log *log; tagged t; bool is_added; } adder;
static vm_hook_result add_one(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    adder *a = user;
    rig r = { vm_vcpu_machine(cpu), cpu };
    (void)e;
    if (!a->is_added)
        hook(&r, VM_HOOK_INSN, 0, 0, record, &a->t);
    a->is_added = true;
    return VM_HOOK_CONTINUE;
}

SOFTWARE(add_in_a_callback_counts_from_the_next_instruction)
{
    rig r = MAKE(COUNTING);
    event_log log = { 0 };
    adder a = { &log, { &log, 0 }, false };
    hook(&r, VM_HOOK_INSN, 0x1005, 0x1005, add_one, &a);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(log.n, 7);
    CHECK_EQ(log.at[0].e.address, 0x1008);
    vm_destroy(r.m);
}

static vm_hook_result spin(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)cpu, (void)e;
    atomic_fetch_add((_Atomic unsigned *)user, 1);
    return VM_HOOK_CONTINUE;
}

static void *run_thread(void *arg)
{
    rig *r = arg;
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(r->cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    return NULL;
}

static void freed(void *user) { atomic_store((_Atomic unsigned *)user, UINT32_MAX / 2); }

/* From another thread, while the guest loops: after vm_hook_remove no call comes. */
SOFTWARE(add_and_remove_from_another_thread)
{
    rig r = MAKE("\xeb\xfe");
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, run_thread, &r));
    for (unsigned i = 0; i < 200; i++) {
        _Atomic unsigned *calls = calloc(1, sizeof *calls);
        vm_hook_desc d = VM_HOOK_INIT;
        vm_hook *h;
        d.kind = i % 3 == 0 ? VM_HOOK_INSN : i % 3 == 1 ? VM_HOOK_BLOCK : VM_HOOK_EDGE;
        d.fn = spin;
        d.user = (void *)(uintptr_t)calls;
        d.destroy = freed;
        OK(vm_hook_add(r.m, &d, &h));
        while (atomic_load(calls) < 3)
            ;
        OK(vm_hook_remove(r.m, h));
        while (atomic_load(calls) < UINT32_MAX / 2)
            ;
        free((void *)(uintptr_t)calls);
    }
    vm_vcpu_kick(r.cpu);
    pthread_join(thread, NULL);
    vm_destroy(r.m);
}

/* ---- stopping ---- */

SOFTWARE(insn_stop_and_go_on)
{
    rig r = MAKE(COUNTING);
    vm_hook_result stop = VM_HOOK_STOP;
    event_log log = { 0 };
    tagged t = { &log, 0 };
    vm_hook *h = hook(&r, VM_HOOK_INSN, 0x100e, 0x100e, answer, &stop);
    hook(&r, VM_HOOK_INSN, 0x100e, 0x100e, record, &t);
    for (unsigned i = 0; i < 2; i++) {
        vm_exit e = run(&r, NULL);
        CHECK_EQ(e.reason, VM_EXIT_HOOK);
        CHECK(e.hook.hook == h);
        CHECK_EQ(e.rip, 0x100e);
        CHECK_EQ(get(r.cpu, VM_REG_RCX), 2 - i);
        CHECK_EQ(log.n, i + 1);
    }
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    CHECK_EQ(log.n, 2);
    vm_destroy(r.m);
}

SOFTWARE(memory_stop_is_after)
{
    rig r = MAKE(ACCESSES);
    vm_hook_result stop = VM_HOOK_STOP;
    vm_hook *h = hook(&r, VM_HOOK_MEM_WRITE, 0, 0, answer, &stop);
    static const unsigned rips[] = { 0x1014, 0x101c, 0x101d, 0x1023, 0x1028 };
    for (unsigned i = 0; i < 5; i++) {
        vm_exit e = run(&r, NULL);
        CHECK_EQ(e.reason, VM_EXIT_HOOK);
        CHECK(e.hook.hook == h);
        CHECK_EQ(e.rip, rips[i]);
    }
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    vm_destroy(r.m);
}

SOFTWARE(exception_stop_skip_retry_deliver)
{
    rig r = MAKE("\x0f\x0b\xf4");
    vm_hook_result what = VM_HOOK_STOP;
    vm_hook *h = hook(&r, VM_HOOK_EXCEPTION, 0, 0, answer, &what);
    vm_exit e = run(&r, NULL);
    CHECK_EQ(e.reason, VM_EXIT_HOOK);
    CHECK(e.hook.hook == h);
    CHECK_EQ(e.rip, CODE);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_SHUTDOWN);    /* delivered: there is no IDT */
    OK(vm_vcpu_set_mode(r.cpu, VM_MODE_FLAT64));
    set(r.cpu, VM_REG_RIP, CODE);
    what = VM_HOOK_SKIP;
    uint64_t before = vm_vcpu_retired(r.cpu);
    CHECK_EQ(run(&r, NULL).rip, CODE + 3);
    CHECK_EQ(vm_vcpu_retired(r.cpu), before + 2);
    vm_destroy(r.m);
}

/* 1: ud2; jc 2f; inc rbx; 2: dec ecx; jnz 1b; hlt. The carry is the hook's, which leaves UD2 behind in every way. */
static const char EMULATED[] = "\x0f\x0b\x72\x03\x48\xff\xc3\xff\xc9\x75\xf5\xf4";
typedef struct emulator {
    unsigned calls, patch_at;            /* from rcx == patch_at on UD2 is no more */
} emulator;

static vm_hook_result emulate(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    emulator *e = user;
    uint64_t rcx = get(cpu, VM_REG_RCX), rax = get(cpu, VM_REG_RAX);
    e->calls++;
    CHECK_EQ(event->value, 6);
    CHECK_EQ(get(cpu, VM_REG_RIP), CODE);
    if (rcx == e->patch_at) {
        OK(vm_write(vm_vcpu_machine(cpu), CODE, "\xf9\x90", 2));           /* stc; nop */
        return VM_HOOK_RETRY;
    }
    set(cpu, VM_REG_RAX, rax + rcx);
    set(cpu, VM_REG_RFLAGS, 2 | (rcx & 1));
    if (rcx % 3 == 0)
        set(cpu, VM_REG_RIP, CODE + 2);
    return rcx % 3 ? VM_HOOK_SKIP : VM_HOOK_CONTINUE;
}

SOFTWARE(an_instruction_emulated_often)
{
    enum { ROUNDS = 1000, PATCH = 201 };
    for (unsigned slice = 0; slice < 12; slice++) {
        rig r = MAKE(EMULATED);
        emulator em = { .patch_at = PATCH };
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        o.max_instructions = slice;
        set(r.cpu, VM_REG_RCX, ROUNDS);
        set(r.cpu, VM_REG_RAX, 0);
        set(r.cpu, VM_REG_RBX, 0);
        hook(&r, VM_HOOK_EXCEPTION, 6, 6, emulate, &em);
        uint64_t before = vm_vcpu_retired(r.cpu);
        vm_exit e = run(&r, &o);
        for (unsigned n = 1; e.reason == VM_EXIT_BUDGET; n++) {
            CHECK_EQ(vm_vcpu_retired(r.cpu) - before, n * slice);
            e = run(&r, &o);
        }
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(e.rip, CODE + sizeof EMULATED - 1);
        CHECK_EQ(em.calls, ROUNDS - PATCH + 1);
        CHECK_EQ(get(r.cpu, VM_REG_RBX), (ROUNDS - PATCH + 1) / 2);          /* even ones, before the patch */
        CHECK_EQ(get(r.cpu, VM_REG_RAX), (uint64_t)ROUNDS * (ROUNDS + 1) / 2 - PATCH * (PATCH + 1) / 2);
        CHECK_EQ(vm_vcpu_retired(r.cpu) - before, 4 * ROUNDS + PATCH + (ROUNDS - PATCH + 1) / 2 + 1);
        vm_destroy(r.m);
    }
}

/* System events, stopped and skipped: two bytes of code at CODE, HLT all around. */
static const struct system_event {
    const char *name, *code;
    int kind, number;                    /* number: what the event is about, -1: the instruction's address */
    uint32_t flags;
    vm_mode mode;
    uint64_t done_rip, rax_after;        /* when it is executed: where HLT leaves it, RAX */
} SYSTEM_EVENTS[] = {
    { "cpuid", "\x0f\xa2", VM_HOOK_CPUID, 0x80000008, 0, VM_MODE_FLAT64, CODE + 3, 0 },
    { "rdmsr", "\x0f\x32", VM_HOOK_MSR, 0x174, 0, VM_MODE_FLAT64, CODE + 3, 0x18 },
    { "wrmsr", "\x0f\x30", VM_HOOK_MSR, 0x174, VM_EVENT_WRITE, VM_MODE_FLAT64, CODE + 3, 0x80000008 },
    { "syscall", "\x0f\x05", VM_HOOK_SYSCALL, -1, 0, VM_MODE_FLAT64, 0x3001, 0x80000008 },
    { "sysenter", "\x0f\x34", VM_HOOK_SYSCALL, -1, VM_EVENT_SYSENTER, VM_MODE_FLAT32, 0x3001, 0x80000008 },
    { "int", "\xcd\x05", VM_HOOK_INTERRUPT, 5, VM_EVENT_SOFT, VM_MODE_REAL, 0x3001, 0x0008 },
    { "int3", "\x90\xcc", VM_HOOK_INTERRUPT, 3, VM_EVENT_SOFT, VM_MODE_REAL, 0x3001, 0x0008 },
    { "into", "\x90\xce", VM_HOOK_INTERRUPT, 4, VM_EVENT_SOFT, VM_MODE_REAL, 0x3001, 0x0008 },
};

static rig make_system(vm_backend backend, const struct system_event *s)
{
    rig r = make(backend, s->mode, "\xf4\xf4\xf4\xf4", 4);
    for (uint16_t vector = 0; vector < 16; vector++)
        OK(vm_write(r.m, vector * 4u, "\x00\x30\x00\x00", 4));
    OK(vm_write(r.m, CODE, s->code, 2));
    OK(vm_write(r.m, 0x3000, "\xf4", 1));
    OK(vm_vcpu_set_msr(r.cpu, 0x174, 0x18));
    OK(vm_vcpu_set_msr(r.cpu, 0x176, 0x3000));
    OK(vm_vcpu_set_msr(r.cpu, 0xc0000082, 0x3000));
    OK(vm_vcpu_set_msr(r.cpu, 0xc0000081, UINT64_C(8) << 32));
    uint64_t efer = 0;
    OK(vm_vcpu_get_msr(r.cpu, 0xc0000080, &efer));
    OK(vm_vcpu_set_msr(r.cpu, 0xc0000080, efer | 1));
    set(r.cpu, VM_REG_RAX, s->mode == VM_MODE_REAL ? 8 : 0x80000008);
    set(r.cpu, VM_REG_RCX, 0x174);
    set(r.cpu, VM_REG_RDX, 0);
    set(r.cpu, VM_REG_RFLAGS, 2 | 0x800);
    return r;
}

static void check_event(const struct system_event *s, const event_log *log)
{
    unsigned at = s->code[0] == '\x90' ? CODE + 1 : CODE;
    CHECK_EQ(log->n, 1);
    CHECK_EQ(log->at[0].e.kind, s->kind);
    CHECK_EQ(log->at[0].e.flags, s->flags);
    CHECK_EQ(log->at[0].rip, at);
    if (s->kind == VM_HOOK_INTERRUPT) {
        CHECK_EQ(log->at[0].e.value, s->number);
        CHECK_EQ(log->at[0].e.address, at);
    } else {
        CHECK_EQ(log->at[0].e.address, s->number == -1 ? at : (uint32_t)s->number);
    }
}

static vm_hook_result record_and_stop(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    record(user, cpu, e);
    return VM_HOOK_STOP;
}

SOFTWARE(system_events_stop_and_skip)
{
    for (unsigned i = 0; i < sizeof SYSTEM_EVENTS / sizeof *SYSTEM_EVENTS; i++) {
        const struct system_event *s = &SYSTEM_EVENTS[i];
        for (unsigned skips = 0; skips < 2; skips++) {
            event_log log = { 0 };
            tagged t = { &log, 0 };
            rig r = make_system(backend, s);
            uint64_t rax = get(r.cpu, VM_REG_RAX), before = vm_vcpu_retired(r.cpu), msr = 0;
            hook(&r, (vm_hook_kind)s->kind, 0, 0, skips ? record_and_skip : record_and_stop, &t);
            vm_exit e = run(&r, NULL);
            check_event(s, &log);
            if (!skips) {                                /* before it; then it happens, and is not told again */
                CHECK_EQ(e.reason, VM_EXIT_HOOK);
                CHECK_EQ(e.rip, log.at[0].rip);
                CHECK_EQ(get(r.cpu, VM_REG_RAX), rax);
                e = run(&r, NULL);
                CHECK_EQ(log.n, 1);
            }
            CHECK_EQ(e.reason, VM_EXIT_HALT);
            CHECK_EQ(e.rip, skips ? CODE + 3 : s->done_rip);
            CHECK_EQ(vm_vcpu_retired(r.cpu) - before, 2u + (s->code[0] == '\x90'));
            if (skips || s->kind != VM_HOOK_CPUID)
                CHECK_EQ(get(r.cpu, VM_REG_RAX), skips ? rax : s->rax_after);
            OK(vm_vcpu_get_msr(r.cpu, 0x174, &msr));
            CHECK_EQ(msr, !skips && s->flags == VM_EVENT_WRITE ? 0x80000008 : 0x18);
            vm_destroy(r.m);
        }
    }
}

/* A vector from outside: stopped, it waits; skipped, it is lost; redirected, the guest goes elsewhere. */
SOFTWARE(interrupts_stop_and_skip)
{
    static const struct system_event nothing = { "", "\x90\x90", VM_HOOK_INTERRUPT, 0x2f, 0, VM_MODE_REAL, 0, 0 };
    for (unsigned way = 0; way < 2; way++) {
        event_log log = { 0 };
        tagged t = { &log, 0 };
        rig r = make_system(backend, &nothing);
        OK(vm_write(r.m, 0x2f * 4, "\x00\x30\x00\x00", 4));
        hook(&r, VM_HOOK_INTERRUPT, 0x2f, 0x2f, way ? record_and_skip : record_and_stop, &t);
        OK(vm_vcpu_inject(r.cpu, 0x2f, false, 0));
        vm_exit e = run(&r, NULL);
        CHECK_EQ(log.n, 1);
        CHECK_EQ(log.at[0].e.value, 0x2f);
        CHECK_EQ(log.at[0].e.address, CODE);
        CHECK_EQ(log.at[0].e.flags, 0);
        if (!way) {
            CHECK_EQ(e.reason, VM_EXIT_HOOK);
            CHECK_EQ(e.rip, CODE);
            e = run(&r, NULL);
            CHECK_EQ(log.n, 1);
        }
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(e.rip, way ? CODE + 3 : 0x3001);
        vm_destroy(r.m);
    }
}

EACH_BACKEND(breakpoints)
{
    rig r = MAKE(COUNTING);
    OK(vm_breakpoint(r.m, 0x100e, true));
    CHECK_EQ(vm_breakpoint(r.m, 0x100e, true), VM_E_EXISTS);
    CHECK_EQ(vm_breakpoint(r.m, 0x1010, false), VM_E_NOTFOUND);
    for (unsigned i = 0; i < 2; i++) {
        vm_exit e = run(&r, NULL);
        CHECK_EQ(e.reason, VM_EXIT_BREAKPOINT);
        CHECK_EQ(e.rip, 0x100e);
        CHECK_EQ(e.debug.is_watchpoint, false);
        CHECK_EQ(e.debug.address, 0x100e);
        CHECK_EQ(get(r.cpu, VM_REG_RCX), 2 - i);
        CHECK_EQ(get(r.cpu, VM_REG_DR7), 0x400);
        CHECK_EQ(get(r.cpu, VM_REG_RFLAGS) & 0x100, 0);
    }
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    set(r.cpu, VM_REG_RIP, 0x100e);                      /* set there by the program: it is hit at once */
    set(r.cpu, VM_REG_RCX, 1);
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_BREAKPOINT);
    CHECK_EQ(get(r.cpu, VM_REG_RCX), 1);
    OK(vm_breakpoint(r.m, 0x100e, false));
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    vm_destroy(r.m);
}

EACH_BACKEND(breakpoint_on_the_next_instruction)
{
    rig r = MAKE(COUNTING);
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.single_step = true;
    OK(vm_breakpoint(r.m, 0x1005, true));
    OK(vm_breakpoint(r.m, 0x1008, true));
    CHECK_EQ(run(&r, NULL).rip, 0x1005);
    CHECK_EQ(run(&r, NULL).rip, 0x1008);
    vm_exit e = run(&r, &o);                             /* steps over the one it stands on */
    CHECK_EQ(e.reason, VM_EXIT_STEP);
    CHECK_EQ(e.rip, 0x1009);
    vm_destroy(r.m);
}

EACH_BACKEND(watchpoints)
{
    rig r = MAKE(ACCESSES);
    OK(vm_watchpoint(r.m, DATA + 2, 2, VM_PROT_RW, true));
    CHECK_EQ(vm_watchpoint(r.m, DATA + 2, 2, VM_PROT_R, false), VM_E_NOTFOUND);
    static const struct { unsigned rip, access, address, bytes; } want[] = {
        { 0x1014, VM_PROT_W, DATA, 8 }, { 0x1017, VM_PROT_R, DATA + 3, 1 }, { 0x101c, VM_PROT_R, DATA + 2, 2 },
        { 0x1021, VM_PROT_R, DATA, 16 }, { 0x1023, VM_PROT_R, DATA, 4 } };
    for (unsigned i = 0; i < 5; i++) {
        vm_exit e = run(&r, NULL);
        CHECK_EQ(e.reason, VM_EXIT_BREAKPOINT);
        CHECK(e.debug.is_watchpoint);
        CHECK_EQ(e.rip, want[i].rip);
        CHECK_EQ(e.debug.access, want[i].access);
        CHECK_EQ(e.debug.address, want[i].address);
        CHECK_EQ(e.debug.bytes, want[i].bytes);
    }
    OK(vm_watchpoint(r.m, DATA + 2, 2, VM_PROT_RW, false));
    CHECK_EQ(run(&r, NULL).reason, VM_EXIT_HALT);
    vm_destroy(r.m);
}

EACH_BACKEND(single_steps)
{
    static const unsigned rip[] = { 0x1007, 0x100c, 0x100e, 0x1010 };
    rig r = MAKE(STRING);
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.single_step = true;
    for (unsigned i = 0; i < 4; i++) {
        vm_exit e = run(&r, &o);
        CHECK_EQ(e.reason, VM_EXIT_STEP);
        CHECK_EQ(e.rip, rip[i]);
        CHECK_EQ(get(r.cpu, VM_REG_RFLAGS) & 0x100, 0);
    }
    CHECK_EQ(run(&r, &o).reason, VM_EXIT_HALT);
    vm_destroy(r.m);
}

/* pushfq; pop rax; hlt: TF of a debugger's step is not seen. */
EACH_BACKEND(steps_do_not_show)
{
    rig r = MAKE("\x9c\x58\xf4");
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.single_step = true;
    run(&r, &o);
    run(&r, &o);
    CHECK_EQ(get(r.cpu, VM_REG_RAX), 2);
    vm_destroy(r.m);
}

/* ---- arguments and other backends ---- */

SOFTWARE(arguments)
{
    rig r = MAKE(COUNTING);
    vm_hook_desc d = VM_HOOK_INIT;
    vm_hook *h = (vm_hook *)&d;
    CHECK_EQ(vm_hook_add(NULL, &d, &h), VM_E_INVALID);
    CHECK(!h);
    CHECK_EQ(vm_hook_add(r.m, NULL, &h), VM_E_INVALID);
    d.fn = record;
    CHECK_EQ(vm_hook_add(r.m, &d, &h), VM_E_INVALID);    /* kind 0 */
    d.kind = VM_HOOK_KINDS;
    CHECK_EQ(vm_hook_add(r.m, &d, &h), VM_E_INVALID);
    d.kind = VM_HOOK_CPUID;
    d.flags = VM_HOOK_GPA;
    CHECK_EQ(vm_hook_add(r.m, &d, &h), VM_E_INVALID);
    d.flags = 0x100;
    CHECK_EQ(vm_hook_add(r.m, &d, &h), VM_E_INVALID);
    d.flags = 0;
    d.begin = 2;
    d.end = 1;
    CHECK_EQ(vm_hook_add(r.m, &d, &h), VM_E_INVALID);
    d.end = 2;
    d.fn = NULL;
    CHECK_EQ(vm_hook_add(r.m, &d, &h), VM_E_INVALID);
    CHECK_EQ(vm_hook_remove(r.m, NULL), VM_E_INVALID);
    CHECK_EQ(vm_hook_remove(r.m, (vm_hook *)&d), VM_E_NOTFOUND);
    CHECK_EQ(vm_watchpoint(r.m, 0, 0, VM_PROT_R, true), VM_E_INVALID);
    CHECK_EQ(vm_watchpoint(r.m, ~UINT64_C(0), 2, VM_PROT_R, true), VM_E_INVALID);
    CHECK_EQ(vm_watchpoint(r.m, 0, 1, VM_PROT_X, true), VM_E_INVALID);
    vm_destroy(r.m);
}

TEST(kvm_refuses_or_moves)
{
    uint64_t available = 0;
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_hook_desc d = VM_HOOK_INIT;
    event_log log = { 0 };
    tagged t = { &log, 0 };
    if (vm_query(VM_BACKEND_KVM, "available", &available) || !available)
        test_skip("%s", vm_errmsg());
    o.backend = VM_BACKEND_KVM;
    OK(vm_create(&o, &m));
    d.kind = VM_HOOK_INSN;
    d.fn = record;
    d.user = &t;
    CHECK_EQ(vm_hook_add(m, &d, NULL), VM_E_UNSUPPORTED);
    d.flags = VM_HOOK_SWITCH;
    OK(vm_hook_add(m, &d, NULL));
    CHECK(vm_machine_backend(m) != VM_BACKEND_KVM);
    CHECK_EQ(vm_backend_select(m, VM_BACKEND_KVM), VM_E_UNSUPPORTED);
    vm_destroy(m);
}
