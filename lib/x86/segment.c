/* segment.c - descriptors and segment registers: reading descriptors, the checks of every kind of load, inner stacks.
 *
 * The instructions that transfer control through segments are in op_far.c; those that load or examine segment registers
 * are at the end of this file. Checks and error codes: SDM vol. 3, chapters 3 and 5; vol. 2 under each instruction.
 */
#include "x86/ops.h"
#include "x86/system.h"

#define ATTR_REAL 0x93                 /* present, read/write data, accessed */
#define ATTR_V86 0xf3                  /* the same with DPL 3 */

/* ---- descriptors ---- */

bool x86_desc_read(x86_cpu *cpu, uint16_t sel, x86_desc *d)
{
    uint64_t base = cpu->gdtr.base;
    uint32_t limit = cpu->gdtr.limit, words[2];
    if (sel & 4) {
        const x86_seg *ldt = &cpu->seg[X86_LDTR];
        if (!(ldt->attr & X86_SEG_P))
            return false;
        base = ldt->base;
        limit = ldt->limit;
    }
    if ((sel | 7u) > limit)
        return false;
    d->sel = sel;
    d->la = base + (sel & 0xfff8);
    if (!x86_lma(cpu))
        d->la = (uint32_t)d->la;
    d->up = 0;
    x86_read_system(cpu, d->la, words, 8);
    d->lo = words[0];
    d->hi = words[1];
    return true;
}

void x86_desc_load(x86_cpu *cpu, uint16_t sel, uint8_t vector, x86_desc *d)
{
    if (!x86_desc_read(cpu, sel, d))
        x86_raise_sel(cpu, vector, sel);
}

void x86_desc_load_upper(x86_cpu *cpu, x86_desc *d, uint8_t vector)
{
    uint32_t limit = d->sel & 4 ? cpu->seg[X86_LDTR].limit : cpu->gdtr.limit, words[2];
    if ((d->sel | 7u) + 8 > limit)
        x86_raise_sel(cpu, vector, d->sel);
    x86_read_system(cpu, d->la + 8, words, 8);
    if (words[1] >> 8 & 31)            /* the type field of the second half must be zero */
        x86_raise_sel(cpu, vector, d->sel);
    d->up = words[0];
}

void x86_desc_to_seg(const x86_desc *d, uint16_t sel, x86_seg *seg)
{
    uint32_t limit = (d->lo & 0xffff) | (d->hi & 0xf0000);
    seg->sel = sel;
    seg->base = (d->lo >> 16) | (d->hi & 0xff) << 16 | (d->hi & 0xff000000);
    seg->attr = d->hi >> 8 & 0xf0ff;
    seg->limit = d->hi & 1u << 23 ? limit << 12 | 0xfff : limit;
}

/* Change bits of a descriptor's upper half without losing another CPU's update. */
static void update_upper_half(x86_cpu *cpu, uint64_t la, uint32_t set, uint32_t clear)
{
    uint32_t old, new_value, again;
    uint64_t gpa;
    for (;;) {
        x86_read_system(cpu, la, &old, 4);
        new_value = (old | set) & ~clear;
        if (new_value == old)
            return;
        if (!cpu->env->fill(cpu, la, X86_WRITE, X86_CTX_KERNEL, &gpa))
            x86_raise_fault(cpu, &cpu->fault);
        if ((la & 3) == 0 && x86_cmpxchg_phys(cpu, gpa, 4, old, new_value))
            return;
        x86_read_system(cpu, la, &again, 4);
        if (again == old) {            /* not RAM that can be exchanged: a plain write */
            x86_write_system(cpu, la, &new_value, 4);
            return;
        }
    }
}

#define DESC_ACCESSED 0x100u
#define DESC_BUSY 0x200u

void x86_desc_set_accessed(x86_cpu *cpu, x86_desc *d)
{
    if (d->hi & DESC_ACCESSED)
        return;
    update_upper_half(cpu, d->la + 4, DESC_ACCESSED, 0);
    d->hi |= DESC_ACCESSED;
}

void x86_desc_set_busy(x86_cpu *cpu, uint64_t la, bool busy)
{
    update_upper_half(cpu, la + 4, busy ? DESC_BUSY : 0, busy ? 0 : DESC_BUSY);
}

/* ---- segment registers ---- */

void x86_set_real_seg(x86_cpu *cpu, unsigned index, uint16_t sel)
{
    x86_seg *seg = &cpu->seg[index];   /* limit and size survive: "unreal" mode */
    seg->sel = sel;
    seg->base = (uint32_t)sel << 4;
    seg->attr = (seg->attr & (X86_SEG_DB | X86_SEG_G)) | ATTR_REAL;
}

void x86_set_v86_seg(x86_cpu *cpu, unsigned index, uint16_t sel)
{
    cpu->seg[index] = (x86_seg){ .sel = sel, .base = (uint32_t)sel << 4, .limit = 0xffff, .attr = ATTR_V86 };
}

void x86_set_null_seg(x86_cpu *cpu, unsigned index, uint16_t sel)
{
    cpu->seg[index] = (x86_seg){ .sel = sel };
}

bool x86_seg_holds(const x86_seg *seg, uint64_t off, unsigned n)
{
    uint64_t last = off + n - 1;
    if ((seg->attr & 0xc) == 4)        /* expand-down data */
        return off > seg->limit && last <= (seg->attr & X86_SEG_DB ? 0xffffffffu : 0xffffu);
    return last <= seg->limit;
}

void x86_check_target(x86_cpu *cpu, const x86_seg *cs, uint64_t off)
{
    if (x86_seg_is_long(cpu, cs) ? !x86_canonical(off) : off > cs->limit)
        x86_raise_error(cpu, X86_GP, cpu->ext);
}

static void load_ss(x86_cpu *cpu, uint16_t sel)
{
    x86_desc d;
    if (x86_is_null(sel)) {
        if (cpu->code_size != 8 || cpu->cpl == 3 || (sel & 3) != cpu->cpl)
            x86_raise_error(cpu, X86_GP, 0);
        x86_set_null_seg(cpu, X86_SS, sel);
        cpu->seg[X86_SS].attr = cpu->cpl << 5;                          /* CPL lives in SS.DPL */
        x86_mode_changed(cpu);
        return;
    }
    x86_desc_load(cpu, sel, X86_GP, &d);
    if ((sel & 3) != cpu->cpl || !x86_desc_is_writable_data(&d) || x86_desc_dpl(&d) != cpu->cpl)
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_p(&d))
        x86_raise_sel(cpu, X86_SS_FAULT, sel);
    x86_desc_set_accessed(cpu, &d);
    x86_desc_to_seg(&d, sel, &cpu->seg[X86_SS]);
    x86_mode_changed(cpu);
}

static void load_data_seg(x86_cpu *cpu, unsigned index, uint16_t sel)
{
    x86_desc d;
    if (x86_is_null(sel)) {
        x86_set_null_seg(cpu, index, sel);
        return;
    }
    x86_desc_load(cpu, sel, X86_GP, &d);
    if (!x86_desc_is_readable(&d))
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_is_conforming(&d) && (x86_desc_dpl(&d) < cpu->cpl || x86_desc_dpl(&d) < (sel & 3)))
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_p(&d))
        x86_raise_sel(cpu, X86_NP, sel);
    x86_desc_set_accessed(cpu, &d);
    x86_desc_to_seg(&d, sel, &cpu->seg[index]);
}

void x86_load_seg(x86_cpu *cpu, unsigned index, uint16_t sel)
{
    if (x86_is_real(cpu)) {
        x86_set_real_seg(cpu, index, sel);
    } else if (x86_is_v86(cpu)) {
        x86_set_v86_seg(cpu, index, sel);
    } else if (index == X86_SS) {
        load_ss(cpu, sel);
    } else {
        load_data_seg(cpu, index, sel);
    }
}

void x86_drop_inner_segs(x86_cpu *cpu, unsigned new_cpl)
{
    static const uint8_t data_segs[] = { X86_ES, X86_DS, X86_FS, X86_GS };
    for (unsigned i = 0; i < sizeof data_segs; i++) {
        x86_seg *seg = &cpu->seg[data_segs[i]];
        bool is_conforming = (seg->attr & 0x1c) == 0x1c;
        bool is_inner = (seg->attr & X86_SEG_P) && !is_conforming && X86_SEG_DPL(seg) < new_cpl;
        if (is_inner || x86_is_null(seg->sel))
            seg->sel = seg->attr = 0;  /* unusable, but 64-bit code still sees the base of FS and GS */
    }
}

/* ---- stacks that are being built ---- */

x86_stack x86_current_stack(const x86_cpu *cpu)
{
    return (x86_stack){ .ss = cpu->seg[X86_SS], .sp = cpu->gpr[X86_RSP], .width = cpu->stack_size };
}

static uint64_t width_mask(unsigned width)
{
    return width == 8 ? ~UINT64_C(0) : width == 4 ? 0xffffffff : 0xffff;
}

void x86_stack_push(x86_cpu *cpu, x86_stack *st, unsigned n, uint64_t v)
{
    uint64_t mask = width_mask(st->width), sp = (st->sp - n) & mask, la = sp;
    if (st->width == 8) {
        if (!x86_canonical(sp) || !x86_canonical(sp + n - 1))
            x86_raise_sel(cpu, X86_SS_FAULT, st->error);
    } else {
        if (!x86_seg_holds(&st->ss, sp, n))
            x86_raise_sel(cpu, X86_SS_FAULT, st->error);
        la = (uint32_t)(st->ss.base + sp);
    }
    if (st->is_system)
        x86_write_system(cpu, la, &v, n);
    else
        x86_write_linear(cpu, la, &v, n);
    st->sp = (st->sp & ~mask) | sp;
}

uint64_t x86_stack_rsp(const x86_cpu *cpu, const x86_stack *st)
{
    (void)cpu;
    return st->width == 4 ? (uint32_t)st->sp : st->sp;
}

/* SS of an inner stack: any flaw is #TS, except "not present". */
static void check_inner_ss(x86_cpu *cpu, uint16_t sel, unsigned cpl, x86_desc *d)
{
    if (x86_is_null(sel))
        x86_raise_sel(cpu, X86_TS, 0);
    x86_desc_load(cpu, sel, X86_TS, d);
    if ((sel & 3u) != cpl || x86_desc_dpl(d) != cpl || !x86_desc_is_writable_data(d))
        x86_raise_sel(cpu, X86_TS, sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_SS_FAULT, sel);
}

void x86_inner_stack(x86_cpu *cpu, unsigned cpl, x86_stack *st, x86_desc *ss_desc)
{
    const x86_seg *tr = &cpu->seg[X86_TR];
    bool is_32 = tr->attr & 8;
    uint32_t at = is_32 ? cpl * 8 + 4 : cpl * 4 + 2;
    struct { uint32_t sp; uint16_t ss; } __attribute__((packed)) wide;
    struct { uint16_t sp, ss; } narrow;

    if (at + (is_32 ? 5 : 3) > tr->limit)
        x86_raise_sel(cpu, X86_TS, tr->sel);
    if (is_32) {
        x86_read_system(cpu, (uint32_t)(tr->base + at), &wide, 6);
    } else {
        x86_read_system(cpu, (uint32_t)(tr->base + at), &narrow, 4);
        wide.sp = narrow.sp;
        wide.ss = narrow.ss;
    }
    check_inner_ss(cpu, wide.ss, cpl, ss_desc);
    *st = (x86_stack){ .sp = wide.sp, .is_system = true, .error = wide.ss };
    x86_desc_to_seg(ss_desc, wide.ss, &st->ss);
    st->ss.attr |= 1;                  /* the accessed bit is set in memory by the caller, once nothing can fault */
    st->width = st->ss.attr & X86_SEG_DB ? 4 : 2;
}

uint64_t x86_tss64_rsp(x86_cpu *cpu, unsigned slot_offset)
{
    const x86_seg *tr = &cpu->seg[X86_TR];
    uint64_t rsp;
    if (slot_offset + 7 > tr->limit)
        x86_raise_sel(cpu, X86_TS, tr->sel);
    x86_read_system(cpu, tr->base + slot_offset, &rsp, 8);
    if (!x86_canonical(rsp))
        x86_raise_sel(cpu, X86_SS_FAULT, 0);
    return rsp;
}

/* ---- instructions ---- */

static void add_rsp(x86_cpu *cpu, unsigned width, int64_t delta)
{
    uint64_t mask = width_mask(width), sp = (cpu->gpr[X86_RSP] + (uint64_t)delta) & mask;
    cpu->gpr[X86_RSP] = width == 4 ? sp : (cpu->gpr[X86_RSP] & ~mask) | sp;
}

void x86_op_mov_seg(x86_cpu *cpu, const x86_insn *in)
{
    if (in->op[0].kind != X86_OP_SEG) {
        x86_set_op(cpu, in, 0, cpu->seg[in->op[1].reg].sel);
        return;
    }
    x86_load_seg(cpu, in->op[0].reg, (uint16_t)x86_get_op(cpu, in, 1));
    if (in->op[0].reg == X86_SS)
        cpu->inhibit = 2;
}

void x86_op_push_seg(x86_cpu *cpu, const x86_insn *in)
{
    x86_push(cpu, in->osz, cpu->seg[in->op[0].reg].sel);
}

void x86_op_pop_seg(x86_cpu *cpu, const x86_insn *in)
{
    unsigned width = cpu->stack_size, index = in->op[0].reg;
    x86_load_seg(cpu, index, (uint16_t)x86_peek(cpu, in->osz, 0));
    add_rsp(cpu, width, in->osz);
    if (index == X86_SS)
        cpu->inhibit = 2;
}

static void load_far_pointer(x86_cpu *cpu, const x86_insn *in, unsigned index)
{
    uint8_t buf[10];
    uint64_t off = 0;
    uint16_t sel;
    unsigned n = in->osz;
    if (in->op[1].kind != X86_OP_MEM)
        x86_raise(cpu, X86_UD);
    x86_read_linear(cpu, x86_op_linear(cpu, in, n + 2, X86_READ), buf, n + 2);
    __builtin_memcpy(&off, buf, n);
    __builtin_memcpy(&sel, buf + n, 2);
    x86_load_seg(cpu, index, sel);
    x86_set_gpr(cpu, in->op[0].reg, n, off);
}

void x86_op_les(x86_cpu *cpu, const x86_insn *in) { load_far_pointer(cpu, in, X86_ES); }
void x86_op_lds(x86_cpu *cpu, const x86_insn *in) { load_far_pointer(cpu, in, X86_DS); }
void x86_op_lss(x86_cpu *cpu, const x86_insn *in) { load_far_pointer(cpu, in, X86_SS); }
void x86_op_lfs(x86_cpu *cpu, const x86_insn *in) { load_far_pointer(cpu, in, X86_FS); }
void x86_op_lgs(x86_cpu *cpu, const x86_insn *in) { load_far_pointer(cpu, in, X86_GS); }

static void set_zf(x86_cpu *cpu, bool zf)
{
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ZF) | (zf ? X86_FL_ZF : 0);
}

/* System descriptor types that LAR and LSL accept, by type number; long mode knows only the 64-bit ones. */
#define TYPES_LAR_LEGACY 0x1a3eu       /* 1-5, 9, 11, 12 */
#define TYPES_LAR_LONG 0x1a04u         /* 2, 9, 11, 12 */
#define TYPES_LSL_LEGACY 0x0a0eu       /* 1-3, 9, 11 */
#define TYPES_LSL_LONG 0x0a04u         /* 2, 9, 11 */

/* The selector in operand `i` names a descriptor that the current CPL and its RPL may see, of one of `system_types`. */
static bool find_visible(x86_cpu *cpu, const x86_insn *in, unsigned i, unsigned system_types, x86_desc *d)
{
    if (!x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
    uint16_t sel = (uint16_t)x86_get_op(cpu, in, i);
    if (x86_is_null(sel) || !x86_desc_read(cpu, sel, d))
        return false;
    if (!x86_desc_s(d) && !(system_types >> x86_desc_type(d) & 1))
        return false;
    return x86_desc_is_conforming(d) || (x86_desc_dpl(d) >= cpu->cpl && x86_desc_dpl(d) >= (sel & 3));
}

void x86_op_lar(x86_cpu *cpu, const x86_insn *in)
{
    x86_desc d;
    bool is_ok = find_visible(cpu, in, 1, x86_lma(cpu) ? TYPES_LAR_LONG : TYPES_LAR_LEGACY, &d);
    if (is_ok)
        x86_set_gpr(cpu, in->op[0].reg, in->osz, in->osz == 2 ? d.hi & 0xff00 : d.hi & 0xffff00);
    set_zf(cpu, is_ok);
}

void x86_op_lsl(x86_cpu *cpu, const x86_insn *in)
{
    x86_desc d;
    x86_seg seg;
    bool is_ok = find_visible(cpu, in, 1, x86_lma(cpu) ? TYPES_LSL_LONG : TYPES_LSL_LEGACY, &d);
    if (is_ok) {
        x86_desc_to_seg(&d, d.sel, &seg);
        x86_set_gpr(cpu, in->op[0].reg, in->osz, seg.limit);
    }
    set_zf(cpu, is_ok);
}

void x86_op_verr(x86_cpu *cpu, const x86_insn *in)
{
    x86_desc d;
    set_zf(cpu, find_visible(cpu, in, 0, 0, &d) && x86_desc_is_readable(&d));
}

void x86_op_verw(x86_cpu *cpu, const x86_insn *in)
{
    x86_desc d;
    set_zf(cpu, find_visible(cpu, in, 0, 0, &d) && x86_desc_is_writable_data(&d));
}

void x86_op_arpl(x86_cpu *cpu, const x86_insn *in)
{
    if (!x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
    uint64_t dst = x86_get_op(cpu, in, 0), src = x86_get_op(cpu, in, 1);
    bool is_lower = (dst & 3) < (src & 3);
    if (is_lower)
        x86_set_op(cpu, in, 0, (dst & ~UINT64_C(3)) | (src & 3));
    set_zf(cpu, is_lower);
}
