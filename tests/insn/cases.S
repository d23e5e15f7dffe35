/* cases.S - all instruction cases, in one table. */
#include "cases.h"
    TABLE
    .globl cases_begin
    .hidden cases_begin
cases_begin:
    BITS 16
#include "every.inc"
#include "bits16.inc"
    BITS 32
#include "every.inc"
#include "legacy.inc"
#include "bits32.inc"
    BITS 64
#include "every.inc"
#include "bits64.inc"
    BITS 16
#include "legacy.inc"
    TABLE
    .globl cases_end
    .hidden cases_end
cases_end:
    .section .note.GNU-stack,"",@progbits
