"""pytest_plugin.py - fixtures for pytest: the package's entry point `libvm` loads it.

    def test_uname(libvm_linux):
        with libvm_linux(memory="128M") as vm:
            vm.wait_for("# ")
            assert "Linux" in vm.shell("uname -a")

Kernel and initial RAM disk come from the options --libvm-kernel and --libvm-initrd, or the environment's LIBVM_KERNEL and
LIBVM_INITRD; without them tests that use the fixture are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Callable

import pytest

import libvm


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("libvm")
    group.addoption("--libvm-kernel", default=os.environ.get("LIBVM_KERNEL"), help="kernel of the guests of libvm_linux")
    group.addoption("--libvm-initrd", default=os.environ.get("LIBVM_INITRD"), help="their initial RAM disk")
    group.addoption("--libvm-backend", default=os.environ.get("LIBVM_BACKEND", "auto"), help="their backend")


@pytest.fixture
def libvm_machine() -> Iterator[Callable[..., libvm.Machine]]:
    """Makes machines that are closed when the test ends: libvm_machine(backend="interp")."""
    made: list[libvm.Machine] = []

    def make(**options: Any) -> libvm.Machine:
        made.append(libvm.Machine(**options))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def libvm_linux(request: pytest.FixtureRequest) -> Iterator[Callable[..., libvm.Guest]]:
    """Makes running Linux guests that end with the test: libvm_linux(cmdline=..., memory=...)."""
    kernel = request.config.getoption("--libvm-kernel")
    initrd = request.config.getoption("--libvm-initrd")
    made: list[libvm.Guest] = []
    if not kernel:
        pytest.skip("no kernel: --libvm-kernel or LIBVM_KERNEL")

    def make(**options: Any) -> libvm.Guest:
        options.setdefault("backend", request.config.getoption("--libvm-backend"))
        made.append(libvm.linux(options.pop("kernel", kernel), options.pop("initrd", initrd), **options))
        return made[-1]

    yield make
    for guest in made:
        guest.close()
