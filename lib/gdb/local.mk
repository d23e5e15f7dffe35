# lib/gdb: the stub for GDB's remote protocol.
noinst_HEADERS += lib/gdb/gdb.h
libvm_la_SOURCES += lib/gdb/command.c lib/gdb/drive.c lib/gdb/monitor.c lib/gdb/packet.c lib/gdb/register.c lib/gdb/reverse.c \
    lib/gdb/server.c
