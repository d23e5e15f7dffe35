/* gdb.c - the debugger's stub; record and replay.
 *
 * The stub runs each vCPU on a thread of libvm's own. Callbacks on such a thread run under the universe's lock on a
 * coroutine that serve() has set aside, which the thread keeps until it ends.
 */
#include "lvm.h"
#include <libvm/gdb.h>
#include <stdio.h>

/* User values: 1 the machine, 2 on_exit, 3 the list of coroutines. */
typedef struct lvm_gdb {
    lvm_object   o;                     /* known to the machine */
    vm_gdb      *stub;                  /* NULL: freed */
    lvm_machine *machine;
    int          on_exit;               /* in the anchors */
    lua_State  **spare;                 /* while serving */
    unsigned     spare_count;
} lvm_gdb;

lua_State *lvm_gdb_borrow(lvm_machine *b)
{
    lua_State *L = NULL;
    if (!b->gdb)
        return NULL;
    pthread_mutex_lock(&b->universe->lock);
    if (b->gdb->spare_count) {
        L = b->gdb->spare[--b->gdb->spare_count];
        lvm_set_current(L);
    }
    pthread_mutex_unlock(&b->universe->lock);
    return L;
}

void lvm_gdb_end(lvm_machine *b)
{
    if (b->gdb)
        vm_gdb_stop(b->gdb->stub);
}

static int exit_protected(lua_State *L)  /* function, vCPU, exit: "default", "run", "stop" or "end" */
{
    static const char *const actions[] = { "default", "run", "stop", "end", NULL };
    vm_exit *e = lua_touserdata(L, 3);
    int action;
    lua_settop(L, 2);
    lvm_push_exit(L, 2, e);
    lua_pushvalue(L, 3);
    lua_insert(L, 1);
    lua_call(L, 2, 1);
    action = lua_isnil(L, -1) ? VM_GDB_DEFAULT : lvm_check_name(L, 2, actions, "action");
    *e = ((lvm_exit *)lua_touserdata(L, 1))->e;
    lua_pushinteger(L, action);
    return 1;
}

static vm_gdb_action on_exit_call(void *user, vm_vcpu *cpu, vm_exit *e)
{
    lvm_gdb *g = user;
    lua_State *L = lvm_callback(g->machine, g->on_exit);
    int action = VM_GDB_END;
    if (!L)
        return g->machine->failed ? VM_GDB_END : VM_GDB_DEFAULT;
    lua_pushcfunction(L, exit_protected);
    lua_insert(L, -2);
    lua_rawgeti(L, -3, -1 - (lua_Integer)vm_vcpu_index(cpu));
    lua_pushlightuserdata(L, e);
    if (lvm_pcall(L, g->machine, 3, 1)) {
        action = (int)lua_tointeger(L, -1);
        lua_pop(L, 1);
    }
    lvm_return(L, g->machine);
    return (vm_gdb_action)action;
}

static void orphan(lvm_object *o)        /* the machine closes: the stub has to go before it */
{
    lvm_gdb *g = (lvm_gdb *)o;
    vm_gdb *handle = g->stub;
    g->stub = NULL;
    vm_gdb_free(handle);
}

/* machine:gdbstub(address [, { runs_alone, reverse_interval, on_exit }]) */
static int machine_gdbstub(lua_State *L)
{
    static const char *const known[] = { "runs_alone", "reverse_interval", "on_exit", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    const char *address = luaL_checkstring(L, 2);
    vm_gdb_options options = VM_GDB_OPTIONS_INIT;
    vm_gdb *handle = NULL;
    lvm_gdb *g;
    lvm_call call;
    int status;
    lua_settop(L, 3);
    lvm_check_fields(L, 3, known);
    options.runs_alone = lvm_field_boolean(L, 3, "runs_alone");
    options.reverse_interval = lvm_field_range(L, 3, "reverse_interval", 0, INT64_MAX);
    g = lua_newuserdatauv(L, sizeof *g, 3);
    memset(g, 0, sizeof *g);
    g->machine = b;
    g->on_exit = LUA_NOREF;
    luaL_setmetatable(L, LVM_GDB);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, 4, 1);
    if (!lua_isnil(L, 3) && lvm_raw_field(L, 3, "on_exit") != LUA_TNIL) {
        luaL_argcheck(L, lua_isfunction(L, -1), 3, "option 'on_exit': function expected");
        g->on_exit = lvm_anchor(L, 1);
        options.on_exit = on_exit_call;
        options.user = g;
    }
    lua_settop(L, 4);
    lvm_enter(L, b, 1, &call);
    status = vm_gdbstub(b->m, address, &options, &handle);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    g->stub = handle;
    lvm_link(b, &g->o, handle, orphan);
    return 1;
}

static lvm_gdb *check_gdb(lua_State *L, int arg)
{
    lvm_gdb *g = luaL_checkudata(L, arg, LVM_GDB);
    lvm_check_open(L, g->machine, arg);
    luaL_argcheck(L, g->stub, arg, "stub is freed");
    return g;
}

/* gdb:serve(): the exit that ended it */
static int gdb_serve(lua_State *L)
{
    lvm_gdb *g = check_gdb(L, 1);
    lvm_machine *b = g->machine;
    lvm_universe *u = b->universe;
    unsigned count = vm_vcpu_count(b->m) + 4;   /* some for threads besides the vCPUs' */
    vm_exit e = VM_EXIT_INIT;
    lvm_call call;
    int status;
    if (b->depth)
        return luaL_error(L, "machine is in use: a stub cannot be served by a callback");
    lua_settop(L, 1);
    lua_createtable(L, (int)count, 0);
    g->spare = lua_newuserdatauv(L, count * sizeof *g->spare, 0);
    for (g->spare_count = 0; g->spare_count < count; g->spare_count++) {
        g->spare[g->spare_count] = lua_newthread(L);
        lua_rawseti(L, 2, (lua_Integer)g->spare_count + 1);
    }
    b->gdb = g;
    if (u->threads++ == 0)
        pthread_mutex_lock(&u->lock);
    lvm_enter(L, b, 1, &call);
    status = vm_gdb_serve(g->stub, &e);
    lvm_leave(L, b, &call);
    if (--u->threads == 0)
        pthread_mutex_unlock(&u->lock);
    b->gdb = NULL;
    g->spare_count = 0;
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_getiuservalue(L, 1, 1);
    lua_getfield(L, -1, "cpu");
    lvm_push_exit(L, lua_gettop(L), &e);
    return 1;
}

static int gdb_stop(lua_State *L)
{
    vm_gdb_stop(check_gdb(L, 1)->stub);
    return 0;
}

/* free(), __close and __gc */
static int gdb_free(lua_State *L)
{
    lvm_gdb *g = luaL_checkudata(L, 1, LVM_GDB);
    vm_gdb *handle = g->stub;
    if (handle && !lvm_is_open(g->machine))
        lvm_unlink(&g->o);               /* left to the process before fork() */
    if (!handle || !lvm_is_open(g->machine))
        return 0;
    if (g->machine->gdb == g)
        return luaL_error(L, "the stub is being served");
    g->stub = NULL;
    lvm_unlink(&g->o);
    vm_gdb_free(handle);
    return 0;
}

static int get_address(lua_State *L)
{
    lua_pushstring(L, vm_gdb_address(check_gdb(L, 1)->stub));
    return 1;
}

const luaL_Reg lvm_gdb_methods[] = { { "gdbstub", machine_gdbstub }, { NULL, NULL } };

/* ---- record and replay ---- */

static int check_fd(lua_State *L, int arg)
{
    luaL_Stream *file = luaL_checkudata(L, arg, LUA_FILEHANDLE);
    luaL_argcheck(L, file->closef, arg, "the file is closed");
    fflush(file->f);
    return fileno(file->f);
}

/* machine:record(file [, { skip_idle, max_bytes }]): the file must stay open until record_stop() */
static int machine_record(lua_State *L)
{
    static const char *const known[] = { "skip_idle", "max_bytes", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    int fd = check_fd(L, 2), status;
    vm_record_options options = VM_RECORD_OPTIONS_INIT;
    lvm_call call;
    lvm_check_fields(L, 3, known);
    options.skip_idle = lvm_field_boolean(L, 3, "skip_idle");
    options.max_bytes = lvm_field_range(L, 3, "max_bytes", 0, INT64_MAX);
    lua_settop(L, 2);
    lua_getiuservalue(L, 1, 1);
    lua_pushvalue(L, 2);
    lua_setfield(L, -2, "log");          /* kept from the collector */
    lvm_enter(L, b, 1, &call);
    status = vm_record(b->m, fd, &options);
    return lvm_finish(L, b, &call, status);
}

static int call_machine(lua_State *L, int (*fn)(vm_machine *))
{
    lvm_machine *b = lvm_check_machine(L, 1);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = fn(b->m);
    return lvm_finish(L, b, &call, status);
}

static int machine_record_stop(lua_State *L) { return call_machine(L, vm_record_stop); }
static int machine_replay_stop(lua_State *L) { return call_machine(L, vm_replay_stop); }

static int machine_replay(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    int fd = check_fd(L, 2), status;
    lvm_call call;
    lvm_enter(L, b, 1, &call);
    status = vm_replay(b->m, fd);
    return lvm_finish(L, b, &call, status);
}

static int machine_replay_info(lua_State *L)
{
    static const char *const modes[] = { "off", "recording", "playing" };
    vm_replay_info info = VM_REPLAY_INFO_INIT;
    int status = vm_replay_get_info(lvm_check_machine(L, 1)->m, &info);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_createtable(L, 0, 7);
    lua_pushstring(L, (unsigned)info.mode < 3 ? modes[info.mode] : "?");
    lua_setfield(L, -2, "mode");
    lua_pushinteger(L, (lua_Integer)info.position);
    lua_setfield(L, -2, "position");
    lua_pushinteger(L, (lua_Integer)info.end);
    lua_setfield(L, -2, "last");
    lua_pushinteger(L, (lua_Integer)info.events);
    lua_setfield(L, -2, "events");
    lua_pushinteger(L, (lua_Integer)info.bytes);
    lua_setfield(L, -2, "bytes");
    lua_pushinteger(L, info.status);
    lua_setfield(L, -2, "status");
    lua_pushboolean(L, info.at_end);
    lua_setfield(L, -2, "at_end");
    return 1;
}

static int machine_checksum(lua_State *L)
{
    uint64_t sum = 0;
    int status = vm_machine_checksum(lvm_check_machine(L, 1)->m, &sum);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)sum);
    return 1;
}

const luaL_Reg lvm_replay_methods[] = {
    { "record", machine_record }, { "record_stop", machine_record_stop }, { "replay", machine_replay },
    { "replay_stop", machine_replay_stop }, { "replay_info", machine_replay_info }, { "checksum", machine_checksum }, { NULL, NULL },
};

void lvm_open_gdb(lua_State *L)
{
    static const luaL_Reg meta[] = { { "__gc", gdb_free }, { "__close", gdb_free }, { NULL, NULL } };
    static const luaL_Reg methods[] = { { "serve", gdb_serve }, { "stop", gdb_stop }, { "free", gdb_free }, { NULL, NULL } };
    static const luaL_Reg getters[] = { { "address", get_address }, { NULL, NULL } };
    lvm_class(L, LVM_GDB, meta, methods, getters);
}
