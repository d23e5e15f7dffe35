/* memory.c - regions, the views made of them, and what happens when memory changes.
 *
 * A region lies in exactly one view (memory or ports) while it is enabled. Views are sorted arrays, edited in place
 * while the world is stopped (vm_pause), so a reader in VM_GUEST or under machine->lock needs no lock of its own.
 *
 * Pages of RAM carry flags shared by all vCPUs:
 *   VM_PAGE_CODE   somebody has decoded code from it. Set before the bytes are read, after every vCPU's write tag for
 *   the page
 *                  is gone; so each later write comes through vm_page_written() and is announced to all of them.
 *   VM_PAGE_CLEAN  the dirty log is on and has not seen a write.
 *   VM_PAGE_TABLE  the MMU strategy keeps something that was made from the page's content and wants to hear of writes.
 *   VM_PAGE_KEPT   the page is as the current snapshot has it (track.h).
 * Host memory that is mapped at several addresses (vm_map_host() twice, a file shared twice) has the first flag in all places or
 * in none, and a write to one is announced for all.
 * The flags' upper bits count writes to a code page; after some the code is dropped everywhere and the flag with it,
 * so that a page that merely once held code, or holds data beside code, does not stay slow.
 *
 * Host memory of a region removed while some instruction is under way (VM_BLOCKED) is buried in m->graves and freed
 * when the world is next found at rest.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/replay.h"
#include "core/track.h"
#include "mmu/mmu.h"
#include "x86/access.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096u
#define WRITE_COUNT 32u                /* page_flags: one write to a code page */
#define WRITE_LIMIT 0xe0u

/* ---- views ---- */

/* Index of the first range that ends beyond addr. */
static size_t lower_bound(const vm_view *view, uint64_t addr)
{
    size_t low = 0, high = view->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const vm_range *r = &view->ranges[middle];
        if (r->gpa + (r->bytes - 1) < addr)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const vm_range *vm_view_find(const vm_view *view, uint64_t gpa)
{
    size_t i = lower_bound(view, gpa);
    return i < view->count && view->ranges[i].gpa <= gpa ? &view->ranges[i] : NULL;
}

const vm_range *vm_find_new(vm_vcpu *cpu, uint64_t gpa)
{
    const vm_range *r = vm_view_find(&cpu->machine->view, gpa);
    if (r)
        cpu->last_range = *r;
    return r;
}

static vm_view *view_of(vm_region *r)
{
    return r->kind == VM_REGION_PIO ? &r->machine->ports : &r->machine->view;
}

static bool is_ram(const vm_region *r)
{
    return r->kind <= VM_REGION_FILE;
}

static bool is_free(const vm_view *view, uint64_t gpa, uint64_t bytes)
{
    size_t i = lower_bound(view, gpa);
    return i == view->count || view->ranges[i].gpa > gpa + (bytes - 1);
}

static int reserve(vm_view *view)
{
    if (view->count < view->capacity)
        return VM_OK;
    size_t capacity = view->capacity ? view->capacity * 2 : 8;
    vm_range *ranges = realloc(view->ranges, capacity * sizeof *ranges);
    if (!ranges)
        return vm_fail(VM_E_NOMEM, "no memory for %zu map entries", capacity);
    view->ranges = ranges;
    view->capacity = capacity;
    return VM_OK;
}

static void insert_at(vm_view *view, uint64_t at, uint64_t bytes, vm_region *r)
{
    size_t i = lower_bound(view, at);
    memmove(&view->ranges[i + 1], &view->ranges[i], (view->count - i) * sizeof *view->ranges);
    view->ranges[i] = (vm_range){ .gpa = at, .bytes = bytes, .region = r };
    view->count++;
}

static void take_out_at(vm_view *view, uint64_t at)
{
    size_t i = lower_bound(view, at);
    view->count--;
    memmove(&view->ranges[i], &view->ranges[i + 1], (view->count - i) * sizeof *view->ranges);
}

static void insert(vm_view *view, vm_region *r)
{
    insert_at(view, r->gpa, r->bytes, r);
    r->is_enabled = true;
}

static void take_out(vm_view *view, vm_region *r)
{
    take_out_at(view, r->gpa);
    r->is_enabled = false;
}

/* Handles are looked up by their address before they are believed: a third view, of all regions by pointer. */
bool vm_region_is_known(vm_machine *m, const vm_region *r)
{
    return vm_view_find(&m->handles, (uintptr_t)r) != NULL;
}

/* ---- telling the vCPUs (world stopped) ---- */

static void flush_tlb(vm_vcpu *cpu)
{
    x86_tlb_clear(&cpu->x86);
    if (cpu->machine->backend->tlb_flushed)
        cpu->machine->backend->tlb_flushed(cpu);
}

static void drop_code(vm_vcpu *cpu, vm_vcpu *self, uint64_t gpa, uint64_t bytes)
{
    vm_machine *m = cpu->machine;
    if ((cpu->state & ~VM_WAITED) == VM_BLOCKED && cpu != self)
        vm_vcpu_request(cpu, gpa, bytes);
    else if (m->backend->code_changed)
        m->backend->code_changed(cpu, gpa, bytes);
}

static void map_changed(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]) {
            m->vcpus[i]->last_range = m->vcpus[i]->last_port = (vm_range){ 0 };
            m->vcpus[i]->x86.ram_bytes = 0;
        }
    vm_mmu_map_changed(m);
    vm_track_map_changed(m);
    if (m->backend->map_changed)
        m->backend->map_changed(m);
}

/* Memory at [gpa, + bytes) went away or came under other permissions. */
static void range_gone(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    vm_vcpu *self = vm_vcpu_self(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i]) {
            drop_code(m->vcpus[i], self, gpa, bytes);
            flush_tlb(m->vcpus[i]);
        }
}

/* ---- tables ---- */

enum { LARGE = 32 << 10 };

void *vm_zeroed(size_t bytes)
{
    if (bytes < LARGE)
        return calloc(1, bytes);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void vm_zeroed_free(void *memory, size_t bytes)
{
    if (bytes < LARGE)
        free(memory);
    else if (memory)
        munmap(memory, bytes);
}

/* ---- graves ---- */

static void free_ram(vm_region *r)
{
    if (r->host && r->kind != VM_REGION_HOST)
        munmap(r->host, r->bytes);
    vm_image_drop(r->image);
    vm_image_drop(r->backing);
    free(r->base);
    free(r->changed);
    vm_zeroed_free((void *)r->page_flags, r->bytes / PAGE);
    free(r->page_prot);
    free(r);
}

static void free_graves(vm_machine *m)
{
    while (m->graves) {
        vm_region *r = m->graves;
        m->graves = r->next;
        free_ram(r);
    }
}

static bool is_at_rest(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        int state = m->vcpus[i] ? m->vcpus[i]->state & ~VM_WAITED : VM_IDLE;
        if (state == VM_BLOCKED || state == VM_GUEST || (m->vcpus[i] && m->vcpus[i]->run_depth > 1))
            return false;
    }
    return true;
}

/* ---- the same memory at several addresses ---- */

static void set_flags(_Atomic uint8_t *f, uint8_t set, uint8_t clear)
{
    uint8_t old = atomic_load_explicit(f, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(f, &old, (uint8_t)((old & ~clear) | set)))
        ;
}

static bool is_shared(const vm_region *r)
{
    return r->kind == VM_REGION_HOST || r->file.inode;
}

static bool same_file(const vm_region *a, const vm_region *b)
{
    return a->file.inode && a->file.inode == b->file.inode && a->file.device == b->file.device;
}

static bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

static bool are_twins(const vm_region *a, const vm_region *b)
{
    return overlap((uintptr_t)a->host, a->bytes, (uintptr_t)b->host, b->bytes) ||
           (same_file(a, b) && overlap(a->file.at, a->bytes, b->file.at, b->bytes));
}

/* The next region after `last` (NULL: the first) that shows page `page` of r, and as which of its own. */
static vm_region *next_twin(const vm_region *r, uint64_t page, const vm_region *last, uint64_t *own)
{
    vm_region *q = !r->has_twins ? NULL : last ? last->next : r->machine->regions;
    for (; q; q = q->next) {
        if (q == r || !is_ram(q))
            continue;
        uint64_t at = (uintptr_t)r->host + page * PAGE - (uintptr_t)q->host;
        if (at >= q->bytes && same_file(r, q))
            at = r->file.at + page * PAGE - q->file.at;
        *own = at / PAGE;
        if (at < q->bytes)
            return q;
    }
    return NULL;
}

static void find_twins(vm_region *r)
{
    uint64_t own;
    if (!is_shared(r) && !r->has_twins)
        return;
    for (vm_region *q = r->machine->regions; q; q = q->next)
        if (q != r && is_ram(q) && are_twins(q, r))
            q->has_twins = r->has_twins = true;
    for (uint64_t page = 0; r->has_twins && page < r->bytes / PAGE; page++)
        for (vm_region *q = NULL; (q = next_twin(r, page, q, &own)) != NULL;)
            if ((q->page_flags[own] | r->page_flags[page]) & VM_PAGE_CODE) {
                set_flags(&q->page_flags[own], VM_PAGE_CODE, 0);
                set_flags(&r->page_flags[page], VM_PAGE_CODE, 0);
            }
}

/* ---- adding and removing ---- */

void vm_region_relink(vm_region *r)
{
    vm_machine *m = r->machine;
    insert_at(&m->handles, (uintptr_t)r, 1, r);
    r->next = m->regions;
    r->link = &m->regions;
    if (r->next)
        r->next->link = &r->next;
    m->regions = r;
    m->region_count++;
    if (is_ram(r)) {
        m->ram_total += r->bytes;
        find_twins(r);
    }
}

static int add_checked(vm_region *r)
{
    vm_machine *m = r->machine;
    vm_view *view = view_of(r);
    int status = VM_OK;
    vm_pause(m);
    if (r->is_enabled && !is_free(view, r->gpa, r->bytes))
        status = vm_fail(VM_E_EXISTS, "%s 0x%llx + 0x%llx overlaps a region at 0x%llx",
                         r->kind == VM_REGION_PIO ? "ports" : "memory", (unsigned long long)r->gpa,
                         (unsigned long long)r->bytes,
                         (unsigned long long)view->ranges[lower_bound(view, r->gpa)].gpa);
    else
        status = reserve(view);
    if (status == VM_OK)
        status = reserve(&m->handles);
    if (status == VM_OK) {
        if (m->graves && is_at_rest(m))
            free_graves(m);
        if (is_ram(r) && m->dirty_log)
            memset((void *)r->page_flags, VM_PAGE_CLEAN, r->bytes / PAGE);
        if (r->is_enabled)
            insert(view, r);
        vm_region_relink(r);
        map_changed(m);
    }
    vm_resume(m);
    return status;
}

int vm_region_add(vm_machine *m, const vm_region *proto, vm_region **out)
{
    if (m->replay)
        return vm_replay_forbids(m, "an edit of the map");
    vm_region *r = malloc(sizeof *r);
    if (!r)
        return vm_fail(VM_E_NOMEM, "no memory for a region");
    *r = *proto;
    r->machine = m;
    r->is_enabled = true;
    if (is_ram(r)) {
        r->page_flags = vm_zeroed(r->bytes / PAGE);
        if (!r->page_flags) {
            free(r);
            return vm_fail(VM_E_NOMEM, "no memory for the page flags of 0x%llx bytes",
                           (unsigned long long)proto->bytes);
        }
    }
    int status = add_checked(r);
    if (status != VM_OK) {
        if (is_ram(r))
            vm_zeroed_free((void *)r->page_flags, r->bytes / PAGE);
        free(r);
        return status;
    }
    if (out)
        *out = r;
    return VM_OK;
}

static void unlink_region(vm_region *r)
{
    vm_machine *m = r->machine;
    *r->link = r->next;
    if (r->next)
        r->next->link = r->link;
    m->region_count--;
    take_out_at(&m->handles, (uintptr_t)r);
    if (is_ram(r))
        m->ram_total -= r->bytes;
}

/* The region is out of the map and no callback of it runs: tell its owner, free it. */
void vm_region_end(vm_region *r)
{
    if (r->ops.destroy)
        r->ops.destroy(r->user);
    free(r);
}

static void bury(vm_region *r)
{
    vm_machine *m = r->machine;
    r->next = m->graves;
    m->graves = r;
    if (is_at_rest(m))
        free_graves(m);
}

void vm_region_detach(vm_region *r)
{
    vm_machine *m = r->machine;
    vm_pause(m);
    if (r->is_enabled)
        take_out(view_of(r), r);
    unlink_region(r);
    map_changed(m);
    if (r->kind != VM_REGION_PIO)
        range_gone(m, r->gpa, r->bytes);
    bool is_kept = vm_track_park(r);
    if (is_ram(r) && !is_kept)
        bury(r);
    vm_resume(m);
}

void vm_region_finish(vm_machine *m, vm_region_kind kind, vm_region *r)
{
    if (kind <= VM_REGION_FILE)
        return;
    if (r->is_parked)                  /* until the last snapshot that has it is gone */
        return;
    vm_device_lock(m);                 /* nobody is in its callbacks now, except perhaps this thread further up */
    if (r->busy)
        r->is_dying = true;
    else
        vm_region_end(r);
    vm_device_unlock(m);
}

int vm_region_move(vm_region *r, uint64_t gpa, bool enabled)
{
    vm_machine *m = r->machine;
    vm_view *view = view_of(r);
    int status = VM_OK;
    vm_pause(m);
    bool was_enabled = r->is_enabled;
    if (was_enabled)
        take_out(view, r);
    if (enabled && (gpa + (r->bytes - 1) < gpa || !is_free(view, gpa, r->bytes)))
        status = vm_fail(VM_E_EXISTS, "no room for 0x%llx bytes at 0x%llx", (unsigned long long)r->bytes,
                         (unsigned long long)gpa);
    else if (enabled)
        status = reserve(view);
    if (status == VM_OK && r->kind != VM_REGION_PIO && was_enabled)
        range_gone(m, r->gpa, r->bytes);
    if (status == VM_OK)
        r->gpa = gpa;
    if (status == VM_OK ? enabled : was_enabled)
        insert(view, r);
    map_changed(m);
    vm_resume(m);
    return status;
}

void vm_regions_free(vm_machine *m)
{
    while (m->regions) {
        vm_region *r = m->regions;
        unlink_region(r);
        if (is_ram(r)) {
            free_ram(r);
        } else {
            vm_region_end(r);
        }
    }
    free_graves(m);
    free(m->view.ranges);
    free(m->ports.ranges);
    free(m->handles.ranges);
}

/* ---- for snapshots: regions leave the map and come back (world stopped, device lock held for I/O) ---- */

void vm_region_unlink(vm_region *r)
{
    if (r->is_enabled)
        take_out(view_of(r), r);
    unlink_region(r);
}

int vm_region_reserve(vm_machine *m, size_t regions)
{
    vm_view *views[] = { &m->view, &m->ports, &m->handles };
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) {
        vm_view *view = views[i];
        if (view->count + regions <= view->capacity)
            continue;
        vm_range *ranges = realloc(view->ranges, (view->count + regions) * sizeof *ranges);
        if (!ranges)
            return vm_fail(VM_E_NOMEM, "no memory for %zu map entries", view->count + regions);
        view->ranges = ranges;
        view->capacity = view->count + regions;
    }
    return VM_OK;
}

void vm_region_take_out(vm_region *r)
{
    take_out(view_of(r), r);
}

void vm_region_put_in(vm_region *r)
{
    insert(view_of(r), r);
}

/* A region that is in no list any more. */
void vm_region_free(vm_region *r)
{
    if (is_ram(r)) {
        bury(r);
    } else if (r->busy) {
        r->is_dying = true;
    } else {
        vm_region_end(r);
    }
}

void vm_range_gone(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    range_gone(m, gpa, bytes);
}

void vm_map_edited(vm_machine *m)
{
    map_changed(m);
}

static int add_io(vm_machine *m, vm_region_kind kind, uint64_t at, uint64_t bytes, const vm_io_ops *ops, void *user,
                  vm_region **out)
{
    vm_region proto = { .kind = kind, .gpa = at, .bytes = bytes, .ops = *ops, .user = user, .prot = VM_PROT_RWX,
                        .is_internal = true };
    return vm_region_add(m, &proto, out);
}

int vm_add_mmio(vm_machine *m, uint64_t gpa, uint64_t bytes, const vm_io_ops *ops, void *user, vm_region **out)
{
    return add_io(m, VM_REGION_MMIO, gpa, bytes, ops, user, out);
}

int vm_add_pio(vm_machine *m, uint16_t port, unsigned count, const vm_io_ops *ops, void *user, vm_region **out)
{
    return add_io(m, VM_REGION_PIO, port, count, ops, user, out);
}

/* ---- permissions ---- */

unsigned vm_region_prot(const vm_region *r, uint64_t offset)
{
    return r->page_prot ? r->page_prot[offset / PAGE] : r->prot;
}

/* Give every region in the range an array of its own, so that the change itself cannot fail. */
static int prepare_protect(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot)
{
    for (uint64_t at = gpa, left = bytes; left;) {
        const vm_range *range = vm_view_find(&m->view, at);
        if (!range || !is_ram(range->region))
            return vm_fail(VM_E_FAULT, "no RAM at 0x%llx", (unsigned long long)at);
        vm_region *r = range->region;
        uint64_t offset = at - r->gpa, n = r->bytes - offset < left ? r->bytes - offset : left;
        if (r->is_read_only && (prot & VM_PROT_W))
            return vm_fail(VM_E_UNSUPPORTED, "the file mapped at 0x%llx is open for reading only",
                           (unsigned long long)r->gpa);
        if (!r->page_prot && n != r->bytes) {
            r->page_prot = malloc(r->bytes / PAGE);
            if (!r->page_prot)
                return vm_fail(VM_E_NOMEM, "no memory for permissions of 0x%llx bytes", (unsigned long long)r->bytes);
            memset(r->page_prot, r->prot, r->bytes / PAGE);
        }
        at += n;
        left -= n;
    }
    return VM_OK;
}

static void set_prot(vm_region *r, uint64_t offset, uint64_t n, vm_prot prot)
{
    if (n == r->bytes) {
        free(r->page_prot);
        r->page_prot = NULL;
        r->prot = prot;
    } else {
        memset(r->page_prot + offset / PAGE, prot, n / PAGE);
    }
}

int vm_memory_protect(vm_machine *m, uint64_t gpa, uint64_t bytes, vm_prot prot)
{
    if (m->replay)
        return vm_replay_forbids(m, "vm_protect");
    vm_pause(m);
    int status = prepare_protect(m, gpa, bytes, prot);
    if (status == VM_OK) {
        for (uint64_t at = gpa, left = bytes; left;) {
            vm_region *r = vm_view_find(&m->view, at)->region;
            uint64_t offset = at - r->gpa, n = r->bytes - offset < left ? r->bytes - offset : left;
            set_prot(r, offset, n, prot);
            at += n;
            left -= n;
        }
        range_gone(m, gpa, bytes);
        map_changed(m);
    }
    vm_resume(m);
    return status;
}

void vm_memory_view_changed(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    if (bytes)
        range_gone(m, gpa, bytes);
    if (m->backend->map_changed)
        m->backend->map_changed(m);
}

/* ---- writes that must be seen ---- */

static void drop_all_code(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    vm_pause(m);
    vm_vcpu *self = vm_vcpu_self(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i])
            drop_code(m->vcpus[i], self, gpa, bytes);
    vm_resume(m);
}

static void code_changed(vm_machine *m, vm_vcpu *by, uint64_t gpa, uint64_t bytes)
{
    if (!by) {
        drop_all_code(m, gpa, bytes);
        return;
    }
    by->x86.stat[X86_STAT_CODE_WRITES]++;
    if (m->backend->code_changed)
        m->backend->code_changed(by, gpa, bytes);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i] && m->vcpus[i] != by)
            vm_vcpu_request(m->vcpus[i], gpa, bytes);
}

/* Many writes to a page with code: let all of its code go, so that it can be written at full speed again. */
static void forget_code(vm_machine *m, const vm_region *r, uint64_t page)
{
    uint64_t own = page;
    vm_pause(m);
    for (const vm_region *q = r, *last = NULL; q; q = last = next_twin(r, page, last, &own)) {
        drop_all_code(m, q->gpa + own * PAGE, PAGE);
        set_flags(&q->page_flags[own], 0, VM_PAGE_CODE | WRITE_LIMIT);
    }
    vm_resume(m);
}

static bool any_blocked(vm_machine *m, vm_vcpu *self)
{
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i] && m->vcpus[i] != self && (m->vcpus[i]->state & ~VM_WAITED) == VM_BLOCKED)
            return true;
    return false;
}

void vm_page_code_changed(vm_machine *m, vm_vcpu *by, const vm_region *r, uint64_t offset, uint64_t bytes)
{
    uint64_t own;
    code_changed(m, by, r->gpa + offset, bytes);
    for (vm_region *q = NULL; (q = next_twin(r, offset / PAGE, q, &own)) != NULL;)
        code_changed(m, by, q->gpa + own * PAGE + offset % PAGE, bytes);
}

static void code_page_written(vm_machine *m, vm_vcpu *by, const vm_region *r, uint64_t offset, uint64_t bytes)
{
    const uint64_t page = offset / PAGE;
    _Atomic uint8_t *flags = &r->page_flags[page];
    uint8_t now = atomic_load_explicit(flags, memory_order_relaxed);
    vm_page_code_changed(m, by, r, offset, bytes);
    if ((now & WRITE_LIMIT) == WRITE_LIMIT && !any_blocked(m, by))
        forget_code(m, r, page);
    else if ((now & WRITE_LIMIT) != WRITE_LIMIT)
        atomic_fetch_add_explicit(flags, WRITE_COUNT, memory_order_relaxed);
}

/* The first write to a page since the current snapshot. */
static void note_write(vm_machine *m, vm_vcpu *by, const vm_region *r, uint64_t page)
{
    uint8_t old = atomic_load_explicit(&r->page_flags[page], memory_order_relaxed);
    while (old & VM_PAGE_KEPT)
        if (atomic_compare_exchange_weak(&r->page_flags[page], &old, (uint8_t)(old & ~VM_PAGE_KEPT))) {
            vm_track_note(m, by, (vm_region *)r, page);
            return;
        }
}

bool vm_track_write(vm_vcpu *cpu, uint64_t gpa)
{
    const vm_range *range = vm_find(cpu, gpa);
    if (!range || !is_ram(range->region))
        return false;
    const vm_region *r = range->region;
    uint64_t offset = gpa - range->gpa;
    uint8_t flags = atomic_load_explicit(&r->page_flags[offset / PAGE], memory_order_relaxed);
    if ((flags & (VM_PAGE_CODE | VM_PAGE_CLEAN | VM_PAGE_TABLE)) || !(vm_region_prot(r, offset) & VM_PROT_W))
        return false;
    if (flags & VM_PAGE_KEPT)
        note_write(cpu->machine, cpu, r, offset / PAGE);
    return true;
}

void vm_page_written(vm_machine *m, vm_vcpu *by, const vm_region *r, uint64_t offset, uint64_t bytes)
{
    atomic_store_explicit(&m->is_touched, true, memory_order_relaxed);
    for (uint64_t page = offset / PAGE; page <= (offset + bytes - 1) / PAGE; page++) {
        _Atomic uint8_t *flags = &r->page_flags[page];
        uint8_t now = atomic_load(flags);
        if (now & VM_PAGE_CLEAN)
            set_flags(flags, VM_PAGE_DIRTY, VM_PAGE_CLEAN);
        if (now & VM_PAGE_KEPT)
            note_write(m, by, r, page);
        if (now & (VM_PAGE_CODE | VM_PAGE_TABLE)) {
            uint64_t first = page * PAGE > offset ? page * PAGE : offset;
            if (now & VM_PAGE_TABLE)
                vm_mmu_table_written(m, by, r->gpa + first);
            if (!(now & VM_PAGE_CODE))
                continue;
            uint64_t end = (page + 1) * PAGE < offset + bytes ? (page + 1) * PAGE : offset + bytes;
            code_page_written(m, by, r, first, end - first);
        }
    }
}

/* Writes to the page of RAM at gpa shall be announced to the MMU strategy, or no longer. The write tags that are there
 * are for the caller to take. False: no RAM. */
bool vm_page_trap(vm_machine *m, uint64_t gpa, bool on)
{
    const vm_range *range = vm_view_find(&m->view, gpa);
    if (!range || !is_ram(range->region))
        return false;
    set_flags(&range->region->page_flags[(gpa - range->gpa) / PAGE], on ? VM_PAGE_TABLE : 0, on ? 0 : VM_PAGE_TABLE);
    return true;
}

bool vm_page_is_trapped(vm_machine *m, uint64_t gpa)
{
    const vm_range *range = vm_view_find(&m->view, gpa);
    return range && is_ram(range->region) && (range->region->page_flags[(gpa - range->gpa) / PAGE] & VM_PAGE_TABLE);
}

void vm_page_has_code(vm_vcpu *cpu, uint64_t gpa)
{
    vm_machine *m = cpu->machine;
    const vm_range *range = vm_find(cpu, gpa);
    if (!range || !is_ram(range->region))
        return;
    const vm_region *r = range->region;
    const uint64_t page = (gpa - range->gpa) / PAGE;
    uint64_t own = page;
    if (atomic_load_explicit(&r->page_flags[page], memory_order_acquire) & VM_PAGE_CODE)
        return;
    for (const vm_region *q = r, *last = NULL; q; q = last = next_twin(r, page, last, &own)) {
        set_flags(&q->page_flags[own], VM_PAGE_CODE, WRITE_LIMIT);
        vm_mmu_protect_page(cpu, q->gpa + own * PAGE);
    }
    if (m->vcpu_count == 1)
        return;
    /* Once every vCPU has stopped, stores through the old tags are done. */
    vm_pause(m);
    own = page;
    for (const vm_region *q = r, *last = NULL; q; q = last = next_twin(r, page, last, &own))
        for (unsigned i = 0; i < m->vcpu_count; i++)
            if (m->vcpus[i] && m->vcpus[i] != cpu)
                vm_mmu_protect_page(m->vcpus[i], q->gpa + own * PAGE);
    vm_resume(m);
}

/* ---- access from outside ---- */

/* Direct host pointer to [gpa, gpa + *bytes), *bytes shortened to what the region holds. Map locked or VM_GUEST. */
static uint8_t *ram_ptr(vm_machine *m, uint64_t gpa, uint64_t *bytes, vm_region **region)
{
    const vm_range *range = vm_view_find(&m->view, gpa);
    if (!range || !is_ram(range->region))
        return NULL;
    uint64_t offset = gpa - range->gpa;
    if (*bytes > range->bytes - offset)
        *bytes = range->bytes - offset;
    *region = range->region;
    return range->region->host + offset;
}

static bool reading_is_safe(vm_machine *m, vm_vcpu *self)
{
    return self && (atomic_load(&self->state) & ~VM_WAITED) == VM_GUEST && m->pause_count == 0;
}

/* First address in the range that is not RAM, or that not even the host may write. */
static bool find_hole(vm_machine *m, uint64_t gpa, size_t bytes, bool is_write, uint64_t *hole)
{
    vm_region *r;
    for (uint64_t n; bytes; gpa += n, bytes -= n) {
        n = bytes;
        if (!ram_ptr(m, gpa, &n, &r) || (is_write && r->is_read_only)) {
            *hole = gpa;
            return true;
        }
    }
    return false;
}

static int copy_locked(vm_machine *m, vm_vcpu *self, uint64_t gpa, uint8_t *buffer, size_t bytes, bool is_write)
{
    vm_region *r;
    uint64_t hole;
    if (find_hole(m, gpa, bytes, is_write, &hole))
        return vm_fail(VM_E_FAULT, "no %sRAM at guest-physical 0x%llx", is_write ? "writable " : "",
                       (unsigned long long)hole);
    for (uint64_t n; bytes; gpa += n, buffer += n, bytes -= n) {
        n = bytes;
        uint8_t *p = ram_ptr(m, gpa, &n, &r);
        if (!is_write) {
            x86_move_host(buffer, p, n);
        } else {
            x86_move_host(p, buffer, n);
            vm_page_written(m, self, r, gpa - r->gpa, n);
        }
    }
    return VM_OK;
}

int vm_memory_copy(vm_machine *m, uint64_t gpa, void *buffer, size_t bytes, bool is_write)
{
    if (!bytes)
        return VM_OK;
    if (gpa + (bytes - 1) < gpa)
        return vm_fail(VM_E_FAULT, "0x%llx + 0x%zx runs past the end of the address space", (unsigned long long)gpa,
                       bytes);
    vm_vcpu *self = vm_vcpu_self(m);
    if (reading_is_safe(m, self))
        return copy_locked(m, self, gpa, buffer, bytes, is_write);
    vm_machine_lock(m);
    int status = copy_locked(m, self, gpa, buffer, bytes, is_write);
    vm_machine_unlock(m);
    return status;
}

bool vm_dma_read(vm_machine *m, uint64_t gpa, void *buf, size_t bytes)
{
    return vm_memory_copy(m, gpa, buf, bytes, false) == VM_OK;
}

bool vm_dma_write(vm_machine *m, uint64_t gpa, const void *buf, size_t bytes)
{
    return vm_memory_copy(m, gpa, (void *)(uintptr_t)buf, bytes, true) == VM_OK;
}

void *vm_memory_ptr(vm_machine *m, uint64_t gpa, size_t *bytes)
{
    vm_region *r;
    uint64_t n = *bytes;
    vm_machine_lock(m);
    void *p = n ? ram_ptr(m, gpa, &n, &r) : NULL;
    vm_machine_unlock(m);
    *bytes = p ? (size_t)n : 0;
    return p;
}

int vm_memory_changed(vm_machine *m, uint64_t gpa, uint64_t bytes)
{
    vm_region *r;
    vm_pause(m);
    m->is_touched = true;
    for (uint64_t at = gpa, left = bytes, n; left; at += n, left -= n) {
        n = left;
        if (!ram_ptr(m, at, &n, &r)) {
            n = PAGE - at % PAGE < left ? PAGE - at % PAGE : left;
            const vm_view *v = &m->view;             /* jump over a hole in one step */
            size_t i = lower_bound(v, at);
            uint64_t next = i < v->count && v->ranges[i].gpa > at ? v->ranges[i].gpa - at : i < v->count ? n : left;
            n = next < left ? next : left;
            continue;
        }
        for (uint64_t page = (at - r->gpa) / PAGE; page <= (at - r->gpa + n - 1) / PAGE; page++) {
            if (r->page_flags[page] & VM_PAGE_CLEAN)
                set_flags(&r->page_flags[page], VM_PAGE_DIRTY, VM_PAGE_CLEAN);
            if (r->page_flags[page] & VM_PAGE_KEPT)
                note_write(m, NULL, r, page);
            if (r->page_flags[page] & VM_PAGE_TABLE)
                vm_mmu_table_written(m, vm_vcpu_self(m), r->gpa + page * PAGE);
            if (r->has_twins && (r->page_flags[page] & VM_PAGE_CODE))
                vm_page_code_changed(m, NULL, r, page * PAGE, PAGE);
        }
    }
    drop_all_code(m, gpa, bytes);
    vm_resume(m);
    return VM_OK;
}

/* ---- dirty log ---- */

static void all_clean(vm_region *r, bool on)
{
    for (uint64_t page = 0; page < r->bytes / PAGE; page++) {
        uint8_t now = r->page_flags[page];
        if (on ? !(now & VM_PAGE_CLEAN) || now & VM_PAGE_DIRTY : now & (VM_PAGE_CLEAN | VM_PAGE_DIRTY))
            set_flags(&r->page_flags[page], on ? VM_PAGE_CLEAN : 0, VM_PAGE_DIRTY | (on ? 0 : VM_PAGE_CLEAN));
    }
}

static void protect_all(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->vcpus[i])
            vm_mmu_protect_page(m->vcpus[i], UINT64_MAX);
}

void vm_memory_dirty_log(vm_machine *m, bool on)
{
    vm_pause(m);
    m->dirty_log = on;
    for (vm_region *r = m->regions; r; r = r->next)
        if (is_ram(r))
            all_clean(r, on);
    if (on)
        protect_all(m);
    map_changed(m);
    vm_resume(m);
}

void vm_memory_dirty_fetch(vm_machine *m, uint64_t gpa, uint64_t bytes, uint64_t *bitmap)
{
    bool any = false;
    memset(bitmap, 0, (bytes / PAGE + 63) / 64 * 8);
    vm_pause(m);
    if (m->backend->dirty_sync)
        m->backend->dirty_sync(m);
    for (size_t i = lower_bound(&m->view, gpa);
         i < m->view.count && (m->view.ranges[i].gpa < gpa || m->view.ranges[i].gpa - gpa < bytes); i++) {
        const vm_range *range = &m->view.ranges[i];
        if (!is_ram(range->region))
            continue;
        uint64_t first = range->gpa > gpa ? range->gpa : gpa;
        uint64_t end = range->gpa + range->bytes - gpa < bytes ? range->gpa + range->bytes : gpa + bytes;
        for (uint64_t at = first; at != end; at += PAGE) {
            _Atomic uint8_t *flags = &range->region->page_flags[(at - range->gpa) / PAGE];
            if (!(atomic_load_explicit(flags, memory_order_relaxed) & VM_PAGE_DIRTY))
                continue;
            bitmap[(at - gpa) / PAGE / 64] |= UINT64_C(1) << ((at - gpa) / PAGE % 64);
            set_flags(flags, VM_PAGE_CLEAN, VM_PAGE_DIRTY);
            any = true;
        }
    }
    if (any)
        protect_all(m);
    vm_resume(m);
}
