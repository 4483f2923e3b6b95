// The epilogue of a forward convolution: scale, shift, shortcut and ReLU in fp32, one rounding, and
// stores of whole rows.
//
// A thread's sums lie scattered over rows. So the tile is put together in the shared memory that
// the main loop has left: first the shortcut's tile, asked for while the loop still runs, then in
// place of each pair of its elements their results, from where rows go out 16 bytes a thread.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_act.h"
#include "conv_geometry.h"
#include "main_loop.h"
#include "vector.h"

namespace resnet_fused {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first;
  T second;
};

// The output's tile in the ring: rows of kN elements. As many rows as fit lie in each stage, the
// first ones in stage `first`, the one that the main loop leaves first.
template <class T, class Shape>
struct OutputTile {
  static constexpr int kRowBytes = Shape::kN * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kRowsThatFit = Shape::kStageBytes / kRowBytes / 8 * 8;
  static constexpr int kPieceRows = kRowsThatFit < Shape::kM ? kRowsThatFit : Shape::kM;
  static constexpr int kPieces = (Shape::kM + kPieceRows - 1) / kPieceRows;
  static_assert(kPieces <= Shape::kStages, "the output's tile does not fit into the ring");

  ptx::SharedAddress ring;
  int first;

  // A warp's results are pairs of elements, 4 lanes along a row: 16 bytes of eight rows in 16 bits,
  // 32 bytes of four rows (a half warp) in fp32. Each in a place of its own of a line of banks.
  static RF_DEVICE uint32_t swizzle(uint32_t row) {
    if constexpr (sizeof(T) == 4) return row * 2 % (kChunks < 8 ? kChunks : 8);
    if constexpr (kChunks < 8) return row / (8 / kChunks) % kChunks;
    return row % 8;
  }
  RF_DEVICE ptx::SharedAddress row_at(uint32_t row) const {
    const uint32_t piece = row / kPieceRows;
    uint32_t stage = static_cast<uint32_t>(first) + piece;
    if (stage >= Shape::kStages) stage -= Shape::kStages;
    return ring + stage * Shape::kStageBytes + (row - piece * kPieceRows) * kRowBytes;
  }
  RF_DEVICE ptx::SharedAddress chunk_at(uint32_t row, uint32_t chunk) const {
    return row_at(row) + (chunk ^ swizzle(row)) * kChunkBytes;
  }
  RF_DEVICE ptx::SharedAddress element_at(uint32_t row, uint32_t column) const {
    const uint32_t byte = column * sizeof(T);
    return chunk_at(row, byte / kChunkBytes) + byte % kChunkBytes;
  }
};

template <class T, class Shape>
class ConvEpilogue {
  using Buffer = OutputTile<T, Shape>;
  static constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kAhead = Shape::kStages - 1;

 public:
  // first_stage: where the main loop's tails begin, its steps modulo kStages.
  RF_DEVICE ConvEpilogue(const ConvOutput& output, const PixelGrid& grid, const Tile& tile,
                         ptx::SharedAddress ring, int first_stage, uint32_t thread)
      : output_(output),
        grid_(grid),
        buffer_{ring, first_stage},
        m_(tile.m * Shape::kM),
        n_(tile.n * Shape::kN),
        channel_(tile.group * output.channels + n_),
        thread_(thread) {}

  // Asks for rows of the shortcut: those of stage first_stage + piece.
  RF_DEVICE void prefetch(int piece) const {
    if (output_.residual == nullptr || !output_.wide_residual || piece >= Buffer::kPieces) return;
    const int first = piece * Buffer::kPieceRows;
    const int rest = Shape::kM - first;
    const int rows = rest < Buffer::kPieceRows ? rest : Buffer::kPieceRows;
    const T* residual = static_cast<const T*>(output_.residual);
#pragma unroll 1
    for (uint32_t i = thread_; i < static_cast<uint32_t>(rows) * Buffer::kChunks;
         i += Shape::kThreads) {
      const uint32_t row = first + i / Buffer::kChunks;
      const uint32_t chunk = i % Buffer::kChunks;
      const bool valid = known(row, chunk * kPerChunk);
      const int64_t offset = valid ? wide_offset(row, chunk, output_.residual_strides) : 0;
      ptx::cp_async<kChunkBytes>(buffer_.chunk_at(row, chunk), residual + offset, valid);
    }
  }

  // prefetched: pieces of the shortcut that have been asked for already.
  RF_DEVICE void finish(const Sums<Shape>& sums, const Place<Shape>& place, int prefetched) const {
    if (output_.residual != nullptr) {
      if (output_.wide_residual) {
        for (int piece = prefetched; piece < Buffer::kPieces; ++piece) prefetch(piece);
        ptx::cp_async_wait_all();
      } else {
        load_residual_by_element();
      }
      ptx::sync_threads();
      put_results<true>(sums, place);
    } else {
      put_results<false>(sums, place);
    }
    ptx::sync_threads();
    if (output_.wide_out) {
      store_wide();
    } else {
      store_by_element();
    }
  }

 private:
  RF_DEVICE bool known(uint32_t row, uint32_t column) const {
    return m_ + static_cast<int>(row) < grid_.pixels &&
           n_ + static_cast<int>(column) < output_.channels;
  }
  RF_DEVICE int64_t offset(uint32_t row, uint32_t column, const PixelStrides& strides) const {
    return offset_of(pixel_of(m_ + static_cast<int>(row), grid_), strides) +
           static_cast<int64_t>(channel_ + static_cast<int>(column)) * strides.k;
  }
  RF_DEVICE int64_t wide_offset(uint32_t row, uint32_t chunk, const PixelStrides& strides) const {
    return offset_of(pixel_of(m_ + static_cast<int>(row), grid_), strides) + channel_ +
           chunk * kPerChunk;
  }

  template <bool kResidual>
  RF_DEVICE void put_results(const Sums<Shape>& sums, const Place<Shape>& place) const {
    const BnAct<float> op{output_.floor};
    const uint32_t row0 = place.row + place.lane / 4;
#pragma unroll
    for (int j = 0; j < 2 * Shape::kBlocksN; ++j) {
      const uint32_t column = place.column + j * 8 + place.lane % 4 * 2;
      float scale[2];
      float shift[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool there = n_ + static_cast<int>(column) + e < output_.channels;
        const int channel = channel_ + static_cast<int>(column) + e;
        scale[e] = there ? ptx::load_global_read_only(output_.scale + channel) : 0.0f;
        shift[e] = there ? ptx::load_global_read_only(output_.shift + channel) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
        const ptx::SharedAddress at = buffer_.element_at(row0 + i * 8, column);
        const float first = sums.value[i / 2][j][i % 2 * 2];
        const float second = sums.value[i / 2][j][i % 2 * 2 + 1];
        Pair<T> result;
        if constexpr (kResidual) {
          const auto added = ptx::load_shared<Pair<T>>(at);
          result.first = narrow<T>(op(first, scale[0], shift[0], widen(added.first)));
          result.second = narrow<T>(op(second, scale[1], shift[1], widen(added.second)));
        } else {
          result.first = narrow<T>(op(first, scale[0], shift[0]));
          result.second = narrow<T>(op(second, scale[1], shift[1]));
        }
        ptx::store_shared(at, result);
      }
    }
  }

  RF_DEVICE void store_wide() const {
    T* out = static_cast<T*>(output_.out);
    // Places are worked out anew: those of the shortcut would take registers all through the loop.
    uint32_t thread = thread_;
    ptx::keep(thread);
#pragma unroll 2
    for (uint32_t i = thread; i < Shape::kM * Buffer::kChunks; i += Shape::kThreads) {
      const uint32_t row = i / Buffer::kChunks;
      const uint32_t chunk = i % Buffer::kChunks;
      if (!known(row, chunk * kPerChunk)) continue;
      ptx::store_global(
          reinterpret_cast<Vector<T>*>(out + wide_offset(row, chunk, output_.out_strides)),
          ptx::load_shared<Vector<T>>(buffer_.chunk_at(row, chunk)));
    }
  }

  // Element i of this thread's walk over the tile, along channels or along pixels.
  template <class Visit>
  RF_DEVICE void by_element(const Visit& visit) const {
#pragma unroll 1
    for (uint32_t i = thread_; i < Shape::kM * Shape::kN; i += Shape::kThreads) {
      const bool together = output_.pixels_lie_together;
      const uint32_t row = together ? i % Shape::kM : i / Shape::kN;
      const uint32_t column = together ? i / Shape::kM : i % Shape::kN;
      visit(row, column, buffer_.element_at(row, column));
    }
  }

  RF_DEVICE void store_by_element() const {
    T* out = static_cast<T*>(output_.out);
    by_element([&](uint32_t row, uint32_t column, ptx::SharedAddress at) {
      if (!known(row, column)) return;
      ptx::store_global(out + offset(row, column, output_.out_strides), ptx::load_shared<T>(at));
    });
  }

  RF_DEVICE void load_residual_by_element() const {
    const T* residual = static_cast<const T*>(output_.residual);
    by_element([&](uint32_t row, uint32_t column, ptx::SharedAddress at) {
      T value{};
      if (known(row, column)) {
        // Not by the path for what nobody writes: the kernel ahead may have written it meanwhile.
        value = ptx::load_global(residual + offset(row, column, output_.residual_strides));
      }
      ptx::store_shared(at, value);
    });
  }

  const ConvOutput& output_;
  const PixelGrid& grid_;
  Buffer buffer_;
  int m_;  // first pixel of the tile
  int n_;  // first channel, counted within the group
  int channel_;
  uint32_t thread_;
};

}  // namespace resnet_fused
