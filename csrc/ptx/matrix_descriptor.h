// How a matrix operand of wgmma lies in shared memory, in one 64-bit word. PTX ISA, Asynchronous
// Warpgroup Level Matrix Shared Memory Layout: Strides, Matrix Descriptor Format.
//
// Chunks of 16 bytes make core matrices: eight rows of one chunk. An operand is two core matrices
// deep (32 bytes of K where memory lies along K; 16 elements, 8 a core matrix, where it lies along
// M or N). With the swizzle's span S of 32, 64 or 128 bytes:
//
//   K-major, no swizzle     rows of a core matrix follow one another, 16 bytes each;
//                           `stride` to the next eight rows, `leading` to the next chunk of K
//   K-major, swizzled       rows are S bytes apart, the next chunk of K lies behind;
//                           `stride` to the next eight rows, `leading` is not used
//   MN-major, no swizzle    elements of K of a core matrix follow one another, 16 bytes each;
//                           `stride` to the next chunk of M or N, `leading` to the next eight of K
//   MN-major, swizzled      S bytes of M or N lie side by side, elements of K are S bytes apart;
//                           `leading` to the next S bytes of M or N, `stride` to the next eight of
//                           K
//
// A swizzle exchanges the chunks of a line of 128 bytes: bits 4-6 of the address (as many as S has)
// are XORed with bits 7-9. Those are bits of the address itself, not of the distance from the
// matrix: a tile that a descriptor enters some rows further down is read as it was written.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include <string>
#endif

#if defined(__CUDACC__)
#define RF_ANYWHERE __host__ __device__
#else
#define RF_ANYWHERE
#endif

namespace resnet_fused::ptx {

// Which way memory lies: along K, or along M (of the left operand) or N (of the right one).
enum class Major : uint32_t { kK, kMn };

// With the field's values.
enum class Swizzle : uint32_t { kNone = 0, k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

// What is the same for every operand of one tile.
struct MatrixLayout {
  Swizzle swizzle = Swizzle::kNone;
  uint32_t leading = 0;  // bytes, a multiple of 16, below 2^18
  uint32_t stride = 0;   // bytes, a multiple of 16, below 2^18
  // Where the swizzle's pattern of 256, 512 or 1024 bytes starts, in lines of 128 bytes: 0 for one
  // that starts at a multiple of its size.
  uint32_t base_offset = 0;

  // For a static_assert beside a kernel's layouts.
  RF_ANYWHERE constexpr bool valid() const {
    constexpr uint32_t kEnd = 1u << 18;
    return leading % 16 == 0 && leading < kEnd && stride % 16 == 0 && stride < kEnd &&
           base_offset < 8 && (swizzle != Swizzle::kNone || base_offset == 0);
  }
};

struct MatrixDescriptor {
  uint64_t bits;

  // The same layout, `bytes` (a multiple of 16) further on.
  RF_DEVICE MatrixDescriptor operator+(uint32_t bytes) const { return {bits + (bytes >> 4)}; }
};

// The operand that starts at `start`, a multiple of 16. `layout` must be valid().
RF_DEVICE MatrixDescriptor matrix_descriptor(SharedAddress start,
                                             MatrixLayout layout RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  constexpr const char* kName = "matrix descriptor";
  if (start % 16 != 0) {
    emulator::fail(emulator::ErrorKind::kAddress, site, kName,
                   "start " + emulator::hex(start) + " is not a multiple of 16");
  }
  if (!layout.valid()) {
    emulator::fail(site, kName,
                   "leading " + std::to_string(layout.leading) + ", stride " +
                       std::to_string(layout.stride) + ", base offset " +
                       std::to_string(layout.base_offset) +
                       ": expected multiples of 16 below 262144, and a base offset below 8, 0 "
                       "without a swizzle");
  }
#endif
  return {static_cast<uint64_t>((start & 0x3FFFFu) >> 4) |
          static_cast<uint64_t>(layout.leading >> 4) << 16 |
          static_cast<uint64_t>(layout.stride >> 4) << 32 |
          static_cast<uint64_t>(layout.base_offset) << 49 |
          static_cast<uint64_t>(layout.swizzle) << 62};
}

}  // namespace resnet_fused::ptx

#undef RF_ANYWHERE
