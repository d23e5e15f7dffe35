# examples: programs that use the public interface only.
noinst_PROGRAMS += examples/hello
bin_PROGRAMS = examples/vmrun
examples_hello_LDADD = libvm.la
EXTRA_DIST += docs/calls.md
examples_vmrun_LDADD = libvm.la -lpthread

# Fuzzing: fuzz_target is the program fuzzed, for no operating system; see examples/target.h.
noinst_PROGRAMS += examples/fuzz_afl
examples_fuzz_afl_SOURCES = examples/fuzz_afl.c examples/target.c examples/target.h
examples_fuzz_afl_LDADD = libvm.la
# afl-fuzz looks into the binary: no libtool script in its place.
examples_fuzz_afl_LDFLAGS = $(AM_LDFLAGS) -static
EXTRA_DIST += examples/fuzz_target.c examples/fuzz_target.ld
example_files = examples/fuzz_target.elf
CLEANFILES += examples/fuzz_target.elf
examples/fuzz_target.elf: examples/fuzz_target.c examples/fuzz_target.ld
	@$(MKDIR_P) examples
	$(AM_V_CC)$(CC) -O1 -g -fno-inline -std=gnu11 -Wall -Wextra -ffreestanding -fno-pic -fno-pie -no-pie -fno-stack-protector -fcf-protection=none \
	  -mno-red-zone -nostdlib -static -Wl,--build-id=none -Wl,-e,fuzz_target -Wl,-T,$(srcdir)/examples/fuzz_target.ld -o $@ $(srcdir)/examples/fuzz_target.c
noinst_PROGRAMS += examples/trace examples/taint
examples_trace_SOURCES = examples/trace.c examples/target.c examples/target.h
examples_trace_LDADD = libvm.la
examples_taint_SOURCES = examples/taint.c examples/target.c examples/target.h
examples_taint_LDADD = libvm.la
# libFuzzer brings its own main() and comes with clang.
EXTRA_DIST += examples/fuzz_libfuzzer.c
if HAVE_LIBFUZZER
example_files += examples/fuzz_libfuzzer
CLEANFILES += examples/fuzz_libfuzzer
examples/fuzz_libfuzzer: examples/fuzz_libfuzzer.c examples/target.c examples/target.h libvm.la
	$(AM_V_CCLD)$(LIBTOOL) $(AM_V_lt) --tag=CC --mode=link $(CLANG) -std=gnu11 -g -O2 -Wall -Wextra -fsanitize=fuzzer -static \
	  -I$(top_srcdir)/include -o $@ $(srcdir)/examples/fuzz_libfuzzer.c $(srcdir)/examples/target.c libvm.la
endif
all-local: $(example_files)

# MMU strategies of one's own; `make check` runs them.
noinst_PROGRAMS += examples/mmu_hashed examples/mmu_ecc examples/mmu_working_set
examples_mmu_hashed_SOURCES = examples/mmu_hashed.c examples/paged.c examples/paged.h
examples_mmu_hashed_LDADD = libvm.la
examples_mmu_ecc_SOURCES = examples/mmu_ecc.c examples/paged.c examples/paged.h
examples_mmu_ecc_LDADD = libvm.la
examples_mmu_working_set_SOURCES = examples/mmu_working_set.c examples/paged.c examples/paged.h
examples_mmu_working_set_LDADD = libvm.la

# The same ten programs as in examples/python and examples/lua; `make check` runs them.
small_examples = examples/boot_linux examples/call examples/coverage examples/device examples/hooks examples/many_vms examples/memory \
	examples/mmu_strategy examples/snapshot_fuzz
noinst_PROGRAMS += $(small_examples)
noinst_HEADERS += examples/common.h
script_tests += examples/check
EXTRA_DIST += examples/check examples/expected
examples_boot_linux_LDADD = libvm.la
examples_call_LDADD = libvm.la
examples_coverage_LDADD = libvm.la
examples_device_LDADD = libvm.la
examples_hooks_LDADD = libvm.la
examples_many_vms_LDADD = libvm.la -lpthread
examples_memory_LDADD = libvm.la
examples_mmu_strategy_LDADD = libvm.la
examples_snapshot_fuzz_LDADD = libvm.la
