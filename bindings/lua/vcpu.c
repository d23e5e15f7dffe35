/* vcpu.c - processors: registers, guest-virtual memory, running, exit records. */
#include "lvm.h"

lvm_vcpu *lvm_check_vcpu(lua_State *L, int arg)
{
    lvm_vcpu *v = luaL_checkudata(L, arg, LVM_VCPU);
    lvm_check_open(L, v->machine, arg);
    if (v->machine->tracing)
        luaL_error(L, "a trace function cannot use the machine");
    return v;
}

/* User values: 1 the machine, 2 the last exit. */
void lvm_new_vcpu(lua_State *L, vm_vcpu *cpu, lvm_machine *b, int machine)
{
    lvm_vcpu *v = lua_newuserdatauv(L, sizeof *v, 2);
    v->cpu = cpu;
    v->machine = b;
    v->ring[0] = v->ring[1] = NULL;
    luaL_setmetatable(L, LVM_VCPU);
    lua_pushvalue(L, machine);
    lua_setiuservalue(L, -2, 1);
}

/* ---- registers ---- */

/* Up to eight bytes are an integer, more a string of the register's bytes, lowest first. */
static int push_register(lua_State *L, vm_vcpu *cpu, int id)
{
    size_t bytes = vm_reg_size(id);
    union { uint64_t integer; uint8_t bytes[64]; } value = { 0 };
    int status = vm_vcpu_read_reg(cpu, id, &value, bytes);
    if (status != VM_OK)
        return luaL_error(L, "%s", vm_errmsg());
    if (bytes <= 8)
        lua_pushinteger(L, (lua_Integer)value.integer);
    else
        lua_pushlstring(L, (const char *)value.bytes, bytes);
    return 1;
}

static void set_register(lua_State *L, vm_vcpu *cpu, int id, int arg)
{
    size_t bytes = vm_reg_size(id), given;
    uint64_t integer;
    const void *value = &integer;
    if (bytes <= 8) {
        integer = (uint64_t)luaL_checkinteger(L, arg);
        if (bytes < 8 && integer >> 8 * bytes)
            lvm_refuse(L, arg, "too large for the register");
    } else {
        value = luaL_checklstring(L, arg, &given);
        if (given != bytes)
            luaL_argerror(L, arg, lua_pushfstring(L, "a string of %d bytes expected, got %d", (int)bytes, (int)given));
    }
    if (vm_vcpu_write_reg(cpu, id, value, bytes) != VM_OK)
        luaL_error(L, "%s", vm_errmsg());
}

/* cpu.rax; upvalues: methods, getters, register numbers by name */
static int vcpu_index(lua_State *L)
{
    lvm_vcpu *v = luaL_checkudata(L, 1, LVM_VCPU);
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(3)) == LUA_TNUMBER) {
        lvm_check_open(L, v->machine, 1);
        if (v->machine->tracing)
            return luaL_error(L, "a trace function cannot use the machine");
        return push_register(L, v->cpu, (int)lua_tointeger(L, -1));
    }
    return lvm_index(L, "register or field");
}

static int vcpu_newindex(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNUMBER)
        return luaL_error(L, "no such register: %s", luaL_tolstring(L, 2, NULL));
    set_register(L, v->cpu, (int)lua_tointeger(L, -1), 3);
    return 0;
}

static int check_register(lua_State *L, int arg)
{
    int id;
    if (lua_type(L, arg) == LUA_TNUMBER)
        id = (int)lvm_check_range(L, arg, VM_REG_COUNT - 1);
    else
        id = vm_reg_find(luaL_checkstring(L, arg));
    if (id <= 0 || id >= VM_REG_COUNT)
        lvm_refuse(L, arg, "no such register");
    return id;
}

static int vcpu_reg(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    return push_register(L, v->cpu, check_register(L, 2));
}

static int vcpu_set_reg(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    set_register(L, v->cpu, check_register(L, 2), 3);
    return 0;
}

/* Fields of the register structs, so that each is read, written and named once. */
typedef struct field { const char *name; uint16_t offset; uint8_t bytes, is_input; } field;
#define FIELD(type, name) { #name, offsetof(type, name), sizeof(((type *)0)->name), 1 }
static const field regs_fields[] = {
    FIELD(vm_regs, rax), FIELD(vm_regs, rcx), FIELD(vm_regs, rdx), FIELD(vm_regs, rbx), FIELD(vm_regs, rsp), FIELD(vm_regs, rbp),
    FIELD(vm_regs, rsi), FIELD(vm_regs, rdi), FIELD(vm_regs, r8), FIELD(vm_regs, r9), FIELD(vm_regs, r10), FIELD(vm_regs, r11),
    FIELD(vm_regs, r12), FIELD(vm_regs, r13), FIELD(vm_regs, r14), FIELD(vm_regs, r15), FIELD(vm_regs, rip), FIELD(vm_regs, rflags),
    { NULL, 0, 0, 0 },
};
static const field sregs_fields[] = {
    FIELD(vm_sregs, cr0), FIELD(vm_sregs, cr2), FIELD(vm_sregs, cr3), FIELD(vm_sregs, cr4), FIELD(vm_sregs, cr8),
    FIELD(vm_sregs, efer), FIELD(vm_sregs, xcr0), FIELD(vm_sregs, dr0), FIELD(vm_sregs, dr1), FIELD(vm_sregs, dr2),
    FIELD(vm_sregs, dr3), FIELD(vm_sregs, dr6), FIELD(vm_sregs, dr7), FIELD(vm_sregs, apic_base),
    { "cpl", offsetof(vm_sregs, cpl), 4, 0 },
    { NULL, 0, 0, 0 },
};
static const field segments[] = {
    FIELD(vm_sregs, es), FIELD(vm_sregs, cs), FIELD(vm_sregs, ss), FIELD(vm_sregs, ds), FIELD(vm_sregs, fs), FIELD(vm_sregs, gs),
    FIELD(vm_sregs, ldtr), FIELD(vm_sregs, tr), { NULL, 0, 0, 0 },
};
static const field segment_fields[] = {
    FIELD(vm_segment, base), FIELD(vm_segment, limit), FIELD(vm_segment, selector), FIELD(vm_segment, attributes), { NULL, 0, 0, 0 },
};
static const field dtables[] = { FIELD(vm_sregs, gdtr), FIELD(vm_sregs, idtr), { NULL, 0, 0, 0 } };
static const field dtable_fields[] = { FIELD(vm_dtable, base), FIELD(vm_dtable, limit), { NULL, 0, 0, 0 } };
static const field fpu_fields[] = {
    FIELD(vm_fpu, mxcsr), FIELD(vm_fpu, fcw), FIELD(vm_fpu, fsw), FIELD(vm_fpu, ftw), FIELD(vm_fpu, fop), FIELD(vm_fpu, fip),
    FIELD(vm_fpu, fdp), { NULL, 0, 0, 0 },
};

/* Into the table on top. */
static void push_fields(lua_State *L, const void *from, const field *f)
{
    for (; f->name; f++) {
        uint64_t value = 0;
        memcpy(&value, (const char *)from + f->offset, f->bytes);
        lua_pushinteger(L, (lua_Integer)value);
        lua_setfield(L, -2, f->name);
    }
}

static const field *find_field(const field *f, const char *name)
{
    while (f->name && strcmp(f->name, name))
        f++;
    return f->name ? f : NULL;
}

/* The integer on top into field f. */
static void set_field(lua_State *L, void *to, const field *f)
{
    int ok;
    uint64_t value = (uint64_t)lua_tointegerx(L, -1, &ok);
    if (!ok || (f->bytes < 8 && value >> 8 * f->bytes))
        luaL_error(L, "field '%s': an integer of %d bits expected, got %s", f->name, f->bytes * 8, luaL_tolstring(L, -1, NULL));
    if (f->is_input)
        memcpy((char *)to + f->offset, &value, f->bytes);
}

/* A table of nothing but such fields, on top. */
static void set_fields(lua_State *L, void *to, const field *fields, const char *what)
{
    if (!lua_istable(L, -1))
        luaL_error(L, "field '%s': table expected", what);
    for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1)) {
        const field *f = lua_type(L, -2) == LUA_TSTRING ? find_field(fields, lua_tostring(L, -2)) : NULL;
        if (!f)
            luaL_error(L, "no such field: %s", luaL_tolstring(L, -2, NULL));
        set_field(L, to, f);
    }
}

static int vcpu_regs(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_regs regs = VM_REGS_INIT;
    int status = vm_vcpu_get_regs(v->cpu, &regs);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_createtable(L, 0, 18);
    push_fields(L, &regs, regs_fields);
    return 1;
}

static int vcpu_set_regs(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_regs regs = VM_REGS_INIT;
    int status;
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 2);
    status = vm_vcpu_get_regs(v->cpu, &regs);
    if (status != VM_OK)
        return lvm_fail(L, status);
    set_fields(L, &regs, regs_fields, "");
    return lvm_done(L, vm_vcpu_set_regs(v->cpu, &regs));
}

static int vcpu_sregs(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_sregs sregs = VM_SREGS_INIT;
    int status = vm_vcpu_get_sregs(v->cpu, &sregs);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_createtable(L, 0, 26);
    push_fields(L, &sregs, sregs_fields);
    for (const field *f = segments; f->name; f++) {
        lua_createtable(L, 0, 4);
        push_fields(L, (char *)&sregs + f->offset, segment_fields);
        lua_setfield(L, -2, f->name);
    }
    for (const field *f = dtables; f->name; f++) {
        lua_createtable(L, 0, 2);
        push_fields(L, (char *)&sregs + f->offset, dtable_fields);
        lua_setfield(L, -2, f->name);
    }
    return 1;
}

static int vcpu_set_sregs(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_sregs sregs = VM_SREGS_INIT;
    int status;
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 2);
    status = vm_vcpu_get_sregs(v->cpu, &sregs);
    if (status != VM_OK)
        return lvm_fail(L, status);
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) {
        const char *name = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : "(not a string)";
        const field *f;
        if ((f = find_field(segments, name)))
            set_fields(L, (char *)&sregs + f->offset, segment_fields, name);
        else if ((f = find_field(dtables, name)))
            set_fields(L, (char *)&sregs + f->offset, dtable_fields, name);
        else if ((f = find_field(sregs_fields, name)))
            set_field(L, &sregs, f);
        else
            return luaL_error(L, "no such field: %s", name);
    }
    return lvm_done(L, vm_vcpu_set_sregs(v->cpu, &sregs));
}

/* st and ymm are lists, [0] to [7] and [0] to [15], of strings of 10 and 32 bytes. */
static int vcpu_fpu(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_fpu fpu = VM_FPU_INIT;
    int status = vm_vcpu_get_fpu(v->cpu, &fpu);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_createtable(L, 0, 9);
    push_fields(L, &fpu, fpu_fields);
    lua_createtable(L, 8, 1);
    for (int i = 0; i < 8; i++) {
        lua_pushlstring(L, (const char *)fpu.st[i], 10);
        lua_rawseti(L, -2, i);
    }
    lua_setfield(L, -2, "st");
    lua_createtable(L, 16, 1);
    for (int i = 0; i < 16; i++) {
        lua_pushlstring(L, (const char *)fpu.ymm[i], 32);
        lua_rawseti(L, -2, i);
    }
    lua_setfield(L, -2, "ymm");
    return 1;
}

/* A list of strings, on top, into rows of `stride` bytes. */
static void set_rows(lua_State *L, void *to, lua_Integer count, size_t bytes, size_t stride, const char *what)
{
    if (!lua_istable(L, -1))
        luaL_error(L, "field '%s': table expected", what);
    for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1)) {
        size_t given = 0;
        const char *text = lua_type(L, -1) == LUA_TSTRING ? lua_tolstring(L, -1, &given) : NULL;
        if (!lua_isinteger(L, -2) || lua_tointeger(L, -2) < 0 || lua_tointeger(L, -2) >= count || given != bytes)
            luaL_error(L, "field '%s': strings of %d bytes expected at 0 to %d", what, (int)bytes, (int)count - 1);
        memcpy((char *)to + (size_t)lua_tointeger(L, -2) * stride, text, bytes);
    }
}

static int vcpu_set_fpu(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_fpu fpu = VM_FPU_INIT;
    int status;
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 2);
    status = vm_vcpu_get_fpu(v->cpu, &fpu);
    if (status != VM_OK)
        return lvm_fail(L, status);
    for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) {
        const char *name = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : "(not a string)";
        const field *f = find_field(fpu_fields, name);
        if (f)
            set_field(L, &fpu, f);
        else if (!strcmp(name, "st"))
            set_rows(L, fpu.st, 8, 10, sizeof fpu.st[0], "st");
        else if (!strcmp(name, "ymm"))
            set_rows(L, fpu.ymm, 16, 32, sizeof fpu.ymm[0], "ymm");
        else
            return luaL_error(L, "no such field: %s", name);
    }
    return lvm_done(L, vm_vcpu_set_fpu(v->cpu, &fpu));
}

static int vcpu_msr(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t value = 0;
    int status = vm_vcpu_get_msr(v->cpu, (uint32_t)lvm_check_range(L, 2, UINT32_MAX), &value);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)value);
    return 1;
}

static int vcpu_set_msr(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint32_t msr = (uint32_t)lvm_check_range(L, 2, UINT32_MAX);
    return lvm_done(L, vm_vcpu_set_msr(v->cpu, msr, (uint64_t)luaL_checkinteger(L, 3)));
}

static int vcpu_set_mode(lua_State *L)
{
    static const char *const modes[] = { "reset", "real", "flat32", "flat64", NULL };
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    int mode = lvm_check_name(L, 2, modes, "mode"), status;
    lvm_call call;
    lvm_enter(L, v->machine, 1, &call);
    status = vm_vcpu_set_mode(v->cpu, (vm_mode)mode);
    return lvm_finish(L, v->machine, &call, status);
}

/* ---- guest-virtual memory ---- */

static int vcpu_translate(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t gva = (uint64_t)luaL_checkinteger(L, 2), gpa = 0;
    unsigned access = lvm_check_access(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, v->machine, 1, &call);
    status = vm_vcpu_translate(v->cpu, gva, (vm_prot)access, &gpa);
    lvm_leave(L, v->machine, &call);
    lvm_raise(L, v->machine);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)gpa);
    return 1;
}

static int vcpu_read(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t gva = (uint64_t)luaL_checkinteger(L, 2);
    size_t bytes = lvm_check_range(L, 3, 1u << 31);
    luaL_Buffer text;
    lvm_call call;
    char *to;
    int status;
    lua_settop(L, 3);
    to = luaL_buffinitsize(L, &text, bytes);
    lvm_enter(L, v->machine, 1, &call);
    status = vm_vcpu_read(v->cpu, gva, to, bytes);
    lvm_leave(L, v->machine, &call);
    luaL_pushresultsize(&text, status == VM_OK ? bytes : 0);
    lvm_raise(L, v->machine);
    return status == VM_OK ? 1 : lvm_fail(L, status);
}

static int vcpu_write(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t gva = (uint64_t)luaL_checkinteger(L, 2);
    size_t bytes;
    const char *text = luaL_checklstring(L, 3, &bytes);
    lvm_call call;
    int status;
    lvm_enter(L, v->machine, 1, &call);
    status = vm_vcpu_write(v->cpu, gva, text, bytes);
    return lvm_finish(L, v->machine, &call, status);
}

/* ---- running ---- */

/* { max_instructions, timeout (seconds), deadline_ns, until_ or ["until"], exceptions (list of vectors, or a mask), single_step,
 * signal_blocked, brief } */
void lvm_check_run_options(lua_State *L, int arg, vm_run_options *options)
{
    static const char *const known[] = { "max_instructions", "timeout", "deadline_ns", "until_", "until", "exceptions", "single_step",
                                        "signal_blocked", "brief", NULL };
    *options = (vm_run_options)VM_RUN_OPTIONS_INIT;
    if (lua_isnoneornil(L, arg))
        return;
    lvm_check_fields(L, arg, known);
    options->max_instructions = lvm_field_range(L, arg, "max_instructions", 0, INT64_MAX);
    options->deadline_ns = lvm_field_range(L, arg, "deadline_ns", 0, INT64_MAX);
    options->single_step = lvm_field_boolean(L, arg, "single_step");
    options->has_signal_blocked = lvm_field_boolean(L, arg, "signal_blocked");
    options->is_brief = lvm_field_boolean(L, arg, "brief");
    if (lvm_raw_field(L, arg, "timeout") != LUA_TNIL) {
        int ok;
        lua_Number seconds = lua_tonumberx(L, -1, &ok);
        if (!ok || !(seconds >= 0))
            luaL_argerror(L, arg, lua_pushfstring(L, "option 'timeout': seconds expected, got %s", luaL_tolstring(L, -1, NULL)));
        options->deadline_ns = seconds >= 1e9 ? UINT64_MAX / 2 : (uint64_t)(seconds * 1e9) + 1;
    }
    lua_pop(L, 1);
    for (int i = 3; i <= 4; i++) {
        if (lvm_raw_field(L, arg, known[i]) != LUA_TNIL) {
            lua_pop(L, 1);
            options->has_until = true;
            options->until = lvm_field_integer(L, arg, known[i], 0);
        } else {
            lua_pop(L, 1);
        }
    }
    if (lvm_raw_field(L, arg, "exceptions") == LUA_TTABLE) {
        for (lua_Integer i = 1; lua_rawgeti(L, -1, i) != LUA_TNIL; i++) {
            int ok;
            lua_Integer vector = lua_tointegerx(L, -1, &ok);
            if (!ok || vector < 0 || vector >= 32)
                luaL_argerror(L, arg, lua_pushfstring(L, "option 'exceptions': vectors 0 to 31 expected, got %s", luaL_tolstring(L, -1, NULL)));
            options->exception_exits |= UINT64_C(1) << vector;
            lua_pop(L, 1);
        }
        lua_pop(L, 2);
    } else {
        lua_pop(L, 1);
        options->exception_exits = lvm_field_integer(L, arg, "exceptions", 0);
    }
}

/* The exit the next run completes, from the vCPU's second user value. */
bool lvm_last_exit(lua_State *L, int vcpu, vm_exit *e)
{
    lvm_exit *last;
    lua_getiuservalue(L, vcpu, 2);
    last = lua_touserdata(L, -1);
    if (last)
        *e = last->e;
    lua_pop(L, 1);
    return last;
}

/* Pushes it and makes it the vCPU's last. */
void lvm_push_exit(lua_State *L, int vcpu, const vm_exit *e)
{
    lvm_exit *box = lua_newuserdatauv(L, sizeof *box, 1);
    box->e = *e;
    luaL_setmetatable(L, LVM_EXIT);
    lua_pushvalue(L, vcpu);
    lua_setiuservalue(L, -2, 1);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, vcpu, 2);
}

/* Runs are made in slices of this, so that a debug hook (lua's Ctrl-C is one) that somebody sets meanwhile is run soon. The
 * script does not see the slices. */
#define SLICE_NS UINT64_C(100000000)

typedef struct slices {
    const vm_run_options *wanted;
    lvm_vcpu *v;
    uint64_t  end, start;                /* host time, UINT64_MAX: none; instructions retired at the begin */
    lua_Hook  hook;
} slices;

static lua_Hook main_hook(lua_State *L)
{
    lua_Hook hook;
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    hook = lua_gethook(lua_tothread(L, -1));
    lua_pop(L, 1);
    return hook;
}

/* RIP is where the next run would not stop because it begins there. */
static bool is_at_breakpoint(lvm_vcpu *v, vm_exit *e)
{
    uint64_t base = 0;
    lvm_machine *b = v->machine;
    if (!b->break_count || vm_vcpu_read_reg(v->cpu, VM_REG_CS_BASE, &base, sizeof base) != VM_OK)
        return false;
    for (size_t i = 0; i < b->break_count; i++)
        if (b->breaks[i] == base + e->rip) {
            e->reason = VM_EXIT_BREAKPOINT;
            e->debug = (vm_exit_debug){ .access = VM_PROT_X, .address = base + e->rip };
            return true;
        }
    return false;
}

/* A slice has ended by its deadline. Is the run over? Else `run` is made ready for the next slice. */
static bool is_over(lua_State *L, const slices *s, vm_run_options *run, vm_exit *e)
{
    uint64_t now = lvm_now(), done = vm_vcpu_retired(s->v->cpu) - s->start;
    if (now >= s->end || main_hook(L) != s->hook || is_at_breakpoint(s->v, e))
        return true;
    if (run->has_until && e->rip == run->until && done)
        return e->reason = VM_EXIT_UNTIL, true;
    if (s->wanted->max_instructions) {
        if (done >= s->wanted->max_instructions)
            return e->reason = VM_EXIT_BUDGET, true;
        run->max_instructions = s->wanted->max_instructions - done;
    }
    run->deadline_ns = s->end - now < SLICE_NS ? s->end - now : SLICE_NS;
    return false;
}

/* `end`: somebody else may set it (under the lock) and kick. */
int lvm_run(lua_State *L, lvm_vcpu *v, int vcpu, const vm_run_options *options, vm_exit *e, const bool *end)
{
    lvm_machine *b = v->machine;
    uint64_t bit = UINT64_C(1) << vm_vcpu_index(v->cpu);
    slices s = { options, v, options->deadline_ns ? lvm_now() + options->deadline_ns : UINT64_MAX, vm_vcpu_retired(v->cpu), main_hook(L) };
    bool cuts = !options->max_instructions || vm_machine_backend(b->m) != VM_BACKEND_KVM;    /* which does not count */
    vm_run_options run = *options;
    lvm_call call;
    int status;
    if (cuts && (!run.deadline_ns || run.deadline_ns > SLICE_NS))
        run.deadline_ns = SLICE_NS;
    for (;;) {
        bool stale = b->stale_kicks & bit;
        b->stale_kicks &= ~bit;
        lvm_enter(L, b, vcpu, &call);
        status = vm_vcpu_run(v->cpu, &run, e);
        lvm_leave(L, b, &call);
        if (stale && (status != VM_OK || e->reason != VM_EXIT_KICK))
            b->stale_kicks |= bit;       /* still to come */
        else if (stale && !b->failed && !(end && *end))
            continue;
        if (b->failed || status != VM_OK || !cuts || e->reason != VM_EXIT_DEADLINE || (end && *end) || is_over(L, &s, &run, e))
            return status;
    }
}

static int vcpu_run(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    vm_run_options options;
    vm_exit e = VM_EXIT_INIT;
    int status;
    lvm_check_run_options(L, 2, &options);
    lvm_last_exit(L, 1, &e);
    v->machine->unreported &= ~(UINT64_C(1) << vm_vcpu_index(v->cpu));
    status = lvm_run(L, v, 1, &options, &e, NULL);
    if (v->machine->failed) {
        if (status == VM_OK) {
            lvm_push_exit(L, 1, &e);
            lua_pop(L, 1);
        }
        lvm_raise(L, v->machine);
    }
    if (status != VM_OK)
        return lvm_fail(L, status);
    lvm_push_exit(L, 1, &e);
    return 1;
}

static int vcpu_kick(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    v->machine->stale_kicks &= ~(UINT64_C(1) << vm_vcpu_index(v->cpu));
    vm_vcpu_kick(v->cpu);
    return 0;
}

static int vcpu_inject(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint8_t vector = (uint8_t)lvm_check_range(L, 2, 255);
    bool has_error = !lua_isnoneornil(L, 3);
    uint32_t error = has_error ? (uint32_t)lvm_check_range(L, 3, UINT32_MAX) : 0;
    return lvm_done(L, vm_vcpu_inject(v->cpu, vector, has_error, error));
}

/* ---- getters ---- */

static int get_machine(lua_State *L)
{
    luaL_checkudata(L, 1, LVM_VCPU);
    lua_getiuservalue(L, 1, 1);
    return 1;
}

static int get_index(lua_State *L)
{
    lua_pushinteger(L, vm_vcpu_index(lvm_check_vcpu(L, 1)->cpu));
    return 1;
}

static int get_retired(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)vm_vcpu_retired(lvm_check_vcpu(L, 1)->cpu));
    return 1;
}

static int get_last_exit(lua_State *L)
{
    luaL_checkudata(L, 1, LVM_VCPU);
    lua_getiuservalue(L, 1, 2);
    return 1;
}

static int vcpu_tostring(lua_State *L)
{
    lvm_vcpu *v = luaL_checkudata(L, 1, LVM_VCPU);
    if (lvm_is_open(v->machine))
        lua_pushfstring(L, "libvm.vcpu %d: %p", (int)vm_vcpu_index(v->cpu), v);
    else
        lua_pushfstring(L, "libvm.vcpu (machine closed): %p", v);
    return 1;
}

/* ---- exits ---- */

static const field io_fields[] = {
    FIELD(vm_exit, io.port), FIELD(vm_exit, io.width), FIELD(vm_exit, io.is_write), FIELD(vm_exit, io.count), FIELD(vm_exit, io.data),
    { NULL, 0, 0, 0 },
};
static const field mmio_fields[] = {
    FIELD(vm_exit, mmio.gpa), FIELD(vm_exit, mmio.gva), FIELD(vm_exit, mmio.width), FIELD(vm_exit, mmio.is_write),
    FIELD(vm_exit, mmio.is_fetch), FIELD(vm_exit, mmio.data), { NULL, 0, 0, 0 },
};
static const field exception_fields[] = {
    FIELD(vm_exit, exception.vector), FIELD(vm_exit, exception.has_error), FIELD(vm_exit, exception.error),
    FIELD(vm_exit, exception.address), { NULL, 0, 0, 0 },
};
static const field hypercall_fields[] = {
    FIELD(vm_exit, hypercall.number), FIELD(vm_exit, hypercall.result), { NULL, 0, 0, 0 },
};
static const field guest_fields[] = { FIELD(vm_exit, guest_exit.code), { NULL, 0, 0, 0 } };

static const field debug_fields[] = {
    FIELD(vm_exit, debug.is_watchpoint), FIELD(vm_exit, debug.access), FIELD(vm_exit, debug.bytes), FIELD(vm_exit, debug.address),
    FIELD(vm_exit, debug.value), { NULL, 0, 0, 0 },
};
static const field replay_fields[] = { FIELD(vm_exit, replay.position), FIELD(vm_exit, replay.status), { NULL, 0, 0, 0 } };

static const field *fields_of(int reason)
{
    switch (reason) {
    case VM_EXIT_IO: return io_fields;
    case VM_EXIT_BREAKPOINT: return debug_fields;
    case VM_EXIT_REPLAY: return replay_fields;
    case VM_EXIT_MMIO:
    case VM_EXIT_VIOLATION:
    case VM_EXIT_UNMAPPED: return mmio_fields;
    case VM_EXIT_EXCEPTION: return exception_fields;
    case VM_EXIT_HYPERCALL: return hypercall_fields;
    case VM_EXIT_GUEST_EXIT: return guest_fields;
    default: return NULL;
    }
}

/* Field `name` of this record: the part of the field's name after the dot. */
static const field *exit_field(const vm_exit *e, const char *name)
{
    const field *f = fields_of(e->reason);
    for (; f && f->name; f++)
        if (!strcmp(strchr(f->name, '.') + 1, name))
            return f;
    return NULL;
}

static void push_exit_field(lua_State *L, const vm_exit *e, const field *f)
{
    const char *name = strchr(f->name, '.') + 1;
    uint64_t value = 0;
    memcpy(&value, (const char *)e + f->offset, f->bytes);
    if (!strncmp(name, "is_", 3) || !strncmp(name, "has_", 4))
        lua_pushboolean(L, value != 0);
    else if (!strcmp(name, "access"))
        lvm_push_prot(L, (unsigned)value);
    else if (!strcmp(name, "status"))
        lua_pushinteger(L, (int32_t)value);
    else
        lua_pushinteger(L, (lua_Integer)value);
}

static int exit_index(lua_State *L)
{
    lvm_exit *x = luaL_checkudata(L, 1, LVM_EXIT);
    const char *name = luaL_checkstring(L, 2);
    const field *f;
    if (!strcmp(name, "reason"))
        lua_pushstring(L, vm_exit_name(x->e.reason));
    else if (!strcmp(name, "reason_code"))
        lua_pushinteger(L, x->e.reason);
    else if (!strcmp(name, "rip"))
        lua_pushinteger(L, (lua_Integer)x->e.rip);
    else if (!strcmp(name, "insn"))
        lua_pushlstring(L, (const char *)x->e.insn_bytes, x->e.insn_length <= 16 ? x->e.insn_length : 16);
    else if (!strcmp(name, "insn_bytes"))
        lua_pushlstring(L, (const char *)x->e.insn_bytes, 16);
    else if (!strcmp(name, "cpu"))
        lua_getiuservalue(L, 1, 1);
    else if (!strcmp(name, "hook") && x->e.reason == VM_EXIT_HOOK) {
        lvm_vcpu *v;
        lua_getiuservalue(L, 1, 1);
        v = lua_touserdata(L, -1);
        lua_getiuservalue(L, -1, 1);
        lua_getiuservalue(L, -1, 1);
        lvm_push_hook(L, v->machine, x->e.hook.hook);
    } else if (!strcmp(name, "args") && x->e.reason == VM_EXIT_HYPERCALL) {
        lua_createtable(L, 6, 0);
        for (int i = 0; i < 6; i++) {
            lua_pushinteger(L, (lua_Integer)x->e.hypercall.args[i]);
            lua_rawseti(L, -2, i + 1);
        }
    } else if ((f = exit_field(&x->e, name)))
        push_exit_field(L, &x->e, f);
    else
        lua_pushnil(L);                  /* not of this reason */
    return 1;
}

/* What a run completes with: data of a read, result of a hypercall. */
static int exit_newindex(lua_State *L)
{
    lvm_exit *x = luaL_checkudata(L, 1, LVM_EXIT);
    const char *name = luaL_checkstring(L, 2);
    if (!strcmp(name, "data") && x->e.reason == VM_EXIT_IO)
        x->e.io.data = (uint64_t)luaL_checkinteger(L, 3);
    else if (!strcmp(name, "data") && (x->e.reason == VM_EXIT_MMIO || x->e.reason == VM_EXIT_UNMAPPED))
        x->e.mmio.data = (uint64_t)luaL_checkinteger(L, 3);
    else if (!strcmp(name, "result") && x->e.reason == VM_EXIT_HYPERCALL)
        x->e.hypercall.result = (uint64_t)luaL_checkinteger(L, 3);
    else
        return luaL_error(L, "field '%s' of exit '%s' cannot be set", name, vm_exit_name(x->e.reason));
    return 0;
}

static int exit_tostring(lua_State *L)
{
    lvm_exit *x = luaL_checkudata(L, 1, LVM_EXIT);
    char text[400];
    vm_exit_format(&x->e, text, sizeof text);
    lua_pushstring(L, text);
    return 1;
}

/* A plain table of all there is: for loops, printing, tests. */
static int exit_next(lua_State *L)
{
    lvm_exit *x = luaL_checkudata(L, 1, LVM_EXIT);
    static const char *const always[] = { "reason", "rip", "insn", NULL };
    const char *name;
    lua_newtable(L);
    for (int i = 0; always[i]; i++) {
        lua_getfield(L, 1, always[i]);
        lua_setfield(L, -2, always[i]);
    }
    for (const field *f = fields_of(x->e.reason); f && f->name; f++) {
        push_exit_field(L, &x->e, f);
        lua_setfield(L, -2, strchr(f->name, '.') + 1);
    }
    if (x->e.reason == VM_EXIT_HYPERCALL || x->e.reason == VM_EXIT_HOOK) {
        name = x->e.reason == VM_EXIT_HOOK ? "hook" : "args";
        lua_getfield(L, 1, name);
        lua_setfield(L, -2, name);
    }
    lua_getglobal(L, "next");
    lua_insert(L, -2);
    return 2;
}

void lvm_open_vcpu(lua_State *L)
{
    static const luaL_Reg meta[] = { { "__tostring", vcpu_tostring }, { NULL, NULL } };
    static const luaL_Reg methods[] = {
        { "run", vcpu_run }, { "kick", vcpu_kick }, { "inject", vcpu_inject }, { "set_mode", vcpu_set_mode },
        { "reg", vcpu_reg }, { "set_reg", vcpu_set_reg }, { "regs", vcpu_regs }, { "set_regs", vcpu_set_regs },
        { "sregs", vcpu_sregs }, { "set_sregs", vcpu_set_sregs }, { "fpu", vcpu_fpu }, { "set_fpu", vcpu_set_fpu },
        { "msr", vcpu_msr }, { "set_msr", vcpu_set_msr }, { "translate", vcpu_translate },
        { "read", vcpu_read }, { "write", vcpu_write }, { NULL, NULL },
    };
    static const luaL_Reg getters[] = {
        { "machine", get_machine }, { "index", get_index }, { "retired", get_retired }, { "last_exit", get_last_exit }, { NULL, NULL },
    };
    static const luaL_Reg exit_meta[] = {
        { "__index", exit_index }, { "__newindex", exit_newindex }, { "__tostring", exit_tostring }, { "__pairs", exit_next }, { NULL, NULL },
    };
    static const luaL_Reg none[] = { { NULL, NULL } };
    lvm_class(L, LVM_VCPU, meta, methods, getters);
    /* The class's __index, with registers in front. */
    luaL_getmetatable(L, LVM_VCPU);
    lua_getfield(L, -1, "methods");
    luaL_setfuncs(L, lvm_mmu_vcpu_methods, 0);
    luaL_setfuncs(L, lvm_coverage_vcpu_methods, 0);
    luaL_setfuncs(L, lvm_call_vcpu_methods, 0);
    lua_getfield(L, -2, "getters");
    lua_newtable(L);
    for (int i = 1; i < VM_REG_COUNT; i++) {
        lua_pushinteger(L, i);
        lua_setfield(L, -2, vm_reg_name(i));
    }
    lua_pushvalue(L, -1);
    lua_pushcclosure(L, vcpu_newindex, 1);
    lua_setfield(L, -5, "__newindex");
    lua_pushcclosure(L, vcpu_index, 3);
    lua_setfield(L, -2, "__index");
    lua_pop(L, 1);
    lvm_class(L, LVM_EXIT, exit_meta, none, NULL);
    luaL_getmetatable(L, LVM_EXIT);
    lua_pushcfunction(L, exit_index);
    lua_setfield(L, -2, "__index");
    lua_pop(L, 1);
}
