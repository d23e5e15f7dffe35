/* simd.c - x87, MMX, SSE and AVX semantics against the silicon.
 *
 * Every encoding that the decoder gives to a vector or x87 function is executed twice from the same random state: by this
 * processor, between an XRSTOR and an XSAVE, and by its semantic function on a bare x86_cpu whose guest memory has the same
 * addresses. Registers, MXCSR, x87 state, flags, memory and the exception vector must agree. The memory operand lies at a
 * random place in two pages with nothing behind them, often flush with the end, so that an access that is too wide shows.
 */
#define _GNU_SOURCE
#include "test.h"
#include "core/core.h"
#include "x86/native.h"
#include "x86/ops.h"

#include <Zydis/Mnemonic.h>
#include <Zydis/Utils.h>
#include <Zydis/Zydis.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define CTX_AT 0x20000000ul
#define CODE_AT 0x21000000ul
#define DATA_AT 0x22000000ul
#define DATA_BYTES 8192u
#define FLAGS_MASK 0x8d5u

/* At CTX_AT, reached by absolute 32-bit addresses from the runner below, which knows these offsets. */
typedef struct native_context {
    uint8_t in[1024];             /* 0x000: XSAVE area before */
    uint8_t out[1024];            /* 0x400: after */
    uint64_t gpr[16];             /* 0x800 */
    uint64_t out_gpr[16];         /* 0x880 */
    uint64_t flags, out_flags;    /* 0x900 */
    uint64_t host_rsp;            /* 0x910 */
    uint64_t code;                /* 0x918 */
    uint32_t host_mxcsr;          /* 0x920 */
} native_context;
#define CTX ((native_context *)CTX_AT)

void native_run(void);
extern char native_back[], native_recover[];
__asm__(".text\n"
        "native_run:\n"
        "  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "  mov %rsp, 0x20000910\n"
        "  stmxcsr 0x20000920\n"
        "  mov $7, %eax; xor %edx, %edx; xrstor64 0x20000000\n"
        "  push 0x20000900; popfq\n"
        "  mov 0x20000800, %rax; mov 0x20000808, %rcx; mov 0x20000810, %rdx; mov 0x20000818, %rbx\n"
        "  mov 0x20000820, %rsp; mov 0x20000828, %rbp; mov 0x20000830, %rsi; mov 0x20000838, %rdi\n"
        "  mov 0x20000840, %r8; mov 0x20000848, %r9; mov 0x20000850, %r10; mov 0x20000858, %r11\n"
        "  mov 0x20000860, %r12; mov 0x20000868, %r13; mov 0x20000870, %r14; mov 0x20000878, %r15\n"
        "  jmp *0x20000918\n"
        "native_back:\n"
        "  mov %rax, 0x20000880; mov %rcx, 0x20000888; mov %rdx, 0x20000890; mov %rbx, 0x20000898\n"
        "  mov %rsp, 0x200008a0; mov %rbp, 0x200008a8; mov %rsi, 0x200008b0; mov %rdi, 0x200008b8\n"
        "  mov %r8, 0x200008c0; mov %r9, 0x200008c8; mov %r10, 0x200008d0; mov %r11, 0x200008d8\n"
        "  mov %r12, 0x200008e0; mov %r13, 0x200008e8; mov %r14, 0x200008f0; mov %r15, 0x200008f8\n"
        "  mov 0x20000910, %rsp\n"
        "  pushfq; pop 0x20000908\n"
        "  mov $7, %eax; xor %edx, %edx; xsave64 0x20000400\n"
        "native_recover:\n"
        "  mov 0x20000910, %rsp\n"
        "  fninit; ldmxcsr 0x20000920; vzeroupper; cld\n"
        "  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
        "  ret\n");

static uint64_t seed = 88172645463325252u;
static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

/* ---- the processor ---- */
static volatile int native_vector;

static void take_frame_state(const uint8_t *fp)
{
    uint64_t bv;
    memcpy(&bv, fp + 512, 8);
    memcpy(CTX->out, fp, 832);
    if (!(bv & 1)) {
        memset(CTX->out, 0, 24);
        CTX->out[0] = 0x7f, CTX->out[1] = 3;
        memset(CTX->out + 32, 0, 128);
    }
    if (!(bv & 2))
        memset(CTX->out + 160, 0, 256);
    if (!(bv & 4))
        memset(CTX->out + 576, 0, 256);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
    static const int regs[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    ucontext_t *uc = context;
    (void)info;
    uint64_t rip = (uint64_t)uc->uc_mcontext.gregs[REG_RIP];
    if (rip < CODE_AT || rip > CODE_AT + 0x200) {
        signal(number, SIG_DFL);
        return;
    }
    native_vector = (int)uc->uc_mcontext.gregs[REG_TRAPNO];
    for (int i = 0; i < 16; i++)
        CTX->out_gpr[i] = (uint64_t)uc->uc_mcontext.gregs[regs[i]];
    CTX->out_flags = (uint64_t)uc->uc_mcontext.gregs[REG_EFL];
    take_frame_state((const uint8_t *)uc->uc_mcontext.fpregs);
    uc->uc_mcontext.gregs[REG_CSGSFS] = (uc->uc_mcontext.gregs[REG_CSGSFS] & ~0xffffll) | 0x33;
    uc->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)native_recover;
}

static uint8_t *code_rw;

static void set_up_native(void)
{
    static uint8_t stack[65536];
    int fd = memfd_create("code", 0);
    CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
    CHECK(mmap((void *)CTX_AT, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
    code_rw = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(mmap((void *)CODE_AT, 4096, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
    CHECK(mmap((void *)(DATA_AT - 4096), 4096 + DATA_BYTES + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
          MAP_FAILED);
    CHECK(mprotect((void *)DATA_AT, DATA_BYTES, PROT_READ | PROT_WRITE) == 0);
    stack_t ss = { .ss_sp = stack, .ss_size = sizeof stack };
    CHECK(sigaltstack(&ss, NULL) == 0);
    struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
    sigaction(SIGSEGV, &sa, NULL);
    sigaction(SIGFPE, &sa, NULL);
    sigaction(SIGILL, &sa, NULL);
    sigaction(SIGBUS, &sa, NULL);
}

/* Code size the instruction executes in: 8, or 4 through the kernel's 32-bit user code segment. */
static unsigned code_size = 8;

static void execute_native(const x86_insn *in)
{
    static const uint8_t enter[] = { 0xff, 0x2c, 0x25, 0xc0, 0, 0, 0x21 };         /* ljmp [CODE_AT + 0xc0] */
    static const uint8_t enter_target[] = { 0, 0, 0, 0x21, 0x23, 0 };              /* 0x23:CODE_AT */
    static const uint8_t leave[] = { 0xea, 0x40, 0, 0, 0x21, 0x33, 0 };            /* ljmp 0x33:CODE_AT + 0x40 */
    static const uint8_t jump[] = { 0xff, 0x25, 0, 0, 0, 0 };                      /* jmp [rip] */
    uint64_t back = (uint64_t)(uintptr_t)native_back;
    uint8_t *p = code_rw;
    memcpy(p, in->bytes, in->length);
    memcpy(p + in->length, leave, sizeof leave);
    p = code_size == 8 ? p + in->length : p + 0x40;
    memcpy(p, jump, sizeof jump);
    memcpy(p + 6, &back, 8);
    memcpy(code_rw + 0x80, enter, sizeof enter);
    memcpy(code_rw + 0xc0, enter_target, sizeof enter_target);
    if (code_size == 4)
        __asm__ volatile("mov %0, %%ds; mov %0, %%es" : : "r"(0x2b));
    CTX->code = code_size == 8 ? CODE_AT : CODE_AT + 0x80;
    memset(CTX->out, 0, sizeof CTX->out);
    native_vector = -1;
    native_run();
}

/* ---- the semantic function ---- */
static uint8_t guest_data[DATA_BYTES] __attribute__((aligned(4096)));
static x86_cpu *cpu;

static uint8_t *env_page(x86_cpu *c, uint64_t gpa, unsigned *prot)
{
    (void)c;
    *prot = X86_READ | X86_WRITE;
    return gpa >= DATA_AT && gpa < DATA_AT + DATA_BYTES ? guest_data + (gpa - DATA_AT) : NULL;
}

/* What the page tables of the process say: everything but the two pages faults. */
static bool env_fill(x86_cpu *c, uint64_t la, unsigned access, unsigned ctx, uint64_t *gpa)
{
    (void)ctx;
    *gpa = la;
    if (la >= DATA_AT && la < DATA_AT + DATA_BYTES)
        return true;
    c->fault = (x86_fault){ .vector = X86_PF, .has_error = true, .error = 4u | (access & X86_WRITE), .address = la };
    return false;
}

static int env_read(x86_cpu *c, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *value)
{
    (void)c, (void)gpa, (void)gva, (void)n, (void)access, (void)value;
    return X86_IO_EXIT;
}

static int env_write(x86_cpu *c, uint64_t gpa, uint64_t gva, unsigned n, uint64_t value)
{
    (void)c, (void)gpa, (void)gva, (void)n, (void)value;
    return X86_IO_EXIT;
}

static void env_root(x86_cpu *c, unsigned how)
{
    (void)how;
    x86_tlb_clear(c);
}

static void env_invalidate(x86_cpu *c, uint64_t la, uint64_t bytes)
{
    (void)la, (void)bytes;
    x86_tlb_clear(c);
}

static const x86_env env = { .page = env_page, .phys_read = env_read, .phys_write = env_write, .fill = env_fill,
                             .root_changed = env_root, .invalidate = env_invalidate };

static void set_up_guest(void)
{
    cpu = mmap(NULL, sizeof *cpu, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(cpu != MAP_FAILED);
    cpu->env = &env;
    cpu->phys_mask = (UINT64_C(1) << 40) - 1;
    cpu->model = x86_model_find(NULL);
    x86_tlb_init(cpu);
    x86_cpu_set_mode(cpu, 3);
}

static int execute_guest(const x86_insn *in)
{
    jmp_buf jump;
    cpu->rip = CODE_AT;
    cpu->next_rip = CODE_AT + in->length;
    cpu->stop = X86_STOP_NONE;
    cpu->fault_jmp = &jump;
    if (setjmp(jump))
        return cpu->stop == X86_STOP_NONE ? cpu->fault.vector : 1000 + (int)cpu->stop;
    in->exec(cpu, in);
    return -1;
}

/* ---- a whole machine ----
 * The same instruction as guest code on a backend, followed by HLT. */
static vm_vcpu *vcpu;
static uint8_t guest_code[4096] __attribute__((aligned(4096)));
static vm_machine *machine;

static void set_up_machine(vm_backend backend)
{
    vm_options options = VM_OPTIONS_INIT;
    options.backend = backend;
    OK(vm_create(&options, &machine));
    OK(vm_map_host(machine, CODE_AT, sizeof guest_code, VM_PROT_RWX, guest_code, NULL));
    OK(vm_map_host(machine, DATA_AT, sizeof guest_data, VM_PROT_RW, guest_data, NULL));
    vcpu = vm_vcpu_get(machine, 0);
    cpu = &vcpu->x86;
    OK(vm_vcpu_set_mode(vcpu, code_size == 8 ? VM_MODE_FLAT64 : VM_MODE_FLAT32));
}

static int execute_machine(const x86_insn *in)
{
    vm_run_options options = VM_RUN_OPTIONS_INIT;
    vm_exit exit = VM_EXIT_INIT;
    uint8_t bytes[16];
    memset(bytes, 0xf4, sizeof bytes);
    memcpy(bytes, in->bytes, in->length);
    OK(vm_write(machine, CODE_AT, bytes, sizeof bytes));
    cpu->rip = cpu->next_rip = CODE_AT;
    x86_io_retire(cpu);
    options.exception_exits = UINT32_MAX;
    options.max_instructions = 1000000;               /* a small budget would keep the JIT interpreting */
    OK(vm_vcpu_run(vcpu, &options, &exit));
    switch (exit.reason) {
    case VM_EXIT_HALT: return -1;
    case VM_EXIT_EXCEPTION: return exit.exception.vector;
    case VM_EXIT_UNMAPPED: return X86_PF;
    default: return 1000 + (int)exit.reason;
    }
}

/* ---- random state ---- */
static uint64_t random_f64(void)
{
    static const uint64_t special[] = { 0, 0x8000000000000000, 0x3ff0000000000000, 0xbff0000000000000, 0x7ff0000000000000,
        0xfff0000000000000, 0x7ff8000000000001, 0x7ff0000000000001, 0xfff7ffffffffffff, 1, 0x000fffffffffffff, 0x0010000000000000,
        0x7fefffffffffffff, 0x41dfffffffc00000, 0xc1e0000000000000, 0x43e0000000000000, 0x4000000000000000, 0x3fe0000000000000 };
    uint64_t r = rnd();
    switch (r & 3) {
    case 0: return special[(r >> 8) % (sizeof special / sizeof *special)];
    case 1: return (rnd() & 0x800fffffffffffff) | (uint64_t)(1000 + (r >> 8) % 48) << 52;
    case 2: return (rnd() & 0x800fffffffffffff) | (uint64_t)((r >> 8 & 1) ? (r >> 9) % 60 : 2046 - (r >> 9) % 60) << 52;
    default: return rnd();
    }
}

static uint32_t random_f32(void)
{
    static const uint32_t special[] = { 0, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00001, 0x7f800001,
        1, 0x007fffff, 0x00800000, 0x7f7fffff, 0x4f000000, 0xcf000000, 0x5f000000, 0x3f000000, 0x40490fdb };
    uint64_t r = rnd();
    switch (r & 3) {
    case 0: return special[(r >> 8) % (sizeof special / sizeof *special)];
    case 1: return ((uint32_t)rnd() & 0x807fffff) | (uint32_t)(112 + (r >> 8) % 32) << 23;
    case 2: return ((uint32_t)rnd() & 0x807fffff) | (uint32_t)((r >> 8 & 1) ? (r >> 9) % 30 : 254 - (r >> 9) % 30) << 23;
    default: return (uint32_t)rnd();
    }
}

static void random_vector(uint8_t *p, unsigned n)
{
    unsigned kind = rnd() % 5;
    for (unsigned i = 0; i < n; i += 8) {
        uint64_t v = kind == 0 ? random_f64() : kind == 1 ? random_f32() | (uint64_t)random_f32() << 32 : rnd();
        if (kind == 3)
            v &= 0x0303030303030303;
        if (kind == 4)
            v = (rnd() & 0x80ff80ff80ff80ff) * (rnd() & 1);
        memcpy(p + i, &v, 8);
    }
}

static void random_st(uint8_t *p)
{
    static const uint16_t exponents[] = { 0, 1, 0x7fff, 0x7ffe, 0x3fff, 0x4000, 0x403e, 0x401e, 0x3ffe, 0x3c00, 0x43ff, 0x3f80 };
    static const uint64_t mantissas[] = { 0, 0x8000000000000000, 0xc000000000000000, 0x8000000000000001, 0xffffffffffffffff, 1,
                                          0x7fffffffffffffff, 0xa000000000000000 };
    uint64_t r = rnd(), mantissa = r & 1 ? mantissas[(r >> 1) & 7] : rnd() | (uint64_t)((r >> 4 & 7) != 0) << 63;
    uint16_t exponent = r & 0x10000 ? exponents[(r >> 20) % 12] : (uint16_t)(0x3fff - 40 + (r >> 24) % 80);
    exponent |= (uint16_t)((r >> 40 & 1) << 15);
    memset(p, 0, 16);
    memcpy(p, &mantissa, 8);
    memcpy(p + 8, &exponent, 2);
}

static void random_state(uint8_t *area)
{
    uint64_t r = rnd(), bv = 7;
    memset(area, 0, 1024);
    uint16_t fcw = (uint16_t)(0x40 | (r & 7 ? 0x3f : r >> 8 & 0x3f) | (r >> 16 & 0xf00));
    uint16_t errors = (uint16_t)(r >> 32 & 0x3f & (r & 0x40 ? fcw : 0x7f));
    uint16_t fsw = (uint16_t)((r >> 40 & 0x7f00) | errors);
    if (errors & ~fcw)
        fsw |= 0x8080;
    memcpy(area, &fcw, 2);
    memcpy(area + 2, &fsw, 2);
    area[4] = r & 0x80 ? 0xff : (uint8_t)(r >> 56);
    r = rnd();
    uint32_t mxcsr = (uint32_t)(r & 7 ? 0x1f80 : r >> 8 & 0x1f80) | (r >> 20 & 0x603f) | (r & 0x300 ? 0 : r >> 40 & 0x8040);
    memcpy(area + 24, &mxcsr, 4);
    for (unsigned i = 0; i < 8; i++)
        random_st(area + 32 + 16 * i);
    for (unsigned i = 0; i < 16; i++) {
        random_vector(area + 160 + 16 * i, 16);
        random_vector(area + 576 + 16 * i, 16);
    }
    memcpy(area + 512, &bv, 8);
}

/* ---- one comparison ---- */
static bool is_dot_product(const x86_insn *in)
{
    return in->mnemonic == ZYDIS_MNEMONIC_DPPS || in->mnemonic == ZYDIS_MNEMONIC_DPPD || in->mnemonic == ZYDIS_MNEMONIC_VDPPS ||
           in->mnemonic == ZYDIS_MNEMONIC_VDPPD;
}

/* An exact tiny product inside a dot product is not seen when underflow is unmasked. */
static bool is_unknown_underflow(const x86_insn *in)
{
    return is_dot_product(in) && native_vector == X86_XM && !(CTX->in[25] & 0x08);
}

/* MXCSR bits that a run with masked exceptions cannot tell. An unmasked overflow or underflow sets PE when the result with an
 * unbounded exponent is inexact; a dot product stops at its first step that raises an unmasked exception. */
static uint32_t unknown_mxcsr(const x86_insn *in)
{
    uint32_t now, unmasked;
    memcpy(&now, CTX->out + 24, 4);
    unmasked = ~(now >> 7) & now & 0x3f;
    if (native_vector != X86_XM)
        return 0;
    if (is_dot_product(in))
        return 0x3f;
    return unmasked & 0x18 ? 0x20 : 0;
}

static const char *difference(const x86_insn *in, int guest_vector, char *why, size_t bytes)
{
    uint8_t *g = cpu->fpu.image;
    if (guest_vector != native_vector && is_unknown_underflow(in))
        return NULL;
    if (guest_vector != native_vector) {
        snprintf(why, bytes, "vector %d, silicon %d", guest_vector, (int)native_vector);
        return why;
    }
    for (unsigned i = 0; i < 16; i++)
        if (cpu->gpr[i] != CTX->out_gpr[i]) {
            snprintf(why, bytes, "gpr %u is %#lx, silicon %#lx", i, (long)cpu->gpr[i], (long)CTX->out_gpr[i]);
            return why;
        }
    if ((cpu->rflags ^ CTX->out_flags) & FLAGS_MASK) {
        snprintf(why, bytes, "flags %#lx, silicon %#lx", (long)(cpu->rflags & FLAGS_MASK), (long)(CTX->out_flags & FLAGS_MASK));
        return why;
    }
    if (memcmp(g, CTX->out, 5)) {
        snprintf(why, bytes, "fcw/fsw/ftw %02x%02x %02x%02x %02x, silicon %02x%02x %02x%02x %02x", g[1], g[0], g[3], g[2], g[4],
                 CTX->out[1], CTX->out[0], CTX->out[3], CTX->out[2], CTX->out[4]);
        return why;
    }
    if ((*(uint32_t *)(g + 24) ^ *(uint32_t *)(CTX->out + 24)) & ~unknown_mxcsr(in)) {
        snprintf(why, bytes, "mxcsr %02x%02x, silicon %02x%02x (before %02x%02x)", g[25], g[24], CTX->out[25], CTX->out[24],
                 CTX->in[25], CTX->in[24]);
        return why;
    }
    for (unsigned i = 0; i < 8; i++)
        if (memcmp(g + 32 + 16 * i, CTX->out + 32 + 16 * i, 10)) {
            snprintf(why, bytes, "st%u", i);
            return why;
        }
    for (unsigned i = 0; i < 16; i++)
        if (memcmp(g + 160 + 16 * i, CTX->out + 160 + 16 * i, 16) || memcmp(g + 576 + 16 * i, CTX->out + 576 + 16 * i, 16)) {
            snprintf(why, bytes, "ymm%u: %016lx%016lx.. high %016lx, silicon %016lx%016lx high %016lx", i,
                     ((long *)(g + 160 + 16 * i))[1], ((long *)(g + 160 + 16 * i))[0], ((long *)(g + 576 + 16 * i))[0],
                     ((long *)(CTX->out + 160 + 16 * i))[1], ((long *)(CTX->out + 160 + 16 * i))[0],
                     ((long *)(CTX->out + 576 + 16 * i))[0]);
            return why;
        }
    if (memcmp(guest_data, (void *)DATA_AT, DATA_BYTES))
        return "memory";
    return NULL;
}

typedef struct tally { unsigned forms, runs, faults, bad; } tally;

static uint64_t random_place(unsigned size, unsigned align)
{
    uint64_t at;
    switch (rnd() % 4) {
    case 0: at = DATA_AT + DATA_BYTES - size; break;
    case 1: at = DATA_AT + 4096 - size + (rnd() & (size ? size * 2 - 1 : 0)) ; break;
    default: at = DATA_AT + rnd() % (DATA_BYTES - 1024); break;
    }
    if (rnd() & 15)
        at &= ~(uint64_t)(align - 1);
    if (at + size > DATA_AT + DATA_BYTES && rnd() & 3)
        at = DATA_AT + DATA_BYTES - ((size + align - 1) & ~(align - 1));
    return at;
}

static bool is_gather(const x86_insn *in)
{
    return in->flags & X86_IF_VEX && in->map == 2 && in->opcode >= 0x90 && in->opcode <= 0x93;
}

/* Index elements stay near the data most of the time. */
static void tame_index(const x86_insn *in)
{
    unsigned sib = in->bytes[in->modrm_off + 1], reg = (sib >> 3 & 7) | (in->bytes[in->modrm_off - 3] & 0x40 ? 0 : 8);
    for (unsigned i = 0; i < 8; i++) {
        uint8_t *p = (i < 4 ? CTX->in + 160 : CTX->in + 576) + 16 * reg + 4 * (i & 3);
        int32_t v = rnd() % 40 ? (int32_t)(rnd() % 400) : 0x100000;
        if (in->opcode & 1 && i & 1)
            v = 0;
        memcpy(p, &v, 4);
    }
}

static unsigned operand_size(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_MEM)
            return in->op[i].size;
    return 16;
}

/* Make a legacy or XSAVE area, valid most of the time. */
static void random_area(uint8_t *p)
{
    uint64_t r = rnd(), bv = r & 7, comp = r & 8 ? (r >> 8 & 7) | bv | UINT64_C(1) << 63 : 0;
    random_state(p);
    memset(p + 512, 0, 64);
    if ((r & 0xf0000) == 0)
        bv |= 8;                                           /* no such component here */
    if ((r & 0xf00000) == 0)
        comp ^= r & 0x1000000 ? 8 : 2;
    if ((r & 0xf0000000) == 0)
        p[520 + (r >> 48) % 56] ^= 1;
    memcpy(p + 512, &bv, 8);
    memcpy(p + 520, &comp, 8);
    if ((r >> 32 & 15) == 0)
        p[26 + (r >> 36 & 1)] = 1;                         /* MXCSR bits that do not exist */
}

static bool is_state_image(const x86_insn *in);

/* Put random components into their initial configuration. */
static void init_some(uint8_t *area)
{
    uint64_t which = rnd() & 7;
    if (!(which & 1)) {
        memset(area, 0, 24);
        memset(area + 32, 0, 128);
        area[0] = 0x7f, area[1] = 3;
    }
    if (!(which & 2)) {
        memset(area + 160, 0, 256);
        if (rnd() & 1)
            memcpy(area + 24, "\x80\x1f", 2);
    }
    if (!(which & 4))
        memset(area + 576, 0, 256);
    memcpy(area + 512, &which, 8);
}

/* Before a comparison: bytes of a stored image that are a matter of the model. */
static void forgive_image(const x86_insn *in, uint64_t at)
{
    uint8_t *native = (uint8_t *)at, *guest = guest_data + (at - DATA_AT);
    if (in->mnemonic == ZYDIS_MNEMONIC_FNSTENV || in->mnemonic == ZYDIS_MNEMONIC_FNSAVE) {
        unsigned wide = in->op[0].size == 28 || in->op[0].size == 108;
        unsigned from = wide ? 12 : 6, to = wide ? 28 : 14;
        memcpy(native + from, guest + from, to - from);    /* pointers, which AMD's XRSTOR does not load */
    } else if (in->opcode == 0xae || in->opcode == 0xc7) {
        memcpy(native + 28, guest + 28, 4);                /* MXCSR_MASK: MM is not offered */
    }
}

static void run_one(const x86_insn *in, tally *t)
{
    char why[300];
    random_state(CTX->in);
    for (unsigned i = 0; i < 16; i++)
        CTX->gpr[i] = rnd() & 1 ? rnd() : rnd() & 0x1f;
    unsigned size = operand_size(in);
    if (is_gather(in)) {
        tame_index(in);
        size = 4096;
    }
    uint64_t place = random_place(size, size == 16 || size == 32 ? size : 1);
    if (in->flags & X86_IF_MEM && in->base < 16)
        CTX->gpr[in->base] = place - (uint64_t)in->disp;
    if (in->mnemonic == ZYDIS_MNEMONIC_MASKMOVQ || in->mnemonic == ZYDIS_MNEMONIC_MASKMOVDQU ||
        in->mnemonic == ZYDIS_MNEMONIC_VMASKMOVDQU)
        CTX->gpr[7] = place;
    for (unsigned i = 0; i < 16 && code_size == 4; i++)
        CTX->gpr[i] = i < 8 ? (uint32_t)CTX->gpr[i] : 0;
    CTX->flags = 2 | (rnd() & FLAGS_MASK);
    for (unsigned i = 0; i < DATA_BYTES; i += 512)
        random_vector(guest_data + i, 512);
    if (in->mnemonic == ZYDIS_MNEMONIC_LDMXCSR || in->mnemonic == ZYDIS_MNEMONIC_VLDMXCSR)
        for (unsigned i = 2; i < DATA_BYTES; i++)
            guest_data[i] &= rnd() & 7 ? 0 : 0xfd;     /* bit 17 exists on AMD's processors, not in the model */
    if (is_state_image(in)) {
        place = DATA_AT + rnd() % (DATA_BYTES - 1024);
        place &= rnd() & 15 ? ~(uint64_t)63 : rnd() & 1 ? ~(uint64_t)15 : ~(uint64_t)0;
        CTX->gpr[in->base & 15] = place - (uint64_t)in->disp;
        if (in->base & 15)
            CTX->gpr[0] = rnd() & 7;
        if (in->base != 2)
            CTX->gpr[2] = rnd() & 31;
        random_area(guest_data + (place - DATA_AT));
        init_some(CTX->in);
    }
    static uint8_t before[DATA_BYTES];
    memcpy(before, guest_data, DATA_BYTES);

    memcpy(cpu->fpu.image, CTX->in, 832);
    memset(cpu->fpu.image + 512, 0, 64);
    memcpy(cpu->gpr, CTX->gpr, sizeof cpu->gpr);
    cpu->rflags = CTX->flags;
    int vector = vcpu ? execute_machine(in) : execute_guest(in);
    const char *error = NULL;
    /* Which components the processor takes for unused may change when the kernel switches tasks right here: ask again. */
    for (unsigned tries = 0; tries < 3; tries++) {
        memcpy((void *)DATA_AT, before, DATA_BYTES);
        execute_native(in);
        if (is_state_image(in) && native_vector < 0)
            forgive_image(in, place);
        error = difference(in, vector, why, sizeof why);
        if (!error || !is_state_image(in))
            break;
    }
    if (vcpu && native_vector == X86_PF)                   /* some of it may have been done before the unmapped exit */
        error = vector == X86_PF ? NULL : error;
    t->runs++;
    t->faults += native_vector >= 0;
    if (error) {
        char text[128];
        x86_format(in, 0, text, sizeof text);
        printf("# %s [", text);
        for (unsigned i = 0; i < in->length; i++)
            printf("%02x", in->bytes[i]);
        printf("]: %s\n", error);
        t->bad++;
    }
}

static bool is_state_image(const x86_insn *in)
{
    switch (in->mnemonic) {
    case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_XSAVE: case ZYDIS_MNEMONIC_XSAVE64: case ZYDIS_MNEMONIC_XSAVEOPT: case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XSAVEC: case ZYDIS_MNEMONIC_XSAVEC64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
    case ZYDIS_MNEMONIC_XSAVES: case ZYDIS_MNEMONIC_XRSTORS: case ZYDIS_MNEMONIC_XSAVES64: case ZYDIS_MNEMONIC_XRSTORS64:
    case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FNSAVE:
        return true;
    default:
        return false;
    }
}

static bool wanted(const uint8_t *bytes, x86_insn *in)
{
    if (x86_decode(bytes, 15, code_size, in) || in->exec == x86_op_illegal || !(in->flags & (X86_IF_VEC | X86_IF_FPU)))
        return false;
    if (in->exec == x86_op_simd && code_size == 8 && !x86_simd_offered(cpu, in))   /* the CPU model leaves it out */
        return false;
    return !(in->flags & X86_IF_MEM && in->base >= 16);
}

/* Fill the rest of `b` from `n`: ModRM of the wanted kind, SIB where there has to be one, random immediate. */
static void finish_bytes(uint8_t *b, unsigned n, bool is_mem, bool is_vsib)
{
    uint8_t rm;
    do
        rm = rnd() & 7;
    while (is_mem && (is_vsib ? rm != 4 : rm == 4 || rm == 5));
    b[n++] = (uint8_t)((is_mem ? (rnd() & 1) << 6 : 0xc0) | (rnd() & 0x38) | rm);
    if (is_mem && is_vsib)
        b[n++] = (uint8_t)((rnd() & 0xf8) | (rnd() & 3));
    while (n < 15)
        b[n++] = (uint8_t)rnd();
}

static unsigned head_of(uint8_t *b, unsigned map, unsigned op, unsigned pp, unsigned w, unsigned vex)
{
    static const uint8_t mandatory[] = { 0, 0x66, 0xf3, 0xf2 };
    unsigned n = 0;
    if (vex) {
        b[n++] = 0xc4;
        b[n++] = (uint8_t)((rnd() & 0xe0) | map);
        b[n++] = (uint8_t)(w << 7 | (rnd() & 1 ? 0x78 : rnd() & 0x78) | (vex - 1) << 2 | pp);
    } else {
        if (pp)
            b[n++] = mandatory[pp];
        if (map && (w || rnd() & 1))
            b[n++] = (uint8_t)(0x40 | w << 3 | (rnd() & 7));
        if (map)
            b[n++] = 0x0f;
        if (map > 1)
            b[n++] = map == 2 ? 0x38 : 0x3a;
    }
    b[n++] = (uint8_t)op;
    return n;
}

/* 32-bit code: no REX, VEX.R and X set or it is LES or LDS. */
static unsigned head_of_32(uint8_t *b, unsigned map, unsigned op, unsigned pp, unsigned w, unsigned vex)
{
    unsigned n = head_of(b, map, op, pp, w, vex);
    if (vex) {
        b[1] |= 0xc0;
        return n;
    }
    unsigned rex = pp ? 1 : 0;
    if ((b[rex] & 0xf0) == 0x40 && map) {
        memmove(b + rex, b + rex + 1, n - rex - 1);
        n--;
    }
    return n;
}

static uint8_t seen[ZYDIS_MNEMONIC_MAX_VALUE + 1];

static void run_form(unsigned map, unsigned op, unsigned pp, unsigned w, unsigned vex, bool is_mem, unsigned times, tally *t)
{
    unsigned hits = 0;
    bool is_vsib = vex && map == 2 && op >= 0x90 && op <= 0x93;
    for (unsigned k = 0; k < times * 4 && hits < times && t->bad < 40; k++) {
        uint8_t b[15];
        x86_insn in;
        unsigned n = (code_size == 8 ? head_of : head_of_32)(b, map, op, pp, w, vex);
        finish_bytes(b, n, is_mem, is_vsib);
        if (!wanted(b, &in) || is_state_image(&in)) {
            if (k > 16 && !hits)
                return;
            continue;
        }
        seen[in.mnemonic] = 1;
        run_one(&in, t);
        hits++;
    }
    t->forms += hits > 0;
}

static unsigned mnemonics_seen(void)
{
    unsigned n = 0;
    for (unsigned i = 0; i <= ZYDIS_MNEMONIC_MAX_VALUE; i++)
        n += seen[i];
    return n;
}

static void report(const tally *t)
{
    printf("# %u mnemonics, %u forms, %u executions, %u of them faulted, %u differ\n", mnemonics_seen(), t->forms, t->runs,
           t->faults, t->bad);
}

static void set_up(void)
{
    set_up_guest();
    set_up_native();
}

static void sweep(unsigned vex_from, unsigned vex_to, unsigned times, tally *t)
{
    for (unsigned map = 1; map < 4; map++)
        for (unsigned op = 0; op < 256; op++)
            for (unsigned variant = 0; variant < 16; variant++)
                for (unsigned vex = vex_from; vex <= vex_to; vex++)
                    run_form(map, op, variant & 3, variant >> 2 & 1, vex, variant >> 3, times, t);
}

TEST_LIMIT(legacy_vector, 120)
{
    tally t = { 0 };
    set_up();
    sweep(0, 0, 40, &t);
    report(&t);
    CHECK_EQ(t.bad, 0);
    CHECK(mnemonics_seen() > 250 && t.faults > 100);
}

TEST_LIMIT(vex, 120)
{
    tally t = { 0 };
    if (!__builtin_cpu_supports("avx2"))
        test_skip("no AVX2 on this processor");
    set_up();
    sweep(1, 2, 40, &t);
    report(&t);
    CHECK_EQ(t.bad, 0);
    CHECK(mnemonics_seen() > 330 && t.faults > 100);
}

/* Registers 8-15 must stay as they are, GPRs zero-extended; VEX.W and vvvv[3] do not count. */
TEST_LIMIT(code_of_32_bits, 120)
{
    tally t = { 0 };
    set_up();
    x86_cpu_set_mode(cpu, 2);
    code_size = 4;
    sweep(0, __builtin_cpu_supports("avx2") ? 2 : 0, 10, &t);
    report(&t);
    CHECK_EQ(t.bad, 0);
    CHECK(mnemonics_seen() > 250);
}

TEST_LIMIT(x87, 120)
{
    tally t = { 0 };
    set_up();
    for (unsigned op = 0xd8; op < 0xe0; op++)
        for (unsigned modrm = 0; modrm < 256; modrm++)
            for (unsigned k = 0; k < 60 && t.bad < 40; k++) {
                uint8_t b[15] = { (uint8_t)op, (uint8_t)modrm };
                x86_insn in;
                if ((modrm & 0xc0) != 0xc0 && ((modrm & 7) == 4 || (modrm & 0xc7) == 5 || modrm >= 0x40))
                    continue;
                if (!wanted(b, &in) || is_state_image(&in))
                    continue;
                seen[in.mnemonic] = 1;
                t.forms += k == 0;
                run_one(&in, &t);
            }
    report(&t);
    CHECK_EQ(t.bad, 0);
    CHECK(mnemonics_seen() > 80 && t.faults > 100);
}

/* FXSAVE, XSAVE, FNSTENV and their inverses. */
TEST_LIMIT(state_images, 120)
{
    static const struct { uint8_t n, bytes[3], modrm; } forms[] = {
        { 2, { 0x0f, 0xae }, 0x00 }, { 3, { 0x48, 0x0f, 0xae }, 0x00 }, { 2, { 0x0f, 0xae }, 0x08 }, { 3, { 0x48, 0x0f, 0xae }, 0x08 },
        { 2, { 0x0f, 0xae }, 0x20 }, { 3, { 0x48, 0x0f, 0xae }, 0x20 }, { 2, { 0x0f, 0xae }, 0x28 }, { 3, { 0x48, 0x0f, 0xae }, 0x28 },
        { 2, { 0x0f, 0xae }, 0x30 }, { 3, { 0x48, 0x0f, 0xae }, 0x30 }, { 2, { 0x0f, 0xc7 }, 0x20 }, { 3, { 0x48, 0x0f, 0xc7 }, 0x20 },
        { 1, { 0xd9 }, 0x30 }, { 1, { 0xdd }, 0x30 }, { 2, { 0x66, 0xd9 }, 0x30 }, { 2, { 0x66, 0xdd }, 0x30 },
        { 1, { 0xd9 }, 0x20 }, { 1, { 0xdd }, 0x20 }, { 2, { 0x66, 0xd9 }, 0x20 }, { 2, { 0x66, 0xdd }, 0x20 },
    };
    tally t = { 0 };
    set_up();
    for (unsigned i = 0; i < sizeof forms / sizeof *forms; i++)
        for (unsigned k = 0; k < 400 && t.bad < 40; k++) {
            uint8_t b[15] = { 0 };
            x86_insn in;
            memcpy(b, forms[i].bytes, forms[i].n);
            b[forms[i].n] = forms[i].modrm | (uint8_t)(rnd() & 1 ? 3 : 6);
            if (!wanted(b, &in))
                FAIL("form %u is not decoded", i);
            seen[in.mnemonic] = 1;
            t.forms += k == 0;
            run_one(&in, &t);
        }
    report(&t);
    CHECK_EQ(t.bad, 0);
    CHECK(t.faults > 100);
}

static void backend_sweep(const void *arg)
{
    static const struct { vm_backend backend; uint8_t bits; } runs[] = {
        { VM_BACKEND_INTERP, 64 }, { VM_BACKEND_INTERP, 32 }, { VM_BACKEND_JIT, 64 }, { VM_BACKEND_JIT, 32 } };
    unsigned i = (unsigned)(uintptr_t)arg;
    uint64_t available = 0;
    tally t = { 0 };
    if (vm_query(runs[i].backend, "available", &available) != VM_OK || !available)
        test_skip("%s", vm_errmsg());
    code_size = runs[i].bits / 8;
    set_up_machine(runs[i].backend);
    set_up_native();
    sweep(0, __builtin_cpu_supports("avx2") ? 2 : 0, 6, &t);
    report(&t);
    CHECK_EQ(t.bad, 0);
    CHECK(mnemonics_seen() > 250);
    vm_destroy(machine);
}

SETUP(backends)
{
    static const char *names[] = { "interp_64", "interp_32", "jit_64", "jit_32" };
    for (unsigned i = 0; i < 4; i++)
        test_add(names[i], backend_sweep, (const void *)(uintptr_t)i, 120);
}
