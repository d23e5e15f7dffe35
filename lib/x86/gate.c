/* gate.c - one event through the interrupt descriptor table: real mode, 16/32-bit protected mode, virtual-8086, long
 * mode.
 *
 * Order of checks and error codes: SDM vol. 2, INT n; vol. 3, 6.11 to 6.14. All memory that can fault is touched before
 * CS, SS, RSP or RFLAGS change.
 */
#include "x86/system.h"

#include <string.h>

typedef struct idt_gate {
    uint64_t offset;
    uint16_t sel, attr;                /* attr: descriptor bits 32..47: IST in the low byte, type, DPL, P in the high */
    uint32_t error;                    /* error code naming this entry */
} idt_gate;

static void real_mode_event(x86_cpu *cpu, const x86_event *ev)
{
    uint16_t entry[2];
    if (4u * ev->vector + 3 > cpu->idtr.limit)
        x86_raise_error(cpu, X86_GP, 0);
    x86_read_system(cpu, cpu->idtr.base + 4u * ev->vector, entry, 4);
    x86_stack st = x86_current_stack(cpu);
    x86_stack_push(cpu, &st, 2, cpu->rflags);
    x86_stack_push(cpu, &st, 2, cpu->seg[X86_CS].sel);
    x86_stack_push(cpu, &st, 2, ev->rip);
    if (entry[0] > cpu->seg[X86_CS].limit)
        x86_raise_error(cpu, X86_GP, 0);
    cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    x86_set_real_seg(cpu, X86_CS, entry[1]);
    cpu->next_rip = entry[0];
    cpu->rflags &= ~(uint64_t)(X86_FL_IF | X86_FL_TF | X86_FL_RF | X86_FL_AC);
    x86_mode_changed(cpu);
}

static void read_gate(x86_cpu *cpu, const x86_event *ev, idt_gate *g)
{
    uint32_t word[4] = { 0 };
    unsigned bytes = x86_lma(cpu) ? 16 : 8;
    g->error = ev->vector * 8u + 2 + cpu->ext;
    if (ev->vector * bytes + bytes - 1 > cpu->idtr.limit)
        x86_raise_error(cpu, X86_GP, g->error);
    x86_read_system(cpu, cpu->idtr.base + ev->vector * bytes, word, bytes);
    g->offset = (word[0] & 0xffff) | (word[1] & 0xffff0000) | (uint64_t)word[2] << 32;
    g->sel = word[0] >> 16;
    g->attr = (uint16_t)word[1];

    unsigned type = g->attr >> 8 & 31;                                  /* with S, which must be 0 */
    bool is_valid = x86_lma(cpu) ? type == X86_SYS_INT32 || type == X86_SYS_TRAP32
                                 : type == X86_SYS_TASK_GATE || type == X86_SYS_INT16 || type == X86_SYS_TRAP16 ||
                                   type == X86_SYS_INT32 || type == X86_SYS_TRAP32;
    if (!is_valid)
        x86_raise_error(cpu, X86_GP, g->error);
    if (ev->kind == X86_EV_SOFT && (g->attr >> 13 & 3u) < cpu->cpl)
        x86_raise_error(cpu, X86_GP, g->error);
    if (!(g->attr & 0x8000))
        x86_raise_error(cpu, X86_NP, g->error);
}

static unsigned gate_type(const idt_gate *g) { return g->attr >> 8 & 15; }

/* The handler's code segment; error codes name the selector in the gate. */
static void load_handler_cs(x86_cpu *cpu, const idt_gate *g, x86_desc *cs)
{
    if (x86_is_null(g->sel))
        x86_raise_sel(cpu, X86_GP, 0);
    x86_desc_load(cpu, g->sel, X86_GP, cs);
    if (!x86_desc_is_code(cs) || x86_desc_dpl(cs) > cpu->cpl)
        x86_raise_sel(cpu, X86_GP, g->sel);
    if (x86_lma(cpu) && (cs->hi >> 21 & 3) != 1)                        /* L = 1, D = 0 */
        x86_raise_sel(cpu, X86_GP, g->sel);
    if (!x86_desc_p(cs))
        x86_raise_sel(cpu, X86_NP, g->sel);
}

/* RFLAGS as the frame shows it. */
static uint64_t flags_image(const x86_cpu *cpu, const x86_event *ev)
{
    return ev->set_rf ? cpu->rflags | X86_FL_RF : cpu->rflags;
}

static void enter_handler(x86_cpu *cpu, const idt_gate *g, const x86_desc *cs, unsigned new_cpl)
{
    x86_desc_to_seg(cs, (g->sel & 0xfffc) | new_cpl, &cpu->seg[X86_CS]);
    cpu->next_rip = g->offset;
    cpu->rflags &= ~(uint64_t)(X86_FL_TF | X86_FL_NT | X86_FL_VM | X86_FL_RF);
    if (!(gate_type(g) & 1))
        cpu->rflags &= ~(uint64_t)X86_FL_IF;
    x86_mode_changed(cpu);
}

static void protected_event(x86_cpu *cpu, const x86_event *ev, idt_gate *g)
{
    x86_desc cs, ss_desc;
    x86_stack st;
    bool is_v86 = x86_is_v86(cpu), is_inner;
    unsigned n = gate_type(g) & 8 ? 4 : 2;

    load_handler_cs(cpu, g, &cs);
    unsigned new_cpl = x86_desc_is_conforming(&cs) ? cpu->cpl : x86_desc_dpl(&cs);
    is_inner = new_cpl < cpu->cpl;
    if (is_v86 && new_cpl != 0)
        x86_raise_sel(cpu, X86_GP, g->sel);
    if (n == 2)
        g->offset &= 0xffff;
    if (is_inner)
        x86_inner_stack(cpu, new_cpl, &st, &ss_desc);
    else
        st = x86_current_stack(cpu);

    if (is_v86) {
        x86_stack_push(cpu, &st, n, cpu->seg[X86_GS].sel);
        x86_stack_push(cpu, &st, n, cpu->seg[X86_FS].sel);
        x86_stack_push(cpu, &st, n, cpu->seg[X86_DS].sel);
        x86_stack_push(cpu, &st, n, cpu->seg[X86_ES].sel);
    }
    if (is_inner) {
        x86_stack_push(cpu, &st, n, cpu->seg[X86_SS].sel);
        x86_stack_push(cpu, &st, n, cpu->gpr[X86_RSP]);
    }
    x86_stack_push(cpu, &st, n, flags_image(cpu, ev));
    x86_stack_push(cpu, &st, n, cpu->seg[X86_CS].sel);
    x86_stack_push(cpu, &st, n, ev->rip);
    if (ev->has_error)
        x86_stack_push(cpu, &st, n, ev->error);

    x86_seg new_cs;
    x86_desc_to_seg(&cs, g->sel, &new_cs);
    if (g->offset > new_cs.limit)
        x86_raise_sel(cpu, X86_GP, 0);
    x86_desc_set_accessed(cpu, &cs);
    if (is_inner)
        x86_desc_set_accessed(cpu, &ss_desc);

    uint64_t rsp = x86_stack_rsp(cpu, &st);
    if (is_v86)
        for (unsigned i = X86_ES; i <= X86_GS; i++)
            if (i != X86_CS && i != X86_SS)
                x86_set_null_seg(cpu, i, 0);
    if (is_inner)
        cpu->seg[X86_SS] = st.ss;
    cpu->gpr[X86_RSP] = rsp;
    enter_handler(cpu, g, &cs, new_cpl);
}

static void task_gate_event(x86_cpu *cpu, const x86_event *ev, const idt_gate *g)
{
    x86_desc tss;
    x86_task_gate_tss(cpu, g->sel, &tss);
    x86_task_switch(cpu, &tss, X86_TASK_EVENT, ev->rip, ev);
}

/* 64-bit: the frame is SS, RSP, RFLAGS, CS, RIP and perhaps an error code, on a 16-byte aligned stack (SDM vol.
 * 3, 6.14). */
static void long_mode_event(x86_cpu *cpu, const x86_event *ev, idt_gate *g)
{
    x86_desc cs;
    uint64_t frame[6], rsp, *words = frame;
    unsigned count = ev->has_error ? 6 : 5, ist = g->attr & 7;

    load_handler_cs(cpu, g, &cs);
    unsigned new_cpl = x86_desc_is_conforming(&cs) ? cpu->cpl : x86_desc_dpl(&cs);
    bool is_inner = new_cpl < cpu->cpl;
    if (ist)
        rsp = x86_tss64_rsp(cpu, 36 + 8 * (ist - 1));
    else if (is_inner)
        rsp = x86_tss64_rsp(cpu, 4 + 8 * new_cpl);
    else
        rsp = cpu->gpr[X86_RSP];
    if (!ist && !is_inner && cpu->stack_size != 8)                      /* compatibility mode, conforming handler */
        rsp = cpu->stack_size == 4 ? (uint32_t)rsp : (uint16_t)rsp;
    rsp &= ~UINT64_C(15);
    if (!x86_canonical(rsp - 8 * count) || !x86_canonical(rsp - 1))
        x86_raise_error(cpu, X86_SS_FAULT, cpu->ext);
    if (!x86_canonical(g->offset))
        x86_raise_error(cpu, X86_GP, cpu->ext);

    if (ev->has_error)
        *words++ = ev->error;
    *words++ = ev->rip;
    *words++ = cpu->seg[X86_CS].sel;
    *words++ = flags_image(cpu, ev);
    *words++ = cpu->gpr[X86_RSP];
    *words++ = cpu->seg[X86_SS].sel;
    if (new_cpl == 3)
        x86_write_linear(cpu, rsp - 8 * count, frame, 8 * count);
    else
        x86_write_system(cpu, rsp - 8 * count, frame, 8 * count);
    x86_desc_set_accessed(cpu, &cs);

    if (is_inner) {                                                     /* SS becomes null with RPL = the new CPL */
        x86_set_null_seg(cpu, X86_SS, new_cpl);
        cpu->seg[X86_SS].attr = new_cpl << 5;
    }
    cpu->gpr[X86_RSP] = rsp - 8 * count;
    enter_handler(cpu, g, &cs, new_cpl);
}

void x86_deliver_event(x86_cpu *cpu, const x86_event *ev)
{
    idt_gate g;
    cpu->ext = ev->kind != X86_EV_SOFT;
    if (x86_is_real(cpu)) {
        real_mode_event(cpu, ev);
    } else {
        read_gate(cpu, ev, &g);
        if (x86_lma(cpu))
            long_mode_event(cpu, ev, &g);
        else if (gate_type(&g) == X86_SYS_TASK_GATE)
            task_gate_event(cpu, ev, &g);
        else
            protected_event(cpu, ev, &g);
    }
    cpu->ext = 0;
}
