-- mmu_strategy - how guest-virtual addresses become guest-physical ones, decided by Lua functions: everything appears again
-- every 64 KiB, and the page at 0x8000 cannot be written.
local libvm = require "libvm"
assert(libvm.mmu_register("mirror", {
  translate = function(state, cpu, gva, access)
    local gpa = gva & 0xffff
    if gpa >> 12 == 8 and access == "w" then
      return nil, 3                                      -- a page fault with this error code: present, write
    end
    return { gpa = gpa, prot = gpa >> 12 == 8 and "rx" or "rwx" }
  end,
}))
local m <close> = assert(libvm.machine { backend = "interp", mmu = "mirror" })   -- or "jit": with KVM the hardware translates
assert(m:map_ram(0, "64K"))
-- mov byte [0x53000], 7; mov al, [0x3000]; mov byte [0x18000], 1; hlt
assert(m:write(0x1000, "\xc6\x04\x25\x00\x30\x05\0\x07\x8a\x04\x25\x00\x30\0\0\xc6\x04\x25\x00\x80\x01\0\x01\xf4"))
local cpu = m.cpu
cpu:set_mode "flat64"
cpu.rip = 0x1000
print(assert(cpu:run { exceptions = { 14 } }))
print(("al = %d, %d fills"):format(cpu.rax, m:stats "fills"))
