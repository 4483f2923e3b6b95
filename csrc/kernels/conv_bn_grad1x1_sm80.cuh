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

#include "../device/bn_backward_operand.h"
#include "../device/grad1x1_geometry.h"
#include "../device/grad1x1_rows.h"
#include "../device/grad1x1_tile.h"
#include "../device/matrix_unit.h"
#include "../device/thinned_addend.h"

namespace resnet_fused {

// Finish: what becomes of a step's dx, and of x between memory and the products.
template <class T, class Shape, class Finish>
class Grad1x1Block {
  using Gradients = ThreadChunks<T, Shape, Shape::kPixels, Shape::kFilters>;
  using Inputs = ThreadChunks<T, Shape, Shape::kPixels, Shape::kChannels>;
  using Weights = ThreadChunks<T, Shape, Shape::kFilters, Shape::kChannels>;
  using Rows = Grad1x1Rows<T, Shape>;
  using Pairs = typename Rows::Pairs;
  static constexpr int kRows = Rows::kRows;
  static constexpr int kColumns = Rows::kColumns;

 public:
  using Arguments = typename Finish::Arguments;

  RF_DEVICE Grad1x1Block(const Arguments& told, uint32_t block, uint32_t thread,
                         ptx::SharedAddress shared)
      : arguments_(Finish::shared(told)),
        ring_(shared),
        h_(shared + Shape::kRingBytes),
        weights_(h_ + Shape::kInputBytes),
        gradients_(thread),
        inputs_(thread),
        rows_(thread / 32, thread % 32),
        lane_(thread % 32),
        warp_(thread / 32),
        part_(static_cast<int32_t>(block) / arguments_.columns),
        first_channel_(static_cast<int32_t>(block) % arguments_.columns * Shape::kChannels),
        columns_(arguments_.channels - first_channel_),
        finish_(told, rows_, thread, first_channel_, columns_) {
    const int32_t each = arguments_.steps_each * Shape::kPixels;
    begin_ = part_ * each;
    end_ = arguments_.grid.pixels - begin_ < each ? arguments_.grid.pixels : begin_ + each;
    dz_ = static_cast<const T*>(arguments_.dz);
    y_ = static_cast<const T*>(arguments_.y);
    x_ = static_cast<const T*>(arguments_.x) + first_channel_;
  }

  RF_DEVICE void run(uint32_t thread) {
    const Weights weights(thread);
    weights.ask(weights_, static_cast<const T*>(arguments_.weight) + first_channel_,
                arguments_.weight_k, 0, arguments_.filters, columns_);
    for (int i = 0; i < Shape::kStages; ++i) ask(i, begin_ + i * Shape::kPixels);
    finish_.load_means();
    int stage = 0;
    for (int32_t first = begin_; first < end_; first += Shape::kPixels) {
      const ptx::SharedAddress at = ring_ + stage * Shape::kStageBytes;
      Pairs addend{};
      typename Finish::Beside beside;
      // Under way from here on.
      if (arguments_.addend != nullptr) load_addend(addend, first);
      finish_.ask(beside, first, end_);
      ptx::cp_async_wait_group<Shape::kStages - 1>();
      turn_gradients(at, first);
      const ptx::SharedAddress x = at + 2 * Shape::kGradientBytes;
      const ptx::SharedAddress h = finish_.turn(x, h_, first, end_);
      ptx::sync_threads();
      add_weights(at, h);
      finish_rows(at, h, first, addend, beside);
      ask(stage, first + Shape::kStages * Shape::kPixels);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    leave_weights();
    finish_.leave(h_, part_);
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

  // dweight += dy^T h of a step.
  RF_DEVICE void add_weights(ptx::SharedAddress dy, ptx::SharedAddress h) {
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
        right.load_block(b, h, slice, block);
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

  RF_DEVICE void load_addend(Pairs& addend, int32_t first) const {
    rows_.load(addend, columns_, [&](int32_t row) {
      return addend_of<T>(arguments_, first + row, end_, first_channel_);
    });
  }

  // dx of a step: multiplied, masked, summed, put together in h's place, and stored.
  RF_DEVICE void finish_rows(ptx::SharedAddress at, ptx::SharedAddress h, int32_t first,
                             const Pairs& addend, const typename Finish::Beside& beside) {
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
        const bool known = first + rows_.pixel(i) < end_ && rows_.channel(j) < columns_;
        finish_.finish(rounded[i][j], i, j, known, at + 2 * Shape::kGradientBytes, h, beside);
      }
    }
    // Nobody reads h any more.
    if constexpr (Finish::kInPlace) ptx::sync_threads();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::store_shared(h_ + rows_.offset(i, j), rounded[i][j]);
    }
    ptx::sync_threads();  // nor the stage
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
    const RowFragments<T, Shape::kBlocksP, Shape::kFilters> left(rows_.row(), lane_);
    const MnMajorFragments<T, Side::kRight, Shape::kBlocksX, Shape::kChannels> right(rows_.column(),
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

  const Grad1x1Arguments& arguments_;
  ptx::SharedAddress ring_;
  ptx::SharedAddress h_;
  ptx::SharedAddress weights_;
  Gradients gradients_;
  Inputs inputs_;
  Rows rows_;
  uint32_t lane_;
  uint32_t warp_;
  int32_t part_;
  int32_t first_channel_;
  int32_t columns_;
  Finish finish_;
  int32_t begin_;
  int32_t end_;
  const T* dz_;
  const T* y_;
  const T* x_;
  float dweight_[Shape::kBlocksK][2 * Shape::kBlocksC][4] = {};
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_bn_grad1x1_kernel(const __grid_constant__ Grad1x1Arguments arguments) {
  Grad1x1Block<T, Shape, Grad1x1RowsFinish<T, Shape>> block(
      arguments, blockIdx.x, threadIdx.x, ptx::shared_address(ptx::dynamic_shared()));
  block.run(threadIdx.x);
}

}  // namespace resnet_fused
