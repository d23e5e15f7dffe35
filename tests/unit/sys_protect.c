/* sys_protect.c - protection: segment loads, gates, far transfers, interrupts and returns, against the checks and error
 * codes that SDM vol. 2 and 3 list for each.
 */
#include "sysbare.h"

/* ---- segment register loads ---- */

/* MOV sreg, AX: DS is register 3, SS 2, ES 0. */
#define MOV_DS 0x8e, 0xd8
#define MOV_SS 0x8e, 0xd0
#define MOV_ES 0x8e, 0xc0

typedef struct load_case {
    const char *what;
    unsigned cpl, sel, access;         /* access byte of descriptor SPARE */
    int ds_vector, ss_vector;          /* RAN or the vector; error code is the selector without RPL */
} load_case;

static const load_case loads[] = {
    { "data rw dpl0, cpl0", 0, SPARE, 0x92, RAN, RAN },
    { "data ro dpl0, cpl0", 0, SPARE, 0x90, RAN, X86_GP },
    { "data expand-down", 0, SPARE, 0x96, RAN, RAN },
    { "code readable", 0, SPARE, 0x9a, RAN, X86_GP },
    { "code execute-only", 0, SPARE, 0x98, X86_GP, X86_GP },
    { "conforming readable", 0, SPARE, 0x9e, RAN, X86_GP },
    { "conforming readable dpl0 from cpl3", 3, SPARE | 3, 0x9e, RAN, X86_GP },
    { "data dpl3, cpl0 rpl0", 0, SPARE, 0xf2, RAN, X86_GP },
    { "data dpl0, rpl3", 0, SPARE | 3, 0x92, X86_GP, X86_GP },
    { "data dpl0, cpl3", 3, SPARE | 3, 0x92, X86_GP, X86_GP },
    { "data dpl3, cpl3 rpl3", 3, SPARE | 3, 0xf2, RAN, RAN },
    { "data dpl3, cpl3 rpl0", 3, SPARE, 0xf2, RAN, X86_GP },
    { "not present data", 0, SPARE, 0x12, X86_NP, X86_SS_FAULT },
    { "not present, wrong dpl", 3, SPARE | 3, 0x12, X86_GP, X86_GP },
    { "tss", 0, SPARE, 0x89, X86_GP, X86_GP },
    { "beyond the gdt", 0, 0x88, 0x92, X86_GP, X86_GP },
    { "ldt selector without an ldt", 0, 0x0c, 0x92, X86_GP, X86_GP },
};

static void run_load(const load_case *c, bool is_ss)
{
    protected_mode(c->cpl);
    set_gdt(SPARE, 0x1000, 0xff, c->access, 4);
    x86_set_null_seg(cpu, X86_LDTR, 0);
    cpu->gpr[X86_RAX] = c->sel;
    outcome o = is_ss ? INSN(MOV_SS) : INSN(MOV_DS);
    int want = is_ss ? c->ss_vector : c->ds_vector;
    if (o.vector != want || (want != RAN && o.error != (c->sel & 0xfffc)))
        FAIL("%s (%s): vector %d error %#x, not %d", c->what, is_ss ? "ss" : "ds", o.vector, o.error, want);
    if (want != RAN)
        return;
    x86_seg *seg = &cpu->seg[is_ss ? X86_SS : X86_DS];
    CHECK_EQ(seg->sel, c->sel);
    CHECK_EQ(seg->base, 0x1000);
    CHECK_EQ(seg->limit, 0xff);
    CHECK_EQ(ram[GDT + SPARE + 5], c->access | 1);                      /* accessed */
    CHECK_EQ(cpu->inhibit, is_ss ? 2 : 0);
}

TEST(segment_loads)
{
    for (unsigned i = 0; i < sizeof loads / sizeof loads[0]; i++) {
        run_load(&loads[i], false);
        run_load(&loads[i], true);
    }
}

TEST(null_selectors)
{
    protected_mode(0);
    cpu->gpr[X86_RAX] = 3;
    RUNS(MOV_DS);
    CHECK_EQ(cpu->seg[X86_DS].sel, 3);
    RAISES(X86_GP, 0, 0xa0, 0, 0, 0, 0);                                /* mov al, [0] through it */
    RAISES(X86_GP, 0, MOV_SS);
}

TEST(ldt_and_tr)
{
    protected_mode(0);
    cpu->gpr[X86_RAX] = LDT_SEL;
    RUNS(0x0f, 0x00, 0xd0);                                             /* lldt ax */
    CHECK_EQ(cpu->seg[X86_LDTR].base, LDT);
    put64(LDT + 8, make_desc(0x5000, 0xf, 0x92, 0));
    cpu->gpr[X86_RAX] = 0x0c;
    RUNS(MOV_DS);
    CHECK_EQ(cpu->seg[X86_DS].base, 0x5000);
    cpu->gpr[X86_RAX] = 0;
    RUNS(0x0f, 0x00, 0xd0);
    cpu->gpr[X86_RAX] = 0x0c;
    RAISES(X86_GP, 0x0c, MOV_DS);
    cpu->gpr[X86_RAX] = DATA0;
    RAISES(X86_GP, DATA0, 0x0f, 0x00, 0xd0);
    RAISES(X86_GP, DATA0, 0x0f, 0x00, 0xd8);                            /* ltr ax */
    cpu->gpr[X86_RAX] = TSS2_SEL;
    RUNS(0x0f, 0x00, 0xd8);
    CHECK_EQ(ram[GDT + TSS2_SEL + 5], 0x8b);
    RAISES(X86_GP, TSS2_SEL, 0x0f, 0x00, 0xd8);                         /* busy now */
    set_gdt(SPARE, TSS, 0x67, 0x09, 0);
    cpu->gpr[X86_RAX] = SPARE;
    RAISES(X86_NP, SPARE, 0x0f, 0x00, 0xd8);
    cpu->gpr[X86_RAX] = 0;
    RAISES(X86_GP, 0, 0x0f, 0x00, 0xd8);
    protected_mode(3);
    RAISES(X86_GP, 0, 0x0f, 0x00, 0xd8);
    bare_new(1);
    RAISES(X86_UD, 0, 0x0f, 0x00, 0xd8);
}

/* LAR, LSL, VERR, VERW of SPARE; want_* say whether ZF is set. */
TEST(examine_descriptors)
{
    static const struct { unsigned cpl, sel, access; bool lar, lsl, verr, verw; } cases[] = {
        { 0, SPARE, 0x92, true, true, true, true },    { 0, SPARE, 0x90, true, true, true, false },
        { 0, SPARE, 0x98, true, true, false, false },  { 0, SPARE, 0x9a, true, true, true, false },
        { 3, SPARE, 0x92, false, false, false, false },{ 3, SPARE, 0x9e, true, true, true, false },
        { 0, SPARE | 3, 0x92, false, false, false, false }, { 0, SPARE, 0x89, true, true, false, false },
        { 0, SPARE, 0x8c, true, false, false, false }, { 0, SPARE, 0x8e, false, false, false, false },
        { 0, SPARE, 0x82, true, true, false, false },  { 0, SPARE, 0x85, true, false, false, false },
        { 0, SPARE, 0x12, true, true, true, true },    { 0, 0, 0, false, false, false, false },
        { 0, 0x88, 0, false, false, false, false },
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        protected_mode(cases[i].cpl);
        set_gdt(SPARE, 0x1234, 0x42, cases[i].access, 8);
        cpu->gpr[X86_RCX] = cases[i].sel;
        cpu->gpr[X86_RAX] = 0x77;
        RUNS(0x0f, 0x02, 0xc1);
        if (!!(cpu->rflags & X86_FL_ZF) != cases[i].lar)
            FAIL("lar, case %u", i);
        CHECK_EQ(cpu->gpr[X86_RAX], cases[i].lar ? (cases[i].access << 8 | 0x800000) : 0x77);
        cpu->gpr[X86_RAX] = 0x77;
        RUNS(0x0f, 0x03, 0xc1);
        if (!!(cpu->rflags & X86_FL_ZF) != cases[i].lsl)
            FAIL("lsl, case %u", i);
        CHECK_EQ(cpu->gpr[X86_RAX], cases[i].lsl ? 0x42fff : 0x77);
        RUNS(0x0f, 0x00, 0xe1);
        if (!!(cpu->rflags & X86_FL_ZF) != cases[i].verr)
            FAIL("verr, case %u", i);
        RUNS(0x0f, 0x00, 0xe9);
        if (!!(cpu->rflags & X86_FL_ZF) != cases[i].verw)
            FAIL("verw, case %u", i);
    }
}

TEST(arpl)
{
    protected_mode(3);
    cpu->gpr[X86_RAX] = 0x10;
    cpu->gpr[X86_RCX] = 0x03;
    RUNS(0x63, 0xc8);
    CHECK_EQ(cpu->gpr[X86_RAX], 0x13);
    CHECK(cpu->rflags & X86_FL_ZF);
    RUNS(0x63, 0xc8);
    CHECK(!(cpu->rflags & X86_FL_ZF));
    bare_new(1);
    RAISES(X86_UD, 0, 0x63, 0xc8);
}

/* ---- interrupts and gates in protected mode ---- */

typedef struct gate_case {
    const char *what;
    unsigned cpl;
    unsigned gate_access, gate_sel, target_access;  /* SPARE's access, when the gate names it */
    int vector;                                     /* RAN: delivered; else nested fault */
    uint32_t error;
    unsigned new_cpl;
} gate_case;

#define INT_ERR (0x40 * 8 + 2)
static const gate_case gates[] = {
    { "interrupt gate, same level", 0, 0x8e, CODE0, 0, RAN, 0, 0 },
    { "trap gate, same level", 0, 0x8f, CODE0, 0, RAN, 0, 0 },
    { "gate dpl 0 from cpl 3", 3, 0x8e, CODE0, 0, X86_GP, INT_ERR, 0 },
    { "gate dpl 3 to ring 0", 3, 0xee, CODE0, 0, RAN, 0, 0 },
    { "gate dpl 3 to ring 3", 3, 0xee, CODE3, 0, RAN, 0, 3 },
    { "gate to conforming", 3, 0xee, CONFORM0, 0, RAN, 0, 3 },
    { "gate not present", 0, 0x0e, CODE0, 0, X86_NP, INT_ERR, 0 },
    { "not a gate: call gate", 0, 0x8c, CODE0, 0, X86_GP, INT_ERR, 0 },
    { "not a gate: zero", 0, 0x00, CODE0, 0, X86_GP, INT_ERR, 0 },
    { "not a gate: segment", 0, 0x9e, CODE0, 0, X86_GP, INT_ERR, 0 },
    { "null selector", 0, 0x8e, 0, 0, X86_GP, 0, 0 },
    { "selector beyond gdt", 0, 0x8e, 0x88, 0, X86_GP, 0x88, 0 },
    { "data segment", 0, 0x8e, DATA0, 0, X86_GP, DATA0, 0 },
    { "outer code", 0, 0x8e, CODE3, 0, X86_GP, CODE3 & 0xfffc, 0 },
    { "code not present", 0, 0x8e, SPARE, 0x1a, X86_NP, SPARE, 0 },
    { "ldt selector", 0, 0x8e, 0x0c, 0, X86_GP, 0x0c, 0 },
};

TEST(int_n_through_gates)
{
    for (unsigned i = 0; i < sizeof gates / sizeof gates[0]; i++) {
        const gate_case *c = &gates[i];
        protected_mode(c->cpl);
        x86_set_null_seg(cpu, X86_LDTR, 0);
        set_gdt(SPARE, 0, 0xfffff, c->target_access, 0xc);
        set_gate(0x40, c->gate_sel, 0x123456, c->gate_access);
        cpu->rflags |= X86_FL_IF | X86_FL_DF;
        uint64_t old_rsp = cpu->gpr[X86_RSP];
        outcome o = INSN(0xcd, 0x40);
        if (o.vector != c->vector || (c->vector != RAN && o.error != c->error))
            FAIL("%s: vector %d error %#x, not %d error %#x", c->what, o.vector, o.error, c->vector, c->error);
        if (c->vector != RAN) {
            CHECK_EQ(cpu->rip, 0x100000);
            CHECK_EQ(cpu->gpr[X86_RSP], old_rsp);
            CHECK_EQ(cpu->cpl, c->cpl);
            continue;
        }
        CHECK_EQ(cpu->rip, 0x123456);
        CHECK_EQ(cpu->cpl, c->new_cpl);
        CHECK_EQ(cpu->seg[X86_CS].sel & 3, c->new_cpl);
        bool is_inner = c->new_cpl < c->cpl;
        uint64_t top = is_inner ? STACK0 : old_rsp;
        CHECK_EQ(cpu->gpr[X86_RSP], top - (is_inner ? 20 : 12));
        uint64_t sp = cpu->gpr[X86_RSP];
        CHECK_EQ(get32(sp), 0x100002);
        CHECK_EQ(get32(sp + 4), c->cpl ? CODE3 : CODE0);
        CHECK_EQ(get32(sp + 8), X86_FL_IF | X86_FL_DF | X86_FL_1);
        if (is_inner) {
            CHECK_EQ(get32(sp + 12), old_rsp);
            CHECK_EQ(get32(sp + 16), DATA3);
            CHECK_EQ(cpu->seg[X86_SS].sel, DATA0);
        }
        CHECK_EQ(!!(cpu->rflags & X86_FL_IF), c->gate_access & 1);
        RUNS(0xcf);                                                     /* iret brings everything back */
        CHECK_EQ(cpu->rip, 0x100002);
        CHECK_EQ(cpu->gpr[X86_RSP], old_rsp);
        CHECK_EQ(cpu->cpl, c->cpl);
        bool can_set_if = c->new_cpl == 0 || (c->gate_access & 1); /* IRET outside ring 0, IOPL 0, leaves IF alone */
        CHECK_EQ(cpu->rflags, (can_set_if ? X86_FL_IF : 0) | X86_FL_DF | X86_FL_1);
    }
}

/* The inner stack from the TSS: each flaw and its fault. */
TEST(inner_stack_faults)
{
    static const struct {
        const char *what;
        unsigned ss, spare_access, tss_limit, esp;
        int vector;
        uint32_t error;
    } cases[] = {
        {"good", DATA0, 0, 0x67, STACK0, RAN, 0},
        {"null ss", 0, 0, 0x67, STACK0, X86_TS, 0},
        {"rpl 3", DATA0 | 3, 0, 0x67, STACK0, X86_TS, DATA0},
        {"dpl 3", SPARE, 0xf2, 0x67, STACK0, X86_TS, SPARE},
        {"read-only", SPARE, 0x90, 0x67, STACK0, X86_TS, SPARE},
        {"code", CODE0, 0, 0x67, STACK0, X86_TS, CODE0},
        {"beyond gdt", 0x88, 0, 0x67, STACK0, X86_TS, 0x88},
        {"not present", SPARE, 0x12, 0x67, STACK0, X86_SS_FAULT, SPARE},
        {"tss too small", DATA0, 0, 8, STACK0, X86_TS, TSS_SEL},
        {"no room", SPARE, 0x92, 0x67, 0x10, X86_SS_FAULT, SPARE},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        protected_mode(3);
        set_gdt(SPARE, 0, 0xffff, cases[i].spare_access, 4);
        set_gate(0x40, CODE0, 0x2000, 0xee);
        cpu->seg[X86_TR].limit = cases[i].tss_limit;
        put32(TSS + 4, cases[i].esp);
        put16(TSS + 8, (uint16_t)cases[i].ss);
        outcome o = INSN(0xcd, 0x40);
        if (o.vector != cases[i].vector || (o.vector != RAN && o.error != cases[i].error))
            FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                 cases[i].error);
    }
}

TEST(sixteen_bit_gate_and_tss)
{
    protected_mode(3);
    set_gdt(TSS_SEL, TSS, 0x2b, 0x83, 0);
    load_seg_raw(X86_TR, TSS_SEL);
    memset(ram + TSS, 0, 0x68);
    put16(TSS + 2, 0x7000);
    put16(TSS + 4, DATA0);
    set_gate(0x41, CODE0, 0xabcd1234, 0xe6);
    RUNS(0xcd, 0x41);
    CHECK_EQ(cpu->rip, 0x1234);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x7000 - 10);
    CHECK_EQ(get16(0x7000 - 10), 2);
    CHECK_EQ(get16(0x7000 - 8), CODE3);
    CHECK_EQ(get16(0x7000 - 4), STACK3 & 0xffff);
    CHECK_EQ(get16(0x7000 - 2), DATA3);
}

/* Exceptions delivered by the CPU: error code on the stack, RF in the image, EXT in nested codes. */
TEST(exception_delivery)
{
    protected_mode(3);
    set_gate(X86_GP, CODE0, 0x3000, 0x8e);
    cpu->gpr[X86_RAX] = 0x88;
    RAISES(X86_GP, 0x88, MOV_DS);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x3000);
    CHECK_EQ(cpu->gpr[X86_RSP], STACK0 - 24);
    CHECK_EQ(get32(STACK0 - 24), 0x88);
    CHECK_EQ(get32(STACK0 - 20), 0x100000);
    CHECK_EQ(get32(STACK0 - 12), X86_FL_1 | X86_FL_RF);
    CHECK_EQ(cpu->rflags, X86_FL_1);
    /* A contributory fault whose handler cannot be reached: #GP names the IDT entry with EXT, then a double fault. */
    protected_mode(0);
    set_gate(X86_DF, CODE0, 0x4000, 0x8e);
    cpu->gpr[X86_RAX] = 0x88;
    RAISES(X86_GP, 0x88, MOV_DS);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x4000);
    CHECK_EQ(get32(cpu->gpr[X86_RSP]), 0);
    CHECK_EQ(cpu->fault.vector, X86_GP);
    CHECK_EQ(cpu->fault.error, X86_GP * 8 + 3);
    /* A benign one becomes that #GP. */
    protected_mode(0);
    set_gate(X86_GP, CODE0, 0x5000, 0x8e);
    RAISES(X86_UD, 0, 0x0f, 0x0b);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x5000);
    CHECK_EQ(get32(cpu->gpr[X86_RSP]), X86_UD * 8 + 3);
    /* Nothing works: shutdown. */
    protected_mode(0);
    RAISES(X86_UD, 0, 0x0f, 0x0b);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_SHUTDOWN);
}

/* SDM vol. 3, table 6-5, by choosing a first fault and a gate that makes the second. */
TEST(double_fault_table)
{
    enum { BENIGN = X86_UD, CONTRIBUTORY = X86_GP };
    static const struct { uint8_t first; uint8_t second; int result;
    } cases[] = {
        {BENIGN, X86_NP, X86_NP}, {CONTRIBUTORY, X86_NP, X86_DF}, {X86_PF, X86_NP, X86_DF}, {X86_DE, X86_NP, X86_DF},
        {X86_AC, X86_NP, X86_NP}, {X86_TS, X86_NP, X86_DF},       {X86_DF, X86_NP, -1},     {X86_MF, X86_NP, X86_NP},
        {X86_XM, X86_NP, X86_NP}, {X86_NMI, X86_NP, X86_NP},      {0x20, X86_NP, X86_NP},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        protected_mode(0);
        for (unsigned v = 0; v < 32; v++)
            set_gate(v, CODE0, 0x6000 + 0x10 * v, 0x8e);
        set_gate(cases[i].first, CODE0, 0, 0x0e);                       /* not present: #NP while delivering */
        x86_stop stop = x86_inject(cpu, cases[i].first, false, 0);
        if (cases[i].result < 0) {
            CHECK_EQ(stop, X86_STOP_SHUTDOWN);
            continue;
        }
        CHECK_EQ(stop, X86_STOP_NONE);
        if (cpu->rip != 0x6000u + 0x10 * (unsigned)cases[i].result)
            FAIL("first %u: rip %#" PRIx64 ", not the handler of %d", cases[i].first, cpu->rip, cases[i].result);
    }
}

TEST(exception_exits)
{
    protected_mode(0);
    cpu->exception_exits = UINT64_C(1) << X86_BP | UINT64_C(1) << X86_UD;
    RAISES(X86_UD, 0, 0x0f, 0x0b);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_EXCEPTION);
    CHECK_EQ(cpu->rip, 0x100000);
    RAISES(X86_BP, 0, 0xcc);
    CHECK(cpu->fault.is_soft);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_EXCEPTION);
}

TEST(external_interrupts_and_nmi)
{
    protected_mode(3);
    set_gate(0x30, CODE0, 0x7000, 0x8e);                                /* DPL 0 does not matter to hardware */
    set_gate(2, CODE0, 0x7100, 0x8e);
    cpu->rflags |= X86_FL_IF;
    CHECK(x86_can_interrupt(cpu));
    CHECK_EQ(x86_deliver_interrupt(cpu, 0x30, false), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x7000);
    CHECK_EQ(get32(cpu->gpr[X86_RSP]), 0x100000);
    CHECK(!x86_can_interrupt(cpu));
    CHECK_EQ(x86_deliver_interrupt(cpu, 2, true), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x7100);
    CHECK(cpu->nmi_blocked);
    RUNS(0xcf);
    CHECK(!cpu->nmi_blocked);
    CHECK_EQ(cpu->rip, 0x7000);
}

/* ---- far transfers ---- */

#define JMP_FAR(sel, off)  0xea, (off)&0xff, (off) >> 8 & 0xff, (off) >> 16 & 0xff, (off) >> 24, (sel)&0xff, (sel) >> 8
#define CALL_FAR(sel, off) 0x9a, (off)&0xff, (off) >> 8 & 0xff, (off) >> 16 & 0xff, (off) >> 24, (sel)&0xff, (sel) >> 8

TEST(far_to_code)
{
    static const struct {
        const char *what;
        unsigned cpl, sel, access;
        int vector;
        uint32_t error;
        unsigned new_sel;
    } cases[] = {
        {"same level", 0, SPARE, 0x9a, RAN, 0, SPARE},          {"rpl above cpl", 0, SPARE | 3, 0x9a, X86_GP, SPARE, 0},
        {"inner code", 3, SPARE, 0x9a, X86_GP, SPARE, 0},       {"outer code", 0, SPARE, 0xfa, X86_GP, SPARE, 0},
        {"ring 3, rpl 0", 3, SPARE, 0xfa, RAN, 0, SPARE | 3},   {"conforming inner", 3, SPARE, 0x9e, RAN, 0, SPARE | 3},
        {"conforming outer", 0, SPARE, 0xfe, X86_GP, SPARE, 0}, {"data", 0, SPARE, 0x92, X86_GP, SPARE, 0},
        {"not present", 0, SPARE, 0x1a, X86_NP, SPARE, 0},      {"null", 0, 0, 0, X86_GP, 0, 0},
        {"interrupt gate", 0, SPARE, 0x8e, X86_GP, SPARE, 0},   {"beyond gdt", 0, 0x88, 0, X86_GP, 0x88, 0},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (unsigned is_call = 0; is_call < 2; is_call++) {
            protected_mode(cases[i].cpl);
            set_gdt(SPARE, 0, 0xfff, cases[i].access, 0xc);
            uint64_t sp = cpu->gpr[X86_RSP];
            outcome o = is_call ? INSN(CALL_FAR(cases[i].sel, 0x1234)) : INSN(JMP_FAR(cases[i].sel, 0x1234));
            if (o.vector != cases[i].vector || (o.vector != RAN && o.error != cases[i].error))
                FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                     cases[i].error);
            CHECK_EQ(cpu->gpr[X86_RSP], o.vector == RAN && is_call ? sp - 8 : sp);
            if (o.vector != RAN)
                continue;
            CHECK_EQ(cpu->rip, 0x1234);
            CHECK_EQ(cpu->seg[X86_CS].sel, cases[i].new_sel);
            CHECK_EQ(cpu->cpl, cases[i].cpl);
            if (is_call) {
                CHECK_EQ(get32(sp - 8), 0x100007);
                CHECK_EQ(get32(sp - 4), cases[i].cpl ? CODE3 : CODE0);
                RUNS(0xcb);                                             /* retf */
                CHECK_EQ(cpu->rip, 0x100007);
                CHECK_EQ(cpu->gpr[X86_RSP], sp);
            }
        }
    protected_mode(0);
    set_gdt(SPARE, 0, 0xfff, 0x9a, 4);
    RAISES(X86_GP, 0, JMP_FAR(SPARE, 0x1000));                          /* beyond the limit */
}

/* A 32-bit call gate in SPARE2 to CODE0 at 0x4321 with two parameters. */
static void call_gate(unsigned sel, unsigned access, unsigned params)
{
    put64(GDT + SPARE2, 0x4321 | (uint64_t)sel << 16 | (uint64_t)params << 32 | (uint64_t)access << 40);
}

TEST(call_gates)
{
    protected_mode(3);
    call_gate(CODE0, 0xec, 2);
    put32(STACK3, 0x11111111);
    put32(STACK3 + 4, 0x22222222);
    RUNS(CALL_FAR(SPARE2 | 3, 0));
    CHECK_EQ(cpu->rip, 0x4321);
    CHECK_EQ(cpu->cpl, 0);
    uint64_t sp = STACK0 - 24;
    CHECK_EQ(cpu->gpr[X86_RSP], sp);
    CHECK_EQ(get32(sp), 0x100007);
    CHECK_EQ(get32(sp + 4), CODE3);
    CHECK_EQ(get32(sp + 8), 0x11111111);
    CHECK_EQ(get32(sp + 12), 0x22222222);
    CHECK_EQ(get32(sp + 16), STACK3);
    CHECK_EQ(get32(sp + 20), DATA3);
    load_seg_raw(X86_DS, DATA0);                                        /* must not survive into ring 3 */
    load_seg_raw(X86_ES, DATA3);
    RUNS(0xca, 8, 0);                                                   /* retf 8 */
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->rip, 0x100007);
    CHECK_EQ(cpu->gpr[X86_RSP], STACK3 + 8);
    CHECK_EQ(cpu->seg[X86_SS].sel, DATA3);
    CHECK_EQ(cpu->seg[X86_DS].sel, 0);
    CHECK(!(cpu->seg[X86_DS].attr & X86_SEG_P));
    CHECK_EQ(cpu->seg[X86_ES].sel, DATA3);

    static const struct {
        const char *what;
        unsigned cpl, access, sel, call_sel;
        bool is_call;
        int vector;
        uint32_t error;
    } cases[] = {
        {"gate dpl 0 from cpl 3", 3, 0x8c, CODE0, SPARE2, true, X86_GP, SPARE2},
        {"rpl above gate dpl", 0, 0x8c, CODE0, SPARE2 | 3, true, X86_GP, SPARE2},
        {"not present", 3, 0x6c, CODE0, SPARE2, true, X86_NP, SPARE2},
        {"null target", 3, 0xec, 0, SPARE2, true, X86_GP, 0},
        {"data target", 3, 0xec, DATA0, SPARE2, true, X86_GP, DATA0},
        {"jmp to inner", 3, 0xec, CODE0, SPARE2, false, X86_GP, CODE0},
        {"jmp same level", 0, 0xec, CODE0, SPARE2, false, RAN, 0},
        {"jmp conforming", 3, 0xec, CONFORM0, SPARE2, false, RAN, 0},
        {"outer target", 0, 0xec, CODE3, SPARE2, true, X86_GP, CODE3 & 0xfffc},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        protected_mode(cases[i].cpl);
        call_gate(cases[i].sel, cases[i].access, 0);
        outcome o = cases[i].is_call ? INSN(CALL_FAR(cases[i].call_sel, 0)) : INSN(JMP_FAR(cases[i].call_sel, 0));
        if (o.vector != cases[i].vector || (o.vector != RAN && o.error != cases[i].error))
            FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                 cases[i].error);
        if (o.vector == RAN)
            CHECK_EQ(cpu->cpl, cases[i].cpl);
    }
}

TEST(far_returns_refused)
{
    static const struct { const char *what; unsigned cs, ss, spare_access; int vector; uint32_t error; } cases[] = {
        { "outer", CODE3, DATA3, 0, RAN, 0 },
        { "null cs", 0, DATA3, 0, X86_GP, 0 },
        { "data cs", DATA0, DATA3, 0, X86_GP, DATA0 },
        { "rpl below dpl", CODE3 & 0xfffc, DATA3, 0, X86_GP, CODE3 & 0xfffc },
        { "cs not present", SPARE | 3, DATA3, 0x7a, X86_NP, SPARE },
        { "null ss", CODE3, 0, 0, X86_GP, 0 },
        { "ss rpl", CODE3, DATA0, 0, X86_GP, DATA0 },
        { "ss dpl", CODE3, DATA0 | 3, 0, X86_GP, DATA0 },
        { "ss not present", CODE3, SPARE | 3, 0x72, X86_SS_FAULT, SPARE },
        { "conforming at rpl 3", CONFORM0 | 3, DATA3, 0, RAN, 0 },
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (unsigned is_iret = 0; is_iret < 2; is_iret++) {
            protected_mode(0);
            set_gdt(SPARE, 0, 0xfffff, cases[i].spare_access, 0xc);
            uint32_t frame[5] = { 0x1000, cases[i].cs, 2, STACK3, cases[i].ss }, *from = frame;
            unsigned sp = STACK0 - 20;
            for (unsigned k = 0; k < 5; k++)
                if (k != 2 || is_iret)
                    put32(sp + 4 * (unsigned)(from++ - frame), frame[k]);
            cpu->gpr[X86_RSP] = sp;
            outcome o = is_iret ? INSN(0xcf) : INSN(0xcb);
            if (o.vector != cases[i].vector || (o.vector != RAN && o.error != cases[i].error))
                FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                     cases[i].error);
            if (o.vector == RAN) {
                CHECK_EQ(cpu->cpl, 3);
                CHECK_EQ(cpu->gpr[X86_RSP], STACK3);
            } else {
                CHECK_EQ(cpu->gpr[X86_RSP], sp);
            }
        }
    protected_mode(3);                                                  /* never inwards */
    put32(STACK3 - 8, 0x1000);
    put32(STACK3 - 4, CODE0);
    cpu->gpr[X86_RSP] = STACK3 - 8;
    RAISES(X86_GP, CODE0, 0xcb);
}

/* ---- virtual-8086 mode ---- */

static void enter_v86(unsigned iopl)
{
    protected_mode(0);
    static const uint16_t segs[] = { X86_ES, X86_DS, X86_FS, X86_GS };
    uint32_t frame[9] = {0x100, 0x2000, X86_FL_VM | X86_FL_1 | X86_FL_IF | iopl << 12, 0x500, 0x700, 0x10, 0x20,
                         0x30,  0x40};
    memcpy(ram + STACK0 - 36, frame, sizeof frame);
    cpu->gpr[X86_RSP] = STACK0 - 36;
    RUNS(0xcf);
    CHECK(x86_is_v86(cpu));
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->code_size, 2);
    CHECK_EQ(cpu->rip, 0x100);
    CHECK_EQ(cpu->seg[X86_CS].base, 0x20000);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x500);
    for (unsigned i = 0; i < 4; i++) {
        CHECK_EQ(cpu->seg[segs[i]].sel, 0x10u * (i + 1));
        CHECK_EQ(cpu->seg[segs[i]].limit, 0xffff);
    }
}

TEST(v86_and_back)
{
    enter_v86(0);
    set_gate(X86_GP, CODE0, 0x9000, 0x8e);
    RAISES(X86_GP, 0, 0xcd, 0x21);                                      /* IOPL < 3 */
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK(!x86_is_v86(cpu));
    CHECK_EQ(cpu->cpl, 0);
    uint64_t sp = STACK0 - 40;
    CHECK_EQ(cpu->gpr[X86_RSP], sp);
    static const uint32_t want[10] = {
        0, 0x100, 0x2000, X86_FL_VM | X86_FL_RF | X86_FL_1 | X86_FL_IF, 0x500, 0x700, 0x10, 0x20, 0x30, 0x40};
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQ(get32(sp + 4 * i), want[i]);
    CHECK_EQ(cpu->seg[X86_DS].sel, 0);
    cpu->gpr[X86_RSP] += 4;
    RUNS(0xcf);
    CHECK(x86_is_v86(cpu));
    CHECK(cpu->rflags & X86_FL_RF);

    RAISES(X86_GP, 0, 0xfa);                                            /* cli */
    RAISES(X86_GP, 0, 0xfb);
    RAISES(X86_GP, 0, 0x9c);                                            /* pushf */
    RAISES(X86_GP, 0, 0x9d);
    RAISES(X86_GP, 0, 0xcf);
    RAISES(X86_GP, 0, 0xf4);                                            /* hlt */
    RAISES(X86_UD, 0, 0x0f, 0x00, 0xd8);                                /* ltr */

    enter_v86(3);
    set_gate(0x21, CODE0, 0x9100, 0xee);
    RUNS(0xcd, 0x21);
    CHECK_EQ(cpu->rip, 0x9100);
    CHECK_EQ(cpu->cpl, 0);
    enter_v86(3);
    set_gate(0x21, CODE3, 0x9100, 0xee);                                /* handlers of v86 code are in ring 0 */
    RAISES(X86_GP, CODE3 & 0xfffc, 0xcd, 0x21);
    enter_v86(3);
    set_gate(0x21, CONFORM0, 0x9100, 0xee);
    RAISES(X86_GP, CONFORM0, 0xcd, 0x21);
    RUNS(0xfa);
    CHECK(!(cpu->rflags & X86_FL_IF));
    cpu->gpr[X86_RAX] = 0x1234;
    RUNS(MOV_DS);
    CHECK_EQ(cpu->seg[X86_DS].base, 0x12340);
}

TEST(vme_redirection)
{
    enter_v86(0);
    cpu->cr4 |= X86_CR4_VME;
    cpu->seg[X86_TR].limit = 0x67 + 0x2000;
    put16(TSS + 0x66, 0x88);                                            /* bitmap at 0x68 */
    put32(0x21 * 4, 0x30004567);                                        /* IVT: 3000:4567 */
    cpu->rflags |= X86_FL_VIF;
    RUNS(0xcd, 0x21);
    CHECK(x86_is_v86(cpu));
    CHECK_EQ(cpu->seg[X86_CS].sel, 0x3000);
    CHECK_EQ(cpu->rip, 0x4567);
    CHECK(!(cpu->rflags & X86_FL_VIF));
    CHECK(cpu->rflags & X86_FL_IF);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x500 - 6);
    CHECK_EQ(get16(0x7000 + 0x500 - 6), 0x102);
    CHECK_EQ(get16(0x7000 + 0x500 - 4), 0x2000);
    CHECK_EQ(get16(0x7000 + 0x500 - 2), X86_FL_1 | X86_FL_IF | X86_FL_IOPL);   /* VIF shown as IF, IOPL as 3 */
    RUNS(0xcf);
    CHECK(cpu->rflags & X86_FL_VIF);
    CHECK_EQ(cpu->rflags & X86_FL_IOPL, 0);
    CHECK_EQ(cpu->rip, 0x102);
    RUNS(0xfa);                                                         /* cli clears VIF, not IF */
    CHECK(!(cpu->rflags & X86_FL_VIF) && (cpu->rflags & X86_FL_IF));
    cpu->rflags |= X86_FL_VIP;
    RAISES(X86_GP, 0, 0xfb);
    put8(TSS + 0x68 + 0x21 / 8, 1 << (0x21 % 8));                       /* not redirected: IOPL decides */
    RAISES(X86_GP, 0, 0xcd, 0x21);
}

/* PUSHF and POPF in virtual-8086 mode (SDM vol. 2, POPF; vol. 3, 21.3.2): below IOPL 3 only with VME and of 16 bits, on VIF. */
TEST(vme_flags)
{
    const uint16_t arithmetic = X86_FL_CF | X86_FL_ZF | X86_FL_OF;
    enter_v86(0);
    RAISES(X86_GP, 0, 0x9c);                                            /* pushf */
    RAISES(X86_GP, 0, 0x9d);                                            /* popf */
    cpu->cr4 |= X86_CR4_VME;
    RAISES(X86_GP, 0, 0x66, 0x9c);                                      /* pushfd */
    RAISES(X86_GP, 0, 0x66, 0x9d);
    cpu->gpr[X86_RSP] = 0x500;
    cpu->rflags &= ~(uint64_t)(X86_FL_VIF | X86_FL_VIP);
    RUNS(0x9c);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x4fe);
    CHECK_EQ(get16(0x7000 + 0x4fe), X86_FL_1 | X86_FL_IOPL);            /* IF is set, VIF is what shows */
    put16(0x7000 + 0x4fe, X86_FL_IF | arithmetic);
    RUNS(0x9d);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x500);
    CHECK(cpu->rflags & X86_FL_VIF);
    CHECK_EQ(cpu->rflags & (X86_FL_IF | X86_FL_IOPL | arithmetic), X86_FL_IF | arithmetic);
    cpu->gpr[X86_RSP] = 0x4fe;
    put16(0x7000 + 0x4fe, X86_FL_IOPL);
    RUNS(0x9d);                                                         /* IF = 0: VIF goes, IF and IOPL stay */
    CHECK_EQ(cpu->rflags & (X86_FL_VIF | X86_FL_IF | X86_FL_IOPL | arithmetic), X86_FL_IF);
    cpu->gpr[X86_RSP] = 0x4fe;
    put16(0x7000 + 0x4fe, X86_FL_TF);
    RAISES(X86_GP, 0, 0x9d);
    put16(0x7000 + 0x4fe, X86_FL_IF);
    cpu->rflags |= X86_FL_VIP;
    RAISES(X86_GP, 0, 0x9d);                                            /* an interrupt waits for just this */
    CHECK_EQ(cpu->gpr[X86_RSP], 0x4fe);
    put16(0x7000 + 0x4fe, 0);
    RUNS(0x9d);
    enter_v86(3);                                                       /* IF is the guest's own */
    cpu->gpr[X86_RSP] = 0x4fe;
    put16(0x7000 + 0x4fe, arithmetic);
    RUNS(0x9d);
    CHECK_EQ(cpu->rflags & (X86_FL_IF | X86_FL_IOPL | arithmetic), X86_FL_IOPL | arithmetic);
}

TEST(pvi)
{
    protected_mode(3);
    RAISES(X86_GP, 0, 0xfa);
    cpu->cr4 |= X86_CR4_PVI;
    RUNS(0xfb);
    CHECK((cpu->rflags & X86_FL_VIF) && !(cpu->rflags & X86_FL_IF));
    RUNS(0xfa);
    CHECK(!(cpu->rflags & X86_FL_VIF));
    cpu->rflags |= X86_FL_IOPL;
    RUNS(0xfb);
    CHECK((cpu->rflags & X86_FL_IF) && cpu->inhibit == 1);
}

/* ---- real mode ---- */

TEST(real_mode)
{
    bare_new(1);
    cpu->seg[X86_CS].base = 0x10000;
    cpu->seg[X86_CS].sel = 0x1000;
    cpu->rip = 0x20;
    cpu->gpr[X86_RSP] = 0x1000;
    cpu->rflags |= X86_FL_IF;
    put32(0x10 * 4, 0x20003456);
    RUNS(0xcd, 0x10);
    CHECK_EQ(cpu->seg[X86_CS].sel, 0x2000);
    CHECK_EQ(cpu->seg[X86_CS].base, 0x20000);
    CHECK_EQ(cpu->rip, 0x3456);
    CHECK_EQ(cpu->gpr[X86_RSP], 0xffa);
    CHECK_EQ(get16(0xffa), 0x22);
    CHECK_EQ(get16(0xffc), 0x1000);
    CHECK(!(cpu->rflags & X86_FL_IF));
    RUNS(0xcf);
    CHECK_EQ(cpu->rip, 0x22);
    CHECK(cpu->rflags & X86_FL_IF);
    cpu->idtr.limit = 0x3f;                                             /* vector 10h does not fit */
    RAISES(X86_GP, 0, 0xcd, 0x10);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);                    /* 13 does: no error code in real mode */
    CHECK_EQ(cpu->gpr[X86_RSP], 0xffa);
    cpu->idtr.limit = 0;
    RAISES(X86_UD, 0, 0x0f, 0x0b);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_SHUTDOWN);
    RUNS(0xea, 0x34, 0x12, 0x00, 0x40);
    CHECK_EQ(cpu->seg[X86_CS].base, 0x40000);
    CHECK_EQ(cpu->rip, 0x1234);
}

/* Into protected mode and back, keeping a big limit: "unreal" mode. */
TEST(unreal_mode)
{
    bare_new(1);
    put64(GDT + 8, make_desc(0, 0xfffff, 0x92, 0xc));
    cpu->gdtr = (x86_dtr){ GDT, 15 };
    cpu->gpr[X86_RAX] = 1;
    RUNS(0x0f, 0x22, 0xc0);                                             /* mov cr0, eax */
    cpu->gpr[X86_RAX] = 8;
    RUNS(MOV_DS);
    cpu->gpr[X86_RAX] = 0;
    RUNS(0x0f, 0x22, 0xc0);
    CHECK(x86_is_real(cpu));
    cpu->gpr[X86_RAX] = 0x20;
    RUNS(MOV_DS);
    CHECK_EQ(cpu->seg[X86_DS].base, 0x200);
    CHECK_EQ(cpu->seg[X86_DS].limit, 0xffffffff);
    put8(0x100200, 0x5a);
    cpu->gpr[X86_RBX] = 0x100000;
    RUNS(0x67, 0x8a, 0x03);                                             /* mov al, [ebx] */
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xff, 0x5a);
}

/* ---- long mode ---- */

static void long_mode(unsigned cpl)
{
    bare_new(3);
    cpu->gdtr = (x86_dtr){ GDT, GDT_END - 1 };
    cpu->idtr = (x86_dtr){ IDT, 256 * 16 - 1 };
    set_gdt(CODE0, 0, 0, 0x9b, 0x2);
    set_gdt(DATA0, 0, 0xfffff, 0x93, 0xc);
    set_gdt(CODE3, 0, 0, 0xfb, 0x2);
    set_gdt(DATA3, 0, 0xfffff, 0xf3, 0xc);
    set_gdt(CONFORM0, 0, 0xfffff, 0xfb, 0xc);                           /* here: 32-bit code of ring 3 */
    cpu->seg[X86_TR] = (x86_seg){ .base = 0x6000, .limit = 0x67, .sel = TSS_SEL, .attr = 0x8b };
    put64(0x6000 + 4, STACK0);
    put64(0x6000 + 36, 0xa000);                                         /* IST1 */
    cpu->rip = 0x100000;
    to_cpl(cpl);
    CHECK_EQ(cpu->code_size, 8);
}

TEST(long_mode_interrupts)
{
    long_mode(3);
    set_gate64(0x40, CODE0, 0x200000, 0xee, 0);
    set_gate64(0x41, CODE0, 0x300000, 0xef, 1);
    cpu->gpr[X86_RSP] = 0x9009;                                         /* misaligned on purpose */
    cpu->rflags |= X86_FL_IF;
    RUNS(0xcd, 0x40);
    CHECK_EQ(cpu->cpl, 0);
    CHECK_EQ(cpu->rip, 0x200000);
    CHECK_EQ(cpu->seg[X86_SS].sel, 0);
    CHECK_EQ(cpu->gpr[X86_RSP], STACK0 - 40);
    CHECK_EQ(get64(STACK0 - 40), 0x100002);
    CHECK_EQ(get64(STACK0 - 32), CODE3);
    CHECK_EQ(get64(STACK0 - 24), X86_FL_IF | X86_FL_1);
    CHECK_EQ(get64(STACK0 - 16), 0x9009);
    CHECK_EQ(get64(STACK0 - 8), DATA3);
    RUNS(0xcd, 0x41);                                                   /* on the IST stack, from ring 0 */
    CHECK_EQ(cpu->gpr[X86_RSP], 0xa000 - 40);
    RUNS(0x48, 0xcf);
    CHECK_EQ(cpu->rip, 0x200002);
    CHECK_EQ(cpu->gpr[X86_RSP], STACK0 - 40);
    CHECK_EQ(cpu->seg[X86_SS].sel, 0);
    CHECK_EQ(cpu->cpl, 0);
    cpu->gpr[X86_RSP] = 0x8ff3;                                         /* same level: aligned down to 16 */
    RUNS(0xcd, 0x40);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x8ff0 - 40);
    RUNS(0x48, 0xcf);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x8ff3);
    cpu->gpr[X86_RSP] = STACK0 - 40;
    RUNS(0x48, 0xcf);
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x9009);
    CHECK_EQ(cpu->seg[X86_SS].sel, DATA3);
}

TEST(long_mode_gate_faults)
{
    static const struct {
        const char *what;
        unsigned cpl, access, sel, ist, l;
        uint64_t off;
        int vector;
        uint32_t error;
    } cases[] = {
        {"task gate", 0, 0x85, CODE0, 0, 2, 0, X86_GP, INT_ERR},
        {"16-bit gate", 0, 0x86, CODE0, 0, 2, 0, X86_GP, INT_ERR},
        {"dpl", 3, 0x8e, CODE0, 0, 2, 0, X86_GP, INT_ERR},
        {"not present", 0, 0x0e, CODE0, 0, 2, 0, X86_NP, INT_ERR},
        {"32-bit code", 0, 0x8e, SPARE, 0, 4, 0, X86_GP, SPARE},
        {"l and d", 0, 0x8e, SPARE, 0, 6, 0, X86_GP, SPARE},
        {"null", 0, 0x8e, 0, 0, 2, 0, X86_GP, 0},
        {"non-canonical offset", 0, 0x8e, CODE0, 0, 2, UINT64_C(0x800000000000), X86_GP, 0},
        {"ist beyond tss", 0, 0x8e, CODE0, 7, 2, 0, X86_TS, TSS_SEL},
        {"good", 0, 0x8e, SPARE, 0, 2, 0, RAN, 0},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        long_mode(cases[i].cpl);
        set_gdt(SPARE, 0, 0, 0x9a, cases[i].l);
        set_gate64(0x40, cases[i].sel, cases[i].off, cases[i].access, cases[i].ist);
        if (cases[i].ist == 7)
            cpu->seg[X86_TR].limit = 0x58;
        outcome o = INSN(0xcd, 0x40);
        if (o.vector != cases[i].vector || (o.vector != RAN && o.error != cases[i].error))
            FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                 cases[i].error);
    }
    long_mode(3);
    set_gate64(0x40, CODE0, 0x1000, 0xee, 0);
    put64(0x6004, UINT64_C(0x800000000000));
    RAISES(X86_SS_FAULT, 0, 0xcd, 0x40);
    cpu->idtr.limit = 0x40f;
    RUNS(0x90);
    cpu->idtr.limit = 0x40e;
    RAISES(X86_GP, INT_ERR, 0xcd, 0x40);
}

TEST(long_mode_iret)
{
    long_mode(0);
    uint64_t frame[5] = { 0x1234, CONFORM0 | 3, 2 | X86_FL_IF, 0xdead0000beef, DATA3 };
    memcpy(ram + 0x7000, frame, sizeof frame);
    cpu->gpr[X86_RSP] = 0x7000;
    RUNS(0x48, 0xcf);                                                   /* to 32-bit compatibility code */
    CHECK_EQ(cpu->code_size, 4);
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->gpr[X86_RSP], 0xbeef);
    CHECK_EQ(cpu->rip, 0x1234);
    set_gate64(0x40, CODE0, 0x200000, 0xee, 0);
    RUNS(0xcd, 0x40);
    CHECK_EQ(cpu->code_size, 8);
    CHECK_EQ(cpu->gpr[X86_RSP], STACK0 - 40);

    long_mode(0); /* FS and GS lose their selectors, not their bases */
    load_seg_raw(X86_GS, DATA0);
    cpu->seg[X86_GS].base = UINT64_C(0x400000);
    uint64_t outer[5] = { 0x1000, CODE3, 2, STACK3, DATA3 };
    memcpy(ram + 0x7000, outer, sizeof outer);
    cpu->gpr[X86_RSP] = 0x7000;
    RUNS(0x48, 0xcf);
    CHECK_EQ(cpu->seg[X86_GS].sel, 0);
    CHECK_EQ(cpu->seg[X86_GS].base, 0x400000);

    long_mode(0);
    cpu->rflags |= X86_FL_NT;
    RAISES(X86_GP, 0, 0x48, 0xcf);
    cpu->rflags &= ~(uint64_t)X86_FL_NT;
    frame[0] = UINT64_C(0x800000000000), frame[1] = CODE3;
    memcpy(ram + 0x7000, frame, sizeof frame);
    cpu->gpr[X86_RSP] = 0x7000;
    RAISES(X86_GP, 0, 0x48, 0xcf);
    frame[0] = 0x1000, frame[4] = 0;
    memcpy(ram + 0x7000, frame, sizeof frame);
    RAISES(X86_GP, 0, 0x48, 0xcf);                                      /* null SS for ring 3 */
    frame[1] = CODE0;
    memcpy(ram + 0x7000, frame, sizeof frame);
    RUNS(0x48, 0xcf);                                                   /* but fine for ring 0 */
    CHECK_EQ(cpu->seg[X86_SS].sel, 0);
    CHECK_EQ(cpu->gpr[X86_RSP], 0xdead0000beef);
}

/* REX.W gives a 64-bit offset. */
TEST(long_mode_far_pointers)
{
    long_mode(0);
    put64(0x7000, UINT64_C(0x123456789a));
    put16(0x7008, CODE0);
    RUNS(0x48, 0xff, 0x2c, 0x25, 0x00, 0x70, 0x00, 0x00);
    CHECK_EQ(cpu->rip, UINT64_C(0x123456789a));
    RUNS(0x48, 0xff, 0x1c, 0x25, 0x00, 0x70, 0x00, 0x00);
    CHECK_EQ(get64(cpu->gpr[X86_RSP]), UINT64_C(0x12345678a2));
    RUNS(0x48, 0xcb);
    CHECK_EQ(cpu->rip, UINT64_C(0x12345678a2));
    put64(0x7000, UINT64_C(0x800000000000));
    RAISES(X86_GP, 0, 0x48, 0xff, 0x2c, 0x25, 0x00, 0x70, 0x00, 0x00);
}

TEST(long_mode_call_gate)
{
    long_mode(3);
    put64(GDT + SPARE, 0x5678 | (uint64_t)CODE0 << 16 | UINT64_C(0xec) << 40 | UINT64_C(0x12) << 48);
    put64(GDT + SPARE + 8, 1);
    put32(0x7000, 0);
    put16(0x7004, SPARE);
    RUNS(0xff, 0x1c, 0x25, 0x00, 0x70, 0x00, 0x00);                     /* call far [0x7000] */
    CHECK_EQ(cpu->cpl, 0);
    CHECK_EQ(cpu->rip, UINT64_C(0x100125678));
    CHECK_EQ(cpu->gpr[X86_RSP], STACK0 - 32);
    CHECK_EQ(get64(STACK0 - 32), 0x100007);
    CHECK_EQ(get64(STACK0 - 24), CODE3);
    CHECK_EQ(get64(STACK0 - 16), STACK3);
    CHECK_EQ(get64(STACK0 - 8), DATA3);
    RUNS(0x48, 0xcb);
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->gpr[X86_RSP], STACK3);
    CHECK_EQ(cpu->rip, 0x100007);
    put32(GDT + SPARE + 12, 0x100);                                     /* upper type field must be zero */
    RAISES(X86_GP, SPARE, 0xff, 0x1c, 0x25, 0x00, 0x70, 0x00, 0x00);
    put16(0x7004, TSS_SEL);
    set_gdt(TSS_SEL, TSS, 0x67, 0xe9, 0);
    RAISES(X86_GP, TSS_SEL, 0xff, 0x1c, 0x25, 0x00, 0x70, 0x00, 0x00);  /* no task switches */
}

TEST(long_mode_system_segments)
{
    long_mode(0);
    set_gdt(SPARE, 0x1000, 0x67, 0x89, 0);
    put32(GDT + SPARE + 8, 0xffff8000);
    put32(GDT + SPARE + 12, 0);
    cpu->gpr[X86_RAX] = SPARE;
    RUNS(0x0f, 0x00, 0xd8);
    CHECK_EQ(cpu->seg[X86_TR].base, UINT64_C(0xffff800000001000));
    put32(GDT + SPARE + 8, 0x8000);
    ram[GDT + SPARE + 5] = 0x89;
    RAISES(X86_GP, SPARE, 0x0f, 0x00, 0xd8);                            /* base not canonical */
    cpu->gpr[X86_RAX] = 0;
    RUNS(MOV_SS);                                                       /* null SS with RPL = CPL = 0 */
    CHECK_EQ(cpu->cpl, 0);
    cpu->gpr[X86_RAX] = 3;
    RAISES(X86_GP, 0, MOV_SS);
}

/* ---- SYSCALL and friends ---- */

TEST(syscall_sysret)
{
    long_mode(3);
    cpu->star = (UINT64_C(0x13) << 48) | (UINT64_C(0x08) << 32);
    cpu->lstar = 0x400000;
    cpu->sfmask = X86_FL_IF | X86_FL_DF;
    cpu->rflags |= X86_FL_IF | X86_FL_DF | X86_FL_CF;
    RUNS(0x0f, 0x05);
    CHECK_EQ(cpu->rip, 0x400000);
    CHECK_EQ(cpu->gpr[X86_RCX], 0x100002);
    CHECK_EQ(cpu->gpr[X86_R11], X86_FL_IF | X86_FL_DF | X86_FL_CF | X86_FL_1);
    CHECK_EQ(cpu->rflags, X86_FL_CF | X86_FL_1);
    CHECK_EQ(cpu->cpl, 0);
    CHECK_EQ(cpu->seg[X86_CS].sel, 8);
    CHECK_EQ(cpu->seg[X86_SS].sel, 0x10);
    RUNS(0x48, 0x0f, 0x07);
    CHECK_EQ(cpu->rip, 0x100002);
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->seg[X86_CS].sel, 0x23);
    CHECK_EQ(cpu->seg[X86_SS].sel, 0x1b);
    CHECK_EQ(cpu->code_size, 8);
    CHECK(cpu->rflags & X86_FL_IF);
    RAISES(X86_GP, 0, 0x48, 0x0f, 0x07);                                /* from ring 3 */
    RUNS(0x0f, 0x05);
    RUNS(0x0f, 0x07);                                                   /* to compatibility mode */
    CHECK_EQ(cpu->code_size, 4);
    CHECK_EQ(cpu->seg[X86_CS].sel, 0x13);
    cpu->cstar = 0x500000;
    RUNS(0x0f, 0x05);
    CHECK_EQ(cpu->rip, 0x500000);
    CHECK_EQ(cpu->code_size, 8);
    cpu->efer &= ~(uint64_t)X86_EFER_SCE;
    RAISES(X86_UD, 0, 0x0f, 0x05);
    RAISES(X86_UD, 0, 0x0f, 0x07);
}

TEST(sysenter_sysexit)
{
    protected_mode(3);
    RAISES(X86_GP, 0, 0x0f, 0x34);                                      /* SYSENTER_CS is null */
    cpu->sysenter_cs = CODE0;
    cpu->sysenter_esp = 0x8000;
    cpu->sysenter_eip = 0x9000;
    cpu->rflags |= X86_FL_IF;
    RUNS(0x0f, 0x34);
    CHECK_EQ(cpu->cpl, 0);
    CHECK_EQ(cpu->rip, 0x9000);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x8000);
    CHECK(!(cpu->rflags & X86_FL_IF));
    CHECK_EQ(cpu->seg[X86_SS].sel, CODE0 + 8);
    cpu->gpr[X86_RCX] = 0x7000;
    cpu->gpr[X86_RDX] = 0x6000;
    RUNS(0x0f, 0x35);
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->seg[X86_CS].sel, CODE0 + 16 + 3);
    CHECK_EQ(cpu->rip, 0x6000);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x7000);
    RAISES(X86_GP, 0, 0x0f, 0x35);
}
