/* world.c - builds the environments described in world.h through the public API alone. */
#include "world.h"
#include "../test.h"

const world_env world_envs[WORLD_ENVS] = {
    { "real", ENV_REAL, 16, false, false },  { "v86", ENV_V86, 16, false, true },    { "p16", ENV_P16, 16, false, false },
    { "p32", ENV_P32, 32, false, false },    { "pg32", ENV_PG32, 32, true, false },  { "pae32", ENV_PAE32, 32, true, false },
    { "u32", ENV_U32, 32, true, true },      { "c32", ENV_C32, 32, true, true },     { "f64", ENV_F64, 64, false, false },
    { "k64", ENV_K64, 64, true, false },     { "u64", ENV_U64, 64, true, true },
};

vm_backend world_backends[3];

unsigned world_backend_count(void)
{
    const char *only = getenv("TEST_BACKEND");
    unsigned n = 0;
    static const vm_backend all[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    for (unsigned i = 0; i < 3; i++) {
        uint64_t available = 0;
        if (only && strcmp(only, vm_backend_name(all[i])))
            continue;
        if (vm_query(all[i], "available", &available) == VM_OK && available)
            world_backends[n++] = all[i];
    }
    return n;
}

void world_poke(world *w, uint64_t gpa, const void *bytes, size_t count) { OK(vm_write(w->m, gpa, bytes, count)); }

static void poke64(world *w, uint64_t gpa, uint64_t v) { world_poke(w, gpa, &v, 8); }
static void poke32(world *w, uint64_t gpa, uint32_t v) { world_poke(w, gpa, &v, 4); }

uint64_t world_peek(world *w, uint64_t gpa, unsigned bytes)
{
    uint64_t v = 0;
    OK(vm_read(w->m, gpa, &v, bytes));
    return v;
}

void world_set(world *w, int reg, uint64_t value)
{
    unsigned char image[32] = { 0 };
    memcpy(image, &value, 8);
    OK(vm_vcpu_write_reg(w->cpu, reg, image, vm_reg_size(reg)));
}

uint64_t world_get(world *w, int reg)
{
    unsigned char image[32] = { 0 };
    uint64_t value;
    OK(vm_vcpu_read_reg(w->cpu, reg, image, vm_reg_size(reg)));
    memcpy(&value, image, 8);
    return value;
}

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    world *w = user;
    (void)cpu;
    w->device_reads++;
    memcpy(value, w->scratch + offset, width);
    return 0;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    world *w = user;
    (void)cpu;
    w->device_writes++;
    memcpy(w->scratch + offset, &value, width);
    return 0;
}

void world_descriptor(world *w, unsigned selector, uint32_t base, uint32_t limit, unsigned attr)
{
    uint64_t d = (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(attr & 0xff) << 40 |
                 (uint64_t)(limit >> 16 & 15) << 48 | (uint64_t)(attr >> 12 & 15) << 52 | (uint64_t)(base >> 24) << 56;
    poke64(w, W_GDT + (selector & ~7u), d);
}

static void fill_gdt(world *w)
{
    static const struct { unsigned selector; uint32_t base, limit; unsigned attr; } d[] = {
        { SEL_CODE32, 0, 0xfffff, 0xc09b },   { SEL_DATA, 0, 0xfffff, 0xc093 },    { SEL_CODE64, 0, 0xfffff, 0xa09b },
        { SEL_CODE16, 0, 0xffff, 0x009b },    { SEL_DATA16, 0, 0xffff, 0x0093 },   { SEL_UCODE32, 0, 0xfffff, 0xc0fb },
        { SEL_UDATA, 0, 0xfffff, 0xc0f3 },    { SEL_UCODE64, 0, 0xfffff, 0xa0fb }, { SEL_RODATA, 0, 0xffff, 0x4091 },
        { SEL_DOWN, 0, 0x9fff, 0x4097 },      { SEL_ABSENT, 0, 0xffff, 0x4013 },   { SEL_XONLY, 0, 0xfffff, 0xc099 },
        { SEL_CONFORM, 0, 0xfffff, 0xc09f },  { SEL_WINDOW, 0xa000, 0xff, 0x4093 },
    };
    for (unsigned i = 0; i < sizeof d / sizeof d[0]; i++)
        world_descriptor(w, d[i].selector, d[i].base, d[i].limit, d[i].attr);
    world_descriptor(w, SEL_TSS, W_TSS, 0x2068, 0x008b);
}

/* Every vector has a gate of its own that anyone may INT through (DPL 3). */
static void fill_idt(world *w)
{
    bool is_long = (w->env->bit & ENV_LONG) != 0;
    for (unsigned v = 0; v < 256; v++) {
        unsigned char hlt = 0xf4;
        uint32_t handler = W_HANDLERS + v * 16;
        world_poke(w, handler, &hlt, 1);
        if (w->env->bit == ENV_REAL) {
            poke32(w, v * 4, handler);
        } else {
            uint64_t gate = (handler & 0xffff) | (is_long ? SEL_CODE64 : SEL_CODE32) << 16 | UINT64_C(0xee00) << 32;
            if (is_long) {
                poke64(w, W_IDT64 + v * 16, gate);
                poke64(w, W_IDT64 + v * 16 + 8, 0);
            } else {
                poke64(w, W_IDT32 + v * 8, gate);
            }
        }
    }
}

static void fill_tss(world *w)
{
    static unsigned char map[0x2001];
    if (w->env->bit & ENV_LONG) {
        poke64(w, W_TSS + 4, W_STACK0);
        poke64(w, W_TSS + 36, W_STACK0 - 0x400);         /* IST1 */
    } else {
        poke32(w, W_TSS + 4, W_STACK0);
        poke32(w, W_TSS + 8, SEL_DATA);
    }
    poke32(w, W_TSS + 100, 104 << 16);
    memset(map, 0xff, sizeof map);
    map[0x80 / 8] = 0;                                  /* ports 0x80-0x87 are for everyone */
    world_poke(w, W_TSS + 104, map, sizeof map);
}

/* Identity map with the special pages; `entry` bytes an entry; `nx` where bit 63 exists. */
static void fill_table(world *w, uint64_t table, unsigned entry, unsigned count, bool has_nx)
{
    for (unsigned i = 0; i < count; i++) {
        uint64_t page = i * UINT64_C(4096), pte = page | 7;
        if (page == W_RO)
            pte = page | 5;
        else if (page == W_SUP)
            pte = page | 3;
        else if (page == W_NP)
            pte = 0;
        else if (page == W_NX && has_nx)
            pte |= UINT64_C(1) << 63;
        world_poke(w, table + i * entry, &pte, entry);
    }
}

static void fill_page_tables(world *w)
{
    poke32(w, W_PD32, W_PT32 | 7);
    fill_table(w, W_PT32, 4, 1024, false);
    poke64(w, W_PDPT_PAE, W_PD_PAE | 1);
    poke64(w, W_PD_PAE, W_PT_PAE | 7);
    fill_table(w, W_PT_PAE, 8, 512, true);
    poke64(w, W_PML4, W_PDPT | 7);
    poke64(w, W_PDPT, W_PD | 7);
    poke64(w, W_PD, W_PT | 7);
    fill_table(w, W_PT, 8, 512, true);
    poke64(w, W_PML4 + 255 * 8, W_PDPT_EDGE | 7);
    poke64(w, W_PDPT_EDGE + 511 * 8, W_PD_EDGE | 7);
    poke64(w, W_PD_EDGE + 511 * 8, W_PT_EDGE | 7);
    poke64(w, W_PT_EDGE + 511 * 8, W_EDGE_PAGE | 7);
}

static vm_segment segment(uint16_t selector, uint64_t base, uint32_t limit, uint16_t attr)
{
    return (vm_segment){ .base = base, .limit = limit, .selector = selector, .attributes = attr };
}

static void set_data_segments(vm_sregs *s, vm_segment d) { s->ds = s->es = s->ss = s->fs = s->gs = d; }

static void set_state(world *w)
{
    const world_env *e = w->env;
    vm_sregs s = VM_SREGS_INIT;
    vm_mode mode = e->bit == ENV_REAL ? VM_MODE_REAL : e->bit & ENV_LONG ? VM_MODE_FLAT64 : VM_MODE_FLAT32;
    OK(vm_vcpu_set_mode(w->cpu, mode));
    OK(vm_vcpu_get_sregs(w->cpu, &s));
    if (e->bit == ENV_REAL)
        return;
    s.gdtr = (vm_dtable){ W_GDT, 0x1ff };
    s.idtr = e->bit & ENV_LONG ? (vm_dtable){ W_IDT64, 0xfff } : (vm_dtable){ W_IDT32, 0x7ff };
    s.tr = segment(SEL_TSS, W_TSS, 0x2068, 0x8b);
    s.cs = segment(e->bits == 64 ? SEL_CODE64 : SEL_CODE32, 0, 0xffffffff, e->bits == 64 ? 0xa09b : 0xc09b);
    set_data_segments(&s, segment(SEL_DATA, 0, 0xffffffff, 0xc093));
    if (e->bit == ENV_V86) {
        s.cs = segment(0, 0, 0xffff, 0xf3);
        set_data_segments(&s, s.cs);
    } else if (e->bit == ENV_P16) {
        s.cs = segment(SEL_CODE16, 0, 0xffff, 0x009b);
        set_data_segments(&s, segment(SEL_DATA16, 0, 0xffff, 0x0093));
    } else if (e->is_user) {
        s.cs = segment(e->bits == 64 ? SEL_UCODE64 : SEL_UCODE32, 0, 0xffffffff, e->bits == 64 ? 0xa0fb : 0xc0fb);
        set_data_segments(&s, segment(SEL_UDATA, 0, 0xffffffff, 0xc0f3));
    }
    s.cr0 |= 0x21;
    s.efer &= ~UINT64_C(1);
    if (e->is_paged) {
        s.cr0 |= 0x80010000;
        s.cr4 |= e->bit == ENV_PG32 ? 0 : 0x20;
        s.efer |= e->bit == ENV_PG32 ? 0 : 0x800;
        s.cr3 = e->bit == ENV_PG32 ? W_PD32 : e->bit & ENV_LONG ? W_PML4 : W_PDPT_PAE;
    }
    if (e->bit == ENV_V86) {                            /* RFLAGS.VM first: it is what gives these segments their meaning */
        vm_regs r = VM_REGS_INIT;
        vm_sregs p = s;
        p.cs = segment(SEL_CODE32, 0, 0xffffffff, 0xc09b);
        set_data_segments(&p, segment(SEL_DATA, 0, 0xffffffff, 0xc093));
        OK(vm_vcpu_set_sregs(w->cpu, &p));
        OK(vm_vcpu_get_regs(w->cpu, &r));
        r.rflags = 0x20002;
        OK(vm_vcpu_set_regs(w->cpu, &r));
    }
    OK(vm_vcpu_set_sregs(w->cpu, &s));
}

void world_open(world *w, vm_backend backend, const world_env *env)
{
    static const unsigned char zero[0x10000];
    vm_io_ops declines = VM_IO_OPS_INIT, ops = VM_IO_OPS_INIT;
    vm_options o = VM_OPTIONS_INIT;
    o.backend = backend;
    o.mmu = o.backend == VM_BACKEND_KVM ? NULL : getenv("TEST_MMU");
    memset(w, 0, sizeof *w);
    w->env = env;
    OK(vm_create(&o, &w->m));
    w->cpu = vm_vcpu_get(w->m, 0);
    ops.read = device_read;
    ops.write = device_write;
    OK(vm_map_ram(w->m, 0, W_MMIO, VM_PROT_RWX, &w->ram));
    OK(vm_map_mmio(w->m, W_MMIO, 0x1000, &declines, NULL, &w->mmio));
    OK(vm_map_mmio(w->m, W_DEVICE, 0x1000, &ops, w, &w->device));
    OK(vm_map_ram(w->m, W_ROM, 0x10000, VM_PROT_RX, &w->rom));
    OK(vm_map_ram(w->m, W_HIGH, 0x100000, VM_PROT_RWX, &w->high));
    w->low = vm_region_data(w->ram);
    world_poke(w, W_ROM, zero, sizeof zero);
    fill_gdt(w);
    fill_idt(w);
    fill_tss(w);
    if (env->is_paged)
        fill_page_tables(w);
    set_state(w);
    world_set(w, VM_REG_RIP, W_CODE);
    world_set(w, VM_REG_RSP, W_STACK);
}

void world_close(world *w) { vm_destroy(w->m); }

world_frame world_read_frame(world *w, bool has_error)
{
    vm_regs r = VM_REGS_INIT;
    world_frame f = { 0 };
    OK(vm_vcpu_get_regs(w->cpu, &r));
    unsigned size = w->env->bit == ENV_REAL ? 2 : w->env->bit & ENV_LONG ? 8 : 4;
    uint64_t sp = size == 2 ? r.rsp & 0xffff : r.rsp;
    f.vector = r.rip > W_HANDLERS && r.rip < W_HANDLERS + 0x1000 && r.rip % 16 == 1 ? (int)((r.rip - W_HANDLERS) / 16) : -1;
    if (has_error && size > 2) {
        f.error = world_peek(w, sp, size);
        sp += size;
    }
    f.rip = world_peek(w, sp, size);
    f.cs = world_peek(w, sp + size, size) & 0xffff;
    f.flags = world_peek(w, sp + 2 * size, size);
    if (size == 8 || w->env->is_user) {
        f.rsp = world_peek(w, sp + 3 * size, size);
        f.ss = world_peek(w, sp + 4 * size, size) & 0xffff;
    }
    return f;
}
