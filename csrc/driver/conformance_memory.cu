// Asynchronous copies, loads and stores.
#include "../ptx/mbarrier.h"
#include "conformance.h"

namespace resnet_fused::conformance {
namespace {

template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using type = uint8_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// input: [32, 4] slots of 16 bytes as they are before, [32, 4] what each lane copies the first
// kBytes of, [32] whether the copy is valid, [32] the slot it goes to, each slot once
// output: [32, 4] the slots afterwards
template <int kBytes>
struct CopyAsync : WarpBody {
  static constexpr uint32_t kSharedBytes = 32 * 16;
  static constexpr int kInputWords = 128 + 128 + 32 + 32;
  static constexpr int kOutputWords = 128;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const ptx::SharedAddress base = shared_base();
    const bool valid = load_word(input, 256 + lane) != 0;
    const uint32_t slot = load_word(input, 288 + lane);
    ptx::store_shared(base + 16 * lane,
                      ptx::load_global(reinterpret_cast<const uint4*>(input) + lane));
    ptx::sync_warp();
    ptx::cp_async<kBytes>(base + 16 * slot, input + 128 + 4 * lane, valid);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::sync_warp();
    ptx::store_global(reinterpret_cast<uint4*>(output) + lane,
                      ptx::load_shared<uint4>(base + 16 * lane));
  }
};

// Three groups of one copy each; after each wait the oldest is read. Then a fourth copy, in no
// group. input: [32, 4, 4] lane, copy, words output: the same
struct CopyGroups : WarpBody {
  static constexpr uint32_t kSharedBytes = 32 * 4 * 16;
  static constexpr int kInputWords = 32 * 16;
  static constexpr int kOutputWords = 32 * 16;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const ptx::SharedAddress base = shared_base() + 64 * lane;
    const uint32_t* from = input + 16 * lane;
    auto* to = reinterpret_cast<uint4*>(output) + 4 * lane;
    for (int i = 0; i < 3; ++i) {
      ptx::cp_async<16>(base + 16 * i, from + 4 * i, true);
      ptx::cp_async_commit_group();
    }
    ptx::cp_async_wait_group<2>();
    ptx::store_global(to, ptx::load_shared<uint4>(base));
    ptx::cp_async_wait_group<1>();
    ptx::store_global(to + 1, ptx::load_shared<uint4>(base + 16));
    ptx::cp_async<16>(base + 48, from + 12, true);
    ptx::cp_async_wait_all();
    ptx::store_global(to + 2, ptx::load_shared<uint4>(base + 32));
    ptx::store_global(to + 3, ptx::load_shared<uint4>(base + 48));
  }
};

// input: [128] words, [32] which element of kBytes each lane loads, [32] where it stores it, each
// place once
// output: [128] by way of load_global, [128] by way of load_global_read_only
template <int kBytes>
struct GlobalMemory : WarpBody {
  static constexpr int kInputWords = 128 + 32 + 32;
  static constexpr int kOutputWords = 256;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    using V = typename Bits<kBytes>::type;
    const uint32_t from = load_word(input, 128 + threadIdx.x);
    const uint32_t to = load_word(input, 160 + threadIdx.x);
    const auto* source = reinterpret_cast<const V*>(input);
    ptx::store_global(reinterpret_cast<V*>(output) + to, ptx::load_global(source + from));
    ptx::store_global(reinterpret_cast<V*>(output + 128) + to,
                      ptx::load_global_read_only(source + from));
  }
};

// input: as of GlobalMemory; output: [128], by way of shared memory
template <int kBytes>
struct SharedMemory : WarpBody {
  static constexpr uint32_t kSharedBytes = 2 * 512;
  static constexpr int kInputWords = 128 + 32 + 32;
  static constexpr int kOutputWords = 128;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    using V = typename Bits<kBytes>::type;
    const uint32_t lane = threadIdx.x;
    const ptx::SharedAddress source = shared_base();
    const ptx::SharedAddress target = source + 512;
    ptx::store_shared(source + 16 * lane,
                      ptx::load_global(reinterpret_cast<const uint4*>(input) + lane));
    ptx::store_shared(target + 16 * lane, uint4{0, 0, 0, 0});
    ptx::sync_warp();
    const V value = ptx::load_shared<V>(source + kBytes * load_word(input, 128 + lane));
    ptx::store_shared(target + kBytes * load_word(input, 160 + lane), value);
    ptx::sync_warp();
    ptx::store_global(reinterpret_cast<uint4*>(output) + lane,
                      ptx::load_shared<uint4>(target + 16 * lane));
  }
};

// Copies that complete on mbarriers: of which each lane's is one of 32 arrivals, and one beside
// them. Then each lane reads what another has copied.
// input: [64] words, [32] which word each lane copies, and the one behind it the second time, [32]
// whose copy it reads
// output: [2, 32]
struct CopyBarriers : WarpBody {
  static constexpr uint32_t kSharedBytes = 16 + 2 * 128;
  static constexpr int kOldestSm = 90;
  static constexpr int kInputWords = 64 + 64;
  static constexpr int kOutputWords = 64;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const ptx::SharedAddress base = shared_base();
    const ptx::SharedAddress words = base + 16;
    const uint32_t lane = threadIdx.x;
    const uint32_t from = load_word(input, 64 + lane);
    const uint32_t other = load_word(input, 96 + lane);
    if (lane == 0) {
      ptx::mbarrier_init(base, 32);
      ptx::mbarrier_init(base + 8, 32);
    }
    ptx::sync_warp();
    ptx::cp_async<4>(words + 4 * lane, input + from, true);
    ptx::cp_async_mbarrier_arrive_noinc(base);
    ptx::mbarrier_wait_parity(base, 0);
    ptx::store_global(output + lane, ptx::load_shared<uint32_t>(words + 4 * other));

    ptx::cp_async<4>(words + 128 + 4 * lane, input + (from + 1) % 64, true);
    ptx::cp_async_mbarrier_arrive(base + 8);
    ptx::mbarrier_arrive(base + 8);
    ptx::mbarrier_wait_parity(base + 8, 0);
    ptx::store_global(output + 32 + lane, ptx::load_shared<uint32_t>(words + 128 + 4 * other));
  }
};

}  // namespace

std::vector<Instruction> memory_instructions() {
  return {
      describe<CopyAsync<4>>("cp_async_4"),        describe<CopyAsync<8>>("cp_async_8"),
      describe<CopyAsync<16>>("cp_async_16"),      describe<CopyGroups>("cp_async_groups"),
      describe<GlobalMemory<1>>("global_1"),       describe<GlobalMemory<2>>("global_2"),
      describe<GlobalMemory<4>>("global_4"),       describe<GlobalMemory<8>>("global_8"),
      describe<GlobalMemory<16>>("global_16"),     describe<SharedMemory<1>>("shared_1"),
      describe<SharedMemory<2>>("shared_2"),       describe<SharedMemory<4>>("shared_4"),
      describe<SharedMemory<8>>("shared_8"),       describe<SharedMemory<16>>("shared_16"),
      describe<CopyBarriers>("cp_async_mbarrier"),
  };
}

}  // namespace resnet_fused::conformance
