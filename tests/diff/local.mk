# tests/diff
check_PROGRAMS += tests/diff/simd
tests_diff_simd_SOURCES = tests/diff/simd.c
tests_diff_simd_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)
tests_diff_simd_LDFLAGS = -static
check_PROGRAMS += tests/diff/integer
tests_diff_integer_SOURCES = tests/diff/integer.c tests/unit/x86_bare.c tests/unit/x86_bare.h
tests_diff_integer_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)
tests_diff_integer_LDFLAGS = -static
check_PROGRAMS += tests/diff/system
tests_diff_system_SOURCES = tests/diff/system.c
tests_diff_system_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)
tests_diff_system_LDFLAGS = -static
