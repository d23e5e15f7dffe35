/* access.h - memory access for semantic functions: the TLB fast path inline, everything else in mem.c.
 *
 * A read-modify-write opens its operand with x86_rmw_open(), which has already checked that the write cannot fault, and
 * closes it with x86_rmw_close(); between the two nothing may raise. Locked forms do the same on host atomics, or with the
 * world stopped when the operand is not one directly accessible piece of RAM.
 */
#ifndef LIBVM_X86_ACCESS_H
#define LIBVM_X86_ACCESS_H

#include <string.h>
#include "x86/insn.h"

#define X86_LIKELY(x) __builtin_expect(!!(x), 1)
#define X86_UNLIKELY(x) __builtin_expect(!!(x), 0)

uint64_t x86_load_slow(x86_cpu *cpu, uint64_t la, unsigned n);
void x86_store_slow(x86_cpu *cpu, uint64_t la, unsigned n, uint64_t v);

/* Guests race on their own memory, and that is theirs to do: ThreadSanitizer is told not to look at plain guest accesses. */
#ifdef __SANITIZE_THREAD__
#define X86_GUEST_RACES __attribute__((no_sanitize("thread")))
#else
#define X86_GUEST_RACES
#endif

X86_GUEST_RACES static inline uint64_t x86_load_host(const uint8_t *p, unsigned n)
{
    switch (n) {
    case 1: return *p;
    case 2: { uint16_t v; memcpy(&v, p, 2); return v; }
    case 4: { uint32_t v; memcpy(&v, p, 4); return v; }
    default: { uint64_t v; memcpy(&v, p, 8); return v; }
    }
}
X86_GUEST_RACES static inline void x86_store_host(uint8_t *p, unsigned n, uint64_t v)
{
    memcpy(p, &v, n == 1 ? 1 : n == 2 ? 2 : n == 4 ? 4 : 8);
}
/* memmove() and memset() on guest memory. ThreadSanitizer looks at those of the C library, whoever calls them. */
#ifdef __SANITIZE_THREAD__
X86_GUEST_RACES static inline void x86_move_host(uint8_t *to, const uint8_t *from, uint64_t n)
{
    volatile uint8_t *q = to;
    const volatile uint8_t *p = from;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t at = to <= from ? i : n - 1 - i;
        q[at] = p[at];
    }
}
X86_GUEST_RACES static inline void x86_fill_host(uint8_t *to, uint8_t value, uint64_t n)
{
    volatile uint8_t *q = to;
    while (n)
        q[--n] = value;
}
#else
static inline void x86_move_host(uint8_t *to, const uint8_t *from, uint64_t n) { memmove(to, from, n); }
static inline void x86_fill_host(uint8_t *to, uint8_t value, uint64_t n) { memset(to, value, n); }
#endif
/* n bytes from or to guest memory; 1, 2, 4 and 8 in one piece. */
static inline void x86_copy_from_host(uint8_t *to, const uint8_t *from, unsigned n)
{
    if (n == 8 || n == 4 || n == 2 || n == 1) {
        uint64_t v = x86_load_host(from, n);
        memcpy(to, &v, n);
    } else {
        x86_move_host(to, from, n);
    }
}
static inline void x86_copy_to_host(uint8_t *to, const uint8_t *from, unsigned n)
{
    if (n == 8 || n == 4 || n == 2 || n == 1) {
        uint64_t v = 0;
        memcpy(&v, from, n);
        x86_store_host(to, n, v);
    } else {
        x86_move_host(to, from, n);
    }
}
uint8_t x86_fetch_byte(x86_cpu *cpu, uint64_t gpa, uint64_t la);

/* n is 1, 2, 4 or 8. */
static inline uint64_t x86_load(x86_cpu *cpu, uint64_t la, unsigned n)
{
    const uint8_t *p = x86_tlb_hit(cpu, la, n, false);
    if (X86_LIKELY(p && !cpu->careful))
        return x86_load_host(p, n);
    return x86_load_slow(cpu, la, n);
}
static inline void x86_store(x86_cpu *cpu, uint64_t la, unsigned n, uint64_t v)
{
    uint8_t *p = x86_tlb_hit(cpu, la, n, true);
    if (X86_LIKELY(p && !cpu->careful))
        x86_store_host(p, n, v);
    else
        x86_store_slow(cpu, la, n, v);
}

/* x86_linear with its common outcomes inline: 64-bit mode without FS/GS, and flat 32-bit segments. */
static inline uint64_t x86_linear_fast(x86_cpu *cpu, unsigned seg, uint64_t off, unsigned n, unsigned access)
{
    if (X86_LIKELY(cpu->code_size == 8)) {
        uint64_t la = seg >= X86_FS ? off + cpu->seg[seg].base : off;
        if (X86_LIKELY(((la + (UINT64_C(1) << 47)) >> 48) == 0 && ((la + n + (UINT64_C(1) << 47)) >> 48) == 0))
            return la;
        return x86_linear(cpu, seg, off, n, access);
    }
    const x86_seg *s = &cpu->seg[seg];
    /* present, data, expand-up, writable: attr bits P, S, not E, not X, W */
    if (X86_LIKELY((s->attr & (X86_SEG_P | X86_SEG_S | 0xe)) == (X86_SEG_P | X86_SEG_S | 2) && off + (n - 1) <= s->limit))
        return (uint32_t)(s->base + off);
    return x86_linear(cpu, seg, off, n, access);
}
static inline uint64_t x86_op_la(x86_cpu *cpu, const x86_insn *in, unsigned n, unsigned access)
{
    return x86_linear_fast(cpu, in->seg, x86_offset(cpu, in), n, access);
}

typedef struct x86_rmw {
    uint8_t *host;      /* NULL: the slow way, value read into `value` */
    uint64_t la, value;
} x86_rmw;
void x86_rmw_open_slow(x86_cpu *cpu, x86_rmw *m, unsigned n);
static inline void x86_rmw_open(x86_cpu *cpu, x86_rmw *m, uint64_t la, unsigned n)
{
    m->la = la;
    m->host = x86_tlb_hit(cpu, la, n, true);
    if (X86_LIKELY(m->host && !cpu->careful))
        m->value = x86_load_host(m->host, n);
    else
        x86_rmw_open_slow(cpu, m, n);
}
static inline void x86_rmw_close(x86_cpu *cpu, x86_rmw *m, unsigned n, uint64_t v)
{
    if (X86_LIKELY(m->host != NULL))
        x86_store_host(m->host, n, v);
    else
        x86_write_linear(cpu, m->la, &v, n);
}

/* Locked: `host` non-NULL allows host atomics. Otherwise the value is in `value` and x86_locked_close() writes the new one;
 * both must be called, nothing may raise in between. n may be 16 when data points there. */
typedef struct x86_locked {
    uint8_t *host;
    uint64_t la;
    bool is_stopped;
    uint64_t value[2];
} x86_locked;
void x86_locked_open(x86_cpu *cpu, x86_locked *m, uint64_t la, unsigned n);
void x86_locked_close(x86_cpu *cpu, x86_locked *m, unsigned n, const uint64_t *v);

/* RFLAGS changes by POPF, IRET and their like: the bits of mask, and what follows from them. */
void x86_set_flags(x86_cpu *cpu, uint64_t value, uint64_t mask);

#endif
