"""hooks - watches a guest: blocks, writes, an exception that is skipped; a breakpoint and a watchpoint."""

import libvm

# mov ecx, 3; mov [0x3000], ecx; ud2; dec ecx; jnz -13; hlt
CODE = bytes.fromhex("b903000000 890c2500300000 0f0b ffc9 75f3 f4")

with libvm.Machine(backend="interp") as m:           # or "jit": KVM's guests run by themselves
    m.map_ram(0, "64K")
    m.write(0x1000, CODE)

    @m.on_block(0x1000, 0x1FFF)
    def block(cpu, event):
        print(f"block {event.address:#x}")

    @m.on_write
    def write(cpu, event):
        print(f"write of {event.value} to {event.address:#x}")

    @m.on_exception(6, 6)
    def undefined(cpu, event):
        return libvm.SKIP                       # it is not delivered, the guest goes on after the instruction

    cpu = m.cpu
    cpu.set_mode("flat64")
    cpu.rip = 0x1000
    print(cpu.run())

    block.hook.remove()
    write.hook.remove()
    m.breakpoint(0x100E)
    cpu.rip = 0x1000
    print(cpu.run())
    m.breakpoint(0x100E, on=False)
    m.watchpoint(0x3000, 4, "w")
    print(cpu.run())
