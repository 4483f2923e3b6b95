// What the chains' predictions take for granted beside conv_plan.h's rates; not measured either.
// Inside of this room.
#pragma once

namespace resnet_fused {

// By wgmma: products a cycle of a multiprocessor, and cycles of a step that a warpgroup waits for
// products and barriers.
constexpr double kChainUnit = 2048 * 0.72;
constexpr double kStepWaits = 300;

}  // namespace resnet_fused
