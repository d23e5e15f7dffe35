/* mmu_working_set.c - an MMU strategy that draws which pages a guest uses, and when. Before every slice of the run the software
 * TLB is emptied, so that each page touched in the slice is asked for at least once. The picture (PPM) has a column for each
 * slice and four rows for each page: green read, red written, blue executed.
 *
 * usage: mmu_working_set [FILE.ppm]
 */
#include "paged.h"

#include <stdio.h>
#include <string.h>

enum { SLICE = 4000, SLICES = 400, PAGES = PAGED_RAM >> 12, ROWS = 4 };
static struct { unsigned slice; uint8_t used[SLICES][PAGES]; } set;

static int translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)state;
    int status = vm_mmu_walk(cpu, gva, access, out);
    if (status == VM_OK && out->gpa < PAGED_RAM && set.slice)
        set.used[set.slice - 1][out->gpa >> 12] |= (uint8_t)access;
    if (access != VM_PROT_W)
        out->prot = (vm_prot)(out->prot & ~VM_PROT_W);   /* see the first write, too */
    return status;
}

static const vm_mmu_ops ops = { .size = sizeof ops, .name = "working-set", .translate = translate };

static void next_slice(void *user, vm_machine *m)
{
    (void)user;
    vm_mmu_flush(vm_vcpu_get(m, 0), 0, 0);
    if (set.slice < SLICES)
        set.slice++;
}

/* Pages that were ever used, one below the other. */
static unsigned draw(const char *path)
{
    unsigned rows[PAGES], count = 0;
    for (unsigned p = 0; p < PAGES; p++) {
        unsigned sum = 0;
        for (unsigned s = 0; s < set.slice; s++)
            sum |= set.used[s][p];
        if (sum)
            rows[count++] = p;
    }
    FILE *f = fopen(path, "wb");
    if (!f)
        return 0;
    fprintf(f, "P6\n%u %u\n255\n", set.slice, count * ROWS);
    for (unsigned y = 0; y < count * ROWS; y++)
        for (unsigned s = 0; s < set.slice; s++) {
            unsigned used = set.used[s][rows[y / ROWS]];
            fputc(used & VM_PROT_W ? 220 : 16, f);
            fputc(used & VM_PROT_R ? 200 : 16, f);
            fputc(used & VM_PROT_X ? 255 : 16, f);
        }
    return fclose(f) == 0 ? count : 0;
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "working-set.ppm";
    if (vm_mmu_register(&ops) < 0)
        return 1;
    vm_machine *m = paged_machine(VM_BACKEND_INTERP, "working-set");
    if (!m)
        return 1;
    bool is_right = paged_run(m, SLICE, next_slice, NULL) == paged_expected();
    vm_destroy(m);
    unsigned pages = draw(path);
    printf("%u slices of %u instructions, %u pages used; drawn in %s\n", set.slice, SLICE, pages, path);
    return !is_right || pages < PAGED_PAGES + 1;         /* the data and the code */
}
