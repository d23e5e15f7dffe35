/* cover.h - what executed branches and comparisons are written to: see <libvm/coverage.h> for what counts.
 *
 * The pointers are the program's memory and may be changed only while the CPU does not run and has no code cached: the
 * JIT compiles them in, x86_offer() replaces the semantic functions of comparisons.
 */
#ifndef LIBVM_X86_COVER_H
#define LIBVM_X86_COVER_H

#include <libvm/coverage.h>
#include "x86/insn.h"

static inline bool x86_covers(const x86_cover *c, uint64_t from) { return !c->bytes || from - c->begin < c->bytes; }
static inline uint32_t x86_cover_index(const x86_cover *c, uint64_t from, uint64_t to)
{
    return (vm_coverage_id(from) >> 1 ^ vm_coverage_id(to)) & c->mask;
}
static inline uint64_t x86_code_la(const x86_cpu *cpu, uint64_t rip)
{
    return cpu->code_size == 8 ? rip : (uint32_t)(cpu->seg[X86_CS].base + rip);
}
/* The branch at linear address `from` has retired; rip is where it led. */
void x86_cover_branch(x86_cpu *cpu, uint64_t from);

/* Give a comparison the semantic function that also logs it. */
void x86_log_compare(x86_insn *in);
bool x86_is_logged(const x86_insn *in);
/* CMPS and SCAS: one element. */
void x86_log_element(x86_cpu *cpu, unsigned kind, unsigned width, uint64_t a, uint64_t b);

#endif
