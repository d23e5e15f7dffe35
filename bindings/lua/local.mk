# bindings/lua: the Lua 5.4 module `libvm`.
if HAVE_LUA
luaexecdir = $(luadir)
luaexec_LTLIBRARIES = bindings/lua/libvm.la
bindings_lua_libvm_la_SOURCES = bindings/lua/lvm.h bindings/lua/call.c bindings/lua/console.c bindings/lua/coverage.c \
    bindings/lua/gdb.c bindings/lua/hook.c bindings/lua/machine.c bindings/lua/memory.c bindings/lua/mmu.c bindings/lua/module.c \
    bindings/lua/run.c bindings/lua/snapshot.c bindings/lua/vcpu.c
bindings_lua_libvm_la_CPPFLAGS = -I$(top_srcdir)/include $(LUA_CFLAGS)
bindings_lua_libvm_la_LDFLAGS = $(AM_LDFLAGS) -module -avoid-version -shared
bindings_lua_libvm_la_LIBADD = libvm.la
endif
