/* fast.c - in libFuzzer's programs only. AddressSanitizer asks at every longjmp(), which every fault of a guest is, where the thread's
 * alternate signal stack lies, and clears what it keeps of it: a third of an execution. Nobody here jumps off such a stack: it is
 * told that there is none.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

int sigaltstack(const stack_t *set, stack_t *old)
{
    if (set)
        return (int)syscall(SYS_sigaltstack, set, old);
    *old = (stack_t){ .ss_flags = SS_DISABLE };
    return 0;
}
