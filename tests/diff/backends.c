/* backends.c - random sequences of unprivileged instructions: the host CPU against every backend, through the public interface.
 *
 * A case is one to eight random instructions (random encodings that Zydis accepts, made anew with Zydis' encoder around
 * registers that point into a small window of memory), random registers, flags, vector and x87 state. Some are repeated, with
 * R15 as the counter; in some, one memory operand is aimed at the end of a page, at what may not be written or at nothing.
 * It runs natively in a guarded child (native.c) and then on each backend in ring 3 under page tables that show the same window,
 * with code pages that change from case to case: a page that is written all the time is no longer translated. Compared:
 * general registers, RIP, flags (but those the manuals leave undefined), x87, MXCSR, YMM, memory, and faults with vector,
 * error code and address. A mismatch is shrunk to as few instructions as still show it and printed with all inputs.
 *
 * CASES and SEED in the environment choose how many and which; `make diff CASES=N SEED=S`. Other columns: TEST_BACKEND, TEST_MMU.
 */
#include "native.h"

#include <Zydis/Zydis.h>
#include "../backends.h"

enum { SEQUENCE = 8 };

typedef struct insn {
    ZydisEncoderRequest request;
    unsigned char bytes[16];
    unsigned length;
    bool is_branch;
    int skip;                           /* branches: how many of the next instructions to jump over; less than 0: back */
} insn;

typedef struct sequence {
    insn insns[SEQUENCE + 2];
    unsigned count;
    bool is_loop;                       /* the last two instructions count and jump to the first */
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
        ZYDIS_MNEMONIC_MONITOR, ZYDIS_MNEMONIC_MWAIT, ZYDIS_MNEMONIC_PTWRITE, ZYDIS_MNEMONIC_SALC, ZYDIS_MNEMONIC_ENTER,
        ZYDIS_MNEMONIC_CLFLUSHOPT, ZYDIS_MNEMONIC_CLWB, ZYDIS_MNEMONIC_XLAT, ZYDIS_MNEMONIC_PUSHF, ZYDIS_MNEMONIC_PUSHFD,
        ZYDIS_MNEMONIC_PUSHFQ, ZYDIS_MNEMONIC_RSM, ZYDIS_MNEMONIC_CLZERO, ZYDIS_MNEMONIC_RDPRU,
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
    if (!is_known || d->attributes & (ZYDIS_ATTRIB_IS_PRIVILEGED | ZYDIS_ATTRIB_HAS_SEGMENT) ||
        d->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
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
        if (ops[i].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(ops[i].reg.value) == ZYDIS_REGCLASS_SEGMENT)
            return true;
    return false;
}

/* Random bytes that tend to be an instruction. */
static void random_encoding(unsigned char *b)
{
    unsigned n = 0, map = below(16);
    for (unsigned i = 0; i < 16; i++)
        b[i] = (unsigned char)rnd();
    if (below(6) == 0)
        b[n++] = 0x66;
    if (below(6) == 0)
        b[n++] = below(2) ? 0xf2 : 0xf3;
    if (below(20) == 0)
        b[n++] = 0xf0;
    if (map >= 12) {                                        /* VEX */
        b[0] = 0xc4;
        b[1] = (unsigned char)((rnd() & 0xe0) | (1 + below(3)));
        b[2] = (unsigned char)rnd();
        return;
    }
    if (below(2))
        b[n++] = (unsigned char)(0x40 | below(16));
    if (map >= 5)
        b[n++] = 0x0f;
    if (map >= 10)
        b[n++] = map == 10 ? 0x38 : 0x3a;
}

/* Registers that point into the window at the start, and so make good bases. */
static const ZydisRegister bases[] = { ZYDIS_REGISTER_RBX, ZYDIS_REGISTER_RBP, ZYDIS_REGISTER_RSI, ZYDIS_REGISTER_RDI,
                                       ZYDIS_REGISTER_R12, ZYDIS_REGISTER_R13, ZYDIS_REGISTER_RSP, ZYDIS_REGISTER_R10 };

static void random_memory(ZydisEncoderOperand *op)
{
    op->mem.base = bases[below(8)];
    op->mem.index = ZYDIS_REGISTER_NONE;
    op->mem.scale = 0;
    op->mem.displacement = (int64_t)below(3) == 0 ? 0 : (int64_t)below(512) - 256;
    if (below(4) == 0) {
        op->mem.index = below(2) ? ZYDIS_REGISTER_R14 : ZYDIS_REGISTER_RCX;  /* small numbers at the start */
        op->mem.scale = (ZyanU8)(1u << below(4));
    }
    if (below(12) == 0) {
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

static bool random_insn(insn *x, const ZydisDecoder *decoder)
{
    unsigned char b[16];
    ZydisDecodedInstruction d;
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    random_encoding(b);
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
            random_memory(op);
        if (x->is_branch && op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
            op->imm.s = 0;
    }
    x->skip = (int)below(3);
    if (!reencode(x))
        return false;
    /* What the encoder made must itself be permitted, and branches must be short ones that can be aimed. */
    return ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, x->bytes, x->length, &d, ops)) && !is_left_out(&d, ops) &&
           (!x->is_branch || (d.raw.imm[0].is_relative && d.raw.imm[0].size == 8));
}

/* ---- undefined flags (Zydis' tables) ---- */

static bool may_leave_flags(const ZydisDecodedInstruction *d)
{
    return d->meta.category == ZYDIS_CATEGORY_SHIFT || d->meta.category == ZYDIS_CATEGORY_ROTATE ||
           d->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

/* Follows undefined flags through the sequence; false: an instruction reads one. */
static bool follow_flags(sequence *s, const ZydisDecoder *decoder)
{
    bool has_branched = false;
    for (unsigned i = 0; i < s->count; i++) {
        ZydisDecodedInstruction d;
        if (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(decoder, NULL, s->insns[i].bytes, s->insns[i].length, &d)))
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
static bool assemble(sequence *s, const ZydisDecoder *decoder)
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
    if (!follow_flags(s, decoder))
        return false;
    if (s->is_loop) {
        uint32_t at_end = s->undefined;
        s->undefined &= ZYDIS_CPUFLAG_CF;                   /* DEC defines the others */
        if (!follow_flags(s, decoder))
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

/* DEC R15 and JNZ to the first instruction. */
static void close_loop(sequence *s)
{
    insn *dec = &s->insns[s->count], *jnz = dec + 1;
    *dec = (insn){ .bytes = { 0x49, 0xff, 0xcf }, .length = 3 };
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

static bool names_counter(const insn *x)
{
    for (unsigned i = 0; i < x->request.operand_count; i++) {
        const ZydisEncoderOperand *op = &x->request.operands[i];
        ZydisRegister regs[] = { op->type == ZYDIS_OPERAND_TYPE_REGISTER ? op->reg.value : ZYDIS_REGISTER_NONE,
                                 op->mem.base, op->mem.index };
        for (unsigned k = 0; k < 3; k++)
            if (ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, regs[k]) == ZYDIS_REGISTER_R15)
                return true;
    }
    return false;
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

static void random_state(native_case *c)
{
    memset(&c->in, 0, sizeof c->in);
    for (int i = 0; i < 16; i++)
        c->in.gpr[i] = interesting();
    static const int pointers[] = { 3, 5, 6, 7, 12, 13, 4, 10 };
    for (int i = 0; i < 8; i++)
        c->in.gpr[pointers[i]] = N_DATA + 0x200 + below(N_DATA_BYTES - 0x400);
    if (below(3))
        for (int i = 0; i < 8; i++)
            c->in.gpr[pointers[i]] &= ~UINT64_C(31);        /* aligned vectors do not fault */
    if (below(8) == 0)
        c->in.gpr[pointers[below(8)]] = N_DATA + (below(4) << 12) - below(32);
    if (below(16) == 0)
        c->in.gpr[pointers[below(8)]] = N_RO + below(4096);
    c->in.gpr[14] = below(64);
    if (below(4))
        c->in.gpr[1] = below(32);                           /* RCX: counts */
    c->in.flags = 0x202 | (rnd() & 0x8d5) | (below(4) ? 0 : 0x400);
    random_fpu(c->in.xsave);
    c->memory_seed = rnd() | 1;
    c->bits = 64;
    c->start = below(4) ? 0x100 : 0x1000 - below(24);       /* across the page end */
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
            unsigned base = (unsigned)(op->mem.base - ZYDIS_REGISTER_RAX);
            if (op->type != ZYDIS_OPERAND_TYPE_MEMORY || op->mem.index != ZYDIS_REGISTER_NONE || base >= 16)
                continue;
            op->mem.displacement = (int64_t)(target - s->c.in.gpr[base]);
            if (op->mem.displacement != (int32_t)op->mem.displacement || !reencode(&s->insns[i]))
                s->insns[i] = was;
            return;
        }
    }
}

static void random_sequence(sequence *s, const ZydisDecoder *decoder)
{
    do {
        bool loops = below(4) == 0;
        s->count = below(3) ? 1 + below(SEQUENCE) : 1;
        s->is_loop = false;
        for (unsigned i = 0; i < s->count; i++)
            while (!random_insn(&s->insns[i], decoder) || (loops && names_counter(&s->insns[i])))
                ;
        random_state(&s->c);
        if (below(3) == 0)
            aim(s);
        if (loops) {
            close_loop(s);
            s->c.in.gpr[15] = 1 + below(below(8) ? 6 : 100);
        }
    } while (!assemble(s, decoder));
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
    s.cs = (vm_segment){ .selector = 0x33, .limit = 0xffffffff, .attributes = 0xa0fb };
    s.ss = s.ds = s.es = (vm_segment){ .selector = 0x2b, .limit = 0xffffffff, .attributes = 0xc0f3 };
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

static void guest_load(guest *g, const native_case *c)
{
    static unsigned char data[N_DATA_BYTES], code[N_CODE_BYTES];
    vm_regs r = VM_REGS_INIT;
    vm_fpu f = VM_FPU_INIT;
    const unsigned char *x = c->in.xsave;
    guest_turn_pages(g);
    memcpy(&r.rax, c->in.gpr, 32);                          /* the struct has rax rcx rdx rbx rsp ... in the same order */
    memcpy(&r.rsp, c->in.gpr + 4, 96);
    r.rip = N_CODE + c->start;
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
    uint64_t at = rip - N_CODE - c->start;
    while (at < c->length && (c->code[at] == 0xf2 || c->code[at] == 0xf3 || c->code[at] == 0x66 || c->code[at] == 0x67 ||
                              (c->code[at] & 0xf0) == 0x40))
        at++;
    return at < c->length && (c->code[at] & 0xfe) == 0xa6;
}

static bool is_dot_product(const native_case *c, uint64_t rip)
{
    const unsigned char *p = c->code + (rip - N_CODE - c->start);
    if (p[0] == 0xc4)
        return (p[1] & 31) == 3 && (p[3] & 0xfe) == 0x40;
    while (*p == 0x66 || (*p & 0xf0) == 0x40)
        p++;
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
    if (vector == 14 && e->exception.address >> 12 == N_CONTEXT >> 12)
        return NULL;                                        /* the child's own page, which the guest has not got */
    uint32_t silicon_mxcsr;
    memcpy(&silicon_mxcsr, x + 24, 4);
    if (silicon_mxcsr >> 16)
        return NULL;                                        /* LDMXCSR of an AMD bit (MM) that the guest's CPU has not got */
    bool is_either = is_cmps(&s->c, n->out.rip) && vector >= 12 && vector <= 14 && n->vector >= 12 && n->vector <= 14;
    if (is_either && vector != n->vector)
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
    for (int i = 0; i < 16; i++)
        if (gpr[i] != n->out.gpr[i])
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
    for (unsigned i = 0; i < sizeof data; i++)
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
    o.until = N_CODE + s->c.start + s->c.length;
    o.exception_exits = 0xffffffff;
    o.deadline_ns = 2000000000;
    OK(vm_vcpu_run(g->cpu, &o, &e));
    return compare(g, s, n, &e);
}

/* ---- the whole ---- */

static void show(const sequence *s, const char *what, const ZydisDecoder *decoder, uint64_t number)
{
    ZydisFormatter formatter;
    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    printf("# case %" PRIu64 ": %s\n", number, what);
    for (unsigned i = 0, at = 0; i < s->count; at += s->insns[i++].length) {
        ZydisDecodedInstruction d;
        ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
        char text[200] = "?";
        uint64_t rip = N_CODE + s->c.start + at;
        if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, s->c.code + at, s->insns[i].length, &d, ops)))
            ZydisFormatterFormatInstruction(&formatter, &d, ops, d.operand_count_visible, text, sizeof text, rip, NULL);
        printf("#   %#" PRIx64 "  %-40s ", rip, text);
        for (unsigned k = 0; k < s->insns[i].length; k++)
            printf("%02x ", s->c.code[at + k]);
        printf("\n");
    }
    printf("#   flags %#" PRIx64 " memory seed %#" PRIx64 " gpr", s->c.in.flags, s->c.memory_seed);
    for (int i = 0; i < 16; i++)
        printf(" %" PRIx64, s->c.in.gpr[i]);
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
static const char *shrink(sequence *s, guest *g, native_batch *b, const ZydisDecoder *decoder, const char *what)
{
    static char kept[200];
    snprintf(kept, sizeof kept, "%s", what);
    for (unsigned i = 0; i + 2 * s->is_loop < s->count && s->count > 1;) {
        sequence t = *s;
        leave_out(&t, i);
        const char *now = NULL;
        if (assemble(&t, decoder)) {
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
    ZydisDecoder decoder;
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
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    guest_open(&g, backend);
    vm_sregs sregs = VM_SREGS_INIT;
    OK(vm_vcpu_get_sregs(g.cpu, &sregs));
    if (!(sregs.xcr0 & 4))
        test_skip("backend %s has no AVX on this host", vm_backend_name(backend));
    for (uint64_t done = 0; done < cases && bad < 10; done += NATIVE_BATCH) {
        b->count = NATIVE_BATCH;
        for (unsigned i = 0; i < NATIVE_BATCH; i++) {
            random_sequence(&made[i], &decoder);
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
            show(&made[i], shrink(&made[i], &g, b, &decoder, what), &decoder, done + i);
            memcpy(b->results, keep, sizeof keep);
            bad++;
        }
    }
    native_close();
    guest_close(&g);
    printf("    %" PRIu64 " cases, %" PRIu64 " lost, %" PRIu64 " blocks, %" PRIu64 " left out by is_known_mxcsr()\n", cases, lost, g.blocks,
           mxcsr_exclusions);
    CHECK(bad || backend != VM_BACKEND_JIT || g.blocks > cases / 2);   /* it was the JIT that ran them */
    CHECK(lost * 50 <= cases);
    if (bad)
        FAIL("%" PRIu64 " sequences differ from the host CPU%s", bad, bad >= 10 ? ", and then it stopped" : "");
}

static void each(const void *arg) { random_sequences(*(const vm_backend *)arg); }
SETUP(each) { add_for_backends("random_sequences", each, getenv("CASES") ? 100000 : 180); }
