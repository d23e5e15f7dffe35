/* ept.c - strategy "ept": the guest's own walk, and below it a second level that the host program owns.
 *
 * A view is a radix tree over guest-physical addresses. Tables have 512 entries; an entry at level 2 covers 1 GiB, at 1
 * 2 MiB, at 0 4 KiB. An entry is 0 (not touched yet: everything allowed), a leaf, or leads to a table. Leaves hold
 * permissions, accessed and dirty bits; they are made when memory is touched, as large as the view has them.
 *
 * Permissions reach the guest in three places: a miss of the inline TLB gets no more than the view allows; env->page,
 * through which everything without a tag goes, shows them as the page's; and env->phys_* asks vm_ept_check() before it
 * makes an access, which is where violations are reported, with width and value. Writes get no tag until the dirty bit is
 * set, as in the guest's own tables.
 *
 * Readers (fills, on vCPUs' threads) take no lock: they set bits and fill empty entries by compare-and-exchange. Editing
 * stops the world, and flushes the inline TLBs of who looks through the view.
 */
#include "mmu/ept.h"

#include <stdlib.h>
#include <string.h>

#define PRESENT 8u
#define TABLE 16u
#define ACCESSED 32u
#define DIRTY 64u
#define LEVELS 4                       /* 48 bits */
#define SHIFT(level) (12 + 9 * (level))
#define BYTES(level) (UINT64_C(1) << SHIFT(level))

typedef struct table { _Atomic uint64_t e[512]; } table;
struct vm_ept_view {
    table root;                        /* level 3 */
    unsigned top;                      /* the largest leaves: level 0, 1, 2 */
    bool is_whole, forbids_exec;       /* nothing is forbidden anywhere; fetches are or were somewhere */
};

typedef struct ept {
    vm_machine *m;
    vm_ept_view *views[VM_EPT_MAX_VIEWS];
    vm_ept_fn fn;
    void *user;
} ept;

/* ---- tables ---- */

static table *table_of(uint64_t e)
{
    return (table *)(uintptr_t)(e & X86_PAGE_MASK);
}

static table *new_table(void)
{
    table *t = aligned_alloc(4096, sizeof *t);
    if (t)
        memset(t, 0, sizeof *t);
    return t;
}

static void free_entry(uint64_t e)
{
    if (!(e & TABLE))
        return;
    for (unsigned i = 0; i < 512; i++)
        free_entry(table_of(e)->e[i]);
    free(table_of(e));
}

static void free_view(vm_ept_view *v)
{
    for (unsigned i = 0; v && i < 512; i++)
        free_entry(v->root.e[i]);
    free(v);
}

static unsigned index_of(uint64_t gpa, unsigned level)
{
    return gpa >> SHIFT(level) & 511;
}

/* The entry that covers gpa, 0 included, and its level. */
static _Atomic uint64_t *find_entry(const vm_ept_view *v, uint64_t gpa, unsigned *level)
{
    const table *t = &v->root;
    for (unsigned l = LEVELS - 1;; l--) {
        const _Atomic uint64_t *e = &t->e[index_of(gpa, l)];
        uint64_t now = atomic_load_explicit(e, memory_order_acquire);
        if (!(now & TABLE)) {
            *level = l;
            return (_Atomic uint64_t *)(uintptr_t)e;
        }
        t = table_of(now);
    }
}

/* The leaf that covers gpa, made if need be. NULL: no memory. */
static _Atomic uint64_t *touch_entry(vm_ept_view *v, uint64_t gpa, unsigned *level)
{
    for (;;) {
        _Atomic uint64_t *e = find_entry(v, gpa, level);
        uint64_t now = atomic_load(e);
        if (now & TABLE)
            continue;                  /* another vCPU was quicker */
        if (now)
            return e;
        if (*level <= v->top) {
            atomic_compare_exchange_strong(e, &now, PRESENT | VM_PROT_RWX);
        } else {
            table *t = new_table();
            if (!t)
                return NULL;
            if (!atomic_compare_exchange_strong(e, &now, (uintptr_t)t | TABLE))
                free(t);
        }
    }
}

/* World stopped: the entry becomes a table of what it was. */
static bool split(_Atomic uint64_t *e)
{
    table *t = new_table();
    uint64_t now = *e;
    if (!t)
        return false;
    for (unsigned i = 0; i < 512; i++)
        t->e[i] = now;
    *e = (uintptr_t)t | TABLE;
    return true;
}

/* A table whose entries are all the same leaf becomes that leaf again. */
static void join(const vm_ept_view *v, _Atomic uint64_t *e, unsigned level)
{
    const uint64_t bits = ACCESSED | DIRTY;
    table *t = table_of(*e);
    uint64_t sum = t->e[0];
    if (level > v->top || !(*e & TABLE))
        return;
    for (unsigned i = 0; i < 512; i++) {
        if ((t->e[i] & TABLE) || (t->e[i] & ~bits) != (t->e[0] & ~bits))
            return;
        sum |= t->e[i];
    }
    free(t);
    *e = sum;
}

/* Permissions of [gpa, last] within the table, whose first address is `base`. */
static bool protect_range(const vm_ept_view *v, table *t, unsigned level, uint64_t base, uint64_t gpa, uint64_t last, unsigned prot)
{
    for (unsigned i = index_of(gpa > base ? gpa : base, level); i < 512; i++) {
        uint64_t begin = base + ((uint64_t)i << SHIFT(level)), end = begin + (BYTES(level) - 1);
        _Atomic uint64_t *e = &t->e[i];
        if (begin > last)
            break;
        bool is_whole = gpa <= begin && end <= last;
        if (is_whole && level <= v->top) {
            uint64_t bits = *e & TABLE ? 0 : *e & (ACCESSED | DIRTY);
            free_entry(*e);
            *e = PRESENT | prot | bits;
            continue;
        }
        if (!*e && level > v->top) {   /* too large for a leaf: a table of untouched ones */
            table *new = new_table();
            if (!new)
                return false;
            *e = (uintptr_t)new | TABLE;
        } else if (!(*e & TABLE)) {
            if (!*e)
                *e = PRESENT | VM_PROT_RWX;
            if (!split(e))
                return false;
        }
        if (!protect_range(v, table_of(*e), level - 1, begin, gpa, last, prot))
            return false;
        join(v, e, level);
    }
    return true;
}

/* ---- what fills and accesses see ---- */

static unsigned prot_at(const vm_ept_view *v, uint64_t gpa)
{
    unsigned level;
    uint64_t e = atomic_load_explicit(find_entry(v, gpa, &level), memory_order_relaxed);
    return e ? e & VM_PROT_RWX : VM_PROT_RWX;
}

unsigned vm_ept_prot(const vm_vcpu *cpu, uint64_t gpa)
{
    return cpu->ept_view->is_whole ? VM_PROT_RWX : prot_at(cpu->ept_view, gpa);
}

unsigned vm_ept_machine_prot(const vm_machine *m, uint64_t gpa)
{
    const vm_vcpu *cpu = m->vcpus && m->vcpu_count ? m->vcpus[0] : NULL;
    return m->mmu == &vm_mmu_ept && cpu && cpu->ept_view ? vm_ept_prot(cpu, gpa) : VM_PROT_RWX;
}

/* touch_entry() for a fill: the leaf that the vCPU met last is remembered, which spares it the way down. */
static _Atomic uint64_t *fill_entry(vm_vcpu *cpu, uint64_t gpa, uint64_t *page_bytes)
{
    unsigned level;
    cpu->x86.stat[X86_STAT_WALK_REFS]++;
    if (gpa - cpu->ept_leaf.gpa >= cpu->ept_leaf.bytes) {
        _Atomic uint64_t *e = touch_entry(cpu->ept_view, gpa, &level);
        if (!e)
            return NULL;
        cpu->ept_leaf.gpa = gpa & ~(BYTES(level) - 1);
        cpu->ept_leaf.bytes = BYTES(level);
        cpu->ept_leaf.entry = e;
        cpu->x86.stat[X86_STAT_WALK_REFS] += LEVELS - 1 - level;
    }
    *page_bytes = cpu->ept_leaf.bytes;
    return cpu->ept_leaf.entry;
}

bool vm_ept_translate(vm_vcpu *cpu, uint64_t la, unsigned access, unsigned ctx, x86_walk *w)
{
    uint64_t page_bytes;
    if (!vm_mmu_walk_ctx(cpu, la, access, ctx, w))
        return false;
    _Atomic uint64_t *e = fill_entry(cpu, w->gpa, &page_bytes);
    if (!e) {                          /* no memory for bits; absent entries allow everything */
        w->prot &= prot_at(cpu->ept_view, w->gpa);
        return true;
    }
    uint64_t now = atomic_load_explicit(e, memory_order_relaxed);
    uint64_t bits = ACCESSED | ((access & X86_WRITE) && (now & X86_WRITE) ? DIRTY : 0);
    if (!(now & access))
        bits = 0;                      /* nothing is accessed */
    if ((now & bits) != bits)
        now = atomic_fetch_or(e, bits) | bits;
    w->prot &= now & VM_PROT_RWX & ~(now & DIRTY ? 0 : (unsigned)X86_WRITE);
    if (page_bytes < w->page_bytes)
        w->page_bytes = page_bytes;
    return true;
}

/* ---- violations ---- */

/* The access goes through, beside the inline TLB. */
static void note_access(vm_vcpu *cpu, uint64_t gpa, unsigned access)
{
    unsigned level;
    _Atomic uint64_t *e = cpu->ept_view ? touch_entry(cpu->ept_view, gpa, &level) : NULL;
    if (e)
        atomic_fetch_or(e, ACCESSED | (access & X86_WRITE ? DIRTY : 0));
}

/* STEP was said of this page for the instruction under way. */
static bool is_stepping(vm_vcpu *cpu, uint64_t gpa)
{
    return cpu->ept_step.is_set && cpu->ept_step.page == gpa >> 12 && cpu->ept_step.rip == cpu->x86.rip &&
           cpu->ept_step.retired == vm_vcpu_retired_now(cpu);
}

static vm_ept_action ask(vm_vcpu *cpu, vm_ept_violation *v)
{
    const ept *s = cpu->machine->mmu_state;
    cpu->x86.stat[X86_STAT_VIOLATIONS]++;
    if (vm_trace_mask(cpu->machine) & VM_TRACE_MMU)
        vm_trace_line(cpu->machine, VM_TRACE_MMU, "cpu%u violation view %u gpa 0x%llx gva 0x%llx access %u allowed %u", cpu->index,
                      v->view, (unsigned long long)v->gpa, (unsigned long long)v->gva, (unsigned)v->access, (unsigned)v->allowed);
    return s->fn ? s->fn(s->user, cpu, v) : VM_EPT_STOP;
}

int vm_ept_check(vm_vcpu *cpu, uint64_t gpa, uint64_t gva, unsigned n, unsigned access, uint64_t *value)
{
    unsigned allowed = vm_ept_prot(cpu, gpa);
    if ((allowed & access) || is_stepping(cpu, gpa))
        return VM_EPT_GO;
    vm_ept_violation v = { .size = sizeof v, .view = cpu->ept_index, .gpa = gpa, .gva = gva, .access = (vm_prot)access,
                           .allowed = (vm_prot)allowed, .width = (uint8_t)n, .value = access == X86_WRITE ? *value : 0 };
    switch (ask(cpu, &v)) {
    case VM_EPT_RETRY:
        if (!cpu->ept_view || (vm_ept_prot(cpu, gpa) & access)) {
            note_access(cpu, gpa, access);
            return VM_EPT_GO;
        }
        break;
    case VM_EPT_EMULATE:
        *value = v.value;
        return VM_EPT_DONE;
    case VM_EPT_STEP:
        cpu->ept_step.is_set = cpu->machine->options.backend != VM_BACKEND_KVM;      /* there no instruction is known from the next */
        cpu->ept_step.page = gpa >> 12;
        cpu->ept_step.rip = cpu->x86.rip;
        cpu->ept_step.retired = vm_vcpu_retired_now(cpu);
        note_access(cpu, gpa, access);
        return VM_EPT_GO;
    default:
        break;
    }
    cpu->ept_stopped = true;
    return VM_EPT_EXIT;
}

/* ---- the vtable ---- */

/* The vCPU's view is another one, or has changed. */
static void look_at_view(vm_vcpu *cpu)
{
    cpu->ept_leaf.bytes = 0;
    cpu->x86.exec_varies = cpu->ept_view->forbids_exec;
}

static void enter_view(ept *s, vm_vcpu *cpu, unsigned index)
{
    cpu->ept_index = index;
    cpu->ept_view = s->views[index];
    look_at_view(cpu);
    cpu->ept_step.is_set = false;
}

static vm_ept_view *new_view(uint64_t page_bytes)
{
    vm_ept_view *v = aligned_alloc(4096, (sizeof *v + 4095) & ~(size_t)4095);
    if (!v)
        return NULL;
    memset(v, 0, sizeof *v);
    v->top = page_bytes == 4096 ? 0 : page_bytes == BYTES(1) ? 1 : 2;
    v->is_whole = true;
    return v;
}

static int ept_create(vm_machine *m, void **state)
{
    ept *s = calloc(1, sizeof *s);
    if (s)
        s->views[0] = new_view(0);
    if (!s || !s->views[0]) {
        free(s);
        return vm_fail(VM_E_NOMEM, "no memory for the ept strategy");
    }
    s->m = m;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus && m->vcpus[i])
            enter_view(s, m->vcpus[i], 0);
    *state = s;
    return VM_OK;
}

static void ept_destroy(void *state)
{
    ept *s = state;
    for (unsigned i = 0; i < s->m->vcpu_count; i++) {
        vm_vcpu *cpu = s->m->vcpus ? s->m->vcpus[i] : NULL;
        /* Chosen again, a new state has been entered before the old one goes. */
        if (cpu && cpu->ept_view == s->views[cpu->ept_index])
            cpu->ept_view = NULL, cpu->x86.exec_varies = false;
    }
    for (unsigned i = 0; i < VM_EPT_MAX_VIEWS; i++)
        free_view(s->views[i]);
    free(s);
}

static int ept_ask(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    x86_walk w;
    bool ok = vm_ept_translate(cpu, gva, access, cpu->walk_ctx, &w);
    vm_mmu_to_result(&w, ok, out);
    return ok ? VM_OK : VM_E_FAULT;
}

const vm_mmu_ops vm_mmu_ept = { .size = sizeof(vm_mmu_ops), .name = "ept", .create = ept_create, .destroy = ept_destroy,
                                .translate = ept_ask };

/* ---- the public interface ---- */

static int state_of(const vm_machine *m, const char *function, ept **s)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    if (m->mmu != &vm_mmu_ept)
        return vm_fail(VM_E_UNSUPPORTED, "%s: the machine's strategy is \"%s\", not \"ept\"", function, m->mmu ? m->mmu->name : "none");
    *s = m->mmu_state;
    return VM_OK;
}

static int find_view(const ept *s, const char *function, unsigned view)
{
    if (view >= VM_EPT_MAX_VIEWS || !s->views[view])
        return vm_fail(VM_E_NOTFOUND, "%s: no view %u", function, view);
    return VM_OK;
}

static int check_pages(const vm_machine *m, const char *function, uint64_t gpa, uint64_t bytes)
{
    uint64_t mask = m->vcpus[0]->x86.phys_mask;
    if (!bytes || gpa % 4096 || bytes % 4096)
        return vm_fail(VM_E_INVALID, "%s: 0x%llx + 0x%llx is not made of whole 4 KiB pages", function, (unsigned long long)gpa,
                       (unsigned long long)bytes);
    if (gpa > mask || bytes - 1 > mask - gpa)
        return vm_fail(VM_E_INVALID, "%s: 0x%llx + 0x%llx runs past the physical addresses' end", function,
                       (unsigned long long)gpa, (unsigned long long)bytes);
    return VM_OK;
}

static bool copy_entry(_Atomic uint64_t *to, uint64_t from)
{
    if (!(from & TABLE)) {
        *to = from & ~(uint64_t)(ACCESSED | DIRTY);
        return true;
    }
    table *t = new_table();
    if (!t)
        return false;
    *to = (uintptr_t)t | TABLE;
    for (unsigned i = 0; i < 512; i++)
        if (!copy_entry(&t->e[i], table_of(from)->e[i]))
            return false;
    return true;
}

/* Leaves of a copy that are too large for its view. */
static bool cut_leaves(const vm_ept_view *v, table *t, unsigned level)
{
    for (unsigned i = 0; level && i < 512; i++) {
        if (t->e[i] && !(t->e[i] & TABLE) && level > v->top && !split(&t->e[i]))
            return false;
        if ((t->e[i] & TABLE) && !cut_leaves(v, table_of(t->e[i]), level - 1))
            return false;
    }
    return true;
}

static vm_ept_view *copy_view(const vm_ept_view *from, uint64_t page_bytes)
{
    vm_ept_view *v = new_view(page_bytes);
    if (!v || !from)
        return v;
    v->is_whole = from->is_whole;
    v->forbids_exec = from->forbids_exec;
    for (unsigned i = 0; i < 512; i++)
        if (!copy_entry(&v->root.e[i], from->root.e[i]))
            goto failed;
    if (cut_leaves(v, &v->root, LEVELS - 1))
        return v;
failed:
    free_view(v);
    return NULL;
}

VM_API int vm_ept_create(vm_machine *m, unsigned from, uint64_t page_bytes, unsigned *view)
{
    ept *s;
    int status = state_of(m, "vm_ept_create", &s);
    if (status != VM_OK)
        return status;
    if (!view || (page_bytes && page_bytes != BYTES(0) && page_bytes != BYTES(1) && page_bytes != BYTES(2)))
        return vm_fail(VM_E_INVALID, "vm_ept_create: view is NULL, or 0x%llx is not 4 KiB, 2 MiB or 1 GiB", (unsigned long long)page_bytes);
    if (from != VM_EPT_NONE && (status = find_view(s, "vm_ept_create", from)) != VM_OK)
        return status;
    vm_pause(m);
    unsigned i = 0;
    while (i < VM_EPT_MAX_VIEWS && s->views[i])
        i++;
    vm_ept_view *v = i == VM_EPT_MAX_VIEWS ? NULL : copy_view(from == VM_EPT_NONE ? NULL : s->views[from], page_bytes);
    if (v) {
        s->views[i] = v;
        *view = i;
    }
    vm_resume(m);
    return v ? VM_OK : vm_fail(VM_E_NOMEM, "vm_ept_create: no memory for view %u of at most %u", i, VM_EPT_MAX_VIEWS);
}

VM_API int vm_ept_destroy(vm_machine *m, unsigned view)
{
    ept *s;
    int status = state_of(m, "vm_ept_destroy", &s);
    if (status == VM_OK)
        status = find_view(s, "vm_ept_destroy", view);
    if (status != VM_OK)
        return status;
    if (!view)
        return vm_fail(VM_E_INVALID, "vm_ept_destroy: view 0 is always there");
    vm_pause(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]->ept_index == view)
            status = vm_fail(VM_E_BUSY, "vm_ept_destroy: vCPU %u looks through view %u", i, view);
    if (status == VM_OK) {
        free_view(s->views[view]);
        s->views[view] = NULL;
    }
    vm_resume(m);
    return status;
}

/* KVM keeps what memory slots can keep. */
static int check_backend(const vm_machine *m, vm_prot prot)
{
    if (m->options.backend != VM_BACKEND_KVM || prot == VM_PROT_RWX || prot == VM_PROT_RX || prot == VM_PROT_NONE)
        return VM_OK;
    return vm_fail(VM_E_UNSUPPORTED, "vm_ept_protect: KVM's memory slots can be RWX, RX or nothing, not %u", (unsigned)prot);
}

VM_API int vm_ept_protect(vm_machine *m, unsigned view, uint64_t gpa, uint64_t bytes, vm_prot prot)
{
    ept *s;
    int status = state_of(m, "vm_ept_protect", &s);
    if (status == VM_OK)
        status = find_view(s, "vm_ept_protect", view);
    if (status == VM_OK)
        status = check_pages(m, "vm_ept_protect", gpa, bytes);
    if (status == VM_OK && ((unsigned)prot & ~(unsigned)VM_PROT_RWX))
        status = vm_fail(VM_E_INVALID, "vm_ept_protect: unknown permission bits 0x%x", (unsigned)prot);
    if (status == VM_OK)
        status = check_backend(m, prot);
    if (status != VM_OK)
        return status;
    vm_pause(m);
    vm_ept_view *v = s->views[view];
    bool is_first = !v->forbids_exec && !(prot & VM_PROT_X), is_seen = false;
    v->is_whole &= prot == VM_PROT_RWX;
    v->forbids_exec |= is_first;
    if (!protect_range(v, &v->root, LEVELS - 1, 0, gpa, gpa + (bytes - 1), (unsigned)prot))
        status = vm_fail(VM_E_NOMEM, "vm_ept_protect: no memory for tables");
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]->ept_index == view) {
            look_at_view(m->vcpus[i]);
            is_seen = true;
        }
    if (is_seen && is_first)
        vm_memory_view_changed(m, 0, m->vcpus[0]->x86.phys_mask + 1);      /* code is linked and joined across pages so far */
    else if (is_seen)
        vm_memory_view_changed(m, gpa, bytes);
    vm_resume(m);
    return status;
}

VM_API int vm_ept_select(vm_vcpu *cpu, unsigned view)
{
    ept *s;
    if (!cpu)
        return vm_fail(VM_E_INVALID, "vm_ept_select: cpu is NULL");
    vm_machine *m = cpu->machine;
    int status = state_of(m, "vm_ept_select", &s);
    if (status == VM_OK)
        status = find_view(s, "vm_ept_select", view);
    if (status == VM_OK && vm_vcpu_is_running(cpu) && !vm_vcpu_is_mine(cpu))
        status = vm_fail(VM_E_BUSY, "vm_ept_select: vCPU %u is running", cpu->index);
    if (status == VM_OK && m->options.backend == VM_BACKEND_KVM && m->vcpu_count > 1)
        status = vm_fail(VM_E_UNSUPPORTED, "vm_ept_select: KVM's memory slots are the same for all vCPUs");
    if (status != VM_OK || view == cpu->ept_index)
        return status;
    vm_pause(m);
    bool is_linked = !cpu->x86.exec_varies || !(cpu->x86.cr0 & X86_CR0_PG);
    enter_view(s, cpu, view);
    if (m->options.backend == VM_BACKEND_KVM)
        vm_memory_view_changed(m, 0, 0);
    x86_tlb_clear(&cpu->x86);
    if (cpu->x86.exec_varies && is_linked && m->backend->flush_code)
        m->backend->flush_code(cpu);   /* blocks may be linked, or go, across pages */
    if (m->backend->tlb_flushed)
        m->backend->tlb_flushed(cpu);
    vm_resume(m);
    vm_vcpu_look_again(cpu);
    return VM_OK;
}

VM_API unsigned vm_ept_current(const vm_vcpu *cpu)
{
    return cpu ? cpu->ept_index : 0;
}

VM_API int vm_ept_get(vm_machine *m, unsigned view, uint64_t gpa, vm_ept_entry *entry)
{
    ept *s;
    unsigned level;
    int status = state_of(m, "vm_ept_get", &s);
    if (status == VM_OK)
        status = find_view(s, "vm_ept_get", view);
    if (status == VM_OK && (!entry || entry->size < sizeof *entry))
        status = vm_fail(VM_E_INVALID, "vm_ept_get: entry is NULL or its size is not set");
    if (status == VM_OK && gpa > m->vcpus[0]->x86.phys_mask)
        status = vm_fail(VM_E_INVALID, "vm_ept_get: 0x%llx is past the physical addresses' end", (unsigned long long)gpa);
    if (status != VM_OK)
        return status;
    vm_machine_lock(m);
    uint64_t e = *find_entry(s->views[view], gpa, &level);
    entry->prot = e ? (vm_prot)(e & VM_PROT_RWX) : VM_PROT_RWX;
    entry->accessed = e & ACCESSED;
    entry->dirty = e & DIRTY;
    entry->page_bytes = BYTES(e || level < s->views[view]->top ? level : s->views[view]->top);
    vm_machine_unlock(m);
    return VM_OK;
}

static void set_bits(uint64_t *bitmap, uint64_t first, uint64_t count)
{
    for (uint64_t i = first; bitmap && i < first + count; i++)
        bitmap[i / 64] |= UINT64_C(1) << i % 64;
}

VM_API int vm_ept_fetch(vm_machine *m, unsigned view, uint64_t gpa, uint64_t bytes, uint64_t *accessed, uint64_t *dirty)
{
    ept *s;
    int status = state_of(m, "vm_ept_fetch", &s);
    if (status == VM_OK)
        status = find_view(s, "vm_ept_fetch", view);
    if (status == VM_OK)
        status = check_pages(m, "vm_ept_fetch", gpa, bytes);
    if (status == VM_OK && m->options.backend == VM_BACKEND_KVM)
        status = vm_fail(VM_E_UNSUPPORTED, "vm_ept_fetch: KVM does not show accessed bits (vm_dirty_log shows writes)");
    if (status != VM_OK)
        return status;
    for (int i = 0; i < 2; i++)
        if (i ? dirty != NULL : accessed != NULL)
            memset(i ? dirty : accessed, 0, (bytes / 4096 + 63) / 64 * 8);
    vm_pause(m);
    bool any = false;
    for (uint64_t at = gpa, left = bytes, n; left; at += n, left -= n) {
        unsigned level;
        _Atomic uint64_t *e = find_entry(s->views[view], at, &level);
        n = BYTES(level) - (at & (BYTES(level) - 1));
        if (n > left)
            n = left;
        uint64_t clear = (accessed ? *e & ACCESSED : 0) | (dirty ? *e & DIRTY : 0);
        if (!clear)
            continue;
        any = true;
        set_bits(clear & ACCESSED ? accessed : NULL, (at - gpa) / 4096, n / 4096);
        set_bits(clear & DIRTY ? dirty : NULL, (at - gpa) / 4096, n / 4096);
        *e &= ~clear;
    }
    for (unsigned i = 0; any && i < m->vcpu_count; i++)
        if (m->vcpus[i]->ept_index == view) {
            x86_tlb_clear(&m->vcpus[i]->x86);
            if (m->backend->tlb_flushed)
                m->backend->tlb_flushed(m->vcpus[i]);
        }
    vm_resume(m);
    return VM_OK;
}

VM_API int vm_ept_on_violation(vm_machine *m, vm_ept_fn fn, void *user)
{
    ept *s;
    int status = state_of(m, "vm_ept_on_violation", &s);
    for (unsigned i = 0; status == VM_OK && i < m->vcpu_count; i++)
        if (vm_vcpu_is_running(m->vcpus[i]) && !vm_vcpu_is_mine(m->vcpus[i]))
            status = vm_fail(VM_E_BUSY, "vm_ept_on_violation: vCPU %u is running", i);
    if (status == VM_OK) {
        s->fn = fn;
        s->user = user;
    }
    return status;
}
