/* op_string.c - string instructions, with and without repeat prefixes.
 *
 * Between iterations all registers are exact and rip is still the instruction's: a visit does a bounded amount of work and
 * leaves next_rip = rip when iterations remain, so that the loop above can take interrupts and come back. An iteration's
 * registers change only after its accesses succeeded, and its logged I/O is retired with it.
 */
#include "x86/access.h"
#include <stdatomic.h>
#include "x86/alu.h"
#include "x86/cover.h"
#include "x86/ops.h"

enum { VISIT = 2048, VISIT_US = 256 };   /* iterations, or units of 64 bytes moved in bulk, a visit; how long that may take */

typedef struct string_state {
    unsigned n;                 /* element size */
    int64_t delta;              /* +-n by DF */
    uint64_t mask;              /* address size */
} string_state;
/* One element. False ends the repetition (CMPS, SCAS). */
typedef bool (*step_fn)(x86_cpu *cpu, const x86_insn *in, const string_state *s);
/* Up to `count` elements at once, ascending; returns how many were done, 0 when the slow way must do the next one. */
typedef uint64_t (*bulk_fn)(x86_cpu *cpu, const x86_insn *in, const string_state *s, uint64_t count);

static void advance(x86_cpu *cpu, unsigned reg, const string_state *s, int64_t delta)
{
    uint64_t v = cpu->gpr[reg] + (uint64_t)delta;
    if (s->mask == 0xffff)
        x86_set_gpr(cpu, reg, 2, v);
    else
        cpu->gpr[reg] = v & s->mask;
}

static uint64_t source(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    return x86_linear_fast(cpu, in->seg, cpu->gpr[X86_RSI] & s->mask, s->n, X86_READ);
}

static uint64_t destination(x86_cpu *cpu, const string_state *s, unsigned access)
{
    return x86_linear_fast(cpu, X86_ES, cpu->gpr[X86_RDI] & s->mask, s->n, access);
}

static void run_string(x86_cpu *cpu, const x86_insn *in, unsigned n, step_fn step, bulk_fn bulk)
{
    static const uint64_t masks[4] = { 0, 0xffff, UINT32_MAX, ~UINT64_C(0) };
    string_state s = { .n = n, .delta = cpu->rflags & X86_FL_DF ? -(int64_t)n : (int64_t)n, .mask = masks[X86_SIZE_INDEX(in->asz)] };
    if (!(in->flags & (X86_IF_REP | X86_IF_REPNE))) {
        step(cpu, in, &s);
        return;
    }
    uint64_t count = cpu->gpr[X86_RCX] & s.mask;
    int work = cpu->careful & X86_CAREFUL_STEP ? 1 : VISIT;
    const uint64_t code_writes = cpu->stat[X86_STAT_CODE_WRITES];
    bool more = true;
    while (count && more && work > 0) {
        uint64_t done = 0;
        if (bulk && s.delta > 0 && !cpu->careful)
            done = bulk(cpu, in, &s, count);
        if (done) {
            work -= 1 + (int)(done * n >> 6);
        } else {
            more = step(cpu, in, &s);
            done = 1;
            work -= cpu->io_count ? 64 : 1;              /* devices take their time */
        }
        count -= done;
        advance(cpu, X86_RCX, &s, -(int64_t)done);
        x86_io_retire(cpu);
        if (X86_UNLIKELY(atomic_load_explicit(&cpu->attention, memory_order_relaxed)))
            break;
        if (X86_UNLIKELY(cpu->stat[X86_STAT_CODE_WRITES] != code_writes))
            break;                                       /* perhaps into this instruction: it is fetched again */
    }
    if (count && more) {
        cpu->next_rip = cpu->rip;
        cpu->is_midway = true;
        if ((cpu->rflags & X86_FL_TF) || (cpu->dr[7] & 0xff)) {
            cpu->rflags |= X86_FL_RF;      /* a breakpoint on it is not met again (SDM vol. 3, 17.3.1.1) */
            cpu->keep_rf = true;
        }
        x86_spend(cpu, VISIT_US);
    }
}

/* How many ascending elements from register `reg` stay in one page, below the offset mask and within the segment. */
static uint64_t run_length(const x86_cpu *cpu, const string_state *s, unsigned seg, unsigned reg, uint64_t la, uint64_t count)
{
    uint64_t off = cpu->gpr[reg] & s->mask, room = 4096 - (la & 0xfff);
    if (cpu->code_size != 8) {
        const x86_seg *g = &cpu->seg[seg];
        if ((g->attr & 12) == 4)                             /* expand-down: one at a time */
            return 0;
        uint64_t limit_room = (uint64_t)g->limit + 1 - off;  /* the first element was checked: off <= limit */
        room = room < limit_room ? room : limit_room;
    }
    uint64_t wrap_room = s->mask - off;                      /* one byte short of the wrap: good enough */
    room = room < wrap_room ? room : wrap_room;
    room /= s->n;
    return room < count ? room : count;
}

/* ---- MOVS ---- */

static bool movs_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    uint64_t v = x86_load(cpu, source(cpu, in, s), s->n);
    x86_store(cpu, destination(cpu, s, X86_WRITE), s->n, v);
    advance(cpu, X86_RSI, s, s->delta);
    advance(cpu, X86_RDI, s, s->delta);
    return true;
}

static void copy_ascending(uint8_t *to, const uint8_t *from, uint64_t bytes, unsigned n)
{
    if (to <= from || to >= from + bytes) {
        x86_move_host(to, from, bytes);
        return;
    }
    for (uint64_t i = 0; i < bytes; i += n)                  /* overlapping upwards: a pattern fill */
        x86_store_host(to + i, n, x86_load_host(from + i, n));
}

static uint64_t movs_bulk(x86_cpu *cpu, const x86_insn *in, const string_state *s, uint64_t count)
{
    if (count < 4)
        return 0;
    uint64_t from = source(cpu, in, s);
    if (!x86_direct(cpu, from, s->n, X86_READ))              /* its faults come before any of the destination */
        return 0;
    uint64_t to = destination(cpu, s, X86_WRITE);
    count = run_length(cpu, s, in->seg, X86_RSI, from, count);
    count = run_length(cpu, s, X86_ES, X86_RDI, to, count);
    if (!count)
        return 0;
    const unsigned bytes = (unsigned)(count * s->n);
    const uint8_t *p = x86_direct(cpu, from, bytes, X86_READ);
    uint8_t *q = p ? x86_direct(cpu, to, bytes, X86_WRITE) : NULL;
    if (!q)
        return 0;
    copy_ascending(q, p, bytes, s->n);
    advance(cpu, X86_RSI, s, bytes);
    advance(cpu, X86_RDI, s, bytes);
    return count;
}

/* ---- STOS, LODS ---- */

static bool stos_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    (void)in;
    x86_store(cpu, destination(cpu, s, X86_WRITE), s->n, cpu->gpr[X86_RAX]);
    advance(cpu, X86_RDI, s, s->delta);
    return true;
}

static uint64_t stos_bulk(x86_cpu *cpu, const x86_insn *in, const string_state *s, uint64_t count)
{
    (void)in;
    if (count < 4)
        return 0;
    uint64_t to = destination(cpu, s, X86_WRITE);
    count = run_length(cpu, s, X86_ES, X86_RDI, to, count);
    if (!count)
        return 0;
    const unsigned bytes = (unsigned)(count * s->n);
    uint8_t *q = x86_direct(cpu, to, bytes, X86_WRITE);
    if (!q)
        return 0;
    const uint64_t v = cpu->gpr[X86_RAX];
    if (s->n == 1)
        x86_fill_host(q, (uint8_t)v, bytes);
    else
        for (unsigned i = 0; i < bytes; i += s->n)
            x86_store_host(q + i, s->n, v);
    advance(cpu, X86_RDI, s, bytes);
    return count;
}

static bool lods_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    x86_set_gpr(cpu, X86_RAX, s->n, x86_load(cpu, source(cpu, in, s), s->n));
    advance(cpu, X86_RSI, s, s->delta);
    return true;
}

/* ---- CMPS, SCAS ---- */

static const x86_alu_fn compare[4] = X86_ALU_TABLE(cmp);

static bool is_repeated(const x86_cpu *cpu, const x86_insn *in)
{
    return !(cpu->rflags & X86_FL_ZF) == !!(in->flags & X86_IF_REPNE);
}

/* The second operand is read first, as the silicon shows when both would fault. */
static bool cmps_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    uint64_t b = x86_load(cpu, destination(cpu, s, X86_READ), s->n);
    uint64_t a = x86_load(cpu, source(cpu, in, s), s->n);
    compare[X86_SIZE_INDEX(s->n)](&cpu->rflags, a, b);
    if (X86_UNLIKELY(cpu->cover.log != NULL))
        x86_log_element(cpu, VM_COMPARE_STRING, s->n, a, b);
    advance(cpu, X86_RSI, s, s->delta);
    advance(cpu, X86_RDI, s, s->delta);
    return is_repeated(cpu, in);
}

static bool scas_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    uint64_t b = x86_load(cpu, destination(cpu, s, X86_READ), s->n);
    compare[X86_SIZE_INDEX(s->n)](&cpu->rflags, cpu->gpr[X86_RAX], b);
    if (X86_UNLIKELY(cpu->cover.log != NULL))
        x86_log_element(cpu, VM_COMPARE_SCAN, s->n, cpu->gpr[X86_RAX], b);
    advance(cpu, X86_RDI, s, s->delta);
    return is_repeated(cpu, in);
}

/* ---- INS, OUTS: the port comes from DX; memory is known to take the data before a port is read ---- */

static bool ins_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    (void)in;
    uint16_t port = (uint16_t)cpu->gpr[X86_RDX];
    x86_check_port(cpu, port, s->n);
    uint64_t la = destination(cpu, s, X86_WRITE);
    x86_probe_write(cpu, la, s->n);
    x86_store(cpu, la, s->n, x86_port_in(cpu, port, s->n));
    advance(cpu, X86_RDI, s, s->delta);
    return true;
}

static bool outs_step(x86_cpu *cpu, const x86_insn *in, const string_state *s)
{
    uint16_t port = (uint16_t)cpu->gpr[X86_RDX];
    x86_check_port(cpu, port, s->n);
    x86_port_out(cpu, port, s->n, x86_load(cpu, source(cpu, in, s), s->n));
    advance(cpu, X86_RSI, s, s->delta);
    return true;
}

void x86_op_movs(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, movs_step, movs_bulk); }
void x86_op_stos(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, stos_step, stos_bulk); }
void x86_op_lods(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, lods_step, NULL); }
void x86_op_cmps(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, cmps_step, NULL); }
void x86_op_scas(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, scas_step, NULL); }
void x86_op_ins(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, ins_step, NULL); }
void x86_op_outs(x86_cpu *cpu, const x86_insn *in) { run_string(cpu, in, in->osz, outs_step, NULL); }
