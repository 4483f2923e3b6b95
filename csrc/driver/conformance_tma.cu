// Bulk copies: TMA's boxes and columns of pixels, there and back, alone and in clusters. Each case
// has a tensor map of its own, so it is one launch.
#include "../launch/tensor_map.h"
#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/tma.h"
#include "conformance.h"

#if defined(RF_EMULATED)
#include <cstring>
#endif

namespace resnet_fused::conformance {
namespace {

constexpr int kParameterWords = 32;
constexpr int kTensorWords = 2048;
constexpr int kBoxWords = 2048;    // the most that a box holds
constexpr uint32_t kBoxAt = 1024;  // in shared memory; mbarriers before it

// What tools/_conformance_tma.py writes in front of a tensor.
struct Geometry {
  int32_t rank;
  int32_t element_bytes;
  int32_t sizes[5];
  int32_t box[5];
  int32_t steps[5];
  int32_t at[5];
  int32_t swizzle;
  int32_t pixels;  // 0: tiled
  int32_t lower[3];
  int32_t upper[3];
  int32_t offsets[2];  // of im2col {W, H}; rank 3 has the first alone
};
static_assert(sizeof(Geometry) == 4 * kParameterWords);

int read_back(void* to, const void* from, size_t bytes) {
#if defined(RF_EMULATED)
  std::memcpy(to, from, bytes);
  return 0;
#else
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
#endif
}

TensorMapRequest request_of(const Geometry& g, uint32_t* tensor, bool rounds) {
  TensorMapRequest request;
  request.element = g.element_bytes == 1   ? TensorElement::kUint8
                    : g.element_bytes == 2 ? TensorElement::kBfloat16
                    : rounds               ? TensorElement::kTfloat32
                                           : TensorElement::kUint32;
  request.rank = g.rank;
  request.address = tensor;
  int64_t stride = (int64_t{g.sizes[0]} * g.element_bytes + 15) / 16 * 16;
  for (int d = 0; d < g.rank; ++d) {
    request.sizes[d] = g.sizes[d];
    request.box[d] = g.box[d];
    request.steps[d] = g.steps[d];
    if (d + 1 < g.rank) request.strides[d] = stride;
    if (d + 1 < g.rank) stride *= g.sizes[d + 1];
  }
  request.swizzle = static_cast<TensorSwizzle>(g.swizzle);
  request.pixels = g.pixels;
  for (int d = 0; d < 3; ++d) {
    request.lower[d] = g.lower[d];
    request.upper[d] = g.upper[d];
  }
  return request;
}

template <class Body>
__global__ void __launch_bounds__(32)
    tensor_kernel(const __grid_constant__ ptx::TensorMap map, const Geometry geometry,
                  const uint32_t bytes,   // of a box
                  const uint32_t* input,  // [kTensorWords]
                  uint32_t* output) {     // [kOutputWords]
  Body::run(map, geometry, bytes, input, output);
}

// One launch a case. The map is of the input's tensor, or of the output's. kRounds: it says that
// words are float32 and come in TF32.
template <class Body, bool kRounds>
int launch_tensors(int cases, const uint32_t* input, uint32_t* output) {
  for (int i = 0; i < cases; ++i) {
    const uint32_t* words = input + static_cast<size_t>(i) * Body::kInputWords;
    uint32_t* to = output + static_cast<size_t>(i) * Body::kOutputWords;
    Geometry geometry;
    int error = read_back(&geometry, words, sizeof(geometry));
    if (error != 0) return error;
    const uint32_t* tensor = words + kParameterWords;
    const TensorMapRequest request =
        request_of(geometry, Body::kStores ? to : const_cast<uint32_t*>(tensor), kRounds);
    ptx::TensorMap map;
    error = encode_tensor_map(request, &map);
    if (error != 0) return error;
    const auto bytes = static_cast<uint32_t>(box_bytes(request));
    error = RF_LAUNCH_CLUSTERS(tensor_kernel<Body>, Body::kBlocks, 32, Body::kBlocks,
                               kBoxAt + 4 * kBoxWords, nullptr, map, geometry, bytes, tensor, to);
    if (error != 0) return error;
  }
  return 0;
}

// Zeros everywhere, published; an mbarrier of one arrival and one of a whole cluster.
RF_DEVICE void prepare(ptx::SharedAddress base) {
  for (uint32_t i = threadIdx.x; i < kBoxWords / 4; i += 32) {
    ptx::store_shared(base + kBoxAt + 16 * i, uint4{0, 0, 0, 0});
  }
  ptx::fence_proxy_async_shared();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(base, 1);
    if (ptx::cluster_blocks() > 1) ptx::mbarrier_init(base + 8, ptx::cluster_blocks());
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
}

RF_DEVICE void dump(ptx::SharedAddress base, uint32_t* output) {
  for (uint32_t i = threadIdx.x; i < kBoxWords / 4; i += 32) {
    ptx::store_global(reinterpret_cast<uint4*>(output) + i,
                      ptx::load_shared<uint4>(base + kBoxAt + 16 * i));
  }
}

template <int kRank>
RF_DEVICE void load_box(const ptx::TensorMap& map, const Geometry& g, ptx::SharedAddress base) {
  int32_t at[kRank];
  for (int d = 0; d < kRank; ++d) at[d] = g.at[d];
  ptx::tma_load(base + kBoxAt, &map, at, base);
}

template <int kRank>
RF_DEVICE void store_box(const ptx::TensorMap& map, const Geometry& g, ptx::SharedAddress base) {
  int32_t at[kRank];
  for (int d = 0; d < kRank; ++d) at[d] = g.at[d];
  ptx::tma_store(&map, at, base + kBoxAt);
}

template <int kRank>
RF_DEVICE void store_pixels(const ptx::TensorMap& map, const Geometry& g, ptx::SharedAddress base) {
  int32_t at[kRank];
  for (int d = 0; d < kRank; ++d) at[d] = g.at[d];
  ptx::tma_store_im2col(&map, at, base + kBoxAt);
}

template <int kRank>
RF_DEVICE void load_pixels(const ptx::TensorMap& map, const Geometry& g, ptx::SharedAddress base) {
  int32_t at[kRank];
  uint16_t offsets[kRank - 2];
  for (int d = 0; d < kRank; ++d) at[d] = g.at[d];
  for (int d = 0; d < kRank - 2; ++d) {
    offsets[d] = static_cast<uint16_t>(d < 2 ? g.offsets[d] : 0);
  }
  ptx::tma_load_im2col(base + kBoxAt, &map, at, offsets, base);
}

// input: a geometry, [2048] a tensor; output: [2048] shared memory with the box, else zeros
struct Load {
  static constexpr int kInputWords = kParameterWords + kTensorWords;
  static constexpr int kOutputWords = kBoxWords;
  static constexpr int kThreads = 32;
  static constexpr int kOldestSm = 90;
  static constexpr uint32_t kBlocks = 1;
  static constexpr bool kStores = false;

  static RF_DEVICE void run(const ptx::TensorMap& map, const Geometry& g, uint32_t bytes,
                            const uint32_t*, uint32_t* output) {
    const ptx::SharedAddress base = shared_base();
    ptx::tma_prefetch(&map);
    prepare(base);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(base, bytes);
      if (g.pixels > 0) {
        if (g.rank == 3) load_pixels<3>(map, g, base);
        if (g.rank == 4) load_pixels<4>(map, g, base);
        if (g.rank == 5) load_pixels<5>(map, g, base);
      } else {
        if (g.rank == 1) load_box<1>(map, g, base);
        if (g.rank == 2) load_box<2>(map, g, base);
        if (g.rank == 3) load_box<3>(map, g, base);
        if (g.rank == 4) load_box<4>(map, g, base);
        if (g.rank == 5) load_box<5>(map, g, base);
      }
    }
    while (!ptx::mbarrier_try_wait_parity(base, 0)) {
    }
    dump(base, output);
  }
};

// input: a geometry, [2048] words of shared memory
// output: [2048] the tensor, else zeros; behind it what its words come to, each taken xor the
// others
struct Store {
  static constexpr int kInputWords = kParameterWords + kTensorWords;
  static constexpr int kOutputWords = kTensorWords + 4;
  static constexpr int kThreads = 32;
  static constexpr int kOldestSm = 90;
  static constexpr uint32_t kBlocks = 1;
  static constexpr bool kStores = true;

  static RF_DEVICE void run(const ptx::TensorMap& map, const Geometry& g, uint32_t,
                            const uint32_t* input, uint32_t* output) {
    const ptx::SharedAddress base = shared_base();
    for (uint32_t i = threadIdx.x; i < kTensorWords / 4; i += 32) {
      ptx::store_shared(base + kBoxAt + 16 * i,
                        ptx::load_global(reinterpret_cast<const uint4*>(input) + i));
    }
    ptx::fence_proxy_async_shared();
    ptx::sync_warp();
    if (threadIdx.x != 0) return;
    if (g.pixels > 0) {
      if (g.rank == 3) store_pixels<3>(map, g, base);
      if (g.rank == 4) store_pixels<4>(map, g, base);
      if (g.rank == 5) store_pixels<5>(map, g, base);
    } else {
      if (g.rank == 1) store_box<1>(map, g, base);
      if (g.rank == 2) store_box<2>(map, g, base);
      if (g.rank == 3) store_box<3>(map, g, base);
      if (g.rank == 4) store_box<4>(map, g, base);
      if (g.rank == 5) store_box<5>(map, g, base);
    }
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
    for (uint32_t i = 0; i < kTensorWords / 4; ++i) {  // nobody sees this
      ptx::store_shared(base + kBoxAt + 16 * i, uint4{i, i, i, i});
    }
    ptx::bulk_wait_group<0>();
    uint32_t all = 0;
    for (uint32_t i = 0; i < kTensorWords; ++i) all ^= ptx::load_global(output + i);
    ptx::store_global(output + kTensorWords, all);
  }
};

// Two blocks fetch half of shared memory each, for both: boxes of a tiled map one row apart, or
// neighbouring taps of an im2col map. Maps have four dimensions.
// input: a geometry, [2048] a tensor; output: [2, 2048] the blocks' shared memory
struct Multicast {
  static constexpr int kInputWords = kParameterWords + kTensorWords;
  static constexpr int kOutputWords = 2 * kBoxWords;
  static constexpr int kThreads = 32;
  static constexpr int kOldestSm = 90;
  static constexpr uint32_t kBlocks = 2;
  static constexpr bool kStores = false;

  static RF_DEVICE void run(const ptx::TensorMap& map, const Geometry& g, uint32_t bytes,
                            const uint32_t*, uint32_t* output) {
    const ptx::SharedAddress base = shared_base();
    const uint32_t rank = ptx::cluster_rank();
    prepare(base);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx_cluster(ptx::cluster_address(base, rank), 2 * bytes);
      const ptx::SharedAddress to = base + kBoxAt + 2 * kBoxWords * rank;
      const int32_t row = static_cast<int32_t>(rank);
      if (g.pixels > 0) {
        ptx::tma_load_im2col_multicast(
            to, &map, {g.at[0], g.at[1], g.at[2], g.at[3]},
            {static_cast<uint16_t>(g.offsets[0] + row), static_cast<uint16_t>(g.offsets[1])}, base,
            0b11);
      } else {
        ptx::tma_load_multicast(to, &map, {g.at[0], g.at[1] + row, g.at[2], g.at[3]}, base, 0b11);
      }
    }
    ptx::mbarrier_wait_parity(base, 0);
    dump(base, output + kBoxWords * rank);
    // Each block tells both that it has read; all wait for both.
    if (threadIdx.x < 2) {
      ptx::mbarrier_arrive_cluster(ptx::cluster_address(base + 8, threadIdx.x));
    }
    ptx::mbarrier_wait_parity(base + 8, 0);  // nobody reaches into a block that has left
  }
};

template <class Body, bool kRounds = false>
Instruction tensors(const char* name) {
  return {name,           Body::kInputWords, Body::kOutputWords,
          Body::kThreads, Body::kOldestSm,   launch_tensors<Body, kRounds>};
}

// input: [512] words, units of 16 bytes: where the copies begin in `input` and `output`, how long
// they are, below 64 each
// output: [512] words, the copy among zeros
struct BulkCopy : WarpBody {
  static constexpr uint32_t kSharedBytes = 1024 + 2048;
  static constexpr int kOldestSm = 90;
  static constexpr int kInputWords = 512 + 4;
  static constexpr int kOutputWords = 512;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const ptx::SharedAddress base = shared_base();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(base, 1);
      ptx::fence_mbarrier_init();
    }
    if (threadIdx.x != 0) return;
    const uint32_t from = load_word(input, 512), to = load_word(input, 513);
    const uint32_t bytes = 16 * load_word(input, 514);
    ptx::mbarrier_arrive_expect_tx(base, bytes);
    ptx::bulk_load(base + 1024, input + 4 * from, bytes, base);
    ptx::mbarrier_wait_parity(base, 0);
    ptx::bulk_store(output + 4 * to, base + 1024, bytes);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
  }
};

// Three phases of an mbarrier to which each lane comes some times and which waits for bytes, and of
// one whose phases are named by states. Each lane sends words to others by way of them.
// input: [32] arrivals of each lane, 1 or more, their sum, bytes
// output: [3, 8] what the waits said, 2 for no and 3 for yes; [3, 2, 32] the words
struct Barrier : WarpBody {
  static constexpr uint32_t kSharedBytes = 16 + 2 * 128;
  static constexpr int kOldestSm = 90;
  static constexpr int kInputWords = 32 + 4;
  static constexpr int kOutputWords = 24 + 3 * 64;

  static RF_DEVICE void say(uint32_t* to, bool answer) {
    ptx::store_global(to, 2 + static_cast<uint32_t>(answer));
  }

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const ptx::SharedAddress base = shared_base();
    const ptx::SharedAddress words = base + 16;
    const uint32_t lane = threadIdx.x;
    const uint32_t arrivals = load_word(input, lane);
    const uint32_t bytes = load_word(input, 33);
    if (lane == 0) {
      ptx::mbarrier_init(base, load_word(input, 32));
      ptx::mbarrier_init(base + 8, 32);
    }
    for (uint32_t phase = 0; phase < 3; ++phase) {
      uint32_t* said = output + 8 * phase;
      uint32_t* sent = output + 24 + 64 * phase;
      const uint32_t other = (lane + phase + 1) % 32;
      if (lane == 0) {
        say(said, ptx::mbarrier_test_wait_parity(base, phase & 1));
        say(said + 1, ptx::mbarrier_test_wait_parity(base, ~phase & 1));
        ptx::mbarrier_expect_tx(base, bytes);
      }
      ptx::cluster_arrive();  // of one block
      ptx::cluster_wait();
      ptx::store_shared(words + 4 * lane, 100 * phase + lane);
      ptx::mbarrier_arrive(base, arrivals);
      if (lane == 0) {
        say(said + 2, ptx::mbarrier_test_wait_parity(base, phase & 1));
        ptx::mbarrier_complete_tx(base, bytes);
      }
      ptx::mbarrier_wait_parity(base, phase & 1);
      ptx::store_global(sent + lane, ptx::load_shared<uint32_t>(words + 4 * other));

      ptx::store_shared(words + 128 + 4 * lane, 1000 * phase + lane);
      const uint64_t state = ptx::mbarrier_arrive_expect_tx(base + 8, bytes);
      if (lane == 0) ptx::mbarrier_complete_tx(base + 8, 32 * bytes);
      while (!ptx::mbarrier_try_wait(base + 8, state)) {
      }
      ptx::store_global(sent + 32 + lane, ptx::load_shared<uint32_t>(words + 128 + 4 * other));
    }
    if (lane != 0) return;
    ptx::mbarrier_invalidate(base);  // all lanes are beyond their waits for it
    ptx::store_shared(base, bytes);
    ptx::store_global(output + 5, ptx::load_shared<uint32_t>(base));
  }
};

}  // namespace

std::vector<Instruction> copy_instructions() {
  return {tensors<Load>("tma_load"),
          tensors<Load>("tma_load_im2col"),
          tensors<Load, true>("tma_load_tf32"),
          tensors<Load, true>("tma_load_im2col_tf32"),
          tensors<Store>("tma_store"),
          tensors<Store>("tma_store_im2col"),
          of_sm90a(tensors<Multicast>("tma_load_multicast")),
          of_sm90a(tensors<Multicast>("tma_load_im2col_multicast")),
          describe<BulkCopy>("bulk_copy"),
          describe<Barrier>("mbarrier")};
}

}  // namespace resnet_fused::conformance
