# tests/diff
check_PROGRAMS += tests/diff/simd
tests_diff_simd_SOURCES = tests/diff/simd.c
tests_diff_simd_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)
tests_diff_simd_LDFLAGS = -static
