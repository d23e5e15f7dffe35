/* op_sys.c - system instructions: control and debug registers, descriptor-table registers, TLB maintenance, IF, ports,
 * time, MSRs, system calls (SDM vol. 2 under each; AMD APM vol. 3 for SYSCALL and SYSRET).
 */
#include "x86/ops.h"
#include "x86/system.h"

#include <string.h>

void x86_require_cpl0(x86_cpu *cpu)
{
    if (cpu->cpl != 0)
        x86_raise_error(cpu, X86_GP, 0);
}

static _Noreturn void raise_gp(x86_cpu *cpu)
{
    x86_raise_error(cpu, X86_GP, 0);
}

static unsigned word_size(const x86_cpu *cpu) { return x86_is_long(cpu) ? 8 : 4; }

/* ---- paging state ---- */

void x86_paging_changed_in_place(x86_cpu *cpu)
{
    cpu->env->root_changed(cpu, 0);
}

void x86_paging_changed(x86_cpu *cpu, unsigned how)
{
    cpu->flat = false;
    cpu->env->root_changed(cpu, how);
}

/* ---- control registers (SDM vol. 3, 2.5 and 4.1) ---- */

#define CR0_WRITABLE 0xe005003fu

/* CR0.PG 0 to 1: long mode or PAE may have to begin with it. */
static void enable_paging(x86_cpu *cpu)
{
    bool is_pae = cpu->cr4 & X86_CR4_PAE;
    if (cpu->efer & X86_EFER_LME) {
        bool is_tss16 = (cpu->seg[X86_TR].attr & X86_SEG_P) && !(cpu->seg[X86_TR].attr & 8);
        if (!is_pae || (cpu->seg[X86_CS].attr & X86_SEG_L) || is_tss16)
            raise_gp(cpu);
        cpu->efer |= X86_EFER_LMA;
    } else if (is_pae && !x86_load_pdptes(cpu, cpu->cr3)) {
        raise_gp(cpu);
    }
}

static void write_cr0(x86_cpu *cpu, uint64_t v)
{
    if (v >> 32 || ((v & X86_CR0_PG) && !(v & X86_CR0_PE)) || ((v & X86_CR0_NW) && !(v & X86_CR0_CD)))
        raise_gp(cpu);
    v = (v & CR0_WRITABLE) | X86_CR0_ET;
    uint64_t changed = v ^ cpu->cr0;
    if (changed & X86_CR0_PG) {
        if (v & X86_CR0_PG) {
            enable_paging(cpu);
        } else {
            if (x86_is_long(cpu) || (cpu->cr4 & X86_CR4_PCIDE))
                raise_gp(cpu);
            cpu->efer &= ~(uint64_t)X86_EFER_LMA;
        }
    } else if ((changed & (X86_CR0_CD | X86_CR0_NW)) && (v & X86_CR0_PG) && (cpu->cr4 & X86_CR4_PAE) && !x86_lma(cpu)) {
        if (!x86_load_pdptes(cpu, cpu->cr3))
            raise_gp(cpu);
    }
    cpu->cr0 = v;
    x86_mode_changed(cpu);
    if (changed & X86_CR0_PG)
        x86_paging_changed(cpu, 0);
    else if (changed & (X86_CR0_PE | X86_CR0_WP))
        x86_paging_changed_in_place(cpu);
}

static void write_cr3(x86_cpu *cpu, uint64_t v)
{
    unsigned how = X86_ROOT_LOAD | (cpu->cr4 & X86_CR4_PGE ? X86_ROOT_GLOBAL : 0);
    if ((cpu->cr4 & X86_CR4_PCIDE) && v >> 63) {
        v &= ~(UINT64_C(1) << 63);
        how |= X86_ROOT_KEEP;
    }
    if (x86_lma(cpu) && (v & ~cpu->phys_mask))
        raise_gp(cpu);
    if ((cpu->cr0 & X86_CR0_PG) && (cpu->cr4 & X86_CR4_PAE) && !x86_lma(cpu) && !x86_load_pdptes(cpu, v))
        raise_gp(cpu);
    cpu->cr3 = v;
    x86_paging_changed(cpu, how);
}

static void write_cr4(x86_cpu *cpu, uint64_t v)
{
    const uint64_t paging_bits = X86_CR4_PAE | X86_CR4_PSE | X86_CR4_PGE | X86_CR4_SMEP;
    uint64_t changed = v ^ cpu->cr4;
    if (v & ~x86_cr4_allowed(cpu))
        raise_gp(cpu);
    if (x86_lma(cpu) && !(v & X86_CR4_PAE))
        raise_gp(cpu);
    if ((changed & v & X86_CR4_PCIDE) && (!x86_lma(cpu) || (cpu->cr3 & 0xfff)))
        raise_gp(cpu);
    if ((changed & paging_bits) && (v & X86_CR4_PAE) && (cpu->cr0 & X86_CR0_PG) && !x86_lma(cpu) &&
        !x86_load_pdptes(cpu, cpu->cr3))
        raise_gp(cpu);
    cpu->cr4 = v;
    x86_mode_changed(cpu);
    if (changed & (paging_bits | X86_CR4_SMAP | X86_CR4_PCIDE))
        x86_paging_changed_in_place(cpu);
}

static uint64_t read_cr(x86_cpu *cpu, unsigned index)
{
    switch (index) {
    case 0: return cpu->cr0;
    case 2: return cpu->cr2;
    case 3: return cpu->cr3;
    case 4: return cpu->cr4;
    case 8: return cpu->env->cr8_read(cpu);
    default: x86_raise(cpu, X86_UD);
    }
}

static void write_cr(x86_cpu *cpu, unsigned index, uint64_t v)
{
    switch (index) {
    case 0: write_cr0(cpu, v); break;
    case 2: cpu->cr2 = v; break;
    case 3: write_cr3(cpu, v); break;
    case 4: write_cr4(cpu, v); break;
    case 8:
        if (v & ~UINT64_C(15))
            raise_gp(cpu);
        cpu->env->cr8_write(cpu, (uint8_t)v);
        x86_irq_window(cpu);
        break;
    default: x86_raise(cpu, X86_UD);
    }
}

void x86_op_mov_cr(x86_cpu *cpu, const x86_insn *in)
{
    bool is_write = in->op[0].kind == X86_OP_CR;
    unsigned index = is_write ? in->op[0].reg : in->op[1].reg;
    if (index == 1 || (index > 4 && index != 8))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    if (is_write)
        write_cr(cpu, index, x86_get_gpr(cpu, in->op[1].reg, word_size(cpu)));
    else
        x86_set_gpr(cpu, in->op[0].reg, word_size(cpu), read_cr(cpu, index));
}

void x86_op_clts(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_require_cpl0(cpu);
    cpu->cr0 &= ~(uint64_t)X86_CR0_TS;
}

void x86_op_lmsw(x86_cpu *cpu, const x86_insn *in)
{
    x86_require_cpl0(cpu);
    uint64_t v = x86_get_op(cpu, in, 0) & 15;
    v |= cpu->cr0 & X86_CR0_PE;        /* LMSW can set PE, not clear it */
    write_cr0(cpu, (cpu->cr0 & ~UINT64_C(15)) | v);
}

static void check_umip(x86_cpu *cpu)
{
    if ((cpu->cr4 & X86_CR4_UMIP) && cpu->cpl != 0)
        raise_gp(cpu);
}

void x86_op_smsw(x86_cpu *cpu, const x86_insn *in)
{
    check_umip(cpu);
    x86_set_op(cpu, in, 0, cpu->cr0);
}

/* ---- debug registers (SDM vol. 3, 17.2) ---- */

#define DR7_GD (UINT64_C(1) << 13)

static unsigned checked_dr(x86_cpu *cpu, unsigned index)
{
    if (index > 7 || ((index == 4 || index == 5) && (cpu->cr4 & X86_CR4_DE)))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    if (cpu->dr[7] & DR7_GD) {
        x86_fault fault = { .vector = X86_DB, .dr6 = 0x2000 };          /* BD */
        x86_raise_fault(cpu, &fault);
    }
    return index == 4 || index == 5 ? index + 2 : index;
}

static void write_dr(x86_cpu *cpu, unsigned index, uint64_t v)
{
    if (index >= 6 && v >> 32)
        raise_gp(cpu);
    if (index == 6)
        v = (v & 0xe00f) | X86_DR6_INIT;
    else if (index == 7)
        v = (v & 0xffff2bff) | X86_DR7_INIT;
    cpu->dr[index] = v;
    x86_mode_changed(cpu);
}

void x86_op_mov_dr(x86_cpu *cpu, const x86_insn *in)
{
    bool is_write = in->op[0].kind == X86_OP_DR;
    unsigned index = checked_dr(cpu, is_write ? in->op[0].reg : in->op[1].reg);
    if (is_write)
        write_dr(cpu, index, x86_get_gpr(cpu, in->op[1].reg, word_size(cpu)));
    else
        x86_set_gpr(cpu, in->op[0].reg, word_size(cpu), cpu->dr[index]);
}

/* ---- descriptor-table registers ---- */

static void store_dtr(x86_cpu *cpu, const x86_insn *in, const x86_dtr *dtr)
{
    uint8_t buf[10];
    unsigned n = 2 + word_size(cpu);
    check_umip(cpu);
    memcpy(buf, &dtr->limit, 2);
    memcpy(buf + 2, &dtr->base, 8);
    x86_write_linear(cpu, x86_op_linear(cpu, in, n, X86_WRITE), buf, n);
}

static void load_dtr(x86_cpu *cpu, const x86_insn *in, x86_dtr *dtr)
{
    uint8_t buf[10];
    unsigned n = 2 + word_size(cpu);
    x86_dtr v = { 0 };
    x86_require_cpl0(cpu);
    x86_read_linear(cpu, x86_op_linear(cpu, in, n, X86_READ), buf, n);
    memcpy(&v.limit, buf, 2);
    memcpy(&v.base, buf + 2, n - 2);
    if (n == 10 && !x86_canonical(v.base))
        raise_gp(cpu);
    if (n == 6 && in->osz == 2)
        v.base &= 0xffffff;
    *dtr = v;
}

void x86_op_sgdt(x86_cpu *cpu, const x86_insn *in) { store_dtr(cpu, in, &cpu->gdtr); }
void x86_op_sidt(x86_cpu *cpu, const x86_insn *in) { store_dtr(cpu, in, &cpu->idtr); }
void x86_op_lgdt(x86_cpu *cpu, const x86_insn *in) { load_dtr(cpu, in, &cpu->gdtr); }
void x86_op_lidt(x86_cpu *cpu, const x86_insn *in) { load_dtr(cpu, in, &cpu->idtr); }

static void require_protected(x86_cpu *cpu)
{
    if (!x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
}

void x86_op_sldt(x86_cpu *cpu, const x86_insn *in)
{
    require_protected(cpu);
    check_umip(cpu);
    x86_set_op(cpu, in, 0, cpu->seg[X86_LDTR].sel);
}

void x86_op_str(x86_cpu *cpu, const x86_insn *in)
{
    require_protected(cpu);
    check_umip(cpu);
    x86_set_op(cpu, in, 0, cpu->seg[X86_TR].sel);
}

/* A system descriptor in the GDT of one of `types`, with its full base. */
static void load_system_seg(x86_cpu *cpu, uint16_t sel, unsigned types, x86_desc *d, x86_seg *seg)
{
    if (sel & 4)
        x86_raise_sel(cpu, X86_GP, sel);
    x86_desc_load(cpu, sel, X86_GP, d);
    if (x86_desc_s(d) || !(types >> x86_desc_type(d) & 1))
        x86_raise_sel(cpu, X86_GP, sel);
    if (!x86_desc_p(d))
        x86_raise_sel(cpu, X86_NP, sel);
    if (x86_lma(cpu))
        x86_desc_load_upper(cpu, d, X86_GP);
    x86_desc_to_seg(d, sel, seg);
    seg->base |= (uint64_t)d->up << 32;
    if (!x86_canonical(seg->base))
        x86_raise_sel(cpu, X86_GP, sel);
}

void x86_op_lldt(x86_cpu *cpu, const x86_insn *in)
{
    x86_desc d;
    x86_seg seg;
    require_protected(cpu);
    x86_require_cpl0(cpu);
    uint16_t sel = (uint16_t)x86_get_op(cpu, in, 0);
    if (x86_is_null(sel)) {
        x86_set_null_seg(cpu, X86_LDTR, sel);
        return;
    }
    load_system_seg(cpu, sel, 1u << X86_SYS_LDT, &d, &seg);
    cpu->seg[X86_LDTR] = seg;
}

void x86_op_ltr(x86_cpu *cpu, const x86_insn *in)
{
    x86_desc d;
    x86_seg seg;
    require_protected(cpu);
    x86_require_cpl0(cpu);
    uint16_t sel = (uint16_t)x86_get_op(cpu, in, 0);
    if (x86_is_null(sel))
        raise_gp(cpu);
    load_system_seg(cpu, sel, x86_lma(cpu) ? 1u << X86_SYS_TSS32 : 1u << X86_SYS_TSS32 | 1u << X86_SYS_TSS16, &d, &seg);
    x86_desc_set_busy(cpu, d.la, true);
    seg.attr |= 2;
    cpu->seg[X86_TR] = seg;
}

/* ---- TLB maintenance ---- */

void x86_op_invlpg(x86_cpu *cpu, const x86_insn *in)
{
    x86_require_cpl0(cpu);
    if (in->op[0].kind != X86_OP_MEM)
        x86_raise(cpu, X86_UD);
    uint64_t la = x86_offset(cpu, in);
    if (!x86_is_long(cpu))
        la = (uint32_t)(la + cpu->seg[in->seg].base);
    else if (in->seg >= X86_FS)
        la += cpu->seg[in->seg].base;
    if (x86_canonical(la))             /* no segment or page fault either */
        cpu->env->invalidate(cpu, la & X86_PAGE_MASK, 0x1000);
}

void x86_op_invpcid(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t desc[2];
    if (!x86_has(cpu, X86_FEAT_INVPCID))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    uint64_t type = x86_get_gpr(cpu, in->op[0].reg, word_size(cpu));
    x86_read_linear(cpu, x86_op_linear(cpu, in, 16, X86_READ), desc, 16);
    if (type > X86_INVPCID_ALL || desc[0] >> 12)
        raise_gp(cpu);
    if (type <= X86_INVPCID_ONE && desc[0] && !(cpu->cr4 & X86_CR4_PCIDE))
        raise_gp(cpu);
    if (type == X86_INVPCID_ADDRESS && !x86_canonical(desc[1]))
        raise_gp(cpu);
    cpu->env->invalidate_pcid(cpu, (unsigned)type, (unsigned)desc[0], desc[1] & X86_PAGE_MASK);
}

/* ---- interrupts, halting, caches ---- */

static void set_if(x86_cpu *cpu, bool on)
{
    if (on && !(cpu->rflags & X86_FL_IF)) {
        cpu->inhibit = 1;
        cpu->rflags |= X86_FL_IF;
        x86_irq_window(cpu);
    } else if (!on) {
        cpu->rflags &= ~(uint64_t)X86_FL_IF;
    }
}

/* Where IOPL forbids it, CLI and STI act on VIF if the virtual-interrupt extensions allow (SDM vol. 3, 20.3 and 20.4).
 */
static void change_if(x86_cpu *cpu, bool on)
{
    unsigned iopl = (cpu->rflags & X86_FL_IOPL) >> 12;
    if (x86_is_real(cpu) || iopl >= cpu->cpl) {
        set_if(cpu, on);
        return;
    }
    bool is_virtual = x86_is_v86(cpu) ? cpu->cr4 & X86_CR4_VME : (cpu->cr4 & X86_CR4_PVI) && cpu->cpl == 3;
    if (!is_virtual || (on && (cpu->rflags & X86_FL_VIP)))
        raise_gp(cpu);
    cpu->rflags = on ? cpu->rflags | X86_FL_VIF : cpu->rflags & ~(uint64_t)X86_FL_VIF;
}

void x86_op_cli(x86_cpu *cpu, const x86_insn *in) { (void)in; change_if(cpu, false); }
void x86_op_sti(x86_cpu *cpu, const x86_insn *in) { (void)in; change_if(cpu, true); }

void x86_op_hlt(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_require_cpl0(cpu);
    if (cpu->rflags & X86_FL_TF)       /* the single-step trap that follows wakes it at once */
        return;
    cpu->halted = true;
    cpu->inhibit = 0;
    cpu->rip = cpu->next_rip;
    x86_io_retire(cpu);
    x86_leave(cpu, X86_STOP_HALT);
}

void x86_op_cache_flush(x86_cpu *cpu, const x86_insn *in)             /* INVD, WBINVD, WBNOINVD: memory is coherent */
{
    (void)in;
    x86_require_cpl0(cpu);
}

/* ---- ports (SDM vol. 1, 19.5) ---- */

void x86_check_port(x86_cpu *cpu, uint16_t port, unsigned n)
{
    const x86_seg *tr = &cpu->seg[X86_TR];
    uint16_t io_base, bits;
    x86_check_io_breakpoint(cpu, port, n);
    if (x86_is_real(cpu) || (!x86_is_v86(cpu) && cpu->cpl <= (cpu->rflags & X86_FL_IOPL) >> 12))
        return;
    if (!(tr->attr & X86_SEG_P) || !(tr->attr & 8) || tr->limit < 0x67)
        raise_gp(cpu);
    x86_read_system(cpu, tr->base + 0x66, &io_base, 2);
    uint32_t at = io_base + port / 8u;
    if (at + 1 > tr->limit)
        raise_gp(cpu);
    x86_read_system(cpu, tr->base + at, &bits, 2);
    if (bits >> (port % 8) & ((1u << n) - 1))
        raise_gp(cpu);
}

/* ---- time, identity, random numbers, MSRs ---- */

static void set_edx_eax(x86_cpu *cpu, uint64_t v)
{
    cpu->gpr[X86_RAX] = (uint32_t)v;
    cpu->gpr[X86_RDX] = v >> 32;
}

uint64_t x86_read_tsc(x86_cpu *cpu)
{
    return cpu->env->tsc(cpu) + cpu->tsc_adjust;
}

static void check_tsd(x86_cpu *cpu)
{
    if ((cpu->cr4 & X86_CR4_TSD) && cpu->cpl != 0)
        raise_gp(cpu);
}

void x86_op_rdtsc(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    check_tsd(cpu);
    set_edx_eax(cpu, x86_read_tsc(cpu));
}

void x86_op_rdtscp(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if (!x86_has(cpu, X86_FEAT_RDTSCP))
        x86_raise(cpu, X86_UD);
    check_tsd(cpu);
    set_edx_eax(cpu, x86_read_tsc(cpu));
    cpu->gpr[X86_RCX] = (uint32_t)cpu->tsc_aux;
}

void x86_op_rdpmc(x86_cpu *cpu, const x86_insn *in)                   /* four counters that never count */
{
    (void)in;
    if ((!(cpu->cr4 & X86_CR4_PCE) && cpu->cpl != 0) || (uint32_t)cpu->gpr[X86_RCX] > 3)
        raise_gp(cpu);
    set_edx_eax(cpu, 0);
}

/* True: a hook has done the instruction. */
static bool is_msr_hooked(x86_cpu *cpu, uint64_t value, unsigned flags)
{
    x86_hook h = { .kind = X86_HOOK_MSR, .number = (uint32_t)cpu->gpr[X86_RCX], .address = (uint32_t)cpu->gpr[X86_RCX],
                   .value = value, .bytes = 8, .flags = (uint8_t)flags };
    return x86_hooked(cpu, X86_HOOK_MSR) && x86_hook_event(cpu, h);
}

static bool is_call_hooked(x86_cpu *cpu, unsigned flags)
{
    uint64_t la = x86_rip_linear(cpu);
    x86_hook h = { .kind = X86_HOOK_SYSCALL, .number = la, .address = la, .value = cpu->gpr[X86_RAX],
                   .flags = (uint8_t)flags };
    return x86_hooked(cpu, X86_HOOK_SYSCALL) && x86_hook_event(cpu, h);
}

void x86_op_rdmsr(x86_cpu *cpu, const x86_insn *in)
{
    uint64_t v;
    (void)in;
    x86_require_cpl0(cpu);
    if (is_msr_hooked(cpu, 0, 0))
        return;
    if (!x86_msr_read(cpu, (uint32_t)cpu->gpr[X86_RCX], &v))
        raise_gp(cpu);
    set_edx_eax(cpu, v);
}

void x86_op_wrmsr(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    x86_require_cpl0(cpu);
    uint64_t v = (uint32_t)cpu->gpr[X86_RAX] | cpu->gpr[X86_RDX] << 32;
    if (is_msr_hooked(cpu, v, X86_EVENT_WRITE))
        return;
    if (!x86_msr_write(cpu, (uint32_t)cpu->gpr[X86_RCX], v))
        raise_gp(cpu);
}

void x86_op_cpuid(x86_cpu *cpu, const x86_insn *in)
{
    uint32_t out[4];
    (void)in;
    x86_hook h = { .kind = X86_HOOK_CPUID, .number = (uint32_t)cpu->gpr[X86_RAX], .address = (uint32_t)cpu->gpr[X86_RAX],
                   .from = (uint32_t)cpu->gpr[X86_RCX] };
    if (x86_hooked(cpu, X86_HOOK_CPUID) && x86_hook_event(cpu, h))
        return;
    x86_cpuid(cpu, (uint32_t)cpu->gpr[X86_RAX], (uint32_t)cpu->gpr[X86_RCX], out);
    cpu->gpr[X86_RAX] = out[0];
    cpu->gpr[X86_RBX] = out[1];
    cpu->gpr[X86_RCX] = out[2];
    cpu->gpr[X86_RDX] = out[3];
}

static void random_to_register(x86_cpu *cpu, const x86_insn *in, unsigned feature)
{
    if (!x86_has(cpu, feature) || in->op[0].kind != X86_OP_GPR)
        x86_raise(cpu, X86_UD);
    x86_set_gpr(cpu, in->op[0].reg, in->osz, cpu->env->random(cpu));
    cpu->rflags = (cpu->rflags & ~(uint64_t)X86_FL_ARITH) | X86_FL_CF;
}

void x86_op_rdrand(x86_cpu *cpu, const x86_insn *in) { random_to_register(cpu, in, X86_FEAT_RDRAND); }
void x86_op_rdseed(x86_cpu *cpu, const x86_insn *in) { random_to_register(cpu, in, X86_FEAT_RDSEED); }

/* ---- XCR0 (SDM vol. 1, 13.3) ---- */

void x86_op_xgetbv(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if (!(cpu->cr4 & X86_CR4_OSXSAVE))
        x86_raise(cpu, X86_UD);
    uint32_t index = (uint32_t)cpu->gpr[X86_RCX];
    if (index > 1 || (index == 1 && !x86_has(cpu, X86_FEAT_XGETBV1)))
        raise_gp(cpu);
    set_edx_eax(cpu, index == 1 ? cpu->xcr0 & x86_in_use(cpu) : cpu->xcr0);
}

void x86_op_xsetbv(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if (!(cpu->cr4 & X86_CR4_OSXSAVE))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    uint64_t v = (uint32_t)cpu->gpr[X86_RAX] | cpu->gpr[X86_RDX] << 32;
    if ((uint32_t)cpu->gpr[X86_RCX] != 0 || !(v & 1) || (v & ~x86_xcr0_allowed(cpu)) || ((v & 4) && !(v & 2)))
        raise_gp(cpu);
    cpu->xcr0 = v;
}

/* ---- SMAP's AC, FS/GS bases ---- */

static void set_ac(x86_cpu *cpu, bool on)
{
    if (!x86_has(cpu, X86_FEAT_SMAP) || cpu->cpl != 0 || x86_is_v86(cpu))
        x86_raise(cpu, X86_UD);
    cpu->rflags = on ? cpu->rflags | X86_FL_AC : cpu->rflags & ~(uint64_t)X86_FL_AC;
    cpu->ctx = on && (cpu->cr4 & X86_CR4_SMAP) ? X86_CTX_KERNEL_AC : X86_CTX_KERNEL;
}

void x86_op_clac(x86_cpu *cpu, const x86_insn *in) { (void)in; set_ac(cpu, false); }
void x86_op_stac(x86_cpu *cpu, const x86_insn *in) { (void)in; set_ac(cpu, true); }

void x86_op_swapgs(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if (!x86_is_long(cpu))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    uint64_t base = cpu->seg[X86_GS].base;
    cpu->seg[X86_GS].base = cpu->kernel_gs_base;
    cpu->kernel_gs_base = base;
}

static void check_fsgsbase(x86_cpu *cpu)
{
    if (!x86_is_long(cpu) || !(cpu->cr4 & X86_CR4_FSGSBASE))
        x86_raise(cpu, X86_UD);
}

static void read_base(x86_cpu *cpu, const x86_insn *in, unsigned index)
{
    check_fsgsbase(cpu);
    x86_set_gpr(cpu, in->op[0].reg, in->osz, cpu->seg[index].base);
}

static void write_base(x86_cpu *cpu, const x86_insn *in, unsigned index)
{
    check_fsgsbase(cpu);
    uint64_t v = x86_get_gpr(cpu, in->op[0].reg, in->osz);
    if (!x86_canonical(v))
        raise_gp(cpu);
    cpu->seg[index].base = v;
}

void x86_op_rdfsbase(x86_cpu *cpu, const x86_insn *in) { read_base(cpu, in, X86_FS); }
void x86_op_rdgsbase(x86_cpu *cpu, const x86_insn *in) { read_base(cpu, in, X86_GS); }
void x86_op_wrfsbase(x86_cpu *cpu, const x86_insn *in) { write_base(cpu, in, X86_FS); }
void x86_op_wrgsbase(x86_cpu *cpu, const x86_insn *in) { write_base(cpu, in, X86_GS); }

/* ---- fast system calls ---- */

enum { FLAT_CODE64 = 0x209b | 0x8000, FLAT_CODE32 = 0xc09b, FLAT_DATA = 0xc093 };

static void set_flat(x86_cpu *cpu, unsigned index, uint16_t sel, unsigned attr)
{
    unsigned dpl = sel & 3;
    cpu->seg[index] = (x86_seg){ .sel = sel, .limit = 0xffffffff, .attr = (uint16_t)(attr | dpl << 5) };
}

/* SYSCALL and SYSRET look at TF after the instruction: a flag mask that clears it prevents the trap, and SYSRET to a
 * program that is being stepped traps before its next instruction. */
static void trap_by_new_tf(x86_cpu *cpu)
{
    cpu->no_trap = true;
    if (!(cpu->rflags & X86_FL_TF))
        return;
    cpu->rip = cpu->next_rip;
    x86_fault trap = { .vector = X86_DB, .dr6 = 0x4000, .is_after = true };
    x86_raise_fault(cpu, &trap);
}

void x86_op_syscall(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    if (!(cpu->efer & X86_EFER_SCE) || !x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
    if (is_call_hooked(cpu, 0))
        return;
    uint16_t sel = (uint16_t)(cpu->star >> 32) & 0xfffc;
    if (x86_lma(cpu)) {
        bool is_long = x86_is_long(cpu);
        cpu->gpr[X86_RCX] = cpu->next_rip;
        cpu->gpr[X86_R11] = cpu->rflags & ~(uint64_t)X86_FL_RF;
        cpu->next_rip = is_long ? cpu->lstar : cpu->cstar;
        cpu->rflags = (cpu->rflags & ~(cpu->sfmask | X86_FL_RF)) | X86_FL_1;
        set_flat(cpu, X86_CS, sel, FLAT_CODE64);
    } else {
        cpu->gpr[X86_RCX] = (uint32_t)cpu->next_rip;
        cpu->next_rip = (uint32_t)cpu->star;
        cpu->rflags &= ~(uint64_t)(X86_FL_VM | X86_FL_IF | X86_FL_RF);
        set_flat(cpu, X86_CS, sel, FLAT_CODE32);
    }
    set_flat(cpu, X86_SS, sel + 8, FLAT_DATA);
    cpu->seg[X86_SS].attr &= ~(3u << 5);
    x86_mode_changed(cpu);
    trap_by_new_tf(cpu);
}

#define SYSRET_FLAGS UINT64_C(0x3c7fd7)

void x86_op_sysret(x86_cpu *cpu, const x86_insn *in)
{
    if (!(cpu->efer & X86_EFER_SCE) || !x86_is_protected(cpu))
        x86_raise(cpu, X86_UD);
    x86_require_cpl0(cpu);
    uint16_t sel = (uint16_t)(cpu->star >> 48) | 3;
    if (x86_is_long(cpu) && in->osz == 8) {
        cpu->next_rip = cpu->gpr[X86_RCX];
        set_flat(cpu, X86_CS, (uint16_t)(sel + 16), FLAT_CODE64);
    } else {
        cpu->next_rip = (uint32_t)cpu->gpr[X86_RCX];
        set_flat(cpu, X86_CS, sel, FLAT_CODE32);
    }
    if (x86_lma(cpu))
        cpu->rflags = (cpu->gpr[X86_R11] & SYSRET_FLAGS) | X86_FL_1;
    else
        cpu->rflags |= X86_FL_IF;
    set_flat(cpu, X86_SS, (uint16_t)(sel + 8), FLAT_DATA);
    x86_mode_changed(cpu);
    trap_by_new_tf(cpu);
}

/* AMD: SYSENTER and SYSEXIT exist outside long mode only. */
static void check_sysenter(x86_cpu *cpu)
{
    if (!x86_has(cpu, X86_FEAT_SEP) || x86_lma(cpu))
        x86_raise(cpu, X86_UD);
    if (x86_is_real(cpu) || x86_is_null((uint16_t)cpu->sysenter_cs))
        raise_gp(cpu);
}

void x86_op_sysenter(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    check_sysenter(cpu);
    if (is_call_hooked(cpu, X86_EVENT_SYSENTER))
        return;
    uint16_t sel = cpu->sysenter_cs & 0xfffc;
    cpu->rflags &= ~(uint64_t)(X86_FL_VM | X86_FL_IF | X86_FL_RF);
    set_flat(cpu, X86_CS, sel, FLAT_CODE32);
    set_flat(cpu, X86_SS, sel + 8, FLAT_DATA);
    cpu->gpr[X86_RSP] = (uint32_t)cpu->sysenter_esp;
    cpu->next_rip = (uint32_t)cpu->sysenter_eip;
    x86_mode_changed(cpu);
}

void x86_op_sysexit(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    check_sysenter(cpu);
    x86_require_cpl0(cpu);
    uint16_t sel = (cpu->sysenter_cs & 0xfffc) | 3;
    set_flat(cpu, X86_CS, sel + 16, FLAT_CODE32);
    set_flat(cpu, X86_SS, sel + 24, FLAT_DATA);
    cpu->gpr[X86_RSP] = (uint32_t)cpu->gpr[X86_RCX];
    cpu->next_rip = (uint32_t)cpu->gpr[X86_RDX];
    x86_mode_changed(cpu);
}

/* ---- hypercalls ---- */

void x86_op_hypercall(x86_cpu *cpu, const x86_insn *in)
{
    (void)in;
    int result = cpu->env->hypercall ? cpu->env->hypercall(cpu) : -1;
    if (result < 0)
        x86_raise(cpu, X86_UD);
    if (result == X86_IO_EXIT) {
        cpu->rip = cpu->next_rip;
        x86_io_retire(cpu);
        x86_leave(cpu, X86_STOP_HYPERCALL);
    }
}
