/* guest_main.c - the kernels as a Linux program: runs each, or the named ones, and prints "bench NAME N MICROSECONDS RESULT", and
 * "begin NAME" and "end" around each round for who measures from outside.
 * Static, for an initramfs; native, in libvm and in a peer's guest the very same file is run. Besides the kernels: a loop of
 * system calls, one of page faults, one of fork and exec of busybox. Built for 64 and for 32 bits (the integer kernels only).
 *
 * usage: guest_main [--busybox FILE] [NAME...]
 */
#define _GNU_SOURCE 1
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define KERNELS_ARE_HOSTED 1
#include "kernels.c"

static const char *busybox = "/bin/busybox";

static u64 run_syscall(u64 n)
{
    u64 sum = 0;
    while (n--)
        sum += (u64)syscall(SYS_getppid) != 0;
    return sum;
}

static u64 run_pagefault(u64 rounds)
{
    enum { BYTES = 4 << 20 };
    u64 sum = 0;
    while (rounds--) {
        volatile u8 *p = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            return 0;
        madvise((void *)p, BYTES, MADV_NOHUGEPAGE);
        for (int i = 0; i < BYTES; i += 4096)
            p[i] = 1, sum++;
        munmap((void *)p, BYTES);
    }
    return sum;
}

static u64 run_forkexec(u64 n)
{
    u64 good = 0;
    while (n--) {
        int status = -1;
        pid_t child = fork();
        if (!child) {
            execl(busybox, "busybox", "true", (char *)NULL);
            _exit(127);
        }
        good += waitpid(child, &status, 0) == child && !status;
    }
    return good;
}

static const struct { const char *name; u64 n; u64 (*run)(u64); } jobs[] = {
    { "fib", 32, run_fib }, { "sieve", 6, run_sieve }, { "sha1", 60000, run_sha1 }, { "chase", 3000000, run_chase },
#ifdef __x86_64__
    { "matmul", 4, run_matmul }, { "mandel", 220, run_mandel },
#endif
    { "qsort", 400000, run_qsort }, { "bytecode", 2000000, run_bytecode }, { "memcpy", 40, run_memcpy },
#ifdef __x86_64__
    { "aes", 1000000, run_aes }, { "crc32", 20000000, run_crc32 }, { "avx2dot", 5000, run_avx2dot }, { "x87", 5000000, run_x87 },
    { "syscall", 300000, run_syscall }, { "pagefault", 20, run_pagefault }, { "forkexec", 200, run_forkexec },
#endif
};

static u64 now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (u64)t.tv_sec * 1000000 + (u64)t.tv_nsec / 1000;
}

/* The kernels are measured by the thread's own time; what happens in the kernel and in children by the wall's. */
static void run_job(unsigned i)
{
    u64 best = ~(u64)0, result = 0;
#ifdef __x86_64__
    if (jobs[i].run == run_avx2dot && !__builtin_cpu_supports("avx2"))
        return;
#endif
    for (int round = 0; round < 2; round++) {
        printf("begin %s\n", jobs[i].name);
        fflush(stdout);
        clockid_t clock = jobs[i].run == run_forkexec ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID;
        u64 t = now(clock);
        result = jobs[i].run(jobs[i].n);
        t = now(clock) - t;
        if (t < best)
            best = t;
        printf("end\n");
        fflush(stdout);
    }
    printf("bench %s%s %llu %llu %llx\n", jobs[i].name, sizeof(void *) == 4 ? "-32" : "", (unsigned long long)jobs[i].n,
           (unsigned long long)best, (unsigned long long)result);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    int first = 1;
    if (argc > 2 && !strcmp(argv[1], "--busybox"))
        busybox = argv[2], first = 3;
    for (unsigned i = 0; i < sizeof jobs / sizeof *jobs; i++) {
        int is_wanted = argc <= first;
        for (int a = first; a < argc; a++)
            is_wanted |= !strcmp(argv[a], jobs[i].name);
        if (is_wanted)
            run_job(i);
    }
    return 0;
}
