/* bus.c - guest accesses that are not plain RAM accesses: device memory, ports, holes, forbidden and observed writes.
 *
 * Called on the vCPU's thread in VM_GUEST. The region is looked up with the device lock held, because waiting for the
 * lock may let an edit through. One access is one callback at its true width; widths a callback cannot have (3, 5, 6,
 * 7) and accesses across a region's end are split, lowest address first. What nobody answers is an exit on BARE
 * machines and all ones (writes: nothing) on a PC.
 */
#include "core/replay.h"
#include "core/doorbell.h"
#include "x86/access.h"

#include <string.h>

static uint64_t ones(unsigned n)
{
    return n >= 8 ? ~UINT64_C(0) : (UINT64_C(1) << 8 * n) - 1;
}

/* The largest callback width for the first part of n bytes with `room` bytes before the region's end. */
static unsigned part_width(unsigned n, uint64_t room)
{
    unsigned width = 8;
    while (width > n || width > room)
        width /= 2;
    return width;
}

static void trace_access(vm_vcpu *cpu, const char *what, uint64_t at, unsigned width, uint64_t value, int status)
{
    vm_trace_line(cpu->machine, VM_TRACE_MMIO, "cpu%u %s 0x%llx width %u value 0x%llx rip 0x%llx%s", cpu->index, what,
                  (unsigned long long)at, width, (unsigned long long)(value & ones(width)),
                  (unsigned long long)cpu->x86.rip, status == X86_IO_DONE ? "" : " (nobody)");
}

static int ask(vm_vcpu *cpu, vm_region *r, uint64_t offset, unsigned width, uint64_t *value)
{
    if (!r->ops.read)
        return X86_IO_EXIT;
    uint64_t v = ~UINT64_C(0);
    r->busy++;
    int status = r->ops.read(r->user, cpu, offset, width, &v);
    vm_region_leave(r);
    *value = v & ones(width);
    return status < 0 ? X86_IO_EXIT : X86_IO_DONE;
}

static int tell(vm_vcpu *cpu, vm_region *r, uint64_t offset, unsigned width, uint64_t value)
{
    if (!r->ops.write)
        return X86_IO_EXIT;
    r->busy++;
    int status = r->ops.write(r->user, cpu, offset, width, value & ones(width));
    vm_region_leave(r);
    return status < 0 ? X86_IO_EXIT : X86_IO_DONE;
}

/* The same; what devices of the program answer is recorded, and comes from the record. */
static int call_read(vm_vcpu *cpu, vm_region *r, uint64_t offset, unsigned width, uint64_t *value)
{
    bool is_outside = cpu->machine->replay && !r->is_internal;
    int status;
    if (is_outside && vm_replay_answer(cpu, VM_LOG_READ, value, &status))
        return status;
    status = ask(cpu, r, offset, width, value);
    if (is_outside)
        vm_replay_answered(cpu, VM_LOG_READ, *value, status);
    return status;
}

static int call_write(vm_vcpu *cpu, vm_region *r, uint64_t offset, unsigned width, uint64_t value)
{
    bool is_outside = cpu->machine->replay && !r->is_internal;
    int status;
    if (is_outside && vm_replay_answer(cpu, VM_LOG_WROTE, NULL, &status))
        return status;
    status = tell(cpu, r, offset, width, value);
    if (is_outside)
        vm_replay_answered(cpu, VM_LOG_WROTE, 0, status);
    return status;
}

/* ---- memory ---- */

/* What an access to nothing does; X86_IO_EXIT for the caller, or all ones. */
static int nobody(vm_vcpu *cpu, unsigned n, uint64_t *value)
{
    if (!cpu->machine->is_pc)
        return X86_IO_EXIT;
    if (value)
        *value = ones(n);
    return X86_IO_DONE;
}

static int read_part(vm_vcpu *cpu, uint64_t gpa, unsigned n, unsigned access, unsigned *width, uint64_t *value)
{
    const vm_range *range = vm_find(cpu, gpa);
    *width = 1;
    if (!range) {
        *width = part_width(n, 8);
        return nobody(cpu, *width, value);
    }
    vm_region *r = range->region;
    uint64_t offset = gpa - range->gpa;
    *width = part_width(n, range->bytes - offset);
    if (r->kind == VM_REGION_MMIO)
        return call_read(cpu, r, offset, *width, value);
    if (!(vm_region_prot(r, offset) & access))
        return nobody(cpu, *width, value);
    *value = 0;
    memcpy(value, r->host + offset, *width);
    return X86_IO_DONE;
}

static int write_part(vm_vcpu *cpu, uint64_t gpa, unsigned n, unsigned *width, uint64_t value)
{
    const vm_range *range = vm_find(cpu, gpa);
    if (!range) {
        *width = part_width(n, 8);
        return nobody(cpu, *width, NULL);
    }
    vm_region *r = range->region;
    uint64_t offset = gpa - range->gpa;
    *width = part_width(n, range->bytes - offset);
    if (r->kind == VM_REGION_MMIO)
        return call_write(cpu, r, offset, *width, value);
    if (!(vm_region_prot(r, offset) & VM_PROT_W))
        return nobody(cpu, *width, NULL);
    memcpy(r->host + offset, &value, *width);
    vm_page_written(cpu->machine, cpu, r, offset, *width);
    return X86_IO_DONE;
}

/* Whose access is it where `range` was found: the program's own, when a BARE machine has nothing there. No lock is needed to
 * look, because maps do not change while a vCPU is in the guest. */
static bool is_callers(const vm_vcpu *cpu, const vm_range *range)
{
    return !range && !cpu->machine->is_pc;
}

/* What nearly every access is: one callback. */
static bool is_one_call(const vm_range *range, uint64_t at, unsigned n)
{
    return range && range->region->kind >= VM_REGION_MMIO && !(n & (n - 1)) && n <= range->bytes - (at - range->gpa);
}

static int read_parts(vm_vcpu *cpu, uint64_t gpa, unsigned n, unsigned access, uint64_t *value)
{
    unsigned width;
    int status = X86_IO_DONE;
    for (unsigned done = 0; done < n && status == X86_IO_DONE; done += width) {
        uint64_t part = 0;
        status = read_part(cpu, gpa + done, n - done, access, &width, &part);
        *value |= (part & ones(width)) << 8 * done;
    }
    return status;
}

static int read_device(vm_vcpu *cpu, uint64_t gpa, unsigned n, unsigned access, uint64_t *value)
{
    vm_device_lock(cpu->machine);
    const vm_range *range = vm_find(cpu, gpa);
    int status = is_one_call(range, gpa, n) ? call_read(cpu, range->region, gpa - range->gpa, n, value)
                                            : read_parts(cpu, gpa, n, access, value);
    vm_device_unlock(cpu->machine);
    return status;
}

int vm_bus_read(vm_vcpu *cpu, uint64_t gpa, unsigned n, unsigned access, uint64_t *value)
{
    *value = 0;
    int status = is_callers(cpu, vm_find(cpu, gpa)) ? X86_IO_EXIT : read_device(cpu, gpa, n, access, value);
    cpu->x86.stat[X86_STAT_MMIO]++;
    if (vm_trace_mask(cpu->machine) & VM_TRACE_MMIO)
        trace_access(cpu, "read", gpa, n, *value, status);
    return status;
}

/* A store to RAM that only has to be seen (code, dirty log) needs no device lock. */
static bool write_ram(vm_vcpu *cpu, const vm_range *range, uint64_t gpa, unsigned n, uint64_t value)
{
    if (!range || range->region->kind > VM_REGION_FILE || range->bytes - (gpa - range->gpa) < n ||
        !(vm_region_prot(range->region, gpa - range->gpa) & VM_PROT_W))
        return false;
    vm_region *r = range->region;
    uint64_t offset = gpa - range->gpa;
    x86_copy_to_host(r->host + offset, (const uint8_t *)&value, n);
    vm_page_written(cpu->machine, cpu, r, offset, n);
    return true;
}

static int write_parts(vm_vcpu *cpu, uint64_t gpa, unsigned n, uint64_t value)
{
    unsigned width;
    int status = X86_IO_DONE;
    for (unsigned done = 0; done < n && status == X86_IO_DONE; done += width)
        status = write_part(cpu, gpa + done, n - done, &width, value >> 8 * done);
    return status;
}

static int write_device(vm_vcpu *cpu, uint64_t gpa, unsigned n, uint64_t value)
{
    vm_device_lock(cpu->machine);
    const vm_range *range = vm_find(cpu, gpa);
    int status = is_one_call(range, gpa, n) ? call_write(cpu, range->region, gpa - range->gpa, n, value)
                                            : write_parts(cpu, gpa, n, value);
    vm_device_unlock(cpu->machine);
    return status;
}

int vm_bus_write(vm_vcpu *cpu, uint64_t gpa, unsigned n, uint64_t value)
{
    const vm_range *range = vm_find(cpu, gpa);
    cpu->x86.stat[X86_STAT_MMIO]++;
    if (write_ram(cpu, range, gpa, n, value) ||
        (cpu->machine->events && vm_doorbell_ring(cpu->machine, false, gpa, n, value)))
        return X86_IO_DONE;
    int status = is_callers(cpu, range) ? X86_IO_EXIT : write_device(cpu, gpa, n, value);
    if (vm_trace_mask(cpu->machine) & VM_TRACE_MMIO)
        trace_access(cpu, "write", gpa, n, value, status);
    return status;
}

/* ---- ports ---- */

static const vm_range *find_port(vm_vcpu *cpu, uint16_t port)
{
    vm_range *last = &cpu->last_port;
    if (port - last->gpa < last->bytes)
        return last;
    const vm_range *r = vm_view_find(&cpu->machine->ports, port);
    if (r)
        *last = *r;
    return r;
}

static int port_part(vm_vcpu *cpu, uint16_t port, unsigned n, bool is_write, unsigned *width, uint64_t *value)
{
    const vm_range *range = find_port(cpu, port);
    if (!range) {
        *width = cpu->machine->is_pc ? 1 : part_width(n, 8);         /* the next port may have a device again */
        return nobody(cpu, *width, is_write ? NULL : value);
    }
    *width = part_width(n, range->bytes - (port - range->gpa));
    if (is_write)
        return call_write(cpu, range->region, port - range->gpa, *width, *value);
    return call_read(cpu, range->region, port - range->gpa, *width, value);
}

static int port_parts(vm_vcpu *cpu, uint16_t port, unsigned n, bool is_write, uint64_t *value)
{
    uint64_t result = 0;
    unsigned width;
    int status = X86_IO_DONE;
    for (unsigned done = 0; done < n && status == X86_IO_DONE; done += width) {
        uint64_t part = is_write ? *value >> 8 * done : 0;
        status = port_part(cpu, (uint16_t)(port + done), n - done, is_write, &width, &part);
        if (!is_write)
            result |= (part & ones(width)) << 8 * done;
    }
    if (!is_write)
        *value = result;
    return status;
}

static int port_device(vm_vcpu *cpu, uint16_t port, unsigned n, bool is_write, uint64_t *value)
{
    int status;
    vm_device_lock(cpu->machine);
    const vm_range *range = find_port(cpu, port);
    if (!is_one_call(range, port, n))
        status = port_parts(cpu, port, n, is_write, value);
    else if (is_write)
        status = call_write(cpu, range->region, port - range->gpa, n, *value);
    else
        status = call_read(cpu, range->region, port - range->gpa, n, value);
    vm_device_unlock(cpu->machine);
    return status;
}

static int port_access(vm_vcpu *cpu, uint16_t port, unsigned n, bool is_write, uint64_t *value)
{
    if (is_write && cpu->machine->events && vm_doorbell_ring(cpu->machine, true, port, n, *value)) {
        cpu->x86.stat[X86_STAT_IO]++;
        return X86_IO_DONE;
    }
    int status = is_callers(cpu, find_port(cpu, port)) ? X86_IO_EXIT : port_device(cpu, port, n, is_write, value);
    cpu->x86.stat[X86_STAT_IO]++;
    if (vm_trace_mask(cpu->machine) & VM_TRACE_MMIO)
        trace_access(cpu, is_write ? "out" : "in", port, n, *value, status);
    return status;
}

int vm_bus_in(vm_vcpu *cpu, uint16_t port, unsigned n, uint64_t *value)
{
    return port_access(cpu, port, n, false, value);
}

int vm_bus_out(vm_vcpu *cpu, uint16_t port, unsigned n, uint64_t value)
{
    return port_access(cpu, port, n, true, &value);
}
