/* print.c - LIBVM_TRACE=ir,mcode: a translated block as IR and as host code. */
#include <stdio.h>
#include <Zydis/Zydis.h>
#include "jit/jit.h"

static const char *const ir_names[] = {
#define IR(name, operands, meaning) #name,
#include "jit/ir.def"
#undef IR
};

static void print_op(vm_machine *m, const jit_unit *u, const jit_op *o)
{
    char text[96] = "";
    const jit_info *f = &u->info[o->insn];
    if (o->op == IR_NATIVE || o->op == IR_EA || o->op == IR_LEA || o->op == IR_FALLBACK || o->op == IR_FALLBACK_END)
        x86_format(&u->insn[o->insn], u->insn_rip[o->insn], text, sizeof text);
    vm_trace_line(m, VM_TRACE_IR,
                  "  %2u %-12s %s access=%u size=%u reg=%u imm=%lld target=%llx host_at=%03x exact=%03x", o->insn,
                  ir_names[o->op], text, o->access, o->size, o->reg, (long long)o->imm, (unsigned long long)o->target,
                  f->host_at, f->exact_at);
}

static void print_code(jit *j, vm_machine *m, const uint8_t *p, const uint8_t *end)
{
    ZydisDisassembledInstruction d;
    while (p < end && ZYAN_SUCCESS(ZydisDisassembleIntel(ZYDIS_MACHINE_MODE_LONG_64, (uintptr_t)(p + j->w.to_exec), p,
                                                         (size_t)(end - p), &d))) {
        vm_trace_line(m, VM_TRACE_MCODE, "  %p %s", (const void *)(p + j->w.to_exec), d.text);
        p += d.info.length;
    }
}

void jit_print(jit *j, const jit_unit *u, const jit_block *b)
{
    vm_machine *m = j->vcpu->machine;
    unsigned mask = vm_trace_mask(m);
    vm_trace_line(m, mask & VM_TRACE_IR ? VM_TRACE_IR : VM_TRACE_MCODE,
                  "block %llx gpa %llx key %x: %u instructions, %zu bytes, entry needs %u", (unsigned long long)b->rip,
                  (unsigned long long)b->gpa, b->key, b->count, (size_t)(j->w.p - b->entry_mem), u->entry_need);
    if (mask & VM_TRACE_IR)
        for (unsigned i = 0; i < u->nops; i++) print_op(m, u, &u->ops[i]);
    if (mask & VM_TRACE_MCODE) print_code(j, m, b->entry_mem, j->w.p);
}
