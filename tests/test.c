/* test.c - the harness behind test.h. A test's verdict travels from the child in a shared page: exit status alone cannot
 * tell a failed check from a crash in the checked code that happens to exit. */
#define _GNU_SOURCE
#include "test.h"

#include <errno.h>
#include <fnmatch.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct test {
    char *name;
    test_fn fn;
    const void *arg;
    unsigned seconds;
} test;

static test *tests;
static size_t test_count;

enum { RUNNING, PASSED, FAILED, SKIPPED };
static struct verdict {
    int state;
    bool maps_code;                             /* the test has writable code of its own */
    char text[2000];
} *verdict;
static bool one_process;

void test_add(const char *name, test_fn fn, const void *arg, unsigned seconds)
{
    tests = realloc(tests, (test_count + 1) * sizeof *tests);
    if (!tests)
        abort();
    tests[test_count++] = (test){ strdup(name), fn, arg, seconds };
}

unsigned test_patience(void)
{
    const char *text = getenv("TEST_PATIENCE");
    return text ? (unsigned)atoi(text) : 1;
}

void test_runs_a_kernel(void)
{
    unsetenv("LIBVM_JIT_COLD");
}

void test_maps_writable_code(void)
{
    verdict->maps_code = true;
}

static _Noreturn void leave(int state, const char *format, va_list ap, size_t used)
{
    vsnprintf(verdict->text + used, sizeof verdict->text - used, format, ap);
    for (char *p = verdict->text; *p; p++)      /* one line a test */
        if (*p == '\n')
            *p = ' ';
    verdict->state = state;
    if (one_process) {
        printf("%s: %s\n", state == FAILED ? "FAIL" : "skip", verdict->text);
        fflush(stdout);
    }
    _exit(state == FAILED);
}

void test_fail(const char *file, int line, const char *format, ...)
{
    va_list ap;
    const char *base = strrchr(file, '/');
    int used = snprintf(verdict->text, sizeof verdict->text, "%s:%d: ", base ? base + 1 : file, line);
    va_start(ap, format);
    leave(FAILED, format, ap, (size_t)used);
}

void test_skip(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    leave(SKIPPED, format, ap, 0);
}

/* The child's mapping that is writable and executable, if there is one now. */
static bool has_writable_code(pid_t child, char *line, size_t bytes)
{
    char path[40], protection[5];
    bool found = false;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return false;                               /* a sanitizer has mappings of its own */
#endif
    snprintf(path, sizeof path, "/proc/%d/maps", (int)child);
    FILE *f = verdict->maps_code ? NULL : fopen(path, "r");
    while (f && !found && fgets(line, (int)bytes, f))
        found = sscanf(line, "%*s %4s", protection) == 1 && protection[1] == 'w' && protection[2] == 'x';
    if (f)
        fclose(f);
    line[strcspn(line, "\n")] = '\0';
    return found && !verdict->maps_code;
}

/* Waits for the child to end: its end of the pipe closes then. False: not in time. Now and then, rarely in the end, its mappings are looked
 * at: `code` is what was writable and executable. */
static bool wait_for(pid_t child, int fd, unsigned seconds, int *status, char *code, size_t bytes)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    uint64_t left = UINT64_C(1000) * seconds;
    char line[200] = "";
    int r = 0;
    *code = '\0';
    for (uint64_t slice = 1; left && r == 0; left -= slice, slice = slice < 64 ? 2 * slice : 64) {
        slice = slice < left ? slice : left;
        do
            r = poll(&p, 1, (int)slice);
        while (r < 0 && errno == EINTR);
        if (r == 0 && !*code && has_writable_code(child, line, sizeof line))
            snprintf(code, bytes, "%s", line);
    }
    if (r == 0)
        kill(-child, SIGKILL);
    kill(child, r == 0 ? SIGKILL : 0);
    while (waitpid(child, status, 0) < 0 && errno == EINTR)
        ;
    return r != 0;
}

static int run_child(const test *t, unsigned seconds, char *why, size_t bytes)
{
    int fds[2], status = 0;
    char code[200];
    memset(verdict, 0, sizeof *verdict);
    fflush(NULL);
    if (pipe(fds) < 0)
        abort();
    pid_t child = fork();
    if (child < 0)
        abort();
    if (child == 0) {
        setpgid(0, 0);
        close(fds[0]);
        t->fn(t->arg);
        fflush(NULL);
        verdict->state = PASSED;
        exit(0);                                /* through atexit: a leak checker has its say there */
    }
    setpgid(child, child);
    close(fds[1]);
    bool in_time = wait_for(child, fds[0], seconds, &status, code, sizeof code);
    close(fds[0]);
    if (!in_time)
        snprintf(why, bytes, "no end after %u s", seconds);
    else if (WIFSIGNALED(status))
        snprintf(why, bytes, "killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else if (verdict->state == RUNNING)
        snprintf(why, bytes, "exited with status %d before its end", WEXITSTATUS(status));
    else if (verdict->state == PASSED && status)
        snprintf(why, bytes, "exit status %d after its end (leak?)", WEXITSTATUS(status));
    else if (*code)
        snprintf(why, bytes, "writable and executable: %s", code);
    else
        snprintf(why, bytes, "%s", verdict->text);
    if (*code || !in_time || WIFSIGNALED(status) || verdict->state == RUNNING || (verdict->state == PASSED && status))
        return FAILED;
    return verdict->state;
}

static bool selected(const char *full, const char *name, char **patterns, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(patterns[i], name) || !fnmatch(patterns[i], full, 0) || !fnmatch(patterns[i], name, 0))
            return true;
    return count == 0;
}

int main(int argc, char **argv)
{
    bool list = false;
    unsigned failed = 0, limit = getenv("TEST_TIMEOUT") ? (unsigned)atoi(getenv("TEST_TIMEOUT")) : 60;
    bool is_limit_given = false;
    int option;
    setenv("LIBVM_JIT_COLD", "0", 0); /* tests of the JIT are to meet the JIT */
    const char *program = strrchr(argv[0], '/');
    program = program ? program + 1 : argv[0];
    if (!strncmp(program, "lt-", 3))
        program += 3;
    while ((option = getopt(argc, argv, "lnt:")) != -1) {
        switch (option) {
        case 'l': list = true; break;
        case 'n': one_process = true; break;
        case 't': limit = (unsigned)atoi(optarg); is_limit_given = true; break;
        default: fprintf(stderr, "usage: %s [-l] [-n] [-t seconds] [name or pattern]...\n", argv[0]); return 2;
        }
    }
    verdict = mmap(NULL, sizeof *verdict, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (verdict == MAP_FAILED)
        abort();
    for (size_t i = 0; i < test_count; i++) {
        const test *t = &tests[i];
        char full[256], why[2100] = "";
        snprintf(full, sizeof full, "%s.%s", program, t->name);
        if (!selected(full, t->name, argv + optind, argc - optind))
            continue;
        if (list) {
            puts(full);
            continue;
        }
        if (one_process) {
            printf("run %s\n", full);
            fflush(stdout);
            t->fn(t->arg);
            printf("ok %s\n", full);
            continue;
        }
        switch (run_child(t, (t->seconds && !is_limit_given ? t->seconds : limit) * test_patience(), why, sizeof why)) {
        case PASSED: printf("ok %s\n", full); break;
        case SKIPPED: printf("skip %s: %s\n", full, why); break;
        default: printf("FAIL %s: %s\n", full, why); failed++; break;
        }
        fflush(stdout);
    }
    return failed ? 1 : 0;
}
