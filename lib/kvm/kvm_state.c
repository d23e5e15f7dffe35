/* kvm_state.c - x86_cpu <-> KVM's structures.
 *
 * Registers and system registers travel in the shared page (KVM_SYNC_REGS) in both directions and cost no system call;
 * FPU, debug registers and MSRs have an ioctl each and move only when somebody asks or something changed.
 *
 * What does not map one to one:
 *   - unusable segments: P = 0 here, `unusable` there. TR must be a busy TSS for the hardware to enter at all, so an
 * empty TR is shown to KVM as a busy one with the same limit and base; nothing in the guest can tell before LTR.
 *   - VM_MODE_FLAT64: x86.flat with CR3 = 0 here; there CR3 points at identity tables. It ends when CR3 is something
 * else.
 *   - interrupts under way: KVM may hold an event that it has begun to inject. It stays in KVM as long as the vCPU
 * does; kvm_get_state(ALL) for another executor leaves it in kvm_vcpu_events, and kvm_run.c delivers it by software.
 */
#include "kvm/kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include "x86/system.h"

/* ---- MSRs: number and where it lives in x86_cpu ---- */

#define MSR(number, field)                                                                                             \
    { number, offsetof(x86_cpu, field) }
static const struct {
    uint32_t number;
    uint32_t offset;
} msr_table[] = {
    MSR(0xc0000081, star),
    MSR(0xc0000082, lstar),
    MSR(0xc0000083, cstar),
    MSR(0xc0000084, sfmask),
    MSR(0xc0000102, kernel_gs_base),
    MSR(0xc0000103, tsc_aux),
    MSR(0x3b, tsc_adjust),
    MSR(0x174, sysenter_cs),
    MSR(0x175, sysenter_esp),
    MSR(0x176, sysenter_eip),
    MSR(0x277, pat),
    MSR(0x1a0, misc_enable),
    MSR(0x48, spec_ctrl),
    MSR(0x17a, mcg_status),
    MSR(0x2ff, mtrr_def),
    MSR(0x250, mtrr_fixed[0]),
    MSR(0x258, mtrr_fixed[1]),
    MSR(0x259, mtrr_fixed[2]),
    MSR(0x268, mtrr_fixed[3]),
    MSR(0x269, mtrr_fixed[4]),
    MSR(0x26a, mtrr_fixed[5]),
    MSR(0x26b, mtrr_fixed[6]),
    MSR(0x26c, mtrr_fixed[7]),
    MSR(0x26d, mtrr_fixed[8]),
    MSR(0x26e, mtrr_fixed[9]),
    MSR(0x26f, mtrr_fixed[10]),
    MSR(0x200, mtrr_var[0]),
    MSR(0x201, mtrr_var[1]),
    MSR(0x202, mtrr_var[2]),
    MSR(0x203, mtrr_var[3]),
    MSR(0x204, mtrr_var[4]),
    MSR(0x205, mtrr_var[5]),
    MSR(0x206, mtrr_var[6]),
    MSR(0x207, mtrr_var[7]),
    MSR(0x208, mtrr_var[8]),
    MSR(0x209, mtrr_var[9]),
    MSR(0x20a, mtrr_var[10]),
    MSR(0x20b, mtrr_var[11]),
    MSR(0x20c, mtrr_var[12]),
    MSR(0x20d, mtrr_var[13]),
    MSR(0x20e, mtrr_var[14]),
    MSR(0x20f, mtrr_var[15]),
};
#define MSR_COUNT (sizeof msr_table / sizeof msr_table[0])

struct msr_block {
    struct kvm_msrs head;
    struct kvm_msr_entry entry[MSR_COUNT];
};

static uint64_t *msr_field(x86_cpu *x, uint32_t number)
{
    for (unsigned i = 0; i < MSR_COUNT; i++)
        if (msr_table[i].number == number) return (uint64_t *)((uint8_t *)x + msr_table[i].offset);
    return NULL;
}

/* Every MSR of the table until this vCPU has shown which ones KVM knows (transfer_msrs drops the others). */
void kvm_msr_list(kvm_vcpu *kv)
{
    _Static_assert(MSR_COUNT <= KVM_MAX_MSRS, "the list holds the table");
    kv->msr_count = MSR_COUNT;
    for (unsigned i = 0; i < MSR_COUNT; i++) kv->msrs[i] = msr_table[i].number;
}

bool kvm_keeps_msr(const kvm_vcpu *kv, uint32_t msr)
{
    for (unsigned i = 0; i < kv->msr_count; i++)
        if (kv->msrs[i] == msr) return true;
    return false;
}

static void drop_msr(kvm_vcpu *kv, unsigned at)
{
    memmove(&kv->msrs[at], &kv->msrs[at + 1], (kv->msr_count - at - 1) * sizeof kv->msrs[0]);
    kv->msr_count--;
}

static bool is_readable(kvm_vcpu *kv, uint32_t number)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } one = {.head.nmsrs = 1, .entry.index = number};
    return kvm_ioctl(kv->fd, KVM_GET_MSRS, &one) == 1;
}

/* IA32_TSC_ADJUST is a memory of what was added to the TSC; writing it from outside adds nothing. */
static void follow_tsc_adjust(kvm_vcpu *kv, bool is_read)
{
    uint64_t adjust = kv->cpu->x86.tsc_adjust + kv->cpu->machine->tsc_offset;
    if (!is_read && adjust != kv->tsc_offset) kvm_set_tsc_offset(kv, adjust);
    kv->tsc_offset = adjust;
}

/* KVM stops at the first MSR it refuses and says how many it did. One it does not know at all is forgotten; a value it
 * does not take is an error. */
static int transfer_msrs(kvm_vcpu *kv, bool is_read)
{
    x86_cpu *x = &kv->cpu->x86;
    unsigned done = 0;
    while (done < kv->msr_count) {
        struct msr_block block;
        unsigned n = kv->msr_count - done;
        memset(&block.head, 0, sizeof block.head);
        block.head.nmsrs = n;
        for (unsigned i = 0; i < n; i++)
            block.entry[i] = (struct kvm_msr_entry){.index = kv->msrs[done + i],
                                                    .data = is_read ? 0 : *msr_field(x, kv->msrs[done + i])};
        int took = kvm_ioctl(kv->fd, is_read ? KVM_GET_MSRS : KVM_SET_MSRS, &block);
        if (took < 0) return vm_fail_errno(VM_E_HOST, is_read ? "KVM_GET_MSRS" : "KVM_SET_MSRS");
        for (unsigned i = 0; is_read && i < (unsigned)took; i++)
            *msr_field(x, kv->msrs[done + i]) = block.entry[i].data;
        done += (unsigned)took;
        if ((unsigned)took == n) break;
        if (!is_read && is_readable(kv, kv->msrs[done]))
            return vm_fail(VM_E_HOST, "KVM does not take value 0x%llx for MSR 0x%x",
                           (unsigned long long)*msr_field(x, kv->msrs[done]), kv->msrs[done]);
        drop_msr(kv, done);
    }
    follow_tsc_adjust(kv, is_read);
    return VM_OK;
}

/* ---- FPU ---- */

#define XFEATURE_X87 1u
#define XFEATURE_SSE 2u
#define XFEATURE_AVX 4u

static uint64_t *xsave_features(void *image) { return (uint64_t *)((uint8_t *)image + 512); }

static void fpu_from(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    uint8_t *from = (uint8_t *)kv->xsave, *to = x->fpu.image;
    uint64_t present = *xsave_features(from);
    memset(&x->fpu, 0, sizeof x->fpu);
    /* A component in its initial state may leave anything in its place. */
    if (present & XFEATURE_X87)
        memcpy(to, from, 24), memcpy(to + 32, from + 32, 128);
    else
        X86_FPU_FCW(x) = 0x37f;
    if (present & (XFEATURE_SSE | XFEATURE_AVX))
        memcpy(to + 24, from + 24, 4);
    else
        X86_FPU_MXCSR(x) = 0x1f80;
    if (present & XFEATURE_SSE) memcpy(to + 160, from + 160, 256);
    if (present & XFEATURE_AVX) memcpy(to + 576, from + 576, 256);
}

static bool is_zero(const uint8_t *at, size_t bytes) { return at[0] == 0 && !memcmp(at, at + 1, bytes - 1); }

/* Components that are not as after a reset; the hardware saves and restores no others, at every entry and exit. */
static uint64_t features_in_use(const x86_cpu *x, const uint8_t *image)
{
    bool has_x87 = X86_FPU_FCW(x) != 0x37f || !is_zero(image + 2, 22) || !is_zero(image + 32, 128);
    bool has_sse = X86_FPU_MXCSR(x) != 0x1f80 || !is_zero(image + 160, 256);
    return (has_x87 ? XFEATURE_X87 : 0) | (has_sse ? XFEATURE_SSE : 0) |
           (!is_zero(image + 576, 256) ? XFEATURE_AVX : 0);
}

static void fpu_to(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    uint8_t *to = (uint8_t *)kv->xsave;
    uint64_t can = kvm_supported(kv->km, 0xd, 0, 0) & XFEATURE_AVX, in_use = features_in_use(x, x->fpu.image);
    memset(to, 0, kv->km->xsave_bytes);
    memcpy(to, x->fpu.image, 416);
    memset(to + 28, 0, 4); /* MXCSR_MASK is not ours to set */
    *(uint32_t *)(to + 24) &= 0xffff;
    if (can) memcpy(to + 576, x->fpu.image + 576, 256);
    *xsave_features(to) = in_use & (XFEATURE_X87 | XFEATURE_SSE | can);
}

static int read_fpu(kvm_vcpu *kv)
{
    kvm_machine *km = kv->km;
    if (kvm_ioctl(kv->fd, km->xsave_bytes > sizeof(struct kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, kv->xsave) < 0)
        return vm_fail_errno(VM_E_HOST, "KVM_GET_XSAVE");
    fpu_from(kv);
    struct kvm_xcrs xcrs;
    memset(&xcrs, 0, sizeof xcrs);
    if (km->has_xcrs && kvm_ioctl(kv->fd, KVM_GET_XCRS, &xcrs) == 0)
        for (unsigned i = 0; i < xcrs.nr_xcrs && i < KVM_MAX_XCRS; i++)
            if (xcrs.xcrs[i].xcr == 0) kv->cpu->x86.xcr0 = xcrs.xcrs[i].value;
    return VM_OK;
}

/* A new vCPU is as KVM makes one, until something else was loaded: FPU initialised, XCR0 1. */
static int write_fpu(kvm_vcpu *kv)
{
    struct kvm_xcrs xcrs;
    bool is_new = !kv->is_loaded;
    fpu_to(kv);
    if (!(is_new && *xsave_features(kv->xsave) == 0) && kvm_ioctl(kv->fd, KVM_SET_XSAVE, kv->xsave) < 0)
        return vm_fail_errno(VM_E_HOST, "KVM_SET_XSAVE");
    if (!kv->km->has_xcrs || (is_new && kv->cpu->x86.xcr0 == 1)) return VM_OK;
    memset(&xcrs, 0, sizeof xcrs);
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0].value = kv->cpu->x86.xcr0;
    return kvm_ioctl(kv->fd, KVM_SET_XCRS, &xcrs) < 0 ? vm_fail_errno(VM_E_HOST, "KVM_SET_XCRS") : VM_OK;
}

/* ---- general registers ---- */

#define SAME_REGISTERS(move)                                                                                           \
    move(rax, X86_RAX) move(rcx, X86_RCX) move(rdx, X86_RDX) move(rbx, X86_RBX) move(rsp, X86_RSP) move(rbp, X86_RBP)  \
        move(rsi, X86_RSI) move(rdi, X86_RDI) move(r8, X86_R8) move(r9, X86_R9) move(r10, X86_R10) move(r11, X86_R11)  \
            move(r12, X86_R12) move(r13, X86_R13) move(r14, X86_R14) move(r15, X86_R15)

static void regs_copy_from(x86_cpu *x, const struct kvm_regs *r)
{
#define FROM(name, index) x->gpr[index] = r->name;
    SAME_REGISTERS(FROM)
    x->rip = x->next_rip = r->rip;
    x->rflags = r->rflags;
}

static void regs_copy_to(const x86_cpu *x, struct kvm_regs *r)
{
#define TO(name, index) r->name = x->gpr[index];
    SAME_REGISTERS(TO)
    r->rip = x->rip;
    r->rflags = x->rflags | X86_FL_1;
}

void kvm_regs_from(kvm_vcpu *kv) { regs_copy_from(&kv->cpu->x86, &kv->run->s.regs.regs); }

/* ---- system registers ---- */

static void seg_from(x86_seg *to, const struct kvm_segment *s)
{
    unsigned low = s->type | (unsigned)s->s << 4 | (unsigned)s->dpl << 5 | (unsigned)(s->present && !s->unusable) << 7;
    unsigned high = (unsigned)s->avl | (unsigned)s->l << 1 | (unsigned)s->db << 2 | (unsigned)s->g << 3;
    *to = (x86_seg){.base = s->base, .limit = s->limit, .sel = s->selector, .attr = (uint16_t)(low | high << 12)};
}

static void seg_to(const x86_seg *from, struct kvm_segment *s)
{
    unsigned a = from->attr;
    memset(s, 0, sizeof *s);
    s->base = from->base;
    s->limit = from->limit;
    s->selector = from->sel;
    s->type = a & 15;
    s->s = a >> 4 & 1;
    s->dpl = a >> 5 & 3;
    s->present = a >> 7 & 1;
    s->avl = a >> 12 & 1;
    s->l = a >> 13 & 1;
    s->db = a >> 14 & 1;
    s->g = from->limit > 0xfffff || (a >> 15 && (from->limit & 0xfff) == 0xfff); /* else VMX does not enter */
    s->unusable = !s->present;
}

/* The hardware enters only with a busy TSS in TR. */
static void tr_to(const x86_seg *from, struct kvm_segment *s, bool is_long)
{
    seg_to(from, s);
    bool is_busy16 = s->type == X86_SYS_TSS16_BUSY && !is_long;
    if (!s->present || s->s || !(is_busy16 || s->type == X86_SYS_TSS32_BUSY)) {
        s->type = X86_SYS_TSS32_BUSY;
        s->s = 0;
        s->present = 1;
        s->unusable = 0;
    }
}

static void events_from(kvm_vcpu *kv, const struct kvm_vcpu_events *e)
{
    x86_cpu *x = &kv->cpu->x86;
    x->inhibit = e->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS ? 2
                 : e->interrupt.shadow & KVM_X86_SHADOW_INT_STI  ? 1
                                                                 : 0;
    x->nmi_blocked = e->nmi.masked && !e->nmi.injected; /* one that is not there yet blocks nothing */
}

/* NMIs that KVM has not delivered come back: two are two, and whoever goes on with this state finds them all. */
static int take_nmis(kvm_vcpu *kv, struct kvm_vcpu_events *e)
{
    vm_vcpu *cpu = kv->cpu;
    unsigned held = e->nmi.pending + e->nmi.injected;
    if (held == 0) return VM_OK;
    e->nmi.masked &= !e->nmi.injected;
    e->nmi.pending = e->nmi.injected = 0;
    e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
    if (kvm_ioctl(kv->fd, KVM_SET_VCPU_EVENTS, e) < 0) return vm_fail_errno(VM_E_HOST, "KVM_SET_VCPU_EVENTS");
    if (cpu->x86.nmi_pending && !kv->is_nmi_given) held++;
    kv->is_nmi_given = false;
    cpu->x86.nmi_pending = true;
    vm_device_lock(cpu->machine);
    for (; held > 1 && cpu->nmis_latched < VM_NMIS; held--) cpu->nmis_latched++;
    vm_device_unlock(cpu->machine);
    atomic_fetch_or(&cpu->x86.attention, X86_ATT_EVENT); /* for those */
    return VM_OK;
}

/* An event that KVM had begun to inject stays, unless the whole state was replaced. */
static void events_to(kvm_vcpu *kv, struct kvm_vcpu_events *e)
{
    const x86_cpu *x = &kv->cpu->x86;
    if (!kv->has_events) memset(e, 0, sizeof *e);
    e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    e->interrupt.shadow = x->inhibit & 2                              ? KVM_X86_SHADOW_INT_MOV_SS
                          : (x->inhibit & 1) && (x->rflags & X86_FL_IF) ? KVM_X86_SHADOW_INT_STI
                                                                        : 0; /* VMX enters with no other */
    e->nmi.masked = x->nmi_blocked;
    e->nmi.pending = kv->is_nmi_given = x->nmi_pending;
    e->nmi.injected = 0;
}

static const unsigned char seg_order[] = {X86_CS, X86_DS, X86_ES, X86_FS, X86_GS, X86_SS};

static void sregs_copy_from(kvm_vcpu *kv, const struct kvm_sregs *s)
{
    x86_cpu *x = &kv->cpu->x86;
    const struct kvm_segment *data = &s->cs; /* cs, ds, es, fs, gs, ss lie in a row */
    for (unsigned i = 0; i < sizeof seg_order; i++) seg_from(&x->seg[seg_order[i]], &data[i]);
    seg_from(&x->seg[X86_TR], &s->tr);
    seg_from(&x->seg[X86_LDTR], &s->ldt);
    x->gdtr = (x86_dtr){.base = s->gdt.base, .limit = s->gdt.limit};
    x->idtr = (x86_dtr){.base = s->idt.base, .limit = s->idt.limit};
    x->cr0 = s->cr0;
    x->cr2 = s->cr2;
    x->cr4 = s->cr4;
    x->efer = s->efer;
    x->flat = kv->is_flat && s->cr3 == kv->km->flat_gpa && (s->cr0 & X86_CR0_PG);
    if (!x->flat) {
        kv->is_flat = false;
        x->cr3 = s->cr3;
    }
    if ((x->cr0 & X86_CR0_PG) && (x->cr4 & X86_CR4_PAE) && !(x->efer & X86_EFER_LMA))
        x86_read_phys(x, x->cr3 & UINT64_C(0xffffffe0), x->pdpte, sizeof x->pdpte);
}

static int sregs_copy_to(kvm_vcpu *kv, struct kvm_sregs *s)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_segment *data = &s->cs;
    bool is_long = x->efer & X86_EFER_LMA;
    for (unsigned i = 0; i < sizeof seg_order; i++) seg_to(&x->seg[seg_order[i]], &data[i]);
    tr_to(&x->seg[X86_TR], &s->tr, is_long);
    seg_to(&x->seg[X86_LDTR], &s->ldt);
    if (!is_long) s->cs.l = 0; /* means nothing there, and KVM does not take it */
    s->gdt.base = x->gdtr.base, s->gdt.limit = x->gdtr.limit;
    s->idt.base = x->idtr.base, s->idt.limit = x->idtr.limit;
    memset(s->gdt.padding, 0, sizeof s->gdt.padding);
    memset(s->idt.padding, 0, sizeof s->idt.padding);
    s->cr0 = x->cr0 | X86_CR0_ET;
    s->cr2 = x->cr2;
    s->cr3 = x->cr3;
    s->cr4 = x->cr4 & kv->km->cr4_mask;
    s->efer = x->efer & kv->km->efer_mask;
    s->cr8 = x->env->cr8_read ? x->env->cr8_read(x) : 0;
    s->apic_base = UINT64_C(0xfee00800) | (kv->cpu->index == 0 ? 0x100 : 0);
    memset(s->interrupt_bitmap, 0, sizeof s->interrupt_bitmap);
    kv->is_flat = x->flat;
    if (x->flat) {
        int rc = kvm_flat_ready(kv->cpu->machine, x->rip);
        if (rc) return rc;
        s->cr3 = kv->km->flat_gpa;
    }
    x->cr4 = s->cr4; /* what cannot be is not shown either */
    kv->cr8 = (uint8_t)s->cr8;
    return VM_OK;
}

#define LOOKS_AGAIN 32u /* whoever looks once looks again: that many exits bring it along */

/* RFLAGS beyond these does not change what x86_mode_changed() finds. */
#define MODE_FLAGS (X86_FL_TF | X86_FL_IF | X86_FL_RF | X86_FL_VM | X86_FL_AC)

static int read_mode(kvm_vcpu *kv)
{
    struct kvm_sync_regs *sync = &kv->run->s.regs;
    if (!kv->has_synced_sregs) {
        if (kvm_ioctl(kv->fd, KVM_GET_SREGS, &sync->sregs) < 0) return vm_fail_errno(VM_E_HOST, "KVM_GET_SREGS");
        kv->has_synced_sregs = true;
    }
    kv->sregs_wanted = LOOKS_AGAIN;
    bool is_same = kv->has_seen && !memcmp(&kv->seen, &sync->sregs, sizeof kv->seen);
    uint64_t flags = kv->cpu->x86.rflags & MODE_FLAGS;
    if (is_same && flags == kv->seen_flags) return VM_OK;
    if (!is_same) {
        kv->seen = sync->sregs;
        kv->has_seen = true;
        sregs_copy_from(kv, &sync->sregs);
    }
    kv->seen_flags = flags;
    x86_mode_changed(&kv->cpu->x86);
    return VM_OK;
}

static int read_events(kvm_vcpu *kv)
{
    struct kvm_sync_regs *sync = &kv->run->s.regs;
    if (!kv->has_synced_events) {
        if (kvm_ioctl(kv->fd, KVM_GET_VCPU_EVENTS, &sync->events) < 0)
            return vm_fail_errno(VM_E_HOST, "KVM_GET_VCPU_EVENTS");
        kv->has_synced_events = true;
    }
    kv->events_wanted = LOOKS_AGAIN;
    kv->has_events = true;
    events_from(kv, &sync->events);
    return take_nmis(kv, &sync->events);
}

void kvm_get_mode(kvm_vcpu *kv)
{
    if (kv->valid & (KVM_PART_MODE | VM_STATE_SREGS)) return;
    if (read_mode(kv) == VM_OK) kv->valid |= KVM_PART_MODE;
    const uint32_t *touched = kv->cpu->x86.tlb_touched;
    if (kv->is_tlb_stale && (touched[0] | touched[1] | touched[2])) kvm_flush_tlb(kv);
}

/* Reading the events puts a page fault's address that KVM still holds with the exception into CR2: they come first, and
 * system registers that came before them are read again. */
static int read_sregs(kvm_vcpu *kv)
{
    int rc = read_events(kv);
    if (rc) return rc;
    if (kv->run->s.regs.events.exception.pending) {
        kv->has_synced_sregs = false;
        kv->valid &= ~KVM_PART_MODE;
    }
    kvm_get_mode(kv);
    return kv->valid & KVM_PART_MODE ? VM_OK : VM_E_HOST;
}

/* ---- debug registers ---- */

static int read_debug(kvm_vcpu *kv)
{
    struct kvm_debugregs d;
    memset(&d, 0, sizeof d);
    if (kvm_ioctl(kv->fd, KVM_GET_DEBUGREGS, &d) < 0) return vm_fail_errno(VM_E_HOST, "KVM_GET_DEBUGREGS");
    x86_cpu *x = &kv->cpu->x86;
    memcpy(x->dr, d.db, sizeof d.db);
    x->dr[6] = d.dr6;
    x->dr[7] = d.dr7;
    return VM_OK;
}

static int write_debug(kvm_vcpu *kv)
{
    struct kvm_debugregs d;
    x86_cpu *x = &kv->cpu->x86;
    bool is_reset =
        !(x->dr[0] | x->dr[1] | x->dr[2] | x->dr[3]) && x->dr[6] == X86_DR6_INIT && x->dr[7] == X86_DR7_INIT;
    if (is_reset && !kv->is_loaded) return VM_OK; /* as write_fpu() */
    memset(&d, 0, sizeof d);
    memcpy(d.db, x->dr, sizeof d.db);
    d.dr6 = (uint32_t)x->dr[6];
    d.dr7 = (uint32_t)x->dr[7];
    if (kvm_ioctl(kv->fd, KVM_SET_DEBUGREGS, &d) < 0) return vm_fail_errno(VM_E_HOST, "KVM_SET_DEBUGREGS");
    return VM_OK;
}

/* ---- by parts ---- */

/* A part that cannot be fetched keeps its last value; the next run finds the same failure and reports it. */
void kvm_get_state(vm_vcpu *cpu, unsigned parts)
{
    kvm_vcpu *kv = kvm_vcpu_of(cpu);
    if (kv->rip_unresolved && (parts & VM_STATE_REGS)) kvm_resolve(kv);
    unsigned missing = parts & ~kv->valid;
    if (!missing) return;
    bool ok = true;
    if (missing & VM_STATE_REGS) {
        struct kvm_regs r;
        ok &= kvm_ioctl(kv->fd, KVM_GET_REGS, &r) == 0;
        if (ok) regs_copy_from(&cpu->x86, &r);
    }
    if (missing & VM_STATE_SREGS) ok &= read_sregs(kv) == VM_OK;
    if (missing & VM_STATE_FPU) ok &= read_fpu(kv) == VM_OK;
    if (missing & VM_STATE_MSRS) ok &= transfer_msrs(kv, true) == VM_OK && read_debug(kv) == VM_OK;
    if (ok) kv->valid |= missing;
    if (missing & (VM_STATE_SREGS | VM_STATE_MSRS)) x86_mode_changed(&cpu->x86);
}

/* The caller fetched what it did not replace, so x86 holds these parts in full. */
void kvm_set_state(vm_vcpu *cpu, unsigned parts)
{
    kvm_vcpu *kv = kvm_vcpu_of(cpu);
    kv->valid |= parts;
    kv->dirty |= parts;
    if (parts & VM_STATE_REGS) kv->regs_changed = true;
    if (parts == VM_STATE_ALL && !kv->in_run) { /* reset, a starting mode, an injection: x86 is all that counts */
        kv->is_replaced = true;
        kv->makes_kernel = false;
        kv->has_events = kv->is_reported = kv->is_soft_io = false;
    }
}

/* Everything KVM needs before it may enter. Never called while an exit is open. */
int kvm_load(kvm_vcpu *kv)
{
    struct kvm_sync_regs *sync = &kv->run->s.regs;
    unsigned dirty = kv->dirty;
    if (!dirty) return VM_OK;
    if (!kv->has_cpuid) { /* not at creation: APIC ids and topology are the platform's, which comes later */
        int rc = kvm_cpuid_set(kv);
        if (rc) return rc;
        kv->has_cpuid = true;
    }
    if (dirty & VM_STATE_SREGS) {
        kv->has_seen = false;
        int rc = sregs_copy_to(kv, &sync->sregs);
        if (rc) return rc;
        events_to(kv, &sync->events);
    }
    if (dirty & VM_STATE_REGS) regs_copy_to(&kv->cpu->x86, &sync->regs);
    if (kv->km->can_sync) {
        kv->run->kvm_dirty_regs |= (dirty & VM_STATE_REGS ? KVM_SYNC_X86_REGS : 0) |
                                   (dirty & VM_STATE_SREGS ? KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS : 0);
    } else {
        if ((dirty & VM_STATE_SREGS) && kvm_ioctl(kv->fd, KVM_SET_SREGS, &sync->sregs) < 0)
            return vm_fail_errno(VM_E_HOST, "KVM_SET_SREGS");
        if ((dirty & VM_STATE_SREGS) && kvm_ioctl(kv->fd, KVM_SET_VCPU_EVENTS, &sync->events) < 0)
            return vm_fail_errno(VM_E_HOST, "KVM_SET_VCPU_EVENTS");
        if ((dirty & VM_STATE_REGS) && kvm_ioctl(kv->fd, KVM_SET_REGS, &sync->regs) < 0)
            return vm_fail_errno(VM_E_HOST, "KVM_SET_REGS");
    }
    if (dirty & VM_STATE_FPU) {
        int rc = write_fpu(kv);
        if (rc) return rc;
    }
    if (dirty & VM_STATE_MSRS) {
        int rc = transfer_msrs(kv, false);
        if (rc == VM_OK) rc = write_debug(kv);
        if (rc) return rc;
    }
    kv->dirty = 0;
    kv->is_loaded = true;
    return VM_OK;
}
