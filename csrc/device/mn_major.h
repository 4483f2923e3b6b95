// Operand tiles whose memory lies along M or N, "MN-major": where an element lies, and how a warp
// reads its fragments. The filters of conv_dgrad lie so, and both operands of conv_wgrad.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "operand_tile.h"
#include "tile_shape.h"

namespace resnet_fused {

// A tile [reduction][kColumns]: a row is one element of the reduction, along it lies M (of the left
// side) or N (of the right one). Its chunks are permuted so that what one instruction reads at a
// time lies in different banks: eight rows of one chunk for ldmatrix, four rows of two chunks for
// 4-byte loads.
template <class T, int kColumns>
struct MnMajor {
  static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static_assert(sizeof(T) == 2 ? kChunks >= 4 : kChunks >= 8, "rows too short for the swizzle");
  static_assert((kChunks & (kChunks - 1)) == 0);

  static RF_DEVICE uint32_t swizzle(uint32_t row) {
    if constexpr (sizeof(T) == 4) return row * 2 % 8;
    if constexpr (kChunks < 8) return row / (8 / kChunks) % kChunks;
    return row % 8;
  }
  // byte: along the row.
  static RF_DEVICE uint32_t offset(uint32_t row, uint32_t byte) {
    return row * kRowBytes + (byte / kChunkBytes ^ swizzle(row)) * kChunkBytes + byte % kChunkBytes;
  }
};

// Fragments of a warp's kBlocks blocks of 16 columns of such a tile, for one slice: registers in
// the order of KMajorFragments, which holds the same product's operand the other way round.
//
// 16-bit types: ldmatrix.trans, each matrix 8 elements of the reduction by 8 columns. PTX ISA,
// ldmatrix and Matrix Fragments for mma.m16n8k16. TF32: ldmatrix cannot transpose 32-bit elements;
// a lane loads its four itself. PTX ISA, Matrix Fragments for mma.m16n8k8.
template <class T, Side kSide, int kBlocks, int kColumns>
class MnMajorFragments {
  using Layout = MnMajor<T, kColumns>;
  static constexpr bool kTransposing = sizeof(T) == 2;
  static constexpr int kSliceRows = kSliceBytes / static_cast<int>(sizeof(T));
  static_assert((kBlocks & (kBlocks - 1)) == 0, "blocks are told apart by bits of the chunk");

 public:
  // first: the warp's first column within the tile, a multiple of 16 kBlocks.
  RF_DEVICE MnMajorFragments(uint32_t first, uint32_t lane) {
    if constexpr (kTransposing) {
      const uint32_t matrix = lane / 8;
      const uint32_t row = (kSide == Side::kLeft ? matrix / 2 : matrix % 2) * 8 + lane % 8;
      const uint32_t upper = kSide == Side::kLeft ? matrix % 2 : matrix / 2;
      chunk_ = (first / 8 + upper) ^ Layout::swizzle(row);
      place_ = row * Layout::kRowBytes;
    } else {
      const uint32_t row = lane % 4;
      const uint32_t column = first + lane / 4;
      chunk_ = column / 4 ^ Layout::swizzle(row);
      place_ = row * Layout::kRowBytes + column % 4 * sizeof(T);
    }
  }

  RF_DEVICE void load_block(uint32_t (&fragment)[4], ptx::SharedAddress tile, int slice,
                            int block) const {
    const ptx::SharedAddress at = tile + place_ + slice * (kSliceRows * Layout::kRowBytes);
    if constexpr (kTransposing) {
      // Eight rows further down the swizzle is the same.
      ptx::ldmatrix_x4_trans(fragment, at + (chunk_ ^ 2 * block) * kChunkBytes);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int upper = kSide == Side::kLeft ? i % 2 : i / 2;   // 8 columns further
        const int deeper = kSide == Side::kLeft ? i / 2 : i % 2;  // 4 rows further: same swizzle
        fragment[i] = ptx::load_shared<uint32_t>(at + deeper * (4 * Layout::kRowBytes) +
                                                 (chunk_ ^ (4 * block + 2 * upper)) * kChunkBytes);
      }
    }
  }
  RF_DEVICE void load(uint32_t (&fragments)[kBlocks][4], ptx::SharedAddress tile, int slice) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) load_block(fragments[i], tile, slice, i);
  }

 private:
  uint32_t chunk_;  // of the first block, swizzled
  uint32_t place_;  // of this lane's row, and within its chunk
};

}  // namespace resnet_fused
