// What wgmma means on the host, and what can be planted in it. Part of wgmma.h in the emulator.
#pragma once

#include <cmath>

#include "../emulator/warpgroup.h"
#include "matrix_descriptor.h"
#include "mma.h"

namespace resnet_fused::ptx::detail {

inline float value_of(Tf32, uint32_t bits) { return float_of(bits & kTf32Mask); }

inline float value_of(E4m3, uint32_t bits) {
  const auto exponent = static_cast<int>(bits >> 3 & 15);
  const auto fraction = static_cast<float>(bits & 7);
  float value =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8.0f + fraction, exponent - 10);
  if ((bits & 0x7F) == 0x7F) value = float_of(kCanonicalNan);
  return (bits & 0x80) != 0 ? -value : value;
}

// The faults of an operand in shared memory: another place, another layout.
inline MatrixDescriptor faulty_operand(emulator::Site site, const char* name,
                                       MatrixDescriptor descriptor, int extent,
                                       bool may_be_mn_major, bool& mn_major) {
  using emulator::Fault;
  constexpr uint64_t kSpans[] = {16, 128, 64, 32};
  const uint64_t span = kSpans[descriptor.bits >> 62];
  // What makes no use of a stride can't have it wrong.
  const bool swizzled = span > 16;
  const bool leads = !swizzled || (mn_major && 2 * extent > static_cast<int>(span));
  const bool strides = (swizzled && mn_major) || extent > 8;
  constexpr uint64_t kChunk = 1;  // descriptors count in 16 bytes
  switch (emulator::fault_at(
      site, name,
      {Fault::kRowOff, Fault::kChunkOff, Fault::kWrongSwizzle,
       may_be_mn_major ? Fault::kTransposed : Fault::kNone, leads ? Fault::kLeadOff : Fault::kNone,
       strides ? Fault::kStrideOff : Fault::kNone})) {
    case Fault::kRowOff:
      return {descriptor.bits + span / 16};
    case Fault::kChunkOff:
      return {descriptor.bits ^ kChunk};
    case Fault::kWrongSwizzle:  // none for 128 bytes, 128 for 64, 64 for 32, 32 for 64
      return {descriptor.bits ^ (span == 128 ? uint64_t{3} : uint64_t{1}) << 62};
    case Fault::kTransposed:
      mn_major = !mn_major;
      return descriptor;
    case Fault::kLeadOff:
      return {descriptor.bits + (kChunk << 16)};
    case Fault::kStrideOff:
      return {descriptor.bits + (kChunk << 32)};
    default:
      return descriptor;
  }
}

inline bool swapped_registers(emulator::Site site) {
  using emulator::Fault;
  return emulator::fault_at(site, "wgmma.a", {Fault::kSwapOperands}) == Fault::kSwapOperands;
}

// The faults of the product as a whole. Whether it is left out.
inline bool faulty_product(emulator::Site site, const char* name,
                           emulator::ProductOperands& operands) {
  using emulator::Fault;
  switch (
      emulator::fault_at(site, name, {Fault::kSkip, Fault::kStaleAccumulator, Fault::kTruncate})) {
    case Fault::kSkip:
      return true;
    case Fault::kStaleAccumulator:
      operands.accumulate = false;
      return false;
    case Fault::kTruncate:
      operands.truncated = true;
      return false;
    default:
      return false;
  }
}

// What all wgmma have in common.
template <class T>
void issue_product(emulator::Site site, emulator::ProductOperands operands, bool a_mn_major,
                   bool b_mn_major) {
  constexpr const char* kName = WgmmaType<T>::kInstruction;
  if (faulty_product(site, kName, operands)) return;
  if (operands.a == nullptr) {
    operands.a_descriptor =
        faulty_operand(site, "wgmma.a", {operands.a_descriptor}, 64, kMayBeMnMajor<T>, a_mn_major)
            .bits;
  } else {
    operands.swapped = swapped_registers(site);
  }
  operands.b_descriptor = faulty_operand(site, "wgmma.b", {operands.b_descriptor},
                                         2 * operands.registers, kMayBeMnMajor<T>, b_mn_major)
                              .bits;
  emulator::issue_product(
      site,
      {kName, 32 / WgmmaType<T>::kDepth, [](uint32_t bits) { return value_of(T{}, bits); },
       a_mn_major, b_mn_major},
      operands);
}

}  // namespace resnet_fused::ptx::detail
