/* backing.c - the host memory behind RAM: given back, advised about, shared between machines. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "../backends.h"

#include <sys/mman.h>
#include <unistd.h>

enum { MIB = 1 << 20, PAGE = 4096 };

static vm_machine *machine(vm_backend backend, vm_region **r)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = backend;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 8 * MIB, VM_PROT_RWX, r));
    return m;
}

static void run_at(vm_machine *m, uint64_t rip, uint64_t rax)
{
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_set_mode(cpu, VM_MODE_FLAT64));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RAX, &rax, 8));
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
}

static uint64_t word(vm_machine *m, uint64_t gpa)
{
    uint64_t v = 0;
    OK(vm_read(m, gpa, &v, 8));
    return v;
}

/* ---- vm_discard ---- */

EACH_BACKEND(discard)
{
    vm_region *r = NULL;
    vm_machine *m = machine(backend, &r);
    /* mov ebx, 0x200000; mov [rbx], rax; hlt */
    static const uint8_t store[] = { 0xbb, 0, 0, 0x20, 0, 0x48, 0x89, 0x03, 0xf4 };
    unsigned char resident = 1;
    uint64_t dirty = 0;
    memset(vm_region_data(r), 0x5a, 8 * MIB);
    OK(vm_write(m, 0x1000, store, sizeof store));
    run_at(m, 0x1000, 77);             /* the vCPU knows the page */
    CHECK_EQ(word(m, 0x200000), 77);
    OK(vm_dirty_log(m, true));
    OK(vm_discard(m, 0x200000, 2 * PAGE));
    CHECK(mincore((char *)vm_region_data(r) + 0x200000, PAGE, &resident) == 0 && !(resident & 1));
    CHECK_EQ(word(m, 0x200000), 0);
    CHECK_EQ(word(m, 0x201000), 0);
    CHECK_EQ(word(m, 0x202000), UINT64_C(0x5a5a5a5a5a5a5a5a));
    CHECK_EQ(word(m, 0x1ff000), UINT64_C(0x5a5a5a5a5a5a5a5a));
    OK(vm_dirty_fetch(m, 0x1ff000, 4 * PAGE, &dirty));
    CHECK_EQ(dirty, 6);
    run_at(m, 0x1000, 78);
    CHECK_EQ(word(m, 0x200000), 78);
    OK(vm_discard(m, 0x1000, PAGE));   /* code: zeroes are add [rax], al */
    OK(vm_write(m, 0x1000, "\xf4", 1));
    run_at(m, 0x1000, 79);
    CHECK_EQ(word(m, 0x200000), 78);
    vm_destroy(m);
}

TEST(discard_refused)
{
    vm_region *r = NULL;
    vm_machine *m = machine(VM_BACKEND_INTERP, &r);
    static _Alignas(4096) char own[2 * PAGE];
    own[0] = 1;
    OK(vm_write(m, 8 * MIB - PAGE, "\1", 1));
    OK(vm_map_host(m, 8 * MIB, sizeof own, VM_PROT_RW, own, NULL));
    REFUSED(vm_discard(m, 8 * MIB - PAGE, 2 * PAGE), VM_E_UNSUPPORTED);
    REFUSED(vm_discard(m, 8 * MIB + PAGE, 2 * PAGE), VM_E_UNSUPPORTED);
    REFUSED(vm_discard(m, 64 * MIB, PAGE), VM_E_FAULT);
    REFUSED(vm_discard(m, 1, PAGE), VM_E_INVALID);
    REFUSED(vm_discard(m, 0, 0), VM_E_INVALID);
    REFUSED(vm_discard(NULL, 0, PAGE), VM_E_INVALID);
    CHECK_EQ(word(m, 8 * MIB - PAGE), 1);
    CHECK_EQ(own[0], 1);
    vm_destroy(m);
}

/* ---- vm_advise ---- */

/* A field of /proc/self/smaps for the mapping that `at` lies in. */
static long smaps_kb(const void *at, const char *field)
{
    char line[512];
    unsigned long begin, end;
    bool is_it = false;
    long kb = -1;
    FILE *f = fopen("/proc/self/smaps", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%lx-%lx ", &begin, &end) == 2 && strchr(line, '-') < strchr(line, ' '))
            is_it = (unsigned long)(uintptr_t)at >= begin && (unsigned long)(uintptr_t)at < end;
        else if (is_it && !strncmp(line, field, strlen(field)))
            kb = atol(line + strlen(field) + 1);
    }
    if (f)
        fclose(f);
    return kb;
}

TEST(advise)
{
    vm_region *r = NULL;
    vm_machine *m = machine(VM_BACKEND_INTERP, &r);
    unsigned char resident[16] = { 0 };
    int status = vm_advise(m, 4 * MIB, 16 * PAGE, VM_ADVICE_SMALL | VM_ADVICE_PREFAULT);
    if (status == VM_E_HOST)
        test_skip("the host cannot commit memory ahead: %s", vm_errmsg());
    OK(status);
    CHECK(mincore((char *)vm_region_data(r) + 4 * MIB, 16 * PAGE, resident) == 0);
    for (unsigned i = 0; i < 16; i++)
        CHECK(resident[i] & 1);
    CHECK_EQ(smaps_kb((char *)vm_region_data(r) + 4 * MIB, "AnonHugePages:"), 0);
    REFUSED(vm_advise(m, 0, PAGE, 64), VM_E_INVALID);
    REFUSED(vm_advise(m, 0, 9 * MIB, VM_ADVICE_SMALL), VM_E_FAULT);
    REFUSED(vm_advise(NULL, 0, PAGE, 0), VM_E_INVALID);
    vm_destroy(m);
}

TEST(advise_mergeable)
{
    vm_region *r = NULL;
    vm_machine *m = machine(VM_BACKEND_INTERP, &r);
    if (vm_advise(m, 0, 8 * MIB, VM_ADVICE_MERGEABLE) == VM_E_HOST)
        test_skip("this kernel has no KSM: %s", vm_errmsg());
    char flags[512] = "", line[512];
    FILE *f = fopen("/proc/self/smaps", "r");
    unsigned long begin, end;
    bool is_it = false;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%lx-%lx ", &begin, &end) == 2 && strchr(line, '-') < strchr(line, ' '))
            is_it = begin == (unsigned long)(uintptr_t)vm_region_data(r);
        else if (is_it && !strncmp(line, "VmFlags:", 8))
            strcpy(flags, line);
    }
    if (f)
        fclose(f);
    CHECK(strstr(flags, " mg") != NULL);
    OK(vm_advise(m, 0, 8 * MIB, VM_ADVICE_UNMERGEABLE));
    vm_destroy(m);
}

/* RAM of huge pages, from a file that the program made. */
TEST(hugetlb_file)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    int fd = memfd_create("huge", 4 /* MFD_HUGETLB */);
    if (fd < 0 || ftruncate(fd, 2 * MIB) < 0)
        test_skip("no hugetlbfs");
    o.backend = VM_BACKEND_INTERP;
    OK(vm_create(&o, &m));
    if (vm_map_file(m, 0, 2 * MIB, VM_PROT_RWX, fd, 0, false, NULL) == VM_E_HOST)
        test_skip("no huge pages are free: %s", vm_errmsg());
    close(fd);
    vm_destroy(m);
}

/* ---- vm_share_pages ---- */

static void fill(vm_region *r, uint64_t first, uint64_t pages, unsigned seed)
{
    uint64_t *p = (uint64_t *)vm_region_data(r) + first * PAGE / 8;
    for (uint64_t i = 0; i < pages * PAGE / 8; i++)
        p[i] = i * UINT64_C(0x9e3779b97f4a7c15) + seed;
}

EACH_BACKEND(share)
{
    vm_region *r[2] = { NULL };
    vm_machine *m[2] = { machine(backend, &r[0]), machine(backend, &r[1]) };
    static const uint8_t store[] = { 0xbb, 0, 0, 0x20, 0, 0x48, 0x89, 0x03, 0xf4 };
    uint64_t saved = 1;
    for (int i = 0; i < 2; i++) {
        fill(r[i], 512, 64, 1);        /* the same in both, at 0x200000 */
        fill(r[i], 1024 + 8 * (unsigned)i, 16, 2);                   /* the same elsewhere */
        fill(r[i], 1536, 16, 3 + (unsigned)i);                       /* different */
        fill(r[i], 1600, 3, 7);        /* too short */
        OK(vm_write(m[i], 0x1000, store, sizeof store));
        run_at(m[i], 0x1000, UINT64_C(0x51));                        /* vCPUs hold the page's host address */
    }
    OK(vm_share_pages(m, 2, &saved));
    CHECK_EQ(saved, (64 + 16) * PAGE);
    run_at(m[0], 0x1000, 99);          /* a write stays the writer's */
    CHECK_EQ(word(m[0], 0x200000), 99);
    CHECK_EQ(word(m[1], 0x200000), 0x51);
    CHECK_EQ(word(m[0], 0x200008), word(m[1], 0x200008));
    for (unsigned i = 512; i < 528; i++)
        CHECK_EQ(word(m[0], 0x400000 + 8 * i), word(m[1], 0x408000 + 8 * i));
    CHECK_EQ(word(m[0], 0x600000), 3);
    CHECK_EQ(word(m[1], 0x600000), 4);
    OK(vm_share_pages(m, 2, &saved));  /* again: nothing breaks */
    OK(vm_discard(m[0], 0x200000, 64 * PAGE));                       /* zeros, not what was shared */
    CHECK_EQ(word(m[0], 0x200008), 0);
    vm_destroy(m[0]);
    CHECK_EQ(word(m[1], 0x200000), 0x51);
    vm_destroy(m[1]);
}

TEST(share_refused)
{
    vm_region *r = NULL;
    vm_machine *m = machine(VM_BACKEND_INTERP, &r), *none = NULL;
    uint64_t saved = 1;
    REFUSED(vm_share_pages(NULL, 1, &saved), VM_E_INVALID);
    REFUSED(vm_share_pages(&m, 1, NULL), VM_E_INVALID);
    REFUSED(vm_share_pages(&none, 1, &saved), VM_E_INVALID);
    OK(vm_share_pages(&m, 1, &saved));
    CHECK_EQ(saved, 0);
    fill(r, 16, 8, 5);
    fill(r, 32, 8, 5);
    OK(vm_share_pages((vm_machine *[]){ m, m }, 2, &saved));         /* within one machine, named twice */
    CHECK_EQ(saved, 8 * PAGE);
    vm_destroy(m);
}
