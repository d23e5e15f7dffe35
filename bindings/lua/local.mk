# bindings/lua: the Lua 5.4 module `libvm`; its tests (bindings/lua/test_lua, with busted); its reference, docs/lua-api.md, which
# reference.lua writes from libvm.d.lua (`make lua-reference`).
lua_files = bindings/lua/libvm.d.lua bindings/lua/reference.lua bindings/lua/libvm-0.1.0-1.rockspec bindings/lua/spec/lines.lua \
    bindings/lua/spec/support.lua bindings/lua/spec/machine_spec.lua bindings/lua/spec/callback_spec.lua bindings/lua/spec/hostile_spec.lua bindings/lua/spec/pc_spec.lua \
    bindings/lua/spec/example_spec.lua bench/bench_lua.lua $(lua_examples:%=examples/lua/%.lua)
lua_examples = boot_linux call coverage device hello hooks many_vms memory mmu_strategy snapshot_fuzz
script_tests += bindings/lua/test_lua
EXTRA_DIST += $(lua_files) bindings/lua/test_lua docs/lua-api.md
lua_sources = bindings/lua/lvm.h bindings/lua/call.c bindings/lua/console.c bindings/lua/coverage.c bindings/lua/gdb.c \
    bindings/lua/hook.c bindings/lua/machine.c bindings/lua/memory.c bindings/lua/mmu.c bindings/lua/module.c bindings/lua/run.c \
    bindings/lua/snapshot.c bindings/lua/vcpu.c
if HAVE_LUA
luaexecdir = $(luadir)
luaexec_LTLIBRARIES = bindings/lua/libvm.la
bindings_lua_libvm_la_SOURCES = $(lua_sources)
bindings_lua_libvm_la_CPPFLAGS = -I$(top_srcdir)/include $(LUA_CFLAGS)
bindings_lua_libvm_la_LDFLAGS = $(AM_LDFLAGS) -module -avoid-version -shared
bindings_lua_libvm_la_LIBADD = libvm.la
lua_benches = bench-lua
# The module in a host program.
check_PROGRAMS += bindings/lua/lua_embed
bindings_lua_lua_embed_SOURCES = bindings/lua/spec/embed.c
bindings_lua_lua_embed_CPPFLAGS = -I$(top_srcdir) $(LUA_CFLAGS)
bindings_lua_lua_embed_LDADD = tests/libtest.a $(LUA_LIBS) -lpthread
else
EXTRA_DIST += $(lua_sources) bindings/lua/spec/embed.c
endif
bench-lua: bindings/lua/libvm.la
	@$(MKDIR_P) bench
	LUA_CPATH='bindings/lua/.libs/?.so' $(LUA) $(srcdir)/bench/bench_lua.lua bench/lua.json
CLEANFILES += bench/lua.json
lua-reference:
	$(LUA) $(srcdir)/bindings/lua/reference.lua $(srcdir) write
.PHONY: lua-reference bench-lua
