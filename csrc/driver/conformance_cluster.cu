// Loads and stores in the shared memory of a cluster's blocks, and arrivals at their mbarriers.
#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "conformance.h"

namespace resnet_fused::conformance {
namespace {

// Four blocks, a warp each: every lane stores a V into some block's shared memory, then loads one
// from some block's.
// input: [4, 32] Vs, [4, 32] where each is stored, [4, 32] where each is loaded: 32 block + place
// output: [4, 32] Vs
template <class V>
struct Exchange {
  static constexpr uint32_t kBlocks = 4;
  static constexpr int kWords = static_cast<int>(sizeof(V) / 4 * 32 * kBlocks);
  static constexpr int kInputWords = kWords + 2 * 32 * static_cast<int>(kBlocks);
  static constexpr int kOutputWords = kWords;

  // Of a place's V in its own block.
  static RF_DEVICE ptx::SharedAddress offset(uint32_t place) {
    return shared_base() + static_cast<uint32_t>(sizeof(V)) * (place % 32);
  }

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = 32 * ptx::cluster_rank() + threadIdx.x;
    const V value = ptx::load_global(reinterpret_cast<const V*>(input) + lane);
    ptx::cluster_sync();  // all blocks have begun
    const uint32_t to = load_word(input, kWords + lane);
    ptx::store_shared_cluster(ptx::cluster_address(offset(to), to / 32), value);
    ptx::cluster_sync();
    const uint32_t from = load_word(input, kWords + 32 * kBlocks + lane);
    const V found = ptx::load_shared_cluster<V>(ptx::cluster_address(offset(from), from / 32));
    ptx::store_global(reinterpret_cast<V*>(output) + lane, found);
    ptx::cluster_sync();  // none ends while others read
  }
};

// Two blocks, a warp each: every lane hands a word to the other block, which reads it behind an
// arrival that says so; then lanes arrive that say nothing.
// input: [2, 32] words, [2, 32] lanes of the other block
// output: [2, 32] words of those lanes
struct Handed {
  static constexpr uint32_t kBlocks = 2;
  static constexpr int kInputWords = 128;
  static constexpr int kOutputWords = 64;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t other = 1 - ptx::cluster_rank();
    const uint32_t lane = 32 * ptx::cluster_rank() + threadIdx.x;
    // An mbarrier for each arrival: a lane that is ahead may not end a phase that others wait for.
    const auto barrier = [](uint32_t i) { return shared_base() + 8 * i; };
    const ptx::SharedAddress words = barrier(4);
    if (threadIdx.x == 0) {
      for (uint32_t i = 0; i < 4; ++i) ptx::mbarrier_init(barrier(i), 32);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
    ptx::store_shared(words + 4 * threadIdx.x, load_word(input, lane));
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(barrier(0), other));
    while (!ptx::mbarrier_try_wait_parity_cluster(barrier(0), 0)) {
    }
    const ptx::SharedAddress from = words + 4 * load_word(input, 64 + lane);
    ptx::store_global(output + lane,
                      ptx::load_shared_cluster<uint32_t>(ptx::cluster_address(from, other)));
    ptx::mbarrier_arrive_cluster(ptx::cluster_address(barrier(1), other));
    ptx::mbarrier_wait_parity_cluster(barrier(1), 0);
    ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(barrier(2), other));
    while (!ptx::mbarrier_try_wait_parity_relaxed(barrier(2), 0)) {
    }
    ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(barrier(3), other));
    ptx::mbarrier_wait_parity_relaxed(barrier(3), 0);  // nobody reaches into a block that has left
  }
};

template <class Body>
__global__ void __launch_bounds__(32) cluster_kernel(const uint32_t* input,  // [cases, kInputWords]
                                                     uint32_t* output) {  // [cases, kOutputWords]
  const uint32_t one = blockIdx.x / Body::kBlocks;
  Body::run(input + one * Body::kInputWords, output + one * Body::kOutputWords);
}

template <class Body>
int launch_clusters_of(int cases, const uint32_t* input, uint32_t* output) {
  return RF_LAUNCH_CLUSTERS(cluster_kernel<Body>, Body::kBlocks * static_cast<uint32_t>(cases), 32,
                            Body::kBlocks, 32 * 16, nullptr, input, output);
}

template <class Body>
Instruction of_cluster(const char* name) {
  return {name, Body::kInputWords, Body::kOutputWords, 32, 90, launch_clusters_of<Body>};
}

}  // namespace

std::vector<Instruction> cluster_instructions() {
  return {of_cluster<Exchange<uint32_t>>("shared_cluster_4"),
          of_cluster<Exchange<uint2>>("shared_cluster_8"),
          of_cluster<Exchange<uint4>>("shared_cluster_16"), of_cluster<Handed>("mbarrier_cluster")};
}

}  // namespace resnet_fused::conformance
