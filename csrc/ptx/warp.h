// Exchanges between the lanes of a warp. PTX ISA, Data Movement: shfl.sync; Parallel
// Synchronization: vote.sync. The lanes of `mask` must call together; a value comes from a lane of
// the mask, or is undefined (an error under the emulator).
#pragma once

#include <type_traits>

#if defined(RF_EMULATED)
#include <string>
#endif

#include "common.h"

namespace resnet_fused::ptx {

namespace detail {

enum class Shuffle { kIndex, kXor, kDown, kUp };

#if defined(RF_EMULATED)

inline constexpr const char* kShuffleNames[] = {"shfl.sync.idx", "shfl.sync.bfly", "shfl.sync.down",
                                                "shfl.sync.up"};

// The lane that `lane` reads, or itself where the distance leads out of the warp.
inline int source_lane(Shuffle mode, int lane, uint32_t operand) {
  const int b = static_cast<int>(operand % kWarpSize);  // five bits count
  switch (mode) {
    case Shuffle::kIndex:
      return b;
    case Shuffle::kXor:
      return lane ^ b;
    case Shuffle::kDown:
      return lane + b < kWarpSize ? lane + b : lane;
    case Shuffle::kUp:
      return lane >= b ? lane - b : lane;
  }
  return lane;
}

inline void check_mask(emulator::Site site, const char* name, uint32_t mask) {
  if ((mask >> emulator::lane() & 1u) == 0) {
    emulator::fail(site, name, "the calling lane is not in the mask " + emulator::hex(mask));
  }
}

inline uint32_t exchange(emulator::Site site, Shuffle mode, uint32_t mask, uint32_t value,
                         uint32_t operand, bool neighbour) {
  const char* name = kShuffleNames[static_cast<int>(mode)];
  check_mask(site, name, mask);
  int source = source_lane(mode, emulator::lane(), operand);
  if (neighbour && (mask >> (source ^ 1) & 1u) != 0) source ^= 1;
  if ((mask >> source & 1u) == 0) {
    emulator::fail(site, name,
                   "reads lane " + std::to_string(source) + ", which is not in the mask " +
                       emulator::hex(mask));
  }
  struct Lane {
    uint32_t value;
    int source;
    uint32_t result;
  } mine = {value, source, 0};
  emulator::collective(site, name, mask, &mine, [mask](void* const* lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      auto& to = *static_cast<Lane*>(lanes[lane]);
      to.result = static_cast<const Lane*>(lanes[to.source])->value;
    }
  });
  return mine.result;
}

// The predicates of the mask's lanes, bit by bit.
inline uint32_t gather(emulator::Site site, const char* name, uint32_t mask, bool predicate) {
  check_mask(site, name, mask);
  struct Lane {
    bool predicate;
    uint32_t bits;
  } mine = {predicate, 0};
  emulator::collective(site, name, mask, &mine, [mask](void* const* lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      if (static_cast<const Lane*>(lanes[lane])->predicate) bits |= 1u << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((mask >> lane & 1u) != 0) static_cast<Lane*>(lanes[lane])->bits = bits;
    }
  });
  return mine.bits;
}

#endif

// `operand` is a lane (kIndex), a mask of lane bits (kXor) or a distance (kDown, kUp). Where the
// distance leads out of the warp a lane gets its own value.
template <Shuffle kMode>
RF_DEVICE uint32_t shuffle_word(uint32_t mask, uint32_t value, uint32_t operand RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  using emulator::Fault;
  const Fault fault = emulator::fault_at(site, kShuffleNames[static_cast<int>(kMode)],
                                         {Fault::kSkip, Fault::kWrongLane});
  if (fault == Fault::kSkip) return value;
  return exchange(site, kMode, mask, value, operand, fault == Fault::kWrongLane);
#else
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
#endif
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
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "vote.sync.ballot", {emulator::Fault::kSkip});
  if (fault == emulator::Fault::kSkip) return predicate ? 1u << emulator::lane() : 0u;
  return detail::gather(site, "vote.sync.ballot", mask, predicate);
#else
  uint32_t result;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\nvote.sync.ballot.b32 %0, p, %2;\n}"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result;
#endif
}

// Whether the predicate holds in some lane, or in all lanes, of the mask.
RF_DEVICE bool any(uint32_t mask, bool predicate RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "vote.sync.any", {emulator::Fault::kSkip});
  if (fault == emulator::Fault::kSkip) return predicate;
  return detail::gather(site, "vote.sync.any", mask, predicate) != 0;
#else
  uint32_t result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nvote.sync.any.pred q, p, %2;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result != 0;
#endif
}

RF_DEVICE bool all(uint32_t mask, bool predicate RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "vote.sync.all", {emulator::Fault::kSkip});
  if (fault == emulator::Fault::kSkip) return predicate;
  return detail::gather(site, "vote.sync.all", mask, predicate) == mask;
#else
  uint32_t result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nvote.sync.all.pred q, p, %2;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(static_cast<uint32_t>(predicate)), "r"(mask));
  return result != 0;
#endif
}

}  // namespace resnet_fused::ptx
