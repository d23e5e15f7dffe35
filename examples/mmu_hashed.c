/* mmu_hashed.c - an MMU strategy of one's own: a hashed table of translations, one for all address spaces, as inverted page
 * tables have it. A hit costs one look at the leaf entry instead of a walk through all levels.
 *
 * The key is the address space, the page and who asks. An entry keeps what the walk gave and the leaf entry's place and
 * content: if the guest has changed that, the hit is none. What the guest changes above the leaf it has to announce
 * (INVLPG, MOV CR3), and then all entries are of a past generation.
 */
#include "paged.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = 4096 };
typedef struct slot { uint64_t root, page, generation, leaf_gpa, leaf; uint32_t context; vm_prot access; struct vm_mmu_result result; } slot;
typedef struct hashed { uint64_t generation, hits, misses, cr3; slot slots[SLOTS]; } hashed;
static hashed *last;                   /* for the figures below */

static int create(vm_machine *m, void **state)
{
    (void)m;
    last = calloc(1, sizeof *last);
    if (!last)
        return VM_E_NOMEM;
    last->generation = 1;
    *state = last;
    return VM_OK;
}

static void destroy(void *state)
{
    printf("hashed: %llu hits, %llu walks\n", (unsigned long long)last->hits, (unsigned long long)last->misses);
    free(state);
    last = NULL;
}

static uint64_t read_entry(vm_vcpu *cpu, uint64_t gpa)
{
    uint64_t entry = 0;
    return vm_read(vm_vcpu_machine(cpu), gpa, &entry, 8) == VM_OK ? entry : 0;
}

static int translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    hashed *h = state;
    uint32_t context = out->context;
    uint64_t page = gva >> 12;
    slot *s = &h->slots[(page * UINT64_C(0x9e3779b97f4a7c15) ^ h->cr3 >> 12 ^ context) % SLOTS];
    if (s->generation == h->generation && s->root == h->cr3 && s->page == page && s->context == context &&
        (s->result.prot & access) == access && s->leaf == read_entry(cpu, s->leaf_gpa)) {
        h->hits++;
        *out = s->result;
        out->gpa = (s->result.gpa & ~UINT64_C(0xfff)) | (gva & 0xfff);
        return VM_OK;
    }
    h->misses++;
    int status = vm_mmu_walk(cpu, gva, access, out);
    if (status == VM_OK && out->entry_count && out->page_bytes == 4096) {
        uint64_t leaf = out->entry[out->entry_count - 1];
        *s = (slot){ .root = h->cr3, .page = page, .generation = h->generation, .leaf_gpa = leaf, .leaf = read_entry(cpu, leaf),
                     .context = context, .access = access, .result = *out };
    }
    return status;
}

static void root_changed(void *state, vm_vcpu *cpu, uint64_t cr3)
{
    (void)cpu;
    ((hashed *)state)->cr3 = cr3;
    ((hashed *)state)->generation++;
}

static void invalidate(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes)
{
    (void)cpu, (void)gva, (void)bytes;
    ((hashed *)state)->generation++;
}

static const vm_mmu_ops ops = { .size = sizeof ops, .name = "hashed", .create = create, .destroy = destroy, .translate = translate,
                                .root_changed = root_changed, .invalidate = invalidate };

/* The software TLB loses everything, so that the strategy is asked again. */
static void forget(void *user, vm_machine *m)
{
    (void)user;
    vm_mmu_flush(vm_vcpu_get(m, 0), 0, 0);
}

int main(void)
{
    if (vm_mmu_register(&ops) < 0)
        return 1;
    vm_machine *m = paged_machine(VM_BACKEND_INTERP, "hashed");
    if (!m)
        return 1;
    uint64_t result = paged_run(m, 20000, forget, NULL);
    int is_right = result == paged_expected() && last->hits > last->misses;
    vm_destroy(m);
    printf("result %s\n", is_right ? "right" : "WRONG");
    return !is_right;
}
