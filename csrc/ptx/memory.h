// Loads and stores of 1, 2, 4, 8 or 16 bytes. PTX ISA, Data Movement and Conversion Instructions:
// ld, ld.global.nc, st, prefetch. An address is a multiple of the size.
#pragma once

#include "types.h"

#if defined(RF_EMULATED)
#include <cstring>
#endif

namespace resnet_fused::ptx {

namespace detail {

#if defined(RF_EMULATED)

using emulator::Access;
using emulator::Fault;

// The bytes as a V, wherever they lie.
template <class V>
V value_at(const void* from) {
  Words<sizeof(V)> words;
  std::memcpy(&words, from, sizeof(V));
  return __builtin_bit_cast(V, words);
}

// A load's fault: 16 bytes (but no less than the access) further, so near that it reads inside of
// a test's guard bands.
template <class V>
V* chunk_off(Fault fault, V* address) {
  constexpr int kElements = sizeof(V) < 16 ? 16 / sizeof(V) : 1;
  return fault == Fault::kChunkOff ? address + kElements : address;
}

template <class V>
V load_global(emulator::Site site, const char* name, const V* from) {
  from = chunk_off(emulator::fault_at(site, name, {Fault::kChunkOff}), from);
  emulator::global(site, name, from, sizeof(V), sizeof(V), Access::kRead);
  return value_at<V>(from);
}

template <class V>
void store_global(emulator::Site site, const char* name, V* to, const V& value) {
  const Fault fault =
      emulator::fault_at(site, name, {Fault::kSkip, Fault::kRowOff, Fault::kChunkOff});
  if (fault == Fault::kSkip) return;
  if (fault == Fault::kRowOff) to += kWarpSize;
  to = chunk_off(fault, to);
  emulator::global(site, name, to, sizeof(V), sizeof(V), Access::kWrite);
  std::memcpy(static_cast<void*>(to), &value, sizeof(V));
}

// Shared addresses are checked, so a fault may lead anywhere.
inline SharedAddress astray(Fault fault, SharedAddress address, uint32_t bytes) {
  if (fault == Fault::kRowOff) return address + bytes * kWarpSize;
  return fault == Fault::kChunkOff ? address ^ 16u : address;
}

template <class V>
V load_shared(emulator::Site site, const char* name, SharedAddress from) {
  const Fault fault = emulator::fault_at(site, name, {Fault::kRowOff, Fault::kChunkOff});
  from = astray(fault, from, sizeof(V));
  return value_at<V>(emulator::shared(site, name, from, sizeof(V), sizeof(V), Access::kRead));
}

template <class V>
void store_shared(emulator::Site site, const char* name, SharedAddress to, const V& value) {
  const Fault fault =
      emulator::fault_at(site, name, {Fault::kSkip, Fault::kRowOff, Fault::kChunkOff});
  if (fault == Fault::kSkip) return;
  to = astray(fault, to, sizeof(V));
  std::memcpy(emulator::shared(site, name, to, sizeof(V), sizeof(V), Access::kWrite), &value,
              sizeof(V));
}

#else

enum class Cache { kDefault, kReadOnly };

template <int kBytes, Cache kCache>
RF_DEVICE Words<kBytes> load_global_words(const void* from) {
  const uint64_t address = __cvta_generic_to_global(from);
  constexpr bool kNc = kCache == Cache::kReadOnly;
  Words<kBytes> v;
  if constexpr (kBytes == 1) {
    uint16_t byte;  // inline assembly has no register of 8 bits
    if constexpr (kNc) {
      asm volatile("ld.global.nc.u8 %0, [%1];" : "=h"(byte) : "l"(address));
    } else {
      asm volatile("ld.global.u8 %0, [%1];" : "=h"(byte) : "l"(address));
    }
    v.word[0] = static_cast<uint8_t>(byte);
  } else if constexpr (kBytes == 2) {
    if constexpr (kNc) {
      asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v.word[0]) : "l"(address));
    } else {
      asm volatile("ld.global.u16 %0, [%1];" : "=h"(v.word[0]) : "l"(address));
    }
  } else if constexpr (kBytes == 4) {
    if constexpr (kNc) {
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v.word[0]) : "l"(address));
    } else {
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(v.word[0]) : "l"(address));
    }
  } else if constexpr (kBytes == 8) {
    if constexpr (kNc) {
      asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                   : "=r"(v.word[0]), "=r"(v.word[1])
                   : "l"(address));
    } else {
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(v.word[0]), "=r"(v.word[1])
                   : "l"(address));
    }
  } else {
    if constexpr (kNc) {
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                   : "l"(address));
    } else {
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                   : "l"(address));
    }
  }
  return v;
}

template <int kBytes>
RF_DEVICE void store_global_words(void* to, const Words<kBytes>& v) {
  const uint64_t address = __cvta_generic_to_global(to);
  if constexpr (kBytes == 1) {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(address), "h"(static_cast<uint16_t>(v.word[0]))
                 : "memory");
  } else if constexpr (kBytes == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(v.word[0]) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(v.word[0]) : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1])
                 : "memory");
  } else {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
}

template <int kBytes>
RF_DEVICE Words<kBytes> load_shared_words(SharedAddress from) {
  Words<kBytes> v;
  if constexpr (kBytes == 1) {
    uint16_t byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=h"(byte) : "r"(from));
    v.word[0] = static_cast<uint8_t>(byte);
  } else if constexpr (kBytes == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v.word[0]) : "r"(from));
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v.word[0]) : "r"(from));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "r"(from));
  } else {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(from));
  }
  return v;
}

template <int kBytes>
RF_DEVICE void store_shared_words(SharedAddress to, const Words<kBytes>& v) {
  if constexpr (kBytes == 1) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "h"(static_cast<uint16_t>(v.word[0]))
                 : "memory");
  } else if constexpr (kBytes == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v.word[0]) : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v.word[0]) : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(v.word[0]), "r"(v.word[1])
                 : "memory");
  } else {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
}

#endif

}  // namespace detail

template <class V>
RF_DEVICE V load_global(const V* from RF_SITE_PARAMETER) {
  static_assert(kMovable<V>, "one instruction moves 1, 2, 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  return detail::load_global(site, "ld.global", from);
#else
  return __builtin_bit_cast(V, detail::load_global_words<sizeof(V), detail::Cache::kDefault>(from));
#endif
}

// Through the read-only path: nobody writes there while the kernel runs.
template <class V>
RF_DEVICE V load_global_read_only(const V* from RF_SITE_PARAMETER) {
  static_assert(kMovable<V>, "one instruction moves 1, 2, 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  return detail::load_global(site, "ld.global.nc", from);
#else
  return __builtin_bit_cast(V,
                            detail::load_global_words<sizeof(V), detail::Cache::kReadOnly>(from));
#endif
}

template <class V>
RF_DEVICE void store_global(V* to, std::type_identity_t<V> value RF_SITE_PARAMETER) {
  static_assert(kMovable<V>, "one instruction moves 1, 2, 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  detail::store_global(site, "st.global", to, value);
#else
  detail::store_global_words<sizeof(V)>(to, __builtin_bit_cast(Words<sizeof(V)>, value));
#endif
}

// Asks for the line of global memory around an address to come to L2; nothing waits for it.
RF_DEVICE void prefetch_l2(const void* address RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  emulator::fault_at(site, "prefetch.global.L2", {});
  emulator::prefetch(site, "prefetch.global.L2", address);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#endif
}

template <class V>
RF_DEVICE V load_shared(SharedAddress from RF_SITE_PARAMETER) {
  static_assert(kMovable<V>, "one instruction moves 1, 2, 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  return detail::load_shared<V>(site, "ld.shared", from);
#else
  return __builtin_bit_cast(V, detail::load_shared_words<sizeof(V)>(from));
#endif
}

template <class V>
RF_DEVICE void store_shared(SharedAddress to, V value RF_SITE_PARAMETER) {
  static_assert(kMovable<V>, "one instruction moves 1, 2, 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  detail::store_shared(site, "st.shared", to, value);
#else
  detail::store_shared_words<sizeof(V)>(to, __builtin_bit_cast(Words<sizeof(V)>, value));
#endif
}

}  // namespace resnet_fused::ptx
