// Bulk copies between global and shared memory, by the async proxy: TMA. PTX ISA, Data Movement and
// Conversion Instructions: cp.async.bulk, cp.async.bulk.tensor, their commit_group and wait_group,
// prefetch.tensormap; Tensors. sm_90 and later.
//
// One thread issues a copy for all. A load's bytes, those outside of the tensor included, come off
// what an mbarrier of the same block expects; whoever has waited for its phase may read them. A
// store reads what has been published by fence_proxy_async_shared; its thread waits for it by
// groups. Coordinates are elements, innermost dimension first. A box lies in shared memory at a
// multiple of 128 bytes.
#pragma once

#include "common.h"
#include "tensor_map.h"

#if defined(RF_EMULATED)
#include <span>

#include "../emulator/tma.h"
#endif

namespace resnet_fused::ptx {

namespace detail {

#if defined(RF_EMULATED)

using emulator::Fault;

constexpr uint32_t kBoxOff = 128;  // bytes, of kRowOff

// What a planted fault changes in a tensor copy.
template <int kRank>
struct TensorCopy {
  int32_t at[kRank];
  SharedAddress shared;
  int swizzle = emulator::kMappedSwizzle;
  bool skipped = false;
  bool unrounded = false;

  TensorCopy(emulator::Site site, const char* name, const TensorMap* map,
             const int32_t (&coordinates)[kRank], SharedAddress address)
      : shared(address) {
    for (int d = 0; d < kRank; ++d) at[d] = coordinates[d];
    const Fault truncate = emulator::rounds_to_tf32(map) ? Fault::kTruncate : Fault::kNone;
    switch (emulator::fault_at(
        site, name,
        {Fault::kSkip, Fault::kCoordinateOff, Fault::kWrongSwizzle, Fault::kRowOff, truncate})) {
      case Fault::kSkip:
        skipped = true;
        break;
      case Fault::kCoordinateOff:
        ++at[kRank > 1 ? 1 : 0];
        break;
      case Fault::kWrongSwizzle:
        swizzle = emulator::other_swizzle(site, name, map);
        break;
      case Fault::kRowOff:
        shared += kBoxOff;
        break;
      case Fault::kTruncate:
        unrounded = true;
        break;
      default:
        break;
    }
  }
};

template <int kRank>
void tensor_load(emulator::Site site, const char* name, SharedAddress to, const TensorMap* map,
                 const int32_t (&at)[kRank], std::span<const uint16_t> offsets,
                 SharedAddress barrier, uint32_t mask) {
  const TensorCopy<kRank> copy(site, name, map, at, to);
  if (copy.skipped) return;
  emulator::tensor_load(site, name, map, copy.at, offsets, {copy.shared, barrier, mask},
                        copy.swizzle, copy.unrounded);
}

template <int kRank>
void tensor_store(emulator::Site site, const char* name, const TensorMap* map,
                  const int32_t (&at)[kRank], SharedAddress from, bool im2col) {
  const TensorCopy<kRank> copy(site, name, map, at, from);
  if (copy.skipped) return;
  emulator::tensor_store(site, name, map, copy.at, copy.shared, im2col, copy.swizzle);
}

#elif defined(RF_SM90)

// The i-th of up to five coordinates, or of up to three offsets; 0 behind the last.
template <int kCount, class V>
RF_DEVICE V nth(const V (&values)[kCount], int i) {
  return i < kCount ? values[i] : V{0};
}

// The instruction's operands: %0 shared memory, %1 the map, %2 the mbarrier, %3 to %7 coordinates,
// %8 to %10 offsets, %11 the mask of blocks. Those that a form has no use for are not in its text.
#define RF_TMA_AT_1 "{%3}"
#define RF_TMA_AT_2 "{%3, %4}"
#define RF_TMA_AT_3 "{%3, %4, %5}"
#define RF_TMA_AT_4 "{%3, %4, %5, %6}"
#define RF_TMA_AT_5 "{%3, %4, %5, %6, %7}"
#define RF_TMA_LOAD(rank, mode, cast, rest)                                                        \
  asm volatile("cp.async.bulk.tensor." #rank "d.shared::cluster.global" mode                       \
               ".mbarrier::complete_tx::bytes" cast " [%0], [%1, " RF_TMA_AT_##rank "], [%2]" rest \
                                                                                    ";" ::"r"(to), \
               "l"(map), "r"(barrier), "r"(nth(at, 0)), "r"(nth(at, 1)), "r"(nth(at, 2)),          \
               "r"(nth(at, 3)), "r"(nth(at, 4)), "h"(nth(offsets, 0)), "h"(nth(offsets, 1)),       \
               "h"(nth(offsets, 2)), "h"(mask)                                                     \
               : "memory")
#define RF_TMA_CAST(rank, mode, rest)                             \
  if constexpr (kMulticast) {                                     \
    RF_TMA_LOAD(rank, mode, ".multicast::cluster", rest ", %11"); \
  } else {                                                        \
    RF_TMA_LOAD(rank, mode, "", rest);                            \
  }

template <bool kIm2col, bool kMulticast, int kRank, int kOffsets>
RF_DEVICE void tensor_load(SharedAddress to, const TensorMap* map, const int32_t (&at)[kRank],
                           const uint16_t (&offsets)[kOffsets], SharedAddress barrier,
                           uint16_t mask) {
  if constexpr (kIm2col) {
    static_assert(kRank >= 3 && kRank <= 5 && kOffsets == kRank - 2);
    if constexpr (kRank == 3) {
      RF_TMA_CAST(3, ".im2col", ", {%8}")
    } else if constexpr (kRank == 4) {
      RF_TMA_CAST(4, ".im2col", ", {%8, %9}")
    } else {
      RF_TMA_CAST(5, ".im2col", ", {%8, %9, %10}")
    }
  } else if constexpr (kRank == 1) {
    RF_TMA_CAST(1, "", "")
  } else if constexpr (kRank == 2) {
    RF_TMA_CAST(2, "", "")
  } else if constexpr (kRank == 3) {
    RF_TMA_CAST(3, "", "")
  } else if constexpr (kRank == 4) {
    RF_TMA_CAST(4, "", "")
  } else {
    static_assert(kRank == 5);
    RF_TMA_CAST(5, "", "")
  }
}

// The same numbers; %2 is nothing here.
#define RF_TMA_STORE(rank, mode)                                                    \
  asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta" mode            \
               ".bulk_group [%1, " RF_TMA_AT_##rank "], [%0];" ::"r"(from),         \
               "l"(map), "n"(0), "r"(nth(at, 0)), "r"(nth(at, 1)), "r"(nth(at, 2)), \
               "r"(nth(at, 3)), "r"(nth(at, 4))                                     \
               : "memory")

template <bool kIm2col, int kRank>
RF_DEVICE void tensor_store(const TensorMap* map, const int32_t (&at)[kRank], SharedAddress from) {
  if constexpr (kIm2col) {
    static_assert(kRank >= 3 && kRank <= 5);
    if constexpr (kRank == 3) {
      RF_TMA_STORE(3, ".im2col_no_offs");
    } else if constexpr (kRank == 4) {
      RF_TMA_STORE(4, ".im2col_no_offs");
    } else {
      RF_TMA_STORE(5, ".im2col_no_offs");
    }
  } else if constexpr (kRank == 1) {
    RF_TMA_STORE(1, "");
  } else if constexpr (kRank == 2) {
    RF_TMA_STORE(2, "");
  } else if constexpr (kRank == 3) {
    RF_TMA_STORE(3, "");
  } else if constexpr (kRank == 4) {
    RF_TMA_STORE(4, "");
  } else {
    static_assert(kRank == 5);
    RF_TMA_STORE(5, "");
  }
}

#undef RF_TMA_STORE
#undef RF_TMA_CAST
#undef RF_TMA_LOAD
#undef RF_TMA_AT_1
#undef RF_TMA_AT_2
#undef RF_TMA_AT_3
#undef RF_TMA_AT_4
#undef RF_TMA_AT_5

#endif

}  // namespace detail

// Loads the box that begins at `at`: ptx::tma_load(to, &map, {c, row}, barrier).
template <int kRank>
RF_DEVICE void tma_load(SharedAddress to, const TensorMap* map, const int32_t (&at)[kRank],
                        SharedAddress barrier RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::tensor_load(site, "cp.async.bulk.tensor.tile", to, map, at, {}, barrier,
                      emulator::kOwnBlock);
#elif defined(RF_SM90)
  detail::tensor_load<false, false>(to, map, at, {uint16_t{0}}, barrier, 0);
#else
  detail::missing();
#endif
}

// sm_90a. Into each block of the cluster whose bit is set, at the same place, with that block's
// mbarrier.
template <int kRank>
RF_DEVICE void tma_load_multicast(SharedAddress to, const TensorMap* map,
                                  const int32_t (&at)[kRank], SharedAddress barrier,
                                  uint16_t mask RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::tensor_load(site, "cp.async.bulk.tensor.tile.multicast", to, map, at, {}, barrier, mask);
#elif defined(RF_SM90A)
  detail::tensor_load<false, true>(to, map, at, {uint16_t{0}}, barrier, mask);
#else
  detail::missing();
#endif
}

// With an im2col map of 3 to 5 dimensions: pixelsPerColumn pixels of channelsPerPixel channels from
// pixel `at` on, W first, then the next row and image, each `offsets` {W, H, D} further: a filter's
// tap.
template <int kRank>
RF_DEVICE void tma_load_im2col(SharedAddress to, const TensorMap* map, const int32_t (&at)[kRank],
                               const uint16_t (&offsets)[kRank - 2],
                               SharedAddress barrier RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::tensor_load(site, "cp.async.bulk.tensor.im2col", to, map, at, offsets, barrier,
                      emulator::kOwnBlock);
#elif defined(RF_SM90)
  detail::tensor_load<true, false>(to, map, at, offsets, barrier, 0);
#else
  detail::missing();
#endif
}

template <int kRank>
RF_DEVICE void tma_load_im2col_multicast(SharedAddress to, const TensorMap* map,
                                         const int32_t (&at)[kRank],
                                         const uint16_t (&offsets)[kRank - 2],
                                         SharedAddress barrier, uint16_t mask RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::tensor_load(site, "cp.async.bulk.tensor.im2col.multicast", to, map, at, offsets, barrier,
                      mask);
#elif defined(RF_SM90A)
  detail::tensor_load<true, true>(to, map, at, offsets, barrier, mask);
#else
  detail::missing();
#endif
}

// Stores the box that begins at `at`, as far as it lies in the tensor.
template <int kRank>
RF_DEVICE void tma_store(const TensorMap* map, const int32_t (&at)[kRank],
                         SharedAddress from RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::tensor_store(site, "cp.async.bulk.tensor.store", map, at, from, false);
#elif defined(RF_SM90)
  detail::tensor_store<false>(map, at, from);
#else
  detail::missing();
#endif
}

// Stores a column of pixels, which an im2col map of 3 to 5 dimensions says as for
// tma_load_im2col; there are no offsets.
template <int kRank>
RF_DEVICE void tma_store_im2col(const TensorMap* map, const int32_t (&at)[kRank],
                                SharedAddress from RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::tensor_store(site, "cp.async.bulk.tensor.im2col.store", map, at, from, true);
#elif defined(RF_SM90)
  detail::tensor_store<true>(map, at, from);
#else
  detail::missing();
#endif
}

// Fetches the map itself, which is read at the first copy else.
RF_DEVICE void tma_prefetch(const TensorMap* map RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  emulator::tensor_prefetch(site, map);
#elif defined(RF_SM90)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// `bytes` in a row, a multiple of 16, and so are both addresses.
RF_DEVICE void bulk_load(SharedAddress to, const void* from, uint32_t bytes,
                         SharedAddress barrier RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  constexpr const char* kName = "cp.async.bulk.load";
  const auto fault =
      emulator::fault_at(site, kName, {emulator::Fault::kSkip, emulator::Fault::kChunkOff});
  if (fault == emulator::Fault::kSkip) return;
  if (fault == emulator::Fault::kChunkOff) to ^= 16;
  emulator::bulk_load(site, kName, from, bytes, {to, barrier});
#elif defined(RF_SM90)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
#else
  detail::missing();
#endif
}

RF_DEVICE void bulk_store(void* to, SharedAddress from, uint32_t bytes RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  constexpr const char* kName = "cp.async.bulk.store";
  const auto fault =
      emulator::fault_at(site, kName, {emulator::Fault::kSkip, emulator::Fault::kChunkOff});
  if (fault == emulator::Fault::kSkip) return;
  if (fault == emulator::Fault::kChunkOff) from ^= 16;
  emulator::bulk_store(site, kName, to, from, bytes);
#elif defined(RF_SM90)
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(from), "r"(bytes)
               : "memory");
#else
  detail::missing();
#endif
}

// Closes the group of this thread's bulk stores since the last one; it may be empty.
RF_DEVICE void bulk_commit_group(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault =
      emulator::fault_at(site, "cp.async.bulk.commit_group", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::bulk_commit(site);
#elif defined(RF_SM90)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  detail::missing();
#endif
}

// Waits until at most the kPending youngest groups of this thread still have to read shared memory,
// which may be written again behind it.
template <int kPending>
RF_DEVICE void bulk_wait_group_read(RF_SITE_ONLY) {
  static_assert(kPending >= 0);
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "cp.async.bulk.wait_group.read",
                                        {emulator::Fault::kSkip, emulator::Fault::kWaitOneFewer});
  if (fault == emulator::Fault::kSkip) return;
  emulator::bulk_wait(site, fault == emulator::Fault::kWaitOneFewer ? kPending + 1 : kPending,
                      true);
#elif defined(RF_SM90)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#else
  detail::missing();
#endif
}

// ... still have to write global memory, which this thread may read behind it.
template <int kPending>
RF_DEVICE void bulk_wait_group(RF_SITE_ONLY) {
  static_assert(kPending >= 0);
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "cp.async.bulk.wait_group",
                                        {emulator::Fault::kSkip, emulator::Fault::kWaitOneFewer});
  if (fault == emulator::Fault::kSkip) return;
  emulator::bulk_wait(site, fault == emulator::Fault::kWaitOneFewer ? kPending + 1 : kPending,
                      false);
#elif defined(RF_SM90)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#else
  detail::missing();
#endif
}

}  // namespace resnet_fused::ptx
