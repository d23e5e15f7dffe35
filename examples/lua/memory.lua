-- memory - RAM that the machine owns, RAM of the program, permissions, and which pages the guest wrote.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "interp" })
assert(m:map_ram(0x1000, "4K", "rx"))                    -- code
local shared = libvm.buffer(0x4000)
assert(m:map_host(0x10000, shared, "rw"))                -- the buffer's own pages
-- mov rax, [0x10000]; add rax, 1; mov [0x12000], rax; mov [0x1000], al
assert(m:write(0x1000, "\x48\x8b\x04\x25\x00\x00\x01\x00\x48\xff\xc0\x48\x89\x04\x25\x00\x20\x01\x00\x88\x04\x25\x00\x10\x00\x00"))
for region in m:regions() do print(region) end
m:dirty_log(true)
shared:u64(0, 41)
m.cpu:set_mode "flat64"
m.cpu.rip = 0x1000
local exit = assert(m.cpu:run())
print(("the guest wrote %d"):format(shared:u64(0x2000)))
print(exit)                                              -- the code page cannot be written
for _, page in ipairs(m:dirty_fetch(0x10000, 0x4000)) do print(("dirty: %#x"):format(page)) end
