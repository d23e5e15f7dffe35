-- device - a device written in Lua: a counter at a memory address, and a port that prints.
local libvm = require "libvm"
local m <close> = assert(libvm.machine())
assert(m:map_ram(0, "64K"))

local counter = { value = 0 }
function counter:read(offset, width)
  self.value = self.value + 1
  return self.value
end
function counter:write(offset, width, value) self.value = value end
assert(m:map_mmio(0x80000, 0x1000, counter))
assert(m:map_pio(0xe9, 1, {
  write = function(_, offset, width, value) print(("the guest says '%c'"):format(value)) end,
}))

-- mov dword [0x80000], 40; mov eax, [0x80000]; mov eax, [0x80000]; out 0xe9, al; hlt
assert(m:write(0x1000, "\xc7\x04\x25\x00\x00\x08\x00\x28\0\0\0\x8b\x04\x25\x00\x00\x08\x00\x8b\x04\x25\x00\x00\x08\x00\xe6\xe9\xf4"))
m.cpu:set_mode "flat64"
m.cpu.rip = 0x1000
print(assert(m.cpu:run()))
print("rax = " .. m.cpu.rax)
