/* fuzz_afl - lets afl-fuzz (AFL++) fuzz a program for no operating system in a virtual machine.
 *
 *     afl-fuzz -i seeds -o findings -- fuzz_afl [--function NAME] [--interp] [--fork] PROGRAM.elf
 *     fuzz_afl PROGRAM.elf INPUT...        run inputs once each and say what happens
 *
 * The program (see target.h, fuzz_target.c) is loaded once and a snapshot taken. To afl-fuzz this tool is a fork server that takes
 * its test cases from shared memory. But it does not fork: each test case runs from the snapshot, edges are counted by libvm
 * straight into the map that afl-fuzz reads, and an exception or an access to nothing is reported as the signal that would have
 * killed a process. --fork does fork for each test case, as emulators without snapshots do; it is there to be compared with.
 *
 * The protocol: descriptor 198 is read, 199 written, four bytes at a time. First the server says what it can do; afl-fuzz answers
 * if shared-memory test cases were among it. Then, for each test case, afl-fuzz writes a word; the server answers with the
 * process that runs it and, when that is done, with its status as waitpid() gives it. A test case that takes too long is killed
 * by afl-fuzz: the process it is told of here is one that only sleeps, and the run ends when it is gone.
 *
 * Most of the time of a short test case goes to waking each other. So both answers to one that is done within milliseconds
 * are one write, and the map is no larger than the program needs: afl-fuzz walks through all of it each time.
 */
#define _GNU_SOURCE 1
#include "target.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FROM_AFL = 198, TO_AFL = 199, MAP_LEAST = 1 << 12, MAP_MOST = 1 << 16, FOREVER_MS = 600000, ALONE_MS = 10000 };
#define CAN_OPTIONS  0x80000001u
#define CAN_MAP_SIZE(bytes) (0x40000000u | ((bytes) - 1) << 1)
#define CAN_SHARED   0x01000000u

static uint8_t *attach(const char *variable)
{
    const char *id = getenv(variable);
    uint8_t *p = id ? shmat(atoi(id), NULL, 0) : (void *)-1;
    return p == (void *)-1 ? NULL : p;
}

static int get(uint32_t *word) { return read(FROM_AFL, word, 4) == 4; }
static int put(uint32_t word) { return write(TO_AFL, &word, 4) == 4; }

/* ---- the process that afl-fuzz may kill ---- */

static pid_t sleeper;

/* It must not outlive the server, nor hold descriptors whose closing somebody waits for. */
static void start_sleeper(void)
{
    pid_t server = getpid();
    sleeper = fork();
    if (sleeper) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close_range(0, ~0u, 0);
    while (getppid() == server) pause();
    _exit(0);
}

static int is_announced;                                   /* afl-fuzz knows of it for this test case */

/* The test case takes its time: now somebody may want to kill it. */
static int sleeper_lives(void)
{
    if (!is_announced) is_announced = put((uint32_t)sleeper);
    return is_announced && waitpid(sleeper, NULL, WNOHANG) == 0;
}

/* ---- test cases ---- */

static uint32_t status_of(int result) { return result > 0 ? (uint32_t)result : result < 0 ? SIGKILL : 0; }

static int run_here(target *t, const uint8_t *data, uint32_t size)
{
    is_announced = 0;
    int result = target_run(t, data, size, FOREVER_MS, sleeper_lives);
    if (result == TARGET_BROKEN) return -1;
    uint32_t answers[2] = {(uint32_t)sleeper, status_of(result)};
    if (is_announced ? !put(answers[1]) : write(TO_AFL, answers, 8) != 8) return -1;
    if (result == TARGET_HANG) start_sleeper();
    return 0;
}

/* The machine has not run yet: each child finds it as it was loaded, and dies with what it did. */
static int run_forked(target *t, const uint8_t *data, uint32_t size)
{
    int status = 0;
    pid_t child = fork();
    if (child < 0) return -1;
    if (!child) {
        int result = target_run(t, data, size, FOREVER_MS, NULL);
        if (result > 0) {
            signal(result, SIG_DFL);
            raise(result);
        }
        _exit(0);
    }
    return put((uint32_t)child) && waitpid(child, &status, 0) == child && put((uint32_t)status) ? 0 : -1;
}

static int serve(target *t, uint8_t *map, uint32_t map_bytes, const uint8_t *shared, int forks)
{
    uint32_t word;
    if (!put(CAN_OPTIONS | CAN_MAP_SIZE(map_bytes) | (shared ? CAN_SHARED : 0))) return 1;
    if (shared && (!get(&word) || word != (CAN_OPTIONS | CAN_SHARED))) return 1;
    if (!forks) start_sleeper();
    while (get(&word)) {
        uint8_t from_stdin[65536];
        uint32_t size = 0;
        ssize_t n;
        if (shared)
            memcpy(&size, shared, 4);
        else if (lseek(0, 0, SEEK_SET) == 0 && (n = read(0, from_stdin, sizeof from_stdin)) > 0)
            size = (uint32_t)n;
        map[0] = 1; /* afl-fuzz takes an empty map for a program without counters */
        if ((forks ? run_forked : run_here)(t, shared ? shared + 4 : from_stdin, size)) {
            fprintf(stderr, "fuzz_afl: %s\n", vm_errmsg());
            break;
        }
    }
    if (!forks) kill(sleeper, SIGKILL);
    return 0;
}

/* A few counters for each byte of code: there is a branch every ten bytes or so. */
static uint32_t map_size(const target *t)
{
    uint32_t bytes = MAP_LEAST;
    while (bytes < MAP_MOST && bytes < 4 * t->code_bytes) bytes *= 2;
    return bytes;
}

static int run_files(target *t, char **files)
{
    int crashes = 0;
    for (; *files; files++) {
        size_t size;
        char text[256];
        uint8_t *data = target_read_file(*files, &size);
        if (!data) {
            fprintf(stderr, "%s: cannot be read\n", *files);
            return 2;
        }
        int result = target_run(t, data, size, ALONE_MS, NULL);
        target_describe(t, result, text, sizeof text);
        printf("%s: %s\n", *files, text);
        crashes |= result != 0;
        free(data);
    }
    return crashes;
}

int main(int argc, char **argv)
{
    const char *function = "fuzz_target";
    vm_backend backend = VM_BACKEND_JIT;
    int forks = 0, i = 1, code;
    target t;
    for (; i < argc && argv[i][0] == '-'; i++) {
        if (!strcmp(argv[i], "--function") && i + 1 < argc)
            function = argv[++i];
        else if (!strcmp(argv[i], "--interp"))
            backend = VM_BACKEND_INTERP;
        else if (!strcmp(argv[i], "--fork"))
            forks = 1;
        else
            break;
    }
    if (i == argc || argv[i][0] == '-')
        return fprintf(stderr, "usage: fuzz_afl [--function NAME] [--interp] [--fork] PROGRAM.elf [INPUT...]\n"), 2;
    if (target_open(&t, argv[i], function, backend)) return 2;
    uint8_t *map = attach("__AFL_SHM_ID"), *shared = attach("__AFL_SHM_FUZZ_ID");
    uint32_t map_bytes = map_size(&t);
    if (map && vm_coverage(t.m, map, map_bytes)) return fprintf(stderr, "fuzz_afl: %s\n", vm_errmsg()), 2;
    code = map ? serve(&t, map, map_bytes, shared, forks) : run_files(&t, argv + i + 1);
    target_close(&t);
    return code;
}
