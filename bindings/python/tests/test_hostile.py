"""Wrong arguments of everything there is, in the order of a seed. TEST_SEED and TEST_COUNT: others, and how many calls."""

import gc
import io
import math
import os
import random
import signal
import tempfile
import threading
import time

import pytest

import libvm
from conftest import MAPPED, load, run_python, software

LOOP = "b90a000000 ffc9 75fc f4"                # mov ecx, 10; again: dec ecx; jnz again; hlt
# What would wait, go for good, or end the process.
LEFT_OUT = {"serve", "wait_for", "readline", "sandbox_enter", "_set_classes", "_forked", "_end", "__init_subclass__", "__new__", "__init__",
            "__class__", "__subclasshook__", "__del__", "__reduce__", "__reduce_ex__", "__getstate__", "__dir__", "__sizeof__", "__getattribute__",
            "__setattr__", "__delattr__", "__dict__", "__weakref__", "__module__", "__doc__", "__slots__", "close",
            "_cpu"}                             # with anything else there, their repr, which messages quote, fails
EXPECTED = (libvm.Error, TypeError, ValueError, OverflowError, LookupError, AttributeError, BufferError, MemoryError, OSError, TimeoutError,
            ZeroDivisionError, RuntimeError)


class Evil:
    """Whatever it is asked for, it closes the machine first."""

    def __init__(self, machine):
        self.machine = machine

    def strike(self, *args):
        try:
            self.machine.close()
        except (libvm.Error, BufferError):
            pass
        return 1

    __index__ = __len__ = fileno = strike

    def __float__(self):
        return float(self.strike())

    def __bool__(self):
        return bool(self.strike())

    def __fspath__(self):
        self.strike()
        return "/nonexistent/file"

    def keys(self):
        self.strike()
        return ["rax"]

    def __getitem__(self, key):
        self.strike()
        if isinstance(key, int) and key > 3:
            raise IndexError
        return 1

    def __iter__(self):
        self.strike()
        return iter([1])

    def __call__(self, *args, **kwargs):
        self.strike()

    @property
    def read(self):
        self.strike()
        return lambda *args: 1


def objects(backend):
    m = libvm.Machine(backend=backend)
    m.map_ram(MAPPED, "64K")
    m.cpu.set_mode("flat64")
    cpu = load(m, LOOP)
    everything = {"machine": m, "cpu": cpu, "region": m.map_ram(0x40000, "16K"), "hook": m.hook_add(libvm.HookKind.BLOCK, lambda c, e: None),
                  "mmio": m.map_mmio(0x80000, 4096, type("D", (), {"read": lambda self, c, o, w: 1})()), "xmm": cpu.xmm, "regs": cpu.regs,
                  "binding": m.bind_function(0x9000, "u64(u64)", lambda x: x), "snapshot": m.snapshot(), "ring": cpu.block_trace(16),
                  "log": cpu.compare_log(16), "gdb": m.gdbstub("127.0.0.1:0"), "closure": cpu.function(MAPPED, "u64(u64)"), "module": libvm._libvm}
    events = []
    hook = m.hook_add(libvm.HookKind.INSN, lambda c, e: events.append(e))
    everything["exit"] = cpu.run()
    hook.remove()
    everything["event"] = events[0]
    blocks = [0]

    def guard(cpu, event):                      # no run is for ever
        blocks[0] += 1
        return libvm.STOP if blocks[0] % 200 == 0 else None

    m.hook_add(libvm.HookKind.BLOCK, guard)
    everything["cpu"].rip = MAPPED
    return everything


def values(everything, gone, scratch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("on purpose")

    plain = [None, True, False, -1, 0, 1, 7, 16, 4096, 0x1000, 0x40000, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63),
             1 << 200, 1.5, math.nan, math.inf, -math.inf, "", "x", "rwx", "jit", "pc", "64K", "block", "u64(u64)", "rax", "flat64", "tlb",
             "/nonexistent/file", "a\0b", "\ud800", "long" * 2000, b"", b"bytes", bytearray(16), memoryview(bytearray(4096)), [], [1, 2], (1,), {},
             {"rax": 1}, {"rax": -1}, {"ymm": [1]}, {"cs": {"base": -1}}, slice(0x1000, 0x1010), slice(None), object(), print, fail, lambda *a: None,
             lambda *a: "nonsense", lambda *a: -1, lambda *a: 1 << 70, type("C", (), {}), io.BytesIO(), scratch, gone, gone.closed,
             Evil(everything["machine"])]
    return plain + [libvm.HookKind.BLOCK, libvm.Prot.RWX, libvm.Reg.YMM1] + list(everything.values())


WORDS = ["fn", "begin", "end", "flags", "kind", "prot", "size", "gpa", "device", "private", "offset", "timeout", "max_instructions", "until", "rax",
         "single_step", "signal_blocked", "brief", "exception_exits", "backend", "vcpus", "memory", "mmu", "cpu_model", "file", "signature", "on", "access", "kernel", "wings"]


NAMES = {}                                      # of a class's objects, or the module


def names_of(thing):
    key = thing if isinstance(thing, type(libvm)) else type(thing)
    if key not in NAMES:
        NAMES[key] = [n for n in dir(thing) if n not in LEFT_OUT]
    return NAMES[key]


def attack(chance, name, thing, pool):
    """One call, read, or assignment; what it raised."""
    what = chance.choice(names_of(thing))
    try:
        if chance.random() < 0.1:
            setattr(thing, what, chance.choice(pool)) if name != "module" else None
            return what, None
        target = getattr(thing, what)
        if not callable(target):
            return what, None
        args = [chance.choice(pool) for _ in range(chance.randrange(5))]
        kwargs = {chance.choice(WORDS): chance.choice(pool) for _ in range(chance.choice((0, 0, 0, 1, 2)))}
        if what in ("run", "call") or name == "closure":
            kwargs["timeout"] = 0.02
        if what == "write" and name == "console":
            return what, None
        target(*args, **kwargs)
    except EXPECTED as error:
        return what, error
    return what, None


@software("backend kvm serves no hooks")
@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments(backend, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                          # some of it is taken for the name of a file
    seed, count = int(os.environ.get("TEST_SEED", "1")), int(os.environ.get("TEST_COUNT", "6000"))
    chance = random.Random(seed)
    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    gone = libvm.Machine()
    gone.close()
    gc.freeze()                                          # collecting what pytest has would be most of the time
    with tempfile.TemporaryFile() as scratch:
        everything = objects(backend)
        pool, things = values(everything, gone, scratch), sorted(everything)
        for n in range(count):
            name = chance.choice(things)
            what, error = attack(chance, name, everything[name], pool)
            assert error is None or str(error) or isinstance(error, (MemoryError, AttributeError, KeyError, IndexError, StopIteration)), (seed, n, name, what, repr(error))
            if isinstance(error, libvm.Error) and not isinstance(error, libvm.CallError):
                assert error.status is not None, (seed, n, name, what)
            if everything["machine"].closed or n % 200 == 199:
                pool = None
                everything = {key: value for key, value in everything.items() if key == "machine"}
                gc.collect()
                try:
                    libvm.Machine.close(everything["machine"])
                except BufferError:
                    pass
                everything = objects(backend)
                pool = values(everything, gone, scratch)
        everything = pool = None
    gc.unfreeze()
    gc.collect()
    with libvm.Machine(backend=backend) as m:
        m.map_ram(MAPPED, "64K")
        m.cpu.set_mode("flat64")
        assert load(m, LOOP).run().reason == libvm.ExitReason.HALT


def test_arguments_that_close_the_machine(backend):
    """Conversions run code of the caller's; what they end is not touched afterwards."""
    for touch in (lambda m, e: setattr(m.cpu, "rax", e), lambda m, e: m.cpu.write_reg("rax", e), lambda m, e: m.cpu.xmm.__setitem__(0, e),
                  lambda m, e: m.cpu.set_regs(e), lambda m, e: m.cpu.set_regs(rax=e), lambda m, e: m.cpu.set_sregs(cr2=e),
                  lambda m, e: m.cpu.set_sregs(cs=e), lambda m, e: m.cpu.set_fpu(ymm=e), lambda m, e: m.cpu.run(until=e),
                  lambda m, e: m.cpu.run(exception_exits=e), lambda m, e: m.cpu.run(timeout=e), lambda m, e: m.cpu.run(single_step=e),
                  lambda m, e: m.map_ram(e, 4096), lambda m, e: m.map_mmio(0x80000, 4096, e), lambda m, e: m.read(e, 1),
                  lambda m, e: m.hook_add(libvm.HookKind.BLOCK, print, e), lambda m, e: m.record(e), lambda m, e: m.cpu.inject(e),
                  lambda m, e: m.load_raw(e, 0), lambda m, e: m.breakpoint(e), lambda m, e: m.coverage(e), lambda m, e: m.cpu.block_trace(e),
                  lambda m, e: m[e], lambda m, e: m.__setitem__(MAPPED, e), lambda m, e: m.cpu.call(e, "void()"),
                  lambda m, e: m.cpu.call(MAPPED, "void(u64)", e), lambda m, e: m.bind_function(e, "void()", print),
                  lambda m, e: m.share_pages([m, e]) if hasattr(m, "share_pages") else libvm.share_pages([m, e]),
                  lambda m, e: m.cpu.mmu_walk(e), lambda m, e: m.cpu.get_msr(e), lambda m, e: m.ioeventfd(e, 0x1000)):
        m = libvm.Machine(backend=backend)
        m.map_ram(MAPPED, "64K")
        m.cpu.set_mode("flat64")
        with pytest.raises(EXPECTED):
            load(m, LOOP)
            touch(m, Evil(m))
            m.cpu
        m.close()


def test_messages_name_the_value(machine):
    cpu = machine.cpu
    for call, expected in ((lambda: libvm.Machine(backend="quick"), "'quick'"), (lambda: libvm.Machine(memory="12Q"), "'12Q'"),
                           (lambda: machine.map_ram(0x20000, 4096, "rwz"), "'rwz'"), (lambda: machine.map_ram(0x20800, 4096), "0x20800"),
                           (lambda: machine.map_ram(0x20000, 4096, 9), "9"), (lambda: machine.read(0x900000, 4), "0x900000"),
                           (lambda: cpu.read_reg("eax"), "'eax'"), (lambda: cpu.set_regs(eax=1), "'eax'"), (lambda: cpu.set_mode("flat"), "'flat'"),
                           (lambda: setattr(cpu, "cs", 1 << 16), "65536"), (lambda: setattr(cpu, "rax", -5), "-5"),
                           (lambda: setattr(cpu, "rax", "text"), "str"), (lambda: cpu.run(timeout=-2.5), "-2.5"),
                           (lambda: cpu.run(exception_exits=[40]), "40"), (lambda: cpu.run(speed=1), "'speed'"),
                           (lambda: cpu.run(max_instructions=-7), "-7"), (lambda: machine.vcpu(9), "9"), (lambda: cpu.xmm[16], "16"),
                           (lambda: machine.hook_add(99, print), "99"), (lambda: machine.hook_add(libvm.HookKind.BLOCK, "f"), "'f'"),
                           (lambda: cpu.call(MAPPED, "u65()"), "u65"), (lambda: machine.mmu_select("flt"), "flt"),
                           (lambda: cpu.read(MAPPED, -3), "-3"), (lambda: machine.read(MAPPED, -3), "-3"), (lambda: machine.map_ram(-4096, 4096), "-4096"),
                           (lambda: cpu.xmm.__setitem__(0, b"short"), "5 bytes"), (lambda: machine.serial(9), "9"),
                           (lambda: machine.load_raw("/nonexistent/file", 0), "/nonexistent/file"), (lambda: cpu.get_msr(0x12345678), "0x12345678")):
        with pytest.raises(Exception) as caught:
            call()
        assert expected in str(caught.value), str(caught.value)


def test_signal_handlers_that_raise(machine):
    """An exception of a handler comes out of run(), of any class, and the machine goes on."""

    class Alarm(Exception):
        pass

    def ring(*args):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        cpu = load(machine, "ebfe")
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Alarm):
            cpu.run(timeout=30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert load(machine, "f4").run().reason == libvm.ExitReason.HALT


def test_ctrl_c_in_waits(backend):
    code = f"""
import libvm, os, signal, threading
with libvm.Machine(backend={backend!r}, platform="pc", memory="2M") as m:
    for wait in (lambda: m.console.wait_for("never", 30), lambda: m.console.readline(30)):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            wait()
        except KeyboardInterrupt:
            print("interrupted")
"""
    assert run_python(code) == (0, "interrupted\n" * 2)


def test_unmap_and_close_while_a_thread_runs(machine):
    """Regions come and go, views are made and dropped under a running guest."""
    cpu = load(machine, "8b042500000400 ebf7")  # mov eax, [0x40000]; jmp back
    stop, errors = [], []

    def work():
        while not stop:
            try:
                cpu.run(timeout=0.05)
            except libvm.ClosedError:
                return
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        region = machine.map_ram(0x40000, 4096)
        with region.view() as view:
            view[0] = 1
            with pytest.raises(BufferError):
                region.unmap()
        region.unmap()
    machine.close()
    stop.append(1)
    thread.join(20)
    assert not errors and not thread.is_alive()
