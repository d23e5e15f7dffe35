/* native.c - the host CPU's side of the differential tester; see native.h. */
#define _GNU_SOURCE
#include "native.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <asm/ldt.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

/* Lies at N_CONTEXT, reached by absolute 32-bit addresses from the trampoline: offsets are used in the assembly below. */
struct context {
    native_state in;                    /* 0: gpr 0..127, rip 128, flags 136, xsave 192 */
    native_state out;                   /* 1024 */
    uint64_t host_rsp, host_rbp, host_rbx, host_r12, host_r13, host_r14, host_r15;   /* 2048 ... */
    uint64_t host_fs, fs, gs;           /* 2104: bases */
    uint16_t selectors[8];              /* 2128 */
    unsigned char stubs[256];           /* 2144: way back from 32- and 16-bit code */
};
_Static_assert(offsetof(struct context, in.xsave) == 192, "trampoline offsets");
_Static_assert(offsetof(struct context, out) == 1024, "trampoline offsets");
_Static_assert(offsetof(struct context, host_rsp) == 2048, "trampoline offsets");
_Static_assert(offsetof(struct context, selectors) == 2128, "trampoline offsets");

void native_enter(void);
void native_leave(void);
void native_signal(int number, siginfo_t *info, void *p);
__attribute__((used)) void native_on_signal(int number, siginfo_t *info, void *p);
/* native_enter: keep what the ABI asks for, load all, go. native_leave: the way back. native_signal: the other way back; nothing
 * may use FS, or count on flags, before they are the host's again. */
__asm__(".intel_syntax noprefix\n"
        ".text\n"
        ".set C, 0x300000\n"
        ".globl native_enter\n.hidden native_enter\n.type native_enter, @function\n"
        "native_enter:\n"
        "  mov [C+2048], rsp\n  mov [C+2056], rbp\n  mov [C+2064], rbx\n  mov [C+2072], r12\n"
        "  mov [C+2080], r13\n  mov [C+2088], r14\n  mov [C+2096], r15\n"
        "  mov eax, 7\n  xor edx, edx\n"
        "  mov ecx, C+192\n"
        "  xrstor64 [rcx]\n"
        "  rdfsbase rax\n  mov [C+2104], rax\n"
        "  mov es, [C+2128]\n  mov ss, [C+2132]\n  mov ds, [C+2134]\n  mov fs, [C+2136]\n  mov gs, [C+2138]\n"
        "  cmp word ptr [C+2140], 0\n  je 1f\n"
        "  mov rax, [C+2112]\n  wrfsbase rax\n  mov rax, [C+2120]\n  wrgsbase rax\n"
        "1:\n"
        "  push qword ptr [C+136]\n  popfq\n"
        "  mov rax, [C+0]\n  mov rcx, [C+8]\n  mov rdx, [C+16]\n  mov rbx, [C+24]\n  mov rsp, [C+32]\n"
        "  mov rbp, [C+40]\n  mov rsi, [C+48]\n  mov rdi, [C+56]\n  mov r8, [C+64]\n  mov r9, [C+72]\n"
        "  mov r10, [C+80]\n  mov r11, [C+88]\n  mov r12, [C+96]\n  mov r13, [C+104]\n  mov r14, [C+112]\n"
        "  mov r15, [C+120]\n"
        "  jmp qword ptr [C+128]\n"
        ".globl native_leave\n.hidden native_leave\n.type native_leave, @function\n"
        "native_leave:\n"
        "  mov [C+1024], rax\n  mov [C+1032], rcx\n  mov [C+1040], rdx\n  mov [C+1048], rbx\n  mov [C+1056], rsp\n"
        "  mov [C+1064], rbp\n  mov [C+1072], rsi\n  mov [C+1080], rdi\n  mov [C+1088], r8\n  mov [C+1096], r9\n"
        "  mov [C+1104], r10\n  mov [C+1112], r11\n  mov [C+1120], r12\n  mov [C+1128], r13\n  mov [C+1136], r14\n"
        "  mov [C+1144], r15\n"
        "  mov rsp, [C+2048]\n"
        "  pushfq\n  pop qword ptr [C+1160]\n  push 2\n  popfq\n"
        "  mov ecx, 0x2b\n  mov ds, ecx\n  mov es, ecx\n  mov ss, ecx\n"
        "  xor ecx, ecx\n  mov fs, ecx\n  mov gs, ecx\n  mov rcx, [C+2104]\n  wrfsbase rcx\n"
        "  mov eax, 7\n  xor edx, edx\n"
        "  mov ecx, C+1216\n"
        "  xsave64 [rcx]\n"
        "  mov rbp, [C+2056]\n  mov rbx, [C+2064]\n  mov r12, [C+2072]\n"
        "  mov r13, [C+2080]\n  mov r14, [C+2088]\n  mov r15, [C+2096]\n"
        "  ret\n"
        ".globl native_signal\n.hidden native_signal\n.type native_signal, @function\n"
        "native_signal:\n"
        "  push 2\n  popfq\n"
        "  mov ecx, 0x2b\n  mov ds, ecx\n  mov es, ecx\n"
        "  xor ecx, ecx\n  mov fs, ecx\n  mov gs, ecx\n  mov rcx, [C+2104]\n  wrfsbase rcx\n"
        "  jmp native_on_signal\n"
        ".att_syntax\n");

static struct context *const context = (struct context *)N_CONTEXT;
static native_batch *batch;
static pid_t child;
static int to_child, from_child;
static sigjmp_buf escape;
static native_result *current;

void native_fill(unsigned char *data, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes; i += 8) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        uint64_t v = seed * UINT64_C(0x2545f4914f6cdd1d);
        if ((v & 7) == 0)
            v = (uint64_t)(int64_t)(int8_t)(v >> 8);        /* small numbers and all ones are more interesting */
        memcpy(data + i, &v, 8);
    }
}

void native_on_signal(int number, siginfo_t *info, void *p)
{
    static const int order[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    const ucontext_t *u = p;
    native_state *s = &current->out;
    (void)number;
    (void)info;
    for (int i = 0; i < 16; i++)
        s->gpr[i] = (uint64_t)u->uc_mcontext.gregs[order[i]];
    s->rip = (uint64_t)u->uc_mcontext.gregs[REG_RIP];
    s->flags = (uint64_t)u->uc_mcontext.gregs[REG_EFL];
    memcpy(s->xsave, u->uc_mcontext.fpregs, sizeof s->xsave);
    current->vector = (int)u->uc_mcontext.gregs[REG_TRAPNO];
    current->error = (uint32_t)u->uc_mcontext.gregs[REG_ERR];
    current->address = (uint64_t)u->uc_mcontext.gregs[REG_CR2];
    siglongjmp(escape, 1);
}

void native_code(unsigned char *page, const native_case *c)
{
    unsigned char *p = page + c->start;
    uint64_t back = (uint64_t)(uintptr_t)native_leave;
    memset(page, 0xcc, N_CODE_BYTES);
    memcpy(p, c->code, c->length);
    p += c->length;
    if (c->bits == 64) {
        memcpy(p, "\xff\x25\x00\x00\x00\x00", 6);          /* jmp [rip]: touches nothing */
        memcpy(p + 6, &back, 8);
    } else {
        uint32_t stub = (uint32_t)(uintptr_t)context->stubs;
        if (c->bits == 16)
            *p++ = 0x66;
        p[0] = 0xea;                                        /* jmp 33:stub */
        memcpy(p + 1, &stub, 4);
        memcpy(p + 5, "\x33\x00", 2);
    }
}

static void place_code(const native_case *c)
{
    mprotect((void *)N_CODE, N_CODE_BYTES, PROT_READ | PROT_WRITE);
    native_code((unsigned char *)N_CODE, c);
    mprotect((void *)N_CODE, N_CODE_BYTES, PROT_READ | PROT_EXEC);
}

static void make_stubs(void)
{
    uint64_t back = (uint64_t)(uintptr_t)native_leave, entry = N_CONTEXT + offsetof(struct context, stubs) + 32;
    memcpy(context->stubs, "\xff\x25\x00\x00\x00\x00", 6);
    memcpy(context->stubs + 6, &back, 8);
    memcpy(context->stubs + 32, "\xff\x2c\x25", 3);         /* 64-bit: jmp far [stubs + 48] into other code */
    uint32_t slot = (uint32_t)(entry + 16);
    memcpy(context->stubs + 35, &slot, 4);
}

/* LDT entry n is for segment n. */
uint16_t native_selector(const native_case *c, unsigned segment)
{
    static const uint16_t flat[N_SEGMENTS] = { 0x2b, 0x23, 0x2b, 0x2b, 0, 0 };
    if (c->bits == 64 && segment == N_CS)
        return 0x33;
    if (c->bits == 64 || !c->has_segments)
        return flat[segment];
    return c->seg[segment].attributes ? (uint16_t)(segment << 3 | 7) : 0;
}

/* The kernel's name of the descriptor; writing one is a system call, so that the last are remembered. */
static void place_segment(unsigned n, const native_segment *s)
{
    static native_segment now[N_SEGMENTS];
    bool is_code = s->attributes & 8, is_down = !is_code && s->attributes & 4;
    struct user_desc d = { .entry_number = n, .base_addr = s->base,
                           .limit = s->attributes & 0x8000 ? s->limit >> 12 : s->limit, .limit_in_pages = s->attributes >> 15,
                           .seg_32bit = s->attributes >> 14 & 1, .contents = is_code ? 2 : is_down, .read_exec_only = !(s->attributes & 2),
                           .useable = 1 };
    if (!s->attributes || !memcmp(s, &now[n], sizeof *s))
        return;
    if (syscall(SYS_modify_ldt, 0x11, &d, sizeof d))
        _exit(4);
    now[n] = *s;
}

static void place_segments(const native_case *c)
{
    context->fs = c->seg[N_FS].base;
    context->gs = c->seg[N_GS].base;
    context->selectors[6] = c->bits == 64;
    for (unsigned i = 0; i < N_SEGMENTS; i++) {
        if (c->bits != 64 && c->has_segments)
            place_segment(i, &c->seg[i]);
        context->selectors[i] = native_selector(c, i);
    }
}

/* Under AddressSanitizer low memory has its shadow where the cases of 32 bits would hit it. It is away while they run: nothing that
 * is checked uses low memory then. */
static void shadow_is(int prot)
{
#ifdef __SANITIZE_ADDRESS__
    size_t scale, shadow;
    __asan_get_shadow_mapping(&scale, &shadow);
    mprotect((void *)shadow, shadow >> scale, prot);
#endif
    (void)prot;
}

static void run_case(const native_case *c, native_result *r)
{
    static unsigned char rest[1024] __attribute__((aligned(64)));
    static bool is_rest_saved;
    if (!is_rest_saved) {
        __asm__ volatile("xsave64 %0" : "+m"(rest) : "a"(7), "d"(0) : "memory");
        is_rest_saved = true;
    }
    current = r;
    context->in = c->in;
    context->in.rip = native_rip(c);
    place_segments(c);
    if (c->bits != 64) {
        uint32_t target = (uint32_t)context->in.rip;
        memcpy(context->stubs + 48, &target, 4);
        memcpy(context->stubs + 52, &context->selectors[N_CS], 2);
        context->in.rip = N_CONTEXT + offsetof(struct context, stubs) + 32;
    }
    native_fill((unsigned char *)N_DATA, N_DATA_BYTES, c->memory_seed);
    place_code(c);
    r->vector = -1;
    r->error = 0;
    r->address = 0;
    if (sigsetjmp(escape, 1) == 0) {
        shadow_is(PROT_NONE);
        native_enter();
        shadow_is(PROT_READ | PROT_WRITE);
        r->out = context->out;
        r->out.rip = native_rip(c) + c->length;
    } else {
        shadow_is(PROT_READ | PROT_WRITE);
    }
    __asm__ volatile("cld\n\txrstor64 %0" : : "m"(rest), "a"(7), "d"(0) : "memory");
    memcpy(r->data, (void *)N_DATA, N_DATA_BYTES);
    r->is_done = true;
}

static bool map_at(uint64_t where, size_t bytes, int prot)
{
    return mmap((void *)where, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == (void *)where;
}

static _Noreturn void serve(int in, int out)
{
    static const int signals[] = { SIGSEGV, SIGILL, SIGFPE, SIGBUS, SIGTRAP };
    static unsigned char stack[65536];
    stack_t ss = { .ss_sp = stack, .ss_size = sizeof stack };
    char byte;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    bool ok = map_at(N_CODE, N_CODE_BYTES, PROT_READ | PROT_WRITE) && map_at(N_CONTEXT, 0x1000, PROT_READ | PROT_WRITE | PROT_EXEC) &&
              map_at(N_DATA, N_DATA_BYTES, PROT_READ | PROT_WRITE) && map_at(N_RO, 0x1000, PROT_READ);
    if (!ok)
        _exit(3);
    (void)*(volatile unsigned char *)N_RO;                  /* present from now on, as the guest's is */
    make_stubs();
    sigaltstack(&ss, NULL);
    struct sigaction sa = { .sa_sigaction = native_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    for (unsigned i = 0; i < sizeof signals / sizeof signals[0]; i++)
        sigaction(signals[i], &sa, NULL);
    while (read(in, &byte, 1) == 1) {
        for (; batch->next < batch->count; batch->next++) {
            alarm(10);                                      /* kills: that case counts as lost */
            run_case(&batch->cases[batch->next], &batch->results[batch->next]);
        }
        alarm(0);
        if (write(out, &byte, 1) != 1)
            break;
    }
    _exit(0);
}

static bool start(void)
{
    int a[2], b[2];
    if (pipe(a) || pipe(b))
        return false;
    child = fork();
    if (child < 0)
        return false;
    if (child == 0) {
        close(a[1]);
        close(b[0]);
        serve(a[0], b[1]);
    }
    close(a[0]);
    close(b[1]);
    to_child = a[1];
    from_child = b[0];
    return true;
}

static void stop(void)
{
    close(to_child);
    close(from_child);
    kill(child, SIGKILL);
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
}

native_batch *native_open(void)
{
    signal(SIGPIPE, SIG_IGN);
    batch = mmap(NULL, sizeof *batch, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (batch == MAP_FAILED || !start())
        return NULL;
    batch->count = 0;
    native_run(batch);
    char byte = 0;
    if (write(to_child, &byte, 1) != 1 || read(from_child, &byte, 1) != 1) {
        stop();
        return NULL;
    }
    return batch;
}

void native_run(native_batch *b)
{
    char byte = 0;
    b->next = 0;
    for (unsigned i = 0; i < b->count; i++)
        b->results[i].is_done = false;
    while (b->next < b->count) {
        if (write(to_child, &byte, 1) == 1 && read(from_child, &byte, 1) == 1)
            continue;
        stop();                                             /* it died in case b->next: go on behind that */
        b->next++;
        if (!start())
            return;
    }
}

void native_close(void) { stop(); }
