/* target.h - what the fuzzing examples share: a program for no operating system in a bare machine, called with an input again and
 * again from one snapshot.
 *
 * The program is a static ELF file for x86-64 with a function
 *     void fuzz_target(const uint8_t *data, size_t size);
 * It has memory where its segments are, a stack, and its input, which ends where its memory ends: reading beyond is an access to
 * nothing. Nothing else exists; an exception or such an access is a crash.
 */
#ifndef EXAMPLES_TARGET_H
#define EXAMPLES_TARGET_H

#include <libvm/libvm.h>

enum { TARGET_INPUT_MAX = 1 << 20, TARGET_INPUT_END = 0x70000000, TARGET_STACK_END = 0x7fff0000, TARGET_STACK_BYTES = 1 << 18,
       TARGET_RETURN = TARGET_STACK_END };                 /* HLT: the function has returned */

typedef struct target_symbol { uint64_t address, bytes; const char *name; } target_symbol;
typedef struct target {
    vm_machine *m;
    vm_vcpu *cpu;
    uint8_t *input;                    /* host address of the input's end */
    uint64_t entry, code_bytes;
    vm_snapshot *start;
    vm_exit exit;                      /* how the last run ended */
    uint8_t *file;
    target_symbol *symbols;            /* functions, by address */
    size_t symbol_count;
} target;

/* Results of target_run() besides 0 and the signal a process would have died of. */
enum { TARGET_HANG = -1, TARGET_BROKEN = -2 };

/* Loads the program into a new machine and takes the snapshot. 0, or -1 with a message on standard error. */
int target_open(target *t, const char *path, const char *function, vm_backend backend);
void target_close(target *t);
/* From the snapshot, with `size` bytes of data, for at most `ms` milliseconds. go_on, if set, is asked every few milliseconds. */
int target_run(target *t, const void *data, size_t size, unsigned ms, int (*go_on)(void));
/* The function that holds an address; NULL: none. */
const target_symbol *target_find(const target *t, uint64_t address);
/* What happened, in a line. */
void target_describe(const target *t, int result, char *text, size_t bytes);
/* A whole file in memory, NULL on failure. */
uint8_t *target_read_file(const char *path, size_t *bytes);

#endif
