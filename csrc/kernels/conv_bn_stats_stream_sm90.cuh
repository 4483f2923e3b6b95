// conv_bn_stats on the GPU, for sm_90a and 3x3 convolutions of 128 channels and more: windows for
// wgmma as conv_bn_stats_window_sm90.cuh has them, of 64 channels at a time, beside a ring of
// filters.
//
// A block stays for many tiles of 64 filters by so many positions. One thread asks for windows, a
// slice of 64 channels each, and for the filters of each slice's taps; three warps put a window
// through the BatchNorm and ReLU of the layer before, once for nine taps, while the one ahead is
// multiplied; two warpgroups have a tile each, in turns: one's products over all slices run while
// the other one's results are rounded, stored and measured.
#pragma once

#include <cstdint>

#include "../device/normed_operand.h"
#include "../device/streamed_filters.h"
#include "../device/transform_ring.h"
#include "../device/vector.h"
#include "../device/warpgroup_roles.h"
#include "../device/window_moments.h"
#include "../device/window_rows.h"
#include "../device/window_stats.h"
#include "../ptx/keep.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Which of its column's blocks this one is, and its first filter. Worked out where it is asked for:
// kept over a tile's products it would take registers that there are not.
struct StreamBlock {
  int32_t block;
  int32_t channel;
};
RF_DEVICE StreamBlock this_block(int32_t columns) {
  ptx::keep(columns);
  const auto index = static_cast<int32_t>(blockIdx.x);
  return {index / columns, index % columns * kWarpgroupRows};
}

template <class T, class Shape>
RF_DEVICE void consume_streamed(const ConvStatsWindowArguments& arguments,
                                const StreamedRings<Shape>& rings, uint32_t consumer,
                                uint32_t thread) {
  using Epilogue = WindowMoments<T, Shape::kPixels>;
  static_assert(Epilogue::kStagingBytes <= Shape::kStagingBytes);
  const WindowRuns& runs = arguments.measured;
  const auto [block, channel] = this_block(arguments.conv.columns);
  Epilogue moments(arguments.conv,
                   {rings.shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0, 0,
                    static_cast<int>(1 + consumer)},
                   thread, channel);
  using Consumer = StreamConsumer<Shape, StreamedRings<Shape>, RunWalk>;
  Consumer(arguments.conv, rings, RunWalk(runs, block), arguments.slices, consumer, thread)
      .run([](float (&d)[Shape::kPixels / 2], ptx::SharedAddress filters, ptx::SharedAddress window,
              bool accumulate) { multiply_step<T>(d, filters, window, accumulate); },
           [&](int32_t tile) { moments.begin(tile * Shape::kPixels); },
           [&](float (&d)[Shape::kPixels / 2], int32_t tile) {
             moments.finish(d, tile * Shape::kPixels);
           });
  const StreamBlock mine = this_block(arguments.conv.columns);
  const int32_t run = mine.block + static_cast<int32_t>(consumer) * (runs.runs / kConsumers);
  if (run >= runs.count()) return;
  const auto column = static_cast<uint32_t>(mine.channel / kWarpgroupRows);
  moments.leave(arguments, {column, mine.channel, kWarpgroupRows}, run);
}

// The windows of a block's tiles, slice by slice.
template <class T, class Shape>
RF_DEVICE void transform_slices(const ConvStatsWindowArguments& arguments,
                                const StreamedRings<Shape>& rings, RunWalk walk, uint32_t thread) {
  const ConvWindowArguments& conv = arguments.conv;
  const WindowRows window(conv.walk, thread);
  const auto ring = rings.windows();
  const int32_t rows = conv.parts * conv.part_rows;
  RingPlace<kConsumers> at;
  for (; !walk.done(); walk.next()) {
    for (int32_t slice = 0; slice < arguments.slices; ++slice, at.next()) {
      const int32_t channel = slice * kWindowChannels + window.channel();
      float scale[kUnitChannels];
      float shift[kUnitChannels];
      load_channels(scale, arguments.norm.scale + channel);
      load_channels(shift, arguments.norm.shift + channel);
      ring.wait_raw(at);
      window.each(rings.window(at), walk.index() * Shape::kPixels, rows,
                  [&](RowUnit& unit, uint32_t inside) {
                    normalise_pairs<T>(unit.value, scale, shift);
#pragma unroll
                    for (uint32_t& pair : unit.value) pair &= inside;
                  });
      ring.transformed(at);
    }
  }
}

#endif

// For any other architecture it is empty, and no plan chooses it. Shape: a StreamWindowShape, or a
// TransformShape of one where a norm is read through.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_stats_stream_kernel(const __grid_constant__ ConvStatsWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  static_assert(Shape::kSharedBytes <= Shape::kWindowsAt);
  const ConvWindowArguments& conv = arguments.conv;
  const StreamedRings<Shape> rings{ptx::shared_address(ptx::dynamic_shared()),
                                   conv.parts * conv.part_rows * kStepRowBytes};
  const auto [block, channel] = this_block(conv.columns);
  const RunWalk walk(arguments.measured, block);
  const auto load = [&](ptx::SharedAddress to, int32_t from, int tap, ptx::SharedAddress full) {
    ptx::tma_load(to, &conv.weight, {from, tap % 3, tap / 3, channel}, full);
  };
  StreamProducer producer(rings, walk, arguments.slices,
                          WholeWindows<Shape, RunWalk>(conv, rings, walk, arguments.slices), load);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&conv.weight);
    ptx::tma_prefetch(&conv.x);
    rings.init();
    ptx::fence_mbarrier_init();
    producer.begin();
  }
  const auto produce = [&] { producer.run(); };
  const auto consume = [&](uint32_t consumer, uint32_t thread) {
    consume_streamed<T, Shape>(arguments, rings, consumer, thread);
  };
  if constexpr (Shape::kTransforms) {
    run_roles<true>(conv.dependent, produce, consume, [&](uint32_t thread) {
      transform_slices<T, Shape>(arguments, rings, walk, thread);
    });
  } else {
    run_roles(conv.dependent, produce, consume);
  }
#endif
}

}  // namespace resnet_fused
