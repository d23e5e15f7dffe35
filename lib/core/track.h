/* track.h - what snapshots add to a machine: images of memory, notes of first writes, the tree of snapshots.
 *
 * Image. The contents that a region of RAM had when snapshots first saw it: a copy, or the file it was loaded from.
 * Never written to again, shared by snapshots and clones, counted.
 *
 * Tree. Each snapshot's parent is the one that the state descended from when it was taken; `track->current` is what the
 * present state descends from. A snapshot owns copies of the pages written between its parent and itself; what neither it
 * nor any ancestor owns is in the image. So the contents of a page in a snapshot are found by walking up.
 *
 * Notes. A page with VM_PAGE_KEPT is as `current` has it; the first write takes the flag and puts the page on a list, of
 * the vCPU that wrote, or the machine's (under machine->lock). region->base[page] is where current's contents are, NULL:
 * in the image. So a restore of `current` walks the lists and copies. Invariant: base[] describes what is in RAM for each
 * page of a region with an image that has VM_PAGE_KEPT, and what to put there for the others.
 *
 * Regions that some snapshot contains (keepers > 0) are not freed when they leave the map: they are parked, without an
 * image, so that bringing them back copies all of them.
 */
#ifndef LIBVM_TRACK_H
#define LIBVM_TRACK_H

#include "core/core.h"
#include "core/cpustate.h"

#define VM_SNAP_PAGE UINT64_C(4096)

/* ---- images (image.c) ---- */
typedef struct vm_image {
    _Atomic unsigned refs;
    int fd;                            /* what can be mapped again; -1: memory only */
    uint64_t offset;                   /* in fd */
    uint64_t bytes;
    const uint8_t *view;               /* readable, always there */
    uint64_t *present;                 /* a bit a page that is not all zeros; NULL: not known */
} vm_image;
vm_image *vm_image_copy(const uint8_t *host, uint64_t bytes, bool is_mappable);   /* NULL: message set (VM_E_NOMEM) */
vm_image *vm_image_new(uint64_t bytes, uint8_t **writable);                       /* zeros, to be filled; then seal */
void vm_image_seal(vm_image *image);
vm_image *vm_image_of_file(int fd, uint64_t offset, uint64_t bytes);              /* duplicates fd */
vm_image *vm_image_ref(vm_image *image);
void vm_image_drop(vm_image *image);                                              /* NULL is fine */
/* Replace [host, host + image->bytes) by a private mapping of the image. False: not possible, nothing changed. */
bool vm_image_map(const vm_image *image, uint8_t *host);
/* Pages of a private mapping that differ from what is mapped: fn(user, page) for each, ascending. False: cannot tell. */
bool vm_image_changed(const uint8_t *host, uint64_t bytes, bool (*fn)(void *user, uint64_t page), void *user);
bool vm_page_is_zero(const uint8_t *page);
extern const uint8_t vm_zero_page[4096];
/* Contents of a page; not by touching holes, which would fill them. */
static inline const uint8_t *vm_image_page(const vm_image *image, uint64_t page)
{
    return image->present && !(image->present[page / 64] >> page % 64 & 1) ? vm_zero_page
                                                                            : image->view + page * VM_SNAP_PAGE;
}

/* ---- notes ---- */
struct vm_note { vm_region *region; uint64_t page : 56, life : 8; };      /* life: restores that leave it on its list */

/* Pages that are written between each two restores stay on the list, and writable, for a while: their first write is no
 * event then. They are put back whether they were written or not. What is known of the pages written of late: */
enum { VM_HABITS = 1024 };
typedef struct vm_habit { const vm_region *region; uint64_t page, round; unsigned life; } vm_habit;

/* ---- snapshots ---- */
typedef struct vm_owned { vm_region *region; uint64_t page; uint8_t *bytes; } vm_owned;   /* bytes may be vm_zero_page */
typedef struct vm_kept {               /* a region as the snapshot has it */
    vm_region *region;
    vm_image *image;                   /* RAM kinds */
    uint64_t gpa;
    bool is_enabled;
    vm_prot prot;
    uint8_t *page_prot;
    void *device;                      /* what vm_io_ops.save gave */
    size_t device_bytes;
} vm_kept;

struct vm_snapshot {
    vm_machine *machine;
    vm_snapshot *parent, *next, **link;    /* next, link: all of the machine */
    unsigned children;
    bool is_freed;                     /* its handle is gone; others need its pages */
    unsigned mark;
    vm_kept *kept;                     /* by region address */
    size_t kept_count;
    vm_owned *owned;                   /* open addressing; region NULL: empty */
    size_t owned_slots, owned_count;
    vm_cpu_state *cpus;                /* [vcpu_count] */
    bool needs_devices;                /* some device has something to restore */
    void *platform; size_t platform_bytes;
    uint64_t time_ns, tsc;             /* guest time, guest TSC */
    int event; uint64_t event_code;
    vm_replay_place replay;            /* where in a replay it was taken */
    uint64_t bytes;                    /* host memory it holds */
};

struct vm_track {
    vm_snapshot *current, *all;
    unsigned handles;                  /* snapshots whose handle lives */
    unsigned mark;                     /* the last one given out */
    bool map_differs;                  /* edited since `current` */
    vm_note *notes; size_t capacity;   /* the machine's list and behind it each vCPU's, `capacity` entries each */
    size_t note_count;                 /* of the machine's */
    uint64_t round;                    /* counts restores */
    vm_habit habits[VM_HABITS];        /* by page */
};

/* The first write to a page with VM_PAGE_KEPT; whoever cleared the flag calls it. by NULL: under machine->lock. */
void vm_track_note(vm_machine *m, vm_vcpu *by, vm_region *r, uint64_t page);
/* A vCPU is about to write through a pointer: true when the page may be written directly now. */
bool vm_track_write(vm_vcpu *cpu, uint64_t gpa);
/* A region leaves the map (world stopped). True: snapshots keep it, it must not be freed. */
bool vm_track_park(vm_region *r);
void vm_track_map_changed(vm_machine *m);
void vm_track_destroy(vm_machine *m);      /* with the machine */

/* ---- for lib/api: arguments are checked there ---- */
int vm_snap_take(vm_machine *m, vm_snapshot **out);
int vm_snap_restore(vm_machine *m, vm_snapshot *s);
void vm_snap_free(vm_snapshot *s);
int vm_snap_save(vm_snapshot *s, int fd, unsigned flags);
int vm_snap_save_file(vm_snapshot *s, const char *path, unsigned flags);
int vm_snap_load(vm_machine *m, int fd, unsigned flags, vm_snapshot **out);
int vm_snap_load_file(vm_machine *m, const char *path, unsigned flags, vm_snapshot **out);
int vm_machine_fork(vm_machine *m, vm_machine **out);

/* ---- shared by snapshot.c, snapfile.c and fork.c ---- */
int vm_snap_new(vm_machine *m, vm_snapshot **out);               /* an empty one, not in the tree */
int vm_snap_capture(vm_snapshot *s);                             /* all but RAM: CPUs, devices, map, time */
void vm_snap_discard(vm_snapshot *s);                            /* one that is not in the tree (any more) */
void vm_snap_put_cpus(vm_machine *m, const vm_snapshot *s);      /* and time */
int vm_snap_put_platform(vm_machine *m, const vm_snapshot *s);   /* after them */
vm_kept *vm_snap_find(const vm_snapshot *s, const vm_region *r);
void vm_snap_sort(vm_snapshot *s);                               /* kept[], for the above */
const uint8_t *vm_snap_page(const vm_snapshot *s, const vm_kept *k, uint64_t page);
int vm_snap_begin(vm_machine *m, const char *function);          /* stop the world with nobody running; VM_E_BUSY */
void vm_snap_end(vm_machine *m);
int vm_track_start(vm_machine *m);                               /* make m->track if there is none */
void vm_track_stop(vm_machine *m);                               /* take it away again if no snapshot is there */
int vm_snap_enter(vm_snapshot *s, vm_snapshot *parent);          /* into the tree: it has a handle now */

/* ---- memory.c, for these ---- */
void vm_region_unlink(vm_region *r);                             /* out of view and lists; keeps everything else */
int vm_region_reserve(vm_machine *m, size_t regions);            /* room in all views */
void vm_region_relink(vm_region *r);                             /* into all lists but the view */
void vm_region_take_out(vm_region *r);                           /* of the view only */
void vm_region_put_in(vm_region *r);
void vm_region_free(vm_region *r);                               /* a RAM region out of all lists */
void vm_range_gone(vm_machine *m, uint64_t gpa, uint64_t bytes);
void vm_map_edited(vm_machine *m);

#endif
