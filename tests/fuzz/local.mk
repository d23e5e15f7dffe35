# tests/fuzz: fuzz targets, one a program. In `make check` each runs a fixed corpus; given files, it runs those (AFL++). With a clang
# build for libFuzzer (see the target's first comment): make fuzz-devices, then ./fuzz-devices CORPUS_DIR.
check_PROGRAMS += tests/fuzz/devices
tests_fuzz_devices_SOURCES = tests/fuzz/devices.c
tests_fuzz_devices_LDADD = libvm.la $(ZYDIS_LIBS)
tests_fuzz_devices_LDFLAGS = -static

EXTRA_PROGRAMS += fuzz-devices
fuzz_devices_SOURCES = tests/fuzz/devices.c
fuzz_devices_CPPFLAGS = $(AM_CPPFLAGS) -DVM_LIBFUZZER
fuzz_devices_LDADD = libvm.la $(ZYDIS_LIBS)
fuzz_devices_LDFLAGS = -static -fsanitize=fuzzer
# The examples for fuzzing.
EXTRA_DIST += tests/fuzz/examples
script_tests += tests/fuzz/examples
