/* rig.h - a bench for single devices: a BARE machine whose time only moves when the test says so, ports and device memory
 * poked as a vCPU would, and wires that end in a recorder. */
#ifndef LIBVM_TESTS_RIG_H
#define LIBVM_TESTS_RIG_H
#include "test.h"
#include "core/core.h"
#include "dev/dev.h"

typedef struct rig {
    vm_machine *m;
    bool level[32];
    unsigned rises[32];
    vm_line_state state;             /* what devices are told about their wire */
} rig;

static inline void rig_set(void *target, unsigned pin, bool level)
{
    rig *r = target;
    if (level && !r->level[pin])
        r->rises[pin]++;
    r->level[pin] = level;
}

static inline vm_line_state rig_state(void *target, unsigned pin)
{
    (void)pin;
    return ((rig *)target)->state;
}

static inline vm_line rig_wire(rig *r, unsigned pin) { return (vm_line){ rig_set, r, pin, rig_state }; }

static inline void rig_new_vcpus(rig *r, unsigned vcpus)
{
    vm_options options = VM_OPTIONS_INIT;
    options.backend = VM_BACKEND_INTERP;
    options.vcpus = vcpus;
    memset(r, 0, sizeof *r);
    OK(vm_create(&options, &r->m));
}
static inline void rig_new(rig *r) { rig_new_vcpus(r, 1); }
static inline void rig_free(rig *r) { vm_destroy(r->m); }

static inline uint64_t rig_access(rig *r, vm_view *view, unsigned cpu, uint64_t at, unsigned width, bool is_write, uint64_t value)
{
    uint64_t v = ~UINT64_C(0);
    vm_device_lock(r->m);
    const vm_range *range = vm_view_find(view, at);
    if (!range)
        FAIL("nothing at 0x%" PRIx64, at);
    vm_region *region = range->region;
    if (is_write)
        region->ops.write(region->user, r->m->vcpus[cpu], at - range->gpa, width, value);
    else
        region->ops.read(region->user, r->m->vcpus[cpu], at - range->gpa, width, &v);
    vm_device_unlock(r->m);
    return width == 8 ? v : v & ((UINT64_C(1) << 8 * width) - 1);
}

static inline uint8_t inb(rig *r, uint16_t port) { return (uint8_t)rig_access(r, &r->m->ports, 0, port, 1, false, 0); }
static inline uint16_t inw(rig *r, uint16_t port) { return (uint16_t)rig_access(r, &r->m->ports, 0, port, 2, false, 0); }
static inline uint32_t inl(rig *r, uint16_t port) { return (uint32_t)rig_access(r, &r->m->ports, 0, port, 4, false, 0); }
static inline void outb(rig *r, uint16_t port, uint8_t v) { rig_access(r, &r->m->ports, 0, port, 1, true, v); }
static inline void outw(rig *r, uint16_t port, uint16_t v) { rig_access(r, &r->m->ports, 0, port, 2, true, v); }
static inline void outl(rig *r, uint16_t port, uint32_t v) { rig_access(r, &r->m->ports, 0, port, 4, true, v); }
static inline uint32_t peek(rig *r, unsigned cpu, uint64_t gpa) { return (uint32_t)rig_access(r, &r->m->view, cpu, gpa, 4, false, 0); }
static inline void poke(rig *r, unsigned cpu, uint64_t gpa, uint32_t v) { rig_access(r, &r->m->view, cpu, gpa, 4, true, v); }
static inline uint64_t peek8(rig *r, uint64_t gpa) { return rig_access(r, &r->m->view, 0, gpa, 8, false, 0); }
static inline void poke8(rig *r, uint64_t gpa, uint64_t v) { rig_access(r, &r->m->view, 0, gpa, 8, true, v); }
static inline void pass(rig *r, uint64_t ns) { vm_clock_advance(r->m, ns); }
#define MS UINT64_C(1000000)
#define SECOND UINT64_C(1000000000)

/* Save, disturb by `reset`, restore: what a device says afterwards must be what it said before. */
static inline void rig_save_restore(rig *r, vm_view *view, uint64_t at)
{
    vm_region *region = vm_view_find(view, at)->region;
    size_t bytes = 0;
    OK(region->ops.save(region->user, NULL, &bytes));
    uint8_t *state = malloc(bytes + 1);
    OK(region->ops.save(region->user, state, &bytes));
    region->ops.reset(region->user);
    OK(region->ops.restore(region->user, state, bytes));
    REFUSED(region->ops.restore(region->user, state, bytes - 1), VM_E_FORMAT);
    state[0] ^= 0x55;
    REFUSED(region->ops.restore(region->user, state, bytes), VM_E_FORMAT);
    state[0] ^= 0x55;
    OK(region->ops.restore(region->user, state, bytes));
    free(state);
}
#endif
