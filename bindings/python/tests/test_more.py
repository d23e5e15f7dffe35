"""Snapshots, clones, coverage, calls, MMU strategies, interrupts from eventfds, recording, the debugger's stub."""

import ctypes
import io
import os
import socket
import struct
import tempfile
import threading

import pytest

import libvm
from conftest import MAPPED, load, software

COUNT = "48ffc0 ebfb"                           # inc rax; jmp back


def pc(backend, **options):
    return libvm.Machine(backend=backend, platform="pc", memory="2M", **options)


# ---- memory of a PC ----

def test_memory_file(backend, tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(0x1000) + b"from the file" + bytes((2 << 20) - 0x100d))
    with pc(backend, memory_file=str(path), memory_advice=libvm.Advice.SMALL) as m:
        assert m.read(0x1000, 13) == b"from the file"
        m.write(0x1000, b"to")
        with pc(backend, memory_file=str(path), memory_private=True) as n:
            n.write(0x1000, b"in")
            assert n.read(0x1000, 6) == b"inom t"
        assert path.read_bytes()[0x1000:0x1006] == b"toom t" == m.read(0x1000, 6)
    for options in ({"memory_file": str(tmp_path / "none")}, {"memory_private": True}, {"memory_advice": 64}):
        with pytest.raises(libvm.Error):
            pc(backend, **options)


# ---- snapshots ----

def test_snapshot(machine):
    cpu = load(machine, COUNT)
    machine.write(0x4000, b"before")
    with machine.snapshot() as snapshot:
        assert snapshot.bytes > 0 and snapshot.machine is machine
        for _ in range(3):
            cpu.run(max_instructions=100)
            machine.write(0x4000, b"after.")
            snapshot.restore()
            assert machine.read(0x4000, 6) == b"before" and cpu.rax == 0 and cpu.retired == 0
    snapshot.free()
    with pytest.raises(libvm.ClosedError):
        snapshot.restore()
    with pytest.raises(libvm.ClosedError):
        snapshot.bytes
    with libvm.Machine() as other, machine.snapshot() as snapshot:
        assert other.snapshot().machine is other


def test_snapshot_files(machine):
    cpu = load(machine, COUNT)
    cpu.rax = 77
    with machine.snapshot() as snapshot, tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "state")
        snapshot.save(path)
        snapshot.save(path, libvm.SnapshotFlags.NO_SYNC)
        with open(path + "2", "wb") as file:
            snapshot.save(file)
        with libvm.Machine(backend="interp") as other:
            other.map_ram(MAPPED, "64K")
            for source in (path, open(path + "2", "rb")):
                other.load_snapshot(source).restore()
                assert other.cpu.rax == 77 and other.read(MAPPED, 5) == bytes.fromhex(COUNT)
            with pytest.raises(libvm.FormatError):
                with open(__file__, "rb") as nonsense:
                    other.load_snapshot(nonsense)
            with pytest.raises(libvm.NotFoundError):
                other.load_snapshot(os.path.join(directory, "nothing"))


def test_restore_takes_new_regions_away(machine):
    snapshot = machine.snapshot()
    region = machine.map_ram(0x80000, 4096)
    view = region.view()
    with pytest.raises(BufferError):
        snapshot.restore()
    view.release()
    snapshot.restore()
    assert not region.mapped
    with pytest.raises(libvm.ClosedError):
        region.view()


class Counter:
    def __init__(self, value=0):
        self.value = value

    def read(self, cpu, offset, width):
        self.value += 1
        return self.value

    def save(self):
        return struct.pack("<Q", self.value)

    def restore(self, state):
        self.value, = struct.unpack("<Q", state)

    def clone(self):
        return Counter()


def test_device_state(machine):
    device = Counter(5)
    machine.map_pio(0x60, 1, device)
    with machine.snapshot() as snapshot:
        load(machine, "e460 f4").run()
        assert device.value == 6
        snapshot.restore()
        assert device.value == 5
    device.save = None
    broken = Counter()
    broken.save = lambda: 1 / 0
    machine.map_pio(0x61, 1, broken)
    with pytest.raises(ZeroDivisionError):
        machine.snapshot()


def test_fork(machine):
    device = Counter(5)
    machine.map_pio(0x60, 1, device)
    cpu = load(machine, "e460 f4")
    machine.write(0x4000, b"shared")
    with machine.fork() as copy:
        assert copy.cpu.rip == MAPPED and copy.read(0x4000, 6) == b"shared" and type(copy) is libvm.Machine
        copy.write(0x4000, b"copied")
        assert copy.cpu.run().reason == libvm.ExitReason.HALT and copy.cpu.rax & 0xFF == 6
        assert machine.read(0x4000, 6) == b"shared" and device.value == 5
        cpu.run()
        assert device.value == 6


# ---- coverage ----

@software("KVM sees no branches and no comparisons")
def test_coverage(machine):
    cpu = load(machine, COUNT)
    coverage = machine.coverage(65536)
    machine.coverage_range(0, 1 << 40)
    ring = cpu.block_trace(64)
    cpu.run(max_instructions=21)
    assert sum(coverage) == 10 and ring.take() == [MAPPED] * 10 and ring.take() == [] and ring.head == 10
    mine = bytearray(256)
    assert machine.coverage(mine) is mine
    with pytest.raises(BufferError):
        mine.append(0)
    machine.coverage(None)
    mine.append(0)
    cpu.block_trace(0)
    for bad, error in ((3, libvm.InvalidError), (-1, OverflowError), (b"readonly", BufferError), (1 << 40, OverflowError), ("x", TypeError)):
        with pytest.raises(error):
            machine.coverage(bad)
    with pytest.raises(libvm.InvalidError):
        cpu.block_trace(3)


@software("KVM sees no branches and no comparisons")
def test_compare_log(machine):
    cpu = load(machine, "b807000000 83f809 f4")     # mov eax, 7; cmp eax, 9
    ring = cpu.compare_log(16)
    cpu.run()
    assert ring.take() == [(MAPPED + 5, libvm.CompareKind.CMP, 4, True, 7, 9)]
    ring = None
    cpu.rip = MAPPED
    cpu.run()                                       # the vCPU keeps it


# ---- calls ----

def test_call(machine):
    load(machine, "488d0437 c3")                    # lea rax, [rdi + rsi]; ret
    cpu = machine.cpu
    assert cpu.call(MAPPED, "u64(u64,u64)", 2, 40) == 42
    assert cpu.call(MAPPED, "i32(i32,i32)", -5, 2) == -3
    add = cpu.function(MAPPED, "u64(u64,u64)")
    assert add(1, 2) == 3 and add.address == MAPPED and add.signature == "u64(u64,u64)"
    function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(add.pointer)
    assert function(20, 30) == 50 and add.status == libvm.Status.OK
    for call, error in ((lambda: cpu.call(MAPPED, "u64(u64,u64)", 1), TypeError), (lambda: cpu.call(MAPPED, "nonsense"), libvm.InvalidError),
                        (lambda: add(1, "x"), TypeError), (lambda: cpu.call(MAPPED, "u8(u8)", 256), OverflowError),
                        (lambda: add(1 << 64, 1), OverflowError), (lambda: cpu.call(MAPPED, "void()", wings=1), TypeError),
                        (lambda: add(1, b=2), TypeError), (lambda: cpu.call(MAPPED, "u64(str)", 5), TypeError),
                        (lambda: cpu.call(MAPPED, "u64(str)", "a\0b"), ValueError), (lambda: cpu.function(MAPPED, "zzz"), libvm.InvalidError),
                        (lambda: cpu.call(MAPPED, "u64(buf[8])", bytearray(4)), ValueError),
                        (lambda: cpu.call(MAPPED, "u64(cbuf,u32)", b"abc", 100), ValueError)):
        with pytest.raises(error):
            call()


def test_call_with_memory(machine):
    load(machine, "8a07 8807 8a4601 c3")            # mov al, [rdi]; mov [rdi], al; mov al, [rsi + 1]; ret
    assert machine.cpu.call(MAPPED, "u8(str,cbuf[4])", "text", b"abcd") == ord("b")
    load(machine, "c6077a c3")                      # mov byte [rdi], 'z'; ret
    buffer = bytearray(b"abc")
    assert machine.cpu.call(MAPPED, "void(buf,u32)", buffer, 3) is None and buffer == b"zbc"
    load(machine, "f20f58c1 c3")                    # addsd xmm0, xmm1; ret
    assert machine.cpu.call(MAPPED, "f64(f64,f64)", 1.5, 2) == 3.5


def test_call_that_does_not_return(machine):
    load(machine, "f4")
    with pytest.raises(libvm.CallError) as caught:
        machine.cpu.call(MAPPED, "void()")
    assert caught.value.exit.reason == libvm.ExitReason.HALT
    load(machine, "ebfe")
    with pytest.raises(libvm.CallError) as caught:
        machine.cpu.call(MAPPED, "void()", max_instructions=100)
    assert caught.value.exit.reason == libvm.ExitReason.BUDGET
    with pytest.raises(libvm.CallError):
        machine.cpu.call(MAPPED, "void()", timeout=0.05)


@software("on kvm hypercalls go to the host's kernel")
def test_bind(machine):
    log = []

    @machine.hostcall(0x9000, "u32(u32,str)")
    def hello(number, text):
        log.append((number, text))
        return number + 1

    @machine.hypercall(5, "u64(u64,cpu)")
    def double(number, cpu):
        assert cpu is machine.cpu
        return number * 2

    machine.write(0x3000, b"guest\0")
    # mov edi, 7; mov esi, 0x3000; mov eax, 0x9000; call rax; mov ebx, eax; mov eax, 5; vmcall; hlt
    cpu = load(machine, "bf07000000 be00300000 b800900000 ffd0 89c3 b805000000 0f01c1 f4")
    assert cpu.run().reason == libvm.ExitReason.HALT
    assert log == [(7, "guest")] and cpu.rax == 16 and hello.binding.active
    with pytest.raises(libvm.ExistsError):
        machine.bind_function(0x9000, "void()", print)
    hello.binding.remove()
    hello.binding.remove()
    assert not hello.binding.active
    machine.unbind(double.binding)
    for args, error in (((0x9000, "bad", print), libvm.InvalidError), ((0x9000, "void()", 5), TypeError), ((-1, "void()", print), OverflowError)):
        with pytest.raises(error):
            machine.bind_function(*args)
    with pytest.raises(libvm.InvalidError):
        machine.bind_hypercall(6, "sysv: void()", print)


def test_bound_function_raises_and_nests(machine):
    @machine.hostcall(0x9000, "u64()")
    def broken():
        raise KeyError("inside")

    cpu = load(machine, "b800900000 ffd0 f4")
    with pytest.raises(KeyError):
        cpu.run()
    broken.binding.remove()

    @machine.hostcall(0x9000, "u64(cpu)")
    def nested(cpu):
        return cpu.call(0x3000, "u64()") + 1

    machine.write(0x3000, bytes.fromhex("b829000000 c3"))
    cpu.rip = MAPPED
    assert cpu.run().reason == libvm.ExitReason.HALT and cpu.rax == 42
    nested.binding.remove()

    @machine.hostcall(0x9000, "void(buf[4])")
    def change(buffer):
        buffer[0] = 0x7A

    cpu = load(machine, "bf00300000 b800900000 ffd0 f4")
    cpu.run()
    assert machine.read(0x3000, 1) == b"z"
    change.binding.remove()
    machine.bind_function(0x9000, "u8()", lambda: 256)
    cpu.rip = MAPPED
    with pytest.raises(OverflowError):
        cpu.run()


# ---- MMU ----

class Offset:
    """Linear address + 0x10000 is the physical one; nothing above 1 MiB."""

    made = []

    def __init__(self):
        self.calls = []
        Offset.made.append(self)

    def translate(self, cpu, gva, access, context):
        assert context == libvm.MmuContext.SUPERVISOR
        self.calls.append((gva, access))
        if gva >= 0x100000:
            return (0x2,) if access == libvm.Prot.W else None
        if gva == 0x5000:
            raise KeyError("strategy")
        return gva + 0x10000, 4096, "rwx"

    def root_changed(self, cpu, cr3):
        self.calls.append(("root", cr3))

    def invalidate(self, cpu, gva, size):
        self.calls.append(("invalidate", gva, size))


@software("with KVM the host's hardware translates")
def test_mmu_strategy(backend):
    if "test-offset" not in libvm.mmu_names():
        libvm.mmu_register("test-offset", Offset)
    with pytest.raises(libvm.ExistsError):
        libvm.mmu_register("test-offset", Offset)
    with pytest.raises(TypeError):
        libvm.mmu_register("other", 5)
    with libvm.Machine(backend=backend, mmu="test-offset") as m:
        assert m.mmu == "test-offset"
        m.map_ram(0x10000, "64K")
        m.write(0x11000, bytes.fromhex("8b042500200000 f4"))        # mov eax, [0x2000]
        m.write(0x12000, b"\x2a\0\0\0")
        cpu = m.cpu
        cpu.set_mode("flat64")
        cpu.rip = 0x1000
        assert cpu.run().reason == libvm.ExitReason.HALT and cpu.rax == 42
        strategy = Offset.made[-1]
        assert (0x2000, libvm.Prot.R) in strategy.calls
        count = len(strategy.calls)
        cpu.mmu_flush()
        cpu.rip = 0x1000
        cpu.run()
        assert len(strategy.calls) > count
        m.write(0x11000, bytes.fromhex("8b042500500000 f4"))
        cpu.rip = 0x1000
        with pytest.raises(KeyError):
            cpu.run()
        m.mmu_select(None)
        assert m.mmu == "tlb"
        assert cpu.mmu_walk(0x10000) [0] == 0x10000
        with pytest.raises(libvm.NotFoundError):
            m.mmu_select("nonsense")


@software("with KVM the host's hardware translates")
def test_walk_and_traps(machine):
    result = machine.cpu.mmu_walk(0x2000, "w")
    assert result[0] == 0x2000 and result[1] >= 4096 and result[2] & libvm.Prot.W
    with pytest.raises(libvm.GuestMemoryError):
        machine.cpu.mmu_trap_writes(0x900000)
    machine.cpu.mmu_trap_writes(0x2000)
    machine.cpu.mmu_trap_writes(0x2000, False)


def test_ept(backend):
    with libvm.Machine(backend=backend, mmu="ept") as m:
        m.map_ram(0x1000, "64K")
        m.cpu.set_mode("flat64")
        cpu = load(m, "c6042500400000 05 8a042500400000 f4")         # mov byte [0x4000], 5; mov al, [0x4000]
        view = m.ept_create(0, 4096)
        m.ept_protect(view, 0x4000, 4096, "rx")
        cpu.ept_select(view)
        assert cpu.ept_current() == view and m.ept_get(view, 0x4000)["prot"] == libvm.Prot.RX
        exit = cpu.run()
        assert exit.reason == libvm.ExitReason.VIOLATION and exit.gpa == 0x4000 and exit.is_write
        seen = []

        @m.on_violation
        def violation(cpu, v):
            seen.append((v.view, v.gpa, v.access, v.allowed, v.width, v.value))
            m.ept_protect(view, 0x4000, 4096, "rwx")
            return libvm.EptAction.RETRY

        assert cpu.run().reason == libvm.ExitReason.HALT and cpu.rax == 5
        assert seen == [(view, 0x4000, libvm.Prot.W, libvm.Prot.RX, 1, 5)]
        if backend != "kvm":                                        # which does not show accessed bits
            accessed, dirty = m.ept_fetch(view, 0x1000, "16K")
            assert 0x1000 in accessed and 0x1000 not in dirty
        m.ept_on_violation(lambda cpu, v: 1 / 0)
        m.ept_protect(view, 0x4000, 4096, "rx")
        cpu.rip = MAPPED
        with pytest.raises(ZeroDivisionError):
            cpu.run()
        m.ept_on_violation(None)
        with pytest.raises(TypeError):
            m.ept_on_violation(5)
        cpu.ept_select(0)
        m.ept_destroy(view)
        with pytest.raises(libvm.NotFoundError):
            m.ept_destroy(view)


# ---- eventfds, interrupts ----

def test_eventfds(backend):
    with libvm.Machine(backend=backend) as m:
        m.map_ram(0x1000, 4096)
        m.cpu.set_mode("flat64")
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        m.ioeventfd(bell, 0x70, width=1, port=True)
        assert load(m, "e670 f4").run().reason == libvm.ExitReason.HALT
        assert os.eventfd_read(bell) == 1
        with pytest.raises(libvm.ExistsError):
            m.ioeventfd(bell, 0x70, width=1, port=True)
        m.ioeventfd(bell, 0x70, width=1, port=True, on=False)
        with pytest.raises(libvm.UnsupportedError):
            m.irqfd(bell, 3)
        with pytest.raises((TypeError, ValueError)):
            m.ioeventfd("x", 0)
        log = []
        device = type("D", (), {"write": lambda self, cpu, offset, width, value: log.append(value)})()
        region = m.map_mmio(0x80000, 16, device)
        region.coalesce(0, 8)
        load(m, "c6042500000800 05 f4").run()
        assert log == [5]
        region.coalesce(0, 8, on=False)
        with pytest.raises(libvm.Error):
            region.coalesce(8, 100)
        os.close(bell)
    with pc(backend) as m:
        bell = os.eventfd(0)
        m.irqfd(bell, 5)
        m.irqfd(bell, on=False)
        m.irqfd_msi(bell, 0xFEE00000, 0x40)
        m.irqfd(bell, 0, False)
        m.irq_set(5, True)
        m.irq_set(5, False)
        m.irq_msi(0xFEE00000, 0x41)
        with pytest.raises(libvm.InvalidError):
            m.irq_msi(0x1000, 0x41)
        with pytest.raises(libvm.InvalidError):
            m.irq_set(500, True)
        os.close(bell)


# ---- consoles ----

def boot_sector(code):
    return (bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")


# mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; mov al, 10; out dx, al; then echo: wait for input and send it back
ECHO = "baf803 b048 ee b069 ee b00a ee  bafd03 ec a801 74f8 baf803 ec ee ebf1"


def test_console(backend, tmp_path):
    image = tmp_path / "echo"
    image.write_bytes(boot_sector(ECHO))
    with pc(backend) as m:
        m.boot_image(kernel=image)
        with libvm.Guest(m) as guest:
            assert guest.console.readline(20) == b"Hi\n"
            guest.send("one two\n")
            assert guest.wait_for("two", 20) == "one two" and guest.console.readline(20) == b"\n"
            import re

            guest.send(b"x=17;")
            assert guest.wait_for(re.compile(r"x=(\d+);"), 20) == "x=17;"
            guest.send(b"y")
            assert guest.wait_for(re.compile(rb"y"), 20) == "y"
            with pytest.raises(TimeoutError) as caught:
                guest.console.wait_for("never", 0.05)
            assert "never" in str(caught.value)
            with pytest.raises(TypeError):
                guest.console.wait_for(5, 1)
            console = m.console
            assert console.readable() and console.writable() and console.dropped == 0 and console.index == 0 and console.read() == b""
            console.flush()
            guest.stop()
            assert not guest.running


def test_serial_functions(backend, tmp_path):
    image = tmp_path / "echo"
    image.write_bytes(boot_sector(ECHO))
    with pc(backend) as m:
        got = io.BytesIO()
        m.serial_output(0, got.write)
        m.debugcon_output(lambda data: None)
        m.boot_image(kernel=str(image), cmdline=None)
        m.cpu.run(timeout=0.2)
        assert got.getvalue() == b"Hi\n"
        assert m.serial_input(0, b"abc") == 3
        m.cpu.run(timeout=0.2)
        assert got.getvalue() == b"Hi\nabc"
        m.serial_output(0, lambda data: 1 / 0)
        m.serial_input(0, b"d")
        with pytest.raises(ZeroDivisionError):
            m.cpu.run(timeout=5)
        m.serial_output(0, None)
        assert m.debug_console().index == 4
        for call, error in ((lambda: m.serial_output(7, print), ValueError), (lambda: m.serial_output(0, 5), TypeError),
                            (lambda: m.serial(9), ValueError), (lambda: m.serial_input(0, "text"), TypeError)):
            with pytest.raises(error):
                call()
    with libvm.Machine(backend=backend) as m:
        with pytest.raises(libvm.UnsupportedError):
            m.console
        with pytest.raises(libvm.UnsupportedError):
            m.boot_image(kernel=image)


def test_loading(backend, tmp_path):
    raw = tmp_path / "raw"
    raw.write_bytes(b"contents")
    with libvm.Machine(backend=backend) as m:
        m.map_ram(0, "64K")
        m.load_raw(raw, 0x2000)
        assert m.read(0x2000, 8) == b"contents"
        with pytest.raises(libvm.FormatError):
            m.load_elf(str(raw))
        with pytest.raises(libvm.HostError):
            m.load_raw(tmp_path / "nothing", 0)
        with pytest.raises(TypeError):
            m.load_raw(5, 0)
    # A small ELF: one segment at 0x3000, entry 0x3004.
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x3004, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    elf += struct.pack("<IIQQQQQQ", 1, 5, 120, 0x3000, 0x3000, 8, 8, 4096) + b"\x90" * 8
    (tmp_path / "elf").write_bytes(elf)
    with libvm.Machine(backend=backend) as m:
        m.map_ram(0, "64K")
        assert m.load_elf(tmp_path / "elf") == 0x3004
        assert m.read(0x3000, 8) == b"\x90" * 8
    with pc(backend) as m:
        with pytest.raises(libvm.FormatError):
            m.boot_linux(raw)
        with pytest.raises(libvm.HostError):
            m.boot_linux(tmp_path / "nothing", cmdline="x")
        with pytest.raises(libvm.InvalidError):
            m.boot_image()


# ---- recording ----

@software("KVM counts no instructions")
def test_record_and_replay(backend, tmp_path):
    image = tmp_path / "echo"
    image.write_bytes(boot_sector(ECHO))

    def boot():
        m = pc(backend)
        got = io.BytesIO()
        m.serial_output(0, got.write)
        m.boot_image(kernel=image)
        return m, got

    with open(tmp_path / "log", "w+b") as log:
        m, got = boot()
        m.record(log, skip_idle=True)
        assert m.replay_info()["mode"] == libvm.ReplayMode.RECORDING
        m.cpu.run(max_instructions=200)
        m.serial_input(0, b"abc")
        m.cpu.run(max_instructions=500)
        sum, retired = m.checksum(), m.cpu.retired
        m.record_stop()
        with pytest.raises(libvm.InvalidError):
            m.record_stop()
        m.close()
        log.seek(0)
        m, again = boot()
        m.replay(log)
        exit = m.cpu.run()
        assert exit.reason == libvm.ExitReason.REPLAY and exit.status == libvm.Status.OK and exit.position == 700
        assert m.checksum() == sum and m.cpu.retired == retired and again.getvalue() == got.getvalue() == b"Hi\nabc"
        assert m.replay_info()["at_end"]
        m.replay_stop()
        m.close()
        with pc(backend) as m, open(image, "rb") as nonsense, pytest.raises(libvm.Error):
            m.replay(nonsense)


# ---- the debugger's stub ----

def packet(text):
    return f"${text}#{sum(text.encode()) & 255:02x}".encode()


def test_gdb(machine):
    load(machine, "f4")
    with machine.gdbstub("127.0.0.1:0") as gdb:
        host, port = gdb.address.rsplit(":", 1)
        with pytest.raises(libvm.BusyError):
            machine.gdbstub("127.0.0.1:0")
        results = []
        thread = threading.Thread(target=lambda: results.append(gdb.serve()))
        thread.start()
        with socket.create_connection((host, int(port)), 20) as client:
            client.sendall(packet("qSupported"))
            answer = b""
            while b"PacketSize" not in answer:
                answer += client.recv(4096)
            client.sendall(b"+" + packet("k"))
            thread.join(20)
        assert results and results[0].reason == libvm.ExitReason.KICK
    with pytest.raises(libvm.ClosedError):
        gdb.address
    for address in ("1.2.3.4:1", "nonsense"):
        with pytest.raises(libvm.InvalidError):
            machine.gdbstub(address)


def test_gdb_callbacks(machine):
    load(machine, "e460 f4")
    seen = []

    def on_exit(cpu, exit):
        seen.append((cpu.index, exit.reason))
        if exit.reason == libvm.ExitReason.IO:
            exit.data = 0x33
            return libvm.GdbAction.RUN
        return libvm.GdbAction.END

    gdb = machine.gdbstub(":0", runs_alone=True, on_exit=on_exit, on_reset=lambda m: None)
    exit = gdb.serve()
    assert exit.reason == libvm.ExitReason.HALT and machine.cpu.rax == 0x33
    assert [reason for _, reason in seen] == [libvm.ExitReason.IO, libvm.ExitReason.HALT]
    load(machine, "ebfe")
    timer = threading.Timer(0.2, gdb.stop)
    timer.start()
    assert gdb.serve().reason == libvm.ExitReason.KICK
    timer.join()
    gdb.close()
    gdb.close()
