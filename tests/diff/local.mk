# tests/diff
check_PROGRAMS += tests/diff/simd
tests_diff_simd_LDFLAGS = -static
check_PROGRAMS += tests/diff/integer
tests_diff_integer_SOURCES = tests/diff/integer.c tests/unit/x86_bare.c
tests_diff_integer_LDFLAGS = -static
check_PROGRAMS += tests/diff/system
tests_diff_system_LDFLAGS = -static
check_PROGRAMS += tests/diff/programs
tests_diff_programs_LDFLAGS = -static
check_PROGRAMS += tests/diff/diff
tests_diff_diff_SOURCES = tests/diff/backends.c tests/diff/native.c tests/diff/native.h
tests_diff_diff_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)
check_PROGRAMS += tests/diff/opcodes
tests_diff_opcodes_SOURCES = tests/diff/opcodes.c tests/diff/native.c tests/diff/native.h
tests_diff_opcodes_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)

# Longer: make diff CASES=1000000 SEED=7
CASES = 200000
SEED = 1
diff: tests/diff/diff
	CASES=$(CASES) SEED=$(SEED) tests/diff/diff
.PHONY: diff
check_PROGRAMS += tests/diff/paging
