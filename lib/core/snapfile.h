/* snapfile.h - the format of snapshot files, version 1. Numbers are little-endian, as the host; structs as it lays them
 * out (x86-64 only). Each piece of the description is padded to 8 bytes.
 *
 *   header              VM_SNAP_HEADER bytes, zeros behind snap_header
 *   description         meta_bytes, behind the header:
 *     a vCPU            vm_cpu_state, its accesses under way
 *     platform          its bytes, and they
 *     a region          snap_region; permissions, a byte a page (has_prot); device state (has_device); RAM: its chunks
 *   memory              from data_offset on; a region's at its offset (a page boundary unless compressed)
 *
 * A change that an older library would misread gets a new version.
 */
#ifndef LIBVM_SNAPFILE_H
#define LIBVM_SNAPFILE_H

#include "core/track.h"

#define VM_SNAP_MAGIC "LIBVMSNP"
#define VM_SNAP_VERSION 1u
#define VM_SNAP_HEADER 4096u
#define VM_SNAP_CHUNK UINT64_C(0x40000)
#define VM_SNAP_PACKED 1u              /* memory is compressed (zstd), chunk by chunk */

typedef struct snap_header {
    char magic[8];
    uint32_t version, header_bytes, flags, is_pc, vcpus, cpu_bytes, regions, event;
    uint64_t event_code, phys_mask;
    char model[32];
    uint64_t time_ns, tsc;
    uint64_t meta_bytes, meta_hash, data_offset, file_bytes;
    uint64_t header_hash;              /* of all before it */
} snap_header;

typedef struct snap_region {
    uint32_t kind, prot;
    uint8_t is_enabled, is_internal, has_prot, has_device;
    uint32_t pad;
    uint64_t gpa, bytes, device_bytes, offset;
} snap_region;

typedef struct snap_chunk {
    uint64_t offset;                   /* from the region's */
    uint32_t bytes, pad;               /* as they are in the file */
    uint64_t hash;                     /* of those */
} snap_chunk;

uint64_t vm_snap_hash(const void *data, size_t bytes);

#endif
