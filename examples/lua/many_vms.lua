-- many_vms - a thousand clones of one machine, each going its own way, by turns.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "interp" })
assert(m:map_ram(0x1000, 0x10000))
assert(m:write(0x1000, "\x48\x01\x3c\x25\x00\x20\x00\x00\xeb\xf6"))      -- again: add [0x2000], rdi; jmp again
m.cpu:set_mode "flat64"
m.cpu.rip = 0x1000
local count, clones = tonumber(arg[1]) or 100, {}
for i = 1, count do
  clones[i] = assert(m:fork())
  clones[i].cpu.rdi = i
end
for _ = 1, 3 do
  for _, clone in ipairs(clones) do assert(clone.cpu:run { max_instructions = 20 }) end
end
local sum = 0
for _, clone in ipairs(clones) do
  sum = sum + string.unpack("<I8", clone:read(0x2000, 8))
  clone:close()
end
print(("%d machines, sum %d"):format(count, sum))
