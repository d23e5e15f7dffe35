# lib/dev: devices.
noinst_HEADERS += lib/dev/dev.h 
libvm_la_SOURCES += 
