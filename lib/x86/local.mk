# lib/x86: decode, semantics, faults, paging; knows nothing of machines.
noinst_HEADERS += lib/x86/cpu.h lib/x86/insn.h lib/x86/native.h lib/x86/simd.h lib/x86/ops.def lib/x86/ops.h lib/x86/ops_int.def lib/x86/ops_simd.def lib/x86/ops_sys.def 
libvm_la_SOURCES += lib/x86/reencode.c lib/x86/native.c lib/x86/op_simd.c lib/x86/op_fpu.c lib/x86/op_xsave.c
libvm_la_SOURCES += lib/x86/tlb.c
