/* test.h - a small test harness: self-registering tests, each in a child process with a time limit.
 *
 *     #include "test.h"
 *     TEST(unmap_twice)                 // registered under "PROGRAM.unmap_twice"
 *     {
 *         CHECK(vm_unmap(m, r) == VM_OK);
 *         CHECK_EQ(vm_unmap(m, r), VM_E_NOTFOUND);
 *     }
 *
 * Every test prints one line: `ok NAME`, `FAIL NAME: why`, or `skip NAME: reason`. A test that crashes or overruns its time
 * fails and the others go on; so does one whose process is ever seen with memory that is writable and executable at once.
 * Programs made of many like cases (a table times backends) register each with test_add() from a SETUP block. On the command
 * line: names or shell patterns to run, `-l` lists, `-n` stays in one process (for a debugger), `-t SECONDS` sets the limit
 * of a test (default 60, or TEST_TIMEOUT).
 */
#ifndef LIBVM_TEST_H
#define LIBVM_TEST_H

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*test_fn)(const void *arg);
/* `name` is copied. seconds 0: the default limit. */
void test_add(const char *name, test_fn fn, const void *arg, unsigned seconds);
/* What every limit is multiplied with: TEST_PATIENCE, for builds that are slow on purpose. A test's own limits should be, too. */
unsigned test_patience(void);
/* So many seconds as a deadline_ns. */
#define TEST_SECONDS(n) (UINT64_C(1000000000) * (n) * test_patience())

/* From here on the JIT leaves code that it has met seldom to the interpreter, as in any program, and not, as in other tests, none:
 * for guests that execute more code than a small cache holds. */
void test_runs_a_kernel(void);

/* This test has memory of its own that is writable and executable: it is not looked for. */
void test_maps_writable_code(void);

_Noreturn void test_fail(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));
_Noreturn void test_skip(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define TEST_LIMIT(name, seconds)                                                   \
    static void test_##name(const void *arg);                                       \
    __attribute__((constructor)) static void test_register_##name(void)             \
    {                                                                               \
        test_add(#name, test_##name, NULL, seconds);                                \
    }                                                                               \
    static void test_##name(const void *arg __attribute__((unused)))
#define TEST(name) TEST_LIMIT(name, 0)
/* Runs before main, to call test_add(). */
#define SETUP(name) __attribute__((constructor)) static void test_setup_##name(void)

#define FAIL(...) test_fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition))                                                           \
            FAIL("%s", #condition);                                                 \
    } while (0)
/* Integers, printed in decimal and hexadecimal when they differ. */
#define CHECK_EQ(got, want)                                                         \
    do {                                                                            \
        uint64_t test_got = (uint64_t)(got), test_want = (uint64_t)(want);          \
        if (test_got != test_want)                                                  \
            FAIL("%s is %" PRId64 " (%#" PRIx64 "), not %" PRId64 " (%#" PRIx64 ")", #got, (int64_t)test_got, \
                 test_got, (int64_t)test_want, test_want);                          \
    } while (0)
/* A libvm call that must succeed; the message of the library is shown when it does not. */
#define OK(call)                                                                    \
    do {                                                                            \
        int test_status = (call);                                                   \
        if (test_status != 0)                                                       \
            FAIL("%s: %d, %s", #call, test_status, vm_errmsg());                    \
    } while (0)
/* A libvm call that must fail with this status, and say why. */
#define REFUSED(call, status)                                                       \
    do {                                                                            \
        int test_status = (call);                                                   \
        if (test_status != (status))                                                \
            FAIL("%s: %d, not %s", #call, test_status, #status);                    \
        if (vm_errmsg()[0] == '\0')                                                 \
            FAIL("%s: no message", #call);                                          \
    } while (0)

#endif
