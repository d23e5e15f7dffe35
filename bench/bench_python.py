#!/usr/bin/env python3
"""bench_python - what the Python binding costs, beside python3-unicorn where that is installed. `make bench-python`; a file named on the
command line gets the figures as JSON.

Each figure is the best of several short runs. Ratios are libvm's rate by Unicorn's.
"""
import ctypes
import json
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

    return best(run, 20, 300)         # wall time: short runs fit between other programs' turns


def uc_life():
    def run(count):
        for _ in range(count):
            u = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
            u.mem_map(BASE, 4096)
            u.mem_write(BASE, b"\x90")
            u.emu_start(BASE, BASE + 1)

    return best(run, 10, 100)


def import_time():
    code = "import time; t = time.perf_counter(); import libvm; print(time.perf_counter() - t)"
    return min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(10))


def cpu_time(work):
    """CPU time of calling each function once."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def plain_run(m):
    """A function that runs the machine's first vCPU from C alone, past the binding: the CPU time of that is the guest's."""
    with open("/proc/self/maps") as maps:               # the library that the module has loaded
        c = ctypes.CDLL(next(line.split()[-1] for line in maps if "/libvm.so" in line))
    c.vm_vcpu_get.restype = ctypes.c_void_p
    inside = ctypes.c_void_p.from_address(id(m) + object.__basicsize__)         # pv_machine.m, see src/pv.h
    cpu = ctypes.c_void_p(c.vm_vcpu_get(inside, 0))
    return lambda: c.vm_vcpu_run(cpu, None, None)


def parallel_overhead():
    """CPU time of eight guests in eight threads, run by the binding, against that of the same guests run by C alone, in percent."""
    # A long block: the time of a short one depends on where its thread's stack happens to lie.
    code = bytes.fromhex("b900008000" + "4801c8" "4831d0" * 16 + "ffc9 759c f4")      # mov ecx, n; again: ...; dec ecx; jnz again; hlt
    machines = [machine(code) for _ in range(8)]

    def together(runs):
        threads = [threading.Thread(target=run) for run in runs]
        for m in machines:
            m.cpu.rip = BASE
        return cpu_time(lambda: ([t.start() for t in threads], [t.join() for t in threads]))

    pairs = [(together([m.cpu.run for m in machines]), together(map(plain_run, machines))) for _ in range(7)]
    return (min(mine for mine, _ in pairs) / min(plain for _, plain in pairs) - 1) * 100


FIGURES = {}


def show(what, mine, theirs, unit, goal):
    FIGURES[what] = mine
    ratio = "  (no python3-unicorn)"
    if unicorn:
        FIGURES[what + ", Unicorn"] = theirs()
        ratio = f"{mine / FIGURES[what + ', Unicorn']:8.2f}x of Unicorn's (goal {goal})"
    print(f"{what:42} {mine / 1e6:8.3f} M{unit}/s {ratio}", flush=True)


def main():
    show("block hooks", block_hooks(), uc_block_hooks, "calls", "2x")
    show("register reads", register_reads(), uc_register_reads, "reads", "5x")
    show("runs of ten instructions", snippets(), uc_snippets, "runs", "2x")
    ours, theirs = 1e6 / life(), 1e6 / uc_life() if unicorn else None
    print(f"{'create, map, write, run, close':42} {ours:8.1f} us" + (f", Unicorn's {theirs:.1f} us" if theirs else "") + " (goal 60)")
    imported, overhead = import_time() * 1e3, parallel_overhead()
    print(f"{'import libvm':42} {imported:8.1f} ms (goal 20)")
    print(f"{'eight guests in eight threads':42} {overhead:+8.1f} % CPU time more than the guests' own (goal below 2 %)")
    FIGURES.update({"life, us": ours, "import, ms": imported, "threads, %": overhead} | ({"life, Unicorn, us": theirs} if theirs else {}))
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as f:
            json.dump(FIGURES, f, indent=1)


if __name__ == "__main__":
    main()
