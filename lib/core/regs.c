/* regs.c - the registers of a vCPU for its caller: one by number, or in bulk.
 *
 * Inside a callback RIP is the instruction under way; writing it sets where execution goes on. Everything that
 * changes modes ends in settle(), which recomputes what x86_cpu derives and empties the TLB if translations may differ.
 */
#include "core/core.h"
#include "platform/pc.h"

#include <string.h>
#include <strings.h>

enum reg_class { GPR, RIP, RFLAGS, SEG, SEGBASE, CR, DR, EFER, XCR0, ST, FCW, FSW, FTW, MXCSR, MM, XMM, YMM };

static const struct { const char *name; uint8_t bytes, cls, index; } regs_table[VM_REG_COUNT] = {
#define VM_REG(name, text, bytes, cls, index) [VM_REG_##name] = { text, bytes, cls, index },
#include <libvm/reg.def>
#undef VM_REG
};
static bool is_reg(int id)
{
    return id > VM_REG_NONE && id < VM_REG_COUNT;
}

VM_API size_t vm_reg_size(int reg_id)
{
    return is_reg(reg_id) ? regs_table[reg_id].bytes : 0;
}

VM_API const char *vm_reg_name(int reg_id)
{
    return is_reg(reg_id) ? regs_table[reg_id].name : NULL;
}

VM_API int vm_reg_find(const char *name)
{
    for (int i = VM_REG_NONE + 1; name && i < VM_REG_COUNT; i++)
        if (strcasecmp(name, regs_table[i].name) == 0)
            return i;
    return VM_REG_NONE;
}

/* ---- pieces ---- */

static bool in_callback(const vm_vcpu *cpu)
{
    return vm_vcpu_is_running(cpu) && !cpu->at_boundary;
}

static void set_rip(vm_vcpu *cpu, uint64_t rip)
{
    x86_cpu *x = &cpu->x86;
    if (!in_callback(cpu)) {
        if (rip != x->rip && !cpu->has_pending)
            x86_io_retire(x);          /* what the instruction there had done half-way */
        if (rip != x->rip) {
            x->hook_done = false;
            x->block_state = X86_BLOCK_FRESH;
        }
        x->rip = rip;
    } else if (rip != cpu->x86.rip) {  /* in bulk, the current one comes back unchanged */
        cpu->x86.next_rip = rip;
        cpu->x86.is_redirected = true;
        vm_vcpu_look_again(cpu);
    }
}

/* Bits that cannot be changed read as they must. */
static uint64_t clean_flags(uint64_t value)
{
    return (value & 0x3f7fd7) | X86_FL_1;
}

static void settle(vm_vcpu *cpu, bool translations_differ)
{
    x86_cpu *x = &cpu->x86;
    if (translations_differ)
        x->env->root_changed(x, 0);
    x86_mode_changed(x);
    vm_vcpu_look_again(cpu);
}

/* The two-bit tag of a register that is in use (SDM vol. 1, 8.1.7). */
static unsigned tag_of(const uint8_t *st)
{
    uint64_t mantissa;
    uint16_t exponent;
    memcpy(&mantissa, st, 8);
    memcpy(&exponent, st + 8, 2);
    exponent &= 0x7fff;
    if (exponent == 0x7fff)
        return 2;
    if (exponent == 0)
        return mantissa == 0 ? 1 : 2;
    return mantissa >> 63 ? 0 : 2;
}

static uint16_t full_tag_word(x86_cpu *x)
{
    unsigned top = X86_FPU_FSW(x) >> 11 & 7;
    uint16_t result = 0;
    for (unsigned phys = 0; phys < 8; phys++) {
        unsigned tag = X86_FPU_FTW(x) >> phys & 1 ? tag_of(X86_FPU_ST(x, (phys - top) & 7)) : 3;
        result |= (uint16_t)(tag << 2 * phys);
    }
    return result;
}

static uint8_t abridged_tag_word(uint16_t full)
{
    uint8_t result = 0;
    for (unsigned phys = 0; phys < 8; phys++)
        if ((full >> 2 * phys & 3) != 3)
            result |= (uint8_t)(1u << phys);
    return result;
}

/* FXSAVE numbers x87 registers by stack position, MMX ones are physical. */
static uint8_t *mm_slot(x86_cpu *x, unsigned index)
{
    return X86_FPU_ST(x, (index - (X86_FPU_FSW(x) >> 11 & 7)) & 7);
}

/* ---- one register ---- */

static uint64_t read_cr(vm_vcpu *cpu, unsigned index)
{
    x86_cpu *x = &cpu->x86;
    switch (index) {
    case 0: return x->cr0;
    case 2: return x->cr2;
    case 3: return x->cr3;
    case 4: return x->cr4;
    default: return x->env->cr8_read(x);
    }
}

int vm_regs_read(vm_vcpu *cpu, int reg_id, void *value)
{
    x86_cpu *x = &cpu->x86;
    unsigned index = regs_table[reg_id].index, bytes = regs_table[reg_id].bytes;
    uint64_t v = 0;
    switch ((enum reg_class)regs_table[reg_id].cls) {
    case GPR: case RIP: case RFLAGS: vm_vcpu_fetch(cpu, VM_STATE_REGS); break;
    default: break;
    }
    switch ((enum reg_class)regs_table[reg_id].cls) {
    case GPR: memcpy(value, &x->gpr[index], 8); return VM_OK;
    case RIP: memcpy(value, &x->rip, 8); return VM_OK;
    case RFLAGS: memcpy(value, &x->rflags, 8); return VM_OK;
    default: vm_vcpu_fetch(cpu, VM_STATE_ALL);
    }
    switch ((enum reg_class)regs_table[reg_id].cls) {
    case SEG: v = x->seg[index].sel; break;
    case SEGBASE: v = x->seg[index].base; break;
    case CR: v = read_cr(cpu, index); break;
    case DR: v = x->dr[index]; break;
    case EFER: v = x->efer; break;
    case XCR0: v = x->xcr0; break;
    case FCW: v = X86_FPU_FCW(x); break;
    case FSW: v = X86_FPU_FSW(x); break;
    case FTW: v = full_tag_word(x); break;
    case MXCSR: v = X86_FPU_MXCSR(x); break;
    case ST: memcpy(value, X86_FPU_ST(x, index), bytes); return VM_OK;
    case MM: memcpy(value, mm_slot(x, index), bytes); return VM_OK;
    case YMM: memcpy((uint8_t *)value + 16, X86_FPU_YMMH(x, index), 16); /* fall through */
    case XMM: memcpy(value, X86_FPU_XMM(x, index), 16); return VM_OK;
    default: break;
    }
    memcpy(value, &v, bytes);
    return VM_OK;
}

static int write_cr(vm_vcpu *cpu, unsigned index, uint64_t v)
{
    vm_sregs s = VM_SREGS_INIT;
    vm_sregs_get(cpu, &s);
    *(index == 0 ? &s.cr0 : index == 2 ? &s.cr2 : index == 3 ? &s.cr3 : index == 4 ? &s.cr4 : &s.cr8) = v;
    return vm_sregs_set(cpu, &s);
}

static int write_special(vm_vcpu *cpu, enum reg_class cls, uint64_t v, unsigned index)
{
    vm_sregs s = VM_SREGS_INIT;
    vm_sregs_get(cpu, &s);
    if (cls == EFER)
        s.efer = v;
    else if (cls == XCR0)
        s.xcr0 = v;
    else
        *(index == 6 ? &s.dr6 : index == 7 ? &s.dr7 : &s.dr0 + index) = v;
    return vm_sregs_set(cpu, &s);
}

static int write_selector(vm_vcpu *cpu, unsigned index, uint16_t sel)
{
    x86_cpu *x = &cpu->x86;
    x->seg[index].sel = sel;
    if ((x86_is_real(x) || x86_is_v86(x)) && index < X86_LDTR)
        x->seg[index].base = (uint64_t)sel << 4;
    settle(cpu, false);
    return VM_OK;
}

static int write_mxcsr(x86_cpu *x, uint32_t v)
{
    if (v & ~0xffffu)
        return vm_fail(VM_E_INVALID, "MXCSR: reserved bits set in 0x%x", v);
    X86_FPU_MXCSR(x) = v;
    return VM_OK;
}

/* Vector or x87 state beyond the initial one is about to be put into the XSAVE image: say so to XRSTOR's bookkeeping.
 * */
static void mark_in_use(x86_cpu *x, unsigned components)
{
    uint64_t bv;
    memcpy(&bv, &x->fpu.image[512], 8);
    bv |= components;
    memcpy(&x->fpu.image[512], &bv, 8);
}

static int write_fpu(vm_vcpu *cpu, int reg_id, const void *value, uint64_t v)
{
    x86_cpu *x = &cpu->x86;
    unsigned index = regs_table[reg_id].index;
    switch ((enum reg_class)regs_table[reg_id].cls) {
    case FCW: X86_FPU_FCW(x) = (uint16_t)v; break;
    case FSW: X86_FPU_FSW(x) = (uint16_t)v; break;
    case FTW: X86_FPU_FTW(x) = abridged_tag_word((uint16_t)v); break;
    case MXCSR: return write_mxcsr(x, (uint32_t)v);
    case ST: memset(X86_FPU_ST(x, index), 0, 16); memcpy(X86_FPU_ST(x, index), value, 10); break;
    case MM: memset(mm_slot(x, index) + 8, 0xff, 2); memcpy(mm_slot(x, index), value, 8); break;
    case YMM: memcpy(X86_FPU_YMMH(x, index), (const uint8_t *)value + 16, 16); /* fall through */
    default: memcpy(X86_FPU_XMM(x, index), value, 16);
    }
    mark_in_use(x, 7);
    return VM_OK;
}

static int write_other(vm_vcpu *cpu, int reg_id, const void *value, uint64_t v)
{
    x86_cpu *x = &cpu->x86;
    enum reg_class cls = regs_table[reg_id].cls;
    unsigned index = regs_table[reg_id].index;
    switch (cls) {
    case SEG: return write_selector(cpu, index, (uint16_t)v);
    case SEGBASE:
        if (!x86_canonical(v))
            return vm_fail(VM_E_INVALID, "%s: 0x%llx is not canonical", regs_table[reg_id].name, (unsigned long long)v);
        x->seg[index].base = v;
        settle(cpu, false);
        return VM_OK;
    case CR: return write_cr(cpu, index, v);
    case DR: case EFER: case XCR0: return write_special(cpu, cls, v, index);
    default: return write_fpu(cpu, reg_id, value, v);
    }
}

int vm_regs_write(vm_vcpu *cpu, int reg_id, const void *value)
{
    x86_cpu *x = &cpu->x86;
    unsigned index = regs_table[reg_id].index, bytes = regs_table[reg_id].bytes;
    uint64_t v = 0;
    memcpy(&v, value, bytes < 8 ? bytes : 8);
    vm_vcpu_fetch(cpu, VM_STATE_REGS);
    switch ((enum reg_class)regs_table[reg_id].cls) {
    case GPR: x->gpr[index] = v; break;
    case RIP: set_rip(cpu, v); break;
    case RFLAGS:
        vm_vcpu_fetch(cpu, VM_STATE_SREGS);
        x->rflags = clean_flags(v);
        settle(cpu, false);
        break;
    default: {
        vm_vcpu_fetch(cpu, VM_STATE_ALL);
        int status = write_other(cpu, reg_id, value, v);
        if (status == VM_OK)
            vm_vcpu_changed(cpu, VM_STATE_ALL);
        return status;
    }
    }
    vm_vcpu_changed(cpu, VM_STATE_REGS);
    return VM_OK;
}

/* ---- general registers ---- */

void vm_regs_get(vm_vcpu *cpu, vm_regs *regs)
{
    const x86_cpu *x = &cpu->x86;
    _Static_assert(offsetof(vm_regs, r15) - offsetof(vm_regs, rax) == 15 * 8, "vm_regs lists them in x86 order");
    vm_vcpu_fetch(cpu, VM_STATE_REGS);
    memcpy(&regs->rax, x->gpr, sizeof x->gpr);
    regs->rip = x->rip;
    regs->rflags = x->rflags;
}

void vm_regs_set(vm_vcpu *cpu, const vm_regs *regs)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_REGS);
    memcpy(x->gpr, &regs->rax, sizeof x->gpr);
    set_rip(cpu, regs->rip);
    uint64_t flags = clean_flags(regs->rflags);
    if (flags != x->rflags) {
        vm_vcpu_fetch(cpu, VM_STATE_SREGS);
        x->rflags = flags;
        settle(cpu, false);
    }
    vm_vcpu_changed(cpu, VM_STATE_REGS);
}

/* ---- system registers ---- */

static void seg_out(vm_segment *out, const x86_seg *s)
{
    *out = (vm_segment){ .base = s->base, .limit = s->limit, .selector = s->sel, .attributes = s->attr };
}

static void seg_in(x86_seg *s, const vm_segment *in)
{
    *s = (x86_seg){ .base = in->base, .limit = in->limit, .sel = in->selector, .attr = in->attributes & 0xf0ff };
}

void vm_sregs_get(vm_vcpu *cpu, vm_sregs *s)
{
    x86_cpu *x = &cpu->x86;
    vm_segment *segs = &s->es;
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    for (unsigned i = 0; i < X86_NSEG; i++)
        seg_out(&segs[i], &x->seg[i]);
    s->cpl = x->cpl;
    s->gdtr = (vm_dtable){ .base = x->gdtr.base, .limit = x->gdtr.limit };
    s->idtr = (vm_dtable){ .base = x->idtr.base, .limit = x->idtr.limit };
    s->cr0 = x->cr0;
    s->cr2 = x->cr2;
    s->cr3 = x->cr3;
    s->cr4 = x->cr4;
    s->cr8 = x->env->cr8_read(x);
    s->efer = x->efer;
    s->xcr0 = x->xcr0;
    s->dr0 = x->dr[0];
    s->dr1 = x->dr[1];
    s->dr2 = x->dr[2];
    s->dr3 = x->dr[3];
    s->dr6 = x->dr[6];
    s->dr7 = x->dr[7];
    s->apic_base = cpu->machine->is_pc ? vm_pc_apic_base(cpu) : 0;
}

#define CR0_BITS (X86_CR0_PE | X86_CR0_MP | X86_CR0_EM | X86_CR0_TS | X86_CR0_ET | X86_CR0_NE | X86_CR0_WP | \
                  X86_CR0_AM | X86_CR0_NW | X86_CR0_CD | X86_CR0_PG)
#define CR4_BITS (X86_CR4_VME | X86_CR4_PVI | X86_CR4_TSD | X86_CR4_DE | X86_CR4_PSE | X86_CR4_PAE | X86_CR4_MCE | \
                  X86_CR4_PGE | X86_CR4_PCE | X86_CR4_OSFXSR | X86_CR4_OSXMMEXCPT | X86_CR4_UMIP | X86_CR4_FSGSBASE | \
                  X86_CR4_PCIDE | X86_CR4_OSXSAVE | X86_CR4_SMEP | X86_CR4_SMAP)
#define EFER_AUTOIBRS (1u << 21)       /* AMD: automatic IBRS; kernels set it where CPUID offers it */
#define EFER_BITS (X86_EFER_SCE | X86_EFER_LME | X86_EFER_LMA | X86_EFER_NXE | X86_EFER_FFXSR | EFER_AUTOIBRS)

static int reserved(const char *name, uint64_t value, uint64_t bits)
{
    return vm_fail(VM_E_INVALID, "%s = 0x%llx: bits 0x%llx cannot be set", name, (unsigned long long)value,
                   (unsigned long long)(value & ~bits));
}

/* States no sequence of instructions could reach would break the CPU's own assumptions. */
static int check_modes(const vm_sregs *s)
{
    bool pe = s->cr0 & X86_CR0_PE, pg = s->cr0 & X86_CR0_PG, lme = s->efer & X86_EFER_LME, lma = s->efer & X86_EFER_LMA;
    if (pg && !pe)
        return vm_fail(VM_E_INVALID, "CR0 = 0x%llx: paging without protection", (unsigned long long)s->cr0);
    if ((s->cr0 & X86_CR0_NW) && !(s->cr0 & X86_CR0_CD))
        return vm_fail(VM_E_INVALID, "CR0 = 0x%llx: NW without CD", (unsigned long long)s->cr0);
    if (lma != (lme && pg))
        return vm_fail(VM_E_INVALID, "EFER = 0x%llx, CR0 = 0x%llx: LMA must be LME and PG", (unsigned long long)s->efer,
                       (unsigned long long)s->cr0);
    if (lma && !(s->cr4 & X86_CR4_PAE))
        return vm_fail(VM_E_INVALID, "long mode without CR4.PAE (CR4 = 0x%llx)", (unsigned long long)s->cr4);
    if ((s->cr4 & X86_CR4_PCIDE) && !lma)
        return vm_fail(VM_E_INVALID, "CR4.PCIDE outside of long mode (CR4 = 0x%llx)", (unsigned long long)s->cr4);
    if (lma && (s->cs.attributes & X86_SEG_L) && (s->cs.attributes & X86_SEG_DB))
        return vm_fail(VM_E_INVALID, "CS attributes 0x%x: L and D together", s->cs.attributes);
    return VM_OK;
}

static int check_bases(const vm_sregs *s)
{
    const vm_segment *segs = &s->es;
    for (unsigned i = 0; i < X86_NSEG; i++)
        if (!x86_canonical(segs[i].base))
            return vm_fail(VM_E_INVALID, "base 0x%llx of segment %u is not canonical",
                           (unsigned long long)segs[i].base, i);
    if (!x86_canonical(s->gdtr.base) || !x86_canonical(s->idtr.base))
        return vm_fail(VM_E_INVALID, "GDTR 0x%llx or IDTR 0x%llx is not canonical", (unsigned long long)s->gdtr.base,
                       (unsigned long long)s->idtr.base);
    return VM_OK;
}

static int check_sregs(const vm_sregs *s, uint64_t phys_mask)
{
    if (s->cr0 & ~(uint64_t)CR0_BITS)
        return reserved("CR0", s->cr0, CR0_BITS);
    if (s->cr4 & ~(uint64_t)CR4_BITS)
        return reserved("CR4", s->cr4, CR4_BITS);
    if (s->efer & ~(uint64_t)EFER_BITS)
        return reserved("EFER", s->efer, EFER_BITS);
    if (s->cr8 & ~UINT64_C(15))
        return reserved("CR8", s->cr8, 15);
    if (s->cr3 & ~phys_mask)
        return reserved("CR3", s->cr3, phys_mask);
    if (s->xcr0 & ~UINT64_C(7))
        return reserved("XCR0", s->xcr0, 7);
    if (!(s->xcr0 & 1) || (s->xcr0 & 6) == 4)
        return vm_fail(VM_E_INVALID, "XCR0 = 0x%llx: needs x87, and SSE for AVX", (unsigned long long)s->xcr0);
    if (s->dr6 >> 32 || s->dr7 >> 32)
        return vm_fail(VM_E_INVALID, "DR6 = 0x%llx, DR7 = 0x%llx: upper halves must be zero",
                       (unsigned long long)s->dr6,
                       (unsigned long long)s->dr7);
    int status = check_bases(s);
    return status == VM_OK ? check_modes(s) : status;
}

/* PAE paging keeps its four root entries in the CPU from the time CR3 is loaded. */
static int load_pdptes(x86_cpu *x, const vm_sregs *s, uint64_t pdpte[4])
{
    bool is_pae = (s->cr0 & X86_CR0_PG) && (s->cr4 & X86_CR4_PAE) && !(s->efer & X86_EFER_LMA);
    memcpy(pdpte, x->pdpte, 32);
    if (is_pae && !x86_read_phys(x, s->cr3 & 0xffffffe0, pdpte, 32))
        return vm_fail(VM_E_INVALID, "CR3 = 0x%llx: no RAM there for the page-directory pointers",
                       (unsigned long long)s->cr3);
    return VM_OK;
}

int vm_sregs_check(const vm_sregs *s, uint64_t phys_mask)
{
    return check_sregs(s, phys_mask);
}

int vm_sregs_set(vm_vcpu *cpu, const vm_sregs *s)
{
    x86_cpu *x = &cpu->x86;
    const vm_segment *segs = &s->es;
    uint64_t pdpte[4];
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    int status = check_sregs(s, x->phys_mask | UINT64_C(1) << 63);
    if (status == VM_OK)
        status = load_pdptes(x, s, pdpte);
    if (status != VM_OK)
        return status;
    bool differs = s->cr0 != x->cr0 || s->cr3 != x->cr3 || s->cr4 != x->cr4 || s->efer != x->efer;
    for (unsigned i = 0; i < X86_NSEG; i++)
        seg_in(&x->seg[i], &segs[i]);
    x->gdtr = (x86_dtr){ .base = s->gdtr.base, .limit = s->gdtr.limit };
    x->idtr = (x86_dtr){ .base = s->idtr.base, .limit = s->idtr.limit };
    /* FLAT64 ends when the guest's own paging begins: other control bits may change under it. */
    if (s->cr3 != x->cr3 || ((s->cr0 ^ x->cr0) & X86_CR0_PG) || ((s->efer ^ x->efer) & X86_EFER_LMA))
        x->flat = false;
    x->cr0 = s->cr0 | X86_CR0_ET;
    x->cr2 = s->cr2;
    x->cr3 = s->cr3 & ~(UINT64_C(1) << 63);
    x->cr4 = s->cr4;
    x->efer = s->efer;
    x->xcr0 = s->xcr0;
    x->dr[0] = s->dr0;
    x->dr[1] = s->dr1;
    x->dr[2] = s->dr2;
    x->dr[3] = s->dr3;
    x->dr[6] = (s->dr6 & 0xe00f) | 0xffff0ff0;
    x->dr[7] = (s->dr7 & 0xffff2fff) | 0x400;
    memcpy(x->pdpte, pdpte, sizeof pdpte);
    if (x->env->cr8_read(x) != s->cr8)
        x->env->cr8_write(x, (uint8_t)s->cr8);
    if (cpu->machine->is_pc && s->apic_base != vm_pc_apic_base(cpu) && !vm_pc_msr_write(cpu, 0x1b, s->apic_base))
        status = vm_fail(VM_E_INVALID, "APIC base 0x%llx is not possible", (unsigned long long)s->apic_base);
    settle(cpu, differs);
    vm_vcpu_changed(cpu, VM_STATE_ALL);
    return status;
}

/* ---- x87 and vector registers ---- */

void vm_fpu_get(vm_vcpu *cpu, vm_fpu *f)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_FPU);
    f->mxcsr = X86_FPU_MXCSR(x);
    f->fcw = X86_FPU_FCW(x);
    f->fsw = X86_FPU_FSW(x);
    f->ftw = full_tag_word(x);
    f->fop = X86_FPU_FOP(x);
    f->fip = X86_FPU_FIP(x);
    f->fdp = X86_FPU_FDP(x);
    memset(f->st, 0, sizeof f->st);
    for (unsigned i = 0; i < 8; i++)
        memcpy(f->st[i], X86_FPU_ST(x, i), 10);
    for (unsigned i = 0; i < 16; i++) {
        memcpy(f->ymm[i], X86_FPU_XMM(x, i), 16);
        memcpy(f->ymm[i] + 16, X86_FPU_YMMH(x, i), 16);
    }
}

int vm_fpu_set(vm_vcpu *cpu, const vm_fpu *f)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_FPU);
    int status = write_mxcsr(x, f->mxcsr);
    if (status != VM_OK)
        return status;
    X86_FPU_FCW(x) = f->fcw;
    X86_FPU_FSW(x) = f->fsw;
    X86_FPU_FTW(x) = abridged_tag_word(f->ftw);
    X86_FPU_FOP(x) = f->fop & 0x7ff;
    X86_FPU_FIP(x) = f->fip;
    X86_FPU_FDP(x) = f->fdp;
    for (unsigned i = 0; i < 8; i++) {
        memset(X86_FPU_ST(x, i), 0, 16);
        memcpy(X86_FPU_ST(x, i), f->st[i], 10);
    }
    for (unsigned i = 0; i < 16; i++) {
        memcpy(X86_FPU_XMM(x, i), f->ymm[i], 16);
        memcpy(X86_FPU_YMMH(x, i), f->ymm[i] + 16, 16);
    }
    mark_in_use(x, 7);
    vm_vcpu_changed(cpu, VM_STATE_FPU);
    return VM_OK;
}
