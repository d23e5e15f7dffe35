/* error.c - status texts and the detail of the last failure.
 *
 * The message buffer is the library's only thread-local variable.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/core.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[320];

static const struct { int value; const char *text; } errors[] = {
#define VM_ERROR(name, value, text) { value, text },
#include <libvm/error.def>
#undef VM_ERROR
};

VM_API const char *vm_strerror(int status)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].value == status)
            return errors[i].text;
    return "unknown status";
}

VM_API const char *vm_errmsg(void)
{
    return message;
}

int vm_fail(int status, const char *format, ...)
{
    char text[sizeof message];         /* the arguments may point into the message of the failure before */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(message, text, sizeof message);
    return status;
}

int vm_fail_errno(int status, const char *what)
{
    int number = errno;
    char text[128];
    const char *t = strerror_r(number, text, sizeof text);      /* GNU form: may or may not use the buffer */
    return vm_fail(number == ENOMEM ? VM_E_NOMEM : status, "%s: %s", what, t);
}
