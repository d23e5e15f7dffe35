# bench: `make bench`. Ratios against peers measured in the same run, and JSON beside the build; never part of `make check`.
EXTRA_DIST += bench/boot
bench: examples/vmrun
	VMRUN=examples/vmrun $(srcdir)/bench/boot
.PHONY: bench
