/* kvm_exit.c - KVM's port and memory exits, made into what the software backends make of such an access.
 *
 * Every access goes through the same env->port_* and phys_* functions, so devices and callbacks cannot tell backends
 * apart. What nobody answers leaves the run as X86_STOP_IO with the same record; its completion is written into the
 * shared page and KVM finishes the instruction when it is entered again.
 *
 * The instruction's RIP. An exit promises RIP at the instruction, not completed. For reads KVM is there. For writes its
 * emulator has moved on: RIP is behind the instruction and registers may be as after it. kvm_resolve() looks for the
 * instruction that ends at RIP and does just this access, and shows RIP there (and string registers as before the
 * iteration). KVM keeps its own values; they are written back only if somebody changes registers. It costs a few
 * microseconds, so it waits until somebody looks: a callback that asks nothing pays nothing.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "kvm/kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include "x86/system.h"

/* ---- the open access ---- */

static uint8_t *io_data(kvm_vcpu *kv) { return (uint8_t *)kv->run + kv->run->io.data_offset; }

static bool is_port_exit(const kvm_vcpu *kv) { return kv->run->exit_reason == KVM_EXIT_IO; }

static x86_stop report(kvm_vcpu *kv, const x86_io_access *a)
{
    x86_cpu *x = &kv->cpu->x86;
    kv->is_reported = true;
    x->io = *a;
    x->io_count = x->io_pos = 0;
    if (kv->cpu->is_brief) return X86_STOP_IO;
    kv->has_code = false; /* a callback may have written there since */
    kvm_get_state(kv->cpu, VM_STATE_REGS);
    kvm_get_mode(kv);
    x->io.gva = a->is_port ? 0 : kvm_linear_of(kv, a->gpa, a->is_write);
    x->io_code = kv->has_code ? kv->code : NULL;
    return X86_STOP_IO;
}

/* Of the sizes that accesses have; the others through memcpy, whose call costs more than the rest of this. */
static uint64_t load(const uint8_t *from, unsigned n)
{
    uint64_t v = 0;
    if (n == 1) return *from;
    if (n == 4)
        memcpy(&v, from, 4);
    else
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
            return report(
                kv, &(x86_io_access){
                        .port = run->io.port, .width = run->io.size, .is_port = true, .is_write = true, .data = value});
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
                return kvm_interpret(kv, 1); /* a batch of string input nobody answers: one exit an element */
            if (i == 0)
                return report(kv, &(x86_io_access){.port = run->io.port, .width = run->io.size, .is_port = true});
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

/* KVM shows an access to RAM as MMIO when it has no slot for it, or when the memory behind the slot is gone: a file
 * that was cut short. The second would be SIGBUS here. */
static bool is_memory_gone(kvm_vcpu *kv, uint64_t gpa)
{
    const vm_range *r = vm_view_find(&kv->cpu->machine->view, gpa);
    if (!r || r->region->kind == VM_REGION_MMIO) return false;
    uintptr_t at = (uintptr_t)(r->region->host + r->offset + (gpa - r->gpa));
    return madvise((void *)(at & ~(uintptr_t)4095), 4096, MADV_POPULATE_READ) < 0 && errno == EFAULT;
}

x86_stop kvm_handle_mmio(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_run *run = kv->run;
    unsigned n = run->mmio.len <= 8 ? run->mmio.len : 8;
    x86_io_access a = {.gpa = run->mmio.phys_addr, .width = (uint8_t)n, .is_write = run->mmio.is_write};
    if (is_memory_gone(kv, a.gpa))
        return kvm_host_failed(kv, "guest memory at 0x%llx has no host memory behind it any more",
                               (unsigned long long)a.gpa);
    if (a.is_write) {
        kv->open = KVM_OPEN_WRITE;
        kv->rip_unresolved = true;
        a.data = load(run->mmio.data, n);
        return x->env->phys_write(x, a.gpa, 0, n, a.data) == X86_IO_EXIT ? report(kv, &a) : X86_STOP_NONE;
    }
    kv->open = KVM_OPEN_READ;
    a.data = ~UINT64_C(0);
    if (x->env->phys_read(x, a.gpa, 0, n, X86_READ, &a.data) == X86_IO_EXIT) return report(kv, &a);
    memcpy(run->mmio.data, &a.data, n);
    return X86_STOP_NONE;
}

/* ---- completion of a reported exit ----
 * The run loop has put the result into io_log, or it has dropped the access (io_count = 0): then it is tried again,
 * which is what the interpreter does when it executes the instruction from its start. Where it is the interpreter that
 * goes on, what was read stays in io_log for it. */
x86_stop kvm_complete(kvm_vcpu *kv, bool is_interpreted)
{
    x86_cpu *x = &kv->cpu->x86;
    struct kvm_run *run = kv->run;
    bool is_answered = x->io_count == 1 && x->io_log[0].done && !kv->dirty;
    kv->is_reported = false;
    if (kv->open == KVM_OPEN_WRITE && kv->regs_changed) {
        kv->open = KVM_OPEN_READ; /* x86 shows the state before the instruction, changed: execute it from there */
        return kvm_interpret(kv, 1);
    }
    if (kv->open == KVM_OPEN_WRITE) {
        bool is_retry = x->io_count == 0 && !is_port_exit(kv);
        x86_io_retire(x);
        if (is_retry) {
            uint64_t value = load(run->mmio.data, run->mmio.len);
            if (x->env->phys_write(x, run->mmio.phys_addr, 0, run->mmio.len, value) == X86_IO_EXIT)
                return report(kv, &x->io);
        }
        return X86_STOP_NONE;
    }
    if (!is_answered) return kvm_interpret(kv, 1);
    if (is_interpreted) return X86_STOP_NONE;
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
    if (!x86_is_long(x)) la = (uint32_t)la;
    if (!x86_walk_page(x, la, X86_READ, X86_CTX_KERNEL_AC, false, &w)) return false;
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
        if (!translate(x, la + done, &gpa) || !x86_read_phys(x, gpa, to + done, part)) break;
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

/* Linear address of the operand of `in` (at `rip`) that lies at gpa; false: none does. After a string iteration RDI and
 * RSI have moved by `step`. */
static bool operand_at(x86_cpu *x, const x86_insn *in, uint64_t rip, uint64_t gpa, int64_t step, uint64_t *la)
{
    uint64_t saved = x->rip, mask = address_mask(in->asz), candidates[4];
    unsigned n = 0;
    if (in->flags & X86_IF_STRING) {
        candidates[n++] = seg_base(x, X86_ES) + ((x->gpr[X86_RDI] - (uint64_t)step) & mask);
        candidates[n++] =
            seg_base(x, in->seg < X86_NSEG ? in->seg : X86_DS) + ((x->gpr[X86_RSI] - (uint64_t)step) & mask);
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

static unsigned string_width(const x86_insn *in)
{
    bool is_port = in->opcode >= 0x6c && in->opcode <= 0x6f;
    return !(in->opcode & 1) ? 1 : in->osz == 8 && is_port ? 4 : in->osz;
}

static int64_t string_step(const x86_cpu *x, const x86_insn *in)
{
    return x->rflags & X86_FL_DF ? -(int64_t)string_width(in) : (int64_t)string_width(in);
}

static bool is_plain(const x86_insn *in) { return in->map == 0; }

/* The width of what `in` writes to memory, 0: not known. */
static unsigned write_width(const x86_insn *in)
{
    if (in->flags & X86_IF_STRING) return string_width(in);
    for (unsigned i = 0; i < in->nops; i++)
        if (in->op[i].kind == X86_OP_MEM || in->op[i].kind == X86_OP_MOFFS) return in->op[i].size;
    return 0;
}

/* Does `in` at `rip` do the write that this exit is about? */
static bool does_write(kvm_vcpu *kv, const x86_insn *in, uint64_t rip)
{
    x86_cpu *x = &kv->cpu->x86;
    const struct kvm_run *run = kv->run;
    uint64_t la;
    if (!is_port_exit(kv)) {
        unsigned width = write_width(in);
        bool is_store = is_plain(in) && (in->opcode == 0x88 || in->opcode == 0x89) && width <= 8;
        if (is_store && x86_get_gpr(x, in->op[1].reg, width) != load(run->mmio.data, run->mmio.len))
            return false; /* another register's value was stored */
        return (width == 0 || width == run->mmio.len || width > 8) &&
               operand_at(x, in, rip, run->mmio.phys_addr, in->flags & X86_IF_STRING ? string_step(x, in) : 0, &la);
    }
    if (!is_plain(in)) return false;
    unsigned width = in->opcode & 1 ? (in->osz == 2 ? 2 : 4) : 1;
    bool is_imm = (in->opcode & 0xfe) == 0xe6, is_dx = (in->opcode & 0xfe) == 0xee || (in->opcode & 0xfe) == 0x6e;
    return width == run->io.size &&
           ((is_imm && (uint8_t)in->imm == run->io.port) || (is_dx && (uint16_t)x->gpr[X86_RDX] == run->io.port));
}

static unsigned decode_at(kvm_vcpu *kv, uint64_t rip, x86_insn *in)
{
    x86_cpu *x = &kv->cpu->x86;
    uint8_t bytes[15];
    unsigned n = read_code(x, seg_base(x, X86_CS) + rip, bytes, sizeof bytes);
    return n && x86_decode(bytes, n, x->code_size, in) == 0 && in->length <= n ? in->length : 0;
}

/* Straight-line code since the last entry: its instructions are known one by one. */
#define WALK_BYTES 256u
static unsigned length_by_walk(kvm_vcpu *kv, uint64_t after, x86_insn *found)
{
    uint64_t at = kv->boundary;
    while (at < after && after - at <= WALK_BYTES) {
        unsigned length = decode_at(kv, at, found);
        if (!length) return 0;
        at += length;
        if (at == after) return does_write(kv, found, at - length) ? length : 0;
    }
    return 0;
}

static bool is_repeated(const x86_insn *in)
{
    return (in->flags & X86_IF_STRING) && (in->flags & (X86_IF_REP | X86_IF_REPNE));
}

/* Which of two instructions that end at the same place and do the same: the byte before the shorter is a prefix that
 * changes nothing, or the end of the instruction before. LOCK, address-size and (in 16-bit code) segment prefixes are
 * meant; others that change nothing are rarely written. */
static bool is_meant(const x86_insn *longer, uint8_t first)
{
    bool is_segment = first == 0x26 || first == 0x2e || first == 0x36 || first == 0x3e;
    return first == 0xf0 || first == 0x67 || (is_segment && longer->mode == 2);
}

/* The instruction that ends at `after` and does the write; its length, 0: none. A repeated string instruction cannot be
 * it: RIP stays on those. */
static unsigned length_before(kvm_vcpu *kv, uint64_t after, x86_insn *found)
{
    unsigned best = length_by_walk(kv, after, found);
    for (unsigned length = 1, is_walked = best; !is_walked && length <= 15 && length <= after; length++) {
        x86_insn in;
        if (decode_at(kv, after - length, &in) == length && !is_repeated(&in) && does_write(kv, &in, after - length) &&
            (!best || in.opcode_off < in.length - best || is_meant(&in, in.bytes[0]))) {
            *found = in;
            best = length;
        }
    }
    return best;
}

static bool stands_at(kvm_vcpu *kv, uint64_t rip, x86_insn *in)
{
    return decode_at(kv, rip, in) && does_write(kv, in, rip);
}

/* An ambiguous OUT (`at` RIP, or `before` it): let KVM finish it and see whether RIP moves. A finished write needs nothing
 * more from us. Where RIP stands depends on who did the access, the fast path for OUT or the emulator, but is the same
 * each time; only for OUT to port 0x7E KVM takes the other way. */
static bool is_rip_after(kvm_vcpu *kv, uint64_t rip, const x86_insn *at, const x86_insn *before)
{
    bool is_string = at->flags & X86_IF_STRING;
    bool is_constant = is_string == !!(before->flags & X86_IF_STRING) && kv->run->io.port != 0x7e;
    int8_t seen = is_constant ? kv->rip_at[is_string] : 0;
    if (!seen && kvm_settle(kv) == VM_OK) seen = kv->run->s.regs.regs.rip == rip ? -1 : 1;
    if (is_constant) kv->rip_at[is_string] = seen;
    return seen <= 0;
}

/* String registers as before the iteration that made this access. */
static void undo_iteration(x86_cpu *x, const x86_insn *in)
{
    uint64_t mask = address_mask(in->asz);
    int64_t step = string_step(x, in);
    bool has_si = (in->opcode & 0xfe) != 0xaa, has_di = (in->opcode & 0xfe) != 0x6e;
    if (has_si) x->gpr[X86_RSI] = (x->gpr[X86_RSI] & ~mask) | ((x->gpr[X86_RSI] - (uint64_t)step) & mask);
    if (has_di) x->gpr[X86_RDI] = (x->gpr[X86_RDI] & ~mask) | ((x->gpr[X86_RDI] - (uint64_t)step) & mask);
    if (in->flags & (X86_IF_REP | X86_IF_REPNE))
        x->gpr[X86_RCX] = (x->gpr[X86_RCX] & ~mask) | ((x->gpr[X86_RCX] + 1) & mask);
}

/* The last read exit was of the instruction that ends at `rip` (or repeats there): its registers are the ones before
 * it. */
static bool is_same_instruction(kvm_vcpu *kv, uint64_t rip, bool is_repeating)
{
    x86_insn in;
    uint64_t start = kv->read_state[16];
    return kv->has_read_state && (is_repeating ? start == rip : start + decode_at(kv, start, &in) == rip);
}

static void undo_stack(x86_cpu *x, const x86_insn *in)
{
    bool is_pop = is_plain(in) && in->opcode == 0x8f;
    if (is_pop) x->gpr[X86_RSP] -= in->osz;
}

/* Devices are polled by loops: the same instruction exits again and again. */
static kvm_known *known_of(kvm_vcpu *kv, uint64_t after, kvm_known *now)
{
    x86_cpu *x = &kv->cpu->x86;
    const struct kvm_run *run = kv->run;
    bool is_port = is_port_exit(kv);
    memset(now, 0, sizeof *now);
    now->after = after;
    now->mode = x->code_size;
    now->reason = (uint8_t)run->exit_reason;
    now->port = is_port ? run->io.port : 0;
    now->width = is_port ? run->io.size : (uint16_t)run->mmio.len;
    if (after < 16 || read_code(x, seg_base(x, X86_CS) + after - 16, now->bytes, KVM_KNOWN_BYTES) < KVM_KNOWN_BYTES)
        return NULL;
    return &kv->known[(after ^ after >> 4) & 15];
}

static bool is_known(const kvm_known *k, const kvm_known *now)
{
    return k && k->length && k->after == now->after && k->mode == now->mode && k->reason == now->reason &&
           k->port == now->port && k->width == now->width && !memcmp(k->bytes, now->bytes, sizeof k->bytes);
}

/* The instruction stands before `rip`: show it there. */
static void show_before(kvm_vcpu *kv, uint64_t rip)
{
    x86_cpu *x = &kv->cpu->x86;
    x86_insn at, before;
    kvm_known now, *k = known_of(kv, rip, &now);
    if (is_known(k, &now)) {
        x->rip = rip - k->length;
        x->next_rip = rip;
        memcpy(kv->code, now.bytes + 16 - k->length, sizeof kv->code);
        kv->has_code = true;
        return;
    }
    unsigned length = length_before(kv, rip, &before);
    bool may_stand = is_port_exit(kv) && stands_at(kv, rip, &at);
    if (!length || (may_stand && !is_rip_after(kv, rip, &at, &before))) return;
    x->rip = rip - length;
    x->next_rip = rip;
    undo_stack(x, &before);
    if (before.flags & X86_IF_STRING) {
        undo_iteration(x, &before);
    } else if (k && !(is_plain(&before) && before.opcode == 0x8f)) {
        now.length = (uint8_t)length;
        *k = now;
    }
}

void kvm_resolve(kvm_vcpu *kv)
{
    x86_cpu *x = &kv->cpu->x86;
    x86_insn at;
    kv->rip_unresolved = kv->has_code = false;
    kvm_get_mode(kv);
    uint64_t rip = x->rip;
    bool is_repeating = (x->rflags & X86_FL_RF) && decode_at(kv, rip, &at) && (at.flags & X86_IF_STRING);
    if (is_same_instruction(kv, rip, is_repeating)) {
        memcpy(x->gpr, kv->read_state, sizeof x->gpr);
        x->rip = x->next_rip = kv->read_state[16];
        x->rflags = kv->read_state[17];
    } else if (is_repeating) {
        undo_iteration(x, &at);
    } else {
        show_before(kv, rip);
    }
    x->rflags &= ~(uint64_t)X86_FL_RF;
    kvm_show(kv);
    if (kv->cpu->has_pending) kv->cpu->pending.rip = x->rip; /* an exit that named no instruction */
}

uint64_t kvm_linear_of(kvm_vcpu *kv, uint64_t gpa, bool is_write)
{
    x86_cpu *x = &kv->cpu->x86;
    kvm_get_mode(kv);
    if (!(x->cr0 & X86_CR0_PG) || x->flat) return gpa;
    uint8_t bytes[15];
    x86_insn in;
    uint64_t la;
    unsigned n = read_code(x, seg_base(x, X86_CS) + x->rip, bytes, sizeof bytes);
    if (n && x86_decode(bytes, n, x->code_size, &in) == 0 && operand_at(x, &in, x->rip, gpa, 0, &la)) return la;
    (void)is_write;
    return 0;
}
