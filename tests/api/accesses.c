/* accesses.c - what memory hooks are told: for each way in which instructions reach memory, every access with
 * its address and its true width, in order, and the very bytes: those of memory for a read, those it has afterwards for
 * a write.
 * Watched everywhere and watched by a range that the first access just touches; inside a page and across two.
 *
 * Widths are those of the manuals' operand sizes (SDM vol. 2). An instruction that reads and writes a place makes one
 * read and one write, also when the value stays (CMPXCHG). Gathers access their elements, masked moves the bytes that
 * count. */
#include "../backends.h"

#define CODE  0x1000u
#define STACK 0x7000u
#define DATA  0x8000u
#define OTHER 0x8400u
#define CROSS 0x9000u                    /* DATA to here is a page */

typedef struct row { const char *name; const unsigned char *begin, *end; const char *accesses; unsigned cross; } row;

/* ROW(name, what is accessed, how much of the access lies before a page's end in the second variant (0: none), code).
 * Accesses: r or w, address as an offset from a letter (d DATA, o OTHER, s STACK), ':' width. */
#define ROW(name, accesses, cross, code) ROW_(name, accesses, cross, code)
#define ROW_(name, accesses, cross, code)                                                                              \
    extern const unsigned char begin_##name[], end_##name[];                                                           \
    __asm__(".pushsection .rodata\n.intel_syntax noprefix\nbegin_" #name ":\n" code "\nend_" #name ":\n"               \
            ".att_syntax\n.popsection");
#include "accesses.def"
#undef ROW_
#define ROW_(name, accesses, cross, code) { #name, begin_##name, end_##name, accesses, cross },
static const row rows[] = {
#include "accesses.def"
};

enum { MOST = 64, WIDEST = 4096 };
typedef struct seen {
    int kind;
    uint64_t address;
    uint32_t bytes;
    unsigned char data[WIDEST];
} seen;
static seen events[MOST];
static unsigned count;

static vm_hook_result look(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    static unsigned char now[WIDEST];
    uint64_t value = 0;
    (void)user;
    if (count == MOST || e->bytes > WIDEST)
        FAIL("too many events, or too wide");
    seen *s = &events[count++];
    s->kind = e->kind;
    s->address = e->address;
    s->bytes = e->bytes;
    memcpy(s->data, e->data, e->bytes);
    memcpy(&value, e->data, e->bytes < 8 ? e->bytes : 8);
    CHECK_EQ(e->value, value);
    OK(vm_read(vm_vcpu_machine(cpu), e->address, now, e->bytes));
    if (e->kind == VM_HOOK_MEM_READ && memcmp(now, e->data, e->bytes))
        FAIL("a read of %u bytes at %#" PRIx64 " was told other bytes than memory has", e->bytes, e->address);
    return VM_HOOK_CONTINUE;
}

static void set(vm_vcpu *cpu, int reg, uint64_t v) { OK(vm_vcpu_write_reg(cpu, reg, &v, 8)); }

/* `shift` moves all data. */
static vm_machine *make(vm_backend backend, const row *r, int64_t shift)
{
    static unsigned char memory[0x10000];
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    o.backend = backend;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, sizeof memory, VM_PROT_RWX, NULL));
    for (unsigned i = 0; i < sizeof memory; i++)
        memory[i] = (unsigned char)(i * 7 + (i >> 8) * 13 + 1);
    OK(vm_write(m, 0, memory, sizeof memory));
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_write(m, CODE, r->begin, (size_t)(r->end - r->begin)));
    OK(vm_write(m, CODE + (uint64_t)(r->end - r->begin), "\xf4", 1));
    set(cpu, VM_REG_RIP, CODE);
    set(cpu, VM_REG_RSP, STACK + (uint64_t)shift);
    set(cpu, VM_REG_RBP, STACK + (uint64_t)shift);
    set(cpu, VM_REG_RBX, DATA + (uint64_t)shift);
    set(cpu, VM_REG_RSI, DATA + (uint64_t)shift);
    set(cpu, VM_REG_RDI, OTHER + (uint64_t)shift);
    set(cpu, VM_REG_RCX, 3);
    set(cpu, VM_REG_RAX, 0x1122334455667788);
    set(cpu, VM_REG_RDX, 0);
    return m;
}

/* Reads the next "r d+8:4"; false: there is none. */
static bool next_access(const char **at, int64_t shift, seen *want)
{
    char way, base, sign;
    unsigned offset, bytes;
    int used = 0;
    if (sscanf(*at, " %c %c %c %u : %u%n", &way, &base, &sign, &offset, &bytes, &used) < 5)
        return false;
    *at += used;
    want->kind = way == 'r' ? VM_HOOK_MEM_READ : VM_HOOK_MEM_WRITE;
    want->address = (base == 'd' ? DATA : base == 'o' ? OTHER : STACK) + (uint64_t)shift;
    want->address += sign == '+' ? offset : 0 - (uint64_t)offset;
    want->bytes = bytes;
    return true;
}

static void check(vm_machine *m, const char *name, const char *text, int64_t shift, uint64_t lo, uint64_t hi)
{
    seen want;
    unsigned n = 0;
    while (next_access(&text, shift, &want)) {
        if (want.address > hi || want.address + want.bytes - 1 < lo)
            continue;
        if (n == count)
            FAIL("%s: only %u accesses; missing %d of %u at %#" PRIx64, name, count, want.kind, want.bytes,
                 want.address);
        const seen *got = &events[n++];
        if (got->kind != want.kind || got->address != want.address || got->bytes != want.bytes)
            FAIL("%s: access %u is %d of %u at %#" PRIx64 ", not %d of %u at %#" PRIx64, name, n, got->kind, got->bytes,
                 got->address, want.kind, want.bytes, want.address);
    }
    if (n != count)
        FAIL("%s: %u accesses, not %u; the next is %d of %u at %#" PRIx64, name, count, n, events[n].kind,
             events[n].bytes, events[n].address);
    for (unsigned i = 0; i < count; i++) {               /* what was written is there, unless it was written over */
        static unsigned char now[WIDEST];
        bool is_last = events[i].kind == VM_HOOK_MEM_WRITE;
        for (unsigned k = i + 1; k < count; k++)
            is_last &= events[k].kind == VM_HOOK_MEM_READ || events[k].address + events[k].bytes <= events[i].address ||
                       events[k].address >= events[i].address + events[i].bytes;
        OK(vm_read(m, events[i].address, now, events[i].bytes));
        if (is_last && memcmp(now, events[i].data, events[i].bytes))
            FAIL("%s: write %u told other bytes than it wrote", name, i);
    }
}

static void run_row(vm_backend backend, const row *r, int64_t shift, bool is_range)
{
    seen first = { 0 };
    const char *text = r->accesses;
    vm_machine *m = make(backend, r, shift);
    vm_exit e = VM_EXIT_INIT;
    bool has_any = next_access(&text, shift, &first);
    uint64_t lo = is_range && has_any ? first.address : 0, hi = is_range && has_any ? lo : UINT64_MAX;
    vm_hook_desc d = VM_HOOK_INIT;
    d.fn = look;
    d.begin = lo;
    d.end = hi;
    d.flags = VM_HOOK_EXACT;
    for (d.kind = VM_HOOK_MEM_READ; d.kind <= VM_HOOK_MEM_WRITE; d.kind++)
        OK(vm_hook_add(m, &d, NULL));
    count = 0;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    if (e.reason != VM_EXIT_HALT)
        FAIL("%s: %s at %#" PRIx64, r->name, vm_exit_name(e.reason), e.rip);
    check(m, r->name, r->accesses, shift, lo, hi);
    vm_destroy(m);
}

typedef struct job { const row *r; vm_backend backend; } job;

static void run_job(const void *arg)
{
    const job *j = arg;
    if (strncmp(j->r->name, "avx", 3) == 0 && !__builtin_cpu_supports("avx2"))
        test_skip("this host has no AVX2");
    for (unsigned is_range = 0; is_range < 2; is_range++) {
        run_row(j->backend, j->r, 0, is_range);
        if (j->r->cross) {
            seen first;
            const char *text = j->r->accesses;
            CHECK(next_access(&text, 0, &first));
            run_row(j->backend, j->r, (int64_t)(CROSS - j->r->cross) - (int64_t)first.address, is_range);
        }
    }
}

SETUP(rows)
{
    static const vm_backend backends[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (unsigned b = 0; b < 2; b++) {
            char name[100];
            uint64_t available = 0;
            job *j = malloc(sizeof *j);
            if (!j)
                abort();
            if (vm_query(backends[b], "available", &available) || !available)
                continue;
            *j = (job){ &rows[i], backends[b] };
            snprintf(name, sizeof name, "%s/%s", rows[i].name, vm_backend_name(backends[b]));
            test_add(name, run_job, j, 20);
        }
}
