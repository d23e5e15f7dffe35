/* x86_bare.c - see x86_bare.h. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "x86_bare.h"

static uint8_t *page(x86_cpu *cpu, uint64_t gpa, unsigned *prot)
{
    bare *b = cpu->env_data;
    if (gpa >= BARE_RAM)
        return NULL;
    *prot = X86_READ | X86_EXEC | (b->is_code[gpa >> 12] ? 0 : X86_WRITE);
    return b->ram + gpa;
}

static int record(bare *b, uint64_t address, uint64_t value, unsigned n, bool is_port, bool is_write)
{
    if (b->exits)
        return X86_IO_EXIT;
    if (b->log_count < 64) {
        b->log[b->log_count].address = address;
        b->log[b->log_count].value = value;
        b->log[b->log_count].n = n;
        b->log[b->log_count].is_port = is_port;
        b->log[b->log_count++].is_write = is_write;
    }
    return X86_IO_DONE;
}

static int phys_read(x86_cpu *cpu, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *value)
{
    bare *b = cpu->env_data;
    (void)gva, (void)access;
    *value = n == 8 ? b->io_value : b->io_value & ((UINT64_C(1) << n * 8) - 1);
    return record(b, gpa, *value, n, false, false);
}

static int phys_write(x86_cpu *cpu, uint64_t gpa, uint64_t gva, unsigned n, uint64_t value)
{
    bare *b = cpu->env_data;
    (void)gva;
    if (gpa < BARE_RAM && n <= BARE_RAM - gpa) {
        memcpy(b->ram + gpa, &value, n);
        interp_code_changed_cpu(cpu, gpa, n);
        return X86_IO_DONE;
    }
    return record(b, gpa, value, n, false, true);
}

static int port_in(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t *value)
{
    bare *b = cpu->env_data;
    *value = b->io_value & ((UINT64_C(1) << n * 8) - 1);
    return record(b, port, *value, n, true, false);
}

static int port_out(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t value)
{
    return record(cpu->env_data, port, value, n, true, true);
}

static bool fill(x86_cpu *cpu, uint64_t la, unsigned access, unsigned ctx, uint64_t *gpa)
{
    x86_walk w = { .gpa = la, .page_bytes = 4096, .prot = 7 };
    unsigned prot = 0;
    if (!cpu->flat && (cpu->cr0 & X86_CR0_PG) && !x86_walk_page(cpu, la, access, ctx, true, &w)) {
        cpu->fault = w.fault;
        return false;
    }
    *gpa = w.gpa;
    uint8_t *host = page(cpu, w.gpa & X86_PAGE_MASK, &prot);
    if (host)
        x86_tlb_set(cpu, ctx, la, w.gpa & X86_PAGE_MASK, host, w.prot & prot, w.global, w.page_bytes);
    return true;
}

static void root_changed(x86_cpu *cpu, unsigned how)
{
    if (how & X86_ROOT_GLOBAL)
        x86_tlb_clear_nonglobal(cpu);
    else
        x86_tlb_clear(cpu);
    interp_tlb_flushed_cpu(cpu);
}

static void invalidate(x86_cpu *cpu, uint64_t la, uint64_t bytes)
{
    (void)la, (void)bytes;
    root_changed(cpu, 0);
}

static void invalidate_pcid(x86_cpu *cpu, unsigned type, unsigned pcid, uint64_t la)
{
    (void)type, (void)pcid, (void)la;
    root_changed(cpu, 0);
}

static void code_page(x86_cpu *cpu, uint64_t gpa)
{
    bare *b = cpu->env_data;
    if (!b->is_code[gpa >> 12])
        x86_tlb_protect(cpu, gpa);
    b->is_code[gpa >> 12] = 1;
}

static uint64_t tsc(x86_cpu *cpu) { return cpu->retired; }
static uint64_t bare_random(x86_cpu *cpu) { return cpu->retired * UINT64_C(0x9e3779b97f4a7c15); }
static bool msr_read(x86_cpu *cpu, uint32_t msr, uint64_t *value) { (void)cpu, (void)msr, (void)value; return false; }
static bool msr_write(x86_cpu *cpu, uint32_t msr, uint64_t value) { (void)cpu, (void)msr, (void)value; return false; }
static uint8_t cr8_read(x86_cpu *cpu) { (void)cpu; return 0; }
static void cr8_write(x86_cpu *cpu, uint8_t value) { (void)cpu, (void)value; }
static unsigned apic_id(x86_cpu *cpu) { (void)cpu; return 0; }
static unsigned cpu_count(x86_cpu *cpu) { (void)cpu; return 1; }
static void ferr(x86_cpu *cpu) { (void)cpu; }
static int hypercall(x86_cpu *cpu) { (void)cpu; return -1; }
static void nothing(x86_cpu *cpu) { (void)cpu; }

static const x86_env env = {
    .page = page, .phys_read = phys_read, .phys_write = phys_write, .port_in = port_in, .port_out = port_out, .fill = fill,
    .root_changed = root_changed, .invalidate = invalidate, .invalidate_pcid = invalidate_pcid, .code_page = code_page,
    .tsc = tsc, .random = bare_random,
    .msr_read = msr_read, .msr_write = msr_write, .cr8_read = cr8_read, .cr8_write = cr8_write, .apic_id = apic_id,
    .cpu_count = cpu_count, .ferr = ferr, .hypercall = hypercall, .lock_begin = nothing, .lock_end = nothing,
};

bare *bare_new(unsigned vm_mode_value)
{
    bare *b = calloc(1, sizeof *b);
    b->cpu = mmap(NULL, sizeof *b->cpu, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    b->ram = mmap(NULL, BARE_RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    b->io_value = ~UINT64_C(0);
    b->cpu->env = &env;
    b->cpu->env_data = b;
    b->cpu->phys_mask = (UINT64_C(1) << 40) - 1;
    b->cpu->model = x86_model_find(NULL);
    x86_tlb_init(b->cpu);
    x86_cpu_reset(b->cpu, false);
    x86_cpu_set_mode(b->cpu, vm_mode_value);
    return b;
}

void bare_free(bare *b)
{
    interp_destroy_cpu(b->cpu);
    munmap(b->ram, BARE_RAM);
    munmap(b->cpu, sizeof *b->cpu);
    free(b);
}

void bare_code(bare *b, uint64_t at, const void *bytes, unsigned n)
{
    memcpy(b->ram + at, bytes, n);
    interp_code_changed_cpu(b->cpu, at, n);
}

x86_stop bare_run(bare *b, int64_t count)
{
    b->cpu->budget = count;
    return interp_run_cpu(b->cpu);
}
