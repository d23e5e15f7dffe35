# tests/api: the public interface, used and misused.
check_PROGRAMS += tests/api/api_machine tests/api/api_memory tests/api/api_run
tests_api_api_machine_SOURCES = tests/api/machine.c
tests_api_api_machine_LDADD = $(TEST_LIBS)
tests_api_api_memory_SOURCES = tests/api/memory.c
tests_api_api_memory_LDADD = $(TEST_LIBS)
tests_api_api_run_SOURCES = tests/api/run.c
tests_api_api_run_LDADD = $(TEST_LIBS)
script_tests += tests/api/headers tests/api/symbols
EXTRA_DIST += tests/api/headers tests/api/symbols
check_PROGRAMS += tests/api/api_smp
tests_api_api_smp_SOURCES = tests/api/smp.c
tests_api_api_smp_LDADD = $(TEST_LIBS)
check_PROGRAMS += tests/api/api_callbacks
tests_api_api_callbacks_SOURCES = tests/api/callbacks.c
tests_api_api_callbacks_LDADD = $(TEST_LIBS)
