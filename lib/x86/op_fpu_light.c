/* op_fpu_light.c - the short way for common x87 instructions.
 *
 * A full thunk moves the whole x87 state in and out of the host; most instructions touch one or two values. When all
 * exceptions are masked and the registers involved have the right tags (no stack fault can happen), the values alone are
 * loaded, and TOP, tags, condition codes and sticky flags are kept up here. Everything else goes the long way in op_fpu.c, with
 * the same result: tests/diff/simd.c compares both with the processor.
 */
#include "x86/simd.h"

#include <string.h>

#define FSW_C1 0x0200u
#define FSW_CC 0x4700u

#define ARITH (LIGHT_A | LIGHT_TO_A)
#define COM (LIGHT_A | LIGHT_CC)
#define COMP (LIGHT_A | LIGHT_CC | LIGHT_POP)
#define FLD (LIGHT_PUSH | LIGHT_TO_A)
#define ST (LIGHT_A | LIGHT_STORE)
#define STP (LIGHT_A | LIGHT_STORE | LIGHT_POP)
#define ARITH_ST (LIGHT_A | LIGHT_B | LIGHT_TO_A)
#define ARITH_TO (LIGHT_A | LIGHT_B | LIGHT_TO_B)
#define ARITH_POP (LIGHT_A | LIGHT_B | LIGHT_TO_B | LIGHT_POP)
#define COM_ST (LIGHT_A | LIGHT_B | LIGHT_CC)
#define COMP_ST (LIGHT_A | LIGHT_B | LIGHT_CC | LIGHT_POP)
#define COMI (LIGHT_A | LIGHT_B | LIGHT_FLAGS)
#define COMIP (LIGHT_A | LIGHT_B | LIGHT_FLAGS | LIGHT_POP)

/* By opcode D8..DF and ModRM.reg; 0: the long way. */
static const uint16_t memory_shapes[8][8] = {
    { ARITH, ARITH, COM, COMP, ARITH, ARITH, ARITH, ARITH },
    { FLD, 0, ST, STP, 0, 0, 0, 0 },
    { ARITH, ARITH, COM, COMP, ARITH, ARITH, ARITH, ARITH },
    { FLD, STP, ST, STP, 0, 0, 0, 0 },
    { ARITH, ARITH, COM, COMP, ARITH, ARITH, ARITH, ARITH },
    { FLD, STP, ST, STP, 0, 0, 0, 0 },
    { ARITH, ARITH, COM, COMP, ARITH, ARITH, ARITH, ARITH },
    { FLD, STP, ST, STP, 0, FLD, 0, STP },
};
static const uint16_t register_shapes[8][8] = {
    { ARITH_ST, ARITH_ST, COM_ST, COMP_ST, ARITH_ST, ARITH_ST, ARITH_ST, ARITH_ST },
    { 0 },
    { 0 },
    { 0, 0, 0, 0, 0, COMI, COMI, 0 },
    { ARITH_TO, ARITH_TO, 0, 0, ARITH_TO, ARITH_TO, ARITH_TO, ARITH_TO },
    { 0, 0, 0, 0, COM_ST, COMP_ST, 0, 0 },
    { ARITH_POP, ARITH_POP, 0, 0, ARITH_POP, ARITH_POP, ARITH_POP, ARITH_POP },
    { 0, 0, 0, 0, 0, COMIP, COMIP, 0 },
};

static unsigned shape_of(const x86_insn *in)
{
    unsigned group = in->opcode & 7, reg = in->modrm >> 3 & 7;
    if (in->modrm < 0xc0)
        return memory_shapes[group][reg];
    if (in->opcode == 0xd9)                                /* FTST, FSQRT, FRNDINT */
        return in->modrm == 0xe4 ? COM : in->modrm == 0xfa || in->modrm == 0xfc ? ARITH : 0;
    if ((in->opcode == 0xda && in->modrm == 0xe9) || (in->opcode == 0xde && in->modrm == 0xd9))
        return LIGHT_A | LIGHT_B | LIGHT_CC | LIGHT_POP2;
    return register_shapes[group][reg];
}

/* ---- the stack ---- */
static bool in_use(const x86_cpu *cpu, unsigned i)
{
    return X86_FPU_FTW(cpu) >> ((X86_FSW_TOP(X86_FPU_FSW(cpu)) + i) & 7) & 1;
}

static void move_top(x86_cpu *cpu, unsigned by)
{
    unsigned fsw = X86_FPU_FSW(cpu);
    X86_FPU_FSW(cpu) = (uint16_t)((fsw & ~0x3800u) | ((fsw + (by << 11)) & 0x3800));
}

static void push(x86_cpu *cpu, const uint8_t value[10])
{
    memmove(X86_FPU_ST(cpu, 1), X86_FPU_ST(cpu, 0), 112);
    memcpy(X86_FPU_ST(cpu, 0), value, 10);
    memset(X86_FPU_ST(cpu, 0) + 10, 0, 6);
    move_top(cpu, 7);
    X86_FPU_FTW(cpu) |= (uint8_t)(1u << X86_FSW_TOP(X86_FPU_FSW(cpu)));
}

static void pop(x86_cpu *cpu)
{
    uint8_t old[16];
    X86_FPU_FTW(cpu) &= (uint8_t)~(1u << X86_FSW_TOP(X86_FPU_FSW(cpu)));
    memcpy(old, X86_FPU_ST(cpu, 0), 16);
    memmove(X86_FPU_ST(cpu, 0), X86_FPU_ST(cpu, 1), 112);
    memcpy(X86_FPU_ST(cpu, 7), old, 16);
    move_top(cpu, 1);
}

/* ---- instructions that only move registers ---- */
static void clear_c1(x86_cpu *cpu)
{
    X86_FPU_FSW(cpu) &= (uint16_t)~FSW_C1;
}

static void exchange(x86_cpu *cpu, unsigned i)
{
    uint8_t a[16];
    memcpy(a, X86_FPU_ST(cpu, 0), 16);
    memcpy(X86_FPU_ST(cpu, 0), X86_FPU_ST(cpu, i), 16);
    memcpy(X86_FPU_ST(cpu, i), a, 16);
    clear_c1(cpu);
}

static void copy_up(x86_cpu *cpu, unsigned i)
{
    uint8_t value[10];
    memcpy(value, X86_FPU_ST(cpu, i), 10);
    push(cpu, value);
    clear_c1(cpu);
}

static bool register_move(x86_cpu *cpu, const x86_insn *in)
{
    static const uint8_t constants[2][10] = { { 0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f }, { 0 } };
    unsigned i = in->modrm & 7, form = in->opcode << 8 | (in->modrm & 0xf8);
    if (in->modrm == 0xe8 || in->modrm == 0xee) {          /* FLD1, FLDZ */
        if (in->opcode != 0xd9 || in_use(cpu, 7))
            return false;
        push(cpu, constants[in->modrm == 0xee]);
        clear_c1(cpu);
        return true;
    }
    if (!in_use(cpu, 0))
        return false;
    switch (form) {
    case 0xd9c0:                                           /* FLD ST(i) */
        if (!in_use(cpu, i) || in_use(cpu, 7))
            return false;
        copy_up(cpu, i);
        return true;
    case 0xd9c8:                                           /* FXCH */
        if (!in_use(cpu, i))
            return false;
        exchange(cpu, i);
        return true;
    case 0xddd0: case 0xddd8:                              /* FST, FSTP ST(i) */
        memcpy(X86_FPU_ST(cpu, i), X86_FPU_ST(cpu, 0), 16);
        X86_FPU_FTW(cpu) |= (uint8_t)(1u << ((X86_FSW_TOP(X86_FPU_FSW(cpu)) + i) & 7));
        clear_c1(cpu);
        if (form == 0xddd8)
            pop(cpu);
        return true;
    case 0xd9e0:                                           /* FCHS, FABS */
        if (i > 1)
            return false;
        X86_FPU_ST(cpu, 0)[9] = i ? X86_FPU_ST(cpu, 0)[9] & 0x7f : X86_FPU_ST(cpu, 0)[9] ^ 0x80;
        clear_c1(cpu);
        return true;
    default:
        return false;
    }
}

/* FLD and FSTP of extended values. */
static bool extended_move(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t value[10];
    unsigned reg = in->modrm >> 3 & 7;
    if (in->opcode != 0xdb || in->modrm >= 0xc0 || (reg != 5 && reg != 7))
        return false;
    if (reg == 5 ? in_use(cpu, 7) : !in_use(cpu, 0))
        return false;
    uint64_t la = x86_op_linear(cpu, in, 10, reg == 5 ? X86_READ : X86_WRITE);
    if (reg == 5) {
        x86_read_linear(cpu, la, value, 10);
        push(cpu, value);
    } else {
        x86_write_linear(cpu, la, X86_FPU_ST(cpu, 0), 10);
        pop(cpu);
    }
    clear_c1(cpu);
    return true;
}

/* ---- arithmetic ---- */
static bool tags_allow(const x86_cpu *cpu, unsigned light, unsigned i)
{
    return (!(light & LIGHT_A) || in_use(cpu, 0)) && (!(light & LIGHT_B) || in_use(cpu, i)) &&
           (!(light & LIGHT_PUSH) || !in_use(cpu, 7));
}

static void take_results(x86_cpu *cpu, const x86_thunk_frame *frame, unsigned light, unsigned i)
{
    unsigned codes = light & LIGHT_CC ? FSW_CC : light & LIGHT_FLAGS ? 0 : FSW_C1;
    X86_FPU_FSW(cpu) = (uint16_t)((X86_FPU_FSW(cpu) & ~codes) | (frame->fsw & codes) | (frame->fsw & X86_FX_ERRORS));
    if (light & LIGHT_PUSH)
        push(cpu, frame->a);
    else if (light & LIGHT_TO_A)
        memcpy(X86_FPU_ST(cpu, 0), frame->a, 10);
    else if (light & LIGHT_TO_B)
        memcpy(X86_FPU_ST(cpu, i), frame->b, 10);
    if (light & LIGHT_FLAGS)
        cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | (frame->flags & X86_FL_ARITH);
    if (light & (LIGHT_POP | LIGHT_POP2))
        pop(cpu);
    if (light & LIGHT_POP2)
        pop(cpu);
}

static bool arithmetic(x86_cpu *cpu, const x86_insn *in)
{
    unsigned light = shape_of(in), i = in->modrm & 7;
    x86_thunk_frame *frame = x86_thunk_frame_of(cpu);
    if (!light || !tags_allow(cpu, light, i))
        return false;
    x86_thunk_fn fn = x86_thunk_light(cpu, in, light);
    if (!fn)
        return false;
    uint64_t la = 0;
    unsigned size = in->modrm < 0xc0 ? in->op[0].size : 0;
    if (size) {
        la = x86_op_linear(cpu, in, size, light & LIGHT_STORE ? X86_WRITE : X86_READ);
        if (!(light & LIGHT_STORE))
            x86_read_linear(cpu, la, frame->memory, size);
    }
    frame->fcw = X86_FPU_FCW(cpu);
    memcpy(frame->a, X86_FPU_ST(cpu, 0), 10);
    memcpy(frame->b, X86_FPU_ST(cpu, i), 10);
    fn(cpu, frame->memory, frame);
    if (light & LIGHT_STORE)
        x86_write_linear(cpu, la, frame->memory, size);
    take_results(cpu, frame, light, i);
    return true;
}

bool x86_fpu_light(x86_cpu *cpu, const x86_insn *in)
{
    if ((X86_FPU_FCW(cpu) & X86_FX_ERRORS) != X86_FX_ERRORS)
        return false;
    bool is_done = in->modrm >= 0xc0 ? register_move(cpu, in) || arithmetic(cpu, in) : extended_move(cpu, in) || arithmetic(cpu, in);
    if (is_done)
        x86_fpu_set_pointers(cpu, in);
    return is_done;
}
