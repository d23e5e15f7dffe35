/* doorbell.c - writes that ring an eventfd, eventfds that interrupt, collected writes: the same on every backend. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <errno.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define CODE  0x1000
#define DEVICE 0x40000000u

static vm_machine *machine(vm_backend backend, const void *code, size_t bytes)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_regs r = VM_REGS_INIT;
    o.backend = backend;
    o.cpu_model = "kvm";
    uint64_t has_kvm = 0;
    OK(vm_query(VM_BACKEND_KVM, "available", &has_kvm));
    if (!has_kvm)
        o.cpu_model = NULL;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    OK(vm_write(m, CODE, code, bytes));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT32));
    OK(vm_vcpu_get_regs(vm_vcpu_get(m, 0), &r));
    r.rip = CODE;
    r.rdi = DEVICE;
    r.rdx = 0x50;
    r.rax = 0x11223344;
    r.rcx = 10;
    OK(vm_vcpu_set_regs(vm_vcpu_get(m, 0), &r));
    return m;
}
#define MACHINE(...) machine(backend, (const uint8_t[]){ __VA_ARGS__ }, sizeof(const uint8_t[]){ __VA_ARGS__ })

static int run(vm_machine *m, vm_exit *e)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    o.deadline_ns = TEST_SECONDS(20);
    *e = (vm_exit)VM_EXIT_INIT;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), &o, e));
    return e->reason;
}

static void again(vm_machine *m)
{
    uint64_t rip = CODE, rcx = 10;
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RCX, &rcx, 8));
}

static int bell(void)
{
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static uint64_t rings(int fd)
{
    uint64_t n = 0;
    return read(fd, &n, 8) == 8 ? n : 0;
}

static int fail_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    ++*(unsigned *)user;
    return 0;
}

/* out dx,al ten times; mov [edi],eax ten times; hlt */
#define RING_BOTH 0xee, 0x89, 0x07, 0xff, 0xc9, 0x75, 0xf9, 0xf4

EACH_BACKEND(writes_ring_without_a_callback)
{
    vm_machine *m = MACHINE(RING_BOTH);
    unsigned calls = 0;
    vm_io_ops ops = { .size = sizeof ops, .write = fail_write };
    vm_doorbell port = VM_DOORBELL_INIT, memory = VM_DOORBELL_INIT;
    vm_exit e;
    port.fd = bell(), port.address = 0x50, port.width = 1, port.is_port = true;
    memory.fd = bell(), memory.address = DEVICE, memory.width = 4;
    OK(vm_map_mmio(m, DEVICE, 0x1000, &ops, &calls, NULL));
    OK(vm_ioeventfd(m, &port, true));
    OK(vm_ioeventfd(m, &memory, true));
    CHECK_EQ(run(m, &e), VM_EXIT_HALT);
    CHECK_EQ(rings(port.fd), 10);
    CHECK_EQ(rings(memory.fd), 10);
    CHECK_EQ(calls, 0);
    uint64_t exits = 0;
    OK(vm_stats(m, "kvm-exits", &exits));
    CHECK(exits < 10);                                 /* 20 writes: the kernel rang */
    OK(vm_ioeventfd(m, &memory, false));
    again(m);
    CHECK_EQ(run(m, &e), VM_EXIT_HALT);
    CHECK_EQ(calls, 10);
    CHECK_EQ(rings(port.fd), 10);
    CHECK_EQ(rings(memory.fd), 0);
    OK(vm_ioeventfd(m, &port, false));
    again(m);
    CHECK_EQ(run(m, &e), VM_EXIT_IO);
    CHECK_EQ(e.io.port, 0x50);
    vm_destroy(m);
    close(port.fd);
    close(memory.fd);
}

EACH_BACKEND(width_and_value_choose_the_bell)
{
    /* mov [edi],al; mov [edi],ax; mov [edi],eax; inc eax; mov [edi],eax; mov [edi+4],eax; mov ebx,[edi]; hlt */
    vm_machine *m = MACHINE(0x88, 0x07, 0x66, 0x89, 0x07, 0x89, 0x07, 0x40, 0x89, 0x07, 0x89, 0x47, 0x04, 0x8b, 0x1f, 0xf4);
    int fds[4];
    vm_exit e;
    vm_doorbell d = VM_DOORBELL_INIT;
    d.address = DEVICE;
    for (unsigned i = 0; i < 4; i++) {
        d.fd = fds[i] = bell();
        d.width = (const uint32_t[]){ 1, 4, 4, 0 }[i];
        d.has_match = i == 1 || i == 2;
        d.match = i == 1 ? 0x11223344 : 0x11223345;
        OK(vm_ioeventfd(m, &d, true));
        REFUSED(vm_ioeventfd(m, &d, true), VM_E_EXISTS);
        CHECK(close(dup(d.fd)) == 0);
    }
    CHECK_EQ(run(m, &e), VM_EXIT_UNMAPPED);            /* another address */
    CHECK_EQ(e.mmio.gpa, DEVICE + 4);
    for (unsigned i = 0; i < 4; i++)
        CHECK_EQ(rings(fds[i]), 1);                    /* the last: the 2-byte write, left to any width */
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);              /* reads do not ring */
    CHECK(!e.mmio.is_write && e.mmio.gpa == DEVICE);
    vm_destroy(m);
    for (unsigned i = 0; i < 4; i++)
        close(fds[i]);
}

EACH_BACKEND(bells_outlive_the_callers_descriptor_and_move)
{
    vm_machine *m = MACHINE(RING_BOTH);
    vm_doorbell d = VM_DOORBELL_INIT;
    vm_exit e;
    uint64_t has_kvm = 0;
    int watch = bell();
    OK(vm_query(VM_BACKEND_KVM, "available", &has_kvm));
    d.width = 1, d.is_port = true, d.address = 0x50, d.fd = dup(watch);
    OK(vm_ioeventfd(m, &d, true));
    close(d.fd);
    d.width = 4, d.is_port = false, d.address = DEVICE, d.fd = watch;
    OK(vm_ioeventfd(m, &d, true));
    for (unsigned i = 0; i < 4; i++) {
        OK(vm_backend_select(m, i & 1 ? VM_BACKEND_INTERP : has_kvm ? VM_BACKEND_KVM : backend));
        again(m);
        CHECK_EQ(run(m, &e), VM_EXIT_HALT);
        CHECK_EQ(rings(watch), 20);
    }
    vm_destroy(m);
    close(watch);
}

EACH_BACKEND(a_full_bell_stops_nobody)
{
    vm_machine *m = MACHINE(RING_BOTH);
    vm_doorbell d = VM_DOORBELL_INIT;
    vm_exit e;
    const uint64_t full = UINT64_MAX - 1;
    d.width = 1, d.is_port = true, d.address = 0x50, d.fd = eventfd(0, EFD_CLOEXEC);
    OK(vm_map_ram(m, DEVICE, 0x1000, VM_PROT_RW, NULL));
    OK(vm_ioeventfd(m, &d, true));
    CHECK(write(d.fd, &full, 8) == 8);
    CHECK_EQ(run(m, &e), VM_EXIT_HALT);
    vm_destroy(m);
    close(d.fd);
}

EACH_BACKEND(bad_bells)
{
    vm_machine *m = MACHINE(0xf4);
    vm_doorbell d = VM_DOORBELL_INIT;
    int pipes[2];
    CHECK(pipe(pipes) == 0);
    REFUSED(vm_ioeventfd(NULL, &d, true), VM_E_INVALID);
    REFUSED(vm_ioeventfd(m, NULL, true), VM_E_INVALID);
    d.fd = pipes[1];
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    d.fd = -1;
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    d.fd = bell();
    for (unsigned width = 3; width < 8; width += 2) {
        d.width = width;
        REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    }
    d.width = 16;
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    d.width = 8, d.is_port = true;
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    d.width = 1, d.address = 0x10000;
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    d.address = 1, d.width = 0, d.has_match = true;
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_INVALID);
    d.has_match = false;
    REFUSED(vm_ioeventfd(m, &d, false), VM_E_NOTFOUND);
    for (unsigned i = 0; i < VM_MAX_DOORBELLS; i++) {
        d.address = i;
        OK(vm_ioeventfd(m, &d, true));
    }
    d.address = VM_MAX_DOORBELLS;
    REFUSED(vm_ioeventfd(m, &d, true), VM_E_HOST);
    REFUSED(vm_irqfd(m, d.fd, 4, true), VM_E_UNSUPPORTED);
    REFUSED(vm_irqfd_msi(m, d.fd, 0xfee00000, 0), VM_E_UNSUPPORTED);
    REFUSED(vm_irqfd(NULL, d.fd, 4, true), VM_E_INVALID);
    vm_destroy(m);
    close(d.fd);
}

/* ---- collected writes ---- */

typedef struct device {
    unsigned writes, reads, at_read;
    uint32_t last;
    bool is_disordered;
} device;

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    device *d = user;
    (void)cpu;
    d->is_disordered |= offset != 0 || width != 4 || (d->writes && value != d->last - 1);
    d->last = (uint32_t)value;
    d->writes++;
    return 0;
}

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    device *d = user;
    (void)cpu, (void)offset, (void)width;
    d->reads++;
    d->at_read = d->writes;
    *value = d->writes;
    return 0;
}

static const vm_io_ops device_ops = { .size = sizeof(vm_io_ops), .read = device_read, .write = device_write };

EACH_BACKEND(collected_writes_arrive_in_order)
{
    /* loop: mov [edi],ecx; dec ecx; jnz; mov eax,[edi+8]; mov [edi],ecx; hlt */
    vm_machine *m = MACHINE(0x89, 0x0f, 0x49, 0x75, 0xfb, 0x8b, 0x47, 0x08, 0x89, 0x0f, 0xf4);
    enum { WRITES = 1000 };
    device d = { 0 };
    vm_region *r;
    vm_exit e;
    uint64_t rcx = WRITES, rax = 0, exits = 0;
    OK(vm_map_mmio(m, DEVICE, 0x1000, &device_ops, &d, &r));
    OK(vm_coalesce(m, r, 0, 4, true));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RCX, &rcx, 8));
    CHECK_EQ(run(m, &e), VM_EXIT_HALT);
    CHECK_EQ(d.at_read, WRITES);                       /* all of them before the read */
    CHECK_EQ(d.writes, WRITES + 1);                    /* and the last before the run returned */
    CHECK(!d.is_disordered);
    OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), VM_REG_RAX, &rax, 8));
    CHECK_EQ(rax, WRITES);
    OK(vm_stats(m, "kvm-exits", &exits));
    if (backend == VM_BACKEND_KVM)
        CHECK(exits < WRITES / 2);
    OK(vm_coalesce(m, r, 0, 4, false));
    uint64_t before = exits;
    again(m);
    CHECK_EQ(run(m, &e), VM_EXIT_HALT);
    CHECK_EQ(d.writes, WRITES + 1 + 11);
    OK(vm_stats(m, "kvm-exits", &exits));
    if (backend == VM_BACKEND_KVM)
        CHECK(exits - before > 10);
    OK(vm_coalesce(m, r, 0, 4, true));
    OK(vm_unmap(m, r));                                /* its range goes along */
    again(m);
    CHECK_EQ(run(m, &e), VM_EXIT_UNMAPPED);
    CHECK_EQ(d.writes, WRITES + 1 + 11);
    vm_destroy(m);
}

EACH_BACKEND(collected_port_writes)
{
    /* mov eax,ecx; out dx,eax; loop; in al,dx; hlt */
    vm_machine *m = MACHINE(0x89, 0xc8, 0xef, 0xe2, 0xfb, 0xec, 0xf4);
    device d = { 0 };
    vm_region *r;
    vm_exit e;
    OK(vm_map_pio(m, 0x50, 4, &device_ops, &d, &r));
    OK(vm_coalesce(m, r, 0, 4, true));
    CHECK_EQ(run(m, &e), VM_EXIT_HALT);
    CHECK_EQ(d.writes, 10);
    CHECK_EQ(d.at_read, 10);
    CHECK(!d.is_disordered);
    vm_destroy(m);
}

EACH_BACKEND(bad_ranges_to_collect)
{
    vm_machine *m = MACHINE(0xf4), *other = MACHINE(0xf4);
    vm_region *r, *mute, *ram, *foreign;
    vm_io_ops silent = { .size = sizeof silent, .read = device_read };
    OK(vm_map_mmio(m, DEVICE, 0x1000, &device_ops, NULL, &r));
    OK(vm_map_mmio(m, DEVICE + 0x1000, 0x1000, &silent, NULL, &mute));
    OK(vm_map_ram(m, 0x100000, 0x1000, VM_PROT_RW, &ram));
    OK(vm_map_mmio(other, DEVICE, 0x1000, &device_ops, NULL, &foreign));
    REFUSED(vm_coalesce(NULL, r, 0, 4, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, NULL, 0, 4, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, foreign, 0, 4, true), VM_E_NOTFOUND);
    REFUSED(vm_coalesce(m, mute, 0, 4, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, ram, 0, 4, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, r, 0, 0, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, r, 0x1000, 4, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, r, 0xffc, 5, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, r, 4, UINT64_MAX, true), VM_E_INVALID);
    REFUSED(vm_coalesce(m, r, 0, 4, false), VM_E_NOTFOUND);
    OK(vm_coalesce(m, r, 0x10, 0x10, true));
    REFUSED(vm_coalesce(m, r, 0x1f, 4, true), VM_E_EXISTS);
    OK(vm_coalesce(m, r, 0x20, 4, true));
    OK(vm_coalesce(m, r, 0x10, 0x10, false));
    vm_destroy(m);
    vm_destroy(other);
}

/* ---- interrupts ---- */

/* Real mode: PIC 1 at vector 8, only line 4 open; count at 0x7000 in the handler; wait for 5. */
static const uint8_t count_irq4[] = {
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x60, 0xc7, 0x06, 0x30, 0x00, 0x00, 0x7e, 0xa3, 0x32, 0x00,
    0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x08, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21, 0xb0, 0xef, 0xe6, 0x21,
    0xc7, 0x06, 0x02, 0x70, 0x01, 0x00, 0xfb, 0xf4, 0x83, 0x3e, 0x00, 0x70, 0x05, 0x75, 0xf8, 0xfa, 0xf4,
};
static const uint8_t handler[] = { 0x50, 0xff, 0x06, 0x00, 0x70, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf };

static void *run_one(void *arg)
{
    vm_exit e = VM_EXIT_INIT;
    return vm_vcpu_run(arg, NULL, &e) == VM_OK ? (void *)(uintptr_t)e.reason : NULL;
}

static unsigned peek16(vm_machine *m, uint64_t gpa)
{
    uint16_t v = 0;
    OK(vm_read(m, gpa, &v, 2));
    return v;
}

EACH_BACKEND(eventfds_interrupt)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m;
    uint64_t rip = 0x7c00;
    pthread_t thread;
    void *reason;
    int fd = bell(), other = bell();
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 16 << 20;
    OK(vm_create(&o, &m));
    OK(vm_write(m, 0x7c00, count_irq4, sizeof count_irq4));
    OK(vm_write(m, 0x7e00, handler, sizeof handler));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL));
    OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
    REFUSED(vm_irqfd(m, fd, 24, true), VM_E_INVALID);
    REFUSED(vm_irqfd(m, -1, 4, true), VM_E_INVALID);
    REFUSED(vm_irqfd(m, fd, 4, false), VM_E_NOTFOUND);
    REFUSED(vm_irqfd_msi(m, fd, 0x1000, 0), VM_E_INVALID);
    OK(vm_irqfd(m, fd, 4, true));
    REFUSED(vm_irqfd(m, fd, 5, true), VM_E_EXISTS);
    OK(vm_irqfd(m, other, 3, true));
    OK(vm_irqfd(m, other, 0, false));
    OK(vm_irqfd_msi(m, other, 0xfee00000, 0x40));
    OK(vm_irqfd(m, other, 0, false));
    CHECK(pthread_create(&thread, NULL, run_one, vm_vcpu_get(m, 0)) == 0);
    while (peek16(m, 0x7002) != 1)
        usleep(100);
    for (unsigned i = 0; i < 5; i++) {
        CHECK(eventfd_write(other, 1) == 0);           /* nothing listens */
        CHECK(eventfd_write(fd, 1) == 0);
        for (unsigned wait = 0; peek16(m, 0x7000) != i + 1; wait++) {
            CHECK(wait < 200000);
            usleep(50);
        }
    }
    pthread_join(thread, &reason);
    CHECK_EQ((uintptr_t)reason, VM_EXIT_HALT);
    CHECK_EQ(rings(fd), 0);
    vm_destroy(m);
    CHECK(eventfd_write(fd, 1) == 0);
    CHECK_EQ(rings(fd), 1);                            /* nobody reads it any more */
    close(fd);
    close(other);
}
