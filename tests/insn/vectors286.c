/* vectors286.c - 24,755 single-instruction captures from a real 80286 in real mode, replayed on every backend.
 *
 * The vectors are every 60th test of SingleStepTests/80286 v1.0.0 by Daniel Balsom (MIT licence), one JSON object a line:
 * registers and memory before, what changed after, and the vector if an exception was taken. A HLT follows each instruction
 * (at the branch target or the handler, too), so a case ends where the HLT does. Where later processors are known to
 * differ the case is excluded by a rule in `exclusions`, with its reason; everything else must match, undefined flags (the
 * capture's own masks) aside. The 16-bit IP wraps on the 80286 where EIP goes on to 10000h; its low half is compared.
 */
#include <ctype.h>
#include <stdlib.h>
#include "../backends.h"

#define CASES 24755

enum { AX, BX, CX, DX, CS, SS, DS, ES, SP, BP, SI, DI, IP, FLAGS, REGS };
static const char *const reg_names[REGS] = { "ax", "bx", "cx", "dx", "cs", "ss", "ds", "es", "sp", "bp", "si", "di", "ip", "flags" };
/* Where they are in vm_regs and, segments, in vm_sregs. */
#define G(field) offsetof(vm_regs, field)
#define S(field) offsetof(vm_sregs, field)
static const size_t place[REGS] = { G(rax), G(rbx), G(rcx), G(rdx), S(cs), S(ss), S(ds), S(es), G(rsp), G(rbp), G(rsi), G(rdi), G(rip),
                                    G(rflags) };

typedef struct state {
    uint32_t reg[REGS];
    unsigned count;
    struct { uint32_t at; uint8_t byte; } ram[256];
} state;
typedef struct vector {
    char op[8], name[64];
    uint8_t bytes[24];
    unsigned length;
    state before, after;
    int exception;
} vector;

/* ---- reading ---- */

static const char *find_key(const char *from, const char *key)
{
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *p = strstr(from, quoted);
    return p ? p + strlen(quoted) : NULL;
}

static void copy_string(const char *p, char *out, size_t size)
{
    size_t n = 0;
    for (p++; *p && *p != '"' && n + 1 < size; p++)
        out[n++] = *p;
    out[n] = 0;
}

static void read_state(const char *text, state *s)
{
    const char *end_of_regs = strchr(text, '}');
    for (unsigned r = 0; r < REGS; r++) {
        const char *p = find_key(text, reg_names[r]);
        if (p && p < end_of_regs)
            s->reg[r] = (uint32_t)strtoul(p, NULL, 10);
    }
    const char *p = find_key(text, "ram");
    CHECK(p != NULL);
    s->count = 0;
    for (p++; *p == '[' || *p == ','; p++) {
        char *end;
        if (*p == ',')
            continue;
        CHECK(s->count < 256);
        s->ram[s->count].at = (uint32_t)strtoul(p + 1, &end, 10);
        s->ram[s->count++].byte = (uint8_t)strtoul(end + 1, &end, 10);
        p = end;
    }
}

static void read_vector(const char *line, vector *v)
{
    memset(v, 0, sizeof *v);
    copy_string(find_key(line, "op"), v->op, sizeof v->op);
    copy_string(find_key(line, "name"), v->name, sizeof v->name);
    const char *hex = find_key(line, "bytes") + 1;
    for (; isxdigit((unsigned char)hex[0]) && v->length < sizeof v->bytes; hex += 2) {
        unsigned byte;
        sscanf(hex, "%2x", &byte);
        v->bytes[v->length++] = (uint8_t)byte;
    }
    const char *after = find_key(line, "final");
    read_state(find_key(line, "initial"), &v->before);
    v->after = v->before;
    read_state(after, &v->after);
    const char *p = find_key(after, "exception");
    v->exception = p ? atoi(p) : -1;
}

static char *masks;         /* the opcode table, as text */

static unsigned flags_mask(const char *op)
{
    char key[16];
    snprintf(key, sizeof key, "\"%s\":{", op);
    const char *p = strstr(masks, key);
    const char *end = p ? strchr(p, '}') : NULL;
    p = p ? strstr(p, "\"flags-mask\":") : NULL;
    return p && p < end ? (unsigned)strtoul(p + 13, NULL, 10) & 0xfff : 0xfff;
}

/* ---- what later processors do differently ---- */

static unsigned prefix_count(const vector *v)
{
    unsigned n = 0;
    while (n < v->length && strchr("\x26\x2e\x36\x3e\xf0\xf2\xf3", v->bytes[n]) && v->bytes[n])
        n++;
    return n;
}

/* Legal: ADD to XOR, INC, DEC, NEG, NOT, XCHG with a memory destination. */
static bool has_illegal_lock(const vector *v)
{
    const unsigned n = prefix_count(v);
    const uint8_t op = v->bytes[n], modrm = v->bytes[n + 1], reg = modrm >> 3 & 7;
    if (!memchr(v->bytes, 0xf0, n))
        return false;
    bool is_lockable = (op < 0x38 && (op & 7) < 2) || ((op & 0xfc) == 0x80 && reg != 7) || (op & 0xfe) == 0x86 ||
                       ((op & 0xfe) == 0xf6 && (reg == 2 || reg == 3)) || ((op & 0xfe) == 0xfe && reg < 2);
    return !is_lockable || modrm >= 0xc0;
}

static bool is_over_ten_bytes(const vector *v)
{
    return v->exception == 13 && v->length > 11;             /* the HLT is one of them */
}

static bool names_fs_or_gs(const vector *v)
{
    unsigned reg = v->bytes[prefix_count(v) + 1] >> 3 & 7;
    return (!strcmp(v->op, "8C") || !strcmp(v->op, "8E")) && (reg == 4 || reg == 5);
}

static bool is_faulting_string(const vector *v)
{
    static const char *const words[] = { "6D", "6F", "A5", "A7", "AB", "AD", "AF" };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (v->exception == 13 && !strcmp(v->op, words[i]))
            return true;
    return false;
}

static bool is_faulting_pop_to_memory(const vector *v)
{
    return v->exception == 13 && !strcmp(v->op, "8F");
}

static const struct { const char *reason; bool (*applies)(const vector *v); } exclusions[] = {
    { "LOCK is legal only before certain instructions with a memory destination (#UD since the 80386)", has_illegal_lock },
    { "an instruction may have 15 bytes, not 10 (since the 80386)", is_over_ten_bytes },
    { "FS and GS exist (since the 80386)", names_fs_or_gs },
    { "a string instruction that faults leaves its registers alone; the 80286 has advanced some of them", is_faulting_string },
    { "POP to memory that faults leaves SP alone; the 80286 has incremented it", is_faulting_pop_to_memory },
};

enum { EXCLUSIONS = sizeof exclusions / sizeof exclusions[0] };

/* Index of the first rule that applies, or -1. */
static int excluded(const vector *v)
{
    for (int i = 0; i < EXCLUSIONS; i++)
        if (exclusions[i].applies(v))
            return i;
    return -1;
}

/* ---- running ---- */

enum { RAM = 4 << 20 };
typedef struct machine {
    vm_machine *m;
    vm_vcpu *cpu;
    uint8_t *ram;
    vm_regs regs;
    vm_sregs sregs;
} machine;

static int read_ones(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user, (void)cpu, (void)offset, (void)width;
    *value = UINT64_MAX;
    return 0;
}

static int write_nothing(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    (void)user, (void)cpu, (void)offset, (void)width, (void)value;
    return 0;
}

static machine machine_open(vm_backend backend)
{
    machine v = { .regs = VM_REGS_INIT, .sregs = VM_SREGS_INIT };
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_region *ram, *ports;
    o.backend = backend;
    OK(vm_create(&o, &v.m));
    OK(vm_map_ram(v.m, 0, RAM, VM_PROT_RWX, &ram));
    ops.read = read_ones;
    ops.write = write_nothing;
    OK(vm_map_pio(v.m, 0, 0x10000, &ops, NULL, &ports));
    v.ram = vm_region_data(ram);
    v.cpu = vm_vcpu_get(v.m, 0);
    return v;
}

static uint64_t *gpr(machine *m, unsigned r) { return (uint64_t *)((char *)&m->regs + place[r]); }
static vm_segment *seg(machine *m, unsigned r) { return (vm_segment *)((char *)&m->sregs + place[r]); }

static void load(machine *m, const state *s, int exception)
{
    OK(vm_vcpu_set_mode(m->cpu, VM_MODE_REAL));
    OK(vm_vcpu_get_regs(m->cpu, &m->regs));
    OK(vm_vcpu_get_sregs(m->cpu, &m->sregs));
    for (unsigned r = 0; r < REGS; r++)
        if (r >= CS && r <= ES) {
            seg(m, r)->selector = (uint16_t)s->reg[r];
            seg(m, r)->base = s->reg[r] << 4;
        } else {
            *gpr(m, r) = r == FLAGS ? (s->reg[r] & 0xfd5) | 2 : s->reg[r];
        }
    OK(vm_vcpu_set_sregs(m->cpu, &m->sregs));
    OK(vm_vcpu_set_regs(m->cpu, &m->regs));
    for (unsigned i = 0; i < s->count; i++)
        OK(vm_write(m->m, s->ram[i].at, &s->ram[i].byte, 1));
    /* An access beyond the stack segment's limit is vector 13 on the 80286 in real mode and 12 since: one handler for both. */
    if (exception == 13)
        OK(vm_write(m->m, 4 * 12, m->ram + 4 * 13, 4));
}

static vm_exit run(machine *m)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    uint64_t is_exact = 0;
    OK(vm_query(vm_machine_backend(m->m), "exact-budget", &is_exact));
    o.max_instructions = is_exact ? 8 : 0;
    o.deadline_ns = TEST_SECONDS(5);
    OK(vm_vcpu_run(m->cpu, &o, &e));
    OK(vm_vcpu_get_regs(m->cpu, &m->regs));
    OK(vm_vcpu_get_sregs(m->cpu, &m->sregs));
    return e;
}

static uint32_t reg_now(machine *m, unsigned r)
{
    return r >= CS && r <= ES ? seg(m, r)->selector : r == IP ? (uint16_t)m->regs.rip : (uint32_t)*gpr(m, r);
}

/* NULL or what differs. */
static const char *compare(machine *m, const vector *v, char *text, size_t size)
{
    const unsigned mask = flags_mask(v->op);
    for (unsigned r = 0; r < REGS; r++) {
        uint32_t want = v->after.reg[r], got = reg_now(m, r), care = r == FLAGS ? mask : 0xffffffff;
        if ((want ^ got) & care) {
            snprintf(text, size, "%s is %x, not %x", reg_names[r], got, want);
            return text;
        }
    }
    for (unsigned i = 0; i < v->before.count; i++) {         /* nothing else changed */
        bool is_listed = false;
        for (unsigned k = 0; k < v->after.count; k++)
            is_listed |= v->after.ram[k].at == v->before.ram[i].at;
        if (!is_listed && m->ram[v->before.ram[i].at] != v->before.ram[i].byte) {
            snprintf(text, size, "byte %x changed to %x", v->before.ram[i].at, m->ram[v->before.ram[i].at]);
            return text;
        }
    }
    uint32_t flags_at = v->exception < 0 ? UINT32_MAX - 1 : (v->after.reg[SS] << 4) + ((v->after.reg[SP] + 4) & 0xffff);
    for (unsigned i = 0; i < v->after.count; i++) {
        uint32_t at = v->after.ram[i].at;
        uint8_t care = at == flags_at ? (uint8_t)mask : at == flags_at + 1 ? (uint8_t)(mask >> 8) & 15 : 0xff;
        if ((m->ram[at] ^ v->after.ram[i].byte) & care) {
            snprintf(text, size, "byte %x is %x, not %x", at, m->ram[at], v->after.ram[i].byte);
            return text;
        }
    }
    return NULL;
}

static void clean(machine *m, const state *s)
{
    static const uint8_t zeroes[0x400];
    OK(vm_write(m->m, 0, zeroes, sizeof zeroes));
    for (unsigned i = 0; i < s->count; i++)
        OK(vm_write(m->m, s->ram[i].at, zeroes, 1));
}

static void replay(vm_backend backend)
{
    const char *top = getenv("top_srcdir");
    char command[4096], *line = NULL, why[128];
    size_t size = 0;
    unsigned cases = 0, failed = 0, skipped[EXCLUSIONS] = { 0 };
    snprintf(command, sizeof command, "%s/tests/insn/real_mode_286.opcodes.json", top ? top : VECTORS_SRCDIR);
    FILE *f = fopen(command, "r");
    if (!f)
        FAIL("%s is missing", command);
    masks = calloc(1, 1 << 16);
    CHECK(masks && fread(masks, 1, (1 << 16) - 1, f) > 0);
    fclose(f);
    snprintf(command, sizeof command, "gzip -dc '%s/tests/insn/real_mode_286.ndjson.gz'", top ? top : VECTORS_SRCDIR);
    f = popen(command, "r");
    CHECK(f != NULL);
    machine m = machine_open(backend);
    vector *v = malloc(sizeof *v);
    CHECK(v != NULL);
    for (; getline(&line, &size, f) > 0; cases++) {
        read_vector(line, v);
        int rule = excluded(v);
        if (rule >= 0) {
            skipped[rule]++;
            continue;
        }
        load(&m, &v->before, v->exception);
        vm_exit e = run(&m);
        const char *diff = compare(&m, v, why, sizeof why);
        if (e.reason != VM_EXIT_HALT && !diff)
            diff = "did not reach the HLT";
        if (diff && failed++ < 40)
            printf("# case %u, %s %s: %s (exit %d, exception %d)\n", cases + 1, v->op, v->name, diff, (int)e.reason, v->exception);
        clean(&m, &v->before);
        clean(&m, &v->after);
    }
    free(line);
    CHECK_EQ(pclose(f), 0);
    free(v);
    vm_destroy(m.m);
    free(masks);
    CHECK_EQ(cases, CASES);
    for (int i = 0; i < EXCLUSIONS; i++)
        printf("# %u excluded: %s\n", skipped[i], exclusions[i].reason);
    fflush(stdout);
    if (failed)
        FAIL("%u of %u cases differ", failed, cases);
}

static void each(const void *arg) { replay(*(const vm_backend *)arg); }
SETUP(every_backend) { add_for_backends("all", each, 120); }
