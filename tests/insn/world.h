/* world.h - the small world instruction tests run in: where things lie in guest memory, and how a vCPU gets into each mode.
 * Included by C and by the assembly of the cases (constants only there: world.def).
 *
 * Addresses are the same in every environment, and below 64 KiB so that 16-bit code reaches them:
 *     0x0000  real-mode interrupt vectors          0x1000  GDT             0x1800  IDT (0x800 bytes 32-bit, 0x1000 64-bit:
 *     0x3000  TSS with I/O bitmap                                                   0x2000)
 *     0x6000  handlers: 16 bytes a vector, each a HLT
 *     0x7800  ring 0 stack after a privilege change (grows down)
 *     0x8000  the snippet                          0x9000, 0xa000  data
 *     0xb000  data; read-only where there is paging     0xc000  supervisor only    0xd000  not present
 *     0xe000  stack, RSP starts at 0xef00          0xf000  no-execute where there is NX
 *    0xd0000  MMIO without callbacks (exits)      0xd1000  MMIO with callbacks (a 4 KiB scratch device)
 *    0xe0000  a hole                              0xf0000  ROM (64 KiB)
 *   0x100000  1 MiB RAM; page tables lie here
 */
#ifndef LIBVM_WORLD_H
#define LIBVM_WORLD_H

#ifdef __ASSEMBLER__
#define W(name, value) .set name, value;
#include "world.def"
#undef W
#else
#define W(name, value) name = value,
enum {
#include "world.def"
};
#undef W
#include <libvm/libvm.h>

typedef struct world_env {
    const char *name;
    unsigned bit, bits;             /* ENV_*, code size 16, 32, 64 */
    bool is_paged, is_user;
} world_env;
extern const world_env world_envs[];
enum { WORLD_ENVS = 11 };

typedef struct world {
    vm_machine *m;
    vm_vcpu *cpu;
    const world_env *env;
    vm_region *ram, *high, *rom, *mmio, *device;
    unsigned char *low;             /* host view of 0 .. 0xcffff */
    unsigned char scratch[4096];    /* the device behind W_DEVICE */
    unsigned device_reads, device_writes;
} world;

/* The backends to test: those available, or the one named by TEST_BACKEND. */
extern vm_backend world_backends[3];
unsigned world_backend_count(void);

/* A machine with the memory above, its vCPU in environment `env` with RIP = W_CODE, RSP = W_STACK. */
void world_open(world *w, vm_backend backend, const world_env *env);
void world_close(world *w);
void world_poke(world *w, uint64_t gpa, const void *bytes, size_t count);
uint64_t world_peek(world *w, uint64_t gpa, unsigned bytes);
void world_set(world *w, int reg, uint64_t value);
uint64_t world_get(world *w, int reg);
/* A descriptor in GDT entry `selector`. attr as in vm_segment; limit in units of the granularity bit. */
void world_descriptor(world *w, unsigned selector, uint32_t base, uint32_t limit, unsigned attr);
/* The stack frame of an exception or interrupt that was just delivered (handler's HLT executed). */
typedef struct world_frame { uint64_t error, rip, cs, flags, rsp, ss; int vector; } world_frame;
world_frame world_read_frame(world *w, bool has_error);
#endif
#endif
