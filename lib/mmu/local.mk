# lib/mmu: MMU strategies.
noinst_HEADERS += lib/mmu/ept.h lib/mmu/mmu.h
libvm_la_SOURCES += lib/mmu/ept.c lib/mmu/fill.c lib/mmu/flat.c lib/mmu/park.c lib/mmu/registry.c lib/mmu/shadow.c lib/mmu/tlb.c
