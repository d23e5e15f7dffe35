-- PCs: consoles, several vCPUs, booting; the debugger's stub; record and replay.
local support = require "support"
local libvm = support.libvm
local refused = support.refused

-- A PC that will execute `code` in 64-bit mode at 0x1000.
local function pc(code, options)
  options = options or {}
  options.platform, options.memory = "pc", options.memory or "2M"
  local m = assert(libvm.machine(options))
  if code then support.load(m, code) end
  return m, m.cpu
end

-- mov edx, 0x3f8; each byte of the text: mov al, byte; out dx, al
local function printer(text, port)
  local code = "\xba" .. string.pack("<I4", port or 0x3f8)
  for c in text:gmatch "." do code = code .. "\xb0" .. c .. "\xee" end
  return code
end

describe("console", function()
  for _, backend in ipairs(support.backends) do
    it("waits for output on " .. backend, function()
      local m <close> = pc(printer "hello, login: " .. "\xeb\xfe", { backend = backend })
      local console = assert(m:console())
      local before, word = console:wait_for("(%a+):", 20)
      assert.same({ "hello, login:", "login" }, { before, word })
      assert.equal(" ", console:read())
      assert.equal("", console:read())
      local value, message, code = console:wait_for("never", 0.05, true)
      assert.is_nil(value)
      assert.truthy(message:find "timeout")
      assert.equal(libvm.status.E_NOTFOUND, code)
    end)
  end

  it("tells when the machine stops", function()
    local m <close> = pc(printer "bye" .. "\xfa\xf4")
    local console = m:console(0)
    local value, message, _, e = console:wait_for("good", 20)
    assert.is_nil(value)
    assert.truthy(message:find "stopped")
    assert.equal("halt", e.reason)
    assert.equal("bye", console:read())
  end)

  it("hands output to functions", function()
    local m <close>, cpu = pc(printer "abc" .. printer("debug", 0xe9) .. "\xf4")
    local text, debug = "", ""
    assert.is_true(m:serial_output(0, function(bytes) text = text .. bytes end))
    assert.is_true(m:debugcon_output(function(bytes) debug = debug .. bytes end))
    cpu:run { timeout = 20 }
    assert.same({ "abc", "debug" }, { text, debug })
    assert.is_true(m:serial_output(0, nil))
    m:console():on_output(function() error "in the output" end)
    cpu:set_mode "flat64"
    cpu.rip = 0x1000
    local ok, message = pcall(cpu.run, cpu)
    assert.is_false(ok)
    assert.truthy(message:find "in the output")
    assert.equal("debug", m:console("debug").index)
  end)

  it("takes input", function()
    -- again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dl, 0xf8; in al, dx; out dx, al; jmp again
    local m <close> = pc "66 ba fd 03 ec a8 01 74 f7 b2 f8 ec ee eb f1"
    local console = m:console()
    assert.equal(4, console:write "echo")
    assert.equal("echo", console:wait_for("echo", 20, true))
    local long = ("0123456789abcdef"):rep(1000) .. "!"
    assert.is_true(console:send(long, 60))
    assert.equal(#long, #console:wait_for("!", 60, true))
    assert.equal(1, m:serial_input(0, "x"))
  end)

  it("is a PC's", function()
    local m <close> = libvm.machine()
    refused(libvm.status.E_UNSUPPORTED, m:console())
    refused(libvm.status.E_UNSUPPORTED, m:serial_output(0, print))
    local n = pc()
    local console = n:console(1)
    n:close()
    assert.is_false(pcall(console.read, console))
    assert.is_false(pcall(m.console, m, 4))
  end)
end)

for _, backend in ipairs(support.backends) do
  describe("several vCPUs on " .. backend, function()
    -- vCPU n: rdi = n. lock inc qword [0x8000 + 8 * rdi]; jmp back
    local COUNT = "f0 48 ff 04 fd 00 80 00 00 eb f5"
    local function start(m)
      for cpu in m:vcpus() do
        cpu:set_mode "flat64"
        cpu.rip, cpu.rdi = 0x1000, cpu.index
      end
    end

    it("run at once", function()
      local m <close> = libvm.machine { backend = backend, vcpus = 3 }
      m:map_ram(0x1000, 0x8000)
      m:write(0x1000, support.bytes(COUNT))
      start(m)
      assert.equal("deadline", m:run { timeout = 0.3 }.reason)
      for i = 0, 2 do
        assert.truthy(string.unpack("<I8", m:read(0x8000 + 8 * i, 8)) > 0)
      end
    end)

    it("report each exit once", function()
      local m <close> = libvm.machine { backend = backend, vcpus = 3 }
      m:map_ram(0x1000, 0x8000)
      m:write(0x1000, support.bytes "89 f8 e7 80 eb fe")                 -- mov eax, edi; out 0x80, eax; jmp $
      start(m)
      local seen = {}
      for _ = 1, 3 do
        local e = m:run { timeout = 20 }
        assert.same({ "io", e.cpu.index }, { e.reason, e.data })
        seen[e.data] = (seen[e.data] or 0) + 1
      end
      assert.same({ [0] = 1, 1, 1 }, seen)
      assert.equal("deadline", m:run { timeout = 0.02 }.reason)
    end)

    it("call back under one lock, each on a coroutine", function()
      local m <close> = libvm.machine { backend = backend, vcpus = 4 }
      m:map_ram(0x1000, 0x8000)
      -- mov ecx, 100; again: mov eax, edi; out 0x80, al; dec ecx; jnz again; out 0x81, al; jmp $
      m:write(0x1000, support.bytes "b9 64 00 00 00 89 f8 e6 80 ff c9 75 f8 e6 81 eb fe")
      start(m)
      local inside, counts, ended = 0, {}, 0
      m:map_pio(0x80, 2, {
        write = function(_, offset, _, value, cpu)
          inside = inside + 1
          assert(inside == 1 and cpu.index == value)
          counts[value] = (counts[value] or 0) + (offset == 0 and 1 or 0)
          assert(m:write(0x6000, tostring(value)))
          if offset == 1 then
            ended = ended + 1
            if ended == 4 then m:vcpu(0):kick() end
          end
          inside = inside - 1
        end,
      })
      local e = m:run { timeout = 60 }
      assert.equal("kick", e.reason)
      assert.same({ [0] = 100, 100, 100, 100 }, counts)
    end)

    it("raise errors of any", function()
      local m <close> = libvm.machine { backend = backend, vcpus = 2 }
      m:map_ram(0x1000, 0x8000)
      m:write(0x1000, support.bytes "89 f8 e6 80 eb fa")
      start(m)
      m:map_pio(0x80, 1, { write = function(_, _, _, value) if value == 1 then error("from one", 0) end end })
      assert.same({ false, "from one" }, { pcall(m.run, m, { timeout = 20 }) })
    end)
  end)
end

describe("boot", function()
  it("loads files", function()
    local m <close> = libvm.machine()
    m:map_ram(0x1000, 0x10000)
    local path = os.tmpname()
    local file = io.open(path, "wb")
    file:write "raw image"
    file:close()
    assert.is_true(m:load_raw(path, 0x2000))
    assert.equal("raw image", m:read(0x2000, 9))
    refused(libvm.status.E_FORMAT, m:load_elf(path))
    refused(libvm.status.E_HOST, m:load_elf "/no/such/file")
    refused(libvm.status.E_UNSUPPORTED, m:boot { kernel = path })
    -- A 64-bit ELF file with one segment of four bytes for 0x4000.
    file = io.open(path, "wb")
    file:write("\x7fELF\2\1\1", ("\0"):rep(9), string.pack("<I2I2I4I8I8I8I4I2I2I2I2I2I2", 2, 62, 1, 0x4000, 64, 0, 0, 64, 56, 1, 0, 0, 0),
      string.pack("<I4I4I8I8I8I8I8I8", 1, 5, 120, 0x4000, 0x4000, 4, 4, 1), "code")
    file:close()
    assert.equal(0x4000, m:load_elf(path))
    assert.equal("code", m:read(0x4000, 4))
    local p <close> = pc()
    refused(libvm.status.E_INVALID, p:boot {})
    refused(libvm.status.E_FORMAT, p:boot_linux { kernel = path })
    assert.is_false(pcall(p.boot, p, { kernal = path }))
    os.remove(path)
  end)

  it("boots Linux to a shell", function()
    local kernel, initrd = support.guest "vmlinuz-amd64", support.guest "initramfs-amd64"
    if not kernel or not initrd or libvm.query("jit", "available") ~= 1 then
      return pending "no guest kernel (tests/guests/fetch) or no JIT"
    end
    local m <close> = assert(libvm.machine { platform = "pc", backend = "jit", memory = "256M" })
    local console = m:console()
    assert(m:boot { kernel = kernel, initrd = initrd, cmdline = "console=ttyS0" })
    assert(console:wait_for("guest# ", 100, true))
    assert(console:send "echo $((6 * 7))$((1 + 1))\n")
    assert.truthy(console:wait_for("422", 60, true))
  end)
end)

describe("interrupt lines", function()
  it("of a PC are set", function()
    local m <close> = pc "fa eb fe"
    assert.is_true(m:irq_set(4, true))
    assert.is_true(m:irq_set(4, false))
    assert.is_true(m:irq_msi(0xfee00000, 0x4030))
    refused(libvm.status.E_INVALID, m:irq_set(1000, true))
    refused(libvm.status.E_INVALID, m:irq_msi(0, 0))
  end)
end)

describe("sandbox", function()
  it("lets machines run and files alone", function()
    local calls = libvm.sandbox_calls { kvm = true, threads = true, sockets = true }
    assert.truthy(#calls > #libvm.sandbox_calls() and #calls <= 50)
    assert.is_false(pcall(libvm.sandbox_calls, { kvn = true }))
    -- In a process of its own: it cannot be left.
    local script = os.tmpname()
    local file = assert(io.open(script, "w"))
    file:write [[
      local support = require "support"
      local ok, _, code = support.libvm.sandbox_enter { errno = true }
      if not ok then os.exit(code == support.libvm.status.E_UNSUPPORTED and 3 or 4) end
      local m, cpu = support.machine("interp", "b8 2a 00 00 00 f4")
      cpu:run()
      os.exit(cpu.rax == 42 and not io.open "/etc/passwd" and 0 or 5)
    ]]
    file:close()
    local interpreter = arg and arg[-1] or "lua5.4"
    for i = -1, -20, -1 do interpreter = arg and arg[i] or interpreter end
    local _, how, status = os.execute(("'%s' '%s' 2>/dev/null"):format(interpreter, script))
    os.remove(script)
    if os.getenv "LD_PRELOAD" then return pending "a sanitizer makes system calls of its own" end
    if status == 3 then return pending "no libseccomp" end
    assert.same({ "exit", 0 }, { how, status })
  end)
end)

describe("debugger's stub", function()
  it("is served until the guest ends", function()
    local m <close>, cpu = support.machine("interp", "48 ff c0 f4")
    local exits = {}
    local stub <close> = assert(m:gdbstub("127.0.0.1:0", {
      runs_alone = true,
      on_exit = function(who, e)
        table.insert(exits, { who.index, e.reason })
        return "end"
      end,
    }))
    assert.truthy(stub.address:find "^127%.0%.0%.1:%d+$")
    local e = stub:serve()
    assert.same({ "halt", 1 }, { e.reason, cpu.rax })
    assert.same({ { 0, "halt" } }, exits)
    stub:free()
    assert.is_false(pcall(function() return stub.address end))
    assert.is_nil((m:gdbstub "not an address"))
  end)

  it("stops, calls back, raises", function()
    local m <close>, cpu = support.machine("interp", "8b 04 25 08 00 10 00 eb f7")
    local stub, reads = assert(m:gdbstub("127.0.0.1:0", { runs_alone = true })), 0
    m:map_mmio(0x100000, 0x1000, {
      read = function(_, _, _, who)
        reads = reads + 1
        if reads == 10 then stub:stop() end
        return who.index
      end,
    })
    stub:serve()
    assert.truthy(reads >= 10)
    m:hook("insn", function() error("in the hook", 0) end)
    assert.same({ false, "in the hook" }, { pcall(stub.serve, stub) })
  end)
end)

describe("record and replay", function()
  for _, backend in ipairs(support.software) do
    it("repeats a PC on " .. backend, function()
      -- reads a byte of the serial port eight times into [rsi], then stops
      local code = "be 00 80 00 00 66 ba fd 03 ec a8 01 74 f7 b2 f8 ec 88 06 ff c6 81 fe 08 80 00 00 75 e8 fa f4"
      local path = os.tmpname()
      local sum
      local file = assert(io.open(path, "w+b"))
      do
        local m <close>, cpu = pc(code, { backend = backend })
        assert.is_true(m:record(file, { skip_idle = true }))
        for c in ("recorded"):gmatch "." do
          m:serial_input(0, c)
          cpu:run { max_instructions = 200000 }
        end
        assert.equal("recording", m:replay_info().mode)
        sum = m:checksum()
        assert.is_true(m:record_stop())
        assert.equal("recorded", m:read(0x8000, 8))
        refused(libvm.status.E_INVALID, m:record_stop())
      end
      file:seek "set"
      do
        local m <close>, cpu = pc(code, { backend = backend })
        assert(m:replay(file))
        assert.equal("playing", m:replay_info().mode)
        local e
        repeat e = cpu:run { timeout = 30 } until e.reason ~= "halt" or m:replay_info().at_end
        assert.equal("recorded", m:read(0x8000, 8))
        assert.equal(sum, m:checksum())
        assert.is_true(m:replay_stop())
        refused(libvm.status.E_INVALID, m:replay_stop())
      end
      file:close()
      os.remove(path)
    end)
  end
end)
