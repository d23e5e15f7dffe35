# lib/kvm: the KVM backend.
if BUILD_KVM
LIBVM_FEATURES += -DVM_HAVE_KVM=1
libvm_la_SOURCES += \
	lib/kvm/kvm.h \
	lib/kvm/kvm_cpuid.c \
	lib/kvm/kvm_dirty.c \
	lib/kvm/kvm_enter.c \
	lib/kvm/kvm_events.c \
	lib/kvm/kvm_exit.c \
	lib/kvm/kvm_limits.c \
	lib/kvm/kvm_machine.c \
	lib/kvm/kvm_run.c \
	lib/kvm/kvm_state.c \
	lib/kvm/select.h
endif
