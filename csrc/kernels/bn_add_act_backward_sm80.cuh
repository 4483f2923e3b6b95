// bn_add_act_backward on the GPU, for sm_80 and later: ReLU's mask and BatchNorm's reductions in
// one pass, bound by memory.
//
//     dz = dout where the result passed the ReLU, else 0
//     sums = sum dz, sum dz (y - mean) [, sum dz (residual - residual mean)]
//
// The last block of a group adds up what all of them have summed; see device/channel_sums.h.
#pragma once

#include "../device/channel_sums.h"

namespace resnet_fused {

struct BnAddActBackwardArguments {
  const float* norm;           // [4, C] scale, shift, mean, invstd
  const float* residual_norm;  // [4, C], of a projection
  float limit;                 // results of at most this let nothing pass; NaN: all pass
  ChannelSums sums;
};

// kFromOut: the mask is that of the result as it was stored, not made again of y.
template <class T, int kWidth, bool kFromOut, bool kProjected>
struct BnAddActBackwardPass {
  using Element = T;
  using Found = Lanes<T, kWidth>;
  static constexpr int kLength = kWidth;
  static constexpr int kReads = 2 + kFromOut + kProjected;
  static constexpr int kSums = kProjected ? 3 : 2;
  static constexpr bool kPartial = false;
  static constexpr bool kMore = true;

  static RF_HOST_DEVICE constexpr int operand(int r) {
    if (r < 2) return r == 0 ? kGradient : kRaw;
    return r == 2 && kFromOut ? kPassed : kResidual;
  }

  float limit;
  float scale[kWidth], shift[kWidth], mean[kWidth], residual_mean[kWidth];
  float sum[kSums][kWidth] = {};

  RF_DEVICE BnAddActBackwardPass(const BnAddActBackwardArguments& arguments,
                                 const ChannelWalk& walk, const WalkPlace& at)
      : limit(arguments.limit) {
    if (!at.inside) return;
    load_values(arguments.norm + 2 * walk.channels, at.channel, mean);
    if constexpr (!kFromOut) {
      load_values(arguments.norm, at.channel, scale);
      load_values(arguments.norm + walk.channels, at.channel, shift);
    }
    if constexpr (kProjected) {
      load_values(arguments.residual_norm + 2 * walk.channels, at.channel, residual_mean);
    }
  }

  RF_DEVICE Found operator()(const Found (&found)[kReads]) {
    Found dz;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float y = widen(found[1].lane[i]);
      float result;
      if constexpr (kFromOut) {
        result = widen(found[2].lane[i]);
      } else {
        result = widen(narrow<T>(__builtin_fmaf(scale[i], y, shift[i])));
      }
      // Not (result > limit): where it is NaN, the gradient passes.
      const float d = result <= limit ? 0.0f : widen(found[0].lane[i]);
      dz.lane[i] = narrow<T>(d);
      sum[0][i] += d;
      sum[1][i] = __builtin_fmaf(d, y - mean[i], sum[1][i]);
      if constexpr (kProjected) {
        const float other = widen(found[kReads - 1].lane[i]);
        sum[2][i] = __builtin_fmaf(d, other - residual_mean[i], sum[2][i]);
      }
    }
    return dz;
  }
};

template <class T, int kWidth, bool kDense, bool kFromOut, bool kProjected>
__global__ void __launch_bounds__(kWalkThreads, 2)
    bn_add_act_backward_kernel(const __grid_constant__ ChannelWalk walk,
                               const __grid_constant__ BnAddActBackwardArguments arguments) {
  using Pass = BnAddActBackwardPass<T, kWidth, kFromOut, kProjected>;
  const WalkPlace at = walk_place<kWidth>(walk);
  Pass pass(arguments, walk, at);
  if (at.inside) walk_pixels<Pass, kDense>(walk, at, pass);
  merge_sums<Pass::kSums, kWidth>(pass.sum, walk, at, arguments.sums);
}

}  // namespace resnet_fused
