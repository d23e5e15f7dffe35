/* kvm_limits.c - guests that this host's KVM cannot run.
 *
 * Hosts without hardware virtualisation for their guests have KVMs that run guest ring 3 on the CPU and emulate the
 * rest, and not all of it. Without a word they take legacy paging or virtual-8086 mode and then run something else;
 * SYSCALL in ring 3 goes to LSTAR and stays in ring 3, and INT n there is #UD (tests/kvm/moves.c meets both). Nothing
 * exits when that happens, so such guests must not get there: what is beyond KVM is interpreted for as long as it is
 * so, which is a hundred times faster than the emulation anyway.
 *
 * Such a host also answers the MOV to CR0 that turns on legacy paging with #GP, and nothing exits then either. Where a guest
 * has no handler for it, it ends in a shutdown, after which the interpreter executes the instruction again. A PC's guest
 * may have one, so outside long mode it is interpreted from the start. What remains is a guest of a machine without
 * devices (VM_PLATFORM_BARE) that turns on legacy paging by itself, with a gate for #GP in its IDT: it gets the #GP.
 *
 * What shows a kernel in time are its writes to EFER and to the targets of SYSCALL, which these hosts' machines see, and
 * a task register with a base (boot code loads an empty one). One case stays open: a guest that the program put into
 * long mode itself (so EFER is never written), that makes page tables and gates of its own without an exit, loads no
 * such task register and then executes INT n in ring 3. It gets #UD there; nothing that KVM offers tells before. The
 * interpreter or the JIT runs such a guest.
 *
 * Whether the host is of this kind is asked once: set a state with legacy paging, see whether it is still there. On all
 * others nothing here is ever beyond.
 */
#include "kvm/kvm.h"

#include <string.h>
#include "x86/system.h"

static bool holds(kvm_vcpu *kv, uint64_t cr0, uint64_t rflags)
{
    static const struct kvm_segment code = {.limit = 0xffff, .type = 11, .present = 1, .s = 1};
    struct kvm_sregs s;
    struct kvm_regs r;
    memset(&r, 0, sizeof r);
    if (kvm_ioctl(kv->fd, KVM_GET_SREGS, &s) < 0) return true;
    s.cs = s.ds = s.es = s.fs = s.gs = s.ss = code;
    s.ds.type = s.es.type = s.fs.type = s.gs.type = s.ss.type = 3;
    s.cs.dpl = s.ds.dpl = s.es.dpl = s.fs.dpl = s.gs.dpl = s.ss.dpl = rflags & X86_FL_VM ? 3 : 0;
    s.cs.type = rflags & X86_FL_VM ? 3 : 11;
    s.cr0 = cr0;
    s.cr3 = 0;
    s.cr4 = X86_CR4_PSE;
    s.efer = 0;
    r.rflags = rflags;
    return kvm_ioctl(kv->fd, KVM_SET_SREGS, &s) == 0 && kvm_ioctl(kv->fd, KVM_SET_REGS, &r) == 0 &&
           kvm_ioctl(kv->fd, KVM_GET_SREGS, &s) == 0 && kvm_ioctl(kv->fd, KVM_GET_REGS, &r) == 0 && s.cr0 == cr0 &&
           r.rflags == rflags;
}

static void probe(kvm_vcpu *kv)
{
    kvm_machine *km = kv->km;
    struct kvm_sregs s;
    struct kvm_regs r;
    if (km->is_probed || kvm_ioctl(kv->fd, KVM_GET_SREGS, &s) < 0 || kvm_ioctl(kv->fd, KVM_GET_REGS, &r) < 0) return;
    pthread_mutex_lock(&km->lock);
    km->lacks_legacy_paging = !holds(kv, X86_CR0_PE | X86_CR0_ET | X86_CR0_PG, X86_FL_1);
    km->lacks_v86 = !holds(kv, X86_CR0_PE | X86_CR0_ET, X86_FL_1 | X86_FL_VM);
    km->is_probed = true;
    pthread_mutex_unlock(&km->lock);
    kvm_ioctl(kv->fd, KVM_SET_SREGS, &s);
    kvm_ioctl(kv->fd, KVM_SET_REGS, &r);
}

bool kvm_is_limited(kvm_vcpu *kv)
{
    probe(kv);
    return kv->km->lacks_legacy_paging;
}

/* EFER, STAR, LSTAR, CSTAR: a guest that writes them has ring 3 in mind. Such hosts' machines see it (kvm_machine.c).
 */
bool kvm_is_kernel_msr(uint32_t msr) { return msr >= 0xc0000080 && msr <= 0xc0000083; }

/* Long mode with a kernel that ring 3 calls, or will: page tables of its own, and a target of SYSCALL or a task
 * segment, without which no interrupt leaves ring 3. */
static bool has_kernel(kvm_vcpu *kv)
{
    const x86_cpu *x = &kv->cpu->x86;
    if (!(kv->dirty & (VM_STATE_SREGS | VM_STATE_MSRS))) return false;
    kvm_get_state(kv->cpu, VM_STATE_SREGS);
    if (!(x->efer & X86_EFER_LME) || x->flat) return false;
    kvm_get_state(kv->cpu, VM_STATE_MSRS);
    return kv->makes_kernel || x->star || x->lstar || x->cstar || x->seg[X86_TR].base;
}

/* The state about to be loaded is one that KVM would not run. */
bool kvm_is_beyond(kvm_vcpu *kv)
{
    const x86_cpu *x = &kv->cpu->x86;
    bool is_v86 = x->rflags & X86_FL_VM, is_legacy = false, is_long;
    bool is_pc = kv->cpu->machine->is_pc && kv->km->emulates_ring0;
    if (kv->dirty & VM_STATE_SREGS) is_legacy = ((x->cr0 & X86_CR0_PG) || is_pc) && !(x->efer & X86_EFER_LMA);
    is_long = !is_legacy && !is_v86 && kv->km->emulates_ring0 && has_kernel(kv);
    if (!is_v86 && !is_legacy && !is_long) return false;
    probe(kv);
    return is_v86 ? kv->km->lacks_v86 : kv->km->lacks_legacy_paging;
}
