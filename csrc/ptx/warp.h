// Exchanges between the lanes of a warp. PTX ISA, Data Movement: shfl.sync; Parallel
// Synchronization: vote.sync. The lanes of `mask` must call together; a value comes from a lane of
// the mask, or is undefined (an error under the emulator).
#pragma once

#include <type_traits>

#include "common.h"

namespace resnet_fused::ptx {

namespace detail {

enum class Shuffle { kIndex, kXor, kDown, kUp };

// `operand` is a lane (kIndex), a mask of lane bits (kXor) or a distance (kDown, kUp). Where the
// distance leads out of the warp a lane gets its own value.
template <Shuffle kMode>
RF_DEVICE uint32_t shuffle_word(uint32_t mask, uint32_t value, uint32_t operand RF_SITE_PARAMETER) {
  uint32_t result;
  if constexpr (kMode == Shuffle::kIndex) {
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, %3;"
                 : "=r"(result)
                 : "r"(value), "r"(operand), "r"(mask));
  } else if constexpr (kMode == Shuffle::kXor) {
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, %3;"
                 : "=r"(result)
                 : "r"(value), "r"(operand), "r"(mask));
  } else if constexpr (kMode == Shuffle::kDown) {
    asm volatile("shfl.sync.down.b32 %0, %1, %2, 0x1f, %3;"
                 : "=r"(result)
                 : "r"(value), "r"(operand), "r"(mask));
  } else {
    asm volatile("shfl.sync.up.b32 %0, %1, %2, 0x0, %3;"
                 : "=r"(result)
                 : "r"(value), "r"(operand), "r"(mask));
  }
  return result;
}

template <class V>
constexpr bool kShuffled = sizeof(V) == 4 && std::is_trivially_copyable_v<V>;

}  // namespace detail

// V is any type of 4 bytes: uint32_t, int, float. The value of `lane` (0-31).
template <class V>
RF_DEVICE V shuffle(uint32_t mask, V value, int lane RF_SITE_PARAMETER) {
  static_assert(detail::kShuffled<V>, "shuffles move 4 bytes");
  return __builtin_bit_cast(
      V, detail::shuffle_word<detail::Shuffle::kIndex>(mask, __builtin_bit_cast(uint32_t, value),
                                                       static_cast<uint32_t>(lane) RF_SITE));
}

// The value of the lane whose number differs in the bits of `lanes`.
template <class V>
RF_DEVICE V shuffle_xor(uint32_t mask, V value, int lanes RF_SITE_PARAMETER) {
  static_assert(detail::kShuffled<V>, "shuffles move 4 bytes");
  return __builtin_bit_cast(
      V, detail::shuffle_word<detail::Shuffle::kXor>(mask, __builtin_bit_cast(uint32_t, value),
                                                     static_cast<uint32_t>(lanes) RF_SITE));
}

// The value of the lane `distance` further up; the last `distance` lanes keep their own.
template <class V>
RF_DEVICE V shuffle_down(uint32_t mask, V value, int distance RF_SITE_PARAMETER) {
  static_assert(detail::kShuffled<V>, "shuffles move 4 bytes");
  return __builtin_bit_cast(
      V, detail::shuffle_word<detail::Shuffle::kDown>(mask, __builtin_bit_cast(uint32_t, value),
                                                      static_cast<uint32_t>(distance) RF_SITE));
}

// The value of the lane `distance` further down; the first `distance` lanes keep their own.
template <class V>
RF_DEVICE V shuffle_up(uint32_t mask, V value, int distance RF_SITE_PARAMETER) {
  static_assert(detail::kShuffled<V>, "shuffles move 4 bytes");
  return __builtin_bit_cast(
      V, detail::shuffle_word<detail::Shuffle::kUp>(mask, __builtin_bit_cast(uint32_t, value),
                                                    static_cast<uint32_t>(distance) RF_SITE));
}

// Bit l: the predicate of lane l; 0 for lanes outside of the mask.
RF_DEVICE uint32_t ballot(uint32_t mask, bool predicate RF_SITE_PARAMETER) {
  uint32_t result;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\nvote.sync.ballot.b32 %0, p, %2;\n}"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result;
}

// Whether the predicate holds in some lane, or in all lanes, of the mask.
RF_DEVICE bool any(uint32_t mask, bool predicate RF_SITE_PARAMETER) {
  uint32_t result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nvote.sync.any.pred q, p, %2;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result != 0;
}

RF_DEVICE bool all(uint32_t mask, bool predicate RF_SITE_PARAMETER) {
  uint32_t result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nvote.sync.all.pred q, p, %2;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result != 0;
}

}  // namespace resnet_fused::ptx
