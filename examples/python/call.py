"""call - functions across the border: Python calls the guest's, the guest calls Python's."""

import libvm

with libvm.Machine() as m:
    m.map_ram(0, "64K")
    m.cpu.set_mode("flat64")
    m.cpu.rsp = 0x10000

    @m.hostcall(0x8000, "u64(u64,str)")
    def log(number, text):
        print(f"the guest says {text!r} with {number}")
        return number * 10

    m.write(0x4000, b"hello from inside\0")
    # sum(a, b): rdi += rsi; rsi = "hello..."; rax = log(rdi, rsi); return rax + 1
    m.write(0x1000, bytes.fromhex("4801f7 be00400000 b800800000 ffd0 48ffc0 c3"))
    total = m.cpu.function(0x1000, "u64(u64,u64)")
    print("sum:", total(2, 40))

    # fill(buffer, length, byte): rep stosb
    m.write(0x2000, bytes.fromhex("4889f1 89d0 f3aa c3"))
    buffer = bytearray(8)
    m.cpu.call(0x2000, "void(buf,u64,u8)", buffer, len(buffer), ord("x"))
    print("filled:", bytes(buffer))
