/* api.c - fuzz target: calls of the public interface. The input is a list of calls with their arguments, chosen as programs
 * choose them badly (fuzz_number). Handles are those the calls before gave, or NULL; using one after its end is not tried:
 * the interface does not allow it. Whatever the order, each call must come back with a status.
 */
#include "fuzz.h"
#include <libvm/libvm.h>
#include <stdlib.h>

const struct fuzz_target fuzz_target = { "api", 300, 1500 };

enum { MACHINES = 2, REGIONS = 8, HOOKS = 8, SNAPSHOTS = 4, POINTS = 8, KINDS = 4, BUDGET = 50 };

typedef struct world {
    fuzz_input   in;
    vm_machine  *m[MACHINES];
    vm_region   *region[MACHINES][REGIONS];
    vm_hook     *hook[MACHINES][HOOKS];
    vm_snapshot *snapshot[MACHINES][SNAPSHOTS];
    struct { uint64_t address, bytes; vm_prot how; bool is_watch; } point[MACHINES][POINTS];    /* set, to be taken away */
    unsigned     points[MACHINES];
    int          kind[MACHINES];        /* of kept machine, -1: one of its own */
    bool         has_pc, is_dear, has_kvm;      /* an input that may use a PC; make machines, and fork; on KVM */
    unsigned     current;
    unsigned     calls;
    bool         inside;                /* in a callback */
    bool         mapped_since;          /* a restore may have ended regions: their handles are forgotten */
    uint8_t      page[2 * 4096] __attribute__((aligned(4096)));
    uint8_t      coverage[4096];
} world;

static void one_call(world *w);

/* ---- callbacks: make calls of their own ---- */

static void calls_inside(world *w)
{
    if (w->inside || w->calls > 400)
        return;
    w->inside = true;
    for (uint64_t n = fuzz_bits(&w->in, 1) & 3; n; n--)
        one_call(w);
    w->inside = false;
}

static int on_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu, (void)offset, (void)width;
    calls_inside(user);
    *value = 0x1122334455667788;
    return 0;
}

static int on_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width, (void)value;
    calls_inside(user);
    return value & 1 ? -1 : 0;
}

static vm_hook_result on_hook(void *user, vm_vcpu *cpu, const vm_hook_event *event)
{
    world *w = user;
    (void)cpu;
    calls_inside(w);
    return (vm_hook_result)(event->address % 61 == 0 ? VM_HOOK_STOP : event->address % 67 == 0 ? VM_HOOK_SKIP : VM_HOOK_CONTINUE);
}

static void on_text(void *user, const uint8_t *bytes, size_t count)
{
    (void)user;
    if (count && bytes[0] == bytes[count - 1] + 1)
        return;
}

/* ---- handles ---- */

static vm_region **free_region(world *w)
{
    for (int i = 0; i < REGIONS; i++)
        if (!w->region[w->current][i])
            return &w->region[w->current][i];
    return NULL;
}

static void forget(world *w)
{
    memset(w->region[w->current], 0, sizeof w->region[0]);
    memset(w->hook[w->current], 0, sizeof w->hook[0]);
    memset(w->snapshot[w->current], 0, sizeof w->snapshot[0]);
    w->points[w->current] = 0;
    w->kind[w->current] = -1;
}

static vm_vcpu *any_vcpu(world *w)
{
    return vm_vcpu_get(w->m[w->current], (unsigned)fuzz_bits(&w->in, 1) & 1);
}

/* ---- calls ---- */

static uint64_t number(world *w) { return fuzz_number(&w->in); }
#define machine(w) ((w)->m[(w)->current])

/* Machines that are kept and put back, since making one takes far longer than an input: interpreter and JIT, bare and PC. */
static struct { vm_machine *m; vm_snapshot *fresh; } kept[MACHINES][KINDS];

static void take_kept(world *w, unsigned kind)
{
    vm_options options = VM_OPTIONS_INIT;
    vm_machine **m = &kept[w->current][kind].m;
    options.backend = kind & 1 ? VM_BACKEND_JIT : VM_BACKEND_INTERP;
    options.platform = kind & 2 ? VM_PLATFORM_PC : VM_PLATFORM_BARE;
    options.ram_bytes = kind & 2 ? 1 << 20 : 0;
    options.code_cache_bytes = 1 << 20;
    forget(w);
    if (!*m && (vm_create(&options, m) != VM_OK || vm_snapshot_take(*m, &kept[w->current][kind].fresh) != VM_OK))
        abort();
    machine(w) = *m;
    w->kind[w->current] = (int)kind;
}

/* Back to how it was made. */
static void put_back(world *w, unsigned kind)
{
    vm_machine *m = machine(w);
    const unsigned c = w->current;
    for (unsigned i = 0; i < HOOKS; i++)
        if (w->hook[c][i] && vm_hook_remove(m, w->hook[c][i]) != VM_OK)
            abort();
    while (w->points[c]--) {
        if (w->point[c][w->points[c]].is_watch)
            vm_watchpoint(m, w->point[c][w->points[c]].address, w->point[c][w->points[c]].bytes,
                          w->point[c][w->points[c]].how, false);
        else
            vm_breakpoint(m, w->point[c][w->points[c]].address, false);
    }
    vm_coverage(m, NULL, 0);
    vm_coverage_range(m, 0, 0);
    vm_dirty_log(m, false);
    for (unsigned port = 0; port < 4; port++)
        vm_serial_output(m, port, NULL, NULL);
    /* The young before the old: the oldest is what `fresh` is of. */
    if (vm_snapshot_restore(m, kept[c][kind].fresh) != VM_OK)
        abort();
    for (unsigned i = 0; i < SNAPSHOTS; i++)
        vm_snapshot_free(w->snapshot[c][i]);
    if (vm_mmu_select(m, NULL) != VM_OK || vm_backend_select(m, kind & 1 ? VM_BACKEND_JIT : VM_BACKEND_INTERP) != VM_OK)
        abort();
}

static void end_machine(world *w)
{
    const int kind = w->kind[w->current];
    if (machine(w) && kind >= 0)
        put_back(w, (unsigned)kind);
    else
        vm_destroy(machine(w));
    machine(w) = NULL;
    forget(w);
}

static void call_create(world *w)
{
    static const char *const mmus[] = { NULL, "tlb", "flat", "shadow", "ept", "nothing" };
    vm_options options = VM_OPTIONS_INIT;
    if (machine(w) || w->inside)
        return;
    uint8_t bits = (uint8_t)fuzz_bits(&w->in, 1), how = (uint8_t)fuzz_bits(&w->in, 1);
    if (how % 64 || !w->is_dear) {
        take_kept(w, bits % (w->has_pc ? KINDS : KINDS / 2));
        return;
    }
    options.backend = bits & 1 ? VM_BACKEND_JIT : bits & 2 ? VM_BACKEND_INTERP : (vm_backend)(bits >> 6);
    options.platform = (vm_platform)(bits >> 2 & 1);
    options.vcpus = bits >> 3 & 3;
    options.mmu = mmus[fuzz_bits(&w->in, 1) % 6];
    options.ram_bytes = options.platform == VM_PLATFORM_PC ? 1 << 20 : bits & 32 ? number(w) : 0;
    options.code_cache_bytes = bits & 32 ? number(w) % (4 << 20) : 1 << 20;
    if (options.backend == VM_BACKEND_AUTO || (options.backend == VM_BACKEND_KVM && !w->has_kvm))
        options.backend = VM_BACKEND_INTERP;
    forget(w);
    vm_create(&options, &machine(w));
}

static void call_destroy(world *w)
{
    if (!w->inside)
        end_machine(w);
}

static void call_map(world *w)
{
    vm_region **out = free_region(w);
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t gpa = number(w), bytes = number(w) % (1 << 20);
    vm_prot prot = (vm_prot)(number(w) & 15);
    if (!out)
        return;
    ops.read = gpa & 8 ? NULL : on_read;
    ops.write = on_write;
    switch (fuzz_bits(&w->in, 1) & 3) {
    case 0: vm_map_ram(machine(w), gpa, bytes, prot, out); break;
    case 1: vm_map_host(machine(w), gpa, 8192, prot, w->page, out); break;
    case 2: vm_map_mmio(machine(w), gpa, bytes, &ops, w, out); break;
    default: vm_map_pio(machine(w), (uint16_t)gpa, (unsigned)bytes, &ops, w, out); break;
    }
}

static void call_ram(world *w)           /* the likely one: some memory with some code */
{
    vm_region **out = free_region(w);
    uint8_t code[64];
    if (!out || !machine(w))
        return;
    vm_map_ram(machine(w), 0x1000, 0x8000, VM_PROT_RWX, out);
    for (size_t i = 0; i < sizeof code; i++)
        code[i] = (uint8_t)fuzz_bits(&w->in, 1);
    vm_write(machine(w), 0x1000, code, sizeof code);
    vm_vcpu *cpu = any_vcpu(w);
    vm_regs regs = VM_REGS_INIT;
    if (!cpu)
        return;
    vm_vcpu_set_mode(cpu, VM_MODE_FLAT64);
    vm_vcpu_get_regs(cpu, &regs);
    regs.rip = 0x1000;
    regs.rsp = 0x8000;
    vm_vcpu_set_regs(cpu, &regs);
}

static void call_unmap(world *w)
{
    vm_region **r = &w->region[w->current][fuzz_bits(&w->in, 1) % REGIONS];
    if (vm_unmap(machine(w), *r) == VM_OK)
        *r = NULL;
}

static void call_region(world *w)
{
    vm_region *r = w->region[w->current][fuzz_bits(&w->in, 1) % REGIONS];
    uint64_t bytes = vm_region_bytes(r);
    uint8_t *data = vm_region_data(r);
    if (data && bytes) {
        data[number(w) % bytes] ^= 0x55;
        vm_invalidate(machine(w), vm_region_gpa(r), bytes);
    }
    vm_coalesce(machine(w), r, number(w), number(w), number(w) & 1);
}

static void call_memory(world *w)
{
    uint8_t buffer[512] = { 1, 2, 3 };
    uint64_t bitmap[4];
    uint64_t a = number(w), b = number(w);
    switch (fuzz_bits(&w->in, 1) % 8) {
    case 0: vm_read(machine(w), a, buffer, b % sizeof buffer); break;
    case 1: vm_write(machine(w), a, buffer, b % sizeof buffer); break;
    case 2: vm_protect(machine(w), a, b, (vm_prot)(number(w) & 15)); break;
    case 3: vm_invalidate(machine(w), a, b); break;
    case 4: vm_dirty_log(machine(w), a & 1); break;
    case 5: vm_dirty_fetch(machine(w), a, b % (256 * 4096 + 1), bitmap); break;
    case 6: vm_discard(machine(w), a, b); break;
    default: vm_advise(machine(w), a, b % (1 << 20), (unsigned)number(w) & 15); break;
    }
}

static void call_registers(world *w)
{
    vm_vcpu *cpu = any_vcpu(w);
    uint8_t value[64] = { 0 };
    uint64_t v = number(w);
    vm_sregs sregs = VM_SREGS_INIT;
    vm_fpu fpu = VM_FPU_INIT;
    memcpy(value, &v, 8);
    switch (fuzz_bits(&w->in, 1) % 8) {
    case 0: vm_vcpu_write_reg(cpu, (int)number(w), value, number(w) & 63); break;
    case 1: vm_vcpu_write_reg(cpu, (int)(v % VM_REG_COUNT), value, vm_reg_size((int)(v % VM_REG_COUNT))); break;
    case 2: vm_vcpu_read_reg(cpu, (int)(v % VM_REG_COUNT), value, vm_reg_size((int)(v % VM_REG_COUNT))); break;
    case 3: vm_vcpu_set_msr(cpu, (uint32_t)v, number(w)); break;
    case 4: vm_vcpu_get_msr(cpu, (uint32_t)v, &v); break;
    case 5:
        if (cpu && vm_vcpu_get_sregs(cpu, &sregs) == VM_OK) {
            ((uint8_t *)&sregs)[8 + v % (sizeof sregs - 8)] ^= (uint8_t)number(w);
            vm_vcpu_set_sregs(cpu, &sregs);
        }
        break;
    case 6:
        if (cpu && vm_vcpu_get_fpu(cpu, &fpu) == VM_OK) {
            ((uint8_t *)&fpu)[4 + v % (sizeof fpu - 4)] ^= (uint8_t)number(w);
            vm_vcpu_set_fpu(cpu, &fpu);
        }
        break;
    default: vm_vcpu_set_mode(cpu, (vm_mode)(v & 7)); break;
    }
}

static void call_run(world *w)
{
    vm_run_options run = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint8_t bits = (uint8_t)fuzz_bits(&w->in, 1);
    run.max_instructions = 1 + number(w) % BUDGET;
    run.deadline_ns = 20000;          /* a wait for an interrupt that does not come */
    run.has_until = bits & 1;
    run.until = number(w);
    run.exception_exits = bits & 2 ? number(w) : 0;
    run.single_step = bits & 4;
    vm_vcpu *cpu = any_vcpu(w);
    if (vm_vcpu_run(cpu, &run, bits & 8 ? NULL : &e) == VM_OK && e.reason == VM_EXIT_INTERNAL)
        abort();
    char text[100];
    vm_exit_format(&e, text, bits % (sizeof text + 1));
}

static void call_translate(world *w)
{
    vm_vcpu *cpu = any_vcpu(w);
    uint8_t buffer[256] = { 0 };
    uint64_t gpa, a = number(w);
    struct vm_mmu_result result = { .size = sizeof result };
    switch (fuzz_bits(&w->in, 1) % 6) {
    case 0: vm_vcpu_translate(cpu, a, (vm_prot)number(w), &gpa); break;
    case 1: vm_vcpu_read(cpu, a, buffer, number(w) % sizeof buffer); break;
    case 2: vm_vcpu_write(cpu, a, buffer, number(w) % sizeof buffer); break;
    case 3: vm_mmu_walk(cpu, a, (vm_prot)(1 << (number(w) & 3)), &result); break;
    case 4: vm_mmu_flush(cpu, a, number(w)); break;
    default: vm_mmu_trap_writes(cpu, a, number(w) & 1); break;
    }
}

static void call_events(world *w)
{
    vm_vcpu *cpu = any_vcpu(w);
    uint64_t a = number(w);
    switch (fuzz_bits(&w->in, 1) % 6) {
    case 0: vm_vcpu_kick(cpu); break;
    case 1: vm_vcpu_inject(cpu, (uint8_t)a, a & 256, (uint32_t)number(w)); break;
    case 2: vm_irq_set(machine(w), (unsigned)a, number(w) & 1); break;
    case 3: vm_irq_msi(machine(w), a, (uint32_t)number(w)); break;
    case 4: vm_serial_input(machine(w), (unsigned)a & 7, w->page, number(w) % sizeof w->page); break;
    default: vm_serial_output(machine(w), (unsigned)a & 7, a & 8 ? on_text : NULL, w); break;
    }
}

static void call_hook(world *w)
{
    vm_hook **hook = &w->hook[w->current][fuzz_bits(&w->in, 1) % HOOKS];
    vm_hook_desc desc = VM_HOOK_INIT;
    if (*hook) {
        if (vm_hook_remove(machine(w), *hook) == VM_OK)
            *hook = NULL;
        return;
    }
    desc.kind = (vm_hook_kind)(number(w) & 15);
    desc.begin = number(w);
    desc.end = desc.begin + (number(w) & 0xffff);
    desc.fn = on_hook;
    desc.user = w;
    desc.flags = (uint32_t)number(w) & 7 & ~VM_HOOK_SWITCH;
    vm_hook_add(machine(w), &desc, hook);
}

static void call_debug(world *w)
{
    const unsigned c = w->current, n = w->points[c];
    uint64_t a = number(w), address = number(w), bytes = a & 1 ? 0 : number(w);
    vm_prot how = (vm_prot)(a >> 2 & 7);
    if ((a & 2) && n == POINTS)
        return;
    int status = a & 1 ? vm_breakpoint(machine(w), address, a & 2) : vm_watchpoint(machine(w), address, bytes, how, a & 2);
    if (status == VM_OK && (a & 2)) {
        w->point[c][n].address = address;
        w->point[c][n].bytes = bytes;
        w->point[c][n].how = how;
        w->point[c][n].is_watch = !(a & 1);
        w->points[c]++;
    }
}

static void call_snapshot(world *w)
{
    vm_snapshot **s = &w->snapshot[w->current][fuzz_bits(&w->in, 1) % SNAPSHOTS];
    uint64_t a = number(w);
    if (!*s)
        vm_snapshot_take(machine(w), s);
    else if (a & 1) {
        if (vm_snapshot_restore(machine(w), *s) == VM_OK)
            memset(w->region[w->current], 0, sizeof w->region[0]);      /* some may be gone: forget them all */
    } else if (!w->inside) {
        vm_snapshot_free(*s);
        *s = NULL;
    }
}

static void call_fork(world *w)
{
    unsigned other = !w->current;
    if (w->inside || w->m[other] || !machine(w) || !w->is_dear)
        return;
    w->kind[other] = -1;
    vm_fork(machine(w), &w->m[other]);
}

static void call_records(world *w)
{
    uint64_t a = number(w);
    if (a & 1)
        vm_coverage(machine(w), a & 2 ? w->coverage : NULL, a & 4 ? sizeof w->coverage : number(w) % 4097);
    else
        vm_coverage_range(machine(w), number(w), number(w));
}

static void call_machine(world *w)
{
    static const char *const mmus[] = { NULL, "tlb", "flat", "shadow", "ept", "nothing" };
    uint64_t a = number(w), value;
    unsigned view;
    switch (fuzz_bits(&w->in, 1) % 8) {
    case 0: vm_reset(machine(w)); break;
    case 1: vm_mmu_select(machine(w), mmus[a % 6]); break;
    case 2: vm_backend_select(machine(w), a & 1 ? VM_BACKEND_JIT : VM_BACKEND_INTERP); break;
    case 3: vm_stats(machine(w), "instructions", &value); break;
    case 4: vm_ept_create(machine(w), (unsigned)a, number(w), &view); break;
    case 5: vm_ept_protect(machine(w), (unsigned)a & 3, number(w), number(w), (vm_prot)(number(w) & 7)); break;
    case 6: vm_ept_select(any_vcpu(w), (unsigned)a & 3); break;
    default: vm_ept_destroy(machine(w), (unsigned)a & 3); break;
    }
}

static void call_other(world *w) { w->current = !w->current; }

static void (*const calls[])(world *) = {
    call_create, call_destroy, call_map, call_ram, call_unmap, call_region, call_memory, call_registers, call_run, call_translate,
    call_events, call_hook, call_debug, call_snapshot, call_fork, call_records, call_machine, call_other, call_run, call_ram, call_run,
};

static void one_call(world *w)
{
    unsigned which = (unsigned)fuzz_bits(&w->in, 1) % (sizeof calls / sizeof *calls);
    if (++w->calls > 500)
        return;
    if (!machine(w) && calls[which] != call_other)
        which = 0;
    /* In a callback only the machine that runs is known to be there: no changing over. */
    if (w->inside && calls[which] == call_other)
        return;
    calls[which](w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static world w;
    memset(&w, 0, sizeof w);
    w.kind[0] = w.kind[1] = -1;
    w.in = (fuzz_input){ data, size };
    w.is_dear = fuzz_seldom(data, size, 16);
    w.has_pc = fuzz_seldom(data, size, 4);
    w.has_kvm = fuzz_seldom(data, size, 256);
    while (w.in.left && w.calls < 500)
        one_call(&w);
    for (w.current = 0; w.current < MACHINES; w.current++)
        end_machine(&w);
    return 0;
}
