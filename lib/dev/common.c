/* common.c - what devices share: saving a plain state struct, byte registers, ticks, late ticks.
 *
 * Invariant: nothing here keeps state; callers hold the device lock.
 */
#include "dev/dev.h"
#include <string.h>

int vm_dev_save(const void *state, size_t state_bytes, void *buffer, size_t *bytes)
{
    if (buffer) {
        if (*bytes < state_bytes)
            return vm_fail(VM_E_INVALID, "device state needs %zu bytes, buffer has %zu", state_bytes, *bytes);
        memcpy(buffer, state, state_bytes);
    }
    *bytes = state_bytes;
    return VM_OK;
}

int vm_dev_load(void *state, size_t state_bytes, uint32_t version, const void *buffer, size_t bytes)
{
    uint32_t found;
    if (bytes != state_bytes)
        return vm_fail(VM_E_FORMAT, "device state of %zu bytes, expected %zu", bytes, state_bytes);
    memcpy(&found, buffer, sizeof found);
    if (found != version)
        return vm_fail(VM_E_FORMAT, "device state version %u, expected %u", found, version);
    memcpy(state, buffer, state_bytes);
    return VM_OK;
}

int vm_dev_read8(uint8_t (*get)(void *dev, unsigned reg), void *dev, uint64_t offset, unsigned width, uint64_t *value)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < width; i++)
        v |= (uint64_t)get(dev, (unsigned)offset + i) << (8 * i);
    *value = v;
    return VM_OK;
}

int vm_dev_write8(void (*put)(void *dev, unsigned reg, uint8_t value), void *dev, uint64_t offset, unsigned width,
                  uint64_t value)
{
    for (unsigned i = 0; i < width; i++)
        put(dev, (unsigned)offset + i, (uint8_t)(value >> (8 * i)));
    return VM_OK;
}

uint64_t vm_ticks_from_ns(uint64_t ns, uint64_t hz)
{
    return (uint64_t)((unsigned __int128)ns * hz / 1000000000u);
}

uint64_t vm_ns_from_ticks(uint64_t ticks, uint64_t hz)
{
    unsigned __int128 ns = ((unsigned __int128)ticks * 1000000000u + hz - 1) / hz;
    return ns > UINT64_MAX ? UINT64_MAX : (uint64_t)ns;
}

void vm_ticker_advance(vm_ticker *t, uint64_t now)
{
    if (!t->period_ns || now < t->next_ns)
        return;
    uint64_t edges = (now - t->next_ns) / t->period_ns + 1;
    uint64_t cap = 1000000000u / t->period_ns;
    if (cap < 1)
        cap = 1;
    if (cap > 1000)
        cap = 1000;
    t->next_ns += edges * t->period_ns;
    t->due = t->due + edges < cap ? t->due + edges : cap;
}

uint64_t vm_ticker_wake(const vm_ticker *t, uint64_t now)
{
    if (!t->period_ns)
        return UINT64_MAX;
    uint64_t wait = t->next_ns > now ? t->next_ns - now : 0;
    if (t->due && wait > t->period_ns / 4)
        wait = t->period_ns / 4;           /* edges waited for the guest: deliver them at four times the pace */
    return now + (wait < VM_TICK_MIN_NS ? VM_TICK_MIN_NS : wait);
}
