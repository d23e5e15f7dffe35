/* op_bit.c - bit tests, scans and counts, BMI1/BMI2, CRC32, ADX, and the compare-and-exchange family. */
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

/* VEX-encoded general-purpose instructions exist in protected mode only (SDM vol. 2, 2.8). */
static void need_vex(x86_cpu *cpu)
{
    if (!x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
}

/* ---- BT, BTS, BTR, BTC: only CF changes ---- */

static inline uint64_t set_cf(uint64_t fl, uint64_t cf) { return (fl & ~(uint64_t)X86_FL_CF) | (cf & 1); }
static uint64_t do_bt(uint64_t *fl, uint64_t a, uint64_t b) { *fl = set_cf(*fl, a >> b); return a; }
static uint64_t do_bts(uint64_t *fl, uint64_t a, uint64_t b) { *fl = set_cf(*fl, a >> b); return a | UINT64_C(1) << b; }
static uint64_t do_btr(uint64_t *fl, uint64_t a, uint64_t b) { *fl = set_cf(*fl, a >> b); return a & ~(UINT64_C(1) << b); }
static uint64_t do_btc(uint64_t *fl, uint64_t a, uint64_t b) { *fl = set_cf(*fl, a >> b); return a ^ UINT64_C(1) << b; }

/* With a memory operand and a register bit offset, the offset is signed and reaches beyond the operand: the displacement
 * below is whole operands, added to the effective address before it wraps to the address size. */
static void bit_op(x86_cpu *cpu, const x86_insn *in, x86_alu_fn fn, bool is_write)
{
    const unsigned n = in->op[0].size;
    uint64_t b = x86_get_op(cpu, in, 1);
    x86_insn moved;
    if (in->op[0].kind == X86_OP_MEM && in->op[1].kind == X86_OP_GPR) {
        int64_t offset = n == 2 ? (int16_t)b : n == 4 ? (int32_t)b : (int64_t)b;
        moved = *in;
        moved.disp += (offset >> (n == 2 ? 4 : n == 4 ? 5 : 6)) * n;
        in = &moved;
    }
    b &= n * 8 - 1;
    if (is_write)
        x86_modify(cpu, in, fn, b);
    else
        fn(&cpu->rflags, x86_get_op(cpu, in, 0), b);
}

void x86_op_bt(x86_cpu *cpu, const x86_insn *in) { bit_op(cpu, in, do_bt, false); }
void x86_op_bts(x86_cpu *cpu, const x86_insn *in) { bit_op(cpu, in, do_bts, true); }
void x86_op_btr(x86_cpu *cpu, const x86_insn *in) { bit_op(cpu, in, do_btr, true); }
void x86_op_btc(x86_cpu *cpu, const x86_insn *in) { bit_op(cpu, in, do_btc, true); }

/* ---- scans and counts: run as they are, the old destination being an input (BSF of zero leaves it) ---- */

#define SCAN(name, text, n, T)                                                                                      \
    static uint64_t name##n(uint64_t *fl, uint64_t a, uint64_t b)                                                   \
    {                                                                                                               \
        uint16_t ax = x86_flags_to_ax(*fl);                                                                         \
        T x = (T)a;                                                                                                 \
        __asm__(X86_ASM_LOAD text " %2, %1" X86_ASM_SAVE : "+a"(ax), "+r"(x) : "r"((T)b) : "cc");                   \
        *fl = x86_flags_from_ax(*fl, ax);                                                                           \
        return x;                                                                                                   \
    }
#define SCAN_OP(name)                                                                                               \
    SCAN(name, #name "w", 2, uint16_t)                                                                              \
    SCAN(name, #name "l", 4, uint32_t)                                                                              \
    SCAN(name, #name "q", 8, uint64_t)                                                                              \
    void x86_op_##name(x86_cpu *cpu, const x86_insn *in)                                                            \
    {                                                                                                               \
        static const x86_alu_fn fn[4] = { NULL, name##2, name##4, name##8 };                                        \
        const x86_operand *op = &in->op[0];                                                                         \
        uint64_t b = x86_get_op(cpu, in, 1), a = x86_get_gpr(cpu, op->reg, op->size);                               \
        uint64_t v = fn[X86_SIZE_INDEX(op->size)](&cpu->rflags, a, b);                                              \
        x86_set_gpr(cpu, op->reg, op->size, v);                                                                     \
    }

/* BSF and BSR of zero leave the whole destination, upper half included, as it was (APM vol. 3): a 32-bit form must not
 * zero-extend then. */
#define BIT_SCAN(name)                                                                                              \
    SCAN(name, #name "w", 2, uint16_t)                                                                              \
    SCAN(name, #name "l", 4, uint32_t)                                                                              \
    SCAN(name, #name "q", 8, uint64_t)                                                                              \
    void x86_op_##name(x86_cpu *cpu, const x86_insn *in)                                                            \
    {                                                                                                               \
        static const x86_alu_fn fn[4] = { NULL, name##2, name##4, name##8 };                                        \
        const x86_operand *op = &in->op[0];                                                                         \
        uint64_t b = x86_get_op(cpu, in, 1) & X86_MASK(op->size);                                                   \
        uint64_t v = fn[X86_SIZE_INDEX(op->size)](&cpu->rflags, 0, b);                                              \
        if (b)                                                                                                      \
            x86_set_gpr(cpu, op->reg, op->size, v);                                                                 \
    }
BIT_SCAN(bsf)
BIT_SCAN(bsr)

/* Counts are computed here rather than run: the host may lack them. The flags that the manuals leave undefined are as AMD
 * cores make them, so that the JIT, which runs these instructions, agrees: TZCNT and LZCNT keep OF and clear the rest. */
static void count_result(x86_cpu *cpu, const x86_insn *in, uint64_t v, bool is_source_zero)
{
    cpu->rflags &= ~(uint64_t)(X86_FL_ARITH & ~X86_FL_OF);
    cpu->rflags |= (is_source_zero ? X86_FL_CF : 0) | (v ? 0 : X86_FL_ZF);
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, v);
}

void x86_op_tzcnt(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t b = x86_get_op(cpu, in, 1) & X86_MASK(in->op[0].size);
    count_result(cpu, in, b ? (uint64_t)__builtin_ctzll(b) : in->op[0].size * 8u, !b);
}

void x86_op_lzcnt(x86_cpu *cpu, const x86_insn *in)
{
    const unsigned bits = in->op[0].size * 8u;
    uint64_t b = x86_get_op(cpu, in, 1) & X86_MASK(in->op[0].size);
    count_result(cpu, in, b ? (uint64_t)__builtin_clzll(b) - (64 - bits) : bits, !b);
}

void x86_op_popcnt(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t b = x86_get_op(cpu, in, 1) & X86_MASK(in->op[0].size);
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | (b ? 0 : X86_FL_ZF);
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, (uint64_t)__builtin_popcountll(b));
}

/* CRC-32C, reflected polynomial 0x82f63b78, no inversions. */
void x86_op_crc32(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t b = x86_get_op(cpu, in, 1);
    uint32_t crc = (uint32_t)cpu->gpr[in->op[0].reg];
    for (unsigned i = 0; i < in->op[1].size; i++) {
        crc ^= (uint8_t)(b >> (8 * i));
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (0x82f63b78u & -(crc & 1));
    }
    x86_set_gpr(cpu, in->op[0].reg, 8, crc);
}

/* ---- BMI1, BMI2 ---- */

/* SF, ZF, PF of the result; OF = AF = 0; CF as given (AF and PF are undefined: see above). */
static void bmi_flags(x86_cpu *cpu, const x86_insn *in, uint64_t v, bool cf)
{
    const unsigned n = in->op[0].size;
    uint64_t f = (v >> (n * 8 - 1) & 1 ? X86_FL_SF : 0) | (v ? 0 : X86_FL_ZF) | (cf ? X86_FL_CF : 0) |
                 (__builtin_parity(v & 0xff) ? 0 : X86_FL_PF);
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | f;
    x86_set_gpr(cpu, in->op[0].reg, n, v);
}

void x86_op_andn(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t b = x86_get_op(cpu, in, 2);
    bmi_flags(cpu, in, ~x86_get_op(cpu, in, 1) & b & X86_MASK(in->op[0].size), false);
}

void x86_op_bextr(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t a = x86_get_op(cpu, in, 1) & X86_MASK(in->op[0].size), c = x86_get_op(cpu, in, 2);
    unsigned start = c & 0xff, length = c >> 8 & 0xff;
    uint64_t v = start > 63 ? 0 : a >> start;
    if (length < 64)
        v &= (UINT64_C(1) << length) - 1;
    bmi_flags(cpu, in, v, false);
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_SF) | X86_FL_AF;
}

void x86_op_blsi(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t a = x86_get_op(cpu, in, 1);
    bmi_flags(cpu, in, a & -a, a != 0);
}

void x86_op_blsmsk(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t a = x86_get_op(cpu, in, 1);
    bmi_flags(cpu, in, (a ^ (a - 1)) & X86_MASK(in->op[0].size), a == 0);
}

void x86_op_blsr(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t a = x86_get_op(cpu, in, 1);
    bmi_flags(cpu, in, a & (a - 1), a == 0);
}

void x86_op_bzhi(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    const unsigned bits = in->op[0].size * 8u;
    uint64_t a = x86_get_op(cpu, in, 1);
    unsigned index = x86_get_op(cpu, in, 2) & 0xff;
    bmi_flags(cpu, in, index < bits ? a & ((UINT64_C(1) << index) - 1) : a, index >= bits);
}

void x86_op_pdep(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t mask = x86_get_op(cpu, in, 2), a = x86_get_op(cpu, in, 1), v = 0;
    for (; mask; mask &= mask - 1, a >>= 1)
        if (a & 1)
            v |= mask & -mask;
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, v);
}

void x86_op_pext(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    uint64_t mask = x86_get_op(cpu, in, 2), a = x86_get_op(cpu, in, 1), v = 0;
    for (uint64_t bit = 1; mask; mask &= mask - 1, bit <<= 1)
        if (a & mask & -mask)
            v |= bit;
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, v);
}

void x86_op_rorx(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    const unsigned bits = in->op[0].size * 8u, count = in->imm & (bits - 1);
    uint64_t a = x86_get_op(cpu, in, 1);
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, count ? a >> count | a << (bits - count) : a);
}

static unsigned shift_count(x86_cpu *cpu, const x86_insn *in)
{
    need_vex(cpu);
    return x86_get_op(cpu, in, 2) & (in->op[0].size * 8u - 1);
}

void x86_op_shlx(x86_cpu *cpu, const x86_insn *in)
{
    unsigned count = shift_count(cpu, in);
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, x86_get_op(cpu, in, 1) << count);
}

void x86_op_shrx(x86_cpu *cpu, const x86_insn *in)
{
    unsigned count = shift_count(cpu, in);
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, x86_get_op(cpu, in, 1) >> count);
}

void x86_op_sarx(x86_cpu *cpu, const x86_insn *in)
{
    unsigned count = shift_count(cpu, in);
    uint64_t a = x86_get_op(cpu, in, 1);
    int64_t s = in->op[0].size == 4 ? (int32_t)a : (int64_t)a;
    x86_set_gpr(cpu, in->op[0].reg, in->op[0].size, (uint64_t)(s >> count));
}

/* ---- ADX: add with CF or OF as the only carry ---- */

static void add_carry(x86_cpu *cpu, const x86_insn *in, uint64_t flag)
{
    const unsigned n = in->op[0].size;
    unsigned __int128 sum = (unsigned __int128)x86_get_op(cpu, in, 1) + x86_get_op(cpu, in, 0) + !!(cpu->rflags & flag);
    cpu->rflags = (cpu->rflags & ~flag) | (sum >> (n * 8) ? flag : 0);
    x86_set_gpr(cpu, in->op[0].reg, n, (uint64_t)sum);
}

void x86_op_adcx(x86_cpu *cpu, const x86_insn *in) { add_carry(cpu, in, X86_FL_CF); }
void x86_op_adox(x86_cpu *cpu, const x86_insn *in) { add_carry(cpu, in, X86_FL_OF); }

/* ---- XADD, CMPXCHG, CMPXCHG8B/16B ---- */

/* The sum goes to memory before the register changes. */
void x86_op_xadd(x86_cpu *cpu, const x86_insn *in)
{
    static const x86_alu_fn add[4] = X86_ALU_TABLE(add);
    const unsigned n = in->op[0].size, s = X86_SIZE_INDEX(n);
    uint64_t b = x86_get_op(cpu, in, 1), flags = cpu->rflags;
    if (in->op[0].kind == X86_OP_GPR) {
        uint64_t a = x86_get_op(cpu, in, 0);
        uint64_t sum = add[s](&flags, a, b);
        x86_set_op(cpu, in, 1, a);
        x86_set_op(cpu, in, 0, sum);
        cpu->rflags = flags;
        return;
    }
    uint64_t la = x86_op_la(cpu, in, n, X86_READ | X86_WRITE), sum, old;
    if (!(in->flags & X86_IF_LOCK)) {
        x86_rmw m;
        x86_rmw_open(cpu, &m, la, n);
        old = m.value;
        sum = add[s](&flags, old, b);
        x86_rmw_close(cpu, &m, n, sum);
    } else {
        x86_locked m;
        x86_locked_open(cpu, &m, la, n);
        if (m.host) {
            switch (n) {
            case 1: old = __atomic_fetch_add(m.host, (uint8_t)b, __ATOMIC_SEQ_CST); break;
            case 2: old = __atomic_fetch_add((uint16_t *)(void *)m.host, (uint16_t)b, __ATOMIC_SEQ_CST); break;
            case 4: old = __atomic_fetch_add((uint32_t *)(void *)m.host, (uint32_t)b, __ATOMIC_SEQ_CST); break;
            default: old = __atomic_fetch_add((uint64_t *)(void *)m.host, b, __ATOMIC_SEQ_CST); break;
            }
            add[s](&flags, old, b);
        } else {
            old = m.value[0];
            sum = add[s](&flags, old, b);
            x86_locked_close(cpu, &m, n, &sum);
        }
    }
    x86_set_op(cpu, in, 1, old);
    cpu->rflags = flags;
}

static uint64_t host_cmpxchg(uint8_t *p, unsigned n, uint64_t expected, uint64_t v)
{
#define TRY(T) { T e = (T)expected; \
    __atomic_compare_exchange_n((T *)(void *)p, &e, (T)v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); return e; }
    switch (n) {
    case 1: TRY(uint8_t)
    case 2: TRY(uint16_t)
    case 4: TRY(uint32_t)
    default: TRY(uint64_t)
    }
#undef TRY
}

/* A memory destination is written either way (with its old value on a mismatch). The register that is not loaded stays whole:
 * 32-bit forms zero-extend the accumulator on a mismatch only, the destination on a match only. */
void x86_op_cmpxchg(x86_cpu *cpu, const x86_insn *in)
{
    static const x86_alu_fn cmp[4] = X86_ALU_TABLE(cmp);
    const unsigned n = in->op[0].size;
    uint64_t b = x86_get_op(cpu, in, 1), a = x86_get_gpr(cpu, X86_RAX, n), old;
    if (in->op[0].kind == X86_OP_GPR) {
        old = x86_get_op(cpu, in, 0);
        if (old == a)
            x86_set_op(cpu, in, 0, b);
    } else {
        x86_locked m;
        x86_locked_open(cpu, &m, x86_op_la(cpu, in, n, X86_READ | X86_WRITE), n);
        if (m.host) {
            old = host_cmpxchg(m.host, n, a, b);
        } else {
            old = m.value[0];
            x86_locked_close(cpu, &m, n, old == a ? &b : &old);
        }
    }
    cmp[X86_SIZE_INDEX(n)](&cpu->rflags, a, old);
    if (old != a)
        x86_set_gpr(cpu, X86_RAX, n, old);
}

static void set_zf(x86_cpu *cpu, bool is_set)
{
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ZF) | (is_set ? X86_FL_ZF : 0);
}

void x86_op_cmpxchg8b(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t a = cpu->gpr[X86_RDX] << 32 | (uint32_t)cpu->gpr[X86_RAX];
    uint64_t b = cpu->gpr[X86_RCX] << 32 | (uint32_t)cpu->gpr[X86_RBX], old;
    x86_locked m;
    x86_locked_open(cpu, &m, x86_op_la(cpu, in, 8, X86_READ | X86_WRITE), 8);
    if (m.host) {
        old = host_cmpxchg(m.host, 8, a, b);
    } else {
        old = m.value[0];
        x86_locked_close(cpu, &m, 8, old == a ? &b : &old);
    }
    set_zf(cpu, old == a);
    if (old != a) {
        x86_set_gpr(cpu, X86_RAX, 4, old);
        x86_set_gpr(cpu, X86_RDX, 4, old >> 32);
    }
}

void x86_op_cmpxchg16b(x86_cpu *cpu, const x86_insn *in)
{
    if (x86_is_misaligned_long(cpu, in, 16))               /* the only mode that has it */
        x86_raise_error(cpu, X86_GP, 0);
    uint64_t la = x86_op_la(cpu, in, 16, X86_READ | X86_WRITE);
    uint64_t lo = cpu->gpr[X86_RAX], hi = cpu->gpr[X86_RDX];
    bool is_equal;
    x86_locked m;
    x86_locked_open(cpu, &m, la, 16);
    if (m.host) {
        __asm__ volatile("lock cmpxchg16b %1" : "=@ccz"(is_equal), "+m"(*(unsigned __int128 *)(void *)m.host), "+a"(lo), "+d"(hi)
                         : "b"(cpu->gpr[X86_RBX]), "c"(cpu->gpr[X86_RCX]) : "memory");
    } else {
        is_equal = m.value[0] == lo && m.value[1] == hi;
        uint64_t v[2] = { cpu->gpr[X86_RBX], cpu->gpr[X86_RCX] };
        lo = m.value[0], hi = m.value[1];
        x86_locked_close(cpu, &m, 16, is_equal ? v : m.value);
    }
    set_zf(cpu, is_equal);
    if (!is_equal) {
        cpu->gpr[X86_RAX] = lo;
        cpu->gpr[X86_RDX] = hi;
    }
}
