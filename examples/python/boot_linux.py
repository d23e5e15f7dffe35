"""boot_linux - boots Linux, runs a command in its shell: boot_linux.py VMLINUZ INITRD [COMMAND]"""

import sys

import libvm

if len(sys.argv) < 3:
    sys.exit(__doc__)
kernel, initrd = sys.argv[1:3]
command = sys.argv[3] if len(sys.argv) > 3 else "uname -a"
with libvm.linux(kernel, initrd, memory="256M") as vm:
    vm.wait_for("# ")
    print(vm.shell(command))
    print(f"{vm.machine.stats('instructions'):,} instructions")
