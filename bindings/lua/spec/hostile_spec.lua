-- What must not crash, hang or leak: wrong arguments of every function, objects of closed machines, Ctrl-C, scripts that end
-- with machines alive, many cycles. TEST_SEED and TEST_COUNT: other wrong arguments, and how many calls.
local support = require "support"
local libvm = support.libvm
local raises = support.raises

-- The methods of an object, by name.
local function methods(object)
  local _, table = debug.getupvalue(debug.getmetatable(object).__index, 1)
  return table or {}
end

local LOOP = "b9 0a 00 00 00 ff c9 75 fc f4"     -- mov ecx, 10; again: dec ecx; jnz again; hlt

-- One of each class that belongs to a machine.
local function objects(backend)
  local m, cpu = support.machine(backend, LOOP)
  local all = { machine = m, cpu = cpu }
  all.region = m:map_ram(0x40000, 0x4000)
  all.mmio = m:map_mmio(0x80000, 0x1000, { read = function() return 1 end })
  all.view = all.region:view()
  all.hook = m:hook("block", function() end)
  all.binding = m:bind_function(0x9000, "u64(u64)", function(_, x) return x end)
  all.snapshot = m:snapshot()
  all.ring = cpu:block_trace(16)
  all.log = cpu:compare_log(16)
  all.stub = m:gdbstub "127.0.0.1:0"
  all.exit = cpu:run()
  return all
end

describe("a closed machine", function()
  it("is refused by every method of everything that was its", function()
    local all = objects "interp"
    local fine = { machine = { close = true }, snapshot = { free = true }, stub = { free = true } }
    all.machine:close()
    for name, object in pairs(all) do
      if name ~= "ring" and name ~= "log" and name ~= "exit" then         -- records that stay what they are
        for method, f in pairs(methods(object)) do
          local ok, message = pcall(f, object, 0x1000, 16, "x")
          if not (fine[name] or {})[method] then
            assert.is_false(ok, name .. ":" .. method)
            assert.truthy(message:find "closed" or message:find "gone" or message:find "expected" or message:find "invalid" or
              message:find "unknown" or message:find "letters" or message:find "one of" or message:find "not a function" or
              message:find "out of range",
              name .. ":" .. method .. ": " .. message)
          end
        end
      end
    end
    for _, f in ipairs { function() return all.cpu.rax end, function() all.cpu.rax = 1 end, function() return all.machine.cpu end,
                         function() return all.cpu:run() end, function() return all.machine:read(0x1000, 1) end,
                         function() return all.region:unmap() end, function() return all.hook:remove() end,
                         function() return all.binding:unbind() end, function() return all.snapshot:restore() end,
                         function() return all.stub.address end } do
      raises("closed", f)
    end
    assert.same({ false, false, false }, { all.hook.active, all.binding.active, all.region.mapped })
    assert.equal("halt", all.exit.reason)
    all.view = nil                        -- whose text is its contents
    for name, object in pairs(all) do assert.truthy(tostring(object), name) end
  end)
end)

describe("wrong arguments", function()
  local seed, count = tonumber(os.getenv "TEST_SEED") or 1, tonumber(os.getenv "TEST_COUNT") or 6000
  -- What would wait, go for good, or end the process.
  local left_out = { sandbox_enter = true, serve = true, wait_for = true, send = true }
  local fields = { "backend", "platform", "vcpus", "mmu", "memory", "code_cache", "cpu_model", "memory_file", "memory_private",
                   "memory_advice", "max_instructions", "timeout", "until_",
                   "exceptions", "single_step", "signal_blocked", "brief", "begin", "last", "gpa", "exact", "switch", "read", "write", "save", "restore", "clone", "destroy",
                   "translate", "offset", "private", "kernel", "initrd", "cmdline", "fd", "address", "width", "match", "preserve", "stack",
                   "rax", "cr0", "cs", "mxcsr", "ymm", "on_exit", "runs_alone", "skip_idle", 1, 2, 3 }

  local words = { "x", "rwx", "jit", "pc", "64K", "block", "u64(u64)", "rax" }
  after_each(function()                           -- some of it is taken for the name of a file
    for _, word in ipairs(words) do os.remove(word) end
  end)

  for _, backend in ipairs(support.software) do
    it("are refused on " .. backend, function()
      math.randomseed(seed)
      local scratch = assert(io.tmpfile())
      local gone = objects "interp"
      gone.machine:close()
      local all, pool, names
      local functions = {}                      -- of each object, by its name

      local function sorted_keys(t, is_wanted)
        local keys = {}
        for key, v in pairs(t) do
          if is_wanted(key, v) then keys[#keys + 1] = key end
        end
        table.sort(keys)
        return keys
      end

      local function renew()
        all = objects(backend)
        all.module = libvm
        local blocks = 0
        all.machine:hook("block", function()      -- no run is for ever
          blocks = blocks + 1
          return blocks % 200 == 0 and "stop" or nil
        end)
        pool = { true, false, -1, 0, 1, 7, 4096, 0x1000, 0x40000, 1 << 53, math.mininteger, math.maxinteger, 1.5, 0 / 0, 1 / 0, "", "/nonexistent/file",
                 "%", ("long"):rep(2000), "a\0b", {}, { 1, 2, 3 }, setmetatable({}, { __index = function() all.machine:close() end }), print,
                 function() end, function() error "on purpose" end, function() return "nonsense" end, function() return -1 end,
                 coroutine.create(print), scratch, libvm.buffer(64), gone.machine, gone.cpu, gone.region, gone.hook, gone.snapshot }
        for _, word in ipairs(words) do table.insert(pool, word) end
        for _, object in pairs(all) do table.insert(pool, object) end
        names = sorted_keys(all, function(_, object) return object == libvm or next(methods(object)) end)
        for _, name in ipairs(names) do
          functions[name] = functions[name] or sorted_keys(all[name] == libvm and libvm or methods(all[name]), function(method, f)
            return type(f) == "function" and not left_out[method]
          end)
        end
      end

      local function value(depth)
        local v = pool[math.random(#pool + 2)]
        if v == nil and math.random(2) == 1 and depth < 2 then
          v = {}
          for _ = 1, math.random(3) do v[fields[math.random(#fields)]] = value(depth + 1) end
        end
        return v
      end

      renew()
      for n = 1, count do
        local name = names[math.random(#names)]
        local object = all[name]
        local list, arguments = object == libvm and libvm or methods(object), table.pack()
        local method = functions[name][math.random(#functions[name])]
        if object ~= libvm and math.random(20) > 1 then arguments = table.pack(object) end
        for _ = 1, math.random(0, 5) do
          arguments.n = arguments.n + 1
          arguments[arguments.n] = value(0)
        end
        if method == "run" then arguments[2], arguments.n = { max_instructions = 1000 }, 2 end
        local result = table.pack(pcall(list[method], table.unpack(arguments, 1, arguments.n)))
        local is_fine = true                    -- luassert would take longer than the call
        if not result[1] then
          is_fine = type(result[2]) == "string" and #result[2] > 0
        elseif result[2] == nil and result.n >= 4 and type(result[3]) == "string" and type(result[4]) == "number" then
          is_fine = #result[3] > 0 and result[4] < 0
        end
        if not is_fine then error(("%s:%s (call %d of seed %d)"):format(name, method, n, seed)) end
        if all.machine.closed or n % 200 == 0 then
          pcall(all.machine.close, all.machine)
          renew()
        end
      end
      pcall(all.machine.close, all.machine)
      scratch:close()
      local m <close>, cpu = support.machine(backend, LOOP)
      assert.equal("halt", cpu:run().reason)
    end)
  end

  it("are named by messages", function()
    local m <close>, cpu = support.machine("interp", LOOP)
    for expected, f in pairs {
      ["'cache'"] = function() return libvm.machine { cache = 1 } end,
      ["'quick'"] = function() return libvm.machine { backend = "quick" } end,
      ["'12Q'"] = function() return m:map_ram(0, "12Q") end,
      ["'rwz'"] = function() return m:map_ram(0, 4096, "rwz") end,
      ["'eax'"] = function() return cpu:reg "eax" end,
      ["'blok'"] = function() return m:hook("blok", print) end,
      ["0x1800"] = function() error((select(2, m:map_ram(0x1800, 4096)))) end,
      ["0x90000"] = function() error((select(2, m:read(0x90000, 4)))) end,
      ["\"flt\""] = function() error((select(2, libvm.machine { mmu = "flt" }))) end,
    } do
      raises(expected, f)
    end
  end)
end)

-- Runs a script in an interpreter of its own: its output. `how`: words before the interpreter's.
local function script(text, how)
  local path, interpreter = os.tmpname(), "lua5.4"
  local file = assert(io.open(path, "w"))
  file:write('local support = require "support"\nlocal libvm = support.libvm\n', text)
  file:close()
  for i = -1, -20, -1 do interpreter = arg and arg[i] or interpreter end
  local pipe = assert(io.popen(("%s '%s' '%s' 2>&1"):format(how or "", interpreter, path)))
  local output = pipe:read "a"
  local ok, _, status = pipe:close()
  os.remove(path)
  return output, ok and 0 or status
end

describe("Ctrl-C", function()
  for _, options in ipairs { "nil", "{ timeout = 60 }", "{ max_instructions = 1 << 60 }" } do
    it("ends a run with " .. options, function()
      local output = script([[
        local m, cpu = support.machine(support.software[#support.software], "eb fe")
        io.stdout:write "ready\n"
        print(pcall(function() return cpu:run(]] .. options .. [[) end))
        print(pcall(function() return m:read(0x1000, 2) end))
      ]], "timeout --foreground --preserve-status -k 20 -s INT 1")
      assert.truthy(output:find "^ready\nfalse\t[^\n]*interrupted!\ntrue\t", "the output is: " .. output)
    end)
  end

  it("ends a wait for a console", function()
    local output = script([[
      local m = libvm.machine { platform = "pc", memory = "2M", backend = "interp" }
      support.load(m, "eb fe")
      print(pcall(function() return m:console():wait_for("login:", 60) end))
    ]], "timeout --foreground --preserve-status -k 20 -s INT 1")
    assert.truthy(output:find "^false\t[^\n]*interrupted!", "the output is: " .. output)
  end)
end)

describe("a script's end", function()
  local machines = [[
    ends = {}
    for i, backend in ipairs(support.software) do
      local m, cpu = support.machine(backend, "b9 0a 00 00 00 ff c9 75 fc f4")
      m:map_pio(0x60, 1, { destroy = function() io.stdout:write("end of ", backend, "\n") end })
      m:hook("block", function() end)
      cpu:run()
      ends[i] = { m, m:snapshot(), m:map_ram(0x40000, 4096):view() }
    end
    ends.pc = libvm.machine { platform = "pc", memory = "2M", backend = "interp" }
  ]]
  for how, ending in pairs { ["by return"] = "", ["by os.exit"] = "os.exit(0, true)", ["at once"] = "os.exit(0)", ["by an error"] = "error 'over'" } do
    it("with machines alive, " .. how, function()
      local output, status = script(machines .. ending)
      local _, count = output:gsub("end of %w+\n", "")
      assert.equal(how == "by an error" and 1 or 0, status, output)
      assert.equal(how == "at once" and 0 or #support.software, count, output)
    end)
  end
end)

describe("slices of a run", function()
  for _, backend in ipairs(support.software) do
    local turns = backend == "jit" and 0x10000000 or 0x800000
    local code = "b9 " .. support.hex(string.pack("<I4", turns)) .. " ff c9 75 fc f4"

    it("do not show in budgets on " .. backend, function()
      local m <close>, cpu = support.machine(backend, code)
      assert.equal("budget", cpu:run { max_instructions = turns + 1 }.reason)
      assert.equal(turns + 1, cpu.retired)
      assert.equal("halt", cpu:run { timeout = 100 }.reason)
      assert.equal(0, cpu.rcx)
    end)

    it("do not show in until and breakpoints on " .. backend, function()
      local m <close>, cpu = support.machine(backend, code)
      assert.equal("until", cpu:run { until_ = 0x1009 }.reason)
      assert.same({ 0x1009, 0 }, { cpu.rip, cpu.rcx })
      cpu.rip = 0x1000
      m:breakpoint(0x1009)
      assert.equal("breakpoint", cpu:run { timeout = 100 }.reason)
      assert.same({ 0x1009, 0 }, { cpu.rip, cpu.rcx })
    end)
  end
end)

describe("many cycles", function()
  local count = tonumber(os.getenv "LIBVM_LEAK_CYCLES") or 500

  local function resident()
    local file <close> = assert(io.open "/proc/self/statm")
    return tonumber(file:read "a":match "%d+ (%d+)") * 4096
  end

  local function cycle(backend)
    local m <close>, cpu = support.machine(backend, "e4 60 f4")
    m:map_pio(0x60, 1, { read = function() return m and 1 end })
    local blocks = 0
    m:hook("block", function() blocks = blocks + 1 end)
    m:coverage(libvm.buffer(256))
    cpu:block_trace(16)
    local s <close> = m:snapshot()
    assert(cpu:run().reason == "halt" and blocks > 0)
    s:restore()
    pcall(m.hook, m, "block", 5)
  end

  for _, backend in ipairs(support.software) do
    it("leak nothing on " .. backend, function()
      for _ = 1, count // 3 do cycle(backend) end
      for _ = 1, 3 do collectgarbage() end
      local memory, pages = collectgarbage "count", resident()
      for _ = 1, count do cycle(backend) end
      for _ = 1, 3 do collectgarbage() end
      assert.truthy(collectgarbage "count" - memory < 16, "Lua's memory grew")
      if not os.getenv "LD_PRELOAD" then assert.truthy(resident() - pages < 16 << 20, "the process grew by " .. resident() - pages) end
    end)
  end
end)
