// Operand tiles in shared memory: where an element lies, and how a warp reads its fragments.
//
// Rows of a tile would start at the same banks, and the eight rows that ldmatrix reads at a time
// would collide. So the 16-byte chunks of a row are permuted by an exclusive or with bits of the
// row's number ("swizzle"): eight neighbouring rows then hold a chunk in eight different places of
// a 128-byte line of banks, for the stores of a loader as for ldmatrix.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "tile_shape.h"

namespace resnet_fused {

// Which operand of the product a tile is: the order of its 8x8 matrices in a fragment.
enum class Side { kLeft, kRight };

// A tile [rows][reduction] whose rows lie along the reduction: "K-major". Rows are M on the left
// side, N on the right one.
struct KMajor {
  static constexpr int kRowBytes = 64;
  static constexpr int kChunks = kRowBytes / kChunkBytes;

  // Two rows fill a line of banks, so the row's lowest bit has done its part already.
  static RF_DEVICE uint32_t swizzle(uint32_t row) { return row / 2 % kChunks; }
  static RF_DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * kChunkBytes;
  }
};

// Fragments of a warp's kBlocks blocks of 16 rows, for one slice: on the left side a[0..3] of
// m16n8k16 (or m16n8k8), on the right b[0..1] of the first eight columns and of the second.
// PTX ISA, Matrix Fragments for mma.m16n8k16 and mma.m16n8k8, and ldmatrix: a TF32 element is a
// pair of 16-bit ones, so the same loads serve both.
template <Side kSide, int kBlocks>
class KMajorFragments {
 public:
  // first: the warp's first row within the tile, a multiple of 16.
  RF_DEVICE KMajorFragments(uint32_t first, uint32_t lane) {
    // Matrices 0-3 are (rows 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15, 1) on the left; on the
    // right the second and the third change places.
    const uint32_t matrix = lane / 8;
    const uint32_t upper = kSide == Side::kLeft ? matrix % 2 : matrix / 2;
    const uint32_t row = first + upper * 8 + lane % 8;
    const uint32_t chunk = kSide == Side::kLeft ? matrix / 2 : matrix % 2;
    place_ = KMajor::offset(row, chunk);
    ptx::keep(place_);
  }

  // `tile`: the operand's tile of a step. `slice`: which kSliceBytes of its rows.
  RF_DEVICE void load_block(uint32_t (&fragment)[4], ptx::SharedAddress tile, int slice,
                            int block RF_SITE_PARAMETER) const {
    // The next slice's chunks have another bit of their number set, swizzled or not; 16 rows
    // further down the swizzle is the same.
    ptx::ldmatrix_x4(fragment, tile + (place_ ^ (static_cast<uint32_t>(slice) * kSliceBytes)) +
                                   static_cast<uint32_t>(block) * (16 * KMajor::kRowBytes) RF_SITE);
  }
  RF_DEVICE void load(uint32_t (&fragments)[kBlocks][4], ptx::SharedAddress tile,
                      int slice RF_SITE_PARAMETER) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) load_block(fragments[i], tile, slice, i RF_SITE);
  }

 private:
  uint32_t place_;  // of the first slice's and block's row that this lane names
};

}  // namespace resnet_fused
