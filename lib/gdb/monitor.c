/* monitor.c - "monitor ..." commands of the debugger's user: a word or two, looked up in a table. */
#include "gdb/gdb.h"

#include <stdlib.h>
#include <string.h>

typedef struct monitor_command { const char *name, *help; void (*run)(gdb *g, const char *argument, gdb_text *out); } monitor_command;

static vm_vcpu *cpu_of(const gdb *g)
{
    return g->cpus[g->general].cpu;
}

/* ---- looking ---- */

static void put_segment(gdb_text *out, const char *name, const vm_segment *s)
{
    gdb_printf(out, "%-5s %04x base %016llx limit %08x attributes %04x\n", name, s->selector, (unsigned long long)s->base,
               s->limit, s->attributes);
}

static void info_registers(gdb *g, const char *argument, gdb_text *out)
{
    static const char *const names[] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11",
                                         "r12", "r13", "r14", "r15", "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8",
                                         "efer", "xcr0", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7" };
    vm_sregs s = VM_SREGS_INIT;
    (void)argument;
    if (vm_vcpu_get_sregs(cpu_of(g), &s) != VM_OK) {
        gdb_printf(out, "%s\n", vm_errmsg());
        return;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        uint64_t v = 0;
        (void)vm_vcpu_read_reg(cpu_of(g), vm_reg_find(names[i]), &v, 8);
        gdb_printf(out, "%-6s %016llx%s", names[i], (unsigned long long)v, i % 3 == 2 ? "\n" : "   ");
    }
    gdb_puts(out, "\n");
    const struct { const char *name; const vm_segment *s; } segments[] = {
        { "cs", &s.cs }, { "ss", &s.ss }, { "ds", &s.ds }, { "es", &s.es }, { "fs", &s.fs }, { "gs", &s.gs },
        { "ldtr", &s.ldtr }, { "tr", &s.tr } };
    for (size_t i = 0; i < sizeof segments / sizeof *segments; i++)
        put_segment(out, segments[i].name, segments[i].s);
    gdb_printf(out, "gdtr  %016llx limit %04x\nidtr  %016llx limit %04x\ncpl   %u\n", (unsigned long long)s.gdtr.base,
               s.gdtr.limit, (unsigned long long)s.idtr.base, s.idtr.limit, s.cpl);
}

static void info_mem(gdb *g, const char *argument, gdb_text *out)
{
    static const char *const kinds[] = { "ram", "host", "file", "mmio", "port" };
    (void)argument;
    vm_machine_lock(g->m);
    for (size_t i = 0; i < g->m->view.count; i++) {
        const vm_range *r = &g->m->view.ranges[i];
        unsigned prot = r->region->kind > VM_REGION_FILE ? 0 : vm_region_prot(r->region, r->offset);
        gdb_printf(out, "%016llx-%016llx %-4s %s%s%s\n", (unsigned long long)r->gpa,
                   (unsigned long long)(r->gpa + r->bytes - 1), kinds[r->region->kind], prot & VM_PROT_R ? "r" : "-",
                   prot & VM_PROT_W ? "w" : "-", prot & VM_PROT_X ? "x" : "-");
    }
    vm_machine_unlock(g->m);
}

static void info_stats(gdb *g, const char *argument, gdb_text *out)
{
    const char *name, *text;
    uint64_t value;
    (void)argument;
    for (unsigned i = 0; (name = vm_stat_name(i, &text)) != NULL; i++)
        if (vm_stats(g->m, name, &value) == VM_OK)
            gdb_printf(out, "%-20s %20llu  %s\n", name, (unsigned long long)value, text);
}

static void info_snapshots(gdb *g, const char *argument, gdb_text *out)
{
    (void)argument;
    for (unsigned i = 0; i < g->named_count; i++)
        gdb_printf(out, "%s\n", g->named[i].name);
    if (gdb_can_reverse(g))
        gdb_printf(out, "history: %u snapshots, from instruction %llu\n", g->history_count,
                   (unsigned long long)(g->history_count ? g->history[0].retired : 0));
    else
        gdb_puts(out, "history: off\n");
}

static void translate(gdb *g, const char *argument, gdb_text *out)
{
    uint64_t gva, gpa;
    if (!strncmp(argument, "0x", 2))
        argument += 2;
    if (!gdb_hex(&argument, &gva))
        gdb_puts(out, "translate ADDRESS\n");
    else if (vm_vcpu_translate(cpu_of(g), gva, VM_PROT_R, &gpa) == VM_OK)
        gdb_printf(out, "0x%llx -> 0x%llx\n", (unsigned long long)gva, (unsigned long long)gpa);
    else
        gdb_printf(out, "%s\n", vm_errmsg());
}

/* ---- changing ---- */

static void done(gdb_text *out, int status)
{
    gdb_printf(out, "%s\n", status == VM_OK ? "done" : vm_errmsg());
}

static void backend(gdb *g, const char *argument, gdb_text *out)
{
    static const vm_backend all[] = { VM_BACKEND_KVM, VM_BACKEND_JIT, VM_BACKEND_INTERP };
    if (!*argument) {
        gdb_printf(out, "%s\n", vm_backend_name(vm_machine_backend(g->m)));
        return;
    }
    for (unsigned i = 0; i < 3; i++)
        if (!strcmp(argument, vm_backend_name(all[i]))) {
            if (all[i] == VM_BACKEND_KVM && gdb_can_reverse(g))
                gdb_puts(out, "KVM does not count instructions: no reverse execution there\n");
            else
                done(out, vm_backend_select(g->m, all[i]));
            return;
        }
    gdb_puts(out, "backend kvm, jit or interp\n");
}

static void reset(gdb *g, const char *argument, gdb_text *out)
{
    (void)argument;
    g->is_edited = true;
    done(out, gdb_reset(g));
}

static void memory(gdb *g, const char *argument, gdb_text *out)
{
    if (!strcmp(argument, "physical") || !strcmp(argument, "linear"))
        g->is_physical = *argument == 'p';
    else if (*argument)
        gdb_puts(out, "memory linear or physical\n");
    gdb_printf(out, "addresses are %s\n", g->is_physical ? "guest-physical" : "linear");
}

static void arch(gdb *g, const char *argument, gdb_text *out)
{
    if (!strcmp(argument, "auto"))
        g->arch_wanted = GDB_ARCH_AUTO;
    else if (!strcmp(argument, "i386"))
        g->arch_wanted = GDB_ARCH_32;
    else if (!strcmp(argument, "x86-64"))
        g->arch_wanted = GDB_ARCH_64;
    else
        gdb_puts(out, "arch auto, i386 or x86-64\n");
    gdb_printf(out, "this connection shows %s; a choice counts from the next one\n", g->is_64 ? "x86-64" : "i386");
}

static void catch_vectors(gdb *g, const char *argument, gdb_text *out)
{
    uint64_t mask = 0;
    for (const char *p = argument; *p;) {
        char *end;
        unsigned long v = strtoul(p, &end, 10);
        if (end == p || v > 31)
            break;
        mask |= UINT64_C(1) << v;
        p = *end == ',' ? end + 1 : end;
    }
    if (*argument)
        g->exception_exits = mask;
    gdb_printf(out, "exceptions that stop the machine: mask 0x%llx\n", (unsigned long long)g->exception_exits);
}

/* ---- snapshots ---- */

static gdb_named *named(gdb *g, const char *name)
{
    for (unsigned i = 0; i < g->named_count; i++)
        if (!strcmp(g->named[i].name, name))
            return &g->named[i];
    return NULL;
}

static void snapshot_take(gdb *g, const char *name, gdb_text *out)
{
    vm_snapshot *s;
    gdb_named *n = named(g, name);
    if (!*name || strlen(name) >= sizeof n->name || (!n && g->named_count == GDB_NAMED)) {
        gdb_printf(out, "snapshot take NAME (up to 31 characters, %u snapshots)\n", GDB_NAMED);
        return;
    }
    int status = vm_snapshot_take(g->m, &s);
    done(out, status);
    if (status != VM_OK)
        return;
    if (n) {
        vm_snapshot_free(n->snapshot);
    } else {
        n = &g->named[g->named_count++];
        strcpy(n->name, name);
    }
    n->snapshot = s;
}

static void snapshot_restore(gdb *g, const char *name, gdb_text *out)
{
    gdb_named *n = named(g, name);
    if (!n) {
        gdb_puts(out, "no such snapshot\n");
        return;
    }
    g->is_edited = true;
    done(out, vm_snapshot_restore(g->m, n->snapshot));
    gdb_puts(out, "the debugger may hold old registers: flushregs\n");
}

static void snapshot_delete(gdb *g, const char *name, gdb_text *out)
{
    gdb_named *n = named(g, name);
    if (!n) {
        gdb_puts(out, "no such snapshot\n");
        return;
    }
    vm_snapshot_free(n->snapshot);
    *n = g->named[--g->named_count];
    done(out, VM_OK);
}

/* ---- finding them ---- */

static void help(gdb *g, const char *argument, gdb_text *out);

static const monitor_command commands[] = {
    { "help", "this", help },
    { "info registers", "registers of the current vCPU, system registers too", info_registers },
    { "info mem", "the memory map", info_mem },
    { "info stats", "counters", info_stats },
    { "info snapshots", "snapshots by name, and the history for reverse execution", info_snapshots },
    { "translate", "ADDRESS: linear to guest-physical", translate },
    { "backend", "[kvm|jit|interp]: show it, or move the machine", backend },
    { "memory", "[linear|physical]: what addresses of x and print mean", memory },
    { "arch", "[auto|i386|x86-64]: registers shown from the next connection on", arch },
    { "catch", "[N,N...|none]: exceptions that stop the machine instead of being delivered", catch_vectors },
    { "reset", "reset the machine", reset },
    { "snapshot take", "NAME", snapshot_take },
    { "snapshot restore", "NAME", snapshot_restore },
    { "snapshot delete", "NAME", snapshot_delete },
    { "snapshot list", "as info snapshots", info_snapshots },
};

static void help(gdb *g, const char *argument, gdb_text *out)
{
    (void)g, (void)argument;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        gdb_printf(out, "%-18s %s\n", commands[i].name, commands[i].help);
}

void gdb_monitor(gdb *g, const char *line, gdb_text *out)
{
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        size_t n = strlen(commands[i].name);
        if (!strncmp(line, commands[i].name, n) && (!line[n] || line[n] == ' ')) {
            const char *argument = line + n;
            while (*argument == ' ')
                argument++;
            commands[i].run(g, argument, out);
            return;
        }
    }
    gdb_puts(out, "unknown command; \"monitor help\" lists them\n");
}
