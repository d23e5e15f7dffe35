/* run.c - running all vCPUs of a machine at once; tracing.
 *
 * Machine.run() runs vCPU 0 on the calling thread and each other one on a thread of its own, with a coroutine of its own for
 * its callbacks. All Lua code then runs under the universe's lock, so that scripts see no concurrency. The first vCPU
 * that has something to report ends the run of all; what others report in the same moment is kept for the next call.
 */
#include "lvm.h"

typedef struct run_all run_all;
typedef struct worker {
    run_all   *all;
    lua_State *L;                        /* its vCPU's box at index 1 */
    unsigned   index;
    pthread_t  thread;
    bool       started;
    int        status;
    vm_exit    e;
} worker;

struct run_all {
    lvm_machine   *machine;
    vm_run_options options;
    unsigned       count;
    worker        *workers;
    bool           ended;
    unsigned       first;                /* who ended it */
};

/* Under the lock: a vCPU has come back. */
static void came_back(worker *w)
{
    run_all *all = w->all;
    lvm_machine *b = all->machine;
    int reason = w->e.reason;
    if (all->ended) {
        if (w->status == VM_OK && reason != VM_EXIT_KICK && reason != VM_EXIT_DEADLINE && reason != VM_EXIT_BUDGET)
            b->unreported |= UINT64_C(1) << w->index;
        return;
    }
    all->ended = true;
    all->first = w->index;
    for (unsigned i = 0; i < all->count; i++)
        if (i != w->index) {
            b->stale_kicks |= UINT64_C(1) << i;
            vm_vcpu_kick(vm_vcpu_get(b->m, i));
        }
}

static void run_one(worker *w)
{
    if (w->all->ended)
        w->e.reason = VM_EXIT_KICK;
    else
        w->status = lvm_run(w->L, lua_touserdata(w->L, 1), 1, &w->all->options, &w->e, &w->all->ended);
    came_back(w);
}

static void *run_thread(void *arg)
{
    worker *w = arg;
    lvm_universe *u = w->all->machine->universe;
    pthread_mutex_lock(&u->lock);
    run_one(w);
    pthread_mutex_unlock(&u->lock);
    return NULL;
}

/* All vCPUs; leaves the exit in *e and whose it is in *which. A callback's error is for the caller to raise. */
int lvm_run_machine(lua_State *L, int machine, const vm_run_options *options, vm_exit *e, unsigned *which)
{
    lvm_machine *b = lua_touserdata(L, machine);
    lvm_universe *u = b->universe;
    run_all all = { .machine = b, .options = *options, .count = vm_vcpu_count(b->m) };
    int anchors, top = lua_gettop(L), status = VM_OK;
    lua_getiuservalue(L, machine, 1);
    anchors = lua_gettop(L);
    all.workers = lua_newuserdatauv(L, all.count * sizeof *all.workers, 0);
    luaL_checkstack(L, (int)all.count + 8, "too many vCPUs");
    for (unsigned i = 0; i < all.count; i++) {
        worker *w = &all.workers[i];
        *w = (worker){ .all = &all, .index = i, .L = lua_newthread(L), .e = VM_EXIT_INIT };
        lua_rawgeti(L, anchors, -1 - (lua_Integer)i);
        lua_xmove(L, w->L, 1);
        if (!lvm_last_exit(w->L, 1, &w->e))
            w->e = (vm_exit)VM_EXIT_INIT;
    }
    if (u->threads++ == 0)
        pthread_mutex_lock(&u->lock);
    for (unsigned i = 1; i < all.count; i++) {
        worker *w = &all.workers[i];
        w->started = pthread_create(&w->thread, NULL, run_thread, w) == 0;
        if (!w->started) {
            status = VM_E_HOST;
            all.ended = true;
        }
    }
    if (status == VM_OK)
        run_one(&all.workers[0]);
    else
        lvm_stop(b);
    pthread_mutex_unlock(&u->lock);
    for (unsigned i = 1; i < all.count; i++)
        if (all.workers[i].started)
            pthread_join(all.workers[i].thread, NULL);
    if (--u->threads)
        pthread_mutex_lock(&u->lock);
    for (unsigned i = 0; i < all.count; i++) {
        worker *w = &all.workers[i];
        if (w->status == VM_OK && w->e.reason) {
            lvm_push_exit(w->L, 1, &w->e);
            lua_pop(w->L, 1);
        } else if (status == VM_OK) {
            status = w->status;
        }
    }
    *which = all.first;
    *e = all.workers[all.first].e;
    lua_settop(L, top);
    return status;
}

/* machine:run(options): exit of the vCPU that has something to report; exit.cpu says which */
static int machine_run(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    vm_run_options options;
    vm_exit e = VM_EXIT_INIT;
    unsigned which = 0, count = vm_vcpu_count(b->m);
    int status;
    lua_settop(L, 2);
    lvm_check_run_options(L, 2, &options);
    lua_getiuservalue(L, 1, 1);
    for (unsigned i = 0; i < count; i++)
        if (b->unreported >> i & 1) {
            b->unreported &= ~(UINT64_C(1) << i);
            lua_rawgeti(L, 3, -1 - (lua_Integer)i);
            lua_getiuservalue(L, -1, 2);
            return 1;
        }
    if (count == 1) {
        lua_rawgeti(L, 3, -1);
        lvm_last_exit(L, 4, &e);
        status = lvm_run(L, lua_touserdata(L, 4), 4, &options, &e, NULL);
        if (status == VM_OK)
            lvm_push_exit(L, 4, &e);
    } else {
        if (b->depth)
            return luaL_error(L, "machine is running: this is a callback inside of its run");
        status = lvm_run_machine(L, 1, &options, &e, &which);
        lua_rawgeti(L, 3, -1 - (lua_Integer)which);
        lua_getiuservalue(L, -1, 2);
    }
    lvm_raise(L, b);
    return status == VM_OK ? 1 : lvm_fail(L, status);
}

/* ---- tracing ---- */

typedef struct line { int category; const char *text; } line;

static int push_line(lua_State *L)       /* function, line: the string is made where a lack of memory is caught */
{
    const line *l = lua_touserdata(L, 2);
    lua_settop(L, 1);
    lua_pushinteger(L, l->category);
    lua_pushstring(L, l->text);
    lua_call(L, 2, 0);
    return 0;
}

static void on_line(void *user, vm_trace_category category, const char *text)
{
    lvm_machine *b = user;
    line l = { (int)category, text };
    lua_State *L = lvm_callback(b, b->trace_fn);
    if (!L)
        return;
    lua_pushcfunction(L, push_line);
    lua_insert(L, -2);
    lua_pushlightuserdata(L, &l);
    b->tracing = true;
    if (!lvm_pcall(L, b, 2, 0))
        lvm_stop(b);
    b->tracing = false;
    lvm_return(L, b);
}

/* machine:trace(categories [, function(category, line)]): a list as LIBVM_TRACE takes it, or a mask; nil, "" or 0: off */
static int machine_trace(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    unsigned mask = 0;
    int status = VM_OK, fn = LUA_NOREF;
    lua_settop(L, 3);
    if (lua_type(L, 2) == LUA_TNUMBER)
        mask = (unsigned)lvm_check_range(L, 2, UINT32_MAX);
    else if (!lua_isnil(L, 2) && *luaL_checkstring(L, 2))
        status = vm_trace_parse(lua_tostring(L, 2), &mask);
    if (status != VM_OK)
        return lvm_fail(L, status);
    if (!lua_isnil(L, 3)) {
        luaL_checktype(L, 3, LUA_TFUNCTION);
        fn = lvm_anchor(L, 1);
    }
    status = vm_trace_set(b->m, mask, fn != LUA_NOREF ? on_line : NULL, b);
    lua_getiuservalue(L, 1, 1);
    luaL_unref(L, -1, status == VM_OK ? b->trace_fn : fn);
    if (status == VM_OK)
        b->trace_fn = fn;
    return lvm_done(L, status);
}

const luaL_Reg lvm_run_methods[] = { { "run", machine_run }, { "trace", machine_trace }, { NULL, NULL } };
