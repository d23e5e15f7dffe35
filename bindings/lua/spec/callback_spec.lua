-- What runs inside of a run: devices, hooks, traces, calls; errors in them; coroutines; coverage; snapshots; strategies.
local support = require "support"
local libvm = support.libvm
local raises, refused = support.raises, support.refused

local LOAD = "8b 04 25 08 00 10 00 f4"           -- mov eax, [0x100008]; hlt
local STORE = "c7 04 25 08 00 10 00 2a 00 00 00 f4"
local LOOP = "b9 0a 00 00 00 ff c9 75 fc f4"     -- mov ecx, 10; again: dec ecx; jnz again; hlt

for _, backend in ipairs(support.backends) do
  describe("device on " .. backend, function()
    it("answers memory", function()
      local m <close>, cpu = support.machine(backend, LOAD)
      local device = { value = 77 }
      function device:read(offset, width, who)
        assert(who == cpu and who.rip == 0x1000)
        self.seen = { offset, width }
        return self.value
      end
      function device:write(offset, width, value)
        self.written = { offset, width, value }
      end
      local region = assert(m:map_mmio(0x100000, 0x1000, device))
      assert.equal("halt", cpu:run().reason)
      assert.same({ 77, { 8, 4 } }, { cpu.rax, device.seen })
      support.load(m, STORE)
      cpu:run()
      assert.same({ 8, 4, 42 }, device.written)
      assert.is_true(region:unmap())
      cpu.rip = 0x1000
      assert.equal("unmapped", cpu:run().reason)
    end)

    it("answers ports", function()
      local m <close>, cpu = support.machine(backend, "ec ef f4")       -- in al, dx; out dx, eax; hlt
      local out
      assert(m:map_pio(0x300, 8, { read = function() return 0x1ff end, write = function(_, ...) out = { ... } end }))
      cpu.rdx = 0x304
      assert.equal("halt", cpu:run().reason)
      assert.same({ 0xff, 4, 4, 0xff }, { cpu.rax, out[1], out[2], out[3] })
    end)

    it("may decline", function()
      local m <close>, cpu = support.machine(backend, LOAD)
      m:map_mmio(0x100000, 0x1000, { read = function() return nil end, write = function() return false end })
      local e = cpu:run()
      assert.same({ "mmio", 0x100008 }, { e.reason, e.gpa })
      e.data = 5
      cpu:run()
      assert.equal(5, cpu.rax)
      support.load(m, STORE)
      assert.same({ "mmio", true, 42 }, { (function(x) return x.reason, x.is_write, x.data end)(cpu:run()) })
    end)

    it("raises its errors from run, and the machine goes on", function()
      local m <close>, cpu = support.machine(backend, LOAD)
      local thing = setmetatable({}, { __tostring = function() return "a thing" end })
      local broken = true
      m:map_mmio(0x100000, 0x1000, { read = function() if broken then error(thing) end return 9 end })
      local ok, e = pcall(cpu.run, cpu)
      assert.is_false(ok)
      assert.equal(thing, e)
      -- The access is open, as one that was declined.
      assert.equal("mmio", cpu.last_exit.reason)
      cpu.last_exit.data = 8
      assert.equal("halt", cpu:run().reason)
      assert.equal(8, cpu.rax)
      broken = false
      cpu.rip = 0x1000
      assert.equal("halt", cpu:run().reason)
      assert.equal(9, cpu.rax)
    end)
  end)
end

describe("device", function()
  it("must return integers", function()
    local m <close>, cpu = support.machine("interp", LOAD)
    m:map_mmio(0x100000, 0x1000, { read = function() return "x" end })
    raises("integer or nil", cpu.run, cpu)
  end)

  it("must be a table of functions", function()
    local m <close> = libvm.machine()
    raises("table expected", m.map_mmio, m, 0, 4096, print)
    raises("field 'read' is not a function", m.map_mmio, m, 0, 4096, { read = 1 })
    raises("out of range", m.map_pio, m, 65536, 1, {})
    refused(libvm.status.E_INVALID, m:map_pio(65535, 2, {}))
  end)

  it("is told of its end", function()
    local ends = 0
    do
      local m <close> = libvm.machine()
      local device = { destroy = function() ends = ends + 1 end }
      m:map_mmio(0, 4096, device):unmap()
      assert.equal(1, ends)
      m:map_mmio(0, 4096, device)
      m:map_mmio(4096, 4096, device)
    end
    assert.equal(3, ends)
  end)

  it("may unmap itself, map, read and write memory", function()
    local m <close>, cpu = support.machine("jit", LOAD)
    local region
    region = m:map_mmio(0x100000, 0x1000, {
      read = function(_, _, _, who)
        assert(region:unmap())
        assert(m:map_ram(0x100000, 0x1000))
        assert(m:write(0x100008, "\5\0\0\0"))
        who.rbx = 7
        return 6
      end,
    })
    assert.equal("halt", cpu:run().reason)
    assert.same({ 6, 7 }, { cpu.rax, cpu.rbx })
    cpu.rip = 0x1000
    cpu:run()
    assert.equal(5, cpu.rax)
  end)

  it("cannot close its machine or run it", function()
    local m, cpu = support.machine("interp", LOAD)
    m:map_mmio(0x100000, 0x1000, { read = function() m:close() end })
    raises("cannot be closed by a callback", cpu.run, cpu)
    m:close()
    m, cpu = support.machine("interp", LOAD)
    m:map_mmio(0x100000, 0x1000, { read = function(_, _, _, c) return select(3, c:run()) end })
    cpu:run()
    assert.equal(libvm.status.E_BUSY & 0xffffffff, cpu.rax)
    m:close()
  end)

  it("cannot yield", function()
    local m <close>, cpu = support.machine("interp", LOAD)
    m:map_mmio(0x100000, 0x1000, { read = function() coroutine.yield(1) end })
    local co = coroutine.create(function() return cpu:run() end)
    local ok, message = coroutine.resume(co)
    assert.is_false(ok)
    assert.truthy(message:find "yield")
  end)

  it("runs on the coroutine that called run", function()
    local m <close>, cpu = support.machine("jit", LOAD)
    local where
    m:map_mmio(0x100000, 0x1000, { read = function() where = coroutine.running() return 0 end })
    local co = coroutine.create(function() return cpu:run().reason end)
    assert.same({ true, "halt" }, { coroutine.resume(co) })
    assert.equal(co, where)
    co, where = nil, nil
    collectgarbage()
    cpu.rip = 0x1000
    cpu:run()
    assert.equal(coroutine.running(), where)
  end)

  it("may run another machine, and a coroutine that does", function()
    local m <close>, cpu = support.machine("jit", LOAD)
    m:map_mmio(0x100000, 0x1000, {
      read = function()
        return coroutine.wrap(function()
          local n <close>, other = support.machine("interp", LOAD)
          n:map_mmio(0x100000, 0x1000, { read = function() return 31 end })
          other:run()
          assert(m:write(0x2000, "x"))
          return other.rax
        end)()
      end,
    })
    assert.equal("halt", cpu:run().reason)
    assert.same({ 31, "x" }, { cpu.rax, m:read(0x2000, 1) })
  end)
end)

for _, backend in ipairs(support.software) do
  describe("hook on " .. backend, function()
    it("sees blocks, edges and instructions", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      local blocks, edges, insns = {}, {}, {}
      local a = m:hook("block", function(who, address, bytes) assert(who == cpu) blocks[address] = (blocks[address] or 0) + 1 end)
      local b = m:hook("edge", function(_, to, from) edges[#edges + 1] = string.format("%x-%x", from, to) end)
      local c = m:hook("insn", function(who, address, bytes, value)
        assert(address == who.rip)
        insns[#insns + 1] = { bytes, value & 0xff }
      end, { begin = 0x1005, last = 0x1008 })
      assert.equal("halt", cpu:run().reason)
      assert.same({ [0x1000] = 1, [0x1005] = 9, [0x1009] = 1 }, blocks)
      assert.same({ 10, "1007-1005", "1007-1009" }, { #edges, edges[1], edges[10] })
      assert.same({ 20, { 2, 0xff }, { 2, 0x75 } }, { #insns, insns[1], insns[2] })
      assert.is_true(a.active)
      a:remove()
      m:unhook(b)
      c:remove()
      assert.is_false(a.active)
      raises("hook is removed", a.remove, a)
      cpu.rip = 0x1000
      cpu:run()
      assert.equal(9, blocks[0x1005])
    end)

    it("sees accesses", function()
      -- mov [0x3000], rax; mov al, [0x3001]; vmovdqu ymm0, [0x3000]; hlt
      local m <close>, cpu = support.machine(backend, "48 89 04 25 00 30 00 00 8a 04 25 01 30 00 00 c5 fe 6f 04 25 00 30 00 00 f4")
      local log = {}
      m:hook("mem_write", function(_, address, bytes, value) table.insert(log, { "w", address, bytes, value }) end)
      m:hook("mem_read", function(_, address, bytes, value) table.insert(log, { "r", address, bytes, value }) end)
      cpu.rax = 0x11223344
      cpu:run()
      assert.same({ "w", 0x3000, 8, 0x11223344 }, log[1])
      assert.same({ "r", 0x3001, 1, 0x33 }, log[2])
      assert.same({ "r", 0x3000, 32, "\x44\x33\x22\x11" .. ("\0"):rep(28) }, log[3])
    end)

    it("stops, skips and redirects", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      local h = m:hook("insn", function(who) if who.rcx == 5 then return "stop" end end, { begin = 0x1007 })
      local e = cpu:run()
      assert.same({ "hook", 0x1007, 5 }, { e.reason, e.rip, cpu.rcx })
      assert.equal(h, e.hook)
      h:remove()
      assert.equal("halt", cpu:run().reason)
      m:hook("insn", function() return "skip" end, { begin = 0x1007 })
      cpu.rip = 0x1000
      cpu:run()
      assert.equal(9, cpu.rcx)
      m:hook("insn", function(who) who.rip = 0x1009 end, { begin = 0x1000, exact = true, last = 0x1000 })
      cpu.rip, cpu.rcx = 0x1000, 1234
      cpu:run()
      assert.equal(1234, cpu.rcx)
    end)

    it("raises its error and stops there", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      local h = m:hook("insn", function(who) if who.rcx == 5 then error("at five", 0) end end, { begin = 0x1007 })
      local ok, message = pcall(cpu.run, cpu)
      assert.same({ false, "at five", 5 }, { ok, message, cpu.rcx })
      h:remove()
      assert.equal("halt", cpu:run().reason)
      m:hook("insn", function() return 17 end)
      cpu.rip = 0x1000
      raises("a hook must return", cpu.run, cpu)
    end)

    it("removes itself and adds others", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      local first, second = 0, 0
      local h
      h = m:hook("insn", function()
        first = first + 1
        h:remove()
        m:hook("insn", function() second = second + 1 end, { begin = 0x1005 })
      end, { begin = 0x1005 })
      cpu:run()
      assert.equal(1, first)
      assert.truthy(second == 9 or second == 10)
      for _ = 1, 3 do collectgarbage() end
      cpu.rip = 0x1000
      cpu:run()
      assert.truthy(second >= 19)
    end)

    it("sees exceptions, CPUID, ports", function()
      local m <close>, cpu = support.machine(backend, "0f a2 e6 80 31 c9 f7 f1 f4")    -- cpuid; out 0x80, al; xor; div ecx; hlt
      m:hook("cpuid", function(who, leaf) if leaf == 0x1234 then who.rax = 7 return "skip" end end)
      local ports = {}
      m:hook("port", function(_, port, bytes, value, is_write) table.insert(ports, { port, bytes, value, is_write }) return "skip" end)
      m:hook("exception", function(who, vector, code) if vector == 0 then return "skip" end end)
      cpu.rax = 0x1234
      assert.equal("halt", cpu:run().reason)
      assert.same({ { 0x80, 1, 7, true } }, ports)
    end)

    it("has breakpoints and watchpoints", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      assert.is_true(m:breakpoint(0x1007))
      local e = cpu:run()
      assert.same({ "breakpoint", 0x1007, false, "x" }, { e.reason, e.address, e.is_watchpoint, e.access })
      assert.equal(9, cpu.rcx)
      assert.equal("breakpoint", cpu:run().reason)
      assert.is_true(m:breakpoint(0x1007, false))
      refused(libvm.status.E_NOTFOUND, m:breakpoint(0x1007, false))
      assert.is_true(m:watchpoint(0x3000, 4, "w"))
      support.load(m, "c6 04 25 02 30 00 00 2a f4")
      e = cpu:run()
      assert.same({ "breakpoint", true, 0x3002, "w", 42, 1 }, { e.reason, e.is_watchpoint, e.address, e.access, e.value, e.bytes })
      assert.is_true(m:watchpoint(0x3000, 4, "w", false))
    end)
  end)

  describe("records on " .. backend, function()
    it("count edges", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      local map = libvm.buffer(65536)
      assert.is_true(m:coverage(map))
      cpu:run()
      local function cell(from, to)
        return (libvm.coverage_id(from) >> 1 ~ libvm.coverage_id(to)) & 65535
      end
      assert.same({ 9, 1 }, { map:u8(cell(0x1007, 0x1005)), map:u8(cell(0x1007, 0x1009)) })
      assert.is_true(m:coverage_range(0x5000, 0x6000))
      map:fill(0)
      cpu.rip = 0x1000
      cpu:run()
      assert.equal(("\0"):rep(65536), tostring(map))
      assert.is_true(m:coverage(nil))
      refused(libvm.status.E_INVALID, m:coverage(libvm.buffer(1000)))
      map = nil
    end)

    it("trace blocks", function()
      local m <close>, cpu = support.machine(backend, LOOP)
      local ring = assert(cpu:block_trace(16))
      cpu:run()
      local list, lost = ring:fetch()
      assert.same({ 10, 0, 0x1005, 0x1009 }, { #list, lost, list[1], list[10] })
      assert.same({}, (ring:fetch()))
      cpu.rip = 0x1000
      cpu:run()
      cpu.rip = 0x1000
      cpu:run()
      list, lost = ring:fetch()
      assert.same({ 16, 4 }, { #list, lost })
      assert.is_true(cpu:block_trace(nil))
      refused(libvm.status.E_INVALID, cpu:block_trace(3))
    end)

    it("log comparisons", function()
      local m <close>, cpu = support.machine(backend, "3d 44 33 22 11 48 39 d8 f4")    -- cmp eax, 0x11223344; cmp rax, rbx
      local ring = assert(cpu:compare_log(16))
      cpu.rax, cpu.rbx = 5, 6
      cpu:run()
      local list = ring:fetch()
      assert.same({ address = 0x1000, kind = "cmp", width = 4, is_constant = true, a = 5, b = 0x11223344 }, list[1])
      assert.same({ 0x1005, 8, 5, 6 }, { list[2].address, list[2].width, list[2].a, list[2].b })
      assert.is_true(cpu:compare_log())
    end)
  end)
end

for _, backend in ipairs(support.backends) do
  describe("snapshot on " .. backend, function()
    it("goes back", function()
      local m <close>, cpu = support.machine(backend, "48 ff 04 25 00 30 00 00 f4")   -- inc qword [0x3000]; hlt
      local s <close> = assert(m:snapshot())
      for _ = 1, 3 do
        cpu:run()
        assert.same({ 0x1009, "\1" }, { cpu.rip, m:read(0x3000, 1) })
        assert.is_true(s:restore())
        assert.same({ 0x1000, "\0" }, { cpu.rip, m:read(0x3000, 1) })
      end
      assert.is_true(m:restore(s))
      assert.truthy(s.bytes > 0)
      assert.equal(m, s.machine)
      s:free()
      raises("freed", s.restore, s)
    end)

    it("brings regions back, and takes others away", function()
      local m <close>, cpu = support.machine(backend, "f4")
      local old = m:map_ram(0x40000, 0x1000)
      m:write(0x40000, "old")
      local s = m:snapshot()
      old:unmap()
      local new = m:map_ram(0x40000, 0x2000)
      assert.is_true(s:restore())
      assert.same({ true, false, "old" }, { old.mapped, new.mapped, m:read(0x40000, 3) })
      assert.equal("old", old:view():read(0, 3))
      assert.is_true(old:unmap())
      refused(libvm.status.E_FAULT, m:read(0x40000, 1))
      local count = 0
      for _ in m:regions() do count = count + 1 end
      assert.equal(1, count)
    end)

    it("is kept in files", function()
      local path = os.tmpname()
      local m <close>, cpu = support.machine(backend, "48 ff 04 25 00 30 00 00 f4")
      m:write(0x5000, "kept")
      local s = m:snapshot()
      assert.is_true(s:save(path, { no_sync = true }))
      m:write(0x5000, "gone")
      local loaded = assert(m:load_snapshot(path))
      assert.is_true(loaded:restore())
      assert.equal("kept", m:read(0x5000, 4))
      local file = assert(io.open(path, "w+b"))
      assert.is_true(s:save(file))
      file:seek "set"
      assert(m:load_snapshot(file))
      file:close()
      file = assert(io.open(path, "wb"))
      file:write "nonsense"
      file:close()
      refused(libvm.status.E_FORMAT, m:load_snapshot(path))
      raises("the file is closed", s.save, s, file)
      os.remove(path)
    end)

    it("is refused while the machine runs", function()
      local m <close>, cpu = support.machine(backend, LOAD)
      local code
      m:map_mmio(0x100000, 0x1000, { read = function() code = select(3, m:snapshot()) collectgarbage() return 0 end })
      local garbage = m:snapshot()
      garbage = nil
      cpu:run()
      assert.equal(libvm.status.E_BUSY, code)
    end)

    it("makes clones, devices too", function()
      local m <close>, cpu = support.machine(backend, LOAD)
      local function device(value)
        return {
          value = value,
          read = function(self) return self.value end,
          save = function(self) return tostring(self.value) end,
          restore = function(self, state) self.value = tonumber(state) end,
          clone = function(self) return device(-1) end,
        }
      end
      local original = device(55)
      m:map_mmio(0x100000, 0x1000, original)
      m:write(0x5000, "shared")
      local clone <close> = assert(m:fork())
      original.value = 66
      m:write(0x5000, "parent")
      assert.equal("halt", clone.cpu:run().reason)
      assert.same({ 55, "shared" }, { clone.cpu.rax, clone:read(0x5000, 6) })
      cpu:run()
      assert.equal(66, cpu.rax)
    end)
  end)
end

describe("snapshot", function()
  it("saves and restores devices", function()
    local m <close> = libvm.machine { backend = "interp" }
    local device = { n = 1 }
    function device:save() return string.pack("<I4", self.n) end
    function device:restore(state) self.n = string.unpack("<I4", state) end
    m:map_mmio(0, 4096, device)
    local s = m:snapshot()
    device.n = 2
    s:restore()
    assert.equal(1, device.n)
    function device:save() end
    m:map_mmio(4096, 4096, { save = function() error "cannot" end, restore = print })
    raises("cannot", m.snapshot, m)
  end)
end)

for _, backend in ipairs(support.software) do
  describe("call on " .. backend, function()
    -- 0x1000: lea rax, [rdi + rsi]; ret     0x1010: movsd-add: addsd xmm0, xmm1; ret    0x1020: mov al, [rdi]; ret
    local CODE = "48 8d 04 37 c3" .. ("90"):rep(11) .. "f2 0f 58 c1 c3" .. ("90"):rep(11) .. "0f b6 07 c6 07 21 c3"

    it("calls guest functions", function()
      local m <close>, cpu = support.machine(backend, CODE)
      assert.equal(42, cpu:call(0x1000, "u64(u64,u64)", 40, 2))
      assert.equal(-5, cpu:call(0x1000, "i32(i32,i32)", -7, 2))
      assert.equal(4.75, cpu:call(0x1010, "f64(f64,f64)", 1.5, 3.25))
      assert.equal(104, cpu:call(0x1020, "u8(str)", "hello"))
      local buffer = libvm.buffer "abc"
      assert.equal(97, cpu:call(0x1020, "u8(buf,u32)", buffer, 3))
      assert.equal("!bc", tostring(buffer))
      local add = cpu:guest_function(0x1000, "u64(u64,u64)")
      assert.equal(5, add(2, 3))
      assert.is_true(cpu:call(0x1000, "void(u64,u64)", 1, 2))
      assert.equal(3, cpu:call(0x1000, "u64(u64,u64)", 1, 2, { preserve = true, max_instructions = 100 }))
      assert.equal(2, libvm.signature_check "u64(u64,u64)")
      refused(libvm.status.E_INVALID, libvm.signature_check "u65()")
      raises("number expected", cpu.call, cpu, 0x1000, "u64(u64,u64)", 1)
      raises("more arguments", cpu.call, cpu, 0x1000, "u64()", 1, 2, 3)
      raises("more bytes than", cpu.call, cpu, 0x1020, "u8(buf,u32)", buffer, 4)
      raises("buffer or nil", cpu.call, cpu, 0x1020, "u8(buf,u32)", "abc", 3)
      raises("unknown option", cpu.call, cpu, 0x1000, "u64()", { stakc = 1 })
    end)

    it("tells when the function does not return", function()
      local m <close>, cpu = support.machine(backend, "eb fe")
      local value, message, code, e = cpu:call(0x1000, "void()", { max_instructions = 50 })
      assert.same({ libvm.status.E_FAULT, "budget" }, { code, e.reason })
      assert.is_nil(value)
      assert.truthy(message:find "did not return")
    end)

    it("lets the guest call Lua", function()
      local m <close>, cpu = support.machine(backend, "e8 fb 0f 00 00 f4")    -- call 0x2000; hlt
      local binding = assert(m:bind_function(0x2000, "u64(u64,str)", function(who, n, text)
        assert(who == cpu)
        return n * #text
      end))
      m:write(0x3000, "seven!!\0")
      cpu.rdi, cpu.rsi = 6, 0x3000
      assert.equal("halt", cpu:run().reason)
      assert.equal(42, cpu.rax)
      refused(libvm.status.E_EXISTS, m:bind_function(0x2000, "void()", print))
      assert.is_true(binding.active)
      assert.is_true(binding:unbind())
      raises("ended", binding.unbind, binding)
    end)

    it("shows buffers for the time of a call", function()
      local m <close>, cpu = support.machine(backend, "e8 fb 0f 00 00 f4")
      local kept
      m:bind_function(0x2000, "void(buf[4])", function(_, b) b:u32(0, b:u32(0) + 1) kept = b end)
      m:write(0x3000, "\1\0\0\0")
      cpu.rdi = 0x3000
      cpu:run()
      assert.equal("\2\0\0\0", m:read(0x3000, 4))
      raises("call is over", kept.u8, kept, 0)
    end)

    it("serves hypercalls, errors and stops", function()
      local m <close>, cpu = support.machine(backend, "0f 01 c1 f4")
      local answer = function(_, a, b) return a + b end
      assert(m:bind_hypercall(7, "u64(u64,u64)", function(...) return answer(...) end))
      cpu.rax, cpu.rbx, cpu.rcx = 7, 30, 3
      cpu:run()
      assert.equal(33, cpu.rax)
      answer = function() error "no answer" end
      cpu.rip, cpu.rax = 0x1000, 7
      raises("no answer", cpu.run, cpu)
      answer = function() return "x" end
      cpu.rip, cpu.rax = 0x1000, 7
      raises("integer expected", cpu.run, cpu)
      answer = function() return false end
      cpu.rip, cpu.rax = 0x1000, 7
      assert.equal("hook", cpu:run().reason)
    end)

    it("calls the guest from Lua from the guest", function()
      local m <close>, cpu = support.machine(backend, "e8 fb 0f 00 00 f4")
      m:write(0x1100, support.bytes "48 8d 04 3f c3")                         -- lea rax, [rdi + rdi]; ret
      m:bind_function(0x2000, "u64(u64)", function(who, n) return who:call(0x1100, "u64(u64)", n) + 1 end)
      cpu.rdi = 20
      assert.equal("halt", cpu:run().reason)
      assert.equal(41, cpu.rax)
    end)
  end)
end

describe("trace", function()
  it("goes to a function", function()
    local m <close>, cpu = support.machine("interp", "e6 80 f4")
    local lines = {}
    assert.is_true(m:trace("exit", function(category, line) table.insert(lines, { category, line }) end))
    cpu:run()
    assert.equal(1, #lines)
    assert.equal(libvm.trace.EXIT, lines[1][1])
    assert.truthy(lines[1][2]:find "io")
    assert.is_true(m:trace(nil))
    cpu:run()
    assert.equal(1, #lines)
    refused(libvm.status.E_INVALID, m:trace "nonsense")
  end)

  it("raises errors, and cannot use the machine", function()
    local m <close>, cpu = support.machine("interp", "e6 80 f4")
    m:trace("exit", function() error "in the trace" end)
    raises("in the trace", cpu.run, cpu)
    m:trace("exit", function() return cpu.rax end)
    raises("cannot use the machine", m.run, m)
    m:trace(0)
    assert.equal("halt", cpu:run().reason)
  end)
end)

describe("strategy", function()
  local seen
  local registered = libvm.mmu_register("lua-spec", {
    create = function() seen = { fills = 0 } return seen end,
    translate = function(state, cpu, gva, access)
      state.fills = state.fills + 1
      if gva >= 0x80000 then
        return nil, access == "w" and 2 or 0
      end
      if gva & ~0xfff == 0x5000 then
        return { gpa = gva - 0x2000, prot = "rw" }
      end
      return cpu:walk(gva, access)
    end,
    invalidate = function(state) state.invalidated = true end,
    root_changed = function(state, _, cr3) state.root = cr3 end,
    destroy = function(state) state.destroyed = true end,
  })

  it("is registered once", function()
    assert.is_true(registered)
    refused(libvm.status.E_EXISTS, libvm.mmu_register("lua-spec", { translate = print }))
    refused(libvm.status.E_EXISTS, libvm.mmu_register("tlb", { translate = print }))
    raises("field 'translate' is not a function", libvm.mmu_register, "lua-other", {})
    local found
    for _, name in ipairs(libvm.mmu_names()) do found = found or name == "lua-spec" end
    assert.is_true(found)
  end)

  for _, backend in ipairs(support.software) do
    it("translates on " .. backend, function()
      do
        local m <close>, cpu = support.machine(backend, "8a 04 25 10 50 00 00 8a 1c 25 00 00 08 00 f4", { mmu = "lua-spec" })
        assert.equal("lua-spec", m.mmu)
        m:write(0x3010, "Z")
        local e = cpu:run { exceptions = { 14 } }
        assert.same({ "exception", 14, 0x80000 }, { e.reason, e.vector, e.address })
        assert.equal(0x5a, cpu.rax)
        assert.truthy(seen.fills >= 3)
        assert.is_true(cpu:mmu_flush())
        assert.is_true(m:select_mmu "tlb")
        assert.is_true(seen.destroyed)
        assert.is_true(m:select_mmu "lua-spec")
      end
      assert.is_true(seen.destroyed)
    end)
  end

  it("raises its errors from run", function()
    local broken
    assert(libvm.mmu_register("lua-broken", {
      translate = function(_, cpu, gva, access)
        if broken then error "no translation" end
        return cpu:walk(gva, access)
      end,
    }))
    local m <close>, cpu = support.machine("interp", "8a 04 25 10 50 00 00 f4", { mmu = "lua-broken" })
    broken = true
    raises("no translation", cpu.run, cpu)
    broken = false
    cpu.rip = 0x1000
    assert.equal("halt", cpu:run().reason)
    local failing <const> = "create of the strategy failed"
    libvm.mmu_register("lua-failing", { create = function() error(failing) end, translate = print })
    raises(failing, libvm.machine, { mmu = "lua-failing", backend = "interp" })
  end)

  it("has views of memory", function()
    local m <close>, cpu = support.machine("jit", "c6 04 25 00 30 00 00 07 f4", { mmu = "ept" })
    local view = assert(m:ept_create())
    assert.is_true(m:ept_protect(view, 0x3000, 0x1000, "rx"))
    assert.same({ prot = "rx", accessed = false, dirty = false, page_bytes = 4096 }, m:ept_get(view, 0x3000))
    assert.is_true(cpu:ept_select(view))
    assert.equal(view, cpu:ept_current())
    local e = cpu:run()
    assert.same({ "violation", 0x3000, true }, { e.reason, e.gpa, e.is_write })
    local violation
    assert.is_true(m:ept_on_violation(function(who, v) violation = v return "emulate" end))
    assert.equal("halt", cpu:run().reason)
    assert.same({ 0x3000, "w", "rx", 7, view }, { violation.gpa, violation.access, violation.allowed, violation.value, violation.view })
    assert.equal("\0", m:read(0x3000, 1))
    m:ept_on_violation(function() error "in the violation" end)
    cpu.rip = 0x1000
    raises("in the violation", cpu.run, cpu)
    m:ept_on_violation(nil)
    local accessed = m:ept_fetch(view, 0x1000, 0x4000)
    assert.equal(0x1000, accessed[1])
    cpu:ept_select(0)
    assert.is_true(m:ept_destroy(view))
    refused(libvm.status.E_NOTFOUND, m:ept_destroy(view))
  end)

  it("is told of writes", function()
    local written
    assert(libvm.mmu_register("lua-written", {
      translate = function(_, cpu, gva, access) return cpu:walk(gva, access) end,
      table_written = function(_, _, gpa) written = gpa end,
    }))
    local m <close>, cpu = support.machine("interp", "c6 04 25 08 30 00 00 07 f4", { mmu = "lua-written" })
    assert.is_true(cpu:trap_writes(0x3000))
    cpu:run()
    assert.equal(0x3008, written)
    assert.is_true(cpu:trap_writes(0x3000, false))
  end)
end)

describe("memory at scale", function()
  it("is given back, advised, shared", function()
    local m <close> = libvm.machine()
    m:map_ram(0x100000, 1 << 20)
    m:write(0x100000, "x")
    assert.is_true(m:discard(0x100000, 4096))
    assert.equal("\0", m:read(0x100000, 1))
    assert.is_true(m:advise(0x100000, 4096, "small", "prefault"))
    raises("unknown advice", m.advise, m, 0x100000, 4096, "tiny")
    local n <close> = libvm.machine()
    n:map_ram(0x100000, 1 << 20)
    for _, x in ipairs { m, n } do x:write(0x110000, ("page"):rep(8192)) end
    local saved = libvm.share_pages(m, n)
    assert.truthy(saved >= 0)
    assert.equal("page", n:read(0x110000, 4))
    raises("machine expected", libvm.share_pages, 1)
  end)

  it("comes from a file for a PC", function()
    local path = os.tmpname()
    local file <close> = assert(io.open(path, "wb"))
    file:write(("\0"):rep(0x1000), "from the file", ("\0"):rep((2 << 20) - 0x1000 - 13))
    file:flush()
    local pc = { platform = "pc", memory = "2M", backend = "interp", memory_file = path, memory_advice = { "small" } }
    local m <close> = assert(libvm.machine(pc))
    assert.equal("from the file", m:read(0x1000, 13))
    m:write(0x1000, "to")
    local again <close> = assert(io.open(path, "rb"))
    again:seek("set", 0x1000)
    assert.equal("toom the file", again:read(13))
    pc.memory_private = true
    local n <close> = assert(libvm.machine(pc))
    n:write(0x1000, "in")
    assert.equal("toom the file", m:read(0x1000, 13))
    pc.memory = "4M"
    refused(libvm.status.E_INVALID, libvm.machine(pc))
    pc.memory_advice = "tiny"
    raises("unknown advice", libvm.machine, pc)
    os.remove(path)
  end)

  it("has doorbells only on eventfds", function()
    local m <close> = libvm.machine()
    refused(libvm.status.E_INVALID, m:ioeventfd { fd = 0, address = 0x1000 })
    raises("unknown option", m.ioeventfd, m, { addr = 1 })
    local _, _, code = m:irqfd(0, 3)
    assert.truthy(code == libvm.status.E_INVALID or code == libvm.status.E_UNSUPPORTED)
    assert.truthy(select(3, m:irqfd_msi(0, 0xfee00000, 0)))
    local region = m:map_mmio(0x1000, 4096, { write = print })
    assert.is_true(region:coalesce(0, 16))
    refused(libvm.status.E_INVALID, region:coalesce(4096, 16))
    assert.is_true(region:coalesce(0, 16, false))
  end)
end)

describe("leaks", function()
  it("are none over many cycles with callbacks", function()
    local function cycle()
      local m <close>, cpu = support.machine("interp", LOAD)
      m:map_mmio(0x100000, 0x1000, { read = function() return m and 1 end })
      m:hook("block", function() return m and nil end)
      local s = m:snapshot()
      cpu:run()
      s:restore()
    end
    local function size()
      for _ = 1, 3 do collectgarbage() end
      return collectgarbage "count"
    end
    for _ = 1, 20 do cycle() end
    local before = size()
    for _ = 1, 300 do cycle() end
    assert.truthy(size() - before < 16, "grew by " .. size() - before .. " KiB")
  end)

  it("are none when many machines are left to the collector", function()
    for i = 1, 200 do
      local m, cpu = support.machine("interp", LOAD)
      m:map_mmio(0x100000, 0x1000, { read = function() return cpu.rip end })
      cpu:run()
      if i % 50 == 0 then collectgarbage() end
    end
    collectgarbage()
  end)
end)
