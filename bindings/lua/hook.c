/* hook.c - hooks, breakpoints, watchpoints. */
#include "lvm.h"

/* User value 1: the machine. In the anchors while it is registered, whoever holds it. */
typedef struct hook_box {
    lvm_object   o;                     /* handle: vm_hook */
    lvm_machine *machine;
    int          fn, self;              /* in the anchors */
} hook_box;

static const char *const kinds[] = {
    "", "insn", "block", "edge", "mem_read", "mem_write", "exception", "syscall", "cpuid", "msr", "interrupt", "port", "fetch", NULL,
};
_Static_assert(sizeof kinds / sizeof *kinds == VM_HOOK_KINDS + 1, "a kind of hook has no name here");

/* ---- callbacks ---- */

/* Function, vCPU, address, bytes, data: of more than eight bytes, as a string made where a lack of memory is caught. */
static int call_wide(lua_State *L)
{
    const vm_hook_event *e = lua_touserdata(L, 3);
    lua_settop(L, 2);
    lua_pushinteger(L, (lua_Integer)e->address);
    lua_pushinteger(L, e->bytes);
    lua_pushlstring(L, e->data, e->bytes);
    lua_call(L, 4, 1);
    return 1;
}

#define INTEGER(x) lua_pushinteger(L, (lua_Integer)(x))

/* What a function gets after the vCPU. */
static int push_event(lua_State *L, const vm_hook_event *e)
{
    switch (e->kind) {
    case VM_HOOK_EDGE:
        return INTEGER(e->address), INTEGER(e->from), 2;
    case VM_HOOK_EXCEPTION:
        INTEGER(e->value);
        if (e->flags & VM_EVENT_ERROR)
            INTEGER(e->error);
        else
            lua_pushnil(L);
        return INTEGER(e->from), INTEGER(e->address), 4;
    case VM_HOOK_SYSCALL:
        return INTEGER(e->value), lua_pushboolean(L, (e->flags & VM_EVENT_SYSENTER) != 0), INTEGER(e->address), 3;
    case VM_HOOK_CPUID:
        return INTEGER(e->address), INTEGER(e->from), 2;
    case VM_HOOK_MSR:
        return INTEGER(e->address), lua_pushboolean(L, (e->flags & VM_EVENT_WRITE) != 0), INTEGER(e->value), 3;
    case VM_HOOK_INTERRUPT:
        return INTEGER(e->value), lua_pushboolean(L, (e->flags & VM_EVENT_SOFT) != 0), INTEGER(e->address), 3;
    case VM_HOOK_PORT:
        return INTEGER(e->address), INTEGER(e->bytes), INTEGER(e->value), lua_pushboolean(L, (e->flags & VM_EVENT_WRITE) != 0), 4;
    default:
        return INTEGER(e->address), INTEGER(e->bytes), INTEGER(e->value), 3;
    }
}

static int bad_answer(lua_State *L)
{
    return luaL_error(L, "a hook must return nothing, true, false, \"continue\", \"stop\", \"skip\" or \"retry\"");
}

/* nil, true, "continue": go on; false, "stop": end the run. -1: something else. */
static int answer(lua_State *L)
{
    static const struct { const char *name; vm_hook_result result; } names[] = {
        { "continue", VM_HOOK_CONTINUE }, { "stop", VM_HOOK_STOP }, { "skip", VM_HOOK_SKIP }, { "retry", VM_HOOK_RETRY },
    };
    const char *name;
    switch (lua_type(L, -1)) {
    case LUA_TNIL:
        return VM_HOOK_CONTINUE;
    case LUA_TBOOLEAN:
        return lua_toboolean(L, -1) ? VM_HOOK_CONTINUE : VM_HOOK_STOP;
    case LUA_TSTRING:
        name = lua_tostring(L, -1);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
            if (!strcmp(names[i].name, name))
                return (int)names[i].result;
        return -1;
    default:
        return -1;
    }
}

static vm_hook_result on_event(void *user, vm_vcpu *cpu, const vm_hook_event *e)
{
    hook_box *h = user;
    lua_State *L = lvm_callback(h->machine, h->fn);
    int result = VM_HOOK_STOP, arguments = 1;
    if (!L)
        return h->machine->failed ? VM_HOOK_STOP : VM_HOOK_CONTINUE;
    if (e->data && e->bytes > 8) {
        lua_pushcfunction(L, call_wide);
        lua_insert(L, -2);
        lua_rawgeti(L, -3, -1 - (lua_Integer)vm_vcpu_index(cpu));
        lua_pushlightuserdata(L, (void *)e);
        arguments = 3;
    } else {
        lua_rawgeti(L, -2, -1 - (lua_Integer)vm_vcpu_index(cpu));
        arguments += push_event(L, e);
    }
    if (lvm_pcall(L, h->machine, arguments, 1)) {
        result = answer(L);
        lua_pop(L, 1);
        if (result < 0) {
            lua_pushcfunction(L, bad_answer);
            lvm_pcall(L, h->machine, 0, 0);
            result = VM_HOOK_STOP;
        }
    }
    lvm_return(L, h->machine);
    return (vm_hook_result)result;
}

static void on_destroy(void *user)
{
    hook_box *h = user;
    lvm_unlink(&h->o);
    lvm_forget(h->machine, h->fn);
    lvm_forget(h->machine, h->self);     /* the box may be garbage from here on */
}

/* ---- hooks ---- */

static hook_box *check_hook(lua_State *L, int arg)
{
    hook_box *h = luaL_checkudata(L, arg, LVM_HOOK);
    lvm_check_open(L, h->machine, arg);
    return h;
}

/* machine:hook(kind, function [, { begin, last, gpa, exact, switch }]) */
static int machine_hook(lua_State *L)
{
    static const char *const known[] = { "begin", "last", "gpa", "exact", "switch", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_hook_desc desc = VM_HOOK_INIT;
    vm_hook *hook = NULL;
    hook_box *h;
    lvm_call call;
    int status;
    desc.kind = (vm_hook_kind)lvm_check_name(L, 2, kinds, "kind of hook");
    luaL_checktype(L, 3, LUA_TFUNCTION);
    lua_settop(L, 4);
    lvm_check_fields(L, 4, known);
    desc.begin = lvm_field_integer(L, 4, "begin", 0);
    desc.end = lvm_field_integer(L, 4, "last", desc.begin);
    desc.flags = (lvm_field_boolean(L, 4, "gpa") ? VM_HOOK_GPA : 0) | (lvm_field_boolean(L, 4, "exact") ? VM_HOOK_EXACT : 0) |
                 (lvm_field_boolean(L, 4, "switch") ? VM_HOOK_SWITCH : 0);
    h = lua_newuserdatauv(L, sizeof *h, 1);
    memset(h, 0, sizeof *h);
    h->machine = b;
    h->fn = h->self = LUA_NOREF;
    luaL_setmetatable(L, LVM_HOOK);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    lua_pushvalue(L, 3);
    h->fn = lvm_anchor(L, 1);
    lua_pushvalue(L, -1);
    h->self = lvm_anchor(L, 1);
    desc.fn = on_event;
    desc.user = h;
    desc.destroy = on_destroy;
    lvm_link(b, &h->o, NULL, NULL);
    lvm_enter(L, b, 1, &call);
    status = vm_hook_add(b->m, &desc, &hook);
    lvm_leave(L, b, &call);
    h->o.handle = hook;
    if (status != VM_OK) {
        lvm_unlink(&h->o);
        lua_getiuservalue(L, 1, 1);
        luaL_unref(L, -1, h->fn);
        luaL_unref(L, -1, h->self);
    }
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    return 1;
}

static int hook_remove(lua_State *L)
{
    hook_box *h = check_hook(L, 1);
    lvm_machine *b = h->machine;
    vm_hook *hook = h->o.handle;
    lvm_call call;
    int status;
    luaL_argcheck(L, hook, 1, "hook is removed");
    h->o.handle = NULL;
    lvm_enter(L, b, 1, &call);
    status = vm_hook_remove(b->m, hook);
    return lvm_finish(L, b, &call, status);
}

static int machine_unhook(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    hook_box *h = check_hook(L, 2);
    luaL_argcheck(L, h->machine == b, 2, "a hook of another machine");
    lua_remove(L, 1);
    return hook_remove(L);
}

static int get_active(lua_State *L)
{
    hook_box *h = luaL_checkudata(L, 1, LVM_HOOK);
    lua_pushboolean(L, lvm_is_open(h->machine) && h->o.handle);
    return 1;
}

/* exit.hook: the anchors are on top. Pushes one value. */
void lvm_push_hook(lua_State *L, lvm_machine *b, vm_hook *hook)
{
    for (lvm_object *o = b->objects; hook && o; o = o->next)
        if (o->handle == hook) {
            lua_rawgeti(L, -1, ((hook_box *)o)->self);
            return;
        }
    lua_pushnil(L);
}

/* ---- breakpoints ---- */

/* Runs have to know them: see lvm_run(). Without memory a breakpoint still works, except at the very end of a slice. */
static void note_breakpoint(lvm_machine *b, uint64_t gva, bool on)
{
    uint64_t *grown = on ? realloc(b->breaks, (b->break_count + 1) * sizeof *grown) : NULL;
    if (grown) {
        b->breaks = grown;
        b->breaks[b->break_count++] = gva;
    }
    for (size_t i = 0; !on && i < b->break_count; i++)
        if (b->breaks[i] == gva)
            b->breaks[i] = b->breaks[--b->break_count];
}

static int machine_breakpoint(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gva = (uint64_t)luaL_checkinteger(L, 2);
    bool on = lua_isnoneornil(L, 3) || lua_toboolean(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_breakpoint(b->m, gva, on);
    lvm_leave(L, b, &call);
    if (status == VM_OK)
        note_breakpoint(b, gva, on);
    lvm_raise(L, b);
    return lvm_done(L, status);
}

static int machine_watchpoint(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gva = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3);
    unsigned access = lvm_check_prot(L, 4);
    bool on = lua_isnoneornil(L, 5) || lua_toboolean(L, 5);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_watchpoint(b->m, gva, bytes, (vm_prot)access, on);
    return lvm_finish(L, b, &call, status);
}

const luaL_Reg lvm_hook_methods[] = {
    { "hook", machine_hook },
    { "unhook", machine_unhook },
    { "breakpoint", machine_breakpoint },
    { "watchpoint", machine_watchpoint },
    { NULL, NULL },
};

void lvm_open_hook(lua_State *L)
{
    static const luaL_Reg meta[] = { { NULL, NULL } };
    static const luaL_Reg methods[] = { { "remove", hook_remove }, { NULL, NULL } };
    static const luaL_Reg getters[] = { { "active", get_active }, { NULL, NULL } };
    lvm_class(L, LVM_HOOK, meta, methods, getters);
}
