/* fault.c - raising faults, leaving the CPU, and what happens when delivering an event faults itself.
 *
 * x86_raise*() and x86_leave() are the only doors out of a semantic function. x86_deliver_*() run outside semantic
 * functions: they take one event to its handler through gate.c, turning faults met on the way into the next event by
 * the double-fault rules (SDM vol. 3, table 6-5), until a handler is reached or the CPU shuts down.
 *
 * Invariant: `cpu->ext` is non-zero only inside x86_deliver_event() for events that are not INT n, INT3 or INTO.
 */
#include "x86/system.h"

#include <string.h>

_Noreturn void x86_raise_fault(x86_cpu *cpu, const x86_fault *fault)
{
    if (fault != &cpu->fault)
        cpu->fault = *fault;
    cpu->stop = X86_STOP_NONE;
    longjmp(*cpu->fault_jmp, 1);
}

_Noreturn void x86_raise_error(x86_cpu *cpu, uint8_t vector, uint32_t error)
{
    x86_fault fault = { .vector = vector, .has_error = true, .error = error };
    x86_raise_fault(cpu, &fault);
}

_Noreturn void x86_raise(x86_cpu *cpu, uint8_t vector)
{
    x86_fault fault = { .vector = vector };
    x86_raise_fault(cpu, &fault);
}

_Noreturn void x86_raise_sel(x86_cpu *cpu, uint8_t vector, uint16_t sel)
{
    x86_raise_error(cpu, vector, (sel & 0xfffcu) | cpu->ext);
}

_Noreturn void x86_leave(x86_cpu *cpu, x86_stop stop)
{
    cpu->stop = stop;
    cpu->io_pos = 0;                   /* the instruction will start over and take its logged accesses from the first */
    longjmp(*cpu->fault_jmp, 1);
}

/* ---- the event a fault becomes ---- */

/* SDM vol. 3, table 6-5; 29 and 30 are AMD's #VC and #SX, 21 is #CP. */
enum event_class { CLASS_BENIGN, CLASS_CONTRIBUTORY, CLASS_PAGE_FAULT, CLASS_DOUBLE };

static enum event_class class_of(uint8_t vector)
{
    switch (vector) {
    case X86_DE: case X86_TS: case X86_NP: case X86_SS_FAULT: case X86_GP: case 21: case 29: case 30:
        return CLASS_CONTRIBUTORY;
    case X86_PF: return CLASS_PAGE_FAULT;
    case X86_DF: return CLASS_DOUBLE;
    default: return CLASS_BENIGN;
    }
}

/* Fault-class exceptions push RF = 1, except the #DB of an instruction breakpoint (SDM vol. 3, 17.3.1.1). */
static bool pushes_rf(const x86_fault *f)
{
    switch (f->vector) {
    case X86_DB: return !(f->dr6 & 0xc00f) && (f->dr6 & 0x2000);      /* general detect only */
    case X86_NMI: case X86_BP: case X86_OF: case X86_DF: case X86_MC: return false;
    default: return f->vector < 32;
    }
}

/* State that an exception changes whether or not its handler is reached. */
static void note_exception(x86_cpu *cpu, const x86_fault *f)
{
    if (f->vector == X86_PF)
        cpu->cr2 = f->address;
    if (f->vector == X86_DB) {
        cpu->dr[6] = (cpu->dr[6] & ~UINT64_C(15)) | f->dr6 | X86_DR6_INIT;
        cpu->dr[7] &= ~(UINT64_C(1) << 13);                            /* GD: the handler may touch the registers */
        x86_mode_changed(cpu);
    }
}

static x86_event event_of_fault(const x86_cpu *cpu, const x86_fault *f)
{
    x86_event ev = { .vector = f->vector, .kind = X86_EV_FAULT, .has_error = f->has_error, .error = f->error,
                     .rip = cpu->rip, .set_rf = pushes_rf(f) };
    return ev;
}

/* ---- delivery ---- */

/* What `second`, raised while delivering `first`, makes of it; false: the CPU shuts down. */
static bool combine(x86_cpu *cpu, x86_event *ev, bool first_is_exception)
{
    enum event_class first = first_is_exception ? class_of(ev->vector) : CLASS_BENIGN;
    enum event_class second = class_of(cpu->fault.vector);
    note_exception(cpu, &cpu->fault);
    if (first == CLASS_DOUBLE && second != CLASS_BENIGN)
        return false;
    if ((first == CLASS_CONTRIBUTORY && second == CLASS_CONTRIBUTORY) ||
        (first == CLASS_PAGE_FAULT && (second == CLASS_CONTRIBUTORY || second == CLASS_PAGE_FAULT))) {
        x86_fault df = { .vector = X86_DF, .has_error = true };
        *ev = event_of_fault(cpu, &df);
    } else {
        *ev = event_of_fault(cpu, &cpu->fault);
    }
    return true;
}

static x86_stop deliver(x86_cpu *cpu, const x86_event *first)
{
    x86_event ev = *first;
    x86_event *volatile current = &ev;
    jmp_buf here, *saved = cpu->fault_jmp;
    volatile x86_stop result = X86_STOP_NONE;
    volatile bool is_done = false;
    const uint64_t from = x86_rip_linear(cpu);

    cpu->stop = X86_STOP_NONE;
    cpu->fault_jmp = &here;
    while (!is_done) {
        if (setjmp(here) == 0) {
            x86_deliver_event(cpu, current);
            cpu->rip = cpu->next_rip;
            is_done = true;
        } else if (cpu->stop != X86_STOP_NONE) {
            result = cpu->stop;
            is_done = true;
        } else {
            bool is_exception = current->kind == X86_EV_FAULT || current->kind == X86_EV_TRAP;
            if (!combine(cpu, current, is_exception)) {
                result = X86_STOP_SHUTDOWN;
                is_done = true;
            }
        }
        cpu->ext = 0;
    }
    cpu->fault_jmp = saved;
    cpu->stop = X86_STOP_NONE;
    if (result == X86_STOP_NONE) {
        x86_block_end(cpu, from);
        x86_hook_retire(cpu);
        cpu->inhibit = 0;
        cpu->halted = false;
        cpu->no_trap = false;
        cpu->dr_hit = 0;
        x86_io_retire(cpu);
    }
    return result;
}

x86_stop x86_deliver_fault(x86_cpu *cpu)
{
    x86_fault *f = &cpu->fault;
    cpu->ext = 0;
    cpu->stat[X86_STAT_EXCEPTIONS]++;
    if (x86_hooked(cpu, X86_HOOK_EXCEPTION) && !f->is_soft) {
        unsigned answer = x86_hook_exception(cpu);
        if (answer == X86_HOOK_STOP)
            return X86_STOP_HOOK;
        if (answer == X86_HOOK_SKIP || answer == X86_HOOK_RETRY) {
            if (answer == X86_HOOK_RETRY)
                cpu->next_rip = cpu->rip;
            x86_hook_swallowed(cpu);
            return X86_STOP_NONE;
        }
    }
    if (f->vector < 64 && (cpu->exception_exits >> f->vector & 1)) {
        x86_io_retire(cpu);
        return X86_STOP_EXCEPTION;
    }
    note_exception(cpu, f);
    cpu->fault_retired = cpu->retired + 1;
    x86_event ev = event_of_fault(cpu, f);
    return deliver(cpu, &ev);
}

x86_stop x86_deliver_interrupt(x86_cpu *cpu, uint8_t vector, bool is_nmi)
{
    x86_event ev = { .vector = is_nmi ? X86_NMI : vector, .kind = X86_EV_HARDWARE, .rip = cpu->rip };
    cpu->stat[X86_STAT_INTERRUPTS]++;
    if (is_nmi) {
        cpu->nmi_blocked = true;
        cpu->nmi_pending = false;
    }
    cpu->next_rip = cpu->rip;
    return deliver(cpu, &ev);
}

x86_stop x86_inject(x86_cpu *cpu, uint8_t vector, bool has_error, uint32_t error)
{
    if (vector >= 32 || vector == X86_NMI)
        return x86_deliver_interrupt(cpu, vector, vector == X86_NMI);
    x86_fault f = { .vector = vector, .has_error = has_error, .error = error };
    x86_event ev = event_of_fault(cpu, &f);
    cpu->stat[X86_STAT_EXCEPTIONS]++;
    cpu->next_rip = cpu->rip;
    return deliver(cpu, &ev);
}

/* ---- INT n, INT3, INTO, INT1 ---- */

/* CR4.VME: bit `vector` of the software-interrupt redirection bitmap, the 32 bytes below the I/O map (SDM vol.
 * 3, 20.3.3). A bitmap that is not there redirects nothing. */
static bool goes_to_v86_handler(x86_cpu *cpu, uint8_t vector)
{
    const x86_seg *tr = &cpu->seg[X86_TR];
    uint16_t io_base;
    uint8_t byte;
    if (!(tr->attr & X86_SEG_P) || !(tr->attr & 8) || tr->limit < 0x67)
        return false;
    x86_read_system(cpu, tr->base + 0x66, &io_base, 2);
    uint32_t at = (uint32_t)io_base - 32 + vector / 8;
    if (io_base < 32 || at > tr->limit)
        return false;
    x86_read_system(cpu, tr->base + at, &byte, 1);
    return !(byte >> (vector % 8) & 1);
}

/* Interrupt handled by the 8086 program itself through the vector table at linear 0 (SDM vol. 3, 20.3.3.4, methods 5
 * and 6). */
static void v86_redirect(x86_cpu *cpu, uint8_t vector)
{
    uint16_t entry[2];
    uint64_t flags = cpu->rflags & 0xffff;
    bool is_virtual = (cpu->rflags & X86_FL_IOPL) != X86_FL_IOPL;
    x86_read_linear(cpu, 4u * vector, entry, 4);
    if (is_virtual) {
        flags = (flags | X86_FL_IOPL) & ~(uint64_t)X86_FL_IF;
        if (cpu->rflags & X86_FL_VIF)
            flags |= X86_FL_IF;
    }
    x86_stack st = x86_current_stack(cpu);
    x86_stack_push(cpu, &st, 2, flags);
    x86_stack_push(cpu, &st, 2, cpu->seg[X86_CS].sel);
    x86_stack_push(cpu, &st, 2, cpu->next_rip);
    cpu->gpr[X86_RSP] = x86_stack_rsp(cpu, &st);
    x86_set_v86_seg(cpu, X86_CS, entry[1]);
    cpu->next_rip = entry[0];
    cpu->rflags &= ~(uint64_t)(X86_FL_TF | (is_virtual ? X86_FL_VIF : X86_FL_IF));
    x86_mode_changed(cpu);
}

void x86_software_interrupt(x86_cpu *cpu, uint8_t vector, unsigned kind)
{
    x86_hook h = { .kind = X86_HOOK_INTERRUPT, .flags = X86_EVENT_SOFT, .number = vector, .value = vector,
                   .address = x86_rip_linear(cpu) };
    if (x86_hooked(cpu, X86_HOOK_INTERRUPT) && x86_hook_event(cpu, h)) {
        cpu->no_trap = true;
        return;
    }
    if (vector < 64 && (cpu->exception_exits >> vector & 1)) {
        x86_fault fault = { .vector = vector, .is_soft = true };
        x86_raise_fault(cpu, &fault);
    }
    if (x86_is_v86(cpu) && kind == X86_INT_N) {
        if ((cpu->cr4 & X86_CR4_VME) && goes_to_v86_handler(cpu, vector)) {
            v86_redirect(cpu, vector);
            cpu->no_trap = true;
            return;
        }
        if ((cpu->rflags & X86_FL_IOPL) != X86_FL_IOPL)
            x86_raise_error(cpu, X86_GP, 0);
    }
    x86_event ev = { .vector = vector, .kind = kind == X86_INT_1 ? X86_EV_ICEBP : X86_EV_SOFT, .rip = cpu->next_rip };
    x86_deliver_event(cpu, &ev);
    cpu->ext = 0;
    cpu->no_trap = true;
    if (kind == X86_INT_1)             /* one #DB stands for a pending breakpoint too */
        cpu->dr_hit = 0;
}
