/* call - functions across the border: the program calls the guest's, the guest calls the program's. */
#include "common.h"

static uint64_t note(uint64_t number, const char *text)
{
    printf("the guest says \"%s\" with %" PRIu64 "\n", text, number);
    return number * 10;
}

int main(void)
{
    /* sum(a, b): rdi += rsi; rsi = 0x4000; rax = note(rdi, rsi); return rax + 1 */
    static const uint8_t sum[] = { 0x48, 0x01, 0xf7, 0xbe, 0x00, 0x40, 0, 0, 0xb8, 0x00, 0x80, 0, 0, 0xff, 0xd0, 0x48, 0xff, 0xc0, 0xc3 };
    /* fill(buffer, length, byte): mov rcx, rsi; mov eax, edx; rep stosb; ret */
    static const uint8_t fill[] = { 0x48, 0x89, 0xf1, 0x89, 0xd0, 0xf3, 0xaa, 0xc3 };
    vm_machine *m = machine_with(NULL, sum, sizeof sum);
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    vm_bind_desc bind = { .size = sizeof bind, .signature = "u64(u64,str)", .fn = (void (*)(void))note };
    MUST(vm_write(m, 0x2000, fill, sizeof fill));
    MUST(vm_write(m, 0x4000, "hello from inside", 18));
    MUST(vm_bind_function(m, 0x8000, &bind, NULL));
    set(cpu, VM_REG_RSP, 0x10000);

    vm_value arguments[3] = { { .u = 2 }, { .u = 40 } }, result;
    MUST(vm_call(cpu, CODE, "u64(u64,u64)", arguments, 2, &result, NULL, NULL));
    printf("sum: %" PRIu64 "\n", result.u);

    char buffer[9] = "";
    arguments[0].data = buffer, arguments[1].u = 8, arguments[2].u = 'x';
    MUST(vm_call(cpu, 0x2000, "void(buf,u64,u8)", arguments, 3, NULL, NULL, NULL));
    printf("filled: %s\n", buffer);
    vm_destroy(m);
    return 0;
}
