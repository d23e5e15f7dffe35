"""call - functions across the border: Python calls the guest's, the guest calls Python's."""

import libvm

HOST_SQUARE = 0x5000000                         # where the guest has nothing

with libvm.Machine() as m:
    m.map_ram(0, "64K")
    # u64 twice_plus(u64 x, u64 (*fn)(u64)): sub rsp, 8; call rsi; lea rax, [rax + rax + 1]; add rsp, 8; ret
    m.write(0x1000, bytes.fromhex("4883ec08 ffd6 488d440001 4883c408 c3"))
    cpu = m.cpu
    cpu.set_mode("flat64")
    cpu.rsp = 0x8000

    @m.hostcall(HOST_SQUARE, "u64(u64)")
    def square(x):
        print(f"host: square({x})")
        return x * x

    print("guest: twice_plus(12, square) =", cpu.call(0x1000, "u64(u64, ptr)", 12, HOST_SQUARE))
    twice_plus = cpu.function(0x1000, "u64(u64, ptr)")                  # the same as a Python function
    print("guest: twice_plus(5, square) =", twice_plus(5, HOST_SQUARE))
