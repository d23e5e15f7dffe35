/* cpuid.c - CPU models and the CPUID leaves made from them.
 *
 * A model is a table of feature words. What the CPU shows is the model's word, bounded for instructions that run
 * natively by what the host CPU has, with the few bits that follow state (OSXSAVE, APIC, HTT). Everything else in
 * lib/x86 asks x86_has(), so a feature that CPUID does not show cannot be switched on either.
 */
#include "x86/system.h"

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

struct x86_model {
    const char *name, *vendor, *brand;
    uint32_t signature, max_leaf, max_extended;
    uint8_t phys_bits, linear_bits;
    bool is_hypervisor;
    uint32_t words[X86_NWORDS];
};

#define B(n) (1u << (n))

/* CPUID.1:EDX: FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2. */
#define W_1_EDX_X64                                                                                                    \
    (B(0) | B(1) | B(2) | B(3) | B(4) | B(5) | B(6) | B(7) | B(8) | B(9) | B(11) | B(12) | B(13) | B(14) | B(15) |     \
     B(16) | B(17) | B(19) | B(23) | B(24) | B(25) | B(26))
/* SSE3 PCLMUL SSSE3 FMA CX16 PCID SSE4.1 SSE4.2 X2APIC MOVBE POPCNT TSC-deadline AES XSAVE AVX F16C RDRAND hypervisor.
 */
#define W_1_ECX_MAX                                                                                                    \
    (B(0) | B(1) | B(9) | B(12) | B(13) | B(17) | B(19) | B(20) | B(21) | B(22) | B(23) | B(24) | B(25) | B(26) |      \
     B(28) | B(29) | B(30) | B(31))
/* FSGSBASE TSC_ADJUST BMI1 AVX2 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT CLWB SHA. */
#define W_7_EBX_MAX                                                                                                    \
    (B(0) | B(1) | B(3) | B(5) | B(7) | B(8) | B(9) | B(10) | B(18) | B(19) | B(20) | B(23) | B(24) | B(29))
#define W_7_ECX_MAX (B(2) | B(8) | B(9) | B(10) | B(22))                /* UMIP GFNI VAES VPCLMULQDQ RDPID */
#define W_7_EDX_MAX B(4)                                                /* fast short REP MOVSB */
/* The AMD copy of 1:EDX has no SEP, PSN, ... at the same places; SYSCALL NX MMXEXT 1G RDTSCP LM are its own. */
#define W_E1_EDX_COPY 0x0183f3ffu
#define W_E1_EDX_MAX ((W_1_EDX_X64 & W_E1_EDX_COPY) | B(11) | B(20) | B(22) | B(26) | B(27) | B(29))
#define W_E1_ECX_MAX (B(0) | B(5) | B(6) | B(8) | B(22))                /* LAHF64 ABM SSE4A PREFETCHW TOPOEXT */
#define W_D1_EAX_MAX (B(0) | B(1) | B(2))                               /* XSAVEOPT XSAVEC XGETBV1 */
#define W_E8_EBX_MAX (B(2) | B(9) | B(26) | B(29))                      /* XSAVEERPTR; WBNOINVD; SSB_NO; BTC_NO */
/* LFENCE serialising; null selector clears base; automatic IBRS; SRSO_NO. */
#define W_E21_EAX_MAX (B(2) | B(6) | B(8) | B(29))

static const struct x86_model models[] = {
    {.name = "max",
     .vendor = "AuthenticAMD",
     .brand = "libvm virtual CPU",
     .signature = 0x00a10f11,
     .max_leaf = 0xd,
     .max_extended = 0x80000021,
     .phys_bits = 46,
     .linear_bits = 48,
     .is_hypervisor = true,
     .words = {W_1_EDX_X64, W_1_ECX_MAX, W_7_EBX_MAX, W_7_ECX_MAX, W_7_EDX_MAX, W_E1_EDX_MAX, W_E1_ECX_MAX,
               W_D1_EAX_MAX, W_E8_EBX_MAX, W_E21_EAX_MAX}},
    /* The first x86-64 generation plus what every 64-bit system expects today. */
    {.name = "base",
     .vendor = "AuthenticAMD",
     .brand = "libvm virtual CPU (base)",
     .signature = 0x00000f61,
     .max_leaf = 0x7,
     .max_extended = 0x80000008,
     .phys_bits = 40,
     .linear_bits = 48,
     .is_hypervisor = true,
     .words = {W_1_EDX_X64, B(0) | B(13) | B(31), 0, 0, 0, (W_1_EDX_X64 & W_E1_EDX_COPY) | B(11) | B(20) | B(29), B(0),
               0, 0, 0}},
    {.name = "pentium3",
     .vendor = "GenuineIntel",
     .brand = "libvm virtual CPU (pentium3)",
     .signature = 0x0686,
     .max_leaf = 1,
     .max_extended = 0x80000004,
     .phys_bits = 36,
     .linear_bits = 32,
     .words = {W_1_EDX_X64 & ~(B(19) | B(26))}},
    {.name = "pentium",
     .vendor = "GenuineIntel",
     .brand = "",
     .signature = 0x0543,
     .max_leaf = 1,
     .phys_bits = 32,
     .linear_bits = 32,
     .words = {B(0) | B(1) | B(2) | B(3) | B(4) | B(5) | B(7) | B(8) | B(9) | B(23)}},
    {.name = "486",
     .vendor = "GenuineIntel",
     .brand = "",
     .signature = 0x0480,
     .max_leaf = 1,
     .phys_bits = 32,
     .linear_bits = 32,
     .words = {B(0) | B(1) | B(3)}},
};

const struct x86_model *x86_model_find(const char *name)
{
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++)
        if (!name || !strcmp(name, models[i].name))
            return &models[i];
    return NULL;
}

uint64_t x86_model_phys_mask(const struct x86_model *model) { return (UINT64_C(1) << model->phys_bits) - 1; }
uint32_t x86_model_signature(const struct x86_model *model) { return model->signature; }
const char *x86_model_name(const struct x86_model *model) { return model->name; }
bool x86_is_amd(const x86_cpu *cpu) { return cpu->model->vendor[0] == 'A'; }

/* ---- features ---- */

/* Bits whose instructions execute on the host CPU as they are: they need the host to have them. */
enum { HOST_1_ECX, HOST_7_EBX, HOST_7_ECX, HOST_E1_ECX };
#define NATIVE_1_ECX (B(0) | B(1) | B(9) | B(12) | B(13) | B(19) | B(20) | B(22) | B(23) | B(25) | B(28) | B(29))
#define NATIVE_7_EBX (B(3) | B(5) | B(8) | B(19) | B(29))
#define NATIVE_7_ECX (B(8) | B(9) | B(10))
#define NATIVE_E1_ECX (B(5) | B(6))
#define AVX_1_ECX (B(12) | B(28) | B(29))
#define AVX_7_EBX B(5)
#define AVX_7_ECX (B(9) | B(10))

static void ask_host(x86_cpu *cpu)
{
    uint32_t a, b, c, d, *host = cpu->host_features;
    __cpuid(1, a, b, c, d);
    host[HOST_1_ECX] = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        host[HOST_7_EBX] = b;
        host[HOST_7_ECX] = c;
    }
    __cpuid(0x80000001, a, b, c, d);
    host[HOST_E1_ECX] = c;
    if (!__builtin_cpu_supports("avx2")) { /* also asks whether the host OS saves the state */
        host[HOST_1_ECX] &= ~AVX_1_ECX;
        host[HOST_7_EBX] &= ~AVX_7_EBX;
        host[HOST_7_ECX] &= ~AVX_7_ECX;
    }
    cpu->host_known = true;
}

/* Bits of a word that the host bounds, and where its answer is kept. */
static const struct {
    uint32_t bits;
    uint8_t host;
} native_words[X86_NWORDS] = {
    [X86_W_1_ECX] = {NATIVE_1_ECX, HOST_1_ECX},
    [X86_W_7_EBX] = {NATIVE_7_EBX, HOST_7_EBX},
    [X86_W_7_ECX] = {NATIVE_7_ECX, HOST_7_ECX},
    [X86_W_E1_ECX] = {NATIVE_E1_ECX, HOST_E1_ECX},
};

static uint32_t feature_word(x86_cpu *cpu, unsigned word)
{
    uint32_t v = cpu->model->words[word], bits = native_words[word].bits;
    if (!(v & bits))
        return v;
    if (!cpu->host_known)
        ask_host(cpu);
    return v & (cpu->host_features[native_words[word].host] | ~bits);
}

/* CPUID is slow on a host that is itself virtual: the host is asked only about features that need it. */
bool x86_has(x86_cpu *cpu, unsigned feature)
{
    unsigned word = feature / 32, bit = feature % 32;
    uint32_t v = native_words[word].bits >> bit & 1 ? feature_word(cpu, word) : cpu->model->words[word];
    return v >> bit & 1;
}

struct x86_model *x86_model_cut(const struct x86_model *base,
                                uint32_t (*allowed)(void *user, uint32_t leaf, uint32_t sub, unsigned reg), void *user)
{
    static const struct { uint32_t leaf; uint8_t word, reg, sub; } places[] = {
        { 1, X86_W_1_EDX, 3, 0 }, { 1, X86_W_1_ECX, 2, 0 }, { 7, X86_W_7_EBX, 1, 0 }, { 7, X86_W_7_ECX, 2, 0 },
        { 7, X86_W_7_EDX, 3, 0 }, { 0x80000001, X86_W_E1_EDX, 3, 0 }, { 0x80000001, X86_W_E1_ECX, 2, 0 },
        { 0xd, X86_W_D1_EAX, 0, 1 }, { 0x80000008, X86_W_E8_EBX, 1, 0 }, { 0x80000021, X86_W_E21_EAX, 0, 0 },
    };
    struct x86_model *model = malloc(sizeof *model);
    if (!model)
        return NULL;
    *model = *base;
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++)
        model->words[places[i].word] &= allowed(user, places[i].leaf, places[i].sub, places[i].reg);
    unsigned bits = allowed(user, 0x80000008, 0, 0) & 0xff;            /* of physical addresses */
    if (bits >= 32 && bits < model->phys_bits)
        model->phys_bits = (uint8_t)bits;
    if (!(model->words[X86_W_1_ECX] & B(26)))
        model->words[X86_W_D1_EAX] = 0;
    if (!(model->words[X86_W_1_ECX] & B(26)) || !(allowed(user, 0xd, 0, 0) & 4)) { /* no YMM state, nothing of AVX */
        model->words[X86_W_1_ECX] &= ~AVX_1_ECX;
        model->words[X86_W_7_EBX] &= ~AVX_7_EBX;
        model->words[X86_W_7_ECX] &= ~AVX_7_ECX;
    }
    return model;
}

uint64_t x86_xcr0_allowed(x86_cpu *cpu)
{
    bool has_avx = cpu->model->words[X86_W_1_ECX] & B(28);
    return has_avx && __builtin_cpu_supports("avx2") ? 7 : 3;           /* as ask_host() decides it */
}

uint64_t x86_cr4_allowed(x86_cpu *cpu)
{
    static const struct { uint16_t feature; uint32_t bits; } rows[] = {
        { X86_FEAT_VME, X86_CR4_VME | X86_CR4_PVI }, { X86_FEAT_TSC, X86_CR4_TSD }, { X86_FEAT_DE, X86_CR4_DE },
        { X86_FEAT_PSE, X86_CR4_PSE }, { X86_FEAT_PAE, X86_CR4_PAE }, { X86_FEAT_MCE, X86_CR4_MCE },
        { X86_FEAT_PGE, X86_CR4_PGE }, { X86_FEAT_MMX, X86_CR4_PCE }, { X86_FEAT_FXSR, X86_CR4_OSFXSR },
        { X86_FEAT_SSE, X86_CR4_OSXMMEXCPT }, { X86_FEAT_UMIP, X86_CR4_UMIP }, { X86_FEAT_FSGSBASE, X86_CR4_FSGSBASE },
        { X86_FEAT_PCID, X86_CR4_PCIDE }, { X86_FEAT_XSAVE, X86_CR4_OSXSAVE }, { X86_FEAT_SMEP, X86_CR4_SMEP },
        { X86_FEAT_SMAP, X86_CR4_SMAP },
    };
    uint64_t allowed = 0;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (x86_has(cpu, rows[i].feature))
            allowed |= rows[i].bits;
    return allowed;
}

/* ---- leaves ---- */

static unsigned cpu_count(x86_cpu *cpu) { return cpu->env->cpu_count ? cpu->env->cpu_count(cpu) : 1; }
static unsigned apic_id(x86_cpu *cpu) { return cpu->env->apic_id ? cpu->env->apic_id(cpu) : 0; }

/* IA32_APIC_BASE exists and its enable bit is set. */
static bool has_apic(x86_cpu *cpu)
{
    uint64_t base;
    return cpu->env->msr_read && cpu->env->msr_read(cpu, 0x1b, &base) && (base >> 11 & 1);
}

/* Bits of the APIC id that number the cores of the one package. */
static unsigned core_bits(x86_cpu *cpu)
{
    unsigned bits = 0, count = cpu_count(cpu);
    while ((1u << bits) < count)
        bits++;
    return bits;
}

static void put_text(uint32_t *out, const char *text, unsigned bytes, unsigned offset)
{
    char buf[64] = { 0 };
    memcpy(buf, text, strnlen(text, sizeof buf - 1));
    memcpy(out, buf + offset, bytes);
}

static void leaf_vendor(x86_cpu *cpu, uint32_t max, uint32_t out[4])
{
    uint32_t words[3];
    put_text(words, cpu->model->vendor, 12, 0);
    out[0] = max;
    out[1] = words[0];
    out[3] = words[1];
    out[2] = words[2];
}

static void leaf_1(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    unsigned count = cpu_count(cpu);
    (void)sub;
    out[0] = cpu->model->signature;
    out[1] = apic_id(cpu) << 24 | (count & 0xff) << 16 | 8 << 8;        /* CLFLUSH line: 8 quadwords */
    out[2] = feature_word(cpu, X86_W_1_ECX);
    out[3] = feature_word(cpu, X86_W_1_EDX);
    if (count > 1)
        out[3] |= B(28);
    if (!has_apic(cpu)) {
        out[2] &= ~(B(21) | B(24));
        out[3] &= ~B(9);
    }
    if (cpu->cr4 & X86_CR4_OSXSAVE)
        out[2] |= B(27);
}

static void leaf_6(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    (void)sub;
    out[0] = has_apic(cpu) ? B(2) : 0;                                  /* the APIC timer never stops */
}

static void leaf_7(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    if (sub)
        return;
    out[1] = feature_word(cpu, X86_W_7_EBX);
    out[2] = feature_word(cpu, X86_W_7_ECX);
    out[3] = feature_word(cpu, X86_W_7_EDX);
}

static void leaf_b(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    out[2] = sub & 0xff;
    out[3] = apic_id(cpu);
    if (sub == 0) {                    /* one thread a core */
        out[1] = 1;
        out[2] |= 1 << 8;
    } else if (sub == 1) {
        out[0] = core_bits(cpu);
        out[1] = cpu_count(cpu);
        out[2] |= 2 << 8;
    }
}

static void leaf_d(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    uint64_t allowed = x86_xcr0_allowed(cpu);
    uint32_t size = cpu->xcr0 & 4 ? 832 : 576;
    if (!x86_has(cpu, X86_FEAT_XSAVE))
        return;
    if (sub == 0) {
        out[0] = (uint32_t)allowed;
        out[1] = size;
        out[2] = allowed & 4 ? 832 : 576;
    } else if (sub == 1) {
        out[0] = feature_word(cpu, X86_W_D1_EAX);
        out[1] = size;
    } else if (sub == 2 && (allowed & 4)) {
        out[0] = 256;
        out[1] = 576;
    }
}

static void leaf_e1(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    (void)sub;
    out[0] = x86_is_amd(cpu) ? cpu->model->signature : 0;
    out[2] = feature_word(cpu, X86_W_E1_ECX);
    out[3] = feature_word(cpu, X86_W_E1_EDX);
    if (cpu_count(cpu) > 1 && x86_is_amd(cpu))
        out[2] |= B(1);                                                 /* HTT means cores, not threads */
    if (!has_apic(cpu))
        out[3] &= ~B(9);
}

static void leaf_brand(x86_cpu *cpu, uint32_t leaf, uint32_t out[4])
{
    put_text(out, cpu->model->brand, 16, 16 * (leaf - 0x80000002));
}

static void leaf_e5(x86_cpu *cpu, uint32_t sub, uint32_t out[4])       /* L1: 32 KiB, 8 ways, 64-byte lines */
{
    (void)sub;
    if (!x86_is_amd(cpu))
        return;
    out[0] = out[1] = 0xff40ff40;
    out[2] = out[3] = 32u << 24 | 8 << 16 | 1 << 8 | 64;
}

static void leaf_e6(x86_cpu *cpu, uint32_t sub, uint32_t out[4])       /* L2: 512 KiB, 8 ways; L3: 16 MiB, 16 ways */
{
    (void)sub;
    if (!x86_is_amd(cpu))
        return;
    out[2] = 512u << 16 | 6 << 12 | 1 << 8 | 64;
    out[3] = 32u << 18 | 8 << 12 | 1 << 8 | 64;
}

static void leaf_e7(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    (void)sub;
    if (x86_has(cpu, X86_FEAT_RDTSCP))
        out[3] = B(8);                 /* invariant TSC */
}

static void leaf_e8(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    unsigned count = cpu_count(cpu);
    (void)sub;
    out[0] = cpu->model->phys_bits | cpu->model->linear_bits << 8;
    out[1] = feature_word(cpu, X86_W_E8_EBX);
    if (x86_is_amd(cpu))
        out[2] = ((count - 1) & 0xff) | core_bits(cpu) << 12;
}

/* Cache properties, one cache a subleaf: the sizes of leaves 5 and 6 again. */
static void leaf_e1d(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    static const struct { uint8_t type, level, ways; uint16_t kib; } caches[] = {
        { 1, 1, 8, 32 }, { 2, 1, 8, 32 }, { 3, 2, 8, 512 }, { 3, 3, 16, 16384 } };
    if (sub >= sizeof caches / sizeof caches[0])
        return;
    unsigned sharing = caches[sub].level == 3 ? cpu_count(cpu) : 1;
    out[0] = caches[sub].type | caches[sub].level << 5 | B(8) | (sharing - 1) << 14;
    out[1] = (caches[sub].ways - 1u) << 22 | 63;
    out[2] = caches[sub].kib * 1024u / caches[sub].ways / 64 - 1;
}

static void leaf_e1e(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    unsigned id = apic_id(cpu);
    (void)sub;
    out[0] = id;
    out[1] = id & 0xff;                /* core id; one thread a core */
}

static void leaf_e21(x86_cpu *cpu, uint32_t sub, uint32_t out[4])
{
    (void)sub;
    out[0] = feature_word(cpu, X86_W_E21_EAX);
    out[2] = B(1) | B(2);              /* TSA_SQ_NO, TSA_L1_NO */
}

/* Our own leaves: signature, and frequencies in kHz as other hypervisors report them. */
static void leaf_hypervisor(x86_cpu *cpu, uint32_t leaf, uint32_t out[4])
{
    if (leaf == 0x40000000) {
        out[0] = 0x40000010;
        put_text(out + 1, "libvmlibvm", 12, 0);
    } else if (leaf == 0x40000010) {
        out[0] = cpu->tsc_khz ? cpu->tsc_khz : 1000000;
        out[1] = 1000000;              /* local APIC timer before its divider */
    }
}

typedef void (*leaf_fn)(x86_cpu *cpu, uint32_t sub, uint32_t out[4]);
static const struct { uint32_t leaf; leaf_fn fn; } leaves[] = {
    { 1, leaf_1 }, { 6, leaf_6 }, { 7, leaf_7 }, { 0xb, leaf_b }, { 0xd, leaf_d }, { 0x80000001, leaf_e1 },
    { 0x80000005, leaf_e5 }, { 0x80000006, leaf_e6 }, { 0x80000007, leaf_e7 }, { 0x80000008, leaf_e8 },
    { 0x8000001d, leaf_e1d }, { 0x8000001e, leaf_e1e }, { 0x80000021, leaf_e21 },
};

void x86_cpuid(x86_cpu *cpu, uint32_t leaf, uint32_t sub, uint32_t out[4])
{
    const struct x86_model *model = cpu->model;
    memset(out, 0, 4 * sizeof out[0]);
    if (leaf >> 16 == 0x4000) {
        if (model->is_hypervisor)
            leaf_hypervisor(cpu, leaf, out);
        return;
    }
    if (leaf > (leaf & 0x80000000 ? model->max_extended : model->max_leaf)) {
        if (x86_is_amd(cpu) || (leaf & 0x80000000 && !model->max_extended))
            return;
        leaf = model->max_leaf;        /* Intel answers with the last basic leaf */
    }
    if (leaf == 0 || leaf == 0x80000000) {
        leaf_vendor(cpu, leaf ? model->max_extended : model->max_leaf, out);
        return;
    }
    if (leaf >= 0x80000002 && leaf <= 0x80000004) {
        leaf_brand(cpu, leaf, out);
        return;
    }
    for (size_t i = 0; i < sizeof leaves / sizeof leaves[0]; i++)
        if (leaves[i].leaf == leaf)
            leaves[i].fn(cpu, sub, out);
}
