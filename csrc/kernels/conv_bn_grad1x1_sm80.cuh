// conv_bn_grad1x1 on the GPU, for sm_80 and later, in 16 bits: both gradients of a 1x1 convolution
// between two BatchNorms, of one read of its operands.
//
//     dx[m, c] = mask(sum over k of dy[m, k] weight[k, c] [+ addend[m, c]])
//     dweight[k, c] = sum over m of dy[m, k] h[m, c]
//     dy = a dz + (b y + c), h = relu(scale x + shift), mask by h
//
// A block keeps its weights in shared memory and the sums of their gradient in registers, and goes
// over its part of the pixels. A second kernel adds what the parts have left, in fixed order.
#pragma once

#include <cstdint>

#include "../device/addend_pixel.h"
#include "../device/bn_backward_operand.h"
#include "../device/conv_epilogue.h"
#include "../device/grad1x1_geometry.h"
#include "../device/grad1x1_tile.h"
#include "../device/matrix_unit.h"
#include "../device/normed_operand.h"
#include "../device/vector.h"

namespace resnet_fused {

template <class T, class Shape>
class Grad1x1Block {
  using Gradients = ThreadChunks<T, Shape, Shape::kPixels, Shape::kFilters>;
  using Inputs = ThreadChunks<T, Shape, Shape::kPixels, Shape::kChannels>;
  using Weights = ThreadChunks<T, Shape, Shape::kFilters, Shape::kChannels>;
  using InputLayout = MnMajor<T, Shape::kChannels>;
  // Of dx, what a thread multiplies: pairs of neighbouring channels, rows by columns.
  static constexpr int kRows = 2 * Shape::kBlocksP;
  static constexpr int kColumns = 2 * Shape::kBlocksX;
  using Pairs = Pair<T>[kRows][kColumns];

 public:
  RF_DEVICE Grad1x1Block(const Grad1x1Arguments& arguments, uint32_t block, uint32_t thread,
                         ptx::SharedAddress shared)
      : arguments_(arguments),
        ring_(shared),
        h_(shared + Shape::kRingBytes),
        weights_(h_ + Shape::kInputBytes),
        gradients_(thread),
        inputs_(thread),
        lane_(thread % 32),
        warp_(thread / 32),
        row_(warp_ % Shape::kWarpsP * Shape::kWarpP),
        column_(warp_ / Shape::kWarpsP * Shape::kWarpX),
        part_(static_cast<int32_t>(block) / arguments.columns),
        first_channel_(static_cast<int32_t>(block) % arguments.columns * Shape::kChannels) {
    const int32_t each = arguments.steps_each * Shape::kPixels;
    begin_ = part_ * each;
    end_ = arguments.grid.pixels - begin_ < each ? arguments.grid.pixels : begin_ + each;
    columns_ = arguments.channels - first_channel_;
    dz_ = static_cast<const T*>(arguments.dz);
    y_ = static_cast<const T*>(arguments.y);
    x_ = static_cast<const T*>(arguments.x) + first_channel_;
  }

  RF_DEVICE void run(uint32_t thread) {
    const Weights weights(thread);
    weights.ask(weights_, static_cast<const T*>(arguments_.weight) + first_channel_,
                arguments_.weight_k, 0, arguments_.filters, columns_);
    for (int i = 0; i < Shape::kStages; ++i) ask(i, begin_ + i * Shape::kPixels);
    if (arguments_.norm != nullptr) load_means();
    int stage = 0;
    for (int32_t first = begin_; first < end_; first += Shape::kPixels) {
      const ptx::SharedAddress at = ring_ + stage * Shape::kStageBytes;
      Pairs addend{};
      if (arguments_.addend != nullptr) load_addend(addend, first);  // under way from here on
      ptx::cp_async_wait_group<Shape::kStages - 1>();
      turn_gradients(at, first);
      turn_inputs(at + 2 * Shape::kGradientBytes, first);
      ptx::sync_threads();
      add_weights(at);
      finish_rows(at, first, addend);
      ask(stage, first + Shape::kStages * Shape::kPixels);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    leave_weights();
    if (arguments_.norm != nullptr) leave_sums();
  }

 private:
  RF_DEVICE void ask(int stage, int32_t first) {
    if (first < end_) {
      const ptx::SharedAddress at = ring_ + stage * Shape::kStageBytes;
      gradients_.ask(at, dz_, arguments_.dz_pixel, first, end_, arguments_.filters);
      if (y_ != nullptr) {
        gradients_.ask(at + Shape::kGradientBytes, y_, arguments_.y_pixel, first, end_,
                       arguments_.filters);
      }
      inputs_.ask(at + 2 * Shape::kGradientBytes, x_, arguments_.x_pixel, first, end_, columns_);
    }
    ptx::cp_async_commit_group();
  }

  template <int kUnit>
  static RF_DEVICE void load_row(float (&values)[kUnit], const float* from) {
#pragma unroll
    for (int i = 0; i < kUnit; i += kVectorLength<float>) {
      const auto part = load_vector(from + i);
#pragma unroll
      for (int e = 0; e < kVectorLength<float>; ++e) values[i + e] = part.lane[e];
    }
  }

  // dy in place of this thread's chunks of dz: zeros behind the last pixel.
  RF_DEVICE void turn_gradients(ptx::SharedAddress tile, int32_t first) const {
    if (arguments_.coefficients == nullptr || gradients_.column() >= arguments_.filters) return;
    using Chunk = typename Gradients::Chunk;
    const float* from = arguments_.coefficients + gradients_.column();
    BackwardRows<Gradients::kUnit> rows;
    load_row(rows.a, from);
    load_row(rows.b, from + arguments_.filters);
    load_row(rows.c, from + 2 * arguments_.filters);
#pragma unroll
    for (int i = 0; i < Gradients::kCount; ++i) {
      auto chunk = ptx::load_shared<Chunk>(gradients_.at(tile, i));
      apply_backward(chunk, ptx::load_shared<Chunk>(gradients_.at(tile + Shape::kGradientBytes, i)),
                     rows);
      if (first + gradients_.row(i) >= end_) chunk = Chunk{};
      ptx::store_shared(gradients_.at(tile, i), chunk);
    }
  }

  // h beside this thread's chunks of x: zeros where there is no such pixel or channel.
  RF_DEVICE void turn_inputs(ptx::SharedAddress tile, int32_t first) const {
    using Chunk = typename Inputs::Chunk;
    const bool known = inputs_.column() < columns_;
    const bool normed = arguments_.norm != nullptr && known;
    float scale[Inputs::kUnit] = {};
    float shift[Inputs::kUnit] = {};
    if (normed) {
      const float* from = arguments_.norm + first_channel_ + inputs_.column();
      load_row(scale, from);
      load_row(shift, from + arguments_.channels);
    }
#pragma unroll
    for (int i = 0; i < Inputs::kCount; ++i) {
      auto chunk = ptx::load_shared<Chunk>(inputs_.at(tile, i));
      if (normed) normalise(chunk, scale, shift);
      if (first + inputs_.row(i) >= end_) chunk = Chunk{};
      ptx::store_shared(inputs_.at(h_, i), chunk);
    }
  }

  // dweight += dy^T h of a step.
  RF_DEVICE void add_weights(ptx::SharedAddress dy) {
    const uint32_t k = warp_ % Shape::kWarpsK * Shape::kWarpK;
    const uint32_t c = warp_ / Shape::kWarpsK * Shape::kWarpC;
    const MnMajorFragments<T, Side::kLeft, Shape::kBlocksK, Shape::kFilters> left(k, lane_);
    const MnMajorFragments<T, Side::kRight, Shape::kBlocksC, Shape::kChannels> right(c, lane_);
#pragma unroll
    for (int slice = 0; slice < Shape::kPixels / 16; ++slice) {
      uint32_t a[Shape::kBlocksK][4];
      left.load(a, dy, slice);
#pragma unroll
      for (int block = 0; block < Shape::kBlocksC; ++block) {
        uint32_t b[4];
        right.load_block(b, h_, slice, block);
        multiply_pair(dweight_, block, a, b);
      }
    }
  }

  template <int kBlocks, int kColumns>
  static RF_DEVICE void multiply_pair(float (&sums)[kBlocks][kColumns][4], int block,
                                      const uint32_t (&a)[kBlocks][4], const uint32_t (&b)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t column[2] = {b[2 * j], b[2 * j + 1]};
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) multiply<T>(sums[i][2 * block + j], a[i], column);
    }
  }

  // A thread's place in a step's dx.
  RF_DEVICE int32_t pixel(int i) const { return static_cast<int32_t>(row_ + i * 8 + lane_ / 4); }
  RF_DEVICE int32_t channel(int j) const {
    return static_cast<int32_t>(column_ + j * 8 + lane_ % 4 * 2);
  }
  static RF_DEVICE uint32_t offset_of(int32_t row, int32_t column) {
    return InputLayout::offset(row, column * static_cast<uint32_t>(sizeof(T)));
  }

  RF_DEVICE void load_means() {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (channel(j) >= columns_) continue;
      const float* from = arguments_.norm + 2 * arguments_.channels + first_channel_ + channel(j);
      const auto means = ptx::load_global_read_only(reinterpret_cast<const Pair<float>*>(from));
      mean_[j][0] = means.first;
      mean_[j][1] = means.second;
    }
  }

  // Where the addend of pixel m lies; null: it has none.
  RF_DEVICE const T* addend_of(int32_t m) const {
    if (m >= end_) return nullptr;
    Pixel at = pixel_of(m, arguments_.grid);
    if (!to_addend(at, arguments_.addend_step)) return nullptr;
    return static_cast<const T*>(arguments_.addend) + first_channel_ +
           resnet_fused::offset_of(at, arguments_.addend_strides);
  }

  RF_DEVICE void load_addend(Pairs& addend, int32_t first) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* from = addend_of(first + pixel(i));
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (from == nullptr || channel(j) >= columns_) continue;
        addend[i][j] =
            ptx::load_global_read_only(reinterpret_cast<const Pair<T>*>(from + channel(j)));
      }
    }
  }

  // dx of a step: multiplied, masked, summed, put together in h's place, and stored.
  RF_DEVICE void finish_rows(ptx::SharedAddress at, int32_t first, const Pairs& addend) {
    float dx[Shape::kBlocksP][kColumns][4] = {};
    multiply_rows(dx, at);
    Pairs rounded;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float value[2] = {dx[i / 2][j][i % 2 * 2], dx[i / 2][j][i % 2 * 2 + 1]};
        if (arguments_.addend != nullptr) {
          value[0] += widen(addend[i][j].first);
          value[1] += widen(addend[i][j].second);
        }
        rounded[i][j] = Pair<T>{narrow<T>(value[0]), narrow<T>(value[1])};
        if (arguments_.norm != nullptr) mask_and_sum(rounded[i][j], at, first, i, j);
      }
    }
    ptx::sync_threads();  // nobody reads h, or the stage, any more
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        ptx::store_shared(h_ + offset_of(pixel(i), channel(j)), rounded[i][j]);
      }
    }
    ptx::sync_threads();
    // The thread that stores a chunk is the one that puts the next step's h there.
#pragma unroll
    for (int i = 0; i < Inputs::kCount; ++i) {
      const int32_t m = first + inputs_.row(i);
      if (m >= end_ || inputs_.column() >= columns_) continue;
      T* to = static_cast<T*>(arguments_.dx) + m * arguments_.dx_pixel + first_channel_ +
              inputs_.column();
      using Chunk = typename Inputs::Chunk;
      ptx::store_global(reinterpret_cast<Chunk*>(to), ptx::load_shared<Chunk>(inputs_.at(h_, i)));
    }
  }

  RF_DEVICE void multiply_rows(float (&dx)[Shape::kBlocksP][kColumns][4],
                               ptx::SharedAddress dy) const {
    const RowFragments<T, Shape::kBlocksP, Shape::kFilters> left(row_, lane_);
    const MnMajorFragments<T, Side::kRight, Shape::kBlocksX, Shape::kChannels> right(column_,
                                                                                     lane_);
#pragma unroll 2
    for (int slice = 0; slice < Shape::kFilters / 16; ++slice) {
      uint32_t a[Shape::kBlocksP][4];
      left.load(a, dy, slice);
#pragma unroll
      for (int block = 0; block < Shape::kBlocksX; ++block) {
        uint32_t b[4];
        right.load_block(b, weights_, slice, block);
        multiply_pair(dx, block, a, b);
      }
    }
  }

  // Zero where the ReLU below has let nothing through; then what is left is added to the sums.
  RF_DEVICE void mask_and_sum(Pair<T>& dx, ptx::SharedAddress at, int32_t first, int i, int j) {
    const uint32_t offset = offset_of(pixel(i), channel(j));
    const auto h = ptx::load_shared<Pair<T>>(h_ + offset);
    const auto x = ptx::load_shared<Pair<T>>(at + 2 * Shape::kGradientBytes + offset);
    // Not (h > 0): where it is NaN, the gradient passes.
    if (widen(h.first) <= 0.0f) dx.first = T{};
    if (widen(h.second) <= 0.0f) dx.second = T{};
    if (first + pixel(i) >= end_ || channel(j) >= columns_) return;
    const float passed[2] = {widen(dx.first), widen(dx.second)};
    const float off[2] = {widen(x.first) - mean_[j][0], widen(x.second) - mean_[j][1]};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum_[j][e] += passed[e];
      off_mean_[j][e] = __builtin_fmaf(passed[e], off[e], off_mean_[j][e]);
    }
  }

  RF_DEVICE void leave_weights() const {
    const uint32_t k0 = warp_ % Shape::kWarpsK * Shape::kWarpK + lane_ / 4;
    const uint32_t c0 = warp_ / Shape::kWarpsK * Shape::kWarpC + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kBlocksK; ++i) {
      const auto k = static_cast<int32_t>(k0 + i * 8);
#pragma unroll
      for (int j = 0; j < 2 * Shape::kBlocksC; ++j) {
        const auto c = static_cast<int32_t>(c0 + j * 8);
        if (k >= arguments_.filters || c >= columns_) continue;
        float* to = arguments_.partial +
                    (int64_t{part_} * arguments_.filters + k) * arguments_.channels +
                    first_channel_ + c;
        ptx::store_global(
            reinterpret_cast<Pair<float>*>(to),
            Pair<float>{dweight_[i / 2][j][i % 2 * 2], dweight_[i / 2][j][i % 2 * 2 + 1]});
      }
    }
  }

  // Over the eight lanes that have a column, then over the warps that do, in shared memory.
  RF_DEVICE void leave_sums() {
    const uint32_t band = warp_ % Shape::kWarpsP;
    ptx::sync_threads();  // h has been stored
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          sum_[j][e] += ptx::shuffle_xor(ptx::kWholeWarp, sum_[j][e], lanes);
          off_mean_[j][e] += ptx::shuffle_xor(ptx::kWholeWarp, off_mean_[j][e], lanes);
        }
        if (lane_ < 4) {
          const uint32_t at = (band * 2 * Shape::kChannels + channel(j) + e) * 4;
          ptx::store_shared(h_ + at, sum_[j][e]);
          ptx::store_shared(h_ + at + Shape::kChannels * 4, off_mean_[j][e]);
        }
      }
    }
    ptx::sync_threads();
    const uint32_t thread = warp_ * 32 + lane_;
    for (uint32_t i = thread; i < 2 * Shape::kChannels; i += Shape::kThreads) {
      float sum = ptx::load_shared<float>(h_ + i * 4);
      for (uint32_t other = 1; other < Shape::kWarpsP; ++other) {
        sum += ptx::load_shared<float>(h_ + (other * 2 * Shape::kChannels + i) * 4);
      }
      const auto channel = static_cast<int32_t>(i % Shape::kChannels);
      if (channel >= columns_) continue;
      const int64_t row = int64_t{2} * part_ + i / Shape::kChannels;
      ptx::store_global(
          arguments_.partial_sums + row * arguments_.channels + first_channel_ + channel, sum);
    }
  }

  const Grad1x1Arguments& arguments_;
  ptx::SharedAddress ring_;
  ptx::SharedAddress h_;
  ptx::SharedAddress weights_;
  Gradients gradients_;
  Inputs inputs_;
  uint32_t lane_;
  uint32_t warp_;
  uint32_t row_;  // of dx, the warp's first; likewise column_
  uint32_t column_;
  int32_t part_;
  int32_t first_channel_;
  int32_t begin_;
  int32_t end_;
  int32_t columns_;
  const T* dz_;
  const T* y_;
  const T* x_;
  float dweight_[Shape::kBlocksK][2 * Shape::kBlocksC][4] = {};
  float mean_[kColumns][2] = {};
  float sum_[kColumns][2] = {};
  float off_mean_[kColumns][2] = {};
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_bn_grad1x1_kernel(const __grid_constant__ Grad1x1Arguments arguments) {
  Grad1x1Block<T, Shape> block(arguments, blockIdx.x, threadIdx.x,
                               ptx::shared_address(ptx::dynamic_shared()));
  block.run(threadIdx.x);
}

}  // namespace resnet_fused
