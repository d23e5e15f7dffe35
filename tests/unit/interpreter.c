/* interpreter.c - the interpreter's own promises: self-modifying code, budgets, until, page crossing, replayed I/O, near branches. */
#include "test.h"
#include "x86_bare.h"

#define AT 0x1000u
#define CODE(b, text) bare_code(b, AT, text, sizeof(text) - 1)

static bare *start(void)
{
    bare *b = bare_new(VM_MODE_FLAT64);
    b->cpu->rip = AT;
    b->cpu->gpr[X86_RSP] = 0x8000;
    return b;
}

/* The store changes the immediate of the instruction right behind it, in the same block, already decoded. */
TEST(store_into_the_next_instruction)
{
    bare *b = start();
    CODE(b, "\xc6\x05\x01\x00\x00\x00\x07"       /* mov byte [rip + 1], 7 */
            "\xb0\x01"                           /* mov al, 1 */
            "\xf4");
    CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);    /* decodes the whole block */
    b->cpu->rip = AT;
    b->ram[AT + 8] = 1;
    interp_code_changed_cpu(b->cpu, AT + 8, 1);
    CHECK_EQ(bare_run(b, 100), X86_STOP_HALT);
    CHECK_EQ(b->cpu->gpr[X86_RAX], 7);
    bare_free(b);
}

/* An instruction across a page end is looked at again each time: change its second half, then its first. */
TEST(crossing_instruction_changes)
{
    bare *b = start();
    const uint64_t at = 0x1ffe;
    const uint8_t code[] = { 0xb8, 0x11, 0x22, 0x33, 0x44, 0xf4 };       /* mov eax, 0x44332211; hlt */
    bare_code(b, at, code, sizeof code);
    for (unsigned i = 0; i < 3; i++) {
        b->cpu->rip = at;
        CHECK_EQ(bare_run(b, 100), X86_STOP_HALT);
        CHECK_EQ(b->cpu->gpr[X86_RAX], i == 0 ? 0x44332211 : i == 1 ? 0x44335511 : 0x44335566);
        b->ram[i ? at + 1 : at + 2] = i ? 0x66 : 0x55;       /* nobody is told */
    }
    bare_free(b);
}

TEST(budget_is_exact)
{
    bare *b = start();
    CODE(b, "\x48\xff\xc0\x48\xff\xc0\x48\xff\xc0\xeb\xf5");             /* inc rax (3 times); jmp back */
    for (unsigned i = 1; i < 40; i++) {
        uint64_t before = b->cpu->retired, rax = b->cpu->gpr[X86_RAX];
        CHECK_EQ(bare_run(b, i), X86_STOP_SLICE);
        CHECK_EQ(b->cpu->retired - before, i);
        CHECK(b->cpu->gpr[X86_RAX] - rax <= i && b->cpu->gpr[X86_RAX] - rax + 1 >= i * 3 / 4);
        CHECK_EQ(b->cpu->budget, 0);
    }
    bare_free(b);
}

TEST(until_stops_inside_a_block)
{
    bare *b = start();
    CODE(b, "\x90\x90\x90\x90\xf4");
    b->cpu->has_until = true;
    b->cpu->until = AT + 2;
    CHECK_EQ(bare_run(b, 100), X86_STOP_UNTIL);
    CHECK_EQ(b->cpu->rip, AT + 2);
    CHECK_EQ(b->cpu->retired, 2);
    CHECK_EQ(bare_run(b, 100), X86_STOP_HALT);               /* starting there does not stop there */
    CHECK_EQ(b->cpu->retired, 5);
    bare_free(b);
}

/* A repeated instruction retires once, however many visits it takes. */
TEST(rep_retires_once)
{
    bare *b = start();
    CODE(b, "\xf3\xac\xf4");                                 /* rep lodsb: no bulk form, so many visits */
    b->cpu->gpr[X86_RCX] = 100000;
    b->cpu->gpr[X86_RSI] = 0x10000;
    CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);
    CHECK_EQ(b->cpu->retired, 1);
    CHECK_EQ(b->cpu->gpr[X86_RCX], 0);
    CHECK_EQ(b->cpu->gpr[X86_RSI], 0x10000 + 100000);
    bare_free(b);
}

TEST(attention_interrupts_rep)
{
    bare *b = start();
    CODE(b, "\xf3\xac\xf4");
    b->cpu->gpr[X86_RCX] = 1 << 20;
    b->cpu->gpr[X86_RSI] = 0x10000;
    b->cpu->attention = X86_ATT_KICK;
    CHECK_EQ(bare_run(b, 10), X86_STOP_ATTENTION);
    CHECK_EQ(b->cpu->retired, 0);
    CHECK_EQ(b->cpu->rip, AT);
    bare_free(b);
}

/* push [mmio]: the read leaves; with its answer in the log the instruction runs again and does not read again. */
TEST(io_answers_come_from_the_log)
{
    bare *b = start();
    CODE(b, "\xff\x34\x25\x00\x00\x80\x00\xf4");             /* push qword [0x800000] */
    b->exits = true;
    CHECK_EQ(bare_run(b, 10), X86_STOP_IO);
    CHECK_EQ(b->cpu->rip, AT);
    CHECK_EQ(b->cpu->gpr[X86_RSP], 0x8000);
    CHECK_EQ(b->cpu->io.gpa, 0x800000);
    CHECK_EQ(b->cpu->io.width, 8);
    b->cpu->io.data = UINT64_C(0x1122334455667788);
    b->cpu->io.done = true;
    b->cpu->io_log[b->cpu->io_count++] = b->cpu->io;
    CHECK_EQ(bare_run(b, 10), X86_STOP_HALT);
    CHECK_EQ(b->cpu->gpr[X86_RSP], 0x7ff8);
    CHECK_EQ(*(uint64_t *)(void *)(b->ram + 0x7ff8), UINT64_C(0x1122334455667788));
    CHECK_EQ(b->log_count, 0);
    CHECK_EQ(b->cpu->retired, 2);
    bare_free(b);
}

/* add [mmio], eax: read and write of one instruction, each leaving once. */
TEST(read_modify_write_of_mmio_leaves_twice)
{
    bare *b = start();
    CODE(b, "\x01\x04\x25\x00\x00\x80\x00\xf4");
    b->exits = true;
    b->cpu->gpr[X86_RAX] = 5;
    for (unsigned i = 0; i < 2; i++) {
        CHECK_EQ(bare_run(b, 10), X86_STOP_IO);
        CHECK_EQ(b->cpu->io.is_write, i);
        if (i)
            CHECK_EQ(b->cpu->io.data, 12);
        b->cpu->io.data = i ? b->cpu->io.data : 7;
        b->cpu->io.done = true;
        b->cpu->io_log[b->cpu->io_count++] = b->cpu->io;
    }
    CHECK_EQ(bare_run(b, 10), X86_STOP_HALT);
    bare_free(b);
}

/* 66h with near branches in 64-bit mode truncates RIP (APM vol. 3, 1.2.4), REX.W beats it: as on AMD silicon. */
TEST(operand_size_prefix_of_near_branches)
{
    static const struct { const char *bytes; unsigned n; uint64_t rip; } cases[] = {
        { "\xeb\x10", 2, 0x210112 }, { "\x66\xeb\x10", 3, 0x113 }, { "\x66\x74\x10", 3, 0x113 }, { "\x66\xe8\x10\x00", 4, 0x114 },
        { "\x66\xe9\x10\x00", 4, 0x114 }, { "\x66\xff\xe0", 3, 0x300 }, { "\x66\xff\xd0", 3, 0x300 }, { "\x66\xe2\x10", 3, 0x113 },
        { "\x66\x0f\x84\x10\x00", 5, 0x115 }, { "\x66\x48\xeb\x10", 4, 0x210114 }, { "\x66\x48\x0f\x84\x10\x00\x00\x00", 8, 0x210118 },
        { "\x66\xc3", 2, 0x300 }, { "\x66\x48\xc3", 3, 0x210300 }, { "\x48\xc3", 2, 0x210300 } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bare *b = start();
        bare_code(b, 0x210100, cases[i].bytes, cases[i].n);
        b->cpu->rip = 0x210100;
        b->cpu->gpr[X86_RAX] = 0x210300;
        b->cpu->gpr[X86_RCX] = 5;
        b->cpu->rflags |= X86_FL_ZF;
        *(uint64_t *)(void *)(b->ram + 0x8000) = 0x210300;
        CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);
        if (b->cpu->rip != cases[i].rip)
            FAIL("case %zu: rip %#" PRIx64 ", not %#" PRIx64, i, b->cpu->rip, cases[i].rip);
        bare_free(b);
    }
}

/* Instructions that reach beyond CS's limit fault, the ones before them in the same block do not. */
TEST(cs_limit_inside_a_block)
{
    bare *b = bare_new(VM_MODE_REAL);
    b->cpu->exception_exits = 1u << X86_GP;
    bare_code(b, 0xfffd, "\x40\x40\xb8\x34\x12", 5);         /* inc ax; inc ax; mov ax, 1234h across the limit */
    b->cpu->rip = 0xfffd;
    CHECK_EQ(bare_run(b, 100), X86_STOP_EXCEPTION);
    CHECK_EQ(b->cpu->rip, 0xffff);
    CHECK_EQ(b->cpu->gpr[X86_RAX], 2);
    CHECK_EQ(b->cpu->retired, 2);
    bare_free(b);
}

TEST(alignment_check)
{
    for (unsigned armed = 0; armed < 2; armed++) {
        bare *b = start();
        CODE(b, "\x8b\x04\x25\x01\x20\x00\x00\xf4");         /* mov eax, [0x2001] */
        b->cpu->exception_exits = ~UINT64_C(0);
        b->cpu->cr0 |= X86_CR0_AM;
        b->cpu->rflags |= armed ? X86_FL_AC : 0;
        b->cpu->seg[X86_SS].attr |= 0x60;
        b->cpu->seg[X86_CS].attr |= 0x60;
        x86_mode_changed(b->cpu);
        CHECK_EQ(b->cpu->cpl, 3);
        CHECK_EQ(bare_run(b, 100), X86_STOP_EXCEPTION);      /* HLT in user mode otherwise */
        CHECK_EQ(b->cpu->fault.vector, armed ? X86_AC : X86_GP);
        bare_free(b);
    }
}

/* Fifteen bytes are an instruction, sixteen are #GP. */
TEST(instruction_length_limit)
{
    for (unsigned n = 14; n <= 15; n++) {
        bare *b = start();
        uint8_t code[20];
        memset(code, 0x2e, sizeof code);
        code[n] = 0x90;
        bare_code(b, 0x1ff8, code, sizeof code);             /* across a page end, too */
        b->cpu->rip = 0x1ff8;
        b->cpu->exception_exits = ~UINT64_C(0);
        CHECK_EQ(bare_run(b, 1), n == 14 ? X86_STOP_SLICE : X86_STOP_EXCEPTION);
        if (n == 15)
            CHECK_EQ(b->cpu->fault.vector, X86_GP);
        bare_free(b);
    }
}

/* STI's shadow covers exactly one instruction. */
TEST(sti_shadow)
{
    bare *b = start();
    CODE(b, "\xfb\x90\x90\xf4");
    CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);
    CHECK_EQ(b->cpu->inhibit, 1);
    CHECK(!x86_can_interrupt(b->cpu));
    CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);
    CHECK(x86_can_interrupt(b->cpu));
    bare_free(b);
}

/* Models without an instruction: #UD, or for F3 0F BC and BD what older CPUs make of them. */
TEST(instructions_of_the_model)
{
    static const struct { const char *model, *bytes; unsigned n; bool is_legal; } cases[] = {
        { "max", "\xf3\x0f\xb8\xc1", 4, true }, { "base", "\xf3\x0f\xb8\xc1", 4, false },          /* popcnt */
        { "max", "\xc4\xe2\x70\xf2\xc1", 5, true }, { "base", "\xc4\xe2\x70\xf2\xc1", 5, false },  /* andn */
        { "base", "\x0f\x44\xc1", 3, true }, { "pentium", "\x0f\x44\xc1", 3, false },              /* cmovz */
        { "pentium", "\x0f\x1f\x00", 3, false }, { "pentium", "\x90", 1, true } };                 /* long nop, nop */
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bare *b = bare_new(VM_MODE_FLAT32);
        b->cpu->model = x86_model_find(cases[i].model);
        b->cpu->exception_exits = ~UINT64_C(0);
        b->cpu->rip = AT;
        bare_code(b, AT, cases[i].bytes, cases[i].n);
        if ((bare_run(b, 1) == X86_STOP_SLICE) != cases[i].is_legal)
            FAIL("case %zu", i);
        if (!cases[i].is_legal)
            CHECK_EQ(b->cpu->fault.vector, X86_UD);
        bare_free(b);
    }
    for (unsigned has_tzcnt = 0; has_tzcnt < 2; has_tzcnt++) {
        bare *b = bare_new(VM_MODE_FLAT32);
        b->cpu->model = x86_model_find(has_tzcnt ? "max" : "base");
        b->cpu->rip = AT;
        b->cpu->gpr[X86_RAX] = 77;
        bare_code(b, AT, "\xf3\x0f\xbc\xc1", 4);             /* tzcnt eax, ecx; ecx = 0 */
        CHECK_EQ(bare_run(b, 1), X86_STOP_SLICE);
        CHECK_EQ(b->cpu->gpr[X86_RAX], has_tzcnt ? 32 : 77);
        CHECK_EQ(!!(b->cpu->rflags & X86_FL_ZF), !has_tzcnt);
        bare_free(b);
    }
}

/* The instruction with the most accesses: each leaves once, then it is done. */
TEST(xsave_to_mmio)
{
    bare *b = start();
    CODE(b, "\x0f\xae\x24\x25\x00\x00\x80\x00\xf4");         /* xsave [0x800000] */
    b->exits = true;
    b->cpu->cr4 |= X86_CR4_OSXSAVE | X86_CR4_OSFXSR;
    b->cpu->xcr0 = 7;
    b->cpu->gpr[X86_RAX] = 7;
    unsigned exits = 0;
    x86_stop stop;
    while ((stop = bare_run(b, 10)) == X86_STOP_IO && exits++ < 200) {
        b->cpu->io.data = b->cpu->io.is_write ? b->cpu->io.data : 0;
        b->cpu->io.done = true;
        if (b->cpu->io_count < X86_IO_LOG)
            b->cpu->io_log[b->cpu->io_count++] = b->cpu->io;
    }
    CHECK_EQ(stop, X86_STOP_HALT);
    CHECK(exits > 60 && exits <= X86_IO_LOG);
    bare_free(b);
}
