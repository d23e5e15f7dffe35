"""coverage - what a guest went through, recorded without callbacks: edges, blocks, comparisons."""

import libvm

# cmp al, 5; je +4; mov bl, 1; jmp +2; mov bl, 2; hlt
CODE = bytes.fromhex("3c05 7404 b301 eb02 b302 f4")

with libvm.Machine(backend="interp") as m:           # or "jit": KVM's guests run by themselves
    m.map_ram(0, "64K")
    m.write(0x1000, CODE)
    edges = m.coverage(65536)
    cpu = m.cpu
    blocks, compares = cpu.block_trace(1024), cpu.compare_log(64)
    for value in (1, 5, 9):
        cpu.set_mode("flat64")
        cpu.rip, cpu.rax = 0x1000, value
        edges[:] = bytes(len(edges))
        cpu.run()
        print(f"al = {value}: {sum(count != 0 for count in edges)} edges, blocks", *map(hex, blocks.take()))
    for address, kind, width, is_constant, a, b in compares.take():
        print(f"{address:#x}: {a} with {b}")
