-- call - functions across the border: Lua calls the guest's, the guest calls Lua's.
local libvm = require "libvm"
local HOST_SQUARE <const> = 0x5000000                    -- where the guest has nothing
local m <close> = assert(libvm.machine())
assert(m:map_ram(0, "64K"))
-- u64 twice_plus(u64 x, u64 (*fn)(u64)): sub rsp, 8; call rsi; lea rax, [rax + rax + 1]; add rsp, 8; ret
assert(m:write(0x1000, "\x48\x83\xec\x08\xff\xd6\x48\x8d\x44\x00\x01\x48\x83\xc4\x08\xc3"))
local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rsp = 0x8000
assert(m:bind_function(HOST_SQUARE, "u64(u64)", function(_, x)
  print(("host: square(%d)"):format(x))
  return x * x
end))
print("guest: twice_plus(12, square) = " .. assert(cpu:call(0x1000, "u64(u64, ptr)", 12, HOST_SQUARE)))
local twice_plus = cpu:guest_function(0x1000, "u64(u64, ptr)")           -- the same as a Lua function
print("guest: twice_plus(5, square) = " .. twice_plus(5, HOST_SQUARE))
