-- many_vms - eight machines at once, each running for a while when it is its turn.
local libvm = require "libvm"
local CODE <const> = "\xb9\x00\x00\x80\x00\x01\xc8\xff\xc9\x75\xfa\xf4"  -- mov ecx, 0x800000; add eax, ecx; dec ecx; jnz; hlt
local machines, results = {}, {}
for number = 0, 7 do
  local m = assert(libvm.machine())
  assert(m:map_ram(0, "64K"))
  assert(m:write(0x1000, CODE))
  m.cpu:set_mode "flat64"
  m.cpu.rip, m.cpu.rax = 0x1000, number
  machines[m] = true
end
while next(machines) do
  for m in pairs(machines) do
    if assert(m:run { timeout = 0.002 }).reason == "halt" then
      table.insert(results, m.cpu.rax)
      machines[m] = nil
      m:close()
    end
  end
end
print(("%d machines, results from %d to %d"):format(#results, math.min(table.unpack(results)), math.max(table.unpack(results))))
