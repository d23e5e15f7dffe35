# tests/fuzz: fuzz targets, one a program (fuzz.h says how they run). In `make check` each runs its corpus and a fixed pseudo-random one.
# make fuzz-NAME builds it with clang for libFuzzer, ASan and UBSan in fuzz-build and runs it for FUZZ_SECONDS.
fuzz_names = devices guest load api snapshot logs
EXTRA_DIST += tests/fuzz/run tests/fuzz/seeded $(fuzz_corpus)
fuzz_corpus = tests/fuzz/corpus
check_PROGRAMS += tests/fuzz/devices tests/fuzz/guest tests/fuzz/load tests/fuzz/api
tests_fuzz_devices_SOURCES = tests/fuzz/devices.c tests/fuzz/replay.c tests/fuzz/fuzz.h
tests_fuzz_devices_LDADD = libvm.la $(ZYDIS_LIBS)
tests_fuzz_devices_LDFLAGS = -static
tests_fuzz_guest_SOURCES = tests/fuzz/guest.c tests/fuzz/replay.c
tests_fuzz_guest_LDADD = libvm.la
tests_fuzz_load_SOURCES = tests/fuzz/load.c tests/fuzz/replay.c
tests_fuzz_load_CPPFLAGS = $(AM_CPPFLAGS) -D_GNU_SOURCE
tests_fuzz_load_LDADD = libvm.la
tests_fuzz_api_SOURCES = tests/fuzz/api.c tests/fuzz/replay.c
tests_fuzz_api_LDADD = libvm.la

check_PROGRAMS += tests/fuzz/snapshot
tests_fuzz_snapshot_SOURCES = tests/fuzz/snapshot.c tests/fuzz/replay.c
tests_fuzz_snapshot_LDADD = libvm.la $(ZYDIS_LIBS)
tests_fuzz_snapshot_LDFLAGS = -static

EXTRA_PROGRAMS += libfuzzer-snapshot
libfuzzer_snapshot_SOURCES = tests/fuzz/snapshot.c
libfuzzer_snapshot_LDADD = libvm.la $(ZYDIS_LIBS)
libfuzzer_snapshot_LDFLAGS = $(FUZZ_LINK)
EXTRA_PROGRAMS += libfuzzer-devices libfuzzer-guest libfuzzer-load libfuzzer-api
FUZZ_LINK = -static -fsanitize=fuzzer
libfuzzer_devices_SOURCES = tests/fuzz/devices.c
libfuzzer_devices_LDADD = libvm.la $(ZYDIS_LIBS)
libfuzzer_devices_LDFLAGS = $(FUZZ_LINK)
libfuzzer_guest_SOURCES = tests/fuzz/guest.c
libfuzzer_guest_LDADD = libvm.la $(ZYDIS_LIBS)
libfuzzer_guest_LDFLAGS = $(FUZZ_LINK)
libfuzzer_load_SOURCES = tests/fuzz/load.c
libfuzzer_load_CPPFLAGS = $(AM_CPPFLAGS) -D_GNU_SOURCE
libfuzzer_load_LDADD = libvm.la $(ZYDIS_LIBS)
libfuzzer_load_LDFLAGS = $(FUZZ_LINK)
libfuzzer_api_SOURCES = tests/fuzz/api.c
libfuzzer_api_LDADD = libvm.la $(ZYDIS_LIBS)
libfuzzer_api_LDFLAGS = $(FUZZ_LINK)

FUZZ_SECONDS = 300
fuzz-%:
	@CLANG='$(CLANG)' MAKE='$(MAKE)' sh $(srcdir)/tests/fuzz/run $(abs_top_srcdir) $* $(FUZZ_SECONDS)
# A bug put in on purpose (LIBVM_SEEDED_BUG) has to be found: minutes, by hand.
check-seeded:
	@CLANG='$(CLANG)' MAKE='$(MAKE)' sh $(srcdir)/tests/fuzz/seeded $(abs_top_srcdir)
.PHONY: check-seeded
EXTRA_PROGRAMS += fuzz-devices
fuzz_devices_SOURCES = tests/fuzz/devices.c
fuzz_devices_CPPFLAGS = $(AM_CPPFLAGS) -DVM_LIBFUZZER
fuzz_devices_LDADD = libvm.la $(ZYDIS_LIBS)
fuzz_devices_LDFLAGS = -static -fsanitize=fuzzer
# The examples for fuzzing.
EXTRA_DIST += tests/fuzz/examples
script_tests += tests/fuzz/examples

check_PROGRAMS += tests/fuzz/gdb
tests_fuzz_gdb_LDADD = libvm.la $(ZYDIS_LIBS)
tests_fuzz_gdb_LDFLAGS = -static
EXTRA_PROGRAMS += fuzz-gdb
fuzz_gdb_SOURCES = tests/fuzz/gdb.c
fuzz_gdb_CPPFLAGS = $(AM_CPPFLAGS) -DVM_LIBFUZZER
fuzz_gdb_LDADD = libvm.la $(ZYDIS_LIBS)
fuzz_gdb_LDFLAGS = -static -fsanitize=fuzzer
check_PROGRAMS += tests/fuzz/logs
tests_fuzz_logs_SOURCES = tests/fuzz/logs.c tests/fuzz/replay.c
tests_fuzz_logs_LDADD = libvm.la $(ZYDIS_LIBS)
tests_fuzz_logs_LDFLAGS = -static
EXTRA_PROGRAMS += libfuzzer-logs
libfuzzer_logs_SOURCES = tests/fuzz/logs.c
libfuzzer_logs_LDADD = libvm.la $(ZYDIS_LIBS)
libfuzzer_logs_LDFLAGS = $(FUZZ_LINK)
