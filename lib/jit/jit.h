/* jit.h - what the files of the JIT share. The essay is in jit.c. */
#ifndef LIBVM_JIT_H
#define LIBVM_JIT_H

#include "core/core.h"
#include "x86/insn.h"
#include "jit/asm.h"

#ifdef VM_TINY_BLOCKS
#define JIT_MAX_INSNS 1
#else
#define JIT_MAX_INSNS 64 /* at most 64: sets of them are uint64_t */
#endif
#define JIT_INSN_OPS    12 /* room that one instruction has to find */
#define JIT_MAX_OPS     (JIT_MAX_INSNS * 6 + JIT_INSN_OPS)
#define JIT_MAX_SITES   (JIT_MAX_INSNS * 2)
#define JIT_MAX_SIDES   24 /* conditional exits from a block before its end */
#define JIT_MAX_EXTENTS 64
#define JIT_MORE_PAGES  3 /* of a trace, besides that it begins on */
#define JIT_BLOCK_BYTES 2048 /* code one block may need, stubs included: this, and so much for each instruction */
#define JIT_INSN_BYTES  512
#define JIT_ONE_BYTES   1024 /* code, or data, of one op or stub */
#define JIT_HASH_BITS   18
#define JIT_HASH        (1u << JIT_HASH_BITS) /* memory is touched as used */
#define JIT_PAGES       16384
#define JIT_STOPS       8

/* Everything that emitted code assumes beyond the bytes it was made from. */
#define JIT_KEY_CTX    0x0003u /* X86_CTX_* */
#define JIT_KEY_64     0x0004u /* 64-bit code; else 32-bit */
#define JIT_KEY_VEC    0x0008u /* vector registers and MXCSR are in the host's; SSE may run natively */
#define JIT_KEY_AVX    0x0010u /* VEX instructions may */
#define JIT_KEY_FLAT   0x0020u /* 32-bit: ES, CS, SS, DS are flat 4 GiB, stack is 32 bits wide */
#define JIT_KEY_FS     0x0040u /* 32-bit: FS is usable with limit 4 GiB */
#define JIT_KEY_GS     0x0080u /* 32-bit: GS is */
#define JIT_KEY_CHAIN  0x0100u /* no paging: direct jumps may be linked across pages */
#define JIT_KEY_AC     0x0200u /* alignment checks may fault: memory operands go to the semantic functions */
#define JIT_KEY_WINDOW 0x0400u /* linear is physical: reads of the largest RAM region need only a bounds check */
#define JIT_KEY_X87    0x0800u /* and so are the x87 registers; every x87 exception is masked. Implies VEC */
#define JIT_KEY_PLAIN  0x1000u /* no groups, no loop copies: goes on where a group could not be looked up */
#define JIT_KEY_RING0  0x2000u /* CPL 0 */
#define JIT_KEY_SHAPE  0x70000u /* which hooks there are everywhere: an index into jit.shapes (hook.c) */
#define JIT_TABLES     16      /* jump caches: by CTX | 64 | VEC */
#define JIT_LISTED     256     /* of one's entries are listed, so that it is emptied or set aside without a search */

typedef struct jit_block jit_block;

/* A place that may call C: what the helper must know to show exact state. */
typedef struct jit_site {
    uint64_t rip, next; /* of the instruction; of that behind it */
    jit_block *block;
    uint64_t target; /* where a CALL goes; 0: where the temporary says */
    uint32_t insn;   /* in the arena: the instruction, for what executes it whole or tells hooks of it; 0: not kept */
    uint16_t index;  /* instructions of the block retired before this one */
    uint16_t flags;  /* the instruction's, X86_IF_* */
    uint8_t mode, seg;
    uint8_t access, size, align;
    uint8_t leader_access, leader_size; /* a group's first access itself; size 0: no group */
    uint8_t in_window;                  /* a group that must lie in a window (1 + which) */
    int16_t leader_disp;
    uint16_t span;
    bool may_redo; /* the instruction from its start: no device is read for it */
    bool is_single; /* the access is the whole instruction: a failed RMW is done by its semantic function */
    bool is_end;    /* the block ends with it */
    bool in_shadow; /* of an STI in the block: x86_cpu.inhibit as long as anybody may look */
    bool is_quick;  /* a device may be asked without all the state in x86_cpu: see ask_device() */
} jit_site;            /* at multiples of 16 in the arena */

static inline void jit_place_rip(x86_cpu *cpu, const jit_site *s)
{
    cpu->rip = s->rip;
    cpu->next_rip = s->next;
    cpu->is_redirected = false;
}

/* A direct edge: a jmp that goes to its stub until linked. */
typedef struct jit_link {
    jit_block *from, *to;
    struct jit_link *next_in; /* list of links into `to` */
    uint64_t target;
    uint32_t key;         /* of the block it wants */
    uint32_t jump, stub;  /* rel32; both as offsets into the cache */
    bool needs_mem_entry; /* provides flags in memory only */
} jit_link;

typedef struct jit_extent {
    uint16_t begin, end; /* page offsets */
    uint16_t page;       /* 0: the block's; 1 + index into jit_unit.more */
} jit_extent;

/* Coverage: the counter of a branch inside a block, followed by the next instruction of its trace. */
typedef struct jit_edge {
    uint16_t insn;
    uint32_t index;
    const uint8_t *code; /* counts this one and those before; writable view */
} jit_edge;

/* A block's place in a list. */
typedef struct jit_chain { jit_block *next, **at; /* what points to the block; NULL: not in it */ } jit_chain;

struct jit_block {
    uint64_t rip, gpa;
    uint32_t key;
    uint16_t count;        /* instructions */
    bool is_traced;        /* made along a recorded path, or not worth it */
    bool is_dead, crosses; /* crosses: one instruction, its end on the next page (`twin` keeps watch there) */
    uint8_t bails;         /* times C could not look a group up whole */
    uint8_t *entry;        /* writable view: flags as `need` says */
    uint8_t *entry_mem;    /* flags in memory: from the dispatcher, indirect jumps, other pages */
    jit_chain by_rip, by_page, by_line; /* in jit.hash, pages, lines */
    jit_block *born_next; /* made after it: see make_room() in jit.c */
    jit_block *twin; /* a ring: blocks without code that keep watch on the other pages it was made from */
    jit_link *in;
    uint8_t nlinks, nextents;
    uint8_t nedges;
    jit_edge *edges;
    uint32_t round_index; /* coverage: the counter of the edge that leads back to the block's beginning */
    jit_link *links;
    jit_extent *extents; /* bytes it was made from: itself, looked-ahead targets */
};

/* CHECK: how the address is made host. ALONE looks it up; a LEADER looks up the whole span its group touches and keeps
 * the result in a slot; a MEMBER takes it from there. */
enum { JIT_CHECK_ALONE, JIT_CHECK_LEADER, JIT_CHECK_MEMBER };

typedef struct jit_op {
    uint8_t op, cc, access, size, reg, align;
    bool goes_on;        /* JUMP: no instruction's, the unit was full */
    uint8_t role, slot;  /* CHECK */
    uint16_t span;       /* LEADER: bytes from the group's lowest address */
    uint8_t span_access; /* LEADER: what the group does */
    int16_t disp;        /* CHECK and its access: offset from the host address made */
    int32_t adjust;      /* EA: added to the address (to the group's lowest, to an offset into the window) */
    uint8_t window;      /* CHECK and its access: 1 + window (0 reads, 1 writes), or 0 */
    bool is_direct;      /* in the window for sure: no address is made and nothing is looked up */
    uint16_t insn;       /* index into the block's instructions */
    int64_t imm;
    uint64_t target, fall;
} jit_op;

enum { JIT_NEED_HOST = 1, JIT_NEED_MEM = 2 };
enum jit_ir {
#define IR(name, operands, meaning) IR_##name,
#include "jit/ir.def"
#undef IR
    IR_COUNT
};

/* What is known of one guest instruction of the block being made. Flag masks are over X86_FL_ARITH. */
typedef struct jit_info {
    uint16_t read, written; /* written: always */
    uint16_t host_at;       /* bits that must be in the host's flags when it executes, for itself or for later */
    uint16_t exact_at;      /* bits somebody may look at when it leaves (or later) */
    uint16_t exact_after;
    bool is_side; /* a SIDE op; what its target needs: */
    uint8_t side_need;
    bool can_leave;  /* may fault or call out */
    bool falls_back; /* flags go in and come out through memory */
} jit_info;

/* What all translations depend on of the hooks there are. Those on little code are known to the blocks they concern. */
typedef struct jit_hook_id {
    const vm_hook *hook;
    vm_hook_fn fn;
    void *user;
    uint64_t lo, hi;
} jit_hook_id;
enum { JIT_SHAPES = 8, JIT_WIDE = 6 };
typedef struct jit_shape {
    uint32_t mask;              /* of cpu->hook_mask: block hooks; data hooks while every access asks */
    uint8_t watch, kinds[JIT_WIDE];
    jit_hook_id data[2];        /* only_data_hook() */
    jit_hook_id wide[JIT_WIDE]; /* code hooks on much, by kind, in the order of adding */
} jit_shape;

typedef struct jit_unit { /* one block being translated */
    struct jit *j;
    x86_cpu *cpu;
    uint64_t rip, gpa;
    uint32_t key;
    const uint8_t *page; /* host bytes of the code page */
    uint8_t bytes[15];   /* of a crossing instruction */
    unsigned count;
    x86_insn insn[JIT_MAX_INSNS];
    uint64_t insn_rip[JIT_MAX_INSNS];
    jit_info info[JIT_MAX_INSNS];
    unsigned nops;
    jit_op ops[JIT_MAX_OPS];
    unsigned entry_need, edge_need[2]; /* JIT_NEED_*; of the last op's target and fall */
    unsigned sides;
    unsigned nextents;
    jit_extent extents[JIT_MAX_EXTENTS];
    unsigned nedges; /* coverage.c */
    unsigned most; /* instructions of a block */
    jit_edge edges[JIT_MAX_INSNS];
    const uint8_t *edge_code;
    jit_block *block; /* being emitted */
    uint64_t forced; /* instructions that must fall back */
    bool no_groups;
    unsigned nhooked;
    uint16_t hooked[JIT_MAX_INSNS]; /* X86_HOOK_BIT()s of what is called before each instruction */
    const uint64_t *path; /* a trace: where its instructions were and, last, where it went on; or NULL */
    unsigned path_count;  /* instructions on it */
    unsigned nmore;
    struct {
        uint64_t la;
        const uint8_t *host;
    } more[JIT_MORE_PAGES]; /* pages that a trace may go to */
    bool crosses; /* page's bytes are a copy of one instruction from two pages */
} jit_unit;

typedef struct jit {
    vm_vcpu *vcpu;
    struct jit_unit *unit;           /* the block being translated */
    uint8_t *write_base, *exec_base; /* the code cache, twice */
    size_t code_bytes;
    uint8_t *code_start; /* after the thunks */
    jit_writer w;
    uint8_t *arena; /* blocks and sites */
    size_t arena_bytes, arena_used;
    jit_block *oldest, *newest; /* of those with code, dead ones too: in code and arena they follow each other in this order */
    jit_link *link;             /* the edge by which translated code was left, until its block goes; or NULL */
    size_t code_ready, arena_ready; /* committed by commit_ahead() */
    jit_block *hash[JIT_HASH];
    jit_block *pages[JIT_PAGES], *lines[JIT_PAGES]; /* by page of gpa; of rip */
    jit_shape shapes[JIT_SHAPES]; /* [0]: no hooks */
    unsigned shape_count, shape;
    uint32_t table_key[JIT_TABLES];
    bool table_used[JIT_TABLES];
    uint64_t table_touched[JIT_TABLES]; /* which 64ths of it may hold entries */
    uint64_t table_gigs[JIT_TABLES];    /* and of which gigabytes, modulo 64 */
    bool table_local[JIT_TABLES]; /* holds addresses of pages that are not global */
    uint16_t table_list[JIT_TABLES][JIT_LISTED]; /* the first entries made since it was empty */
    unsigned table_count[JIT_TABLES];            /* how many there are or were; > JIT_LISTED: more */
    uint64_t kills;                              /* counts blocks that went */
    struct {
        uint64_t kills;
        unsigned count;
        struct {
            uint64_t rip;
            const uint8_t *code;
            uint32_t key;
        } held[JIT_LISTED];
    } parks[VM_PARKS]; /* local entries of address spaces that the guest is not in */
    uint64_t stops[JIT_STOPS];
    unsigned stop_count, stop_next; /* addresses that no block contains or is linked to */
    int64_t r15_start;              /* value r15 had when instructions were last counted */
    int64_t slice, longest;         /* instructions after which the run loop looks round, now and at most */
    bool is_timed;                  /* a slice has ended: set_slice() wants to know how long the next one takes */
    uint64_t bounce_la, bounce_gpa;
    bool bounce_active, bounce_is_device; /* ...known to be at bounce_gpa */
    int64_t cold_done, cold; /* instructions interpreted before there is a code cache, so far and in all */
    bool must_step;     /* ...the instruction at rip, whoever wants attention */
    x86_stop hook_stop; /* JIT_LEAVE_HOOKED: why the run ends */
    bool in_code;       /* emitted code executes */
    jit_block *rounds[X86_ROUNDS]; /* whose rounds x86_cover.rounds[] counts */
    bool has_rounds, has_ended_rounds; /* any; of a block that is dead */
    bool is_cold;      /* the interpreter runs instead */
    bool is_left;      /* find_block() left this code to the interpreter for a while */
    bool step_one;     /* next instruction by the interpreter */
    bool has_vec;      /* guest code that runs now uses vector registers */
    bool has_x87;      /* and x87 registers */
    uint8_t
        x87_pointers[18]; /* image bytes 6..23 while the state is in registers: the host's own pointers mean nothing */
    uint8_t vec_ctx;      /* ...in this context */
    bool must_flush;      /* at the next block boundary */
    x86_form forms[X86_FORMS];
    uint8_t no_groups[1024]; /* by rip: blocks whose groups kept failing */
    uint8_t no_guard[1024];  /* by rip: CALLs that go to several places: traces end with them */
    bool has_avx, has_bmi2;
    bool shifts_define; /* all flags, see host_shifts_define() */
    bool window_stale;        /* the memory map changed */
    unsigned worth;         /* code is translated when it has been met so often: note_lap() */
    uint8_t met[1024];      /* by rip */
    uint64_t lap_retired, lap_blocks; /* since the code cache was full the last time: when that was; blocks made */
    uint64_t window_gpa[2];   /* for reads, for writes; in emitted code as constants: where it begins, and */
    uint64_t window_limit[2]; /* as blocks may have been made for: static accesses rely on it */
    int32_t window_delta[2];  /* how far its host memory is from the x86_cpu */
    unsigned window_margin;   /* pages beside code that the write window leaves out */
    struct {
        uint64_t last, until;
        uint32_t kills;
    } heat[256]; /* by code page: see note_heat() */
    struct {
        uint64_t rip;
        uint8_t count;
    } samples[256]; /* where slices ended: what is hot */
    uint64_t bounce[8] __attribute__((aligned(64)));
    /* thunks, executable view */
    uint8_t *enter[3];                                              /* by jit_level() */
    uint8_t *leave[3], *begin[3], *commit[3], *fallback[3], *after[3], *hook[3], *hook_left, *flags; /* writable view,
                                                                                                        for e_call_to */
    uint8_t *leave_link[3][2], *leave_slice[3][2];                              /* [1]: saves the flags first */
    uint8_t *check[3][2];                                                       /* [1]: the flags are in the host's */
} jit;

#define JIT_GROUPS 13
/* General registers that have none of the host's: see emit.c's register plan. */
#define JIT_IN_FRAME(reg) ((reg) >= X86_R8 && (reg) <= X86_R11)
/* Slots of the frame on the host's stack, 8 bytes each: what blocks use most. */
enum {
    JIT_FRAME_R8, /* and R9-R11: JIT_IN_FRAME() */
    JIT_FRAME_FLAGS = 4 /* AL = OF, AH = LAHF; AL > 1: JIT_LAZY_FLAGS */,
    JIT_FRAME_FLAG_A,
    JIT_FRAME_FLAG_B,
    JIT_FRAME_TMP,
    JIT_FRAME_LIMIT, /* of the two windows: copies */
    JIT_FRAME_GROUP = 10,
    JIT_FRAME_HOMES = JIT_FRAME_GROUP + JIT_GROUPS, /* the others, by number, during a direct call to a hook: see hook.c */
    JIT_FRAME_SLOTS = JIT_FRAME_HOMES + 16
};
/* Slots of x86_cpu.jit_scratch: what emitted code shares with C. */
enum {
    JIT_SLOT_SELF,
    JIT_SLOT_R15,
    JIT_SLOT_FLAGS /* these four as in the frame */,
    JIT_SLOT_FLAG_A,
    JIT_SLOT_FLAG_B,
    JIT_SLOT_TMP,
    JIT_SLOT_LINK,
    JIT_SLOT_REASON,
    JIT_SLOT_WINDOW_LIMIT /* offsets below it are inside, at any width */,
    JIT_SLOT_WRITE_LIMIT,
    JIT_SLOT_MXCSR,
    JIT_SLOT_LEAVE /* a callback asked for the run loop */,
    JIT_SLOT_X87_LAST /* site of the last x87 instruction not yet told to the image */,
    JIT_SLOT_X87_LAST_MEM /* the same, with a memory operand */,
    JIT_SLOT_X87_LA,
    JIT_SLOT_X87_NEXT_LA,
    JIT_SLOT_FRAME,
    JIT_SLOT_HOOK_LA /* of the access to be reported */,
    JIT_SLOT_HOOK_HOST
};
/* Flags not computed yet: the recipe's kind and width; FLAG_A is its first register (ADD, SUB, LOGIC: the result),
 * FLAG_B its second. */
#define JIT_LAZY_FLAGS(kind, size) ((kind) + 1u + ((size) << 8))
#define JIT_LAZY_IMM               0x80u /* the second operand is the upper half of the word itself */
/* jit_scratch[JIT_SLOT_REASON]: how emitted code left. */
enum {
    JIT_LEAVE_SLICE,
    JIT_LEAVE_LOOKUP,
    JIT_LEAVE_LINK,
    JIT_LEAVE_INDIRECT,
    JIT_LEAVE_VEC,
    JIT_LEAVE_X87,
    JIT_LEAVE_STEP, /* half-way through an instruction */
    JIT_LEAVE_GUARD /* in front of a CALL that did not go where the trace in the LINK slot says */,
    JIT_LEAVE_WATCHED /* in front of one that is the interpreter's */,
    JIT_LEAVE_HOOKED /* jit_hook_site decided */
};

#define JIT_OFF(field) ((int32_t)offsetof(x86_cpu, field))
#define JIT_SLOT(n)    ((int32_t)(offsetof(x86_cpu, jit_scratch) + 8 * (n)))

/* How much of the guest's floating-point state is in the host's registers: 0 none, 1 vectors, 2 x87 too. */
static inline unsigned jit_level(uint32_t key) { return key & JIT_KEY_X87 ? 2 : key & JIT_KEY_VEC ? 1 : 0; }
static inline const x86_insn *jit_site_insn(const jit *j, const jit_site *s) { return (const x86_insn *)(j->arena + s->insn); }
static inline unsigned jit_table_index(uint32_t key) { return key & (JIT_KEY_CTX | JIT_KEY_64 | JIT_KEY_VEC); }

/* jit.c */
bool jit_make_room(jit *j, size_t code, size_t data); /* at the cursors, for a block; older ones go. No code is being executed */
void *jit_take(jit *j, size_t bytes); /* from the arena, which has room */
void jit_place_extents(jit *j, const jit_unit *u, jit_block *b, unsigned page); /* b watches this page of the unit's */
/* Of the arena, for a block, its twins and lists; for each instruction: its sites, itself and hooks in front of it. */
#define JIT_LIST_DATA  (sizeof(jit_block) + JIT_MAX_EXTENTS * sizeof(jit_extent) + 4096)
#define JIT_BLOCK_DATA (JIT_LIST_DATA + JIT_MORE_PAGES * (sizeof(jit_block) + JIT_MAX_EXTENTS * sizeof(jit_extent) + 32))
#define JIT_INSN_DATA  (sizeof(x86_insn) + sizeof(jit_edge) + 2 * (sizeof(jit_link) + sizeof(jit_site) + sizeof(jit_hook_site) + 48))
/* lift.c */
bool jit_lift(jit_unit *u,
              unsigned max_insns); /* false: the first instruction cannot be handled here (cut off by the page) */
enum { JIT_LOOK_AHEAD = 8 }; /* instructions: no shorter block ends but where its code makes it */
unsigned jit_flag_need(jit_unit *u, uint64_t rip, jit_extent *extent); /* JIT_NEED_* of code at rip on this page */
void jit_flags_before(const x86_insn *in, jit_info *f, uint16_t *host, uint16_t *exact);
void jit_classify_flags(const x86_insn *in, jit_info *info);
bool jit_insn_can_leave(const jit_unit *u, const x86_insn *in);
bool jit_crosses_page(const jit_unit *u, uint64_t rip);
bool jit_insn_is_x87(const x86_insn *in);
bool jit_insn_is_mov(const x86_insn *in);
bool jit_insn_moves(const x86_insn *in); /* MOV, MOVZX, MOVSX, MOVSXD, MOVBE */
bool jit_insn_pushes(const x86_insn *in); /* CALL, PUSH */
bool jit_insn_is_idiv(const x86_insn *in);
bool jit_insn_may_redo(const x86_insn *in); /* it reads memory before something that can fault: DIV, IDIV, CALL, PUSH */
bool jit_insn_clears_if(const x86_insn *in); /* CLI */
bool jit_insn_is_swapgs(const x86_insn *in);
bool jit_insn_compares(const x86_insn *in); /* CMP of a register with a constant */
bool jit_insn_sets_if(const jit_unit *u, unsigned i); /* STI with an instruction behind it in the block */
bool jit_in_shadow(const jit_unit *u, unsigned i); /* of an STI before it */
unsigned jit_frame_operands(const x86_insn *in); /* how many are registers in the frame */
bool jit_insn_only_writes(const x86_insn *in, unsigned k); /* operand k: the whole of the register */
bool jit_insn_names_sp(const x86_insn *in); /* as an operand, not in an address */
bool jit_insn_falls_back(const jit_unit *u, const x86_insn *in);
unsigned jit_insn_access(const x86_insn *in); /* X86_READ/X86_WRITE of the memory operand */
enum { JIT_RECIPE_NONE, JIT_RECIPE_CMP, JIT_RECIPE_TEST, JIT_RECIPE_ADD, JIT_RECIPE_SUB, JIT_RECIPE_LOGIC };
enum { JIT_MOVE_NONE, JIT_MOVE_COPY /* dst = src + imm */, JIT_MOVE_ADD /* dst += imm */ };
unsigned jit_pointer_move(const x86_insn *in, unsigned *src,
                          int64_t *imm); /* full-width pointer arithmetic the group pass follows */
unsigned jit_recipe_kind(const x86_insn *in);
typedef struct jit_most { /* upper bounds of a register: of its value, of its lower half */
    uint64_t all;
    uint32_t low;
} jit_most;
static const jit_most jit_unbounded = {UINT64_MAX, UINT32_MAX};
/* What a native instruction lets one know of its result; `before` it and now. */
void jit_bound(const x86_insn *in, const jit_most before[16], jit_most now[16]);
uint16_t jit_changed_regs(const x86_insn *in);      /* general-purpose registers a natively handled form may change */
/* opt.c */
void jit_optimise(jit_unit *u);
/* emit.c */
/* NULL: the cache is too small (*failed is JIT_NONE), it is more code than so many instructions should be (JIT_FULL), or
 * instruction *failed cannot be spelled natively. */
enum { JIT_NONE = -1, JIT_FULL = -2 };
jit_block *jit_emit(jit_unit *u, int *failed);
void jit_emit_thunks(jit *j);
/* string.c */
enum { JIT_USUAL_JUMPS = 6 };
bool jit_string_form(const jit_unit *u, unsigned i); /* MOVS or STOS that needs C only for what is rare */
unsigned jit_emit_string(const jit_unit *u, unsigned i, uint8_t *jump[JIT_USUAL_JUMPS]);
/* coverage.c: nothing unless something is recorded. Flags may be lost where it is not said otherwise. */
#define JIT_COVER_BYTES 192 /* that it may add for each instruction */
void jit_cover_unit(jit_unit *u); /* a block begins */
/* The block is left after instruction i for `target`: its edge and those before. Uses both scratch registers. */
void jit_cover_edge(jit_unit *u, jit_writer *w, unsigned i, uint64_t target, bool keep_flags);
void jit_cover_indirect(jit_unit *u, jit_writer *w, unsigned i, unsigned reg); /* for the address in reg; keeps reg */
void jit_cover_undo_indirect(jit_unit *u, jit_writer *w, unsigned i, unsigned reg, unsigned spare); /* the last edge only */
void jit_cover_stubs(jit_unit *u, jit_writer *w); /* out of line, before the first stub that leaves in the middle */
void jit_cover_leave(jit_unit *u, jit_writer *w, unsigned insn); /* edges of instructions before `insn` */
void jit_cover_add(x86_cpu *cpu, const jit_block *b, unsigned insn, int sign); /* its edges before an instruction */
void jit_cover_rounds(jit *j, x86_cpu *cpu); /* all rounds into the map */
void jit_cover_forget(jit *j, const jit_block *b); /* a block dies; NULL: all have gone */
/* print.c */
void jit_print(jit *j, const jit_unit *u, const jit_block *b); /* after a translation, by LIBVM_TRACE=ir,mcode */
/* hook.c */
enum { JIT_HOOK_ENTRY = 0xff, JIT_HOOK_IMM = 0xff };
typedef struct jit_hook_site {
    jit_site site; /* first */
    vm_hook *hook; /* NULL: several, see call_all() */
    vm_hook_fn fn;
    void *user;
    uint64_t gpa;
    vm_hook_event event;
    uint8_t value_reg; /* MEM_WRITE: the register that is stored; JIT_HOOK_IMM: event.value is static */
    uint8_t state; /* X86_BLOCK_* at this place, or JIT_HOOK_ENTRY: as x86_cpu.block_state says */
    uint8_t bytes[16];
} jit_hook_site;
#define JIT_MAX_HOOKED 32 /* instructions with hooks in a block */
uint64_t jit_hook_callee(const vm_machine *m); /* where the function of the first hook is, or the library's */
void jit_hooks_shape(jit *j); /* j->shape, for the hooks there are */
void jit_hooks_changed(vm_vcpu *cpu, unsigned seen);
unsigned jit_hook_kinds(const jit_unit *u, uint64_t rip, unsigned length, bool begins_block);
bool jit_hook_is_near(const jit_unit *u, unsigned i); /* the unit up to instruction i calls hooks */
bool jit_hooks_want_interpreter(x86_cpu *cpu);
bool jit_hook_steps(x86_cpu *cpu, const jit_site *s, uint64_t la);
void jit_hook_fill(const jit_unit *u, jit_hook_site *h, unsigned i);
bool jit_hook_is_direct(const jit_unit *u);
/* from: the instruction of the last such call in the unit, -1: none */
typedef struct jit_hook_flags {
    bool save;    /* they are the host's only: to memory and T1 first */
    bool restore; /* T1 has their image (who saves them leaves it there): the host's again afterwards */
} jit_hook_flags;
uint8_t *jit_hook_call(const jit_unit *u, jit_writer *w, const jit_hook_site *h, uint32_t at, int from, jit_hook_flags flags);
unsigned jit_access_hooked(const jit_unit *u, unsigned access); /* the part of it that data hooks want to see */
bool jit_access_falls_back(const jit_unit *u, const x86_insn *in);
void jit_access_fill(const jit_unit *u, jit_hook_site *h, const jit_op *check, const jit_op *access);
uint8_t *jit_access_call(const jit_unit *u, jit_writer *w, const jit_hook_site *h, uint32_t at, int from);
uint8_t *jit_hook_entry(jit_writer *w);
void jit_hook_entry_stub(const jit_unit *u, jit_writer *w, uint8_t *jump, const uint8_t *resume);
void jit_hook_edge(const jit_unit *u, jit_writer *w, unsigned i, bool goes_on);
void jit_hook_leave(const jit_unit *u, jit_writer *w, unsigned i);
void jit_get_state(vm_vcpu *vcpu, unsigned parts);
void jit_set_state(vm_vcpu *vcpu, unsigned parts);
void jit_hook_disturb(x86_cpu *cpu); /* a callback changed something: leave the block after it */
uint64_t jit_hook_retired(const jit *j, const x86_cpu *cpu);
uint64_t jit_help_hook(x86_cpu *cpu, uint32_t at);
uint64_t jit_help_hook_left(x86_cpu *cpu, uint64_t answer, uint32_t at);
void jit_hook_after(x86_cpu *cpu, const jit_site *s, bool leaves);
void jit_hook_half_way(x86_cpu *cpu);
/* jit.c, for hook.c */
void jit_count_retired(jit *j, x86_cpu *cpu, unsigned index);
void jit_load_flags(x86_cpu *cpu);
void jit_fetch_frame(x86_cpu *cpu, bool has_homes); /* what the frame holds, to x86_cpu; the flags exact */
void jit_store_flags(x86_cpu *cpu);
jit_site *jit_begin_helper(x86_cpu *cpu, uint32_t at);
void jit_end_helper(jit *j, x86_cpu *cpu, const jit_site *s);
/* jit.c: helpers called by emitted code */
uint8_t *jit_help_begin(x86_cpu *cpu, uint64_t la, uint32_t site);
uint64_t jit_help_commit(x86_cpu *cpu, uint32_t site);
uint64_t jit_help_fallback(x86_cpu *cpu, uint32_t site);
uint64_t jit_help_after(x86_cpu *cpu, uint32_t site); /* leaves */
#define JIT_OUT 1 /* what they return to leave the block */
bool jit_is_stop(const jit *j, uint64_t rip);
bool jit_has_no_guard(const jit *j, uint64_t rip);
void jit_drop_code(jit *j, uint64_t lo, uint64_t hi, bool is_gpa);
void jit_kill_block(jit *j, jit_block *b);
static inline unsigned jit_hash_block(uint64_t rip) { return (unsigned)(rip * UINT64_C(0x9e3779b97f4a7c15) >> (64 - JIT_HASH_BITS)); }
bool jit_vec_allowed(const x86_cpu *cpu);
bool jit_x87_allowed(const x86_cpu *cpu);
void jit_load_x87_pointers(jit *j, x86_cpu *cpu);
void jit_keep_x87_pointers(jit *j, const x86_cpu *cpu);

/* window.c */
void jit_find_windows(jit *j);
void jit_note_code_page(jit *j, uint64_t gpa); /* it holds code now: the write window is cut */

#endif
