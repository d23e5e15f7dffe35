# tests: `make check` runs tests/run-all over every test program; its last line is "N passed, N failed, N skipped".
#
# A test program is a name in check_PROGRAMS, with its sources where they are not just NAME.c. Unless it says otherwise it is
# linked with $(TEST_LIBS): the harness (tests/test.h), whose main() it uses, and the library (statically with LDFLAGS = -static,
# so that hidden symbols can be reached too). Scripts that print the same lines go into script_tests.
EXTRA_DIST += tests/run-all tests/coverage tests/source tests/tiny tests/sanitized
check_LIBRARIES = tests/libtest.a
tests_libtest_a_SOURCES = tests/test.c tests/test.h tests/backends.h
TEST_LIBS = tests/libtest.a libvm.la
LDADD = $(TEST_LIBS)

include $(srcdir)/tests/unit/local.mk
include $(srcdir)/tests/insn/local.mk
include $(srcdir)/tests/api/local.mk
include $(srcdir)/tests/diff/local.mk
include $(srcdir)/tests/guests/local.mk
include $(srcdir)/tests/kvm/local.mk
include $(srcdir)/tests/fuzz/local.mk

check-local: $(check_PROGRAMS) $(check_LIBRARIES) $(noinst_PROGRAMS)
	@top_srcdir='$(abs_top_srcdir)' top_builddir='$(abs_top_builddir)' PYTHON='$(PYTHON)' with_python='$(have_python)' CC='$(CC)' CXX='$(CXX)' \
	  sh $(srcdir)/tests/run-all $(check_PROGRAMS) $(script_tests:%=$(srcdir)/%)
# What was installed, used as a user would.
EXTRA_DIST += tests/installed
installcheck-local:
	@libdir='$(libdir)' pyexecdir='$(pyexecdir)' luadir='$(luadir)' top_srcdir='$(abs_top_srcdir)' CC='$(CC)' PYTHON='$(PYTHON)' LUA='$(LUA)' \
	  with_python='$(have_python)' with_lua='$(have_lua)' sh $(srcdir)/tests/installed
coverage:
	-TEST_PATIENCE=$${TEST_PATIENCE:-8} $(MAKE) check
	sh $(srcdir)/tests/coverage
.PHONY: coverage
# The suite with the smallest limits: builds of its own, minutes. TINY="blocks tlb cache" by default.
check-tiny:
	@MAKE='$(MAKE)' sh $(srcdir)/tests/tiny $(abs_top_srcdir) $(TINY)
.PHONY: check-tiny
# Under sanitizers, in builds of their own: minutes, with guests an hour.
check-asan check-tsan:
	@MAKE='$(MAKE)' sh $(srcdir)/tests/sanitized $(@:check-%=%) $(abs_top_srcdir)
.PHONY: check-asan check-tsan
clean-local:
	rm -rf tests/logs source
.PHONY: clean-local
