/* integer.c - random integer instructions, executed by the interpreter and by the host CPU, must agree.
 *
 * Byte strings are made at random around the integer opcodes (prefixes, REX, opcode, ModRM, the rest). What the decoder takes
 * is executed on both sides; what it calls illegal must raise SIGILL on the host. The guest is in flat 64-bit mode and its
 * page of data lies at the same linear address as the host's copy, so registers may hold real pointers. Compared: all
 * general registers, the arithmetic flags, DF, the data, and the fault. The seed is fixed; TEST_SEED replaces it.
 *
 * Left out: instructions that a process may not or must not execute (privileged, ports, far transfers, software interrupts,
 * branches), vector and x87 state, and results that are not a function of registers (CPUID, TSC, random numbers).
 */
#include <cpuid.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <Zydis/Zydis.h>
#include "test.h"
#include "../unit/x86_bare.h"
#include "x86/ops.h"

#define DATA UINT64_C(0x240000)          /* host and guest */
#define DATA_BYTES 0x4000u
#define CODE UINT64_C(0x210000)
#define MIDDLE (DATA + DATA_BYTES / 2)
#define FLAGS_SEEN (X86_FL_ARITH | X86_FL_DF)

static unsigned mode;                    /* 8: 64-bit code, 4: 32-bit code */
static uint64_t seed;
static uint64_t rnd(void)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed * UINT64_C(0x2545f4914f6cdd1d);
}

/* ---- the host's side ---- */

typedef struct regs { uint64_t gpr[16], flags; } regs;
struct native { regs in, out; uint64_t host_rsp; struct { uint32_t offset; uint16_t selector; } to_32; uint8_t stack[256]; };
static struct native *native;            /* at a fixed low address, so that stubs can reach it without a register */
#define NATIVE UINT64_C(0x230000)
static sigjmp_buf escape;
static volatile int last_signal;

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)info, (void)context;
    last_signal = number;
    siglongjmp(escape, 1);
}

static unsigned emit(uint8_t *p, const void *bytes, unsigned n)
{
    memcpy(p, bytes, n);
    return n;
}

/* mov [disp32], reg or mov reg, [disp32]; 64-bit, absolute */
static unsigned move(uint8_t *p, bool is_load, unsigned reg, uint64_t at)
{
    p[0] = (uint8_t)(0x48 | (reg >> 3 << 2));
    p[1] = is_load ? 0x8b : 0x89;
    p[2] = (uint8_t)(4 | (reg & 7) << 3);
    p[3] = 0x25;
    uint32_t disp = (uint32_t)at;
    memcpy(p + 4, &disp, 4);
    return 8;
}

#define AT(field) (NATIVE + offsetof(struct native, field))

/* The code: save the callee-saved registers and RSP, load everything, the instruction, store everything. */
static void make_stub(const uint8_t *bytes, unsigned n)
{
    uint8_t *p = (uint8_t *)(uintptr_t)CODE;
    p += emit(p, "\x53\x55\x41\x54\x41\x55\x41\x56\x41\x57", 10);
    p += move(p, false, 4, AT(host_rsp));
    p += emit(p, "\xff\x34\x25", 3);                          /* push [in.flags]; popfq */
    uint32_t at = (uint32_t)AT(in.flags);
    p += emit(p, &at, 4);
    *p++ = 0x9d;
    for (unsigned r = 0; r < 16; r++)
        p += move(p, true, r, AT(in.gpr) + 8 * r);
    p += emit(p, bytes, n);
    for (unsigned r = 0; r < 16; r++)
        p += move(p, false, r, AT(out.gpr) + 8 * r);
    p += move(p, true, 4, AT(host_rsp));
    p += emit(p, "\x9c\x8f\x04\x25", 4);                      /* pushfq; pop [out.flags] */
    at = (uint32_t)AT(out.flags);
    p += emit(p, &at, 4);
    p += emit(p, "\xfc\x41\x5f\x41\x5e\x41\x5d\x41\x5c\x5d\x5b\xc3", 12);   /* cld; pops; ret */
}

/* mov [disp32], reg or mov reg, [disp32] in 32-bit code */
static unsigned move32(uint8_t *p, bool is_load, unsigned reg, uint64_t at)
{
    uint32_t disp = (uint32_t)at;
    p[0] = is_load ? 0x8b : 0x89;
    p[1] = (uint8_t)(5 | reg << 3);
    memcpy(p + 2, &disp, 4);
    return 6;
}

#define CODE32 (CODE + 0x100)
#define BACK (CODE + 0x300)
/* The same for 32-bit code: into compatibility mode by a far jump, and back. The selectors are Linux's. */
static void make_stub32(const uint8_t *bytes, unsigned n)
{
    uint8_t *p = (uint8_t *)(uintptr_t)CODE;
    uint32_t at = (uint32_t)AT(to_32), stack = (uint32_t)AT(stack) + 128;
    native->to_32.offset = (uint32_t)CODE32;
    native->to_32.selector = 0x23;
    p += emit(p, "\x53\x55\x41\x54\x41\x55\x41\x56\x41\x57", 10);
    p += move(p, false, 4, AT(host_rsp));
    p += emit(p, "\xff\x2c\x25", 3);                          /* ljmp [to_32] */
    p += emit(p, &at, 4);
    p = (uint8_t *)(uintptr_t)CODE32;
    p += emit(p, "\xb8\x2b\x00\x00\x00\x8e\xd8\x8e\xc0\xbc", 10);   /* mov eax, 2bh; mov ds, eax; mov es, eax; mov esp, */
    p += emit(p, &stack, 4);
    p += emit(p, "\xff\x35", 2);                              /* push [in.flags]; popfd */
    at = (uint32_t)AT(in.flags);
    p += emit(p, &at, 4);
    *p++ = 0x9d;
    for (unsigned r = 0; r < 8; r++)
        p += move32(p, true, r, AT(in.gpr) + 8 * r);
    p += emit(p, bytes, n);
    for (unsigned r = 0; r < 8; r++)
        p += move32(p, false, r, AT(out.gpr) + 8 * r);
    *p++ = 0xbc;
    p += emit(p, &stack, 4);
    p += emit(p, "\x9c\x8f\x05", 3);                          /* pushfd; pop [out.flags] */
    at = (uint32_t)AT(out.flags);
    p += emit(p, &at, 4);
    p += emit(p, "\xfc\xea", 2);                              /* cld; ljmp 33h:BACK */
    at = (uint32_t)BACK;
    p += emit(p, &at, 4);
    p += emit(p, "\x33\x00", 2);
    p = (uint8_t *)(uintptr_t)BACK;
    p += move(p, true, 4, AT(host_rsp));
    p += emit(p, "\x41\x5f\x41\x5e\x41\x5d\x41\x5c\x5d\x5b\xc3", 11);
}

static int run_native(const uint8_t *bytes, unsigned n, const regs *in, regs *out)
{
    if (mode == 8)
        make_stub(bytes, n);
    else
        make_stub32(bytes, n);
    memset(&native->out, 0, sizeof native->out);
    native->in = *in;
    last_signal = 0;
    if (sigsetjmp(escape, 1) == 0)
        ((void (*)(void))(uintptr_t)CODE)();
    *out = native->out;
    return last_signal;
}

static void set_up_host(void)
{
    struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    static uint8_t stack[1 << 16];
    stack_t alternate = { .ss_sp = stack, .ss_size = sizeof stack };
    if (native)
        return;
    test_maps_writable_code();
    void *p = mmap((void *)(uintptr_t)CODE, DATA + DATA_BYTES - CODE, PROT_READ | PROT_WRITE | PROT_EXEC,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (p != (void *)(uintptr_t)CODE)
        test_skip("the low addresses this needs are taken");
    native = (struct native *)(uintptr_t)NATIVE;
    sigaltstack(&alternate, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGILL, &action, NULL);
    sigaction(SIGFPE, &action, NULL);
    sigaction(SIGTRAP, &action, NULL);
}

/* ---- making cases ---- */

static unsigned make_bytes(uint8_t *b)
{
    static const uint8_t prefixes[] = { 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x3e, 0x66, 0xf3 };
    unsigned n = 0;
    unsigned how_many = (rnd() & 3) ? rnd() & 1 : rnd() & 3;
    for (unsigned i = 0; i < how_many; i++)
        b[n++] = prefixes[rnd() & 7];
    if (mode == 8 && (rnd() & 1))
        b[n++] = 0x40 | (rnd() & 15);
    unsigned map = rnd() % 8;
    if (map == 7 && !how_many) {                             /* VEX: BMI */
        n = 0;
        b[n++] = 0xc4;
        b[n++] = (uint8_t)((mode == 8 ? rnd() & 0xe0 : 0xe0) | (2 + (rnd() & 1)));
        b[n++] = (uint8_t)(rnd() & 0xfb);
        b[n++] = 0xf0 + (rnd() & 7);
    } else if (map >= 5) {
        b[n++] = 0x0f;
        if (rnd() % 8 == 0) {
            b[n++] = 0x38;
            b[n++] = 0xf0 + (rnd() & 7);
        } else {
            static const uint8_t ranges[][2] = { { 0x40, 16 }, { 0x90, 16 }, { 0xa0, 32 }, { 0xc0, 16 }, { 0x18, 8 } };
            const uint8_t *r = ranges[rnd() % 5];
            b[n++] = (uint8_t)(r[0] + rnd() % r[1]);
        }
    } else {
        b[n++] = (uint8_t)rnd();
    }
    while (n < 15)
        b[n++] = (uint8_t)(rnd() & 3 ? rnd() : rnd() & 7);
    return n;
}

/* What both sides may execute. */
static bool is_usable(const x86_insn *in)
{
    if (in->exec == x86_op_illegal)
        return false;                    /* see illegal_encodings */
    if (in->flags & (X86_IF_BRANCH | X86_IF_END | X86_IF_FPU | X86_IF_VEC | X86_IF_PRIV))
        return false;
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_IN: case ZYDIS_MNEMONIC_OUT: case ZYDIS_MNEMONIC_INSB: case ZYDIS_MNEMONIC_INSW: case ZYDIS_MNEMONIC_INSD:
    case ZYDIS_MNEMONIC_OUTSB: case ZYDIS_MNEMONIC_OUTSW: case ZYDIS_MNEMONIC_OUTSD: case ZYDIS_MNEMONIC_CPUID:
    case ZYDIS_MNEMONIC_RDTSC: case ZYDIS_MNEMONIC_RDTSCP: case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED:
    case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_RDPMC: case ZYDIS_MNEMONIC_XGETBV: case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_PUSHF: case ZYDIS_MNEMONIC_PAUSE: case ZYDIS_MNEMONIC_SGDT: case ZYDIS_MNEMONIC_SIDT:
    case ZYDIS_MNEMONIC_SLDT: case ZYDIS_MNEMONIC_STR: case ZYDIS_MNEMONIC_SMSW: case ZYDIS_MNEMONIC_LAR: case ZYDIS_MNEMONIC_LSL:
    case ZYDIS_MNEMONIC_VERR: case ZYDIS_MNEMONIC_VERW: case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
    case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_STI:
        return false;
    default: break;
    }
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_SEG || in->op[i].kind == X86_OP_CR || in->op[i].kind == X86_OP_DR)
            return false;
    return in->seg < X86_FS && in->base != X86_REG_RIP;
}

static uint64_t value(void)
{
    switch (rnd() % 6) {
    case 0: return rnd();
    case 1: return rnd() & 0xff;
    case 2: return (uint64_t)(int64_t)(int8_t)rnd();
    case 3: return (uint32_t)rnd();
    case 4: return UINT64_C(1) << (rnd() & 63);
    default: return rnd() >> (rnd() & 63);
    }
}

static bool is_inside(uint64_t at, unsigned n)
{
    return at >= DATA + 64 && at + n <= DATA + DATA_BYTES - 64;
}

/* Registers under which every access stays inside the data. False: no luck. */
static bool make_regs(x86_cpu *cpu, const x86_insn *in, regs *r)
{
    for (unsigned i = 0; i < 16; i++)
        r->gpr[i] = mode == 8 ? value() : i < 8 ? (uint32_t)value() : 0;
    r->flags = (rnd() & FLAGS_SEEN) | 2 | X86_FL_IF;
    r->gpr[X86_RSP] = MIDDLE + (rnd() & 0x3f) * 8;
    if (in->exec == x86_op_leave)
        r->gpr[X86_RBP] = MIDDLE;
    if (in->exec == x86_op_enter) {
        r->gpr[X86_RBP] = MIDDLE + 0x100;
        if ((uint16_t)in->imm > 0x400)
            return false;
    }
    if (in->flags & X86_IF_STRING || in->exec == x86_op_xlat) {
        r->gpr[X86_RSI] = MIDDLE + (rnd() & 0x1f);
        r->gpr[X86_RDI] = MIDDLE + (rnd() & 0xff);
        r->gpr[X86_RBX] = MIDDLE;
        r->gpr[X86_RCX] = rnd() & 0x3f;
        if (rnd() & 1)
            r->gpr[X86_RCX] = 0;
        if (in->asz == 2)
            return false;
        if (in->asz == 4 && mode == 8)   /* upper halves do not count */
            for (unsigned i = 0; i < 4; i++)
                r->gpr[(uint8_t[]){ X86_RCX, X86_RSI, X86_RDI, X86_RBX }[i]] |= rnd() << 32;
        return true;
    }
    if (!(in->flags & X86_IF_MEM) || in->exec == x86_op_nop || in->mnemonic == ZYDIS_MNEMONIC_LEA)
        return true;
    if (in->base == X86_REG_RIP || in->asz == 2 || in->op[0].kind == X86_OP_MOFFS || in->op[1].kind == X86_OP_MOFFS)
        return false;
    if (in->index != X86_NOREG)
        r->gpr[in->index] = rnd() & 0x3f;
    if (in->base != X86_NOREG)
        r->gpr[in->base] = MIDDLE - (uint64_t)in->disp - (in->index == in->base ? 0 : 8);
    if (in->index == X86_RSP || in->base == X86_RSP)
        if (!is_inside(r->gpr[X86_RSP], 8))
            return false;
    bool is_bit_op = in->mnemonic == ZYDIS_MNEMONIC_BT || in->mnemonic == ZYDIS_MNEMONIC_BTS || in->mnemonic == ZYDIS_MNEMONIC_BTR ||
                     in->mnemonic == ZYDIS_MNEMONIC_BTC;
    if (is_bit_op && in->op[1].kind == X86_OP_GPR) {
        unsigned reg = in->op[1].reg;
        if (reg == in->base || reg == in->index || reg == X86_RSP)
            return false;
        uint64_t offset = rnd() % 0x2000 - 0x1000;
        r->gpr[reg] = in->op[1].size == 8 ? offset : in->op[1].size == 4 ? (rnd() << 32 | (uint32_t)offset) : (rnd() << 16 | (uint16_t)offset);
    }
    if (mode == 4)
        for (unsigned i = 0; i < 8; i++)
            r->gpr[i] = (uint32_t)r->gpr[i];
    memcpy(cpu->gpr, r->gpr, sizeof r->gpr);
    cpu->rip = CODE;
    return is_inside(x86_offset(cpu, in), 16);
}

static bool is_amd(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

/* Flags that the manuals leave undefined and that are computed here rather than taken from the host, as AMD cores do. */
static uint64_t undefined(const x86_insn *in)
{
    if (is_amd())
        return 0;
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT: return X86_FL_OF | X86_FL_SF | X86_FL_PF | X86_FL_AF;
    case ZYDIS_MNEMONIC_ANDN: case ZYDIS_MNEMONIC_BLSI: case ZYDIS_MNEMONIC_BLSR: case ZYDIS_MNEMONIC_BLSMSK: case ZYDIS_MNEMONIC_BZHI:
        return X86_FL_PF | X86_FL_AF;
    case ZYDIS_MNEMONIC_BEXTR: return X86_FL_PF | X86_FL_AF | X86_FL_SF;
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        return X86_FL_OF | X86_FL_SF | X86_FL_AF | X86_FL_PF;
    default: return 0;
    }
}

static int signal_of(const bare *b, x86_stop stop)
{
    if (stop != X86_STOP_EXCEPTION)
        return 0;
    switch (b->cpu->fault.vector) {
    case X86_UD: return SIGILL;
    case X86_DE: return SIGFPE;
    default: return SIGSEGV;
    }
}

static void run_guest(bare *b, const uint8_t *bytes, unsigned n, const regs *in, x86_stop *stop)
{
    x86_cpu *cpu = b->cpu;
    memcpy(cpu->gpr, in->gpr, sizeof cpu->gpr);
    cpu->rflags = in->flags;
    cpu->rip = CODE;
    cpu->exception_exits = ~UINT64_C(0);
    cpu->has_until = true;
    cpu->until = CODE + n;
    bare_code(b, CODE, bytes, n);
    *stop = bare_run(b, 1000);
}

static const char *differ(bare *b, const x86_insn *in, x86_stop stop, int sig, const regs *want, const uint8_t *data, char *text)
{
    if (signal_of(b, stop) != sig) {
        sprintf(text, "host signal %d, guest stop %d vector %d", sig, stop, b->cpu->fault.vector);
        return text;
    }
    if (sig)
        return NULL;
    for (unsigned i = 0; i < 16; i++)
        if (b->cpu->gpr[i] != want->gpr[i]) {
            sprintf(text, "register %u is %#" PRIx64 ", host %#" PRIx64, i, b->cpu->gpr[i], want->gpr[i]);
            return text;
        }
    uint64_t care = FLAGS_SEEN & ~undefined(in);
    if ((b->cpu->rflags ^ want->flags) & care) {
        sprintf(text, "flags are %#" PRIx64 ", host %#" PRIx64, b->cpu->rflags & FLAGS_SEEN, want->flags & FLAGS_SEEN);
        return text;
    }
    if (memcmp(b->ram + DATA, (void *)(uintptr_t)DATA, DATA_BYTES)) {
        unsigned at = 0;
        while (b->ram[DATA + at] == ((uint8_t *)(uintptr_t)DATA)[at])
            at++;
        sprintf(text, "byte %#x is %02x, host %02x (was %02x)", at, b->ram[DATA + at], ((uint8_t *)(uintptr_t)DATA)[at], data[at]);
        return text;
    }
    return NULL;
}

static void random_instructions(const void *arg)
{
    mode = *(const unsigned *)arg;
    const char *text_seed = getenv("TEST_SEED"), *text_count = getenv("TEST_COUNT");
    unsigned tries = text_count ? (unsigned)strtoul(text_count, NULL, 0) : 400000, compared = 0, faults = 0, failed = 0;
    seed = text_seed ? strtoull(text_seed, NULL, 0) : UINT64_C(0x243f6a8885a308d3);
    set_up_host();
    bare *b = bare_new(mode == 8 ? VM_MODE_FLAT64 : VM_MODE_FLAT32);
    static uint8_t data[DATA_BYTES];
    for (unsigned t = 0; t < tries; t++) {
        uint8_t bytes[15];
        x86_insn in;
        regs r, want;
        x86_stop stop;
        char why[128], name[96];
        make_bytes(bytes);
        if (x86_decode(bytes, 15, mode, &in) < 0 || !is_usable(&in))
            continue;
        if (!make_regs(b->cpu, &in, &r))
            continue;
        for (unsigned i = 0; i < DATA_BYTES; i += 8) {
            uint64_t v = rnd();
            memcpy(data + i, &v, 8);
        }
        memcpy((void *)(uintptr_t)DATA, data, DATA_BYTES);
        memcpy(b->ram + DATA, data, DATA_BYTES);
        int sig = run_native(bytes, in.length, &r, &want);
        run_guest(b, bytes, in.length, &r, &stop);
        compared++;
        faults += sig != 0;
        const char *diff = differ(b, &in, stop, sig, &want, data, why);
        if (!diff)
            continue;
        if (failed++ < 30) {
            x86_format(&in, CODE, name, sizeof name);
            printf("# ");
            for (unsigned i = 0; i < in.length; i++)
                printf("%02x", bytes[i]);
            printf(" %s: %s\n", name, diff);
        }
    }
    bare_free(b);
    printf("# %u compared, %u of them faulted\n", compared, faults);
    fflush(stdout);
    CHECK(compared > tries / 8);
    if (failed)
        FAIL("%u of %u instructions differ", failed, compared);
}

/* First byte after the prefixes. */
static unsigned opcode_at(const uint8_t *b)
{
    unsigned n = 0;
    while (n < 14 && (strchr("\x66\x67\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65", b[n]) != NULL || (b[n] & 0xf0) == 0x40))
        n++;
    return n;
}

/* What the decoder calls illegal must be illegal on the host. VEX, EVEX, XOP and 3DNow! depend on the CPU model and stay out. */
static void illegal_encodings(const void *arg)
{
    mode = *(const unsigned *)arg;
    unsigned compared = 0, failed = 0;
    seed = UINT64_C(0x13198a2e03707344);
    set_up_host();
    for (unsigned t = 0; t < 400000; t++) {
        uint8_t bytes[15];
        x86_insn in;
        regs r = { .flags = 2 }, out;
        make_bytes(bytes);
        unsigned at = opcode_at(bytes);
        if (at > 8 || bytes[at] == 0xc4 || bytes[at] == 0xc5 || bytes[at] == 0x62 || bytes[at] == 0x8f)
            continue;
        if (bytes[at] == 0x0f && (bytes[at + 1] == 0xc7 || bytes[at + 1] == 0x00))
            continue;                    /* XSAVES is the host's but not offered; LOCK VERW checks its operand before the prefix */
        if (x86_decode(bytes, 15, mode, &in) < 0 || in.exec != x86_op_illegal)
            continue;
        for (unsigned i = 0; i < 16; i++)
            r.gpr[i] = MIDDLE;
        int sig = run_native(bytes, 15, &r, &out);
        compared++;
        if (sig != SIGILL && failed++ < 30) {
            printf("# ");
            for (unsigned i = 0; i < 8; i++)
                printf("%02x", bytes[i]);
            printf(": legal on the host (signal %d)\n", sig);
        }
    }
    printf("# %u illegal encodings\n", compared);
    fflush(stdout);
    CHECK(compared > 1000);
    if (failed)
        FAIL("%u of %u are legal on the host", failed, compared);
}

SETUP(integer)
{
    static const unsigned modes[2] = { 8, 4 };
    test_add("random_instructions_64", random_instructions, &modes[0], 200);
    test_add("random_instructions_32", random_instructions, &modes[1], 200);
    test_add("illegal_encodings_64", illegal_encodings, &modes[0], 100);
    test_add("illegal_encodings_32", illegal_encodings, &modes[1], 100);
}
