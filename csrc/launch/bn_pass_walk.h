// What the launches of training's passes share: from a call to a kernel's arguments. Inside of this
// room.
#pragma once

#include "../device/pool_windows.h"
#include "bn_pass.h"

namespace resnet_fused {

// How the pass walks, but for groups and parts, which are the plan's.
ChannelWalk channel_walk(const BnTrainingCall& call);

inline bool is_pooling(const BnTrainingCall& call) {
  return call.op == BnTrainingOp::kPool || call.op == BnTrainingOp::kPoolBackward;
}

// The windows of a pooling.
PoolWindows pool_windows(const BnTrainingCall& call);

// Whether the mask is read from the result as it was stored. Without a ReLU all passes, but for a
// projection there is one kernel alone.
inline bool reads_result(const BnTrainingCall& call) {
  return call.operand[kPassed].data != nullptr &&
         (call.relu || call.operand[kResidual].data != nullptr);
}

// Whether some channels have a shortcut and others none.
inline bool is_partial(const BnTrainingCall& call) {
  return call.op == BnTrainingOp::kForward && call.operand[kResidual].data != nullptr &&
         call.residual_norm == nullptr && call.residual_channels < call.size[1];
}

// Activations that a pass reads at each of its pixels.
inline int32_t reads_of(const BnTrainingCall& call) {
  const bool residual = call.operand[kResidual].data != nullptr;
  switch (call.op) {
    case BnTrainingOp::kForward:
      return 1 + residual;
    case BnTrainingOp::kBackward:
      return 2 + reads_result(call) + residual;
    default:
      return 2;
  }
}

}  // namespace resnet_fused
