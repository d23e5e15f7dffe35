-- reference.lua - docs/lua-api.md from libvm.d.lua, and whether that names all that the module has.
--
--   lua reference.lua TOP write     writes the reference
--   lua reference.lua TOP check     compares it, and the module (found through LUA_CPATH) with the interface file
local top, what = arg[1] or ".", arg[2] or "check"
local INTERFACE, REFERENCE = top .. "/bindings/lua/libvm.d.lua", top .. "/docs/lua-api.md"

local function read(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

-- Sections in the order of the file: { title, text = lines, fields = { line }, entries = { { name, text, parameters, returns } } }
local names = {}                         -- class.member
local sections, by_class = {}, {}
local pending = { text = {}, fields = {}, parameters = {}, returns = {} }

local function fresh()
  pending = { text = {}, fields = {}, parameters = {}, returns = {} }
end

local function section(class, title)
  local s = { title = title or class, text = pending.text, fields = pending.fields, note = pending.note, entries = {} }
  table.insert(sections, s)
  by_class[class] = s
  return s
end

for line in read(INTERFACE):gmatch "([^\n]*)\n" do
  local tag, rest = line:match "^%-%-%-@(%w+)%s*(.*)"
  if tag == "class" then
    pending.class, pending.note = rest:match "^([%w%.]+)%s*(.*)"
  elseif tag == "field" then
    table.insert(pending.fields, rest)
    local field = rest:match "^([%w_]+)"
    if pending.class and field then names[pending.class .. "." .. field] = true end
  elseif tag == "param" then
    table.insert(pending.parameters, rest)
  elseif tag == "return" then
    table.insert(pending.returns, rest)
  elseif tag == "alias" then
    pending.alias = rest
  elseif line:match "^%-%-%-@" then
    pending.other = rest
  elseif line:match "^%-%-%-" then
    table.insert(pending.text, (line:gsub("^%-%-%- ?", "")))
  elseif line:match "^function" then
    local class, separator, name, parameters = line:match "^function (%w+)([%.:])([%w_]+)(%b())"
    names[(class == "libvm" and "libvm" or "libvm." .. class) .. "." .. name] = true
    table.insert(by_class[class == "libvm" and "libvm" or "libvm." .. class].entries, {
      name = (class == "libvm" and "libvm" or class:lower()) .. separator .. name .. parameters,
      text = pending.text, parameters = pending.parameters, returns = pending.returns,
    })
    fresh()
  elseif line:match "^local" or line == "" then
    if pending.class then section(pending.class) end
    fresh()
  end
end

local function cell(text)
  return (text:gsub("|", "\\|"))
end

local function write(out)
  out("# Lua\n\nThe module `libvm` for Lua 5.4. Written by `bindings/lua/reference.lua` from `bindings/lua/libvm.d.lua`, which editors with the")
  out("Lua language server read too. Examples are in `examples/lua`.\n")
  for _, s in ipairs(sections) do
    out("## " .. s.title .. "\n")
    for _, line in ipairs(s.text) do out(line) end
    if s.note and s.note ~= "" then out(s.note) end
    if #s.text > 0 or (s.note and s.note ~= "") then out "" end
    if #s.fields > 0 then
      out "| field | |\n|---|---|"
      for _, field in ipairs(s.fields) do
        local name, type = field:match "^(%S+)%s+(.*)"
        out(("| `%s` | %s |"):format(name, cell(type)))
      end
      out ""
    end
    for _, e in ipairs(s.entries) do
      out("### `" .. e.name .. "`\n")
      for _, line in ipairs(e.text) do out(line) end
      if #e.text > 0 then out "" end
      for _, p in ipairs(e.parameters) do
        local name, rest = p:match "^(%S+)%s*(.*)"
        out(("- `%s` %s"):format(name, cell(rest)))
      end
      if #e.parameters > 0 then out "" end
      local returns = {}
      for _, r in ipairs(e.returns) do table.insert(returns, cell(r)) end
      local shown = table.concat(returns, ", ")
      shown = shown:gsub(", string%? message, integer%? code", " - or nil, message, code")
      if shown ~= "" then out("Returns " .. shown .. "\n") end
    end
  end
end

local parts = {}
write(function(line) table.insert(parts, line) end)
local text = table.concat(parts, "\n") .. "\n"
if what == "write" then
  local file = assert(io.open(REFERENCE, "wb"))
  file:write(text)
  file:close()
  return
end

local bad = false
local function complain(...)
  bad = true
  print(string.format(...))
end

local file = io.open(REFERENCE, "rb")
if not file or file:read "a" ~= text then complain "docs/lua-api.md is not what libvm.d.lua says" end

-- The module against the interface file, both ways.
local libvm = require "libvm"
local classes = { machine = "Machine", vcpu = "VCPU", region = "Region", buffer = "Buffer", console = "Console", hook = "Hook",
                  snapshot = "Snapshot", ring = "Ring", binding = "Binding", gdb = "GDB" }
local there = {}
for name in pairs(libvm) do there["libvm." .. name] = true end
for key, class in pairs(classes) do
  local meta = debug.getregistry()["libvm." .. key] or complain("no class %s in the module", key)
  for _, group in ipairs { "methods", "getters" } do
    for name in pairs(meta and meta[group] or {}) do there["libvm." .. class .. "." .. name] = true end
  end
end
for name in pairs(there) do
  if not names[name] then complain("%s is in the module but not in libvm.d.lua", name) end
end
for name in pairs(names) do
  local class = name:match "^libvm%.(%w+)%."
  local is_class = false
  for _, c in pairs(classes) do is_class = is_class or c == class end
  if (not class or is_class) and not there[name] then complain("%s is in libvm.d.lua but not in the module", name) end
end
os.exit(not bad)
