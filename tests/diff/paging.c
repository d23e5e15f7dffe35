/* paging.c - random mutations of page tables, and accesses in between: every strategy and backend must agree with the
 * interpreter that translates anew for each access.
 *
 * Tables lie in a pool of pages that point at each other at random: they are aliased, used at several levels, mapped as
 * data, reach themselves. One step is one instruction: a load, store, exchange, call of code, INVLPG, MOV CR3, a write of
 * CR0 or CR4; or the host program writes an entry. After each step exits, faults, error codes, addresses and registers are
 * compared, and every now and then all memory with its accessed and dirty bits. Some long-mode cases use PCIDs, whose translations
 * survive loads of CR3 with bit 63, and all types of INVPCID.
 *
 * The architecture allows translations to be stale until a flush. Which of the addresses used may be so is followed here
 * (`doubt`, for each PCID), and those are left alone until an INVLPG or a flush has settled them; entries that were not present, and
 * changes that only allow more, leave no doubt, because a fault is never taken from a stale entry here.
 *
 * With two vCPUs each step is one of theirs, in turns at random: what is stale is followed for each, and a flush is its own. All
 * columns then share their tables' shadows and stop the world to protect them.
 *
 * TEST_SEED and TEST_COUNT choose other cases and more steps.
 */
#include "../test.h"

#include <libvm/libvm.h>

/* Physical memory. All of it is seen, by ring 0 at 0, by ring 3 at `user`; tables for that are out of reach of mutations. */
enum { RAM = 0x800000, CODE = 0x1000, STACK = 0x8000, FIXED = 0x20000, POOL = 0x100000, TABLES = 48, DATA = 0x180000, PAGES = 16,
       RET = 0x800 };
enum mode { LONG, PAE, NARROW };
enum { ROOTS = 3, PLACES = 20, PCIDS = 3, NOWHERE = ROOTS, DESCRIPTOR = 0x9000 };

static uint64_t state;
static uint32_t rnd(void)
{
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(state >> 33);
}
static uint32_t below(uint32_t n) { return rnd() % n; }

/* ---- machines ---- */

/* Translates anew for every access: the reference. */
static int anew(void *unused, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)unused;
    int status = vm_mmu_walk(cpu, gva, access, out);
    out->prot = VM_PROT_NONE;
    return status;
}
/* What "tlb" does, through the public functions. */
static int walk_on(void *unused, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    (void)unused;
    return vm_mmu_walk(cpu, gva, access, out);
}
static const vm_mmu_ops forwarding = { .size = sizeof forwarding, .name = "forward", .translate = walk_on };
static const vm_mmu_ops uncached = { .size = sizeof uncached, .name = "uncached", .translate = anew };

typedef struct column { const char *name; vm_backend backend; const char *mmu; } column;
static const column columns[] = {
    { "reference", VM_BACKEND_INTERP, "uncached" },
    { "interp/tlb", VM_BACKEND_INTERP, "tlb" },
    { "interp/shadow", VM_BACKEND_INTERP, "shadow" },
    { "interp/ept", VM_BACKEND_INTERP, "ept" },
    { "jit/tlb", VM_BACKEND_JIT, "tlb" },
    { "jit/shadow", VM_BACKEND_JIT, "shadow" },
    { "jit/ept", VM_BACKEND_JIT, "ept" },
    { "jit/flat", VM_BACKEND_JIT, "flat" },
    { "jit/forward", VM_BACKEND_JIT, "forward" },
};
enum { COLUMNS = sizeof columns / sizeof *columns };

enum { CPUS = 2 };
typedef struct box { vm_machine *m; vm_vcpu *cpus[CPUS], *cpu; uint8_t *ram; } box;        /* cpu: that of this step */
static box boxes[COLUMNS];
static unsigned box_count;
static enum mode mode;
static uint64_t cr0, cr4, efer;
static unsigned current;               /* root */
static unsigned pcid;                  /* index of the current one; 0 without PCIDs */
static const uint16_t pcid_values[PCIDS] = { 0, 5, 4095 };
static unsigned root_of[PCIDS];        /* whose translations it may hold; NOWHERE: none */
static bool is_user, has_ac;
static unsigned cpu_count, active;     /* vCPUs; that of this step, which the variables above and below are about */

typedef struct outcome { uint64_t reason, detail[3], rip, rax, rdi; } outcome;

static unsigned entry_bytes(void) { return mode == NARROW ? 4 : 8; }
static unsigned slots(void) { return mode == NARROW ? 1024 : 512; }
static uint64_t user_base(void) { return mode == LONG ? UINT64_C(1) << 39 : mode == PAE ? 0x200000 : 0x400000; }

/* ---- snippets ---- */

enum op { LOAD, STORE, EXCHANGE, BYTE, CALL, INVLPG, CR3, CR0, CR4, LOOP, INVPCID, OPS };
static const struct { uint8_t length, bytes[8]; } snippets[OPS] = {
    [LOAD] = { 2, { 0x8b, 0x07 } },    [STORE] = { 2, { 0x89, 0x07 } },       [EXCHANGE] = { 2, { 0x87, 0x07 } },
    [BYTE] = { 2, { 0x00, 0x07 } },    [CALL] = { 2, { 0xff, 0xd7 } },        [INVLPG] = { 3, { 0x0f, 0x01, 0x3f } },
    [CR3] = { 3, { 0x0f, 0x22, 0xdf } }, [CR0] = { 3, { 0x0f, 0x22, 0xc7 } }, [CR4] = { 3, { 0x0f, 0x22, 0xe7 } },
    [LOOP] = { 4, { 0xff, 0xc9, 0x75, 0xfc } }, [INVPCID] = { 5, { 0x66, 0x0f, 0x38, 0x82, 0x07 } },
};
/* There are two of each, used in turn: an access that nobody answered is completed when the next run begins where it was made. */
static unsigned turn;
static unsigned snippet_at(enum op op) { return CODE + 64 * op + (turn & 1) * 0x800; }
/* In long mode loads and stores are of 8 bytes. */
static unsigned length_of(enum op op) { return snippets[op].length + (mode == LONG && op <= EXCHANGE); }

static void place_snippets(uint8_t *ram)
{
    for (unsigned i = 0; i < 2 * OPS; i++) {
        enum op op = (enum op)(i / 2);
        turn = i;
        uint8_t *at = ram + snippet_at(op);
        if (mode == LONG && op <= EXCHANGE)
            *at++ = 0x48;
        memcpy(at, snippets[op].bytes, snippets[op].length);
        at[snippets[op].length] = 0xf4;
    }
}

/* ---- tables ---- */

static void put(uint8_t *ram, uint64_t table, unsigned slot, uint64_t entry)
{
    memcpy(ram + table + slot * entry_bytes(), &entry, entry_bytes());
}

static uint64_t get(const uint8_t *ram, uint64_t at)
{
    uint64_t entry = 0;
    memcpy(&entry, ram + at, entry_bytes());
    return entry;
}

static uint64_t table(unsigned i) { return POOL + i * UINT64_C(0x1000); }
static uint64_t root_cr3(unsigned i) { return mode == PAE ? FIXED + 0x800 + 32 * i : table(i); }

/* The slots that mutations and addresses use: never those of the fixed maps. */
static unsigned slot(void)
{
    static const unsigned some[] = { 2, 3, 4, 5, 510 };
    unsigned s = some[below(5)];
    return mode == NARROW && s == 510 ? 1022 : s;
}

/* An entry for anything. */
static uint64_t random_entry(void)
{
    static const uint16_t flags[] = { 7, 7, 7, 0x67, 0x27, 3, 5, 1, 0x63, 0x107, 0x167, 0x87, 0xe7, 0x83, 0x1e7, 6, 0 };
    uint64_t f = flags[below(sizeof flags / sizeof *flags)], nx = 0;
    if (mode != NARROW && !below(6))
        nx = UINT64_C(1) << 63;        /* reserved without NXE */
    if (f & 0x80)
        return (below(2) ? 0x200000 : 0x400000) | f | nx;
    switch (below(16)) {
    case 0: return UINT64_C(0x700000) | f;                           /* RAM that is empty */
    case 1: return (mode == NARROW ? UINT64_C(0xff000000) : UINT64_C(0x10000000)) | f;   /* nothing there */
    case 2: return mode == NARROW ? f : f | UINT64_C(1) << (52 - below(6));
    case 3: case 4: case 5: case 6: return (DATA + below(PAGES) * UINT64_C(0x1000)) | f | nx;
    default: return table(below(TABLES)) | f | nx;
    }
}

/* Large pages may not show what is fixed: 0x200000 and up. Roots have accessed the fixed maps already: with a PCID kept, one does not
 * look there again. */
static void make_tables(uint8_t *ram)
{
    for (unsigned i = 0; i < TABLES; i++)
        for (unsigned k = 0; k < 40; k++)
            put(ram, table(i), slot(), random_entry());
    for (unsigned i = 0; i < PAGES; i++)
        memset(ram + DATA + i * 0x1000 + RET, 0xc3, 16);
    for (unsigned i = 0; i < ROOTS; i++) {
        uint64_t r = table(i);
        if (mode == LONG) {
            uint64_t pdpt = FIXED, pd = FIXED + 0x1000, user_pdpt = FIXED + 0x2000, user_pd = FIXED + 0x3000;
            put(ram, r, 0, pdpt | 0x23), put(ram, pdpt, 0, pd | 3), put(ram, pd, 0, 0x83);
            put(ram, r, 1, user_pdpt | 0x27), put(ram, user_pdpt, 0, user_pd | 7), put(ram, user_pd, 0, 0x87);
            if (below(2))
                put(ram, r, 510, r | 3);
        } else if (mode == PAE) {
            uint64_t entry;
            for (unsigned k = 0; k < 4; k++) {
                entry = table(i + ROOTS * k) | 1;
                memcpy(ram + FIXED + 0x800 + 32 * i + 8 * k, &entry, 8);
            }
            put(ram, r, 0, 0x83), put(ram, r, 1, 0x87);
            if (below(2))
                put(ram, r, 510, r | 3);
        } else {
            put(ram, r, 0, 0x83), put(ram, r, 1, 0x87);
            if (below(2))
                put(ram, r, 1022, r | 3);
        }
    }
}

/* ---- places: linear addresses of pages that steps touch ---- */

static struct place { uint64_t la; bool doubt[PCIDS], global_doubt, may_be_global; } places[PLACES];

static uint64_t make_address(void)
{
    if (mode == NARROW)
        return (uint64_t)slot() << 22 | slot() << 12;
    if (mode == PAE)
        return (uint64_t)below(4) << 30 | (uint64_t)slot() << 21 | slot() << 12;
    uint64_t top = below(4) ? slot() : 510;
    uint64_t la = top << 39 | (uint64_t)slot() << 30 | (uint64_t)slot() << 21 | (uint64_t)slot() << 12;
    return top & 256 ? la | UINT64_C(0xffff000000000000) : la;
}

/* The walk of a place in the reference's memory. */
typedef struct path { unsigned count; uint64_t at[4], leaf_gpa; bool is_mapped, is_global; } path;

static path walk_from(unsigned root, uint64_t la)
{
    path p = { 0 };
    const uint8_t *ram = boxes[0].ram;
    int level = mode == LONG ? 3 : 1;
    unsigned bits = mode == NARROW ? 10 : 9;
    uint64_t at = mode == PAE ? table(root + ROOTS * (unsigned)(la >> 30 & 3)) : table(root);
    for (;; level--) {
        unsigned shift = 12 + bits * (unsigned)level;
        p.at[p.count] = at + (la >> shift & (slots() - 1)) * entry_bytes();
        if (at >= RAM)
            return p;                  /* not RAM: all ones */
        uint64_t e = get(ram, p.at[p.count++]);
        if (!(e & 1))
            return p;
        uint64_t base = e & (mode == NARROW ? UINT64_C(0xfffff000) : UINT64_C(0x000ffffffffff000));
        bool is_leaf = level == 0 || (level < 3 && (e & 0x80));
        if (is_leaf) {
            uint64_t size = UINT64_C(1) << shift;
            p.leaf_gpa = (base & ~(size - 1)) | (la & (size - 1));
            p.is_mapped = true;
            p.is_global = e & 0x100;
            return p;
        }
        at = base;
    }
}

static path walk(uint64_t la) { return walk_from(current, la); }

/* What is another vCPU's while a step is not its own. */
static struct context { struct place places[PLACES]; uint64_t cr0, cr4; unsigned current, pcid, root_of[PCIDS], turn; bool is_user, has_ac; }
    contexts[CPUS];

static void switch_to(unsigned cpu)
{
    struct context *c = &contexts[active];
    memcpy(c->places, places, sizeof places);
    memcpy(c->root_of, root_of, sizeof root_of);
    c->cr0 = cr0, c->cr4 = cr4, c->current = current, c->pcid = pcid, c->turn = turn, c->is_user = is_user, c->has_ac = has_ac;
    active = cpu;
    c = &contexts[cpu];
    memcpy(places, c->places, sizeof places);
    memcpy(root_of, c->root_of, sizeof root_of);
    cr0 = c->cr0, cr4 = c->cr4, current = c->current, pcid = c->pcid, turn = c->turn, is_user = c->is_user, has_ac = c->has_ac;
    for (unsigned i = 0; i < box_count; i++)
        boxes[i].cpu = boxes[i].cpus[cpu];
}

/* An entry is about to change: whose translations may be stale afterwards? */
static void note_change_here(uint64_t gpa, uint64_t from, uint64_t to)
{
    /* RW, US, A, D set: nothing to go stale; but with SMEP or SMAP ring 0 may do less with user pages. */
    uint64_t x = from ^ to, more = cr4 & 0x300000 ? 0x62 : 0x66;
    if (!(from & 1) || (!(x & ~more) && !(from & ~to)))
        return;
    for (unsigned i = 0; i < PLACES; i++)
        for (unsigned q = 0; q < PCIDS; q++) {
            path p = { 0 };
            if (root_of[q] != NOWHERE)
                p = walk_from(root_of[q], places[i].la);
            for (unsigned k = 0; k < p.count; k++)
                if (p.at[k] == gpa) {
                    places[i].doubt[q] = true;
                    places[i].global_doubt |= places[i].may_be_global;
                }
        }
}

static void note_change(uint64_t gpa, uint64_t from, uint64_t to)
{
    unsigned cpu = active;
    for (unsigned i = 0; i < cpu_count; i++) {
        switch_to(i);
        note_change_here(gpa, from, to);
    }
    switch_to(cpu);
}

/* Global translations are as they were, perhaps those of another root. */
static void note_global(struct place *p, unsigned q)
{
    p->global_doubt |= p->may_be_global;
    p->doubt[q] |= p->global_doubt;
}

/* All translations of a PCID that are not global have ended. */
static void note_flush(unsigned q)
{
    for (unsigned i = 0; i < PLACES; i++) {
        places[i].doubt[q] = false;
        note_global(&places[i], q);
    }
    root_of[q] = q == pcid ? current : NOWHERE;
}

static void note_flush_all(bool with_global)
{
    for (unsigned i = 0; i < PLACES && with_global; i++)
        places[i].may_be_global = places[i].global_doubt = false;
    for (unsigned q = 0; q < PCIDS; q++)
        note_flush(q);
}

/* ---- a step ---- */

static outcome perform(box *b, enum op op, uint64_t rdi, uint64_t rax)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    vm_regs r = VM_REGS_INIT;
    outcome out = { 0 };
    uint64_t base = is_user ? user_base() : 0;
    if (b == &boxes[0])
        OK(vm_mmu_flush(b->cpu, 0, 0));                  /* code, too, is looked up anew */
    OK(vm_vcpu_get_regs(b->cpu, &r));
    r.rip = base + snippet_at(op);
    r.rsp = base + STACK;
    r.rdi = rdi;
    r.rax = rax;
    r.rcx = 3000;
    r.rflags = 2 | (has_ac ? 0x40000 : 0);
    OK(vm_vcpu_set_regs(b->cpu, &r));
    o.has_until = true;
    o.until = r.rip + length_of(op);
    o.exception_exits = 0xffffffff;
    o.max_instructions = 20000;
    OK(vm_vcpu_run(b->cpu, &o, &e));
    OK(vm_vcpu_get_regs(b->cpu, &r));
    out = (outcome){ .reason = (uint64_t)e.reason, .rip = r.rip, .rax = r.rax, .rdi = r.rdi };
    if (e.reason == VM_EXIT_EXCEPTION) {
        out.detail[0] = e.exception.vector;
        out.detail[1] = e.exception.error;
        out.detail[2] = e.exception.address;
    } else if (e.reason == VM_EXIT_UNMAPPED) {
        out.detail[0] = e.mmio.gpa;
        out.detail[1] = e.mmio.gva;
        out.detail[2] = e.mmio.is_write | e.mmio.is_fetch << 1 | e.mmio.width << 2;
    }
    return out;
}

static const char *what;               /* the step, for messages */
static unsigned step_number;

static outcome on_all(enum op op, uint64_t rdi, uint64_t rax)
{
    turn++;
    outcome want = perform(&boxes[0], op, rdi, rax);
    for (unsigned i = 1; i < box_count; i++) {
        outcome got = perform(&boxes[i], op, rdi, rax);
        if (memcmp(&got, &want, sizeof got))
            FAIL("%s, step %u, %s of %" PRIx64 " %s: exit %s %" PRIx64 " %" PRIx64 " %" PRIx64 " rip %" PRIx64 " rax %" PRIx64
                 ", not %s %" PRIx64 " %" PRIx64 " %" PRIx64 " rip %" PRIx64 " rax %" PRIx64, columns[i].name, step_number, what, rdi,
                 is_user ? "by ring 3" : "by ring 0", vm_exit_name((int)got.reason), got.detail[0], got.detail[1], got.detail[2], got.rip,
                 got.rax, vm_exit_name((int)want.reason), want.detail[0], want.detail[1], want.detail[2], want.rip, want.rax);
    }
    return want;
}

static void compare_memory(void)
{
    for (unsigned i = 1; i < box_count; i++)
        for (unsigned at = 0; at < RAM; at += 8)
            if (memcmp(boxes[0].ram + at, boxes[i].ram + at, 8)) {
                uint64_t got, want;
                memcpy(&got, boxes[i].ram + at, 8);
                memcpy(&want, boxes[0].ram + at, 8);
                FAIL("%s, by step %u: memory at %x is %" PRIx64 ", not %" PRIx64, columns[i].name, step_number, at, got, want);
            }
}

static void set_ring(void)
{
    bool wanted = below(3) == 0;
    has_ac = !wanted && below(2);
    if (wanted == is_user)
        return;
    is_user = wanted;
    for (unsigned i = 0; i < box_count; i++) {
        vm_sregs s = VM_SREGS_INIT;
        OK(vm_vcpu_get_sregs(boxes[i].cpu, &s));
        uint16_t dpl = is_user ? 0x60 : 0, rpl = is_user ? 3 : 0;
        s.cs = (vm_segment){ .selector = (uint16_t)(8 | rpl), .limit = 0xffffffff,
                             .attributes = (uint16_t)((mode == LONG ? 0xa09b : 0xc09b) | dpl) };
        s.ss = s.ds = s.es = (vm_segment){ .selector = (uint16_t)(16 | rpl), .limit = 0xffffffff, .attributes = (uint16_t)(0xc093 | dpl) };
        OK(vm_vcpu_set_sregs(boxes[i].cpu, &s));
    }
}

/* An access to a place. Stores of entries are how tables mapped as data change. */
static void access_step(void)
{
    struct place *p = &places[below(PLACES)];
    enum op op = (enum op)below(5);
    if (p->doubt[pcid])
        return;
    uint64_t offset = (uint64_t)slot() * entry_bytes();
    set_ring();
    path before = walk(p->la);
    bool is_data = before.leaf_gpa >= DATA && before.leaf_gpa < DATA + PAGES * 0x1000;
    if (op == CALL && before.is_mapped && !is_data)
        return;
    if (op == CALL)
        offset = RET;
    uint64_t gpa = (before.leaf_gpa & ~UINT64_C(0xfff)) | offset, value = random_entry(), target = gpa & ~UINT64_C(7);
    if (mode == PAE)
        value = below(2) ? value & 0xffffffff : value >> 32, offset += op == STORE && below(4) == 0 ? 4 : 0;
    if (mode == PAE)
        gpa = (before.leaf_gpa & ~UINT64_C(0xfff)) | offset;
    bool is_write = op == STORE || op == EXCHANGE || op == BYTE;
    /* What fixed maps and code consist of stays. */
    bool is_ours = before.is_mapped && gpa < RAM && (gpa < POOL || gpa >= POOL + TABLES * 0x1000) && !is_data && gpa < 0x200000;
    if (is_write && is_ours)
        return;
    if (mode == NARROW)
        target = gpa & ~UINT64_C(3);
    /* Doubt has to be settled before the tables change: assume that the store goes through. */
    uint64_t old = before.is_mapped && gpa < RAM ? get(boxes[0].ram, target) : 0;
    static struct place kept[PLACES];
    memcpy(kept, places, sizeof places);
    if (is_write && before.is_mapped && gpa < RAM)       /* data pages are tables, too */
        note_change(target, old, ~old & ~UINT64_C(1));   /* at worst */
    what = op == LOAD ? "load" : op == STORE ? "store" : op == EXCHANGE ? "exchange" : op == BYTE ? "add" : "call";
    outcome o = on_all(op, p->la + offset, value);
    if (is_write && o.reason != VM_EXIT_UNTIL)
        memcpy(places, kept, sizeof places);             /* nothing has been written */
    else if (is_write && before.is_mapped && gpa < RAM && (!(old & 1) || old == get(boxes[0].ram, target)))
        memcpy(places, kept, sizeof places);
    if (o.reason == VM_EXIT_UNTIL && before.is_global)
        p->may_be_global = true;
}

/* The guest (through the fixed map) or the host program writes an entry. */
static void mutate_step(void)
{
    uint64_t at = table(below(TABLES)) + (uint64_t)slot() * entry_bytes(), old = get(boxes[0].ram, at), entry = random_entry();
    switch (below(6)) {
    case 0: entry = old & ~UINT64_C(0x60); break;        /* age it */
    case 1: entry = old ^ (UINT64_C(1) << below(3)); break;
    case 2: entry = old | 0x66; break;
    case 3: entry = 0; break;
    default: break;
    }
    note_change(at, old, entry);
    if (below(5) == 0) {
        what = "host write";
        for (unsigned i = 0; i < box_count; i++)
            OK(vm_write(boxes[i].m, at, &entry, entry_bytes()));
        return;
    }
    is_user ? set_ring() : (void)0;
    if (is_user)
        return;
    has_ac = false;
    what = "store of an entry";
    (void)on_all(STORE, at, entry);
    if (mode == PAE)
        (void)on_all(STORE, at + 4, entry >> 32);
}

static void kernel(void)
{
    while (is_user)
        set_ring();
}

static struct place *doubtful(unsigned q)
{
    struct place *p = &places[below(PLACES)];
    for (unsigned tries = 0; tries < 30 && !p->doubt[q]; tries++)
        p = &places[below(PLACES)];
    return p;
}

static void invlpg_step(void)
{
    struct place *p = doubtful(pcid);
    kernel();
    what = "INVLPG";
    (void)on_all(INVLPG, p->la + below(4096), 0);
    p->doubt[pcid] = p->global_doubt = p->may_be_global = false;
}

static bool has_pcids(void) { return cr4 & 0x20000; }

static void invpcid_step(void)
{
    unsigned type = below(4), q = has_pcids() ? below(PCIDS) : 0;
    struct place *p = doubtful(q);
    uint64_t descriptor[2] = { pcid_values[q], p->la + below(4096) };
    kernel();
    what = "INVPCID";
    for (unsigned i = 0; i < box_count; i++)
        memcpy(boxes[i].ram + DESCRIPTOR, descriptor, sizeof descriptor);
    (void)on_all(INVPCID, DESCRIPTOR, type);
    if (type == 0) {
        p->doubt[q] = false;
        note_global(p, q);
    } else if (type == 1) {
        note_flush(q);
    } else {
        note_flush_all(type == 2);
    }
}

/* MOV CR3 that keeps the PCID's translations: those of another root are in doubt. */
static void note_kept(unsigned q, unsigned before)
{
    for (unsigned i = 0; i < PLACES; i++) {
        places[i].doubt[q] |= before != NOWHERE && before != current;
        note_global(&places[i], q);
    }
    root_of[q] = current;
}

static void cr3_step(void)
{
    bool is_kept = has_pcids() && below(3);
    kernel();
    what = "MOV CR3";
    pcid = has_pcids() ? below(PCIDS) : 0;
    current = is_kept && below(4) && root_of[pcid] != NOWHERE ? root_of[pcid] : below(ROOTS);
    (void)on_all(CR3, root_cr3(current) | pcid_values[pcid] | (uint64_t)is_kept << 63, 0);
    if (is_kept)
        note_kept(pcid, root_of[pcid]);
    else if (cr4 & 0x80 || has_pcids())
        note_flush(pcid);
    else
        note_flush_all(true);
}

static void control_step(void)
{
    kernel();
    what = "MOV CR0/CR4";
    if (below(2)) {
        cr0 ^= 0x10000;                /* WP */
        (void)on_all(CR0, cr0, 0);
    } else {
        cr4 ^= below(2) ? 0x80 : mode == LONG && below(2) ? 0x300000 : 0x80;      /* PGE; SMEP and SMAP */
        if (mode == LONG && !pcid && !below(3))
            cr4 ^= 0x20000;            /* PCIDE */
        (void)on_all(CR4, cr4, 0);
    }
    note_flush_all(true);
}

/* ---- a case ---- */

static void open_boxes(void)
{
    vm_sregs s = VM_SREGS_INIT;
    static uint8_t image[RAM];
    memset(image, 0, sizeof image);
    place_snippets(image);
    make_tables(image);
    box_count = 0;
    for (unsigned i = 0; i < COLUMNS; i++) {
        vm_options o = VM_OPTIONS_INIT;
        vm_region *r = NULL;
        uint64_t available = 0;
        box *b = &boxes[i];
        if (vm_query(columns[i].backend, "available", &available) || !available)
            break;                     /* the JIT's columns are last */
        o.backend = columns[i].backend;
        o.mmu = columns[i].mmu;
        o.vcpus = cpu_count;
        OK(vm_create(&o, &b->m));
        OK(vm_map_ram(b->m, 0, RAM, VM_PROT_RWX, &r));
        b->ram = vm_region_data(r);
        memcpy(b->ram, image, RAM);
        b->cpu = b->cpus[0] = vm_vcpu_get(b->m, 0);
        OK(vm_vcpu_set_mode(b->cpu, mode == LONG ? VM_MODE_FLAT64 : VM_MODE_FLAT32));
        OK(vm_vcpu_get_sregs(b->cpu, &s));
        s.cr0 = cr0 = s.cr0 | UINT64_C(0x80010001);
        cr4 = s.cr4 & ~UINT64_C(0xb0);
        cr4 |= mode == NARROW ? 0x10 : 0x20;
        if (state & 16)
            cr4 |= 0x80;
        if (mode == LONG && (state & 64))
            cr4 |= 0x20000;
        efer = s.efer | (mode != NARROW && (state & 32) ? 0x800 : 0);
        s.cr4 = cr4;
        s.efer = efer;
        s.cr3 = root_cr3(0);
        for (unsigned k = 0; k < cpu_count; k++) {
            b->cpus[k] = vm_vcpu_get(b->m, k);
            OK(vm_vcpu_set_mode(b->cpus[k], mode == LONG ? VM_MODE_FLAT64 : VM_MODE_FLAT32));
            OK(vm_vcpu_set_sregs(b->cpus[k], &s));
        }
        box_count++;
    }
    for (unsigned i = 0; i < PLACES; i++) {
        places[i] = (struct place){ .la = make_address() };
        for (unsigned k = 0; k < i; k++)
            if (places[k].la == places[i].la)
                { i--; break; }
    }
    current = pcid = 0;
    for (unsigned q = 0; q < PCIDS; q++)
        root_of[q] = q ? NOWHERE : 0;
    is_user = has_ac = false;
    active = 0;
    switch_to(0);                      /* kept; the other begins as this one does */
    contexts[1] = contexts[0];
}

static uint64_t shadow_hits, table_writes;

static void run_case(uint64_t seed, unsigned steps)
{
    state = seed;
    for (int i = 0; i < 4; i++)
        rnd();
    open_boxes();
    what = "warm-up";
    for (unsigned i = cpu_count; i--;) {
        switch_to(i);
        (void)on_all(LOOP, 0, 0);      /* the JIT interprets the first instructions */
    }
    for (step_number = 1; step_number <= steps; step_number++) {
        unsigned k = below(100);
        if (cpu_count > 1 && !below(3))
            switch_to(below(cpu_count));
        if (k < 55)
            access_step();
        else if (k < 75)
            mutate_step();
        else if (k < 87)
            invlpg_step();
        else if (k < 89)
            invpcid_step();
        else if (k < 98)
            cr3_step();
        else
            control_step();
        if (step_number % 256 == 0 || step_number == steps)
            compare_memory();
    }
    for (unsigned i = 0; i < box_count; i++) {
        uint64_t n = 0;
        if (!strcmp(columns[i].mmu, "shadow")) {
            OK(vm_stats(boxes[i].m, "shadow-hits", &n));
            shadow_hits += n;
            OK(vm_stats(boxes[i].m, "table-writes", &n));
            table_writes += n;
        }
        vm_destroy(boxes[i].m);
    }
}

static const struct kind { const char *name; enum mode mode; unsigned cpus; } kinds[] = {
    { "long", LONG, 1 }, { "pae", PAE, 1 }, { "narrow", NARROW, 1 },
    { "long_smp", LONG, 2 }, { "pae_smp", PAE, 2 }, { "narrow_smp", NARROW, 2 },
};

static void run_kind(const void *arg)
{
    const struct kind *kind = arg;
    mode = kind->mode;
    cpu_count = kind->cpus;
    const char *seed = getenv("TEST_SEED"), *count = getenv("TEST_COUNT");
    OK(vm_mmu_register(&uncached));
    OK(vm_mmu_register(&forwarding));
    for (unsigned i = 0; i < 12; i++)
        run_case((seed ? strtoull(seed, NULL, 0) : 1) * 1000 + i * 48 + mode * UINT64_C(7919), count ? (unsigned)atoi(count) : 1500);
    CHECK(shadow_hits > 100);          /* shadows were used, and written tables noticed */
    CHECK(table_writes > 10);
}

SETUP(paging)
{
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
        test_add(kinds[i].name, run_kind, &kinds[i], 120);
}
