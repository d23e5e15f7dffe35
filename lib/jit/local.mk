# lib/jit: the just-in-time compiler.
if BUILD_JIT
LIBVM_FEATURES += -DVM_HAVE_JIT=1
noinst_HEADERS += lib/jit/asm.h lib/jit/frame.h lib/jit/jit.h lib/jit/ir.def
libvm_la_SOURCES += lib/jit/coverage.c lib/jit/emit.c lib/jit/help.c lib/jit/hook.c lib/jit/jit.c lib/jit/lift.c lib/jit/opt.c \
  lib/jit/print.c lib/jit/string.c lib/jit/thunk.c lib/jit/window.c
endif
