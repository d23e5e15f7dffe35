/* reencode.c - spell a decoded guest instruction again as 64-bit host code with its operands renamed.
 *
 * Works on the decoded fields plus the raw prefix and immediate bytes. Three spellings: VEX (always with all fields
 * rebuilt), SSE/MMX/x87 (66/F2/F3 are part of the opcode) and general-purpose (66 and REX.W follow from the operand
 * size alone, because the guest's mode may have had another default). Pure: no state, never reads past in->bytes.
 */
#include "x86/native.h"

#include <Zydis/Mnemonic.h>
#include <string.h>

/* The parts of the instruction being made. */
typedef struct spelling {
    bool is_vex, p66, pf2, pf3, w, l;
    bool r, x, b;                  /* high bits of ModRM.reg, index, ModRM.rm or opcode register */
    bool need_rex, forbid_rex;     /* SPL..DIL; AH..BH */
    bool has_modrm, has_mem, keep_rm;
    uint8_t map, opcode, reg, rm, vvvv;
    uint8_t imm[8], imm_size;
} spelling;

void x86_rename_init(x86_rename *map)
{
    memset(map, 0, sizeof *map);
    for (unsigned i = 0; i < 16; i++)
        map->gpr[i] = map->vec[i] = (uint8_t)i;
    map->mem_index = X86_NOREG;
    map->mem_scale = 1;
}

/* Legacy prefixes and the VEX bits that only the raw bytes hold. */
static void scan_prefixes(const x86_insn *in, spelling *s)
{
    unsigned i = 0;
    for (; i < in->length; i++) {
        uint8_t c = in->bytes[i];
        if (c == 0x66)
            s->p66 = true;
        else if (c == 0xf2 || c == 0xf3)
            s->pf2 = c == 0xf2, s->pf3 = c == 0xf3;
        else if (c != 0x67 && c != 0xf0 && c != 0x26 && c != 0x2e && c != 0x36 && c != 0x3e && c != 0x64 && c != 0x65 &&
                 !(in->mode == 8 && (c & 0xf0) == 0x40))
            break;
    }
    if (!s->is_vex || i + 2 >= in->length)
        return;
    uint8_t last = in->bytes[i] == 0xc4 ? in->bytes[i + 2] : in->bytes[i + 1];
    s->w = in->bytes[i] == 0xc4 && last & 0x80;
    s->l = last & 4;
    s->vvvv = ~(last >> 3) & (in->mode == 8 ? 15 : 7);
    s->p66 = (last & 3) == 1;
    s->pf3 = (last & 3) == 2;
    s->pf2 = (last & 3) == 3;
}

static bool keeps_rep_prefix(unsigned mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_POPCNT: case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_CRC32: case ZYDIS_MNEMONIC_ADOX: case ZYDIS_MNEMONIC_RDPID:
        return true;
    default:
        return false;
    }
}

/* 66 and REX.W of a general-purpose instruction come from the operand size. */
static void size_prefixes(const x86_insn *in, spelling *s)
{
    unsigned size = in->osz;
    if (in->mnemonic == ZYDIS_MNEMONIC_CRC32)           /* the source decides 66, either decides W */
        size = in->op[0].size == 8 ? 8 : in->op[1].size;
    else if (in->mnemonic == ZYDIS_MNEMONIC_MOVNTI)     /* these know only 32 and 64 bits, whatever the default size */
        size = in->op[1].size;
    else if (in->mnemonic == ZYDIS_MNEMONIC_ADCX || in->mnemonic == ZYDIS_MNEMONIC_ADOX)
        size = in->op[0].size;
    s->p66 = size == 2 || in->mnemonic == ZYDIS_MNEMONIC_ADCX;
    s->w = size == 8;
    if (!keeps_rep_prefix(in->mnemonic))
        s->pf2 = s->pf3 = false;
}

static bool has_gpr(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (in->op[i].kind == X86_OP_GPR)
            return true;
    return false;
}

/* VEX.W selects a 64-bit register or memory integer, which only 64-bit mode has; elsewhere it is ignored (SDM vol. 2, 2.3.5.5). */
static bool is_w_ignored(const x86_insn *in)
{
    if (in->mode == 8)
        return false;
    if (in->map == 1)
        return has_gpr(in) || in->opcode == 0x2a || in->opcode == 0x6e || in->opcode == 0x7e;
    if (in->map == 2)
        return in->opcode >= 0xf0;
    return in->map == 3 && (has_gpr(in) || in->opcode == 0x16 || in->opcode == 0x22 || in->opcode >= 0xf0);
}

static bool is_vector_form(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (in->op[i].kind == X86_OP_VEC || in->op[i].kind == X86_OP_MMX || in->op[i].kind == X86_OP_ST)
            return true;
    return in->flags & (X86_IF_VEC | X86_IF_FPU);
}

/* Host number of a register operand with the REX consequences of byte registers; false: not encodable. */
static bool name_gpr(const x86_operand *op, const x86_rename *map, spelling *s, uint8_t *number)
{
    if (op->reg >= 16) {
        uint8_t host = map->gpr[(op->reg - 16) & 15];
        s->forbid_rex = true;
        *number = (uint8_t)(host + 4);
        return host < 4;
    }
    *number = map->gpr[op->reg];
    if (op->size == 1 && *number >= 4)
        s->need_rex = true;
    return true;
}

static bool place_operand(const x86_insn *in, const x86_operand *op, const x86_rename *map, spelling *s)
{
    uint8_t number = op->reg;
    if (op->kind == X86_OP_GPR) {
        if (op->enc != X86_ENC_NONE && !name_gpr(op, map, s, &number))
            return false;
    } else if (op->kind == X86_OP_VEC) {
        number = map->rename_vec ? map->vec[op->reg & 15] : op->reg;
    } else if (op->kind != X86_OP_MMX) {
        return true;                                     /* memory is placed by place_memory; ST(i) keeps ModRM */
    }
    switch (op->enc) {
    case X86_ENC_REG:
        s->reg = number & 7;
        s->r = number >= 8;
        break;
    case X86_ENC_RM:
        s->rm = number & 7;
        s->b = number >= 8;
        break;
    case X86_ENC_OPCODE:
        s->opcode = (uint8_t)((s->opcode & ~7u) | (number & 7));
        s->b = number >= 8;
        break;
    case X86_ENC_VVVV:
        s->vvvv = number;
        break;
    case X86_ENC_IS4:
        s->imm[0] = (uint8_t)(number << 4 | (in->mode == 8 ? s->imm[0] & 15 : 0));
        break;
    default:
        break;
    }
    return true;
}

static void use_modrm(spelling *s, uint8_t opcode, uint8_t reg)
{
    s->opcode = opcode;
    s->has_modrm = true;
    s->reg = reg;
}

/* Short forms that name the accumulator implicitly, and one-byte forms that 64-bit mode uses for something else: turn
 * them into their ModRM spelling with the register's host name. False: no such spelling. */
static bool expand_short_forms(const x86_insn *in, const x86_rename *map, spelling *s)
{
    uint8_t op = in->opcode;
    unsigned wide = op & 1;
    if (in->map != 0)
        return true;
    if (in->mode != 8 && (op & 0xf0) == 0x40) {          /* INC/DEC r: FE/FF /0, /1 */
        uint8_t number = map->gpr[op & 7];
        use_modrm(s, 0xff, op >> 3 & 1);
        s->rm = number & 7;
        s->b = number >= 8;
        return true;
    }
    if (op == 0x82 && in->mode != 8) {
        s->opcode = 0x80;
        return true;
    }
    uint8_t acc = map->gpr[0];
    bool is_alu = op < 0x40 && (op & 6) == 4, is_test = op == 0xa8 || op == 0xa9, is_moffs = op >= 0xa0 && op <= 0xa3;
    bool is_xchg = (op & 0xf8) == 0x90 && in->mnemonic == ZYDIS_MNEMONIC_XCHG;
    if (!is_alu && !is_test && !is_moffs && !is_xchg)
        return true;
    if (is_moffs) {
        use_modrm(s, (uint8_t)((op & 2 ? 0x88 : 0x8a) | wide), acc & 7);
        s->r = acc >= 8;
        s->need_rex = !wide && acc >= 4;
        s->has_mem = true;
    } else if (is_xchg) {                                /* the other register was placed in the opcode's low bits */
        uint8_t other = s->opcode & 7;
        use_modrm(s, 0x87, acc & 7);
        s->r = acc >= 8;
        s->rm = other;
    } else {
        use_modrm(s, (uint8_t)((is_test ? 0xf6 : 0x80) | wide), is_test ? 0 : op >> 3 & 7);
        s->rm = acc & 7;
        s->b = acc >= 8;
        s->need_rex = !wide && acc >= 4;
    }
    return true;
}

/* One-byte opcodes without a meaning, or with another one, in 64-bit mode; transfers of control; prefixes. */
static bool is_lost_in_64(const x86_insn *in)
{
    uint8_t op = in->opcode;
    if (in->map != 0)
        return false;
    if (op < 0x40)
        return (op & 7) >= 6;                            /* PUSH/POP sreg, BCD adjusts */
    return op == 0x60 || op == 0x61 || op == 0x62 || (op == 0x63 && in->mode != 8) || (op >= 0x70 && op <= 0x7f) ||
           op == 0x9a || op == 0xc2 || op == 0xc3 || (op >= 0xc8 && op <= 0xcf && op != 0xc9) || op == 0xd4 || op == 0xd5 ||
           op == 0xd6 || (op >= 0xe0 && op <= 0xef);
}

/* ModRM, SIB and displacement of the memory operand. Returns bytes written. */
static unsigned put_memory(const spelling *s, const x86_rename *map, uint8_t *out)
{
    bool indexed = map->mem_index != X86_NOREG, based = map->mem_base != X86_NOREG;
    unsigned n = 0, base = based ? map->mem_base & 7 : 5;
    bool need_sib = indexed || base == 4 || !based;
    bool small = map->mem_disp >= -128 && map->mem_disp <= 127;
    unsigned mod = !based || (map->mem_disp == 0 && base != 5) ? 0 : small ? 1 : 2;
    out[n++] = (uint8_t)(mod << 6 | s->reg << 3 | (need_sib ? 4 : base));
    if (need_sib) {
        unsigned scale = map->mem_scale == 8 ? 3 : map->mem_scale == 4 ? 2 : map->mem_scale == 2;
        out[n++] = (uint8_t)(scale << 6 | (indexed ? map->mem_index & 7 : 4) << 3 | base);
    }
    uint32_t disp = (uint32_t)map->mem_disp;
    for (unsigned i = 0; i < (!based ? 4u : mod == 0 ? 0 : mod == 1 ? 1u : 4u); i++)
        out[n++] = (uint8_t)(disp >> (8 * i));
    return n;
}

static unsigned put_vex(const spelling *s, uint8_t *out)
{
    uint8_t pp = s->p66 ? 1 : s->pf3 ? 2 : s->pf2 ? 3 : 0;
    uint8_t low = (uint8_t)((~s->vvvv & 15) << 3 | s->l << 2 | pp);
    if (s->map == 1 && !s->w && !s->x && !s->b) {
        out[0] = 0xc5;
        out[1] = (uint8_t)((s->r ? 0 : 0x80) | low);
        return 2;
    }
    out[0] = 0xc4;
    out[1] = (uint8_t)((s->r ? 0 : 0x80) | (s->x ? 0 : 0x40) | (s->b ? 0 : 0x20) | s->map);
    out[2] = (uint8_t)((s->w ? 0x80 : 0) | low);
    return 3;
}

/* Prefixes, REX and escape bytes. Returns bytes written, 0 on a REX conflict (a legal instruction may have none, hence +1). */
static unsigned put_legacy(const spelling *s, uint8_t *out)
{
    unsigned n = 0;
    if (s->p66)
        out[n++] = 0x66;
    if (s->pf2 || s->pf3)
        out[n++] = s->pf2 ? 0xf2 : 0xf3;
    uint8_t rex = (uint8_t)(0x40 | s->w << 3 | s->r << 2 | s->x << 1 | s->b);
    if (rex != 0x40 || s->need_rex) {
        if (s->forbid_rex)
            return 0;
        out[n++] = rex;
    }
    if (s->map)
        out[n++] = 0x0f;
    if (s->map >= 2)
        out[n++] = s->map == 2 ? 0x38 : 0x3a;
    return n + 1;
}

static unsigned put_all(const spelling *s, const x86_rename *map, uint8_t *out)
{
    unsigned n = 0;
    bool is_mem = s->has_mem && map->mem_kind == X86_RENAME_MEM_BASE;
    if (is_mem && map->mem_gs)
        out[n++] = 0x65;
    if (s->is_vex) {
        n += put_vex(s, out + n);
    } else {
        unsigned prefix = put_legacy(s, out + n);
        if (prefix == 0)
            return 0;
        n += prefix - 1;
    }
    unsigned rest = 1 + (s->has_modrm ? is_mem ? 6 : 1 : 0) + s->imm_size;
    if (n + rest > X86_REENCODE_MAX)
        return 0;
    out[n++] = s->opcode;
    if (is_mem)
        n += put_memory(s, map, out + n);
    else if (s->has_modrm)
        out[n++] = (uint8_t)(0xc0 | s->reg << 3 | s->rm);
    memcpy(out + n, s->imm, s->imm_size);
    return n + s->imm_size;
}

static unsigned memory_size(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (in->op[i].kind == X86_OP_MEM || in->op[i].kind == X86_OP_MOFFS)
            return in->op[i].size;
    return 0;
}

unsigned x86_reencode(const x86_insn *in, const x86_rename *map, uint8_t *out)
{
    spelling s = { .is_vex = in->flags & X86_IF_VEX, .map = in->map, .opcode = in->opcode };
    bool is_vector = is_vector_form(in);

    scan_prefixes(in, &s);
    if (!s.is_vex && is_lost_in_64(in))
        return 0;
    if (s.is_vex)
        s.w = s.w && !is_w_ignored(in);
    else if (is_vector)
        s.w = in->rex & 8, s.p66 = s.p66 && in->map != 0 && !s.pf2 && !s.pf3;
    else
        size_prefixes(in, &s);
    if (!s.is_vex && in->map == 0)
        s.pf2 = s.pf3 = false;
    if (in->imm_off && in->imm_size <= 8 && in->imm_off + in->imm_size <= in->length) {
        s.imm_size = in->imm_size;
        memcpy(s.imm, in->bytes + in->imm_off, in->imm_size);
    }
    s.has_modrm = in->modrm_off != 0;
    s.reg = in->modrm >> 3 & 7;
    s.rm = in->modrm & 7;
    s.has_mem = s.has_modrm && in->modrm < 0xc0;
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (!place_operand(in, &in->op[i], map, &s))
            return 0;
    if (!s.is_vex && !is_vector && !expand_short_forms(in, map, &s))
        return 0;
    if (in->opcode >= 0xa0 && in->opcode <= 0xa3 && in->map == 0 && !s.is_vex)
        s.imm_size = 0;                                  /* whatever the decoder calls the moffs bytes */
    if (s.has_mem) {
        bool is_vsib = s.is_vex && in->map == 2 && in->opcode >= 0x90 && in->opcode <= 0x93;
        if (is_vsib)
            return 0;
        s.b = map->mem_base != X86_NOREG && map->mem_base >= 8;
        s.x = map->mem_kind == X86_RENAME_MEM_BASE && map->mem_index != X86_NOREG && map->mem_index >= 8;
        if (map->mem_kind == X86_RENAME_MEM_REG) {
            s.rm = map->mem_base & 7;
            s.need_rex |= !is_vector && memory_size(in) == 1 && map->mem_base >= 4;
        }
    }
    return put_all(&s, map, out);
}
