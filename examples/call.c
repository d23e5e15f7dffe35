/* call.c - calling guest functions and being called: a few bytes of guest code, no operating system.
 *
 * The guest has a function `u64 twice_plus(u64 x, u64 (*fn)(u64))` that gives 2 * fn(x) + 1; the host gives it a function of
 * its own, at an address where the guest has nothing.
 */
#include <libvm/libvm.h>

#include <inttypes.h>
#include <stdio.h>

enum { CODE = 0x1000, STACK = 0x8000, HOST_SQUARE = 0x5000000 };

static uint64_t square(uint64_t x)
{
    printf("host: square(%" PRIu64 ")\n", x);
    return x * x;
}

static int fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, vm_errmsg());
    return 1;
}

int main(void)
{
    static const uint8_t twice_plus[] = {
        0x48, 0x83, 0xec, 0x08,                          /* sub rsp, 8 */
        0xff, 0xd6,                                      /* call rsi */
        0x48, 0x8d, 0x44, 0x00, 0x01,                    /* lea rax, [rax + rax + 1] */
        0x48, 0x83, 0xc4, 0x08,                          /* add rsp, 8 */
        0xc3,                                            /* ret */
    };
    vm_machine *m;
    uint64_t rsp = STACK;
    if (vm_create(NULL, &m) != VM_OK)
        return fail("vm_create");
    vm_vcpu *cpu = vm_vcpu_get(m, 0);
    if (vm_map_ram(m, 0, 0x10000, VM_PROT_RWX, NULL) != VM_OK || vm_write(m, CODE, twice_plus, sizeof twice_plus) != VM_OK ||
        vm_vcpu_set_mode(cpu, VM_MODE_FLAT64) != VM_OK || vm_vcpu_write_reg(cpu, VM_REG_RSP, &rsp, sizeof rsp) != VM_OK)
        return fail("setting up");

    vm_bind_desc d = VM_BIND_DESC_INIT;
    d.signature = "u64(u64)";
    d.fn = (void (*)(void))square;
    if (vm_bind_function(m, HOST_SQUARE, &d, NULL) != VM_OK)
        return fail("vm_bind_function");

    vm_value args[2] = { { .u = 12 }, { .u = HOST_SQUARE } }, result;
    if (vm_call(cpu, CODE, "u64(u64, ptr)", args, 2, &result, NULL, NULL) != VM_OK)
        return fail("vm_call");
    printf("guest: twice_plus(12, square) = %" PRIu64 "\n", result.u);

    /* The same as a C function pointer. */
    vm_closure *closure;
    if (vm_closure_new(cpu, CODE, "u64(u64, ptr)", NULL, &closure) != VM_OK)
        return fail("vm_closure_new");
    uint64_t (*fn)(uint64_t, uint64_t) = (uint64_t (*)(uint64_t, uint64_t))vm_closure_function(closure);
    printf("guest: twice_plus(5, square) = %" PRIu64 "\n", fn(5, HOST_SQUARE));
    vm_closure_free(closure);
    vm_destroy(m);
    return 0;
}
