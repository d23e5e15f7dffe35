/* reencode.c - x86_reencode against Zydis: every encoding the decoder calls native, in each mode, is spelled with random
 * register names and memory operands, and what Zydis reads back must be the same instruction with exactly those names.
 */
#include "test.h"
#include "x86/native.h"

#include <Zydis/Zydis.h>

static uint32_t seed = 12345;
static uint32_t rnd(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

static bool gpr_is(ZydisRegister reg, unsigned number, bool is_high)
{
    if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH)
        return is_high && (unsigned)(reg - ZYDIS_REGISTER_AH) == number;
    if (is_high)
        return false;
    if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_BL)
        return (unsigned)(reg - ZYDIS_REGISTER_AL) == number;
    if (reg >= ZYDIS_REGISTER_SPL && reg <= ZYDIS_REGISTER_R15B)
        return (unsigned)(reg - ZYDIS_REGISTER_SPL) + 4 == number;
    return (unsigned)ZydisRegisterGetId(reg) == number;
}

static const char *text(const x86_insn *in)
{
    static char buf[160];
    x86_format(in, 0, buf, sizeof buf);
    return buf;
}

static bool is_short_accumulator(const x86_insn *in)
{
    return in->map == 0 && !(in->flags & X86_IF_VEX);
}

/* What one operand of the new spelling must be; NULL: it is. */
static const char *operand_error(const x86_insn *in, unsigned i, const ZydisDecodedOperand *z, const x86_rename *map)
{
    const x86_operand *op = &in->op[i];
    switch (op->kind) {
    case X86_OP_GPR: {
        bool is_high = op->reg >= 16, named = op->enc != X86_ENC_NONE || (op->reg == 0 && is_short_accumulator(in));
        unsigned guest = op->reg & 15, want = named ? map->gpr[guest] : guest;
        if (z->type != ZYDIS_OPERAND_TYPE_REGISTER || !gpr_is(z->reg.value, want, is_high))
            return "register";
        return z->size / 8 == op->size ? NULL : "register size";
    }
    case X86_OP_VEC: case X86_OP_MMX:
        if (z->type != ZYDIS_OPERAND_TYPE_REGISTER)
            return "vector register";
        if ((unsigned)ZydisRegisterGetId(z->reg.value) !=
            (op->kind == X86_OP_VEC && map->rename_vec && op->enc != X86_ENC_NONE ? map->vec[op->reg] : op->reg))
            return "vector register number";
        return (unsigned)ZydisRegisterGetWidth(ZYDIS_MACHINE_MODE_LONG_64, z->reg.value) / 8 == op->size ? NULL : "vector size";
    case X86_OP_MEM: case X86_OP_MOFFS:
        if (map->mem_kind == X86_RENAME_MEM_REG)
            return z->type == ZYDIS_OPERAND_TYPE_REGISTER && (unsigned)ZydisRegisterGetId(z->reg.value) == map->mem_base
                       ? NULL : "memory replaced by register";
        if (z->type != ZYDIS_OPERAND_TYPE_MEMORY || !gpr_is(z->mem.base, map->mem_base, false))
            return "base";
        if (map->mem_index == X86_NOREG ? z->mem.index != ZYDIS_REGISTER_NONE
                                        : !gpr_is(z->mem.index, map->mem_index, false) || z->mem.scale != map->mem_scale)
            return "index";
        if (z->mem.disp.value != map->mem_disp)
            return "displacement";
        if (op->size && (z->mem.segment == ZYDIS_REGISTER_GS) != map->mem_gs)      /* LEA has no segment */
            return "segment";
        return op->size == 0 || z->size / 8 == op->size ? NULL : "memory size";
    case X86_OP_IMM:
        return z->type == ZYDIS_OPERAND_TYPE_IMMEDIATE && (z->imm.value.u == (in->imm) || z->imm.value.u == in->sel ||
               (op->size < 8 && ((z->imm.value.u ^ in->imm) & ((UINT64_C(1) << 8 * op->size) - 1)) == 0)) ? NULL : "immediate";
    default:
        return NULL;
    }
}

static void random_map(x86_rename *map)
{
    static const int32_t disps[] = { 0, 0, 8, -128, 127, 128, -129, 0x12345678, INT32_MIN };
    static const uint8_t scales[] = { 1, 2, 4, 8 };
    x86_rename_init(map);
    for (unsigned i = 0; i < 16; i++)
        map->gpr[i] = (uint8_t)(rnd() & 15), map->vec[i] = (uint8_t)(rnd() & 15);
    map->rename_vec = rnd() & 1;
    map->mem_base = rnd() & 15;
    map->mem_gs = !(rnd() & 3);
    map->mem_disp = disps[rnd() % 9];
    if (!(rnd() & 3)) {
        map->mem_index = rnd() & 15;
        map->mem_scale = scales[rnd() & 3];
        if (map->mem_index == 4)
            map->mem_index = X86_NOREG;
    }
}

static bool needs_high_byte(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_GPR && in->op[i].reg >= 16)
            return true;
    return false;
}

static unsigned done, refused;

static void check_one(const uint8_t *bytes, unsigned mode, ZydisDecoder *decoder)
{
    x86_insn in;
    x86_rename map;
    uint8_t out[X86_REENCODE_MAX];
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand z[ZYDIS_MAX_OPERAND_COUNT];
    if (x86_decode(bytes, 15, mode, &in) || !(in.flags & X86_IF_NATIVE))
        return;
    for (unsigned k = 0; k < 2; k++) {
        random_map(&map);
        if (k == 1 && !(in.flags & X86_IF_MEM))
            break;
        if (k == 1)
            map.mem_index = X86_NOREG, map.mem_disp = 0;
        unsigned n = x86_reencode(&in, &map, out);
        if (n == 0) {
            refused++;
            if (!needs_high_byte(&in) && in.map != 0)
                FAIL("refused %s in mode %u", text(&in), mode);
            continue;
        }
        if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, out, n, &zi, z)) || zi.length != n)
            FAIL("%s in mode %u: %u bytes %02x %02x %02x %02x %02x do not decode", text(&in), mode, n, out[0], out[1], out[2],
                 out[3], out[4]);
        if (zi.mnemonic != in.mnemonic)
            FAIL("%s in mode %u became %s", text(&in), mode, ZydisMnemonicGetString(zi.mnemonic));
        if (zi.operand_count_visible != in.nops && in.nops < 4)
            FAIL("%s in mode %u: %u operands", text(&in), mode, zi.operand_count_visible);
        for (unsigned i = 0; i < in.nops; i++) {
            const char *error = operand_error(&in, i, &z[i], &map);
            if (error)
                FAIL("%s in mode %u, operand %u: %s (%02x %02x %02x %02x %02x %02x %02x)", text(&in), mode, i, error, out[0],
                     out[1], out[2], out[3], out[4], out[5], out[6]);
        }
        done++;
    }
}

/* Prefixes, REX or VEX, opcode, then random ModRM, SIB, displacement and immediate bytes. */
static unsigned make_bytes(uint8_t *b, unsigned mode, unsigned map, unsigned op)
{
    static const uint8_t prefixes[] = { 0x66, 0xf2, 0xf3, 0x67, 0x2e, 0x65 };
    unsigned n = 0;
    bool vex = map && (rnd() & 1);
    if (!(rnd() & 3))
        b[n++] = prefixes[3 + rnd() % 3];
    if (vex) {
        b[n++] = 0xc4;
        b[n++] = (uint8_t)((mode == 8 ? rnd() & 0xe0 : 0xe0) | map);
        b[n++] = (uint8_t)(rnd() | (rnd() & 1 ? 0x78 : mode == 8 ? 0 : 0x40));
    } else {
        for (unsigned i = rnd() & 3; i--;)
            b[n++] = prefixes[rnd() % 3];
        if (mode == 8 && rnd() & 1)
            b[n++] = (uint8_t)(0x40 | (rnd() & 15));
        if (map)
            b[n++] = 0x0f;
        if (map > 1)
            b[n++] = map == 2 ? 0x38 : 0x3a;
    }
    b[n++] = (uint8_t)op;
    while (n < 15)
        b[n++] = (uint8_t)rnd();
    return n;
}

TEST(every_native_encoding)
{
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    static const unsigned modes[] = { 8, 4, 2 };
    for (unsigned m = 0; m < 3; m++)
        for (unsigned map = 0; map < 4; map++)
            for (unsigned op = 0; op < 256; op++)
                for (unsigned k = 0; k < 300; k++) {
                    uint8_t b[15];
                    make_bytes(b, modes[m], map, op);
                    check_one(b, modes[m], &decoder);
                }
    printf("# %u spellings checked, %u refused\n", done, refused);
    CHECK(done > 100000);
    CHECK(refused < done / 8);      /* AH..BH under names that need a REX prefix */
}

/* MEM_REG turns the memory operand into a register. */
TEST(memory_to_register)
{
    static const uint8_t paddb[] = { 0x66, 0x0f, 0xfc, 0x0f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 };   /* paddb xmm1, [rdi] */
    static const uint8_t want[] = { 0x66, 0x41, 0x0f, 0xfc, 0xce };                              /* paddb xmm1, xmm14 */
    x86_insn in;
    x86_rename map;
    uint8_t out[X86_REENCODE_MAX];
    CHECK_EQ(x86_decode(paddb, 15, 8, &in), 0);
    x86_rename_init(&map);
    map.mem_kind = X86_RENAME_MEM_REG;
    map.mem_base = 14;
    CHECK_EQ(x86_reencode(&in, &map, out), sizeof want);
    CHECK(!memcmp(out, want, sizeof want));
}

/* AH..BH cannot stand beside a REX prefix. */
TEST(high_byte_registers)
{
    static const uint8_t add_ah_al[] = { 0x00, 0xc4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 };     /* add ah, al */
    x86_insn in;
    x86_rename map;
    uint8_t out[X86_REENCODE_MAX];
    CHECK_EQ(x86_decode(add_ah_al, 15, 8, &in), 0);
    x86_rename_init(&map);
    CHECK_EQ(x86_reencode(&in, &map, out), 2);
    map.gpr[0] = 8;
    CHECK_EQ(x86_reencode(&in, &map, out), 0);
}
