"""libvm - x86 virtual machines inside a program.

    import libvm

    with libvm.Machine() as m:
        m.map_ram(0x1000, 0x1000)
        m[0x1000:0x1009] = bytes.fromhex("48 8d 04 37 48 0f af c0 f4")
        cpu = m.cpu
        cpu.set_mode("flat64")
        cpu.rip, cpu.rdi, cpu.rsi = 0x1000, 2, 40
        print(cpu.run(), cpu.rax)

The names are those of the C interface without vm_; docs/api-parity.md in the sources has the table. Exits of a run are objects, not
exceptions; what the library refuses is a libvm.Error with its status and message.
"""

from __future__ import annotations

from _collections_abc import MutableMapping

from . import _libvm
from ._libvm import (
    MAX_VCPUS,
    BackendUnavailable,
    Binding,
    BusyError,
    CallError,
    ClosedError,
    Closure,
    Error,
    Event,
    ExistsError,
    Exit,
    FormatError,
    Gdb,
    GuestMemoryError,
    Hook,
    HostError,
    InternalError,
    InvalidError,
    MapError,
    NotFoundError,
    OutOfMemoryError,
    Region,
    RegisterFile,
    Ring,
    Snapshot,
    UnsupportedError,
    Violation,
    backend_name,
    coverage_id,
    errmsg,
    exit_name,
    mmu_names,
    mmu_register,
    query,
    reg_find,
    reg_name,
    reg_size,
    sandbox_calls,
    sandbox_enter,
    share_pages,
    signature_check,
    stat_names,
    strerror,
    trace_parse,
    version,
    version_number,
)

# Importing libvm is quick because what not every program needs (constants, typing) is imported when it is asked for.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Callable, Optional, TypeVar, Union

    from .constants import (
        Advice,
        Backend,
        CompareKind,
        EptAction,
        EventFlags,
        ExitReason,
        GdbAction,
        HookFlags,
        HookKind,
        HookResult,
        MmuContext,
        Mode,
        Platform,
        Prot,
        Reg,
        ReplayMode,
        SandboxFlags,
        SnapshotFlags,
        Status,
        TraceCategory,
    )
    from .guest import Guest, Many, linux

    HookFunction = Callable[["Vcpu", Event], Optional[int]]
    _F = TypeVar("_F", bound=Callable[..., Any])
    _D = TypeVar("_D")
    CONTINUE = HookResult.CONTINUE
    STOP = HookResult.STOP
    SKIP = HookResult.SKIP

__version__ = version()

_REGS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")


class Registers(MutableMapping):  # type: ignore[type-arg]
    """A vCPU's general registers, RIP and RFLAGS as a mapping; other registers can be asked for by name too."""

    __slots__ = ("_cpu",)

    def __init__(self, cpu: Vcpu) -> None:
        self._cpu = cpu

    def __getitem__(self, name: str) -> int:
        return self._cpu.read_reg(name)

    def __setitem__(self, name: str, value: int) -> None:
        self._cpu.write_reg(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("registers cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(_REGS)

    def __len__(self) -> int:
        return len(_REGS)

    def items(self) -> Any:
        return self._cpu.get_regs().items()

    def values(self) -> Any:
        return self._cpu.get_regs().values()

    def update(self, *args: Any, **registers: Any) -> None:
        """Sets several general registers in one call."""
        self._cpu.set_regs(*args, **registers)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name}={value:#x}" for name, value in self.items()) + "}"


class Vcpu(_libvm.Vcpu):
    """A processor. Registers are attributes (cpu.rax, cpu.cr3), cpu.xmm, cpu.ymm, cpu.st and cpu.mm are indexed."""

    __slots__ = ()

    @property
    def regs(self) -> Registers:
        """General registers, RIP and RFLAGS; assign a mapping to set several at once."""
        return Registers(self)

    @regs.setter
    def regs(self, values: Mapping[str, int]) -> None:
        self.set_regs(values)

    @property
    def sregs(self) -> dict[str, Any]:
        """System registers; assign a mapping to set some."""
        return self.get_sregs()

    @sregs.setter
    def sregs(self, values: Mapping[str, Any]) -> None:
        self.set_sregs(values)

    @property
    def fpu(self) -> dict[str, Any]:
        """x87, SSE and AVX state; assign a mapping to set some."""
        return self.get_fpu()

    @fpu.setter
    def fpu(self, values: Mapping[str, Any]) -> None:
        self.set_fpu(values)


class Console(_libvm.Console):
    """A serial port as a file: what the guest sends is read, what is written the guest receives. Somebody has to run the guest."""

    __slots__ = ()

    def read(self, count: int = -1) -> bytes:
        """What the guest has sent and nobody has read yet, at most `count` bytes; does not wait."""
        return self._take(count)

    def peek(self) -> bytes:
        """The same without reading it."""
        return self._take(-1, True)

    def readline(self, timeout: float | None = None) -> bytes:
        """The next line with its end; waits for it. TimeoutError when it does not come."""
        return self.wait_for("\n", timeout).encode("utf-8", "surrogateescape")

    def write(self, data: bytes | str) -> int:
        """Sends input; waits while the guest's queue is full."""
        if isinstance(data, str):
            data = data.encode()
        rest = memoryview(data)
        while len(rest):
            taken = self.machine.serial_input(self.index, rest)
            rest = rest[taken:]
            if len(rest):
                import time

                time.sleep(0.001)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def wait_for(self, what: Any, timeout: float | None = None) -> str:
        """Waits until the guest has sent `what`, a text, bytes or a compiled regular expression, and reads up to its end.

        What was read is returned as text. TimeoutError (with what there is in its message) when it does not come in time, ClosedError
        when the machine is closed meanwhile.
        """
        import time

        end = None if timeout is None else time.monotonic() + timeout
        search = _searcher(what)
        while True:
            have = self._take(-1, True)
            found = search(have)
            if found is not None:
                return self._take(found).decode("utf-8", "surrogateescape")
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{what!r} did not come within {timeout} s; the console has {have[-400:]!r}")
            self._wait(len(have), left)
            if self.machine.closed:
                raise ClosedError(f"the machine was closed while waiting for {what!r}")


def _searcher(what: Any) -> Callable[[bytes], Optional[int]]:
    if isinstance(what, (str, bytes)):
        needle = what.encode() if isinstance(what, str) else what
        seen = 0

        def find(data: bytes) -> Optional[int]:
            nonlocal seen
            at = data.find(needle, max(0, seen - len(needle)))
            seen = len(data)
            return None if at < 0 else at + len(needle)

        return find

    def match(data: bytes) -> Optional[int]:
        if isinstance(what.pattern, bytes):
            m = what.search(data)
            return m.end() if m else None
        text = data.decode("utf-8", "surrogateescape")
        m = what.search(text)
        return len(text[: m.end()].encode("utf-8", "surrogateescape")) if m else None

    if not hasattr(what, "search"):
        raise TypeError(f"wait_for() takes text, bytes or a regular expression, not {what!r}")
    return match


class _FunctionDevice:
    """A device made of one function fn(cpu, offset, width, value): value is None for a read."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def read(self, cpu: Vcpu, offset: int, width: int) -> Any:
        return self.fn(cpu, offset, width, None)

    def write(self, cpu: Vcpu, offset: int, width: int, value: int) -> Any:
        return self.fn(cpu, offset, width, value)


def _device(what: Any) -> Any:
    if isinstance(what, type):
        return what()
    if hasattr(what, "read") or hasattr(what, "write"):
        return what
    return _FunctionDevice(what)


class Machine(_libvm.Machine):
    """A virtual machine; see the C headers for what each function does. Use it in a `with` statement.

    Decorators add callbacks: @m.on_block(begin, end), @m.on_read(begin, end), @m.mmio(base, size), @m.hostcall(address, signature)...
    They give back what they decorate, with the handle as its attribute `hook`, `region` or `binding` where it can have one.
    """

    @property
    def console(self) -> Console:
        """The first serial port as a file."""
        return self.serial(0)

    # ---- hooks ----

    def _on(self, kind: str, begin: Any, end: int, flags: int) -> Any:
        if callable(begin):  # @m.on_block without parentheses
            return self._on(kind, 0, 0, 0)(begin)

        from .constants import HookKind

        def decorate(fn: _F) -> _F:
            _attach(fn, "hook", self.hook_add(HookKind[kind], fn, begin, end, flags))
            return fn

        return decorate

    def on_insn(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Before each instruction in [begin, end]."""
        return self._on("INSN", begin, end, flags)

    def on_block(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Before the first instruction of each block."""
        return self._on("BLOCK", begin, end, flags)

    def on_edge(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """The same, with the instruction that led there in event.source."""
        return self._on("EDGE", begin, end, flags)

    def on_read(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Data read by an instruction."""
        return self._on("MEM_READ", begin, end, flags)

    def on_write(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Data written by an instruction."""
        return self._on("MEM_WRITE", begin, end, flags)

    def on_fetch(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Instructions any byte of which lies in [begin, end]."""
        return self._on("FETCH", begin, end, flags)

    def on_exception(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Exceptions with vectors in [begin, end], before they are delivered."""
        return self._on("EXCEPTION", begin, end, flags)

    def on_interrupt(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Interrupts with vectors in [begin, end]."""
        return self._on("INTERRUPT", begin, end, flags)

    def on_syscall(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """SYSCALL and SYSENTER instructions."""
        return self._on("SYSCALL", begin, end, flags)

    def on_cpuid(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """CPUID of the leaves in [begin, end]."""
        return self._on("CPUID", begin, end, flags)

    def on_msr(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """RDMSR and WRMSR of the MSRs in [begin, end]."""
        return self._on("MSR", begin, end, flags)

    def on_port(self, begin: int | HookFunction = 0, end: int = 0, flags: int = 0) -> Any:
        """Accesses to the ports in [begin, end]."""
        return self._on("PORT", begin, end, flags)

    def on_violation(self, fn: _F) -> _F:
        """Accesses that a view of strategy "ept" forbids."""
        self.ept_on_violation(fn)
        return fn

    # ---- devices ----

    def mmio(self, gpa: int, size: Union[int, str]) -> Callable[[_D], _D]:
        """A device at guest-physical memory: a class, an object, or a function fn(cpu, offset, width, value)."""

        def decorate(device: _D) -> _D:
            _attach(device, "region", self.map_mmio(gpa, size, _device(device)))
            return device

        return decorate

    def pio(self, port: int, count: int = 1) -> Callable[[_D], _D]:
        """The same for ports."""

        def decorate(device: _D) -> _D:
            _attach(device, "region", self.map_pio(port, count, _device(device)))
            return device

        return decorate

    # ---- calls ----

    def hostcall(self, address: int, signature: str) -> Callable[[_F], _F]:
        """The guest calls the function at a linear address: @m.hostcall(0x5000, "u64(ptr,u32)")."""

        def decorate(fn: _F) -> _F:
            _attach(fn, "binding", self.bind_function(address, signature, fn))
            return fn

        return decorate

    def hypercall(self, number: int, signature: str) -> Callable[[_F], _F]:
        """The guest calls the function by VMCALL or VMMCALL."""

        def decorate(fn: _F) -> _F:
            _attach(fn, "binding", self.bind_hypercall(number, signature, fn))
            return fn

        return decorate


def _attach(what: Any, name: str, handle: Any) -> None:
    try:
        setattr(what, name, handle)
    except (AttributeError, TypeError):
        pass  # a builtin, a bound method


_libvm._set_classes(Machine, Vcpu, Console)


def __getattr__(name: str) -> Any:
    import importlib

    module = importlib.import_module("libvm.guest" if name in ("linux", "Guest", "Many") else "libvm.constants")
    if name in ("CONTINUE", "STOP", "SKIP"):
        value = module.HookResult[name]
    elif name in module.__all__:
        value = getattr(module, name)
    else:
        raise AttributeError(f"module 'libvm' has no attribute '{name}'")
    globals()[name] = value
    return value


__all__ = [
    "CONTINUE", "MAX_VCPUS", "SKIP", "STOP", "Advice", "Backend", "BackendUnavailable", "Binding", "BusyError", "CallError", "ClosedError",
    "Closure", "CompareKind", "Console", "EptAction", "Error", "Event", "EventFlags", "ExistsError", "Exit", "ExitReason", "FormatError",
    "Gdb", "GdbAction", "Guest", "GuestMemoryError", "Hook", "HookFlags", "HookKind", "HookResult", "HostError", "InternalError",
    "InvalidError", "Machine", "Many", "MapError", "MmuContext", "Mode", "NotFoundError", "OutOfMemoryError", "Platform", "Prot", "Reg", "Region",
    "RegisterFile", "Registers", "ReplayMode", "Ring", "SandboxFlags", "Snapshot", "SnapshotFlags", "Status", "TraceCategory", "UnsupportedError", "Vcpu",
    "Violation", "backend_name", "coverage_id", "errmsg", "exit_name", "linux", "mmu_names", "mmu_register", "query", "reg_find",
    "reg_name", "reg_size", "sandbox_calls", "sandbox_enter", "share_pages", "signature_check", "stat_names", "strerror", "trace_parse", "version", "version_number",
]
