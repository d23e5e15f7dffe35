-- lines.lua - busted's output in the form of the other tests: ok NAME, FAIL NAME: why, skip NAME: reason.
return function(options)
  local busted = require "busted"
  local handler = require "busted.outputHandlers.base"()

  local function name(element)
    return "lua." .. handler.getFullName(element):gsub("%s+", "-")
  end

  local function one_line(text)
    return (tostring(text):gsub("%s*\n%s*", " | "))
  end

  handler.testEnd = function(element, parent, status, trace)
    if status == "success" then
      print("ok " .. name(element))
    elseif status == "pending" then
      local last = handler.pendings[#handler.pendings]
      print("skip " .. name(element) .. ": " .. one_line(last and last.message or "pending"))
    else
      local list = status == "failure" and handler.failures or handler.errors
      local last = list[#list]
      print("FAIL " .. name(element) .. ": " .. one_line(last and last.message or trace and trace.message or status))
    end
    io.stdout:flush()
    return nil, true
  end
  handler.error = function(element, parent, message)
    if element.descriptor ~= "it" then
      print("FAIL lua." .. tostring(element.name or element.descriptor) .. ": " .. one_line(message))
    end
    return nil, true
  end
  busted.subscribe({ "test", "end" }, handler.testEnd, { predicate = handler.cancelOnPending })
  busted.subscribe({ "error" }, handler.error)
  return handler
end
