# lib/platform: the PC.
noinst_HEADERS += lib/platform/aml.h lib/platform/pc.h lib/platform/tables.h
libvm_la_SOURCES += \
	lib/platform/aml.c \
	lib/platform/pc.c \
	lib/platform/smbios.c \
	lib/platform/tables.c
