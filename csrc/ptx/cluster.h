// Clusters of blocks. PTX ISA: barrier.cluster, mapa, ld and st with .shared::cluster,
// %cluster_ctarank, %cluster_nctarank. sm_90 and later.
#pragma once

#include "memory.h"

#if defined(RF_EMULATED)
#include "../emulator/cluster.h"
#endif

namespace resnet_fused::ptx {

namespace detail {

#if defined(RF_EMULATED)

inline void* of_cluster(emulator::Site site, const char* name, Fault fault, SharedAddress address,
                        uint32_t bytes, Access access) {
  address = astray(fault, address, bytes);
  return emulator::cluster_shared(site, name, address, bytes, bytes, access);
}

#elif defined(RF_SM90)

template <int kBytes>
RF_DEVICE Words<kBytes> load_cluster_words(SharedAddress from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  Words<kBytes> v;
  if constexpr (kBytes == 4) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v.word[0]) : "r"(from) : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.word[0]), "=r"(v.word[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(from)
                 : "memory");
  }
  return v;
}

template <int kBytes>
RF_DEVICE void store_cluster_words(SharedAddress to, const Words<kBytes>& v) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 4) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(v.word[0]) : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(v.word[0]),
                 "r"(v.word[1])
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
}

#endif

}  // namespace detail

// The block's number in its cluster, and how many blocks that has; 0 and 1 without clusters.
RF_DEVICE uint32_t cluster_rank() {
#if defined(RF_EMULATED)
  return emulator::cluster_rank();
#elif defined(RF_SM90)
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
RF_DEVICE uint32_t cluster_blocks() {
#if defined(RF_EMULATED)
  return emulator::cluster_blocks();
#elif defined(RF_SM90)
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}

// The address, in the shared memory of the cluster's block `rank`, of what this block has at
// `address`: for the instructions that say so.
RF_DEVICE SharedAddress cluster_address(SharedAddress address, uint32_t rank RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "mapa", {emulator::Fault::kWrongLane});
  if (fault == emulator::Fault::kWrongLane) rank = (rank + 1) % emulator::cluster_blocks();
  return emulator::cluster_address(site, address, rank);
#elif defined(RF_SM90)
  SharedAddress mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  detail::missing();
  return address;
#endif
}

// Loads 4, 8 or 16 bytes of shared memory of any block of the cluster, as cluster_address gives
// their address. What another block's threads wrote is seen behind cluster_sync; that block must
// not have ended.
template <class V>
RF_DEVICE V load_shared_cluster(SharedAddress from RF_SITE_PARAMETER) {
  static_assert(kMovable<V> && sizeof(V) >= 4, "one instruction moves 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  constexpr const char* kName = "ld.shared::cluster";
  const auto fault =
      emulator::fault_at(site, kName, {emulator::Fault::kRowOff, emulator::Fault::kChunkOff});
  return detail::value_at<V>(
      detail::of_cluster(site, kName, fault, from, sizeof(V), emulator::Access::kRead));
#elif defined(RF_SM90)
  return __builtin_bit_cast(V, detail::load_cluster_words<sizeof(V)>(from));
#else
  detail::missing();
  return V{};
#endif
}

// Likewise. Whoever has read those bytes before is ordered ahead of this. Not for what TMA or wgmma
// reads: fence_proxy_async_shared publishes a thread's writes to its own block alone.
template <class V>
RF_DEVICE void store_shared_cluster(SharedAddress to, V value RF_SITE_PARAMETER) {
  static_assert(kMovable<V> && sizeof(V) >= 4, "one instruction moves 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  constexpr const char* kName = "st.shared::cluster";
  const auto fault = emulator::fault_at(
      site, kName, {emulator::Fault::kSkip, emulator::Fault::kRowOff, emulator::Fault::kChunkOff});
  if (fault == emulator::Fault::kSkip) return;
  std::memcpy(detail::of_cluster(site, kName, fault, to, sizeof(V), emulator::Access::kWrite),
              &value, sizeof(V));
#elif defined(RF_SM90)
  detail::store_cluster_words<sizeof(V)>(to, __builtin_bit_cast(Words<sizeof(V)>, value));
#else
  detail::missing();
#endif
}

// Every thread of the cluster arrives, then waits for the others; what they did before is seen. A
// block must not end while others may still reach into its shared memory: it waits here before.
RF_DEVICE void cluster_arrive(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "barrier.cluster.arrive", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::cluster_arrive(site);
#elif defined(RF_SM90)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
RF_DEVICE void cluster_wait(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "barrier.cluster.wait", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::cluster_wait(site);
#elif defined(RF_SM90)
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
RF_DEVICE void cluster_sync(RF_SITE_ONLY) {
  ptx::cluster_arrive(RF_SITE_LAST);  // the emulator has one of that name
  ptx::cluster_wait(RF_SITE_LAST);
}

}  // namespace resnet_fused::ptx
