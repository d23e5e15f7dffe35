-- memory - maps, protects, reads and writes a guest's memory; a view without a copy; which pages the guest wrote.
local libvm = require "libvm"
local m <close> = assert(libvm.machine())
local ram = assert(m:map_ram(0, "64K"))
-- mov byte [0x3000], 42; mov byte [0x5000], 43; hlt
assert(m:write(0x1000, "\xc6\x04\x25\x00\x30\0\0\x2a\xc6\x04\x25\x00\x50\0\0\x2b\xf4"))
assert(m:protect(0x5000, 0x1000, "r"))
assert(m:dirty_log(true))
m.cpu:set_mode "flat64"
m.cpu.rip = 0x1000
print(assert(m.cpu:run()))                               -- the write to 0x5000 is not permitted
assert(m:protect(0x5000, 0x1000, "rw"))
print(assert(m.cpu:run()))                               -- now it is
for _, page in ipairs(m:dirty_fetch(0, "64K")) do print(("written: %#x"):format(page)) end
local view = ram:view()
print(("bytes: %d %d"):format(view:u8(0x3000), view:u8(0x5000)))
local _, message = m:read(0x10000, 1)
print(message)
