// bn_backward_apply on the GPU, for sm_80 and later: dy = rnd(fma(A, dz, fma(B, y, C))) in one
// pass, bound by memory; see device/channel_walk.h for who reads what.
#pragma once

#include "../device/channel_walker.h"

namespace resnet_fused {

struct BnBackwardApplyArguments {
  const float* coefficients;  // [3, C] A, B, C
};

template <class T, int kWidth>
struct BnBackwardApplyPass {
  using Element = T;
  using Found = Lanes<T, kWidth>;
  static constexpr int kLength = kWidth;
  static constexpr int kReads = 2;
  static constexpr bool kPartial = false;
  static constexpr bool kMore = false;

  static RF_HOST_DEVICE constexpr int operand(int r) { return r == 0 ? kGradient : kRaw; }

  float a[kWidth], b[kWidth], c[kWidth];

  RF_DEVICE BnBackwardApplyPass(const BnBackwardApplyArguments& arguments, const ChannelWalk& walk,
                                int64_t channel) {
    load_values(arguments.coefficients, channel, a);
    load_values(arguments.coefficients + walk.channels, channel, b);
    load_values(arguments.coefficients + 2 * walk.channels, channel, c);
  }

  RF_DEVICE Found operator()(const Found (&found)[kReads]) const {
    Found dy;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float rest = __builtin_fmaf(b[i], widen(found[1].lane[i]), c[i]);
      dy.lane[i] = narrow<T>(__builtin_fmaf(a[i], widen(found[0].lane[i]), rest));
    }
    return dy;
  }
};

template <class T, int kWidth, bool kDense>
__global__ void __launch_bounds__(kWalkThreads, 2)
    bn_backward_apply_kernel(const __grid_constant__ ChannelWalk walk,
                             const __grid_constant__ BnBackwardApplyArguments arguments) {
  const WalkPlace at = walk_place<kWidth>(walk);
  if (!at.inside) return;
  BnBackwardApplyPass<T, kWidth> pass(arguments, walk, at.channel);
  walk_pixels<decltype(pass), kDense>(walk, at, pass);
}

}  // namespace resnet_fused
