/* op_simd.c - MMX, SSE and AVX instructions.
 *
 * Nearly all of them run natively (native.c) on the guest's register image: x86_op_simd checks availability, brings the
 * memory operand within reach, runs the thunk and looks at the exceptions it raised. The rest of the file is what cannot
 * run as it is: masked memory accesses, gathers, MXCSR and upper-half control. Nothing changes before the last access that
 * can fault, except that gathers complete element by element, as the architecture says.
 */
#include "x86/simd.h"

#include <Zydis/Mnemonic.h>
#include <string.h>

/* ---- the table ---- */
enum simd_isa { ISA_NONE, ISA_MMX, ISA_MMXEXT, ISA_SSE, ISA_SSE2, ISA_SSE3, ISA_SSSE3, ISA_SSE41, ISA_SSE42, ISA_SSE4A, ISA_AES, ISA_PCLMUL,
                ISA_SHA, ISA_GFNI, ISA_AVX, ISA_AVX2, ISA_FMA, ISA_F16C, ISA_AVXAES, ISA_AVXGFNI };
typedef struct simd_row { uint16_t props; uint8_t isa; } simd_row;

static const simd_row rows[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
#define SIMD(m, i, p, fl) [ZYDIS_MNEMONIC_##m] = { p, ISA_##i },
#include "x86/ops_simd.def"
#undef SIMD
};

static const simd_row *row_of(const x86_insn *in)
{
    static const simd_row none = { 0, ISA_NONE };
    return in->mnemonic <= ZYDIS_MNEMONIC_MAX_VALUE ? &rows[in->mnemonic] : &none;
}

unsigned x86_simd_properties(const x86_insn *in)
{
    return row_of(in)->props;
}

/* ---- availability ---- */
enum { LEAF1_ECX, LEAF1_EDX, LEAF7_EBX, LEAF7_ECX, LEAF81_ECX, NWORDS };
typedef struct feature { uint8_t word, bit; } feature;
#define ALWAYS { NWORDS, 0 }
/* By enum simd_isa: up to two CPUID bits. What x86-64 guarantees on the host may still be missing in the CPU model. */
static const feature isa_features[][2] = {
    [ISA_NONE] = { ALWAYS, ALWAYS },
    [ISA_MMX] = { { LEAF1_EDX, 23 }, ALWAYS },
    [ISA_MMXEXT] = { { LEAF1_EDX, 23 }, { LEAF1_EDX, 25 } },            /* what SSE added to MMX */
    [ISA_SSE] = { { LEAF1_EDX, 25 }, ALWAYS },
    [ISA_SSE2] = { { LEAF1_EDX, 26 }, ALWAYS },
    [ISA_SSE3] = { { LEAF1_ECX, 0 }, ALWAYS },
    [ISA_SSSE3] = { { LEAF1_ECX, 9 }, ALWAYS },
    [ISA_SSE41] = { { LEAF1_ECX, 19 }, ALWAYS },
    [ISA_SSE42] = { { LEAF1_ECX, 20 }, ALWAYS },
    [ISA_SSE4A] = { { LEAF81_ECX, 6 }, ALWAYS },
    [ISA_AES] = { { LEAF1_ECX, 25 }, ALWAYS },
    [ISA_PCLMUL] = { { LEAF1_ECX, 1 }, ALWAYS },
    [ISA_SHA] = { { LEAF7_EBX, 29 }, ALWAYS },
    [ISA_GFNI] = { { LEAF7_ECX, 8 }, ALWAYS },
    [ISA_AVX] = { { LEAF1_ECX, 28 }, ALWAYS },
    [ISA_AVX2] = { { LEAF7_EBX, 5 }, ALWAYS },
    [ISA_FMA] = { { LEAF1_ECX, 12 }, ALWAYS },
    [ISA_F16C] = { { LEAF1_ECX, 29 }, ALWAYS },
    [ISA_AVXAES] = { { LEAF1_ECX, 28 }, { LEAF1_ECX, 25 } },
    [ISA_AVXGFNI] = { { LEAF1_ECX, 28 }, { LEAF7_ECX, 8 } },
};

/* The model's words; x86_cpuid() has already taken out what the host lacks. */
static void guest_words(x86_cpu *cpu, uint32_t words[NWORDS])
{
    uint32_t r[4];
    x86_cpuid(cpu, 1, 0, r);
    words[LEAF1_ECX] = r[2];
    words[LEAF1_EDX] = r[3];
    x86_cpuid(cpu, 7, 0, r);
    words[LEAF7_EBX] = r[1];
    words[LEAF7_ECX] = r[2];
    x86_cpuid(cpu, 0x80000001u, 0, r);
    words[LEAF81_ECX] = r[2];
}

static bool has(const uint32_t words[NWORDS], feature f)
{
    return f.word == NWORDS || words[f.word] >> f.bit & 1;
}

static bool uses_kind(const x86_insn *in, unsigned kind)
{
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (in->op[i].kind == kind)
            return true;
    return false;
}

/* Forms of MMX instructions for the XMM registers. */
static bool is_mmx_on_xmm(const simd_row *row, const x86_insn *in)
{
    return (row->isa == ISA_MMX || row->isa == ISA_MMXEXT) && !uses_kind(in, X86_OP_MMX);
}

static bool words_offer(const uint32_t words[NWORDS], const simd_row *row, const x86_insn *in)
{
    static const feature avx2 = { LEAF7_EBX, 5 }, vaes = { LEAF7_ECX, 9 }, vpclmul = { LEAF7_ECX, 10 }, pclmul = { LEAF1_ECX, 1 };
    bool wide = in->vl == 32;
    if (is_mmx_on_xmm(row, in))                            /* those of map 3 came later still (PEXTRW to memory) */
        return has(words, isa_features[in->map == 3 ? ISA_SSE41 : ISA_SSE2][0]);
    if (!has(words, isa_features[row->isa][0]) || !has(words, isa_features[row->isa][1]))
        return false;
    if (((row->props & SIMD_Y2 && wide) || (row->props & SIMD_R2 && !(in->flags & X86_IF_MEM))) && !has(words, avx2))
        return false;
    if (row->props & SIMD_YVAES && wide && !has(words, vaes))
        return false;
    if (row->props & SIMD_YVPCLMUL && !has(words, wide ? vpclmul : pclmul))
        return false;
    return true;
}

/* VPEXTRQ and VPINSRQ outside 64-bit mode: AMD's processors do not ignore VEX.W here. */
static bool is_qword_form_in_32(const x86_insn *in)
{
    if (in->mode == 8 || !(in->flags & X86_IF_VEX) || in->map != 3 || (in->opcode != 0x16 && in->opcode != 0x22))
        return false;
    return in->modrm_off >= 2 && in->bytes[in->modrm_off - 2] & 0x80;
}

bool x86_simd_offered(x86_cpu *cpu, const x86_insn *in)
{
    uint32_t words[NWORDS];
    if (is_qword_form_in_32(in))
        return false;
    guest_words(cpu, words);
    return words_offer(words, row_of(in), in);
}

/* #UD and #NM rules of SDM vol. 2, 2.4 (VEX) and vol. 3, table 14-1 and 12-1 (SSE, MMX), in their order. */
void x86_check_simd(x86_cpu *cpu, const x86_insn *in, bool uses_mmx)
{
    if (in->flags & X86_IF_LOCK)
        x86_raise(cpu, X86_UD);
    if (in->flags & X86_IF_VEX) {
        if (!x86_is_protected(cpu) || !(cpu->cr4 & X86_CR4_OSXSAVE) || (cpu->xcr0 & 6) != 6)
            x86_raise(cpu, X86_UD);
    } else if (cpu->cr0 & X86_CR0_EM) {
        x86_raise(cpu, X86_UD);
    } else if (!(cpu->cr4 & X86_CR4_OSFXSR) && (!uses_mmx || uses_kind(in, X86_OP_VEC))) {
        x86_raise(cpu, X86_UD);
    }
    if (cpu->cr0 & X86_CR0_TS)
        x86_raise(cpu, X86_NM);
    if (uses_mmx)
        x86_check_fpu_error(cpu);
}

/* ---- the memory operand ---- */
unsigned x86_simd_alignment(const x86_insn *in)
{
    int m = x86_memory_operand(in);
    unsigned props = row_of(in)->props;
    if (m < 0)
        return 1;
    if (in->flags & X86_IF_VEX)
        return props & SIMD_ALIGN ? in->op[m].size : 1;
    if (row_of(in)->isa == ISA_SHA)                        /* AMD's processors take any address, others fault */
        return __builtin_cpu_is("amd") ? 1 : 16;
    return in->op[m].size == 16 && !(props & SIMD_UNALIGNED) ? 16 : 1;
}

typedef struct operand_view {
    uint64_t la;
    uint8_t *host;             /* what the thunk gets */
    unsigned size;
    bool is_store, is_bounced;
} operand_view;

static void open_memory(x86_cpu *cpu, const x86_insn *in, unsigned props, operand_view *v)
{
    int m = x86_memory_operand(in);
    x86_thunk_frame *frame = x86_thunk_frame_of(cpu);
    memset(v, 0, sizeof *v);
    if (m < 0)
        return;
    v->size = in->op[m].size <= sizeof frame->memory ? in->op[m].size : (unsigned)sizeof frame->memory;
    v->is_store = m == 0 && !(props & SIMD_NODEST);
    unsigned access = v->is_store ? X86_WRITE : X86_READ, align = x86_simd_alignment(in);
    if (x86_is_misaligned_long(cpu, in, align))
        x86_raise_error(cpu, X86_GP, 0);
    v->la = x86_op_linear(cpu, in, v->size, access);
    if (align > 1 && v->la & (align - 1))
        x86_raise_error(cpu, X86_GP, 0);
    if (!(v->is_store && props & SIMD_FP))                 /* a store that may raise #XM must not have happened then */
        v->host = x86_direct(cpu, v->la, v->size, access);
    if (v->host)
        return;
    v->is_bounced = true;
    v->host = frame->memory;
    if (!v->is_store)
        x86_read_linear(cpu, v->la, frame->memory, v->size);
    else
        x86_probe_write(cpu, v->la, v->size);              /* the store comes after register state has changed */
}

/* ---- SIMD floating-point exceptions ----
 * Thunks run with every exception masked; what would have been unmasked shows in the flags afterwards. The destination is
 * then put back, flags are merged into MXCSR and #XM is raised (SDM vol. 1, 11.5). */
typedef struct saved_destination { uint8_t low[16], high[16]; uint64_t gpr; } saved_destination;

static void save_destination(const x86_cpu *cpu, const x86_insn *in, saved_destination *s)
{
    const x86_operand *op = &in->op[0];
    if (op->kind == X86_OP_VEC) {
        memcpy(s->low, X86_FPU_XMM(cpu, op->reg & 15), 16);
        memcpy(s->high, X86_FPU_YMMH(cpu, op->reg & 15), 16);
    } else if (op->kind == X86_OP_MMX) {
        memcpy(s->low, X86_FPU_ST(cpu, op->reg & 7), 16);
    } else if (op->kind == X86_OP_GPR) {
        s->gpr = cpu->gpr[op->reg & 15];
    }
}

static void restore_destination(x86_cpu *cpu, const x86_insn *in, const saved_destination *s)
{
    const x86_operand *op = &in->op[0];
    if (op->kind == X86_OP_VEC) {
        memcpy(X86_FPU_XMM(cpu, op->reg & 15), s->low, 16);
        memcpy(X86_FPU_YMMH(cpu, op->reg & 15), s->high, 16);
    } else if (op->kind == X86_OP_MMX) {
        memcpy(X86_FPU_ST(cpu, op->reg & 7), s->low, 16);
    } else if (op->kind == X86_OP_GPR) {
        cpu->gpr[op->reg & 15] = s->gpr;
    }
}

static void set_thunk_mxcsr(x86_cpu *cpu, x86_thunk_frame *frame)
{
    uint32_t guest = X86_FPU_MXCSR(cpu);
    frame->mxcsr = (guest & X86_MXCSR_VALID & ~X86_FX_ERRORS) | X86_FX_ERRORS << 7;
    if (!(guest & 0x10u << 7))                             /* flush-to-zero counts only while underflow is masked */
        frame->mxcsr &= ~X86_MXCSR_FTZ;
}

/* True when the flags a thunk raised contain an unmasked one; MXCSR has then got what the hardware would have set. */
static bool finish_mxcsr(x86_cpu *cpu, const x86_thunk_frame *frame)
{
    uint32_t unmasked = ~(X86_FPU_MXCSR(cpu) >> 7) & X86_FX_ERRORS, raised = frame->mxcsr_after & X86_FX_ERRORS;
    if (raised & unmasked & 7)                             /* IE, DE, ZE come first: nothing was computed */
        raised &= 7;
    X86_FPU_MXCSR(cpu) |= raised;
    return raised & unmasked;
}

static bool any_denormal(const x86_cpu *cpu, unsigned reg, unsigned size, unsigned bytes)
{
    for (unsigned at = 0; at < bytes; at += size) {
        const uint8_t *p = at < 16 ? X86_FPU_XMM(cpu, reg) + at : X86_FPU_YMMH(cpu, reg) + (at - 16);
        uint64_t v = 0, fraction = size == 8 ? (UINT64_C(1) << 52) - 1 : (1u << 23) - 1;
        memcpy(&v, p, size);
        v &= size == 8 ? INT64_MAX : INT32_MAX;
        if (v && v <= fraction)
            return true;
    }
    return false;
}

/* While underflow is unmasked, a tiny result raises it even when it is exact, which a masked run does not flag. */
static bool is_tiny_result(const x86_cpu *cpu, const x86_insn *in)
{
    unsigned reg = in->op[0].reg & 15, bytes = in->op[0].size == 32 ? 32 : 16;
    switch (row_of(in)->props & SIMD_TINY_MASK) {
    case SIMD_TPS: return any_denormal(cpu, reg, 4, bytes);
    case SIMD_TPD: return any_denormal(cpu, reg, 8, bytes);
    case SIMD_TSS: return any_denormal(cpu, reg, 4, 4);
    case SIMD_TSD: return any_denormal(cpu, reg, 8, 8);
    default: return false;
    }
}

static _Noreturn void raise_xm(x86_cpu *cpu)
{
    x86_raise(cpu, cpu->cr4 & X86_CR4_OSXMMEXCPT ? X86_XM : X86_UD);
}

static void run_fp(x86_cpu *cpu, const x86_insn *in, x86_thunk_fn fn, void *memory)
{
    x86_thunk_frame *frame = x86_thunk_frame_of(cpu);
    saved_destination saved = { { 0 }, { 0 }, 0 };
    bool can_raise = (X86_FPU_MXCSR(cpu) >> 7 & X86_FX_ERRORS) != X86_FX_ERRORS;
    set_thunk_mxcsr(cpu, frame);
    if (can_raise)
        save_destination(cpu, in, &saved);
    fn(cpu, memory, frame);
    if (!(X86_FPU_MXCSR(cpu) & 0x10u << 7) && is_tiny_result(cpu, in))
        frame->mxcsr_after |= 0x10;
    if (finish_mxcsr(cpu, frame)) {
        restore_destination(cpu, in, &saved);
        raise_xm(cpu);
    }
}

void x86_op_simd(x86_cpu *cpu, const x86_insn *in)
{
    unsigned props = row_of(in)->props;
    bool mmx = uses_kind(in, X86_OP_MMX);
    operand_view v;

    x86_thunk_ready(cpu);
    x86_thunk_fn fn = x86_thunk(cpu, in);
    if (!fn)
        x86_raise(cpu, X86_UD);
    x86_check_simd(cpu, in, mmx);
    open_memory(cpu, in, props, &v);
    if (mmx)
        x86_mmx_enter(cpu);
    if (props & SIMD_FP)
        run_fp(cpu, in, fn, v.host);
    else
        fn(cpu, v.host, x86_thunk_frame_of(cpu));
    if (props & SIMD_FLAGS)
        cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | (x86_thunk_frame_of(cpu)->flags & X86_FL_ARITH);
    if (v.is_store && v.is_bounced)
        x86_write_linear(cpu, v.la, v.host, v.size);
}

/* ---- masked stores through DS:rDI ---- */
static void masked_bytes(x86_cpu *cpu, const x86_insn *in, const uint8_t *data, const uint8_t *mask, unsigned n)
{
    unsigned seg = in->flags & X86_IF_SEGOVR ? in->seg : X86_DS;
    uint64_t la = x86_linear(cpu, seg, x86_wrap_offset(in, cpu->gpr[X86_RDI]), n, X86_WRITE);
    for (unsigned i = 0; i < n; i++)
        if (mask[i] & 0x80)
            x86_probe_write(cpu, la + i, 1);
    for (unsigned i = 0; i < n;) {
        unsigned run = 0;
        while (i + run < n && mask[i + run] & 0x80)
            run++;
        if (run)
            x86_write_linear(cpu, la + i, data + i, run);
        i += run + 1;
    }
}

void x86_op_maskmovq(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_simd(cpu, in, true);
    /* Slots are stack-relative until the MMX transition, which must wait until the stores are done. */
    unsigned top = X86_FSW_TOP(X86_FPU_FSW(cpu));
    const uint8_t *data = X86_FPU_ST(cpu, (in->op[0].reg - top) & 7), *mask = X86_FPU_ST(cpu, (in->op[1].reg - top) & 7);
    masked_bytes(cpu, in, data, mask, 8);
    x86_mmx_enter(cpu);
}

void x86_op_maskmovdqu(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_simd(cpu, in, false);
    masked_bytes(cpu, in, X86_FPU_XMM(cpu, in->op[0].reg & 15), X86_FPU_XMM(cpu, in->op[1].reg & 15), 16);
}

static void get_vec(const x86_cpu *cpu, unsigned reg, uint8_t out[32])
{
    memcpy(out, X86_FPU_XMM(cpu, reg), 16);
    memcpy(out + 16, X86_FPU_YMMH(cpu, reg), 16);
}

/* The result of a VEX instruction: what is above vl becomes zero. */
static void set_vec(x86_cpu *cpu, unsigned reg, const uint8_t *in, unsigned vl)
{
    memcpy(X86_FPU_XMM(cpu, reg), in, 16);
    if (vl == 32)
        memcpy(X86_FPU_YMMH(cpu, reg), in + 16, 16);
    else
        memset(X86_FPU_YMMH(cpu, reg), 0, 16);
}

static void need_feature(x86_cpu *cpu, feature f)
{
    uint32_t words[NWORDS];
    guest_words(cpu, words);
    if (!has(words, f))
        x86_raise(cpu, X86_UD);
}

/* VMASKMOVPS/PD, VPMASKMOVD/Q: elements whose mask bit is clear are not accessed at all; each has an offset of its own, which wraps
 * at the address size. */
void x86_op_vmaskmov(x86_cpu *cpu, const x86_insn *in)
{
    bool is_int = in->mnemonic == ZYDIS_MNEMONIC_VPMASKMOVD || in->mnemonic == ZYDIS_MNEMONIC_VPMASKMOVQ;
    unsigned size = in->mnemonic == ZYDIS_MNEMONIC_VMASKMOVPD || in->mnemonic == ZYDIS_MNEMONIC_VPMASKMOVQ ? 8 : 4;
    unsigned vl = in->vl == 32 ? 32 : 16;
    bool is_store = in->op[0].kind == X86_OP_MEM;
    uint8_t mask[32], data[32] = { 0 };

    need_feature(cpu, (feature){ is_int ? LEAF7_EBX : LEAF1_ECX, is_int ? 5 : 28 });
    x86_check_simd(cpu, in, false);
    get_vec(cpu, in->op[1].reg & 15, mask);
    if (is_store)
        get_vec(cpu, in->op[2].reg & 15, data);
    uint64_t off = x86_offset(cpu, in);
    unsigned wanted = 0;
    for (unsigned i = 0; i < vl / size; i++)
        wanted |= (unsigned)(mask[(i + 1) * size - 1] >> 7) << i;
    uint64_t la[8];
    for (unsigned i = 0; i < vl / size; i++) {
        if (!(wanted >> i & 1))
            continue;
        la[i] = x86_linear(cpu, in->seg, x86_wrap_offset(in, off + i * size), size, is_store ? X86_WRITE : X86_READ);
        if (is_store)
            x86_probe_write(cpu, la[i], size);
        else
            x86_read_linear(cpu, la[i], data + i * size, size);
    }
    for (unsigned i = 0; is_store && i < vl / size; i++)
        if (wanted >> i & 1)
            x86_write_linear(cpu, la[i], data + i * size, size);
    if (!is_store)
        set_vec(cpu, in->op[0].reg & 15, data, vl);
}

/* ---- gathers (SDM vol. 2, VGATHERDPS etc.) ----
 * Elements complete in order from the lowest; each clears its mask element, so a fault leaves a state from which the
 * instruction goes on when it is executed again. */
typedef struct gather { unsigned dest, mask, index, scale, element, index_size, count, vl; } gather;

static void gather_shape(const x86_insn *in, gather *g)
{
    unsigned sib = in->modrm_off ? in->bytes[(in->modrm_off + 1) % 15] : 0;
    unsigned vex = (unsigned)(in->modrm_off >= 3 ? in->bytes[in->modrm_off - 3] : 0xff);    /* R X B mmmmm of a C4 VEX */
    unsigned w = (unsigned)(in->modrm_off >= 2 ? in->bytes[in->modrm_off - 2] : 0) >> 7;
    g->dest = in->op[0].reg & 15;
    g->mask = in->op[2].reg & 15;
    g->index = (sib >> 3 & 7) | (in->mode == 8 && !(vex & 0x40) ? 8 : 0);
    g->scale = sib >> 6;
    g->element = w ? 8 : 4;
    g->index_size = in->opcode & 1 ? 8 : 4;
    g->vl = in->vl == 32 ? 32 : 16;
    unsigned widest = g->element > g->index_size ? g->element : g->index_size;
    g->count = g->vl / widest;
}

static uint8_t *vec_element(x86_cpu *cpu, unsigned reg, unsigned i, unsigned size)
{
    unsigned at = i * size;
    return at < 16 ? X86_FPU_XMM(cpu, reg) + at : X86_FPU_YMMH(cpu, reg) + (at - 16);
}

static uint64_t gather_offset(x86_cpu *cpu, const x86_insn *in, const gather *g, unsigned i)
{
    int64_t index = 0;
    if (g->index_size == 8) {
        memcpy(&index, vec_element(cpu, g->index, i, 8), 8);
    } else {
        int32_t narrow;
        memcpy(&narrow, vec_element(cpu, g->index, i, 4), 4);
        index = narrow;
    }
    uint64_t a = (uint64_t)in->disp + ((uint64_t)index << g->scale);
    if (in->base != X86_NOREG && in->base != X86_REG_RIP)
        a += cpu->gpr[in->base];
    return in->asz == 8 ? a : (uint32_t)a;
}

void x86_op_vgather(x86_cpu *cpu, const x86_insn *in)
{
    gather g;
    gather_shape(in, &g);
    need_feature(cpu, (feature){ LEAF7_EBX, 5 });
    x86_check_simd(cpu, in, false);
    if (g.dest == g.mask || g.dest == g.index || g.mask == g.index)
        x86_raise(cpu, X86_UD);
    for (unsigned i = 0; i < g.count; i++) {
        uint8_t *mask = vec_element(cpu, g.mask, i, g.element), value[8];
        if (!(mask[g.element - 1] & 0x80)) {
            memset(mask, 0, g.element);                    /* passed elements are cleared whether read or not */
            continue;
        }
        uint64_t la = x86_linear(cpu, in->seg, gather_offset(cpu, in, &g, i), g.element, X86_READ);
        x86_read_linear(cpu, la, value, g.element);
        memcpy(vec_element(cpu, g.dest, i, g.element), value, g.element);
        memset(mask, 0, g.element);
        x86_io_retire(cpu);                                /* this element is final */
    }
    uint8_t data[32], zero[32] = { 0 };
    unsigned used = g.count * g.element;
    get_vec(cpu, g.dest, data);
    if (used < 32)
        memset(data + used, 0, 32 - used);
    set_vec(cpu, g.dest, data, 32);
    set_vec(cpu, g.mask, zero, 32);
}

/* ---- control ---- */
void x86_op_vzeroall(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_simd(cpu, in, false);
    unsigned n = cpu->code_size == 8 ? 16 : 8;
    memset(X86_FPU_XMM(cpu, 0), 0, 16 * n);
    memset(X86_FPU_YMMH(cpu, 0), 0, 16 * n);
}

void x86_op_vzeroupper(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_simd(cpu, in, false);
    memset(X86_FPU_YMMH(cpu, 0), 0, cpu->code_size == 8 ? 256 : 128);
}

void x86_op_ldmxcsr(x86_cpu *cpu, const x86_insn *in)
{
    uint32_t value;
    x86_check_simd(cpu, in, false);
    x86_read_linear(cpu, x86_op_linear(cpu, in, 4, X86_READ), &value, 4);
    if (value & ~X86_MXCSR_VALID)
        x86_raise_error(cpu, X86_GP, 0);
    X86_FPU_MXCSR(cpu) = value;
}

void x86_op_stmxcsr(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_simd(cpu, in, false);
    x86_write_linear(cpu, x86_op_linear(cpu, in, 4, X86_WRITE), &X86_FPU_MXCSR(cpu), 4);
}

void x86_op_emms(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_simd(cpu, in, true);
    x86_mmx_enter(cpu);
    X86_FPU_FTW(cpu) = 0;
}
