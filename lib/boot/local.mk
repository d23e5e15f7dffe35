# lib/boot: loaders.
noinst_HEADERS += 
libvm_la_SOURCES += 
