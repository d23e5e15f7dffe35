# lib/api: argument checks of the public functions.
noinst_HEADERS += 
libvm_la_SOURCES += 
