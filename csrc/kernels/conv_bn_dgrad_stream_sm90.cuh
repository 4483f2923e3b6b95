// conv_bn_dgrad on the GPU, for sm_90a and 3x3 convolutions of 128 filters and more: windows of dy
// as conv_bn_dgrad_window_sm90.cuh has them, of 64 filters' channels at a time, beside a ring of
// filters.
//
// A block stays for many tiles of 64 channels by so many positions. One thread asks for the filters
// of each slice's taps and, between them, for the parts of the next slice's window; three warps
// turn those while the window ahead is multiplied; two warpgroups have a tile each, in turns: one's
// products run over all slices while the other one's results go out.
#pragma once

#include <cstdint>

#include "../device/affine_stream.h"
#include "../device/block_walk.h"
#include "../device/bn_dgrad_window_end.h"
#include "../device/streamed_filters.h"
#include "../device/warpgroup_roles.h"
#include "../ptx/tma.h"
#include "conv_bn_dgrad_window_sm90.cuh"

namespace resnet_fused {

// Of a thread that turns: with fewer of them those that multiply keep 128 sums and a tile's end.
constexpr int kStreamTurnRegisters = 72;

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_dgrad_stream_kernel(const __grid_constant__ BnDgradWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ConvWindowArguments& told = arguments.window;
  const AffineStream<Shape> rings(arguments, ptx::shared_address(ptx::dynamic_shared()));
  const auto block = static_cast<int32_t>(blockIdx.x);
  // Blocks of one column of tiles lie `columns` apart.
  const BlockWalk walk(told.tiles, false, block / told.columns,
                       static_cast<int32_t>(gridDim.x) / told.columns);
  const int32_t channel = block % told.columns * kWarpgroupRows;
  // The filter's taps from the last one backwards.
  const auto load = [&](ptx::SharedAddress to, int32_t filter, int tap, ptx::SharedAddress full) {
    ptx::tma_load(to, &told.weight, {channel, 2 - tap % 3, 2 - tap / 3, filter}, full);
  };
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&told.weight);
    ptx::tma_prefetch(&told.x);
    if (arguments.coefficients != nullptr) ptx::tma_prefetch(&arguments.y);
    if (told.has_residual) ptx::tma_prefetch(&told.residual);
    if (arguments.reduced) ptx::tma_prefetch(&arguments.raw);
    rings.init();
    for (int i = 0; i < kConsumers; ++i) {
      ptx::mbarrier_init(rings.shared + Shape::kOwnAt + i * kBarrierBytes, 1);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  take_roles<true, kStreamTurnRegisters>(
      [&] {
        StreamProducer producer(rings, walk, arguments.slices,
                                WindowsInParts<Shape>(arguments, rings.place, walk), load);
        producer.begin();
        producer.run();
      },
      [&](uint32_t consumer, uint32_t thread) {
        BnDgradWindowEnd<T, Shape> end(arguments, rings.shared, channel, consumer, thread);
        using Consumer = StreamConsumer<Shape, AffineStream<Shape>, BlockWalk>;
        Consumer(told, rings, walk, arguments.slices, consumer, thread)
            .run([](float (&d)[Shape::kPixels / 2], ptx::SharedAddress filters,
                    ptx::SharedAddress window,
                    bool accumulate) { multiply_turned<T>(d, filters, window, accumulate); },
                 [&](int32_t tile) { end.begin(tile * Shape::kPixels); },
                 [&](float (&d)[Shape::kPixels / 2], int32_t tile) { end.finish(d, tile); });
      },
      [&](uint32_t thread) {
        WindowTurner<T, Shape>(arguments, rings.place, thread).run(walk, arguments.slices);
      });
#endif
}

}  // namespace resnet_fused
