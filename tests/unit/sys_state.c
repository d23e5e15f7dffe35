/* sys_state.c - control and debug registers, MSRs, CPUID, ports, and the other privileged instructions: what is
 * refused, with which vector, and what state results (SDM vol. 2 and 3, APM vol. 2).
 */
#include "sysbare.h"

#define MOV_CR0_EAX 0x0f, 0x22, 0xc0
#define MOV_EAX_CR0 0x0f, 0x20, 0xc0
#define MOV_CR3_EAX 0x0f, 0x22, 0xd8
#define MOV_CR4_EAX 0x0f, 0x22, 0xe0
#define WRMSR 0x0f, 0x30
#define RDMSR 0x0f, 0x32

static void set_msr(uint32_t msr, uint64_t v)
{
    cpu->gpr[X86_RCX] = msr;
    cpu->gpr[X86_RAX] = (uint32_t)v;
    cpu->gpr[X86_RDX] = v >> 32;
}

/* ---- control registers ---- */

TEST(cr0_rules)
{
    static const struct { uint64_t v; int vector; } cases[] = {
        { 0x80000000, X86_GP },        /* PG without PE */
        { 0x20000001, X86_GP },        /* NW without CD */
        { 0x60000001, RAN }, { 0x40000001, RAN }, { 0x00000001, RAN },
        { 0x1ff8ffc1, RAN },           /* reserved bits are ignored */
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        protected_mode(0);
        cpu->gpr[X86_RAX] = cases[i].v;
        outcome o = INSN(MOV_CR0_EAX);
        if (o.vector != cases[i].vector)
            FAIL("%#" PRIx64 ": vector %d", cases[i].v, o.vector);
        if (o.vector == RAN)
            CHECK_EQ(cpu->cr0, (cases[i].v & 0xe005003f) | X86_CR0_ET);
    }
    bare_new(3);
    cpu->gpr[X86_RAX] = UINT64_C(0x180000011);
    RAISES(X86_GP, 0, MOV_CR0_EAX);
    cpu->gpr[X86_RAX] = 0x11;
    RAISES(X86_GP, 0, MOV_CR0_EAX);                                     /* clearing PG in 64-bit mode */
    protected_mode(3);
    RAISES(X86_GP, 0, MOV_CR0_EAX);
    RAISES(X86_GP, 0, MOV_EAX_CR0);
    RAISES(X86_UD, 0, 0x0f, 0x20, 0xc8);                                /* CR1: #UD before the privilege check */
    RAISES(X86_UD, 0, 0x0f, 0x20, 0xe8);                                /* CR5 */
}

TEST(entering_and_leaving_long_mode)
{
    protected_mode(0);
    set_gdt(SPARE, 0, 0xfffff, 0x9b, 0xa);                              /* 64-bit code */
    put64(0x20000, 0x21003), put64(0x21000, 0x83);                      /* identity, a 1 GiB page */
    set_msr(0xc0000080, X86_EFER_LME);
    RUNS(WRMSR);
    cpu->cr3 = 0x20000;
    cpu->gpr[X86_RAX] = cpu->cr0 | X86_CR0_PG;
    RAISES(X86_GP, 0, MOV_CR0_EAX);                                     /* CR4.PAE is clear */
    cpu->gpr[X86_RAX] = cpu->cr4 | X86_CR4_PAE;
    RUNS(MOV_CR4_EAX);
    cpu->seg[X86_CS].attr |= X86_SEG_L;
    cpu->gpr[X86_RAX] = cpu->cr0 | X86_CR0_PG;
    RAISES(X86_GP, 0, MOV_CR0_EAX);                                     /* CS.L set */
    cpu->seg[X86_CS].attr &= (uint16_t)~X86_SEG_L;
    RUNS(MOV_CR0_EAX);
    CHECK_EQ(cpu->efer, X86_EFER_LME | X86_EFER_LMA);
    CHECK_EQ(cpu->code_size, 4);
    RUNS(0xea, 0, 0x10, 0, 0, SPARE, 0);
    CHECK_EQ(cpu->code_size, 8);
    set_msr(0xc0000080, 0);
    RAISES(X86_GP, 0, WRMSR);                                           /* LME while paging */
    cpu->gpr[X86_RAX] = cpu->cr4 & ~(uint64_t)X86_CR4_PAE;
    RAISES(X86_GP, 0, MOV_CR4_EAX);
    cpu->gpr[X86_RAX] = cpu->cr4 | X86_CR4_PCIDE;
    RUNS(MOV_CR4_EAX);
    cpu->gpr[X86_RAX] = UINT64_C(0x8000000000020005);
    RUNS(MOV_CR3_EAX);
    CHECK_EQ(cpu->cr3, 0x20005);
    cpu->gpr[X86_RAX] = UINT64_C(1) << 46;
    RAISES(X86_GP, 0, MOV_CR3_EAX);
    put32(0x7000, 0x2000), put16(0x7004, CODE0);
    RUNS(0xff, 0x2c, 0x25, 0x00, 0x70, 0x00, 0x00);                     /* to compatibility mode */
    CHECK_EQ(cpu->code_size, 4);
    cpu->gpr[X86_RAX] = cpu->cr0 & ~(uint64_t)X86_CR0_PG;
    RAISES(X86_GP, 0, MOV_CR0_EAX);                                     /* CR4.PCIDE is set */
    cpu->gpr[X86_RAX] = cpu->cr4 & ~(uint64_t)X86_CR4_PCIDE;
    RUNS(MOV_CR4_EAX);
    cpu->gpr[X86_RAX] = cpu->cr0 & ~(uint64_t)X86_CR0_PG;
    RUNS(MOV_CR0_EAX);
    CHECK_EQ(cpu->efer, X86_EFER_LME);
}

TEST(cr4_rules)
{
    protected_mode(0);
    cpu->gpr[X86_RAX] = 1u << 13;                                       /* VMXE: not offered */
    RAISES(X86_GP, 0, MOV_CR4_EAX);
    cpu->gpr[X86_RAX] = 1u << 22;                                       /* PKE */
    RAISES(X86_GP, 0, MOV_CR4_EAX);
    cpu->gpr[X86_RAX] = X86_CR4_PCIDE | X86_CR4_PAE;
    RAISES(X86_GP, 0, MOV_CR4_EAX);                                     /* outside long mode */
    cpu->gpr[X86_RAX] = X86_CR4_PAE | X86_CR4_SMEP | X86_CR4_SMAP | X86_CR4_UMIP;
    RUNS(MOV_CR4_EAX);
    bare_new(3);
    cpu->cr3 = 0x1001;
    cpu->gpr[X86_RAX] = cpu->cr4 | X86_CR4_PCIDE;
    RAISES(X86_GP, 0, MOV_CR4_EAX);                                     /* CR3[11:0] is not zero */
}

TEST(pae_pdptes_are_checked_and_cached)
{
    protected_mode(0);
    put64(0x20000, 0x21001);
    put64(0x21000, 0x83);
    cpu->cr4 |= X86_CR4_PAE;
    cpu->cr3 = 0x20000;
    put64(0x20008, 0x21003);                                            /* bit 1 is reserved */
    cpu->gpr[X86_RAX] = cpu->cr0 | X86_CR0_PG;
    RAISES(X86_GP, 0, MOV_CR0_EAX);
    CHECK(!(cpu->cr0 & X86_CR0_PG));
    put64(0x20008, 0x1e6);                                              /* not present: nothing is reserved */
    RUNS(MOV_CR0_EAX);
    put64(0x20000, 0);                                                  /* too late: it is cached */
    put8(0x5000, 0x11);
    RUNS(0xa0, 0x00, 0x50, 0, 0);
    CHECK_EQ(cpu->gpr[X86_RAX] & 0xff, 0x11);
    put64(0x30000, UINT64_C(0x400000021001));
    cpu->gpr[X86_RAX] = 0x30000;
    RAISES(X86_GP, 0, MOV_CR3_EAX);
    CHECK_EQ(cpu->cr3, 0x20000);
    put64(0x30020, 0x21001);
    cpu->gpr[X86_RAX] = 0x30020;                                        /* 32-byte aligned table */
    RUNS(MOV_CR3_EAX);
    CHECK_EQ(cpu->pdpte[0], 0x21001);
}

TEST(msw)
{
    protected_mode(0);
    cpu->gpr[X86_RAX] = 0xe;
    RUNS(0x0f, 0x01, 0xf0);                                             /* lmsw ax: cannot clear PE */
    CHECK_EQ(cpu->cr0 & 15, 15);
    cpu->gpr[X86_RAX] = 1;
    RUNS(0x0f, 0x01, 0xf0);
    CHECK_EQ(cpu->cr0 & 15, 1);
    RUNS(0x0f, 0x01, 0xe0);                                             /* smsw eax */
    CHECK_EQ(cpu->gpr[X86_RAX], cpu->cr0);
    cpu->cr0 |= X86_CR0_TS;
    RUNS(0x0f, 0x06);
    CHECK(!(cpu->cr0 & X86_CR0_TS));
    bare_new(1);
    cpu->gpr[X86_RAX] = 1;
    RUNS(0x0f, 0x01, 0xf0);
    CHECK(cpu->cr0 & X86_CR0_PE);
}

/* Each of these is #GP(0) outside ring 0. */
TEST(privileged_instructions)
{
    static const uint8_t insns[][5] = {
        { 0xf4 }, { 0x0f, 0x06 }, { 0x0f, 0x08 }, { 0x0f, 0x09 }, { 0x0f, 0x30 }, { 0x0f, 0x32 }, { 0x0f, 0x20, 0xc0 },
        { 0x0f, 0x22, 0xc0 }, { 0x0f, 0x21, 0xc0 }, { 0x0f, 0x23, 0xc0 }, { 0x0f, 0x01, 0xf0 }, { 0x0f, 0x01, 0x10 },
        { 0x0f, 0x01, 0x18 }, { 0x0f, 0x01, 0x38 }, { 0x0f, 0x00, 0xd0 }, { 0x0f, 0x00, 0xd8 }, { 0xfa }, { 0xfb },
        { 0x66, 0x0f, 0x38, 0x82, 0x03 },
    };
    for (unsigned i = 0; i < sizeof insns / sizeof insns[0]; i++) {
        protected_mode(3);
        cpu->gpr[X86_RAX] = 0x2000;
        outcome o = execute(insns[i], 5);
        if (o.vector != X86_GP || o.error != 0)
            FAIL("instruction %u (%02x %02x): vector %d", i, insns[i][0], insns[i][1], o.vector);
    }
}

TEST(umip)
{
    static const uint8_t insns[][3] = {
        {0x0f, 0x01, 0x00}, {0x0f, 0x01, 0x08}, {0x0f, 0x00, 0xc0}, {0x0f, 0x00, 0xc8}, {0x0f, 0x01, 0xe0}};
    for (unsigned umip = 0; umip < 2; umip++)
        for (unsigned i = 0; i < 5; i++) {
            protected_mode(3);
            cpu->gpr[X86_RAX] = 0x7000;
            cpu->cr4 |= umip ? X86_CR4_UMIP : 0;
            outcome o = execute(insns[i], 3);
            CHECK_EQ(o.vector, umip ? X86_GP : RAN);
        }
}

TEST(descriptor_table_registers)
{
    protected_mode(0);
    put16(0x7000, 0x1234);
    put32(0x7002, 0x89abcdef);
    cpu->gpr[X86_RBX] = 0x7000;
    RUNS(0x0f, 0x01, 0x13);                                             /* lgdt [ebx] */
    CHECK_EQ(cpu->gdtr.limit, 0x1234);
    CHECK_EQ(cpu->gdtr.base, 0x89abcdef);
    RUNS(0x66, 0x0f, 0x01, 0x1b);                                       /* lidt, 16-bit: 24 bits of base */
    CHECK_EQ(cpu->idtr.base, 0xabcdef);
    cpu->gpr[X86_RBX] = 0x7100;
    RUNS(0x0f, 0x01, 0x03);
    CHECK_EQ(get16(0x7100), 0x1234);
    CHECK_EQ(get32(0x7102), 0x89abcdef);
    bare_new(3);
    put16(0x7000, 0xff);
    put64(0x7002, UINT64_C(0x800000000000));
    cpu->gpr[X86_RBX] = 0x7000;
    RAISES(X86_GP, 0, 0x0f, 0x01, 0x13);
    put64(0x7002, UINT64_C(0xffff800000001000));
    RUNS(0x0f, 0x01, 0x13);
    CHECK_EQ(cpu->gdtr.base, UINT64_C(0xffff800000001000));
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xd8);                                /* a register form: VMRUN, not offered */
}

TEST(not_offered)
{
    bare_new(3);
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xc8);                                /* monitor */
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xc9);                                /* mwait */
    RAISES(X86_UD, 0, 0x0f, 0xaa);                                      /* rsm */
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xc2);                                /* vmlaunch */
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xdd);                                /* clgi */
    RAISES(X86_UD, 0, 0xf3, 0x0f, 0xc7, 0x30);                          /* vmxon */
    RAISES(X86_UD, 0, 0x0f, 0x78, 0xc0);                                /* vmread */
    RAISES(X86_UD, 0, 0x0f, 0x34);                                      /* sysenter in long mode, as on AMD */
    RUNS(0x0f, 0x01, 0xc1);
    CHECK_EQ(hypercalls, 1);
    RUNS(0x0f, 0x01, 0xd9);
    CHECK_EQ(hypercalls, 2);
}

/* ---- interrupt flag, HLT ---- */

TEST(sti_shadow_and_hlt)
{
    protected_mode(0);
    RUNS(0xfb);
    CHECK_EQ(cpu->inhibit, 1);
    CHECK(!x86_can_interrupt(cpu));
    RUNS(0x90);
    CHECK(x86_can_interrupt(cpu));
    RUNS(0xfb);
    CHECK_EQ(cpu->inhibit, 0);                                          /* IF was set already */
    outcome o = INSN(0xf4);
    CHECK_EQ(o.stop, X86_STOP_HALT);
    CHECK(cpu->halted);
    CHECK_EQ(cpu->rip, 0x100004);
    protected_mode(3);
    cpu->rflags |= X86_FL_IOPL;
    RUNS(0xfb);
    RUNS(0xfa);
    CHECK(!(cpu->rflags & X86_FL_IF));
}

/* ---- ports ---- */

TEST(io_permission_bitmap)
{
    static const struct { uint16_t port; unsigned n; bool is_allowed;
    } cases[] = {{0x60, 1, true},  {0x61, 1, false},  {0x60, 2, false},  {0x62, 2, true},
                 {0x64, 4, true},  {0x67, 1, true},   {0x67, 2, false},  {0x5e, 4, false},
                 {0x3ff, 1, true}, {0x400, 1, false}, {0xffff, 1, false}};
    protected_mode(3);
    set_gdt(TSS_SEL, TSS, 0x68 + 0x80, 0x8b, 0); /* bitmap for 0x400 ports and the closing byte */
    load_seg_raw(X86_TR, TSS_SEL);
    memset(ram + TSS + 0x68, 0, 0x80);
    put8(TSS + 0x68 + 0x80, 0xff);
    put8(TSS + 0x68 + 0x61 / 8, 1 << (0x61 % 8));
    put8(TSS + 0x68 + 0x68 / 8, 1);
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cpu->gpr[X86_RDX] = cases[i].port;
        outcome o = cases[i].n == 1 ? INSN(0xec) : cases[i].n == 2 ? INSN(0x66, 0xed) : INSN(0xed);
        if ((o.vector == RAN) != cases[i].is_allowed)
            FAIL("port %#x width %u: vector %d", cases[i].port, cases[i].n, o.vector);
    }
    cpu->rflags |= X86_FL_IOPL;
    cpu->gpr[X86_RDX] = 0xffff;
    RUNS(0xec);
    cpu->rflags &= ~(uint64_t)X86_FL_IOPL;
    cpu->gpr[X86_RDX] = 0x60;
    cpu->seg[X86_TR].attr = 0x83;                                       /* a 16-bit TSS has no bitmap */
    RAISES(X86_GP, 0, 0xec);
}

/* ---- debug registers ---- */

TEST(debug_register_access)
{
    protected_mode(0);
    CHECK_EQ(cpu->dr[6], 0xffff0ff0);
    CHECK_EQ(cpu->dr[7], 0x400);
    cpu->gpr[X86_RAX] = 0x12345678;
    RUNS(0x0f, 0x23, 0xc0);
    RUNS(0x0f, 0x21, 0xc1);
    CHECK_EQ(cpu->gpr[X86_RCX], 0x12345678);
    cpu->gpr[X86_RAX] = 0xffffffff;
    RUNS(0x0f, 0x23, 0xf0);
    CHECK_EQ(cpu->dr[6], 0xffffefff);
    cpu->gpr[X86_RAX] = 0;
    RUNS(0x0f, 0x23, 0xe0);                                             /* DR4 is DR6 while CR4.DE is clear */
    CHECK_EQ(cpu->dr[6], 0xffff0ff0);
    cpu->cr4 |= X86_CR4_DE;
    RAISES(X86_UD, 0, 0x0f, 0x23, 0xe0);
    cpu->dr[7] |= 1u << 13;
    outcome o = INSN(0x0f, 0x21, 0xc0);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 0x2000);
    set_gate(X86_DB, CODE0, 0x3000, 0x8e);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->dr[6], 0xffff2ff0);
    CHECK(!(cpu->dr[7] & 1u << 13));
    bare_new(3);
    cpu->gpr[X86_RAX] = UINT64_C(0x100000000);
    RAISES(X86_GP, 0, 0x0f, 0x23, 0xf8);
    RAISES(X86_GP, 0, 0x0f, 0x23, 0xf0);
    RUNS(0x0f, 0x23, 0xd8);
}

static void break_on(unsigned i, uint64_t at, unsigned type, unsigned len)
{
    cpu->dr[i] = at;
    cpu->dr[7] |= 2u << 2 * i | (UINT64_C(1) * type << (16 + 4 * i)) | (UINT64_C(1) * len << (18 + 4 * i));
    x86_mode_changed(cpu);
}

TEST(breakpoints)
{
    protected_mode(0);
    break_on(1, 0x100000, 0, 0);
    outcome o = INSN(0x90);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 2);
    CHECK_EQ(cpu->rip, 0x100000);                                       /* a fault */
    cpu->rflags |= X86_FL_RF;
    RUNS(0x90);                                                         /* RF lets it by, once */
    CHECK(!(cpu->rflags & X86_FL_RF));

    protected_mode(0);
    break_on(0, 0x7004, 1, 3);                                          /* writes to 0x7004..0x7007 */
    cpu->gpr[X86_RBX] = 0x7007;
    RUNS(0x8a, 0x03);
    o = INSN(0x88, 0x03);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 1);
    CHECK_EQ(cpu->rip, 0x100004);                                       /* a trap */
    cpu->gpr[X86_RBX] = 0x7003;
    RUNS(0x88, 0x03);
    o = INSN(0x89, 0x03);                                               /* 0x7003..0x7006 overlaps */
    CHECK_EQ(o.vector, X86_DB);
    break_on(2, 0x7100, 3, 0);
    cpu->gpr[X86_RBX] = 0x7100;
    o = INSN(0x8a, 0x03);
    CHECK_EQ(o.dr6, 4);

    protected_mode(0);                                                  /* I/O breakpoints need CR4.DE */
    cpu->cr4 |= X86_CR4_DE;
    break_on(3, 0x80, 2, 0);
    cpu->gpr[X86_RDX] = 0x80;
    o = INSN(0xec);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 8);

    protected_mode(0);                                                  /* matched but not enabled: shown, not raised */
    break_on(0, 0x7000, 1, 0);
    cpu->dr[1] = 0x7010;
    cpu->dr[7] |= 1u << 20;
    cpu->gpr[X86_RBX] = 0x7010;
    RUNS(0x88, 0x03);
}

/* After any iteration but the last RF is set: what is pushed lets the rest pass its breakpoint (SDM vol. 3, 17.3.1.1). */
TEST(breakpoint_on_repeat)
{
    protected_mode(0);
    break_on(0, 0x100000, 0, 0);
    cpu->gpr[X86_RDI] = 0x7000;
    cpu->gpr[X86_RCX] = 3;
    outcome o = INSN(0xf3, 0xaa);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(cpu->gpr[X86_RCX], 3);
    cpu->rflags |= X86_FL_RF;
    for (unsigned left = 2; left; left--) {
        RUNS(0xf3, 0xaa);
        CHECK_EQ(cpu->gpr[X86_RCX], left);
        CHECK_EQ(cpu->rip, 0x100000);
        CHECK(cpu->rflags & X86_FL_RF);
    }
    RUNS(0xf3, 0xaa);
    CHECK_EQ(cpu->rip, 0x100002);
    CHECK(!(cpu->rflags & X86_FL_RF));

    protected_mode(0);
    cpu->rflags |= X86_FL_TF;
    x86_mode_changed(cpu);
    cpu->gpr[X86_RCX] = 2;
    o = INSN(0xf3, 0xaa);
    CHECK_EQ(o.dr6, 0x4000);
    CHECK(cpu->rflags & X86_FL_RF);
    o = INSN(0xf3, 0xaa);
    CHECK_EQ(o.dr6, 0x4000);
    CHECK_EQ(cpu->rip, 0x100002);
    CHECK(!(cpu->rflags & X86_FL_RF));
}

TEST(single_step)
{
    protected_mode(0);
    cpu->rflags |= X86_FL_TF;
    x86_mode_changed(cpu);
    outcome o = INSN(0x90);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 0x4000);
    CHECK_EQ(cpu->rip, 0x100001);
    set_gate(X86_DB, CODE0, 0x3000, 0x8e);
    CHECK_EQ(x86_deliver_fault(cpu), X86_STOP_NONE);
    CHECK_EQ(cpu->dr[6], 0xffff4ff0);
    CHECK(!(cpu->rflags & X86_FL_TF));
    CHECK_EQ(get32(cpu->gpr[X86_RSP] + 8) & (X86_FL_TF | X86_FL_RF), X86_FL_TF);
    RUNS(0xcf);                                                         /* IRET sets TF: no trap yet */
    CHECK(cpu->rflags & X86_FL_TF);
    cpu->gpr[X86_RAX] = DATA0;
    RUNS(0x8e, 0xd0);                                                   /* MOV SS puts the trap off */
    o = INSN(0x90);
    CHECK_EQ(o.vector, X86_DB);
    set_gate(0x40, CODE0, 0x5000, 0x8e);
    RUNS(0xcd, 0x40);                                                   /* INT n swallows it */
    CHECK_EQ(cpu->rip, 0x5000);
    RUNS(0xcf); /* IRET loads TF = 1: the next instruction traps */
    o = INSN(0x90);
    CHECK_EQ(o.vector, X86_DB);
}

/* MOV SS holds a data breakpoint back until after the next instruction: ICEBP's own #DB swallows it, INT n's handler
 * meets it at its first instruction. */
TEST(pending_breakpoint_after_mov_ss)
{
    for (unsigned is_icebp = 0; is_icebp < 2; is_icebp++) {
        protected_mode(0);
        set_gate(X86_DB, CODE0, 0x3000, 0x8e);
        set_gate(X86_BP, CODE0, 0x5000, 0x8e);
        break_on(1, 0x7000, 3, 3);
        put16(0x7000, DATA0);
        cpu->gpr[X86_RBX] = 0x7000;
        RUNS(0x8e, 0x13);                                               /* mov ss, [ebx] */
        outcome o = is_icebp ? INSN(0xf1) : INSN(0xcc);
        if (is_icebp) {
            CHECK_EQ(o.vector, RAN);
            CHECK_EQ(cpu->rip, 0x3000);
        } else {
            CHECK_EQ(o.vector, X86_DB);
            CHECK_EQ(o.dr6, 2);
            CHECK_EQ(cpu->rip, 0x5000);
        }
    }
}

TEST(hlt_under_single_step)
{
    protected_mode(0);
    cpu->rflags |= X86_FL_TF;
    x86_mode_changed(cpu);
    outcome o = INSN(0xf4);
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(cpu->rip, 0x100001);
    CHECK(!cpu->halted);
}

TEST(icebp)
{
    protected_mode(3);
    set_gate(X86_DB, CODE0, 0x3000, 0x8e);                              /* INT1 ignores the gate's DPL */
    RUNS(0xf1);
    CHECK_EQ(cpu->rip, 0x3000);
    CHECK_EQ(cpu->cpl, 0);
    protected_mode(3);
    set_gate(X86_BP, CODE0, 0x3000, 0x8e);
    RAISES(X86_GP, X86_BP * 8 + 2, 0xcc);
    set_gate(X86_BP, CODE0, 0x3000, 0xee);
    RUNS(0xcc);
    CHECK_EQ(cpu->rip, 0x3000);
    CHECK_EQ(get32(cpu->gpr[X86_RSP]), 0x100001);
    protected_mode(3);
    set_gate(X86_OF, CODE0, 0x3000, 0xee);
    RUNS(0xce);
    CHECK_EQ(cpu->rip, 0x100001);
    cpu->rflags |= X86_FL_OF;
    RUNS(0xce);
    CHECK_EQ(cpu->rip, 0x3000);
}

TEST(syscall_looks_at_the_new_tf)
{
    bare_new(3);
    cpu->star = UINT64_C(0x0013000800000000);
    cpu->lstar = 0x4000;
    cpu->sfmask = X86_FL_TF;
    cpu->rflags |= X86_FL_TF;
    cpu->rip = 0x1000;
    x86_mode_changed(cpu);
    RUNS(0x0f, 0x05);
    CHECK_EQ(cpu->rip, 0x4000);
    outcome o = INSN(0x48, 0x0f, 0x07); /* R11 has TF: as if SYSCALL had just completed */
    CHECK_EQ(o.vector, X86_DB);
    CHECK_EQ(o.dr6, 0x4000);
    CHECK_EQ(cpu->rip, 0x1002);
    CHECK_EQ(cpu->cpl, 3);
}

/* ---- MSRs ---- */

TEST(msr_rules)
{
    static const struct { uint32_t msr; uint64_t v; bool is_ok;
    } cases[] = {
        {0xc0000080, X86_EFER_SCE | X86_EFER_NXE, true},
        {0xc0000080, 1u << 12, false},
        {0xc0000080, 1u << 1, false},
        {0xc0000082, UINT64_C(0x800000000000), false},
        {0xc0000082, UINT64_C(0xffff800000000000), true},
        {0xc0000084, UINT64_C(0x100000000), false},
        {0xc0000100, UINT64_C(0x800000000000), false},
        {0xc0000102, UINT64_C(0xffff888000000000), true},
        {0xc0000103, UINT64_C(0x100000000), false},
        {0x277, UINT64_C(0x0007010600070106), true},
        {0x277, 2, false},
        {0x277, 8, false},
        {0x2ff, 0xc06, true},
        {0x2ff, 0x002, false},
        {0x2ff, 0x1000, false},
        {0x200, 0x80000006, true},
        {0x200, 0x2, false},
        {0x200, UINT64_C(1) << 46, false},
        {0x201, UINT64_C(0x3fff80000800), true},
        {0x201, 0x400, false},
        {0x250, UINT64_C(0x0606060606060606), true},
        {0x250, 2, false},
        {0x268, UINT64_C(0x0505050505050505), true},
        {0xfe, 0, false},
        {0x179, 0, false},
        {0x17b, ~UINT64_C(0), true},
        {0x17b, 1, false},
        {0x401, 1, false},
        {0x401, 0, true},
        {0x400, ~UINT64_C(0), true},
        {0x400, UINT64_C(0xaaaaaaaaaaaaaaaa), false},
        {0x402, UINT64_C(0xaaaaaaaaaaaaaaaa), true},
        {0x175, UINT64_C(0x800000000000), false},
        {0x3b, 5, true},
        {0x12345, 0, false},
        {0x48, 0, false},
        {0xc0010015, 0x01000010, true},
        {0x8b, 0, true},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        protected_mode(0);
        set_msr(cases[i].msr, cases[i].v);
        outcome o = INSN(WRMSR);
        if ((o.vector == RAN) != cases[i].is_ok || (o.vector != RAN && o.vector != X86_GP))
            FAIL("wrmsr %#x <- %#" PRIx64 ": vector %d", cases[i].msr, cases[i].v, o.vector);
    }
    protected_mode(0);
    set_msr(0x10, 5000);
    RUNS(WRMSR);
    CHECK_EQ(cpu->tsc_adjust, 4000);                                    /* the environment's clock says 1000 */
    RUNS(0x0f, 0x31);
    CHECK_EQ(cpu->gpr[X86_RAX], 5000);
    cpu->gpr[X86_RCX] = 0xfe;
    RUNS(RDMSR);
    CHECK_EQ(cpu->gpr[X86_RAX], 0x508);
    cpu->gpr[X86_RCX] = 0xbadbad;
    RAISES(X86_GP, 0, RDMSR);
    bare_new(3);
    set_msr(0xc0000101, UINT64_C(0xffff888012345678));
    RUNS(WRMSR);
    set_msr(0xc0000102, 0x1000);
    RUNS(WRMSR);
    RUNS(0x0f, 0x01, 0xf8);                                             /* swapgs */
    CHECK_EQ(cpu->seg[X86_GS].base, 0x1000);
    CHECK_EQ(cpu->kernel_gs_base, UINT64_C(0xffff888012345678));
}

TEST(fs_gs_base_instructions)
{
    bare_new(3);
    cpu->gpr[X86_RAX] = 0x123456789abc;
    RAISES(X86_UD, 0, 0xf3, 0x48, 0x0f, 0xae, 0xd0);                    /* wrfsbase rax without CR4.FSGSBASE */
    cpu->cr4 |= X86_CR4_FSGSBASE;
    RUNS(0xf3, 0x48, 0x0f, 0xae, 0xd0);
    CHECK_EQ(cpu->seg[X86_FS].base, 0x123456789abc);
    RUNS(0xf3, 0x0f, 0xae, 0xd8);                                       /* wrgsbase eax */
    CHECK_EQ(cpu->seg[X86_GS].base, 0x56789abc);
    RUNS(0xf3, 0x48, 0x0f, 0xae, 0xc1);
    CHECK_EQ(cpu->gpr[X86_RCX], 0x123456789abc);
    cpu->gpr[X86_RAX] = UINT64_C(0x800000000000);
    RAISES(X86_GP, 0, 0xf3, 0x48, 0x0f, 0xae, 0xd0);
}

TEST(timestamp_and_counters)
{
    protected_mode(3);
    RUNS(0x0f, 0x31);
    cpu->tsc_aux = 7;
    RUNS(0x0f, 0x01, 0xf9);
    CHECK_EQ(cpu->gpr[X86_RCX], 7);
    cpu->cr4 |= X86_CR4_TSD;
    RAISES(X86_GP, 0, 0x0f, 0x31);
    RAISES(X86_GP, 0, 0x0f, 0x01, 0xf9);
    RAISES(X86_GP, 0, 0x0f, 0x33);
    cpu->cr4 |= X86_CR4_PCE;
    cpu->gpr[X86_RCX] = 0;
    RUNS(0x0f, 0x33);
    cpu->gpr[X86_RCX] = 99;
    RAISES(X86_GP, 0, 0x0f, 0x33);
}

TEST(xcr0)
{
    bare_new(3);
    CHECK_EQ(cpu->xcr0, x86_xcr0_allowed(cpu));
    cpu->gpr[X86_RCX] = 0;
    RUNS(0x0f, 0x01, 0xd0);
    CHECK_EQ(cpu->gpr[X86_RAX], cpu->xcr0);
    static const struct {
        uint32_t v;
        bool is_ok;
    } cases[] = {{1, true}, {3, true}, {0, false}, {2, false}, {5, false}, {0xb, false}, {0xe7, false}};
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cpu->gpr[X86_RAX] = cases[i].v;
        cpu->gpr[X86_RDX] = 0;
        outcome o = INSN(0x0f, 0x01, 0xd1);
        CHECK_EQ(o.vector, cases[i].is_ok ? RAN : X86_GP);
    }
    cpu->gpr[X86_RCX] = 1;
    cpu->gpr[X86_RAX] = 1;
    RAISES(X86_GP, 0, 0x0f, 0x01, 0xd1);
    cpu->cr4 &= ~(uint64_t)X86_CR4_OSXSAVE;
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xd0);
    RAISES(X86_UD, 0, 0x0f, 0x01, 0xd1);
}

TEST(random_numbers)
{
    bare_new(3);
    cpu->rflags |= X86_FL_ARITH & ~(uint64_t)X86_FL_CF;
    RUNS(0x48, 0x0f, 0xc7, 0xf0);
    CHECK_EQ(cpu->gpr[X86_RAX], UINT64_C(0x1122334455667788));
    CHECK_EQ(cpu->rflags & X86_FL_ARITH, X86_FL_CF);
    cpu->gpr[X86_RCX] = UINT64_C(0xffffffffffffffff);
    RUNS(0x66, 0x0f, 0xc7, 0xf9);
    CHECK_EQ(cpu->gpr[X86_RCX], UINT64_C(0xffffffffffff7788));
}

/* ---- CPUID ---- */

static void leaf(uint32_t eax, uint32_t ecx, uint32_t out[4])
{
    cpu->gpr[X86_RAX] = eax;
    cpu->gpr[X86_RCX] = ecx;
    RUNS(0x0f, 0xa2);
    out[0] = (uint32_t)cpu->gpr[X86_RAX], out[1] = (uint32_t)cpu->gpr[X86_RBX];
    out[2] = (uint32_t)cpu->gpr[X86_RCX], out[3] = (uint32_t)cpu->gpr[X86_RDX];
}

TEST(cpuid_is_consistent)
{
    uint32_t r[4];
    bare_new(3);
    leaf(0, 0, r);
    CHECK(r[0] >= 0xd);
    CHECK(r[1] == 0x68747541 && r[3] == 0x69746e65 && r[2] == 0x444d4163);      /* AuthenticAMD */
    leaf(1, 0, r);
    CHECK_EQ(r[2] >> 27 & 1, 1);                                        /* OSXSAVE follows CR4 */
    CHECK_EQ(r[2] >> 31, 1);
    uint32_t avx = r[2] >> 28 & 1, edx = r[3];
    cpu->cr4 &= ~(uint64_t)X86_CR4_OSXSAVE;
    leaf(1, 0, r);
    CHECK_EQ(r[2] >> 27 & 1, 0);
    leaf(7, 0, r);
    CHECK(avx || !(r[1] & 1u << 5));                                    /* no AVX2 without AVX */
    CHECK(!(r[1] & 1u << 16));                                          /* no AVX-512 */
    leaf(7, 1, r);
    CHECK_EQ(r[0] | r[1] | r[2] | r[3], 0);
    leaf(0xd, 0, r);
    CHECK_EQ(r[0], avx ? 7 : 3);
    CHECK_EQ(r[2], avx ? 832 : 576);
    cpu->xcr0 = 3;
    leaf(0xd, 0, r);
    CHECK_EQ(r[1], 576);
    if (avx) {
        leaf(0xd, 2, r);
        CHECK_EQ(r[0], 256);
        CHECK_EQ(r[1], 576);
    }
    leaf(0x80000000, 0, r);
    CHECK(r[0] >= 0x80000021);
    leaf(0x80000001, 0, r);
    CHECK_EQ(r[3] & 0x0183f3ff, edx & 0x0183f3ff);                      /* the AMD copy */
    CHECK(r[3] & 1u << 29);
    leaf(0x80000008, 0, r);
    CHECK_EQ(UINT64_C(1) << (r[0] & 0xff), cpu->phys_mask + 1);
    CHECK_EQ(r[0] >> 8 & 0xff, 48);
    leaf(0x40000000, 0, r);
    CHECK(r[0] >= 0x40000010);
    leaf(0x40000010, 0, r);
    CHECK_EQ(r[0], 1000000);
    leaf(0x12345678, 0, r);
    CHECK_EQ(r[0] | r[1] | r[2] | r[3], 0);
}

/* A feature that CPUID hides cannot be switched on. */
TEST(models)
{
    static const struct { const char *name; uint64_t cr4_refused; bool has_long; } cases[] = {
        { "base", X86_CR4_SMEP | X86_CR4_OSXSAVE, true }, { "pentium3", X86_CR4_SMEP, false },
        { "pentium", X86_CR4_PAE, false }, { "486", X86_CR4_TSD, false } };
    CHECK(x86_model_find("nonesuch") == NULL);
    CHECK(x86_model_find(NULL) == x86_model_find("max"));
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bare_new(0);
        cpu->model = x86_model_find(cases[i].name);
        CHECK(cpu->model);
        x86_cpu_set_mode(cpu, 2);
        cpu->gpr[X86_RAX] = cases[i].cr4_refused & -cases[i].cr4_refused;
        RAISES(X86_GP, 0, MOV_CR4_EAX);
        set_msr(0xc0000080, X86_EFER_LME);
        outcome o = INSN(WRMSR);
        CHECK_EQ(o.vector, cases[i].has_long ? RAN : X86_GP);
    }
}

/* ---- reset (SDM vol. 3, table 9-1) ---- */

TEST(reset_values)
{
    bare_new(0);
    CHECK_EQ(cpu->rip, 0xfff0);
    CHECK_EQ(cpu->seg[X86_CS].sel, 0xf000);
    CHECK_EQ(cpu->seg[X86_CS].base, 0xffff0000);
    CHECK_EQ(cpu->seg[X86_CS].limit, 0xffff);
    CHECK_EQ(cpu->cr0, 0x60000010);
    CHECK_EQ(cpu->rflags, 2);
    CHECK_EQ(cpu->dr[6], 0xffff0ff0);
    CHECK_EQ(cpu->dr[7], 0x400);
    CHECK_EQ(cpu->idtr.limit, 0xffff);
    CHECK_EQ(cpu->gpr[X86_RDX], x86_model_signature(cpu->model));
    CHECK_EQ(cpu->xcr0, 1);
    CHECK_EQ(X86_FPU_FCW(cpu), 0x40);
    CHECK_EQ(X86_FPU_MXCSR(cpu), 0x1f80);
    cpu->cr0 = 0x11;
    cpu->lstar = 0x1234;
    X86_FPU_MXCSR(cpu) = 0x1f00;
    x86_cpu_reset(cpu, true);                                           /* INIT keeps MSRs, FPU and the cache bits */
    CHECK_EQ(cpu->cr0, 0x10);
    CHECK_EQ(cpu->lstar, 0x1234);
    CHECK_EQ(X86_FPU_MXCSR(cpu), 0x1f00);
    CHECK_EQ(cpu->rip, 0xfff0);
}

TEST(starting_modes)
{
    bare_new(1);
    CHECK(x86_is_real(cpu));
    CHECK_EQ(cpu->code_size, 2);
    RUNS(0x90);
    bare_new(2);
    CHECK_EQ(cpu->code_size, 4);
    CHECK_EQ(cpu->stack_size, 4);
    bare_new(3);
    CHECK_EQ(cpu->code_size, 8);
    CHECK(cpu->flat);
    put32(0x123000, 0xdeadbeef);
    cpu->gpr[X86_RBX] = 0x123000;
    RUNS(0x8b, 0x03);
    CHECK_EQ(cpu->gpr[X86_RAX], 0xdeadbeef);
    cpu->gpr[X86_RAX] = 0;
    RUNS(MOV_CR3_EAX);
    CHECK(!cpu->flat);
    RAISES(X86_PF, 0, 0x8b, 0x03);
}
