# tests/kvm: the KVM backend, beyond the tests by table that every backend runs.
if BUILD_KVM
check_PROGRAMS += tests/kvm/kvm
tests_kvm_kvm_SOURCES = tests/kvm/kvm.c
tests_kvm_kvm_LDADD = $(TEST_LIBS)
endif
