// conv_bn_stats on the GPU, for sm_90a and 3x3 convolutions of 64 channels: the windows of
// conv_bn_act_window_sm90.cuh, whose raw output is stored and measured. What is read through the
// BatchNorm and ReLU of the layer before is transformed once a window, and not once a tap.
#pragma once

#include <cstdint>

#include "../device/normed_operand.h"
#include "../device/transform_ring.h"
#include "../device/vector.h"
#include "../device/window_moments.h"
#include "../device/window_rows.h"
#include "../device/window_stats.h"
#include "conv_bn_act_window_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// block: of those of its column.
template <class T, class Shape>
RF_DEVICE void consume_measured_windows(const ConvStatsWindowArguments& arguments,
                                        const RingOf<Shape>& ring, ptx::SharedAddress shared,
                                        int32_t block, int32_t channel, uint32_t consumer,
                                        uint32_t thread) {
  using Epilogue = WindowMoments<T, Shape::kPixels>;
  const WindowRuns& runs = arguments.measured;
  Epilogue moments(arguments.conv, own_of<Shape, Epilogue>(shared, consumer), thread, channel);
  consume_windows<T, Shape>(
      arguments.conv, ring, shared, RunWalk(runs, block), consumer, thread,
      [&](int32_t position) { moments.begin(position); },
      [&](float (&d)[Shape::kPixels / 2], int32_t position) { moments.finish(d, position); });
  const int32_t run = block + static_cast<int32_t>(consumer) * (runs.runs / kConsumers);
  if (run >= runs.count()) return;
  const auto column = static_cast<uint32_t>(channel / kWarpgroupRows);
  moments.leave(arguments, {column, channel, kWarpgroupRows}, run);
}

// The windows of a block's tiles, one after the other.
template <class T, class Shape>
RF_DEVICE void transform_windows(const ConvStatsWindowArguments& arguments,
                                 const RingOf<Shape>& ring, ptx::SharedAddress shared, RunWalk walk,
                                 uint32_t thread) {
  const ConvWindowArguments& conv = arguments.conv;
  const WindowRows window(conv.walk, thread);
  float scale[kUnitChannels];
  float shift[kUnitChannels];
  load_channels(scale, arguments.norm.scale + window.channel());
  load_channels(shift, arguments.norm.shift + window.channel());
  const int32_t rows = conv.parts * conv.part_rows;
  RingPlace<kConsumers> at;
  for (; !walk.done(); walk.next(), at.next()) {
    ring.wait_raw(at);
    window.each(shared + Shape::kWindowsAt + at.stage * rows * kStepRowBytes,
                walk.index() * Shape::kPixels, rows, [&](RowUnit& unit, uint32_t inside) {
                  normalise_pairs<T>(unit.value, scale, shift);
#pragma unroll
                  for (uint32_t& pair : unit.value) pair &= inside;
                });
    ring.transformed(at);
  }
}

#endif

// For any other architecture it is empty, and no plan chooses it. Shape: a WindowShape, or a
// TransformShape of one where a norm is read through.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_stats_window_kernel(const __grid_constant__ ConvStatsWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  static_assert(Shape::kSharedBytes <= Shape::kWindowsAt);
  const ConvWindowArguments& conv = arguments.conv;
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const int32_t block = static_cast<int32_t>(blockIdx.x) / conv.columns;
  const int32_t channel = static_cast<int32_t>(blockIdx.x) % conv.columns * kWarpgroupRows;
  const RunWalk walk(arguments.measured, block);
  if (threadIdx.x == 0) begin_windows<Shape>(conv, ring, shared, channel);
  const auto produce = [&] { produce_windows<Shape>(conv, ring, shared, walk); };
  const auto consume = [&](uint32_t consumer, uint32_t thread) {
    consume_measured_windows<T, Shape>(arguments, ring, shared, block, channel, consumer, thread);
  };
  if constexpr (Shape::kTransforms) {
    run_roles<true>(conv.dependent, produce, consume, [&](uint32_t thread) {
      transform_windows<T, Shape>(arguments, ring, shared, walk, thread);
    });
  } else {
    run_roles(conv.dependent, produce, consume);
  }
#endif
}

}  // namespace resnet_fused
