# examples: programs that use the public interface only.
noinst_PROGRAMS += examples/hello
bin_PROGRAMS = examples/vmrun
examples_hello_SOURCES = examples/hello.c
examples_hello_LDADD = libvm.la
examples_vmrun_SOURCES = examples/vmrun.c
examples_vmrun_LDADD = libvm.la -lpthread
