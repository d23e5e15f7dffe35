# tests/fuzz: fuzz targets, one a program (fuzz.h says how they run). In `make check` each runs its corpus and a fixed pseudo-random one.
# make fuzz-NAME builds it with clang for libFuzzer, ASan and UBSan in fuzz-build and runs it for FUZZ_SECONDS.
fuzz_names = devices guest load api snapshot logs gdb
fuzz_corpus = tests/fuzz/corpus
EXTRA_DIST += tests/fuzz/run tests/fuzz/seeded $(fuzz_corpus)

check_PROGRAMS += tests/fuzz/devices tests/fuzz/guest tests/fuzz/load tests/fuzz/api tests/fuzz/snapshot tests/fuzz/logs tests/fuzz/gdb
tests_fuzz_devices_SOURCES = tests/fuzz/devices.c tests/fuzz/replay.c tests/fuzz/fuzz.h
tests_fuzz_devices_LDFLAGS = -static
tests_fuzz_guest_SOURCES = tests/fuzz/guest.c tests/fuzz/replay.c
tests_fuzz_guest_LDFLAGS = -static
tests_fuzz_load_SOURCES = tests/fuzz/load.c tests/fuzz/replay.c
tests_fuzz_load_LDFLAGS = -static
tests_fuzz_api_SOURCES = tests/fuzz/api.c tests/fuzz/replay.c
tests_fuzz_api_LDFLAGS = -static
tests_fuzz_snapshot_SOURCES = tests/fuzz/snapshot.c tests/fuzz/replay.c
tests_fuzz_snapshot_LDFLAGS = -static
tests_fuzz_logs_SOURCES = tests/fuzz/logs.c tests/fuzz/replay.c
tests_fuzz_logs_LDFLAGS = -static
tests_fuzz_gdb_SOURCES = tests/fuzz/gdb.c tests/fuzz/replay.c
tests_fuzz_gdb_LDFLAGS = -static

# The same with libFuzzer's main(). The check's harness is not in it, nor replay.c.
EXTRA_DIST += tests/fuzz/fast.c
CLEANFILES += $(fuzz_names:%=libfuzzer-%) tests/fuzz/fast.$(OBJEXT)
libfuzzer-%: tests/fuzz/%.$(OBJEXT) tests/fuzz/fast.$(OBJEXT) libvm.la
	$(AM_V_CCLD)$(LINK) -static -fsanitize=fuzzer $^

FUZZ_SECONDS = 300
FUZZ_RUN = CLANG='$(CLANG)' MAKE='$(MAKE)' sh $(srcdir)/tests/fuzz/run $(abs_top_srcdir)
fuzz-%:
	@$(FUZZ_RUN) $* $(FUZZ_SECONDS)
# All of them, FUZZ_RUNS executions each, of short inputs: hours. What each says is in fuzz-fast/NAME.log.
FUZZ_RUNS = 10000000
fuzz-volume:
	@mkdir -p fuzz-fast; for name in $(fuzz_names); do \
	    FUZZ_FAST=1 FUZZ_RUNS=$(FUZZ_RUNS) FUZZ_LENGTH=64 $(FUZZ_RUN) $$name 0 fuzz-fast >fuzz-fast/$$name.log 2>&1 || status=1; \
	    echo "$$name: $$(grep -hE 'ERROR|runtime error|number_of_executed_units' fuzz-fast/$$name.log | tail -n 2 | tr '\n' ' ')"; \
	done; exit $$status
# The Python and Lua modules, called with wrong arguments.
FUZZ_CALLS = 10000000
EXTRA_DIST += tests/fuzz/bindings
fuzz-python fuzz-lua:
	@MAKE='$(MAKE)' CC='$(CC)' PYTHON='$(PYTHON)' LUA='$(LUA)' sh $(srcdir)/tests/fuzz/bindings $(abs_top_srcdir) $(@:fuzz-%=%) $(FUZZ_CALLS)
# A bug put in on purpose (LIBVM_SEEDED_BUG) has to be found: minutes, by hand.
check-seeded:
	@CLANG='$(CLANG)' MAKE='$(MAKE)' sh $(srcdir)/tests/fuzz/seeded $(abs_top_srcdir)
.PHONY: check-seeded fuzz-volume fuzz-python fuzz-lua
# The examples for fuzzing.
EXTRA_DIST += tests/fuzz/examples
script_tests += tests/fuzz/examples
