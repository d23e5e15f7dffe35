/* machine.h - making, asking about and ending machines. */
#ifndef LIBVM_INCLUDE_MACHINE_H
#define LIBVM_INCLUDE_MACHINE_H

#include <libvm/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How guest code is executed. Results are the same on each; speed and what can be observed differ. */
typedef enum vm_backend {
    VM_BACKEND_AUTO,                    /* the fastest that is usable here */
    VM_BACKEND_KVM,                     /* the host's hardware virtualisation */
    VM_BACKEND_JIT,                     /* translation to host code */
    VM_BACKEND_INTERP                   /* the reference interpreter, always there */
} vm_backend;

typedef enum vm_platform {
    VM_PLATFORM_BARE,                   /* vCPUs and a memory map, nothing else (fuzzers, snippets) */
    VM_PLATFORM_PC                      /* with PIC, PIT, APICs, RTC, UARTs, PCI, ACPI: boots an OS */
} vm_platform;

typedef struct vm_options {
    uint32_t    size;                   /* sizeof(vm_options): VM_OPTIONS_INIT */
    vm_backend  backend;
    vm_platform platform;
    uint32_t    vcpus;                  /* 0 means 1; at most VM_MAX_VCPUS */
    const char *mmu;                    /* MMU strategy name, NULL = the backend's default; see mmu.h */
    /* PC only, required there: main memory, mapped for you; whole 4 KiB pages, at least 1 MiB. BARE: must be 0, map
     * what you need */
    uint64_t    ram_bytes;
    uint64_t    code_cache_bytes;       /* JIT: ceiling for translated code, 0 = default */
    /* What CPUID shows. NULL or "max": all that this backend can do; "kvm": what every backend can do here, for
     * vm_backend_select(); "base": the first x86-64 processors; "pentium3", "pentium", "486": 32-bit ones */
    const char *cpu_model;
    /* PC only: what main memory is made of. NULL: zeros in memory of the machine's own. Else the path of a file at least
     * ram_bytes long whose bytes main memory has: the byte at offset x is that at guest-physical x, or, from the end of low
     * memory on (at most 3 GiB), at x less that end plus 4 GiB. A file in hugetlbfs gives huge pages; "/proc/self/fd/N" is a
     * descriptor of the caller's, a memfd for example, and may be closed after the call. vm_share_pages() leaves such memory
     * alone; copies made by vm_fork() have memory of their own. */
    const char *ram_file;
    bool        ram_private;            /* of ram_file: the guest's writes stay in memory; else they go to the file */
    unsigned    ram_advice;             /* vm_advice bits for main memory, as vm_advise() takes them. 0: as the host likes, large
                                           memory in transparent huge pages */
} vm_options;                           /* strings are copied; the caller keeps his */
#define VM_OPTIONS_INIT VM_STRUCT_INIT(vm_options)
#define VM_MAX_VCPUS 64u

/* Makes a machine with its vCPUs in VM_MODE_RESET and an empty memory map (BARE) or a whole PC. `options` may be NULL
 * for all defaults. *out is set on success only (else to NULL).
 * Tracing: environment variable LIBVM_TRACE (a comma-separated list: decode, ir, mcode, exit, mmio, irq, mmu, or all)
 * is read here and sends lines to standard error unless vm_trace_set() redirects them. It is the one case where the
 * library writes anything by itself, and only when the environment asks.
 * VM_E_INVALID bad option; VM_E_UNSUPPORTED backend, MMU strategy or CPU model not available (the message says why);
 * VM_E_NOMEM; VM_E_HOST, also when ram_file cannot be opened or mapped, or the host refuses ram_advice. Any thread. */
VM_API int vm_create(const vm_options *options, vm_machine **out);

/* Ends a machine: stops its vCPUs (threads inside vm_vcpu_run get VM_EXIT_KICK first; the call waits for them to
 * leave), calls the `destroy` of every region's ops, frees all it owns. NULL is fine. The caller makes sure that no
 * thread starts another call on this machine. Not from a callback of the same machine: there it is refused and does
 * nothing. */
VM_API void vm_destroy(vm_machine *m);

/* Resets the whole machine: devices (ops->reset of every region), then every vCPU to its power-on state; RAM and the
 * map stay. VM_E_BUSY while a vCPU runs, except from a callback on that vCPU's thread when no other runs. */
VM_API int vm_reset(vm_machine *m);

/* What a backend can do, before creating anything. Capabilities (value is 0 or 1 unless said otherwise):
 *   "available"        the backend can be used in this process now (0: vm_errmsg() says why)
 *   "max-vcpus"        number of vCPUs a machine may have
 *   "exact-budget"     vm_run_options.max_instructions stops on the very instruction
 *   "retired"          vm_vcpu_retired() counts
 *   "exec-only"        VM_PROT_X without VM_PROT_R is enforced
 *   "phys-bits"        width of guest-physical addresses
 * and of KVM besides: "hardware-ring0" (0: this host emulates guest ring 0 in software, about a million instructions
 * a second; "auto" then chooses another backend), "max-slots" (ranges of memory mapped at full speed; more work,
 * slower), "dirty-ring", "nested-paging" (1: the hardware walks a second level of tables, 0: KVM keeps shadow page
 * tables).
 * On KVM exact budgets, exception exits, breakpoints, watchpoints and single steps are the interpreter's work; of
 * hypercalls the host's own instruction (VMCALL on Intel's CPUs, VMMCALL on AMD's) is answered by KVM and the other is
 * #UD: "hypercall" is 0.
 * VM_E_NOTFOUND unknown capability; VM_E_INVALID NULL or unknown backend. Any thread. */
VM_API int vm_query(vm_backend backend, const char *capability, uint64_t *value);

/* The backend a machine runs on (never VM_BACKEND_AUTO), and its name. */
VM_API vm_backend vm_machine_backend(const vm_machine *m);
VM_API const char *vm_backend_name(vm_backend backend);

/* Moves a machine to another backend between runs; registers, memory, devices, pending exits and interrupts go along,
 * and the guest cannot tell. Full speed on KVM up to the point of interest, then the interpreter, and back. To go to
 * KVM the guest's CPU must be one that this host's KVM can do: machines created on KVM, or with cpu_model "kvm"
 * (VM_E_UNSUPPORTED otherwise, the message names what is too much). VM_BACKEND_AUTO chooses as vm_create does. If the
 * new backend cannot be set up the machine stays where it was. VM_E_BUSY a vCPU is running. */
VM_API int vm_backend_select(vm_machine *m, vm_backend backend);

/* Number of vCPUs; 0 for NULL. */
VM_API unsigned vm_vcpu_count(const vm_machine *m);

/* A counter by name (stat.def lists them; MMU strategies and backends may add their own). Values are totals since
 * creation and may lag a running vCPU by a moment. VM_E_NOTFOUND unknown name. Any thread. */
VM_API int vm_stats(vm_machine *m, const char *name, uint64_t *value);
/* The i-th counter's name and a line about it, NULL past the last; `text` may be NULL. Static strings. */
VM_API const char *vm_stat_name(unsigned i, const char **text);

/* Guest time of a machine in nanoseconds since creation. BARE machines: retired instructions of vCPU 0, one nanosecond
 * each, so that a run is repeatable. PC machines: the host's monotonic clock. */
VM_API uint64_t vm_time(vm_machine *m);

/* ---- tracing ---- */
typedef enum vm_trace_category {
    VM_TRACE_DECODE = 1,                /* instructions as they are first decoded */
    VM_TRACE_IR = 2,                    /* JIT: intermediate code */
    VM_TRACE_MCODE = 4,                 /* JIT: emitted code */
    VM_TRACE_EXIT = 8,                  /* exit records */
    VM_TRACE_MMIO = 16,                 /* device accesses, port and memory */
    VM_TRACE_IRQ = 32,                  /* interrupts delivered */
    VM_TRACE_MMU = 64,                  /* translations */
    VM_TRACE_ALL = 127
} vm_trace_category;
/* One line, without newline; valid during the call. May be called from any thread that runs a vCPU or touches the
 * machine, one call at a time; must not call back into libvm. */
typedef void (*vm_trace_fn)(void *user, vm_trace_category category, const char *line);
/* Trace the categories in `mask` (0: none) to `fn`; fn NULL: to standard error. Replaces what LIBVM_TRACE asked for.
 * Takes effect at once in the calling thread and soon in others. VM_E_INVALID unknown bits. Any thread. */
VM_API int vm_trace_set(vm_machine *m, unsigned mask, vm_trace_fn fn, void *user);
/* The mask for a list as LIBVM_TRACE takes it. VM_E_INVALID for an unknown word, *mask then untouched. */
VM_API int vm_trace_parse(const char *list, unsigned *mask);

#ifdef __cplusplus
}
#endif
#endif
