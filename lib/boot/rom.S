/* rom.S - an option ROM that starts the Linux kernel of the configuration device (fw_cfg) under a BIOS: that knows nothing of
 * such kernels, but runs what it finds below genroms/ there and offers its boot entry among the disks (BIOS Boot
 * Specification 1.01, 3.3). By DMA it puts the four pieces where the device says, fills in what the Linux boot protocol
 * wants from a boot loader, and jumps to the set-up code. linux.c fills in the checksums.
 */
    .section .rodata.vm_boot_rom, "a", @progbits
    .globl vm_boot_rom_begin, vm_boot_rom_end
    .hidden vm_boot_rom_begin, vm_boot_rom_end
    .type vm_boot_rom_begin, @object
    .type vm_boot_rom_end, @object
    .set heap_end, 0xe000               /* ROM_HEAP_END: the command line lies there */
    .balign 16
    .code16
vm_boot_rom_begin:
    .set rom, vm_boot_rom_begin
    .byte 0x55, 0xaa, 1                 /* of 512 bytes */
    lret                                /* nothing to set up */
    .org rom + 0x1a
    .word pnp - rom
    .balign 32
pnp:
    .ascii "$PnP"
    .byte 1, 2                          /* revision, length in paragraphs */
    .word 0
    .byte 0, 0                          /* the second: checksum */
    .long 0
    .word 0, name - rom
    .byte 2, 0, 0, 0x14                 /* a network adapter by its class: what boots without a disk */
    .word 0, 0, start - rom, 0, 0
name:
    .asciz "Linux"

/* Address, size and data of a piece. */
pieces:
    .word 0x16, 0x17, 0x18              /* set-up code */
    .word 0x07, 0x08, 0x11              /* kernel */
    .word 0x13, 0x14, 0x15              /* command line */
    .word 0x0a, 0x0b, 0x12              /* initrd */
    .word 0

/* EAX = the 32-bit item AX. Changes DX. */
item:
    mov $0x510, %dx
    out %ax, %dx
    inc %dx
    push %cx
    mov $4, %cx
1:  in %dx, %al
    ror $8, %eax
    loop 1b
    pop %cx
    ret

start:
    cli
    cld
    push %cs
    pop %ds
    mov $(pieces - rom), %si
next_piece:
    lodsw
    test %ax, %ax
    jz boot
    call item
    mov %eax, %ebx
    lodsw
    call item
    mov %eax, %ecx
    lodsw
    jecxz next_piece
    /* {control, length, address}, big-endian, on the stack; control 0xA: select and read */
    bswap %ebx
    push %ebx
    pushl $0
    bswap %ecx
    push %ecx
    shl $16, %eax
    mov $0xa, %ax
    bswap %eax
    push %eax
    mov %sp, %bp
    xor %eax, %eax
    mov $0x514, %dx
    out %eax, %dx
    mov %ss, %ax
    shl $4, %eax
    movzwl %bp, %ecx
    add %ecx, %eax
    bswap %eax
    mov $0x518, %dx
    out %eax, %dx
1:  mov (%bp), %eax
    bswap %eax
    test $1, %al
    jnz failed
    test %eax, %eax
    jnz 1b
    add $16, %sp
    jmp next_piece

boot:
    mov $0x16, %ax
    call item
    mov %eax, %ebx
    shr $4, %eax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %fs
    mov %ax, %gs
    mov %ax, %ss
    mov $heap_end, %esp
    add $0x20, %ax
    push %ax
    push $0
    movw $0xffff, 0x1fa                 /* video mode */
    movb $0xff, 0x210                   /* a boot loader without a number */
    orb $0x80, 0x211                    /* heap_end_ptr is valid */
    movw $heap_end - 0x200, 0x224
    add $heap_end, %ebx
    mov %ebx, 0x228                     /* command line */
    mov $0x0a, %ax
    call item
    mov %eax, 0x218                     /* initrd */
    mov $0x0b, %ax
    call item
    mov %eax, 0x21c
    lret

failed:
    add $16, %sp
    lret
vm_boot_rom_end:
    .code64
    .section .note.GNU-stack, "", @progbits
