/* lift.c - guest instructions to IR.
 *
 * Each instruction falls into a class (the table below). GPR classes run natively with their operands renamed; memory
 * operands become EA, CHECK, ACCESS; stack and branch instructions are taken apart; whatever is left calls its semantic
 * function (FALLBACK). A class only says what may be native: operand forms that 64-bit host code cannot spell, or that
 * need checks this file does not make, fall back one by one in native_form().
 */
#include <Zydis/Zydis.h>
#include "jit/jit.h"
#include "x86/cover.h"
#include "x86/ops.h"
#include "x86/native.h"

enum insn_class {
    C_FALLBACK,
    C_MOVE /* memory destination is only written */,
    C_ALU /* read-modify-write */,
    C_TEST /* reads only */,
    C_LEA,
    C_NOP,
    C_PUSH,
    C_POP,
    C_CALL,
    C_RET,
    C_JMP,
    C_JCC,
    C_LEAVE,
    C_DIV,
    C_PUSHF,
    C_SYSTEM /* CLI, SWAPGS, MOV from a segment register: little enough to be done inline */
};

#define M(name, class) [ZYDIS_MNEMONIC_##name] = class
static const uint8_t classes[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
    M(MOV, C_MOVE),       M(MOVZX, C_MOVE),     M(MOVSX, C_MOVE),      M(MOVSXD, C_MOVE),   M(MOVBE, C_MOVE),
    M(LEA, C_LEA),        M(ADD, C_ALU),        M(ADC, C_ALU),         M(SUB, C_ALU),       M(SBB, C_ALU),
    M(AND, C_ALU),        M(OR, C_ALU),         M(XOR, C_ALU),         M(CMP, C_TEST),      M(TEST, C_TEST),
    M(INC, C_ALU),        M(DEC, C_ALU),        M(NEG, C_ALU),         M(NOT, C_ALU),       M(SHL, C_ALU),
    M(SHR, C_ALU),        M(SAR, C_ALU),        M(ROL, C_ALU),         M(ROR, C_ALU),       M(RCL, C_ALU),
    M(RCR, C_ALU),        M(SHLD, C_ALU),       M(SHRD, C_ALU),        M(IMUL, C_TEST),     M(MUL, C_TEST),
    M(DIV, C_DIV),        M(IDIV, C_DIV),       M(BT, C_TEST),         M(BTS, C_ALU),       M(BTR, C_ALU),
    M(BTC, C_ALU),        M(BSF, C_TEST),       M(BSR, C_TEST),        M(TZCNT, C_TEST),    M(LZCNT, C_TEST),
    M(POPCNT, C_TEST),    M(CRC32, C_TEST),     M(BSWAP, C_ALU),       M(XCHG, C_ALU),      M(XADD, C_ALU),
    M(CMPXCHG, C_ALU),    M(CMPXCHG8B, C_ALU),  M(CMPXCHG16B, C_ALU),  M(CBW, C_TEST),      M(CWDE, C_TEST),
    M(CDQE, C_TEST),      M(CWD, C_TEST),       M(CDQ, C_TEST),        M(CQO, C_TEST),      M(LAHF, C_TEST),
    M(SAHF, C_TEST),      M(CLC, C_TEST),       M(STC, C_TEST),        M(CMC, C_TEST),      M(ANDN, C_TEST),
    M(BEXTR, C_TEST),     M(BLSI, C_TEST),      M(BLSMSK, C_TEST),     M(BLSR, C_TEST),     M(BZHI, C_TEST),
    M(MULX, C_TEST),      M(PDEP, C_TEST),      M(PEXT, C_TEST),       M(RORX, C_TEST),     M(SARX, C_TEST),
    M(SHLX, C_TEST),      M(SHRX, C_TEST),      M(ADCX, C_TEST),       M(ADOX, C_TEST),     M(CMOVB, C_TEST),
    M(CMOVBE, C_TEST),    M(CMOVL, C_TEST),     M(CMOVLE, C_TEST),     M(CMOVNB, C_TEST),   M(CMOVNBE, C_TEST),
    M(CMOVNL, C_TEST),    M(CMOVNLE, C_TEST),   M(CMOVNO, C_TEST),     M(CMOVNP, C_TEST),   M(CMOVNS, C_TEST),
    M(CMOVNZ, C_TEST),    M(CMOVO, C_TEST),     M(CMOVP, C_TEST),      M(CMOVS, C_TEST),    M(CMOVZ, C_TEST),
    M(SETB, C_MOVE),      M(SETBE, C_MOVE),     M(SETL, C_MOVE),       M(SETLE, C_MOVE),    M(SETNB, C_MOVE),
    M(SETNBE, C_MOVE),    M(SETNL, C_MOVE),     M(SETNLE, C_MOVE),     M(SETNO, C_MOVE),    M(SETNP, C_MOVE),
    M(SETNS, C_MOVE),     M(SETNZ, C_MOVE),     M(SETO, C_MOVE),       M(SETP, C_MOVE),     M(SETS, C_MOVE),
    M(SETZ, C_MOVE),      M(NOP, C_NOP),        M(ENDBR32, C_NOP),     M(ENDBR64, C_NOP),   M(PREFETCHT0, C_NOP),
    M(PREFETCHT1, C_NOP), M(PREFETCHT2, C_NOP), M(PREFETCHNTA, C_NOP), M(PREFETCHW, C_NOP), M(PAUSE, C_NOP),
    M(LFENCE, C_NOP),     M(MFENCE, C_TEST),    M(SFENCE, C_NOP),      M(PUSH, C_PUSH),     M(POP, C_POP),
    M(CALL, C_CALL),      M(RET, C_RET),        M(LEAVE, C_LEAVE),     M(JMP, C_JMP),       M(JB, C_JCC),
    M(JBE, C_JCC),        M(JL, C_JCC),         M(JLE, C_JCC),         M(JNB, C_JCC),       M(JNBE, C_JCC),
    M(JNL, C_JCC),        M(JNLE, C_JCC),       M(JNO, C_JCC),         M(JNP, C_JCC),       M(JNS, C_JCC),
    M(JNZ, C_JCC),        M(JO, C_JCC),         M(JP, C_JCC),          M(JS, C_JCC),        M(JZ, C_JCC),
    M(JECXZ, C_JCC),      M(JRCXZ, C_JCC),      M(LOOP, C_JCC),        M(CLI, C_SYSTEM),    M(PUSHFQ, C_PUSHF),
};
#undef M

/* Vector instructions that must not run natively although they only touch their operands: conditional or implicit
 * memory. */
static bool is_odd_vector(uint16_t m)
{
    switch (m) {
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ:
    case ZYDIS_MNEMONIC_VGATHERDPD:
    case ZYDIS_MNEMONIC_VGATHERDPS:
    case ZYDIS_MNEMONIC_VGATHERQPD:
    case ZYDIS_MNEMONIC_VGATHERQPS:
    case ZYDIS_MNEMONIC_VPGATHERDD:
    case ZYDIS_MNEMONIC_VPGATHERDQ:
    case ZYDIS_MNEMONIC_VPGATHERQD:
    case ZYDIS_MNEMONIC_VPGATHERQQ:
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_STMXCSR:
    case ZYDIS_MNEMONIC_VLDMXCSR:
    case ZYDIS_MNEMONIC_VSTMXCSR: return true;
    default: return false;
    }
}

static unsigned memory_size(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_MEM || in->op[i].kind == X86_OP_MOFFS) return in->op[i].size;
    return 0;
}

static bool is_x87_store(const x86_insn *in);

unsigned jit_insn_access(const x86_insn *in)
{
    if (!(in->flags & X86_IF_MEM)) return 0;
    bool first = in->op[0].kind == X86_OP_MEM || in->op[0].kind == X86_OP_MOFFS;
    if (jit_insn_is_x87(in))
        return is_x87_store(in) ? X86_READ | X86_WRITE : X86_READ; /* a store may pop: it must not be made twice */
    if (in->flags & X86_IF_VEC) return first ? X86_WRITE : X86_READ;
    switch (classes[in->mnemonic]) {
    case C_MOVE: return first ? X86_WRITE : X86_READ;
    case C_ALU: return first || in->mnemonic == ZYDIS_MNEMONIC_XCHG ? X86_READ | X86_WRITE : X86_READ;
    default: return X86_READ;
    }
}

/* It clears all the registers there are, which are more for the host than for 32-bit code. */
static bool clears_others(const jit_unit *u, const x86_insn *in)
{
    return !(u->key & JIT_KEY_64) && (in->exec == x86_op_vzeroupper || in->exec == x86_op_vzeroall);
}

static bool is_vector(const jit_unit *u, const x86_insn *in)
{
    return (in->flags & (X86_IF_VEC | X86_IF_NATIVE)) == (X86_IF_VEC | X86_IF_NATIVE) && !(in->flags & X86_IF_FPU) &&
           !is_odd_vector(in->mnemonic) && !clears_others(u, in) && x86_simd_offered(u->cpu, in);
}

/* Alignment that the instruction itself demands of its memory operand, or 1. */
static unsigned demanded_alignment(const x86_insn *in)
{
    if (in->mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B) return 16;
    return in->flags & X86_IF_VEC ? x86_simd_alignment(in) : 1;
}

/* Can the memory operand's address be made inline? */
static bool address_form(const jit_unit *u, const x86_insn *in)
{
    if (in->asz == 2 || (u->key & JIT_KEY_AC)) return false;
    if (u->key & JIT_KEY_64) return true;
    if (in->seg == X86_FS || in->seg == X86_GS) return u->key & (in->seg == X86_FS ? JIT_KEY_FS : JIT_KEY_GS);
    return (u->key & JIT_KEY_FLAT) && in->seg != X86_CS; /* CS may be execute-only */
}

static bool needs_rex(unsigned reg, unsigned size)
{
    return reg >= 8 || reg == X86_RSP || (size == 1 && reg >= 4 && reg < 16);
}

/* Is operand k written, the whole of it, and not read? Then emit.c need not load it. */
bool jit_insn_only_writes(const x86_insn *in, unsigned k)
{
    const x86_operand *o = &in->op[k];
    bool is_mulx = in->mnemonic == ZYDIS_MNEMONIC_MULX, is_bmi = (in->flags & (X86_IF_VEX | X86_IF_VEC)) == X86_IF_VEX;
    if (o->kind != X86_OP_GPR || k > is_mulx || !(is_bmi || jit_insn_moves(in)) || o->size < 4) return false;
    for (unsigned i = is_mulx ? 2 : 1; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_GPR && (in->op[i].reg == o->reg || in->op[i].reg >= 16)) return false;
    return true;
}

unsigned jit_frame_operands(const x86_insn *in)
{
    unsigned n = 0;
    for (unsigned k = 0; k < in->nops; k++) n += in->op[k].kind == X86_OP_GPR && JIT_IN_FRAME(in->op[k].reg);
    return n;
}

/* May this GPR instruction run with renamed operands? High bytes cannot be spelled beside a REX prefix, and [r14] needs
 * one. */
static bool native_form(const jit_unit *u, const x86_insn *in)
{
    bool high = false, rex = in->flags & X86_IF_MEM;
    unsigned in_frame = jit_frame_operands(in);
    for (unsigned i = 0; i < in->nops; i++) {
        const x86_operand *o = &in->op[i];
        switch (o->kind) {
        case X86_OP_GPR:
            if (o->reg >= 16)
                high = true;
            else
                rex |= needs_rex(o->reg, o->size) || o->size == 8;
            break;
        case X86_OP_MEM:
        case X86_OP_MOFFS:
        case X86_OP_IMM:
        case X86_OP_NONE:
        case X86_OP_VEC: break;
        default: return false;
        }
    }
    if (high && rex) return false;
    if ((in->flags & X86_IF_MEM) && (in_frame > 1u + jit_insn_only_writes(in, 0) || !address_form(u, in))) return false;
    return in_frame <= 2;
}

static bool is_bit_string(const x86_insn *in)
{
    return (in->flags & X86_IF_MEM) && in->op[1].kind == X86_OP_GPR &&
           (in->mnemonic == ZYDIS_MNEMONIC_BT || in->mnemonic == ZYDIS_MNEMONIC_BTS ||
            in->mnemonic == ZYDIS_MNEMONIC_BTR || in->mnemonic == ZYDIS_MNEMONIC_BTC);
}

/* x87 instructions that may run natively: all that only compute. Control instructions and MMX go to the semantic
 * functions. */
bool jit_insn_is_x87(const x86_insn *in) { return in->exec == x86_op_x87 && (in->opcode & 0xf8) == 0xd8; }

bool jit_insn_clears_if(const x86_insn *in) { return in->mnemonic == ZYDIS_MNEMONIC_CLI; }
bool jit_insn_is_swapgs(const x86_insn *in) { return in->exec == x86_op_swapgs; }
bool jit_insn_compares(const x86_insn *in)
{
    return in->mnemonic == ZYDIS_MNEMONIC_CMP && in->op[0].kind == X86_OP_GPR && in->op[1].kind == X86_OP_IMM;
}

bool jit_insn_names_sp(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_GPR && in->op[i].reg == X86_RSP) return true;
    return false;
}

bool jit_insn_is_mov(const x86_insn *in) { return in->mnemonic == ZYDIS_MNEMONIC_MOV; }
bool jit_insn_moves(const x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_MOVZX:
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_MOVBE: return true;
    default: return false;
    }
}
bool jit_insn_pushes(const x86_insn *in) { return classes[in->mnemonic] == C_CALL || classes[in->mnemonic] == C_PUSH; }
bool jit_insn_is_idiv(const x86_insn *in) { return in->mnemonic == ZYDIS_MNEMONIC_IDIV; }
bool jit_insn_may_redo(const x86_insn *in)
{
    return (in->flags & X86_IF_MEM) && (classes[in->mnemonic] == C_DIV || jit_insn_pushes(in));
}

static bool is_x87_store(const x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_FST:
    case ZYDIS_MNEMONIC_FSTP:
    case ZYDIS_MNEMONIC_FIST:
    case ZYDIS_MNEMONIC_FISTP:
    case ZYDIS_MNEMONIC_FISTTP:
    case ZYDIS_MNEMONIC_FBSTP: return true;
    default: return false;
    }
}

static bool x87_form(const jit_unit *u, const x86_insn *in)
{
    return !(in->flags & X86_IF_MEM) || (memory_size(in) && address_form(u, in));
}

/* The stack is as wide as this code pushes. */
static bool stack_form(const jit_unit *u, const x86_insn *in)
{
    if (u->key & JIT_KEY_AC) return false;
    return u->key & JIT_KEY_64 ? in->osz == 8 : in->osz == 4 && (u->key & JIT_KEY_FLAT);
}

static bool counts_cx(const x86_insn *in) { return in->mnemonic == ZYDIS_MNEMONIC_LOOP; }
static bool looks_at_cx(const x86_insn *in)
{
    return counts_cx(in) || in->mnemonic == ZYDIS_MNEMONIC_JRCXZ || in->mnemonic == ZYDIS_MNEMONIC_JECXZ;
}

/* The condition under which a C_JCC jumps. */
static unsigned condition(const x86_insn *in)
{
    if (!looks_at_cx(in)) return in->cc;
    return (in->asz == 8 ? CC_CXZ : CC_ECXZ) + counts_cx(in);
}

/* CLI where no IOPL matters; MOV of a selector to the whole of a register. */
static bool is_system_form(const jit_unit *u, const x86_insn *in)
{
    if (in->mnemonic == ZYDIS_MNEMONIC_CLI) return u->key & JIT_KEY_RING0;
    if (jit_insn_is_swapgs(in)) return (u->key & JIT_KEY_64) && (u->key & JIT_KEY_RING0);
    return in->mnemonic == ZYDIS_MNEMONIC_MOV && in->op[1].kind == X86_OP_SEG && in->op[0].kind == X86_OP_GPR &&
           in->op[0].size >= 4 && in->op[0].reg != X86_RSP;
}

bool jit_insn_sets_if(const jit_unit *u, unsigned i)
{
    return u->insn[i].exec == x86_op_sti && (u->key & JIT_KEY_RING0) && i + 1 < u->count && !u->cpu->hook_mask;
}

bool jit_in_shadow(const jit_unit *u, unsigned i) { return i && u->insn[i - 1].exec == x86_op_sti; }

/* The class under which this very form is handled, or C_FALLBACK. */
static unsigned class_of(const jit_unit *u, const x86_insn *in)
{
    unsigned c = classes[in->mnemonic];
    if (x86_is_logged(in) || jit_access_falls_back(u, in)) return C_FALLBACK;
    if (is_vector(u, in)) {
        if (!(u->key & JIT_KEY_VEC) || ((in->flags & X86_IF_VEX) && !(u->key & JIT_KEY_AVX)) || !native_form(u, in))
            return C_FALLBACK;
        return C_MOVE;
    }
    if (jit_insn_is_x87(in) && (u->key & JIT_KEY_X87) && x87_form(u, in)) return C_MOVE;
    if (is_system_form(u, in)) return C_SYSTEM;
    if (in->flags & (X86_IF_VEC | X86_IF_FPU | X86_IF_PRIV)) return C_FALLBACK;
    switch (c) {
    case C_PUSH:
        if (!stack_form(u, in) || in->op[0].kind == X86_OP_SEG) return C_FALLBACK;
        return !(in->flags & X86_IF_MEM) || address_form(u, in) ? c : C_FALLBACK;
    case C_PUSHF: return stack_form(u, in) && (u->key & JIT_KEY_64) ? c : C_FALLBACK;
    case C_POP: return stack_form(u, in) && in->op[0].kind == X86_OP_GPR ? c : C_FALLBACK;
    case C_LEAVE:
    case C_RET:
    case C_CALL:
    case C_JMP:
        if (in->op[0].kind == X86_OP_FAR || in->opcode == 0xca || in->opcode == 0xcb) return C_FALLBACK;
        if (c != C_JMP && !stack_form(u, in)) return C_FALLBACK;
        if (c == C_RET && jit_access_hooked(u, X86_READ)) return C_FALLBACK; /* to a bad address: the read must not be told twice */
        if (in->osz != (u->key & JIT_KEY_64 ? 8 : 4)) return C_FALLBACK;
        if ((in->flags & X86_IF_MEM) && (in->op[0].size != in->osz || !address_form(u, in))) return C_FALLBACK;
        return c;
    case C_JCC:
        if (looks_at_cx(in) && in->asz == 2) return C_FALLBACK;
        return in->osz == (u->key & JIT_KEY_64 ? 8 : 4) ? c : C_FALLBACK;
    case C_DIV:
        if (in->op[0].size < 4 || jit_access_hooked(u, X86_READ)) return C_FALLBACK; /* it may be done again: told twice */
        if (in->flags & X86_IF_MEM) return address_form(u, in) ? c : C_FALLBACK;
        return in->op[0].reg != X86_RAX && in->op[0].reg != X86_RDX ? c : C_FALLBACK;
    case C_LEA: return in->asz == 2 || in->osz == 2 ? C_FALLBACK : c;
    case C_NOP: return (in->flags & X86_IF_LOCK) ? C_FALLBACK : c;
    case C_MOVE:
    case C_ALU:
    case C_TEST:
        if ((in->flags & (X86_IF_BRANCH | X86_IF_END)) || is_bit_string(in) || !native_form(u, in)) return C_FALLBACK;
        return c;
    default: return C_FALLBACK;
    }
}

/* ---- flags ---- */

void jit_classify_flags(const x86_insn *in, jit_info *info)
{
    info->read = in->flags_read & X86_FL_ARITH;
    info->written = in->flags_written & X86_FL_ARITH & ~in->flags_maybe;
}

bool jit_insn_can_leave(const jit_unit *u, const x86_insn *in)
{
    switch (class_of(u, in)) {
    case C_FALLBACK:
    case C_PUSH:
    case C_PUSHF:
    case C_POP:
    case C_CALL:
    case C_RET:
    case C_LEAVE:
    case C_DIV: return true;
    case C_LEA:
    case C_NOP:
    case C_JCC: return false;
    default: return in->flags & X86_IF_MEM;
    }
}

bool jit_insn_falls_back(const jit_unit *u, const x86_insn *in) { return class_of(u, in) == C_FALLBACK; }

/* One instruction backwards: what must be in the host's flags and what must be exact before it, given what must after
 * it. */
void jit_flags_before(const x86_insn *in, jit_info *f, uint16_t *host, uint16_t *exact)
{
    if (f->falls_back) { /* all flags through memory */
        f->host_at = *host = 0;
        f->exact_at = *exact = X86_FL_ARITH;
        return;
    }
    uint16_t through = X86_FL_ARITH & ~f->written;
    uint16_t partial = f->written ? (*host | *exact) & through : 0;
    uint16_t maybe = in->flags_maybe & X86_FL_ARITH;
    f->host_at = *host = (*host & through) | f->read | partial | (maybe & (*host | *exact));
    f->exact_at = *exact = f->can_leave ? X86_FL_ARITH : *exact & through;
}

/* Fit what was decoded to the CPU's model and to the host: SHL and its like by a constant may leave nothing of the old flags. */
static void fit(const jit_unit *u, x86_insn *in)
{
    x86_offer(u->cpu, in);
    switch (u->j->shifts_define ? in->mnemonic : 0) {
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD:
        if (in->osz < 4) break; /* it may be by more than the size */
        /* fallthrough */
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
        if (in->op[in->nops - 1].kind != X86_OP_IMM) break;
        in->flags_written |= in->flags_maybe;
        in->flags_maybe = 0;
        break;
    default: break;
    }
}

/* Decode what lies at page offset `at`. */
static bool decode_at(const jit_unit *u, unsigned at, x86_insn *in)
{
    unsigned avail = 4096 - at, size = u->key & JIT_KEY_64 ? 8 : 4;
    if (u->crosses ? at != (u->rip & 0xfff) || x86_decode(u->bytes, 15, size, in)
                   : !avail || x86_decode_again(u->j->forms, u->page + at, avail < 15 ? avail : 15, size, in))
        return false;
    fit(u, in);
    return true;
}

/* The bytes of the page that rip lies on, or NULL: not one of the unit's. *index as in jit_extent. */
static const uint8_t *page_of(const jit_unit *u, uint64_t rip, unsigned *index)
{
    *index = 0;
    if (!((rip ^ u->rip) & X86_PAGE_MASK)) return u->page;
    for (unsigned k = 0; k < u->nmore; k++) {
        *index = k + 1;
        if (u->more[k].la == (rip & X86_PAGE_MASK)) return u->more[k].host;
    }
    return NULL;
}

/* Decode what lies at rip, on any of the unit's pages. */
static bool decode_rip(const jit_unit *u, uint64_t rip, x86_insn *in)
{
    unsigned index, offset = rip & 0xfff, first = 4096 - offset;
    const uint8_t *page = page_of(u, rip, &index), *next = first < 15 ? page_of(u, rip + first, &index) : NULL;
    uint8_t bytes[15];
    if (!u->nmore || !page) return page && decode_at(u, offset, in);
    if (!next) {
        if (x86_decode_again(u->j->forms, page + offset, first < 15 ? first : 15, u->key & JIT_KEY_64 ? 8 : 4, in)) return false;
    } else {
        memcpy(bytes, page + offset, first);
        memcpy(bytes + first, next, 15 - first);
        if (x86_decode(bytes, 15, u->key & JIT_KEY_64 ? 8 : 4, in)) return false;
    }
    fit(u, in);
    return true;
}

/* Does the instruction at rip, on the block's page, end on the next? */
bool jit_crosses_page(const jit_unit *u, uint64_t rip)
{
    x86_insn in;
    return (rip & 0xfff) > 4096 - 15 && !((rip ^ u->rip) & X86_PAGE_MASK) && !decode_at(u, rip & 0xfff, &in);
}

static uint64_t wrap(const jit_unit *u, uint64_t rip) { return u->key & JIT_KEY_64 ? rip : (uint32_t)rip; }

/* Does this branch always end in code that takes its flags from memory? `next` is the address after it. */
static bool goes_elsewhere(const jit_unit *u, const x86_insn *in, uint64_t next)
{
    unsigned c = class_of(u, in);
    if (c != C_RET && c != C_JMP && c != C_CALL) return false;
    return in->op[0].kind != X86_OP_REL || ((wrap(u, next + in->imm) ^ u->rip) & X86_PAGE_MASK);
}

unsigned jit_flag_need(jit_unit *u, uint64_t rip, jit_extent *extent)
{
    x86_insn in[JIT_LOOK_AHEAD];
    jit_info info[JIT_LOOK_AHEAD];
    unsigned n = 0, offset = rip & 0xfff;
    uint16_t written = 0, host = X86_FL_ARITH, exact = X86_FL_ARITH;
    *extent = (jit_extent){(uint16_t)offset, (uint16_t)offset, 0};
    if ((rip ^ u->rip) & X86_PAGE_MASK)
        return JIT_NEED_MEM;        /* such edges enter where the flags are loaded from memory */
    if (JIT_MAX_INSNS < JIT_LOOK_AHEAD) /* blocks may end before what is seen here */
        return JIT_NEED_HOST | JIT_NEED_MEM;
    while (n < JIT_LOOK_AHEAD && offset < 4096) {
        if (!decode_at(u, offset, &in[n])) break;
        jit_info *f = &info[n];
        jit_classify_flags(&in[n], f);
        f->falls_back = class_of(u, &in[n]) == C_FALLBACK || (n && jit_is_stop(u->j, rip + (offset - (rip & 0xfff)))) ||
                       jit_hook_kinds(u, rip + (offset - (rip & 0xfff)), in[n].length, !n);
        f->can_leave = f->falls_back || jit_insn_can_leave(u, &in[n]) || (in[n].flags & X86_IF_BRANCH);
        offset += in[n].length;
        extent->end = (uint16_t)offset;
        written |= f->written;
        if (in[n].flags & X86_IF_BRANCH && goes_elsewhere(u, &in[n], rip + (offset - (rip & 0xfff)))) host = 0;
        if (in[n++].flags & (X86_IF_BRANCH | X86_IF_END) || info[n - 1].falls_back) break;
        if (written == X86_FL_ARITH) {
            host = exact = 0;
            break;
        }
    }
    while (n-- > 0) jit_flags_before(&in[n], &info[n], &host, &exact);
    return (host ? JIT_NEED_HOST : 0) | (exact ? JIT_NEED_MEM : 0);
}

unsigned jit_recipe_kind(const x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_CMP: return JIT_RECIPE_CMP;
    case ZYDIS_MNEMONIC_TEST: return JIT_RECIPE_TEST;
    case ZYDIS_MNEMONIC_ADD: return JIT_RECIPE_ADD;
    case ZYDIS_MNEMONIC_SUB: return JIT_RECIPE_SUB;
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_XOR: return JIT_RECIPE_LOGIC;
    default: return JIT_RECIPE_NONE;
    }
}

unsigned jit_pointer_move(const x86_insn *in, unsigned *src, int64_t *imm)
{
    unsigned width = in->mode == 8 ? 8 : 4;
    *imm = 0;
    if (in->nops != 2 || in->op[0].kind != X86_OP_GPR || in->op[0].size != width) return JIT_MOVE_NONE;
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_MOV: *src = in->op[1].reg; return in->op[1].kind == X86_OP_GPR ? JIT_MOVE_COPY : JIT_MOVE_NONE;
    case ZYDIS_MNEMONIC_LEA:
        *src = in->base;
        *imm = in->disp;
        return in->base < 16 && in->index == X86_NOREG && in->asz == width ? JIT_MOVE_COPY : JIT_MOVE_NONE;
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_SUB:
        *imm = in->mnemonic == ZYDIS_MNEMONIC_ADD ? (int64_t)in->imm : -(int64_t)in->imm;
        return in->op[1].kind == X86_OP_IMM ? JIT_MOVE_ADD : JIT_MOVE_NONE;
    default: return JIT_MOVE_NONE;
    }
}

static uint16_t implicit_changes(uint16_t mnemonic, unsigned nops)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_MUL:
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV: return 1u << X86_RAX | 1u << X86_RDX;
    case ZYDIS_MNEMONIC_IMUL: return nops == 1 ? 1u << X86_RAX | 1u << X86_RDX : 0;
    case ZYDIS_MNEMONIC_CWD:
    case ZYDIS_MNEMONIC_CDQ:
    case ZYDIS_MNEMONIC_CQO: return 1u << X86_RDX;
    case ZYDIS_MNEMONIC_CBW:
    case ZYDIS_MNEMONIC_CWDE:
    case ZYDIS_MNEMONIC_CDQE:
    case ZYDIS_MNEMONIC_LAHF:
    case ZYDIS_MNEMONIC_CMPXCHG: return 1u << X86_RAX;
    case ZYDIS_MNEMONIC_CMPXCHG8B:
    case ZYDIS_MNEMONIC_CMPXCHG16B: return 1u << X86_RAX | 1u << X86_RDX;
    case ZYDIS_MNEMONIC_LOOP:
    case ZYDIS_MNEMONIC_PCMPESTRI:
    case ZYDIS_MNEMONIC_PCMPISTRI:
    case ZYDIS_MNEMONIC_VPCMPESTRI:
    case ZYDIS_MNEMONIC_VPCMPISTRI: return 1u << X86_RCX;
    case ZYDIS_MNEMONIC_LEAVE: return 1u << X86_RSP | 1u << X86_RBP;
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_POP:
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_RET: return 1u << X86_RSP;
    default: return 0;
    }
}

uint16_t jit_changed_regs(const x86_insn *in)
{
    uint16_t changed = implicit_changes(in->mnemonic, in->nops);
    bool reads_first = in->mnemonic == ZYDIS_MNEMONIC_CMP || in->mnemonic == ZYDIS_MNEMONIC_TEST ||
                       in->mnemonic == ZYDIS_MNEMONIC_BT || in->mnemonic == ZYDIS_MNEMONIC_PUSH ||
                       in->mnemonic == ZYDIS_MNEMONIC_DIV || in->mnemonic == ZYDIS_MNEMONIC_IDIV ||
                       in->mnemonic == ZYDIS_MNEMONIC_CALL || in->mnemonic == ZYDIS_MNEMONIC_JMP;
    bool writes_second = in->mnemonic == ZYDIS_MNEMONIC_XCHG || in->mnemonic == ZYDIS_MNEMONIC_XADD ||
                         in->mnemonic == ZYDIS_MNEMONIC_MULX;
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_GPR && ((i == 0 && !reads_first) || (i == 1 && writes_second)))
            changed |= (uint16_t)(1u << (in->op[i].reg & 15 & (in->op[i].reg >= 16 ? 3 : 15)));
    return changed;
}

void jit_bound(const x86_insn *in, const jit_most before[16], jit_most now[16])
{
    const x86_operand *to = &in->op[0], *from = &in->op[1];
    uint64_t most = UINT64_MAX;
    if (in->nops != 2 || to->kind != X86_OP_GPR || to->reg >= 16 || to->size < 4) return;
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_MOVZX: most = from->size == 1 ? 0xff : 0xffff; break;
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_MOV:
        if (from->kind == X86_OP_IMM)
            most = to->size == 4 ? (uint32_t)in->imm : (uint64_t)in->imm;
        else if (from->kind == X86_OP_GPR && to->size == 4 && in->mnemonic == ZYDIS_MNEMONIC_MOV)
            most = before[from->reg & 15].low;
        break;
    default: break;
    }
    if (most < UINT64_MAX) now[to->reg] = (jit_most){most, most < UINT32_MAX ? (uint32_t)most : UINT32_MAX};
}

/* ---- instructions to IR ---- */

static jit_op *add_op(jit_unit *u, unsigned op, unsigned insn)
{
    jit_op *o = &u->ops[u->nops++];
    memset(o, 0, sizeof *o);
    o->op = (uint8_t)op;
    o->insn = (uint16_t)insn;
    return o;
}

static void add_check(jit_unit *u, unsigned i, unsigned access, unsigned size, unsigned align)
{
    jit_op *o = add_op(u, IR_CHECK, i);
    o->access = (uint8_t)access;
    o->size = (uint8_t)size;
    o->align = (uint8_t)align;
}

static void lift_native(jit_unit *u, unsigned i, const x86_insn *in)
{
    if (!(in->flags & X86_IF_MEM)) {
        add_op(u, IR_NATIVE, i);
        return;
    }
    add_op(u, IR_EA, i);
    add_check(u, i, jit_insn_access(in), memory_size(in), demanded_alignment(in));
    add_op(u, IR_ACCESS, i);
}

static unsigned stack_bytes(const jit_unit *u) { return u->key & JIT_KEY_64 ? 8 : 4; }

static void add_sp(jit_unit *u, unsigned i, int64_t delta) { add_op(u, IR_ADD_SP, i)->imm = delta; }

static void lift_load_tmp(jit_unit *u, unsigned i, unsigned size)
{
    add_op(u, IR_EA, i);
    add_check(u, i, X86_READ, size, 1);
    add_op(u, IR_LOAD_TMP, i)->size = (uint8_t)size;
}

static void lift_store_stack(jit_unit *u, unsigned i, unsigned op, unsigned reg, int64_t imm)
{
    unsigned n = stack_bytes(u);
    add_op(u, IR_EA_SP, i)->imm = -(int64_t)n;
    add_check(u, i, X86_WRITE, n, 1);
    jit_op *o = add_op(u, op, i);
    o->size = (uint8_t)n;
    o->reg = (uint8_t)reg;
    o->imm = imm;
    add_sp(u, i, -(int64_t)n);
}

/* RET: the temporary is where to. */
static void lift_load_return(jit_unit *u, unsigned i, const x86_insn *in)
{
    unsigned n = stack_bytes(u);
    add_op(u, IR_EA_SP, i);
    add_check(u, i, X86_READ, n, 1);
    add_op(u, IR_LOAD_TMP, i)->size = (uint8_t)n;
    add_sp(u, i, n + (in->nops && in->op[0].kind == X86_OP_IMM ? (int64_t)(uint16_t)in->imm : 0));
}

/* JMP and CALL through a register or memory: the temporary is where to. */
static void lift_load_target(jit_unit *u, unsigned i, const x86_insn *in)
{
    unsigned n = stack_bytes(u);
    if (in->flags & X86_IF_MEM) {
        lift_load_tmp(u, i, n);
        return;
    }
    jit_op *o = add_op(u, IR_MOVE_TMP, i);
    o->reg = in->op[0].reg;
    o->size = (uint8_t)n;
}

static void lift_push(jit_unit *u, unsigned i, const x86_insn *in)
{
    if (in->flags & X86_IF_MEM) {
        lift_load_tmp(u, i, stack_bytes(u));
        lift_store_stack(u, i, IR_PUSH_TMP, 0, 0);
    } else if (in->op[0].kind == X86_OP_IMM)
        lift_store_stack(u, i, IR_PUSH_IMM, 0, (int64_t)in->imm);
    else
        lift_store_stack(u, i, IR_PUSH_REG, in->op[0].reg, 0);
}

static void lift_pop(jit_unit *u, unsigned i, const x86_insn *in)
{
    unsigned n = stack_bytes(u);
    add_op(u, IR_EA_SP, i);
    add_check(u, i, X86_READ, n, 1);
    jit_op *o = add_op(u, IR_POP_REG, i);
    o->size = (uint8_t)n;
    o->reg = in->op[0].reg;
    if (in->op[0].reg != X86_RSP) add_sp(u, i, n);
}

static void lift_branch(jit_unit *u, unsigned i, const x86_insn *in, unsigned class)
{
    uint64_t next = wrap(u, u->insn_rip[i] + in->length), target = wrap(u, next + in->imm);
    bool is_direct = in->op[0].kind == X86_OP_REL;
    if (class == C_RET) {
        lift_load_return(u, i, in);
        add_op(u, IR_JUMP_TMP, i);
        return;
    }
    if (!is_direct) lift_load_target(u, i, in);
    if (class == C_CALL && !is_direct && (u->key & JIT_KEY_64)) add_op(u, IR_CANON, i);
    if (class == C_CALL) lift_store_stack(u, i, IR_PUSH_IMM, 0, (int64_t)next);
    jit_op *o = add_op(u, is_direct ? (class == C_JCC ? IR_JCC : IR_JUMP) : IR_JUMP_TMP, i);
    o->target = target;
    o->fall = next;
    o->cc = (uint8_t)condition(in);
}

/* STI shadows the next instruction, so it ends nothing: where it is a block's last, C leaves after it. */
static bool ends_unit(const jit_unit *u, const x86_insn *in)
{
    if (is_system_form(u, in) || (in->exec == x86_op_sti && !u->path && !u->cpu->hook_mask)) return false;
    return in->flags & (X86_IF_BRANCH | X86_IF_END);
}

/* By the semantic function. #UD may be a hook's to emulate: then it goes on behind, as after a jump. */
static void lift_fallback(jit_unit *u, unsigned i)
{
    const x86_insn *in = &u->insn[i];
    bool goes_on = in->exec == x86_op_illegal && !u->cpu->cover.is_on;
    add_op(u, ends_unit(u, in) && !goes_on ? IR_FALLBACK_END : IR_FALLBACK, i);
    if (goes_on) add_op(u, IR_JUMP, i)->target = wrap(u, u->insn_rip[i] + in->length);
}

static void lift_insn(jit_unit *u, unsigned i)
{
    const x86_insn *in = &u->insn[i];
    unsigned c = u->forced >> i & 1 ? C_FALLBACK : class_of(u, in), n = stack_bytes(u);
    switch (c) {
    case C_FALLBACK: lift_fallback(u, i); break;
    case C_SYSTEM: add_op(u, IR_SYSTEM, i); break;
    case C_LEA: add_op(u, IR_LEA, i); break;
    case C_DIV:
        if (in->flags & X86_IF_MEM) lift_load_tmp(u, i, in->op[0].size);
        add_op(u, IR_DIV, i);
        break;
    case C_NOP: break;
    case C_PUSH: lift_push(u, i, in); break;
    case C_PUSHF:
        add_op(u, IR_FLAGS_TMP, i);
        lift_store_stack(u, i, IR_PUSH_TMP, 0, 0);
        break;
    case C_POP: lift_pop(u, i, in); break;
    case C_LEAVE:
        add_op(u, IR_EA_BP, i);
        add_check(u, i, X86_READ, n, 1);
        add_op(u, IR_LEAVE_SP, i)->size = (uint8_t)n;
        break;
    case C_CALL:
    case C_RET:
    case C_JMP:
    case C_JCC: lift_branch(u, i, in, c); break;
    default: lift_native(u, i, in); break;
    }
}

/* ---- traces ----
 * A block goes on past conditional jumps (they become SIDE exits), follows forward jumps within the page, and, where a
 * loop closes on the block's own start, holds a few copies of it: so flags, budget and address checks are settled once
 * for several iterations.
 * Where execution has been seen to go round (jit.c records paths), a block follows the path instead, through calls,
 * returns and indirect jumps: these are compared with where they went (GUARD). */

typedef struct trace {
    uint64_t rip;          /* next instruction */
    uint64_t piece;        /* where the contiguous piece being read begins */
    unsigned body, copies; /* instructions in one iteration, iterations so far */
    bool is_open, can_loop;
} trace;

enum { MAX_COPIES = 4, MAX_HOOKED_COPIES = 8 /* entering costs more */ };
enum { MAX_PIECES = 6, MAX_BRANCHES = 8, MAX_PATH_PIECES = JIT_MAX_EXTENTS - JIT_MAX_SIDES - 8 };

/* The block is made from [begin, end), on one page. */
static void add_extent(jit_unit *u, uint64_t begin, uint64_t end)
{
    unsigned page;
    page_of(u, begin, &page);
    jit_extent x = {(uint16_t)(begin & 0xfff), (uint16_t)(((end - 1) & 0xfff) + 1), (uint16_t)page};
    for (unsigned k = 0; k < u->nextents; k++)
        if (u->extents[k].page == x.page && u->extents[k].begin <= x.begin && x.end <= u->extents[k].end) return;
    if (u->nextents < JIT_MAX_EXTENTS) u->extents[u->nextents++] = x;
}

static void close_piece(jit_unit *u, const trace *t, uint64_t end)
{
    for (uint64_t at = t->piece; at < end; at = (at | 0xfff) + 1) add_extent(u, at, end - 1 > (at | 0xfff) ? (at | 0xfff) + 1 : end);
}

/* Go on reading at target. */
static void jump_to(jit_unit *u, trace *t, uint64_t target, uint64_t end)
{
    close_piece(u, t, end);
    t->rip = target;
    t->piece = target;
}

/* Is there room for another copy of a loop that closes here? */
static bool may_repeat(jit_unit *u, trace *t, uint64_t target)
{
    if (target != u->rip || !t->can_loop) return false;
    if (!t->body) t->body = u->count;
    t->copies++;
    return t->copies < (u->nhooked ? MAX_HOOKED_COPIES : MAX_COPIES) && u->count + t->body <= JIT_MAX_INSNS && u->nextents < MAX_PIECES;
}

static void add_side(jit_unit *u, unsigned i, unsigned cc, uint64_t target)
{
    jit_op *o = add_op(u, IR_SIDE, i);
    o->cc = (uint8_t)cc;
    o->target = target;
    u->sides++;
}

/* The branch at i of a recorded path: true when the trace goes on where it went. */
static bool follow_path(jit_unit *u, trace *t, unsigned i, const x86_insn *in, unsigned class, uint64_t end)
{
    unsigned page;
    uint64_t next = wrap(u, u->insn_rip[i] + in->length), direct = wrap(u, next + in->imm), target = u->path[i + 1];
    bool is_last = i + 1 == u->path_count, is_direct = class != C_RET && in->op[0].kind == X86_OP_REL;
    if (!page_of(u, target, &page) || u->sides == JIT_MAX_SIDES || u->nextents >= MAX_PATH_PIECES ||
        (is_direct && target != direct && (class != C_JCC || target != next)) || (is_last && class == C_JCC) ||
        (class == C_CALL && jit_has_no_guard(u->j, u->insn_rip[i])))
        return false;
    switch (class) {
    case C_JCC: add_side(u, i, target == next ? condition(in) : condition(in) ^ 1u, target == next ? direct : next); break;
    case C_RET: lift_load_return(u, i, in); break;
    case C_JMP:
    case C_CALL:
        if (!is_direct) lift_load_target(u, i, in);
        break;
    default: return false;
    }
    if (class == C_CALL) {
        if (!is_direct) add_op(u, IR_GUARD_CALL, i)->target = target;
        lift_store_stack(u, i, IR_PUSH_IMM, 0, (int64_t)next);
        u->ops[u->nops - 2].target = target;
    } else if (!is_direct)
        add_op(u, IR_GUARD, i)->target = target;
    u->sides += !is_direct;
    if (target == next)
        t->rip = next;
    else
        jump_to(u, t, target, end);
    return true;
}

/* A direct jump or branch: true when the trace goes on. */
static bool follow_branch(jit_unit *u, trace *t, unsigned i, const x86_insn *in, unsigned class, uint64_t end)
{
    uint64_t next = wrap(u, u->insn_rip[i] + in->length), target = wrap(u, next + in->imm);
    bool same_page = !((target ^ u->rip) & X86_PAGE_MASK);
    if (JIT_MAX_INSNS < 8 || u->crosses || in->op[0].kind != X86_OP_REL || !same_page || u->sides >= MAX_BRANCHES ||
        u->cpu->cover.ring)
        return false;
    if (may_repeat(u, t, target)) {
        if (class == C_JCC) add_side(u, i, condition(in) ^ 1u, next);
        jump_to(u, t, target, end);
        return true;
    }
    if (target <= u->insn_rip[i]) return false;
    if (class == C_JCC) {
        if ((end ^ u->rip) & X86_PAGE_MASK) return false;
        add_side(u, i, condition(in), target);
        t->rip = next;
        return true;
    }
    if (u->nextents >= MAX_PIECES) return false;
    jump_to(u, t, target, end);
    return true;
}

/* One instruction. False: it is not part of this block. */
static bool lift_next(jit_unit *u, trace *t)
{
    unsigned i = u->count;
    x86_insn *in = &u->insn[i];
    if ((i && jit_is_stop(u->j, t->rip)) || u->nops + JIT_INSN_OPS > JIT_MAX_OPS ||
        (u->path && (i == u->path_count || t->rip != u->path[i])))
        return false;
    if (!decode_rip(u, t->rip, in)) return false;
    bool begins_block = !i || (in[-1].flags & (X86_IF_BRANCH | X86_IF_END));
    u->hooked[i] = (uint16_t)jit_hook_kinds(u, t->rip, in->length, begins_block);
    if (u->hooked[i] & X86_HOOK_BIT(X86_HOOK_BREAK)) {
        if (!i) {
            add_op(u, IR_NEED_STEP, 0);
            t->is_open = false;
        }
        return false;
    }
    bool calls_hooks = jit_hook_is_near(u, i);
    if (is_vector(u, in) && !calls_hooks &&
        !(u->key & JIT_KEY_VEC)) { /* starts a block of its own, entered with the vector registers loaded */
        if (!i) {
            add_op(u, IR_NEED_VEC, 0);
            t->is_open = false;
        }
        return false;
    }
    if (jit_insn_is_x87(in) && !calls_hooks && !(u->key & JIT_KEY_X87)) {
        if (!i) {
            add_op(u, IR_NEED_X87, 0);
            t->is_open = false;
        }
        return false;
    }
    if (u->hooked[i] && ++u->nhooked > JIT_MAX_HOOKED) return false;
    u->insn_rip[i] = t->rip;
    u->count++;
    unsigned class = u->forced >> i & 1 ? C_FALLBACK : class_of(u, in);
    uint64_t end = t->rip + in->length;
    t->can_loop &= class != C_FALLBACK;
    if (u->hooked[i]) add_op(u, IR_HOOK, i);
    if (class == C_JCC && counts_cx(in)) add_op(u, IR_COUNT_CX, i);
    if (u->path ? follow_path(u, t, i, in, class, end)
                : (class == C_JCC || class == C_JMP) && follow_branch(u, t, i, in, class, end))
        return true;
    lift_insn(u, i);
    t->is_open = !ends_unit(u, in);
    t->rip = wrap(u, t->rip + in->length);
    return true;
}

bool jit_lift(jit_unit *u, unsigned max_insns)
{
    trace t = {.rip = u->rip, .piece = u->rip, .is_open = true, .can_loop = !(u->key & JIT_KEY_PLAIN)};
    u->count = u->nops = u->sides = u->nextents = u->nhooked = 0;
    while (t.is_open && u->count < max_insns && lift_next(u, &t))
        ;
    if (!u->nops && !u->count) return false;
    if (t.is_open) {
        jit_op *o = add_op(u, IR_JUMP, u->count - 1);
        o->target = t.rip;
        o->goes_on = true;
    }
    uint64_t last = u->count ? u->insn_rip[u->count - 1] : u->rip;
    close_piece(u, &t, last + (u->count ? u->insn[u->count - 1].length : u->insn[0].length));
    return true;
}
