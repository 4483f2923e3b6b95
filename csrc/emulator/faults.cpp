#include "faults.h"

#include <stdexcept>

namespace resnet_fused::emulator {
namespace {

constexpr std::array<const char*, kFaults> kNames = {
    "none",         "skip",        "wait_one_fewer", "ignore_predicate",  "row_off",
    "chunk_off",    "transposed",  "swap_operands",  "stale_accumulator", "wrong_lane",
    "non_atomic",   "wrong_count", "wrong_barrier",  "no_fence",          "truncate",
    "wrong_parity", "wrong_bytes", "coordinate_off", "wrong_swizzle",     "lead_off",
    "stride_off",
};
static_assert(kNames.back() != nullptr, "every fault has a name");

}  // namespace

const char* name_of(Fault fault) { return kNames.at(static_cast<size_t>(fault)); }

Fault fault_named(const std::string& name) {
  std::string accepted;
  for (int i = 0; i < kFaults; ++i) {
    if (name == kNames[i]) return static_cast<Fault>(i);
    accepted += (i > 0 ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument("unknown fault '" + name + "': expected one of " + accepted);
}

}  // namespace resnet_fused::emulator
