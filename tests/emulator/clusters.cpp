// Clusters: copies for several blocks, and loads and stores in the others' shared memory. Kernels
// with one mistake each, beside the same kernel without it. Marks as in hazards.cpp.
#include "../../csrc/ptx/cluster.h"
#include "copies.h"

namespace resnet_fused::probes {
namespace {

// Blocks of a cluster fetch one half of a tile each, for both.
void multicast(const Memory& memory, Mistake mistake) {
  constexpr uint32_t kHalf = kTileBytes / 2;
  TensorMapRequest request;
  request.element = TensorElement::kUint32;
  request.rank = 2;
  request.address = const_cast<uint32_t*>(memory.in);
  request.sizes = {32, 256};
  request.strides = {kRowBytes};
  request.box = {32, kRows / 2};
  ptx::TensorMap map;
  if (encode_tensor_map(request, &map) != 0) throw std::logic_error("multicast");
  const uint32_t rank = ptx::cluster_rank();
  if (thread() == 0) {
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::mbarrier_init(barrier_at(1), 2);
    if (mistake != Mistake::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (mistake == Mistake::kNoInitBarrier) {
    ptx::sync_threads();
  } else {
    ptx::cluster_sync();
  }
  for (uint32_t tile = 0; tile < 2; ++tile) {
    if (thread() == 0) {
      // Both blocks must have read the last tile before either writes the next into both.
      if (mistake == Mistake::kNarrowWait) {
        ptx::mbarrier_wait_parity(barrier_at(1), (tile & 1) ^ 1);
      } else if (mistake == Mistake::kRelaxedWait) {
        ptx::mbarrier_wait_parity_relaxed(barrier_at(1), (tile & 1) ^ 1);
      } else if (mistake != Mistake::kNoEmptyWait) {
        ptx::mbarrier_wait_parity_cluster(barrier_at(1), (tile & 1) ^ 1);
      }
      ptx::mbarrier_arrive_expect_tx(barrier_at(0), kTileBytes);
      const auto row = static_cast<int32_t>(kRows * tile + kRows / 2 * rank);
      ptx::tma_load_multicast(tile_at(0) + kHalf * rank, &map, {0, row}, barrier_at(0),
                              0b11);  // the halves' copies
    }
    ptx::mbarrier_wait_parity(barrier_at(0), tile & 1);
    for (int i = thread(); i < 32 * kRows; i += 32) {
      const auto value = ptx::load_shared<uint32_t>(tile_at(0) + 4 * i);
      ptx::store_global(memory.out + 512 * rank + 32 * kRows * tile + i, value);
    }
    ptx::sync_warp();
    if (thread() < 2) {
      const auto to = ptx::cluster_address(barrier_at(1), static_cast<uint32_t>(thread()));
      if (mistake == Mistake::kRelaxedArrival) {
        ptx::mbarrier_arrive_relaxed_cluster(to);
      } else {
        ptx::mbarrier_arrive_cluster(to);  // <- remote arrival
      }
    }
  }
  if (mistake != Mistake::kLeaves) ptx::cluster_sync();
}

// Each block sums what all blocks of its cluster have put into their shared memory, and gives each
// its own rank.
void reduce(const Memory& memory, Mistake mistake) {
  const uint32_t rank = ptx::cluster_rank();
  const auto at = [](int i) { return base() + 4 * static_cast<uint32_t>(i); };
  for (uint32_t i = 0; i < rank; ++i) ptx::sync_warp();  // none has come as far as another
  ptx::store_shared<uint32_t>(at(thread()), 100 * rank + thread());
  if (mistake != Mistake::kNoBarrier) ptx::cluster_sync();
  uint32_t sum = 0;
  for (uint32_t other = 0; other < ptx::cluster_blocks(); ++other) {
    const auto from = ptx::cluster_address(at(thread()), other);
    sum += ptx::load_shared_cluster<uint32_t>(from);  // <- reduced
  }
  if (mistake != Mistake::kNoWait) ptx::cluster_sync();
  const uint32_t next = (rank + 1) % ptx::cluster_blocks();
  const auto to = ptx::cluster_address(at(thread()), next);
  ptx::store_shared_cluster(to, sum + 1000 * rank);  // <- given
  if (mistake != Mistake::kUnorderedWrite) ptx::cluster_sync();
  ptx::store_global(memory.out + 32 * rank + thread(),
                    ptx::load_shared<uint32_t>(at(thread())));  // <- given's reader
  if (mistake == Mistake::kNoFence && thread() == 0) {
    ptx::fence_proxy_async_shared();
    ptx::bulk_store(memory.out, base(), 64);  // <- given's copy
  }
  if (mistake == Mistake::kLeaves && rank == 0) return;
  if (mistake == Mistake::kLeaves) {
    ptx::sync_threads();
    for (int i = 0; i < 8; ++i) ptx::sync_warp();
    ptx::load_shared_cluster<uint32_t>(ptx::cluster_address(at(0), 0));  // <- left behind
  }
}

// Block 0 reads what block 1 has written, and then writes over.
void read_by_others(const Memory& memory, bool meet) {
  const auto at = base() + 4 * static_cast<uint32_t>(thread());
  ptx::store_shared<uint32_t>(at, 7 + thread());
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 0) {
    const auto from = ptx::cluster_address(at, 1);
    ptx::store_global(memory.out + thread(), ptx::load_shared_cluster<uint32_t>(from));
  }
  if (meet) ptx::cluster_sync();
  if (ptx::cluster_rank() == 1) ptx::store_shared<uint32_t>(at, 0);
  ptx::cluster_sync();
}

}  // namespace

void add_clusters(Table& t) {
  const std::pair<const char*, Mistake> casts[] = {
      {"multicast", Mistake::kNone},
      {"multicast_no_init_fence", Mistake::kNoInitFence},
      {"multicast_no_init_barrier", Mistake::kNoInitBarrier},
      {"multicast_no_empty_wait", Mistake::kNoEmptyWait},
      {"multicast_leaves", Mistake::kLeaves},
      {"multicast_narrow_wait", Mistake::kNarrowWait},
      {"multicast_relaxed_wait", Mistake::kRelaxedWait},
      {"multicast_relaxed_arrival", Mistake::kRelaxedArrival},
  };
  for (const auto& [name, mistake] : casts) {
    t[name] = {4,
               32,
               kSharedBytes,
               false,
               [mistake](const Memory& m) {
                 Memory own = m;
                 own.out += 1024 * (blockIdx.x / 2);
                 multicast(own, mistake);
               },
               2};
  }
  const std::pair<const char*, Mistake> reductions[] = {
      {"reduce", Mistake::kNone},           {"reduce_no_barrier", Mistake::kNoBarrier},
      {"reduce_no_wait", Mistake::kNoWait}, {"reduce_unordered", Mistake::kUnorderedWrite},
      {"reduce_copied", Mistake::kNoFence}, {"reduce_leaves", Mistake::kLeaves},
  };
  for (const auto& [name, mistake] : reductions) {
    t[name] = {4, 32, 128, false, [mistake](const Memory& m) { reduce(m, mistake); }, 4};
  }
  for (const bool meet : {false, true}) {
    t[meet ? "read_by_others" : "read_by_others_no_barrier"] = {
        2, 32, 128, false, [meet](const Memory& m) { read_by_others(m, meet); }, 2};
  }
  t["cast_to_nobody"] = block(1, [](const Memory& m) {
    const ptx::TensorMap map = rows_of(m.in);
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::fence_mbarrier_init();
    ptx::tma_load_multicast(tile_at(0), &map, {0, 0}, barrier_at(0), 0);  // <- cast_to_nobody
  });
  t["cluster_wait_alone"] = {2,
                             32,
                             0,
                             false,
                             [](const Memory&) {
                               ptx::cluster_wait();  // <- cluster_wait_alone
                             },
                             2};
  t["cluster_of_16"] = {16, 32, 0, false, [](const Memory&) {}, 16};
  t["mapa_too_far"] = {2,
                       1,
                       64,
                       false,
                       [](const Memory&) {
                         ptx::cluster_address(base(), 2);  // <- mapa_too_far
                       },
                       2};
}

}  // namespace resnet_fused::probes
