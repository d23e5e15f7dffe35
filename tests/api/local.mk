# tests/api: the public interface, used and misused.
check_PROGRAMS += tests/api/api_machine tests/api/api_memory tests/api/api_run
tests_api_api_machine_SOURCES = tests/api/machine.c
tests_api_api_memory_SOURCES = tests/api/memory.c
tests_api_api_run_SOURCES = tests/api/run.c
script_tests += tests/api/headers tests/api/symbols
EXTRA_DIST += tests/api/headers tests/api/symbols
check_PROGRAMS += tests/api/api_smp
tests_api_api_smp_SOURCES = tests/api/smp.c
check_PROGRAMS += tests/api/api_storm
tests_api_api_storm_SOURCES = tests/api/storm.c
check_PROGRAMS += tests/api/api_callbacks
tests_api_api_callbacks_SOURCES = tests/api/callbacks.c
check_PROGRAMS += tests/api/api_nomem
tests_api_api_nomem_SOURCES = tests/api/nomem.c
check_PROGRAMS += tests/api/api_mmu
tests_api_api_mmu_SOURCES = tests/api/mmu.c
check_PROGRAMS += tests/api/api_pc
tests_api_api_pc_SOURCES = tests/api/pc.c
check_PROGRAMS += tests/api/api_hostile
tests_api_api_hostile_SOURCES = tests/api/hostile.c
check_PROGRAMS += tests/api/api_determinism
tests_api_api_determinism_SOURCES = tests/api/determinism.c
check_PROGRAMS += tests/api/api_doorbell
tests_api_api_doorbell_SOURCES = tests/api/doorbell.c
check_PROGRAMS += tests/api/api_ept
tests_api_api_ept_SOURCES = tests/api/ept.c
check_PROGRAMS += tests/api/api_hooks
tests_api_api_hooks_SOURCES = tests/api/hooks.c
check_PROGRAMS += tests/api/api_accesses
tests_api_api_accesses_SOURCES = tests/api/accesses.c tests/api/accesses.def
check_PROGRAMS += tests/api/api_coverage
tests_api_api_coverage_SOURCES = tests/api/coverage.c
check-local: bench/kernels.elf
check_PROGRAMS += tests/api/api_backing
tests_api_api_backing_SOURCES = tests/api/backing.c
check_PROGRAMS += tests/api/api_snapshot
tests_api_api_snapshot_SOURCES = tests/api/snapshot.c
check_PROGRAMS += tests/api/api_call
tests_api_api_call_SOURCES = tests/api/call.c
tests_api_api_call_LDADD = $(TEST_LIBS) -lm
EXTRA_DIST += tests/api/call_guest.c tests/api/call_guest.ld
GUEST_IMAGE = $(CC) -O1 -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables \
    -nostdlib -static -Wl,--build-id=none -Wl,-T,$(srcdir)/tests/api/call_guest.ld -Wl,--oformat=binary
tests/api/call.$(OBJEXT): tests/api/call_guest64.bin tests/api/call_guest32.bin
tests/api/call_guest64.bin: tests/api/call_guest.c tests/api/call_guest.ld
	$(AM_V_GEN)$(MKDIR_P) tests/api && $(GUEST_IMAGE) -m64 -o $@ $(srcdir)/tests/api/call_guest.c
tests/api/call_guest32.bin: tests/api/call_guest.c tests/api/call_guest.ld
	$(AM_V_GEN)$(MKDIR_P) tests/api && $(GUEST_IMAGE) -m32 -o $@ $(srcdir)/tests/api/call_guest.c
CLEANFILES += tests/api/call_guest64.bin tests/api/call_guest32.bin
check_PROGRAMS += tests/api/api_replay
tests_api_api_replay_SOURCES = tests/api/replay.c
EXTRA_DIST += tests/api/replay_guest.c
tests/api/replay.$(OBJEXT): tests/api/replay_guest.bin
tests/api/replay_guest.bin: tests/api/replay_guest.c tests/api/call_guest.ld
	$(AM_V_GEN)$(MKDIR_P) tests/api && $(GUEST_IMAGE) -m32 -o $@ $(srcdir)/tests/api/replay_guest.c
CLEANFILES += tests/api/replay_guest.bin
check_PROGRAMS += tests/api/api_snapshot_linux
tests_api_api_snapshot_linux_SOURCES = tests/api/snapshot_linux.c
check_PROGRAMS += tests/api/api_replay_linux
tests_api_api_replay_linux_SOURCES = tests/api/replay_linux.c
check_PROGRAMS += tests/api/api_sandbox
tests_api_api_sandbox_SOURCES = tests/api/sandbox.c
check_PROGRAMS += tests/api/api_hygiene
tests_api_api_hygiene_SOURCES = tests/api/hygiene.c
script_tests += tests/api/hardening tests/api/abi tests/api/inside
EXTRA_DIST += tests/api/hardening tests/api/abi tests/api/inside tests/api/inside.c
CLEANFILES += tests/api/inside.so
# A hundred thousand machines on each backend, minutes.
check-cycles: tests/api/api_hygiene
	LIBVM_CYCLES=100000 tests/api/api_hygiene -t 3600 'many*'
.PHONY: check-cycles
check_PROGRAMS += tests/api/api_gdb
tests_api_api_gdb_SOURCES = tests/api/gdb.c
script_tests += tests/api/strategies
EXTRA_DIST += tests/api/strategies
check_PROGRAMS += tests/api/api_latency
tests_api_api_latency_SOURCES = tests/api/latency.c
check_PROGRAMS += tests/api/api_process
tests_api_api_process_SOURCES = tests/api/process.c
