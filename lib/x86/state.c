/* state.c - the CPU's state as a whole: reset values, known starting modes, and what is derived from it.
 *
 * Derived fields (cpl, ctx, code_size, stack_size, careful) are recomputed only by x86_mode_changed(). CPL is SS.DPL,
 * as in hardware: it stays right through conforming code, null SS in long mode and the moment between setting CR0.PE
 * and the first far jump.
 */
#include "x86/system.h"

#include <string.h>

#define ATTR_CODE16 0x009b
#define ATTR_CODE32 (0x009b | X86_SEG_DB | X86_SEG_G)
#define ATTR_CODE64 (0x009b | X86_SEG_L | X86_SEG_G)
#define ATTR_DATA16 0x0093
#define ATTR_DATA32 (0x0093 | X86_SEG_DB | X86_SEG_G)
#define ATTR_LDT 0x0082
#define ATTR_TSS_BUSY 0x008b
#define DR7_ENABLES 0xffu

void x86_mode_changed(x86_cpu *cpu)
{
    bool is_long = x86_lma(cpu) && (cpu->seg[X86_CS].attr & X86_SEG_L);
    if (x86_is_real(cpu))
        cpu->cpl = 0;
    else if (x86_is_v86(cpu))
        cpu->cpl = 3;
    else
        cpu->cpl = X86_SEG_DPL(&cpu->seg[X86_SS]);
    if (cpu->cpl == 3)
        cpu->ctx = X86_CTX_USER;
    else
        cpu->ctx = (cpu->cr4 & X86_CR4_SMAP) && (cpu->rflags & X86_FL_AC) ? X86_CTX_KERNEL_AC : X86_CTX_KERNEL;
    cpu->code_size = is_long ? 8 : cpu->seg[X86_CS].attr & X86_SEG_DB ? 4 : 2;
    cpu->stack_size = is_long ? 8 : cpu->seg[X86_SS].attr & X86_SEG_DB ? 4 : 2;
    bool checks_alignment = cpu->cpl == 3 && (cpu->rflags & X86_FL_AC) && (cpu->cr0 & X86_CR0_AM);
    bool is_step = cpu->step_asked || checks_alignment || (cpu->rflags & (X86_FL_TF | X86_FL_RF)) ||
                   (cpu->dr[7] & DR7_ENABLES);
    cpu->careful = (uint8_t)((is_step ? X86_CAREFUL_STEP : 0) | (cpu->watch & X86_WATCH_ALL ? X86_CAREFUL_DATA : 0));
    x86_irq_window(cpu);
}

/* ---- reset ---- */

static void reset_segments(x86_cpu *cpu)
{
    for (unsigned i = X86_ES; i <= X86_GS; i++)
        cpu->seg[i] = (x86_seg){ .limit = 0xffff, .attr = ATTR_DATA16 };
    cpu->seg[X86_CS] = (x86_seg){ .sel = 0xf000, .base = 0xffff0000, .limit = 0xffff, .attr = ATTR_CODE16 };
    cpu->seg[X86_LDTR] = (x86_seg){ .limit = 0xffff, .attr = ATTR_LDT };
    cpu->seg[X86_TR] = (x86_seg){ .limit = 0xffff, .attr = ATTR_TSS_BUSY };
    cpu->gdtr = cpu->idtr = (x86_dtr){ .base = 0, .limit = 0xffff };
}

static void reset_fpu(x86_cpu *cpu)
{
    memset(&cpu->fpu, 0, sizeof cpu->fpu);
    X86_FPU_FCW(cpu) = 0x0040;         /* RESET leaves 40h, FNINIT sets 37Fh (SDM vol. 3, table 9-1) */
    X86_FPU_FTW(cpu) = 0xff;           /* tags 5555h: every register holds +0.0 */
    X86_FPU_MXCSR(cpu) = 0x1f80;
}

/* State that INIT leaves alone and RESET clears. */
static void reset_persistent(x86_cpu *cpu)
{
    reset_fpu(cpu);
    cpu->cr0 = X86_CR0_CD | X86_CR0_NW;
    cpu->xcr0 = 1;
    cpu->tsc_adjust = cpu->tsc_aux = 0;
    cpu->star = cpu->lstar = cpu->cstar = cpu->sfmask = cpu->kernel_gs_base = 0;
    cpu->sysenter_cs = cpu->sysenter_esp = cpu->sysenter_eip = 0;
    cpu->pat = UINT64_C(0x0007040600070406);
    cpu->misc_enable = 1;              /* fast strings */
    cpu->spec_ctrl = 0;
    cpu->mtrr_def = 0;
    memset(cpu->mtrr_fixed, 0, sizeof cpu->mtrr_fixed);
    memset(cpu->mtrr_var, 0, sizeof cpu->mtrr_var);
    cpu->mcg_status = cpu->mcg_ctl = cpu->syscfg = 0;
    memset(cpu->mc_bank, 0, sizeof cpu->mc_bank);
    cpu->hwcr = UINT64_C(1) << 24;     /* the TSC counts at the P0 frequency */
    cpu->de_cfg = 2;                   /* LFENCE is dispatch serialising */
}

void x86_cpu_reset(x86_cpu *cpu, bool is_init)
{
    uint64_t cache_bits = cpu->cr0 & (X86_CR0_CD | X86_CR0_NW);
    if (!cpu->model)
        cpu->model = x86_model_find(NULL);
    cpu->phys_mask = x86_model_phys_mask(cpu->model);
    if (!is_init) {
        reset_persistent(cpu);
        cache_bits = X86_CR0_CD | X86_CR0_NW;
    }
    memset(cpu->gpr, 0, sizeof cpu->gpr);
    cpu->gpr[X86_RDX] = x86_model_signature(cpu->model);
    cpu->rip = cpu->next_rip = 0xfff0;
    cpu->rflags = X86_FL_1;
    cpu->cr0 = cache_bits | X86_CR0_ET;
    cpu->cr2 = cpu->cr3 = cpu->cr4 = cpu->efer = 0;
    memset(cpu->pdpte, 0, sizeof cpu->pdpte);
    memset(cpu->dr, 0, sizeof cpu->dr);
    cpu->dr[6] = X86_DR6_INIT;
    cpu->dr[7] = X86_DR7_INIT;
    reset_segments(cpu);
    cpu->flat = cpu->halted = cpu->no_trap = false;
    cpu->nmi_blocked = cpu->nmi_pending = false;
    cpu->inhibit = cpu->ext = cpu->dr_hit = 0;
    x86_io_retire(cpu);
    x86_mode_changed(cpu);
    if (cpu->env)
        x86_paging_changed(cpu, 0);
}

/* ---- starting modes ---- */

static void set_flat_segments(x86_cpu *cpu, uint16_t code_attr)
{
    for (unsigned i = X86_ES; i <= X86_GS; i++)
        cpu->seg[i] = (x86_seg){ .sel = 0x10, .limit = 0xffffffff, .attr = ATTR_DATA32 };
    cpu->seg[X86_CS] = (x86_seg){ .sel = 0x08, .limit = 0xffffffff, .attr = code_attr };
}

static void set_usable_fpu(x86_cpu *cpu)
{
    X86_FPU_FCW(cpu) = 0x037f;
    X86_FPU_FTW(cpu) = 0;
}

/* VM_MODE_*: RESET 0, REAL 1, FLAT32 2, FLAT64 3. */
void x86_cpu_set_mode(x86_cpu *cpu, unsigned mode)
{
    x86_cpu_reset(cpu, false);
    if (mode == 0)
        return;
    cpu->rip = cpu->next_rip = 0;
    cpu->gpr[X86_RDX] = 0;
    set_usable_fpu(cpu);
    if (mode == 1) {
        cpu->cr0 = X86_CR0_ET;
        cpu->seg[X86_CS] = (x86_seg){ .limit = 0xffff, .attr = ATTR_CODE16 };
        cpu->idtr.limit = 0x3ff;
    } else {
        cpu->cr0 = X86_CR0_ET | X86_CR0_PE | X86_CR0_MP | X86_CR0_NE | X86_CR0_WP;
        cpu->cr4 = (X86_CR4_OSFXSR | X86_CR4_OSXMMEXCPT) & x86_cr4_allowed(cpu);
        cpu->gdtr.limit = cpu->idtr.limit = 0;
        set_flat_segments(cpu, mode == 3 ? ATTR_CODE64 : ATTR_CODE32);
        if (x86_cr4_allowed(cpu) & X86_CR4_OSXSAVE) {
            cpu->cr4 |= X86_CR4_OSXSAVE;
            cpu->xcr0 = x86_xcr0_allowed(cpu);
        }
    }
    if (mode == 3) {
        cpu->cr0 |= X86_CR0_PG;
        cpu->cr4 |= X86_CR4_PAE;
        cpu->efer = X86_EFER_SCE | X86_EFER_LME | X86_EFER_LMA | X86_EFER_NXE;
        cpu->flat = true;
    }
    x86_mode_changed(cpu);
    if (cpu->env)
        x86_paging_changed_in_place(cpu);
}
