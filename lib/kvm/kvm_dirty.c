/* kvm_dirty.c - which pages the guest wrote: KVM's knowledge brought to the regions' page flags.
 *
 * Where KVM offers dirty rings each vCPU has one, and looking costs the pages written; else each slot has a bitmap, and
 * looking costs the size of memory. The choice is made before the first vCPU, and with rings KVM refuses to give
 * bitmaps. Slots log only while vm_dirty_log is on.
 *
 * A ring entry belongs to KVM until its flag says dirty, to us until we flag it for reset; after KVM_RESET_DIRTY_RINGS
 * the page is write-protected again. A write between the two is part of what the caller of vm_dirty_fetch sees. A full
 * ring (KVM_EXIT_DIRTY_RING_FULL) is emptied by its vCPU. KVM looks whether a ring is nearly full once an entry to the
 * guest and keeps 64 entries in reserve, which hosts that emulate hundreds of instructions an entry overrun, losing
 * pages: rings are only used where guest ring 0 runs on the CPU.
 */
#include "core/track.h"
#include "kvm/kvm.h"

#include <stdlib.h>
#include <sys/mman.h>

#define RING_ENTRIES 4096u
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif

static void mark_dirty(vm_machine *m, uint64_t gpa)
{
    const vm_range *r = vm_view_find(&m->view, gpa);
    if (!r || !r->region->page_flags) return;
    uint64_t page = (r->offset + (gpa - r->gpa)) >> 12;
    uint8_t old = atomic_load_explicit(&r->region->page_flags[page], memory_order_relaxed), now;
    do {
        now = (uint8_t)(old & ~(VM_PAGE_CLEAN | VM_PAGE_KEPT));
        if (m->dirty_log) now |= VM_PAGE_DIRTY;
    } while (!atomic_compare_exchange_weak(&r->region->page_flags[page], &old, now));
    if (old & VM_PAGE_KEPT) vm_track_note(m, NULL, r->region, page);
}

/* ---- rings ---- */

void kvm_dirty_choose(kvm_machine *km)
{
    const uint64_t bytes = RING_ENTRIES * sizeof(struct kvm_dirty_gfn);
    static const uint32_t kinds[] = {KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING};
    for (unsigned i = 0; i < 2 && !km->ring_entries && !km->emulates_ring0; i++) {
        struct kvm_enable_cap cap = {.cap = kinds[i], .args = {bytes}};
        int most = kvm_ioctl(km->vm_fd, KVM_CHECK_EXTENSION, (void *)(uintptr_t)kinds[i]);
        if (most > 0 && (uint64_t)most >= bytes && kvm_ioctl(km->vm_fd, KVM_ENABLE_CAP, &cap) == 0)
            km->ring_entries = RING_ENTRIES;
    }
}

int kvm_dirty_ring_map(kvm_vcpu *kv)
{
    size_t bytes = kv->km->ring_entries * sizeof *kv->ring;
    if (!bytes) return VM_OK;
    kv->ring = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, kv->fd, KVM_DIRTY_LOG_PAGE_OFFSET * 4096);
    if (kv->ring != MAP_FAILED) return VM_OK;
    kv->ring = NULL;
    return vm_fail_errno(VM_E_HOST, "mmap of a vCPU's dirty ring");
}

void kvm_dirty_ring_unmap(kvm_vcpu *kv)
{
    if (kv->ring) munmap(kv->ring, kv->km->ring_entries * sizeof *kv->ring);
}

static unsigned harvest(kvm_vcpu *kv)
{
    kvm_machine *km = kv->km;
    unsigned taken = 0;
    for (; taken < km->ring_entries; taken++, kv->ring_next++) {
        struct kvm_dirty_gfn *g = &kv->ring[kv->ring_next % km->ring_entries];
        if (!(__atomic_load_n(&g->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY)) break;
        unsigned slot = g->slot & 0xffff;
        uint64_t offset = g->offset * 4096;
        if (slot < km->slot_count && offset < km->slots[slot].bytes)
            mark_dirty(kv->cpu->machine, km->slots[slot].gpa + offset);
        __atomic_store_n(&g->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
    return taken;
}

static void sync_rings(vm_machine *m)
{
    kvm_machine *km = kvm_machine_of(m);
    unsigned taken = 0;
    pthread_mutex_lock(&km->lock);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (kvm_vcpu_of(m->vcpus[i])) taken += harvest(kvm_vcpu_of(m->vcpus[i]));
    if (taken) kvm_ioctl(km->vm_fd, KVM_RESET_DIRTY_RINGS, NULL);
    pthread_mutex_unlock(&km->lock);
}

/* ---- bitmaps ---- */

static void sync_slot(vm_machine *m, unsigned number, const kvm_slot *s)
{
    uint64_t pages = s->bytes / 4096, *bits = calloc((pages + 63) / 64, sizeof *bits);
    struct kvm_dirty_log log = {.slot = number, .dirty_bitmap = bits};
    bool is_known = bits && kvm_ioctl(kvm_machine_of(m)->vm_fd, KVM_GET_DIRTY_LOG, &log) == 0;
    for (uint64_t page = 0; page < pages; page++)
        if (!is_known || bits[page / 64] >> page % 64 & 1)
            mark_dirty(m, s->gpa + page * 4096);
        else if (!bits[page / 64])
            page |= 63;
    free(bits);
}

void kvm_dirty_sync(vm_machine *m)
{
    kvm_machine *km = kvm_machine_of(m);
    if (km->ring_entries) {
        sync_rings(m);
        return;
    }
    for (unsigned i = 0; i < km->slot_count; i++)
        if (km->slots[i].bytes && (km->slots[i].flags & KVM_MEM_LOG_DIRTY_PAGES)) sync_slot(m, i, &km->slots[i]);
}
