-- support.lua - what the specs share: machines that are ready to run, backends, guests.
local libvm = require "libvm"
local luassert = require "luassert"
local support = { libvm = libvm }

-- The backends of this host that may be used now.
support.backends = {}
for _, name in ipairs { "interp", "jit", "kvm" } do
  if libvm.query(name, "available") == 1 then
    table.insert(support.backends, name)
  end
end
support.software = {}
for _, name in ipairs { "interp", "jit" } do
  if libvm.query(name, "available") == 1 then
    table.insert(support.software, name)
  end
end

-- A bare machine with RAM at 0x1000 .. 0x10fff that will execute `code` (a string, or hexadecimal with spaces) at 0x1000.
function support.machine(backend, code, options)
  options = options or {}
  options.backend = backend
  local m = assert(libvm.machine(options))
  assert(m:map_ram(0x1000, 0x10000, "rwx"))
  if code then
    support.load(m, code)
  end
  return m, m.cpu
end

function support.bytes(code)
  if code:find "^[%x%s]+$" then
    code = code:gsub("%s", ""):gsub("..", function(two) return string.char(tonumber(two, 16)) end)
  end
  return code
end

function support.hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x "):format(c:byte()) end))
end

function support.load(m, code)
  assert(m:write(0x1000, support.bytes(code)))
  assert(m.cpu:set_mode "flat64")
  m.cpu.rip = 0x1000
  m.cpu.rsp = 0x10000
end

-- The file of a guest, or nil: what tests/guests/fetch puts there.
function support.guest(name)
  local dir = os.getenv "LIBVM_GUESTS" or ((os.getenv "HOME" or "") .. "/.cache/libvm/guests")
  local path = dir .. "/" .. name
  local file = io.open(path, "rb")
  if file then
    file:close()
    return path
  end
end

-- f(...) raises an error whose message contains `fragment`.
function support.raises(fragment, f, ...)
  local ok, message = pcall(f, ...)
  luassert.is_false(ok)
  luassert.truthy(tostring(message):find(fragment, 1, true), "the message is: " .. tostring(message))
end

-- What a call returned is nil, a message and the code of the status.
function support.refused(code, value, message, got)
  luassert.is_nil(value)
  luassert.equal("string", type(message))
  luassert.truthy(#message > 0)
  luassert.equal(code, got)
end

return support
