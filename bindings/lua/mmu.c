/* mmu.c - MMU strategies written in Lua.
 *
 * A strategy is registered with libvm for the life of the process, a Lua state is not: each has a slot here that names the
 * state it belongs to, and refuses machines of other states. A state that has closed leaves its slot to whoever registers
 * the name again. libvm's create() does not say which strategy is meant, so each slot has functions of its own.
 */
#include "lvm.h"

enum { CREATE, DESTROY, TRANSLATE, ROOT_CHANGED, INVALIDATE, TABLE_WRITTEN, FUNCTIONS };
static const char *const function_names[FUNCTIONS] = {
    "create", "destroy", "translate", "root_changed", "invalidate", "table_written",
};

#define SLOTS 16
static struct slot {
    lvm_universe *universe;             /* NULL: never used, or its state is closed */
    char         *name;
    int           fn[FUNCTIONS];        /* in the registry */
    vm_mmu_ops    ops;
} slots[SLOTS];
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;

/* Of one machine. */
typedef struct strategy {
    struct slot *slot;
    lvm_machine *machine;
    int          self;                  /* what create() returned, in the anchors */
} strategy;

/* The machine a create() is for: the one whose call is under way. */
static __thread lvm_machine *creating;
void lvm_mmu_creating(lvm_machine *b) { creating = b; }
lvm_machine *lvm_mmu_created(void) { return creating; }

static lua_State *begin(strategy *s, int which)
{
    lua_State *L;
    if (s->slot->fn[which] == LUA_NOREF || s->slot->universe != s->machine->universe)
        return NULL;
    L = lvm_callback(s->machine, s->self);
    if (!L)
        return NULL;
    lua_rawgeti(L, LUA_REGISTRYINDEX, s->slot->fn[which]);
    lua_insert(L, -2);
    return L;
}

static void push_cpu(lua_State *L, vm_vcpu *cpu, int anchors)
{
    if (cpu)
        lua_rawgeti(L, anchors, -1 - (lua_Integer)vm_vcpu_index(cpu));
    else
        lua_pushnil(L);
}

static int do_create(struct slot *slot, void **state)
{
    lvm_machine *b = creating;
    lua_State *L;
    strategy *s;
    int status = VM_E_HOST, anchors;
    if (!b || slot->universe != b->universe)
        return VM_E_UNSUPPORTED;
    s = malloc(sizeof *s);
    if (!s)
        return VM_E_NOMEM;
    *s = (strategy){ slot, b, LUA_NOREF };
    L = lvm_callback(b, 1);
    if (!L) {
        free(s);
        return VM_E_UNSUPPORTED;
    }
    lua_pop(L, 1);
    anchors = lua_gettop(L);
    if (slot->fn[CREATE] == LUA_NOREF) {
        lua_pushboolean(L, 0);
        s->self = LUA_REFNIL;
        lua_pop(L, 1);
        status = VM_OK;
    } else {
        lua_rawgeti(L, LUA_REGISTRYINDEX, slot->fn[CREATE]);
        if (lvm_pcall(L, b, 0, 1)) {
            /* luaL_ref could run out of memory: under pcall too. */
            lua_pushcfunction(L, lvm_protected_ref);
            lua_insert(L, -2);
            lua_pushvalue(L, anchors);
            lua_insert(L, -2);
            if (lvm_pcall(L, b, 2, 1)) {
                s->self = (int)lua_tointeger(L, -1);
                lua_pop(L, 1);
                status = VM_OK;
            }
        }
    }
    lvm_return(L, b);
    if (status == VM_OK)
        *state = s;
    else
        free(s);
    return status;
}

int lvm_protected_ref(lua_State *L)      /* table, value */
{
    lua_pushinteger(L, luaL_ref(L, 1));
    return 1;
}

static void do_destroy(void *state)
{
    strategy *s = state;
    lua_State *L = begin(s, DESTROY);
    if (L) {
        lvm_pcall(L, s->machine, 1, 0);
        lvm_return(L, s->machine);
    }
    lvm_forget(s->machine, s->self);
    free(s);
}

/* The answer of translate: a table { gpa, page_bytes, prot, global, trap_writes }, or nil and the fault's error code. */
static int read_answer(lua_State *L)
{
    struct vm_mmu_result *out = lua_touserdata(L, 1);
    if (lua_isnil(L, 2)) {
        out->fault_vector = 14;
        out->fault_error = (uint32_t)luaL_optinteger(L, 3, 0);
        return 0;
    }
    luaL_checktype(L, 2, LUA_TTABLE);
    out->gpa = lvm_field_integer(L, 2, "gpa", 0);
    out->page_bytes = lvm_field_integer(L, 2, "page_bytes", 4096);
    out->global = lvm_field_boolean(L, 2, "global");
    out->trap_writes = lvm_field_boolean(L, 2, "trap_writes");
    lua_getfield(L, 2, "prot");
    out->prot = lua_isnil(L, -1) ? VM_PROT_RWX : (vm_prot)lvm_check_prot(L, lua_gettop(L));
    if (out->page_bytes < 4096 || (out->page_bytes & (out->page_bytes - 1)))
        luaL_error(L, "translate: page_bytes is no power of two from 4096 on");
    return 0;
}

static int do_translate(void *state, vm_vcpu *cpu, uint64_t gva, vm_prot access, struct vm_mmu_result *out)
{
    strategy *s = state;
    lua_State *L = begin(s, TRANSLATE);
    int base, status = VM_E_FAULT;
    if (!L)
        return vm_mmu_walk(cpu, gva, access, out);
    base = lua_gettop(L) - 2;            /* the anchors */
    push_cpu(L, cpu, base);
    lua_pushinteger(L, (lua_Integer)gva);
    lua_rawgetp(L, LUA_REGISTRYINDEX, &lvm_access_names[access == VM_PROT_W ? 1 : access == VM_PROT_X ? 2 : 0]);
    if (lvm_pcall(L, s->machine, 4, 2)) {
        bool fault = lua_isnil(L, -2);
        lua_pushcfunction(L, read_answer);
        lua_insert(L, -3);
        lua_pushlightuserdata(L, out);
        lua_insert(L, -3);
        if (lvm_pcall(L, s->machine, 3, 0) && !fault)
            status = VM_OK;
    }
    lvm_return(L, s->machine);
    if (s->machine->failed) {
        /* The run ends with the error; until then the guest's own walk answers. */
        lvm_stop(s->machine);
        uint32_t size = out->size;
        memset(out, 0, sizeof *out);
        out->size = size;
        return vm_mmu_walk(cpu, gva, access, out);
    }
    return status;
}

static void notify(strategy *s, int which, vm_vcpu *cpu, uint64_t first, uint64_t second, int arguments)
{
    lua_State *L = begin(s, which);
    if (!L)
        return;
    push_cpu(L, cpu, lua_gettop(L) - 2);
    lua_pushinteger(L, (lua_Integer)first);
    if (arguments == 2)
        lua_pushinteger(L, (lua_Integer)second);
    if (!lvm_pcall(L, s->machine, 2 + arguments, 0))
        lvm_stop(s->machine);
    lvm_return(L, s->machine);
}

static void do_root_changed(void *state, vm_vcpu *cpu, uint64_t cr3) { notify(state, ROOT_CHANGED, cpu, cr3, 0, 1); }
static void do_invalidate(void *state, vm_vcpu *cpu, uint64_t gva, uint64_t bytes) { notify(state, INVALIDATE, cpu, gva, bytes, 2); }
static void do_table_written(void *state, vm_vcpu *cpu, uint64_t gpa) { notify(state, TABLE_WRITTEN, cpu, gpa, 0, 1); }

#define CREATE_SLOT(n) static int create_##n(vm_machine *m, void **state) { (void)m; return do_create(&slots[n], state); }
CREATE_SLOT(0) CREATE_SLOT(1) CREATE_SLOT(2) CREATE_SLOT(3) CREATE_SLOT(4) CREATE_SLOT(5) CREATE_SLOT(6) CREATE_SLOT(7)
CREATE_SLOT(8) CREATE_SLOT(9) CREATE_SLOT(10) CREATE_SLOT(11) CREATE_SLOT(12) CREATE_SLOT(13) CREATE_SLOT(14) CREATE_SLOT(15)
static int (*const creates[SLOTS])(vm_machine *, void **) = {
    create_0, create_1, create_2, create_3, create_4, create_5, create_6, create_7,
    create_8, create_9, create_10, create_11, create_12, create_13, create_14, create_15,
};

/* The slot for a name, under the lock: its old one if its state is gone, else a free one. NULL: taken, or none left. */
static struct slot *find_slot(const char *name, const char **why)
{
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].name && !strcmp(slots[i].name, name)) {
            *why = "a strategy of this name is registered already";
            return slots[i].universe ? NULL : &slots[i];
        }
    *why = "too many strategies written in Lua";
    for (int i = 0; i < SLOTS; i++)
        if (!slots[i].name)
            return &slots[i];
    return NULL;
}

static int universe_closed(lua_State *L)
{
    lvm_universe *u = lvm_universe_of(L);
    (void)L;
    pthread_mutex_lock(&slots_lock);
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].universe == u)
            slots[i].universe = NULL;
    pthread_mutex_unlock(&slots_lock);
    return 0;
}

/* libvm.mmu_register(name, { create(), destroy(state), translate(state, cpu, gva, access), root_changed(state, cpu, cr3),
 * invalidate(state, cpu, gva, bytes), table_written(state, cpu, gpa) }) */
int lvm_mmu_register(lua_State *L)
{
    static const char guard;
    const char *name = luaL_checkstring(L, 1), *why;
    int fn[FUNCTIONS], status = VM_OK;
    struct slot *slot;
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_settop(L, 2);
    for (int i = 0; i < FUNCTIONS; i++) {
        int type = lua_getfield(L, 2, function_names[i]);
        if (type != LUA_TFUNCTION && (type != LUA_TNIL || i == TRANSLATE))
            luaL_argerror(L, 2, lua_pushfstring(L, "field '%s' is not a function", function_names[i]));
    }
    for (int i = FUNCTIONS; i--;)
        if (lua_isnil(L, -1)) {
            lua_pop(L, 1);
            fn[i] = LUA_NOREF;
        } else {
            fn[i] = luaL_ref(L, LUA_REGISTRYINDEX);
        }
    if (lua_rawgetp(L, LUA_REGISTRYINDEX, &guard) == LUA_TNIL) {
        lua_newuserdatauv(L, 1, 0);
        lua_createtable(L, 0, 1);
        lua_pushcfunction(L, universe_closed);
        lua_setfield(L, -2, "__gc");
        lua_setmetatable(L, -2);
        lua_rawsetp(L, LUA_REGISTRYINDEX, &guard);
    }
    pthread_mutex_lock(&slots_lock);
    slot = find_slot(name, &why);
    if (slot && !slot->name) {
        char *copy = malloc(strlen(name) + 1);
        if (copy) {
            strcpy(copy, name);
            slot->ops = (vm_mmu_ops){ sizeof(vm_mmu_ops), copy, creates[slot - slots], do_destroy, do_translate, do_root_changed,
                                      do_invalidate, do_table_written };
            status = vm_mmu_register(&slot->ops);
            if (status == VM_OK)
                slot->name = copy;
            else
                free(copy);
        } else {
            status = VM_E_NOMEM;
        }
    }
    if (slot && status == VM_OK) {
        memcpy(slot->fn, fn, sizeof fn);
        slot->universe = lvm_universe_of(L);
    }
    pthread_mutex_unlock(&slots_lock);
    if (slot && status == VM_OK)
        return lvm_done(L, VM_OK);
    for (int i = 0; i < FUNCTIONS; i++)
        luaL_unref(L, LUA_REGISTRYINDEX, fn[i]);
    if (slot)
        return lvm_fail(L, status);
    lua_pushnil(L);
    lua_pushstring(L, why);
    lua_pushinteger(L, VM_E_EXISTS);
    return 3;
}

int lvm_mmu_names(lua_State *L)
{
    const char *name;
    lua_newtable(L);
    for (unsigned i = 0; (name = vm_mmu_name(i)); i++) {
        lua_pushstring(L, name);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

static int machine_select_mmu(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1), *outer = creating;
    const char *name = luaL_optstring(L, 2, NULL);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    creating = b;
    status = vm_mmu_select(b->m, name);
    creating = outer;
    return lvm_finish(L, b, &call, status);
}

static void push_result(lua_State *L, const struct vm_mmu_result *r)
{
    lua_createtable(L, 0, 5);
    lua_pushinteger(L, (lua_Integer)r->gpa);
    lua_setfield(L, -2, "gpa");
    lua_pushinteger(L, (lua_Integer)r->page_bytes);
    lua_setfield(L, -2, "page_bytes");
    lvm_push_prot(L, r->prot);
    lua_setfield(L, -2, "prot");
    lua_pushboolean(L, r->global);
    lua_setfield(L, -2, "global");
    lua_pushboolean(L, r->trap_writes);
    lua_setfield(L, -2, "trap_writes");
    lua_createtable(L, (int)r->entry_count, 0);
    for (uint32_t i = 0; i < r->entry_count && i < 5; i++) {
        lua_pushinteger(L, (lua_Integer)r->entry[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    lua_setfield(L, -2, "entries");
}

/* cpu:walk(gva [, access]): what the guest's page tables say, as translate() may return it; or nil and the fault's error code */
static int vcpu_walk(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t gva = (uint64_t)luaL_checkinteger(L, 2);
    unsigned access = lvm_check_access(L, 3);
    struct vm_mmu_result r = { .size = sizeof r };
    int status = vm_mmu_walk(v->cpu, gva, (vm_prot)access, &r);
    if (status == VM_E_FAULT) {
        lua_pushnil(L);
        lua_pushinteger(L, r.fault_error);
        return 2;
    }
    if (status != VM_OK)
        return lvm_fail(L, status);
    push_result(L, &r);
    return 1;
}

static int vcpu_mmu_flush(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t gva = (uint64_t)luaL_optinteger(L, 2, 0), bytes = lua_isnoneornil(L, 3) ? 0 : lvm_check_bytes(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, v->machine, 1, &call);
    status = vm_mmu_flush(v->cpu, gva, bytes);
    return lvm_finish(L, v->machine, &call, status);
}

static int vcpu_trap_writes(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2);
    bool on = lua_isnoneornil(L, 3) || lua_toboolean(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, v->machine, 1, &call);
    status = vm_mmu_trap_writes(v->cpu, gpa, on);
    return lvm_finish(L, v->machine, &call, status);
}

/* ---- views of strategy "ept" ---- */

/* machine:ept_create([from [, page_bytes]]): the view's number */
static int machine_ept_create(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned from = lua_isnoneornil(L, 2) ? VM_EPT_NONE : (unsigned)lvm_check_range(L, 2, UINT32_MAX), view = 0;
    uint64_t page = lua_isnoneornil(L, 3) ? 0 : lvm_check_bytes(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_ept_create(b->m, from, page, &view);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, view);
    return 1;
}

static int machine_ept_destroy(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned view = (unsigned)lvm_check_range(L, 2, UINT32_MAX);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_ept_destroy(b->m, view);
    return lvm_finish(L, b, &call, status);
}

/* machine:ept_protect(view, gpa, bytes, prot) */
static int machine_ept_protect(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned view = (unsigned)lvm_check_range(L, 2, UINT32_MAX), prot;
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 3), bytes = lvm_check_bytes(L, 4);
    lvm_call call;
    int status;
    prot = lvm_check_prot(L, 5);
    lvm_enter(L, b, 1, &call);
    status = vm_ept_protect(b->m, view, gpa, bytes, (vm_prot)prot);
    return lvm_finish(L, b, &call, status);
}

static int vcpu_ept_select(lua_State *L)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    unsigned view = (unsigned)lvm_check_range(L, 2, UINT32_MAX);
    lvm_call call;
    int status;
    lvm_enter(L, v->machine, 1, &call);
    status = vm_ept_select(v->cpu, view);
    return lvm_finish(L, v->machine, &call, status);
}

static int vcpu_ept_current(lua_State *L)
{
    lua_pushinteger(L, vm_ept_current(lvm_check_vcpu(L, 1)->cpu));
    return 1;
}

static int machine_ept_get(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_ept_entry entry = VM_EPT_ENTRY_INIT;
    int status = vm_ept_get(b->m, (unsigned)lvm_check_range(L, 2, UINT32_MAX), (uint64_t)luaL_checkinteger(L, 3), &entry);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_createtable(L, 0, 4);
    lvm_push_prot(L, entry.prot);
    lua_setfield(L, -2, "prot");
    lua_pushboolean(L, entry.accessed);
    lua_setfield(L, -2, "accessed");
    lua_pushboolean(L, entry.dirty);
    lua_setfield(L, -2, "dirty");
    lua_pushinteger(L, (lua_Integer)entry.page_bytes);
    lua_setfield(L, -2, "page_bytes");
    return 1;
}

static void push_pages(lua_State *L, const uint64_t *bitmap, uint64_t gpa, uint64_t bytes)
{
    lua_Integer n = 0;
    lua_newtable(L);
    for (uint64_t i = 0; i < bytes / 4096; i++)
        if (bitmap[i / 64] >> i % 64 & 1) {
            lua_pushinteger(L, (lua_Integer)(gpa + i * 4096));
            lua_rawseti(L, -2, ++n);
        }
}

/* machine:ept_fetch(view, gpa, bytes): lists of accessed and of dirty pages */
static int machine_ept_fetch(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned view = (unsigned)lvm_check_range(L, 2, UINT32_MAX);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 3), bytes = lvm_check_bytes(L, 4), words = (bytes / 4096 + 63) / 64;
    uint64_t *accessed, *dirty;
    lvm_call call;
    int status;
    luaL_argcheck(L, words < 1u << 27, 4, "out of range");
    accessed = lua_newuserdatauv(L, words * 8 + 8, 0);
    dirty = lua_newuserdatauv(L, words * 8 + 8, 0);
    lvm_enter(L, b, 1, &call);
    status = vm_ept_fetch(b->m, view, gpa, bytes, accessed, dirty);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    push_pages(L, accessed, gpa, bytes);
    push_pages(L, dirty, gpa, bytes);
    return 2;
}

/* function, vCPU, violation: answers "stop", "retry", "emulate" [, value] or "step" */
static int violation_protected(lua_State *L)
{
    static const char *const actions[] = { "stop", "retry", "emulate", "step", NULL };
    vm_ept_violation *v = lua_touserdata(L, 3);
    int action;
    lua_settop(L, 2);
    lua_createtable(L, 0, 7);
    lua_pushinteger(L, v->view);
    lua_setfield(L, -2, "view");
    lua_pushinteger(L, (lua_Integer)v->gpa);
    lua_setfield(L, -2, "gpa");
    lua_pushinteger(L, (lua_Integer)v->gva);
    lua_setfield(L, -2, "gva");
    lvm_push_prot(L, v->access);
    lua_setfield(L, -2, "access");
    lvm_push_prot(L, v->allowed);
    lua_setfield(L, -2, "allowed");
    lua_pushinteger(L, v->width);
    lua_setfield(L, -2, "width");
    lua_pushinteger(L, (lua_Integer)v->value);
    lua_setfield(L, -2, "value");
    lua_call(L, 2, 2);
    action = lua_isnil(L, -2) ? VM_EPT_STOP : lvm_check_name(L, 1, actions, "action");
    if (!lua_isnil(L, -1))
        v->value = (uint64_t)luaL_checkinteger(L, 2);
    lua_pushinteger(L, action);
    return 1;
}

static vm_ept_action on_violation(void *user, vm_vcpu *cpu, vm_ept_violation *v)
{
    lvm_machine *b = user;
    lua_State *L = lvm_callback(b, b->violation_fn);
    int action = VM_EPT_STOP;
    if (!L)
        return VM_EPT_STOP;
    lua_pushcfunction(L, violation_protected);
    lua_insert(L, -2);
    lua_rawgeti(L, -3, -1 - (lua_Integer)vm_vcpu_index(cpu));
    lua_pushlightuserdata(L, v);
    if (lvm_pcall(L, b, 3, 1)) {
        action = (int)lua_tointeger(L, -1);
        lua_pop(L, 1);
    }
    lvm_return(L, b);
    return (vm_ept_action)action;
}

/* machine:ept_on_violation(function(cpu, violation) or nil) */
static int machine_ept_on_violation(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    int status, fn = LUA_NOREF;
    lua_settop(L, 2);
    if (!lua_isnil(L, 2)) {
        luaL_checktype(L, 2, LUA_TFUNCTION);
        fn = lvm_anchor(L, 1);
    }
    status = vm_ept_on_violation(b->m, fn != LUA_NOREF ? on_violation : NULL, b);
    lua_getiuservalue(L, 1, 1);
    luaL_unref(L, -1, status == VM_OK ? b->violation_fn : fn);
    if (status == VM_OK)
        b->violation_fn = fn;
    return lvm_done(L, status);
}

const luaL_Reg lvm_mmu_methods[] = {
    { "select_mmu", machine_select_mmu },
    { "ept_create", machine_ept_create },
    { "ept_destroy", machine_ept_destroy },
    { "ept_protect", machine_ept_protect },
    { "ept_get", machine_ept_get },
    { "ept_fetch", machine_ept_fetch },
    { "ept_on_violation", machine_ept_on_violation },
    { NULL, NULL },
};
const luaL_Reg lvm_mmu_vcpu_methods[] = {
    { "walk", vcpu_walk },
    { "mmu_flush", vcpu_mmu_flush },
    { "trap_writes", vcpu_trap_writes },
    { "ept_select", vcpu_ept_select },
    { "ept_current", vcpu_ept_current },
    { NULL, NULL },
};

/* The access kinds as strings, made once: pushing one needs no memory. */
const char lvm_access_names[3];
void lvm_open_mmu(lua_State *L)
{
    static const char *const names[3] = { "r", "w", "x" };
    for (int i = 0; i < 3; i++) {
        lua_pushstring(L, names[i]);
        lua_rawsetp(L, LUA_REGISTRYINDEX, &lvm_access_names[i]);
    }
}
