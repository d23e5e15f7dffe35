"""guest.py - guests for tests: a machine that runs on threads of its own, and its console.

    with libvm.linux("vmlinuz", "initramfs", memory="256M") as vm:
        vm.wait_for("/ #")
        print(vm.shell("uname -a"))
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Callable, Optional, Union

from . import ClosedError, Console, Error, Exit, Machine
from .constants import ExitReason

_ENDS = (ExitReason.POWEROFF, ExitReason.GUEST_EXIT, ExitReason.SHUTDOWN, ExitReason.HALT, ExitReason.RESET, ExitReason.INTERNAL)
_PROMPT = re.compile(r"[#$] (?:\x1b\[6n)?$")


class Guest:
    """A machine whose vCPUs run on threads until the guest ends, stop() or the end of the `with` block.

    exit is the record that ended it, error the exception that did (raised by wait() and at the end of the block).
    """

    def __init__(self, machine: Machine, prompt: Union[str, re.Pattern[str]] = _PROMPT) -> None:
        self.machine = machine
        self.console: Console = machine.console
        self.prompt = prompt
        self.exit: Optional[Exit] = None
        self.error: Optional[BaseException] = None
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._shells = 0

    def start(self) -> Guest:
        """Runs every vCPU on a thread of its own."""
        if self._threads:
            raise Error("the guest is running")
        self._over.clear()
        self._threads = [threading.Thread(target=self._run, args=(cpu,), daemon=True, name=f"libvm-vcpu-{cpu.index}")
                         for cpu in self.machine.vcpus]
        for thread in self._threads:
            thread.start()
        return self

    def _run(self, cpu: Any) -> None:
        try:
            while not self._over.is_set():
                exit = cpu.run()
                if exit.reason in _ENDS:
                    self._end(exit, None)
        except ClosedError:
            self._end(None, None)
        except BaseException as error:  # noqa: B902 - handed to whoever waits
            self._end(None, error)

    def _end(self, exit: Optional[Exit], error: Optional[BaseException]) -> None:
        with self._lock:
            if not self._over.is_set():
                self.exit, self.error = exit, error
            self._over.set()
        try:
            for cpu in self.machine.vcpus:
                cpu.kick()
        except ClosedError:
            pass

    def stop(self) -> None:
        """Stops the vCPUs; start() lets them go on."""
        me = threading.current_thread()
        self._over.set()
        for cpu in self.machine.vcpus if not self.machine.closed else ():
            cpu.kick()
        for thread in self._threads:
            if thread is not me:
                thread.join()
        self._threads = []

    @property
    def running(self) -> bool:
        return bool(self._threads) and not self._over.is_set()

    def wait(self, timeout: Optional[float] = None) -> Optional[Exit]:
        """Waits until the guest ends: its last exit. TimeoutError if it does not."""
        if not self._over.wait(timeout):
            raise TimeoutError(f"the guest has not ended within {timeout} s")
        if self.error:
            raise self.error
        return self.exit

    def wait_for(self, what: Any, timeout: Optional[float] = 120.0) -> str:
        """Waits until the guest has sent `what` (text, bytes, or a regular expression) and returns all up to there."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                # In steps, so that a guest that has died is noticed.
                return self.console.wait_for(what, 0.25 if left is None else min(left, 0.25))
            except TimeoutError:
                if self.error:
                    raise self.error
                if self._over.is_set():
                    raise TimeoutError(f"the guest ended ({self.exit}) without {what!r}: {self.console.peek()[-400:]!r}") from None
                if left is not None and left <= 0.25:
                    raise

    def send(self, text: Union[str, bytes]) -> None:
        """Types something."""
        self.console.write(text)

    def shell(self, command: str, timeout: Optional[float] = 120.0) -> str:
        """Runs a command in the guest's shell (which shows its prompt, or is about to) and returns what it wrote."""
        return self.run(command, timeout)[1]

    def run(self, command: str, timeout: Optional[float] = 120.0) -> tuple[int, str]:
        """The same: the command's status and what it wrote."""
        self._shells += 1
        begin, end = f"<begin {self._shells}>", f"<end {self._shells}>"
        # The marks are put together by the shell, so that the echo of the line is not taken for them.
        line = f"echo '<begin' '{self._shells}>'; {command}\necho \"<end\" \"{self._shells}>\" $?\n"
        self.send(line)
        self.wait_for(begin, timeout)
        text = self.wait_for(re.compile(re.escape(end) + r" (\d+)\r?\n"), timeout)
        found = re.search(re.escape(end) + r" (\d+)\r?\n", text)
        assert found
        lines = text[: found.start()].replace("\r\n", "\n").split("\n")
        lines = [line for line in lines[1:] if not line.rstrip().endswith(f'echo "<end" "{self._shells}>" $?')]
        output = "\n".join(lines)
        prompt = self.prompt.search(output) if isinstance(self.prompt, re.Pattern) else None
        if prompt:
            output = output[: output.rfind("\n", 0, prompt.start()) + 1]
        return int(found.group(1)), output.strip("\n")

    def close(self) -> None:
        """Ends the guest and its machine."""
        self._over.set()
        self.machine.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []

    def __enter__(self) -> Guest:
        if not self._threads:
            self.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self.close()
        if self.error and value is None:
            raise self.error


def linux(kernel: Union[str, os.PathLike[str]], initrd: Union[str, os.PathLike[str], None] = None, cmdline: str = "console=ttyS0 quiet",
          *, memory: Union[int, str] = "256M", vcpus: int = 1, backend: str = "auto", start: bool = True, **options: Any) -> Guest:
    """A Linux guest on a PC, started."""
    machine = Machine(platform="pc", memory=memory, vcpus=vcpus, backend=backend, **options)
    try:
        guest = Guest(machine)
        machine.boot_image(kernel=os.fspath(kernel), initrd=None if initrd is None else os.fspath(initrd), cmdline=cmdline)
        return guest.start() if start else guest
    except BaseException:
        machine.close()
        raise


class Many:
    """Several guests at once: `with Many(make() for i in range(8)) as vms: vms.map(lambda vm: vm.shell("uname"))`."""

    def __init__(self, guests: Iterable[Guest]) -> None:
        self.guests = list(guests)

    def map(self, fn: Callable[[Guest], Any]) -> list[Any]:
        """fn(guest) for all of them, each on a thread; results in order, or the first exception."""
        results: list[Any] = [None] * len(self.guests)
        errors: list[BaseException] = []

        def work(i: int) -> None:
            try:
                results[i] = fn(self.guests[i])
            except BaseException as error:  # noqa: B902 - raised below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(self.guests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def __iter__(self) -> Iterator[Guest]:
        return iter(self.guests)

    def __len__(self) -> int:
        return len(self.guests)

    def close(self) -> None:
        for guest in self.guests:
            guest.close()

    def __enter__(self) -> Many:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()


__all__ = ["Guest", "Many", "linux"]
