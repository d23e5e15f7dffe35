/* op_fpu.c - x87.
 *
 * Arithmetic, loads and stores run natively with the guest's real control word: the thunk loads the guest's x87 state, executes
 * one instruction and saves the state without waiting, so an unmasked exception stays pending in the saved FSW.ES and is
 * raised as #MF by the guest's next waiting instruction, as on hardware. A thunk is never entered with an exception
 * pending. Control instructions work on the image directly, and op_fpu_light.c has a shorter way for common cases.
 *
 * The image (FXSAVE layout) holds the registers stack-relative and the tags in physical order. FIP, FDP and FOP are always
 * the last non-control instruction's; their selectors are in software bytes of the image (simd.h).
 */
#include "x86/simd.h"

#include <Zydis/Mnemonic.h>
#include <string.h>

#define FCW_INIT 0x037fu
#define FCW_VALID 0x1f3fu
#define FCW_ONES 0x0040u                     /* reads as one */

/* ---- checks ---- */
void x86_check_fpu(x86_cpu *cpu)
{
    if (cpu->cr0 & (X86_CR0_EM | X86_CR0_TS))
        x86_raise(cpu, X86_NM);
}

static bool error_pending(const x86_cpu *cpu)
{
    return X86_FPU_FSW(cpu) & ~X86_FPU_FCW(cpu) & X86_FX_ERRORS;
}

/* With CR0.NE = 0 the error goes to the interrupt controller as IRQ 13 and the processor waits for it: the run loop gets
 * control before this instruction, so that the interrupt is taken at this boundary. When the same instruction comes again
 * with the error still there (the interrupt is masked), it goes on as behind IGNNE#. */
void x86_check_fpu_error(x86_cpu *cpu)
{
    if (!error_pending(cpu))
        return;
    if (cpu->cr0 & X86_CR0_NE)
        x86_raise(cpu, X86_MF);
    uint64_t *seen = x86_ferr_seen(cpu);
    if (*seen == cpu->rip + 1) {
        *seen = 0;
        return;
    }
    *seen = cpu->rip + 1;
    if (cpu->env->ferr)
        cpu->env->ferr(cpu);
    x86_leave(cpu, X86_STOP_ATTENTION);
}

static void begin_waiting(x86_cpu *cpu)
{
    x86_check_fpu(cpu);
    x86_check_fpu_error(cpu);
}

/* ---- image helpers ---- */
void x86_fpu_update_es(x86_cpu *cpu)
{
    uint16_t fsw = X86_FPU_FSW(cpu) & (uint16_t)~(X86_FSW_ES | X86_FSW_B);
    X86_FPU_FSW(cpu) = error_pending(cpu) ? fsw | X86_FSW_ES | X86_FSW_B : fsw;
}

/* Change TOP while the physical registers keep their contents. */
static void set_top(x86_cpu *cpu, unsigned top)
{
    unsigned old = X86_FSW_TOP(X86_FPU_FSW(cpu));
    X86_FPU_FSW(cpu) = (uint16_t)((X86_FPU_FSW(cpu) & ~0x3800u) | top << 11);
    if (old == top)
        return;
    uint8_t slots[128];
    memcpy(slots, X86_FPU_ST(cpu, 0), sizeof slots);
    for (unsigned i = 0; i < 8; i++)
        memcpy(X86_FPU_ST(cpu, i), slots + 16 * ((i + top - old) & 7), 16);
}

void x86_mmx_enter(x86_cpu *cpu)
{
    set_top(cpu, 0);
    X86_FPU_FTW(cpu) = 0xff;
}

void x86_fpu_init(x86_cpu *cpu)
{
    set_top(cpu, 0);
    X86_FPU_FCW(cpu) = FCW_INIT;
    X86_FPU_FSW(cpu) = 0;
    X86_FPU_FTW(cpu) = 0;
    X86_FPU_FOP(cpu) = 0;
    X86_FPU_FIP(cpu) = X86_FPU_FDP(cpu) = 0;
    X86_FPU_FCS(cpu) = X86_FPU_FDS(cpu) = 0;
}

/* SDM vol. 1, 8.1.7: 0 valid, 1 zero, 2 special, 3 empty. */
static unsigned tag_of(const uint8_t *st)
{
    uint64_t mantissa;
    uint16_t exponent;
    memcpy(&mantissa, st, 8);
    memcpy(&exponent, st + 8, 2);
    exponent &= 0x7fff;
    if (exponent == 0 && mantissa == 0)
        return 1;
    return exponent == 0 || exponent == 0x7fff || !(mantissa >> 63) ? 2 : 0;
}

uint16_t x86_fpu_full_tag(const x86_cpu *cpu)
{
    unsigned top = X86_FSW_TOP(X86_FPU_FSW(cpu)), full = 0;
    for (unsigned i = 0; i < 8; i++)
        full |= (X86_FPU_FTW(cpu) >> i & 1 ? tag_of(X86_FPU_ST(cpu, (i - top) & 7)) : 3u) << (2 * i);
    return (uint16_t)full;
}

uint8_t x86_fpu_abridged_tag(uint16_t full)
{
    unsigned abridged = 0;
    for (unsigned i = 0; i < 8; i++)
        abridged |= (unsigned)((full >> (2 * i) & 3) != 3) << i;
    return (uint8_t)abridged;
}

/* ---- native instructions ---- */
static bool is_store(const x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_FST: case ZYDIS_MNEMONIC_FSTP: case ZYDIS_MNEMONIC_FIST: case ZYDIS_MNEMONIC_FISTP:
    case ZYDIS_MNEMONIC_FISTTP: case ZYDIS_MNEMONIC_FBSTP:
        return in->flags & X86_IF_MEM;
    default:
        return false;
    }
}

/* Last instruction pointers. In 64-bit mode they are 64-bit offsets, else 32-bit offsets with a selector. */
void x86_fpu_set_pointers(x86_cpu *cpu, const x86_insn *in)
{
    X86_FPU_FOP(cpu) = (uint16_t)((in->opcode & 7) << 8 | in->modrm);
    X86_FPU_FIP(cpu) = cpu->code_size == 8 ? cpu->rip : (uint32_t)cpu->rip;
    X86_FPU_FCS(cpu) = cpu->seg[X86_CS].sel;
    if (!(in->flags & X86_IF_MEM))
        return;
    uint64_t off = x86_offset(cpu, in);
    X86_FPU_FDP(cpu) = cpu->code_size == 8 ? off : (uint32_t)off;
    X86_FPU_FDS(cpu) = in->seg < X86_LDTR ? cpu->seg[in->seg].sel : 0;
}

/* Bytes 24..31 of the image are MXCSR and its mask: not x87 state. */
static void load_frame(const x86_cpu *cpu, x86_thunk_frame *frame)
{
    memcpy(frame->fx, cpu->fpu.image, 24);
    memcpy(frame->fx + 32, cpu->fpu.image + 32, 128);
    uint32_t mxcsr = 0x1f80;
    memcpy(frame->fx + 24, &mxcsr, 4);
    frame->flags = (cpu->rflags & X86_FL_ARITH) | X86_FL_1;
}

static void commit_frame(x86_cpu *cpu, const x86_insn *in, const x86_thunk_frame *frame, uint16_t fcw)
{
    memcpy(cpu->fpu.image, frame->fx, 5);                  /* FCW, FSW, FTW */
    memcpy(cpu->fpu.image + 32, frame->fx + 32, 128);
    X86_FPU_FCW(cpu) = fcw;
    x86_fpu_update_es(cpu);
    x86_fpu_set_pointers(cpu, in);
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | (frame->flags & X86_FL_ARITH);
}

void x86_op_x87(x86_cpu *cpu, const x86_insn *in)
{
    begin_waiting(cpu);
    x86_thunk_ready(cpu);
    if (x86_fpu_light(cpu, in))
        return;
    x86_thunk_fn fn = x86_thunk(cpu, in);
    if (!fn)
        x86_raise(cpu, X86_UD);
    x86_thunk_frame *frame = x86_thunk_frame_of(cpu);
    int m = x86_memory_operand(in);
    unsigned size = m < 0 ? 0 : in->op[m].size <= sizeof frame->memory ? in->op[m].size : 0;
    bool store = is_store(in);
    void *memory = frame->memory;
    uint64_t la = 0;
    if (size) {
        la = x86_op_linear(cpu, in, size, store ? X86_WRITE : X86_READ);
        if (!store)
            x86_read_linear(cpu, la, memory, size);
        else
            x86_probe_write(cpu, la, size);
    }
    load_frame(cpu, frame);
    uint16_t fcw = X86_FPU_FCW(cpu), ignored = 0;
    if (error_pending(cpu)) {                              /* behind IGNNE#: nothing may fire on the host */
        ignored = X86_FX_ERRORS;
        frame->fx[0] |= X86_FX_ERRORS;
    }
    fn(cpu, memory, frame);
    uint16_t fsw;
    memcpy(&fsw, frame->fx + 2, 2);
    bool suppressed = fsw & ~(fcw | ignored) & 0x19;       /* unmasked IE, OE, UE: nothing is stored */
    if (store && !suppressed)
        x86_write_linear(cpu, la, memory, size);
    commit_frame(cpu, in, frame, fcw);
}

/* ---- control ---- */
void x86_op_fwait(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if ((cpu->cr0 & (X86_CR0_MP | X86_CR0_TS)) == (X86_CR0_MP | X86_CR0_TS))
        x86_raise(cpu, X86_NM);
    x86_check_fpu_error(cpu);
}

void x86_op_fnop(x86_cpu *cpu, const x86_insn *in)
{
    begin_waiting(cpu);
    x86_fpu_set_pointers(cpu, in);
}

/* FENI, FDISI, FSETPM: no operation since the 387, and they do not wait. */
void x86_op_fpu_nop(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_check_fpu(cpu);
}

void x86_op_fninit(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_check_fpu(cpu);
    x86_fpu_init(cpu);
}

void x86_op_fnclex(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_check_fpu(cpu);
    X86_FPU_FSW(cpu) &= 0x7f00;
}

static void set_fcw(x86_cpu *cpu, uint16_t value)
{
    X86_FPU_FCW(cpu) = (value & FCW_VALID) | FCW_ONES;
    x86_fpu_update_es(cpu);
}

void x86_op_fldcw(x86_cpu *cpu, const x86_insn *in)
{
    uint16_t value;
    begin_waiting(cpu);
    x86_read_linear(cpu, x86_op_linear(cpu, in, 2, X86_READ), &value, 2);
    set_fcw(cpu, value);
}

void x86_op_fnstcw(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_fpu(cpu);
    x86_write_linear(cpu, x86_op_linear(cpu, in, 2, X86_WRITE), &X86_FPU_FCW(cpu), 2);
}

void x86_op_fnstsw(x86_cpu *cpu, const x86_insn *in)
{
    x86_check_fpu(cpu);
    if (in->flags & X86_IF_MEM)
        x86_write_linear(cpu, x86_op_linear(cpu, in, 2, X86_WRITE), &X86_FPU_FSW(cpu), 2);
    else
        x86_set_gpr(cpu, X86_RAX, 2, X86_FPU_FSW(cpu));
}

/* ---- environments (SDM vol. 1, figures 8-9 to 8-12) ---- */
static void put16(uint8_t *p, unsigned v)
{
    uint16_t w = (uint16_t)v;
    memcpy(p, &w, 2);
}

static void put32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}

static uint16_t get16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* In real and virtual-8086 mode the environment holds linear addresses. */
static void make_environment(const x86_cpu *cpu, uint8_t *env, bool wide)
{
    uint32_t fip = (uint32_t)X86_FPU_FIP(cpu), fdp = (uint32_t)X86_FPU_FDP(cpu);
    uint16_t fop = X86_FPU_FOP(cpu) & 0x7ff;
    bool is_real = !x86_is_protected(cpu);
    unsigned step = wide ? 4 : 2;
    memset(env, wide ? 0xff : 0, wide ? 28 : 14);
    put16(env, X86_FPU_FCW(cpu));
    put16(env + step, X86_FPU_FSW(cpu));
    put16(env + 2 * step, x86_fpu_full_tag(cpu));
    if (is_real) {
        fip += (uint32_t)X86_FPU_FCS(cpu) << 4;
        fdp += (uint32_t)X86_FPU_FDS(cpu) << 4;
    }
    if (!wide) {
        put16(env + 6, fip);
        put16(env + 8, is_real ? (fip >> 4 & 0xf000) | fop : X86_FPU_FCS(cpu));
        put16(env + 10, fdp);
        put16(env + 12, is_real ? fdp >> 4 & 0xf000 : X86_FPU_FDS(cpu));
    } else if (is_real) {
        put32(env + 12, 0xffff0000u | (uint16_t)fip);
        put32(env + 16, (fip >> 16) << 12 | fop);
        put32(env + 20, 0xffff0000u | (uint16_t)fdp);
        put32(env + 24, (fdp >> 16) << 12);
    } else {
        put32(env + 12, fip);
        put32(env + 16, (uint32_t)fop << 16 | X86_FPU_FCS(cpu));
        put32(env + 20, fdp);
        put16(env + 24, X86_FPU_FDS(cpu));
    }
}

static void load_pointers(x86_cpu *cpu, const uint8_t *env, bool wide)
{
    bool is_real = !x86_is_protected(cpu);
    uint32_t fip, fdp;
    uint16_t fcs = 0, fds = 0, fop = X86_FPU_FOP(cpu);
    if (!wide) {
        fip = get16(env + 6);
        fdp = get16(env + 10);
        if (is_real) {
            fip |= (uint32_t)(get16(env + 8) & 0xf000) << 4;
            fdp |= (uint32_t)(get16(env + 12) & 0xf000) << 4;
            fop = get16(env + 8) & 0x7ff;
        } else {
            fcs = get16(env + 8);
            fds = get16(env + 12);
        }
    } else if (is_real) {
        fip = get16(env + 12) | (get32(env + 16) >> 12 & 0xffff) << 16;
        fdp = get16(env + 20) | (get32(env + 24) >> 12 & 0xffff) << 16;
        fop = get16(env + 16) & 0x7ff;
    } else {
        fip = get32(env + 12);
        fdp = get32(env + 20);
        fcs = get16(env + 16);
        fds = get16(env + 24);
        fop = get16(env + 18) & 0x7ff;
    }
    X86_FPU_FIP(cpu) = fip;
    X86_FPU_FDP(cpu) = fdp;
    X86_FPU_FOP(cpu) = fop;
    X86_FPU_FCS(cpu) = fcs;
    X86_FPU_FDS(cpu) = fds;
}

static void load_environment(x86_cpu *cpu, const uint8_t *env, bool wide)
{
    unsigned step = wide ? 4 : 2;
    uint16_t fsw = get16(env + step);
    set_top(cpu, X86_FSW_TOP(fsw));
    X86_FPU_FSW(cpu) = fsw;
    X86_FPU_FTW(cpu) = x86_fpu_abridged_tag(get16(env + 2 * step));
    load_pointers(cpu, env, wide);
    set_fcw(cpu, get16(env));
}

/* Operand sizes 28 and 108 bytes are the 32-bit forms of FSTENV and FSAVE, 14 and 94 the 16-bit ones. */
static bool is_wide(const x86_insn *in)
{
    return in->op[0].size == 28 || in->op[0].size == 108;
}

void x86_op_fnstenv(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t env[28];
    bool wide = is_wide(in);
    x86_check_fpu(cpu);
    make_environment(cpu, env, wide);
    unsigned n = wide ? 28 : 14;
    x86_write_linear(cpu, x86_op_linear(cpu, in, n, X86_WRITE), env, n);
    X86_FPU_FCW(cpu) |= X86_FX_ERRORS;
    x86_fpu_update_es(cpu);
}

void x86_op_fldenv(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t env[28];
    bool wide = is_wide(in);
    unsigned n = wide ? 28 : 14;
    begin_waiting(cpu);
    x86_read_linear(cpu, x86_op_linear(cpu, in, n, X86_READ), env, n);
    load_environment(cpu, env, wide);
}

void x86_op_fnsave(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t area[108];
    bool wide = is_wide(in);
    unsigned head = wide ? 28 : 14, n = head + 80;
    x86_check_fpu(cpu);
    make_environment(cpu, area, wide);
    for (unsigned i = 0; i < 8; i++)
        memcpy(area + head + 10 * i, X86_FPU_ST(cpu, i), 10);
    x86_write_linear(cpu, x86_op_linear(cpu, in, n, X86_WRITE), area, n);
    x86_fpu_init(cpu);
}

void x86_op_frstor(x86_cpu *cpu, const x86_insn *in)
{
    uint8_t area[108];
    bool wide = is_wide(in);
    unsigned head = wide ? 28 : 14, n = head + 80;
    begin_waiting(cpu);
    x86_read_linear(cpu, x86_op_linear(cpu, in, n, X86_READ), area, n);
    load_environment(cpu, area, wide);
    for (unsigned i = 0; i < 8; i++) {
        memcpy(X86_FPU_ST(cpu, i), area + head + 10 * i, 10);
        memset(X86_FPU_ST(cpu, i) + 10, 0, 6);
    }
}
