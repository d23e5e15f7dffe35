/* system.c - random system instructions in random surroundings: every backend with exact budgets must agree with the
 * interpreter.
 *
 * A case is a mode, a set of descriptor tables filled half with sense and half at random, a TSS, registers, and one
 * instruction that moves segments, transfers control through them, or changes system state. Ordinary instructions stand
 * before it and wherever it may lead, so that a backend that keeps state elsewhere (cached segment properties, pinned
 * registers) has to have it right again. Compared: the exit, all registers that vm_sregs and vm_regs hold, and all of
 * memory.
 *
 * The interpreter itself is held to the manuals by tests/unit/sys_*. TEST_SEED and TEST_COUNT choose other cases and
 * more.
 */
#include "test.h"

#include <libvm/libvm.h>

enum {
    RAM = 0x10000,
    GDT = 0x1000,
    IDT = 0x2000,
    LDT = 0x3000,
    TSS = 0x4000,
    TSS2 = 0x4100,
    DATA = 0x5000,
    STACK0 = 0x6800,
    STACK3 = 0x7800,
    CODE = 0x8000,
    TARGET = 0x9000,
    HANDLERS = 0xa000,
    TABLES = 0xc000
};
enum {
    NGDT = 48,
    CODE0 = 0x08,
    DATA0 = 0x10,
    CODE3C = 0x1b,
    DATA3 = 0x23,
    CODE3 = 0x2b,
    TSS_SEL = 0x30,
    CODE0C = 0x40,
    LDT_SEL = 0x48,
    CODE16 = 0x58,
    CONFORM0 = 0x60,
    TSS2_SEL = 0x68,
    RANDOM = 0x78
};
enum mode { REAL, PROT0, PROT3, V86, LONG0, LONG3, COMPAT3, MODES };
static const char *const mode_names[MODES] = {"real",       "protected_ring0", "protected_ring3", "v86",
                                              "long_ring0", "long_ring3",      "compat_ring3"};

/* ---- randomness ---- */

static uint64_t state;
static uint32_t rnd(void)
{
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(state >> 33);
}
static uint32_t below(uint32_t n) { return rnd() % n; }
#define ONE_OF(...)                                                                                                    \
    (((const uint32_t[]){__VA_ARGS__})[below(sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))])

static uint32_t random_selector(void)
{
    switch (below(12)) {
    case 0: return below(4);
    case 1: return rnd() & 0xffff;
    case 2: return below(8) * 8 | 4 | below(4);
    case 3: case 4: return ONE_OF(CODE0, DATA0, CODE3C, DATA3, CODE3, CODE0C, CODE16, CONFORM0, TSS2_SEL);
    default: return below(NGDT) * 8 | below(4);
    }
}

/* ---- the world of a case ---- */

static uint8_t image[RAM];
static void put16(uint32_t at, uint32_t v) { memcpy(image + at, &v, 2); }
static void put32(uint32_t at, uint32_t v) { memcpy(image + at, &v, 4); }
static void put64(uint32_t at, uint64_t v) { memcpy(image + at, &v, 8); }

static uint64_t descriptor(uint32_t base, uint32_t limit, uint32_t access, uint32_t flags)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)access << 40 |
           (uint64_t)(limit >> 16 & 15) << 48 | (uint64_t)flags << 52 | (uint64_t)(base >> 24) << 56;
}

static uint64_t gate(uint32_t sel, uint64_t off, uint32_t access, uint32_t low)
{
    return (off & 0xffff) | (uint64_t)sel << 16 | (uint64_t)low << 32 | (uint64_t)access << 40 |
           (off & 0xffff0000) << 32;
}

static bool is_long(enum mode m) { return m >= LONG0; }
static uint32_t gate_selector(void)
{
    return below(4) ? ONE_OF(CODE0, CODE0, CONFORM0, CODE3, TSS2_SEL) : random_selector();
}

static uint64_t random_descriptor(enum mode m)
{
    uint32_t access = below(3)
                          ? ONE_OF(0x92, 0x93, 0x90, 0x96, 0x9a, 0x9b, 0x98, 0x9e, 0xf2, 0xf3, 0xfa, 0xfb, 0xfe, 0xb2,
                                   0xba, 0x89, 0x82, 0x8c, 0xec, 0x85, 0xe5, 0xe9, 0x12, 0x1a, 0x84, 0xe4, 0x81)
                          : rnd() & 0xff;
    bool is_gate = !(access & 0x10) && (access & 7) >= 4;
    if (is_gate)
        return gate(gate_selector(), TARGET + 16 * below(8), access, below(2) ? below(32) : 0);
    if (!(access & 0x10))
        return descriptor(access & 1 ? TSS2 : LDT, below(4) ? 0x67 : below(0x70), access, 0);
    return descriptor(0, below(4) ? 0xfffff : below(0x10000), access,
                      is_long(m) ? ONE_OF(0xc, 0xa, 2, 6) : ONE_OF(0xc, 0xc, 4, 0));
}

static void make_tables(enum mode m)
{
    uint32_t code_flags = is_long(m) ? 0xa : 0xc;
    memset(image, 0, sizeof image);
    for (uint32_t sel = RANDOM; sel < NGDT * 8; sel += 8)
        put64(GDT + sel, random_descriptor(m));
    put64(GDT + CODE0, descriptor(0, 0xfffff, 0x9b, code_flags));
    put64(GDT + DATA0, descriptor(0, 0xfffff, 0x93, 0xc));
    put64(GDT + (CODE3C & 0xf8), descriptor(0, 0xfffff, 0xfb, 0xc));
    put64(GDT + (DATA3 & 0xf8), descriptor(0, 0xfffff, 0xf3, 0xc));
    put64(GDT + (CODE3 & 0xf8), descriptor(0, 0xfffff, 0xfb, code_flags));
    put64(GDT + TSS_SEL, descriptor(TSS, 0x67, 0x8b, 0));
    put64(GDT + CODE0C, descriptor(0, 0xfffff, 0x9b, 0xc));
    put64(GDT + LDT_SEL, descriptor(LDT, 0x3f, 0x82, 0));
    put64(GDT + CODE16, descriptor(0, 0xffff, 0xfb, 0));
    put64(GDT + CONFORM0, descriptor(0, 0xfffff, 0x9f, code_flags));
    put64(GDT + TSS2_SEL, descriptor(TSS2, 0x67, below(4) ? 0x89 : 0xe9, 0));
    for (uint32_t i = 0; i < 8; i++)
        put64(LDT + 8 * i, random_descriptor(m));
    for (uint32_t v = 0; v < 0x44; v++) {
        bool is_tested = v >= 0x40;
        uint32_t access = is_tested ? ONE_OF(0x8e, 0xee, 0xef, 0x86, 0xe6, 0xe5, 0x6e, rnd() & 0xff)
                          : v == 3  ? 0xee
                                    : 0x8e;
        uint32_t sel = is_tested ? gate_selector() : CODE0,
                 off = is_tested ? TARGET + 16 * below(8) : HANDLERS + 16 * v;
        put64(IDT + v * (is_long(m) ? 16 : 8),
              gate(sel, off, access, is_tested && is_long(m) && !below(3) ? below(8) : 0));
    }
    if (m == REAL)                     /* the vector table */
        for (uint32_t v = 0; v < 256; v++)
            put32(v * 4, v >= 0x40 ? (uint32_t)TARGET : HANDLERS + 16 * (v & 31));
}

static void make_tss(enum mode m)
{
    put32(TSS + 4, STACK0);            /* also RSP0 */
    put32(TSS + 8, is_long(m) ? 0 : below(8) ? DATA0 : random_selector());
    for (uint32_t i = 1; i < 8 && is_long(m); i++)
        put64(TSS + 28 + 8 * i, below(8) ? STACK0 - 0x100 - 8 * i : UINT64_C(0x800000000000));
    put32(TSS + 100, 0x680000);
    put16(TSS, below(2) ? TSS2_SEL : random_selector());
    put32(TSS2 + 4, STACK0);
    put32(TSS2 + 8, DATA0);
    put32(TSS2 + 32, TARGET);
    put32(TSS2 + 36, 2 | (rnd() & (below(4) ? 0xcd5 : 0x24cd5)));
    for (uint32_t i = 0; i < 8; i++)
        put32(TSS2 + 40 + 4 * i, i == 4 ? STACK0 - 0x80 : i == 3 ? (uint32_t)DATA : rnd());
    for (uint32_t i = 0; i < 6; i++)
        put32(TSS2 + 72 + 4 * i, below(10) ? i == 1 ? CODE0 : DATA0 : random_selector());
    put32(TSS2 + 96, below(3) ? 0 : ONE_OF(LDT_SEL, random_selector()));
    put32(TSS2 + 100, (below(8) == 0) | 0x680000);
    for (uint32_t at = DATA; at < STACK3 + 0x100; at += 4)
        put32(at, 0x5a5a0000 | at);
}

/* ---- the instruction ---- */

static uint8_t *at;
static void emit(uint32_t byte) { *at++ = (uint8_t)byte; }
static void emit32(uint32_t v) { memcpy(at, &v, 4); at += 4; }

/* [DATA + 0x40] with this ModRM.reg. */
static void emit_memory(enum mode m, uint32_t reg)
{
    bool has_16 = m == REAL || m == V86;
    emit(has_16 ? reg << 3 | 6 : m == LONG0 || m == LONG3 ? reg << 3 | 4 : reg << 3 | 5);
    if (m == LONG0 || m == LONG3)
        emit(0x25);
    emit32(DATA + 0x40);
    at -= has_16 ? 2 : 0;
}

/* Operand-size prefix or REX.W; the operand size in bytes. */
static uint32_t emit_size(enum mode m)
{
    uint32_t k = below(3);
    bool has_16 = m == REAL || m == V86;
    if (k == 0)
        emit(0x66);
    if (k == 2 && (m == LONG0 || m == LONG3))
        emit(0x48);
    return k == 0 ? has_16 ? 4 : 2 : k == 2 && (m == LONG0 || m == LONG3) ? 8 : has_16 ? 2 : 4;
}

static void push_frame(uint32_t sp, uint32_t n, bool has_flags)
{
    uint64_t words[9] = {TARGET + 16 * below(8),
                         below(3) ? ONE_OF(CODE0, CODE3, CODE3C, CODE16, CONFORM0) : random_selector()};
    uint32_t count = 2;
    if (has_flags)
        words[count++] = 2 | (rnd() & 0x243cd5) | (below(12) ? 0 : 0x4000);
    words[count++] = STACK3 - 0x40;
    words[count++] = below(3) ? ONE_OF(DATA0, DATA3) : random_selector();
    while (count < 9)
        words[count++] = random_selector();
    for (uint32_t i = 0; i < 9; i++)
        memcpy(image + sp + n * i, &words[i], n);
}

enum kind {
    MOV_SREG,
    LOAD_FAR,
    POP_SREG,
    EXAMINE,
    LDT_TR,
    FAR,
    FAR_BACK,
    INT_N,
    FLAGS,
    FAST,
    TABLE_REGS,
    CONTROL,
    DEBUG,
    TASK_BACK,
    BASES,
    KINDS
};

static void make_instruction(enum mode m, vm_regs *r)
{
    uint32_t sp = (uint32_t)r->rsp, n;
    put32(DATA + 0x40, TARGET);
    put32(DATA + 0x44, random_selector() | random_selector() << 16);
    put32(DATA + 0x48, random_selector());
    switch ((enum kind)below(KINDS)) {
    case MOV_SREG: emit_size(m), emit(0x8e), emit(0xc0 | ONE_OF(0, 2, 3, 4, 5) << 3); break;
    case LOAD_FAR: emit_size(m), emit(0x0f), emit(ONE_OF(0xb2, 0xb4, 0xb5)), emit_memory(m, 0); break;
    case POP_SREG:
        put32(sp, random_selector());
        emit_size(m);
        emit(below(3) || is_long(m) ? 0x0f : 0x07);
        if (at[-1] == 0x0f)
            emit(ONE_OF(0xa1, 0xa9, 0xa0, 0xa8));
        break;
    case EXAMINE: emit_size(m), emit(0x0f), emit(ONE_OF(2, 3, 0)), emit(at[-1] ? 0xc1 : ONE_OF(0xe1, 0xe9)); break;
    case LDT_TR: emit(0x0f), emit(0), emit(ONE_OF(0xd0, 0xd8, 0xc0, 0xc8) | 1); break;
    case FAR:
        n = emit_size(m);
        put16(DATA + 0x40 + n,
              below(3) ? ONE_OF(CODE0, CODE3, CODE3C, CODE0C, CODE16, CONFORM0, TSS2_SEL) : random_selector());
        emit(0xff), emit_memory(m, ONE_OF(3, 5));
        break;
    case FAR_BACK:
        n = emit_size(m);
        emit(ONE_OF(0xcb, 0xcf));
        push_frame(sp, n, at[-1] == 0xcf);
        break;
    case INT_N: emit(0xcd), emit(0x40 + below(4)); break;
    case FLAGS: put32(sp, rnd() & 0x3ecd5), emit_size(m), emit(ONE_OF(0xfa, 0xfb, 0x9c, 0x9d)); break;
    case FAST: r->rcx = TARGET, emit_size(m), emit(0x0f), emit(ONE_OF(0x05, 0x07, 0x34, 0x35)); break;
    case TABLE_REGS: emit(0x0f), emit(1), emit_memory(m, below(2)); break;
    case CONTROL:
        if (below(2))                  /* SMSW, LMSW, MOV from CR0, CLTS */
            emit(0x0f), emit(1), emit(ONE_OF(0xe1, 0xf1));
        else if (below(2))
            emit(0x0f), emit(0x20), emit(0xc1);
        else
            emit(0x0f), emit(6);
        break;
    case DEBUG:
        r->rcx = rnd() & 0xfffffffc, emit(0x0f), emit(ONE_OF(0x21, 0x23)), emit(0xc1 | ONE_OF(0, 1, 2, 3, 6) << 3);
        break;
    case TASK_BACK: r->rflags |= 0x4000, push_frame(sp, 4, true), emit(0xcf); break;
    case BASES: emit(0x0f), emit(1), emit(0xf8); break;
    case KINDS: break;
    }
}

/* mov eax, [rbx]; push rax; pop rcx; add [rbx], ecx; pushf; pop rdx; hlt - in whatever mode this is reached. */
static const uint8_t ordinary[] = { 0x8b, 0x03, 0x50, 0x59, 0x01, 0x0b, 0x9c, 0x5a, 0xf4 };

static void make_code(enum mode m, vm_regs *r)
{
    memset(image + TARGET, 0xf4, TABLES - TARGET);
    for (uint32_t i = 0; i < 8; i++)
        memcpy(image + TARGET + 16 * i, ordinary, sizeof ordinary);
    at = image + CODE;
    memcpy(at, ordinary, 6);
    at += 6;
    make_instruction(m, r);
    memcpy(at, ordinary, sizeof ordinary);
}

/* ---- registers ---- */

static vm_segment segment(uint32_t sel)
{
    uint32_t lo, hi, limit;
    memcpy(&lo, image + GDT + (sel & 0xfff8), 4);
    memcpy(&hi, image + GDT + (sel & 0xfff8) + 4, 4);
    limit = (lo & 0xffff) | (hi & 0xf0000);
    return (vm_segment){.base = lo >> 16 | (hi & 0xff) << 16 | (hi & 0xff000000),
                        .selector = (uint16_t)sel,
                        .limit = hi & 1u << 23 ? limit << 12 | 0xfff : limit,
                        .attributes = (uint16_t)(hi >> 8 & 0xf0ff)};
}

static void make_registers(enum mode m, vm_regs *r, vm_sregs *s)
{
    bool is_user = m == PROT3 || m == LONG3 || m == COMPAT3;
    uint32_t data = is_user ? DATA3 : DATA0, code = m == COMPAT3 ? CODE3C : is_user ? CODE3 : CODE0;
    uint64_t *gpr = &r->rax;
    for (uint32_t i = 0; i < 16; i++)
        gpr[i] = is_long(m) ? (uint64_t)rnd() << 32 | rnd() : rnd();
    r->rax = random_selector();
    r->rcx = random_selector();
    r->rbx = DATA;
    r->rsp = is_user ? STACK3 - 0x80 : STACK0 - 0x400;
    r->rip = CODE;
    r->rflags = 2 | (rnd() & 0xcd5) | (below(2) ? below(4) << 12 : 0);
    s->cs = segment(code);
    s->ds = s->es = s->ss = s->fs = s->gs = segment(data);
    s->tr = segment(TSS_SEL);
    s->ldtr = below(3) ? segment(LDT_SEL) : (vm_segment){ 0 };
    s->gdtr = (vm_dtable){ GDT, NGDT * 8 - 1 };
    s->idtr = (vm_dtable){ IDT, 0x44 * (is_long(m) ? 16 : 8) - 1 };
    if (m == V86) {
        vm_segment zero = { .limit = 0xffff, .attributes = 0xf3 };
        s->cs = s->ds = s->es = s->ss = s->fs = s->gs = zero;
        r->rflags |= 0x20000;
    }
    if (is_long(m)) {                  /* 16 MiB of identity, open to users */
        put64(TABLES, (TABLES + 0x1000) | 7);
        put64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for (uint32_t i = 0; i < 8; i++)
            put64(TABLES + 0x2000 + 8 * i, i * 0x200000 | 0x87);
        s->cr3 = TABLES;
    }
}

/* ---- running and comparing ---- */

typedef struct column {
    vm_machine *m;
    vm_vcpu *cpu;
    vm_regs regs;
    vm_sregs sregs;
    vm_exit exit;
    uint8_t after[RAM];
} column;

static void column_open(column *c, vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    o.backend = backend;
    OK(vm_create(&o, &c->m));
    OK(vm_map_ram(c->m, 0, RAM, VM_PROT_RWX, NULL));
    c->cpu = vm_vcpu_get(c->m, 0);
}

static void column_prepare(column *c, enum mode m)
{
    c->regs = (vm_regs)VM_REGS_INIT;
    c->sregs = (vm_sregs)VM_SREGS_INIT;
    c->exit = (vm_exit)VM_EXIT_INIT;
    OK(vm_vcpu_set_mode(c->cpu, m == REAL ? VM_MODE_REAL : is_long(m) ? VM_MODE_FLAT64 : VM_MODE_FLAT32));
    OK(vm_vcpu_get_regs(c->cpu, &c->regs));
    OK(vm_vcpu_get_sregs(c->cpu, &c->sregs));
    OK(vm_vcpu_set_msr(c->cpu, 0xc0000081, (uint64_t)CODE3C << 48 | (uint64_t)CODE0 << 32));
    OK(vm_vcpu_set_msr(c->cpu, 0xc0000082, TARGET));
    OK(vm_vcpu_set_msr(c->cpu, 0xc0000083, TARGET + 16));
    OK(vm_vcpu_set_msr(c->cpu, 0xc0000084, 0x4700));
    OK(vm_vcpu_set_msr(c->cpu, 0x174, CODE0));
    OK(vm_vcpu_set_msr(c->cpu, 0x175, STACK0));
    OK(vm_vcpu_set_msr(c->cpu, 0x176, TARGET));
}

static void column_run(column *c, const vm_regs *r, const vm_sregs *s, enum mode m)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.max_instructions = 60;
    OK(vm_write(c->m, 0, image, sizeof image));
    if (m != REAL)
        OK(vm_vcpu_set_sregs(c->cpu, s));
    OK(vm_vcpu_set_regs(c->cpu, r));
    OK(vm_vcpu_run(c->cpu, &o, &c->exit));
    OK(vm_vcpu_get_regs(c->cpu, &c->regs));
    OK(vm_vcpu_get_sregs(c->cpu, &c->sregs));
    OK(vm_read(c->m, 0, c->after, sizeof c->after));
}

/* What differs, for a person to read; NULL: nothing. */
static const char *difference(const column *a, const column *b)
{
    static char text[200];
    const uint64_t *ra = &a->regs.rax, *rb = &b->regs.rax;
    if (a->exit.reason != b->exit.reason) {
        snprintf(text, sizeof text, "exit %s, not %s", vm_exit_name(b->exit.reason), vm_exit_name(a->exit.reason));
        return text;
    }
    for (unsigned i = 0; i < 18; i++)
        if (ra[i] != rb[i]) {
            snprintf(text, sizeof text, "register %u is %#" PRIx64 ", not %#" PRIx64, i, rb[i], ra[i]);
            return text;
        }
    if (memcmp(&a->sregs, &b->sregs, sizeof a->sregs)) {
        const uint8_t *pa = (const uint8_t *)&a->sregs, *pb = (const uint8_t *)&b->sregs;
        unsigned i = 0;
        while (pa[i] == pb[i])
            i++;
        snprintf(text, sizeof text, "vm_sregs differ at byte %u (%#x, not %#x)", i, pb[i], pa[i]);
        return text;
    }
    for (unsigned i = 0; i < RAM; i++)
        if (a->after[i] != b->after[i]) {
            snprintf(text, sizeof text, "memory at %#x is %#x, not %#x", i, b->after[i], a->after[i]);
            return text;
        }
    return NULL;
}

static uint64_t from_environment(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : otherwise;
}

static void compare_mode(const void *arg)
{
    enum mode m = (enum mode)(uintptr_t)arg;
    uint64_t first = from_environment("TEST_SEED", 1), count = from_environment("TEST_COUNT", 3000), there = 0,
             halts = 0;
    static column interp, jit;
    if (vm_query(VM_BACKEND_JIT, "available", &there) != VM_OK || !there)
        test_skip("no JIT in this build");
    column_open(&interp, VM_BACKEND_INTERP);
    column_open(&jit, VM_BACKEND_JIT);
    for (uint64_t i = first; i < first + count; i++) {
        state = i * UINT64_C(0x9e3779b97f4a7c15) + (uint64_t)m;
        rnd();
        column_prepare(&interp, m);
        column_prepare(&jit, m);
        make_tables(m);
        make_tss(m);
        vm_regs r = interp.regs;
        vm_sregs s = interp.sregs;
        make_registers(m, &r, &s);
        make_code(m, &r);
        column_run(&interp, &r, &s, m);
        column_run(&jit, &r, &s, m);
        const char *what = difference(&interp, &jit);
        if (what)
            FAIL("case %" PRIu64 " (TEST_SEED=%" PRIu64 " TEST_COUNT=1), bytes %02x %02x %02x %02x: %s", i, i,
                 image[CODE + 6], image[CODE + 7], image[CODE + 8], image[CODE + 9], what);
        halts += interp.exit.reason == VM_EXIT_HALT;
    }
    if (count > 100)
        CHECK(halts > count / 10);     /* the cases still lead somewhere */
    vm_destroy(interp.m);
    vm_destroy(jit.m);
}

SETUP(modes)
{
    for (uintptr_t m = 0; m < MODES; m++)
        test_add(mode_names[m], compare_mode, (const void *)m, 0);
}
