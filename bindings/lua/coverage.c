/* coverage.c - edge counters, block traces, comparison logs. */
#include "lvm.h"

/* A ring that a vCPU writes. The memory belongs to a block that the machine holds while it is in use. */
typedef struct ring_box {
    lvm_machine *machine;
    lvm_block   *block;
    uint64_t    *head;                  /* the block's first 8 bytes; the ring follows at RING_AT */
    uint64_t     entries, tail;
    bool         is_compare;
} ring_box;

enum { RING_AT = 64 };

/* The machine holds `block` for `purpose` from now on instead of what it held: after libvm has let go of that. */
static void hold(lvm_machine *b, lvm_block **place, lvm_block *block)
{
    (void)b;
    if (block)
        block->references++;
    lvm_drop_block(*place);
    *place = block;
}

/* machine:coverage(buffer or nil) */
static int machine_coverage(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    lvm_buffer *v = lua_isnoneornil(L, 2) ? NULL : luaL_checkudata(L, 2, LVM_BUFFER);
    int status;
    luaL_argcheck(L, !v || v->block, 2, "a buffer with memory of its own expected, not a view");
    status = vm_coverage(b->m, v ? v->block->data : NULL, v ? v->block->bytes : 0);
    if (status == VM_OK)
        hold(b, &b->coverage, v ? v->block : NULL);
    return lvm_done(L, status);
}

static int machine_coverage_range(lua_State *L)
{
    lvm_machine *b = lvm_check_machine(L, 1);
    return lvm_done(L, vm_coverage_range(b->m, (uint64_t)luaL_optinteger(L, 2, 0), (uint64_t)luaL_optinteger(L, 3, 0)));
}

int lvm_coverage_id(lua_State *L)
{
    lua_pushinteger(L, vm_coverage_id((uint64_t)luaL_checkinteger(L, 1)));
    return 1;
}

static int start_ring(lua_State *L, bool is_compare)
{
    lvm_vcpu *v = lvm_check_vcpu(L, 1);
    lvm_machine *b = v->machine;
    unsigned index = vm_vcpu_index(v->cpu);
    size_t width = is_compare ? sizeof(vm_compare) : sizeof(uint64_t);
    uint64_t entries = lua_isnoneornil(L, 2) ? 0 : lvm_check_range(L, 2, 1u << 27);
    lvm_block **place = &v->ring[is_compare];
    ring_box *ring = NULL;
    void *at = NULL;
    int status;
    (void)index;
    if (entries) {
        ring = lua_newuserdatauv(L, sizeof *ring, 1);
        memset(ring, 0, sizeof *ring);
        luaL_setmetatable(L, LVM_RING);
        lua_pushvalue(L, 1);
        lua_setiuservalue(L, -2, 1);
        ring->machine = b;
        ring->entries = entries;
        ring->is_compare = is_compare;
        ring->block = lvm_new_block(RING_AT + entries * width);
        if (!ring->block)
            return luaL_error(L, "not enough memory");
        ring->head = (uint64_t *)(void *)ring->block->data;
        at = ring->block->data + RING_AT;
    }
    status = is_compare ? vm_compare_log(v->cpu, at, entries, ring ? ring->head : NULL)
                        : vm_block_trace(v->cpu, at, entries, ring ? ring->head : NULL);
    if (status != VM_OK)
        return lvm_fail(L, status);
    hold(b, place, ring ? ring->block : NULL);
    if (!ring)
        lua_pushboolean(L, 1);
    return 1;
}

/* cpu:block_trace(entries): a ring of addresses; nil or 0: off */
static int vcpu_block_trace(lua_State *L) { return start_ring(L, false); }
static int vcpu_compare_log(lua_State *L) { return start_ring(L, true); }

static void push_compare(lua_State *L, const vm_compare *c)
{
    static const char *const kinds[] = { "", "cmp", "test", "sub", "string", "scan", "vector" };
    lua_createtable(L, 0, 6);
    lua_pushinteger(L, (lua_Integer)c->address);
    lua_setfield(L, -2, "address");
    lua_pushstring(L, c->kind < sizeof kinds / sizeof *kinds ? kinds[c->kind] : "?");
    lua_setfield(L, -2, "kind");
    lua_pushinteger(L, c->width);
    lua_setfield(L, -2, "width");
    lua_pushboolean(L, c->is_constant);
    lua_setfield(L, -2, "is_constant");
    for (int i = 0; i < 2; i++) {
        const uint64_t *operand = i ? c->b : c->a;
        if (c->width <= 8)
            lua_pushinteger(L, (lua_Integer)operand[0]);
        else
            lua_pushlstring(L, (const char *)operand, c->width <= 32 ? c->width : 32);
        lua_setfield(L, -2, i ? "b" : "a");
    }
}

/* ring:fetch(): a list of what came since the last fetch, and how many entries were overwritten before they were fetched */
static int ring_fetch(lua_State *L)
{
    ring_box *ring = luaL_checkudata(L, 1, LVM_RING);
    uint64_t head = *ring->head, lost = 0;
    lua_Integer n = 0;
    if (head - ring->tail > ring->entries) {
        lost = head - ring->tail - ring->entries;
        ring->tail = head - ring->entries;
    }
    luaL_argcheck(L, head - ring->tail <= INT32_MAX, 1, "too many entries");
    lua_createtable(L, (int)(head - ring->tail), 0);
    for (; ring->tail != head; ring->tail++) {
        uint64_t i = ring->tail & (ring->entries - 1);
        const uint8_t *at = ring->block->data + RING_AT;
        if (ring->is_compare)
            push_compare(L, (const vm_compare *)(const void *)at + i);
        else
            lua_pushinteger(L, (lua_Integer)((const uint64_t *)(const void *)at)[i]);
        lua_rawseti(L, -2, ++n);
    }
    lua_pushinteger(L, (lua_Integer)lost);
    return 2;
}

static int ring_gc(lua_State *L)
{
    ring_box *ring = luaL_checkudata(L, 1, LVM_RING);
    lvm_drop_block(ring->block);
    ring->block = NULL;
    return 0;
}

const luaL_Reg lvm_coverage_methods[] = {
    { "coverage", machine_coverage }, { "coverage_range", machine_coverage_range }, { NULL, NULL },
};
const luaL_Reg lvm_coverage_vcpu_methods[] = {
    { "block_trace", vcpu_block_trace }, { "compare_log", vcpu_compare_log }, { NULL, NULL },
};

void lvm_open_coverage(lua_State *L)
{
    static const luaL_Reg meta[] = { { "__gc", ring_gc }, { NULL, NULL } };
    static const luaL_Reg methods[] = { { "fetch", ring_fetch }, { NULL, NULL } };
    lvm_class(L, LVM_RING, meta, methods, NULL);
}
