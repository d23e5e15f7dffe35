# tests/unit: tests of single modules, which may include private headers. A program a module, tests/unit/foo.c; those that reach
# hidden symbols link the library statically.
AM_CPPFLAGS += -I$(top_srcdir)/tests
check_PROGRAMS += tests/unit/harness tests/unit/reencode tests/unit/forms tests/unit/dev_irq tests/unit/dev_time tests/unit/dev_io tests/unit/dev_pc \
  tests/unit/fpu tests/unit/sys_protect tests/unit/sys_task tests/unit/sys_paging tests/unit/sys_state tests/unit/interpreter
noinst_HEADERS += tests/unit/rig.h tests/unit/sysbare.h tests/unit/x86_bare.h
tests_unit_fpu_SOURCES = tests/unit/fpu.c tests/unit/x86_bare.c
tests_unit_interpreter_SOURCES = tests/unit/interpreter.c tests/unit/x86_bare.c
tests_unit_reencode_LDFLAGS = -static
tests_unit_forms_LDFLAGS = -static
tests_unit_dev_irq_LDFLAGS = -static
tests_unit_dev_time_LDFLAGS = -static
tests_unit_dev_io_LDFLAGS = -static
tests_unit_dev_pc_LDFLAGS = -static
tests_unit_fpu_LDFLAGS = -static
tests_unit_sys_protect_LDFLAGS = -static
tests_unit_sys_task_LDFLAGS = -static
tests_unit_sys_paging_LDFLAGS = -static
tests_unit_sys_state_LDFLAGS = -static
tests_unit_interpreter_LDFLAGS = -static
