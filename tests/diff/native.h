/* native.h - runs short instruction sequences on the host CPU, in a forked child that may crash without harm.
 *
 * The child keeps the memory window at the same addresses as the guest has it; a trampoline loads every register, jumps to the
 * code and saves every register when the code's last jump comes back, or a signal handler takes them from its context. */
#ifndef LIBVM_DIFF_NATIVE_H
#define LIBVM_DIFF_NATIVE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define N_CODE UINT64_C(0x200000)       /* two pages, execute and read */
#define N_CODE_BYTES 0x2000u
#define N_CONTEXT UINT64_C(0x300000)    /* the child's own: registers and exit stubs */
#define N_DATA UINT64_C(0x400000)       /* three pages, read and write; absent pages on both sides */
#define N_DATA_BYTES 0x3000u
#define N_RO UINT64_C(0x404000)         /* one page, read-only */

typedef struct native_state {
    uint64_t gpr[16];                   /* RAX RCX RDX RBX RSP RBP RSI RDI R8 ... */
    uint64_t rip, flags;
    unsigned char xsave[832] __attribute__((aligned(64)));
} native_state;

enum { N_ES, N_CS, N_SS, N_DS, N_FS, N_GS, N_SEGMENTS };
typedef struct native_segment {
    uint32_t base, limit;
    uint16_t attributes;                /* bytes 5 and 6 of a descriptor, as in vm_segment; 0: a null selector */
} native_segment;

typedef struct native_case {
    native_state in;
    unsigned char code[256];
    unsigned start, length, bits;       /* code lies at N_CODE + start; bits 64, 32 or 16 */
    bool has_segments;                  /* else all are flat; in 64-bit code only FS.base and GS.base count */
    native_segment seg[N_SEGMENTS];     /* SS not null; CS.base N_CODE or 0 */
    uint64_t memory_seed;
} native_case;

typedef struct native_result {
    native_state out;
    bool is_done;                       /* false: the child died in it */
    int vector;                         /* -1: reached the end */
    uint32_t error;
    uint64_t address;
    unsigned char data[N_DATA_BYTES];
} native_result;

enum { NATIVE_BATCH = 64 };
typedef struct native_batch {
    native_case cases[NATIVE_BATCH];
    native_result results[NATIVE_BATCH];
    unsigned count;
    volatile unsigned next;
} native_batch;

/* Starts the child; the batch is shared with it. NULL: the window is taken in this process. */
native_batch *native_open(void);
void native_run(native_batch *b);
void native_close(void);
/* What the window holds at the start of a case. */
void native_fill(unsigned char *data, size_t bytes, uint64_t seed);
/* RIP of the first instruction, as the code sees it. */
static inline uint64_t native_rip(const native_case *c)
{
    return N_CODE + c->start - (c->has_segments && c->bits != 64 ? c->seg[N_CS].base : 0);
}
/* The selector that a segment has in the child, which the code can store. */
uint16_t native_selector(const native_case *c, unsigned segment);
/* The code pages of a case, with the way back behind the snippet. */
void native_code(unsigned char *page, const native_case *c);
#endif
