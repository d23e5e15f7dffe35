/* taint - follows the bytes of an input through a program's memory: who reads them, and where copies of them go.
 *
 *     taint [--function NAME] PROGRAM.elf INPUT
 *
 * The program is one as in target.h (fuzz_target.c is one). Memory hooks of libvm call this tool for every access. A byte of
 * memory carries the input byte it came from: those of the input to begin with, and those that an instruction writes with the
 * value it (or one of the last few) has read from bytes that carry something. That follows copies, not arithmetic, and may take
 * equal values for a copy. The output: for each input byte its value, the functions that read it or a copy of it, and how
 * often.
 */
#include "target.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LIMIT_MS = 60000, RECENT = 8, READERS = 6, MAX_INPUT = 4096, HASH = 1 << 16 };

/* What memory bytes carry: open addressing by address; origin is 1 + offset in the input, 0 nothing. */
typedef struct cell { uint64_t address; uint32_t origin; } cell;
typedef struct reader { const char *name; uint64_t times; } reader;
typedef struct read_value { uint32_t origin[8]; uint32_t bytes; uint64_t value; } read_value;

static cell cells[HASH];
static unsigned used;
static reader readers[MAX_INPUT][READERS];
static read_value recent[RECENT];
static unsigned next_recent;
static size_t input_bytes;
static target t;

static cell *find(uint64_t address)
{
    unsigned i = (unsigned)(address * UINT64_C(0x9e3779b97f4a7c15) >> 48);
    while (cells[i].address && cells[i].address != address) i = (i + 1) % HASH;
    return &cells[i];
}

static uint32_t origin_of(uint64_t address)
{
    uint64_t begin = TARGET_INPUT_END - input_bytes;
    if (address - begin < input_bytes) return (uint32_t)(address - begin) + 1;
    return find(address)->origin;
}

static void set_origin(uint64_t address, uint32_t origin)
{
    cell *c = find(address);
    if (!c->address) {
        if (!origin || used > HASH / 2) return;
        used++;
        c->address = address;
    }
    c->origin = origin;
}

static void note_reader(uint32_t origin, const char *name)
{
    if (!origin || origin > MAX_INPUT) return;
    for (unsigned i = 0; i < READERS; i++) {
        reader *r = &readers[origin - 1][i];
        if (r->name && strcmp(r->name, name)) continue;
        r->name = name;
        r->times++;
        return;
    }
}

static vm_hook_result on_read(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    uint64_t rip = 0;
    read_value *r = &recent[next_recent++ % RECENT];
    (void)user;
    memset(r, 0, sizeof *r);
    r->bytes = e->bytes > 8 ? 8 : e->bytes;
    r->value = e->value;
    uint32_t any = 0;
    for (unsigned i = 0; i < r->bytes; i++) any |= r->origin[i] = origin_of(e->address + i);
    if (!any) {
        r->bytes = 0;
        return VM_HOOK_CONTINUE;
    }
    vm_vcpu_read_reg(cpu, VM_REG_RIP, &rip, 8);
    const target_symbol *s = target_find(&t, rip);
    for (unsigned i = 0; i < r->bytes; i++) note_reader(r->origin[i], s ? s->name : "?");
    return VM_HOOK_CONTINUE;
}

static vm_hook_result on_write(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    (void)user, (void)cpu;
    for (unsigned i = 0; i < e->bytes; i++) set_origin(e->address + i, 0);
    for (unsigned back = 1; back <= RECENT && back <= next_recent; back++) {
        const read_value *r = &recent[(next_recent - back) % RECENT];
        unsigned n = r->bytes < e->bytes ? r->bytes : e->bytes;
        if (!n || memcmp(&r->value, e->data, n)) continue;
        for (unsigned i = 0; i < n; i++) set_origin(e->address + i, r->origin[i]);
        break;
    }
    return VM_HOOK_CONTINUE;
}

static int add_hook(vm_hook_kind kind, vm_hook_fn fn)
{
    vm_hook_desc d = VM_HOOK_INIT;
    d.kind = kind;
    d.fn = fn;
    return vm_hook_add(t.m, &d, NULL);
}

static void print(const uint8_t *input)
{
    for (size_t i = 0; i < input_bytes && i < MAX_INPUT; i++) {
        printf("%5zu  %02x %c ", i, input[i], input[i] > 32 && input[i] < 127 ? input[i] : ' ');
        for (unsigned k = 0; k < READERS && readers[i][k].name; k++)
            printf(" %s:%" PRIu64, readers[i][k].name, readers[i][k].times);
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    const char *function = "fuzz_target";
    char text[256];
    int i = 1;
    if (argc > 3 && !strcmp(argv[1], "--function")) function = argv[2], i = 3;
    if (argc - i != 2) return fprintf(stderr, "usage: taint [--function NAME] PROGRAM.elf INPUT\n"), 2;
    uint8_t *input = target_read_file(argv[i + 1], &input_bytes);
    if (!input) return fprintf(stderr, "%s: cannot be read\n", argv[i + 1]), 2;
    if (target_open(&t, argv[i], function, VM_BACKEND_JIT)) return 2;
    if (add_hook(VM_HOOK_MEM_READ, on_read) || add_hook(VM_HOOK_MEM_WRITE, on_write))
        return fprintf(stderr, "taint: %s\n", vm_errmsg()), 2;
    int result = target_run(&t, input, input_bytes, LIMIT_MS, NULL);
    print(input);
    target_describe(&t, result, text, sizeof text);
    printf("%s\n", text);
    target_close(&t);
    free(input);
    return result != 0;
}
