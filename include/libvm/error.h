/* error.h - status codes and their details. */
#ifndef LIBVM_INCLUDE_ERROR_H
#define LIBVM_INCLUDE_ERROR_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* VM_OK is 0, failures are negative; error.def lists them with their texts. Functions return `int`, so that later
 * versions can add codes. */
typedef enum vm_status {
#define VM_ERROR(name, value, text) name = value,
#include <libvm/error.def>
#undef VM_ERROR
    VM_STATUS_FORCE_INT = 0x7fffffff    /* not a status: fixes the enum's width */
} vm_status;

/* A status in words; static text, never NULL, also for numbers that are no status. Any thread. */
VM_API const char *vm_strerror(int status);

/* The detail of the last failure in the calling thread: what failed, where, and the value at fault. Never NULL, "" when
 * nothing has failed yet. Valid until the thread's next failing libvm call; successful calls leave it alone. */
VM_API const char *vm_errmsg(void);

#ifdef __cplusplus
}
#endif
#endif
