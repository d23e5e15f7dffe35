-- bench_lua - what the Lua binding costs: callbacks, registers, short runs, machines. Figures are the best of several rounds.
--
--   LUA_CPATH=BUILD/bindings/lua/.libs/?.so lua5.4 bench/bench_lua.lua [JSON]
local libvm = require "libvm"
local results = {}

local function clock()
  return os.clock()
end

-- The best of `rounds` runs of f, which returns how many things it did.
local function best(name, unit, rounds, f)
  local top = 0
  for _ = 1, rounds do
    local start = clock()
    local n = f()
    local rate = n / (clock() - start)
    if rate > top then top = rate end
  end
  table.insert(results, { name = name, value = top })
  print(("%-34s %10.3f M/s  %9.1f ns each  %s"):format(name, top / 1e6, 1e9 / top, unit))
end

local function machine(code)
  local m = assert(libvm.machine { backend = "jit" })
  assert(m:map_ram(0x1000, 0x4000))
  assert(m:write(0x1000, code))
  m.cpu:set_mode "flat64"
  m.cpu.rip = 0x1000
  return m, m.cpu
end

local COUNT = 2000000
local LOOP = "\xb9" .. string.pack("<I4", COUNT) .. "\xff\xc9\x75\xfc\xf4"       -- mov ecx, n; dec ecx; jnz; hlt
local function hooked(kind, fn)
  local m, cpu = machine(LOOP)
  assert(m:hook(kind, fn))
  return function()
    cpu.rip = 0x1000
    assert(cpu:run().reason == "halt")
    return kind == "insn" and 2 * COUNT or COUNT
  end
end
best("block hook, empty function", "calls", 5, hooked("block", function() end))
local n = 0
best("block hook, counting", "calls", 5, hooked("block", function() n = n + 1 end))
best("instruction hook, empty function", "calls", 3, hooked("insn", function() end))

do
  local m, cpu = machine("\xb9" .. string.pack("<I4", COUNT) .. "\x8b\x04\x25\x00\x00\x10\x00\xff\xc9\x75\xf5\xf4")
  assert(m:map_mmio(0x100000, 0x1000, { read = function() return 1 end }))
  best("device read in Lua", "calls", 3, function()
    cpu.rip = 0x1000
    cpu:run()
    return COUNT
  end)
end
do
  local _, cpu = machine "\xf4"
  best("register read (cpu.rax)", "reads", 5, function()
    for _ = 1, 1000000 do local _ = cpu.rax end
    return 1000000
  end)
  best("register write", "writes", 5, function()
    for i = 1, 1000000 do cpu.rax = i end
    return 1000000
  end)
end
do
  local _, cpu = machine(("\x48\xff\xc0"):rep(9) .. "\xf4")
  best("run of ten instructions", "runs", 5, function()
    for _ = 1, 200000 do
      cpu.rip = 0x1000
      cpu:run()
    end
    return 200000
  end)
end
best("create, map, write, run, close", "machines", 5, function()
  for _ = 1, 2000 do
    local m <close> = libvm.machine { backend = "jit" }
    m:map_ram(0x1000, 0x1000)
    m:write(0x1000, "\x48\xff\xc0\xf4")
    local cpu = m.cpu
    cpu:set_mode "flat64"
    cpu.rip = 0x1000
    cpu:run()
  end
  return 2000
end)

if arg[1] then
  local file = assert(io.open(arg[1], "w"))
  file:write "{"
  for i, r in ipairs(results) do
    file:write(i > 1 and ", " or "", ("%q: %.0f"):format(r.name, r.value))
  end
  file:write "}\n"
  file:close()
end
