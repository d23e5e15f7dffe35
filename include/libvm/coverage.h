/* coverage.h - what guest code went through, recorded without callbacks: edge counters, block traces, comparisons.
 *
 * A branch is an instruction that may continue elsewhere than behind itself: JMP, Jcc, CALL, RET, LOOP, JCXZ, near or
 * far, INT, IRET, SYSCALL and their like. An edge is a branch that has retired: it leads from the branch's own address
 * to the address where execution goes on, whether the branch was taken or not. A block begins where an edge leads to.
 * So a straight stretch of code is counted once, at the branch that ends it, and neither page ends, budgets, exits,
 * faults, interrupts nor what a backend keeps in its caches make edges: the same run gives the same record on the
 * interpreter and on the JIT. All addresses are linear (gva). A REP instruction is not a branch.
 *
 * All of this works on the software backends; machines on KVM refuse it with VM_E_UNSUPPORTED, and a machine that
 * records refuses to be moved there. Nothing is paid while it is off. Turning something on or off throws translated
 * code away; do it once, not once a run. Memory given here stays the caller's; it must stay valid until replaced, turned
 * off, or the machine is destroyed, and can be read and cleared at any time. It is up to date whenever vm_vcpu_run() has
 * returned and in every callback. Clones made by vm_fork() begin with all of it off.
 */
#ifndef LIBVM_INCLUDE_COVERAGE_H
#define LIBVM_INCLUDE_COVERAGE_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Counts edges in AFL's layout: for an edge from the block whose branch is at `b` to the block at `t`,
 *     map[((id(b) >> 1) ^ id(t)) & (bytes - 1)]++        id(a) = vm_coverage_id(a)
 * Counters are bytes and wrap. `bytes` is a power of two from 256 to 2^30. Several vCPUs share the map without locks: a
 * count may get lost between two of them, never with one. map NULL or bytes 0: off.
 * VM_E_INVALID bad size; VM_E_UNSUPPORTED on KVM; VM_E_BUSY while a vCPU runs, callbacks included. */
VM_API int vm_coverage(vm_machine *m, uint8_t *map, size_t bytes);

/* Only branches at gva in [begin, end) count, for edge counters and block traces; begin == end == 0 (the default): all.
 * VM_E_INVALID begin >= end otherwise. The other errors as above. */
VM_API int vm_coverage_range(vm_machine *m, uint64_t begin, uint64_t end);

/* The id of a block: a hash of an address. */
static inline uint32_t vm_coverage_id(uint64_t gva) { return (uint32_t)(gva * UINT64_C(0x7f4a7c15) >> 15); }

/* Writes the address of every block that the vCPU enters into a ring, in order:
 *     ring[(*head)++ & (entries - 1)] = gva
 * `entries` is a power of two from 1 to 2^27; *head is the caller's too, and can be set to any value between runs.
 * ring NULL or entries 0: off. Errors as above. */
VM_API int vm_block_trace(vm_vcpu *cpu, uint64_t *ring, size_t entries, uint64_t *head);

/* A comparison that the guest made. */
typedef enum vm_compare_kind {
    VM_COMPARE_CMP = 1,                 /* CMP */
    VM_COMPARE_TEST,                    /* TEST */
    VM_COMPARE_SUB,                     /* SUB */
    VM_COMPARE_STRING,                  /* CMPS, one element: a at DS:rSI, b at ES:rDI */
    VM_COMPARE_SCAN,                    /* SCAS, one element: a is the accumulator */
    VM_COMPARE_VECTOR                   /* PCMPEQ*, PTEST and the VEX forms: what memcmp() and strcmp() are made of */
} vm_compare_kind;
typedef struct vm_compare {
    uint64_t address;                   /* of the instruction, linear */
    uint8_t  kind;                      /* vm_compare_kind */
    uint8_t  width;                     /* bytes compared: 1, 2, 4, 8; VECTOR: 8, 16, 32 */
    bool     is_constant;               /* b is part of the instruction */
    uint8_t  zero[5];
    uint64_t a[4], b[4];                /* the operands in little-endian order, zero beyond width; an immediate
                                           sign-extended to width */
} vm_compare;

/* Writes the operands of every comparison that the vCPU retires into a ring, as vm_block_trace() does with blocks.
 * Compare instructions are several times slower while it is on. Errors as above. */
VM_API int vm_compare_log(vm_vcpu *cpu, vm_compare *ring, size_t entries, uint64_t *head);

#ifdef __cplusplus
}
#endif
#endif
