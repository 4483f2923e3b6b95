// What the chains' predictions take for granted beside conv_plan.h's rates; not measured either.
// Inside of this room.
#pragma once

namespace resnet_fused {

// Bytes a cycle from L2 when all multiprocessors read the same filters.
constexpr double kSameLines = 45;

// By wgmma: products a cycle of a multiprocessor, results that the epilogues make in a cycle, and
// cycles of a step that a warpgroup waits for products and barriers.
constexpr double kWarpgroupUnit = 2048 * 0.72;
constexpr double kResults = 36;
constexpr double kStepWaits = 300;

}  // namespace resnet_fused
