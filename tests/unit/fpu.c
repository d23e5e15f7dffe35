/* fpu.c - availability, exceptions and bookkeeping of x87, MMX, SSE and AVX: what the silicon comparison of tests/diff/simd.c
 * cannot reach from a user process. Oracle: SDM vol. 2 (exception tables of each instruction), vol. 1 chapter 8 (environment
 * layouts, deferred x87 errors) and vol. 3 chapters 12 to 14.
 */
#include "test.h"
#include "unit/x86_bare.h"
#include "x86/simd.h"

enum { REAL = 1, FLAT32 = 2, FLAT64 = 3 };
#define CODE 0x1000
#define DATA 0x2000

typedef struct setting {
    const char *name;
    uint8_t mode;
    uint64_t cr0_on, cr0_off, cr4_off, xcr0;       /* xcr0 0: leave it */
    bool error;                                    /* an unmasked x87 exception is pending */
    uint32_t mxcsr;                                /* 0: leave it */
    uint8_t n, code[10];
    int vector;                                    /* -1: no fault */
} setting;

#define EM X86_CR0_EM
#define TS X86_CR0_TS
#define MP X86_CR0_MP
#define NO_FXSR .cr4_off = X86_CR4_OSFXSR
#define NO_XSAVE .cr4_off = X86_CR4_OSXSAVE
#define FADD 2, { 0xd8, 0xc1 }                     /* fadd st0, st1 */
#define FWAIT 1, { 0x9b }
#define FNINIT 2, { 0xdb, 0xe3 }
#define FNSTSW_AX 2, { 0xdf, 0xe0 }
#define PADDB_MM 3, { 0x0f, 0xfc, 0xc1 }
#define EMMS 2, { 0x0f, 0x77 }
#define PADDB_XMM 4, { 0x66, 0x0f, 0xfc, 0xc1 }
#define CVTPI2PS 3, { 0x0f, 0x2a, 0xc1 }           /* xmm0, mm1 */
#define MOVAPS_ODD 3, { 0x0f, 0x28, 0x03 }         /* xmm0, [rbx]; rbx = DATA + 8 */
#define MOVUPS_ODD 3, { 0x0f, 0x10, 0x03 }
#define VPADDB 4, { 0xc5, 0xf1, 0xfc, 0xc1 }
#define VMOVAPS_ODD 4, { 0xc5, 0xf8, 0x28, 0x03 }
#define DIVSS_BY_0 4, { 0xf3, 0x0f, 0x5e, 0xc2 }   /* xmm0 / xmm2 = 1.0 / 0.0 */
#define LDMXCSR 3, { 0x0f, 0xae, 0x13 }
#define XSAVE_OP 3, { 0x0f, 0xae, 0x23 }
#define FXSAVE_OP 3, { 0x0f, 0xae, 0x03 }
#define VZEROUPPER 3, { 0xc5, 0xf8, 0x77 }

static const setting settings[] = {
    { "x87", FLAT64, .n = FADD, -1 },
    { "x87 EM", FLAT64, .cr0_on = EM, .n = FADD, X86_NM },
    { "x87 TS", FLAT64, .cr0_on = TS, .n = FADD, X86_NM },
    { "x87 pending", FLAT64, .error = true, .n = FADD, X86_MF },
    { "x87 TS and pending", FLAT64, .cr0_on = TS, .error = true, .n = FADD, X86_NM },
    { "x87 real mode TS", REAL, .cr0_on = TS, .n = FADD, X86_NM },
    { "fwait", FLAT64, .n = FWAIT, -1 },
    { "fwait TS without MP", FLAT64, .cr0_on = TS, .cr0_off = MP, .n = FWAIT, -1 },
    { "fwait TS and MP", FLAT64, .cr0_on = TS | MP, .n = FWAIT, X86_NM },
    { "fwait EM", FLAT64, .cr0_on = EM, .n = FWAIT, -1 },
    { "fwait pending", FLAT64, .error = true, .n = FWAIT, X86_MF },
    { "fninit pending", FLAT64, .error = true, .n = FNINIT, -1 },
    { "fnstsw pending", FLAT64, .error = true, .n = FNSTSW_AX, -1 },
    { "fnstsw TS", FLAT64, .cr0_on = TS, .n = FNSTSW_AX, X86_NM },
    { "mmx", FLAT64, .n = PADDB_MM, -1 },
    { "mmx EM", FLAT64, .cr0_on = EM, .n = PADDB_MM, X86_UD },
    { "mmx EM and TS", FLAT64, .cr0_on = EM | TS, .n = PADDB_MM, X86_UD },
    { "mmx TS", FLAT64, .cr0_on = TS, .n = PADDB_MM, X86_NM },
    { "mmx pending", FLAT64, .error = true, .n = PADDB_MM, X86_MF },
    { "mmx without OSFXSR", FLAT64, NO_FXSR, .n = PADDB_MM, -1 },
    { "emms pending", FLAT64, .error = true, .n = EMMS, X86_MF },
    { "sse", FLAT64, .n = PADDB_XMM, -1 },
    { "sse EM", FLAT64, .cr0_on = EM, .n = PADDB_XMM, X86_UD },
    { "sse TS", FLAT64, .cr0_on = TS, .n = PADDB_XMM, X86_NM },
    { "sse without OSFXSR", FLAT64, NO_FXSR, .n = PADDB_XMM, X86_UD },
    { "sse without OSFXSR, TS", FLAT64, .cr0_on = TS, NO_FXSR, .n = PADDB_XMM, X86_UD },
    { "sse x87 pending", FLAT64, .error = true, .n = PADDB_XMM, -1 },
    { "cvtpi2ps pending", FLAT64, .error = true, .n = CVTPI2PS, X86_MF },
    { "cvtpi2ps without OSFXSR", FLAT64, NO_FXSR, .n = CVTPI2PS, X86_UD },
    { "movaps misaligned", FLAT64, .n = MOVAPS_ODD, X86_GP },
    { "movaps misaligned TS", FLAT64, .cr0_on = TS, .n = MOVAPS_ODD, X86_NM },
    { "movups misaligned", FLAT64, .n = MOVUPS_ODD, -1 },
    { "avx", FLAT64, .n = VPADDB, -1 },
    { "avx EM", FLAT64, .cr0_on = EM, .n = VPADDB, -1 },
    { "avx TS", FLAT64, .cr0_on = TS, .n = VPADDB, X86_NM },
    { "avx without OSXSAVE", FLAT64, NO_XSAVE, .n = VPADDB, X86_UD },
    { "avx without XCR0.AVX", FLAT64, .xcr0 = 3, .n = VPADDB, X86_UD },
    { "avx without XCR0.AVX, TS", FLAT64, .cr0_on = TS, .xcr0 = 1, .n = VPADDB, X86_UD },
    { "avx 32-bit", FLAT32, .n = VPADDB, -1 },
    { "vzeroupper without XCR0.AVX", FLAT64, .xcr0 = 3, .n = VZEROUPPER, X86_UD },
    { "vmovaps misaligned", FLAT64, .n = VMOVAPS_ODD, X86_GP },
    { "divss masked", FLAT64, .n = DIVSS_BY_0, -1 },
    { "divss unmasked", FLAT64, .mxcsr = 0x1d80, .n = DIVSS_BY_0, X86_XM },
    { "divss unmasked without OSXMMEXCPT", FLAT64, .mxcsr = 0x1d80, .cr4_off = X86_CR4_OSXMMEXCPT, .n = DIVSS_BY_0, X86_UD },
    { "ldmxcsr reserved bits", FLAT64, .n = LDMXCSR, X86_GP },
    { "fxsave misaligned", FLAT64, .n = FXSAVE_OP, X86_GP },
    { "fxsave EM", FLAT64, .cr0_on = EM, .n = FXSAVE_OP, X86_NM },
    { "fxsave pending", FLAT64, .error = true, .n = FXSAVE_OP, X86_GP },
    { "xsave misaligned", FLAT64, .n = XSAVE_OP, X86_GP },
    { "xsave EM", FLAT64, .cr0_on = EM, .n = XSAVE_OP, X86_GP },
    { "xsave TS", FLAT64, .cr0_on = TS, .n = XSAVE_OP, X86_NM },
    { "xsave without OSXSAVE", FLAT64, NO_XSAVE, .cr0_on = TS, .n = XSAVE_OP, X86_UD },
    { "lock paddb", FLAT64, .n = 5, { 0xf0, 0x66, 0x0f, 0xfc, 0xc1 }, X86_UD },
};

static bare *start(unsigned mode, const void *code, unsigned n)
{
    bare *b = bare_new(mode);
    CHECK(b != NULL);
    bare_code(b, CODE, code, n);
    b->cpu->rip = CODE;
    b->cpu->exception_exits = ~UINT64_C(0);
    return b;
}

static void pending_error(x86_cpu *cpu)
{
    X86_FPU_FCW(cpu) = 0x0340 | 0x3b;               /* ZM clear */
    X86_FPU_FSW(cpu) = 0x8084;
}

static void prepare(bare *b, const setting *s)
{
    x86_cpu *cpu = b->cpu;
    static const float one = 1.0f;
    cpu->cr0 = (cpu->cr0 | s->cr0_on | X86_CR0_NE) & ~s->cr0_off;
    cpu->cr4 &= ~s->cr4_off;
    if (s->xcr0)
        cpu->xcr0 = s->xcr0;
    if (s->error)
        pending_error(cpu);
    if (s->mxcsr)
        X86_FPU_MXCSR(cpu) = s->mxcsr;
    memcpy(X86_FPU_XMM(cpu, 0), &one, 4);
    memset(b->ram + DATA, 0x55, 64);
    cpu->gpr[X86_RBX] = DATA + 8;
    x86_mode_changed(cpu);
}

static void check_setting(const void *arg)
{
    const setting *s = arg;
    bare *b = start(s->mode, s->code, s->n);
    prepare(b, s);
    x86_stop stop = bare_run(b, 1);
    if (s->vector < 0) {
        if (stop == X86_STOP_EXCEPTION)
            FAIL("%s: vector %u", s->name, b->cpu->fault.vector);
        CHECK_EQ(b->cpu->rip, CODE + s->n);
    } else {
        CHECK_EQ(stop, X86_STOP_EXCEPTION);
        CHECK_EQ(b->cpu->fault.vector, s->vector);
        CHECK_EQ(b->cpu->rip, CODE);
    }
    bare_free(b);
}

SETUP(settings)
{
    for (unsigned i = 0; i < sizeof settings / sizeof *settings; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s", settings[i].name);
        for (char *p = name; *p; p++)
            if (*p == ' ' || *p == ',')
                *p = '_';
        test_add(name, check_setting, &settings[i], 0);
    }
}

/* An unmasked exception leaves its destination alone, sets its flag and nothing of the later kinds. */
TEST(xm_keeps_destination)
{
    static const uint8_t code[] = { 0xf3, 0x0f, 0x5e, 0xc2 };
    static const setting s = { .mxcsr = 0x1d80 };
    bare *b = start(FLAT64, code, sizeof code);
    prepare(b, &s);
    CHECK_EQ(bare_run(b, 1), X86_STOP_EXCEPTION);
    uint32_t low;
    memcpy(&low, X86_FPU_XMM(b->cpu, 0), 4);
    CHECK_EQ(low, 0x3f800000);
    CHECK_EQ(X86_FPU_MXCSR(b->cpu), 0x1d84);
    bare_free(b);
}

/* The error of one instruction is the next waiting one's #MF, and FIP, FDP and FOP name the culprit. */
TEST(deferred_error)
{
    static const uint8_t code[] = { 0x9b, 0xd8, 0x33,             /* fwait; fdiv dword [rbx] */
                                    0xdf, 0xe0,                   /* fnstsw ax */
                                    0x90, 0xd9, 0xe8 };           /* nop; fld1 */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    cpu->cr0 |= X86_CR0_NE;
    memset(b->ram + DATA, 0, 4);
    cpu->gpr[X86_RBX] = DATA;
    X86_FPU_FCW(cpu) = 0x037b;
    X86_FPU_FSW(cpu) = 7 << 11;
    X86_FPU_FTW(cpu) = 0x80;
    memcpy(X86_FPU_ST(cpu, 0), "\0\0\0\0\0\0\0\x80\xff\x3f", 10);
    CHECK_EQ(bare_run(b, 10), X86_STOP_EXCEPTION);
    CHECK_EQ(cpu->fault.vector, X86_MF);
    CHECK_EQ(cpu->rip, CODE + 6);
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xffff, 0xb884);                 /* B, TOP 7, ES, ZE */
    CHECK_EQ(X86_FPU_FIP(cpu), CODE + 1);
    CHECK_EQ(X86_FPU_FDP(cpu), DATA);
    CHECK_EQ(X86_FPU_FOP(cpu), 0x033 & 0x7ff);
    bare_free(b);
}

/* A store whose exception is unmasked writes nothing and does not pop. */
TEST(suppressed_store)
{
    static const uint8_t code[] = { 0xd9, 0x1b };                 /* fstp dword [rbx] */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    memset(b->ram + DATA, 0x55, 4);
    cpu->gpr[X86_RBX] = DATA;
    X86_FPU_FCW(cpu) = 0x0377;                                    /* OM clear */
    X86_FPU_FSW(cpu) = 7 << 11;
    X86_FPU_FTW(cpu) = 0x80;
    memcpy(X86_FPU_ST(cpu, 0), "\0\0\0\0\0\0\0\x80\xfe\x7f", 10);  /* far beyond single precision */
    bare_run(b, 1);
    CHECK_EQ(X86_FPU_FSW(cpu), 0xb888);
    CHECK_EQ(X86_FPU_FTW(cpu), 0x80);
    CHECK(!memcmp(b->ram + DATA, "\x55\x55\x55\x55", 4));
    bare_free(b);
}

/* A store that faults changes nothing. */
TEST(faulting_store)
{
    static const uint8_t code[] = { 0xdd, 0x1b };                 /* fstp qword [rbx] */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    cpu->gpr[X86_RBX] = UINT64_C(1) << 63;
    X86_FPU_FSW(cpu) = 7 << 11;
    X86_FPU_FTW(cpu) = 0x80;
    CHECK_EQ(bare_run(b, 1), X86_STOP_EXCEPTION);
    CHECK_EQ(cpu->fault.vector, X86_GP);
    CHECK_EQ(X86_FPU_FSW(cpu), 7 << 11);
    CHECK_EQ(X86_FPU_FTW(cpu), 0x80);
    bare_free(b);
}

/* MMX writes make TOP zero, every tag valid and the exponent all ones; the physical registers stay where they are. */
TEST(mmx_aliasing)
{
    static const uint8_t code[] = { 0x0f, 0x6f, 0xd1,             /* movq mm2, mm1 */
                                    0x0f, 0x77 };                 /* emms */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    X86_FPU_FSW(cpu) = 3 << 11;
    X86_FPU_FTW(cpu) = 0;
    for (unsigned i = 0; i < 8; i++)                              /* slot i is physical register (i + 3) & 7 */
        X86_FPU_ST(cpu, i)[0] = (uint8_t)(0x10 + ((i + 3) & 7));
    bare_run(b, 1);
    CHECK_EQ(X86_FPU_FSW(cpu), 0);
    CHECK_EQ(X86_FPU_FTW(cpu), 0xff);
    for (unsigned i = 0; i < 8; i++)
        CHECK_EQ(X86_FPU_ST(cpu, i)[0], i == 2 ? 0x11 : 0x10 + i);
    CHECK_EQ(*(uint16_t *)(X86_FPU_ST(cpu, 2) + 8), 0xffff);
    CHECK_EQ(*(uint16_t *)(X86_FPU_ST(cpu, 1) + 8), 0);
    bare_run(b, 1);
    CHECK_EQ(X86_FPU_FTW(cpu), 0);
    bare_free(b);
}

/* SDM vol. 1, figures 8-9 to 8-12. */
TEST(environment_layouts)
{
    static const uint8_t real16[] = { 0xd9, 0xe8, 0xd9, 0x07, 0xd9, 0x36, 0x00, 0x20 };   /* fld1; fld [bx]; fnstenv [2000h] */
    static const uint8_t prot32[] = { 0xd9, 0xe8, 0xd9, 0x03, 0xd9, 0x35, 0x00, 0x20, 0, 0 };
    bare *b = start(REAL, real16, sizeof real16);
    x86_cpu *cpu = b->cpu;
    cpu->seg[X86_CS].sel = 0x100, cpu->seg[X86_CS].base = 0x1000;
    cpu->seg[X86_DS].sel = 0x40, cpu->seg[X86_DS].base = 0x400;
    cpu->rip = 0;
    cpu->gpr[X86_RBX] = 0x1c34;
    CHECK_EQ(bare_run(b, 3), X86_STOP_SLICE);
    static const uint8_t want16[] = { 0x7f, 0x03, 0x00, 0x30, 0xff, 0x1f, 0x02, 0x10, 0x07, 0x01, 0x34, 0x20, 0x00, 0x00 };
    const uint8_t *got = b->ram + 0x2400;
    for (unsigned i = 0; i < sizeof want16; i++)
        if (got[i] != want16[i])
            FAIL("16-bit real-mode environment, byte %u: %02x, not %02x", i, got[i], want16[i]);
    bare_free(b);

    b = start(FLAT32, prot32, sizeof prot32);
    cpu = b->cpu;
    cpu->gpr[X86_RBX] = 0x1c34;
    uint16_t cs = cpu->seg[X86_CS].sel, ds = cpu->seg[X86_DS].sel;
    CHECK_EQ(bare_run(b, 3), X86_STOP_SLICE);
    const uint8_t want32[] = { 0x7f, 0x03, 0xff, 0xff, 0x00, 0x30, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0x02, 0x10, 0, 0,
                               (uint8_t)cs, (uint8_t)(cs >> 8), 0x03, 0x01, 0x34, 0x1c, 0, 0, (uint8_t)ds, (uint8_t)(ds >> 8),
                               0xff, 0xff };
    got = b->ram + 0x2000;
    for (unsigned i = 0; i < sizeof want32; i++)
        if (got[i] != want32[i])
            FAIL("32-bit environment, byte %u: %02x, not %02x", i, got[i], want32[i]);
    CHECK_EQ(X86_FPU_FCW(cpu), 0x037f);
    bare_free(b);
}

static unsigned ferr_count;
static void count_ferr(x86_cpu *cpu)
{
    (void)cpu;
    ferr_count++;
}

/* CR0.NE = 0: the error is an interrupt, asked for once; the instruction is then executed with the error ignored. */
TEST(external_error)
{
    static const uint8_t code[] = { 0xd9, 0xe8, 0x90 };           /* fld1; nop */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    x86_env env = *cpu->env;
    env.ferr = count_ferr;
    cpu->env = &env;
    cpu->cr0 &= ~(uint64_t)X86_CR0_NE;
    pending_error(cpu);
    ferr_count = 0;
    CHECK_EQ(bare_run(b, 1), X86_STOP_ATTENTION);
    CHECK_EQ(ferr_count, 1);
    CHECK_EQ(cpu->rip, CODE);
    bare_run(b, 1);
    CHECK_EQ(ferr_count, 1);
    CHECK_EQ(cpu->rip, CODE + 2);
    CHECK_EQ(X86_FPU_FSW(cpu), 0xb884);
    CHECK(!memcmp(X86_FPU_ST(cpu, 0), "\0\0\0\0\0\0\0\x80\xff\x3f", 10));
    bare_free(b);
}

/* What was gathered before a fault stays, and the instruction goes on from there. */
TEST(gather_restart)
{
    static const uint8_t code[] = { 0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0b };       /* vpgatherdd ymm0, [rbx + ymm1], ymm2 */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    b->exits = true;
    cpu->gpr[X86_RBX] = BARE_RAM - 16;                                          /* elements 0-3 in RAM, the rest beyond */
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t offset = 4 * i, ones = UINT32_MAX, value = 0x1000 + i;
        memcpy((i < 4 ? X86_FPU_XMM(cpu, 1) : X86_FPU_YMMH(cpu, 1)) + 4 * (i & 3), &offset, 4);
        memcpy((i < 4 ? X86_FPU_XMM(cpu, 2) : X86_FPU_YMMH(cpu, 2)) + 4 * (i & 3), &ones, 4);
        if (i < 4)
            memcpy(b->ram + BARE_RAM - 16 + 4 * i, &value, 4);
    }
    for (uint32_t i = 4; i < 8; i++) {
        CHECK_EQ(bare_run(b, 1), X86_STOP_IO);
        CHECK_EQ(cpu->io.gpa, BARE_RAM + 4 * (i - 4));
        CHECK_EQ(cpu->io.width, 4);
        CHECK_EQ(cpu->rip, CODE);
        cpu->io_log[cpu->io_count] = cpu->io;
        cpu->io_log[cpu->io_count].data = 0x1000 + i;
        cpu->io_log[cpu->io_count++].done = true;
        cpu->io_pos = 0;
    }
    CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t got, mask;
        memcpy(&got, (i < 4 ? X86_FPU_XMM(cpu, 0) : X86_FPU_YMMH(cpu, 0)) + 4 * (i & 3), 4);
        memcpy(&mask, (i < 4 ? X86_FPU_XMM(cpu, 2) : X86_FPU_YMMH(cpu, 2)) + 4 * (i & 3), 4);
        CHECK_EQ(got, 0x1000 + i);
        CHECK_EQ(mask, 0);
    }
    bare_free(b);
}

/* 32-byte accesses to a device, replayed: each part is asked for once. */
TEST(wide_mmio)
{
    static const uint8_t code[] = { 0xc5, 0xfe, 0x6f, 0x03,                     /* vmovdqu ymm0, [rbx] */
                                    0xc5, 0xfe, 0x7f, 0x03 };                   /* vmovdqu [rbx], ymm0 */
    bare *b = start(FLAT64, code, sizeof code);
    x86_cpu *cpu = b->cpu;
    b->io_value = 0x1122334455667788;
    cpu->gpr[X86_RBX] = BARE_RAM;
    CHECK_EQ(bare_run(b, 2), X86_STOP_SLICE);
    CHECK_EQ(b->log_count, 8);
    for (unsigned i = 0; i < 8; i++) {
        CHECK_EQ(b->log[i].n, 8);
        CHECK_EQ(b->log[i].address, BARE_RAM + 8 * (i & 3));
        CHECK_EQ(b->log[i].is_write, i >= 4);
        CHECK_EQ(b->log[i].value, b->io_value);
    }
    bare_free(b);
}
