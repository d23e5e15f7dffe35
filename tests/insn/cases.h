/* cases.h - the macros that instruction cases are written in (GNU as, Intel syntax, run through cpp).
 *
 *     CASE name, environments        which of ENV_* to run in, masked by the code size in use
 *     BEFORE RAX, value [, high]         a register before (any of reg.def); general registers not named have a known pattern
 *     MEMIN address, bytes, value    memory before (at most 8 bytes)
 *     CODE                           the snippet, loaded at W_CODE; label 0b is its start
 *         ...
 *     END                            execution stops when RIP gets here
 *     AFTER RAX, value [, mask]        a register after; general registers not named must be unchanged, as must RFLAGS
 *     AFTERX XMM0, low, high           a 128-bit register after
 *     FLAGS value [, undef [, mask]] RFLAGS after; mask (default: the arithmetic flags) says which change, undef which do not matter
 *     FLAGS_ANY                      the arithmetic flags do not matter
 *     MEM address, bytes, value      memory after
 *     FAULT offset, vector, error    the instruction at this offset raises vector (error -1: none); checked as an exit record and
 *     TRAP offset, vector            delivered through the IDT. TRAP: saved RIP is `offset`, which is after the instruction
 *     FAULTX offset, vector, error   like FAULT but checked as an exit record only (its delivery could not succeed)
 *     SOFT from, vector, to          INT n and its like at `from`: an exit record points to it, the saved RIP is `to`, behind it
 *     CR2IS address                  #PF address
 *     DR6IS value                    DR6 after delivery
 *     STOP reason, offset            ends in another exit with RIP at offset
 *
 * Expected values come from the SDM's instruction pages. What this makes is a stream of records (op and three quad-words) that
 * insn.c reads.
 */
#include "world.h"

#define OP_CASE 1
#define OP_START 2
#define OP_END 3
#define OP_IN 4
#define OP_OUT 5
#define OP_OUTX 6
#define OP_FLAGS 7
#define OP_MEMIN 8
#define OP_MEM 9
#define OP_FAULT 10
#define OP_TRAP 11
#define OP_CR2 12
#define OP_DR6 13
#define OP_STOP 14
#define OP_FAULTX 15
#define OP_SOFT 16

#ifdef __ASSEMBLER__
.intel_syntax noprefix
.set reg_number, 1
#define VM_REG(name, text, bytes, class, index) .set REG_##name, reg_number; .set reg_number, reg_number + 1;
#include <libvm/reg.def>
#undef VM_REG

.macro RECORD op, a=0, b=0, c=0
    .quad \op, \a, \b, \c
.endm
.macro TABLE
    .section .data.rel.ro.cases,"aw"
.endm
.macro BITS size
    .set bits, \size
    .code\size
.endm
.macro CASE name, envs=ENV_ALL
    TABLE
    RECORD OP_CASE, .Lname\@, bits, \envs
    .section .rodata.names,"a"
.Lname\@:
    .asciz "\name"
    TABLE
.endm
.macro CODE
    RECORD OP_START, .Lstart\@
    .section .rodata.snippets,"a"
    .balign 16, 0xcc
.Lstart\@:
0:
.endm
.macro END
.Lend\@:
    TABLE
    RECORD OP_END, .Lend\@
.endm
.macro BEFORE reg, lo, hi=0
    RECORD OP_IN, REG_\reg, \lo, \hi
.endm
.macro AFTER reg, value, mask=-1
    RECORD OP_OUT, REG_\reg, \value, \mask
.endm
.macro AFTERX reg, lo, hi=0
    RECORD OP_OUTX, REG_\reg, \lo, \hi
.endm
.macro FLAGS value, undefined=0, mask=0x8d5
    RECORD OP_FLAGS, \value, \mask, \undefined
.endm
.macro FLAGS_ANY
    RECORD OP_FLAGS, 0, 0, 0x8d5
.endm
.macro MEMIN address, bytes, value
    RECORD OP_MEMIN, \address, \bytes, \value
.endm
.macro MEM address, bytes, value
    RECORD OP_MEM, \address, \bytes, \value
.endm
.macro FAULT offset, vector, error=-1
    RECORD OP_FAULT, \offset, \vector, \error
.endm
.macro FAULTX offset, vector, error=-1
    RECORD OP_FAULTX, \offset, \vector, \error
.endm
.macro SOFT from, vector, to
    RECORD OP_SOFT, \to, \vector, \from
.endm
.macro TRAP offset, vector
    RECORD OP_TRAP, \offset, \vector, -1
.endm
.macro CR2IS address
    RECORD OP_CR2, \address
.endm
.macro DR6IS value
    RECORD OP_DR6, \value
.endm
.macro STOP reason, offset
    RECORD OP_STOP, \reason, \offset
.endm
.set CF, 1
.set PF, 4
.set AF, 0x10
.set ZF, 0x40
.set SF, 0x80
.set TF, 0x100
.set DF, 0x400
.set OF, 0x800
.set FLAGS_ALL, 0x8d5
#endif
