-- The examples say what they should.
local support = require "support"
local libvm = support.libvm
local directory = (os.getenv "LIBVM_TOP" or ".") .. "/examples/lua/"

local function output(name, ...)
  local lines = {}
  local env = setmetatable({
    arg = { [0] = name, ... },
    print = function(...)
      local parts = table.pack(...)
      for i = 1, parts.n do parts[i] = tostring(parts[i]) end
      table.insert(lines, table.concat(parts, " ") .. "\n")
    end,
    io = setmetatable({ write = function(...) table.insert(lines, table.concat { ... }) end }, { __index = io }),
  }, { __index = _G })
  assert(loadfile(directory .. name .. ".lua", "t", env))(...)
  return table.concat(lines)
end

-- What the examples print, in every language.
local expected, name = { snapshot_fuzz = 'crash with "VM!" after' }, nil
for line in io.lines((os.getenv "LIBVM_TOP" or ".") .. "/examples/expected") do
  local begun = line:match "^== (.*)"
  if begun then
    name, expected[begun] = begun, ""
  else
    expected[name] = expected[name] .. line .. "\n"
  end
end

describe("example", function()
  for name, text in pairs(expected) do
    it(name, function()
      local got = output(name)
      assert.equal(text, name == "snapshot_fuzz" and got:sub(1, #text) or got)
    end)
  end

  it("boot_linux says how it is used", function()
    assert.truthy(output("boot_linux"):find "^usage")
  end)

  it("boot_linux with a guest", function()
    local kernel, initrd = support.guest "vmlinuz-amd64", support.guest "initramfs-amd64"
    if not kernel or not initrd or libvm.query("jit", "available") ~= 1 then
      return pending "no guest kernel (tests/guests/fetch) or no JIT"
    end
    assert.truthy(output("boot_linux", kernel, initrd):find "Linux guest")
  end)
end)
