/* devices.c - fuzz target: a guest that programs every device of the PC with the bytes of the input.
 *
 * The input is a list of accesses. Each begins with a byte: bits 0-1 width, bit 2 write, bit 3 memory instead of a port, bit 4 the
 * same 24 times, bit 5 take what the interrupt controllers offer, bits 6-7: 1 save and restore the platform, all of 4-7 reset it. Then two bytes pick
 * the port or register, and a write takes as many bytes as it is wide. Running out of bytes ends it.
 */
#include "core/core.h"
#include "fuzz.h"
#include "platform/pc.h"
#include <stdlib.h>
#include <string.h>

const struct fuzz_target fuzz_target = { "devices", 200, 20000 };

static void access_one(vm_machine *m, bool is_memory, uint16_t pick, unsigned width, bool is_write, uint64_t value)
{
    static const uint64_t pages[4] = { VM_PC_APIC, VM_PC_IOAPIC, VM_PC_HPET, VM_PC_APIC };
    vm_view *view = is_memory ? &m->view : &m->ports;
    vm_vcpu *cpu = m->vcpus[pick >> 15];
    uint64_t at;
    if (is_memory) {
        at = pages[pick >> 13 & 3] + (pick & 0xfff);
    } else {
        const vm_range *port = &m->ports.ranges[(pick & 0x7fff) % m->ports.count];
        at = port->gpa + (pick >> 8) % port->bytes;
    }
    const vm_range *range = vm_view_find(view, at);
    if (!range || range->region->kind < VM_REGION_MMIO)
        return;
    vm_region *r = range->region;
    while (at + width > range->gpa + range->bytes || (!is_memory && width > 4))
        width /= 2;
    if (is_write)
        r->ops.write(r->user, cpu, at - range->gpa, width, value);
    else
        r->ops.read(r->user, cpu, at - range->gpa, width, &value);
}

static void save_and_restore(vm_machine *m)
{
    size_t bytes = 0;
    if (vm_pc_save(m, NULL, &bytes) != VM_OK)
        abort();
    uint8_t *state = malloc(bytes);
    if (!state || vm_pc_save(m, state, &bytes) != VM_OK || vm_pc_restore(m, state, bytes) != VM_OK)
        abort();                         /* its own state must always come back */
    free(state);
}

static void take_interrupts(vm_machine *m)
{
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        vm_pc_vcpu_event(m->vcpus[i]);
        if (vm_pc_irq_source.pending(m->vcpus[i]) >= 0)
            vm_pc_irq_source.acknowledge(m->vcpus[i]);
    }
}

static void step(vm_machine *m, uint8_t op, fuzz_input *in)
{
    uint16_t pick;
    uint64_t value = 0;
    unsigned width = 1u << (op & 3);
    if (!fuzz_take(in, &pick, 2) || ((op & 4) && !fuzz_take(in, &value, width)))
        return;
    vm_device_lock(m);
    for (unsigned times = op & 16 ? 24 : 1; times; times--)     /* as REP OUTS and INS do */
        access_one(m, op & 8, pick, width, op & 4, value);
    if ((op & 0xc0) == 0x40)
        save_and_restore(m);
    if ((op & 0xf0) == 0xf0)
        vm_pc_reset(m);
    vm_device_unlock(m);
    if (op & 0x20)
        take_interrupts(m);
}

/* A PC as it was made. It is kept, since making one takes longer than an input, and put back before each. */
static vm_machine *fresh_machine(void)
{
    static vm_machine *m;
    static uint8_t *state;
    static size_t bytes;
    if (!m) {
        vm_options options = VM_OPTIONS_INIT;
        options.platform = VM_PLATFORM_PC;
        options.backend = VM_BACKEND_INTERP;
        options.ram_bytes = 1 << 20;
        options.vcpus = 2;
        if (vm_create(&options, &m) != VM_OK || vm_pc_save(m, NULL, &bytes) != VM_OK || !(state = malloc(bytes)) ||
            vm_pc_save(m, state, &bytes) != VM_OK)
            abort();
    }
    vm_device_lock(m);
    if (vm_pc_restore(m, state, bytes) != VM_OK)
        abort();
    vm_device_unlock(m);
    return m;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vm_machine *m = fresh_machine();
    fuzz_input in = { data, size };
    uint8_t op;
    while (fuzz_take(&in, &op, 1))
        step(m, op, &in);
    return 0;
}
