"""The memory map; reading and writing; views; devices."""

import mmap
import os
import tempfile

import pytest

import libvm
from conftest import MAPPED, load


def test_read_write(machine):
    machine[0x2000:0x2005] = b"hello"
    assert machine[0x2000:0x2005] == b"hello" == machine.read(0x2000, 5)
    machine[0x2001] = ord("a")
    assert machine[0x2001] == ord("a")
    machine.write(0x2000, memoryview(bytearray(b"HE")))
    buffer = bytearray(5)
    machine.read_into(0x2000, buffer)
    assert buffer == b"HEllo"
    assert machine[0x2000:0x2000] == b"" and machine.read(0, 0) == b""


def test_bad_addresses(machine):
    with pytest.raises(libvm.GuestMemoryError) as caught:
        machine.read(MAPPED + 0x10000 - 4, 8)
    assert caught.value.address == MAPPED + 0x10000 and caught.value.status == libvm.Status.E_FAULT
    for touch, error in ((lambda: machine[0x2000], None), (lambda: machine[:], ValueError), (lambda: machine[0:8:2], ValueError),
                         (lambda: machine["x"], TypeError), (lambda: machine[-1], OverflowError), (lambda: machine[-4:8], OverflowError),
                         (lambda: machine.read(0x2000, -1), ValueError), (lambda: machine.read(1 << 70, 1), OverflowError),
                         (lambda: machine.write(0x2000, "text"), TypeError), (lambda: machine[1 << 64], OverflowError),
                         (lambda: machine.read(0x2000, 1 << 62), (MemoryError, libvm.GuestMemoryError)),
                         (lambda: machine.read((1 << 64) - 1, 4), libvm.GuestMemoryError)):
        if error:
            with pytest.raises(error):
                touch()
        else:
            touch()
    with pytest.raises(ValueError):
        machine[0x2000:0x2004] = b"too long"
    with pytest.raises(TypeError):
        del machine[0x2000]
    with pytest.raises(OverflowError):
        machine[0x2000] = 256


def test_map_errors(machine):
    for options in ((0x1000, 0x1000), (0x20001, 0x1000), (0x20000, 0x1001), (0x20000, 0), (1 << 63, 0x1000)):
        with pytest.raises(libvm.MapError) as caught:
            machine.map_ram(*options)
        assert str(caught.value)
    with pytest.raises(ValueError):
        machine.map_ram(0x20000, 4096, "rq")
    with pytest.raises(ValueError):
        machine.map_ram(0x20000, 4096, 8)
    with pytest.raises(OverflowError):
        machine.map_ram(-4096, 4096)


def test_protect_and_unmap(machine):
    region = machine.map_ram(0x40000, "8K", "rw")
    assert region.gpa == 0x40000 and region.size == len(region) == 8192 and region.machine is machine and region.mapped
    machine.protect(0x41000, 4096, libvm.Prot.R)
    exit = load(machine, "c6042500100400 01 f4").run()      # mov byte [0x41000], 1
    assert exit.reason == libvm.ExitReason.UNMAPPED and exit.is_write and exit.gpa == 0x41000
    with pytest.raises(libvm.GuestMemoryError):
        machine.protect(0x900000, 4096, "r")
    region.unmap()
    assert not region.mapped
    with pytest.raises(libvm.ClosedError):
        region.unmap()
    with pytest.raises(libvm.GuestMemoryError):
        machine.read(0x40000, 1)
    other = machine.map_ram(0x40000, 4096)
    with libvm.Machine() as second, pytest.raises(libvm.MapError):
        second.unmap(other)
    machine.unmap(other)


def test_view(machine):
    region = machine.map_ram(0x40000, 4096)
    with region.view() as view:
        view[0:3] = b"abc"
        assert machine.read(0x40000, 3) == b"abc"
        assert view.nbytes == 4096 and not view.readonly
        for refused in (region.unmap, machine.close):
            with pytest.raises(BufferError):
                refused()
        assert region.data
    region.unmap()
    with pytest.raises(libvm.ClosedError):
        region.view()


def test_view_drops_code(machine):
    region = machine.map_ram(0x40000, 4096)
    for value in (1, 2):                        # mov eax, value; hlt
        with region.view() as view:
            view[0:6] = bytes([0xB8, value, 0, 0, 0, 0xF4])
        machine.cpu.rip = 0x40000
        for _ in range(3):
            machine.cpu.rip = 0x40000
            machine.cpu.run()
        assert machine.cpu.rax == value


def test_map_host(machine):
    memory = mmap.mmap(-1, 8192)
    region = machine.map_host(0x40000, memory)
    machine.write(0x40000, b"guest")
    assert memory[:5] == b"guest"
    memory[0:4] = b"host"
    machine.invalidate(0x40000, 4096)
    assert machine.read(0x40000, 5) == b"hostt"
    with pytest.raises(BufferError):
        memory.close()
    region.unmap()
    memory.close()
    with pytest.raises(libvm.MapError):
        machine.map_host(0x40000, bytearray(100))
    with pytest.raises(BufferError):
        machine.map_host(0x40000, bytes(8192))


def test_map_host_outlives_its_handle(machine):
    memory = mmap.mmap(-1, 4096)
    machine.map_host(0x40000, memory)
    machine.write(0x40000, b"x")
    with pytest.raises(BufferError):
        memory.close()
    machine.close()
    memory.close()


def test_map_file(machine):
    with tempfile.TemporaryFile() as file:
        file.write(b"contents".ljust(4096, b"."))
        file.flush()
        region = machine.map_file(0x40000, 4096, "rw", file)
        assert machine.read(0x40000, 8) == b"contents"
        machine.write(0x40000, b"private")
        region.unmap()
        machine.map_file(0x40000, 4096, "rw", file, private=False)
        machine.write(0x40000, b"SHARED")
        assert os.pread(file.fileno(), 8, 0) == b"SHAREDts"
        with pytest.raises(libvm.MapError):
            machine.map_file(0x80000, 8192, "r", file)
    with pytest.raises(TypeError):
        machine.map_file(0x80000, 4096, "r", "name")


def test_dirty_log(machine):
    machine.dirty_log(True)
    assert machine.dirty_fetch(MAPPED, "64K") == []
    machine.write(0x3FFF, b"ab")
    assert machine.dirty_fetch(MAPPED, "64K") == [0x3000, 0x4000]
    assert machine.dirty_fetch(MAPPED, "64K") == []
    machine.dirty_log(False)
    with pytest.raises(libvm.InvalidError):
        machine.dirty_fetch(MAPPED, 4096)
    with pytest.raises(OverflowError):
        machine.dirty_fetch(0, 1 << 60)


def test_discard_and_advise(machine):
    machine.write(0x3000, b"gone")
    machine.discard(0x3000, 4096)
    assert machine.read(0x3000, 4) == bytes(4)
    machine.advise(MAPPED, 4096, libvm.Advice.PREFAULT)
    with pytest.raises(libvm.GuestMemoryError):
        machine.discard(0x900000, 4096)


class Register:
    def __init__(self):
        self.value, self.log, self.gone = 0, [], 0

    def read(self, cpu, offset, width):
        self.log.append(("r", offset, width, cpu.rip))
        return self.value

    def write(self, cpu, offset, width, value):
        self.log.append(("w", offset, width, value))
        self.value = value

    def reset(self):
        self.value = 99

    def destroy(self):
        self.gone += 1


def test_mmio(machine):
    device = Register()
    region = machine.map_mmio(0x80000, 16, device)
    assert region.device is device and region.data is None
    cpu = load(machine, "c7042504000800 78563412 8b042504000800 f4")     # mov dword [0x80004], 0x12345678; mov eax, [0x80004]
    assert cpu.run().reason == libvm.ExitReason.HALT
    assert cpu.rax == 0x12345678
    assert device.log == [("w", 4, 4, 0x12345678), ("r", 4, 4, MAPPED + 11)]
    with pytest.raises(BufferError):
        region.view()
    machine.reset()
    assert device.value == 99
    region.unmap()
    assert device.gone == 1


def test_device_ends_with_machine(backend):
    device = Register()
    with libvm.Machine(backend=backend) as m:
        m.map_pio(0x10, 4, device)
    assert device.gone == 1


def test_decorated_devices(machine):
    @machine.mmio(0x80000, 8)
    def thing(cpu, offset, width, value):
        return None if value is not None else offset + 0x40

    @machine.pio(0x60)
    class Port:
        def read(self, cpu, offset, width):
            return 0x77

    cpu = load(machine, "8a042503000800 88c3 e460 f4")      # mov al, [0x80003]; mov bl, al; in al, 0x60
    cpu.run()
    assert cpu.rbx == 0x43 and cpu.rax == 0x77 and thing.region.mapped and Port.region.size == 1


def test_device_declines(machine):
    class Silent:
        def read(self, cpu, offset, width):
            return None

    machine.map_mmio(0x80000, 8, Silent())
    cpu = load(machine, "8b042500000800 c6042500000800 05 f4")
    exit = cpu.run()
    assert exit.reason == libvm.ExitReason.MMIO and not exit.is_write and exit.width == 4 and exit.gpa == 0x80000
    exit.data = 0xABCD
    exit = cpu.run()
    assert cpu.rax == 0xABCD and exit.is_write and exit.data == 5
    assert cpu.run().reason == libvm.ExitReason.HALT


@pytest.mark.parametrize("answer", [-1, 1 << 64, "text", 1.5])
def test_device_answers_nonsense(machine, answer):
    machine.map_mmio(0x80000, 8, type("Bad", (), {"read": lambda self, cpu, offset, width: answer})())
    with pytest.raises((OverflowError, TypeError)):
        load(machine, "8b042500000800 f4").run()


def test_device_raises(machine):
    class Broken:
        def read(self, cpu, offset, width):
            raise KeyError("broken")

        def write(self, cpu, offset, width, value):
            raise IndexError("broken")

    machine.map_pio(0x60, 1, Broken())
    cpu = load(machine, "e460 e660 f4")
    with pytest.raises(KeyError) as caught:
        cpu.run()
    assert any(entry.name == "read" for entry in caught.traceback)
    with pytest.raises(IndexError):
        cpu.run()
    assert cpu.run().reason == libvm.ExitReason.HALT


def test_unmap_from_its_own_callback(machine):
    class Suicidal(Register):
        def read(self, cpu, offset, width):
            self.region.unmap()
            return 5

    device = Suicidal()
    device.region = machine.map_mmio(0x80000, 8, device)
    cpu = load(machine, "8b042500000800 f4")
    assert cpu.run().reason == libvm.ExitReason.HALT and cpu.rax == 5
    assert device.gone == 1 and not device.region.mapped


def test_close_from_a_callback(machine):
    machine.map_pio(0x60, 1, type("Closer", (), {"read": lambda self, cpu, offset, width: cpu.machine.close()})())
    with pytest.raises(libvm.BusyError):
        load(machine, "e460 f4").run()
    assert not machine.closed


def test_run_from_a_callback(machine):
    machine.map_pio(0x60, 1, type("Runner", (), {"read": lambda self, cpu, offset, width: cpu.run()})())
    with pytest.raises(libvm.BusyError):
        load(machine, "e460 f4").run()
