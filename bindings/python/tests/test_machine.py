"""Making machines, asking about them, ending them; constants; the module's functions."""

import gc
import threading
import weakref

import pytest

import libvm
from conftest import load


def test_functions():
    assert libvm.version() == libvm.__version__
    major, minor, patch = map(int, libvm.version().split("."))
    assert libvm.version_number() == major * 10000 + minor * 100 + patch
    assert libvm.strerror(libvm.Status.E_BUSY) == "busy: in use by another thread or call"
    assert libvm.exit_name(libvm.ExitReason.MMIO) == "mmio"
    assert libvm.backend_name("jit") == libvm.backend_name(libvm.Backend.JIT) == "jit"
    assert libvm.reg_size(libvm.Reg.YMM3) == 32 and libvm.reg_size(0) == 0
    assert libvm.reg_name(libvm.Reg.RSI) == "rsi" and libvm.reg_name(-5) is None
    assert libvm.reg_find("CR3") is libvm.Reg.CR3 and libvm.reg_find("nonsense") == libvm.Reg.NONE
    assert "fills" in libvm.stat_names()
    assert libvm.trace_parse("exit,mmio") == libvm.TraceCategory.EXIT | libvm.TraceCategory.MMIO
    assert libvm.query("interp", "available") == 1
    assert {"tlb", "flat"} <= set(libvm.mmu_names())
    assert libvm.signature_check("u64(ptr,u32)") == 2
    assert libvm.coverage_id(0x1000) != libvm.coverage_id(0x1001)
    with pytest.raises(libvm.InvalidError):
        libvm.trace_parse("nonsense")
    assert "nonsense" in libvm.errmsg()
    with pytest.raises(libvm.NotFoundError) as caught:
        libvm.query("interp", "wings")
    assert caught.value.status is libvm.Status.E_NOTFOUND and "wings" in str(caught.value)


def test_constants_follow_the_library():
    for reg in libvm.Reg:
        if reg:
            assert libvm.reg_name(reg) == reg.name.lower()
            assert hasattr(libvm.Vcpu, reg.name.lower())
    for reason in libvm.ExitReason:
        assert libvm.exit_name(reason).replace("-", "_").upper() == reason.name
    assert libvm.STOP is libvm.HookResult.STOP
    for name in libvm.__all__:
        assert getattr(libvm, name) is not None


def test_machine(backend):
    with libvm.Machine(backend=backend, vcpus=3) as m:
        assert m.backend == libvm.Backend[backend.upper()]
        assert len(m.vcpus) == 3 and m.vcpus[1] is m.vcpu(1) and m.cpu is m.vcpus[0]
        assert m.vcpus[2].index == 2 and m.vcpus[2].machine is m
        assert not m.closed and m.calls == 0 and m.mmu == "tlb" and m.time == 0
        with pytest.raises(IndexError):
            m.vcpu(3)
        assert backend in repr(m)
        m.reset()
        assert set(m.stats()) == set(libvm.stat_names()) and m.stats("regions") == 0
        m.map_ram(0, 4096)
        assert m.stats("regions") == 1
        with pytest.raises(libvm.NotFoundError):
            m.stats("nonsense")
    assert m.closed and "closed" in repr(m)
    m.close()


def test_select_backend():
    with libvm.Machine(backend="interp") as m:
        m.map_ram(0x1000, 4096)
        m.cpu.set_mode("flat64")
        cpu = load(m, "48ffc0 ebfb")
        cpu.run(max_instructions=10)
        m.select_backend("jit" if libvm.query("jit", "available") else "interp")
        cpu.run(max_instructions=10)
        assert cpu.rax == 10


def test_not_available():
    with pytest.raises(libvm.BackendUnavailable) as caught:
        libvm.Machine(mmu="nonsense")
    assert isinstance(caught.value, libvm.UnsupportedError) and caught.value.status == libvm.Status.E_UNSUPPORTED
    if not libvm.query("kvm", "available"):
        with pytest.raises(libvm.BackendUnavailable):
            libvm.Machine(backend="kvm")


@pytest.mark.parametrize("options", [{"vcpus": 1000}, {"platform": "pc"}, {"platform": "pc", "memory": 4097}, {"memory": "1M"},
                                     {"backend": 17}, {"platform": 9}])
def test_bad_options(options):
    with pytest.raises(libvm.Error):
        libvm.Machine(**options)


@pytest.mark.parametrize("options, error", [
    ({"vcpus": -1}, OverflowError), ({"vcpus": "2"}, TypeError), ({"vcpus": 1 << 40}, OverflowError), ({"memory": -1}, OverflowError),
    ({"memory": "12X"}, ValueError), ({"memory": "-1"}, ValueError), ({"memory": ""}, ValueError), ({"memory": 1.5}, TypeError),
    ({"memory": "99999999999999T"}, ValueError), ({"backend": "fast"}, ValueError), ({"backend": None}, TypeError),
    ({"mmu": 3}, TypeError), ({"mmu": "a\0b"}, ValueError), ({"wings": 2}, TypeError)])
def test_wrong_types(options, error):
    with pytest.raises(error):
        libvm.Machine(**options)


def test_closed_machine():
    m = libvm.Machine()
    region = m.map_ram(0, 4096)
    cpu, vcpus = m.cpu, m.vcpus
    hook = m.hook_add(libvm.HookKind.BLOCK, print)
    m.close()
    m.close()
    for touch in (lambda: cpu.rax, lambda: cpu.run(), lambda: m.read(0, 1), lambda: m.map_ram(0, 4096), lambda: m.cpu, lambda: m.reset(),
                  lambda: region.unmap(), lambda: region.view(), lambda: hook.remove(), lambda: cpu.kick(), lambda: m.stats(),
                  lambda: setattr(cpu, "rax", 1), lambda: m.snapshot(), lambda: m.fork(), lambda: m.__enter__(), lambda: m.backend,
                  lambda: m.time, lambda: cpu.get_regs(), lambda: cpu.xmm, lambda: m.console, lambda: m.breakpoint(0),
                  lambda: m.coverage(65536), lambda: m.serial_output(0, print), lambda: cpu.call(0, "void()"), lambda: cpu.retired,
                  lambda: m.hook_add(libvm.HookKind.BLOCK, print), lambda: cpu.block_trace(16), lambda: cpu.ept_current()):
        with pytest.raises((libvm.ClosedError, BufferError)):
            touch()
    assert m.closed and not hook.active and not region.mapped and cpu.index == 0 and vcpus[0] is cpu and cpu.machine is m


def test_objects_keep_the_machine():
    cpu = libvm.Machine().cpu
    cpu.set_mode("flat64")
    gc.collect()
    cpu.rax = 5
    assert cpu.rax == 5
    region = libvm.Machine().map_ram(0, 4096)
    gc.collect()
    assert bytes(region.view()[:4]) == b"\0\0\0\0"


def test_freed_when_dropped():
    m = libvm.Machine()
    seen = weakref.ref(m)
    m.hook_add(libvm.HookKind.BLOCK, lambda cpu, event: None)
    del m
    assert seen() is None


def test_cycle_is_collected():
    class Device:
        def __init__(self, machine):
            self.machine = machine

        def read(self, cpu, offset, width):
            return 0

    m = libvm.Machine()
    seen = weakref.ref(m)
    m.map_mmio(0, 8, Device(m))
    m.hook_add(libvm.HookKind.BLOCK, lambda cpu, event, m=m: None)
    m.self = m
    del m
    gc.collect()
    assert seen() is None


def test_subclass():
    class Mine(libvm.Machine):
        color = "red"

    with Mine(backend="interp") as m:
        assert m.color == "red" and isinstance(m.cpu, libvm.Vcpu)
        with m.fork() as copy:
            assert isinstance(copy, Mine)


def test_close_while_running(backend):
    m = libvm.Machine(backend=backend)
    m.map_ram(0x1000, 4096)
    m.cpu.set_mode("flat64")
    cpu = load(m, "ebfe")
    errors = []

    def work():
        try:
            while True:
                cpu.run()
        except libvm.ClosedError as error:
            errors.append(error)

    threads = [threading.Thread(target=work)]
    for thread in threads:
        thread.start()
    while m.calls == 0:
        pass
    m.close()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 1


def test_trace(machine):
    lines = []
    machine.trace("exit", lambda category, line: lines.append((category, line)))
    load(machine, "f4").run()
    assert lines and lines[0][0] == libvm.TraceCategory.EXIT and "halt" in lines[0][1]
    machine.trace(0)
    lines.clear()
    load(machine, "f4").run()
    assert not lines
    machine.trace("exit", lambda category, line: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(machine, "f4").run()


def test_share_pages():
    machines = [libvm.Machine(backend="interp") for _ in range(2)]
    for m in machines:
        m.map_ram(0, "1M")
        m.write(0, bytes(range(256)) * 4096)
    assert libvm.share_pages(machines) > 0
    machines[0].write(0, b"x")
    assert machines[1].read(0, 1) == b"\0"
    for m in machines:
        m.close()
    with pytest.raises(libvm.ClosedError):
        libvm.share_pages(machines)
    with pytest.raises(TypeError):
        libvm.share_pages([1])
