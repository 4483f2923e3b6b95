// The rates that plans of window kernels count with, beside those of conv_plan.h. None has been
// measured by this project on a GPU; only their proportions matter. Inside of this room.
#pragma once

namespace resnet_fused {

constexpr double kWarpgroupUnit = 2048 * 0.85;  // products a cycle of a multiprocessor, by wgmma
constexpr double kResults = 36;                 // that the epilogue makes in a cycle
constexpr double kStoredBytes = 100;            // that threads store in a cycle, 16 each
constexpr double kTurn = 100;      // cycles from the end of one warpgroup's products to the other's
constexpr double kSameLines = 45;  // bytes a cycle from L2, when all read the same
constexpr double kTransformed = 64;  // threads' instructions a cycle, of the warps that transform

}  // namespace resnet_fused
