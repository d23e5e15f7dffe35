# lib/x86: decode, semantics, faults, paging; knows nothing of machines.
noinst_HEADERS += lib/x86/cpu.h lib/x86/insn.h lib/x86/native.h lib/x86/simd.h lib/x86/ops.def lib/x86/ops.h lib/x86/ops_int.def lib/x86/ops_simd.def lib/x86/ops_sys.def 
libvm_la_SOURCES += lib/x86/reencode.c lib/x86/native.c lib/x86/op_simd.c lib/x86/op_fpu.c lib/x86/op_fpu_light.c lib/x86/op_xsave.c
libvm_la_SOURCES += lib/x86/tlb.c
noinst_HEADERS += lib/x86/cover.h
libvm_la_SOURCES += lib/x86/cover.c
noinst_HEADERS += lib/x86/access.h lib/x86/alu.h
libvm_la_SOURCES += lib/x86/decode.c lib/x86/forms.c lib/x86/offer.c lib/x86/specialise.c lib/x86/mem.c lib/x86/operand.c lib/x86/stack.c lib/x86/flags.c
libvm_la_SOURCES += lib/x86/op_alu.c lib/x86/op_mov.c lib/x86/op_mul.c lib/x86/op_bit.c lib/x86/op_flow.c lib/x86/op_string.c
noinst_HEADERS += lib/x86/system.h
libvm_la_SOURCES += lib/x86/fault.c lib/x86/gate.c lib/x86/segment.c lib/x86/op_far.c lib/x86/task.c lib/x86/state.c lib/x86/walk.c
libvm_la_SOURCES += lib/x86/debug.c lib/x86/hook.c lib/x86/op_sys.c lib/x86/cpuid.c lib/x86/msr.c
