# lib/api: argument checks of the public functions.
noinst_HEADERS += lib/api/api.h
libvm_la_SOURCES += lib/api/check.c lib/api/coverage.c lib/api/hook.c lib/api/machine.c lib/api/memory.c lib/api/vcpu.c
libvm_la_SOURCES += lib/api/doorbell.c
libvm_la_SOURCES += lib/api/snapshot.c
libvm_la_SOURCES += lib/api/call.c lib/api/replay.c
