/* models.c - CPU models: what one has not got raises #UD, a large page it does not know is reserved, MSRs of what it lacks fault,
 * and what XSAVE's instructions say of themselves. On the software backends, whose CPUs do not depend on the host's KVM. */
#include "../backends.h"

enum { CODE = 0x8000, DATA = 0x9000, STACK = 0x7000, RAM = 0x40000, PML4 = 0x10000, PDPT = 0x11000, PD = 0x12000, TRANSLATED = 20 };

#define EACH_SOFTWARE_BACKEND(name)                                                                             \
    static void soft_##name(vm_backend backend);                                                                \
    EACH_BACKEND(name)                                                                                          \
    {                                                                                                           \
        if (backend == VM_BACKEND_KVM)                                                                          \
            test_skip("the host's KVM makes the CPU");                                                          \
        soft_##name(backend);                                                                                   \
    }                                                                                                           \
    static void soft_##name(vm_backend backend)

static vm_vcpu *machine(vm_backend backend, vm_platform platform, const char *model, vm_mode mode)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    o.platform = platform;
    o.cpu_model = model;
    o.ram_bytes = platform == VM_PLATFORM_PC ? 1 << 20 : 0;
    OK(vm_create(&o, &m));
    if (platform == VM_PLATFORM_BARE)
        OK(vm_map_ram(m, 0, RAM, VM_PROT_RWX, NULL));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), mode));
    return vm_vcpu_get(m, 0);
}

static uint64_t get(vm_vcpu *cpu, int reg)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(cpu, reg, &v, 8));
    return v;
}

static void set(vm_vcpu *cpu, int reg, uint64_t v) { OK(vm_vcpu_write_reg(cpu, reg, &v, 8)); }

/* Runs `bytes` with RBX and RDI pointing to data, several times, so that translated code is met too. The vector, -1: none. */
static int run(vm_vcpu *cpu, const void *bytes, size_t count, uint32_t rcx, uint64_t edx_eax, uint64_t rbx)
{
    vm_exit e = VM_EXIT_INIT;
    OK(vm_write(vm_vcpu_machine(cpu), CODE, bytes, count));
    for (unsigned i = 0; i < TRANSLATED; i++) {
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        vm_regs r = VM_REGS_INIT;
        r.rip = CODE;
        r.rsp = STACK;
        r.rflags = 2;
        r.rcx = rcx;
        r.rax = (uint32_t)edx_eax;
        r.rdx = edx_eax >> 32;
        r.rbx = rbx;
        r.rdi = DATA;
        OK(vm_vcpu_set_regs(cpu, &r));
        o.deadline_ns = TEST_SECONDS(5);
        o.exception_exits = 0xffffffff;
        o.has_until = true;
        o.until = CODE + count;
        OK(vm_vcpu_run(cpu, &o, &e));
        CHECK(e.reason == VM_EXIT_UNTIL || e.reason == VM_EXIT_EXCEPTION);
        if (e.reason == VM_EXIT_EXCEPTION)
            CHECK_EQ(e.rip, CODE);
    }
    return e.reason == VM_EXIT_EXCEPTION ? e.exception.vector : -1;
}
#define RUN(cpu, bytes, ...) run(cpu, bytes, sizeof bytes - 1, __VA_ARGS__)

/* Each has what those before it have. */
enum { I486, P5, P6SSE, X64, MAX, MODELS, NEVER = MODELS };
static const char *const models[MODELS] = { "486", "pentium", "pentium3", "base", "max" };

static const struct { uint8_t since, count, bytes[8]; } instructions[] = {
    { I486, 2, { 0x0f, 0xc8 } },                                                   /* BSWAP */
    { P5, 2, { 0x0f, 0x31 } },                                                     /* RDTSC */
    { P5, 2, { 0x0f, 0x33 } },                                                     /* RDPMC */
    { P5, 3, { 0x0f, 0xc7, 0x0b } },                                               /* CMPXCHG8B */
    { P5, 2, { 0x0f, 0x77 } }, { P5, 3, { 0x0f, 0x6f, 0xc1 } },                    /* EMMS; MOVQ and */
    { P5, 3, { 0x0f, 0x7f, 0xc1 } }, { P5, 3, { 0x0f, 0xfe, 0xc1 } },              /* PADDD of MMX registers */
    { P6SSE, 3, { 0x0f, 0x44, 0xc1 } },                                            /* CMOVZ */
    { P6SSE, 2, { 0xda, 0xc1 } }, { P6SSE, 2, { 0xdb, 0xf1 } }, { P6SSE, 2, { 0xdf, 0xe9 } },      /* FCMOVB FCOMI FUCOMIP */
    { P6SSE, 3, { 0x0f, 0x0d, 0x0b } }, { P6SSE, 3, { 0x0f, 0x1f, 0x00 } },        /* PREFETCHW, long NOP */
    { P6SSE, 3, { 0x0f, 0xae, 0x03 } }, { P6SSE, 3, { 0x0f, 0xae, 0xf8 } },        /* FXSAVE SFENCE */
    { P6SSE, 3, { 0x0f, 0x58, 0xc1 } },                                            /* ADDPS */
    { P6SSE, 3, { 0x0f, 0xe0, 0xc1 } }, { P6SSE, 4, { 0x0f, 0x70, 0xc1, 0 } },     /* PAVGB and PSHUFW of MMX registers */
    { P6SSE, 3, { 0x0f, 0xd7, 0xc1 } }, { P6SSE, 3, { 0x0f, 0xf7, 0xc1 } },        /* PMOVMSKB MASKMOVQ */
    { X64, 4, { 0x66, 0x0f, 0x58, 0xc1 } },                                        /* ADDPD */
    { X64, 4, { 0x66, 0x0f, 0xfe, 0xc1 } }, { X64, 4, { 0x66, 0x0f, 0xe0, 0xc1 } },        /* PADDD and PAVGB of XMM registers */
    { X64, 4, { 0x66, 0x0f, 0xd7, 0xc1 } }, { X64, 4, { 0x66, 0x0f, 0x6e, 0xc1 } },        /* PMOVMSKB MOVD */
    { X64, 3, { 0x0f, 0xd4, 0xc1 } },                                              /* PADDQ of MMX registers */
    { X64, 3, { 0x0f, 0xae, 0xe8 } }, { X64, 3, { 0x0f, 0xae, 0xf0 } },            /* LFENCE MFENCE */
    { X64, 2, { 0xdb, 0x0b } },                                                    /* FISTTP */
    { MAX, 6, { 0x66, 0x0f, 0x3a, 0x15, 0x03, 0 } },                               /* PEXTRW to memory */
    { MAX, 4, { 0xf3, 0x0f, 0xb8, 0xc1 } },                                        /* POPCNT */
    { MAX, 3, { 0x0f, 0x01, 0xd0 } },                                              /* XGETBV */
    { NEVER, 3, { 0x0f, 0x01, 0xc8 } }, { NEVER, 2, { 0x0f, 0xaa } },              /* MONITOR RSM */
};

EACH_SOFTWARE_BACKEND(what_a_model_lacks_is_undefined)
{
    for (unsigned m = 0; m < MODELS; m++) {
        vm_vcpu *cpu = machine(backend, VM_PLATFORM_BARE, models[m], VM_MODE_FLAT32);
        for (unsigned i = 0; i < sizeof instructions / sizeof *instructions; i++) {
            int vector = run(cpu, instructions[i].bytes, instructions[i].count, 0, DATA, DATA);
            if (vector != (m < instructions[i].since ? 6 : -1))
                FAIL("%s: instruction %u raises %d", models[m], i, vector);
        }
        CHECK_EQ(RUN(cpu, "\x0f\x32", 0x12345, 0, 0), m < P5 ? 6 : 13);           /* RDMSR of nothing */
        vm_destroy(vm_vcpu_machine(cpu));
    }
}

/* A gigabyte's entry says so by a bit that is reserved where CPUID does not offer such pages. */
EACH_SOFTWARE_BACKEND(gigabyte_pages_are_offered_or_reserved)
{
    for (unsigned m = X64; m < MODELS; m++) {
        uint64_t pml4[2] = { PDPT | 7, PDPT | 7 }, pdpt[2] = { PD | 7, 0x87 }, pd = 0x87;
        vm_vcpu *cpu = machine(backend, VM_PLATFORM_BARE, models[m], VM_MODE_FLAT64);
        OK(vm_write(vm_vcpu_machine(cpu), PML4, pml4, sizeof pml4));
        OK(vm_write(vm_vcpu_machine(cpu), PDPT, pdpt, sizeof pdpt));
        OK(vm_write(vm_vcpu_machine(cpu), PD, &pd, sizeof pd));
        set(cpu, VM_REG_CR3, PML4);
        CHECK_EQ(RUN(cpu, "\x8b\x03", 0, 0, (UINT64_C(1) << 30) + DATA), m == MAX ? -1 : 14);
        vm_destroy(vm_vcpu_machine(cpu));
    }
}

/* x2APIC mode and the deadline timer belong to "max" alone. */
EACH_SOFTWARE_BACKEND(apic_modes_are_offered_or_fault)
{
    for (unsigned m = X64; m < MODELS; m++) {
        int expected = m == MAX ? -1 : 13;
        vm_vcpu *cpu = machine(backend, VM_PLATFORM_PC, models[m], VM_MODE_FLAT64);
        CHECK_EQ(RUN(cpu, "\x0f\x32", 0x6e0, 0, 0), expected);
        CHECK_EQ(RUN(cpu, "\x0f\x30", 0x1b, 0xfee00d00, 0), expected);
        CHECK_EQ(RUN(cpu, "\x0f\x32", 0x802, 0, 0), expected);
        CHECK_EQ(RUN(cpu, "\x0f\x30", 0x1b, 0xfee00900, 0), m == MAX ? 13 : -1);
        vm_destroy(vm_vcpu_machine(cpu));
    }
}

/* XGETBV(1) names the components that are in use, as the header that XSAVEC writes does (SDM vol. 1, 13.6). */
EACH_SOFTWARE_BACKEND(xinuse)
{
    static const uint64_t something[2] = { 1, 0 }, nothing[2] = { 0, 0 };
    vm_vcpu *cpu = machine(backend, VM_PLATFORM_BARE, NULL, VM_MODE_FLAT64);
    CHECK_EQ(RUN(cpu, "\x0f\x01\xd0", 1, 0, 0), -1);
    CHECK_EQ(get(cpu, VM_REG_RAX), 0);
    OK(vm_vcpu_write_reg(cpu, VM_REG_XMM1, something, 16));
    CHECK_EQ(RUN(cpu, "\x0f\x01\xd0", 1, 0, 0), -1);
    CHECK_EQ(get(cpu, VM_REG_RAX), 2);
    CHECK_EQ(RUN(cpu, "\x0f\xc7\x23", 0, 7, DATA), -1);                            /* XSAVEC */
    uint64_t header = 0;
    OK(vm_read(vm_vcpu_machine(cpu), DATA + 512, &header, 8));
    CHECK_EQ(header, 2);
    OK(vm_vcpu_write_reg(cpu, VM_REG_XMM1, nothing, 16));
    CHECK_EQ(RUN(cpu, "\xd9\xee\x0f\x01\xd0", 1, 0, 0), -1);                       /* FLDZ; XGETBV */
    CHECK_EQ(get(cpu, VM_REG_RAX), 1);
    CHECK_EQ(RUN(cpu, "\x0f\x01\xd0", 2, 0, 0), 13);
    vm_destroy(vm_vcpu_machine(cpu));
}

/* A misaligned area is #GP before its address is found not to be canonical, which on the stack would be #SS. */
EACH_SOFTWARE_BACKEND(xsave_area_alignment_comes_first)
{
    vm_vcpu *cpu = machine(backend, VM_PLATFORM_BARE, NULL, VM_MODE_FLAT64);
    CHECK_EQ(RUN(cpu, "\x0f\xae\x64\x1c\x08", 0, 7, UINT64_C(0x123456789abc0000)), 13);            /* XSAVE [rsp+rbx+8] */
    CHECK_EQ(RUN(cpu, "\x0f\xae\x24\x1c", 0, 7, UINT64_C(0x123456789abc0000)), 12);
    CHECK_EQ(RUN(cpu, "\x0f\xae\x6c\x1c\x08", 0, 7, UINT64_C(0x123456789abc0000)), 13);            /* XRSTOR */
    vm_destroy(vm_vcpu_machine(cpu));
}
