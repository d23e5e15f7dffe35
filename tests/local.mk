# tests: `make check` runs tests/run-all, whose last line is "N passed, N failed, N skipped". Test programs link the
# library statically (PROG_LDFLAGS = -static), so they reach hidden symbols too.
EXTRA_DIST += tests/run-all
check-local: $(check_PROGRAMS) $(noinst_PROGRAMS)
	@top_srcdir='$(top_srcdir)' top_builddir='$(top_builddir)' sh $(srcdir)/tests/run-all
