/* hook.c - the registry of hooks: adding, removing, and freeing what nobody can touch any more. See hook.h. */
#include "core/hook.h"

#include <stdlib.h>
#include <string.h>

_Static_assert((int)X86_HOOK_INSN == (int)VM_HOOK_INSN && (int)X86_HOOK_WRITE == (int)VM_HOOK_MEM_WRITE &&
               (int)X86_HOOK_MSR == (int)VM_HOOK_MSR && (int)X86_HOOK_FETCH == (int)VM_HOOK_FETCH &&
               (int)X86_NHOOKS == (int)VM_HOOK_KINDS, "lib/x86 numbers the kinds in the same way");
_Static_assert((int)X86_HOOK_STOP == (int)VM_HOOK_STOP && (int)X86_HOOK_SKIP == (int)VM_HOOK_SKIP, "and the answers");
_Static_assert(X86_EVENT_WRITE == VM_EVENT_WRITE && X86_EVENT_SOFT == VM_EVENT_SOFT &&
               X86_EVENT_ERROR == VM_EVENT_ERROR && X86_EVENT_SYSENTER == VM_EVENT_SYSENTER, "and the flags");

/* ---- looking ---- */

static bool is_data(unsigned kind) { return X86_HOOK_DATA >> kind & 1; }

static bool overlaps(const vm_hook *h, uint64_t at, uint64_t n)
{
    return h->lo <= at + (n - 1) && at <= h->hi;
}

static bool covers(const vm_hook *h, uint64_t at, uint64_t n, uint64_t gpa)
{
    if (!h->is_gpa)
        return overlaps(h, at, n);
    return gpa == UINT64_MAX || overlaps(h, gpa, n);
}

bool vm_hook_covers(const vm_machine *m, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa)
{
    const vm_hook_list *l = m->hooks ? m->hooks->list[kind] : NULL;
    if (!l || (!l->has_gpa && (l->lo > at + (n - 1) || at > l->hi)))
        return false;
    for (unsigned i = 0; i < l->count; i++)
        if (l->hook[i] && covers(l->hook[i], at, n, gpa))
            return true;
    return false;
}

bool vm_hook_is_stop(const vm_machine *m, uint64_t la)
{
    const vm_hook_list *l = m->hooks ? m->hooks->list[0] : NULL;
    for (unsigned i = 0; l && i < l->count; i++)
        if (l->hook[i] && l->hook[i]->cls == VM_HOOKED_STOP && l->hook[i]->lo == la)
            return true;
    return false;
}

static vm_hook *find(const vm_machine *m, vm_hook_class cls, const vm_hook_desc *d)
{
    for (vm_hook *h = m->hooks ? m->hooks->first : NULL; h; h = h->next)
        if (h->cls == cls && h->desc.kind == d->kind && h->lo == d->begin && h->hi == d->end && h->desc.flags == d->flags)
            return h;
    return NULL;
}

/* ---- graves ---- */

/* vCPUs whose instruction under way may still touch what was there. The world is stopped. */
static uint64_t who_is_inside(const vm_machine *m)
{
    uint64_t waits = 0;
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        int state = atomic_load(&m->vcpus[i]->state) & ~VM_WAITED;
        if (state == VM_GUEST || state == VM_BLOCKED)
            waits |= UINT64_C(1) << i;
    }
    return waits;
}

static void bury(vm_machine *m, vm_grave *g)
{
    g->waits = who_is_inside(m);
    g->next = NULL;
    vm_grave **end = &m->hooks->graves;
    while (*end)
        end = &(*end)->next;
    *end = g;
}

static void end_hook(vm_hook *h)
{
    if (h->desc.destroy)
        h->desc.destroy(h->desc.user);
    vm_machine *m = h->machine;
    vm_machine_lock(m);
    h->next = m->hooks->spare;
    m->hooks->spare = h;
    vm_machine_unlock(m);
}

static void end_graves(vm_grave *g)
{
    while (g) {
        vm_grave *next = g->next;
        if (g->is_hook)
            end_hook((vm_hook *)g);
        else
            free(g);
        g = next;
    }
}

/* Takes out the graves that wait for nobody. Under machine->lock; end them without it: `destroy` is the program's. */
static vm_grave *take_graves(vm_machine *m, uint64_t passed)
{
    vm_grave *done = NULL, **end = &done;
    for (vm_grave **link = &m->hooks->graves; *link;) {
        vm_grave *g = *link;
        g->waits &= ~passed;
        if (g->waits) {
            link = &g->next;
            continue;
        }
        *link = g->next;
        g->next = NULL;
        *end = g;
        end = &g->next;
    }
    return done;
}

void vm_hooks_boundary(vm_vcpu *cpu)
{
    vm_machine *m = cpu->machine;
    vm_machine_lock(m);
    vm_grave *done = m->hooks ? take_graves(m, UINT64_C(1) << cpu->index) : NULL;
    vm_machine_unlock(m);
    end_graves(done);
}

/* ---- editing: the world is stopped ---- */

static void hull(vm_hook_list *l)
{
    l->lo = UINT64_MAX;
    l->hi = 0;
    l->has_gpa = false;
    for (unsigned i = 0; i < l->count; i++) {
        const vm_hook *h = l->hook[i];
        if (!h)
            continue;
        l->has_gpa |= h->is_gpa;
        if (h->is_gpa)
            continue;
        l->lo = h->lo < l->lo ? h->lo : l->lo;
        l->hi = h->hi > l->hi ? h->hi : l->hi;
    }
}

/* The kind's list with h at its end, blanks left out. */
static vm_hook_list *list_with(const vm_hook_list *old, vm_hook *h)
{
    unsigned n = old ? old->count : 0;
    vm_hook_list *l = calloc(1, sizeof *l + (n + 1) * sizeof(vm_hook *));
    if (!l)
        return NULL;
    for (unsigned i = 0; i < n; i++)
        if (old->hook[i])
            l->hook[l->count++] = old->hook[i];
    l->hook[l->count++] = h;
    hull(l);
    return l;
}

static bool is_empty(const vm_hook_list *l)
{
    for (unsigned i = 0; l && i < l->count; i++)
        if (l->hook[i])
            return false;
    return true;
}

static unsigned list_of(const vm_hook *h)
{
    return h->cls == VM_HOOKED_BREAK || h->cls == VM_HOOKED_STOP ? 0 : (unsigned)h->desc.kind;
}

/* Pages with a few watched bytes lose their tags; when much is watched, each access asks. */
enum { WATCHED_PAGES = 4096 };

static uint8_t watch_of(const struct vm_hooks *hs)
{
    uint8_t watch = 0;
    for (unsigned kind = 0; kind < VM_HOOK_KINDS; kind++) {
        const vm_hook_list *l = is_data(kind) ? hs->list[kind] : NULL;
        for (unsigned i = 0; l && i < l->count; i++)
            if (l->hook[i])
                watch |= (l->hook[i]->hi - l->hook[i]->lo) >> 12 >= WATCHED_PAGES ? X86_WATCH_ALL : X86_WATCH_PAGES;
    }
    return watch & X86_WATCH_ALL ? X86_WATCH_ALL : watch;
}

static void edited(vm_machine *m, const vm_hook *h)
{
    struct vm_hooks *hs = m->hooks;
    unsigned number = atomic_load(&m->hook_seq) + 1;
    hs->edits[number % VM_HOOK_EDITS] = (vm_hook_edit){ .lo = h->lo, .hi = h->hi, .kind = (uint8_t)list_of(h),
                                                        .is_gpa = h->is_gpa };
    hs->mask = 0;
    for (unsigned kind = 0; kind < VM_HOOK_KINDS; kind++)
        if (!is_empty(hs->list[kind]))
            hs->mask |= X86_HOOK_BIT(kind);
    hs->watch = watch_of(hs);
    atomic_store(&m->hook_seq, number);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        vm_vcpu_notify(m->vcpus[i], X86_ATT_REQUEST);
}

static int prepare(vm_machine *m)
{
    if (m->hooks)
        return VM_OK;
    struct vm_hooks *hs = calloc(1, sizeof *hs);
    if (!hs)
        return vm_fail(VM_E_NOMEM, "no memory for hooks");
    hs->end = &hs->first;
    m->hooks = hs;
    return VM_OK;
}

static int link_hook(vm_machine *m, vm_hook *h)
{
    int status = prepare(m);
    if (status != VM_OK)
        return status;
    struct vm_hooks *hs = m->hooks;
    vm_hook_list **slot = &hs->list[list_of(h)], *l = list_with(*slot, h);
    if (!l)
        return vm_fail(VM_E_NOMEM, "no memory for a hook");
    if (*slot)
        bury(m, &(*slot)->grave);
    *slot = l;
    h->link = hs->end;
    *hs->end = h;
    hs->end = &h->next;
    edited(m, h);
    return VM_OK;
}

static void unlink_hook(vm_machine *m, vm_hook *h)
{
    struct vm_hooks *hs = m->hooks;
    vm_hook_list *l = hs->list[list_of(h)];
    for (unsigned i = 0; i < l->count; i++)
        if (l->hook[i] == h)
            l->hook[i] = NULL;
    hull(l);
    *h->link = h->next;
    if (h->next)
        h->next->link = h->link;
    else
        hs->end = h->link;
    h->link = NULL;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]->hook_stop.hook == h)
            m->vcpus[i]->hook_stop.hook = NULL;
    bury(m, &h->grave);
    edited(m, h);
}

/* ---- the operations ---- */

static bool can_serve(const vm_backend_ops *ops, vm_hook_class cls)
{
    return ops->serves_hooks || (ops->serves_breaks && cls != VM_HOOKED_USER);
}

bool vm_hooks_suit(const vm_machine *m, const vm_backend_ops *ops)
{
    bool suits = true;
    for (const vm_hook *h = m->hooks ? m->hooks->first : NULL; h; h = h->next)
        suits &= can_serve(ops, (vm_hook_class)h->cls);
    return suits;
}

/* A backend that can do it, if need be by moving the machine there. */
static int need_backend(vm_machine *m, vm_hook_class cls, bool may_switch)
{
    if (can_serve(m->backend, cls))
        return VM_OK;
    if (!may_switch)
        return vm_fail(VM_E_UNSUPPORTED, "backend %s serves no hooks", m->backend->name);
    int status = vm_machine_select(m, VM_BACKEND_JIT);
    return status == VM_E_UNSUPPORTED ? vm_machine_select(m, VM_BACKEND_INTERP) : status;
}

static bool is_ranged(vm_hook_kind kind, uint32_t flags)
{
    return !(flags & VM_HOOK_GPA) || is_data(kind) || kind == VM_HOOK_INSN || kind == VM_HOOK_BLOCK ||
           kind == VM_HOOK_EDGE || kind == VM_HOOK_FETCH;
}

/* The world is stopped. */
static vm_hook *new_hook(vm_machine *m, const vm_hook_desc *d, vm_hook_class cls)
{
    vm_hook *h = m->hooks ? m->hooks->spare : NULL;
    if (h)
        m->hooks->spare = h->next;
    else if (!(h = malloc(sizeof *h)))
        return NULL;
    memset(h, 0, sizeof *h);
    bool is_all = !d->begin && !d->end && !(d->flags & VM_HOOK_EXACT);
    h->grave.is_hook = true;
    h->machine = m;
    h->desc = *d;
    h->cls = (uint8_t)cls;
    h->is_gpa = (d->flags & VM_HOOK_GPA) && !is_all;
    h->lo = d->begin;
    h->hi = is_all ? UINT64_MAX : d->end;
    h->count = 1;
    return h;
}

static int add_paused(vm_machine *m, const vm_hook_desc *d, vm_hook_class cls, vm_hook **out)
{
    vm_hook *h = new_hook(m, d, cls);
    int status = h ? link_hook(m, h) : vm_fail(VM_E_NOMEM, "no memory for a hook");
    if (status != VM_OK)
        free(h);
    else if (out)
        *out = h;
    return status;
}

int vm_hook_insert(vm_machine *m, const vm_hook_desc *d, vm_hook_class cls, vm_hook **out)
{
    if (!is_ranged(d->kind, d->flags))
        return vm_fail(VM_E_INVALID, "vm_hook_add: kind %d has no guest-physical range", (int)d->kind);
    int status = need_backend(m, cls, d->flags & VM_HOOK_SWITCH);
    if (status != VM_OK)
        return status;
    vm_pause(m);
    status = can_serve(m->backend, cls) ? add_paused(m, d, cls, out) : vm_fail(VM_E_BUSY, "the backend is being changed");
    vm_grave *done = m->hooks ? take_graves(m, 0) : NULL;
    vm_resume(m);
    end_graves(done);
    return status;
}

/* Under pause; what can be ended at once is left in *done. */
static void delete_paused(vm_machine *m, vm_hook *h, vm_grave **done)
{
    unlink_hook(m, h);
    *done = take_graves(m, 0);
}

int vm_hook_delete(vm_machine *m, vm_hook *hook)
{
    vm_grave *done = NULL;
    vm_pause(m);
    vm_hook *h = m->hooks ? m->hooks->first : NULL;
    while (h && (h != hook || h->cls != VM_HOOKED_USER))
        h = h->next;
    if (h)
        delete_paused(m, h, &done);
    vm_resume(m);
    end_graves(done);
    return h ? VM_OK : vm_fail(VM_E_NOTFOUND, "vm_hook_remove: no such hook in this machine");
}

static int toggle(vm_machine *m, vm_hook_class cls, const vm_hook_desc *d, bool on, const char *what)
{
    vm_grave *done = NULL;
    int status = on ? need_backend(m, cls, false) : VM_OK;
    if (status != VM_OK)
        return status;
    vm_pause(m);
    vm_hook *h = find(m, cls, d);
    if (on && h) {
        status = vm_fail(VM_E_EXISTS, "%s at 0x%llx is set already", what, (unsigned long long)d->begin);
    } else if (!on && !h) {
        status = vm_fail(VM_E_NOTFOUND, "%s at 0x%llx is not set", what, (unsigned long long)d->begin);
    } else if (!on) {
        delete_paused(m, h, &done);
    } else {
        status = add_paused(m, d, cls, NULL);
    }
    vm_resume(m);
    end_graves(done);
    return status;
}

int vm_hook_breakpoint(vm_machine *m, uint64_t gva, bool on)
{
    vm_hook_desc d = { .kind = VM_HOOK_INSN, .begin = gva, .end = gva, .flags = VM_HOOK_EXACT };
    return toggle(m, VM_HOOKED_BREAK, &d, on, "breakpoint");
}

/* R and W together are two hooks, marked, so that they are not taken for a watchpoint on one of them. */
#define BOTH 0x80000000u
int vm_hook_watchpoint(vm_machine *m, uint64_t gva, uint64_t bytes, vm_prot access, bool on)
{
    const bool is_both = access == VM_PROT_RW;
    vm_hook_desc d = { .kind = access & VM_PROT_R ? VM_HOOK_MEM_READ : VM_HOOK_MEM_WRITE, .begin = gva,
                       .end = gva + (bytes - 1), .flags = VM_HOOK_EXACT | (is_both ? BOTH : 0) };
    int status = toggle(m, VM_HOOKED_WATCH, &d, on, "watchpoint");
    if (status != VM_OK || !is_both)
        return status;
    d.kind = VM_HOOK_MEM_WRITE;
    status = toggle(m, VM_HOOKED_WATCH, &d, on, "watchpoint");
    if (status != VM_OK && on) {
        d.kind = VM_HOOK_MEM_READ;
        toggle(m, VM_HOOKED_WATCH, &d, false, "watchpoint");
    }
    return status;
}

int vm_stop_add(vm_machine *m, uint64_t la)
{
    vm_hook_desc d = { .kind = VM_HOOK_INSN, .begin = la, .end = la, .flags = VM_HOOK_EXACT };
    int status = need_backend(m, VM_HOOKED_STOP, false);
    if (status != VM_OK)
        return status;
    vm_pause(m);
    vm_hook *h = find(m, VM_HOOKED_STOP, &d);
    if (h)
        h->count++;
    else
        status = add_paused(m, &d, VM_HOOKED_STOP, NULL);
    vm_resume(m);
    return status;
}

void vm_stop_drop(vm_machine *m, uint64_t la)
{
    vm_hook_desc d = { .kind = VM_HOOK_INSN, .begin = la, .end = la, .flags = VM_HOOK_EXACT };
    vm_grave *done = NULL;
    vm_pause(m);
    vm_hook *h = find(m, VM_HOOKED_STOP, &d);
    if (h && --h->count == 0)
        delete_paused(m, h, &done);
    vm_resume(m);
    end_graves(done);
}

void vm_hooks_free(vm_machine *m)
{
    struct vm_hooks *hs = m->hooks;
    if (!hs)
        return;
    end_graves(hs->graves);
    hs->graves = NULL;
    while (hs->first) {
        vm_hook *h = hs->first;
        hs->first = h->next;
        end_hook(h);
    }
    for (vm_hook *h = hs->spare, *next; h; h = next) {
        next = h->next;
        free(h);
    }
    for (unsigned kind = 0; kind < VM_HOOK_KINDS; kind++)
        free(hs->list[kind]);
    free(hs);
    m->hooks = NULL;
}
