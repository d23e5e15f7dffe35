-- hello - runs ten bytes of 64-bit code in a virtual machine and prints what came out.
local libvm = require "libvm"
local m <close> = assert(libvm.machine())
assert(m:map_ram(0x1000, 0x1000, "rwx"))
assert(m:write(0x1000, "\x48\x8d\x04\x37" ..             -- lea rax, [rdi + rsi]
                       "\x48\x0f\xaf\xc0\xf4"))          -- imul rax, rax; hlt
local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rip, cpu.rdi, cpu.rsi = 0x1000, 2, 40
local exit = assert(cpu:run())
print(("exit: %s\nrax = %d\nrip = %#x"):format(exit.reason, cpu.rax, cpu.rip))
