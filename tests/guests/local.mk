# tests/guests: real guests and hand-written ones, by vmrun; fetch gets the real ones from Debian.
EXTRA_DIST += tests/guests/fetch tests/guests/init tests/guests/linux.sh tests/guests/small.S tests/guests/small.c tests/guests/small.ld
guest_tests = tests/guests/cli tests/guests/small tests/guests/linux_interp tests/guests/linux_jit tests/guests/linux_kvm
EXTRA_DIST += $(guest_tests)
script_tests += $(guest_tests)
EXTRA_DIST += tests/guests/console tests/guests/gdb tests/guests/gdb_guest.c
script_tests += tests/guests/gdb
if HAVE_PYTHON3
script_tests += tests/guests/console
endif
check_PROGRAMS += tests/guests/strategies
