#!/usr/bin/env python3
"""bench_python - what the Python binding costs, beside python3-unicorn where that is installed. `make bench-python`.

Each figure is the best of several short runs. Ratios are libvm's rate by Unicorn's.
"""
import subprocess
import sys
import threading
import time

import libvm

try:
    import unicorn
    from unicorn import x86_const
except ImportError:
    unicorn = None

BASE = 0x1000
LOOP = bytes.fromhex("ffc9 75fc f4")                # dec ecx; jnz; hlt: a block an iteration
TEN = bytes.fromhex("48ffc0" * 9 + "90")            # ten instructions


def best(fn, count, runs=5, clock=time.perf_counter):
    """The highest rate in `runs` runs of fn(count)."""
    rates = []
    for _ in range(runs):
        begin = clock()
        fn(count)
        rates.append(count / (clock() - begin))
    return max(rates)


def machine(code):
    m = libvm.Machine(backend="jit")
    m.map_ram(BASE, "64K")
    m.write(BASE, code)
    m.cpu.set_mode("flat64")
    m.cpu.rip = BASE
    return m


def uc(code):
    u = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    u.mem_map(BASE, 0x10000)
    u.mem_write(BASE, code)
    return u


def block_hooks():
    m, cpu = machine(LOOP), None
    cpu = m.cpu
    m.hook_add(libvm.HookKind.BLOCK, lambda cpu, event: None)

    def run(count):
        cpu.rip, cpu.rcx = BASE, count
        cpu.run()

    return best(run, 300000)


def uc_block_hooks():
    u = uc(LOOP)
    u.hook_add(unicorn.UC_HOOK_BLOCK, lambda uc, address, size, data: None)

    def run(count):
        u.reg_write(x86_const.UC_X86_REG_RCX, count)
        u.emu_start(BASE, BASE + 4)

    return best(run, 100000)


def register_reads():
    cpu = machine(LOOP).cpu

    def run(count):
        for _ in range(count):
            cpu.rax

    return best(run, 500000)


def uc_register_reads():
    u, rax = uc(LOOP), x86_const.UC_X86_REG_RAX

    def run(count):
        for _ in range(count):
            u.reg_read(rax)

    return best(run, 200000)


def snippets():
    cpu = machine(TEN + b"\xf4").cpu
    end = BASE + len(TEN)

    def run(count):
        for _ in range(count):
            cpu.rip = BASE
            cpu.run(until=end)

    return best(run, 100000)


def uc_snippets():
    u, end = uc(TEN), BASE + len(TEN)

    def run(count):
        for _ in range(count):
            u.emu_start(BASE, end)

    return best(run, 50000)


def life():
    def run(count):
        for _ in range(count):
            with libvm.Machine(backend="jit") as m:
                m.map_ram(BASE, 4096)
                m.write(BASE, b"\xf4")
                cpu = m.cpu
                cpu.set_mode("flat64")
                cpu.rip = BASE
                cpu.run()

    return best(run, 500, 10, time.process_time)


def uc_life():
    def run(count):
        for _ in range(count):
            u = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
            u.mem_map(BASE, 4096)
            u.mem_write(BASE, b"\x90")
            u.emu_start(BASE, BASE + 1)

    return best(run, 300, clock=time.process_time)


def import_time():
    code = "import time; t = time.perf_counter(); import libvm; print(time.perf_counter() - t)"
    return min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(10))


def guest_work(cpus, timed):
    """CPU time of running the guests once, each on a thread of its own with the GIL free, or one after the other from C's view."""
    threads = [threading.Thread(target=cpu.run) for cpu in cpus]
    begin = time.process_time()
    for thread in threads:
        thread.start()
        if not timed:
            thread.join()
    for thread in threads:
        thread.join()
    return time.process_time() - begin


def parallel_overhead():
    """CPU time of eight guests in eight threads at once against the same guests one by one."""
    code = bytes.fromhex("b900000004 01c8 ffc9 75fa f4")

    def cpus():
        made = []
        for _ in range(8):
            made.append(machine(code).cpu)
        return made

    together = min(guest_work(cpus(), True) for _ in range(5))
    alone = min(guest_work(cpus(), False) for _ in range(5))
    return (together / alone - 1) * 100


def show(what, mine, theirs, unit, goal):
    ratio = f"{mine / theirs():8.2f}x of Unicorn's (goal {goal})" if unicorn else "  (no python3-unicorn)"
    print(f"{what:42} {mine / 1e6:8.3f} M{unit}/s {ratio}", flush=True)


def main():
    show("block hooks", block_hooks(), lambda: uc_block_hooks(), "calls", "2x")
    show("register reads", register_reads(), lambda: uc_register_reads(), "reads", "5x")
    show("runs of ten instructions", snippets(), lambda: uc_snippets(), "runs", "2x")
    ours = life()
    print(f"{'create, map, write, run, close':42} {1e6 / ours:8.1f} us of CPU time" + (f", Unicorn's {1e6 / uc_life():.1f} us" if unicorn else "") + " (goal 60)")
    print(f"{'import libvm':42} {import_time() * 1e3:8.1f} ms (goal 20)")
    print(f"{'eight guests in eight threads':42} {parallel_overhead():+8.1f} % CPU time against one by one (goal below 2 %)")


if __name__ == "__main__":
    main()
