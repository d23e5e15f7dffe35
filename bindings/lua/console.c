/* console.c - serial ports and the debug console: as functions, and as console objects with wait_for(). */
#include "lvm.h"

/* What a console keeps at most when nobody reads it; then the oldest goes. */
#define KEEP_MAX ((size_t)4 << 20)
/* How long the guest runs before wait_for() looks at what came. */
#define SLICE_NS UINT64_C(5000000)

typedef struct console_box {
    lvm_machine *machine;
    unsigned     index;
} console_box;

void lvm_free_consoles(lvm_machine *b)
{
    for (int i = 0; i < LVM_CONSOLES; i++) {
        if (b->console[i])
            free(b->console[i]->text);
        free(b->console[i]);
        b->console[i] = NULL;
    }
}

static void keep(lvm_console *c, const uint8_t *bytes, size_t count)
{
    if (c->begin && c->count + count > c->room) {
        memmove(c->text, c->text + c->begin, c->count - c->begin);
        c->count -= c->begin;
        c->begin = 0;
    }
    if (c->count + count > c->room) {
        size_t room = c->room ? c->room : 4096;
        char *text;
        while (room < c->count + count)
            room *= 2;
        text = room <= KEEP_MAX ? realloc(c->text, room) : NULL;
        if (text) {
            c->text = text;
            c->room = room;
        }
    }
    if (count > c->room || !c->room) {
        c->dropped += count;
        return;
    }
    if (c->count + count > c->room) {
        size_t half = c->count / 2 > count ? c->count / 2 : count < c->count ? count : c->count;
        memmove(c->text, c->text + half, c->count - half);
        c->count -= half;
        c->dropped += half;
        if (c->count + count > c->room) {
            c->dropped += c->count;
            c->count = 0;
        }
    }
    memcpy(c->text + c->count, bytes, count);
    c->count += count;
}

typedef struct output { const uint8_t *bytes; size_t count; } output;

static int push_output(lua_State *L)     /* function, output */
{
    const output *o = lua_touserdata(L, 2);
    lua_settop(L, 1);
    lua_pushlstring(L, (const char *)o->bytes, o->count);
    lua_call(L, 1, 0);
    return 0;
}

static void on_output(void *user, const uint8_t *bytes, size_t count)
{
    lvm_console *c = user;
    lvm_machine *b = c->machine;
    output o = { bytes, count };
    lua_State *L;
    if (c->keeps) {
        if (b->universe->threads)
            pthread_mutex_lock(&b->universe->lock);
        keep(c, bytes, count);
        if (b->universe->threads)
            pthread_mutex_unlock(&b->universe->lock);
    }
    if (c->fn == LUA_NOREF || !(L = lvm_callback(b, c->fn)))
        return;
    lua_pushcfunction(L, push_output);
    lua_insert(L, -2);
    lua_pushlightuserdata(L, &o);
    if (!lvm_pcall(L, b, 2, 0))
        lvm_stop(b);
    lvm_return(L, b);
}

/* The console of a port, made and connected when first asked for. NULL: *status says why. */
static lvm_console *get_console(lua_State *L, lvm_machine *b, unsigned index, int *status)
{
    lvm_console *c = b->console[index];
    *status = VM_OK;
    if (c)
        return c;
    c = calloc(1, sizeof *c);
    if (!c)
        luaL_error(L, "not enough memory");
    c->machine = b;
    c->index = index;
    c->fn = LUA_NOREF;
    *status = index == LVM_DEBUGCON ? vm_debugcon_output(b->m, on_output, c) : vm_serial_output(b->m, index, on_output, c);
    if (*status != VM_OK) {
        free(c);
        return NULL;
    }
    b->console[index] = c;
    return c;
}

/* function(bytes) or nil, at `arg` */
static int set_output(lua_State *L, unsigned index, int arg)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    lvm_console *c;
    int status, fn = LUA_NOREF;
    lua_settop(L, arg);
    if (!lua_isnil(L, arg))
        luaL_checktype(L, arg, LUA_TFUNCTION);
    c = get_console(L, b, index, &status);
    if (!c)
        return lvm_fail(L, status);
    if (!lua_isnil(L, arg))
        fn = lvm_anchor(L, 1);
    lua_getiuservalue(L, 1, 1);
    luaL_unref(L, -1, c->fn);
    c->fn = fn;
    return lvm_done(L, VM_OK);
}

static unsigned check_port(lua_State *L, int arg)
{
    return lua_isnoneornil(L, arg) ? 0 : (unsigned)lvm_check_range(L, arg, LVM_CONSOLES - 2);
}

static int machine_serial_output(lua_State *L) { return set_output(L, check_port(L, 2), 3); }
static int machine_debugcon_output(lua_State *L) { return set_output(L, LVM_DEBUGCON, 2); }

static int give_input(lua_State *L, lvm_machine *b, int box, unsigned index, const char *text, size_t bytes)
{
    lvm_call call;
    int taken;
    lvm_enter(L, b, box, &call);
    taken = vm_serial_input(b->m, index, (const uint8_t *)text, bytes);
    lvm_leave(L, b, &call);
    return taken;
}

static int machine_serial_input(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned index = check_port(L, 2);
    size_t bytes;
    const char *text = luaL_checklstring(L, 3, &bytes);
    int taken = give_input(L, b, 1, index, text, bytes);
    lvm_raise(L, b);
    if (taken < 0)
        return lvm_fail(L, taken);
    lua_pushinteger(L, taken);
    return 1;
}

/* machine:console([0-3 or "debug"]) */
static int machine_console(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned index = lua_type(L, 2) == LUA_TSTRING && !strcmp(lua_tostring(L, 2), "debug") ? LVM_DEBUGCON : check_port(L, 2);
    lvm_console *c;
    console_box *box;
    int status;
    c = get_console(L, b, index, &status);
    if (!c)
        return lvm_fail(L, status);
    c->keeps = true;
    box = lua_newuserdatauv(L, sizeof *box, 1);
    *box = (console_box){ b, index };
    luaL_setmetatable(L, LVM_CONSOLE);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    return 1;
}

static lvm_console *check_console(lua_State *L)
{
    console_box *box = luaL_checkudata(L, 1, LVM_CONSOLE);
    lvm_check_open(L, box->machine, 1);
    return box->machine->console[box->index];
}

/* console:read([count]): what came and was not read; "" when nothing did */
static int console_read(lua_State *L)
{
    lvm_console *c = check_console(L);
    size_t n = c->count - c->begin;
    if (!lua_isnoneornil(L, 2)) {
        uint64_t most = lvm_check_range(L, 2, INT64_MAX);
        n = most < n ? most : n;
    }
    lua_pushlstring(L, c->text + c->begin, n);
    c->begin += n;
    return 1;
}

/* console:write(text): how many bytes the port took */
static int console_write(lua_State *L)
{
    lvm_console *c = check_console(L);
    size_t bytes;
    const char *text = luaL_checklstring(L, 2, &bytes);
    int taken;
    luaL_argcheck(L, c->index != LVM_DEBUGCON, 1, "the debug console takes no input");
    taken = give_input(L, c->machine, 1, c->index, text, bytes);
    lvm_raise(L, c->machine);
    if (taken < 0)
        return lvm_fail(L, taken);
    lua_pushinteger(L, taken);
    return 1;
}

static uint64_t check_end(lua_State *L, int arg)
{
    lua_Number seconds = luaL_optnumber(L, arg, 60);
    if (!(seconds >= 0 && seconds <= 1e9))
        lvm_refuse(L, arg, "out of range");
    return lvm_now() + (uint64_t)(seconds * 1e9);
}

/* Runs the machine for a moment. False: it has stopped by itself, the exit is on the stack; or failed: nil, message, code. */
static bool run_slice(lua_State *L, uint64_t end, int *results)
{
    lvm_console *c = check_console(L);
    lvm_machine *b = c->machine;
    uint64_t now = lvm_now();
    lua_getiuservalue(L, 1, 1);
    lua_getfield(L, -1, "run");
    lua_insert(L, -2);
    lua_createtable(L, 0, 1);
    lua_pushinteger(L, (lua_Integer)(end > now && end - now < SLICE_NS ? end - now : SLICE_NS));
    lua_setfield(L, -2, "deadline_ns");
    lua_call(L, 2, 3);
    if (!b->m || lua_isnil(L, -3)) {
        *results = 3;
        return false;
    }
    lua_pop(L, 2);
    if (((lvm_exit *)lua_touserdata(L, -1))->e.reason == VM_EXIT_DEADLINE) {
        lua_pop(L, 1);
        return true;
    }
    lua_pushnil(L);
    lua_insert(L, -2);
    lua_pushfstring(L, "the machine stopped: %s", vm_exit_name(((lvm_exit *)lua_touserdata(L, -1))->e.reason));
    lua_insert(L, -2);
    lua_pushinteger(L, VM_E_NOTFOUND);
    lua_insert(L, -2);
    *results = 4;                        /* nil, message, code, exit */
    return false;
}

/* console:wait_for(pattern [, timeout [, plain]]): runs the machine until its output matches. Returns the output up to the
 * end of the match, then the captures; or nil, message, code and, if the machine stopped, its exit. */
static int console_wait_for(lua_State *L)
{
    lvm_console *c = check_console(L);
    uint64_t end = check_end(L, 3);
    bool plain = lua_toboolean(L, 4), running = true;
    size_t seen = SIZE_MAX;
    int results = 0;
    luaL_checkstring(L, 2);
    lua_settop(L, 2);
    lua_pushvalue(L, lua_upvalueindex(1));      /* string.find */
    for (;;) {
        size_t pending = c->count - c->begin;
        if (pending != seen) {
            int base = lua_gettop(L), captures;
            seen = pending;
            lua_pushvalue(L, 3);
            lua_pushlstring(L, c->text + c->begin, pending);
            lua_pushvalue(L, 2);
            lua_pushinteger(L, 1);
            lua_pushboolean(L, plain);
            lua_call(L, 4, LUA_MULTRET);
            captures = lua_gettop(L) - base - 2;
            if (captures >= 0) {
                size_t to = (size_t)lua_tointeger(L, base + 2);
                lua_pushlstring(L, c->text + c->begin, to);
                lua_insert(L, base + 3);
                c->begin += to;
                return captures + 1;
            }
            lua_settop(L, base);
        }
        if (!running)
            return results;
        if (lvm_now() >= end) {
            lua_pushnil(L);
            lua_pushfstring(L, "timeout: no output like '%s'", lua_tostring(L, 2));
            lua_pushinteger(L, VM_E_NOTFOUND);
            return 3;
        }
        running = run_slice(L, end, &results);
        c = check_console(L);
        if (!running) {
            /* The last words may match: look again with the results kept below. */
            if (c->count - c->begin == seen)
                return results;
        }
    }
}

/* console:send(text [, timeout]): all of it, running the machine while its port is full */
static int console_send(lua_State *L)
{
    lvm_console *c = check_console(L);
    size_t bytes, done = 0;
    const char *text = luaL_checklstring(L, 2, &bytes);
    uint64_t end = check_end(L, 3);
    int results;
    luaL_argcheck(L, c->index != LVM_DEBUGCON, 1, "the debug console takes no input");
    while (done < bytes) {
        int taken = give_input(L, c->machine, 1, c->index, text + done, bytes - done);
        lvm_raise(L, c->machine);
        if (taken < 0)
            return lvm_fail(L, taken);
        done += (size_t)taken;
        if (done < bytes && !run_slice(L, end, &results))
            return results;
        c = check_console(L);
        if (done < bytes && lvm_now() >= end) {
            lua_pushnil(L);
            lua_pushfstring(L, "timeout: %d bytes not taken", (int)(bytes - done));
            lua_pushinteger(L, VM_E_NOTFOUND);
            return 3;
        }
    }
    return lvm_done(L, VM_OK);
}

static int console_on_output(lua_State *L)
{
    lvm_console *c = check_console(L);
    unsigned index = c->index;
    lua_settop(L, 2);
    lua_getiuservalue(L, 1, 1);
    lua_replace(L, 1);
    return set_output(L, index, 2);
}

static int get_index(lua_State *L)
{
    console_box *box = luaL_checkudata(L, 1, LVM_CONSOLE);
    if (box->index == LVM_DEBUGCON)
        lua_pushliteral(L, "debug");
    else
        lua_pushinteger(L, box->index);
    return 1;
}

static int get_dropped(lua_State *L)
{
    lua_pushinteger(L, (lua_Integer)check_console(L)->dropped);
    return 1;
}

static int get_machine(lua_State *L)
{
    luaL_checkudata(L, 1, LVM_CONSOLE);
    lua_getiuservalue(L, 1, 1);
    return 1;
}

static int console_tostring(lua_State *L)
{
    console_box *box = luaL_checkudata(L, 1, LVM_CONSOLE);
    lua_pushfstring(L, "libvm.console %d: %p", (int)box->index, (void *)box);
    return 1;
}

const luaL_Reg lvm_console_methods[] = {
    { "serial_output", machine_serial_output },
    { "serial_input", machine_serial_input },
    { "debugcon_output", machine_debugcon_output },
    { "console", machine_console },
    { NULL, NULL },
};

void lvm_open_console(lua_State *L)
{
    static const luaL_Reg meta[] = { { "__tostring", console_tostring }, { NULL, NULL } };
    static const luaL_Reg methods[] = {
        { "read", console_read }, { "write", console_write }, { "send", console_send }, { "on_output", console_on_output }, { NULL, NULL },
    };
    static const luaL_Reg getters[] = {
        { "index", get_index }, { "dropped", get_dropped }, { "machine", get_machine }, { NULL, NULL },
    };
    lvm_class(L, LVM_CONSOLE, meta, methods, getters);
    luaL_getmetatable(L, LVM_CONSOLE);
    lua_getfield(L, -1, "methods");
    luaL_requiref(L, LUA_STRLIBNAME, luaopen_string, 0);
    lua_getfield(L, -1, "find");
    lua_pushcclosure(L, console_wait_for, 1);
    lua_setfield(L, -3, "wait_for");
    lua_pop(L, 3);
}
