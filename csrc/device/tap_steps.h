// What asks TMA for the pixels of a convolution's taps, step after step and tile after tile.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/tma.h"
#include "conv_types.h"
#include "pipeline.h"
#include "tma_conv.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Where in its cluster a block is: its tile among those of the cluster, and the blocks that share
// its filters and its pixels, as masks of ranks. Neighbouring ranks share pixels.
template <class Shape>
struct ClusterPlace {
  int32_t pixels = static_cast<int32_t>(ptx::cluster_rank() / Shape::kPixelSharing);
  int32_t channels = static_cast<int32_t>(ptx::cluster_rank() % Shape::kPixelSharing);

  RF_DEVICE uint16_t with_its_filters() const {
    uint32_t first = 0;  // of each row of ranks
    for (int i = 0; i < Shape::kFilterSharing; ++i) first |= 1 << i * Shape::kPixelSharing;
    return static_cast<uint16_t>(first << channels);
  }
  RF_DEVICE uint16_t with_its_pixels() const {
    return static_cast<uint16_t>(((1 << Shape::kPixelSharing) - 1)
                                 << pixels * Shape::kPixelSharing);
  }
};

// The block's tile. The blocks of a cluster walk over tiles as wide as theirs together; one that
// begins behind the last pixel or channel brings what nobody stores, but takes part.
template <class Shape, class Walk>
RF_DEVICE TmaTile own_tile(const Walk& walk) {
  TmaTile tile = walk.tile();
  if constexpr (Shape::kSharing > 1) {
    const ClusterPlace<Shape> place;
    tile.pixels = tile.pixels * Shape::kFilterSharing + place.pixels;
    tile.channels = tile.channels * Shape::kPixelSharing + place.channels;
  }
  return tile;
}

// Which rows of a step come to several blocks.
template <class Shape>
struct SharedRows {
  static constexpr bool kFilters = false, kPixels = false;
};
template <class Shape>
  requires(Shape::kSharing > 1)
struct SharedRows<Shape> {
  static constexpr bool kFilters = Shape::kFilterSharing > 1;
  static constexpr bool kPixels = Shape::kPixelSharing > 1;
};

// The producer's way through the steps of its block's tiles, from the first tile's step `first` on.
// A walk over several convolutions names each tile's own; it may have no steps.
template <class T, class Shape, class Walk = TileWalk>
class TapSteps {
 public:
  RF_DEVICE TapSteps(const ConvTmaArguments& arguments, const Walk& walk, int32_t first = 0)
      : arguments_(&arguments), walk_(walk) {
    constexpr int32_t kElements = kElementsOfStep<typename ConvTypes<T>::Operand>;
    const Reduction& reduction = arguments.reduction;
    if (first > 0) {
      const int32_t of_tap = (reduction.channels + kElements - 1) / kElements;
      const int32_t tap = first / of_tap;
      column_ = {(first - tap * of_tap) * kElements, tap % reduction.taps_s,
                 tap / reduction.taps_s};
    }
    enter();
  }

  RF_DEVICE bool done() const { return walk_.done(); }
  RF_DEVICE void next() {
    column_.c += kElementsOfStep<typename ConvTypes<T>::Operand>;
    if (column_.c < arguments_->reduction.channels) return;
    column_.c = 0;
    if (++column_.s < arguments_->reduction.taps_s) return;
    column_.s = 0;
    if (++column_.r < arguments_->reduction.taps_r) return;
    column_.r = 0;
    walk_.next();
    enter();
  }

 protected:
  // The tile's pixels as the step's tap sees them; `from` is mapped as x is. Where blocks share
  // them each asks for its part.
  RF_DEVICE void load_taps(const ptx::TensorMap* from, ptx::SharedAddress to,
                           ptx::SharedAddress full) const {
    const int32_t channel = channel_ + column_.c;
    const uint16_t offsets[2] = {static_cast<uint16_t>(column_.s * arguments_->step_w),
                                 static_cast<uint16_t>(column_.r * arguments_->step_h)};
    // Beyond the last image TMA brings zeros, as for any place outside of the tensor.
    if constexpr (SharedRows<Shape>::kPixels) {
      const ClusterPlace<Shape> place;
      to += place.channels * Shape::kPixelPart * kStepRowBytes;
      if (arguments_->dense) {
        ptx::tma_load_multicast(to, from, {channel, pixel_}, full, place.with_its_pixels());
      } else {
        ptx::tma_load_im2col_multicast(to, from, {channel, w_, h_, n_}, offsets, full,
                                       place.with_its_pixels());
      }
    } else if (arguments_->dense) {
      ptx::tma_load(to, from, {channel, pixel_}, full);
    } else {
      ptx::tma_load_im2col(to, from, {channel, w_, h_, n_}, offsets, full);
    }
  }

  const ConvTmaArguments* arguments_;  // of the tile
  Walk walk_;
  Column column_{0, 0, 0};  // of the reduction: where the step begins
  TmaTile tile_{};
  int32_t channel_ = 0;  // the group's first one, of the reduction

 private:
  RF_DEVICE void enter() {
    if constexpr (requires { walk_.convolution(); }) {
      while (!walk_.done() && walk_.convolution().steps == 0) walk_.next();
      if (!walk_.done()) arguments_ = &walk_.convolution();
    }
    if (walk_.done()) return;
    tile_ = own_tile<Shape>(walk_);
    channel_ = tile_.group * arguments_->reduction.channels;
    pixel_ = tile_.pixels * Shape::kPixels;
    if constexpr (SharedRows<Shape>::kPixels) {
      pixel_ += ClusterPlace<Shape>().channels * Shape::kPixelPart;
    }
    const Pixel first = pixel_of(pixel_, arguments_->grid);
    n_ = first.n;
    h_ = first.p * arguments_->stride_h + arguments_->origin_h;
    w_ = first.q * arguments_->stride_w + arguments_->origin_w;
  }

  int32_t pixel_ = 0, n_ = 0, h_ = 0, w_ = 0;
};

#endif

}  // namespace resnet_fused
