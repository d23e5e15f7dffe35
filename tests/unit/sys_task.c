/* sys_task.c - hardware task switches: what is saved and loaded, busy bits, links, NT, and every fault (SDM vol.
 * 3, 7.2, 7.3). */
#include "sysbare.h"

#define FAR_JMP(sel) 0xea, 0, 0, 0, 0, (sel), 0
#define FAR_CALL(sel) 0x9a, 0, 0, 0, 0, (sel), 0

/* A 32-bit TSS at TSS2 for a ring-0 task. */
static void new_task32(void)
{
    memset(ram + TSS2, 0, 0x68);
    put32(TSS2 + 32, 0x5000);
    put32(TSS2 + 36, X86_FL_1 | X86_FL_CF);
    for (unsigned i = 0; i < 8; i++)
        put32(TSS2 + 40 + 4 * i, 0x1000 * (i + 1));
    static const uint16_t segs[6] = { DATA0, CODE0, DATA0, DATA3, DATA0, 0 };
    for (unsigned i = 0; i < 6; i++)
        put16(TSS2 + 72 + 4 * i, segs[i]);
    put16(TSS2 + 96, LDT_SEL);
    put16(TSS2 + 0x66, 0x68);
}

static void setup(void)
{
    protected_mode(0);
    new_task32();
    cpu->cr0 &= ~(uint64_t)X86_CR0_TS;
    for (unsigned i = 0; i < 8; i++)
        if (i != X86_RSP)
            cpu->gpr[i] = 0x11111111 * (i + 1);
    cpu->rflags |= X86_FL_ZF;
}

TEST(jmp_saves_and_loads)
{
    setup();
    RUNS(FAR_JMP(TSS2_SEL));
    CHECK_EQ(get32(TSS + 32), 0x100007);
    CHECK_EQ(get32(TSS + 36), X86_FL_1 | X86_FL_ZF);
    for (unsigned i = 0; i < 8; i++)
        CHECK_EQ(get32(TSS + 40 + 4 * i), i == X86_RSP ? STACK0 : 0x11111111 * (i + 1));
    CHECK_EQ(get16(TSS + 72), DATA0);
    CHECK_EQ(get16(TSS + 76), CODE0);
    CHECK_EQ(cpu->rip, 0x5000);
    CHECK_EQ(cpu->rflags, X86_FL_1 | X86_FL_CF);
    for (unsigned i = 0; i < 8; i++)
        CHECK_EQ(cpu->gpr[i], 0x1000 * (i + 1));
    CHECK_EQ(cpu->seg[X86_DS].sel, DATA3);
    CHECK_EQ(cpu->seg[X86_GS].sel, 0);
    CHECK(!(cpu->seg[X86_GS].attr & X86_SEG_P));
    CHECK_EQ(cpu->seg[X86_LDTR].base, LDT);
    CHECK_EQ(cpu->seg[X86_TR].sel, TSS2_SEL);
    CHECK_EQ(ram[GDT + TSS_SEL + 5], 0x89);                             /* old one no longer busy */
    CHECK_EQ(ram[GDT + TSS2_SEL + 5], 0x8b);
    CHECK(cpu->cr0 & X86_CR0_TS);
    CHECK_EQ(get16(TSS2), 0);                                           /* no link */
}

TEST(call_and_iret)
{
    setup();
    RUNS(FAR_CALL(TSS2_SEL));
    CHECK_EQ(get16(TSS2), TSS_SEL);
    CHECK(cpu->rflags & X86_FL_NT);
    CHECK_EQ(ram[GDT + TSS_SEL + 5], 0x8b);                             /* stays busy */
    CHECK_EQ(ram[GDT + TSS2_SEL + 5], 0x8b);
    cpu->gpr[X86_RAX] = 0xabcdef;
    RUNS(0xcf);
    CHECK_EQ(cpu->seg[X86_TR].sel, TSS_SEL);
    CHECK_EQ(cpu->rip, 0x100007);
    CHECK_EQ(cpu->gpr[X86_RAX], 0x11111111);
    CHECK_EQ(ram[GDT + TSS_SEL + 5], 0x8b);
    CHECK_EQ(ram[GDT + TSS2_SEL + 5], 0x89);
    CHECK_EQ(get32(TSS2 + 40), 0xabcdef);
    CHECK_EQ(get32(TSS2 + 36) & X86_FL_NT, 0);                          /* NT cleared in the saved image */
    CHECK_EQ(get32(TSS2 + 32), 0x5001);
}

TEST(task_gate_interrupt_with_error_code)
{
    setup();
    set_gate(X86_GP, TSS2_SEL, 0, 0x85);
    cpu->gpr[X86_RAX] = 0x88;
    RAISES(X86_GP, 0x88, 0x8e, 0xd8);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x5000);
    CHECK_EQ(cpu->gpr[X86_RSP], 0x5000 - 4);
    CHECK_EQ(get32(0x5000 - 4), 0x88);
    CHECK_EQ(get16(TSS2), TSS_SEL);
    CHECK_EQ(get32(TSS + 32), 0x100000);                                /* the faulting instruction */
    CHECK(get32(TSS + 36) & X86_FL_RF);
    CHECK(cpu->rflags & X86_FL_NT);
    cpu->gpr[X86_RSP] += 4;
    RUNS(0xcf);
    CHECK_EQ(cpu->rip, 0x100000);
}

TEST(task_gate_in_gdt)
{
    setup();
    put64(GDT + SPARE, (uint64_t)TSS2_SEL << 16 | UINT64_C(0x85) << 40);
    RUNS(FAR_JMP(SPARE));
    CHECK_EQ(cpu->seg[X86_TR].sel, TSS2_SEL);
    setup();
    put64(GDT + SPARE, (uint64_t)TSS2_SEL << 16 | UINT64_C(0x05) << 40);
    RAISES(X86_NP, SPARE, FAR_JMP(SPARE));
    put64(GDT + SPARE, (uint64_t)DATA0 << 16 | UINT64_C(0x85) << 40);
    RAISES(X86_GP, DATA0, FAR_JMP(SPARE));
    put64(GDT + SPARE, (uint64_t)TSS_SEL << 16 | UINT64_C(0x85) << 40);
    RAISES(X86_GP, TSS_SEL, FAR_JMP(SPARE));                            /* busy */
}

TEST(sixteen_bit_tss)
{
    setup();
    set_gdt(TSS2_SEL, TSS2, 0x2b, 0x81, 0);
    memset(ram + TSS2, 0, 0x68);
    put16(TSS2 + 14, 0x700);
    put16(TSS2 + 16, 2 | X86_FL_SF);
    for (unsigned i = 0; i < 8; i++)
        put16(TSS2 + 18 + 2 * i, (uint16_t)(0x100 * (i + 1)));
    static const uint16_t segs[4] = { DATA0, CODE16, DATA0, DATA0 };
    for (unsigned i = 0; i < 4; i++)
        put16(TSS2 + 34 + 2 * i, segs[i]);
    RUNS(FAR_CALL(TSS2_SEL));
    CHECK_EQ(cpu->rip, 0x700);
    CHECK_EQ(cpu->code_size, 2);
    CHECK_EQ(cpu->gpr[X86_RDI], 0x800);
    CHECK_EQ(cpu->rflags, X86_FL_1 | X86_FL_SF | X86_FL_NT);
    CHECK_EQ(cpu->seg[X86_FS].sel, 0);
    CHECK_EQ(ram[GDT + TSS2_SEL + 5], 0x83);
    cpu->gpr[X86_RAX] = 0x12345678;
    RUNS(0xcf);
    CHECK_EQ(get16(TSS2 + 18), 0x5678);
    CHECK_EQ(get16(TSS2 + 14), 0x701);
    CHECK_EQ(cpu->rip, 0x100007);
    CHECK_EQ(cpu->gpr[X86_RAX], 0x11111111);
}

TEST(into_v86)
{
    setup();
    put32(TSS2 + 36, X86_FL_1 | X86_FL_VM);
    for (unsigned i = 0; i < 6; i++)
        put16(TSS2 + 72 + 4 * i, (uint16_t)(0x100 * (i + 1)));
    RUNS(FAR_JMP(TSS2_SEL));
    CHECK(x86_is_v86(cpu));
    CHECK_EQ(cpu->cpl, 3);
    CHECK_EQ(cpu->seg[X86_CS].base, 0x2000);
    CHECK_EQ(cpu->seg[X86_GS].base, 0x6000);
}

TEST(debug_trap)
{
    setup();
    put16(TSS2 + 100, 1);
    cpu->dr[7] = X86_DR7_INIT | 0x3 | 0x100;
    x86_mode_changed(cpu);
    outcome o = INSN(FAR_JMP(TSS2_SEL));
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 0x8000);
    CHECK_EQ(cpu->rip, 0x5000);
    CHECK_EQ(cpu->dr[7], X86_DR7_INIT | 2);                             /* local enables are gone, global ones stay */
}

/* Faults of the old task: nothing has changed. */
TEST(refused_before_the_switch)
{
    static const struct { const char *what; unsigned cpl, sel, access, limit; int vector; uint32_t error; } cases[] = {
        { "limit too small", 0, TSS2_SEL, 0x89, 0x66, X86_TS, TSS2_SEL },
        { "16-bit limit too small", 0, TSS2_SEL, 0x81, 0x2a, X86_TS, TSS2_SEL },
        { "not present", 0, TSS2_SEL, 0x09, 0x67, X86_NP, TSS2_SEL },
        { "busy", 0, TSS2_SEL, 0x8b, 0x67, X86_GP, TSS2_SEL },
        { "dpl below cpl", 3, TSS2_SEL, 0x89, 0x67, X86_GP, TSS2_SEL },
        { "rpl above dpl", 0, TSS2_SEL | 3, 0x89, 0x67, X86_GP, TSS2_SEL },
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        setup();
        to_cpl(cases[i].cpl);
        set_gdt(TSS2_SEL, TSS2, cases[i].limit, cases[i].access, 0);
        outcome o = INSN(FAR_JMP((uint8_t)cases[i].sel));
        if (o.vector != cases[i].vector || o.error != cases[i].error)
            FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                 cases[i].error);
        CHECK_EQ(cpu->rip, 0x100000);
        CHECK_EQ(cpu->seg[X86_TR].sel, TSS_SEL);
        CHECK_EQ(ram[GDT + TSS_SEL + 5], 0x8b);
    }
}

/* Faults of the new task's segments: raised at its first instruction, everything loaded. */
TEST(faults_in_the_new_task)
{
    static const struct {
        const char *what;
        unsigned at;
        uint16_t sel;
        unsigned spare_access;
        int vector;
        uint32_t error;
    } cases[] = {
        {"null cs", 76, 0, 0, X86_TS, 0},
        {"data cs", 76, DATA0, 0, X86_TS, DATA0},
        {"cs dpl", 76, CODE3 & 0xfffc, 0, X86_TS, CODE3 & 0xfffc},
        {"cs not present", 76, SPARE, 0x1a, X86_NP, SPARE},
        {"cs beyond gdt", 76, 0x88, 0, X86_TS, 0x88},
        {"null ss", 80, 0, 0, X86_TS, 0},
        {"ss read-only", 80, SPARE, 0x90, X86_TS, SPARE},
        {"ss dpl", 80, DATA3, 0, X86_TS, DATA3 & 0xfffc},
        {"ss not present", 80, SPARE, 0x12, X86_SS_FAULT, SPARE},
        {"ds execute-only", 84, SPARE, 0x98, X86_TS, SPARE},
        {"ds not present", 84, SPARE, 0x12, X86_NP, SPARE},
        {"es is a tss", 72, TSS_SEL, 0, X86_TS, TSS_SEL},
        {"ldt is data", 96, DATA0, 0, X86_TS, DATA0},
        {"ldt in ldt", 96, LDT_SEL | 4, 0, X86_TS, LDT_SEL | 4},
        {"ldt not present", 96, SPARE, 0x02, X86_TS, SPARE},
        {"eip beyond limit", 32, 0, 0, X86_GP, 0},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (unsigned is_event = 0; is_event < 2; is_event++) {
            setup();
            set_gdt(SPARE, 0, 0xfffff, cases[i].spare_access, 0xc);
            set_gdt(SPARE2, 0, 0xfff, 0x9a, 4);
            put16(TSS2 + cases[i].at, cases[i].sel);
            if (cases[i].at == 32)
                put16(TSS2 + 76, SPARE2), put32(TSS2 + 32, 0x1000);
            outcome o;
            uint32_t error = cases[i].error;
            if (is_event) {            /* by a hardware interrupt: EXT is set */
                set_gate(0x30, TSS2_SEL, 0, 0x85);
                CHECK_EQ(x86_deliver_interrupt(cpu, 0x30, false), X86_STOP_SHUTDOWN);   /* no handlers: ends there */
                continue;
            }
            o = INSN(FAR_JMP(TSS2_SEL));
            if (o.vector != cases[i].vector || o.error != error)
                FAIL("%s: vector %d error %#x, not %d error %#x", cases[i].what, o.vector, o.error, cases[i].vector,
                     error);
            CHECK_EQ(cpu->seg[X86_TR].sel, TSS2_SEL);
            CHECK_EQ(cpu->rip, cases[i].at == 32 ? 0x1000 : 0x5000);
            CHECK_EQ(cpu->gpr[X86_RAX], 0x1000);
        }
}

TEST(event_faults_have_ext)
{
    setup();
    set_gate(0x30, TSS2_SEL, 0, 0x85);
    set_gate(X86_TS, CODE0, 0x6000, 0x8e);
    put16(TSS2 + 84, CODE0 | 4);                                        /* DS: LDT selector beyond the LDT limit */
    put16(TSS2 + 96, 0);
    CHECK_EQ(x86_deliver_interrupt(cpu, 0x30, false), X86_STOP_NONE);
    CHECK_EQ(cpu->rip, 0x6000);
    CHECK_EQ(get32(cpu->gpr[X86_RSP]), (CODE0 | 4) | 1);
}

TEST(iret_link_faults)
{
    static const struct { uint16_t link; unsigned access; int vector; uint32_t error;
    } cases[] = {{TSS2_SEL, 0x89, X86_TS, TSS2_SEL},
                 {TSS2_SEL, 0x0b, X86_NP, TSS2_SEL},
                 {TSS2_SEL | 4, 0x8b, X86_TS, TSS2_SEL | 4},
                 {DATA0, 0x8b, X86_TS, DATA0},
                 {0x88, 0x8b, X86_TS, 0x88},
                 {TSS2_SEL, 0x8b, RAN, 0}};
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        setup();
        cpu->rflags |= X86_FL_NT;
        put16(TSS, cases[i].link);
        set_gdt(TSS2_SEL, TSS2, 0x67, cases[i].access, 0);
        outcome o = INSN(0xcf);
        if (o.vector != cases[i].vector || (o.vector != RAN && o.error != cases[i].error))
            FAIL("case %u: vector %d error %#x, not %d error %#x", i, o.vector, o.error, cases[i].vector,
                 cases[i].error);
    }
}

/* CR3 is part of a 32-bit task once paging is on. */
TEST(page_tables_change_with_the_task)
{
    setup();
    for (unsigned i = 0; i < 2; i++) {                                  /* two directories: identity with 4 MiB pages */
        uint32_t dir = 0x20000 + 0x1000 * i;
        put32(dir, 0x83);
        put32(dir + 4, i ? 0x83 : 0x400083);
    }
    cpu->cr4 |= X86_CR4_PSE;
    cpu->cr3 = 0x20000;
    cpu->gpr[X86_RAX] = cpu->cr0 | X86_CR0_PG;
    RUNS(0x0f, 0x22, 0xc0);
    put32(TSS2 + 28, 0x21000);
    RUNS(FAR_JMP(TSS2_SEL));
    CHECK_EQ(cpu->cr3, 0x21000);
    put8(0x123, 0x77);
    RUNS(0xa0, 0x23, 0x01, 0x40, 0x00);                                 /* mov al, [0x400123]: now page 0 */
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xff, 0x77);
    CHECK_EQ(get32(TSS + 28), 0);                                       /* CR3 is static: never saved */
}
