/* replaylog.h - the log of a recording as bytes: writing it, and reading one that anybody may have made.
 *
 *   header   vm_log_header, the vCPU's state, the platform's state; header.crc covers them all
 *   chunks   {u32 bytes, u32 crc of bytes and payload}, payload: whole events, at most VM_LOG_CHUNK bytes
 *   event    type; varints: instructions since the event before, a, b, number of data bytes; u32 check, unless it happened
 *            inside an instruction; the data
 * Little-endian. The last event is VM_LOG_END and ends its chunk and the file. A reader looks at everything before it gives
 * out the first event; so whoever plays a log may trust its form, not its sense.
 */
#ifndef LIBVM_CORE_REPLAYLOG_H
#define LIBVM_CORE_REPLAYLOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VM_LOG_MAGIC "libvmlog"
#define VM_LOG_VERSION 1u
#define VM_LOG_CHUNK (1u << 20)
#define VM_LOG_DATA 65536u             /* of one event, at most */

typedef struct vm_log_header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t ram_bytes, ram_sum;       /* size of main memory; vm_ram_sum() */
    uint64_t model_sum;                /* of the guest's CPUID */
    uint64_t time_ns, tsc;
    uint32_t cpu_bytes, platform_bytes;
    uint32_t crc, reserved;
} vm_log_header;

/* What an event is. a, b, data by type. */
typedef enum vm_log_type {
    VM_LOG_END = 1,                    /* a: RAM's checksum; b: the CPU's */
    VM_LOG_TIMERS,                     /* a: nanoseconds that time jumps first; then timers that are due fire */
    VM_LOG_IRQ,                        /* a: the vector taken from the interrupt controllers */
    VM_LOG_NMI,                        /* the pending NMI is taken */
    VM_LOG_INJECTED,                   /* a: the vector that vm_vcpu_inject() left is delivered */
    VM_LOG_EVENT,                      /* the vCPU looks at what devices asked of it: INIT, reset, power-off... */
    VM_LOG_STATE,                      /* data: the vCPU's state, set from outside */
    VM_LOG_RESET,                      /* vm_reset() */
    VM_LOG_LINE,                       /* a: line; b: level */
    VM_LOG_MSI,                        /* a: address; b: data */
    VM_LOG_SERIAL,                     /* a: port; data: bytes taken */
    VM_LOG_WRITE,                      /* a: gpa; data */
    VM_LOG_INJECT,                     /* a: vector; b: 0, or 1 + error code */
    VM_LOG_COMPLETE,                   /* a: the caller's data for the access of the exit; b: 1: he had any */
    VM_LOG_PAGE,                       /* a: gpa; data: the page of RAM there. Before all others, ascending */
    /* only inside an instruction: */
    VM_LOG_READ,                       /* a: what the program's device answered; b: 1: it did not */
    VM_LOG_WROTE,                      /* b: 1: it did not take it */
    VM_LOG_EXITED,                     /* the access became an exit */
    VM_LOG_TYPES
} vm_log_type;
#define VM_LOG_INSIDE 0x80u            /* or-ed into the type's byte */

typedef struct vm_log_event {
    uint8_t type;                      /* vm_log_type */
    bool is_inside;                    /* an instruction, the one after `at` others */
    uint64_t at;                       /* instructions since the log's begin */
    uint32_t check;                    /* of the registers, if not inside */
    uint64_t a, b;
    const uint8_t *data;
    uint32_t bytes;
} vm_log_event;

/* ---- writing ---- */
typedef struct vm_log_writer {
    int fd;
    uint64_t at, written, events, max_bytes;
    uint8_t *chunk;
    size_t used;
    int status;                        /* VM_OK, or what ended it: VM_E_HOST, VM_E_NOMEM (full) */
} vm_log_writer;
int vm_log_begin(vm_log_writer *w, int fd, uint64_t max_bytes, vm_log_header *h, const void *cpu, const void *platform);
void vm_log_put(vm_log_writer *w, const vm_log_event *e);
int vm_log_finish(vm_log_writer *w);                             /* the rest of it; frees */
void vm_log_abandon(vm_log_writer *w);

/* ---- reading ---- */
typedef struct vm_log {
    vm_log_header header;
    const uint8_t *cpu, *platform;     /* in `bytes` */
    uint8_t *bytes;                    /* the file */
    size_t size;
    uint8_t *events;                   /* payloads, one after the other */
    size_t events_bytes;
    uint64_t count, end;               /* events; the last one's position */
} vm_log;
int vm_log_read(int fd, vm_log *log);                            /* VM_E_FORMAT, VM_E_HOST, VM_E_NOMEM */
void vm_log_free(vm_log *log);
/* The event at *offset of log->events, `at` being that of the one before it; moves both on. False: past the last, or (while
 * reading) malformed. */
bool vm_log_next(const vm_log *log, size_t *offset, uint64_t *at, vm_log_event *e);

uint32_t vm_crc32(uint32_t crc, const void *data, size_t bytes); /* IEEE 802.3; begin with 0 */

#endif
