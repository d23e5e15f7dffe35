/* afl_unicorn.c - the peer of examples/fuzz_afl in `make bench-afl`: the same program in Unicorn under afl-fuzz, the way emulators
 * without snapshots do it. The fork server has run the program once, so that its code is translated; each test case is a
 * fork of it that counts blocks with a hook.
 *
 * usage: afl_unicorn PROGRAM.elf ENTRY-ADDRESS
 */
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <signal.h>
#include <unicorn/unicorn.h>
#include <unistd.h>

enum { PAGE = 4096, INPUT_MAX = 1 << 20, INPUT_END = 0x70000000, STACK_END = 0x7fff0000, STACK_BYTES = 1 << 18, MAP = 1 << 16 };

static uint8_t *map, spare[MAP], file[1 << 20];
static uint64_t previous;

static void on_block(uc_engine *uc, uint64_t address, uint32_t size, void *user)
{
    uint64_t id = address * UINT64_C(0x7f4a7c15) >> 15;
    (void)uc, (void)size, (void)user;
    map[(previous >> 1 ^ id) & (MAP - 1)]++;
    previous = id;
}

static int load(uc_engine *uc, const char *path)
{
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(file, 1, sizeof file, f) : 0;
    const Elf64_Ehdr *e = (const void *)file;
    if (f)
        fclose(f);
    if (n < sizeof *e)
        return -1;
    for (unsigned i = 0; i < e->e_phnum; i++) {
        const Elf64_Phdr *p = (const void *)(file + e->e_phoff + i * sizeof *p);
        uint64_t begin = p->p_vaddr & ~UINT64_C(4095), end = (p->p_vaddr + p->p_memsz + PAGE - 1) & ~UINT64_C(4095);
        unsigned prot = (p->p_flags & PF_R ? UC_PROT_READ : 0) | (p->p_flags & PF_W ? UC_PROT_WRITE : 0) |
                        (p->p_flags & PF_X ? UC_PROT_EXEC : 0);
        if (p->p_type != PT_LOAD || !p->p_memsz)
            continue;
        if (uc_mem_map(uc, begin, end - begin, prot) || uc_mem_write(uc, p->p_vaddr, file + p->p_offset, p->p_filesz))
            return -1;
    }
    return uc_mem_map(uc, INPUT_END - INPUT_MAX, INPUT_MAX, UC_PROT_READ) ||
           uc_mem_map(uc, STACK_END - STACK_BYTES, STACK_BYTES, UC_PROT_READ | UC_PROT_WRITE) ||
           uc_mem_map(uc, STACK_END, PAGE, UC_PROT_READ | UC_PROT_EXEC);
}

/* The writable segments as they were before the program ran. */
static void reload(uc_engine *uc)
{
    static const uint8_t zero[PAGE];
    const Elf64_Ehdr *e = (const void *)file;
    for (unsigned i = 0; i < e->e_phnum; i++) {
        const Elf64_Phdr *p = (const void *)(file + e->e_phoff + i * sizeof *p);
        if (p->p_type != PT_LOAD || !(p->p_flags & PF_W))
            continue;
        for (uint64_t at = 0; at < p->p_memsz; at += PAGE)
            uc_mem_write(uc, p->p_vaddr + at, zero, p->p_memsz - at < PAGE ? p->p_memsz - at : PAGE);
        uc_mem_write(uc, p->p_vaddr, file + p->p_offset, p->p_filesz);
    }
}

static uc_err run(uc_engine *uc, uint64_t entry, const uint8_t *data, uint32_t size)
{
    uint64_t address = INPUT_END - size, bytes = size, sp = STACK_END - 72, back = STACK_END;
    previous = 0;
    uc_mem_write(uc, address, data, size);
    uc_mem_write(uc, sp, &back, 8);
    uc_reg_write(uc, UC_X86_REG_RDI, &address);
    uc_reg_write(uc, UC_X86_REG_RSI, &bytes);
    uc_reg_write(uc, UC_X86_REG_RSP, &sp);
    return uc_emu_start(uc, entry, STACK_END, 0, 0);
}

static uint8_t *attach(const char *variable)
{
    const char *id = getenv(variable);
    uint8_t *p = id ? shmat(atoi(id), NULL, 0) : (void *)-1;
    return p == (void *)-1 ? NULL : p;
}

int main(int argc, char **argv)
{
    uc_engine *uc;
    uc_hook hook;
    uint32_t word = 0x80000001u | 0x01000000u | 0x40000000u | (MAP - 1) << 1, size;
    if (argc != 3 || uc_open(UC_ARCH_X86, UC_MODE_64, &uc) || load(uc, argv[1]) ||
        uc_hook_add(uc, &hook, UC_HOOK_BLOCK, (void *)(uintptr_t)on_block, NULL, (uint64_t)1, (uint64_t)0))
        return fprintf(stderr, "afl_unicorn: cannot start\n"), 2;
    uint64_t entry = strtoull(argv[2], NULL, 16);
    uint8_t *shared = attach("__AFL_SHM_FUZZ_ID");
    map = spare;
    /* A header, a palette, pixels and a text: most of the program gets translated. */
    run(uc, entry, (const uint8_t *)"VPICH\3\0\4\4\4P\5\0\0\1\1\2\3R\3\0\1\2\201T\7\0title=x", 34);
    reload(uc);
    map = attach("__AFL_SHM_ID");
    if (!map || !shared || write(199, &word, 4) != 4 || read(198, &word, 4) != 4)
        return fprintf(stderr, "afl_unicorn: to be run by afl-fuzz\n"), 2;
    while (read(198, &word, 4) == 4) {
        int status = 0;
        pid_t child = fork();
        if (!child) {
            memcpy(&size, shared, 4);
            map[0] = 1;
            if (run(uc, entry, shared + 4, size))
                raise(SIGSEGV);
            _exit(0);
        }
        if (child < 0 || write(199, &child, 4) != 4 || waitpid(child, &status, 0) != child || write(199, &status, 4) != 4)
            return 1;
    }
    return 0;
}
