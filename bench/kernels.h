/* kernels.h - kernels.c's image as the benchmarks run it: the ELF file in memory from BASE on, a stack above it, and HLT where
 * the entry function returns to. For one file of a program.
 */
#ifndef LIBVM_BENCH_KERNELS_H
#define LIBVM_BENCH_KERNELS_H
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BASE = 0x10000000, SIZE = 32 << 20, STACK = BASE + SIZE - 4096, RETURN = BASE + SIZE - 2048 };

static uint8_t *image;
static size_t image_bytes;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* The ELF file as it lies in memory from BASE on. */
static int load_image(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return -1;
    static uint8_t file[4 << 20];
    size_t n = fread(file, 1, sizeof file, f);
    fclose(f);
    const Elf64_Ehdr *e = (const void *)file;
    if (n < sizeof *e || memcmp(e->e_ident, ELFMAG, SELFMAG))
        return -1;
    image = calloc(1, SIZE);
    for (unsigned i = 0; i < e->e_phnum; i++) {
        const Elf64_Phdr *p = (const void *)(file + e->e_phoff + i * sizeof *p);
        if (p->p_type != PT_LOAD || !p->p_filesz)
            continue;
        memcpy(image + (p->p_vaddr - BASE), file + p->p_offset, p->p_filesz);
        if (p->p_vaddr - BASE + p->p_filesz > image_bytes)
            image_bytes = p->p_vaddr - BASE + p->p_filesz;
    }
    image[RETURN - BASE] = 0xf4;
    return 0;
}

#endif
