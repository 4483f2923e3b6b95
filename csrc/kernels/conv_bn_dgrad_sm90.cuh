// conv_bn_dgrad on the GPU, for sm_90a: the gradient of the input of a convolution between two
// BatchNorms by wgmma, fed by TMA.
//
//     dy = A dz + (B y + C)                              as it arrives; 0 outside of the output
//     dx[m, c] = sum over e of dy[m, e] * filter[e, c] [+ addend]     where h passed the ReLU
//     sums = sum dx, sum dx (raw - mean)                 of every channel, of the rounded dx
//
// Steps and products are conv_dgrad_sm90.cuh's. Each warpgroup leaves the sums of its rows of a
// tile; the last one of a column of tiles adds up what the others have left.
#pragma once

#include <cstdint>

#include "../device/affine_operand.h"
#include "../device/bn_dgrad_store.h"
#include "../device/bn_dgrad_tma.h"
#include "conv_dgrad_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
RF_DEVICE void consume_bn_gradients(const ConvBnDgradTmaArguments& arguments,
                                    const RingOf<Shape>& ring, ptx::SharedAddress shared,
                                    PhasedWalk walk, uint32_t consumer, uint32_t thread) {
  BnDgradStore<T, Shape> store(arguments, shared, consumer, thread);
  AffineOperand<T> left(arguments, thread);
  const uint32_t row = consumer * kWarpgroupRows;
  RingPlace<Shape::kStages> at;
  float d[Shape::kColumns / 2];
  for (; !walk.done(); walk.next()) {
    const TmaTile tile = own_tile<Shape>(walk);
    const PhasePlace place = place_of<Shape>(walk, row, arguments.dgrad.apart);
    const ConvTmaArguments& conv = walk.convolution();
    left.start(conv, place);
    sum_turned<T, Shape>(d, ring, at, shared, row * kStepRowBytes, conv.steps,
                         thread % 32 < Shape::kFilterSharing, left,
                         [&] { store.begin(walk.phase(), place); });
    store.finish(d, walk.phase(), tile, place);
  }
  store.end();
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_dgrad_tma_kernel(const __grid_constant__ ConvBnDgradTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const auto prepare = [&] {
    for (int i = 0; i < arguments.dgrad.count; ++i) {
      const ConvTmaArguments& conv = arguments.dgrad.phases[i].conv;
      if (conv.has_residual && arguments.gathered.first == nullptr) {
        ptx::tma_prefetch(&conv.residual);
      }
      if (arguments.reduced) ptx::tma_prefetch(&arguments.raw[i]);
    }
    init_tile_barriers<Shape>(shared);
  };
  run_gradients<T, Shape>(
      arguments.dgrad, shared, prepare,
      [&](const RingOf<Shape>& ring, const PhasedWalk& walk, uint32_t consumer, uint32_t thread) {
        consume_bn_gradients<T, Shape>(arguments, ring, shared, walk, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
