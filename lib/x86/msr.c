/* msr.c - model-specific registers: one table of number ranges, each with how it is read and what may be written.
 *
 * False from either function is #GP in the guest. Registers of the local APIC and its deadline timer live outside the
 * CPU, behind env->msr_*; everything that is in no row does not exist.
 */
#include "x86/system.h"

#include <string.h>

typedef bool (*msr_read_fn)(x86_cpu *cpu, uint32_t msr, uint64_t *v);
typedef bool (*msr_write_fn)(x86_cpu *cpu, uint32_t msr, uint64_t v);

/* A row either has functions or a field; a field takes bits of `mask`, others raise #GP, and `is_canonical` addresses
 * only. */
typedef struct msr_row {
    uint32_t first, last;
    msr_read_fn read;
    msr_write_fn write;
    uint16_t field;                    /* offset in x86_cpu of the first register's field */
    bool is_canonical;
    uint64_t mask;
    uint16_t feature;                  /* 0: always there */
} msr_row;

#define MCG_BANKS 4u
#define MTRR_COUNT 8u

/* ---- constants and registers that ignore writes ---- */

static bool read_zero(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    (void)cpu, (void)msr;
    *v = 0;
    return true;
}

static bool write_ignored(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    (void)cpu, (void)msr, (void)v;
    return true;
}

static bool write_refused(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    (void)cpu, (void)msr, (void)v;
    return false;
}

static bool read_patch_level(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    (void)msr;
    *v = x86_is_amd(cpu) ? 0x0a101148 : 0;
    return true;
}

static bool read_mtrr_cap(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    (void)cpu, (void)msr;
    *v = MTRR_COUNT | 1 << 8 | 1 << 10;                                 /* fixed ranges, write combining */
    return true;
}

static bool read_mcg_cap(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    (void)cpu, (void)msr;
    *v = MCG_BANKS | 1 << 8;                                            /* MCG_CTL present */
    return true;
}

/* ---- time ---- */

static bool read_tsc(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    (void)msr;
    *v = x86_read_tsc(cpu);
    return true;
}

static bool write_tsc(x86_cpu *cpu, uint32_t msr, uint64_t v) /* moves TSC_ADJUST by the same amount (SDM 17.17.3) */
{
    (void)msr;
    cpu->tsc_adjust += v - x86_read_tsc(cpu);
    return true;
}

/* ---- EFER (APM vol. 2, 3.1.7) ---- */

static bool read_efer(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    (void)msr;
    *v = cpu->efer;
    return true;
}

#define EFER_AUTO_IBRS (UINT64_C(1) << 21)

static bool write_efer(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    static const struct { uint16_t feature; uint32_t bits; } rows[] = {
        { X86_FEAT_SYSCALL, X86_EFER_SCE }, { X86_FEAT_LM, X86_EFER_LME | X86_EFER_LMA }, { X86_FEAT_NX, X86_EFER_NXE },
        { X86_FEAT_AUTO_IBRS, EFER_AUTO_IBRS } };
    uint64_t allowed = 0, old = cpu->efer;
    (void)msr;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (x86_has(cpu, rows[i].feature))
            allowed |= rows[i].bits;
    if (v & ~allowed)
        return false;
    if (((v ^ old) & X86_EFER_LME) && (cpu->cr0 & X86_CR0_PG))
        return false;
    cpu->efer = (v & ~(uint64_t)X86_EFER_LMA) | (old & X86_EFER_LMA);   /* LMA is the CPU's to set */
    if ((cpu->efer ^ old) & X86_EFER_NXE)
        x86_paging_changed_in_place(cpu);
    return true;
}

/* ---- memory types (SDM vol. 3, 11.11 and 11.12) ---- */

static bool is_mtrr_type(unsigned t) { return t == 0 || t == 1 || t == 4 || t == 5 || t == 6; }

static bool write_pat(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    (void)msr;
    for (unsigned i = 0; i < 64; i += 8)
        if (!is_mtrr_type(v >> i & 0xff) && (v >> i & 0xff) != 7)
            return false;
    cpu->pat = v;
    return true;
}

static bool write_mtrr_def(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    (void)msr;
    if ((v & ~UINT64_C(0xcff)) || !is_mtrr_type(v & 0xff))
        return false;
    cpu->mtrr_def = v;
    return true;
}

static bool write_mtrr_var(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    bool is_mask = msr & 1;
    if (v & ~cpu->phys_mask)
        return false;
    if (is_mask ? v & 0x7ff : (v & 0xf00) || !is_mtrr_type(v & 0xff))
        return false;
    cpu->mtrr_var[msr - 0x200] = v;
    return true;
}

static bool write_mtrr_fixed(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    unsigned index = msr == 0x250 ? 0 : msr <= 0x259 ? msr - 0x257 : msr - 0x265;
    for (unsigned i = 0; i < 64; i += 8)
        if (!is_mtrr_type(v >> i & 0xff))
            return false;
    cpu->mtrr_fixed[index] = v;
    return true;
}

/* ---- machine check ---- */

static bool write_mcg_ctl(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    (void)msr;
    if (v != 0 && ~v != 0)
        return false;
    cpu->mcg_ctl = v;
    return true;
}

#define HWCR_MC_STATUS_WRITE (UINT64_C(1) << 18)

static bool write_mc_bank(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    unsigned kind = msr & 3;           /* CTL, STATUS, ADDR, MISC */
    if (kind == 0 && v != 0 && ~(v | 1 << 10 | 1) != 0) /* all or nothing; Linux leaves out bits 0 and 10 */
        return false;
    if (kind == 1 && v && !(cpu->hwcr & HWCR_MC_STATUS_WRITE))
        return false;
    cpu->mc_bank[msr - 0x400] = v;
    return true;
}

/* ---- bases of segments ---- */

static bool read_seg_base(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    *v = cpu->seg[msr == 0xc0000100 ? X86_FS : X86_GS].base;
    return true;
}

static bool write_seg_base(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    if (!x86_canonical(v))
        return false;
    cpu->seg[msr == 0xc0000100 ? X86_FS : X86_GS].base = v;
    return true;
}

/* ---- AMD configuration ---- */

static bool write_hwcr(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    (void)msr;
    v &= ~UINT64_C(0x158);             /* INVD as WBINVD, TLB cache and IGNNE switches: no effect here */
    if (v & ~(HWCR_MC_STATUS_WRITE | UINT64_C(1) << 24))
        return false;
    cpu->hwcr = v;
    return true;
}

/* ---- outside the CPU ---- */

static bool read_outside(x86_cpu *cpu, uint32_t msr, uint64_t *v)
{
    return cpu->env->msr_read && cpu->env->msr_read(cpu, msr, v);
}

static bool write_outside(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    return cpu->env->msr_write && cpu->env->msr_write(cpu, msr, v);
}

#define APIC_BASE_X2 (UINT64_C(1) << 10)

static bool write_apic_base(x86_cpu *cpu, uint32_t msr, uint64_t v)
{
    return (!(v & APIC_BASE_X2) || x86_has(cpu, X86_FEAT_X2APIC)) && write_outside(cpu, msr, v);
}

/* ---- the table, by number ---- */

#define FIELD(name) .field = offsetof(x86_cpu, name)
#define ALL (~UINT64_C(0))
#define AMD 0xffff                     /* feature: the vendor */
static const msr_row rows[] = {
    {0x000, 0x001, read_zero, write_ignored, 0, 0, 0, X86_FEAT_MSR}, /* P5 machine check */
    {0x010, 0x010, read_tsc, write_tsc, 0, 0, 0, X86_FEAT_TSC},
    {0x01b, 0x01b, read_outside, write_apic_base, 0, 0, 0, 0},
    {.first = 0x03b, .last = 0x03b, FIELD(tsc_adjust), .mask = ALL, .feature = X86_FEAT_TSC_ADJUST},
    {0x08b, 0x08b, read_patch_level, write_ignored, 0, 0, 0, X86_FEAT_MSR},
    {0x0fe, 0x0fe, read_mtrr_cap, write_refused, 0, 0, 0, X86_FEAT_MTRR},
    {.first = 0x174, .last = 0x174, FIELD(sysenter_cs), .mask = 0xffffffff, .feature = X86_FEAT_SEP},
    {.first = 0x175, .last = 0x176, FIELD(sysenter_esp), .mask = ALL, .is_canonical = true, .feature = X86_FEAT_SEP},
    {0x179, 0x179, read_mcg_cap, write_refused, 0, 0, 0, X86_FEAT_MCA},
    {.first = 0x17a, .last = 0x17a, FIELD(mcg_status), .mask = 7, .feature = X86_FEAT_MCA},
    {0x17b, 0x17b, NULL, write_mcg_ctl, offsetof(x86_cpu, mcg_ctl), 0, 0, X86_FEAT_MCA},
    {.first = 0x1a0, .last = 0x1a0, FIELD(misc_enable), .mask = UINT64_C(0x400c51889), .feature = X86_FEAT_MSR},
    {0x1d9, 0x1d9, read_zero, write_ignored, 0, 0, 0, X86_FEAT_MSR}, /* DEBUGCTL: no LBR, no BTF */
    {0x1db, 0x1de, read_zero, write_refused, 0, 0, 0, X86_FEAT_MSR}, /* last branch and exception */
    {0x200, 0x20f, NULL, write_mtrr_var, offsetof(x86_cpu, mtrr_var), 0, 0, X86_FEAT_MTRR},
    {0x250, 0x250, NULL, write_mtrr_fixed, offsetof(x86_cpu, mtrr_fixed[0]), 0, 0, X86_FEAT_MTRR},
    {0x258, 0x259, NULL, write_mtrr_fixed, offsetof(x86_cpu, mtrr_fixed[1]), 0, 0, X86_FEAT_MTRR},
    {0x268, 0x26f, NULL, write_mtrr_fixed, offsetof(x86_cpu, mtrr_fixed[3]), 0, 0, X86_FEAT_MTRR},
    {0x277, 0x277, NULL, write_pat, offsetof(x86_cpu, pat), 0, 0, X86_FEAT_PAT},
    {0x2ff, 0x2ff, NULL, write_mtrr_def, offsetof(x86_cpu, mtrr_def), 0, 0, X86_FEAT_MTRR},
    {0x400, 0x400 + 4 * MCG_BANKS - 1, NULL, write_mc_bank, offsetof(x86_cpu, mc_bank), 0, 0, X86_FEAT_MCA},
    {0x6e0, 0x6e0, read_outside, write_outside, 0, 0, 0, X86_FEAT_TSC_DEADLINE},
    {0x800, 0x8ff, read_outside, write_outside, 0, 0, 0, X86_FEAT_X2APIC},
    {0xc0000080, 0xc0000080, read_efer, write_efer, 0, 0, 0, X86_FEAT_SYSCALL},
    {.first = 0xc0000081, .last = 0xc0000081, FIELD(star), .mask = ALL, .feature = X86_FEAT_SYSCALL},
    {.first = 0xc0000082, .last = 0xc0000083, FIELD(lstar), .mask = ALL, .is_canonical = true, .feature = X86_FEAT_LM},
    {.first = 0xc0000084, .last = 0xc0000084, FIELD(sfmask), .mask = 0xffffffff, .feature = X86_FEAT_LM},
    {0xc0000100, 0xc0000101, read_seg_base, write_seg_base, 0, 0, 0, X86_FEAT_LM},
    {.first = 0xc0000102,
     .last = 0xc0000102,
     FIELD(kernel_gs_base),
     .mask = ALL,
     .is_canonical = true,
     .feature = X86_FEAT_LM},
    {.first = 0xc0000103, .last = 0xc0000103, FIELD(tsc_aux), .mask = 0xffffffff, .feature = X86_FEAT_RDTSCP},
    {0xc0010000, 0xc0010007, read_zero, write_ignored, 0, 0, 0, AMD}, /* counters that never count */
    {.first = 0xc0010010, .last = 0xc0010010, FIELD(syscfg), .mask = 0x7c0000, .feature = AMD},
    {0xc0010015, 0xc0010015, NULL, write_hwcr, offsetof(x86_cpu, hwcr), 0, 0, AMD},
    {0xc0010016, 0xc001001a, read_zero, write_ignored, 0, 0, 0, AMD}, /* IORRs, TOP_MEM */
    {0xc001001d, 0xc001001d, read_zero, write_ignored, 0, 0, 0, AMD}, /* TOM2 */
    {0xc001001f, 0xc0010020, read_zero, write_ignored, 0, 0, 0, AMD}, /* NB_CFG, patch loader */
    {0xc0010055, 0xc0010055, read_zero, write_ignored, 0, 0, 0, AMD}, /* interrupt pending message */
    {0xc0010058, 0xc0010058, read_zero, write_ignored, 0, 0, 0, AMD}, /* MMCONFIG base: none */
    {0xc0011020, 0xc0011023, read_zero, write_ignored, 0, 0, 0, AMD}, /* LS, IC, DC, BU_CFG */
    {.first = 0xc0011029, .last = 0xc0011029, FIELD(de_cfg), .mask = ALL, .feature = AMD},
    {0xc001102a, 0xc001102e, read_zero, write_ignored, 0, 0, 0, AMD}, /* BU_CFG2 ... BP_CFG */
};

static const msr_row *find_row(x86_cpu *cpu, uint32_t msr)
{
    size_t lo = 0, hi = sizeof rows / sizeof rows[0];
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (msr > rows[mid].last)
            lo = mid + 1;
        else if (msr < rows[mid].first)
            hi = mid;
        else if (!rows[mid].feature || (rows[mid].feature == AMD ? x86_is_amd(cpu) : x86_has(cpu, rows[mid].feature)))
            return &rows[mid];
        else
            return NULL;
    }
    return NULL;
}

static uint64_t *row_field(x86_cpu *cpu, const msr_row *row, uint32_t msr)
{
    return (uint64_t *)((char *)cpu + row->field) + (msr - row->first);
}

bool x86_msr_read(x86_cpu *cpu, uint32_t msr, uint64_t *value)
{
    const msr_row *row = find_row(cpu, msr);
    if (!row)
        return false;
    if (row->read)
        return row->read(cpu, msr, value);
    *value = *row_field(cpu, row, msr);
    return true;
}

bool x86_msr_write(x86_cpu *cpu, uint32_t msr, uint64_t value)
{
    const msr_row *row = find_row(cpu, msr);
    if (!row)
        return false;
    if (row->write)
        return row->write(cpu, msr, value);
    if ((value & ~row->mask) || (row->is_canonical && !x86_canonical(value)))
        return false;
    *row_field(cpu, row, msr) = value;
    return true;
}
