# Public headers, installed as <libvm/...>. The .def tables are part of the interface: they expand into enums.
libvmincludedir = $(includedir)/libvm
libvminclude_HEADERS = \
	include/libvm/boot.h \
	include/libvm/call.h \
	include/libvm/coverage.h \
	include/libvm/device.h \
	include/libvm/error.def \
	include/libvm/error.h \
	include/libvm/exit.def \
	include/libvm/exit.h \
	include/libvm/gdb.h \
	include/libvm/hook.h \
	include/libvm/libvm.h \
	include/libvm/machine.h \
	include/libvm/memory.h \
	include/libvm/mmu.h \
	include/libvm/reg.def \
	include/libvm/sandbox.h \
	include/libvm/replay.h \
	include/libvm/snapshot.h \
	include/libvm/stat.def \
	include/libvm/types.h \
	include/libvm/vcpu.h
