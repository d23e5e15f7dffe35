/* trace.c - lines of text about what a machine does, for whoever asked: LIBVM_TRACE or vm_trace_set().
 *
 * The mask is one relaxed load, so tracing costs nothing when off. One line at a time per machine goes to the sink;
 * without one, to standard error in a single write.
 */
#include "core/core.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct { const char *name; unsigned mask; } categories[] = {
    { "decode", VM_TRACE_DECODE }, { "ir", VM_TRACE_IR },     { "mcode", VM_TRACE_MCODE }, { "exit", VM_TRACE_EXIT },
    { "mmio", VM_TRACE_MMIO },     { "irq", VM_TRACE_IRQ },   { "mmu", VM_TRACE_MMU },     { "all", VM_TRACE_ALL },
};
#define CATEGORIES (sizeof categories / sizeof *categories)

static unsigned find_category(const char *word, size_t length)
{
    for (size_t i = 0; i < CATEGORIES; i++)
        if (strlen(categories[i].name) == length && memcmp(categories[i].name, word, length) == 0)
            return categories[i].mask;
    return 0;
}

VM_API int vm_trace_parse(const char *list, unsigned *mask)
{
    unsigned result = 0;
    if (!list || !mask)
        return vm_fail(VM_E_INVALID, "vm_trace_parse: NULL argument");
    while (*list) {
        size_t length = strcspn(list, ",");
        unsigned bits = find_category(list, length);
        if (length && !bits)
            return vm_fail(VM_E_INVALID, "no trace category \"%.*s\" (decode, ir, mcode, exit, mmio, irq, mmu, all)",
                           (int)(length < 40 ? length : 40), list);
        result |= bits;
        list += length + (list[length] == ',');
    }
    *mask = result;
    return VM_OK;
}

/* What the environment asks for; words it does not know are passed over. */
void vm_trace_init(vm_machine *m)
{
    const char *list = getenv("LIBVM_TRACE");
    unsigned mask = 0;
    pthread_mutex_init(&m->trace_lock, NULL);
    while (list && *list) {
        size_t length = strcspn(list, ",");
        mask |= find_category(list, length);
        list += length + (list[length] == ',');
    }
    m->trace_mask = mask;
}

static const char *category_name(vm_trace_category category)
{
    for (size_t i = 0; i < CATEGORIES; i++)
        if (categories[i].mask == (unsigned)category)
            return categories[i].name;
    return "?";
}

void vm_trace_line(vm_machine *m, vm_trace_category category, const char *format, ...)
{
    char line[512];
    if (!(vm_trace_mask(m) & category))
        return;
    int start = snprintf(line, sizeof line, "%s: ", category_name(category));
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line + start, sizeof line - (size_t)start - 1, format, args);
    va_end(args);
    size_t end = (size_t)start + (length < 0 ? 0 : (size_t)length);
    if (end > sizeof line - 2)
        end = sizeof line - 2;
    pthread_mutex_lock(&m->trace_lock);
    if (m->trace_fn) {
        m->trace_fn(m->trace_user, category, line + start);
    } else {
        line[end] = '\n';
        ssize_t ignored = write(STDERR_FILENO, line, end + 1);
        (void)ignored;
    }
    pthread_mutex_unlock(&m->trace_lock);
}

VM_API int vm_trace_set(vm_machine *m, unsigned mask, vm_trace_fn fn, void *user)
{
    if (!m)
        return vm_fail(VM_E_INVALID, "vm_trace_set: machine is NULL");
    if (mask & ~(unsigned)VM_TRACE_ALL)
        return vm_fail(VM_E_INVALID, "vm_trace_set: unknown categories 0x%x", mask & ~(unsigned)VM_TRACE_ALL);
    pthread_mutex_lock(&m->trace_lock);
    m->trace_fn = fn;
    m->trace_user = user;
    m->trace_mask = mask;
    pthread_mutex_unlock(&m->trace_lock);
    return VM_OK;
}
