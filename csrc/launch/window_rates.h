// The rates that plans of window kernels count with, beside those of conv_plan.h. None has been
// measured by this project on a GPU; only their proportions matter. Inside of this room.
#pragma once

namespace resnet_fused {

constexpr double kStoredBytes = 100;  // that threads store in a cycle, 16 each
constexpr double kTurn = 100;  // cycles from the end of one warpgroup's products to the other's

}  // namespace resnet_fused
