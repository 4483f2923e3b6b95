// conv_bn_dgrad on the GPU, for sm_90a and 3x3 convolutions of 64 filters: wgmma on windows of dy,
// which are made of dz and y once for all nine taps.
//
//     dy = A dz + (B y + C)                              where they have come; 0 beside the images
//     dx^T[c, m] = sum over taps and e of filter[e, tap, c] * dy[m at tap, e] [+ addend]
//     sums = sum dx, sum dx (raw - mean)                 of every channel, of the rounded dx
//
// A block stays for many tiles of 64 channels by so many positions, and keeps the filters of its
// channels, which products read across. One thread asks for parts of windows, three warps turn
// them, and two warpgroups have a window each, in turns: one's products run while the other one's
// results go out and its next window comes and is turned. Each tile leaves its sums; the last one
// of a column of tiles adds up what the others have left.
#pragma once

#include <cstdint>

#include "../device/affine_window.h"
#include "../device/block_walk.h"
#include "../device/bn_dgrad_window_end.h"
#include "../device/pipeline.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"
#include "conv_bn_act_window_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Asks for the products of a tap of dy, from its first position's row on, with filters that lie as
// in memory.
template <class T, int kRegisters>
RF_DEVICE void multiply_turned(float (&d)[kRegisters], ptx::SharedAddress filters,
                               ptx::SharedAddress window, bool accumulate) {
  constexpr int kSliceBytes = kStepElements / kProducts * kStepRowBytes;
  const auto a = ptx::matrix_descriptor(filters, kAcrossLayout);
  const auto b = ptx::matrix_descriptor(window, kTileLayout<kStepRowBytes>);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    ptx::wgmma<ProductType<T>, ptx::Major::kMn>(d, a + i * kSliceBytes, b + i * kProductBytes,
                                                accumulate || i > 0);
  }
}

template <class T, class Shape>
RF_DEVICE void consume_turned(const BnDgradWindowArguments& arguments,
                              const AffineWindows<Shape>& place, ptx::SharedAddress shared,
                              BlockWalk walk, int32_t channel, uint32_t consumer, uint32_t thread) {
  BnDgradWindowEnd<T, Shape> end(arguments, shared, channel, consumer, thread);
  Turns turns(shared + Shape::kTurnsAt, consumer);
  const uint32_t pitch = arguments.window.walk.columns.value * kStepRowBytes;
  const bool releases = thread % 32 == 0;
  RingPlace<kConsumers> at;
  if (consumer == 1) {
    at.next();
    walk.next();
  }
  const ptx::SharedAddress window = place.window(at);
  float d[Shape::kPixels / 2];
  clear(d);
  ptx::mbarrier_wait_parity(shared + Shape::kFiltersFullAt, 0);
  while (!walk.done()) {
    turns.wait();
    place.windows.wait(at);
    sum_window(
        d,
        [&](float (&sums)[Shape::kPixels / 2], int tap, bool accumulate) {
          // The filter's taps from the last one backwards.
          multiply_turned<T>(sums, shared + (kWindowTaps - 1 - tap) * kWindowFilterBytes,
                             window + tap / 3 * pitch + tap % 3 * kStepRowBytes, accumulate);
        },
        [&] { end.begin(walk.index() * Shape::kPixels); },
        [&] {
          if (releases) turns.pass();
        });
    if (releases) place.windows.release(at);
    end.finish(d, walk.index());
    walk.next();
    walk.next();
    at.skip(kConsumers);
  }
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_dgrad_window_kernel(const __grid_constant__ BnDgradWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const ConvWindowArguments& told = arguments.window;
  const AffineWindows<Shape> place(arguments, shared);
  const auto block = static_cast<int32_t>(blockIdx.x);
  // Blocks of one column of tiles lie `columns` apart.
  const BlockWalk walk(told.tiles, told.reverse, block / told.columns,
                       static_cast<int32_t>(gridDim.x) / told.columns);
  const int32_t channel = block % told.columns * kWarpgroupRows;
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&told.weight);
    ptx::tma_prefetch(&told.x);
    if (arguments.coefficients != nullptr) ptx::tma_prefetch(&arguments.y);
    if (told.has_residual) ptx::tma_prefetch(&told.residual);
    if (arguments.reduced) ptx::tma_prefetch(&arguments.raw);
    place.init();
    const ptx::SharedAddress filters_full = shared + Shape::kFiltersFullAt;
    ptx::mbarrier_init(filters_full, 1);
    for (int i = 0; i < kConsumers; ++i) {
      ptx::mbarrier_init(shared + Shape::kOwnAt + i * kBarrierBytes, 1);
    }
    Turns::init(shared + Shape::kTurnsAt);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(filters_full, kWindowFilters);
    load_taps(shared, &told.weight, 0, filters_full, channel);
  }
  ptx::sync_threads();
  take_roles<true, kTurnRegisters>(
      [&] { produce_gradients<Shape>(arguments, place, walk); },
      [&](uint32_t consumer, uint32_t thread) {
        consume_turned<T, Shape>(arguments, place, shared, walk, channel, consumer, thread);
      },
      [&](uint32_t thread) { WindowTurner<T, Shape>(arguments, place, thread).run(walk); });
#endif
}

}  // namespace resnet_fused
