-- coverage - which edges and blocks a program takes, and what it compares with, without a callback.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "jit" })
assert(m:map_ram(0x1000, 0x1000))
-- cmp edi, 0x1234; je yes; hlt; yes: nop; hlt
assert(m:write(0x1000, "\x81\xff\x34\x12\x00\x00\x74\x01\xf4\x90\xf4"))
local cpu = m.cpu
local map <const> = libvm.buffer(65536)
assert(m:coverage(map))
local compared = assert(cpu:compare_log(1024))
local blocks = assert(cpu:block_trace(1024))

local function run(input)
  map:fill(0)
  cpu:set_mode "flat64"
  cpu.rip, cpu.rdi = 0x1000, input
  assert(cpu:run())
  local edges = 0
  for i = 0, #map - 1 do edges = edges + (map:u8(i) > 0 and 1 or 0) end
  print(("input %#x: %d edges"):format(input, edges))
  for _, address in ipairs((blocks:fetch())) do print(("  block %#x"):format(address)) end
  local _, first = next((compared:fetch()))
  return first.b                         -- what the program wanted to see
end
run(run(0))
