/* native.c - one-instruction host functions ("thunks") for vector, MMX and x87 instructions.
 *
 * A thunk loads the guest registers an instruction names from the CPU's image, executes the instruction re-encoded, and
 * stores what it may have written. Inside a thunk rdi is the x86_cpu, rsi the memory operand's host address and r9 the
 * frame; general-purpose operands are renamed to r10 (ModRM.reg), r11 (ModRM.rm) and r8 (VEX.vvvv). Vector and MMX
 * registers keep their numbers. Thunks are leaf functions that use no callee-saved register.
 *
 * Thunk memory is per CPU and mapped twice: `rw` is never executable, `rx` never writable. It is bounded; when it or a
 * table is full, everything is dropped and made again on demand. Two caches find a thunk: by the guest's bytes (direct
 * mapped), then by what the thunk depends on (so that the same instruction with other addresses shares one).
 */
#define _GNU_SOURCE
#include "x86/simd.h"

#include <Zydis/Mnemonic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CODE_BYTES (512u * 1024)
#define THUNK_MAX 512u                       /* longest thunk, generously */
#define FRONT_ENTRIES 2048u
#define BACK_ENTRIES 8192u                   /* power of two; at most half full */

typedef struct front_entry { uint64_t key[2]; x86_thunk_fn fn; } front_entry;
typedef struct back_key { uint8_t bytes[X86_REENCODE_MAX]; uint8_t gpr[3], kind; uint16_t light, pad; } back_key;
typedef struct back_entry { back_key key; x86_thunk_fn fn; } back_entry;

struct x86_native {
    uint8_t *rw, *rx;
    size_t used;
    unsigned count;
    uint64_t ferr_seen;
    front_entry front[FRONT_ENTRIES];
    back_entry back[BACK_ENTRIES];
    x86_thunk_frame frame;
};

uint8_t *x86_map_code(size_t bytes, void *near, uint8_t **exec)
{
    uint8_t *w = MAP_FAILED, *x = MAP_FAILED;
    int fd = memfd_create("libvm-code", MFD_CLOEXEC);
    if (fd < 0)
        return NULL;
    if (!ftruncate(fd, (off_t)bytes)) {
        w = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (w != MAP_FAILED)
            x = mmap(near, bytes, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    }
    close(fd);
    if (x == MAP_FAILED) {
        if (w != MAP_FAILED)
            munmap(w, bytes);
        return NULL;
    }
    *exec = x;
    return w;
}

static struct x86_native *native_create(void)
{
    struct x86_native *n = mmap(NULL, sizeof *n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (n == MAP_FAILED)
        return NULL;
    if ((n->rw = x86_map_code(CODE_BYTES, NULL, &n->rx)))
        return n;
    munmap(n, sizeof *n);
    return NULL;
}

void x86_native_destroy(x86_cpu *cpu)
{
    struct x86_native *n = cpu->native;
    if (!n)
        return;
    munmap(n->rw, CODE_BYTES);
    munmap(n->rx, CODE_BYTES);
    munmap(n, sizeof *n);
    cpu->native = NULL;
}

void x86_thunk_ready(x86_cpu *cpu)
{
    if (!cpu->native && !(cpu->native = native_create()))
        x86_leave(cpu, X86_STOP_INTERNAL);
}

x86_thunk_frame *x86_thunk_frame_of(x86_cpu *cpu)
{
    return &((struct x86_native *)cpu->native)->frame;
}

uint64_t *x86_ferr_seen(x86_cpu *cpu)
{
    x86_thunk_ready(cpu);
    return &((struct x86_native *)cpu->native)->ferr_seen;
}

/* ---- emitting ---- */
typedef struct emitter { uint8_t *p; } emitter;

enum { RAX = 0, RCX = 1, RDX = 2, RSI = 6, RDI = 7, R8 = 8, R9 = 9, R10 = 10, R11 = 11 };
#define OFF_GPR(i) ((int32_t)(offsetof(x86_cpu, gpr) + 8 * (i)))
#define OFF_IMAGE(o) ((int32_t)(offsetof(x86_cpu, fpu) + (o)))
#define OFF_XMM(i) OFF_IMAGE(160 + 16 * (i))
#define OFF_YMMH(i) OFF_IMAGE(576 + 16 * (i))
#define OFF_MMX(i) OFF_IMAGE(32 + 16 * (i))

static void put(emitter *e, unsigned n, const uint8_t *bytes)
{
    memcpy(e->p, bytes, n);
    e->p += n;
}
#define PUT(e, ...) put(e, sizeof((const uint8_t[]){ __VA_ARGS__ }), (const uint8_t[]){ __VA_ARGS__ })

static void put32(emitter *e, int32_t v)
{
    memcpy(e->p, &v, 4);
    e->p += 4;
}

/* ModRM for [base + disp32], base one of rdi, rsi, r9 (none needs a SIB byte). */
static void put_mem(emitter *e, unsigned reg, unsigned base, int32_t disp)
{
    PUT(e, (uint8_t)(0x80 | (reg & 7) << 3 | (base & 7)));
    put32(e, disp);
}

static void emit_gpr(emitter *e, bool is_store, unsigned host, unsigned guest)
{
    PUT(e, (uint8_t)(0x48 | (host >= 8) << 2), is_store ? 0x89 : 0x8b);
    put_mem(e, host, RDI, OFF_GPR(guest));
}

/* Legacy SSE moves leave the host's upper halves alone, which hold nothing of ours. */
static void emit_xmm(emitter *e, bool is_store, unsigned reg)
{
    if (reg >= 8)
        PUT(e, 0x44);
    PUT(e, 0x0f, is_store ? 0x11 : 0x10);
    put_mem(e, reg, RDI, OFF_XMM(reg));
}

static void emit_vex_xmm(emitter *e, bool is_store, unsigned reg)
{
    PUT(e, 0xc5, (uint8_t)((reg >= 8 ? 0 : 0x80) | 0x78), is_store ? 0x11 : 0x10);     /* vmovups */
    put_mem(e, reg, RDI, OFF_XMM(reg));
}

static void emit_load_ymm(emitter *e, unsigned reg)
{
    emit_vex_xmm(e, false, reg);
    PUT(e, 0xc4, (uint8_t)((reg >= 8 ? 0 : 0x80) | 0x63), (uint8_t)((~reg & 15) << 3 | 5), 0x18);   /* vinsertf128 */
    put_mem(e, reg, RDI, OFF_YMMH(reg));
    PUT(e, 1);
}

static void emit_store_ymm_high(emitter *e, unsigned reg)
{
    PUT(e, 0xc4, (uint8_t)((reg >= 8 ? 0 : 0x80) | 0x63), 0x7d, 0x19);                 /* vextractf128 */
    put_mem(e, reg, RDI, OFF_YMMH(reg));
    PUT(e, 1);
}

static void emit_zero_ymm_high(emitter *e, unsigned reg)
{
    for (int half = 0; half < 2; half++) {
        PUT(e, 0x48, 0xc7);
        put_mem(e, 0, RDI, OFF_YMMH(reg) + 8 * half);
        put32(e, 0);
    }
}

static void emit_load_vec(emitter *e, const x86_insn *in, unsigned reg)
{
    if (!(in->flags & X86_IF_VEX))
        emit_xmm(e, false, reg);
    else if (in->vl == 32)
        emit_load_ymm(e, reg);
    else
        emit_vex_xmm(e, false, reg);
}

static void emit_store_vec(emitter *e, const x86_insn *in, unsigned reg, bool full)
{
    if (!(in->flags & X86_IF_VEX)) {
        emit_xmm(e, true, reg);
        return;
    }
    emit_vex_xmm(e, true, reg);
    if (full)
        emit_store_ymm_high(e, reg);
    else
        emit_zero_ymm_high(e, reg);
}

static void emit_mmx(emitter *e, bool is_store, unsigned reg)
{
    PUT(e, 0x0f, is_store ? 0x7f : 0x6f);
    put_mem(e, reg, RDI, OFF_MMX(reg));
    if (is_store) {
        PUT(e, 0x66, 0xc7);                                   /* sign and exponent become ones (SDM vol. 1, 9.5.1) */
        put_mem(e, 0, RDI, OFF_MMX(reg) + 8);
        PUT(e, 0xff, 0xff);
    }
}

static void emit_mxcsr(emitter *e, bool is_store, size_t frame_offset)
{
    PUT(e, 0x41, 0x0f, 0xae);
    put_mem(e, is_store ? 3 : 2, R9, (int32_t)frame_offset);
}

static void emit_push_pop_flags(emitter *e, bool is_load)
{
    if (is_load) {
        PUT(e, 0x41, 0xff);                                   /* push [flags]; popfq */
        put_mem(e, 6, R9, (int32_t)offsetof(x86_thunk_frame, flags));
        PUT(e, 0x9d);
    } else {
        PUT(e, 0x9c, 0x41, 0x8f);                             /* pushfq; pop [flags] */
        put_mem(e, 0, R9, (int32_t)offsetof(x86_thunk_frame, flags));
    }
}

static unsigned host_gpr(const x86_operand *op)
{
    return op->enc == X86_ENC_REG ? R10 : op->enc == X86_ENC_VVVV ? R8 : R11;
}

static void load_operands(emitter *e, const x86_insn *in, unsigned props)
{
    if (props & SIMD_XMM0)
        emit_load_vec(e, in, 0);
    for (unsigned i = 0; i < in->nops && i < 4; i++) {
        const x86_operand *op = &in->op[i];
        if (op->kind == X86_OP_VEC)
            emit_load_vec(e, in, op->reg & 15);
        else if (op->kind == X86_OP_MMX)
            emit_mmx(e, false, op->reg & 7);
        else if (op->kind == X86_OP_GPR)
            emit_gpr(e, false, host_gpr(op), op->reg & 15);
    }
    if (props & SIMD_STR) {
        emit_gpr(e, false, RAX, X86_RAX);
        emit_gpr(e, false, RDX, X86_RDX);
    }
}

static void store_operands(emitter *e, const x86_insn *in, unsigned props)
{
    const x86_operand *op = &in->op[0];
    if (props & SIMD_STR) {
        if (props & SIMD_XMM0)
            emit_store_vec(e, in, 0, false);
        else
            emit_gpr(e, true, RCX, X86_RCX);
    }
    if (props & SIMD_NODEST || in->nops == 0)
        return;
    if (op->kind == X86_OP_VEC)
        emit_store_vec(e, in, op->reg & 15, op->size == 32);
    else if (op->kind == X86_OP_MMX)
        emit_mmx(e, true, op->reg & 7);
    else if (op->kind == X86_OP_GPR)
        emit_gpr(e, true, host_gpr(op), op->reg & 15);
}

static bool uses_mmx(const x86_insn *in)
{
    for (unsigned i = 0; i < in->nops && i < 4; i++)
        if (in->op[i].kind == X86_OP_MMX)
            return true;
    return false;
}

static void emit_simd(emitter *e, const x86_insn *in, unsigned props, const uint8_t *bytes, unsigned n)
{
    PUT(e, 0x49, 0x89, 0xd1);                                 /* mov r9, rdx */
    if (props & SIMD_FP) {
        emit_mxcsr(e, true, offsetof(x86_thunk_frame, host_mxcsr));
        emit_mxcsr(e, false, offsetof(x86_thunk_frame, mxcsr));
    }
    load_operands(e, in, props);
    put(e, n, bytes);
    if (props & SIMD_FLAGS)
        emit_push_pop_flags(e, false);
    if (props & SIMD_FP) {
        emit_mxcsr(e, true, offsetof(x86_thunk_frame, mxcsr_after));
        emit_mxcsr(e, false, offsetof(x86_thunk_frame, host_mxcsr));
    }
    store_operands(e, in, props);
    if (uses_mmx(in))
        PUT(e, 0x0f, 0x77);                                   /* emms */
    if (in->flags & X86_IF_VEX)
        PUT(e, 0xc5, 0xf8, 0x77);                             /* vzeroupper */
    PUT(e, 0xc3);
}

/* x87: the whole state goes through FXRSTOR and FXSAVE. FXSAVE and FNINIT do not wait, so an exception that the instruction
 * left pending stays in the saved status word and never fires on the host. */
static void emit_x87(emitter *e, const x86_insn *in, const uint8_t *bytes, unsigned n)
{
    (void)in;
    PUT(e, 0x49, 0x89, 0xd1);
    emit_mxcsr(e, true, offsetof(x86_thunk_frame, host_mxcsr));
    PUT(e, 0x41, 0xd9);                                       /* fnstcw */
    put_mem(e, 7, R9, (int32_t)offsetof(x86_thunk_frame, host_fcw));
    PUT(e, 0x49, 0x0f, 0xae);                                 /* fxrstor64 */
    put_mem(e, 1, R9, (int32_t)offsetof(x86_thunk_frame, fx));
    emit_push_pop_flags(e, true);
    put(e, n, bytes);
    emit_push_pop_flags(e, false);
    PUT(e, 0x49, 0x0f, 0xae);                                 /* fxsave64 */
    put_mem(e, 0, R9, (int32_t)offsetof(x86_thunk_frame, fx));
    PUT(e, 0xdb, 0xe3, 0x41, 0xd9);                           /* fninit; fldcw */
    put_mem(e, 5, R9, (int32_t)offsetof(x86_thunk_frame, host_fcw));
    emit_mxcsr(e, false, offsetof(x86_thunk_frame, host_mxcsr));
    PUT(e, 0xc3);
}

static void put_light_value(emitter *e, bool is_store, size_t frame_offset)
{
    PUT(e, 0x41, 0xdb);                                       /* fld, fstp tbyte [r9 + ...] */
    put_mem(e, is_store ? 7 : 5, R9, (int32_t)frame_offset);
}

/* fnstsw ax; if any exception flag is set: fnclex. Host code never sees the guest's flags, nor the guest the host's. */
static void emit_clear_x87_flags(emitter *e)
{
    PUT(e, 0xdf, 0xe0, 0xa8, 0x3f, 0x74, 0x02, 0xdb, 0xe2);
}

/* The values go through FLD and FSTP of extended format, which change and flag nothing. All exceptions are masked. */
static void emit_x87_light(emitter *e, unsigned light, const uint8_t *bytes, unsigned n)
{
    unsigned depth = (light & LIGHT_A ? 1 : 0) + (light & LIGHT_B ? 1 : 0) + (light & LIGHT_PUSH ? 1 : 0);
    depth -= light & LIGHT_POP2 ? 2 : light & LIGHT_POP ? 1 : 0;
    PUT(e, 0x49, 0x89, 0xd1);
    emit_clear_x87_flags(e);
    PUT(e, 0x41, 0xd9);                                       /* fnstcw; fldcw */
    put_mem(e, 7, R9, (int32_t)offsetof(x86_thunk_frame, host_fcw));
    PUT(e, 0x41, 0xd9);
    put_mem(e, 5, R9, (int32_t)offsetof(x86_thunk_frame, fcw));
    if (light & LIGHT_B)
        put_light_value(e, false, offsetof(x86_thunk_frame, b));
    if (light & LIGHT_A)
        put_light_value(e, false, offsetof(x86_thunk_frame, a));
    put(e, n, bytes);
    PUT(e, 0x41, 0xdd);                                       /* fnstsw */
    put_mem(e, 7, R9, (int32_t)offsetof(x86_thunk_frame, fsw));
    if (light & LIGHT_FLAGS)
        emit_push_pop_flags(e, false);
    if (light & LIGHT_TO_B && !(light & LIGHT_POP))
        PUT(e, 0xdd, 0xd8), depth--;                          /* fstp st0: a, above the result */
    if (light & (LIGHT_TO_A | LIGHT_TO_B))
        put_light_value(e, true, light & LIGHT_TO_A ? offsetof(x86_thunk_frame, a) : offsetof(x86_thunk_frame, b)), depth--;
    while (depth--)
        PUT(e, 0xdd, 0xd8);
    emit_clear_x87_flags(e);
    PUT(e, 0x41, 0xd9);
    put_mem(e, 5, R9, (int32_t)offsetof(x86_thunk_frame, host_fcw));
    PUT(e, 0xc3);
}

/* ---- caches ---- */
static void flush(struct x86_native *n)
{
    memset(n->front, 0, sizeof n->front);
    memset(n->back, 0, sizeof n->back);
    n->used = 0;
    n->count = 0;
}

bool x86_native_renew(x86_cpu *cpu)
{
    struct x86_native *n = cpu->native;
    uint8_t *rx, *rw = n ? x86_map_code(CODE_BYTES, NULL, &rx) : NULL;
    if (!rw)
        return !n;
    munmap(n->rw, CODE_BYTES);
    munmap(n->rx, CODE_BYTES);
    n->rw = rw;
    n->rx = rx;
    flush(n);
    return true;
}

static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t h = (a ^ (b << 29 | b >> 35)) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 32;
}

static back_entry *back_find(struct x86_native *n, const back_key *key)
{
    uint64_t w[3];
    memcpy(w, key, sizeof w);
    unsigned i = (unsigned)mix(mix(w[0], w[1]), w[2]) & (BACK_ENTRIES - 1);
    while (n->back[i].fn && memcmp(&n->back[i].key, key, sizeof *key))
        i = (i + 1) & (BACK_ENTRIES - 1);
    return &n->back[i];
}

/* x86_rename is by guest register, thunk names are by field: rewrite the register operands of a copy first. */
static unsigned reencode_fields(const x86_insn *in, uint8_t *bytes, back_key *key)
{
    x86_insn copy = *in;
    x86_rename map;
    x86_rename_init(&map);
    map.mem_base = RSI;
    for (unsigned i = 0, k = 0; i < in->nops && i < 4; i++) {
        if (in->op[i].kind != X86_OP_GPR || in->op[i].enc == X86_ENC_NONE)
            continue;
        if (k < 3)
            key->gpr[k++] = (uint8_t)(0x80 | in->op[i].enc << 4 | in->op[i].reg);
        copy.op[i].reg = (uint8_t)host_gpr(&in->op[i]);
    }
    return x86_reencode(&copy, &map, bytes);
}

static x86_thunk_fn make_thunk(x86_cpu *cpu, const x86_insn *in, unsigned light)
{
    struct x86_native *n = cpu->native;
    bool is_x87 = in->map == 0 && !(in->flags & X86_IF_VEX);
    unsigned props = x86_simd_properties(in);
    back_key key = { .kind = (uint8_t)(is_x87 | in->mode << 4), .light = (uint16_t)light };
    if (!is_x87 && !x86_simd_offered(cpu, in))
        return NULL;
    unsigned length = reencode_fields(in, key.bytes, &key);
    if (length == 0)
        return NULL;
    if (light & LIGHT_B)                                      /* ST(i) becomes ST(1) */
        key.bytes[length - 1] = (key.bytes[length - 1] & ~7u) | 1;
    back_entry *entry = back_find(n, &key);
    if (entry->fn)
        return entry->fn;
    if (n->used + THUNK_MAX > CODE_BYTES || n->count >= BACK_ENTRIES / 2) {
        flush(n);
        entry = back_find(n, &key);
    }
    emitter e = { n->rw + n->used };
    if (light)
        emit_x87_light(&e, light, key.bytes, length);
    else if (is_x87)
        emit_x87(&e, in, key.bytes, length);
    else
        emit_simd(&e, in, props, key.bytes, length);
    entry->key = key;
    entry->fn = (x86_thunk_fn)(uintptr_t)(n->rx + n->used);
    n->count++;
    n->used = (size_t)(e.p - n->rw + 15) & ~(size_t)15;
    return entry->fn;
}

static x86_thunk_fn find_thunk(x86_cpu *cpu, const x86_insn *in, unsigned light)
{
    struct x86_native *n = cpu->native;
    uint64_t key[2];                                       /* bytes behind the instruction are zero (decode.c) */
    memcpy(&key[0], in->bytes, 8);
    memcpy(&key[1], in->bytes + 7, 8);
    key[1] ^= in->mode | (light ? 0x80u : 0);
    front_entry *f = &n->front[mix(key[0], key[1]) & (FRONT_ENTRIES - 1)];
    if (f->fn && f->key[0] == key[0] && f->key[1] == key[1])
        return f->fn;
    x86_thunk_fn fn = make_thunk(cpu, in, light);
    f->key[0] = key[0];
    f->key[1] = key[1];
    f->fn = fn;
    return fn;
}

x86_thunk_fn x86_thunk(x86_cpu *cpu, const x86_insn *in)
{
    return find_thunk(cpu, in, 0);
}

x86_thunk_fn x86_thunk_light(x86_cpu *cpu, const x86_insn *in, unsigned light)
{
    return find_thunk(cpu, in, light);
}
