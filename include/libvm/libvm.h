/* libvm.h - everything libvm offers, in one include.
 *
 * libvm puts x86 virtual machines into a program: make a machine, give it memory, set a vCPU's registers, run it, and
 * look at why it came back. The headers below stand alone; include this one or those you need.
 *
 * Conventions that hold everywhere
 *   - Handles are opaque. Every public struct starts with `uint32_t size`, set by its _INIT macro to the size the
 *     caller was compiled with. A smaller (older) struct is taken as far as it goes, the rest being zero; a larger (newer)
 *     one is accepted if what this library does not know is zero, else VM_E_INVALID, as is a size without room for any
 *     member. On output only what fits is written and anything beyond what the library knows is left alone.
 *   - A function returns VM_OK (0) or a negative vm_status; vm_errmsg() has the detail. What a guest does is never an
 *     error of the call: it is an exit record (see exit.h).
 *   - The library never prints, aborts or exits, and installs no signal handlers.
 *   - Threads: one thread at a time drives a vCPU and reads or writes its registers. vm_vcpu_kick() may be called from
 *     any thread and from signal handlers; vm_irq_set(), vm_irq_msi(), vm_stats() and memory-map edits from any thread;
 *     edits take effect at the next instruction boundary of every vCPU and the call returns when they have.
 *   - fork(): a child has a copy of each machine, and may run, change and destroy it as its own, while the parent goes on with
 *     the original. Only memory of shared files stays common. The vCPUs must have been at rest. Not in the child: machines on
 *     KVM, which can only be destroyed there (else VM_E_UNSUPPORTED), vm_irqfd() connections, GDB stubs, recordings.
 *   - gpa is a guest-physical address, gva a guest-virtual (linear) one; sizes are in bytes, times in nanoseconds.
 *   - Objects belong to their machine: regions and vCPUs are freed by vm_destroy() at the latest, and must not be used
 *     after it.
 */
#ifndef LIBVM_INCLUDE_LIBVM_H
#define LIBVM_INCLUDE_LIBVM_H

#include <libvm/types.h>
#include <libvm/error.h>
#include <libvm/machine.h>
#include <libvm/memory.h>
#include <libvm/device.h>
#include <libvm/exit.h>
#include <libvm/vcpu.h>
#include <libvm/hook.h>
#include <libvm/coverage.h>
#include <libvm/mmu.h>
#include <libvm/boot.h>
#include <libvm/gdb.h>
#include <libvm/snapshot.h>
#include <libvm/call.h>
#include <libvm/replay.h>
#include <libvm/sandbox.h>

#endif
