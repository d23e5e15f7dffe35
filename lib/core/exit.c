/* exit.c - exit records: filling them, completing what they left open, and saying them in words.
 *
 * An access that nobody handled left the instruction unfinished. The next run writes its result into the CPU's log of
 * accesses (x86_cpu.io_log) and executes the instruction again from its start; the log answers what has been done
 * already.
 */
#include "core/core.h"
#include "x86/insn.h"

#include <stdio.h>
#include <string.h>

static const struct { int value; const char *text; } reasons[] = {
#define VM_EXIT_REASON(name, value, text) { value, text },
#include <libvm/exit.def>
#undef VM_EXIT_REASON
};

VM_API const char *vm_exit_name(int reason)
{
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].value == reason)
            return reasons[i].text;
    return "unknown";
}

VM_API int vm_exit_format(const vm_exit *e, char *buffer, size_t bytes)
{
    char detail[200] = "";
    if (!e || (!buffer && bytes))
        return vm_fail(VM_E_INVALID, "vm_exit_format: NULL argument");
    switch (e->reason) {
    case VM_EXIT_IO:
        snprintf(detail, sizeof detail, " %s port 0x%x width %u data 0x%llx", e->io.is_write ? "write" : "read",
                 e->io.port,
                 e->io.width, (unsigned long long)e->io.data);
        break;
    case VM_EXIT_MMIO: case VM_EXIT_UNMAPPED: case VM_EXIT_VIOLATION:
        snprintf(detail, sizeof detail, " %s gpa 0x%llx gva 0x%llx width %u data 0x%llx",
                 e->mmio.is_write ? "write" : e->mmio.is_fetch ? "fetch" : "read", (unsigned long long)e->mmio.gpa,
                 (unsigned long long)e->mmio.gva, e->mmio.width, (unsigned long long)e->mmio.data);
        break;
    case VM_EXIT_EXCEPTION:
        snprintf(detail, sizeof detail, " vector %u error 0x%x%s address 0x%llx", e->exception.vector,
                 e->exception.error,
                 e->exception.has_error ? "" : " (none)", (unsigned long long)e->exception.address);
        break;
    case VM_EXIT_HYPERCALL:
        snprintf(detail, sizeof detail, " number 0x%llx", (unsigned long long)e->hypercall.number);
        break;
    case VM_EXIT_BREAKPOINT:
        if (e->debug.is_watchpoint)
            snprintf(detail, sizeof detail, " %s 0x%llx width %u value 0x%llx",
                     e->debug.access == VM_PROT_W ? "write" : "read", (unsigned long long)e->debug.address,
                     e->debug.bytes, (unsigned long long)e->debug.value);
        break;
    case VM_EXIT_GUEST_EXIT:
        snprintf(detail, sizeof detail, " code 0x%llx", (unsigned long long)e->guest_exit.code);
        break;
    default:
        break;
    }
    return snprintf(buffer, bytes, "%s at rip 0x%llx%s", vm_exit_name(e->reason), (unsigned long long)e->rip, detail);
}

/* ---- filling ---- */

/* Up to n bytes at linear address la as the guest would fetch them; how many could be read. */
static unsigned peek_code(vm_vcpu *cpu, uint64_t la, uint8_t *buffer, unsigned n)
{
    x86_cpu *x = &cpu->x86;
    unsigned done = 0;
    while (done < n) {
        uint64_t at = la + done;
        unsigned part = 4096 - (unsigned)(at & 4095);
        const x86_tlb_entry *e = &x->tlb[x->ctx].e[X86_TLB_INDEX(at)];
        uint64_t offset = at ^ e->tag_x;
        if (part > n - done)
            part = n - done;
        if (offset < 4096) {
            memcpy(buffer + done, e->host + offset, part);
        } else {
            x86_walk w = { 0 };
            if (!x86_walk_page(x, at, X86_EXEC, x->ctx, false, &w))
                break;
            const vm_range *range = vm_find(cpu, w.gpa);
            if (!range || range->region->kind > VM_REGION_FILE)
                break;
            memcpy(buffer + done, range->region->host + (w.gpa - range->gpa), part);
        }
        done += part;
    }
    return done;
}

/* The length of the instruction that begins these n bytes, 0: none. Loops meet the same again and again. */
static unsigned length_of(vm_vcpu *cpu, const uint8_t *bytes, unsigned n)
{
    x86_insn insn;
    vm_measured *last = &cpu->measured;
    uint8_t size = cpu->x86.code_size;
    if (last->count == n && last->code_size == size && !memcmp(last->bytes, bytes, n))
        return last->length;
    last->length = n && x86_decode(bytes, n, size, &insn) == 0 ? insn.length : 0;
    last->count = (uint8_t)n;
    last->code_size = size;
    memcpy(last->bytes, bytes, n);
    return last->length;
}

/* The bytes of the instruction at rip. `length` 0: find out. */
static void fill_insn(vm_vcpu *cpu, vm_exit *exit, unsigned length)
{
    x86_cpu *x = &cpu->x86;
    unsigned n = VM_INSN_BYTES;
    if (x->io_code) {
        memcpy(exit->insn_bytes, x->io_code, VM_INSN_BYTES);
        x->io_code = NULL;
    } else {
        uint64_t la = x->code_size == 8 ? x->rip : (uint32_t)(x->seg[X86_CS].base + x->rip);
        n = peek_code(cpu, la, exit->insn_bytes, VM_INSN_BYTES);
    }
    if (!length)
        length = length_of(cpu, exit->insn_bytes, n);
    exit->insn_length = length <= n ? (uint8_t)length : 0;
}

static unsigned length_in_flight(const x86_cpu *x)
{
    uint64_t n = x->next_rip - x->rip;
    return n >= 1 && n <= 15 ? (unsigned)n : 0;
}

void vm_exit_from_io(vm_vcpu *cpu, vm_exit *exit)
{
    x86_cpu *x = &cpu->x86;
    const x86_io_access *a = &x->io;
    uint64_t data = a->is_write ? a->data : ~UINT64_C(0);
    if (a->is_port) {
        exit->reason = VM_EXIT_IO;
        exit->io = (vm_exit_io){ .port = a->port, .width = a->width, .is_write = a->is_write, .count = 1,
                                 .data = data };
    } else {
        const vm_range *range = vm_find(cpu, a->gpa);
        exit->reason = cpu->ept_stopped ? VM_EXIT_VIOLATION
                       : range && range->region->kind == VM_REGION_MMIO ? VM_EXIT_MMIO : VM_EXIT_UNMAPPED;
        cpu->ept_stopped = false;
        exit->mmio = (vm_exit_mmio){ .gpa = a->gpa, .gva = a->gva, .width = a->width, .is_write = a->is_write,
                                     .is_fetch = a->is_fetch, .data = data };
    }
    if (!a->is_fetch && !cpu->is_brief)
        fill_insn(cpu, exit, length_in_flight(x));
    cpu->has_pending = true;
    cpu->pending.reason = exit->reason;
    cpu->pending.rip = x->rip;
}

void vm_exit_from_exception(vm_vcpu *cpu, vm_exit *exit)
{
    const x86_fault *f = &cpu->x86.fault;
    exit->reason = VM_EXIT_EXCEPTION;
    exit->exception = (vm_exit_exception){ .vector = f->vector, .has_error = f->has_error,
                                           .error = f->has_error ? f->error : 0,
                                           .address = f->vector == X86_PF ? f->address
                                                      : f->vector == X86_DB ? f->dr6 : 0 };
    fill_insn(cpu, exit, 0);
}

void vm_exit_from_hypercall(vm_vcpu *cpu, vm_exit *exit)
{
    x86_cpu *x = &cpu->x86;
    exit->reason = VM_EXIT_HYPERCALL;
    exit->hypercall = (vm_exit_hypercall){
        .number = x->gpr[X86_RAX], .result = ~UINT64_C(0),
        .args = { x->gpr[X86_RBX], x->gpr[X86_RCX], x->gpr[X86_RDX], x->gpr[X86_RSI], x->gpr[X86_RDI],
                  x->gpr[X86_R8] } };
    cpu->has_pending = true;
    cpu->pending.reason = exit->reason;
    cpu->pending.rip = x->rip;
}

/* ---- completing ---- */

/* The access would be answered now: somebody mapped something there. */
static bool would_succeed(vm_vcpu *cpu, const x86_io_access *a)
{
    const vm_range *range = vm_find(cpu, a->gpa);
    if (!range)
        return false;
    if (range->region->kind == VM_REGION_MMIO)
        return true;
    return vm_region_prot(range->region, a->gpa - range->gpa) & (a->is_write ? VM_PROT_W : VM_PROT_R);
}

void vm_exit_complete(vm_vcpu *cpu, const vm_exit *given)
{
    x86_cpu *x = &cpu->x86;
    vm_exit_reason reason = cpu->pending.reason;
    bool is_given = given->reason == reason;
    cpu->has_pending = false;
    if (x->rip != cpu->pending.rip) {                    /* the caller sends the guest elsewhere */
        x86_io_retire(x);
        return;
    }
    if (reason == VM_EXIT_HYPERCALL) {
        x->gpr[X86_RAX] = is_given ? given->hypercall.result : ~UINT64_C(0);
        return;
    }
    if (reason == VM_EXIT_VIOLATION)
        return;                        /* the access is made again */
    x86_io_access done = x->io;
    if (done.is_fetch || (reason == VM_EXIT_UNMAPPED && would_succeed(cpu, &done)))
        return;
    if (!done.is_write) {
        uint64_t data = !is_given ? ~UINT64_C(0) : reason == VM_EXIT_IO ? given->io.data : given->mmio.data;
        done.data = done.width < 8 ? data & ((UINT64_C(1) << 8 * done.width) - 1) : data;
    }
    done.done = true;
    x->io_pos = 0;
    if (x->io_count < X86_IO_LOG)
        x->io_log[x->io_count++] = done;
}
