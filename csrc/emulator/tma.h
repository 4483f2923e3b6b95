// Bulk copies between global and shared memory by the async proxy: TMA (PTX ISA, Data Movement and
// Conversion Instructions: Asynchronous copy, cp.async.bulk, cp.async.bulk.tensor).
#pragma once

#include <cstdint>
#include <span>

#include "errors.h"

namespace resnet_fused::emulator {

constexpr uint32_t kOwnBlock = ~uint32_t{0};

// Where a load ends: bytes of shared memory, and the mbarrier that counts them. With a mask, in
// each of these blocks of the cluster, at the same place.
struct CopyTarget {
  uint32_t to;
  uint32_t barrier;
  uint32_t block_mask = kOwnBlock;  // the running block alone
};

constexpr int kMappedSwizzle = -1;  // as the tensor map says

// Whether loads by a map round float32 to TF32: to the nearest, ties to even; infinities and NaN
// stay.
bool rounds_to_tf32(const void* map);

// A box of a tensor, or with im2col maps a column of pixels; coordinates innermost first, offsets
// {W, H, D} of im2col. What lies outside of the tensor is zero, and counts. `swizzle`: bytes of the
// span, where it is to be another one than the map's. `unrounded`: whatever the map says.
void tensor_load(Site site, const char* instruction, const void* map,
                 std::span<const int32_t> coordinates, std::span<const uint16_t> offsets,
                 CopyTarget target, int swizzle = kMappedSwizzle, bool unrounded = false);
// What lies outside of the tensor is not written. `im2col`: a column, with no offsets.
void tensor_store(Site site, const char* instruction, const void* map,
                  std::span<const int32_t> coordinates, uint32_t from, bool im2col,
                  int swizzle = kMappedSwizzle);
// A span that differs from the map's, for a planted fault.
int other_swizzle(Site site, const char* instruction, const void* map);
void tensor_prefetch(Site site, const void* map);

void bulk_load(Site site, const char* instruction, const void* from, uint32_t bytes,
               CopyTarget target);
void bulk_store(Site site, const char* instruction, void* to, uint32_t from, uint32_t bytes);

// Groups of this thread's bulk stores. `reads`: until shared memory has been read.
void bulk_commit(Site site);
void bulk_wait(Site site, int pending, bool reads);

}  // namespace resnet_fused::emulator
