/* embed.c - the Lua module in a host program: fork(), several states in threads, states closed with machines alive, and every
 * allocation of Lua's failing. What a script alone can see is in the specs beside. */
#include "tests/test.h"

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

/* A machine with all kinds of things hanging on it; `pc` has threads of its own. */
static const char prepare[] =
    "local libvm = require 'libvm'\n"
    "local loop = '\\xb9\\x0a\\0\\0\\0\\xff\\xc9\\x75\\xfc\\xf4'\n"            /* mov ecx, 10; dec ecx; jnz; hlt */
    "function make(options)\n"
    "  local m = assert(libvm.machine(options))\n"
    "  local t = { m = m, cpu = m.cpu, blocks = 0 }\n"
    "  if not options.platform then t.ram = assert(m:map_ram(0x1000, 0x4000)) t.view = t.ram:view() end\n"
    "  assert(m:write(0x1000, loop))\n"
    "  t.device = assert(m:map_pio(0x300, 4, { read = function() return t.blocks end, destroy = function() ends = (ends or 0) + 1 end }))\n"
    "  t.hook = assert(m:hook('block', function() t.blocks = t.blocks + 1 end))\n"
    "  t.binding = assert(m:bind_function(0x2000, 'u64(u64)', function(_, x) return x end))\n"
    "  t.snapshot = assert(m:snapshot())\n"
    "  t.ring = assert(t.cpu:block_trace(16))\n"
    "  m:breakpoint(0x1009) m:breakpoint(0x1009, false)\n"
    "  return t\n"
    "end\n"
    "function run(t)\n"
    "  t.cpu:set_mode 'flat64'\n"
    "  t.cpu.rip, t.blocks = 0x1000, 0\n"
    "  local e = assert(t.cpu:run())\n"
    "  assert(e.reason == 'halt' and t.blocks == 11, e.reason .. ' ' .. t.blocks)\n"
    "  assert(t.snapshot:restore())\n"
    "end\n";

static lua_State *open_state(lua_Alloc allocate, void *user)
{
    const char *build = getenv("top_builddir");
    lua_State *L = allocate ? lua_newstate(allocate, user) : luaL_newstate();
    CHECK(L);
    luaL_openlibs(L);
    lua_getglobal(L, "package");
    lua_pushfstring(L, "%s/bindings/lua/.libs/?.so", build ? build : ".");
    lua_setfield(L, -2, "cpath");
    lua_pop(L, 1);
    return L;
}

static void script(lua_State *L, const char *text)
{
    if (luaL_dostring(L, text))
        FAIL("%s", lua_tostring(L, -1));
}

static lua_State *prepared(void)
{
    lua_State *L = open_state(NULL, NULL);
    script(L, prepare);
    return L;
}

static const char in_child[] =
    "for _, t in ipairs { bare, pc } do\n"
    "  for what, f in pairs { read = function() t.m:read(0x1000, 1) end, run = function() t.cpu:run() end, all = function() t.m:run() end,\n"
    "      register = function() return t.cpu.rax end, set = function() t.cpu.rax = 1 end, unmap = function() t.device:unmap() end,\n"
    "      hook = function() t.hook:remove() end, unbind = function() t.binding:unbind() end, restore = function() t.snapshot:restore() end,\n"
    "      map = function() t.m:map_ram(0x100000, 4096) end, snapshot = function() t.m:snapshot() end } do\n"
    "    local ok, message = pcall(f)\n"
    "    assert(not ok and message:find 'before fork', what .. ': ' .. tostring(message))\n"
    "  end\n"
    "  assert(t.m.closed and not t.hook.active and not t.device.mapped and not t.binding.active)\n"
    "  t.snapshot:free()\n"
    "  assert(tostring(t.m) and tostring(t.cpu) and tostring(t.device))\n"
    "end\n"
    "assert(not pcall(bare.view.u8, bare.view, 0))\n"
    "bare.m:close()\n"
    "bare, pc = nil, nil\n"
    "for _ = 1, 3 do collectgarbage() end\n"
    "local own = make { backend = 'interp' }\n"
    "run(own)\n"
    "own.m:close()\n";

TEST(fork)
{
    lua_State *L = prepared();
    int status;
    script(L, "bare, pc = make { backend = 'interp' }, make { backend = 'interp', platform = 'pc', memory = '2M' } run(bare) run(pc)");
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        if (luaL_dostring(L, in_child)) {
            fprintf(stderr, "in the child: %s\n", lua_tostring(L, -1));
            _exit(1);
        }
        lua_close(L);
        _exit(7);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 7);
    script(L, "run(bare) run(pc)");
    lua_close(L);
}

TEST(closed_with_machines_alive)
{
    for (int i = 0; i < 3; i++) {
        lua_State *L = prepared();
        script(L, "keep = { make { backend = 'jit' }, make { backend = 'interp', vcpus = 3 }, make { platform = 'pc', memory = '2M' } } run(keep[1])\n"
                  "coroutine.wrap(function() own = make { backend = 'interp' } run(own) end)()");
        lua_close(L);
    }
}

static void *state_of_a_thread(void *user)
{
    lua_State *L = prepared();
    *(int *)user = luaL_dostring(L, "for i = 1, 30 do local t = make { backend = i % 2 == 0 and 'jit' or 'interp' } run(t) t.m:close() end\n"
                                    "collectgarbage() assert(ends == 30)");
    if (*(int *)user)
        fprintf(stderr, "%s\n", lua_tostring(L, -1));
    lua_close(L);
    return NULL;
}

TEST(a_state_a_thread)
{
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    int failed[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, state_of_a_thread, &failed[i]));
    for (int i = 0; i < THREADS; i++) {
        CHECK(!pthread_join(threads[i], NULL));
        CHECK_EQ(failed[i], 0);
    }
}

/* ---- Lua without memory ---- */

typedef struct supply { size_t left, used; bool counts; } supply;

/* Nothing more, or nothing larger, once `left` allocations have been made. */
static void *allocate(void *user, void *old, size_t old_bytes, size_t bytes)
{
    supply *s = user;
    void *made;
    if (!bytes) {
        if (old)
            s->used -= old_bytes;
        free(old);
        return NULL;
    }
    bool grows = !old || bytes > old_bytes;
    if (grows && s->counts && s->left == 0)
        return NULL;
    if (!(made = realloc(old, bytes)))
        return NULL;
    s->left -= grows && s->counts;
    s->used += bytes - (old ? old_bytes : 0);
    return made;
}

static int body(lua_State *L)
{
    lua_getglobal(L, "body");
    lua_call(L, 0, 0);
    return 0;
}

static void starve(const char *text)
{
    size_t n;
    for (n = 0; n < 20000; n++) {
        supply s = { .left = n };
        lua_State *L = open_state(allocate, &s);
        script(L, prepare);
        script(L, text);
        lua_pushcfunction(L, body);
        s.counts = true;
        int status = lua_pcall(L, 0, 0, 0);
        s.counts = false;
        if (status != LUA_OK && status != LUA_ERRMEM) {
            const char *message = lua_tostring(L, -1);
            /* An error of the module's or of the script's own because something was refused for lack of memory. */
            if (!message || !strstr(message, "memory"))
                FAIL("allocation %zu: %s", n, message ? message : "an error without a message");
        }
        lua_close(L);
        CHECK_EQ(s.used, 0);
        if (status == LUA_OK)
            break;
    }
    CHECK(n > 30 && n < 20000);
}

TEST_LIMIT(no_memory_for_a_machine, 120)
{
    starve("function body() local t = make { backend = 'interp' } run(t) t.m:close() end");
}

TEST_LIMIT(no_memory_in_callbacks, 120)
{
    starve("local t = make { backend = 'interp' }\n"
           "t.m:trace('exit', function(_, line) t.line = line .. 'x' end)\n"
           "t.m:map_mmio(0x100000, 4096, { read = function(_, o, w) return #('x'):rep(o + w) end, write = function(_, ...) t.got = { ... } end,\n"
           "  save = function() return ('s'):rep(100) end, restore = function(_, s) t.state = s .. 'x' end })\n"
           "t.m:hook('mem_read', function(_, a) t.reads = { a, t.reads } end)\n"
           "t.m:write(0x1000, '\\x8b\\x04\\x25\\x08\\0\\x10\\0\\x89\\x04\\x25\\x08\\0\\x10\\0\\xf4')\n"
           "function body()\n"
           "  t.cpu:set_mode 'flat64' t.cpu.rip = 0x1000\n"
           "  assert(t.cpu:run())\n"
           "  local s = assert(t.m:snapshot())\n"
           "  assert(s:restore())\n"
           "  assert(#t.m:read(0x1000, 100) == 100)\n"
           "  for r in t.m:regions() do assert(r.gpa) end\n"
           "  assert(t.cpu:regs().rip and t.cpu:sregs().cr0 and t.cpu:fpu().ymm)\n"
           "end");
}
