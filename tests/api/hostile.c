/* hostile.c - kernels and initial RAM disks cut short, with bits turned over, and with absurd header fields: each is booted or
 * refused with a status and a message; nothing crashes, hangs or leaks (built with --enable-asan the last is seen as well). */
#include <libvm/libvm.h>
#include "test.h"

#include <sys/stat.h>
#include <unistd.h>

enum { IMAGE = 24576 };
typedef struct image { unsigned char b[IMAGE]; size_t bytes; } image;

static void put(image *i, size_t at, uint64_t v, size_t n) { memcpy(i->b + at, &v, n); }

/* A bzImage by the Linux boot protocol 2.15: four setup sectors, then "code". */
static void bzimage(image *i)
{
    memset(i, 0, sizeof *i);
    i->bytes = 5 * 512 + 8192;
    put(i, 0x1f1, 4, 1);                                    /* setup_sects */
    put(i, 0x1f4, 8192 / 16, 4);                            /* syssize */
    put(i, 0x1fe, 0xaa55, 2);
    put(i, 0x200, 0x66eb, 2);                               /* jump over the header */
    memcpy(i->b + 0x202, "HdrS", 4);
    put(i, 0x206, 0x20f, 2);
    put(i, 0x211, 1, 1);                                    /* loaded high */
    put(i, 0x214, 0x100000, 4);
    put(i, 0x22c, 0x7fffffff, 4);                           /* initrd_addr_max */
    put(i, 0x230, 0x200000, 4);                             /* kernel_alignment */
    put(i, 0x234, 1, 1);
    put(i, 0x236, 3, 2);                                    /* xloadflags: 64-bit entry, may lie above 4 GiB */
    put(i, 0x238, 255, 4);                                  /* cmdline_size */
    put(i, 0x258, 0x200000, 8);                             /* pref_address */
    put(i, 0x260, 0x10000, 4);                              /* init_size */
}

/* An ELF64 kernel with two segments and, in the second, the PVH note. */
static void elf64(image *i)
{
    memset(i, 0, sizeof *i);
    i->bytes = 0x2000;
    memcpy(i->b, "\177ELF\2\1\1", 7);
    put(i, 16, 2, 2), put(i, 18, 62, 2), put(i, 20, 1, 4), put(i, 24, 0x100000, 8), put(i, 32, 64, 8);
    put(i, 52, 64, 2), put(i, 54, 56, 2), put(i, 56, 2, 2);
    put(i, 64, 1, 4), put(i, 68, 7, 4), put(i, 72, 0x1000, 8), put(i, 80, 0x100000, 8), put(i, 88, 0x100000, 8);
    put(i, 96, 0x800, 8), put(i, 104, 0x4000, 8), put(i, 112, 0x1000, 8);
    put(i, 120, 4, 4), put(i, 128, 0x1800, 8), put(i, 152, 20, 8), put(i, 160, 20, 8), put(i, 168, 4, 8);
    put(i, 0x1800, 4, 4), put(i, 0x1804, 4, 4), put(i, 0x1808, 18, 4);
    memcpy(i->b + 0x180c, "Xen", 4);
    put(i, 0x1810, 0x100000, 4);
}

/* Multiboot 1 with the a.out kludge. */
static void multiboot(image *i)
{
    memset(i, 0, sizeof *i);
    i->bytes = 0x1800;
    put(i, 64, 0x1badb002, 4), put(i, 68, 0x00010003, 4), put(i, 72, (uint32_t) - (0x1badb002 + 0x00010003), 4);
    put(i, 76, 0x100040, 4), put(i, 80, 0x100000, 4), put(i, 84, 0x101800, 4), put(i, 88, 0x102000, 4), put(i, 92, 0x100060, 4);
}

static const struct kind { const char *name; void (*make)(image *); size_t header; } kinds[] = {
    { "bzimage", bzimage, 0x270 }, { "elf64-pvh", elf64, 0xb0 }, { "multiboot", multiboot, 0x60 },
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

static char folder[64], kernel[80], initrd[80];

static void write_file(const char *path, const void *bytes, size_t count)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, count, f) != count || fclose(f))
        FAIL("cannot write %s", path);
}

static void open_folder(void)
{
    strcpy(folder, "/tmp/libvm-hostile-XXXXXX");
    CHECK(mkdtemp(folder) != NULL);
    snprintf(kernel, sizeof kernel, "%s/kernel", folder);
    snprintf(initrd, sizeof initrd, "%s/initrd", folder);
    write_file(initrd, "070701", 6);
}

static void close_folder(void)
{
    unlink(kernel);
    unlink(initrd);
    rmdir(folder);
}

/* Boots `i`, or has it refused properly. Returns the status. */
static int offer(const image *i, const char *what, bool with_initrd)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_boot_options b = VM_BOOT_OPTIONS_INIT;
    vm_machine *m = NULL;
    o.backend = VM_BACKEND_INTERP;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 16 << 20;
    OK(vm_create(&o, &m));
    write_file(kernel, i->b, i->bytes);
    b.kernel = kernel;
    b.initrd = with_initrd ? initrd : NULL;
    b.cmdline = "console=ttyS0";
    int status = vm_boot_image(m, &b);
    if (status > 0 || (status < 0 && status != VM_E_FORMAT && status != VM_E_NOMEM && status != VM_E_UNSUPPORTED &&
                       status != VM_E_INVALID))
        FAIL("%s: status %d, %s", what, status, vm_errmsg());
    if (status < 0 && !vm_errmsg()[0])
        FAIL("%s: status %d without a message", what, status);
    if (status == VM_OK) {                                  /* wherever it starts: it must come back */
        vm_run_options r = VM_RUN_OPTIONS_INIT;
        vm_exit e = VM_EXIT_INIT;
        r.max_instructions = 50;
        r.deadline_ns = 200000000;
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), &r, &e));
    }
    vm_destroy(m);
    return status;
}

static void whole(const void *arg)
{
    const struct kind *k = arg;
    static image i;
    open_folder();
    k->make(&i);
    CHECK_EQ(offer(&i, "the image as it should be", false), VM_OK);
    CHECK_EQ(offer(&i, "the image with an initrd", true), VM_OK);
    close_folder();
}

static void cut_short(const void *arg)
{
    const struct kind *k = arg;
    static image i;
    unsigned refused = 0;
    open_folder();
    k->make(&i);
    size_t all = i.bytes;
    for (size_t n = 0; n < all; n += n < k->header + 16 ? 7 : 611) {
        char what[40];
        snprintf(what, sizeof what, "first %zu bytes", n);
        i.bytes = n;
        refused += offer(&i, what, false) != VM_OK;
    }
    CHECK(refused > k->header / 7);                         /* at the least whatever lacks its header */
    close_folder();
}

static void turned_bits(const void *arg)
{
    const struct kind *k = arg;
    static image i;
    open_folder();
    for (size_t bit = 0; bit < k->header * 8; bit += 3) {
        char what[40];
        snprintf(what, sizeof what, "bit %zu of byte %#zx", bit % 8, bit / 8);
        k->make(&i);
        i.b[bit / 8] ^= (unsigned char)(1u << bit % 8);
        offer(&i, what, bit & 1);
    }
    close_folder();
}

static void absurd_fields(const void *arg)
{
    const struct kind *k = arg;
    static const uint64_t values[] = { 0, 1, 0x7fffffff, 0x80000000, 0xfffff000, 0xffffffff, INT64_MAX, UINT64_MAX };
    static image i;
    open_folder();
    for (size_t at = k->header > 0x1f0 ? 0x1f0 : 0; at < k->header; at += 4) {
        for (unsigned v = 0; v < sizeof values / sizeof values[0]; v++) {
            char what[64];
            snprintf(what, sizeof what, "%#" PRIx64 " at %#zx", values[v], at);
            k->make(&i);
            put(&i, at, values[v], values[v] >> 32 ? 8 : 4);
            offer(&i, what, v & 1);
        }
    }
    close_folder();
}

SETUP(kinds)
{
    static const struct { const char *name; test_fn fn; } ways[] = {
        { "whole", whole }, { "cut_short", cut_short }, { "turned_bits", turned_bits }, { "absurd_fields", absurd_fields },
    };
    for (unsigned k = 0; k < KINDS; k++) {
        for (unsigned w = 0; w < sizeof ways / sizeof ways[0]; w++) {
            char name[64];
            snprintf(name, sizeof name, "%s/%s", ways[w].name, kinds[k].name);
            test_add(name, ways[w].fn, &kinds[k], 120);
        }
    }
}

TEST(elf_segments_stay_in_ram_of_a_bare_machine)
{
    static image i;
    vm_options o = VM_OPTIONS_INIT;
    vm_machine *m = NULL;
    uint64_t entry = 0;
    o.backend = VM_BACKEND_INTERP;
    open_folder();
    OK(vm_create(&o, &m));
    OK(vm_map_ram(m, 0x100000, 0x4000, VM_PROT_RWX, NULL));
    elf64(&i);
    write_file(kernel, i.b, i.bytes);
    OK(vm_load_elf(m, kernel, &entry));
    CHECK_EQ(entry, 0x100000);
    put(&i, 104, 0x4001, 8);                                /* a byte too much of .bss */
    write_file(kernel, i.b, i.bytes);
    CHECK(vm_load_elf(m, kernel, &entry) < 0);
    CHECK(vm_errmsg()[0]);
    vm_destroy(m);
    close_folder();
}
