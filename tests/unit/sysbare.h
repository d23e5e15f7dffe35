/* sysbare.h - one x86_cpu in 16 MiB of RAM and nothing else, for tests of the system parts of lib/x86.
 *
 * Guest-physical memory is an array that wraps nowhere; ports and MMIO do not exist. step() executes one instruction as
 * an execution loop would and, if asked to, delivers what it raises.
 */
#ifndef SYSBARE_H
#define SYSBARE_H

#include "test.h"
#include "x86/insn.h"
#include "x86/system.h"

#include <sys/mman.h>

#define RAM_BYTES (16u << 20)

static uint8_t *ram;
static x86_cpu *cpu;
static unsigned hypercalls, flushes;

static uint8_t *bare_page(x86_cpu *c, uint64_t gpa, unsigned *prot)
{
    (void)c;
    *prot = X86_READ | X86_WRITE | X86_EXEC;
    return gpa < RAM_BYTES ? ram + gpa : NULL;
}
static int bare_phys_read(x86_cpu *c, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *v)
{
    (void)c, (void)gpa, (void)gva, (void)n, (void)access;
    *v = ~UINT64_C(0);
    return X86_IO_DONE;
}
static int bare_phys_write(x86_cpu *c, uint64_t gpa, uint64_t gva, unsigned n, uint64_t v)
{
    (void)c, (void)gpa, (void)gva, (void)n, (void)v;
    return X86_IO_DONE;
}
static int bare_port_in(x86_cpu *c, uint16_t port, unsigned n, uint64_t *v)
{
    (void)c, (void)n;
    *v = port;
    return X86_IO_DONE;
}
static int bare_port_out(x86_cpu *c, uint16_t port, unsigned n, uint64_t v)
{
    (void)c, (void)port, (void)n, (void)v;
    return X86_IO_DONE;
}
static bool bare_fill(x86_cpu *c, uint64_t la, unsigned access, unsigned ctx, uint64_t *gpa)
{
    x86_walk w = { 0 };
    if (!x86_walk_page(c, la, access, ctx, true, &w)) {
        c->fault = w.fault;
        return false;
    }
    *gpa = w.gpa;
    if (w.gpa < RAM_BYTES)
        x86_tlb_set(c, ctx, la, w.gpa, ram + (w.gpa & X86_PAGE_MASK), w.prot, w.global, w.page_bytes);
    return true;
}
static void bare_root(x86_cpu *c, unsigned how)
{
    flushes++;
    if (how & X86_ROOT_GLOBAL)
        x86_tlb_clear_nonglobal(c);
    else
        x86_tlb_clear(c);
}
static void bare_invalidate(x86_cpu *c, uint64_t la, uint64_t bytes)
{
    (void)bytes;
    x86_tlb_drop(c, la);
}
static unsigned invpcid_type, invpcid_pcid;
static uint64_t invpcid_la;
static void bare_invpcid(x86_cpu *c, unsigned type, unsigned pcid, uint64_t la)
{
    (void)c;
    invpcid_type = type, invpcid_pcid = pcid, invpcid_la = la;
}
static void bare_code(x86_cpu *c, uint64_t gpa) { (void)c, (void)gpa; }
static uint64_t bare_tsc(x86_cpu *c) { (void)c; return 1000; }
static uint64_t bare_random(x86_cpu *c) { (void)c; return UINT64_C(0x1122334455667788); }
static bool bare_msr_read(x86_cpu *c, uint32_t m, uint64_t *v)
{
    (void)c;
    *v = 0xfee00900;
    return m == 0x1b;
}
static bool bare_msr_write(x86_cpu *c, uint32_t m, uint64_t v) { (void)c, (void)m, (void)v; return false; }
static uint8_t bare_cr8;
static uint8_t bare_cr8_read(x86_cpu *c) { (void)c; return bare_cr8; }
static void bare_cr8_write(x86_cpu *c, uint8_t v) { (void)c; bare_cr8 = v; }
static unsigned bare_id(x86_cpu *c) { (void)c; return 0; }
static unsigned bare_count(x86_cpu *c) { (void)c; return 1; }
static void bare_nothing(x86_cpu *c) { (void)c; }
static int bare_hypercall(x86_cpu *c) { (void)c; hypercalls++; return X86_IO_DONE; }

static const x86_env bare_env = {
    .page = bare_page,
    .phys_read = bare_phys_read,
    .phys_write = bare_phys_write,
    .port_in = bare_port_in,
    .port_out = bare_port_out,
    .fill = bare_fill,
    .root_changed = bare_root,
    .invalidate = bare_invalidate,
    .invalidate_pcid = bare_invpcid,
    .code_page = bare_code,
    .tsc = bare_tsc,
    .random = bare_random,
    .msr_read = bare_msr_read,
    .msr_write = bare_msr_write,
    .cr8_read = bare_cr8_read,
    .cr8_write = bare_cr8_write,
    .apic_id = bare_id,
    .cpu_count = bare_count,
    .ferr = bare_nothing,
    .hypercall = bare_hypercall,
    .lock_begin = bare_nothing,
    .lock_end = bare_nothing,
};

/* A fresh CPU in VM_MODE_* `mode` and zeroed RAM. */
static inline void bare_new(unsigned mode)
{
    if (!cpu) {
        cpu = mmap(NULL, sizeof *cpu, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(cpu != MAP_FAILED && ram != MAP_FAILED);
    } else {
        memset(cpu, 0, sizeof *cpu);
        memset(ram, 0, RAM_BYTES);
    }
    x86_tlb_init(cpu);
    cpu->env = &bare_env;
    x86_cpu_set_mode(cpu, mode);
}

static inline void put8(uint64_t at, uint8_t v) { ram[at] = v; }
static inline void put16(uint64_t at, uint16_t v) { memcpy(ram + at, &v, 2); }
static inline void put32(uint64_t at, uint32_t v) { memcpy(ram + at, &v, 4); }
static inline void put64(uint64_t at, uint64_t v) { memcpy(ram + at, &v, 8); }
static inline uint16_t get16(uint64_t at) { uint16_t v; memcpy(&v, ram + at, 2); return v; }
static inline uint32_t get32(uint64_t at) { uint32_t v; memcpy(&v, ram + at, 4); return v; }
static inline uint64_t get64(uint64_t at) { uint64_t v; memcpy(&v, ram + at, 8); return v; }

/* What one instruction came to. */
enum { RAN = -1 };
typedef struct outcome {
    int vector;                        /* RAN, or the vector it raised */
    bool has_error;
    uint32_t error;
    uint64_t address, dr6;
    x86_stop stop;                     /* when it left the CPU otherwise */
} outcome;

/* Executes the bytes as one instruction at CS:RIP without fetching them. What is raised is not delivered. */
static inline outcome execute(const uint8_t *bytes, unsigned count)
{
    static const x86_insn blank;
    x86_insn in = blank;
    jmp_buf here;
    outcome result = { .vector = RAN };
    uint8_t padded[15] = { 0 };
    memcpy(padded, bytes, count);
    CHECK_EQ(x86_decode(padded, 15, cpu->code_size, &in), 0);
    if (setjmp(here) == 0) {
        uint64_t flags = cpu->rflags;
        uint8_t shadow = cpu->inhibit;
        bool is_careful = cpu->careful;
        cpu->fault_jmp = &here;
        if (is_careful)
            x86_before_careful(cpu);
        uint64_t mask = cpu->code_size == 8 ? ~UINT64_C(0) : UINT32_MAX;
        cpu->next_rip = (cpu->rip + in.length) & mask;
        in.exec(cpu, &in);
        cpu->rip = cpu->next_rip;
        x86_io_retire(cpu);
        if (shadow && cpu->inhibit == shadow)
            cpu->inhibit = 0;
        if (is_careful)
            x86_after_careful(cpu, flags, shadow);
    } else if (cpu->stop != X86_STOP_NONE) {
        result.stop = cpu->stop;
        cpu->stop = X86_STOP_NONE;
    } else {
        result.vector = cpu->fault.vector;
        result.has_error = cpu->fault.has_error;
        result.error = cpu->fault.error;
        result.address = cpu->fault.address;
        result.dr6 = cpu->fault.dr6;
    }
    return result;
}
#define INSN(...) execute((const uint8_t[]){ __VA_ARGS__ }, sizeof((const uint8_t[]){ __VA_ARGS__ }))

/* Expectations. */
#define RUNS(...)                                                                                             \
    do {                                                                                                      \
        outcome o_ = INSN(__VA_ARGS__);                                                                       \
        if (o_.vector != RAN || o_.stop)                                                                      \
            FAIL("%s: vector %d error %#x stop %d", #__VA_ARGS__, o_.vector, o_.error, o_.stop);              \
    } while (0)
#define RAISES(want_vector, want_error, ...)                                                                  \
    do {                                                                                                      \
        outcome o_ = INSN(__VA_ARGS__);                                                                       \
        if (o_.vector != (want_vector) || (o_.has_error && o_.error != (uint32_t)(want_error)) || o_.stop)    \
            FAIL("%s: vector %d error %#x stop %d, not %d(%#x)", #__VA_ARGS__, o_.vector, o_.error, o_.stop,  \
                 (int)(want_vector), (unsigned)(want_error));                                                 \
    } while (0)

/* ---- descriptor tables ---- */
#define GDT 0x1000u
#define IDT 0x2000u
#define LDT 0x3000u
#define TSS 0x4000u
#define TSS2 0x4800u
#define STACK0 0x8000u
#define STACK3 0x9000u

/* An eight-byte descriptor: access byte and flags nibble (G, D/B, L, AVL). */
static inline uint64_t make_desc(uint32_t base, uint32_t limit, unsigned access, unsigned flags)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)access << 40 |
           (uint64_t)(limit >> 16 & 15) << 48 | (uint64_t)flags << 52 | (uint64_t)(base >> 24) << 56;
}
static inline void set_gdt(unsigned sel, uint32_t base, uint32_t limit, unsigned access, unsigned flags)
{
    put64(GDT + (sel & 0xfff8), make_desc(base, limit, access, flags));
}
static inline void set_gate(unsigned vector, unsigned sel, uint64_t off, unsigned access)
{
    put64(IDT + 8 * vector, (off & 0xffff) | (uint64_t)sel << 16 | (uint64_t)access << 40 | (off & 0xffff0000) << 32);
}
static inline void set_gate64(unsigned vector, unsigned sel, uint64_t off, unsigned access, unsigned ist)
{
    put64(IDT + 16 * vector, (off & 0xffff) | (uint64_t)sel << 16 | (uint64_t)ist << 32 | (uint64_t)access << 40 |
                             (off & 0xffff0000) << 32);
    put64(IDT + 16 * vector + 8, off >> 32);
}

/* The selectors every protected-mode test has. */
enum {
    CODE0 = 0x08,
    DATA0 = 0x10,
    CODE3 = 0x1b,
    DATA3 = 0x23,
    TSS_SEL = 0x28,
    TSS2_SEL = 0x30,
    LDT_SEL = 0x38,
    CONFORM0 = 0x40,
    SPARE = 0x48,
    SPARE2 = 0x50,
    CODE16 = 0x58,
    DATA1 = 0x61,
    GDT_END = 0x80
};

static inline void load_seg_raw(unsigned index, uint16_t sel)
{
    x86_desc d = { .sel = sel };
    d.lo = get32(GDT + (sel & 0xfff8));
    d.hi = get32(GDT + (sel & 0xfff8) + 4);
    x86_desc_to_seg(&d, sel, &cpu->seg[index]);
}

static inline void to_cpl(unsigned cpl)
{
    load_seg_raw(X86_CS, cpl ? CODE3 : CODE0);
    load_seg_raw(X86_SS, cpl ? DATA3 : DATA0);
    for (unsigned i = 0; i < 4; i++) {
        static const uint8_t segs[] = { X86_ES, X86_DS, X86_FS, X86_GS };
        load_seg_raw(segs[i], cpl ? DATA3 : DATA0);
    }
    cpu->gpr[X86_RSP] = cpl ? STACK3 : STACK0;
    x86_mode_changed(cpu);
}

/* 32-bit protected mode with a full set of tables at CPL `cpl`. */
static inline void protected_mode(unsigned cpl)
{
    bare_new(2);
    cpu->gdtr = (x86_dtr){ GDT, GDT_END - 1 };
    cpu->idtr = (x86_dtr){ IDT, 256 * 8 - 1 };
    set_gdt(CODE0, 0, 0xfffff, 0x9b, 0xc);
    set_gdt(DATA0, 0, 0xfffff, 0x93, 0xc);
    set_gdt(CODE3, 0, 0xfffff, 0xfb, 0xc);
    set_gdt(DATA3, 0, 0xfffff, 0xf3, 0xc);
    set_gdt(TSS_SEL, TSS, 0x67, 0x8b, 0);
    set_gdt(TSS2_SEL, TSS2, 0x67, 0x89, 0);
    set_gdt(LDT_SEL, LDT, 0xff, 0x82, 0);
    set_gdt(CONFORM0, 0, 0xfffff, 0x9f, 0xc);
    set_gdt(CODE16, 0, 0xffff, 0x9b, 0);
    set_gdt(DATA1, 0, 0xfffff, 0xb3, 0xc);
    load_seg_raw(X86_TR, TSS_SEL);
    put32(TSS + 4, STACK0);
    put16(TSS + 8, DATA0);
    put16(TSS + 0x66, 0x68);
    cpu->rip = 0x100000;
    to_cpl(cpl);
}

#endif
