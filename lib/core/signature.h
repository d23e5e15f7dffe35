/* signature.h - signatures of functions as text, where a convention puts arguments, and their types for libffi.
 *
 * A vm_signature is parsed once and then only read. Its places are laid out for one convention; a signature without a
 * convention is laid out when the code's width is known (vm_signature_place).
 */
#ifndef LIBVM_CORE_SIGNATURE_H
#define LIBVM_CORE_SIGNATURE_H

#include "core/core.h"
#include <ffi.h>

typedef enum vm_convention { VM_CONV_NONE, VM_CONV_SYSV, VM_CONV_WIN64, VM_CONV_CDECL, VM_CONV_STDCALL,
                             VM_CONV_HYPER64, VM_CONV_HYPER32, VM_CONV_COUNT } vm_convention;

typedef enum vm_type { VM_T_VOID, VM_T_U8, VM_T_U16, VM_T_U32, VM_T_U64, VM_T_I8, VM_T_I16, VM_T_I32, VM_T_I64, VM_T_F32,
                       VM_T_F64, VM_T_PTR, VM_T_STR, VM_T_BUF, VM_T_CBUF, VM_T_CPU, VM_T_USER, VM_T_COUNT } vm_type;

typedef struct vm_param {
    uint8_t type;                      /* vm_type */
    uint8_t value;                     /* its number among the values, if it is one (not cpu, user) */
    bool has_bytes;                    /* buf, cbuf: of fixed size */
    uint32_t bytes;
} vm_param;

typedef struct vm_signature {
    uint8_t convention, result;        /* vm_convention, vm_type */
    uint8_t count;                     /* parameters, cpu and user among them */
    uint8_t values;                    /* parameters that are values of the guest */
    vm_param params[VM_CALL_ARGS];
} vm_signature;

/* Where a value is at the function's entry. */
typedef enum vm_place_kind { VM_PLACE_GPR, VM_PLACE_XMM, VM_PLACE_STACK } vm_place_kind;
typedef struct vm_place {
    uint8_t kind;                      /* vm_place_kind */
    uint8_t bytes;                     /* of the place: 4, 8 */
    uint16_t at;                       /* register number; offset from the stack pointer after CALL */
} vm_place;

typedef struct vm_layout {
    vm_convention convention;
    uint8_t word;                      /* 4, 8: a stack slot, an address */
    uint8_t xmm_count;                 /* vector registers used */
    uint16_t stack_bytes;              /* of arguments above the return address, the callee's home area included */
    uint16_t popped;                   /* what the callee takes off beside the return address */
    vm_place places[VM_CALL_ARGS];     /* by value number */
} vm_layout;

/* VM_OK, or VM_E_INVALID with a message that begins with `function`. has_host: cpu and user are types. */
int vm_signature_parse(const char *text, bool has_host, const char *function, vm_signature *s);
/* Where `s` finds its values in code of `code_size` bytes. `hyper`: of a hypercall. VM_E_UNSUPPORTED when the convention
 * is not for that code, VM_E_INVALID when a hypercall has more than fit. */
int vm_signature_place(const vm_signature *s, unsigned code_size, bool hyper, const char *function, vm_layout *layout);

static inline bool vm_type_is_float(unsigned type) { return type == VM_T_F32 || type == VM_T_F64; }
static inline bool vm_type_is_memory(unsigned type) { return type == VM_T_STR || type == VM_T_BUF || type == VM_T_CBUF; }
/* Bytes of a number; pointers: `word`. */
unsigned vm_type_bytes(unsigned type, unsigned word);
/* The number in the low bits of `raw`, extended as its type says. */
uint64_t vm_type_extend(unsigned type, unsigned word, uint64_t raw);
/* The host's C type. */
ffi_type *vm_type_ffi(unsigned type);
/* The C function type of the signature; `types` has room for VM_CALL_ARGS and must live as long as *cif. */
int vm_signature_cif(const vm_signature *s, const char *function, ffi_cif *cif, ffi_type **types);
/* How many bytes value parameter p has, by the values themselves or its own size; false: no length there. */
bool vm_param_bytes(const vm_signature *s, unsigned param, const vm_value *values, uint64_t *bytes);

#endif
