/* mmu_guest.c - loads for mmu_linux.c, a static program in a Linux guest: each is a different quarrel with the MMU. For every load
 * ROUNDS rounds,
 * with "select LOAD", "begin LOAD", "end RESULT" lines on the console: between the first two
 * a run that is not measured; mmu_linux.c changes the strategy at the first.
 *
 * usage: mmu_guest ROUNDS [LOAD]
 */
#define _GNU_SOURCE 1
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static const char busybox[] = "/bin/busybox";

/* Page tables made, changed and torn down: programs started, a process of 16 MiB forked, and files mapped, changed in their
 * rights and unmapped, each page looked at between the changes. The pages are there beforehand: what is edited is tables. */
enum { CHURN_BYTES = 16 << 20, STORMS = 40 };

static uint64_t touch(const volatile char *p, int bytes)
{
    uint64_t sum = 0;
    for (int at = 0; at < bytes; at += 4096)
        sum += (uint64_t)p[at];
    return sum;
}

static char *map_file(int bytes)
{
    static int fd = -1;
    if (fd < 0 && ((fd = memfd_create("churn", 0)) < 0 || ftruncate(fd, CHURN_BYTES)))
        exit(2);
    char *p = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (p == MAP_FAILED)
        exit(2);
    return p;
}

static uint64_t spawn(bool is_exec, const char *own)
{
    int status = -1;
    pid_t child = fork();
    if (!child && is_exec)
        execl(busybox, "busybox", "true", (char *)NULL);
    if (!child)
        _exit(is_exec ? 127 : touch(own, CHURN_BYTES) != CHURN_BYTES / 4096);
    return waitpid(child, &status, 0) == child && !status;
}

static uint64_t churn(void)
{
    enum { BYTES = 4 << 20 };
    static char *own;
    uint64_t sum = 0;
    if (!own) {
        own = mmap(NULL, CHURN_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (own == MAP_FAILED)
            exit(2);
        madvise(own, CHURN_BYTES, MADV_NOHUGEPAGE);
        for (int at = 0; at < CHURN_BYTES; at += 4096)
            own[at] = 1;
    }
    for (int i = 0; i < STORMS; i++) {
        char *p = map_file(BYTES);
        sum += touch(p, BYTES);
        for (int k = 0; k < 4; k++) {
            mprotect(p, BYTES, k & 1 ? PROT_READ | PROT_WRITE : PROT_READ);
            sum += touch(p, BYTES);
        }
        munmap(p, BYTES);
        if (i % 4 == 0)
            sum += spawn(i % 8 == 0, own);
    }
    return sum;
}

/* 1 GiB of linear memory, all of it the kernel's page of zeros: translations and not the data miss the host's caches, and the
 * guest needs no gigabyte. */
enum { GIGABYTE = 1 << 30 };
static volatile uint64_t *gigabyte(void)
{
    static volatile uint64_t *all;
    if (all)
        return all;
    char *at = mmap(NULL, GIGABYTE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        exit(2);
    madvise(at, GIGABYTE, MADV_NOHUGEPAGE);
    for (long i = 0; i < GIGABYTE; i += 4096)
        (void)*(volatile char *)(at + i);
    return all = (volatile uint64_t *)at;
}

static uint64_t misses(void)
{
    volatile uint64_t *p = gigabyte();
    uint64_t x = 12345, sum = 0;
    for (int i = 0; i < 1500000; i++) {
        x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        sum += p[(x >> 33) % (GIGABYTE / 8)];
    }
    return sum + x;
}

/* Two processes and two pipes, each touching some memory of its own at every turn. */
enum { TURNS = 8000, OWN = 128 * 4096 };
static void bounce(int in, int out, int turns, volatile char *own)
{
    char c = 0;
    while (turns--) {
        if (read(in, &c, 1) != 1)
            return;
        for (int at = 0; at < OWN; at += 4096)
            own[at] = (char)(own[at] + 1);
        if (write(out, &c, 1) != 1)
            return;
    }
}

static uint64_t switches(void)
{
    static char own[OWN];
    int there[2], back[2], status = -1;
    if (pipe(there) || pipe(back))
        return 0;
    pid_t child = fork();
    if (!child) {
        bounce(there[0], back[1], TURNS, own);
        _exit(0);
    }
    char c = 'x';
    if (write(there[1], &c, 1) != 1)
        return 0;
    bounce(back[0], there[1], TURNS, own);
    waitpid(child, &status, 0);
    for (int i = 0; i < 2; i++)
        close(there[i]), close(back[i]);
    return status == 0;
}

static uint64_t compute(void)
{
    static double a[128][128], b[128][128], c[128][128];
    uint64_t sum;
    for (int i = 0; i < 128; i++)
        for (int k = 0; k < 128; k++)
            a[i][k] = i + k, b[i][k] = i - k, c[i][k] = 0;
    for (int r = 0; r < 30; r++)
        for (int i = 0; i < 128; i++)
            for (int j = 0; j < 128; j++) {
                double s = 0;
                for (int k = 0; k < 128; k++)
                    s += a[i][k] * b[k][j];
                c[i][j] += s;
            }
    memcpy(&sum, &c[5][7], 8);
    return sum;
}

static const struct { const char *name; uint64_t (*run)(void); } loads[] = {
    { "churn", churn }, { "misses", misses }, { "switches", switches }, { "compute", compute },
};

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    for (unsigned i = 0; i < sizeof loads / sizeof *loads; i++) {
        if (argc > 2 && strcmp(argv[2], loads[i].name))
            continue;
        if (loads[i].run == misses)
            (void)gigabyte();
        for (int r = 0; r < rounds; r++) {
            printf("select %s\n", loads[i].name);
            fflush(stdout);
            (void)loads[i].run();      /* once to have the strategy know it */
            printf("begin %s\n", loads[i].name);
            fflush(stdout);
            uint64_t result = loads[i].run();
            printf("end %llx\n", (unsigned long long)result);
            fflush(stdout);
        }
    }
    return 0;
}
