/* fuzz.h - what every fuzz target states, and how one runs.
 *
 * A target is LLVMFuzzerTestOneInput() and a `fuzz_target` that describes it. Three ways to run it:
 *   tests/fuzz/NAME                      its corpus (tests/fuzz/corpus/NAME) and a fixed pseudo-random one, one test line: `make check`
 *   tests/fuzz/NAME FILE... or "-"       each as one input (AFL++: afl-fuzz ... -- tests/fuzz/NAME @@)
 *   make fuzz-NAME FUZZ_SECONDS=600      libFuzzer with ASan and UBSan, in a build of its own (fuzz-build); findings stay there
 * A target must not depend on anything but its input: no time, no addresses, nothing left by the input before.
 */
#ifndef LIBVM_TEST_FUZZ_H
#define LIBVM_TEST_FUZZ_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

extern const struct fuzz_target {
    const char *name;
    unsigned    rounds;                 /* pseudo-random inputs of `make check` */
    size_t      most;                   /* bytes of each, at most */
} fuzz_target;

/* The input as a stream of values. */
typedef struct fuzz_input { const uint8_t *data; size_t left; } fuzz_input;

static inline bool fuzz_take(fuzz_input *in, void *to, size_t n)
{
    if (in->left < n)
        return false;
    memcpy(to, in->data, n);
    in->data += n;
    in->left -= n;
    return true;
}

/* Zero when the input has ended. */
static inline uint64_t fuzz_bits(fuzz_input *in, unsigned bytes)
{
    uint64_t value = 0;
    fuzz_take(in, &value, bytes < in->left ? bytes : in->left);
    return value;
}

/* One input in `of`, by a hash of it: for what takes much longer than the rest. A bit of the input would not do, because what does
 * something else is kept, and changed again and again. */
static inline bool fuzz_seldom(const uint8_t *data, size_t size, unsigned of)
{
    uint32_t hash = 2166136261;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ data[i]) * 16777619;
    return (hash >> 16) % of == 0;
}

/* A number as programs choose badly: small, a power of two or next to one, or anything. */
static inline uint64_t fuzz_number(fuzz_input *in)
{
    uint8_t how = (uint8_t)fuzz_bits(in, 1);
    switch (how & 7) {
    case 0: return how >> 3;
    case 1: return (uint64_t)(how >> 3) << 12;
    case 2: return UINT64_C(1) << (fuzz_bits(in, 1) & 63);
    case 3: return (UINT64_C(1) << (fuzz_bits(in, 1) & 63)) - 1;
    case 4: return 0 - (uint64_t)(how >> 3);
    case 5: return fuzz_bits(in, 2);
    case 6: return fuzz_bits(in, 4);
    default: return fuzz_bits(in, 8);
    }
}
#endif
