// conv_bn_dgrad_end on the GPU, for sm_90a: the gradient between two blocks by wgmma, fed by TMA.
//
//     dy = A dz + (B y + C)                              as it arrives; 0 outside of the output
//     dx[m, c] = sum over e of dy[m, e] * filter[e, c] [+ addend]     where out passed the ReLU
//     sums = sum dx, sum dx (raw - mean) [, sum dx (residual - its mean)]
//                                                        of every channel, of the rounded dx
//
// Steps and products are conv_dgrad_sm90.cuh's, the way of the sums conv_bn_dgrad_sm90.cuh's.
#pragma once

#include <cstdint>

#include "../device/affine_operand.h"
#include "../device/bn_dgrad_end_store.h"
#include "../device/bn_dgrad_end_tma.h"
#include "conv_dgrad_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
RF_DEVICE void consume_end_gradients(const ConvBnDgradEndTmaArguments& arguments,
                                     const RingOf<Shape>& ring, ptx::SharedAddress shared,
                                     PhasedWalk walk, uint32_t consumer, uint32_t thread) {
  BnDgradEndStore<T, Shape> store(arguments, shared, consumer, thread);
  AffineOperand<T> left(arguments.image, thread);
  const uint32_t row = consumer * kWarpgroupRows;
  RingPlace<Shape::kStages> at;
  float d[Shape::kColumns / 2];
  const auto ask = [&] {
    if (walk.done()) return;
    store.ask(walk.phase(), place_of<Shape>(walk, row, arguments.image.dgrad.apart));
  };
  ask();
  while (!walk.done()) {
    const TmaTile tile = own_tile<Shape>(walk);
    const PhasePlace place = place_of<Shape>(walk, row, arguments.image.dgrad.apart);
    const ConvTmaArguments& conv = walk.convolution();
    const int32_t phase = walk.phase();
    left.start(conv, place);
    walk.next();
    sum_turned<T, Shape>(d, ring, at, shared, row * kStepRowBytes, conv.steps,
                         thread % 32 < Shape::kFilterSharing, left,
                         [&] { store.begin(phase, place); });
    store.finish(d, phase, tile, place, ask);
  }
  store.end();
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_dgrad_end_tma_kernel(const __grid_constant__ ConvBnDgradEndTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const ConvBnDgradTmaArguments& image = arguments.image;
  const auto prepare = [&] {
    for (int i = 0; i < image.dgrad.count; ++i) {
      const ConvTmaArguments& conv = image.dgrad.phases[i].conv;
      if (conv.has_residual && image.gathered.first == nullptr) {
        ptx::tma_prefetch(&conv.residual);
      }
      ptx::tma_prefetch(&arguments.out[i]);
      ptx::tma_prefetch(&image.raw[i]);
      if (arguments.projected) ptx::tma_prefetch(&arguments.residual[i]);
    }
    init_tile_barriers<Shape>(shared);
  };
  run_gradients<T, Shape>(
      image.dgrad, shared, prepare,
      [&](const RingOf<Shape>& ring, const PhasedWalk& walk, uint32_t consumer, uint32_t thread) {
        consume_end_gradients<T, Shape>(arguments, ring, shared, walk, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
