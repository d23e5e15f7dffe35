/* blocks.c - the decoded-block cache. See blocks.h. */
#include <stdlib.h>
#include <string.h>
#include "core/core.h"
#include "interp/blocks.h"

#define FORMS_BYTES (X86_FORMS * sizeof(x86_form))

block_cache *block_cache_new(void)
{
    block_cache *c = vm_zeroed(sizeof *c);
    if (!c)
        return NULL;
    c->scratch = calloc(1, sizeof(block) + BLOCK_INSNS * sizeof(x86_insn));
    if (!c->scratch) {
        vm_zeroed_free(c, sizeof *c);
        return NULL;
    }
    c->generation = 1;
    c->jump_generation = 256;
    return c;
}

void block_cache_free(block_cache *c)
{
    if (!c)
        return;
    for (unsigned i = 0; i < BLOCK_CHUNKS; i++)
        free(c->chunk[i]);
    free(c->scratch);
    if (c->forms)
        vm_zeroed_free(c->forms, FORMS_BYTES);
    vm_zeroed_free(c, sizeof *c);
}

int block_decode(block_cache *c, const uint8_t *bytes, unsigned avail, unsigned code_size, x86_insn *in)
{
    enum { SNIPPET = 16 << 10 };       /* a machine that runs no more is made faster without the table */
    if (!c->forms && (c->chunk_at || c->chunk_used > SNIPPET))
        c->forms = vm_zeroed(FORMS_BYTES);
    return c->forms ? x86_decode_again(c->forms, bytes, avail, code_size, in) : x86_decode(bytes, avail, code_size, in);
}

void block_cache_clear(block_cache *c)
{
    if (c->chunk_at || c->chunk_used) {          /* else the tables are still untouched zero pages */
        memset(c->hash, 0, sizeof c->hash);
        memset(c->pages, 0, sizeof c->pages);
    }
    c->chunk_at = c->chunk_used = 0;
    c->generation++;
    c->jump_generation += 256;
}

static unsigned hash_of(uint64_t gpa, unsigned mode)
{
    return (unsigned)((gpa ^ gpa >> 13 ^ mode << 9) & (BLOCK_HASH - 1));
}

static unsigned page_of(uint64_t gpa)
{
    return (unsigned)((gpa >> 12 ^ gpa >> 23) & (BLOCK_PAGES - 1));
}

block *block_find(const block_cache *c, uint64_t gpa, unsigned mode)
{
    for (block *b = c->hash[hash_of(gpa, mode)]; b; b = b->hash_next)
        if (b->gpa == gpa && b->mode == mode)
            return b;
    return NULL;
}

static void *take(block_cache *c, size_t bytes)
{
    bytes = (bytes + 15) & ~(size_t)15;
    if (c->chunk_used + bytes > BLOCK_CHUNK || !c->chunk[c->chunk_at]) {
        if (c->chunk[c->chunk_at]) {
            if (c->chunk_at + 1 == BLOCK_CHUNKS) {
                block_cache_clear(c);
                goto got;
            }
            c->chunk_at++;
        }
        c->chunk_used = 0;
        if (!c->chunk[c->chunk_at])
            c->chunk[c->chunk_at] = malloc(BLOCK_CHUNK);
        if (!c->chunk[c->chunk_at]) {
            if (!c->chunk_at)
                return NULL;
            block_cache_clear(c);                            /* live with what there is */
        }
    }
got:;
    void *p = c->chunk[c->chunk_at] + c->chunk_used;
    c->chunk_used += (unsigned)bytes;
    return p;
}

block *block_add(block_cache *c)
{
    const block *s = c->scratch;
    size_t bytes = sizeof *s + s->count * sizeof(x86_insn);
    block *b = take(c, bytes);
    if (!b)
        return NULL;
    memcpy(b, s, bytes);
    block **head = &c->hash[hash_of(b->gpa, b->mode)];
    b->hash_next = *head;
    *head = b;
    if (!b->crosses) {
        head = &c->pages[page_of(b->gpa)];
        b->page_next = *head;
        *head = b;
    }
    return b;
}

static void unhash(block_cache *c, block *b)
{
    for (block **link = &c->hash[hash_of(b->gpa, b->mode)]; *link; link = &(*link)->hash_next)
        if (*link == b) {
            *link = b->hash_next;
            return;
        }
}

/* Drops the bucket's blocks that overlap [gpa, end). */
static bool drop_bucket(block_cache *c, unsigned bucket, uint64_t gpa, uint64_t end)
{
    bool is_any = false;
    for (block **link = &c->pages[bucket]; *link;) {
        block *b = *link;
        if (b->gpa < end && gpa < b->gpa + b->bytes) {
            *link = b->page_next;
            unhash(c, b);
            is_any = true;
        } else {
            link = &b->page_next;
        }
    }
    return is_any;
}

void block_cache_drop(block_cache *c, uint64_t gpa, uint64_t bytes)
{
    if (!bytes)
        return;
    uint64_t end = gpa + bytes < gpa ? UINT64_MAX : gpa + bytes;
    if (end - gpa > BLOCK_PAGES * UINT64_C(4096) / 4) {
        block_cache_clear(c);
        return;
    }
    bool is_any = false;
    for (uint64_t page = gpa >> 12; page <= (end - 1) >> 12; page++)
        is_any |= drop_bucket(c, page_of(page << 12), gpa, end);
    if (is_any) {
        c->generation++;
        c->jump_generation += 256;
    }
}
