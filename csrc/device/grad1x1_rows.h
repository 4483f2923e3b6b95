// What conv_bn_grad1x1 by mma.sync makes of a step's dx: a thread's pairs of neighbouring channels,
// rows by columns, their mask and their sums.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_epilogue.h"
#include "grad1x1_geometry.h"
#include "grad1x1_tile.h"
#include "normed_operand.h"
#include "vector.h"

namespace resnet_fused {

// Where a thread's pairs lie.
template <class T, class Shape>
class Grad1x1Rows {
  using Layout = MnMajor<T, Shape::kChannels>;

 public:
  static constexpr int kRows = 2 * Shape::kBlocksP;
  static constexpr int kColumns = 2 * Shape::kBlocksX;
  using Pairs = Pair<T>[kRows][kColumns];
  using Sums = float[kColumns][2];  // of a pair's two channels

  RF_DEVICE Grad1x1Rows(uint32_t warp, uint32_t lane)
      : warp_(warp),
        lane_(lane),
        row_(warp % Shape::kWarpsP * Shape::kWarpP),
        column_(warp / Shape::kWarpsP * Shape::kWarpX) {}

  // The warp's first ones.
  RF_DEVICE uint32_t row() const { return row_; }
  RF_DEVICE uint32_t column() const { return column_; }
  RF_DEVICE int32_t pixel(int i) const { return static_cast<int32_t>(row_ + i * 8 + lane_ / 4); }
  RF_DEVICE int32_t channel(int j) const {
    return static_cast<int32_t>(column_ + j * 8 + lane_ % 4 * 2);
  }
  // In a tile of rows of pixels.
  RF_DEVICE uint32_t offset(int i, int j) const {
    return Layout::offset(pixel(i), channel(j) * static_cast<uint32_t>(sizeof(T)));
  }

  // of_pixel(i): where the block's first channel of a row lies; null: there is no such row.
  template <class OfPixel>
  RF_DEVICE void load(Pairs& pairs, int32_t columns, const OfPixel& of_pixel) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* from = of_pixel(pixel(i));
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (from == nullptr || channel(j) >= columns) continue;
        pairs[i][j] =
            ptx::load_global_read_only(reinterpret_cast<const Pair<T>*>(from + channel(j)));
      }
    }
  }

  // means: of the block's first channel.
  RF_DEVICE void load_means(Sums& sums, const float* means, int32_t columns) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (channel(j) >= columns) continue;
        sums[j][e] = ptx::load_global_read_only(means + channel(j) + e);
      }
    }
  }

  // Over the eight lanes that have a column, then over the warps that do, in shared memory: the
  // first `rows` of them to `to`, that lie `step` elements apart.
  template <int kSums>
  RF_DEVICE void leave(Sums (&sums)[kSums], ptx::SharedAddress shared, int32_t columns,
                       int32_t rows, float* to, int64_t step) const {
    const uint32_t band = warp_ % Shape::kWarpsP * kSums * Shape::kChannels;
    static_assert(4 * Shape::kWarpsP * kSums * Shape::kChannels <= Shape::kInputBytes);
    ptx::sync_threads();  // the last step's dx has been stored
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
          for (int s = 0; s < kSums; ++s) {
            sums[s][j][e] += ptx::shuffle_xor(ptx::kWholeWarp, sums[s][j][e], lanes);
          }
        }
        if (lane_ >= 4) continue;
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          const uint32_t at = (band + s * Shape::kChannels + channel(j) + e) * 4;
          ptx::store_shared(shared + at, sums[s][j][e]);
        }
      }
    }
    ptx::sync_threads();
    for (uint32_t i = warp_ * 32 + lane_; i < static_cast<uint32_t>(rows) * Shape::kChannels;
         i += Shape::kThreads) {
      float sum = ptx::load_shared<float>(shared + i * 4);
      for (uint32_t other = 1; other < Shape::kWarpsP; ++other) {
        sum += ptx::load_shared<float>(shared + (other * kSums * Shape::kChannels + i) * 4);
      }
      const auto channel = static_cast<int32_t>(i % Shape::kChannels);
      if (channel >= columns) continue;
      ptx::store_global(to + i / Shape::kChannels * step + channel, sum);
    }
  }

 private:
  uint32_t warp_;
  uint32_t lane_;
  uint32_t row_;
  uint32_t column_;
};

template <int kUnit>
RF_DEVICE void load_row(float (&values)[kUnit], const float* from) {
#pragma unroll
  for (int i = 0; i < kUnit; i += kVectorLength<float>) {
    const auto part = load_vector(from + i);
#pragma unroll
    for (int e = 0; e < kVectorLength<float>; ++e) values[i + e] = part.lane[e];
  }
}

// Adds a pair to its channels' sums, and its products with what another tensor has there.
template <class T, class Sums>
RF_DEVICE void add_off_mean(Sums& products, int j, const Pair<T>& dx, const Pair<T>& other,
                            const Sums& mean) {
  const float passed[2] = {widen(dx.first), widen(dx.second)};
  const float off[2] = {widen(other.first) - mean[j][0], widen(other.second) - mean[j][1]};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    products[j][e] = __builtin_fmaf(passed[e], off[e], products[j][e]);
  }
}
template <class T, class Sums>
RF_DEVICE void add_pair(Sums& sums, int j, const Pair<T>& dx) {
  sums[j][0] += widen(dx.first);
  sums[j][1] += widen(dx.second);
}

// Zero where the ReLU below has let nothing through: not (result > 0), so that where it is NaN the
// gradient passes.
template <class T>
RF_DEVICE void mask_pair(Pair<T>& dx, const Pair<T>& result) {
  if (widen(result.first) <= 0.0f) dx.first = T{};
  if (widen(result.second) <= 0.0f) dx.second = T{};
}

// conv_bn_grad1x1's own: h = round(relu(scale x + shift)) lies beside x, and masks; sums are
// against x. Without norm h is x, and neither is done.
template <class T, class Shape>
class Grad1x1RowsFinish {
  using Rows = Grad1x1Rows<T, Shape>;
  using Inputs = ThreadChunks<T, Shape, Shape::kPixels, Shape::kChannels>;
  using Chunk = typename Inputs::Chunk;

 public:
  using Arguments = Grad1x1Arguments;
  static constexpr bool kInPlace = true;  // dx is put together where h lies
  struct Beside {};                       // what a step reads past shared memory

  static RF_DEVICE const Grad1x1Arguments& shared(const Arguments& told) { return told; }

  // columns: channels from the block's first one on.
  RF_DEVICE Grad1x1RowsFinish(const Arguments& told, const Rows& rows, uint32_t thread,
                              int32_t first_channel, int32_t columns)
      : told_(told),
        rows_(rows),
        inputs_(thread),
        first_channel_(first_channel),
        columns_(columns) {}

  RF_DEVICE void load_means() {
    if (!normed()) return;
    rows_.load_means(mean_, told_.norm + 2 * told_.channels + first_channel_, columns_);
  }

  RF_DEVICE void ask(Beside& /*beside*/, int32_t /*first*/, int32_t /*end*/) const {}

  // h in `to` beside this thread's chunks of x: zeros where there is no such pixel or channel.
  RF_DEVICE ptx::SharedAddress turn(ptx::SharedAddress x, ptx::SharedAddress to, int32_t first,
                                    int32_t end) const {
    const bool turned = normed() && inputs_.column() < columns_;
    float scale[Inputs::kUnit] = {};
    float shift[Inputs::kUnit] = {};
    if (turned) {
      const float* from = told_.norm + first_channel_ + inputs_.column();
      load_row(scale, from);
      load_row(shift, from + told_.channels);
    }
#pragma unroll
    for (int i = 0; i < Inputs::kCount; ++i) {
      auto chunk = ptx::load_shared<Chunk>(inputs_.at(x, i));
      if (turned) normalise(chunk, scale, shift);
      if (first + inputs_.row(i) >= end) chunk = Chunk{};
      ptx::store_shared(inputs_.at(to, i), chunk);
    }
    return to;
  }

  // Of row i and column j; `known`: there is such an element.
  RF_DEVICE void finish(Pair<T>& dx, int i, int j, bool known, ptx::SharedAddress x,
                        ptx::SharedAddress h, const Beside& /*beside*/) {
    if (!normed()) return;
    const uint32_t offset = rows_.offset(i, j);
    mask_pair(dx, ptx::load_shared<Pair<T>>(h + offset));
    const auto below = ptx::load_shared<Pair<T>>(x + offset);
    if (!known) return;
    add_pair(sums_[0], j, dx);
    add_off_mean(sums_[1], j, dx, below, mean_);
  }

  RF_DEVICE void leave(ptx::SharedAddress shared, int32_t part) {
    if (!normed()) return;
    rows_.leave(sums_, shared, columns_, 2,
                told_.partial_sums + int64_t{2} * part * told_.channels + first_channel_,
                told_.channels);
  }

 private:
  RF_DEVICE bool normed() const { return told_.norm != nullptr; }

  const Arguments& told_;
  Rows rows_;
  Inputs inputs_;
  int32_t first_channel_;
  int32_t columns_;
  typename Rows::Sums mean_ = {};
  typename Rows::Sums sums_[2] = {};
};

}  // namespace resnet_fused
