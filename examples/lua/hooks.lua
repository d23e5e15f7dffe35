-- hooks - watches a guest: blocks, writes, an exception that is skipped; a breakpoint and a watchpoint.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "interp" })    -- or "jit": KVM's guests run by themselves
assert(m:map_ram(0, "64K"))
-- mov ecx, 3; again: mov [0x3000], ecx; ud2; dec ecx; jnz again; hlt
assert(m:write(0x1000, "\xb9\x03\0\0\0\x89\x0c\x25\x00\x30\0\0\x0f\x0b\xff\xc9\x75\xf3\xf4"))
local blocks = assert(m:hook("block", function(cpu, address) print(("block %#x"):format(address)) end, { begin = 0x1000, last = 0x1fff }))
local writes = assert(m:hook("mem_write", function(cpu, address, bytes, value) print(("write of %d to %#x"):format(value, address)) end))
-- It is not delivered, the guest goes on after the instruction.
assert(m:hook("exception", function() return "skip" end, { begin = 6, last = 6 }))

local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rip = 0x1000
print(assert(cpu:run()))

blocks:remove()
writes:remove()
assert(m:breakpoint(0x100e))
cpu.rip = 0x1000
print(assert(cpu:run()))
assert(m:breakpoint(0x100e, false))
assert(m:watchpoint(0x3000, 4, "w"))
print(assert(cpu:run()))
