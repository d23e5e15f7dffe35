-- snapshot_fuzz - a fuzzer in thirty lines: mutates an input, runs, keeps what reaches new edges, goes back to the snapshot.
local libvm = require "libvm"
local m <close> = assert(libvm.machine { backend = "jit" })
assert(m:map_ram(0x1000, 0x3000))
-- The target: cmp byte [0x2000], 'b'; jne out; cmp byte [0x2001], 'u'; jne out; cmp byte [0x2002], 'g'; jne out; ud2; out: hlt
assert(m:write(0x1000, "\x80\x3c\x25\x00\x20\x00\x00b\x75\x16\x80\x3c\x25\x01\x20\x00\x00u\x75\x0c" ..
                       "\x80\x3c\x25\x02\x20\x00\x00g\x75\x02\x0f\x0b\xf4"))
local cpu, map, seen = m.cpu, libvm.buffer(1024), {}
cpu:set_mode "flat64"
cpu.rip = 0x1000
assert(m:coverage(map))
local snapshot <close> = assert(m:snapshot())
local corpus, runs = { "aaa" }, 0
math.randomseed(1)
while true do
  local input = corpus[math.random(#corpus)]
  local at = math.random(#input)
  input = input:sub(1, at - 1) .. string.char(math.random(97, 122)) .. input:sub(at + 1)
  map:fill(0)
  m:write(0x2000, input)
  local exit = assert(cpu:run { exceptions = { 6 }, max_instructions = 1000 })
  runs = runs + 1
  if exit.reason == "exception" then
    print(("crash at %#x after %s runs: %q"):format(exit.rip, runs < 5000 and "a few" or "many", input))
    break
  end
  local path = tostring(map)
  if not seen[path] then
    seen[path] = true
    table.insert(corpus, input)
  end
  assert(snapshot:restore())
end
