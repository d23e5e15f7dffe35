# tests/unit: tests of single modules, which may include private headers. One program a module:
#     check_PROGRAMS += tests/unit/foo
#     tests_unit_foo_SOURCES = tests/unit/foo.c
#     tests_unit_foo_LDADD = $(TEST_LIBS)
#     tests_unit_foo_LDFLAGS = -static
AM_CPPFLAGS += -I$(top_srcdir)/tests
check_PROGRAMS += tests/unit/harness
tests_unit_harness_SOURCES = tests/unit/harness.c
tests_unit_harness_LDADD = $(TEST_LIBS)
check_PROGRAMS += tests/unit/reencode
tests_unit_reencode_SOURCES = tests/unit/reencode.c
tests_unit_reencode_LDADD = $(TEST_LIBS) $(ZYDIS_LIBS)
tests_unit_reencode_LDFLAGS = -static
