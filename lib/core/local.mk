# lib/core: machine, memory map, vCPU, run loop, clock.
noinst_HEADERS += lib/core/core.h lib/core/call.h lib/core/replay.h lib/core/replaylog.h lib/core/run.h lib/core/signature.h lib/core/hook.h 
libvm_la_SOURCES += lib/core/bus.c lib/core/clock.c lib/core/coverage.c lib/core/env.c lib/core/error.c lib/core/exit.c lib/core/hook.c lib/core/hookfire.c lib/core/lock.c \
    lib/core/machine.c lib/core/memory.c lib/core/process.c lib/core/regs.c lib/core/run.c lib/core/select.c lib/core/stats.c lib/core/trace.c lib/core/vcpu.c
libvm_la_SOURCES += lib/core/doorbell.c lib/core/doorbell.h
EXTRA_DIST += docs/snapshots.md
noinst_HEADERS += lib/core/cpustate.h lib/core/snapfile.h lib/core/track.h
libvm_la_SOURCES += lib/core/cpustate.c lib/core/fork.c lib/core/image.c lib/core/snapfile.c lib/core/snapshot.c
if HAVE_ZSTD
LIBVM_FEATURES += -DVM_HAVE_ZSTD=1 $(ZSTD_CFLAGS)
libvm_la_LIBADD += $(ZSTD_LIBS)
endif
libvm_la_SOURCES += lib/core/backing.c
libvm_la_SOURCES += lib/core/bind.c lib/core/call.c lib/core/input.c lib/core/play.c lib/core/record.c lib/core/replay.c lib/core/replaylog.c lib/core/signature.c lib/core/sum.c
# vm_sandbox_enter(), with libseccomp where it is there.
noinst_HEADERS += lib/core/sandbox.def
libvm_la_SOURCES += lib/core/sandbox.c
LIBVM_FEATURES += $(SECCOMP_CPPFLAGS)
libvm_la_LIBADD += $(SECCOMP_LIBS)
