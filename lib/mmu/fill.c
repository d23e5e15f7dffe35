/* fill.c - between the inline TLB and the machine's MMU strategy: misses, flushes, write protection.
 *
 * "shadow" and "ept" are called directly, for the entries that a walk has read; the others by the public vtable.
 */
#include "core/track.h"
#include "mmu/ept.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

/* The guest's own walk, counted. */
static inline bool walk(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    bool ok = x86_walk_page(&cpu->x86, la, access, ctx, true, w);
    cpu->x86.stat[X86_STAT_WALKS]++;
    cpu->x86.stat[X86_STAT_WALK_REFS] += w->refs;
    return ok;
}

bool vm_mmu_walk_ctx(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    return walk(cpu, la, access, ctx, w);
}

/* A walk is a result already, but for the fault. */
#define SAME_PLACE(a, b) _Static_assert(offsetof(x86_walk, a) == offsetof(struct vm_mmu_result, b) && \
                         sizeof ((x86_walk *)0)->a == sizeof ((struct vm_mmu_result *)0)->b, "x86_walk is laid out as a result")
SAME_PLACE(size, size);
SAME_PLACE(gpa, gpa);
SAME_PLACE(page_bytes, page_bytes);
SAME_PLACE(prot, prot);
SAME_PLACE(global, global);
SAME_PLACE(trap_writes, trap_writes);
SAME_PLACE(fault_vector, fault_vector);
SAME_PLACE(fault_error, fault_error);
SAME_PLACE(count, entry_count);
SAME_PLACE(at, entry);
SAME_PLACE(context, context);
typedef union wanted { x86_walk w; struct vm_mmu_result result; } wanted;

static int set_fault(const x86_walk *w, struct vm_mmu_result *out)
{
    out->fault_vector = w->fault.vector;
    out->fault_error = w->fault.error;
    return VM_E_FAULT;
}

void vm_mmu_to_result(const x86_walk *w, bool ok, struct vm_mmu_result *out)
{
    out->entry_count = w->count;
    for (unsigned i = 0; i < w->count; i++)
        out->entry[i] = w->at[i];
    if (!ok) {
        (void)set_fault(w, out);
        return;
    }
    out->gpa = w->gpa;
    out->page_bytes = w->page_bytes;
    out->prot = (vm_prot)w->prot;
    out->global = w->global;
}

/* Not into the result that translate() was given, for another access, or misused. */
static __attribute__((noinline)) int walk_apart(vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    if (!cpu || !out || out->size < sizeof *out)
        return vm_fail(VM_E_INVALID, "vm_mmu_walk: NULL or too small an argument");
    if (access != VM_PROT_R && access != VM_PROT_W && access != VM_PROT_X)
        return vm_fail(VM_E_INVALID, "vm_mmu_walk: access %d is not one of R, W, X", (int)access);
    x86_walk w;
    bool ok = walk(cpu, gva, access, cpu->walk_ctx, &w);
    vm_mmu_to_result(&w, ok, out);
    return ok ? VM_OK : VM_E_FAULT;
}

VM_API int vm_mmu_walk(vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    if (__builtin_expect(!cpu || !out || (const void *)out != cpu->walk || (unsigned)access != cpu->walk_access, 0))
        return walk_apart(cpu, gva, access, out);
    return walk(cpu, gva, access, cpu->walk_ctx, cpu->walk) ? VM_OK : set_fault(cpu->walk, out);
}

/* By the vtable: a strategy of the program, or one that has no more to say than such. */
static inline bool ask(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, wanted *u)
{
    const vm_mmu_ops *ops = cpu->machine->mmu;
    x86_walk *w = &u->w;
    memset(&u->result, 0, offsetof(struct vm_mmu_result, entry));      /* entry_count says how many of those there are */
    u->result.size = sizeof u->result;
    u->result.context = ctx;
    cpu->walk_ctx = ctx;
    cpu->walk_access = access;
    cpu->walk = w;
    int status = ops->translate(cpu->machine->mmu_state, cpu, la, (vm_prot)access, &u->result);
    cpu->walk = NULL;
    if (__builtin_expect(status != VM_OK, 0)) {
        w->fault = (x86_fault){ .vector = X86_PF, .has_error = true, .error = u->result.fault_error, .address = la };
        return false;
    }
    /* What cannot be is seldom: tests that are never true cost less than stores to what is read next. */
    if (__builtin_expect((w->gpa & ~cpu->x86.phys_mask) || (w->prot & ~(unsigned)VM_PROT_RWX), 0)) {
        w->gpa &= cpu->x86.phys_mask;
        w->prot &= VM_PROT_RWX;
    }
    if (__builtin_expect(w->page_bytes < 4096 || (w->page_bytes & (w->page_bytes - 1)), 0))
        w->page_bytes = 4096;
    if (__builtin_expect(w->trap_writes, 0))
        vm_page_trap(cpu->machine, w->gpa & X86_PAGE_MASK, true);
    return true;
}

/* Ask the strategy. On failure w->fault is the page fault. */
static inline bool translate(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, wanted *u)
{
    switch (cpu->machine->mmu_kind) {
    case VM_MMU_SHADOW: return vm_shadow_translate(cpu, la, access, ctx, &u->w);
    case VM_MMU_EPT: return vm_ept_translate(cpu, la, access, ctx, &u->w);
    default: return ask(cpu, la, access, ctx, u);
    }
}

/* Enter a page of RAM. SMP: it may become code while its write tag is made, and whoever marks it may not have seen
 * the tag; so look again once the tag is there. */
static inline __attribute__((always_inline)) void enter_ram(vm_vcpu *cpu, uint64_t la, unsigned ctx, const x86_walk *w, uint8_t *host, unsigned prot)
{
    x86_cpu *x = &cpu->x86;
    unsigned allowed = (prot & w->prot) | (w->prot & X86_WRITE ? X86_TLB_MAY_W : 0);
    x86_tlb_set(x, ctx, la, w->gpa, host, allowed, w->global, w->page_bytes);
    if ((allowed & X86_WRITE) && cpu->machine->vcpu_count > 1) {
        unsigned now = 0;
        atomic_thread_fence(memory_order_seq_cst);
        x->env->page(x, w->gpa & X86_PAGE_MASK, &now);
        if (!(now & X86_WRITE))
            x86_tlb_set(x, ctx, la, w->gpa, host, allowed & ~X86_WRITE, w->global, w->page_bytes);
    }
}

static bool is_device(vm_vcpu *cpu, uint64_t gpa)
{
    const vm_range *range = vm_find(cpu, gpa);
    return range && range->region->kind == VM_REGION_MMIO;
}

bool vm_mmu_refill(x86_cpu *x, uint64_t la, unsigned access)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    x86_walk w;
    unsigned prot = 0;
    if ((vm_trace_mask(cpu->machine) & VM_TRACE_MMU) || !vm_mmu_can_refill(cpu) || !vm_shadow_look_up(cpu, la, access, x->ctx, &w))
        return false;
    uint8_t *host = x->env->page(x, w.gpa & X86_PAGE_MASK, &prot);
    if (!host || !(prot & access))
        return false;
    x->stat[X86_STAT_FILLS]++;
    x->stat[X86_STAT_SHADOW_HITS]++;
    enter_ram(cpu, la, x->ctx, &w, host, prot);
    return true;
}

bool vm_mmu_fill(x86_cpu *x, uint64_t la, unsigned access, unsigned ctx, uint64_t *gpa)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    wanted u;
    const x86_walk *w = &u.w;
    unsigned prot = 0;
    x->stat[X86_STAT_FILLS]++;
    if (access & X86_WRITE)
        access = X86_WRITE;            /* of read and write: on x86 what may be written may be read */
    bool may_be_known = access == X86_WRITE || (x->tlb[ctx].meta[X86_TLB_INDEX(la)] & X86_TLBM_IO);
    if (may_be_known && x86_tlb_known(x, ctx, la, access, gpa)) {
        /* The first write since a snapshot, mostly: all that it needs is a note. */
        if (cpu->machine->track && access == X86_WRITE && cpu->machine->vcpu_count == 1 && !x->watch &&
            vm_track_write(cpu, *gpa & X86_PAGE_MASK)) {
            x86_tlb_allow(x, ctx, la);
            return true;
        }
        /* Device memory; or a write that has to be seen, unless that has ended: then translate once more for the tag.
         * */
        if (access != X86_WRITE || !x->env->page(x, *gpa & X86_PAGE_MASK, &prot) || !(prot & X86_WRITE))
            return true;
    }
    if (!translate(cpu, la, access, ctx, &u)) {
        x->fault = w->fault;
        return false;
    }
    *gpa = w->gpa;
    if (cpu->machine->track && (access & X86_WRITE) && (w->prot & X86_WRITE))
        vm_track_write(cpu, w->gpa & X86_PAGE_MASK);
    uint8_t *host = x->env->page(x, w->gpa & X86_PAGE_MASK, &prot);
    if (host && (prot & w->prot))
        enter_ram(cpu, la, ctx, w, host, prot);
    else if (!host && is_device(cpu, w->gpa))
        x86_tlb_set_io(x, ctx, la, w->gpa, w->prot, w->global, w->page_bytes);
    if (vm_trace_mask(cpu->machine) & VM_TRACE_MMU)
        vm_trace_line(cpu->machine, VM_TRACE_MMU, "cpu%u gva 0x%llx access %u ctx %u gpa 0x%llx prot %u%s", cpu->index,
                      (unsigned long long)la, access, ctx, (unsigned long long)w->gpa, w->prot, host ? "" : " (not RAM)");
    return true;
}

static void flushed(vm_vcpu *cpu, uint64_t la, uint64_t bytes, bool keep_global)
{
    cpu->x86.stat[X86_STAT_FLUSHES]++;
    if (cpu->machine->backend->tlb_dropped)
        cpu->machine->backend->tlb_dropped(cpu, la, bytes, keep_global);
    else if (cpu->machine->backend->tlb_flushed)
        cpu->machine->backend->tlb_flushed(cpu);
}

/* The address space that the vCPU is in. */
static vm_space space_of(const vm_vcpu *cpu)
{
    const x86_cpu *x = &cpu->x86;
    if (cpu->machine->mmu == &vm_mmu_shadow)
        return vm_shadow_space(cpu->machine, cpu->mmu_root);
    return (vm_space){ .key = x->cr4 & X86_CR4_PCIDE ? 1 + (x->cr3 & 0xfff) : 0 };
}

/* After MOV CR3: from the translations of one address space to those of another. */
static void switch_space(vm_vcpu *cpu, vm_space from, bool is_kept)
{
    vm_space to = space_of(cpu);
    bool is_shadow = cpu->machine->mmu == &vm_mmu_shadow;
    cpu->space = to;
    if (to.key && to.key == from.key && (is_shadow || is_kept) && to.version == from.version)
        return;
    vm_mmu_park(cpu, to.key == from.key ? (vm_space){ 0 } : from);
    flushed(cpu, 0, 0, true);
    if (!is_shadow && !is_kept)
        vm_mmu_forget_parked(cpu, to.key);
    else
        vm_mmu_unpark(cpu, to);
}

void vm_mmu_root_changed(x86_cpu *x, unsigned how)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    vm_machine *m = cpu->machine;
    vm_space from = cpu->space;
    const void *root = cpu->mmu_root;
    x->stat[X86_STAT_ROOT_SWITCHES]++;
    if (m->mmu && m->mmu->root_changed)
        m->mmu->root_changed(m->mmu_state, cpu, x->cr3);
    if (m->mmu == &vm_mmu_shadow && vm_shadow_space(m, root).version != from.version)
        from.key = 0;                  /* what the TLB holds is not what the tables say any more */
    if (how & X86_ROOT_LOAD) {
        switch_space(cpu, from, how & X86_ROOT_KEEP);
        return;
    }
    if (how & X86_ROOT_GLOBAL)
        x86_tlb_clear_nonglobal(x);
    else
        x86_tlb_clear(x);
    cpu->space = space_of(cpu);
    flushed(cpu, 0, 0, how & X86_ROOT_GLOBAL);
}

/* Of a PCID that is not the current one "shadow" keeps nothing that it does not compare when the guest loads it; of others'
 * ways nothing is known. */
static void invalidate_elsewhere(vm_vcpu *cpu, unsigned pcid, uint64_t la, uint64_t bytes)
{
    vm_machine *m = cpu->machine;
    if (m->mmu && m->mmu->invalidate && m->mmu != &vm_mmu_shadow)
        m->mmu->invalidate(m->mmu_state, cpu, la, bytes);
    vm_mmu_forget_parked(cpu, 1 + pcid);
}

void vm_mmu_invalidate_pcid(x86_cpu *x, unsigned type, unsigned pcid, uint64_t la)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    bool is_current = pcid == (x->cr4 & X86_CR4_PCIDE ? x->cr3 & 0xfff : 0), is_one = type == X86_INVPCID_ADDRESS;
    if (type == X86_INVPCID_ALL)
        vm_mmu_forget_parked(cpu, 0);
    if ((is_one || type == X86_INVPCID_ONE) && !is_current)
        invalidate_elsewhere(cpu, pcid, is_one ? la : 0, is_one ? 4096 : 0);
    else if (is_one)
        vm_mmu_invalidate(x, la, 4096);
    else
        vm_mmu_root_changed(x, type == X86_INVPCID_ALL_AND_GLOBAL ? 0 : X86_ROOT_GLOBAL);
}

void vm_mmu_invalidate(x86_cpu *x, uint64_t la, uint64_t bytes)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    vm_machine *m = cpu->machine;
    if (m->mmu && m->mmu->invalidate)
        m->mmu->invalidate(m->mmu_state, cpu, la, bytes);
    vm_mmu_drop(cpu, la, bytes);
}

void vm_mmu_drop(vm_vcpu *cpu, uint64_t la, uint64_t bytes)
{
    x86_cpu *x = &cpu->x86;
    if (bytes == 0 || bytes > 64 * 4096) {
        x86_tlb_clear(x);
    } else {
        uint64_t first = la & X86_PAGE_MASK, last = (la + (bytes - 1)) & X86_PAGE_MASK;
        for (uint64_t page = first;; page += 4096) {
            x86_tlb_drop(x, page);
            if (page == last)
                break;
        }
    }
    flushed(cpu, la, bytes > 64 * 4096 ? 0 : bytes, false);
}

bool vm_mmu_protect_page(vm_vcpu *cpu, uint64_t gpa)
{
    return x86_tlb_protect(&cpu->x86, gpa);
}

/* ---- writes that the strategy wants to hear of ---- */

void vm_mmu_table_written(vm_machine *m, vm_vcpu *by, uint64_t gpa)
{
    vm_vcpu *counts = by ? by : m->vcpus[0];
    counts->x86.stat[X86_STAT_TABLE_WRITES]++;
    if (m->mmu && m->mmu->table_written)
        m->mmu->table_written(m->mmu_state, by, gpa);
    else
        vm_page_trap(m, gpa & X86_PAGE_MASK, false);     /* left over */
}

void vm_mmu_map_changed(vm_machine *m)
{
    if (m->mmu == &vm_mmu_shadow)
        m->mmu->invalidate(m->mmu_state, NULL, 0, 0);
}

void vm_mmu_forget(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        if (m->mmu && m->mmu->invalidate)
            m->mmu->invalidate(m->mmu_state, cpu, 0, 0);
        cpu->mmu_root = NULL;
        cpu->space = (vm_space){ 0 };
        x86_tlb_clear(&cpu->x86);
        if (m->backend->tlb_flushed)
            m->backend->tlb_flushed(cpu);
    }
}
