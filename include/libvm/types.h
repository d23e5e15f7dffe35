/* types.h - what every other header needs: handles, visibility, version. */
#ifndef LIBVM_INCLUDE_TYPES_H
#define LIBVM_INCLUDE_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define VM_API __attribute__((visibility("default")))
#else
#define VM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of these headers; vm_version() tells that of the library in use. */
#define VM_VERSION_MAJOR 0
#define VM_VERSION_MINOR 1
#define VM_VERSION_PATCH 0
#define VM_VERSION_NUMBER (VM_VERSION_MAJOR * 10000 + VM_VERSION_MINOR * 100 + VM_VERSION_PATCH)

/* Initial value of a public struct: its size, all else zero. */
#ifdef __cplusplus
extern "C++" template <class T> inline T vm_struct_init() { T t = T(); t.size = sizeof(T); return t; }
#define VM_STRUCT_INIT(type) vm_struct_init<type>()
#else
#define VM_STRUCT_INIT(type) { .size = sizeof(type) }
#endif

typedef struct vm_machine vm_machine;   /* one virtual machine; owns all else */
typedef struct vm_vcpu vm_vcpu;         /* one of its processors */
typedef struct vm_region vm_region;     /* one range of its memory map or port space */
typedef struct vm_hook vm_hook;         /* one function that watches or steers its guest; see hook.h */

/* What may be done with memory; a set of bits. Also an access kind where one bit is asked for. On the software backends
 * each bit is enforced by itself; memory that is readable is not thereby executable. */
typedef enum vm_prot {
    VM_PROT_NONE = 0,
    VM_PROT_R = 1,                      /* data reads */
    VM_PROT_W = 2,                      /* data writes */
    VM_PROT_X = 4,                      /* instruction fetches */
    VM_PROT_RW = 3,
    VM_PROT_RX = 5,
    VM_PROT_RWX = 7
} vm_prot;

/* The library's version as text, "0.1.0". Static; any thread. */
VM_API const char *vm_version(void);
/* The same as VM_VERSION_NUMBER of the library in use. */
VM_API uint32_t vm_version_number(void);

#ifdef __cplusplus
}
#endif
#endif
