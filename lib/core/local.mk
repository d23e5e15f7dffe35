# lib/core: machine, memory map, vCPU, run loop, clock.
noinst_HEADERS += lib/core/core.h 
libvm_la_SOURCES += 
