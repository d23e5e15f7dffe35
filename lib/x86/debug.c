/* debug.c - debug registers at work: breakpoints of all four types and single-stepping (SDM vol. 3, chapter 17).
 *
 * Instruction breakpoints are faults, met before the instruction; data and I/O breakpoints and the TF trap are
 * collected in `dr_hit` while it executes and reported after it as one #DB. All of it happens only while cpu->careful.
 */
#include "x86/system.h"

enum { DR_EXEC, DR_WRITE, DR_IO, DR_READ_WRITE };

#define DR6_BS 0x4000u

/* Breakpoint registers of the kinds in `types` (a bit set of DR_*) that overlap [at, at + n). */
static unsigned matching(const x86_cpu *cpu, uint64_t at, unsigned n, unsigned types)
{
    unsigned hits = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned type = cpu->dr[7] >> (16 + 4 * i) & 3, size = cpu->dr[7] >> (18 + 4 * i) & 3;
        uint64_t bytes = size == 2 ? 8 : size + 1, first = cpu->dr[i] & ~(bytes - 1);
        if (!(types >> type & 1))
            continue;
        if (at < first + bytes && first < at + n)
            hits |= 1u << i;
    }
    return hits;
}

static unsigned enabled(const x86_cpu *cpu)
{
    unsigned hits = 0;
    for (unsigned i = 0; i < 4; i++)
        if (cpu->dr[7] >> (2 * i) & 3)
            hits |= 1u << i;
    return hits;
}

void x86_check_data_breakpoint(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access)
{
    if (!n || !(cpu->dr[7] & 0xff))
        return;
    unsigned types = 1u << DR_READ_WRITE | (access & X86_WRITE ? 1u << DR_WRITE : 0);
    cpu->dr_hit |= (uint8_t)matching(cpu, la, n, types);
}

void x86_check_io_breakpoint(x86_cpu *cpu, uint16_t port, unsigned n)
{
    if (cpu->careful && (cpu->cr4 & X86_CR4_DE))
        cpu->dr_hit |= (uint8_t)matching(cpu, port, n, 1u << DR_IO);
}

void x86_before_careful(x86_cpu *cpu)
{
    cpu->no_trap = cpu->keep_rf = false;
    if (cpu->inhibit != 2)
        cpu->dr_hit = 0;
    if (!(cpu->dr[7] & 0xff) || (cpu->rflags & X86_FL_RF) || cpu->inhibit == 2)
        return;
    uint64_t la = x86_is_long(cpu) ? cpu->rip : (uint32_t)(cpu->seg[X86_CS].base + cpu->rip);
    unsigned hits = matching(cpu, la, 1, 1u << DR_EXEC);
    if (hits & enabled(cpu)) {
        x86_fault fault = { .vector = X86_DB, .dr6 = hits };
        x86_raise_fault(cpu, &fault);
    }
}

/* RF lasts for one instruction. An instruction that loads RFLAGS (IRET, task switch) decides for itself: it cannot have
 * begun with RF set and kept it, so "set before and still set" means it has served. */
static void retire_rf(x86_cpu *cpu, uint64_t rflags_before)
{
    if ((rflags_before & X86_FL_RF) && (cpu->rflags & X86_FL_RF) && !cpu->keep_rf)
        cpu->rflags &= ~(uint64_t)X86_FL_RF;
    cpu->keep_rf = false;
}

void x86_after_careful(x86_cpu *cpu, uint64_t rflags_before, uint8_t inhibit_before)
{
    unsigned hits = cpu->dr_hit;
    uint64_t dr6 = 0;
    (void)inhibit_before;
    cpu->rip = cpu->next_rip;
    retire_rf(cpu, rflags_before);
    x86_mode_changed(cpu);
    if (cpu->inhibit == 2)             /* MOV SS, POP SS: everything waits for the next instruction */
        return;
    cpu->dr_hit = 0;
    if (hits & enabled(cpu))
        dr6 |= hits;
    if ((rflags_before & X86_FL_TF) && !cpu->no_trap)
        dr6 |= DR6_BS;
    cpu->no_trap = false;
    if (dr6) {
        x86_fault trap = { .vector = X86_DB, .dr6 = dr6 };
        x86_raise_fault(cpu, &trap);
    }
}
