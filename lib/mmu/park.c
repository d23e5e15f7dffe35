/* park.c - what the inline TLB, and the backend's caches of linear addresses, held of the address spaces that a vCPU is not
 * in. It is set aside at MOV CR3 and entered again when the guest comes back, so that it need not miss again.
 *
 * Two kinds of address space may keep translations over a MOV CR3:
 *   a PCID, while CR4.PCIDE, until the guest loads CR3 without bit 63 or invalidates it (SDM vol. 3, 4.10.4.1);
 *   a root of strategy "shadow", as long as everything recorded for it has stayed what it was: its `version` tells. All
 *   that the TLB holds for it has been recorded (or the space has no key).
 * Global translations are never set aside: they stay where they are. x86_tlb_clear() ends everything that is parked.
 */
#include "mmu/mmu.h"

#include <stdlib.h>

#ifdef VM_TINY_CACHE
enum { PARKS = 2, BELIEVED = 4 };
#else
enum { PARKS = VM_PARKS, BELIEVED = 64 };
#endif

typedef struct park {
    vm_space space;                    /* key 0: free */
    uint64_t stamp;
    unsigned entered;                  /* now and then nothing is taken back, so that it shrinks to what is used */
    x86_park tlb;
} park;

struct vm_parks {
    uint64_t stamp;
    park slots[PARKS];
};

static park *find(const vm_vcpu *cpu, uint64_t key)
{
    for (unsigned i = 0; cpu->parks && i < PARKS; i++)
        if (cpu->parks->slots[i].space.key == key)
            return &cpu->parks->slots[i];
    return NULL;
}

/* Where the space is parked, or else the slot that was not used for longest; NULL: no memory. */
static park *find_room(vm_vcpu *cpu, uint64_t key)
{
    if (!cpu->parks && !(cpu->parks = calloc(1, sizeof *cpu->parks)))
        return NULL;
    park *p = find(cpu, key), *slots = cpu->parks->slots;
    for (unsigned i = 0; !p && i < PARKS; i++)
        if (!slots[i].space.key)
            p = &slots[i];
    for (unsigned i = 0; !p && i < PARKS; i++) {
        bool is_oldest = true;
        for (unsigned k = 0; k < PARKS; k++)
            is_oldest &= slots[i].stamp <= slots[k].stamp;
        p = is_oldest ? &slots[i] : NULL;
    }
    return p;
}

void vm_mmu_park(vm_vcpu *cpu, vm_space space)
{
    park *p = space.key ? find_room(cpu, space.key) : NULL;
    const vm_backend_ops *backend = cpu->machine->backend;
    if (!p) {
        x86_tlb_clear_nonglobal(&cpu->x86);
        return;
    }
    p->entered = p->space.key == space.key ? p->entered : 0;
    p->space = space;
    p->stamp = ++cpu->parks->stamp;
    x86_tlb_park(&cpu->x86, &p->tlb);
    if (backend->park)
        backend->park(cpu, (unsigned)(p - cpu->parks->slots));
}

void vm_mmu_unpark(vm_vcpu *cpu, vm_space space)
{
    park *p = space.key ? find(cpu, space.key) : NULL;
    const vm_backend_ops *backend = cpu->machine->backend;
    if (!p || p->space.version != space.version || p->tlb.clears != cpu->x86.tlb_clears || ++p->entered % BELIEVED == 0)
        return;
    x86_tlb_unpark(&cpu->x86, &p->tlb);
    if (backend->unpark)
        backend->unpark(cpu, (unsigned)(p - cpu->parks->slots));
}

void vm_mmu_forget_parked(vm_vcpu *cpu, uint64_t key)
{
    for (unsigned i = 0; cpu->parks && i < PARKS; i++)
        if (!key || cpu->parks->slots[i].space.key == key)
            cpu->parks->slots[i].space.key = 0;
}
