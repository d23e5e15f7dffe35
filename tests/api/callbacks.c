/* callbacks.c - what a device callback may see and change of the vCPU that called it, and virtual time. */
#include "../backends.h"

#define PORT 0x10u

static vm_vcpu *machine(vm_backend backend, const vm_io_ops *ops, void *user, const void *code, size_t bytes)
{
    vm_vcpu *cpu = bare_machine(backend, VM_MODE_FLAT64, code, bytes);
    OK(vm_map_pio(vm_vcpu_machine(cpu), PORT, 4, ops, user, NULL));
    return cpu;
}
#define MACHINE(ops, user, code) machine(backend, ops, user, code, sizeof code - 1)

static uint64_t get(vm_vcpu *cpu, int reg)
{
    uint64_t v = 0;
    OK(vm_vcpu_read_reg(cpu, reg, &v, vm_reg_size(reg)));
    return v;
}

static void run_to_halt(vm_vcpu *cpu)
{
    vm_exit e = VM_EXIT_INIT;
    OK(vm_vcpu_run(cpu, NULL, &e));
    CHECK_EQ(e.reason, VM_EXIT_HALT);
}

/* 0: inc eax  2: out 0x10, al  4: inc eax  6: inc eax  8: hlt  9: inc eax (x3)  f: hlt */
static const char JUMPY[] = "\xff\xc0\xe6\x10\xff\xc0\xff\xc0\xf4\xff\xc0\xff\xc0\xff\xc0\xf4";

static int jump_by_register(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    uint64_t rip = 9;
    (void)user, (void)offset, (void)width, (void)value;
    CHECK_EQ(get(cpu, VM_REG_RIP), 2);
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8));
    return 0;
}

static int jump_in_bulk(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_regs r = VM_REGS_INIT;
    (void)user, (void)offset, (void)width, (void)value;
    OK(vm_vcpu_get_regs(cpu, &r));
    CHECK_EQ(r.rip, 2);
    r.rip = 9;
    OK(vm_vcpu_set_regs(cpu, &r));
    return 0;
}

static int no_change(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    vm_regs r = VM_REGS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    (void)user, (void)offset, (void)width, (void)value;
    OK(vm_vcpu_get_regs(cpu, &r));
    OK(vm_vcpu_set_regs(cpu, &r));
    OK(vm_vcpu_get_sregs(cpu, &s));
    OK(vm_vcpu_set_sregs(cpu, &s));
    return 0;
}

static void jump(vm_backend backend, int (*write)(void *, vm_vcpu *, uint64_t, unsigned, uint64_t), uint64_t rax,
                 uint64_t rip)
{
    vm_io_ops ops = VM_IO_OPS_INIT;
    ops.write = write;
    vm_vcpu *cpu = MACHINE(&ops, NULL, JUMPY);
    for (unsigned round = 0; round < 3; round++) {       /* cold and warm */
        uint64_t zero = 0;
        OK(vm_vcpu_write_reg(cpu, VM_REG_RAX, &zero, 8));
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
        run_to_halt(cpu);
        CHECK_EQ(get(cpu, VM_REG_RAX), rax);
        CHECK_EQ(get(cpu, VM_REG_RIP), rip);
    }
    vm_destroy(vm_vcpu_machine(cpu));
}

EACH_BACKEND(rip_written_in_a_callback_is_where_it_goes_on) { jump(backend, jump_by_register, 4, 0x10); }
EACH_BACKEND(rip_set_in_bulk_in_a_callback) { jump(backend, jump_in_bulk, 4, 0x10); }
EACH_BACKEND(registers_written_back_unchanged) { jump(backend, no_change, 3, 9); }

/* The callback rewrites the very code that follows the OUT. */
static int rewrite_code(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)offset, (void)width, (void)value;
    OK(vm_write(vm_vcpu_machine(cpu), 4, "\xff\xc8", 2));        /* dec eax */
    return 0;
}

EACH_BACKEND(code_rewritten_by_a_callback_is_what_runs_next)
{
    vm_io_ops ops = VM_IO_OPS_INIT;
    ops.write = rewrite_code;
    vm_vcpu *cpu = MACHINE(&ops, NULL, JUMPY);
    for (unsigned round = 0; round < 3; round++) {
        uint64_t zero = 0;
        OK(vm_write(vm_vcpu_machine(cpu), 4, "\xff\xc0", 2));
        OK(vm_vcpu_write_reg(cpu, VM_REG_RAX, &zero, 8));
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
        run_to_halt(cpu);
        CHECK_EQ(get(cpu, VM_REG_RAX), 1);                       /* 1 - 1 + 1 */
    }
    vm_destroy(vm_vcpu_machine(cpu));
}

/* The callback injects an interrupt: it is taken before the next instruction, whatever block that is part of. */
static int inject(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)offset, (void)width, (void)value;
    OK(vm_vcpu_inject(cpu, 0x40, false, 0));
    return 0;
}

EACH_BACKEND(interrupt_injected_by_a_callback)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM takes injections when it next enters the guest");
    static const uint8_t gate[16] = { 0x00, 0x90, 8, 0, 0, 0x8e };       /* handler 0x9000, selector 8 */
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_sregs s = VM_SREGS_INIT;
    uint64_t return_rip = 0;
    ops.write = inject;
    vm_vcpu *cpu = MACHINE(&ops, NULL, JUMPY);
    vm_machine *m = vm_vcpu_machine(cpu);
    OK(vm_write(m, 0xa000 + 0x40 * 16, gate, sizeof gate));
    OK(vm_write(m, 0x9000, "\xf4", 1));
    OK(vm_write(m, 0xb008, "\xff\xff\x00\x00\x00\x9b\xaf\x00", 8));      /* 64-bit code */
    OK(vm_vcpu_get_sregs(cpu, &s));
    s.idtr.base = 0xa000;
    s.idtr.limit = 0xfff;
    s.gdtr.base = 0xb000;
    s.gdtr.limit = 0xf;
    OK(vm_vcpu_set_sregs(cpu, &s));
    run_to_halt(cpu);
    CHECK_EQ(get(cpu, VM_REG_RIP), 0x9001);
    CHECK_EQ(get(cpu, VM_REG_RAX), 1);                           /* not one instruction later */
    OK(vm_vcpu_read(cpu, get(cpu, VM_REG_RSP), &return_rip, 8));
    CHECK_EQ(return_rip, 4);
    vm_destroy(m);
}

/* ---- virtual time ---- */

/* rdtsc; mov esi, eax; nop; nop; rdtsc; sub eax, esi; hlt */
static const char TSC[] = "\x0f\x31\x89\xc6\x90\x90\x0f\x31\x29\xf0\xf4";

EACH_BACKEND(bare_time_is_retired_instructions)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("hardware counts its own time");
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_vcpu *cpu = MACHINE(&ops, NULL, TSC);
    for (unsigned round = 0; round < 3; round++) {
        uint64_t zero = 0, before = vm_vcpu_retired(cpu);
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
        run_to_halt(cpu);
        CHECK_EQ(get(cpu, VM_REG_RAX), 4);
        CHECK_EQ(get(cpu, VM_REG_RSI), before & UINT32_MAX);
        CHECK_EQ(vm_vcpu_retired(cpu), before + 7);
        CHECK_EQ(vm_time(vm_vcpu_machine(cpu)), before + 7);
    }
    vm_destroy(vm_vcpu_machine(cpu));
}

static int note_time(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)offset, (void)width, (void)value;
    uint64_t *times = user;
    times[0] = vm_vcpu_retired(cpu);
    times[1] = vm_time(vm_vcpu_machine(cpu));
    return 0;
}

EACH_BACKEND(retired_is_exact_in_callbacks)
{
    if (backend == VM_BACKEND_KVM)
        test_skip("KVM counts no instructions");
    uint64_t times[2] = { 77, 77 }, zero = 0;
    vm_io_ops ops = VM_IO_OPS_INIT;
    ops.write = note_time;
    vm_vcpu *cpu = MACHINE(&ops, times, JUMPY);
    for (unsigned round = 0; round < 3; round++) {
        uint64_t before = vm_vcpu_retired(cpu);
        OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &zero, 8));
        run_to_halt(cpu);
        CHECK_EQ(times[0], before + 1);
        CHECK_EQ(times[1], before + 1);
    }
    vm_destroy(vm_vcpu_machine(cpu));
}

static int sum_up(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu, (void)offset, (void)width;
    *(uint64_t *)user += value;
    return 0;
}

/* ffd: add ecx, 1  1000: setnp [rbx]  1003: dec r8d  1006: jne ffd  1008: hlt. The flags are made in one block, and a device is
 * written in another, on the next page. */
EACH_BACKEND(flags_of_another_block_reach_a_device)
{
    static const char code[] = "\x83\xc1\x01\x0f\x9b\x03\x41\xff\xc8\x75\xf5\xf4";
    enum { ROUNDS = 300, AT = 0xffd };
    vm_io_ops ops = VM_IO_OPS_INIT;
    uint64_t got = 0, odd = 0, rip = AT, rbx = 0x20000, rcx = 0, r8 = ROUNDS;
    ops.write = sum_up;
    vm_vcpu *cpu = MACHINE(&ops, NULL, "\xf4");
    OK(vm_write(vm_vcpu_machine(cpu), AT, code, sizeof code - 1));
    OK(vm_map_mmio(vm_vcpu_machine(cpu), rbx, 0x1000, &ops, &got, NULL));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RIP, &rip, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RBX, &rbx, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_RCX, &rcx, 8));
    OK(vm_vcpu_write_reg(cpu, VM_REG_R8, &r8, 8));
    run_to_halt(cpu);
    for (unsigned i = 1; i <= ROUNDS; i++)
        odd += (unsigned)__builtin_parity(i & 0xff);
    CHECK_EQ(got, odd);
    vm_destroy(vm_vcpu_machine(cpu));
}

/* ---- port accesses that no region has for itself ---- */

typedef struct port_call { uint64_t offset, value; unsigned width; char who; bool is_write; } port_call;
static port_call port_calls[8];
static unsigned port_call_count;

static void note_port(char who, bool is_write, uint64_t offset, unsigned width, uint64_t value)
{
    CHECK(port_call_count < 8);
    port_calls[port_call_count++] = (port_call){ offset, value & ((UINT64_C(1) << 8 * width) - 1), width, who, is_write };
}

static int port_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)cpu;
    *value = UINT64_C(0xa1a2a3a4a5a6a7a8);
    note_port(*(char *)user, false, offset, width, *value);
    return 0;
}

static int port_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)cpu;
    note_port(*(char *)user, true, offset, width, value);
    return 0;
}

/* Of a PC's ports 0x700 to 0x702 are device A's, 0x703 is B's, then there is nothing, which reads as ones. What does not fit a region comes
 * in parts, the lowest first (device.h). */
static const struct port_case {
    const char *code;
    size_t bytes;
    uint16_t port;
    uint64_t rax, result;
    port_call calls[4];
} port_cases[] = {
    { "\x66\xed\xf4", 3, 0x702, 0, 0xa8a8, { { 2, 0xa8, 1, 'A', false }, { 0, 0xa8, 1, 'B', false } } },         /* in ax, dx */
    { "\xed\xf4", 2, 0x700, 0, 0xa8a8a7a8, { { 0, 0xa7a8, 2, 'A', false }, { 2, 0xa8, 1, 'A', false }, { 0, 0xa8, 1, 'B', false } } },
    { "\xed\xf4", 2, 0x703, 0, 0xffffffa8, { { 0, 0xa8, 1, 'B', false } } },
    { "\xed\xf4", 2, 0x704, 0, 0xffffffff, { { 0 } } },
    { "\x66\xef\xf4", 3, 0x702, 0x1122, 0x1122, { { 2, 0x22, 1, 'A', true }, { 0, 0x11, 1, 'B', true } } },      /* out dx, ax */
    { "\xef\xf4", 2, 0x700, 0x11223344, 0x11223344, { { 0, 0x3344, 2, 'A', true }, { 2, 0x22, 1, 'A', true }, { 0, 0x11, 1, 'B', true } } },
    { "\xef\xf4", 2, 0x703, 0x11223344, 0x11223344, { { 0, 0x44, 1, 'B', true } } },
    { "\xef\xf4", 2, 0x6ff, 0x11223344, 0x11223344, { { 0, 0x2233, 2, 'A', true }, { 2, 0x11, 1, 'A', true } } },
};

static void count_trace(void *user, vm_trace_category category, const char *line)
{
    CHECK_EQ(category, VM_TRACE_MMIO);
    *(unsigned *)user += strstr(line, " in 0x") || strstr(line, " out 0x");
}

EACH_BACKEND(port_accesses_across_regions)
{
    for (size_t i = 0; i < sizeof port_cases / sizeof *port_cases; i++) {
        const struct port_case *c = &port_cases[i];
        vm_options o = VM_OPTIONS_INIT;
        vm_io_ops ops = VM_IO_OPS_INIT;
        vm_machine *m = NULL;
        uint64_t rip = 0x1000;
        unsigned lines = 0;
        o.backend = backend;
        o.platform = VM_PLATFORM_PC;
        o.ram_bytes = 16 << 20;
        ops.read = port_read;
        ops.write = port_write;
        OK(vm_create(&o, &m));
        OK(vm_map_pio(m, 0x700, 3, &ops, "A", NULL));
        OK(vm_map_pio(m, 0x703, 1, &ops, "B", NULL));
        OK(vm_trace_set(m, VM_TRACE_MMIO, count_trace, &lines));
        OK(vm_write(m, 0x1000, c->code, c->bytes));
        OK(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
        OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &rip, 8));
        OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RAX, &c->rax, 8));
        OK(vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RDX, &(uint64_t){ c->port }, 8));
        port_call_count = 0;
        run_to_halt(vm_vcpu_get(m, 0));
        CHECK_EQ(get(vm_vcpu_get(m, 0), VM_REG_RAX), c->result);
        CHECK_EQ(lines, 1);
        for (unsigned k = 0; k < 4; k++) {
            const port_call *want = &c->calls[k], *got = k < port_call_count ? &port_calls[k] : &(port_call){ 0 };
            if (want->who != got->who || want->offset != got->offset || want->width != got->width || want->value != got->value ||
                want->is_write != got->is_write)
                FAIL("case %zu, call %u: %c %s %llu, width %u, value 0x%llx", i, k, got->who ? got->who : '-', got->is_write ? "write" : "read",
                     (unsigned long long)got->offset, got->width, (unsigned long long)got->value);
        }
        vm_destroy(m);
    }
}
