# tests/insn: instruction cases by table, and scenes that need more than a table.
check_PROGRAMS += tests/insn/insn
tests_insn_insn_SOURCES = tests/insn/insn.c tests/insn/world.c tests/insn/world.h tests/insn/world.def tests/insn/cases.h \
  tests/insn/cases.S
tests_insn_insn_LDADD = $(TEST_LIBS)
EXTRA_DIST += tests/insn/every.inc tests/insn/legacy.inc tests/insn/bits16.inc tests/insn/bits32.inc tests/insn/bits64.inc
tests/insn/cases.$(OBJEXT): tests/insn/every.inc tests/insn/legacy.inc tests/insn/bits16.inc tests/insn/bits32.inc \
  tests/insn/bits64.inc tests/insn/cases.h tests/insn/world.def
