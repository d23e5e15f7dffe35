-- `luarocks make` in this directory builds the module against an installed libvm (LIBVM_DIR=... when it is not under /usr or
-- /usr/local).
rockspec_format = "3.0"
package = "libvm"
version = "0.1.0-1"
source = { url = "file://." }
description = {
  summary = "x86 virtual machines inside a program",
  detailed = "Makes, runs, watches and snapshots x86 virtual machines; devices, hooks and MMU strategies may be written in Lua.",
  license = "MIT",
}
supported_platforms = { "linux" }
dependencies = { "lua ~> 5.4" }
external_dependencies = { LIBVM = { header = "libvm/libvm.h", library = "vm" } }
build = {
  type = "builtin",
  modules = {
    libvm = {
      sources = { "call.c", "console.c", "coverage.c", "gdb.c", "hook.c", "machine.c", "memory.c", "mmu.c", "module.c", "run.c",
                  "snapshot.c", "vcpu.c" },
      defines = { "_GNU_SOURCE" },
      libraries = { "vm", "pthread" },
      incdirs = { "$(LIBVM_INCDIR)" },
      libdirs = { "$(LIBVM_LIBDIR)" },
    },
  },
}
