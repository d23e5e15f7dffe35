/* paged.h - a small guest with page tables, for the examples of MMU strategies: 64-bit, ring 0, 4 KiB pages. */
#ifndef EXAMPLE_PAGED_H
#define EXAMPLE_PAGED_H
#include <libvm/libvm.h>

enum { PAGED_RAM = 4 << 20, PAGED_CODE = 0x1000, PAGED_DATA = 0x200000, PAGED_WORDS = 32768, PAGED_PAGES = PAGED_WORDS * 8 / 4096 };

/* A machine with the strategy, ready to run; NULL: said why on standard error. */
vm_machine *paged_machine(vm_backend backend, const char *strategy);
/* Runs it to its end, in slices of so many instructions (0: in one), calling `each` before every one. The guest's result. */
uint64_t paged_run(vm_machine *m, uint64_t slice, void (*each)(void *user, vm_machine *m), void *user);
/* What the result should be. */
uint64_t paged_expected(void);
#endif
