# lib/jit: the just-in-time compiler. Add sources and the feature define inside the conditional.
if BUILD_JIT
# LIBVM_FEATURES += -DVM_HAVE_JIT=1
# libvm_la_SOURCES += lib/jit/jit.c
endif
