/* backends.c - random sequences of unprivileged instructions: the host CPU against every backend, through the public interface.
 *
 * A case is one to eight random instructions (random encodings that Zydis accepts, made anew with Zydis' encoder around
 * registers that point into a small window of memory), random registers, flags, vector and x87 state, in 64-, 32- or 16-bit code
 * with segments of many kinds (in 64-bit code: bases of FS and GS). Some are repeated, with R15 or EBP as the counter; in some, one
 * memory operand is aimed at the end of a page or segment, at what may not be written or at nothing; some have prefixes before them
 * that should not matter.
 * It runs natively in a guarded child (native.c) and then on each backend in ring 3 under page tables that show the same window,
 * with code pages that change from case to case: a page that is written all the time is no longer translated. Compared:
 * general registers, RIP, flags (but those the manuals leave undefined), x87, MXCSR, YMM, memory, and faults with vector,
 * error code and address. A mismatch is shrunk to as few instructions as still show it and printed with all inputs.
 *
 * CASES and SEED in the environment choose how many and which; `make diff CASES=N SEED=S`. Other columns: TEST_BACKEND, TEST_MMU.
 */
#include "native.h"

#include <Zydis/Zydis.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include "../backends.h"

enum { SEQUENCE = 8 };

typedef struct insn {
    ZydisEncoderRequest request;
    unsigned char bytes[16];
    unsigned length;
    bool is_branch;
    bool names_counter;
    int skip;                           /* branches: how many of the next instructions to jump over; less than 0: back */
} insn;

typedef struct sequence {
    insn insns[SEQUENCE + 2];
    unsigned count;
    bool is_loop;                       /* the last two instructions count and jump to the first */
    unsigned cut;                       /* not 0: CS ends within the code, where this number says */
    native_case c;
    uint32_t undefined;                 /* flags the manuals leave undefined at the end */
    uint32_t ever_undefined;            /* ... or at any instruction before: where a fault ends it early */
} sequence;

static uint64_t state;
static uint64_t rnd(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * UINT64_C(0x2545f4914f6cdd1d);
}
static unsigned below(unsigned n) { return (unsigned)((rnd() >> 33) % n); }

static ZydisDecoder decoders[3];        /* 16, 32, 64 bits */
static const ZydisDecoder *decoder_of(unsigned bits) { return &decoders[bits >> 5]; }

/* ---- making instructions ---- */

static bool is_left_out(const ZydisDecodedInstruction *d, const ZydisDecodedOperand *ops)
{
    static const ZydisMnemonic out[] = {
        ZYDIS_MNEMONIC_CPUID, ZYDIS_MNEMONIC_RDTSC, ZYDIS_MNEMONIC_RDTSCP, ZYDIS_MNEMONIC_RDPMC, ZYDIS_MNEMONIC_RDPID,
        ZYDIS_MNEMONIC_RDRAND, ZYDIS_MNEMONIC_RDSEED, ZYDIS_MNEMONIC_XGETBV, ZYDIS_MNEMONIC_POPF, ZYDIS_MNEMONIC_POPFD,
        ZYDIS_MNEMONIC_POPFQ, ZYDIS_MNEMONIC_FXSAVE, ZYDIS_MNEMONIC_FXSAVE64, ZYDIS_MNEMONIC_FXRSTOR,
        ZYDIS_MNEMONIC_FXRSTOR64, ZYDIS_MNEMONIC_FNSAVE, ZYDIS_MNEMONIC_FNSTENV, ZYDIS_MNEMONIC_FLDENV,
        ZYDIS_MNEMONIC_FRSTOR, ZYDIS_MNEMONIC_LAR, ZYDIS_MNEMONIC_LSL, ZYDIS_MNEMONIC_VERR, ZYDIS_MNEMONIC_VERW,
        ZYDIS_MNEMONIC_SLDT, ZYDIS_MNEMONIC_STR, ZYDIS_MNEMONIC_SMSW, ZYDIS_MNEMONIC_SGDT, ZYDIS_MNEMONIC_SIDT,
        ZYDIS_MNEMONIC_RET, ZYDIS_MNEMONIC_IRET, ZYDIS_MNEMONIC_IRETD, ZYDIS_MNEMONIC_IRETQ, ZYDIS_MNEMONIC_JMP,
        ZYDIS_MNEMONIC_CALL, ZYDIS_MNEMONIC_UD0, ZYDIS_MNEMONIC_UD1,
        ZYDIS_MNEMONIC_MONITOR, ZYDIS_MNEMONIC_MWAIT, ZYDIS_MNEMONIC_PTWRITE, ZYDIS_MNEMONIC_ENTER,
        ZYDIS_MNEMONIC_CLFLUSHOPT, ZYDIS_MNEMONIC_CLWB, ZYDIS_MNEMONIC_RSM, ZYDIS_MNEMONIC_CLZERO, ZYDIS_MNEMONIC_RDPRU,
        ZYDIS_MNEMONIC_MONITORX, ZYDIS_MNEMONIC_MWAITX, ZYDIS_MNEMONIC_FISTTP,
        ZYDIS_MNEMONIC_MASKMOVQ, ZYDIS_MNEMONIC_MASKMOVDQU, ZYDIS_MNEMONIC_VMASKMOVDQU, /* faults of masked-out bytes differ by model */
    };
    static const ZydisISASet sets[] = {
        ZYDIS_ISA_SET_I86, ZYDIS_ISA_SET_I186, ZYDIS_ISA_SET_I386, ZYDIS_ISA_SET_I486, ZYDIS_ISA_SET_I486REAL,
        ZYDIS_ISA_SET_PENTIUMREAL, ZYDIS_ISA_SET_PPRO, ZYDIS_ISA_SET_X87, ZYDIS_ISA_SET_FCMOV, ZYDIS_ISA_SET_CMOV,
        ZYDIS_ISA_SET_PENTIUMMMX, ZYDIS_ISA_SET_SSE, ZYDIS_ISA_SET_SSEMXCSR, ZYDIS_ISA_SET_SSE2, ZYDIS_ISA_SET_SSE2MMX,
        ZYDIS_ISA_SET_SSE3, ZYDIS_ISA_SET_SSSE3, ZYDIS_ISA_SET_SSSE3MMX, ZYDIS_ISA_SET_SSE4, ZYDIS_ISA_SET_SSE42,
        ZYDIS_ISA_SET_POPCNT, ZYDIS_ISA_SET_LZCNT, ZYDIS_ISA_SET_BMI1, ZYDIS_ISA_SET_BMI2, ZYDIS_ISA_SET_ADOX_ADCX,
        ZYDIS_ISA_SET_AES, ZYDIS_ISA_SET_PCLMULQDQ, ZYDIS_ISA_SET_AVX, ZYDIS_ISA_SET_AVX2, ZYDIS_ISA_SET_AVXAES,
        ZYDIS_ISA_SET_FMA, ZYDIS_ISA_SET_F16C, ZYDIS_ISA_SET_SHA, ZYDIS_ISA_SET_MOVBE, ZYDIS_ISA_SET_CMPXCHG16B,
        ZYDIS_ISA_SET_LAHF, ZYDIS_ISA_SET_LONGMODE, ZYDIS_ISA_SET_FAT_NOP, ZYDIS_ISA_SET_SSE_PREFETCH,
    };
    bool is_known = false;
    for (unsigned i = 0; i < sizeof sets / sizeof sets[0]; i++)
        is_known |= d->meta.isa_set == sets[i];
    if (!is_known || d->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED || d->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
        return true;
    switch (d->meta.category) {
    case ZYDIS_CATEGORY_INTERRUPT: case ZYDIS_CATEGORY_IO: case ZYDIS_CATEGORY_IOSTRINGOP: case ZYDIS_CATEGORY_SYSTEM:
    case ZYDIS_CATEGORY_SYSCALL: case ZYDIS_CATEGORY_SYSRET: case ZYDIS_CATEGORY_SEGOP: return true;
    default: break;
    }
    for (unsigned i = 0; i < sizeof out / sizeof out[0]; i++)
        if (d->mnemonic == out[i])
            return true;
    for (unsigned i = 0; i < d->operand_count; i++)
        if (ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(ops[i].reg.value) == ZYDIS_REGCLASS_SEGMENT &&
            ops[i].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
            return true;
    return false;
}

static const unsigned char segment_prefixes[N_SEGMENTS] = { 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65 };

/* Random bytes that tend to be an instruction. */
static void random_encoding(unsigned char b[20], unsigned bits)
{
    unsigned n = 0, map = below(16);
    for (unsigned i = 0; i < 20; i++)
        b[i] = (unsigned char)rnd();
    if (below(8) == 0)
        b[n++] = segment_prefixes[below(N_SEGMENTS)];
    if (below(bits == 16 ? 3 : 16) == 0)
        b[n++] = 0x67;
    if (below(6) == 0)
        b[n++] = 0x66;
    if (below(6) == 0)
        b[n++] = below(2) ? 0xf2 : 0xf3;
    if (below(20) == 0)
        b[n++] = 0xf0;
    if (map >= 12) {                                        /* VEX */
        b[n++] = 0xc4;
        b[n++] = (unsigned char)((rnd() & 0xe0) | (bits == 64 ? 0 : 0xc0) | (1 + below(3)));
        b[n++] = (unsigned char)rnd();
        return;
    }
    if (bits == 64 && below(2))
        b[n++] = (unsigned char)(0x40 | below(16));
    if (map >= 5)
        b[n++] = 0x0f;
    if (map >= 10)
        b[n++] = map == 10 ? 0x38 : 0x3a;
}

/* Registers that point into the window at the start, and so make good bases: their low halves too. */
static ZydisRegister good_base(ZydisRegister first)
{
    static const unsigned char bases[] = { 3, 5, 6, 7, 4, 12, 13, 10 };
    return first + bases[below(first == ZYDIS_REGISTER_RAX ? 8 : 5)];
}

/* 16-bit addresses keep their registers: there are few. */
static void random_memory(ZydisEncoderOperand *op, unsigned bits)
{
    ZydisRegisterClass width = ZydisRegisterGetClass(op->mem.base);
    if (width == ZYDIS_REGCLASS_GPR16) {
        op->mem.displacement = (int64_t)below(512) - 256 - (op->mem.index ? (int64_t)below(N_DATA_BYTES) : 0);
        return;
    }
    ZydisRegister first = width == ZYDIS_REGCLASS_GPR32 ? ZYDIS_REGISTER_EAX : ZYDIS_REGISTER_RAX;
    op->mem.base = good_base(first);
    op->mem.index = ZYDIS_REGISTER_NONE;
    op->mem.scale = 0;
    op->mem.displacement = (int64_t)below(3) == 0 ? 0 : (int64_t)below(512) - 256;
    if (below(4) == 0) {
        op->mem.index = first + (bits == 64 && below(2) ? 14 : 1);      /* small numbers at the start */
        op->mem.scale = (ZyanU8)(1u << below(4));
    }
    if (bits == 64 && below(12) == 0) {
        op->mem.base = ZYDIS_REGISTER_RIP;
        op->mem.index = ZYDIS_REGISTER_NONE;
        op->mem.scale = 0;
        op->mem.displacement = (int64_t)(N_DATA - N_CODE) + below(N_DATA_BYTES - 0x100) - below(0x1000);
    }
    if (below(40) == 0)
        op->mem.displacement = (int64_t)(int32_t)rnd();     /* astray */
}

static bool reencode(insn *x)
{
    ZyanUSize length = sizeof x->bytes;
    if (!ZYAN_SUCCESS(ZydisEncoderEncodeInstruction(&x->request, x->bytes, &length)))
        return false;
    x->length = (unsigned)length;
    return true;
}

/* R15, or EBP where that does not exist; PUSHA, POPA, ENTER and LEAVE use EBP without naming it. */
static bool names_counter(const ZydisDecodedInstruction *d, const ZydisDecodedOperand *ops)
{
    ZydisMachineMode mode = ZYDIS_MACHINE_MODE_LONG_64;
    ZydisRegister counter = d->machine_mode == mode ? ZYDIS_REGISTER_R15 : ZYDIS_REGISTER_RBP;
    for (unsigned i = 0; i < d->operand_count; i++) {
        bool is_memory = ops[i].type == ZYDIS_OPERAND_TYPE_MEMORY, is_register = ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER;
        ZydisRegister regs[] = { is_register ? ops[i].reg.value : is_memory ? ops[i].mem.base : ZYDIS_REGISTER_NONE,
                                 is_memory ? ops[i].mem.index : ZYDIS_REGISTER_NONE };
        for (unsigned k = 0; k < 2; k++)
            if (ZydisRegisterGetLargestEnclosing(mode, regs[k]) == counter)
                return true;
    }
    return d->mnemonic == ZYDIS_MNEMONIC_POPA || d->mnemonic == ZYDIS_MNEMONIC_POPAD || d->mnemonic == ZYDIS_MNEMONIC_LEAVE;
}

/* Prefixes before what the encoder made: most should not matter, some make it another instruction. */
static void prepend(insn *x, unsigned bits)
{
    static const unsigned char prefixes[] = { 0x66, 0xf2, 0xf3, 0x67, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65 };
    for (unsigned n = 1 + below(3); n-- && x->length < 13; x->length++) {
        memmove(x->bytes + 1, x->bytes, x->length);
        x->bytes[0] = bits == 64 && below(4) == 0 ? (unsigned char)(0x40 | below(16)) : prefixes[below(10)];
    }
}

static bool random_insn(insn *x, unsigned bits)
{
    const ZydisDecoder *decoder = decoder_of(bits);
    unsigned char b[20];
    ZydisDecodedInstruction d;
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    random_encoding(b, bits);
    memset(x, 0, sizeof *x);
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, b, 15, &d, ops)) || is_left_out(&d, ops))
        return false;
    bool is_vsib = false;
    for (unsigned i = 0; i < d.operand_count; i++)
        is_vsib |= ops[i].type == ZYDIS_OPERAND_TYPE_MEMORY && ops[i].mem.type == ZYDIS_MEMOP_TYPE_VSIB;
    if (is_vsib || !ZYAN_SUCCESS(ZydisEncoderDecodedInstructionToEncoderRequest(&d, ops, d.operand_count_visible, &x->request)))
        return false;
    x->is_branch = d.meta.category == ZYDIS_CATEGORY_COND_BR || d.meta.category == ZYDIS_CATEGORY_UNCOND_BR;
    for (unsigned i = 0; i < x->request.operand_count; i++) {
        ZydisEncoderOperand *op = &x->request.operands[i];
        if (op->type == ZYDIS_OPERAND_TYPE_MEMORY && op->mem.base != ZYDIS_REGISTER_NONE && below(16))
            random_memory(op, bits);
        if (x->is_branch && op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
            op->imm.s = 0;
    }
    x->skip = (int)below(3);
    if (!reencode(x))
        return false;
    if (!x->is_branch && below(10) == 0)
        prepend(x, bits);
    /* What came out must itself be permitted, and branches must be short ones that can be aimed. */
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, x->bytes, x->length, &d, ops)) || d.length != x->length || is_left_out(&d, ops))
        return false;
    x->names_counter = names_counter(&d, ops);
    return !x->is_branch || (d.raw.imm[0].is_relative && d.raw.imm[0].size == 8);
}

/* ---- undefined flags (Zydis' tables) ---- */

static bool may_leave_flags(const ZydisDecodedInstruction *d)
{
    return d->meta.category == ZYDIS_CATEGORY_SHIFT || d->meta.category == ZYDIS_CATEGORY_ROTATE ||
           d->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

/* Follows undefined flags through the sequence; false: an instruction reads one. */
static bool follow_flags(sequence *s)
{
    bool has_branched = false;
    for (unsigned i = 0; i < s->count; i++) {
        ZydisDecodedInstruction d;
        if (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(decoder_of(s->c.bits), NULL, s->insns[i].bytes, s->insns[i].length, &d)))
            return false;
        if (s->is_loop && i + 1 == s->count)
            return true;                                    /* reads what the DEC before it has set */
        has_branched |= s->insns[i].is_branch;
        if (!d.cpu_flags)
            continue;
        if (d.cpu_flags->tested & s->undefined)
            return false;
        if (!has_branched && !may_leave_flags(&d))
            s->undefined &= ~(d.cpu_flags->modified | d.cpu_flags->set_0 | d.cpu_flags->set_1);
        s->undefined |= d.cpu_flags->undefined;
        s->ever_undefined |= d.cpu_flags->undefined;
    }
    return true;
}

/* Lays the instructions out, aims branches, and follows undefined flags; false: one of them reads an undefined flag. */
static bool assemble(sequence *s)
{
    unsigned offset[SEQUENCE + 3], at = 0;
    s->undefined = s->ever_undefined = 0;
    for (unsigned i = 0; i < s->count; i++) {
        offset[i] = at;
        memcpy(s->c.code + at, s->insns[i].bytes, s->insns[i].length);
        at += s->insns[i].length;
    }
    offset[s->count] = at;
    s->c.length = at;
    if (s->c.bits != 64 && s->c.seg[N_CS].base)             /* never between the code and the way back */
        s->c.seg[N_CS].limit = s->cut && at > 1 ? s->c.start + s->cut % (at - 1) : N_CODE_BYTES - 1;
    if (!follow_flags(s))
        return false;
    if (s->is_loop) {
        uint32_t at_end = s->undefined;
        s->undefined &= ZYDIS_CPUFLAG_CF;                   /* DEC defines the others */
        if (!follow_flags(s))
            return false;
        s->undefined |= at_end;
    }
    for (unsigned i = 0; i < s->count; i++) {
        if (!s->insns[i].is_branch)
            continue;
        unsigned to = (unsigned)((int)i + 1 + s->insns[i].skip);
        if (s->is_loop && to == s->count - 1)
            to--;                                           /* never past the DEC only */
        unsigned end = offset[i] + s->insns[i].length;
        s->c.code[end - 1] = (unsigned char)(offset[to > s->count ? s->count : to] - end);
    }
    return true;
}

/* DEC R15, EBP or BP, and JNZ to the first instruction. */
static void close_loop(sequence *s)
{
    insn *dec = &s->insns[s->count], *jnz = dec + 1;
    *dec = s->c.bits == 64 ? (insn){ .bytes = { 0x49, 0xff, 0xcf }, .length = 3 } : (insn){ .bytes = { 0x4d }, .length = 1 };
    *jnz = (insn){ .bytes = { 0x75, 0 }, .length = 2, .is_branch = true, .skip = -(int)s->count - 2 };
    s->count += 2;
    s->is_loop = true;
}

static void leave_out(sequence *s, unsigned i)
{
    memmove(&s->insns[i], &s->insns[i + 1], (s->count - i - 1) * sizeof s->insns[0]);
    s->count--;
    if (s->is_loop)
        s->insns[s->count - 1].skip++;
}

/* ---- state ---- */

static uint64_t interesting(void)
{
    static const uint64_t v[] = { 0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff,
                                  INT64_MAX, UINT64_C(1) << 63, UINT64_MAX, UINT64_C(0x3ff0000000000000),
                                  UINT64_C(0x7ff0000000000000), UINT64_C(0x7ff8000000000001), UINT64_C(0x7ff0000000000001),
                                  UINT64_C(0x3f8000007f800000), UINT64_C(0x0000000100000001), 0x1f, 0x20, 0x40 };
    return below(3) ? rnd() >> below(64) : v[below(sizeof v / sizeof v[0])];
}

static void random_fpu(unsigned char *x)
{
    uint16_t fcw = 0x37f, fsw = 0;
    uint32_t mxcsr = 0x1f80;
    uint64_t xstate = 7;
    if (below(3) == 0) {
        fsw = (uint16_t)(below(8) << 11 | below(2) << 14 | below(2) << 9);
        x[4] = (unsigned char)rnd();                        /* abridged tags */
        fcw = (uint16_t)(0x37f & ~(below(4) ? 0 : 0xc00)) | (uint16_t)(below(4) << 10);
    }
    if (below(4) == 0)
        mxcsr = 0x1f80 | (uint32_t)below(4) << 13 | (uint32_t)below(2) << 15 | (uint32_t)below(2) << 6 | (uint32_t)below(64);
    if (below(16) == 0)
        mxcsr &= ~(UINT32_C(0x80) << below(6)) & ~UINT32_C(0x3f);
    memcpy(x, &fcw, 2);
    memcpy(x + 2, &fsw, 2);
    memcpy(x + 24, &mxcsr, 4);
    for (unsigned i = 0; i < 8; i++) {
        uint64_t m = rnd() | UINT64_C(1) << 63;
        uint16_t e = (uint16_t)(0x3fff - 40 + below(80) + (below(2) << 15));
        if (below(8) == 0)
            e = (uint16_t)rnd(), m = interesting();
        memcpy(x + 32 + 16 * i, &m, 8);
        memcpy(x + 40 + 16 * i, &e, 2);
    }
    for (unsigned i = 0; i < 64; i++) {
        uint64_t v = interesting();
        memcpy(i < 32 ? x + 160 + 8 * i : x + 576 + 8 * (i - 32), &v, 8);
    }
    memcpy(x + 512, &xstate, 8);
}

enum { DATA_FLAT = 0xc0f3, DATA_32 = 0x40f3, DATA_16 = 0x00f3, DOWN = 4, WRITABLE = 2, CODE_FLAT = 0xc0fb, CODE_32 = 0x40fb, CODE_16 = 0x00fb };

/* A data segment at `base`: the window or a part of it, now and then one that grows down or is read-only. */
static native_segment random_segment(uint32_t base, unsigned bits)
{
    static const uint32_t limits[] = { 0xffff, 0xffff, N_DATA_BYTES - 1, 0x1fff, 0xfff };
    native_segment s = { base, limits[below(5)], bits == 16 && below(8) ? DATA_16 : DATA_32 };
    if (below(8) == 0)
        s.limit = below(N_DATA_BYTES);
    if (below(8) == 0)
        s = (native_segment){ base, below(2) ? 0xfff : below(0x800), (uint16_t)(s.attributes | DOWN) };
    if (below(8) == 0)
        s.attributes &= (uint16_t)~WRITABLE;
    return s;
}

/* In 16-bit code, and half of 32-bit code, the window begins at address 0. Returns where registers are to point. */
static uint64_t random_segments(native_case *c)
{
    bool is_flat = c->bits == 32 && below(2);
    uint32_t base = is_flat ? 0 : (uint32_t)N_DATA;
    memset(c->seg, 0, sizeof c->seg);
    c->has_segments = true;
    if (c->bits == 64) {
        c->seg[N_FS].base = below(2) ? below(N_DATA_BYTES) : (uint32_t)N_DATA;
        c->seg[N_GS].base = below(2) ? below(N_DATA_BYTES) : (uint32_t)N_DATA;
        return N_DATA;
    }
    for (unsigned i = 0; i < N_SEGMENTS; i++) {
        if (i == N_CS)
            continue;
        c->seg[i] = (native_segment){ base, is_flat ? 0xffffffff : 0xffff,
                                      (uint16_t)(is_flat ? DATA_FLAT : c->bits == 16 ? DATA_16 : DATA_32) };
        if (below(i == N_SS ? 8 : 4) == 0)
            c->seg[i] = random_segment(below(4) ? base : (uint32_t)N_DATA + below(0x1000), c->bits);
        if (i != N_SS && below(24) == 0)
            c->seg[i] = (native_segment){ 0 };
    }
    c->seg[N_SS].attributes |= WRITABLE;
    c->seg[N_CS] = c->bits == 16 || below(4) == 0
                 ? (native_segment){ (uint32_t)N_CODE, N_CODE_BYTES - 1, (uint16_t)(c->bits == 16 ? CODE_16 : CODE_32) }
                 : (native_segment){ 0, 0xffffffff, CODE_FLAT };
    if (c->seg[N_CS].base && below(8) == 0)
        c->seg[N_CS].attributes &= (uint16_t)~WRITABLE;     /* of code: not readable */
    return N_DATA - base;
}

static void random_state(native_case *c)
{
    static const int pointers[] = { 3, 5, 6, 7, 12, 13, 4, 10 };
    memset(&c->in, 0, sizeof c->in);
    c->start = below(4) ? 0x100 : 0x1000 - below(24);       /* across the page end */
    uint64_t data = random_segments(c);
    for (int i = 0; i < 16; i++)
        c->in.gpr[i] = interesting();
    for (int i = 0; i < 8; i++)
        c->in.gpr[pointers[i]] = data + 0x200 + below(N_DATA_BYTES - 0x400);
    if (below(3))
        for (int i = 0; i < 8; i++)
            c->in.gpr[pointers[i]] &= ~UINT64_C(31);        /* aligned vectors do not fault */
    if (below(8) == 0)
        c->in.gpr[pointers[below(8)]] = data + (below(4) << 12) - below(32);
    if (below(16) == 0)
        c->in.gpr[pointers[below(8)]] = N_RO - N_DATA + data + below(4096);
    c->in.gpr[14] = below(64);
    if (below(4))
        c->in.gpr[1] = below(32);                           /* RCX: counts */
    for (int i = 0; c->bits != 64 && i < 8; i++)
        c->in.gpr[i] &= 0xffffffff;
    c->in.flags = 0x202 | (rnd() & 0x8d5) | (below(4) ? 0 : 0x400);
    random_fpu(c->in.xsave);
    c->memory_seed = rnd() | 1;
}

/* Which segment the operand lies in, and so where its addresses begin. */
static uint64_t segment_base(const native_case *c, const ZydisEncoderRequest *r, const ZydisEncoderOperand *op)
{
    static const ZydisInstructionAttributes overrides[N_SEGMENTS] = {
        ZYDIS_ATTRIB_HAS_SEGMENT_ES, ZYDIS_ATTRIB_HAS_SEGMENT_CS, ZYDIS_ATTRIB_HAS_SEGMENT_SS,
        ZYDIS_ATTRIB_HAS_SEGMENT_DS, ZYDIS_ATTRIB_HAS_SEGMENT_FS, ZYDIS_ATTRIB_HAS_SEGMENT_GS,
    };
    ZydisRegister base = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, op->mem.base);
    unsigned segment = base == ZYDIS_REGISTER_RSP || base == ZYDIS_REGISTER_RBP ? N_SS : N_DS;
    for (unsigned i = 0; i < N_SEGMENTS; i++)
        if (r->prefixes & overrides[i])
            segment = i;
    return c->bits == 64 && segment < N_FS ? 0 : c->seg[segment].base;
}

/* One memory operand of the sequence, if its base is still as at the start, lies where accesses cross pages or fault. */
static void aim(sequence *s)
{
    static const uint64_t ends[] = { N_DATA, N_DATA + 0x1000, N_DATA + 0x2000, N_DATA + N_DATA_BYTES, N_RO, N_RO + 0x1000,
                                     N_CODE + N_CODE_BYTES };
    uint64_t target = ends[below(7)] + 8 - below(below(3) ? 72 : 16);
    for (unsigned i = below(s->count), tries = 0; tries < s->count; tries++, i = (i + 1) % s->count) {
        insn was = s->insns[i];
        for (unsigned k = 0; k < was.request.operand_count; k++) {
            ZydisEncoderOperand *op = &s->insns[i].request.operands[k];
            bool is_narrow = ZydisRegisterGetClass(op->mem.base) == ZYDIS_REGCLASS_GPR16;
            if (op->type != ZYDIS_OPERAND_TYPE_MEMORY || (!is_narrow && op->mem.index != ZYDIS_REGISTER_NONE) ||
                op->mem.base == ZYDIS_REGISTER_NONE || ZydisRegisterGetClass(op->mem.base) == ZYDIS_REGCLASS_IP)
                continue;
            uint64_t base = s->c.in.gpr[ZydisRegisterGetId(op->mem.base)];
            uint64_t index = op->mem.index ? s->c.in.gpr[ZydisRegisterGetId(op->mem.index)] : 0;
            op->mem.displacement = (int64_t)(target - segment_base(&s->c, &was.request, op) - base - index);
            if (is_narrow)
                op->mem.displacement = (int16_t)op->mem.displacement;
            if (op->mem.displacement != (int32_t)op->mem.displacement || !reencode(&s->insns[i]))
                s->insns[i] = was;
            return;
        }
    }
}

static void random_sequence(sequence *s)
{
    do {
        bool loops = below(4) == 0;
        unsigned mode = below(8);
        s->c.bits = mode < 4 ? 64 : mode < 7 ? 32 : 16;
        s->count = below(3) ? 1 + below(SEQUENCE) : 1;
        s->is_loop = false;
        for (unsigned i = 0; i < s->count; i++)
            while (!random_insn(&s->insns[i], s->c.bits) || (loops && s->insns[i].names_counter))
                ;
        random_state(&s->c);
        s->cut = below(8) ? 0 : 1 + below(64);
        if (below(3) == 0)
            aim(s);
        if (loops) {
            close_loop(s);
            s->c.in.gpr[s->c.bits == 64 ? 15 : 5] = 1 + below(below(8) ? 6 : 100);
        }
    } while (!assemble(s));
}

/* ---- the guest's side ---- */

/* The code's two pages exist many times; each case has the next ones, and after the last comes another machine: with each case's
 * end in another place the JIT looks through all blocks that it has. */
enum { CODE_SETS = 256, CODE_POOL = 0x1000000, PML4 = 0x10000, PDPT = 0x11000, PD = 0x12000,
       PT = 0x13000 /* two tables, for 0x200000 and 0x400000 */ };

typedef struct guest {
    vm_machine *m;
    vm_vcpu *cpu;
    uint64_t code;                      /* the case's pages */
    unsigned cases;
    uint64_t blocks;                    /* that the JIT has made, in all machines so far */
    vm_backend backend;
} guest;

static void put64(guest *g, uint64_t gpa, uint64_t v) { OK(vm_write(g->m, gpa, &v, 8)); }

/* Long mode, ring 3, page tables that show the window at its addresses and nothing else. */
static void guest_open(guest *g, vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    g->backend = o.backend = backend;
    o.mmu = backend == VM_BACKEND_KVM ? NULL : getenv("TEST_MMU");
    OK(vm_create(&o, &g->m));
    g->cpu = vm_vcpu_get(g->m, 0);
    OK(vm_map_ram(g->m, 0x10000, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_map_ram(g->m, CODE_POOL, CODE_SETS * N_CODE_BYTES, VM_PROT_RWX, NULL));
    OK(vm_map_ram(g->m, N_DATA, N_DATA_BYTES, VM_PROT_RWX, NULL));
    OK(vm_map_ram(g->m, N_RO, 0x1000, VM_PROT_RWX, NULL));
    put64(g, PML4, PDPT | 7);
    put64(g, PDPT, PD | 7);
    put64(g, PD + 8, PT | 7);
    put64(g, PD + 16, (PT + 0x1000) | 7);
    for (unsigned i = 0; i < 3; i++)
        put64(g, PT + 0x1000 + 8 * i, (N_DATA + i * 4096) | 7 | UINT64_C(1) << 63);
    put64(g, PT + 0x1000 + 8 * 4, N_RO | 5 | UINT64_C(1) << 63);
    OK(vm_vcpu_set_mode(g->cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_sregs(g->cpu, &s));
    s.cr3 = PML4;
    s.cr0 |= 0x80010021;                                    /* as Linux has it: WP, NE */
    s.efer |= 0x800;
    s.cr4 |= 0x10600;                                       /* ... FSGSBASE, OSFXSR, OSXMMEXCPT */
    OK(vm_vcpu_set_sregs(g->cpu, &s));
}

static void guest_close(guest *g)
{
    uint64_t blocks = 0;
    if (g->backend == VM_BACKEND_JIT)
        OK(vm_stats(g->m, "blocks", &blocks));
    g->blocks += blocks;
    vm_destroy(g->m);
}

/* The next code pages, for the guest too; KVM stays with the first. */
static void guest_turn_pages(guest *g)
{
    unsigned turn = g->backend == VM_BACKEND_KVM ? 0 : g->cases++ % CODE_SETS;
    if (g->cases > 1 && !turn) {
        guest_close(g);
        guest_open(g, g->backend);
    }
    g->code = CODE_POOL + turn * N_CODE_BYTES;
    for (unsigned i = 0; i < 2; i++)
        put64(g, PT + 8 * i, (g->code + i * 4096) | 5);
    if (turn)
        OK(vm_mmu_flush(g->cpu, N_CODE, N_CODE_BYTES));
}

static uint16_t full_tags(unsigned abridged)
{
    uint16_t tags = 0;
    for (unsigned i = 0; i < 8; i++)
        if (!(abridged >> i & 1))
            tags |= (uint16_t)(3u << 2 * i);
    return tags;
}

static void guest_segments(guest *g, const native_case *c)
{
    vm_sregs s = VM_SREGS_INIT;
    OK(vm_vcpu_get_sregs(g->cpu, &s));
    vm_segment *const to[N_SEGMENTS] = { &s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs };
    for (unsigned i = 0; i < N_SEGMENTS; i++) {
        const native_segment *from = &c->seg[i];
        *to[i] = (vm_segment){ .selector = native_selector(c, i), .base = from->base, .limit = from->limit, .attributes = from->attributes };
        if (c->bits == 64 && i < N_FS)
            *to[i] = (vm_segment){ .selector = native_selector(c, i), .limit = 0xffffffff, .attributes = i == N_CS ? 0xa0fb : DATA_FLAT };
    }
    OK(vm_vcpu_set_sregs(g->cpu, &s));
}

static void guest_load(guest *g, const native_case *c)
{
    static unsigned char data[N_DATA_BYTES], code[N_CODE_BYTES];
    vm_regs r = VM_REGS_INIT;
    vm_fpu f = VM_FPU_INIT;
    const unsigned char *x = c->in.xsave;
    guest_turn_pages(g);
    guest_segments(g, c);
    memcpy(&r.rax, c->in.gpr, 32);                          /* the struct has rax rcx rdx rbx rsp ... in the same order */
    memcpy(&r.rsp, c->in.gpr + 4, 96);
    r.rip = native_rip(c);
    r.rflags = c->in.flags;
    memcpy(&f.fcw, x, 2);
    memcpy(&f.fsw, x + 2, 2);
    memcpy(&f.mxcsr, x + 24, 4);
    f.ftw = full_tags(x[4]);
    for (unsigned i = 0; i < 8; i++)
        memcpy(f.st[i], x + 32 + 16 * i, 10);
    for (unsigned i = 0; i < 16; i++) {
        memcpy(f.ymm[i], x + 160 + 16 * i, 16);
        memcpy(f.ymm[i] + 16, x + 576 + 16 * i, 16);
    }
    OK(vm_vcpu_set_regs(g->cpu, &r));
    OK(vm_vcpu_set_fpu(g->cpu, &f));
    native_fill(data, sizeof data, c->memory_seed);
    OK(vm_write(g->m, N_DATA, data, sizeof data));
    native_code(code, c);                                   /* all of it: it can be read, too */
    OK(vm_write(g->m, g->code, code, sizeof code));
}

/* CMPS has two reads; which of them faults first is not said, and silicon is not consistent. */
static bool is_cmps(const native_case *c, uint64_t rip)
{
    uint64_t at = rip - native_rip(c);
    while (at < c->length && (memchr("\xf2\xf3\x66\x67\x26\x2e\x36\x3e\x64\x65", c->code[at], 10) ||
                              (c->bits == 64 && (c->code[at] & 0xf0) == 0x40)))
        at++;
    return at < c->length && (c->code[at] & 0xfe) == 0xa6;
}

static bool decode_at(const native_case *c, uint64_t rip, ZydisDecodedInstruction *d, ZydisDecodedOperand *ops)
{
    uint64_t at = rip - native_rip(c);
    return at < c->length && ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder_of(c->bits), c->code + at, c->length - at, d, ops));
}

/* Two faults of one class, whose order is not said: an operand of 16 bytes that is misaligned and beyond the limit of the stack's
 * segment, where silicon looks at alignment first; an x87 operand of ten bytes, which silicon takes in two pieces: on a page that is
 * not there and across the segment's end. */
static uint64_t order_exclusions;
static bool is_wide_operand(const native_case *c, uint64_t rip, int mine, int silicon)
{
    bool is_aligned = mine == 12 && silicon == 13, is_split = (mine == 12 || mine == 13) && silicon == 14;
    ZydisDecodedInstruction d;
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    bool is_wide = false;
    for (unsigned i = 0; (is_aligned || is_split) && decode_at(c, rip, &d, ops) && i < d.operand_count; i++)
        is_wide |= ops[i].type == ZYDIS_OPERAND_TYPE_MEMORY ? is_split ? ops[i].size == 80 : ops[i].size >= 128
                 : ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER && is_aligned &&
                   ZydisRegisterGetClass(ops[i].reg.value) == ZYDIS_REGCLASS_XMM;
    order_exclusions += is_wide;
    return is_wide;
}

/* PUSHA and POPA over the end of their segment or page: silicon has moved some words by then. */
static uint64_t pusha_exclusions;
static bool is_pusha(const native_case *c, uint64_t rip)
{
    ZydisDecodedInstruction d;
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    bool is_it = decode_at(c, rip, &d, ops) && (d.mnemonic == ZYDIS_MNEMONIC_PUSHA || d.mnemonic == ZYDIS_MNEMONIC_PUSHAD ||
                                                 d.mnemonic == ZYDIS_MNEMONIC_POPA || d.mnemonic == ZYDIS_MNEMONIC_POPAD);
    pusha_exclusions += is_it;
    return is_it;
}

static bool is_dot_product(const native_case *c, uint64_t rip)
{
    const unsigned char *p = c->code + (rip - native_rip(c));
    while (memchr("\x66\x67\x26\x2e\x36\x3e\x64\x65", *p, 8) || (*p & 0xf0) == 0x40)
        p++;
    if (p[0] == 0xc4)
        return (p[1] & 31) == 3 && (p[3] & 0xfe) == 0x40;
    return p[0] == 0x0f && p[1] == 0x3a && (p[2] & 0xfe) == 0x40;
}

/* Two things of an unmasked exception's MXCSR the library, which runs the instruction masked, does not see: underflow and
 * overflow leave PE clear when the result is exact but for its exponent; and DPPS and DPPD raise what their products raise
 * before they look at the sums. */
static uint64_t mxcsr_exclusions;
static bool is_known_mxcsr(const sequence *s, uint64_t rip, uint32_t mine, uint32_t silicon)
{
    uint32_t unmasked = silicon & ~(silicon >> 7) & 0x3f;
    bool is_known = (unmasked & 0x18 && mine == (silicon | 0x20)) ||
                    (unmasked && !((mine ^ silicon) & ~0x3fu) && is_dot_product(&s->c, rip));
    mxcsr_exclusions += is_known;
    return is_known;
}

/* For the same reason an exact tiny product inside a dot product is not seen when underflow is unmasked (`diff/simd` says so too). */
static bool is_hidden_underflow(const sequence *s, const native_result *n, int vector)
{
    enum { UE = 0x10, UM = 0x800 };
    uint32_t mxcsr;
    memcpy(&mxcsr, n->out.xsave + 24, 4);
    bool is_it = vector == -1 && n->vector == 19 && mxcsr & UE && !(mxcsr & UM) && is_dot_product(&s->c, n->out.rip);
    mxcsr_exclusions += is_it;
    return is_it;
}

/* What the child has mapped and the guest has not: a page of its own, and under AddressSanitizer the shadow of all memory. */
static bool is_of_child(uint64_t address)
{
#ifdef __SANITIZE_ADDRESS__
    size_t scale, shadow;
    __asan_get_shadow_mapping(&scale, &shadow);
    if (address - shadow < UINT64_C(1) << (47 - scale))
        return true;
#endif
    return address >> 12 == N_CONTEXT >> 12;
}

/* Returns what differs, or NULL. */
static const char *compare(guest *g, const sequence *s, const native_result *n, const vm_exit *e)
{
    static char text[200];
    static unsigned char data[N_DATA_BYTES];
    static const char *const names[] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                         "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
    vm_regs r = VM_REGS_INIT;
    vm_fpu f = VM_FPU_INIT;
    uint64_t gpr[16];
    const unsigned char *x = n->out.xsave;
    int vector = e->reason == VM_EXIT_UNTIL ? -1 : e->reason == VM_EXIT_EXCEPTION ? e->exception.vector : 1000 + (int)e->reason;
    OK(vm_vcpu_get_regs(g->cpu, &r));
    OK(vm_vcpu_get_fpu(g->cpu, &f));
    memcpy(gpr, &r.rax, 128);
#define DIFFERS(...) return snprintf(text, sizeof text, __VA_ARGS__), text
    if (vector == 14 && is_of_child(e->exception.address))
        return NULL;
    uint32_t silicon_mxcsr;
    memcpy(&silicon_mxcsr, x + 24, 4);
    if (silicon_mxcsr >> 16)
        return NULL;                                        /* LDMXCSR of an AMD bit (MM) that the guest's CPU has not got */
    bool is_either = is_cmps(&s->c, n->out.rip) && vector >= 12 && vector <= 14 && n->vector >= 12 && n->vector <= 14;
    if (vector != n->vector && (is_either || is_hidden_underflow(s, n, vector) || is_wide_operand(&s->c, n->out.rip, vector, n->vector)))
        return NULL;
    if (vector != n->vector)
        DIFFERS("vector %d (exit %s), native %d", vector, vm_exit_name((int)e->reason), n->vector);
    /* In the upper half, and in the last page of the lower, the host's kernel has pages, the guest has none. */
    unsigned compared = n->address >> 12 >= UINT64_C(0x7ffffffff) ? 0x1e : 0x1f;
    if (vector == 14 && !is_cmps(&s->c, n->out.rip) &&
        (e->exception.address != n->address || ((e->exception.error ^ n->error) & compared)))
        DIFFERS("#PF %#x at %#" PRIx64 ", native %#x at %#" PRIx64, e->exception.error, e->exception.address, n->error, n->address);
    if (vector != 14 && vector >= 8 && vector < 16 && e->exception.error != n->error)
        DIFFERS("error code %#x, native %#x", e->exception.error, n->error);
    if (r.rip != n->out.rip)
        DIFFERS("rip %#" PRIx64 ", native %#" PRIx64, r.rip, n->out.rip);
    if (vector >= 0 && is_pusha(&s->c, r.rip))
        return NULL;
    uint64_t bits = s->c.bits == 64 ? UINT64_MAX : UINT32_MAX;          /* what else the others have, no code can see */
    for (int i = 0; i < (s->c.bits == 64 ? 16 : 8); i++)
        if ((gpr[i] ^ n->out.gpr[i]) & bits)
            DIFFERS("%s %#" PRIx64 ", native %#" PRIx64, names[i], gpr[i], n->out.gpr[i]);
    uint64_t flags = (r.rflags ^ n->out.flags) & 0xcd5 & ~(uint64_t)(vector < 0 ? s->undefined : s->ever_undefined);
    if (flags)
        DIFFERS("flags %#" PRIx64 ", native %#" PRIx64 " (differ in %#" PRIx64 ")", r.rflags & 0xcd5, n->out.flags & 0xcd5, flags);
    for (unsigned i = 0; i < 16; i++) {
        if (memcmp(f.ymm[i], x + 160 + 16 * i, 16))
            DIFFERS("xmm%u", i);
        bool is_avx_there = x[512] & 4;                     /* else the upper halves are zero */
        static const unsigned char zero[16];
        if (memcmp(f.ymm[i] + 16, is_avx_there ? x + 576 + 16 * i : zero, 16))
            DIFFERS("ymm%u, upper half", i);
    }
    uint32_t mxcsr;
    memcpy(&mxcsr, x + 24, 4);
    if (f.mxcsr != mxcsr && !(vector == 19 && is_known_mxcsr(s, r.rip, f.mxcsr, mxcsr)))
        DIFFERS("mxcsr %#x, native %#x", f.mxcsr, mxcsr);
    if (x[512] & 1) {
        uint16_t fcw, fsw, empty = full_tags(x[4]), mine = 0;
        memcpy(&fcw, x, 2);
        memcpy(&fsw, x + 2, 2);
        for (unsigned i = 0; i < 16; i += 2)
            mine |= (uint16_t)((f.ftw >> i & 3) == 3 ? 3 << i : 0);
        if (f.fcw != fcw || f.fsw != fsw || mine != empty)
            DIFFERS("x87 fcw %#x fsw %#x empty %#x, native %#x %#x %#x", f.fcw, f.fsw, mine, fcw, fsw, empty);
        for (unsigned i = 0; i < 8; i++)
            if (memcmp(f.st[i], x + 32 + 16 * i, 10))
                DIFFERS("st%u", i);
    }
    OK(vm_read(g->m, N_DATA, data, sizeof data));
    for (unsigned i = 0; memcmp(data, n->data, sizeof data) && i < sizeof data; i++)
        if (data[i] != n->data[i])
            DIFFERS("memory %#" PRIx64 " is %#x, native %#x", N_DATA + i, data[i], n->data[i]);
    return NULL;
}

static const char *run_guest(guest *g, const sequence *s, const native_result *n)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    guest_load(g, &s->c);
    o.has_until = true;
    o.until = native_rip(&s->c) + s->c.length;
    o.exception_exits = 0xffffffff;
    o.deadline_ns = TEST_SECONDS(2);
    OK(vm_vcpu_run(g->cpu, &o, &e));
    return compare(g, s, n, &e);
}

/* ---- the whole ---- */

static void show(const sequence *s, const char *what, uint64_t number)
{
    ZydisFormatter formatter;
    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    printf("# case %" PRIu64 ", %u-bit: %s\n", number, s->c.bits, what);
    for (unsigned i = 0, at = 0; i < s->count; at += s->insns[i++].length) {
        ZydisDecodedInstruction d;
        ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
        char text[200] = "?";
        uint64_t rip = native_rip(&s->c) + at;
        if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder_of(s->c.bits), s->c.code + at, s->insns[i].length, &d, ops)))
            ZydisFormatterFormatInstruction(&formatter, &d, ops, d.operand_count_visible, text, sizeof text, rip, NULL);
        printf("#   %#" PRIx64 "  %-40s ", rip, text);
        for (unsigned k = 0; k < s->insns[i].length; k++)
            printf("%02x ", s->c.code[at + k]);
        printf("\n");
    }
    printf("#   flags %#" PRIx64 " memory seed %#" PRIx64 " gpr", s->c.in.flags, s->c.memory_seed);
    for (int i = 0; i < 16; i++)
        printf(" %" PRIx64, s->c.in.gpr[i]);
    for (unsigned i = 0; i < N_SEGMENTS; i++)
        printf("%s %x:%x:%x", i ? "" : "\n#   es cs ss ds fs gs", s->c.seg[i].base, s->c.seg[i].limit, s->c.seg[i].attributes);
    printf("\n#   xsave");
    for (unsigned i = 0; i < sizeof s->c.in.xsave; i += i == 408 ? 104 : 8) {
        uint64_t v;
        memcpy(&v, s->c.in.xsave + i, 8);
        printf(" %" PRIx64, v);
    }
    printf("\n");
    fflush(stdout);
}

/* Leaves out one instruction after the other as long as the rest still differs. */
static const char *shrink(sequence *s, guest *g, native_batch *b, const char *what)
{
    static char kept[200];
    snprintf(kept, sizeof kept, "%s", what);
    for (unsigned i = 0; i + 2 * s->is_loop < s->count && s->count > 1;) {
        sequence t = *s;
        leave_out(&t, i);
        const char *now = NULL;
        if (assemble(&t)) {
            b->cases[0] = t.c;
            b->count = 1;
            native_run(b);
            now = b->results[0].is_done ? run_guest(g, &t, &b->results[0]) : NULL;
        }
        if (now) {
            snprintf(kept, sizeof kept, "%s", now);
            *s = t;
        } else {
            i++;
        }
    }
    return kept;
}

static void random_sequences(vm_backend backend)
{
    static sequence made[NATIVE_BATCH];
    guest g = { 0 };
    uint64_t cases = getenv("CASES") ? strtoull(getenv("CASES"), NULL, 0) : backend == VM_BACKEND_INTERP ? 100000 : 12000;
    uint64_t lost = 0, bad = 0;
    state = getenv("SEED") ? strtoull(getenv("SEED"), NULL, 0) * 2 + 1 : UINT64_C(0x9e3779b97f4a7c15);
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2"))
        test_skip("the host CPU has no AVX2");
    native_batch *b = native_open();
    if (!b)
        test_skip("the window at %#" PRIx64 " cannot be mapped in this process", N_CODE);
    ZydisDecoderInit(&decoders[0], ZYDIS_MACHINE_MODE_LONG_COMPAT_16, ZYDIS_STACK_WIDTH_16);
    ZydisDecoderInit(&decoders[1], ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
    ZydisDecoderInit(&decoders[2], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    guest_open(&g, backend);
    vm_sregs sregs = VM_SREGS_INIT;
    OK(vm_vcpu_get_sregs(g.cpu, &sregs));
    if (!(sregs.xcr0 & 4))
        test_skip("backend %s has no AVX on this host", vm_backend_name(backend));
    for (uint64_t done = 0; done < cases && bad < 10; done += NATIVE_BATCH) {
        b->count = NATIVE_BATCH;
        for (unsigned i = 0; i < NATIVE_BATCH; i++) {
            random_sequence(&made[i]);
            b->cases[i] = made[i].c;
        }
        native_run(b);
        for (unsigned i = 0; i < NATIVE_BATCH; i++) {
            if (!b->results[i].is_done) {
                lost++;
                continue;
            }
            const char *what = run_guest(&g, &made[i], &b->results[i]);
            if (!what)
                continue;
            static native_result keep[NATIVE_BATCH];
            memcpy(keep, b->results, sizeof keep);
            show(&made[i], shrink(&made[i], &g, b, what), done + i);
            memcpy(b->results, keep, sizeof keep);
            bad++;
        }
    }
    native_close();
    guest_close(&g);
    printf("    %" PRIu64 " cases, %" PRIu64 " lost, %" PRIu64 " blocks, %" PRIu64 " left out by is_known_mxcsr(), %" PRIu64 " by is_wide_operand(), %" PRIu64
           " by is_pusha()\n", cases, lost, g.blocks, mxcsr_exclusions, order_exclusions, pusha_exclusions);
    CHECK(bad || backend != VM_BACKEND_JIT || g.blocks > cases / 2);   /* it was the JIT that ran them */
    CHECK(lost * 50 <= cases);
    if (bad)
        FAIL("%" PRIu64 " sequences differ from the host CPU%s", bad, bad >= 10 ? ", and then it stopped" : "");
}

static void each(const void *arg) { random_sequences(*(const vm_backend *)arg); }
SETUP(each) { add_for_backends("random_sequences", each, getenv("CASES") ? 100000 : 180); }
