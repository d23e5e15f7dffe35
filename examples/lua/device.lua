-- device - a device in Lua: a port that prints, and registers in memory that count.
local libvm = require "libvm"
local m <close> = assert(libvm.machine())
assert(m:map_ram(0x1000, 0x1000))

local counter = { value = 0 }
function counter:read(offset, width) return offset == 0 and self.value or width end
function counter:write(offset, width, value) self.value = self.value + value end
assert(m:map_mmio(0x100000, 0x1000, counter))
assert(m:map_pio(0xe9, 1, { write = function(_, _, _, value) io.write(string.char(value)) end }))

-- add dword [0x100000], 20 (a read and a write of the device); mov eax, [0x100000]; out 0xe9, al, twice; hlt
assert(m:write(0x1000, "\x83\x04\x25\x00\x00\x10\x00\x14\x8b\x04\x25\x00\x00\x10\x00\xb0A\xe6\xe9\xb0\x0a\xe6\xe9\xf4"))
counter.value = 1
m.cpu:set_mode "flat64"
m.cpu.rip = 0x1000
print(assert(m.cpu:run()), counter.value)
