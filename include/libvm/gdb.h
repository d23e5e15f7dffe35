/* gdb.h - a debugger from outside: a stub for GDB's remote serial protocol.
 *
 *     vm_gdb *g;
 *     vm_gdbstub(m, "127.0.0.1:1234", NULL, &g);     // listen
 *     vm_gdb_serve(g, &exit);                        // drive the machine until it ends; (gdb) target remote :1234
 *     vm_gdb_free(g);
 *
 * The stub takes the place of the program's own run loop: vm_gdb_serve() runs every vCPU of the machine, on threads of
 * its own, and talks with one debugger at a time. vCPUs are the debugger's threads, numbered from 1; all of them stop
 * together. Addresses are linear ones, translated as the vCPU in question would (RIP is shown with CS.base added where
 * that is not zero). What the debugger does (breakpoints, stepping, watching) is invisible to the guest and works on
 * every backend; what a backend cannot do by itself is done by the interpreter, and what cannot be done at all is
 * refused to the debugger.
 *
 * Security: whoever can connect owns the guest. Addresses other than the loopback's are refused; a Unix socket is made
 * with mode 0600. What comes in is bounded and checked field by field; a malformed packet is answered with an error.
 */
#ifndef LIBVM_INCLUDE_GDB_H
#define LIBVM_INCLUDE_GDB_H

#include <libvm/types.h>
#include <libvm/exit.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vm_gdb vm_gdb;

/* What to do with an exit that a debugger has no part in. */
typedef enum vm_gdb_action {
    VM_GDB_DEFAULT,                     /* see vm_gdb_options.on_exit */
    VM_GDB_RUN,                         /* go on; *exit carries the completion, as for vm_vcpu_run() */
    VM_GDB_STOP,                        /* stop the machine and tell the debugger, now or when one comes */
    VM_GDB_END                          /* vm_gdb_serve() returns with this exit */
} vm_gdb_action;

typedef struct vm_gdb_options {
    uint32_t size;                      /* sizeof(vm_gdb_options): VM_GDB_OPTIONS_INIT */
    bool     runs_alone;                /* run while no debugger is there; else the machine waits for the first one */
    /* Snapshots for reverse execution, at least this many instructions apart (0: none, reverse execution is refused).
     * Machines whose runs repeat exactly only: with one vCPU, on the interpreter or the JIT, and BARE, or a PC that replays
     * a recording (vm_replay() first). Such a PC refuses to have registers or memory written by the debugger. */
    uint64_t reverse_interval;
    /* Called for every exit that is neither the debugger's nor the stub's own (BUDGET, KICK, BREAKPOINT, STEP), on the
     * thread that ran `cpu`, one call at a time; may read and write that vCPU and memory. NULL, or VM_GDB_DEFAULT:
     * HALT, POWEROFF, GUEST_EXIT and INTERNAL end the session, RESET resets the machine and goes on, anything else
     * stops with a signal (UNMAPPED and SHUTDOWN: SIGSEGV; EXCEPTION: what an operating system would make of it;
     * others: SIGTRAP). */
    vm_gdb_action (*on_exit)(void *user, vm_vcpu *cpu, vm_exit *exit);
    void    *user;                      /* of both callbacks */
    /* Called with all vCPUs at rest where the machine is to be reset (RESET exits, "monitor reset"), in place of
     * vm_reset(): for machines whose image has to be loaded again. VM_OK or a status, which ends the session. */
    int    (*on_reset)(void *user, vm_machine *m);
} vm_gdb_options;
#define VM_GDB_OPTIONS_INIT VM_STRUCT_INIT(vm_gdb_options)

/* Listens on `address`: "127.0.0.1:1234", "localhost:1234", ":1234" (the same), "[::1]:1234", port 0 for a free one;
 * anything with a '/' is the path of a Unix socket, which must not exist. `options` NULL: all defaults. A machine has at
 * most one stub. It must be freed before the machine is destroyed.
 * VM_E_INVALID bad address (the message says what) or options; VM_E_BUSY the machine has a stub; VM_E_UNSUPPORTED
 * reverse execution on a machine that does not repeat; VM_E_HOST the address cannot be used; VM_E_NOMEM. */
VM_API int vm_gdbstub(vm_machine *m, const char *address, const vm_gdb_options *options, vm_gdb **out);

/* Where it listens, with the port that was chosen: "127.0.0.1:40213", or the path. Valid until vm_gdb_free(). Any
 * thread. */
VM_API const char *vm_gdb_address(const vm_gdb *g);

/* Runs the machine under the debugger's control in the calling thread and one thread a vCPU, until the guest ends (see
 * on_exit), the debugger kills it (exit KICK), or vm_gdb_stop() is called (exit KICK). A debugger that detaches or goes
 * away leaves the guest running without breakpoints; another may come. Threads are made with all signals blocked, and
 * no signal's disposition is touched. May be called again afterwards. `exit` may be NULL.
 * VM_E_BUSY: somebody runs a vCPU of the machine, or serves already; VM_E_NOMEM, VM_E_HOST: threads or sockets. */
VM_API int vm_gdb_serve(vm_gdb *g, vm_exit *exit);

/* Makes the current vm_gdb_serve(), or the next one, return soon. Any thread, async-signal-safe; NULL is fine. */
VM_API void vm_gdb_stop(vm_gdb *g);

/* Closes the sockets (a debugger sees the connection end), removes breakpoints and the Unix socket's name. NULL is fine.
 * Not while somebody serves: stop that first. */
VM_API void vm_gdb_free(vm_gdb *g);

#ifdef __cplusplus
}
#endif
#endif
