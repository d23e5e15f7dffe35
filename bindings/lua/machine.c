/* machine.c - machines: making, asking, ending; booting; tracing. */
#include "lvm.h"

lvm_machine *lvm_check_machine(lua_State *L, int arg)
{
    lvm_machine *b = luaL_checkudata(L, arg, LVM_MACHINE);
    lvm_check_open(L, b, arg);
    if (b->tracing)
        luaL_error(L, "a trace function cannot use the machine");
    return b;
}

/* An empty box: closed, but with all that an open one needs of Lua. */
lvm_machine *lvm_new_machine(lua_State *L)
{
    lvm_machine *b = lua_newuserdatauv(L, sizeof *b, 1);
    memset(b, 0, sizeof *b);
    b->universe = lvm_universe_of(L);
    b->forks = lvm_forks();
    b->slot = LUA_NOREF;
    b->trace_fn = b->violation_fn = LUA_NOREF;
    luaL_setmetatable(L, LVM_MACHINE);
    lvm_new_anchors(L);
    lua_setiuservalue(L, -2, 1);
    lua_pushboolean(L, 0);
    b->slot = luaL_ref(L, LUA_REGISTRYINDEX);
    return b;
}

void lvm_add_vcpus(lua_State *L, lvm_machine *b, int box)
{
    lua_getiuservalue(L, box, 1);
    for (unsigned i = 0; i < vm_vcpu_count(b->m); i++) {
        lvm_new_vcpu(L, vm_vcpu_get(b->m, i), b, box);
        lua_rawseti(L, -2, -1 - (lua_Integer)i);
    }
    lua_pop(L, 1);
}

static const char *const backends[] = { "auto", "kvm", "jit", "interp", NULL };
static const char *const platforms[] = { "bare", "pc", NULL };

static int field_name(lua_State *L, int arg, const char *field, const char *const *names)
{
    const char *name = lvm_field_string(L, arg, field);
    if (!name)
        return 0;
    for (int i = 0; names[i]; i++)
        if (!strcmp(names[i], name))
            return i;
    return luaL_argerror(L, arg, lua_pushfstring(L, "option '%s': unknown value '%s'", field, name));
}

static uint64_t field_bytes(lua_State *L, int arg, const char *field)
{
    uint64_t bytes = 0;
    if (!lua_isnoneornil(L, arg) && lvm_raw_field(L, arg, field) != LUA_TNIL)
        bytes = lvm_check_bytes(L, lua_gettop(L));
    return bytes;
}

/* A name, or a list of names. */
static unsigned field_advice(lua_State *L, int arg, const char *field)
{
    unsigned advice = 0;
    int type = lua_isnoneornil(L, arg) ? LUA_TNIL : lvm_raw_field(L, arg, field), top = lua_gettop(L);
    if (type == LUA_TNIL)
        return 0;
    if (type != LUA_TTABLE)
        return 1u << lvm_check_name(L, top, lvm_advice_names, "advice");
    for (lua_Integer i = 1; lua_rawgeti(L, top, i) != LUA_TNIL; i++, lua_settop(L, top))
        advice |= 1u << lvm_check_name(L, top + 1, lvm_advice_names, "advice");
    return advice;
}

int lvm_machine_new(lua_State *L)
{
    static const char *const known[] = { "backend", "platform", "vcpus", "mmu", "memory", "code_cache", "cpu_model",
                                         "memory_file", "memory_private", "memory_advice", NULL };
    vm_options options = VM_OPTIONS_INIT;
    lvm_call call;
    lvm_machine *b;
    int status, box;
    lua_settop(L, 1);
    lvm_check_fields(L, 1, known);
    options.backend = (vm_backend)field_name(L, 1, "backend", backends);
    options.platform = (vm_platform)field_name(L, 1, "platform", platforms);
    options.vcpus = (uint32_t)lvm_field_range(L, 1, "vcpus", 0, UINT32_MAX);
    options.mmu = lvm_field_string(L, 1, "mmu");
    options.ram_bytes = field_bytes(L, 1, "memory");
    options.code_cache_bytes = field_bytes(L, 1, "code_cache");
    options.cpu_model = lvm_field_string(L, 1, "cpu_model");
    options.ram_file = lvm_field_string(L, 1, "memory_file");
    options.ram_private = lvm_field_boolean(L, 1, "memory_private");
    options.ram_advice = field_advice(L, 1, "memory_advice");
    b = lvm_new_machine(L);
    box = lua_gettop(L);
    lvm_enter(L, b, box, &call);         /* a strategy written in Lua may be asked to come along */
    lvm_mmu_creating(b);
    status = vm_create(&options, &b->m);
    lvm_mmu_creating(NULL);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lvm_add_vcpus(L, b, box);
    lua_settop(L, box);
    return 1;
}

/* The vCPUs' traces: libvm writes them no more. The machine is at index 1. */
static void drop_rings(lua_State *L)
{
    lvm_vcpu *v;
    lua_getiuservalue(L, 1, 1);
    for (lua_Integer i = -1; lua_rawgeti(L, -1, i) != LUA_TNIL; i--) {
        v = lua_touserdata(L, -1);
        for (int k = 0; k < 2; k++) {
            lvm_drop_block(v->ring[k]);
            v->ring[k] = NULL;
        }
        lua_pop(L, 1);
    }
    lua_pop(L, 2);
}

static void destroy(lua_State *L, lvm_machine *b)
{
    lvm_call call;
    while (b->objects) {
        lvm_object *o = b->objects;
        lvm_unlink(o);
        if (o->orphan)
            o->orphan(o);
    }
    lvm_free_dead(b);
    lvm_enter(L, b, 1, &call);
    vm_destroy(b->m);
    lvm_leave(L, b, &call);
}

/* The one destructor behind close(), __close and __gc. After fork() the machine is left alone: its threads do not exist. */
static int close_machine(lua_State *L)
{
    lvm_machine *b = luaL_checkudata(L, 1, LVM_MACHINE);
    if (b->m) {
        if (b->depth)
            return luaL_error(L, "machine is in use: it cannot be closed by a callback of its own");
        if (lvm_is_open(b))
            destroy(L, b);
        b->m = NULL;
        lvm_free_consoles(b);
        lvm_drop_hosts(b);
        lvm_drop_block(b->coverage);
        b->coverage = NULL;
        free(b->breaks);
        b->breaks = NULL;
        b->break_count = 0;
        drop_rings(L);
    }
    if (b->slot != LUA_NOREF && !b->failed) {
        luaL_unref(L, LUA_REGISTRYINDEX, b->slot);
        b->slot = LUA_NOREF;
    }
    if (b->failed) {
        /* A `destroy` callback failed: the machine is gone all the same. */
        int slot = b->slot;
        b->slot = LUA_NOREF;
        b->failed = false;
        luaL_unref(L, LUA_REGISTRYINDEX, slot);
        lua_warning(L, "libvm: an error in a callback while a machine was closed", 0);
    }
    lvm_new_anchors(L);
    lua_setiuservalue(L, 1, 1);
    return 0;
}

static int machine_tostring(lua_State *L)
{
    lvm_machine *b = luaL_checkudata(L, 1, LVM_MACHINE);
    if (b->m)
        lua_pushfstring(L, "libvm.machine (%s, %d vCPUs): %p", vm_backend_name(vm_machine_backend(b->m)),
                        (int)vm_vcpu_count(b->m), b);
    else
        lua_pushfstring(L, "libvm.machine (closed): %p", b);
    return 1;
}

static int machine_reset(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_reset(b->m);
    return lvm_finish(L, b, &call, status);
}

static int machine_select_backend(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    int backend = lvm_check_name(L, 2, backends, "backend"), status;
    lvm_call call;
    lvm_enter(L, b, 1, &call);
    status = vm_backend_select(b->m, (vm_backend)backend);
    return lvm_finish(L, b, &call, status);
}

static int machine_stats(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t value = 0;
    const char *name;
    int status;
    if (lua_isnoneornil(L, 2)) {
        lua_newtable(L);
        for (unsigned i = 0; (name = vm_stat_name(i, NULL)); i++)
            if (vm_stats(b->m, name, &value) == VM_OK) {
                lua_pushinteger(L, (lua_Integer)value);
                lua_setfield(L, -2, name);
            }
        return 1;
    }
    status = vm_stats(b->m, luaL_checkstring(L, 2), &value);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)value);
    return 1;
}

static int machine_vcpu(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t index = lvm_check_range(L, 2, UINT32_MAX);
    if (index >= vm_vcpu_count(b->m))
        return 0;
    lua_getiuservalue(L, 1, 1);
    lua_rawgeti(L, -1, -1 - (lua_Integer)index);
    return 1;
}

static int next_vcpu(lua_State *L)
{
    lua_Integer i = lua_tointeger(L, lua_upvalueindex(2));
    lua_pushinteger(L, i + 1);
    lua_replace(L, lua_upvalueindex(2));
    lua_settop(L, 0);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_pushinteger(L, i);
    return machine_vcpu(L);
}

static int machine_vcpus(lua_State *L)
{
    lvm_check_machine(L, 1);
    lua_settop(L, 1);
    lua_pushinteger(L, 0);
    lua_pushcclosure(L, next_vcpu, 2);
    return 1;
}

/* ---- booting ---- */

static int machine_boot(lua_State *L)
{
    static const char *const known[] = { "kernel", "initrd", "cmdline", "bios", "linux_entry", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_boot_options options = VM_BOOT_OPTIONS_INIT;
    lvm_call call;
    int status;
    luaL_checktype(L, 2, LUA_TTABLE);
    lvm_check_fields(L, 2, known);
    options.kernel = lvm_field_string(L, 2, "kernel");
    options.initrd = lvm_field_string(L, 2, "initrd");
    options.cmdline = lvm_field_string(L, 2, "cmdline");
    options.bios = lvm_field_string(L, 2, "bios");
    options.linux_entry = (uint32_t)lvm_field_range(L, 2, "linux_entry", 0, UINT32_MAX);
    lvm_enter(L, b, 1, &call);
    status = vm_boot_image(b->m, &options);
    return lvm_finish(L, b, &call, status);
}

static int machine_boot_linux(lua_State *L)
{
    static const char *const known[] = { "kernel", "initrd", "cmdline", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_linux_boot boot = VM_LINUX_BOOT_INIT;
    lvm_call call;
    int status;
    luaL_checktype(L, 2, LUA_TTABLE);
    lvm_check_fields(L, 2, known);
    boot.kernel = lvm_field_string(L, 2, "kernel");
    boot.initrd = lvm_field_string(L, 2, "initrd");
    boot.cmdline = lvm_field_string(L, 2, "cmdline");
    lvm_enter(L, b, 1, &call);
    status = vm_boot_linux(b->m, &boot);
    return lvm_finish(L, b, &call, status);
}

static int machine_load_elf(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    const char *path = luaL_checkstring(L, 2);
    uint64_t entry = 0;
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_load_elf(b->m, path, &entry);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)entry);
    return 1;
}

static int machine_load_raw(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    const char *path = luaL_checkstring(L, 2);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_load_raw(b->m, path, gpa);
    return lvm_finish(L, b, &call, status);
}

/* ---- getters ---- */

static int get_cpu(lua_State *L)
{
    lvm_check_machine(L, 1);
    lua_getiuservalue(L, 1, 1);
    lua_rawgeti(L, -1, -1);
    return 1;
}

static int get_backend(lua_State *L)
{
    lua_pushstring(L, vm_backend_name(vm_machine_backend(lvm_check_machine(L, 1)->m)));
    return 1;
}

static int get_mmu(lua_State *L)
{
    lua_pushstring(L, vm_mmu_current(lvm_check_machine(L, 1)->m));
    return 1;
}

static int get_time(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)vm_time(lvm_check_machine(L, 1)->m));
    return 1;
}

static int get_vcpu_count(lua_State *L)
{
    lua_pushinteger(L, vm_vcpu_count(lvm_check_machine(L, 1)->m));
    return 1;
}

static int get_closed(lua_State *L)
{
    lvm_machine *b = luaL_checkudata(L, 1, LVM_MACHINE);
    lua_pushboolean(L, !lvm_is_open(b));
    return 1;
}

void lvm_open_machine(lua_State *L)
{
    static const luaL_Reg meta[] = {
        { "__gc", close_machine }, { "__close", close_machine }, { "__tostring", machine_tostring }, { NULL, NULL },
    };
    static const luaL_Reg methods[] = {
        { "close", close_machine },
        { "reset", machine_reset },
        { "select_backend", machine_select_backend },
        { "stats", machine_stats },
        { "vcpu", machine_vcpu },
        { "vcpus", machine_vcpus },
        { "boot", machine_boot },
        { "boot_linux", machine_boot_linux },
        { "load_elf", machine_load_elf },
        { "load_raw", machine_load_raw },
        { NULL, NULL },
    };
    static const luaL_Reg getters[] = {
        { "cpu", get_cpu }, { "backend", get_backend }, { "mmu", get_mmu }, { "time", get_time },
        { "vcpu_count", get_vcpu_count }, { "closed", get_closed }, { NULL, NULL },
    };
    static const luaL_Reg *const more[] = { lvm_memory_methods, lvm_console_methods, lvm_run_methods, lvm_mmu_methods,
                                            lvm_hook_methods, lvm_snapshot_methods, lvm_coverage_methods, lvm_call_methods,
                                            lvm_replay_methods, lvm_gdb_methods };
    lvm_class(L, LVM_MACHINE, meta, methods, getters);
    luaL_getmetatable(L, LVM_MACHINE);
    lua_getfield(L, -1, "methods");
    for (size_t i = 0; i < sizeof more / sizeof *more; i++)
        luaL_setfuncs(L, more[i], 0);
    lua_pop(L, 2);
}
