"""many_vms - eight machines on eight threads: the GIL is not held while guests run."""

import threading

import libvm

CODE = bytes.fromhex("b900008000 01c8 ffc9 75fa f4")                    # mov ecx, 0x800000; add eax, ecx; dec ecx; jnz; hlt
results = {}


def work(number):
    with libvm.Machine() as m:
        m.map_ram(0, "64K")
        m.write(0x1000, CODE)
        m.cpu.set_mode("flat64")
        m.cpu.rip, m.cpu.rax = 0x1000, number
        m.cpu.run()
        results[number] = m.cpu.rax


threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"{len(results)} machines, results from {min(results.values())} to {max(results.values())}")
