-- snapshot_fuzz - a fuzzer in a page: restore, write an input, run, look at the coverage; finds the input that crashes.
local libvm = require "libvm"
local INPUT <const> = 0x3000
local m <close> = assert(libvm.machine { backend = "interp" })    -- or "jit": KVM's guests run by themselves
assert(m:map_ram(0, "64K"))
-- The guest wants "VM!" at [rdi]: each right byte opens the next comparison, the last one executes UD2.
assert(m:write(0x1000, "\x80\x3f\x56\x75\x0f\x80\x7f\x01\x4d\x75\x09\x80\x7f\x02\x21\x75\x03\x0f\x0b\x90\xf4"))
local cpu, map, known = m.cpu, libvm.buffer(4096), {}
cpu:set_mode "flat64"
cpu.rip, cpu.rdi = 0x1000, INPUT
assert(m:coverage(map))
local state <close> = assert(m:snapshot())

local function crashes(input)
  assert(state:restore())
  assert(cpu:write(INPUT, input))
  return assert(cpu:run { max_instructions = 10000, exceptions = { 6 } }).reason == "exception"
end

local corpus, runs = { "AAA" }, 0
math.randomseed(1)
while true do
  local input = corpus[math.random(#corpus)]
  local at = math.random(#input)
  input = input:sub(1, at - 1) .. string.char(math.random(0, 255)) .. input:sub(at + 1)
  runs = runs + 1
  map:fill(0)
  if crashes(input) then
    print(("crash with %q after %d runs, %d inputs in the corpus"):format(input, runs, #corpus))
    break
  end
  local path = tostring(map)
  if not known[path] then
    known[path] = true
    table.insert(corpus, input)
  end
end
