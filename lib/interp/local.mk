# lib/interp: the reference interpreter.
noinst_HEADERS += lib/interp/interp.h lib/interp/blocks.h
libvm_la_SOURCES += lib/interp/blocks.c lib/interp/interp.c lib/interp/backend.c
