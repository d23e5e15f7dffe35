/* target.c - see target.h. */
#include "target.h"

#include <elf.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, SLICE_MS = 5 };

uint8_t *target_read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    uint8_t *data = NULL;
    long end = -1;
    if (f && !fseek(f, 0, SEEK_END) && (end = ftell(f)) >= 0) {
        rewind(f);
        data = malloc((size_t)end + 1);
        if (data && fread(data, 1, (size_t)end, f) != (size_t)end) {
            free(data);
            data = NULL;
        }
    }
    if (f) fclose(f);
    *bytes = data ? (size_t)end : 0;
    return data;
}

static int fail(const char *path, const char *why)
{
    fprintf(stderr, "%s: %s\n", path, why);
    return -1;
}

/* Memory for one segment of the file, and its bytes. */
static int load_segment(target *t, const Elf64_Phdr *p, size_t file_bytes)
{
    uint64_t begin = p->p_vaddr & ~UINT64_C(4095), end = (p->p_vaddr + p->p_memsz + PAGE - 1) & ~UINT64_C(4095);
    unsigned prot = (p->p_flags & PF_R ? VM_PROT_R : 0) | (p->p_flags & PF_W ? VM_PROT_W : 0) |
                    (p->p_flags & PF_X ? VM_PROT_X : 0);
    if (p->p_filesz > p->p_memsz || p->p_offset > file_bytes || p->p_filesz > file_bytes - p->p_offset) return -1;
    if (vm_map_ram(t->m, begin, end - begin, (vm_prot)prot, NULL)) return -1;
    if (p->p_flags & PF_X) t->code_bytes += p->p_memsz;
    return vm_write(t->m, p->p_vaddr, t->file + p->p_offset, p->p_filesz);
}

static int by_address(const void *a, const void *b)
{
    const target_symbol *x = a, *y = b;
    return x->address < y->address ? -1 : x->address > y->address;
}

static void load_symbols(target *t, const Elf64_Ehdr *e, size_t file_bytes)
{
    if (e->e_shoff > file_bytes || (file_bytes - e->e_shoff) / sizeof(Elf64_Shdr) < e->e_shnum) return;
    const Elf64_Shdr *sections = (const void *)(t->file + e->e_shoff);
    for (unsigned i = 0; i < e->e_shnum; i++) {
        const Elf64_Shdr *s = &sections[i];
        if (s->sh_type != SHT_SYMTAB || s->sh_link >= e->e_shnum) continue;
        const Elf64_Shdr *names = &sections[s->sh_link];
        if (s->sh_offset > file_bytes || s->sh_size > file_bytes - s->sh_offset || names->sh_offset > file_bytes ||
            names->sh_size > file_bytes - names->sh_offset || !names->sh_size || t->file[names->sh_offset + names->sh_size - 1])
            continue;
        const Elf64_Sym *all = (const void *)(t->file + s->sh_offset);
        size_t count = s->sh_size / sizeof *all;
        t->symbols = calloc(count + 1, sizeof *t->symbols);
        for (size_t k = 0; t->symbols && k < count; k++)
            if (ELF64_ST_TYPE(all[k].st_info) == STT_FUNC && all[k].st_name < names->sh_size)
                t->symbols[t->symbol_count++] =
                    (target_symbol){all[k].st_value, all[k].st_size, (const char *)t->file + names->sh_offset + all[k].st_name};
        if (t->symbols) qsort(t->symbols, t->symbol_count, sizeof *t->symbols, by_address);
        return;
    }
}

const target_symbol *target_find(const target *t, uint64_t address)
{
    size_t low = 0, high = t->symbol_count;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (t->symbols[mid].address <= address)
            low = mid + 1;
        else
            high = mid;
    }
    return low && address - t->symbols[low - 1].address < t->symbols[low - 1].bytes ? &t->symbols[low - 1] : NULL;
}

static int load(target *t, const char *path, const char *function)
{
    size_t bytes = 0;
    t->file = target_read_file(path, &bytes);
    if (!t->file) return fail(path, "cannot be read");
    const Elf64_Ehdr *e = (const void *)t->file;
    if (bytes < sizeof *e || memcmp(e->e_ident, ELFMAG, SELFMAG) || e->e_ident[EI_CLASS] != ELFCLASS64 ||
        e->e_machine != EM_X86_64 || e->e_phoff > bytes || (bytes - e->e_phoff) / sizeof(Elf64_Phdr) < e->e_phnum)
        return fail(path, "no ELF program for x86-64");
    for (unsigned i = 0; i < e->e_phnum; i++) {
        const Elf64_Phdr *p = (const Elf64_Phdr *)(const void *)(t->file + e->e_phoff) + i;
        if (p->p_type == PT_LOAD && p->p_memsz && load_segment(t, p, bytes)) return fail(path, "a segment cannot be loaded");
    }
    load_symbols(t, e, bytes);
    for (size_t i = 0; i < t->symbol_count; i++)
        if (!strcmp(t->symbols[i].name, function)) t->entry = t->symbols[i].address;
    return t->entry ? 0 : fail(path, "the function is not in its symbol table");
}

int target_open(target *t, const char *path, const char *function, vm_backend backend)
{
    vm_options o = VM_OPTIONS_INIT;
    vm_region *input;
    static const uint8_t halt = 0xf4;
    uint64_t stack = TARGET_STACK_END - 64, back = TARGET_RETURN;
    memset(t, 0, sizeof *t);
    t->exit = (vm_exit)VM_EXIT_INIT;
    o.backend = backend;
    if (vm_create(&o, &t->m)) return fail(path, vm_errmsg());
    t->cpu = vm_vcpu_get(t->m, 0);
    if (load(t, path, function)) return -1;
    stack -= 8; /* as after a call */
    if (vm_map_ram(t->m, TARGET_INPUT_END - TARGET_INPUT_MAX, TARGET_INPUT_MAX, VM_PROT_R, &input) ||
        vm_map_ram(t->m, TARGET_STACK_END - TARGET_STACK_BYTES, TARGET_STACK_BYTES, VM_PROT_RW, NULL) ||
        vm_map_ram(t->m, TARGET_RETURN, PAGE, VM_PROT_RX, NULL) || vm_write(t->m, TARGET_RETURN, &halt, 1) ||
        vm_write(t->m, stack, &back, 8) || vm_vcpu_set_mode(t->cpu, VM_MODE_FLAT64) ||
        vm_vcpu_write_reg(t->cpu, VM_REG_RSP, &stack, 8) || vm_vcpu_write_reg(t->cpu, VM_REG_RIP, &t->entry, 8) ||
        vm_snapshot_take(t->m, &t->start))
        return fail(path, vm_errmsg());
    t->input = (uint8_t *)vm_region_data(input) + TARGET_INPUT_MAX;
    return 0;
}

void target_close(target *t)
{
    vm_destroy(t->m);
    free(t->symbols);
    free(t->file);
    memset(t, 0, sizeof *t);
}

/* The signal that a process of an operating system would have got. */
static int signal_of(const vm_exit *e)
{
    if (e->reason != VM_EXIT_EXCEPTION) return SIGSEGV;
    switch (e->exception.vector) {
    case 0:
    case 16:
    case 19: return SIGFPE;
    case 1:
    case 3: return SIGTRAP;
    case 6: return SIGILL;
    case 17: return SIGBUS;
    default: return SIGSEGV;
    }
}

int target_run(target *t, const void *data, size_t size, unsigned ms, int (*go_on)(void))
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    if (size > TARGET_INPUT_MAX) size = TARGET_INPUT_MAX;
    uint64_t address = TARGET_INPUT_END - size, bytes = size;
    memcpy(t->input - size, data, size); /* not code, and not to be put back: nobody need be told */
    if (vm_snapshot_restore(t->m, t->start) || vm_vcpu_write_reg(t->cpu, VM_REG_RDI, &address, 8) ||
        vm_vcpu_write_reg(t->cpu, VM_REG_RSI, &bytes, 8))
        return TARGET_BROKEN;
    o.exception_exits = UINT32_MAX;
    o.deadline_ns = UINT64_C(1000000) * SLICE_MS;
    for (unsigned spent = 0;; spent += SLICE_MS) {
        if (vm_vcpu_run(t->cpu, &o, &t->exit)) return TARGET_BROKEN;
        if (t->exit.reason != VM_EXIT_DEADLINE) break;
        if (spent >= ms || (go_on && !go_on())) return TARGET_HANG;
    }
    if (t->exit.reason == VM_EXIT_HALT && t->exit.rip == TARGET_RETURN + 1) return 0;
    return signal_of(&t->exit);
}

void target_describe(const target *t, int result, char *text, size_t bytes)
{
    const target_symbol *s = target_find(t, t->exit.rip);
    char at[120], why[80] = "";
    snprintf(at, sizeof at, "%#" PRIx64 "%s%.60s", t->exit.rip, s ? " in " : "", s ? s->name : "");
    if (t->exit.reason == VM_EXIT_UNMAPPED)
        snprintf(why, sizeof why, ": %s of %u bytes at %#" PRIx64,
                 t->exit.mmio.is_fetch ? "fetch" : t->exit.mmio.is_write ? "write" : "read", t->exit.mmio.width,
                 t->exit.mmio.gva);
    if (t->exit.reason == VM_EXIT_EXCEPTION) snprintf(why, sizeof why, ": vector %u", t->exit.exception.vector);
    if (result == 0)
        snprintf(text, bytes, "returned");
    else if (result == TARGET_HANG)
        snprintf(text, bytes, "hangs at %s", at);
    else if (result == TARGET_BROKEN)
        snprintf(text, bytes, "libvm: %s", vm_errmsg());
    else
        snprintf(text, bytes, "signal %d, %s%s, at %s", result, vm_exit_name(t->exit.reason), why, at);
}
