// Atomics, and messages from one warp to another through global memory.
#include "../ptx/reduce.h"
#include "conformance.h"

namespace resnet_fused::conformance {
namespace {

enum class Add { kRelaxed, kAcquireRelease, kFloat };

// input: [33] values before, three unused; [32] the place each lane adds to, each of 0-31 once;
// [32] what it adds there; [32] what it adds to place 32 output: [33] values after, [32] what each
// lane got back from its place, three unused
template <Add kAdd>
struct AtomicAdd : WarpBody {
  static constexpr int kInputWords = 36 + 96;
  static constexpr int kOutputWords = 68;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const uint32_t place = load_word(input, 36 + lane);
    ptx::store_global(output + lane, load_word(input, lane));
    if (lane == 0) ptx::store_global(output + 32, load_word(input, 32));
    ptx::sync_warp();
    const uint32_t before = add(output + place, load_word(input, 68 + lane));
    add(output + 32, load_word(input, 100 + lane));
    ptx::store_global(output + 33 + lane, before);
  }

  static RF_DEVICE uint32_t add(uint32_t* at, uint32_t value) {
    if constexpr (kAdd == Add::kRelaxed) {
      return ptx::atomic_add(at, value);
    } else if constexpr (kAdd == Add::kAcquireRelease) {
      return ptx::atomic_add_acq_rel(at, value);
    } else {
      return __builtin_bit_cast(uint32_t, ptx::atomic_add(reinterpret_cast<float*>(at),
                                                          __builtin_bit_cast(float, value)));
    }
  }
};

enum class Way { kStore, kFence, kReduce };

// Warp 0 writes its values and raises a flag; warp 1 waits for the flag and reads them.
// input: [32] values, [32] the lane whose value each lane of warp 1 reads
// output: [32] values, [32] what warp 1 read, the flag, three unused
template <Way kWay>
struct Message : WarpBody {
  static constexpr int kThreads = 64;
  static constexpr int kInputWords = 64;
  static constexpr int kOutputWords = 68;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t* flag = output + 64;
    if (threadIdx.x < 32) {
      ptx::store_global(output + lane, load_word(input, lane));
      ptx::sync_warp();
      if (lane == 0) raise(flag);
    } else {
      if (lane == 0) {
        while (look(flag) == 0) {
          if constexpr (kWay == Way::kReduce) ptx::nanosleep(20);
        }
        if constexpr (kWay == Way::kFence) ptx::fence_acq_rel_gpu();
      }
      ptx::sync_warp();
      const uint32_t source = load_word(input, 32 + lane);
      ptx::store_global(output + 32 + lane, ptx::load_global(output + source));
    }
  }

  static RF_DEVICE void raise(uint32_t* flag) {
    if constexpr (kWay == Way::kFence) {
      ptx::fence_acq_rel_gpu();
      ptx::atomic_add(flag, 1u);
    } else if constexpr (kWay == Way::kReduce) {
      ptx::reduce_add_release(flag, 1u);
    } else {
      ptx::store_release(flag, 1u);
    }
  }

  static RF_DEVICE uint32_t look(uint32_t* flag) {
    if constexpr (kWay == Way::kFence) {
      return ptx::atomic_add(flag, 0u);
    } else {
      return ptx::load_acquire(flag);
    }
  }
};

}  // namespace

std::vector<Instruction> atomic_instructions() {
  return {
      describe<AtomicAdd<Add::kRelaxed>>("atomic_add"),
      describe<AtomicAdd<Add::kAcquireRelease>>("atomic_add_acq_rel"),
      describe<AtomicAdd<Add::kFloat>>("atomic_add_float"),
      describe<Message<Way::kStore>>("store_release_load_acquire"),
      describe<Message<Way::kFence>>("fence_acq_rel_gpu"),
      describe<Message<Way::kReduce>>("reduce_add_release"),
  };
}

}  // namespace resnet_fused::conformance
