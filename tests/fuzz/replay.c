/* replay.c - main() of a fuzz target without libFuzzer: files, or the corpus and pseudo-random inputs. See fuzz.h. */
#include "fuzz.h"
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

/* Targets keep machines from one input to the next, whose parts hang together by memory that a leak checker does not look through. */
const char *__asan_default_options(void);
__attribute__((visibility("default"), used)) const char *__asan_default_options(void)
{
    return "detect_leaks=0";
}

static int run_file(const char *path)
{
    static uint8_t bytes[1 << 20];
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) {
        perror(path);
        return 1;
    }
    size_t n = fread(bytes, 1, sizeof bytes, f);
    if (f != stdin)
        fclose(f);
    LLVMFuzzerTestOneInput(bytes, n);
    return 0;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* All files of the target's corpus, in the order of their names. */
static int run_corpus(void)
{
    const char *top = getenv("top_srcdir");
    char directory[4096], path[8192];
    char *names[4096];
    size_t count = 0;
    int status = 0;
    snprintf(directory, sizeof directory, "%s/tests/fuzz/corpus/%s", top ? top : ".", fuzz_target.name);
    DIR *d = opendir(directory);
    if (!d)
        return 0;
    for (struct dirent *e; (e = readdir(d)) && count < sizeof names / sizeof *names;)
        if (e->d_name[0] != '.')
            names[count++] = strdup(e->d_name);
    closedir(d);
    qsort(names, count, sizeof *names, by_name);
    for (size_t i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        status |= run_file(path);
        free(names[i]);
    }
    printf("%zu inputs of the corpus\n", count);
    return status;
}

static void run_random(void)
{
    uint8_t *bytes = malloc(fuzz_target.most);
    uint32_t seed = 1;
    for (unsigned round = 0; bytes && round < fuzz_target.rounds; round++) {
        for (size_t i = 0; i < fuzz_target.most; i++) {
            seed = seed * 1664525 + 1013904223;
            bytes[i] = (uint8_t)(seed >> 24);
        }
        LLVMFuzzerTestOneInput(bytes, fuzz_target.most - (round * 7) % (fuzz_target.most / 2 + 1));
    }
    free(bytes);
}

int main(int argc, char **argv)
{
    int status = 0;
    for (int i = 1; i < argc; i++)
        status |= run_file(argv[i]);
    if (argc > 1)
        return status;
    setenv("LIBVM_JIT_COLD", "0", 1);
    status = run_corpus();
    run_random();
    printf(status ? "FAIL fuzz.%s: an input cannot be read\n" : "ok fuzz.%s\n", fuzz_target.name);
    return status;
}
