# lib/interp: the reference interpreter.
noinst_HEADERS += 
libvm_la_SOURCES += 
