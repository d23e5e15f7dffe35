"""Lines for `make check` (ok, FAIL, skip), and what the tests share."""

import os
import re
import sys

import pytest

import libvm

BACKENDS = [b for b in ("interp", "jit", "kvm") if libvm.query(b, "available")]
MAPPED = 0x1000


def pytest_addoption(parser):
    if os.environ.get("LIBVM_TEST_LINES"):      # the terminal's plugin, which is off then, would have it
        parser.addoption("--verbose", type=int, default=0)


def pytest_runtest_logreport(report):
    if not os.environ.get("LIBVM_TEST_LINES"):
        return
    name = "python_" + re.sub(r"[^\w.-]+", "_", report.nodeid.split("tests/")[-1].removeprefix("test_").replace(".py::", "_")).rstrip("_")
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        print(f"skip {name}: {reason.removeprefix('Skipped: ')}", flush=True)
    elif report.failed:
        print(report.longreprtext, *(text for _, text in report.sections), sep="\n", flush=True)
        last = report.longreprtext.strip().splitlines()[-1] if report.longreprtext else ""
        print(f"FAIL {name}: {report.when}: {last}", flush=True)
    elif report.when == "call":
        print(f"ok {name}", flush=True)


def pytest_collectreport(report):
    if report.failed and os.environ.get("LIBVM_TEST_LINES"):
        print(report.longreprtext, f"FAIL python_collect: {report.nodeid}", sep="\n", flush=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "software(reason): for the software backends, with what KVM lacks")


software = pytest.mark.software


@pytest.fixture(params=BACKENDS)
def backend(request):
    mark = request.node.get_closest_marker("software")
    if mark and request.param == "kvm":
        pytest.skip(mark.args[0])
    return request.param


@pytest.fixture
def machine(backend):
    """A flat 64-bit machine with 64 KiB at 0x1000, RIP there, RSP at the end."""
    with libvm.Machine(backend=backend) as m:
        m.map_ram(MAPPED, "64K")
        m.cpu.set_mode("flat64")
        m.cpu.rip = MAPPED
        m.cpu.rsp = MAPPED + 0x10000
        yield m


def load(m, code, at=MAPPED):
    code = bytes.fromhex(code) if isinstance(code, str) else code
    m.write(at, code)
    m.cpu.rip = at
    return m.cpu


@pytest.fixture
def guests():
    """Kernel and initial RAM disk of the guests that tests/guests/fetch fetches, or the test is skipped."""
    where = os.environ.get("LIBVM_GUESTS", os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "libvm", "guests"))
    kernel, initrd = os.path.join(where, "vmlinuz-amd64"), os.path.join(where, "initramfs-amd64")
    if not os.path.exists(kernel) or not os.path.exists(initrd):
        pytest.skip("no guests (tests/guests/fetch)")
    return kernel, initrd


def run_python(code, **options):
    """Runs code in an interpreter of its own: (status, output)."""
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=options.pop("timeout", 60), **options)
    return done.returncode, done.stdout + done.stderr
