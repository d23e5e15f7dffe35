/* opcodes.c - the opcode maps, encoding by encoding, against the host CPU: which exist, which fault how, and how long they are.
 *
 * Every opcode of the one-byte, 0F, 0F38 and 0F3A maps and of the VEX maps is tried with prefixes, each ModRM.reg and a register or
 * a memory operand, in 64- and 32-bit code of ring 3. What follows it is INT3s, so that where execution stops tells its length. It
 * runs natively in a guarded child (native.c) and on each backend; compared are the vector, the error code and where it stopped.
 * Results are the business of the other differential tests.
 *
 * Left out: what would leave the child (system calls, segment loads, far transfers that can succeed, flags with TF, protection
 * keys), what waits, and encodings of features that libvm does not offer, which must be #UD in the guest.
 *
 * In `make check` a sample is run, another share of the cases each; TEST_COUNT=1 runs all of them (TEST_COUNT=n: every n-th).
 */
#include "native.h"

#include <Zydis/Zydis.h>
#include "../backends.h"

enum { LENGTH = 128, START = 0x100 };

/* Up to 16 bytes, and two zeros: what follows prefixes may be looked at. */
typedef struct encoding { unsigned char bytes[18]; unsigned length, bits; } encoding;

/* ---- the list ---- */

typedef void (*take_fn)(void *user, const encoding *e);
typedef struct lister { take_fn take; void *user; unsigned bits; } lister;

static void put(const lister *l, const unsigned char *bytes, unsigned length)
{
    encoding e = { .length = length, .bits = l->bits };
    memcpy(e.bytes, bytes, length);
    l->take(l->user, &e);
}

/* Each ModRM.reg with a register, with a plain pointer (RBX), and all register forms for groups that use ModRM.rm too. */
static void with_modrm(const lister *l, unsigned char *bytes, unsigned length, bool is_whole)
{
    for (unsigned modrm = 0; modrm < 256; modrm++) {
        bool is_register = modrm >= 0xc0;
        if (is_register ? !is_whole && (modrm & 7) != 2 : (modrm & 0xc7) != 3)
            continue;
        bytes[length] = (unsigned char)modrm;
        put(l, bytes, length + 1);
    }
}

static bool is_whole_group(unsigned map, unsigned opcode)
{
    return (map == 0 && opcode >= 0xd8 && opcode <= 0xdf) || (map == 1 && strchr("\x01\x1e\xae\xc7", (int)opcode) && opcode);
}

static void legacy(const lister *l)
{
    static const struct { unsigned char bytes[4]; unsigned length; } prefixes[] = {
        { { 0 }, 0 }, { { 0x66 }, 1 }, { { 0xf2 }, 1 }, { { 0xf3 }, 1 }, { { 0xf0 }, 1 }, { { 0x67 }, 1 }, { { 0x66, 0xf2 }, 2 },
        { { 0x66, 0xf3 }, 2 }, { { 0xf3, 0x66 }, 2 }, { { 0xf2, 0xf3 }, 2 }, { { 0xf3, 0xf2 }, 2 }, { { 0x66, 0xf0 }, 2 },
        { { 0xf2, 0xf0 }, 2 }, { { 0x2e, 0x3e }, 2 },
        { { 0x48 }, 1 }, { { 0x44 }, 1 }, { { 0x66, 0x48 }, 2 }, { { 0xf2, 0x48 }, 2 }, { { 0xf3, 0x48 }, 2 },
        { { 0xf0, 0x48 }, 2 }, { { 0x48, 0x66 }, 2 }, { { 0x66, 0xf3, 0x48 }, 3 },
    };
    static const unsigned char maps[4][2] = { { 0 }, { 0x0f }, { 0x0f, 0x38 }, { 0x0f, 0x3a } };
    static const unsigned map_bytes[4] = { 0, 1, 2, 2 };
    for (unsigned p = 0; p < sizeof prefixes / sizeof prefixes[0]; p++) {
        if (l->bits == 32 && p >= 14)
            break;
        for (unsigned map = 0; map < 4; map++)
            for (unsigned opcode = 0; opcode < 256; opcode++) {
                unsigned char bytes[16];
                unsigned n = prefixes[p].length;
                memcpy(bytes, prefixes[p].bytes, n);
                memcpy(bytes + n, maps[map], map_bytes[map]);
                n += map_bytes[map];
                bytes[n] = (unsigned char)opcode;
                with_modrm(l, bytes, n + 1, is_whole_group(map, opcode));
            }
    }
}

static void vex(const lister *l)
{
    for (unsigned map = 0; map < 5; map++)
        for (unsigned opcode = 0; opcode < 256; opcode++)
            for (unsigned k = 0; k < 32; k++) {
                /* pp, L, W, and vvvv: none or a register */
                unsigned last = (k >> 3 & 1) << 7 | (k & 16 ? 0x58 : 0x78) | (k >> 2 & 1) << 2 | (k & 3);
                unsigned char bytes[16] = { 0xc4, (unsigned char)(0xe0 | map), (unsigned char)last, (unsigned char)opcode };
                with_modrm(l, bytes, 4, false);
                if (map == 1 && !(k & 8)) {
                    unsigned char two[16] = { 0xc5, (unsigned char)(0x80 | (bytes[2] & 0x7f)), (unsigned char)opcode };
                    with_modrm(l, two, 3, false);
                }
            }
}

/* Prefixes that VEX does not allow, and too long instructions. */
static void odd(const lister *l)
{
    static const char *const list[] = {
        "\x66\xc5\xf8\x57\xc0", "\xf2\xc5\xf8\x57\xc0", "\xf3\xc5\xf8\x57\xc0", "\xf0\xc5\xf8\x57\xc0", "\x67\xc5\xf8\x57\xc0",
        "\x2e\xc5\xf8\x57\xc0", "\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x90",
        "\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x66\x90",
        "\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x2e\x0f\x0b",
        "\xf0\x66\xf0\x90", "\xf0\x0f\x0b", "\xf0\xcc", "\xf0\x0f\x1f\x03",
    };
    for (unsigned i = 0; i < sizeof list / sizeof list[0]; i++)
        put(l, (const unsigned char *)list[i], (unsigned)strlen(list[i]));
}

static void list_all(take_fn take, void *user, unsigned bits)
{
    lister l = { take, user, bits };
    legacy(&l);
    vex(&l);
    odd(&l);
}

/* ---- what is left out ---- */

static ZydisDecoder decoders[2];

static bool decode(const encoding *e, ZydisDecodedInstruction *d)
{
    unsigned char bytes[16];
    memset(bytes, 0xcc, sizeof bytes);
    memcpy(bytes, e->bytes, e->length);
    return ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoders[e->bits == 64], NULL, bytes, sizeof bytes - 1, d));
}

/* SLDT and STR; SGDT, SIDT and SMSW. */
static bool is_umip(unsigned char second, unsigned char modrm)
{
    unsigned reg = modrm >> 3 & 7;
    return second == 0x00 ? reg < 2 : reg == 4 || (modrm < 0xc0 && reg < 2);
}

static bool is_left_out(const encoding *e)
{
    ZydisDecodedInstruction d;
    unsigned at = 0;
    bool is_opsize = false, is_rep = false;
    while (at < e->length && (memchr("\x66\x67\xf0\xf2\xf3\x2e\x3e\x26\x36\x64\x65", e->bytes[at], 11) ||
                              (e->bits == 64 && (e->bytes[at] & 0xf0) == 0x40))) {
        is_opsize |= e->bytes[at] == 0x66;
        is_rep |= (e->bytes[at++] & 0xfe) == 0xf2;
    }
    unsigned char op = e->bytes[at], second = e->bytes[at + 1], third = e->bytes[at + 2];
    switch (op) {
    case 0x07: case 0x17: case 0x1f: case 0x8e: case 0x9d: case 0xcf: case 0xca: case 0xcb: case 0xcd:
        return true;                        /* segments, flags, far returns, software interrupts */
    case 0xe0: case 0xe1:
        if (is_rep) return true;            /* some CPUs let the prefix decide the condition */
        break;
    case 0xc4: case 0xc5:
        if (e->bits == 32 && second < 0xc0) return true;        /* LES, LDS */
        break;
    case 0xff:
        if ((second >> 3 & 7) == 3 || (second >> 3 & 7) == 5) return true;
        break;
    case 0x62:
        return e->bits == 64 || second >= 0xc0;                 /* EVEX */
    case 0x0f:
        if (second == 0x05 || second == 0x34 || second == 0x07 || second == 0x35 || second == 0xa1 || second == 0xa9 ||
            second == 0xb2 || second == 0xb4 || second == 0xb5)
            return true;
        if (second == 0x01 && (third == 0xc1 || third == 0xd9 || third == 0xee || third == 0xef || third == 0xfb || third == 0xfa))
            return true;                    /* hypervisor calls, protection keys, MWAITX */
        if (second <= 0x01 && is_umip(second, third))
            return true;                    /* the host's kernel may forbid them, and then emulates some */
        if (second == 0xf7 && e->bits == 32)
            return true;                    /* MASKMOVQ: whether bytes that are masked out can fault differs by model */
        if (second == 0xae && third >= 0xc0 && e->bits == 64)
            return true;                    /* WRFSBASE and its like */
        break;
    default: break;
    }
    bool is_near_branch = op == 0xe8 || op == 0xe9 || op == 0xeb || (op & 0xf0) == 0x70 || (op & 0xfc) == 0xe0 ||
                          (op == 0x0f && (second & 0xf0) == 0x80);
    if (e->bits == 64 && is_opsize && is_near_branch)
        return true;                        /* near branches with 66: vendors differ */
    /* An opcode without ModRM: once is enough, and the byte behind it is no INT3. */
    return decode(e, &d) && d.length < e->length && e->bytes[e->length - 1] != 0x03;
}

/* What the guest raises #UD for, although this host goes on: features that no guest is offered, and what the manuals do not
 * define: LOCK with a move to or from CR (AMD's other name of CR8) or with VERW, VPERMQ and VPERMPD without VEX.W. */
static bool is_not_offered(const encoding *e)
{
    ZydisDecodedInstruction d;
    if (!decode(e, &d)) {
        const unsigned char *last = e->bytes + e->length - 3;
        bool is_vpermq = e->bytes[0] == 0xc4 && last[-1] == 0xe3 && last[0] == 0x7d && last[1] <= 1;
        return is_vpermq || (last[0] == 0x0f && (last[1] == 0x20 || last[1] == 0x22 || (last[1] == 0 && (last[2] >> 3 & 7) == 5)));
    }
    switch (d.meta.isa_ext) {
    case ZYDIS_ISA_EXT_AVX512VEX: case ZYDIS_ISA_EXT_AVX512EVEX: case ZYDIS_ISA_EXT_VAES: case ZYDIS_ISA_EXT_VPCLMULQDQ:
    case ZYDIS_ISA_EXT_GFNI: case ZYDIS_ISA_EXT_SSE4A: case ZYDIS_ISA_EXT_CLZERO: case ZYDIS_ISA_EXT_MONITORX: case ZYDIS_ISA_EXT_RDPRU:
    case ZYDIS_ISA_EXT_PKU: case ZYDIS_ISA_EXT_WAITPKG: case ZYDIS_ISA_EXT_SVM: case ZYDIS_ISA_EXT_XSAVES: case ZYDIS_ISA_EXT_SNP:
        return true;
    default: return false;
    }
}

/* ---- running ---- */

typedef struct guest { vm_machine *m; vm_vcpu *cpu; } guest;
typedef struct run {
    guest g;
    native_batch *b;
    encoding encodings[NATIVE_BATCH];
    uint64_t listed, every, done, lost, bad;
} run;

static void put64(guest *g, uint64_t gpa, uint64_t v) { OK(vm_write(g->m, gpa, &v, 8)); }

static void guest_open(guest *g, vm_backend backend)
{
    enum { PML4 = 0x10000, PDPT = 0x11000, PD = 0x12000, PT = 0x13000 };
    vm_options o = VM_OPTIONS_INIT;
    o.backend = backend;
    OK(vm_create(&o, &g->m));
    g->cpu = vm_vcpu_get(g->m, 0);
    OK(vm_map_ram(g->m, 0x10000, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_map_ram(g->m, N_CODE, N_CODE_BYTES, VM_PROT_RWX, NULL));
    OK(vm_map_ram(g->m, N_DATA, N_DATA_BYTES, VM_PROT_RWX, NULL));
    put64(g, PML4, PDPT | 7);
    put64(g, PDPT, PD | 7);
    put64(g, PD + 8, PT | 7);
    put64(g, PD + 16, (PT + 0x1000) | 7);
    put64(g, PD, (PT + 0x2000) | 7);                        /* GDT and TSS, for the kernel only */
    put64(g, PT + 0x2000 + 8 * 0x16, 0x16003);
    put64(g, 0x16060, UINT64_C(0xffff) << 48);              /* no I/O bitmap */
    for (unsigned i = 0; i < 2; i++)
        put64(g, PT + 8 * i, (N_CODE + i * 4096) | 5);
    for (unsigned i = 0; i < 3; i++)
        put64(g, PT + 0x1000 + 8 * i, (N_DATA + i * 4096) | 7 | UINT64_C(1) << 63);
}

static void guest_load(guest *g, const native_case *c)
{
    static unsigned char data[N_DATA_BYTES], code[N_CODE_BYTES];
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    OK(vm_vcpu_set_mode(g->cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_sregs(g->cpu, &s));
    s.cr3 = 0x10000;
    s.cr0 |= 0x80010021;
    s.cr4 |= 0x50600;                                       /* OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE, as Linux has them */
    s.efer |= 0x800;
    s.cs = c->bits == 64 ? (vm_segment){ .selector = 0x33, .limit = 0xffffffff, .attributes = 0xa0fb }
                         : (vm_segment){ .selector = 0x23, .limit = 0xffffffff, .attributes = 0xc0fb };
    s.tr = (vm_segment){ .selector = 0x40, .base = 0x16000, .limit = 0x67, .attributes = 0x8b };
    s.ldtr = (vm_segment){ 0 };
    s.gdtr = (vm_dtable){ 0x16800, 0x7f };
    s.ss = s.ds = s.es = (vm_segment){ .selector = 0x2b, .limit = 0xffffffff, .attributes = 0xc0f3 };
    OK(vm_vcpu_set_sregs(g->cpu, &s));
    memcpy(&r.rax, c->in.gpr, 32);
    memcpy(&r.rsp, c->in.gpr + 4, 96);
    r.rip = N_CODE + c->start;
    r.rflags = c->in.flags;
    OK(vm_vcpu_set_regs(g->cpu, &r));
    native_fill(data, sizeof data, c->memory_seed);
    OK(vm_write(g->m, N_DATA, data, sizeof data));
    native_code(code, c);
    OK(vm_write(g->m, N_CODE, code, sizeof code));
}

static void prepare(native_case *c, const encoding *e)
{
    memset(c, 0, sizeof *c);
    memset(c->code, 0xcc, LENGTH);
    memcpy(c->code, e->bytes, e->length);
    c->start = START;
    c->length = LENGTH;
    c->bits = e->bits;
    c->memory_seed = 0x1234567;
    for (unsigned i = 0; i < 16; i++)
        c->in.gpr[i] = N_DATA + 0x400 + 0x40 * i;
    c->in.gpr[1] = 2;                                       /* RCX: a short REP */
    c->in.gpr[2] = 0;
    c->in.flags = 0x202;
    static const struct { uint16_t fcw, fsw; } x87 = { 0x37f, 0 };
    static const uint32_t mxcsr = 0x1f80;
    static const uint64_t xstate = 7;
    memcpy(c->in.xsave, &x87, 4);
    memcpy(c->in.xsave + 24, &mxcsr, 4);
    memcpy(c->in.xsave + 512, &xstate, 8);
}

static void show(const encoding *e, const char *text)
{
    ZydisDecodedInstruction d;
    printf("# %u-bit", e->bits);
    for (unsigned i = 0; i < e->length; i++)
        printf(" %02x", e->bytes[i]);
    printf("  %s: %s\n", decode(e, &d) ? ZydisMnemonicGetString(d.mnemonic) : "-", text);
    fflush(stdout);
}

static void compare(run *t, const encoding *e, const native_result *n)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit x = VM_EXIT_INIT;
    native_case c;
    char text[200];
    prepare(&c, e);
    guest_load(&t->g, &c);
    o.has_until = true;
    o.until = N_CODE + c.start + c.length;
    o.exception_exits = 0xffffffff;
    o.deadline_ns = TEST_SECONDS(2);
    OK(vm_vcpu_run(t->g.cpu, &o, &x));
    int vector = x.reason == VM_EXIT_UNTIL ? -1 : x.reason == VM_EXIT_EXCEPTION ? x.exception.vector : 1000 + (int)x.reason;
    uint64_t stopped = x.rip;
    if (vector == 3) {                                      /* a trap: the exit has its start, the signal its end */
        while (stopped >= N_CODE + c.start && c.code[stopped - N_CODE - c.start] != 0xcc)
            stopped++;
        stopped++;
    }
    bool has_error = vector == 8 || (vector >= 10 && vector <= 13) || vector == 17;
    if (vector == n->vector && stopped == n->out.rip && (!has_error || x.exception.error == n->error))
        return;
    if (vector == 6 && is_not_offered(e))
        return;
    snprintf(text, sizeof text, "vector %d error %#x at %+d, native %d %#x at %+d (exit %s)", vector, has_error ? x.exception.error : 0,
             (int)(stopped - N_CODE - c.start), n->vector, n->error, (int)(n->out.rip - N_CODE - c.start), vm_exit_name((int)x.reason));
    show(e, text);
    t->bad++;
}

static void flush(run *t)
{
    native_run(t->b);
    for (unsigned i = 0; i < t->b->count; i++) {
        if (t->b->results[i].is_done) {
            compare(t, &t->encodings[i], &t->b->results[i]);
        } else {
            t->lost++;
            show(&t->encodings[i], "lost");
        }
    }
    t->done += t->b->count;
    t->b->count = 0;
}

static void take(void *user, const encoding *e)
{
    run *t = user;
    if (is_left_out(e) || t->listed++ % t->every)
        return;
    t->encodings[t->b->count] = *e;
    prepare(&t->b->cases[t->b->count++], e);
    if (t->b->count == NATIVE_BATCH)
        flush(t);
}

static void opcode_maps(vm_backend backend)
{
    const char *count = getenv("TEST_COUNT");
    static run t;
    t.every = count ? strtoull(count, NULL, 0) : 61;
    ZydisDecoderInit(&decoders[0], ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
    ZydisDecoderInit(&decoders[1], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    t.b = native_open();
    if (!t.b)
        test_skip("the window at %#" PRIx64 " cannot be mapped in this process", N_CODE);
    guest_open(&t.g, backend);
    vm_sregs s = VM_SREGS_INIT;
    OK(vm_vcpu_set_mode(t.g.cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_sregs(t.g.cpu, &s));
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !(s.xcr0 & 4))
        test_skip("no AVX2 here or in a guest of this backend");
    t.b->count = 0;
    for (unsigned bits = 64; bits >= 32; bits -= 32) {
        list_all(take, &t, bits);
        flush(&t);
    }
    native_close();
    vm_destroy(t.g.m);
    printf("# %" PRIu64 " encodings, %" PRIu64 " lost\n", t.done, t.lost);
    CHECK(t.lost == 0);
    if (t.bad)
        FAIL("%" PRIu64 " encodings differ from the host CPU", t.bad);
}

static void each(const void *arg) { opcode_maps(*(const vm_backend *)arg); }
SETUP(each) { add_for_backends("opcode_maps", each, getenv("TEST_COUNT") ? 100000 : 180); }
