-- hooks - watches a loop: its blocks, its stores, and stops it at the fifth round.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "jit" })
assert(m:map_ram(0x1000, 0x2000))
-- mov ecx, 10; again: mov [0x2000], ecx; dec ecx; jnz again; hlt
assert(m:write(0x1000, "\xb9\x0a\x00\x00\x00\x89\x0c\x25\x00\x20\x00\x00\xff\xc9\x75\xf5\xf4"))
local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rip = 0x1000

local blocks = 0
local hook = assert(m:hook("block", function() blocks = blocks + 1 end))
assert(m:hook("mem_write", function(_, address, bytes, value)
  print(("%d bytes to %#x: %d"):format(bytes, address, value))
end, { begin = 0x2000, last = 0x2fff }))
local stop = assert(m:hook("insn", function(who) if who.rcx == 5 then return "stop" end end, { begin = 0x1005 }))

print(assert(cpu:run()), "rcx", cpu.rcx)
stop:remove()
print(assert(cpu:run()), "blocks", blocks)
hook:remove()
