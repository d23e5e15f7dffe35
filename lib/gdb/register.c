/* register.c - registers as a debugger sees them: the target description and the values behind its numbers.
 *
 * Numbers follow the order of the tables below; a description names the same registers in the same order. The features
 * org.gnu.gdb.i386.* and their members are GDB's interface (GDB manual, "i386 Features"); org.libvm.x86.system is our own.
 * RIP is shown as a linear address, so that breakpoints, which are linear, are found in code segments with a base.
 */
#include "gdb/gdb.h"

#include <stddef.h>
#include <string.h>

typedef enum kind { GPR, PC, FLAGS, SELECTOR, BASE, SYSTEM, ST, FCTRL, FSTAT, FTAG, FISEG, FIOFF, FOSEG, FOOFF, FOP, XMM, MXCSR,
                    YMMH } kind;
typedef struct reg { const char *name; uint16_t bits; uint8_t kind; uint16_t where; const char *type; } reg;
typedef struct feature { const char *name; const reg *regs; unsigned count; } feature;

#define R(member) offsetof(vm_regs, member)
#define S(member) offsetof(vm_sregs, member)

#define FPU_AND_SEGMENTS                                                                                               \
    { "cs", 32, SELECTOR, S(cs), "int32" }, { "ss", 32, SELECTOR, S(ss), "int32" },                                    \
    { "ds", 32, SELECTOR, S(ds), "int32" }, { "es", 32, SELECTOR, S(es), "int32" },                                    \
    { "fs", 32, SELECTOR, S(fs), "int32" }, { "gs", 32, SELECTOR, S(gs), "int32" },                                    \
    { "st0", 80, ST, 0, "i387_ext" }, { "st1", 80, ST, 1, "i387_ext" }, { "st2", 80, ST, 2, "i387_ext" },              \
    { "st3", 80, ST, 3, "i387_ext" }, { "st4", 80, ST, 4, "i387_ext" }, { "st5", 80, ST, 5, "i387_ext" },              \
    { "st6", 80, ST, 6, "i387_ext" }, { "st7", 80, ST, 7, "i387_ext" },                                                \
    { "fctrl", 32, FCTRL, 0, "int" }, { "fstat", 32, FSTAT, 0, "int" }, { "ftag", 32, FTAG, 0, "int" },                \
    { "fiseg", 32, FISEG, 0, "int" }, { "fioff", 32, FIOFF, 0, "int" }, { "foseg", 32, FOSEG, 0, "int" },              \
    { "fooff", 32, FOOFF, 0, "int" }, { "fop", 32, FOP, 0, "int" }

static const reg core64[] = {
    { "rax", 64, GPR, R(rax), "int64" }, { "rbx", 64, GPR, R(rbx), "int64" }, { "rcx", 64, GPR, R(rcx), "int64" },
    { "rdx", 64, GPR, R(rdx), "int64" }, { "rsi", 64, GPR, R(rsi), "int64" }, { "rdi", 64, GPR, R(rdi), "int64" },
    { "rbp", 64, GPR, R(rbp), "data_ptr" }, { "rsp", 64, GPR, R(rsp), "data_ptr" },
    { "r8", 64, GPR, R(r8), "int64" }, { "r9", 64, GPR, R(r9), "int64" }, { "r10", 64, GPR, R(r10), "int64" },
    { "r11", 64, GPR, R(r11), "int64" }, { "r12", 64, GPR, R(r12), "int64" }, { "r13", 64, GPR, R(r13), "int64" },
    { "r14", 64, GPR, R(r14), "int64" }, { "r15", 64, GPR, R(r15), "int64" }, { "rip", 64, PC, 0, "code_ptr" },
    { "eflags", 32, FLAGS, 0, "i386_eflags" }, FPU_AND_SEGMENTS };

static const reg core32[] = {
    { "eax", 32, GPR, R(rax), "int32" }, { "ecx", 32, GPR, R(rcx), "int32" }, { "edx", 32, GPR, R(rdx), "int32" },
    { "ebx", 32, GPR, R(rbx), "int32" }, { "esp", 32, GPR, R(rsp), "data_ptr" }, { "ebp", 32, GPR, R(rbp), "data_ptr" },
    { "esi", 32, GPR, R(rsi), "int32" }, { "edi", 32, GPR, R(rdi), "int32" }, { "eip", 32, PC, 0, "code_ptr" },
    { "eflags", 32, FLAGS, 0, "i386_eflags" }, FPU_AND_SEGMENTS };

#define VEC(n) { "xmm" #n, 128, XMM, n, "vec128" }
#define HIGH(n) { "ymm" #n "h", 128, YMMH, n, "uint128" }
static const reg sse64[] = { VEC(0), VEC(1), VEC(2), VEC(3), VEC(4), VEC(5), VEC(6), VEC(7), VEC(8), VEC(9), VEC(10), VEC(11),
                             VEC(12), VEC(13), VEC(14), VEC(15), { "mxcsr", 32, MXCSR, 0, "i386_mxcsr" } };
static const reg sse32[] = { VEC(0), VEC(1), VEC(2), VEC(3), VEC(4), VEC(5), VEC(6), VEC(7),
                             { "mxcsr", 32, MXCSR, 0, "i386_mxcsr" } };
static const reg avx64[] = { HIGH(0), HIGH(1), HIGH(2), HIGH(3), HIGH(4), HIGH(5), HIGH(6), HIGH(7), HIGH(8), HIGH(9),
                             HIGH(10), HIGH(11), HIGH(12), HIGH(13), HIGH(14), HIGH(15) };
static const reg avx32[] = { HIGH(0), HIGH(1), HIGH(2), HIGH(3), HIGH(4), HIGH(5), HIGH(6), HIGH(7) };
static const reg segments64[] = { { "fs_base", 64, BASE, S(fs), "int64" }, { "gs_base", 64, BASE, S(gs), "int64" } };
static const reg system_regs[] = {
    { "cr0", 64, SYSTEM, S(cr0), "int64" }, { "cr2", 64, SYSTEM, S(cr2), "int64" }, { "cr3", 64, SYSTEM, S(cr3), "int64" },
    { "cr4", 64, SYSTEM, S(cr4), "int64" }, { "cr8", 64, SYSTEM, S(cr8), "int64" }, { "efer", 64, SYSTEM, S(efer), "int64" },
    { "xcr0", 64, SYSTEM, S(xcr0), "int64" } };

#define F(name, table) { name, table, sizeof table / sizeof *table }
#define FEATURES 5u
static const feature features[2][FEATURES] = {
    { F("org.gnu.gdb.i386.core", core32), F("org.gnu.gdb.i386.sse", sse32), F("org.gnu.gdb.i386.avx", avx32),
      F("org.libvm.x86.system", system_regs), { NULL, NULL, 0 } },
    { F("org.gnu.gdb.i386.core", core64), F("org.gnu.gdb.i386.sse", sse64), F("org.gnu.gdb.i386.avx", avx64),
      F("org.gnu.gdb.i386.segments", segments64), F("org.libvm.x86.system", system_regs) },
};

static const reg *find(const gdb *g, unsigned number)
{
    for (unsigned i = 0; i < FEATURES; i++) {
        const feature *f = &features[g->is_64][i];
        if (number < f->count)
            return &f->regs[number];
        number -= f->count;
    }
    return NULL;
}

unsigned gdb_register_count(const gdb *g)
{
    unsigned n = 0;
    for (unsigned i = 0; i < FEATURES; i++)
        n += features[g->is_64][i].count;
    return n;
}

unsigned gdb_register_bytes(const gdb *g, unsigned number)
{
    const reg *r = find(g, number);
    return r ? r->bits / 8 : 0;
}

unsigned gdb_pc_number(const gdb *g)
{
    return g->is_64 ? 16 : 8;
}

/* ---- values ---- */

int gdb_get_state(vm_vcpu *cpu, gdb_state *s)
{
    s->r = (vm_regs)VM_REGS_INIT;
    s->s = (vm_sregs)VM_SREGS_INIT;
    s->f = (vm_fpu)VM_FPU_INIT;
    int status = vm_vcpu_get_regs(cpu, &s->r);
    if (status == VM_OK)
        status = vm_vcpu_get_sregs(cpu, &s->s);
    if (status == VM_OK)
        status = vm_vcpu_get_fpu(cpu, &s->f);
    return status;
}

static bool is_long_code(const vm_sregs *s)
{
    return (s->efer & 0x400) && (s->cs.attributes & 0x2000);
}

static uint64_t linear_pc(const vm_regs *r, const vm_sregs *s)
{
    return is_long_code(s) ? r->rip : (uint32_t)(r->rip + s->cs.base);
}

uint64_t gdb_pc(vm_vcpu *cpu)
{
    vm_regs r = VM_REGS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    if (vm_vcpu_get_regs(cpu, &r) != VM_OK || vm_vcpu_get_sregs(cpu, &s) != VM_OK)
        return 0;
    return linear_pc(&r, &s);
}

static uint64_t small(const reg *r, const gdb_state *s)
{
    uint64_t v = 0;
    switch (r->kind) {
    case GPR: memcpy(&v, (const uint8_t *)&s->r + r->where, 8); return v;
    case PC: return linear_pc(&s->r, &s->s);
    case FLAGS: return s->r.rflags;
    case SELECTOR: return ((const vm_segment *)((const uint8_t *)&s->s + r->where))->selector;
    case BASE: return ((const vm_segment *)((const uint8_t *)&s->s + r->where))->base;
    case SYSTEM: memcpy(&v, (const uint8_t *)&s->s + r->where, 8); return v;
    case FCTRL: return s->f.fcw;
    case FSTAT: return s->f.fsw;
    case FTAG: return s->f.ftw;
    case FISEG: return s->f.fip >> 32 & 0xffff;
    case FIOFF: return s->f.fip & 0xffffffff;
    case FOSEG: return s->f.fdp >> 32 & 0xffff;
    case FOOFF: return s->f.fdp & 0xffffffff;
    case FOP: return s->f.fop;
    case MXCSR: return s->f.mxcsr;
    default: return 0;
    }
}

void gdb_register_get(const gdb *g, const gdb_state *s, unsigned number, uint8_t *to)
{
    const reg *r = find(g, number);
    uint64_t v = small(r, s);
    switch (r->kind) {
    case ST: memcpy(to, s->f.st[r->where], 10); break;
    case XMM: memcpy(to, s->f.ymm[r->where], 16); break;
    case YMMH: memcpy(to, s->f.ymm[r->where] + 16, 16); break;
    default: memcpy(to, &v, r->bits / 8); break;
    }
}

static uint64_t low_half(uint64_t old, uint64_t v)
{
    return (old & ~UINT64_C(0xffffffff)) | (v & 0xffffffff);
}

static uint64_t high_half(uint64_t old, uint64_t v)
{
    return (old & 0xffffffff) | (v & 0xffff) << 32;
}

/* A selector is a number here; what it selects comes with it only where no table is involved. */
static void set_selector(gdb_state *s, vm_segment *seg, uint16_t v)
{
    bool is_real = !(s->s.cr0 & 1) || (s->r.rflags & 0x20000);
    if (is_real && seg->selector != v)
        seg->base = (uint64_t)v << 4;
    seg->selector = v;
}

static void set_small(const reg *r, gdb_state *s, uint64_t v)
{
    vm_segment *seg = (vm_segment *)((uint8_t *)&s->s + r->where);
    switch (r->kind) {
    case GPR: memcpy((uint8_t *)&s->r + r->where, &v, 8); break;
    case PC: s->r.rip = is_long_code(&s->s) ? v : (uint32_t)(v - s->s.cs.base); break;
    case FLAGS: s->r.rflags = low_half(s->r.rflags, v); break;
    case SELECTOR: set_selector(s, seg, (uint16_t)v); break;
    case BASE: seg->base = v; break;
    case SYSTEM: memcpy((uint8_t *)&s->s + r->where, &v, 8); break;
    case FCTRL: s->f.fcw = (uint16_t)v; break;
    case FSTAT: s->f.fsw = (uint16_t)v; break;
    case FTAG: s->f.ftw = (uint16_t)v; break;
    case FISEG: s->f.fip = high_half(s->f.fip, v); break;
    case FIOFF: s->f.fip = low_half(s->f.fip, v); break;
    case FOSEG: s->f.fdp = high_half(s->f.fdp, v); break;
    case FOOFF: s->f.fdp = low_half(s->f.fdp, v); break;
    case FOP: s->f.fop = (uint16_t)v; break;
    case MXCSR: s->f.mxcsr = (uint32_t)v; break;
    default: break;
    }
}

void gdb_register_set(const gdb *g, gdb_state *s, unsigned number, const uint8_t *from)
{
    const reg *r = find(g, number);
    uint64_t v = 0;
    switch (r->kind) {
    case ST: memcpy(s->f.st[r->where], from, 10); return;
    case XMM: memcpy(s->f.ymm[r->where], from, 16); return;
    case YMMH: memcpy(s->f.ymm[r->where] + 16, from, 16); return;
    default: break;
    }
    memcpy(&v, from, r->bits / 8);
    set_small(r, s, v);
}

/* Only what differs is written: a debugger that writes everything back must not touch what it did not change. */
int gdb_set_state(vm_vcpu *cpu, const gdb_state *before, const gdb_state *s)
{
    int status = gdb_replays(cpu->machine) ? vm_fail(VM_E_BUSY, "the machine replays") : VM_OK;
    if (status == VM_OK && memcmp(&before->s, &s->s, sizeof s->s))
        status = vm_vcpu_set_sregs(cpu, &s->s);
    if (status == VM_OK && memcmp(&before->f, &s->f, sizeof s->f))
        status = vm_vcpu_set_fpu(cpu, &s->f);
    if (status == VM_OK && memcmp(&before->r, &s->r, sizeof s->r))
        status = vm_vcpu_set_regs(cpu, &s->r);
    return status;
}

/* ---- the description ---- */

/* A debugger learns the architecture once, when it connects. Long mode shows 64-bit registers, protected mode without it
 * 32-bit ones; real mode will become one or the other, and what has 64 bits shows all. */
void gdb_choose_arch(gdb *g)
{
    g->is_64 = g->arch_wanted != GDB_ARCH_32;
    for (unsigned i = 0; i < g->cpu_count && g->arch_wanted == GDB_ARCH_AUTO; i++) {
        vm_sregs s = VM_SREGS_INIT;
        if (vm_vcpu_get_sregs(g->cpus[i].cpu, &s) != VM_OK)
            continue;
        if (i == 0)
            g->is_64 = !(s.cr0 & 1);
        g->is_64 |= (s.efer & 0x400) != 0;
    }
}

static const struct { const char *name; uint8_t low, high; } flag_fields[] = {
    { "CF", 0, 0 }, { "PF", 2, 2 }, { "AF", 4, 4 }, { "ZF", 6, 6 }, { "SF", 7, 7 }, { "TF", 8, 8 }, { "IF", 9, 9 },
    { "DF", 10, 10 }, { "OF", 11, 11 }, { "NT", 14, 14 }, { "RF", 16, 16 }, { "VM", 17, 17 }, { "AC", 18, 18 },
    { "VIF", 19, 19 }, { "VIP", 20, 20 }, { "ID", 21, 21 },
}, mxcsr_fields[] = {
    { "IE", 0, 0 }, { "DE", 1, 1 }, { "ZE", 2, 2 }, { "OE", 3, 3 }, { "UE", 4, 4 }, { "PE", 5, 5 }, { "DAZ", 6, 6 },
    { "IM", 7, 7 }, { "DM", 8, 8 }, { "ZM", 9, 9 }, { "OM", 10, 10 }, { "UM", 11, 11 }, { "PM", 12, 12 }, { "FZ", 15, 15 },
};
static const struct { const char *id, *type; unsigned count; const char *field; } vectors[] = {
    { "v4f", "ieee_single", 4, "v4_float" }, { "v2d", "ieee_double", 2, "v2_double" }, { "v16i8", "int8", 16, "v16_int8" },
    { "v8i16", "int16", 8, "v8_int16" }, { "v4i32", "int32", 4, "v4_int32" }, { "v2i64", "int64", 2, "v2_int64" },
};

#define FIELDS(id, table)                                                                                              \
    do {                                                                                                               \
        gdb_puts(xml, "<flags id=\"" id "\" size=\"4\">");                                                             \
        for (size_t k = 0; k < sizeof table / sizeof *table; k++)                                                      \
            gdb_printf(xml, "<field name=\"%s\" start=\"%u\" end=\"%u\"/>", table[k].name, table[k].low, table[k].high); \
        gdb_puts(xml, "</flags>");                                                                                     \
    } while (0)

static void describe_types(const char *feature_name, gdb_text *xml)
{
    const size_t n = sizeof vectors / sizeof *vectors;
    if (strstr(feature_name, ".core"))
        FIELDS("i386_eflags", flag_fields);
    if (!strstr(feature_name, ".sse"))
        return;
    for (size_t i = 0; i < n; i++)
        gdb_printf(xml, "<vector id=\"%s\" type=\"%s\" count=\"%u\"/>", vectors[i].id, vectors[i].type, vectors[i].count);
    gdb_puts(xml, "<union id=\"vec128\">");
    for (size_t i = 0; i < n; i++)
        gdb_printf(xml, "<field name=\"%s\" type=\"%s\"/>", vectors[i].field, vectors[i].id);
    gdb_puts(xml, "<field name=\"uint128\" type=\"uint128\"/></union>");
    FIELDS("i386_mxcsr", mxcsr_fields);
}

void gdb_describe(gdb *g, gdb_text *xml)
{
    gdb_clear(xml);
    gdb_printf(xml, "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target>"
                    "<architecture>%s</architecture>", g->is_64 ? "i386:x86-64" : "i386");
    for (unsigned i = 0; i < FEATURES && features[g->is_64][i].name; i++) {
        const feature *f = &features[g->is_64][i];
        gdb_printf(xml, "<feature name=\"%s\">", f->name);
        describe_types(f->name, xml);
        for (unsigned k = 0; k < f->count; k++)
            gdb_printf(xml, "<reg name=\"%s\" bitsize=\"%u\" type=\"%s\"/>", f->regs[k].name, f->regs[k].bits,
                       f->regs[k].type);
        gdb_puts(xml, "</feature>");
    }
    gdb_puts(xml, "</target>");
}
