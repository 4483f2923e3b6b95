// conv_wgrad on the GPU, for sm_90a: the gradient of a convolution's weights by wgmma, fed by TMA.
//
//     dweight[k, e] = scale[k] * sum over m of dz[m, k] * pixel[m, e]
//
// M: output channels of a group, N: its taps and input channels, reduction: output pixels of the
// batch. Both operands lie along channels. One thread asks for steps of 64 pixels: of dy and y
// boxes of 64 output channels, of x a box for each 64 input channels of a tap of the tile. Two
// warpgroups take dy into registers, masked, and multiply it by x as it lies. Each block leaves the
// sums of its part of the pixels in a workspace; the kernel in conv_wgrad_merge_sm80.cuh adds them.
#pragma once

#include <cstdint>

#include "../device/masked_channels.h"
#include "../device/turned_products.h"
#include "../device/warpgroup_roles.h"
#include "../device/wgrad_parts.h"
#include "../device/wgrad_tma.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The producer's way through the steps of its block's part.
template <class Shape>
class WgradSteps {
 public:
  RF_DEVICE WgradSteps(const ConvWgradTmaArguments& arguments, const Tile& tile,
                       const WgradPart& part)
      : arguments_(arguments), pixel_(part.first_pixel), left_(part.steps) {
    const WgradProduct& product = arguments.product;
    filter_ = tile.group * product.channels_out + tile.m * Shape::kM;
    first_channel_ = tile.group * product.channels_in;
    first_column_ = column_of(tile.n * Shape::kN, product.columns);
  }

  RF_DEVICE bool done() const { return left_ == 0; }
  RF_DEVICE void next() {
    pixel_ += kStepElements;
    --left_;
  }
  RF_DEVICE uint32_t bytes() const {
    return Shape::kStageBytes - (arguments_.masked ? 0 : Shape::kLeftBoxes * Shape::kBoxBytes);
  }

  RF_DEVICE void load(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const Pixel at = pixel_of(pixel_, arguments_.grid);
    load_filters(&arguments_.dy, stage, at, full);
    if (arguments_.masked) load_filters(&arguments_.y, stage + Shape::kMaskAt, at, full);
    load_columns(stage + Shape::kRightAt, at, full);
  }

 private:
  RF_DEVICE void load_filters(const ptx::TensorMap* from, ptx::SharedAddress to, const Pixel& at,
                              ptx::SharedAddress full) const {
#pragma unroll 1
    for (int i = 0; i < Shape::kLeftBoxes; ++i) {
      const int32_t filter = filter_ + i * kStepElements;
      if (arguments_.dense_dy) {
        ptx::tma_load(to + i * Shape::kBoxBytes, from, {filter, pixel_}, full);
      } else {
        // Beyond the last image TMA brings zeros, as for any place outside of the tensor.
        ptx::tma_load_im2col(to + i * Shape::kBoxBytes, from, {filter, at.q, at.p, at.n}, {0, 0},
                             full);
      }
    }
  }

  RF_DEVICE void load_columns(ptx::SharedAddress to, const Pixel& at,
                              ptx::SharedAddress full) const {
    const Reduction& columns = arguments_.product.columns;
    const int32_t h = at.p * arguments_.stride_h + arguments_.origin_h;
    const int32_t w = at.q * arguments_.stride_w + arguments_.origin_w;
    Column column = first_column_;
#pragma unroll 1
    for (int i = 0; i < Shape::kRightBoxes; ++i) {
      // Behind the last tap there is nothing to multiply: zeros, for which memory is not asked.
      const bool known = column.r < columns.taps_r;
      const int32_t channel = known ? first_channel_ + column.c : arguments_.channels;
      if (arguments_.dense_x) {
        ptx::tma_load(to + i * Shape::kBoxBytes, &arguments_.x, {channel, pixel_}, full);
      } else {
        const int32_t s = known ? column.s * arguments_.step_w : 0;
        const int32_t r = known ? column.r * arguments_.step_h : 0;
        ptx::tma_load_im2col(to + i * Shape::kBoxBytes, &arguments_.x, {channel, w, h, at.n},
                             {static_cast<uint16_t>(s), static_cast<uint16_t>(r)}, full);
      }
      column = advanced(column, {kStepElements, 0, 0}, columns);
    }
  }

  const ConvWgradTmaArguments& arguments_;
  int32_t pixel_;  // where the step begins
  int32_t left_;   // steps
  int32_t filter_;
  int32_t first_channel_;  // of the group
  Column first_column_;    // of the tile
};

template <class T, class Shape>
RF_DEVICE void consume_wgrad(const ConvWgradTmaArguments& arguments, const RingOf<Shape>& ring,
                             ptx::SharedAddress shared, const Tile& tile, const WgradPart& part,
                             uint32_t consumer, uint32_t thread) {
  const uint32_t row = consumer % Shape::kAlongM;
  const uint32_t column = consumer / Shape::kAlongM;
  const StagePlaces places{row * Shape::kBoxBytes, Shape::kMaskAt + row * Shape::kBoxBytes,
                           Shape::kRightAt + column * Shape::kColumns * kStepRowBytes};
  MaskedChannels<T> left(arguments.masked, thread);
  RingPlace<Shape::kStages> at;
  float d[Shape::kColumns / 2];
  clear(d);
  sum_products<T, Shape>(d, ring, at, shared, places, part.steps, thread % 32 == 0, left, [] {});
  leave_wgrad_vectors<Shape>(
      arguments.product, tile, consumer * kWarpgroupThreads + thread,
      [&](int i) { return Vector<float>{{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]}}; });
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_wgrad_tma_kernel(const __grid_constant__ ConvWgradTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const Tile tile = tile_of(blockIdx.x, arguments.product.tiles);
  const WgradPart part = wgrad_part<T, Shape>(arguments.product, tile);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.x);
    ptx::tma_prefetch(&arguments.dy);
    if (arguments.masked) ptx::tma_prefetch(&arguments.y);
    ring.init(Shape::kReaders);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  take_roles(
      [&] {
        RingPlace<Shape::kStages> at;
        for (WgradSteps<Shape> steps(arguments, tile, part); !steps.done();
             steps.next(), at.next()) {
          ring.acquire(at, steps.bytes());
          steps.load(shared + at.stage * Shape::kStageBytes, ring.full(at));
        }
      },
      [&](uint32_t consumer, uint32_t thread) {
        consume_wgrad<T, Shape>(arguments, ring, shared, tile, part, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
