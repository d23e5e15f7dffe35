/* hygiene.c - what the process looks like while machines live in it: no memory that is writable and executable, and no growth
 * over many machines. */
#include "../backends.h"
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

/* The first mapping that is writable and executable, or an empty string. */
static const char *writable_code(void)
{
    static char line[512];
    char prot[8];
    FILE *f = fopen("/proc/self/maps", "r");
    if (!f)
        test_skip("no /proc/self/maps");
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "%*s %7s", prot) == 1 && prot[1] == 'w' && prot[2] == 'x') {
            fclose(f);
            return line;
        }
    fclose(f);
    return "";
}

typedef struct looks { unsigned count; char bad[512]; } looks;

static void look(looks *l)
{
    const char *bad = writable_code();
    l->count++;
    if (*bad && !*l->bad)
        snprintf(l->bad, sizeof l->bad, "%s", bad);
}

static int on_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    look(user);
    return 0;
}

static vm_hook_result on_block(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    (void)cpu, (void)event;
    look(user);
    return VM_HOOK_CONTINUE;
}

/* again: inc byte [rip + code that is ahead]; out 0x80, al; dec ecx; jnz again; hlt: code that changes itself and makes exits */
static const uint8_t code[] = { 0xfe, 0x05, 0x00, 0x01, 0x00, 0x00, 0xe6, 0x80, 0xe8, 0xf3, 0x00, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xef, 0xf4 };

static vm_machine *make(vm_backend backend, const vm_io_ops *ops, void *user)
{
    static const uint8_t called[] = { 0xb0, 0x00, 0xc3 };                /* mov al, n; ret */
    vm_options options = VM_OPTIONS_INIT;
    vm_machine *m;
    vm_regs regs = VM_REGS_INIT;
    options.backend = backend;
    OK(vm_create(&options, &m));
    OK(vm_map_ram(m, 0x1000, 0x4000, VM_PROT_RWX, NULL));
    OK(vm_map_pio(m, 0x80, 1, ops, user, NULL));
    OK(vm_write(m, 0x1000, code, sizeof code));
    OK(vm_write(m, 0x1100, called, sizeof called));
    OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    OK(vm_vcpu_get_regs(vm_vcpu_get(m, 0), &regs));
    regs.rip = 0x1000;
    regs.rsp = 0x4000;
    regs.rcx = 200;
    OK(vm_vcpu_set_regs(vm_vcpu_get(m, 0), &regs));
    return m;
}

EACH_BACKEND(no_memory_is_writable_and_executable)
{
    looks l = { 0 };
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_hook_desc hook = VM_HOOK_INIT;
    vm_exit e = VM_EXIT_INIT;
    if (SANITIZED)
        test_skip("a sanitizer has mappings of its own");
    look(&l);
    ops.write = on_write;
    vm_machine *m = make(backend, &ops, &l);
    look(&l);
    hook.kind = VM_HOOK_BLOCK;
    hook.fn = on_block;
    hook.user = &l;
    OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
    if (vm_hook_add(m, &hook, NULL) == VM_OK) {
        uint64_t rip = 0x1000;
        OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
        OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RCX, &(uint64_t){ 20 }, 8));
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &e));
    }
    vm_destroy(m);
    look(&l);
    CHECK(l.count > 200);
    if (*l.bad)
        FAIL("writable and executable: %s", l.bad);
}

static uint64_t resident(void)
{
    unsigned long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%*u %lu", &pages) != 1)
        test_skip("no /proc/self/statm");
    fclose(f);
    return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

static int nothing(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)cpu, (void)offset, (void)width, (void)value;
    return 0;
}

/* LIBVM_CYCLES machines, one after the other (make check-cycles: 100,000). */
static void on_cycles(const void *arg)
{
    const char *asked = getenv("LIBVM_CYCLES");
    unsigned cycles = asked ? (unsigned)atoi(asked) : 1500;
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t before = 0;
    if (SANITIZED)
        test_skip("a sanitizer keeps memory that was freed");
    ops.write = nothing;
    for (unsigned i = 0; i < cycles; i++) {
        vm_machine *m = make(*(const vm_backend *)arg, &ops, NULL);
        OK(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, NULL));
        vm_destroy(m);
        if (i == cycles / 5)
            before = resident();
    }
    uint64_t after = resident();
    if (after > before + (256 << 10))
        FAIL("resident memory grew from %" PRIu64 " to %" PRIu64 " KiB over %u machines", before >> 10, after >> 10, cycles);
}

SETUP(cycles)
{
    add_for_backends("many_machines_leave_nothing", on_cycles, 3600);
}
