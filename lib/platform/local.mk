# lib/platform: the PC.
noinst_HEADERS += 
libvm_la_SOURCES += 
