/* place.c - where things go in guest memory: RAM as the platform's map says, minus what is taken. */
#include "boot/boot.h"

#include <stdlib.h>
#include <string.h>

int vm_placer_init(vm_placer *placer, vm_machine *m)
{
    memset(placer, 0, sizeof *placer);
    placer->machine = m;
    placer->map_count = vm_pc_e820(m, placer->map, VM_BOOT_MAX_E820);
    int status = vm_pc_install_tables(m);       /* firmware or a guest may have been where they lie */
    return status == VM_OK ? vm_boot_services(placer) : status;
}

void vm_placer_free(vm_placer *placer)
{
    free(placer->taken);
    placer->taken = NULL;
}

static bool is_ram(const vm_placer *placer, uint64_t gpa, uint64_t bytes)
{
    for (unsigned i = 0; i < placer->map_count; i++) {
        const vm_pc_e820_entry *e = &placer->map[i];
        if (e->type == 1 && gpa >= e->base && gpa - e->base < e->bytes && bytes <= e->bytes - (gpa - e->base)) return true;
    }
    return false;
}

static const vm_span *overlapping(const vm_placer *placer, uint64_t gpa, uint64_t bytes)
{
    for (size_t i = 0; i < placer->taken_count; i++) {
        const vm_span *t = &placer->taken[i];
        if (gpa < t->gpa + t->bytes && t->gpa < gpa + bytes) return t;
    }
    return NULL;
}

static int take(vm_placer *placer, uint64_t gpa, uint64_t bytes)
{
    if (placer->taken_count == placer->taken_capacity) {
        size_t capacity = placer->taken_capacity ? 2 * placer->taken_capacity : 16;
        vm_span *grown = realloc(placer->taken, capacity * sizeof *grown);
        if (!grown) return vm_fail(VM_E_NOMEM, "no memory for the list of loaded parts");
        placer->taken = grown;
        placer->taken_capacity = capacity;
    }
    placer->taken[placer->taken_count++] = (vm_span){gpa, bytes};
    return VM_OK;
}

int vm_place_at(vm_placer *placer, uint64_t gpa, uint64_t bytes, bool exclusive, const char *what)
{
    if (bytes == 0) return VM_OK;
    if (!is_ram(placer, gpa, bytes))
        return vm_fail(VM_E_NOMEM, "%s: %#llx bytes at %#llx do not lie in guest RAM", what, (unsigned long long)bytes,
                       (unsigned long long)gpa);
    const vm_span *other = exclusive ? overlapping(placer, gpa, bytes) : NULL;
    if (other)
        return vm_fail(VM_E_NOMEM, "%s: %#llx bytes at %#llx overlap what is loaded at %#llx", what, (unsigned long long)bytes,
                       (unsigned long long)gpa, (unsigned long long)other->gpa);
    return take(placer, gpa, bytes);
}

static bool is_free(const vm_placer *placer, uint64_t gpa, uint64_t min, uint64_t end, uint64_t bytes)
{
    return gpa >= min && gpa < end && bytes <= end - gpa && is_ram(placer, gpa, bytes) && !overlapping(placer, gpa, bytes);
}

static int no_room(uint64_t bytes, uint64_t min, uint64_t end, const char *what)
{
    return vm_fail(VM_E_NOMEM, "%s: no room for %#llx bytes of guest RAM in [%#llx, %#llx)", what, (unsigned long long)bytes,
                   (unsigned long long)min, (unsigned long long)end);
}

/* The lowest place starts at `min`, at the start of a range of RAM, or at the end of something taken. */
int vm_place_low(vm_placer *placer, uint64_t min, uint64_t end, uint64_t bytes, uint64_t align, const char *what, uint64_t *gpa)
{
    uint64_t best = UINT64_MAX;
    size_t candidates = 1 + placer->map_count + placer->taken_count;
    for (size_t i = 0; i < candidates; i++) {
        uint64_t at = i == 0 ? min : i <= placer->map_count ? placer->map[i - 1].base
                    : placer->taken[i - 1 - placer->map_count].gpa + placer->taken[i - 1 - placer->map_count].bytes;
        uint64_t aligned = (at + align - 1) & -align;
        if (aligned >= at && aligned < best && is_free(placer, aligned, min, end, bytes)) best = aligned;
    }
    if (best == UINT64_MAX) return no_room(bytes, min, end, what);
    *gpa = best;
    return take(placer, best, bytes);
}

/* The highest place ends at `end`, at the end of a range of RAM, or at the start of something taken. */
int vm_place_high(vm_placer *placer, uint64_t min, uint64_t end, uint64_t bytes, uint64_t align, const char *what, uint64_t *gpa)
{
    uint64_t best = UINT64_MAX;
    size_t candidates = 1 + placer->map_count + placer->taken_count;
    for (size_t i = 0; i < candidates; i++) {
        uint64_t top = i == 0 ? end : i <= placer->map_count ? placer->map[i - 1].base + placer->map[i - 1].bytes
                     : placer->taken[i - 1 - placer->map_count].gpa;
        if (top < bytes) continue;
        uint64_t at = (top - bytes) & -align;
        if ((best == UINT64_MAX || at > best) && is_free(placer, at, min, end, bytes)) best = at;
    }
    if (best == UINT64_MAX) return no_room(bytes, min, end, what);
    *gpa = best;
    return take(placer, best, bytes);
}

int vm_boot_copy(vm_machine *m, uint64_t gpa, const void *data, uint64_t bytes, const char *what)
{
    int status = vm_write(m, gpa, data, (size_t)bytes);
    if (status == VM_OK) return VM_OK;
    return vm_fail(status == VM_E_FAULT ? VM_E_NOMEM : status, "%s: %#llx bytes at %#llx do not lie in guest RAM", what,
                   (unsigned long long)bytes, (unsigned long long)gpa);
}

/* Pages that are zero already are left alone: fresh RAM stays uncommitted. */
int vm_boot_zero(vm_machine *m, uint64_t gpa, uint64_t bytes, const char *what)
{
    static const uint8_t zeros[4096];
    while (bytes) {
        size_t run = 4096 - (size_t)(gpa & 4095);
        if (run > bytes) run = (size_t)bytes;
        size_t direct = run;
        const void *host = vm_memory_ptr(m, gpa, &direct);
        if (!host || direct < run || memcmp(host, zeros, run) != 0) {
            int status = vm_boot_copy(m, gpa, zeros, run, what);
            if (status != VM_OK) return status;
        }
        gpa += run;
        bytes -= run;
    }
    return VM_OK;
}

int vm_boot_string(vm_placer *placer, const char *text, const char *what, uint64_t *gpa)
{
    uint64_t bytes = strlen(text) + 1;
    int status = vm_place_low(placer, VM_BOOT_LOW_MIN, VM_BOOT_LOW_END, bytes, 16, what, gpa);
    return status == VM_OK ? vm_boot_copy(placer->machine, *gpa, text, bytes, what) : status;
}
