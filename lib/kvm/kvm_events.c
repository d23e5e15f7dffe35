/* kvm_events.c - doorbells rung and writes collected by the host's kernel.
 *
 * What the kernel does not take (too many, an old kernel) exits and is served by the bus as on every backend, so nothing
 * here fails. Collected writes lie in one ring for the machine, behind the shared page of each vCPU; it is emptied whenever
 * KVM comes back, before anything else of that exit is done, which keeps every callback in order.
 */
#include "kvm/kvm.h"

#include <string.h>
#include <sys/ioctl.h>

void kvm_doorbell(vm_machine *m, const vm_doorbell *d, int fd, bool on)
{
    int vm = kvm_machine_of(m)->vm_fd;
    struct kvm_ioeventfd e = {.addr = d->address,
                              .len = d->width,
                              .fd = fd,
                              .datamatch = d->match,
                              .flags = (d->is_port ? KVM_IOEVENTFD_FLAG_PIO : 0) |
                                       (d->has_match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) |
                                       (on ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN)};
    if (d->width || kvm_ioctl(vm, KVM_CHECK_EXTENSION, (void *)(uintptr_t)KVM_CAP_IOEVENTFD_ANY_LENGTH) > 0)
        kvm_ioctl(vm, KVM_IOEVENTFD, &e);
}

void kvm_coalesce(vm_machine *m, bool is_port, uint64_t at, uint64_t bytes, bool on)
{
    kvm_machine *km = kvm_machine_of(m);
    struct kvm_coalesced_mmio_zone z = {.addr = at, .size = (uint32_t)bytes, .pio = is_port};
    if (!km->coalesced_page || bytes > UINT32_MAX || (is_port && !km->can_coalesce_ports)) return;
    if (kvm_ioctl(km->vm_fd, on ? KVM_REGISTER_COALESCED_MMIO : KVM_UNREGISTER_COALESCED_MMIO, &z) == 0 && on)
        km->collects = true;
}

/* The kernel adds at `last` under a lock of its own; `first` is ours, under the device lock. */
void kvm_collected(kvm_vcpu *kv)
{
    kvm_machine *km = kv->km;
    struct kvm_coalesced_mmio_ring *ring = (void *)((uint8_t *)kv->run + km->coalesced_page);
    const uint32_t most = (4096 - sizeof *ring) / sizeof ring->coalesced_mmio[0];
    x86_cpu *x = &kv->cpu->x86;
    if (!km->collects || ring->first == __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE)) return;
    vm_device_lock(kv->cpu->machine);
    while (ring->first != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE)) {
        struct kvm_coalesced_mmio e = ring->coalesced_mmio[ring->first % most];
        uint64_t value = 0;
        unsigned n = e.len <= 8 ? e.len : 8;
        memcpy(&value, e.data, n);
        __atomic_store_n(&ring->first, (ring->first + 1) % most, __ATOMIC_RELEASE);
        if (e.pio)
            (void)x->env->port_out(x, (uint16_t)e.phys_addr, n, value);
        else
            (void)x->env->phys_write(x, e.phys_addr, 0, n, value);
    }
    vm_device_unlock(kv->cpu->machine);
}
