/* harness.c - the numbers everything else hangs on: versions and status texts agree with their tables. */
#include <libvm/libvm.h>
#include "test.h"

TEST(version_matches_headers)
{
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", VM_VERSION_MAJOR, VM_VERSION_MINOR, VM_VERSION_PATCH);
    CHECK(!strcmp(vm_version(), text));
    CHECK_EQ(vm_version_number(), VM_VERSION_NUMBER);
}

TEST(every_status_has_its_own_text)
{
    const int codes[] = {
#define VM_ERROR(name, value, text) value,
#include <libvm/error.def>
#undef VM_ERROR
    };
    size_t count = sizeof codes / sizeof codes[0];
    for (size_t i = 0; i < count; i++)
        for (size_t j = 0; j < i; j++)
            CHECK(strcmp(vm_strerror(codes[i]), vm_strerror(codes[j])) != 0);
    CHECK(vm_strerror(1) && vm_strerror(-9999) && vm_strerror(INT32_MIN) && vm_strerror(INT32_MAX));
}
