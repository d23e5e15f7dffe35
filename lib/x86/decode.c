/* decode.c - bytes to x86_insn, with Zydis doing the decoding.
 *
 * The result depends on the bytes and the code size alone. Whether the CPU as configured has an instruction, or whether
 * the current mode allows it (VEX in real mode, privilege), is the semantic function's business; here an instruction is
 * legal or it is not. The vendor is AMD: near branches in 64-bit mode obey the operand-size prefix (APM vol. 3, 1.2.4).
 */
#include <Zydis/Zydis.h>
#include <string.h>
#include "x86/access.h"
#include "x86/ops.h"

typedef struct row { x86_exec_fn exec; uint16_t flags; } row;
typedef struct variant_row { uint16_t mnemonic; uint8_t variant; row r; } variant_row;
enum { PLAIN, FAR_FORM, SEG_FORM, CR_FORM, DR_FORM };

#define OP(m, f, fl) [ZYDIS_MNEMONIC_##m] = { f, fl },
#define OP_FAR(m, f, fl)
#define OP_SEG(m, f, fl)
#define OP_CR(m, f, fl)
#define OP_DR(m, f, fl)
#define OP_VEC(m, f, fl)
#define OP_ISA(i, f, fl)
static const row plain_rows[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
#include "x86/ops.def"
};

#define OP(m, f, fl)
#define OP_FAR(m, f, fl)
#define OP_SEG(m, f, fl)
#define OP_CR(m, f, fl)
#define OP_DR(m, f, fl)
#define OP_VEC(m, f, fl) [ZYDIS_MNEMONIC_##m] = { f, fl },
#define OP_ISA(i, f, fl)
static const row vec_rows[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
#include "x86/ops.def"
    [0] = { 0, 0 }
};

#define OP(m, f, fl)
#define OP_FAR(m, f, fl)
#define OP_SEG(m, f, fl)
#define OP_CR(m, f, fl)
#define OP_DR(m, f, fl)
#define OP_VEC(m, f, fl)
#define OP_ISA(i, f, fl) [ZYDIS_ISA_SET_##i] = { f, fl },
static const row isa_rows[ZYDIS_ISA_SET_MAX_VALUE + 1] = {
#include "x86/ops.def"
    [0] = { 0, 0 }
};

#define OP(m, f, fl)
#define OP_FAR(m, f, fl) { ZYDIS_MNEMONIC_##m, FAR_FORM, { f, fl } },
#define OP_SEG(m, f, fl) { ZYDIS_MNEMONIC_##m, SEG_FORM, { f, fl } },
#define OP_CR(m, f, fl) { ZYDIS_MNEMONIC_##m, CR_FORM, { f, fl } },
#define OP_DR(m, f, fl) { ZYDIS_MNEMONIC_##m, DR_FORM, { f, fl } },
#define OP_VEC(m, f, fl)
#define OP_ISA(i, f, fl)
static const variant_row variant_rows[] = {
#include "x86/ops.def"
    { 0, 0, { 0, 0 } }
};

void x86_op_illegal(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_raise(cpu, X86_UD);
}

static void too_long(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_raise_error(cpu, X86_GP, 0);
}

/* ---- operands ---- */

static unsigned gpr8_number(ZydisRegister reg)
{
    if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH)
        return 16 + (reg - ZYDIS_REGISTER_AH);
    if (reg >= ZYDIS_REGISTER_SPL)
        return 4 + (reg - ZYDIS_REGISTER_SPL);
    return reg - ZYDIS_REGISTER_AL;
}

/* False: a register file this CPU does not have. */
static bool take_register(ZydisRegister reg, x86_operand *op)
{
    ZydisRegisterClass class = ZydisRegisterGetClass(reg);
    op->reg = (uint8_t)ZydisRegisterGetId(reg);
    op->size = (uint8_t)(ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, reg) / 8);
    switch (class) {
    case ZYDIS_REGCLASS_GPR8: op->kind = X86_OP_GPR; op->reg = (uint8_t)gpr8_number(reg); return true;
    case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
        op->kind = X86_OP_GPR; return true;
    case ZYDIS_REGCLASS_X87: op->kind = X86_OP_ST; return true;
    case ZYDIS_REGCLASS_MMX: op->kind = X86_OP_MMX; return true;
    case ZYDIS_REGCLASS_XMM: case ZYDIS_REGCLASS_YMM:
        op->kind = X86_OP_VEC; return op->reg < 16;
    case ZYDIS_REGCLASS_SEGMENT: op->kind = X86_OP_SEG; op->size = 2; return true;
    case ZYDIS_REGCLASS_CONTROL: op->kind = X86_OP_CR; op->size = 8; return true;
    case ZYDIS_REGCLASS_DEBUG: op->kind = X86_OP_DR; op->size = 8; return true;
    default: return false;
    }
}

static uint8_t address_register(ZydisRegister reg)
{
    if (reg == ZYDIS_REGISTER_NONE)
        return X86_NOREG;
    if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP || reg == ZYDIS_REGISTER_IP)
        return X86_REG_RIP;
    return (uint8_t)ZydisRegisterGetId(reg);
}

static uint8_t segment_number(ZydisRegister reg)
{
    switch (reg) {
    case ZYDIS_REGISTER_ES: return X86_ES;
    case ZYDIS_REGISTER_CS: return X86_CS;
    case ZYDIS_REGISTER_SS: return X86_SS;
    case ZYDIS_REGISTER_FS: return X86_FS;
    case ZYDIS_REGISTER_GS: return X86_GS;
    default: return X86_DS;
    }
}

static void take_memory(const ZydisDecodedOperand *z, x86_insn *in, x86_operand *op)
{
    in->flags |= X86_IF_MEM;
    in->seg = segment_number(z->mem.segment);
    in->base = address_register(z->mem.base);
    in->index = address_register(z->mem.index);
    in->scale = in->index == X86_NOREG ? 1 : z->mem.scale;
    in->disp = z->mem.disp.value;
    bool is_moffs = z->encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64;
    op->kind = is_moffs ? X86_OP_MOFFS : X86_OP_MEM;
    op->size = z->mem.type == ZYDIS_MEMOP_TYPE_AGEN ? 0 : (uint8_t)(z->size / 8);
}

static uint8_t operand_field(ZydisOperandEncoding encoding)
{
    switch (encoding) {
    case ZYDIS_OPERAND_ENCODING_MODRM_REG: return X86_ENC_REG;
    case ZYDIS_OPERAND_ENCODING_MODRM_RM: return X86_ENC_RM;
    case ZYDIS_OPERAND_ENCODING_OPCODE: return X86_ENC_OPCODE;
    case ZYDIS_OPERAND_ENCODING_NDSNDD: return X86_ENC_VVVV;
    case ZYDIS_OPERAND_ENCODING_IS4: return X86_ENC_IS4;
    default: return X86_ENC_NONE;
    }
}

static bool take_operands(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *z, x86_insn *in)
{
    unsigned imms = 0;
    for (unsigned i = 0; i < zi->operand_count_visible; i++) {
        if (in->nops == 4)
            return true;          /* VPERMIL2 and the like: no row will claim them */
        x86_operand *op = &in->op[in->nops++];
        op->enc = operand_field(z[i].encoding);
        switch (z[i].type) {
        case ZYDIS_OPERAND_TYPE_REGISTER:
            if (!take_register(z[i].reg.value, op))
                return false;
            break;
        case ZYDIS_OPERAND_TYPE_MEMORY:
            take_memory(&z[i], in, op);
            break;
        case ZYDIS_OPERAND_TYPE_POINTER:
            op->kind = X86_OP_FAR;
            op->size = in->osz;
            in->imm = z[i].ptr.offset;
            in->sel = z[i].ptr.segment;
            break;
        case ZYDIS_OPERAND_TYPE_IMMEDIATE:
            op->kind = z[i].imm.is_relative ? X86_OP_REL : X86_OP_IMM;
            op->size = (uint8_t)(z[i].size / 8);
            if (imms++)
                in->sel = (uint16_t)z[i].imm.value.u;
            else
                in->imm = z[i].imm.value.u;
            break;
        default:
            return false;
        }
    }
    return true;
}

/* ---- everything else ---- */

static void take_layout(const ZydisDecodedInstruction *zi, x86_insn *in)
{
    const unsigned modrm = zi->raw.modrm.offset, disp = zi->raw.disp.size ? zi->raw.disp.offset : 0;
    const unsigned imm = zi->raw.imm[0].size ? zi->raw.imm[0].offset : 0;
    in->modrm_off = (uint8_t)modrm;
    in->disp_off = (uint8_t)disp;
    in->disp_size = zi->raw.disp.size / 8;
    in->imm_off = (uint8_t)imm;
    in->imm_size = (uint8_t)((zi->raw.imm[0].size + zi->raw.imm[1].size) / 8);
    in->imm_signed = zi->raw.imm[0].is_signed;
    unsigned after = modrm ? modrm : disp ? disp : imm ? imm : in->length;
    if (zi->mnemonic == ZYDIS_MNEMONIC_JMP || zi->mnemonic == ZYDIS_MNEMONIC_CALL)
        if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR && !modrm)
            after = in->length - (in->osz == 2 ? 4u : 6u);
    in->opcode_off = (uint8_t)(after - 1);
    in->opcode = zi->opcode;
    in->modrm = modrm ? in->bytes[modrm] : 0;
    switch (zi->opcode_map) {
    case ZYDIS_OPCODE_MAP_0F: in->map = 1; break;
    case ZYDIS_OPCODE_MAP_0F38: in->map = 2; break;
    case ZYDIS_OPCODE_MAP_0F3A: in->map = 3; break;
    default: in->map = 0; break;
    }
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX) {
        in->flags |= X86_IF_VEX;
        in->vl = zi->avx.vector_length == 256 ? 32 : 16;
        uint8_t last = in->bytes[zi->raw.vex.offset + zi->raw.vex.size - 1];
        in->vvvv = (~last >> 3) & (in->mode == 8 ? 15 : 7);
    } else if (zi->attributes & ZYDIS_ATTRIB_HAS_REX) {
        in->rex = in->bytes[zi->raw.rex.offset];
    }
}

/* F2 and F3 select each other: the last one counts (APM vol. 3, 1.2.6). A segment override counts unless 64-bit mode ignores it. */
static void take_prefixes(const ZydisDecodedInstruction *zi, x86_insn *in)
{
    for (unsigned i = 0; i < zi->raw.prefix_count; i++) {
        switch (zi->raw.prefixes[i].value) {
        case 0xf2: in->flags = (in->flags & ~X86_IF_REP) | X86_IF_REPNE; break;
        case 0xf3: in->flags = (in->flags & ~X86_IF_REPNE) | X86_IF_REP; break;
        default: break;
        }
    }
    if (zi->attributes & ZYDIS_ATTRIB_HAS_LOCK)
        in->flags |= X86_IF_LOCK;
    static const struct { ZydisInstructionAttributes attribute; uint8_t seg; } overrides[] = {
        { ZYDIS_ATTRIB_HAS_SEGMENT_CS, X86_CS }, { ZYDIS_ATTRIB_HAS_SEGMENT_SS, X86_SS },
        { ZYDIS_ATTRIB_HAS_SEGMENT_DS, X86_DS }, { ZYDIS_ATTRIB_HAS_SEGMENT_ES, X86_ES },
        { ZYDIS_ATTRIB_HAS_SEGMENT_FS, X86_FS }, { ZYDIS_ATTRIB_HAS_SEGMENT_GS, X86_GS } };
    in->seg = X86_DS;
    for (unsigned i = 0; i < 6; i++)
        if ((zi->attributes & overrides[i].attribute) && (in->mode != 8 || overrides[i].seg >= X86_FS)) {
            in->seg = overrides[i].seg;
            in->flags |= X86_IF_SEGOVR;
        }
}

static bool is_shift(unsigned mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR: case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD: return true;
    default: return false;
    }
}

static void take_flags(const ZydisDecodedInstruction *zi, x86_insn *in)
{
    const ZydisAccessedFlags *f = zi->cpu_flags;
    if (!f)
        return;
    in->flags_read = f->tested & 0xfff;
    in->flags_written = (f->modified | f->set_0 | f->set_1 | f->undefined) & 0xfff;
    bool is_maybe = false;
    unsigned undefined = 0;      /* undefined results that hosts may take from the old flags */
    if (is_shift(zi->mnemonic)) {
        unsigned last = in->nops ? in->nops - 1u : 0;
        undefined = f->undefined & 0xfff;
        if (in->op[last].kind != X86_OP_IMM)
            is_maybe = true;
        else if (!(in->imm & (in->op[0].size == 8 ? 63 : 31)))
            in->flags_written = undefined = 0;
        if (zi->mnemonic == ZYDIS_MNEMONIC_RCL || zi->mnemonic == ZYDIS_MNEMONIC_RCR)
            in->flags_read |= X86_FL_CF, undefined |= X86_FL_CF;   /* 8- and 16-bit counts that come out as zero */
    }
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_CMPSB: case ZYDIS_MNEMONIC_CMPSW: case ZYDIS_MNEMONIC_CMPSD: case ZYDIS_MNEMONIC_CMPSQ:
    case ZYDIS_MNEMONIC_SCASB: case ZYDIS_MNEMONIC_SCASW: case ZYDIS_MNEMONIC_SCASD: case ZYDIS_MNEMONIC_SCASQ:
        if (in->flags & X86_IF_STRING)
            is_maybe = in->flags & (X86_IF_REP | X86_IF_REPNE);
        break;
    case ZYDIS_MNEMONIC_BSF: case ZYDIS_MNEMONIC_BSR: case ZYDIS_MNEMONIC_DIV: case ZYDIS_MNEMONIC_IDIV:
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_MUL: case ZYDIS_MNEMONIC_IMUL: case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT:
        undefined = f->undefined & 0xfff;
        break;
    default:
        break;
    }
    in->flags_maybe = is_maybe ? in->flags_written : undefined & in->flags_written;
    in->flags_written &= (uint16_t)~in->flags_maybe;
}

/* NATIVE holds only when no general register, segment or memory operand is implied (renaming could not reach it). */
static bool is_renamable(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *z)
{
    for (unsigned i = 0; i < zi->operand_count; i++) {
        if (z[i].visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT)
            continue;
        if (z[i].type == ZYDIS_OPERAND_TYPE_MEMORY)
            return false;
        if (z[i].type != ZYDIS_OPERAND_TYPE_REGISTER)
            continue;
        switch (ZydisRegisterGetClass(z[i].reg.value)) {
        case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
        case ZYDIS_REGCLASS_IP: case ZYDIS_REGCLASS_SEGMENT:
            return false;
        default:
            break;
        }
    }
    return true;
}

static const row *find_row(const ZydisDecodedInstruction *zi, const x86_insn *in)
{
    unsigned variant = zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ? FAR_FORM : PLAIN;
    bool is_vec = zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;
    for (unsigned i = 0; i < in->nops; i++)
        switch (in->op[i].kind) {
        case X86_OP_SEG: variant = SEG_FORM; break;
        case X86_OP_CR: variant = CR_FORM; break;
        case X86_OP_DR: variant = DR_FORM; break;
        case X86_OP_MMX: case X86_OP_VEC: is_vec = true; break;
        default: break;
        }
    if (variant != PLAIN)
        for (const variant_row *v = variant_rows; v->r.exec; v++)
            if (v->mnemonic == zi->mnemonic && v->variant == variant)
                return &v->r;
    if (is_vec && vec_rows[zi->mnemonic].exec)
        return &vec_rows[zi->mnemonic];
    if (zi->meta.isa_ext == ZYDIS_ISA_EXT_KNC || zi->meta.isa_ext == ZYDIS_ISA_EXT_KNCE)
        return NULL;              /* Xeon Phi's VEX forms of POPCNT and its like */
    if (plain_rows[zi->mnemonic].exec && !(is_vec && (plain_rows[zi->mnemonic].flags & X86_IF_STRING)))
        return &plain_rows[zi->mnemonic];
    if (isa_rows[zi->meta.isa_set].exec)
        return &isa_rows[zi->meta.isa_set];
    return NULL;
}

static void make_illegal(x86_insn *in, unsigned length, x86_exec_fn exec)
{
    uint8_t mode = in->mode, bytes[15];
    memcpy(bytes, in->bytes, 15);
    memset(in, 0, sizeof *in);
    memcpy(in->bytes, bytes, 15);
    in->exec = exec;
    in->mode = mode;
    in->length = (uint8_t)length;
    in->osz = in->asz = mode;
    in->base = in->index = X86_NOREG;
    in->scale = 1;
    in->seg = X86_DS;
    in->flags = X86_IF_END | X86_IF_BRANCH;
}

static void init_decoder(ZydisDecoder *d, unsigned code_size)
{
    static const struct { ZydisMachineMode mode; ZydisStackWidth width; } modes[3] = {
        { ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16 }, { ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32 },
        { ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64 } };
    unsigned i = code_size == 8 ? 2 : code_size == 4 ? 1 : 0;
    ZydisDecoderInit(d, modes[i].mode, modes[i].width);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_AMD_BRANCHES, ZYAN_TRUE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_WBNOINVD, ZYAN_FALSE);
}

/* How many bytes it took to see that the encoding is illegal. */
static unsigned illegal_length(const ZydisDecoder *d, const uint8_t *bytes, unsigned avail)
{
    ZydisDecodedInstruction zi;
    for (unsigned n = 1; n < avail; n++)
        if (ZydisDecoderDecodeInstruction(d, ZYAN_NULL, bytes, n, &zi) != ZYDIS_STATUS_NO_MORE_DATA)
            return n;
    return avail;
}

static bool is_modelled(const ZydisDecodedInstruction *zi)
{
    if (zi->opcode_map == ZYDIS_OPCODE_MAP_0F && zi->opcode == 0x0d && zi->raw.modrm.mod == 3)
        return false; /* PREFETCHW takes memory only (APM vol. 3) */
    return zi->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY || zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;
}

/* mod = 0 with SIB base 5 is disp32 without a base, whatever REX.B says. */
static bool has_no_base(const ZydisDecodedInstruction *zi)
{
    return zi->raw.modrm.offset && zi->raw.modrm.mod == 0 && zi->raw.sib.offset && zi->raw.sib.base == 5;
}

int x86_decode(const uint8_t *bytes, unsigned avail, unsigned code_size, x86_insn *in)
{
    ZydisDecoder d;
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand z[ZYDIS_MAX_OPERAND_COUNT];
    memset(in, 0, sizeof *in);
    if (avail > 15)
        avail = 15;
    memcpy(in->bytes, bytes, avail);
    in->mode = (uint8_t)code_size;
    if (!avail)
        return -1;
    init_decoder(&d, code_size);
    ZyanStatus status = ZydisDecoderDecodeFull(&d, in->bytes, avail, &zi, z);
    if (status == ZYDIS_STATUS_NO_MORE_DATA && avail < 15)
        return -1;
    if (!ZYAN_SUCCESS(status)) {
        bool is_long = status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG || status == ZYDIS_STATUS_NO_MORE_DATA;
        make_illegal(in, is_long ? 15 : illegal_length(&d, in->bytes, avail), is_long ? too_long : x86_op_illegal);
        return 0;
    }
    in->length = zi.length;
    memset(in->bytes + zi.length, 0, 15u - zi.length);
    in->mnemonic = (uint16_t)zi.mnemonic;
    in->osz = zi.operand_width / 8;
    in->asz = zi.address_width / 8;
    in->base = in->index = X86_NOREG;
    in->scale = 1;
    take_prefixes(&zi, in);
    const uint16_t prefix_flags = in->flags;
    in->flags &= (uint16_t)~(X86_IF_REP | X86_IF_REPNE);
    const row *r = take_operands(&zi, z, in) && is_modelled(&zi) ? find_row(&zi, in) : NULL;
    if (!r) {
        make_illegal(in, zi.length, x86_op_illegal);
        return 0;
    }
    in->exec = r->exec;
    in->flags |= r->flags;
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_MMX)
            in->flags |= X86_IF_FPU;
    if (in->flags & X86_IF_STRING)
        in->flags |= prefix_flags & (X86_IF_REP | X86_IF_REPNE);
    take_layout(&zi, in);
    if (has_no_base(&zi) && (in->flags & X86_IF_MEM)) {
        in->base = X86_NOREG;
        in->disp = zi.raw.disp.value;
    }
    take_flags(&zi, in);
    if ((in->flags & X86_IF_NATIVE) && !is_renamable(&zi, z))
        in->flags &= (uint16_t)~X86_IF_NATIVE;
    if (code_size == 8 && (in->flags & X86_IF_BRANCH) && zi.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE &&
        zi.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR)
        in->osz = (zi.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE) && !(in->rex & 8) ? 2 : 8;
    in->cc = in->opcode & 15;
    x86_specialise(in);
    return 0;
}

void x86_format(const x86_insn *in, uint64_t rip, char *buf, size_t bytes)
{
    ZydisDecoder d;
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand z[ZYDIS_MAX_OPERAND_COUNT];
    ZydisFormatter f;
    init_decoder(&d, in->mode);
    if (!bytes)
        return;
    buf[0] = 0;
    if (ZYAN_FAILED(ZydisDecoderDecodeFull(&d, in->bytes, in->length, &zi, z)) ||
        ZYAN_FAILED(ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL)) ||
        ZYAN_FAILED(ZydisFormatterFormatInstruction(&f, &zi, z, zi.operand_count_visible, buf, bytes, rip, ZYAN_NULL)))
        strncat(buf, "(illegal)", bytes - 1);
}
