/* gdb_guest.c - the program that tests/guests/gdb debugs inside a guest: no library, so that its symbols and addresses are
 * all its own. */
typedef double quad __attribute__((vector_size(32)));

volatile long counter;
volatile quad lanes;
char message[] = "seen by the debugger";

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

__attribute__((noinline)) long add_up(long first, long second)
{
    long sum = first + second;
    counter = sum;
    return sum;
}

__attribute__((noinline)) void fill_vectors(void)
{
    const double values[4] = { 1.5, -2, 3.25, 1e10 };
    __asm__ volatile("vmovupd %0, %%ymm3" : : "m"(values) : "xmm3");
    __asm__ volatile("vmovupd %%ymm3, %0\n.globl vectors_filled\nvectors_filled: nop" : "=m"(lanes));
}

void run(void)
{
    long total = 0;
    for (long i = 0; i < 3; i++)
        total += add_up(i, 40);
    fill_vectors();
    counter = 1000;
    call(1, 1, (long)(total == 123 ? "guest: sums are right\n" : "guest: sums are wrong\n"), 22);
    call(60, 7, 0, 0);
}

__asm__(".globl _start\n_start: and $-32, %rsp\n call run\n");
