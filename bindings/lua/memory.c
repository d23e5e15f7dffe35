/* memory.c - the memory map: regions, buffers, copies, permissions, the dirty log. */
#include "lvm.h"
#include <stdio.h>

/* The most that one read() copies: Lua strings are meant to be held in memory. */
#define READ_MAX (1u << 31)

/* ---- blocks: memory that buffers and maps share ---- */

void lvm_drop_block(lvm_block *block)
{
    if (block && --block->references == 0) {
        free(block->data);
        free(block);
    }
}

static void drop_host(lvm_machine *b, lvm_host *host)
{
    lvm_host **link = &b->hosts;
    while (*link != host)
        link = &(*link)->next;
    *link = host->next;
    lvm_drop_block(host->block);
    free(host);
}

void lvm_drop_hosts(lvm_machine *b)
{
    while (b->hosts)
        drop_host(b, b->hosts);
}

lvm_block *lvm_new_block(size_t bytes)
{
    lvm_block *block = malloc(sizeof *block);
    size_t room = (bytes + 4095) & ~(size_t)4095;
    if (!block)
        return NULL;
    block->references = 1;
    block->bytes = bytes;
    block->data = aligned_alloc(4096, room ? room : 4096);
    if (!block->data) {
        free(block);
        return NULL;
    }
    memset(block->data, 0, room ? room : 4096);
    return block;
}

/* ---- buffers ---- */

int lvm_buffer_new(lua_State *L)
{
    bool copies = lua_type(L, 1) == LUA_TSTRING;
    size_t bytes;
    const char *text = copies ? lua_tolstring(L, 1, &bytes) : NULL;
    lvm_buffer *v;
    if (!copies)
        bytes = lvm_check_range(L, 1, INT64_MAX >> 16);
    v = lua_newuserdatauv(L, sizeof *v, 1);
    memset(v, 0, sizeof *v);
    luaL_setmetatable(L, LVM_BUFFER);
    v->block = lvm_new_block(bytes);
    if (!v->block)
        return luaL_error(L, "not enough memory for a buffer of %I bytes", (lua_Integer)bytes);
    if (copies)
        memcpy(v->block->data, text, bytes);
    return 1;
}

uint8_t *lvm_check_span(lua_State *L, int arg, size_t *bytes)
{
    lvm_buffer *v = luaL_checkudata(L, arg, LVM_BUFFER);
    if (v->region) {
        if (!lvm_is_open(v->region->machine) || !v->region->r)
            luaL_argerror(L, arg, "the buffer's region is gone");
        *bytes = vm_region_bytes(v->region->r);
        return vm_region_data(v->region->r);
    }
    if (v->data) {
        *bytes = v->bytes;
        return v->data;
    }
    luaL_argcheck(L, v->block, arg, "the buffer's call is over");
    *bytes = v->block->bytes;
    return v->block->data;
}

static uint8_t *check_place(lua_State *L, size_t width)
{
    size_t bytes;
    uint8_t *data = lvm_check_span(L, 1, &bytes);
    lua_Integer offset = luaL_checkinteger(L, 2);
    if (offset < 0 || (uint64_t)offset > bytes || bytes - (uint64_t)offset < width)
        lvm_refuse(L, 2, "outside of the buffer");
    return data + offset;
}

/* buffer:u32(offset [, value]) */
#define ACCESSOR(name, type, push, check)                   \
    static int buffer_##name(lua_State *L)                  \
    {                                                       \
        uint8_t *at = check_place(L, sizeof(type));         \
        type value;                                         \
        if (lua_isnoneornil(L, 3)) {                        \
            memcpy(&value, at, sizeof value);               \
            push;                                           \
            return 1;                                       \
        }                                                   \
        value = (type)check(L, 3);                          \
        memcpy(at, &value, sizeof value);                   \
        return 0;                                           \
    }
#define AS_INTEGER lua_pushinteger(L, (lua_Integer)value)
#define AS_NUMBER  lua_pushnumber(L, (lua_Number)value)
ACCESSOR(u8, uint8_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(u16, uint16_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(u32, uint32_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(u64, uint64_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(i8, int8_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(i16, int16_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(i32, int32_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(i64, int64_t, AS_INTEGER, luaL_checkinteger)
ACCESSOR(f32, float, AS_NUMBER, luaL_checknumber)
ACCESSOR(f64, double, AS_NUMBER, luaL_checknumber)

static int buffer_read(lua_State *L)
{
    size_t bytes;
    uint8_t *data = lvm_check_span(L, 1, &bytes);
    lua_Integer offset = luaL_optinteger(L, 2, 0), n;
    if (offset < 0 || (uint64_t)offset > bytes)
        lvm_refuse(L, 2, "outside of the buffer");
    n = luaL_optinteger(L, 3, (lua_Integer)(bytes - (uint64_t)offset));
    if (n < 0 || (uint64_t)n > bytes - (uint64_t)offset)
        lvm_refuse(L, 3, "outside of the buffer");
    lua_pushlstring(L, (const char *)data + offset, (size_t)n);
    return 1;
}

static int buffer_write(lua_State *L)
{
    size_t n, bytes;
    const char *text = luaL_checklstring(L, 3, &n);
    uint8_t *data = lvm_check_span(L, 1, &bytes);
    lua_Integer offset = luaL_checkinteger(L, 2);
    if (offset < 0 || (uint64_t)offset > bytes || n > bytes - (uint64_t)offset)
        lvm_refuse(L, 2, "outside of the buffer");
    memcpy(data + offset, text, n);
    return 0;
}

static int buffer_fill(lua_State *L)
{
    size_t bytes;
    uint8_t *data = lvm_check_span(L, 1, &bytes);
    memset(data, (int)lvm_check_range(L, 2, 255), bytes);
    return 0;
}

static int buffer_tostring(lua_State *L)
{
    lua_settop(L, 1);
    return buffer_read(L);
}

static int buffer_len(lua_State *L)
{
    size_t bytes;
    lvm_check_span(L, 1, &bytes);
    lua_pushinteger(L, (lua_Integer)bytes);
    return 1;
}

static int buffer_gc(lua_State *L)
{
    lvm_buffer *v = luaL_checkudata(L, 1, LVM_BUFFER);
    lvm_drop_block(v->block);
    v->block = NULL;
    return 0;
}

/* ---- regions ---- */

static lvm_region *check_region(lua_State *L, int arg)
{
    lvm_region *g = luaL_checkudata(L, arg, LVM_REGION);
    lvm_check_open(L, g->machine, arg);
    if (!g->r)
        luaL_argerror(L, arg, "region is unmapped");
    return g;
}

/* A box for a region that is still to be mapped; pushes it. Anchored, so that regions() finds it. */
static lvm_region *new_region(lua_State *L, lvm_machine *b)
{
    lvm_region *g = lua_newuserdatauv(L, sizeof *g, 1);
    g->r = g->handle = NULL;
    g->machine = b;
    g->host = NULL;
    g->self = LUA_NOREF;
    luaL_setmetatable(L, LVM_REGION);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    lua_pushvalue(L, -1);
    g->self = lvm_anchor(L, 1);
    return g;
}

static void forget_region(lua_State *L, lvm_region *g, int box)
{
    if (g->self != LUA_NOREF) {
        lua_getiuservalue(L, box, 1);
        lua_getiuservalue(L, -1, 1);
        luaL_unref(L, -1, g->self);
        lua_pop(L, 2);
    }
    g->self = LUA_NOREF;
    g->handle = g->r;
    g->r = NULL;
    if (g->host && !g->machine->snapshots) {
        drop_host(g->machine, g->host);
        g->host = NULL;
    }
}

/* The end of each map function: the region on top, or the failure. */
static int mapped(lua_State *L, lvm_region *g, int status)
{
    int box = lua_gettop(L);
    if (status == VM_OK)
        return 1;
    forget_region(L, g, box);
    return lvm_fail(L, status);
}

static int machine_map_ram(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3);
    unsigned prot = lua_isnoneornil(L, 4) ? VM_PROT_RWX : lvm_check_prot(L, 4);
    lvm_region *g = new_region(L, b);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_map_ram(b->m, gpa, bytes, (vm_prot)prot, &g->r);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    return mapped(L, g, status);
}

static int machine_map_host(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2);
    lvm_buffer *v = luaL_checkudata(L, 3, LVM_BUFFER);
    unsigned prot = lua_isnoneornil(L, 4) ? VM_PROT_RWX : lvm_check_prot(L, 4);
    lvm_region *g;
    lvm_call call;
    int status;
    luaL_argcheck(L, v->block, 3, "a buffer with memory of its own expected, not a view");
    g = new_region(L, b);
    g->host = malloc(sizeof *g->host);
    if (!g->host)
        return luaL_error(L, "not enough memory");
    *g->host = (lvm_host){ b->hosts, v->block };
    b->hosts = g->host;
    v->block->references++;
    lvm_enter(L, b, 1, &call);
    status = vm_map_host(b->m, gpa, v->block->bytes, (vm_prot)prot, v->block->data, &g->r);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    return mapped(L, g, status);
}

static int machine_map_file(lua_State *L)
{
    static const char *const known[] = { "offset", "private", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3), offset;
    unsigned prot = lvm_check_prot(L, 4);
    luaL_Stream *file = luaL_checkudata(L, 5, LUA_FILEHANDLE);
    bool private_copy;
    lvm_region *g;
    lvm_call call;
    int status;
    luaL_argcheck(L, file->closef, 5, "the file is closed");
    lvm_check_fields(L, 6, known);
    offset = lvm_field_range(L, 6, "offset", 0, INT64_MAX);
    private_copy = lvm_field_boolean(L, 6, "private");
    g = new_region(L, b);
    fflush(file->f);
    lvm_enter(L, b, 1, &call);
    status = vm_map_file(b->m, gpa, bytes, (vm_prot)prot, fileno(file->f), offset, private_copy, &g->r);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    return mapped(L, g, status);
}

/* ---- devices: a table with functions read(self, offset, width, cpu), write(self, offset, width, value, cpu), reset(self),
 * save(self), restore(self, state), destroy(self), clone(self) for fork(), all optional, looked up once ---- */

enum { READ, WRITE, RESET, SAVE, RESTORE, DESTROY, CLONE, FUNCTIONS };
static const char *const function_names[FUNCTIONS] = { "read", "write", "reset", "save", "restore", "destroy", "clone" };

typedef struct device {
    lvm_machine *machine;
    int    self, fn[FUNCTIONS];         /* in the anchors */
    char  *saved;                       /* between the two calls that make a save */
    size_t saved_bytes;
} device;

/* Function `which` and the device's table on the stack, or NULL. */
static lua_State *begin_device(device *d, int which)
{
    lua_State *L = d->fn[which] != LUA_NOREF ? lvm_callback(d->machine, d->fn[which]) : NULL;
    if (L)
        lua_rawgeti(L, -2, d->self);
    return L;
}

static int bad_value(lua_State *L)
{
    return luaL_error(L, "a device's read must return an integer or nil");
}

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    device *d = user;
    lua_State *L = begin_device(d, READ);
    int result = -1, ok;
    if (!L)
        return -1;
    lua_pushinteger(L, (lua_Integer)offset);
    lua_pushinteger(L, width);
    lua_rawgeti(L, -5, -1 - (lua_Integer)vm_vcpu_index(cpu));
    if (lvm_pcall(L, d->machine, 4, 1)) {
        *value = (uint64_t)lua_tointegerx(L, -1, &ok);
        result = ok ? 0 : -1;            /* nil: the device does not answer */
        ok |= lua_isnil(L, -1);
        lua_pop(L, 1);
        if (!ok) {
            lua_pushcfunction(L, bad_value);
            lvm_pcall(L, d->machine, 0, 0);
        }
    }
    lvm_return(L, d->machine);
    return result;
}

static int device_write(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t value)
{
    device *d = user;
    lua_State *L = begin_device(d, WRITE);
    int result = -1;
    if (!L)
        return -1;
    lua_pushinteger(L, (lua_Integer)offset);
    lua_pushinteger(L, width);
    lua_pushinteger(L, (lua_Integer)value);
    lua_rawgeti(L, -6, -1 - (lua_Integer)vm_vcpu_index(cpu));
    if (lvm_pcall(L, d->machine, 5, 1)) {
        /* false: the device does not answer; anything else, nothing too: it took it */
        result = lua_isboolean(L, -1) && !lua_toboolean(L, -1) ? -1 : 0;
        lua_pop(L, 1);
    }
    lvm_return(L, d->machine);
    return result;
}

static void device_reset(void *user)
{
    device *d = user;
    lua_State *L = begin_device(d, RESET);
    if (!L)
        return;
    lvm_pcall(L, d->machine, 1, 0);
    lvm_return(L, d->machine);
}

/* Called twice: for the size, then for the bytes. The device's function is called once. */
static int device_save(void *user, void *buffer, size_t *bytes)
{
    device *d = user;
    if (!buffer) {
        lua_State *L = begin_device(d, SAVE);
        const char *text;
        size_t n;
        int status = VM_E_HOST;
        if (!L)
            return VM_E_HOST;
        if (lvm_pcall(L, d->machine, 1, 1)) {
            text = lua_type(L, -1) == LUA_TSTRING ? lua_tolstring(L, -1, &n) : NULL;
            free(d->saved);
            d->saved = text ? malloc(n ? n : 1) : NULL;
            if (d->saved) {
                memcpy(d->saved, text, n);
                d->saved_bytes = n;
                status = VM_OK;
            }
            lua_pop(L, 1);
        }
        lvm_return(L, d->machine);
        *bytes = status == VM_OK ? d->saved_bytes : 0;
        return status;
    }
    if (!d->saved || *bytes < d->saved_bytes)
        return VM_E_INVALID;
    memcpy(buffer, d->saved, d->saved_bytes);
    *bytes = d->saved_bytes;
    return VM_OK;
}

typedef struct bytes_view { const void *data; size_t bytes; } bytes_view;

static int push_bytes(lua_State *L)      /* function, self, view: makes the string where a lack of memory is caught */
{
    const bytes_view *view = lua_touserdata(L, 3);
    lua_settop(L, 2);
    lua_pushlstring(L, view->data, view->bytes);
    lua_call(L, 2, 0);
    return 0;
}

static int device_restore(void *user, const void *buffer, size_t bytes)
{
    device *d = user;
    bytes_view view = { buffer, bytes };
    lua_State *L = begin_device(d, RESTORE);
    int ok;
    if (!L)
        return VM_E_HOST;
    lua_pushcfunction(L, push_bytes);
    lua_insert(L, -3);
    lua_pushlightuserdata(L, &view);
    ok = lvm_pcall(L, d->machine, 3, 0);
    lvm_return(L, d->machine);
    return ok ? VM_OK : VM_E_HOST;
}

static void device_destroy(void *user)
{
    device *d = user;
    if (d->fn[DESTROY] != LUA_NOREF) {
        lua_State *L = begin_device(d, DESTROY);
        if (L) {
            lvm_pcall(L, d->machine, 1, 0);
            lvm_return(L, d->machine);
        }
    }
    for (int i = 0; i < FUNCTIONS; i++)
        lvm_forget(d->machine, d->fn[i]);
    lvm_forget(d->machine, d->self);
    free(d->saved);
    free(d);
}

/* The device of the table at `arg`. Everything that can raise comes before the memory is taken. */
static device *new_device(lua_State *L, lvm_machine *b, int anchors, int arg)
{
    int refs[FUNCTIONS + 1];
    bool was_open = b->m;                /* else the copy that is being made */
    device *d;
    luaL_checktype(L, arg, LUA_TTABLE);
    for (int i = 0; i < FUNCTIONS; i++) {
        int type = lua_getfield(L, arg, function_names[i]);
        if (type != LUA_TNIL && type != LUA_TFUNCTION)
            luaL_argerror(L, arg, lua_pushfstring(L, "field '%s' is not a function", function_names[i]));
    }
    if (was_open)
        lvm_check_open(L, b, 1);         /* a metamethod of the table may have closed it */
    for (int i = FUNCTIONS; i--;)
        if (lua_isnil(L, -1)) {
            lua_pop(L, 1);
            refs[i] = LUA_NOREF;
        } else {
            refs[i] = luaL_ref(L, anchors);
        }
    lua_pushvalue(L, arg);
    refs[FUNCTIONS] = luaL_ref(L, anchors);
    d = malloc(sizeof *d);
    if (!d)
        luaL_error(L, "not enough memory");
    *d = (device){ .machine = b, .self = refs[FUNCTIONS] };
    memcpy(d->fn, refs, sizeof d->fn);
    return d;
}

/* self, clone, place for the result: for another machine, whose anchors are in its slot during the call */
static int clone_protected(lua_State *L)
{
    device **out = lua_touserdata(L, 3);
    lvm_machine *copy = lvm_mmu_created();
    lua_settop(L, 2);
    lua_pushvalue(L, 1);
    lua_call(L, 1, 1);
    lua_rawgeti(L, LUA_REGISTRYINDEX, copy->slot);
    *out = new_device(L, copy, 3, 2);
    return 0;
}

static int device_clone(void *user, vm_machine *copy, void **out)
{
    device *d = user, *made = NULL;
    lua_State *L = lvm_mmu_created() ? lvm_callback(d->machine, d->self) : NULL;
    (void)copy;
    if (!L)
        return VM_E_HOST;
    lua_pushcfunction(L, clone_protected);
    lua_insert(L, -2);
    lua_rawgeti(L, -3, d->fn[CLONE]);
    lua_pushlightuserdata(L, &made);
    lvm_pcall(L, d->machine, 3, 0);
    lvm_return(L, d->machine);
    *out = made;
    return made ? VM_OK : VM_E_HOST;
}

static vm_io_ops device_ops(const device *d)
{
    vm_io_ops ops = VM_IO_OPS_INIT;
    ops.read = d->fn[READ] != LUA_NOREF ? device_read : NULL;
    ops.write = d->fn[WRITE] != LUA_NOREF ? device_write : NULL;
    ops.reset = d->fn[RESET] != LUA_NOREF ? device_reset : NULL;
    ops.save = d->fn[SAVE] != LUA_NOREF ? device_save : NULL;
    ops.restore = d->fn[RESTORE] != LUA_NOREF ? device_restore : NULL;
    ops.clone = d->fn[CLONE] != LUA_NOREF ? device_clone : NULL;
    ops.destroy = device_destroy;
    return ops;
}

static void drop_device(lua_State *L, device *d)
{
    lua_getiuservalue(L, 1, 1);
    for (int i = 0; i < FUNCTIONS; i++)
        luaL_unref(L, -1, d->fn[i]);
    luaL_unref(L, -1, d->self);
    lua_pop(L, 1);
    free(d);
}

static int map_device(lua_State *L, bool is_port)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t base = is_port ? lvm_check_range(L, 2, 0xffff) : (uint64_t)luaL_checkinteger(L, 2);
    uint64_t bytes = is_port ? lvm_check_range(L, 3, 0x10000) : lvm_check_bytes(L, 3);
    lvm_region *g;
    vm_io_ops ops;
    lvm_call call;
    device *d;
    int status;
    luaL_checktype(L, 4, LUA_TTABLE);
    lua_settop(L, 4);
    g = new_region(L, b);
    lua_getiuservalue(L, 1, 1);
    d = new_device(L, b, 6, 4);
    lua_settop(L, 5);
    ops = device_ops(d);
    lvm_enter(L, b, 1, &call);
    status = is_port ? vm_map_pio(b->m, (uint16_t)base, (unsigned)bytes, &ops, d, &g->r)
                     : vm_map_mmio(b->m, base, bytes, &ops, d, &g->r);
    lvm_leave(L, b, &call);
    if (status != VM_OK)
        drop_device(L, d);
    lvm_raise(L, b);
    return mapped(L, g, status);
}

static int machine_map_mmio(lua_State *L) { return map_device(L, false); }
static int machine_map_pio(lua_State *L) { return map_device(L, true); }

static int region_unmap(lua_State *L)
{
    lvm_region *g = check_region(L, 1);
    lvm_machine *b = g->machine;
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_unmap(b->m, g->r);
    lvm_leave(L, b, &call);
    if (status == VM_OK)
        forget_region(L, g, 1);
    lvm_raise(L, b);
    return lvm_done(L, status);
}

static int machine_unmap(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    lvm_region *g = check_region(L, 2);
    luaL_argcheck(L, g->machine == b, 2, "a region of another machine");
    lua_remove(L, 1);
    return region_unmap(L);
}

static int region_view(lua_State *L)
{
    lvm_region *g = check_region(L, 1);
    lvm_buffer *v;
    luaL_argcheck(L, vm_region_data(g->r), 1, "not a region of RAM");
    v = lua_newuserdatauv(L, sizeof *v, 1);
    memset(v, 0, sizeof *v);
    v->region = g;
    luaL_setmetatable(L, LVM_BUFFER);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    return 1;
}

static int get_gpa(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)vm_region_gpa(check_region(L, 1)->r));
    return 1;
}

static int get_bytes(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)vm_region_bytes(check_region(L, 1)->r));
    return 1;
}

static int get_mapped(lua_State *L)
{
    lvm_region *g = luaL_checkudata(L, 1, LVM_REGION);
    lua_pushboolean(L, lvm_is_open(g->machine) && g->r);
    return 1;
}

static int region_tostring(lua_State *L)
{
    lvm_region *g = luaL_checkudata(L, 1, LVM_REGION);
    if (lvm_is_open(g->machine) && g->r) {
        char text[80];
        snprintf(text, sizeof text, "libvm.region (%#llx, %#llx bytes)", (unsigned long long)vm_region_gpa(g->r),
                 (unsigned long long)vm_region_bytes(g->r));
        lua_pushstring(L, text);
    } else {
        lua_pushliteral(L, "libvm.region (unmapped)");
    }
    return 1;
}

/* for region in machine:regions(): those mapped by it, in order of address */
static int next_region(lua_State *L)
{
    lua_Integer i = lua_tointeger(L, lua_upvalueindex(2)) + 1;
    lua_pushinteger(L, i);
    lua_replace(L, lua_upvalueindex(2));
    lua_rawgeti(L, lua_upvalueindex(1), i);
    return 1;
}

static int machine_regions(lua_State *L)
{
    lua_Integer n = 0;
    lvm_check_machine(L, 1);
    lua_settop(L, 1);
    lua_getiuservalue(L, 1, 1);
    lua_newtable(L);
    for (lua_pushnil(L); lua_next(L, 2);) {
        lvm_region *g = luaL_testudata(L, -1, LVM_REGION);
        lua_Integer at;
        if (!g || !g->r || lua_type(L, -2) != LUA_TNUMBER) {
            lua_pop(L, 1);
            continue;
        }
        for (at = n++; at > 0; at--) {
            lvm_region *before;
            lua_rawgeti(L, 3, at);
            before = lua_touserdata(L, -1);
            if (vm_region_gpa(before->r) <= vm_region_gpa(g->r)) {
                lua_pop(L, 1);
                break;
            }
            lua_rawseti(L, 3, at + 1);
        }
        lua_rawseti(L, 3, at + 1);
    }
    lua_pushinteger(L, 0);
    lua_pushcclosure(L, next_region, 2);
    return 1;
}

/* ---- the whole map ---- */

static int machine_protect(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3);
    unsigned prot = lvm_check_prot(L, 4);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_protect(b->m, gpa, bytes, (vm_prot)prot);
    return lvm_finish(L, b, &call, status);
}

static int machine_invalidate(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_invalidate(b->m, gpa, bytes);
    return lvm_finish(L, b, &call, status);
}

static int machine_read(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2);
    size_t bytes = lvm_check_range(L, 3, READ_MAX);
    luaL_Buffer text;
    lvm_call call;
    char *to;
    int status;
    lua_settop(L, 3);
    to = luaL_buffinitsize(L, &text, bytes);
    lvm_enter(L, b, 1, &call);
    status = vm_read(b->m, gpa, to, bytes);
    lvm_leave(L, b, &call);
    luaL_pushresultsize(&text, status == VM_OK ? bytes : 0);
    lvm_raise(L, b);
    return status == VM_OK ? 1 : lvm_fail(L, status);
}

static int machine_write(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2);
    size_t bytes;
    const char *text = luaL_checklstring(L, 3, &bytes);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_write(b->m, gpa, text, bytes);
    return lvm_finish(L, b, &call, status);
}

static int machine_dirty_log(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    bool on;
    lvm_call call;
    int status;
    luaL_checktype(L, 2, LUA_TBOOLEAN);
    on = lua_toboolean(L, 2);
    lvm_enter(L, b, 1, &call);
    status = vm_dirty_log(b->m, on);
    return lvm_finish(L, b, &call, status);
}

/* A list of the dirty pages' addresses. */
static int machine_dirty_fetch(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3), words;
    uint64_t *bitmap;
    lua_Integer n = 0;
    lvm_call call;
    int status;
    words = (bytes / 4096 + 63) / 64;
    luaL_argcheck(L, words < READ_MAX / 8, 3, "out of range");
    bitmap = lua_newuserdatauv(L, words * 8 + 8, 0);
    lvm_enter(L, b, 1, &call);
    status = vm_dirty_fetch(b->m, gpa, bytes, bitmap);
    lvm_leave(L, b, &call);
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_newtable(L);
    for (uint64_t i = 0; i < bytes / 4096; i++)
        if (bitmap[i / 64] >> i % 64 & 1) {
            lua_pushinteger(L, (lua_Integer)(gpa + i * 4096));
            lua_rawseti(L, -2, ++n);
        }
    return 1;
}

static int machine_irq_set(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned gsi = (unsigned)lvm_check_range(L, 2, UINT32_MAX);
    bool level = lua_toboolean(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_irq_set(b->m, gsi, level);
    return lvm_finish(L, b, &call, status);
}

static int machine_irq_msi(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t address = (uint64_t)luaL_checkinteger(L, 2);
    uint32_t data = (uint32_t)lvm_check_range(L, 3, UINT32_MAX);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_irq_msi(b->m, address, data);
    return lvm_finish(L, b, &call, status);
}

static int machine_discard(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3);
    lvm_call call;
    int status;
    lvm_enter(L, b, 1, &call);
    status = vm_discard(b->m, gpa, bytes);
    return lvm_finish(L, b, &call, status);
}

const char *const lvm_advice_names[] = { "huge", "small", "mergeable", "unmergeable", "prefault", NULL };

/* machine:advise(gpa, bytes, "huge", ...) */
static int machine_advise(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t gpa = (uint64_t)luaL_checkinteger(L, 2), bytes = lvm_check_bytes(L, 3);
    unsigned advice = 0;
    lvm_call call;
    int status;
    for (int i = 4; i <= lua_gettop(L); i++)
        advice |= 1u << lvm_check_name(L, i, lvm_advice_names, "advice");
    lvm_enter(L, b, 1, &call);
    status = vm_advise(b->m, gpa, bytes, advice);
    return lvm_finish(L, b, &call, status);
}

/* libvm.share_pages(machine, ...): bytes given back */
int lvm_share_pages(lua_State *L)
{
    int count = lua_gettop(L), status;
    uint64_t saved = 0;
    vm_machine **machines;
    for (int i = 1; i <= count; i++)
        if (lvm_check_machine(L, i)->depth)
            return luaL_argerror(L, i, "machine is in use: a callback of its own");
    machines = lua_newuserdatauv(L, ((size_t)count + 1) * sizeof *machines, 0);
    for (int i = 1; i <= count; i++)
        machines[i - 1] = lvm_check_machine(L, i)->m;
    status = vm_share_pages(machines, (unsigned)count, &saved);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)saved);
    return 1;
}

/* machine:ioeventfd{ fd, address or port, width, match, on } */
static int machine_ioeventfd(lua_State *L)
{
    static const char *const known[] = { "fd", "address", "port", "width", "match", "on", NULL };
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_doorbell bell = VM_DOORBELL_INIT;
    lvm_call call;
    bool on = true;
    int status;
    luaL_checktype(L, 2, LUA_TTABLE);
    lvm_check_fields(L, 2, known);
    bell.fd = (int)lvm_field_range(L, 2, "fd", (uint64_t)-1, INT32_MAX);
    bell.is_port = lvm_raw_field(L, 2, "port") != LUA_TNIL;
    bell.address = lvm_field_integer(L, 2, bell.is_port ? "port" : "address", 0);
    bell.width = (uint32_t)lvm_field_range(L, 2, "width", 0, UINT32_MAX);
    bell.has_match = lvm_raw_field(L, 2, "match") != LUA_TNIL;
    bell.match = lvm_field_integer(L, 2, "match", 0);
    if (lvm_raw_field(L, 2, "on") != LUA_TNIL)
        on = lua_toboolean(L, -1);
    lvm_enter(L, b, 1, &call);
    status = vm_ioeventfd(b->m, &bell, on);
    return lvm_finish(L, b, &call, status);
}

/* machine:irqfd(fd, gsi or false) */
static int machine_irqfd(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    int fd = (int)lvm_check_range(L, 2, INT32_MAX), status;
    bool on = lua_type(L, 3) == LUA_TNUMBER;
    unsigned gsi = on ? (unsigned)lvm_check_range(L, 3, UINT32_MAX) : 0;
    lvm_call call;
    if (!on)
        luaL_argcheck(L, lua_isboolean(L, 3) && !lua_toboolean(L, 3), 3, "a line, or false");
    luaL_argcheck(L, on || !b->depth, 3, "not from a callback of the machine");
    lvm_enter(L, b, 1, &call);
    status = vm_irqfd(b->m, fd, gsi, on);
    return lvm_finish(L, b, &call, status);
}

static int machine_irqfd_msi(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    int fd = (int)lvm_check_range(L, 2, INT32_MAX), status;
    uint64_t address = (uint64_t)luaL_checkinteger(L, 3);
    uint32_t data = (uint32_t)lvm_check_range(L, 4, UINT32_MAX);
    lvm_call call;
    lvm_enter(L, b, 1, &call);
    status = vm_irqfd_msi(b->m, fd, address, data);
    return lvm_finish(L, b, &call, status);
}

/* region:coalesce(offset, bytes [, on]) */
static int region_coalesce(lua_State *L)
{
    lvm_region *g = check_region(L, 1);
    uint64_t offset = lvm_check_range(L, 2, INT64_MAX), bytes = lvm_check_bytes(L, 3);
    bool on = lua_isnoneornil(L, 4) || lua_toboolean(L, 4);
    lvm_call call;
    int status;
    lvm_enter(L, g->machine, 1, &call);
    status = vm_coalesce(g->machine->m, g->r, offset, bytes, on);
    return lvm_finish(L, g->machine, &call, status);
}

const luaL_Reg lvm_memory_methods[] = {
    { "discard", machine_discard },
    { "advise", machine_advise },
    { "ioeventfd", machine_ioeventfd },
    { "irqfd", machine_irqfd },
    { "irqfd_msi", machine_irqfd_msi },
    { "map_ram", machine_map_ram },
    { "map_host", machine_map_host },
    { "map_file", machine_map_file },
    { "map_mmio", machine_map_mmio },
    { "map_pio", machine_map_pio },
    { "unmap", machine_unmap },
    { "regions", machine_regions },
    { "protect", machine_protect },
    { "invalidate", machine_invalidate },
    { "read", machine_read },
    { "write", machine_write },
    { "dirty_log", machine_dirty_log },
    { "dirty_fetch", machine_dirty_fetch },
    { "irq_set", machine_irq_set },
    { "irq_msi", machine_irq_msi },
    { NULL, NULL },
};

void lvm_open_memory(lua_State *L)
{
    static const luaL_Reg buffer_meta[] = {
        { "__gc", buffer_gc }, { "__len", buffer_len }, { "__tostring", buffer_tostring }, { NULL, NULL },
    };
    static const luaL_Reg buffer_methods[] = {
        { "u8", buffer_u8 }, { "u16", buffer_u16 }, { "u32", buffer_u32 }, { "u64", buffer_u64 },
        { "i8", buffer_i8 }, { "i16", buffer_i16 }, { "i32", buffer_i32 }, { "i64", buffer_i64 },
        { "f32", buffer_f32 }, { "f64", buffer_f64 },
        { "read", buffer_read }, { "write", buffer_write }, { "fill", buffer_fill }, { NULL, NULL },
    };
    static const luaL_Reg region_meta[] = { { "__tostring", region_tostring }, { NULL, NULL } };
    static const luaL_Reg region_methods[] = { { "unmap", region_unmap }, { "view", region_view }, { "coalesce", region_coalesce }, { NULL, NULL } };
    static const luaL_Reg region_getters[] = {
        { "gpa", get_gpa }, { "bytes", get_bytes }, { "mapped", get_mapped }, { NULL, NULL },
    };
    lvm_class(L, LVM_BUFFER, buffer_meta, buffer_methods, NULL);
    lvm_class(L, LVM_REGION, region_meta, region_methods, region_getters);
}
