/* forms.c - decoding by form: instructions that differ only in displacement and immediate are decoded once.
 *
 * What an instruction is follows from its prefixes, opcode, ModRM and SIB. A form is x86_decode()'s answer for such bytes,
 * kept under them; another instruction of the form is a copy with its own displacement and immediate. Nothing here decodes:
 * the tables only say where those bytes end, and leave out every opcode whose answer could depend on what follows them.
 */
#include <string.h>
#include "x86/access.h"
#include "x86/insn.h"

/* NOT: not kept. BARE: no ModRM. COUNT: a shift by an immediate, which settles the flags: part of the form. */
enum { NOT, BARE, MODRM, COUNT };
#define N NOT
#define B BARE
#define M MODRM
#define C COUNT
static const uint8_t one_byte[256] = {
    M, M, M, M, B, B, N, N, M, M, M, M, B, B, N, N, M, M, M, M, B, B, N, N, M, M, M, M, B, B, N, N, /* 00 ADD OR ADC SBB */
    M, M, M, M, B, B, N, N, M, M, M, M, B, B, N, N, M, M, M, M, B, B, N, N, M, M, M, M, B, B, N, N, /* 20 AND SUB XOR CMP */
    N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, /* 40 -, PUSH POP */
    N, N, N, M, N, N, N, N, B, M, B, M, N, N, N, N, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, /* 60 -, Jcc */
    M, M, N, M, M, M, M, M, M, M, M, M, N, M, N, N, B, B, B, B, B, B, B, B, B, B, N, N, B, B, N, N, /* 80 MOV, XCHG */
    N, N, N, N, B, B, N, N, B, B, B, B, N, N, N, N, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, /* A0 strings, MOV */
    C, C, N, B, N, N, M, M, N, B, N, N, B, N, N, N, M, M, M, M, N, N, N, N, M, M, M, M, M, M, M, M, /* C0 shifts, x87 */
    N, N, N, N, N, N, N, N, B, B, N, B, B, B, B, B, N, N, N, N, B, N, M, M, B, B, B, B, B, B, M, M, /* E0 CALL JMP */
};
static const uint8_t two_byte[256] = {
    N, N, N, N, N, B, N, N, N, N, N, B, N, M, N, N, M, M, M, M, M, M, M, M, N, N, N, N, N, N, M, M, /* 00 SYSCALL, MOVUPS */
    N, N, N, N, N, N, N, N, M, M, M, M, M, M, M, M, B, B, B, N, N, N, N, N, N, N, N, N, N, N, N, N, /* 20 MOVAPS */
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, /* 40 CMOVcc, SSE */
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, N, N, N, N, M, M, M, N, N, N, N, N, N, N, M, M, /* 60 SSE */
    B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, /* 80 Jcc, SETcc */
    N, N, B, M, C, M, N, N, N, N, N, M, C, M, M, M, M, M, N, M, N, N, M, M, M, N, M, M, M, M, M, M, /* A0 BT, MOVZX */
    M, M, N, M, N, N, N, M, B, B, B, B, B, B, B, B, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, /* C0 XADD, BSWAP */
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, N, /* E0 SSE */
};
#undef N
#undef B
#undef M
#undef C

static bool is_prefix(uint8_t b)
{
    return b == 0x66 || b == 0x67 || b == 0xf2 || b == 0xf3 || b == 0xf0 || b == 0x2e || b == 0x36 || b == 0x3e || b == 0x26 ||
           b == 0x64 || b == 0x65;
}

enum { KEY_BYTES = 7, PREFIXES = 3 };

/* How many bytes say what form it is; 0: one that is not kept. */
static unsigned form_bytes(const uint8_t bytes[15], unsigned code_size)
{
    unsigned i = 0;
    bool short_addresses = code_size == 2;
    for (; i < PREFIXES && is_prefix(bytes[i]); i++)
        if (bytes[i] == 0x67)
            short_addresses = code_size == 4;
    if (code_size == 8 && (bytes[i] & 0xf0) == 0x40)
        i++;
    unsigned kind = one_byte[bytes[i]];
    if (bytes[i++] == 0x0f)
        kind = two_byte[bytes[i++]];
    if (kind <= BARE)
        return kind ? i : 0;
    uint8_t modrm = bytes[i++];
    if (modrm < 0xc0 && (modrm & 7) == 4 && !short_addresses)
        i++;
    if (kind == COUNT && modrm < 0xc0)
        return 0;
    i += kind == COUNT;
    return i <= KEY_BYTES ? i : 0;
}

static uint64_t key_of(const uint8_t bytes[15], unsigned n, unsigned code_size)
{
    uint64_t key;
    memcpy(&key, bytes, 8);
    return (key & ((UINT64_C(1) << 8 * n) - 1)) | (uint64_t)(n | code_size << 4) << 56;
}

static uint64_t field(const uint8_t bytes[15], unsigned at, unsigned size, bool is_signed)
{
    uint64_t v = 0;
    memcpy(&v, bytes + at, size);
    unsigned shift = 64 - 8 * size;
    return is_signed ? (uint64_t)((int64_t)(v << shift) >> shift) : v;
}

/* The guest's next bytes, taken once: another vCPU may be writing them. Zeros follow the last of them. */
static void take_code(uint8_t once[16], const uint8_t *bytes, unsigned avail)
{
    if (avail == 15) {
        uint64_t low = x86_load_host(bytes, 8), high = x86_load_host(bytes + 7, 8);
        memcpy(once, &low, 8), memcpy(once + 7, &high, 8);
    } else {
        for (unsigned i = 0; i < 15; i++)
            once[i] = i < avail ? (uint8_t)x86_load_host(bytes + i, 1) : 0;
    }
    once[15] = 0;
}

/* `in` is a copy of its form: what is its own. */
static void fill_in(x86_insn *in, const uint8_t once[15])
{
    uint64_t mask = in->length >= 8 ? ~UINT64_C(0) : (UINT64_C(1) << 8 * in->length) - 1, low, high = 0;
    memcpy(&low, once, 8);
    low &= mask;
    if (in->length > 8) {
        memcpy(&high, once + 7, 8);
        high &= (UINT64_C(1) << 8 * (in->length - 7)) - 1;
    } else
        high = low >> 56;
    memcpy(in->bytes, &low, 8), memcpy(in->bytes + 7, &high, 8);
    if (in->disp_size)
        in->disp = (int64_t)field(once, in->disp_off, in->disp_size, true);
    if (in->imm_size)
        in->imm = field(once, in->imm_off, in->imm_size, in->imm_signed);
}

int x86_decode_again(x86_form *forms, const uint8_t *bytes, unsigned avail, unsigned code_size, x86_insn *in)
{
    uint8_t once[16];
    take_code(once, bytes, avail);
    unsigned n = form_bytes(once, code_size);
    if (!n)
        return x86_decode(once, avail, code_size, in);
    uint64_t key = key_of(once, n, code_size);
    x86_form *f = &forms[key * UINT64_C(0x9e3779b97f4a7c15) >> (64 - X86_FORM_BITS)];
    if (f->key == key && f->in.length <= avail) {
        *in = f->in;
        fill_in(in, once);
        return 0;
    }
    int status = x86_decode(once, avail, code_size, in);
    if (!status && in->mnemonic) { /* illegal ones keep more bytes than they have */
        f->key = key;
        f->in = *in;
    }
    return status;
}
