-- boot_linux - boots a kernel to its shell and asks it something.
--   lua boot_linux.lua KERNEL INITRD [PROMPT]          tests/guests/fetch gets both
local libvm = require "libvm"
local kernel, initrd, prompt = arg[1], arg[2], arg[3] or "guest# "
if not kernel then
  print "usage: boot_linux.lua KERNEL INITRD [PROMPT]"
  return
end
local m <close> = assert(libvm.machine { platform = "pc", memory = "256M" })
local console = assert(m:console())
assert(m:boot { kernel = kernel, initrd = initrd, cmdline = "console=ttyS0 quiet" })
assert(console:wait_for(prompt, 120, true))
assert(console:send "uname -a\n")
local _, line = assert(console:wait_for("(Linux [^\r\n]+)", 30))
print(line)
assert(console:wait_for(prompt, 30, true))
assert(console:send "exit\n")
repeat
  local exit = assert(m:run { timeout = 60 })
until exit.reason ~= "reset"
