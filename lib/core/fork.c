/* fork.c - a copy of a machine in the same process.
 *
 * RAM goes into images of which both sides have private mappings: the kernel copies a page when one of them writes.
 * The parent's memory moves there at its first fork, keeping its host addresses, so nothing that points into it
 * notices; pages that it wrote since (the kernel's page map knows) are copied into each further clone, until there are
 * so many that a new image is better. Everything else is made as vm_create() does and then put into the parent's state,
 * as if restored from a snapshot.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/track.h"
#include "mmu/mmu.h"
#include "platform/pc.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE VM_SNAP_PAGE
#define MANY 256u                      /* pages written since the last image: then make a new one */
#define SMALL (128u << 10)             /* regions that are copied */

static bool is_ram(const vm_region *r)
{
    return r->kind <= VM_REGION_FILE;
}

/* ---- the parent's memory ---- */

struct vm_changed_pages { unsigned count; uint64_t page[MANY + 1]; };

static bool collect(void *user, uint64_t page)
{
    struct vm_changed_pages *p = user;
    p->page[p->count++] = page;
    return p->count <= MANY;
}

/* Make r->backing what is in memory but for the pages in r->changed. No backing afterwards: copy all. */
static void freeze(vm_region *r)
{
    if (r->kind != VM_REGION_RAM || r->bytes < SMALL)
        return;
    if (!r->changed)
        r->changed = calloc(1, sizeof *r->changed);
    else if (r->backing && !r->machine->is_touched)
        return;                        /* as at the last fork */
    if (r->changed)
        r->changed->count = 0;
    if (r->backing && r->changed && vm_image_changed(r->host, r->bytes, collect, r->changed) && r->changed->count <= MANY)
        return;
    if (r->changed)
        r->changed->count = 0;
    vm_image *image = vm_image_copy(r->host, r->bytes, true);
    bool is_mapped = image && vm_image_map(image, r->host);
    if (!is_mapped) {
        vm_image_drop(image);
        image = NULL;
    }
    if (is_mapped || r->backing)
        vm_image_drop(r->backing);
    r->backing = image;
}

/* r's contents and permissions to the clone's region. */
static int copy_memory(vm_region *r, vm_region *to)
{
    freeze(r);
    if (r->backing && vm_image_map(r->backing, to->host)) {
        to->backing = vm_image_ref(r->backing);
        for (unsigned i = 0; r->changed && i < r->changed->count; i++)
            memcpy(to->host + r->changed->page[i] * PAGE, r->host + r->changed->page[i] * PAGE, PAGE);
    } else {
        for (uint64_t at = 0; at < r->bytes; at += PAGE)
            if (!vm_page_is_zero(r->host + at) || !vm_page_is_zero(to->host + at))
                memcpy(to->host + at, r->host + at, PAGE);
    }
    to->prot = r->prot;
    if (r->page_prot) {
        free(to->page_prot);
        to->page_prot = malloc(r->bytes / PAGE);
        if (!to->page_prot)
            return vm_fail(VM_E_NOMEM, "vm_fork: no memory for permissions");
        memcpy(to->page_prot, r->page_prot, r->bytes / PAGE);
    }
    return VM_OK;
}

/* ---- the clone's map ---- */

static int clone_ram(vm_machine *c, vm_region *r)
{
    void *host = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (host == MAP_FAILED)
        return vm_fail_errno(VM_E_NOMEM, "vm_fork: memory");
    vm_region proto = { .kind = VM_REGION_RAM, .gpa = r->gpa, .bytes = r->bytes, .host = host, .prot = r->prot };
    vm_region *to;
    int status = vm_region_add(c, &proto, &to);
    if (status != VM_OK) {
        munmap(host, r->bytes);
        return status;
    }
    return copy_memory(r, to);
}

static int clone_device(vm_machine *c, const vm_region *r, const vm_kept *k)
{
    vm_region proto = { .kind = r->kind, .gpa = r->gpa, .bytes = r->bytes, .prot = r->prot,
                        .ops = { .size = sizeof proto.ops } };
    if (r->ops.clone) {
        int status = r->ops.clone(r->user, c, &proto.user);
        if (status < 0)
            return vm_fail(status, "vm_fork: the device at 0x%llx could not be copied", (unsigned long long)r->gpa);
        proto.ops = r->ops;
    }
    vm_region *to;
    int status = vm_region_add(c, &proto, &to);
    if (status != VM_OK) {
        if (proto.ops.destroy)
            proto.ops.destroy(proto.user);
        return status;
    }
    if (!proto.ops.restore || !k->device)
        return VM_OK;
    vm_device_lock(c);
    status = proto.ops.restore(proto.user, k->device, k->device_bytes);
    vm_device_unlock(c);
    return status < 0 ? vm_fail(status, "vm_fork: the copy of the device at 0x%llx did not take its state",
                                (unsigned long long)r->gpa) : VM_OK;
}

static vm_region *next_internal(vm_region *r)
{
    while (r && !r->is_internal)
        r = r->next;
    return r;
}

/* Both platforms made their regions in the same order. */
static int match_platform(vm_machine *m, vm_machine *c)
{
    vm_region *r = next_internal(m->regions), *to = next_internal(c->regions);
    int status = VM_OK;
    for (; r && to && status == VM_OK; r = next_internal(r->next), to = next_internal(to->next)) {
        if ((is_ram(r) ? !is_ram(to) : r->kind != to->kind) || r->bytes != to->bytes)
            return vm_fail(VM_E_INTERNAL, "vm_fork: the platforms differ at 0x%llx", (unsigned long long)r->gpa);
        if (is_ram(r))
            status = copy_memory(r, to);
        else if (r->gpa != to->gpa || r->is_enabled != to->is_enabled)
            status = vm_region_move(to, r->gpa, r->is_enabled);
    }
    if (status == VM_OK && (r || to))
        status = vm_fail(VM_E_INTERNAL, "vm_fork: the platforms differ");
    return status;
}

static int clone_regions(vm_machine *m, vm_machine *c, const vm_snapshot *s)
{
    int status = match_platform(m, c);
    vm_region *last = m->regions;
    while (last && last->next)
        last = last->next;
    for (vm_region *r = m->regions; r && status == VM_OK; r = r->next)
        if (!r->is_internal)
            status = is_ram(r) ? clone_ram(c, r) : clone_device(c, r, vm_snap_find(s, r));
    return status;
}

/* ---- the rest ---- */

static uint32_t everything(void *user, uint32_t leaf, uint32_t sub, unsigned reg)
{
    return UINT32_MAX;
}

/* A CPU that was made for another backend than the one it is on now. */
static int clone_model(vm_machine *m, vm_machine *c)
{
    c->tsc_is_host = m->tsc_is_host;
    c->tsc_hz = m->tsc_hz;
    if (m->own_model && !c->own_model) {
        c->own_model = x86_model_cut(m->own_model, everything, NULL);
        if (!c->own_model)
            return vm_fail(VM_E_NOMEM, "vm_fork: no memory for a CPU model");
    }
    for (unsigned i = 0; i < c->vcpu_count; i++) {
        c->vcpus[i]->x86.model = c->own_model ? c->own_model : m->vcpus[i]->x86.model;
        c->vcpus[i]->x86.phys_mask = m->vcpus[i]->x86.phys_mask;
        c->vcpus[i]->x86.tsc_khz = m->vcpus[i]->x86.tsc_khz;
    }
    return VM_OK;
}

static int put_state(vm_machine *m, vm_machine *c, const vm_snapshot *s)
{
    int status = vm_snap_begin(c, "vm_fork");
    if (status != VM_OK)
        return status;
    status = m->is_pc ? vm_pc_copy_firmware(m, c) : VM_OK;
    if (status == VM_OK) {
        vm_snap_put_cpus(c, s);
        status = vm_snap_put_platform(c, s);
    }
    for (vm_region *r = c->regions; r; r = r->next)      /* code and tables of what creation has put there */
        if (is_ram(r) && r->is_enabled)
            vm_range_gone(c, r->gpa, r->bytes);
    vm_map_edited(c);
    vm_snap_end(c);
    return status;
}

static int fork_machine(vm_machine *m, vm_machine **out)
{
    vm_snapshot *s = NULL;
    vm_options o = m->options;
    o.cpu_model = m->cpu_model;
    o.ram_private = false;             /* memory of its own, */
    o.ram_advice &= ~(unsigned)VM_ADVICE_PREFAULT;       /* which will be mapped */
    o.mmu = m->options.backend != VM_BACKEND_KVM && m->mmu ? m->mmu->name : NULL;
    vm_machine *c = NULL;
    int status = vm_snap_new(m, &s);
    if (status == VM_OK)
        status = vm_snap_capture(s);
    if (status == VM_OK)
        status = vm_machine_create(&o, &c);
    if (status == VM_OK)
        status = clone_model(m, c);
    if (status == VM_OK)
        status = clone_regions(m, c, s);
    if (status == VM_OK) {
        atomic_store(&m->is_touched, false);
        status = put_state(m, c, s);
    }
    if (s)
        vm_snap_discard(s);
    if (status != VM_OK && c)
        vm_machine_destroy(c);
    else
        *out = c;
    return status;
}

int vm_machine_fork(vm_machine *m, vm_machine **out)
{
    int status = vm_snap_begin(m, "vm_fork");
    if (status != VM_OK)
        return status;
    status = fork_machine(m, out);
    vm_snap_end(m);
    return status;
}
