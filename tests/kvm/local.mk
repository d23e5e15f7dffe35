# tests/kvm: the KVM backend, beyond the tests by table that every backend runs.
if BUILD_KVM
check_PROGRAMS += tests/kvm/kvm tests/kvm/moves
EXTRA_PROGRAMS += tests/kvm/kvm_boot
tests_kvm_kvm_LDFLAGS = -static
tests_kvm_kvm_boot_SOURCES = tests/kvm/boot.c

# Whole kernels, moved between backends while they boot, and on KVM alone. Seconds on hardware; where guest ring 0 is emulated
# the kernel's own decompressor takes minutes: by hand only.
check-kvm-boot: tests/kvm/kvm_boot
	VM_KVM_BOOT=1 TEST_TIMEOUT=7200 tests/kvm/kvm_boot
endif
.PHONY: check-kvm-boot
