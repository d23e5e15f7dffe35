-- mmu_strategy - an address space made by the program: page n of the guest is page n ~ 1 of RAM, and nothing above 64 KiB.
local libvm = require "libvm"
assert(libvm.mmu_register("swapped", {
  create = function() return { asked = 0 } end,
  translate = function(state, cpu, gva, access)
    state.asked = state.asked + 1
    if gva >= 0x10000 then
      return nil, access == "w" and 2 or 0               -- a page fault, with its error code
    end
    return { gpa = gva ~ 0x1000, prot = "rwx" }
  end,
  destroy = function(state) print("destroyed after", state.asked > 2 and "some" or "no", "translations") end,
}))
local m <close> = assert(libvm.machine { backend = "jit", mmu = "swapped" })
assert(m:map_ram(0, 0x10000))
-- At 0x1000 for the guest: mov [0x4000], rdi; mov al, [0x20000]; hlt
assert(m:write(0, "\x48\x89\x3c\x25\x00\x40\x00\x00\x8a\x04\x25\x00\x00\x02\x00\xf4"))
local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rip, cpu.rdi = 0x1000, 42
local exit = assert(cpu:run { exceptions = { 14 } })
print(("stored at %#x: %d"):format(0x5000, m:read(0x5000, 1):byte()))
print(("page fault at %#x"):format(exit.address))
