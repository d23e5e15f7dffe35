/* devices.c - fuzz target: a guest that programs every device of the PC with the bytes of the input.
 *
 * The input is a list of accesses. Each begins with a byte: bits 0-1 width, bit 2 write, bit 3 memory instead of a port, bit 5
 * take what the interrupt controllers offer, bits 6-7: 1 save and restore the platform, all of 4-7 reset it. Then two bytes pick
 * the port or register, and a write takes as many bytes as it is wide. Running out of bytes ends it.
 *
 * Three ways to run it:
 *   without arguments   a fixed pseudo-random corpus, one test line (part of `make check`)
 *   with files or "-"   each as one input (AFL++: afl-fuzz ... -- tests/fuzz/devices @@)
 *   libFuzzer           configure with CC=clang CFLAGS="-g -O1 -fsanitize=fuzzer-no-link,address,undefined", make fuzz-devices
 */
#include "core/core.h"
#include "platform/pc.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct input { const uint8_t *data; size_t left; } input;

static bool take(input *in, void *to, size_t n)
{
    if (in->left < n)
        return false;
    memcpy(to, in->data, n);
    in->data += n;
    in->left -= n;
    return true;
}

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

static void step(vm_machine *m, uint8_t op, input *in)
{
    uint16_t pick;
    uint64_t value = 0;
    unsigned width = 1u << (op & 3);
    if (!take(in, &pick, 2) || ((op & 4) && !take(in, &value, width)))
        return;
    vm_device_lock(m);
    access_one(m, op & 8, pick, width, op & 4, value);
    if ((op & 0xc0) == 0x40)
        save_and_restore(m);
    if ((op & 0xf0) == 0xf0)
        vm_pc_reset(m);
    vm_device_unlock(m);
    if (op & 0x20)
        take_interrupts(m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    input in = { data, size };
    uint8_t op;
    options.platform = VM_PLATFORM_PC;
    options.backend = VM_BACKEND_INTERP;
    options.ram_bytes = 1 << 20;
    options.vcpus = 2;
    if (vm_create(&options, &m) != VM_OK)
        return 0;
    while (take(&in, &op, 1))
        step(m, op, &in);
    vm_destroy(m);
    return 0;
}

#ifndef VM_LIBFUZZER
static int run_file(const char *path)
{
    static uint8_t bytes[1 << 20];
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) {
        perror(path);
        return 1;
    }
    size_t n = fread(bytes, 1, sizeof bytes, f);
    if (f != stdin)
        fclose(f);
    LLVMFuzzerTestOneInput(bytes, n);
    return 0;
}

int main(int argc, char **argv)
{
    static uint8_t bytes[20000];
    int status = 0;
    uint32_t seed = 1;
    for (int i = 1; i < argc; i++)
        status |= run_file(argv[i]);
    if (argc > 1)
        return status;
    for (unsigned round = 0; round < 200; round++) {
        for (size_t i = 0; i < sizeof bytes; i++) {
            seed = seed * 1664525 + 1013904223;
            bytes[i] = (uint8_t)(seed >> 24);
        }
        LLVMFuzzerTestOneInput(bytes, sizeof bytes);
    }
    puts("ok fuzz.devices");
    return 0;
}
#endif
