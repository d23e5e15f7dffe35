/* kvm_cpuid.c - CPUID: what libvm shows, cut down to what this host's KVM can do.
 *
 * libvm's model (lib/x86/cpuid.c) stays the one source of every leaf. KVM_GET_SUPPORTED_CPUID only takes feature bits
 * away, so a guest finds the same vendor, topology and leaves on every backend, and a machine made for KVM runs on the
 * others with exactly the features it started with. Bits that libvm's own devices provide (APIC, x2APIC, TSC deadline)
 * or that state a fact (hypervisor present) do not depend on KVM's answer.
 */
#include "kvm/kvm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include "x86/system.h"

enum { REG_EAX, REG_EBX, REG_ECX, REG_EDX };
#define NO_INDEX UINT32_MAX

/* Words made of feature bits, with those that are libvm's own. Every other word is passed as the model has it. */
static const struct feature_word {
    uint32_t leaf, sub;
    unsigned reg;
    uint32_t ours;
} feature_words[] = {
    {1, NO_INDEX, REG_ECX,
     1u << 21 | 1u << 24 | 1u << 27 | 1u << 31}, /* x2APIC, TSC deadline, OSXSAVE (state), hypervisor */
    {1, NO_INDEX, REG_EDX, 1u << 9 | 1u << 28},  /* APIC, HTT (topology) */
    {7, 0, REG_EBX, 1u << 9},                    /* ERMS: a hint */
    {7, 0, REG_ECX, 1u << 4},                    /* OSPKE (state) */
    {7, 0, REG_EDX, 0},
    {7, 1, REG_EAX, 0},
    {0xd, 0, REG_EAX, 3},
    {0xd, 1, REG_EAX, 0},
    {0x80000001, NO_INDEX, REG_ECX, 1u << 1}, /* CmpLegacy (topology) */
    {0x80000001, NO_INDEX, REG_EDX, 1u << 9},
    {0x80000007, NO_INDEX, REG_EDX, 1u << 8}, /* invariant TSC: true of every host with KVM */
    {0x80000008, NO_INDEX, REG_EBX, 0},
    {0x80000021, NO_INDEX, REG_EAX, 0},
};

static const struct feature_word *word_of(uint32_t leaf, uint32_t sub, unsigned reg)
{
    for (unsigned i = 0; i < sizeof feature_words / sizeof feature_words[0]; i++) {
        const struct feature_word *w = &feature_words[i];
        if (w->leaf == leaf && (w->sub == NO_INDEX || w->sub == sub) && w->reg == reg) return w;
    }
    return NULL;
}

#define MAX_ENTRIES 256u

int kvm_cpuid_read(kvm_machine *km)
{
    for (unsigned n = 256; n <= 4096; n *= 2) {
        struct kvm_cpuid2 *c = calloc(1, sizeof *c + n * sizeof c->entries[0]);
        if (!c) return vm_fail(VM_E_NOMEM, "no memory for KVM's CPUID");
        c->nent = n;
        if (kvm_ioctl(km->kvm_fd, KVM_GET_SUPPORTED_CPUID, c) == 0) {
            km->supported = c;
            return VM_OK;
        }
        int error = errno;
        free(c);
        errno = error;
        if (error != E2BIG) break;
    }
    return vm_fail_errno(VM_E_HOST, "KVM_GET_SUPPORTED_CPUID");
}

uint32_t kvm_supported(const kvm_machine *km, uint32_t leaf, uint32_t sub, unsigned reg)
{
    for (unsigned i = 0; i < km->supported->nent; i++) {
        const struct kvm_cpuid_entry2 *e = &km->supported->entries[i];
        if (e->function == leaf && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == sub)) {
            const uint32_t out[4] = {e->eax, e->ebx, e->ecx, e->edx};
            return out[reg];
        }
    }
    return 0;
}

/* Bits of a word that a guest on this KVM may see. */
uint32_t kvm_cpuid_allowed(void *km, uint32_t leaf, uint32_t sub, unsigned reg)
{
    const struct feature_word *w = word_of(leaf, sub, reg);
    return w ? kvm_supported(km, leaf, sub, reg) | w->ours : ~0u;
}

/* ---- the guest's table ---- */

static const uint32_t indexed_leaves[] = {4, 7, 0xb, 0xd, 0x8000001d};

static unsigned index_count(uint32_t leaf)
{
    for (unsigned i = 0; i < sizeof indexed_leaves / sizeof indexed_leaves[0]; i++)
        if (indexed_leaves[i] == leaf) return leaf == 0xd ? 64 : 8;
    return 1;
}

static void add_leaf(kvm_vcpu *kv, struct kvm_cpuid2 *table, uint32_t leaf)
{
    unsigned n = index_count(leaf);
    for (uint32_t sub = 0; sub < n && table->nent < MAX_ENTRIES; sub++) {
        uint32_t out[4];
        x86_cpuid(&kv->cpu->x86, leaf, sub, out);
        if (sub > 0 && !(out[0] | out[1] | out[2] | out[3]) && leaf != 0xd) break;
        if (sub > 1 && !(out[0] | out[1] | out[2] | out[3])) continue;
        for (unsigned reg = 0; reg < 4; reg++) out[reg] &= kvm_cpuid_allowed(kv->km, leaf, sub, reg);
        table->entries[table->nent++] = (struct kvm_cpuid_entry2){.function = leaf,
                                                                  .index = sub,
                                                                  .flags = n > 1 ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
                                                                  .eax = out[0],
                                                                  .ebx = out[1],
                                                                  .ecx = out[2],
                                                                  .edx = out[3]};
    }
}

static void add_range(kvm_vcpu *kv, struct kvm_cpuid2 *table, uint32_t first)
{
    uint32_t out[4];
    x86_cpuid(&kv->cpu->x86, first, 0, out);
    if (out[0] < first || out[0] > first + 0x100) return;
    for (uint32_t leaf = first; leaf <= out[0]; leaf++) add_leaf(kv, table, leaf);
}

static bool shows(const struct kvm_cpuid2 *t, uint32_t leaf, uint32_t sub, unsigned reg, unsigned bit)
{
    for (unsigned i = 0; i < t->nent; i++)
        if (t->entries[i].function == leaf && t->entries[i].index == sub) {
            const uint32_t out[4] = {t->entries[i].eax, t->entries[i].ebx, t->entries[i].ecx, t->entries[i].edx};
            return out[reg] >> bit & 1;
        }
    return false;
}

/* CR4 bits that need a feature; the others always exist on hosts with KVM. */
static const struct {
    uint64_t bit;
    uint32_t leaf;
    unsigned reg, feature;
} cr4_features[] = {
    {X86_CR4_UMIP, 7, REG_ECX, 2},     {X86_CR4_FSGSBASE, 7, REG_EBX, 0}, {X86_CR4_PCIDE, 1, REG_ECX, 17},
    {X86_CR4_OSXSAVE, 1, REG_ECX, 26}, {X86_CR4_SMEP, 7, REG_EBX, 7},     {X86_CR4_SMAP, 7, REG_EBX, 20},
};
#define CR4_KNOWN UINT64_C(0x7ff) /* VME to OSXMMEXCPT */

static void set_masks(kvm_machine *km)
{
    km->cr4_mask = CR4_KNOWN;
    for (unsigned i = 0; i < sizeof cr4_features / sizeof cr4_features[0]; i++)
        if (shows(km->cpuid, cr4_features[i].leaf, 0, cr4_features[i].reg, cr4_features[i].feature))
            km->cr4_mask |= cr4_features[i].bit;
    km->efer_mask = X86_EFER_SCE | X86_EFER_LME | X86_EFER_LMA | X86_EFER_NXE;
    if (shows(km->cpuid, 0x80000001, 0, REG_EDX, 25)) km->efer_mask |= X86_EFER_FFXSR;
    km->has_gigabyte_pages = shows(km->cpuid, 0x80000001, 0, REG_EDX, 26);
}

int kvm_cpuid_set(kvm_vcpu *kv)
{
    kvm_machine *km = kv->km;
    struct kvm_cpuid2 *table = calloc(1, sizeof *table + MAX_ENTRIES * sizeof table->entries[0]);
    if (!table) return vm_fail(VM_E_NOMEM, "no memory for a vCPU's CPUID");
    add_range(kv, table, 0);
    add_range(kv, table, 0x40000000);
    add_range(kv, table, 0x80000000);
    if (kvm_ioctl(kv->fd, KVM_SET_CPUID2, table) < 0) {
        int rc = vm_fail_errno(VM_E_HOST, "KVM_SET_CPUID2");
        free(table);
        return rc;
    }
    pthread_mutex_lock(&km->lock);
    bool is_first = !km->cpuid;
    if (is_first) {
        km->cpuid = table;
        set_masks(km);
    }
    pthread_mutex_unlock(&km->lock);
    if (!is_first) free(table);
    return VM_OK;
}
