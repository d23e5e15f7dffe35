/* trace - shows the way a program took: every block it entered, by function, from libvm's block trace.
 *
 *     trace [--function NAME] [--summary] PROGRAM.elf INPUT
 *
 * The program is one as in target.h (fuzz_target.c is one). Each line is a block: its address, its function and the offset in
 * it, and how often it was entered in a row. --summary counts the blocks of each function instead. The ring holds the last
 * million blocks; how many came before is said.
 */
#include "target.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RING = 1 << 20, LIMIT_MS = 60000 };

static void print_block(const target *t, uint64_t address, uint64_t times)
{
    const target_symbol *s = target_find(t, address);
    printf("%#" PRIx64, address);
    if (s) printf(" %s+%#" PRIx64, s->name, address - s->address);
    if (times > 1) printf(" x%" PRIu64, times);
    printf("\n");
}

static void print_trace(const target *t, const uint64_t *ring, uint64_t head)
{
    uint64_t at = head > RING ? head - RING : 0, times;
    if (at) printf("... %" PRIu64 " blocks before\n", at);
    for (; at < head; at += times) {
        uint64_t address = ring[at % RING];
        for (times = 1; at + times < head && ring[(at + times) % RING] == address;) times++;
        print_block(t, address, times);
    }
}

static void print_summary(const target *t, const uint64_t *ring, uint64_t head)
{
    uint64_t *counts = calloc(t->symbol_count + 1, sizeof *counts);
    for (uint64_t at = head > RING ? head - RING : 0; counts && at < head; at++) {
        const target_symbol *s = target_find(t, ring[at % RING]);
        counts[s ? (size_t)(s - t->symbols) : t->symbol_count]++;
    }
    for (size_t i = 0; counts && i <= t->symbol_count; i++)
        if (counts[i]) printf("%10" PRIu64 " %s\n", counts[i], i < t->symbol_count ? t->symbols[i].name : "(elsewhere)");
    free(counts);
}

int main(int argc, char **argv)
{
    const char *function = "fuzz_target";
    int is_summary = 0, i = 1;
    uint64_t *ring = calloc(RING, sizeof *ring), head = 0;
    char text[256];
    size_t bytes;
    target t;
    for (; i < argc && argv[i][0] == '-'; i++) {
        if (!strcmp(argv[i], "--summary"))
            is_summary = 1;
        else if (!strcmp(argv[i], "--function") && i + 1 < argc)
            function = argv[++i];
        else
            break;
    }
    if (argc - i != 2 || argv[i][0] == '-')
        return fprintf(stderr, "usage: trace [--function NAME] [--summary] PROGRAM.elf INPUT\n"), 2;
    uint8_t *input = target_read_file(argv[i + 1], &bytes);
    if (!input || !ring) return fprintf(stderr, "%s: cannot be read\n", argv[i + 1]), 2;
    if (target_open(&t, argv[i], function, VM_BACKEND_JIT)) return 2;
    if (vm_block_trace(t.cpu, ring, RING, &head)) return fprintf(stderr, "trace: %s\n", vm_errmsg()), 2;
    int result = target_run(&t, input, bytes, LIMIT_MS, NULL);
    (is_summary ? print_summary : print_trace)(&t, ring, head);
    target_describe(&t, result, text, sizeof text);
    printf("%s\n", text);
    target_close(&t);
    free(input);
    free(ring);
    return result != 0;
}
