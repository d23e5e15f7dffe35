/* cpustate.h - all of a vCPU's state in one plain struct: what snapshots hold and snapshot files contain.
 *
 * Derived fields (cpl, code_size...) are not in it; they are recomputed. Pointers neither. A struct from a file goes
 * through vm_cpu_state_check() before it is applied.
 */
#ifndef LIBVM_CPUSTATE_H
#define LIBVM_CPUSTATE_H

#include "core/core.h"

typedef struct vm_cpu_system {         /* x86_cpu from gdtr to pdpte, in its order */
    x86_dtr gdtr, idtr;
    uint64_t cr0, cr2, cr3, cr4, xcr0, efer;
    uint64_t dr[8];
    uint64_t star, lstar, cstar, sfmask, kernel_gs_base;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t tsc_aux, tsc_adjust, pat, misc_enable, spec_ctrl;
    uint64_t mtrr_def, mtrr_fixed[11], mtrr_var[16];
    uint64_t mcg_status, mcg_ctl, mc_bank[16];
    uint64_t hwcr, syscfg, de_cfg;
    uint64_t pdpte[4];
} vm_cpu_system;

typedef struct vm_cpu_state {
    uint64_t gpr[16], rip, next_rip, rflags;     /* as in x86_cpu */
    x86_seg seg[X86_NSEG];
    uint64_t retired, random_state;
    /* bytes, each 0 or 1 where the vCPU has a bool */
    uint8_t flat, halted, inhibit, nmi_blocked, nmi_pending;
    uint8_t keep_rf, no_trap, ext, dr_hit, spent;
    uint8_t is_parked, sipi_vector, init_pending, sipi_pending, nmis_latched, has_pending, is_shut_down, bare_cr8;
    uint8_t inject_set, inject_has_error, inject_vector, has_event;    /* has_event: the machine's was not reported */
    uint8_t pad[2];
    uint32_t inject_error, pending_reason;
    uint32_t io_count, io_pos;
    uint64_t pending_rip;
    x86_fault fault;
    x86_io_access io;                            /* behind a pending exit */
    vm_cpu_system system;
    x86_fpu fpu;
    x86_io_access *io_log;                       /* io_count of them; NULL when 0 */
} vm_cpu_state;

int vm_cpu_state_take(vm_vcpu *cpu, vm_cpu_state *s);            /* VM_E_NOMEM */
/* The vCPU must not run. True: translations of linear addresses may have changed. */
bool vm_cpu_state_put(vm_vcpu *cpu, const vm_cpu_state *s);
int vm_cpu_state_check(const vm_vcpu *cpu, const vm_cpu_state *s);   /* VM_E_FORMAT; io_log too */
static inline bool vm_cpu_state_pages(const vm_cpu_state *s)
{
    return (s->system.cr0 & X86_CR0_PG) && !s->flat;
}

#endif
