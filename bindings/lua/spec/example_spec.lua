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

local expected = {
  hello = "rax = 1764\n",
  memory = "the guest wrote 42\nunmapped at rip 0x1013.*dirty: 0x12000\n$",
  device = "^A\nhalt at rip 0x1018 22\n$",
  hooks = "4 bytes to 0x2000: 6\nhook at rip 0x1005 rcx 5\n.*blocks 11\n$",
  coverage = "input 0: 1 edges\n  block 0x1008\ninput 0x1234: 1 edges\n  block 0x1009\n$",
  snapshot_fuzz = "crash at 0x101e after a few runs: \"bug\"\n",
  call = "twice%(21%) = 42\nthe guest says hello to Lua\ngreet = 4\n$",
  mmu_strategy = "stored at 0x5000: 42\npage fault at 0x20000\n",
  boot_linux = "^usage",
  many_vms = "^100 machines, sum 151500\n$",
}

describe("example", function()
  for name, pattern in pairs(expected) do
    it(name, function()
      if (name == "hooks" or name == "coverage" or name == "snapshot_fuzz" or name == "mmu_strategy") and
          libvm.query("jit", "available") ~= 1 then
        return pending "no JIT here"
      end
      local text = output(name)
      assert.truthy(text:find(pattern), "the output is: " .. text)
    end)
  end

  it("boot_linux with a guest", function()
    local kernel, initrd = support.guest "vmlinuz-amd64", support.guest "initramfs-amd64"
    if not kernel or not initrd or libvm.query("jit", "available") ~= 1 then
      return pending "no guest kernel (tests/guests/fetch) or no JIT"
    end
    assert.truthy(output("boot_linux", kernel, initrd):find "Linux guest")
  end)
end)
