/* doorbell.c - the functions of <libvm/device.h> that work with eventfds and collected writes. */
#include "api/api.h"
#include "core/doorbell.h"

#define IRQ_LINES 24u

VM_API int vm_ioeventfd(vm_machine *m, const vm_doorbell *doorbell, bool on)
{
    vm_doorbell d;
    VM_CHECK_NULL("vm_ioeventfd", m);
    VM_CHECK(vm_struct_in(&d, sizeof d, doorbell, "vm_ioeventfd", "doorbell"));
    if (d.width > 8 || (d.width & (d.width - 1)) || (d.is_port && d.width > 4))
        return vm_fail(VM_E_INVALID, "vm_ioeventfd: no write is %u bytes wide", d.width);
    if (d.has_match && !d.width)
        return vm_fail(VM_E_INVALID, "vm_ioeventfd: a match needs a width");
    if (d.address > (d.is_port ? 0xffff : m->vcpus[0]->x86.phys_mask))
        return vm_fail(VM_E_INVALID, "vm_ioeventfd: no address 0x%llx", (unsigned long long)d.address);
    return vm_doorbell_set(m, &d, on);
}

static int check_irqfd(vm_machine *m, const char *function)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "%s: m is NULL", function);
    if (!m->is_pc)
        return vm_fail(VM_E_UNSUPPORTED, "%s: a BARE machine has no interrupt controller (use vm_vcpu_inject)", function);
    return VM_OK;
}

VM_API int vm_irqfd(vm_machine *m, int fd, unsigned gsi, bool on)
{
    VM_CHECK(check_irqfd(m, "vm_irqfd"));
    if (on && gsi >= IRQ_LINES)
        return vm_fail(VM_E_INVALID, "vm_irqfd: no line %u", gsi);
    return vm_irqfd_set(m, fd, false, gsi, 0, on);
}

VM_API int vm_irqfd_msi(vm_machine *m, int fd, uint64_t address, uint32_t data)
{
    VM_CHECK(check_irqfd(m, "vm_irqfd_msi"));
    if (address >> 20 != 0xfee)
        return vm_fail(VM_E_INVALID, "vm_irqfd_msi: 0x%llx is not in 0xFEExxxxx", (unsigned long long)address);
    return vm_irqfd_set(m, fd, true, address, data, true);
}

VM_API int vm_coalesce(vm_machine *m, vm_region *r, uint64_t offset, uint64_t bytes, bool on)
{
    VM_CHECK_NULL("vm_coalesce", m);
    VM_CHECK_NULL("vm_coalesce", r);
    vm_machine_lock(m);
    int status = VM_OK;
    if (!vm_region_is_known(m, r))
        status = vm_fail(VM_E_NOTFOUND, "vm_coalesce: the machine has no region %p", (void *)r);
    else if ((r->kind != VM_REGION_MMIO && r->kind != VM_REGION_PIO) || r->is_internal || !r->ops.write)
        status = vm_fail(VM_E_INVALID, "vm_coalesce: the region at 0x%llx has no write callback",
                         (unsigned long long)r->gpa);
    else if (!bytes || offset >= r->bytes || bytes > r->bytes - offset)
        status = vm_fail(VM_E_INVALID, "vm_coalesce: 0x%llx + 0x%llx is not inside the region",
                         (unsigned long long)offset, (unsigned long long)bytes);
    else
        status = vm_zone_set(m, r, offset, bytes, on);
    vm_machine_unlock(m);
    return status;
}
