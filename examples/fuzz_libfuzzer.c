/* fuzz_libfuzzer - lets libFuzzer (clang -fsanitize=fuzzer) fuzz a program for no operating system in a virtual machine.
 *
 *     fuzz_libfuzzer PROGRAM.elf [libFuzzer's options and corpus directories]
 *
 * The program is one as in target.h (fuzz_target.c is one). Each input runs from a snapshot; libvm counts edges into the section
 * of extra counters that libFuzzer looks at. A crash of the program becomes one of this process, which libFuzzer reports
 * and saves the input of.
 *
 * The custom mutator looks at comparisons: now and then it runs the input in a second machine that logs them, and where one
 * side of a failed comparison is found in the input writes the other side in its place, give or take one. That gets magic
 * numbers and lengths right that random changes hardly hit.
 */
#include "target.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COUNTERS = 1 << 14, LOG = 1 << 12, LIMIT_MS = 1000 };

__attribute__((used, section("__libfuzzer_extra_counters"))) static uint8_t counters[COUNTERS];
static vm_compare log_entries[LOG];
static uint64_t log_head;
static target t, logged;

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

/* The program's path is taken out of the arguments; libFuzzer runs itself again with all of them, hence the environment. */
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *path = getenv("FUZZ_PROGRAM");
    if (*argc > 1 && (*argv)[1][0] != '-') {
        path = (*argv)[1];
        setenv("FUZZ_PROGRAM", path, 1);
        memmove(*argv + 1, *argv + 2, (size_t)(*argc - 1) * sizeof **argv);
        --*argc;
    }
    if (!path) {
        fprintf(stderr, "usage: fuzz_libfuzzer PROGRAM.elf [OPTION...] [CORPUS...]\n");
        exit(2);
    }
    if (target_open(&t, path, "fuzz_target", VM_BACKEND_JIT) || target_open(&logged, path, "fuzz_target", VM_BACKEND_JIT) ||
        vm_coverage(t.m, counters, COUNTERS) || vm_compare_log(logged.cpu, log_entries, LOG, &log_head)) {
        fprintf(stderr, "fuzz_libfuzzer: %s\n", vm_errmsg());
        exit(2);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char text[256];
    int result = target_run(&t, data, size, LIMIT_MS, NULL);
    if (result == 0) return 0;
    target_describe(&t, result, text, sizeof text);
    fprintf(stderr, "fuzz_libfuzzer: %s\n", text);
    abort();
}

static uint32_t random_state;
static uint32_t rnd(void) { return (random_state = random_state * 1103515245 + 12345) >> 8; }

/* Write `to` where `from` stands in the data, looking from a random place on. */
static int replace(uint8_t *data, size_t size, uint64_t from, uint64_t to, size_t n)
{
    if (n > size) return 0;
    for (size_t i = 0, at = rnd() % size; i < size; i++, at = (at + 1) % size)
        if (at + n <= size && !memcmp(data + at, &from, n)) {
            memcpy(data + at, &to, n);
            return 1;
        }
    return 0;
}

static int use_comparison(uint8_t *data, size_t size)
{
    log_head = 0;
    (void)target_run(&logged, data, size, LIMIT_MS, NULL);
    uint64_t count = log_head < LOG ? log_head : LOG;
    for (unsigned tries = 0; count && tries < 16; tries++) {
        const vm_compare *c = &log_entries[rnd() % count];
        uint64_t a = c->a[0], b = c->b[0] + rnd() % 3 - 1;
        size_t n = c->width > 8 ? 8 : c->width;
        if (c->kind == VM_COMPARE_TEST || a == b) continue;
        while (n > 1 && !(a >> (8 * (n - 1)) & 255) && !(b >> (8 * (n - 1)) & 255)) n--; /* small numbers in wide registers */
        if (replace(data, size, a, b, n)) return 1;
    }
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    random_state = seed;
    if (size && rnd() % 8 == 0 && use_comparison(data, size)) return size;
    return LLVMFuzzerMutate(data, size, max_size);
}
