/* machine.c - making and ending machines, and every misuse of the functions around it. */
#include <libvm/libvm.h>
#include "test.h"

#include <fcntl.h>
#include <unistd.h>

static vm_machine *make_bare(void)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = VM_BACKEND_INTERP;
    OK(vm_create(&o, &m));
    return m;
}

TEST(create_needs_an_out_pointer)
{
    vm_options o = VM_OPTIONS_INIT;
    REFUSED(vm_create(&o, NULL), VM_E_INVALID);
    REFUSED(vm_create(NULL, NULL), VM_E_INVALID);
}

TEST(create_with_no_options)
{
    vm_machine *m = NULL;
    OK(vm_create(NULL, &m));
    CHECK_EQ(vm_vcpu_count(m), 1);
    CHECK(vm_machine_backend(m) != VM_BACKEND_AUTO);
    CHECK(vm_vcpu_get(m, 0) != NULL);
    CHECK(vm_vcpu_get(m, 1) == NULL);
    CHECK(vm_vcpu_get(m, UINT32_MAX) == NULL);
    vm_destroy(m);
}

TEST(destroy_null) { vm_destroy(NULL); }

TEST(bad_options)
{
    static const struct { const char *what; vm_options o; int status; } bad[] = {
        { "size 0", { .size = 0 }, VM_E_INVALID },
        { "size 3", { .size = 3 }, VM_E_INVALID },
        { "backend 99", { .size = sizeof(vm_options), .backend = 99 }, VM_E_INVALID },
        { "backend -1", { .size = sizeof(vm_options), .backend = -1 }, VM_E_INVALID },
        { "platform 7", { .size = sizeof(vm_options), .platform = 7 }, VM_E_INVALID },
        { "too many vCPUs", { .size = sizeof(vm_options), .vcpus = VM_MAX_VCPUS + 1 }, VM_E_INVALID },
        { "4 billion vCPUs", { .size = sizeof(vm_options), .vcpus = UINT32_MAX }, VM_E_INVALID },
        { "BARE with RAM", { .size = sizeof(vm_options), .ram_bytes = 1 << 20 }, VM_E_INVALID },
        { "PC without RAM", { .size = sizeof(vm_options), .platform = VM_PLATFORM_PC }, VM_E_INVALID },
        { "PC with a page", { .size = sizeof(vm_options), .platform = VM_PLATFORM_PC, .ram_bytes = 4096 }, VM_E_INVALID },
        { "PC, unaligned", { .size = sizeof(vm_options), .platform = VM_PLATFORM_PC, .ram_bytes = (1 << 24) + 1 },
          VM_E_INVALID },
        { "unknown MMU", { .size = sizeof(vm_options), .backend = VM_BACKEND_INTERP, .mmu = "no such" }, VM_E_UNSUPPORTED },
        { "unknown CPU", { .size = sizeof(vm_options), .backend = VM_BACKEND_INTERP, .cpu_model = "Z80" }, VM_E_UNSUPPORTED },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        vm_machine *m = (vm_machine *)1;
        int status = vm_create(&bad[i].o, &m);
        if (status != bad[i].status)
            FAIL("%s: %d, not %d", bad[i].what, status, bad[i].status);
        if (m != NULL || !vm_errmsg()[0])
            FAIL("%s: out pointer not cleared, or no message", bad[i].what);
    }
}

TEST(absurd_ram_is_refused)
{
    static const uint64_t sizes[] = { UINT64_C(1) << 63, UINT64_C(0xfffffffffffff000), UINT64_C(1) << 52 };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        vm_options o = VM_OPTIONS_INIT;
        vm_machine *m = NULL;
        o.backend = VM_BACKEND_INTERP;
        o.platform = VM_PLATFORM_PC;
        o.ram_bytes = sizes[i];
        CHECK(vm_create(&o, &m) < 0);
        CHECK(m == NULL);
    }
}

TEST(older_and_newer_option_structs)
{
    struct { vm_options o; unsigned char tail[32]; } newer;
    vm_machine *m = NULL;
    memset(&newer, 0, sizeof newer);
    newer.o.size = sizeof newer;
    newer.o.backend = VM_BACKEND_INTERP;
    OK(vm_create(&newer.o, &m));                        /* a larger struct with a zero tail is fine */
    vm_destroy(m);
    newer.tail[31] = 1;
    REFUSED(vm_create(&newer.o, &m), VM_E_INVALID);
    vm_options older = VM_OPTIONS_INIT;
    older.backend = VM_BACKEND_INTERP;
    older.cpu_model = "Z80";                            /* beyond the size given: must not be read */
    older.size = offsetof(vm_options, cpu_model);
    OK(vm_create(&older, &m));
    vm_destroy(m);
}

TEST(queries)
{
    uint64_t v = 77;
    OK(vm_query(VM_BACKEND_INTERP, "available", &v));
    CHECK_EQ(v, 1);
    OK(vm_query(VM_BACKEND_INTERP, "exact-budget", &v));
    CHECK_EQ(v, 1);
    OK(vm_query(VM_BACKEND_INTERP, "max-vcpus", &v));
    CHECK(v >= 4 && v <= VM_MAX_VCPUS);
    OK(vm_query(VM_BACKEND_INTERP, "phys-bits", &v));
    CHECK(v >= 36 && v <= 52);
    OK(vm_query(VM_BACKEND_KVM, "available", &v));
    CHECK(v <= 1);
    OK(vm_query(VM_BACKEND_JIT, "available", &v));
    CHECK(v <= 1);
    OK(vm_query(VM_BACKEND_AUTO, "available", &v));
    CHECK_EQ(v, 1);
    REFUSED(vm_query(VM_BACKEND_INTERP, "teleportation", &v), VM_E_NOTFOUND);
    REFUSED(vm_query(VM_BACKEND_INTERP, "", &v), VM_E_NOTFOUND);
    REFUSED(vm_query(VM_BACKEND_INTERP, NULL, &v), VM_E_INVALID);
    REFUSED(vm_query(VM_BACKEND_INTERP, "available", NULL), VM_E_INVALID);
    REFUSED(vm_query(1234, "available", &v), VM_E_INVALID);
}

TEST(names_of_backends)
{
    CHECK(!strcmp(vm_backend_name(VM_BACKEND_INTERP), "interp"));
    CHECK(!strcmp(vm_backend_name(VM_BACKEND_JIT), "jit"));
    CHECK(!strcmp(vm_backend_name(VM_BACKEND_KVM), "kvm"));
    CHECK(!strcmp(vm_backend_name(VM_BACKEND_AUTO), "auto"));
    CHECK(vm_backend_name(55) != NULL);
}

TEST(unavailable_backends_say_why)
{
    static const vm_backend b[] = { VM_BACKEND_KVM, VM_BACKEND_JIT };
    for (int i = 0; i < 2; i++) {
        uint64_t available = 0;
        vm_options o = VM_OPTIONS_INIT;
        vm_machine *m = NULL;
        OK(vm_query(b[i], "available", &available));
        o.backend = b[i];
        if (available) {
            OK(vm_create(&o, &m));
            vm_destroy(m);
        } else {
            REFUSED(vm_create(&o, &m), VM_E_UNSUPPORTED);
        }
    }
}

TEST(null_machine_everywhere)
{
    uint64_t v;
    unsigned char b[8];
    vm_region *r;
    vm_io_ops ops = VM_IO_OPS_INIT;
    CHECK_EQ(vm_vcpu_count(NULL), 0);
    CHECK(vm_vcpu_get(NULL, 0) == NULL);
    CHECK_EQ(vm_region_gpa(NULL), 0);
    CHECK_EQ(vm_region_bytes(NULL), 0);
    CHECK(vm_region_data(NULL) == NULL);
    CHECK(vm_vcpu_machine(NULL) == NULL);
    CHECK_EQ(vm_vcpu_retired(NULL), 0);
    vm_vcpu_kick(NULL);
    REFUSED(vm_stats(NULL, "exits", &v), VM_E_INVALID);
    REFUSED(vm_map_ram(NULL, 0, 4096, VM_PROT_RWX, &r), VM_E_INVALID);
    REFUSED(vm_map_host(NULL, 0, 4096, VM_PROT_RWX, b, &r), VM_E_INVALID);
    REFUSED(vm_map_file(NULL, 0, 4096, VM_PROT_RWX, 0, 0, true, &r), VM_E_INVALID);
    REFUSED(vm_map_mmio(NULL, 0, 4096, &ops, NULL, &r), VM_E_INVALID);
    REFUSED(vm_map_pio(NULL, 0, 1, &ops, NULL, &r), VM_E_INVALID);
    REFUSED(vm_unmap(NULL, NULL), VM_E_INVALID);
    REFUSED(vm_protect(NULL, 0, 4096, VM_PROT_R), VM_E_INVALID);
    REFUSED(vm_invalidate(NULL, 0, 4096), VM_E_INVALID);
    REFUSED(vm_read(NULL, 0, b, 8), VM_E_INVALID);
    REFUSED(vm_write(NULL, 0, b, 8), VM_E_INVALID);
    REFUSED(vm_dirty_log(NULL, true), VM_E_INVALID);
    REFUSED(vm_dirty_fetch(NULL, 0, 4096, &v), VM_E_INVALID);
    REFUSED(vm_irq_set(NULL, 0, true), VM_E_INVALID);
    REFUSED(vm_irq_msi(NULL, 0xfee00000, 0), VM_E_INVALID);
    REFUSED(vm_load_raw(NULL, "/dev/null", 0), VM_E_INVALID);
    REFUSED(vm_load_elf(NULL, "/dev/null", &v), VM_E_INVALID);
    REFUSED(vm_serial_output(NULL, 0, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_serial_input(NULL, 0, b, 1), VM_E_INVALID);
    REFUSED(vm_debugcon_output(NULL, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_trace_set(NULL, 0, NULL, NULL), VM_E_INVALID);
}

TEST(null_vcpu_everywhere)
{
    vm_regs r = VM_REGS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    vm_fpu f = VM_FPU_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint64_t v = 0;
    REFUSED(vm_vcpu_set_mode(NULL, VM_MODE_REAL), VM_E_INVALID);
    REFUSED(vm_vcpu_get_regs(NULL, &r), VM_E_INVALID);
    REFUSED(vm_vcpu_set_regs(NULL, &r), VM_E_INVALID);
    REFUSED(vm_vcpu_get_sregs(NULL, &s), VM_E_INVALID);
    REFUSED(vm_vcpu_set_sregs(NULL, &s), VM_E_INVALID);
    REFUSED(vm_vcpu_get_fpu(NULL, &f), VM_E_INVALID);
    REFUSED(vm_vcpu_set_fpu(NULL, &f), VM_E_INVALID);
    REFUSED(vm_vcpu_read_reg(NULL, VM_REG_RAX, &v, 8), VM_E_INVALID);
    REFUSED(vm_vcpu_write_reg(NULL, VM_REG_RAX, &v, 8), VM_E_INVALID);
    REFUSED(vm_vcpu_get_msr(NULL, 0x10, &v), VM_E_INVALID);
    REFUSED(vm_vcpu_set_msr(NULL, 0x10, 0), VM_E_INVALID);
    REFUSED(vm_vcpu_translate(NULL, 0, VM_PROT_R, &v), VM_E_INVALID);
    REFUSED(vm_vcpu_read(NULL, 0, &v, 8), VM_E_INVALID);
    REFUSED(vm_vcpu_write(NULL, 0, &v, 8), VM_E_INVALID);
    REFUSED(vm_vcpu_run(NULL, NULL, &e), VM_E_INVALID);
    REFUSED(vm_vcpu_inject(NULL, 3, false, 0), VM_E_INVALID);
}

TEST(pc_functions_on_a_bare_machine)
{
    vm_machine *m = make_bare();
    REFUSED(vm_irq_set(m, 1, true), VM_E_UNSUPPORTED);
    REFUSED(vm_irq_msi(m, 0xfee00000, 0x30), VM_E_UNSUPPORTED);
    REFUSED(vm_serial_output(m, 0, NULL, NULL), VM_E_UNSUPPORTED);
    REFUSED(vm_serial_input(m, 0, (const uint8_t *)"x", 1), VM_E_UNSUPPORTED);
    vm_linux_boot b = VM_LINUX_BOOT_INIT;
    b.kernel = "/dev/null";
    REFUSED(vm_boot_linux(m, &b), VM_E_UNSUPPORTED);
    vm_destroy(m);
}

TEST(boot_misuse)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = VM_BACKEND_INTERP;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 16 << 20;
    OK(vm_create(&o, &m));
    vm_linux_boot b = VM_LINUX_BOOT_INIT;
    vm_boot_options i = VM_BOOT_OPTIONS_INIT;
    REFUSED(vm_boot_linux(m, NULL), VM_E_INVALID);
    REFUSED(vm_boot_linux(m, &b), VM_E_INVALID);
    REFUSED(vm_boot_image(m, NULL), VM_E_INVALID);
    REFUSED(vm_boot_image(m, &i), VM_E_INVALID);
    b.kernel = "/nonexistent/kernel";
    i.kernel = "/nonexistent/kernel";
    REFUSED(vm_boot_linux(m, &b), VM_E_HOST);
    CHECK(strstr(vm_errmsg(), "/nonexistent/kernel") != NULL);
    REFUSED(vm_boot_image(m, &i), VM_E_HOST);
    i.kernel = NULL;
    i.bios = "/nonexistent/bios";
    REFUSED(vm_boot_image(m, &i), VM_E_HOST);
    REFUSED(vm_load_elf(m, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_load_elf(m, "/nonexistent", NULL), VM_E_HOST);
    REFUSED(vm_load_raw(m, NULL, 0), VM_E_INVALID);
    REFUSED(vm_load_raw(m, "/nonexistent", 0), VM_E_HOST);
    REFUSED(vm_load_raw(m, "/bin/sh", UINT64_C(1) << 40), VM_E_NOMEM);
    REFUSED(vm_load_raw(m, "/", 0), VM_E_HOST);
    REFUSED(vm_irq_set(m, 24, true), VM_E_INVALID);
    REFUSED(vm_irq_set(m, UINT32_MAX, true), VM_E_INVALID);
    REFUSED(vm_irq_msi(m, 0xfed00000, 0), VM_E_INVALID);
    REFUSED(vm_irq_msi(m, 0, 0), VM_E_INVALID);
    REFUSED(vm_serial_output(m, 4, NULL, NULL), VM_E_INVALID);
    REFUSED(vm_serial_input(m, 4, (const uint8_t *)"x", 1), VM_E_INVALID);
    REFUSED(vm_serial_input(m, 0, NULL, 1), VM_E_INVALID);
    CHECK_EQ(vm_serial_input(m, 0, NULL, 0), 0);
    vm_destroy(m);
}

TEST(stats)
{
    vm_machine *m = make_bare();
    uint64_t v;
    for (unsigned i = 0; vm_stat_name(i, NULL); i++) {
        const char *text = NULL;
        OK(vm_stats(m, vm_stat_name(i, &text), &v));
        CHECK(text && text[0]);
    }
    CHECK(vm_stat_name(UINT32_MAX, NULL) == NULL);
    REFUSED(vm_stats(m, "nothing", &v), VM_E_NOTFOUND);
    REFUSED(vm_stats(m, NULL, &v), VM_E_INVALID);
    REFUSED(vm_stats(m, "exits", NULL), VM_E_INVALID);
    vm_destroy(m);
}

static void count_line(void *user, vm_trace_category category, const char *line)
{
    (void)category;
    CHECK(line && !strchr(line, '\n'));
    ++*(unsigned *)user;
}

TEST(tracing)
{
    vm_machine *m = make_bare();
    unsigned mask = 7, lines = 0;
    OK(vm_trace_parse("exit,mmio", &mask));
    CHECK_EQ(mask, VM_TRACE_EXIT | VM_TRACE_MMIO);
    OK(vm_trace_parse("all", &mask));
    CHECK_EQ(mask, VM_TRACE_ALL);
    mask = 5;
    REFUSED(vm_trace_parse("exit,nonsense", &mask), VM_E_INVALID);
    CHECK_EQ(mask, 5);
    REFUSED(vm_trace_parse(NULL, &mask), VM_E_INVALID);
    REFUSED(vm_trace_parse("exit", NULL), VM_E_INVALID);
    REFUSED(vm_trace_set(m, 1u << 30, NULL, NULL), VM_E_INVALID);
    OK(vm_trace_set(m, VM_TRACE_EXIT, count_line, &lines));
    OK(vm_map_ram(m, 0, 4096, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, "\xf4", 1));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    CHECK(lines > 0);
    vm_destroy(m);
}

TEST(two_machines_never_meet)
{
    vm_machine *m[2];
    for (int i = 0; i < 2; i++) {
        unsigned char code[] = { 0xb8, (unsigned char)(i + 1), 0, 0, 0, 0xa3, 0, 0x08, 0, 0, 0, 0, 0, 0, 0xf4 };
        m[i] = make_bare();
        OK(vm_map_ram(m[i], 0, 4096, VM_PROT_RWX, NULL));
        OK(vm_write(m[i], 0, code, sizeof code));
        OK(vm_vcpu_set_mode(vm_vcpu_get(m[i], 0), VM_MODE_FLAT64));
    }
    vm_vcpu_kick(vm_vcpu_get(m[0], 0));
    for (int i = 1; i >= 0; i--) {
        vm_exit e = VM_EXIT_INIT;
        uint32_t stored = 0;
        OK(vm_vcpu_run(vm_vcpu_get(m[i], 0), NULL, &e));
        CHECK_EQ(e.reason, i == 1 ? VM_EXIT_HALT : VM_EXIT_KICK);
        OK(vm_read(m[i], 0x800, &stored, 4));
        CHECK_EQ(stored, i == 1 ? 2 : 0);
    }
    vm_destroy(m[0]);
    vm_destroy(m[1]);
}

static long resident_pages(void)
{
    long size = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%ld %ld", &size, &resident) != 2)
        FAIL("cannot read /proc/self/statm");
    fclose(f);
    return resident;
}

static unsigned open_descriptors(void)
{
    unsigned n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) != -1;
    return n;
}

static unsigned mappings(void)
{
    unsigned n = 0;
    FILE *f = fopen("/proc/self/maps", "r");
    for (int c; f && (c = getc(f)) != EOF;)
        n += c == '\n';
    if (f)
        fclose(f);
    return n;
}

/* Ten instructions in 2 MiB of RAM, as the figure has it. */
static void short_life(vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    vm_exit e = VM_EXIT_INIT;
    o.backend = backend;
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0, 2 << 20, VM_PROT_RWX, NULL));
    OK(vm_write(m, 0, "\x90\x90\x90\x90\x90\x90\x90\x90\x90\xf4", 10));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    vm_destroy(m);
}

static void many_lives(const void *arg)
{
    vm_backend backend = *(const vm_backend *)arg;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    test_skip("a sanitizer keeps memory that was freed");
#endif
    for (int i = 0; i < 200; i++)                       /* let allocators reach their size */
        short_life(backend);
    long before = resident_pages();
    unsigned descriptors = open_descriptors(), maps = mappings();
    for (int i = 0; i < 10000; i++)
        short_life(backend);
    CHECK_EQ(open_descriptors(), descriptors);
    CHECK(mappings() <= maps + 8);
    long grown = resident_pages() - before;
    if (grown > 256)
        FAIL("10,000 machines left %ld pages resident", grown);
}

SETUP(lives)
{
    static const vm_backend backends[] = { VM_BACKEND_INTERP, VM_BACKEND_JIT, VM_BACKEND_KVM };
    for (int i = 0; i < 3; i++) {
        uint64_t available = 0;
        char name[64];
        if (vm_query(backends[i], "available", &available) || !available)
            continue;
        snprintf(name, sizeof name, "ten_thousand_lives/%s", vm_backend_name(backends[i]));
        test_add(name, many_lives, &backends[i], backends[i] == VM_BACKEND_KVM ? 900 : 120);   /* the kernel's RCU waits */
    }
}

TEST(many_machines_at_once)
{
    enum { N = 64 };
    static vm_machine *m[N];
    for (int i = 0; i < N; i++) {
        m[i] = make_bare();
        OK(vm_map_ram(m[i], 0, 1 << 20, VM_PROT_RWX, NULL));
    }
    for (int i = 0; i < N; i++)
        vm_destroy(m[i ^ 21]);
}
