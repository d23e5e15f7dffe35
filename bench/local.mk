# bench: `make bench`. Ratios against peers measured in the same run, and JSON beside the build; never part of `make check`.
# The very same bytes run natively and in each engine; the code is what a compiler makes of a plain static program.
# Unicorn is a peer of the kernels' benchmark when its header is there.
EXTRA_DIST += bench/boot bench/guest bench/programs bench/ratios.awk bench/guest_main.c bench/kernels.c bench/kernels.h bench/kernels.ld
EXTRA_PROGRAMS += bench/bench_kernels
bench_bench_kernels_CPPFLAGS = $(AM_CPPFLAGS) $(UNICORN_CPPFLAGS)
bench_bench_kernels_LDADD = libvm.la $(UNICORN_LIBS) -lm
bench/kernels.elf: bench/kernels.c bench/kernels.ld
	@$(MKDIR_P) bench
	$(AM_V_CC)$(CC) -O2 -ffreestanding -fno-pic -fno-stack-protector -fno-tree-loop-distribute-patterns -mno-red-zone -nostdlib -static \
	  -Wl,--build-id=none -Wl,-T,$(srcdir)/bench/kernels.ld -o $@ $(srcdir)/bench/kernels.c
# The same kernels as a program for the guest; the 32-bit build needs gcc's multilib and is left out without it.
GUEST_CFLAGS = -O2 -fno-stack-protector -fno-tree-loop-distribute-patterns -static -fno-pie -no-pie
bench/guest64: bench/guest_main.c bench/kernels.c
	@$(MKDIR_P) bench
	$(AM_V_CC)$(CC) $(GUEST_CFLAGS) -o $@ $(srcdir)/bench/guest_main.c
bench/guest32: bench/guest_main.c bench/kernels.c
	@$(MKDIR_P) bench
	$(AM_V_CC)$(CC) -m32 $(GUEST_CFLAGS) -o $@ $(srcdir)/bench/guest_main.c 2>/dev/null || \
	  { rm -f $@; echo "no 32-bit compiler (gcc-multilib): 32-bit kernels left out"; }

EXTRA_PROGRAMS += bench/bench_calls bench/cputime
bench_cputime_LDADD =
bench_bench_calls_CPPFLAGS = $(AM_CPPFLAGS) $(UNICORN_CPPFLAGS)
bench_bench_calls_LDADD = libvm.la $(UNICORN_LIBS)
CLEANFILES += bench/kernels.elf bench/guest64 bench/guest32 bench/kernels.json bench/calls.json guest.json programs.json boot.json

BENCH_COLUMNS = jit,flat,interp,unicorn
bench: bench-kernels bench-calls bench-guest bench-boot bench-mmu $(bench_kvm_target)
bench-kernels: bench/bench_kernels bench/kernels.elf
	bench/bench_kernels bench/kernels.elf --json bench/kernels.json --columns $(BENCH_COLUMNS)
bench-calls: bench/bench_calls
	bench/bench_calls --json bench/calls.json
bench-guest: examples/vmrun bench/cputime bench/guest64 bench/guest32
	VMRUN=examples/vmrun BENCH_JSON=guest.json $(srcdir)/bench/guest bench/cputime bench/guest64 bench/guest32
# Programs of this machine in the guest; minutes, most of them the peer's, so not part of `make bench`.
bench-programs: examples/vmrun bench/cputime
	VMRUN=examples/vmrun BENCH_JSON=programs.json $(srcdir)/bench/programs bench/cputime $(srcdir)/bench/kernels.c
bench-boot: examples/vmrun
	VMRUN=examples/vmrun BENCH_JSON=boot.json $(srcdir)/bench/boot
.PHONY: bench bench-kernels bench-calls bench-guest bench-programs bench-boot bench-kvm

# MMU strategies side by side; PLOT=FILE draws them.
EXTRA_DIST += bench/mmu bench/mmu_guest.c
EXTRA_PROGRAMS += bench/bench_mmu bench/mmu_linux
bench_bench_mmu_LDADD = libvm.la
bench_mmu_linux_LDADD = libvm.la
CLEANFILES += bench/mmu_guest mmu.json mmu-linux.json
bench/mmu_guest: bench/mmu_guest.c
	@$(MKDIR_P) bench
	$(AM_V_CC)$(CC) $(GUEST_CFLAGS) -o $@ $(srcdir)/bench/mmu_guest.c
bench-mmu: bench/bench_mmu bench/mmu_linux bench/mmu_guest
	$(srcdir)/bench/mmu bench/bench_mmu bench/mmu_linux bench/mmu_guest $(PLOT)
.PHONY: bench-mmu

# KVM: exits, creation, ring 3, against raw ioctls. Says so and ends where there is no usable KVM.
if BUILD_KVM
EXTRA_PROGRAMS += bench/bench_kvm
bench_bench_kvm_LDADD = libvm.la
CLEANFILES += bench/kvm.json
bench_kvm_target = bench-kvm
endif
bench-kvm: bench/bench_kvm
	bench/bench_kvm --json bench/kvm.json

# Coverage, block traces and the comparison log: slowdown of the kernels.
EXTRA_PROGRAMS += bench/bench_coverage
bench_bench_coverage_LDADD = libvm.la -lm
CLEANFILES += bench/coverage.json
bench: bench-coverage
bench-coverage: bench/bench_coverage bench/kernels.elf
	bench/bench_coverage bench/kernels.elf --json bench/coverage.json
.PHONY: bench-coverage

EXTRA_PROGRAMS += bench/bench_snapshot
bench_bench_snapshot_CPPFLAGS = $(AM_CPPFLAGS) $(UNICORN_CPPFLAGS)
bench_bench_snapshot_LDADD = libvm.la $(UNICORN_LIBS)
CLEANFILES += bench/snapshot.json
bench: bench-snapshot
bench-snapshot: bench/bench_snapshot
	bench/bench_snapshot --json bench/snapshot.json
.PHONY: bench-snapshot

# Hooks and registers: calls a second, beside Unicorn.
EXTRA_PROGRAMS += bench/bench_hooks
bench_bench_hooks_CPPFLAGS = $(AM_CPPFLAGS) $(UNICORN_CPPFLAGS)
bench_bench_hooks_LDADD = libvm.la $(UNICORN_LIBS)
CLEANFILES += bench/hooks.json
bench: bench-hooks
bench-hooks: bench/bench_hooks
	bench/bench_hooks --json bench/hooks.json
# afl-fuzz on a small parser, from a snapshot and with a fork for each test case. Left out where afl-fuzz is missing.
EXTRA_DIST += bench/afl
EXTRA_PROGRAMS += bench/afl_unicorn
bench_afl_unicorn_CPPFLAGS = $(AM_CPPFLAGS) $(UNICORN_CPPFLAGS)
bench_afl_unicorn_LDADD = $(UNICORN_LIBS)
CLEANFILES += afl.json
bench: bench-afl
bench-afl: examples/fuzz_afl examples/fuzz_target.elf
	-test -z '$(UNICORN_LIBS)' || $(MAKE) bench/afl_unicorn
	BENCH_JSON=afl.json $(srcdir)/bench/afl examples/fuzz_afl examples/fuzz_target.elf bench/afl_unicorn
.PHONY: bench-afl
# The Python module, beside python3-unicorn.
EXTRA_DIST += bench/bench_python.py
if WITH_PYTHON
python_benches = bench-python
endif
bench: $(python_benches) $(lua_benches)
bench-python: bindings/python/_libvm.la
	with_python=$(have_python) PYTHON='$(PYTHON)' top_builddir=. $(srcdir)/bindings/python/tests/run --package-only
	LD_LIBRARY_PATH=.libs PYTHONPATH=bindings/python/package $(PYTHON) $(srcdir)/bench/bench_python.py python.json
CLEANFILES += python.json
.PHONY: bench-python
