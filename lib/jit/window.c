/* window.c - where guest memory needs no look-up: without paging, under a plain strategy, code checks an address against a
 * limit and adds a distance (JIT_KEY_WINDOW). The windows are part of what translated code depends on: when one moves or
 * shrinks, the code goes.
 */
#include "jit/jit.h"

/* The largest run of pages in a RAM range that no write needs to be seen on. What adjoins code is left out when there has been more of
 * it before: jit_note_code_page(). */
static void find_write_window(jit *j, const vm_range *r, int64_t delta)
{
    enum { LEAST = 64 };
    const uint64_t margin = j->window_margin;
    uint64_t pages = r->bytes >> 12, begin = 0, best = 0, best_pages = 0;
    const _Atomic uint8_t *flags = r->region->page_flags + (r->offset >> 12);
    for (uint64_t i = 0; i <= pages; i++) {
        if (i < pages && !(flags[i] & (VM_PAGE_CODE | VM_PAGE_CLEAN))) continue;
        uint64_t end = i < pages && i > begin + 4 * margin ? i - margin : i;
        uint64_t first = begin && end > begin + 4 * margin ? begin + margin : begin;
        if (end - first > best_pages) best = first, best_pages = end - first;
        begin = i + 1;
    }
    uint64_t gpa = r->gpa + (best << 12), bytes = best_pages << 12;
    int64_t d = delta + (int64_t)(best << 12);
    if (best_pages < LEAST || d != (int32_t)d) return;
    j->vcpu->x86.jit_scratch[JIT_SLOT_WRITE_LIMIT] = bytes - 255;
    j->must_flush |= gpa != j->window_gpa[1] || d != j->window_delta[1];
    j->window_gpa[1] = gpa;
    j->window_delta[1] = (int32_t)d;
}

static bool is_window_region(const vm_range *r)
{
    const vm_region *g = r->region;
    return g->host && g->kind <= VM_REGION_FILE && !g->page_prot && !g->has_twins && (g->prot & VM_PROT_R) && r->gpa < (1u << 30) &&
           r->bytes >= 4096;
}

/* The windows: the largest readable RAM region whose address fits an immediate, and what of it may be written unseen.
 */
static void place_windows(jit *j)
{
    const vm_machine *m = j->vcpu->machine;
    uint64_t *slot = j->vcpu->x86.jit_scratch;
    const vm_range *best = NULL;
    for (size_t i = 0; i < m->view.count; i++) {
        const vm_range *r = &m->view.ranges[i];
        if (is_window_region(r) && (!best || r->bytes > best->bytes)) best = r;
    }
    slot[JIT_SLOT_WINDOW_LIMIT] = slot[JIT_SLOT_WRITE_LIMIT] = 0;
    if (!best) return;
    const uint8_t *host = best->region->host + best->offset;
    int64_t delta = host - (const uint8_t *)&j->vcpu->x86;
    vm_range r = *best;
    if (r.bytes > (UINT64_C(1) << 31)) r.bytes = UINT64_C(1) << 31;
    if (delta != (int32_t)delta || delta > INT32_MAX - 512) return;
    slot[JIT_SLOT_WINDOW_LIMIT] = r.bytes - 255;
    j->must_flush |= r.gpa != j->window_gpa[0] || delta != j->window_delta[0];
    j->window_gpa[0] = r.gpa;
    j->window_delta[0] = (int32_t)delta;
    if ((r.region->prot & VM_PROT_W) && m->vcpu_count == 1 && !m->dirty_log && !m->track) find_write_window(j, &r, delta);
}

void jit_find_windows(jit *j)
{
    uint64_t *limit = &j->vcpu->x86.jit_scratch[JIT_SLOT_WINDOW_LIMIT];
    j->window_stale = false;
    if (j->vcpu->x86.watch) { /* blocks that rely on windows wait */
        limit[0] = limit[1] = 0;
        return;
    }
    place_windows(j);
    for (unsigned w = 0; w < 2; w++) {
        j->must_flush |= limit[w] < j->window_limit[w];
        j->window_limit[w] = limit[w];
    }
}

/* A page of the write window holds code now: cut the window, and all that was translated for it goes. Each time the window keeps a
 * greater distance from code, since programs reach their code page by page. */
void jit_note_code_page(jit *j, uint64_t gpa)
{
    enum { MOST = 64 };
    uint64_t limit = j->vcpu->x86.jit_scratch[JIT_SLOT_WRITE_LIMIT];
    if (limit && gpa - j->window_gpa[1] < limit + 255) {
        j->window_margin = j->window_margin < MOST / 2 ? 2 * j->window_margin + 1 : MOST;
        jit_find_windows(j);
        j->must_flush = true;
    }
}
