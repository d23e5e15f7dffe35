/* snapshot.c - snapshots, in memory and in files, and clones of machines. */
#include "lvm.h"
#include <stdio.h>

/* User values: 1 the machine, 2 a list of the regions that were mapped. */
typedef struct snapshot_box {
    lvm_machine *machine;
    lvm_snapshot *s;                    /* NULL: freed */
} snapshot_box;

static void orphan(lvm_object *o)        /* the machine closes: vm_destroy frees it */
{
    lvm_snapshot *s = (lvm_snapshot *)o;
    s->closed = true;
}

/* Snapshots that the collector found while the machine was running. */
void lvm_free_dead(lvm_machine *b)
{
    while (b->dead) {
        lvm_snapshot *s = b->dead;
        b->dead = s->next_dead;
        vm_snapshot_free(s->o.handle);
        lvm_unlink(&s->o);
        free(s);
    }
}

/* Pushes a box for a snapshot to come. */
static snapshot_box *new_snapshot(lua_State *L, lvm_machine *b)
{
    snapshot_box *x = lua_newuserdatauv(L, sizeof *x, 2);
    lua_Integer n = 0;
    int box = lua_gettop(L);
    x->machine = b;
    x->s = NULL;
    luaL_setmetatable(L, LVM_SNAPSHOT);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, box, 1);
    lua_newtable(L);
    lua_getiuservalue(L, 1, 1);
    for (lua_pushnil(L); lua_next(L, box + 2);)
        if (luaL_testudata(L, -1, LVM_REGION))
            lua_rawseti(L, box + 1, ++n);
        else
            lua_pop(L, 1);
    lua_pop(L, 1);
    lua_setiuservalue(L, box, 2);
    x->s = calloc(1, sizeof *x->s);
    if (!x->s)
        luaL_error(L, "not enough memory");
    lvm_link(b, &x->s->o, NULL, orphan);
    return x;
}

static int made(lua_State *L, snapshot_box *x, vm_snapshot *handle, int status)
{
    if (status == VM_OK) {
        x->s->o.handle = handle;
        x->machine->snapshots++;
        lvm_raise(L, x->machine);
        return 1;
    }
    lvm_unlink(&x->s->o);
    free(x->s);
    x->s = NULL;
    lvm_raise(L, x->machine);
    return lvm_fail(L, status);
}

static int machine_snapshot(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_snapshot *handle = NULL;
    snapshot_box *x;
    lvm_call call;
    int status;
    lua_settop(L, 1);
    x = new_snapshot(L, b);
    lvm_enter(L, b, 1, &call);
    status = vm_snapshot_take(b->m, &handle);
    lvm_leave(L, b, &call);
    return made(L, x, handle, status);
}

static unsigned check_flags(lua_State *L, int arg)
{
    static const char *const known[] = { "compress", "no_verify", "no_sync", NULL };
    lvm_check_fields(L, arg, known);
    return (lvm_field_boolean(L, arg, "compress") ? VM_SNAPSHOT_COMPRESS : 0u) |
           (lvm_field_boolean(L, arg, "no_verify") ? VM_SNAPSHOT_NO_VERIFY : 0u) |
           (lvm_field_boolean(L, arg, "no_sync") ? VM_SNAPSHOT_NO_SYNC : 0u);
}

/* A path, or NULL and the file's descriptor. */
static const char *check_file(lua_State *L, int arg, int *fd)
{
    luaL_Stream *file;
    if (lua_type(L, arg) == LUA_TSTRING)
        return lua_tostring(L, arg);
    file = luaL_checkudata(L, arg, LUA_FILEHANDLE);
    luaL_argcheck(L, file->closef, arg, "the file is closed");
    fflush(file->f);
    *fd = fileno(file->f);
    return NULL;
}

/* machine:load_snapshot(path or file [, { no_verify }]) */
static int machine_load_snapshot(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    int fd = -1, status;
    const char *path = check_file(L, 2, &fd);
    unsigned flags = check_flags(L, 3);
    vm_snapshot *handle = NULL;
    snapshot_box *x;
    lvm_call call;
    lua_settop(L, 2);
    x = new_snapshot(L, b);
    lvm_enter(L, b, 1, &call);
    status = path ? vm_snapshot_load_file(b->m, path, flags, &handle) : vm_snapshot_load(b->m, fd, &handle);
    lvm_leave(L, b, &call);
    return made(L, x, handle, status);
}

static snapshot_box *check_snapshot(lua_State *L, int arg)
{
    snapshot_box *x = luaL_checkudata(L, arg, LVM_SNAPSHOT);
    lvm_check_open(L, x->machine, arg);
    luaL_argcheck(L, x->s, arg, "snapshot is freed");
    return x;
}

/* The map is now as it was: regions come back, others are gone. */
static void restore_regions(lua_State *L, int box)
{
    int anchors, list;
    lua_getiuservalue(L, box, 1);
    lua_getiuservalue(L, -1, 1);
    anchors = lua_gettop(L);
    lua_getiuservalue(L, box, 2);
    list = lua_gettop(L);
    lua_newtable(L);                     /* the regions of the list */
    for (lua_Integer i = 1; lua_rawgeti(L, list, i) != LUA_TNIL; i++) {
        lvm_region *g = lua_touserdata(L, -1);
        lua_pushvalue(L, -1);
        lua_pushboolean(L, 1);
        lua_rawset(L, list + 1);
        if (!g->r) {
            g->r = g->handle;
            lua_pushvalue(L, -1);
            g->self = luaL_ref(L, anchors);
        }
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    for (lua_pushnil(L); lua_next(L, anchors);) {
        lvm_region *g = luaL_testudata(L, -1, LVM_REGION);
        if (g && g->r) {
            lua_pushvalue(L, -1);
            if (lua_rawget(L, list + 1) == LUA_TNIL) {
                /* Assigning to existing fields is allowed while a table is traversed. */
                lua_pop(L, 2);
                lua_pushvalue(L, -1);
                lua_pushboolean(L, 0);
                lua_rawset(L, anchors);
                g->self = LUA_NOREF;
                g->r = NULL;
                continue;
            }
            lua_pop(L, 1);
        }
        lua_pop(L, 1);
    }
    lua_settop(L, anchors - 2);
}

/* The snapshot at `arg`. */
static int restore(lua_State *L, lvm_machine *b, int arg)
{
    snapshot_box *x = check_snapshot(L, arg);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_snapshot_restore(b->m, x->s->o.handle);
    lvm_leave(L, b, &call);
    if (status == VM_OK)
        restore_regions(L, arg);
    lvm_raise(L, b);
    return lvm_done(L, status);
}

static int snapshot_restore(lua_State *L)
{
    return restore(L, check_snapshot(L, 1)->machine, 1);
}

static int machine_restore(lua_State *L)
{
    return restore(L, lvm_check_machine(L, 1), 2);
}

/* snapshot:save(path or file [, { compress, no_sync }]) */
static int snapshot_save(lua_State *L)
{
    snapshot_box *x = check_snapshot(L, 1);
    lvm_machine *b = x->machine;
    int fd = -1, status;
    const char *path = check_file(L, 2, &fd);
    unsigned flags = check_flags(L, 3);
    lvm_call call;
    lvm_enter(L, b, 1, &call);
    status = path ? vm_snapshot_save_file(x->s->o.handle, path, flags) : vm_snapshot_save(x->s->o.handle, fd);
    return lvm_finish(L, b, &call, status);
}

/* free(), __close and __gc */
static int snapshot_free(lua_State *L)
{
    snapshot_box *x = luaL_checkudata(L, 1, LVM_SNAPSHOT);
    lvm_snapshot *s = x->s;
    lvm_machine *b = x->machine;
    lvm_call call;
    x->s = NULL;
    if (!s)
        return 0;
    if (s->closed || !lvm_is_open(b)) {
        lvm_unlink(&s->o);
        free(s);
        return 0;
    }
    b->snapshots--;
    if (b->depth) {                      /* in a callback: when the call is over */
        s->next_dead = b->dead;
        b->dead = s;
        return 0;
    }
    lvm_enter(L, b, 1, &call);
    vm_snapshot_free(s->o.handle);
    lvm_leave(L, b, &call);
    lvm_unlink(&s->o);
    free(s);
    lvm_raise(L, b);
    return 0;
}

static int get_bytes(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)vm_snapshot_bytes(check_snapshot(L, 1)->s->o.handle));
    return 1;
}

static int get_machine(lua_State *L)
{
    luaL_checkudata(L, 1, LVM_SNAPSHOT);
    lua_getiuservalue(L, 1, 1);
    return 1;
}

static int machine_fork(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1), *copy;
    lvm_call call, inner;
    int status;
    lua_settop(L, 1);
    copy = lvm_new_machine(L);
    lvm_enter(L, b, 1, &call);
    lvm_mmu_creating(copy);
    lvm_enter(L, copy, 2, &inner);
    status = vm_fork(b->m, &copy->m);
    lvm_leave(L, copy, &inner);
    lvm_mmu_creating(NULL);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    lvm_raise(L, copy);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lvm_add_vcpus(L, copy, 2);
    return 1;
}

const luaL_Reg lvm_snapshot_methods[] = {
    { "snapshot", machine_snapshot },
    { "restore", machine_restore },
    { "load_snapshot", machine_load_snapshot },
    { "fork", machine_fork },
    { NULL, NULL },
};

void lvm_open_snapshot(lua_State *L)
{
    static const luaL_Reg meta[] = { { "__gc", snapshot_free }, { "__close", snapshot_free }, { NULL, NULL } };
    static const luaL_Reg methods[] = {
        { "restore", snapshot_restore }, { "save", snapshot_save }, { "free", snapshot_free }, { NULL, NULL },
    };
    static const luaL_Reg getters[] = { { "bytes", get_bytes }, { "machine", get_machine }, { NULL, NULL } };
    lvm_class(L, LVM_SNAPSHOT, meta, methods, getters);
}
