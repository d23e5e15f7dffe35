/* task.c - hardware task switches between 16- and 32-bit TSSs (SDM vol. 3, 7.3).
 *
 * Up to commit_task() a fault belongs to the old task, whose state is untouched (its TSS may have been written: the
 * same bytes are written again when it is retried). From there on the CPU is the new task, and flaws of its LDT and
 * segments are faults at its first instruction. Segment registers are first loaded with their selectors only, unusable,
 * so that a fault half way leaves nothing of the old task behind.
 */
#include "x86/system.h"

#include <string.h>

/* One TSS in either format, widened. */
typedef struct task_state {
    uint32_t cr3, eip, eflags, gpr[8];
    uint16_t link, seg[6], ldt;
    bool is_32, has_trap;
} task_state;

#define TSS32_BYTES 104u
#define TSS16_BYTES 44u
enum {
    TSS32_CR3 = 28,
    TSS32_EIP = 32,
    TSS32_EFLAGS = 36,
    TSS32_GPR = 40,
    TSS32_SEG = 72,
    TSS32_LDT = 96,
    TSS32_TRAP = 100
};
enum { TSS16_IP = 14, TSS16_FLAGS = 16, TSS16_GPR = 18, TSS16_SEG = 34, TSS16_LDT = 42 };
#define FLAGS_VALID 0x3f7fd5u

static uint16_t get16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }

static void read_tss(x86_cpu *cpu, const x86_seg *tr, task_state *t)
{
    uint8_t b[TSS32_BYTES];
    t->is_32 = tr->attr & 8;
    x86_read_system(cpu, tr->base, b, t->is_32 ? TSS32_BYTES : TSS16_BYTES);
    t->link = get16(b);
    t->cr3 = t->is_32 ? get32(b + TSS32_CR3) : 0;
    t->eip = t->is_32 ? get32(b + TSS32_EIP) : get16(b + TSS16_IP);
    t->eflags = t->is_32 ? get32(b + TSS32_EFLAGS) : get16(b + TSS16_FLAGS);
    for (unsigned i = 0; i < 8; i++)
        t->gpr[i] = t->is_32 ? get32(b + TSS32_GPR + 4 * i) : get16(b + TSS16_GPR + 2 * i);
    for (unsigned i = 0; i < 6; i++)
        t->seg[i] = t->is_32 ? get16(b + TSS32_SEG + 4 * i) : i < 4 ? get16(b + TSS16_SEG + 2 * i) : 0;
    t->ldt = t->is_32 ? get16(b + TSS32_LDT) : get16(b + TSS16_LDT);
    t->has_trap = t->is_32 && (b[TSS32_TRAP] & 1);
}

/* The dynamic fields of the outgoing task. */
static void save_tss(x86_cpu *cpu, const x86_seg *tr, uint32_t eip, uint32_t eflags)
{
    bool is_32 = tr->attr & 8;
    uint32_t wide[16];
    uint16_t narrow[14];
    wide[0] = eip;
    wide[1] = eflags;
    for (unsigned i = 0; i < 8; i++)
        wide[2 + i] = (uint32_t)cpu->gpr[i];
    for (unsigned i = 0; i < 6; i++)
        wide[10 + i] = cpu->seg[i].sel;
    if (is_32) {
        x86_write_system(cpu, tr->base + TSS32_EIP, wide, sizeof wide);
        return;
    }
    for (unsigned i = 0; i < 14; i++)
        narrow[i] = (uint16_t)wide[i];
    x86_write_system(cpu, tr->base + TSS16_IP, narrow, sizeof narrow);
}

void x86_task_gate_tss(x86_cpu *cpu, uint16_t sel, x86_desc *d)
{
    if (x86_is_null(sel) || (sel & 4))
        x86_raise_sel(cpu, X86_GP, sel);
    x86_desc_load(cpu, sel, X86_GP, d);
    if (x86_desc_s(d) || (x86_desc_type(d) != X86_SYS_TSS16 && x86_desc_type(d) != X86_SYS_TSS32))
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_NP, sel);
}

/* The point of no return. */
static void commit_task(x86_cpu *cpu, const task_state *t, const x86_seg *tr, uint32_t eflags)
{
    bool is_v86 = t->is_32 && (eflags & X86_FL_VM);
    cpu->seg[X86_TR] = *tr;
    cpu->cr0 |= X86_CR0_TS;
    cpu->dr[7] &= ~UINT64_C(0x155);                                     /* local breakpoints end with the task */
    for (unsigned i = 0; i < 8; i++)
        cpu->gpr[i] = t->gpr[i];
    cpu->rflags = (eflags & FLAGS_VALID) | X86_FL_1;
    for (unsigned i = 0; i < 6; i++)
        x86_set_null_seg(cpu, i, t->seg[i]);
    x86_set_null_seg(cpu, X86_LDTR, t->ldt);
    unsigned cpl = is_v86 ? 3 : t->seg[X86_CS] & 3;
    cpu->seg[X86_SS].attr = (uint16_t)(cpl << 5);
    cpu->rip = cpu->next_rip = t->eip;
    cpu->no_trap = true;
    if (t->is_32 && (cpu->cr0 & X86_CR0_PG)) {
        cpu->cr3 = t->cr3;
        if (cpu->cr4 & X86_CR4_PAE)
            x86_load_pdptes(cpu, cpu->cr3);
        x86_paging_changed(cpu, X86_ROOT_LOAD | X86_ROOT_GLOBAL);
    }
    x86_mode_changed(cpu);
}

static void load_task_ldt(x86_cpu *cpu, uint16_t sel)
{
    x86_desc d;
    if (x86_is_null(sel))
        return;
    if (sel & 4)
        x86_raise_sel(cpu, X86_TS, sel);
    x86_desc_load(cpu, sel, X86_TS, &d);
    if (x86_desc_s(&d) || x86_desc_type(&d) != X86_SYS_LDT || !x86_desc_p(&d))
        x86_raise_sel(cpu, X86_TS, sel);
    x86_desc_to_seg(&d, sel, &cpu->seg[X86_LDTR]);
}

static void load_task_cs(x86_cpu *cpu, uint16_t sel)
{
    x86_desc d;
    unsigned rpl = sel & 3;
    if (x86_is_null(sel))
        x86_raise_sel(cpu, X86_TS, sel);
    x86_desc_load(cpu, sel, X86_TS, &d);
    if (!x86_desc_is_code(&d) || (x86_desc_is_conforming(&d) ? x86_desc_dpl(&d) > rpl : x86_desc_dpl(&d) != rpl))
        x86_raise_sel(cpu, X86_TS, sel);
    if (!x86_desc_p(&d))
        x86_raise_sel(cpu, X86_NP, sel);
    x86_desc_set_accessed(cpu, &d);
    x86_desc_to_seg(&d, sel, &cpu->seg[X86_CS]);
}

static void load_task_ss(x86_cpu *cpu, uint16_t sel, unsigned cpl)
{
    x86_desc d;
    if (x86_is_null(sel))
        x86_raise_sel(cpu, X86_TS, sel);
    x86_desc_load(cpu, sel, X86_TS, &d);
    if (!x86_desc_is_writable_data(&d) || x86_desc_dpl(&d) != cpl || (sel & 3u) != cpl)
        x86_raise_sel(cpu, X86_TS, sel);
    if (!x86_desc_p(&d))
        x86_raise_sel(cpu, X86_SS_FAULT, sel);
    x86_desc_set_accessed(cpu, &d);
    x86_desc_to_seg(&d, sel, &cpu->seg[X86_SS]);
}

static void load_task_data(x86_cpu *cpu, unsigned index, uint16_t sel, unsigned cpl)
{
    x86_desc d;
    if (x86_is_null(sel))
        return;
    x86_desc_load(cpu, sel, X86_TS, &d);
    if (!x86_desc_is_readable(&d))
        x86_raise_sel(cpu, X86_TS, sel);
    if (!x86_desc_is_conforming(&d) && (x86_desc_dpl(&d) < cpl || x86_desc_dpl(&d) < (sel & 3)))
        x86_raise_sel(cpu, X86_TS, sel);
    if (!x86_desc_p(&d))
        x86_raise_sel(cpu, X86_NP, sel);
    x86_desc_set_accessed(cpu, &d);
    x86_desc_to_seg(&d, sel, &cpu->seg[index]);
}

static void load_task_segments(x86_cpu *cpu, const task_state *t)
{
    static const uint8_t data_segs[] = { X86_ES, X86_DS, X86_FS, X86_GS };
    unsigned cpl = t->seg[X86_CS] & 3;
    load_task_ldt(cpu, t->ldt);
    if (x86_is_v86(cpu)) {
        for (unsigned i = 0; i < 6; i++)
            x86_set_v86_seg(cpu, i, t->seg[i]);
    } else {
        load_task_cs(cpu, t->seg[X86_CS]);
        load_task_ss(cpu, t->seg[X86_SS], cpl);
        for (unsigned i = 0; i < sizeof data_segs; i++)
            load_task_data(cpu, data_segs[i], t->seg[data_segs[i]], cpl);
    }
    x86_mode_changed(cpu);
}

void x86_task_switch(x86_cpu *cpu, x86_desc *d, unsigned reason, uint64_t rip, const x86_event *ev)
{
    x86_seg old = cpu->seg[X86_TR], tr;
    task_state t;
    bool is_nested = reason == X86_TASK_CALL || reason == X86_TASK_EVENT;
    uint32_t old_flags = (uint32_t)cpu->rflags, flags;

    x86_desc_to_seg(d, d->sel, &tr);
    if (tr.limit < (tr.attr & 8 ? TSS32_BYTES : TSS16_BYTES) - 1)
        x86_raise_sel(cpu, X86_TS, d->sel);
    if (old.limit < (old.attr & 8 ? TSS32_LDT : TSS16_LDT) - 1)
        x86_raise_sel(cpu, X86_TS, old.sel);
    read_tss(cpu, &tr, &t);
    flags = t.eflags;
    if (reason == X86_TASK_IRET)
        old_flags &= ~X86_FL_NT;
    if (ev && ev->set_rf)
        old_flags |= X86_FL_RF;
    save_tss(cpu, &old, (uint32_t)rip, old_flags);
    if (is_nested) {
        flags |= X86_FL_NT;
        x86_write_system(cpu, tr.base, &old.sel, 2);
    } else if (!x86_is_null(old.sel)) {
        x86_desc_set_busy(cpu, cpu->gdtr.base + (old.sel & 0xfff8), false);
    }
    x86_desc_set_busy(cpu, d->la, true);
    tr.attr |= 2;
    commit_task(cpu, &t, &tr, flags);

    load_task_segments(cpu, &t);
    if (ev && ev->has_error) {
        x86_stack st = x86_current_stack(cpu);
        x86_stack_push(cpu, &st, t.is_32 ? 4 : 2, ev->error);
        cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    }
    x86_check_target(cpu, &cpu->seg[X86_CS], t.eip);
    if (t.has_trap) {
        x86_fault trap = { .vector = X86_DB, .dr6 = 0x8000 };           /* BT */
        x86_raise_fault(cpu, &trap);
    }
}
