"""device - a device written in Python: a counter at a memory address, and a port that prints."""

import libvm

with libvm.Machine() as m:
    m.map_ram(0, "64K")

    @m.mmio(0x80000, 8)
    class Counter:
        value = 0

        def read(self, cpu, offset, width):
            self.value += 1
            return self.value

        def write(self, cpu, offset, width, value):
            self.value = value

    @m.pio(0xE9)
    def printer(cpu, offset, width, value):
        if value is None:
            return 0xE9
        print("the guest says", repr(chr(value)))

    # mov dword [0x80000], 40; mov eax, [0x80000]; mov eax, [0x80000]; out 0xe9, al; hlt
    m.write(0x1000, bytes.fromhex("c7042500000800 28000000 8b042500000800 8b042500000800 e6e9 f4"))
    m.cpu.set_mode("flat64")
    m.cpu.rip = 0x1000
    print(m.cpu.run())
    print("rax =", m.cpu.rax)
