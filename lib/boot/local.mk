# lib/boot: loaders.
noinst_HEADERS += lib/boot/boot.h
libvm_la_SOURCES += \
	lib/boot/bios.c \
	lib/boot/boot.c \
	lib/boot/elf.c \
	lib/boot/entry.c \
	lib/boot/image.c \
	lib/boot/linux.c \
	lib/boot/multiboot.c \
	lib/boot/place.c \
	lib/boot/rom.S \
	lib/boot/services.S
