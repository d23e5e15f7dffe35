/* boot_linux - boots Linux with its console on standard output until it powers off: boot_linux VMLINUZ INITRD [CMDLINE].
 * vmrun.c is the whole of it, with input, several vCPUs, resets. */
#include "common.h"

static void output(void *user, const uint8_t *bytes, size_t count) { fwrite(bytes, 1, count, stdout); }

int main(int argc, char **argv)
{
    if (argc < 3)
        return fprintf(stderr, "boot_linux VMLINUZ INITRD [CMDLINE]\n"), 1;
    vm_options options = { .size = sizeof options, .platform = VM_PLATFORM_PC, .ram_bytes = 256 << 20 };
    vm_linux_boot boot = { .size = sizeof boot, .kernel = argv[1], .initrd = argv[2],
                           .cmdline = argc > 3 ? argv[3] : "console=ttyS0 quiet" };
    vm_exit exit = VM_EXIT_INIT;
    vm_machine *m;
    MUST(vm_create(&options, &m));
    MUST(vm_serial_output(m, 0, output, NULL));
    MUST(vm_boot_linux(m, &boot));
    do
        MUST(vm_vcpu_run(vm_vcpu_get(m, 0), NULL, &exit));
    while (exit.reason == VM_EXIT_IO || exit.reason == VM_EXIT_MMIO || exit.reason == VM_EXIT_KICK);
    printf("%s\n", vm_exit_name(exit.reason));
    vm_destroy(m);
    return exit.reason != VM_EXIT_POWEROFF && exit.reason != VM_EXIT_GUEST_EXIT;
}
