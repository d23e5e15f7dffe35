/* call.h - functions across the border: the host calls guest functions, the guest calls host functions.
 *
 * Signatures are text:
 *
 *     [convention ':'] result '(' [type {',' type}] ')'          "u64(ptr,u32)"   "win64: f64(f64,i32)"   "void(cpu,str)"
 *
 *   convention  sysv (System V AMD64), win64 (Microsoft x64), cdecl, stdcall (both i386). Left out: sysv when the vCPU is
 *               in 64-bit mode, cdecl in 32-bit code, looked at when the call is made. A convention of the other width
 *               than the code's is VM_E_UNSUPPORTED, so is 16-bit code.
 *   result      void or a number
 *   number      u8 u16 u32 u64 i8 i16 i32 i64, f32 f64, ptr (a guest address, of the code's width, never followed)
 *   str         address of a string that ends with NUL, or 0
 *   buf         address of bytes, or 0. How many, says the next argument, which must be an integer; or a number in
 *               brackets: buf[64]. The function may change them.
 *   cbuf        the same, only read
 *   cpu, user   not of the guest: only in vm_bind_* signatures of `fn`; see vm_bind_desc
 *
 * "()" and "(void)" are the same; spaces mean nothing. At most VM_CALL_ARGS arguments. No structs and no variable
 * arguments; a variadic guest function of fixed arguments can be called (sysv: AL is set). Text that is no signature is
 * VM_E_INVALID; the message has its place.
 */
#ifndef LIBVM_INCLUDE_CALL_H
#define LIBVM_INCLUDE_CALL_H

#include <libvm/types.h>
#include <libvm/exit.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VM_CALL_ARGS 32u                /* arguments of a signature, at most */
#define VM_CALL_DEPTH 32u               /* runs of one vCPU inside each other, at most */
#define VM_CALL_STRING 65536u           /* bytes of a guest string, at most, unless vm_bind_desc says otherwise */
#define VM_CALL_BUFFER 16777216u        /* bytes of a buffer likewise */

/* One argument or result; 8 bytes. The signature says which member counts. */
typedef union vm_value {
    uint64_t    u;                      /* u8 ... u64, ptr; higher bits than the type has: ignored going in, zero coming out */
    int64_t     i;                      /* i8 ... i64; coming out sign-extended */
    float       f32;
    double      f64;
    void       *data;                   /* str, buf, cbuf: bytes of the host */
    const void *cdata;
} vm_value;

/* ---- the host calls ---- */

typedef struct vm_call_options {
    uint32_t size;                      /* sizeof(vm_call_options): VM_CALL_OPTIONS_INIT */
    uint64_t max_instructions;          /* these three as in vm_run_options; 0: none */
    uint64_t deadline_ns;
    uint64_t exception_exits;
    uint64_t stack;                     /* stack pointer to call on; 0: the current one, below whatever the ABI keeps there */
    uint64_t return_address;            /* where the call ends; 0: VM_CALL_RETURN64 or VM_CALL_RETURN32. Nothing is ever
                                           executed there, it need not be mapped. A canonical address that the function
                                           itself does not execute */
    bool     preserve;                  /* put all general registers, RFLAGS, x87, SSE and AVX state back as they were */
} vm_call_options;
#define VM_CALL_OPTIONS_INIT VM_STRUCT_INIT(vm_call_options)
#define VM_CALL_RETURN64 UINT64_C(0x00007ffffffffff0)
#define VM_CALL_RETURN32 UINT64_C(0xfffffff0)

/* Runs the guest function at `address` (RIP, not linear) until it returns. Arguments go where the convention wants them,
 * strings and buffers are copied below the stack pointer first (buffers are copied back when the function has returned);
 * DF is cleared, RIP and RSP are set; then this is vm_vcpu_run() with `until` at the return address.
 * *exit says how it ended. VM_EXIT_UNTIL: the function returned, *result (may be NULL) is its value, RIP and RSP are back
 * where they were before the call, all other registers as the function left them (or see `preserve`). Any other reason:
 * it did not return; registers and memory are as at the exit, *result is zero, nothing is put back. To go on run the
 * vCPU with `until` at the return address, and take the result from its registers. Such an exit is completed by the next
 * vm_vcpu_run() as any other. With `exit` NULL a function that did not return is VM_E_FAULT.
 * `args` has `count` values, as many as the signature has types. Stack accesses made here go through the current page
 * tables with supervisor rights, to RAM only.
 * From a function bound by vm_bind_function() or vm_bind_hypercall() this works too, on the vCPU that is passed to it, as
 * vm_vcpu_run() does: the run inside is bound by the budget and the deadline of the outer ones besides its own, and
 * VM_CALL_DEPTH runs at most can be inside each other (VM_E_BUSY). From any other callback of a run: VM_E_BUSY.
 * VM_E_INVALID bad signature, count or options; VM_E_FAULT stack is not RAM (nothing has changed); VM_E_UNSUPPORTED see
 * above; VM_E_NOMEM; and what vm_vcpu_run() gives. */
VM_API int vm_call(vm_vcpu *cpu, uint64_t address, const char *signature, const vm_value *args, size_t count,
                   vm_value *result, const vm_call_options *options, vm_exit *exit);

/* A C function pointer of the host that runs a guest function: made by libffi, with the C types of the signature (u32 is
 * uint32_t, f64 double, ptr uint64_t, str const char *, buf void *, cbuf const void *). Calls follow vm_call(); one that
 * fails or does not return gives zero. `options` may be NULL; copied. To be called on the thread that drives the vCPU.
 * VM_E_HOST: no executable memory for it. */
typedef struct vm_closure vm_closure;
VM_API int vm_closure_new(vm_vcpu *cpu, uint64_t address, const char *signature, const vm_call_options *options,
                          vm_closure **out);
/* The pointer: cast it to the function's type. NULL for NULL. */
VM_API void (*vm_closure_function(const vm_closure *closure))(void);
/* How its last call ended: vm_call()'s status, and the exit (may be NULL). VM_OK and a zeroed record before any call. */
VM_API int vm_closure_status(const vm_closure *closure, vm_exit *exit);
/* Not while it is being called; at the latest before vm_destroy(). NULL is fine. */
VM_API void vm_closure_free(vm_closure *closure);

/* ---- the guest calls ---- */

/* A host function as a program behind a binding sees it if it does not want C types: arguments by number (cpu and user do
 * not count). Integers come extended to 64 bits, str and buf as pointers of the host or NULL. Returns 0, or anything else
 * to stop the run with VM_EXIT_HOOK before the guest goes on: the call has then not been made, RIP is still the bound
 * address (for hypercalls after the instruction, and RAX unchanged). */
typedef int (*vm_bind_fn)(void *user, vm_vcpu *cpu, const vm_value *args, size_t count, vm_value *result);

/* What to bind: one of `fn` and `values`.
 * fn gets C arguments by the signature through libffi, its own convention being the host's. `cpu` among the types passes
 * the vm_vcpu *, `user` the pointer below; neither takes an argument of the guest. */
typedef struct vm_bind_desc {
    uint32_t    size;                   /* sizeof(vm_bind_desc): VM_BIND_DESC_INIT */
    const char *signature;              /* copied */
    void      (*fn)(void);
    vm_bind_fn  values;
    void       *user;
    void      (*destroy)(void *user);   /* called once when the binding is gone; optional. Not when vm_bind_* fails */
    uint32_t    max_string, max_buffer; /* bytes; 0: VM_CALL_STRING, VM_CALL_BUFFER */
} vm_bind_desc;
#define VM_BIND_DESC_INIT VM_STRUCT_INIT(vm_bind_desc)

/* From now on, whenever a vCPU is about to execute linear address `address` (in flat code: RIP; any address space), the host
 * function is called instead, its arguments taken from where the convention puts them, its result put there, and the
 * return made (stdcall: with the arguments taken off). What is at the address is not executed and need not be mapped.
 * The call counts as one retired instruction. Elsewhere in the guest nothing is slower.
 *
 * Reading the arguments follows the rules of the guest's own accesses at its privilege level. What cannot be read (or,
 * for buf, written) raises the guest's #PF at the bound address, before the function is called: a guest that brings the
 * page in and returns makes the call again. Strings longer than max_string, buffers longer than max_buffer, and memory
 * that is not RAM raise #GP(0), and so does a copy that the host has no memory for. A string or buffer that is
 * contiguous in RAM is passed directly (buf too: writes show at once), else a copy, copied back after the call.
 *
 * The function runs on the vCPU's thread at an instruction boundary, no lock held: it may use the machine's functions,
 * change registers and memory, run the vCPU (see vm_call), bind and unbind. RIP is at `address` on entry, RSP points at the
 * return address. If RIP is another when the function returns, neither result nor return are made: the guest goes on
 * there. With vCPUs on several threads the function may run on each at the same time. Code of another width than the
 * convention's (any 16-bit code) gets #UD at the address.
 * VM_E_EXISTS: something is bound there; VM_E_INVALID bad signature or description; VM_E_UNSUPPORTED on KVM if the host
 * cannot stop there; VM_E_NOMEM. *out may be NULL. */
typedef struct vm_binding vm_binding;
VM_API int vm_bind_function(vm_machine *m, uint64_t address, const vm_bind_desc *desc, vm_binding **out);

/* The same for VMCALL and VMMCALL with `number` in EAX or RAX, at any privilege level; on PC machines too, where others
 * raise #UD. Arguments, in order: integers, ptr, str and buf in RBX, RCX, RDX, RSI, RDI, R8 (32-bit code: without R8, and
 * 64-bit numbers take a register only in 64-bit code: elsewhere VM_E_INVALID is not noticed, the upper half is zero);
 * f32 and f64 in XMM0-XMM7. The result goes to RAX or XMM0, execution goes on after the instruction. Conventions in the
 * signature are VM_E_INVALID. Hypercalls without a binding are exits (see exit.h). VM_E_UNSUPPORTED on KVM, where they
 * are the host kernel's own. */
VM_API int vm_bind_hypercall(vm_machine *m, uint64_t number, const vm_bind_desc *desc, vm_binding **out);

/* Ends a binding: no new call begins; `destroy` is called when the last call under way has returned. Legal from the bound
 * function. VM_E_NOTFOUND: no such binding. Bindings that are left end with the machine. */
VM_API int vm_unbind(vm_machine *m, vm_binding *binding);

/* Checks a signature: VM_OK, or VM_E_INVALID with the place in the message. *args (may be NULL) gets how many vm_values a
 * call takes. Any thread. */
VM_API int vm_signature_check(const char *signature, size_t *args);

#ifdef __cplusplus
}
#endif
#endif
