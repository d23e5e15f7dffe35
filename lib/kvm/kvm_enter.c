/* kvm_enter.c - the system call KVM_RUN.
 *
 * A processor predicts where RET goes from a small stack of its own. When KVM_RUN is over that stack holds nothing but
 * the kernel's addresses, which the kernel puts there so that no guest can aim its speculation. The first RET of ours
 * that meets one is predicted into memory that this process may not read: on hosts that are virtual machines
 * themselves, where such an address is walked through two levels of tables, that alone costs a tenth of an exit. So
 * the stack is filled with addresses of our own before anything returns, one for each frame between here and the
 * caller of vm_vcpu_run() and some of his. They are wrong too, but harmlessly: an INT3 stands there.
 */
#include "kvm/kvm.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#if defined(__x86_64__) && defined(__LP64__)

#define PUSH  "call 1f\n int3\n 1:\n"
#define PUSH4 PUSH PUSH PUSH PUSH
_Static_assert(sizeof(void *) == 8, "sixteen return addresses are 128 bytes");

/* Not where the process has a shadow stack (RDSSPQ leaves RCX alone without): it would not take calls that never
 * return. */
static inline void fill_return_stack(void)
{
    __asm__ volatile("xor %%ecx, %%ecx\n .byte 0xf3, 0x48, 0x0f, 0x1e, 0xc9\n" /* rdsspq %rcx */
                     "test %%rcx, %%rcx\n jnz 2f\n"
                     "sub $128, %%rsp\n" /* what the compiler keeps below RSP */
                     PUSH4 PUSH4 PUSH4 PUSH4 "add $256, %%rsp\n 2:\n" ::
                         : "rcx", "cc", "memory");
}

__attribute__((weak)) int kvm_enter(int fd)
{ /* weak: tests let it fail */
    long rc;
    __asm__ volatile("syscall"
                     : "=a"(rc)
                     : "0"((long)SYS_ioctl), "D"((long)fd), "S"((long)KVM_RUN), "d"(0L)
                     : "rcx", "r11", "memory");
    fill_return_stack();
    return (int)rc;
}

#else

__attribute__((weak)) int kvm_enter(int fd) { return ioctl(fd, KVM_RUN, 0) < 0 ? -errno : 0; }

#endif
