/* kvm_machine.c - discovery, file descriptors, memory slots, identity page tables.
 *
 * Interrupt controllers. None is created in the kernel, on either platform: PIC, I/O APIC and local APICs are
 * lib/dev's, and kvm_run.c hands their vectors to KVM (KVM_INTERRUPT, interrupt windows, CR8). That keeps one
 * implementation and one state for every backend, so a machine can move between backends in the middle of an interrupt
 * storm and snapshots are the same everywhere. The price is an exit for each APIC access; a BARE machine has no
 * interrupts and pays nothing.
 *
 * Slots. The flat view is cut into runs of pages with one permission and one backing; each readable run becomes a
 * memory slot. KVM knows read-write and read-only: pages without R have no slot, and X is not enforced (vm_query
 * "exec-only" is 0). A run that finds no slot (kernels offer 509 or 32764) still works: its accesses exit and are
 * served from the view one by one, its code by the interpreter. kvm_map_changed compares wanted and present slots and
 * touches only what differs.
 *
 * FLAT64. Identity tables lie in a read-only slot of their own in the highest hole of the map, accessed and dirty bits
 * already set, so nothing ever writes them. Where the guest has 1 GiB pages they reach over the whole lower half at
 * once; else a page directory is added for each GiB that the map uses or the guest touches.
 */
#include "kvm/kvm.h"
#include "kvm/select.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include "interp/interp.h"
#include "mmu/ept.h"
#include "x86/system.h"

#ifndef KVM_CAP_XSAVE2
#define KVM_CAP_XSAVE2 208
#endif

int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    int rc;
    do rc = ioctl(fd, request, argument);
    while (rc < 0 && errno == EINTR);
    return rc;
}

static int check(int fd, unsigned long capability)
{
    int rc = ioctl(fd, KVM_CHECK_EXTENSION, capability);
    return rc < 0 ? 0 : rc;
}

/* ---- discovery ---- */

static const struct {
    int capability;
    const char *text;
} required[] = {
    {KVM_CAP_USER_MEMORY, "user memory slots"},
    {KVM_CAP_EXT_CPUID, "CPUID filtering"},
    {KVM_CAP_XSAVE, "XSAVE state"},
    {KVM_CAP_VCPU_EVENTS, "event state"},
    {KVM_CAP_DEBUGREGS, "debug registers"},
    {KVM_CAP_IMMEDIATE_EXIT, "immediate exit"},
};

/* An open /dev/kvm that has what this backend needs, or a status and a line that says why not. */
static int open_kvm(int *out)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return vm_fail(VM_E_UNSUPPORTED, "KVM is not usable: /dev/kvm %s",
                       errno == ENOENT   ? "is missing"
                       : errno == EACCES ? "may not be opened (permission)"
                                         : strerror(errno));
    int version = ioctl(fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION) {
        close(fd);
        return vm_fail(VM_E_UNSUPPORTED, "KVM is not usable: API version %d, need %d", version, KVM_API_VERSION);
    }
    for (unsigned i = 0; i < sizeof required / sizeof required[0]; i++)
        if (!check(fd, (unsigned long)required[i].capability)) {
            close(fd);
            return vm_fail(VM_E_UNSUPPORTED, "KVM is not usable: this kernel lacks %s", required[i].text);
        }
    *out = fd;
    return VM_OK;
}

/* Some hosts (guests themselves, without nested virtualisation) run only guest ring 3 on the CPU and emulate ring 0, at
 * about a million instructions a second: right, but slower than the JIT for anything with a kernel. KVMs made of VMX or
 * SVM, and only those, have nested guests whose state can be saved, from Linux 5.8 on; older ones are taken for such.
 * Asking the CPU for VMX and SVM would say the same, but traps where the CPU is virtual. */
__attribute__((weak)) bool kvm_is_hardware_ring0(int kvm_fd) { /* weak: tests pretend */
    return check(kvm_fd, KVM_CAP_NESTED_STATE) || !check(kvm_fd, KVM_CAP_X86_USER_SPACE_MSR);
}

/* Whether the hardware walks the host's second level of tables; otherwise KVM keeps shadow page tables. */
static bool has_nested_paging(void)
{
    static const char *const files[] = {"/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"};
    char c = 0;
    for (unsigned i = 0; i < 2 && !c; i++) {
        int fd = open(files[i], O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        if (read(fd, &c, 1) != 1) c = 0;
        close(fd);
    }
    return c == 'Y' || c == '1';
}

/* What needs the device; the rest is known without it. */
static int query_open(const char *capability, uint64_t *value)
{
    int fd, rc = open_kvm(&fd);
    *value = 0;
    if (rc) return VM_OK; /* 0; vm_errmsg() says why */
    if (!strcmp(capability, "available"))
        *value = 1;
    else if (!strcmp(capability, "hardware-ring0"))
        *value = kvm_is_hardware_ring0(fd);
    else if (!strcmp(capability, "max-vcpus"))
        *value = (uint64_t)check(fd, KVM_CAP_MAX_VCPUS);
    else if (!strcmp(capability, "max-slots"))
        *value = (uint64_t)check(fd, KVM_CAP_NR_MEMSLOTS);
    else if (!strcmp(capability, "dirty-ring"))
        *value = kvm_is_hardware_ring0(fd) ? (uint64_t)check(fd, KVM_CAP_DIRTY_LOG_RING) : 0;
    else if (!strcmp(capability, "nested-paging"))
        *value = has_nested_paging();
    if (!strcmp(capability, "max-vcpus") && *value > VM_MAX_VCPUS) *value = VM_MAX_VCPUS;
    if (!strcmp(capability, "auto")) {
        *value = kvm_is_hardware_ring0(fd);
        if (!*value)
            vm_fail(VM_E_UNSUPPORTED, "KVM is not chosen by itself: this host emulates guest ring 0 in software");
    }
    close(fd);
    return VM_OK;
}

int kvm_query(const char *capability, uint64_t *value)
{
    static const char *const open_names[] = {"available", "auto",       "hardware-ring0", "max-vcpus",
                                             "max-slots", "dirty-ring", "nested-paging"};
    for (unsigned i = 0; i < sizeof open_names / sizeof open_names[0]; i++)
        if (!strcmp(capability, open_names[i])) return query_open(capability, value);
    if (!strcmp(capability, "exact-budget") || !strcmp(capability, "exception-exits") || !strcmp(capability, "until")) {
        *value = 1; /* by the interpreter where KVM cannot: kvm_run.c */
        return VM_OK;
    }
    if (!strcmp(capability, "retired") || !strcmp(capability, "exec-only") || !strcmp(capability, "hypercall")) {
        *value = 0;
        return VM_OK;
    }
    return VM_E_NOTFOUND;
}

/* ---- slots ---- */

static int set_slot(kvm_machine *km, unsigned number, const kvm_slot *s)
{
    struct kvm_userspace_memory_region region = {.slot = number,
                                                 .flags = s->flags,
                                                 .guest_phys_addr = s->gpa,
                                                 .memory_size = s->bytes,
                                                 .userspace_addr = (uintptr_t)s->host};
    return kvm_ioctl(km->vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
}

static int free_slot(kvm_machine *km)
{
    for (; km->free_hint < km->slot_count; km->free_hint++)
        if (!km->slots[km->free_hint].bytes) return (int)km->free_hint;
    if (km->slot_count == km->max_slots) return -1;
    if (km->slot_count == km->slot_capacity) {
        unsigned capacity = km->slot_capacity ? km->slot_capacity * 2 : 16;
        kvm_slot *grown = realloc(km->slots, capacity * sizeof *grown);
        if (!grown) return -1;
        km->slots = grown;
        unsigned *order = realloc(km->order, capacity * sizeof *order);
        if (!order) return -1;
        km->order = order;
        km->slot_capacity = capacity;
    }
    km->slots[km->slot_count] = (kvm_slot){0};
    return (int)km->slot_count++;
}

static void remove_slot(kvm_machine *km, unsigned number)
{
    kvm_slot empty = km->slots[number];
    empty.bytes = 0;
    set_slot(km, number, &empty);
    km->slots[number] = (kvm_slot){0};
    if (number < km->free_hint) km->free_hint = number;
}

/* The runs a view asks for, one after the other. */
typedef struct run_iter {
    vm_machine *m;
    const vm_view *view;
    size_t range;
    uint64_t offset; /* in the range */
} run_iter;

static bool slot_flags(const kvm_machine *km, const vm_machine *m, unsigned prot, uint32_t *flags)
{
    *flags = 0;
    if (!(prot & VM_PROT_R)) return false;
    if (!(prot & VM_PROT_W)) {
        if (!km->can_read_only) return false;
        *flags |= KVM_MEM_READONLY;
    } else if (m->dirty_log || m->track) {
        *flags |= KVM_MEM_LOG_DIRTY_PAGES;
    }
    return true;
}

/* What the region and, under strategy "ept", the view allow at an offset into a range. */
static unsigned slot_prot(const vm_machine *m, const vm_range *r, uint64_t offset)
{
    return vm_region_prot(r->region, r->offset + offset) & vm_ept_machine_prot(m, r->gpa + offset);
}

static bool next_piece(run_iter *it, kvm_slot *out)
{
    kvm_machine *km = kvm_machine_of(it->m);
    for (; it->range < it->view->count; it->range++, it->offset = 0) {
        const vm_range *r = &it->view->ranges[it->range];
        if (r->region->kind == VM_REGION_MMIO || r->region->kind == VM_REGION_PIO) continue;
        while (it->offset < r->bytes) {
            uint64_t start = it->offset, in_region = r->offset + start;
            unsigned prot = slot_prot(it->m, r, start);
            if (!r->region->page_prot && !it->m->vcpus[0]->ept_view)
                it->offset = r->bytes;
            else
                do it->offset += 4096;
                while (it->offset < r->bytes && slot_prot(it->m, r, it->offset) == prot);
            *out = (kvm_slot){.gpa = r->gpa + start, .bytes = it->offset - start, .host = r->region->host + in_region};
            if (slot_flags(km, it->m, prot, &out->flags)) return true;
        }
    }
    return false;
}

/* Pieces that continue each other (same backing, same permission) are one run. */
static bool next_run(run_iter *it, kvm_slot *out)
{
    if (!next_piece(it, out)) return false;
    for (;;) {
        run_iter ahead = *it;
        kvm_slot next;
        if (!next_piece(&ahead, &next) || next.gpa != out->gpa + out->bytes || next.host != out->host + out->bytes ||
            next.flags != out->flags)
            return true;
        out->bytes += next.bytes;
        *it = ahead;
    }
}

static bool same_slot(const kvm_slot *a, const kvm_slot *b)
{
    return a->gpa == b->gpa && a->bytes == b->bytes && a->host == b->host && a->flags == b->flags;
}

/* Both lists are sorted by gpa: mark the slots that are wanted as they are, and leave the other runs in *runs. */
static size_t match_slots(kvm_machine *km, kvm_slot *runs, size_t count)
{
    size_t left = 0;
    for (unsigned i = 0; i < km->order_count; i++) km->slots[km->order[i]].is_kept = false;
    for (size_t r = 0, s = 0; r < count; r++) {
        while (s < km->order_count && km->slots[km->order[s]].gpa < runs[r].gpa) s++;
        kvm_slot *present = s < km->order_count ? &km->slots[km->order[s]] : NULL;
        if (present && same_slot(present, &runs[r]))
            present->is_kept = true;
        else
            runs[left++] = runs[r];
    }
    return left;
}

static void remove_unwanted(kvm_machine *km)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < km->order_count; i++) {
        unsigned number = km->order[i];
        if (km->slots[number].is_kept)
            km->order[kept++] = number;
        else
            remove_slot(km, number);
    }
    km->order_count = kept;
}

/* Shell sort: no memory, and the list is two sorted parts. */
static void sort_order(kvm_machine *km)
{
    for (unsigned gap = km->order_count / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
        for (unsigned i = gap; i < km->order_count; i++) {
            unsigned number = km->order[i], at = i;
            for (; at >= gap && km->slots[km->order[at - gap]].gpa > km->slots[number].gpa; at -= gap)
                km->order[at] = km->order[at - gap];
            km->order[at] = number;
        }
}

/* Put runs into slots; one that finds none is served without. Their numbers go behind the others in `order`, then to
 * their places. */
static void add_slots(kvm_machine *km, const kvm_slot *runs, size_t count)
{
    km->unslotted = 0;
    for (size_t i = 0; i < count; i++) {
        int number = free_slot(km);
        if (number < 0 || set_slot(km, (unsigned)number, &runs[i]) < 0) {
            km->unslotted++;
            continue;
        }
        km->slots[number] = runs[i];
        unsigned at = km->order_count++;
        if (count <= 4) { /* few: insert */
            for (; at > 0 && km->slots[km->order[at - 1]].gpa > runs[i].gpa; at--) km->order[at] = km->order[at - 1];
        }
        km->order[at] = (unsigned)number;
    }
    if (count > 4) sort_order(km);
}

static kvm_slot *wanted_runs(vm_machine *m, size_t *count)
{
    size_t capacity = 0;
    kvm_slot *runs = NULL, one;
    run_iter it = {.m = m, .view = &m->view};
    *count = 0;
    while (next_run(&it, &one)) {
        if (*count == capacity) {
            capacity = capacity ? capacity * 2 : 64;
            kvm_slot *grown = realloc(runs, capacity * sizeof *runs);
            if (!grown) break; /* what is left out is served without slots */
            runs = grown;
        }
        runs[(*count)++] = one;
    }
    return runs;
}

void kvm_map_changed(vm_machine *m)
{
    kvm_machine *km = kvm_machine_of(m);
    size_t count;
    kvm_slot *runs = wanted_runs(m, &count);
    size_t left = match_slots(km, runs, count);
    kvm_dirty_sync(m); /* pages of slots that go away */
    remove_unwanted(km);
    for (unsigned i = 0; i < m->vcpu_count; i++)
        if (kvm_vcpu_of(m->vcpus[i])->has_soft) interp_flush_code(m->vcpus[i]);
    if (km->flat_host) kvm_flat_moved(m);
    add_slots(km, runs, left);
    free(runs);
}

/* ---- identity page tables ---- */

#define PTE_TABLE  0x27u /* present, writable, user, accessed */
#define PTE_LARGE  0xe7u /* and dirty, large */
#define FLAT_PAGES 513u  /* PML4, and either 256 PDPTs, or PDPTs and page directories as needed */
#define FLAT_BYTES (FLAT_PAGES * 4096u)

/* The highest hole of the map that holds the tables. */
static uint64_t flat_hole(vm_machine *m, uint64_t limit)
{
    uint64_t end = limit;
    for (size_t i = m->view.count; i-- > 0;) {
        const vm_range *r = &m->view.ranges[i];
        uint64_t after = (r->gpa + r->bytes + 4095) & X86_PAGE_MASK;
        if (after < end && end - after >= FLAT_BYTES) break;
        if (r->gpa < end) end = r->gpa & X86_PAGE_MASK;
    }
    return end >= FLAT_BYTES ? end - FLAT_BYTES : 0;
}

static uint64_t *flat_page(kvm_machine *km, uint64_t entry)
{
    return (uint64_t *)(km->flat_host + ((entry & UINT64_C(0xffffffffff000)) - km->flat_gpa));
}

/* The next free table page as an entry, 0 when used up. */
static uint64_t flat_take(kvm_machine *km)
{
    if (km->flat_used == km->flat_bytes) return 0;
    uint64_t entry = (km->flat_gpa + km->flat_used) | PTE_TABLE;
    km->flat_used += 4096;
    return entry;
}

static uint64_t *flat_table(kvm_machine *km, uint64_t *slot)
{
    if (!*slot) *slot = flat_take(km);
    return *slot ? flat_page(km, *slot) : NULL;
}

/* Make the GiB around gpa reachable. */
static bool flat_reach(kvm_machine *km, uint64_t gpa)
{
    if (gpa >> 47) return false;
    uint64_t *pml4 = (uint64_t *)km->flat_host, *pd;
    uint64_t *pdpt = flat_table(km, &pml4[gpa >> 39]);
    if (!pdpt) return false;
    uint64_t *slot = &pdpt[gpa >> 30 & 511], base = gpa & ~UINT64_C(0x3fffffff);
    if (*slot) return true;
    if (km->has_gigabyte_pages) {
        *slot = base | PTE_LARGE;
        return true;
    }
    pd = flat_table(km, slot);
    for (unsigned i = 0; pd && i < 512; i++) pd[i] = (base + ((uint64_t)i << 21)) | PTE_LARGE;
    return pd != NULL;
}

static uint64_t flat_limit(const vm_machine *m)
{
    uint64_t guest = m->vcpus[0]->x86.phys_mask + 1, host = UINT64_C(1) << kvm_machine_of((vm_machine *)m)->phys_bits;
    return guest < host ? guest : host;
}

bool kvm_flat_extend(vm_machine *m, uint64_t gpa)
{
    kvm_machine *km = kvm_machine_of(m);
    pthread_mutex_lock(&km->lock);
    size_t used = km->flat_used;
    bool is_new = km->flat_host && gpa <= m->vcpus[0]->x86.phys_mask && flat_reach(km, gpa) && km->flat_used != used;
    pthread_mutex_unlock(&km->lock);
    return is_new;
}

/* What the map uses, the first 4 GiB (devices, absolute addresses), and where the guest is. */
static void flat_fill(vm_machine *m, uint64_t gpa)
{
    kvm_machine *km = kvm_machine_of(m);
    const uint64_t gib = UINT64_C(1) << 30;
    flat_reach(km, gpa);
    for (uint64_t g = 0; g < 4; g++) flat_reach(km, g * gib);
    for (uint64_t g = 0; km->has_gigabyte_pages && g < flat_limit(m) >> 30; g++)
        if (!flat_reach(km, g * gib)) return;
    for (size_t i = 0; i < m->view.count; i++) {
        const vm_range *r = &m->view.ranges[i];
        for (uint64_t at = r->gpa & ~(gib - 1); at < r->gpa + r->bytes; at += gib)
            if (!flat_reach(km, at)) return;
    }
}

static int flat_slot_set(vm_machine *m)
{
    kvm_machine *km = kvm_machine_of(m);
    kvm_slot s = {.gpa = km->flat_gpa,
                  .bytes = km->flat_bytes,
                  .host = km->flat_host,
                  .flags = km->can_read_only ? KVM_MEM_READONLY : 0};
    int number = free_slot(km);
    if (number < 0)
        return vm_fail(VM_E_HOST, "KVM has no memory slot left for the identity page tables of VM_MODE_FLAT64");
    if (set_slot(km, (unsigned)number, &s) < 0)
        return vm_fail_errno(VM_E_HOST, "KVM_SET_USER_MEMORY_REGION for identity page tables");
    km->slots[number] = s;
    km->flat_slot = (unsigned)number;
    return VM_OK;
}

static int flat_ready(vm_machine *m, uint64_t gpa)
{
    kvm_machine *km = kvm_machine_of(m);
    if (!km->flat_host) {
        uint64_t at = flat_hole(m, flat_limit(m));
        if (!at) return vm_fail(VM_E_HOST, "no hole of %u bytes in the map for the identity page tables", FLAT_BYTES);
        uint8_t *host =
            mmap(NULL, FLAT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (host == MAP_FAILED) return vm_fail_errno(VM_E_NOMEM, "mmap of identity page tables");
        km->flat_host = host;
        km->flat_gpa = at;
        km->flat_bytes = FLAT_BYTES;
        km->flat_used = 4096;
        int rc = flat_slot_set(m);
        if (rc) {
            munmap(host, FLAT_BYTES);
            km->flat_host = NULL;
            return rc;
        }
    }
    flat_fill(m, gpa);
    return VM_OK;
}

int kvm_flat_ready(vm_machine *m, uint64_t gpa)
{
    kvm_machine *km = kvm_machine_of(m);
    pthread_mutex_lock(&km->lock);
    int rc = flat_ready(m, gpa);
    pthread_mutex_unlock(&km->lock);
    return rc;
}

/* The map changed: if it now covers the tables, build them elsewhere; vCPUs in flat mode reload CR3. */
void kvm_flat_moved(vm_machine *m)
{
    kvm_machine *km = kvm_machine_of(m);
    bool is_covered = false;
    for (size_t i = 0; i < m->view.count; i++) {
        const vm_range *r = &m->view.ranges[i];
        is_covered |= r->gpa < km->flat_gpa + km->flat_bytes && km->flat_gpa < r->gpa + r->bytes;
    }
    if (!is_covered) {
        flat_fill(m, 0);
        return;
    }
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        kvm_vcpu *kv = kvm_vcpu_of(m->vcpus[i]);
        if (kv && kv->is_flat) kvm_get_state(m->vcpus[i], VM_STATE_SREGS);
    }
    remove_slot(km, km->flat_slot);
    munmap(km->flat_host, km->flat_bytes);
    km->flat_host = NULL;
    for (unsigned i = 0; i < m->vcpu_count; i++) {
        kvm_vcpu *kv = kvm_vcpu_of(m->vcpus[i]);
        if (kv && kv->is_flat) kvm_set_state(m->vcpus[i], VM_STATE_SREGS);
    }
}

/* ---- life ---- */

/* MSRs that lib/dev answers: KVM must not do them itself (without an in-kernel APIC it would silently ignore some). And
 * those that kvm_limits.c waits for. */
static void filter_msrs(kvm_machine *km)
{
    static const uint8_t none[32]; /* all bits clear: deny */
    struct kvm_enable_cap cap = {
        .cap = KVM_CAP_X86_USER_SPACE_MSR,
        .args = {KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL}};
    const uint32_t both = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
    struct kvm_msr_filter filter = {
        .flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
        .ranges = {
            {.flags = both, .nmsrs = 1, .base = 0x1b, .bitmap = (uint8_t *)(uintptr_t)none},
            {.flags = both, .nmsrs = 1, .base = 0x6e0, .bitmap = (uint8_t *)(uintptr_t)none},
            {.flags = both, .nmsrs = 16, .base = 0x4b564d00, .bitmap = (uint8_t *)(uintptr_t)none},
            {.flags = KVM_MSR_FILTER_WRITE, .nmsrs = 4, .base = 0xc0000080, .bitmap = (uint8_t *)(uintptr_t)none}}};
    if (!km->emulates_ring0) filter.ranges[3].nmsrs = 0;
    km->has_user_msr = check(km->vm_fd, KVM_CAP_X86_USER_SPACE_MSR) &&
                       kvm_ioctl(km->vm_fd, KVM_ENABLE_CAP, &cap) == 0 &&
                       kvm_ioctl(km->vm_fd, KVM_X86_SET_MSR_FILTER, &filter) == 0;
}

/* An instruction that KVM cannot emulate comes to us, at every privilege level, instead of being a #UD in the guest. */
static void ask_for_failures(kvm_machine *km)
{
    struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
    if (check(km->vm_fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE)) kvm_ioctl(km->vm_fd, KVM_ENABLE_CAP, &cap);
}

/* Intel hosts whose CPUs cannot run real mode as it is (no "unrestricted guest") do it with the help of a page table and
 * a task segment that KVM keeps in guest-physical memory: below the ROM, where a PC has nothing. Others ignore both. */
#define HELPER_PAGES UINT64_C(0xfeffc000)
static void place_helper_pages(kvm_machine *km)
{
    uint64_t identity = HELPER_PAGES;
    if (check(km->vm_fd, KVM_CAP_SET_IDENTITY_MAP_ADDR)) kvm_ioctl(km->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity);
    if (check(km->vm_fd, KVM_CAP_SET_TSS_ADDR))
        kvm_ioctl(km->vm_fd, KVM_SET_TSS_ADDR, (void *)(uintptr_t)(HELPER_PAGES + 4096));
}

#ifndef KVM_CAP_DISABLE_QUIRKS2
#define KVM_CAP_DISABLE_QUIRKS2 213
#endif
#ifndef KVM_X86_QUIRK_FIX_HYPERCALL_INSN
#define KVM_X86_QUIRK_FIX_HYPERCALL_INSN (1 << 5)
#endif

/* KVM shall not write over a VMCALL or VMMCALL that is not the host's own: no CPU rewrites programs, the dirty log
 * would not see it, and there are hosts on which it never ends. The guest gets #UD. */
static void leave_hypercalls(kvm_machine *km)
{
    struct kvm_enable_cap cap = {.cap = KVM_CAP_DISABLE_QUIRKS2, .args = {KVM_X86_QUIRK_FIX_HYPERCALL_INSN}};
    if (check(km->vm_fd, KVM_CAP_DISABLE_QUIRKS2) & KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
        kvm_ioctl(km->vm_fd, KVM_ENABLE_CAP, &cap);
}

static void read_capabilities(kvm_machine *km)
{
    int fd = km->vm_fd, sync = check(fd, KVM_CAP_SYNC_REGS), xsave = check(fd, KVM_CAP_XSAVE2);
    km->can_sync = (sync & KVM_SYNC_X86_VALID_FIELDS) == KVM_SYNC_X86_VALID_FIELDS;
    km->can_read_only = check(fd, KVM_CAP_READONLY_MEM);
    km->can_debug = check(fd, KVM_CAP_SET_GUEST_DEBUG);
    km->has_xcrs = check(fd, KVM_CAP_XCRS);
    km->xsave_bytes = xsave > (int)sizeof(struct kvm_xsave) ? (size_t)xsave : sizeof(struct kvm_xsave);
    int page = check(fd, KVM_CAP_COALESCED_MMIO);
    km->coalesced_page = page > 0 && ((size_t)page + 1) * 4096 <= km->run_bytes ? (size_t)page * 4096 : 0;
    km->can_coalesce_ports = check(fd, KVM_CAP_COALESCED_PIO);
    int slots = check(fd, KVM_CAP_NR_MEMSLOTS);
    km->max_slots = slots > 0 ? (unsigned)slots : 32;
}

/* ---- the CPU model ---- */

static const uint32_t model_words[][3] = {
    {1, 0, 3}, {1, 0, 2}, {7, 0, 1}, {7, 0, 2}, {7, 0, 3}, {0x80000001, 0, 3}, {0x80000001, 0, 2}, {0xd, 1, 0},
};

/* What x86_model_cut() leaves in a model: features, and no longer physical addresses than the host's. */
static uint32_t allowed_in_model(void *km, uint32_t leaf, uint32_t sub, unsigned reg)
{
    return leaf == 0x80000008 && reg == 0 ? kvm_supported(km, leaf, sub, reg) : kvm_cpuid_allowed(km, leaf, sub, reg);
}

/* A machine that began elsewhere comes to KVM with the CPU it has: it must be one that KVM can do. */
static int check_model(vm_machine *m, kvm_machine *km)
{
    x86_cpu *x = &m->vcpus[0]->x86;
    const struct x86_model *had = x->model;
    struct x86_model *cut = x86_model_cut(had, allowed_in_model, km);
    int rc = cut ? VM_OK : vm_fail(VM_E_NOMEM, "no memory for a CPU model");
    for (size_t i = 0; rc == VM_OK && i < sizeof model_words / sizeof *model_words; i++) {
        const uint32_t *w = model_words[i];
        uint32_t before[4], after[4];
        x86_cpuid(x, w[0], w[1], before);
        x->model = cut;
        x86_cpuid(x, w[0], w[1], after);
        x->model = had;
        if (before[w[2]] != after[w[2]])
            rc = vm_fail(VM_E_UNSUPPORTED,
                         "the guest has CPU features that KVM lacks here (CPUID %x, %s bits 0x%x); create the "
                         "machine with cpu_model \"kvm\" to move it",
                         w[0], (const char *[]){"EAX", "EBX", "ECX", "EDX"}[w[2]], before[w[2]] & ~after[w[2]]);
    }
    free(cut);
    if (rc == VM_OK && m->is_pc && !m->tsc_is_host)
        rc = vm_fail(VM_E_UNSUPPORTED,
                     "the guest's TSC does not run as the host's does; create the machine with cpu_model \"kvm\" "
                     "to move it");
    return rc;
}

static int take_model(vm_machine *m, kvm_machine *km)
{
    if (m->vcpu_count) return check_model(m, km);
    if (m->own_model) return VM_OK;
    m->own_model = x86_model_cut(x86_model_find(m->cpu_model), allowed_in_model, km);
    return m->own_model ? VM_OK : vm_fail(VM_E_NOMEM, "no memory for a CPU model");
}

static void take_tsc(vm_machine *m, int vcpu)
{
    int khz = m->tsc_is_host || !m->is_pc ? 0 : ioctl(vcpu, KVM_GET_TSC_KHZ, 0);
    if (khz <= 0) return;
    m->tsc_is_host = true;
    m->tsc_hz = (uint64_t)khz * 1000;
}

int vm_kvm_model(vm_machine *m)
{
    kvm_machine km = {.vm_fd = -1};
    int rc = open_kvm(&km.kvm_fd), vcpu = -1;
    if (rc) return rc;
    rc = kvm_cpuid_read(&km);
    if (rc == VM_OK) {
        m->own_model = x86_model_cut(x86_model_find(NULL), allowed_in_model, &km);
        if (!m->own_model) rc = vm_fail(VM_E_NOMEM, "no memory for a CPU model");
    }
    if (rc == VM_OK && m->is_pc) {
        km.vm_fd = ioctl(km.kvm_fd, KVM_CREATE_VM, 0);
        vcpu = km.vm_fd < 0 ? -1 : ioctl(km.vm_fd, KVM_CREATE_VCPU, 0);
        if (vcpu < 0)
            rc = vm_fail_errno(VM_E_HOST, "CPU model \"kvm\": a vCPU to ask for the TSC's frequency");
        else
            take_tsc(m, vcpu);
    }
    if (vcpu >= 0) close(vcpu);
    if (km.vm_fd >= 0) close(km.vm_fd);
    close(km.kvm_fd);
    free(km.supported);
    return rc;
}

int kvm_machine_create(vm_machine *m)
{
    kvm_machine *km = calloc(1, sizeof *km);
    if (!km) return vm_fail(VM_E_NOMEM, "no memory for a KVM machine");
    km->vm_fd = -1;
    int rc = open_kvm(&km->kvm_fd);
    if (rc) goto fail_open;
    do km->vm_fd = ioctl(km->kvm_fd, KVM_CREATE_VM, 0);
    while (km->vm_fd < 0 && errno == EINTR);
    if (km->vm_fd < 0) {
        rc = vm_fail_errno(VM_E_HOST, "KVM_CREATE_VM");
        goto fail;
    }
    int bytes = ioctl(km->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (bytes < (int)sizeof(struct kvm_run)) {
        rc = vm_fail_errno(VM_E_HOST, "KVM_GET_VCPU_MMAP_SIZE");
        goto fail;
    }
    km->run_bytes = (size_t)bytes;
    km->emulates_ring0 = !kvm_is_hardware_ring0(km->kvm_fd);
    read_capabilities(km);
    rc = kvm_cpuid_read(km);
    if (rc) goto fail;
    rc = take_model(m, km);
    if (rc) goto fail;
    unsigned bits = kvm_supported(km, 0x80000008, 0, 0) & 0xff;
    km->phys_bits = bits >= 32 && bits <= 52 ? bits : 36;
    pthread_mutex_init(&km->lock, NULL);
    filter_msrs(km);
    ask_for_failures(km);
    leave_hypercalls(km);
    place_helper_pages(km);
    kvm_dirty_choose(km);
    m->backend_data = km;
    return VM_OK;
fail:
    if (km->vm_fd >= 0) close(km->vm_fd);
    close(km->kvm_fd);
fail_open:
    free(km->supported);
    free(km);
    return rc;
}

void kvm_machine_destroy(vm_machine *m)
{
    kvm_machine *km = kvm_machine_of(m);
    if (!km) return;
    close(km->vm_fd);
    close(km->kvm_fd);
    if (km->flat_host) munmap(km->flat_host, km->flat_bytes);
    free(km->slots);
    free(km->order);
    free(km->supported);
    free(km->cpuid);
    pthread_mutex_destroy(&km->lock);
    free(km);
    m->backend_data = NULL;
}

/* The guest's TSC is the host's: ring 3 may read it without KVM in between, and other backends can follow it. */
void kvm_set_tsc_offset(kvm_vcpu *kv, uint64_t offset)
{
    struct kvm_device_attr attr = {
        .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uint64_t)(uintptr_t)&offset};
    kvm_ioctl(kv->fd, KVM_SET_DEVICE_ATTR, &attr);
}

int kvm_vcpu_create(vm_vcpu *cpu)
{
    kvm_machine *km = kvm_machine_of(cpu->machine);
    kvm_vcpu *kv = calloc(1, sizeof *kv);
    int rc = VM_E_NOMEM;
    if (!kv) return vm_fail(VM_E_NOMEM, "no memory for a KVM vCPU");
    kv->cpu = cpu;
    kv->km = km;
    kv->soft_batch = 1;
    kvm_msr_list(kv);
    kv->valid = kv->dirty = VM_STATE_ALL;
    kv->is_tlb_stale = true;
    kv->xsave = aligned_alloc(64, (km->xsave_bytes + 63) & ~(size_t)63);
    if (!kv->xsave) {
        vm_fail(VM_E_NOMEM, "no memory for a KVM vCPU's XSAVE area");
        goto fail;
    }
    kv->fd = ioctl(km->vm_fd, KVM_CREATE_VCPU, (unsigned long)cpu->index);
    if (kv->fd < 0) {
        rc = vm_fail_errno(VM_E_HOST, "KVM_CREATE_VCPU");
        goto fail;
    }
    take_tsc(cpu->machine, kv->fd);
    kv->run = mmap(NULL, km->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, kv->fd, 0);
    if (kv->run == MAP_FAILED) {
        rc = vm_fail_errno(VM_E_HOST, "mmap of a KVM vCPU");
        goto fail_fd;
    }
    cpu->backend_data = kv;
    if (cpu->machine->own_model) {
        cpu->x86.model = cpu->machine->own_model;
        memset(cpu->x86.host_features, 0xff, sizeof cpu->x86.host_features); /* what KVM shows the host's CPU has: */
        cpu->x86.host_known = true; /* asking it again is slow where it is virtual */
        cpu->x86.tsc_khz = (uint32_t)(cpu->machine->tsc_hz / 1000);
    }
    kvm_set_tsc_offset(kv, 0);
    rc = kvm_dirty_ring_map(kv);
    if (rc == VM_OK) return VM_OK;
    cpu->backend_data = NULL;
    munmap(kv->run, km->run_bytes);
fail_fd:
    close(kv->fd);
fail:
    free(kv->xsave);
    free(kv);
    return rc;
}

void kvm_vcpu_destroy(vm_vcpu *cpu)
{
    kvm_vcpu *kv = kvm_vcpu_of(cpu);
    if (!kv) return;
    if (kv->has_soft) interp_destroy(cpu);
    if (kv->timer_tid) timer_delete(kv->timer);
    kvm_dirty_ring_unmap(kv);
    munmap(kv->run, kv->km->run_bytes);
    close(kv->fd);
    free(kv->xsave);
    free(kv);
    cpu->backend_data = NULL;
}
