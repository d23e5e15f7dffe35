"""memory - maps, protects, reads and writes a guest's memory; a view without a copy; which pages the guest wrote."""

import libvm

CODE = bytes.fromhex("c6042500300000 2a c6042500500000 2b f4")          # mov byte [0x3000], 42; mov byte [0x5000], 43; hlt

with libvm.Machine() as m:
    ram = m.map_ram(0, "64K")
    m[0x1000:0x1000 + len(CODE)] = CODE
    m.protect(0x5000, 0x1000, "r")
    m.dirty_log(True)
    cpu = m.cpu
    cpu.set_mode("flat64")
    cpu.rip = 0x1000

    exit = cpu.run()
    print(f"{exit}")                                                    # the write to 0x5000 is not permitted
    m.protect(0x5000, 0x1000, "rw")
    print(cpu.run())                                                    # now it is

    for page in m.dirty_fetch(0, "64K"):
        print(f"written: {page:#x}")
    with ram.view() as view:
        print("bytes:", view[0x3000], view[0x5000])
    try:
        m.read(0x10000, 1)
    except libvm.GuestMemoryError as error:
        print(error)                                                    # error.address is where
