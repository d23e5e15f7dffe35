/* scenes.c - what takes more than one snippet: code that changes itself, code reached through two addresses, instructions across
 * pages, page tables edited under running code, and the accessed and dirty bits that walks leave behind. On every backend. */
#include "world.h"
#include "../backends.h"


static const world_env *env(unsigned bit)
{
    for (unsigned i = 0; i < WORLD_ENVS; i++)
        if (world_envs[i].bit == bit)
            return &world_envs[i];
    return NULL;
}

static void code(world *w, uint64_t gpa, const char *bytes, size_t count) { world_poke(w, gpa, bytes, count); }
#define CODE_AT(gpa, bytes) code(&w, gpa, bytes, sizeof bytes - 1)

static vm_exit go(world *w, uint64_t rip)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    world_set(w, VM_REG_RIP, rip);
    o.deadline_ns = TEST_SECONDS(5);
    o.exception_exits = 0xffffffff;
    OK(vm_vcpu_run(w->cpu, &o, &e));
    return e;
}

/* The code's answer is the same each time: read, translated and by chained blocks. */
static void ten_times(world *w, uint64_t rax)
{
    for (unsigned i = 0; i < 10; i++) {
        CHECK_EQ(go(w, W_CODE).reason, VM_EXIT_HALT);
        CHECK_EQ(world_get(w, VM_REG_RAX), rax);
    }
}

/* Each of these runs several times, so that it meets translated code too. */
EACH_BACKEND(code_changes_the_next_instruction)
{
    world w;
    world_open(&w, backend, env(ENV_K64));
    /* mov byte [rip+1 -> imm of the next], cl ; mov eax, imm32 ; hlt */
    CODE_AT(W_CODE, "\x88\x0d\x01\x00\x00\x00" "\xb8\x11\x00\x00\x00" "\xf4");
    for (unsigned i = 1; i < 20; i++) {
        world_set(&w, VM_REG_RCX, i);
        CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
        CHECK_EQ(world_get(&w, VM_REG_RAX), i);
    }
    world_close(&w);
}

EACH_BACKEND(loop_rewrites_its_own_body)
{
    world w;
    world_open(&w, backend, env(ENV_K64));
    /* mov ecx, 100; xor edx, edx; 7: mov eax, imm(0); add edx, eax; inc byte [7 + 1]; dec ecx; jnz 7; hlt */
    CODE_AT(W_CODE, "\xb9\x64\x00\x00\x00" "\x31\xd2" "\xb8\x00\x00\x00\x00" "\x01\xc2" "\xfe\x05\xf4\xff\xff\xff"
                    "\xff\xc9" "\x75\xef" "\xf4");
    CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
    CHECK_EQ(world_get(&w, VM_REG_RDX), 99 * 100 / 2);      /* 0 + 1 + ... + 99 */
    world_close(&w);
}

EACH_BACKEND(code_written_through_an_alias)
{
    world w;
    uint64_t pte = W_CODE | 7;
    world_open(&w, backend, env(ENV_K64));
    world_poke(&w, W_PT + (W_DATA >> 12) * 8, &pte, 8);     /* W_DATA shows the code page as well */
    CODE_AT(W_CODE, "\x88\x0c\x25\x08\x90\x00\x00" "\xb8\x11\x00\x00\x00" "\xf4");  /* mov [0x9008], cl; mov eax, imm; hlt */
    for (unsigned i = 1; i < 20; i++) {
        world_set(&w, VM_REG_RCX, i);
        CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
        CHECK_EQ(world_get(&w, VM_REG_RAX), i);
    }
    world_close(&w);
}

EACH_BACKEND(string_store_over_code_ahead)
{
    world w;
    world_open(&w, backend, env(ENV_K64));
    /* mov edi, W_CODE+0x40; mov ecx, 16; rep stosb (al = 0x90: nops over ud2s); jmp W_CODE+0x40 */
    CODE_AT(W_CODE, "\xbf\x40\x80\x00\x00" "\xb9\x10\x00\x00\x00" "\xf3\xaa" "\xeb\x32");
    for (unsigned i = 0; i < 10; i++) {
        CODE_AT(W_CODE + 0x40, "\x0f\x0b\x0f\x0b\x0f\x0b\x0f\x0b\x0f\x0b\x0f\x0b\x0f\x0b\x0f\x0b\xf4");
        world_set(&w, VM_REG_RAX, 0x90);
        vm_exit e = go(&w, W_CODE);
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        CHECK_EQ(e.rip, W_CODE + 0x51);
    }
    world_close(&w);
}

/* An instruction whose bytes lie on two pages; each half is changed in turn, by the host and by mapping another page there. */
EACH_BACKEND(instruction_across_two_pages)
{
    world w;
    uint64_t other = 0x7000 | 7, usual = W_DATA | 7;
    world_open(&w, backend, env(ENV_K64));
    CODE_AT(W_CODE, "\x0f\x20\xd8\x0f\x22\xd8\xe9\xf2\x0f\x00\x00");     /* mov rax, cr3; mov cr3, rax; jmp W_DATA - 3 */
    CODE_AT(W_DATA - 3, "\xb8\x44\x33\x22\x11\xf4");        /* mov eax, 0x11223344; hlt */
    CODE_AT(0x7000, "\x77\x66\xf4");                        /* another second half */
    for (unsigned i = 0; i < 5; i++) {
        world_poke(&w, W_PT + (W_DATA >> 12) * 8, &usual, 8);
        CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
        CHECK_EQ(world_get(&w, VM_REG_RAX), 0x11223344);
        world_poke(&w, W_PT + (W_DATA >> 12) * 8, &other, 8);
        CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
        CHECK_EQ(world_get(&w, VM_REG_RAX), 0x66773344);
    }
    other = 0;                                              /* absent: the fault is that of the second page */
    world_poke(&w, W_PT + (W_DATA >> 12) * 8, &other, 8);
    vm_exit e = go(&w, W_CODE);
    CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
    CHECK_EQ(e.exception.vector, 14);
    CHECK_EQ(e.exception.address, W_DATA);
    CHECK_EQ(e.rip, W_DATA - 3);
    world_close(&w);
}

/* The guest itself exchanges the page under a function it has called, with INVLPG as the manual asks. */
EACH_BACKEND(page_table_edit_under_code)
{
    world w;
    world_open(&w, backend, env(ENV_K64));
    CODE_AT(0xa000, "\xb8\x01\x00\x00\x00\xc3");            /* mov eax, 1; ret */
    CODE_AT(0x7000, "\xb8\x02\x00\x00\x00\xc3");            /* mov eax, 2; ret */
    world_set(&w, VM_REG_RBX, W_PT + 0xa * 8);
    /* mov ecx, 0xa000; call rcx; mov edx, eax; mov qword [rbx], 0x7007; invlpg [rcx]; call rcx; shl edx, 8; or eax, edx;
     * mov qword [rbx], 0xa007; invlpg [rcx]; hlt */
    CODE_AT(W_CODE, "\xb9\x00\xa0\x00\x00" "\xff\xd1" "\x89\xc2" "\x48\xc7\x03\x07\x70\x00\x00" "\x0f\x01\x39" "\xff\xd1"
                    "\xc1\xe2\x08" "\x09\xd0" "\x48\xc7\x03\x07\xa0\x00\x00" "\x0f\x01\x39" "\xf4");
    ten_times(&w, 0x102);
    world_close(&w);
}

/* The same with an instruction's second half, and with a large page: INVLPG of any address in it ends all of it. */
EACH_BACKEND(page_table_edit_under_half_an_instruction)
{
    world w;
    world_open(&w, backend, env(ENV_K64));
    CODE_AT(W_DATA - 3, "\xb8\x01\x00\x00\x00\xc3");      /* mov eax, 1; ret */
    CODE_AT(0x7000, "\x02\x00\xc3");                       /* mov eax, 0x20001; ret */
    world_set(&w, VM_REG_RBX, W_PT + (W_DATA >> 12) * 8);
    /* mov ecx, W_DATA - 3; call rcx; mov edx, eax; mov qword [rbx], 0x7007; invlpg [rcx + 3]; call rcx; add eax, edx;
     * mov qword [rbx], W_DATA | 7; invlpg [rcx + 3]; hlt */
    CODE_AT(W_CODE, "\xb9\xfd\x8f\x00\x00" "\xff\xd1" "\x89\xc2" "\x48\xc7\x03\x07\x70\x00\x00" "\x0f\x01\x79\x03" "\xff\xd1"
                    "\x01\xd0" "\x48\xc7\x03\x07\x90\x00\x00" "\x0f\x01\x79\x03" "\xf4");
    ten_times(&w, 0x20002);
    world_close(&w);
}

EACH_BACKEND(large_page_ends_under_code)
{
    world w;
    uint64_t large = 0x87;
    world_open(&w, backend, env(ENV_K64));
    CODE_AT(0xa000, "\xb8\x01\x00\x00\x00\xc3");
    CODE_AT(0x7000, "\xb8\x02\x00\x00\x00\xc3");
    world_set(&w, VM_REG_RBX, W_PD + 8);
    world_set(&w, VM_REG_RSI, W_PT);
    /* mov ecx, 0x20a000; call rcx; mov edx, eax; mov qword [rsi + 0x50], 0x7007; lea rax, [rsi + 7]; mov [rbx], rax;
     * invlpg [0x3ff000]; call rcx; shl edx, 8; or eax, edx; mov qword [rsi + 0x50], 0xa007; mov qword [rbx], 0x87;
     * invlpg [rcx]; hlt */
    CODE_AT(W_CODE, "\xb9\x00\xa0\x20\x00" "\xff\xd1" "\x89\xc2" "\x48\xc7\x46\x50\x07\x70\x00\x00" "\x48\x8d\x46\x07" "\x48\x89\x03"
                    "\x0f\x01\x3c\x25\x00\xf0\x3f\x00" "\xff\xd1" "\xc1\xe2\x08" "\x09\xd0"
                    "\x48\xc7\x46\x50\x07\xa0\x00\x00" "\x48\xc7\x03\x87\x00\x00\x00" "\x0f\x01\x39" "\xf4");
    world_poke(&w, W_PD + 8, &large, 8);
    ten_times(&w, 0x102);
    world_close(&w);
}

EACH_BACKEND(accessed_and_dirty_bits)
{
    world w;
    uint64_t clean = 0x7007;
    unsigned slot = W_PT + 7 * 8;
    world_open(&w, backend, env(ENV_K64));
    world_poke(&w, slot, &clean, 8);
    uint64_t gpa = 0;
    OK(vm_vcpu_translate(w.cpu, 0x7010, VM_PROT_W, &gpa));
    CHECK_EQ(world_peek(&w, slot, 8), 0x7007);              /* looking sets nothing */
    CODE_AT(W_CODE, "\x8b\x04\x25\x10\x70\x00\x00\xf4");    /* mov eax, [0x7010]; hlt */
    CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
    CHECK_EQ(world_peek(&w, slot, 8), 0x7027);              /* accessed */
    CODE_AT(W_CODE, "\x89\x04\x25\x10\x70\x00\x00\xf4");    /* mov [0x7010], eax; hlt */
    CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
    CHECK_EQ(world_peek(&w, slot, 8), 0x7067);              /* and dirty, though the translation was cached for reads */
    CHECK_EQ(world_peek(&w, W_PD, 8) & 0x20, 0x20);
    CHECK_EQ(world_peek(&w, W_PML4, 8) & 0x20, 0x20);
    world_close(&w);
}

/* A repeat that faults midway goes on from there once the page is there, and moves every byte once. */
EACH_BACKEND(repeat_goes_on_after_a_fault)
{
    world w;
    uint64_t absent = 0, present = 0xa000 | 7;
    world_open(&w, backend, env(ENV_K64));
    world_poke(&w, W_PT + 0xa * 8, &absent, 8);
    CODE_AT(W_CODE, "\xf3\xa4\xf4");                        /* rep movsb; hlt */
    for (unsigned i = 0; i < 0x20; i++)
        w.low[0x7000 + i] = (unsigned char)(i + 1);
    world_set(&w, VM_REG_RSI, 0x7000);
    world_set(&w, VM_REG_RDI, 0xa000 - 0x10);
    world_set(&w, VM_REG_RCX, 0x20);
    vm_exit e = go(&w, W_CODE);
    CHECK_EQ(e.reason, VM_EXIT_EXCEPTION);
    CHECK_EQ(e.exception.address, 0xa000);
    CHECK_EQ(world_get(&w, VM_REG_RCX), 0x10);
    world_poke(&w, W_PT + 0xa * 8, &present, 8);
    CHECK_EQ(go(&w, W_CODE).reason, VM_EXIT_HALT);
    CHECK_EQ(world_get(&w, VM_REG_RCX), 0);
    for (unsigned i = 0; i < 0x20; i++)
        CHECK_EQ(world_peek(&w, 0xa000 - 0x10 + i, 1), i + 1);
    world_close(&w);
}

EACH_BACKEND(double_and_triple_faults)
{
    world w;
    uint64_t none = 0, hardware = 1;
    if (backend == VM_BACKEND_KVM && vm_query(backend, "hardware-ring0", &hardware) == VM_OK && !hardware)
        test_skip("this host's KVM emulates ring 0 and takes a fault in the delivery of #UD for a double fault");
    world_open(&w, backend, env(ENV_K64));
    CODE_AT(W_CODE, "\x0f\x0b");
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.deadline_ns = TEST_SECONDS(2);
    world_poke(&w, W_IDT64 + 6 * 16, &none, 8);             /* #UD has no gate */
    world_set(&w, VM_REG_RIP, W_CODE);
    OK(vm_vcpu_run(w.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, W_HANDLERS + 13 * 16 + 1);              /* type 0 is no gate: #GP; IDT and EXT bits, SDM vol. 3, 6.13 */
    CHECK_EQ(world_peek(&w, world_get(&w, VM_REG_RSP), 8), 6 * 8 + 3);
    world_poke(&w, W_IDT64 + 13 * 16, &none, 8);            /* #GP while delivering #GP: #DF */
    world_set(&w, VM_REG_RIP, W_CODE);
    OK(vm_vcpu_run(w.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK_EQ(e.rip, W_HANDLERS + 8 * 16 + 1);
    CHECK_EQ(world_peek(&w, world_get(&w, VM_REG_RSP), 8), 0);
    world_poke(&w, W_IDT64 + 8 * 16, &none, 8);             /* and no #DF either */
    world_set(&w, VM_REG_RIP, W_CODE);
    OK(vm_vcpu_run(w.cpu, &o, &e));
    CHECK_EQ(e.reason, VM_EXIT_SHUTDOWN);
    world_close(&w);
}
