/* call.c - functions across the border, on every backend: compiled guest functions (call_guest.c) called with every type of
 * argument, in each convention; bound functions and hypercalls; calls inside calls; what must be refused.
 *
 * The image of the guest lies at 0x10000; 0x7000 and below is the stack; bound addresses are at 0x5000, which is not RAM. */
#include "../backends.h"

#include <math.h>

__asm__(".section .rodata\n"
        "image64: .incbin \"tests/api/call_guest64.bin\"\nimage64_end:\n"
        "image32: .incbin \"tests/api/call_guest32.bin\"\nimage32_end:\n"
        ".text\n");
extern const uint8_t image64[], image64_end[], image32[], image32_end[];

enum { INTS, MIXED, SINGLE, LENGTH, FILL, SUM, I8, I16, I32, I64, NOTHING, FACTORIAL, FOREVER, UNDEFINED, DOUBLES, HOST_INTS,
       HOST_MIXED, HOST_STRING, HOST_BUFFER, HOST_NARROW, HOST_NUMBER, READ, FUNCTIONS };
enum { STACK = 0x7f00, HOST = 0x20000000, MMIO = 0x30000000 };

/* One convention. */
typedef struct abi { vm_backend backend; const char *name; unsigned bits; bool other; } abi;

typedef struct guest { vm_machine *m; vm_vcpu *cpu; const abi *a; uint64_t at[FUNCTIONS]; } guest;

static uint64_t get(vm_vcpu *cpu, int reg)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(cpu, reg, &v, vm_reg_size(reg)));
    return v;
}

static guest start(const abi *a)
{
    guest g = { .a = a };
    vm_options o = VM_OPTIONS_INIT;
    uint64_t rsp = STACK;
    unsigned word = a->bits / 8;
    const uint8_t *image = a->bits == 64 ? image64 : image32, *end = a->bits == 64 ? image64_end : image32_end;
    o.backend = a->backend;
    OK(vm_create(&o, &g.m));
    OK(vm_map_ram(g.m, 0, 0x5000, VM_PROT_RWX, NULL));
    OK(vm_map_ram(g.m, 0x6000, 0x20000, VM_PROT_RWX, NULL));
    OK(vm_write(g.m, 0x10000, image, (size_t)(end - image)));
    g.cpu = vm_vcpu_get(g.m, 0);
    OK(vm_vcpu_set_mode(g.cpu, a->bits == 64 ? VM_MODE_FLAT64 : VM_MODE_FLAT32));
    OK(vm_vcpu_write_reg(g.cpu, VM_REG_RSP, &rsp, 8));
    for (unsigned i = 0; i < FUNCTIONS; i++)
        OK(vm_read(g.m, 0x10000 + (i + (a->other ? FUNCTIONS : 0)) * word, &g.at[i], word));
    return g;
}

/* vm_call() with the convention in front; it must return. */
static vm_value call(guest *g, unsigned function, const char *signature, const vm_value *args, size_t count)
{
    char text[200];
    vm_value result = { .u = 0x5555555555555555 };
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rsp = get(g->cpu, VM_REG_RSP), rip = get(g->cpu, VM_REG_RIP);
    snprintf(text, sizeof text, "%s: %s", g->a->name, signature);
    o.deadline_ns = TEST_SECONDS(20);
    OK(vm_call(g->cpu, g->at[function], text, args, count, &result, &o, &e));
    if (e.reason != VM_EXIT_UNTIL) {
        char words[200];
        vm_exit_format(&e, words, sizeof words);
        FAIL("%s: %s", text, words);
    }
    CHECK_EQ(get(g->cpu, VM_REG_RSP), rsp);
    CHECK_EQ(get(g->cpu, VM_REG_RIP), rip);
    return result;
}
#define COUNT(a) (sizeof(a) / sizeof *(a))
#define CALL(function, signature, ...) \
    call(&g, function, signature, (const vm_value[]){ __VA_ARGS__ }, COUNT(((const vm_value[]){ __VA_ARGS__ })))
#define U(x) { .u = (uint64_t)(x) }
#define I(x) { .i = (x) }
#define D(x) { .f64 = (x) }
#define F(x) { .f32 = (x) }

static void check_number(double got, double want, int line)
{
    if (fabs(got - want) > 1e-9 * fabs(want))
        test_fail(__FILE__, line, "%.17g, not %.17g", got, want);
}
#define NUMBER(got, want) check_number(got, want, __LINE__)

static const char INTS_SIGNATURE[] = "u64(u8, i8, u16, i16, u32, i32, u64, i64, u8, i8)";
static const char MIXED_SIGNATURE[] =
    "f64(u32,f64,u8,f32,i64,f64,ptr,f32,i16,f64,u64,f64,u32,f32,f32,f64,f64)";

static uint64_t ints(uint8_t a, int8_t b, uint16_t c, int16_t d, uint32_t e, int32_t f, uint64_t g, int64_t h, uint8_t i, int8_t j)
{
    return a + 3 * (uint64_t)(int64_t)b + 5 * (uint64_t)c + 7 * (uint64_t)(int64_t)d + 11 * (uint64_t)e +
           13 * (uint64_t)(int64_t)f + 17 * g + 19 * (uint64_t)h + 23 * (uint64_t)i + 29 * (uint64_t)(int64_t)j;
}

static double mixed(uint32_t a, double b, uint8_t c, float d, int64_t e, double f, uint64_t g, float h, int16_t i, double j,
                    uint64_t k, double l, uint32_t m, float n, float o, double p, double q)
{
    return a + 2 * b + 3 * c + 4 * d + 5 * (double)e + 6 * f + 7 * (double)(uint32_t)g + 8 * h + 9 * i + 10 * j +
           11 * (double)(uint32_t)k + 12 * l + 13.0 * m + 14 * n + 15 * o + 16 * p + 17 * q;
}

/* ---- the host calls ---- */

static void numbers(guest g)
{
    CHECK_EQ(CALL(INTS, INTS_SIGNATURE, U(200), I(-100), U(60000), I(-30000), U(4000000000u), I(-2000000000),
                  U(0xfedcba9876543210), I(-9000000000000000000), U(7), I(-7)).u,
             ints(200, -100, 60000, -30000, 4000000000u, -2000000000, 0xfedcba9876543210, -9000000000000000000, 7, -7));
    /* What lies beyond a type does not count. */
    CHECK_EQ(CALL(INTS, INTS_SIGNATURE, U(0xabc01), U(0xabcff), U(0xabc0002), U(0xabcfffe), U(0xabc00000003), U(0xabcfffffffd), U(1),
                  U(1), U(0xfff01), U(0xf01)).u, ints(1, -1, 2, -2, 3, -3, 1, 1, 1, 1));
    NUMBER(CALL(MIXED, MIXED_SIGNATURE, U(1), D(2.5), U(3), F(4.25f), I(-5), D(6.125), U(7), F(8.5f), I(-9), D(10.75), U(11),
                D(12.5), U(13), F(14.5f), F(15.25f), D(16.5), D(17.125)).f64,
           mixed(1, 2.5, 3, 4.25f, -5, 6.125, 7, 8.5f, -9, 10.75, 11, 12.5, 13, 14.5f, 15.25f, 16.5, 17.125));
    NUMBER(CALL(DOUBLES, "f64(f64,f64,f64,f64,f64,f64,f64,f64,f64,f64)", D(1), D(2), D(3), D(4), D(5), D(6), D(7), D(8), D(9),
                D(10)).f64, 1 - 4 + 9 - 16 + 25 - 36 + 49 - 64 + 81 - 100);
    NUMBER((double)CALL(SINGLE, "f32(f32,u32,f32)", F(1.5f), U(100), F(0.25f)).f32, 102.75);
}

static void results(guest g)
{
    CHECK_EQ(CALL(I8, "i8(i8)", I(-128)).i, 127);
    CHECK_EQ(CALL(I8, "i8(i8)", I(0)).i, -1);
    CHECK_EQ(CALL(I8, "u8(i8)", I(0)).u, 255);
    CHECK_EQ(CALL(I16, "i16(i16)", I(-5)).i, -6);
    CHECK_EQ(CALL(I16, "u16(i16)", I(0)).u, 65535);
    CHECK_EQ(CALL(I32, "i32(i32)", I(-2000000000)).i, -2000000001);
    CHECK_EQ(CALL(I32, "u32(i32)", I(0)).u, 0xffffffff);
    CHECK_EQ(CALL(I64, "i64(i64)", I(-9000000000000000000)).i, -9000000000000000001);
    CHECK_EQ(CALL(I64, "u64(i64)", I(0x100000000)).u, 0xffffffff);
    CHECK_EQ(call(&g, NOTHING, "void()", NULL, 0).u, 0);
    CHECK_EQ(call(&g, NOTHING, " void ( void ) ", NULL, 0).u, 0);
    /* Results of floating point leave the x87 stack as it was: more of them than it has registers. */
    for (int i = 0; i < 20; i++)
        NUMBER((double)CALL(SINGLE, "f32(f32,u32,f32)", F(i), U(1), F(0)).f32, 2 * i + 1);
    uint16_t tags = 0;
    OK(vm_vcpu_read_reg(g.cpu, VM_REG_FTW, &tags, 2));
    CHECK_EQ(tags, 0xffff);
}

static void memory(guest g)
{
    uint8_t bytes[700], want[700];
    uint32_t sum = 0;
    CHECK_EQ(CALL(LENGTH, "u32(str)", { .cdata = "a string of the host" }).u, 20);
    CHECK_EQ(CALL(LENGTH, "u32(str)", { .cdata = "" }).u, 0);
    CHECK_EQ(CALL(LENGTH, "u32(str)", { .cdata = NULL }).u, 12345);
    for (unsigned i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)(i * 7);
        want[i] = (uint8_t)(bytes[i] + 9 + i);
    }
    CALL(FILL, "void(buf,u32,u8)", { .data = bytes }, U(sizeof bytes), U(9));
    CHECK(!memcmp(bytes, want, sizeof bytes));
    for (unsigned i = 0; i < sizeof bytes; i++)
        sum = 31 * sum + bytes[i];
    CHECK_EQ(CALL(SUM, "u32(cbuf,u32)", { .cdata = bytes }, U(sizeof bytes)).u, sum);
    CHECK_EQ(CALL(SUM, "u32(cbuf[700],u32)", { .cdata = bytes }, U(sizeof bytes)).u, sum);
    CHECK_EQ(CALL(SUM, "u32(cbuf,u32)", { .cdata = bytes }, U(0)).u, 0);
    CHECK(!memcmp(bytes, want, sizeof bytes));
}

/* ---- the guest calls ---- */

typedef struct seen { guest *g; unsigned calls; bool destroyed; int status; vm_value args[8]; } seen;

static uint64_t host_ints(uint8_t a, int8_t b, uint16_t c, int16_t d, uint32_t e, int32_t f, uint64_t g, int64_t h, uint8_t i, int8_t j)
{
    return ints(a, b, c, d, e, f, g, h, i, j);
}
static double host_mixed(uint32_t a, double b, uint8_t c, float d, int64_t e, double f, uint64_t g, float h, int16_t i, double j,
                         uint64_t k, double l, uint32_t m, float n, float o, double p, double q)
{
    return mixed(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q);
}
static uint32_t host_string(void *user, const char *text, uint32_t number, const char *none)
{
    seen *s = user;
    s->calls++;
    CHECK(!strcmp(text, "from the guest"));
    CHECK_EQ(number, 77);
    CHECK(none == NULL);
    return (uint32_t)strlen(text);
}
static uint16_t host_buffer(vm_vcpu *cpu, uint8_t *bytes, uint32_t count, const uint8_t *more)
{
    CHECK(cpu != NULL);
    for (uint32_t i = 0; i < count; i++) {
        CHECK_EQ(bytes[i], i);
        bytes[i] = (uint8_t)(100 + i);
    }
    CHECK_EQ(more[0], count > 32 ? 132 : 32);
    return 60000;
}
static int8_t host_narrow(float x) { return (int8_t)x; }
static float host_number(double a, int64_t n) { return (float)(a + (double)n); }

static vm_binding *bind(guest *g, uint64_t at, const char *signature, void (*fn)(void), void *user)
{
    char text[200];
    vm_bind_desc d = VM_BIND_DESC_INIT;
    vm_binding *b = NULL;
    snprintf(text, sizeof text, "%s:%s", g->a->name, signature);
    d.signature = text;
    d.fn = fn;
    d.user = user;
    int status = vm_bind_function(g->m, at, &d, &b);
    if (status == VM_E_UNSUPPORTED && g->a->backend == VM_BACKEND_KVM)
        test_skip("%s", vm_errmsg());
    OK(status);
    return b;
}
#define BIND(at, signature, fn, user) bind(&g, at, signature, (void (*)(void))fn, user)

static void bound(guest g)
{
    seen s = { .g = &g };
    char text[200];
    BIND(HOST, INTS_SIGNATURE, host_ints, NULL);
    BIND(HOST + 1, MIXED_SIGNATURE, host_mixed, NULL);
    BIND(HOST + 2, "u32(user,str,u32,str)", host_string, &s);
    BIND(HOST + 3, "u16(cpu,buf,u32,cbuf[16])", host_buffer, NULL);
    BIND(HOST + 4, "i8(f32)", host_narrow, NULL);
    BIND(HOST + 5, "f32(f64,i64)", host_number, NULL);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(CALL(HOST_INTS, "u64(ptr)", U(HOST)).u, ints(200, -100, 60000, -30000, 4000000000u, -2000000000,
                                                              0xfedcba9876543210, -9000000000000000000, 7, -7) + 1);
        NUMBER(CALL(HOST_MIXED, "f64(ptr)", U(HOST + 1)).f64,
               2 * mixed(1, 2.5, 3, 4.25f, -5, 6.125, 7, 8.5f, -9, 10.75, 11, 12.5, 13, 14.5f, 15.25f, 16.5, 17.125));
        CHECK_EQ(CALL(HOST_STRING, "u32(ptr)", U(HOST + 2)).u, 15);
        CHECK_EQ(CALL(HOST_BUFFER, "u32(ptr,u32)", U(HOST + 3), U(0)).u, 60000 + 63 * 32);
        CHECK_EQ(CALL(HOST_BUFFER, "u32(ptr,u32)", U(HOST + 3), U(64)).u, 60000 + 63 * 32 + 6400);
        CHECK_EQ(CALL(HOST_NARROW, "i64(ptr,f32)", U(HOST + 4), F(-100)).i, -200);
        NUMBER(CALL(HOST_NUMBER, "f64(ptr,i64)", U(HOST + 5), I(-1000000)).f64, -999998.5);
    }
    CHECK_EQ(s.calls, 3);
    /* The address itself, without guest code around it. */
    vm_value result;
    snprintf(text, sizeof text, "%s: i8(f32)", g.a->name);
    OK(vm_call(g.cpu, HOST + 4, text, (const vm_value[]){ F(42) }, 1, &result, NULL, NULL));
    CHECK_EQ(result.u, 42);
}

/* Values, destroy, unbinding. */
static int values(void *user, vm_vcpu *cpu, const vm_value *args, size_t count, vm_value *result)
{
    seen *s = user;
    CHECK_EQ(count, 3);
    CHECK(cpu == s->g->cpu);
    s->calls++;
    CHECK(!strcmp(args[0].cdata, "from the guest"));
    CHECK_EQ(args[1].u, 77);
    CHECK(args[2].cdata == NULL);
    result->u = 0xfff00000007;         /* u32: the rest does not count */
    return s->status;
}
static void destroyed(void *user) { ((seen *)user)->destroyed = true; }

static void by_values(guest g)
{
    seen s = { .g = &g };
    vm_bind_desc d = VM_BIND_DESC_INIT;
    vm_binding *b;
    vm_exit e = VM_EXIT_INIT;
    char text[100];
    snprintf(text, sizeof text, "%s: u32(str,u32,str)", g.a->name);
    d.signature = text;
    d.values = values;
    d.user = &s;
    d.destroy = destroyed;
    int status = vm_bind_function(g.m, HOST, &d, &b);
    if (status == VM_E_UNSUPPORTED && g.a->backend == VM_BACKEND_KVM)
        test_skip("%s", vm_errmsg());
    OK(status);
    REFUSED(vm_bind_function(g.m, HOST, &d, NULL), VM_E_EXISTS);
    CHECK(!s.destroyed);
    CHECK_EQ(CALL(HOST_STRING, "u32(ptr)", U(HOST)).u, 8);
    s.status = 1;                      /* refuses: the run stops at the address */
    snprintf(text, sizeof text, "%s: u32(ptr)", g.a->name);
    OK(vm_call(g.cpu, g.at[HOST_STRING], text, (const vm_value[]){ U(HOST) }, 1, NULL, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HOOK);
    CHECK_EQ(e.rip, HOST);
    s.status = 0;                      /* and goes on from there */
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.has_until = true;
    o.until = g.a->bits == 64 ? VM_CALL_RETURN64 : VM_CALL_RETURN32;
    OK(vm_vcpu_run(g.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNTIL);
    CHECK_EQ((uint32_t)get(g.cpu, VM_REG_RAX), 8);
    CHECK_EQ(s.calls, 3);
    OK(vm_unbind(g.m, b));
    CHECK(s.destroyed);
    REFUSED(vm_unbind(g.m, b), VM_E_NOTFOUND);
    OK(vm_call(g.cpu, g.at[HOST_STRING], text, (const vm_value[]){ U(HOST) }, 1, NULL, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK_EQ(e.rip, HOST);
    CHECK(e.mmio.is_fetch);
}

/* ---- calls inside calls ---- */

typedef struct recursion { guest *g; unsigned depth, deepest; int status; } recursion;

static uint64_t again(recursion *r, uint32_t n)
{
    char text[100];
    vm_value result = { 0 };
    vm_exit e = VM_EXIT_INIT;
    snprintf(text, sizeof text, "%s: u64(ptr,u32)", r->g->a->name);
    if (++r->depth > r->deepest)
        r->deepest = r->depth;
    r->status = vm_call(r->g->cpu, r->g->at[FACTORIAL], text, (const vm_value[]){ U(HOST), U(n) }, 2, &result, NULL, &e);
    r->depth--;
    if (r->status == VM_OK)
        CHECK_EQ(e.reason, VM_EXIT_UNTIL);
    return result.u;
}

static void inside(guest g)
{
    recursion r = { .g = &g };
    BIND(HOST, "u64(user,u32)", again, &r);
    CHECK_EQ(CALL(FACTORIAL, "u64(ptr,u32)", U(HOST), U(12)).u, 479001600);
    CHECK_EQ(r.deepest, 11);
    OK(r.status);
    /* One more than there may be: it is refused, and the guest goes on with the function's zero. */
    CALL(FACTORIAL, "u64(ptr,u32)", U(HOST), U(VM_CALL_DEPTH + 1));
    CHECK_EQ(r.deepest, VM_CALL_DEPTH);
    CHECK_EQ(r.status, VM_OK);
    CHECK_EQ(CALL(FACTORIAL, "u64(ptr,u32)", U(HOST), U(5)).u, 120);
}

/* A budget outside bounds what runs inside; the exit inside names it. */
static uint64_t spin(recursion *r, uint32_t n)
{
    vm_exit e = VM_EXIT_INIT;
    char text[100];
    snprintf(text, sizeof text, "%s: void()", r->g->a->name);
    OK(vm_call(r->g->cpu, r->g->at[FOREVER], text, NULL, 0, NULL, NULL, &e));
    r->deepest = e.reason;
    return n;
}

static void limits(guest g)
{
    char text[100];
    vm_exit e = VM_EXIT_INIT;
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    recursion r = { .g = &g };
    snprintf(text, sizeof text, "%s: void()", g.a->name);
    o.max_instructions = 1000;
    OK(vm_call(g.cpu, g.at[FOREVER], text, NULL, 0, NULL, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_BUDGET);
    o = (vm_call_options)VM_CALL_OPTIONS_INIT;
    o.deadline_ns = 20000000;
    OK(vm_call(g.cpu, g.at[FOREVER], text, NULL, 0, NULL, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
    REFUSED(vm_call(g.cpu, g.at[FOREVER], text, NULL, 0, NULL, &o, NULL), VM_E_FAULT);
    vm_vcpu_kick(g.cpu);
    OK(vm_call(g.cpu, g.at[FOREVER], text, NULL, 0, NULL, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_KICK);
    o = (vm_call_options)VM_CALL_OPTIONS_INIT;
    o.exception_exits = 1u << 6;
    OK(vm_call(g.cpu, g.at[UNDEFINED], text, NULL, 0, NULL, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
    CHECK_EQ(e.exception.vector, 6);
    BIND(HOST, "u64(user,u32)", spin, &r);
    snprintf(text, sizeof text, "%s: u64(ptr,u32)", g.a->name);
    o = (vm_call_options)VM_CALL_OPTIONS_INIT;
    o.max_instructions = 5000;
    OK(vm_call(g.cpu, g.at[FACTORIAL], text, (const vm_value[]){ U(HOST), U(3) }, 2, NULL, &o, &e));
    CHECK_EQ(r.deepest, VM_EXIT_BUDGET);
    CHECK_EQ(e.reason, VM_EXIT_BUDGET);
    o = (vm_call_options)VM_CALL_OPTIONS_INIT;
    o.deadline_ns = 20000000;
    OK(vm_call(g.cpu, g.at[FACTORIAL], text, (const vm_value[]){ U(HOST), U(3) }, 2, NULL, &o, &e));
    CHECK_EQ(r.deepest, VM_EXIT_DEADLINE);
    CHECK_EQ(e.reason, VM_EXIT_DEADLINE);
}

/* ---- wrong pointers of the guest ---- */

static void wrong_pointers(guest g)
{
    static const struct { const char *signature; uint64_t pointer, bytes; unsigned vector; } cases[] = {
        { "u32(str)", 0x5000, 0, 13 }, { "u32(str)", MMIO, 0, 13 }, { "u32(str)", 0x4fff, 0, 13 },
        { "u32(buf,u32)", 0x4ffc, 4, 0 }, { "u32(buf,u32)", 0x4ffc, 5, 13 }, { "u32(buf,u32)", 0x5000, 0, 0 },
        { "u32(buf,u32)", 0x6000, 0x20000, 13 }, { "u32(buf,i32)", 0x6000, 0xffffffff, 13 }, { "u32(buf,u32)", 0, 0xffffffff, 0 },
        { "u32(buf[16])", 0x4ff8, 0, 13 }, { "u32(cbuf[8])", 0x4ff8, 0, 0 }, { "u32(buf[8])", 0x4ff8, 0, 13 },
        { "u32(str)", 0x3000, 0, 13 },
    };
    vm_binding *b;
    uint8_t fill[0x1000];
    memset(fill, 'x', sizeof fill);
    OK(vm_write(g.m, 0x4000, fill, sizeof fill));
    OK(vm_write(g.m, 0x3000, fill, sizeof fill));
    for (unsigned i = 0; i < COUNT(cases); i++) {
        vm_bind_desc d = VM_BIND_DESC_INIT;
        vm_call_options o = VM_CALL_OPTIONS_INIT;
        vm_exit e = VM_EXIT_INIT;
        char text[100];
        snprintf(text, sizeof text, "%s:%s", g.a->name, cases[i].signature);
        d.signature = text;
        d.fn = (void (*)(void))host_narrow;              /* called with an integer: its result does not matter */
        d.max_buffer = 0x10000;
        d.max_string = 0x800;
        OK(vm_protect(g.m, 0x4000, 0x1000, i == 11 ? VM_PROT_RX : VM_PROT_RWX));
        int status = vm_bind_function(g.m, HOST, &d, &b);
        if (status == VM_E_UNSUPPORTED && g.a->backend == VM_BACKEND_KVM)
            test_skip("%s", vm_errmsg());
        OK(status);
        snprintf(text, sizeof text, "%s: u32(ptr,u32)", g.a->name);
        o.exception_exits = 0xffffffff;
        OK(vm_call(g.cpu, HOST, text, (const vm_value[]){ U(cases[i].pointer), U(cases[i].bytes) }, 2, NULL, &o, &e));
        if (e.reason != (cases[i].vector ? VM_EXIT_EXCEPTION : VM_EXIT_UNTIL) ||
            (cases[i].vector && (e.exception.vector != cases[i].vector || e.rip != HOST)))
            FAIL("case %u: %s, vector %u at 0x%llx", i, vm_exit_name((int)e.reason), e.exception.vector, (unsigned long long)e.rip);
        OK(vm_unbind(g.m, b));
    }
}

/* A stack that is not there, conventions of the other width, refusals. */
static void refusals(guest g)
{
    static const char *const bad[] = { "", "u32", "u32(", "u32)", "u33()", "u32(u32", "u32(u32,)", "u32(,u32)", "u32(void,u32)", "(u32)",
        "str()", "buf()", "u32(buf)", "u32(buf,str)", "u32(buf,f64)", "u32(buf[0])", "u32(buf[x])", "u32(buf[99999999])", "u32(buf[1)",
        "u32(u32) x", "fastcall: u32()", ": u32()", "u32(cpu)", "u32(user)", "u32(u32 u32)", "U32()", "u32(u32[4])", "sysv: win64: u32()",
        "u8(u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8,u8)" };
    char text[100];
    vm_value v[2] = { U(1), U(2) }, r;
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    size_t count = 99;
    for (unsigned i = 0; i < COUNT(bad); i++)
        REFUSED(vm_call(g.cpu, 0x10000, bad[i], v, 1, &r, NULL, &e), VM_E_INVALID);
    REFUSED(vm_call(g.cpu, 0x10000, NULL, v, 1, &r, NULL, &e), VM_E_INVALID);
    REFUSED(vm_call(NULL, 0x10000, "u32()", v, 0, &r, NULL, &e), VM_E_INVALID);
    REFUSED(vm_call(g.cpu, 0x10000, "u32(u32)", v, 2, &r, NULL, &e), VM_E_INVALID);
    REFUSED(vm_call(g.cpu, 0x10000, "u32(u32)", NULL, 1, &r, NULL, &e), VM_E_INVALID);
    REFUSED(vm_call(g.cpu, 0x10000, g.a->bits == 64 ? "cdecl:u32()" : "sysv:u32()", v, 0, &r, NULL, &e), VM_E_UNSUPPORTED);
    OK(vm_signature_check("win64: u32(cpu, user, buf, i8, f64)", &count));
    CHECK_EQ(count, 3);
    REFUSED(vm_signature_check("u32(buf)", &count), VM_E_INVALID);
    snprintf(text, sizeof text, "%s: void()", g.a->name);
    uint64_t rip = get(g.cpu, VM_REG_RIP);
    for (unsigned i = 0; i < 3; i++) {
        o.stack = i == 0 ? 0x5008 : i == 1 ? 8 : MMIO + 0x100;
        REFUSED(vm_call(g.cpu, g.at[NOTHING], text, v, 0, &r, &o, &e), VM_E_FAULT);
        CHECK_EQ(get(g.cpu, VM_REG_RIP), rip);
        CHECK_EQ(get(g.cpu, VM_REG_RSP), STACK);
    }
    o.stack = 0x4f00;
    OK(vm_call(g.cpu, g.at[NOTHING], text, v, 0, &r, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNTIL);
    o.return_address = UINT64_C(1) << 60;
    REFUSED(vm_call(g.cpu, g.at[NOTHING], text, v, 0, &r, &o, &e), VM_E_INVALID);
    o = (vm_call_options)VM_CALL_OPTIONS_INIT;
    o.exception_exits = UINT64_C(1) << 40;
    REFUSED(vm_call(g.cpu, g.at[NOTHING], text, v, 0, &r, &o, &e), VM_E_INVALID);
    /* Buffers longer than a call takes. */
    snprintf(text, sizeof text, "%s: u32(cbuf,u32)", g.a->name);
    REFUSED(vm_call(g.cpu, g.at[SUM], text, (const vm_value[]){ { .cdata = text }, U(VM_CALL_BUFFER + 1) }, 2, &r, NULL, &e),
            VM_E_INVALID);
    REFUSED(vm_call(g.cpu, g.at[SUM], text, (const vm_value[]){ { .cdata = text }, U(0x20000) }, 2, &r, NULL, &e), VM_E_FAULT);
    vm_bind_desc d = VM_BIND_DESC_INIT;
    REFUSED(vm_bind_function(g.m, HOST, &d, NULL), VM_E_INVALID);
    d.signature = "u32()";
    REFUSED(vm_bind_function(g.m, HOST, &d, NULL), VM_E_INVALID);
    d.fn = (void (*)(void))host_narrow;
    d.values = values;
    REFUSED(vm_bind_function(g.m, HOST, &d, NULL), VM_E_INVALID);
    d.fn = NULL;
    d.signature = "u32(cpu)";          /* values gets it anyway */
    REFUSED(vm_bind_function(g.m, HOST, &d, NULL), VM_E_INVALID);
    REFUSED(vm_unbind(g.m, NULL), VM_E_INVALID);
}

/* preserve: nothing of the vCPU changes; else what the ABI lets a function change may. */
static void preserve(guest g)
{
    vm_regs before = VM_REGS_INIT, after = VM_REGS_INIT;
    vm_fpu fpu = VM_FPU_INIT, now = VM_FPU_INIT;
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    char text[100];
    vm_value r;
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_get_regs(g.cpu, &before));
    for (int i = 0; i < (g.a->bits == 64 ? 16 : 8); i++)
        if (i != 4)
            (&before.rax)[i] = 0x11111111u * (unsigned)i;
    before.rflags |= 0x400;            /* DF: cleared for the function, back afterwards */
    OK(vm_vcpu_set_regs(g.cpu, &before));
    OK(vm_vcpu_get_fpu(g.cpu, &fpu));
    memset(fpu.ymm[3], 0x77, 16);
    OK(vm_vcpu_set_fpu(g.cpu, &fpu));
    OK(vm_vcpu_get_fpu(g.cpu, &fpu));
    snprintf(text, sizeof text, "%s: f64(f64,f64,f64,f64,f64,f64,f64,f64,f64,f64)", g.a->name);
    o.preserve = true;
    OK(vm_call(g.cpu, g.at[DOUBLES], text, (const vm_value[]){ D(1), D(2), D(3), D(4), D(5), D(6), D(7), D(8), D(9), D(10) }, 10, &r,
               &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNTIL);
    NUMBER(r.f64, 1 - 4 + 9 - 16 + 25 - 36 + 49 - 64 + 81 - 100);
    OK(vm_vcpu_get_regs(g.cpu, &after));
    CHECK(!memcmp(&before, &after, sizeof before));
    OK(vm_vcpu_get_fpu(g.cpu, &now));
    CHECK(!memcmp(&fpu, &now, sizeof fpu));
}

/* Host functions that run guest functions. */
static void closures(guest g)
{
    vm_closure *c[4];
    char text[200];
    static const struct { unsigned function; const char *signature; } of[] = {
        { INTS, INTS_SIGNATURE }, { MIXED, MIXED_SIGNATURE }, { LENGTH, "u32(str)" }, { UNDEFINED, "i32()" } };
    vm_call_options o = VM_CALL_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.exception_exits = 1u << 6;
    for (unsigned i = 0; i < 4; i++) {
        snprintf(text, sizeof text, "%s: %s", g.a->name, of[i].signature);
        OK(vm_closure_new(g.cpu, g.at[of[i].function], text, &o, &c[i]));
        OK(vm_closure_status(c[i], &e));
        CHECK_EQ(e.reason, 0);
    }
    uint64_t (*f0)(uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, uint8_t, int8_t) =
        (uint64_t (*)(uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, uint8_t, int8_t))vm_closure_function(c[0]);
    double (*f1)(uint32_t, double, uint8_t, float, int64_t, double, uint64_t, float, int16_t, double, uint64_t, double, uint32_t,
                 float, float, double, double) =
        (double (*)(uint32_t, double, uint8_t, float, int64_t, double, uint64_t, float, int16_t, double, uint64_t, double, uint32_t,
                    float, float, double, double))vm_closure_function(c[1]);
    uint32_t (*f2)(const char *) = (uint32_t (*)(const char *))vm_closure_function(c[2]);
    int32_t (*f3)(void) = (int32_t (*)(void))vm_closure_function(c[3]);
    CHECK_EQ(f0(200, -100, 60000, -30000, 4000000000u, -2000000000, 0xfedcba9876543210, -9000000000000000000, 7, -7),
             ints(200, -100, 60000, -30000, 4000000000u, -2000000000, 0xfedcba9876543210, -9000000000000000000, 7, -7));
    NUMBER(f1(1, 2.5, 3, 4.25f, -5, 6.125, 7, 8.5f, -9, 10.75, 11, 12.5, 13, 14.5f, 15.25f, 16.5, 17.125),
           mixed(1, 2.5, 3, 4.25f, -5, 6.125, 7, 8.5f, -9, 10.75, 11, 12.5, 13, 14.5f, 15.25f, 16.5, 17.125));
    CHECK_EQ(f2("seven c"), 7);
    OK(vm_closure_status(c[2], &e));
    CHECK_EQ(e.reason, VM_EXIT_UNTIL);
    CHECK_EQ(f3(), 0);
    OK(vm_closure_status(c[3], &e));
    CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
    for (unsigned i = 0; i < 4; i++)
        vm_closure_free(c[i]);
    vm_closure_free(NULL);
    CHECK(vm_closure_function(NULL) == NULL);
    REFUSED(vm_closure_new(g.cpu, 0, "u32(", NULL, &c[0]), VM_E_INVALID);
    CHECK(c[0] == NULL);
    REFUSED(vm_closure_new(NULL, 0, "u32()", NULL, &c[0]), VM_E_INVALID);
}

/* ---- a case is a function, a backend and a convention ---- */

typedef struct scene { abi a; void (*fn)(guest); } scene;

static void play(const void *arg)
{
    const scene *s = arg;
    guest g = start(&s->a);
    s->fn(g);
    vm_destroy(g.m);
}

SETUP(scenes)
{
    static const struct { const char *name; void (*fn)(guest); } functions[] = {
        { "numbers", numbers }, { "results", results }, { "memory", memory }, { "bound", bound }, { "by_values", by_values },
        { "inside", inside }, { "limits", limits }, { "wrong_pointers", wrong_pointers }, { "refusals", refusals },
        { "preserve", preserve }, { "closures", closures } };
    static const abi abis[] = { { .name = "sysv", .bits = 64 }, { .name = "win64", .bits = 64, .other = true },
                                { .name = "cdecl", .bits = 32 }, { .name = "stdcall", .bits = 32, .other = true } };
    static const vm_backend backends[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    static scene scenes[COUNT(functions) * COUNT(abis) * COUNT(backends)];
    unsigned count = 0;
    for (unsigned b = 0; b < COUNT(backends); b++) {
        uint64_t available = 0;
        if (vm_query(backends[b], "available", &available) || !available)
            continue;
        for (unsigned f = 0; f < COUNT(functions); f++)
            for (unsigned i = 0; i < COUNT(abis); i++) {
                char name[100];
                scene *s = &scenes[count++];
                *s = (scene){ .a = abis[i], .fn = functions[f].fn };
                s->a.backend = backends[b];
                snprintf(name, sizeof name, "%s.%s/%s", functions[f].name, abis[i].name, vm_backend_name(backends[b]));
                test_add(name, play, s, 0);
            }
    }
}

/* Without a convention: by the code. */
EACH_BACKEND(default_convention)
{
    abi a[2] = { { backend, "", 64, false }, { backend, "", 32, false } };
    for (int i = 0; i < 2; i++) {
        guest g = start(&a[i]);
        vm_value r;
        OK(vm_call(g.cpu, g.at[I32], "i32(i32)", (const vm_value[]){ I(5) }, 1, &r, NULL, NULL));
        CHECK_EQ(r.i, 4);
        OK(vm_vcpu_set_mode(g.cpu, VM_MODE_REAL));
        REFUSED(vm_call(g.cpu, 0, "i32(i32)", (const vm_value[]){ I(5) }, 1, &r, NULL, NULL), VM_E_UNSUPPORTED);
        vm_destroy(g.m);
    }
}

/* ---- hypercalls ---- */

static uint64_t hyper_sum(uint32_t a, int16_t b, double c, uint64_t d, const char *text, vm_vcpu *cpu)
{
    CHECK(cpu != NULL);
    return a + (uint64_t)(int64_t)b + (uint64_t)(c * 2) + d + strlen(text);
}

/* mov eax,5; mov ebx,100; mov ecx,-3; mov edx,1000; mov esi,text; vmmcall|vmcall; hlt; text: "four" */
static void hypercall(vm_backend backend, vm_mode mode, uint8_t last)
{
    uint8_t code[] = { 0xb8, 5, 0, 0, 0, 0xbb, 100, 0, 0, 0, 0xb9, 0xfd, 0xff, 0xff, 0xff, 0xba, 0xe8, 3, 0, 0, 0xbe, 29, 0, 0, 0,
                       0x0f, 0x01, last, 0xf4, 'f', 'o', 'u', 'r', 0 };
    vm_vcpu *cpu = bare_machine(backend, mode, code, sizeof code);
    vm_machine *m = vm_vcpu_machine(cpu);
    vm_bind_desc d = VM_BIND_DESC_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_binding *b;
    double half[2] = { 0.5, 0 };
    uint64_t zero = 0;
    d.signature = "u64(u32,i16,f64,u32,str,cpu)";
    d.fn = (void (*)(void))hyper_sum;
    if (backend == VM_BACKEND_KVM) {
        REFUSED(vm_bind_hypercall(m, 5, &d, &b), VM_E_UNSUPPORTED);
        vm_destroy(m);
        return;
    }
    /* nobody: an exit, whose result goes to RAX */
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HYPERCALL);
    CHECK_EQ(e.hypercall.number, 5);
    CHECK_EQ(e.hypercall.args[0], 100);
    CHECK_EQ(e.hypercall.args[2], 1000);
    e.hypercall.result = 4321;
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(get(cpu, VM_REG_RAX), 4321);
    OK(vm_bind_hypercall(m, 5, &d, &b));
    REFUSED(vm_bind_hypercall(m, 5, &d, NULL), VM_E_EXISTS);
    for (int i = 0; i < 2; i++) {
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
        OK(vm_vcpu_write_reg(cpu, VM_REG_XMM0, half, 16));
        OK(vm_vcpu_run(cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(get(cpu, VM_REG_RAX), 100 - 3 + 1 + 1000 + 4);
    }
    OK(vm_unbind(m, b));
    /* too many arguments for the registers, conventions */
    d.signature = "u64(u64,u64,u64,u64,u64,u64,u64)";
    REFUSED(vm_bind_hypercall(m, 5, &d, &b), VM_E_INVALID);
    d.signature = "sysv: u64(u64)";
    REFUSED(vm_bind_hypercall(m, 5, &d, &b), VM_E_INVALID);
    vm_destroy(m);
}

EACH_BACKEND(hypercall_64) { hypercall(backend, VM_MODE_FLAT64, 0xd9); hypercall(backend, VM_MODE_FLAT64, 0xc1); }
EACH_BACKEND(hypercall_32) { hypercall(backend, VM_MODE_FLAT32, 0xd9); hypercall(backend, VM_MODE_FLAT32, 0xc1); }
