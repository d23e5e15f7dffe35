/* services.S - a handful of BIOS services for guests that are started without firmware: memory size and map (INT 12h,
 * 15h) and copying to and from all of it (INT 15h), teletype output to the first serial port and the debug console (INT 10h), keyboard input from that port (INT 16h),
 * "no disk" (INT 13h). Runs at offset 0 of segment 0xFF00; bios.c copies it, fills in the data at its end and points the
 * interrupt vectors at it, by the table of offsets in front. */
    .section .rodata.vm_boot_services, "a", @progbits
    .globl vm_boot_services_begin, vm_boot_services_end
    .hidden vm_boot_services_begin, vm_boot_services_end
    .type vm_boot_services_begin, @object
    .type vm_boot_services_end, @object
    .balign 16
    .code16
vm_boot_services_begin:
    .set base, vm_boot_services_begin
    .set gpa, 0xff000                   /* SERVICES_GPA */
    .word other - base, int10 - base, int11 - base, int12 - base, int13 - base, int15 - base, int16 - base, int1a - base
    .word data - base, 0, 0, 0, 0, 0, 0, 0

other:
    iret

/* A result in the carry flag of the interrupted code. */
succeed:
    push %bp
    mov %sp, %bp
    andw $~1, 6(%bp)
    pop %bp
    iret
refuse:
    push %bp
    mov %sp, %bp
    orw $1, 6(%bp)
    pop %bp
    iret

int10:
    cmp $0x0e, %ah
    je teletype
    cmp $0x0f, %ah
    je video_mode
    cmp $0x03, %ah
    je cursor
    iret
teletype:
    push %ax
    push %dx
    mov $0x3f8, %dx
    out %al, %dx
    mov $0xe9, %dx
    out %al, %dx
    pop %dx
    pop %ax
    iret
video_mode:
    mov $0x5003, %ax
    xor %bh, %bh
    iret
cursor:
    mov $0x0607, %cx
    xor %dx, %dx
    iret

int11:
    mov $0x0020, %ax
    iret

int12:
    mov $639, %ax
    iret

int13:
    mov $0x01, %ah
    jmp refuse

int15:
    cmp $0xe820, %ax
    je map_entry
    cmp $0xe801, %ax
    je two_sizes
    cmp $0x88, %ah
    je one_size
    cmp $0x87, %ah
    je block_move
    mov $0x86, %ah
    jmp refuse
one_size:
    mov %cs:(extended_k - base), %ax
    jmp succeed
two_sizes:
    mov %cs:(below_16m_k - base), %ax
    mov %cs:(above_16m_64k - base), %bx
    mov %ax, %cx
    mov %bx, %dx
    jmp succeed

/* Copies CX words from what descriptor 2 of the table at ES:SI describes to what descriptor 3 does. Only their bases count:
 * the copy is made through a flat segment in protected mode, whose CS stands for the same code. */
block_move:
    pushal
    push %ds
    push %es
    movzwl %cx, %ecx
    mov %es:0x12(%si), %eax
    shl $8, %eax
    mov %es:0x17(%si), %al
    ror $8, %eax                        /* base bits 31:24 lie apart from 23:0 */
    mov %es:0x1a(%si), %edi
    shl $8, %edi
    movzbl %es:0x1f(%si), %ebx
    or %ebx, %edi
    ror $8, %edi
    mov %eax, %esi
    sub $8, %sp
    mov %sp, %bp
    sgdtl (%bp)
    lgdtl %cs:(gdt_register - base)
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmp $0x08, $(1f - base)
1:  mov $0x10, %bx
    mov %bx, %ds
    mov %bx, %es
    cld
    addr32 rep movsw
    mov $0x18, %bx                      /* a segment as real mode has them */
    mov %bx, %ds
    mov %bx, %es
    and $~1, %al
    mov %eax, %cr0
    ljmp $(gpa >> 4), $(1f - base)
1:  lgdtl (%bp)
    add $8, %sp
    pop %es
    pop %ds
    popal
    xor %ah, %ah
    jmp succeed

map_entry:
    cmp $0x534d4150, %edx
    jne no_entry
    cmp $20, %ecx
    jb no_entry
    cmp %cs:(map_count - base), %ebx
    jae no_entry
    push %si
    push %di
    push %ds
    push %cs
    pop %ds
    imul $20, %bx, %si
    add $(map - base), %si
    mov $10, %cx
    cld
    rep movsw
    pop %ds
    pop %di
    pop %si
    inc %ebx
    cmp %cs:(map_count - base), %ebx
    jb 1f
    xor %ebx, %ebx
1:  mov %edx, %eax
    mov $20, %ecx
    jmp succeed
no_entry:
    mov $0x86, %ah
    jmp refuse

int16:
    cmp $0x00, %ah
    je read_key
    cmp $0x10, %ah
    je read_key
    xor %ax, %ax                    /* no key waits: ZF */
    push %bp
    mov %sp, %bp
    orw $0x40, 6(%bp)
    pop %bp
    iret
read_key:
    push %dx
    mov $0x3fd, %dx
1:  in %dx, %al
    test $1, %al
    jz 1b
    mov $0x3f8, %dx
    in %dx, %al
    xor %ah, %ah
    pop %dx
    iret

int1a:
    xor %cx, %cx
    xor %dx, %dx
    xor %al, %al
    jmp succeed

    .balign 8
gdt:
    .quad 0, 0x00009b000000ffff | gpa << 16, 0x00cf93000000ffff, 0x000093000000ffff
gdt_register:
    .word gdt_register - gdt - 1
    .long gpa + gdt - base

    .balign 4
data:
extended_k:     .word 0
below_16m_k:    .word 0
above_16m_64k:  .word 0
                .word 0
map_count:      .long 0
map:
vm_boot_services_end:
    .code64
    .section .note.GNU-stack, "", @progbits
