/* backing.c - the host memory behind RAM: given back, advised about, shared between machines, mapped at several addresses. */
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
    REFUSED(vm_advise(m, 0, PAGE, VM_ADVICE_HUGE | VM_ADVICE_SMALL), VM_E_INVALID);
    REFUSED(vm_advise(m, 0, PAGE, VM_ADVICE_MERGEABLE | VM_ADVICE_UNMERGEABLE | VM_ADVICE_PREFAULT), VM_E_INVALID);
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
    int status = vm_map_file(m, 0, 2 * MIB, VM_PROT_RWX, fd, 0, false, NULL);
    if (status == VM_E_HOST || status == VM_E_NOMEM)
        test_skip("no huge pages are free: %s", vm_errmsg());
    OK(status);
    close(fd);
    vm_destroy(m);
}

/* ---- main memory of a PC ---- */

/* A file of 4 MiB whose words say where they are, and a guest at 0x1000 that stores RAX at 2 MiB. */
static int ram_file(void)
{
    static const uint8_t store[] = { 0xbb, 0, 0, 0x20, 0, 0x48, 0x89, 0x03, 0xf4 };
    static uint64_t words[4 * MIB / 8];
    int fd = memfd_create("ram", 0);
    for (uint64_t i = 0; i < 4 * MIB / 8; i++)
        words[i] = i * 8;
    memcpy((uint8_t *)words + 0x1000, store, sizeof store);
    CHECK(fd >= 0 && pwrite(fd, words, sizeof words, 0) == (ssize_t)sizeof words);
    return fd;
}

static uint64_t file_word(int fd, off_t at)
{
    uint64_t v = 0;
    CHECK_EQ(pread(fd, &v, 8, at), 8);
    return v;
}

static int make_pc(vm_backend backend, int fd, bool is_private, unsigned advice, vm_machine **m)
{
    char path[40];
    vm_options o = VM_OPTIONS_INIT;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    o.backend = backend;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 4 * MIB;
    o.ram_file = fd < 0 ? NULL : path;
    o.ram_private = is_private;
    o.ram_advice = advice;
    return vm_create(&o, m);
}

EACH_BACKEND(pc_shared_file)
{
    int fd = ram_file();
    vm_machine *m = NULL, *c = NULL;
    vm_snapshot *s = NULL;
    OK(make_pc(backend, fd, false, 0, &m));
    CHECK_EQ(word(m, 0x9000), 0x9000); /* on both sides of the VGA hole */
    CHECK_EQ(word(m, 0x3ff000), 0x3ff000);
    run_at(m, 0x1000, 77);
    CHECK_EQ(file_word(fd, 0x200000), 77);
    OK(vm_snapshot_take(m, &s));
    OK(vm_fork(m, &c));                /* memory of its own */
    run_at(c, 0x1000, 78);
    CHECK_EQ(word(c, 0x200000), 78);
    CHECK_EQ(file_word(fd, 0x200000), 77);
    run_at(m, 0x1000, 79);
    CHECK_EQ(file_word(fd, 0x200000), 79);
    OK(vm_snapshot_restore(m, s));
    CHECK_EQ(word(m, 0x200000), 77);
    CHECK_EQ(file_word(fd, 0x200000), 77);
    OK(vm_discard(m, 0x200000, PAGE));
    CHECK_EQ(word(m, 0x200000), 0);
    CHECK_EQ(file_word(fd, 0x200000), 0);
    CHECK_EQ(file_word(fd, 0x201000), 0x201000);
    run_at(m, 0x1000, 80);
    CHECK_EQ(file_word(fd, 0x200000), 80);
    vm_snapshot_free(s);
    vm_destroy(c);
    vm_destroy(m);
    CHECK_EQ(file_word(fd, 0x200000), 80);
    close(fd);
}

EACH_BACKEND(pc_private_file)
{
    int fd = ram_file();
    vm_machine *m = NULL;
    uint64_t dirty = 0;
    OK(make_pc(backend, fd, true, VM_ADVICE_SMALL, &m));
    OK(vm_dirty_log(m, true));
    run_at(m, 0x1000, 77);
    CHECK_EQ(word(m, 0x200000), 77);
    OK(vm_dirty_fetch(m, 0x200000, 64 * PAGE, &dirty));
    CHECK_EQ(dirty, 1);
    OK(vm_discard(m, 0x201000, PAGE));
    CHECK_EQ(word(m, 0x201000), 0);
    CHECK_EQ(file_word(fd, 0x200000), 0x200000);
    CHECK_EQ(file_word(fd, 0x201000), 0x201000);
    vm_destroy(m);
    close(fd);
}

TEST(pc_memory_refused)
{
    vm_machine *m = NULL;
    vm_options bare = VM_OPTIONS_INIT, none = VM_OPTIONS_INIT;
    int fd = ram_file();
    CHECK(ftruncate(fd, 4 * MIB - 1) == 0);
    REFUSED(make_pc(VM_BACKEND_INTERP, fd, false, 0, &m), VM_E_INVALID);
    REFUSED(make_pc(VM_BACKEND_INTERP, -1, true, 0, &m), VM_E_INVALID);
    REFUSED(make_pc(VM_BACKEND_INTERP, -1, false, 64, &m), VM_E_INVALID);
    bare.ram_file = "/proc/self/exe";
    REFUSED(vm_create(&bare, &m), VM_E_INVALID);
    none.platform = VM_PLATFORM_PC;
    none.ram_bytes = 4 * MIB;
    none.ram_file = "/proc/self/no such file";
    REFUSED(vm_create(&none, &m), VM_E_HOST);
    close(fd);
}

TEST(pc_memory_advice)
{
    vm_machine *m = NULL;
    size_t before = 0, after = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    CHECK(f && fscanf(f, "%*u %zu", &before) == 1);
    int status = make_pc(VM_BACKEND_INTERP, -1, false, VM_ADVICE_SMALL | VM_ADVICE_PREFAULT, &m);
    if (status == VM_E_HOST)
        test_skip("the host cannot commit memory ahead: %s", vm_errmsg());
    OK(status);
    rewind(f);
    CHECK(fscanf(f, "%*u %zu", &after) == 1 && after >= before + 3 * MIB / PAGE);
    fclose(f);
    vm_destroy(m);
}

/* Low memory is one mapping of huge pages, whatever lies between its parts in the guest. */
TEST(pc_hugetlb_file)
{
    vm_machine *m = NULL;
    int fd = memfd_create("huge", 4 /* MFD_HUGETLB */);
    if (fd < 0 || ftruncate(fd, 4 * MIB) < 0)
        test_skip("no hugetlbfs");
    int status = make_pc(VM_BACKEND_JIT, fd, false, 0, &m);
    if (status == VM_E_HOST || status == VM_E_NOMEM)
        test_skip("no huge pages are free: %s", vm_errmsg());
    OK(status);
    OK(vm_write(m, 0x3ff000, "x", 1));
    CHECK_EQ(word(m, 0x3ff000), 'x');
    OK(vm_discard(m, 0x3ff000, PAGE));
    CHECK_EQ(word(m, 0x3ff000), 0);
    vm_destroy(m);
    close(fd);
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

/* ---- the same memory at several addresses ---- */

enum { FIRST = 0x1000000, SECOND = 0x2000000, THIRD = 0x3000000 };

/* Maps what the function at FIRST is in at another address: host memory, a region's own, or a file's. */
static vm_region *map_again(vm_machine *m, unsigned kind, uint64_t gpa, void *memory, int fd)
{
    vm_region *r = NULL;
    OK(kind < 2 ? vm_map_host(m, gpa, 2 * PAGE, VM_PROT_RWX, memory, &r)
                : vm_map_file(m, gpa, 2 * PAGE, VM_PROT_RWX, fd, 0, false, &r));
    return r;
}

/* Calls the function in a loop, writes its result anew at SECOND, calls it, and so once more. EAX, EBX, EDX: what it gave. */
static const char twice[] =
    "\xbc\x00\x80\x00\x00" "\xb9\xb8\x0b\x00\x00" "\xbe\x00\x00\x00\x01" "\xbf\x00\x00\x00\x02"        /* esp; ecx, 3000; esi, FIRST; edi, SECOND */
    "\xff\xd6" "\xff\xc9" "\x75\xfa" "\x89\xc3"                                    /* call rsi; dec ecx; jnz; mov ebx, eax */
    "\xc6\x47\x01\x22" "\xff\xd6" "\x89\xc2"                                       /* mov byte [rdi + 1], 0x22; call; mov edx, eax */
    "\xc6\x47\x01\x33" "\xff\xd6" "\xf4";

static uint64_t result(vm_machine *m)
{
    uint64_t rax = 0;
    OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), VM_REG_RAX, &rax, 8));
    return rax;
}

static uint64_t call_first(vm_machine *m)
{
    static const char call[] = "\xbc\x00\x80\x00\x00\xbe\x00\x00\x00\x01\xff\xd6\xf4";
    OK(vm_write(m, 0x3000, call, sizeof call - 1));
    run_at(m, 0x3000, 0);
    return result(m);
}

EACH_BACKEND(code_at_several_addresses)
{
    for (unsigned kind = 0; kind < 3; kind++) {
        vm_region *first = NULL, *second, *low = NULL;
        vm_snapshot *s = NULL;
        vm_machine *m = machine(backend, &low);
        uint64_t seen[2] = { 0 };
        int fd = memfd_create("code", 0);
        void *memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(fd >= 0 && ftruncate(fd, 2 * PAGE) == 0 && memory != MAP_FAILED);
        if (kind == 1)
            OK(vm_map_ram(m, FIRST, 2 * PAGE, VM_PROT_RWX, &first));
        else
            first = map_again(m, kind, FIRST, memory, fd);
        second = map_again(m, kind, SECOND, vm_region_data(first), fd);
        OK(vm_write(m, FIRST, "\xb8\x11\x00\x00\x00\xc3", 6));         /* mov eax, 0x11; ret */
        OK(vm_write(m, 0x1000, twice, sizeof twice - 1));
        for (unsigned i = 0; i < 2; i++) {                               /* the second time what is known of the page is old */
            OK(vm_write(m, SECOND + 1, "\x11", 1));
            run_at(m, 0x1000, 0);
            OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), VM_REG_RBX, &seen[0], 8));
            OK(vm_vcpu_read_reg(vm_vcpu_get(m, 0), VM_REG_RDX, &seen[1], 8));
            CHECK_EQ(seen[0], 0x11);
            CHECK_EQ(seen[1], 0x22);
            CHECK_EQ(result(m), 0x33);
        }
        OK(vm_snapshot_take(m, &s));
        OK(vm_write(m, SECOND + 1, "\x44", 1));
        CHECK_EQ(call_first(m), 0x44);
        OK(vm_snapshot_restore(m, s));
        CHECK_EQ(call_first(m), 0x33);
        vm_snapshot_free(s);
        ((uint8_t *)vm_region_data(second))[1] = 0x55;
        OK(vm_invalidate(m, SECOND, PAGE));
        CHECK_EQ(call_first(m), 0x55);
        OK(vm_unmap(m, second));
        (void)map_again(m, kind, THIRD, vm_region_data(first), fd);      /* comes when the code is known */
        OK(vm_write(m, THIRD + 1, "\x66", 1));
        CHECK_EQ(call_first(m), 0x66);
        vm_destroy(m);
        munmap(memory, 2 * PAGE);
        close(fd);
    }
}
