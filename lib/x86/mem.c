/* mem.c - linear memory as instructions see it: segment checks, translation, page crossing, MMIO, replay of logged accesses.
 *
 * Every access is all-or-nothing: both pages of a crossing access are translated before a byte moves. Accesses that RAM
 * cannot serve go to env->phys_*, are logged, and on a second execution of the same instruction come from the log, so
 * that no device sees an access twice.
 */
#include "x86/access.h"

/* ---- segmentation ---- */

static _Noreturn void segment_fault(x86_cpu *cpu, unsigned seg)
{
    x86_raise_error(cpu, seg == X86_SS ? X86_SS_FAULT : X86_GP, 0);
}

static uint64_t linear_long(x86_cpu *cpu, unsigned seg, uint64_t off, unsigned n)
{
    uint64_t la = seg >= X86_FS ? off + cpu->seg[seg].base : off;
    if (!x86_canonical(la) || !x86_canonical(la + (n ? n - 1 : 0)))
        segment_fault(cpu, seg);
    return la;
}

/* SDM vol. 3, 5.3 (limits) and 5.5 (types). Real mode keeps the limit check and has no types. */
uint64_t x86_linear(x86_cpu *cpu, unsigned seg, uint64_t off, unsigned n, unsigned access)
{
    if (cpu->code_size == 8)
        return linear_long(cpu, seg, off, n);
    const x86_seg *s = &cpu->seg[seg];
    off = (uint32_t)off;
    uint64_t last = off + (n ? n - 1 : 0);
    bool is_typed = x86_is_protected(cpu);
    if (is_typed) {
        if (!(s->attr & X86_SEG_P))
            segment_fault(cpu, seg);
        if (s->attr & 8) {                                   /* code: readable at most */
            if ((access & X86_WRITE) || ((access & X86_READ) && !(s->attr & 2)))
                segment_fault(cpu, seg);
        } else if ((access & X86_WRITE) && !(s->attr & 2)) {
            segment_fault(cpu, seg);
        }
    }
    if (is_typed && (s->attr & 12) == 4) {                   /* expand-down */
        uint32_t top = s->attr & X86_SEG_DB ? UINT32_MAX : 0xffff;
        if (off <= s->limit || last > top)
            segment_fault(cpu, seg);
    } else if (last > s->limit) {
        segment_fault(cpu, seg);
    }
    return (uint32_t)(s->base + off);
}

/* ---- one piece within a page ---- */

/* Host address of a directly accessible piece, or NULL with *gpa. Raises #PF. */
static uint8_t *resolve(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access, unsigned ctx, uint64_t *gpa)
{
    x86_tlb_entry *e = &cpu->tlb[ctx].e[X86_TLB_INDEX(la)];
    for (int pass = 0; pass < 2; pass++) {
        uint64_t offset = la ^ (access & X86_WRITE ? __atomic_load_n(&e->tag_w, __ATOMIC_RELAXED) : access & X86_EXEC ? e->tag_x : e->tag_r);
        if (offset <= 4096u - n)
            return e->host + offset;
        if (pass)
            break;
        if ((cpu->tlb[ctx].meta[X86_TLB_INDEX(la)] & X86_TLBM_IO) && x86_tlb_known(cpu, ctx, la, access, gpa))
            return NULL;                                     /* a device that has been met before: no RAM to look for */
        if (!cpu->env->fill(cpu, la, access, ctx, gpa))
            x86_raise_fault(cpu, &cpu->fault);
    }
    unsigned prot = 0;
    uint8_t *page = cpu->env->page(cpu, *gpa & X86_PAGE_MASK, &prot);
    return page && (prot & access) == access ? page + (*gpa & 0xfff) : NULL;
}

/* What the log has for the access to be made. The caller may have changed registers since it was written: what follows an
 * access to another place is forgotten. */
static x86_io_access *replay(x86_cpu *cpu, uint64_t place, bool is_port, bool is_write)
{
    if (!cpu->io_pos)
        cpu->hook_credit = 0;
    for (; cpu->io_pos < cpu->io_count && cpu->io_log[cpu->io_pos].is_hook; cpu->io_pos++)
        cpu->hook_credit++;            /* reported before the access was made, or to a hook that is no longer there */
    if (cpu->io_pos >= cpu->io_count || cpu->io_pos >= X86_IO_LOG)
        return NULL;
    x86_io_access *a = &cpu->io_log[cpu->io_pos];
    if (a->is_port != is_port || a->is_write != is_write || (is_port ? a->port : a->gpa) != place) {
        cpu->io_count = cpu->io_pos;
        return NULL;
    }
    cpu->io_pos++;
    return a;
}

static void log_done(x86_cpu *cpu, uint64_t gpa, uint64_t la, unsigned n, uint64_t value, bool is_write, bool is_fetch)
{
    if (cpu->io_count < X86_IO_LOG) {
        x86_io_access *a = &cpu->io_log[cpu->io_count];
        *a = (x86_io_access){ .gpa = gpa, .gva = la, .width = (uint8_t)n, .data = value, .is_write = is_write,
                              .is_fetch = is_fetch, .done = true };
        cpu->io_pos = ++cpu->io_count;
    }
}

static void log_port(x86_cpu *cpu, const x86_io_access *a)
{
    if (cpu->io_count < X86_IO_LOG) {
        cpu->io_log[cpu->io_count] = *a;
        cpu->io_log[cpu->io_count++].done = true;
        cpu->io_pos = cpu->io_count;
    }
}

void x86_io_leave(x86_cpu *cpu, uint64_t gpa, uint64_t la, unsigned n, uint64_t value, unsigned access)
{
    cpu->io = (x86_io_access){ .gpa = gpa, .gva = la, .width = (uint8_t)n, .data = value, .is_write = access == X86_WRITE,
                               .is_fetch = access == X86_EXEC };
    x86_leave(cpu, X86_STOP_IO);
}

static uint64_t io_read(x86_cpu *cpu, uint64_t gpa, uint64_t la, unsigned n, unsigned access)
{
    const x86_io_access *old = replay(cpu, gpa, false, false);
    if (old)
        return old->data;
    uint64_t value = 0;
    cpu->stat[X86_STAT_MMIO]++;
    if (cpu->env->phys_read(cpu, gpa, la, n, access, &value) == X86_IO_EXIT)
        x86_io_leave(cpu, gpa, la, n, value, access);
    log_done(cpu, gpa, la, n, value, false, access == X86_EXEC);
    return value;
}

static void io_write(x86_cpu *cpu, uint64_t gpa, uint64_t la, unsigned n, uint64_t value)
{
    if (replay(cpu, gpa, false, true))
        return;
    cpu->stat[X86_STAT_MMIO]++;
    if (cpu->env->phys_write(cpu, gpa, la, n, value) == X86_IO_EXIT)
        x86_io_leave(cpu, gpa, la, n, value, X86_WRITE);
    log_done(cpu, gpa, la, n, value, true, false);
}

static unsigned io_piece(unsigned n)
{
    return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
}

static void piece_read(x86_cpu *cpu, const uint8_t *host, uint64_t gpa, uint64_t la, uint8_t *buf, unsigned n, unsigned access)
{
    if (host) {
        x86_copy_from_host(buf, host, n);
        return;
    }
    while (n) {
        unsigned k = io_piece(n);
        uint64_t v = io_read(cpu, gpa, la, k, access);
        memcpy(buf, &v, k);
        buf += k, gpa += k, la += k, n -= k;
    }
}

static void piece_write(x86_cpu *cpu, uint8_t *host, uint64_t gpa, uint64_t la, const uint8_t *buf, unsigned n)
{
    if (host) {
        x86_copy_to_host(host, buf, n);
        return;
    }
    while (n) {
        unsigned k = io_piece(n);
        uint64_t v = 0;
        memcpy(&v, buf, k);
        io_write(cpu, gpa, la, k, v);
        buf += k, gpa += k, la += k, n -= k;
    }
}

/* One byte of code that lies where it cannot be cached. */
uint8_t x86_fetch_byte(x86_cpu *cpu, uint64_t gpa, uint64_t la)
{
    unsigned prot = 0;
    const uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    uint8_t b;
    piece_read(cpu, page && (prot & X86_EXEC) ? page + (gpa & 0xfff) : NULL, gpa, la, &b, 1, X86_EXEC);
    return b;
}

/* ---- whole accesses ---- */

typedef struct span {
    unsigned n[2];
    uint64_t la[2], gpa[2];
    uint8_t *host[2];
} span;

static void span_open(x86_cpu *cpu, span *s, uint64_t la, unsigned n, unsigned access, unsigned ctx)
{
    unsigned room = 4096u - (unsigned)(la & 0xfff);
    s->n[0] = n < room ? n : room;
    s->n[1] = n - s->n[0];
    s->la[0] = la;
    s->la[1] = la + s->n[0];
    if (!(cpu->efer & X86_EFER_LMA))
        s->la[1] = (uint32_t)s->la[1];
    s->gpa[0] = s->gpa[1] = 0;
    s->host[0] = resolve(cpu, la, s->n[0], access, ctx, &s->gpa[0]);
    s->host[1] = s->n[1] ? resolve(cpu, s->la[1], s->n[1], access, ctx, &s->gpa[1]) : NULL;
}

/* #AC (SDM vol. 3, 6.15) and data breakpoints, for accesses the program makes while `careful`. */
static void check_access(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access)
{
    if ((cpu->rflags & X86_FL_AC) && (cpu->cr0 & X86_CR0_AM) && cpu->cpl == 3 && (n == 2 || n == 4 || n == 8) && (la & (n - 1)))
        x86_raise_error(cpu, X86_AC, 0);
    x86_check_data_breakpoint(cpu, la, n, access);
}

static void read_as(x86_cpu *cpu, uint64_t la, void *buf, unsigned n, unsigned ctx)
{
    span s;
    span_open(cpu, &s, la, n, X86_READ, ctx);
    piece_read(cpu, s.host[0], s.gpa[0], s.la[0], buf, s.n[0], X86_READ);
    if (s.n[1])
        piece_read(cpu, s.host[1], s.gpa[1], s.la[1], (uint8_t *)buf + s.n[0], s.n[1], X86_READ);
}

/* RAM whose writes are always made, directly or seen. */
static bool takes_write(x86_cpu *cpu, const span *s, unsigned k)
{
    unsigned prot = 0;
    return s->host[k] || (cpu->env->page(cpu, s->gpa[k] & X86_PAGE_MASK, &prot) && (prot & (X86_WRITE | X86_SEEN)));
}

static void write_as(x86_cpu *cpu, uint64_t la, const void *buf, unsigned n, unsigned ctx)
{
    span s;
    span_open(cpu, &s, la, n, X86_WRITE, ctx);
    /* A part that is RAM goes last: the other may leave the run loop, and the instruction is then executed again from its
     * start and must find RAM as it was. */
    bool is_second_first = s.n[1] && !s.host[1] && takes_write(cpu, &s, 0) && !takes_write(cpu, &s, 1);
    for (unsigned i = 0; i < 2; i++) {
        unsigned k = i ^ is_second_first;
        if (s.n[k])
            piece_write(cpu, s.host[k], s.gpa[k], s.la[k], (const uint8_t *)buf + (k ? s.n[0] : 0), s.n[k]);
    }
}

void x86_read_linear(x86_cpu *cpu, uint64_t la, void *buf, unsigned n)
{
    if (!n)
        return;
    read_as(cpu, la, buf, n, cpu->ctx);
    if (X86_UNLIKELY(cpu->careful))
        check_access(cpu, la, n, X86_READ);
    if (X86_UNLIKELY(cpu->watch))
        x86_hook_access(cpu, la, n, X86_READ, buf);
}

void x86_write_linear(x86_cpu *cpu, uint64_t la, const void *buf, unsigned n)
{
    if (!n)
        return;
    if (X86_UNLIKELY(cpu->careful)) {
        x86_probe_write(cpu, la, n);
        check_access(cpu, la, n, X86_WRITE);
    }
    if (X86_UNLIKELY(cpu->watch)) {
        x86_probe_write(cpu, la, n);
        x86_hook_access(cpu, la, n, X86_WRITE, buf);
    }
    write_as(cpu, la, buf, n, cpu->ctx);
}

uint64_t x86_load_slow(x86_cpu *cpu, uint64_t la, unsigned n)
{
    uint64_t v = 0;
    x86_read_linear(cpu, la, &v, n);
    return v;
}

void x86_store_slow(x86_cpu *cpu, uint64_t la, unsigned n, uint64_t v)
{
    x86_write_linear(cpu, la, &v, n);
}

uint8_t *x86_direct(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access)
{
    uint64_t gpa = 0;
    if ((la & 0xfff) + n > 4096)
        return NULL;
    uint8_t *host = resolve(cpu, la, n, access, cpu->ctx, &gpa);
    unsigned seen = access & X86_WRITE ? access | X86_READ : access;        /* the pointer may serve a read-modify-write */
    return cpu->careful || (X86_UNLIKELY(cpu->watch) && cpu->env->watched(cpu, la, n, seen)) ? NULL : host;
}

void x86_probe_write(x86_cpu *cpu, uint64_t la, unsigned n)
{
    span s;
    if (n)
        span_open(cpu, &s, la, n, X86_WRITE, cpu->ctx);
}

void x86_read_system(x86_cpu *cpu, uint64_t la, void *buf, unsigned n)
{
    read_as(cpu, la, buf, n, X86_CTX_KERNEL);
}

void x86_write_system(x86_cpu *cpu, uint64_t la, const void *buf, unsigned n)
{
    write_as(cpu, la, buf, n, X86_CTX_KERNEL);
}

/* ---- read-modify-write ---- */

void x86_rmw_open_slow(x86_cpu *cpu, x86_rmw *m, unsigned n)
{
    m->host = x86_direct(cpu, m->la, n, X86_WRITE);
    if (m->host) {
        m->value = x86_load_host(m->host, n);
        return;
    }
    x86_probe_write(cpu, m->la, n);
    if (cpu->careful)
        check_access(cpu, m->la, n, X86_READ | X86_WRITE);
    m->value = 0;
    read_as(cpu, m->la, &m->value, n, cpu->ctx);
    if (X86_UNLIKELY(cpu->watch))
        x86_hook_access(cpu, m->la, n, X86_READ, &m->value);
}

void x86_locked_open(x86_cpu *cpu, x86_locked *m, uint64_t la, unsigned n)
{
    m->la = la;
    m->is_stopped = false;
    m->host = x86_direct(cpu, la, n, X86_WRITE);
    if (m->host)
        return;
    span s;
    span_open(cpu, &s, la, n, X86_WRITE, cpu->ctx);
    if (cpu->careful)
        check_access(cpu, la, n, X86_READ | X86_WRITE);
    unsigned prot;
    bool is_ram = cpu->env->page(cpu, s.host[0] ? cpu->tlb[cpu->ctx].meta[X86_TLB_INDEX(la)] & X86_PAGE_MASK :
                                 s.gpa[0] & X86_PAGE_MASK, &prot) != NULL;
    if (s.n[1])
        is_ram = is_ram && (s.host[1] || cpu->env->page(cpu, s.gpa[1] & X86_PAGE_MASK, &prot));
    if (is_ram) {            /* no exit can happen any more: RAM answers */
        cpu->env->lock_begin(cpu);
        m->is_stopped = true;
    }
    m->value[0] = m->value[1] = 0;
    read_as(cpu, la, m->value, n, cpu->ctx);
    if (X86_UNLIKELY(cpu->watch))
        x86_hook_access(cpu, la, n, X86_READ, m->value);
}

void x86_locked_close(x86_cpu *cpu, x86_locked *m, unsigned n, const uint64_t *v)
{
    if (X86_UNLIKELY(cpu->watch))
        x86_hook_access(cpu, m->la, n, X86_WRITE, v);
    write_as(cpu, m->la, v, n, cpu->ctx);
    if (m->is_stopped)
        cpu->env->lock_end(cpu);
}

/* ---- physical, for page walks ---- */

bool x86_read_phys(x86_cpu *cpu, uint64_t gpa, void *buf, unsigned n)
{
    unsigned prot = 0;
    const uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    if (!page || (gpa & 0xfff) + n > 4096)
        return false;
    memcpy(buf, page + (gpa & 0xfff), n);
    return true;
}

bool x86_write_phys(x86_cpu *cpu, uint64_t gpa, const void *buf, unsigned n)
{
    unsigned prot = 0;
    uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    if (!page || (gpa & 0xfff) + n > 4096)
        return false;
    if (prot & X86_WRITE) {
        memcpy(page + (gpa & 0xfff), buf, n);
        return true;
    }
    const uint8_t *from = buf;
    for (unsigned done = 0, k; done < n; done += k) {
        uint64_t v = 0;
        k = io_piece(n - done);
        memcpy(&v, from + done, k);
        if (cpu->env->phys_write(cpu, gpa + done, gpa + done, k, v) != X86_IO_DONE)
            return false;
    }
    return true;
}

static bool cmpxchg_host(uint8_t *p, unsigned n, uint64_t old, uint64_t new_value)
{
    if (n == 4) {
        uint32_t expected = (uint32_t)old;
        return __atomic_compare_exchange_n((uint32_t *)(void *)p, &expected, (uint32_t)new_value, false, __ATOMIC_SEQ_CST,
                                           __ATOMIC_SEQ_CST);
    }
    return __atomic_compare_exchange_n((uint64_t *)(void *)p, &old, new_value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

bool x86_cmpxchg_phys(x86_cpu *cpu, uint64_t gpa, unsigned n, uint64_t old, uint64_t new_value)
{
    unsigned prot = 0;
    uint8_t *page = cpu->env->page(cpu, gpa & X86_PAGE_MASK, &prot);
    if (!page || (gpa & 0xfff) + n > 4096 || (gpa & (n - 1)))
        return false;
    if (prot & (X86_WRITE | X86_WALKER))
        return cmpxchg_host(page + (gpa & 0xfff), n, old, new_value);
    /* Writes to this page are watched (or dropped: ROM): compare and write with the world stopped. */
    cpu->env->lock_begin(cpu);
    bool is_equal = x86_load_host(page + (gpa & 0xfff), n) == old;
    cpu->is_walking = true;
    if (is_equal)
        (void)cpu->env->phys_write(cpu, gpa, gpa, n, new_value);
    cpu->is_walking = false;
    cpu->env->lock_end(cpu);
    return is_equal;
}

/* ---- ports ---- */

uint64_t x86_port_in(x86_cpu *cpu, uint16_t port, unsigned n)
{
    const x86_io_access *old = replay(cpu, port, true, false);
    if (old) {
        x86_hook_port(cpu, port, n, old->data, false);
        return old->data;
    }
    x86_io_access a = { .port = port, .width = (uint8_t)n, .is_port = true };
    cpu->stat[X86_STAT_IO]++;
    if (cpu->env->port_in(cpu, port, n, &a.data) == X86_IO_EXIT) {
        cpu->io = a;
        x86_leave(cpu, X86_STOP_IO);
    }
    log_port(cpu, &a);
    x86_hook_port(cpu, port, n, a.data, false);
    return a.data;
}

void x86_port_out(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t value)
{
    x86_hook_port(cpu, port, n, value, true);
    if (replay(cpu, port, true, true))
        return;
    x86_io_access a = { .port = port, .width = (uint8_t)n, .data = value, .is_port = true, .is_write = true };
    cpu->stat[X86_STAT_IO]++;
    if (cpu->env->port_out(cpu, port, n, value) == X86_IO_EXIT) {
        cpu->io = a;
        x86_leave(cpu, X86_STOP_IO);
    }
    log_port(cpu, &a);
}
