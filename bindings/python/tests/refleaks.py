"""refleaks - runs the tests that need no more than a machine again and again under a debug Python, and says which of them leave
references behind. `refleaks.py [WORD]...`: only tests with a word in their names."""

import gc
import importlib
import inspect
import os
import sys
import time
import warnings

os.environ.pop("LIBVM_TEST_LINES", None)
import pytest  # noqa: E402,F401

import conftest  # noqa: E402
import libvm  # noqa: E402

MODULES = ("test_hooks", "test_memory", "test_run", "test_machine", "test_more", "test_hostile", "test_life")
# They register strategies for good, start interpreters, or run for seconds.
LEFT_OUT = {"test_mmu_strategy", "test_wrong_arguments", "test_sandbox", "test_mypy", "test_stub_has_everything", "test_budget_across_slices",
            "test_until_across_slices", "test_interpreter_shutdown_with_live_machines", "test_os_fork", "test_ctrl_c", "test_ctrl_c_in_waits",
            "test_no_leaks_of_exceptions", "test_refleaks"}
WARM, MEASURED = 4, 4


def once(function, names, backend):
    if "machine" not in names:
        return function(**({"backend": backend} if "backend" in names else {}))
    with libvm.Machine(backend=backend) as m:
        m.map_ram(conftest.MAPPED, "64K")
        m.cpu.set_mode("flat64")
        m.cpu.rip, m.cpu.rsp = conftest.MAPPED, conftest.MAPPED + 0x10000
        function(m, **({"backend": backend} if "backend" in names else {}))


def total():
    for _ in range(3):
        gc.collect()
    return sys.gettotalrefcount()


def leaked(function, names, backend):
    """References left by each of the last runs, the least of them."""
    for _ in range(WARM):
        once(function, names, backend)
    least = None
    for _ in range(MEASURED):
        before = total()
        once(function, names, backend)
        growth = total() - before
        least = growth if least is None else min(least, growth)
    return least


def main():
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda unraisable: None
    count, bad, begin = 0, 0, time.monotonic()
    for module in map(importlib.import_module, MODULES):
        for name, function in vars(module).items():
            names = set(inspect.signature(function).parameters) if name.startswith("test_") else {"no"}
            if not names <= {"machine", "backend"} or name in LEFT_OUT or not any(word in name for word in sys.argv[1:] or [""]):
                continue
            count += 1
            growth = leaked(function, names, conftest.BACKENDS[0])
            if growth > 0:
                bad += 1
                print(f"{module.__name__}.{name}: {growth} references a run")
    print(f"{count} tests, {bad} leak, {time.monotonic() - begin:.0f} s")
    return bad or not count


if __name__ == "__main__":
    sys.exit(main())
