# bench: `make bench`. Ratios against peers measured in the same run, and JSON beside the build; never part of `make check`.
# Unicorn is a peer of the kernels' benchmark when its header is there.
EXTRA_DIST += bench/boot bench/kernels.c bench/kernels.ld
EXTRA_PROGRAMS += bench/bench_kernels
bench_bench_kernels_SOURCES = bench/bench_kernels.c
bench_bench_kernels_CPPFLAGS = $(AM_CPPFLAGS) $(UNICORN_CPPFLAGS)
bench_bench_kernels_LDADD = libvm.la $(UNICORN_LIBS) -lm
bench/kernels.elf: bench/kernels.c bench/kernels.ld
	@$(MKDIR_P) bench
	$(AM_V_CC)$(CC) -O2 -mavx2 -mfma -maes -msse4.2 -ffreestanding -fno-pic -mcmodel=large -fno-stack-protector -nostdlib -static \
	  -Wl,--build-id=none -Wl,-T,$(srcdir)/bench/kernels.ld -o $@ $(srcdir)/bench/kernels.c
CLEANFILES += bench/kernels.elf bench/kernels.json boot.json

BENCH_COLUMNS = jit,flat,interp,unicorn
bench: bench-kernels bench-boot $(bench_kvm_target)
bench-kernels: bench/bench_kernels bench/kernels.elf
	bench/bench_kernels bench/kernels.elf --json bench/kernels.json --columns $(BENCH_COLUMNS)
bench-boot: examples/vmrun
	VMRUN=examples/vmrun BENCH_JSON=boot.json $(srcdir)/bench/boot
.PHONY: bench bench-kernels bench-boot bench-kvm

# KVM: exits, creation, ring 3, against raw ioctls. Says so and ends where there is no usable KVM.
if BUILD_KVM
EXTRA_PROGRAMS += bench/bench_kvm
bench_bench_kvm_SOURCES = bench/bench_kvm.c
bench_bench_kvm_LDADD = libvm.la
CLEANFILES += bench/kvm.json
bench_kvm_target = bench-kvm
endif
bench-kvm: bench/bench_kvm
	bench/bench_kvm --json bench/kvm.json
