/* kvm_exit.c - KVM's port and memory exits, made into what the software backends make of such an access.
 *
 * Every access goes through the same env->port_* and phys_* functions, so devices and callbacks cannot tell backends apart.
 * What nobody answers leaves the run as X86_STOP_IO with the same record; its completion is written into the shared page and
 * KVM finishes the instruction when it is entered again.
 *
 * The instruction's RIP. An exit promises RIP at the instruction, not completed. For reads KVM is there. For writes its
 * emulator has moved on: RIP is behind the instruction and registers may be as after it. kvm_resolve() looks for the
 * instruction that ends at RIP and does just this access, and shows RIP there (and string registers as before the
 * iteration). KVM keeps its own values; they are written back only if somebody changes registers. It costs a few
 * microseconds, so it waits until somebody looks: a callback that asks nothing pays nothing.
 */
#include "kvm/kvm.h"

#include <string.h>
#include "x86/system.h"

/* ---- the open access ---- */

static uint8_t *io_data(kvm_vcpu *kv) { return (uint8_t *)kv->run + kv->run->io.data_offset; }

static bool is_port_exit(const kvm_vcpu *kv) { return kv->run->exit_reason == KVM_EXIT_IO; }

static x86_stop report(kvm_vcpu *kv, const x86_io_access *a)
{
    x86_cpu *x = &kv->cpu->x86;
    kvm_get_state(kv->cpu, VM_STATE_REGS | VM_STATE_SREGS);
    x->io = *a;
    x->io.gva = a->is_port ? 0 : kvm_linear_of(kv, a->gpa, a->is_write);
    x->io_count = x->io_pos = 0;
    kv->is_reported = true;
    return X86_STOP_IO;
}

static uint64_t load(const uint8_t *from, unsigned n)
{
    uint64_t v = 0;
    memcpy(&v, from, n);
    return v;
}

/* ---- ports ---- */

static x86_stop port_out(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    const struct kvm_run *run = kv->run;
    for (unsigned i = 0; i < run->io.count; i++) {
        uint64_t value = load(io_data(kv) + i * run->io.size, run->io.size);
        if (x->env->port_out(x, run->io.port, run->io.size, value) == X86_IO_EXIT)
            return report(kv, &(x86_io_access){ .port = run->io.port, .width = run->io.size, .is_port = true,
                                                .is_write = true, .data = value });
    }
    return X86_STOP_NONE;
}

static x86_stop port_in(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    const struct kvm_run *run = kv->run;
    for (unsigned i = 0; i < run->io.count; i++) {
        uint64_t value = ~UINT64_C(0);
        if (x->env->port_in(x, run->io.port, run->io.size, &value) == X86_IO_EXIT) {
            if (i == 0 && run->io.count > 1)
                return kvm_interpret(kv, 1);           /* a batch of string input nobody answers: one exit an element */
            if (i == 0)
                return report(kv, &(x86_io_access){ .port = run->io.port, .width = run->io.size, .is_port = true });
            value = ~UINT64_C(0);
        }
        memcpy(io_data(kv) + i * run->io.size, &value, run->io.size);
    }
    return X86_STOP_NONE;
}

x86_stop kvm_handle_io(kvm_vcpu *kv)
{
    if (kv->run->io.direction == KVM_EXIT_IO_OUT) {
        kv->open = KVM_OPEN_WRITE;
        kv->rip_unresolved = true;
        return port_out(kv);
    }
    kv->open = KVM_OPEN_READ;
    return port_in(kv);
}

/* ---- memory ---- */

x86_stop kvm_handle_mmio(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_run *run = kv->run;
    unsigned n = run->mmio.len <= 8 ? run->mmio.len : 8;
    x86_io_access a = { .gpa = run->mmio.phys_addr, .width = (uint8_t)n, .is_write = run->mmio.is_write };
    if (a.is_write) {
        kv->open = KVM_OPEN_WRITE;
        kv->rip_unresolved = true;
        a.data = load(run->mmio.data, n);
        return x->env->phys_write(x, a.gpa, 0, n, a.data) == X86_IO_EXIT ? report(kv, &a) : X86_STOP_NONE;
    }
    kv->open = KVM_OPEN_READ;
    a.data = ~UINT64_C(0);
    if (x->env->phys_read(x, a.gpa, 0, n, X86_READ, &a.data) == X86_IO_EXIT)
        return report(kv, &a);
    memcpy(run->mmio.data, &a.data, n);
    return X86_STOP_NONE;
}

/* ---- completion of a reported exit ----
 * The run loop has put the result into io_log, or it has dropped the access (io_count = 0): then it is tried again, which is what
 * the interpreter does when it executes the instruction from its start. */
x86_stop kvm_complete(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_run *run = kv->run;
    bool is_answered = x->io_count == 1 && x->io_log[0].done && !kv->dirty;
    kv->is_reported = false;
    if (kv->open == KVM_OPEN_WRITE) {
        bool is_retry = x->io_count == 0 && !kv->regs_changed && !is_port_exit(kv);
        x86_io_retire(x);
        if (is_retry) {
            uint64_t value = load(run->mmio.data, run->mmio.len);
            if (x->env->phys_write(x, run->mmio.phys_addr, 0, run->mmio.len, value) == X86_IO_EXIT)
                return report(kv, &x->io);
        }
        return X86_STOP_NONE;
    }
    if (!is_answered)
        return kvm_interpret(kv, 1);
    if (is_port_exit(kv))
        memcpy(io_data(kv), &x->io_log[0].data, run->io.size);
    else
        memcpy(run->mmio.data, &x->io_log[0].data, run->mmio.len <= 8 ? run->mmio.len : 8);
    x86_io_retire(x);
    return X86_STOP_NONE;
}

/* ---- finding the instruction ---- */

static bool translate(x86_cpu *x, uint64_t la, uint64_t *gpa)
{
    x86_walk w;
    if (!x86_is_long(x))
        la = (uint32_t)la;
    if (!x86_walk_page(x, la, X86_READ, X86_CTX_KERNEL_AC, false, &w))
        return false;
    *gpa = w.gpa;
    return true;
}

/* Code bytes at la, as many of n as can be read. */
static unsigned read_code(x86_cpu *x, uint64_t la, uint8_t *to, unsigned n)
{
    unsigned done = 0;
    while (done < n) {
        uint64_t gpa;
        unsigned part = 4096 - ((la + done) & 0xfff);
        part = part < n - done ? part : n - done;
        if (!translate(x, la + done, &gpa) || !x86_read_phys(x, gpa, to + done, part))
            break;
        done += part;
    }
    return done;
}

static uint64_t seg_base(const x86_cpu *x, unsigned seg)
{
    return x86_is_long(x) && seg != X86_FS && seg != X86_GS ? 0 : x->seg[seg].base;
}

static bool reaches(x86_cpu *x, uint64_t la, uint64_t gpa)
{
    uint64_t at;
    return translate(x, la, &at) && gpa >= at && gpa - at < 64;
}

static uint64_t address_mask(unsigned asz) { return asz == 8 ? ~UINT64_C(0) : asz == 4 ? 0xffffffff : 0xffff; }

/* Linear address of the operand of `in` (at `rip`) that lies at gpa; false: none does. After a string iteration RDI and RSI
 * have moved by `step`. */
static bool operand_at(x86_cpu *x, const x86_insn *in, uint64_t rip, uint64_t gpa, int64_t step, uint64_t *la)
{
    uint64_t saved = x->rip, mask = address_mask(in->asz), candidates[4];
    unsigned n = 0;
    if (in->flags & X86_IF_STRING) {
        candidates[n++] = seg_base(x, X86_ES) + ((x->gpr[X86_RDI] - (uint64_t)step) & mask);
        candidates[n++] = seg_base(x, in->seg < X86_NSEG ? in->seg : X86_DS) + ((x->gpr[X86_RSI] - (uint64_t)step) & mask);
    } else if (in->flags & X86_IF_MEM) {
        x->rip = rip;
        candidates[n++] = seg_base(x, in->seg) + x86_offset(x, in);
        x->rip = saved;
    }
    candidates[n++] = seg_base(x, X86_SS) + (x->stack_size == 2 ? (uint16_t)x->gpr[X86_RSP] : x->gpr[X86_RSP]);
    for (unsigned i = 0; i < n; i++)
        if (reaches(x, candidates[i], gpa)) {
            *la = candidates[i];
            return true;
        }
    return false;
}

static unsigned string_width(const x86_insn *in) { return in->opcode & 1 ? (in->osz == 8 && in->opcode < 0x70 ? 4 : in->osz) : 1; }

static int64_t string_step(const x86_cpu *x, const x86_insn *in)
{
    return x->rflags & X86_FL_DF ? -(int64_t)string_width(in) : (int64_t)string_width(in);
}

static bool is_plain(const x86_insn *in) { return in->map == 0; }

/* Does `in` at `rip` do the write that this exit is about? */
static bool does_write(kvm_vcpu *kv, const x86_insn *in, uint64_t rip)
{
    x86_cpu *x = &kv->cpu->x86;
    const struct kvm_run *run = kv->run;
    uint64_t la;
    if (!is_port_exit(kv))
        return operand_at(x, in, rip, run->mmio.phys_addr, in->flags & X86_IF_STRING ? string_step(x, in) : 0, &la);
    if (!is_plain(in))
        return false;
    unsigned width = in->opcode & 1 ? (in->osz == 2 ? 2 : 4) : 1;
    bool is_imm = (in->opcode & 0xfe) == 0xe6, is_dx = (in->opcode & 0xfe) == 0xee || (in->opcode & 0xfe) == 0x6e;
    return width == run->io.size && ((is_imm && (uint8_t)in->imm == run->io.port) ||
                                     (is_dx && (uint16_t)x->gpr[X86_RDX] == run->io.port));
}

/* The longest instruction that ends at `after` and does the write; its length, 0: none. */
static unsigned length_before(kvm_vcpu *kv, uint64_t after, x86_insn *found)
{
    x86_cpu *x = &kv->cpu->x86;
    uint8_t bytes[15];
    uint64_t base = seg_base(x, X86_CS);
    for (unsigned length = 15; length > 0; length--) {
        x86_insn in;
        if (length > after || read_code(x, base + after - length, bytes, length) < length)
            continue;
        if (x86_decode(bytes, length, x->code_size, &in) == 0 && in.length == length && does_write(kv, &in, after - length)) {
            *found = in;
            return length;
        }
    }
    return 0;
}

static bool stands_at(kvm_vcpu *kv, uint64_t rip, x86_insn *in)
{
    x86_cpu *x = &kv->cpu->x86;
    uint8_t bytes[15];
    unsigned n = read_code(x, seg_base(x, X86_CS) + rip, bytes, sizeof bytes);
    return n && x86_decode(bytes, n, x->code_size, in) == 0 && in->length <= n && does_write(kv, in, rip);
}

/* An ambiguous OUT (the next instruction is the same one): let KVM finish it and see whether RIP moves. A finished write needs
 * nothing more from us. */
static bool is_rip_after(kvm_vcpu *kv, uint64_t rip)
{
    if (kv->out_after < 0 && kvm_settle(kv) == VM_OK)
        kv->out_after = kv->run->s.regs.regs.rip == rip;
    return kv->out_after != 0;
}

/* String registers as before the iteration that made this access. */
static void undo_iteration(x86_cpu *x, const x86_insn *in)
{
    uint64_t mask = address_mask(in->asz);
    int64_t step = string_step(x, in);
    bool has_si = (in->opcode & 0xfe) != 0xaa, has_di = (in->opcode & 0xfe) != 0x6e;
    if (has_si)
        x->gpr[X86_RSI] = (x->gpr[X86_RSI] & ~mask) | ((x->gpr[X86_RSI] - (uint64_t)step) & mask);
    if (has_di)
        x->gpr[X86_RDI] = (x->gpr[X86_RDI] & ~mask) | ((x->gpr[X86_RDI] - (uint64_t)step) & mask);
    if (in->flags & (X86_IF_REP | X86_IF_REPNE))
        x->gpr[X86_RCX] = (x->gpr[X86_RCX] & ~mask) | ((x->gpr[X86_RCX] + 1) & mask);
}

void kvm_resolve(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    x86_insn at, before;
    kv->rip_unresolved = false;
    kvm_get_state(kv->cpu, VM_STATE_SREGS);
    uint64_t rip = x->rip;
    bool is_repeating = (x->rflags & X86_FL_RF) && stands_at(kv, rip, &at) && (at.flags & X86_IF_STRING);
    if (is_repeating) {
        undo_iteration(x, &at);
    } else {
        unsigned length = length_before(kv, rip, &before);
        bool may_stand = is_port_exit(kv) && stands_at(kv, rip, &at);
        if (length && (!may_stand || is_rip_after(kv, rip))) {
            x->rip = x->next_rip = rip - length;
            if (before.flags & X86_IF_STRING)
                undo_iteration(x, &before);
        }
    }
    x->rflags &= ~(uint64_t)X86_FL_RF;
    kvm_show(kv);
}

uint64_t kvm_linear_of(kvm_vcpu *kv, uint64_t gpa, bool is_write)
{
    x86_cpu *x = &kv->cpu->x86;
    kvm_get_state(kv->cpu, VM_STATE_SREGS);
    if (!(x->cr0 & X86_CR0_PG) || x->flat)
        return gpa;
    uint8_t bytes[15];
    x86_insn in;
    uint64_t la;
    unsigned n = read_code(x, seg_base(x, X86_CS) + x->rip, bytes, sizeof bytes);
    if (n && x86_decode(bytes, n, x->code_size, &in) == 0 && operand_at(x, &in, x->rip, gpa, 0, &la))
        return la;
    (void)is_write;
    return 0;
}
