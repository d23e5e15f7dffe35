# lib/mmu: MMU strategies.
noinst_HEADERS += lib/mmu/mmu.h 
libvm_la_SOURCES += 
