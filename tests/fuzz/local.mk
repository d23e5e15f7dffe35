# tests/fuzz: fuzz targets, one a program (fuzz.h says how they run). In `make check` each runs its corpus and a fixed pseudo-random one.
# make fuzz-NAME builds it with clang for libFuzzer, ASan and UBSan in fuzz-build and runs it for FUZZ_SECONDS.
fuzz_names = devices guest load api snapshot logs gdb
fuzz_corpus = tests/fuzz/corpus
EXTRA_DIST += tests/fuzz/run tests/fuzz/seeded $(fuzz_corpus)

check_PROGRAMS += tests/fuzz/devices tests/fuzz/guest tests/fuzz/load tests/fuzz/api tests/fuzz/snapshot tests/fuzz/logs tests/fuzz/gdb
FUZZ_LIBS = libvm.la $(ZYDIS_LIBS)
tests_fuzz_devices_SOURCES = tests/fuzz/devices.c tests/fuzz/replay.c tests/fuzz/fuzz.h
tests_fuzz_devices_LDADD = $(FUZZ_LIBS)
tests_fuzz_devices_LDFLAGS = -static
tests_fuzz_guest_SOURCES = tests/fuzz/guest.c tests/fuzz/replay.c
tests_fuzz_guest_LDADD = libvm.la
tests_fuzz_load_SOURCES = tests/fuzz/load.c tests/fuzz/replay.c
tests_fuzz_load_CPPFLAGS = $(AM_CPPFLAGS) -D_GNU_SOURCE
tests_fuzz_load_LDADD = libvm.la
tests_fuzz_api_SOURCES = tests/fuzz/api.c tests/fuzz/replay.c
tests_fuzz_api_LDADD = libvm.la
tests_fuzz_snapshot_SOURCES = tests/fuzz/snapshot.c tests/fuzz/replay.c
tests_fuzz_snapshot_LDADD = $(FUZZ_LIBS)
tests_fuzz_snapshot_LDFLAGS = -static
tests_fuzz_logs_SOURCES = tests/fuzz/logs.c tests/fuzz/replay.c
tests_fuzz_logs_LDADD = $(FUZZ_LIBS)
tests_fuzz_logs_LDFLAGS = -static
tests_fuzz_gdb_LDADD = $(FUZZ_LIBS)
tests_fuzz_gdb_LDFLAGS = -static

EXTRA_PROGRAMS += libfuzzer-devices libfuzzer-guest libfuzzer-load libfuzzer-api libfuzzer-snapshot libfuzzer-logs libfuzzer-gdb
FUZZ_LINK = -static -fsanitize=fuzzer
libfuzzer_devices_SOURCES = tests/fuzz/devices.c
libfuzzer_devices_LDADD = $(FUZZ_LIBS)
libfuzzer_devices_LDFLAGS = $(FUZZ_LINK)
libfuzzer_guest_SOURCES = tests/fuzz/guest.c
libfuzzer_guest_LDADD = $(FUZZ_LIBS)
libfuzzer_guest_LDFLAGS = $(FUZZ_LINK)
libfuzzer_load_SOURCES = tests/fuzz/load.c
libfuzzer_load_CPPFLAGS = $(AM_CPPFLAGS) -D_GNU_SOURCE
libfuzzer_load_LDADD = $(FUZZ_LIBS)
libfuzzer_load_LDFLAGS = $(FUZZ_LINK)
libfuzzer_api_SOURCES = tests/fuzz/api.c
libfuzzer_api_LDADD = $(FUZZ_LIBS)
libfuzzer_api_LDFLAGS = $(FUZZ_LINK)
libfuzzer_snapshot_SOURCES = tests/fuzz/snapshot.c
libfuzzer_snapshot_LDADD = $(FUZZ_LIBS)
libfuzzer_snapshot_LDFLAGS = $(FUZZ_LINK)
libfuzzer_logs_SOURCES = tests/fuzz/logs.c
libfuzzer_logs_LDADD = $(FUZZ_LIBS)
libfuzzer_logs_LDFLAGS = $(FUZZ_LINK)
libfuzzer_gdb_SOURCES = tests/fuzz/gdb.c
libfuzzer_gdb_CPPFLAGS = $(AM_CPPFLAGS) -DVM_LIBFUZZER
libfuzzer_gdb_LDADD = $(FUZZ_LIBS)
libfuzzer_gdb_LDFLAGS = $(FUZZ_LINK)

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
# A bug put in on purpose (LIBVM_SEEDED_BUG) has to be found: minutes, by hand.
check-seeded:
	@CLANG='$(CLANG)' MAKE='$(MAKE)' sh $(srcdir)/tests/fuzz/seeded $(abs_top_srcdir)
.PHONY: check-seeded fuzz-volume
# The examples for fuzzing.
EXTRA_DIST += tests/fuzz/examples
script_tests += tests/fuzz/examples
