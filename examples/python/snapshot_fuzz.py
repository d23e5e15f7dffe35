"""snapshot_fuzz - a fuzzer in a page: restore, write an input, run, look at the coverage; finds the input that crashes."""

import random

import libvm

# The guest wants "VM!" at [rdi]: each right byte opens the next comparison, the last one executes UD2.
CODE = bytes.fromhex("803f56 750f 807f014d 7509 807f0221 7503 0f0b 90 f4")
INPUT = 0x3000


def crashes(cpu, state, data):
    state.restore()
    cpu.write(INPUT, data)
    return cpu.run(max_instructions=10000, exception_exits=[6]).reason == libvm.ExitReason.EXCEPTION


with libvm.Machine(backend="interp") as m:           # or "jit": KVM's guests run by themselves
    m.map_ram(0, "64K")
    m.write(0x1000, CODE)
    cpu = m.cpu
    cpu.set_mode("flat64")
    cpu.rip, cpu.rdi = 0x1000, INPUT
    edges = m.coverage(4096)
    state = m.snapshot()
    chance = random.Random(1)
    corpus, runs = [b"AAA"], 0
    known: set[int] = set()
    while True:
        runs += 1
        data = bytearray(chance.choice(corpus))
        data[chance.randrange(len(data))] = chance.randrange(256)
        edges[:] = bytes(len(edges))
        if crashes(cpu, state, data):
            break
        found = {i for i, count in enumerate(edges) if count} - known
        if found:
            known |= found
            corpus.append(bytes(data))
    print(f"crash with {bytes(data)!r} after {runs} runs, {len(corpus)} inputs in the corpus")
