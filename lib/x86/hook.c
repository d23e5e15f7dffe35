/* hook.c - events of the CPU for those who watch it.
 *
 * Each event is reported once: it is noted in the log of accesses (x86_cpu.io_log), so that an instruction that is executed
 * again, because it had to leave half-way, finds there what has been reported.
 */
#include "x86/system.h"

#include <string.h>

/* True: this event of the instruction has been reported; else it is noted as reported. In the middle of the log stand
 * what an earlier attempt did: an event that is not among it comes from a hook added since, and has no place there. */
static bool seen_before(x86_cpu *cpu)
{
    if (!cpu->io_pos)
        cpu->hook_credit = 0;
    if (cpu->hook_credit) {
        cpu->hook_credit--;
        return true;
    }
    if (cpu->io_pos < cpu->io_count) {
        if (!cpu->io_log[cpu->io_pos].is_hook)
            return false;
        cpu->io_pos++;
        return true;
    }
    if (cpu->io_count < X86_IO_LOG) {
        cpu->io_log[cpu->io_count] = (x86_io_access){ .is_hook = true, .done = true };
        cpu->io_pos = ++cpu->io_count;
    }
    return false;
}

void x86_hook_note(x86_cpu *cpu)
{
    cpu->io_log[0] = (x86_io_access){ .is_hook = true, .done = true };
    cpu->io_count = 1;
    cpu->io_pos = 0;
}

static void report_access(x86_cpu *cpu, unsigned kind, uint64_t la, unsigned n, const void *data)
{
    x86_hook h = { .kind = (uint8_t)kind, .bytes = n, .number = la, .address = la, .data = data };
    memcpy(&h.value, data, n < 8 ? n : 8);
    if (cpu->env->hook(cpu, &h) == X86_HOOK_SKIP)
        x86_leave(cpu, X86_STOP_SKIP);
}

void x86_hook_access(x86_cpu *cpu, uint64_t la, unsigned n, unsigned access, const void *data)
{
    unsigned kind = access == X86_READ ? X86_HOOK_READ : X86_HOOK_WRITE;
    if (x86_hooked(cpu, kind) && cpu->env->watched(cpu, la, n, access) && !seen_before(cpu))
        report_access(cpu, kind, la, n, data);
}

bool x86_hook_event(x86_cpu *cpu, x86_hook h)
{
    if (seen_before(cpu))
        return false;
    unsigned answer = cpu->env->hook(cpu, &h);
    if (answer == X86_HOOK_STOP) {
        cpu->hook_rip = cpu->rip;
        x86_leave(cpu, X86_STOP_HOOK);
    }
    return answer == X86_HOOK_SKIP;
}

unsigned x86_hook_exception(x86_cpu *cpu)
{
    const x86_fault *f = &cpu->fault;
    if (cpu->fault_hooked == cpu->retired + 1 && cpu->hook_rip == cpu->rip) {
        cpu->fault_hooked = 0;
        return X86_HOOK_GO;
    }
    x86_hook h = { .kind = X86_HOOK_EXCEPTION, .number = f->vector, .value = f->vector, .address = x86_rip_linear(cpu),
                   .flags = f->has_error ? X86_EVENT_ERROR : 0, .error = f->has_error ? f->error : 0,
                   .from = f->vector == X86_PF ? f->address : f->vector == X86_DB ? f->dr6 : 0 };
    unsigned answer = cpu->env->hook(cpu, &h);
    if (answer == X86_HOOK_STOP) {
        cpu->hook_rip = cpu->rip;
        cpu->fault_hooked = cpu->retired + 1;
    }
    return answer;
}

void x86_hook_port(x86_cpu *cpu, uint16_t port, unsigned n, uint64_t value, bool is_write)
{
    if (!x86_hooked(cpu, X86_HOOK_PORT) || seen_before(cpu))
        return;
    x86_hook h = { .kind = X86_HOOK_PORT, .bytes = n, .number = port, .address = port, .value = value,
                   .flags = is_write ? X86_EVENT_WRITE : 0 };
    if (cpu->env->hook(cpu, &h) == X86_HOOK_SKIP)
        x86_leave(cpu, X86_STOP_SKIP);
}

void x86_hook_swallowed(x86_cpu *cpu)
{
    x86_block_end(cpu, x86_rip_linear(cpu));
    x86_hook_retire(cpu);
    x86_io_retire(cpu);
    if (cpu->next_rip != cpu->rip) {   /* equal: it was not even fetched, try again */
        cpu->retired++;
        cpu->budget--;
    }
    cpu->rip = cpu->next_rip;
    cpu->inhibit = 0;
    cpu->no_trap = false;
    cpu->dr_hit = 0;
}

void x86_hook_skipped(x86_cpu *cpu)
{
    x86_block_end(cpu, x86_rip_linear(cpu));
    x86_hook_retire(cpu);
    x86_io_retire(cpu);
    cpu->retired++;
    cpu->budget--;
    cpu->rip = cpu->next_rip;
    cpu->inhibit = 0;
}

void x86_hook_left(x86_cpu *cpu)
{
    x86_block_end(cpu, cpu->code_size == 8 ? cpu->hook_rip : (uint32_t)(cpu->seg[X86_CS].base + cpu->hook_rip));
    x86_hook_retire(cpu);
}
