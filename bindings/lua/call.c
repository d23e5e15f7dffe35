/* call.c - functions across the border: Lua calls guest functions, the guest calls Lua functions. */
#include "lvm.h"

enum { TYPE_TEXT = 12 };
typedef struct signature {
    char     result[TYPE_TEXT];
    char     type[VM_CALL_ARGS][TYPE_TEXT];
    unsigned count;
} signature;

/* The types of a signature that libvm has found good. */
static void parse(const char *text, signature *s)
{
    const char *colon = strchr(text, ':'), *p = colon ? colon + 1 : text;
    char *to = s->result;
    memset(s, 0, sizeof *s);
    for (bool inside = false; *p && *p != ')'; p++) {
        if (*p == ' ' || *p == '\t' || *p == '\n')
            continue;
        if (*p == '(' || *p == ',') {
            to = s->type[inside || *p == ',' ? ++s->count : 0];
            inside = true;
            if (s->count >= VM_CALL_ARGS)
                return;
        } else if (to - (inside ? s->type[s->count] : s->result) < TYPE_TEXT - 1) {
            *to++ = *p;
        }
    }
    if (s->type[s->count][0])
        s->count++;
}

static bool is_type(const char *type, const char *name)
{
    size_t n = strlen(name);
    return !strncmp(type, name, n) && (type[n] == '\0' || type[n] == '[');
}

static void check_signature(lua_State *L, int arg, signature *s)
{
    const char *text = luaL_checkstring(L, arg);
    if (vm_signature_check(text, NULL) != VM_OK)
        luaL_argerror(L, arg, vm_errmsg());
    parse(text, s);
}

/* libvm.signature_check(text): how many arguments, or nil, message, code */
int lvm_signature_check(lua_State *L)
{
    size_t args = 0;
    int status = vm_signature_check(luaL_checkstring(L, 1), &args);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_pushinteger(L, (lua_Integer)args);
    return 1;
}

static vm_value check_value(lua_State *L, int arg, const char *type)
{
    vm_value value = { 0 };
    size_t bytes;
    if (is_type(type, "f32"))
        value.f32 = (float)luaL_checknumber(L, arg);
    else if (is_type(type, "f64"))
        value.f64 = luaL_checknumber(L, arg);
    else if (is_type(type, "str") || is_type(type, "cbuf") || is_type(type, "buf")) {
        if (lua_isnil(L, arg))
            value.data = NULL;
        else if (luaL_testudata(L, arg, LVM_BUFFER) && !is_type(type, "str"))
            value.data = lvm_check_span(L, arg, &bytes);
        else {
            luaL_argcheck(L, !is_type(type, "buf"), arg, "buffer or nil expected");
            value.cdata = luaL_checklstring(L, arg, &bytes);
            luaL_argcheck(L, !is_type(type, "str") || strlen(value.cdata) == bytes, arg, "the string has zeros in it");
        }
        if (value.data && strchr(type, '['))
            luaL_argcheck(L, bytes >= strtoull(strchr(type, '[') + 1, NULL, 0), arg, "fewer bytes than the signature says");
    } else {
        value.i = (int64_t)luaL_checkinteger(L, arg);
    }
    return value;
}

/* The length that follows a buffer must not be longer than it is. */
static void check_length(lua_State *L, int arg, const char *type)
{
    size_t bytes;
    if ((!is_type(type, "buf") && !is_type(type, "cbuf")) || strchr(type, '[') || lua_isnil(L, arg))
        return;
    if (luaL_testudata(L, arg, LVM_BUFFER))
        lvm_check_span(L, arg, &bytes);
    else
        luaL_checklstring(L, arg, &bytes);
    luaL_argcheck(L, (uint64_t)luaL_checkinteger(L, arg + 1) <= bytes, arg + 1, "more bytes than the buffer has");
}

static void push_value(lua_State *L, const vm_value *value, const char *type)
{
    if (is_type(type, "f32"))
        lua_pushnumber(L, (lua_Number)value->f32);
    else if (is_type(type, "f64"))
        lua_pushnumber(L, value->f64);
    else
        lua_pushinteger(L, (lua_Integer)value->u);
}

/* cpu:call(address, signature, arguments... [, options]): the result (nothing for void); or nil, message, code, exit */
static int vcpu_call(lua_State *L)
{
    static const char *const known[] = { "max_instructions", "timeout", "stack", "return_address", "preserve", "exceptions", NULL };
    static const char *const run_known[] = { "max_instructions", "timeout", "exceptions" };
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    uint64_t address = (uint64_t)luaL_checkinteger(L, 2);
    vm_call_options options = VM_CALL_OPTIONS_INIT;
    vm_run_options run;
    vm_value args[VM_CALL_ARGS], result = { 0 };
    vm_exit e = VM_EXIT_INIT;
    lvm_call call;
    signature s;
    int status, option;
    check_signature(L, 3, &s);
    option = 4 + (int)s.count;
    luaL_argcheck(L, lua_gettop(L) <= option, option, "more arguments than the signature has");
    lua_settop(L, option);
    for (unsigned i = 0; i < s.count; i++) {
        args[i] = check_value(L, 4 + (int)i, s.type[i]);
        check_length(L, 4 + (int)i, s.type[i]);
    }
    lvm_check_fields(L, option, known);
    if (!lua_isnil(L, option)) {
        options.stack = lvm_field_integer(L, option, "stack", 0);
        options.return_address = lvm_field_integer(L, option, "return_address", 0);
        options.preserve = lvm_field_boolean(L, option, "preserve");
        lua_createtable(L, 0, 3);
        for (int i = 0; i < 3; i++) {
            lvm_raw_field(L, option, run_known[i]);
            lua_setfield(L, -2, run_known[i]);
        }
        lvm_check_run_options(L, lua_gettop(L), &run);
        options.max_instructions = run.max_instructions;
        options.deadline_ns = run.deadline_ns;
        options.exception_exits = run.exception_exits;
    }
    lvm_enter(L, v->machine, 1, &call);
    status = vm_call(v->cpu, address, lua_tostring(L, 3), args, s.count, &result, &options, &e);
    lvm_leave(L, v->machine, &call);
    lvm_raise(L, v->machine);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lvm_push_exit(L, 1, &e);
    if (e.reason != VM_EXIT_UNTIL) {
        lua_pushnil(L);
        lua_pushfstring(L, "the function did not return: %s", vm_exit_name(e.reason));
        lua_pushinteger(L, VM_E_FAULT);
        lua_rotate(L, -4, -1);
        return 4;
    }
    if (is_type(s.result, "void")) {
        lua_pushboolean(L, 1);
        return 1;
    }
    push_value(L, &result, s.result);
    return 1;
}

/* cpu:guest_function(address, signature): a Lua function that calls the guest's */
static int call_upvalues(lua_State *L)
{
    luaL_checkstack(L, 8, NULL);
    for (int i = 1; i <= 3; i++)
        lua_pushvalue(L, lua_upvalueindex(i));
    lua_rotate(L, 1, 3);
    return vcpu_call(L);
}

static int vcpu_guest_function(lua_State *L)
{
    signature s;
    lvm_check_vcpu(L, 1);
    luaL_checkinteger(L, 2);
    check_signature(L, 3, &s);
    lua_settop(L, 3);
    lua_pushcclosure(L, call_upvalues, 3);
    return 1;
}

/* ---- the guest calls ---- */

/* User value 1: the machine. In the anchors while it is bound. */
typedef struct binding_box {
    lvm_object   o;                     /* handle: vm_binding */
    lvm_machine *machine;
    int          fn, self;
    signature    signature;
} binding_box;

typedef struct bound_call {
    binding_box    *binding;
    const vm_value *args;
    vm_value       *result;
    lvm_buffer     *buffers[VM_CALL_ARGS];      /* views that end with the call */
    unsigned        buffer_count;
} bound_call;

static size_t length_of(const signature *s, const vm_value *args, unsigned i)
{
    const char *bracket = strchr(s->type[i], '[');
    return bracket ? (size_t)strtoull(bracket + 1, NULL, 0) : i + 1 < s->count ? (size_t)args[i + 1].u : 0;
}

static void push_argument(lua_State *L, bound_call *c, unsigned i)
{
    const signature *s = &c->binding->signature;
    const vm_value *value = &c->args[i];
    lvm_buffer *v;
    if (!is_type(s->type[i], "str") && !is_type(s->type[i], "cbuf") && !is_type(s->type[i], "buf")) {
        push_value(L, value, s->type[i]);
    } else if (!value->data) {
        lua_pushnil(L);
    } else if (is_type(s->type[i], "str")) {
        lua_pushstring(L, value->cdata);
    } else if (is_type(s->type[i], "cbuf")) {
        lua_pushlstring(L, value->cdata, length_of(s, c->args, i));
    } else {
        v = lua_newuserdatauv(L, sizeof *v, 1);
        memset(v, 0, sizeof *v);
        luaL_setmetatable(L, LVM_BUFFER);
        v->bytes = length_of(s, c->args, i);
        v->data = value->data;
        c->buffers[c->buffer_count++] = v;
    }
}

/* function, vCPU, bound_call: everything that can raise. Returns whether the guest goes on. */
static int bound_protected(lua_State *L)
{
    bound_call *c = lua_touserdata(L, 3);
    const signature *s = &c->binding->signature;
    luaL_checkstack(L, (int)s->count + 8, NULL);
    lua_pushvalue(L, 1);
    lua_pushvalue(L, 2);
    for (unsigned i = 0; i < s->count; i++)
        push_argument(L, c, i);
    /* Each view stays on this stack until the call is over: also one that the function drops. */
    lua_createtable(L, (int)c->buffer_count, 0);
    for (unsigned i = 0, n = 0; i < s->count; i++)
        if (luaL_testudata(L, 6 + (int)i, LVM_BUFFER)) {
            lua_pushvalue(L, 6 + (int)i);
            lua_rawseti(L, -2, (lua_Integer)++n);
        }
    lua_replace(L, 3);
    lua_call(L, (int)s->count + 1, 1);
    if (is_type(s->result, "void")) {
        lua_pushboolean(L, !(lua_isboolean(L, -1) && !lua_toboolean(L, -1)));
        return 1;
    }
    if (lua_isboolean(L, -1) && !lua_toboolean(L, -1))
        return lua_pushboolean(L, 0), 1;
    if (is_type(s->result, "f32") || is_type(s->result, "f64")) {
        if (!lua_isnumber(L, -1))
            return luaL_error(L, "a number expected from the bound function, got %s", luaL_typename(L, -1));
        if (is_type(s->result, "f32"))
            c->result->f32 = (float)lua_tonumber(L, -1);
        else
            c->result->f64 = lua_tonumber(L, -1);
    } else {
        int ok;
        c->result->i = lua_tointegerx(L, -1, &ok);
        if (!ok)
            return luaL_error(L, "an integer expected from the bound function, got %s", luaL_typename(L, -1));
    }
    lua_pushboolean(L, 1);
    return 1;
}

static int on_call(void *user, vm_vcpu *cpu, const vm_value *args, size_t count, vm_value *result)
{
    binding_box *x = user;
    bound_call c = { .binding = x, .args = args, .result = result };
    lua_State *L = lvm_callback(x->machine, x->fn);
    bool goes_on = false;
    (void)count;
    if (!L)
        return -1;
    lua_pushcfunction(L, bound_protected);
    lua_insert(L, -2);
    lua_rawgeti(L, -3, -1 - (lua_Integer)vm_vcpu_index(cpu));
    lua_pushlightuserdata(L, &c);
    if (lvm_pcall(L, x->machine, 3, 1)) {
        goes_on = lua_toboolean(L, -1);
        lua_pop(L, 1);
        for (unsigned i = 0; i < c.buffer_count; i++)
            c.buffers[i]->data = NULL;
    }
    lvm_return(L, x->machine);
    return goes_on ? 0 : -1;
}

static void on_unbound(void *user)
{
    binding_box *x = user;
    lvm_unlink(&x->o);
    lvm_forget(x->machine, x->fn);
    lvm_forget(x->machine, x->self);
}

/* machine:bind_function(address, signature, function(cpu, arguments...)) and bind_hypercall(number, ...) */
static int bind(lua_State *L, bool is_hypercall)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    uint64_t place = (uint64_t)luaL_checkinteger(L, 2);
    vm_bind_desc desc = VM_BIND_DESC_INIT;
    vm_binding *handle = NULL;
    binding_box *x;
    signature s;
    lvm_call call;
    int status;
    check_signature(L, 3, &s);
    luaL_checktype(L, 4, LUA_TFUNCTION);
    lua_settop(L, 4);
    x = lua_newuserdatauv(L, sizeof *x, 1);
    memset(x, 0, sizeof *x);
    x->machine = b;
    x->signature = s;
    luaL_setmetatable(L, LVM_BINDING);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, 5, 1);
    lua_pushvalue(L, 4);
    x->fn = lvm_anchor(L, 1);
    lua_pushvalue(L, 5);
    x->self = lvm_anchor(L, 1);
    desc.signature = lua_tostring(L, 3);
    desc.values = on_call;
    desc.user = x;
    desc.destroy = on_unbound;
    lvm_link(b, &x->o, NULL, NULL);
    lvm_enter(L, b, 1, &call);
    status = is_hypercall ? vm_bind_hypercall(b->m, place, &desc, &handle) : vm_bind_function(b->m, place, &desc, &handle);
    lvm_leave(L, b, &call);
    x->o.handle = handle;
    if (status != VM_OK) {
        lvm_unlink(&x->o);
        lua_getiuservalue(L, 1, 1);
        luaL_unref(L, -1, x->fn);
        luaL_unref(L, -1, x->self);
    }
    lvm_raise(L, b);
    if (status != VM_OK)
        return lvm_fail(L, status);
    lua_settop(L, 5);
    return 1;
}

static int machine_bind_function(lua_State *L) { return bind(L, false); }
static int machine_bind_hypercall(lua_State *L) { return bind(L, true); }

static int binding_unbind(lua_State *L)
{
    binding_box *x = luaL_checkudata(L, 1, LVM_BINDING);
    lvm_machine *b = x->machine;
    vm_binding *handle = x->o.handle;
    lvm_call call;
    int status;
    lvm_check_open(L, b, 1);
    luaL_argcheck(L, handle, 1, "binding is ended");
    x->o.handle = NULL;
    lvm_enter(L, b, 1, &call);
    status = vm_unbind(b->m, handle);
    return lvm_finish(L, b, &call, status);
}

static int get_active(lua_State *L)
{
    binding_box *x = luaL_checkudata(L, 1, LVM_BINDING);
    lua_pushboolean(L, lvm_is_open(x->machine) && x->o.handle);
    return 1;
}

const luaL_Reg lvm_call_methods[] = {
    { "bind_function", machine_bind_function }, { "bind_hypercall", machine_bind_hypercall }, { NULL, NULL },
};
const luaL_Reg lvm_call_vcpu_methods[] = {
    { "call", vcpu_call }, { "guest_function", vcpu_guest_function }, { NULL, NULL },
};

void lvm_open_call(lua_State *L)
{
    static const luaL_Reg meta[] = { { NULL, NULL } };
    static const luaL_Reg methods[] = { { "unbind", binding_unbind }, { NULL, NULL } };
    static const luaL_Reg getters[] = { { "active", get_active }, { NULL, NULL } };
    lvm_class(L, LVM_BINDING, meta, methods, getters);
}
