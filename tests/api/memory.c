/* memory.c - the memory map: what may be mapped where, what may be read, and every misuse. */
#define _GNU_SOURCE
#include <libvm/libvm.h>
#include "test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

static vm_machine *make_bare(void)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = VM_BACKEND_INTERP;
    OK(vm_create(&o, &m));
    return m;
}

TEST(ram_sizes_and_addresses)
{
    vm_machine *m = make_bare();
    vm_region *r = (vm_region *)1;
    static const struct { uint64_t gpa, bytes; } bad[] = {
        { 0, 0 }, { 0, 1 }, { 0, 4095 }, { 1, 4096 }, { 4095, 4096 }, { UINT64_C(0xfffffffffffff000), 4096 },
        { UINT64_C(0xfffffffffffff000), 8192 }, { 4096, UINT64_C(0xfffffffffffff000) },
        { UINT64_C(1) << 52, 4096 }, { (UINT64_C(1) << 52) - 4096, 8192 }, { 0, UINT64_C(1) << 63 }, { 0, UINT64_MAX },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int status = vm_map_ram(m, bad[i].gpa, bad[i].bytes, VM_PROT_RWX, &r);
        if (status != VM_E_INVALID && !(status == VM_E_NOMEM && bad[i].bytes >> 40))
            FAIL("map %#" PRIx64 "+%#" PRIx64 ": %d", bad[i].gpa, bad[i].bytes, status);
    }
    REFUSED(vm_map_ram(m, 0, 4096, 8, &r), VM_E_INVALID);
    REFUSED(vm_map_ram(m, 0, 4096, (vm_prot)-1, &r), VM_E_INVALID);
    OK(vm_map_ram(m, 0, 4096, VM_PROT_RWX, NULL));       /* out may be NULL */
    vm_destroy(m);
}

TEST(overlaps)
{
    vm_machine *m = make_bare();
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_region *r = NULL, *s = NULL;
    OK(vm_map_ram(m, 0x10000, 0x4000, VM_PROT_RWX, &r));
    REFUSED(vm_map_ram(m, 0x10000, 0x4000, VM_PROT_RWX, &s), VM_E_EXISTS);
    REFUSED(vm_map_ram(m, 0x13000, 0x1000, VM_PROT_R, &s), VM_E_EXISTS);
    REFUSED(vm_map_ram(m, 0xf000, 0x2000, VM_PROT_R, &s), VM_E_EXISTS);
    REFUSED(vm_map_ram(m, 0, 0x100000, VM_PROT_R, &s), VM_E_EXISTS);
    REFUSED(vm_map_mmio(m, 0x13fff, 1, &ops, NULL, &s), VM_E_EXISTS);
    OK(vm_map_mmio(m, 0x14000, 1, &ops, NULL, &s));      /* MMIO has byte granularity */
    OK(vm_map_mmio(m, 0x14001, 7, &ops, NULL, NULL));
    REFUSED(vm_map_mmio(m, 0x14000, 1, &ops, NULL, NULL), VM_E_EXISTS);
    OK(vm_map_ram(m, 0xf000, 0x1000, VM_PROT_R, NULL));  /* touching is no overlap */
    OK(vm_unmap(m, r));
    OK(vm_map_ram(m, 0x10000, 0x1000, VM_PROT_RWX, &r));
    CHECK_EQ(vm_region_gpa(r), 0x10000);
    CHECK_EQ(vm_region_bytes(r), 0x1000);
    vm_destroy(m);
}

TEST(ports)
{
    vm_machine *m = make_bare();
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_region *r;
    REFUSED(vm_map_pio(m, 0, 0, &ops, NULL, &r), VM_E_INVALID);
    REFUSED(vm_map_pio(m, 0xffff, 2, &ops, NULL, &r), VM_E_INVALID);
    REFUSED(vm_map_pio(m, 0, 0x10001, &ops, NULL, &r), VM_E_INVALID);
    REFUSED(vm_map_pio(m, 0, UINT32_MAX, &ops, NULL, &r), VM_E_INVALID);
    REFUSED(vm_map_pio(m, 0, 1, NULL, NULL, &r), VM_E_INVALID);
    OK(vm_map_pio(m, 0xffff, 1, &ops, NULL, &r));
    OK(vm_map_pio(m, 0x60, 8, &ops, NULL, NULL));
    REFUSED(vm_map_pio(m, 0x67, 1, &ops, NULL, NULL), VM_E_EXISTS);
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));    /* ports and memory are different spaces */
    OK(vm_unmap(m, r));
    OK(vm_map_pio(m, 0xffff, 1, &ops, NULL, &r));
    CHECK(vm_region_data(r) == NULL);
    vm_destroy(m);
}

TEST(io_ops_checks)
{
    vm_machine *m = make_bare();
    struct { vm_io_ops ops; unsigned char tail[8]; } newer;
    vm_io_ops ops = VM_IO_OPS_INIT;
    memset(&newer, 0, sizeof newer);
    newer.ops.size = sizeof newer;
    OK(vm_map_mmio(m, 0x1000, 16, &newer.ops, NULL, NULL));
    newer.tail[0] = 1;
    REFUSED(vm_map_mmio(m, 0x2000, 16, &newer.ops, NULL, NULL), VM_E_INVALID);
    ops.size = 0;
    REFUSED(vm_map_mmio(m, 0x3000, 16, &ops, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_map_mmio(m, 0x3000, 16, NULL, NULL, NULL), VM_E_INVALID);
    ops.size = sizeof ops;
    REFUSED(vm_map_mmio(m, 0x3000, 0, &ops, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_map_mmio(m, UINT64_MAX, 2, &ops, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_map_mmio(m, 4, UINT64_MAX, &ops, NULL, NULL), VM_E_INVALID);
    vm_destroy(m);
}

TEST(unmap_misuse)
{
    vm_machine *m = make_bare(), *other = make_bare();
    vm_region *r = NULL, *s = NULL;
    int on_stack = 0;
    OK(vm_map_ram(m, 0, 4096, VM_PROT_RWX, &r));
    OK(vm_map_ram(other, 0, 4096, VM_PROT_RWX, &s));
    REFUSED(vm_unmap(m, NULL), VM_E_INVALID);
    REFUSED(vm_unmap(m, s), VM_E_NOTFOUND);              /* another machine's */
    REFUSED(vm_unmap(m, (vm_region *)&on_stack), VM_E_NOTFOUND);
    OK(vm_unmap(m, r));
    REFUSED(vm_unmap(m, r), VM_E_NOTFOUND);              /* twice: looked up, not followed */
    vm_destroy(other);
    vm_destroy(m);
}

static void count_destroy(void *user) { ++*(int *)user; }

TEST(destroy_callback_runs_once)
{
    vm_machine *m = make_bare();
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_region *r = NULL;
    int unmapped = 0, with_machine = 0, refused = 0;
    ops.destroy = count_destroy;
    OK(vm_map_mmio(m, 0x1000, 16, &ops, &unmapped, &r));
    OK(vm_map_pio(m, 0x1000, 16, &ops, &with_machine, NULL));
    CHECK(vm_map_pio(m, 0x100f, 16, &ops, &refused, NULL) == VM_E_EXISTS);
    OK(vm_unmap(m, r));
    CHECK_EQ(unmapped, 1);
    CHECK_EQ(with_machine, 0);
    vm_destroy(m);
    CHECK_EQ(with_machine, 1);
    CHECK_EQ(unmapped, 1);
    CHECK_EQ(refused, 0);
}

TEST(read_and_write)
{
    vm_machine *m = make_bare();
    unsigned char b[0x3000], c[0x3000];
    vm_io_ops ops = VM_IO_OPS_INIT;
    OK(vm_map_ram(m, 0x1000, 0x1000, VM_PROT_RWX, NULL));
    OK(vm_map_ram(m, 0x2000, 0x1000, VM_PROT_R, NULL));
    OK(vm_map_mmio(m, 0x4000, 0x1000, &ops, NULL, NULL));
    for (unsigned i = 0; i < sizeof b; i++)
        b[i] = (unsigned char)(i * 7 + (i >> 8));
    OK(vm_write(m, 0x1000, b, 0x2000));                  /* across regions, whatever the guest may do */
    OK(vm_read(m, 0x1000, c, 0x2000));
    CHECK(!memcmp(b, c, 0x2000));
    OK(vm_read(m, 0x1ffd, c, 6));
    CHECK(!memcmp(b + 0xffd, c, 6));
    memset(c, 0x55, sizeof c);
    REFUSED(vm_read(m, 0x2000, c, 0x1001), VM_E_FAULT);
    CHECK(c[0] == 0x55);                                 /* all or nothing */
    memset(b, 0x11, sizeof b);
    REFUSED(vm_write(m, 0x2000, b, 0x1001), VM_E_FAULT);
    OK(vm_read(m, 0x2000, c, 1));
    CHECK(c[0] != 0x11);
    REFUSED(vm_read(m, 0xfff, c, 2), VM_E_FAULT);
    CHECK(strstr(vm_errmsg(), "0xfff") != NULL);
    REFUSED(vm_read(m, 0x4000, c, 4), VM_E_FAULT);       /* never MMIO */
    REFUSED(vm_read(m, UINT64_MAX, c, 1), VM_E_FAULT);
    REFUSED(vm_read(m, UINT64_MAX, c, 2), VM_E_FAULT);
    REFUSED(vm_read(m, 0x1000, NULL, 4), VM_E_INVALID);
    REFUSED(vm_write(m, 0x1000, NULL, 4), VM_E_INVALID);
    CHECK(vm_read(m, 0x1000, c, SIZE_MAX) == VM_E_FAULT);
    OK(vm_read(m, 0x999000, NULL, 0));
    OK(vm_write(m, 0x999000, NULL, 0));
    vm_destroy(m);
}

TEST(protect)
{
    vm_machine *m = make_bare();
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_map_ram(m, 0, 0x2000, VM_PROT_RWX, NULL));
    OK(vm_map_ram(m, 0x2000, 0x2000, VM_PROT_RWX, NULL));
    OK(vm_map_mmio(m, 0x4000, 0x1000, &ops, NULL, NULL));
    OK(vm_protect(m, 0x1000, 0x2000, VM_PROT_R));        /* parts of two regions */
    REFUSED(vm_protect(m, 0x3000, 0x2000, VM_PROT_R), VM_E_FAULT);
    REFUSED(vm_protect(m, 0x4000, 0x1000, VM_PROT_R), VM_E_FAULT);
    REFUSED(vm_protect(m, 0x800, 0x1000, VM_PROT_R), VM_E_INVALID);
    REFUSED(vm_protect(m, 0, 0x800, VM_PROT_R), VM_E_INVALID);
    REFUSED(vm_protect(m, 0, 0x1000, 16), VM_E_INVALID);
    REFUSED(vm_protect(m, UINT64_C(0xfffffffffffff000), 0x2000, VM_PROT_R), VM_E_INVALID);
    OK(vm_write(m, 0, "\x88\x04\x25\x00\x30\x00\x00\x88\x04\x25\x00\x20\x00\x00\xf4", 15));
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_run(cpu, NULL, &e));                      /* mov [0x3000], al is allowed; mov [0x2000], al is not */
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK_EQ(e.rip, 7);
    CHECK_EQ(e.mmio.gpa, 0x2000);
    CHECK_EQ(e.mmio.width, 1);
    CHECK(e.mmio.is_write && !e.mmio.is_fetch);
    OK(vm_protect(m, 0x1000, 0x2000, VM_PROT_RWX));
    OK(vm_vcpu_run(cpu, NULL, &e));                      /* tried again, and permitted now */
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(m);
}

TEST(execute_permission)
{
    vm_machine *m = make_bare();
    vm_exit e = VM_EXIT_INIT;
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    OK(vm_map_ram(m, 0, 0x1000, VM_PROT_RW, NULL));
    OK(vm_write(m, 0, "\xf4", 1));
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    CHECK(e.mmio.is_fetch && !e.mmio.is_write);
    CHECK_EQ(e.mmio.gpa, 0);
    OK(vm_vcpu_run(cpu, NULL, &e));                      /* a fetch cannot be completed by data */
    CHECK_EQ(e.reason, VM_EXIT_UNMAPPED);
    OK(vm_protect(m, 0, 0x1000, VM_PROT_X));
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(m);
}

TEST(dirty_log)
{
    vm_machine *m = make_bare();
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_exit e = VM_EXIT_INIT;
    uint64_t bits[2] = { 0, ~UINT64_C(0) };
    OK(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    REFUSED(vm_dirty_fetch(m, 0, 0x10000, bits), VM_E_INVALID);
    OK(vm_write(m, 0x3000, "x", 1));
    OK(vm_dirty_log(m, true));
    OK(vm_dirty_fetch(m, 0, 0x10000, bits));
    CHECK_EQ(bits[0], 0);                                /* starts clean */
    CHECK_EQ(bits[1], ~UINT64_C(0));                     /* no word too many */
    /* mov [0x5000], eax; mov [0x6ffe], eax; mov ebx, [0x8000]; hlt */
    OK(vm_write(m, 0, "\x89\x04\x25\x00\x50\x00\x00\x89\x04\x25\xfe\x6f\x00\x00\x8b\x1c\x25\x00\x80\x00\x00\xf4", 22));
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    for (int round = 0; round < 2; round++) {
        OK(vm_vcpu_run(cpu, NULL, &e));
        CHECK_EQ(e.reason, VM_EXIT_HALT);
        OK(vm_dirty_fetch(m, 0, 0x10000, bits));
        CHECK_EQ(bits[0], 0xe0 | (round == 0 ? 1 : 0));  /* pages 5, 6, 7; page 0 by vm_write */
        OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    }
    OK(vm_dirty_fetch(m, 0, 0x10000, bits));
    CHECK_EQ(bits[0], 0);
    OK(vm_invalidate(m, 0x9000, 1));
    OK(vm_dirty_fetch(m, 0, 0x10000, bits));
    CHECK_EQ(bits[0], 0x200);
    REFUSED(vm_dirty_fetch(m, 0x800, 0x1000, bits), VM_E_INVALID);
    REFUSED(vm_dirty_fetch(m, 0, 0x1000, NULL), VM_E_INVALID);
    OK(vm_dirty_log(m, false));
    REFUSED(vm_dirty_fetch(m, 0, 0x1000, bits), VM_E_INVALID);
    vm_destroy(m);
}

TEST(host_memory)
{
    vm_machine *m = make_bare();
    vm_region *r = NULL;
    unsigned char *p = mmap(NULL, 0x3000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    REFUSED(vm_map_host(m, 0, 0x1000, VM_PROT_RWX, NULL, &r), VM_E_INVALID);
    REFUSED(vm_map_host(m, 0, 0x1000, VM_PROT_RWX, p + 1, &r), VM_E_INVALID);
    OK(vm_map_host(m, 0x5000, 0x1000, VM_PROT_RWX, p, &r));
    CHECK(vm_region_data(r) == p);
    OK(vm_write(m, 0x5010, "hello", 5));
    CHECK(!memcmp(p + 0x10, "hello", 5));
    OK(vm_unmap(m, r));
    CHECK(!memcmp(p + 0x10, "hello", 5));                /* never freed by libvm */
    vm_destroy(m);
    munmap(p, 0x3000);
}

TEST(file_memory)
{
    vm_machine *m = make_bare();
    char name[] = "/tmp/libvm-test-XXXXXX", byte = 0;
    int fd = mkstemp(name);
    CHECK(fd >= 0);
    unlink(name);
    CHECK(ftruncate(fd, 0x3000) == 0);
    CHECK(pwrite(fd, "A", 1, 0x1000) == 1);
    REFUSED(vm_map_file(m, 0, 0x1000, VM_PROT_RWX, -1, 0, true, NULL), VM_E_HOST);
    REFUSED(vm_map_file(m, 0, 0x1000, VM_PROT_RWX, fd, 1, true, NULL), VM_E_INVALID);
    REFUSED(vm_map_file(m, 0, 0x4000, VM_PROT_RWX, fd, 0, true, NULL), VM_E_INVALID);
    REFUSED(vm_map_file(m, 0, 0x1000, VM_PROT_RWX, fd, 0x3000, true, NULL), VM_E_INVALID);
    REFUSED(vm_map_file(m, 0, 0x1000, VM_PROT_RWX, fd, UINT64_C(0xfffffffffffff000), true, NULL), VM_E_INVALID);
    OK(vm_map_file(m, 0, 0x1000, VM_PROT_RWX, fd, 0x1000, true, NULL));
    OK(vm_map_file(m, 0x1000, 0x1000, VM_PROT_RWX, fd, 0x1000, false, NULL));
    OK(vm_write(m, 0, "B", 1));
    CHECK(pread(fd, &byte, 1, 0x1000) == 1 && byte == 'A');   /* private copy */
    OK(vm_write(m, 0x1000, "C", 1));
    CHECK(pread(fd, &byte, 1, 0x1000) == 1 && byte == 'C');
    close(fd);
    OK(vm_read(m, 0x1000, &byte, 1));
    CHECK(byte == 'C');
    vm_destroy(m);
}

TEST(writes_by_the_host_reach_code_already_run)
{
    vm_machine *m = make_bare();
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_region *r = NULL;
    vm_exit e = VM_EXIT_INIT;
    uint64_t rax = 0;
    OK(vm_map_ram(m, 0, 0x1000, VM_PROT_RWX, &r));
    unsigned char *p = vm_region_data(r);
    for (unsigned char i = 1; i < 10; i++) {
        unsigned char code[] = { 0xb8, i, 0, 0, 0, 0xf4 };
        if (i & 1) {
            OK(vm_write(m, 0, code, sizeof code));
        } else {
            memcpy(p, code, sizeof code);
            OK(vm_invalidate(m, 0, sizeof code));
        }
        OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
        OK(vm_vcpu_run(cpu, NULL, &e));
        OK(vm_vcpu_read_reg(cpu, VM_REG_RAX, &rax, 8));
        CHECK_EQ(rax, i);
    }
    vm_destroy(m);
}

/* A vCPU spins over memory while another thread edits the map around it. */
struct editing { vm_machine *m; atomic_bool stop; vm_exit exit; int status; };

static void *run_thread(void *arg)
{
    struct editing *x = arg;
    x->exit = (vm_exit)VM_EXIT_INIT;
    x->status = vm_vcpu_run(vm_vcpu_get(x->m, 0), NULL, &x->exit);
    return NULL;
}

TEST(map_edits_while_a_vcpu_runs)
{
    struct editing x = { .m = make_bare() };
    pthread_t t;
    uint64_t bits[1];
    OK(vm_map_ram(x.m, 0, 0x4000, VM_PROT_RWX, NULL));
    OK(vm_write(x.m, 0, "\xff\x04\x25\x00\x20\x00\x00\xeb\xf7", 9));     /* inc dword [0x2000]; jmp back */
    OK(vm_vcpu_set_mode(vm_vcpu_get(x.m, 0), VM_MODE_FLAT64));
    CHECK(pthread_create(&t, NULL, run_thread, &x) == 0);
    for (int i = 0; i < 300; i++) {
        vm_region *r = NULL;
        OK(vm_map_ram(x.m, 0x100000, 0x10000, VM_PROT_RWX, &r));
        OK(vm_protect(x.m, 0x3000, 0x1000, i & 1 ? VM_PROT_R : VM_PROT_RWX));
        OK(vm_dirty_log(x.m, i & 2));
        if (i & 2)
            OK(vm_dirty_fetch(x.m, 0, 0x4000, bits));
        OK(vm_unmap(x.m, r));
    }
    OK(vm_protect(x.m, 0x2000, 0x1000, VM_PROT_R));      /* must stop it */
    pthread_join(t, NULL);
    OK(x.status);
    CHECK_EQ(x.exit.reason, VM_EXIT_UNMAPPED);
    CHECK_EQ(x.exit.mmio.gpa, 0x2000);
    CHECK_EQ(x.exit.rip, 0);
    vm_destroy(x.m);
}
