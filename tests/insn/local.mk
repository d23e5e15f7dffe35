# tests/insn: instruction cases by table, and scenes that need more than a table.
check_PROGRAMS += tests/insn/insn
tests_insn_insn_SOURCES = tests/insn/insn.c tests/insn/world.c tests/insn/world.h tests/insn/world.def tests/insn/cases.h \
  tests/insn/cases.S
EXTRA_DIST += tests/insn/every.inc tests/insn/legacy.inc tests/insn/bits16.inc tests/insn/bits32.inc tests/insn/bits64.inc
tests/insn/cases.$(OBJEXT): tests/insn/every.inc tests/insn/legacy.inc tests/insn/bits16.inc tests/insn/bits32.inc \
  tests/insn/bits64.inc tests/insn/cases.h tests/insn/world.def
# 80286 captures (MIT licence, see vectors286.c).
check_PROGRAMS += tests/insn/vectors286
tests_insn_vectors286_CPPFLAGS = $(AM_CPPFLAGS) -DVECTORS_SRCDIR='"$(top_srcdir)"'
EXTRA_DIST += tests/insn/real_mode_286.ndjson.gz tests/insn/real_mode_286.opcodes.json
check_PROGRAMS += tests/insn/scenes
tests_insn_scenes_SOURCES = tests/insn/scenes.c tests/insn/world.c tests/insn/world.h tests/insn/world.def
check_PROGRAMS += tests/insn/models
# The same cases under hooks, single steps and random budgets.
check_PROGRAMS += tests/insn/insn_hooked
tests_insn_insn_hooked_SOURCES = $(tests_insn_insn_SOURCES) tests/insn/hooked.inc tests/insn/warm.inc
tests_insn_insn_hooked_CPPFLAGS = $(AM_CPPFLAGS) -DINSN_HOOKED
# And with snapshots taken and restored on the way.
check_PROGRAMS += tests/insn/insn_snapshots
tests_insn_insn_snapshots_SOURCES = $(tests_insn_insn_SOURCES) tests/insn/snapshots.inc tests/insn/warm.inc
tests_insn_insn_snapshots_CPPFLAGS = $(AM_CPPFLAGS) -DINSN_SNAPSHOTS

# The instruction tests and the real guests under every MMU strategy: make check-mmu.
check-mmu: tests/insn/insn tests/diff/paging examples/vmrun
	for s in shadow ept flat; do echo "$$s:"; export TEST_MMU=$$s; tests/insn/insn | grep -v ^ok; $(srcdir)/tests/guests/linux_jit; done
	tests/diff/paging
.PHONY: check-mmu
