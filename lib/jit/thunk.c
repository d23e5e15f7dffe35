/* thunk.c - the ways between C and translated code, emitted once for each cache: into it and out, the calls of helpers,
 * flags that were left as a recipe. Each stub is short because of them. See emit.c for the register plan. */
#include "jit/frame.h"

/* The frame's slots and where C knows them. All go out; what C may have changed comes back. */
static const struct {
    uint8_t slot;
    bool comes_back;
    int32_t at;
} frame_map[] = {{JIT_FRAME_R8 + 0, true, GPR(X86_R8)},
                 {JIT_FRAME_R8 + 1, true, GPR(X86_R9)},
                 {JIT_FRAME_R8 + 2, true, GPR(X86_R10)},
                 {JIT_FRAME_R8 + 3, true, GPR(X86_R11)},
                 {JIT_FRAME_FLAGS, true, JIT_SLOT(JIT_SLOT_FLAGS)},
                 {JIT_FRAME_FLAG_A, false, JIT_SLOT(JIT_SLOT_FLAG_A)},
                 {JIT_FRAME_FLAG_B, false, JIT_SLOT(JIT_SLOT_FLAG_B)},
                 {JIT_FRAME_TMP, false, JIT_SLOT(JIT_SLOT_TMP)}};
enum { FRAME_MAP = sizeof frame_map / sizeof *frame_map, FRAME_BYTES = (8 * JIT_FRAME_SLOTS + 15) & ~15 };

static void emit_spill_homes(jit_writer *w)
{
    for (unsigned g = 0; g < 16; g++)
        if (!JIT_IN_FRAME(g)) e_gs_store(w, 8, home[g], GPR(g));
}
static void emit_reload_homes(jit_writer *w)
{
    for (unsigned g = 0; g < 16; g++)
        if (!JIT_IN_FRAME(g)) e_gs_load(w, 8, home[g], GPR(g));
}

/* Registers to the x86_cpu. `pushed`: bytes on the stack above the frame. */
static void emit_spill(jit_writer *w, int32_t pushed)
{
    emit_spill_homes(w);
    for (unsigned i = 0; i < FRAME_MAP; i++) {
        e_r_mem(w, 8, 0x8b, RAX, RSP, 0xff, 1, 8 * frame_map[i].slot + pushed);
        e_gs_store(w, 8, RAX, frame_map[i].at);
    }
}
static void emit_reload(jit_writer *w, int32_t pushed)
{
    for (unsigned i = 0; i < FRAME_MAP; i++) {
        if (!frame_map[i].comes_back) continue;
        e_gs_load(w, 8, RAX, frame_map[i].at);
        e_r_mem(w, 8, 0x89, RAX, RSP, 0xff, 1, 8 * frame_map[i].slot + pushed);
    }
    for (unsigned i = 0; i < 2; i++) {
        e_gs_load(w, 8, RAX, JIT_SLOT(JIT_SLOT_WINDOW_LIMIT + i));
        e_r_mem(w, 8, 0x89, RAX, RSP, 0xff, 1, (int32_t)(8 * (JIT_FRAME_LIMIT + i)) + pushed);
    }
    emit_reload_homes(w);
}

#define FPU(n) ((int32_t)(offsetof(x86_cpu, fpu) + (n)))
static void emit_mxcsr(jit_writer *w, unsigned op, int32_t disp) { /* /2 ldmxcsr, /3 stmxcsr gs:[disp] */
    e8(w, 0x65), e8(w, 0x0f), e8(w, 0xae), e8(w, op << 3 | 4), e8(w, 0x25), e32(w, (uint32_t)disp);
}
/* Register n from or to the XSAVE image. */
enum { VEC_STORE, VEC_LOAD_128, VEC_LOAD_256 };
static void emit_vec(jit *j, unsigned n, unsigned how)
{
    jit_writer *w = &j->w;
    e8(w, 0x65);
    if (how == VEC_LOAD_256) /* vmovups xmm, m128 */
        e8(w, 0xc5), e8(w, n >= 8 ? 0x78 : 0xf8), e8(w, 0x10);
    else { /* movups */
        if (n >= 8) e8(w, 0x44);
        e8(w, 0x0f), e8(w, how == VEC_STORE ? 0x11 : 0x10);
    }
    e8(w, (n & 7) << 3 | 4), e8(w, 0x25), e32(w, (uint32_t)FPU(160 + 16 * n));
    if (!j->has_avx || how == VEC_LOAD_128) return;
    e8(w, 0x65), e8(w, 0xc4), e8(w, n >= 8 ? 0x63 : 0xe3);
    if (how == VEC_STORE) /* vextractf128 m128, ymm, 1 */
        e8(w, 0x7d), e8(w, 0x19);
    else /* vinsertf128 ymm, ymm, m128, 1 */
        e8(w, ((~n & 15) << 3) | 5), e8(w, 0x18);
    e8(w, (n & 7) << 3 | 4), e8(w, 0x25), e32(w, (uint32_t)FPU(576 + 16 * n)), e8(w, 1);
}
static void emit_fx(jit_writer *w, unsigned n) { /* /0 fxsave64, /1 fxrstor64 */
    e8(w, 0x65), e8(w, 0x48), e8(w, 0x0f), e8(w, 0xae), e8(w, n << 3 | 4), e8(w, 0x25), e32(w, (uint32_t)FPU(0));
}
static void emit_vec_spill(jit *j, unsigned level)
{
    if (level == 2) {
        emit_fx(&j->w, 0);
        e8(&j->w, 0xdb), e8(&j->w, 0xe3); /* fninit: C expects an empty stack */
    }
    emit_mxcsr(&j->w, 3, FPU(24));
    emit_mxcsr(&j->w, 2, JIT_SLOT(JIT_SLOT_MXCSR));
    for (unsigned n = 0; n < 16; n++) emit_vec(j, n, VEC_STORE);
}
/* Upper halves that are zero are made so with VZEROUPPER: loaded as zeros they would count as in use, and each legacy
 * SSE instruction would have to merge with (and wait for) the register's old value. */
static void emit_vec_reload(jit *j, unsigned level)
{
    jit_writer *w = &j->w;
    if (level == 2) emit_fx(w, 1);
    uint8_t *clean = NULL, *done = NULL;
    if (j->has_avx) {
        e8(w, 0xc5), e8(w, 0xf8), e8(w, 0x77); /* vzeroupper */
        for (unsigned n = 0; n < 16; n++) {    /* movdqa/por xmm0, gs:[upper n] */
            e8(w, 0x65), e8(w, 0x66), e8(w, 0x0f), e8(w, n ? 0xeb : 0x6f), e8(w, 0x04), e8(w, 0x25);
            e32(w, (uint32_t)FPU(576 + 16 * n));
        }
        ebytes(w, "\x66\x0f\x38\x17\xc0", 5); /* ptest xmm0, xmm0 */
        clean = e_jcc(w, CC_E);
        for (unsigned n = 0; n < 16; n++) emit_vec(j, n, VEC_LOAD_256);
        done = e_jmp(w);
        e_patch(clean, w->p);
    }
    for (unsigned n = 0; n < 16; n++) emit_vec(j, n, VEC_LOAD_128);
    if (done) e_patch(done, w->p);
    emit_mxcsr(&j->w, 2, FPU(24));
}

static const uint8_t saved[] = {RBX, RBP, R12, R13, R14, R15};

/* void enter(const void *code): GS base is set. */
static uint8_t *emit_enter(jit *j, unsigned vec)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    for (unsigned i = 0; i < sizeof saved; i++) emit_push_pop(w, saved[i], true);
    e_alu_imm(w, 8, 5, RSP, 8 + FRAME_BYTES);
    e_mov(w, 8, T0, RDI);
    if (vec) {
        emit_mxcsr(w, 3, JIT_SLOT(JIT_SLOT_MXCSR));
        emit_vec_reload(j, vec);
    }
    e_gs_load(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15));
    e_gs_store(w, 8, RSP, JIT_SLOT(JIT_SLOT_FRAME));
    emit_reload(w, 0);
    e_rex(w, 4, 0, 0, T0);
    e8(w, 0xff), e8(w, 0xe0u | (T0 & 7)); /* jmp r14 */
    return start;
}

/* Back to C. `pushed`: bytes on the stack above the frame. */
static void emit_return(jit_writer *w, int32_t pushed)
{
    e_alu_imm(w, 8, 0, RSP, 8 + FRAME_BYTES + pushed);
    for (unsigned i = sizeof saved; i-- > 0;) emit_push_pop(w, saved[i], false);
    e8(w, 0xc3);
}

/* T0 = rip, T1 = reason: back to C. */
static uint8_t *emit_leave(jit *j, unsigned vec)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    e_gs_store(w, 8, T0, JIT_OFF(rip));
    e_gs_store(w, 8, T1, JIT_SLOT(JIT_SLOT_REASON));
    e_gs_store(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15));
    emit_spill(w, 0);
    if (vec) emit_vec_spill(j, vec);
    if (vec && j->has_avx) e8(w, 0xc5), e8(w, 0xf8), e8(w, 0x77); /* vzeroupper */
    emit_return(w, 0);
    return start;
}

/* The ways out that blocks take most, so that their stubs are short. T0 = the link, or rip for JIT_LEAVE_SLICE. `save`: the
 * flags first. */
static uint8_t *emit_leave_by(jit *j, unsigned vec, unsigned reason, bool save)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    if (save) emit_save(w);
    if (reason == JIT_LEAVE_LINK) {
        e_gs_store(w, 8, T0, JIT_SLOT(JIT_SLOT_LINK));
        e_r_mem(w, 8, 0x8b, T0, T0, 0xff, 1, (int32_t)offsetof(jit_link, target));
    }
    e_mov_imm(w, T1, reason);
    e_jmp_to(w, j->leave[vec]);
    return start;
}

/* T1 = site: go on, or leave after its instruction if somebody asked for the run loop. `in_host`: the flags are. */
static uint8_t *emit_leave_check_thunk(jit *j, unsigned vec, bool in_host)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    e_mov(w, 8, T0, RCX); /* JRCXZ asks without the flags */
    e_gs_load(w, 4, RCX, JIT_SLOT(JIT_SLOT_LEAVE));
    e8(w, 0xe3), e8(w, 5);
    e_mov(w, 8, RCX, T0);
    e8(w, 0xeb), e8(w, 4);
    e_mov(w, 8, RCX, T0);
    e8(w, 0xc3);
    if (in_host) {
        e_mov(w, 8, T0, RAX);
        e8(w, 0x9f);                           /* lahf */
        e8(w, 0x0f), e8(w, 0x90), e8(w, 0xc0); /* seto al */
        e_r_mem(w, 4, 0x89, RAX, RSP, 0xff, 1, 8 * JIT_FRAME_FLAGS + 8);
        e_mov(w, 8, RAX, T0);
    }
    e_jmp_to(w, j->after[vec]);
    return start;
}

/* Call a helper from emitted code: T1 = site, T0 = address; the result comes back in T0. What lies in the frame C fetches
 * and stores itself, if it has to. JIT_OUT: it has said where and why to leave; all state is in the x86_cpu already. */
static uint8_t *emit_helper(jit *j, unsigned vec, const void *function, bool has_address, bool can_leave)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    emit_spill_homes(w);
    if (vec) emit_vec_spill(j, vec);
    if (vec && j->has_avx) e8(w, 0xc5), e8(w, 0xf8), e8(w, 0x77); /* vzeroupper */
    e_gs_store(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15));
    e_alu_imm(w, 8, 5, RSP, 8);
    e_gs_load(w, 8, RDI, JIT_SLOT(JIT_SLOT_SELF));
    if (has_address) e_mov(w, 8, RSI, T0);
    e_mov(w, 4, has_address ? RDX : RSI, T1);
    e_mov_imm(w, RAX, (uint64_t)(uintptr_t)function);
    e8(w, 0xff), e8(w, 0xd0); /* call rax */
    if (can_leave) {
        e_alu_imm(w, 8, 7, RAX, JIT_OUT);
        uint8_t *stay = e_jcc(w, CC_NE);
        emit_return(w, 16);
        e_patch(stay, w->p);
    }
    e_alu_imm(w, 8, 0, RSP, 8);
    e_mov(w, 8, T0, RAX);
    if (vec) emit_vec_reload(j, vec);
    e_gs_load(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15));
    emit_reload_homes(w);
    e8(w, 0xc3);
    return start;
}

/* One recipe in memory, carried out: the host's flags. */
static void emit_memory_recipe(jit_writer *w, unsigned kind, unsigned size)
{
    static const uint8_t ops[][2] = {[JIT_RECIPE_CMP] = {0x3b},
                                     [JIT_RECIPE_TEST] = {0x85},
                                     [JIT_RECIPE_ADD] = {0x2b, 0x03},
                                     [JIT_RECIPE_SUB] = {0x03, 0x2b},
                                     [JIT_RECIPE_LOGIC] = {0}};
    e_r_mem(w, size, 0x8b, T1, RSP, 0xff, 1, 8 * JIT_FRAME_FLAG_A + 8);
    if (kind == JIT_RECIPE_LOGIC) e_rr(w, size, 0x85, T1, T1);
    for (unsigned i = 0; i < 2; i++)
        if (ops[kind][i]) e_r_mem(w, size, ops[kind][i], T1, RSP, 0xff, 1, 8 * JIT_FRAME_FLAG_B + 8);
}

/* The flags in memory, image or recipe, become the host's. Keeps T0. */
static uint8_t *emit_flags_thunk(jit *j)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    e_r_mem(w, 4, 0x8b, T1, RSP, 0xff, 1, 8 * JIT_FRAME_FLAGS + 8);
    e_rr(w, 1, 0x84, T1, T1); /* test r13b, r13b: the immediate's bit is the sign */
    uint8_t *no_imm = e_jcc(w, CC_NS);
    emit_push_pop(w, T0, true);
    e_mov(w, 4, T0, T1);
    e_shift_imm(w, 4, 7, T0, 16);
    e_rr(w, 8, 0x63, T0, T0); /* movsxd */
    e_r_mem(w, 8, 0x89, T0, RSP, 0xff, 1, 8 * JIT_FRAME_FLAG_B + 16);
    emit_push_pop(w, T0, false);
    e_patch(no_imm, w->p);
    e_alu_imm(w, 4, 4, T1, 0xff7f);
    for (unsigned kind = JIT_RECIPE_CMP; kind <= JIT_RECIPE_LOGIC; kind++)
        for (unsigned size = 4; size <= 8; size += 4) {
            e_alu_imm(w, 4, 7, T1, (int32_t)JIT_LAZY_FLAGS(kind, size));
            uint8_t *other = e_jcc(w, CC_NE);
            emit_memory_recipe(w, kind, size);
            e8(w, 0xc3);
            e_patch(other, w->p);
        }
    emit_restore_from(w, 8);
    e8(w, 0xc3);
    return start;
}

/* After a direct call to a hook that has to be left: T0 = its answer, T1 = site. The registers are in x86_cpu. */
static uint8_t *emit_hook_left(jit *j)
{
    jit_writer *w = &j->w;
    uint8_t *start = w->p;
    e_alu_imm(w, 8, 5, RSP, 8);
    e_gs_load(w, 8, RDI, JIT_SLOT(JIT_SLOT_SELF));
    e_mov(w, 8, RSI, T0);
    e_mov(w, 4, RDX, T1);
    e_mov_imm(w, RAX, (uint64_t)(uintptr_t)jit_help_hook_left);
    e8(w, 0xff), e8(w, 0xd0); /* call rax */
    e_alu_imm(w, 8, 0, RSP, 8);
    e_gs_load(w, 8, CNT, JIT_SLOT(JIT_SLOT_R15));
    emit_reload(w, 8);
    e8(w, 0xc3);
    return start;
}

void jit_emit_thunks(jit *j)
{
    for (unsigned vec = 0; vec < 3; vec++) {
        j->enter[vec] = emit_enter(j, vec) + j->w.to_exec;
        j->leave[vec] = emit_leave(j, vec);
        j->begin[vec] = emit_helper(j, vec, (const void *)(uintptr_t)jit_help_begin, true, true);
        j->commit[vec] = emit_helper(j, vec, (const void *)(uintptr_t)jit_help_commit, false, true);
        j->hook[vec] = emit_helper(j, vec, (const void *)(uintptr_t)jit_help_hook, false, false);
        j->after[vec] = emit_helper(j, vec, (const void *)(uintptr_t)jit_help_after, false, true);
        for (unsigned k = 0; k < 2; k++) {
            j->leave_link[vec][k] = emit_leave_by(j, vec, JIT_LEAVE_LINK, k);
            j->leave_slice[vec][k] = emit_leave_by(j, vec, JIT_LEAVE_SLICE, k);
            j->check[vec][k] = emit_leave_check_thunk(j, vec, k);
        }
        j->fallback[vec] = emit_helper(j, vec, (const void *)(uintptr_t)jit_help_fallback, false, true);
    }
    j->hook_left = emit_hook_left(j);
    j->flags = emit_flags_thunk(j);
    j->code_start = j->w.p;
}
