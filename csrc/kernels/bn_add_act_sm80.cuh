// bn_add_act on the GPU, for sm_80 and later: a block's end in one pass, bound by memory.
//
//     out = rnd(act(fma(scale, y, shift) + shortcut))
//
// The shortcut is as it is, behind a BatchNorm of its own, or in some of the channels alone; see
// device/channel_walk.h for who reads what.
#pragma once

#include "../device/channel_walker.h"

namespace resnet_fused {

// kPart: some of the channels have one.
enum class Shortcut { kNone, kPlain, kPart, kNormalised };

struct BnAddActArguments {
  const float* norm;           // [4, C] scale, shift, mean, invstd
  const float* residual_norm;  // [4, C], of kNormalised
  float floor;                 // 0 for a ReLU, -infinity for none
};

template <class T, int kWidth, Shortcut kShortcut>
struct BnAddActPass {
  using Element = T;
  using Found = Lanes<T, kWidth>;
  static constexpr int kLength = kWidth;
  static constexpr int kReads = kShortcut == Shortcut::kNone ? 1 : 2;
  static constexpr bool kPartial = kShortcut == Shortcut::kPart;
  static constexpr bool kMore = kPartial;

  static RF_HOST_DEVICE constexpr int operand(int r) { return r == 0 ? kRaw : kResidual; }

  BnAct<float> op;
  bool added = true;  // whether the shortcut has these channels
  float scale[kWidth], shift[kWidth];
  float residual_scale[kWidth], residual_shift[kWidth];

  RF_DEVICE BnAddActPass(const BnAddActArguments& arguments, const ChannelWalk& walk,
                         int64_t channel)
      : op{arguments.floor} {
    if constexpr (kPartial) {
      const WalkOperand& residual = walk.operand[kResidual];
      added = channel >= residual.first && channel - residual.first < residual.channels;
    }
    load_values(arguments.norm, channel, scale);
    load_values(arguments.norm + walk.channels, channel, shift);
    if constexpr (kShortcut == Shortcut::kNormalised) {
      load_values(arguments.residual_norm, channel, residual_scale);
      load_values(arguments.residual_norm + walk.channels, channel, residual_shift);
    }
  }

  RF_DEVICE Found operator()(const Found (&found)[kReads]) const {
    Found out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float y = widen(found[0].lane[i]);
      float z;
      if constexpr (kShortcut == Shortcut::kNone) {
        z = op(y, scale[i], shift[i]);
      } else {
        float r = widen(found[1].lane[i]);
        if constexpr (kShortcut == Shortcut::kNormalised) {
          r = __builtin_fmaf(residual_scale[i], r, residual_shift[i]);
        }
        // Where nothing is added, -0 stays -0.
        z = added ? op(y, scale[i], shift[i], r) : op(y, scale[i], shift[i]);
      }
      out.lane[i] = narrow<T>(z);
    }
    return out;
  }
};

template <class T, int kWidth, bool kDense, Shortcut kShortcut>
__global__ void __launch_bounds__(kWalkThreads, 2)
    bn_add_act_kernel(const __grid_constant__ ChannelWalk walk,
                      const __grid_constant__ BnAddActArguments arguments) {
  const WalkPlace at = walk_place<kWidth>(walk);
  if (!at.inside) return;
  BnAddActPass<T, kWidth, kShortcut> pass(arguments, walk, at.channel);
  walk_pixels<decltype(pass), kDense>(walk, at, pass);
}

}  // namespace resnet_fused
