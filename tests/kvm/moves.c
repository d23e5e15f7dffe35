/* moves.c - a guest that is taken out of KVM at any moment.
 *
 * A program calls its kernel (by SYSCALL or INT, from ring 3 or ring 0), touches pages that the kernel takes away
 * again, and computes; the kernel checks what it finds: privilege levels, address and error code of page faults, both
 * GS bases. Deadlines and budgets cut the run at random moments, and it goes on in KVM, in the interpreter or in the
 * JIT. Whatever part of the state is old, missing or moved twice shows within a few turns: the guest ends at a port
 * that names the check. TEST_SEED and TEST_COUNT choose moments and length.
 */
#include <libvm/libvm.h>
#include "../test.h"

#include <string.h>

enum {
    RAM = 2 << 20,
    CODE = 0x1000,
    KERNEL_STACK = 0x20000,
    USER_STACK = 0x30000,
    GDT = 0x40000,
    TSS = 0x41000,
    IDT = 0x42000,
    PAGES_PT = 0x104000,
    TABLES = 0x100000,
    PERCPU = 0x170000,
    PER_USER = 0x171000,
    PAGE = 0x180000,
};
#define PAGES UINT64_C(0x40000000)

/* gs:0 user stack, 8 kernel stack, 16 entry of the page that is there, 24 its address, 32 calls, 40 faults */
__asm__(".section .rodata\n"
        ".globl moves_guest, moves_syscall, moves_call, moves_fault, moves_int, moves_bad, moves_end\n"
        ".balign 16\n"
        "moves_guest:\n"
        "1:  mov %r14, %rdi\n"
        "    mov $7, %eax\n"
        "    syscall\n"
        "    lea 1(%rdi,%rdi,2), %rcx\n"
        "    cmp %rcx, %rax\n"
        "    mov $1, %eax\n"
        "    jne 9f\n"
        "    mov %gs:0, %rcx\n"
        "    cmp $0x7777, %rcx\n"
        "    mov $2, %eax\n"
        "    jne 9f\n"
        "    mov %r14, %r15\n"
        "    and $511, %r15\n"
        "    shl $12, %r15\n"
        "    add $0x40000000, %r15\n"
        "    add 0x10(%r15), %rbx\n"
        "    movd %ebx, %xmm0\n"
        "    paddd %xmm0, %xmm1\n"
        "    mov %rbx, %rax\n"
        "    int $0x80\n"
        "    sub %rbx, %rax\n"
        "    cmp $1, %rax\n"
        "    mov $3, %eax\n"
        "    jne 9f\n"
        "    rol $7, %rbx\n"
        "    dec %r14\n"
        "    jnz 1b\n"
        "    xor %eax, %eax\n"
        "9:  out %al, $0x80\n"
        "    jmp 9b\n"
        "moves_syscall:\n"
        "    swapgs\n"
        "    mov %rsp, %gs:0\n"
        "    mov %gs:8, %rsp\n"
        "    push %rcx\n"
        "    push %r11\n"
        "    mov %ss, %eax\n"
        "    cmp $0x18, %ax\n"
        "    mov $4, %eax\n"
        "    jne 9b\n"
        "    call 2f\n"
        "    pop %r11\n"
        "    pop %rcx\n"
        "    mov %gs:0, %rsp\n"
        "    swapgs\n"
        "    sysretq\n"
        "moves_call:\n"
        "    swapgs\n"
        "    call 2f\n"
        "    swapgs\n"
        "    iretq\n"
        "2:  mov %cs, %eax\n" /* takes the page away that the last fault gave */
        "    cmp $0x10, %ax\n"
        "    mov $5, %eax\n"
        "    jne 9b\n"
        "    mov %gs:16, %rax\n"
        "    movq $0, (%rax)\n"
        "    mov %gs:24, %rax\n"
        "    invlpg (%rax)\n"
        "    incq %gs:32\n"
        "    lea 1(%rdi,%rdi,2), %rax\n"
        "    ret\n"
        "moves_fault:\n"
        "    push %rax\n"
        "    push %rcx\n"
        "    swapgs\n"
        "    mov %cr2, %rcx\n"
        "    sub $0x10, %rcx\n"
        "    cmp %rcx, %r15\n"
        "    mov $6, %eax\n"
        "    jne 9b\n"
        "    cmp %r12, 16(%rsp)\n"
        "    mov $7, %eax\n"
        "    jne 9b\n"
        "    cmp %r13, 32(%rsp)\n"
        "    mov $8, %eax\n"
        "    jne 9b\n"
        "    mov %rcx, %gs:24\n"
        "    shr $9, %rcx\n"
        "    and $0xff8, %ecx\n"
        "    add $0x104000, %ecx\n"
        "    movq $0x180007, (%rcx)\n"
        "    mov %rcx, %gs:16\n"
        "    incq %gs:40\n"
        "    swapgs\n"
        "    pop %rcx\n"
        "    pop %rax\n"
        "    add $8, %rsp\n"
        "    iretq\n"
        "moves_int:\n"
        "    inc %rax\n"
        "    iretq\n"
        "moves_bad:\n" /* 16 bytes a vector */
        "    .set vector, 0x20\n"
        "    .rept 32\n"
        "    .balign 16\n"
        "    mov $vector, %eax\n"
        "    .set vector, vector + 1\n"
        "    jmp 9b\n"
        "    .endr\n"
        "moves_end:\n"
        ".text\n");
extern const uint8_t moves_guest[], moves_syscall[], moves_call[], moves_fault[], moves_int[], moves_bad[], moves_end[];

static uint64_t at(const uint8_t *label) { return CODE + (uint64_t)(label - moves_guest); }

static void put(vm_machine *m, uint64_t gpa, uint64_t value) { OK(vm_write(m, gpa, &value, 8)); }

static void put_gate(vm_machine *m, unsigned vector, uint64_t to, unsigned dpl)
{
    put(m, IDT + vector * 16,
        (to & 0xffff) | 0x10 << 16 | (UINT64_C(0x8e00) | dpl << 13) << 32 | (to >> 16 & 0xffff) << 48);
    put(m, IDT + vector * 16 + 8, to >> 32);
}

static void lay_out(vm_machine *m, bool has_syscall)
{
    OK(vm_write(m, CODE, moves_guest, (size_t)(moves_end - moves_guest)));
    if (!has_syscall) OK(vm_write(m, CODE + 8, (const uint8_t[]){0xcd, 0x81}, 2)); /* in SYSCALL's place */
    put(m, TABLES, (TABLES + 0x1000) | 7);
    put(m, TABLES + 0x1000, (TABLES + 0x2000) | 7);
    put(m, TABLES + 0x1008, (TABLES + 0x3000) | 7);
    put(m, TABLES + 0x2000, 0xe7);
    put(m, TABLES + 0x3000, PAGES_PT | 7);
    static const uint64_t gdt[] = {0,
                                   0,
                                   0x00af9b000000ffff,
                                   0x00cf93000000ffff,
                                   0,
                                   0x00cff3000000ffff,
                                   0x00affb000000ffff,
                                   0,
                                   (uint64_t)TSS << 16 | UINT64_C(0x0000890000000067),
                                   0};
    OK(vm_write(m, GDT, gdt, sizeof gdt));
    put(m, TSS + 4, KERNEL_STACK);
    for (unsigned v = 0; v < 32; v++)
        put_gate(m, v, v == 14 ? at(moves_fault) : (at(moves_bad) + 15) / 16 * 16 + v * 16, 0);
    put_gate(m, 0x80, at(moves_int), 3);
    put_gate(m, 0x81, at(moves_call), 3);
    put(m, PERCPU + 8, KERNEL_STACK - 0x1000);
    put(m, PERCPU + 16, PAGES_PT);
    put(m, PERCPU + 24, PAGES);
    put(m, PER_USER, 0x7777);
    put(m, PAGE + 0x10, 0x123456789);
}

/* How the guest is made: what it calls its kernel with, and whether there is a ring 3. */
typedef struct kind {
    const char *name;
    bool has_syscall, is_user;
} kind;
static const kind kinds[] = {{"syscall", true, true}, {"int", false, true}, {"ring0", false, false}};

static void set_up(vm_machine *m, vm_vcpu *cpu, uint64_t turns, const kind *k)
{
    vm_sregs s = VM_SREGS_INIT;
    vm_regs r = VM_REGS_INIT;
    lay_out(m, k->has_syscall);
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_get_sregs(cpu, &s));
    s.cr3 = TABLES;
    s.ss = s.ds = s.es = (vm_segment){.limit = 0xffffffff, .selector = 0x2b, .attributes = 0xc0f3};
    s.cs = (vm_segment){.limit = 0xffffffff, .selector = 0x33, .attributes = 0xa0fb};
    s.gs = s.ds;
    s.gs.base = PER_USER;
    s.gdtr.base = GDT, s.gdtr.limit = 0x57;
    s.idtr.base = IDT, s.idtr.limit = 0xfff;
    if (k->is_user) {
        s.tr = (vm_segment){.base = TSS, .limit = 0x67, .selector = 0x40, .attributes = 0x8b};
    } else {
        s.cs.selector = 0x10, s.cs.attributes = 0xa09b;
        s.ss.selector = 0x18, s.ss.attributes = 0xc093;
    }
    if (k->has_syscall) {
        s.efer |= 1;
        OK(vm_vcpu_set_msr(cpu, 0xc0000081, UINT64_C(0x0023001000000000)));
        OK(vm_vcpu_set_msr(cpu, 0xc0000082, at(moves_syscall)));
        OK(vm_vcpu_set_msr(cpu, 0xc0000084, 0x300));
    }
    OK(vm_vcpu_set_sregs(cpu, &s));
    OK(vm_vcpu_set_msr(cpu, 0xc0000102, PERCPU));
    OK(vm_vcpu_get_regs(cpu, &r));
    r.rip = CODE, r.rsp = USER_STACK, r.rflags = 0x3202, r.r14 = turns, r.rbx = 1;
    r.r12 = k->is_user ? 4 : 0, r.r13 = s.cs.selector;
    OK(vm_vcpu_set_regs(cpu, &r));
}

static uint64_t expected(uint64_t turns)
{
    uint64_t v = 1;
    for (; turns; turns--) v += 0x123456789, v = v << 7 | v >> 57;
    return v;
}

static uint64_t word(vm_machine *m, uint64_t gpa)
{
    uint64_t v;
    OK(vm_read(m, gpa, &v, 8));
    return v;
}

/* A turn of random length on a random backend; false: the guest has ended. */
static bool take_turn(vm_machine *m, vm_vcpu *cpu, uint64_t *random, vm_exit *e)
{
    static const vm_backend backends[] = {VM_BACKEND_KVM, VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM};
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    uint64_t has_jit = 0;
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    vm_backend b = backends[*random >> 33 & 3];
    unsigned length = *random >> 40 & 0xff;
    OK(vm_query(VM_BACKEND_JIT, "available", &has_jit));
    OK(vm_backend_select(m, b == VM_BACKEND_JIT && !has_jit ? VM_BACKEND_INTERP : b));
    if (b == VM_BACKEND_KVM)
        o.deadline_ns = 2000 + length * 2000;
    else
        o.max_instructions = 1 + (length & 63);
    OK(vm_vcpu_run(cpu, &o, e));
    return e->reason == VM_EXIT_DEADLINE || e->reason == VM_EXIT_BUDGET;
}

static void taken_out(const void *arg)
{
    const kind *k = arg;
    uint64_t available = 0, turns = k->is_user ? 20000 : 4000, random = 1, exits = 0;
    vm_options o = VM_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_regs r = VM_REGS_INIT;
    vm_machine *m;
    vm_region *ram;
    unsigned cuts = 0;
    if (getenv("TEST_SEED")) random = strtoull(getenv("TEST_SEED"), NULL, 0);
    if (getenv("TEST_COUNT")) turns = strtoull(getenv("TEST_COUNT"), NULL, 0);
    OK(vm_query(VM_BACKEND_KVM, "available", &available));
    if (!available) test_skip("%s", vm_errmsg());
    o.backend = VM_BACKEND_KVM;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, RAM, VM_PROT_RWX, &ram));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    set_up(m, cpu, turns, k);
    while (take_turn(m, cpu, &random, &e)) cuts++;
    OK(vm_vcpu_get_regs(cpu, &r));
    OK(vm_stats(m, "kvm-exits", &exits));
    if (e.reason != VM_EXIT_IO || r.rax & 0xff)
        FAIL("seed %s, %u cuts, %llu exits, %llu calls, %llu faults: check %u at rip %llx, exit %d, rcx %llx, r15 %llx",
             getenv("TEST_SEED") ? getenv("TEST_SEED") : "1", cuts, (unsigned long long)exits,
             (unsigned long long)word(m, PERCPU + 32), (unsigned long long)word(m, PERCPU + 40), (unsigned)r.rax & 0xff,
             (unsigned long long)r.rip, e.reason, (unsigned long long)r.rcx, (unsigned long long)r.r15);
    CHECK_EQ(r.rbx, expected(turns));
    CHECK_EQ(word(m, PERCPU + 32), turns);
    CHECK_EQ(word(m, PERCPU + 40), turns);
    CHECK(cuts > 10 && (exits > 0 || k->is_user));
    vm_destroy(m);
}

SETUP(kinds)
{
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char name[64];
        snprintf(name, sizeof name, "taken_out_at_any_moment/%s", kinds[i].name);
        test_add(name, taken_out, &kinds[i], 120);
    }
}
