/* x86_bare.h - an x86_cpu with nothing around it but 4 MiB of RAM, for tests of lib/x86 and lib/interp below the machine.
 *
 * RAM starts at guest-physical 0. Accesses beyond it and all ports are recorded and answered with all ones, or leave the CPU
 * when `exits` is set. Paging is the plain page walk.
 */
#ifndef X86_BARE_H
#define X86_BARE_H

#include "interp/interp.h"

#define BARE_RAM (4u << 20)
typedef struct bare {
    x86_cpu *cpu;
    uint8_t *ram;
    uint8_t is_code[BARE_RAM >> 12];
    bool exits;
    struct { uint64_t address, value; unsigned n; bool is_port, is_write; } log[64];
    unsigned log_count;
    uint64_t io_value;                 /* what reads return */
} bare;

bare *bare_new(unsigned vm_mode_value);
void bare_free(bare *b);
/* Put code at rip (linear) and run until `count` instructions retired or something stops it. */
x86_stop bare_run(bare *b, int64_t count);
void bare_code(bare *b, uint64_t at, const void *bytes, unsigned n);

#endif
