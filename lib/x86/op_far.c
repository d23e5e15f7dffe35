/* op_far.c - far control transfers: JMP, CALL, RET and IRET in every mode (SDM vol. 2; vol. 3, 5.8).
 *
 * Each function gathers and checks everything first and commits CS, SS, RSP, RFLAGS and next_rip last; only task
 * switches (task.c) change state before they are past their last possible fault.
 */
#include "x86/ops.h"
#include "x86/system.h"

static uint64_t size_mask(unsigned n)
{
    return n == 8 ? ~UINT64_C(0) : n == 4 ? 0xffffffff : 0xffff;
}

/* ---- operands ---- */

static void far_operand(x86_cpu *cpu, const x86_insn *in, uint16_t *sel, uint64_t *off)
{
    uint8_t buf[10];
    unsigned n = in->osz;
    if (in->op[0].kind == X86_OP_FAR) {
        *sel = in->sel;
        *off = in->imm & size_mask(n);
        return;
    }
    if (in->op[0].kind != X86_OP_MEM)
        x86_raise(cpu, X86_UD);
    x86_read_linear(cpu, x86_op_linear(cpu, in, n + 2, X86_READ), buf, n + 2);
    *off = 0;
    __builtin_memcpy(off, buf, n);
    __builtin_memcpy(sel, buf + n, 2);
}

/* Real and v86 mode have no descriptors. */
static void far_flat(x86_cpu *cpu, const x86_insn *in, uint16_t sel, uint64_t off, bool is_call)
{
    x86_stack st = x86_current_stack(cpu);
    if (is_call) {
        x86_stack_push(cpu, &st, in->osz, cpu->seg[X86_CS].sel);
        x86_stack_push(cpu, &st, in->osz, cpu->next_rip);
    }
    if (off > (x86_is_v86(cpu) ? 0xffff : cpu->seg[X86_CS].limit))
        x86_raise_error(cpu, X86_GP, 0);
    if (is_call)
        cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    if (x86_is_v86(cpu))
        x86_set_v86_seg(cpu, X86_CS, sel);
    else
        x86_set_real_seg(cpu, X86_CS, sel);
    cpu->next_rip = off;
    x86_mode_changed(cpu);
}

/* ---- code segments as direct targets ---- */

static bool has_bad_long_bits(const x86_cpu *cpu, const x86_desc *d)
{
    return x86_lma(cpu) && (d->hi >> 21 & 3) == 3;                      /* L and D both set */
}

static void commit_cs(x86_cpu *cpu, x86_desc *d, unsigned cpl, uint64_t off)
{
    x86_desc_to_seg(d, (d->sel & 0xfffc) | cpl, &cpu->seg[X86_CS]);
    cpu->next_rip = off;
    x86_mode_changed(cpu);
}

static void far_code(x86_cpu *cpu, const x86_insn *in, x86_desc *d, uint64_t off, bool is_call)
{
    unsigned rpl = d->sel & 3, dpl = x86_desc_dpl(d);
    x86_seg cs;
    if (!x86_desc_is_code(d) || has_bad_long_bits(cpu, d))
        x86_raise_sel(cpu, X86_GP, d->sel);
    if (x86_desc_is_conforming(d) ? dpl > cpu->cpl : rpl > cpu->cpl || dpl != cpu->cpl)
        x86_raise_sel(cpu, X86_GP, d->sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_NP, d->sel);
    x86_stack st = x86_current_stack(cpu);
    if (is_call) {
        x86_stack_push(cpu, &st, in->osz, cpu->seg[X86_CS].sel);
        x86_stack_push(cpu, &st, in->osz, cpu->next_rip);
    }
    x86_desc_to_seg(d, d->sel, &cs);
    x86_check_target(cpu, &cs, off);
    x86_desc_set_accessed(cpu, d);
    if (is_call)
        cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    commit_cs(cpu, d, cpu->cpl, off);
}

/* ---- call gates ---- */

typedef struct call_gate {
    uint16_t sel;
    uint64_t off;
    unsigned n, params;                /* operand size; words or doublewords to copy */
} call_gate;

static void read_call_gate(x86_cpu *cpu, x86_desc *d, call_gate *g)
{
    bool is_long = x86_lma(cpu);
    if (x86_desc_dpl(d) < cpu->cpl || x86_desc_dpl(d) < (d->sel & 3))
        x86_raise_sel(cpu, X86_GP, d->sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_NP, d->sel);
    if (is_long)
        x86_desc_load_upper(cpu, d, X86_GP);
    g->sel = d->lo >> 16;
    g->off = (d->lo & 0xffff) | (d->hi & 0xffff0000) | (uint64_t)d->up << 32;
    g->n = is_long ? 8 : x86_desc_type(d) == X86_SYS_CALL32 ? 4 : 2;
    g->params = is_long ? 0 : d->hi & 31;
    if (g->n == 2)
        g->off &= 0xffff;
}

static void load_gate_target(x86_cpu *cpu, const call_gate *g, bool is_call, x86_desc *cs)
{
    if (x86_is_null(g->sel))
        x86_raise_error(cpu, X86_GP, 0);
    x86_desc_load(cpu, g->sel, X86_GP, cs);
    unsigned dpl = x86_desc_dpl(cs);
    if (!x86_desc_is_code(cs) || dpl > cpu->cpl || (!is_call && !x86_desc_is_conforming(cs) && dpl != cpu->cpl))
        x86_raise_sel(cpu, X86_GP, g->sel);
    if (x86_lma(cpu) && (cs->hi >> 21 & 3) != 1)                        /* 64-bit code only */
        x86_raise_sel(cpu, X86_GP, g->sel);
    if (!x86_desc_p(cs))
        x86_raise_sel(cpu, X86_NP, g->sel);
}

/* CALL through a gate to a more privileged level: new stack, old SS:ESP, parameters, return address. */
static void gate_call_inner(x86_cpu *cpu, const call_gate *g, x86_desc *cs)
{
    x86_stack st;
    x86_desc ss_desc;
    x86_seg new_cs;
    unsigned new_cpl = x86_desc_dpl(cs), n = g->n;
    uint64_t params[32];

    if (n == 8) {
        st = (x86_stack){ .sp = x86_tss64_rsp(cpu, 4 + 8 * new_cpl), .width = 8, .is_system = true };
        st.ss.sel = new_cpl;
        st.ss.attr = new_cpl << 5;
    } else {
        x86_inner_stack(cpu, new_cpl, &st, &ss_desc);
    }
    for (unsigned i = 0; i < g->params; i++)
        params[i] = x86_peek(cpu, n, i * n);
    x86_stack_push(cpu, &st, n, cpu->seg[X86_SS].sel);
    x86_stack_push(cpu, &st, n, cpu->gpr[X86_RSP]);
    for (unsigned i = g->params; i-- > 0;)
        x86_stack_push(cpu, &st, n, params[i]);
    x86_stack_push(cpu, &st, n, cpu->seg[X86_CS].sel);
    x86_stack_push(cpu, &st, n, cpu->next_rip);
    x86_desc_to_seg(cs, cs->sel, &new_cs);
    x86_check_target(cpu, &new_cs, g->off);
    x86_desc_set_accessed(cpu, cs);
    if (n != 8)
        x86_desc_set_accessed(cpu, &ss_desc);
    cpu->seg[X86_SS] = st.ss;
    cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    commit_cs(cpu, cs, new_cpl, g->off);
}

static void far_call_gate(x86_cpu *cpu, x86_desc *d, bool is_call)
{
    call_gate g;
    x86_desc cs;
    x86_seg new_cs;
    read_call_gate(cpu, d, &g);
    load_gate_target(cpu, &g, is_call, &cs);
    if (is_call && !x86_desc_is_conforming(&cs) && x86_desc_dpl(&cs) < cpu->cpl) {
        gate_call_inner(cpu, &g, &cs);
        return;
    }
    x86_stack st = x86_current_stack(cpu);
    if (is_call) {
        x86_stack_push(cpu, &st, g.n, cpu->seg[X86_CS].sel);
        x86_stack_push(cpu, &st, g.n, cpu->next_rip);
    }
    x86_desc_to_seg(&cs, cs.sel, &new_cs);
    x86_check_target(cpu, &new_cs, g.off);
    x86_desc_set_accessed(cpu, &cs);
    if (is_call)
        cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    commit_cs(cpu, &cs, cpu->cpl, g.off);
}

/* ---- far JMP and CALL ---- */

static void far_task(x86_cpu *cpu, x86_desc *d, bool is_call)
{
    x86_desc tss;
    unsigned type = x86_desc_type(d);
    if (x86_desc_dpl(d) < cpu->cpl || x86_desc_dpl(d) < (d->sel & 3))
        x86_raise_sel(cpu, X86_GP, d->sel);
    if (type == X86_SYS_TASK_GATE) {
        if (!x86_desc_p(d))
            x86_raise_sel(cpu, X86_NP, d->sel);
        x86_task_gate_tss(cpu, d->lo >> 16, &tss);
    } else {
        if (d->sel & 4)
            x86_raise_sel(cpu, X86_GP, d->sel);
        if (!x86_desc_p(d))
            x86_raise_sel(cpu, X86_NP, d->sel);
        tss = *d;
    }
    x86_task_switch(cpu, &tss, is_call ? X86_TASK_CALL : X86_TASK_JMP, cpu->next_rip, NULL);
}

static void far_transfer(x86_cpu *cpu, const x86_insn *in, bool is_call)
{
    uint16_t sel;
    uint64_t off;
    x86_desc d;
    far_operand(cpu, in, &sel, &off);
    if (!x86_is_protected(cpu)) {
        far_flat(cpu, in, sel, off, is_call);
        return;
    }
    if (x86_is_null(sel))
        x86_raise_error(cpu, X86_GP, 0);
    x86_desc_load(cpu, sel, X86_GP, &d);
    if (x86_desc_s(&d)) {
        far_code(cpu, in, &d, off, is_call);
        return;
    }
    unsigned type = x86_desc_type(&d);
    if (type == X86_SYS_CALL32 || (type == X86_SYS_CALL16 && !x86_lma(cpu)))
        far_call_gate(cpu, &d, is_call);
    else if (!x86_lma(cpu) && (type == X86_SYS_TASK_GATE || type == X86_SYS_TSS16 || type == X86_SYS_TSS32))
        far_task(cpu, &d, is_call);
    else
        x86_raise_sel(cpu, X86_GP, sel);
}

void x86_op_jmp_far(x86_cpu *cpu, const x86_insn *in) { far_transfer(cpu, in, false); }
void x86_op_call_far(x86_cpu *cpu, const x86_insn *in) { far_transfer(cpu, in, true); }

/* ---- far RET ---- */

/* CS of a return, which may only go to the same or an outer level. */
static void load_return_cs(x86_cpu *cpu, uint16_t sel, x86_desc *d)
{
    unsigned rpl = sel & 3;
    if (x86_is_null(sel))
        x86_raise_error(cpu, X86_GP, 0);
    x86_desc_load(cpu, sel, X86_GP, d);
    if (!x86_desc_is_code(d) || rpl < cpu->cpl || has_bad_long_bits(cpu, d))
        x86_raise_sel(cpu, X86_GP, sel);
    if (x86_desc_is_conforming(d) ? x86_desc_dpl(d) > rpl : x86_desc_dpl(d) != rpl)
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_NP, sel);
}

/* SS of a return to level `rpl`. A null selector is good only for 64-bit code outside ring 3. */
static void load_return_ss(x86_cpu *cpu, uint16_t sel, unsigned rpl, bool is_long, x86_desc *d, x86_seg *seg)
{
    if (x86_is_null(sel)) {
        if (!is_long || rpl == 3 || (sel & 3u) != rpl)
            x86_raise_error(cpu, X86_GP, 0);
        *seg = (x86_seg){ .sel = sel, .attr = (uint16_t)(rpl << 5) };
        d->hi = 0x100;                 /* nothing to mark accessed */
        return;
    }
    x86_desc_load(cpu, sel, X86_GP, d);
    if ((sel & 3u) != rpl || !x86_desc_is_writable_data(d) || x86_desc_dpl(d) != rpl)
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_SS_FAULT, sel);
    x86_desc_to_seg(d, sel, seg);
    seg->attr |= 1;
}

/* RSP after a return popped `sp`: a 16-bit stack segment takes only SP. */
static uint64_t returned_rsp(const x86_cpu *cpu, const x86_seg *ss, bool is_long, uint64_t sp, unsigned extra)
{
    if (is_long)
        return sp + extra;
    if (ss->attr & X86_SEG_DB)
        return (uint32_t)(sp + extra);
    return (cpu->gpr[X86_RSP] & ~UINT64_C(0xffff)) | (uint16_t)(sp + extra);
}

static void ret_flat(x86_cpu *cpu, unsigned n, unsigned extra)
{
    uint64_t off = x86_peek(cpu, n, 0);
    uint16_t sel = (uint16_t)x86_peek(cpu, n, n);
    if (off > (x86_is_v86(cpu) ? 0xffff : cpu->seg[X86_CS].limit))
        x86_raise_error(cpu, X86_GP, 0);
    x86_add_sp(cpu, 2 * n + extra);
    if (x86_is_v86(cpu))
        x86_set_v86_seg(cpu, X86_CS, sel);
    else
        x86_set_real_seg(cpu, X86_CS, sel);
    cpu->next_rip = off;
    x86_mode_changed(cpu);
}

void x86_op_ret_far(x86_cpu *cpu, const x86_insn *in)
{
    unsigned n = in->osz, extra = in->nops ? (uint16_t)in->imm : 0;
    x86_desc cs, ss_desc = { 0 };
    x86_seg new_cs, new_ss;
    if (!x86_is_protected(cpu)) {
        ret_flat(cpu, n, extra);
        return;
    }
    uint64_t off = x86_peek(cpu, n, 0), sp = 0;
    uint16_t sel = (uint16_t)x86_peek(cpu, n, n);
    unsigned rpl = sel & 3;
    load_return_cs(cpu, sel, &cs);
    x86_desc_to_seg(&cs, sel, &new_cs);
    bool is_long = x86_seg_is_long(cpu, &new_cs), is_outer = rpl > cpu->cpl;
    if (is_outer) {
        sp = x86_peek(cpu, n, 2 * n + extra);
        uint16_t ss = (uint16_t)x86_peek(cpu, n, 3 * n + extra);
        load_return_ss(cpu, ss, rpl, is_long, &ss_desc, &new_ss);
    }
    x86_check_target(cpu, &new_cs, off);
    x86_desc_set_accessed(cpu, &cs);
    if (is_outer) {
        x86_desc_set_accessed(cpu, &ss_desc);
        cpu->gpr[X86_RSP] = returned_rsp(cpu, &new_ss, is_long, sp, extra);
        cpu->seg[X86_SS] = new_ss;
        x86_drop_inner_segs(cpu, rpl);
    } else {
        x86_add_sp(cpu, 2 * n + extra);
    }
    commit_cs(cpu, &cs, rpl, off);
}

/* ---- IRET ---- */

#define FLAGS_ALWAYS (X86_FL_ARITH | X86_FL_TF | X86_FL_DF | X86_FL_NT)
#define FLAGS_WIDE (X86_FL_RF | X86_FL_AC | X86_FL_ID)

static void merge_flags(x86_cpu *cpu, uint64_t popped, uint64_t mask)
{
    cpu->rflags = (cpu->rflags & ~mask) | (popped & mask) | X86_FL_1;
}

static void iret_real(x86_cpu *cpu, unsigned n)
{
    uint64_t flags = x86_peek(cpu, n, 2 * n), mask = FLAGS_ALWAYS | X86_FL_IF | X86_FL_IOPL;
    uint64_t off = x86_peek(cpu, n, 0);
    uint16_t sel = (uint16_t)x86_peek(cpu, n, n);
    if (off > cpu->seg[X86_CS].limit)
        x86_raise_error(cpu, X86_GP, 0);
    x86_add_sp(cpu, 3 * n);
    merge_flags(cpu, flags, n == 2 ? mask : mask | FLAGS_WIDE);
    x86_set_real_seg(cpu, X86_CS, sel);
    cpu->next_rip = off;
    x86_mode_changed(cpu);
}

/* SDM vol. 3, 20.2.7 and 20.3: with IOPL < 3 only CR4.VME makes IRET legal, and then IF stands for VIF. */
static void iret_v86(x86_cpu *cpu, unsigned n)
{
    bool is_virtual = (cpu->rflags & X86_FL_IOPL) != X86_FL_IOPL;
    uint64_t mask = FLAGS_ALWAYS | (n == 2 ? 0 : FLAGS_WIDE);
    if (is_virtual && (!(cpu->cr4 & X86_CR4_VME) || n != 2))
        x86_raise_error(cpu, X86_GP, 0);
    uint64_t off = x86_peek(cpu, n, 0), flags = x86_peek(cpu, n, 2 * n);
    uint16_t sel = (uint16_t)x86_peek(cpu, n, n);
    if (off > 0xffff)
        x86_raise_error(cpu, X86_GP, 0);
    if (is_virtual) {
        if ((flags & X86_FL_TF) || ((flags & X86_FL_IF) && (cpu->rflags & X86_FL_VIP)))
            x86_raise_error(cpu, X86_GP, 0);
        flags |= flags & X86_FL_IF ? X86_FL_VIF : 0;
        mask |= X86_FL_VIF;
    } else {
        mask |= X86_FL_IF;
    }
    x86_add_sp(cpu, 3 * n);
    merge_flags(cpu, flags, mask);
    x86_set_v86_seg(cpu, X86_CS, sel);
    cpu->next_rip = off;
    x86_mode_changed(cpu);
}

/* From ring 0 into virtual-8086 mode: nine doublewords. */
static void iret_to_v86(x86_cpu *cpu, uint64_t off, uint16_t cs, uint64_t flags)
{
    uint64_t sp = x86_peek(cpu, 4, 12);
    uint16_t ss = (uint16_t)x86_peek(cpu, 4, 16), es = (uint16_t)x86_peek(cpu, 4, 20);
    uint16_t ds = (uint16_t)x86_peek(cpu, 4, 24), fs = (uint16_t)x86_peek(cpu, 4, 28);
    uint16_t gs = (uint16_t)x86_peek(cpu, 4, 32);
    cpu->rflags =
        (flags & (FLAGS_ALWAYS | FLAGS_WIDE | X86_FL_IF | X86_FL_IOPL | X86_FL_VM | X86_FL_VIF | X86_FL_VIP)) |
        X86_FL_1;
    x86_set_v86_seg(cpu, X86_CS, cs);
    x86_set_v86_seg(cpu, X86_SS, ss);
    x86_set_v86_seg(cpu, X86_ES, es);
    x86_set_v86_seg(cpu, X86_DS, ds);
    x86_set_v86_seg(cpu, X86_FS, fs);
    x86_set_v86_seg(cpu, X86_GS, gs);
    cpu->gpr[X86_RSP] = (uint32_t)sp;
    cpu->next_rip = (uint16_t)off;
    x86_mode_changed(cpu);
}

static void iret_task(x86_cpu *cpu)
{
    x86_desc d;
    uint16_t link;
    x86_read_system(cpu, cpu->seg[X86_TR].base, &link, 2);
    if ((link & 4) || !x86_desc_read(cpu, link, &d))
        x86_raise_sel(cpu, X86_TS, link);
    unsigned type = x86_desc_type(&d);
    if (x86_desc_s(&d) || (type != X86_SYS_TSS16_BUSY && type != X86_SYS_TSS32_BUSY))
        x86_raise_sel(cpu, X86_TS, link);
    if (!x86_desc_p(&d))
        x86_raise_sel(cpu, X86_NP, link);
    x86_task_switch(cpu, &d, X86_TASK_IRET, cpu->next_rip, NULL);
}

static uint64_t iret_flags_mask(const x86_cpu *cpu, unsigned n)
{
    uint64_t mask = FLAGS_ALWAYS | (n == 2 ? 0 : FLAGS_WIDE);
    if (cpu->cpl <= (cpu->rflags & X86_FL_IOPL) >> 12)
        mask |= X86_FL_IF;
    if (cpu->cpl == 0)
        mask |= X86_FL_IOPL | (n == 2 ? 0 : X86_FL_VIF | X86_FL_VIP);
    return mask;
}

static void iret_protected(x86_cpu *cpu, unsigned n)
{
    x86_desc cs, ss_desc = { 0 };
    x86_seg new_cs, new_ss;
    uint64_t off = x86_peek(cpu, n, 0), flags = x86_peek(cpu, n, 2 * n), sp = 0;
    uint16_t sel = (uint16_t)x86_peek(cpu, n, n);
    unsigned rpl = sel & 3;

    if (n == 4 && (flags & X86_FL_VM) && cpu->cpl == 0 && !x86_lma(cpu)) {
        iret_to_v86(cpu, off, sel, flags);
        return;
    }
    load_return_cs(cpu, sel, &cs);
    x86_desc_to_seg(&cs, sel, &new_cs);
    bool is_long = x86_seg_is_long(cpu, &new_cs), is_outer = rpl > cpu->cpl, has_ss = is_outer || x86_is_long(cpu);
    if (has_ss) {
        sp = x86_peek(cpu, n, 3 * n);
        uint16_t ss = (uint16_t)x86_peek(cpu, n, 4 * n);
        load_return_ss(cpu, ss, rpl, is_long, &ss_desc, &new_ss);
    }
    x86_check_target(cpu, &new_cs, off);
    x86_desc_set_accessed(cpu, &cs);
    uint64_t mask = iret_flags_mask(cpu, n);
    if (has_ss) {
        x86_desc_set_accessed(cpu, &ss_desc);
        cpu->gpr[X86_RSP] = returned_rsp(cpu, &new_ss, is_long, sp, 0);
        cpu->seg[X86_SS] = new_ss;
    } else {
        x86_add_sp(cpu, 3 * n);
    }
    if (is_outer)
        x86_drop_inner_segs(cpu, rpl);
    merge_flags(cpu, flags, mask);
    commit_cs(cpu, &cs, rpl, off);
}

void x86_op_iret(x86_cpu *cpu, const x86_insn *in)
{
    cpu->nmi_blocked = false;          /* even if it faults */
    if (x86_is_real(cpu)) {
        iret_real(cpu, in->osz);
    } else if (x86_is_v86(cpu)) {
        iret_v86(cpu, in->osz);
    } else if (cpu->rflags & X86_FL_NT) {
        if (x86_lma(cpu))
            x86_raise_error(cpu, X86_GP, 0);
        iret_task(cpu);
    } else {
        iret_protected(cpu, in->osz);
    }
    cpu->keep_rf = true;
}
