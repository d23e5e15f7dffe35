"""What must not leak, hang or crash: cycles, fork(), the interpreter's end, threads; guests; types; examples."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

import libvm
from conftest import MAPPED, load, run_python, software

TOP = os.environ.get("top_srcdir", os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))


def cycle(backend):
    class Device:
        def read(self, cpu, offset, width):
            return 1

    with libvm.Machine(backend=backend) as m:
        m.map_ram(0x1000, 4096)
        m.map_pio(0x60, 1, Device())
        m.cpu.set_mode("flat64")
        seen = []
        if backend != "kvm":
            m.hook_add(libvm.HookKind.BLOCK, lambda cpu, event: seen.append(event.address))
            m.coverage(256)
            m.cpu.block_trace(16)
        assert load(m, "e460 f4").run().reason == libvm.ExitReason.HALT
        with m.snapshot() as snapshot:
            snapshot.restore()
        assert seen or backend == "kvm"


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def objects():
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("count", [int(os.environ.get("LIBVM_LEAK_CYCLES", "600"))])
def test_no_leaks(backend, count):
    for _ in range(count // 3):
        cycle(backend)
    before, memory = objects(), resident()
    for _ in range(count):
        cycle(backend)
    assert objects() - before < 20
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        assert resident() - memory < 4 << 20


@software("backend kvm serves no hooks")
def test_no_leaks_of_exceptions(machine):
    machine.hook_add(libvm.HookKind.BLOCK, lambda cpu, event: 1 / 0)
    cpu = load(machine, "f4f4")

    def fail():
        cpu.rip = MAPPED + 1 if cpu.rip == MAPPED else MAPPED       # at the same place the run would go on
        with pytest.raises(ZeroDivisionError):
            cpu.run()

    for _ in range(50):
        fail()
    before = objects()
    for _ in range(500):
        fail()
    assert objects() - before < 20


FORK = """
import libvm, os, sys
m = libvm.Machine(backend={backend!r})
m.map_ram(0x1000, 4096)
m.write(0x1000, b"\\xf4")
cpu = m.cpu
cpu.set_mode("flat64")
cpu.rip = 0x1000
pid = os.fork()
if pid == 0:
    for touch in (lambda: cpu.run(), lambda: m.read(0x1000, 1), lambda: cpu.rax, lambda: m.map_ram(0, 4096), lambda: m.snapshot()):
        try:
            touch()
            os._exit(1)
        except libvm.ClosedError as error:
            assert "fork" in str(error)
    assert m.closed
    m.close()
    with libvm.Machine(backend={backend!r}) as own:        # the child may have its own
        own.map_ram(0x1000, 4096)
        own.write(0x1000, b"\\xf4")
        own.cpu.set_mode("flat64")
        own.cpu.rip = 0x1000
        assert own.cpu.run().reason == libvm.ExitReason.HALT
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
print(cpu.run().reason.name)
"""


def test_os_fork(backend):
    assert run_python(FORK.format(backend=backend)) == (0, "HALT\n")


SHUTDOWN = """
import libvm, threading, time
m = libvm.Machine(backend={backend!r}, vcpus=2)
m.map_ram(0x1000, 4096)
m.write(0x1000, b"\\xeb\\xfe")
if {backend!r} != "kvm":
    m.hook_add(libvm.HookKind.INTERRUPT, lambda cpu, event: None)
class Device:
    def __init__(self):
        self.machine = m
    def destroy(self):
        print("destroyed")
m.map_pio(0x60, 1, Device())
def work(cpu):
    cpu.set_mode("flat64")
    cpu.rip = 0x1000
    try:
        cpu.run()
    except libvm.ClosedError:
        pass
for cpu in m.vcpus:
    threading.Thread(target=work, args=(cpu,), daemon=True).start()
while m.calls < 2:
    time.sleep(0.001)
keep = libvm.Machine(backend={backend!r})
view = keep.map_ram(0, 4096).view()
print("end")
"""


def test_interpreter_shutdown_with_live_machines(backend):
    # What daemon threads still have to say while the interpreter goes is none of the machine's business.
    status, text = run_python(SHUTDOWN.format(backend=backend))
    assert status == 0 and text.startswith("end\ndestroyed\n")


def test_threads(backend):
    errors = []

    def work(number):
        try:
            for _ in range(20):
                with libvm.Machine(backend=backend) as m:
                    m.map_ram(0x1000, 4096)
                    m.cpu.set_mode("flat64")
                    if backend != "kvm":
                        m.hook_add(libvm.HookKind.BLOCK, lambda cpu, event: None)
                    cpu = load(m, "b9e8030000 01c8 ffc9 75fa f4")
                    assert cpu.run().reason == libvm.ExitReason.HALT
                    assert cpu.rax == 500500
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_the_gil_is_free_while_a_guest_runs(machine):
    cpu = load(machine, "ebfe")
    counted = 0
    thread = threading.Thread(target=cpu.run)
    thread.start()
    while machine.calls == 0:
        pass
    for _ in range(1000):
        counted += 1
    cpu.kick()
    thread.join()
    assert counted == 1000


@software("backend kvm serves no hooks")
def test_edits_while_a_callback_runs(machine):
    """A thread that edits the map waits for the vCPU, which wants the GIL for its callback: no deadlock."""
    machine.hook_add(libvm.HookKind.BLOCK, lambda cpu, event: None)
    cpu = load(machine, "ebfe")
    thread = threading.Thread(target=cpu.run)
    thread.start()
    while machine.calls == 0:
        time.sleep(0.001)
    for i in range(50):
        region = machine.map_ram(0x100000, 4096)
        machine.write(0x100000, b"x" * 100)
        region.unmap()
    cpu.kick()
    thread.join()


def test_linux(guests):
    kernel, initrd = guests
    if not libvm.query("jit", "available"):
        pytest.skip("a boot on the interpreter takes too long")
    backend = "jit"
    with libvm.linux(kernel, initrd, memory="256M", backend=backend) as vm:
        vm.wait_for("# ", 120)
        assert "Linux" in vm.shell("uname -a")
        assert vm.run("false")[0] == 1
        assert vm.shell("echo one; echo two") == "one\ntwo"
        assert vm.running and vm.exit is None
        with pytest.raises(TimeoutError):
            vm.wait(0.01)
        vm.send("poweroff -f\n")
        assert vm.wait(60).reason in (libvm.ExitReason.POWEROFF, libvm.ExitReason.GUEST_EXIT, libvm.ExitReason.HALT, libvm.ExitReason.RESET)
        with pytest.raises(TimeoutError) as caught:
            vm.wait_for("more", 20)
        assert "ended" in str(caught.value)


PLUGIN = """
def test_guest(libvm_linux):
    vm = libvm_linux(memory="256M")
    vm.wait_for("# ")
    assert "Linux" in vm.shell("uname -a")

def test_machine(libvm_machine):
    assert libvm_machine(backend="interp").time == 0
"""


def test_pytest_plugin(guests, tmp_path):
    (tmp_path / "test_it.py").write_text(PLUGIN)
    kernel, initrd = guests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "libvm.pytest_plugin", "-p", "no:cacheprovider", f"--libvm-kernel={kernel}",
               f"--libvm-initrd={initrd}", "--libvm-backend=jit", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "LIBVM_TEST_LINES"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def mypy(tmp_path, *command, **environment):
    """Of mypy's tools; the stub and the package are looked at where they are in the sources."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} (mypy)")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "LD_PRELOAD": "", **environment})
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy(tmp_path):
    package = os.path.join(TOP, "bindings", "python")
    mypy(tmp_path, "mypy", "--strict", os.path.join(package, "libvm"), os.path.join(package, "backend.py"))


def test_mypy_of_examples(tmp_path):
    examples = os.path.join(TOP, "examples", "python")
    mypy(tmp_path, "mypy", "--check-untyped-defs", *(os.path.join(examples, f"{name}.py") for name in EXAMPLES),
         MYPYPATH=os.path.join(TOP, "bindings", "python"))


def test_stub_is_the_module_s(tmp_path):
    """Names, arguments and defaults of the stub are those that the module has."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("a sanitizer has to be loaded first")
    mypy(tmp_path, "stubtest", "libvm._libvm")


def test_stub_has_everything():
    """What the module has is in its stub."""
    import ast

    with open(os.path.join(TOP, "bindings", "python", "libvm", "_libvm.pyi")) as file:
        tree = ast.parse(file.read())
    known = {node.name: {getattr(item, "name", None) or item.target.id for item in node.body if isinstance(item, (ast.FunctionDef, ast.AnnAssign))}
             for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    from libvm import _libvm

    for name, value in vars(_libvm).items():
        if isinstance(value, type) and not issubclass(value, BaseException):
            missing = {a for a in vars(value) if not a.startswith("__")} - known.get(name, set())
            assert not missing, (name, missing)
        elif callable(value) and not isinstance(value, type):
            assert name in functions, name


SANDBOX = """
import libvm
with libvm.Machine(backend="interp") as m:
    m.map_ram(0x1000, 4096)
    m.write(0x1000, bytes([0xF4]))
    m.cpu.set_mode("flat64")
    m.cpu.rip = 0x1000
    libvm.ExitReason.HALT
    try:
        libvm.sandbox_enter(libvm.SandboxFlags.ERRNO)
    except libvm.UnsupportedError:
        print("unsupported")
    else:
        try:
            open("/etc/passwd")
        except PermissionError:
            print("closed", m.cpu.run().reason.name)
"""


def test_sandbox():
    calls = libvm.sandbox_calls()
    assert "futex" in calls and len(calls) <= 50 and set(calls) < set(libvm.sandbox_calls(libvm.SandboxFlags.THREADS))
    with pytest.raises(libvm.InvalidError):
        libvm.sandbox_enter(1 << 20)
    if os.environ.get("LD_PRELOAD") or b"__gcov_root" in open(libvm._libvm.__file__, "rb").read():
        return                                      # a sanitizer, or coverage, needs more
    status, text = run_python(SANDBOX)
    assert status == 0 and text in ("closed HALT\n", "unsupported\n")


def expected():
    """What the examples print, in every language: {name: text}."""
    with open(os.path.join(TOP, "examples", "expected")) as file:
        sections = file.read().split("== ")[1:]
    return dict(section.split("\n", 1) for section in sections)


EXAMPLES = [*expected(), "boot_linux", "snapshot_fuzz"]


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example(name, request):
    arguments = list(request.getfixturevalue("guests")) if name == "boot_linux" else []
    path = os.path.join(TOP, "examples", "python", name + ".py")
    done = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if name in expected():
        assert done.stdout == expected()[name]
    else:
        assert ("Linux guest" if name == "boot_linux" else "crash with b'VM!'") in done.stdout
