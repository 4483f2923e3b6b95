// A tile of conv_bn_act for sm_90a whose reduction is shared by a cluster of blocks: how the
// blocks' sums become the output.
//
// Each block leaves its sums in its own shared memory. Behind a barrier of the cluster each adds up
// those of all blocks for its share of the pixels, always in the order of the ranks, so that a call
// gives the same bits each time, and stores that share: the end of a tile takes all blocks.
#pragma once

#include <cstdint>

#include "../ptx/barrier.h"
#include "../ptx/cluster.h"
#include "../ptx/wgmma.h"
#include "bn_act.h"
#include "cluster_shape.h"
#include "pair.h"
#include "scalar.h"
#include "vector.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Four neighbouring channels of 16 bits.
struct alignas(8) Quad {
  uint32_t pair[2];
};

// T: BFloat16 or Float16. Threads [0, 128) of a block; each has four channels of every eighth pixel
// of the block's share, which is every kBlocks-th pixel of the tile.
template <class T, class Shape, int kBlocks>
class ClusterEpilogue {
  static constexpr int kQuads = Shape::kChannels / kQuad;         // of a pixel
  static constexpr int kRowsAtOnce = kWarpgroupThreads / kQuads;  // pixels
  static constexpr int kShare = Shape::kPixels / kBlocks;         // pixels
  static constexpr int kRounds = (kShare + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr uint32_t kUnitBytes = 8 * sizeof(float);
  static_assert(Shape::kPixels % kBlocks == 0, "equal shares");

 public:
  RF_DEVICE ClusterEpilogue(const ConvClusterArguments& arguments, const TmaTile& tile,
                            ptx::SharedAddress sums, uint32_t thread)
      : arguments_(arguments),
        sums_(sums),
        thread_(thread),
        row_(thread / kQuads),
        channel_(tile.channels * Shape::kChannels + static_cast<int32_t>(thread % kQuads * kQuad)),
        group_(tile.group * arguments.conv.channels),
        pixel_(tile.pixels * Shape::kPixels + static_cast<int32_t>(ptx::cluster_rank())) {}

  // While products run: scale, shift, and the share's part of the shortcut.
  RF_DEVICE void begin() {
    if (channel_ >= arguments_.conv.channels) return;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      scale_[i] = ptx::load_global_read_only(arguments_.conv.scale + group_ + channel_ + i);
      shift_[i] = ptx::load_global_read_only(arguments_.conv.shift + group_ + channel_ + i);
    }
    if (!arguments_.conv.has_residual) return;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (stored(round)) {
        residual_[round] = ptx::load_global(reinterpret_cast<const Quad*>(
            static_cast<const T*>(arguments_.residual) +
            pixel_of_round(round) * arguments_.residual_pixel + group_ + channel_));
      }
    }
  }

  // Leaves this block's sums for all. d: pinned behind its wait; every warp has waited.
  RF_DEVICE void put(const float (&d)[Shape::kColumns / 2]) const {
    // Rows of the fragment are channels: g and g + 8 of the warp's 16; columns are pixels.
    const uint32_t g = thread_ % 32 / 4, pair = thread_ % 4;
    const ptx::SharedAddress to =
        sums_ + 2 * pair * Shape::kSumsRowBytes + (thread_ / 32 * 2 ^ pair) * kUnitBytes + g * 4;
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::store_shared((to ^ i / 2 * kUnitBytes) + (8 * j + i % 2) * Shape::kSumsRowBytes,
                          d[4 * j + i]);
      }
    }
  }

  // Behind the cluster's barrier: adds up all blocks' sums of the share.
  RF_DEVICE void add() {
    const uint32_t pixel = row_ * kBlocks + ptx::cluster_rank();  // bits 1 and 2 are all rounds'
    const uint32_t quad = thread_ % kQuads;
    const uint32_t place = pixel * Shape::kSumsRowBytes + (quad / 2 ^ pixel / 2 % 4) * kUnitBytes +
                           quad % 2 * kVectorBytes;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      const ptx::SharedAddress from =
          ptx::cluster_address(sums_, static_cast<uint32_t>(rank)) + place;
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        if (!within(round)) continue;
        const auto part = ptx::load_shared_cluster<Vector<float>>(
            from + round * kRowsAtOnce * kBlocks * Shape::kSumsRowBytes);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          sum_[round].lane[i] = rank == 0 ? part.lane[i] : sum_[round].lane[i] + part.lane[i];
        }
      }
    }
  }

  // Stores act(scale sum + shift [+ shortcut]) of the share.
  RF_DEVICE void finish() const {
    const BnAct<float> op{arguments_.conv.floor};
    if (channel_ >= arguments_.conv.channels) return;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (!stored(round)) continue;
      float y[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const float sum = sum_[round].lane[i];
        if (arguments_.conv.has_residual) {
          const auto half = static_cast<uint16_t>(residual_[round].pair[i / 2] >> i % 2 * 16);
          y[i] = op(sum, scale_[i], shift_[i], widen(T{half}));
        } else {
          y[i] = op(sum, scale_[i], shift_[i]);
        }
      }
      T* const to = static_cast<T*>(arguments_.out) + pixel_of_round(round) * arguments_.out_pixel +
                    group_ + channel_;
      ptx::store_global(reinterpret_cast<Quad*>(to),
                        Quad{{narrow_pair<T>(y[0], y[1]), narrow_pair<T>(y[2], y[3])}});
    }
  }

 private:
  // Whether the share goes as far as this round's pixel, and whether the output does.
  RF_DEVICE bool within(int round) const {
    return kShare % kRowsAtOnce == 0 || round * kRowsAtOnce + static_cast<int>(row_) < kShare;
  }
  RF_DEVICE int64_t pixel_of_round(int round) const {
    return pixel_ + (round * kRowsAtOnce + static_cast<int32_t>(row_)) * kBlocks;
  }
  RF_DEVICE bool stored(int round) const {
    return within(round) && pixel_of_round(round) < arguments_.conv.grid.pixels;
  }

  const ConvClusterArguments& arguments_;
  ptx::SharedAddress sums_;
  uint32_t thread_;
  uint32_t row_;  // of the share, in a round
  int32_t channel_;
  int32_t group_;  // its first channel
  int32_t pixel_;  // the share's first
  float scale_[kQuad];
  float shift_[kQuad];
  Quad residual_[kRounds];
  Vector<float> sum_[kRounds];
};

#endif

}  // namespace resnet_fused
