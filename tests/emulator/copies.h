// What the kernels of copies.cpp and clusters.cpp share: the mistakes, where things lie in shared
// memory, and the tensor of the tiles.
#pragma once

#include "../../csrc/launch/tensor_map.h"
#include "../../csrc/ptx/mbarrier.h"
#include "../../csrc/ptx/proxy.h"
#include "../../csrc/ptx/tma.h"
#include "probes.h"

namespace resnet_fused::probes {

using ptx::SharedAddress;

constexpr uint32_t kRowBytes = 128;  // 32 words
constexpr int kRows = 8;
constexpr uint32_t kTileBytes = kRows * kRowBytes;

enum class Mistake {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kWrongParity,
  kNoInitFence,
  kNoInitBarrier,
  kMoreBytes,
  kFewerBytes,
  kNoArrival,
  kNoFence,
  kOneFence,
  kNoBarrier,
  kNoWait,
  kEarlyWrite,
  kUnorderedWrite,
  kLeaves,
  kNarrowWait,
  kRelaxedWait,
  kRelaxedArrival,
};

// Rows of 32 words of `words`, in tiles of 8 rows.
inline ptx::TensorMap rows_of(const uint32_t* words, int rows = 256) {
  TensorMapRequest request;
  request.element = TensorElement::kUint32;
  request.rank = 2;
  request.address = const_cast<uint32_t*>(words);
  request.sizes = {32, rows};
  request.strides = {kRowBytes};
  request.box = {32, kRows};
  ptx::TensorMap map;
  if (encode_tensor_map(request, &map) != 0) throw std::logic_error(tensor_map_fault(request));
  return map;
}

inline SharedAddress barrier_at(int i) { return base() + 8 * static_cast<uint32_t>(i); }
inline SharedAddress tile_at(int i) {
  return base() + 1024 + kTileBytes * static_cast<uint32_t>(i);
}
constexpr uint32_t kSharedBytes = 1024 + 4 * kTileBytes;

inline void prepare(int thread_count, uint32_t first_count, uint32_t second_count,
                    Mistake mistake) {
  if (thread() == 0) {
    ptx::mbarrier_init(barrier_at(0), first_count);
    ptx::mbarrier_init(barrier_at(1), first_count);
    ptx::mbarrier_init(barrier_at(2), second_count);
    ptx::mbarrier_init(barrier_at(3), second_count);
    if (mistake != Mistake::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (mistake != Mistake::kNoInitBarrier) ptx::barrier_sync(0, thread_count);
}

// One block.
inline Probe block(uint32_t threads, std::function<void(const Memory&)> kernel) {
  return {1, threads, kSharedBytes, false, std::move(kernel)};
}

}  // namespace resnet_fused::probes
