# bindings/python: the Python package `libvm`, installed where $(PYTHON) looks for modules. `pip install ./bindings/python` builds the
# same against an installed libvm. Everything is part of `make check` as one test program.
python_package = \
	bindings/python/libvm/__init__.py \
	bindings/python/libvm/constants.py \
	bindings/python/libvm/guest.py \
	bindings/python/libvm/pytest_plugin.py
python_typing = \
	bindings/python/libvm/_libvm.pyi \
	bindings/python/libvm/py.typed
python_sources = \
	bindings/python/src/boot.c \
	bindings/python/src/call.c \
	bindings/python/src/coverage.c \
	bindings/python/src/gdb.c \
	bindings/python/src/hook.c \
	bindings/python/src/machine.c \
	bindings/python/src/memory.c \
	bindings/python/src/mmu.c \
	bindings/python/src/module.c \
	bindings/python/src/pv.h \
	bindings/python/src/snapshot.c \
	bindings/python/src/vcpu.c
EXTRA_DIST += $(python_package) $(python_typing) $(python_sources) bindings/python/tests bindings/python/constants.py \
	bindings/python/pyproject.toml bindings/python/backend.py bindings/python/README.md bindings/parity examples/python
script_tests += bindings/python/tests/run bindings/parity/check

if WITH_PYTHON
pylibvmdir = $(pyexecdir)/libvm
pylibvm_LTLIBRARIES = bindings/python/_libvm.la
pylibvm_PYTHON = $(python_package)
pylibvm_DATA = $(python_typing)
bindings_python__libvm_la_SOURCES = $(python_sources)
bindings_python__libvm_la_CPPFLAGS = -I$(top_srcdir)/include $(PYTHON_CPPFLAGS)
bindings_python__libvm_la_CFLAGS = $(AM_CFLAGS) -Wno-cast-function-type -Wno-missing-declarations
bindings_python__libvm_la_LDFLAGS = $(AM_LDFLAGS) -module -avoid-version -shared -shrext .abi3.so
bindings_python__libvm_la_LIBADD = libvm.la

# What pip would write: the name, the version, and the plugin of pytest.
pydistdir = $(pyexecdir)/libvm-$(PACKAGE_VERSION).dist-info
pydist_DATA = bindings/python/METADATA bindings/python/entry_points.txt
CLEANFILES += $(pydist_DATA)
bindings/python/METADATA: Makefile
	@$(MKDIR_P) bindings/python
	@printf 'Metadata-Version: 2.1\nName: libvm\nVersion: %s\nSummary: x86 virtual machines inside a program\nRequires-Python: >=3.11\n' \
	  $(PACKAGE_VERSION) >$@
bindings/python/entry_points.txt: Makefile
	@$(MKDIR_P) bindings/python
	@printf '[pytest11]\nlibvm = libvm.pytest_plugin\n' >$@
endif

# References left behind by the tests, as a debug Python counts them: the module is built for it, in bindings/python/debug.
PYTHON_DEBUG = python3-dbg
check-refleaks: libvm.la
	$(MKDIR_P) bindings/python/debug/libvm
	cp $(srcdir)/bindings/python/libvm/*.py bindings/python/debug/libvm/
	here=`pwd` && cd $(srcdir)/bindings/python && \
	  PYTHONDONTWRITEBYTECODE=1 PKG_CONFIG=true CC='$(CC)' CFLAGS='-I$(abs_top_srcdir)/include' LDFLAGS="-L$$here/.libs -lvm" \
	  $(PYTHON_DEBUG) -c "import backend; backend._compile('$$here/bindings/python/debug/libvm/_libvm.abi3.so')"
	top_srcdir='$(abs_top_srcdir)' PYTHONPATH=bindings/python/debug:$(srcdir)/bindings/python/tests LD_LIBRARY_PATH=.libs \
	  PYTHONDONTWRITEBYTECODE=1 $(PYTHON_DEBUG) $(srcdir)/bindings/python/tests/refleaks.py
.PHONY: check-refleaks

clean-local: clean-python-package
clean-python-package:
	rm -rf bindings/python/package bindings/python/debug
.PHONY: clean-python-package

# What is written from the headers: Python's constants, the parity table (make check says when these are due), the references.
EXTRA_DIST += docs/generate-api docs/api-parity.md docs/c-api.md docs/python-api.md
docs:
	$(PYTHON) $(srcdir)/bindings/python/constants.py $(srcdir)/include/libvm $(srcdir)/bindings/python/libvm/constants.py
	$(PYTHON) $(srcdir)/bindings/parity/parity.py --write
	$(PYTHON) $(srcdir)/docs/generate-api
.PHONY: docs
