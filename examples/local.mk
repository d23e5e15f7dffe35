# examples: programs that use the public interface only.
noinst_PROGRAMS += examples/hello
bin_PROGRAMS = examples/vmrun
examples_hello_SOURCES = examples/hello.c
examples_hello_LDADD = libvm.la
examples_vmrun_SOURCES = examples/vmrun.c
examples_vmrun_LDADD = libvm.la -lpthread

# Fuzzing: fuzz_target is the program fuzzed, for no operating system; see examples/target.h.
noinst_PROGRAMS += examples/fuzz_afl
examples_fuzz_afl_SOURCES = examples/fuzz_afl.c examples/target.c examples/target.h
examples_fuzz_afl_LDADD = libvm.la
# afl-fuzz looks into the binary: no libtool script in its place.
examples_fuzz_afl_LDFLAGS = $(AM_LDFLAGS) -static
EXTRA_DIST += examples/fuzz_target.c examples/fuzz_target.ld
all-local: examples/fuzz_target.elf
CLEANFILES += examples/fuzz_target.elf
examples/fuzz_target.elf: examples/fuzz_target.c examples/fuzz_target.ld
	@$(MKDIR_P) examples
	$(AM_V_CC)$(CC) -O1 -g -std=gnu11 -Wall -Wextra -ffreestanding -fno-pic -fno-pie -no-pie -fno-stack-protector -fcf-protection=none \
	  -mno-red-zone -nostdlib -static -Wl,--build-id=none -Wl,-e,fuzz_target -Wl,-T,$(srcdir)/examples/fuzz_target.ld -o $@ $(srcdir)/examples/fuzz_target.c
