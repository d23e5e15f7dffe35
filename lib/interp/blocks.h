/* blocks.h - decoded instructions, kept by guest-physical address.
 *
 * A block is a run of decoded instructions inside one page, ended by a branch, a page end or BLOCK_INSNS. An instruction that
 * crosses a page is a block of its own, found by its first byte only; whoever runs it compares its bytes with both pages
 * first, so nobody has to be told when one of them changes.
 * Blocks live in an arena that is emptied as a whole when it is full; a dropped block is unlinked and its memory stays until
 * then, so the block being executed may be dropped under it. `generation` counts everything that may have taken the
 * running block away.
 */
#ifndef LIBVM_INTERP_BLOCKS_H
#define LIBVM_INTERP_BLOCKS_H

#include "x86/insn.h"

#ifndef BLOCK_ARENA_BYTES
#define BLOCK_ARENA_BYTES (16u << 20)
#endif
enum { BLOCK_INSNS = 32, BLOCK_CHUNK = 256 << 10, BLOCK_CHUNKS = BLOCK_ARENA_BYTES / BLOCK_CHUNK, BLOCK_HASH = 8192,
       BLOCK_PAGES = 2048, BLOCK_JUMPS = 4096 };

typedef struct block {
    struct block *hash_next;
    struct block *page_next;             /* other blocks of the same bucket of pages */
    uint64_t gpa;
    uint16_t count, bytes;
    uint8_t mode;
    bool crosses;
    x86_insn insn[];
} block;

/* Linear address of code to its block: valid for one generation of the TLB, one access context and code size (`key`). */
typedef struct block_jump { uint64_t la, key; block *b; } block_jump;

typedef struct block_cache {
    uint64_t generation;
    uint64_t jump_generation;            /* in units of 256: the low byte of a key is context and code size */
    block *running;                      /* being executed, NULL: single step */
    uint64_t running_rip;
    int64_t enough;                      /* the run may end behind a block with so much left of the budget */
    bool has_begun;                      /* this run has retired an instruction or delivered a fault: `until` counts */
    unsigned chunk_at, chunk_used;
    x86_form *forms;                     /* NULL before there are many blocks */
    block *scratch;                      /* one block of BLOCK_INSNS, being built; also for code that cannot be cached */
    uint8_t *chunk[BLOCK_CHUNKS];
    block *pages[BLOCK_PAGES];           /* from here on tables of which little is touched at first */
    block *hash[BLOCK_HASH];
    block_jump jumps[BLOCK_JUMPS];
} block_cache;

block_cache *block_cache_new(void);
void block_cache_free(block_cache *c);
void block_cache_clear(block_cache *c);                                        /* every block */
void block_cache_drop(block_cache *c, uint64_t gpa, uint64_t bytes);           /* blocks that overlap */
block *block_find(const block_cache *c, uint64_t gpa, unsigned mode);
/* Copies c->scratch into the arena and registers it; NULL: no memory (use scratch as it is). */
block *block_add(block_cache *c);
/* As x86_decode(). */
int block_decode(block_cache *c, const uint8_t *bytes, unsigned avail, unsigned code_size, x86_insn *in);

#endif
