"""mmu_strategy - how guest-virtual addresses become guest-physical ones, decided by a Python class."""

import libvm


class Mirror:
    """Everything appears again every 64 KiB, and the page at 0x8000 cannot be written."""

    def __init__(self):
        self.asked = 0

    def translate(self, cpu, gva, access, context):
        self.asked += 1
        gpa = gva % 0x10000
        if gpa >> 12 == 8 and access == libvm.Prot.W:
            return (3,)                         # a page fault with this error code: present, write
        return gpa, 4096, "rx" if gpa >> 12 == 8 else "rwx"


libvm.mmu_register("mirror", Mirror)
with libvm.Machine(backend="interp", mmu="mirror") as m:                # or "jit": with KVM the hardware translates
    m.map_ram(0, "64K")
    # mov byte [0x53000], 7; mov al, [0x3000]; mov byte [0x18000], 1; hlt
    m.write(0x1000, bytes.fromhex("c6042500300500 07 8a042500300000 c6042500800100 01 f4"))
    cpu = m.cpu
    cpu.set_mode("flat64")
    cpu.rip = 0x1000
    exit = cpu.run(exception_exits=[14])
    print(exit)
    print(f"al = {cpu.rax}, {m.stats('fills')} fills")
