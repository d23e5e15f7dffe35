/* op_xsave.c - FXSAVE, FXRSTOR and the XSAVE family (SDM vol. 1, 10.5 and chapter 13).
 *
 * State components offered: x87, SSE, AVX; no supervisor components, so XSAVES and XRSTORS are not. A component counts as in
 * use (XINUSE) when it differs from its initial configuration. Outside 64-bit mode only registers 0-7 are reached. Every
 * access is checked before anything is written.
 */
#include "x86/simd.h"
#include "x86/system.h"

#include <Zydis/Mnemonic.h>
#include <string.h>

enum { X87 = 1, SSE = 2, AVX = 4 };
enum { HEADER = 512, AVX_AT = 576, XSAVE_BYTES = 832 };
#define MXCSR_INIT 0x1f80u
#define XCOMP_COMPACT (UINT64_C(1) << 63)

static unsigned vector_bytes(const x86_cpu *cpu)
{
    return cpu->code_size == 8 ? 256 : 128;
}

static bool is_zero(const uint8_t *p, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (p[i])
            return false;
    return true;
}

/* ---- the x87 part: bytes 0..23 and 32..159 ---- */
static void make_x87(const x86_cpu *cpu, uint8_t *area, bool is_64)
{
    memcpy(area, cpu->fpu.image, 24);
    area[5] = 0;
    if (!is_64) {                                          /* 32-bit offsets with selectors */
        memset(area + 12, 0, 4);
        memset(area + 20, 0, 4);
        memcpy(area + 12, &X86_FPU_FCS(cpu), 2);
        memcpy(area + 20, &X86_FPU_FDS(cpu), 2);
    }
    memset(area + 32, 0, 128);
    for (unsigned i = 0; i < 8; i++)
        memcpy(area + 32 + 16 * i, X86_FPU_ST(cpu, i), 10);
}

static void load_x87(x86_cpu *cpu, const uint8_t *area, bool is_64)
{
    memcpy(cpu->fpu.image, area, 24);
    cpu->fpu.image[5] = 0;
    X86_FPU_FCS(cpu) = X86_FPU_FDS(cpu) = 0;
    if (!is_64) {
        memcpy(&X86_FPU_FCS(cpu), area + 12, 2);
        memcpy(&X86_FPU_FDS(cpu), area + 20, 2);
        memset(cpu->fpu.image + 12, 0, 4);
        memset(cpu->fpu.image + 20, 0, 4);
    }
    for (unsigned i = 0; i < 8; i++) {
        memcpy(X86_FPU_ST(cpu, i), area + 32 + 16 * i, 10);
        memset(X86_FPU_ST(cpu, i) + 10, 0, 6);
    }
    X86_FPU_FCW(cpu) = (X86_FPU_FCW(cpu) & 0x1f3f) | 0x40;
    X86_FPU_FOP(cpu) &= 0x7ff;
    x86_fpu_update_es(cpu);
}

static void init_x87(x86_cpu *cpu)
{
    x86_fpu_init(cpu);
    memset(X86_FPU_ST(cpu, 0), 0, 128);
}

static void make_mxcsr(const x86_cpu *cpu, uint8_t *area)
{
    uint32_t mask = X86_MXCSR_VALID;
    memcpy(area + 24, &X86_FPU_MXCSR(cpu), 4);
    memcpy(area + 28, &mask, 4);
}

static uint32_t mxcsr_in(const uint8_t *area)
{
    uint32_t v;
    memcpy(&v, area + 24, 4);
    return v;
}

static bool is_wide_form(const x86_insn *in)
{
    return in->mode == 8 && in->rex & 8;
}

static uint64_t aligned_operand(x86_cpu *cpu, const x86_insn *in, unsigned n, unsigned align, unsigned access)
{
    if (align == 64 && x86_is_misaligned_long(cpu, in, align))    /* of XSAVE areas silicon looks at alignment first */
        x86_raise_error(cpu, X86_GP, 0);
    uint64_t la = x86_op_linear(cpu, in, n, access);
    if (la & (align - 1))
        x86_raise_error(cpu, X86_GP, 0);
    return la;
}

/* ---- FXSAVE, FXRSTOR ---- */
/* AMD's EFER.FFXSR: in 64-bit mode at CPL 0 the XMM registers are left out. */
static unsigned fx_bytes(const x86_cpu *cpu)
{
    if (cpu->efer & X86_EFER_FFXSR && cpu->cpl == 0 && cpu->code_size == 8)
        return 160;
    return 160 + vector_bytes(cpu);
}

void x86_op_fxsave(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t area[512];
    unsigned n = fx_bytes(cpu);
    x86_check_fpu(cpu);
    uint64_t la = aligned_operand(cpu, in, 512, 16, X86_WRITE);
    make_x87(cpu, area, is_wide_form(in));
    make_mxcsr(cpu, area);
    memcpy(area + 160, X86_FPU_XMM(cpu, 0), n - 160);
    x86_write_linear(cpu, la, area, n);
}

void x86_op_fxrstor(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t area[512];
    unsigned n = fx_bytes(cpu);
    x86_check_fpu(cpu);
    uint64_t la = aligned_operand(cpu, in, 512, 16, X86_READ);
    x86_read_linear(cpu, la, area, n);
    if (mxcsr_in(area) & ~X86_MXCSR_VALID)
        x86_raise_error(cpu, X86_GP, 0);
    load_x87(cpu, area, is_wide_form(in));
    X86_FPU_MXCSR(cpu) = mxcsr_in(area);
    memcpy(X86_FPU_XMM(cpu, 0), area + 160, n - 160);
}

/* ---- XSAVE family ---- */
static uint64_t requested(x86_cpu *cpu)
{
    if (!(cpu->cr4 & X86_CR4_OSXSAVE))
        x86_raise(cpu, X86_UD);
    if (cpu->cr0 & X86_CR0_TS)
        x86_raise(cpu, X86_NM);
    return cpu->xcr0 & (cpu->gpr[X86_RDX] << 32 | (uint32_t)cpu->gpr[X86_RAX]) & (X87 | SSE | AVX);
}

enum { XSAVEOPT, XSAVEC };             /* bits of CPUID.(0Dh, 1):EAX */

static bool has_xsave_feature(x86_cpu *cpu, unsigned bit)
{
    uint32_t r[4];
    x86_cpuid(cpu, 0xd, 1, r);
    return r[0] >> bit & 1;
}

static void need_xsave_feature(x86_cpu *cpu, unsigned bit)
{
    if (!has_xsave_feature(cpu, bit))
        x86_raise(cpu, X86_UD);
}

uint64_t x86_in_use(const x86_cpu *cpu)
{
    static const uint8_t x87_init[24] = { 0x7f, 0x03 };
    uint64_t bv = 0;
    if (memcmp(cpu->fpu.image, x87_init, 24) || !is_zero(X86_FPU_ST(cpu, 0), 128))
        bv |= X87;
    if (!is_zero(X86_FPU_XMM(cpu, 0), vector_bytes(cpu)))
        bv |= SSE;
    if (!is_zero(X86_FPU_YMMH(cpu, 0), vector_bytes(cpu)))
        bv |= AVX;
    return bv;
}

/* One contiguous piece of the area. */
typedef struct piece { unsigned at, bytes; } piece;

static unsigned pieces_of(const x86_cpu *cpu, uint64_t parts, bool with_mxcsr, piece *out)
{
    unsigned n = 0;
    if (parts & X87)
        out[n++] = (piece){ 0, 24 };
    if (with_mxcsr)
        out[n++] = (piece){ 24, 8 };
    if (parts & X87)
        out[n++] = (piece){ 32, 128 };
    if (parts & SSE)
        out[n++] = (piece){ 160, vector_bytes(cpu) };
    if (parts & AVX)
        out[n++] = (piece){ AVX_AT, vector_bytes(cpu) };
    return n;
}

static void make_area(const x86_cpu *cpu, const x86_insn *in, uint8_t *area)
{
    make_x87(cpu, area, is_wide_form(in));
    make_mxcsr(cpu, area);
    memcpy(area + 160, X86_FPU_XMM(cpu, 0), vector_bytes(cpu));
    memcpy(area + AVX_AT, X86_FPU_YMMH(cpu, 0), vector_bytes(cpu));
}

/* `header_bytes` of the header are written from area + HEADER. */
static void write_area(x86_cpu *cpu, uint64_t la, const uint8_t *area, uint64_t parts, bool with_mxcsr, unsigned header_bytes)
{
    piece pieces[6];
    unsigned n = pieces_of(cpu, parts, with_mxcsr, pieces);
    pieces[n++] = (piece){ HEADER, header_bytes };
    for (unsigned i = 0; i < n; i++)
        x86_probe_write(cpu, la + pieces[i].at, pieces[i].bytes);
    for (unsigned i = 0; i < n; i++)
        x86_write_linear(cpu, la + pieces[i].at, area + pieces[i].at, pieces[i].bytes);
}

static unsigned area_bytes(uint64_t rfbm)
{
    return rfbm & AVX ? XSAVE_BYTES : AVX_AT;
}

/* XSAVE writes all requested components, XSAVEOPT only those in use. */
void x86_op_xsave(x86_cpu *cpu, const x86_insn *in)
{
    bool optimise = in->mnemonic == ZYDIS_MNEMONIC_XSAVEOPT || in->mnemonic == ZYDIS_MNEMONIC_XSAVEOPT64;
    uint8_t area[XSAVE_BYTES];
    uint64_t rfbm = requested(cpu), bv;
    if (optimise)
        need_xsave_feature(cpu, XSAVEOPT);
    uint64_t la = aligned_operand(cpu, in, area_bytes(rfbm), 64, X86_WRITE), used = x86_in_use(cpu);
    x86_read_linear(cpu, la + HEADER, &bv, 8);
    bv = (bv & ~rfbm) | (used & rfbm);
    make_area(cpu, in, area);
    memcpy(area + HEADER, &bv, 8);
    write_area(cpu, la, area, optimise ? rfbm & used : rfbm, rfbm & (SSE | AVX), 8);
}

/* Compacted: with x87, SSE and AVX as the only components AVX lies where it does in the standard format. */
void x86_op_xsavec(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t area[XSAVE_BYTES];
    uint64_t rfbm = requested(cpu);
    need_xsave_feature(cpu, XSAVEC);
    uint64_t la = aligned_operand(cpu, in, area_bytes(rfbm), 64, X86_WRITE), used = x86_in_use(cpu);
    if (X86_FPU_MXCSR(cpu) != MXCSR_INIT)
        used |= SSE;
    uint64_t header[2] = { rfbm & used, rfbm | XCOMP_COMPACT };
    make_area(cpu, in, area);
    memcpy(area + HEADER, header, 16);
    write_area(cpu, la, area, rfbm & used, rfbm & used & SSE, 16);
}

/* #GP rules of SDM vol. 1, 13.8.1 and 13.8.2. */
static bool header_is_valid(x86_cpu *cpu, const uint8_t *area, bool *is_compact)
{
    uint64_t bv, comp;
    memcpy(&bv, area + HEADER, 8);
    memcpy(&comp, area + HEADER + 8, 8);
    *is_compact = comp & XCOMP_COMPACT;
    if (*is_compact && !has_xsave_feature(cpu, XSAVEC))
        return false;
    if (!*is_compact)
        return !(bv & ~cpu->xcr0) && is_zero(area + HEADER + 8, 16);
    comp &= ~XCOMP_COMPACT;
    return !(comp & ~cpu->xcr0) && !(bv & ~comp) && is_zero(area + HEADER + 16, 48);
}

static void load_vectors(uint8_t *to, const uint8_t *from, unsigned n, bool present)
{
    if (present)
        memcpy(to, from, n);
    else
        memset(to, 0, n);
}

void x86_op_xrstor(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t area[XSAVE_BYTES];
    uint64_t rfbm = requested(cpu), bv, comp;
    bool is_compact;
    uint64_t la = aligned_operand(cpu, in, area_bytes(rfbm), 64, X86_READ);
    x86_read_linear(cpu, la, area, AVX_AT);
    if (!header_is_valid(cpu, area, &is_compact))
        x86_raise_error(cpu, X86_GP, 0);
    memcpy(&bv, area + HEADER, 8);
    memcpy(&comp, area + HEADER + 8, 8);
    bool loads_mxcsr = is_compact ? rfbm & bv & SSE : rfbm & (SSE | AVX);
    if (loads_mxcsr && mxcsr_in(area) & ~X86_MXCSR_VALID)
        x86_raise_error(cpu, X86_GP, 0);
    if (rfbm & bv & AVX)
        x86_read_linear(cpu, la + AVX_AT, area + AVX_AT, vector_bytes(cpu));

    if (rfbm & bv & X87)
        load_x87(cpu, area, is_wide_form(in));
    else if (rfbm & X87)
        init_x87(cpu);
    if (loads_mxcsr)
        X86_FPU_MXCSR(cpu) = mxcsr_in(area);
    else if (is_compact && rfbm & SSE)
        X86_FPU_MXCSR(cpu) = MXCSR_INIT;
    if (rfbm & SSE)
        load_vectors(X86_FPU_XMM(cpu, 0), area + 160, vector_bytes(cpu), bv & SSE);
    if (rfbm & AVX)
        load_vectors(X86_FPU_YMMH(cpu, 0), area + AVX_AT, vector_bytes(cpu), bv & AVX);
}
