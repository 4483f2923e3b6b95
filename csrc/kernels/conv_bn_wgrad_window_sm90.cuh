// conv_bn_wgrad on the GPU, for sm_90a and 3x3 convolutions of stride 1: wgmma on windows of the
// input, of which all nine taps are parts; wgrad_window.h says how.
//
//     dweight[k, e] = sum over m of dy[m, k] * h[m, e],  dy = a dz + (b y + c),
//                                                        h = relu(scale x + shift)
//
// A block has all nine taps of 64 output and 64 input channels, and a part of the positions. One
// thread asks for steps; three warps put each window through the BatchNorm and ReLU below, once for
// all taps; two warpgroups make dy in registers, once for all taps of theirs, and multiply it by
// the window, which each tap enters so many rows further down. The sums go the way of conv_wgrad's.
#pragma once

#include <cstdint>

#include "../device/normed_operand.h"
#include "../device/transform_ring.h"
#include "../device/vector.h"
#include "../device/walked_channels.h"
#include "../device/warpgroup_roles.h"
#include "../device/wgrad_parts.h"
#include "../device/wgrad_window.h"
#include "../device/window_load.h"
#include "../device/window_rows.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// What one block does, and where its stages lie.
template <class Shape>
struct WgradWindowBlock {
  using Place = RingPlace<Shape::kStages>;
  static_assert(transform_ring_bytes(Shape::kStages) <= Shape::kStagesAt);

  const BnWgradWindowArguments& arguments;
  ptx::SharedAddress shared;
  TransformRing<Shape::kStages> ring;
  Tile tile;
  WgradPart part;

  RF_DEVICE int32_t stage_bytes() const { return Shape::kWindowAt + arguments.window_bytes(); }
  RF_DEVICE ptx::SharedAddress stage(const Place& at) const {
    return shared + Shape::kStagesAt + at.stage * stage_bytes();
  }
  RF_DEVICE int32_t position(int32_t step) const {
    return part.first_pixel + step * Shape::kPositions;
  }
  RF_DEVICE int32_t filter() const { return tile.m * Shape::kM; }
  RF_DEVICE int32_t channel() const { return tile.n * kWindowChannels; }
};

template <class Shape>
RF_DEVICE void produce_wgrad_windows(const WgradWindowBlock<Shape>& block) {
  const BnWgradWindowArguments& arguments = block.arguments;
  const bool affine = arguments.coefficients != nullptr;
  const int32_t bytes = block.stage_bytes() - (affine ? 0 : Shape::kBoxBytes);
  typename WgradWindowBlock<Shape>::Place at;
  for (int32_t step = 0; step < block.part.steps; ++step, at.next()) {
    const int32_t position = block.position(step);
    const Pixel first = pixel_of(position, arguments.walk);
    const ptx::SharedAddress stage = block.stage(at);
    const ptx::SharedAddress full = block.ring.full(at);
    block.ring.acquire(at, static_cast<uint32_t>(bytes));
    load_walk(stage, &arguments.dz, block.filter(), first, full);
    if (affine) load_walk(stage + Shape::kMaskAt, &arguments.y, block.filter(), first, full);
    load_window(stage + Shape::kWindowAt, arguments, position, full, block.channel());
  }
}

template <class T, class Shape>
RF_DEVICE void transform_wgrad_windows(const WgradWindowBlock<Shape>& block, uint32_t thread) {
  const BnWgradWindowArguments& arguments = block.arguments;
  const WindowRows rows(arguments.walk, thread);
  const bool normed = arguments.scale != nullptr;
  float scale[kUnitChannels] = {}, shift[kUnitChannels] = {};
  if (normed) {
    load_channels(scale, arguments.scale + block.channel() + rows.channel());
    load_channels(shift, arguments.shift + block.channel() + rows.channel());
  }
  typename WgradWindowBlock<Shape>::Place at;
  for (int32_t step = 0; step < block.part.steps; ++step, at.next()) {
    block.ring.wait_raw(at);
    if (normed) {
      rows.each(block.stage(at) + Shape::kWindowAt, block.position(step),
                arguments.parts * arguments.part_rows, [&](RowUnit& unit, uint32_t inside) {
                  normalise_pairs<T>(unit.value, scale, shift);
#pragma unroll
                  for (uint32_t& pair : unit.value) pair &= inside;
                });
    }
    block.ring.transformed(at);
  }
}

// One warpgroup's sums: of four taps, and of its half of the middle one.
template <class Shape>
struct WgradWindowSums {
  float taps[Shape::kTaps][kWindowChannels / 2];
  float middle[Shape::kShared / 2];

  RF_DEVICE void clear() {
    for (auto& tap : taps) resnet_fused::clear(tap);
    resnet_fused::clear(middle);
  }
  RF_DEVICE void pin() {
#pragma unroll
    for (auto& tap : taps) ptx::wgmma_pin(tap);
    ptx::wgmma_pin(middle);
  }
};

// Where in a window a warpgroup's operands begin.
template <class Shape>
struct WgradWindowPlaces {
  uint32_t taps[Shape::kTaps];
  uint32_t middle;

  // pitch: bytes from a row of the window's pixels to the next one.
  RF_DEVICE WgradWindowPlaces(int32_t first_tap, uint32_t consumer, uint32_t pitch) {
    const auto place = [&](int32_t tap) { return tap / 3 * pitch + tap % 3 * kStepRowBytes; };
#pragma unroll
    for (int i = 0; i < Shape::kTaps; ++i) taps[i] = place(first_tap + i);
    middle = place(Shape::kMiddle) + consumer * Shape::kShared * 2;
  }
};

template <class T, class Shape>
RF_DEVICE void consume_wgrad_windows(const WgradWindowBlock<Shape>& block, uint32_t consumer,
                                     uint32_t thread) {
  const BnWgradWindowArguments& arguments = block.arguments;
  const WgradProduct& product = arguments.product;
  const float* coefficients = arguments.coefficients;
  if (coefficients != nullptr) coefficients += block.filter();
  WalkedChannels<T> left(
      AffineChannels<T>(coefficients, arguments.filters, product.channels_out - block.filter(),
                        kStepElements, thread),
      arguments.walk, block.position(0), thread);
  const int32_t first_tap = static_cast<int32_t>(consumer) * (Shape::kMiddle + 1);
  const WgradWindowPlaces<Shape> places(first_tap, consumer,
                                        arguments.walk.columns.value * kStepRowBytes);
  const bool releases = thread % 32 == 0;
  typename WgradWindowBlock<Shape>::Place at, before;
  WgradWindowSums<Shape> d;
  uint32_t a[Shape::kHalves][kProducts][4];
  d.clear();
  d.pin();
#pragma unroll 1
  for (int32_t step = 0; step < block.part.steps; ++step) {
#pragma unroll
    for (int half = 0; half < Shape::kHalves; ++half) {
      left.prepare();
      if (half == 0) block.ring.wait(at);
      const ptx::SharedAddress dz = block.stage(at) + half * Shape::kHalfBytes;
      const ptx::SharedAddress window = dz + Shape::kWindowAt;
      left.make(a[half], dz, dz + Shape::kMaskAt);
#pragma unroll
      for (int i = 0; i < kProducts; ++i) ptx::wgmma_pin(a[half][i]);
      ptx::wgmma_fence();
      // Rows are swizzled by the bits of their own addresses, wherever a product enters the window
      // or a row of it: of that no manual speaks, and the conformance program asks ("rows along N,
      // shifted", "second halves of rows along N, shifted").
#pragma unroll
      for (int tap = 0; tap < Shape::kTaps; ++tap) {
        multiply_across<T>(d.taps[tap], a[half], window + places.taps[tap], true);
      }
      multiply_across<T>(d.middle, a[half], window + places.middle, true);
      ptx::wgmma_commit_group();
      if (half > 0 || step > 0) ptx::wgmma_wait_group<1>();
      if (half == 0 && step > 0 && releases) block.ring.release(before);
    }
    before = at;
    at.next();
  }
  ptx::wgmma_wait_group<0>();
  d.pin();
  const auto leave = [&](int32_t column, const auto& sums, int first) {
    const auto place = static_cast<uint32_t>(column / Shape::kShared);
    leave_wgrad_vectors<Shape>(product, block.tile, place * kWarpgroupThreads + thread, [&](int i) {
      const int from = first + 4 * i;
      return Vector<float>{{sums[from], sums[from + 1], sums[from + 2], sums[from + 3]}};
    });
  };
#pragma unroll
  for (int tap = 0; tap < Shape::kTaps; ++tap) {
    const int32_t column = (first_tap + tap) * kWindowChannels;
    leave(column, d.taps[tap], 0);
    leave(column + Shape::kShared, d.taps[tap], Shape::kShared / 2);
  }
  leave(Shape::kMiddle * kWindowChannels + static_cast<int32_t>(consumer) * Shape::kShared,
        d.middle, 0);
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_wgrad_window_kernel(const __grid_constant__ BnWgradWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const Tile tile = tile_of(blockIdx.x, arguments.product.tiles);
  const WgradWindowBlock<Shape> block{
      arguments, shared, {shared}, tile, wgrad_part<T, Shape>(arguments.product, tile)};
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.x);
    ptx::tma_prefetch(&arguments.dz);
    if (arguments.coefficients != nullptr) ptx::tma_prefetch(&arguments.y);
    block.ring.init(kConsumers * kWarpgroupWarps);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  take_roles<true>([&] { produce_wgrad_windows(block); },
                   [&](uint32_t consumer, uint32_t thread) {
                     consume_wgrad_windows<T>(block, consumer, thread);
                   },
                   [&](uint32_t thread) { transform_wgrad_windows<T>(block, thread); });
#endif
}

}  // namespace resnet_fused
