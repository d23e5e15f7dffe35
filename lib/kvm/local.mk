# lib/kvm: the KVM backend. Add sources and the feature define inside the conditional.
if BUILD_KVM
# LIBVM_FEATURES += -DVM_HAVE_KVM=1
# libvm_la_SOURCES += lib/kvm/kvm.c
endif
