-- call - Lua calls a guest function, which calls a Lua function.
local libvm = require "libvm"
local m <close> = assert(libvm.machine())
assert(m:map_ram(0x1000, 0x10000))
local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rsp = 0x10000
-- twice: lea rax, [rdi + rdi]; ret
assert(m:write(0x1000, "\x48\x8d\x04\x3f\xc3"))
print("twice(21) =", cpu:call(0x1000, "u64(u64)", 21))
-- greet: sub rsp, 8; mov eax, 0x3000; call rax; add rsp, 8; inc rax; ret
assert(m:write(0x1010, "\x48\x83\xec\x08\xb8\x00\x30\x00\x00\xff\xd0\x48\x83\xc4\x08\x48\xff\xc0\xc3"))
local binding = assert(m:bind_function(0x3000, "u64(str)", function(_, name)
  print("the guest says hello to " .. name)
  return #name
end))
local greet = cpu:guest_function(0x1010, "u64(str)")
print("greet =", greet "Lua")
binding:unbind()
