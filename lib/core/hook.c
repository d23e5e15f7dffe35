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

static unsigned list_of(const vm_hook *h)
{
    return h->cls == VM_HOOKED_BREAK || h->cls == VM_HOOKED_STOP ? 0 : (unsigned)h->desc.kind;
}

static bool overlaps(const vm_hook *h, uint64_t at, uint64_t n)
{
    return h->lo <= at + (n - 1) && at <= h->hi;
}

bool vm_hook_is_at(const vm_hook *h, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa)
{
    return list_of(h) == kind && overlaps(h, h->is_gpa ? gpa : at, n);
}

static bool is_narrow(const vm_hook *h) { return h->lo / VM_HOOK_LINE == h->hi / VM_HOOK_LINE; }

static vm_hook **line_at(const struct vm_hooks *hs, unsigned kind, bool is_gpa, uint64_t line)
{
    uint64_t key = (line * 2 + is_gpa) * VM_HOOK_KINDS + kind;
    return &hs->lines[key * UINT64_C(0x9e3779b97f4a7c15) >> 32 & (hs->slots - 1)];
}

static vm_hook **name_at(const struct vm_hooks *hs, const vm_hook *h)
{
    return &hs->names[(uint64_t)(uintptr_t)h * UINT64_C(0x9e3779b97f4a7c15) >> 32 & (hs->slots - 1)];
}

/* Hooks found so far, by their number. */
typedef struct finds { vm_hook **hits; unsigned max, count; } finds;

static void keep(finds *f, vm_hook *h)
{
    unsigned i = f->count++;
    if (f->count > f->max)
        return;
    for (; i && f->hits[i - 1]->number > h->number; i--)
        f->hits[i] = f->hits[i - 1];
    f->hits[i] = h;
}

/* Narrow ones of one sort; [at, at + n) in their sort of addresses. */
static void find_narrow(const struct vm_hooks *hs, unsigned kind, bool is_gpa, uint64_t at, uint64_t n, finds *f)
{
    uint64_t lines = (at % VM_HOOK_LINE + n - 1) / VM_HOOK_LINE + 1;
    for (uint64_t i = 0; i < lines; i++)
        for (vm_hook *h = *line_at(hs, kind, is_gpa, at / VM_HOOK_LINE + i); h; h = h->line_next)
            if (h->is_gpa == is_gpa && h->lo / VM_HOOK_LINE == at / VM_HOOK_LINE + i && vm_hook_is_at(h, kind, at, n, at))
                keep(f, h);
}

unsigned vm_hooks_at(const vm_machine *m, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa, vm_hook **hits, unsigned max)
{
    const struct vm_hooks *hs = m->hooks;
    const vm_hook_list *l = hs ? &hs->list[kind] : NULL;
    finds f = { hits, max, 0 };
    if (!l || !l->count || (!l->gpa_count && (l->lo > at + (n - 1) || at > l->hi)))
        return 0;
    for (unsigned i = 0; i < l->wide_count; i++)
        if (vm_hook_is_at(l->wide[i], kind, at, n, gpa))
            keep(&f, l->wide[i]);
    if (l->wide_count == l->count)
        return f.count;
    find_narrow(hs, kind, false, at, n, &f);
    if (l->gpa_count && gpa != UINT64_MAX)
        find_narrow(hs, kind, true, gpa, n, &f);
    return f.count;
}

bool vm_hook_covers(const vm_machine *m, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa)
{
    return vm_hooks_at(m, kind, at, n, gpa, NULL, 0) != 0;
}

bool vm_hook_is_stop(const vm_machine *m, uint64_t la)
{
    vm_hook *hits[2];                  /* a stop and a breakpoint, at most */
    unsigned n = vm_hooks_at(m, 0, la, 1, UINT64_MAX, hits, 2);
    return n && (hits[0]->cls == VM_HOOKED_STOP || (n > 1 && hits[1]->cls == VM_HOOKED_STOP));
}

static bool is_same(const vm_hook *h, vm_hook_class cls, const vm_hook_desc *d)
{
    return h->cls == cls && h->desc.kind == d->kind && h->lo == d->begin && h->hi == d->end && h->desc.flags == d->flags;
}

static vm_hook *find(const vm_machine *m, vm_hook_class cls, const vm_hook_desc *d)
{
    const struct vm_hooks *hs = m->hooks;
    const vm_hook like = { .cls = (uint8_t)cls, .desc = *d, .lo = d->begin, .hi = d->end };
    const vm_hook_list *l = hs ? &hs->list[list_of(&like)] : NULL;
    if (!l || !l->count)
        return NULL;
    for (unsigned i = 0; i < l->wide_count; i++)
        if (is_same(l->wide[i], cls, d))
            return l->wide[i];
    vm_hook *h = *line_at(hs, list_of(&like), false, like.lo / VM_HOOK_LINE);
    while (h && !is_same(h, cls, d))
        h = h->line_next;
    return h;
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

static void bury(vm_machine *m, vm_hook *h)
{
    h->waits = who_is_inside(m);
    h->grave_next = NULL;
    vm_hook **end = &m->hooks->graves;
    while (*end)
        end = &(*end)->grave_next;
    *end = h;
}

/* `destroy` is the program's: not under the lock. */
static void end_graves(vm_machine *m, vm_hook *graves)
{
    for (vm_hook *h = graves, *next; h; h = next) {
        next = h->grave_next;
        if (h->desc.destroy)
            h->desc.destroy(h->desc.user);
        vm_machine_lock(m);
        h->next = m->hooks->spare;
        m->hooks->spare = h;
        vm_machine_unlock(m);
    }
}

/* Takes out the graves that wait for nobody. Under machine->lock; end them without it. */
static vm_hook *take_graves(vm_machine *m, uint64_t passed)
{
    vm_hook *done = NULL, **end = &done;
    for (vm_hook **link = &m->hooks->graves; *link;) {
        vm_hook *h = *link;
        h->waits &= ~passed;
        if (h->waits) {
            link = &h->grave_next;
            continue;
        }
        *link = h->grave_next;
        h->grave_next = NULL;
        *end = h;
        end = &h->grave_next;
    }
    return done;
}

void vm_hooks_boundary(vm_vcpu *cpu)
{
    vm_machine *m = cpu->machine;
    vm_machine_lock(m);
    vm_hook *done = m->hooks ? take_graves(m, UINT64_C(1) << cpu->index) : NULL;
    vm_machine_unlock(m);
    end_graves(m, done);
}

/* ---- editing: the world is stopped ---- */

/* When much is watched, each access asks; else pages with watched bytes lose their tags. */
enum { WATCHED_PAGES = 4096 };

static unsigned *watch_count(struct vm_hooks *hs, const vm_hook *h)
{
    return (h->hi - h->lo) >> 12 >= WATCHED_PAGES ? &hs->watched_all : &hs->watched_few;
}

static void edited(vm_machine *m, const vm_hook *h)
{
    struct vm_hooks *hs = m->hooks;
    const unsigned kind = list_of(h), number = atomic_load(&m->hook_seq) + 1;
    hs->mask = (hs->mask & ~X86_HOOK_BIT(kind)) | (hs->list[kind].count ? X86_HOOK_BIT(kind) : 0);
    hs->watch = hs->watched_all ? X86_WATCH_ALL : hs->watched_few ? X86_WATCH_PAGES : 0;
    hs->edits[number % VM_HOOK_EDITS] = (vm_hook_edit){ .lo = h->lo, .hi = h->hi, .kind = (uint8_t)kind, .is_gpa = h->is_gpa };
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

static void enter_in_tables(struct vm_hooks *hs, vm_hook *h)
{
    vm_hook **name = name_at(hs, h), **line = line_at(hs, list_of(h), h->is_gpa, h->lo / VM_HOOK_LINE);
    h->name_next = *name;
    *name = h;
    if (!is_narrow(h))
        return;
    h->line_next = *line;
    *line = h;
}

static int grow_tables(struct vm_hooks *hs)
{
    unsigned slots = hs->slots ? hs->slots * 2 : 16;
    if (hs->count < hs->slots)
        return VM_OK;
    vm_hook **lines = calloc(2 * (size_t)slots, sizeof *lines);
    if (!lines)
        return vm_fail(VM_E_NOMEM, "no memory for %u hooks", slots);
    free(hs->lines);
    hs->lines = lines;
    hs->names = lines + slots;
    hs->slots = slots;
    for (vm_hook *h = hs->first; h; h = h->next)
        enter_in_tables(hs, h);
    return VM_OK;
}

static int grow_wide(vm_hook_list *l)
{
    unsigned room = l->wide_room ? l->wide_room * 2 : 4;
    if (l->wide_count < l->wide_room)
        return VM_OK;
    vm_hook **wide = realloc(l->wide, room * sizeof *wide);
    if (!wide)
        return vm_fail(VM_E_NOMEM, "no memory for %u hooks", room);
    l->wide = wide;
    l->wide_room = room;
    return VM_OK;
}

static void count_in(vm_hook_list *l, const vm_hook *h)
{
    if (!l->count++) {
        l->lo = UINT64_MAX;
        l->hi = 0;
    }
    l->gpa_count += h->is_gpa;
    if (h->is_gpa)
        return;
    l->lo = h->lo < l->lo ? h->lo : l->lo;
    l->hi = h->hi > l->hi ? h->hi : l->hi;
}

static int link_hook(vm_machine *m, vm_hook *h)
{
    int status = prepare(m);
    struct vm_hooks *hs = m->hooks;
    vm_hook_list *l = hs ? &hs->list[list_of(h)] : NULL;
    if (status == VM_OK)
        status = grow_tables(hs);
    if (status == VM_OK && !is_narrow(h))
        status = grow_wide(l);
    if (status != VM_OK)
        return status;
    h->number = hs->number++;
    hs->count++;
    enter_in_tables(hs, h);
    if (!is_narrow(h))
        l->wide[l->wide_count++] = h;
    count_in(l, h);
    if (is_data(list_of(h)))
        ++*watch_count(hs, h);
    h->link = hs->end;
    *hs->end = h;
    hs->end = &h->next;
    edited(m, h);
    return VM_OK;
}

static void leave_tables(struct vm_hooks *hs, const vm_hook *h)
{
    vm_hook **p = name_at(hs, h);
    while (*p != h)
        p = &(*p)->name_next;
    *p = h->name_next;
    p = line_at(hs, list_of(h), h->is_gpa, h->lo / VM_HOOK_LINE);
    while (is_narrow(h) && *p != h)
        p = &(*p)->line_next;
    if (is_narrow(h))
        *p = h->line_next;
}

static void leave_wide(vm_hook_list *l, const vm_hook *h)
{
    unsigned left = 0;
    for (unsigned i = 0; i < l->wide_count; i++)
        if (l->wide[i] != h)
            l->wide[left++] = l->wide[i];
    l->wide_count = left;
}

/* h->next stays, for a callback that is walking them. */
static void unlink_hook(vm_machine *m, vm_hook *h)
{
    struct vm_hooks *hs = m->hooks;
    vm_hook_list *l = &hs->list[list_of(h)];
    leave_tables(hs, h);
    leave_wide(l, h);
    hs->count--;
    l->count--;
    l->gpa_count -= h->is_gpa;
    if (is_data(list_of(h)))
        --*watch_count(hs, h);
    *h->link = h->next;
    if (h->next)
        h->next->link = h->link;
    else
        hs->end = h->link;
    h->link = NULL;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]->hook_stop.hook == h)
            m->vcpus[i]->hook_stop.hook = NULL;
    bury(m, h);
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
    vm_hook *done = m->hooks ? take_graves(m, 0) : NULL;
    vm_resume(m);
    end_graves(m, done);
    return status;
}

/* Under pause; what can be ended at once is left in *done. */
static void delete_paused(vm_machine *m, vm_hook *h, vm_hook **done)
{
    unlink_hook(m, h);
    *done = take_graves(m, 0);
}

int vm_hook_delete(vm_machine *m, vm_hook *hook)
{
    vm_hook *done = NULL;
    vm_pause(m);
    vm_hook *h = m->hooks && m->hooks->slots ? *name_at(m->hooks, hook) : NULL;
    while (h && (h != hook || h->cls != VM_HOOKED_USER))
        h = h->name_next;
    if (h)
        delete_paused(m, h, &done);
    vm_resume(m);
    end_graves(m, done);
    return h ? VM_OK : vm_fail(VM_E_NOTFOUND, "vm_hook_remove: the machine has no hook %p", (void *)hook);
}

static int toggle(vm_machine *m, vm_hook_class cls, const vm_hook_desc *d, bool on, const char *what)
{
    vm_hook *done = NULL;
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
    end_graves(m, done);
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
    vm_hook *done = NULL;
    vm_pause(m);
    vm_hook *h = find(m, VM_HOOKED_STOP, &d);
    if (h && --h->count == 0)
        delete_paused(m, h, &done);
    vm_resume(m);
    end_graves(m, done);
}

void vm_hooks_free(vm_machine *m)
{
    struct vm_hooks *hs = m->hooks;
    if (!hs)
        return;
    end_graves(m, hs->graves);
    hs->graves = NULL;
    for (vm_hook *h = hs->first; h; h = h->next)
        h->grave_next = h->next;
    end_graves(m, hs->first);
    for (vm_hook *h = hs->spare, *next; h; h = next) {
        next = h->next;
        free(h);
    }
    for (unsigned kind = 0; kind < VM_HOOK_KINDS; kind++)
        free(hs->list[kind].wide);
    free(hs->lines);
    free(hs);
    m->hooks = NULL;
}
