/* check.c - the checks of api.h, and the version. */
#include "api/api.h"

#include <string.h>

static uint32_t size_of(const void *s)
{
    uint32_t size;
    memcpy(&size, s, sizeof size);
    return size;
}

int vm_struct_in(void *to, size_t bytes, const void *from, const char *function, const char *name)
{
    if (!from)
        return vm_fail(VM_E_INVALID, "%s: %s is NULL", function, name);
    uint32_t size = size_of(from);
    if (size <= sizeof size || size > 65536)
        return vm_fail(VM_E_INVALID, "%s: %s->size is %u; set it with the struct's _INIT macro", function, name, size);
    memset(to, 0, bytes);
    memcpy(to, from, size < bytes ? size : bytes);
    for (size_t i = bytes; i < size; i++)
        if (((const uint8_t *)from)[i])
            return vm_fail(VM_E_INVALID, "%s: %s->size is %u, and byte %zu, unknown to this version, is not zero",
                           function, name, size, i);
    return VM_OK;
}

int vm_struct_out(void *to, const void *from, size_t bytes, const char *function, const char *name)
{
    if (!to)
        return vm_fail(VM_E_INVALID, "%s: %s is NULL", function, name);
    uint32_t size = size_of(to);
    if (size <= sizeof size || size > 65536)
        return vm_fail(VM_E_INVALID, "%s: %s->size is %u; set it with the struct's _INIT macro", function, name, size);
    if (from)
        memcpy((uint8_t *)to + sizeof size, (const uint8_t *)from + sizeof size,
               (size < bytes ? size : bytes) - sizeof size);
    return VM_OK;
}

int vm_check_vcpu(const vm_vcpu *cpu, const char *function)
{
    if (!cpu)
        return vm_fail(VM_E_INVALID, "%s: cpu is NULL", function);
    if (vm_vcpu_is_running(cpu) && !vm_vcpu_is_mine(cpu))
        return vm_fail(VM_E_BUSY, "%s: vCPU %u is running in another thread", function, cpu->index);
    return VM_OK;
}

VM_API const char *vm_version(void)
{
#define TEXT(x) #x
#define VERSION_TEXT(a, b, c) TEXT(a) "." TEXT(b) "." TEXT(c)
    return VERSION_TEXT(VM_VERSION_MAJOR, VM_VERSION_MINOR, VM_VERSION_PATCH);
}

VM_API uint32_t vm_version_number(void)
{
    return VM_VERSION_NUMBER;
}
