/* common.h - what the small examples share: a machine with flat 64-bit code at 0x1000, and an end with a message when a call fails. */
#ifndef EXAMPLES_COMMON_H
#define EXAMPLES_COMMON_H

#include <inttypes.h>
#include <libvm/libvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CODE UINT64_C(0x1000)
#define MUST(call) do { if ((call) != VM_OK) die(#call); } while (0)

static inline void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, vm_errmsg());
    exit(1);
}

/* 64 KiB of RAM with the code in it; NULL options: all defaults. */
static inline vm_machine *machine_with(const vm_options *options, const void *code, size_t bytes)
{
    vm_machine *m;
    MUST(vm_create(options, &m));
    MUST(vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL));
    MUST(vm_write(m, CODE, code, bytes));
    MUST(vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_FLAT64));
    return m;
}

/* The same on the interpreter: what watches a guest works there and on the JIT, while KVM's guests run by themselves. */
static inline vm_machine *software_machine_with(const void *code, size_t bytes)
{
    vm_options options = VM_OPTIONS_INIT;
    options.backend = VM_BACKEND_INTERP;
    return machine_with(&options, code, bytes);
}

static inline uint64_t get(vm_vcpu *cpu, vm_reg_id reg)
{
    uint64_t value;
    MUST(vm_vcpu_read_reg(cpu, reg, &value, sizeof value));
    return value;
}

static inline void set(vm_vcpu *cpu, vm_reg_id reg, uint64_t value) { MUST(vm_vcpu_write_reg(cpu, reg, &value, sizeof value)); }

/* Runs from CODE and shows how it ended. */
static inline void run_and_show(vm_vcpu *cpu, const vm_run_options *options, vm_exit *exit)
{
    char text[256];
    MUST(vm_vcpu_run(cpu, options, exit));
    vm_exit_format(exit, text, sizeof text);
    printf("%s\n", text);
}

#endif
