// Shared memory as text.
#pragma once

#include <cstdint>
#include <string>

namespace resnet_fused::emulator {

// Throws std::invalid_argument, with the accepted names, for any other.
uint32_t element_bytes(const std::string& element);

}  // namespace resnet_fused::emulator
