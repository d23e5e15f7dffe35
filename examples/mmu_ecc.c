/* mmu_ecc.c - an MMU strategy that makes memory weak: accesses to some physical pages are seen one by one (their translations
 * allow nothing "without asking again"), and now and then a bit flips before one. Run three times: with good memory, with weak
 * memory and error correction, with weak memory alone.
 */
#include "paged.h"

#include <stdio.h>

enum mode { GOOD, CORRECTED, WEAK };
static const char *const texts[] = { "good memory", "weak memory, corrected", "weak memory" };
static struct { enum mode mode; uint64_t seen, flipped, random; } ecc;

static bool is_weak(uint64_t gpa)
{
    return ecc.mode != GOOD && gpa >= PAGED_DATA && gpa < PAGED_DATA + PAGED_WORDS * 8 && (gpa >> 12) % 16 == 5;
}

static void flip(vm_machine *m, uint64_t gpa)
{
    uint8_t byte = 0;
    vm_read(m, gpa, &byte, 1);
    byte ^= (uint8_t)(1u << (ecc.random >> 40 & 7));
    vm_write(m, gpa, &byte, 1);
}

static int translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    int status = vm_mmu_walk(cpu, gva, access, out);
    if (status != VM_OK || !is_weak(out->gpa))
        return status;
    out->prot = VM_PROT_NONE;          /* this access, and then ask again */
    ecc.seen++;
    ecc.random = ecc.random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    if ((ecc.random >> 33) % 500 == 0) {
        ecc.flipped++;
        flip(vm_vcpu_machine(cpu), out->gpa);
        if (ecc.mode == CORRECTED)     /* the controller sees a wrong syndrome and flips the bit back */
            flip(vm_vcpu_machine(cpu), out->gpa);
    }
    return VM_OK;
}

static const vm_mmu_ops ops = { .size = sizeof ops, .name = "ecc", .translate = translate };

int main(void)
{
    int failures = 0;
    if (vm_mmu_register(&ops) < 0)
        return 1;
    for (int mode = GOOD; mode <= WEAK; mode++) {
        ecc.mode = (enum mode)mode;
        ecc.seen = ecc.flipped = 0;
        ecc.random = 1;
        vm_machine *m = paged_machine(VM_BACKEND_INTERP, "ecc");
        if (!m)
            return 1;
        bool is_right = paged_run(m, 0, NULL, NULL) == paged_expected();
        printf("%-24s %7llu weak accesses, %3llu bits flipped: result %s\n", texts[mode], (unsigned long long)ecc.seen,
               (unsigned long long)ecc.flipped, is_right ? "right" : "wrong");
        failures += is_right != (mode != WEAK) || (mode != GOOD && !ecc.flipped);
        vm_destroy(m);
    }
    return failures != 0;
}
