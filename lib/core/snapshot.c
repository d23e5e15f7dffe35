/* snapshot.c - taking snapshots, going back to them, and the tree they form. track.h has the model.
 *
 * The path that matters is restoring the current snapshot of a machine whose map nobody edited: walk the notes, copy
 * pages, take the noted write tags, put the CPUs back. Everything else may take its time.
 *
 * A snapshot whose handle was freed stays in the tree as long as others need its pages: until it is a leaf and not
 * current, or its pages could move to its only child.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/replay.h"
#include "core/track.h"
#include "mmu/mmu.h"
#include "platform/pc.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE VM_SNAP_PAGE

static bool is_ram(const vm_region *r)
{
    return r->kind <= VM_REGION_FILE;
}

static bool has_device_state(const vm_region *r)
{
    return !r->is_internal && r->ops.save && r->ops.restore;
}

/* ---- the world stands still ---- */

int vm_snap_begin(vm_machine *m, const char *function)
{
    vm_device_lock(m);
    vm_pause(m);
    int status = m->poisoned ? vm_fail(VM_E_INTERNAL, "%s: the machine met an internal error earlier", function) : VM_OK;
    for (unsigned i = 0; i < m->vcpu_count && status == VM_OK; i++)
        if (vm_vcpu_is_running(m->vcpus[i]))
            status = vm_fail(VM_E_BUSY, "%s: vCPU %u is running", function, i);
    if (status != VM_OK)
        vm_snap_end(m);
    return status;
}

void vm_snap_end(vm_machine *m)
{
    vm_resume(m);
    vm_device_unlock(m);
}

/* ---- notes ---- */

void vm_track_note(vm_machine *m, vm_vcpu *by, vm_region *r, uint64_t page)
{
    vm_note note = { .region = r, .page = page };
    if (by)
        by->notes[by->note_count++] = note;
    else
        m->track->notes[__atomic_fetch_add(&m->track->note_count, 1, __ATOMIC_RELAXED)] = note;
}

/* The lists in turn: the machine's, then the vCPUs'. */
static vm_note *list_of(vm_machine *m, unsigned i, size_t **count)
{
    *count = i ? &m->vcpus[i - 1]->note_count : &m->track->note_count;
    return i ? m->vcpus[i - 1]->notes : m->track->notes;
}

static size_t count_notes(vm_machine *m)
{
    size_t all = 0, *count;
    for (unsigned i = 0; i <= m->vcpu_count; i++) {
        list_of(m, i, &count);
        all += *count;
    }
    return all;
}

static size_t list_bytes(const vm_machine *m, size_t capacity)
{
    return (capacity * sizeof(vm_note) * (m->vcpu_count + 1) + PAGE - 1) & ~(PAGE - 1);
}

static uint64_t pages_of(const vm_snapshot *s)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < s->kept_count; i++)
        if (is_ram(s->kept[i].region))
            pages += s->kept[i].region->bytes / PAGE;
    return pages;
}

/* Room for a note of every page that a snapshot has, in each list: nothing can fail when the guest writes. */
static int reserve_notes(vm_machine *m, uint64_t pages)
{
    struct vm_track *t = m->track;
    if (pages <= t->capacity && t->notes)
        return VM_OK;
    size_t capacity = pages ? pages : 1, *count;
    vm_note *lists = mmap(NULL, list_bytes(m, capacity), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (lists == MAP_FAILED)
        return vm_fail_errno(VM_E_NOMEM, "memory for notes of written pages");
    for (unsigned i = 0; t->notes && i <= m->vcpu_count; i++) {
        const vm_note *from = list_of(m, i, &count);
        memcpy(lists + i * capacity, from, *count * sizeof *from);
    }
    if (t->notes)
        munmap(t->notes, list_bytes(m, t->capacity));
    t->notes = lists;
    t->capacity = capacity;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        m->vcpus[i]->notes = lists + (i + 1) * capacity;
    return VM_OK;
}

/* ---- pages that a snapshot owns ---- */

static size_t slot_of(const vm_snapshot *s, const vm_region *r, uint64_t page)
{
    uint64_t h = ((uintptr_t)r >> 4 ^ page * UINT64_C(0x9e3779b97f4a7c15)) * UINT64_C(0xff51afd7ed558ccd);
    size_t i = (h >> 32) & (s->owned_slots - 1);
    while (s->owned[i].region && (s->owned[i].region != r || s->owned[i].page != page))
        i = (i + 1) & (s->owned_slots - 1);
    return i;
}

static uint8_t *find_owned(const vm_snapshot *s, const vm_region *r, uint64_t page)
{
    return s->owned_slots ? s->owned[slot_of(s, r, page)].bytes : NULL;
}

static void free_page(uint8_t *bytes)
{
    if (bytes != vm_zero_page)
        free(bytes);
}

static bool reserve_owned(vm_snapshot *s, size_t more)
{
    size_t want = 16;
    while (want < (s->owned_count + more) * 2)
        want *= 2;
    if (want <= s->owned_slots)
        return true;
    vm_owned *old = s->owned, *slots = calloc(want, sizeof *slots);
    size_t old_slots = s->owned_slots;
    if (!slots) {
        vm_fail(VM_E_NOMEM, "no memory for a snapshot's list of pages");
        return false;
    }
    s->owned = slots;
    s->bytes += (want - old_slots) * sizeof *slots;
    s->owned_slots = want;
    for (size_t i = 0; i < old_slots; i++)
        if (old[i].region)
            slots[slot_of(s, old[i].region, old[i].page)] = old[i];
    free(old);
    return true;
}

/* With room reserved. */
static void own(vm_snapshot *s, vm_region *r, uint64_t page, uint8_t *bytes)
{
    s->owned[slot_of(s, r, page)] = (vm_owned){ .region = r, .page = page, .bytes = bytes };
    s->owned_count++;
    s->bytes += bytes == vm_zero_page ? 0 : PAGE;
}

static uint8_t *copy_page(const uint8_t *from)
{
    if (vm_page_is_zero(from))
        return (uint8_t *)(uintptr_t)vm_zero_page;
    uint8_t *copy = aligned_alloc(64, PAGE);
    if (!copy)
        vm_fail(VM_E_NOMEM, "no memory for a snapshot's pages");
    else
        memcpy(copy, from, PAGE);
    return copy;
}

static bool own_copy(vm_snapshot *s, vm_region *r, uint64_t page)
{
    if (!reserve_owned(s, 1))
        return false;
    uint8_t *copy = copy_page(r->host + page * PAGE);
    if (copy)
        own(s, r, page, copy);
    return copy != NULL;
}

/* Contents of a page in snapshot s: somebody's copy, or NULL: the image has it. */
static uint8_t *resolve(const vm_snapshot *s, const vm_region *r, uint64_t page)
{
    for (; s; s = s->parent) {
        uint8_t *bytes = find_owned(s, r, page);
        if (bytes)
            return bytes;
    }
    return NULL;
}

const uint8_t *vm_snap_page(const vm_snapshot *s, const vm_kept *k, uint64_t page)
{
    const uint8_t *bytes = resolve(s, k->region, page);
    return bytes ? bytes : vm_image_page(k->image, page);
}

/* ---- what a snapshot holds besides RAM ---- */

vm_kept *vm_snap_find(const vm_snapshot *s, const vm_region *r)
{
    size_t low = 0, high = s->kept_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (s->kept[middle].region == r)
            return &s->kept[middle];
        if ((uintptr_t)s->kept[middle].region < (uintptr_t)r)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static int by_region(const void *a, const void *b)
{
    uintptr_t x = (uintptr_t)((const vm_kept *)a)->region, y = (uintptr_t)((const vm_kept *)b)->region;
    return x < y ? -1 : x > y;
}

void vm_snap_sort(vm_snapshot *s)
{
    qsort(s->kept, s->kept_count, sizeof *s->kept, by_region);
}

int vm_snap_new(vm_machine *m, vm_snapshot **out)
{
    vm_snapshot *s = calloc(1, sizeof *s);
    if (s)
        s->cpus = aligned_alloc(64, m->vcpu_count * sizeof *s->cpus);
    if (!s || !s->cpus) {
        free(s);
        return vm_fail(VM_E_NOMEM, "no memory for a snapshot");
    }
    memset(s->cpus, 0, m->vcpu_count * sizeof *s->cpus);
    s->machine = m;
    s->bytes = sizeof *s + m->vcpu_count * sizeof *s->cpus;
    *out = s;
    return VM_OK;
}

static int save_device(vm_snapshot *s, vm_kept *k)
{
    const vm_io_ops *ops = &k->region->ops;
    size_t bytes = 0;
    int status = ops->save(k->region->user, NULL, &bytes);
    if (status < 0)
        return vm_fail(status, "the device at 0x%llx could not tell its state's size",
                       (unsigned long long)k->region->gpa);
    k->device = malloc(bytes ? bytes : 1);
    if (!k->device)
        return vm_fail(VM_E_NOMEM, "no memory for a device's state of %zu bytes", bytes);
    k->device_bytes = bytes;
    status = ops->save(k->region->user, k->device, &k->device_bytes);
    if (status < 0)
        return vm_fail(status, "the device at 0x%llx could not save its state", (unsigned long long)k->region->gpa);
    if (k->device_bytes > bytes)
        return vm_fail(VM_E_INVALID, "the device at 0x%llx saved more than it said", (unsigned long long)k->region->gpa);
    s->bytes += bytes;
    s->needs_devices = true;
    return VM_OK;
}

static int keep_region(vm_snapshot *s, vm_region *r)
{
    vm_kept *k = &s->kept[s->kept_count++];
    *k = (vm_kept){ .region = r, .gpa = r->gpa, .is_enabled = r->is_enabled, .prot = r->prot };
    r->keepers++;
    if (r->page_prot) {
        k->page_prot = malloc(r->bytes / PAGE);
        if (!k->page_prot)
            return vm_fail(VM_E_NOMEM, "no memory for a snapshot's permissions");
        memcpy(k->page_prot, r->page_prot, r->bytes / PAGE);
        s->bytes += r->bytes / PAGE;
    }
    return has_device_state(r) ? save_device(s, k) : VM_OK;
}

static int save_platform(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    if (!m->is_pc)
        return VM_OK;
    int status = vm_pc_save(m, NULL, &s->platform_bytes);
    if (status != VM_OK)
        return status;
    s->platform = malloc(s->platform_bytes);
    if (!s->platform)
        return vm_fail(VM_E_NOMEM, "no memory for the platform's state");
    s->bytes += s->platform_bytes;
    return vm_pc_save(m, s->platform, &s->platform_bytes);
}

int vm_snap_capture(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    int status = VM_OK;
    s->kept = calloc(m->region_count ? m->region_count : 1, sizeof *s->kept);
    if (!s->kept)
        return vm_fail(VM_E_NOMEM, "no memory for a snapshot's regions");
    s->bytes += m->region_count * sizeof *s->kept;
    for (unsigned i = 0; i < m->vcpu_count && status == VM_OK; i++) {
        if (m->backend->leave) {       /* what is open in the host's kernel is finished: all of the state is in x86 */
            m->backend->leave(m->vcpus[i]);
            vm_vcpu_changed(m->vcpus[i], VM_STATE_ALL);
        }
        status = vm_cpu_state_take(m->vcpus[i], &s->cpus[i]);
    }
    s->time_ns = vm_clock_now(m);
    s->tsc = vm_clock_tsc(m);
    vm_replay_mark(m, &s->replay);
    s->event = m->event;
    s->event_code = m->event_code;
    if (status == VM_OK)
        status = save_platform(s);
    for (vm_region *r = m->regions; r && status == VM_OK; r = r->next)
        status = keep_region(s, r);
    vm_snap_sort(s);
    return status;
}

/* The region is in no snapshot any more: end it if it left the map long ago. Device lock held. */
static void unkeep(vm_region *r)
{
    if (--r->keepers || !r->is_parked)
        return;
    r->is_parked = false;
    vm_region_free(r);
}

static void drop_kept(vm_snapshot *s)
{
    for (size_t i = 0; i < s->kept_count; i++) {
        vm_kept *k = &s->kept[i];
        vm_image_drop(k->image);
        free(k->page_prot);
        free(k->device);
        unkeep(k->region);
    }
    free(s->kept);
    s->kept = NULL;
    s->kept_count = 0;
}

void vm_snap_discard(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    for (size_t i = 0; i < s->owned_slots; i++)
        if (s->owned[i].region)
            free_page(s->owned[i].bytes);
    free(s->owned);
    if (s->kept)
        drop_kept(s);
    for (unsigned i = 0; s->cpus && i < m->vcpu_count; i++)
        free(s->cpus[i].io_log);
    free(s->cpus);
    free(s->platform);
    free(s->replay.input);
    free(s);
}

/* ---- putting back all but RAM and map ---- */

int vm_snap_put_platform(vm_machine *m, const vm_snapshot *s)
{
    return m->is_pc ? vm_pc_restore(m, s->platform, s->platform_bytes) : VM_OK;
}

static int put_devices(const vm_snapshot *s)
{
    int status = VM_OK;
    for (size_t i = 0; s->needs_devices && i < s->kept_count && status == VM_OK; i++) {
        const vm_kept *k = &s->kept[i];
        if (!k->device || !k->region->ops.restore)
            continue;
        status = k->region->ops.restore(k->region->user, k->device, k->device_bytes);
        if (status < 0)
            status = vm_fail(status, "the device at 0x%llx did not take its state back", (unsigned long long)k->gpa);
    }
    return status < 0 ? status : VM_OK;
}

/* Linear addresses may mean something else now. */
static void forget_translations(vm_machine *m)
{
    vm_mmu_forget(m);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (m->backend->tlb_flushed)
            m->backend->tlb_flushed(m->vcpus[i]);
}

void vm_snap_put_cpus(vm_machine *m, const vm_snapshot *s)
{
    bool differs = false;
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_vcpu *cpu = m->vcpus[i];
        const vm_cpu_state *c = &s->cpus[i];
        differs |= vm_cpu_state_put(cpu, c);
        cpu->event_seen = m->event_seq - c->has_event;
        if (c->has_event) {
            m->event = s->event;
            m->event_code = s->event_code;
        }
        if (c->has_event | c->init_pending | c->sipi_pending | c->nmis_latched)
            atomic_fetch_or(&cpu->x86.attention, X86_ATT_EVENT);
    }
    if (differs)
        forget_translations(m);
    vm_clock_set(m, s->time_ns, s->tsc);
}

/* ---- tracking begins and ends ---- */

int vm_track_start(vm_machine *m)
{
    if (m->track)
        return VM_OK;
    struct vm_track *t = calloc(1, sizeof *t);
    if (!t)
        return vm_fail(VM_E_NOMEM, "no memory for snapshots");
    m->track = t;
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        m->vcpus[i]->note_count = 0;
        m->vcpus[i]->notes = NULL;
    }
    return VM_OK;
}

static void forget_region(vm_region *r)
{
    vm_image_drop(r->image);
    r->image = NULL;
    free(r->base);
    r->base = NULL;
    for (uint64_t page = 0; r->page_flags && page < r->bytes / PAGE; page++)
        r->page_flags[page] &= (uint8_t)~VM_PAGE_KEPT;
}

void vm_track_stop(vm_machine *m)
{
    struct vm_track *t = m->track;
    if (!t || t->all)
        return;
    for (vm_region *r = m->regions; r; r = r->next)
        forget_region(r);
    if (t->notes)
        munmap(t->notes, list_bytes(m, t->capacity));
    free(t);
    m->track = NULL;
    vm_map_edited(m);                  /* backends may write unseen again */
}

/* ---- the tree ---- */

static void link_in(vm_snapshot *s, vm_snapshot *parent)
{
    struct vm_track *t = s->machine->track;
    s->parent = parent;
    if (parent)
        parent->children++;
    s->next = t->all;
    s->link = &t->all;
    if (s->next)
        s->next->link = &s->next;
    t->all = s;
}

static void link_out(vm_snapshot *s)
{
    *s->link = s->next;
    if (s->next)
        s->next->link = s->link;
    if (s->parent)
        s->parent->children--;
}

int vm_snap_enter(vm_snapshot *s, vm_snapshot *parent)
{
    int status = reserve_notes(s->machine, pages_of(s));
    if (status != VM_OK)
        return status;
    link_in(s, parent);
    s->machine->track->handles++;
    return VM_OK;
}

static vm_snapshot *only_child(const vm_snapshot *s)
{
    vm_snapshot *child = s->machine->track->all;
    while (child->parent != s)
        child = child->next;
    return child;
}

/* The pages of s that its only child has not of its own move there. False: no memory; s stays. */
static bool merge(vm_snapshot *s)
{
    vm_snapshot *child = only_child(s);
    if (!reserve_owned(child, s->owned_count))
        return false;
    for (size_t i = 0; i < s->owned_slots; i++) {
        vm_owned *o = &s->owned[i];
        if (o->region && !find_owned(child, o->region, o->page) && vm_snap_find(child, o->region)) {
            own(child, o->region, o->page, o->bytes);
            o->bytes = (uint8_t *)(uintptr_t)vm_zero_page;
        }
    }
    child->parent = s->parent;
    if (s->parent)
        s->parent->children++;
    return true;
}

/* Snapshots without a handle that nobody needs: s and, after it, its ancestors. */
static void prune(vm_snapshot *s)
{
    while (s && s->is_freed && s != s->machine->track->current && s->children <= 1) {
        vm_snapshot *parent = s->parent;
        if (s->children && !merge(s))
            return;
        link_out(s);
        vm_snap_discard(s);
        s = parent;
    }
}

static void free_all(vm_machine *m)
{
    while (m->track->all) {
        vm_snapshot *s = m->track->all;
        s->parent = NULL;
        link_out(s);
        vm_snap_discard(s);
    }
    m->track->current = NULL;
    vm_track_stop(m);
}

/* Without a handle only the pages can be of use; devices need not wait. */
static void slim(vm_snapshot *s)
{
    size_t left = 0;
    for (size_t i = 0; i < s->kept_count; i++) {
        vm_kept *k = &s->kept[i];
        if (is_ram(k->region)) {
            s->kept[left++] = *k;
        } else {
            free(k->device);
            unkeep(k->region);
        }
    }
    s->kept_count = left;
    free(s->platform);
    free(s->replay.input);
    s->platform = NULL;
    s->replay.input = NULL;
}

void vm_snap_free(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    vm_device_lock(m);
    vm_pause(m);
    s->is_freed = true;
    if (--m->track->handles == 0) {
        free_all(m);
    } else {
        slim(s);
        prune(s);
    }
    vm_resume(m);
    vm_device_unlock(m);
}

void vm_track_destroy(vm_machine *m)
{
    if (!m->track)
        return;
    vm_device_lock(m);
    vm_pause(m);
    free_all(m);
    vm_resume(m);
    vm_device_unlock(m);
}

/* ---- taking ---- */

typedef struct changed { vm_snapshot *s; vm_region *r; bool failed; } changed;

static bool own_changed(void *user, uint64_t page)
{
    changed *c = user;
    c->failed = !own_copy(c->s, c->r, page);
    return !c->failed;
}

/* A region that no snapshot has seen yet. RAM that is a private mapping already has an image: what was written since is
 * the snapshot's own. */
static int first_image(vm_snapshot *s, vm_kept *k)
{
    vm_region *r = k->region;
    changed c = { .s = s, .r = r };
    if (!r->base)
        r->base = calloc(r->bytes / PAGE, sizeof *r->base);
    if (!r->base)
        return vm_fail(VM_E_NOMEM, "no memory for a region's list of pages");
    if (r->backing && vm_image_changed(r->host, r->bytes, own_changed, &c)) {
        k->image = vm_image_ref(r->backing);
        return c.failed ? VM_E_NOMEM : VM_OK;
    }
    k->image = vm_image_copy(r->host, r->bytes, true);
    if (!k->image)
        return VM_E_NOMEM;
    s->bytes += r->bytes;
    return VM_OK;
}

/* Is the page not as the current snapshot has it? One that stays on its list may be. */
static bool is_changed(const vm_note *note)
{
    const vm_region *r = note->region;
    if (!r->image || !note->life)
        return r->image != NULL;
    const uint8_t *base = r->base[note->page] ? r->base[note->page] : vm_image_page(r->image, note->page);
    return memcmp(r->host + note->page * PAGE, base, PAGE) != 0;
}

static int keep_ram(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    size_t *count;
    int status = VM_OK;
    for (size_t i = 0; i < s->kept_count && status == VM_OK; i++) {
        vm_kept *k = &s->kept[i];
        if (is_ram(k->region) && k->region->image)
            k->image = vm_image_ref(k->region->image);
        else if (is_ram(k->region))
            status = first_image(s, k);
    }
    if (status == VM_OK && !reserve_owned(s, count_notes(m)))
        status = VM_E_NOMEM;
    for (unsigned i = 0; i <= m->vcpu_count && status == VM_OK; i++) {
        const vm_note *notes = list_of(m, i, &count);
        for (size_t n = 0; n < *count && status == VM_OK; n++)
            if (is_changed(&notes[n]) && !own_copy(s, notes[n].region, notes[n].page))
                status = VM_E_NOMEM;
    }
    return status;
}

static void protect(vm_machine *m, bool is_all)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        if (is_all)
            vm_mmu_protect_page(m->vcpus[i], UINT64_MAX);
        x86_tlb_protect_noted(&m->vcpus[i]->x86);
    }
}

static void all_kept(vm_region *r)
{
    for (uint64_t page = 0; page < r->bytes / PAGE; page++)
        r->page_flags[page] |= VM_PAGE_KEPT;
}

/* Nothing fails from here on. */
static void become_current(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    bool is_new = false;
    size_t *count;
    for (size_t i = 0; i < s->kept_count; i++) {
        vm_kept *k = &s->kept[i];
        if (!k->image || k->region->image)
            continue;
        k->region->image = vm_image_ref(k->image);
        all_kept(k->region);
        is_new = true;
    }
    for (size_t i = 0; i < s->owned_slots; i++)
        if (s->owned[i].region)
            s->owned[i].region->base[s->owned[i].page] = s->owned[i].bytes;
    for (unsigned i = 0; i <= m->vcpu_count; i++) {
        const vm_note *notes = list_of(m, i, &count);
        for (size_t n = 0; n < *count; n++)
            if (notes[n].region->image)
                notes[n].region->page_flags[notes[n].page] |= VM_PAGE_KEPT;
        *count = 0;
    }
    protect(m, is_new);
    m->track->current = s;
    m->track->map_differs = false;
}

static int take(vm_machine *m, vm_snapshot **out)
{
    vm_snapshot *s = NULL, *parent = NULL;
    bool is_first = !m->track;
    int status = vm_track_start(m);
    if (status == VM_OK)
        status = vm_snap_new(m, &s);
    if (status == VM_OK)
        status = vm_snap_capture(s);
    if (status == VM_OK) {
        if (m->backend->dirty_sync && !is_first)
            m->backend->dirty_sync(m);
        parent = m->track->current;
        status = keep_ram(s);
    }
    if (status == VM_OK)
        status = vm_snap_enter(s, parent);
    if (status != VM_OK) {
        if (s)
            vm_snap_discard(s);
        vm_track_stop(m);
        return status;
    }
    become_current(s);
    if (is_first)
        vm_map_edited(m);              /* backends: no write unseen any more */
    m->track->map_differs = false;
    if (parent)
        prune(parent);
    *out = s;
    return VM_OK;
}

int vm_snap_take(vm_machine *m, vm_snapshot **out)
{
    int status = vm_snap_begin(m, "vm_snapshot_take");
    if (status != VM_OK)
        return status;
    status = take(m, out);
    vm_snap_end(m);
    return status;
}

/* ---- restoring: pages ---- */

/* Bytes from..to of a page with code or page tables change: tell who made something of them. */
static void announce(vm_region *r, uint64_t page, uint64_t from, uint64_t to, unsigned flags)
{
    uint64_t offset = page * PAGE + from;
    if (!r->is_enabled)
        return;
    if (flags & VM_PAGE_CODE)
        vm_page_code_changed(r->machine, NULL, r, offset, to - from);
    if (flags & VM_PAGE_TABLE)
        vm_mmu_table_written(r->machine, NULL, r->gpa + offset);
}

/* Only where the contents differ: what was translated from equal bytes stays good. */
static void put_watched_page(vm_region *r, uint64_t page, uint8_t *to, const uint8_t *from, unsigned flags)
{
    uint64_t begin = PAGE;
    for (uint64_t at = 0; at <= PAGE; at += 8) {
        bool differs = at < PAGE && memcmp(to + at, from + at, 8);
        if (differs) {
            if (begin == PAGE)
                begin = at;
            memcpy(to + at, from + at, 8);
        } else if (begin != PAGE) {
            announce(r, page, begin, at, flags);
            begin = PAGE;
        }
    }
}

/* Returns the page's flags, as they were. */
static inline uint8_t put_bytes(vm_region *r, uint64_t page)
{
    const uint8_t *from = r->base[page];
    uint8_t *to = r->host + page * PAGE;
    uint8_t flags = atomic_load_explicit(&r->page_flags[page], memory_order_relaxed);
    if (!from)
        from = vm_image_page(r->image, page);
    if (__builtin_expect(r->is_read_only, 0))
        ;
    else if (__builtin_expect(flags & (VM_PAGE_CODE | VM_PAGE_TABLE), 0))
        put_watched_page(r, page, to, from, flags);
    else
        memmove(to, from, PAGE);       /* the library's own, see cpustate.c */
    return flags;
}

static inline void keep_page(vm_machine *m, vm_region *r, uint64_t page, uint8_t flags)
{
    flags = (flags & (VM_PAGE_CODE | VM_PAGE_TABLE | VM_PAGE_CLEAN | VM_PAGE_DIRTY)) | VM_PAGE_KEPT;
    if (m->dirty_log)
        flags = (flags & ~VM_PAGE_CLEAN) | VM_PAGE_DIRTY;
    atomic_store_explicit(&r->page_flags[page], flags, memory_order_relaxed);
}

static void put_page(vm_machine *m, vm_region *r, uint64_t page)
{
    keep_page(m, r, page, put_bytes(r, page));
}

static vm_habit *habit_of(struct vm_track *t, const vm_note *note)
{
    return &t->habits[(note->page ^ note->page >> 10) % VM_HABITS];
}

/* For how many restores a page that has been noted stays on its list: the longer it has been noted each time, the more. */
static unsigned life_of(struct vm_track *t, const vm_note *note)
{
    enum { LONGEST = 128 };
    vm_habit *h = habit_of(t, note);
    bool goes_on = h->region == note->region && h->page == note->page && h->round + 1 == t->round;
    unsigned life = !goes_on ? 0 : h->life == 0 ? 2 : h->life < LONGEST ? 2 * h->life : LONGEST;
    *h = (vm_habit){ .region = note->region, .page = note->page, .round = t->round, .life = life };
    return life;
}

/* Another restore of a page on a vCPU's list. True: it stays there. */
static inline bool stays(vm_machine *m, vm_note *note, uint8_t flags)
{
    if (note->life == 1)               /* is it still written each time? */
        habit_of(m->track, note)->round = m->track->round;
    note->life = note->life ? note->life - 1u : life_of(m->track, note);
    return note->life && !m->dirty_log && !(flags & (VM_PAGE_CODE | VM_PAGE_TABLE | VM_PAGE_CLEAN));
}

/* True: pages have become KEPT, so write tags have to go. */
static bool put_noted(vm_machine *m)
{
    size_t *count;
    bool any_kept = false;
    m->track->round++;
    for (unsigned i = 0; i <= m->vcpu_count; i++) {
        vm_note *note = list_of(m, i, &count), *left = note;
        for (const vm_note *end = note + *count; note < end; note++) {
            if (__builtin_expect(note->region->image == NULL, 0))
                continue;
            uint8_t flags = put_bytes(note->region, note->page);
            if (i && stays(m, note, flags)) {
                if (left != note)      /* else whole again what was just changed in part: slow */
                    *left = *note;
                left++;
                continue;
            }
            keep_page(m, note->region, note->page, flags);
            any_kept = true;
        }
        *count = (size_t)(left - list_of(m, i, &count));
    }
    return any_kept;
}

/* Write tags of pages that are KEPT go. */
static void protect_kept(vm_vcpu *cpu)
{
    x86_cpu *x = &cpu->x86;
    uint32_t left = 0;
    if (x->writable_count > X86_WRITABLES) {
        x86_tlb_protect_noted(x);
        return;
    }
    for (uint32_t n = 0; n < x->writable_count; n++) {
        unsigned i = x->writable[n] & (X86_TLB_ENTRIES - 1), ctx = x->writable[n] >> X86_TLB_BITS;
        uint64_t gpa = x->tlb[ctx].meta[i] & X86_PAGE_MASK;
        const vm_range *range = vm_find(cpu, gpa);
        if (range && is_ram(range->region) &&
            !(range->region->page_flags[(gpa - range->gpa + range->offset) / PAGE] & VM_PAGE_KEPT))
            x->writable[left++] = x->writable[n];
        else
            __atomic_store_n(&x->tlb[ctx].e[i].tag_w, X86_TLB_NONE(i), __ATOMIC_RELAXED);
    }
    x->writable_count = left;
}

/* ---- restoring: another snapshot than the current one ---- */

/* Pages of s's that may differ between the current snapshot and the target. */
static void put_owned(const vm_snapshot *s, const vm_snapshot *target)
{
    for (size_t i = 0; i < s->owned_slots; i++) {
        vm_region *r = s->owned[i].region;
        const vm_kept *k = r && r->image ? vm_snap_find(target, r) : NULL;
        if (!k || k->image != r->image)
            continue;
        uint64_t page = s->owned[i].page;
        uint8_t *bytes = resolve(target, r, page);
        if (bytes == r->base[page])
            continue;
        r->base[page] = bytes;
        if (r->page_flags[page] & VM_PAGE_KEPT)          /* else it is noted, and put back with the others */
            put_page(s->machine, r, page);
    }
}

static void put_path(vm_snapshot *from, vm_snapshot *target)
{
    struct vm_track *t = target->machine->track;
    unsigned mark = ++t->mark;
    for (vm_snapshot *s = from; s; s = s->parent)
        s->mark = mark;
    vm_snapshot *common = target;
    for (; common && common->mark != mark; common = common->parent)
        put_owned(common, target);
    for (vm_snapshot *s = from; s != common; s = s->parent)
        put_owned(s, target);
}

/* All of a region: it was out of the map, or under a snapshot of another origin. */
static void put_region(vm_snapshot *s, vm_kept *k)
{
    vm_region *r = k->region;
    vm_machine *m = s->machine;
    vm_mmu_forget(m);                  /* before the flags of its page tables go */
    vm_image_drop(r->image);
    r->image = vm_image_ref(k->image);
    memset(r->base, 0, r->bytes / PAGE * sizeof *r->base);
    for (uint64_t page = 0; page < r->bytes / PAGE; page++)
        r->page_flags[page] = (uint8_t)(VM_PAGE_KEPT | (m->dirty_log ? VM_PAGE_DIRTY : 0));
    if (r->kind == VM_REGION_RAM && vm_image_map(k->image, r->host)) {
        vm_image_drop(r->backing);
        r->backing = vm_image_ref(k->image);
    } else {
        for (uint64_t page = 0; page < r->bytes / PAGE && !r->is_read_only; page++) {
            const uint8_t *from = vm_image_page(k->image, page);
            if (memcmp(r->host + page * PAGE, from, PAGE))
                memcpy(r->host + page * PAGE, from, PAGE);
        }
    }
    for (const vm_snapshot *a = s; a; a = a->parent)
        for (size_t i = 0; i < a->owned_slots; i++) {
            const vm_owned *o = &a->owned[i];
            if (o->region != r || r->base[o->page])
                continue;
            r->base[o->page] = o->bytes;
            if (!r->is_read_only)
                memcpy(r->host + o->page * PAGE, o->bytes, PAGE);
        }
    if (r->is_enabled)
        vm_range_gone(m, r->gpa, r->bytes);
}

/* ---- restoring: the map ---- */

/* The region may be freed before the lists are walked. */
static void drop_notes(const vm_region *r)
{
    size_t *count;
    for (unsigned i = 0; i <= r->machine->vcpu_count; i++) {
        vm_note *notes = list_of(r->machine, i, &count);
        size_t left = 0;
        for (size_t n = 0; n < *count; n++)
            if (notes[n].region != r)
                notes[left++] = notes[n];
        *count = left;
    }
}

bool vm_track_park(vm_region *r)
{
    if (!r->keepers)
        return false;
    drop_notes(r);
    forget_region(r);
    r->is_parked = true;
    r->is_enabled = false;
    return true;
}

void vm_track_map_changed(vm_machine *m)
{
    if (m->track)
        m->track->map_differs = true;
}

/* All that restoring the map may need from the host. */
static int prepare_map(vm_snapshot *s)
{
    int status = vm_region_reserve(s->machine, s->kept_count);
    for (size_t i = 0; i < s->kept_count && status == VM_OK; i++) {
        vm_region *r = s->kept[i].region;
        if (is_ram(r) && !r->base && !(r->base = calloc(r->bytes / PAGE, sizeof *r->base)))
            status = vm_fail(VM_E_NOMEM, "no memory for a region's list of pages");
        if (status == VM_OK && s->kept[i].page_prot && !r->page_prot) {
            r->page_prot = malloc(r->bytes / PAGE);
            if (!r->page_prot)
                status = vm_fail(VM_E_NOMEM, "no memory for a region's permissions");
            else
                memset(r->page_prot, r->prot, r->bytes / PAGE);
        }
    }
    return status;
}

/* Regions that the snapshot does not have go. */
static bool remove_others(vm_snapshot *s)
{
    vm_machine *m = s->machine;
    bool any = false;
    for (vm_region *r = m->regions, *next; r; r = next) {
        next = r->next;
        if (r->is_internal || vm_snap_find(s, r))
            continue;
        vm_region_unlink(r);
        if (r->kind != VM_REGION_PIO)
            vm_range_gone(m, r->gpa, r->bytes);
        if (!vm_track_park(r))
            vm_region_free(r);
        any = true;
    }
    return any;
}

static bool same_prot(const vm_kept *k)
{
    const vm_region *r = k->region;
    if (!k->page_prot)
        return !r->page_prot && r->prot == k->prot;
    return r->page_prot && memcmp(r->page_prot, k->page_prot, r->bytes / PAGE) == 0;
}

static bool put_prot(const vm_kept *k)
{
    vm_region *r = k->region;
    if (same_prot(k))
        return false;
    r->prot = k->prot;
    if (k->page_prot) {
        memcpy(r->page_prot, k->page_prot, r->bytes / PAGE);
    } else {
        free(r->page_prot);
        r->page_prot = NULL;
    }
    if (r->is_enabled)
        vm_range_gone(r->machine, r->gpa, r->bytes);
    return true;
}

/* First everything that moves leaves its place, then all take theirs. */
static void put_map(vm_snapshot *s)
{
    bool differs = remove_others(s);
    for (size_t i = 0; i < s->kept_count; i++) {
        vm_kept *k = &s->kept[i];
        vm_region *r = k->region;
        if (r->is_parked) {
            r->is_parked = false;
            vm_region_relink(r);
            r->is_enabled = false;
            differs = true;
        } else if (r->is_enabled && (!k->is_enabled || r->gpa != k->gpa)) {
            vm_region_take_out(r);
            if (r->kind != VM_REGION_PIO)
                vm_range_gone(s->machine, r->gpa, r->bytes);
            differs = true;
        }
    }
    for (size_t i = 0; i < s->kept_count; i++) {
        vm_kept *k = &s->kept[i];
        vm_region *r = k->region;
        if (k->is_enabled && !r->is_enabled) {
            r->gpa = k->gpa;
            vm_region_put_in(r);
            differs = true;
            if (r->kind != VM_REGION_PIO)
                vm_range_gone(s->machine, r->gpa, r->bytes);
        }
        r->gpa = k->gpa;
        if (is_ram(r))
            differs |= put_prot(k);
    }
    if (differs)
        vm_map_edited(s->machine);
}

static int switch_to(vm_snapshot *s)
{
    struct vm_track *t = s->machine->track;
    vm_snapshot *from = t->current;
    int status = prepare_map(s);
    s->machine->is_touched = true;
    if (status != VM_OK)
        return status;
    if (from != s)
        put_path(from, s);
    if (t->map_differs || from != s)
        put_map(s);
    put_noted(s->machine);
    for (size_t i = 0; i < s->kept_count; i++)
        if (s->kept[i].image && s->kept[i].region->image != s->kept[i].image)
            put_region(s, &s->kept[i]);
    t->current = s;
    t->map_differs = false;
    if (from && from != s)
        prune(from);
    return VM_OK;
}

static int restore(vm_machine *m, vm_snapshot *s)
{
    int status = VM_OK;
    if (m->backend->dirty_sync)
        m->backend->dirty_sync(m);
    if (__builtin_expect(s == m->track->current && !m->track->map_differs, 1))
        put_noted(m);
    else
        status = switch_to(s);
    if (status != VM_OK)
        return status;
    for (unsigned i = 0; i < m->vcpu_count; i++)
        protect_kept(m->vcpus[i]);
    vm_snap_put_cpus(m, s);
    status = vm_snap_put_platform(m, s);
    if (status == VM_OK)
        status = put_devices(s);
    m->track->map_differs = false;     /* devices may have moved regions to where they were */
    return status;
}

/* A fuzzer's round: one vCPU, no devices, the current snapshot. The vCPU is claimed instead of the world stopped. */
static bool restore_quickly(vm_machine *m, vm_snapshot *s)
{
    vm_vcpu *cpu = m->vcpus[0];
    if (m->vcpu_count != 1 || m->is_pc || s->needs_devices || m->poisoned || m->backend->dirty_sync || !vm_vcpu_claim(cpu))
        return false;
    vm_machine_lock(m);
    bool is_current = s == m->track->current && !m->track->map_differs;
    if (is_current) {
        if (put_noted(m))
            protect_kept(cpu);
        vm_snap_put_cpus(m, s);
    }
    vm_machine_unlock(m);
    vm_vcpu_release(cpu);
    return is_current;
}

int vm_snap_restore(vm_machine *m, vm_snapshot *s)
{
    if (restore_quickly(m, s))
        return VM_OK;
    int status = vm_replay_may_return(m, &s->replay);
    if (status == VM_OK)
        status = vm_snap_begin(m, "vm_snapshot_restore");
    if (status != VM_OK)
        return status;
    if (m->replay)
        vm_replay_depart(m);
    status = restore(m, s);
    if (status == VM_OK)
        vm_replay_return(m, &s->replay);
    vm_snap_end(m);
    return status;
}
