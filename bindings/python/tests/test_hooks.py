"""Hooks, breakpoints, watchpoints; exceptions that cross the guest."""

import gc

import pytest

import libvm
from conftest import MAPPED, load, software

KINDS = libvm.HookKind
NO_HOOKS = "backend kvm serves no hooks"
# mov eax, 5; mov [0x2000], eax; mov ebx, [0x2000]; dec eax; jnz back to the store; hlt
LOOP = "b805000000 890425 00200000 8b1c25 00200000 ffc8 75ee f4"


@software(NO_HOOKS)
def test_every_kind(machine):
    seen = {}

    def note(cpu, event):
        assert cpu is machine.cpu and cpu.machine is machine
        seen.setdefault(event.kind.name, []).append((event.address, event.bytes, event.value))

    for on in (machine.on_insn, machine.on_block, machine.on_edge, machine.on_read, machine.on_write, machine.on_fetch):
        on(lambda cpu, event: note(cpu, event))
    assert load(machine, LOOP).run().reason == libvm.ExitReason.HALT
    assert len(seen["INSN"]) == len(seen["FETCH"]) == 1 + 5 * 4 + 1
    assert [entry[2] for entry in seen["MEM_WRITE"]] == [5, 4, 3, 2, 1] == [entry[2] for entry in seen["MEM_READ"]]
    assert seen["MEM_WRITE"][0][:2] == (0x2000, 4)
    assert seen["BLOCK"][0][0] == MAPPED and len(seen["BLOCK"]) == 6 and len(seen["EDGE"]) == 5


@software(NO_HOOKS)
def test_ports_exceptions_and_the_rest(machine):
    seen = []
    cpu = machine.cpu

    @machine.on_port(0x60, 0x60)
    def port(cpu, event):
        seen.append(("port", event.address, event.is_write, event.value))
        return libvm.SKIP

    @machine.on_exception(6, 6)
    def exception(cpu, event):
        seen.append(("exception", event.value))
        return libvm.SKIP

    @machine.on_cpuid
    def cpuid(cpu, event):
        seen.append(("cpuid", event.address, event.source))
        cpu.rax = 0x1234
        return libvm.SKIP

    @machine.on_msr(0x10, 0x10)
    def msr(cpu, event):
        seen.append(("msr", event.address, event.flags))
        return libvm.HookResult.SKIP

    @machine.on_syscall
    def syscall(cpu, event):
        seen.append(("syscall", event.value))
        return libvm.SKIP

    @machine.on_interrupt(0x80, 0x80)
    def interrupt(cpu, event):
        seen.append(("interrupt", event.value, event.flags & libvm.EventFlags.SOFT))
        return libvm.SKIP

    load(machine, "b007 e660 0f0b b801000000 b900000000 0fa2 b910000000 0f32 0f05 cd80 f4")
    machine.cpu.efer = machine.cpu.efer | 1
    assert cpu.run().reason == libvm.ExitReason.HALT
    assert seen == [("port", 0x60, True, 7), ("exception", 6), ("cpuid", 1, 0), ("msr", 0x10, 0), ("syscall", 0x1234),
                    ("interrupt", 0x80, libvm.EventFlags.SOFT)]


@software(NO_HOOKS)
def test_stop_and_handles(machine):
    @machine.on_block(MAPPED + 5, MAPPED + 5)
    def stop(cpu, event):
        return libvm.STOP

    cpu = load(machine, LOOP)
    cpu.run(max_instructions=1)
    exit = cpu.run()
    assert exit.reason == libvm.ExitReason.HOOK and exit.hook is stop.hook and exit.hook.fn is stop and exit.hook.kind == KINDS.BLOCK
    assert exit.hook.active
    stop.hook.remove()
    stop.hook.remove()
    assert not stop.hook.active and stop.hook.fn is None and stop.hook.kind is None
    assert cpu.run().reason == libvm.ExitReason.HALT
    hook = machine.hook_add(KINDS.BLOCK, stop)
    with libvm.Machine() as other, pytest.raises(libvm.NotFoundError):
        other.hook_remove(hook)
    machine.hook_remove(hook)


@software(NO_HOOKS)
def test_dropped_handle_stays(machine):
    count = []
    machine.hook_add(KINDS.BLOCK, lambda cpu, event: count.append(1))
    gc.collect()
    load(machine, LOOP).run()
    assert len(count) == 6


@software(NO_HOOKS)
def test_kept_events(machine):
    kept = []

    @machine.on_write
    def keep(cpu, event):
        kept.append(event)

    load(machine, LOOP).run()
    assert [event.value for event in kept] == [5, 4, 3, 2, 1]
    assert [event.data for event in kept] == [bytes([n, 0, 0, 0]) for n in (5, 4, 3, 2, 1)]
    assert kept[0].kind == KINDS.MEM_WRITE and "Event" in repr(kept[0]) and kept[0].error == 0


@software(NO_HOOKS)
def test_exception_in_a_callback(machine):
    @machine.on_block
    def broken(cpu, event):
        raise KeyError("inside")

    cpu = load(machine, LOOP)
    for _ in range(3):
        cpu.rip = MAPPED
        with pytest.raises(KeyError) as caught:
            cpu.run()
        assert any(entry.name == "broken" for entry in caught.traceback)
    broken.hook.remove()
    assert cpu.run().reason == libvm.ExitReason.HALT


@software(NO_HOOKS)
@pytest.mark.parametrize("answer", ["x", 3, -1, True, 1.0, 1 << 70])
def test_wrong_answers(machine, answer):
    machine.hook_add(KINDS.BLOCK, lambda cpu, event: answer)
    with pytest.raises((TypeError, OverflowError)):
        load(machine, LOOP).run()


def test_bad_hooks(machine):
    for args, error in (((KINDS.BLOCK, 5), TypeError), ((99, print), libvm.InvalidError), ((KINDS.BLOCK, print, 5, 4), libvm.InvalidError),
                        ((KINDS.BLOCK, print, -1), OverflowError), ((KINDS.BLOCK,), TypeError), (("block", print), TypeError)):
        with pytest.raises(error):
            machine.hook_add(*args)


@software(NO_HOOKS)
def test_remove_from_itself(machine):
    count = []

    @machine.on_block
    def once(cpu, event):
        count.append(1)
        once.hook.remove()

    load(machine, LOOP).run()
    assert len(count) == 1


@software(NO_HOOKS)
def test_add_map_and_redirect_from_a_callback(machine):
    @machine.on_insn(MAPPED, MAPPED)
    def redirect(cpu, event):
        machine.map_ram(0x80000, 4096)
        machine.write(0x80000, b"\xb8\x2a\0\0\0\xf4")
        machine.hook_add(KINDS.INSN, lambda cpu, event: seen.append(event.address), 0x80000, 0x80000)
        cpu.rip = 0x80000

    seen = []
    cpu = load(machine, LOOP)
    assert cpu.run().reason == libvm.ExitReason.HALT
    assert cpu.rax == 42 and seen == [0x80000]


@software(NO_HOOKS)
def test_close_and_run_from_a_callback(machine):
    for forbidden in (machine.close, machine.cpu.run):
        hook = machine.hook_add(KINDS.BLOCK, lambda cpu, event: forbidden())
        with pytest.raises(libvm.BusyError):
            load(machine, LOOP).run()
        hook.remove()


def test_breakpoints(machine):
    machine.breakpoint(MAPPED + 5)
    with pytest.raises(libvm.ExistsError):
        machine.breakpoint(MAPPED + 5)
    cpu = load(machine, LOOP)
    for n in (5, 4):
        exit = cpu.run()
        assert exit.reason == libvm.ExitReason.BREAKPOINT and exit.address == cpu.rip == MAPPED + 5 and not exit.is_watchpoint
        assert cpu.rax == n and exit.access == libvm.Prot.X
    machine.breakpoint(MAPPED + 5, False)
    with pytest.raises(libvm.NotFoundError):
        machine.breakpoint(MAPPED + 5, on=False)
    assert cpu.run().reason == libvm.ExitReason.HALT


def test_watchpoints(machine):
    machine.watchpoint(0x2000, 4, "w")
    cpu = load(machine, LOOP)
    exit = cpu.run()
    assert exit.reason == libvm.ExitReason.BREAKPOINT and exit.is_watchpoint and exit.value == 5 and exit.bytes == 4
    assert exit.access == libvm.Prot.W and cpu.rip == MAPPED + 12
    machine.watchpoint(0x2000, 4, "w", False)
    with pytest.raises(libvm.InvalidError):
        machine.watchpoint(0x2000, 0)
    assert cpu.run().reason == libvm.ExitReason.HALT
