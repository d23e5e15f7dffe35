/* sum.c - checksums of memory and registers, to tell whether two machines are in the same state. */
#include "core/replay.h"

#include <string.h>

#define PRIME UINT64_C(0x9E3779B97F4A7C15)

static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * PRIME;
    return h ^ h >> 29;
}

static uint64_t mix_bytes(uint64_t h, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    for (; bytes >= 8; p += 8, bytes -= 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        h = mix(h, v);
    }
    for (; bytes; p++, bytes--)
        h = mix(h, *p);
    return h;
}

static bool is_zero(const uint8_t *page)
{
    return !page[0] && !memcmp(page, page + 1, 4095);
}

/* Pages of zeros do not count, so that memory nobody touched costs little. */
uint64_t vm_ram_sum(vm_machine *m)
{
    uint64_t h = PRIME;
    for (size_t i = 0; i < m->view.count; i++) {
        const vm_range *range = &m->view.ranges[i];
        if (range->region->kind > VM_REGION_FILE)
            continue;
        for (uint64_t at = 0; at < range->bytes; at += 4096) {
            const uint8_t *page = range->region->host + range->offset + at;
            if (!is_zero(page))
                h = mix_bytes(mix(h, range->gpa + at), page, 4096);
        }
    }
    return h;
}

/* Not the last x87 instruction's address and operand: what they are worth depends on the host. */
uint64_t vm_cpu_sum(vm_vcpu *cpu)
{
    x86_cpu *x = &cpu->x86;
    uint64_t h = PRIME, seg[4];
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    h = mix_bytes(h, x->gpr, sizeof x->gpr);
    h = mix(mix(h, x->rip), x->rflags);
    for (unsigned i = 0; i < X86_NSEG; i++) {
        seg[0] = x->seg[i].base;
        seg[1] = x->seg[i].limit;
        seg[2] = x->seg[i].sel;
        seg[3] = x->seg[i].attr;
        h = mix_bytes(h, seg, sizeof seg);
    }
    const uint64_t system[] = { x->cr0, x->cr2, x->cr3, x->cr4, x->efer, x->star, x->lstar, x->kernel_gs_base,
                                X86_FPU_FCW(x), X86_FPU_FSW(x), X86_FPU_FTW(x), X86_FPU_MXCSR(x) };
    h = mix_bytes(h, system, sizeof system);
    for (unsigned i = 0; i < 8; i++)
        h = mix_bytes(h, X86_FPU_ST(x, i), 10);
    h = mix_bytes(h, X86_FPU_XMM(x, 0), 256);
    return mix_bytes(h, X86_FPU_YMMH(x, 0), 256);
}
