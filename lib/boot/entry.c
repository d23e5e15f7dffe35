/* entry.c - the states in which guests expect vCPU 0: real mode, flat 32-bit protected mode, 64-bit with the first 4 GiB
 * mapped to themselves, or the reset vector. Tables go into memory first; registers change last and all at once. */
#include "boot/boot.h"

#include <string.h>

/* The descriptors Linux' boot protocol asks for: code at 0x10, data at 0x18; a TSS, so that TR is valid under KVM too. */
#define CODE_SELECTOR 0x10u
#define DATA_SELECTOR 0x18u
#define TSS_SELECTOR  0x20u
#define ATTR_CODE32 0xc09bu
#define ATTR_CODE64 0xa09bu
#define ATTR_DATA32 0xc093u
#define ATTR_TSS    0x008bu
#define ATTR_CODE16 0x009bu
#define ATTR_DATA16 0x0093u
#define ATTR_LDT    0x0082u

/* A flat segment's descriptor from its attributes as x86_seg has them (SDM vol. 3, 3.4.5). */
static uint64_t descriptor(uint32_t attr, uint32_t limit)
{
    return (uint64_t)(limit & 0xffff) | (uint64_t)(attr & 0xff) << 40 | (uint64_t)(limit >> 16 & 15) << 48
         | (uint64_t)(attr >> 12 & 15) << 52;
}

static int put_gdt(vm_placer *placer, vm_entry_kind kind, uint64_t *gpa)
{
    const uint64_t gdt[] = {0, 0, descriptor(kind == VM_ENTRY_LONG64 ? ATTR_CODE64 : ATTR_CODE32, 0xfffff),
                            descriptor(ATTR_DATA32, 0xfffff), descriptor(ATTR_TSS, 0x67), 0};
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, sizeof gdt, 4096, "boot GDT", gpa);
    return status == VM_OK ? vm_boot_copy(placer->machine, *gpa, gdt, sizeof gdt, "boot GDT") : status;
}

/* Linear = physical for 4 GiB in 2 MiB pages: one PML4, one PDPT, four page directories. */
static int put_page_tables(vm_placer *placer, uint64_t *cr3)
{
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, 6 * 4096, 4096, "boot page tables", cr3);
    if (status != VM_OK) return status;
    const uint64_t flags = 3;                  /* present, writable */
    uint64_t table[512] = {*cr3 + 0x1000 + flags};
    status = vm_boot_copy(placer->machine, *cr3, table, sizeof table, "boot PML4");
    for (unsigned i = 0; i < 4; i++) table[i] = *cr3 + 0x2000 + 0x1000 * i + flags;
    if (status == VM_OK) status = vm_boot_copy(placer->machine, *cr3 + 0x1000, table, sizeof table, "boot PDPT");
    for (uint64_t d = 0; d < 4 && status == VM_OK; d++) {
        for (uint64_t i = 0; i < 512; i++) table[i] = (d << 30) + (i << 21) + 0x80 + flags;
        status = vm_boot_copy(placer->machine, *cr3 + 0x2000 + 0x1000 * d, table, sizeof table, "boot page directory");
    }
    return status;
}

int vm_entry_prepare(vm_placer *placer, vm_entry_kind kind, vm_entry_tables *tables)
{
    memset(tables, 0, sizeof *tables);
    if (kind == VM_ENTRY_REAL || kind == VM_ENTRY_RESET) return VM_OK;
    int status = put_gdt(placer, kind, &tables->gdt);
    if (status == VM_OK && kind == VM_ENTRY_LONG64) status = put_page_tables(placer, &tables->cr3);
    return status;
}

static void real_mode(x86_cpu *cpu, const vm_entry *entry)
{
    x86_cpu_set_mode(cpu, VM_MODE_REAL);
    for (unsigned s = X86_ES; s <= X86_GS; s++) {
        uint16_t value = s == X86_CS ? entry->cs : entry->ds;
        cpu->seg[s] = (x86_seg){(uint64_t)value << 4, 0xffff, value, s == X86_CS ? ATTR_CODE16 : ATTR_DATA16};
    }
    cpu->idtr = (x86_dtr){0, 0x3ff};
}

static void protected_mode(x86_cpu *cpu, const vm_entry *entry, const vm_entry_tables *tables)
{
    bool is_long = entry->kind == VM_ENTRY_LONG64;
    x86_cpu_set_mode(cpu, VM_MODE_FLAT32);
    for (unsigned s = X86_ES; s <= X86_GS; s++)
        cpu->seg[s] = (x86_seg){0, 0xffffffff, DATA_SELECTOR, ATTR_DATA32};
    cpu->seg[X86_CS] = (x86_seg){0, 0xffffffff, CODE_SELECTOR, is_long ? ATTR_CODE64 : ATTR_CODE32};
    cpu->seg[X86_TR] = (x86_seg){0, 0x67, TSS_SELECTOR, ATTR_TSS};
    cpu->seg[X86_LDTR] = (x86_seg){0, 0, 0, ATTR_LDT};
    cpu->gdtr = (x86_dtr){tables->gdt, 6 * 8 - 1};
    cpu->idtr = (x86_dtr){0, 0};
    cpu->cr0 = X86_CR0_PE | X86_CR0_ET;
    if (!is_long) return;
    cpu->flat = false;
    cpu->cr3 = tables->cr3;
    cpu->cr4 |= X86_CR4_PAE;
    cpu->efer |= X86_EFER_LME | X86_EFER_LMA;
    cpu->cr0 |= X86_CR0_PG;
}

void vm_entry_apply(vm_machine *m, const vm_entry *entry, const vm_entry_tables *tables)
{
    vm_vcpu *vcpu = m->vcpus[0];
    vm_vcpu_fetch(vcpu, VM_STATE_ALL);
    x86_cpu *cpu = &vcpu->x86;
    if (entry->kind == VM_ENTRY_RESET) x86_cpu_reset(cpu, false);
    else if (entry->kind == VM_ENTRY_REAL) real_mode(cpu, entry);
    else protected_mode(cpu, entry, tables);
    if (entry->kind != VM_ENTRY_RESET) {
        memset(cpu->gpr, 0, sizeof cpu->gpr);
        cpu->rip = cpu->next_rip = entry->rip;
        cpu->rflags = X86_FL_1;
        cpu->gpr[X86_RSP] = entry->rsp;
        cpu->gpr[X86_RAX] = entry->rax;
        cpu->gpr[X86_RBX] = entry->rbx;
        cpu->gpr[X86_RSI] = entry->rsi;
    }
    cpu->halted = false;
    vcpu->is_parked = false;
    x86_mode_changed(cpu);
    cpu->env->root_changed(cpu, 0);
    vm_vcpu_changed(vcpu, VM_STATE_ALL);
    if (entry->kind != VM_ENTRY_RESET && m->pc) vm_pc_firmware_state(m);
}
