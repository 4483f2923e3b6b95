// e4m3 as a tensor's dtype in the C interfaces of the ops that know it.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int32_t kFloat8E4M3 = 4;  // beside those of DataType

}  // namespace resnet_fused
