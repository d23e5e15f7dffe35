# lib/core: machine, memory map, vCPU, run loop, clock.
noinst_HEADERS += lib/core/core.h lib/core/hook.h 
libvm_la_SOURCES += lib/core/bus.c lib/core/clock.c lib/core/coverage.c lib/core/env.c lib/core/error.c lib/core/exit.c lib/core/hook.c lib/core/hookfire.c lib/core/lock.c \
    lib/core/machine.c lib/core/memory.c lib/core/regs.c lib/core/run.c lib/core/select.c lib/core/stats.c lib/core/trace.c lib/core/vcpu.c
libvm_la_SOURCES += lib/core/doorbell.c lib/core/doorbell.h
