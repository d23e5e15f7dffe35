# lib/dev: devices.
noinst_HEADERS += lib/dev/dev.h
libvm_la_SOURCES += \
	lib/dev/acpi.c \
	lib/dev/common.c \
	lib/dev/fwcfg.c \
	lib/dev/hpet.c \
	lib/dev/i8042.c \
	lib/dev/ioapic.c \
	lib/dev/lapic.c \
	lib/dev/misc.c \
	lib/dev/pci.c \
	lib/dev/pic8259.c \
	lib/dev/pit8254.c \
	lib/dev/rtc.c \
	lib/dev/smbus.c \
	lib/dev/uart16550.c
