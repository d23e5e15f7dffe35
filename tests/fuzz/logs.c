/* logs.c - fuzz target: logs of recordings. The input turns a good log into a bad one, which is then read, and replayed one time in
 * four.
 *
 * First byte: bit 0 the input is the log itself; bit 1 checksums stay as they were; bit 3 (one replay in eight) afterwards the machine
 * goes on live, which takes a thread for its timers. Otherwise the input goes on as edits: an offset from the log's begin (bit 2:
 * its end) and a byte to put there. Then the checksums are made right, so that what is behind them is tested: the states of CPU
 * and devices, the events.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "core/replaylog.h"
#include "fuzz.h"
#include <libvm/libvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const struct fuzz_target fuzz_target = { "logs", 2000, 64 };

static int device_read(void *user, vm_vcpu *cpu, uint64_t offset, unsigned width, uint64_t *value)
{
    (void)user, (void)cpu, (void)width;
    *value = offset;
    return offset == 3 ? -1 : 0;
}

static vm_machine *make(void)
{
    /* In a page with the vectors, which lead to an iret: mov dx, 0x500; next: in al, dx; inc dx; and dl, 3; out 0x80, al;
     * test al, al; sti; hlt (only if zero); jmp next */
    static const uint8_t code[] = { 0xba, 0x00, 0x05, 0xec, 0x42, 0x80, 0xe2, 0x03, 0xe6, 0x80, 0x84, 0xc0, 0xfb, 0x75, 0xf4, 0x90,
                                    0xeb, 0xf1, 0xcf };
    enum { CODE = 0x600, IRET = CODE + sizeof code - 1, STACK = 0x800 };
    vm_options o = VM_OPTIONS_INIT;
    vm_io_ops ops = VM_IO_OPS_INIT;
    vm_machine *m;
    o.backend = VM_BACKEND_INTERP;
    o.platform = VM_PLATFORM_PC;
    o.ram_bytes = 1 << 20;
    ops.read = device_read;
    if (vm_create(&o, &m) != VM_OK)
        abort();
    static const uint8_t nothing[0x20000];
    vm_write(m, 0xe0000, nothing, sizeof nothing);      /* the firmware's tables would be most of the log */
    if (vm_map_pio(m, 0x500, 4, &ops, NULL, NULL) != VM_OK ||
        vm_write(m, CODE, code, sizeof code) != VM_OK || vm_vcpu_set_mode(vm_vcpu_get(m, 0), VM_MODE_REAL) != VM_OK)
        abort();
    for (uint32_t vector = 0; vector < 256; vector++)
        vm_write(m, vector * 4, &(uint32_t){ IRET }, 4);
    vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RIP, &(uint64_t){ CODE }, 8);
    vm_vcpu_write_reg(vm_vcpu_get(m, 0), VM_REG_RSP, &(uint64_t){ STACK }, 8);
    return m;
}

static vm_exit run(vm_machine *m)
{
    vm_run_options o = VM_RUN_OPTIONS_INIT;
    vm_exit e = VM_EXIT_INIT;
    o.max_instructions = 20;
    o.deadline_ns = 20000;
    if (vm_vcpu_run(vm_vcpu_get(m, 0), &o, &e) != VM_OK)
        abort();
    return e;
}

static uint8_t *good;
static size_t good_bytes;

static void make_good(void)
{
    vm_machine *m = make();
    vm_record_options o = VM_RECORD_OPTIONS_INIT;
    int fd = memfd_create("good", 0);
    o.skip_idle = true;
    if (fd < 0 || vm_record(m, fd, &o) != VM_OK)
        abort();
    for (int i = 0; i < 2; i++) {
        vm_serial_input(m, 0, (const uint8_t *)"abc", 3);
        vm_irq_set(m, 5, i & 1);
        vm_write(m, 0x900, &i, sizeof i);
        vm_vcpu_inject(vm_vcpu_get(m, 0), 0x40, false, 0);
        run(m);
    }
    if (vm_record_stop(m) != VM_OK)
        abort();
    good_bytes = (size_t)lseek(fd, 0, SEEK_END);
    good = malloc(good_bytes);
    if (!good || pread(fd, good, good_bytes, 0) != (ssize_t)good_bytes)
        abort();
    close(fd);
    vm_destroy(m);
}

/* Of the log, which has as many bytes as the good one. */
static bool is_as_it_was(const uint8_t *log, size_t from, size_t bytes)
{
    return memcmp(log + from, good + from, bytes) == 0;
}

static void mend(uint8_t *log, size_t bytes)
{
    vm_log_header h;
    memcpy(&h, log, sizeof h);
    uint64_t states = (uint64_t)h.cpu_bytes + h.platform_bytes;
    if (states > bytes - sizeof h)
        return;
    if (!is_as_it_was(log, 0, sizeof h + states)) {
        h.crc = 0;
        h.crc = vm_crc32(vm_crc32(0, &h, sizeof h), log + sizeof h, states);
        memcpy(log, &h, sizeof h);
    }
    for (size_t at = sizeof h + states; at + 8 <= bytes;) {
        uint32_t head[2];
        memcpy(head, log + at, sizeof head);
        if (!head[0] || head[0] > bytes - at - 8)
            return;
        if (!is_as_it_was(log, at, 8 + head[0])) {
            head[1] = vm_crc32(vm_crc32(0, head, 4), log + at + 8, head[0]);
            memcpy(log + at, head, sizeof head);
        }
        at += 8 + head[0];
    }
}

/* Kept and put back: making one takes far longer than an input. */
static vm_machine *fresh_machine(void)
{
    static vm_machine *m;
    static vm_snapshot *fresh;
    if (!m) {
        m = make();
        if (vm_snapshot_take(m, &fresh) != VM_OK)
            abort();
    } else if (vm_snapshot_restore(m, fresh) != VM_OK) {
        abort();
    }
    return m;
}

static void replay(vm_machine *m, int fd, bool goes_on)
{
    if (vm_replay(m, fd) != VM_OK)
        return;
    for (int i = 0; i < 8 && run(m).reason != VM_EXIT_REPLAY; i++)
        continue;
    if (vm_replay_stop(m) != VM_OK)
        abort();
    if (goes_on)
        run(m);
}

/* What the reader lets through is all there and sound. */
static void read_only(int fd)
{
    vm_log log;
    if (vm_log_read(fd, &log) != VM_OK)
        return;
    size_t offset = 0;
    uint64_t at = 0;
    for (vm_log_event e; vm_log_next(&log, &offset, &at, &e);)
        if (e.data < log.events || e.bytes > log.events_bytes || e.data + e.bytes > log.events + log.events_bytes)
            abort();
    vm_log_free(&log);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    fuzz_input in = { data, size };
    uint8_t how = (uint8_t)fuzz_bits(&in, 1);
    if (!good)
        make_good();
    size_t bytes = how & 1 ? in.left : good_bytes;
    uint8_t *log = malloc(bytes ? bytes : 1);
    if (fd < 0)
        fd = memfd_create("log", 0);
    if (!log || fd < 0)
        abort();
    memcpy(log, how & 1 ? in.data : good, bytes);
    while (!(how & 1) && in.left >= 3) {
        uint64_t at = fuzz_bits(&in, 2) % bytes;
        log[how & 4 ? bytes - 1 - at : at] = (uint8_t)fuzz_bits(&in, 1);
    }
    if (!(how & 3))
        mend(log, bytes);
    if (ftruncate(fd, (off_t)bytes) || pwrite(fd, log, bytes, 0) != (ssize_t)bytes || lseek(fd, 0, SEEK_SET) != 0)
        abort();
    if (fuzz_seldom(data, size, 4))
        replay(fresh_machine(), fd, (how & 8) && fuzz_seldom(data, size, 32));
    else
        read_only(fd);
    free(log);
    return 0;
}
