"""Registers, runs, exits."""

import threading
import time

import pytest

import libvm
from conftest import MAPPED, load, run_python, software


def test_registers(machine):
    cpu = machine.cpu
    for name in ("rax", "r15", "rip", "cr2", "fs_base", "dr0"):
        setattr(cpu, name, 0x1234567)
        assert getattr(cpu, name) == 0x1234567 == cpu.read_reg(name) == cpu.read_reg(libvm.Reg[name.upper()])
    cpu.write_reg("RBX", 7)
    assert cpu.rbx == 7
    cpu.xmm[3] = 1 << 127
    cpu.ymm[15] = b"\1" * 32
    cpu.st[0] = 0x3FFF8000000000000000
    cpu.mm[1] = 5
    assert cpu.xmm[3] == 1 << 127 and cpu.xmm3 == 1 << 127 and len(cpu.xmm) == 16 and len(cpu.st) == 8
    assert cpu.ymm[15] == int.from_bytes(b"\1" * 32, "little") and list(cpu.ymm)[15] == cpu.ymm15
    assert cpu.mxcsr == 0x1F80 and cpu.mm[1] == 5


def test_registers_in_bulk(machine):
    cpu = machine.cpu
    cpu.set_regs(rax=1, rbx=2)
    cpu.set_regs({"rcx": 3})
    cpu.regs = {"rdx": 4}
    cpu.regs.update(rsi=5)
    cpu.regs["rdi"] = 6
    assert [cpu.get_regs()[n] for n in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi")] == [1, 2, 3, 4, 5, 6]
    assert dict(cpu.regs)["rsi"] == 5 and len(cpu.regs) == 18 and "rax" in cpu.regs and "rax=0x1" in repr(cpu.regs)
    sregs = cpu.get_sregs()
    assert sregs["cs"]["selector"] == cpu.cs and sregs["cr0"] == cpu.cr0
    cpu.set_sregs(fs={"base": 0x5000, "selector": 0x10, "limit": 0xFFFFFFFF, "attributes": 0xC093})
    assert cpu.fs_base == 0x5000 and cpu.sregs["fs"]["base"] == 0x5000
    cpu.sregs = {"cr2": 9}
    fpu = cpu.get_fpu()
    fpu["ymm"][2] = 77
    cpu.set_fpu(fpu)
    cpu.fpu = {"mxcsr": 0x1F80}
    assert cpu.ymm[2] == 77 and cpu.fpu["fcw"] == cpu.fcw
    cpu.set_msr(0xC0000102, 0x7000)
    assert cpu.get_msr(0xC0000102) == 0x7000


def test_bad_registers(machine):
    cpu = machine.cpu
    for touch, error in ((lambda: setattr(cpu, "rax", -1), OverflowError), (lambda: setattr(cpu, "rax", 1 << 64), OverflowError),
                         (lambda: setattr(cpu, "rax", "x"), TypeError), (lambda: setattr(cpu, "rax", 1.0), TypeError),
                         (lambda: delattr(cpu, "rax"), AttributeError), (lambda: cpu.read_reg("zax"), KeyError),
                         (lambda: cpu.read_reg(100000), libvm.NotFoundError), (lambda: cpu.read_reg(-1), libvm.NotFoundError),
                         (lambda: cpu.xmm[16], IndexError), (lambda: cpu.set_regs(zax=1), KeyError),
                         (lambda: cpu.set_regs(rax=-1), OverflowError), (lambda: cpu.set_regs(5), (TypeError, AttributeError)),
                         (lambda: cpu.ymm.__setitem__(0, b"short"), ValueError), (lambda: cpu.xmm.__setitem__(0, 1 << 128), OverflowError),
                         (lambda: cpu.set_fpu(ymm=[1]), ValueError), (lambda: cpu.set_sregs(cs=5), (TypeError, AttributeError)),
                         (lambda: cpu.get_msr(0x12345678), libvm.NotFoundError), (lambda: setattr(cpu, "cr0", 0x80000000), libvm.InvalidError),
                         (lambda: cpu.set_mode("flat128"), ValueError), (lambda: cpu.set_mode(77), libvm.InvalidError),
                         (lambda: setattr(cpu, "es", 1 << 20), OverflowError)):
        with pytest.raises(error):
            touch()


def test_guest_virtual(machine):
    cpu = machine.cpu
    cpu.write(0x2000, b"abc")
    assert cpu.read(0x2000, 3) == b"abc" and cpu.translate(0x2000) == 0x2000 and cpu.translate(0x2000, "w") == 0x2000
    with pytest.raises(libvm.GuestMemoryError) as caught:
        cpu.read(0x900000, 4)
    assert caught.value.address == 0x900000
    with pytest.raises(libvm.InvalidError):
        cpu.translate(0x2000, "rw")
    with pytest.raises(ValueError):
        cpu.read(0x2000, -1)


def test_exits(machine):
    cpu = load(machine, "e460 0f0b")
    match cpu.run():
        case libvm.Exit(reason=libvm.ExitReason.IO, port=0x60, is_write=False, width=1) as exit:
            assert exit.rip == MAPPED and exit.insn_bytes == b"\xe4\x60" and exit.insn_length == 2 and exit.count == 1
        case other:
            pytest.fail(str(other))
    with pytest.raises(AttributeError):
        exit.gpa
    with pytest.raises(AttributeError):
        exit.port = 5
    with pytest.raises(OverflowError):
        exit.data = -1
    exit.data = 0x42
    exit = cpu.run(exception_exits=[6])
    assert cpu.rax == 0x42
    assert exit.reason == libvm.ExitReason.EXCEPTION and exit.vector == 6 and not exit.has_error
    assert "exception" in str(exit) and "exception" in repr(exit)


@software("on kvm hypercalls go to the host's kernel")
def test_hypercall(machine):
    cpu = load(machine, "0f01c1 f4")
    cpu.rax, cpu.rbx = 7, 8
    exit = cpu.run()
    assert exit.reason == libvm.ExitReason.HYPERCALL and exit.number == 7 and exit.args[0] == 8
    exit.result = 9
    assert cpu.run().reason == libvm.ExitReason.HALT and cpu.rax == 9


def test_brief_exits_do_not_name_their_instruction(machine):
    cpu = load(machine, "e540 e540 f4")
    assert cpu.run().insn_length == 2
    assert cpu.run(brief=True, signal_blocked=False).insn_length == 0
    assert cpu.run().reason == libvm.ExitReason.HALT


def test_limits(machine):
    cpu = load(machine, "48ffc0 ebfb")
    assert cpu.run(max_instructions=11).reason == libvm.ExitReason.BUDGET and cpu.rax == 6 and cpu.retired == 11
    assert cpu.run(until=MAPPED).reason == libvm.ExitReason.UNTIL and cpu.rip == MAPPED
    assert cpu.run(single_step=True).reason == libvm.ExitReason.STEP and cpu.rip == MAPPED + 3
    begin = time.monotonic()
    assert cpu.run(timeout=0.12).reason == libvm.ExitReason.DEADLINE
    assert 0.1 < time.monotonic() - begin < 20
    assert cpu.run(timeout=0).reason == libvm.ExitReason.DEADLINE
    assert cpu.run(max_instructions=None, timeout=None, until=MAPPED).reason == libvm.ExitReason.UNTIL
    for options, error in (({"max_instructions": -1}, OverflowError), ({"timeout": -1}, ValueError), ({"timeout": "x"}, TypeError),
                           ({"timeout": float("nan")}, ValueError), ({"until": 1 << 65}, OverflowError), ({"wings": 1}, TypeError),
                           ({"exception_exits": [32]}, ValueError), ({"exception_exits": 5.5}, TypeError)):
        with pytest.raises(error):
            cpu.run(**options)
    with pytest.raises(TypeError):
        cpu.run(5)


def test_budget_across_slices(machine):
    """A run is cut into slices of 50 ms; a budget that takes longer is exact all the same."""
    cpu = load(machine, "48ffc0 ebfb")
    count = 400_000_001 if machine.backend == libvm.Backend.JIT else 20_000_001
    assert cpu.run(max_instructions=count).reason == libvm.ExitReason.BUDGET
    assert cpu.retired == count and cpu.rax == (count + 1) // 2


def test_until_across_slices(machine):
    cpu = load(machine, "b900000010 ffc9 75fc f4" if machine.backend == libvm.Backend.JIT else "b900006000 ffc9 75fc f4")
    assert cpu.run(until=MAPPED + 9).reason == libvm.ExitReason.UNTIL and cpu.rip == MAPPED + 9 and cpu.rcx == 0


def test_kick(machine):
    cpu = load(machine, "ebfe")
    cpu.kick()
    assert cpu.run().reason == libvm.ExitReason.KICK
    timer = threading.Timer(0.1, cpu.kick)
    timer.start()
    assert cpu.run().reason == libvm.ExitReason.KICK
    timer.join()


def test_busy(machine):
    cpu = load(machine, "ebfe")
    thread = threading.Thread(target=cpu.run)
    thread.start()
    while machine.calls == 0:
        time.sleep(0.001)
    caught = []
    for _ in range(1000):
        try:
            cpu.rax
        except libvm.BusyError as error:
            caught.append(error)
            break
        time.sleep(0.001)
    assert caught and caught[0].status is libvm.Status.E_BUSY
    with pytest.raises(libvm.BusyError):
        cpu.run()
    machine.map_ram(0x100000, 4096)             # other threads may edit the map
    assert machine.read(MAPPED, 2) == b"\xeb\xfe"
    cpu.kick()
    thread.join()


def test_inject(machine):
    machine.cpu.inject(2)
    with pytest.raises(libvm.BusyError):
        machine.cpu.inject(3)
    with pytest.raises(OverflowError):
        machine.cpu.inject(256)
    with pytest.raises(libvm.InvalidError):
        machine.cpu.inject(3, 5)


def test_exit_objects_are_not_reused(machine):
    cpu = load(machine, "e460 e461 f4")
    first = cpu.run()
    second = cpu.run()
    assert (first.port, second.port) == (0x60, 0x61)
    assert cpu.run().reason == libvm.ExitReason.HALT and first.port == 0x60


CTRL_C = """
import libvm, os, signal, threading, time
before = signal.getsignal(signal.SIGINT)
with libvm.Machine(backend={backend!r}) as m:
    m.map_ram(0x1000, 4096)
    m.write(0x1000, bytes.fromhex("ebfe"))
    m.cpu.set_mode("flat64")
    m.cpu.rip = 0x1000
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        m.cpu.run()
    except KeyboardInterrupt:
        print("interrupted")
    assert signal.getsignal(signal.SIGINT) is before
    # A handler that does not raise: the run goes on.
    seen = []
    signal.signal(signal.SIGUSR1, lambda *a: seen.append(1))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    print(m.cpu.run(timeout=1.0).reason.name, seen)
"""


def test_ctrl_c(backend):
    assert run_python(CTRL_C.format(backend=backend)) == (0, "interrupted\nDEADLINE [1]\n")


def test_breakpoint_at_the_end_of_a_slice(machine):
    """Slices end anywhere, also at a breakpoint: it must not be stepped over."""
    cpu = load(machine, "48ffc0 ebfb")
    machine.breakpoint(MAPPED + 3)
    for n in range(1, 200):
        assert cpu.run(timeout=5).reason == libvm.ExitReason.BREAKPOINT and cpu.rax == n


@software("KVM records no blocks")
def test_what_a_vcpu_keeps_without_its_object(machine):
    load(machine, "e460 eb00 f4")
    ring = machine.cpu.block_trace(16)
    machine.cpu.run().data = 0x55               # the record that the next run completes
    assert machine.cpu.run().reason == libvm.ExitReason.HALT
    assert machine.cpu.rax & 0xFF == 0x55 and ring.take() == [MAPPED + 4]
