---@meta libvm
--- libvm - x86 virtual machines inside a program, for Lua 5.4.
---
--- Conventions
--- * What can be expected to fail returns `nil, message, code`; codes are in `libvm.status`. Misuse (a wrong type, a number
---   that does not fit, a closed machine, an unknown option) raises. Functions without another result return `true`.
--- * Addresses and 64-bit values are Lua integers, read as unsigned. Sizes may be written "64K", "256M", "4G". Permissions and
---   access kinds are made of the letters r, w and x.
--- * A machine ends with `close()`, at the end of a `<close>` variable's scope, or when it is collected; whichever comes first.
---   vCPUs, regions, views, hooks and snapshots keep their machine alive. A hook or a device stays registered if its
---   handle is dropped. Callbacks may mention their machine: such cycles are collected.
--- * Callbacks run on the coroutine that called `run` (or whatever function led to them), under `pcall`. An error stops the
---   vCPU and is raised again, the same value, by that function. They cannot yield, and cannot close their machine. A
---   device access whose callback failed is open, as one that it declined: `cpu.last_exit.data` completes it.
--- * A Lua state and its coroutines belong to one thread of the host; several states in several threads are independent.
---   `Machine:run()` of a machine with several vCPUs uses threads of its own; Lua code still runs one piece at a time, and
---   callbacks of a vCPU other than 0 run on a coroutine of that vCPU.
--- * A run looks every 0.1 s whether a debug hook was set meanwhile, so that Ctrl-C in `lua` works.
--- * Machines do not survive a `fork()` of the process into the child: there using them raises, and they are left alone.
---@class libvm
---@field status table<string, integer> `OK`, `E_INVALID`, ... of error.def
---@field exit table<string, integer> `HALT`, `IO`, ... of exit.def: numbers for `Exit.reason_code`
---@field reg table<string, integer> `RAX`, ... of reg.def
---@field trace table<string, integer> `DECODE`, `MMIO`, ..., `ALL`: bits for `Machine:trace`
local libvm = {}

---@alias libvm.Backend "auto"|"kvm"|"jit"|"interp"
---@alias libvm.Size integer|string bytes, or text such as "64M"

---@class libvm.MachineOptions
---@field backend? libvm.Backend default "auto"
---@field platform? "bare"|"pc" default "bare"
---@field vcpus? integer default 1
---@field mmu? string MMU strategy, see `libvm.mmu_names()`
---@field memory? libvm.Size RAM of a PC
---@field memory_file? string path of a file that is the RAM of a PC, at least as long; one in hugetlbfs gives huge pages
---@field memory_private? boolean the guest's writes do not go to that file
---@field memory_advice? string|string[] for the RAM of a PC: names as `Machine:advise` takes them
---@field code_cache? libvm.Size ceiling for translated code
---@field cpu_model? string "max" (default), "kvm", "base", "pentium3", "pentium" or "486"

--- Makes a machine.
---@param options? libvm.MachineOptions
---@return libvm.Machine? machine
---@return string? message
---@return integer? code
function libvm.machine(options) end

--- Memory that Lua and a guest can share: zeros, or a copy of a string. Page-aligned.
---@param what libvm.Size|string number of bytes, or a string
---@return libvm.Buffer
function libvm.buffer(what) end

--- What a backend can do ("available", "max-vcpus", "exact-budget", "retired", "exec-only", "phys-bits", ...).
---@param backend libvm.Backend
---@param capability string
---@return integer? value
---@return string? message
---@return integer? code
function libvm.query(backend, capability) end

--- The library's version: text, and number (major * 10000 + minor * 100 + patch).
---@return string text
---@return integer number
function libvm.version() end

--- A status in words.
---@param code integer
---@return string
function libvm.strerror(code) end

--- The detail of the last failure.
---@return string
function libvm.errmsg() end

--- Names of all registers, with their sizes in bytes.
---@return table<string, integer>
function libvm.registers() end

--- A register by its name, any case: its name, size and number. Nothing if there is none.
---@param name string
---@return string? name
---@return integer? bytes
---@return integer? number
function libvm.find_register(name) end

--- Names of the counters of `Machine:stats`, each with a line about it.
---@return table<string, string>
function libvm.stat_names() end

--- The mask for a list of trace categories ("mmio,irq").
---@param list string
---@return integer? mask
---@return string? message
---@return integer? code
function libvm.trace_parse(list) end

--- The id of a block in coverage maps: the cell of the edge from the block whose branch is at b to t is
--- `(coverage_id(b) >> 1 ~ coverage_id(t)) & (bytes - 1)`.
---@param gva integer
---@return integer
function libvm.coverage_id(gva) end

--- Checks a signature of `VCPU:call` and `Machine:bind_function`; the number of arguments.
---@param text string for example "u64(ptr,u32)"
---@return integer? arguments
---@return string? message
---@return integer? code
function libvm.signature_check(text) end

--- Lets equal pages of the machines share the host's memory; how many bytes that gave back.
---@param ... libvm.Machine
---@return integer? saved
---@return string? message
---@return integer? code
function libvm.share_pages(...) end

--- Gives up what running machines does not need; it cannot be undone. `docs/sandbox.md` says what is left.
---@param options? { kvm?: boolean, threads?: boolean, sockets?: boolean, errno?: boolean }
---@return true? ok
---@return string? message
---@return integer? code
function libvm.sandbox_enter(options) end

--- Names of the system calls that are allowed inside.
---@param options? { kvm?: boolean, threads?: boolean, sockets?: boolean, errno?: boolean }
---@return string[]
function libvm.sandbox_calls(options) end

---@class libvm.Strategy functions of an MMU strategy; only `translate` is required
---@field create? fun(): any the state that the others get first
---@field destroy? fun(state: any)
---@field translate fun(state: any, cpu: libvm.VCPU, gva: integer, access: "r"|"w"|"x"): libvm.Translation?, integer? nil and the error code for a page fault
---@field root_changed? fun(state: any, cpu: libvm.VCPU, cr3: integer)
---@field invalidate? fun(state: any, cpu: libvm.VCPU, gva: integer, bytes: integer) bytes 0: everything
---@field table_written? fun(state: any, cpu: libvm.VCPU?, gpa: integer)

---@class libvm.Translation
---@field gpa integer of the address asked for
---@field page_bytes? integer default 4096
---@field prot? string default "rwx"
---@field global? boolean
---@field trap_writes? boolean
---@field entries? integer[] page-table entries read, of `VCPU:walk`

--- Adds an MMU strategy, for the life of the process; machines of this Lua state can use it. At most 16 written in Lua.
---@param name string
---@param functions libvm.Strategy
---@return true? ok
---@return string? message
---@return integer? code
function libvm.mmu_register(name, functions) end

--- Names of the MMU strategies, built in and registered.
---@return string[]
function libvm.mmu_names() end

--- A virtual machine.
---@class libvm.Machine
---@field cpu libvm.VCPU vCPU 0
---@field backend libvm.Backend
---@field mmu string name of the strategy in use
---@field time integer guest time in nanoseconds
---@field vcpu_count integer
---@field closed boolean
local Machine = {}

--- Ends the machine. Again: nothing. From a callback of the machine: raises.
function Machine:close() end

--- Resets devices and vCPUs; RAM and map stay.
---@return true? ok
---@return string? message
---@return integer? code
function Machine:reset() end

--- Moves the machine to another backend.
---@param backend libvm.Backend
---@return true? ok
---@return string? message
---@return integer? code
function Machine:select_backend(backend) end

--- Changes the MMU strategy; nil: the default.
---@param name? string
---@return true? ok
---@return string? message
---@return integer? code
function Machine:select_mmu(name) end

--- A counter, or all of them by name.
---@param name? string
---@return integer|table<string, integer>|nil value
---@return string? message
---@return integer? code
function Machine:stats(name) end

--- vCPU `index`, from 0; nil past the last.
---@param index integer
---@return libvm.VCPU?
function Machine:vcpu(index) end

--- For loops over the vCPUs.
---@return fun(): libvm.VCPU?
function Machine:vcpus() end

--- Runs all vCPUs until one has something to report, and returns that exit; `exit.cpu` says whose it is. With one vCPU the
--- same as `cpu:run()`.
---@param options? libvm.RunOptions
---@return libvm.Exit? exit
---@return string? message
---@return integer? code
function Machine:run(options) end

--- Traces categories ("mmio,irq", a mask; nil: none) to a function, or to standard error. The function cannot use the machine.
---@param categories? string|integer
---@param fn? fun(category: integer, line: string)
---@return true? ok
---@return string? message
---@return integer? code
function Machine:trace(categories, fn) end

--- Maps zero-filled RAM.
---@param gpa integer
---@param bytes libvm.Size
---@param prot? string default "rwx"
---@return libvm.Region? region
---@return string? message
---@return integer? code
function Machine:map_ram(gpa, bytes, prot) end

--- Maps a buffer, of whole pages.
---@param gpa integer
---@param buffer libvm.Buffer
---@param prot? string default "rwx"
---@return libvm.Region? region
---@return string? message
---@return integer? code
function Machine:map_host(gpa, buffer, prot) end

--- Maps part of an open file.
---@param gpa integer
---@param bytes libvm.Size
---@param prot string
---@param file file*
---@param options? { offset?: integer, private?: boolean }
---@return libvm.Region? region
---@return string? message
---@return integer? code
function Machine:map_file(gpa, bytes, prot, file, options) end

---@class libvm.Device functions of a device, looked up once, when it is mapped; all optional
---@field read? fun(self, offset: integer, width: integer, cpu: libvm.VCPU): integer? nil: does not answer, the access becomes an exit
---@field write? fun(self, offset: integer, width: integer, value: integer, cpu: libvm.VCPU): boolean? false: does not answer
---@field reset? fun(self)
---@field save? fun(self): string for snapshots
---@field restore? fun(self, state: string)
---@field destroy? fun(self) the region is gone
---@field clone? fun(self): libvm.Device the device of a clone (`Machine:fork`), whose state `restore` then sets

--- Maps device memory.
---@param gpa integer
---@param bytes libvm.Size
---@param device libvm.Device
---@return libvm.Region? region
---@return string? message
---@return integer? code
function Machine:map_mmio(gpa, bytes, device) end

--- Maps ports.
---@param port integer
---@param count integer
---@param device libvm.Device
---@return libvm.Region? region
---@return string? message
---@return integer? code
function Machine:map_pio(port, count, device) end

--- Takes a region away.
---@param region libvm.Region
---@return true? ok
---@return string? message
---@return integer? code
function Machine:unmap(region) end

--- For loops over the regions that were mapped with this object, in order of address.
---@return fun(): libvm.Region?
function Machine:regions() end

--- Changes permissions of pages.
---@param gpa integer
---@param bytes libvm.Size
---@param prot string
---@return true? ok
---@return string? message
---@return integer? code
function Machine:protect(gpa, bytes, prot) end

--- Tells that memory changed through a view or a mapped buffer.
---@param gpa integer
---@param bytes libvm.Size
---@return true? ok
---@return string? message
---@return integer? code
function Machine:invalidate(gpa, bytes) end

--- Reads guest-physical RAM.
---@param gpa integer
---@param bytes integer
---@return string? data
---@return string? message
---@return integer? code
function Machine:read(gpa, bytes) end

--- Writes guest-physical RAM.
---@param gpa integer
---@param data string
---@return true? ok
---@return string? message
---@return integer? code
function Machine:write(gpa, data) end

--- Switches the dirty log.
---@param on boolean
---@return true? ok
---@return string? message
---@return integer? code
function Machine:dirty_log(on) end

--- Fetches and clears the dirty log: addresses of the pages written.
---@param gpa integer
---@param bytes libvm.Size
---@return integer[]? pages
---@return string? message
---@return integer? code
function Machine:dirty_fetch(gpa, bytes) end

--- Gives pages back to the host; they read as zero.
---@param gpa integer
---@param bytes libvm.Size
---@return true? ok
---@return string? message
---@return integer? code
function Machine:discard(gpa, bytes) end

--- Advises the host about pages.
---@param gpa integer
---@param bytes libvm.Size
---@param ... "huge"|"small"|"mergeable"|"unmergeable"|"prefault"
---@return true? ok
---@return string? message
---@return integer? code
function Machine:advise(gpa, bytes, ...) end

--- Sets an interrupt line of a PC.
---@param gsi integer
---@param level boolean
---@return true? ok
---@return string? message
---@return integer? code
function Machine:irq_set(gsi, level) end

--- Sends a message-signalled interrupt.
---@param address integer
---@param data integer
---@return true? ok
---@return string? message
---@return integer? code
function Machine:irq_msi(address, data) end

--- A write of the guest that rings an eventfd (a descriptor's number).
---@param bell { fd: integer, address?: integer, port?: integer, width?: integer, match?: integer, on?: boolean }
---@return true? ok
---@return string? message
---@return integer? code
function Machine:ioeventfd(bell) end

--- An eventfd that interrupts the guest; false: no longer.
---@param fd integer
---@param gsi integer|false
---@return true? ok
---@return string? message
---@return integer? code
function Machine:irqfd(fd, gsi) end

--- The same with a message-signalled interrupt.
---@param fd integer
---@param address integer
---@param data integer
---@return true? ok
---@return string? message
---@return integer? code
function Machine:irqfd_msi(fd, address, data) end

---@class libvm.HookOptions
---@field begin? integer first address (vector, leaf, port ...); default: everything
---@field last? integer last one, inclusive; default `begin`
---@field gpa? boolean addresses are guest-physical
---@field exact? boolean begin = last = 0 means 0, not everything
---@field switch? boolean on KVM: move the machine to a backend that can

--- Adds a hook. The function gets the vCPU and, by kind:
--- insn, block, fetch: address, length, first 8 bytes; edge: address, address of the instruction before; mem_read, mem_write:
--- address, width, value (a string beyond 8 bytes); exception: vector, error code or nil, address of the fault, address of
--- the instruction; syscall: rax, is_sysenter, address; cpuid: leaf, subleaf; msr: number, is_write, value; interrupt:
--- vector, is_soft, address; port: port, width, value, is_write.
--- It returns nothing, true or "continue"; false or "stop"; "skip"; "retry".
---@param kind "insn"|"block"|"edge"|"mem_read"|"mem_write"|"exception"|"syscall"|"cpuid"|"msr"|"interrupt"|"port"|"fetch"
---@param fn fun(cpu: libvm.VCPU, ...): (boolean|"continue"|"stop"|"skip"|"retry"|nil)
---@param options? libvm.HookOptions
---@return libvm.Hook? hook
---@return string? message
---@return integer? code
function Machine:hook(kind, fn, options) end

--- Removes a hook.
---@param hook libvm.Hook
---@return true? ok
---@return string? message
---@return integer? code
function Machine:unhook(hook) end

--- Sets (or with false clears) a breakpoint.
---@param gva integer
---@param on? boolean default true
---@return true? ok
---@return string? message
---@return integer? code
function Machine:breakpoint(gva, on) end

--- Sets (or with false clears) a watchpoint for "r", "w" or "rw".
---@param gva integer
---@param bytes libvm.Size
---@param access string
---@param on? boolean default true
---@return true? ok
---@return string? message
---@return integer? code
function Machine:watchpoint(gva, bytes, access, on) end

--- Counts edges into a buffer of 2^n bytes; nil: no longer.
---@param map? libvm.Buffer
---@return true? ok
---@return string? message
---@return integer? code
function Machine:coverage(map) end

--- Only branches in [begin, last) count; without arguments all.
---@param begin? integer
---@param last? integer
---@return true? ok
---@return string? message
---@return integer? code
function Machine:coverage_range(begin, last) end

--- Takes a snapshot.
---@return libvm.Snapshot? snapshot
---@return string? message
---@return integer? code
function Machine:snapshot() end

--- Puts the machine back: `snapshot:restore()`.
---@param snapshot libvm.Snapshot
---@return true? ok
---@return string? message
---@return integer? code
function Machine:restore(snapshot) end

--- Loads a snapshot from a path or an open file.
---@param file string|file*
---@param options? { no_verify?: boolean } with a path
---@return libvm.Snapshot? snapshot
---@return string? message
---@return integer? code
function Machine:load_snapshot(file, options) end

--- Makes a copy of the machine that goes on by itself.
---@return libvm.Machine? copy
---@return string? message
---@return integer? code
function Machine:fork() end

--- When the guest comes to `address` the function is called instead: with the vCPU and the arguments of the signature (str:
--- string or nil, cbuf: string, buf: a buffer that ends with the call). Its result goes to the guest; false ends the run
--- with exit "hook".
---@param address integer
---@param signature string
---@param fn fun(cpu: libvm.VCPU, ...): (integer|number|false|nil)
---@return libvm.Binding? binding
---@return string? message
---@return integer? code
function Machine:bind_function(address, signature, fn) end

--- The same for VMCALL and VMMCALL with `number` in RAX.
---@param number integer
---@param signature string
---@param fn fun(cpu: libvm.VCPU, ...): (integer|number|false|nil)
---@return libvm.Binding? binding
---@return string? message
---@return integer? code
function Machine:bind_hypercall(number, signature, fn) end

--- Records what comes to a PC from outside into an open file.
---@param file file*
---@param options? { skip_idle?: boolean, max_bytes?: integer }
---@return true? ok
---@return string? message
---@return integer? code
function Machine:record(file, options) end

--- Ends it.
---@return true? ok
---@return string? message
---@return integer? code
function Machine:record_stop() end

--- Replays a record from an open file.
---@param file file*
---@return true? ok
---@return string? message
---@return integer? code
function Machine:replay(file) end

--- Ends it.
---@return true? ok
---@return string? message
---@return integer? code
function Machine:replay_stop() end

--- Where a record or replay is: mode, position, last, events, bytes, status, at_end.
---@return table? info
---@return string? message
---@return integer? code
function Machine:replay_info() end

--- A checksum of RAM, registers and the instruction count.
---@return integer? sum
---@return string? message
---@return integer? code
function Machine:checksum() end

--- Listens for GDB on "127.0.0.1:1234", ":0" or a path. `on_exit` gets each exit that is not the debugger's and returns
--- "default", "run", "stop" or "end".
---@param address string
---@param options? { runs_alone?: boolean, reverse_interval?: integer, on_exit?: fun(cpu: libvm.VCPU, exit: libvm.Exit): string? }
---@return libvm.GDB? stub
---@return string? message
---@return integer? code
function Machine:gdbstub(address, options) end

--- Makes a view of strategy "ept": like view `from`, or with everything allowed.
---@param from? integer
---@param page_bytes? libvm.Size
---@return integer? view
---@return string? message
---@return integer? code
function Machine:ept_create(from, page_bytes) end

--- Frees a view.
---@param view integer
---@return true? ok
---@return string? message
---@return integer? code
function Machine:ept_destroy(view) end

--- Sets what the guest may do with pages in a view.
---@param view integer
---@param gpa integer
---@param bytes libvm.Size
---@param prot string
---@return true? ok
---@return string? message
---@return integer? code
function Machine:ept_protect(view, gpa, bytes, prot) end

--- What a view holds: prot, accessed, dirty, page_bytes.
---@param view integer
---@param gpa integer
---@return table? entry
---@return string? message
---@return integer? code
function Machine:ept_get(view, gpa) end

--- Fetches and clears accessed and dirty bits: two lists of pages.
---@param view integer
---@param gpa integer
---@param bytes libvm.Size
---@return integer[]? accessed
---@return integer[]|string dirty
---@return integer? code
function Machine:ept_fetch(view, gpa, bytes) end

--- What to do about accesses that a view forbids: the function gets the vCPU and { view, gpa, gva, access, allowed, width, value }
--- and returns "stop", "retry", "step", or "emulate" and the value of a read.
---@param fn? fun(cpu: libvm.VCPU, violation: table): string?, integer?
---@return true? ok
---@return string? message
---@return integer? code
function Machine:ept_on_violation(fn) end

--- Boots what the options name.
---@param options { kernel?: string, initrd?: string, cmdline?: string, bios?: string, linux_entry?: 16|32|64 }
---@return true? ok
---@return string? message
---@return integer? code
function Machine:boot(options) end

--- Boots Linux.
---@param options { kernel: string, initrd?: string, cmdline?: string }
---@return true? ok
---@return string? message
---@return integer? code
function Machine:boot_linux(options) end

--- Loads an ELF file's segments; the entry point.
---@param path string
---@return integer? entry
---@return string? message
---@return integer? code
function Machine:load_elf(path) end

--- Copies a file into RAM.
---@param path string
---@param gpa integer
---@return true? ok
---@return string? message
---@return integer? code
function Machine:load_raw(path, gpa) end

--- Where the output of serial port `index` goes; nil: nowhere.
---@param index integer 0 to 3
---@param fn? fun(bytes: string)
---@return true? ok
---@return string? message
---@return integer? code
function Machine:serial_output(index, fn) end

--- Gives input to a serial port; how many bytes it took.
---@param index integer
---@param bytes string
---@return integer? taken
---@return string? message
---@return integer? code
function Machine:serial_input(index, bytes) end

--- Where the output of the debug console (port 0xE9) goes.
---@param fn? fun(bytes: string)
---@return true? ok
---@return string? message
---@return integer? code
function Machine:debugcon_output(fn) end

--- A serial port as an object that keeps the output: port 0 to 3, or "debug".
---@param index? integer|"debug" default 0
---@return libvm.Console? console
---@return string? message
---@return integer? code
function Machine:console(index) end

--- A processor. Registers are fields (`cpu.rax`, `cpu.cr3`, `cpu.xmm0`): integers up to 8 bytes, strings of the register's
--- bytes beyond (`string.unpack("<dd", cpu.xmm0)`).
---@class libvm.VCPU
---@field machine libvm.Machine
---@field index integer
---@field retired integer instructions retired
---@field last_exit libvm.Exit? of the last run; its data or result completes at the next
---@field [string] integer|string registers
local VCPU = {}

---@class libvm.RunOptions
---@field max_instructions? integer
---@field timeout? number seconds
---@field deadline_ns? integer
---@field until_? integer stop before executing this address; also `["until"]`
---@field exceptions? integer[]|integer vectors that are exits: a list, or a mask
---@field single_step? boolean
---@field signal_blocked? boolean the kick signal is blocked in this thread: two system calls less a run on KVM
---@field brief? boolean exits of accesses do not name their instruction

--- Runs until there is something to report.
---@param options? libvm.RunOptions
---@return libvm.Exit? exit
---@return string? message
---@return integer? code
function VCPU:run(options) end

--- Stops the current run, or the next.
function VCPU:kick() end

--- Makes the guest take an exception or interrupt.
---@param vector integer
---@param error_code? integer
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:inject(vector, error_code) end

--- Puts the vCPU into a starting state.
---@param mode "reset"|"real"|"flat32"|"flat64"
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:set_mode(mode) end

--- A register by name (any case) or number.
---@param register string|integer
---@return integer|string
function VCPU:reg(register) end

---@param register string|integer
---@param value integer|string
function VCPU:set_reg(register, value) end

--- General registers, RIP and RFLAGS as a table.
---@return table<string, integer>? regs
---@return string? message
---@return integer? code
function VCPU:regs() end

--- Sets those that the table has.
---@param regs table<string, integer>
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:set_regs(regs) end

--- System registers; segments are tables { base, limit, selector, attributes }, gdtr and idtr { base, limit }.
---@return table? sregs
---@return string? message
---@return integer? code
function VCPU:sregs() end

--- Sets those that the table has.
---@param sregs table
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:set_sregs(sregs) end

--- x87, SSE and AVX state; st[0 to 7] and ymm[0 to 15] are strings.
---@return table? fpu
---@return string? message
---@return integer? code
function VCPU:fpu() end

--- Sets those that the table has.
---@param fpu table
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:set_fpu(fpu) end

--- A model-specific register.
---@param number integer
---@return integer? value
---@return string? message
---@return integer? code
function VCPU:msr(number) end

---@param number integer
---@param value integer
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:set_msr(number, value) end

--- The guest-physical address of a linear one.
---@param gva integer
---@param access? "r"|"w"|"x"
---@return integer? gpa
---@return string? message
---@return integer? code
function VCPU:translate(gva, access) end

--- What the guest's page tables say; or nil and the page fault's error code.
---@param gva integer
---@param access? "r"|"w"|"x"
---@return libvm.Translation? translation
---@return integer|string|nil error_code
---@return integer? code
function VCPU:walk(gva, access) end

--- Reads guest-virtual memory.
---@param gva integer
---@param bytes integer
---@return string? data
---@return string? message
---@return integer? code
function VCPU:read(gva, bytes) end

--- Writes guest-virtual memory.
---@param gva integer
---@param data string
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:write(gva, data) end

--- Forgets translations, so that the strategy is asked again; without arguments all.
---@param gva? integer
---@param bytes? libvm.Size
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:mmu_flush(gva, bytes) end

--- Begins or ends telling the strategy of writes to a page.
---@param gpa integer
---@param on? boolean default true
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:trap_writes(gpa, on) end

--- Makes the vCPU look through another view.
---@param view integer
---@return true? ok
---@return string? message
---@return integer? code
function VCPU:ept_select(view) end

--- The view it looks through.
---@return integer
function VCPU:ept_current() end

--- Calls a guest function: address, signature ("u64(ptr,u32)"), its arguments (str and cbuf: string or nil, buf: buffer or
--- nil), then perhaps { max_instructions, timeout, exceptions, stack, return_address, preserve }. The result (true for void), or
--- nil, message, code and, if the function did not return, the exit.
---@param address integer
---@param signature string
---@param ... any
---@return integer|number|true|nil result
---@return string? message
---@return integer? code
---@return libvm.Exit? exit
function VCPU:call(address, signature, ...) end

--- A Lua function that calls the guest's.
---@param address integer
---@param signature string
---@return fun(...): any
function VCPU:guest_function(address, signature) end

--- Records the address of every block into a ring of `entries`, a power of two; nil: no longer.
---@param entries? integer
---@return libvm.Ring|true|nil ring
---@return string? message
---@return integer? code
function VCPU:block_trace(entries) end

--- Records comparisons: { address, kind, width, is_constant, a, b }.
---@param entries? integer
---@return libvm.Ring|true|nil ring
---@return string? message
---@return integer? code
function VCPU:compare_log(entries) end

--- Why a run came back. Fields that the reason does not have are nil. `pairs` gives all there are.
---@class libvm.Exit
---@field reason string "halt", "io", "mmio", "unmapped", "budget", "deadline", "kick", "hook", "until", "breakpoint", "step", ...
---@field reason_code integer
---@field rip integer
---@field insn string bytes of the instruction at rip, as far as known
---@field insn_bytes string 16 bytes at rip
---@field cpu libvm.VCPU
---@field port integer? io
---@field width integer? io, mmio, unmapped, violation
---@field is_write boolean? io, mmio, unmapped, violation
---@field count integer? io
---@field data integer? io, mmio, unmapped: of a write; of a read: set it before the next run
---@field gpa integer? mmio, unmapped, violation
---@field gva integer? mmio, unmapped, violation
---@field is_fetch boolean? mmio, unmapped, violation
---@field vector integer? exception
---@field has_error boolean? exception
---@field error integer? exception
---@field address integer? exception, breakpoint
---@field number integer? hypercall
---@field args integer[]? hypercall
---@field result integer? hypercall: set it before the next run
---@field code integer? guest-exit
---@field hook libvm.Hook? hook
---@field is_watchpoint boolean? breakpoint
---@field access string? breakpoint
---@field bytes integer? breakpoint
---@field value integer? breakpoint
---@field position integer? replay
---@field status integer? replay

--- A range of the memory map or port space.
---@class libvm.Region
---@field gpa integer
---@field bytes integer
---@field mapped boolean
local Region = {}

--- Takes the region away.
---@return true? ok
---@return string? message
---@return integer? code
function Region:unmap() end

--- RAM as a buffer without a copy. After writing code through it: `machine:invalidate()`.
---@return libvm.Buffer
function Region:view() end

--- Writes to this part of a device may be collected.
---@param offset integer
---@param bytes libvm.Size
---@param on? boolean default true
---@return true? ok
---@return string? message
---@return integer? code
function Region:coalesce(offset, bytes, on) end

--- Bytes: memory of its own, a view of a region, or an argument of a bound function. Offsets count from 0; outside raises.
--- `#buffer` is its size, `tostring(buffer)` a copy.
---@class libvm.Buffer
local Buffer = {}

--- Reads, or with a value writes, an integer of 8 bits.
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:u8(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:u16(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:u32(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:u64(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:i8(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:i16(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:i32(offset, value) end
---@param offset integer
---@param value? integer
---@return integer?
function Buffer:i64(offset, value) end
---@param offset integer
---@param value? number
---@return number?
function Buffer:f32(offset, value) end
---@param offset integer
---@param value? number
---@return number?
function Buffer:f64(offset, value) end
--- A copy of part of it.
---@param offset? integer
---@param bytes? integer
---@return string
function Buffer:read(offset, bytes) end
---@param offset integer
---@param data string
function Buffer:write(offset, data) end
--- Sets every byte.
---@param byte integer
function Buffer:fill(byte) end

--- A serial port or the debug console.
---@class libvm.Console
---@field index integer|"debug"
---@field machine libvm.Machine
---@field dropped integer bytes lost because nobody read them (4 MiB are kept)
local Console = {}

--- What came and was not read yet.
---@param bytes? integer at most
---@return string
function Console:read(bytes) end

--- Gives input; how many bytes the port took.
---@param text string
---@return integer? taken
---@return string? message
---@return integer? code
function Console:write(text) end

--- Gives all of it, running the machine while the port is full.
---@param text string
---@param timeout? number seconds, default 60
---@return true? ok
---@return string? message
---@return integer? code
---@return libvm.Exit? exit if the machine stopped
function Console:send(text, timeout) end

--- Runs the machine until its output matches a Lua pattern (or plain text). The output up to the end of the match, then the
--- captures.
---@param pattern string
---@param timeout? number seconds, default 60
---@param plain? boolean
---@return string? output
---@return string? message_or_capture
---@return integer|string|nil code_or_capture
---@return libvm.Exit|string|nil exit_or_capture
function Console:wait_for(pattern, timeout, plain) end

--- Output goes to this function too.
---@param fn? fun(bytes: string)
---@return true? ok
---@return string? message
---@return integer? code
function Console:on_output(fn) end

---@class libvm.Hook
---@field active boolean
local Hook = {}

--- Removes the hook.
---@return true? ok
---@return string? message
---@return integer? code
function Hook:remove() end

---@class libvm.Snapshot
---@field bytes integer memory that it holds for itself
---@field machine libvm.Machine
local Snapshot = {}

--- Puts the machine back. Regions mapped since are gone, regions unmapped since are there again.
---@return true? ok
---@return string? message
---@return integer? code
function Snapshot:restore() end

--- Writes it to a path or an open file.
---@param file string|file*
---@param options? { compress?: boolean, no_sync?: boolean } with a path
---@return true? ok
---@return string? message
---@return integer? code
function Snapshot:save(file, options) end

--- Forgets it; so does the end of a `<close>` variable's scope.
function Snapshot:free() end

---@class libvm.Ring
local Ring = {}

--- What came since the last fetch, and how many entries were overwritten before.
---@return (integer|table)[] entries
---@return integer lost
function Ring:fetch() end

---@class libvm.Binding
---@field active boolean
local Binding = {}

--- Ends the binding.
---@return true? ok
---@return string? message
---@return integer? code
function Binding:unbind() end

---@class libvm.GDB
---@field address string where it listens
local GDB = {}

--- Runs the machine under the debugger's control until the guest ends.
---@return libvm.Exit? exit
---@return string? message
---@return integer? code
function GDB:serve() end

--- Makes `serve` return soon; from a callback.
function GDB:stop() end

--- Closes the stub.
function GDB:free() end

return libvm
