-- coverage - what a guest went through, recorded without callbacks: edges, blocks, comparisons.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "interp" })    -- or "jit": KVM's guests run by themselves
assert(m:map_ram(0, "64K"))
-- cmp al, 5; je +4; mov bl, 1; jmp +2; mov bl, 2; hlt
assert(m:write(0x1000, "\x3c\x05\x74\x04\xb3\x01\xeb\x02\xb3\x02\xf4"))
local cpu, map = m.cpu, libvm.buffer(65536)
assert(m:coverage(map))
local blocks, compares = assert(cpu:block_trace(64)), assert(cpu:compare_log(64))
for al = 1, 9, 4 do
  map:fill(0)
  cpu:set_mode "flat64"
  cpu.rip, cpu.rax = 0x1000, al
  assert(cpu:run())
  local edges, line = 0, ""
  for i = 0, #map - 1 do edges = edges + (map:u8(i) > 0 and 1 or 0) end
  for _, address in ipairs((blocks:fetch())) do line = line .. (" %#x"):format(address) end
  print(("al = %d: %d edges, blocks%s"):format(al, edges, line))
end
for _, c in ipairs((compares:fetch())) do print(("%#x: %d with %d"):format(c.address, c.a, c.b)) end
