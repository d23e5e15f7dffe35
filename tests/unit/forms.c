/* forms.c - x86_decode_again against x86_decode: whatever was decoded before, the answer is the same, byte for byte. */
#include "test.h"
#include "x86/insn.h"

static uint64_t seed = 88172645463325252u;
static unsigned rnd(void)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (unsigned)(seed >> 20);
}

static const uint8_t prefixes[] = { 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x48, 0x41, 0x44, 0x4f, 0x40 };

/* Few ModRM and SIB bytes an opcode, so that forms come again; edges among the bytes after them. */
static void make_bytes(uint8_t b[15], unsigned op)
{
    static const uint8_t edge[] = { 0, 1, 0x1f, 0x20, 0x40, 0x7f, 0x80, 0xff };
    unsigned n = 0;
    for (unsigned k = rnd() % 4; k-- > 0;)
        b[n++] = prefixes[rnd() % sizeof prefixes];
    if (op >= 256)
        b[n++] = 0x0f;
    b[n++] = (uint8_t)op;
    b[n++] = (uint8_t)(rnd() % 4 * 0x40 + rnd() % 3 * 8 + 4 + rnd() % 3);
    b[n++] = rnd() % 2 ? 0x24 : 0xe5;
    while (n < 15)
        b[n++] = rnd() % 2 ? edge[rnd() % sizeof edge] : (uint8_t)rnd();
}

static const char *difference(const x86_insn *a, const x86_insn *b)
{
#define SAME(field) if (memcmp(&a->field, &b->field, sizeof a->field)) return #field;
    SAME(exec) SAME(imm) SAME(disp) SAME(mnemonic) SAME(flags) SAME(flags_read) SAME(flags_written) SAME(flags_maybe) SAME(sel)
    SAME(length) SAME(osz) SAME(asz) SAME(mode) SAME(seg) SAME(base) SAME(index) SAME(scale) SAME(cc) SAME(nops) SAME(op) SAME(vl)
    SAME(map) SAME(opcode) SAME(modrm) SAME(vvvv) SAME(rex) SAME(opcode_off) SAME(modrm_off) SAME(disp_off) SAME(disp_size)
    SAME(imm_off) SAME(imm_size) SAME(bytes)
#undef SAME
    return NULL;
}

/* A cache that has seen many forms answers as an empty one does: x86_decode(). */
static unsigned compare(x86_form *forms, unsigned mode, unsigned op, unsigned rounds)
{
    unsigned legal = 0;
    for (unsigned k = 0; k < rounds; k++) {
        uint8_t b[15];
        x86_insn fresh, again;
        make_bytes(b, op);
        unsigned avail = rnd() % 8 ? 15 : rnd() % 15 + 1;
        memset(&again, 0xa5, sizeof again);
        int want = x86_decode(b, avail, mode, &fresh), got = x86_decode_again(forms, b, avail, mode, &again);
        CHECK_EQ(got, want);
        if (got)
            continue;
        const char *field = difference(&fresh, &again);
        if (field)
            FAIL("mode %u, opcode %x, bytes %02x %02x %02x %02x %02x %02x %02x %02x: %s", mode, op, b[0], b[1], b[2], b[3], b[4],
                 b[5], b[6], b[7], field);
        legal += fresh.mnemonic != 0;
    }
    return legal;
}

TEST(same_as_decode)
{
    static const unsigned modes[] = { 2, 4, 8 };
    x86_form *forms = calloc(X86_FORMS, sizeof *forms);
    unsigned legal = 0, kept = 0;
    CHECK(forms != NULL);
    for (unsigned m = 0; m < 3; m++)
        for (unsigned op = 0; op < 512; op++)
            legal += compare(forms, modes[m], op, 300);
    for (unsigned i = 0; i < X86_FORMS; i++)
        kept += forms[i].key != 0;
    printf("# %u legal instructions, %u forms in the cache\n", legal, kept);
    CHECK(legal > 200000);
    CHECK(kept > X86_FORMS / 2);
    free(forms);
}
