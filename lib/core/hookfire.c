/* hookfire.c - calling hooks: from events of the CPU to the program's functions and back. See hook.h.
 *
 * A callback may change anything, so each place that calls one looks afterwards: at the answer, and at is_redirected, for a
 * changed RIP. All of it runs on the vCPU's thread inside an instruction or right before one.
 */
#include "core/hook.h"
#include "mmu/mmu.h"
#include "x86/insn.h"

#include <string.h>

/* ---- one hook, one list ---- */

void vm_hook_note_stop(vm_vcpu *cpu, vm_hook *h, const vm_hook_event *e)
{
    if (cpu->hook_stop.is_set && (h->cls != VM_HOOKED_BREAK || cpu->hook_stop.cls == VM_HOOKED_BREAK))
        return;                        /* the first is told, but a breakpoint in any case */
    cpu->hook_stop.is_set = true;
    cpu->hook_stop.cls = h->cls;
    cpu->hook_stop.hook = h->link ? h : NULL;                /* NULL: has just removed itself */
    cpu->hook_stop.debug = (vm_exit_debug){ .is_watchpoint = h->cls == VM_HOOKED_WATCH, .address = e->address, .bytes = e->bytes,
                                .access = e->kind == VM_HOOK_MEM_READ ? VM_PROT_R :
                                          e->kind == VM_HOOK_MEM_WRITE ? VM_PROT_W : VM_PROT_X,
                                .value = h->cls == VM_HOOKED_WATCH ? e->value : 0 };
}

static unsigned stronger(unsigned a, unsigned b)
{
    static const uint8_t rank[4] = { [X86_HOOK_GO] = 0, [X86_HOOK_SKIP] = 1, [X86_HOOK_RETRY] = 2, [X86_HOOK_STOP] = 3 };
    return rank[b] > rank[a] ? b : a;
}

static unsigned call(vm_vcpu *cpu, vm_hook *h, const vm_hook_event *e)
{
    unsigned answer = X86_HOOK_STOP;
    if (h->cls == VM_HOOKED_USER)
        answer = (unsigned)h->desc.fn(h->desc.user, cpu, e);
    if (answer == X86_HOOK_STOP)
        vm_hook_note_stop(cpu, h, e);
    return answer <= X86_HOOK_RETRY ? answer : X86_HOOK_GO;
}

/* More than fit in a list: looked for one by one. Those that a callback adds now are not called yet. */
static unsigned fire_many(vm_vcpu *cpu, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa, const vm_hook_event *e)
{
    const struct vm_hooks *hs = cpu->machine->hooks;
    const uint64_t limit = hs->number;
    unsigned answer = X86_HOOK_GO;
    for (vm_hook *h = hs->first; h; h = h->next)
        if (h->link && h->number < limit && vm_hook_is_at(h, kind, at, n, gpa))
            answer = stronger(answer, call(cpu, h, e));
    return answer;
}

unsigned vm_hook_fire(vm_vcpu *cpu, unsigned kind, uint64_t at, uint64_t n, uint64_t gpa, vm_hook_event *e)
{
    enum { MOST = 16 };
    const vm_hook_list *l = &cpu->machine->hooks->list[kind];
    vm_hook *hits[MOST];
    unsigned answer = X86_HOOK_GO;
    n = n ? n : 1;
    e->size = sizeof *e;
    e->kind = (vm_hook_kind)kind;
    if (l->count == 1 && l->wide_count)
        return vm_hook_is_at(l->wide[0], kind, at, n, gpa) ? call(cpu, l->wide[0], e) : X86_HOOK_GO;
    unsigned count = vm_hooks_at(cpu->machine, kind, at, n, gpa, hits, MOST);
    if (count > MOST)
        return fire_many(cpu, kind, at, n, gpa, e);
    for (unsigned i = 0; i < count; i++)
        if (hits[i]->link)             /* not just removed by a callback */
            answer = stronger(answer, call(cpu, hits[i], e));
    return answer;
}

/* ---- before an instruction ---- */

static unsigned fire_blocks(vm_vcpu *cpu, uint64_t la, uint64_t gpa)
{
    x86_cpu *x = &cpu->x86;
    unsigned answer = X86_HOOK_GO;
    if (x->block_state == X86_BLOCK_EDGE && x86_hooked(x, X86_HOOK_EDGE)) {
        vm_hook_event e = { .address = la, .from = x->edge_from };
        answer = vm_hook_fire(cpu, X86_HOOK_EDGE, la, 1, gpa, &e);
    }
    if (x->block_state != X86_BLOCK_MID && x86_hooked(x, X86_HOOK_BLOCK)) {
        vm_hook_event e = { .address = la };
        answer = stronger(answer, vm_hook_fire(cpu, X86_HOOK_BLOCK, la, 1, gpa, &e));
    }
    return answer;
}

static unsigned fire_insn(vm_vcpu *cpu, const x86_insn *in, uint64_t la, uint64_t gpa)
{
    x86_cpu *x = &cpu->x86;
    uint8_t bytes[16];
    unsigned answer = X86_HOOK_GO, n = in->length;
    vm_hook_event e = { .address = la, .bytes = n };
    memcpy(bytes, in->bytes, 15);
    memset(bytes + n, 0, sizeof bytes - n);
    memcpy(&e.value, bytes, 8);
    e.data = bytes;
    if (x86_hooked(x, X86_HOOK_FETCH))
        answer = vm_hook_fire(cpu, X86_HOOK_FETCH, la, n, gpa, &e);
    if (x86_hooked(x, X86_HOOK_INSN))
        answer = stronger(answer, vm_hook_fire(cpu, X86_HOOK_INSN, la, 1, gpa, &e));
    return answer;
}

static unsigned fire_breakpoint(vm_vcpu *cpu, uint64_t la)
{
    vm_hook_event e = { .address = la };
    return vm_hook_fire(cpu, X86_HOOK_BREAK, la, 1, UINT64_MAX, &e);
}

/* A callback asked to stop before the instruction; the next run goes on with it, unless RIP has been set. */
void vm_hook_stop_before(x86_cpu *x, bool is_moved)
{
    x->stop = X86_STOP_HOOK;
    x->hook_done = !is_moved;
    if (is_moved) {
        x->rip = x->next_rip;
        x86_io_retire(x);
        x->block_state = X86_BLOCK_FRESH;
    }
    x->hook_rip = x->rip;
}

unsigned vm_hook_before(vm_vcpu *cpu, const x86_insn *in, uint64_t gpa)
{
    x86_cpu *x = &cpu->x86;
    const uint64_t la = x86_rip_linear(x);
    unsigned answer = X86_HOOK_GO;
    x->is_redirected = false;
    if (x86_hooked(x, X86_HOOK_BREAK) && vm_hook_is_stop(cpu->machine, la)) {
        x->stop = X86_STOP_BREAKPOINT;
        return X86_HOOK_STOP;
    }
    if (x->block_state != X86_BLOCK_MID)
        answer = fire_blocks(cpu, la, gpa);
    if (x->hook_mask & (X86_HOOK_BIT(X86_HOOK_INSN) | X86_HOOK_BIT(X86_HOOK_FETCH)))
        answer = stronger(answer, fire_insn(cpu, in, la, gpa));
    if (x86_hooked(x, X86_HOOK_BREAK))
        answer = stronger(answer, fire_breakpoint(cpu, la));
    if (answer == X86_HOOK_STOP)
        vm_hook_stop_before(x, x->is_redirected);
    else if (x->is_redirected)
        answer = X86_HOOK_SKIP;
    return answer == X86_HOOK_RETRY ? X86_HOOK_GO : answer;
}

/* ---- other events ---- */

static uint64_t gpa_of(x86_cpu *x, uint64_t la, unsigned access)
{
    x86_walk w = { 0 };
    return x86_walk_page(x, la, access, x->ctx, false, &w) ? w.gpa : UINT64_MAX - 64;
}

static bool is_data(unsigned kind) { return X86_HOOK_DATA >> kind & 1; }

/* "Where it goes on" of a callback inside an instruction: kept until that is done, for the instruction may branch. */
void vm_hook_keep_redirect(vm_vcpu *cpu, uint64_t next)
{
    x86_cpu *x = &cpu->x86;
    if (!x->is_redirected)
        return;
    cpu->has_redirect = true;
    cpu->redirect = x->next_rip;
    x->next_rip = next;
    x->is_redirected = false;
    atomic_fetch_or(&x->attention, X86_ATT_LOOK);
}

uint64_t vm_hook_gpa(vm_vcpu *cpu, const vm_hook_event *e)
{
    const vm_hook_list *l = &cpu->machine->hooks->list[e->kind];
    bool is_read = e->kind == VM_HOOK_MEM_READ;
    return l->gpa_count && is_data(e->kind) ? gpa_of(&cpu->x86, e->address, is_read ? X86_READ : X86_WRITE) : UINT64_MAX;
}

unsigned vm_env_hook(x86_cpu *x, const x86_hook *h)
{
    vm_vcpu *cpu = vm_vcpu_of(x);
    const uint64_t next = x->next_rip;
    const bool is_inside = is_data(h->kind) || h->kind == X86_HOOK_PORT;
    vm_hook_event e = { .kind = (vm_hook_kind)h->kind, .address = h->address, .from = h->from, .value = h->value, .bytes = h->bytes,
                        .flags = h->flags, .error = h->error, .data = h->data };
    x->is_redirected = false;
    unsigned answer = vm_hook_fire(cpu, h->kind, h->number, is_data(h->kind) ? h->bytes : 1,
                                   vm_hook_gpa(cpu, &e), &e);
    if (is_inside) {
        if (answer != X86_HOOK_SKIP)
            vm_hook_keep_redirect(cpu, next);
        if (answer != X86_HOOK_STOP)
            return answer;
        atomic_fetch_or(&x->attention, X86_ATT_STOP);
        vm_vcpu_look_again(cpu);
        return X86_HOOK_GO;
    }
    if (answer == X86_HOOK_STOP && x->is_redirected)
        vm_hook_stop_before(x, true);
    else if (answer != X86_HOOK_STOP && x->is_redirected)
        answer = X86_HOOK_SKIP;
    return answer;
}

unsigned vm_env_hook_before(x86_cpu *x, const x86_insn *in, uint64_t gpa)
{
    return vm_hook_before(vm_vcpu_of(x), in, gpa);
}

unsigned vm_env_withheld(x86_cpu *x, uint64_t la, uint64_t gpa)
{
    const vm_machine *m = vm_vcpu_of(x)->machine;
    if (vm_hook_covers(m, X86_HOOK_READ, la, 4096, gpa))
        return X86_READ | X86_WRITE;   /* a write tag serves the read of a read-modify-write too */
    return vm_hook_covers(m, X86_HOOK_WRITE, la, 4096, gpa) ? X86_WRITE : 0;
}

static bool covers_data(x86_cpu *x, unsigned kind, uint64_t la, unsigned n)
{
    const vm_machine *m = vm_vcpu_of(x)->machine;
    if (!m->hooks->list[kind].gpa_count)
        return vm_hook_covers(m, kind, la, n, 0);
    for (unsigned done = 0, part; done < n; done += part) {
        part = 4096 - (unsigned)((la + done) & 4095);
        part = part < n - done ? part : n - done;
        if (vm_hook_covers(m, kind, la + done, part, gpa_of(x, la + done, kind == X86_HOOK_READ ? X86_READ : X86_WRITE)))
            return true;
    }
    return false;
}

bool vm_env_watched(x86_cpu *x, uint64_t la, unsigned n, unsigned access)
{
    return ((access & X86_READ) && covers_data(x, X86_HOOK_READ, la, n)) ||
           ((access & X86_WRITE) && covers_data(x, X86_HOOK_WRITE, la, n));
}

unsigned vm_hook_interrupt(vm_vcpu *cpu, uint8_t vector)
{
    x86_cpu *x = &cpu->x86;
    if (!x86_hooked(x, X86_HOOK_INTERRUPT))
        return X86_HOOK_GO;
    if (cpu->irq_reported == x->retired + 1) {
        cpu->irq_reported = 0;
        return X86_HOOK_GO;
    }
    x->next_rip = x->rip;
    x86_hook h = { .kind = X86_HOOK_INTERRUPT, .number = vector, .value = vector, .address = x86_rip_linear(x) };
    unsigned answer = vm_env_hook(x, &h);
    if (answer == X86_HOOK_STOP)
        cpu->irq_reported = x->retired + 1;
    if (answer != X86_HOOK_STOP && x->next_rip != x->rip) {
        x->rip = x->next_rip;
        x->block_state = X86_BLOCK_FRESH;
    }
    return answer == X86_HOOK_RETRY ? X86_HOOK_SKIP : answer;
}

/* ---- the run loop ---- */

int vm_hook_exit(vm_vcpu *cpu, vm_exit *exit)
{
    if (!cpu->hook_stop.is_set)
        return 0;
    cpu->hook_stop.is_set = false;
    if (cpu->hook_stop.cls == VM_HOOKED_USER) {
        exit->hook.hook = cpu->hook_stop.hook;
        return VM_EXIT_HOOK;
    }
    exit->debug = cpu->hook_stop.debug;
    return VM_EXIT_BREAKPOINT;
}

bool vm_hooks_knows(const vm_machine *m, unsigned seen)
{
    return atomic_load(&m->hook_seq) - seen <= VM_HOOK_EDITS;
}

const vm_hook_edit *vm_hooks_edit_after(const vm_machine *m, unsigned *seen)
{
    return *seen == atomic_load(&m->hook_seq) ? NULL : &m->hooks->edits[++*seen % VM_HOOK_EDITS];
}

static void forget_translations(vm_vcpu *cpu)
{
    x86_tlb_clear(&cpu->x86);
    if (cpu->machine->backend->tlb_flushed)
        cpu->machine->backend->tlb_flushed(cpu);
}

/* Watched pages have no tags: those that an edit concerns lose theirs. */
static void withhold(vm_vcpu *cpu, unsigned seen, uint8_t watch)
{
    enum { MOST = 16 };
    if (cpu->x86.watch == watch && (watch & X86_WATCH_ALL))
        return;                        /* every access asks */
    bool is_some = cpu->x86.watch == watch && vm_hooks_knows(cpu->machine, seen);
    for (const vm_hook_edit *e; is_some && (e = vm_hooks_edit_after(cpu->machine, &seen)) != NULL;) {
        if (!is_data(e->kind))
            continue;
        is_some = !e->is_gpa && e->hi - e->lo < MOST * 4096;
        for (uint64_t page = e->lo >> 12; is_some && page <= e->hi >> 12; page++)
            x86_tlb_drop(&cpu->x86, page << 12);
    }
    if (!is_some)
        forget_translations(cpu);
}

void vm_hooks_take(vm_vcpu *cpu)
{
    vm_machine *m = cpu->machine;
    x86_cpu *x = &cpu->x86;
    const struct vm_hooks *hs = m->hooks;
    const uint32_t mask = hs ? hs->mask : 0;
    const uint8_t watch = hs ? hs->watch : 0;
    const unsigned seen = cpu->hooks_seen;
    cpu->hooks_seen = atomic_load(&m->hook_seq);
    if ((mask & X86_HOOK_BLOCKS) && !(x->hook_mask & X86_HOOK_BLOCKS))
        x->block_state = cpu->has_begun ? X86_BLOCK_MID : X86_BLOCK_FRESH;
    if (!(mask & X86_HOOK_CODE))
        x->hook_done = false;
    x->hook_mask = mask;
    if (watch | x->watch)
        withhold(cpu, seen, watch);
    x->watch = watch;
    x86_mode_changed(x);
    if (m->backend->hooks_changed)
        m->backend->hooks_changed(cpu, seen);
    if (hs)
        vm_hooks_boundary(cpu);
}
