"""hello - runs ten bytes of 64-bit code in a virtual machine and prints what came out."""

import libvm

with libvm.Machine() as m:
    m.map_ram(0x1000, "4K")
    m[0x1000:0x1009] = bytes.fromhex("48 8d 04 37 48 0f af c0 f4")      # lea rax, [rdi + rsi]; imul rax, rax; hlt
    cpu = m.cpu
    cpu.set_mode("flat64")
    cpu.rip, cpu.rdi, cpu.rsi = 0x1000, 2, 40
    exit = cpu.run()
    print(f"exit: {libvm.exit_name(exit.reason)}\nrax = {cpu.rax}\nrip = {cpu.rip:#x}")
