// Loads and stores in the shared memory of a cluster's blocks.
#include "../ptx/cluster.h"
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

template <class V>
Instruction exchanges(const char* name) {
  return {name, Exchange<V>::kInputWords,       Exchange<V>::kOutputWords, 32,
          90,   launch_clusters_of<Exchange<V>>};
}

}  // namespace

std::vector<Instruction> cluster_instructions() {
  return {exchanges<uint32_t>("shared_cluster_4"), exchanges<uint2>("shared_cluster_8"),
          exchanges<uint4>("shared_cluster_16")};
}

}  // namespace resnet_fused::conformance
