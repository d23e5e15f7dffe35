-- Machines: making, closing, misuse, errors, the memory map, registers, runs.
local support = require "support"
local libvm = support.libvm
local raises, refused = support.raises, support.refused

describe("module", function()
  it("names its version", function()
    local text, number = libvm.version()
    local major, minor, patch = text:match "^(%d+)%.(%d+)%.(%d+)$"
    assert.equal(major * 10000 + minor * 100 + patch, number)
  end)

  it("has the headers' constants", function()
    assert.equal(0, libvm.status.OK)
    assert.equal(-7, libvm.status.E_FAULT)
    assert.equal(1, libvm.exit.HALT)
    assert.equal(1, libvm.reg.RAX)
    assert.equal(127, libvm.trace.ALL)
    assert.equal("not found", libvm.strerror(libvm.status.E_NOTFOUND))
  end)

  it("lists registers and counters", function()
    local registers = libvm.registers()
    assert.equal(8, registers.rax)
    assert.equal(32, registers.ymm15)
    assert.equal(10, registers.st0)
    local name, bytes, number = libvm.find_register "RIP"
    assert.same({ "rip", 8, libvm.reg.RIP }, { name, bytes, number })
    assert.is_nil(libvm.find_register "nonsense")
    assert.equal("string", type(libvm.stat_names().instructions))
  end)

  it("queries backends", function()
    assert.equal(1, libvm.query("interp", "available"))
    refused(libvm.status.E_NOTFOUND, libvm.query("interp", "no-such-thing"))
    assert.truthy(#libvm.errmsg() > 0)
    raises("unknown backend", libvm.query, "tcg", "available")
  end)

  it("parses trace lists", function()
    assert.equal(libvm.trace.MMIO | libvm.trace.IRQ, libvm.trace_parse "mmio,irq")
    refused(libvm.status.E_INVALID, libvm.trace_parse "mmio,nonsense")
  end)
end)

describe("machine", function()
  it("is closed by close, <close> and twice", function()
    local m = libvm.machine()
    do
      local n <close> = m
      assert.is_false(n.closed)
    end
    assert.is_true(m.closed)
    m:close()
    m:close()
    assert.truthy(tostring(m):find "closed")
    raises("closed", m.read, m, 0, 1)
  end)

  it("is closed when its scope ends with an error", function()
    local kept
    raises("on purpose", function()
      local m <close> = libvm.machine()
      kept = m
      error "on purpose"
    end)
    assert.is_true(kept.closed)
  end)

  it("tells what is wrong with options", function()
    raises("unknown option 'bakend'", libvm.machine, { bakend = "jit" })
    raises("unknown value 'tcg'", libvm.machine, { backend = "tcg" })
    raises("table expected", libvm.machine, 17)
    raises("integer expected", libvm.machine, { vcpus = {} })
    raises("out of range", libvm.machine, { vcpus = -1 })
    raises("not a size", libvm.machine, { platform = "pc", memory = "64X" })
    refused(libvm.status.E_INVALID, libvm.machine { platform = "pc" })
    refused(libvm.status.E_INVALID, libvm.machine { vcpus = 1000 })
    refused(libvm.status.E_UNSUPPORTED, libvm.machine { mmu = "no-such-strategy" })
  end)

  it("has its options", function()
    local m <close> = libvm.machine { backend = "interp", vcpus = 3, mmu = "flat" }
    assert.same({ "interp", 3, "flat" }, { m.backend, m.vcpu_count, m.mmu })
    local seen = {}
    for cpu in m:vcpus() do
      table.insert(seen, cpu.index)
      assert.equal(m, cpu.machine)
    end
    assert.same({ 0, 1, 2 }, seen)
    assert.equal(m.cpu, m:vcpu(0))
    assert.is_nil(m:vcpu(3))
    raises("no such field", function() return m.nonsense end)
  end)

  it("is kept alive by its vCPU, region and buffer", function()
    local cpu, region, view
    do
      local m = libvm.machine()
      cpu = m.cpu
      region = m:map_ram(0, 4096)
      view = region:view()
    end
    for _ = 1, 3 do collectgarbage() end
    view:u32(4, 0xdeadbeef)
    assert.equal(0xdeadbeef, string.unpack("<I4", cpu.machine:read(4, 4)))
    assert.equal(4096, region.bytes)
  end)

  it("is collected although a callback mentions it", function()
    local weak = setmetatable({}, { __mode = "k" })
    do
      local m = libvm.machine()
      m:map_mmio(0, 4096, { read = function() return m and 0 end })
      weak[m] = true
    end
    for _ = 1, 3 do collectgarbage() end
    assert.is_nil(next(weak))
  end)

  it("moves to another backend", function()
    local m <close>, cpu = support.machine("interp", "48 ff c0 eb fb")
    cpu:run { max_instructions = 11 }
    assert.is_true(m:select_backend "jit")
    assert.equal("jit", m.backend)
    cpu:run { max_instructions = 10 }
    assert.equal(11, cpu.rax)
    raises("unknown backend", m.select_backend, m, "x")
  end)

  it("counts", function()
    local m <close>, cpu = support.machine("interp", "90 90 f4")
    cpu:run()
    assert.equal(3, m:stats "instructions")
    assert.equal(3, m:stats().instructions)
    assert.equal(3, cpu.retired)
    assert.equal(3, m.time)
    refused(libvm.status.E_NOTFOUND, m:stats "nonsense")
  end)

  it("resets", function()
    local m <close> = libvm.machine()
    local resets = 0
    m:map_mmio(0x1000, 4096, { reset = function() resets = resets + 1 end })
    m.cpu.rax = 5
    assert.is_true(m:reset())
    assert.same({ 0, 1, 0xfff0 }, { m.cpu.rax, resets, m.cpu.rip })
  end)
end)

describe("memory", function()
  it("is read and written", function()
    local m <close> = libvm.machine()
    m:map_ram(0x1000, "8K", "rw")
    assert.is_true(m:write(0x1ffe, "abcd"))
    assert.equal("abcd", m:read(0x1ffe, 4))
    assert.equal("", m:read(0x1000, 0))
    refused(libvm.status.E_FAULT, m:read(0x2ffe, 4))
    refused(libvm.status.E_FAULT, m:write(0, "x"))
    raises("out of range", m.read, m, 0x1000, -1)
    raises("number expected", m.read, m, "somewhere", 1)
    raises("no integer representation", m.read, m, 1.5, 1)
  end)

  it("has regions", function()
    local m <close> = libvm.machine()
    local b = m:map_ram(0x4000, 0x1000, "r")
    local a = m:map_ram(0x1000, 0x2000)
    local list = {}
    for region in m:regions() do
      table.insert(list, { region.gpa, region.bytes })
    end
    assert.same({ { 0x1000, 0x2000 }, { 0x4000, 0x1000 } }, list)
    refused(libvm.status.E_EXISTS, m:map_ram(0x2000, 0x1000))
    refused(libvm.status.E_INVALID, m:map_ram(0x10, 0x1000))
    raises("letters r, w and x", m.map_ram, m, 0x10000, 0x1000, "rq")
    assert.is_true(a:unmap())
    assert.is_false(a.mapped)
    raises("unmapped", a.unmap, a)
    assert.is_true(m:unmap(b))
    assert.is_nil(m:regions()())
    local other <close> = libvm.machine()
    raises("another machine", m.unmap, m, other:map_ram(0, 4096))
  end)

  it("is seen through views, which end with the region", function()
    local m <close> = libvm.machine()
    local r = m:map_ram(0x1000, 0x1000)
    local view = r:view()
    assert.equal(0x1000, #view)
    view:u16(2, 0x1234)
    assert.equal("\0\0\x34\x12", m:read(0x1000, 4))
    r:unmap()
    raises("region is gone", view.u8, view, 0)
  end)

  it("can be the program's", function()
    local m <close> = libvm.machine()
    local buffer = libvm.buffer(8192)
    local r = m:map_host(0x1000, buffer, "rw")
    buffer:write(0, "hello")
    assert.equal("hello", m:read(0x1000, 5))
    m:write(0x1005, "!")
    assert.equal("hello!", buffer:read(0, 6))
    buffer = nil
    collectgarbage()
    assert.equal("hello!", m:read(0x1000, 6))
    raises("not a view", m.map_host, m, 0x8000, r:view())
    refused(libvm.status.E_INVALID, m:map_host(0x8000, libvm.buffer(100)))
  end)

  it("can be a file", function()
    local path = os.tmpname()
    local file <close> = assert(io.open(path, "w+b"))
    file:write(("x"):rep(8192), "tail", ("\0"):rep(4092))
    local m <close> = libvm.machine()
    assert(m:map_file(0x10000, 4096, "rw", file, { offset = 8192, private = true }))
    assert.equal("tail", m:read(0x10000, 4))
    m:write(0x10000, "HEAD")
    file:seek("set", 8192)
    assert.equal("tail", file:read(4))
    refused(libvm.status.E_INVALID, m:map_file(0x20000, 4096, "rw", file, { offset = 1 << 20 }))
    raises("FILE*", m.map_file, m, 0x20000, 4096, "r", path)
    os.remove(path)
  end)

  it("keeps permissions", function()
    for _, backend in ipairs(support.software) do
      local m <close>, cpu = support.machine(backend, "c6 04 25 00 20 00 00 01 f4")   -- mov byte [0x2000], 1
      assert.is_true(m:protect(0x2000, 0x1000, "r"))
      local e = cpu:run()
      assert.same({ "unmapped", 0x2000, true, 1 }, { e.reason, e.gpa, e.is_write, e.width })
      m:protect(0x2000, 0x1000, "rw")
      assert.equal("halt", cpu:run().reason)
      assert.equal("\1", m:read(0x2000, 1))
      refused(libvm.status.E_FAULT, m:protect(0x100000, 0x1000, "r"))
    end
  end)

  it("logs dirty pages", function()
    local m <close>, cpu = support.machine("interp", "c6 04 25 00 30 00 00 01 f4")
    assert.is_true(m:dirty_log(true))
    cpu:run()
    m:write(0x5000, "x")
    assert.same({ 0x3000, 0x5000 }, m:dirty_fetch(0x1000, 0x10000))
    assert.same({}, m:dirty_fetch(0x1000, 0x10000))
    m:dirty_log(false)
    refused(libvm.status.E_INVALID, m:dirty_fetch(0x1000, 0x10000))
    raises("boolean expected", m.dirty_log, m)
  end)

  it("executes what was changed through a view after invalidate", function()
    for _, backend in ipairs(support.backends) do
      local m <close>, cpu = support.machine(backend, "b8 01 00 00 00 f4")
      cpu:run()
      local view
      for region in m:regions() do view = region:view() end
      view:u8(1, 2)
      assert.is_true(m:invalidate(0x1000, 16))
      cpu.rip = 0x1000
      cpu:run()
      assert.equal(2, cpu.rax)
    end
  end)
end)

describe("buffer", function()
  it("has accessors", function()
    local b = libvm.buffer(32)
    assert.equal(32, #b)
    b:u64(8, -2)
    assert.same({ 0xfe, 0xfffe, 0xfffffffe, -2 }, { b:u8(8), b:u16(8), b:u32(8), b:u64(8) })
    assert.same({ -2, -2, -2, -2 }, { b:i8(8), b:i16(8), b:i32(8), b:i64(8) })
    b:f64(0, 1.5)
    assert.equal(1.5, b:f64(0))
    b:f32(0, 2.5)
    assert.equal(2.5, b:f32(0))
    b:fill(0x41)
    assert.equal(("A"):rep(32), tostring(b))
    assert.equal("A", b:read(31))
    assert.equal("abc", tostring(libvm.buffer "abc"))
  end)

  it("has bounds", function()
    local b = libvm.buffer(8)
    raises("outside", b.u64, b, 1)
    raises("outside", b.u8, b, 8)
    raises("outside", b.u8, b, -1)
    raises("outside", b.u8, b, math.mininteger)
    raises("outside", b.u64, b, math.maxinteger, 1)
    raises("outside", b.write, b, 4, "12345")
    raises("outside", b.read, b, 4, 5)
    raises("outside", b.read, b, 9)
    raises("out of range", libvm.buffer, -1)
    raises("no such field", function() return b.nonsense end)
  end)
end)

describe("registers", function()
  it("are fields", function()
    local m <close> = libvm.machine()
    local cpu = m.cpu
    cpu:set_mode "flat64"
    cpu.rax, cpu.r15 = -1, 0x1234
    assert.same({ -1, 0x1234 }, { cpu.rax, cpu.r15 })
    cpu.xmm3 = ("x"):rep(16)
    assert.equal(("x"):rep(16) .. ("\0"):rep(16), cpu.ymm3)
    cpu.ymm3 = ("y"):rep(32)
    assert.equal(("y"):rep(16), cpu.xmm3)
    cpu.st0 = string.pack("<I8I2", 1 << 63, 0x3fff)
    assert.equal("\x00\x00\x00\x00\x00\x00\x00\x80\xff\x3f", cpu.st0)
    assert.equal(5, cpu:set_reg("RBX", 5) or cpu:reg "rbx")
    assert.equal(5, cpu:reg(libvm.reg.RBX))
    raises("no such register", function() cpu.eax = 1 end)
    raises("no such register", function() return cpu.eax end)
    raises("a string of 16 bytes", function() cpu.xmm0 = "short" end)
    raises("too large", function() cpu.cs = 0x10000 end)
    raises("number expected", function() cpu.rax = {} end)
    raises("out of range", cpu.reg, cpu, 10000)
    raises("no such register", cpu.reg, cpu, "nonsense")
    raises("cannot be set", function() cpu.cr0 = -1 end)
  end)

  it("come in bulk", function()
    local m <close> = libvm.machine()
    local cpu = m.cpu
    cpu:set_mode "flat64"
    assert.is_true(cpu:set_regs { rax = 1, rip = 0x2000 })
    local regs = cpu:regs()
    assert.same({ 1, 0x2000, 0, 2 }, { regs.rax, regs.rip, regs.rcx, regs.rflags })
    raises("no such field: eax", cpu.set_regs, cpu, { eax = 1 })
    local sregs = cpu:sregs()
    assert.equal(0xffff, sregs.cs.attributes & 0x2000 == 0x2000 and 0xffff)
    assert.equal(0, sregs.cpl)
    assert.is_true(cpu:set_sregs { fs = { base = 0x1234000 }, cr2 = 0x55, gdtr = { base = 0x100, limit = 0xff } })
    assert.same({ 0x1234000, 0x55, 0x100 }, { cpu.fs_base, cpu.cr2, cpu:sregs().gdtr.base })
    raises("no such field", cpu.set_sregs, cpu, { fs = { bass = 1 } })
    raises("32 bits", cpu.set_sregs, cpu, { fs = { limit = 1 << 32 } })
    refused(libvm.status.E_INVALID, cpu:set_sregs { cr0 = -1 })
    assert.is_true(cpu:set_fpu { mxcsr = 0x1f80, ymm = { [0] = ("z"):rep(32) } })
    local fpu = cpu:fpu()
    assert.same({ ("z"):rep(32), 0x37f, 10 }, { fpu.ymm[0], fpu.fcw, #fpu.st[7] })
    raises("32 bytes", cpu.set_fpu, cpu, { ymm = { [16] = ("z"):rep(32) } })
  end)

  it("include MSRs", function()
    local m <close> = libvm.machine { backend = "interp" }
    local cpu = m.cpu
    assert.is_true(cpu:set_msr(0xc0000102, 0x1234))          -- kernel GS base
    assert.equal(0x1234, cpu:msr(0xc0000102))
    refused(libvm.status.E_NOTFOUND, cpu:msr(0x12345678))
    raises("out of range", cpu.msr, cpu, -1)
  end)
end)

describe("run", function()
  for _, backend in ipairs(support.backends) do
    describe(backend, function()
      it("halts", function()
        local m <close>, cpu = support.machine(backend, "48 8d 04 37 48 0f af c0 f4")
        cpu.rdi, cpu.rsi = 2, 40
        local e = cpu:run()
        assert.same({ "halt", libvm.exit.HALT, 0x1009, 1764 }, { e.reason, e.reason_code, e.rip, cpu.rax })
        assert.equal(cpu, e.cpu)
        assert.equal(e, cpu.last_exit)
        assert.truthy(tostring(e):find "halt")
      end)

      it("completes port reads", function()
        local m <close>, cpu = support.machine(backend, "e5 80 f4")                 -- in eax, 0x80
        local e = cpu:run()
        assert.same({ "io", 0x80, 4, false }, { e.reason, e.port, e.width, e.is_write })
        e.data = 0x11223344
        assert.equal("halt", cpu:run().reason)
        assert.equal(0x11223344, cpu.rax)
        raises("cannot be set", function() e.port = 1 end)
        local seen = {}
        for k, v in pairs(e) do seen[k] = v end
        assert.same({ "io", 0x80 }, { seen.reason, seen.port })
      end)

      it("completes memory reads", function()
        local m <close>, cpu = support.machine(backend, "8b 04 25 00 00 10 00 f4")  -- mov eax, [0x100000]
        local e = cpu:run()
        assert.same({ "unmapped", 0x100000, 4, false, false }, { e.reason, e.gpa, e.width, e.is_write, e.is_fetch })
        e.data = 77
        assert.equal("halt", cpu:run().reason)
        assert.equal(77, cpu.rax)
      end)

      it("ends at a deadline and by a kick", function()
        local m <close>, cpu = support.machine(backend, "eb fe")
        assert.equal("deadline", cpu:run { timeout = 0.01 }.reason)
        assert.equal("deadline", cpu:run { deadline_ns = 1000000 }.reason)
        cpu:kick()
        assert.equal("kick", cpu:run().reason)
      end)

      it("stops at an address", function()
        local m <close>, cpu = support.machine(backend, "90 90 90 90 f4")
        local e = cpu:run { ["until"] = 0x1002 }
        assert.same({ "until", 0x1002 }, { e.reason, cpu.rip })
        assert.equal("until", cpu:run { until_ = 0x1003 }.reason)
      end)
    end)
  end

  for _, backend in ipairs(support.software) do
    it("keeps budgets and steps on " .. backend, function()
      local m <close>, cpu = support.machine(backend, "48 ff c0 eb fb")
      assert.equal("budget", cpu:run { max_instructions = 1001 }.reason)
      assert.equal(501, cpu.rax)
      assert.equal("step", cpu:run { single_step = true }.reason)
      assert.equal(1002, cpu.retired)
    end)

    it("names the instruction of an exit unless brief on " .. backend, function()
      local m <close>, cpu = support.machine(backend, "e5 40 e5 40 f4")   -- in eax, 0x40, twice
      assert.equal(2, #cpu:run().insn)
      assert.equal(0, #cpu:run { brief = true, signal_blocked = false }.insn)
      assert.equal("halt", cpu:run().reason)
    end)

    it("gives exceptions on " .. backend, function()
      local m <close>, cpu = support.machine(backend, "31 c9 f7 f1")               -- xor ecx, ecx; div ecx
      local e = cpu:run { exceptions = { 0, 14 } }
      assert.same({ "exception", 0, false, 0x1002 }, { e.reason, e.vector, e.has_error, e.rip })
      assert.equal("\xf7\xf1", e.insn)
      assert.equal("exception", cpu:run { exceptions = 1 }.reason)
      assert.equal("shutdown", cpu:run().reason)
    end)

    it("completes hypercalls on " .. backend, function()
      local m <close>, cpu = support.machine(backend, "0f 01 c1 f4")
      cpu.rax, cpu.rbx, cpu.r8 = 5, 10, 60
      local e = cpu:run()
      assert.same({ "hypercall", 5, 10, 60 }, { e.reason, e.number, e.args[1], e.args[6] })
      e.result = 99
      cpu:run()
      assert.equal(99, cpu.rax)
    end)
  end

  it("refuses bad options", function()
    local m <close>, cpu = support.machine("interp", "f4")
    raises("unknown option", cpu.run, cpu, { budget = 1 })
    raises("seconds expected", cpu.run, cpu, { timeout = -1 })
    raises("vectors 0 to 31", cpu.run, cpu, { exceptions = { "x" } })
    refused(libvm.status.E_INVALID, cpu:run { exceptions = 1 << 40 })
  end)

  it("translates and reaches guest-virtual memory", function()
    local m <close>, cpu = support.machine("interp", "f4")
    assert.equal(0x1234, cpu:translate(0x1234, "w"))
    assert.equal(0x2000, cpu:walk(0x2000, "r").gpa & ~0xfff)
    assert.is_true(cpu:write(0x2000, "guest"))
    assert.equal("guest", cpu:read(0x2000, 5))
    refused(libvm.status.E_FAULT, cpu:read(0x100000, 1))
    raises("one of", cpu.translate, cpu, 0, "rw")
  end)

  it("injects", function()
    local m <close>, cpu = support.machine("interp", "eb fe")
    assert.is_true(cpu:inject(13, 0))
    refused(libvm.status.E_BUSY, cpu:inject(13, 0))
    local e = cpu:run { exceptions = { 13 }, max_instructions = 10 }
    assert.truthy(e.reason == "exception" or e.reason == "shutdown")
    refused(libvm.status.E_INVALID, cpu:inject(3, 1))
    raises("out of range", cpu.inject, cpu, 256)
    refused(libvm.status.E_UNSUPPORTED, m:irq_set(3, true))
    refused(libvm.status.E_UNSUPPORTED, m:irq_msi(0xfee00000, 0x30))
  end)
end)
