/* programs.c - random programs of many basic blocks, between pages, faults and devices: the JIT must agree with the interpreter.
 *
 * A case is a mode, a program of blocks that jump, call and return among each other across pages, registers that point
 * into data pages, at their ends, into code, at a device or nowhere, and (paged modes) page tables in which some data
 * pages are read-only, absent or shown twice. Both backends run it with the same random budgets and stop addresses;
 * whenever they stop, everything the guest could see is compared. After an exception both go on at another block, and
 * the same code runs again warm with other registers.
 *
 * TEST_SEED and TEST_COUNT choose other cases and more, TEST_SLICE the JIT's slices. A case that fails is run again with instruction after
 * instruction replaced by NOPs; what remains is printed.
 */
#include "test.h"

#include <libvm/libvm.h>
#include <Zydis/Zydis.h>

/* RAM begins with data and stack; code is far away, so that the JIT has a large window of memory without code, and cannot be
 * reached by pushing. */
enum { PAGE = 0x1000, DATA = 0x1000, STACK = 0x5000, LOW_END = 0x10000, CODE = 0x1f00000, TABLE = CODE + 0x2f00,
       PTABLES = CODE + 0x4000, END = CODE + 0xa000 };
enum { BASE = 0x10000000, RAM = 0x2000000, ALIAS = BASE + 0x20000, DEVICE_VA = BASE + 0x40000, DEVICE = 0x20000000,
       MAX_UNITS = 400, MAX_BLOCKS = 12, DATA_PAGES = 4 };
enum mode { FLAT64, FLAT32, KERNEL, USER, MODES };
static const char *const mode_names[MODES] = {"flat64", "flat32", "paged_kernel", "paged_user"};

static uint64_t state;
static uint32_t rnd(void)
{
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(state >> 33) ^ (uint32_t)(state >> 13 & 0x80000000);
}
static uint32_t below(uint32_t n) { return (rnd() >> 3) % n; }
#define ONE_OF(...)                                                                                                    \
    (((const uint32_t[]){__VA_ARGS__})[below(sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))])

/* ---- the program ---- */

static uint8_t image[END];
static struct { uint32_t at, length; bool is_division; } units[MAX_UNITS];
static struct { uint32_t at, block; } fixups[MAX_UNITS];
static uint32_t nunits, nfixups, nblocks, blocks[MAX_BLOCKS], pc;
static bool has_64, has_patches;

static bool is_paged(enum mode m) { return m >= KERNEL; }
static void byte(uint32_t b) { image[pc++] = (uint8_t)b; }
static void value(uint64_t v, uint32_t n) { memcpy(image + pc, &v, n); pc += n; }

enum { MEM = 16, LIGHT = 17 };         /* as an r/m operand: memory; memory that is surely there */

/* Where an instruction may write: never a pointer (it would become one into code), the stack pointer or the loop counter (R11, EBP). */
static uint32_t destination(void)
{
    if (!has_64)
        return below(3);
    return below(25) ? ONE_OF(0, 1, 2, 5, 8, 10, 14, 15) : 9;
}
static uint32_t any_register(void) { return below(has_64 ? 16 : 8); }
static uint32_t pointer(void) { return has_64 ? ONE_OF(3, 3, 6, 7, 12, 13) : ONE_OF(3, 3, 6, 7); }
static uint32_t random_disp(void) { return below(4) ? below(0x60) - 0x20 : below(0x1000) - 0x800; }

/* An operand plan, so that REX can be known before the opcode. */
static struct { uint32_t rm, base, index, scale, disp, kind; } operand;
static void plan(uint32_t rm)
{
    operand.rm = rm;
    operand.kind = below(8);
    operand.base = rm == LIGHT ? 4 : pointer();
    operand.index = has_64 ? 9 : 2;
    operand.scale = below(4);
    operand.disp = rm == LIGHT ? 8 * below(32) : random_disp();
    if (rm == LIGHT)
        operand.kind = 7;
    if (!has_64 && operand.kind == 1)
        operand.kind = 2;
}
static uint32_t rex_of_operand(void)
{
    if (operand.rm < MEM)
        return operand.rm >> 3;
    return operand.kind == 0 ? 0 : (operand.base >> 3) | (operand.kind == 1 ? (operand.index >> 3) << 1 : 0);
}

static void modrm(uint32_t reg, uint32_t after)
{
    uint32_t r = (reg & 7) << 3, small = operand.disp + 0x80 < 0x100;
    if (operand.rm < MEM) {
        byte(0xc0 | r | (operand.rm & 7));
    } else if (operand.kind == 0) {                        /* absolute or relative to RIP */
        uint32_t target = DATA + (below(3) ? below(PAGE) : PAGE * (1 + below(3)) - 1 - below(12));
        byte(r | 5);
        value(has_64 ? target - (pc + 4 + after) : BASE + target, 4);
    } else if (operand.kind == 1 || (operand.base & 7) == 4) {
        byte((small ? 0x40 : 0x80) | r | 4);
        byte(operand.kind == 1 ? operand.scale << 6 | (operand.index & 7) << 3 | (operand.base & 7)
                               : 0x20 | (operand.base & 7));
        value(operand.disp, small ? 1 : 4);
    } else {
        byte((small ? 0x40 : 0x80) | r | (operand.base & 7));
        value(operand.disp, small ? 1 : 4);
    }
}

static void begin(void) { units[nunits].at = pc, units[nunits].is_division = false; }
static void end(void)
{
    units[nunits].length = pc - units[nunits].at;
    if (nunits < MAX_UNITS - 1)
        nunits++;
}

static void opcode(uint32_t op)
{
    if (op >= 0x10000)
        byte(op >> 16);
    if (op >= 0x100)
        byte(op >> 8 & 0xff);
    byte(op);
}

/* op r/m, reg with operand size `size` (1: no prefixes of size, REX sometimes), `imm` bytes of immediate. */
static void insn(uint32_t prefix, uint32_t size, uint32_t op, uint32_t reg, uint32_t rm, uint32_t imm)
{
    uint32_t rex;
    begin();
    plan(rm);
    if (prefix)
        byte(prefix);
    if (size == 2)
        byte(0x66);
    rex = (size == 8 ? 8 : 0) | (reg >> 3 & 1) << 2 | rex_of_operand();
    if (rex && has_64)
        byte(0x40 | rex);
    opcode(op);
    modrm(reg, imm);
    value(imm == 4 && below(2) ? below(300) : rnd(), imm);
    end();
}

static uint32_t random_size(void) { return has_64 ? ONE_OF(1, 2, 4, 4, 8, 8) : ONE_OF(1, 2, 4, 4); }
/* Byte registers without REX: AL..BH but not BL, BH, which are part of a pointer. */
static uint32_t register_for(uint32_t size, bool is_written)
{
    if (size == 1)
        return is_written ? ONE_OF(0, 1, 2, 4, 5, 6) : below(8);
    return is_written ? destination() : any_register();
}
static uint32_t rm_for(uint32_t size, bool is_written)
{
    return below(5) < 2 ? MEM : below(12) == 0 ? LIGHT : register_for(size, is_written);
}

static void alu(void)
{
    uint32_t size = random_size(), wide = size > 1, rm = rm_for(size, true), k = below(8);
    switch (below(12)) {
    case 0: case 1: insn(0, size, k << 3 | wide, register_for(size, false), rm, 0); break;
    case 2: insn(0, size, k << 3 | 2 | wide, register_for(size, true), rm_for(size, false), 0); break;
    case 3: case 4: insn(0, size, 0x80 | wide, k, rm, size == 1 ? 1 : size == 2 ? 2 : 4); break;
    case 5: insn(0, size, wide ? 0x83 : 0x80, k, rm, 1); break;
    case 6: insn(0, size, 0x84 | wide, register_for(size, false), rm, 0); break;
    case 7: insn(0, size, 0xf6 | wide, 0, rm, size == 1 ? 1 : size == 2 ? 2 : 4); break;
    case 8: insn(0, size, 0xfe | wide, below(2), rm, 0); break;
    case 9: insn(0, size, 0xf6 | wide, 2 + below(2), rm, 0); break;
    case 10: insn(0, size, 0x38 | wide, register_for(size, false), rm, 0); break;
    default: insn(0, size, 0x86 | wide, register_for(size, true), rm, 0); break;
    }
}

/* DIV or IDIV leave the flags undefined, and the backends differ: a CMP of registers defines them again. */
static void division(uint32_t size)
{
    insn(0, size, 0xf6 | (size > 1), 6 + below(2), rm_for(size, false), 0);
    units[nunits - 1].is_division = true;
    begin(), byte(0x39), byte(0xc0 | below(64)), end();
}

static void alu_other(void)
{
    uint32_t size = random_size(), wide = size > 1, rm = rm_for(size, true);
    uint32_t big = size == 1 ? 4 : size;
    switch (below(10)) {
    case 0: insn(0, size, 0xc0 | wide, ONE_OF(0, 1, 2, 3, 4, 5, 7), rm, 1); break;
    case 1: insn(0, size, 0xd0 | wide, ONE_OF(0, 1, 2, 3, 4, 5, 7), rm, 0); break;
    case 2: insn(0, size, 0xd2 | wide, ONE_OF(0, 1, 2, 3, 4, 5, 7), rm, 0); break;
    case 3: insn(0, big, 0x0faf, destination(), rm_for(big, false), 0); break;
    case 4: insn(0, big, 0x0fba, 4 + below(4), rm_for(big, true), 1); break;
    case 5: insn(0, big, ONE_OF(0x0fa3, 0x0fab, 0x0fb3, 0x0fbb), below(2) ? 9 & (has_64 ? 15 : 0) : destination(),
                 rm_for(big, true), 0); break;
    case 6: insn(0, size, 0xf6 | wide, 4 + below(2), rm_for(size, false), 0); break;
    case 7: division(size); break;
    case 8: insn(0, big, ONE_OF(0x0fa5, 0x0fad, 0x0fc1, 0x0fb1), destination(), rm_for(big, true), 0); break;
    default: insn(0, big, 0x0fbc + below(2), destination(), rm_for(big, false), 0); break;
    }
}

static void move(void)
{
    uint32_t size = random_size(), wide = size > 1, big = size == 1 ? 4 : size;
    switch (below(9)) {
    case 0: case 1: insn(0, size, 0x88 | wide, register_for(size, false), MEM, 0); break;
    case 2: case 3: insn(0, size, 0x8a | wide, register_for(size, true), rm_for(size, false), 0); break;
    case 4: insn(0, size, 0xc6 | wide, 0, rm_for(size, true), size == 1 ? 1 : size == 2 ? 2 : 4); break;
    case 5: insn(0, big, ONE_OF(0x0fb6, 0x0fb7, 0x0fbe, 0x0fbf), destination(),
                 below(2) ? MEM : ONE_OF(0, 1, 2, 3, 4, 5, 6, 7), 0); break;
    case 6: insn(0, big, 0x8d, destination(), MEM, 0); break;
    case 7: if (has_64) insn(0, 8, 0x63, destination(), rm_for(4, false), 0); break;
    default: begin(); byte(ONE_OF(0x98, 0x99, 0x98, 0x99)); end(); break;
    }
}

/* What reads flags. */
static void reader(void)
{
    uint32_t size = random_size(), wide = size > 1, big = size == 1 ? 4 : size;
    switch (below(8)) {
    case 0: case 1: insn(0, 1, 0x0f90 | below(16), 0, rm_for(1, true), 0); break;
    case 2: case 3: insn(0, big, 0x0f40 | below(16), destination(), rm_for(big, false), 0); break;
    case 4: begin(); byte(0x9f); end(); break;              /* LAHF */
    case 5: begin(); byte(0x9c); end(); break;              /* PUSHF */
    case 6: insn(0, size, ONE_OF(0x10, 0x18) | wide, register_for(size, false), rm_for(size, true), 0); break;
    default: begin(); byte(ONE_OF(0xf5, 0xf8, 0xf9, 0x9e)); end(); break;
    }
}

static void stack(void)
{
    uint32_t r;
    switch (below(6)) {
    case 0: case 1: case 2: case 3:
        begin();
        r = below(2) ? any_register() : destination();
        if (below(2)) {
            if (r >> 3)
                byte(0x41);
            byte(0x50 | (r & 7));
        } else {
            r = destination();
            if (r >> 3)
                byte(0x41);
            byte(0x58 | (r & 7));
        }
        end();
        break;
    case 4: insn(0, ONE_OF(4, 4, 4, 2), 0xff, 6, below(4) ? LIGHT : MEM, 0); break;
    default: insn(0, ONE_OF(4, 4, 4, 2), 0x8f, 0, below(2) ? MEM : destination(), 0); break;
    }
}

static void vex(uint32_t map, uint32_t pp, uint32_t wide, uint32_t op, uint32_t reg, uint32_t v, uint32_t rm)
{
    uint32_t rex;
    begin();
    plan(rm);
    rex = rex_of_operand();
    byte(0xc4);
    byte((reg >> 3 ? 0 : 0x80) | (rex & 2 ? 0 : 0x40) | (rex & 1 ? 0 : 0x20) | map);
    byte((~v & 15) << 3 | wide << 2 | pp);
    byte(op);
    modrm(reg, 0);
    end();
}

static void vector(void)
{
    uint32_t x = any_register(), rm = below(2) ? MEM : any_register();
    switch (below(17)) {
    case 0: insn(0, 4, 0x0f10 | below(2), x, rm, 0); break;
    case 1: insn(0, 4, 0x0f28 | below(2), x, rm, 0); break;
    case 2: insn(0x66, 4, 0x0f00 | ONE_OF(0xfe, 0xfc, 0xef, 0xdb, 0xd4, 0x76, 0x66, 0x60, 0x6c), x, rm, 0); break;
    case 3: insn(0xf2, 4, 0x0f00 | ONE_OF(0x10, 0x11, 0x58, 0x59, 0x5c, 0x5e, 0x51, 0x5a), x, rm, 0); break;
    case 4: insn(below(2) ? 0x66 : 0, 4, 0x0f2e | below(2), x, rm, 0); break;
    case 5: insn(0x66, 4, 0x0f3817, x, rm, 0); break;      /* PTEST */
    case 6: insn(0x66, 4, 0x0fd7, destination(), any_register(), 0); break;
    case 7: insn(0x66, has_64 ? ONE_OF(4, 8) : 4, 0x0f6e, x, rm_for(4, false), 0); break;
    case 8: insn(0x66, has_64 ? ONE_OF(4, 8) : 4, 0x0f7e, x, rm_for(4, true), 0); break;
    case 9: insn(ONE_OF(0xf2, 0xf3), has_64 ? ONE_OF(4, 8) : 4, 0x0f2a, x, rm_for(4, false), 0); break;
    case 10: insn(ONE_OF(0xf2, 0xf3), has_64 ? ONE_OF(4, 8) : 4, 0x0f2c | below(2), destination(), rm, 0); break;
    case 11: vex(1, 2, below(2), 0x6f + 0x10 * below(2), x, 0, rm); break;          /* VMOVDQU */
    case 12: vex(1, 1, below(2), ONE_OF(0xfe, 0xef, 0xdb, 0xd4), x, any_register(), rm); break;
    case 13: begin(), byte(0xc5), byte(below(2) ? 0xf8 : 0xfc), byte(0x77), end(); break; /* VZEROUPPER, VZEROALL */
    case 14: insn(0x66, 4, 0x0f3a60 | below(4), x, rm, 1); break;                         /* PCMPxSTRx */
    default: vex(2, 1, below(2), 0x17, x, 0, rm); break;    /* VPTEST */
    }
}

/* Of BMI1, BMI2 and ADX: three registers, or two and memory. */
static void bmi(void)
{
    static const struct { uint32_t pp, op; } three[] = { { 0, 0xf2 }, { 0, 0xf5 }, { 2, 0xf5 }, { 3, 0xf5 }, { 0, 0xf7 },
                                                         { 1, 0xf7 }, { 2, 0xf7 }, { 3, 0xf7 } };
    uint32_t k = below(14), wide = below(2), rm = rm_for(4, false);
    if (k < 8)
        vex(2, three[k].pp, wide, three[k].op, destination(), any_register(), rm);
    else if (k < 12)
        vex(2, 3, wide, 0xf6, below(2) ? 8 : destination(), below(2) ? 10 : destination(), rm); /* MULX */
    else
        insn(ONE_OF(0x66, 0xf3), wide ? 8 : 4, 0x0f38f6, destination(), rm, 0);
}

static void x87(void)
{
    switch (below(7)) {
    case 0: insn(0, 4, 0xdd, ONE_OF(0, 2, 3), MEM, 0); break;
    case 1: insn(0, 4, 0xdb, ONE_OF(0, 2, 3, 5, 7), MEM, 0); break;
    case 2: insn(0, 4, 0xd8, below(8), MEM, 0); break;
    case 3: begin(); byte(0xd9), byte(ONE_OF(0xe8, 0xee, 0xc9, 0xc1, 0xe0, 0xe1, 0xeb)); end(); break;
    case 4: begin(); byte(0xdb), byte(ONE_OF(0xe9, 0xf1)); end(); break;
    case 5: begin(); byte(0xdf), byte(0xe0); end(); break;
    default: begin(); byte(0xd8), byte(ONE_OF(0xc1, 0xc9, 0xe1, 0xf1)); end(); break;
    }
}

/* String instructions, most with REP of a small count; without one in between the count would be whatever is in RCX. */
static void string(void)
{
    bool is_repeated = below(3);
    if (is_repeated) {
        begin();
        byte(0xb9), value(below(8) ? below(24) : below(600), 4);
        end();
    }
    begin();
    if (below(12) == 0)
        byte(0x67);
    if (is_repeated)
        byte(ONE_OF(0xf3, 0xf3, 0xf2));
    if (below(3) == 0)
        byte(0x66);
    else if (has_64 && below(2))
        byte(0x48);
    byte(ONE_OF(0xa4, 0xa5, 0xaa, 0xab, 0xa6, 0xa7, 0xae, 0xac, 0xad));
    end();
}

/* Stores into code near here: mostly a part of a MOV's immediate, or a NOP into the first byte of something. */
static void patch(void)
{
    uint32_t target = nunits > 3 ? units[below(nunits - 1)].at + below(3) : CODE + PAGE;
    begin();
    byte(below(2) ? 0xc6 : 0x80);
    byte(image[pc - 1] == 0xc6 ? 5 : 0x35);                 /* MOV or XOR [target], imm8 */
    value(has_64 ? target - (pc + 5) : BASE + target, 4);
    byte(ONE_OF(0x90, 0x40, rnd() & 0xff, 1));
    end();
    begin(), byte(0xeb), byte(0), end();                    /* changed code is promised after a jump only */
}

static void pointer_change(void)
{
    uint32_t r = pointer();
    begin();
    if (has_64)
        byte(0x48 | r >> 3);
    byte(0x81), byte(0xc0 | (r & 7));
    value(below(2) ? below(0x40) - 0x20 : below(0x2000) - 0x1000, 4);
    end();
}

/* A register compared with a constant, or shifted until it is small, and a branch before an access by it or by a copy: what the JIT
 * takes from it about the address must be true of both halves. */
static void bounded(void)
{
    uint32_t r = destination(), by = below(2) ? destination() : r, is_index = below(3) == 0, over;
    if (below(3)) {
        begin(), byte(0x40 | below(2) << 3 | r >> 3), byte(0xc1), byte(0xe8 | (r & 7)), byte(ONE_OF(19, 20, 45, 50, 52)), end(); /* SHR */
    }
    begin(), byte(0x40 | below(2) << 3 | r >> 3), byte(0x81), byte(0xf8 | (r & 7)); /* CMP */
    value(below(8) ? below(0x4000) : ONE_OF(0, 1, 0x7fffffff, 0x80000000, 0xffffffff), 4), end();
    begin(), byte(0x70 | (below(3) ? ONE_OF(3, 5, 7) : below(16))), over = pc++, end();
    if (by != r)
        begin(), byte(0x40 | below(2) << 3 | (by >> 3) << 2 | r >> 3), byte(0x8b), byte(0xc0 | (by & 7) << 3 | (r & 7)), end();
    begin(), byte(0x40 | by >> 3 << is_index), byte(below(2) ? 0xc6 : 0x80);            /* MOV or ADD m8, imm8 */
    byte(is_index ? 4 : 0x80 | (by & 7));
    if (is_index)
        byte(below(4) << 6 | (by & 7) << 3 | 5);
    value(below(2) ? BASE + DATA : BASE + LOW_END + below(CODE), 4), byte(rnd()), end();
    image[over] = (uint8_t)(pc - over - 1);
}

static void one(void)
{
    switch (below(29)) {
    case 0: case 1: case 2: case 3: case 4: case 5: case 6: alu(); break;
    case 7: case 8: case 9: alu_other(); break;
    case 10: case 11: case 12: move(); break;
    case 13: case 14: case 15: case 16: reader(); break;
    case 17: case 18: stack(); break;
    case 19: case 20: case 21: vector(); break;
    case 22: x87(); break;
    case 27: has_64 ? bmi() : alu(); break;
    case 23: below(2) ? string() : pointer_change(); break;
    case 24: has_patches ? patch() : move(); break;
    case 25: case 26: has_64 ? bounded() : alu(); break;
    default: alu(); break;
    }
}

static void jump_to(uint32_t b)                             /* the rel32 of a branch */
{
    fixups[nfixups].at = pc, fixups[nfixups++].block = b;
    pc += 4;
}

static void dec_counter(void)
{
    begin();
    if (has_64)
        byte(0x41), byte(0xff), byte(0xcb);
    else
        byte(0x4d);
    end();
}

static void terminator(uint32_t self)
{
    uint32_t target = below(nblocks), k = below(12);
    if (target <= self && below(10) < 7 && k < 8) {
        dec_counter();
        begin(), byte(0x0f), byte(0x85), jump_to(target), end();
        return;
    }
    begin();
    switch (k) {
    case 0: case 1: case 2: case 3: case 4: byte(0x0f), byte(0x80 | below(16)), jump_to(target); break;
    case 5: byte(0xe9), jump_to(target > self ? target : (self + 1) % nblocks); break;
    case 6: byte(0xe8), jump_to(target); break;
    case 7: byte(0xc3); break;
    case 8:                                                 /* JMP or CALL through the table of blocks */
        byte(0xff), byte(below(2) ? 0x25 : 0x15);
        value(has_64 ? TABLE + 8 * target - (pc + 4) : BASE + TABLE + 8 * target, 4);
        break;
    case 9:                                                 /* through a register */
        byte(0xb8), value(target, 4), pc -= 4;
        fixups[nfixups].at = pc, fixups[nfixups++].block = target | 0x100;
        pc += 4;
        end();
        begin();
        byte(0xff), byte(below(2) ? 0xe0 : 0xd0);
        break;
    case 10: byte(0xc2), value(8 * below(3), 2); break;
    default:                                                /* only a new page or nothing */
        byte(0x90);
        break;
    }
    end();
}

static void block(uint32_t self)
{
    uint32_t n = 1 + below(7), short_at;
    blocks[self] = pc;
    if (below(3) == 0)                                      /* memory first, then a reader of the flags of who came here */
        move(), reader();
    while (n--) {
        if (below(12) == 0) {
            begin();
            if (below(6))
                byte(0x70 | below(16));
            else {                                          /* LOOP, JRCXZ and their like */
                if (below(2))
                    byte(0x67);
                byte(0xe2 | below(2));
            }
            short_at = pc++, end();
            one();
            image[short_at] = (uint8_t)(pc - short_at - 1);
        }
        one();
    }
    terminator(self);
}

static void make_program(void)
{
    memset(image + CODE, 0xf4, PTABLES - CODE);
    memset(image, 0, PAGE);
    nunits = nfixups = 0;
    nblocks = 3 + below(MAX_BLOCKS - 3);
    pc = CODE + PAGE - below(0x100);
    for (uint32_t b = 0; b < nblocks && nunits < MAX_UNITS - 60; b++) {
        block(b);
        uint32_t next = (pc | (PAGE - 1)) - below(14);
        if (b + 1 < nblocks && pc < CODE + 2 * PAGE && below(4) == 0 && next > pc + 5) {
            begin(), byte(0xe9), jump_to(b + 1), end();
            pc = next;
        }
    }
    byte(0xf4);
    for (uint32_t i = 0; i < nfixups; i++) {
        uint32_t b = fixups[i].block & 0xff;
        uint32_t v = fixups[i].block & 0x100 ? BASE + blocks[b] : blocks[b] - (fixups[i].at + 4);
        memcpy(image + fixups[i].at, &v, 4);
    }
    for (uint32_t b = 0; b < nblocks; b++)
        memcpy(image + TABLE + 8 * b, &(uint64_t){ BASE + blocks[b] }, 8);
}

/* ---- memory and registers ---- */

static void put64(uint32_t at, uint64_t v) { memcpy(image + at, &v, 8); }

static void make_data(enum mode m)
{
    for (uint32_t i = DATA; i < STACK; i += 4)
        memcpy(image + i, &(uint32_t){ below(3) ? rnd() : below(40) }, 4);
    for (uint32_t i = STACK; i < LOW_END; i += has_64 ? 8 : 4)
        memcpy(image + i, &(uint64_t){ BASE + blocks[below(nblocks)] }, has_64 ? 8 : 4);
    memset(image + PTABLES, 0, END - PTABLES);
    if (!is_paged(m))
        return;
    put64(PTABLES, (BASE + PTABLES + 0x1000) | 7);          /* PML4, PDPT, PD, PT */
    put64(PTABLES + 0x1000, (BASE + PTABLES + 0x2000) | 7);
    put64(PTABLES + 0x2000 + 8 * (BASE >> 21 & 511), (BASE + PTABLES + 0x3000) | 7);
    put64(PTABLES + 0x2000 + 8 * ((BASE + CODE) >> 21 & 511), (BASE + PTABLES + 0x4000) | 7);
    for (uint32_t p = CODE / PAGE; p < END / PAGE; p++)
        put64(PTABLES + 0x4000 + 8 * (p & 511), (BASE + p * PAGE) | (p == CODE / PAGE + 2 && below(4) == 0 ? 5 : 7));
    for (uint32_t p = 0; p < LOW_END / PAGE; p++) {                     /* the window, data pages in any order */
        bool is_data = p >= DATA / PAGE && p < STACK / PAGE;
        uint32_t to = is_data && below(3) == 0 ? DATA / PAGE + below(DATA_PAGES) : p;
        uint32_t bits = is_data ? ONE_OF(7, 7, 7, 7, 7, 0x67, 5, 0, 3, 6) : p ? 7 : 0;
        put64(PTABLES + 0x3000 + 8 * p, (BASE + to * PAGE) | bits);
        put64(PTABLES + 0x3000 + 8 * (32 + p), (BASE + p * PAGE) | 7);
    }
    put64(PTABLES + 0x3000 + 8 * 64, DEVICE | 7);
}

static uint64_t random_pointer(enum mode m)
{
    uint32_t page = DATA + PAGE * below(DATA_PAGES);
    switch (below(24)) {
    case 0: return is_paged(m) ? DEVICE_VA + below(0x200) : DEVICE + below(0x200);
    case 1:
        return BASE + STACK + below(2 * PAGE);
    case 2: return is_paged(m) ? ALIAS + DATA + below(STACK - DATA) : BASE + RAM - below(0x80);
    case 3: return below(2) ? BASE + RAM + below(0x80) : 0x8000 + below(100);
    case 4: return has_64 && below(2) ? UINT64_C(0x800000000000) - below(100) : BASE - below(16);
    case 5: case 6: case 7: case 8: case 9: return BASE + page + PAGE - below(0x48);
    default: return BASE + page + below(PAGE);
    }
}

static void make_registers(enum mode m, vm_regs *r)
{
    uint64_t *gpr = &r->rax;
    for (uint32_t i = 0; i < 16; i++)
        gpr[i] = below(4) == 0 ? below(100) : has_64 ? (uint64_t)rnd() << 32 | rnd() : rnd();
    r->rbx = random_pointer(m);
    r->rsi = random_pointer(m);
    r->rdi = random_pointer(m);
    if (has_64) {
        r->r12 = random_pointer(m);
        r->r13 = random_pointer(m);
        r->r9 = below(200);
        r->r11 = 1 + below(40);
    } else {
        r->rbp = 1 + below(40);
        for (uint32_t i = 8; i < 16; i++)
            gpr[i] = 0;
    }
    r->rsp = BASE + STACK + PAGE + (below(6) ? 8 * below(64) - 0x100 : below(4) - 2);
    r->rip = BASE + blocks[below(nblocks)];
    r->rflags = 2 | (rnd() & 0x8d5) | (below(8) ? 0 : 0x400);
}

/* ---- running ---- */

typedef struct column {
    vm_machine *m;
    vm_vcpu *cpu;
    vm_region *ram, *code, *rest;
    vm_regs regs;
    vm_fpu fpu;
    vm_exit exit;
    uint64_t retired, device_calls, device_hash;
    uint8_t map[256];                  /* what is recorded: see record() */
    uint64_t ring[64], entered, compared;
    vm_compare log[64];
} column;
static column interp, jit;
static const uint8_t *ram_at(const column *c, uint32_t at)
{
    vm_region *r = at < CODE ? c->ram : at < END ? c->code : c->rest;
    return (const uint8_t *)vm_region_data(r) + (at - (uint32_t)(vm_region_gpa(r) - BASE));
}
static uint64_t stops[32], runs, retired, jit_blocks, jit_decoded;

/* Some cases record edges, blocks or comparisons: the records must agree too, and be up to date in callbacks. */
static bool has_map, has_ring, has_log;
static uint64_t record_hash(const column *c);

/* ... and while hooks look at them. */
static vm_hook_result look(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    column *c = user;
    (void)cpu;
    c->device_hash = c->device_hash * 31 + e->kind + e->address + record_hash(c);
    return VM_HOOK_CONTINUE;
}
static void add_hook(column *c, uint64_t seed)
{
    static const vm_hook_kind kinds[] = {VM_HOOK_INSN, VM_HOOK_FETCH, VM_HOOK_MEM_WRITE, VM_HOOK_MEM_READ, VM_HOOK_BLOCK, VM_HOOK_EDGE};
    vm_hook_desc d = VM_HOOK_INIT;
    d.kind = kinds[seed / 16 % 6];
    d.fn = look;
    d.user = c;
    if (seed / 64 % 2)
        d.begin = BASE + (d.kind == VM_HOOK_INSN || d.kind == VM_HOOK_FETCH ? CODE : DATA), d.end = d.begin + PAGE - 1;
    OK(vm_hook_add(c->m, &d, NULL));
}

static void record(column *c, uint64_t seed)
{
    has_map = seed % 4;
    has_ring = seed % 4 == 2;
    has_log = seed % 4 == 3;
    memset(c->map, 0, sizeof c->map), memset(c->ring, 0, sizeof c->ring), memset(c->log, 0, sizeof c->log);
    c->entered = c->compared = 0;
    if (has_map)
        OK(vm_coverage(c->m, c->map, sizeof c->map));
    if (has_map && seed % 8 == 5)
        OK(vm_coverage_range(c->m, BASE + CODE, BASE + CODE + PAGE));
    if (has_ring)
        OK(vm_block_trace(c->cpu, c->ring, 64, &c->entered));
    if (has_log)
        OK(vm_compare_log(c->cpu, c->log, 64, &c->compared));
    if (has_map && seed % 16 < 4)
        add_hook(c, seed);
}
static uint64_t record_hash(const column *c)
{
    uint64_t h = c->entered * 3 + c->compared * 5;
    for (unsigned i = 0; has_map && i < sizeof c->map; i++)
        h = h * 31 + c->map[i];
    return h;
}

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *v)
{
    column *c = user;
    (void)cpu;
    if (offset >= 0x180)
        return -1;
    c->device_hash = c->device_hash * 31 + offset * 16 + width + record_hash(c);
    *v = (offset + ++c->device_calls) * UINT64_C(0x9e3779b97f4a7c15);
    return 0;
}
static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t v)
{
    column *c = user;
    (void)cpu;
    if (offset >= 0x180)
        return -1;
    v &= width < 8 ? (UINT64_C(1) << 8 * width) - 1 : UINT64_MAX;
    c->device_hash = c->device_hash * 31 + offset * 16 + width + v * 7 + record_hash(c);
    c->device_calls++;
    return 0;
}

static void column_open(column *c, vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    o.backend = backend;
    ops.read = device_read, ops.write = device_write;
    OK(vm_create(&o, &c->m));
    OK(vm_map_ram(c->m, BASE, CODE, VM_PROT_RW, &c->ram));
    OK(vm_map_ram(c->m, BASE + CODE, END - CODE, VM_PROT_RWX, &c->code));
    OK(vm_map_ram(c->m, BASE + END, RAM - END, VM_PROT_RW, &c->rest));
    OK(vm_map_mmio(c->m, DEVICE, PAGE, &ops, c, NULL));
    c->cpu = vm_vcpu_get(c->m, 0);
    c->exit = (vm_exit)VM_EXIT_INIT;
}

static void column_prepare(column *c, enum mode m)
{
    vm_sregs s = VM_SREGS_INIT;
    OK(vm_vcpu_set_mode(c->cpu, m == FLAT32 ? VM_MODE_FLAT32 : VM_MODE_FLAT64));
    c->device_calls = c->device_hash = 0;
    if (!is_paged(m))
        return;
    OK(vm_vcpu_get_sregs(c->cpu, &s));
    s.cr3 = BASE + PTABLES;
    s.cr0 |= 0x10000;
    if (m == USER) {
        s.cs.selector = 0x2b, s.cs.attributes |= 0x60;
        s.ss.selector = 0x23, s.ss.attributes |= 0x60;
        s.ds = s.es = s.ss;
    }
    OK(vm_vcpu_set_sregs(c->cpu, &s));
}

/* New machines, lest code that was often written makes the JIT leave its pages to the interpreter for many cases. */
static void columns_renew(void)
{
    uint64_t n;
    if (interp.m) {
        retired += vm_vcpu_retired(interp.cpu);
        OK(vm_stats(jit.m, "blocks", &n));
        jit_blocks += n;
        OK(vm_stats(jit.m, "decoded", &n));
        jit_decoded += n;
        vm_destroy(interp.m);
        vm_destroy(jit.m);
    }
    column_open(&interp, VM_BACKEND_INTERP);
    column_open(&jit, VM_BACKEND_JIT);
}

/* Memory as the case wants it; code that is as it should be is left alone, so that its translations stay. */
static void column_load(column *c)
{
    static const uint8_t zero[PAGE];
    for (uint32_t p = 0; p < END; p += p + PAGE == LOW_END ? CODE - p : PAGE)
        if (memcmp(ram_at(c, p), image + p, PAGE))
            OK(vm_write(c->m, BASE + p, image + p, PAGE));
    if (memcmp(ram_at(c, RAM - PAGE), zero, PAGE))
        OK(vm_write(c->m, BASE + RAM - PAGE, zero, PAGE));
}

static void column_run(column *c, const vm_run_options *o)
{
    OK(vm_vcpu_run(c->cpu, o, &c->exit));
    c->regs = (vm_regs)VM_REGS_INIT;
    c->fpu = (vm_fpu)VM_FPU_INIT;
    OK(vm_vcpu_get_regs(c->cpu, &c->regs));
    OK(vm_vcpu_get_fpu(c->cpu, &c->fpu));
    c->retired = vm_vcpu_retired(c->cpu);
}

static char text[300];
#define DIFFERS(...) return snprintf(text, sizeof text, __VA_ARGS__), text
#define SAME(what, a, b)                                                                                               \
    if ((uint64_t)(a) != (uint64_t)(b))                                                                                \
    DIFFERS(what " is %#" PRIx64 ", not %#" PRIx64, (uint64_t)(b), (uint64_t)(a))

static const char *exit_difference(const vm_exit *a, const vm_exit *b)
{
    if (a->reason != b->reason)
        DIFFERS("exit %s, not %s", vm_exit_name(b->reason), vm_exit_name(a->reason));
    SAME("exit.rip", a->rip, b->rip);
    if (a->reason == VM_EXIT_EXCEPTION) {
        SAME("vector", a->exception.vector, b->exception.vector);
        SAME("error code", a->exception.error, b->exception.error);
        SAME("fault address", a->exception.address, b->exception.address);
    }
    if (a->reason == VM_EXIT_MMIO || a->reason == VM_EXIT_UNMAPPED) {
        SAME("mmio.gpa", a->mmio.gpa, b->mmio.gpa);
        SAME("mmio.gva", a->mmio.gva, b->mmio.gva);
        SAME("mmio.width", a->mmio.width, b->mmio.width);
        SAME("mmio.is_write", a->mmio.is_write, b->mmio.is_write);
        SAME("mmio.data", a->mmio.data, b->mmio.data);
    }
    return NULL;
}

/* Fetches ahead may set accessed bits early. */
static bool is_accessed_bit(uint32_t at, uint32_t changed) { return at >= PTABLES && changed == 0x20; }

static const char *record_difference(void)
{
    SAME("blocks entered", interp.entered, jit.entered);
    SAME("comparisons", interp.compared, jit.compared);
    for (unsigned i = 0; i < sizeof interp.map; i++)
        if (interp.map[i] != jit.map[i])
            DIFFERS("edge counter %u is %u, not %u", i, jit.map[i], interp.map[i]);
    for (unsigned i = 0; i < 64; i++) {
        if (interp.ring[i] != jit.ring[i])
            DIFFERS("block %u of the ring is %#" PRIx64 ", not %#" PRIx64, i, jit.ring[i], interp.ring[i]);
        if (memcmp(&interp.log[i], &jit.log[i], sizeof interp.log[i]))
            DIFFERS("comparison %u, at %#" PRIx64 ", differs (%#" PRIx64 ")", i, interp.log[i].address, jit.log[i].address);
    }
    return NULL;
}

static const char *difference(void)
{
    const uint64_t *ra = &interp.regs.rax, *rb = &jit.regs.rax;
    const char *what = exit_difference(&interp.exit, &jit.exit);
    static const char *const names[18] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8",
                                          "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"};
    if (what)
        return what;
    for (unsigned i = 0; i < 18; i++)
        if (ra[i] != rb[i])
            DIFFERS("%s is %#" PRIx64 ", not %#" PRIx64, names[i], rb[i], ra[i]);
    SAME("retired", interp.retired, jit.retired);
    SAME("number of device accesses", interp.device_calls, jit.device_calls);
    SAME("hash of device accesses", interp.device_hash, jit.device_hash);
    SAME("mxcsr", interp.fpu.mxcsr, jit.fpu.mxcsr);
    SAME("fsw", interp.fpu.fsw, jit.fpu.fsw);
    SAME("ftw", interp.fpu.ftw, jit.fpu.ftw);
    for (unsigned i = 0; i < 16; i++)
        if (memcmp(interp.fpu.ymm[i], jit.fpu.ymm[i], 32))
            DIFFERS("ymm%u differs", i);
    if (memcmp(interp.fpu.st, jit.fpu.st, sizeof interp.fpu.st))
        DIFFERS("the x87 stack differs");
    if (memcmp(&interp.fpu, &jit.fpu, sizeof interp.fpu))
        DIFFERS("x87 fop, fip or fdp differ: fip %#" PRIx64 ", not %#" PRIx64, jit.fpu.fip, interp.fpu.fip);
    for (uint32_t p = 0; p < END; p += p + PAGE == LOW_END ? CODE - p : PAGE) {
        const uint8_t *ma = ram_at(&interp, p), *mb = ram_at(&jit, p);
        for (uint32_t i = 0; memcmp(ma, mb, PAGE) && i < PAGE; i++)
            if (ma[i] != mb[i] && !is_accessed_bit(p + i, ma[i] ^ mb[i]))
                DIFFERS("memory at %#x is %#x, not %#x", BASE + p + i, mb[i], ma[i]);
    }
    if (memcmp(ram_at(&interp, RAM - PAGE), ram_at(&jit, RAM - PAGE), PAGE))
        DIFFERS("the last page of memory differs");
    return record_difference();
}


/* Registers, then runs with random limits; NULL or what differs. */
static const char *run_once(enum mode m)
{
    vm_regs r = interp.regs;
    column_prepare(&interp, m);
    column_prepare(&jit, m);
    column_load(&interp);
    column_load(&jit);
    r = (vm_regs)VM_REGS_INIT;
    make_registers(m, &r);
    for (uint32_t n = 1 + below(6); n--;) {
        vm_run_options o = VM_RUN_OPTIONS_INIT;
        /* A budget near its end makes the JIT step with the interpreter: most must be large, and none where the
         * interpreter shows that the program stops by itself. */
        o.max_instructions = below(8) ? 4000 + below(1000) : 2390 + below(100);
        o.exception_exits = UINT32_MAX;
        o.has_until = below(5) == 0;
        o.until = BASE + (below(2) ? blocks[below(nblocks)] : units[below(nunits)].at);
        OK(vm_vcpu_set_regs(interp.cpu, &r));
        OK(vm_vcpu_set_regs(jit.cpu, &r));
        column_run(&interp, &o);
        if (interp.exit.reason != VM_EXIT_BUDGET) {
            o.max_instructions = 0;
            o.deadline_ns = TEST_SECONDS(3);
        }
        column_run(&jit, &o);
        const char *what = difference();
        if (what)
            return what;
        stops[interp.exit.reason & 31]++;
        runs++;
        r = interp.regs;
        if (interp.exit.reason == VM_EXIT_EXCEPTION || interp.exit.reason == VM_EXIT_HALT || below(8) == 0)
            r.rip = BASE + blocks[below(nblocks)];
        if (below(4) == 0)
            r.rbx = random_pointer(m);
        if (below(4) == 0)
            r.rsp = BASE + STACK + PAGE;
    }
    return NULL;
}

static const char *run_case(enum mode m, uint64_t seed, const bool *is_nop)
{
    const char *what = NULL;
    const char *slice = getenv("TEST_SLICE"); /* after a short one, where execution goes is translated as a trace */
    setenv("LIBVM_JIT_SLICE", slice ? slice : seed & 1 ? "40" : "16384", 1);
    columns_renew();
    record(&interp, seed);
    record(&jit, seed);
    has_64 = m != FLAT32;
    state = seed * UINT64_C(0x9e3779b97f4a7c15) + (uint64_t)m;
    rnd();
    has_patches = below(5) == 0;
    make_program();
    for (uint32_t u = 0; is_nop && u < nunits; u++)
        if (is_nop[u])
            memset(image + units[u].at, 0x90, units[u].length);
    for (uint32_t warm = 0; warm < 3 && !what; warm++) {
        make_data(m);
        what = run_once(m);
    }
    return what;
}

static _Noreturn void report(enum mode m, uint64_t seed, const char *first)
{
    static bool is_nop[MAX_UNITS];
    char was[300];
    snprintf(was, sizeof was, "%s", first);
    for (uint32_t u = 0; u < nunits; u++) {
        is_nop[u] = true;
        is_nop[u] = run_case(m, seed, is_nop) != NULL;
    }
    const char *what = run_case(m, seed, is_nop);
    for (uint32_t u = 0; u < nunits; u++) {
        ZydisDisassembledInstruction d;
        uint32_t at = units[u].at;
        if (is_nop[u])
            continue;
        ZydisDisassembleIntel(has_64 ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LEGACY_32, BASE + at, image + at, 15,
                              &d);
        printf("    %#x: ", BASE + at);
        for (uint32_t i = 0; i < units[u].length; i++)
            printf("%02x ", image[at + i]);
        printf(" %s\n", d.text);
    }
    printf("    rip %#" PRIx64 ", jit %#" PRIx64 ", exit %s\n", interp.regs.rip, jit.regs.rip, vm_exit_name(interp.exit.reason));
    fflush(stdout);
    FAIL("case %" PRIu64 " (TEST_SEED=%" PRIu64 " TEST_COUNT=1): %s; shrunk: %s", seed, seed, was, what ? what : "nothing");
}

static uint64_t from_environment(const char *name, uint64_t otherwise)
{
    const char *text_value = getenv(name);
    return text_value ? strtoull(text_value, NULL, 0) : otherwise;
}

static void compare_mode(const void *arg)
{
    enum mode m = (enum mode)(uintptr_t)arg;
    uint64_t first = from_environment("TEST_SEED", 1), count = from_environment("TEST_COUNT", 500), there = 0;
    if (vm_query(VM_BACKEND_JIT, "available", &there) != VM_OK || !there)
        test_skip("no JIT in this build");
    for (uint64_t i = first; i < first + count; i++) {
        const char *what = run_case(m, i, NULL);
        if (what)
            report(m, i, what);
    }
    columns_renew();
    printf("    %" PRIu64 " programs, %" PRIu64 " runs, %" PRIu64 " instructions, %" PRIu64 " blocks, %" PRIu64 " decoded;",
           count, runs, retired, jit_blocks, jit_decoded);
    for (int i = 0; i < 32; i++)
        if (stops[i])
            printf(" %s %" PRIu64, vm_exit_name(i), stops[i]);
    printf("\n");
    if (count > 100)                   /* the programs still lead somewhere */
        CHECK(stops[VM_EXIT_BUDGET] > runs / 12 && stops[VM_EXIT_UNTIL] && stops[VM_EXIT_EXCEPTION] && retired > 50 * runs && jit_blocks > 5 * count);
    vm_destroy(interp.m);
    vm_destroy(jit.m);
}

SETUP(modes)
{
    for (uintptr_t m = 0; m < MODES; m++)
        test_add(mode_names[m], compare_mode, (const void *)m, 0);
}
