/* cpustate.c - a vCPU's state out of its x86_cpu and back.
 *
 * Putting a state back is part of resetting a fuzzing target millions of times a second: three copies and a few fields.
 * What instrumentation keeps in the x86_cpu (hooks' progress inside an instruction, block state) is not part of the
 * state: it begins anew.
 */
#include "core/cpustate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAME_PLACE(field)                                                                                        \
    _Static_assert(offsetof(x86_cpu, field) - offsetof(x86_cpu, gdtr) == offsetof(vm_cpu_system, field),         \
                   "vm_cpu_system mirrors x86_cpu: " #field)
SAME_PLACE(cr0);
SAME_PLACE(dr);
SAME_PLACE(star);
SAME_PLACE(mtrr_var);
SAME_PLACE(de_cfg);
SAME_PLACE(pdpte);
#define GENERAL_BYTES offsetof(vm_cpu_state, seg)
_Static_assert(offsetof(x86_cpu, rflags) + 8 == GENERAL_BYTES, "gpr, rip, next_rip, rflags begin both");

static int take_log(vm_cpu_state *s, const x86_cpu *x)
{
    s->io_log = NULL;
    s->io_count = x->io_count;
    s->io_pos = x->io_pos;
    if (!x->io_count)
        return VM_OK;
    s->io_log = malloc(x->io_count * sizeof *s->io_log);
    if (!s->io_log)
        return vm_fail(VM_E_NOMEM, "no memory for a vCPU's accesses under way");
    memcpy(s->io_log, x->io_log, x->io_count * sizeof *s->io_log);
    return VM_OK;
}

int vm_cpu_state_take(vm_vcpu *cpu, vm_cpu_state *s)
{
    x86_cpu *x = &cpu->x86;
    vm_vcpu_fetch(cpu, VM_STATE_ALL);
    memset(s, 0, sizeof *s);
    memcpy(s, x, GENERAL_BYTES);
    memcpy(s->seg, x->seg, sizeof s->seg);
    memcpy(&s->system, &x->gdtr, sizeof s->system);
    s->fpu = x->fpu;
    s->retired = x->retired;
    s->random_state = cpu->random_state;
    s->flat = x->flat;
    s->halted = x->halted;
    s->inhibit = x->inhibit;
    s->nmi_blocked = x->nmi_blocked;
    s->nmi_pending = x->nmi_pending;
    s->keep_rf = x->keep_rf;
    s->no_trap = x->no_trap;
    s->ext = x->ext;
    s->dr_hit = x->dr_hit;
    s->spent = x->spent;
    s->is_parked = cpu->is_parked;
    s->sipi_vector = cpu->sipi_vector;
    s->init_pending = cpu->init_pending;
    s->sipi_pending = cpu->sipi_pending;
    s->nmis_latched = cpu->nmis_latched;
    s->has_pending = cpu->has_pending;
    s->is_shut_down = cpu->is_shut_down;
    s->bare_cr8 = cpu->bare_cr8;
    s->inject_set = cpu->inject.is_set;
    s->inject_has_error = cpu->inject.has_error;
    s->inject_vector = cpu->inject.vector;
    s->inject_error = cpu->inject.error;
    s->has_event = cpu->event_seen != atomic_load(&cpu->machine->event_seq);
    s->fault = x->fault;
    if (cpu->has_pending) {
        s->pending_reason = (uint32_t)cpu->pending.reason;
        s->pending_rip = cpu->pending.rip;
        s->io = x->io;
    }
    return take_log(s, x);
}

static void put_bytes(vm_vcpu *cpu, const vm_cpu_state *s)
{
    x86_cpu *x = &cpu->x86;
    x->flat = s->flat;
    x->halted = s->halted;
    x->inhibit = s->inhibit;
    x->nmi_blocked = s->nmi_blocked;
    x->nmi_pending = s->nmi_pending;
    x->keep_rf = s->keep_rf;
    x->no_trap = s->no_trap;
    x->ext = s->ext;
    x->dr_hit = s->dr_hit;
    x->spent = s->spent;
    cpu->is_parked = s->is_parked;
    cpu->sipi_vector = s->sipi_vector;
    cpu->init_pending = s->init_pending;
    cpu->sipi_pending = s->sipi_pending;
    cpu->nmis_latched = s->nmis_latched;
    cpu->has_pending = s->has_pending;
    cpu->is_shut_down = s->is_shut_down;
    cpu->bare_cr8 = s->bare_cr8;
    cpu->inject.is_set = s->inject_set;
    cpu->inject.has_error = s->inject_has_error;
    cpu->inject.vector = s->inject_vector;
    cpu->inject.error = s->inject_error;
    cpu->irq_look = cpu->machine->is_pc;
    cpu->is_hopeless = false;
}

bool vm_cpu_state_put(vm_vcpu *cpu, const vm_cpu_state *s)
{
    x86_cpu *x = &cpu->x86;
    const vm_cpu_system *y = &s->system;
    bool differs = ((x->cr0 ^ y->cr0) | (x->cr3 ^ y->cr3) | (x->cr4 ^ y->cr4) | (x->efer ^ y->efer)) != 0 ||
                   x->flat != s->flat || vm_cpu_state_pages(s);
    /* memmove: the library's, where compilers would make memcpy of a known size a slow string instruction. */
    memmove(x, s, GENERAL_BYTES);
    memmove(x->seg, s->seg, sizeof x->seg);
    memmove(&x->gdtr, y, sizeof *y);
    memmove(&x->fpu, &s->fpu, sizeof x->fpu);
    x->retired = s->retired;
    cpu->random_state = s->random_state;
    x->fault = s->fault;
    put_bytes(cpu, s);
    if (s->has_pending) {
        cpu->pending.reason = (vm_exit_reason)s->pending_reason;
        cpu->pending.rip = s->pending_rip;
        x->io = s->io;
    }
    x->io_count = s->io_count;
    x->io_pos = s->io_pos;
    if (s->io_count)
        memcpy(x->io_log, s->io_log, s->io_count * sizeof *s->io_log);
    cpu->has_redirect = false;
    cpu->hook_stop.is_set = false;
    x->hook_done = false;
    x->fault_hooked = 0;
    x->block_state = X86_BLOCK_FRESH;
    x86_mode_changed(x);
    vm_vcpu_changed(cpu, VM_STATE_ALL);
    return differs;
}

/* ---- states from files ---- */

static int bad(const vm_vcpu *cpu, const char *what)
{
    return vm_fail(VM_E_FORMAT, "snapshot: vCPU %u: %s", cpu->index, what);
}

static bool are_bools(const vm_cpu_state *s)
{
    const uint8_t bools[] = { s->flat, s->halted, s->nmi_blocked, s->nmi_pending, s->keep_rf, s->no_trap, s->is_parked,
                              s->init_pending, s->sipi_pending, s->has_pending, s->is_shut_down,
                              s->inject_set, s->inject_has_error, s->has_event };
    for (size_t i = 0; i < sizeof bools; i++)
        if (bools[i] > 1)
            return false;
    return true;
}

/* The bools inside other structs, read as bytes. */
static bool is_clean(const void *from, const size_t *at, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (((const uint8_t *)from)[at[i]] > 1)
            return false;
    return true;
}

static bool is_good_access(const x86_io_access *a)
{
#define AT(field) offsetof(x86_io_access, field)
    static const size_t bools[] = { AT(is_port), AT(is_write), AT(is_fetch), AT(is_unmapped), AT(done), AT(is_hook) };
#undef AT
    return is_clean(a, bools, sizeof bools / sizeof *bools) && a->width <= 8;
}

static bool is_good_fault(const x86_fault *f)
{
#define AT(field) offsetof(x86_fault, field)
    static const size_t bools[] = { AT(has_error), AT(is_soft), AT(is_external) };
#undef AT
    return is_clean(f, bools, sizeof bools / sizeof *bools);
}

static bool are_good_accesses(const vm_cpu_state *s)
{
    if (s->io_count > X86_IO_LOG || s->io_pos > s->io_count || !is_good_access(&s->io))
        return false;
    for (uint32_t i = 0; i < s->io_count; i++)
        if (!is_good_access(&s->io_log[i]))
            return false;
    return true;
}

static vm_segment segment_of(const x86_seg *s)
{
    return (vm_segment){ .base = s->base, .limit = s->limit, .selector = s->sel, .attributes = s->attr };
}

/* By the rules for what a program may set. */
static int check_system(const vm_vcpu *cpu, const vm_cpu_state *s)
{
    const vm_cpu_system *y = &s->system;
    vm_sregs r = VM_SREGS_INIT;
    vm_segment *segs = &r.es;
    for (unsigned i = 0; i < X86_NSEG; i++)
        segs[i] = segment_of(&s->seg[i]);
    r.gdtr = (vm_dtable){ .base = y->gdtr.base, .limit = y->gdtr.limit };
    r.idtr = (vm_dtable){ .base = y->idtr.base, .limit = y->idtr.limit };
    r.cr0 = y->cr0;
    r.cr2 = y->cr2;
    r.cr3 = y->cr3;
    r.cr4 = y->cr4;
    r.efer = y->efer;
    r.xcr0 = y->xcr0;
    r.dr6 = y->dr[6];
    r.dr7 = y->dr[7];
    int status = vm_sregs_check(&r, cpu->x86.phys_mask);
    if (status == VM_OK)
        return VM_OK;
    char why[200];
    snprintf(why, sizeof why, "%s", vm_errmsg());
    return bad(cpu, why);
}

int vm_cpu_state_check(const vm_vcpu *cpu, const vm_cpu_state *s)
{
    uint32_t mxcsr;
    memcpy(&mxcsr, &s->fpu.image[24], sizeof mxcsr);
    if (!are_bools(s) || s->inhibit > 3 || s->bare_cr8 > 15 || s->nmis_latched > VM_NMIS)
        return bad(cpu, "a flag has an impossible value");
    if (!is_good_fault(&s->fault) || !are_good_accesses(s))
        return bad(cpu, "the accesses under way are not possible");
    if (mxcsr & ~0xffffu)
        return bad(cpu, "reserved bits of MXCSR are set");
    for (unsigned i = 512; i < 576; i++)
        if (s->fpu.image[i] & (i == 512 ? 0xf8 : 0xff))
            return bad(cpu, "the XSAVE header has bits that mean nothing");
    return check_system(cpu, s);
}
