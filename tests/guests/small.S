/* small.S - entry points and headers of the hand-written guests; see small.c. One of MULTIBOOT, KLUDGE, PVH, PLAIN32, PLAIN64. */
#if defined(MULTIBOOT) || defined(KLUDGE)
    .section .header, "ax"
    .balign 4
header:
#ifdef KLUDGE
#define FLAGS 0x00010003
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
    .long header, load_begin, load_end, bss_end, start
#else
#define FLAGS 0x00000003
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
#endif
#endif
#ifdef PVH
    .section .note.Xen, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long start
#endif
    .text
    .globl start
start:
#ifdef PLAIN64
    .code64
    lea stack_end(%rip), %rsp
    mov %rsi, %rdi
    xor %esi, %esi
    call guest_main
#else
    .code32
    mov $stack_end, %esp
    push %esi
    push %ebx
    push %eax
    call guest_main
#endif
1:  hlt
    jmp 1b
    .bss
    .balign 16
    .skip 16384
stack_end:
    .section .note.GNU-stack, "", @progbits
