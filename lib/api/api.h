/* api.h - argument checks that the public functions share.
 *
 * lib/api holds the public functions: each checks its arguments, with a message that names the one at fault, then
 * calls into lib/core. Nothing below lib/api checks a caller's arguments again.
 */
#ifndef LIBVM_API_API_H
#define LIBVM_API_API_H

#include "core/core.h"

/* Take a caller's struct: *from (its first member is its size) to *to of `bytes`, the rest zero. VM_E_INVALID if
 * `from` is NULL, too small to hold its size and one member, or has something non-zero where this library knows
 * nothing. */
int vm_struct_in(void *to, size_t bytes, const void *from, const char *function, const char *name);
/* Give a struct back: what fits into the caller's *to; its size member stays. */
int vm_struct_out(void *to, const void *from, size_t bytes, const char *function, const char *name);

/* VM_E_BUSY while another thread drives the vCPU; VM_E_INVALID for NULL. */
int vm_check_vcpu(const vm_vcpu *cpu, const char *function);

#define VM_CHECK_NULL(function, argument) \
    do { \
        if (!(argument)) \
            return vm_fail(VM_E_INVALID, function ": " #argument " is NULL"); \
    } while (0)
#define VM_CHECK(expression) \
    do { \
        int check_status = (expression); \
        if (check_status != VM_OK) \
            return check_status; \
    } while (0)

#endif
