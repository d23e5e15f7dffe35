/* module.c - the module's table, its constants, and what all parts share: calls, callbacks, arguments. */
#include "lvm.h"

#include <time.h>

/* The coroutine whose call of libvm is under way on this thread. */
static __thread lua_State *current;
static const char universe_key, error_key;

lua_State *lvm_current(void) { return current; }
void lvm_set_current(lua_State *L) { current = L; }

uint64_t lvm_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- fork() ---- */

/* Of the process, as fork() is; changed in a child that has one thread. */
static unsigned forks;

unsigned lvm_forks(void) { return forks; }
static void count_fork(void) { forks++; }
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

void lvm_check_open(lua_State *L, const lvm_machine *b, int arg)
{
    if (!lvm_is_open(b))
        luaL_argerror(L, arg, b->m ? "machine belongs to the process before fork()" : "machine is closed");
}

/* ---- one a Lua state ---- */

static int universe_gc(lua_State *L)
{
    lvm_universe *u = lua_touserdata(L, 1);
    pthread_mutex_destroy(&u->lock);
    return 0;
}

lvm_universe *lvm_universe_of(lua_State *L)
{
    lvm_universe *u;
    lua_rawgetp(L, LUA_REGISTRYINDEX, &universe_key);
    u = lua_touserdata(L, -1);
    lua_pop(L, 1);
    return u;
}

static void make_universe(lua_State *L)
{
    lvm_universe *u;
    if (lvm_universe_of(L))
        return;
    u = lua_newuserdatauv(L, sizeof *u, 0);
    u->threads = 0;
    pthread_mutex_init(&u->lock, NULL);
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, universe_gc);
    lua_setfield(L, -2, "__gc");
    lua_setmetatable(L, -2);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &universe_key);
}

/* ---- calls and callbacks ---- */

void lvm_enter(lua_State *L, lvm_machine *b, int index, lvm_call *call)
{
    call->outer = current;
    current = L;
    if (b->depth++ == 0) {
        /* A box over the machine has it as its first user value, the machine its anchors. */
        lua_getiuservalue(L, index, 1);
        if (lua_type(L, -1) == LUA_TUSERDATA) {
            lua_getiuservalue(L, -1, 1);
            lua_remove(L, -2);
        }
        lua_rawseti(L, LUA_REGISTRYINDEX, b->slot);
    }
    if (b->universe->threads)
        pthread_mutex_unlock(&b->universe->lock);
}

void lvm_leave(lua_State *L, lvm_machine *b, lvm_call *call)
{
    if (b->universe->threads)
        pthread_mutex_lock(&b->universe->lock);
    current = call->outer;
    if (--b->depth == 0 && !b->failed) {
        lua_pushboolean(L, 0);
        lua_rawseti(L, LUA_REGISTRYINDEX, b->slot);
    }
    if (b->depth == 0 && b->dead)
        lvm_free_dead(b);
}

void lvm_raise(lua_State *L, lvm_machine *b)
{
    if (!b->failed)
        return;
    b->failed = false;
    lua_rawgeti(L, LUA_REGISTRYINDEX, b->slot);
    lua_rawgetp(L, -1, &error_key);
    lua_pushboolean(L, 0);
    lua_rawsetp(L, -3, &error_key);
    if (b->depth == 0) {
        lua_pushboolean(L, 0);
        lua_rawseti(L, LUA_REGISTRYINDEX, b->slot);
    }
    lua_error(L);
}

lua_State *lvm_callback(lvm_machine *b, int ref)
{
    lua_State *L = current;
    if (!L && !(L = lvm_gdb_borrow(b)))
        return NULL;
    if (b->universe->threads)
        pthread_mutex_lock(&b->universe->lock);
    if (b->failed || !lua_checkstack(L, 24)) {
        if (b->universe->threads)
            pthread_mutex_unlock(&b->universe->lock);
        return NULL;
    }
    lua_rawgeti(L, LUA_REGISTRYINDEX, b->slot);
    lua_rawgeti(L, -1, ref);
    return L;
}

int lvm_pcall(lua_State *L, lvm_machine *b, int arguments, int results)
{
    if (lua_pcall(L, arguments, results, 0) == LUA_OK)
        return 1;
    b->failed = true;
    lvm_gdb_end(b);
    lua_rawsetp(L, -2, &error_key);      /* needs no memory: see lvm_new_anchors */
    return 0;
}

void lvm_return(lua_State *L, lvm_machine *b)
{
    lua_pop(L, 1);
    if (b->universe->threads)
        pthread_mutex_unlock(&b->universe->lock);
}

int lvm_anchor(lua_State *L, int machine)
{
    int ref;
    lua_getiuservalue(L, machine, 1);
    if (lua_type(L, -1) == LUA_TUSERDATA) {
        lua_getiuservalue(L, -1, 1);
        lua_remove(L, -2);
    }
    lua_insert(L, -2);
    ref = luaL_ref(L, -2);
    lua_pop(L, 1);
    return ref;
}

void lvm_forget(lvm_machine *b, int ref)
{
    lua_State *L = current;
    if (!L || ref == LUA_NOREF || ref == LUA_REFNIL)
        return;                          /* the anchors go with the machine */
    if (b->universe->threads)
        pthread_mutex_lock(&b->universe->lock);
    if (lua_checkstack(L, 8)) {
        lua_rawgeti(L, LUA_REGISTRYINDEX, b->slot);
        if (lua_istable(L, -1))
            luaL_unref(L, -1, ref);
        lua_pop(L, 1);
    }
    if (b->universe->threads)
        pthread_mutex_unlock(&b->universe->lock);
}

void lvm_push_vcpu(lua_State *L, vm_vcpu *cpu)
{
    lua_rawgeti(L, -1, -1 - (lua_Integer)vm_vcpu_index(cpu));
}

void lvm_stop(lvm_machine *b)
{
    for (unsigned i = 0; i < vm_vcpu_count(b->m); i++) {
        b->stale_kicks |= UINT64_C(1) << i;
        vm_vcpu_kick(vm_vcpu_get(b->m, i));
    }
}

void lvm_new_anchors(lua_State *L)
{
    lua_newtable(L);
    lua_pushboolean(L, 0);
    lua_rawsetp(L, -2, &error_key);
}

void lvm_link(lvm_machine *b, lvm_object *o, void *handle, void (*orphan)(lvm_object *))
{
    o->handle = handle;
    o->orphan = orphan;
    o->next = b->objects;
    o->link = &b->objects;
    if (o->next)
        o->next->link = &o->next;
    b->objects = o;
}

void lvm_unlink(lvm_object *o)
{
    if (!o->link)
        return;
    *o->link = o->next;
    if (o->next)
        o->next->link = o->link;
    o->link = NULL;
    o->next = NULL;
    o->handle = NULL;
}

/* ---- results ---- */

int lvm_fail(lua_State *L, int status)
{
    lua_pushnil(L);
    lua_pushstring(L, *vm_errmsg() ? vm_errmsg() : vm_strerror(status));
    lua_pushinteger(L, status);
    return 3;
}

int lvm_done(lua_State *L, int status)
{
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushboolean(L, 1);
    return 1;
}

int lvm_finish(lua_State *L, lvm_machine *b, lvm_call *call, int status)
{
    lvm_leave(L, b, call);
    lvm_raise(L, b);
    return lvm_done(L, status);
}

/* ---- classes: methods in the first upvalue of __index, getters in the second ---- */

int lvm_index(lua_State *L, const char *what)
{
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL)
        return 1;
    lua_pushvalue(L, 2);
    if (lua_rawget(L, lua_upvalueindex(2)) != LUA_TNIL) {
        lua_pushvalue(L, 1);
        lua_call(L, 1, 1);
        return 1;
    }
    return luaL_error(L, "no such %s: %s", what, luaL_tolstring(L, 2, NULL));
}

static int index_class(lua_State *L) { return lvm_index(L, "field"); }

void lvm_class(lua_State *L, const char *name, const luaL_Reg *meta, const luaL_Reg *methods, const luaL_Reg *getters)
{
    if (!luaL_newmetatable(L, name)) {
        lua_pop(L, 1);
        return;
    }
    luaL_setfuncs(L, meta, 0);
    lua_newtable(L);
    luaL_setfuncs(L, methods, 0);
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "methods");
    lua_newtable(L);
    if (getters)
        luaL_setfuncs(L, getters, 0);
    lua_pushvalue(L, -1);
    lua_setfield(L, -4, "getters");
    lua_pushcclosure(L, index_class, 2);
    lua_setfield(L, -2, "__index");
    lua_pushstring(L, name);
    lua_setfield(L, -2, "__name");
    lua_pushstring(L, name);             /* getmetatable() shows this, scripts do not reach the functions above */
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 1);
}

/* ---- arguments ---- */

/* An argument error that shows the value. */
int lvm_refuse(lua_State *L, int arg, const char *why)
{
    const char *shown = luaL_tolstring(L, arg, NULL);
    return luaL_argerror(L, arg, lua_pushfstring(L, lua_type(L, arg) == LUA_TSTRING ? "'%s': %s" : "%s: %s", shown, why));
}

uint64_t lvm_check_range(lua_State *L, int arg, uint64_t max)
{
    lua_Integer n = luaL_checkinteger(L, arg);
    if (n < 0 || (uint64_t)n > max)
        lvm_refuse(L, arg, "out of range");
    return (uint64_t)n;
}

static bool parse_bytes(const char *text, uint64_t *bytes)
{
    char *end;
    unsigned long long n = strtoull(text, &end, 0);
    unsigned shift = *end == 'K' || *end == 'k' ? 10 : *end == 'M' || *end == 'm' ? 20 : *end == 'G' || *end == 'g' ? 30 : 0;
    if (*text < '0' || *text > '9' || (shift ? end[1] != '\0' : *end != '\0') || n > (UINT64_MAX >> 1) >> shift)
        return false;
    *bytes = n << shift;
    return true;
}

uint64_t lvm_check_bytes(lua_State *L, int arg)
{
    uint64_t bytes = 0;
    if (lua_type(L, arg) == LUA_TSTRING) {
        if (!parse_bytes(lua_tostring(L, arg), &bytes))
            lvm_refuse(L, arg, "not a size such as \"64M\"");
        return bytes;
    }
    return lvm_check_range(L, arg, INT64_MAX);
}

unsigned lvm_check_prot(lua_State *L, int arg)
{
    unsigned prot = 0;
    if (lua_type(L, arg) == LUA_TNUMBER)
        return (unsigned)lvm_check_range(L, arg, VM_PROT_RWX);
    for (const char *p = luaL_checkstring(L, arg); *p; p++) {
        if (!strchr("rwx-", *p))
            lvm_refuse(L, arg, "permissions are made of the letters r, w and x");
        prot |= *p == 'r' ? VM_PROT_R : *p == 'w' ? VM_PROT_W : *p == 'x' ? VM_PROT_X : 0;
    }
    return prot;
}

unsigned lvm_check_access(lua_State *L, int arg)
{
    unsigned access = lua_isnoneornil(L, arg) ? VM_PROT_R : lvm_check_prot(L, arg);
    if (access != VM_PROT_R && access != VM_PROT_W && access != VM_PROT_X)
        lvm_refuse(L, arg, "one of \"r\", \"w\", \"x\" expected");
    return access;
}

void lvm_push_prot(lua_State *L, unsigned prot)
{
    char text[4], *p = text;
    if (prot & VM_PROT_R)
        *p++ = 'r';
    if (prot & VM_PROT_W)
        *p++ = 'w';
    if (prot & VM_PROT_X)
        *p++ = 'x';
    lua_pushlstring(L, text, (size_t)(p - text));
}

int lvm_check_name(lua_State *L, int arg, const char *const *names, const char *what)
{
    const char *name = luaL_checkstring(L, arg);
    for (int i = 0; names[i]; i++)
        if (!strcmp(names[i], name))
            return i;
    return luaL_argerror(L, arg, lua_pushfstring(L, "unknown %s '%s'", what, name));
}

void lvm_check_fields(lua_State *L, int arg, const char *const *known)
{
    if (lua_isnoneornil(L, arg))
        return;
    luaL_checktype(L, arg, LUA_TTABLE);
    for (lua_pushnil(L); lua_next(L, arg); lua_pop(L, 1)) {
        const char *name = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : luaL_typename(L, -2);
        int i = 0;
        while (known[i] && strcmp(known[i], name))
            i++;
        if (!known[i])
            luaL_argerror(L, arg, lua_pushfstring(L, "unknown option '%s'", name));
    }
}

/* Options are the table's own: no metamethod runs while they are read. */
int lvm_raw_field(lua_State *L, int arg, const char *name)
{
    lua_pushvalue(L, arg);
    lua_pushstring(L, name);
    lua_rawget(L, -2);
    lua_remove(L, -2);
    return lua_type(L, -1);
}

static bool get_field(lua_State *L, int arg, const char *name)
{
    if (lua_isnoneornil(L, arg))
        return false;
    if (lvm_raw_field(L, arg, name) != LUA_TNIL)
        return true;
    lua_pop(L, 1);
    return false;
}

uint64_t lvm_field_integer(lua_State *L, int arg, const char *name, uint64_t otherwise)
{
    int ok;
    lua_Integer n;
    if (!get_field(L, arg, name))
        return otherwise;
    n = lua_tointegerx(L, -1, &ok);
    if (!ok)
        luaL_argerror(L, arg, lua_pushfstring(L, "option '%s': integer expected, got %s", name, luaL_typename(L, -1)));
    lua_pop(L, 1);
    return (uint64_t)n;
}

uint64_t lvm_field_range(lua_State *L, int arg, const char *name, uint64_t otherwise, uint64_t max)
{
    uint64_t n = lvm_field_integer(L, arg, name, otherwise);
    if (n > max && n != otherwise)
        luaL_argerror(L, arg, lua_pushfstring(L, "option '%s': %I is out of range", name, (lua_Integer)n));
    return n;
}

bool lvm_field_boolean(lua_State *L, int arg, const char *name)
{
    bool is;
    if (!get_field(L, arg, name))
        return false;
    is = lua_toboolean(L, -1);
    lua_pop(L, 1);
    return is;
}

const char *lvm_field_string(lua_State *L, int arg, const char *name)
{
    if (!get_field(L, arg, name))
        return NULL;
    if (lua_type(L, -1) != LUA_TSTRING)
        luaL_argerror(L, arg, lua_pushfstring(L, "option '%s': string expected, got %s", name, luaL_typename(L, -1)));
    return lua_tostring(L, -1);
}

/* ---- functions of the module ---- */

static const char *const backends[] = { "auto", "kvm", "jit", "interp", NULL };

static int module_query(lua_State *L)
{
    uint64_t value = 0;
    int backend = lvm_check_name(L, 1, backends, "backend");
    int status = vm_query((vm_backend)backend, luaL_checkstring(L, 2), &value);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)value);
    return 1;
}

static int module_version(lua_State *L)
{
    lua_pushstring(L, vm_version());
    lua_pushinteger(L, vm_version_number());
    return 2;
}

static int module_strerror(lua_State *L)
{
    lua_pushstring(L, vm_strerror((int)luaL_checkinteger(L, 1)));
    return 1;
}

static int module_errmsg(lua_State *L)
{
    lua_pushstring(L, vm_errmsg());
    return 1;
}

static int module_trace_parse(lua_State *L)
{
    unsigned mask = 0;
    int status = vm_trace_parse(luaL_checkstring(L, 1), &mask);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, mask);
    return 1;
}

static int module_registers(lua_State *L)
{
    lua_newtable(L);
    for (int i = 1; i < VM_REG_COUNT; i++) {
        lua_pushinteger(L, (lua_Integer)vm_reg_size(i));
        lua_setfield(L, -2, vm_reg_name(i));
    }
    return 1;
}

static int module_find_register(lua_State *L)
{
    int id = vm_reg_find(luaL_checkstring(L, 1));
    if (id == VM_REG_NONE)
        return 0;
    lua_pushstring(L, vm_reg_name(id));
    lua_pushinteger(L, (lua_Integer)vm_reg_size(id));
    lua_pushinteger(L, id);
    return 3;
}

static int module_stat_names(lua_State *L)
{
    const char *name, *text = NULL;
    lua_newtable(L);
    for (unsigned i = 0; (name = vm_stat_name(i, &text)); i++) {
        lua_pushstring(L, text ? text : "");
        lua_setfield(L, -2, name);
    }
    return 1;
}

static unsigned check_sandbox(lua_State *L)
{
    static const char *const known[] = { "kvm", "threads", "sockets", "errno", NULL };
    lvm_check_fields(L, 1, known);
    return (lvm_field_boolean(L, 1, "kvm") ? VM_SANDBOX_KVM : 0u) | (lvm_field_boolean(L, 1, "threads") ? VM_SANDBOX_THREADS : 0u) |
           (lvm_field_boolean(L, 1, "sockets") ? VM_SANDBOX_SOCKETS : 0u) | (lvm_field_boolean(L, 1, "errno") ? VM_SANDBOX_ERRNO : 0u);
}

/* libvm.sandbox_enter{ kvm, threads, sockets, errno } */
static int module_sandbox_enter(lua_State *L)
{
    return lvm_done(L, vm_sandbox_enter(check_sandbox(L)));
}

static int module_sandbox_calls(lua_State *L)
{
    unsigned flags = check_sandbox(L);
    const char *name;
    lua_newtable(L);
    for (unsigned i = 0; (name = vm_sandbox_call(flags, i)); i++) {
        lua_pushstring(L, name);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

static const luaL_Reg functions[] = {
    { "sandbox_enter", module_sandbox_enter },
    { "sandbox_calls", module_sandbox_calls },
    { "machine", lvm_machine_new },
    { "buffer", lvm_buffer_new },
    { "query", module_query },
    { "version", module_version },
    { "strerror", module_strerror },
    { "errmsg", module_errmsg },
    { "registers", module_registers },
    { "find_register", module_find_register },
    { "stat_names", module_stat_names },
    { "trace_parse", module_trace_parse },
    { "coverage_id", lvm_coverage_id },
    { "signature_check", lvm_signature_check },
    { "share_pages", lvm_share_pages },
    { "mmu_register", lvm_mmu_register },
    { "mmu_names", lvm_mmu_names },
    { NULL, NULL },
};

/* ---- constants, from the tables of the headers ---- */

typedef struct constant { const char *name; int value; } constant;
static const constant statuses[] = {
#define VM_ERROR(name, value, text) { #name, value },
#include <libvm/error.def>
#undef VM_ERROR
    { NULL, 0 },
};
static const constant exits[] = {
#define VM_EXIT_REASON(name, value, text) { #name, value },
#include <libvm/exit.def>
#undef VM_EXIT_REASON
    { NULL, 0 },
};
static const constant registers[] = {
#define VM_REG(name, text, bytes, cls, index) { #name, VM_REG_##name },
#include <libvm/reg.def>
#undef VM_REG
    { NULL, 0 },
};
static const constant traces[] = {
    { "DECODE", VM_TRACE_DECODE }, { "IR", VM_TRACE_IR }, { "MCODE", VM_TRACE_MCODE }, { "EXIT", VM_TRACE_EXIT },
    { "MMIO", VM_TRACE_MMIO }, { "IRQ", VM_TRACE_IRQ }, { "MMU", VM_TRACE_MMU }, { "ALL", VM_TRACE_ALL }, { NULL, 0 },
};

/* VM_E_INVALID is status.E_INVALID, VM_EXIT_HALT exit.HALT, VM_REG_RAX reg.RAX, VM_TRACE_MMIO trace.MMIO. */
static void add_constants(lua_State *L, const char *field, const constant *c, size_t prefix)
{
    lua_newtable(L);
    for (; c->name; c++) {
        lua_pushinteger(L, c->value);
        lua_setfield(L, -2, c->name + prefix);
    }
    lua_setfield(L, -2, field);
}

__attribute__((visibility("default"))) int luaopen_libvm(lua_State *L)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    luaL_checkversion(L);
    pthread_once(&once, watch_forks);
    make_universe(L);
    lvm_open_machine(L);
    lvm_open_memory(L);
    lvm_open_vcpu(L);
    lvm_open_console(L);
    lvm_open_mmu(L);
    lvm_open_hook(L);
    lvm_open_snapshot(L);
    lvm_open_coverage(L);
    lvm_open_call(L);
    lvm_open_gdb(L);
    luaL_newlib(L, functions);
    add_constants(L, "status", statuses, 3);
    add_constants(L, "exit", exits, 0);
    add_constants(L, "reg", registers, 0);
    add_constants(L, "trace", traces, 0);
    return 1;
}
